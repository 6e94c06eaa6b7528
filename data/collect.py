"""Record datasets by rolling out behaviour policies in our own environments, and load them by name.

python data/collect.py --env bridge --dataset mixed --out mixed.h5
python data/collect.py --env smac --task 2s3z --dataset medium-replay --episodes 5000 --out mine.h5
python data/collect.py --env matrix --task "[[1, 0], [0, 2]]" --dataset "[0.9, 0.1]" --out mine.h5
"""

import hashlib
import json
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

if __name__ == "__main__":  # let `python data/collect.py` find the packages beside its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import envs
from data.dataset import Dataset, read, write
from envs.matrix import read_payoff

CACHE = Path(__file__).parent / "cache"
BEHAVIOUR = Path(__file__).parent / "behaviour"  # weights of the teams that play our datasets, see its README
COLLECTOR = 1  # raise it when a collector changes, so that data cached before are not used again

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
SMAC_DATASETS = ("medium", "expert", "mixed", "medium-replay")
BLOCK = 250  # battles that are played at once
EPISODES = {"optimal": 500}  # how many by default, where it is not 1,000


def names(env, task=""):
    """The dataset names that exist for one task, a tuple of str."""
    if env == "matrix":
        return tuple(MATRIX_BEHAVIOURS.get(task or "xor", {"uniform": None}))
    if env == "smac":
        return SMAC_DATASETS
    return ("optimal", "mixed")


def load(env, task, dataset, device="cpu", seed=0, episodes=None):
    """A `Dataset` for one task, by name or by path, checked against the environment.

    A name is collected on first use and cached in `data/cache/`. A path is anything with a "/" or a file ending,
    or anything that exists.

    Raises:
        ValueError: an unknown name, a damaged or foreign file, a dataset of another environment.
        OSError: no such file.
    """
    game = envs.make(env, task)
    path = Path(dataset)
    if not dataset.startswith("[") and (
        "/" in dataset or path.suffix or (path.exists() and dataset not in names(env, task))
    ):
        found = read(path, time_limit=game.time_limit)
    else:
        found = _cached(env, task, dataset, seed, episodes)
    _belongs(found, env, task, game, dataset)
    return found.to(device)


def _cached(env, task, name, seed, episodes):
    _known(env, task, name)
    episodes = episodes or EPISODES.get(name, 1000)
    rules = read_payoff(task or "xor").tolist() if env == "matrix" else None
    key = json.dumps([env, task, rules, name, episodes, seed, COLLECTOR])  # all that the content depends on
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
    if name not in names(env, task) and not (env == "matrix" and name.startswith("[")):
        raise ValueError(
            f"{f'{env} {task}'.strip()} has no dataset {name!r}: "
            f"choose {', '.join(names(env, task))}, or give the path of a file"
        )


def _belongs(dataset, env, task, game, source):
    """Raise ValueError unless the dataset was recorded in this task and has the sizes of `game`."""
    other_env, other_task = dataset.info.get("env", env), dataset.info.get("task", task)
    same = other_env == env and (other_task == task or env == "matrix" and _same_payoff(other_task, task))
    if not same:
        flags = f"--env {other_env}" + (f" --task {other_task!r}" if other_task else "")
        raise ValueError(f"{source} was recorded in another task than {env} {task}".rstrip() + f": use {flags}")
    if dataset.actions.is_floating_point():
        raise ValueError(f"{source} has continuous actions, {env} has discrete ones")
    A = dataset.avail_actions.shape[-1]
    found = (dataset.obs.shape[2], dataset.obs.shape[3], dataset.state.shape[2], A)
    wanted = (game.num_agents, game.obs_dim, game.state_dim, game.num_actions)
    if found != wanted:
        raise ValueError(
            f"{source} does not fit {env} {task}: it has (agents, observation, state, actions) = {found}, "
            f"the environment has {wanted}"
        )


def _same_payoff(one, other):
    one, other = read_payoff(one or "xor"), read_payoff(other or "xor")
    return one.shape == other.shape and bool((one == other).all())


def collect_dataset(env, task, name, seed=0, episodes=None):
    """Roll out the behaviour that `name` stands for; returns a `Dataset` on the CPU.

    Args:
        seed: of the behaviour (and the environment).
        episodes: how many; by default 500 for Bridge "optimal", else 1,000.
    Raises:
        ValueError: an unknown environment, task or name.
    """
    game = envs.make(env, task)
    _known(env, task, name)
    episodes = episodes or EPISODES.get(name, 1000)
    if episodes < 1:
        raise ValueError(f"a dataset needs at least one episode, not {episodes}")
    generator = torch.Generator().manual_seed(seed)
    if env == "matrix":
        behaviour = MATRIX_BEHAVIOURS.get(task or "xor", {}).get(name)
        if behaviour is None:
            behaviour = _independent(name, game.payoff.shape)
        actions = _matrix_actions(behaviour, episodes, generator)[:, None]  # (E, 1, N)
        said = json.dumps(behaviour)
    elif env == "smac":
        dataset, said = _battles(task or envs.TASKS[env][0], name, episodes, seed)
    else:
        half = episodes // 2 if name == "mixed" else 0
        limit = game.time_limit
        random = torch.randint(game.num_actions, (half, limit, 2), generator=generator)
        optimal = _bridge_optimal(episodes - half, limit, generator)
        actions = torch.cat([random, optimal])  # (E, T, N)
        said = f"{half} uniformly random episodes, {episodes - half} by two optimal conventions in equal parts"
    if env != "smac":
        dataset = record(envs.make(env, task, num_envs=len(actions)), lambda t, obs, info: actions[:, t])
    dataset.info |= {
        "env": env, "task": task, "name": name, "seed": seed, "behaviour": said, "collector": COLLECTOR,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "gymnasium": gymnasium.__version__,
        },
    }  # fmt: skip
    return dataset.check()


