"""Readers of datasets: our own file, and the forms in which other projects publish theirs."""

import math
import re
from pathlib import Path

import h5py
import numpy as np
import torch

import envs
from data.arrays import as_tensor
from data.dataset import Dataset, read_own, refuse_vast
from data.mamujoco import views
from envs.mamujoco import BODIES


def read(path, time_limit=None, task=""):
    """Read and check a dataset, in whichever of these forms its content is.

    - a file that `write` wrote;
    - CFCQL's HDF5 (see `read_cfcql`);
    - D4RL's HDF5 (see `read_d4rl`), Minari's HDF5 or the folder that holds its main_data.hdf5 (see `read_minari`);
    - OG-MARL's vault, or the folder around one (see `read_vault`);
    - AlberDICE's folder of .npy files (see `read_alberdice`).

    Args:
        time_limit: steps after which the game was cut off. CFCQL's files and OG-MARL's vaults mark such an end
            like any other; with the limit, episodes that last that long count as truncated. The other forms tell.
        task: D4RL's and Minari's data have one agent; this task of Ant says what each of ours sees of it ("full" if
            it is empty).
    Raises:
        ValueError: damaged, foreign or malformed content.
        OSError: no such file.
    """
    path = Path(path)
    if time_limit is not None and time_limit < 1:
        raise ValueError(f"a time limit is at least one step, not {time_limit}")
    if not path.exists():
        raise FileNotFoundError(f"no dataset file {path}")
    minari = [p for p in (path / "main_data.hdf5", path / "data" / "main_data.hdf5") if p.is_file()]
    if not path.is_dir() or minari:
        found = _read_hdf5(minari[0] if minari else path, time_limit, task)
    else:
        vault = _find_vault(path)
        found = read_vault(vault, time_limit) if vault else read_alberdice(path)
    return found.check(path)


def _read_hdf5(path, time_limit, task):
    try:
        with h5py.File(path, "r") as file:
            if "filled" in file and "mask" not in file:
                return read_cfcql(file, path, time_limit)
            if "observations" in file and "actions" in file:
                return read_d4rl(file, path, task)
            if any(re.fullmatch(r"episode_\d+", key) for key in file):
                return read_minari(file, path, task)
            return read_own(file, path)
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, cut off, or no HDF5 file ({error})") from None


def _padded(flat, lengths, after=None):
    """Steps laid end to end (M, ...) as episodes (E, T, ...) of these lengths (E,), zeros behind them.

    With what was seen after each episode's last step, `after` (E, ...), the result is (E, T + 1, ...).
    """
    where = torch.arange(int(lengths.max()) + (after is not None)) < lengths[:, None]
    tensor = flat.new_zeros(*where.shape, *flat.shape[1:])
    tensor[where] = flat[: int(lengths.sum())]
    if after is not None:
        tensor[torch.arange(len(lengths)), lengths] = after
    return tensor


def _clip(actions, info):
    """Continuous actions cut to [-1, 1], as MuJoCo's motors do; `info` is told if that changes any."""
    beyond = (actions.abs() > 1) & actions.isfinite()  # what is not finite stays, to be complained of
    if beyond.any():
        info["clipped"] = f"{100 * beyond.double().mean():.3g} % of the actions' entries, which lay outside [-1, 1]"
    return torch.where(beyond, actions.clamp(-1, 1), actions)


