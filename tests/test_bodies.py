"""Datasets of bodies that a team shares: who plays them, that they replay, their references."""

import numpy as np
import pytest
import torch

import data
import envs
from data import recipes
from data.record import block_seed, concatenate, random_player, record
from data.teams import read_behaviour

LIMIT = 12  # steps of an episode


@pytest.fixture
def short(monkeypatch):
    """Short episodes, few at once."""
    make = envs.make

    def shorter(env, task="", num_envs=1):
        return make(env, task, num_envs, time_limit=LIMIT)

    monkeypatch.setattr(envs, "make", shorter)
    monkeypatch.setattr(recipes, "GAMES", 3)


def replays(found, first, game, seed):
    """Assert that episodes from `first` on are what the game gives for a seed and their actions."""
    part = slice(first, first + game.num_envs)
    obs, info = game.reset(seed=seed)
    for t in range(found.mask.shape[1]):
        real = found.mask[part, t]
        assert torch.equal(obs[real], found.obs[part, t][real])
        assert torch.equal(info["state"][real], found.state[part, t][real])
        obs, reward, terminated, truncated, info = game.step(found.actions[part, t])
        assert torch.equal(obs[real], found.obs[part, t + 1][real])
        assert torch.equal(reward[real], found.reward[part, t][real])
        assert torch.equal(terminated[real], found.terminated[part, t][real])
    assert (terminated | truncated).all()


@pytest.mark.parametrize(
    "env, name, teams",
    [
        ("halfcheetah", "good-medium", {"good-0": 1, "good-1": 1, "good-2": 1, "good-3": 1}),
        ("reacher", "expert-mix", {"counterclockwise-0": 4, "clockwise-0": 4}),
        ("ant", "medium", {"medium": 8}),
        ("ant", "random", {"random": 8}),
    ],
)
def test_all_views_show_the_same_episodes(short, env, name, teams):
    """Each is what its block's seed and its actions give."""
    states = set()
    for task in envs.TASKS[env]:
        found = data.collect_dataset(env, task, name, seed=4, episodes=8)
        assert found.avail_actions is None and found.actions.abs().max() <= 1
        assert found.truncated.all() and "won" not in found.info
        first = 0
        for team, count in teams.items():
            assert f"{count} by {team}" in found.info["behaviour"]
            for start in range(0, count, 3):
                game = envs.make(env, task, min(3, count - start))
                replays(found, first, game, block_seed(env, team, 4, start))
                first += game.num_envs
        states.add(data.dataset.fingerprint({"state": found.state, "actions": found.actions}))
    assert len(states) == 1
    assert len({tuple(state.tolist()) for state in found.state[:, 0]}) == 8


def test_a_fallen_ant_terminates_its_episode():
    game = envs.make("ant", "partial", 6, time_limit=100)
    found = record(game, random_player(game, torch.Generator().manual_seed(2)), seed=2).check()
    fell, last = found.terminated.any(1), found.lengths - 1
    assert fell.any() and not fell.all()
    assert found.terminated[fell, last[fell]].all() and found.terminated.sum() == fell.sum()
    height = found.state[torch.arange(6), last + 1, 0]
    assert (((height < 0.2) | (height > 1)) == fell).all()
    assert (found.lengths[~fell] == 100).all()
    replays(found, 0, envs.make("ant", "partial", 6, time_limit=100), 2)