def record(game, act, seed=None):
    """Play all games of `game` once and keep what happened, padded to the longest episode.

    Args:
        game: one of our environments with B games; every episode that it plays becomes one of the dataset.
        act: function of (step, obs, info) that returns the actions (B, N) of all games.
    Returns:
        A `Dataset` of B episodes; its `info` holds "won", a list of 0 and 1, if these games can be won.
    """
    obs, info = game.reset(seed=seed)
    running = torch.ones(game.num_envs, dtype=torch.bool, device=game.device)
    before, after = [(obs, info["state"], info["avail_actions"])], []
    while running.any():
        actions = act(len(after), obs, info)
        obs, reward, terminated, truncated, info = game.step(actions)
        seen = (obs, info["state"], info["avail_actions"])
        before.append([x * running.view(-1, *[1] * (x.dim() - 1)) for x in seen])  # zero behind the end
        after.append((actions * running[:, None], reward, terminated & running, running))
        running = running & ~(terminated | truncated)
    obs, state, avail = (torch.stack(x, 1) for x in zip(*before))
    actions, reward, terminated, mask = (torch.stack(x, 1) for x in zip(*after))
    won = {"won": info["won"].int().tolist()} if "won" in info else {}
    return Dataset(obs, state, avail, actions, reward, terminated, mask, won)


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
    return _concatenate(parts), ", ".join(said)


def read_behaviour(path):
    """A team's weights as a function that draws its actions, and what is known of it.

    The file is one of those that `algorithms/mappo.py --save-snapshots` writes: arrays weight0, bias0, ... of a ReLU
    network that all agents share, and a JSON text `info`.

    Returns:
        A function of (step, obs (B, N, O), info, generator) that returns actions (B, N), and a dictionary.
    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["info"]))
            layers = [(file[f"weight{k}"], file[f"bias{k}"]) for k in range(sum("weight" in key for key in file))]
    except FileNotFoundError:
        raise ValueError(
            f"no {path.stem} team for {path.parent.name} ships with the repository: train one with "
            f"`python algorithms/mappo.py --env smac --task {path.parent.name} --save-snapshots` (see "
            f"{BEHAVIOUR}/README.md)"
        ) from None
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from None
    layers = [(torch.tensor(w).float(), torch.tensor(b).float()) for w, b in layers]
    last, recall = None, about.get("recall", 1)

    def play(t, obs, info, generator):
        nonlocal last
        avail = info["avail_actions"]  # (B, N, A)
        B, N, A = avail.shape
        last = torch.zeros(B, N, recall * A) if t == 0 else last  # the newest first
        x = torch.cat([obs, last, torch.eye(N).expand(B, N, N)], -1)
        for w, b in layers[:-1]:
            x = F.relu(x @ w + b)
        logits = (x @ layers[-1][0] + layers[-1][1]).masked_fill(~avail, -torch.inf)
        clocks = torch.empty_like(logits).exponential_(generator=generator)
        action = (logits - clocks.log()).argmax(-1)  # a draw from the policy
        last = torch.cat([F.one_hot(action, A).float(), last], -1)[..., : recall * A]
        return action

    return play, about


def _concatenate(parts):
    """Datasets of the same task, one after the other, padded to the longest episode of all."""
    longest, fields = max(part.mask.shape[1] for part in parts), {}
    for name in ("obs", "state", "avail_actions", "actions", "reward", "terminated", "mask"):
        tensors = [getattr(part, name) for part in parts]
        extra = [longest - part.mask.shape[1] for part in parts]
        fields[name] = torch.cat(
            [torch.cat([x, x.new_zeros(len(x), e, *x.shape[2:])], 1) for x, e in zip(tensors, extra)]
        )
    return Dataset(**fields, info={"won": sum((part.info["won"] for part in parts), [])})


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
        good = weights.shape == (max(sizes),) and min(sizes) == max(sizes) and weights.min() >= 0 and weights.sum() > 0
    except (ValueError, TypeError):
        good = False
    if not good:
        raise ValueError(f"dataset {name!r}: write one probability for each action, such as '[0.9, 0.1]'")
    return [weights.tolist()] * len(sizes)


def _bridge_optimal(episodes, limit, generator):
    """The two hand-made conventions of AlberDICE's *optimal* data as action sequences (E, limit, 2).

    "Left": both go left, agent 0 steps aside in one of three ways, agent 1 goes home, agent 0 crosses.
    "Right" is the same game turned by 180 degrees, with the roles exchanged.
    """
    stay, up, down, right, left = range(5)
    draw = torch.rand(episodes, 4, generator=generator)
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
    env: str = "bridge"  # the environment: bridge, matrix or smac
    task: str = ""  # its task: a map of smac; for matrix also a payoff table as JSON
    dataset: str = ""  # the behaviour, by default the task's last; for matrix also probabilities as JSON
    episodes: int = 0  # how many episodes; 0 for the default
    seed: int = 0  # of the behaviour
    out: Path = Path("dataset.h5")  # the HDF5 file to write


def main(args):
    dataset = collect_dataset(
        args.env, args.task, args.dataset or names(args.env, args.task)[-1], args.seed, args.episodes
    )
    write(dataset, args.out)
    print(f"{args.out}: {len(dataset.returns)} episodes, mean return {dataset.returns.mean():.4f}")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args, description=__doc__.splitlines()[0]))
    except KeyboardInterrupt:
        print("interrupted: no file was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
