"""Datasets by other authors: CFCQL's HDF5 and OG-MARL's vaults, written here in their layouts and read back."""

import json
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import command, complains

import data
from data.describe import describe

N, O, S, A = 3, 4, 5, 6  # agents, observation, state, actions
LIMIT = 7
LENGTHS = [3, 7, 1, 5]  # of the episodes; the second one lasts until the limit


def steps(lengths=LENGTHS, seed=0):
    """Episodes of random steps: for each a dictionary of arrays (L, ...), observations also after the last step."""
    rng = np.random.default_rng(seed)
    episodes = []
    for L in lengths:
        legal = rng.random((L + 1, N, A)) < 0.5
        actions = rng.integers(0, A, (L, N))
        np.put_along_axis(legal[:L], actions[..., None], True, -1)
        legal[L, :, 1] = True
        episodes.append(
            {
                "obs": rng.normal(size=(L + 1, N, O)).astype(np.float32),
                "state": rng.normal(size=(L + 1, S)).astype(np.float32),
                "avail_actions": legal,
                "actions": actions,
                "reward": rng.normal(size=L).astype(np.float32),
            }
        )
    return episodes


def as_cfcql(path, episodes, limit=LIMIT, change=None):
    """Write episodes as PyMARL's batch: padded to the limit, each end terminated, a junk action at the last row."""
    E, T = len(episodes), limit + 1
    arrays = {
        "state": np.zeros((E, T, S), np.float32),
        "obs": np.zeros((E, T, N, O), np.float32),
        "actions": np.zeros((E, T, N, 1), np.int64),
        "avail_actions": np.zeros((E, T, N, A), np.int32),
        "probs": np.zeros((E, T, N, A), np.float32),
        "reward": np.zeros((E, T, 1), np.float32),
        "terminated": np.zeros((E, T, 1), np.uint8),
        "filled": np.zeros((E, T, 1), np.int64),
    }
    for e, episode in enumerate(episodes):
        L = len(episode["reward"])
        for name in ("obs", "state", "avail_actions"):
            arrays[name][e, : L + 1] = episode[name]
        arrays["actions"][e, :L, :, 0] = episode["actions"]
        arrays["actions"][e, L] = 99  # no action at all, so that nobody mistakes it for one
        arrays["reward"][e, :L, 0] = episode["reward"]
        arrays["terminated"][e, L - 1] = 1
        arrays["filled"][e, : L + 1] = 1
    if change is not None:
        change(arrays)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, chunks=True, maxshape=(None, *array.shape[1:]))
    return path


def agrees(found, episodes, after=True):
    """Assert that a dataset holds these episodes, step for step, and zeros behind them."""
    for e, episode in enumerate(episodes):
        L = len(episode["reward"])
        assert found.mask[e].tolist() == [t < L for t in range(found.mask.shape[1])]
        for name in ("obs", "state", "avail_actions"):
            tensor = getattr(found, name)
            if tensor is None:
                continue
            assert torch.equal(tensor[e, :L], torch.as_tensor(episode[name][:L]))
            assert torch.equal(tensor[e, L], torch.as_tensor(episode[name][L if after else L - 1]))
            assert not tensor[e, L + 1 :].any()
        for name in ("actions", "reward"):
            tensor = getattr(found, name)
            assert torch.equal(tensor[e, :L], torch.as_tensor(episode[name])) and not tensor[e, L:].any()
        assert not found.terminated[e, : L - 1].any() and not found.terminated[e, L:].any()


def test_cfcql_file_gives_the_episodes(tmp_path):
    episodes = steps([3, 6, 1, 5])
    found = data.read(as_cfcql(tmp_path / "5m_vs_6m_expert.h5", episodes))
    assert found.obs.shape == (4, 7, N, O) and found.state.shape == (4, 7, S)  # trimmed from 8 rows
    assert found.avail_actions.shape == (4, 7, N, A) and found.actions.shape == (4, 6, N)
    agrees(found, episodes)  # also that the junk action 99 at each last row is gone
    assert found.truncated.tolist() == [False] * 4
    assert found.info == {"name": "5m_vs_6m_expert", "behaviour": "published by CFCQL"}


def test_cfcql_time_outs_are_cut_off(tmp_path):
    path = as_cfcql(tmp_path / "a.h5", steps())
    found = data.read(path)
    agrees(found, steps())
    assert found.truncated.tolist() == [False, True, False, False]  # 7 steps: stored as terminated, as all the others
    assert data.read(path, time_limit=5).truncated.tolist() == [False, True, False, True]
    assert not data.read(path, time_limit=9).truncated.any()
    with pytest.raises(ValueError, match="at least one step, not 0"):
        data.read(path, time_limit=0)

    def unended(arrays):  # the file's word counts where it says that an episode did not end
        arrays["terminated"][0] = 0

    assert data.read(as_cfcql(path, steps(), change=unended)).truncated.tolist() == [True, True, False, False]


