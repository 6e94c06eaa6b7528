"""Bringing data: lists of episodes, replay buffers, and arrays of any kind."""

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
        legal = rng.random((L + 1, N, A)) < 0.5
        actions = rng.integers(0, A, (L, N))
        np.put_along_axis(legal[:L], actions[..., None], True, -1)
        legal[..., A - 1] = True
        episode = {"obs": rng.normal(size=(L + 1, N, O)), "state": rng.normal(size=(L + 1, D))}
        episode |= {"avail_actions": legal, "actions": actions, "reward": rng.normal(size=L)}
        episode["terminated"] = (np.arange(L) == L - 1) & fell
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
    for e in range(len(LENGTHS)):
        for name, tensor in found.tensors().items():
            if name != "mask":
                wanted = torch.as_tensor(given[e][name]).to(tensor.dtype)
                assert torch.equal(tensor[e, : len(wanted)], wanted), name
                assert not tensor[e, len(wanted) :].any()


KINDS = {
    "backwards": lambda x: x[::-1].copy()[::-1],
    "read only": lambda x: np.lib.stride_tricks.as_strided(x, writeable=False),
    "lists": lambda x: x.tolist(),
    "tensors": torch.as_tensor,
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_number_will_do(kind):
    given, cast = episodes(), KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch dislikes arrays that cannot be written
        changed = [{name: cast(x) for name, x in episode.items()} for episode in given]
        assert same(Dataset.from_episodes(changed), Dataset.from_episodes(given))


def test_what_is_left_out_is_filled_in():
    given = Dataset.from_episodes(episodes())
    bare = []
    for episode, fell in zip(episodes(), FALLS):
        part = {name: episode[name] for name in ("obs", "actions", "reward")}
        bare.append(part | {"terminated": fell})  # a word on the last step
    found = Dataset.from_episodes(bare)
    assert same(found, given, ("obs", "actions", "reward", "terminated", "mask"))
    assert torch.equal(found.state, found.obs.flatten(2))
    seen = torch.nn.functional.pad(found.mask, (1, 0), value=True)
    assert torch.equal(found.avail_actions, seen[..., None, None].expand(4, 7, N, A))
    assert Dataset.from_episodes(bare, num_actions=9).avail_actions.shape[-1] == 9


def test_rewards_of_agents_are_added_up_or_averaged():
    given, plain = episodes(), Dataset.from_episodes(episodes())
    for episode in given:
        episode["reward"] = episode["reward"][:, None] * [1, 2, 6]
    total, mean = Dataset.from_episodes(given), Dataset.from_episodes(given, team_reward="mean")
    assert torch.allclose(total.reward, 9 * plain.reward)
    assert torch.allclose(mean.reward, 3 * plain.reward)
    assert total.info == {"team_reward": "sum"} and mean.info == {"team_reward": "mean"}


UNFIT = {  # how episode 1, of 6 steps, is changed
    "obs has 6 rows for 6 steps: append": lambda e: e.update(obs=e["obs"][:-1]),
    "obs is no array of numbers": lambda e: e.update(obs=[[1, 2], [3]]),
    "reward has the shape": lambda e: e.update(reward=e["reward"][1:]),
    "terminated must hold 0 and 1": lambda e: e.update(terminated=0.5),
    "it lacks reward": lambda e: e.pop("reward"),
}


@pytest.mark.parametrize("said", UNFIT)
def test_an_episode_that_does_not_fit_is_refused(said):
    given = episodes()
    UNFIT[said](given[1])
    with pytest.raises(ValueError, match=f"^episode 1: {said}"):
        Dataset.from_episodes(given)


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
    ends = np.zeros(sum(LENGTHS), bool)
    ends[np.cumsum(LENGTHS) - 1] = True
    return arrays, ends


@pytest.mark.parametrize("continuous", [False, True])
def test_transitions_become_the_same_dataset(continuous):
    given = episodes(continuous)
    arrays, ends = buffer(given)
    wanted = Dataset.from_episodes(given, name="mine")
    found = Dataset.from_transitions(arrays, ends, name="mine")
    assert same(found, wanted) and found.info == wanted.info
    ends[-1] = False  # what follows the last end was cut off, as it was
    assert same(Dataset.from_transitions(arrays, ends), wanted)


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


def test_steps_that_are_not_in_order_are_refused():
    arrays, ends = buffer(episodes())
    ends[2] = False
    with pytest.raises(ValueError, match="next_obs of step 2 is not obs of step 3"):
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
