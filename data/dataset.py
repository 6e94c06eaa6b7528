"""The dataset: episodes of a team, padded to the longest, as tensors on one device and as one HDF5 file."""

import copy
import io
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import h5py
import torch
from torch.nn.utils.rnn import pad_sequence

from data.arrays import OBSERVED, as_tensor, cut, fingerprint, plain, read_episode, seen
from data.results import save

FORMAT = 1  # written into each file; raise it when the meaning of a field changes


@dataclass
class Dataset:
    """E episodes of at most T steps, N agents, O observation entries, S state entries, A actions.

    Step t of an episode leads from `obs[:, t]` to `obs[:, t + 1]`, so the last observation is always there to
    bootstrap from. The last real step of an episode is `terminated` if the game ended by its own rules;
    otherwise it was cut off (a time limit), and its value goes on.

    The fields may be given as tensors, numpy arrays or lists of any kind of number. They become tensors of the kinds
    below, without a copy where that is possible, and what lies behind the mask becomes zero, even if it is no number.
    `check` says whether the shapes and values make sense.

    Raises:
        ValueError: a field holds something that is not a number, or `info` something that JSON cannot hold.
    """

    obs: torch.Tensor  # (E, T+1, N, O) float32
    state: torch.Tensor  # (E, T+1, S) float32
    avail_actions: torch.Tensor | None  # (E, T+1, N, A) bool, None where actions are continuous
    actions: torch.Tensor  # (E, T, N) int64, or (E, T, N, A) float32 in [-1, 1]
    reward: torch.Tensor  # (E, T) float32, of the team
    terminated: torch.Tensor  # (E, T) bool
    mask: torch.Tensor  # (E, T) bool: True where the step is real
    info: dict = field(default_factory=dict)  # env, task, name, seed, behaviour, versions, references, ...

    def __post_init__(self):
        self.mask = as_tensor(self.mask, "mask")
        for name in TENSORS:
            if getattr(self, name) is not None or name != "avail_actions":
                setattr(self, name, as_tensor(getattr(self, name), name, mask=self.mask))
        self.info = plain(self.info)

    @classmethod
    def from_episodes(cls, episodes, team_reward="sum", num_actions=None, time_limit=None, **info):
        """A dataset of episodes as one has recorded them, each of its own length.

        Args:
            episodes: a list of dictionaries of tensors, numpy arrays or lists, for an episode of T steps:
                obs            (T + 1, N, O), the one after the last step included
                actions        (T, N) whole numbers, or (T, N, A) in [-1, 1]
                reward         (T,) of the team, or (T, N) of the agents
                terminated     (T,), or one bool: whether the game ended by its own rules in its last step
                truncated      (T,), or one bool: whether it was cut off there. An episode that has neither end was.
                dones          (T,), in place of both, if the ends are not told apart: see `time_limit`
                state          (T + 1, D), by default the views of all agents
                avail_actions  (T + 1, N, A), by default every action is available
            team_reward: "sum" or "mean" of rewards (T, N); `info` will say so.
            num_actions: A, where there are no avail_actions; by default the largest action + 1.
            time_limit: steps after which an episode that is done was cut off; `math.inf` if there is no limit.
            info: what else to remember, such as env="bridge", task="", name="mine".
        Raises:
            ValueError: something is missing, or does not fit.
        """
        if team_reward not in ("sum", "mean"):
            raise ValueError(f"team_reward must be sum or mean, not {team_reward!r}")
        if not isinstance(episodes, list | tuple) or not episodes:
            raise ValueError("from_episodes takes a list of at least one episode, each a dictionary of arrays")
        parts = [read_episode(episode, f"episode {e}", time_limit) for e, episode in enumerate(episodes)]
        first = parts[0]
        for e, part in enumerate(parts):
            for name in {**first, **part}:
                found, wanted = (_kind(x[name][0]) if name in x else "none" for x in (part, first))
                if found != wanted:
                    raise ValueError(f"episode {e}: {name} of a step is {found}, but of episode 0 {wanted}")
        padded = {name: pad_sequence([part[name] for part in parts], batch_first=True) for name in first}
        obs, actions, reward, avail = (padded.get(name) for name in ("obs", "actions", "reward", "avail_actions"))
        if avail is None and not actions.is_floating_point():
            A = num_actions or int(actions.max()) + 1
            if A > 10_000:
                raise ValueError(f"the largest action is {A - 1}: if there are so many, give avail_actions")
            avail = torch.ones(*obs.shape[:3], max(A, 1), dtype=torch.bool)  # (E, T+1, N, A)
        if reward.dim() == 3:
            reward, info = getattr(reward, team_reward)(-1), info | {"team_reward": team_reward}
        lengths = torch.tensor([len(part["actions"]) for part in parts])
        mask = torch.arange(actions.shape[1]) < lengths[:, None]  # (E, T)
        state = padded.get("state", obs.flatten(2))
        return cls(obs, state, avail, actions, reward, padded["terminated"], mask, info).check("from_episodes")

    @classmethod
    def from_transitions(cls, arrays, ends, team_reward="sum", num_actions=None, time_limit=None, **info):
        """A dataset of a replay buffer: M steps laid end to end, the oldest first.

        Without `next_obs` a copy of an episode's last observation stands in for the one after it. Nothing reads it
        where the game terminated; where it was cut off, a value function bootstraps from that copy, one step old.

        Args:
            arrays: a dictionary as in `from_episodes`, of arrays (M, ...): obs, actions, reward, terminated, and, if
                there are, state and avail_actions, next_obs, next_state and next_avail_actions.
            ends: (M,) where an episode ends, either way; what follows the last end was cut off.
            team_reward, num_actions, info: as in `from_episodes`.
            time_limit: in place of `terminated`, steps after which an episode that ends was cut off.
        Raises:
            ValueError: something is missing, or does not fit, or the steps are not in order.
        """
        return cls.from_episodes(cut(arrays, ends), team_reward, num_actions, time_limit, **info)

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
        """Share of the episodes that were won, or None where `info["won"]` (a list of 0 and 1) does not say."""
        won = self.info.get("won")
        return None if won is None else sum(won) / len(won)

    @property
    def references(self):
        """Mean returns of a random and of an expert team, two floats, or None where `info["references"]` is missing."""
        found = self.info.get("references")
        return None if found is None else (float(found["random"]), float(found["expert"]))

    def normalize(self, returns):
        """Returns (a number, an array or a tensor) with the random reference as 0 and the expert's as 1, or None."""
        if self.references is None:
            return None
        random, expert = self.references
        return (returns - random) / (expert - random)

    def joint_actions(self):
        """How often each joint action of two agents was recorded, (A, A), as shares that sum to 1."""
        A = self.avail_actions.shape[-1]
        pairs = self.actions[self.mask].T  # (2, M)
        return torch.bincount(pairs[0] * A + pairs[1], minlength=A * A).view(A, A) / pairs.shape[1]

    def flatten(self, dtype=torch.float32):
        """Lay the episodes end to end, without padding: R observations (rows), of which M have an action.

        Returns a dictionary; the observation after step m is row `row[m] + 1`.
            obs (R, N, O), state (R, S), avail_actions (R, N, A) or None;
            row (M,), actions (M, N) or (M, N, A), reward (M,), done (M,): 0 where a time limit cut the episode off.
        """
        there, acted = seen(self.mask), torch.nn.functional.pad(self.mask, (0, 1))  # (E, T+1)
        return {
            "obs": self.obs[there].to(dtype),
            "state": self.state[there].to(dtype),
            "avail_actions": None if self.avail_actions is None else self.avail_actions[there],
            "row": acted[there].nonzero()[:, 0],
            "actions": self.actions[self.mask],
            "reward": self.reward[self.mask].to(dtype),
            "done": self.terminated[self.mask].to(dtype),
        }

    def to(self, device):
        """The same dataset with every tensor on `device`."""
        moved = copy.copy(self)
        for name in TENSORS:
            if getattr(self, name) is not None:
                setattr(moved, name, getattr(self, name).to(device))
        return moved

    def fingerprint(self):
        """A short word for all tensors, but not for `info`: equal data, equal word, on any device."""
        return fingerprint({name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None})

    def check(self, source="dataset"):
        """Raise ValueError, with `source` in front, at the first thing that would make training go wrong."""

        def insist(good, complaint):
            if not good:
                raise ValueError(f"{source}: {complaint}")

        def everywhere(name, good, complaint):
            """Insist on `good` (E, T, ...) or (E, T + 1, ...) everywhere, and say so where only padding is not."""
            if not good.all():
                real = good[seen(self.mask) if name in OBSERVED else self.mask]
                insist(False, complaint + " behind the mask" * bool(real.all()))

        flags = torch.bool
        discrete = self.actions.dtype == torch.int64
        rank = {
            "obs": 4,
            "state": 3,
            "avail_actions": 4,
            "actions": 3 if discrete else 4,
            "reward": 2,
            "terminated": 2,
            "mask": 2,
        }
        kind = {
            "avail_actions": flags,
            "terminated": flags,
            "mask": flags,
            "actions": torch.int64 if discrete else torch.float32,
        }
        for name, dimensions in rank.items():
            tensor = getattr(self, name)
            if tensor is None and name == "avail_actions":
                insist(not discrete, "discrete actions need avail_actions (E, T + 1, N, A)")
                continue
            insist(
                tensor.dim() == dimensions, f"{name} must have {dimensions} dimensions, not the shape {_shape(tensor)}"
            )
            wanted = kind.get(name, torch.float32)
            insist(tensor.dtype == wanted, f"{name} must be {wanted}, not {tensor.dtype}")
        E, T, N = self.obs.shape[0], self.obs.shape[1] - 1, self.obs.shape[2]
        insist(E > 0 and T > 0 and self.mask.any(), "it holds no step; an empty dataset teaches nothing")
        A = self.avail_actions.shape[-1] if discrete else self.actions.shape[-1]
        shapes = {"state": (E, T + 1, self.state.shape[-1]), "actions": (E, T, N) if discrete else (E, T, N, A)}
        shapes |= {"reward": (E, T), "terminated": (E, T), "mask": (E, T)}
        if self.avail_actions is not None:
            shapes["avail_actions"] = (E, T + 1, N, A)
        for name, shape in shapes.items():
            found = getattr(self, name)
            insist(_shape(found) == shape, f"{name} has shape {_shape(found)}, but obs calls for {shape}")
        for name, size in zip(("agents", "entries in obs", "entries in state", "actions"),
                              (N, self.obs.shape[3], self.state.shape[2], A)):  # fmt: skip
            insist(size, f"it has no {name}")
        for name in ("obs", "state", "reward") + (() if discrete else ("actions",)):
            everywhere(name, getattr(self, name).isfinite(), f"{name} holds NaN or infinite numbers")
        insist(self.mask[:, 0].all(), "an episode has no step")
        insist(
            not (self.mask[:, 1:] & ~self.mask[:, :-1]).any(),
            "the mask has a hole; each episode must be one run of steps",
        )
        insist(not (self.terminated[:, :-1] & self.mask[:, 1:]).any(), "an episode goes on after it terminated")
        if discrete:
            there = (self.actions >= 0) & (self.actions < A)
            everywhere("actions", there, f"actions must lie in 0 .. {A - 1}; found {_extremes(self.actions)}")
            legal = self.avail_actions[:, :-1].gather(-1, self.actions[..., None])[..., 0] | ~self.mask[..., None]
            insist(legal.all(), "an action was taken that avail_actions forbids")
            insist(self.avail_actions[seen(self.mask)].any(-1).all(), "an agent has no available action")
        else:
            within = self.actions.abs() <= 1 + 1e-5
            everywhere("actions", within, f"actions must lie in [-1, 1]; found {_extremes(self.actions)}")
        won = self.info.get("won")
        good = won is None or isinstance(won, list) and len(won) == E and all(w in (0, 1) for w in won)
        insist(good, "info 'won' must hold one 0 or 1 for each episode")
        try:
            good = self.references is None or 0 < abs(self.references[1] - self.references[0]) < float("inf")
        except (KeyError, TypeError, ValueError):
            good = False
        insist(good, "info 'references' must hold two finite numbers that differ, 'random' and 'expert'")
        return self