@pytest.mark.parametrize("env, team", [("reacher", "clockwise-0"), ("ant", "medium")])
def test_actions_follow_the_network(env, team):
    """The most likely action is what numpy computes from the file; the noise has its size."""
    path = recipes.BEHAVIOUR / env / f"{team}.npz"
    play, about = read_behaviour(path, env)
    game, file = envs.make(env, about["task"], num_envs=4), np.load(path)
    obs, info = game.reset(seed=1)
    x = np.concatenate([obs.numpy(), np.eye(game.num_agents)[None].repeat(4, 0)], -1)
    last = sum(name.startswith("weight") for name in file) - 1
    for k in range(last + 1):
        x = x @ file[f"weight{k}"].astype(float) + file[f"bias{k}"].astype(float)
        if k < last:
            x = np.maximum(x, 0)
    mean = np.tanh(x)
    assert np.allclose(play(0, obs, info, None), mean, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([play(0, obs, info, generator) for _ in range(1000)])
    noise = draws - torch.as_tensor(mean)
    spread = torch.as_tensor(np.exp(file["log_std"].astype(float)))
    assert ((noise.std((0, 1, 2)) / spread - 1).abs() < 0.06).all()
    assert (noise.mean((0, 1, 2)).abs() < 0.1 * spread).all()


def test_cheetahs_play_their_most_likely_actions_with_noise(short):
    """Far from bounds the noise is N(0, 0.2^2), fresh in each entry; near them it is clipped."""
    found = data.collect_dataset("halfcheetah", "2x3", "medium", episodes=40)
    play, _ = read_behaviour(recipes.BEHAVIOUR / "halfcheetah" / "medium-0.npz", "halfcheetah")
    obs = found.obs[:10, :-1].flatten(0, 1)  # of the first team's episodes
    actions = found.actions[:10].flatten(0, 1)
    mean = play(0, obs, None, None)
    noise = (actions - mean)[mean.abs() < 0.3]
    assert abs(noise.std() / 0.2 - 1) < 0.1 and noise.mean().abs() < 0.05
    wide = (mean + actions.sign()).abs() > 1.9  # beyond its bound, half of it is cut off
    assert (actions[wide].abs() == 1).double().mean() > 0.2
    assert (noise[1:] * noise[:-1]).mean().abs() < 0.008  # of 0.04


def test_the_reachers_that_ship_bend_as_they_are_called():
    """Everywhere, and well: a team that stays where it starts scores -11.7."""
    found = data.collect_dataset("reacher", "independent", "expert-mix", seed=3, episodes=200)
    bend = found.state[:, 5:, 3].mean(1)
    for way in (bend[:100], -bend[100:]):  # counter-clockwise, clockwise
        assert (way > 0.1).double().mean() > 0.97 and way.median() > 0.5
    assert found.returns.mean() > -4.3 and abs(found.normalize(found.returns).mean() - 1) < 0.05


def test_episodes_that_bend_the_other_way_are_left_out():
    def pull(torque):
        """Who turns the elbow by a torque that varies over episodes."""

        def player(game, generator):
            drawn = torque + 0.3 * torch.randn(game.num_envs, 2, 1, generator=generator)
            return lambda t, obs, info: drawn.clamp(-1, 1)

        return player

    parts = recipes.play_body("reacher", "independent", "clockwise-0", 60, 0, pull(-0.2))
    found = concatenate(parts)
    assert len(parts) > 2 and len(found.mask) == 60  # some were played anew
    assert (found.state[:, :, 3].sum(1) < 0).all()
    with pytest.raises(ValueError, match="reacher/clockwise-0.npz bend the other way"):
        recipes.play_body("reacher", "independent", "clockwise-0", 60, 0, pull(0.4))


@pytest.mark.long
@pytest.mark.parametrize("env, level", [("halfcheetah", "good-*"), ("ant", "expert")])
def test_references_are_those_of_the_teams(env, level):
    folder, returns = recipes.BEHAVIOUR / env, {"expert": [], "random": []}

    def greedy(game, generator):
        return lambda t, obs, info: play(t, obs, info, None)

    for team, count in recipes.share_out(folder, (level,), 20).items():
        play, about = read_behaviour(folder / f"{team}.npz", env)
        parts = recipes.play_body(env, about["task"], team, count, "reference", greedy)
        returns["expert"] += [part.returns for part in parts]
    parts = recipes.play_body(env, "", "random", 20, "reference", random_player)
    returns["random"] = [part.returns for part in parts]
    for name, found in returns.items():
        wanted = recipes.REFERENCES[env][name]
        assert torch.cat(found).double().mean().item() == pytest.approx(wanted, rel=1e-6)
