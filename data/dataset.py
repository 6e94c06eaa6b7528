"""The dataset: episodes of a team, padded to the longest, as tensors and as one HDF5 file."""

import hashlib
import io
import json
import uuid
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

FORMAT = 1  # written into each file; raise it when the meaning of a field changes


@dataclass
class Dataset:
    """E episodes of at most T steps, N agents, O observation entries, S state entries, A actions.

    Step t of an episode leads from `obs[:, t]` to `obs[:, t + 1]`, so the last observation is
    always there to bootstrap from. The last real step of an episode is `terminated` if the game
    ended by its own rules; otherwise it was cut off (a time limit), and its value goes on.

    The fields may be given as tensors, numpy arrays or lists of any kind of number. They become
    tensors of the kinds below, without a copy where that is possible. What lies behind the mask
    becomes zero, even if it is no number. `check` says whether the shapes and values make sense.

    Raises:
        ValueError: a field holds something that is not a number.
    """

    obs: torch.Tensor  # (E, T+1, N, O) float32
    state: torch.Tensor  # (E, T+1, S) float32
    avail_actions: torch.Tensor | None  # (E, T+1, N, A) bool, None where actions are continuous
    actions: torch.Tensor  # (E, T, N) int64, or (E, T, N, A) float32 in [-1, 1]
    reward: torch.Tensor  # (E, T) float32, of the team
    terminated: torch.Tensor  # (E, T) bool
    mask: torch.Tensor  # (E, T) bool: True where the step is real
    info: dict = field(default_factory=dict)  # env, task, name, seed, behaviour, references, ...

    def __post_init__(self):
        self.mask = as_tensor(self.mask, "mask")
        for name in TENSORS:
            if getattr(self, name) is not None:
                setattr(self, name, as_tensor(getattr(self, name), name, self.mask))
        self.info = plain(self.info)

    @classmethod
    def from_episodes(cls, episodes, team_reward="sum", num_actions=None, **info):
        """A dataset of episodes as one has recorded them, each of its own length.

        Args:
            episodes: a list of dictionaries of tensors, numpy arrays or lists, for T steps:
                obs            (T + 1, N, O), the one after the last step included
                actions        (T, N) whole numbers, or (T, N, A) in [-1, 1]
                reward         (T,) of the team, or (T, N) of the agents
                terminated     (T,), or one bool: the game ended by its own rules in its last step;
                               otherwise it was cut off there
                state          (T + 1, D), by default the views of all agents
                avail_actions  (T + 1, N, A), by default every action is available
            team_reward: "sum" or "mean" of rewards (T, N); `info` will say so.
            num_actions: A, where there are no avail_actions; by default the largest action + 1.
            info: what else to remember, such as env="bridge", task="", name="mine".
        Raises:
            ValueError: something is missing, or does not fit.
        """
        insist(team_reward in ("sum", "mean"), "team_reward must be sum or mean")
        parts = read_episodes(episodes)
        whole = {}
        for name in parts[0]:
            whole[name] = pad_sequence([part[name] for part in parts], batch_first=True)
        lengths = torch.tensor([len(part["actions"]) for part in parts])
        whole["mask"] = torch.arange(lengths.max()) < lengths[:, None]  # (E, T)
        whole.setdefault("state", whole["obs"].flatten(2))
        if "avail_actions" not in whole:
            whole["avail_actions"] = all_available(whole, num_actions)
        if whole["reward"].dim() == 3:
            whole["reward"] = getattr(whole["reward"], team_reward)(-1)
            info["team_reward"] = team_reward
        return cls(**whole, info=info).check()

    @classmethod
    def from_transitions(cls, arrays, ends, team_reward="sum", num_actions=None, **info):
        """A dataset of a replay buffer: M steps laid end to end, the oldest first.

        Without `next_obs` a copy of an episode's last observation stands in for the one after it.
        Nothing reads it where the game terminated; where it was cut off, a value function
        bootstraps from that copy, one step old.

        Args:
            arrays: a dictionary as in `from_episodes`, of arrays (M, ...): obs, actions, reward,
                terminated, and, if there are, state, avail_actions, next_obs, next_state and
                next_avail_actions.
            ends: (M,) where an episode ends, either way; what follows the last end was cut off.
            team_reward, num_actions, info: as in `from_episodes`.
        Raises:
            ValueError: something is missing, or does not fit, or the steps are not in order.
        """
        return cls.from_episodes(cut(arrays, ends), team_reward, num_actions, **info)

    @property
    def lengths(self):
        """Steps of each episode, (E,) int64."""
        return self.mask.sum(1)

    @property
    def returns(self):
        """Undiscounted team return of each episode, (E,) float32."""
        return (self.reward * self.mask).sum(1)

    @property
    def truncated(self):
        """Whether each episode was cut off rather than terminated, (E,) bool."""
        return ~(self.terminated & self.mask).any(1)

    @property
    def win_rate(self):
        """Share of the episodes that were won, or None where `info["won"]` does not say."""
        won = self.info.get("won")
        return None if won is None else sum(won) / len(won)

    @property
    def references(self):
        """Mean returns of a random and of an expert team, or None without `info["references"]`."""
        found = self.info.get("references")
        return found and (found["random"], found["expert"])

    def normalize(self, returns):
        """Returns with the random reference as 0 and the expert's as 1, or None without these."""
        if self.references is None:
            return None
        random, expert = self.references
        return (returns - random) / (expert - random)

    def to(self, device):
        """The same dataset with every tensor on `device`."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self):
        """{name: tensor} of the fields that there are."""
        everything = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in everything.items() if tensor is not None}

    def fingerprint(self):
        """A short word for all tensors, but not for `info`: equal data, equal word."""
        return fingerprint(self.tensors())

    def check(self):
        """Raise ValueError at the first thing that would make training go wrong, or return self."""
        check_shapes(self)
        check_values(self)
        return self


TENSORS = tuple(f.name for f in fields(Dataset) if f.name != "info")
OBSERVED = ("obs", "state", "avail_actions")  # of these there is one more than of steps


# ---------------------------------------------------------------- what makes sense
def insist(good, complaint):
    if not good:
        raise ValueError(complaint)


def check_shapes(dataset):
    """Raise ValueError unless all shapes fit that of obs."""
    obs, actions, avail = dataset.obs, dataset.actions, dataset.avail_actions
    discrete = actions.dtype == torch.int64
    insist(obs.dim() == 4, f"obs must have 4 dimensions, not the shape {tuple(obs.shape)}")
    insist(avail is not None or not discrete, "discrete actions need avail_actions")
    E, T, N = obs.shape[0], obs.shape[1] - 1, obs.shape[2]
    A = (avail if discrete else actions).shape[-1:]
    shapes = {
        "obs": obs.shape,
        "state": (E, T + 1, *dataset.state.shape[-1:]),
        "avail_actions": (E, T + 1, N, *A),
        "actions": (E, T, N) if discrete else (E, T, N, *A),
        "reward": (E, T),
        "terminated": (E, T),
        "mask": (E, T),
    }
    for name, tensor in dataset.tensors().items():
        found, wanted = tuple(tensor.shape), tuple(shapes[name])
        insist(found == wanted, f"{name} has the shape {found}, but obs calls for {wanted}")


def check_values(dataset):
    """Raise ValueError unless numbers are finite, actions legal, and episodes whole."""
    actions, avail, mask = dataset.actions, dataset.avail_actions, dataset.mask
    for name, tensor in dataset.tensors().items():
        insist(tensor.isfinite().all(), f"{name} holds NaN or infinite numbers")
    insist(mask[:, 0].all(), "an episode has no step")
    insist(not (mask[:, 1:] & ~mask[:, :-1]).any(), "the mask has a hole within an episode")
    goes_on = dataset.terminated[:, :-1] & mask[:, 1:]
    insist(not goes_on.any(), "an episode goes on after it terminated")
    if actions.dtype == torch.int64:
        A = avail.shape[-1]
        there = (actions >= 0) & (actions < A)
        insist(there.all(), f"actions must lie in 0 .. {A - 1}")
        legal = avail[:, :-1].gather(-1, actions[..., None])[..., 0]  # (E, T, N)
        insist(legal[mask].all(), "an action was taken that avail_actions forbids")
        insist(avail[seen(mask)].any(-1).all(), "an agent has no available action")
    else:
        insist((actions.abs() <= 1 + 1e-5).all(), "actions must lie in [-1, 1]")


# ---------------------------------------------------------------- conversions
# What holds 0 and 1, under our names and those of other formats.
FLAGS = ("mask", "filled", "avail_actions", "next_avail_actions")
FLAGS += ("terminated", "truncated", "ends")


def seen(mask):
    """Where there is an observation: mask (E, T) -> (E, T+1) bool."""
    return F.pad(mask, (1, 0), value=True)


def as_tensor(array, name, mask=None):
    """The tensor that the field `name` calls for: float32, bool, or, for actions, float32 or int64.

    Args:
        array: a tensor, a numpy array or nested lists. It is not changed, only copied if need be.
        mask: (E, T) bool; what lies behind it in (E, T, ...), or (E, T+1, ...), becomes 0.
    Raises:
        ValueError: it does not hold real numbers, or flags that are neither 0 nor 1.
    """
    if not torch.is_tensor(array):
        try:
            array = torch.from_numpy(np.require(np.asarray(array), requirements="CWO"))
        except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, texts, objects
            raise ValueError(f"{name} is no array of numbers ({error})") from None
    tensor = array.detach()
    if mask is not None and mask.dim() == 2:
        behind = ~(seen(mask) if name in OBSERVED else mask)
        if tensor.shape[:2] == behind.shape and tensor[behind].any():  # else `check` complains
            tensor = tensor.masked_fill(behind.view(*behind.shape, *[1] * (tensor.dim() - 2)), 0)
    if name in FLAGS:
        insist(((tensor == 0) | (tensor == 1)).all(), f"{name} must hold 0 and 1 only")
        return tensor.bool()
    if name == "actions" and not tensor.is_floating_point():
        return tensor.long()
    return tensor.float()


def plain(info):
    """The dictionary `info` with the numbers, arrays and tensors in it as Python's own."""
    return json.loads(json.dumps(dict(info), default=lambda value: value.tolist()))


