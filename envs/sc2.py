"""The real StarCraft II behind the calls of `envs/smac.py`: the package `smac`, one worker process
for each game.

This adapter has only been run against a stand-in with the same methods, not against the real game.
A game starts with seed + b at its first reset, and SMAC ignores later seeds. Until then it counts
as finished.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from envs.common import METADATA, check_actions, describe, games_to_reset


class StarCraft2(VectorEnv):
    metadata = METADATA

    def __init__(self, task="5m_vs_6m", num_envs=1, device="cpu"):
        try:
            os.listdir(os.path.join(os.environ["SC2PATH"] or os.devnull, "Versions"))
            from smac.env import StarCraft2Env  # here, as nearly nobody has it

            facts = StarCraft2Env(map_name=task).get_env_info()  # this does not start it
        except Exception as error:  # whatever is missing, and however it says so
            why = f"{type(error).__name__}: {error}".replace("\n", " ")
            package = "`pip install git+https://github.com/oxwhirl/smac.git`"
            needs = f"{package}, StarCraft II 4.10 and its maps in SC2PATH"
            raise ValueError(f"{why}: this needs {needs}") from None
        N, A, O, S = (facts[key] for key in ("n_agents", "n_actions", "obs_shape", "state_shape"))
        describe(self, num_envs, device, N, A, O, S, facts["episode_limit"])
        self.game = StarCraft2Env, task
        spawn = get_context("spawn")
        self.workers = [ProcessPoolExecutor(1, spawn) for _ in range(num_envs)]
        nothing = np.zeros((N, O), "f"), np.zeros(S, "f"), np.zeros((N, A), "?")
        # obs, state, avail, won, over and cut of each game
        self.seen = [(*nothing, False, True, False)] * num_envs

    def reset(self, *, seed=None, options=None):
        games = games_to_reset(self, options).nonzero()[:, 0].tolist()
        obs, *_, info = self._play({b: None if seed is None else seed + b for b in games})
        return obs, info

    def step(self, actions):
        _, _, avail, _, over, _ = (torch.from_numpy(np.array(x)) for x in zip(*self.seen))
        check_actions(self, actions.cpu(), avail, over)
        games = (~over).nonzero()[:, 0].tolist()
        return self._play({b: actions[b].tolist() for b in games})

    def close_extras(self, **kwargs):
        for worker in self.workers:
            worker.shutdown()

    def _play(self, orders):
        """Hand each {game: order} to its worker, and gather what all games show."""
        rewards, calls = np.zeros(self.num_envs, "f"), {}
        try:
            for b, order in orders.items():
                calls[b] = self.workers[b].submit(_work, *self.game, order)
            for b, call in calls.items():
                rewards[b], *seen = call.result()
                self.seen[b] = tuple(seen)
        except Exception as error:  # of the game, its connection or its process
            self.close()
            raise ConnectionError(f"StarCraft II, game {b} failed: {error!r}") from None
        columns = [np.array(column) for column in (rewards, *zip(*self.seen))]
        columns = [torch.tensor(column, device=self.device) for column in columns]
        reward, obs, state, avail, won, over, cut = columns
        info = {"state": state, "avail_actions": avail, "won": won}
        return obs, reward, over & ~cut, cut, info


def _work(Game, task, order):
    """In a worker: a step if `order` is a list of actions, a reset if it is a seed."""
    global game
    if isinstance(order, list):
        reward, over, facts = game.step(order)
        if not facts:
            raise OSError("the connection to the game is lost")
    else:
        if "game" not in globals():
            # A continuing episode is one whose time-out is told.
            game = Game(map_name=task, seed=order, continuing_episode=True)
            Thread(target=_follow, daemon=True).start()
        game.reset()
        reward, over, facts = 0.0, False, {"battle_won": False}
    obs, state = np.array(game.get_obs(), "f"), np.array(game.get_state(), "f")
    avail = np.array(game.get_avail_actions(), "?")
    return reward, obs, state, avail, facts["battle_won"], over, facts.get("episode_limit", False)


def _follow():
    """End the game and the worker when the program ends, however it does."""
    parent_process().join()
    game.close()
    os._exit(1)
