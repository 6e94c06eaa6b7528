"""The keeper of a run: its folder and files, its clock, its random streams, and how it ends. No learning code.

A script's `main` holds the loop and learns; a `Run` keeps what must not get lost:

    run = runs.Run("inspo", args)                          # the device, and a first look at the folder
    ...                                                    # load the data, make the networks
    resumed = run.begin(team=team, generators=generators)  # takes the folder, or goes on from its checkpoint
    for step in run.steps(args.steps, args.eval_every):    # the updates made so far: 0, or where the checkpoint stood
        if run.due():
            run.record(logs, evaluate(...))                # a row of metrics.csv a seed, the checkpoint, a line
        if step < args.steps:
            logs = update(...)
    run.finish("InSPO", evaluate(...), dataset)            # summary.json, the pictures, the table

    if __name__ == "__main__":
        runs.launch(main, parse)                           # one line and an exit code for whatever goes wrong
"""

import csv
import functools
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

MAY_CHANGE = {"resume", "out_dir", "device", "threads", "compile", "track"}  # what `--resume` lets a user change
NO_MEMORY = re.compile("allocate memory|out of memory|overflow|Storage size|numel", re.I)  # of torch's RuntimeErrors
owned = None  # the folder of the run in this process, once it has taken one


# ---------------------------------------------------------------- one run
class Run:
    """The folder of one run, and what it needs to go on after a kill as if nothing had happened.

    Args:
        script: the script's name, which is also that of its folder in `runs/`.
        args: its arguments; `args.out_dir` becomes the folder, once the run has taken it.
    Attributes:
        device, seeds: where and for which seeds to train.
        folder: None until `begin`.
    Raises:
        ValueError: no such device; the folder holds a run already, or none to resume, or another one.
    """

    def __init__(self, script, args):
        torch.set_num_threads(args.threads)
        self.script, self.args, self.device = script, args, choose_device(args.device)
        self.seeds = list(range(args.seed, args.seed + args.num_seeds))
        self.folder, self.saved, self.tracker, self.began = None, None, None, time.perf_counter()
        self.step, self.rows, self.seconds, self.timed, self.stopped = 0, [], 0.0, 0, None
        if args.resume:
            folder = Path(args.out_dir)
            for key, value in asdict(saved_args(type(args), folder)).items():
                if key not in MAY_CHANGE and getattr(args, key) != value:
                    flag, now = "--" + key.replace("_", "-"), getattr(args, key)
                    raise ValueError(f"{folder} was begun with {flag} {value}: it cannot go on with {now}")
            self.saved = read_checkpoint(folder, self.device)
        elif args.out_dir:
            refuse_taken(Path(args.out_dir))
        if args.compile and self.device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            raise ValueError("--compile needs a C++ compiler on the CPU, and there is none")
        if args.track:
            self.tracker = start_tracking(script, args)

    def compile(self, function):
        """`function` as one graph that runs without Python, on a GPU a CUDA graph; itself with `--no-compile`.

        It must be a function of tensors that never waits for the host. Each other value of an argument that is no
        tensor, and each other network, makes a graph of its own.
        """
        if not self.args.compile:
            return function
        torch._dynamo.config.trace_autograd_ops = True  # the backward pass and the optimiser are in the graph
        torch._dynamo.config.recompile_limit = 64  # one graph for each agent's networks
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    def begin(self, act=None, table="metrics.csv", **parts):
        """Take the folder, or set everything to where the checkpoint of `--resume` stood; returns whether it did.

        Args:
            act: a name that tells the checkpoints of successive loops apart.
            table: the file for what `record` gets.
            parts: what checkpoints keep: modules, optimisers, generators, and lists of these.
        Raises:
            ValueError: another run has taken the folder, or the checkpoint is of another run.
            OSError: the folder cannot be written.
        """
        self.act, self.table, self.parts = act, table, parts
        self.step, self.rows, self.seconds, self.timed = 0, [], 0.0, 0
        if self.folder is None:
            self.folder = take_folder(self.script, self.args, self.device)
            if self.saved:
                self.began -= self.saved["wall"]
        if not self.saved or self.saved["act"] != act:
            return False
        saved, self.saved = self.saved, None
        try:
            if saved["parts"].keys() != parts.keys():
                raise KeyError
            for name, part in parts.items():
                restore(part, saved["parts"][name])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            where = f"{self.folder}/checkpoint.pt"
            raise ValueError(f"{where} is of another run: delete it to start this one again") from None
        self.step, self.rows, self.seconds, self.timed = (saved[key] for key in ("step", "rows", "seconds", "timed"))
        return True

    def steps(self, last, every, stride=1):
        """Count updates: yields how many were made, from where the run stands to `last`, that one included.

        Evaluations are due before the first, after the last, and each time that `every` is passed; both counts are in
        units of a step, and an update makes `stride` of them.
        """
        self.last, self.every, self.stride, self.name = last, every, stride, self.act or "step"
        self._start()
        while self.step < last:
            yield self.step
            self.step, self.timed = self.step + 1, self.timed + 1
        yield self.step

    def scheduled(self):
        """Whether an evaluation belongs here, made or not."""
        now, before = self.step * self.stride, (self.step - 1) * self.stride
        return self.step in (0, self.last) or now // self.every > before // self.every

    def due(self):
        """Whether to evaluate now; if so, the clock that tells updates per second stands still until `record`."""
        if not self.scheduled() or self.rows and self.rows[-1]["step"] >= self.step * self.stride:
            return False  # a resumed run has this evaluation already
        self._stop()
        return True

    def record(self, logs, scores, line=""):
        """Write an evaluation: rows of the table, the checkpoint, and a line on the screen, in this order.

        Args:
            logs, scores: {column: (S,) tensor}, or (S, members) for a row a member; the scores are printed too.
            line: more to print.
        Raises:
            FloatingPointError: a log is not finite.
        """
        step = self.step * self.stride
        for name, value in logs.items():
            if self.step and not value.isfinite().all():
                raise FloatingPointError(f"{name} is not finite after {step} {self.name}s: try smaller step sizes")
        columns = {name: value.tolist() for name, value in (logs | scores).items()}
        new = []
        for s, seed in enumerate(self.seeds):
            row, mine = {"step": step, "seed": seed}, {name: column[s] for name, column in columns.items()}
            members = next((range(len(x)) for x in mine.values() if isinstance(x, list)), None)
            each = [row | mine] if members is None else [
                row | {"member": e} | {name: x[e] for name, x in mine.items()} for e in members]  # fmt: skip
            new += each
        self.rows += new
        save_csv(self.folder / self.table, self.rows)
        state = {name: snapshot(part) for name, part in self.parts.items()}
        wall = time.perf_counter() - self.began
        save_checkpoint(self.folder, {
            "script": self.script, "act": self.act, "parts": state, "step": self.step, "rows": self.rows,
            "seconds": self.seconds, "timed": self.timed, "wall": wall,
        })  # fmt: skip
        shown = [f"{name.replace('_', ' ')} {value.double().mean():9.4f}" for name, value in scores.items()]
        speed = f"{self.speed:7.1f} updates/s" if self.timed else ""
        say("   ".join(filter(None, (f"{self.name} {step:6d}", *shown, line, speed))))
        if self.tracker and self.table == "metrics.csv":
            numbers = {name: sum(row[name] for row in new) / len(new) for name in new[0] if name not in ("step", "seed")}
            self.tracker.log(numbers, step=step)
        self._start()
        return new

    @property
    def speed(self):
        """Updates per second, without evaluations and without the compiler's time."""
        return self.timed / max(self.seconds, 1e-9)

    def _start(self):
        self.stopped, self.begun, self.compiling = False, time.perf_counter(), compile_seconds()

    def _stop(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if not self.stopped:
            self.seconds += time.perf_counter() - self.begun - (compile_seconds() - self.compiling)
        self.stopped = True

    def finish(self, method, scores, dataset=None, best=None, others=None, figures=None, xlabel="updates", **more):
        """Write summary.json and the pictures, then print the table; returns the summary.

        Args:
            method: what the paper calls it.
            scores: {"return": (S, E), ...} of the last policies; also "sampled_return", "win_rate", "sampled_win_rate".
            dataset: what it learned from.
            best: the best possible return.
            others: {yardstick: (prefix of its names in the summary, its scores)}.
            figures: {file name: figure}, beside the curves.
            more: what else the summary holds.
        """
        args, S = self.args, len(self.seeds)
        title = f"{method} on {slug(args.env, args.task, args.dataset)}, {S} seed{'s' * (S > 1)}"
        step = self.step * self.stride
        summary = {"script": self.script, "env": args.env, "task": args.task, "dataset": args.dataset or None,
                   "steps": step, "seeds": self.seeds}  # fmt: skip
        summary |= {"return": None, "normalized_return": None, "win_rate": None}
        teams = {method: ("", scores)} | (others or {})
        for prefix, found in teams.values():
            summary |= {f"{prefix}{name}": over_seeds(value) for name, value in found.items()}
        if dataset is not None:
            summary |= {"dataset_return": dataset.returns.mean().item(), "dataset_win_rate": dataset.win_rate}
            if dataset.references:
                summary["normalized_return"] = over_seeds(dataset.normalize(scores["return"]))  # 0 random, 1 expert
        summary |= {"best_return": best} | more | {
            "updates_per_second": self.speed, "wall_seconds": time.perf_counter() - self.began,
            "device": device_name(self.device),
        }  # fmt: skip
        figures, tables = dict(figures or {}), []
        for score in ("return", "win_rate"):
            columns = {score: "greedy", f"sampled_{score}": "sampled"}
            columns = {column: label for column, label in columns.items() if column in scores}
            if not columns:
                continue
            levels = {"dataset": summary.get(f"dataset_{score}"), "best possible": best if score == "return" else None}
            levels = {name: level for name, level in levels.items() if level is not None}
            name = score.replace("_", " ")
            curve = draw_curves(self.rows, columns, levels, title, xlabel, name)
            figures["curve.png" if score == "return" else f"{score}.png"] = curve
            cells = {name: [summary[f"{prefix}{column}"] for column in columns] for name, (prefix, _) in teams.items()}
            tables.append((list(columns.values()), cells, levels, name))
        if summary["normalized_return"]:
            tables.append((["greedy"], {method: [summary["normalized_return"]]}, {}, "normalised"))
        save_json(self.folder / "summary.json", summary)
        for name, figure in figures.items():
            save_figure(self.folder / name, figure)
        say(f"\n{title}: {self.folder}")
        for table in tables:
            say(table_text(*table))
        return summary


def compile_seconds():
    """The seconds that torch.compile has taken in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not there before something is compiled
    return sum(dynamo.compilation_time_metrics.get("_compile.compile_inner", ())) if dynamo else 0.0


def launch(main, parse):
    """Run `main(parse())`: the one place where a script's errors and Ctrl-C become a line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without "±" must not end a run
    try:
        main(parse())
    except KeyboardInterrupt:
        hint = f"; go on with: --resume --out-dir {owned}" if owned else ""
        print(f"interrupted{hint}", file=sys.stderr)
        sys.exit(130)  # the shell's code for Ctrl-C
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            sys.exit(f"error: not enough memory: choose smaller sizes ({str(error).splitlines()[0][:200]})")
        raise


def say(text):
    """Print a line; a terminal that is gone does not end the run."""
    try:
        print(text, flush=True)
    except OSError:
        pass


# ---------------------------------------------------------------- arguments
def parse(kind, preset, argv, doc):
    """Read the command line into a dataclass `kind`; where no flag speaks, the preset or a resumed run does.

    Args:
        preset: function of the arguments as they are without it, which returns the values to begin with, by name.
        doc: the script's docstring, whose first line heads `--help`.
    """
    import tyro

    read = functools.partial(tyro.cli, kind, args=argv, description=doc.splitlines()[0])
    args = read()
    if args.resume:
        return read(default=replace(saved_args(kind, args.out_dir), resume=True, out_dir=args.out_dir))
    return read(default=kind(**preset(args)))


def check_numbers(args, may_be_zero="", at_most_one=""):
    """Raise ValueError unless every number among the arguments is finite, above 0, and fits into 64 bits.

    `may_be_zero` and `at_most_one` name the fields, separated by spaces, that may be 0 or must not exceed 1.
    """
    for name, value in asdict(args).items():
        zero, one = name in may_be_zero.split(), name in at_most_one.split()
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) not in (int, float):
                continue
            most = 1 if one else sys.maxsize if type(number) is int else sys.float_info.max
            if not (number > 0 or (zero and number == 0)) or not number <= most:
                words = "at most 1" if one else "finite" if type(number) is float else f"at most {most}"
                least = "at least 0" if zero else "above 0"
                raise ValueError(f"--{name.replace('_', '-')} must be {least} and {words}, not {number}")