def read_episodes(episodes):
    """Episodes as `Dataset.from_episodes` takes them, as dictionaries of tensors.

    Raises:
        ValueError: something is missing, or does not fit; the message says in which episode.
    """
    insist(episodes, "from_episodes takes a list of at least one episode")
    parts = []
    for e, episode in enumerate(episodes):
        try:
            parts.append(read_episode(episode))
        except ValueError as error:
            raise ValueError(f"episode {e}: {error}") from None
    return parts


def read_episode(given):
    """One episode as tensors: obs, actions, reward, terminated, and the others that it has."""
    needed = ("obs", "actions", "reward", "terminated")
    for name in needed:
        insist(name in given, f"it lacks {name}")
    for name in given:
        insist(name in (*needed, *OBSERVED), f"{name} is none of what an episode holds")
    part = {name: as_tensor(array, name).cpu() for name, array in given.items()}
    T, N = part["actions"].shape[:2]
    if part["terminated"].dim() == 0:  # it speaks of the last step
        part["terminated"] = (torch.arange(T) == T - 1) & part["terminated"]
    for name in OBSERVED:
        rows = len(part.get(name, range(T + 1)))
        remedy = "append the one after the last step, or, if it was not kept, the last again"
        insist(rows == T + 1, f"{name} has {rows} rows for {T} steps: {remedy}")
    for name, shapes in {"reward": [(T,), (T, 1), (T, N)], "terminated": [(T,)]}.items():
        shape = tuple(part[name].shape)
        insist(shape in shapes, f"{name} has the shape {shape} for {T} steps")
    return part


