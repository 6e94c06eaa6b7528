"""Say what is in a dataset: shapes, counts, ends and returns, with a histogram.

python data/describe.py FILE_OR_FOLDER [--time-limit 120] [--out histogram.png]
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from matplotlib.figure import Figure

if __name__ == "__main__":  # let `python data/describe.py` find the packages beside its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.readers import read
from data.run import launch, read_flags, save_figure, say


@dataclass
class Args:
    path: Annotated[Path, tyro.conf.Positional]  # a file or a folder, in any format that is read
    time_limit: int | None = None  # CFCQL, OG-MARL: episodes that last so many steps were cut off
    out: Path | None = None  # the histogram picture; by default runs/describe/NAME.png


def describe(dataset):
    """What a reader wants to know first, as a list of lines."""
    table = {}
    for key, value in sorted(dataset.info.items()):
        if value != "" and key not in ("won", "references"):  # which stand below
            table[key] = value
    for name, tensor in dataset.tensors().items():
        table[name] = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    truncations = int(dataset.truncated.sum())
    table["episodes"] = len(dataset.mask)
    table["transitions"] = int(dataset.mask.sum())
    table["terminals"] = terminals = len(dataset.mask) - truncations
    table["truncations"] = truncations
    returns = dataset.returns.double()
    table["length"] = spread(dataset.lengths.double())
    table["return"] = spread(returns)
    if dataset.references:
        random, expert = dataset.references
        table["normalised %"] = spread(100 * dataset.normalize(returns))
        table["references"] = f"random (0 %) {random:.4f}  expert (100 %) {expert:.4f}"
    if dataset.win_rate is not None:
        table["win rate"] = f"{dataset.win_rate:.4f}"
    lines = [f"{key:14s} {value}" for key, value in table.items()]
    if terminals == 0 and dataset.info.get("env") not in ("halfcheetah", "reacher"):
        warning = (
            "no episode terminates; a value function will bootstrap from every last observation"
        )
        lines.append(f"warning: {warning}")
    return lines


def spread(values):
    low, mean, middle, high = values.min(), values.mean(), values.median(), values.max()
    return f"min {low:.4f}  mean {mean:.4f}  median {middle:.4f}  max {high:.4f}"


def histogram(dataset):
    """A figure of the episode returns."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes, returns = figure.subplots(), dataset.returns.double()
    axes.hist(returns.numpy(), bins=40 if returns.max() > returns.min() else 1)
    axes.axvline(returns.mean(), color="black", linestyle="--")
    axes.set(xlabel="episode return (dashed: the mean)", ylabel="episodes")
    names = [str(dataset.info.get(key, "")) for key in ("env", "task", "name")]
    axes.set_title(" ".join(names).strip(), parse_math=False)  # a name may hold a "$"
    return figure


def main(args):
    dataset = read(args.path, args.time_limit)
    out = args.out or Path("runs") / "describe" / f"{args.path.stem}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_figure(out, histogram(dataset))
    say("\n".join([*describe(dataset), f"{'histogram':14s} {out}"]))


def parse(argv=None):
    return read_flags(Args, argv, __doc__)


if __name__ == "__main__":
    launch(main, parse)
