"""Datasets by other authors, written here in their layouts and read back step for step."""

import h5py
import numpy as np
import pytest
import torch

import data
import envs
from envs.mamujoco import BODIES, VIEWS

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
    """Assert that a dataset holds these episodes, step for step, and zeros behind them.

    Args:
        after: whether it holds what was seen after the last step, and not the observation before.
    """
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


# ---------------------------------------------------------------- CFCQL and AlberDICE
def test_a_cfcql_file_gives_the_episodes(tmp_path):
    path = save(tmp_path / "2s3z_expert.h5", as_batch(steps([3, 6, 1, 5])))
    found = data.read(path)
    assert found.obs.shape == (4, 7, N, O)  # trimmed from 8 rows
    agrees(found, steps([3, 6, 1, 5]))  # also that the junk action is gone
    assert not found.truncated.any()
    assert found.info == {"name": "2s3z_expert", "behaviour": "published by CFCQL"}


def test_cfcqls_time_outs_are_cut_off(tmp_path):
    arrays = as_batch(steps())
    arrays["terminated"][0] = 0  # the file's word counts where it says that nothing ended
    arrays["obs"][2, 3:] = np.nan  # behind an episode of one step
    for name in ("filled", "actions", "reward"):
        arrays[name] = arrays[name].astype(np.float64)
    path = save(tmp_path / "a.h5", arrays)
    found = data.read(path)
    agrees(found, steps())
    assert found.truncated.tolist() == [True, True, False, False]
    assert data.read(path, time_limit=5).truncated.tolist() == [True, True, False, True]
    assert data.read(path, time_limit=9).truncated.tolist() == [True, False, False, False]


def test_alberdices_folder_gives_the_same_dataset(tmp_path):
    ours = data.collect_dataset("bridge", "", "mixed", seed=3, episodes=10)
    assert ours.truncated.any() and not ours.truncated.all()
    episodes = []
    for e, L in enumerate(ours.lengths.tolist()):
        episode = {name: getattr(ours, name)[e, :L].numpy() for name in ("actions", "reward")}
        for name in ("obs", "state", "avail_actions"):
            episode[name] = getattr(ours, name)[e, : L + 1].numpy()
        episodes.append(episode)
    for name, array in as_batch(episodes, 50).items():
        np.save(tmp_path / f"{name}.npy", array)
    found = data.load("bridge", "", str(tmp_path))
    assert found.fingerprint() == ours.fingerprint()  # also the time-outs: cut off


def test_a_damaged_cfcql_file_is_refused(tmp_path):
    arrays = as_batch(steps())
    arrays["reward"] = arrays["reward"][:2]
    with pytest.raises(ValueError, match="a.h5 .*reward has the shape"):
        data.read(save(tmp_path / "a.h5", arrays))


# ---------------------------------------------------------------- OG-MARL
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
    folder = as_vault(tmp_path / "odd %20" / "Good", in_a_row(steps()))
    found = data.read(folder)
    assert found.obs.shape == (4, 8, N, O)
    agrees(found, steps(), after=False)
    assert not found.truncated.any()
    assert found.info == {"name": "Good", "behaviour": "OG-MARL vault"}
    assert data.read(folder, time_limit=5).truncated.tolist() == [False, True, False, True]


def test_a_vaults_ends_are_those_of_all_agents(tmp_path):
    leaves = in_a_row(steps())
    first, *_, last = np.flatnonzero(leaves["terminals"][:, 0])
    leaves["terminals"][first], leaves["truncations"][first] = False, True
    leaves["terminals"][last, 1:], leaves["truncations"][last, 1:] = False, True  # only one died
    leaves["terminals"][first + 1, 2] = True  # one agent is out; the game goes on
    found = data.read(as_vault(tmp_path / "a", leaves))
    agrees(found, steps(), after=False)
    assert found.truncated.tolist() == [True, False, False, True]
    short = as_vault(tmp_path / "b", in_a_row(steps()), count=sum(LENGTHS) - 1)
    agrees(data.read(short), steps()[:3], after=False)  # the unfinished tail is dropped


def test_a_vault_of_continuous_actions(tmp_path):
    episodes = steps()
    for episode in episodes:
        del episode["avail_actions"]
        episode["actions"] = np.sin(episode["obs"][:-1, :, :2])  # (L, N, 2)
    leaves = in_a_row(episodes)
    episodes[0]["actions"][0, 0, 0] = -1
    leaves["actions"][0, 0, 0] = -1.25
    found = data.read(as_vault(tmp_path / "a", leaves))
    assert found.avail_actions is None
    agrees(found, episodes, after=False)