def all_available(whole, num_actions=None):
    """avail_actions (E, T+1, N, A), all True, for padded episodes; None for continuous actions."""
    actions = whole["actions"]
    if actions.is_floating_point():
        return None
    A = num_actions or int(actions.max()) + 1
    return torch.ones(*whole["obs"].shape[:3], A, dtype=torch.bool)


def cut(arrays, ends):
    """Cut M steps laid end to end, as `Dataset.from_transitions` takes them, into episodes.

    Raises:
        ValueError: lengths differ, or the steps are not in order.
    """
    ends = as_tensor(ends, "ends")
    arrays = {name: as_tensor(x, name) for name, x in arrays.items() if x is not None}
    for name, array in arrays.items():
        insist(len(array) == len(ends), f"{name} has {len(array)} rows, but ends {len(ends)}")
    after = {}  # what was seen after each step; a copy of what was seen before it may stand in
    for name in OBSERVED:
        if f"next_{name}" in arrays:
            after[name] = arrays.pop(f"next_{name}")
            check_in_order(name, arrays[name], after[name], ends)
        elif name in arrays:
            after[name] = arrays[name]
    episodes, start = [], 0
    for stop in [*(ends[:-1].nonzero()[:, 0] + 1).tolist(), len(ends)]:
        episode = {name: array[start:stop] for name, array in arrays.items()}
        for name, array in after.items():
            episode[name] = torch.cat([episode[name], array[stop - 1 : stop]])
        episodes.append(episode)
        start = stop
    return episodes


