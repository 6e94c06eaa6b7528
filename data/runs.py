"""The keeper of a run: its folder and files, its clock, its random streams, and how it ends. No learning code.

A script's `main` holds the loop and learns; a `Run` keeps what must not get lost:

    run = runs.Run("inspo", args)                          # the device, and a first look at the folder
    dataset = run.load()                                   # what to learn from, which checkpoints remember
    ...                                                    # make the networks
    resumed = run.begin(team=team, generators=generators)  # takes the folder, or goes on from its checkpoint
    for step in run.steps(args.steps, args.eval_every):    # the updates made so far: 0, or where the checkpoint stood
        if run.due(logs):
            run.record(logs, evaluate(...))                # a row of metrics.csv a seed, the checkpoint, a line
        if step < args.steps:
            logs = update(...)
    run.keep_team(act, (N, O), A, 0, policies)             # team.pt2, the greedy team
    run.finish("InSPO", evaluate(...), dataset)            # summary.json, the pictures, the table

    if __name__ == "__main__":
        runs.launch(main, parse)                           # one line and an exit code for whatever goes wrong
"""

import contextlib
import ctypes
import functools
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

import envs
from data import collect
from data.arguments import MISFITS, check_numbers, choose_device, parse, saved_args  # noqa: F401  scripts find it here
from data.checkpoints import (  # noqa: F401
    fingerprint, of_another_run, read_checkpoint, read_model, restore, save_checkpoint, save_model, snapshot, world_of,
)  # fmt: skip
from data.folder import device_name, provenance, refuse_taken, slug, take_folder  # noqa: F401
from data.results import (  # noqa: F401
    draw_curves, draw_open_loop, over_seeds, save, save_csv, save_figure, save_json, save_tensors, table_text,
)  # fmt: skip
from data.team import Player, react, save_team  # noqa: F401
from envs.play import play

