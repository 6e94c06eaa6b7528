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
from matplotlib.figure import Figure

from envs.common import OneStep, describe, pixels

A, B, C = 1, 4, 5  # of twin peaks, as in the paper's figures
PEAK = math.sqrt(
    (C - 2 * A) / (2 * B)
)  # 0.612: there both slopes of twin peaks are 0, and both curvatures negative


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
# Joint actions, policies (x, y) and paths are tensors whose last dimension is 2; S seeds, K steps, M data points.
MADDPG, PJAP, DATA, TRUE = "#d1510c", "#0b6fb8", "#4d4d4d", "#111111"
WIDTH = {MADDPG: 3.0, PJAP: 1.6}  # both stay visible where they coincide


def surface(axis, reward, title, points=torch.empty(0, 2), name=r"\theta", size=1.08):
    """The reward over [-size, size]^2 as a light background, greener is better; joint actions (M, 2) as small dots."""
    line = np.linspace(-size, size, 81)
    values = reward(line, line[:, None])
    levels = np.linspace(max(values.min(), -2), values.max(), 11)  # the deep corners of twin peaks in one colour
    axis.contourf(line, line, values, levels, cmap="Greens", alpha=0.45, extend="min")
    axis.set(xlim=(-size, size), ylim=(-size, size), xticks=(-1, 0, 1), yticks=(-1, 0, 1), aspect="equal")
    axis.set(title=title, xlabel=f"${name}_x$", ylabel=f"${name}_y$")
    axis.scatter(*points.cpu().T, s=6, color=DATA, alpha=0.35, linewidths=0)


def draw_paths(axis, paths, colour):
    """Policies over time (S, K+1, 2): lines from a ring to a star, the first seed in bold."""
    paths = paths.cpu().numpy().T  # (2, K+1, S)
    axis.plot(*paths[..., 1:], color=colour, lw=0.7, alpha=0.4)
    axis.plot(*paths[..., 0], color=colour, lw=WIDTH[colour])
    axis.plot(*paths[:, 0, 0], "o", ms=7, mfc="white", mec=colour, mew=1.8, zorder=4)
    axis.plot(*paths[:, -1, 0], "*", ms=13, mfc=colour, mec="white", mew=0.8, zorder=5)


def mark_peaks(axis, peak):
    """Crosses at both peaks of twin peaks."""
    axis.plot((-peak, peak), (-peak, peak), "x", ms=9, mew=2, color=TRUE)


def band(axis, values, colour, label=None):
    """Curves of all seeds (S, K): their mean as a line, their range as a band."""
    values = values.cpu()
    axis.plot(values.mean(0), color=colour, lw=WIDTH[colour], label=label)
    axis.fill_between(range(values.shape[1]), values.amin(0), values.amax(0), color=colour, alpha=0.18, lw=0)
    axis.grid(alpha=0.25)


def draw_step(reward, policy, point, brud, true):
    """One step from a policy, given one data point: what BRUD does, its two parts, and the true gradient, (2,) each."""
    figure, (step_x, step_y) = Figure(figsize=(5.6, 5.6), layout="constrained"), brud
    axis = figure.subplots()
    surface(axis, reward, "One BRUD step in sign agreement, R = xy")
    for step, colour, width, label in (
        (brud, MADDPG, 0.014, r"BRUD step, $\nabla J = (a_y, a_x)$"),
        ((step_x, 0), "#eea37d", 0.008, "its two parts, one per agent"),
        ((0, step_y), "#eea37d", 0.008, None),
        (true, TRUE, 0.014, r"true gradient, $\nabla R = (\theta_y, \theta_x)$"),
    ):
        axis.quiver(*policy, *step, color=colour, width=width, label=label, scale=1, scale_units="xy", angles="xy")
    axis.plot(*policy, "o", ms=9, mfc="white", mec=TRUE, mew=1.8, zorder=4)
    axis.plot(*point, "o", ms=9, color=DATA)
    axis.annotate(r"policy $(\theta_x, \theta_y)$", policy, (10, 8), textcoords="offset points")
    axis.annotate("data point $(a_x, a_y)$", point, (-45, 12), textcoords="offset points")
    axis.legend(loc="lower left", fontsize=9)
    return figure


