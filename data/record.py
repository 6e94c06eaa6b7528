"""Record episodes of any environment, ours or `package.module:factory`, as a `Dataset`."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

import envs
from data.dataset import Dataset
from envs.rollout import play

GAMES = 16  # played at once: a game that is not ours is a Python object of its own


def record(game, act, seed=None):
    """Play all games of `game` once and keep what happened, padded to the longest episode.

    Args:
        game: one of our environments with B games; every episode becomes one of the dataset.
        act: function of (step, obs, info) that returns the actions (B, N), or (B, N, A).
    Returns:
        A `Dataset` of B episodes; its `info` holds "won", a list of 0 and 1, if games can be won.
    """

    def count(obs, info, t):
        return act(t, obs, info), t + 1

    played = play(game, count, memory=0, seed=seed, film=True)
    info = {} if played.won is None else {"won": played.won.int().tolist()}
    return Dataset(**played.film, info=info)


def block_seed(env, team, seed, start):
    """The seed of a team's games from the `start`-th on, and of its noise.

    It does not depend on the task, so that all views show the same episodes.
    """
    return int(hashlib.sha1(f"{env} {team} {seed} {start}".encode()).hexdigest()[:7], 16)


def concatenate(parts):
    """Datasets of one task, one after the other, padded to the longest episode of all."""
    whole = {"avail_actions": None}
    for name in parts[0].tensors():
        episodes = [episode for part in parts for episode in getattr(part, name)]
        whole[name] = pad_sequence(episodes, batch_first=True)
    info = {}
    if "won" in parts[0].info:
        info["won"] = sum((part.info["won"] for part in parts), [])
    return Dataset(**whole, info=info)


class Kept(NamedTuple):
    """The teams of a run's S seeds, which take turns."""

    name: str
    start: torch.Tensor  # (S, 1, N, W) the memory of one new game
    ask: Callable  # (obs, info, memory (S, B, N, W)) -> actions (S, B, N) or (S, B, N, A), memory


def record_team(env, task, team, episodes, seed=0, noise=0.0, options=None):
    """Let a team play; returns a `Dataset` of what happened.

    Args:
        env, task, options: as `envs.make` takes them.
        team: "random" for uniformly random available actions, or a `Kept`.
        episodes: how many.
        seed: of the games and of all that is drawn.
        noise: the share of an agent's actions that are drawn at random instead; where actions are
            continuous, the standard deviation of what is added to each entry.
    Raises:
        ValueError: no such environment, or the team does not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, episodes, GAMES):
        game = envs.make(env, task, min(GAMES, episodes - start), **options or {})
        if team == "random":
            act = random_player(game, generator)
        else:
            act = kept_player(game, team, start // GAMES, noise, generator)
        parts.append(record(game, act, block_seed(env, task, seed, start)))
        game.close()
    dataset = concatenate(parts)
    name, behaviour = "random", "uniformly random actions"
    if team != "random":
        name, behaviour = team.name, f"the team of {team.name}, noise {noise:g}"
    dataset.info |= {"env": env, "task": task, "name": name, "seed": seed, "behaviour": behaviour}
    if "team_reward" in (options or {}):
        dataset.info["team_reward"] = options["team_reward"]
    return dataset.check()


def random_player(game, generator):
    """Uniformly random available actions, a function (step, obs, info) -> actions."""
    shape = game.num_envs, game.num_agents, game.num_actions

    def act(t, obs, info):
        if "avail_actions" not in info:
            return 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1
        avail = info["avail_actions"].flatten(0, 1).double()  # (B N, A)
        return torch.multinomial(avail, 1, generator=generator).view(shape[:2])

    return act


def kept_player(game, team, block, noise, generator):
    """What the team of one seed, the block's turn, does with some noise."""
    at_random = random_player(game, generator)
    memory = team.start.repeat(1, game.num_envs, 1, 1)

    def act(t, obs, info):
        nonlocal memory
        actions, memory = team.ask(obs, info, memory)
        actions = actions[block % len(actions)]  # (B, N) or (B, N, A)
        if "avail_actions" not in info:
            return (actions + noise * torch.randn(actions.shape, generator=generator)).clamp(-1, 1)
        drawn = torch.rand(actions.shape, generator=generator) < noise
        return torch.where(drawn, at_random(t, obs, info), actions)

    return act
