"""Checkpoints and world models: files of tensors and plain values, read without unpickling, checked field by field."""

import math
from pathlib import Path

import torch

from data.arguments import MISFITS
from data.arrays import fingerprint  # noqa: F401  runs find it here
from data.results import save_tensors


def save_checkpoint(folder, content):
    save_tensors(Path(folder) / "checkpoint.pt", content)


def read_checkpoint(folder, script, device):
    """The content of `checkpoint.pt`, or None if the run was stopped before it wrote one.

    Raises:
        ValueError: the file is damaged, or no checkpoint of this script.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it to start the run again") from None
    try:
        rows = dict(saved)["rows"]
        good = (
            saved["script"] == script and isinstance(saved["act"], str | None) and isinstance(saved["parts"], dict)
            and all(isinstance(saved[name], int) and saved[name] >= 0 for name in ("step", "timed"))
            and all(math.isfinite(saved[name]) and saved[name] >= 0 for name in ("seconds", "wall"))
            and all(isinstance(word, str) for pair in saved["learned_from"].items() for word in pair)
            and all(isinstance(row["step"], int) and row.keys() == rows[0].keys() for row in rows)
            and all(isinstance(number, int | float) for row in rows for number in row.values())
        )  # fmt: skip
    except MISFITS:
        good = False
    if not good:
        raise of_another_run(folder)
    return saved


def world_of(data, args):
    """What a world model is a model of, in words: all tasks of a body are one world, seen through other eyes."""
    task = "all tasks" if args.env in ("reacher", "halfcheetah", "ant") else args.task
    return [args.env, task, f"{data.state.shape[1]} entries", f"{data.action[0].numel()} action entries"]


def save_model(folder, model, about):
    save_tensors(Path(folder) / "world_model.pt", {"world": model.state_dict(), "about": about})


def read_model(path, world, seeds, elites, device, make):
    """The world model in a file, or in the folder of a run, which `save_model` wrote.

    Args:
        world: what it must be a model of, in words; they stand in about["world"].
        seeds, elites: for which seeds it must have models, and how many for each.
        make: (how many seeds, about["sizes"]) -> a module of that many times `elites` models to load it into, whose
            `choose` copies some of them.
    Returns:
        The models of these seeds, and what is known about all of them, a dictionary with "world", "seeds", "elites",
        "sizes" and "open_loop".
    Raises:
        ValueError: there is none, or it is damaged, or of another world, or of other seeds.
    """
    path = Path(path) / "world_model.pt" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise ValueError(f"no world model {path}: --world-model takes the folder of a run that has learned one")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        about, state = saved["about"], dict(saved["world"])
        made, wanted = (", ".join(map(str, words)) for words in (about["world"], world))
        known, count = about["seeds"], about["elites"]
        good = all(isinstance(number, int) for number in [count, *known]) and isinstance(about["sizes"], dict)
        if not good or not all(isinstance(error, float) for error in about["open_loop"]):
            raise TypeError
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path} is no world model, or damaged ({type(error).__name__})") from None
    if made != wanted:
        raise ValueError(f"{path} is a model of another world ({made}), not of this one ({wanted})")
    if not set(seeds) <= set(known) or count != elites:
        had = f"{path} has {count} elites of the seeds {known}"
        raise ValueError(f"{had}: choose --seed, --num-seeds and --elites among them")
    try:
        model = make(len(known), about["sizes"]).to(device)
        model.load_state_dict(state)
    except (RuntimeError, TypeError):
        raise ValueError(f"{path} is damaged: its weights do not fit its sizes") from None
    return model.choose([known.index(seed) * elites + e for seed in seeds for e in range(elites)]), about


def of_another_run(folder):
    return ValueError(f"{folder}/checkpoint.pt is of another run: delete it to start this one again")


def snapshot(part):
    """The state of a module, an optimiser or a generator, or of a list or dictionary of these."""
    if isinstance(part, dict):
        return {name: snapshot(each) for name, each in part.items()}
    if isinstance(part, list | tuple):
        return [snapshot(each) for each in part]
    return part.get_state() if hasattr(part, "get_state") else part.state_dict()


def restore(part, state):
    """Put what `snapshot` returned back; raises one of `MISFITS` if it does not fit."""
    if isinstance(part, dict):
        if part.keys() != state.keys():
            raise KeyError
        part, state = list(part.values()), [state[name] for name in part]
    if isinstance(part, list | tuple):
        for each, its in zip(part, state, strict=True):
            restore(each, its)
    elif hasattr(part, "set_state"):
        part.set_state(state.cpu())
    else:
        part.load_state_dict(state)
