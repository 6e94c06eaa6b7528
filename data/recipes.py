"""Which datasets have a name, how each is recorded and by whom, and how to load any.

The teams' weights are files that `algorithms/mappo.py --save-snapshots` writes, in data/behaviour/:
MAP/TEAM.npz for the battles; for the bodies that a team shares (halfcheetah, reacher, ant)
BODY/TEAM.npz.
"""

import hashlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import torch
from gymnasium.spaces import Box
from tqdm import tqdm

import envs
from data.dataset import Dataset, write
from data.readers import check_order, read
from data.record import block_seed, concatenate, random_player, record
from data.teams import normal, read_behaviour
from envs.matrix import read_payoff

CACHE = Path(__file__).parent / "cache"
BEHAVIOUR = Path(__file__).parent / "behaviour"  # weights of the teams that play, see its README
COLLECTOR = 2  # raise it when a recipe changes, so that data cached before are not used again

# Each table ends with what is learned from where nobody names a dataset.
# Matrix games. Joint actions in equal parts ("AB": agent 0 plays A, agent 1 plays B), or for each
# agent the probabilities of its actions, drawn independently. A name that is a JSON list holds the
# probabilities itself.
MATRIX_BEHAVIOURS = {
    "xor": {
        "ab": ["AB"],
        "ab-ba": ["AB", "BA"],
        "aa-ab-ba": ["AA", "AB", "BA"],
        "all": ["AA", "AB", "BA", "BB"],
    },
    "m-ne": {"balanced": [[1, 1, 1]] * 2, "imbalanced": [[0.8, 0.1, 0.1]] * 2},
    "coordination": {  # left, right
        "favourable": [[0.25, 0.75], [0.25, 0.75]],
        "neutral": [[0.5, 0.5], [0.5, 0.5]],
        "unfavourable": [[0.75, 0.25], [0.25, 0.75]],
    },
}  # in all others: "uniform"
# Polynomial games. Each agent plays uniformly, or around its part of (0, 0) or of a best joint
# action with the standard deviation in the name.
SPREAD = r"(peak|origin)-\d+(\.\d+)?(e-\d+)?"

# Which teams play, in this order and in equal parts; "*" stands for 0, 1, ..., in equal parts too.
# All tasks of a body share its teams: the same episodes are seen through the task's views. "random"
# has no weights; it plays uniformly random actions.
TEAMS = {
    "smac": {
        "medium": ("medium",),
        "expert": ("expert",),
        "mixed": ("medium", "expert"),
        "medium-replay": ("replay-*",),
    },
    "halfcheetah": {
        "medium": ("medium-*",),
        "good-medium": ("good-*", "medium-*"),
        "good": ("good-*",),
    },
    "reacher": {"expert-mix": ("counterclockwise-*", "clockwise-*")},
    "ant": {
        "random": ("random",),
        "medium": ("medium",),
        "expert": ("expert",),
        "full-replay": ("replay-*",),
    },
}
DATASETS = TEAMS | {
    "bridge": ("optimal", "mixed"),
    "polynomial": ("uniform", "origin-0.5", "peak-0.5"),
}
BLOCK = 250  # battles that are played at once
GAMES = 50  # episodes of a body that are played at once
NOISE = {"halfcheetah": 0.2}  # added to most likely actions; the other bodies' teams sample theirs
BENDS = {"counterclockwise": 1, "clockwise": -1}  # the reacher's sign of sin θ2, over an episode

# Mean returns that are 0 and 1 of a body's scores. Measured with MuJoCo 3.3.7: a random team and
# the best ones (good-*, expert) by their most likely actions, as scripts are judged, in 20 episodes
# each; on the reacher, in 1,000, an arm that keeps still, and the teams of the data, which sample.
# MOMA-PPO's 0 there, -11.1, is what an untrained team scores by its most likely actions, near 0.
REFERENCES = {
    "halfcheetah": {"random": -301.1357734680176, "expert": 6030.6973876953125},
    "reacher": {"random": -11.720771590590477, "expert": -3.943428660571575},
    "ant": {"random": -61.14932255744934, "expert": 3366.402380371094},
}

