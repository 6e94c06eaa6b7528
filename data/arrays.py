"""Numbers in any form, a whole dataset's or one episode's, as the tensors that a `Dataset` holds."""

import hashlib
import json

import numpy as np
import torch

# What holds 0 and 1, under our names and the other formats'; and what there is one more of than of steps.
FLAGS = ("terminated", "mask", "avail_actions", "filled", "terminals", "truncations", "infos.legals")
FLAGS += ("timeouts", "terminations", "truncated", "dones", "ends", "next_avail_actions")
OBSERVED = ("obs", "state", "avail_actions")
EPISODE = ("obs", "actions", "reward", "terminated", "truncated", "dones", "state", "avail_actions")
NUMBERS = "not numbers that are real and fit into 64 bits"


def seen(mask):
    """Where there is an observation: mask (E, T) -> (E, T+1) bool."""
    return torch.nn.functional.pad(mask, (1, 0), value=True)


def as_tensor(array, name, source="dataset", mask=None):
    """The tensor that the field `name` calls for: float32, bool, or, for actions, by their kind float32 or int64.

    Args:
        array: a tensor, a numpy array or nested lists. It is not changed, and copied only where it must be.
        mask: (E, T) bool; what lies behind it in an array (E, T, ...), or (E, T+1, ...), becomes 0.
    Raises:
        ValueError: it does not hold real numbers of at most 64 bits, or flags that are neither 0 nor 1.
    """
    flags, whole = name in FLAGS, name == "actions"
    if torch.is_tensor(array):
        if array.is_complex():
            raise ValueError(f"{source}: {name} holds {array.dtype}, {NUMBERS}")
        kind = torch.int64 if whole and not array.is_floating_point() else torch.float32
        tensor = array.detach().to(torch.bool if flags and array.dtype == torch.bool else kind)
    else:
        try:
            array = np.asarray(array)
        except (ValueError, TypeError, RuntimeError):  # lists of unequal lengths, or of tensors on a GPU
            raise ValueError(f"{source}: {name} is no array: its parts differ in length, or are no numbers") from None
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{source}: {name} holds {array.dtype}, {NUMBERS}")
        kind = np.int64 if whole and array.dtype.kind != "f" else np.float32
        kind = bool if flags and array.dtype == bool else kind
        with np.errstate(over="ignore"):  # it becomes infinite, which `check` refuses
            array = array.copy() if min(array.strides, default=0) < 0 else array  # numpy calls x[:1][::-1] contiguous
            tensor = torch.from_numpy(np.require(array, kind, "CW"))
    if mask is not None and mask.dim() == 2:
        behind = ~(seen(mask) if name in OBSERVED else mask)
        if tensor.shape[:2] == behind.shape and tensor[behind].any():  # of another shape `check` complains
            tensor = tensor.masked_fill(behind.view(*behind.shape, *[1] * (tensor.dim() - 2)), 0)
    if flags and tensor.dtype != torch.bool:
        if not ((tensor == 0) | (tensor == 1)).all():
            raise ValueError(f"{source}: {name} must hold 0 and 1 only")
        tensor = tensor.bool()
    return tensor


def plain(info):
    """The dictionary `info` with the numbers, arrays and tensors in it as Python's own, which JSON can hold.

    Raises:
        ValueError: it is no dictionary, or holds something else.
    """

    def own(value):
        if isinstance(value, np.ndarray | np.generic) or torch.is_tensor(value):
            return value.tolist()
        raise TypeError(f"it holds a {type(value).__name__}")

    if not isinstance(info, dict):
        raise ValueError(f"dataset: info must be a dictionary, not a {type(info).__name__}")
    found = {}
    for key, value in info.items():
        try:
            found[str(key)] = json.loads(json.dumps(value, default=own))
        except (TypeError, ValueError, RecursionError) as error:  # a ValueError where it holds itself
            raise ValueError(f"dataset: info {key!r} cannot be kept as JSON: {error}") from None
    return found


