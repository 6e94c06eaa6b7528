"""Results over seeds: numbers, curves and a table."""

import numpy as np
from matplotlib.figure import Figure


def over_seeds(values):
    """Mean and standard error over seeds of (S, episodes) values, and each seed's mean."""
    means = values.double().mean(1).cpu().numpy()
    stderr = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return {"mean": float(means.mean()), "stderr": float(stderr), "per_seed": means.tolist()}


def draw_curves(rows, columns, levels, title, xlabel, ylabel="return"):
    """Mean (line) and range (band) over seeds of some columns of metrics.csv against steps.

    Args:
        rows: dictionaries with "step", "seed" and the columns; a step without one is left out.
        columns: {column: label}.
        levels: {label: height} of horizontal lines.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for colour, (column, label) in enumerate(columns.items()):
        known = [row for row in rows if column in row]
        steps = sorted({row["step"] for row in known})
        groups = [[row[column] for row in known if row["step"] == step] for step in steps]
        values = np.array(groups).reshape(len(steps), -1)  # (evaluations, S)
        axes.plot(steps, values.mean(1), color=f"C{colour}", label=label)
        low, high = values.min(1), values.max(1)
        axes.fill_between(steps, low, high, color=f"C{colour}", alpha=0.2, linewidth=0)
    for (label, level), style in zip(levels.items(), ("--", ":", "-.")):
        axes.axhline(level, color="black", linestyle=style, linewidth=1, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.legend(frameon=False)
    return figure


def table_text(columns, scores, levels, score="return"):
    """A table: mean ± standard error over seeds of each score, then the plain numbers in `levels`.

    Args:
        columns: the heads of the columns.
        scores: {name: one result of `over_seeds` for each column}.
        levels: {name: number}.
    """
    lines = [f"{score:22s}" + "".join(f"{head:>20s}" for head in columns)]
    for name, cells in scores.items():
        numbers = [f"{cell['mean']:11.4f} ± {cell['stderr']:.4f}" for cell in cells]
        lines.append(f"{name:22s}" + "".join(numbers))
    lines += [f"{name:22s}{level:11.4f}" for name, level in levels.items()]
    return "\n".join(lines)