def test_cfcql_dtypes_are_cast_and_padding_is_cleared(tmp_path):
    def other(arrays):
        del arrays["probs"]
        arrays["obs"][2, 3:] = np.nan  # behind an episode of one step
        arrays["reward"][2, 2:] = 8
        arrays["avail_actions"][2, 3:] = 1
        for name, kind in {"actions": ">f8", "avail_actions": "u1", "reward": ">f8", "filled": "f4"}.items():
            arrays[name] = arrays[name].astype(kind)

    found = data.read(as_cfcql(tmp_path / "a.h5", steps(), change=other))
    agrees(found, steps())
    assert found.actions.dtype == torch.int64 and found.reward.dtype == torch.float32


def test_cfcql_file_is_loaded_for_a_task_that_it_fits(tmp_path):
    ours = data.collect_dataset("bridge", "", "mixed", seed=3, episodes=4)
    E, T = ours.mask.shape
    assert ours.truncated.any() and T == 50
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("obs", "state", "avail_actions"):
            file[name] = getattr(ours, name).numpy()
        file["filled"] = torch.cat([torch.ones(E, 1), ours.mask], 1)[..., None].long().numpy()
        last = torch.arange(T + 1) == ours.lengths[:, None] - 1  # (E, T+1)
        file["terminated"] = last[..., None].numpy().astype(np.uint8)
        file["actions"] = np.pad(ours.actions.numpy(), ((0, 0), (0, 1), (0, 0)))[..., None]
        file["reward"] = np.pad(ours.reward.numpy(), ((0, 0), (0, 1)))[..., None]
    found = data.load("bridge", "", str(tmp_path / "a.h5"))
    for name in data.dataset.TENSORS:
        assert torch.equal(getattr(found, name), getattr(ours, name)), name
    with pytest.raises(ValueError, match="does not fit matrix xor"):
        data.load("matrix", "xor", str(tmp_path / "a.h5"))


def put(name, index, value):
    def change(arrays):
        arrays[name][index] = value

    return change


DAMAGED_CFCQL = {
    "a missing key": (lambda a: a.pop("reward"), "not one of CFCQL's datasets: it lacks reward"),
    "no last axis": (lambda a: a.update(reward=a["reward"][..., 0]), "reward has the shape"),
    "two rewards": (lambda a: a.update(reward=a["reward"].repeat(2, -1)), "reward has the shape"),
    "fewer episodes": (lambda a: a.update(obs=a["obs"][:2]), "obs has the shape"),
    "other agents": (lambda a: a.update(obs=a["obs"][:, :, :2]), "actions has shape"),
    "text": (lambda a: a.update(reward=a["reward"].astype("S4")), "reward holds |S"),
    "no episode": (lambda a: a.update({k: v[:0] for k, v in a.items()}), "holds no step"),
    "nothing filled": (lambda a: a["filled"].fill(0), "an episode ends without an observation"),
    "nothing at all": (lambda a: [v.fill(0) for v in a.values()], "holds no step"),
    "an empty episode": (lambda a: [v[1].fill(0) for v in a.values()], "an episode has no step"),
    "a hole": (put("filled", (1, 3), 0), "filled has a hole"),
    "a late start": (put("filled", (1, 0), 0), "filled has a hole"),
    "a half end": (put("terminated", (0, 2), 2), "terminated must hold 0 and 1"),
    "an end in the middle": (put("terminated", (1, 2), 1), "goes on after it terminated"),
    "an end behind the limit": (put("terminated", (1, LIMIT), 1), "an episode ends without an observation"),
    "no last observation": (put("filled", (0, 3), 0), "an episode ends without an observation"),
    "a high action": (put("actions", (0, 1), A), "actions must lie in 0 .. 5"),
    "a negative action": (put("actions", (0, 1), -1), "actions must lie in 0 .. 5"),
    "a forbidden action": (put("avail_actions", (0, 0), np.arange(A) == 0), "avail_actions forbids"),
    "a fraction of an action": (lambda a: a.update(actions=a["actions"] + 0.5), "actions must be whole numbers"),
    "NaN": (put("obs", (0, 1, 2), np.nan), "obs holds NaN"),
    "endless reward": (put("reward", (0, 1), np.inf), "reward holds NaN or infinite"),
}


