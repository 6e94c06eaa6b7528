"""The folder of one run, its files, and the random streams that let it resume. No learning code."""

import csv
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

MAY_CHANGE = {
    "resume",
    "out_dir",
    "device",
    "threads",
    "compile",
    "track",
}  # what `--resume` lets a command line change


def save(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, so that a kill leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_json(path, content):
    save(path, (json.dumps(content, indent=2) + "\n").encode())


def save_csv(path, rows):
    """Write a list of dictionaries with the same keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save(path, text.getvalue().encode())


def save_figure(path, figure):
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    save(path, content.getvalue())


def save_checkpoint(folder, content):
    """Write `checkpoint.pt`: nested dictionaries and lists of tensors, numbers and strings."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    save(Path(folder) / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(folder, device):
    """The content of `checkpoint.pt`, or None if the run was stopped before it wrote one.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it to start the run again") from None


def check_numbers(args, may_be_zero="", at_most_one=""):
    """Raise ValueError unless every number among the arguments is finite and above 0.

    `may_be_zero` and `at_most_one` name the fields, separated by spaces, that may be 0 or must not exceed 1.
    """
    for name, value in asdict(args).items():
        zero, one = name in may_be_zero.split(), name in at_most_one.split()
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) not in (int, float):
                continue
            if not (number > 0 or (zero and number == 0)) or not number <= (1 if one else sys.float_info.max):
                least, most = "at least 0" if zero else "above 0", "at most 1" if one else "finite"
                raise ValueError(f"--{name.replace('_', '-')} must be {least} and {most}, not {number}")


def choose_device(name):
    """The torch device for auto, cpu or cuda.

    Raises:
        ValueError: another name, or cuda where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compiler(wanted, device):
    """`torch.compile` if it is wanted, else a function that changes nothing; ValueError if it cannot work here."""
    if wanted and device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise ValueError("--compile needs a C++ compiler on the CPU, and there is none")
    return torch.compile if wanted else lambda function: function


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def open_folder(script, args, device):
    """Make the run's folder with its `config.json`, or check the one to resume; returns its path.

    Without `--out-dir` the folder is a new one, `runs/SCRIPT/TASK-TIME`.

    Raises:
        ValueError: the folder holds a run already, or there is none to resume, or a flag would change its result.
        OSError: it cannot be written.
    """
    if args.resume:
        folder = Path(args.out_dir)
        for key, value in asdict(saved_args(type(args), folder)).items():
            if key not in MAY_CHANGE and getattr(args, key) != value:
                flag = "--" + key.replace("_", "-")
                raise ValueError(f"{folder} was begun with {flag} {value}: it cannot go on with {getattr(args, key)}")
        return folder
    name = f"runs/{script}/{slug(args.env, args.task, args.dataset)}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, again = Path(args.out_dir or name), 1
    while not args.out_dir:  # a folder that no run beside this one has taken
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder, again = Path(f"{name}-{again}"), again + 1
    args.out_dir = str(folder)
    for file in ("config.json", "checkpoint.pt"):
        if (folder / file).exists():
            raise ValueError(
                f"{folder} holds a run already: --resume goes on with it; else delete it or change --out-dir"
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "config.json", {"script": script, "args": asdict(args)} | provenance(device))
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


def saved_args(kind, folder):
    """The arguments, a dataclass `kind`, with which the run in `folder` was begun; ValueError if there are none."""
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text())["args"]
        if saved.keys() != {field.name for field in fields(kind)}:
            raise KeyError
        return kind(**saved)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no run to resume in {folder or '--out-dir'}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged, or of another version: the run cannot be resumed") from None


def start_tracking(script, args):
    """A Weights & Biases run with these arguments; ValueError if the package is not installed."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--track needs Weights & Biases: pip install wandb") from None
    return wandb.init(project="offline-coordination", group=script, config=asdict(args))


def slug(*words):
    """A folder name of the words that are not empty; of a path its last part."""
    words = [Path(word).stem if "/" in word or word.endswith((".h5", ".hdf5")) else word for word in words]
    return "-".join(re.sub(r"[^\w.-]+", "_", word).strip("_")[:60] for word in words if word)


def stream(seed, purpose, device="cpu"):
    """A generator of its own for each seed and purpose, so that a seed's numbers do not depend on its neighbours."""
    return torch.Generator(device).manual_seed((1_000_003 * seed + purpose) % 2**63)


def uniform(generators, *shape):
    """Uniform numbers in [0, 1), (S, *shape), each seed's from its own generator."""
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])


def over_seeds(values):
    """Mean and standard error over seeds of (S, episodes) values, and each seed's mean."""
    means = values.double().mean(1).cpu().numpy()
    stderr = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return {"mean": float(means.mean()), "stderr": float(stderr), "per_seed": means.tolist()}


def draw_curves(rows, columns, levels, title, xlabel, ylabel="return"):
    """Mean (line) and range (band) over seeds of some columns of metrics.csv against steps.

    Args:
        rows: dictionaries with "step", "seed" and the columns.
        columns: {column: label}.
        levels: {label: height} of horizontal lines.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = sorted({row["step"] for row in rows})
    for colour, (column, label) in enumerate(columns.items()):
        value = np.array([[row[column] for row in rows if row["step"] == step] for step in steps])  # (evaluations, S)
        axes.plot(steps, value.mean(1), color=f"C{colour}", label=label)
        axes.fill_between(steps, value.min(1), value.max(1), color=f"C{colour}", alpha=0.2, linewidth=0)
    for (label, level), style in zip(levels.items(), ("--", ":", "-.")):
        axes.axhline(level, color="black", linestyle=style, linewidth=1, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend(frameon=False)
    return figure


def print_table(columns, scores, levels, score="return"):
    """Print mean ± standard error over seeds of each score, then the plain numbers in `levels`.

    Args:
        columns: the heads of the columns.
        scores: {name: one result of `over_seeds` for each column}.
        levels: {name: number}.
    """
    print(f"{score:22s}" + "".join(f"{head:>20s}" for head in columns))
    for name, cells in scores.items():
        print(f"{name:22s}" + "".join(f"{cell['mean']:11.4f} ± {cell['stderr']:.4f}" for cell in cells))
    for name, level in levels.items():
        print(f"{name:22s}{level:11.4f}")