def saved_args(kind, folder):
    """The arguments, a dataclass `kind`, with which the run in `folder` was begun; ValueError if there are none."""
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text())["args"]
        kinds = {field.name: type(getattr(kind(), field.name)) for field in fields(kind)}
        if saved.keys() != kinds.keys():
            raise KeyError
        saved = {name: tuple(x) if kinds[name] is tuple else x for name, x in saved.items()}
        if any(type(x) is not kinds[name] and {type(x), kinds[name]} != {int, float} for name, x in saved.items()):
            raise TypeError
        return kind(**saved)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no run to resume in {folder or '--out-dir'}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged, or of another version: the run cannot be resumed") from None


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


# ---------------------------------------------------------------- the folder
def refuse_taken(folder):
    for file in ("config.json", "checkpoint.pt"):
        if (folder / file).exists():
            go_on = "--resume goes on with it; else delete it or change --out-dir"
            raise ValueError(f"{folder} holds a run already: {go_on}")


def take_folder(script, args, device):
    """Make the run's folder with its `config.json`, or the one to resume ours; returns its path.

    Without `--out-dir` it is a new one, `runs/SCRIPT/TASK-TIME`. Of two runs that want one folder, one gets it.
    """
    global owned
    if not args.resume:
        name = f"runs/{script}/{slug(args.env, args.task, args.dataset)}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder, again = Path(args.out_dir or name), 1
        while not args.out_dir:  # a folder that no run beside this one has taken
            try:
                folder.mkdir(parents=True)
                args.out_dir = str(folder)
            except FileExistsError:
                folder, again = Path(f"{name}-{again}"), again + 1
        refuse_taken(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"script": script, "args": asdict(args)} | provenance(device)
        save(folder / "config.json", (json.dumps(content, indent=2) + "\n").encode(), new=True)
    owned = Path(args.out_dir)
    return owned


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


