"""Bad inputs by the hundred, over all scripts, flags, files and folders: each ends in one line, and loses nothing.

Every attempt is a process of its own, forked from this one, where torch is loaded already: `runs.launch`, as a user's
command would call it.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from dataclasses import fields

import h5py
import numpy as np
import pytest
import torch
from conftest import load_script

import data
from data import runs

MATRIX = ("--env", "matrix", "--task", "xor")
SHORT = ("--steps", "2", "--eval-every", "1", "--eval-episodes", "2", "--num-seeds", "2")
# script: flags of a run that ends at once
SCRIPTS = {
    "alberdice": (*MATRIX, "--dataset", "DATA", *SHORT, "--clone-steps", "2"),
    "bc": (*MATRIX, "--dataset", "DATA", *SHORT),
    "cfcql": (*MATRIX, "--dataset", "DATA", *SHORT, "--clone-steps", "2"),
    "inspo": (*MATRIX, "--dataset", "DATA", *SHORT, "--clone-steps", "2"),
    "iql": (*MATRIX, "--dataset", "DATA", *SHORT),
    "maddpg_cql_pjap": ("--env", "polynomial", *SHORT, "--dataset", "MOVES", "--window", "2"),
    "mappo": (
        *MATRIX,
        "--steps",
        "8",
        "--eval-every",
        "4",
        "--rollout",
        "2",
        "--num-envs",
        "2",
        "--eval-episodes",
        "2",
    ),
    "moma_ppo": (*MATRIX, "--dataset", "DATA", *SHORT, "--model-steps", "2", "--warmup", "1"),
    "omar": (*MATRIX, "--dataset", "DATA", *SHORT),
    "omiga": (*MATRIX, "--dataset", "DATA", *SHORT),
    "polygames": "--num-seeds 2 --num-samples 8 --steps 2 --full-batch-steps 2 --figures 1".split(),
    "td3_bc": ("--env", "polynomial", *SHORT, "--dataset", "MOVES"),
}
NUMBERS = ("nan", "inf", "-inf", "-1", "-0.5", "0", "1e400", "1e-400", str(10**20), str(2**63), str(-(2**63)), "")
WORDS = {
    "env": (
        "",
        "nope",
        ":",
        "a:",
        ":b",
        "json:dumps",
        "os:getcwd",
        "no.such:thing",
        "envs:TASKS",
        "é",
        "\0",
        "bridge ",
    ),
    "task": ("nope", "[", "[" * 3000, "[[1e400, 1], [0, 1]]", "[[1, 2], [3]]", "[]", "null", '{"a": 1}', "[[]]", "NaN"),
    "dataset": (
        "nope",
        "/",
        ".",
        "/dev/null",
        "nope.h5",
        "x" * 5000,
        "[0.1,-1]",
        "[1e400]",
        "\0",
        "GARBAGE",
        "peak--1",
    ),
    "env_kwargs": ("{", "[]", "1", '{"nope": 1}', '{"num_envs": 3}', "null", "{1: 2}", "[" * 3000),
    "device": ("gpu", "", "cuda:7", "meta", "CPU"),
    "out_dir": ("FILE", "FILE/below", "/proc/nothing/here", "/dev/null", "\0", "x" * 5000, "FULL"),
    "world_model": ("nope", "FILE", "/", "RUN", "x" * 5000),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dataset of each kind, a file that is none, somebody else's folder, and a finished run a script."""
    place = tmp_path_factory.mktemp("inputs")
    data.write(data.load("matrix", "xor", "aa-ab-ba", episodes=20), place / "data.h5")
    data.write(data.load("polynomial", "twin-peaks", "peak-0.5", episodes=20), place / "moves.h5")
    (place / "file").write_text("somebody's")
    (place / "garbage.h5").write_bytes(bytes(range(256)) * 20)
    (place / "full").mkdir()
    (place / "full" / "metrics.csv").write_text("somebody's\n")
    for name in SCRIPTS:
        code, said = attempt(place, name, words(place, name), place / "runs" / name)
        assert code == 0, (name, said)
    return place


def words(place, name, *more):
    known = {
        "DATA": "data.h5",
        "MOVES": "moves.h5",
        "FILE": "file",
        "FILE/below": "file/below",
        "GARBAGE": "garbage.h5",
    }
    known |= {"FULL": "full", "RUN": f"runs/{name}"}
    return [str(place / known[word]) if word in known else word for word in (*SCRIPTS[name], *more)]


def attempt(place, name, argv, out_dir=None, seconds=20):
    """Run a script with these words in a process of its own: its exit code, None if it had to be stopped, and what it
    said on the standard error."""
    argv, said = [*argv, *(("--out-dir", str(out_dir)) if out_dir else ())], place / "said.txt"
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setsid()
            os.chdir(place)
            sys.stdout = open(os.devnull, "w")
            sys.stderr = open(said, "w", encoding="utf-8", errors="replace")
            os.dup2(sys.stderr.fileno(), 2)
            sys.argv = [f"{name}.py", *argv]
            script = load_script(name)
            runs.launch(script.main, script.parse)
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 99
        finally:
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), said.read_text("utf-8", errors="replace")
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, ""


def holds(folder):
    """A hash of all files below a folder."""
    found = hashlib.sha1()
    for path in sorted(folder.rglob("*")):
        found.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()


