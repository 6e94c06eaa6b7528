"""Train every method on every task, and render the one table of all of them.

    python tests/grid.py                                    # all cells, two at a time
    python tests/grid.py --methods inspo "*cql" --tasks xor # a part, by names or patterns
    python tests/grid.py --list                             # the cells, numbered; which are done
    python tests/grid.py --index 7                          # one cell, for an array of jobs
    python tests/grid.py --render                           # results.csv -> tables, picture

A cell is one run of a script with its preset: method x task x dataset, all seeds at once. It is
kept in runs/grid/. A finished cell is skipped and one that was killed goes on, so the same command
may be given again at any time. Each cell's numbers go to algorithms/results.csv, a line a seed; no
other number enters the tables.
"""

import csv
import fnmatch
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import envs  # noqa: E402
from data.record import random_player, record  # noqa: E402
from data.run import files, launch, read_flags  # noqa: E402

WRITTEN = "algorithms/results.csv", "algorithms/README.md", ".readme/grid.png"
RESULTS, PAGE, PICTURE = (ROOT / file for file in WRITTEN)

# method: (script, flags, the environments that it has), as the columns of the tables
DISCRETE, GAMES = ("matrix", "bridge", "smac"), ("matrix",)
CONTINUOUS = "polynomial", "reacher", "halfcheetah", "ant"
METHODS = {
    "cloning": ("bc", "", (*DISCRETE, *CONTINUOUS)),
    "InSPO": ("inspo", "", DISCRETE),
    "AlberDICE": ("alberdice", "", ("matrix", "bridge")),
    "CFCQL": ("cfcql", "", DISCRETE),
    "MACQL": ("cfcql", "--joint-cql", DISCRETE),
    "OMAR": ("omar", "", DISCRETE),
    "OMIGA": ("omiga", "", (*DISCRETE, *CONTINUOUS)),
    "IQL": ("iql", "--team central", (*GAMES, *CONTINUOUS)),
    "MAIQL": ("iql", "--team mixed", (*GAMES, *CONTINUOUS)),
    "MAIQL-ft": ("iql", "--team mixed --finetune 1", (*GAMES, "polynomial", "reacher", "ant")),
    "ITD3+BC": ("td3_bc", "", CONTINUOUS),
    "MATD3+BC": ("td3_bc", "--mixing", CONTINUOUS),
    "ICQL": ("td3_bc", "--bc 0 --cql 1", CONTINUOUS),
    "IOMAR": ("td3_bc", "--bc 0 --cql 1 --omar 0.9", CONTINUOUS),
    "MADDPG+CQL": ("maddpg_cql_pjap", "--no-pjap", ("polynomial", "halfcheetah")),
    "+PJAP": ("maddpg_cql_pjap", "", ("polynomial", "halfcheetah")),
    "MOMA-PPO": ("moma_ppo", "", (*GAMES, "reacher", "ant")),
}
# cells that a method's environments hold, but that are no task of its own
ELSEWHERE = {"MOMA-PPO": ("xor", "m-ne", "m-ne-20", "climbing", "penalty")}
M_NE_20 = "[[5,-20,-20],[-20,10,-20],[-20,-20,20]]"


class Task(NamedTuple):
    name: str
    env: str
    task: str
    datasets: tuple
    seeds: int
    worst: float | None = None  # what random play is worth; None: 1,000 games tell

    @property
    def title(self):
        """Its name for a reader: the reacher's tasks are only views."""
        return f"{self.env} {self.name}" if self.env == "reacher" else self.name


