"""Datasets of bodies that a team shares: who plays them, that they replay, references, and other
authors' files."""

import json

import numpy as np
import pytest
import torch

import data
import data.collect
import envs
from data.dataset import TENSORS
from data.recipes import (
    BENDS,
    NOISE,
    TEAMS,
    block_seed,
    play_body,
    read_behaviour,
)
from envs.mamujoco import VIEWS

LIMIT = 12  # steps of an episode, where a test says nothing else
SEEN = {
    env: next(iter(tasks)) for env, tasks in VIEWS.items()
}  # the view that a body's teams are trained on


def save_team(folder, env, name, task=None, seed=0, push=(), info={}, **change):
    """Write a small network as `mappo.py --save-snapshots` does; `push` are its output's biases."""
    task = task or SEEN[env]
    game, rng = envs.make(env, task), np.random.default_rng(seed)
    sizes = [game.obs_dim + game.num_agents, 8, game.num_actions]
    arrays = {
        f"weight{k}": rng.normal(size=s) / s[0] ** 0.5 for k, s in enumerate(zip(sizes, sizes[1:]))
    }
    arrays |= {"bias0": rng.normal(size=8), "bias1": np.zeros(game.num_actions) + (push or 0)}
    arrays |= {"log_std": np.full(game.num_actions, -1.0), **change}
    about = {"env": env, "task": task, "steps": 64, "script": "mappo", "output": "tanh"} | info
    path = folder / env / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path, info=np.array(json.dumps(about)), **{k: np.float16(v) for k, v in arrays.items()}
    )
    return path


@pytest.fixture
def teams(tmp_path, monkeypatch):
    """Small random teams in place of those that ship, short episodes, few for the references."""
    folder = tmp_path / "behaviour"
    monkeypatch.setattr(data.recipes, "BEHAVIOUR", folder)
    monkeypatch.setattr(data.recipes, "CACHE", tmp_path / "cache")
    for k in range(3):
        save_team(folder, "halfcheetah", f"good-{k}", seed=k)
        save_team(folder, "halfcheetah", f"medium-{k}", seed=10 + k)
    for k, way in enumerate(BENDS):  # no network: joint 1 is turned one way, joint 0 the same
        save_team(folder, "reacher", f"{way}-0", push=(BENDS[way],), weight1=np.zeros((8, 1)))
    for k, name in enumerate(["expert", "medium", "replay-0", "replay-2", "replay-10"]):
        save_team(folder, "ant", name, seed=k)
    make, few = (
        envs.make,
        {env: found | {"episodes": 4} for env, found in data.recipes.REFERENCES.items()},
    )
    monkeypatch.setattr(data.recipes, "REFERENCES", few)
    monkeypatch.setattr(data.recipes, "GAMES", 3)

    def shorter(env, task="", num_envs=1, device="cpu", **options):
        limit = {"time_limit": LIMIT} if env in TEAMS and "time_limit" not in options else {}
        return make(env, task, num_envs, device, **options, **limit)

    monkeypatch.setattr(envs, "make", shorter)
    return folder


def same(one, other, names=TENSORS):
    return all(
        getattr(one, n) is getattr(other, n) is None
        or torch.equal(getattr(one, n), getattr(other, n))
        for n in names
    )


def replays(part, env, task, team, seed, start):
    """Assert that a block, its seed and its actions give the same episodes in the environment."""
    game = envs.make(env, task, num_envs=len(part.mask))
    obs, info = game.reset(seed=block_seed(env, team, seed, start))
    assert torch.equal(obs, part.obs[:, 0]) and torch.equal(info["state"], part.state[:, 0])
    for t in range(part.mask.shape[1]):
        obs, reward, terminated, truncated, info = game.step(part.actions[:, t])
        real = part.mask[:, t]
        assert torch.equal(obs[real], part.obs[real, t + 1]) and torch.equal(
            info["state"][real], part.state[real, t + 1]
        )
        assert torch.equal(reward[real], part.reward[real, t])
        assert torch.equal(terminated[real], part.terminated[real, t])
    assert ((terminated | truncated) | ~real).all() and torch.equal(
        truncated[real], part.truncated[real]
    )


