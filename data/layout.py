"""Ways to lay out a `Dataset` as tensors that training scripts share; no gradient.

Shapes: E episodes, R rows (observations, an episode's one more than its steps), M steps, Q
sequences, L rows of a sequence, N agents, A actions (or entries of an action), O observation, D
state, I inputs.
"""

import torch
import torch.nn.functional as F

from data.dataset import seen


# ---------------------------------------------------------------- rows
def rows(dataset, blank=False):
    """The dataset as R rows, one for each observation, episodes end to end.

    Args:
        blank: add a row at the end that belongs to no episode, for padding: obs, state and
            avail_actions are 1, no step begins there, and `first` holds, as no episode goes on.
    Returns:
        A dictionary: obs (R, N, O), state (R, D), avail_actions (R, N, A) or None; of the step that
        begins in a row actions (R, N) or (R, N, A), reward, done and acted (R,), 0 where none does,
        which is in an episode's last row; first (R,) bool where an episode begins; start (M,) the
        rows where a step begins.
    """
    dtype = torch.get_default_dtype()
    there = seen(dataset.mask)  # (E, T+1)
    start = F.pad(dataset.mask, (0, 1))[there].nonzero()[:, 0]

    def observed(x):
        x = x[there]
        return torch.cat([x, torch.ones_like(x[:1])]) if blank else x

    def stepped(x):
        steps = x[dataset.mask]  # (M, ...)
        return steps.new_zeros(R, *steps.shape[1:]).index_copy_(0, start, steps)

    obs = observed(dataset.obs.to(dtype))
    R, avail, actions = len(obs), dataset.avail_actions, dataset.actions
    acted = stepped(torch.ones_like(dataset.reward, dtype=dtype))
    return {
        "obs": obs,
        "state": observed(dataset.state.to(dtype)),
        "avail_actions": None if avail is None else observed(avail),
        "actions": stepped(actions.to(dtype) if actions.is_floating_point() else actions),
        "reward": stepped(dataset.reward.to(dtype)),
        "done": stepped(dataset.terminated.to(dtype)),
        "acted": acted,
        "first": torch.cat([start.new_ones(1), 1 - acted[:-1]]).bool(),
        "start": start,
    }


def episodes(lengths):
    """The number of each row's episode: lengths (E,), in steps -> (R,)."""
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths + 1)


def age(lengths):
    """The steps since each row's episode began, and those to come: lengths (E,) -> (R,), (R,)."""
    begin = (lengths + 1).cumsum(0) - lengths - 1  # (E,) each episode's first row
    episode = episodes(lengths)  # (R,)
    since = torch.arange(len(episode), device=lengths.device) - begin[episode]
    return since, lengths[episode] - since


def togo(dataset, gamma):
    """What the rest of its episode was worth at each step, discounted by gamma: (M,)."""
    reward = dataset.reward.to(torch.get_default_dtype())
    worth = torch.zeros_like(reward)
    later = torch.zeros_like(reward[:, 0])  # (E,)
    for t in reversed(range(reward.shape[1])):
        later = (reward[:, t] + gamma * later) * dataset.mask[:, t]
        worth[:, t] = later
    return worth[dataset.mask]


def last_actions(actions, first):
    """What everybody did before, -1 for none: actions (R, N), first (R,) bool -> (R, N)."""
    return torch.where(first[:, None], -1, actions.roll(1, 0))


# ---------------------------------------------------------------- sequences of rows
def pairs(start):
    """The rows that each step leads from and to: start (M,) -> (M, 2)."""
    return torch.stack([start, start + 1], 1)