def draw_buffers(reward, capacities, batch_size, paths, buffers):
    """A column for each size of a replay buffer: paths (sizes, S, K+1, 2), their rewards, and what the first seed's
    buffer holds at the end, of buffers (sizes, S, largest size, 2)."""
    figure = Figure(figsize=(3.6 * len(capacities), 10), layout="constrained")
    axes = figure.subplots(3, len(capacities), squeeze=False).T
    for (top, middle, bottom), capacity, path, buffer in zip(axes, capacities, paths, buffers):
        surface(top, reward, f"buffer of {capacity}" + (" (on-policy)" if capacity == batch_size else ""))
        draw_paths(top, path, MADDPG)
        band(middle, reward(*path.unbind(-1)), MADDPG)
        middle.set(xlabel="update", ylabel="reward of the policy", ylim=(-1.05, 1.05))
        surface(bottom, reward, "buffer at the last update", buffer[0], "a", size=1.5)
        draw_paths(bottom, path[:1, -1:], MADDPG)
    figure.suptitle("Online MADDPG, sign agreement: the older the data, the longer the way")
    return figure


def draw_fields(reward, data, mean, grid, brud, true, paths):
    """Data (M, 2) and their mean (2,); both gradients (G, 2) at points of a grid (G, 2); paths (starts, S, K+1, 2)."""
    figure = Figure(figsize=(13.5, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    surface(left, reward, f"a. {len(data)} data points, mean {mean}", data, "a")
    left.plot(*mean, "P", ms=12, color=TRUE, mec="white")
    surface(middle, reward, r"b. $\nabla R$ (black) and $\nabla J$ (orange, not to scale)")
    for field, colour in ((true, TRUE), (0.6 * brud / brud.norm(dim=1, keepdim=True), MADDPG)):
        middle.quiver(*grid.cpu().T, *field.cpu().T, color=colour, scale=7, width=0.006)
    surface(right, reward, "c. offline MADDPG from three starts")
    for path in paths:
        draw_paths(right, path, MADDPG)
    return figure


def draw_ends(reward, peak, sigmas, data, paths, centre):
    """A column for each spread of the data (sigmas, M, 2), with one seed's paths (sigmas, starts, K+1, 2) and end."""
    figure = Figure(figsize=(3.5 * len(sigmas), 4.1), layout="constrained")
    for axis, sigma, points, starts in zip(figure.subplots(1, len(sigmas), squeeze=False)[0], sigmas, data, paths):
        x, y = (starts[0, -1] + 1e-5).tolist()  # no "-0.00"
        surface(axis, reward, rf"$\sigma$ = {sigma:g}: ends at ({x:.2f}, {y:.2f})", points)
        mark_peaks(axis, peak)
        for path in starts:
            draw_paths(axis, path[None], MADDPG)
    figure.suptitle(f"Offline MADDPG, twin peaks (crosses), data around the {'peak' if centre else 'origin'}")
    return figure


def draw_methods(reward, peak, sigmas, data, paths, distances):
    """A row for each spread of the data (sigmas, M, 2): MADDPG's and PJAP's paths (sigmas, 2, S, K+1, 2), how far the
    data drawn were from the policy (sigmas, 2, S, K), and the rewards."""
    figure = Figure(figsize=(15.5, 3.7 * len(sigmas)), layout="constrained")
    axes = figure.subplots(len(sigmas), 4, squeeze=False)
    for (left, middle, gaps, rewards), sigma, points, *both in zip(axes, sigmas, data, paths, distances):
        surface(left, reward, rf"data, $\sigma$ = {sigma:g}", points, "a")
        surface(middle, reward, rf"policies, $\sigma$ = {sigma:g}")
        mark_peaks(middle, peak)
        for colour, name, path, distance in zip((MADDPG, PJAP), ("MADDPG", "MADDPG + PJAP"), *both):
            draw_paths(middle, path, colour)
            band(gaps, distance, colour)
            band(rewards, reward(*path.unbind(-1)), colour, name)
        gaps.set(xlabel="epoch", ylabel=r"mean $|a - \theta|$ of sampled data", ylim=(0, None))
        rewards.set(xlabel="epoch", ylabel="reward of the policy", ylim=(-1, None))
        rewards.axhline(reward(peak, peak), color=TRUE, lw=1, ls=":", label="peak")
        rewards.legend(loc="lower right")
    return figure


# ---------------------------------------------------------------- the window
SLIDERS = {"A": (0.1, 3), "B": (0.5, 10), "C": (0.5, 10), "mean": (-1, 1), "spread": (0, 1.5), "alpha": (0, 20),
           "log10 epsilon": (-6, 0)}  # fmt: skip


def add_controls(figure, names, chosen, values, learn):
    """Fill a figure with controls, and with what a method learns by them.

    Args:
        names, chosen: of the games, and the one to begin with.
        values: of `SLIDERS`, in their order, to begin with.
        learn: function of (a game's name, whether PJAP is on, *values) that returns the reward, the data (M, 2), and a
            function that returns paths (starts, S, K+1, 2) or raises FloatingPointError.
    Returns:
        The controls by name; they stop when nobody holds them.
    """
    from matplotlib.widgets import CheckButtons, RadioButtons, Slider  # here, so that games start without it

    left, right = figure.add_axes((0.06, 0.46, 0.42, 0.48)), figure.add_axes((0.56, 0.46, 0.40, 0.48))
    controls = {"game": RadioButtons(figure.add_axes((0.68, 0.17, 0.2, 0.2)), names, active=names.index(chosen)),
                "PJAP": CheckButtons(figure.add_axes((0.68, 0.08, 0.2, 0.07)), ["PJAP"], [True])}  # fmt: skip
    for row, ((name, (low, high)), value) in enumerate(zip(SLIDERS.items(), values)):
        controls[name] = Slider(figure.add_axes((0.14, 0.34 - 0.045 * row, 0.4, 0.03)), name, low, high, valinit=value)

    def redraw(_=None):
        (pjap,) = controls["PJAP"].get_status()
        title, colour = ("MADDPG + PJAP", PJAP) if pjap else ("MADDPG", MADDPG)
        settings = (controls[name].val for name in SLIDERS)
        reward, data, train = learn(controls["game"].value_selected, pjap, *settings)
        left.clear()
        right.clear()
        surface(left, reward, title, data)
        right.set(xlabel="epoch", ylabel="reward of the policy", title="from the three starts")
        try:
            for path in train():
                draw_paths(left, path, colour)
                band(right, reward(*path.unbind(-1)), colour)
        except FloatingPointError as error:
            right.set_title(str(error))
        figure.canvas.draw_idle()

    for name, control in controls.items():
        (control.on_changed if name in SLIDERS else control.on_clicked)(redraw)
    redraw()
    return controls


def open_window(fill):
    """Show a window, whose figure `fill` fills with the controls that it returns, until it is closed.

    Raises:
        ValueError: there is no display.
    """
    import matplotlib.pyplot as plt  # looks for a window system, which the saved figures do not need

    try:
        figure = plt.figure(figsize=(12, 8))
        if figure.canvas.required_interactive_framework is None:  # the fallback that only saves files
            raise ImportError
    except ImportError:  # or a window system was asked for by name and is not there
        raise ValueError("--interactive needs a display and found none: leave it out to write files") from None
    controls = fill(figure)  # noqa: F841  held until the window closes
    plt.show()