MAY_CHANGE = {"resume", "out_dir", "device", "threads", "compile", "track"}  # what `--resume` lets a user change
NO_MEMORY = re.compile("allocate memory|out of memory|bad_alloc|overflow|Storage size|numel", re.I)  # RuntimeErrors
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
        torch.set_num_threads(min(args.threads, os.cpu_count() or 1))
        self.script, self.args, self.device, self.folder = script, args, choose_device(args.device), None
        self.seeds, self.began = list(range(args.seed, args.seed + args.num_seeds)), time.perf_counter()
        self.subject, self.saved, self.tracker = slug(args.env, args.task, getattr(args, "dataset", "")), None, None
        self.best = None  # the best possible return, where it is known
        self.learned_from = {}  # {what: its fingerprint}; a checkpoint goes on with the same only
        if args.resume:
            folder = Path(args.out_dir)
            for key, value in asdict(saved_args(type(args), folder)).items():
                if key not in MAY_CHANGE and getattr(args, key) != value:
                    flag, now = "--" + key.replace("_", "-"), getattr(args, key)
                    raise ValueError(f"{folder} was begun with {flag} {value}: it cannot go on with {now}")
            self.saved = read_checkpoint(folder, script, self.device)
        elif args.out_dir:
            refuse_taken(Path(args.out_dir))
        if args.compile and self.device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            raise ValueError("--compile needs a C++ compiler on the CPU, and there is none")
        if args.track:
            self.tracker = start_tracking(script, args)

    def load(self, discrete=None, **options):
        """The dataset of `--dataset` on the run's device; `options` are those of `data.load`.

        Args:
            discrete: whether the method needs discrete actions (True) or continuous ones (False).

        It is checked against the environment, except with `--eval-episodes 0` against one that is not ours: then there
        may be none.

        Raises:
            ValueError, OSError: no such dataset or environment, or they do not fit.
        """
        args = self.args
        if getattr(args, "backend", "torch") != "torch":
            envs.make(args.env, args.task, backend=args.backend).close()  # complain now if there is no such game
        made = game_options(args) if args.eval_episodes or args.env in envs.TASKS else None
        dataset = collect.load(args.env, args.task, args.dataset, self.device, options=made, **options)
        if discrete is not None and discrete == dataset.actions.is_floating_point():
            found, needed = ("discrete", "continuous")[discrete], ("continuous", "discrete")[discrete]
            raise ValueError(f"{args.dataset} holds {found} actions; {self.script} is for {needed} ones")
        rewards = dataset.info.get("team_reward", args.team_reward)
        if ":" in args.env and rewards != args.team_reward:
            raise ValueError(f"{args.dataset} holds the {rewards} of the agents' rewards: add --team-reward {rewards}")
        if made is not None:
            with contextlib.closing(game(args)) as one:
                self.best = one.best_return
        self.learned_from["the dataset"] = dataset.fingerprint()
        earned = dataset.reward[dataset.mask]  # (M,)
        say(f"{len(dataset.returns)} episodes, {len(earned)} steps, mean return {dataset.returns.mean():.2f}")
        if (earned == earned[0]).all():
            say(f"note: every step of {args.dataset} earns {earned[0]:g}")
        return dataset

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
        graph = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
        if self.device.type != "cuda":
            return graph
        # A CUDA graph writes its results to the same place each time, and no other graph may read them there.
        copies = functools.partial(tree_map_only, torch.Tensor, torch.clone)
        return lambda *inputs: copies(graph(*inputs))

    def begin(self, act=None, table="metrics.csv", **parts):
        """Take the folder, or set everything to where the checkpoint of `--resume` stood; returns whether it did.

        A run of successive loops begins each in turn. When it is resumed, it asks for the last one first, since the
        checkpoint is of one loop: `if not run.begin("team", ...): run.begin("model", ...)`.

        Args:
            act: the loop's name, where there are several; on the screen its steps are called so.
            table: the file for what `record` gets.
            parts: what checkpoints keep: modules, optimisers, generators, and lists of these.
        Raises:
            ValueError: another run has taken the folder, or the checkpoint is of another run.
            OSError: the folder cannot be written.
        """
        global owned
        self.act, self.table, self.parts = act, table, parts
        self.step, self.rows, self.seconds, self.timed = 0, [], 0.0, 0
        if self.folder is None:
            self.folder = owned = take_folder(self.script, self.args, self.device, self.subject)
            self.began -= self.saved["wall"] if self.saved else 0
        if not self.reached(act):
            return False
        saved, self.saved = self.saved, None
        for what, mark in self.learned_from.items():
            if saved["learned_from"].get(what) != mark:
                raise ValueError(f"{what} is not the one that the run in {self.folder} was begun with: begin a new run")
        try:
            restore(parts, saved["parts"])
        except MISFITS:
            raise of_another_run(self.folder) from None
        self.step, self.rows, self.seconds, self.timed = (saved[key] for key in ("step", "rows", "seconds", "timed"))
        return True

    def reached(self, act=None):
        """Whether the run to resume had come to this loop."""
        return self.saved is not None and self.saved["act"] == act

    def steps(self, last, every, stride=1):
        """Count updates: yields how many were made, from where the run stands to `last`, that one included.

        Evaluations are due before the first, after the last, and each time that `every` is passed; both counts are in
        units of a step, and an update makes `stride` of them.
        """
        if self.saved or self.step > last:  # the checkpoint is of no loop that was begun, or of a longer one
            raise of_another_run(self.folder)
        self.last, self.every, self.stride, self.name = last, every, stride, self.act or "step"
        self._clock(counts=False)
        while self.step < last:
            yield self.step
            self.step, self.timed = self.step + 1, self.timed + 1
        yield self.step

    def scheduled(self):
        """Whether an evaluation belongs here, made or not."""
        now, before = self.step * self.stride, (self.step - 1) * self.stride
        return self.step in (0, self.last) or now // self.every > before // self.every

    def due(self, logs=()):
        """Whether to evaluate now; if so, `logs` are checked first, before games could fail of what is not finite, and
        what passes until `record` does not count in updates per second."""
        if not self.scheduled() or self.rows and self.rows[-1]["step"] >= self.step * self.stride:
            return False  # a resumed run has this evaluation already
        self._clock(counts=True)
        self.check(dict(logs))
        return True

    def check(self, logs):
        """Raise FloatingPointError if a log is not finite; before an evaluation, where games would fail of it first."""
        for name, value in logs.items():
            if self.step and not value.isfinite().all():
                after = f"{self.step * self.stride} {self.name}s"
                raise FloatingPointError(f"{name} is not finite after {after}: try smaller step sizes")

    def record(self, logs, scores, line=""):
        """Write an evaluation: rows of the table, the checkpoint, and a line on the screen, in this order.

        Args:
            logs, scores: {column: (S,) tensor}, or (S, members) for a row a member; the scores are printed too.
            line: more to print.
        Returns:
            The new rows, as dictionaries.
        Raises:
            FloatingPointError: a log is not finite.
        """
        self.check(logs)
        step, values = self.step * self.stride, logs | scores
        columns = {name: value.flatten().tolist() for name, value in values.items()}
        new = []
        for k, (s, *member) in enumerate(itertools.product(*map(range, next(iter(values.values())).shape))):
            row = {"step": step, "seed": self.seeds[s]} | dict(zip(["member"], member))
            new.append(row | {name: column[k] for name, column in columns.items()})
        self.rows += new
        save_csv(self.folder / self.table, self.rows)
        save_checkpoint(self.folder, {
            "script": self.script, "act": self.act, "parts": snapshot(self.parts), "step": self.step,
            "rows": self.rows, "seconds": self.seconds, "timed": self.timed, "wall": time.perf_counter() - self.began,
            "learned_from": self.learned_from,
        })  # fmt: skip
        shown = [f"{name.replace('_', ' ')} {value.double().mean():9.4f}" for name, value in (scores or logs).items()]
        speed = f"{self.speed:7.1f} updates/s" if self.timed else ""
        say("   ".join(filter(None, (f"{self.name} {step:6d}", *shown, line, speed))))
        if self.tracker and self.table == "metrics.csv":
            self.tracker.log({name: value.double().mean().item() for name, value in values.items()}, step=step)
        self._clock(counts=False)
        return new

    @property
    def speed(self):
        """Updates per second, without evaluations and without the compiler's time."""
        return self.timed / max(self.seconds, 1e-9)

    def _clock(self, counts):
        """Begin to take the time; whether what has passed since the last beginning counts as training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now, compiled = time.perf_counter(), compile_seconds()
        if counts:
            self.seconds += now - self.since - (compiled - self.compiled)
        self.since, self.compiled = now, compiled

    def keep_team(self, act, views, actions, memory, *modules):
        """Write team.pt2, the greedy teams of all seeds as one program; see `data.team.save_team` for the arguments."""
        save_team(self.folder / "team.pt2", act, views, actions, memory, len(self.seeds), modules, self.device)

    def finish(self, method, scores, dataset=None, best=None, others=None, figures=None, xlabel="updates", **more):
        """Write summary.json and the pictures, then print the table; returns the summary.

        Args:
            method: what the paper calls it.
            scores: {"return": (S, E), ...} of the last policies; also "sampled_return", "win_rate", "sampled_win_rate".
                Empty if nothing was evaluated; then the curves show the logs.
            dataset: what it learned from.
            best: the best possible return.
            others: {yardstick: (prefix of its names in the summary, its scores)}.
            figures: {file name: figure}, beside the curves.
            more: what else the summary holds.
        """
        args, S = self.args, len(self.seeds)
        title = f"{method} on {self.subject}, {S} seed{'s' * (S > 1)}"
        summary = {"script": self.script, "env": args.env, "task": args.task,
                   "dataset": getattr(args, "dataset", "") or None, "steps": self.step * self.stride,
                   "seeds": self.seeds, "return": None, "normalized_return": None, "win_rate": None}  # fmt: skip
        teams = {method: ("", scores)} | (others or {})
        for prefix, found in teams.values():
            summary |= {f"{prefix}{name}": over_seeds(value) for name, value in found.items()}
        if dataset is not None:
            summary |= {"dataset_return": dataset.returns.mean().item(), "dataset_win_rate": dataset.win_rate}
            if dataset.references and "return" in scores:
                summary["normalized_return"] = over_seeds(dataset.normalize(scores["return"]))  # 0 random, 1 expert
        summary |= {"best_return": best} | more | {
            "updates_per_second": self.speed, "wall_seconds": time.perf_counter() - self.began,
            "device": device_name(self.device),
        }  # fmt: skip
        save_json(self.folder / "summary.json", summary)

        text = [f"\n{title}: {self.folder}"]
        for score, file, top in (("return", "curve.png", best), ("win_rate", "win_rate.png", None)):
            columns = {score: "greedy", f"sampled_{score}": "sampled"}
            columns = {column: label for column, label in columns.items() if column in scores}
            levels = {"dataset": summary.get(f"dataset_{score}"), "best possible": top}
            levels = {name: level for name, level in levels.items() if level is not None}
            if columns:
                figure = draw_curves(self.rows, columns, levels, title, xlabel, score.replace("_", " "))
                save_figure(self.folder / file, figure)
                cells = {name: [summary[f"{prefix}{c}"] for c in columns] for name, (prefix, _) in teams.items()}
                text.append(table_text(columns.values(), cells, levels, score.replace("_", " ")))
        if not scores:
            losses = {name: name.replace("_", " ") for name in self.rows[-1] if name.endswith("loss")}
            save_figure(self.folder / "curve.png", draw_curves(self.rows, losses, {}, title, xlabel, "loss"))
        for name, figure in (figures or {}).items():
            save_figure(self.folder / name, figure)
        if summary["normalized_return"]:
            text.append(table_text(["greedy"], {method: [summary["normalized_return"]]}, {}, "normalised"))
        say("\n".join(text))
        return summary


def compile_seconds():
    """The seconds that torch.compile has taken in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not there before something is compiled
    return sum(dynamo.compilation_time_metrics.get("_compile.compile_inner", ())) if dynamo else 0.0