# How many episodes by default, where it is not 1,000: a quarter of the papers'.
EPISODES = {
    "bridge optimal": 500,
    "halfcheetah good": 250,
    "halfcheetah medium": 250,
    "halfcheetah good-medium": 500,
    "reacher expert-mix": 5000,
    "ant medium": 250,
    "ant full-replay": 250,
    "ant expert": 250,
}


# ---------------------------------------------------------------- names and paths
def names(env, task=""):
    """The dataset names of one task, a tuple; of those that hold a number, an example each."""
    if env == "matrix":
        return tuple(MATRIX_BEHAVIOURS.get(full_task(env, task), ("uniform",)))
    return tuple(DATASETS.get(env, ()))


def default(env, task=""):
    """The task, and its dataset, where nobody names any; "" in a game that is not ours."""
    return full_task(env, task), (names(env, task) or ("",))[-1]


def is_name(dataset, env, task):
    """Whether a task has a dataset of this name, one of those that hold numbers included."""
    written_out = env == "matrix" and dataset.startswith("[")
    spread = env == "polynomial" and re.fullmatch(SPREAD, dataset)
    return bool(written_out or spread or dataset in names(env, task))


def is_path(dataset, env="", task=""):
    """Whether a dataset is given by a path: what has a "/" or a file ending, or exists."""
    path = Path(dataset)
    if "/" in dataset or path.suffix[1:2].isalpha():  # peak-0.5 has no file ending
        return True
    return dataset != "" and path.exists() and not is_name(dataset, env, task)


def full_task(env, task):
    """The task by its name: "" is the first one of an environment."""
    return task or envs.TASKS.get(env, ("",))[0]


def about(path):
    """What a file of ours says of its origin: {"env", "task"}; {} for other files."""
    try:
        with h5py.File(path, "r") as file:
            return {key: json.loads(file.attrs.get(key, '""')) for key in ("env", "task")}
    except (OSError, ValueError, TypeError):
        return {}


# ---------------------------------------------------------------- loading
def load(
    env, task, dataset, device="cpu", seed=0, episodes=0, limit_terminates=False, options=None
):
    """A `Dataset` for one task, by name or by path, checked against the environment.

    A name is collected on first use and cached in `data/cache/`. A path is anything with a "/" or a
    file ending, or anything that exists.

    Args:
        env: one of ours, or "package.module:factory"; "" to read a file without one.
        options: what the environment gets besides; without it one that is not ours is not made, and
            not checked.
        limit_terminates: take the time limit for an end of the game, after which nothing is worth
            anything. OG-MARL's 2halfcheetah is stored, and was learned from, in this way.
    Raises:
        ValueError: an unknown name, a damaged or foreign file, a dataset of another environment.
        OSError: no such file.
    """
    foreign = not env or ":" in env
    game = None
    if not foreign or options is not None:
        game = envs.make(env, task, **options or {})
    task = full_task(env, task)
    if foreign or is_path(dataset, env, task):
        found = read(dataset, game and game.time_limit, task if env == "ant" else "")
    else:
        found = load_name(env, task, dataset, seed, episodes)
    if game:
        check_fit(found, env, task, game, dataset)
        game.close()
        if limit_terminates:
            late = (found.lengths >= game.time_limit).nonzero()[:, 0]  # lasted until the limit
            found.terminated[late, found.lengths[late] - 1] = True
    return found.to(device)


def load_name(env, task, name, seed, episodes):
    """A named dataset from the cache, or else recorded now."""
    path = cached_path(env, task, name, seed, episodes or EPISODES.get(f"{env} {name}", 1000))
    try:
        return read(path)
    except (ValueError, OSError):
        pass  # not there yet, or not to be trusted
    found = collect_dataset(env, task, name, seed, episodes)
    try:
        write(found, path)
    except OSError as error:
        print(f"note: the dataset was not cached ({error})", file=sys.stderr)
    return found


