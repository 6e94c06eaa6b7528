"""Ways to lay out a `Dataset` as tensors that training scripts share; no gradient.

Shapes: E episodes, R rows (observations, an episode's one more than its steps), M steps, Q
sequences, L rows of a sequence, N agents, A actions (or entries of an action), O observation, D
state, I inputs.
"""

import torch
import torch.nn.functional as F

from data.dataset import seen


# ---------------------------------------------------------------- rows
def rows(dataset, dtype=None, blank=False):
    """The dataset as R rows, one for each observation, episodes end to end.

    Args:
        dtype: of all numbers but whole ones; by default torch's own.
        blank: add a row at the end that belongs to no episode, for padding: obs, state and
            avail_actions are 1, no step begins there, and `first` holds, as no episode goes on.
    Returns:
        A dictionary: obs (R, N, O), state (R, D), avail_actions (R, N, A) or None; of the step that
        begins in a row actions (R, N) or (R, N, A), reward, done and acted (R,), 0 where none does,
        which is in an episode's last row; first (R,) bool where an episode begins; start (M,) the
        rows where a step begins.
    """
    dtype = dtype or torch.get_default_dtype()
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


def togo(dataset, gamma, dtype=None):
    """What the rest of its episode was worth at each step, discounted by gamma: (M,)."""
    reward = dataset.reward.to(dtype or torch.get_default_dtype())
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
    return spread, whole and len(dataset.obs.unique()) <= 20


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


# ---------------------------------------------------------------- what single scripts use
def windows(lengths, length):
    """The first rows of all windows of `length` successive rows of one episode: lengths (E,), in steps -> (W,)."""
    _, left = age(lengths)
    return (left >= length - 1).nonzero()[:, 0]


def hold_back(share, begin, lengths, most=5000):
    """Choose episodes, evenly spread over the data, for judging what was learned from the others.

    Args:
        share: of the episodes, less where that would be more than `most` sequences.
        begin: (Q,) the row with which each sequence, or step, begins.
        lengths: (E,) of the episodes, in steps.
    Returns:
        (Q,) bool, the sequences that begin in these episodes; None if there are too few to spare one.
    """
    episode = episodes(lengths)[begin]  # (Q,)
    found = episode.unique()
    if share == 0 or len(found) < 2:
        return None
    return torch.isin(episode, found[:: max(2, round(1 / min(share, most / len(begin))))])


def hold_out(share, start, lengths, generator):
    """Choose whole episodes at random: (M,) bool, the steps, by their rows start (M,), of a share of the episodes.

    At least one episode and never all, so none where there is one; none if the share is 0.
    """
    E = len(lengths)
    count = min(E - 1, max(1, round(share * E))) if share else 0
    chosen = torch.randperm(E, generator=generator)[:count].to(start.device)
    return torch.isin(episodes(lengths)[start], chosen)


class Judge:
    """Held-back episodes by which cloning is judged, every 250 updates: each seed keeps its likeliest models, and is
    done when 1,000 updates brought no better ones.

    Attributes:
        held, rest: (Q, ...) the sequences, or steps, to judge by and to learn from.
    """

    def __init__(self, chosen, sequences, last):
        self.held, self.rest, self.last, self.kept = (
            sequences[chosen],
            sequences[~chosen],
            last,
            None,
        )

    @torch.no_grad()
    def over(self, step, moved, loss):
        """After update `step` of the parameters `moved` (S, ...), `last` at most: whether all seeds are done. If so,
        each has its likeliest models back. loss: function without arguments, which returns each seed's (S,)."""
        if step % 250 and step < self.last:
            return False
        found = loss()
        if self.kept is None:
            self.kept = [p.detach().clone() for p in moved]
            self.best, self.since = torch.full_like(found, torch.inf), torch.zeros_like(found)
        better = (found < self.best) & (self.since < 4)
        self.best, self.since = (
            torch.where(better, found, self.best),
            torch.where(better, 0, self.since + 1),
        )
        for old, new in zip(self.kept, moved):
            old[better] = new[better]
        over = step == self.last or bool((self.since >= 4).all())
        if over:
            torch._foreach_copy_(moved, self.kept)
        return over


def judge(args, sequences, lengths):
    """The `Judge` of what is cloned with `--hold-back` from sequences (Q, L) of rows, or steps (M,); or None."""
    chosen = hold_back(
        args.hold_back, sequences if sequences.dim() == 1 else sequences[:, 0], lengths
    )
    return None if chosen is None else Judge(chosen, sequences, args.clone_steps)


def joint_avail(avail, K):
    """What is available to the players: (..., N, A) bool, to the agents, -> (..., K, A^G); None stays None."""
    if avail is None:
        return None
    joint, *others = avail.unflatten(-2, (K, -1)).unbind(-2)  # (..., K, A) each
    for other in others:
        joint = (joint[..., None] & other[..., None, :]).flatten(-2)
    return joint


def join(action, avail, K):
    """The players' actions of the agents': (..., N) -> (..., K) or, if continuous, (..., N, A) -> (..., K, G A)."""
    if avail is None:
        return action.flatten(-2).unflatten(-1, (K, -1))
    digits = action.unflatten(-1, (K, -1))  # (..., K, G)
    return (
        digits * avail.shape[-1] ** torch.arange(digits.shape[-1], device=action.device).flip(0)
    ).sum(-1)


def split(action, avail, N):
    """The agents' actions of the players', `join` backwards: (..., K) -> (..., N) or (..., K, G A) -> (..., N, A)."""
    if avail is None:
        return action.flatten(-2).unflatten(-1, (N, -1))
    A, G = avail.shape[-1], N // action.shape[-1]
    return (action[..., None] // A ** torch.arange(G, device=action.device).flip(0) % A).flatten(-2)


def units(x):
    """The mean and the spread of each entry of x (R, ...), to measure it in; a spread is at least 1e-3."""
    std, mean = torch.std_mean(x, 0)
    return mean, std.clamp(min=1e-3)


def distinct_columns(state, obs):
    """Keep each distinct column of states (R, D) and views (R, N, O) once; views are made by picking columns.

    Returns:
        state: (R, D') the distinct columns, in the order in which they first stand in (state, obs).
        columns: (N, O) where each agent's view is found. Column D', which `state` lacks, is the 0 that fills up short
            views.
        whole: (D,) where the environment's own state is found.
    """
    _, N, O = obs.shape
    everything = torch.cat([state, obs.flatten(1)], 1)  # (R, C)
    _, group = torch.unique(everything, dim=1, return_inverse=True)
    C, device = len(group), obs.device
    first = torch.full((int(group.max()) + 1,), C, device=device)
    first = first.scatter_reduce(0, group, torch.arange(C, device=device), "amin")
    pad = (first >= C - N * O) & (everything == 0).all(0)[
        first
    ]  # fills up short views: no part of the world
    order = (first + C * pad).argsort()
    place = order.argsort()[group]  # (C,) where each column went; the padding, if any, is column D'
    state = everything[:, first[order[: len(order) - int(pad.sum())]]].contiguous()
    return state, place[C - N * O :].view(N, O), place[: C - N * O]