def start_tracking(script, args):
    """A Weights & Biases run with these arguments; ValueError if the package is not installed."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--track needs Weights & Biases: pip install wandb") from None
    return wandb.init(project="offline-coordination", group=script, config=asdict(args))


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


def save_tensors(path, content):
    """Write nested dictionaries and lists of tensors, numbers and strings."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    save(path, buffer.getvalue())


def save_checkpoint(folder, content):
    save_tensors(Path(folder) / "checkpoint.pt", content)


def read_checkpoint(folder, device):
    """The content of `checkpoint.pt`, or None if the run was stopped before it wrote one.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        kinds = {"script": str, "act": (str, type(None)), "parts": dict, "step": int, "rows": list}
        kinds |= {"seconds": (int, float), "timed": int, "wall": (int, float)}
        if not all(isinstance(saved[name], kind) for name, kind in kinds.items()) or saved["step"] < 0:
            raise TypeError
        return saved
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it to start the run again") from None


def snapshot(part):
    """The state of a module, an optimiser or a generator, or of a list of these."""
    if isinstance(part, (list, tuple)):
        return [snapshot(each) for each in part]
    return part.get_state() if hasattr(part, "get_state") else part.state_dict()


def restore(part, state):
    """Put what `snapshot` returned back; raises half a dozen kinds of errors if it does not fit."""
    if isinstance(part, (list, tuple)):
        for each, its in zip(part, state, strict=True):
            restore(each, its)
    elif hasattr(part, "set_state"):
        part.set_state(state.cpu())
    else:
        part.load_state_dict(state)


# ---------------------------------------------------------------- chance and results
def stream(seed, purpose, device="cpu"):
    """A generator of its own for each seed and purpose, so that a seed's numbers do not depend on its neighbours."""
    return torch.Generator(device).manual_seed((1_000_003 * seed + purpose) % 2**63)


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