def cached_path(env, task, name, seed, episodes):
    """Where a named dataset is cached: its file's name depends on all that its content does."""
    rules = read_payoff(task).tolist() if env == "matrix" else None
    key = [env, task, rules, name, episodes, seed, COLLECTOR]
    if env in REFERENCES:
        key.append(version("mujoco"))
    folder = BEHAVIOUR / (task if env == "smac" else env)
    teams = [hashlib.sha1(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.npz"))]
    key = json.dumps(key + teams)
    words = [re.sub(r"\W+", "_", word).strip("_")[:40] for word in (env, task, name)]
    words.append(hashlib.sha1(key.encode()).hexdigest()[:12])
    return CACHE / ("-".join(filter(None, words)) + ".h5")


def check_fit(dataset, env, task, game, source):
    """Raise ValueError unless the dataset was recorded in this task and has its sizes."""
    here = f"{env} {task}".strip()
    its_env = dataset.info.get("env", env)
    its_task = full_task(its_env, dataset.info.get("task", task))
    if its_env != env or (its_task != task and ":" not in env):
        flags = f"--env {its_env} --task {its_task!r}"
        raise ValueError(f"{source} was recorded in another task than {here}: use {flags}")
    continuous = dataset.actions.is_floating_point()
    A = (dataset.actions if continuous else dataset.avail_actions).shape[-1]
    found = (*dataset.obs.shape[2:], dataset.state.shape[2], A, continuous)
    box = isinstance(game.single_action_space, Box)
    wanted = game.num_agents, game.obs_dim, game.state_dim, game.num_actions, box
    if found != wanted:
        sizes = "(agents, observation, state, actions, whether these are continuous)"
        raise ValueError(f"{source} does not fit {here}: {sizes} are {found}, not {wanted}")
    if env in REFERENCES:
        check_order(dataset, game, source)


# ---------------------------------------------------------------- recording
def collect_dataset(env, task, name, seed=0, episodes=0):
    """Roll out the behaviour that `name` stands for; returns a `Dataset` on the CPU.

    Args:
        seed: of the behaviour (and the environment).
        episodes: how many; 0 for what `EPISODES` says, else 1,000.
    Raises:
        ValueError: an unknown environment, task or name, or a team that plays it is missing or
            damaged.
    """
    game = envs.make(env, task)
    task = full_task(env, task)
    if not is_name(name, env, task):
        remedy = f"choose {', '.join(names(env, task))}, or give the path of a file"
        raise ValueError(f"{env} {task} has no dataset {name!r}: {remedy}")
    episodes = episodes or EPISODES.get(f"{env} {name}", 1000)
    if env in TEAMS:
        dataset, behaviour = record_teams(env, task, name, episodes, seed)
    else:
        plan = {"matrix": plan_matrix, "bridge": plan_bridge, "polynomial": plan_polynomial}[env]
        generator = torch.Generator().manual_seed(seed)
        # (E, T, N) or (E, T, N, A)
        actions, behaviour = plan(game, task, name, episodes, generator)
        games = envs.make(env, task, num_envs=episodes)
        dataset = record(games, lambda t, obs, info: actions[:, t])
    if env in REFERENCES:
        dataset.info["references"] = REFERENCES[env]
    dataset.info |= {"env": env, "task": task, "name": name, "seed": seed, "behaviour": behaviour}
    versions = {name: version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
    dataset.info |= {"collector": COLLECTOR, "versions": versions}
    return dataset.check()


def plan_matrix(game, task, name, episodes, generator):
    """Joint actions (E, 1, N), and how they were drawn."""
    behaviour = MATRIX_BEHAVIOURS.get(task, {}).get(name)
    if behaviour is None:
        behaviour = read_probabilities(name, game.payoff.shape)
    if isinstance(behaviour[0], str):
        joint = torch.tensor([[ord(letter) - ord("A") for letter in word] for word in behaviour])
        actions = joint[torch.arange(episodes) * len(joint) // episodes]  # equal parts
    else:
        draws = []
        for weights in behaviour:
            weights = torch.tensor(weights).double()
            draws.append(torch.multinomial(weights, episodes, True, generator=generator))
        actions = torch.stack(draws, 1)
    return actions[:, None], json.dumps(behaviour)


def read_probabilities(name, sizes):
    """Each agent's probabilities for "uniform", or for a JSON list that every agent uses."""
    if name == "uniform":
        return [[1.0] * n for n in sizes]
    weights = [float(weight) for weight in json.loads(name)]
    if {len(weights)} != set(sizes):
        remedy = "write one probability for each action, such as '[0.9, 0.1]'"
        raise ValueError(f"dataset {name!r:.80}: {remedy}")
    return [weights] * len(sizes)


def plan_polynomial(game, task, name, episodes, generator):
    """Joint actions (E, 1, 2, 1), and how they were drawn."""
    shape = (episodes, 1, 2, 1)
    if name == "uniform":
        actions = 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1
        return actions, "uniformly random actions"
    place, spread = name.split("-", 1)
    sigma = float(spread)
    centre = game.peak if place == "peak" else 0.0
    noise = sigma * torch.randn(shape, generator=generator, dtype=torch.float64)
    actions = (centre + noise).clamp(-1, 1).float()
    return actions, f"each agent by N({centre:.4g}, {sigma:g}^2), clipped to [-1, 1]"


def plan_bridge(game, task, name, episodes, generator):
    """Joint actions (E, T, 2), and how they were drawn."""
    half = episodes // 2 if name == "mixed" else 0
    shape = half, game.time_limit, 2
    random = torch.randint(game.num_actions, shape, generator=generator)
    optimal = bridge_conventions(episodes - half, game.time_limit, generator)
    behaviour = f"{half} uniformly random episodes, {episodes - half} by two optimal conventions"
    return torch.cat([random, optimal]), f"{behaviour} in equal parts"


def bridge_conventions(episodes, limit, generator):
    """The two hand-made conventions of AlberDICE's *optimal* data as actions (E, limit, 2).

    "Left": both go left, agent 0 steps aside in one of three ways, agent 1 goes home, agent 0
    crosses. "Right" is the same game turned by 180 degrees, with the roles exchanged.
    """
    stay, up, down, right, left = range(5)
    draw = torch.rand(episodes, 4, generator=generator, dtype=torch.float32)
    # What agent 1 "does" once it is home, is junk.
    junk = torch.randint(3, (episodes, limit), generator=generator)
    plans = torch.tensor([stay, up, left])[junk][..., None].repeat(1, 1, 2)  # (E, limit, 2)
    plans[..., 0] = right
    for plan, (aside, turn, corner, convention) in zip(plans, draw.tolist()):
        step_aside, step_back = [(left, right), (down, up), (up, down)][int(aside * 3)]
        up_first = step_aside == left or (step_aside == down and turn < 0.5)
        plan[:3, 0] = torch.tensor([left, step_aside, step_back])
        home = (up, left) if up_first else (left, up)
        plan[:4, 1] = torch.tensor([left, left, *home])
        plan[6:8, 0] = torch.tensor([right, down] if corner < 0.5 else [down, right])
        if convention < 0.5:
            plan[:] = torch.tensor([stay, down, up, left, right])[plan].flip(-1)
    return plans


# ---------------------------------------------------------------- teams
def share_out(folder, patterns, episodes):
    """How many episodes each team of a folder plays, {team: count}.

    Equal parts for the patterns, and for the teams of each.
    """

    def cut(total, parts):
        return [total * (k + 1) // parts - total * k // parts for k in range(parts)]

    shares = {}
    for pattern, total in zip(patterns, cut(episodes, len(patterns))):
        teams = [pattern]
        if "*" in pattern:
            teams = [path.stem for path in folder.glob(f"{pattern}.npz")]
            teams.sort(key=lambda team: int(team.rsplit("-", 1)[1]))
            teams = teams or [pattern]  # reading it tells what is missing
        shares |= dict(zip(teams, cut(total, len(teams))))
    return shares


def record_teams(env, task, name, episodes, seed):
    """Games of the teams that `name` stands for, and who played them."""
    folder = BEHAVIOUR / (task if env == "smac" else env)
    shares = share_out(folder, TEAMS[env][name], episodes)
    parts, behaviour = [], []
    bar = tqdm(shares.items(), desc=f"{env} {task} {name}", unit="team", leave=False, disable=None)
    for team, count in bar:
        words = f"{count} by {team}"
        if team == "random":
            parts += play_body(env, task, team, count, seed, random_player)
        else:
            play, info = read_behaviour(folder / f"{team}.npz", env)
            words += f" ({info['script']} after {info['steps']} steps)"
            if env == "smac":
                parts += play_battles(task, count, seed, play, len(parts))
            else:
                player = body_player(env, info["task"], play)
                parts += play_body(env, task, team, count, seed, player)
        behaviour.append(words)
    behaviour = ", ".join(behaviour)
    if env in NOISE:
        behaviour += f"; most likely actions + N(0, {NOISE[env]}^2), clipped"
    return concatenate(parts), behaviour


def play_battles(task, count, seed, play, block):
    """`count` battles of one team, a list of `Dataset`s; `block` is the number of the first."""
    parts = []
    for start in range(0, count, BLOCK):
        game = envs.make("smac", task, min(BLOCK, count - start), check=False)
        generator = torch.Generator().manual_seed(1_000_003 * seed + block)
        part = record(game, lambda *seen: play(*seen, generator), 1000 * seed + block)
        parts.append(part)
        block += 1
    return parts


def play_body(env, task, team, count, seed, player):
    """`count` episodes of a body by one team, recorded through the views of `task`.

    Of the reacher's clockwise and counter-clockwise teams, only episodes that bend their way stay.

    Args:
        player: function of (game, generator) that returns one of (step, obs, info) -> actions.
    Returns:
        A list of `Dataset`s, one for each block of games played at once.
    Raises:
        ValueError: most of the episodes bend the other way.
    """
    sign = BENDS.get(team.rsplit("-", 1)[0], 0)
    parts, kept, played = [], 0, 0
    while kept < count:
        game = envs.make(env, task, num_envs=min(GAMES, count - kept))
        start = block_seed(env, team, seed, played)
        generator = torch.Generator().manual_seed(start)
        part = record(game, player(game, generator), start)
        played += game.num_envs
        if sign:
            bends = part.state[:, :, 3].sum(1) * sign > 0  # (B,)
            chosen = {name: x[bends] for name, x in part.tensors().items()}
            part = Dataset(**chosen, avail_actions=None)
        kept += len(part.mask)
        if 2 * kept < played >= 20:
            raise ValueError(f"most episodes of {env}/{team}.npz bend the other way")
        if len(part.mask):
            parts.append(part)
    return parts


def body_player(env, trained_on, play):
    """How a team plays a body, as `random_player` plays any game.

    It sees what the task shows that it was trained on, whatever the game shows.
    """
    columns = envs.make(env, trained_on).columns

    def player(game, generator):
        def act(t, obs, info):
            entries = np.pad(game.entries, ((0, 0), (0, 1)))  # (B, F+1), the last one 0
            seen = torch.from_numpy(entries[:, columns]).float()  # (B, N, O)
            if env not in NOISE:
                return play(t, seen, info, generator).clamp(-1, 1)
            action = play(t, seen, info, None)  # (B, N, A)
            return (action + NOISE[env] * normal(action.shape, generator)).clamp(-1, 1)

        return act

    return player
