"""The real StarCraft II behind the calls of `envs/smac.py`: the package `smac`, one worker process for each game.

This adapter has only been run against a stand-in with the same methods, not against the real game.
A game starts with seed + b at its first reset, and SMAC ignores later seeds. Until then it counts as finished.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from signal import SIG_IGN, SIGINT, signal
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from envs.common import METADATA, check_actions, describe, games_to_reset


class Seen(NamedTuple):
    """What one game shows."""

    obs: np.ndarray  # (N, O)
    state: np.ndarray  # (S,)
    avail: np.ndarray  # (N, A)
    reward: float
    won: bool
    over: bool
    cut: bool  # over, by the time limit


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
        ignore = dict(
            mp_context=get_context("spawn"), initializer=signal, initargs=(SIGINT, SIG_IGN)
        )
        self.workers = [ProcessPoolExecutor(1, **ignore) for _ in range(num_envs)]
        nothing = np.zeros((N, O), "f"), np.zeros(S, "f"), np.zeros((N, A), "?")
        self.seen = [Seen(*nothing, reward=0.0, won=False, over=True, cut=False)] * num_envs

    def reset(self, *, seed=None, options=None):
        games = games_to_reset(self, options).nonzero()[:, 0].tolist()
        obs, *_, info = self._play({b: None if seed is None else seed + b for b in games})
        return obs, info

    def step(self, actions):
        over = np.array([seen.over for seen in self.seen])
        avail = np.array([seen.avail for seen in self.seen])
        check_actions(self, actions.cpu(), torch.from_numpy(avail), torch.from_numpy(over))
        return self._play({b: actions[b].tolist() for b in np.flatnonzero(~over)})

    def close_extras(self, **kwargs):
        for worker in self.workers:
            worker.shutdown()

    def _play(self, orders):
        """Hand each {game: order} to its worker and gather what all games show."""
        self.seen = [seen._replace(reward=0.0) for seen in self.seen]
        calls = {}
        try:
            for b, order in orders.items():
                calls[b] = self.workers[b].submit(_work, *self.game, order)
            for b, call in calls.items():
                self.seen[b] = call.result()
        except Exception as error:  # of the game, its connection or its process
            self.close()
            raise ConnectionError(f"StarCraft II, game {b} failed: {error!r}") from None
        columns = [torch.tensor(np.array(column), device=self.device) for column in zip(*self.seen)]
        seen = Seen(*columns)
        info = {"state": seen.state, "avail_actions": seen.avail, "won": seen.won}
        return seen.obs, seen.reward.float(), seen.over & ~seen.cut, seen.cut, info


def _work(Game, task, order):
    """In a worker: take a step if `order` is a list of actions, reset if it is a seed."""
    global game
    if isinstance(order, list):
        reward, over, facts = game.step(order)
        if not facts:
            raise OSError("the connection to the game is lost")
    else:
        if "game" not in globals():
            game = Game(
                map_name=task, seed=order, continuing_episode=True
            )  # so that time-outs are told
            Thread(target=_follow, daemon=True).start()
        game.reset()
        reward, over, facts = 0.0, False, {"battle_won": False}
    obs, state = np.array(game.get_obs(), "f"), np.array(game.get_state(), "f")
    avail = np.array(game.get_avail_actions(), "?")
    return Seen(
        obs, state, avail, reward, facts["battle_won"], over, facts.get("episode_limit", False)
    )


def _follow():
    """End the game and the worker when the program ends, however it does."""
    parent_process().join()
    game.close()
    os._exit(1)
