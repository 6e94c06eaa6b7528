"""What a run leaves behind: files that are written whole or not at all, and results over seeds as curves and tables."""

import csv
import io
import json
import os
import uuid

import numpy as np
import torch
from matplotlib.figure import Figure


# ---------------------------------------------------------------- files
def save(path, content, new=False):
    """Write a file whole or not at all, so that a kill leaves the old one or the new one.

    Raises:
        ValueError: it must be `new`, and is there already.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        part.write_bytes(content)
        if new:
            os.link(part, path)  # unlike a renaming, it never replaces
        else:
            os.replace(part, path)
    except FileExistsError:
        raise ValueError(f"{path.parent} has just been taken by another run: change --out-dir") from None
    finally:
        part.unlink(missing_ok=True)


def save_json(path, content, new=False):
    save(path, (json.dumps(content, indent=2) + "\n").encode(), new)


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


def save_tensors(path, content):
    """Write nested dictionaries and lists of tensors, numbers and strings."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    save(path, buffer.getvalue())


# ---------------------------------------------------------------- results
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


def draw_open_loop(errors, still, seeds, subject):
    """The errors of a learned world left to itself for 1..k steps, (S, k), and those if nothing moved, (k,)."""
    rows = [{"step": t + 1, "seed": seed, "error": errors[s, t].item(), "still": still[t].item()}
            for t in range(len(still)) for s, seed in enumerate(seeds)]  # fmt: skip
    columns = {"error": "model", "still": "nothing moves"}
    return draw_curves(rows, columns, {}, f"open loop, {subject}", "steps", "error / spread")


def table_text(columns, scores, levels, score="return"):
    """A table: mean ± standard error over seeds of each score, then the plain numbers in `levels`.

    Args:
        columns: the heads of the columns.
        scores: {name: one result of `over_seeds` for each column}.
        levels: {name: number}.
    """
    lines = [f"{score:22s}" + "".join(f"{head:>20s}" for head in columns)]
    for name, cells in scores.items():
        lines.append(f"{name:22s}" + "".join(f"{cell['mean']:11.4f} ± {cell['stderr']:.4f}" for cell in cells))
    lines += [f"{name:22s}{level:11.4f}" for name, level in levels.items()]
    return "\n".join(lines)
