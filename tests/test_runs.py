"""The keeper of a run, on a toy: walkers that drift to a number, and a world that can be learned first."""

import csv
import importlib.util
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command, complains

from data import folder, results, runs

TOY = '''"""A toy that keeps a run like any other script."""

import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, ROOT)
import torch

from data import runs


@dataclass
class Args:
    env: str = "toy"
    task: str = ""
    dataset: str = "none"
    seed: int = 0
    num_seeds: int = 3
    steps: int = 12
    model_steps: int = 0  # updates of the world, if it is to be learned first
    stride: int = 1
    eval_every: int = 4
    lr: float = 0.1
    kind: Literal["slow", "fast"] = "slow"
    sizes: tuple[int, ...] = (1, 2)
    device: str = "cpu"
    threads: int = 1
    compile: bool = False
    out_dir: str = ""
    resume: bool = False
    track: bool = False


def pause(act, step):
    """Where a test may stop the run."""


def meet(args):
    """Wait until all processes of a test are here."""
    if there := os.environ.get("MEET"):
        Path(there, str(os.getpid())).touch()
        while len(list(Path(there).iterdir())) < int(os.environ["HOW_MANY"]):
            time.sleep(0.001)


class Walkers(torch.nn.Module):
    def __init__(self, seeds, members=()):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(seeds, *members))


def update(walkers, adam, generators):
    noise = torch.stack([torch.randn(walkers.place.shape[1:], generator=g) for g in generators])
    loss = (walkers.place - 3 + noise) ** 2
    adam.zero_grad()
    loss.sum().backward()
    adam.step()
    return {"loss": loss.detach()}


def main(args):
    run = runs.Run("toy", args)
    S = args.num_seeds
    world, team = Walkers(S, (2,)), Walkers(S)
    adams = [torch.optim.Adam(walkers.parameters(), args.lr) for walkers in (world, team)]
    generators = [runs.stream(seed, 0) for seed in run.seeds]
    meet(args)
    if not run.begin("team" if args.model_steps else None, world=world, team=team, adams=adams, generators=generators):
        if args.model_steps:
            run.begin("model", "world_model.csv", world=world, adam=adams[0], generators=generators)
            logs = {"loss": torch.zeros(S, 2)}
            for step in run.steps(args.model_steps, args.eval_every):
                pause("model", step)
                if run.due():
                    run.record(logs, {"error": world.place.detach() ** 2})
                if step < args.model_steps:
                    logs = update(world, adams[0], generators)
            run.begin("team", world=world, team=team, adams=adams, generators=generators)
    logs = {"loss": torch.zeros(S)}
    for step in run.steps(args.steps, args.eval_every, args.stride):
        pause("team", step)
        if run.due():
            run.record(logs, {"return": team.place.detach()})
        if step < args.steps:
            logs = update(team, adams[1], generators)
    scores = {"return": team.place.detach()[:, None].expand(S, 4), "sampled_return": world.place.detach()}
    figures = {"more.png": runs.draw_curves(run.rows, {"loss": "loss"}, {}, "loss", "step")}
    return run.finish("Toy", {"return": scores["return"]}, best=3.0, figures=figures, extra=[1, 2],
                      others={"the world": ("world_", {"return": scores["sampled_return"]})})


def parse(argv=None):
    args = runs.parse(Args, lambda args: {"steps": 12} if args.kind == "slow" else {"steps": 6}, argv, __doc__, known=("toy",))
    runs.check_numbers(args, may_be_zero="seed model_steps")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
'''


class Stopped(Exception):
    """What a test raises in the middle of a run, for a kill."""


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """The path of the toy script."""
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(TOY.replace("sys.path.insert(0, ROOT)", f"sys.path.insert(0, {str(ROOT)!r})"))
    return path


@pytest.fixture
def toy(script, monkeypatch):
    """The toy script as a module of its own."""
    monkeypatch.setattr(runs, "owned", None)
    spec = importlib.util.spec_from_file_location("toy", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy", module)
    spec.loader.exec_module(module)
    return module


def go(toy, out, *words):
    return toy.main(toy.parse([*map(str, words), "--out-dir", str(out)]))


def resume(toy, out, *words):
    return go(toy, out, "--resume", *words)


def start(script, *words, **options):
    """The toy as a process of its own that has finished."""
    return subprocess.run(
        [sys.executable, script, *map(str, words)], capture_output=True, text=True, timeout=120, **options
    )


def table(folder, name="metrics.csv"):
    return list(csv.DictReader((folder / name).open()))


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def flat(state):
    """All tensors and numbers of a nest, in order."""
    if isinstance(state, dict):
        state = [state[key] for key in state]
    return [x for each in state for x in flat(each)] if isinstance(state, list | tuple) else [state]


def same(one, other):
    one, other = flat(one), flat(other)
    return len(one) == len(other) and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(one, other)
    )


