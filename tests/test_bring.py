"""Bringing data: lists of episodes, replay buffers, and arrays of any kind."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch

from data import Dataset
from data.dataset import TENSORS

N, O, D, A = 3, 4, 5, 6  # agents, observation, state, actions
LENGTHS, FALLS = [3, 6, 1, 4], [True, False, True, False]


def episodes(continuous=False):
    """Episodes with everything that there may be, as numpy arrays."""
    rng, made = np.random.default_rng(0), []
    for L, fell in zip(LENGTHS, FALLS):
        last = np.arange(L) == L - 1
        legal = rng.random((L + 1, N, A)) < 0.5
        actions = rng.integers(0, A, (L, N))
        np.put_along_axis(legal[:L], actions[..., None], True, -1)
        legal[..., A - 1] = True
        episode = {"obs": rng.normal(size=(L + 1, N, O)), "state": rng.normal(size=(L + 1, D))}
        episode |= {"avail_actions": legal, "actions": actions, "reward": rng.normal(size=L)}
        episode |= {"terminated": last & fell, "truncated": last & (not fell)}
        if continuous:
            del episode["avail_actions"]
            episode["actions"] = rng.uniform(-1, 1, (L, N, 2))
        made.append(episode)
    return made


def same(one, other, names=TENSORS):
    for name in names:
        a, b = getattr(one, name), getattr(other, name)
        if a is not b and (a.dtype != b.dtype or not torch.equal(a, b)):
            return False
    return True


@pytest.mark.parametrize("continuous", [False, True])
def test_episodes_become_a_dataset(continuous):
    given = episodes(continuous)
    found = Dataset.from_episodes(given, env="mine", seed=np.int64(3))
    assert found.info == {"env": "mine", "seed": 3}
    assert found.mask.tolist() == [[t < L for t in range(max(LENGTHS))] for L in LENGTHS]
    assert found.truncated.tolist() == [not fell for fell in FALLS]
    assert (found.avail_actions is None) == continuous
    for e, L in enumerate(LENGTHS):
        for name, tensor in found.tensors().items():
            if name != "mask":
                wanted = torch.as_tensor(given[e][name]).to(tensor.dtype)
                assert torch.equal(tensor[e, : len(wanted)], wanted), name
                assert not tensor[e, len(wanted) :].any()


KINDS = {
    "float16": lambda x: x.astype(np.float16) if x.dtype.kind == "f" else x.astype(np.int8),
    "backwards": lambda x: x[::-1].copy()[::-1],
    "read only": lambda x: np.lib.stride_tricks.as_strided(x, writeable=False),
    "lists": lambda x: x.tolist(),
    "tensors": torch.as_tensor,
    "lists of tensors": lambda x: list(torch.as_tensor(x)),
    "all floating": lambda x: x.astype(np.float64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_number_will_do(kind):
    given, cast = episodes(), KINDS[kind]
    if kind == "float16":  # the same rounded numbers in both
        for episode in given:
            for name in ("obs", "state", "reward"):
                episode[name] = episode[name].astype(np.float16)
    wanted = Dataset.from_episodes(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch dislikes arrays that cannot be written
        changed = [{name: cast(x) for name, x in episode.items()} for episode in given]
        assert same(Dataset.from_episodes(changed), wanted)


def test_what_is_left_out_is_filled_in():
    given = Dataset.from_episodes(episodes())
    bare = []
    for episode, fell in zip(episodes(), FALLS):
        part = {name: episode[name] for name in ("obs", "actions", "reward")}
        part["actions"] = part["actions"][..., None]  # a column of whole numbers
        bare.append(part | {"terminated": fell})  # a word on the last step
    found = Dataset.from_episodes(bare)
    assert same(found, given, ("obs", "actions", "reward", "terminated", "mask"))
    assert torch.equal(found.state, found.obs.flatten(2))
    seen = torch.nn.functional.pad(found.mask, (1, 0), value=True)
    assert torch.equal(found.avail_actions, seen[..., None, None].expand(4, 7, N, A))
    assert Dataset.from_episodes(bare, num_actions=9).avail_actions.shape[-1] == 9
    for episode in bare:
        episode["truncated"] = not episode.pop("terminated")
    assert not Dataset.from_episodes(bare).terminated.any()


def test_rewards_of_agents_are_added_up_or_averaged():
    given, plain = episodes(), Dataset.from_episodes(episodes())
    for episode in given:
        episode["reward"] = episode["reward"][:, None] * [1, 2, 6]
    total, mean = Dataset.from_episodes(given), Dataset.from_episodes(given, team_reward="mean")
    assert torch.allclose(total.reward, 9 * plain.reward)
    assert torch.allclose(mean.reward, 3 * plain.reward)
    assert total.info == {"team_reward": "sum"} and mean.info == {"team_reward": "mean"}
    for episode in given:
        episode["reward"] = episode["reward"][:, :1]  # a column, of the team
    found = Dataset.from_episodes(given)
    assert same(found, plain) and found.info == {}


def test_dones_and_a_time_limit():
    given = episodes()
    for episode in given:
        episode["dones"] = episode.pop("terminated") | episode.pop("truncated")
    for limit, cut in ((6, [1]), (4, [1, 3]), (math.inf, [])):
        found = Dataset.from_episodes(given, time_limit=limit)
        assert found.truncated.nonzero()[:, 0].tolist() == cut
    with pytest.raises(ValueError, match="dones do not tell"):
        Dataset.from_episodes(given)


UNFIT = {  # how episode 1, of 6 steps, is changed
    "obs has 6 rows for 6 steps: append": lambda e: e.update(obs=e["obs"][:-1]),
    r"obs must be \(T \+ 1, N, O\), not": lambda e: e.update(obs=e["obs"].reshape(7, -1)),
    "obs is no array of numbers": lambda e: e.update(obs=[[1, 2], [3]]),
    "state is no array of numbers": lambda e: e.update(state="hello"),
    "actions must be whole numbers": lambda e: e.update(actions=e["actions"] + 0.5),
    "obs is of 2 agents, not 3": lambda e: e.update(obs=e["obs"][:, :2]),
    r"reward must be \(6,\)": lambda e: e.update(reward=e["reward"][1:]),
    "it goes on after a step that is": lambda e: e.update(truncated=[0, 1, 0, 0, 0, 0]),
    "terminated must hold 0 and 1": lambda e: e.update(terminated=0.5),
    "it lacks terminated": lambda e: (e.pop("terminated"), e.pop("truncated")),
    "it lacks reward": lambda e: e.pop("reward"),
    "rewards is none of obs": lambda e: e.update(rewards=e.pop("reward")),
    "a step of it is .*obs .3, 3.": lambda e: e.update(obs=e["obs"][..., :3]),
}


@pytest.mark.parametrize("said", UNFIT)
def test_an_episode_that_does_not_fit_is_refused(said):
    given = episodes()
    UNFIT[said](given[1])
    with pytest.raises(ValueError, match=f"^episode 1: {said}"):
        Dataset.from_episodes(given)


def test_what_is_no_list_of_episodes_is_refused():
    for bad in ([], None, episodes()[0]):
        with pytest.raises(ValueError, match="a list of at least one episode"):
            Dataset.from_episodes(bad)
    with pytest.raises(ValueError, match="team_reward must be sum or mean"):
        Dataset.from_episodes(episodes(), "max")


# ---------------------------------------------------------------- a replay buffer
def buffer(given):
    """Episodes laid end to end, with what was seen after each step, and where they end."""
    arrays = {}
    for name in ("actions", "reward", "terminated"):
        arrays[name] = np.concatenate([e[name] for e in given])
    for name in ("obs", "state", "avail_actions"):
        if name in given[0]:
            arrays[name] = np.concatenate([e[name][:-1] for e in given])
            arrays[f"next_{name}"] = np.concatenate([e[name][1:] for e in given])
    return arrays, np.concatenate([e["terminated"] | e["truncated"] for e in given])


@pytest.mark.parametrize("continuous", [False, True])
def test_transitions_become_the_same_dataset(continuous):
    given = episodes(continuous)
    arrays, ends = buffer(given)
    wanted = Dataset.from_episodes(given, name="mine")
    found = Dataset.from_transitions(arrays, ends, name="mine")
    assert same(found, wanted) and found.info == wanted.info
    ends[-1] = False  # what follows the last end was cut off, as it was
    assert same(Dataset.from_transitions(arrays, ends), wanted)
    ends[-1] = True
    del arrays["terminated"]
    limited = Dataset.from_transitions(arrays, ends, time_limit=4)
    assert same(limited, wanted, ("obs", "state", "actions", "reward", "mask"))
    assert limited.truncated.tolist() == [False, True, False, True]


def test_a_copy_stands_in_for_what_followed():
    arrays, ends = buffer(episodes())
    wanted = Dataset.from_episodes(episodes())
    bare = {name: x for name, x in arrays.items() if not name.startswith("next_")}
    found = Dataset.from_transitions(bare, ends)
    episode, last = torch.arange(4), wanted.lengths
    for name in ("obs", "state", "avail_actions"):
        tensor = getattr(wanted, name)
        tensor[episode, last] = tensor[episode, last - 1]
    assert same(found, wanted)


UNFIT_BUFFERS = {
    "next_obs of step 0 is not obs of": lambda a, ends: a.update(obs=np.roll(a["obs"], 1, 0)),
    "next_obs of step 2 is not obs of step 3": lambda a, ends: ends.__setitem__(2, False),
    "reward has the shape": lambda a, ends: a.update(reward=a["reward"][1:]),
    "dones do not tell": lambda a, ends: a.pop("terminated"),
    "it lacks obs": lambda a, ends: (a.pop("obs"), a.pop("next_obs")),
}


@pytest.mark.parametrize("said", UNFIT_BUFFERS)
def test_a_buffer_that_does_not_fit_is_refused(said):
    arrays, ends = buffer(episodes())
    UNFIT_BUFFERS[said](arrays, ends)
    with pytest.raises(ValueError, match=said):
        Dataset.from_transitions(arrays, ends)


# ---------------------------------------------------------------- padded arrays
def test_arrays_are_taken_without_a_copy_and_cleared_in_one():
    sound = Dataset.from_episodes(episodes())
    arrays = {name: tensor.numpy().copy() for name, tensor in sound.tensors().items()}
    found = Dataset(**arrays)
    assert same(found, sound)
    assert all(getattr(found, name).data_ptr() == x.ctypes.data for name, x in arrays.items())
    arrays["obs"][2, 2:], arrays["reward"][2, 1:] = np.nan, 7  # behind an episode of one step
    arrays["actions"][2, 1:], arrays["avail_actions"][2, 2:] = -1, True
    kept = {name: x.copy() for name, x in arrays.items()}
    assert same(Dataset(**arrays).check(), sound)
    assert all(np.array_equal(x, kept[name], equal_nan=True) for name, x in arrays.items())


def test_info_must_be_what_json_can_hold():
    sound = Dataset.from_episodes(episodes())
    for bad in ({1, 2}, 1j, b"x"):
        with pytest.raises(ValueError, match="info cannot be kept as JSON"):
            dataclasses.replace(sound, info={"bad": bad})
