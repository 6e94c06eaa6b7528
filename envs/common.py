"""What the environments share: spaces, the check of actions, and games that are made of tensors."""

import numpy as np
import torch
from gymnasium.spaces import Box, MultiDiscrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

METADATA = {"autoreset_mode": AutoresetMode.DISABLED}


def describe(
    env,
    num_envs,
    device,
    num_agents,
    num_actions,
    obs_dim,
    state_dim,
    time_limit,
    best_return=None,
    discrete=True,
):
    """Set the attributes and the Gymnasium spaces of `env`.

    Args:
        num_actions: how many actions each agent chooses from; if not `discrete`, how many numbers
            in [-1, 1] its action has.
        time_limit: in steps.
        best_return: the highest return that a team can reach, or None if nobody knows it.
    Raises:
        ValueError: the time limit is no number of steps.
    """
    if type(time_limit) is not int or time_limit < 1:
        raise ValueError(f"time_limit must be a number of steps, at least 1, not {time_limit!r}")
    env.num_envs, env.device, env.time_limit = num_envs, torch.device(device), time_limit
    env.num_agents, env.num_actions = num_agents, num_actions
    env.obs_dim, env.state_dim, env.best_return = obs_dim, state_dim, best_return
    env.single_observation_space = Box(-np.inf, np.inf, (num_agents, obs_dim))
    if discrete:
        env.single_action_space = MultiDiscrete([num_actions] * num_agents)
    else:
        env.single_action_space = Box(-1, 1, (num_agents, num_actions))
    env.observation_space = batch_space(env.single_observation_space, num_envs)
    env.action_space = batch_space(env.single_action_space, num_envs)


def games_to_reset(env, options):
    """Which games `reset(options=...)` restarts: all, or those in its "reset_mask". (B,) bool.

    Raises:
        ValueError: the mask is not (B,) bool.
    """
    mask = (options or {}).get("reset_mask")
    if mask is None:
        return torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
    mask = torch.as_tensor(mask, device=env.device)
    if mask.shape != (env.num_envs,) or mask.dtype != torch.bool:
        raise ValueError(f"reset_mask must be {env.num_envs} bools")
    return mask


def check_shape(env, actions):
    """Raise ValueError unless `actions` are numbers as the action space has them."""
    shape, discrete = env.action_space.shape, isinstance(env.single_action_space, MultiDiscrete)
    if actions.shape != shape or actions.is_floating_point() == discrete:
        kind = "integers" if discrete else "floating-point numbers"
        raise ValueError(f"actions must be {kind} of shape {shape}")


def check_actions(env, actions, allowed=None, over=None):
    """Raise ValueError unless `actions` can be played.

    Their values are read on a CPU only: for those on a GPU the host would have to wait.

    Args:
        allowed: discrete actions that agents may take, (N, A) or (B, N, A) bool, or the entries of
            continuous actions that they have; None allows what the action space has.
        over: games that are over, (B,) bool; what they are told is not read.
    """
    check_shape(env, actions)
    if actions.device.type != "cpu":
        return
    if actions.is_floating_point():
        wrong, why = ~(actions.abs() <= 1), "is not in [-1, 1]"  # (B, N, A); also NaN
        if allowed is not None:
            wrong &= allowed
    else:
        number, why = actions.clamp(0, env.num_actions - 1), "is not available"
        wrong = number != actions  # (B, N); -1, as an index, would be the last action
        if allowed is not None:
            wrong |= ~allowed.expand(*number.shape, -1).gather(-1, number[..., None])[..., 0]
    if over is not None:
        wrong &= ~over.view(-1, *[1] * (wrong.dim() - 1))
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        b, i = place[:2]
        raise ValueError(f"game {b}, agent {i}: action {actions[place].item()} {why}")


class TensorGame(VectorEnv):
    """A batch of games made of tensors: it never waits for a GPU, and a compiler can make it a
    graph.

    A subclass has `_begin(mask)`, which starts the games in mask (B,) anew, and `_play(actions)`.
    What its games remember, the tensors named in `memory`, they write in place.
    """

    metadata = METADATA
    memory = ("over",)

    def reset(self, *, seed=None, options=None):
        return self._begin(games_to_reset(self, options))

    def compile(self, compiler):
        """Let `compiler`, a function of functions, make one graph of a step and one of a reset."""
        for name in self.memory:
            torch._dynamo.mark_static_address(getattr(self, name))  # a CUDA graph may write there
        self._play, self._begin = compiler(self._play), compiler(self._begin)


class OneStep(TensorGame):
    """Games of one step, with a constant observation 1 and state 1.

    A subclass has `pay(actions)`, the rewards (B,), and where actions are discrete `avail` (N, A).
    """

    avail = None

    def step(self, actions):
        check_actions(self, actions, self.avail, self.over)
        return self._play(actions)

    def _begin(self, mask):
        self.over.logical_and_(~mask)
        return self._observe()

    def _play(self, actions):
        reward = torch.where(self.over, 0.0, self.pay(actions))
        self.over.fill_(True)
        obs, info = self._observe()
        return obs, reward, self.over.clone(), torch.zeros_like(self.over), info

    def _observe(self):
        ones = torch.ones(self.num_envs, self.num_agents, 1, device=self.device)
        info = {"state": ones[:, 0].clone()}
        if self.avail is not None:
            info["avail_actions"] = self.avail.repeat(self.num_envs, 1, 1)
        return ones, info


def pixels(figure):
    """A Matplotlib figure as an array (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, so that games start faster

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
