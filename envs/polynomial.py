"""Polynomial games: two agents with one continuous action each; a polynomial of the two says what the team earns.

The four games of PJAP (Tilbury et al., 2024, sections 3 and 4), each played as one step, x and y in [-1, 1]:

    twin-peaks         -A (x^2 + y^2) - B (x y)^2 + C x y,  A, B, C = 1, 4, 5: equal peaks at +-(0.612, 0.612)
    sign-agreement     x y: best where both go all the way to the same side
    action-agreement   -(x - y)^2: best wherever the two are the same
    decoupled          x + y: each agent can do without the other

They are where offline learning with continuous actions fails first: each agent answers what the other one did in the
data, and in the first two the answer is wrong as soon as the data lie elsewhere than the policies. What follows from
that in closed form is algorithms/polygames.py, whose pictures are drawn by the second half of this file.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from matplotlib.figure import Figure

from envs.common import METADATA, games_to_reset, pixels

A, B, C = 1, 4, 5  # of twin peaks, as in the paper's figures
PEAK = math.sqrt((C - 2 * A) / (2 * B))  # 0.612: there both slopes of twin peaks are 0, and both curvatures negative


class Game(NamedTuple):
    reward: Callable  # R(x, y), elementwise
    best: float  # the highest R in the box
    peak: float  # x = y of a best joint action with both above 0: the peak, or else the corner


GAMES = {
    "twin-peaks": Game(
        lambda x, y: -A * (x**2 + y**2) - B * (x * y) ** 2 + C * x * y, (C - 2 * A) ** 2 / (4 * B), PEAK
    ),
    "sign-agreement": Game(lambda x, y: x * y, 1.0, 1.0),
    "action-agreement": Game(lambda x, y: -((x - y) ** 2), 0.0, 1.0),
    "decoupled": Game(lambda x, y: x + y, 2.0, 1.0),
}


class Polynomial(VectorEnv):
    """B one-step games with a constant observation 1 and state 1; actions (B, 2, 1) in [-1, 1].

    Args:
        task: a key of `GAMES`.
    Raises:
        ValueError: an unknown task; in `step`, actions of a wrong shape or, on a CPU, not in [-1, 1].
    """

    metadata = METADATA

    def __init__(self, task="twin-peaks", num_envs=1, device="cpu"):
        if task not in GAMES:
            raise ValueError(f"polynomial has no task {task!r}: choose one of {', '.join(GAMES)}")
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        self.task, (self.reward, self.best_return, self.peak) = task, GAMES[task]
        self.num_envs, self.device, self.time_limit = num_envs, torch.device(device), 1
        self.num_agents, self.num_actions, self.obs_dim, self.state_dim = 2, 1, 1, 1
        self.single_observation_space = Box(-np.inf, np.inf, (2, 1))
        self.single_action_space = Box(-1, 1, (2, 1))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.over = torch.ones(num_envs, dtype=torch.bool, device=device)

    def reset(self, *, seed=None, options=None):
        return self._begin(games_to_reset(self, options))

    def step(self, actions):
        shape = (self.num_envs, 2, 1)
        if actions.shape != shape or not actions.is_floating_point():
            told = f"{actions.dtype} of shape {tuple(actions.shape)}"
            raise ValueError(f"actions must be floating-point numbers of shape {shape}, not {told}")
        # Values are read on a CPU only: for those on a GPU the host would have to wait.
        if actions.device.type == "cpu" and (wrong := ~(actions.abs() <= 1)).any():  # also NaN
            b, i, _ = wrong.nonzero()[0].tolist()
            raise ValueError(f"actions must lie in [-1, 1]; that of agent {i} in game {b} is {actions[b, i, 0]}")
        return self._play(actions)

    def compile(self, compiler):
        """Let `compiler`, a function of functions, make one graph of what a step computes and one of a reset."""
        torch._dynamo.mark_static_address(self.over)  # a CUDA graph may write there
        self._play, self._begin = compiler(self._play), compiler(self._begin)

    def picture(self, actions=None):
        """The reward over all joint actions, and as a star what the first game's agents did: (height, width, 3)."""
        figure = Figure(figsize=(3, 3), layout="constrained")
        axis = figure.subplots()
        surface(axis, self.reward, self.task, name="a")
        if actions is not None:
            axis.plot(*actions[0, :, :1].tolist(), "*", ms=13, mfc="#c0392b", mec="white", mew=0.8)
        return pixels(figure)

    def _begin(self, mask):
        self.over.logical_and_(~mask)
        return self._observe()

    def _play(self, actions):
        reward = self.reward(*actions[..., 0].float().unbind(1))  # (B,)
        reward = torch.where(self.over, 0.0, reward)
        self.over.fill_(True)
        obs, info = self._observe()
        return obs, reward, self.over.clone(), torch.zeros_like(self.over), info

    def _observe(self):
        ones = torch.ones(self.num_envs, 2, 1, device=self.device)
        return ones, {"state": ones[:, 0].clone()}


# ---------------------------------------------------------------- pictures
DATA = "#4d4d4d"  # the colour of recorded joint actions


def surface(axis, reward, title, points=torch.empty(0, 2), name=r"\theta", size=1.08):
    """The reward over [-size, size]^2, greener is better; joint actions (M, 2) as small dots."""
    line = np.linspace(-size, size, 81)
    values = reward(line, line[:, None])
    low = max(values.min(), -2)  # the deep corners of twin peaks in one colour
    levels = np.linspace(low, values.max(), 11)
    axis.contourf(line, line, values, levels, cmap="Greens", alpha=0.45, extend="min")
    axis.set(xlim=(-size, size), ylim=(-size, size), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    axis.set(title=title, xlabel=f"${name}_x$", ylabel=f"${name}_y$", aspect="equal")
    axis.scatter(*points.cpu().T, s=6, color=DATA, alpha=0.35, linewidths=0)
