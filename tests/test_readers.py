"""Datasets by other authors, written here in their layouts and read back step for step."""

import collections

import h5py
import numpy as np
import pytest
import torch
from test_mamujoco import MOTORS, SEES

import data
import envs

N, O, S, A = 3, 4, 5, 6  # agents, observation, state, actions
LIMIT = 7
LENGTHS = [3, 7, 1, 5]  # of the episodes; the second one lasts until the limit
FALLS = [True, False, True, False]


def steps(lengths=LENGTHS, seed=0):
    """Episodes of random steps: dictionaries of arrays (L, ...), observations (L + 1, ...)."""
    rng = np.random.default_rng(seed)
    episodes = []
    for L in lengths:
        legal = rng.random((L + 1, N, A)) < 0.5
        actions = rng.integers(0, A, (L, N))
        np.put_along_axis(legal[:L], actions[..., None], True, -1)
        legal[L, :, 1] = True
        episode = {"avail_actions": legal, "actions": actions}
        episode["obs"] = rng.normal(size=(L + 1, N, O)).astype(np.float32)
        episode["state"] = rng.normal(size=(L + 1, S)).astype(np.float32)
        episode["reward"] = rng.normal(size=L).astype(np.float32)
        episodes.append(episode)
    return episodes


def padded(x, rows):
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))


def as_batch(episodes, limit=LIMIT):
    """PyMARL's batch: padded to the limit, each end terminated, a junk action at the last row."""
    arrays = {}
    for name in episodes[0]:
        arrays[name] = np.stack([padded(episode[name], limit + 1) for episode in episodes])
    lengths = np.array([len(episode["reward"]) for episode in episodes])
    arrays["actions"][np.arange(len(lengths)), lengths] = 99
    arrays["terminated"] = (np.arange(limit + 1) == lengths[:, None] - 1).astype(np.uint8)
    arrays["filled"] = (np.arange(limit + 1) <= lengths[:, None]).astype(np.int64)
    for name in ("actions", "reward", "terminated", "filled"):
        arrays[name] = arrays[name][..., None]
    return arrays


def save(path, arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def agrees(found, episodes, after=True):
    """Assert that a dataset holds these episodes; after: also what was seen after the last step."""
    for e, episode in enumerate(episodes):
        L = len(episode["reward"])
        assert found.mask[e].tolist() == [t < L for t in range(found.mask.shape[1])]
        for name, tensor in found.tensors().items():
            if name in ("mask", "terminated"):
                continue
            wanted = torch.as_tensor(episode[name])
            assert torch.equal(tensor[e, :L], wanted[:L].to(tensor.dtype)), name
            observed = len(wanted) > L
            if observed:
                assert torch.equal(tensor[e, L], wanted[L if after else L - 1].to(tensor.dtype))
            assert not tensor[e, L + observed :].any()
        assert not found.terminated[e, : L - 1].any() and not found.terminated[e, L:].any()


def test_a_cfcql_file_gives_the_episodes_and_its_time_outs_are_cut_off(tmp_path):
    path = save(tmp_path / "2s3z_expert.h5", as_batch(steps([3, 6, 1, 5])))
    found = data.read(path)
    assert found.obs.shape == (4, 7, N, O)  # trimmed from 8 rows
    agrees(found, steps([3, 6, 1, 5]))  # also that the junk action is gone
    assert not found.truncated.any()
    assert found.info == {"name": "2s3z_expert", "behaviour": "published by CFCQL"}
    arrays = as_batch(steps())
    arrays["terminated"][0] = 0  # the file's word counts where it says that nothing ended
    arrays["obs"][2, 3:] = np.nan  # behind an episode of one step
    for name in ("filled", "actions", "reward"):
        arrays[name] = arrays[name].astype(np.float64)
    path = save(tmp_path / "a.h5", arrays)
    agrees(data.read(path), steps())
    for limit, more in ((None, [True, False]), (5, [True, True]), (9, [False, False])):
        found = data.read(path, time_limit=limit) if limit else data.read(path)
        assert found.truncated.tolist() == [True, more[0], False, more[1]]


def in_a_row(episodes):
    """Episodes as a vault's leaves (M, ...): end to end, without what was seen last."""
    lengths = [len(episode["reward"]) for episode in episodes]
    ends = np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)

    def row(name):
        return np.concatenate([episode[name][:L] for episode, L in zip(episodes, lengths)])

    leaves = {
        "observations": row("obs"),
        "actions": row("actions"),
        "rewards": np.repeat(row("reward")[:, None], row("obs").shape[1], 1),
        "terminals": np.repeat(ends[:, None], row("obs").shape[1], 1),
        "truncations": np.zeros(row("obs").shape[:2], bool),
        "infos.state": row("state"),
    }
    if "avail_actions" in episodes[0]:
        leaves["infos.legals"] = row("avail_actions").astype(np.float32)
    return leaves


