"""The command line: flags, presets, a run to resume, what numbers may be; how a program ends."""

import ctypes
import math
import shlex
import signal
import sys
from dataclasses import asdict, replace

import tyro

import envs
from data import layout, recipes
from data.run.files import read_config
from data.run.keeper import Run, say


# ---------------------------------------------------------------- reading
def read_flags(kind, argv, doc, default=None):
    """The command line as a dataclass `kind`; the first line of `doc` heads --help."""
    return tyro.cli(kind, args=argv, description=doc.splitlines()[0], default=default)


def read_args(
    kind,
    presets,
    argv,
    doc,
    kinds="",
    known=(),
    in_units="",
    may_be_zero="",
    at_most_one="",
    any_sign="",
):
    """The arguments of a script. Where no flag speaks, its presets do, or the run to resume.

    Args:
        kind: the dataclass of the arguments.
        presets: what differs from `kind`, by environment; "env task" comes on top of "env", and ""
            is for games that are not ours.
        kinds, known: what the method is for, in words and as our environments; by default all.
        in_units: the fields whose presets for matrix games and for games that are not ours are in
            units of the payoffs' range, or of the spread of the data's returns.
        may_be_zero, at_most_one, any_sign: the fields whose numbers may be 0, must not exceed 1, or
            may have any sign; all others are above 0. Names are separated by spaces.
    Raises:
        ValueError: a number or an environment that cannot be used, or no run to resume.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    unset = {name: "" for name in ("env", "task", "dataset") if hasattr(kind(), name)}
    words = [word for word in argv if word not in ("-h", "--help")]  # help comes with the presets
    flags = read_flags(kind, words, doc, replace(kind(), **unset))
    if flags.resume:
        default = replace(saved_args(kind, flags.out_dir), resume=True, out_dir=flags.out_dir)
    else:
        env, task = choose_game(flags, kind())
        known = known or tuple(envs.TASKS)
        if env and env not in known and ":" not in env:
            why = kinds if env in envs.TASKS else "unknown environment"
            names = ", ".join(known)
            raise ValueError(f"{why}: choose --env {names}, or package.module:factory, not {env!r}")
        values = preset(presets, env, task, in_units, flags)
        default = replace(kind(), **values)
    args = read_flags(kind, argv, doc, default)
    check_numbers(args, may_be_zero.split(), at_most_one.split(), any_sign.split())
    return args


def choose_game(flags, default):
    """The environment and the task: of the flags, of the file that is the dataset, or the usual."""
    path = getattr(flags, "dataset", "")
    if flags.env or not recipes.is_path(path):
        return flags.env or default.env, flags.task
    about = recipes.about(path)
    env, task = about.get("env", ""), flags.task or about.get("task", "")
    if ":" in env and flags.eval_episodes:  # no file decides which code runs
        remedy = f"add --env {env} to evaluate there, which runs that module, or --eval-episodes 0"
        raise ValueError(f"{path} was recorded in a game that is not ours: {remedy}")
    if not env and flags.eval_episodes:
        remedy = "add --env, or --eval-episodes 0 to train without an environment"
        raise ValueError(f"{path} does not say which environment it was recorded in: {remedy}")
    return env, task


def preset(presets, env, task, in_units, flags):
    """The values to begin with, by name."""
    ours = env in envs.TASKS
    values = dict(presets.get(env if ours else "", {}))
    task = task or values.get("task", "")
    if ours:
        usual_task, _ = recipes.default(env, task)
        task = task or usual_task
        values |= presets.get(f"{env} {task}", {})
    values |= {"env": env, "task": task}
    if hasattr(flags, "dataset"):
        values.setdefault("dataset", recipes.default(env, task)[1] if ours else "")
    if in_units and env == "matrix":
        payoff = envs.make(env, task).payoff
        scale(values, in_units, (payoff.max() - payoff.min()).item() or 1.0)
    elif in_units and not ours:
        unit, cells = layout.scales(recipes.load("", "", flags.dataset))
        scale(values, in_units, unit)
        values["one_hot"] = cells
    return values


def scale(values, names, unit):
    for name in names.split():
        if name in values:
            values[name] *= unit


def check_numbers(args, may_be_zero, at_most_one, any_sign):
    """Raise ValueError for a number among the arguments that is out of its range."""
    for name, value in asdict(args).items():
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) not in (int, float):
                continue
            low = -math.inf if name in any_sign else 0
            high = 1 if name in at_most_one else math.inf
            zero_is_wrong = number == 0 and name not in may_be_zero + any_sign
            if zero_is_wrong or not low <= number <= high or not math.isfinite(number):
                least = "at least 0" if name in may_be_zero else "above 0"
                words = "finite" if name in any_sign else least
                most = " and at most 1" if name in at_most_one else ""
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be {words}{most}, not {number}")


def saved_args(kind, folder):
    """The arguments, a dataclass `kind`, with which the run in `folder` was begun."""
    saved = read_config(folder)["args"]
    lists = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
    try:
        return kind(**saved | lists)
    except TypeError:
        raise ValueError(f"{folder} holds a run of another script or version") from None


# ---------------------------------------------------------------- how a program begins and ends
def launch(main, parse):
    """Run `main(parse())`; what goes wrong ends in one line and an exit code."""
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # a terminal without "±" must not end a run
    keep_memory()
    try:
        main(parse())
    except KeyboardInterrupt:
        folder = shlex.quote(str(Run.latest)) if Run.latest else ""
        say(f"interrupted; go on with: --resume --out-dir {folder}" if folder else "interrupted")
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def keep_memory():
    """Let the C library keep what is freed. To hand tensors of megabytes back and to ask for them
    again in every update takes up to a fifth of the time."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):  # glibc has it
        library.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which does not shrink
