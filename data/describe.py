"""Say what is in a dataset: shapes, counts, ends and returns, with a histogram.

python data/describe.py FILE_OR_FOLDER [--time-limit 120] [--out histogram.png]
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is loaded, Ctrl-C ends the program without a traceback
import tyro
from matplotlib.figure import Figure

if __name__ == "__main__":  # let `python data/describe.py` find the packages beside its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import flags, runs
from data.dataset import TENSORS
from data.readers import read


@dataclass
class Args:
    path: Annotated[Path, tyro.conf.Positional]  # ours, CFCQL's, D4RL's, Minari's, OG-MARL's vault, AlberDICE's folder
    time_limit: int | None = None  # for CFCQL and OG-MARL: episodes that last so many steps count as cut off
    out: Path | None = None  # the histogram picture; by default runs/describe/NAME.png


LISTED = ("won", "references")  # what `info` holds and `describe` shows elsewhere


def describe(dataset):
    """What a reader wants to know first, as a list of lines."""
    told = {key: value for key, value in sorted(dataset.info.items()) if value != "" and key not in LISTED}
    lines = [f"{key:14s} {value}" for key, value in told.items()]
    for name in TENSORS:
        tensor = getattr(dataset, name)
        if tensor is not None:
            lines.append(f"{name:14s} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    episodes, terminals = len(dataset.mask), int((dataset.terminated & dataset.mask).sum())
    lines.append(f"{'episodes':14s} {episodes}")
    lines.append(f"{'transitions':14s} {int(dataset.mask.sum())}")
    lines.append(f"{'terminals':14s} {terminals}")
    lines.append(f"{'truncations':14s} {int(dataset.truncated.sum())}")
    tables = {"length": dataset.lengths.double(), "return": dataset.returns.double()}
    if dataset.references is not None:
        tables["normalised %"] = 100 * dataset.normalize(tables["return"])
    for name, values in tables.items():
        low, mean, middle, high = values.min(), values.mean(), values.median(), values.max()
        lines.append(f"{name:14s} min {low:.4f}  mean {mean:.4f}  median {middle:.4f}  max {high:.4f}")
    if dataset.references is not None:
        random, expert = dataset.references
        lines.append(f"{'references':14s} random (0 %) {random:.4f}  expert (100 %) {expert:.4f}")
    if dataset.win_rate is not None:
        lines.append(f"{'win rate':14s} {dataset.win_rate:.4f}")
    if terminals == 0 and dataset.info.get("env") not in ("halfcheetah", "reacher"):  # these never do
        lines.append("warning: no episode terminates; a value function will bootstrap from every last observation")
    return lines


def histogram(dataset):
    """A figure of the episode returns."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes, returns = figure.subplots(), dataset.returns.double()
    title = " ".join(str(dataset.info[key]) for key in ("env", "task", "name") if dataset.info.get(key))
    axes.hist(returns.numpy(), bins=40 if returns.max() > returns.min() else 1, color="tab:blue")
    axes.axvline(returns.mean(), color="black", linestyle="--", label=f"mean {returns.mean():.3f}")
    axes.set(xlabel="episode return", ylabel="episodes")
    axes.set_title(title, parse_math=False)  # a name may hold a "$"
    axes.legend(frameon=False)
    return figure


def main(args):
    dataset = read(args.path, args.time_limit)
    out = args.out or Path("runs") / "describe" / f"{args.path.stem}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    runs.save_figure(out, histogram(dataset))
    runs.say("\n".join([*describe(dataset), f"{'histogram':14s} {out}"]))


def parse():
    return flags.read(Args, description=__doc__.splitlines()[0])


if __name__ == "__main__":
    runs.launch(main, parse)