# ---------------------------------------------------------------- our own


def test_the_reachers_that_ship_bend_as_they_are_called():
    """Everywhere, and well: a team that stays where it starts scores -11.7."""
    found = data.collect_dataset("reacher", "independent", "expert-mix", seed=3, episodes=200)
    bend = found.state[:, 5:, 3].mean(1)
    for way in (bend[:100], -bend[100:]):  # counter-clockwise, clockwise
        assert (way > 0.1).double().mean() > 0.97 and way.median() > 0.5
    assert all(about["left out"] <= 1 for about in found.info["bends"].values())
    assert found.returns.mean() > -4.3 and abs(found.normalize(found.returns).mean() - 1) < 0.05


@pytest.mark.parametrize(
    "env, task, name",
    [(env, task, name) for env in TEAMS for task in VIEWS[env] for name in TEAMS[env]],
)
def test_a_dataset_has_the_sizes_of_its_task(teams, env, task, name):
    found = data.load(env, task, name, episodes=7)
    game = envs.make(env, task)
    N, A, T = game.num_agents, game.num_actions, LIMIT
    assert found.obs.shape == (7, T + 1, N, game.obs_dim) and found.state.shape == (
        7,
        T + 1,
        game.state_dim,
    )
    assert found.actions.shape == (7, T, N, A) and found.actions.dtype == torch.float32
    assert found.avail_actions is None and "won" not in found.info
    assert found.truncated.all() and found.actions.abs().max() <= 1
    assert (found.info["env"], found.info["task"], found.info["name"]) == (env, task, name)
    assert found.info["versions"]["mujoco"] == __import__("mujoco").__version__
    assert same(found, data.load(env, task, name, episodes=7))  # from the cache
    if task == SEEN[env]:
        assert same(found, data.load(env, "", name, episodes=7))
        assert len(list(data.recipes.CACHE.iterdir())) == 1
        other = data.load(env, task, name, episodes=7, seed=1)
        assert not torch.equal(other.obs[:, 0], found.obs[:, 0])


@pytest.mark.parametrize(
    "env, team",
    [("halfcheetah", "good-1"), ("reacher", "clockwise-0"), ("ant", "medium"), ("ant", "random")],
)
def test_a_block_replays_in_the_environment(teams, env, team):
    for task in VIEWS[env]:
        parts, about, left_out = play_body(env, task, team, 5, seed=4)
        assert [len(part.mask) for part in parts] == [3, 2] and left_out == 0
        assert (about == {}) == (team == "random")
        for part, start in zip(parts, (0, 3)):
            replays(part, env, task, team, 4, start)
        again, *_ = play_body(env, task, team, 5, seed=4)
        assert all(map(same, parts, again))
        assert not torch.equal(parts[0].obs[:2, 0], parts[1].obs[:, 0])


@pytest.mark.parametrize("env", ["reacher", "ant"])
def test_all_views_show_the_same_episodes(teams, env):
    name = list(TEAMS[env])[-1]
    found = [data.collect_dataset(env, task, name, episodes=4) for task in VIEWS[env]]
    for other in found[1:]:
        assert same(found[0], other, ("state", "actions", "reward", "terminated", "mask"))
        assert found[0].info["references"] == other.info["references"]
        assert found[0].obs.shape != other.obs.shape
    assert (
        len(
            {
                block_seed(env, team, seed, start)
                for team in "ab"
                for seed in (0, 1)
                for start in (0, 50)
            }
        )
        == 8
    )


