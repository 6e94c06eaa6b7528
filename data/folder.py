"""The folder of a run: who may take it, and what `config.json` says of how its results came about."""

import itertools
import os
import platform
import re
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data.results import save_json

FILES = ("config.json", "checkpoint.pt", "metrics.csv", "summary.json")  # a folder with one of these is not empty


def refuse_taken(folder):
    """Raise ValueError if the folder holds a run, or what a run would overwrite, or cannot be made."""
    home = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (home.is_dir() and os.access(home, os.W_OK)):
        raise ValueError(f"{folder} cannot be made or written to: change --out-dir")
    for file in FILES:
        if (folder / file).exists():
            found = "run already: --resume goes on with it" if file == "config.json" else f"{file} of another kind"
            raise ValueError(f"{folder} holds a {found}; else delete it or change --out-dir")


def take_folder(script, args, device, subject):
    """Make the run's folder with its `config.json`, or the one to resume ours; returns its path.

    Without `--out-dir` it is a new one, `runs/SCRIPT/SUBJECT-TIME`. Of two runs that want one folder, one gets it.
    """
    if not args.resume:
        name, again = f"runs/{script}/{subject}-{time.strftime('%Y%m%d-%H%M%S')}", itertools.count(1)
        folder = Path(args.out_dir or name)
        while not args.out_dir:  # a folder that no run beside this one has taken
            try:
                folder.mkdir(parents=True)
                args.out_dir = str(folder)
            except FileExistsError:
                folder = Path(f"{name}-{next(again)}")
        folder.mkdir(parents=True, exist_ok=True)
        content = {"script": script, "args": asdict(args)} | provenance(device)
        save_json(folder / "config.json", content, new=True)
    folder = Path(args.out_dir)
    for part in folder.glob("*.part") if args.resume else ():  # left by a kill in the middle of writing
        part.unlink(missing_ok=True)
    return folder


def provenance(device):
    """What produced a result besides its arguments: the git commit ("unknown" outside a clone), versions, device."""
    try:
        words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"git_commit": commit or "unknown", "versions": versions, "device": device_name(device)}


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def slug(*words):
    """A folder name of the words that are not empty; of a path its last part."""
    words = [Path(word).stem if "/" in word or word.endswith((".h5", ".hdf5")) else word for word in words]
    return "-".join(re.sub(r"[^\w.-]+", "_", word).strip("_")[:60] for word in words if word)
