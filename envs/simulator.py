"""The true world beside a learned one: a game that is put into any state in its place, and how far it is off."""

import torch
from gymnasium.spaces import Box


def simulator(game, shape, whole, columns):
    """What MOMA-PPO's model predicts, as the game has it.

    The game is put into each state anew, so that it needs no record of how it came there. An ant's reward was up to
    0.05 off then in 200 recorded steps, as MuJoCo's places lag a little behind.

    Args:
        game: a game of one step, or one that has `set_state`; its batch is S times B games.
        shape: (S, B).
        whole, columns: where in our states (..., D) the environment's own (D',) and the agents' views (N, O) are found,
            as `data.layout.distinct_columns` returns them.
    Returns:
        A function of states (S, B, D) and joint actions (S, B, N A), one-hot where they are discrete, which returns the
        next states, the rewards, where the game ends, and that all this is sure (S, B). What else it is given, which
        member of an ensemble to ask and its noise, it does not need.
    Raises:
        ValueError: the game can do neither.
    """
    set_state = getattr(game, "set_state", None)
    if set_state is None and game.time_limit > 1 or getattr(game, "hidden", 0):
        raise ValueError("this game cannot be put into a state: --simulator is for matrix, polynomial, reacher and ant")
    continuous, place = isinstance(game.single_action_space, Box), torch.cat([whole, columns.flatten()])
    sure = torch.ones(shape, dtype=torch.bool, device=whole.device)

    @torch.no_grad()
    def step(state, action, member=None, noise=None):
        game.reset() if set_state is None else set_state(state[..., whole].flatten(0, 1))
        action = action.flatten(0, 1).unflatten(-1, (game.num_agents, -1))  # (S B, N, A)
        obs, reward, end, _, info = game.step(action.float() if continuous else action.argmax(-1))
        found = state.new_empty(len(obs), state.shape[-1] + 1)  # the last column fills up short views
        found[:, place] = torch.cat([info["state"], obs.flatten(1)], 1).to(state.dtype)
        return found[:, :-1].view_as(state), reward.to(state.dtype).view(shape), end.view(shape), sure

    return step


@torch.no_grad()
def open_loop(world, shape, state, action, rows, left, k, most=500):
    """The error of models' states after 1..k steps of recorded actions, in units of the entries' spread.

    Args:
        world: U models: a function of states (U, B, D) and joint actions (U, B, X) whose result has the next `state`.
        shape: (S, U / S), for how many seeds they are, and how many for each.
        state, action: (R, D) and (R, X), as they were recorded.
        rows, left: (M,) those in which to begin, and how many steps are to come there.
        k: the most steps; fewer where no row has so many to come.
        most: of the rows that have k steps to come, it takes at most so many, evenly spaced.
    Returns:
        The root mean square over starts, a seed's models and entries that vary, (S, k), and if nothing moved, (k,).
    """
    (S, n), k = shape, min(k, int(left.max()))
    rows = rows[left >= k]
    rows = rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), device=rows.device).long()]  # (B,)
    spread, errors, still = state.std(0, correction=0), [], []
    vary, begin, now = spread > 0, state[rows], state[rows].expand(S * n, -1, -1)
    for t in range(k):
        now, true = world(now, action[rows + t].expand(S * n, -1, -1)).state, state[rows + t + 1]
        error, stayed = (((x - true) / spread.clamp(min=1e-8))[..., vary] ** 2 for x in (now, begin))
        errors.append(error.view(S, -1).mean(1).sqrt() if vary.any() else error.new_zeros(S))
        still.append(stayed.mean().sqrt() if vary.any() else error.new_zeros(()))
    return torch.stack(errors, 1), torch.stack(still)