CONVENTIONS = "favourable", "neutral", "unfavourable"
QUALITIES = "medium", "medium-replay", "mixed", "expert"
TASKS = (
    Task("xor", "matrix", "xor", ("ab", "ab-ba", "aa-ab-ba", "all"), 10, 0.5),
    Task("m-ne", "matrix", "m-ne", ("balanced", "imbalanced"), 10, 35 / 9),
    Task("m-ne-20", "matrix", M_NE_20, ("[0.8,0.1,0.1]",), 10, -85 / 9),
    Task("coordination", "matrix", "coordination", CONVENTIONS, 10, 0.5),
    Task("climbing", "matrix", "climbing", ("uniform",), 10, -31 / 9),
    Task("penalty", "matrix", "penalty", ("uniform",), 10, -38 / 9),
    Task("twin-peaks", "polynomial", "twin-peaks", ("peak-0.2", "peak-0.5", "peak-1"), 10),
    Task("sign-agreement", "polynomial", "sign-agreement", ("uniform",), 10),
    Task("bridge", "bridge", "", ("optimal", "mixed"), 10),
    Task("5m_vs_6m", "smac", "5m_vs_6m", QUALITIES, 5),
    Task("2s3z", "smac", "2s3z", QUALITIES, 5),
    Task("3m", "smac", "3m", QUALITIES, 5),
    Task("all-observant", "reacher", "all-observant", ("expert-mix",), 3),
    Task("independent", "reacher", "independent", ("expert-mix",), 3),
    Task("leader-only", "reacher", "leader-only", ("expert-mix",), 3),
    Task("halfcheetah", "halfcheetah", "", ("good", "medium", "good-medium"), 3),
    Task("ant-full", "ant", "full", ("medium", "full-replay"), 3),
    Task("ant-partial", "ant", "partial", ("medium", "full-replay"), 3),
)
COLUMNS = (
    "method task dataset seed return sampled_return normalized_return win_rate sampled_win_rate "
    "dataset_return dataset_win_rate best_return updates seconds commit machine"
).split()


class Cell(NamedTuple):
    method: str
    task: Task
    dataset: str

    @property
    def folder(self):
        return Path(*(files.slug(word) for word in (self.method, self.task.name, self.dataset)))

    @property
    def key(self):
        return self.method, self.task.name, self.dataset


def cells():
    """All cells, the cheap tasks first; their places are the numbers of `--index`."""
    return [
        Cell(method, task, dataset)
        for task in TASKS
        for method, (_, _, environments) in METHODS.items()
        if task.env in environments and task.name not in ELSEWHERE.get(method, ())
        for dataset in task.datasets
    ]


def words(cell, folder, resume):
    """The command of a cell."""
    script, flags, _ = METHODS[cell.method]
    choice = ["--env", cell.task.env, "--dataset", cell.dataset, "--num-seeds", cell.task.seeds]
    choice += ["--task", cell.task.task] if cell.task.task else []
    where = ["--out-dir", folder, "--threads", 1] + (["--resume"] if resume else [])
    path = ROOT / "algorithms" / f"{script}.py"
    return [sys.executable, *map(str, [path, *flags.split(), *choice, *where])]