def launch(main, read):
    """Run `main(read())`: the one place where a script's errors and Ctrl-C become a line and an exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a terminal without "±" must not end a run
    limit_memory()
    keep_memory()
    try:
        main(read())
    except KeyboardInterrupt:
        hint = f"; go on with: --resume --out-dir {owned}" if owned else ""
        print(f"interrupted{hint}", file=sys.stderr)
        sys.exit(130)  # the shell's code for Ctrl-C
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except OverflowError as error:
        sys.exit(f"error: a number is too large: choose smaller ones ({error})")
    except (MemoryError, RuntimeError, TypeError) as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        said = str(error).partition("\n")[0][:200] or type(error).__name__
        sys.exit(f"error: not enough memory: choose smaller sizes ({said})")


def limit_memory():
    """Let what exceeds this machine's memory fail at once; else the system would kill the run without a word."""
    try:
        import resource

        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if not torch.cuda.is_available() and (soft == resource.RLIM_INFINITY or soft > memory):
            resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))
    except (ImportError, ValueError, OSError):  # not on Windows
        pass


def keep_memory():
    """Keep what is freed for what comes next. The C library would hand tensors of megabytes back to the system and ask
    for them again, page by page, in every update: up to a fifth of the time, with minibatches as large as the papers'."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):  # glibc; musl has none
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which does not shrink


def say(text):
    """Print a line; a terminal that is gone does not end the run."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # or Python would try again as it leaves, and fail then


