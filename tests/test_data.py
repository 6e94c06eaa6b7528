"""The dataset and its file, what it refuses, the named datasets, and loading them."""

import dataclasses
import json

import h5py
import numpy as np
import pytest
import torch
from conftest import SHARED

import data
import envs
from data import recipes
from data.collect import Args, main, parse
from data.dataset import TENSORS
from data.describe import describe
from data.readers import check_order
from data.record import concatenate, record


@pytest.fixture
def small():
    return data.collect_dataset("bridge", "", "mixed", seed=3, episodes=10)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def same(one, other):
    return one.fingerprint() == other.fingerprint()


def test_a_file_keeps_everything(small, tmp_path):
    small.info |= {"won": [0, 1] * 5, "share": np.float32(0.5), "sizes": torch.tensor([1, 2])}
    data.write(small, tmp_path / "a.h5")
    found = data.read(tmp_path / "a.h5")
    assert all(torch.equal(getattr(found, name), getattr(small, name)) for name in TENSORS)
    wanted = small.info | {"share": 0.5, "sizes": [1, 2], "format": 1}
    assert found.info == wanted and found.win_rate == 0.5
    assert {f.name for f in tmp_path.iterdir()} == {"a.h5"}  # nothing half-written stays
    with h5py.File(tmp_path / "a.h5") as file:  # plain arrays and JSON text
        assert set(file) == set(TENSORS) and file.attrs["env"] == '"bridge"'


def test_equal_data_have_equal_fingerprints(small):
    words = {small.fingerprint()}
    assert same(small, dataclasses.replace(small, info={})) and same(small, small.to("cpu"))
    for name in TENSORS:
        changed = getattr(small, name).clone()
        changed[0, 0] = ~changed[0, 0] if changed.dtype == torch.bool else changed[0, 0] + 1
        words.add(dataclasses.replace(small, **{name: changed}).fingerprint())
    assert len(words) == len(TENSORS) + 1


def test_recorded_episodes_replay(small):
    game = envs.make("bridge", num_envs=10)
    game.reset()
    for t in range(small.mask.shape[1]):
        obs, reward, terminated, truncated, info = game.step(small.actions[:, t])
        real = small.mask[:, t]
        assert torch.equal(small.reward[real, t], reward[real])
        assert torch.equal(small.obs[real, t + 1], obs[real])
        assert torch.equal(small.state[real, t + 1], info["state"][real])
        assert torch.equal(small.terminated[real, t], terminated[real])
    assert (terminated | truncated).all() and torch.equal(small.truncated, ~terminated)


def test_concatenated_parts_are_padded_to_the_longest(small):
    few = data.collect_dataset("bridge", "", "optimal", episodes=3)  # 8 steps, not 50
    both = concatenate([few, small]).check()
    assert both.mask.shape == (13, 50) and torch.equal(both.obs[3:], small.obs)
    assert torch.equal(both.state[:3, :9], few.state) and not both.state[:3, 9:].any()