def read_episode(given, source, time_limit=None):
    """One episode as `Dataset.from_episodes` takes it, as tensors: obs, actions, reward, terminated, and what it has.

    Raises:
        ValueError: something is missing, or does not fit; the message begins with `source`.
    """

    def insist(good, complaint):
        if not good:
            raise ValueError(f"{source}: {complaint}")

    insist(isinstance(given, dict), f"it is a {type(given).__name__}, not a dictionary of arrays")
    unknown = [str(name) for name in given if name not in EPISODE]
    insist(not unknown, f"{', '.join(unknown)} is none of {', '.join(EPISODE)}: rename it or leave it out")
    found = {name: as_tensor(array, name, source).cpu() for name, array in given.items() if array is not None}
    missing = [name for name in ("obs", "actions", "reward") if name not in found]
    insist(not missing, f"it lacks {', '.join(missing)}")

    # Numbers of actions may have been kept as floating-point ones, or in a column of their own.
    actions, shape = found["actions"], _shape(found["actions"])
    if actions.is_floating_point() and actions.dim() == 2 and (actions == actions.round()).all():
        actions = actions.long()
    if not actions.is_floating_point() and shape[2:] == (1,):
        actions = actions[..., 0]
    good = actions.dim() == 2 + actions.is_floating_point()
    insist(good, f"actions must be whole numbers (T, N), or others (T, N, A); these are {actions.dtype} {shape}")
    T, N = actions.shape[:2]
    insist(T, "it has no step")
    found["actions"] = actions

    for name, axes in {"obs": "T + 1, N, O", "state": "T + 1, D", "avail_actions": "T + 1, N, A"}.items():
        if name in found:
            shape = _shape(found[name])
            insist(len(shape) == len(axes.split(",")), f"{name} must be ({axes}), not {shape}")
            remedy = f"append {name} after the last step, or, if they were not kept, the last row again"
            insist(shape[0] != T, f"{name} have {T} rows for {T} steps, in place of {T + 1}: {remedy}")
            insist(shape[0] == T + 1, f"{name} have {shape[0]} rows for {T} steps, in place of {T + 1}")
            insist(name == "state" or shape[1] == N, f"{name} are of {shape[1]} agents, actions of {N}")
    shape = _shape(found["reward"])
    insist(shape in ((T,), (T, 1), (T, N)), f"reward must be {(T,)} or {(T, N)}, not {shape}")
    found["reward"] = found["reward"][:, 0] if shape == (T, 1) else found["reward"]

    told = [name for name in ("terminated", "truncated", "dones") if name in found]
    insist(told, "it lacks terminated: False if a time limit cut it off")
    for name in told:
        if found[name].dim() == 0:  # it speaks of the last step
            found[name] = (torch.arange(T) == T - 1) & found[name]
        insist(_shape(found[name]) == (T,), f"{name} must be {(T,)} or one bool, not {_shape(found[name])}")
        insist(not found[name][:-1].any(), f"it goes on after a step that is {name}")
    if "dones" in found:
        insist(told == ["dones"], f"it has dones beside {told[0]}: leave one out")
        remedy = "give terminated and truncated, or time_limit=steps (math.inf if there is no limit)"
        insist(time_limit is not None, f"dones do not tell the game's own end from a time limit: {remedy}")
        found["terminated"] = found["dones"] & (T < time_limit)
    found.setdefault("terminated", torch.zeros(T, dtype=torch.bool))
    return {name: tensor for name, tensor in found.items() if name not in ("truncated", "dones")}


def cut(arrays, ends, source="from_transitions"):
    """Cut M steps laid end to end, as `Dataset.from_transitions` takes them, into a list of episodes.

    Raises:
        ValueError: lengths differ, or the steps are not in order.
    """
    ends = as_tensor(ends, "ends", source)
    if not isinstance(arrays, dict) or ends.dim() != 1 or not len(ends):
        raise ValueError(f"{source} takes a dictionary of arrays (M, ...), and ends (M,), with a step at least")
    arrays = {name: as_tensor(array, name, source) for name, array in arrays.items() if array is not None}
    for name, array in arrays.items():
        if array.shape[:1] != ends.shape:
            raise ValueError(f"{source}: {name} has the shape {_shape(array)}, but ends has {_shape(ends)}")
    after = {name: arrays.pop(f"next_{name}", arrays.get(name)) for name in OBSERVED}  # a copy may stand in
    for name, seen_next in after.items():
        now = arrays.get(name, seen_next)
        if seen_next is not now and seen_next.shape == now.shape:
            unlike = ~seen_next[:-1].double().isclose(now[1:].double(), 1e-3, 1e-3).flatten(1).all(1) & ~ends[:-1]
            if unlike.any():
                m = int(unlike.nonzero()[0])
                remedy = "lay the steps of one game after another, and mark each end"
                raise ValueError(f"{source}: next_{name} of step {m} is not {name} of step {m + 1}: {remedy}")
    if "terminated" not in arrays:
        arrays["dones"] = ends
    starts = [0, *(ends[:-1].nonzero()[:, 0] + 1).tolist(), len(ends)]
    episodes = []
    for start, stop in zip(starts, starts[1:]):
        episode = {name: array[start:stop] for name, array in arrays.items()}
        for name in OBSERVED:
            if name in episode:
                episode[name] = torch.cat([episode[name], after[name][stop - 1 : stop]])
        episodes.append(episode)
    return episodes


def _shape(tensor):
    return tuple(tensor.shape)


def fingerprint(tensors):
    """A short word for the content of {name: tensor}: equal content, equal word, on any device."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]