# ---------------------------------------------------------------- what a run writes
def test_a_run_fills_its_folder(toy, tmp_path, capsys):
    summary = go(toy, tmp_path / "run")
    folder = tmp_path / "run"
    names = {"config.json", "metrics.csv", "summary.json", "curve.png", "more.png", "checkpoint.pt"}
    assert {file.name for file in folder.iterdir()} == names
    rows = table(folder)
    assert [(row["step"], row["seed"]) for row in rows] == [(str(t), str(s)) for t in (0, 4, 8, 12) for s in range(3)]
    assert list(rows[0]) == ["step", "seed", "loss", "return"]
    assert [float(row["return"]) for row in rows[-3:]] == summary["return"]["per_seed"]
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == "toy" and {"git_commit", "versions", "device"} < config.keys()
    assert config["args"] == {**vars(toy.Args()), "out_dir": str(folder), "sizes": [1, 2]}
    saved = checkpoint(folder)
    assert saved["script"] == "toy" and saved["act"] is None and saved["step"] == 12 and len(saved["rows"]) == 12
    assert saved["parts"].keys() == {"world", "team", "adams", "generators"}
    assert saved["parts"]["team"]["place"].double().tolist() == summary["return"]["per_seed"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("curve.png", "more.png"))
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in said[:4]] == [["step", str(t)] for t in (0, 4, 8, 12)]
    assert "updates/s" in said[3] and f"{summary['return']['mean']:.4f}" in said[3]
    assert said[5] == f"Toy on toy-none, 3 seeds: {folder}"
    assert [line.split()[0] for line in said[6:]] == ["return", "Toy", "the", "best"] and "±" in said[7]


def test_the_summary_has_the_keys_of_the_contract(toy, tmp_path):
    found = go(toy, tmp_path / "run")
    assert found == json.loads((tmp_path / "run" / "summary.json").read_text())
    keys = {"script", "env", "task", "dataset", "steps", "seeds", "return", "normalized_return", "win_rate"}
    assert keys | {"updates_per_second", "wall_seconds", "device"} < found.keys()
    assert found["script"] == "toy" and found["env"] == "toy" and found["task"] == "" and found["dataset"] == "none"
    assert found["steps"] == 12 and found["seeds"] == [0, 1, 2]
    assert found["return"].keys() == {"mean", "stderr", "per_seed"} and len(found["return"]["per_seed"]) == 3
    assert found["normalized_return"] is None and found["win_rate"] is None
    assert found["best_return"] == 3 and found["extra"] == [1, 2] and "world_return" in found
    assert found["updates_per_second"] > 0 and found["wall_seconds"] > 0 and found["device"].endswith(" CPU")


