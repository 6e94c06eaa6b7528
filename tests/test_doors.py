"""What every training script has for other people: a kept team, training without an environment, foreign games."""

import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, command, complains, load_script

from data import layout, load, runs, write

TINY = ("--num-seeds", 2, "--seed", 3, "--eval-episodes", 2, "--out-dir")
# script, flags of a short run, and how many kinds of play (greedy, sampled) share a batch of games
KEPT = {
    "bc matrix": ("bc", ("--steps", 60), 1),
    "bc bridge": ("bc", ("--env", "bridge", "--steps", 60), 1),
    "bc smac": ("bc", ("--env", "smac", "--task", "3m", "--episodes", 20, "--steps", 30), 1),
    "mappo smac": ("mappo", ("--env", "smac", "--task", "3m", "--steps", 100, "--num-envs", 2, "--rollout", 50,
                             "--recall", 2), 2),
    "mappo reacher": ("mappo", ("--env", "reacher", "--steps", 100, "--num-envs", 2, "--rollout", 50,
                                "--normalize"), 2),
    "moma matrix": ("moma_ppo", ("--steps", 2, "--model-steps", 20), 1),
    "moma ant": ("moma_ppo", ("--env", "ant", "--task", "partial", "--dataset", "medium", "--episodes", 6, "--memory",
                              3, "--model-steps", 4, "--model-hidden", 16, "--steps", 1, "--warmup", 3, "--rollouts", 4,
                              "--horizon", 2, "--batch-size", 4), 1),
    "inspo bridge": ("inspo", ("--steps", 20, "--clone-steps", 60), 1),
    "inspo smac": ("inspo", ("--env", "smac", "--task", "3m", "--episodes", 20, "--steps", 4, "--warmup", 1,
                             "--clone-steps", 10), 1),
    "maddpg reacher": ("maddpg_cql_pjap", ("--env", "reacher", "--episodes", 10, "--steps", 10), 1),
    "omiga matrix": ("omiga", ("--env", "matrix", "--task", "xor", "--steps", 60), 1),
    "iql central": ("iql", ("--team", "central", "--env", "matrix", "--task", "m-ne", "--steps", 60), 1),
    "iql mixed reacher": ("iql", ("--env", "reacher", "--episodes", 10, "--steps", 30), 1),
    "iql central reacher": ("iql", ("--env", "reacher", "--episodes", 10, "--steps", 30, "--team", "central"), 1),
    "cfcql smac": ("cfcql", ("--env", "smac", "--task", "3m", "--episodes", 20, "--steps", 4, "--clone-steps", 5), 1),
    "alberdice bridge": ("alberdice", ("--steps", 20, "--clone-steps", 60), 1),
    "omar matrix": ("omar", ("--steps", 20), 1),
    "td3_bc": ("td3_bc", ("--episodes", 10, "--steps", 30), 1),
    "bc reacher": ("bc", ("--env", "reacher", "--episodes", 10, "--steps", 30), 1),
}

ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("gymnasium", "numpy_", "data", "envs", "algorithms", "mujoco", "matplotlib", "tyro"):
            raise ImportError(name)

sys.meta_path.insert(0, Nothing())
import torch

team = torch.export.load(sys.argv[1]).module()
steps = torch.load(sys.argv[2], weights_only=True)
S, _, N, W = team.start.shape
E, unlike, acted = steps[0]["obs"].shape[1], 0, 0
for s in range(S):  # each seed's team in its own games
    memory = team.start.repeat(1, E, 1, 1)
    for step in steps:
        seen = [step[name][s] for name in ("obs", "avail") if name in step]
        actions, memory = team(*seen, memory)
        unlike += int(((actions[s] - step["actions"][s]).abs() > 1e-4).sum())
        acted += actions[s].numel()