def commit():
    """The commit's short name, with a "+" if files that this script does not write differ."""
    others = [f":!{file}" for file in WRITTEN]
    changed = files.git("status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return files.git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def train(cell, out_dir):
    """Train one cell, or what is left of it; returns the last line of what went wrong, or ""."""
    folder = Path(out_dir) / cell.folder
    if (folder / "summary.json").exists():
        return ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun = (folder / "config.json").exists()
    note = folder.with_name(folder.name + ".commit")  # of the state that began it
    if not begun:
        note.write_text(commit())
    run = subprocess.run(words(cell, folder, begun), cwd=ROOT, capture_output=True, text=True)
    if run.returncode == 0:
        return ""
    return (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]


def train_all(chosen, out_dir, processes):
    """Train cells, so many at a time; tells of each and returns how many failed."""
    failed = 0
    with ThreadPoolExecutor(processes) as pool:
        begun = {pool.submit(train, cell, out_dir): cell for cell in chosen}
        for done in as_completed(begun):
            name, trouble = " ".join(begun[done].key), done.result()
            print(f"{time.strftime('%H:%M:%S')} {name}: {trouble or 'done'}", flush=True)
            collect(out_dir)
            failed += bool(trouble)
    return failed


def collect(out_dir):
    """Bring results.csv up to date with the finished cells in a folder; other cells' lines stay."""
    kept, order = read_results(float=str), [cell.key for cell in cells()]
    for cell in cells():
        folder = Path(out_dir) / cell.folder
        if (folder / "summary.json").exists():
            about = json.loads((folder / "summary.json").read_text())
            state = folder.with_name(folder.name + ".commit").read_text()
            kept[cell.key] = lines(cell, about, state)
    known = sorted(kept, key=lambda key: order.index(key) if key in order else len(order))
    if kept:
        files.save_csv(RESULTS, [row for key in known for row in kept[key]])


def lines(cell, about, state):
    """The lines of results.csv for one cell, from its summary.json."""
    one = dict(zip(COLUMNS, cell.key)) | {name: about.get(name) for name in COLUMNS[9:12]}
    one |= {"updates": about["steps"], "seconds": round(about["wall_seconds"]), "commit": state}
    rows = []
    for place, seed in enumerate(about["seeds"]):
        row = one | {"seed": seed, "machine": about["device"]}
        for name in COLUMNS[4:9]:
            row[name] = about[name]["per_seed"][place] if about.get(name) else None
        rows.append({name: "" if row[name] is None else row[name] for name in COLUMNS})
    return rows


def read_results(float=float):
    """{(method, task, dataset): its rows} of results.csv, numbers as numbers."""
    found = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            for row in csv.DictReader(file):
                for name in COLUMNS[4:12]:
                    row[name] = float(row[name]) if row[name] else None
                found.setdefault((row["method"], row["task"], row["dataset"]), []).append(row)
    return found


def score(rows):
    """What a cell is judged by, one number a seed: battles won, normalised return, or return."""
    for name in ("win_rate", "normalized_return", "return"):
        if rows[0][name] is not None:
            return [row[name] for row in rows]


def sampled(rows):
    """The battles won by sampling, one number a seed; None where a method does not sample."""
    if rows[0]["sampled_win_rate"] is not None:
        return [row["sampled_win_rate"] for row in rows]


def random_play(task):
    """The mean return of random play, a share of 0."""
    if task.worst is not None:
        return task.worst
    games = envs.make(task.env, task.task, num_envs=1000)
    act = random_player(games, torch.Generator().manual_seed(0))
    return record(games, act, 0).returns.double().mean().item()


def welch(x, y):
    """The two-sided p-value of Welch's t-test for two arrays of at least two numbers.

    With t = sqrt(df) tan(a) Student's density is cos(a) ** (df - 1), which a sum integrates.
    Without any spread two means are equal or not: 1 or 0.
    """
    a, b = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if a + b == 0:
        return float(x.mean() == y.mean())
    t = abs(x.mean() - y.mean()) / (a + b) ** 0.5
    df = (a + b) ** 2 / (a**2 / (len(x) - 1) + b**2 / (len(y) - 1))
    angle = (np.arange(200_000) + 0.5) / 200_000 * np.pi / 2
    density = np.cos(angle) ** (df - 1)
    return float(density[angle > np.arctan(t / df**0.5)].sum() / density.sum())


def share(rows, worst):
    """0 is random play (or the scale's 0), 1 the best possible (or the scale's 1)."""
    mean = float(np.mean(score(rows)))
    if rows[0]["win_rate"] is not None or rows[0]["normalized_return"] is not None:
        return mean
    return (mean - worst) / (rows[0]["best_return"] - worst)


def text(number, digits=2):
    return f"{round(number, digits) + 0.0:.{digits}f}".replace("-", "−")  # no −0.00


def table(found, tasks, methods, score=score):
    """Mean ± standard error of each cell; * where Welch's test finds no difference from the best, †
    where the data are not those of the row's other cells."""
    known = [(task, d) for task in tasks for d in task.datasets]
    keys = [(name, task.name, d) for name in methods for task, d in known]
    found = {key: found[key] for key in keys if key in found and score(found[key]) is not None}
    methods = list(dict.fromkeys(name for name, *_ in found))
    digits = 3 if tasks[0].env == "polynomial" else 2
    out = [f"| task | data | {' | '.join(methods)} |", "|---" * (2 + len(methods)) + "|"]
    for task, dataset in known:
        row = {name: found.get((name, task.name, dataset)) for name in methods}
        scores = {name: np.array(score(rows)) for name, rows in row.items() if rows}
        if not scores:
            continue
        kind = "dataset_win_rate" if task.env == "smac" else "dataset_return"
        data = {name: text(row[name][0][kind], digits) for name in scores}
        most = max(data.values(), key=list(data.values()).count)
        best = max(scores, key=lambda name: scores[name].mean())
        line = ["", f"{task.title} `{dataset}`", most, *[""] * len(methods), ""]
        for name, values in scores.items():
            star = "*" if name == best or welch(values, scores[best]) >= 0.05 else ""
            star += "†" * (data[name] != most)
            spread = values.std(ddof=1) / len(values) ** 0.5
            star += f"±{text(spread, digits)}" if spread else ""
            line[3 + methods.index(name)] = text(values.mean(), digits) + star
        out.append(" | ".join(line).strip())
    return "\n".join(out)


def picture(found):
    """The heat map task x method, as the tables have it."""
    ran = {key[1:] for key in found}
    tasks = [(task, d) for task in TASKS for d in task.datasets if (task.name, d) in ran]
    methods = [m for m in METHODS if any(m == key[0] for key in found)]
    values = np.full((len(tasks), len(methods)), np.nan)
    scaled = [task for task, _ in tasks if task.env in ("matrix", "polynomial", "bridge")]
    worst = {task.name: random_play(task) for task in set(scaled)}
    for i, (task, dataset) in enumerate(tasks):
        for j, method in enumerate(methods):
            if (method, task.name, dataset) in found:
                values[i, j] = share(found[method, task.name, dataset], worst.get(task.name))
    size = 0.47 * len(methods) + 2, 0.19 * len(tasks) + 1.2
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    colours = colormaps["RdYlGn"].with_extremes(bad="0.85")
    axes.imshow(np.clip(values, 0, 1), cmap=colours, vmin=0, vmax=1, aspect="auto")
    middle = {"ha": "center", "va": "center", "fontsize": 7.5}
    for i, j in zip(*np.nonzero(~np.isnan(values))):
        ink = "black" if 0.15 < values[i, j] < 0.85 else "white"
        axes.text(j, i, text(max(values[i, j], -9.9)), color=ink, **middle)
    for i, ((task, _), (following, _)) in enumerate(zip(tasks, tasks[1:])):
        if task.env != following.env:  # a gap between the kinds of games
            axes.axhline(i + 0.5, color="white", linewidth=4)
    axes.set_yticks(range(len(tasks)), [f"{t.title} {d}" for t, d in tasks], fontsize=8)
    tilted = {"rotation": 45, "ha": "left", "rotation_mode": "anchor", "fontsize": 8.5}
    axes.set_xticks(range(len(methods)), methods, **tilted)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    said = "greedy teams: 0 plays like chance, 1 is the best possible, or our experts' level"
    axes.set_xlabel(said, fontsize=8.5)
    return figure


def spreads(found):
    """PJAP with a learned critic: scores in twin peaks over the spread of the data."""
    (task,) = [task for task in TASKS if task.name == "twin-peaks"]
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    for method, label in (("MADDPG+CQL", "MADDPG + CQL"), ("+PJAP", "with PJAP")):
        rows = {float(d.split("-")[1]): found[method, task.name, d] for d in task.datasets}
        values = np.array([score(rows[sigma]) for sigma in rows])  # (spreads, S)
        error = values.std(1, ddof=1) / values.shape[1] ** 0.5
        axes.errorbar(list(rows), values.mean(1), error, marker="o", label=label)
    axes.plot(list(rows), [each[0]["dataset_return"] for each in rows.values()], "k:", label="data")
    best = next(iter(rows.values()))[0]["best_return"]
    axes.axhline(best, color="k", linewidth=1, label="best possible")
    about = "σ of the recorded actions around a peak"
    axes.set(xlabel=about, ylabel="return", ylim=(-0.5, best + 0.1))
    axes.legend(frameon=False, fontsize=8)
    return figure


def render():
    """Put the tables into algorithms/README.md and draw the pictures."""
    found, page = read_results(), PAGE.read_text()
    begin, end = "<!-- grid -->\n", "<!-- end of grid -->"
    before, after = page.split(begin)[0], page.split(end)[1]
    parts = {"Games": (("matrix", "bridge"), score), "Polynomial games": (("polynomial",), score)}
    parts |= {"Battles, won": (("smac",), score), "Battles, won by sampling": (("smac",), sampled)}
    parts |= {"Bodies, normalised": (("reacher", "halfcheetah", "ant"), score)}
    tables = []
    for title, (environments, judge) in parts.items():
        tasks = [task for task in TASKS if task.env in environments]
        if any(key[1] == task.name for key in found for task in tasks):
            tables.append(f"**{title}**\n\n{table(found, tasks, METHODS, judge)}\n")
    files.save(PAGE, (before + begin + "\n" + "\n".join(tables) + "\n" + end + after).encode())
    files.save_figure(PICTURE, picture(found))
    if all((method, "twin-peaks", "peak-1") in found for method in ("MADDPG+CQL", "+PJAP")):
        files.save_figure(PICTURE.with_name("pjap.png"), spreads(found))


@dataclass
class Args:
    methods: list[str] = field(default_factory=list)  # only these, names or patterns; none: all
    tasks: list[str] = field(default_factory=list)  # the same: "xor", "xor/aa-ab-ba", or "matrix"
    index: int = -1  # only the cell of this number
    list: bool = False  # print the cells and end
    render: bool = False  # make the tables and the pictures from results.csv and end
    processes: int = 2  # how many cells at a time
    out_dir: str = str(ROOT / "runs" / "grid")  # where the runs are kept


def chosen(args):
    """The cells that the flags choose, with their numbers.

    Raises:
        ValueError: a pattern that no cell has, or a number that none of the chosen ones has.
    """
    found = list(enumerate(cells()))
    for what, patterns in enumerate((args.methods, args.tasks)):
        for pattern in patterns:
            if not any(matches(cell, what, [pattern]) for cell in cells()):
                raise ValueError(f"no {('method', 'task')[what]} is called {pattern!r}: see --list")
        found = [(n, c) for n, c in found if not patterns or matches(c, what, patterns)]
    found = [(n, c) for n, c in found if args.index in (-1, n)]
    if not found:
        raise ValueError(f"--index {args.index} is none of the chosen cells: see --list")
    return found


def matches(cell, what, patterns):
    """Whether one of the patterns is the cell's method, or (what: 1) one of its task's names."""
    names = [cell.method]
    if what:
        names = [cell.task.name, f"{cell.task.name}/{cell.dataset}", cell.task.env]
    return any(fnmatch.fnmatchcase(n.lower(), p.lower()) for n in names for p in patterns)


def main(args):
    if args.render:
        return render()
    found = chosen(args)
    if args.list:
        for number, cell in found:
            done = (Path(args.out_dir) / cell.folder / "summary.json").exists()
            print(f"{number:4d}  {'done' if done else '    '}  {' '.join(cell.key)}")
        return
    failed = train_all([cell for _, cell in found], args.out_dir, args.processes)
    if failed:
        raise SystemExit(f"{failed} of {len(found)} cells failed")


if __name__ == "__main__":
    launch(main, lambda: read_flags(Args, None, __doc__))
