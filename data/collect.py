"""Record datasets by rolling out behaviour policies in our own environments, and load them by name.

python data/collect.py --env bridge --dataset mixed --out mixed.h5
python data/collect.py --env smac --task 2s3z --dataset medium-replay --episodes 5000 --out mine.h5
python data/collect.py --env matrix --task "[[1, 0], [0, 2]]" --dataset "[0.9, 0.1]" --out mine.h5
python data/collect.py --env polynomial --task twin-peaks --dataset peak-0.3 --out mine.h5
python data/collect.py --env halfcheetah --dataset good-medium --episodes 2000 --out mine.h5

The teams' weights are files that `algorithms/mappo.py --save-snapshots` writes, in data/behaviour/: MAP/TEAM.npz for
the battles; for the bodies that a team shares (halfcheetah, reacher, ant) BODY/TEAM.npz, with the teams in `TEAMS`.
"""

import hashlib
import importlib.metadata
import json
import platform
import re
import signal
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is loaded, Ctrl-C ends the program without a traceback
import gymnasium
import h5py
import numpy as np
import torch
from gymnasium.spaces import Box
from tqdm import tqdm

if __name__ == "__main__":  # let `python data/collect.py` find the packages beside its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import envs
from data.behaviours import normal, read_behaviour
from data.dataset import TENSORS, Dataset, write
from data.mamujoco import check_order, from_mamujoco
from data.readers import read
from envs.matrix import read_payoff
from envs.play import play

CACHE = Path(__file__).parent / "cache"
BEHAVIOUR = Path(__file__).parent / "behaviour"  # weights of the teams that play our datasets, see its README
COLLECTOR = 2  # raise it when a collector changes, so that data cached before are not used again

# Matrix games. Joint actions in equal parts ("AB": agent 0 plays A, agent 1 plays B), or for each agent the
# probabilities of its actions, drawn independently. A name that is a JSON list holds the probabilities itself.
MATRIX_BEHAVIOURS = {
    "xor": {"ab": ["AB"], "ab-ba": ["AB", "BA"], "aa-ab-ba": ["AA", "AB", "BA"], "all": ["AA", "AB", "BA", "BB"]},
    "m-ne": {"balanced": [[1, 1, 1]] * 2, "imbalanced": [[0.8, 0.1, 0.1]] * 2},
    "coordination": {  # left, right
        "favourable": [[0.25, 0.75], [0.25, 0.75]],
        "neutral": [[0.5, 0.5], [0.5, 0.5]],
        "unfavourable": [[0.75, 0.25], [0.25, 0.75]],
    },
    "climbing": {"uniform": [[1, 1, 1]] * 2},
    "penalty": {"uniform": [[1, 1, 1]] * 2},
}
# Polynomial games. Each agent plays uniformly, or around its part of (0, 0) or of a best joint action with the standard
# deviation in the name. These are examples: any one above 0 will do.
POLYNOMIAL_DATASETS = ("uniform", "origin-0.5", "peak-0.5")
SPREAD = re.compile(r"(peak|origin)-((?:\d+(?:\.\d*)?|\.\d+)(?:e-?\d+)?)", re.ASCII)

SMAC_DATASETS = ("medium", "expert", "mixed", "medium-replay")
BLOCK = 250  # battles that are played at once

