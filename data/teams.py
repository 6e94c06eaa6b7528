"""Behaviour teams, which play our datasets: one `.npz` a team, from `mappo.py --save-snapshots`.

A file holds arrays weight0, bias0, weight1, ... (float16) of a ReLU network that all agents
share, x @ weight0 + bias0 and so on, and a JSON text `info`. Its inputs x are an agent's view,
its last actions, the newest first (only where actions are discrete), and its number, one-hot
both. Its outputs are the logits of the actions, or through tanh the mean of normal ones;
`log_std` is then the logarithm of their spread.

Networks are computed in float64, and normal numbers drawn in it. In float32 the last digits would
be the processor's, and a body goes its own way from there.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F


def normal(shape, generator):
    """Standard normal numbers, float32, the same on every machine."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def read_behaviour(path, env="smac"):
    """A team as a function that draws its actions, and what is known of it.

    Args:
        path: a file in data/behaviour/: MAP/TEAM.npz, or BODY/TEAM.npz.
        env: "smac", or the body.
    Returns:
        A function of (step, obs (B, N, O), info, generator) -> actions (B, N) or (B, N, A), not
        clipped, and without a generator (None) the most likely ones; and the file's info.
    Raises:
        ValueError: there is no such file.
    """
    about, layers, spread = read_weights(path, env)
    if spread is None:
        return Discrete(layers, about.get("recall", 1)), about

    def play(t, obs, info, generator):
        B, N = obs.shape[:2]
        numbers = torch.eye(N).expand(B, N, N)
        mean = run_network(layers, torch.cat([obs, numbers], -1)).tanh().float()  # (B, N, A)
        if generator is None:
            return mean
        return mean + spread.float() * normal(mean.shape, generator)

    return play, about


def read_weights(path, env):
    """A file's info, its layers [(weight, bias), ...] in float64, and its spread (A,) or None."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["info"]))
            arrays = {name: torch.tensor(file[name]).double() for name in file if name != "info"}
    except FileNotFoundError:
        train = f"train one with `python algorithms/mappo.py --env {env} --save-snapshots`"
        what = f"no {path.stem} team for {path.parent.name} ships with the repository"
        raise ValueError(f"{what}: {train} (see data/behaviour/README.md)") from None
    spread = arrays.pop("log_std").exp() if "log_std" in arrays else None
    layers = []
    for k in range(len(arrays) // 2):
        layers.append((arrays[f"weight{k}"], arrays[f"bias{k}"]))
    return about, layers, spread


def run_network(layers, x):
    """Inputs (..., I) -> outputs (..., A), in float64."""
    x = x.double()
    for weight, bias in layers[:-1]:
        x = F.relu(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


class Discrete:
    """A team of discrete actions, which remembers its last ones: (step, obs, info, generator)."""

    def __init__(self, layers, recall):
        self.layers, self.recall = layers, recall

    def __call__(self, t, obs, info, generator):
        avail = info["avail_actions"]  # (B, N, A)
        B, N, A = avail.shape
        if t == 0:
            self.last = torch.zeros(B, N, self.recall * A)  # the newest first
        numbers = torch.eye(N).expand(B, N, N)
        logits = run_network(self.layers, torch.cat([obs, self.last, numbers], -1)).float()
        logits = logits.masked_fill(~avail, -torch.inf)
        if generator is not None:  # which clock rings first is a draw from the policy
            clocks = torch.empty_like(logits).exponential_(generator=generator)
            logits = logits - clocks.log()
        action = logits.argmax(-1)
        newest = F.one_hot(action, A).float()
        self.last = torch.cat([newest, self.last], -1)[..., : self.recall * A]
        return action
