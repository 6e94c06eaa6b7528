"""Datasets of battles: the teams that ship keep their word, and what they played replays."""

import json

import numpy as np
import pytest
import torch

import data
import envs
from data import recipes
from data.teams import read_behaviour

BEHAVIOUR = recipes.BEHAVIOUR
MAPS = ("3m", "2s3z", "3s_vs_5z", "5m_vs_6m", "6h_vs_8z")


def about(path):
    return json.loads(str(np.load(path)["info"]))


def test_the_teams_that_should_ship_do():
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
    played = data.collect_dataset("smac", task, name, seed=5, episodes=200)
    rate = info["sampled_win_rate"]
    error = (max(rate * (1 - rate), 0.02) * (1 / 64 + 1 / 200)) ** 0.5
    assert abs(played.win_rate - rate) < 4 * error
    assert abs(played.returns.mean() - info["sampled_return"]) < 2.5


def test_battles_are_played_in_blocks(monkeypatch):
    """The last block's seed and its team give the same actions, observations and ends."""
    monkeypatch.setattr(recipes, "BLOCK", 3)
    found = data.collect_dataset("smac", "3m", "mixed", seed=2, episodes=9)
    assert found.info["behaviour"].startswith("4 by medium (mappo after ")
    assert "5 by expert (mappo after " in found.info["behaviour"]
    assert len({tuple(start.flatten().tolist()) for start in found.state[:, 0]}) == 9
    won = torch.tensor(found.info["won"]).bool()
    assert len(won) == 9 and won.any()
    assert (found.terminated.any(1) | ~won).all() and ((found.returns > 19.99) | ~won).all()
    play, _ = read_behaviour(BEHAVIOUR / "3m" / "expert.npz")
    game = envs.make("smac", "3m", 2)
    generator = torch.Generator().manual_seed(1_000_003 * 2 + 3)
    obs, info = game.reset(seed=2003)
    part = slice(7, 9)
    for t in range(int(found.lengths[part].max())):
        real = found.mask[part, t]
        assert torch.equal(found.obs[part, t][real], obs[real])
        assert torch.equal(found.state[part, t][real], info["state"][real])
        assert torch.equal(found.avail_actions[part, t][real], info["avail_actions"][real])
        actions = play(t, obs, info, generator)
        assert torch.equal(found.actions[part, t][real], actions[real])
        obs, reward, terminated, _, info = game.step(actions)
        assert torch.equal(found.reward[part, t][real], reward[real])
        assert torch.equal(found.terminated[part, t][real], terminated[real])