TENSORS = tuple(f.name for f in fields(Dataset) if f.name != "info")


def write(dataset, path):
    """Write one HDF5 file, whole or not at all: the fields of `Dataset` as arrays, `info` as attributes.

    Raises:
        ValueError: the dataset is not well formed.
        OSError: the folder cannot be written, or the disk is full.
    """
    path, content = Path(path), io.BytesIO()
    dataset.check()
    # In memory first: where the disk is full, h5py leaves half a file, and may crash Python as it exits.
    with h5py.File(content, "w") as file:
        for name in TENSORS:
            if getattr(dataset, name) is not None:
                array = getattr(dataset, name).cpu().numpy()
                file.create_dataset(name, data=array, compression="gzip", compression_opts=1, shuffle=True)
        for key, value in {**plain(dataset.info), "format": FORMAT}.items():
            file.attrs[key] = json.dumps(value)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, content.getbuffer())
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


def read_own(file, path):
    """Read an open HDF5 file that `write` wrote, unchecked."""
    missing = [n for n in TENSORS if n not in file and n != "avail_actions"]
    if missing:
        raise ValueError(f"{path} is not one of our datasets: it lacks {', '.join(missing)}")
    found = [name for name in TENSORS if name in file]
    if not all(isinstance(file[name], h5py.Dataset) for name in found):
        raise ValueError(f"{path} is not one of our datasets: it holds groups in place of arrays")
    try:
        info = {key: json.loads(value) for key, value in file.attrs.items()}
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is not one of our datasets: its attributes are not JSON") from None
    if info.get("format") != FORMAT:
        raise ValueError(f"{path} has format {info.get('format')}, this code reads {FORMAT}: collect it again")
    refuse_vast(sum(file[name].nbytes for name in found), path)
    mask = as_tensor(file["mask"][()], "mask", path)
    tensors = {name: as_tensor(file[name][()], name, path, mask) if name in file else None for name in TENSORS}
    return Dataset(**tensors, info=info)


def refuse_vast(declared, path):
    """Raise ValueError if a file declares more bytes than this machine has memory, whether it holds them or not."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else float("inf")
    if declared > memory:
        size, has = (f"{number / 1e9:,.0f} GB" for number in (declared, memory))
        raise ValueError(f"{path} declares arrays of {size}, more than this machine's memory of {has}: is it damaged?")


def _kind(tensor):
    return f"{_shape(tensor)} {str(tensor.dtype).removeprefix('torch.')}"


def _shape(tensor):
    return tuple(tensor.shape)


def _extremes(tensor):
    return f"{tensor.min():g} .. {tensor.max():g}"