def check_in_order(name, now, after, ends):
    """Raise ValueError unless what followed each step is what was seen in the next one."""
    same = after[:-1].double().isclose(now[1:].double(), 1e-3, 1e-3).flatten(1).all(1)
    unlike = (~same & ~ends[:-1]).nonzero()[:, 0]
    if len(unlike):
        m = int(unlike[0])
        remedy = "lay the steps of one game after another, and mark each end"
        raise ValueError(f"next_{name} of step {m} is not {name} of step {m + 1}: {remedy}")


def fingerprint(tensors):
    """A short word for the content of {name: tensor}: equal content, equal word, on any device."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().flatten()
        found.update(content.view(torch.uint8).numpy())
    return found.hexdigest()[:16]


# ---------------------------------------------------------------- files
def save(path, content, new=False):
    """Write bytes whole or not at all, so that a kill leaves the old file or the new one.

    Raises:
        FileExistsError: the file must be `new`, and is there already.
    """
    if new:
        path.touch(exist_ok=False)  # of two runs that want one folder, one gets it
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write(dataset, path):
    """Write one HDF5 file, whole or not at all: the fields as arrays, `info` as attributes.

    Raises:
        ValueError: the dataset is not well formed.
        OSError: the folder cannot be written, or the disk is full.
    """
    path, content = Path(path), io.BytesIO()
    dataset.check()
    # In memory first: where the disk is full, h5py leaves half a file, and may crash Python.
    with h5py.File(content, "w") as file:
        for name, tensor in dataset.tensors().items():
            options = dict(compression="gzip", compression_opts=1, shuffle=True)
            file.create_dataset(name, data=tensor.cpu().numpy(), **options)
        for key, value in {**plain(dataset.info), "format": FORMAT}.items():
            file.attrs[key] = json.dumps(value)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, content.getbuffer())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


def read_own(file):
    """The dataset in an open HDF5 file that `write` wrote, unchecked."""
    info = {key: json.loads(value) for key, value in file.attrs.items()}
    if info.get("format") != FORMAT:
        raise ValueError(f"it has format {info.get('format')}, this code reads {FORMAT}")
    arrays = {name: file[name][()] for name in TENSORS if name in file}
    return Dataset(**{"avail_actions": None} | arrays, info=info)
