"""The keeper of a run: its folder and files, its clock, its random streams. No learning code.

A script's `main` holds the loop and learns; a `Run` keeps what must not get lost:

    run = Run("bc", args)
    data = arrange(run.load(), args)
    ...                                                    # make the networks
    run.begin(policies=policies, adam=adam, generators=generators)
    for step in run.steps(player):                         # evaluates and keeps where it is due
        run.logs = update(...)
    run.finish("BC", player)                               # team.pt2, summary.json, pictures, table
"""

import contextlib
import functools
import itertools
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

import envs
from data import recipes
from data.run import files
from data.run.curves import draw_curves, over_seeds, table_text
from data.run.evaluate import game, game_options, score, stream
from data.run.team import save_team

MAY_CHANGE = {"resume", "out_dir", "device", "threads", "compile", "track"}  # by --resume

GRAPHS = {  # how torch.compile makes them
    "trace_autograd_ops": True,  # gradients are part of a graph
    "nested_graph_breaks": True,  # a graph may end inside a function: at an optimiser's step
    "recompile_limit": 64,  # each agent's networks make graphs of their own
}


class Run:
    """The folder of one run, and what it needs to go on after a kill as if nothing had happened.

    Args:
        script: the script's name, which is also that of its folder in `runs/`.
        args: its arguments; `args.out_dir` becomes the folder, once the run has taken it.
    Attributes:
        device, seeds: where and for which seeds to train.
        folder: None until `begin`.
        subject: what it is about, in words.
        dataset, views, actions: what `load` found: N and O; A, or 0 where actions are continuous.
        best: the best possible return, or None.
        learned_from: {what: its fingerprint}; a checkpoint goes on with the same only.
        logs: {column: (S,) tensor, or (S, members)} of the last update, to be written when due.
        rows: the table so far, dictionaries.
        scores: what the last evaluation found.
    Raises:
        ValueError: no such device; the folder holds a run already, or none to resume.
    """

    latest = None  # the folder that the last run in this process has taken

    def __init__(self, script, args):
        torch.set_num_threads(min(args.threads, os.cpu_count() or 1))
        self.script, self.args = script, args
        self.device = choose_device(args.device)
        self.seeds = list(range(args.seed, args.seed + args.num_seeds))
        self.began = time.perf_counter()
        self.subject = files.slug(args.env, args.task, getattr(args, "dataset", ""))
        self.folder = self.saved = self.dataset = self.best = self.tracker = None
        self.learned_from = {}
        if args.resume:
            self._read_checkpoint()
        elif args.out_dir:
            files.refuse_taken(Path(args.out_dir))
        if args.compile and self.device.type == "cpu":
            if not any(map(shutil.which, ("g++", "c++", "clang++"))):
                raise ValueError("--compile needs a C++ compiler on the CPU, and there is none")
        if args.track:
            self.tracker = start_tracking(script, args)

    def _read_checkpoint(self):
        """Read what the run to resume has kept; None if it was stopped before it kept anything."""
        folder = Path(self.args.out_dir)
        for key, value in files.read_config(folder)["args"].items():
            now = getattr(self.args, key)
            value = tuple(value) if isinstance(value, list) else value
            if key not in MAY_CHANGE and now != value:
                flag = "--" + key.replace("_", "-")
                raise ValueError(f"{folder} was begun with {flag} {value}: not {now}")
        if (folder / "checkpoint.pt").exists():
            self.saved = files.read_tensors(folder / "checkpoint.pt", self.device)
            if self.saved.get("script") != self.script:
                raise of_another_run(folder)

    # ------------------------------------------------------------ before the loop
    def load(self, discrete=None, **options):
        """The dataset of --dataset on the run's device; `options` are those of `data.load`.

        It is checked against the environment, except with --eval-episodes 0 against one that is not
        ours: then there may be none.

        Args:
            discrete: whether the method needs discrete actions (True) or continuous ones (False).
        Raises:
            ValueError, OSError: no such dataset or environment, or they do not fit.
        """
        args = self.args
        playable = args.eval_episodes > 0 or args.env in envs.TASKS
        made = game_options(args) if playable else None
        names = args.env, args.task, args.dataset
        dataset = recipes.load(*names, self.device, episodes=args.episodes, options=made, **options)
        continuous = dataset.actions.is_floating_point()
        if discrete is not None and discrete == continuous:
            kind, wanted = ("continuous", "discrete") if continuous else ("discrete", "continuous")
            raise ValueError(
                f"{args.dataset} holds {kind} actions; this method needs {wanted} ones"
            )
        rewards = dataset.info.get("team_reward", args.team_reward)
        if ":" in args.env and rewards != args.team_reward:
            raise ValueError(
                f"{args.dataset} holds the agents' {rewards}: add --team-reward {rewards}"
            )
        if playable:
            with contextlib.closing(game(args)) as one:
                self.best = one.best_return
        self.dataset, self.views = dataset, dataset.obs.shape[2:]
        self.actions = 0 if continuous else dataset.avail_actions.shape[-1]
        self.learned_from["the dataset"] = dataset.fingerprint()
        episodes, steps = len(dataset.returns), int(dataset.mask.sum())
        self.say(
            f"{episodes} episodes, {steps} steps, mean return {dataset.returns.mean().item():.2f}"
        )
        return dataset

    def streams(self, purpose, device=None):
        """A random generator of its own for each seed and purpose."""
        return [stream(seed, purpose, device or self.device) for seed in self.seeds]

    def compile(self, function):
        """`function` compiled, on a GPU into CUDA graphs; itself with --no-compile.

        It must be a function of tensors that never waits for the host. Only an optimiser's step
        may end a graph. Each other value of an argument that is no tensor, and each other network,
        makes graphs of its own.
        """
        if not self.args.compile:
            return function
        for name, value in GRAPHS.items():
            setattr(torch._dynamo.config, name, value)
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        graph = torch.compile(function, dynamic=False, mode=mode)
        if self.device.type != "cuda":
            return graph

        # A CUDA graph writes its results to the same place each time.
        def copied(*inputs):
            torch.compiler.cudagraph_mark_step_begin()
            return tree_map_only(torch.Tensor, torch.clone, graph(*inputs))

        return functools.wraps(function)(copied)

    def begin(self, act=None, table="metrics.csv", **parts):
        """Take the folder, or go on from the checkpoint of --resume; returns whether it went on.

        A run of successive loops begins each in turn.

        Args:
            act: the loop's name, where there are several; on the screen its steps are called so.
            table: the file for the rows.
            parts: what checkpoints keep: modules, optimisers, generators, and lists of these.
        Raises:
            ValueError: another run has taken the folder, or the checkpoint is of another run.
        """
        self.act, self.table, self.parts = act, table, parts
        self.step, self.rows, self.seconds, self.timed = 0, [], 0.0, 0
        self.recorded, self.logs, self.scores = -1, {}, {}
        if self.folder is None:
            self._take_folder()
        if not self.reached(act):
            return False
        saved, self.saved = self.saved, None
        for what, mark in self.learned_from.items():
            if saved["learned_from"].get(what) != mark:
                wanted = f"the one that the run in {self.folder} was begun with"
                raise ValueError(f"{what} is not {wanted}: begin a new run")
        try:
            files.restore(parts, saved["parts"])
        except (LookupError, ValueError, RuntimeError):
            raise of_another_run(self.folder) from None
        self.rows, self.seconds, self.timed = saved["rows"], saved["seconds"], saved["timed"]
        self.step = self.recorded = saved["step"]
        return True

    def _take_folder(self):
        if self.args.resume:
            self.folder = Path(self.args.out_dir)
            for part in self.folder.glob("*.part"):  # left by a kill in the middle of writing
                part.unlink(missing_ok=True)
            self.began -= self.saved["wall"] if self.saved else 0
        else:
            self.folder = files.take_folder(self.script, self.args, self.device, self.subject)
        Run.latest = self.folder

    def reached(self, act=None):
        """Whether the run to resume had come to this loop."""
        return self.saved is not None and self.saved["act"] == act

    # ------------------------------------------------------------ the loop
    def steps(self, player=None, last=None, every=None, stride=1):
        """Count updates: yields how many were made, from where the run stands up to `last` - 1.

        Evaluations are before the first, after the last, and each time that `every` is passed.
        There `player` is scored, if there is one, and the logs and scores are written.

        Args:
            last, every: by default --steps and --eval-every.
            stride: what one update counts; `every`, the rows and the seeds of games are in these
                units, `last` is in updates.
        """
        self.last = self.args.steps if last is None else last
        self.every = self.args.eval_every if every is None else every
        self.stride = stride
        if self.saved or self.step > self.last:  # the checkpoint is of another or a longer loop
            raise of_another_run(self.folder)
        self._clock(counts=False)
        while True:
            if self.scheduled(self.step) and self.recorded < self.step:
                self._clock(counts=True)
                self._evaluate(player)
                self._clock(counts=False)
            if self.step == self.last:
                return
            yield self.step
            self.step += 1
            self.timed += 1

    def scheduled(self, step):
        """Whether an evaluation belongs after `step` updates, made or not."""
        now, before = step * self.stride, (step - 1) * self.stride
        return step in (0, self.last) or now // self.every > before // self.every

    def _evaluate(self, player):
        """Score the player, write rows, the table and the checkpoint, and print a line."""
        count = self.step * self.stride
        for name, value in self.logs.items():
            if not value.isfinite().all():
                unit = self.act or "step"
                raise FloatingPointError(
                    f"{name} is not finite after {count} {unit}s: try smaller step sizes"
                )
        self.scores = {}
        if player:
            self.scores = score(player, self.args, count, self.args.eval_episodes, self.device)
        values = self.logs | {name: value.mean(1) for name, value in self.scores.items()}
        self.rows += self._rows(count, values)
        if self.rows:
            files.save_csv(self.folder / self.table, self.rows)
        self.recorded = self.step
        self._save_checkpoint()
        self._show(count, values)

    def _rows(self, count, values):
        """A row for each seed, or for each seed and member."""
        if not values:
            return []
        columns = {name: value.tolist() for name, value in values.items()}
        shape = next(iter(values.values())).shape
        rows = []
        for s, *member in itertools.product(*map(range, shape)):
            row = {"step": count, "seed": self.seeds[s]}
            if member:
                row["member"] = member[0]
            for name, column in columns.items():
                row[name] = column[s][member[0]] if member else column[s]
            rows.append(row)
        return rows

    def _save_checkpoint(self):
        content = {name: getattr(self, name) for name in CHECKPOINT}
        content["parts"] = files.snapshot(self.parts)
        content["wall"] = time.perf_counter() - self.began
        files.save_tensors(self.folder / "checkpoint.pt", content)

    def _show(self, count, values):
        words = [f"{self.act or 'step'} {count:6d}"]
        for name in self.scores or values:
            mean = values[name].double().mean().item()
            words.append(f"{name.replace('_', ' ')} {mean:9.4f}")
        if self.timed:
            words.append(f"{self.speed:7.1f} updates/s")
        self.say("   ".join(words))
        if self.tracker and self.table == "metrics.csv":
            means = {name: value.double().mean().item() for name, value in values.items()}
            self.tracker.log(means, step=count)

    @property
    def speed(self):
        """Updates per second, without evaluations and without the compiler's time."""
        return self.timed / max(self.seconds, 1e-9)

    def _clock(self, counts):
        """Begin to take the time; whether what has passed since the last beginning was training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now, compiled = time.perf_counter(), compile_seconds()
        if counts:
            self.seconds += now - self.since - (compiled - self.compiled)
        self.since, self.compiled = now, compiled

    # ------------------------------------------------------------ after the loop
    def score(self, player, film=None):
        """The last evaluation, ten times as many games: `data.run.evaluate.score`."""
        count, episodes = self.step * self.stride, 10 * self.args.eval_episodes
        return score(player, self.args, count, episodes, self.device, film)

    def finish(self, method, player, scores=None, others=None, figures=None, **more):
        """Write team.pt2, summary.json and the pictures, then print the table; returns the summary.

        Args:
            method: what the paper calls it.
            scores: {"return": (S, E), ...} of the player, if they are known already.
            others: {yardstick: (prefix of its names in the summary, its scores)}.
            figures: {file name: figure}, beside the curves.
            more: what else the summary holds.
        """
        scores = self.score(player) if scores is None else scores
        sizes = self.views, self.actions, self.device
        save_team(self.folder / "team.pt2", player, len(self.seeds), *sizes)
        teams = {method: ("", scores)} | (others or {})
        summary = self._summary(teams) | more
        summary |= {
            "updates_per_second": self.speed,
            "wall_seconds": time.perf_counter() - self.began,
            "device": files.device_name(self.device),
        }
        files.save_json(self.folder / "summary.json", summary)
        count = len(self.seeds)
        title = f"{method} on {self.subject}, {count} seed{'s' * (count > 1)}"
        text = [f"\n{title}: {self.folder}"]
        for name in ("return", "win_rate"):
            text += self._tell(name, title, teams, summary)
        if not scores:
            self._draw_losses(title)
        for name, figure in (figures or {}).items():
            self.save_figure(name, figure)
        if summary["normalized_return"]:
            cells = {method: [summary["normalized_return"]]}
            text.append(table_text(["greedy"], cells, {}, "normalised"))
        self.say("\n".join(text))
        return summary

    def _summary(self, teams):
        """What summary.json says of the scores of {name: (prefix, scores)}, and of the dataset."""
        args, dataset = self.args, self.dataset
        summary = {"script": self.script, "env": args.env, "task": args.task}
        summary["dataset"] = getattr(args, "dataset", "") or None
        summary |= {"steps": self.step * self.stride, "seeds": self.seeds}
        summary |= {"return": None, "normalized_return": None, "win_rate": None}
        for prefix, scores in teams.values():
            for name, value in scores.items():
                summary[prefix + name] = over_seeds(value)
                if dataset is not None and dataset.references and prefix + name == "return":
                    normalized = dataset.normalize(value)  # 0: a random team, 1: an expert one
                    summary["normalized_return"] = over_seeds(normalized)
        if dataset is not None:
            summary["dataset_return"] = dataset.returns.mean().item()
            summary["dataset_win_rate"] = dataset.win_rate
        summary["best_return"] = self.best
        return summary

    def _tell(self, name, title, teams, summary):
        """Draw the curves of a score, "return" or "win_rate"; returns its table, if it is known."""
        columns = {name: "greedy", f"sampled_{name}": "sampled"}
        columns = {column: label for column, label in columns.items() if summary.get(column)}
        if not columns:
            return []
        levels = {"dataset": summary.get(f"dataset_{name}")}
        if name == "return":
            levels["best possible"] = self.best
        levels = {label: level for label, level in levels.items() if level is not None}
        words = name.replace("_", " ")
        unit = "updates" if self.stride == 1 else "environment steps"
        figure = draw_curves(self.rows, columns, levels, title, unit, words)
        self.save_figure("curve.png" if name == "return" else "win_rate.png", figure)
        cells = {}
        for team, (prefix, _) in teams.items():
            cells[team] = [summary[prefix + column] for column in columns]
        return [table_text(columns.values(), cells, levels, words)]

    def _draw_losses(self, title):
        """The curves of a run without games."""
        losses = [name for name in (self.rows or [{}])[-1] if name.endswith("loss")]
        labels = {name: name.replace("_", " ") for name in losses}
        figure = draw_curves(self.rows, labels, {}, title, "updates", "loss")
        self.save_figure("curve.png", figure)

    def save_figure(self, name, figure):
        files.save_figure(self.folder / name, figure)

    def say(self, text):
        say(text)


CHECKPOINT = "script", "act", "step", "rows", "seconds", "timed", "learned_from"


def of_another_run(folder):
    remedy = "delete it to start this one again"
    return ValueError(f"{folder}/checkpoint.pt is of another run: {remedy}")


def choose_device(name):
    """The torch device for auto, cpu or cuda."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compile_seconds():
    """The seconds that torch.compile has taken in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not there before something is compiled
    times = dynamo.compilation_time_metrics if dynamo else {}
    return sum(times.get("_compile.compile_inner", ()))


def say(text):
    """Print a line; a terminal that is gone does not end the run."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # or Python would try again as it leaves, and fail then


def start_tracking(script, args):
    """A Weights & Biases run with these arguments; ValueError if the package is not installed."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--track needs Weights & Biases: pip install wandb") from None
    return wandb.init(project="offline-coordination", group=script, config=asdict(args))