def test_a_summary_with_wins_and_references(toy, tmp_path, capsys):
    """Where games can be won and the data have a scale, both are in the summary, the table and a picture."""
    args = toy.parse(["--out-dir", str(tmp_path / "run"), "--num-seeds", "2"])
    run = runs.Run("toy", args)
    run.begin()
    for _ in run.steps(0, 1):
        if run.due():
            run.record({}, {"return": torch.zeros(2), "win_rate": torch.zeros(2), "sampled_win_rate": torch.zeros(2)})
    dataset = SimpleNamespace(returns=torch.tensor([1.0, 3.0]), win_rate=0.25, references=(0, 8),
                              normalize=lambda x: x / 8)  # fmt: skip
    scores = {"return": torch.tensor([[1.0, 3.0], [6.0, 6.0]]), "win_rate": torch.tensor([[1, 0], [1, 1]]).bool()}
    found = run.finish("Toy", scores | {"sampled_win_rate": torch.ones(2, 2)}, dataset, xlabel="games")
    assert found["return"] == {"mean": 4, "stderr": 2, "per_seed": [2, 6]}
    assert found["normalized_return"] == {"mean": 0.5, "stderr": 0.25, "per_seed": [0.25, 0.75]}
    assert found["win_rate"]["per_seed"] == [0.5, 1] and found["sampled_win_rate"]["mean"] == 1
    assert found["dataset_return"] == 2 and found["dataset_win_rate"] == 0.25
    assert (tmp_path / "run" / "win_rate.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    head = "win rate                            greedy             sampled"
    ours = "Toy                        0.5000 ± 0.2500"
    for line in (head, "dataset                    0.2500", "normalised", ours):
        assert line in said


def test_results_are_there_before_anything_is_printed(toy, tmp_path, monkeypatch):
    lines, say = [], runs.say

    def spy(text):
        there = {file.name for file in (tmp_path / "run").iterdir()}
        if text.startswith("step"):  # a row is in the table, and in the checkpoint, before the line
            assert len(table(tmp_path / "run")) == len(checkpoint(tmp_path / "run")["rows"]) == 3 * (len(lines) + 1)
        else:
            assert {"summary.json", "curve.png", "more.png"} < there
        lines.append(text)
        say(text)

    monkeypatch.setattr(runs, "say", spy)
    go(toy, tmp_path / "run")
    assert len(lines) == 5


def test_rows_of_members(toy, tmp_path):
    go(toy, tmp_path / "run", "--model-steps", 4, "--num-seeds", 2)
    rows = table(tmp_path / "run", "world_model.csv")
    assert list(rows[0]) == ["step", "seed", "member", "loss", "error"]
    where = [(row["step"], row["seed"], row["member"]) for row in rows]
    assert where == [(t, s, e) for t in "04" for s in "01" for e in "01"]
    place = checkpoint(tmp_path / "run")["parts"]["world"]["place"]
    assert [float(row["error"]) for row in rows[-4:]] == pytest.approx((place**2).flatten().tolist())


@pytest.mark.parametrize("last, every, stride, expected", [
    (12, 4, 1, [0, 4, 8, 12]),
    (10, 4, 1, [0, 4, 8, 10]),
    (3, 100, 1, [0, 3]),
    (0, 4, 1, [0]),
    (6, 250, 100, [0, 3, 5, 6]),  # each time that a multiple of 250 is passed: 300, 500, and the end
    (4, 100, 100, [0, 1, 2, 3, 4]),
    (4, 30, 100, [0, 1, 2, 3, 4]),
])  # fmt: skip
def test_when_evaluations_are_due(toy, tmp_path, last, every, stride, expected):
    run = runs.Run("toy", toy.Args(num_seeds=1, out_dir=str(tmp_path / "run")))
    run.begin()
    steps, due, scheduled = [], [], []
    for step in run.steps(last, every, stride):
        steps.append(step)
        scheduled += [step] if run.scheduled() else []
        if run.due():
            due.append(step)
            (row,) = run.record({}, {"return": torch.tensor([1.0])})
            assert row == {"step": step * stride, "seed": 0, "return": 1.0}
            assert run.scheduled() and not run.due()  # made by now
    assert steps == list(range(last + 1)) and due == scheduled == expected
    assert run.step == last and run.timed == last


def test_a_number_that_is_not_finite_ends_the_run_and_is_named(toy, tmp_path, monkeypatch):
    def broken(walkers, adam, generators):
        return {"fine": torch.zeros(3), "kl": torch.tensor([0.0, float(bad), 0.0])}

    monkeypatch.setattr(toy, "update", broken)
    for bad in ("nan", "inf"):
        with pytest.raises(FloatingPointError, match="^kl is not finite after 4 steps: try smaller step sizes$"):
            go(toy, tmp_path / bad)
        assert [row["step"] for row in table(tmp_path / bad)] == ["0"] * 3  # what was written before is as it was
        assert checkpoint(tmp_path / bad)["step"] == 0 and not (tmp_path / bad / "summary.json").exists()
    with pytest.raises(FloatingPointError, match="after 400 steps"):
        go(toy, tmp_path / "stride", "--stride", 100, "--eval-every", 400)
    assert "nan" in {row["loss"] for row in nothing_yet(toy, tmp_path / "first")}


def nothing_yet(toy, out):
    """The rows of a run whose logs are unknown before its first update."""
    run = runs.Run("toy", toy.Args(out_dir=str(out)))
    run.begin()
    for _ in run.steps(0, 1):
        run.record({"loss": torch.full((3,), torch.nan)}, {"return": torch.zeros(3)})
    return table(out)


# ---------------------------------------------------------------- the clock
def test_neither_evaluations_nor_the_compiler_count_as_updates(toy, tmp_path, monkeypatch):
    """A second an update, a hundred an evaluation, and the compiler takes a thousand within the first update."""
    now, compiled = [0.0], [7.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], strftime=time.strftime)
    monkeypatch.setattr(runs, "time", clock)
    monkeypatch.setattr(runs, "compile_seconds", lambda: compiled[0])
    run = runs.Run("toy", toy.Args(out_dir=str(tmp_path / "run")))
    now[0] += 50  # the data are read
    run.begin()
    for step in run.steps(10, 3):
        if run.due():
            now[0] += 100
            run.record({}, {"return": torch.zeros(3)})
        if step < 10:
            now[0] += 1
            if step == 0:
                now[0], compiled[0] = now[0] + 1000, compiled[0] + 1000
    assert run.seconds == 10 and run.timed == 10 and run.speed == 1
    now[0] += 30  # the last evaluation
    summary = run.finish("Toy", {"return": torch.zeros(3, 1)})
    assert summary["updates_per_second"] == 1
    assert summary["wall_seconds"] == 50 + 10 + 1000 + 5 * 100 + 30


def test_what_the_compiler_takes_is_known():
    before = runs.compile_seconds()
    torch.compile(lambda x: x.sin() + 1, backend="eager", fullgraph=True)(torch.zeros(3))
    assert runs.compile_seconds() > before


def test_time_goes_on_where_it_stood(toy, tmp_path, monkeypatch):
    stop_at(toy, monkeypatch, "team", 9)
    with pytest.raises(Stopped):
        go(toy, tmp_path / "run")
    saved = checkpoint(tmp_path / "run")
    assert saved["timed"] == 8 and saved["seconds"] > 0 and saved["wall"] >= saved["seconds"]
    torch.save(saved | {"seconds": 40.0, "wall": 1000.0}, tmp_path / "run" / "checkpoint.pt")
    monkeypatch.setattr(toy, "pause", lambda *_: None)
    summary = resume(toy, tmp_path / "run")
    assert 1000 < summary["wall_seconds"] < 1100 and summary["updates_per_second"] == pytest.approx(12 / 40, rel=0.1)


# ---------------------------------------------------------------- kill and resume
def stop_at(toy, monkeypatch, act, step):
    def pause(*where):
        if where == (act, step):
            raise Stopped

    monkeypatch.setattr(toy, "pause", pause)


VOLATILE = {"wall_seconds", "updates_per_second"}


def lasting(folder):
    """All of a run that must not depend on whether it was stopped."""
    saved, summary = checkpoint(folder), json.loads((folder / "summary.json").read_text())
    tables = [(folder / name).read_bytes() for name in ("metrics.csv", "world_model.csv") if (folder / name).exists()]
    kept = {name: saved[name] for name in ("act", "parts", "step", "rows", "timed")}
    return [tables, kept, {name: value for name, value in summary.items() if name not in VOLATILE}]