def as_vault(folder, leaves, count=None):
    """Leaves (M, ...) as flashbax stores them: zarr in OCDBT, a declared length of 1e13."""
    tensorstore = pytest.importorskip("tensorstore")
    folder.mkdir(parents=True)

    def leaf(name, array, shape):
        base = {"driver": "file", "path": f"{folder}/"}
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": name}}
        kind = array.dtype.name
        store = tensorstore.open(spec, dtype=kind, shape=shape, create=True).result()
        store[tuple(slice(n) for n in array.shape)].write(array).result()

    for name, array in leaves.items():
        leaf(f"{name}.", array[None], (1, 10**13, *array.shape[1:]))
    leaf("vault_index", np.array([count or len(leaves["rewards"])], np.int32), (1,))
    (folder / "metadata.json").write_text("{}")
    return folder


def test_a_vault_gives_the_episodes(tmp_path):
    leaves = in_a_row(steps())
    folder = as_vault(tmp_path / "odd %20" / "Good", leaves)
    found = data.read(folder)
    assert found.obs.shape == (4, 8, N, O) and not found.truncated.any()
    agrees(found, steps(), after=False)
    assert found.info == {"name": "Good", "behaviour": "OG-MARL vault"}
    assert data.read(folder, time_limit=5).truncated.tolist() == [False, True, False, True]
    short = as_vault(tmp_path / "short", leaves, count=sum(LENGTHS) - 1)
    agrees(data.read(short), steps()[:3], after=False)  # the unfinished tail is dropped


def test_a_vaults_ends_are_those_of_all_agents(tmp_path):
    leaves = in_a_row(steps())
    first, *_, last = np.flatnonzero(leaves["terminals"][:, 0])
    leaves["terminals"][first], leaves["truncations"][first] = False, True
    leaves["terminals"][last, 1:], leaves["truncations"][last, 1:] = False, True  # only one died
    leaves["terminals"][first + 1, 2] = True  # one agent is out; the game goes on
    found = data.read(as_vault(tmp_path / "a", leaves))
    agrees(found, steps(), after=False)
    assert found.truncated.tolist() == [True, False, False, True]


def test_a_vault_of_cheetahs_ends_by_the_time_limit(tmp_path):
    rng, episodes, columns = np.random.default_rng(0), [], envs.make("halfcheetah").columns
    for L in (3, 1000):
        state = rng.normal(size=(L + 1, 17)).astype(np.float32)
        episode = {"obs": np.pad(state, ((0, 0), (1, 1)))[:, columns]}  # x, which they see, is 0
        episode |= {"actions": np.sin(episode["obs"][:-1, :, :3]), "state": state}
        episodes.append(episode | {"reward": state[:-1, 0]})
    leaves = in_a_row(episodes)
    episodes[0]["actions"][0, 0, 0], leaves["actions"][0, 0, 0] = -1, -1.25
    path = str(as_vault(tmp_path / "Good", leaves))
    found = data.load("halfcheetah", "2x3", path)
    agrees(found, episodes, after=False)
    assert found.avail_actions is None and found.truncated.tolist() == [False, True]
    ended = data.load("halfcheetah", "2x3", path, limit_terminates=True)
    assert not ended.truncated.any()


