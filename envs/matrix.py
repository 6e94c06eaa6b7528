"""One-step matrix games for N agents: everybody picks an action, one table says what the team earns.

They are where offline coordination fails first: with several equally good joint actions, each agent's own
marginal in the dataset says nothing about which one its teammates will pick.
"""

import itertools
import json

import torch
from gymnasium.vector import VectorEnv
from matplotlib.figure import Figure

from envs.common import METADATA, check_actions, describe_discrete, games_to_reset, pixels

# task: payoff[action of agent 0][action of agent 1]
MATRIX_TASKS = {
    # Two equally good conventions, AB and BA (InSPO, Figure 1; AlberDICE uses the same game).
    "xor": [[0, 1], [1, 0]],
    # Three equilibria worth 5, 10 and 20 (InSPO, Figure 2; the off-diagonal 0 is our choice, see the README).
    "m-ne": [[5, 0, 0], [0, 10, 0], [0, 0, 20]],
    # The Iterated Coordination Game, left/right (MOMA-PPO, section 5.2), played as one stateless step.
    "coordination": [[1, 0], [0, 1]],
    # Claus & Boutilier (1998): the best joint action lies beside the worst ones.
    "climbing": [[11, -30, 0], [-30, 7, 6], [0, 0, 5]],
    # Claus & Boutilier (1998): two optima, and a penalty k = -30 for mixing them up.
    "penalty": [[-30, 0, 10], [0, 2, 0], [10, 0, -30]],
}


class MatrixGame(VectorEnv):
    """B one-step games with a constant observation 1 and state 1.

    Args:
        task: a name in `MATRIX_TASKS`, or a nested list (or its JSON text) with one level for each agent.
    Raises:
        ValueError: an unknown name, or a table that is ragged, not finite, or has fewer than two agents; in `step`,
            actions of a wrong shape or, on a CPU, that the table lacks.
    """

    metadata = METADATA

    def __init__(self, task="xor", num_envs=1, device="cpu"):
        self.payoff = read_payoff(task).to(device)
        describe_discrete(
            self, num_envs, device, num_agents=self.payoff.dim(), num_actions=max(self.payoff.shape),
            obs_dim=1, state_dim=1, time_limit=1, best_return=self.payoff.max().item(),
        )  # fmt: skip
        # Agents with fewer actions than the longest axis of the table may not use the rest.
        self.sizes = torch.tensor(self.payoff.shape, device=device)  # (N,)
        self.avail = torch.arange(self.num_actions, device=device) < self.sizes[:, None]  # (N, A)
        self.over = torch.ones(num_envs, dtype=torch.bool, device=device)

    def reset(self, *, seed=None, options=None):
        return self._begin(games_to_reset(self, options))

    def step(self, actions):
        check_actions(self, actions, self.sizes, lambda: self.over)
        return self._play(actions)

    def compile(self, compiler):
        """Let `compiler`, a function of functions, make one graph of what a step computes and one of a reset."""
        torch._dynamo.mark_static_address(self.over)  # a CUDA graph may write there
        self._play, self._begin = compiler(self._play), compiler(self._begin)

    def picture(self, actions=None):
        """The payoffs, and in red what the first game's agents chose, as an array (height, width, 3)."""
        figure, table = Figure(figsize=(3, 3), layout="constrained"), self.payoff.cpu()
        if table.dim() != 2:
            raise ValueError(f"a payoff table of {table.dim()} agents cannot be drawn, only one of two")
        axes = figure.subplots()
        axes.imshow(table.tolist(), cmap="Blues", alpha=0.6)
        for a, b in itertools.product(*map(range, table.shape)):
            mine = actions is not None and actions[0].tolist() == [a, b]
            colour = "#c0392b" if mine else "black"
            axes.text(b, a, f"{table[a, b]:g}", ha="center", va="center", color=colour, weight="bold" if mine else None)
        axes.set(xlabel="agent 1", ylabel="agent 0", xticks=[], yticks=[])
        return pixels(figure)

    def _begin(self, mask):
        self.over.logical_and_(~mask)
        return self._observe()

    def _play(self, actions):
        reward = self.payoff[tuple(actions.T)] * ~self.over  # (B,)
        self.over.fill_(True)
        obs, info = self._observe()
        return obs, reward, self.over.clone(), torch.zeros_like(self.over), info

    def _observe(self):
        ones = torch.ones(self.num_envs, self.num_agents, 1, device=self.device)
        return ones, {"state": ones[:, 0].clone(), "avail_actions": self.avail.repeat(self.num_envs, 1, 1)}


def draw_joints(tables):
    """A figure of two agents' joint actions: {title: probabilities (A_0, A_1)}, each a shaded table."""
    figure = Figure(figsize=(2.1 * len(tables), 2.4), layout="constrained")
    most = max(max(table.shape) for table in tables.values())
    names = [chr(ord("A") + k) if most <= 26 else str(k) for k in range(most)]
    for axes, (title, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items()):
        axes.imshow(table.tolist(), cmap="Blues", vmin=0, vmax=1)
        for a, row in enumerate(table.tolist()):
            for b, p in enumerate(row):
                axes.text(b, a, f"{p:.2f}", ha="center", va="center", color="white" if p > 0.6 else "black", fontsize=8)
        axes.set_xticks(range(table.shape[1]), names[: table.shape[1]])
        axes.set_yticks(range(table.shape[0]), names[: table.shape[0]])
        axes.set(title=title, xlabel="agent 1", ylabel="agent 0")
    return figure


def draw_policies(pi, dataset, seeds):
    """The joint actions of two agents' policies pi (2, S, A): a figure of the dataset's and the first five seeds', and
    of all seeds the probabilities (S, A, A)."""
    joint = (pi[0, :, :, None] * pi[1, :, None]).cpu()
    return draw_joints({"dataset": dataset.joint_actions()} | {f"seed {s}": p for s, p in zip(seeds, joint[:5])}), joint


def read_payoff(task):
    """The payoff tensor (A_0, ..., A_{N-1}) float32 of a task name or of a table; see `MatrixGame`."""
    table = MATRIX_TASKS.get(task, task) if isinstance(task, str) else task
    told = f"{task!r:.80}" if isinstance(task, str) else "(the list given)"  # it may be deep
    try:
        payoff = torch.tensor(json.loads(table) if isinstance(table, str) else table, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, OverflowError):  # also too deep, or too large for 64 bits
        raise ValueError(
            f"matrix has no task {told}: choose one of {', '.join(MATRIX_TASKS)}, "
            "or write a payoff table such as '[[1, 0], [0, 2]]'"
        ) from None
    if payoff.dim() < 2 or payoff.numel() == 0 or not payoff.isfinite().all():
        raise ValueError(f"a payoff table needs two or more agents and finite numbers, not {told}")
    return payoff
