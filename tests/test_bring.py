"""Bringing data: lists of episodes, replay buffers, arrays of any kind, and what MaMuJoCo recorded."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, command, complains, load_script

import data
import envs
from data import Dataset, write
from data.dataset import TENSORS
from data.mamujoco import WIDTHS, from_mamujoco
from envs.mamujoco import BODIES, VIEWS

N, O, D, A = 3, 4, 5, 6  # agents, observation, state, actions  # noqa: E741
LENGTHS, FALLS = [3, 6, 1, 4], [True, False, True, False]


def episodes(continuous=False, seed=0):
    """Episodes with everything that there may be, as numpy arrays."""
    rng, made = np.random.default_rng(seed), []
    for L, fell in zip(LENGTHS, FALLS):
        last = np.arange(L) == L - 1
        legal = rng.random((L + 1, N, A)) < 0.5
        actions = rng.integers(0, A, (L, N))
        np.put_along_axis(legal[:L], actions[..., None], True, -1)
        legal[..., A - 1] = True
        made.append({
            "obs": rng.normal(size=(L + 1, N, O)), "state": rng.normal(size=(L + 1, D)), "avail_actions": legal,
            "actions": actions, "reward": rng.normal(size=L), "terminated": last & fell, "truncated": last & (not fell),
        })  # fmt: skip
        if continuous:
            del made[-1]["avail_actions"]
            made[-1]["actions"] = rng.uniform(-1, 1, (L, N, 2))
    return made


def same(one, other, names=TENSORS):
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(a is b is None or a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def holds(found, given):
    """Assert that a dataset holds these episodes, step for step, and zeros behind them."""
    assert found.mask.tolist() == [[t < L for t in range(max(LENGTHS))] for L in LENGTHS]
    for e, (episode, L) in enumerate(zip(given, LENGTHS)):
        for name in ("obs", "state", "avail_actions", "actions", "reward", "terminated"):
            tensor, real = getattr(found, name), L + (name in ("obs", "state", "avail_actions"))
            if tensor is not None:
                assert torch.equal(tensor[e, :real], torch.as_tensor(episode[name]).to(tensor.dtype)), name
                assert not tensor[e, real:].any()


# ---------------------------------------------------------------- episodes
@pytest.mark.parametrize("continuous", [False, True])
def test_episodes_become_a_dataset(continuous, tmp_path):
    given = episodes(continuous)
    found = Dataset.from_episodes(given, env="mine", seed=np.int64(3))
    holds(found, given)
    assert found.truncated.tolist() == [not fell for fell in FALLS] and (found.avail_actions is None) == continuous
    assert found.info == {"env": "mine", "seed": 3}
    data.write(found, tmp_path / "mine.h5")
    assert same(found, data.read(tmp_path / "mine.h5"))


KINDS = {
    "float16": lambda x: x.astype(np.float16) if x.dtype.kind == "f" else x.astype(np.int8),
    "other bytes": lambda x: x.astype(x.dtype.newbyteorder()),
    "backwards": lambda x: x[::-1].copy()[::-1],
    "read only": lambda x: np.lib.stride_tricks.as_strided(x, writeable=False),
    "unsigned": lambda x: x.astype(np.uint16) if x.dtype.kind in "ib" else x,
    "lists": lambda x: x.tolist(),
    "tensors": torch.as_tensor,
    "lists of tensors": lambda x: list(torch.as_tensor(x)),
    "with a gradient": lambda x: torch.as_tensor(x).float().requires_grad_() if x.dtype.kind == "f" else x,
    "all floating": lambda x: x.astype(np.float64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_number_will_do(kind):
    given, cast = episodes(), KINDS[kind]
    if kind == "float16":  # the same rounded numbers in all kinds
        for episode in given:
            episode |= {name: x.astype(np.float16) for name, x in episode.items() if x.dtype.kind == "f"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch dislikes arrays that cannot be written
        found = Dataset.from_episodes([{name: cast(array) for name, array in episode.items()} for episode in given])
    holds(found, given)
    assert same(found, Dataset.from_episodes(given)) and not found.obs.requires_grad


def test_what_is_left_out_is_filled_in():
    given = episodes()
    bare = [{name: episode[name] for name in ("obs", "actions", "reward")} for episode in given]
    for episode, fell in zip(bare, FALLS):
        episode["terminated"] = fell  # a word on the last step
    found = Dataset.from_episodes(bare)
    assert same(found, Dataset.from_episodes(given), ("obs", "actions", "reward", "terminated", "mask"))
    assert torch.equal(found.state, found.obs.flatten(2))
    seen = torch.nn.functional.pad(found.mask, (1, 0), value=True)
    assert found.avail_actions.shape[-1] == A and torch.equal(found.avail_actions.all(-1).all(-1), seen)
    assert Dataset.from_episodes(bare, num_actions=9).avail_actions.shape[-1] == 9
    for episode in bare:
        episode["actions"], episode["truncated"] = episode["actions"][..., None], not episode.pop("terminated")
    cut = Dataset.from_episodes(bare)  # a column of whole numbers; nobody says that a game terminated
    assert same(cut, found, ("obs", "actions", "reward", "mask")) and not cut.terminated.any()


def test_rewards_of_agents_are_added_up_or_averaged():
    given = episodes()
    for episode in given:
        episode["reward"] = episode["reward"][:, None] * [1, 2, 6]
    total, mean = Dataset.from_episodes(given), Dataset.from_episodes(given, team_reward="mean")
    plain = Dataset.from_episodes(episodes())
    assert torch.allclose(total.reward, 9 * plain.reward) and torch.allclose(mean.reward, 3 * plain.reward)
    assert total.info == {"team_reward": "sum"} and mean.info == {"team_reward": "mean"} and plain.info == {}
    with pytest.raises(ValueError, match="team_reward must be sum or mean, not 'max'"):
        Dataset.from_episodes(given, "max")
    for episode in given:
        episode["reward"] = episode["reward"][:, :1]  # a column, of the team
    assert same(Dataset.from_episodes(given), plain) and Dataset.from_episodes(given).info == {}


def test_dones_and_a_time_limit():
    given = episodes()
    for episode in given:
        episode["dones"] = episode.pop("terminated") | episode.pop("truncated")
    assert Dataset.from_episodes(given, time_limit=6).truncated.tolist() == [False, True, False, False]
    assert Dataset.from_episodes(given, time_limit=4).truncated.tolist() == [False, True, False, True]
    assert not Dataset.from_episodes(given, time_limit=math.inf).truncated.any()
    given[0]["dones"] = False
    assert Dataset.from_episodes(given, time_limit=4).truncated.tolist() == [True, True, False, True]


def put(name, value):
    def change(episode):
        episode[name] = value(episode[name]) if callable(value) else value

    return change


UNFIT = {  # how episode 1, of 6 steps, is changed, and what is said of it
    "no observation after the last step": (put("obs", lambda x: x[:-1]), "obs have 6 rows for 6 steps, in place of 7"),
    "no state after it": (put("state", lambda x: x[:-1]), "state have 6 rows .*, if they were not kept, the last row"),
    "nothing available after it": (put("avail_actions", lambda x: x[:-1]), "avail_actions have 6 rows for 6 steps"),
    "a row too many": (put("obs", lambda x: x[[0, *range(7)]]), "obs have 8 rows for 6 steps, in place of 7"),
    "flat observations": (put("obs", lambda x: x.reshape(7, -1)), r"obs must be \(T \+ 1, N, O\), not \(7, 12\)"),
    "a text": (put("obs", "hello"), "obs holds <U5, not numbers"),
    "bytes": (put("reward", b"hello"), "reward holds .S5, not numbers"),
    "ragged lists": (put("obs", [[1, 2], [3]]), "obs is no array: its parts differ in length"),
    "agents of different views": (put("obs", [[[1, 2], [3]]] * 7), "obs is no array: its parts differ in length"),
    "complex numbers": (put("state", lambda x: x + 1j), "state holds complex128, not numbers"),
    "complex tensors": (put("state", lambda x: torch.as_tensor(x) + 1j), "state holds torch.complex128, not numbers"),
    "numbers beyond 64 bits": (put("actions", [[10**20] * 3] * 6), "actions holds object, not numbers .* 64 bits"),
    "dates": (put("reward", np.zeros(6, "M8[s]")), "reward holds datetime64.s., not numbers"),
    "records": (put("reward", np.zeros(6, [("a", "f4")])), "reward holds .*, not numbers"),
    "a dictionary for each agent": (put("obs", {"agent_0": [1]}), "obs holds object, not numbers"),
    "fractions of actions": (put("actions", lambda x: x + 0.5), r"actions must be whole numbers \(T, N\), or others"),
    "one-hot actions": (put("actions", lambda x: np.eye(6, dtype=int)[x]), "actions must be whole numbers .* .6, 3, 6"),
    "actions of one agent": (put("actions", lambda x: x[:, 0]), "actions must be whole numbers"),
    "no step": (lambda e: e.update({name: x[: len(x) - 6] for name, x in e.items()}), "it has no step"),
    "another number of agents": (put("obs", lambda x: x[:, :2]), "obs are of 2 agents, actions of 3"),
    "rewards of other agents": (put("reward", np.zeros((6, 2))), r"reward must be \(6,\) or \(6, 3\), not \(6, 2\)"),
    "a reward too few": (put("reward", lambda x: x[1:]), r"reward must be \(6,\)"),
    "ends too few": (put("terminated", lambda x: x[1:]), r"terminated must be \(6,\) or one bool"),
    "an early end": (put("truncated", [0, 1, 0, 0, 0, 0]), "it goes on after a step that is truncated"),
    "half an end": (put("terminated", 0.5), "terminated must hold 0 and 1"),
    "no end": (lambda e: [e.pop("terminated"), e.pop("truncated")], "it lacks terminated: False if"),
    "dones": (lambda e: [e.pop("terminated"), e.pop("truncated"), e.update(dones=True)], "dones do not tell"),
    "all three": (put("dones", True), "it has dones beside terminated"),
    "no reward": (lambda e: e.pop("reward"), "it lacks reward"),
    "None": (put("obs", lambda x: None), "it lacks obs"),
    "another name": (lambda e: e.update(rewards=e.pop("reward")), "rewards is none of obs, actions, reward"),
    "other observations": (put("obs", lambda x: x[..., :3]), "obs of a step is .3, 3. float32, but of episode 0 .3"),
    "continuous actions": (put("actions", np.zeros((6, 3, 2))), "actions of a step is .3, 2. float32, but of epi"),
    "no state here only": (lambda e: e.pop("state"), "state of a step is none, but of episode 0 .5,. float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_an_episode_that_does_not_fit_is_refused_in_one_line(name):
    given, (change, said) = episodes(), UNFIT[name]
    change(given[1])
    with pytest.raises(ValueError, match=said) as error:
        Dataset.from_episodes(given)
    assert str(error.value).startswith("episode 1: ") and "\n" not in str(error.value)


UNSOUND = {  # what only shows in the whole
    "NaN": (put("obs", lambda x: x * np.nan), "obs holds NaN or infinite numbers"),
    "endless": (put("reward", lambda x: x / 0), "reward holds NaN or infinite"),
    "too large for 32 bits": (put("state", lambda x: x + 1e300), "state holds NaN or infinite"),
    "a negative action": (put("actions", lambda x: x * 0 - 1), "actions must lie in 0 .. 5; found -1"),
    "a high action": (put("actions", lambda x: x + 6), "actions must lie in 0 .. 5"),
    "a forbidden action": (put("avail_actions", lambda x: x & (np.arange(A) == A - 1)), "avail_actions forbids"),
    "no action": (put("avail_actions", lambda x: x & (np.arange(7) < 6)[:, None, None]), "has no available action"),
}


@pytest.mark.parametrize("name", UNSOUND)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_unsound_values_are_refused(name):
    given, (change, said) = episodes(), UNSOUND[name]
    change(given[1])
    with pytest.raises(ValueError, match=f"from_episodes: .*{said}"):
        Dataset.from_episodes(given)


def test_lists_that_are_none():
    for bad in ([], (), {}, None, "episodes", episodes()[0]):
        with pytest.raises(ValueError, match="a list of at least one episode"):
            Dataset.from_episodes(bad)
    with pytest.raises(ValueError, match="episode 1: it is a list, not a dictionary"):
        Dataset.from_episodes([episodes()[0], []])
    given = [{k: x for k, x in episode.items() if k != "avail_actions"} for episode in episodes()]
    given[0]["actions"][0, 0] = 10**12
    with pytest.raises(ValueError, match="the largest action is 1000000000000: .* give avail_actions"):
        Dataset.from_episodes(given)
    nobody = episodes()
    for episode in nobody:
        episode |= {name: episode[name][:, :0] for name in ("obs", "avail_actions", "actions")}
    with pytest.raises(ValueError, match="it has no agents"):
        Dataset.from_episodes(nobody)
    wild = episodes(continuous=True)
    wild[2]["actions"] *= 3
    with pytest.raises(ValueError, match=r"actions must lie in \[-1, 1\]; found"):
        Dataset.from_episodes(wild)


# ---------------------------------------------------------------- a replay buffer
def buffer(given):
    """Episodes laid end to end, with what was seen after each step, and where they end."""
    arrays = {name: np.concatenate([e[name] for e in given]) for name in ("actions", "reward", "terminated")}
    for name in ("obs", "state", "avail_actions"):
        if name in given[0]:
            arrays[name] = np.concatenate([e[name][:-1] for e in given])
            arrays[f"next_{name}"] = np.concatenate([e[name][1:] for e in given])
    return arrays, np.concatenate([np.arange(len(e["reward"])) == len(e["reward"]) - 1 for e in given])


@pytest.mark.parametrize("continuous", [False, True])
def test_transitions_become_the_same_dataset(continuous):
    given = episodes(continuous)
    arrays, ends = buffer(given)
    wanted = Dataset.from_episodes(given, name="mine")
    found = Dataset.from_transitions(arrays, ends, name="mine")
    assert same(found, wanted) and found.info == wanted.info
    ends[-1] = False  # what follows the last end was cut off, as it was
    assert same(Dataset.from_transitions(arrays, ends), wanted)
    del arrays["terminated"]
    ends[-1] = True
    limited = Dataset.from_transitions(arrays, ends, time_limit=4)
    assert same(limited, wanted, ("obs", "state", "actions", "reward", "mask"))
    assert limited.truncated.tolist() == [False, True, False, True]


def test_transitions_without_what_followed():
    arrays, ends = buffer(episodes())
    wanted = Dataset.from_episodes(episodes())
    found = Dataset.from_transitions({k: x for k, x in arrays.items() if not k.startswith("next_")}, ends)
    last = torch.arange(4), wanted.lengths
    before = torch.arange(4), wanted.lengths - 1
    for name in ("obs", "state", "avail_actions"):
        one, other = getattr(found, name), getattr(wanted, name).clone()
        other[last] = other[before]  # a copy stands in
        assert torch.equal(one, other)
    assert same(found, wanted, ("actions", "reward", "terminated", "mask"))


UNFIT_BUFFERS = {
    "in another order": (lambda a, ends: a.update(obs=np.roll(a["obs"], 1, 0)), "next_obs of step 0 is not obs of"),
    "no mark at an end": (lambda a, ends: ends.__setitem__(2, False), "next_obs of step 2 is not obs of step 3"),
    "too few rewards": (lambda a, ends: a.update(reward=a["reward"][1:]), "reward has the shape .13,., but ends"),
    "one number": (lambda a, ends: a.update(reward=3), r"reward has the shape \(\), but"),
    "no ends": (lambda a, ends: a.pop("terminated"), "dones do not tell the game's own end from a time limit"),
    "no observations": (lambda a, ends: [a.pop("obs"), a.pop("next_obs")], "it lacks obs"),
    "an end within": (lambda a, ends: a["terminated"].__setitem__(0, True), "it goes on after a step that is"),
    "another name": (lambda a, ends: a.update(rewards=a.pop("reward")), "rewards is none of"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT_BUFFERS)
def test_a_buffer_that_does_not_fit_is_refused(name):
    (arrays, ends), (change, said) = buffer(episodes()), UNFIT_BUFFERS[name]
    Dataset.from_transitions(dict(arrays), ends)
    change(arrays, ends)
    with pytest.raises(ValueError, match=said) as error:
        Dataset.from_transitions(arrays, ends)
    assert "\n" not in str(error.value)


def test_a_buffer_without_steps_is_refused():
    arrays, ends = buffer(episodes())
    for ends in ([], [[True]], True):
        with pytest.raises(ValueError, match="from_transitions takes a dictionary of arrays"):
            Dataset.from_transitions(arrays, ends)
    with pytest.raises(ValueError, match="from_transitions takes a dictionary of arrays"):
        Dataset.from_transitions([arrays], np.ones(14))
    with pytest.raises(ValueError, match="from_transitions: ends must hold 0 and 1"):
        Dataset.from_transitions(arrays, np.arange(14))


# ---------------------------------------------------------------- arrays of any kind
@pytest.fixture
def sound():
    return Dataset.from_episodes(episodes(), env="mine")


def test_numpy_arrays_become_tensors_without_a_copy(sound):
    arrays = {name: getattr(sound, name).numpy() for name in TENSORS}
    found = Dataset(**arrays)
    assert same(found, sound)
    assert all(getattr(found, name).data_ptr() == arrays[name].ctypes.data for name in TENSORS)
    other = {name: array.astype(np.float64) for name, array in arrays.items() if name != "actions"}
    assert same(Dataset(**other, actions=arrays["actions"].astype(np.int16)).check(), sound)


def test_what_lies_behind_the_mask_is_cleared_in_a_copy(sound):
    arrays = {name: getattr(sound, name).double().numpy() for name in TENSORS if name != "mask"}
    for name, array in arrays.items():
        seen = name in ("obs", "state", "avail_actions")
        for e, L in enumerate(LENGTHS):
            array[e, L + seen :] = -1 if name in ("actions", "avail_actions") else np.nan
    kept = {name: array.copy() for name, array in arrays.items()}
    arrays["actions"] = arrays["actions"].astype(int)
    assert same(Dataset(**arrays, mask=sound.mask).check(), sound)
    assert all(np.array_equal(arrays[name], kept[name], equal_nan=True) for name in kept)  # the user's stay
    arrays["avail_actions"][0, 0] = -1  # before the mask's end it is wrong
    with pytest.raises(ValueError, match="dataset: avail_actions must hold 0 and 1 only"):
        Dataset(**arrays, mask=sound.mask)


def test_info_keeps_numbers_of_any_kind(sound, tmp_path):
    sound = dataclasses.replace(sound, info={
        "seed": np.int64(3), "share": np.float32(0.5), "won": np.array([1, 0, 0, 1]), "sizes": (1, torch.tensor(2)),
        "references": {"random": np.float32(0), "expert": torch.tensor(1.0)}, 7: [np.bool_(True)],
    })  # fmt: skip
    assert sound.info == json.loads(json.dumps(sound.info)) == {
        "seed": 3, "share": 0.5, "won": [1, 0, 0, 1], "sizes": [1, 2], "references": {"random": 0.0, "expert": 1.0},
        "7": [True],
    }  # fmt: skip
    sound.info["later"] = np.float64(0.25)
    data.write(sound, tmp_path / "a.h5")
    found = data.read(tmp_path / "a.h5")
    assert found.info == sound.info | {"later": 0.25, "format": 1} and found.win_rate == 0.5
    deep, ring = [], []
    for _ in range(3000):
        deep = [deep]
    ring.append(ring)
    for bad, said in (({1, 2}, "it holds a set"), (deep, ""), (ring, "Circular"), (1j, "a complex"), (b"x", "a bytes")):
        with pytest.raises(ValueError, match=f"info 'bad' cannot be kept as JSON: .*{said}"):
            dataclasses.replace(sound, info={"bad": bad})
    with pytest.raises(ValueError, match="info must be a dictionary, not a list"):
        dataclasses.replace(sound, info=[1])
    sound.info["bad"] = {1}
    with pytest.raises(ValueError, match="cannot be kept as JSON"):
        data.write(sound, tmp_path / "b.h5")
    assert not (tmp_path / "b.h5").exists()


def test_equal_data_have_equal_fingerprints(sound, tmp_path):
    word = sound.fingerprint()
    assert len(word) == 16 and int(word, 16) >= 0
    data.write(dataclasses.replace(sound, info={"env": "other"}), tmp_path / "a.h5")
    for equal in (data.read(tmp_path / "a.h5"), sound.to("cpu"), Dataset.from_episodes(episodes())):
        assert equal.fingerprint() == word
    words = {word}
    for name in TENSORS:
        changed = getattr(sound, name).clone()
        changed[0, 0] = ~changed[0, 0] if changed.dtype == torch.bool else changed[0, 0] + 1
        words.add(dataclasses.replace(sound, **{name: changed}).fingerprint())
    words.add(dataclasses.replace(sound, avail_actions=None).fingerprint())
    assert len(words) == len(TENSORS) + 2


# ---------------------------------------------------------------- MaMuJoCo
def test_observations_in_another_order_are_refused(tmp_path):
    path = tmp_path / "a.h5"
    for env, task in (("halfcheetah", "2x3"), ("reacher", "leader-only"), ("ant", "full")):
        still = data.collect.play_body(env, task, "random", 2, 0)[0][0]
        data.write(still, path)
        assert same(data.load(env, task, str(path)), still)
        turned = dataclasses.replace(still, obs=still.obs.flip(2))  # the agents have changed places
        data.write(turned, path)
        if env == "ant":  # where all see the same, which is no order at all
            turned = dataclasses.replace(still, obs=still.obs.flip(3))
            data.write(turned, path)
        with pytest.raises(ValueError, match=f"a.h5: its observations are not in the order of {env} here: entry .*"):
            data.load(env, task, str(path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env, task, scenario, split", [
    ("halfcheetah", "2x3", "HalfCheetah", "2x3"), ("reacher", "leader-only", "Reacher", "2x1"),
    ("ant", "partial", "Ant", "4x2"),
])  # fmt: skip
@pytest.mark.parametrize("obsk, team_reward", [(1, "sum"), (2, "mean")])
def test_mamujocos_data_become_ours(tmp_path, env, task, scenario, split, obsk, team_reward):
    """Its environment and ours, side by side from one starting state: after the conversion the data are the same."""
    mamujoco = pytest.importorskip("gymnasium_robotics").mamujoco_v1
    theirs, ours = mamujoco.parallel_env(scenario, split, agent_obsk=obsk), envs.make(env, task)
    theirs.reset(seed=0)
    obs, info = ours.reset(seed=0)
    start = obs[0, 0, 10] if env == "halfcheetah" else 0  # x, which the data do not tell
    theirs.single_agent_env.unwrapped.set_state(ours.qpos[0].copy(), ours.qvel[0].copy())
    names, width = theirs.possible_agents, max(theirs.observation_space(a).shape[0] for a in theirs.possible_agents)

    def look():
        views = theirs._get_obs()  # of different lengths, in the reacher
        return np.stack([np.pad(views[agent], (0, width - len(views[agent]))) for agent in names])

    episode = {"obs": [look()], "state": [theirs.state()], "actions": [], "reward": [], "terminated": []}
    film, rng = {"obs": [obs[0]], "state": [info["state"][0]], "reward": []}, np.random.default_rng(0)
    for _ in range(120):
        actions = rng.uniform(-1, 1, ours.motors.shape).astype(np.float32)
        _, rewards, terminated, *_ = theirs.step(dict(zip(names, actions)))
        steps = actions[:, ::-1] if env == "halfcheetah" else actions  # each agent's, in the reverse order
        obs, reward, fallen, _, info = ours.step(torch.tensor(steps.copy())[None])
        for name, value in (("obs", look()), ("state", theirs.state()), ("actions", actions),
                            ("reward", [rewards[a] for a in names]), ("terminated", terminated[names[0]])):  # fmt: skip
            episode[name].append(value)
        for name, value in (("obs", obs), ("state", info["state"]), ("reward", reward)):
            film[name].append(value[0])
        assert fallen.item() == terminated[names[0]]
        if not theirs.agents:
            break

    given = Dataset.from_episodes([episode], team_reward, env=env, task=task, layout="mamujoco")
    data.write(given, tmp_path / "a.h5")
    found = data.load(env, task, str(tmp_path / "a.h5"))
    film = {name: torch.stack(values) for name, values in film.items()}
    place = (torch.tensor(ours.columns) < ours.hidden) * start  # (N, O)
    assert torch.allclose(found.obs[0], film["obs"] - place, atol=2e-4)
    assert torch.equal(found.state[0], film["state"])
    assert torch.allclose(found.reward[0], film["reward"], atol=0.01 if env == "ant" else 1e-6)  # its contact costs
    again = envs.make(env, task)
    again.reset(seed=0)
    for actions, state in zip(found.actions[0], film["state"][1:]):
        assert torch.equal(again.step(actions[None])[4]["state"][0], state)  # the actions, too, are ours now
    assert found.info["layout"] == "ours, from MaMuJoCo's"

    if (env, obsk) == ("halfcheetah", 2):  # the sizes of ours: without the word it would be accepted in silence
        del given.info["layout"]
        data.write(given, tmp_path / "b.h5")
        with pytest.raises(ValueError, match="b.h5: .* entry 7 of agent 0 is not the state's entry 8; if MaMuJoCo"):
            data.load(env, task, str(tmp_path / "b.h5"))
        words = ("--env", env, "--dataset", tmp_path / "b.h5", "--out-dir", tmp_path / "run")
        complains(command("algorithms/bc.py", *words), "info['layout'] = 'mamujoco'")
        assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
def test_both_orders_are_as_the_readme_says():
    mamujoco = pytest.importorskip("gymnasium_robotics").mamujoco_v1
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "envs" / "README.md").read_text().splitlines()]
    here, *others = [row[1:] for row in rows if row[0].startswith(("here, as in OG-MARL", "MaMuJoCo, `agent_obsk="))]
    moves, sees = VIEWS["halfcheetah"]["2x3"][0]
    assert [cell.replace(",", "") for cell in here] == [moves, sees]
    names = BODIES["halfcheetah"].entries.split()[1:]  # of the state
    for obsk, (acts, seen) in enumerate(others, 1):
        game = mamujoco.parallel_env("HalfCheetah", "2x3", agent_obsk=obsk)
        columns = game.create_observation_mapping()["agent_0"]
        told = [names[column] for column in columns]
        before = others[0][1].split(", ")
        wanted = before[:7] + ["fshin"] + before[7:] if obsk == 2 else before
        assert told == wanted and [node.label for node in game.agent_action_partitions[0]] == acts.split(", ")
        assert seen == ("the same with fshin after fthigh" if obsk == 2 else others[0][1])


def test_mamujocos_data_of_other_sizes_are_refused():
    game = envs.make("halfcheetah")
    assert WIDTHS["halfcheetah"] == game.state_dim
    given = Dataset.from_episodes([{"obs": np.zeros((3, 2, 13)), "actions": np.zeros((2, 2, 3)), "reward": [0, 0],
                                    "terminated": False}], layout="mamujoco")  # fmt: skip
    with pytest.raises(ValueError, match=r"mine has \(state, agents, actions\) = \(26, 2, 3\), but .* \(17, 2, 3\)"):
        from_mamujoco(given, game, "mine")


def own(path, agents=2, episodes=20, whole=False):
    """A file of somebody's data: random play in 5 steps; with `whole` views are whole numbers, the state is not."""
    rng, found = np.random.default_rng(0), []
    for _ in range(episodes):
        obs, state = rng.random((6, agents, 3), dtype=np.float32), rng.random((6, 4), dtype=np.float32)
        actions = rng.integers(3, size=(5, agents))
        found.append({"obs": obs.round() if whole else obs, "state": state, "actions": actions,
                      "reward": (actions[:, 0] == 1) * 1.0, "terminated": True, "truncated": False})  # fmt: skip
    write(Dataset.from_episodes(found), path)
    return str(path)


@pytest.mark.parametrize("script", ["inspo", "alberdice"])
def test_methods_of_turns_need_a_team_and_fit_their_weights_to_any_data(tmp_path, script):
    flags = ["--eval-episodes", "0", "--steps", "2", "--out-dir", tmp_path / "run"]
    alone = own(tmp_path / "alone.h5", agents=1)
    complains(command(f"algorithms/{script}.py", "--dataset", alone, *flags), "is for two agents or more, and here is one")
    parse = load_script(script).parse
    args = parse(["--dataset", own(tmp_path / "single.h5", episodes=1), *map(str, flags)])  # returns without a spread
    assert args.alpha > 0 and math.isfinite(args.alpha)
    assert not parse(["--dataset", own(tmp_path / "mixed.h5", whole=True), *map(str, flags)]).one_hot
