"""One-step matrix games for N agents: everybody picks an action, one table says what the team
earns.

They are where offline coordination fails first: with several equally good joint actions, each
agent's own marginal in the dataset says nothing about which one its teammates will pick.
"""

import json

import torch
from matplotlib.figure import Figure

from envs.common import OneStep, describe, pixels

# task: payoff[action of agent 0][action of agent 1]
MATRIX_TASKS = {
    # Two equally good conventions, AB and BA (InSPO, Figure 1; AlberDICE uses the same game).
    "xor": [[0, 1], [1, 0]],
    # Three equilibria worth 5, 10 and 20 (InSPO, Figure 2; the off-diagonal 0 is our choice, see
    # the README).
    "m-ne": [[5, 0, 0], [0, 10, 0], [0, 0, 20]],
    # The Iterated Coordination Game, left/right (MOMA-PPO, section 5.2), played as one stateless
    # step.
    "coordination": [[1, 0], [0, 1]],
    # Claus & Boutilier (1998): the best joint action lies beside the worst ones.
    "climbing": [[11, -30, 0], [-30, 7, 6], [0, 0, 5]],
    # Claus & Boutilier (1998): two optima, and a penalty k = -30 for mixing them up.
    "penalty": [[-30, 0, 10], [0, 2, 0], [10, 0, -30]],
}


class MatrixGame(OneStep):
    """B games of one table.

    Args:
        task: a name in `MATRIX_TASKS`, or a nested list (or its JSON text) with one level for each
            agent.
    Raises:
        ValueError: an unknown name, or a table that is ragged, not finite, or has fewer than two
            agents.
    """

    def __init__(self, task="xor", num_envs=1, device="cpu"):
        self.payoff = read_payoff(task).to(device)
        sizes, best = self.payoff.shape, self.payoff.max().item()
        describe(
            self, num_envs, device, len(sizes), max(sizes), 1, 1, time_limit=1, best_return=best
        )
        # Agents with fewer actions than the longest axis of the table may not use the rest.
        actions = torch.arange(self.num_actions, device=device)
        self.avail = actions < torch.tensor(sizes, device=device)[:, None]  # (N, A)
        self.over = torch.ones(num_envs, dtype=torch.bool, device=device)

    def pay(self, actions):
        return self.payoff[tuple(actions.T)]

    def picture(self, actions=None):
        """The payoffs, and a ring where the first game's agents chose: (height, width, 3).

        Raises:
            ValueError: there are more than two agents.
        """
        if self.num_agents != 2:
            raise ValueError("only a payoff table of two agents can be drawn")
        figure = Figure(figsize=(3, 3), layout="constrained")
        axes = figure.subplots()
        _draw_table(axes, self.payoff, "{:g}")
        if actions is not None:
            row, column = actions[0].tolist()
            axes.plot(column, row, "o", ms=40, mfc="none", mec="#c0392b", mew=2)
        return pixels(figure)


def draw_policies(pi, dataset, seeds):
    """What two agents' policies do together.

    Args:
        pi: probabilities (2, S, A).
        dataset: what they learned from.
    Returns:
        A figure of the joint actions of the dataset and of the first five seeds, and those of all
        seeds, (S, A, A).
    """
    joint = (pi[0, :, :, None] * pi[1, :, None]).cpu()
    tables = {"dataset": dataset.joint_actions()}
    tables |= {f"seed {seed}": table for seed, table in zip(seeds, joint[:5])}
    figure = Figure(figsize=(2.1 * len(tables), 2.4), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables):
        _draw_table(axes, tables[title], "{:.2f}")
        axes.set_title(title)
    return figure, joint


def _draw_table(axes, table, form):
    """A number for each joint action (A, A')."""
    axes.imshow(table.tolist(), cmap="Blues", alpha=0.6)
    for a, row in enumerate(table.tolist()):
        for b, number in enumerate(row):
            axes.text(b, a, form.format(number), ha="center", va="center")
    letters = [[chr(ord("A") + k) for k in range(size)] for size in table.shape]
    axes.set_yticks(range(table.shape[0]), letters[0])
    axes.set_xticks(range(table.shape[1]), letters[1])
    axes.set(xlabel="agent 1", ylabel="agent 0")


def read_payoff(task):
    """The payoffs (A_0, ..., A_{N-1}) float32 of a task's name or of a table; see `MatrixGame`."""
    table = MATRIX_TASKS.get(task, task) if isinstance(task, str) else task
    try:
        table = json.loads(table) if isinstance(table, str) else table
        payoff = torch.tensor(table, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError):  # also too deep, or too large
        names = ", ".join(MATRIX_TASKS)
        told = f"{task!r:.80}: choose one of {names}, or a payoff table such as '[[1, 0], [0, 2]]'"
        raise ValueError(f"matrix has no task {told}") from None
    if payoff.dim() < 2 or payoff.numel() == 0 or not payoff.isfinite().all():
        raise ValueError("a payoff table needs two agents or more and finite numbers")
    return payoff
