"""The command line of a script: flags, presets, the arguments of a run to resume, and what numbers may be."""

import functools
import json
import math
import sys
import typing
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import envs
from data import collect, flags

MOST_SEEDS = 100_000  # all train at once, and a seed's random streams alone take 20 kB
MISFITS = LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError  # of a foreign file


def parse(kind, preset, argv, doc, kinds="", known=()):
    """Read the command line into a dataclass `kind`; where no flag speaks, the preset or a resumed run does.

    Args:
        preset: function of the arguments as they are without it, which returns the values to begin with, by name.
        doc: the script's docstring, whose first line heads `--help`.
        kinds, known: what the method is for, in words, and which of our environments that means; by default all.
    Raises:
        ValueError: an environment that the method cannot learn from.
    """
    read = functools.partial(flags.read, kind, argv, description=doc.splitlines()[0])
    args = read()
    if args.resume:
        return read(default=replace(saved_args(kind, args.out_dir), resume=True, out_dir=args.out_dir))
    if collect.is_path(getattr(args, "dataset", "")) and not read(default=replace(kind(), env="")).env:
        about = collect.about(args.dataset)  # a file of ours says what it was recorded in
        if ":" in about.get("env", "") and args.eval_episodes:  # but no file decides which code runs
            remedy = f"add --env {about['env']} to evaluate there, which runs that module, or --eval-episodes 0"
            raise ValueError(f"{args.dataset} was recorded in a game that is not ours: {remedy}")
        args.env, args.task = about.get("env", args.env), args.task or about.get("task", "")
        if not args.env and args.eval_episodes:
            remedy = "add --env, or --eval-episodes 0 to train without an environment"
            raise ValueError(f"{args.dataset} does not say which environment it was recorded in: {remedy}")
    known = known or tuple(envs.TASKS)
    if args.env and args.env not in known and ":" not in args.env:
        why = kinds if args.env in envs.TASKS else "unknown environment"
        raise ValueError(f"{why}: choose --env {', '.join(known)}, or package.module:factory, not {args.env!r}")
    return read(default=kind(**dict(env=args.env, task=args.task) | preset(args)))


def check_numbers(args, may_be_zero="", at_most_one="", any_sign=""):
    """Raise ValueError unless every number among the arguments is finite, above 0, and fits into 64 bits.

    `may_be_zero`, `at_most_one` and `any_sign` name the fields, separated by spaces, that may be 0, must not exceed 1,
    or may be 0 or less.
    """
    for name, value in asdict(args).items():
        zero, one = name in may_be_zero.split(), name in at_most_one.split()
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) not in (int, float):
                continue
            if name in any_sign.split():
                if not math.isfinite(number):
                    raise ValueError(f"--{name.replace('_', '-')} must be finite, not {number}")
                continue
            whole = MOST_SEEDS if name == "num_seeds" else sys.maxsize
            most = 1 if one else whole if type(number) is int else sys.float_info.max
            if not (number > 0 or (zero and number == 0)) or not number <= most:
                words = "at most 1" if one else "finite" if type(number) is float else f"at most {most}"
                least = "at least 0" if zero else "above 0"
                raise ValueError(f"--{name.replace('_', '-')} must be {least} and {words}, not {number}")


def saved_args(kind, folder):
    """The arguments, a dataclass `kind`, with which the run in `folder` was begun; ValueError if there are none."""
    path = Path(folder) / "config.json"
    try:
        saved, found = json.loads(path.read_text())["args"], kind()
        if saved.keys() != asdict(found).keys():
            raise KeyError
        for field in fields(kind):
            like, choices = type(getattr(found, field.name)), typing.get_args(field.type)
            value = tuple(saved[field.name]) if like is tuple else saved[field.name]
            if type(value) is not like and (type(value), like) != (int, float):
                raise TypeError
            if typing.get_origin(field.type) is typing.Literal and value not in choices:
                raise ValueError
            setattr(found, field.name, value)
        return found
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"no run to resume in {folder or '--out-dir'}") from None
    except MISFITS:
        raise ValueError(f"{path} is damaged, or of another version: the run cannot be resumed") from None


def choose_device(name):
    """The torch device for auto, cpu or cuda; ValueError for another name, or for cuda where there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