@pytest.mark.parametrize("name", DAMAGED_CFCQL)
def test_a_damaged_cfcql_file_is_refused(tmp_path, name):
    change, complaint = DAMAGED_CFCQL[name]
    path = as_cfcql(tmp_path / "bad.h5", steps(), change=change)
    with pytest.raises(ValueError, match=complaint.replace("|", r"\|")) as error:
        data.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_cfcql_file_of_groups_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("filled", "terminated", "reward", "actions", "avail_actions", "state", "obs"):
            file.create_group(name)
    with pytest.raises(ValueError, match="filled has the shape"):
        data.read(tmp_path / "a.h5")


def test_a_vast_cfcql_file_is_refused(tmp_path):
    path = as_cfcql(tmp_path / "a.h5", steps())
    with h5py.File(path, "a") as file:
        file["obs"].resize(10**12, 0)  # nothing is written
        for name in ("state", "actions", "avail_actions", "reward", "terminated", "filled"):
            file[name].resize(10**12, 0)
    with pytest.raises(ValueError, match="a.h5 declares arrays of [0-9,]+ GB, more than this machine's memory"):
        data.read(path)


def in_a_row(episodes, tail=0):
    """Episodes as a vault's leaves (M, ...): end to end, no observation after the last step, equal for all agents."""
    E = episodes + [episodes[-1]] * bool(tail)  # the last one starts again and is cut off after `tail` steps
    cut = [len(e["reward"]) for e in episodes] + [tail] * bool(tail)
    ends = np.concatenate([np.arange(L) == L - 1 for L in cut])
    if tail:
        ends[-1] = False

    def row(name):
        return np.concatenate([episode[name][:L] for episode, L in zip(E, cut)])

    def team(array):
        return np.repeat(array[:, None], N, 1)

    return {
        "observations": row("obs"),
        "actions": row("actions").astype(np.int32 if row("actions").dtype.kind == "i" else np.float32),
        "rewards": team(row("reward")),
        "terminals": team(ends),
        "truncations": team(np.zeros_like(ends)),
        "infos.legals": row("avail_actions").astype(np.float32),
        "infos.state": row("state"),
    }


def as_vault(folder, leaves, count=None):
    """Write leaves (M, ...) as flashbax stores them: zarr in OCDBT, a declared length of 1e13, a dot behind names."""
    tensorstore = pytest.importorskip("tensorstore")
    folder.mkdir(parents=True, exist_ok=True)

    def leaf(name, array, shape):
        base = {"driver": "file", "path": f"{folder}/"}
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": name}}
        spec["metadata"] = {"compressor": {"id": "gzip", "level": 5}}
        store = tensorstore.open(spec, dtype=array.dtype.name, shape=shape, create=True).result()
        store[tuple(slice(n) for n in array.shape)].write(array).result()

    for name, array in leaves.items():
        leaf(f"{name}.", array[None], (1, 10**13, *array.shape[1:]))
    if count is None:
        count = len(next(iter(leaves.values())))
    leaf("vault_index", np.array([count], np.int32), (1,))
    structure = {"version": 1.2, "structure_shape": {}, "structure_dtype": {}}
    (folder / "metadata.json").write_text(json.dumps(structure))
    return folder


def test_vault_gives_the_episodes(tmp_path):
    episodes = steps()
    folder = as_vault(tmp_path / "odd name%20" / "2s3z.vlt" / "Good", in_a_row(episodes, tail=3))
    before = sorted(tmp_path.rglob("*"))
    found = data.read(folder)
    assert found.obs.shape == (4, 8, N, O) and found.actions.shape == (4, 7, N)  # the unfinished tail is dropped
    agrees(found, episodes, after=False)  # the last observation stands twice
    assert found.actions.dtype == torch.int64 and found.avail_actions.dtype == torch.bool
    assert not found.truncated.any()
    assert found.info == {"name": "Good", "behaviour": "OG-MARL vault"}
    assert sorted(tmp_path.rglob("*")) == before  # reading writes nothing


