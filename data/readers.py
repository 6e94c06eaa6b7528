"""Readers of datasets: our own file, and the forms in which other projects publish theirs."""

from pathlib import Path

import h5py
import numpy as np
import torch

import envs
from data.dataset import Dataset, as_tensor, read_own


def read(path, time_limit=None, task=""):
    """Read and check a dataset, in whichever of these forms its content is.

    - a file that `write` wrote;
    - CFCQL's HDF5 (see `read_cfcql`);
    - D4RL's HDF5 (see `read_d4rl`), Minari's HDF5 or the folder around it (see `read_minari`);
    - OG-MARL's vault (see `read_vault`);
    - AlberDICE's folder of .npy files (see `read_alberdice`).

    Args:
        time_limit: steps after which the game was cut off. CFCQL's files and OG-MARL's vaults mark
            such an end like any other; with the limit, episodes that last that long count as
            truncated. The other forms tell.
        task: D4RL's and Minari's data have one agent; this task of Ant says what each of ours sees
            of it ("full" if it is empty).
    Raises:
        ValueError: damaged, foreign or malformed content.
        OSError: no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no dataset file {path}")
    try:
        return read_any(path, time_limit, task).check()
    except (ValueError, OSError, RuntimeError, LookupError, TypeError, MemoryError) as error:
        reason = str(error).split("\n")[0].split(" [source")[0]
        raise ValueError(f"{path} cannot be read, or is damaged: {reason}") from None


def read_any(path, time_limit, task):
    for file in (path, path / "data" / "main_data.hdf5"):
        if file.is_file():
            with h5py.File(file, "r") as content:
                return read_hdf5(content, file, time_limit, task)
    if (path / "metadata.json").exists():
        return read_vault(path, time_limit)
    return read_alberdice(path)


def read_hdf5(file, path, time_limit, task):
    if "filled" in file and "mask" not in file:
        return read_cfcql(file, path, time_limit)
    if "observations" in file:
        return read_d4rl(file, path, task)
    if "episode_0" in file:
        return read_minari(file, path, task)
    return read_own(file)


# ---------------------------------------------------------------- padded episodes
BATCH = ("obs", "state", "avail_actions", "actions", "reward", "terminated", "filled")


def read_alberdice(folder):
    """Read the folder of .npy files in which AlberDICE ships its Bridge data.

    (github.com/dematsunaga/alberdice) Its arrays are (episodes, time limit + 1, ...); `filled` is
    1 up to and including the last observation, whose action is junk. It marks a time-out as
    terminated; here a game is terminated only if both agents stand on their goals, so that a
    value function may look beyond the time limit.
    """
    arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in BATCH}
    state = torch.from_numpy(arrays["state"])
    home = (state[..., [0, 1, 4, 5]] == state[..., [2, 3, 6, 7]]).all(-1)  # (E, T+1) on both goals
    arrays["terminated"] *= np.pad(home[:, 1:, None], ((0, 0), (0, 1), (0, 0)))
    info = {"env": "bridge", "task": "", "name": folder.name}
    return from_padded(arrays, info | {"behaviour": "published with AlberDICE"})


def read_cfcql(file, path, time_limit=None):
    """Read an open HDF5 file in the layout of CFCQL, which is PyMARL's episode batch.

    (github.com/thu-rllab/CFCQL) Its arrays are (episodes, time limit + 1, ...); `filled` is 1 up
    to and including the last observation, whose action is junk. It marks a time-out as
    terminated, and keeps nothing that tells a time-out from a lost battle but the length. So an
    episode that lasts as long as the limit counts as truncated here, any shorter one as the file
    says. The rare battle that is decided in exactly the last step allowed is then taken for a
    time-out.

    Args:
        time_limit: by default the padded length, StarCraft's own limit in the published files.
    """
    arrays = {name: file[name][()] for name in BATCH}
    rows = arrays["filled"].sum(1)  # (E, 1) one more than steps
    limit = time_limit or arrays["filled"].shape[1] - 1
    arrays["terminated"][rows[:, 0] - 1 >= limit] = 0
    return from_padded(arrays, {"name": path.stem, "behaviour": "published by CFCQL"})


def from_padded(arrays, info):
    """The `Dataset` of PyMARL's episode batch: numpy arrays (E, limit + 1, ...)."""
    filled = as_tensor(arrays["filled"], "filled")[..., 0]  # (E, limit + 1)
    T = int(filled.sum(1).max()) - 1
    return Dataset(
        obs=arrays["obs"][:, : T + 1],
        state=arrays["state"][:, : T + 1],
        avail_actions=arrays["avail_actions"][:, : T + 1],
        actions=arrays["actions"][:, :T, :, 0].astype(np.int64),
        reward=arrays["reward"][:, :T, 0],
        terminated=arrays["terminated"][:, :T, 0],
        mask=filled[:, 1 : T + 1],
        info=info,
    )


