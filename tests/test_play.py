"""`python envs/play.py RUN`: a kept team plays again and is drawn, and a file that is not one is refused unread."""

import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from conftest import ROOT, command, complains, load_script
from PIL import Image

import data
import envs
import envs.play as play_py
from envs.play import film, load_team, play, play_teams

RUNS = {  # flags of bc, two seeds each
    "smac": "--env smac --task 3m --episodes 40 --steps 60 --eval-every 60 --eval-episodes 2",
    "bridge": "--env bridge --episodes 40 --steps 60 --eval-every 60 --eval-episodes 2 --seed 7",
    "matrix": "--env matrix --task xor --steps 40 --eval-every 40",
    "reacher": "--env reacher --task leader-only --episodes 10 --steps 40 --eval-every 40 --eval-episodes 1",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function of a name in RUNS: the folder of that run, made when it is asked for."""
    folder, script = tmp_path_factory.mktemp("play"), load_script("bc")

    def run(name):
        if not (folder / name).exists():
            script.main(script.parse([*RUNS[name].split(), "--num-seeds", "2", "--out-dir", str(folder / name)]))
        return folder / name

    return run


def rows(text):
    """{name of a row: the numbers in it} of a printed table."""
    found = (re.fullmatch(r"(seed \d+|all seeds) +(-?[\d.].*)", line) for line in text.splitlines())
    return {match[1]: [float(x) for x in match[2].replace("±", " ").split()] for match in found if match}


# ---------------------------------------------------------------- the score
@pytest.mark.parametrize("name, steps, games", [("smac", 60, 20), ("bridge", 60, 20), ("matrix", 40, 100),
                                                ("reacher", 40, 10)])  # fmt: skip
def test_the_games_of_the_last_evaluation_have_the_same_returns(runs, name, steps, games):
    """With the evaluation's seed, its number of updates, the teams play the same games action for action."""
    done = command("envs/play.py", runs(name), "--games", games, "--seed", steps)
    assert done.returncode == 0 and not done.stderr, done.stderr
    summary = json.loads((runs(name) / "summary.json").read_text())
    table, scores = rows(done.stdout), [summary["return"]] + [summary["win_rate"]] * (name == "smac")
    assert list(table) == [f"seed {seed}" for seed in summary["seeds"]] + ["all seeds"]
    for s, seed in enumerate(summary["seeds"]):
        assert table[f"seed {seed}"][::2] == pytest.approx([x["per_seed"][s] for x in scores], abs=6e-5)
    over = [x[key] for x in scores for key in ("mean", "stderr")]
    assert table["all seeds"] == pytest.approx(over, abs=6e-5)


def test_other_games_have_other_returns_and_their_spread(runs):
    table = rows(command("envs/play.py", runs("smac"), "--games", 30, "--seed", 5).stdout)
    game, team = envs.make("smac", "3m", 60), load_team(runs("smac"))
    returns = play_teams(game, team, 5).returns.view(2, 30)
    for s in range(2):
        assert table[f"seed {s}"][:2] == pytest.approx(
            [returns[s].mean().item(), returns[s].std().item() / 30**0.5], abs=6e-5
        )
    assert returns.std() > 0 and not returns.equal(play_teams(game, team, 6).returns.view(2, 30))


def test_many_games_are_played_in_rounds(runs, monkeypatch):
    said = []
    monkeypatch.setattr(play_py, "AT_ONCE", 20)
    monkeypatch.setattr(play_py, "say", said.append)
    play_py.main(play_py.Args(runs("smac"), games=25, seed=4))
    game, team = envs.make("smac", "3m", 20), load_team(runs("smac"))
    rounds = [play_teams(game, team, seed).returns.view(2, 10) for seed in (4, 1_000_007, 2_000_010)]
    returns = torch.cat(rounds, 1)[:, :25]
    for s in range(2):
        assert rows(said[0])[f"seed {s}"][0] == pytest.approx(returns[s].mean().item(), abs=6e-5)


def test_a_team_plays_among_others_as_it_would_alone(runs):
    game, team = envs.make("bridge", num_envs=6), load_team(runs("bridge"))  # Bridge has no chance in it
    returns = play_teams(game, team, 0).returns.view(2, 3)
    for s in range(2):
        def act(obs, info, memory):
            return first(play_py.ask(team, obs, info, memory), s)

        alone = play(envs.make("bridge"), act, team.start)
        assert returns[s].tolist() == alone.returns.tolist() * 3


def first(answer, s):
    return answer[0][s], answer[1]


def test_a_memory_of_zeros_begins_a_game(runs):
    team = load_team(runs("smac"))
    assert team.start.shape == (2, 1, 3, 0) and not team.start.any()


@pytest.mark.parametrize("env, out", [({"PYTHONIOENCODING": "ascii"}, None), ({}, "/dev/full"), ({}, "closed")])
def test_no_terminal_can_make_it_fail(runs, env, out):
    words = [sys.executable, "envs/play.py", str(runs("bridge")), "--games", "2"]
    if out == "closed":
        words = ["sh", "-c", '"$@" >&-', "sh", *words]
    with open(out, "w") if out == "/dev/full" else contextlib.nullcontext(subprocess.PIPE) as stdout:
        done = subprocess.run(words, cwd=ROOT, env=os.environ | env, stdout=stdout, stderr=subprocess.PIPE)
    assert done.returncode == 0 and not done.stderr, done.stderr


# ---------------------------------------------------------------- what is asked for
@pytest.mark.parametrize("words, said", [
    (("--games", 0), "--games must lie in 1 .. 1,000,000"), (("--games", 10**30), "--games must lie in"),
    (("--seed", -1), "--seed in 0 .. 2^32 - 1"), (("--seed", 2**64), "--seed in 0"),
    (("--gif", "nowhere/film.gif"), "in a folder that exists"), (("--gif", "film.png"), "a file .gif"),
    (("--gif", "film.gif", "--film-seed", 9), "--film-seed must be one of the run's seeds, 7 .. 8"),
])  # fmt: skip
def test_bad_flags_end_in_one_line(runs, words, said):
    complains(command("envs/play.py", runs("bridge"), *words), said)


def test_a_folder_that_is_none(tmp_path):
    complains(command("envs/play.py", tmp_path / "nothing"), "is no run: there is no")
    complains(command("envs/play.py", __file__), "Not a directory")


def spoiled(run, folder, change):
    """A copy of a run with `change(config, {name: bytes})` made; what it returns, if it does, are the parts."""
    config = json.loads((run / "config.json").read_text())
    with zipfile.ZipFile(run / "team.pt2") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts = change(config, parts) or parts.items()
    (folder / "config.json").write_text(json.dumps(config))
    with zipfile.ZipFile(folder / "team.pt2", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, part in parts:
            archive.writestr(name, part)
    return folder


def args(**changes):
    return lambda config, parts: config["args"].update(changes)


def lacks(key):
    return lambda config, parts: config.pop(key) and None


@pytest.mark.parametrize("change, said", [
    (lacks("args"), "config.json is damaged, or that of something else than a run (KeyError"),
    (lacks("script"), "something else than a run (KeyError"),
    (lambda config, parts: config.update(args=[1]), "something else than a run (TypeError"),
    (args(seed="3"), "something else than a run (TypeError"), (args(task=4), "something else than a run (TypeError"),
    (args(env=4), "something else than a run (TypeError"), (args(env_kwargs="[1]"), "something else than a run (Type"),
    (args(env_kwargs="{"), "something else than a run (JSONDecodeError"),
    (args(env_kwargs="[" * 10**5), "something else than a run (RecursionError"),
    (args(env_kwargs='{"colour": 1}'), "smac does not take --env-kwargs {'colour': 1}"),
    (args(env=""), "was trained without an environment"), (args(env="chess"), "unknown environment 'chess'"),
    (args(env="chess:make"), "add --env chess:make to run that module"), (args(task="8m"), "the team does not fit this environment"),
    (args(env="matrix", task="xor"), "the team does not fit this environment"),
    (args(env="reacher", task=""), "the team does not fit this environment"),
    (args(backend="sc2", games=8), "StarCraft II 4.10 and its maps in SC2PATH"),  # not our simulator in its place
])  # fmt: skip
def test_what_is_no_run_or_has_changed_ends_in_one_line(runs, tmp_path, monkeypatch, change, said):
    monkeypatch.delenv("SC2PATH", raising=False)
    spoiled(runs("smac"), tmp_path, change)
    with pytest.raises(ValueError) as error:  # which the command turns into a line
        play_py.main(play_py.Args(tmp_path, games=2))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_no_file_decides_which_code_runs(runs, tmp_path):
    """A run, or a dataset, of a game that is not ours names a module: whoever plays it has to name it, too."""
    flag = tmp_path / "flag"
    run = spoiled(runs("smac"), tmp_path, args(env="subprocess:getoutput", env_kwargs=json.dumps({"cmd": f"touch {flag}"})))
    complains(command("envs/play.py", run), "add --env subprocess:getoutput to run that module")
    complains(command("envs/play.py", run, "--env", "smac"), "was trained in subprocess:getoutput, not in smac")
    complains(command("envs/play.py", runs("bridge"), "--env", "x:y"), "was trained in bridge, not in x:y")
    assert not flag.exists()
    dataset = data.load("matrix", "xor", "ab", episodes=5)
    dataset.info |= {"env": "os:abort", "task": ""}
    data.write(dataset, tmp_path / "evil.h5")
    words = ("--dataset", tmp_path / "evil.h5", "--steps", 1, "--out-dir", tmp_path / "cloned")
    complains(command("algorithms/bc.py", *words), "add --env os:abort to evaluate there, which runs that module")
    assert command("algorithms/bc.py", *words, "--eval-episodes", 0).returncode == 0


def test_what_is_packed_is_refused_unpacked(runs, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "team.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("team/data/weights/weight_0", bytes(10**6))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *what: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="it holds team/data/weights/weight_0"):
        load_team(tmp_path)


def test_a_damaged_config_ends_the_command_in_one_line(runs, tmp_path):
    complains(command("envs/play.py", spoiled(runs("smac"), tmp_path, lacks("args"))), "config.json is damaged")


def test_a_team_without_its_file_and_a_cut_off_one(runs, tmp_path):
    (tmp_path / "config.json").write_bytes((runs("smac") / "config.json").read_bytes())
    complains(command("envs/play.py", tmp_path, "--games", 2), "no kept team")
    (tmp_path / "team.pt2").write_bytes((runs("smac") / "team.pt2").read_bytes()[:5000])
    complains(command("envs/play.py", tmp_path, "--games", 2), "no kept team, or damaged")


# ---------------------------------------------------------------- files that are not what they seem
CODE = "__import__('pathlib').Path(__import__('os').environ['FLAG']).touch()"


class Bomb:
    def __reduce__(self):
        return eval, (CODE,)


def pickled():
    torch.save(Bomb(), content := io.BytesIO())
    return content.getvalue()


def with_model(change):
    """The change of a program's JSON."""

    def changed(config, parts):
        model = json.loads(parts["archive/models/model.json"])
        parts["archive/models/model.json"] = json.dumps(change(model) or model).encode()

    return changed


def with_weights(old, new):
    def changed(config, parts):
        name = "archive/data/weights/model_weights_config.json"
        parts[name] = parts[name].replace(old, new)
        return {name: pickled() if "/weights/weight_" in name else part for name, part in parts.items()}.items()

    return changed


def twice(config, parts):
    """Which of two is read? The first by one reader, the last by another."""
    return [*with_weights(b'"use_pickle": false', b'"use_pickle": true')(config, dict(parts)), *parts.items()]


def two_cases(config, parts):
    """Torch's own reader takes them for the same name."""
    name = "archive/data/weights/model_weights_config.json"
    bad = dict(with_weights(b'"use_pickle": false', b'"use_pickle": true')(config, dict(parts)))
    good = {k: bad[k] if "/weights/weight_" in k else part for k, part in parts.items()}
    return ({name.replace("weights_config", "Weights_Config"): bad[name]} | good).items()


def opaque(config, parts):
    name = "archive/data/constants/model_constants_config.json"
    constants = json.loads(parts[name])
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    constants["config"]["x"] = entry
    parts |= {name: json.dumps(constants).encode(), "archive/data/constants/opaque_obj_0": pickle.dumps(Bomb())}


def disguised(config, parts):
    """A pickle that goes by its name, called a tensor."""
    name = "archive/data/constants/model_constants_config.json"
    weights = json.loads(parts["archive/data/weights/model_weights_config.json"])["config"]
    constants, content = json.loads(parts[name]), pickle.dumps(Bomb())
    constants["config"]["x"] = next(iter(weights.values())) | {"path_name": "opaque_obj_0", "is_param": False}
    parts["archive/data/constants/opaque_obj_0"] = content + b"0" * (-len(content) % 4)  # whole float32
    parts[name] = json.dumps(constants).encode()


def inputs(config, parts):
    parts["archive/data/sample_inputs/model.pt"] = pickled()


def packed(config, parts):
    name = zipfile.ZipInfo("archive/byteorder")
    name.compress_type = zipfile.ZIP_DEFLATED
    parts[name] = parts.pop("archive/byteorder")


def size(model):
    sizes = (x for value in model["graph_module"]["graph"]["tensor_values"].values() for x in value["sizes"])
    expression = next(x["as_expr"] for x in sizes if "as_expr" in x)
    expression["expr_str"] = f"{CODE} or {expression['expr_str']}"


def placeholder(model):
    return json.loads(json.dumps(model).replace('"obs"', json.dumps(f"obs={CODE}")))


def names_with_dots(model):
    model["graph_module"]["graph"]["nodes"][0]["name"] = "torch.add"  # torch.add = ..., in the code of the function


def nesting(model):
    context = {"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": []}
    spec = [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]
    for call in model["graph_module"]["module_call_graph"]:
        if call["signature"]:
            call["signature"]["in_spec"] = json.dumps(spec)


def operation(name):
    def changed(model):
        node = model["graph_module"]["graph"]["nodes"][0]
        node.update(target=name, inputs=[{"name": "", "arg": {"as_string": "x"}, "kind": 1}])

    return with_model(changed)


def weight_name(config, parts):
    old, new = b'modules_of_act.0.body.0.weight"', json.dumps(f'x"+str({CODE})+"')[1:].encode()
    for name in ("archive/models/model.json", "archive/data/weights/model_weights_config.json"):
        assert old in parts[name]
        parts[name] = parts[name].replace(old, new)


# what is done to a file, what is said of it, and whether torch.export.load itself runs the code that it brings
ATTACKS = {
    "pickles": (with_weights(b'"use_pickle": false', b'"use_pickle": true'), "it holds pickles", True),
    "pickles, by a number": (with_weights(b'"use_pickle": false', b'"use_pickle": 1'), "it holds pickles", True),
    "pickles, in other letters": (with_weights(b'"use_pickle": false', b'"\\u0075se_pickle": true'), "it holds", True),
    "a name twice": (twice, "it holds pickles", None),
    "a name in two cases": (two_cases, "it holds archive/data/weights/model_Weights_Config.json", True),
    "a pickled constant": (opaque, "no kept team, or damaged", True),
    "one that is called a tensor": (disguised, "no kept team, or damaged", True),
    "pickled inputs": (inputs, "no kept team, or damaged (UnpicklingError", True),
    "a size": (with_model(size), "its expr_str", True),
    "a guard": (with_model(lambda model: model["guards_code"].append(f"{CODE} is None")), None, True),
    "the name of an input": (with_model(placeholder), "its name", None),
    "a name that would replace torch's": (with_model(names_with_dots), "its name 'torch.add'", None),
    "the name of a weight": (weight_name, "is not one of a kept team", None),
    "how inputs are nested": (with_model(nesting), "its in_spec", None),
    "a function of the system": (operation("torch.os.system"), "its target 'torch.os.system'", None),
    "a call": (operation("_operator.call"), "its target '_operator.call'", None),
    "an operation on files": (operation("torch.ops.aten.from_file.default"), "its target", None),
    "a file packed": (packed, "it holds archive/byteorder", None),
    "a library": (lambda config, parts: parts.update({"archive/data/aotinductor/model/x.so": b""}), "it holds", None),
    "nothing": (lambda config, parts: parts.clear(), "no kept team, or damaged", None),
    "no program": (with_model(lambda model: {"graph_module": {}}), "no kept team, or damaged", None),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_is_run(runs, tmp_path, monkeypatch, attack):
    change, said, harms = ATTACKS[attack]
    monkeypatch.setenv("FLAG", str(tmp_path / "flag"))
    path = spoiled(runs("smac"), tmp_path, change) / "team.pt2"
    if said:
        with pytest.raises(ValueError) as error:
            load_team(tmp_path)
        assert said in str(error.value) and "\n" not in str(error.value)
    else:
        game, teams = envs.make("smac", "3m", 2), [load_team(tmp_path), load_team(runs("smac"))]
        assert play_teams(game, teams[0], 0).returns.equal(play_teams(game, teams[1], 0).returns)
    assert not (tmp_path / "flag").exists() and "antigravity" not in sys.modules
    if harms:  # the attack is one
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            team = torch.export.load(path).module()
            team(torch.zeros(2, 3, 30), torch.ones(2, 3, 9, dtype=torch.bool), team.start.repeat(1, 2, 1, 1))
        assert (tmp_path / "flag").exists()


def test_a_file_with_pickles_ends_the_command_in_one_line(runs, tmp_path):
    change = ATTACKS["pickles, by a number"][0]
    environ = os.environ | {"FLAG": str(tmp_path / "flag")}
    complains(command("envs/play.py", spoiled(runs("smac"), tmp_path, change), env=environ), "it holds pickles")
    assert not (tmp_path / "flag").exists()


@pytest.mark.parametrize("text, key", [("opaque_obj_0", "path_name"), ("custom_obj_0", "path_name"), ("a b", "x")])
def test_texts_of_other_forms_are_refused(text, key):
    play_py.checked({"config": [{"path_name": "weight_0", "x": "a.b_c.d"}]})
    with pytest.raises(ValueError, match=f"its {key} '{text}' is not one of a kept team"):
        play_py.checked({"config": [{key: text}]})


def test_a_team_from_a_gpu_plays_on_the_cpu(runs, tmp_path):
    def moved(config, parts):
        for name in [name for name in parts if name.endswith(".json")]:
            there, here = b'{"type": "cuda", "index": 0}', rb'\{"type": "cpu", "index": null\}'
            parts[name], found = re.subn(here, there, parts[name])
            assert found or "constants" in name

    team, game = load_team(spoiled(runs("smac"), tmp_path, moved)), envs.make("smac", "3m", 4)
    assert play_teams(game, team, 3).returns.equal(play_teams(game, load_team(runs("smac")), 3).returns)


# ---------------------------------------------------------------- animated pictures
@pytest.mark.parametrize("name", ["smac", "bridge", "matrix", "reacher"])
def test_a_game_is_drawn_step_by_step(runs, tmp_path, name):
    seed = json.loads((runs(name) / "summary.json").read_text())["seeds"][1]
    environ = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MUJOCO_GL")}
    words = ("--games", 3, "--seed", 5, "--gif", tmp_path / "film.gif", "--film-seed", seed)
    done = command("envs/play.py", runs(name), *words, env=environ)
    if name == "reacher" and done.returncode:  # there is no EGL here
        complains(done, "MuJoCo cannot be")
        return
    assert done.returncode == 0, done.stderr
    env, task = RUNS[name].split()[1], dict(smac="3m", matrix="xor", reacher="leader-only").get(name, "")
    game, team = envs.make(env, task), load_team(runs(name))

    def act(obs, info, memory):
        return first(team(*(x for x in (obs, info.get("avail_actions")) if x is not None), memory), 1)

    played = play(game, act, team.start, 5, film=True)
    steps = int(played.film["mask"].sum())
    assert f"film.gif: a game of seed {seed}, {steps} steps, return {played.returns.item():.4f}" in done.stdout
    with Image.open(tmp_path / "film.gif") as drawn:
        assert drawn.n_frames == steps + 1
        shown = sum(drawn.seek(k) or drawn.info["duration"] for k in range(drawn.n_frames))
    assert shown == steps * 250 + 2000 and [path.name for path in tmp_path.iterdir()] == ["film.gif"]


OWN = """
import numpy as np
from envs.bridge import Bridge
from gymnasium.spaces import Box, Discrete


class Blind(Bridge):
    picture = property(doc="there is none")


class Seen(Blind):
    def render(self):
        drawn = np.full((20, 30, 3), 255, np.uint8)
        drawn[int(self.cells[0, 0]) % 20] = 0
        return (drawn,)  # as Gymnasium's vector environments do


class Turns:
    '''Two agents that see zeros for three steps, as PettingZoo would have it.'''

    possible_agents, max_cycles = ["a", "b"], 3

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def observation_space(self, agent):
        return Box(0, 1, (8,))

    def action_space(self, agent):
        return Discrete(5)

    def each(self, value):
        return dict.fromkeys(self.possible_agents, value)

    def reset(self, seed=None):
        self.agents, self.steps = self.possible_agents, 0
        return self.each(np.zeros(8, np.float32)), self.each({})

    def step(self, actions):
        self.steps += 1
        over = self.steps == 3
        self.agents = [] if over else self.agents
        ends = self.each(over), self.each(False)
        return self.each(np.zeros(8, np.float32)), self.each(1.0), *ends, self.each({})

    def render(self):
        if self.render_mode == "rgb_array":
            return np.full((20, 30, 3), 50 * self.steps, np.uint8)

    def close(self):
        pass


def blind(num_envs, device):
    return Blind(num_envs, device)


def seen(num_envs, device):
    return Seen(num_envs, device)
"""


def test_games_of_others_are_drawn_if_they_draw_themselves(runs, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "film.gif").write_bytes(b"old")
    environ, words = os.environ | {"PYTHONPATH": str(tmp_path)}, ("--games", 2, "--gif", tmp_path / "film.gif", "--env")
    run = spoiled(runs("bridge"), tmp_path, args(env="mine:blind"))
    complains(command("envs/play.py", run, *words, "mine:blind", env=environ), "Blind cannot be drawn: it has no picture(actions)")
    assert (tmp_path / "film.gif").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["config.json", "film.gif", "mine.py", "team.pt2"]
    run = spoiled(runs("bridge"), tmp_path, args(env="mine:seen"))
    done = command("envs/play.py", run, *words, "mine:seen", env=environ)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "film.gif") as drawn:
        assert drawn.n_frames > 8 and drawn.size == (30, 36)
    run = spoiled(runs("bridge"), tmp_path, args(env="mine:Turns"))  # it is asked to draw itself
    done = command("envs/play.py", run, *words, "mine:Turns", env=environ)
    assert done.returncode == 0 and "a game of seed 7, 3 steps, return 6.0000" in done.stdout, done.stderr
    with Image.open(tmp_path / "film.gif") as drawn:
        assert drawn.n_frames == 4


def test_a_picture_that_cannot_be_written_leaves_nothing(runs, tmp_path):
    (tmp_path / "film.gif").mkdir()
    complains(command("envs/play.py", runs("matrix"), "--gif", tmp_path / "film.gif"), "Is a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["film.gif"]


def test_what_cannot_be_drawn_says_why(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    for library in (None, "glfw"):
        monkeypatch.setenv("MUJOCO_GL", library) if library else monkeypatch.delenv("MUJOCO_GL", raising=False)
        if sys.platform == "linux":
            with pytest.raises(ValueError, match="MuJoCo cannot draw without a display: set MUJOCO_GL to egl or os"):
                envs.make("reacher", "all-observant").picture()
    with pytest.raises(ValueError, match="only one of two"):
        envs.make("matrix", "[[[1, 0], [0, 1]], [[0, 1], [1, 0]]]").picture()


def test_a_library_that_mujoco_does_not_know_ends_in_one_line(runs):
    done = command("envs/play.py", runs("reacher"), "--games", 1, env=os.environ | {"MUJOCO_GL": "nonsense"})
    complains(done, "MuJoCo cannot be loaded", "nonsense")


def test_pictures_show_what_changes():
    bridge = envs.make("bridge")
    bridge.reset()
    before = bridge.picture()
    bridge.step(torch.tensor([[4, 4]]))
    assert before.shape == bridge.picture().shape and (before != bridge.picture()).any()
    game = envs.make("matrix", "xor")
    assert (game.picture(torch.tensor([[0, 1]])) != game.picture(torch.tensor([[1, 0]]))).any()
    battle = envs.make("smac", "3m")
    battle.reset(seed=0)
    whole = battle.picture()
    battle.health[0] = 10
    hurt = battle.picture()
    battle.health[0] = 0
    gone = battle.picture()
    assert (whole != hurt).any() and (hurt != gone).any() and whole.shape == gone.shape
    battle.target[1] = 4
    assert (gone != battle.picture()).any()  # a line to whom it attacks


def test_a_film_is_of_the_team_that_was_asked_for(runs):
    team = load_team(runs("matrix"))
    for index in range(2):
        images, played = film(envs.make("matrix", "xor"), team, index, 0)
        assert len(images) == 2
        alone = play_teams(envs.make("matrix", "xor", 2), team, 0)
        assert played.returns.item() == alone.returns[index]
