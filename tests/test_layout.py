"""The ways to lay out a dataset that scripts share, each on a few steps that can be checked by hand."""

from types import SimpleNamespace

import pytest
import torch

import data
from data import layout


def by_hand(actions=None):
    """Four episodes of 1, 3, 1 and 2 steps, two agents: observations count the rows, and agent 1's are negative."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    count = torch.tensor([[0, 1, 0, 0], [2, 3, 4, 5], [6, 7, 0, 0], [8, 9, 10, 0]]).float()
    reward = torch.tensor([[1, 0, 0], [2, 3, 4], [5, 0, 0], [6, 7, 0]]).float()
    seen = torch.cat([torch.ones(4, 1, dtype=torch.bool), mask], 1)
    terminated = torch.zeros(4, 3, dtype=torch.bool)
    terminated[0, 0] = terminated[1, 2] = True
    avail = seen[..., None, None].expand(4, 4, 2, 3).clone()
    if actions is None:
        actions = torch.tensor([[[1, 2], [0, 0], [0, 0]], [[0, 1], [2, 0], [1, 1]], [[2, 2], [0, 0], [0, 0]],
                                [[0, 2], [1, 0], [0, 0]]])  # fmt: skip
    obs = torch.stack([count, -count], -1)[..., None]
    avail = None if actions.is_floating_point() else avail
    return data.Dataset(obs, 10 * count[..., None], avail, actions, reward, terminated, mask).check()


STARTS = [0, 2, 3, 4, 6, 8, 9]  # the rows of `by_hand` where a step begins


@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_rows_by_hand(dtype, blank):
    found, R = layout.rows(by_hand(), dtype, blank), 11 + blank
    assert found["start"].tolist() == STARTS
    assert found["obs"][:11].tolist() == [[[row], [-row]] for row in range(11)]
    assert found["state"][:11].tolist() == [[10 * row] for row in range(11)]
    assert found["first"].int().tolist() == [1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 1][:R]
    assert found["acted"].tolist() == [1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0][:R]
    assert found["done"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0][:R]  # a time limit is not the end
    assert found["reward"].tolist() == [1, 0, 2, 3, 4, 0, 5, 0, 6, 7, 0, 0][:R]
    assert found["actions"][STARTS].tolist() == [[1, 2], [0, 1], [2, 0], [1, 1], [2, 2], [0, 2], [1, 0]]
    assert not found["actions"][found["acted"] == 0].any() and found["actions"].dtype == torch.int64
    assert found["avail_actions"].dtype == found["first"].dtype == torch.bool and found["avail_actions"].all()
    for name in ("obs", "state", "reward", "done", "acted"):
        assert len(found[name]) == R and found[name].dtype == (dtype or torch.float32)
    if blank:  # what a network sees in it is finite and legal
        assert (found["obs"][-1] == 1).all() and (found["state"][-1] == 1).all()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_rows_of_continuous_actions(dtype):
    actions = torch.linspace(-1, 1, 48).view(4, 3, 2, 2)
    dataset = by_hand(actions)
    found = layout.rows(dataset, dtype, blank=True)
    assert found["avail_actions"] is None
    assert found["actions"].shape == (12, 2, 2) and found["actions"].dtype == (dtype or torch.float32)
    assert torch.equal(found["actions"][STARTS].float(), actions[dataset.mask])
    assert not found["actions"][found["acted"] == 0].any()


def test_rows_have_the_precision_of_the_script(float64):
    assert layout.rows(by_hand())["obs"].dtype == torch.float64
    assert layout.rows(by_hand(), torch.float32)["obs"].dtype == torch.float32


def test_pairs():
    found = layout.pairs(torch.tensor(STARTS))
    assert found.tolist() == [[0, 1], [2, 3], [3, 4], [4, 5], [6, 7], [8, 9], [9, 10]]


def test_windows_lie_inside_episodes():
    lengths = by_hand().lengths
    assert layout.windows(lengths, 1).tolist() == list(range(11))
    assert layout.windows(lengths, 2).tolist() == STARTS
    assert layout.windows(lengths, 3).tolist() == [2, 3, 8]  # the last row may be what was seen after the last step
    assert layout.windows(lengths, 4).tolist() == [2]
    assert layout.windows(lengths, 5).tolist() == []


@pytest.mark.parametrize("kind", ["typical", "equal", "single", "one long"])
def test_pack_lays_every_episode_down_once(kind):
    g = torch.Generator().manual_seed(0)
    lengths = {
        "typical": torch.randint(20, 61, (300,), generator=g), "equal": torch.full((7,), 9),
        "single": torch.tensor([4]), "one long": torch.tensor([2, 3, 2, 100, 3, 2]),
    }[kind]  # fmt: skip
    total = lengths.sum().item()
    sequences = layout.pack(lengths, total).tolist()
    assert {len(sequence) for sequence in sequences} == {lengths.max().item()}
    pieces = []
    for sequence in sequences:
        real = [row for row in sequence if row < total]
        assert sequence == real + [total] * (len(sequence) - len(real))  # padding stands behind everything else
        pieces.append(real)
    assert sorted(sum(pieces, [])) == list(range(total))
    for begin, length in zip((lengths.cumsum(0) - lengths).tolist(), lengths.tolist()):
        (home,) = [piece for piece in pieces if begin in piece]
        at = home.index(begin)
        assert home[at : at + length] == list(range(begin, begin + length))
    padding = 1 - total / (len(sequences) * len(sequences[0]))
    assert padding <= {"typical": 0.15, "equal": 0, "single": 0, "one long": 0.45}[kind]


def test_pack_by_hand():
    found = layout.pack(by_hand().lengths + 1, 11)  # an episode's rows, and the blank one
    assert found.tolist() == [[2, 3, 4, 5], [8, 9, 10, 11], [6, 7, 0, 1]]


def test_age():
    since, left = layout.age(by_hand().lengths)
    assert since.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert left.tolist() == [1, 0, 3, 2, 1, 0, 1, 0, 2, 1, 0]


def test_hold_back():
    lengths = torch.tensor([1, 3, 1, 1, 2] * 4)  # 20 episodes, 32 steps
    begin = (layout.age(lengths)[1] > 0).nonzero()[:, 0]
    episode = torch.arange(20).repeat_interleave(lengths)
    for share, apart in ((0.1, 10), (0.25, 4), (0.9, 2)):
        assert torch.equal(layout.hold_back(share, begin, lengths), episode % apart == 0)
    assert torch.equal(layout.hold_back(0.5, begin, lengths, most=4), episode % 8 == 0)  # 4 of 32 steps
    assert layout.hold_back(0.0, begin, lengths) is None
    assert layout.hold_back(0.5, torch.arange(3), torch.tensor([3])) is None  # a single episode


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_togo(dtype):
    dataset = by_hand()
    found = layout.togo(dataset, 0.5, dtype)
    assert found.dtype == (dtype or torch.float32)
    assert found.tolist() == [1, 2 + 1.5 + 1, 3 + 2, 4, 5, 6 + 3.5, 7]
    dataset.reward[~dataset.mask] = 99  # what lies behind an episode does not count
    assert torch.equal(layout.togo(dataset, 0.5, dtype), found)
    first = torch.tensor([0, 1, 4, 5])  # each episode's first step
    assert torch.equal(layout.togo(by_hand(), 1.0)[first], by_hand().returns)


def test_last_actions():
    found = layout.rows(by_hand(), blank=True)
    last = layout.last_actions(found["actions"], found["first"])
    none = [-1, -1]
    assert last.dtype == torch.int64
    assert last.tolist() == [none, [1, 2], none, [0, 1], [2, 0], [1, 1], none, [2, 2], none, [0, 2], [1, 0], none]


def test_a_central_players_actions_are_numbers_with_a_digit_for_each_agent():
    action, avail = torch.tensor([[1, 0, 2]]), torch.ones(1, 3, 3).bool()
    index = layout.join(action, avail, 1)
    assert index.tolist() == [[1 * 9 + 0 * 3 + 2]] and torch.equal(layout.split(index, avail, 3), action)
    some = torch.tensor([[[True, False], [True, True]]])
    assert layout.joint_avail(some, 1).tolist() == [[[True, True, False, False]]]
    assert torch.equal(layout.join(action, avail, 3), action) and torch.equal(layout.split(action, avail, 3), action)
    assert torch.equal(layout.joint_avail(some, 2), some)


def test_a_central_players_action_has_the_entries_of_all_agents():
    action = torch.arange(12.0).view(2, 3, 2)  # (..., N, A)
    for K in (1, 3):
        joint = layout.join(action, None, K)
        assert torch.equal(joint, action.view(2, K, -1)) and torch.equal(layout.split(joint, None, 3), action)
    assert layout.joint_avail(None, 1) is None


def test_units(float64):
    x = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 7, 0.0]) + 4
    mean, std = layout.units(x)
    assert mean.shape == std.shape == (2, 3) and (std[:, 2] == 1e-3).all()  # a constant entry does not become NaN
    scaled = (x - mean) / std
    assert torch.allclose(scaled.mean(0), torch.zeros(2, 3), atol=1e-12)
    assert torch.allclose(scaled.std(0)[:, :2], torch.ones(2, 2)) and not scaled[..., 2].any()


def test_inputs_are_cells_or_units_or_what_was_seen(float64):
    x = torch.tensor([[[0.0, 5], [4, 1]], [[2, 5], [0, 3]], [[4, 5], [2, 5]]])  # (R, N, O)

    def how(one_hot, normalize):
        return layout.inputs(x, SimpleNamespace(one_hot=one_hot, normalize=normalize))

    seen, unit = torch.tensor([[3.0, 5], [2, 6]]), (8 / 3) ** 0.5  # the deviation of 0, 2, 4, over R
    assert torch.equal(how(False, False)(seen.float()), seen)
    assert torch.allclose(how(False, True)(seen), torch.tensor([[1 / unit, 0], [0, 3 / unit]]))
    assert how(True, True)(seen).tolist() == [[0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0]]  # of 0, 2, 4 and 1, 3, 5


def test_one_hot():
    x = torch.tensor([[0, 5, 1], [2, 5, -1], [0, 5, 0]])
    cells = layout.one_hot(x)
    assert cells(x).tolist() == [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0]]  # 5 never changes
    assert cells(torch.tensor([7, 5, 0.5])).tolist() == [0] * 5  # values that no row holds
    assert cells(x.view(3, 1, 3).double()).shape == (3, 1, 5) and cells(x).dtype == torch.float32
    with pytest.raises(ValueError, match="^--one-hot needs whole numbers as observations: add --no-one-hot$"):
        layout.one_hot(x / 2)
    for x, inputs in ((x[:1], 0), (torch.arange(1001)[:, None], 1001)):
        with pytest.raises(ValueError, match=f"^--one-hot would make {inputs} inputs; it is for small grids: add"):
            layout.one_hot(x)


def test_one_hot_has_the_precision_of_the_script(float64):
    assert layout.one_hot(torch.tensor([[0.0], [1.0]]))(torch.zeros(1)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distinct_columns(dtype):
    """Two agents that share what they see; the second one's view is shorter, and one entry is in no state."""
    a, b, c = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    zero = torch.zeros_like(a)
    state = torch.stack([a, zero, b, a], 1)  # an entry that is always 0, and one that stands twice
    obs = torch.stack([torch.stack([b, a, c], 1), torch.stack([c, b, b], 1)], 1)  # (R, N, O)
    found, columns, whole = layout.distinct_columns(state, obs)
    assert torch.equal(found, torch.stack([a, zero, b, c], 1)) and found.is_contiguous()
    assert whole.tolist() == [0, 1, 2, 0] and columns.tolist() == [[2, 0, 3], [3, 2, 2]]

    short = torch.cat([obs, torch.stack([b, zero], 1)[..., None]], 2)  # the state's own 0 also fills up views
    found, columns, _ = layout.distinct_columns(state, short)
    assert columns.tolist() == [[2, 0, 3, 2], [3, 2, 2, 1]] and found.shape == (6, 4)
    found, columns, whole = layout.distinct_columns(state[:, [0, 2]], short)  # without it the filling is no column
    assert torch.equal(found, torch.stack([a, b, c], 1)) and whole.tolist() == [0, 1]
    assert columns.tolist() == [[1, 0, 2, 1], [2, 1, 1, 3]]
    padded = torch.nn.functional.pad(found, (0, 1))
    assert torch.equal(padded[:, columns], short) and torch.equal(padded[:, whole], state[:, [0, 2]])
