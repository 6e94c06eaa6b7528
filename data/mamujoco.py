"""Datasets of bodies (halfcheetah, reacher, ant) by others: is their order ours, and what MaMuJoCo recorded as ours.

Gymnasium-Robotics' MaMuJoCo splits the same bodies into the same agents: HalfCheetah 2x3, Reacher 2x1, Ant 4x2. Its
agents see other entries in another order, and HalfCheetah's have their three actions in the reverse order. A dataset
that says so, `info["layout"] = "mamujoco"`, is turned into ours as it is loaded.

Shapes: E episodes, T steps, N agents, O observation, D state.
"""

import torch

from data.dataset import Dataset

WIDTHS = {"halfcheetah": 17, "reacher": 10, "ant": 105}  # of what MaMuJoCo's `state()` returns


def views(state, game, place=0.0):
    """What each agent of a body sees in states (..., D): (..., N, O).

    Args:
        game: a `MultiAgentMujoco`, which knows its views.
        place: x, which agents of the cheetah see, but which is in no state: a number or (..., 1).
    """
    hidden = torch.zeros_like(state[..., : game.hidden]) + place
    return torch.cat([hidden, state, torch.zeros_like(state[..., :1])], -1)[..., torch.as_tensor(game.columns)]


def check_order(dataset, game, source):
    """Raise ValueError unless what the agents of a body saw is what the state says, in our order.

    All that they see but x is in the state, so some 10,000 of the recorded observations can tell.
    """
    steps = dataset.mask.nonzero()
    some = tuple(steps[:: len(steps) // 10_000 + 1].T)
    seen, state = dataset.obs[some], dataset.state[some]  # (M, N, O), (M, D)
    known = torch.as_tensor(game.columns) >= game.hidden  # (N, O)
    unlike = (~seen.isclose(views(state, game), 1e-3, 1e-3)).double().mean(0) * known
    if unlike.max() > 0.01:
        i, k = (unlike > 0.01).nonzero()[0].tolist()
        raise ValueError(
            f"{source}: its observations are not in the order of {game.body} here: entry {k} of agent {i} is not the "
            f"state's entry {game.columns[i, k] - game.hidden}; if MaMuJoCo recorded it, it must say so: "
            "info['layout'] = 'mamujoco' (see data/README.md)"
        )


def from_mamujoco(dataset, game, source):
    """What MaMuJoCo recorded, as our `game` would have recorded it.

    What agents see is made anew from the state, so any `agent_obsk` will do. x, which no state holds, follows from the
    rewards, as forward speed = reward + 0.1 |action|^2; it begins at 0 instead of within 0.1 of it. MaMuJoCo pays every
    agent the whole reward: where the dataset holds their sum, it is divided. Its Ant's contact costs stay in.

    Args:
        dataset: with the state that `state()` returns.
        game: a `MultiAgentMujoco`.
    Raises:
        ValueError: the sizes are others.
    """
    state, actions, reward, info = dataset.state, dataset.actions, dataset.reward, dict(dataset.info)
    found, wanted = (state.shape[2], *actions.shape[2:]), (WIDTHS[game.body], *game.motors.shape)
    if found != wanted:
        sizes = "(state, agents, actions)"
        raise ValueError(f"{source} has {sizes} = {found}, but MaMuJoCo's {game.body} has {wanted}")
    if info.pop("team_reward", "") == "sum":
        reward = reward / game.num_agents
    place = 0.0
    if game.body == "halfcheetah":
        speed = reward + 0.1 * actions.square().sum((2, 3))  # (E, T)
        place = torch.nn.functional.pad(game.plain.dt * speed.double().cumsum(1), (1, 0)).float()[..., None]
        actions = actions.flip(-1)
    # The reacher lacks the fingertip's height above the target, 0; the ant has contact forces besides.
    state = torch.nn.functional.pad(state, (0, game.state_dim - state.shape[2]))
    info["layout"] = "ours, from MaMuJoCo's"
    return Dataset(views(state, game, place), state, None, actions, reward, dataset.terminated, dataset.mask, info)
