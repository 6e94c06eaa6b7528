"""What all scripts share, each tested once over all of them, through `main` as a user starts it."""

import collections
import csv
import json
import os
import re
import subprocess
import sys
import textwrap
import types

import pretended_gpu
import pytest
import torch
from conftest import ROOT, load_script
from pretended_gpu import AWAY, PretendedGPU

import data
from data import run as runs
from data.run import files, keeper

EVERY = "--num-seeds 2 --eval-episodes 2 "
LOOP = EVERY + "--steps 4 --eval-every 2 "
BRIDGE = LOOP + "--env bridge --episodes 30 --hidden 16 "
BATTLES = LOOP + "--env smac --task 3m --episodes 10 --sequences 2 --hidden 16 "
REACHER = LOOP + "--env reacher --episodes 8 --hidden 16 --batch-size 8 "
MODEL = (
    "--members 3 --elites 2 --rollouts 4 --horizon 3 --model-steps 6 --model-eval-every 3 "
    "--model-hidden 16 --reward-hidden 16 --model-batch 8 --epochs 2 "
)
ANT = EVERY + "--steps 2 --eval-every 1 --env ant --task partial --dataset medium --episodes 2 "
RUNS = {  # name: (script, flags), one small run of everything that makes a difference
    "bc": ("bc", BRIDGE),
    "bc body": ("bc", REACHER),
    "inspo": ("inspo", BRIDGE + "--clone-steps 3 --batch-size 16 --warmup 1"),
    "inspo battles": ("inspo", BATTLES + "--clone-steps 3 --warmup 1"),
    "alberdice": ("alberdice", BRIDGE + "--clone-steps 3 --batch-size 16"),
    "cfcql": ("cfcql", LOOP),
    "cfcql battles": ("cfcql", BATTLES + "--clone-steps 3"),
    "omar": ("omar", LOOP),
    "omar battles": ("omar", BATTLES),
    "omiga": ("omiga", LOOP + "--env matrix --task m-ne"),
    "omiga body": ("omiga", REACHER),
    "iql": ("iql", LOOP + "--team central"),
    "maiql-ft": ("iql", LOOP + "--team mixed --finetune 1"),
    "matd3+bc": ("td3_bc", REACHER + "--mixing"),
    "iomar": ("td3_bc", REACHER + "--bc 0 --cql 1 --omar 0.9"),
    "maddpg": ("maddpg_cql_pjap", REACHER.replace("--hidden", "--policy-hidden") + "--window 3"),
    "mappo": (
        "mappo",
        EVERY + "--env bridge --num-envs 4 --rollout 100 --steps 1200 --eval-every 400 "
        "--epochs 2 --minibatches 2 --hidden 16",
    ),
    "mappo battles": (
        "mappo",
        EVERY + "--env smac --task 3m --num-envs 2 --rollout 60 --steps 360 --eval-every 120 "
        "--epochs 1 --minibatches 2 --hidden 16 --recall 2",
    ),
    "moma": ("moma_ppo", LOOP + MODEL),
    "moma ant": ("moma_ppo", ANT + MODEL + "--hidden 16 --width 4 --memory 3 --batch-size 5"),
}
SCRIPTS = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py"))
every_run = pytest.mark.parametrize("name", RUNS)
every_script = pytest.mark.parametrize("script", SCRIPTS)
NO_GAMES = ("--eval-episodes", "0")
FIRST = {script: name for name, (script, _) in reversed(RUNS.items())}  # a run of each script


def start(name, folder, *flags):
    """Run one of `RUNS` to its end; returns its summary."""
    script, words = RUNS[name]
    module = load_script(script)
    words = [] if "--resume" in flags else words.split()
    return module.main(module.parse([*words, *flags, "--out-dir", str(folder)]))


@pytest.fixture
def light(monkeypatch):
    """Runs leave empty files in place of pictures and exported teams, which take seconds."""
    monkeypatch.setattr(keeper, "save_team", lambda path, *_: files.save(path, b""))
    monkeypatch.setattr(files, "save_figure", lambda path, figure: files.save(path, b""))


