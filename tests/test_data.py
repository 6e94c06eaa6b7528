"""The dataset: its file, what it refuses, its collectors, and AlberDICE's folder."""

import dataclasses
import os

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, command, complains

import data
import data.collect
import envs
from data.recipes import MATRIX_BEHAVIOURS
from data.dataset import TENSORS


@pytest.fixture
def small():
    return data.collect_dataset("bridge", "", "mixed", seed=3, episodes=10)


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


def test_a_file_keeps_everything(small, tmp_path):
    data.write(small, tmp_path / "a.h5")
    found = data.read(tmp_path / "a.h5")
    assert same(small, found)
    assert found.info | {"format": 1} == small.info | {"format": 1}
    assert {f.name for f in tmp_path.iterdir()} == {"a.h5"}  # nothing half-written stays
    with h5py.File(tmp_path / "a.h5") as file:  # plain arrays and JSON text: readable without this project
        assert set(file) == set(TENSORS)
        assert all(file[name].dtype.kind in "fib" for name in TENSORS)
        assert file.attrs["env"] == '"bridge"'


def test_returns_lengths_and_ends(small):
    game = envs.make("bridge", num_envs=10)
    game.reset()
    total, steps = torch.zeros(10), torch.zeros(10, dtype=torch.int64)
    for t in range(small.mask.shape[1]):  # replay the recorded actions
        obs, reward, terminated, truncated, info = game.step(small.actions[:, t])
        real = small.mask[:, t]
        assert torch.equal(small.reward[real, t], reward[real])
        assert torch.equal(small.state[real, t + 1], info["state"][real])
        assert torch.equal(small.terminated[real, t], terminated[real])
        total, steps = total + reward * real, steps + real
    assert torch.allclose(total, small.returns) and torch.equal(steps, small.lengths)
    assert torch.equal(small.truncated, truncated & ~terminated)
    assert small.truncated[:5].any() and not small.truncated[5:].any()


def test_flatten_lays_episodes_end_to_end(small):
    flat = small.flatten()
    m = 0
    for e, length in enumerate(small.lengths.tolist()):
        for t in range(length):
            row = flat["row"][m]
            assert torch.equal(flat["obs"][row], small.obs[e, t]) and torch.equal(
                flat["obs"][row + 1], small.obs[e, t + 1]
            )
            assert torch.equal(flat["state"][row + 1], small.state[e, t + 1])
            assert torch.equal(flat["actions"][m], small.actions[e, t]) and flat["reward"][m] == small.reward[e, t]
            assert flat["done"][m] == float(small.terminated[e, t])
            m += 1
    assert m == len(flat["row"]) == len(flat["reward"])
    assert len(flat["obs"]) == m + len(small.mask)  # one more observation than steps in each episode