# ---------------------------------------------------------------- one agent's ant
def read_d4rl(file, path, task=""):
    """Read an open HDF5 file in D4RL's layout, of Ant: one row for each step.

    (github.com/Farama-Foundation/D4RL) An episode ends at a terminal, where the ant fell, or at a
    timeout; what follows the last end is dropped.

    MuJoCo's v2, which D4RL used, paid 1 for being alive also in the step in which the ant falls.
    The references are D4RL's own.
    """
    state, actions, rewards = (file[name][()] for name in ("observations", "actions", "rewards"))
    following = file["next_observations"][()]
    terminals = file["terminals"][()].astype(bool)
    ends = terminals | file["timeouts"][()].astype(bool)  # (M,)
    episodes, start = [], 0
    for stop in (np.flatnonzero(ends) + 1).tolist():
        seen = np.concatenate([state[start:stop], following[stop - 1 : stop]])  # (T+1, 27)
        steps = slice(start, stop)
        episodes.append((seen, actions[steps], rewards[steps], terminals[steps]))
        start = stop
    info = {"name": path.stem, "behaviour": "published with D4RL"}
    info["references"] = {"random": -325.6, "expert": 3879.7}
    return ant_team(episodes, task, info)


def read_minari(file, path, task=""):
    """Read an open main_data.hdf5 of Minari, of Ant: one group for each episode.

    (github.com/Farama-Foundation/Minari) An episode whose last step has no termination was cut off.
    Minari's Ant-v5 charged for contacts; ours does not.
    """
    episodes = []
    for k in range(len(file)):
        names = ("observations", "actions", "rewards", "terminations")
        episodes.append(tuple(file[f"episode_{k}"][name][()] for name in names))
    name = "/".join(path.resolve().parts[-4:-2])  # ant/medium-v0/data/main_data.hdf5
    return ant_team(episodes, task, {"name": name, "behaviour": "published with Minari"})


ANT_WIDTHS = (27, 105, 111)  # of Ant's observations: without contact forces, and those of v5, of v2


def ant_team(episodes, task, info):
    """The `Dataset` of one agent's Ant, with observations and motors dealt to our agents.

    Actions are cut to [-1, 1], as MuJoCo's motors do.

    Args:
        episodes: a list of (observations (T+1, D), actions (T, 8) in the order of Ant's motors,
            rewards (T,), terminated (T,)).
    """
    game = envs.make("ant", task)
    motors = torch.as_tensor(game.motors)  # (N, 2)
    dealt = []
    for observations, actions, rewards, terminated in episodes:
        widths = observations.shape[1], actions.shape[1]
        if widths[0] not in ANT_WIDTHS or widths[1] != 8:
            raise ValueError(f"(observations, actions) are {widths}: only Ant is read")
        state = as_tensor(observations[:, :27], "state")
        steps = {"reward": rewards, "terminated": terminated}
        steps["actions"] = as_tensor(actions, "actions")[:, motors].clamp(-1, 1)  # (T, N, 2)
        dealt.append({"obs": views(state, game), "state": state, **steps})
    return Dataset.from_episodes(dealt, env="ant", task=task or "full", **info)