def read_alberdice(folder):
    """Read the folder of .npy files in which AlberDICE (github.com/dematsunaga/alberdice) ships its Bridge data.

    Its arrays are (episodes, time limit + 1, ...); `filled` is 1 up to and including the last observation, whose
    action is junk. It marks a time-out as terminated; here a game is terminated only if both agents stand on
    their goals, so that a value function may look beyond the time limit.
    """
    rank = {"obs": 4, "state": 3, "avail_actions": 4, "actions": 4, "reward": 3, "terminated": 3, "filled": 3}
    tensor = {}
    for name, dimensions in rank.items():
        try:
            array = np.load(Path(folder) / f"{name}.npy", allow_pickle=False)
        except FileNotFoundError:
            raise ValueError(f"{folder} is neither a vault nor AlberDICE's .npy files: it lacks {name}.npy") from None
        except (ValueError, EOFError, MemoryError) as error:
            raise ValueError(f"{folder}: {name}.npy is damaged ({error})") from None
        tensor[name] = as_tensor(array, name, folder)
        if array.ndim != dimensions or array.shape[:2] != tensor["obs"].shape[:2] or 0 in array.shape:
            raise ValueError(f"{folder}: {name}.npy has the shape {array.shape}, which does not fit the other arrays")
    state, filled = tensor["state"], tensor["filled"][..., 0]
    if state.shape[-1] != 8:
        raise ValueError(f"{folder}: the state has {state.shape[-1]} entries; only Bridge, with 8, is known here")
    mask = filled[:, 1:]
    longest = int(mask.sum(1).max())
    home = (state[..., [0, 1, 4, 5]] == state[..., [2, 3, 6, 7]]).all(-1)  # (E, T+1) both agents on their goals
    return Dataset(
        obs=tensor["obs"][:, : longest + 1],
        state=state[:, : longest + 1],
        avail_actions=tensor["avail_actions"][:, : longest + 1],
        actions=(tensor["actions"][:, :-1, :, 0] * mask[..., None])[:, :longest],
        reward=tensor["reward"][:, :longest, 0],
        terminated=(home[:, 1:] & mask & tensor["terminated"][:, :-1, 0])[:, :longest],
        mask=mask[:, :longest],
        info={"env": "bridge", "task": "", "name": Path(folder).name, "behaviour": "published with AlberDICE"},
    )


def read_cfcql(file, path, time_limit=None):
    """Read an open HDF5 file in the layout of CFCQL (github.com/thu-rllab/CFCQL), which is PyMARL's episode batch.

    Its arrays are (episodes, time limit + 1, ...); `filled` is 1 up to and including the last observation, whose
    action is junk. It marks a time-out as terminated, and keeps nothing that tells a time-out from a lost battle
    but the length. So an episode that lasts as long as the limit counts as truncated here, any shorter one as the
    file says. The rare battle that is decided in exactly the last step allowed is then taken for a time-out.

    Args:
        time_limit: by default the padded length, which is StarCraft's own limit in the published files.
    """
    rank = {"filled": 3, "terminated": 3, "reward": 3, "actions": 4, "avail_actions": 4, "state": 3, "obs": 4}
    missing = [name for name in rank if name not in file]
    if missing:
        raise ValueError(f"{path} is not one of CFCQL's datasets: it lacks {', '.join(missing)}")
    for name, dimensions in rank.items():
        shape = getattr(file[name], "shape", None) or ()
        single = name in ("filled", "terminated", "reward", "actions")
        if len(shape) != dimensions or shape[:2] != file["filled"].shape[:2] or single and shape[-1] != 1:
            raise ValueError(f"{path}: {name} has the shape {shape}, which does not fit CFCQL's layout")
    refuse_vast(sum(file[name].nbytes for name in rank), path)
    filled = as_tensor(file["filled"][()], "filled", path)[..., 0]  # (E, limit + 1)
    terminated = as_tensor(file["terminated"][()], "terminated", path)[..., 0]
    limit = time_limit or filled.shape[1] - 1
    if (filled[:, 1:] & ~filled[:, :-1]).any():
        raise ValueError(f"{path}: filled has a hole; each episode must be one run of steps")
    if (terminated[:, :-1] & ~filled[:, 1:]).any() or terminated[:, -1:].any():
        raise ValueError(f"{path}: an episode ends without an observation after its last step")
    rows = max(int(filled.sum(1).max()), 1) if filled.numel() else 1
    seen, mask = filled[:, :rows], filled[:, 1:rows]  # (E, T+1), (E, T)

    def padded(name, real):
        """One array up to the longest episode, with zeros where nothing is real."""
        tensor = as_tensor(file[name][:, : real.shape[1]], name, path)
        tensor[~real] = 0
        return tensor

    actions = padded("actions", mask)[..., 0]
    if not (actions == actions.long()).all():
        raise ValueError(f"{path}: actions must be whole numbers")
    steps = mask.sum(1, keepdim=True)  # (E, 1)
    timed_out = (torch.arange(rows - 1) == steps - 1) & (steps >= limit)  # (E, T) at the last step
    return Dataset(
        obs=padded("obs", seen),
        state=padded("state", seen),
        avail_actions=padded("avail_actions", seen),
        actions=actions.long(),
        reward=padded("reward", mask)[..., 0],
        terminated=terminated[:, : rows - 1] & ~timed_out,
        mask=mask,
        info={"name": path.stem, "behaviour": "published by CFCQL"},
    )