# Which teams play a body's datasets, in this order and in equal parts; "*" stands for 0, 1, ..., in equal parts too.
# All tasks of a body share its teams: the same episodes are seen through the task's views.
TEAMS = {
    "halfcheetah": {"good": ("good-*",), "medium": ("medium-*",), "good-medium": ("good-*", "medium-*")},
    "reacher": {"expert-mix": ("counterclockwise-*", "clockwise-*")},
    "ant": {"random": ("random",), "medium": ("medium",), "full-replay": ("replay-*",), "expert": ("expert",)},
}
# Teams without weights: "random" plays uniformly random actions, "still" none at all (every motor at 0).
WEIGHTLESS = ("random", "still")
# Who sets the scale on which scores are 0 and 1, and in how many episodes it is measured. The reacher's 0 is that of
# MOMA-PPO: its -11.1 is what an untrained team scores by its most likely actions, which are near 0 (still: -11.7). The
# reacher's 1 is the mean of the data, sampled actions and all. The others' experts play their most likely actions, as
# scripts are judged.
REFERENCES = {
    "halfcheetah": {"random": ("random",), "expert": ("good-*",), "episodes": 20},
    "reacher": {"random": ("still",), "expert": ("counterclockwise-*", "clockwise-*"), "episodes": 1000},
    "ant": {"random": ("random",), "expert": ("expert",), "episodes": 20},
}
NOISE = {"halfcheetah": 0.2}  # added to a team's most likely actions; the other bodies' teams sample from their policy
BENDS = {"counterclockwise": 1, "clockwise": -1}  # the sign of sin θ2, summed over an episode of the reacher
GAMES = 50  # episodes of a body that are played at once

# How many episodes by default, where it is not 1,000: a quarter of the papers'.
EPISODES = {
    ("bridge", "optimal"): 500,
    ("halfcheetah", "good"): 250,
    ("halfcheetah", "medium"): 250,
    ("halfcheetah", "good-medium"): 500,
    ("reacher", "expert-mix"): 5000,
    ("ant", "medium"): 250,
    ("ant", "full-replay"): 250,
    ("ant", "expert"): 250,
}


def names(env, task=""):
    """The dataset names that exist for one task, a tuple of str; of those that hold a number, an example each."""
    if env == "matrix":
        return tuple(MATRIX_BEHAVIOURS.get(task or "xor", {"uniform": None}))
    if env == "polynomial":
        return POLYNOMIAL_DATASETS
    if env == "smac":
        return SMAC_DATASETS
    if env in TEAMS:
        return tuple(TEAMS[env])
    return ("optimal", "mixed")


def is_path(dataset, env="", task=""):
    """Whether a dataset is given by a path: anything with a "/" or a file ending, or what exists and is no name."""
    path = Path(dataset)
    if not dataset or dataset.startswith("["):
        return False
    ending = path.suffix[1:2].isalpha()  # that of peak-0.5 is none
    return "/" in dataset or ending or path.exists() and not _is_name(dataset, env, task)


def _is_name(dataset, env, task):
    """Whether a task has a dataset of this name, one of those that hold numbers included."""
    if env == "matrix" and dataset.startswith("["):
        return True
    return dataset in names(env, task) or env == "polynomial" and _spread(dataset) is not None


def _spread(name):
    """("peak" or "origin", the standard deviation) of a polynomial game's dataset, or None if it has no such name."""
    found = SPREAD.fullmatch(name)
    return (found[1], float(found[2])) if found and 0 < float(found[2]) < float("inf") else None


def about(path):
    """What a file of ours says of its origin: {"env", "task"}, "" where it says nothing; {} for other files."""
    try:
        with h5py.File(path, "r") as file:
            found = {key: json.loads(file.attrs.get(key, '""')) for key in ("format", "env", "task")}
    except (OSError, ValueError, TypeError, RecursionError, KeyError, RuntimeError):  # h5py raises many kinds
        return {}
    ours = found.pop("format") != ""
    return {key: value if isinstance(value, str) else "" for key, value in found.items()} if ours else {}