def pack(lengths, empty):
    """Lay whole episodes of `lengths` (E,) rows end to end in sequences: (Q, L) row numbers.

    L is the longest episode's length. Each sequence takes the longest episode that is left, then
    the shortest ones as long as they fit. So little is padding (the row `empty`), and every
    update has the same shape.
    """
    begin = lengths.cumsum(0) - lengths
    waiting = sorted(zip(lengths.tolist(), begin.tolist()))
    longest, sequences = waiting[-1][0], []
    while waiting:
        length, start = waiting.pop()
        sequence = [*range(start, start + length)]
        while waiting and len(sequence) + waiting[0][0] <= longest:
            length, start = waiting.pop(0)
            sequence.extend(range(start, start + length))
        sequences.append(sequence + [empty] * (longest - len(sequence)))
    return torch.tensor(sequences, device=lengths.device)


def teams(dataset, args, whole=True):
    """What teams of discrete actions, with a memory or without, learn from, and how to see a game.

    Args:
        whole: sequences are whole episodes end to end, padded (`pack`); else each step's two rows.
    Returns:
        Nine tensors: obs (R, N, I), with `args.recurrent` everybody's last action behind it;
        state (R, D); avail_actions, actions, reward, done, acted and first as in `rows`, the last
        row blank; sequences (Q, L) of row numbers. The function that turns observations (..., N,
        O) and last actions, one-hot (..., N, A), 0 for none, into obs.
    """
    table = rows(dataset, blank=True)
    recurrent = getattr(args, "recurrent", False)
    see, see_state = inputs(table["obs"][:-1], args), inputs(table["state"][:-1], args)

    def encode(obs, last):
        return torch.cat([see(obs), last], -1) if recurrent else see(obs)

    A, R = table["avail_actions"].shape[-1], len(table["obs"])
    last = last_actions(table["actions"], table["first"])
    last = F.one_hot(last + 1, A + 1)[..., 1:].to(torch.get_default_dtype())  # (R, N, A)
    sequences = pack(dataset.lengths + 1, R - 1) if whole else pairs(table["start"])
    names = "avail_actions", "actions", "reward", "done", "acted", "first"
    seen_so = encode(table["obs"], last), see_state(table["state"])
    return (*seen_so, *(table[name] for name in names), sequences), encode


# ---------------------------------------------------------------- inputs
def scales(dataset):
    """The spread of the returns, or 1 for none; whether views and states are cells of a grid."""
    spread = dataset.returns.std(correction=0).item() or 1.0
    whole = all(bool((x == x.round()).all()) for x in (dataset.obs, dataset.state))
    return spread, whole and 1 < len(dataset.obs.unique()) <= 20


def inputs(x, args, correction=0):
    """The function that turns observations (..., D) into a network's inputs.

    They are one-hot with `args.one_hot`, measured in units of what was recorded, x (R, D) or
    (R, N, D), with `args.normalize`, else as they are. What a script does not have of these is off.

    Args:
        correction: as in torch.std, for the spread.
    """
    if getattr(args, "one_hot", False):
        return one_hot(x.flatten(0, -2))
    dtype = torch.get_default_dtype()
    if not getattr(args, "normalize", False):
        return lambda raw: raw.to(dtype)
    std, mean = torch.std_mean(x, 0, correction=correction)
    return lambda raw: (raw.to(dtype) - mean) / std.clamp(min=1e-3)


def one_hot(x):
    """A function (..., D) -> (..., I) with a column for each value that an entry of x (R, D) takes.

    An entry that never changes gets none, and a value that x does not hold becomes zeros.
    """
    if (x != x.round()).any():
        raise ValueError("--one-hot needs whole numbers as observations: add --no-one-hot")
    cells = []  # (entry, value)
    for entry, column in enumerate(x.T):
        values = column.unique().tolist()
        if len(values) > 1:
            cells += [(entry, value) for value in values]
    if not 0 < len(cells) <= 1000:
        reason = f"--one-hot would make {len(cells)} inputs; it is for small grids"
        raise ValueError(f"{reason}: add --no-one-hot")
    entries, values = torch.tensor(cells, device=x.device).T
    entries = entries.long()
    return lambda raw: (raw[..., entries] == values).to(torch.get_default_dtype())
