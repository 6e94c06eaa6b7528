"""How teams play, and a team to keep: the greedy teams of all seeds as one program that plays with torch alone."""

import io
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.export import Dim
from torch.export.passes import move_to_device_pass

from data.results import save


class Player:
    """How teams of discrete actions play: the `act` of `runs.score`, with its shapes `memory` and `clocks`.

    Args:
        think: function of inputs (S, B, N, I), avail (S, B, N, A) and what a GRU knows (S, B, N, H), which returns the
            actions' log-probabilities or values (S, B, N, A) and what the GRU knows now.
        encode: what makes inputs of observations (S, B, N, O) and last actions, one-hot (S, B, N, A).
        sizes: N, A and H; without a memory H is 0, and nobody remembers the last action either.
    """

    def __init__(self, think, encode, *sizes):
        self.think, self.encode, (N, self.A, self.H) = think, encode, sizes
        self.memory, self.clocks = self.H + self.A * (self.H > 0), (-1, N, self.A)

    def __call__(self, obs, avail, memory, clocks=None):
        """obs (S, B, N, O), avail (S, B, N, A), memory (S, B, N, `memory`) -> actions (S, B, N), memory. Greedy without
        exponential clocks (S, B, N, A)."""
        h, last = memory.split([self.H, self.memory - self.H], -1)
        values, h = self.think(self.encode(obs, last), avail, h)
        action = (values if clocks is None else values - clocks.log()).argmax(-1)  # which clock rings first is a draw
        return action, torch.cat([h, F.one_hot(action, self.A).to(h.dtype)], -1) if self.H else memory


def react(policies, encode, obs, avail, memory, clocks=None):
    """How teams without a memory play B games of each seed: the `act` of `runs.score`, behind two arguments of its own.

    Args:
        policies: function of inputs (S, N, B, I) and avail (S, N, B, A), or None where actions are continuous; `sample`
            makes actions of what it returns.
        encode: what makes inputs of observations (S, B, N, O).
    Returns:
        Actions (S, B, N) or (S, B, N, A), greedy without clocks, and the memory as it was.
    """
    obs, avail = (None if x is None else x.transpose(1, 2) for x in (encode(obs), avail))
    action = policies.sample(policies(obs, avail), clocks).transpose(1, 2)
    return action if policies.discrete else action.clamp(-1, 1).float(), memory


class Teams(nn.Module):
    """The program: (obs (B, N, O), avail (B, N, A) if actions are discrete, memory (S, B, N, W)) -> actions, memory.

    All S teams see the same B games and each says what it would do, (S, B, N) or (S, B, N, A). At a game's start its
    memory is 0. The buffer `start` (S, 1, N, W) has the memory's shape, for one game.
    """

    def __init__(self, act, start, modules):
        super().__init__()
        self.act, self.modules_of_act = act, nn.ModuleList(modules)
        self.register_buffer("start", start)

    def forward(self, obs, *rest):
        *avail, memory = rest
        obs, *avail = (x.expand(len(self.start), *x.shape) for x in (obs, *avail))
        return self.act(obs, *(avail or (None,)), memory)


@torch.no_grad()
def save_team(path, act, views, actions, memory, seeds, modules, device):
    """Export a team as a program and write it whole.

    Args:
        act: (obs (S, B, N, O), avail (S, B, N, A) bool or None, memory (S, B, N, W)) -> actions (S, B, N) or
            (S, B, N, A), memory; the greedy actions, from plain observations.
        views: N and O.
        actions: A, or 0 where actions are continuous and nothing says which are available.
        memory: W, how many numbers an agent keeps from step to step.
        seeds: S.
        modules: the networks in it.
    """
    games, N = 3, views[0]  # an example; any number of games will do
    start = torch.zeros(seeds, 1, N, memory, device=device, dtype=torch.get_default_dtype())
    seen = [torch.zeros(games, *views, device=device)]
    seen += [torch.ones(games, N, actions, dtype=torch.bool, device=device)] if actions else []
    rest = (*seen[1:], start.repeat(1, games, 1, 1))
    shapes = {0: Dim.DYNAMIC}, (*({0: Dim.DYNAMIC} for _ in seen[1:]), {1: Dim.DYNAMIC})
    program = torch.export.export(Teams(act, start, modules), (seen[0], *rest), dynamic_shapes=shapes)
    if start.device.type != "cpu":  # it has to play where there is no GPU
        program = move_to_device_pass(program, "cpu")
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # of weights that are parts of one tensor
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer)
    save(path, buffer.getvalue())