ANT_WIDTHS = (27, 105, 111)  # of Ant's observations: without contact forces, and with those of v5, of v2


def _only_ant(path, width, motors):
    """Raise ValueError unless observations and actions of these sizes are Ant's."""
    if width not in ANT_WIDTHS or motors != 8:
        states = {len(body.entries.split()) - body.hidden: name for name, body in BODIES.items()}
        whose = f"; {width} is the size of {states[width]}'s state" if width in states else ""
        raise ValueError(
            f"{path}: observations have {width} entries and actions {motors}, but ant has "
            f"{', '.join(map(str, ANT_WIDTHS[:-1]))} or {ANT_WIDTHS[-1]}, and 8, and of this format only ant's data "
            f"are read{whose}"
        )


def _ant_team(path, task, state, after, actions, rewards, terminated, lengths, info):
    """The `Dataset` of one agent's Ant episodes, laid end to end, with observations and motors dealt to our agents.

    Args:
        state: (M, 27).
        after: (E, 27) what was seen after each episode's last step.
        actions: (M, 8) in the order of Ant's motors.
        terminated: (E,) whether each episode ended by the ant's fall.
    """
    game = envs.make("ant", task)
    state = _padded(state, lengths, after)  # (E, T+1, 27)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (E, T)
    last = torch.arange(mask.shape[1]) == lengths[:, None] - 1
    return Dataset(
        obs=views(state, game),  # (E, T+1, N, O)
        state=state,
        avail_actions=None,
        actions=_padded(_clip(actions, info)[:, torch.as_tensor(game.motors)], lengths),  # (E, T, N, 2)
        reward=_padded(rewards, lengths),
        terminated=last & terminated[:, None],
        mask=mask,
        info={"env": "ant", "task": task or "full", "name": path.stem, **info},
    )


def read_d4rl(file, path, task=""):
    """Read an open HDF5 file in D4RL's layout (github.com/Farama-Foundation/D4RL), of Ant: one row for each step.

    An episode ends at a terminal, where the ant fell, or at a timeout; what follows the last end is dropped. Where the
    file has no next_observations, a copy of an episode's last observation stands in for the one after it.

    MuJoCo's v2, which D4RL used, paid 1 for being alive also in the step in which the ant falls. The references are
    D4RL's own.
    """
    rank = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "timeouts": 1}
    missing = [name for name in rank if name not in file]
    if missing:
        raise ValueError(f"{path} is not one of D4RL's datasets: it lacks {', '.join(missing)}")
    rank |= {"next_observations": 2} if "next_observations" in file else {}
    shapes = {name: getattr(file[name], "shape", None) or () for name in rank}
    for name, dimensions in rank.items():
        alike = name != "next_observations" or shapes[name] == shapes["observations"]
        if len(shapes[name]) != dimensions or shapes[name][0] != shapes["observations"][0] or not alike:
            raise ValueError(f"{path}: {name} has the shape {shapes[name]}, which does not fit D4RL's layout")
    _only_ant(path, shapes["observations"][1], shapes["actions"][1])
    refuse_vast(sum(file[name].nbytes for name in rank), path)
    flat = {}
    for name in rank:
        flat[name] = as_tensor(file[name][:, :27] if name.endswith("observations") else file[name][()], name, path)
    following = flat.get("next_observations", flat["observations"])
    last = (flat["terminals"] | flat["timeouts"]).nonzero()[:, 0]  # (E,) the last step of each episode
    if len(last) == 0:
        raise ValueError(f"{path}: no episode in it ever ends")
    return _ant_team(
        path,
        task,
        flat["observations"],
        following[last],
        flat["actions"],
        flat["rewards"],
        flat["terminals"][last],
        last.diff(prepend=last.new_tensor([-1])),
        {"behaviour": "published with D4RL", "references": {"random": -325.6, "expert": 3879.7}},
    )


