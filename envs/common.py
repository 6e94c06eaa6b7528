"""The few lines that every environment needs to be a Gymnasium vector environment."""

import numpy as np
import torch
from gymnasium.spaces import Box, MultiDiscrete
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

METADATA = {"autoreset_mode": AutoresetMode.DISABLED}


def describe_discrete(env, num_envs, device, num_agents, num_actions, obs_dim, state_dim, time_limit, best_return):
    """Set the attributes and Gymnasium spaces of `env`: N agents with A discrete actions each.

    `best_return` is the highest return that a team can reach, or None if nobody knows it.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")
    env.num_envs, env.device, env.time_limit = num_envs, torch.device(device), time_limit
    env.num_agents, env.num_actions = num_agents, num_actions
    env.obs_dim, env.state_dim, env.best_return = obs_dim, state_dim, best_return
    env.single_observation_space = Box(-float("inf"), float("inf"), (num_agents, obs_dim))
    env.single_action_space = MultiDiscrete([num_actions] * num_agents)
    env.observation_space = batch_space(env.single_observation_space, num_envs)
    env.action_space = batch_space(env.single_action_space, num_envs)


def games_to_reset(env, options):
    """Which games `reset(options=...)` restarts: all, or those in `options["reset_mask"]`. Returns (B,) bool.

    Raises:
        ValueError: the mask is not (B,) bool.
    """
    mask = (options or {}).get("reset_mask")
    if mask is None:
        return torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    mask = torch.as_tensor(mask, device=env.device)
    if mask.shape != (env.num_envs,) or mask.dtype != torch.bool:
        raise ValueError(f"reset_mask must be {env.num_envs} bools, not {mask.dtype} of shape {tuple(mask.shape)}")
    return mask


def check_actions(env, actions, sizes=None, over=None):
    """Raise ValueError unless `actions` is an integer tensor of shape (B, N), of actions that there are.

    Values are read on a CPU only: for those on a GPU the host would have to wait.

    Args:
        sizes: how many actions there are, one number or one for each agent (N,); without it no values are read.
        over: a function that tells which games are over, (B,) bool; there -1 is no action, and nothing happens.
    """
    if actions.shape != (env.num_envs, env.num_agents) or actions.is_floating_point():
        raise ValueError(
            f"actions must be integers of shape {(env.num_envs, env.num_agents)}, "
            f"not {actions.dtype} of shape {tuple(actions.shape)}"
        )
    if sizes is None or actions.device.type != "cpu":
        return
    wrong = (actions < 0) | (actions >= sizes)  # (B, N); -1, as an index, would be the last action
    if wrong.any() and (wrong := wrong & ~(over()[:, None] & (actions == -1))).any():
        b, i = wrong.nonzero()[0].tolist()
        last = torch.as_tensor(sizes).expand(env.num_agents)[i] - 1
        raise ValueError(f"agent {i} in game {b} has no action {actions[b, i]}: it has 0 .. {last}")


def pixels(figure):
    """A Matplotlib figure as an array (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
