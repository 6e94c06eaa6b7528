"""The ways to lay out a dataset that scripts share, each on a few steps checked by hand."""

from types import SimpleNamespace

import pytest
import torch

import data
from data import layout

STARTS = [0, 2, 3, 4, 6, 8, 9]  # the rows of `by_hand` where a step begins
STEPS = [[1, 2], [0, 1], [2, 0], [1, 1], [2, 2], [0, 2], [1, 0]]  # what the agents do there


def by_hand(actions=None):
    """Episodes of 1, 3, 1 and 2 steps, two agents: observations count the rows, agent 1's back."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    count = torch.tensor([[0, 1, 0, 0], [2, 3, 4, 5], [6, 7, 0, 0], [8, 9, 10, 0]]).float()
    reward = torch.tensor([[1, 0, 0], [2, 3, 4], [5, 0, 0], [6, 7, 0]]).float()
    terminated = torch.zeros(4, 3, dtype=torch.bool)
    terminated[0, 0] = terminated[1, 2] = True
    avail = None
    if actions is None:
        avail = torch.ones(4, 4, 2, 3)
        actions = torch.zeros(4, 3, 2, dtype=torch.int64)
        actions[mask] = torch.tensor(STEPS)
    obs = torch.stack([count, -count], -1)[..., None]
    state = 10 * count[..., None]
    return data.Dataset(obs, state, avail, actions, reward, terminated, mask).check()


@pytest.mark.parametrize("blank", [False, True])
def test_rows_by_hand(blank):
    found, R = layout.rows(by_hand(), blank), 11 + blank
    assert found["start"].tolist() == STARTS
    assert found["obs"][:11].tolist() == [[[row], [-row]] for row in range(11)]
    assert found["state"][:11].tolist() == [[10 * row] for row in range(11)]
    assert found["first"].int().tolist() == [1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 1][:R]
    assert found["acted"].tolist() == [1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0][:R]
    assert found["done"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0][:R]  # no time limit
    assert found["reward"].tolist() == [1, 0, 2, 3, 4, 0, 5, 0, 6, 7, 0, 0][:R]
    assert found["actions"][STARTS].tolist() == STEPS
    assert not found["actions"][found["acted"] == 0].any() and found["avail_actions"].all()
    if blank:  # what a network sees in it is finite and legal
        assert (found["obs"][-1] == 1).all() and (found["state"][-1] == 1).all()


def test_rows_of_continuous_actions(float64):
    actions = torch.linspace(-1, 1, 48).view(4, 3, 2, 2)
    dataset = by_hand(actions)
    found = layout.rows(dataset, blank=True)
    assert found["avail_actions"] is None
    assert torch.equal(found["actions"][STARTS].float(), actions[dataset.mask].float())
    assert not found["actions"][found["acted"] == 0].any() and len(found["actions"]) == 12
    for name in ("obs", "state", "actions", "reward", "done", "acted"):
        assert found[name].dtype == torch.float64


def test_pairs_episodes_and_ages():
    pairs = layout.pairs(torch.tensor(STARTS))
    assert pairs.tolist() == [[0, 1], [2, 3], [3, 4], [4, 5], [6, 7], [8, 9], [9, 10]]
    lengths = by_hand().lengths
    assert layout.episodes(lengths).tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3]
    since, left = layout.age(lengths)
    assert since.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert left.tolist() == [1, 0, 3, 2, 1, 0, 1, 0, 2, 1, 0]


def test_pack_lays_every_episode_down_once():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 61, (300,), generator=generator)
    total = lengths.sum().item()
    sequences = layout.pack(lengths, total)
    assert sequences.shape[1] == lengths.max() and (sequences == total).double().mean() <= 0.15
    assert sequences[sequences < total].sort().values.tolist() == list(range(total))
    begins = set((lengths.cumsum(0) - lengths).tolist())
    for row, following in sequences.unfold(1, 2, 1).flatten(0, 1).tolist():
        if following != row + 1:  # only whole episodes end, and padding follows them all
            assert row == total or row + 1 in begins | {total}
            assert following == total or following in begins and row != total


def test_pack_by_hand():
    found = layout.pack(by_hand().lengths + 1, 11)  # an episode's rows, and the blank one
    assert found.tolist() == [[2, 3, 4, 5], [8, 9, 10, 11], [6, 7, 0, 1]]


def test_togo():
    dataset = by_hand()
    found = layout.togo(dataset, 0.5)
    assert found.tolist() == [1, 2 + 1.5 + 1, 3 + 2, 4, 5, 6 + 3.5, 7]
    dataset.reward[~dataset.mask] = 99  # what lies behind an episode does not count
    assert torch.equal(layout.togo(dataset, 0.5), found)


@pytest.mark.parametrize("recurrent", [False, True])
def test_what_teams_learn_from(recurrent):
    dataset, args = by_hand(), SimpleNamespace(recurrent=recurrent, normalize=True)
    (obs, state, *others, sequences), encode = layout.teams(dataset, args, whole=recurrent)
    table = layout.rows(dataset, blank=True)
    unit = torch.arange(11.0).std(correction=0)
    assert torch.allclose(obs[:11, 0, 0], (torch.arange(11) - 5) / unit)
    assert torch.allclose(state[:11, 0], (torch.arange(11) - 5) / unit)
    names = ("avail_actions", "actions", "reward", "done", "acted", "first")
    for name, found in zip(names, others, strict=True):
        assert torch.equal(found, table[name])
    wanted = layout.pack(dataset.lengths + 1, 11) if recurrent else layout.pairs(table["start"])
    assert torch.equal(sequences, wanted)
    last = torch.zeros(12, 2, 3)
    for row in STARTS:  # what was done there stands in the next row
        if not table["first"][row + 1]:
            last[row + 1] = torch.eye(3)[table["actions"][row]]
    assert torch.equal(encode(table["obs"], last), obs)
    if recurrent:
        assert torch.equal(obs[..., 1:], last)


def test_inputs_are_cells_or_units_or_what_was_seen(float64):
    x = torch.tensor([[[0.0, 5], [4, 1]], [[2, 5], [0, 3]], [[4, 5], [2, 5]]])  # (R, N, O)

    def how(one_hot, normalize):
        return layout.inputs(x, SimpleNamespace(one_hot=one_hot, normalize=normalize))

    seen = torch.tensor([[3.0, 5], [2, 6]])
    unit = (8 / 3) ** 0.5  # the deviation of 0, 2, 4, over R
    assert torch.equal(how(False, False)(seen.float()), seen)
    assert torch.allclose(how(False, True)(seen), torch.tensor([[1 / unit, 0], [0, 3 / unit]]))
    assert how(True, True)(seen).tolist() == [[0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0]]
    wide = layout.inputs(x, SimpleNamespace(normalize=True), correction=1)
    assert torch.allclose(wide(seen)[0, 0], torch.tensor(0.5))


def test_one_hot():
    x = torch.tensor([[0, 5, 1], [2, 5, -1], [0, 5, 0]])
    cells = layout.one_hot(x)  # 5 never changes
    assert cells(x).tolist() == [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0]]
    assert cells(torch.tensor([7, 5, 0.5])).tolist() == [0] * 5  # values that no row holds
    assert cells(x.view(3, 1, 3).double()).shape == (3, 1, 5)
    with pytest.raises(ValueError, match="--one-hot needs whole numbers"):
        layout.one_hot(x / 2)
    with pytest.raises(ValueError, match="would make 1001 inputs"):
        layout.one_hot(torch.arange(1001)[:, None])


def test_scales():
    dataset = by_hand()
    spread = torch.tensor([1.0, 9, 5, 13]).std(correction=0)
    assert layout.scales(dataset) == (spread.item(), False)  # 21 values
    dataset.obs = dataset.obs.abs()
    assert layout.scales(dataset)[1]
    dataset.state = dataset.state + 0.5
    dataset.reward[:] = 0
    assert layout.scales(dataset) == (1.0, False)