def read_minari(file, path, task=""):
    """Read an open main_data.hdf5 of Minari (github.com/Farama-Foundation/Minari), of Ant: one group per episode.

    An episode whose last step has no termination was cut off. Minari's Ant-v5 charged for contacts; ours does not.
    """
    rank = {"observations": 2, "actions": 2, "rewards": 1, "terminations": 1, "truncations": 1}
    parts, after = {name: [] for name in rank}, []
    groups = [key for key in file if re.fullmatch(r"episode_\d+", key) and isinstance(file[key], h5py.Group)]
    groups.sort(key=lambda key: int(key[8:]))
    arrays = (file[group][name] for group in groups for name in rank if name in file[group])
    refuse_vast(sum(getattr(array, "nbytes", 0) for array in arrays), path)  # those that are groups have none
    for group in groups:
        missing = [name for name in rank if name not in file[group]]
        if missing:
            raise ValueError(f"{path} is not one of Minari's datasets: {group} lacks {', '.join(missing)}")
        arrays = {name: file[group][name] for name in rank}
        steps = (getattr(arrays["rewards"], "shape", None) or (0,))[0]
        for name, array in arrays.items():
            shape, rows = getattr(array, "shape", None) or (), steps + (name == "observations")
            if len(shape) != rank[name] or shape[0] != rows or steps == 0:
                raise ValueError(f"{path}: {name} of {group} has the shape {shape}, which does not fit Minari's layout")
        _only_ant(path, arrays["observations"].shape[1], arrays["actions"].shape[1])
        for name, array in arrays.items():
            tensor = as_tensor(array[:, :27] if name == "observations" else array[()], name, path)
            parts[name].append(tensor[:steps])
            if name == "observations":
                after.append(tensor[-1])
        ends = (parts["terminations"][-1] | parts["truncations"][-1])[:-1]
        if ends.any():
            raise ValueError(f"{path}: {group} goes on after its end")
    lengths = torch.tensor([len(part) for part in parts["rewards"]])
    terminated = torch.stack([part[-1] for part in parts["terminations"]])
    state, actions, rewards = (torch.cat(parts[name]) for name in ("observations", "actions", "rewards"))
    info = {"behaviour": "published with Minari"}
    found = _ant_team(path, task, state, torch.stack(after), actions, rewards, terminated, lengths, info)
    if path.stem == "main_data":  # all of Minari's files have this name; its folders tell which it is
        folders = path.resolve().parts[:-1]
        found.info["name"] = "/".join(folders[:-1][-2:] if folders[-1:] == ("data",) else folders[-2:])
    return found


def _find_vault(folder):
    """The vault that a folder is or holds, or None; ValueError if it holds several."""

    def marked(path):
        return (path / "metadata.json").is_file() or (path / "manifest.ocdbt").is_file()

    inside = [folder] if marked(folder) else sorted(filter(marked, folder.iterdir()))
    if len(inside) > 1:
        raise ValueError(f"{folder} holds several vaults: choose {', '.join(str(path) for path in inside)}")
    return inside[0] if inside else None