def load(env, task, dataset, device="cpu", seed=0, episodes=None, limit_terminates=False, options=None):
    """A `Dataset` for one task, by name or by path, checked against the environment.

    A name is collected on first use and cached in `data/cache/`. A path is anything with a "/" or a file ending,
    or anything that exists.

    Args:
        env: one of ours, or "package.module:factory"; "" to read a file without one.
        options: what the environment gets besides; without it one that is not ours is not made, and not checked.
        limit_terminates: take the time limit for an end of the game, after which nothing is worth anything. OG-MARL's
            2halfcheetah is stored, and was learned from, in this way; by default it cuts the game off.
    Raises:
        ValueError: an unknown name, a damaged or foreign file, a dataset of another environment.
        OSError: no such file.
    """
    foreign = not env or ":" in env
    game = None if foreign and options is None else envs.make(env, task, **options or {})
    task = task or envs.TASKS[env][0] if env in (*TEAMS, "polynomial") else task
    if is_path(dataset, env, task):
        found = read(Path(dataset), game and game.time_limit, task if env == "ant" else "")
    elif foreign:
        remedy = "give the path of a file, such as one that data/collect.py has recorded"
        raise ValueError(f"there is no dataset {dataset!r} of {env or 'no environment'}: {remedy}")
    else:
        found = _cached(env, task, dataset, seed, episodes)
    if game:
        if env in TEAMS and found.info.get("layout") == "mamujoco":
            found = from_mamujoco(found, game, dataset)
        _belongs(found, env, task, game, dataset)
        game.close()
    if limit_terminates and game:
        late = (found.lengths >= game.time_limit).nonzero()[:, 0]  # episodes that lasted until the limit
        found.terminated[late, found.lengths[late] - 1] = True
    return found.to(device)


def _cached(env, task, name, seed, episodes):
    _known(env, task, name)
    episodes = episodes or EPISODES.get((env, name), 1000)
    rules = read_payoff(task or "xor").tolist() if env == "matrix" else None
    key = [env, task, rules, name, episodes, seed, COLLECTOR]  # all that the content depends on
    key += [version("mujoco")] if env in TEAMS else []
    teams = sorted((BEHAVIOUR / (task or envs.TASKS["smac"][0] if env == "smac" else env)).glob("*.npz"))
    key = json.dumps(key + [hashlib.sha1(team.read_bytes()).hexdigest() for team in teams])
    words = [re.sub(r"\W+", "_", word).strip("_")[:40] for word in (env, task, name)]
    path = CACHE / ("-".join([*filter(None, words), hashlib.sha1(key.encode()).hexdigest()[:12]]) + ".h5")
    try:
        return read(path)
    except (ValueError, OSError):
        pass  # not there yet, or not to be trusted: collect it
    found = collect_dataset(env, task, name, seed, episodes)
    try:
        write(found, path)
    except OSError as error:
        print(f"note: the dataset was not cached ({error})", file=sys.stderr)
    return found


def _known(env, task, name):
    if not _is_name(name, env, task):
        other = " (or another spread above 0)" if env == "polynomial" else ""
        raise ValueError(
            f"{f'{env} {task}'.strip()} has no dataset {name!r}: "
            f"choose {', '.join(names(env, task))}{other}, or give the path of a file"
        )


def _belongs(dataset, env, task, game, source):
    """Raise ValueError unless the dataset was recorded in this task and has the sizes of `game`."""
    other_env, other_task = dataset.info.get("env", env), dataset.info.get("task", task)
    first = envs.TASKS.get(env, ("",))[0]  # what a dataset without a task was recorded in
    same = other_env == env and (other_task or first) == (task or first)
    same = same or ":" in env or env == other_env == "matrix" and _same_payoff(other_task, task)
    if not same:
        flags = f"--env {other_env}" + (f" --task {other_task!r}" if other_task else "")
        raise ValueError(f"{source} was recorded in another task than {env} {task}".rstrip() + f": use {flags}")
    continuous = isinstance(game.single_action_space, Box)
    if dataset.actions.is_floating_point() != continuous:
        kinds = ("discrete", "continuous")
        raise ValueError(
            f"{source} has {kinds[not continuous]} actions, {f'{env} {task}'.strip()} has {kinds[continuous]} ones"
        )
    A = dataset.actions.shape[-1] if continuous else dataset.avail_actions.shape[-1]
    found, wanted = (dataset.obs.shape[2], dataset.obs.shape[3], dataset.state.shape[2], A), _sizes(game)
    if found != wanted:
        others = (f"{e} {t}".strip() for e in envs.TASKS for t in envs.TASKS[e] if _sizes(envs.make(e, t)) == found)
        others = " and ".join(others)
        raise ValueError(
            f"{source} does not fit {env} {task}: it has (agents, observation, state, actions) = {found}, "
            f"the environment has {wanted}; " + (f"{found} is {others}" if others else "no environment here has those")
        )
    if env in TEAMS:
        check_order(dataset, game, source)


