"""The real StarCraft II behind the calls of `envs/smac.py`: the package `smac`, one worker process for each game.

This adapter has only been run against a stand-in with the same methods, not against the real game.
A game starts at its first reset. SMAC takes a seed only there: game b gets seed + b, and later seeds are ignored.
"""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process, util
from threading import Thread

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from envs.common import METADATA, check_actions, describe_discrete, games_to_reset

NEEDS = (
    "get it with `pip install git+https://github.com/oxwhirl/smac.git`, and StarCraft II 4.10 with its maps in SC2PATH"
)


class StarCraft2(VectorEnv):
    """B games of one SMAC map. Before its first reset a game counts as finished; one failure closes all games."""

    metadata = METADATA

    def __init__(self, task="5m_vs_6m", num_envs=1, device="cpu"):
        try:
            os.listdir(os.path.join(os.environ.get("SC2PATH") or "SC2PATH is not set", "Versions"))
            from smac.env import StarCraft2Env

            self.make = partial(StarCraft2Env, map_name=task, continuing_episode=True)  # so that it tells a time-out
            facts = self.make().get_env_info()  # this does not start the game
        except Exception as error:
            raise ValueError(f"no StarCraft II, {NEEDS} ({type(error).__name__}: {error})".replace("\n", " ")) from None
        N, A, O, S, limit = map(facts.get, ("n_agents", "n_actions", "obs_shape", "state_shape", "episode_limit"))
        describe_discrete(self, num_envs, device, N, A, O, S, limit, best_return=None)
        pool = partial(ProcessPoolExecutor, 1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
        self.workers = [pool() for _ in range(num_envs)]
        self.last = [(np.zeros((N, O), "f"), np.zeros(S, "f"), np.zeros((N, A), "?"), False, True, False)] * num_envs

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
            for b, answer in [(b, self.workers[b].submit(_work, self.make, order)) for b, order in orders.items()]:
                rewards[b], self.last[b] = answer.result()
        except Exception as error:
            self.close()
            raise RuntimeError(f"StarCraft II, game {b} failed: {error!r}") from None
        columns = (torch.tensor(np.array(column), device=self.device) for column in (rewards, *zip(*self.last)))
        reward, obs, state, avail, won, terminated, truncated = columns
        return obs, reward, terminated, truncated, {"state": state, "avail_actions": avail, "won": won}


def _work(make, order):  # in a worker: a step with this list of actions, or a new battle, the first one with this seed
    global game
    reward, over, facts = 0.0, False, {"battle_won": False}
    if isinstance(order, list):
        reward, over, facts = game.step(order)
        if not facts:
            raise OSError("the connection to the game is lost")
    else:
        if "game" not in globals():
            game = make(seed=order)
            util.Finalize(None, game.close, exitpriority=0)
            Thread(target=lambda: (parent_process().join(), game.close(), os._exit(1)), daemon=True).start()
        game.reset()
    cut = bool(facts.get("episode_limit"))
    seen = np.array(game.get_obs(), "f"), np.array(game.get_state(), "f"), np.array(game.get_avail_actions(), "?")
    return reward, (*seen, bool(facts["battle_won"]), over and not cut, cut)