# ---------------------------------------------------------------- what is refused
BROKEN = {
    "obs holds NaN": lambda d: {"obs": d.obs * torch.nan},
    "actions must lie in 0 .. 4": lambda d: {"actions": d.actions * 0 + 5},
    "forbids": lambda d: {"avail_actions": torch.zeros_like(d.avail_actions)},
    "reward has the shape": lambda d: {"reward": d.reward[:, 1:]},
    "hole": lambda d: {"mask": d.mask & (torch.arange(50) != 2)},
    "goes on after": lambda d: {"terminated": torch.ones_like(d.terminated)},
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_malformed_dataset_is_refused(small, tmp_path, complaint):
    broken = dataclasses.replace(small, **BROKEN[complaint](small))
    with pytest.raises(ValueError, match=complaint):
        data.write(broken, tmp_path / "never.h5")
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_files_are_refused(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.h5"):
        data.read(tmp_path / "nowhere.h5")
    good, half = tmp_path / "good.h5", tmp_path / "half.h5"
    data.write(small, good)
    half.write_bytes(good.read_bytes()[:3000])
    with pytest.raises(ValueError, match="half.h5 cannot be read, or is damaged"):
        data.read(half)


def test_a_dataset_of_another_task_is_refused(small, tmp_path):
    path = str(tmp_path / "a.h5")
    data.write(small, path)
    assert recipes.about(path) == {"env": "bridge", "task": ""} and recipes.about(__file__) == {}
    with pytest.raises(ValueError, match="another task than matrix xor: use --env bridge"):
        data.load("matrix", "xor", path)
    small.info = {}  # a file that does not say where it comes from is known by its sizes
    data.write(small, path)
    with pytest.raises(ValueError, match="does not fit matrix xor"):
        data.load("matrix", "xor", path)


@pytest.mark.parametrize("env, axis", [("halfcheetah", 2), ("ant", 3)])
def test_observations_in_another_order_are_refused(env, axis):
    game = envs.make(env, num_envs=2, time_limit=9)
    part = record(game, lambda t, obs, info: torch.rand(2, *game.motors.shape))
    check_order(part, game, "mine")
    other = dataclasses.replace(part, obs=part.obs.flip(axis))  # of agents, or of entries
    with pytest.raises(ValueError, match=f"mine: .* not in the order of {env} .* MaMuJoCo"):
        check_order(other, game, "mine")


# ---------------------------------------------------------------- names
def test_every_default_is_a_name():
    for env in envs.TASKS:
        for task in ("", *envs.TASKS[env]):
            found, name = recipes.default(env, task)
            assert found == (task or envs.TASKS[env][0])
            assert recipes.is_name(name, env, found) and not recipes.is_path(name, env, found)
    assert recipes.default("matrix") == ("xor", "all")
    assert recipes.default("package:game", "any") == ("any", "")


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a/b", "mine.h5", "./x"):
        assert recipes.is_path(path, "bridge")
    assert not recipes.is_path("folder", "bridge")
    for name in ("folder", "mixed"):
        (tmp_path / name).mkdir()
    assert recipes.is_path("folder", "bridge") and not recipes.is_path("mixed", "bridge")
    assert recipes.is_name("peak-1e-1", "polynomial", "") and recipes.is_name("[1]", "matrix", "")
    for name in ("peak-", "origin--1"):
        assert not recipes.is_name(name, "polynomial", "")


def test_a_name_is_recorded_once_and_a_damaged_cache_again(cache):
    first = data.load("matrix", "m-ne", "imbalanced")
    (cached,) = cache.iterdir()
    before = cached.stat().st_mtime_ns
    assert same(first, data.load("matrix", "m-ne", "imbalanced"))
    assert cached.stat().st_mtime_ns == before
    cached.write_bytes(cached.read_bytes()[:1000])
    assert same(first, data.load("matrix", "m-ne", "imbalanced")) and same(first, data.read(cached))


def test_cached_files_never_meet(cache):
    for task in ("[[5, 20], [20, 1]]", "[[5, -20], [-20, 1]]"):
        data.load("matrix", task, "uniform")
    for seed, episodes in ((0, 5), (1, 5), (0, 6)):
        data.load("bridge", "", "mixed", seed=seed, episodes=episodes)
    assert len(list(cache.iterdir())) == 5


# ---------------------------------------------------------------- recipes
@pytest.mark.parametrize(
    "task, name",
    [
        ("xor", "aa-ab-ba"),
        ("m-ne", "imbalanced"),
        ("coordination", "favourable"),
        ("penalty", "uniform"),
        ("[[1, 0], [0, 2]]", "[0.9, 0.1]"),
    ],
)
def test_matrix_games_are_played_as_stated(task, name):
    found = data.collect_dataset("matrix", task, name, episodes=12_000)
    behaviour = json.loads(found.info["behaviour"])
    one, other = found.actions[:, 0].T
    A = found.avail_actions.shape[-1]
    share = torch.bincount(A * one + other, minlength=A * A).view(A, A) / 12_000
    if isinstance(behaviour[0], str):  # in equal parts
        wanted = torch.zeros_like(share)
        for word in behaviour:
            wanted[ord(word[0]) - ord("A"), ord(word[1]) - ord("A")] = 1 / len(behaviour)
        assert torch.allclose(share, wanted, atol=1e-4)
        return
    one, other = (torch.tensor(weights).double() for weights in behaviour)
    wanted = torch.outer(one / one.sum(), other / other.sum())
    chi2 = (12_000 * (share - wanted) ** 2 / wanted).sum()
    assert chi2 < {4: 16.3, 9: 26.1}[wanted.numel()]  # the 99.9 % points


def test_probabilities_must_fit_the_actions():
    with pytest.raises(ValueError, match="one probability for each action"):
        data.collect_dataset("matrix", "[[1, 0], [0, 2]]", "[0.9]")


def test_bridge_optimal_has_two_conventions_in_equal_parts():
    found = data.collect_dataset("bridge", "", "optimal", episodes=2000)
    assert (found.lengths == 8).all() and not found.truncated.any()
    first = found.actions[:, 0]
    left = (first == 4).all(1)
    assert (left | (first == 3).all(1)).all()
    assert left.double().mean().item() == pytest.approx(0.5, abs=0.04)
    for half in (found.returns[left], found.returns[~left]):  # three ways to step aside
        values, counts = half.round(decimals=4).unique(return_counts=True)
        assert torch.allclose(values, torch.tensor([-1.2904, -1.2591, -1.2355]), atol=1e-4)
        assert (counts / counts.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=0.05)


@pytest.mark.skipif(not SHARED.exists(), reason="the real dataset is not here")
def test_our_optimal_data_look_like_the_real_ones():
    real = data.load("bridge", "", str(SHARED / "alberdice_bridge_optimal"))
    ours = data.collect_dataset("bridge", "", "optimal", episodes=2000)
    assert len(real.mask) == 500 and real.returns.mean().item() == pytest.approx(-1.262, abs=5e-4)
    assert ours.returns.mean().item() == pytest.approx(real.returns.mean().item(), abs=0.005)
    moves = []
    for d in (real, ours):
        table = torch.cat([d.state[:, :-1].flatten(0, 1), d.actions.flatten(0, 1)], 1)
        moves.append({tuple(row) for row in table.tolist()})
    assert moves[0] == moves[1]  # the same joint moves in the same states, none more, none fewer


def test_bridge_mixed_is_half_random_half_optimal():
    found = data.collect_dataset("bridge", "", "mixed")
    assert len(found.mask) == 1000
    assert found.returns[500:].mean().item() == pytest.approx(-1.2616, abs=0.005)
    drawn = found.actions[:500][found.mask[:500]]
    assert drawn.double().mean().item() == pytest.approx(2, abs=0.03)  # of 0 .. 4


def test_teams_play_equal_parts(tmp_path):
    for name in ("replay-0", "replay-2", "replay-10", "medium"):
        (tmp_path / f"{name}.npz").touch()
    shares = recipes.share_out(tmp_path, ("replay-*", "medium"), 10)
    assert list(shares.items()) == [
        ("replay-0", 1),
        ("replay-2", 2),
        ("replay-10", 2),
        ("medium", 5),
    ]
    with pytest.raises(ValueError, match=r"no replay-\* team for 8m ships"):
        data.collect_dataset("smac", "8m", "medium-replay", episodes=4)


@pytest.mark.parametrize(
    "env, task, name",
    [("bridge", "", "mixed"), ("matrix", "climbing", "uniform"), ("smac", "3m", "medium")],
)
def test_data_depend_on_the_seed_only(env, task, name, request):
    """Not on torch's default type: a name stands for one dataset."""
    first = data.collect_dataset(env, task, name, 5, 6)
    assert not same(first, data.collect_dataset(env, task, name, 6, 6))
    request.getfixturevalue("float64")
    assert same(first, data.collect_dataset(env, task, name, 5, 6))


# ---------------------------------------------------------------- commands
def test_collect_and_describe(tmp_path):
    path = tmp_path / "c.h5"
    main(parse(["--env", "bridge", "--episodes", "10", "--seed", "3", "--out", str(path)]))
    found = data.read(path)
    assert same(found, data.collect_dataset("bridge", "", "mixed", 3, 10))
    found.info |= {"won": [1, 0] * 5, "references": {"random": 0, "expert": -1}}
    text = "\n".join(describe(found))
    shown = ["obs            (10, 51, 2, 8) float32", "win rate       0.5000"]
    shown += ["terminals      5", "truncations    5", f"transitions    {int(found.mask.sum())}"]
    shown.append(f"mean {-100 * found.returns.double().mean():.4f}")  # normalised
    assert all(words in text for words in shown)


def test_what_collect_refuses(tmp_path):
    out = tmp_path / "a.h5"
    with pytest.raises(ValueError, match="names a behaviour"):
        main(Args(dataset="mixed", team="random", out=out))
    with pytest.raises(ValueError, match="'expert': choose optimal, mixed"):
        main(Args(dataset="expert", out=out))
    assert not list(tmp_path.iterdir())