def _sizes(game):
    return game.num_agents, game.obs_dim, game.state_dim, game.num_actions


def _same_payoff(one, other):
    one, other = read_payoff(one or "xor"), read_payoff(other or "xor")
    return one.shape == other.shape and bool((one == other).all())


def collect_dataset(env, task, name, seed=0, episodes=None):
    """Roll out the behaviour that `name` stands for; returns a `Dataset` on the CPU.

    Args:
        seed: of the behaviour (and the environment).
        episodes: how many; by default what `EPISODES` says, else 1,000.
    Raises:
        ValueError: an unknown environment, task or name, or a team that plays it is missing or damaged.
    """
    game = envs.make(env, task)
    task = task or envs.TASKS[env][0] if env in (*TEAMS, "polynomial") else task
    _known(env, task, name)
    episodes = episodes or EPISODES.get((env, name), 1000)
    if episodes < 1:
        raise ValueError(f"a dataset needs at least one episode, not {episodes}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"a dataset's seed must lie in 0 .. {2**32 - 1}, not {seed}")
    generator = torch.Generator().manual_seed(seed)
    if env == "matrix":
        behaviour = MATRIX_BEHAVIOURS.get(task or "xor", {}).get(name)
        if behaviour is None:
            behaviour = _independent(name, game.payoff.shape)
        actions = _matrix_actions(behaviour, episodes, generator)[:, None]  # (E, 1, N)
        said = json.dumps(behaviour)
    elif env == "smac":
        dataset, said = _battles(task or envs.TASKS[env][0], name, episodes, seed)
    elif env in TEAMS:
        dataset, said = _bodies(env, task, name, episodes, seed)
    elif env == "polynomial":
        actions, said = _polynomial_actions(game.peak, name, episodes, generator)  # (E, 1, N, 1)
    else:
        half = episodes // 2 if name == "mixed" else 0
        limit = game.time_limit
        random = torch.randint(game.num_actions, (half, limit, 2), generator=generator)
        optimal = _bridge_optimal(episodes - half, limit, generator)
        actions = torch.cat([random, optimal])  # (E, T, N)
        said = f"{half} uniformly random episodes, {episodes - half} by two optimal conventions in equal parts"
    if env in ("matrix", "bridge", "polynomial"):
        dataset = record(envs.make(env, task, num_envs=len(actions)), lambda t, obs, info: actions[:, t])
    dataset.info |= {
        "env": env, "task": task, "name": name, "seed": seed, "behaviour": said, "collector": COLLECTOR,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "gymnasium": gymnasium.__version__,
        },
    }  # fmt: skip
    if env in TEAMS:
        dataset.info["versions"]["mujoco"] = importlib.metadata.version("mujoco")
    return dataset.check()


def record(game, act, seed=None):
    """Play all games of `game` once and keep what happened, padded to the longest episode.

    Args:
        game: one of our environments with B games; every episode that it plays becomes one of the dataset.
        act: function of (step, obs, info) that returns the actions (B, N), or (B, N, A), of all games.
    Returns:
        A `Dataset` of B episodes; its `info` holds "won", a list of 0 and 1, if these games can be won.
    """
    played = play(game, lambda obs, info, t: (act(t, obs, info), t + 1), memory=0, seed=seed, film=True)
    return Dataset(**played.film, info={} if played.won is None else {"won": played.won.int().tolist()})


