"""Datasets of battles: the teams that ship keep their word, and what they played replays."""

import json

import numpy as np
import pytest
import torch

import data
import envs
from data import recipes

BEHAVIOUR = recipes.BEHAVIOUR
MAPS = sorted(folder.name for folder in BEHAVIOUR.iterdir() if folder.name in envs.TASKS["smac"])


def about(path):
    return json.loads(str(np.load(path, allow_pickle=False)["info"]))


def test_the_teams_that_should_ship_do():
    assert {"3m", "2s3z", "3s_vs_5z", "5m_vs_6m", "6h_vs_8z"} <= set(MAPS)
    for task in MAPS:
        steps = [about(path)["steps"] for path in BEHAVIOUR.glob(f"{task}/replay-*.npz")]
        medium = about(BEHAVIOUR / task / "medium.npz")["steps"]
        assert len(steps) == len(set(steps)) and min(steps) == 0 and max(steps) == medium


@pytest.mark.long
@pytest.mark.parametrize("name", ["expert", "medium"])
@pytest.mark.parametrize("task", MAPS)
def test_each_team_keeps_its_word(task, name):
    """Its own figures, from 64 battles, agree with 200 of ours within four standard errors."""
    info = about(BEHAVIOUR / task / f"{name}.npz")
    assert (info["env"], info["task"], info["script"]) == ("smac", task, "mappo")
    played = data.collect_dataset("smac", task, name, seed=5, episodes=200)
    rate = info["sampled_win_rate"]
    error = (max(rate * (1 - rate), 0.02) * (1 / 64 + 1 / 200)) ** 0.5
    assert abs(played.win_rate - rate) < 4 * error
    assert abs(played.returns.mean() - info["sampled_return"]) < 2.5


def test_a_dataset_replays():
    """Its seed and its actions give the same observations, rewards and ends in the environment."""
    played = data.collect_dataset("smac", "3m", "medium", seed=2, episodes=12).check()
    won = torch.tensor(played.info["won"]).bool()
    assert (played.terminated.any(1) | ~won).all() and ((played.returns > 19.99) | ~won).all()
    game = envs.make("smac", "3m", num_envs=12)
    obs, info = game.reset(seed=2000)
    for t in range(int(played.lengths.max())):
        real = played.mask[:, t]
        assert torch.equal(obs[real], played.obs[real, t])
        assert torch.equal(info["state"][real], played.state[real, t])
        assert torch.equal(info["avail_actions"][real], played.avail_actions[real, t])
        obs, reward, terminated, _, info = game.step(played.actions[:, t])  # 0 behind the end
        assert torch.equal(reward[real], played.reward[real, t])
        assert torch.equal(terminated[real], played.terminated[real, t])


def test_mixtures_have_equal_parts():
    mixed = data.collect_dataset("smac", "3m", "mixed", episodes=41)
    behaviour = mixed.info["behaviour"]
    assert behaviour.startswith("20 by medium (mappo after ") and "21 by expert" in behaviour
    replay = data.collect_dataset("smac", "3m", "medium-replay", episodes=41)
    teams = len(list((BEHAVIOUR / "3m").glob("replay-*.npz")))
    parts = replay.info["behaviour"].split(", ")
    parts = [int(part.split(" by replay-")[0]) for part in parts]
    assert len(parts) == teams and sum(parts) == 41 and max(parts) - min(parts) <= 1


def test_without_the_teams_one_line_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="mappo.py --env smac --task 8m"):
        data.collect_dataset("smac", "8m", "expert", episodes=4)
    monkeypatch.setattr(recipes, "BEHAVIOUR", tmp_path)
    (tmp_path / "3m").mkdir()
    (tmp_path / "3m" / "expert.npz").write_bytes(
        (BEHAVIOUR / "3m" / "expert.npz").read_bytes()[:5000]
    )
    with pytest.raises(ValueError, match="expert.npz is damaged"):
        data.collect_dataset("smac", "3m", "expert", episodes=4)