BROKEN = {
    "an empty dataset": (lambda d: {n: getattr(d, n)[:0] for n in TENSORS}, "holds no step"),
    "NaN in obs": (lambda d: {"obs": d.obs.clone().fill_(float("nan"))}, "obs holds NaN"),
    "infinity in reward": (lambda d: {"reward": d.reward + float("inf")}, "reward holds NaN or infinite"),
    "an action too high": (lambda d: {"actions": d.actions + 5}, "actions must lie in 0 .. 4"),
    "a negative action": (lambda d: {"actions": d.actions - 9}, "actions must lie in 0 .. 4"),
    "a forbidden action": (lambda d: {"avail_actions": torch.zeros_like(d.avail_actions)}, "forbids"),
    "too few rewards": (lambda d: {"reward": d.reward[:, 1:]}, "reward has shape"),
    "too many agents": (lambda d: {"actions": d.actions.repeat(1, 1, 2)}, "actions has shape"),
    "flat observations": (lambda d: {"obs": d.obs[:, :, 0]}, "obs must have 4 dimensions"),
    "a hole in the mask": (lambda d: {"mask": d.mask & (torch.arange(d.mask.shape[1]) != 2)}, "hole"),
    "an episode without steps": (lambda d: {"mask": d.mask & (torch.arange(len(d.mask)) > 0)[:, None]}, "has no step"),
    "life after the end": (lambda d: {"terminated": torch.ones_like(d.terminated)}, "goes on after it terminated"),
    "no available actions": (lambda d: {"avail_actions": None}, "need avail_actions"),
    "no dimension": (lambda d: {"state": torch.tensor(1.0)}, "state must have 3 dimensions"),
    "no agents": (lambda d: {n: getattr(d, n)[:, :, :0] for n in ("obs", "avail_actions", "actions")}, "no agents"),
    "no observations": (lambda d: {"obs": d.obs[..., :0]}, "it has no entries in obs"),
    "no state": (lambda d: {"state": d.state[..., :0]}, "it has no entries in state"),
    "no actions": (lambda d: {"avail_actions": d.avail_actions[..., :0]}, "it has no actions"),
    "continuous actions without entries": (
        lambda d: {"actions": torch.zeros(*d.actions.shape, 0), "avail_actions": None}, "it has no actions"),
    "nothing to choose": (lambda d: {"avail_actions": d.avail_actions & (torch.arange(51) < 1)[:, None, None],
                                     "mask": d.mask & (torch.arange(50) < 1)}, "no available action"),
    "continuous actions out of range": (
        lambda d: {"actions": torch.full((*d.actions.shape, 3), 1.5), "avail_actions": None}, "in \\[-1, 1\\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_dataset_is_refused(small, tmp_path, name):
    change, complaint = BROKEN[name]
    broken = dataclasses.replace(small, **change(small))
    with pytest.raises(ValueError, match=complaint):
        broken.check()
    with pytest.raises(ValueError, match=complaint):
        data.write(broken, tmp_path / "never.h5")
    assert not list(tmp_path.iterdir())


CHANGED = {
    "whole numbers as reward": (lambda d: setattr(d, "reward", d.reward.long()), "reward must be torch.float32"),
    "NaN": (lambda d: d.obs[-1, -1].fill_(float("nan")), "obs holds NaN or infinite numbers behind the mask"),
    "endless reward": (lambda d: d.reward[-1, -1].fill_(float("inf")), "reward holds NaN .* behind the mask"),
    "no action": (lambda d: d.actions[-1, -1].fill_(-1), "actions must lie in 0 .. 4; found -1 .. 4 behind the mask"),
    "NaN everywhere": (lambda d: d.obs[:, -1].fill_(float("nan")), "obs holds NaN or infinite numbers$"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_was_changed_afterwards_is_refused_where_it_lies(small, name):
    change, complaint = CHANGED[name]
    assert not small.mask[-1, -1] and small.mask[0].all()
    change(small)
    with pytest.raises(ValueError, match=complaint):
        small.check()


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path):
    import resource

    def full():  # no file may be longer than 4 kB: writing on fails as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    words = ("data/collect.py", "--env", "bridge", "--dataset", "mixed", "--episodes", 50, "--out", tmp_path / "a.h5")
    complains(command(*words, preexec_fn=full), "cannot write", "a.h5: File too large")
    assert not list(tmp_path.iterdir())


def test_two_writers_in_containers_do_not_meet(small, tmp_path, monkeypatch):
    """Both processes have the number 1, and the second begins while the first is at it."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    save, parts = os.replace, []

    def replace(part, path):
        parts.append(part)
        if len(parts) == 1:
            data.write(small, tmp_path / "a.h5")
        save(part, path)

    monkeypatch.setattr(os, "replace", replace)
    data.write(small, tmp_path / "a.h5")
    assert len(set(parts)) == 2 and [path.name for path in tmp_path.iterdir()] == ["a.h5"]
    assert same(small, data.read(tmp_path / "a.h5"))


@pytest.mark.parametrize("name", [*TENSORS])
def test_strings_and_vast_arrays_in_a_file_are_refused(small, tmp_path, name):
    path = tmp_path / "a.h5"
    vast = {"shape": (10**9, 10**6), "dtype": "f8", "chunks": True}  # declared in a few bytes
    for content, complaint in (({"data": b"hello"}, f"{name} holds .S5, not numbers"), (vast, "GB, more than")):
        data.write(small, path)
        with h5py.File(path, "a") as file:
            del file[name]
            file.create_dataset(name, **content)
        with pytest.raises(ValueError, match=complaint) as error:
            data.read(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


ATTRIBUTES = {"brackets": "[" * 100_000, "a long number": "9" * 5000, "bytes": b"\xff", "an array": np.zeros(3)}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_that_are_not_json_are_refused(small, tmp_path, name):
    data.write(small, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["env"] = ATTRIBUTES[name]
    with pytest.raises(ValueError, match="a.h5 is not one of our datasets: its attributes are not JSON"):
        data.read(tmp_path / "a.h5")


def test_damaged_and_foreign_files_are_refused(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset file"):
        data.read(tmp_path / "nowhere.h5")
    good = tmp_path / "good.h5"
    data.write(small, good)
    for name, content in {"cut.h5": good.read_bytes()[:3000], "text.h5": b"hello", "empty.h5": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged, cut off, or no HDF5 file"):
            data.read(tmp_path / name)
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["observations"] = np.zeros(3)
    with pytest.raises(ValueError, match="not one of our datasets: it lacks obs"):
        data.read(tmp_path / "foreign.h5")
    with h5py.File(good, "a") as file:
        file.attrs["format"] = "99"
    with pytest.raises(ValueError, match="has format 99"):
        data.read(good)
    with h5py.File(good, "a") as file:
        file.attrs["env"] = "bridge"
    with pytest.raises(ValueError, match="not one of our datasets: its attributes are not JSON"):
        data.read(good)
    with pytest.raises(ValueError, match="lacks obs.npy"):
        data.read(tmp_path)


def test_a_dataset_of_another_task_is_refused(small, tmp_path):
    path = str(tmp_path / "a.h5")
    data.write(small, path)
    with pytest.raises(ValueError, match="recorded in another task than matrix xor: use --env bridge"):
        data.load("matrix", "xor", path)
    small.info = {}  # a file that does not say where it comes from is known by its sizes
    data.write(small, path)
    with pytest.raises(ValueError, match="does not fit matrix xor"):
        data.load("matrix", "xor", path)
    data.write(data.collect_dataset("matrix", "xor", "all"), path)
    assert len(data.load("matrix", "[[0, 1], [1, 0]]", path).mask) == 1000  # the same game under another name
    with pytest.raises(ValueError, match="use --env matrix --task 'xor'"):
        data.load("matrix", "coordination", path)


def test_a_name_is_collected_once_and_a_damaged_cache_again(tmp_path, monkeypatch):
    monkeypatch.setattr(data.recipes, "CACHE", tmp_path)
    first = data.load("matrix", "m-ne", "imbalanced")
    (cached,) = tmp_path.iterdir()
    before = cached.stat().st_mtime_ns
    assert same(first, data.load("matrix", "m-ne", "imbalanced")) and cached.stat().st_mtime_ns == before
    cached.write_bytes(cached.read_bytes()[:1000])
    assert same(first, data.load("matrix", "m-ne", "imbalanced"))
    assert same(first, data.read(cached))
    with pytest.raises(ValueError, match="no dataset 'expert': choose balanced, imbalanced"):
        data.load("matrix", "m-ne", "expert")


def test_cached_files_never_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(data.recipes, "CACHE", tmp_path)
    wide, tall = "[[1, 2, 3], [4, 5, 6]]", "[[1, 2], [3, 4], [5, 6]]"
    first = data.load("matrix", "[[5, 20], [20, 1]]", "uniform")
    second = data.load("matrix", "[[5, -20], [-20, 1]]", "uniform")
    assert second.reward.min() == -20 and first.reward.min() == 1
    assert data.load("matrix", wide, "uniform").reward.max() == data.load("matrix", tall, "uniform").reward.max() == 6
    few, many = (data.load("matrix", "[[1, 2], [3, 4]]", name) for name in ("[1e-1, 1]", "[1e+1, 1]"))
    assert few.actions.double().mean() > 0.8 and many.actions.double().mean() < 0.2
    assert len(list(tmp_path.iterdir())) == 6


def joint_counts(dataset, actions):
    table = torch.zeros(actions, actions)
    return table.index_put(tuple(dataset.actions[:, 0].T), torch.tensor(1.0), accumulate=True)


@pytest.mark.parametrize("name, share", [("ab", [[0, 1], [0, 0]]), ("ab-ba", [[0, 1], [1, 0]]),
                                         ("aa-ab-ba", [[1, 1], [1, 0]]), ("all", [[1, 1], [1, 1]])])  # fmt: skip
def test_xor_is_an_equal_mix(name, share):
    share = torch.tensor(share) / sum(map(sum, share))
    found = data.collect_dataset("matrix", "xor", name, episodes=1200)
    assert torch.allclose(joint_counts(found, 2) / len(found.mask), share)
    assert found.returns.mean().item() == pytest.approx((share * torch.tensor([[0, 1], [1, 0]])).sum().item())


@pytest.mark.parametrize("task, name", [("m-ne", "balanced"), ("m-ne", "imbalanced"), ("coordination", "favourable"),
                                        ("coordination", "neutral"), ("coordination", "unfavourable"),
                                        ("climbing", "uniform"), ("penalty", "uniform")])  # fmt: skip
def test_independent_behaviours_are_as_stated(task, name):
    weights = [torch.tensor(w, dtype=torch.float64) for w in MATRIX_BEHAVIOURS[task][name]]
    expected = torch.outer(*(w / w.sum() for w in weights)) * 20_000
    counts = joint_counts(data.collect_dataset("matrix", task, name, episodes=20_000), len(weights[0]))
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert chi2 < {3: 16.3, 8: 26.1}[expected.numel() - 1]  # the 99.9 % points for 3 and 8 degrees of freedom


def test_probabilities_may_be_written_out():
    found = data.collect_dataset("matrix", "[[1, 0], [0, 2]]", "[0.9, 0.1]", episodes=5000)
    assert (found.actions == 1).float().mean().item() == pytest.approx(0.1, abs=0.015)
    deep = "[" * 3000 + "]" * 3000
    for bad in ("[0.9]", "[1, -1]", "[0, 0]", "[a]", "[[1, 0]]", "[1e400, 1]", f"[{'9' * 400}, 1]", deep):
        with pytest.raises(ValueError, match="one probability for each action"):
            data.collect_dataset("matrix", "[[1, 0], [0, 2]]", bad)


def test_bridge_optimal_has_two_conventions_in_equal_parts():
    found = data.collect_dataset("bridge", "", "optimal", episodes=4000)
    assert (found.lengths == 8).all() and not found.truncated.any()
    first = found.actions[:, 0]
    left = (first == 4).all(1)
    assert (left | (first == 3).all(1)).all()
    assert left.double().mean().item() == pytest.approx(0.5, abs=0.03)
    # Three ways to step aside, equally likely in both conventions: -1.2904, -1.2591 and -1.2355.
    for half in (found.returns[left], found.returns[~left]):
        values, counts = half.round(decimals=4).unique(return_counts=True)
        assert torch.allclose(values, torch.tensor([-1.2904, -1.2591, -1.2355]), atol=1e-4)
        assert (counts / counts.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=0.04)


def test_bridge_mixed_is_half_random_half_optimal():
    found = data.collect_dataset("bridge", "", "mixed")
    assert len(found.mask) == 1000
    assert found.returns[500:].mean().item() == pytest.approx(-1.2616, abs=0.005)
    assert found.returns[:500].mean().item() == pytest.approx(-17.56, abs=0.6)
    counts = torch.bincount(found.actions[:500][found.mask[:500]].flatten(), minlength=5).double()
    assert torch.allclose(counts / counts.sum(), torch.tensor(0.2, dtype=torch.float64), atol=0.01)


@pytest.mark.parametrize("env, task, name", [
    ("bridge", "", "mixed"), ("bridge", "", "optimal"), ("matrix", "climbing", "uniform"), ("matrix", "m-ne", "balanced"),
    ("polynomial", "twin-peaks", "uniform"), ("polynomial", "twin-peaks", "peak-0.5"), ("smac", "3m", "medium"),
    ("reacher", "independent", "expert-mix"), ("ant", "full", "random"),
])  # fmt: skip
def test_data_do_not_depend_on_torchs_default_type(env, task, name):
    """Or a name, once cached by whoever computes in float64, would stand for other data."""
    found, few = set(), 6
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found.add(data.collect_dataset(env, task, name, episodes=few).fingerprint())
        finally:
            torch.set_default_dtype(torch.float32)
    assert len(found) == 1


def test_the_same_seed_collects_the_same_data():
    assert same(data.collect_dataset("bridge", "", "mixed", 5, 20), data.collect_dataset("bridge", "", "mixed", 5, 20))
    assert not same(
        data.collect_dataset("bridge", "", "mixed", 5, 20), data.collect_dataset("bridge", "", "mixed", 6, 20)
    )


def as_alberdice(dataset, folder, limit=50):
    """Write a dataset in AlberDICE's layout: padded to the limit, time-outs marked as terminated."""
    E, T = dataset.mask.shape
    padded = {}
    for name, tensor in (
        ("obs", dataset.obs),
        ("state", dataset.state),
        ("avail_actions", dataset.avail_actions.int()),
    ):
        padded[name] = np.zeros((E, limit + 1, *tensor.shape[2:]), tensor.numpy().dtype)
        padded[name][:, : T + 1] = tensor.numpy()
    rows = torch.arange(limit + 1)
    last = dataset.lengths[:, None] - 1
    padded["filled"] = (rows <= last + 1).numpy()[..., None].astype(np.int64)
    padded["terminated"] = (rows == last).numpy()[..., None].astype(np.uint8)
    padded["actions"] = np.full((E, limit + 1, 2, 1), 3, np.int64) * padded["filled"][..., None]  # junk at the end
    padded["actions"][:, :T, :, 0][dataset.mask] = dataset.actions[dataset.mask].numpy()
    padded["reward"] = np.zeros((E, limit + 1, 1), np.float32)
    padded["reward"][:, :T, 0] = dataset.reward.numpy()
    for name, array in padded.items():
        np.save(folder / f"{name}.npy", array)


def test_alberdice_folder_gives_the_same_dataset(small, tmp_path):
    as_alberdice(small, tmp_path)
    found = data.read(tmp_path)
    assert same(small, found)  # also the time-outs: cut off, not terminated
    assert small.truncated.any()
    good = np.load(tmp_path / "reward.npy")
    for content in (b"not an array", b""):
        (tmp_path / "reward.npy").write_bytes(content)
        with pytest.raises(ValueError, match="reward.npy is damaged"):
            data.read(tmp_path)
    for bad in (good[:3], good[..., 0], np.float32(1), good[:, :0]):
        np.save(tmp_path / "reward.npy", bad)
        with pytest.raises(ValueError, match="reward.npy has the shape"):
            data.read(tmp_path)
    with open(tmp_path / "reward.npy", "wb") as file:  # terabytes, declared by a header alone
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**6, 1)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match="reward.npy is damaged"):
        data.read(tmp_path)
    np.save(tmp_path / "reward.npy", good.astype(str))
    with pytest.raises(ValueError, match="reward holds <U"):
        data.read(tmp_path)


@pytest.mark.skipif(not (SHARED / "alberdice_bridge_optimal").exists(), reason="the real dataset is not here")
def test_our_optimal_data_look_like_the_real_ones():
    real = data.load("bridge", "", str(SHARED / "alberdice_bridge_optimal"))
    ours = data.collect_dataset("bridge", "", "optimal", episodes=4000)
    assert len(real.mask) == 500 and real.returns.mean().item() == pytest.approx(-1.262, abs=5e-4)
    assert ours.returns.mean().item() == pytest.approx(real.returns.mean().item(), abs=0.004)
    moves = [{tuple(row) for row in torch.cat([d.state[:, :-1].flatten(0, 1), d.actions.flatten(0, 1)], 1).tolist()}
             for d in (real, ours)]  # fmt: skip
    assert moves[0] == moves[1]  # the same joint moves in the same states, none more, none fewer


def test_describe_and_collect_commands(tmp_path):
    file, picture = tmp_path / "c.h5", tmp_path / "c.png"
    made = command(
        "data/collect.py", "--env", "bridge", "--dataset", "mixed", "--episodes", 10, "--seed", 3, "--out", file
    )
    assert made.returncode == 0, made.stderr
    said = command("data/describe.py", file, "--out", picture)
    assert said.returncode == 0, said.stderr
    lines = {line.split()[0]: line.split(None, 1)[1] for line in said.stdout.splitlines()}
    found = data.read(file)
    assert lines["obs"].startswith("(10, 51, 2, 8)") and lines["episodes"] == "10"
    assert lines["transitions"] == str(int(found.mask.sum()))
    assert lines["terminals"] == str(int((~found.truncated).sum())) and lines["truncations"] == str(
        int(found.truncated.sum())
    )
    assert f"mean {found.returns.double().mean():.4f}" in lines["return"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    found.info["name"] = "θ $ of 5 \\frac $"  # letters that a terminal lacks, and what could be a formula
    data.write(found, file)
    picture.unlink()
    said = command("data/describe.py", file, "--out", picture, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert said.returncode == 0 and "? $ of 5" in said.stdout and picture.exists()


def test_commands_complain_in_one_line(tmp_path):
    (tmp_path / "text.h5").write_text("hello")
    complains(command("data/describe.py", tmp_path / "text.h5"), "text.h5", "damaged")
    complains(command("data/collect.py", "--dataset", "expert"), "no dataset 'expert'")
    complains(command("data/collect.py", "--episodes", 4, "--out", "/dev/null/x.h5"), "/dev/null")
    for flag, number in (("--episodes", -1), ("--seed", -1), ("--seed", 10**20), ("--episodes", 10**20)):
        complains(command("data/collect.py", flag, number, "--out", tmp_path / "a.h5"), f"{flag} must be at least 0")
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="a dataset's seed must lie in 0 .. 4294967295"):
            data.collect_dataset("bridge", "", "mixed", seed)
    with pytest.raises(ValueError, match="at least one episode, not -1"):
        data.collect_dataset("bridge", "", "mixed", episodes=-1)
    assert not (tmp_path / "a.h5").exists()
    assert not (ROOT / "runs" / "describe" / "text.png").exists()