def _battles(task, name, episodes, seed):
    """`episodes` battles of the teams that `name` stands for; returns the `Dataset` and who played it."""
    half = episodes // 2
    if name == "mixed":
        plan = {"medium": half, "expert": episodes - half}
    elif name == "medium-replay":
        files = sorted((BEHAVIOUR / task).glob("replay-*.npz"), key=lambda path: int(path.stem[7:]))
        if not files:
            raise ValueError(f"no replay teams for {task} ship with the repository (see {BEHAVIOUR}/README.md)")
        share = [episodes * (k + 1) // len(files) - episodes * k // len(files) for k in range(len(files))]
        plan = dict(zip((path.stem for path in files), share))
    else:
        plan = {name: episodes}
    teams = [(name, count, *read_behaviour(BEHAVIOUR / task / f"{name}.npz")) for name, count in plan.items()]
    parts, said, block = [], [], 0
    with tqdm(total=episodes, desc=f"battles of {task} {name}", unit="", leave=False, disable=None) as bar:
        for team, count, play, info in teams:
            said.append(f"{count} by {team} ({info['script']} after {info['steps']} steps)")
            for start in range(0, count, BLOCK):
                game = envs.make("smac", task, min(BLOCK, count - start), check=False)
                generator = torch.Generator().manual_seed(1_000_003 * seed + block)
                parts.append(record(game, lambda t, obs, info: play(t, obs, info, generator), 1000 * seed + block))
                bar.update(game.num_envs)
                block += 1
    return concatenate(parts), ", ".join(said)


def _bodies(env, task, name, episodes, seed):
    """`episodes` episodes of a body, played by the teams that `name` stands for, and who played them."""
    shares = _shares(env, TEAMS[env][name], episodes)
    parts, said, more = [], [], {"references": references(env)}
    with tqdm(total=episodes, desc=f"episodes of {env} {name}", unit="", leave=False, disable=None) as bar:
        for team, count in shares.items():
            played, about, left_out = play_body(env, task, team, count, seed, bar=bar)
            parts += played
            said.append(f"{count} by {team}" + (f" ({about['script']} after {about['steps']} steps)" if about else ""))
            if env == "reacher" and played:
                bend = torch.cat([part.state[:, 1:, 3].mean(1) for part in played])
                more.setdefault("bends", {})[team] = {"mean sin θ2": round(float(bend.mean()), 4), "left out": left_out}
    how = f"most likely actions + N(0, {NOISE[env]}^2), clipped" if env in NOISE else "sampled actions, clipped"
    how = "uniformly random actions" if name == "random" else how
    dataset = concatenate(parts)
    dataset.info |= more
    return dataset, f"{', '.join(said)}; {how}"


def _shares(env, patterns, episodes):
    """How many episodes each team plays, {team: count}: equal parts for the patterns and for the teams of each."""

    def cut(total, parts):
        return [total * (k + 1) // parts - total * k // parts for k in range(parts)]

    shares = {}
    for pattern, total in zip(patterns, cut(episodes, len(patterns))):
        found = [path.stem for path in (BEHAVIOUR / env).glob(f"{pattern}.npz") if re.search(r"-\d+$", path.stem)]
        teams = sorted(found, key=lambda team: int(team.rsplit("-", 1)[1])) if "*" in pattern else [pattern]
        teams = teams or [pattern.replace("*", "0")]  # reading it tells what is missing
        shares |= dict(zip(teams, cut(total, len(teams))))
    return shares


def references(env):
    """Mean returns of a random and an expert team on a body, {"random": float, "expert": float}; see `REFERENCES`."""
    found = {}
    for level in ("random", "expert"):
        returns = []
        for team, count in _shares(env, REFERENCES[env][level], REFERENCES[env]["episodes"]).items():
            parts, *_ = play_body(env, envs.TASKS[env][0], team, count, "reference", env != "reacher", verify=False)
            returns += [part.returns for part in parts]
        found[level] = float(torch.cat(returns).double().mean())
    return found


def block_seed(env, team, seed, start):
    """The seed with which a team's games from the `start`-th on are played, of both the games and its noise.

    It does not depend on the task, so that all views show the same episodes.
    """
    return int(hashlib.sha1(f"{env} {team} {seed} {start}".encode()).hexdigest()[:7], 16)


def play_body(env, task, team, count, seed, greedy=False, verify=True, bar=None):
    """`count` episodes of a body by one team, which sees what it was trained on, recorded through the views of `task`.

    Args:
        team: the name of a file in the body's behaviour folder, or one of `WEIGHTLESS`.
        greedy: play the most likely actions; otherwise those of the datasets, with their noise.
        verify: of the reacher's clockwise and counter-clockwise teams, keep only episodes that bend their way.
    Returns:
        A list of `Dataset`s, one for each block of games played at once; what is known of the team (a dictionary,
        empty if it has no weights); and how many episodes bent the other way and were left out.
    Raises:
        ValueError: the team's file is missing or damaged, or holds a team for something else, or most of its episodes
            bend the other way.
    """
    play, about = (None, {}) if team in WEIGHTLESS else read_behaviour(BEHAVIOUR / env / f"{team}.npz", env)
    trained = envs.make(env, about["task"]) if about else None  # lends its views
    sign = BENDS.get(team.rsplit("-", 1)[0], 0) if verify else 0
    parts, kept, played = [], 0, 0
    while kept < count:
        game = envs.make(env, task, num_envs=min(GAMES, count - kept))
        start = block_seed(env, team, seed, played)
        generator = torch.Generator().manual_seed(start)

        def act(t, obs, info):
            shape = (game.num_envs, *game.motors.shape)
            if team == "still":
                return torch.zeros(shape)
            if team == "random":
                return 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1
            entries = np.pad(game.entries, ((0, 0), (0, 1)))  # (B, F+1), the last one 0
            seen = torch.from_numpy(entries[:, trained.columns]).float()
            if greedy or env in NOISE:
                action = play(t, seen, info, None)
                action = action if greedy else action + NOISE[env] * normal(shape, generator)
            else:
                action = play(t, seen, info, generator)
            return action.clamp(-1, 1)

        part = record(game, act, start)
        played += game.num_envs
        if sign:
            part = _select(part, part.state[:, :, 3].sum(1) * sign > 0)
        kept += len(part.mask)
        if 2 * kept < played >= 20:
            raise ValueError(
                f"{played - kept} of {played} episodes of {BEHAVIOUR / env / team}.npz bend the other way: it is no "
                f"{team.rsplit('-', 1)[0]} team"
            )
        if len(part.mask):
            parts.append(part)
        if bar is not None:
            bar.update(len(part.mask))
    return parts, about, played - kept


def _select(dataset, which):
    """The episodes `which` (E,) bool of a dataset without a list of wins."""
    return Dataset(*(None if x is None else x[which] for x in (getattr(dataset, name) for name in TENSORS)))


def concatenate(parts):
    """Datasets of the same task, one after the other, padded to the longest episode of all."""
    longest, fields = max(part.mask.shape[1] for part in parts), {}
    for name in TENSORS:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            fields[name] = None
            continue
        extra = [longest - part.mask.shape[1] for part in parts]
        fields[name] = torch.cat(
            [torch.cat([x, x.new_zeros(len(x), e, *x.shape[2:])], 1) if e else x for x, e in zip(tensors, extra)]
        )
    won = {"won": sum((part.info["won"] for part in parts), [])} if "won" in parts[0].info else {}
    return Dataset(**fields, info=won)


def _matrix_actions(behaviour, episodes, generator):
    """Joint actions (E, N) int64 of one of `MATRIX_BEHAVIOURS`."""
    if isinstance(behaviour[0], str):
        joint = torch.tensor([[ord(letter) - ord("A") for letter in word] for word in behaviour])
        return joint[torch.arange(episodes) * len(joint) // episodes]  # equal parts, up to the rounding
    draws = [torch.multinomial(torch.tensor(p).double(), episodes, True, generator=generator) for p in behaviour]
    return torch.stack(draws, 1)


def _independent(name, sizes):
    """Per-agent probabilities for "uniform" or for a JSON list of numbers that every agent uses."""
    if name == "uniform":
        return [[1.0] * n for n in sizes]
    try:
        weights = torch.tensor(json.loads(name), dtype=torch.float64)
        good = weights.shape == (max(sizes),) and min(sizes) == max(sizes) and weights.min() >= 0
        good = good and 0 < weights.sum() < float("inf")
    except (ValueError, TypeError, RuntimeError, OverflowError):  # also too deep, or too large for 64 bits
        good = False
    if not good:
        raise ValueError(f"dataset {name!r:.80}: write one probability for each action, such as '[0.9, 0.1]'")
    return [weights.tolist()] * len(sizes)


def _polynomial_actions(peak, name, episodes, generator):
    """Joint actions (E, 1, 2, 1) float32 that a name like `POLYNOMIAL_DATASETS` stands for, and how they were drawn."""
    shape = (episodes, 1, 2, 1)
    if name == "uniform":
        return 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1, "uniformly random actions"
    place, sigma = _spread(name)
    centre = peak if place == "peak" else 0.0
    actions = centre + sigma * torch.randn(shape, generator=generator, dtype=torch.float64)
    return actions.clamp(-1, 1).float(), f"each agent by N({centre:.4g}, {sigma:g}^2), clipped to [-1, 1]"


def _bridge_optimal(episodes, limit, generator):
    """The two hand-made conventions of AlberDICE's *optimal* data as action sequences (E, limit, 2).

    "Left": both go left, agent 0 steps aside in one of three ways, agent 1 goes home, agent 0 crosses.
    "Right" is the same game turned by 180 degrees, with the roles exchanged.
    """
    stay, up, down, right, left = range(5)
    draw = torch.rand(episodes, 4, generator=generator, dtype=torch.float32)
    junk = torch.randint(3, (episodes, limit), generator=generator)  # what agent 1 "does" once it is home
    plans = torch.tensor([stay, up, left])[junk][..., None].repeat(1, 1, 2)  # (E, limit, 2): agent 0, agent 1
    plans[..., 0] = right
    for plan, (aside, turn, corner, convention) in zip(plans, draw.tolist()):
        step_aside, step_back = [(left, right), (down, up), (up, down)][int(aside * 3)]
        up_first = step_aside == left or (step_aside == down and turn < 0.5)
        plan[:3, 0] = torch.tensor([left, step_aside, step_back])
        plan[:4, 1] = torch.tensor([left, left, *((up, left) if up_first else (left, up))])
        plan[6:8, 0] = torch.tensor([right, down] if corner < 0.5 else [down, right])
        if convention < 0.5:
            plan[:] = torch.tensor([stay, down, up, left, right])[plan].flip(-1)
    return plans


@dataclass
class Args:
    env: str = "bridge"  # the environment, one of ours or package.module:factory
    task: str = ""  # its task: a map of smac, a body's views; for matrix also a payoff table as JSON
    dataset: str = ""  # the behaviour, by default the last; also probabilities (matrix) or any spread (polynomial)
    team: str = ""  # who plays in place of a named behaviour: random, or the folder of a run
    noise: float = 0.0  # with --team: the share of random actions, or the deviation of what is added to continuous ones
    env_kwargs: str = ""  # with --team: more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in an environment that is not ours
    episodes: int = 0  # how many episodes; 0 for the default
    seed: int = 0  # of the behaviour
    out: Path = Path("dataset.h5")  # the HDF5 file to write


def main(args):
    from data import runs
    from data.recorder import record_team

    runs.check_numbers(args, may_be_zero="noise episodes seed")
    options = runs.game_options(args)
    if args.dataset and (args.team or ":" in args.env):
        raise ValueError(f"--dataset {args.dataset} names a behaviour: here --team says who plays")
    if args.team or ":" in args.env:
        team, episodes = args.team or "random", args.episodes or 500
        dataset = record_team(args.env, args.task, team, episodes, args.seed, args.noise, options)
    elif args.env_kwargs or args.noise:
        raise ValueError("--env-kwargs and --noise need --team: the named datasets are as they are")
    else:
        name = args.dataset or names(args.env, args.task)[-1]
        dataset = collect_dataset(args.env, args.task, name, args.seed, args.episodes)
    write(dataset, args.out)
    runs.say(f"{args.out}: {len(dataset.returns)} episodes, mean return {dataset.returns.mean():.4f}")


def parse():
    from data import flags

    return flags.read(Args, description=__doc__.splitlines()[0])


if __name__ == "__main__":
    from data import runs

    runs.launch(main, parse)