# ---------------------------------------------------------------- OG-MARL
def read_vault(folder, time_limit=None):
    """Read a vault (flashbax's storage) in the layout of OG-MARL.

    (github.com/instadeepai/og-marl) Its arrays are (1, M, ...), all M steps one after the other.
    An episode ends where every agent has a terminal or a truncation; what follows the last end is
    dropped. A vault keeps no observation after an episode's last step, so a copy of the one
    before it stands in (see `Dataset.from_transitions`). Continuous actions are cut to [-1, 1].

    Args:
        time_limit: episodes that last that long count as truncated. Without it, every end that is
            stored as a terminal is one, also the time-outs that OG-MARL's sets store as
            terminals (to take these for terminals: `load(..., limit_terminates=True)`).
    """
    leaf = open_vault(folder)
    terminals = as_tensor(leaf("terminals"), "terminated").bool()  # (M, N)
    truncations = as_tensor(leaf("truncations"), "truncated").bool()
    ends = (terminals | truncations).all(1)  # (M,)
    if not ends.any():
        raise ValueError("no episode in it ever ends")
    M = int(ends.nonzero()[-1]) + 1
    rewards, actions = leaf("rewards")[:M], as_tensor(leaf("actions")[:M], "actions")
    if (rewards != rewards[:, :1]).any():
        raise ValueError("the agents' rewards differ; a team shares one")
    arrays = {"obs": leaf("observations")[:M], "state": leaf("infos.state")[:M]}
    if actions.is_floating_point():
        actions = actions.clamp(-1, 1)
    else:
        arrays["avail_actions"] = leaf("infos.legals")[:M]
    arrays |= {"actions": actions, "reward": rewards[:, 0], "terminated": terminals.all(1)[:M]}
    name = folder.resolve().name
    found = Dataset.from_transitions(arrays, ends[:M], name=name, behaviour="OG-MARL vault")
    if time_limit:
        found.terminated[found.lengths >= time_limit] = False
    return found


def open_vault(folder):
    """A function from a leaf's name to its array (M, ...)."""
    try:
        import tensorstore
    except ImportError:
        raise ValueError("reading an OG-MARL vault needs: pip install tensorstore") from None
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}

    def opened(name):
        spec = {"driver": "zarr", "kvstore": {**base, "path": name}}
        return tensorstore.open(spec, read=True).result()

    steps = int(opened("vault_index").read().result()[0])
    return lambda name: opened(f"{name}.")[0, :steps].read().result()


# ---------------------------------------------------------------- whose order
def views(state, game):
    """What each agent of a body sees in states (..., D): (..., N, O); 0 for what none holds."""
    hidden = torch.zeros_like(state[..., : game.hidden])
    entries = torch.cat([hidden, state, torch.zeros_like(state[..., :1])], -1)
    return entries[..., torch.as_tensor(game.columns)]


def check_order(dataset, game, source):
    """Raise ValueError unless what the agents of a body saw is what the state says, in our order.

    All that they see but x is in the state, so some 10,000 of the recorded observations can tell.
    """
    steps = dataset.mask.nonzero()
    some = tuple(steps[:: len(steps) // 10_000 + 1].T)
    seen, state = dataset.obs[some], dataset.state[some]  # (M, N, O), (M, D)
    known = torch.as_tensor(game.columns) >= game.hidden  # (N, O)
    unlike = (~seen.isclose(views(state, game), 1e-3, 1e-3)).double().mean(0) * known
    if unlike.max() > 0.01:
        remedy = "MaMuJoCo's data are for MaMuJoCo (see data/README.md)"
        order = f"not in the order of {game.body} here"
        raise ValueError(f"{source}: its observations are {order}; {remedy}")
