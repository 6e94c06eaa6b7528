"""Say what is in a dataset: shapes, counts, ends and returns.

python data/describe.py FILE_OR_FOLDER [--time-limit 120]
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

if __name__ == "__main__":  # let `python data/describe.py` find the packages beside its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.readers import read
from data.run import launch, read_flags, say


@dataclass
class Args:
    path: Annotated[Path, tyro.conf.Positional]  # a file or a folder, in any format that is read
    time_limit: int | None = None  # CFCQL, OG-MARL: episodes that last so many steps were cut off


def describe(dataset):
    """What a reader wants to know first, as a list of lines."""
    table = {}
    for key, value in sorted(dataset.info.items()):
        if value != "" and key not in ("won", "references"):  # which stand below
            table[key] = value
    for name, tensor in dataset.tensors().items():
        table[name] = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    table["episodes"] = len(dataset.mask)
    table["transitions"] = int(dataset.mask.sum())
    table["terminals"] = int(dataset.terminated.sum())
    table["truncations"] = int(dataset.truncated.sum())
    returns = dataset.returns.double()
    table["length"] = spread(dataset.lengths.double())
    table["return"] = spread(returns)
    if dataset.references:
        random, expert = dataset.references
        table["normalised %"] = spread(100 * dataset.normalize(returns))
        table["references"] = f"random (0 %) {random:.4f}  expert (100 %) {expert:.4f}"
    if dataset.win_rate is not None:
        table["win rate"] = f"{dataset.win_rate:.4f}"
    return [f"{key:14s} {value}" for key, value in table.items()]


def spread(values):
    low, mean, middle, high = values.min(), values.mean(), values.median(), values.max()
    return f"min {low:.4f}  mean {mean:.4f}  median {middle:.4f}  max {high:.4f}"


def main(args):
    say("\n".join(describe(read(args.path, args.time_limit))))


def parse(argv=None):
    return read_flags(Args, argv, __doc__)


if __name__ == "__main__":
    launch(main, parse)