@pytest.mark.parametrize("model_steps", [0, 5])
def test_stopped_anywhere_and_resumed_is_the_same_to_the_bit(toy, tmp_path, monkeypatch, model_steps):
    """One loop, or two with a table each. Stopped before each update and at the end, and stopped once more after."""
    words = ("--model-steps", model_steps, "--steps", 6, "--eval-every", 2)
    go(toy, tmp_path / "whole", *words)
    whole, pause = lasting(tmp_path / "whole"), toy.pause
    places = [("model", step) for step in range(model_steps + 1) if model_steps] + [("team", t) for t in range(7)]
    for k, place in enumerate(places):
        out = tmp_path / f"{place[0]}{place[1]}"
        for which in (place, places[min(k + 3, len(places) - 1)]):
            stop_at(toy, monkeypatch, *which)
            with pytest.raises(Stopped):
                resume(toy, out) if out.exists() else go(toy, out, *words)
        monkeypatch.setattr(toy, "pause", pause)
        resume(toy, out)
        assert same(lasting(out), whole), place
    assert len(whole[0]) == 1 + (model_steps > 0)
    if model_steps:  # a resumed run does not learn the world again
        stop_at(toy, monkeypatch, "model", 0)
        resume(toy, tmp_path / "team3")


@pytest.mark.parametrize("file", ["metrics.csv", "checkpoint.pt", "summary.json", "curve.png"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_stopped_while_it_writes_and_resumed_is_the_same_to_the_bit(toy, tmp_path, monkeypatch, file, after):
    """Stopped by each file's second writing, or just after it; half a file is never in the place of a whole one."""
    go(toy, tmp_path / "whole")
    count, replace = [0], os.replace

    def stop(part, path):
        count[0] += path.name == file
        last = path.name == file and count[0] == (2 if file in ("metrics.csv", "checkpoint.pt") else 1)
        if not last or after:
            replace(part, path)
        if last:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "replace", stop)
        with pytest.raises(Stopped):
            go(toy, tmp_path / "run")
    (tmp_path / "run" / "metrics.csv.0123456789ab.part").write_bytes(b"half")  # as a kill, unlike this, leaves one
    resume(toy, tmp_path / "run")
    assert same(lasting(tmp_path / "run"), lasting(tmp_path / "whole"))
    assert not list((tmp_path / "run").glob("*.part"))


def test_stopped_before_the_first_checkpoint_a_run_starts_again(toy, tmp_path, monkeypatch):
    go(toy, tmp_path / "whole")
    stop_at(toy, monkeypatch, "team", 0)
    with pytest.raises(Stopped):
        go(toy, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.json"]
    monkeypatch.setattr(toy, "pause", lambda *_: None)
    resume(toy, tmp_path / "run")
    assert same(lasting(tmp_path / "run"), lasting(tmp_path / "whole"))


def test_a_run_knows_which_loop_it_had_reached(toy, tmp_path, monkeypatch):
    words = ("--model-steps", 3)
    for place, had in ((("model", 2), "model"), (("team", 0), "model"), (("team", 2), "team")):
        out = tmp_path / f"{place[0]}{place[1]}"
        stop_at(toy, monkeypatch, *place)
        with pytest.raises(Stopped):
            go(toy, out, *words)
        run = runs.Run("toy", toy.parse(["--resume", "--out-dir", str(out)]))
        assert [act for act in ("model", "team", None) if run.reached(act)] == [had]
    assert not any(map(runs.Run("toy", toy.Args(out_dir=str(tmp_path / "new"))).reached, ("model", "team", None)))


def test_resume_keeps_the_arguments_and_says_what_cannot_change(toy, tmp_path):
    go(toy, tmp_path / "run", "--lr", 0.2, "--kind", "fast", "--sizes", 4, 5, 6, "--steps", 9)
    args = toy.parse(["--resume", "--out-dir", str(tmp_path / "run"), "--threads", "2"])
    assert (args.lr, args.kind, args.sizes, args.steps) == (0.2, "fast", (4, 5, 6), 9)
    assert args.resume and args.threads == 2  # those of the machine may change
    with pytest.raises(ValueError, match="run was begun with --lr 0.2: it cannot go on with 0.3$"):
        resume(toy, tmp_path / "run", "--lr", 0.3)
    with pytest.raises(ValueError, match="was begun with --num-seeds 3: it cannot go on with 4$"):
        resume(toy, tmp_path / "run", "--num-seeds", 4)
    for nowhere in (tmp_path / "nowhere", tmp_path / "run" / "config.json", ""):
        with pytest.raises(ValueError, match="no run to resume in "):
            resume(toy, nowhere)


# ---------------------------------------------------------------- files that are not what they seem
def half_a_run(toy, monkeypatch, out, *words):
    stop_at(toy, monkeypatch, "team", 9)
    with pytest.raises(Stopped):
        go(toy, out, *words)
    monkeypatch.setattr(toy, "pause", lambda *_: None)


def walk(rows, **changes):
    return [row | changes for row in rows]


WRONG = {
    "{}": lambda saved: {},
    "None": lambda saved: None,
    "0": lambda saved: 0,
    "a list": lambda saved: [1, 2],
    "a tensor": lambda saved: torch.zeros(3),
    "another script's": lambda saved: saved | {"script": "inspo"},
    "no script": lambda saved: {k: v for k, v in saved.items() if k != "script"},
    "another loop's": lambda saved: saved | {"act": "model"},
    "act is a number": lambda saved: saved | {"act": 3},
    "parts is a list": lambda saved: saved | {"parts": []},
    "a part too few": lambda saved: saved | {"parts": {k: v for k, v in saved["parts"].items() if k != "adams"}},
    "a part too many": lambda saved: saved | {"parts": saved["parts"] | {"more": {}}},
    "a part of another shape": lambda saved: saved | {"parts": saved["parts"] | {"team": {"place": torch.zeros(4)}}},
    "a part is a number": lambda saved: saved | {"parts": saved["parts"] | {"team": 3}},
    "a part is a tensor": lambda saved: saved | {"parts": saved["parts"] | {"adams": torch.zeros(2)}},
    "a generator too few": lambda saved: saved | {
        "parts": saved["parts"] | {"generators": saved["parts"]["generators"][1:]}},
    "generators of text": lambda saved: saved | {"parts": saved["parts"] | {"generators": ["a", "b", "c"]}},
    "half a generator": lambda saved: saved | {
        "parts": saved["parts"] | {"generators": [g[:100] for g in saved["parts"]["generators"]]}},
    "step is text": lambda saved: saved | {"step": "8"},
    "step is half": lambda saved: saved | {"step": 8.5},
    "step is below 0": lambda saved: saved | {"step": -1},
    "step beyond the last": lambda saved: saved | {"step": 13},
    "step is huge": lambda saved: saved | {"step": 10**30},
    "timed is None": lambda saved: saved | {"timed": None},
    "rows is None": lambda saved: saved | {"rows": None},
    "rows is a number": lambda saved: saved | {"rows": 3},
    "rows of numbers": lambda saved: saved | {"rows": [1, 2]},
    "rows without a step": lambda saved: saved | {"rows": [{"seed": 0}]},
    "rows with a text": lambda saved: saved | {"rows": walk(saved["rows"], loss="x")},
    "a step of text": lambda saved: saved | {"rows": walk(saved["rows"], step="8")},
    "rows of several kinds": lambda saved: saved | {"rows": saved["rows"] + [{"step": 8, "seed": 0}]},
    "seconds is text": lambda saved: saved | {"seconds": "1"},
    "seconds is NaN": lambda saved: saved | {"seconds": float("nan")},
    "seconds is below 0": lambda saved: saved | {"seconds": -1.0},
    "wall is a list": lambda saved: saved | {"wall": [1]},
    "wall is endless": lambda saved: saved | {"wall": float("inf")},
    "wall is huge": lambda saved: saved | {"wall": 10**400},
}  # fmt: skip


@pytest.mark.parametrize("harm", WRONG)
def test_a_checkpoint_that_is_not_this_runs_is_refused(toy, tmp_path, monkeypatch, harm):
    half_a_run(toy, monkeypatch, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    torch.save(WRONG[harm](checkpoint(tmp_path / "run")), tmp_path / "run" / "checkpoint.pt")
    said = "^.*run/checkpoint.pt is of another run: delete it to start this one again$"
    with pytest.raises(ValueError, match=said):
        resume(toy, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_checkpoint_of_the_other_kind_of_run_is_refused(toy, tmp_path, monkeypatch):
    """A run with two loops cannot go on from one with a single one."""
    half_a_run(toy, monkeypatch, tmp_path / "one")
    half_a_run(toy, monkeypatch, tmp_path / "two", "--model-steps", 3)
    (tmp_path / "two" / "checkpoint.pt").write_bytes((tmp_path / "one" / "checkpoint.pt").read_bytes())
    with pytest.raises(ValueError, match="two/checkpoint.pt is of another run"):
        resume(toy, tmp_path / "two")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("harm", ["text", "empty", "cut off", "code", "a folder"])
def test_a_damaged_checkpoint_is_refused(toy, tmp_path, monkeypatch, harm):
    half_a_run(toy, monkeypatch, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    if harm == "a folder":
        path.unlink()
        path.mkdir()
    elif harm == "code":
        torch.save(Evil(), path)
    else:
        path.write_bytes({"text": b"not a checkpoint", "empty": b"", "cut off": content[:-100]}[harm])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged \(\w+\): delete it to start the run again$"):
        resume(toy, tmp_path / "run")
    assert not (tmp_path / "evil").exists()


def config(**changes):
    def change(content):
        content["args"] |= changes
        return content

    return change


CONFIGS = {
    "a list": lambda content: [1],
    "a number": lambda content: 3,
    "no arguments": lambda content: {},
    "arguments are a list": lambda content: content | {"args": [1]},
    "an argument too few": lambda content: content | {
        "args": {k: v for k, v in content["args"].items() if k != "lr"}},
    "an argument too many": config(depth=3),
    "text for a number": config(steps="12"),
    "a fraction for a whole number": config(env=1.5),
    "a list for a number": config(lr=[0.1]),
    "None": config(seed=None),
    "a number for a list": config(sizes=3),
    "text for a truth": config(compile="yes"),
    "no such choice": config(kind="sideways"),
}  # fmt: skip


@pytest.mark.parametrize("harm", [*CONFIGS, "text", "empty", "bytes", "3,000 brackets"])
def test_a_config_that_is_not_a_runs_is_refused(toy, tmp_path, monkeypatch, harm):
    half_a_run(toy, monkeypatch, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    if harm in CONFIGS:
        content = json.dumps(CONFIGS[harm](json.loads(path.read_text()))).encode()
    else:
        brackets = b'{"args": ' + b"[" * 3000 + b"]" * 3000 + b"}"
        content = {"text": b"steps: 12", "empty": b"", "bytes": b"\xff\xfe\x00", "3,000 brackets": brackets}[harm]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="config.json is damaged, or of another version: the run cannot be resumed$"):
        resume(toy, tmp_path / "run")


@pytest.mark.parametrize("file, said", [
    ("config.json", "holds a run already: --resume goes on with it; else delete it or change --out-dir"),
    ("checkpoint.pt", "holds a checkpoint.pt"),
    ("metrics.csv", "holds a metrics.csv"),
    ("summary.json", "holds a summary.json"),
])  # fmt: skip
def test_a_folder_with_somebodys_files_is_left_alone(toy, tmp_path, file, said):
    (tmp_path / file).write_text("mine")
    with pytest.raises(ValueError, match=said) as error:
        runs.Run("toy", toy.Args(out_dir=str(tmp_path)))  # before any data are read
    assert "change --out-dir" in str(error.value)
    assert [each.name for each in tmp_path.iterdir()] == [file] and (tmp_path / file).read_text() == "mine"


def test_a_folder_with_other_things_is_used(toy, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    go(toy, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "summary.json").exists()


def test_a_folder_that_cannot_be_made_is_seen_at_once(toy, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", "/dev/null/run"):
        with pytest.raises(ValueError, match=f"^{folder} cannot be made or written to: change --out-dir$"):
            runs.Run("toy", toy.Args(out_dir=str(folder)))


def test_runs_without_a_folder_get_new_ones(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder.time, "strftime", lambda _: "now")
    folders = []
    for _ in range(3):
        run = runs.Run("toy", toy.Args(task="a/b c.h5"))
        assert run.folder is None and not list(tmp_path.rglob("now*"))  # only once it begins
        run.begin()
        folders.append(str(run.folder))
        assert run.args.out_dir == str(run.folder)
    assert folders == ["runs/toy/toy-b_c-none-now", "runs/toy/toy-b_c-none-now-1", "runs/toy/toy-b_c-none-now-2"]


# ---------------------------------------------------------------- processes
def test_two_processes_that_want_one_folder(script, tmp_path):
    """Three, all past their first look at the folder when the first one takes it."""
    (tmp_path / "meet").mkdir()
    meet = os.environ | {"MEET": str(tmp_path / "meet"), "HOW_MANY": "3"}
    words = [sys.executable, script, "--out-dir", tmp_path / "run"]
    together = [subprocess.Popen(words, env=meet, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                for _ in range(3)]  # fmt: skip
    ends = [(*process.communicate(timeout=120), process.returncode) for process in together]
    assert sorted(code for *_, code in ends) == [0, 1, 1]
    for out, errors, code in ends:
        if code:
            (line,) = errors.splitlines()
            assert line.startswith(f"error: {tmp_path / 'run'} ") and out == ""
            assert "has just been taken by another run" in line or "holds a run already" in line
    assert len(table(tmp_path / "run")) == 12 and (tmp_path / "run" / "summary.json").exists()
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_terminal_that_lacks_letters_does_not_end_a_run(script, tmp_path):
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = start(script, "--out-dir", tmp_path / "run", env=ascii_only)
    assert process.returncode == 0 and process.stderr == "" and " ? 0." in process.stdout
    assert (tmp_path / "run" / "summary.json").exists() and (tmp_path / "run" / "curve.png").exists()
    complains(start(script, "--out-dir", tmp_path / "run", "--task", "é±", env=ascii_only), "holds a run already")


@pytest.mark.parametrize("ending", ["| head -1", "| true", ">&-", "> /dev/full", ">&- 2>&-"])
def test_an_output_that_is_gone_does_not_end_a_run(script, tmp_path, ending):
    words = f"{sys.executable} {script} --steps 400 --eval-every 2 --out-dir {tmp_path / 'run'} {ending}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.run(
        ["bash", "-c", words + "; exit ${PIPESTATUS[0]}"], capture_output=True, text=True, timeout=120, env=buffered
    )
    assert process.returncode == 0 and process.stderr == ""
    assert len(table(tmp_path / "run")) == 3 * 201
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 400
    assert all((tmp_path / "run" / name).exists() for name in ("curve.png", "more.png"))


def test_errors_and_ctrl_c_end_in_a_line_and_a_code(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(runs, "limit_memory", lambda: None)

    def end(error):
        def main(args):
            raise error

        with pytest.raises(SystemExit) as found:
            runs.launch(main, lambda: None)
        return found.value.code, capsys.readouterr().err

    monkeypatch.setattr(runs, "owned", None)
    assert end(KeyboardInterrupt()) == (130, "interrupted\n")
    monkeypatch.setattr(runs, "owned", tmp_path)
    assert end(KeyboardInterrupt()) == (130, f"interrupted; go on with: --resume --out-dir {tmp_path}\n")
    assert end(ValueError("so and so")) == ("error: so and so", "")
    assert end(FloatingPointError("not finite"))[0] == "error: not finite"
    assert end(FileNotFoundError(2, "No such file", "x"))[0] == "error: [Errno 2] No such file: 'x'"
    with pytest.raises(RuntimeError, match="^a fault of ours$"):  # that is worth a traceback
        end(RuntimeError("a fault of ours"))
    with pytest.raises(KeyError):
        end(KeyError("x"))


def fail(error):
    raise error


def too_much():
    """Ways to ask for more than there is."""
    yield "empty", lambda: torch.empty(10**15)
    yield "product", lambda: torch.empty(2**40, 2**40)
    yield "generator", lambda: torch.rand(2, 2**60, generator=torch.Generator())
    yield "expanded", lambda: torch.zeros(1, 1).expand(2**30, 2**30).clone()
    yield "list", lambda: [0] * 2**60
    yield "range", lambda: list(range(2**62))
    yield "nothing said", lambda: fail(MemoryError())
    yield "GPU", lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB.\nx"))
    yield "C++", lambda: fail(RuntimeError("std::bad_alloc"))


@pytest.mark.parametrize("ask", [pytest.param(ask, id=name) for name, ask in too_much()])
def test_what_no_memory_holds_ends_in_one_line(monkeypatch, ask):
    monkeypatch.setattr(runs, "limit_memory", lambda: None)
    with pytest.raises(SystemExit) as found:
        runs.launch(lambda args: ask(), lambda: None)
    line = found.value.code
    assert line.startswith("error: not enough memory: choose smaller sizes (") and len(line.splitlines()) == 1
    assert len(line) < 300 and not line.endswith("()")


def test_a_number_beyond_64_bits_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(runs, "limit_memory", lambda: None)
    with pytest.raises(SystemExit) as found:
        runs.launch(lambda args: range(10**30)[2**70 :].__len__(), lambda: None)
    assert found.value.code.startswith("error: a number is too large: choose smaller ones (")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("kept", [True, False])
def test_memory_is_not_asked_for_again_in_every_update(kept):
    """A large tensor that comes and goes touches no new page, once there was one; it does without `keep_memory`."""
    words = f"import resource, sys, torch; sys.path.insert(0, {str(ROOT)!r}); from data import runs\n"
    words += "runs.keep_memory()\n" * kept + "for _ in range(8):\n    x = torch.zeros(10**7); del x\n"
    words += "    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n    print(faults)"
    found = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    faults = [int(line) for line in found.stdout.split()]
    assert (faults[-1] - faults[3] < 30) == kept, found.stderr  # a huge page is one


def test_a_run_cannot_fill_more_than_the_machine_has(script):
    """Else the system would kill it, or another, without a word. A limit that is there already stays."""
    words = f"import sys, resource; sys.path.insert(0, {str(ROOT)!r}); from data import runs; runs.launch("
    words += "lambda args: print(*resource.getrlimit(resource.RLIMIT_DATA)), lambda: None)"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    plenty = -1 if torch.cuda.is_available() else memory
    for before, expected in ((None, plenty), (4 * 10**9, 4 * 10**9)):

        def limit():
            if before:
                resource.setrlimit(resource.RLIMIT_DATA, (before, resource.RLIM_INFINITY))

        found = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, preexec_fn=limit)
        assert int(found.stdout.split()[0]) == expected, found.stderr


def test_ctrl_c_in_a_process(script, tmp_path):
    """Before the run owns the folder there is nothing to go on with; later the hint is right."""
    (tmp_path / "meet").mkdir()
    meet = os.environ | {"MEET": str(tmp_path / "meet"), "HOW_MANY": "2"}
    mind = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  also where tests run in the background
    words = [sys.executable, script, "--steps", "100000000", "--eval-every", "10", "--out-dir", tmp_path / "run"]
    for early in (True, False):
        process = subprocess.Popen(words, env=meet, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   preexec_fn=mind)  # fmt: skip
        wait_for((tmp_path / "meet" / str(process.pid)).exists)
        if not early:  # the second of the two is let in
            wait_for((tmp_path / "run" / "checkpoint.pt").exists)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        hint = "" if early else f"; go on with: --resume --out-dir {tmp_path / 'run'}"
        assert process.returncode == 130 and errors == f"interrupted{hint}\n"
        assert (tmp_path / "run").exists() == (not early)


def wait_for(condition):
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


# ---------------------------------------------------------------- arguments
def test_a_flag_beats_the_preset(toy):
    assert toy.parse([]).steps == 12 and toy.parse(["--kind", "fast"]).steps == 6
    assert toy.parse(["--kind", "fast", "--steps", "12"]).steps == 12  # though 12 is also the default


@pytest.mark.parametrize("words, said", [
    (("--steps", "0"), "--steps must be above 0 and at most 9223372036854775807, not 0"),
    (("--steps", "9223372036854775808"), "--steps must be above 0 and at most 9223372036854775807, not 92"),
    (("--seed", "-1"), "--seed must be at least 0 and at most 9223372036854775807, not -1"),
    (("--lr", "nan"), "--lr must be above 0 and finite, not nan"),
    (("--lr", "inf"), "--lr must be above 0 and finite, not inf"),
    (("--num-seeds", "100001"), "--num-seeds must be above 0 and at most 100000, not 100001"),
    (("--sizes", "1", "-2"), "--sizes must be above 0 and at most 9223372036854775807, not -2"),
])  # fmt: skip
def test_numbers_that_cannot_be_used(toy, words, said):
    with pytest.raises(ValueError, match=said):
        toy.parse(list(words))
    toy.parse(["--seed", "0", "--model-steps", "0", "--num-seeds", "100000"])
    with pytest.raises(ValueError, match="--lr must be above 0 and at most 1, not 1.5"):
        runs.check_numbers(toy.Args(lr=1.5), "seed model_steps", at_most_one="lr")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.choose_device("auto").type == runs.choose_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="^--device cuda: torch finds no CUDA device here$"):
        runs.choose_device("cuda")
    with pytest.raises(ValueError, match="^unknown device 'tpu': choose auto, cpu or cuda$"):
        runs.choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [runs.choose_device(name).type for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]


def test_no_more_threads_than_there_are_cores(toy, tmp_path):
    try:
        runs.Run("toy", toy.Args(threads=10**8, out_dir=str(tmp_path / "run")))
        assert torch.get_num_threads() <= os.cpu_count()
    finally:
        torch.set_num_threads(1)


def test_compiling_needs_a_compiler(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="^--compile needs a C\\+\\+ compiler on the CPU, and there is none$"):
        runs.Run("toy", toy.Args(compile=True, out_dir=str(tmp_path / "run")))
    run = runs.Run("toy", toy.Args(out_dir=str(tmp_path / "run")))
    assert run.compile(toy.update) is toy.update  # with --no-compile, itself


def test_tracking(toy, tmp_path, monkeypatch):
    """Each evaluation's mean over seeds goes to the tracker, and so do the arguments; the world's table does not."""
    logged, begun = [], []

    def init(**words):
        begun.append(words)
        return SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    go(toy, tmp_path / "run", "--track", "--model-steps", 3)
    (words,) = begun
    assert words["group"] == "toy" and words["config"]["steps"] == 12
    rows = table(tmp_path / "run")
    assert [step for step, _ in logged] == [0, 4, 8, 12]
    for step, numbers in logged:
        for name in ("loss", "return"):
            mine = [float(row[name]) for row in rows if row["step"] == str(step)]
            assert numbers[name] == pytest.approx(sum(mine) / 3)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(ValueError, match="^--track needs Weights & Biases: pip install wandb$"):
        go(toy, tmp_path / "other", "--track")
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- small parts
def test_streams_are_apart():
    draws = {(seed, purpose): torch.rand(4, generator=runs.stream(seed, purpose)) for seed in range(4)
             for purpose in range(4)}  # fmt: skip
    assert len({tuple(x.tolist()) for x in draws.values()}) == 16
    assert torch.equal(draws[2, 3], torch.rand(4, generator=runs.stream(2, 3)))
    runs.stream(sys.maxsize, 10**6)  # the largest seed


def test_over_seeds_by_hand():
    found = runs.over_seeds(torch.tensor([[1.0, 3.0], [6.0, 6.0], [4.0, 0.0]]))
    assert found["per_seed"] == [2, 6, 2] and found["mean"] == pytest.approx(10 / 3)
    assert found["stderr"] == pytest.approx(((2 * (4 / 3) ** 2 + (8 / 3) ** 2) / 2) ** 0.5 / 3**0.5)
    assert runs.over_seeds(torch.tensor([[True, False]])) == {"mean": 0.5, "stderr": 0.0, "per_seed": [0.5]}


def test_a_file_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    results.save_json(path, {"a": 1})
    with pytest.raises(ValueError, match="has just been taken by another run: change --out-dir$"):
        results.save(path, b"mine", new=True)
    assert json.loads(path.read_text()) == {"a": 1}
    results.save_csv(tmp_path / "x.csv", [{"a": 1, "b": 0.1}, {"a": 2, "b": float("nan")}])
    assert (tmp_path / "x.csv").read_text() == "a,b\n1,0.1\n2,nan\n"
    results.save_tensors(tmp_path / "x.pt", {"a": [torch.ones(2)], "b": "text"})
    assert torch.load(tmp_path / "x.pt", weights_only=True)["b"] == "text"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.csv", "x.json", "x.pt"]


def test_a_commit_is_known_or_unknown(monkeypatch):
    assert len(runs.provenance(torch.device("cpu"))["git_commit"]) in (40, len("unknown"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert runs.provenance(torch.device("cpu"))["git_commit"] == "unknown"


@pytest.mark.parametrize("words, said", [
    (("algorithms/bc.py", "--stepz", 3), "Unrecognized options: --stepz, 3 (perhaps --steps?); see --help"),
    (("algorithms/bc.py", "--steps", "three"), "Error parsing --steps: invalid literal"),
    (("algorithms/iql.py", "--team", "foo"), "'foo' for argument '--team'. Expected one of ('central', 'mixed', 'indep"),
    (("algorithms/polygames.py", "--figur", "x"), "Unrecognized options: --figur, x"),
    (("envs/play.py",), "Missing from envs/play.py"),
    (("data/collect.py", "--teem", "x"), "Unrecognized options: --teem, x"),
    (("data/describe.py",), "Missing from data/describe.py"),
    (("envs/smac.py", "--battles", "x"), "Error parsing --battles"),
    (("tests/grid.py", "--index", "first"), "Error parsing --index"),
])  # fmt: skip
def test_words_that_the_parser_cannot_read_are_one_line(words, said):
    complains(command(*words), said)