print(len(steps), acted, unlike)
"""


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.long] * (c == "moma ant")) for c in KEPT])
def test_a_kept_team_plays_alone_as_it_was_evaluated(tmp_path, monkeypatch, case):
    name, flags, kinds = KEPT[case]
    script, seen = load_script(name), []
    where = script if hasattr(script, "play") else runs  # whoever plays: most scripts leave it to `runs.score`
    play = where.play

    def spied(game, act, *rest, **more):
        seen.clear()  # the last evaluation's first batch is greedy; a second one samples
        halves = play(game, lambda obs, info, memory: note(obs, info, act(obs, info, memory)), *rest, **more)
        batches.append(list(seen))
        return halves

    def note(obs, info, answer):
        step = {"obs": obs, "actions": answer[0]} | ({"avail": a} if (a := info.get("avail_actions")) is not None else {})
        seen.append({key: x.unflatten(0, (2, kinds, -1))[:, 0].clone() for key, x in step.items()})
        return answer

    batches = []
    monkeypatch.setattr(where, "play", spied)
    script.main(script.parse([str(word) for word in (*flags, *TINY, tmp_path / "run")]))
    twice = kinds == 1 and "avail" in batches[-1][0] and name not in ("moma_ppo", "cfcql")  # the last batch samples
    back = {"inspo": 4, "alberdice": 4}.get(name, 1 + twice)  # these two play their clones last
    steps = batches[-back]
    torch.save(steps, tmp_path / "steps.pt")
    words = (sys.executable, "-c", ALONE, tmp_path / "run" / "team.pt2", tmp_path / "steps.pt")
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    length, acted, unlike = map(int, done.stdout.split())
    assert (length, unlike) == (len(steps), 0) and acted > 0


@pytest.mark.parametrize("name", sorted({script for script, _, _ in KEPT.values()}))
def test_every_flag_is_read(name):
    script, keeper = (ROOT / "algorithms" / f"{name}.py").read_text(), (ROOT / "data" / "runs.py").read_text()
    kept = runs.MAY_CHANGE | {"seed", "dataset", "env_kwargs", "team_reward", "games"}  # what the keeper of a run reads
    used = {*re.findall(r"layout\.(\w+)\(", script)}  # and what the layouts that it asks for read
    script += "".join(inspect.getsource(getattr(layout, f)) for f in used | ({"inputs"} if "teams" in used else set()))
    unread = [field.name for field in fields(load_script(name).Args)
              if f"args.{field.name}" not in script + keeper * (field.name in kept)]  # fmt: skip
    assert unread == []


@pytest.fixture(scope="module")
def nameless(tmp_path_factory):
    """Bridge's data in a file that does not say where they come from."""
    folder = tmp_path_factory.mktemp("data")
    dataset = load("bridge", "", "mixed", episodes=40)
    named, dataset.info = dataset.info, {}
    write(dataset, folder / "mine.h5")
    dataset.info = named
    write(dataset, folder / "named.h5")
    return folder


def test_trains_without_an_environment(tmp_path, nameless):
    words = ("--dataset", nameless / "mine.h5", "--steps", 40, "--eval-every", 20, "--num-seeds", 2)
    done = command("algorithms/bc.py", *words, "--eval-episodes", 0, "--out-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"team.pt2", "curve.png", "metrics.csv", "summary.json", "checkpoint.pt", "config.json"} <= names
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["return"] is None and summary["env"] == "" and summary["best_return"] is None
    complains(command("algorithms/bc.py", *words, "--out-dir", tmp_path / "other"), "does not say which environment")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("script, kind", [("inspo", "continuous"), ("td3_bc", "discrete"), ("maddpg_cql_pjap", "discrete")])
def test_actions_of_the_other_kind_are_refused(tmp_path, nameless, script, kind):
    path = nameless / "mine.h5"
    if kind == "continuous":
        path = tmp_path / "body.h5"
        dataset = load("reacher", "independent", "expert-mix", episodes=4)
        dataset.info = {}
        write(dataset, path)
    done = command(f"algorithms/{script}.py", "--dataset", path, "--eval-episodes", 0, "--out-dir", tmp_path / "run")
    complains(done, f"holds {kind} actions; {script} is for")
    assert not (tmp_path / "run").exists()


def test_a_file_says_its_environment(tmp_path, nameless):
    words = ("--dataset", nameless / "named.h5", "--steps", 40, "--num-seeds", 2, "--eval-episodes", 2)
    done = command("algorithms/bc.py", *words, "--out-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["args"]["env"] == "bridge"


def test_a_run_resumes_with_its_own_data_only(tmp_path, nameless):
    path, flags = tmp_path / "changing.h5", ("--steps", 40, "--eval-every", 20, "--num-seeds", 2, "--eval-episodes", 0)
    path.write_bytes((nameless / "mine.h5").read_bytes())
    script = load_script("bc")
    script.main(script.parse(["--dataset", str(path), *map(str, flags), "--out-dir", str(tmp_path / "run")]))
    write(load("bridge", "", "mixed", episodes=41), path)
    done = command("algorithms/bc.py", "--resume", "--out-dir", tmp_path / "run")
    complains(done, "the dataset is not the one that the run in")


@pytest.mark.parametrize("words, said", [
    (("--env-kwargs", "[1]"), "--env-kwargs must be a JSON object"),
    (("--env-kwargs", "{" * 3000), "--env-kwargs must be a JSON object"),
    (("--env", "nowhere:factory"), "nowhere"),
])  # fmt: skip
def test_what_a_factory_gets_is_checked(tmp_path, words, said):
    complains(command("algorithms/bc.py", *words, "--out-dir", tmp_path / "run"), said)
    assert not (tmp_path / "run").exists()


def test_an_interruption_while_torch_is_loaded_prints_no_traceback(tmp_path):
    import os
    import signal
    import time

    words = (sys.executable, str(ROOT / "algorithms" / "bc.py"), "--out-dir", str(tmp_path / "run"))
    for wait in (0.15, 0.3, 0.6):
        process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode and "Traceback" not in error, error
