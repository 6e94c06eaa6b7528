"""The real StarCraft II behind the calls of `envs/smac.py`: the package `smac`, one worker process for each game.

This adapter has only been run against a stand-in with the same methods, not against the real game.
A game starts at its first reset. SMAC takes a seed only there: game b gets seed + b, and later seeds are ignored.
"""

import multiprocessing
import os
import signal
import sys
from contextlib import suppress

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from envs.common import METADATA, check_actions, describe_discrete, games_to_reset

NEEDS = """the real game needs `pip install git+https://github.com/oxwhirl/smac.git` (`pip install smac` is another \
project), StarCraft II 4.10 with the SMAC maps, and SC2PATH set to its folder"""


class StarCraft2(VectorEnv):
    """B games of one SMAC map. Before its first reset a game counts as finished; one failure closes all games."""

    metadata = METADATA

    def __init__(self, task="5m_vs_6m", num_envs=1, device="cpu"):
        if not os.path.isdir(os.path.join(os.environ.get("SC2PATH") or os.devnull, "Versions")):
            raise ValueError(f"SC2PATH names no folder with StarCraft II: {NEEDS}")
        context, self.workers, self.last = multiprocessing.get_context("spawn"), [], {}  # last: each game's last answer
        for _ in range(max(num_envs, 1)):
            pipe, far_end = context.Pipe()
            self.workers.append((context.Process(target=_work, args=(far_end, task), daemon=True), pipe))
            self.workers[-1][0].start()
            far_end.close()
        try:
            self._listen(range(len(self.workers)))
        except RuntimeError as error:
            raise ValueError(f"{error}: {NEEDS}") from None
        N, A, O, S, limit = self.last[0]
        describe_discrete(self, num_envs, device, N, A, O, S, limit, best_return=None)
        blank = np.zeros((N, O), np.float32), np.zeros(S, np.float32), np.zeros((N, A), bool)
        self.last = dict.fromkeys(range(num_envs), (*blank, 0.0, True, False, False))

    def reset(self, *, seed=None, options=None):
        games = games_to_reset(self, options).nonzero()[:, 0].tolist()
        obs, _, _, _, info = self._play({b: None if seed is None else seed + b for b in games})
        return obs, info

    def step(self, actions):
        check_actions(self, actions)
        orders = {}
        for b, (obs, state, avail, _, terminated, truncated, won) in self.last.items():
            if terminated or truncated:
                self.last[b] = (obs, state, avail, 0.0, terminated, truncated, won)
                continue
            orders[b] = actions[b].tolist()
            for n, action in enumerate(orders[b]):
                if not (0 <= action < self.num_actions and avail[n, action]):
                    raise ValueError(f"game {b}, agent {n}: action {action} is not available")
        return self._play(orders)

    def close(self, **kwargs):
        for _, pipe in self.workers:
            pipe.close()  # its worker then closes the game and ends
        for worker, _ in self.workers:
            worker.join(20)
            worker.kill()

    def _play(self, orders):
        """Carry out {game: actions, or the seed of a reset}. Returns what `step` returns."""
        for b, order in orders.items():
            with suppress(OSError):  # a worker that is gone is noticed below
                self.workers[b][1].send(order)
        self._listen(orders)
        columns = [torch.tensor(np.array(column), device=self.device) for column in zip(*self.last.values())]
        obs, state, avail, reward, terminated, truncated, won = columns
        return obs, reward.float(), terminated, truncated, {"state": state, "avail_actions": avail, "won": won}

    def _listen(self, games):
        try:
            for b in games:
                answer = self.workers[b][1].recv()
                if isinstance(answer, str):
                    raise OSError(answer)
                self.last[b] = answer
        except BaseException as error:
            self.close()
            if not isinstance(error, (EOFError, OSError)):
                raise
            raise RuntimeError(f"StarCraft II, game {b} failed: {str(error) or 'its process has ended'}") from None


def _work(pipe, task):
    """One game: says its sizes, then answers a seed (or None) with a fresh battle and a list of actions with a step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the game is closed on the way out
    game, steps = None, 0
    try:
        from smac.env import StarCraft2Env

        facts = StarCraft2Env(map_name=task).get_env_info()
        sizes = [facts[key] for key in ("n_agents", "n_actions", "obs_shape", "state_shape", "episode_limit")]
        pipe.send(sizes)
        while True:
            order = pipe.recv()
            if isinstance(order, list):
                reward, over, facts = game.step(order)
                if not facts:
                    raise OSError("the connection to the game is lost")
                steps, won = steps + 1, facts["battle_won"]
                # SMAC tells a time-out from a loss in the last step only by who is alive.
                cut = over and steps >= sizes[-1] and not won and facts["dead_allies"] < sizes[0]
            else:
                game = game or StarCraft2Env(map_name=task, seed=order)
                game.reset()
                steps, reward, over, won, cut = 0, 0.0, False, False, False
            obs, state = np.array(game.get_obs(), np.float32), np.array(game.get_state(), np.float32)
            avail = np.array(game.get_avail_actions(), bool)
            pipe.send((obs, state, avail, float(reward), bool(over and not cut), bool(cut), bool(won)))
    except Exception as error:
        with suppress(OSError):  # nobody listens any more
            pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        if game:
            game.close()