def kept(folder):
    """All that a run has learned: {name: tensor}, without its clocks."""
    content = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]
    leaves = torch.utils._pytree.tree_flatten_with_path(content)[0]
    return {str(path): x for path, x in leaves if isinstance(x, torch.Tensor)}


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- a file to take away
@every_script
def test_a_file_works_when_copied_alone(tmp_path, script):
    """Its docstring's own loop runs where nothing of ours, but somebody else's `data`, is found."""
    text = (ROOT / "algorithms" / f"{script}.py").read_text()
    (tmp_path / f"{script}.py").write_text(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    block = re.search(r"\nIn your own loop.*?\n((?:  .*\n|\n)+)", text)[1]
    finite = "for x in list(globals().values()):\n    if isinstance(x, torch.Tensor):\n"
    finite += "        assert not x.is_floating_point() or not x.isnan().any()\n"
    code = "import torch\ntorch.set_num_threads(1)\n" + textwrap.dedent(block) + finite
    environment = {key: value for key, value in os.environ.items() if "PYTHON" not in key}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, f"{script}.py"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1 and b"repository" in done.stderr


@every_script
def test_help_tells_every_flag(capsys, script):
    module = load_script(script)
    with pytest.raises(SystemExit) as end:
        module.parse(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for field in module.Args.__dataclass_fields__:
        assert "--" + field.replace("_", "-") in shown


# ---------------------------------------------------------------- all seeds at once
@every_run
def test_seeds_learn_together_what_they_learn_alone(tmp_path, float64, light, name):
    # The starts of online games are drawn for all seeds together: there they do not vary here.
    still = ["--env-kwargs", '{"noise": false}'] if name == "mappo battles" else []
    start(name, tmp_path / "both", *NO_GAMES, *still)
    start(name, tmp_path / "alone", "--seed", "1", "--num-seeds", "1", *NO_GAMES, *still)
    both, alone, compared = kept(tmp_path / "both"), kept(tmp_path / "alone"), 0
    for key, own in alone.items():
        shared = both[key]
        if own.is_floating_point() and shared.numel() == 2 * own.numel():
            error = (shared.reshape(2, -1)[1] - own.flatten()).abs().max()
            assert error < 1e-9, key
            compared += 1
    assert compared > 3
    assert not torch.equal(*list(both.values())[0].reshape(2, -1))


# ---------------------------------------------------------------- what a kill leaves
class Killed(BaseException):
    pass


@every_run
@pytest.mark.parametrize("moment", [3, 6])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, light, name, moment):
    """It is killed in the middle of writing a file: the `moment`-th."""
    start(name, tmp_path / "whole")
    written, save = [], files.save

    def mortal(path, content, new=False):
        written.append(path)
        if len(written) == moment:
            path.with_name(f"{path.name}.killed.part").write_bytes(content[:100])
            raise Killed
        save(path, content, new)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files, "save", mortal)
        start(name, tmp_path / "broken")
    start(name, tmp_path / "broken", "--resume")
    assert not list((tmp_path / "broken").glob("*.part"))
    whole, broken = kept(tmp_path / "whole"), kept(tmp_path / "broken")
    assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole)
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")


