"""Bridge: two agents meet on a bridge that is one cell wide, and one of them has to back up.

    row 0    G1  .   #   #   .   .        agent 0 starts at (1, 2) and wants to reach G0 = (2, 5),
    row 1    .   .   0   1   .   .        agent 1 starts at (1, 3) and wants to reach G1 = (0, 0).
    row 2    .   .   #   #   .   G0       # is water.

A temporal XOR game (Fu et al., 2022): both agents going left, or both going right, are good first
moves; going different ways costs time. The rules are those of the grid that was published with
AlberDICE (Matsunaga et al., 2023); a test replays its real dataset, transition for transition.

Moves. The two moves are granted one after the other, agent 0's first, by the rules of
`_joint_move`. An agent that stands on its goal has finished: it ignores its action, stays, and no
longer blocks anybody.

Reward, after the move: -0.1 x the Euclidean distance to its goal for each agent that had not
finished before, 0 for one that had; the team gets the mean of the two. The step that ends a game
pays 0, also at the time limit.
"""

import itertools

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from envs.common import TensorGame, check_actions, describe, pixels

ROWS, COLUMNS = 3, 6
WATER = ((0, 2), (0, 3), (2, 2), (2, 3))
START = ((1, 2), (1, 3))  # agent 0, agent 1
GOAL = ((2, 5), (0, 0))
MOVES = ((0, 0), (-1, 0), (1, 0), (0, 1), (0, -1))  # 0 stay, 1 up, 2 down, 3 right, 4 left
BEST_RETURN = -1.2354526  # eight steps; found by dynamic programming (see tests/test_envs.py)


