"""`python envs/play.py RUN`: a kept team plays again, and a file that is not one is refused unread."""

import io
import json
import pickle
import zipfile

import pytest
import torch
from conftest import command, complains, load_script
from PIL import Image

import envs
from envs.play import load_team, play_team


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """BC on 3m, two seeds."""
    folder, script = tmp_path_factory.mktemp("play") / "run", load_script("bc")
    words = "--env smac --task 3m --episodes 40 --steps 60 --eval-every 60 --num-seeds 2 --eval-episodes 2 --out-dir"
    script.main(script.parse([*words.split(), str(folder)]))
    return folder


def test_it_plays_the_games_again_and_draws_one(run, tmp_path):
    done = command("envs/play.py", run, "--games", 4, "--seed", 5, "--gif", tmp_path / "film.gif")
    assert done.returncode == 0, done.stderr
    game, team = envs.make("smac", "3m", 4), load_team(run)
    played = [play_team(game, team, 5, index) for index in range(2)]
    for seed, each in enumerate(played):
        assert f"seed {seed}      return {each.returns.mean():10.4f} ±" in done.stdout
    assert f"all seeds   return {torch.stack([each.returns.mean() for each in played]).mean():10.4f}" in done.stdout
    with Image.open(tmp_path / "film.gif") as film:
        film_ = []
        play_team(game, team, 5, 0, film_)
        shown = sum(film.seek(k) or film.info["duration"] for k in range(film.n_frames))  # pictures alike are one frame
        assert shown == 250 * (len(film_) - 1) + 2000 and len(film_) > 5 and film.size == film_[0].shape[1::-1]


def test_a_memory_of_zeros_begins_a_game(run):
    team = load_team(run)
    assert team.start.shape == (2, 1, 3, 0) and not team.start.any()


@pytest.mark.parametrize("words, said", [
    (("--games", 0), "--games and --fps must be at least 1"), (("--gif", "nowhere/film.gif"), "there is no folder for"),
])  # fmt: skip
def test_bad_flags_end_in_one_line(run, words, said):
    complains(command("envs/play.py", run, *words), said)


def spoiled(run, folder, change):
    """A copy of a run with `change(config, {name: bytes})` made."""
    config = json.loads((run / "config.json").read_text())
    with zipfile.ZipFile(run / "team.pt2") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(config, parts)
    (folder / "config.json").write_text(json.dumps(config))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    (folder / "team.pt2").write_bytes(content.getvalue())
    return folder


class Bomb:
    def __reduce__(self):
        return print, ("unpickled",)


def add_pickle(config, parts):
    parts["archive/data/constants/custom_obj_0"] = pickle.dumps(Bomb())


def pickled_inputs(config, parts):
    parts["archive/data/sample_inputs/model.pt"] = pickle.dumps(Bomb())


def pickled_weights(config, parts):
    name = "archive/data/weights/model_weights_config.json"
    parts[name] = parts[name].replace(b'"use_pickle": false', b'"use_pickle": true')
    parts["archive/data/weights/weight_0"] = pickle.dumps(Bomb())


@pytest.mark.parametrize("change, said", [
    (add_pickle, "it holds archive/data/constants/custom_obj_0"), (pickled_inputs, "no kept team, or damaged"),
    (pickled_weights, "it holds pickles"),
    (lambda config, parts: parts.clear(), "no kept team, or damaged"),
    (lambda config, parts: parts.update({"archive/models/model.json": b"{}"}), "no kept team, or damaged"),
    (lambda config, parts: config.pop("args"), "is no run of ours"),
    (lambda config, parts: config["args"].update(task="8m"), "the team does not fit this environment"),
    (lambda config, parts: config["args"].update(env="chess"), "unknown environment 'chess'"),
])  # fmt: skip
def test_what_is_no_kept_team_is_refused_and_never_unpickled(run, tmp_path, change, said):
    done = command("envs/play.py", spoiled(run, tmp_path, change), "--games", 2)
    complains(done, said)
    assert "unpickled" not in done.stdout


def test_a_cut_off_file_and_none_at_all(run, tmp_path):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    complains(command("envs/play.py", tmp_path, "--games", 2), "no kept team")
    (tmp_path / "team.pt2").write_bytes((run / "team.pt2").read_bytes()[:5000])
    complains(command("envs/play.py", tmp_path, "--games", 2), "no kept team, or damaged")


def test_what_cannot_be_drawn_says_why(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(ValueError, match="MuJoCo cannot draw without a display|MuJoCo cannot draw on this machine"):
        envs.make("reacher", "all-observant").picture()
    with pytest.raises(ValueError, match="only one of two"):
        envs.make("matrix", "[[[1, 0], [0, 1]], [[0, 1], [1, 0]]]").picture()


def test_pictures_show_what_changes():
    bridge = envs.make("bridge")
    bridge.reset()
    before = bridge.picture()
    bridge.step(torch.tensor([[4, 4]]))
    assert before.shape == bridge.picture().shape and (before != bridge.picture()).any()
    game = envs.make("matrix", "xor")
    assert (game.picture(torch.tensor([[0, 1]])) != game.picture(torch.tensor([[1, 0]]))).any()
