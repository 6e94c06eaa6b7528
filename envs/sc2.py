"""The real StarCraft II behind the calls of `envs/smac.py`: the package `smac`, one worker process for each game.

This adapter has only been run against a stand-in with the same methods, not against the real game.
A game starts with seed + b at its first reset, and SMAC ignores later seeds. Until then it counts as finished.
"""

import os
from concurrent.futures import ProcessPoolExecutor as Pool
from multiprocessing import get_context, parent_process
from signal import SIG_IGN, SIGINT, signal
from threading import Thread

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from envs.common import METADATA, check_actions, describe_discrete, games_to_reset


class StarCraft2(VectorEnv):
    metadata = METADATA

    def __init__(self, task="5m_vs_6m", num_envs=1, device="cpu"):
        try:
            os.listdir(os.path.join(os.environ["SC2PATH"] or os.devnull, "Versions"))
            from smac.env import StarCraft2Env as Game

            facts = Game(map_name=task).get_env_info()  # this does not start it
        except Exception as error:
            needs = "`pip install git+https://github.com/oxwhirl/smac.git`, StarCraft II 4.10 and its maps in SC2PATH"
            raise ValueError(f"{type(error).__name__}: {error}: this needs {needs}".replace("\n", " ")) from None
        N, A, O, S, limit = map(facts.get, ("n_agents", "n_actions", "obs_shape", "state_shape", "episode_limit"))
        describe_discrete(self, num_envs, device, N, A, O, S, limit, best_return=None)
        self.workers = [Pool(1, get_context("spawn"), signal, (SIGINT, SIG_IGN)) for _ in range(num_envs)]
        self.task, blank = (Game, task), (np.zeros((N, O), "f"), np.zeros(S, "f"), np.zeros((N, A), "?"))
        self.last = [(*blank, False, True, False)] * num_envs

    def reset(self, *, seed=None, options=None):
        games = games_to_reset(self, options).nonzero()[:, 0].tolist()
        return self._play({b: None if seed is None else seed + b for b in games})[::4]

    def step(self, actions):
        check_actions(self, actions)
        orders = {b: actions[b].tolist() for b, last in enumerate(self.last) if True not in last[-2:]}
        for b, n in ((b, n) for b in orders for n in range(self.num_agents)):
            if orders[b][n] not in self.last[b][2][n].nonzero()[0]:
                raise ValueError(f"game {b}, agent {n}: action {orders[b][n]} is not available")
        return self._play(orders)

    def close_extras(self, **kwargs):
        for worker in self.workers:
            worker.shutdown()

    def _play(self, orders):
        rewards = np.zeros(self.num_envs, "f")
        try:
            for b, call in [(b := i, self.workers[i].submit(_work, *self.task, order)) for i, order in orders.items()]:
                rewards[b], self.last[b] = call.result()
        except Exception as error:
            self.close()
            raise ConnectionError(f"StarCraft II, game {b} failed: {error!r}") from None
        columns = (torch.tensor(np.array(column), device=self.device) for column in (rewards, *zip(*self.last)))
        reward, obs, state, avail, won, over, cut = columns
        return obs, reward, over & ~cut, cut, {"state": state, "avail_actions": avail, "won": won}


def _work(Game, task, order):  # in a worker: take a step if `order` is a list of actions, reset if it is a seed
    global game
    if isinstance(order, list):
        reward, over, facts = game.step(order)
        if not facts:
            raise OSError("the connection to the game is lost")
    else:
        if "game" not in globals():
            game = Game(map_name=task, seed=order, continuing_episode=True)  # so that `facts` tells a time-out
            Thread(target=lambda: (parent_process().join(), game.close(), os._exit(1)), daemon=True).start()
        game.reset()
        reward, over, facts = 0.0, False, {"battle_won": False}
    seen = np.array(game.get_obs(), "f"), np.array(game.get_state(), "f"), np.array(game.get_avail_actions(), "?")
    return reward, (*seen, facts["battle_won"], over, facts.get("episode_limit", False))
