"""The files of a run, written whole or not at all, read without unpickling; and its folder."""

import csv
import io
import itertools
import json
import platform
import re
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data.dataset import save

HOME = Path(__file__).resolve().parents[2]
TAKEN = "config.json", "checkpoint.pt", "metrics.csv", "summary.json"  # a folder with one is taken


# ---------------------------------------------------------------- writing
def save_json(path, content, new=False):
    save(path, (json.dumps(content, indent=2) + "\n").encode(), new)


def save_csv(path, rows):
    """Write dictionaries as a table; the last row's columns come first. A lacking cell is empty."""
    columns = dict.fromkeys(rows[-1])
    for row in rows:
        columns |= dict.fromkeys(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save(path, text.getvalue().encode())


def save_figure(path, figure):
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    save(path, content.getvalue())


def save_tensors(path, content):
    """Write nested dictionaries and lists of tensors, numbers and strings."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    save(path, buffer.getvalue())


def read_tensors(path, device):
    """What `save_tensors` wrote; ValueError if the file is damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from None


def read_config(folder):
    """A run's config.json, a dictionary; ValueError if there is none."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        return config | {"args": dict(config["args"])}
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder or '--out-dir'} is no run: there is no {path}") from None
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is damaged") from None


# ---------------------------------------------------------------- a checkpoint's parts
def snapshot(part):
    """The state of a module, an optimiser or a generator, or of a list or dictionary of these."""
    if isinstance(part, dict):
        return {name: snapshot(each) for name, each in part.items()}
    if isinstance(part, list):
        return [snapshot(each) for each in part]
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def restore(part, state):
    """Put back what `snapshot` returned."""
    if isinstance(part, dict):
        for name, each in part.items():
            restore(each, state[name])
    elif isinstance(part, list):
        for each, own in zip(part, state, strict=True):
            restore(each, own)
    elif isinstance(part, torch.Generator):
        part.set_state(state.cpu())
    else:
        part.load_state_dict(state)


# ---------------------------------------------------------------- the folder
def refuse_taken(folder):
    """Raise ValueError if the folder holds a run, or what a run would overwrite."""
    for file in TAKEN:
        if (folder / file).exists():
            remedy = "--resume goes on with it, or change --out-dir"
            raise ValueError(f"{folder} holds a run already ({file}): {remedy}")


def take_folder(script, args, device, subject):
    """Make a run's folder with its config.json; without --out-dir a new one in runs/SCRIPT.

    Returns:
        Its path, which also stands in `args.out_dir` now.
    Raises:
        ValueError: another run has taken the folder.
    """
    folder = Path(args.out_dir)
    if args.out_dir:
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = new_folder(Path("runs") / script / f"{subject}-{time.strftime('%Y%m%d-%H%M%S')}")
        args.out_dir = str(folder)
    content = {"script": script, "args": asdict(args)} | provenance(device)
    try:
        save_json(folder / "config.json", content, new=True)
    except FileExistsError:
        raise ValueError(f"another run has just taken {folder}: change --out-dir") from None
    return folder


def new_folder(wanted):
    """Make the folder, or the first of WANTED-1, WANTED-2, ... that is not there."""
    for k in itertools.count():
        folder = wanted.with_name(f"{wanted.name}-{k}") if k else wanted
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            pass


def provenance(device):
    """What made a result besides its arguments: git commit, versions, device."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["numpy"] = np.__version__
    return {"git_commit": commit(), "versions": versions, "device": device_name(device)}


def commit():
    """Our git commit, with "+" behind it if files were changed since; "unknown" outside a clone."""
    try:
        if Path(git("rev-parse", "--show-toplevel")) != HOME:  # of a repository around a copy
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*words):
    command = ["git", "-C", str(HOME), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def slug(*words):
    """A folder name of the words that are not empty; of a path its last part."""
    parts = []
    for word in filter(None, words):
        if "/" in word or word.endswith((".h5", ".hdf5")):
            word = Path(word).stem
        parts.append(re.sub(r"[^\w.-]+", "_", word).strip("_")[:60])
    return "-".join(parts)
