"""The keeper of a run, by the example of bc.py: files, resuming, the command line, teams."""

import itertools
import json
import subprocess
import sys
import types
import zipfile

import pytest
import torch
from conftest import ROOT, command, load_script

import data
from data import play
from data.run import command_line, curves, evaluate, files, keeper, team

bc = load_script("bc")
XOR = "--env matrix --task xor --num-seeds 2 --steps 4 --eval-every 2 --eval-episodes 5".split()


def go(folder, *words):
    first = () if "--resume" in words else XOR
    return bc.main(bc.parse([*first, *map(str, words), "--out-dir", str(folder)]))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run on Bridge, for all tests that only read it."""
    folder = tmp_path_factory.mktemp("run") / "done"
    go(folder, "--env", "bridge", "--task", "", "--episodes", 20, "--seed", 3)
    return folder


# ---------------------------------------------------------------- what a run leaves
def test_a_run_fills_its_folder(done):
    assert {path.name for path in done.iterdir()} == set(
        "config.json metrics.csv summary.json curve.png team.pt2 checkpoint.pt".split()
    )
    summary = json.loads((done / "summary.json").read_text())
    wanted = "script env task dataset steps seeds return normalized_return win_rate "
    assert set((wanted + "updates_per_second wall_seconds device").split()) <= summary.keys()
    assert summary["seeds"] == [3, 4] and summary["steps"] == 4 and summary["win_rate"] is None
    config = json.loads((done / "config.json").read_text())
    assert config["args"]["env"] == "bridge" and config["versions"]["torch"] == torch.__version__
    lines = (done / "metrics.csv").read_text().splitlines()
    assert lines[0] == "step,seed,policy_loss,return,sampled_return"
    assert [line.split(",")[:2] for line in lines[1:]] == [[s, k] for s in "024" for k in "34"]
    assert lines[1].split(",")[2] == ""  # nothing had been learned


@pytest.mark.parametrize("last, every, stride", [(10, 4, 1), (3, 100, 1), (7, 30, 12), (0, 5, 1)])
def test_evaluations_are_first_last_and_whenever_their_distance_is_passed(last, every, stride):
    run = types.SimpleNamespace(last=last, every=every, stride=stride)
    due = [step for step in range(last + 1) if keeper.Run.scheduled(run, step)]
    passed = {0, last}
    for multiple in range(every, last * stride + 1, every):
        passed.add(next(step for step in itertools.count() if step * stride >= multiple))
    assert due == sorted(passed)


def test_only_updates_count_in_updates_per_second(tmp_path, monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0], strftime=files.time.strftime)
    monkeypatch.setattr(keeper, "time", clock)
    update, score = bc.update, keeper.score

    def slow(amount, function):
        def wait(*inputs):
            now[0] += amount
            return function(*inputs)

        return wait

    monkeypatch.setattr(bc, "update", slow(0.5, update))
    monkeypatch.setattr(keeper, "score", slow(100.0, score))
    assert go(tmp_path / "run")["updates_per_second"] == pytest.approx(2)


def test_a_file_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    files.save(path, b"old")
    with pytest.raises(FileExistsError):
        files.save(path, b"other", new=True)

    def full(self, content):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(type(path), "write_bytes", full)
        files.save(path, b"new")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_rows_that_lack_a_cell(tmp_path):
    files.save_csv(tmp_path / "t.csv", [{"step": 0, "b": 1}, {"step": 1, "a": 2, "b": 3}])
    assert (tmp_path / "t.csv").read_text() == "step,a,b\n0,,1\n1,2,3\n"


def test_a_commit_is_ours_and_marked_where_files_were_changed(monkeypatch, tmp_path):
    words = {"--show-toplevel": str(files.HOME), "HEAD": "abc", "--untracked-files=no": ""}
    monkeypatch.setattr(files, "git", lambda *said: words[said[-1]])
    assert files.commit() == "abc"
    words["--untracked-files=no"] = " M x.py"
    assert files.commit() == "abc+"
    words["--show-toplevel"] = str(tmp_path)  # a repository around a copy of ours
    assert files.commit() == "unknown"


def test_means_over_seeds_by_hand():
    values = torch.tensor([[1.0, 3.0], [4.0, 6.0], [8.0, 8.0]])
    found = curves.over_seeds(values)
    assert found["per_seed"] == [2, 5, 8] and found["mean"] == 5
    assert found["stderr"] == pytest.approx(3 / 3**0.5)


def test_streams_are_apart():
    draws = [torch.rand(3, generator=evaluate.stream(s, p)) for s in range(3) for p in range(3)]
    assert len({tuple(x.tolist()) for x in draws}) == 9
    assert torch.equal(draws[0], torch.rand(3, generator=evaluate.stream(0, 0)))


def test_tracking(tmp_path, monkeypatch):
    logged = []
    tracker = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    wandb = types.SimpleNamespace(init=lambda **_: tracker)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    go(tmp_path / "run", "--track")
    assert [step for step, _ in logged] == [0, 2, 4] and "policy_loss" in logged[1][1]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb"):
        go(tmp_path / "other", "--track")


# ---------------------------------------------------------------- resuming
def test_a_finished_run_is_resumed_to_the_same_result(tmp_path):
    one = go(tmp_path / "run")
    other = go(tmp_path / "run", "--resume")
    assert one["return"] == other["return"] and one["steps"] == other["steps"]


@pytest.mark.parametrize("words, match", [(("--lr", 0.5), "--lr"), (("--steps", 8), "--steps")])
def test_what_cannot_change(tmp_path, words, match):
    go(tmp_path / "run")
    with pytest.raises(ValueError, match=match):
        go(tmp_path / "run", "--resume", *words)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    folder = tmp_path / "run"
    go(folder)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    for change in ({"script": "iql"}, {"parts": {}}, {"learned_from": {"the dataset": "other"}}):
        files.save_tensors(folder / "checkpoint.pt", saved | change)
        with pytest.raises(ValueError, match="run"):
            go(folder, "--resume")
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        go(folder, "--resume")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json"):
        go(folder, "--resume")


def test_a_folder_has_one_run(tmp_path, monkeypatch):
    go(tmp_path / "run")
    with pytest.raises(ValueError, match="run"):
        go(tmp_path / "run")
    args = bc.parse([*XOR, "--out-dir", str(tmp_path / "race")])
    keeper.Run("bc", args).begin()
    with pytest.raises(ValueError, match="race"):  # of a run that had looked before
        monkeypatch.setattr(files, "refuse_taken", lambda folder: None)
        keeper.Run("bc", args).begin()
    monkeypatch.chdir(tmp_path)
    names = [files.new_folder(tmp_path / "new").name for _ in range(3)]
    assert names == ["new", "new-1", "new-2"]


# ---------------------------------------------------------------- the command line
def test_a_flag_beats_the_preset_and_the_preset_the_default():
    args = bc.parse("--env smac --batch-size 7".split())
    assert (args.task, args.dataset, args.steps) == ("5m_vs_6m", "medium-replay", 2000)
    assert args.batch_size == 7 and args.layers == 2
    assert bc.parse("--env matrix --task xor".split()).dataset == "all"


def test_presets_in_units_of_the_rewards(tmp_path):
    presets = {"matrix": {"lr": 0.5}, "matrix xor": {"lr": 0.25}, "": {"lr": 0.5}}
    zero = "seed episodes eval_episodes"

    def read(words):
        how = {"in_units": "lr", "may_be_zero": zero}
        return command_line.read_args(bc.Args, presets, words.split(), "x", **how)

    assert read("--env matrix --task m-ne").lr == pytest.approx(0.5 * 20)
    assert read("--env matrix --task xor").lr == 0.25
    assert read("--env matrix --task m-ne --lr 0.5").lr == 0.5
    dataset = data.load("bridge", "", "mixed", episodes=20)
    dataset.info.clear()
    data.write(dataset, tmp_path / "mine.h5")
    args = read(f"--dataset {tmp_path}/mine.h5 --eval-episodes 0")
    assert args.lr == pytest.approx(0.5 * dataset.returns.std(correction=0).item())
    assert args.one_hot and args.env == ""


def test_a_file_says_where_it_was_recorded_but_not_which_code_runs(tmp_path):
    dataset = data.load("bridge", "", "mixed", episodes=20)
    data.write(dataset, tmp_path / "mine.h5")
    assert bc.parse(["--dataset", str(tmp_path / "mine.h5")]).env == "bridge"
    dataset.info["env"] = "os:abort"
    data.write(dataset, tmp_path / "other.h5")
    with pytest.raises(ValueError, match="os:abort"):
        bc.parse(["--dataset", str(tmp_path / "other.h5")])


@pytest.mark.parametrize("words", ["--lr 0", "--lr nan", "--batch-size -1", "--steps 0"])
def test_numbers_that_cannot_be_used(words):
    with pytest.raises(ValueError, match=words.split()[0]):
        bc.parse(words.split())


def test_help_shows_what_the_environment_would_run_with(capsys):
    with pytest.raises(SystemExit):
        bc.parse("--env smac --help".split())
    assert "512" in capsys.readouterr().out


def test_how_a_program_ends(capsys, monkeypatch):
    def fail(error):
        raise error

    with pytest.raises(SystemExit) as end:
        command_line.launch(lambda args: fail(ValueError("no such thing")), lambda: None)
    assert end.value.code == "error: no such thing"
    monkeypatch.setattr(keeper.Run, "latest", "a b")
    with pytest.raises(SystemExit) as end:
        command_line.launch(lambda args: fail(KeyboardInterrupt()), lambda: None)
    assert end.value.code == 130 and "--resume --out-dir 'a b'" in capsys.readouterr().out


def test_an_output_that_is_gone_does_not_end_a_run(tmp_path):
    words = [sys.executable, "algorithms/bc.py", *XOR, "--out-dir", str(tmp_path / "run")]
    with open("/dev/full", "w") as full:
        assert subprocess.run(words, cwd=ROOT, stdout=full).returncode == 0
    assert (tmp_path / "run" / "summary.json").exists()


# ---------------------------------------------------------------- a kept team
def test_a_kept_team_plays_again(done, tmp_path, capsys):
    play.main(play.Args(done, games=50, seed=4, gif=tmp_path / "x.gif", film_seed=4))
    shown = capsys.readouterr().out
    wanted = json.loads((done / "summary.json").read_text())["return"]["per_seed"]
    for seed, mean in zip((3, 4), wanted):
        line = next(line for line in shown.splitlines() if line.startswith(f"seed {seed}"))
        assert float(line.split()[2]) == pytest.approx(mean, abs=1e-4)
    assert (tmp_path / "x.gif").read_bytes()[:3] == b"GIF"


def test_teams_that_cannot_be_played(done, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=str(path)):
            play.main(play.Args(path))
    with pytest.raises(ValueError, match="smac"):
        play.main(play.Args(done, env="smac"))
    with pytest.raises(ValueError, match="gif"):
        play.main(play.Args(done, gif=tmp_path / "x.png"))
    (tmp_path / "team.pt2").write_bytes((done / "team.pt2").read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        team.load_team(tmp_path)


def changed(path, copy, change):
    """A copy of an archive, whose parts `change` (name, bytes) returns."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"use_pickle": false', b'"use_pickle": true'),
        (b"torch.ops.aten.relu.default", b"os.system"),
        (b"torch.ops.aten.relu.default", b"torch.ops.aten.from_file.default"),
        (b'"name": "obs"', b'"name": "obs); import os #"'),
    ],
)
def test_nothing_in_a_strangers_team_is_run(done, tmp_path, old, new):
    seen = []

    def change(name, part):
        seen.append(old in part)
        return part.replace(old, new)

    changed(done / "team.pt2", tmp_path / "team.pt2", change)
    assert any(seen)
    with pytest.raises(ValueError, match="no kept team"):
        team.load_team(tmp_path / "team.pt2")


def test_a_part_that_no_kept_team_has(done, tmp_path):
    path = tmp_path / "team.pt2"
    path.write_bytes((done / "team.pt2").read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("team/data/aotinductor/model/x.so", b"code")
    with pytest.raises(ValueError, match="x.so"):
        team.load_team(path)


def test_the_commands_say_what_is_wrong_in_one_line(tmp_path):
    for words in (["data/play.py", tmp_path], ["algorithms/bc.py", "--env", "chess"]):
        process = command(*words)
        lines = process.stderr.strip().splitlines()
        assert process.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: ")