def test_vault_time_outs(tmp_path):
    leaves = in_a_row(steps())
    folder = as_vault(tmp_path / "a", leaves)
    assert data.read(folder, time_limit=7).truncated.tolist() == [False, True, False, False]
    assert data.read(folder, time_limit=5).truncated.tolist() == [False, True, False, True]
    ends = np.flatnonzero(leaves["terminals"][:, 0])
    leaves["terminals"][ends[0]], leaves["truncations"][ends[0]] = False, True
    leaves["terminals"][ends[3], 1:], leaves["truncations"][ends[3], 1:] = False, True  # agent 0 died, the others not
    leaves["terminals"][ends[0] + 1, 2] = True  # one agent is out; the game goes on
    for name in ("terminals", "truncations"):
        leaves[name] = leaves[name].astype(np.float32)
    found = data.read(as_vault(tmp_path / "b", leaves))
    agrees(found, steps(), after=False)
    assert found.truncated.tolist() == [True, False, False, True]


def test_vault_is_as_long_as_its_index_says(tmp_path):
    found = data.read(as_vault(tmp_path, in_a_row(steps()), count=sum(LENGTHS) - 1))
    agrees(found, steps()[:-1], after=False)
    assert len(found.mask) == 3


def test_a_vast_vault_is_refused(tmp_path):
    with pytest.raises(ValueError, match="declares arrays of [0-9,]+ GB, more than this machine's memory"):
        data.read(as_vault(tmp_path / "a", in_a_row(steps()), count=10**9))


def test_vault_of_continuous_actions(tmp_path):
    episodes = steps()
    for episode in episodes:
        episode["actions"] = np.sin(episode["obs"][:-1, :, :2])  # (L, N, 2)
        episode["avail_actions"] = episode["obs"]
    leaves = in_a_row(episodes)
    del leaves["infos.legals"]
    found = data.read(as_vault(tmp_path, leaves))
    assert found.avail_actions is None and found.actions.shape == (4, 7, N, 2)
    agrees(found, episodes, after=False)


def test_vault_is_found_in_the_folder_around_it(tmp_path):
    around = tmp_path / "3m.vlt"
    as_vault(around / "Good", in_a_row(steps()))
    (around / "notes").mkdir()
    assert data.read(around).info["name"] == "Good"
    as_vault(around / "Poor", in_a_row(steps([2])))
    with pytest.raises(ValueError, match=f"holds several vaults: choose {around}/Good, {around}/Poor"):
        data.read(around)
    assert len(data.read(around / "Poor").mask) == 1


def change_leaf(name, index, value):
    def change(leaves):
        leaves[name] = leaves[name].copy()
        leaves[name][index] = value

    return change


DAMAGED_VAULTS = {
    "missing leaves": (lambda v: [v.pop("rewards"), v.pop("infos.state")], "it lacks rewards, infos.state"),
    "nothing in it": (lambda v: v.update({k: a[:0] for k, a in v.items()}), "no episode in it ever ends"),
    "terminals without agents": (lambda v: v.update(terminals=v["terminals"][:, 0]), "has the shape"),
    "no legal actions": (lambda v: v.pop("infos.legals"), "need avail_actions"),
    "a reward without agents": (lambda v: v.update(rewards=v["rewards"][:, 0]), "rewards has the shape"),
    "other agents": (lambda v: v.update(observations=v["observations"][:, :2]), "observations has the shape"),
    "a state for each agent": (lambda v: v.update({"infos.state": v["observations"]}), "infos.state has the shape"),
    "fractions": (lambda v: v.update(actions=v["actions"] * np.float32(0.5)), "actions must have 4 dimensions"),
    "no end": (lambda v: v["terminals"].fill(0), "no episode in it ever ends"),
    "half an end": (lambda v: v.update(terminals=v["terminals"] * np.float32(0.5)), "terminals must hold 0 and 1"),
    "unequal rewards": (change_leaf("rewards", (2, 1), 9), "the agents' rewards differ"),
    "NaN in a reward": (change_leaf("rewards", 2, np.nan), "reward holds NaN"),
    "NaN in an observation": (change_leaf("observations", 2, np.nan), "obs holds NaN"),
    "a high action": (change_leaf("actions", 2, A), "actions must lie in 0 .. 5"),
    "a forbidden action": (change_leaf("infos.legals", 2, np.arange(A) < 0), "avail_actions forbids"),
}


@pytest.mark.parametrize("name", DAMAGED_VAULTS)
def test_a_damaged_vault_is_refused(tmp_path, name):
    change, complaint = DAMAGED_VAULTS[name]
    leaves = in_a_row(steps())
    change(leaves)
    with pytest.raises(ValueError, match=complaint) as error:
        data.read(as_vault(tmp_path / "bad", leaves))
    assert str(error.value).startswith(str(tmp_path / "bad")) and "\n" not in str(error.value)


