"""The dataset: episodes of a team, padded to the longest, as tensors on one device and as one HDF5 file."""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import h5py
import numpy as np
import torch

FORMAT = 1  # written into each file; raise it when the meaning of a field changes


@dataclass
class Dataset:
    """E episodes of at most T steps, N agents, O observation entries, S state entries, A actions.

    Step t of an episode leads from `obs[:, t]` to `obs[:, t + 1]`, so the last observation is always there to
    bootstrap from. The last real step of an episode is `terminated` if the game ended by its own rules;
    otherwise it was cut off (a time limit), and its value goes on. What lies behind the mask is zero.
    """

    obs: torch.Tensor  # (E, T+1, N, O) float32
    state: torch.Tensor  # (E, T+1, S) float32
    avail_actions: torch.Tensor | None  # (E, T+1, N, A) bool, None where actions are continuous
    actions: torch.Tensor  # (E, T, N) int64, or (E, T, N, A) float32 in [-1, 1]
    reward: torch.Tensor  # (E, T) float32, of the team
    terminated: torch.Tensor  # (E, T) bool
    mask: torch.Tensor  # (E, T) bool: True where the step is real
    info: dict = field(default_factory=dict)  # env, task, name, seed, behaviour, versions, references, ...

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
        no = torch.zeros_like(self.mask[:, :1])
        seen, acted = torch.cat([~no, self.mask], 1), torch.cat([self.mask, no], 1)  # (E, T+1)
        return {
            "obs": self.obs[seen].to(dtype),
            "state": self.state[seen].to(dtype),
            "avail_actions": None if self.avail_actions is None else self.avail_actions[seen],
            "row": acted[seen].nonzero()[:, 0],
            "actions": self.actions[self.mask],
            "reward": self.reward[self.mask].to(dtype),
            "done": self.terminated[self.mask].to(dtype),
        }

    def to(self, device):
        """The same dataset with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Dataset(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in moved.items()})

    def check(self, source="dataset"):
        """Raise ValueError, with `source` in front, at the first thing that would make training go wrong."""

        def insist(good, complaint):
            if not good:
                raise ValueError(f"{source}: {complaint}")

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
        for name in ("obs", "state", "reward") + (() if discrete else ("actions",)):
            insist(getattr(self, name).isfinite().all(), f"{name} holds NaN or infinite numbers")
        insist(self.mask[:, 0].all(), "an episode has no step")
        insist(
            not (self.mask[:, 1:] & ~self.mask[:, :-1]).any(),
            "the mask has a hole; each episode must be one run of steps",
        )
        insist(not (self.terminated[:, :-1] & self.mask[:, 1:]).any(), "an episode goes on after it terminated")
        if discrete:
            outside = (self.actions < 0) | (self.actions >= A)
            insist(not outside.any(), f"actions must lie in 0 .. {A - 1}; found {_extremes(self.actions)}")
            legal = self.avail_actions[:, :-1].gather(-1, self.actions[..., None])[..., 0] | ~self.mask[..., None]
            insist(legal.all(), "an action was taken that avail_actions forbids")
            seen = torch.cat([torch.ones_like(self.mask[:, :1]), self.mask], 1)  # (E, T+1): there is an observation
            insist(self.avail_actions[seen].any(-1).all(), "an agent has no available action")
        else:
            insist(
                self.actions.abs().max() <= 1 + 1e-5, f"actions must lie in [-1, 1]; found {_extremes(self.actions)}"
            )
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
    dataset.check()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with h5py.File(part, "w") as file:
            for name in TENSORS:
                if getattr(dataset, name) is not None:
                    array = getattr(dataset, name).cpu().numpy()
                    file.create_dataset(name, data=array, compression="gzip", compression_opts=1, shuffle=True)
            for key, value in {**dataset.info, "format": FORMAT}.items():
                file.attrs[key] = json.dumps(value)
        os.replace(part, path)
    except RuntimeError as error:  # h5py's way of saying that a write failed
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def read_own(file, path):
    """Read an open HDF5 file that `write` wrote, unchecked; attributes that are not JSON raise as `json` does."""
    missing = [n for n in TENSORS if n not in file and n != "avail_actions"]
    if missing:
        raise ValueError(f"{path} is not one of our datasets: it lacks {', '.join(missing)}")
    if not all(isinstance(file[name], h5py.Dataset) for name in TENSORS if name in file):
        raise ValueError(f"{path} is not one of our datasets: it holds groups in place of arrays")
    arrays = {name: file[name][()] for name in TENSORS if name in file}
    info = {key: json.loads(value) for key, value in file.attrs.items()}
    if info.get("format") != FORMAT:
        raise ValueError(f"{path} has format {info.get('format')}, this code reads {FORMAT}: collect it again")
    tensors = {name: as_tensor(arrays[name], name, path) if name in arrays else None for name in TENSORS}
    return Dataset(**tensors, info=info)


# What holds 0 and 1, under our names and the other formats'.
FLAGS = ("terminated", "mask", "avail_actions", "filled", "terminals", "truncations", "infos.legals")
FLAGS += ("timeouts", "terminations")


def as_tensor(array, name, source):
    """A numpy array as the tensor that the field `name` calls for: float32, bool, or, for actions, by its kind."""
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{source}: {name} holds {array.dtype}, not numbers")
    if name in FLAGS:
        if not np.isin(array, (0, 1)).all():
            raise ValueError(f"{source}: {name} must hold 0 and 1 only")
        return torch.as_tensor(array.astype(bool))
    whole = name == "actions" and array.dtype.kind != "f"
    return torch.as_tensor(array.astype(np.int64 if whole else np.float32, copy=False))


def _shape(tensor):
    return tuple(tensor.shape)


def _extremes(tensor):
    return f"{tensor.min():g} .. {tensor.max():g}"
