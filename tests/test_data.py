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
from data.record import record


@pytest.fixture
def small():
    return data.collect_dataset("bridge", "", "mixed", seed=3, episodes=10)


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


@pytest.mark.parametrize("said, name, change", [
    ("obs holds NaN", "obs", lambda x: x * torch.nan),
    ("actions must lie in 0 .. 4", "actions", lambda x: x * 0 + 5),
    ("forbids", "avail_actions", torch.zeros_like),
    ("reward has the shape", "reward", lambda x: x[:, 1:]),
    ("hole", "mask", lambda x: x & (torch.arange(50) != 2)),
    ("goes on after", "terminated", torch.ones_like),
])  # fmt: skip
def test_a_malformed_dataset_is_refused(small, tmp_path, said, name, change):
    broken = dataclasses.replace(small, **{name: change(getattr(small, name))})
    with pytest.raises(ValueError, match=said):
        data.write(broken, tmp_path / "never.h5")
    assert not list(tmp_path.iterdir())


def test_damaged_files_and_those_of_another_task_are_refused(small, tmp_path):
    path = tmp_path / "a.h5"
    with pytest.raises(FileNotFoundError, match="a.h5"):
        data.read(path)
    data.write(small, path)
    (tmp_path / "half.h5").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="half.h5 cannot be read, or is damaged"):
        data.read(tmp_path / "half.h5")
    assert recipes.about(path) == {"env": "bridge", "task": ""} and recipes.about(__file__) == {}
    with pytest.raises(ValueError, match="another task than matrix xor: use --env bridge"):
        data.load("matrix", "xor", str(path))
    small.info = {}  # a file that does not say where it comes from is known by its sizes
    data.write(small, path)
    with pytest.raises(ValueError, match="does not fit matrix xor"):
        data.load("matrix", "xor", str(path))


@pytest.mark.parametrize("env, axis", [("halfcheetah", 2), ("ant", 3)])
def test_observations_in_another_order_are_refused(env, axis):
    game = envs.make(env, num_envs=2, time_limit=9)
    part = record(game, lambda t, obs, info: torch.rand(2, *game.motors.shape))
    check_order(part, game, "mine")
    other = dataclasses.replace(part, obs=part.obs.flip(axis))  # of agents, or of entries
    with pytest.raises(ValueError, match=f"mine: .* not in the order of {env} .* MaMuJoCo"):
        check_order(other, game, "mine")


def test_a_name_is_recorded_once_a_damaged_cache_again_and_files_never_meet(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(recipes, "CACHE", cache)
    first = data.load("matrix", "m-ne", "imbalanced")
    (cached,) = cache.iterdir()
    before = cached.stat().st_mtime_ns
    assert same(first, data.load("matrix", "m-ne", "imbalanced"))
    assert cached.stat().st_mtime_ns == before
    cached.write_bytes(cached.read_bytes()[:1000])
    assert same(first, data.load("matrix", "m-ne", "imbalanced")) and same(first, data.read(cached))
    for task in ("[[5, 20], [20, 1]]", "[[5, -20], [-20, 1]]"):
        data.load("matrix", task, "uniform")
    for seed, episodes in ((0, 5), (1, 5), (0, 6)):
        data.load("bridge", "", "mixed", seed=seed, episodes=episodes)
    assert len(list(cache.iterdir())) == 6


PLAYED = [("xor", "aa-ab-ba"), ("m-ne", "imbalanced"), ("coordination", "favourable")]


@pytest.mark.parametrize("task, name", [*PLAYED, ("[[1, 0], [0, 2]]", "[0.9, 0.1]")])
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
    assert len(found.mask) == 1000 and (found.lengths[500:] == 8).all()
    drawn = found.actions[:500][found.mask[:500]]
    assert drawn.double().mean().item() == pytest.approx(2, abs=0.03)  # of 0 .. 4


RECORDED = [("bridge", "", "mixed"), ("matrix", "climbing", "uniform"), ("smac", "3m", "medium")]


@pytest.mark.parametrize("env, task, name", RECORDED)
def test_data_depend_on_the_seed_only(env, task, name, request):
    """Not on torch's default type: a name stands for one dataset."""
    first = data.collect_dataset(env, task, name, 5, 6)
    assert not same(first, data.collect_dataset(env, task, name, 6, 6))
    request.getfixturevalue("float64")
    assert same(first, data.collect_dataset(env, task, name, 5, 6))


def test_collect_and_describe(tmp_path):
    path = tmp_path / "c.h5"
    main(parse(["--env", "bridge", "--episodes", "10", "--seed", "3", "--out", str(path)]))
    assert same(data.read(path), data.collect_dataset("bridge", "", "mixed", 3, 10))
    assert "terminals      5" in "\n".join(describe(data.read(path)))


@pytest.mark.parametrize("flags, said", [
    ({"dataset": "mixed", "team": "random"}, "names a behaviour"),
    ({"dataset": "expert"}, "'expert': choose optimal, mixed"),
    ({"env": "matrix", "dataset": "[0.9]"}, "one probability for each action"),
    ({"env": "smac", "task": "8m", "dataset": "medium-replay"}, "no replay-.* team for 8m ships"),
])  # fmt: skip
def test_what_collect_refuses(tmp_path, flags, said):
    with pytest.raises(ValueError, match=said):
        main(Args(**flags, out=tmp_path / "a.h5"))
    assert not list(tmp_path.iterdir())
