"""How the teams of all seeds play their games: one batch, greedily and by sampling."""

import contextlib
import functools
import json

import torch

import envs
from envs.rollout import play


def stream(seed, purpose, device="cpu"):
    """A generator for each seed and purpose, so that a seed's numbers do not depend on others."""
    return torch.Generator(device).manual_seed((1_000_003 * seed + purpose) % 2**63)


def game_options(args):
    """What --env-kwargs and --team-reward say to the environment; ValueError if it is no JSON."""
    try:
        options = dict(json.loads(args.env_kwargs or "{}"))
    except (ValueError, TypeError):
        like = '{"N": 3}'
        raise ValueError(f"--env-kwargs must be a JSON object such as '{like}'") from None
    return options | ({"team_reward": args.team_reward} if ":" in args.env else {})


def game(args, num_envs=1, device="cpu", **options):
    """B games of what a run is about; raises ValueError as `envs.make` does."""
    return envs.make(args.env, args.task, num_envs, device, **game_options(args), **options)


@torch.no_grad()
def score(player, args, step, episodes, device, film=None):
    """Play E games with the team of each seed, all in one batch, then again by sampling.

    The real StarCraft II (--backend sc2) plays --games at a time, and starts each as it likes.

    Args:
        player: a `Player`.
        step: how many updates were made: each evaluation has games and chance of its own.
        film: a list for what happened, `Played.film` of the greedy games, then of the sampled ones.
    Returns:
        {"return": (S, E)} and, where they exist, "sampled_return", "win_rate" and
        "sampled_win_rate"; {} for no games.
    Raises:
        FloatingPointError: a simulation became unstable.
    """
    if not episodes:
        return {}
    S, E, options, scores = args.num_seeds, episodes, {}, {}
    if getattr(args, "backend", "torch") != "torch":
        E, options = min(E, max(1, args.games // S)), {"backend": args.backend}
    generators = [stream(args.seed + s, 10 + step, device) for s in range(S)]
    ways = {"": None} if player.clocks is None else {"": None, "sampled_": generators}
    with contextlib.closing(game(args, S * E, device, **options)) as games:
        for prefix, chance in ways.items():
            act = functools.partial(answer, player, (S, E), chance)
            seeds = [step + 1_000_003 * k for k in range(-(-episodes // E))]
            played = [play(games, act, None, seed, film is not None) for seed in seeds]
            results = {"return": [x.returns for x in played], "win_rate": [x.won for x in played]}
            for name, parts in results.items():
                if parts[0] is not None:
                    values = torch.cat([x.view(S, E) for x in parts], 1)
                    scores[prefix + name] = values[:, :episodes].double()
            if film is not None:
                film.append(played[0].film)
    return scores


def answer(player, shape, chance, obs, info, memory):
    """What all teams do: an `act` of `envs.rollout.play`, for S E games.

    Args:
        shape: (S, E).
        chance: a generator for each seed, or None to play greedily.
    """
    avail = info.get("avail_actions")
    obs = obs.unflatten(0, shape)  # (S, E, N, O)
    avail = avail if avail is None else avail.unflatten(0, shape)  # (S, E, N, A)
    if memory is None:
        memory = torch.zeros(*obs.shape[:3], player.memory, device=obs.device)
    clocks = None
    if chance:
        sizes = [shape[1] if size < 0 else size for size in player.clocks]
        empty = [torch.empty(sizes, device=obs.device) for _ in chance]
        clocks = torch.stack([x.exponential_(generator=g) for x, g in zip(empty, chance)])
    actions, memory = player.act(obs, avail, memory, clocks)
    return actions.flatten(0, 1), memory