# ---------------------------------------------------------------- games
def game(args, num_envs=1, device="cpu", **options):
    """B games of what a run is about; raises ValueError as `envs.make` does, or for arguments that it does not know."""
    return envs.make(args.env, args.task, num_envs, device, **game_options(args), **options)


@contextlib.contextmanager
def evaluation(args, num_envs, device, step, **options):
    """The games of an evaluation after so many updates; at the end they are closed, and an error says when it was."""
    games = game(args, num_envs, device, **options)
    try:
        yield games
    except FloatingPointError as error:
        raise FloatingPointError(f"in the evaluation after {step} updates, {error}") from None
    finally:
        games.close()


@torch.no_grad()
def score(act, args, step, episodes, device, memory=0, clocks=None, film=None):
    """Play E games with the team of each seed, all in one batch, greedily, and from the same starts by sampling.

    The real StarCraft II (`--backend sc2`) plays `--games` at a time, and starts each as it likes.

    Args:
        act: function of obs (S, E, N, O), avail (S, E, N, A), or None where actions are continuous, and the memory
            (S, E, N, W), to the actions (S, E, N) or (S, E, N, A) and the memory; to sample it gets clocks, too.
        step: how many updates were made: each evaluation has games and chance of its own.
        memory: W, how many numbers an agent remembers; they are 0 at first.
        clocks: the shape of one seed's exponential draws, with which `act` samples, -1 in the place of its games; None
            to play greedily only.
        film: a list for what happened, `Played.film` of the greedy games and then of the sampled ones.
    Returns:
        {"return": (S, E)} and, where they exist, "sampled_return", "win_rate" and "sampled_win_rate"; {} for no games.
    """
    if not episodes:
        return {}
    S, E, found, options = args.num_seeds, episodes, {}, {}
    generators = [stream(args.seed + s, 10 + step, device) for s in range(S)]
    if getattr(args, "backend", "torch") != "torch":
        E, options = min(E, max(1, args.games // S)), {"backend": args.backend}

    def answer(sampled, obs, info, last):
        obs, avail = (x if x is None else x.unflatten(0, (S, E)) for x in (obs, info.get("avail_actions")))
        last = torch.zeros(*obs.shape[:3], memory, device=device) if last is None else last
        draws = []
        if sampled:
            shape = [E if size < 0 else size for size in clocks]
            draws = [torch.stack([torch.empty(shape, device=device).exponential_(generator=g) for g in generators])]
        actions, last = act(obs, avail, last, *draws)
        return actions.flatten(0, 1), last

    with evaluation(args, S * E, device, step, **options) as games:
        for sampled in (False, True)[: 1 + (clocks is not None)]:
            team, seeds = functools.partial(answer, sampled), [step + 1_000_003 * k for k in range(-(-episodes // E))]
            played = [play(games, team, None, seed, film is not None) for seed in seeds]
            for name, parts in (("return", [x.returns for x in played]), ("win_rate", [x.won for x in played])):
                if parts[0] is not None:
                    values = torch.cat([x.view(S, E) for x in parts], 1)[:, :episodes]
                    found["sampled_" * sampled + name] = values.double()
            if film is not None:
                film.append(played[0].film)
    return found


def game_options(args):
    """What `--env-kwargs` and `--team-reward` say to the environment, a dictionary; ValueError if it is no JSON."""
    try:
        options = json.loads(args.env_kwargs or "{}")
        if not isinstance(options, dict):
            raise ValueError
    except (ValueError, RecursionError):
        like = '{"N": 3}'
        raise ValueError(f"--env-kwargs must be a JSON object such as '{like}', not {args.env_kwargs[:80]!r}") from None
    if taken := options.keys() & {"env", "task", "num_envs", "device", "backend", "team_reward"}:
        raise ValueError(f"--env-kwargs cannot hold {', '.join(sorted(taken))}: the run itself sets that")
    return options | ({"team_reward": args.team_reward} if ":" in args.env else {})


def start_tracking(script, args):
    """A Weights & Biases run with these arguments; ValueError if the package is not installed."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--track needs Weights & Biases: pip install wandb") from None
    return wandb.init(project="offline-coordination", group=script, config=asdict(args))


# ---------------------------------------------------------------- chance
def stream(seed, purpose, device="cpu"):
    """A generator of its own for each seed and purpose, so that a seed's numbers do not depend on its neighbours."""
    return torch.Generator(device).manual_seed((1_000_003 * seed + purpose) % 2**63)