def test_a_vault_of_cheetahs_ends_by_the_time_limit(tmp_path):
    rng, episodes = np.random.default_rng(0), []
    for L in (3, 1000):
        state = rng.normal(size=(L, 17)).astype(np.float32)
        entries = np.pad(state, ((0, 0), (1, 1)))  # x, which agents see, is 0 here
        episode = {"obs": entries[:, envs.make("halfcheetah").columns], "state": state}
        episode["actions"] = rng.uniform(-1, 1, (L, 2, 3)).astype(np.float32)
        episodes.append(episode | {"reward": state[:, 0]})
    path = str(as_vault(tmp_path / "Good", in_a_row(episodes)))
    found = data.load("halfcheetah", "2x3", path)
    assert found.lengths.tolist() == [3, 1000] and found.truncated.tolist() == [False, True]
    ended = data.load("halfcheetah", "2x3", path, limit_terminates=True)
    assert not ended.truncated.any()


def test_a_damaged_vault_is_refused(tmp_path):
    leaves = in_a_row(steps())
    leaves["rewards"][0, 1] += 1
    with pytest.raises(ValueError, match="bad .*the agents' rewards differ"):
        data.read(as_vault(tmp_path / "bad", leaves))


# ---------------------------------------------------------------- one agent's ant
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


def as_minari(path, episodes):
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = {}
    for k, episode in enumerate(episodes):
        groups |= {f"episode_{k}/{name}": array for name, array in episode.items()}
    return save(path, groups)


def dealt(episodes, task):
    """Episodes of our agents, whose joints are found by name."""
    game = envs.make("ant", task)
    motors = [game.model.joint(i).name for i in game.model.actuator_trnid[:, 0]]
    names = BODIES["ant"].entries.split()
    team = []
    for episode in episodes:
        state = episode["observations"][:, :27].astype(np.float32)
        obs = np.zeros((len(state), 4, game.obs_dim), np.float32)
        actions = np.zeros((len(state) - 1, 4, 2), np.float32)
        for n, (joints, view) in enumerate(VIEWS["ant"][task]):
            for k, joint in enumerate(joints.split()):
                actions[:, n, k] = episode["actions"][:, motors.index(joint)]
            for k, name in enumerate(view.split()):
                obs[:, n, k] = state[:, names.index(name)]
        part = {"obs": obs, "state": state, "actions": actions, "reward": episode["rewards"]}
        team.append(part)
    return team


@pytest.mark.parametrize("task, width", [("full", 27), ("partial", 111)])
def test_a_d4rl_file_gives_the_episodes(tmp_path, task, width):
    path = as_d4rl(tmp_path / "ant_medium-v2.hdf5", ants(width))
    found = data.load("ant", task, str(path))
    agrees(found, dealt(ants(width), task))
    assert found.truncated.tolist() == [not fell for fell in FALLS]
    assert found.info["name"] == "ant_medium-v2" and found.info["task"] == task
    assert found.references == (-325.6, 3879.7)
    with pytest.raises(ValueError, match="another task than halfcheetah 2x3"):
        data.load("halfcheetah", "2x3", str(path))


@pytest.mark.parametrize("task, width", [("full", 105), ("partial", 27)])
def test_a_minari_file_gives_the_episodes(tmp_path, task, width):
    episodes = ants(width, LENGTHS * 3)  # episode_10 comes after episode_9
    episodes[0]["actions"][0, 0] = 1.5
    path = as_minari(tmp_path / "ant" / "medium-v0" / "data" / "main_data.hdf5", episodes)
    episodes[0]["actions"][0, 0] = 1
    for way in (path, path.parents[1]):
        found = data.load("ant", task, str(way))
        agrees(found, dealt(episodes, task))
        assert found.truncated.tolist() == [not fell for fell in FALLS * 3]
        assert found.info["name"] == "ant/medium-v0"


def test_another_body_is_refused(tmp_path):
    episodes = ants()
    for episode in episodes:
        episode["actions"] = episode["actions"][:, :6]
    with pytest.raises(ValueError, match="a.hdf5 .*only Ant is read"):
        data.read(as_d4rl(tmp_path / "a.hdf5", episodes))
