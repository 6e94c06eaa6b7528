"""Datasets of battles: who plays them, that they replay, and what happens without the teams."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import command, complains

import data
import data.collect
import envs
from data.recipes import BATTLES, BEHAVIOUR, read_behaviour

MAPS = sorted(folder.name for folder in BEHAVIOUR.iterdir() if folder.name in envs.TASKS["smac"])


def about(path):
    return json.loads(str(np.load(path, allow_pickle=False)["info"]))


def test_the_teams_that_should_ship_do():
    assert {"3m", "2s3z", "3s_vs_5z", "5m_vs_6m", "6h_vs_8z"} <= set(MAPS)
    assert sum(file.stat().st_size for file in BEHAVIOUR.rglob("*.npz")) < 8e6


@pytest.mark.parametrize("task", MAPS)
def test_each_team_fits_its_map_and_keeps_its_word(task):
    """The figures in a file, from 64 battles, agree with 200 of ours: for win rates within four standard errors."""
    for name in ("expert", "medium"):
        info = about(BEHAVIOUR / task / f"{name}.npz")
        assert (info["env"], info["task"], info["script"]) == ("smac", task, "mappo")
        found = data.collect_dataset("smac", task, name, seed=5, episodes=200)
        rate = info["sampled_win_rate"]
        error = (max(rate * (1 - rate), 0.02) * (1 / 64 + 1 / 200)) ** 0.5
        assert abs(found.win_rate - rate) < 4 * error, (name, found.win_rate, rate)
        assert abs(found.returns.mean() - info["sampled_return"]) < 2.5
    steps = [about(path)["steps"] for path in BEHAVIOUR.glob(f"{task}/replay-*.npz")]
    medium = about(BEHAVIOUR / task / "medium.npz")["steps"]
    assert len(steps) == len(set(steps)) and min(steps) == 0 and max(steps) == medium


@pytest.mark.parametrize("name", BATTLES)
def test_a_dataset_replays(name):
    """Its seed and its actions give the same observations, rewards and ends in the environment."""
    found = data.collect_dataset("smac", "3m", name, seed=2, episodes=12).check()
    again = data.collect_dataset("smac", "3m", name, seed=2, episodes=12)
    assert all(torch.equal(getattr(found, key), getattr(again, key)) for key in ("obs", "actions", "reward", "state"))
    other = data.collect_dataset("smac", "3m", name, seed=3, episodes=12)
    assert found.obs.shape != other.obs.shape or not torch.equal(found.obs, other.obs)
    assert len(found.info["won"]) == 12 and found.info["won"] != []
    won = torch.tensor(found.info["won"]).bool()
    assert (found.terminated.any(1) | ~won).all()  # a won battle is terminated
    assert ((found.returns > 19.99) | ~won).all()  # and pays 20
    if name in ("medium", "expert"):  # one block of battles, from one seed
        game = envs.make("smac", "3m", num_envs=12)
        obs, info = game.reset(seed=2000)
        for t in range(int(found.lengths.max())):
            real = found.mask[:, t]
            assert torch.equal(obs[real], found.obs[real, t]) and torch.equal(info["state"][real], found.state[real, t])
            assert torch.equal(info["avail_actions"][real], found.avail_actions[real, t])
            stop = info["avail_actions"][..., 1].long()  # what a finished battle is told is ignored
            obs, reward, terminated, truncated, info = game.step(torch.where(real[:, None], found.actions[:, t], stop))
            assert torch.equal(reward[real], found.reward[real, t])
            assert torch.equal(terminated[real], found.terminated[real, t])


def test_mixtures_have_equal_parts():
    mixed = data.collect_dataset("smac", "3m", "mixed", episodes=41)
    assert (
        mixed.info["behaviour"].startswith("20 by medium (mappo after ") and "21 by expert" in mixed.info["behaviour"]
    )
    replay = data.collect_dataset("smac", "3m", "medium-replay", episodes=41)
    teams = len(list((BEHAVIOUR / "3m").glob("replay-*.npz")))
    parts = [int(part.split(" by replay-")[0]) for part in replay.info["behaviour"].split(", ")]
    assert len(parts) == teams and sum(parts) == 41 and max(parts) - min(parts) <= 1
    # The first team is untrained: about as bad as random play, while the later ones are not.
    assert replay.returns[: parts[0]].mean() < replay.returns[-parts[-1] :].mean()


def test_actions_follow_the_network():
    """A behaviour's draws have the probabilities that plain numpy computes from its file."""
    path = BEHAVIOUR / "3m" / "medium.npz"
    play, info = read_behaviour(path)
    game = envs.make("smac", "3m", num_envs=4000, noise=False)
    obs, facts = game.reset(seed=0)
    actions = play(0, obs, facts, torch.Generator().manual_seed(0))
    file, N = np.load(path, allow_pickle=False), game.num_agents
    for n in range(N):
        x = np.concatenate([obs[0, n].numpy(), np.zeros(info["recall"] * 9 if "recall" in info else 9), np.eye(N)[n]])
        for k in range(3):
            x = x @ file[f"weight{k}"].astype(float) + file[f"bias{k}"].astype(float)
            x = np.maximum(x, 0) if k < 2 else x
        x[~facts["avail_actions"][0, n].numpy()] = -np.inf
        pi = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        share = np.bincount(actions[:, n], minlength=9) / 4000
        assert abs(share - pi).max() < 5 * (0.25 / 4000) ** 0.5


def test_describe_prints_the_win_rate(tmp_path):
    out = tmp_path / "a.h5"
    what = ["--env", "smac", "--task", "3m", "--dataset", "expert", "--episodes", "20"]
    collected = command("data/collect.py", *what, "--out", out)
    assert collected.returncode == 0, collected.stderr
    said = command("data/describe.py", out, "--out", tmp_path / "a.png").stdout
    assert "win rate" in said and "return" in said and "by expert" in said
    complains(
        command("algorithms/inspo.py", "--env", "smac", "--task", "2s3z", "--dataset", out), "recorded in another task"
    )


def test_without_the_teams_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(data.recipes, "BEHAVIOUR", tmp_path)
    for name in BATTLES:
        with pytest.raises(ValueError, match="ships? with the repository"):
            data.collect_dataset("smac", "3m", name, episodes=4)
    shutil.copytree(BEHAVIOUR / "3m", tmp_path / "3m")
    (tmp_path / "3m" / "expert.npz").write_bytes((BEHAVIOUR / "3m" / "expert.npz").read_bytes()[:5000])
    with pytest.raises(ValueError, match="expert.npz is damaged"):
        data.collect_dataset("smac", "3m", "expert", episodes=4)


def test_no_dataset_for_maps_without_teams():
    complains(command("data/collect.py", "--env", "smac", "--task", "8m", "--dataset", "expert"), "mappo.py", "8m")
    complains(command("data/collect.py", "--env", "smac", "--task", "3m", "--dataset", "good"), "medium, expert, mixed")
    complains(command("data/collect.py", "--env", "smac", "--task", "4m", "--dataset", "expert"), "3m")