class Bridge(TensorGame):
    """B games of Bridge.

    Observation and state are the eight raw numbers of AlberDICE, the same for both agents: row,
    column, goal row and goal column of agent 0, then those of agent 1.
    """

    memory = ("cells", "elapsed")

    def __init__(self, num_envs=1, device="cpu", time_limit=50):
        describe(self, num_envs, device, 2, len(MOVES), 8, 8, time_limit)
        self.best_return = BEST_RETURN if time_limit >= 8 else None
        # There are 18 x 18 joint cells and 25 joint actions, so the rules become one table.
        self.table = _transition_table().to(device)  # (18, 18, 5, 5, 2)
        start, self.goal = (torch.tensor(x, device=device) for x in (START, GOAL))  # (2, 2)
        self.start_cell, self.goal_cell = _cell(*start.T), _cell(*self.goal.T)  # (2,)
        self.avail = torch.ones(num_envs, 2, len(MOVES), dtype=torch.bool, device=device)
        self.cells = self.start_cell.repeat(num_envs, 1)  # (B, 2)
        self.elapsed = torch.zeros(num_envs, dtype=torch.int64, device=device)

    def step(self, actions):
        check_actions(self, actions, over=self._over())
        return self._play(actions)

    def picture(self, actions=None):
        """The first game as an array (height, width, 3)."""
        figure = Figure(figsize=(4, 2), layout="constrained")
        _draw(figure.subplots(), self._observe()[1]["state"][0].cpu())
        return pixels(figure)

    def _begin(self, mask):
        self.cells.copy_(torch.where(mask[:, None], self.start_cell, self.cells))
        self.elapsed.mul_(~mask)
        return self._observe()

    def _arrived(self):
        return self.cells == self.goal_cell  # (B, 2)

    def _over(self):
        return self._arrived().all(-1) | (self.elapsed >= self.time_limit)  # (B,)

    def _play(self, actions):
        arrived, over = self._arrived(), self._over()  # before the move
        (cell_0, cell_1), (action_0, action_1) = self.cells.T, actions.T
        moved = self.table[cell_0, cell_1, action_0, action_1]  # (B, 2)
        self.cells.copy_(torch.where(over[:, None], self.cells, moved))
        self.elapsed.add_(~over)

        terminated = self._arrived().all(-1)
        truncated = (self.elapsed >= self.time_limit) & ~terminated
        distance = (self._places() - self.goal).double().norm(dim=-1)  # (B, 2)
        cost = 0.1 * distance * ~arrived
        reward = torch.where(terminated | truncated, 0.0, -cost.mean(-1)).float()
        obs, info = self._observe()
        return obs, reward, terminated, truncated, info

    def _places(self):
        return torch.stack([self.cells // COLUMNS, self.cells % COLUMNS], -1)  # (B, 2, 2)

    def _observe(self):
        places = self._places()
        views = torch.cat([places, self.goal.expand_as(places)], -1)  # (B, 2, 4)
        state = views.flatten(1).float()  # (B, 8)
        obs = state[:, None].repeat(1, 2, 1)
        return obs, {"state": state, "avail_actions": self.avail.clone()}


def draw_strips(films, frames=9):
    """A figure with the first game of each {name: `Played.film`} as a strip; see `_draw`."""
    figure = Figure(figsize=(1.55 * frames, 1.3 * len(films)), layout="constrained")
    rows = figure.subplots(len(films), frames, squeeze=False)
    for row, (name, film) in zip(rows, films.items()):
        steps = int(film["mask"][0].sum())
        for t, axes in enumerate(row):
            axes.set_title(f"step {t}" if t else name)
            _draw(axes, film["state"][0, min(t, steps)].cpu())
    return figure


def _draw(axes, state):
    """Both agents on the grid, state (8,): they are discs, their goals rings."""
    ground = torch.zeros(ROWS, COLUMNS)
    for cell in WATER:
        ground[cell] = 1
    axes.imshow(ground.tolist(), cmap="Blues", vmax=2)
    axes.set(xticks=[], yticks=[])
    for agent, colour in zip(state.view(2, 4).tolist(), ("#c0392b", "#2c3e87")):
        row, column, goal_row, goal_column = agent
        axes.add_patch(Circle((goal_column, goal_row), 0.4, fill=False, edgecolor=colour))
        axes.add_patch(Circle((column, row), 0.29, facecolor=colour))


# ---------------------------------------------------------------- the rules
def _cell(row, column):
    return row * COLUMNS + column


def _wanted(cell, action):
    """Where an action leads from a cell, if nobody is in the way."""
    row, column = divmod(cell, COLUMNS)
    row, column = row + MOVES[action][0], column + MOVES[action][1]
    on_grid = 0 <= row < ROWS and 0 <= column < COLUMNS
    return _cell(row, column) if on_grid and (row, column) not in WATER else cell


def _joint_move(cells, actions):
    """One step of the rules for one game: cells and actions are pairs (agent 0, agent 1)."""
    goal = [_cell(*g) for g in GOAL]
    arrived = [cells[i] == goal[i] for i in (0, 1)]
    wanted = [cells[i] if arrived[i] else _wanted(cells[i], actions[i]) for i in (0, 1)]
    end = [None, None]  # where each agent ends; None while its move is open

    def resolve(i):
        j = 1 - i
        if wanted[i] in (cells[i], goal[i]) or arrived[j]:
            end[i] = wanted[i]  # staying, and stepping onto one's own goal, never needs room
        elif end[j] is not None:
            end[i] = cells[i] if end[j] == wanted[i] else wanted[i]
        elif wanted[j] == wanted[i] == cells[j]:
            end[i] = cells[i]  # the other one stands there already
        elif wanted[j] == wanted[i]:
            end[i], end[j] = wanted[i], cells[j]  # a contested cell goes to whose turn it is
        elif wanted[i] == cells[j] and wanted[j] == cells[i]:
            end[i], end[j] = cells[i], cells[j]  # nobody passes through anybody
        elif wanted[i] == cells[j]:
            resolve(j)  # it moves out of the way first, if it can
            resolve(i)
        else:
            end[i] = wanted[i]

    for i in (0, 1):
        if end[i] is None:
            resolve(i)
    return end


def _transition_table():
    """Next cells for every joint cell and joint action: (18, 18, 5, 5, 2) int64, agents last."""
    shape = (ROWS * COLUMNS,) * 2 + (len(MOVES),) * 2
    joint = itertools.product(*map(range, shape))
    ends = [_joint_move((cell_0, cell_1), (a_0, a_1)) for cell_0, cell_1, a_0, a_1 in joint]
    return torch.tensor(ends).view(*shape, 2)