# ---------------------------------------------------------------- graphs and waits
@every_run
def test_a_compiled_run_equals_eager(tmp_path, monkeypatch, float64, light, name):
    """A graph ends at an optimiser's step only, and soon no graph is new."""
    start(name, tmp_path / "eager", "--no-compile", *NO_GAMES)
    graphs = collections.Counter()

    def backend(graph, inputs):
        graphs["made"] += any(node.op.startswith("call") for node in graph.graph.nodes)
        return graph

    def compiled(run, function):
        return torch.compile(function, dynamic=False, backend=backend)

    monkeypatch.setattr(keeper.Run, "compile", compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(keeper.GRAPHS):
        start(name, tmp_path / "compiled", "--no-compile", *NO_GAMES)
    breaks = torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    assert graphs["made"] > 0
    assert all("take_step" in reason for reason in breaks), list(breaks)
    eager, graph = kept(tmp_path / "eager"), kept(tmp_path / "compiled")
    for key, value in eager.items():
        assert torch.allclose(value.double(), graph[key].double(), rtol=0, atol=1e-9), key


@every_run
def test_an_update_never_waits_for_the_host(tmp_path, monkeypatch, light, name):
    """On a GPU that is only pretended; tensors of two devices in one operation raise there."""
    waits, ops = collections.Counter(), collections.Counter()
    monkeypatch.setattr(keeper, "choose_device", lambda name: torch.device(AWAY))
    calls = collections.Counter()

    def watched(run, function):
        def watch(*inputs):
            gpu = pretended_gpu.current
            calls[function.__name__] += 1
            before = gpu.waits.copy()
            result = function(*inputs)
            if calls[function.__name__] > 1:  # the first may set things up
                waits.update(gpu.waits - before)
            ops.update(gpu.ops)
            return result

        return watch

    monkeypatch.setattr(keeper.Run, "compile", watched)
    with PretendedGPU():
        start(name, tmp_path / "run", "--no-compile", *NO_GAMES)
    assert ops.total() > 50 and not waits, waits


# ---------------------------------------------------------------- what a run leaves
@every_run
def test_the_kept_team_plays_as_the_evaluation_says(tmp_path, name):
    summary = start(name, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    team = runs.load_team(tmp_path / "run")
    again = runs.score(
        runs.kept_player(team), types.SimpleNamespace(**config), summary["steps"], 20, "cpu"
    )
    wanted = summary["return"]["per_seed"]
    assert again["return"].mean(1).tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    for file in ("config.json", "metrics.csv", "summary.json", "curve.png", "checkpoint.pt"):
        assert (tmp_path / "run" / file).stat().st_size > 0
    assert all(float(row["return"]) < 1e9 for row in rows(tmp_path / "run")[-2:])


def data_of_nothing(folder, script):
    """A file that does not say where it was recorded, which the script can learn from."""
    continuous = script in ("maddpg_cql_pjap", "td3_bc")
    names = ("polynomial", "", "peak-0.5") if continuous else ("matrix", "m-ne", "balanced")
    dataset = data.load(*names, episodes=20)
    dataset.info.clear()
    data.write(dataset, folder / "mine.h5")
    return str(folder / "mine.h5")


LEARN = [script for script in SCRIPTS if script not in ("mappo", "polygames")]


@pytest.mark.parametrize("script", LEARN)
def test_a_run_without_an_environment(tmp_path, script):
    module, words = load_script(script), RUNS[FIRST[script]][1]
    words = re.sub(r"--(env|task|dataset|episodes|finetune|recurrent) \S+", "", words).split()
    path = data_of_nothing(tmp_path, script)
    words += ["--dataset", path, "--eval-episodes", "0", "--out-dir", str(tmp_path / "run")]
    if script == "maddpg_cql_pjap":
        words += ["--window", "2"]
    summary = module.main(module.parse(words))
    assert summary["return"] is None and (tmp_path / "run" / "team.pt2").exists()
    shown = rows(tmp_path / "run")
    assert int(shown[-1]["step"]) == summary["steps"]
    assert all("nan" not in row.values() for row in shown)


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize("script", LEARN)
def test_a_bad_dataset_is_refused_before_a_folder_is_made(tmp_path, script):
    module = load_script(script)
    (tmp_path / "bad.h5").write_bytes(b"no HDF5")
    words = ["--dataset", str(tmp_path / "bad.h5"), "--env", "bridge"]
    if module.__name__ in ("maddpg_cql_pjap", "td3_bc", "moma_ppo"):
        words[-1] = "reacher"
    with pytest.raises((ValueError, OSError), match="bad.h5"):
        module.main(module.parse([*words, "--out-dir", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


@every_script
def test_a_bad_flag_is_refused(script):
    module = load_script(script)
    with pytest.raises(ValueError, match="num-seeds"):
        module.parse(["--num-seeds", "0"])
    with pytest.raises(SystemExit) as end:
        module.parse(["--num-seedz", "1"])
    assert end.value.code == 2