# ---------------------------------------------------------------- what is drawn
def bad_flag(chance, place):
    """A number that no flag takes, or a word that names nothing."""
    name = chance.choice(list(SCRIPTS))
    field = chance.choice([f for f in fields(load_script(name).Args) if f.name not in ("threads", "track", "backend")])
    wrong = WORDS.get(field.name, NUMBERS)
    more = words(place, name, f"--{field.name.replace('_', '-')}", chance.choice(wrong))
    out = None if field.name == "out_dir" else place / "out"
    return name, more, out


def spoiled(chance, content):
    """Bytes with a hole, an end too early, or other bytes in some places."""
    content = bytearray(content)
    kind = chance.randrange(4)
    if kind == 0:
        return bytes(content[: chance.randrange(len(content))])
    if kind == 1:
        return bytes(content) + b"more"
    for _ in range(1 if kind == 2 else 200):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def bad_file(chance, place):
    """A dataset that is damaged, incomplete, or says what cannot be."""
    name = chance.choice([name for name in SCRIPTS if name not in ("mappo", "polygames")])
    good = place / ("moves.h5" if "MOVES" in SCRIPTS[name] else "data.h5")
    bad = place / f"bad{chance.choice(['.h5', '.h5', '.h5', '.npz', '.csv', ''])}"
    if chance.random() < 0.4:
        bad.write_bytes(spoiled(chance, good.read_bytes()))
    else:
        shutil.copy(good, bad)
        with h5py.File(bad, "r+") as file:
            key = chance.choice(list(file))
            value = np.array(file[key])
            del file[key]
            kind = chance.randrange(8)
            if kind == 0:
                file.create_dataset(key, shape=(10**6, 10**6, *value.shape[2:]), dtype=value.dtype, chunks=True)
            elif kind == 1:
                file[key] = np.full(value.shape, "word", dtype="S4")
            elif kind == 2:
                file[key] = value[..., None]
            elif kind == 3 and value.dtype.kind == "f":
                file[key] = np.full_like(value, chance.choice([np.nan, np.inf, -np.inf]))
            elif kind == 4:
                file[key] = value[:0]
            elif kind == 5:
                file[key] = value[1:]
            elif kind == 6:
                file[key] = np.full(value.shape, -7, dtype=value.dtype) if value.dtype != bool else value[:-1]
    flags = [str(bad) if word in ("DATA", "MOVES") else word for word in SCRIPTS[name]]
    return name, flags, place / "out"


class Bad:  # what a checkpoint must not be able to do
    def __reduce__(self):
        return os._exit, (77,)


def bad_folder(chance, place):
    """A run to resume of which a file is damaged, empty, missing, another script's, or a pickle that does something."""
    name, other = (chance.choice([name for name in SCRIPTS if name != "polygames"]) for _ in range(2))
    folder = place / "out"
    shutil.copytree(place / "runs" / name, folder)
    kept = [path for path in folder.iterdir() if path.suffix in (".pt", ".json") and path.name != "summary.json"]
    path = chance.choice(sorted(kept))
    kind = chance.randrange(7)
    if kind == 0 and path.suffix == ".json":
        about = json.loads(path.read_text())
        key = chance.choice(list(about["args"]))
        about["args"][key] = chance.choice([None, [], "word", -1, 1e300, {"a": 1}, True, 10**30])
        path.write_text(json.dumps(about))
    elif kind == 1:
        path.unlink()
    elif kind == 2:
        torch.save(chance.choice([{}, None, 0, [], "word", {"step": "word"}, {"step": 10**12}]), path)
    elif kind == 3:
        path.write_bytes(pickle.dumps(Bad()))
    elif kind == 4 and name != other and (place / "runs" / other / path.name).exists():
        shutil.copy(place / "runs" / other / path.name, path)
    else:
        path.write_bytes(spoiled(chance, path.read_bytes()))
    return name, ["--resume"], folder


@pytest.mark.parametrize("draw, count", [(bad_flag, 12), (bad_file, 12), (bad_folder, 12),
                                         *(pytest.param(d, 170, marks=pytest.mark.long)
                                           for d in (bad_flag, bad_file, bad_folder))])  # fmt: skip
def test_each_ends_in_a_line_and_loses_nothing(place, draw, count):
    chance, refused, endless, wrong = random.Random(f"{draw.__name__} {count}"), 0, 0, []
    before = holds(place / "full"), holds(place / "runs"), (place / "file").read_text()
    for _ in range(count):
        shutil.rmtree(place / "out", ignore_errors=True)
        name, argv, out = draw(chance, place)
        was = holds(place / "out") if (place / "out").exists() else None
        code, said = attempt(place, name, argv, out)
        lines = [line for line in said.splitlines() if line.strip()]
        if code is None:
            endless += 1
        elif code:
            refused += 1
            if len(lines) != 1 or "Traceback" in said or code != 1:
                wrong.append((name, [str(word)[:60] for word in argv], code, said[-700:]))
            if was and holds(place / "out") != was:
                wrong.append((name, argv, "changed a folder that it refused"))
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n\n".join(map(str, wrong))
    assert refused >= 0.5 * count and endless <= 0.1 * count, (refused, endless)
    assert before == (holds(place / "full"), holds(place / "runs"), (place / "file").read_text())