def read_vault(folder, time_limit=None):
    """Read a vault (flashbax's storage) in the layout of OG-MARL (github.com/instadeepai/og-marl).

    Its arrays are (1, M, ...), all M steps one after the other. An episode ends where every agent has a terminal or
    a truncation; what follows the last end is dropped. A vault keeps no observation after an episode's last step,
    so a copy of the one before it stands in. Nothing reads it where the game terminated; where it was cut off, a
    value function bootstraps from that copy, which is one step old: an approximation.

    Args:
        time_limit: episodes that last that long count as truncated. Without it, every end that is stored as a
            terminal is one, also the time-outs that OG-MARL's StarCraft and MuJoCo sets store as terminals. A vault
            with the sizes of 2-agent HalfCheetah, where nothing else ends a game, has 1,000 by default (to take these
            ends for terminals: `load(..., limit_terminates=True)`).
    """
    try:
        import tensorstore
    except ImportError:
        raise ValueError(f"{folder}: reading an OG-MARL vault needs tensorstore: pip install tensorstore") from None
    agent = {"terminals": 3, "truncations": 3, "rewards": 3, "actions": 3, "infos.legals": 4, "observations": 4}
    rank = {"vault_index": 1, **agent, "infos.state": 3}
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
    try:
        store, leaf = tensorstore.KvStore.open(base).result(), {}
        for name in rank:
            key = name if name == "vault_index" else f"{name}."
            if store.read(f"{key}/.zarray").result().state == "value":
                spec = {"driver": "zarr", "kvstore": {**base, "path": key}}
                leaf[name] = tensorstore.open(spec, read=True).result()
        missing = [name for name in rank if name not in leaf and name != "infos.legals"]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        agents = leaf["terminals"].shape[2:]
        for name, array in leaf.items():
            fits = len(array.shape) in (rank[name], 4 if name == "actions" else rank[name])
            if not fits or array.shape[0] != 1 or name in agent and array.shape[2:3] != agents:
                raise ValueError(f"{name} has the shape {array.shape}")
        steps = int(leaf["vault_index"].read().result()[0])
        row = sum(math.prod(array.shape[2:]) * array.dtype.numpy_dtype.itemsize for array in leaf.values())
        refuse_vast(steps * row, folder)

        def flat(name):
            """One leaf without the leading 1, (M, ...)."""
            return as_tensor(leaf[name][0, :steps].read().result(), name, folder)

        terminals, truncations = flat("terminals"), flat("truncations")  # (M, N)
        last = (terminals | truncations).all(1).nonzero()[:, 0]  # (E,) the last step of each episode
        if len(last) == 0:
            raise ValueError("no episode in it ever ends")
        steps = int(last[-1]) + 1
        lengths = last.diff(prepend=last.new_tensor([-1]))
        reward, actions = flat("rewards"), flat("actions")
        if ((reward - reward[:, :1]).abs() > 0).any():
            raise ValueError("the agents' rewards differ; a team shares one")
        info = {"name": folder.resolve().name, "behaviour": "OG-MARL vault"}
        obs, state = flat("observations"), flat("infos.state")
        if actions.is_floating_point():
            actions = _clip(actions, info)
        if (*obs.shape[1:], *state.shape[1:], *actions.shape[2:]) == (2, 13, 17, 3):
            info |= {"env": "halfcheetah", "task": "2x3"}
            time_limit = time_limit or 1000
        short = lengths < (time_limit or steps + 1)  # (E,)
        ended = terminals[:steps].all(1) & short.repeat_interleave(lengths)
        discrete = not actions.is_floating_point() and "infos.legals" in leaf
        legals = flat("infos.legals") if discrete else None
        return Dataset(
            obs=_padded(obs, lengths, obs[last]),
            state=_padded(state, lengths, state[last]),
            avail_actions=_padded(legals, lengths, legals[last]) if discrete else None,
            actions=_padded(actions, lengths),
            reward=_padded(reward[:, 0], lengths),
            terminated=_padded(ended, lengths),
            mask=torch.arange(int(lengths.max())) < lengths[:, None],  # (E, T)
            info=info,
        )
    except (ValueError, OSError, RuntimeError, KeyError, IndexError) as error:
        reason = str(error).split(" [source")[0].removeprefix(f"{folder}: ")
        raise ValueError(f"{folder} is damaged or no OG-MARL vault: {reason}") from None
