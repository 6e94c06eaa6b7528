"""Polynomial games: a polynomial of two agents' continuous actions says what the team earns.

The four games of PJAP (Tilbury et al., 2024, sections 3 and 4), each played as one step, with x and
y in [-1, 1]:

    twin-peaks         -A (x^2 + y^2) - B (x y)^2 + C x y: equal peaks at +-(0.612, 0.612)
    sign-agreement     x y: best where both go all the way to the same side
    action-agreement   -(x - y)^2: best wherever the two are the same
    decoupled          x + y: each agent can do without the other

They are where offline learning with continuous actions fails first: each agent answers what the
other one did in the data, and in the first two the answer is wrong as soon as the data lie
elsewhere than the policies. What follows from that in closed form is algorithms/polygames.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from envs.common import OneStep, describe, pixels

A, B, C = 1, 4, 5  # of twin peaks, as in the paper's figures
# Both slopes of twin peaks are 0 here, and both curvatures negative.
PEAK = math.sqrt((C - 2 * A) / (2 * B))  # 0.612


class Game(NamedTuple):
    reward: Callable  # R(x, y), elementwise
    best: float  # the highest R in the box
    peak: float  # x = y of a best joint action with both above 0: the peak, or else the corner


GAMES = {
    "twin-peaks": Game(
        lambda x, y: -A * (x**2 + y**2) - B * (x * y) ** 2 + C * x * y,
        (C - 2 * A) ** 2 / (4 * B),
        PEAK,
    ),
    "sign-agreement": Game(lambda x, y: x * y, 1.0, 1.0),
    "action-agreement": Game(lambda x, y: -((x - y) ** 2), 0.0, 1.0),
    "decoupled": Game(lambda x, y: x + y, 2.0, 1.0),
}


class Polynomial(OneStep):
    """B games of one task, a key of `GAMES`; actions (B, 2, 1) in [-1, 1]."""

    def __init__(self, task="twin-peaks", num_envs=1, device="cpu"):
        self.task, (self.reward, best, self.peak) = task, GAMES[task]
        describe(self, num_envs, device, 2, 1, 1, 1, time_limit=1, best_return=best, discrete=False)
        self.over = torch.ones(num_envs, dtype=torch.bool, device=device)

    def pay(self, actions):
        x, y = actions[..., 0].float().unbind(1)  # (B,) each
        return self.reward(x, y)

    def picture(self, actions=None):
        """The reward over all joint actions, and the first game's as a star: (height, width, 3)."""
        figure = Figure(figsize=(3, 3), layout="constrained")
        axis = figure.subplots()
        surface(axis, self.reward, self.task, name="a")
        if actions is not None:
            x, y = actions[0, :, 0].tolist()
            axis.plot(x, y, "*", ms=13, mfc="#c0392b", mec="white", mew=0.8)
        return pixels(figure)


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