@pytest.mark.parametrize("env", TEAMS)
def test_actions_follow_the_network(teams, env):
    """The most likely action is what numpy computes from the file; the noise has its size."""
    name = {"halfcheetah": "good-2", "reacher": "clockwise-0", "ant": "medium"}[env]
    save_team(
        teams, env, name, seed=5, log_std=np.log([0.05, 0.1, 0.2][: envs.make(env).num_actions])
    )
    path = teams / env / f"{name}.npz"
    game, file = envs.make(env, num_envs=4), np.load(path)
    obs, info = game.reset(seed=1)
    play, about = read_behaviour(path, env)
    inputs = np.concatenate([obs.numpy(), np.eye(game.num_agents)[None].repeat(4, 0)], -1)
    hidden = np.maximum(inputs @ file["weight0"].astype(float) + file["bias0"].astype(float), 0)
    mean = np.tanh(hidden @ file["weight1"].astype(float) + file["bias1"].astype(float))
    assert np.allclose(play(0, obs, info, None), mean, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([play(0, obs, info, generator) for _ in range(2000)]) - torch.as_tensor(
        mean
    )
    spread = torch.as_tensor(np.exp(file["log_std"].astype(float)))
    assert ((draws.std((0, 1, 2)) / spread - 1).abs() < 0.05).all() and (
        draws.mean((0, 1, 2)) < 0.1 * spread
    ).all()


def test_cheetahs_play_their_most_likely_actions_with_noise(teams):
    """Far from bounds the noise is N(0, 0.2^2), fresh in each entry; near them it is clipped."""
    for k in range(3):
        save_team(teams, "halfcheetah", f"good-{k}", weight1=np.zeros((8, 3)), push=(0.0, 0.3, 3.0))
    found = data.collect_dataset("halfcheetah", "2x3", "good", episodes=60)
    noise = found.actions - torch.tensor([0.0, 0.3, 3.0]).tanh()
    free = noise[..., :2].flatten(0, 2).double()  # (60 x 12 x 2, 2)
    assert (
        NOISE == {"halfcheetah": 0.2}
        and abs(free.std() / 0.2 - 1) < 0.05
        and free.mean().abs() < 0.02
    )
    pair = (
        noise[..., :2].flatten(2).double()
    )  # (60, 12, 4): independent over agents, joints and time
    assert (pair.flatten(0, 1).T.corrcoef() - torch.eye(4)).abs().max() < 0.15
    assert (
        torch.stack([pair[:, 1:].flatten(), pair[:, :-1].flatten()]).corrcoef()[0, 1].abs() < 0.08
    )
    held = found.actions[..., 2]
    assert held.max() == 1 and 0.4 < (held == 1).double().mean() < 0.6 and held.min() > -0.2
    assert (found.actions.abs() < 1).any() and found.actions.unique().numel() > 1000


def test_expert_mix_bends_both_ways_in_equal_parts(teams):
    found = data.collect_dataset("reacher", "independent", "expert-mix", episodes=9)
    bend = found.state[:, :, 3].sum(1)
    assert (bend[:4] > 0).all() and (bend[4:] < 0).all()
    bends = found.info["bends"]
    assert list(bends) == ["counterclockwise-0", "clockwise-0"]
    for (team, told), part in zip(bends.items(), (found.state[:4], found.state[4:])):
        assert told["left out"] == 0 and told["mean sin θ2"] == round(
            float(part[:, 1:, 3].mean()), 4
        )
    assert found.info["behaviour"].startswith(
        "4 by counterclockwise-0 (mappo after 64 steps), 5 by clockwise-0"
    )


def test_episodes_that_bend_the_other_way_are_left_out(teams):
    """A team that is clockwise in most of its episodes only; the others are played anew."""
    pull, out = np.zeros((13, 8)), np.zeros((8, 1))
    pull[5, :2], out[:2, 0] = (10, -10), (2, -2)  # the torque is tanh(20 target_y - 1)
    save_team(
        teams, "reacher", "clockwise-0", weight0=pull, weight1=out, bias0=np.zeros(8), push=(-1,)
    )
    parts, *_ = play_body("reacher", "independent", "clockwise-0", 60, seed=0, verify=False)
    share = float((torch.cat([part.state for part in parts])[:, :, 3].sum(1) < 0).double().mean())
    assert 0.5 < share < 1, share
    parts, _, left_out = play_body("reacher", "independent", "clockwise-0", 60, seed=2)
    kept = torch.cat([part.state for part in parts])
    assert len(kept) == 60 and (kept[:, :, 3].sum(1) < 0).all()
    assert left_out > 0 and abs(60 / (60 + left_out) - share) < 0.25
    save_team(teams, "reacher", "clockwise-0", push=(1,), weight1=np.zeros((8, 1)))
    with pytest.raises(
        ValueError,
        match="21 of 21 episodes of .*clockwise-0.npz bend the other way: it is no clockwise",
    ):
        data.collect_dataset("reacher", "independent", "expert-mix", episodes=9)


def test_full_replay_plays_all_snapshots_in_order(teams):
    found = data.collect_dataset("ant", "partial", "full-replay", episodes=8)
    assert found.info["behaviour"].startswith("2 by replay-0 (mappo after 64 steps), 3 by replay-2")
    assert "3 by replay-10" in found.info["behaviour"] and "sampled" in found.info["behaviour"]
    assert list(data.recipes.share_out("ant", ("replay-*",), 2)) == [
        "replay-0",
        "replay-2",
        "replay-10",
    ]


def test_a_fallen_ant_terminates_its_episode(teams, monkeypatch):
    made = data.recipes.envs.make
    monkeypatch.setattr(envs, "make", lambda *a, **k: made(*a, **k, time_limit=400))
    parts, *_ = play_body("ant", "partial", "random", 6, seed=1)
    found = data.recipes.concatenate(parts).check()
    fell = found.terminated.any(1)
    assert fell.any() and torch.equal(fell, ~found.truncated)
    last = found.lengths - 1
    assert found.terminated[fell, last[fell]].all() and found.terminated.sum() == fell.sum()
    height = found.state[torch.arange(6), last + 1, 0]
    assert (((height < 0.2) | (height > 1)) == fell).all()
    assert (found.lengths[~fell] == 400).all() and len(set(found.lengths.tolist())) > 2
    assert not found.state[~torch.nn.functional.pad(found.mask, (1, 0), value=True)].any()
    for part, start in zip(parts, (0, 3)):
        replays(part, "ant", "partial", "random", 1, start)


def test_references_are_measured_as_stated(teams):
    for env in TEAMS:
        found, name = data.recipes.references(env), list(TEAMS[env])[-1]
        assert (
            found
            == data.recipes.references(env)
            == data.collect_dataset(env, "", name, 7, 3).info["references"]
        )
        game, shares = (
            envs.make(env, num_envs=3),
            data.recipes.share_out(env, data.recipes.REFERENCES[env]["expert"], 4),
        )
        assert sum(shares.values()) == 4
        game = envs.make(env, num_envs=3)
        game.reset(seed=block_seed(env, "random", "reference", 0))
        generator = torch.Generator().manual_seed(block_seed(env, "random", "reference", 0))
        returns = torch.zeros(3)
        for _ in range(LIMIT):
            returns += game.step(2 * torch.rand(3, *game.motors.shape, generator=generator) - 1)[1]
        first = play_body(env, SEEN[env], "random", 3, "reference")[0][0]
        assert torch.allclose(first.returns, returns, atol=1e-5)
    still, *_ = play_body("reacher", "independent", "still", 4, "reference")
    assert not torch.cat([part.actions for part in still]).any()
    mean = torch.cat([part.returns for part in still]).double().mean()
    assert data.recipes.references("reacher")["random"] == float(mean)
    greedy = [play_body("ant", "full", "expert", 4, "reference", greedy=True)[0] for _ in range(2)]
    assert all(map(same, *greedy))
    mean = torch.cat([part.returns for part in greedy[0]]).double().mean()
    assert data.recipes.references("ant")["expert"] == float(mean)


# ---------------------------------------------------------------- what can go wrong


BAD_TEAMS = {
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:300]),
    "ant": lambda path: save_team(path.parents[1], "ant", "x").rename(path),
    "6x1": lambda path: save_team(
        path.parents[1], path.parent.name, "good-0", info={"task": "6x1"}
    ),
}


@pytest.mark.parametrize("name", BAD_TEAMS)
def test_an_unfit_team_is_refused(teams, name):
    BAD_TEAMS[name](teams / "halfcheetah" / "good-0.npz")
    with pytest.raises(ValueError, match=name):
        data.collect_dataset("halfcheetah", "2x3", "good", episodes=3)