def test_a_vault_with_lost_or_changed_files_is_refused(tmp_path):
    folder = as_vault(tmp_path / "a", in_a_row(steps()))
    for file in (folder / "d").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="a is damaged or no OG-MARL vault: .") as error:
        data.read(folder)
    assert "\n" not in str(error.value)
    for file in (folder / "d").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="a is damaged or no OG-MARL vault: ."):
        data.read(folder)
    (folder / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match="it lacks vault_index, terminals"):
        data.read(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(ValueError, match="neither a vault nor AlberDICE's .npy files: it lacks obs.npy"):
        data.read(folder)


def test_a_vault_needs_tensorstore(tmp_path, monkeypatch):
    (tmp_path / "metadata.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ValueError) as error:
        data.read(tmp_path)
    assert str(error.value) == f"{tmp_path}: reading an OG-MARL vault needs tensorstore: pip install tensorstore"
    assert data.read(as_cfcql(tmp_path / "a.h5", steps())).mask.any()  # nothing else does


def test_a_vault_that_flashbax_wrote(tmp_path):
    flashbax = pytest.importorskip("flashbax")  # only where it is installed; the layout above is written without it
    from flashbax.vault import Vault

    leaves = in_a_row(steps(), tail=2)
    infos = {"legals": leaves.pop("infos.legals"), "state": leaves.pop("infos.state")}
    tree = {**leaves, "infos": infos}

    def each(function, tree):
        return {k: each(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}

    buffer = flashbax.make_trajectory_buffer(
        add_batch_size=1, sample_batch_size=1, sample_sequence_length=1, period=1, min_length_time_axis=1, max_size=64
    )
    state = buffer.add(buffer.init(each(lambda leaf: leaf[0], tree)), each(lambda leaf: leaf[None], tree))
    vault = Vault("a.vlt", experience_structure=state.experience, rel_dir=str(tmp_path), vault_uid="Good")
    assert vault.write(state) == sum(LENGTHS) + 2
    agrees(data.read(tmp_path / "a.vlt"), steps(), after=False)


def test_describe_says_what_is_in_a_foreign_dataset(tmp_path):
    path = as_cfcql(tmp_path / "a.h5", steps())
    for limit, cut in ((7, 1), (5, 2)):
        said = command("data/describe.py", path, "--time-limit", limit, "--out", tmp_path / "a.png")
        assert said.returncode == 0, said.stderr
        lines = {line.split()[0]: line.split(None, 1)[1] for line in said.stdout.splitlines()}
        assert lines["behaviour"] == "published by CFCQL" and lines["truncations"] == str(cut)
        assert lines["transitions"] == "16" and lines["obs"].startswith("(4, 8, 3, 4)")
    path.write_bytes(path.read_bytes()[:-4000])
    complains(command("data/describe.py", path), "a.h5", "damaged")


def test_describe_complains_about_foreign_datasets_in_one_line(tmp_path):
    as_cfcql(tmp_path / "bad.h5", steps(), change=lambda arrays: arrays.pop("state"))
    complains(command("data/describe.py", tmp_path / "bad.h5"), "bad.h5", "lacks state")
    as_vault(tmp_path / "maps" / "Good", in_a_row(steps()))
    leaves = in_a_row(steps())
    change_leaf("rewards", (2, 1), 9)(leaves)
    complains(command("data/describe.py", as_vault(tmp_path / "maps" / "Poor", leaves)), "Poor", "rewards differ")
    complains(command("data/describe.py", tmp_path / "maps"), "holds several vaults", "Good", "Poor")


def test_win_rate(tmp_path):
    found = data.read(as_cfcql(tmp_path / "a.h5", steps()))
    assert found.win_rate is None and not any("win rate" in line for line in describe(found))
    found.info["won"] = [1, 0, 0, 0]
    data.write(found, tmp_path / "b.h5")
    found = data.read(tmp_path / "b.h5")
    assert found.win_rate == 0.25
    lines = describe(found)
    assert "win rate       0.2500" in lines and not any(line.startswith("won") for line in lines)
    for bad in ([1, 0, 0], [1, 0, 0, 2], 3, ["1", 0, 0, 0]):
        found.info["won"] = bad
        with pytest.raises(ValueError, match="'won' must hold one 0 or 1 for each episode"):
            found.check()


def test_a_long_list_of_wins_fits_into_a_file(tmp_path):
    ours = data.collect_dataset("matrix", "xor", "all", episodes=40_000)
    ours.info["won"] = [0, 1] * 20_000  # 120 kB as text, more than an HDF5 attribute holds in place
    data.write(ours, tmp_path / "a.h5")
    assert data.read(tmp_path / "a.h5").info["won"] == ours.info["won"]