def ants(width=27, lengths=LENGTHS, seed=0):
    """Random episodes of one agent, actions in the order of Ant's motors."""
    rng = np.random.default_rng(seed)
    episodes = []
    for L, fell in zip(lengths, FALLS * len(lengths)):
        last = np.arange(L) == L - 1
        episode = {"observations": rng.normal(size=(L + 1, width))}
        episode["actions"] = rng.uniform(-1, 1, (L, 8)).astype(np.float32)
        episode["rewards"] = rng.normal(size=L)
        episode |= {"terminations": last & fell, "truncations": last & (not fell)}
        episodes.append(episode)
    return episodes


def as_d4rl(path, episodes):
    """One row for each step; what follows the last end is dropped."""
    rows = {name: [episode[name] for episode in episodes] for name in episodes[0]}
    seen = rows.pop("observations")
    arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
    arrays["terminals"] = arrays.pop("terminations")
    arrays["timeouts"] = arrays.pop("truncations")
    arrays["observations"] = np.concatenate([x[:-1] for x in seen])
    arrays["next_observations"] = np.concatenate([x[1:] for x in seen])
    return save(path, {name: np.concatenate([x, x[:2] * 0]) for name, x in arrays.items()})


def dealt(episodes, task):
    """Episodes of our agents."""
    team, width = [], max(map(len, SEES[task]))
    for episode in episodes:
        state = episode["observations"][:, :27].astype(np.float32)
        views = [np.pad(state[:, v], ((0, 0), (0, width - len(v)))) for v in SEES[task]]
        part = {"obs": np.stack(views, 1), "state": state, "reward": episode["rewards"]}
        team.append(part | {"actions": episode["actions"][:, MOTORS["ant"]]})
    return team


@pytest.mark.parametrize("task, width", [("full", 27), ("partial", 111)])
def test_a_d4rl_file_gives_the_episodes(tmp_path, task, width):
    path = as_d4rl(tmp_path / "ant_medium-v2.hdf5", ants(width))
    found = data.load("ant", task, str(path))
    agrees(found, dealt(ants(width), task))
    assert found.truncated.tolist() == [not fell for fell in FALLS]
    assert found.info["name"] == "ant_medium-v2" and found.info["task"] == task
    assert found.references == (-325.6, 3879.7)


def test_a_minari_file_gives_the_episodes(tmp_path):
    episodes = ants(105, LENGTHS * 3)  # episode_10 comes after episode_9
    episodes[0]["actions"][0, 0] = 1.5
    path = tmp_path / "ant" / "medium-v0" / "data" / "main_data.hdf5"
    path.parent.mkdir(parents=True)
    groups = [{f"episode_{k}/{name}": x for name, x in e.items()} for k, e in enumerate(episodes)]
    save(path, dict(collections.ChainMap(*groups)))
    episodes[0]["actions"][0, 0] = 1
    for way in (path, path.parents[1]):
        found = data.load("ant", "partial", str(way))
        agrees(found, dealt(episodes, "partial"))
        assert found.truncated.tolist() == [not fell for fell in FALLS * 3]
        assert found.info["name"] == "ant/medium-v0"


def test_what_is_damaged_or_of_another_body_is_refused(tmp_path):
    batch, leaves, episodes = as_batch(steps()), in_a_row(steps()), ants()
    batch["reward"] = batch["reward"][:2]
    leaves["rewards"][0, 1] += 1
    for episode in episodes:
        episode["actions"] = episode["actions"][:, :6]
    for path, said in (
        (save(tmp_path / "a.h5", batch), "a.h5 .*reward has the shape"),
        (as_vault(tmp_path / "bad", leaves), "bad .*the agents' rewards differ"),
        (as_d4rl(tmp_path / "b.hdf5", episodes), "b.hdf5 .*only Ant is read"),
    ):
        with pytest.raises(ValueError, match=said):
            data.read(path)
