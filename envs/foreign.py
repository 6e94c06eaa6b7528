"""Your own game behind our interface: `envs.make("package.module:factory", num_envs=8)`.

The factory makes either a `VectorEnv` of our interface (see envs/__init__.py), and then takes `num_envs` and `device`;
or one game, a PettingZoo `ParallelEnv`, of which `Games` keeps B copies, stepped one after the other.

What `Games` does with a game:
  views       short ones are filled up with zeros; whole numbers (`Discrete`, ...) become one-hot
  actions     `Discrete`, of different sizes: what an agent lacks is not available to it; or bounded boxes, which our
              [-1, 1] is stretched to, and what an agent lacks is ignored
  masks       "action_mask" in an agent's observation dictionary or in its info
  state       what `state()` returns; without it, all views
  the end     when no agent is left: truncated if one of the last was cut off, else terminated
  the dead    see zeros, and may only play action 0, until the game is over
  reward      the sum of all agents' rewards, or their mean over all N, dead or alive (`team_reward`)
What it refuses: agents that join later, images and other nested observations, and actions that are mixed, compound or
unbounded.
"""

import importlib
import inspect
import os
import sys

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, flatdim, flatten
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from envs.common import METADATA, games_to_reset

STEPS = 1000  # after which a game is cut off that does not tell its own limit


def make_foreign(name, task="", num_envs=1, device="cpu", team_reward="sum", **options):
    """B games of the factory `name`, "package.module:factory".

    Args:
        task: handed to the factory as `task`, if it is not empty.
        team_reward: "sum" or "mean" of the agents' rewards, for a PettingZoo game.
        options: handed to the factory; `time_limit`, if the factory does not take it, is when `Games` cuts a game off.
    Raises:
        ValueError: there is no such factory, it does not take the options, or makes something else.
    """
    factory, options = find(name), dict(options) | ({"task": task} if task else {})
    try:
        takes = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a builtin
        takes = {}
    limit = None if "time_limit" in takes else options.pop("time_limit", None)
    batch = {"num_envs": num_envs, "device": device} if "num_envs" in takes else {}
    batch = {key: value for key, value in batch.items() if key in takes}

    def build():
        try:
            return factory(**options, **batch)
        except TypeError as error:
            raise ValueError(f"{name} does not take {list(options) or 'no'} arguments: {error}") from None

    game = build()
    if isinstance(game, VectorEnv):
        missing = [key for key in ("device", "num_agents", "num_actions", "obs_dim", "state_dim", "time_limit")
                   if not hasattr(game, key)]  # fmt: skip
        if missing or game.num_envs != num_envs:
            what = f"lacks {', '.join(missing)}" if missing else f"has {game.num_envs} games in place of {num_envs}"
            raise ValueError(f"{name} makes a vector environment that {what}: see envs/__init__.py for what it needs")
        return game
    if not hasattr(game, "possible_agents") or hasattr(game, "agent_iter"):
        remedy = "take its parallel_env" if hasattr(game, "agent_iter") else "wrap it in one"
        raise ValueError(f"{name} makes a {type(game).__name__}, no PettingZoo ParallelEnv: {remedy}")
    if team_reward not in ("sum", "mean"):
        raise ValueError(f"team_reward must be sum or mean, not {team_reward!r}")
    return Games([game] + [build() for _ in range(num_envs - 1)], name, device, team_reward == "mean", limit)


def find(name):
    """The factory of a "package.module:factory", also in a module of the current folder."""
    module, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing of ours is hidden
    try:
        factory = importlib.import_module(module)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(f"--env {name}: there is no module {module!r} to import ({error})") from None
    for part in path.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise ValueError(f"--env {name}: {module} has no function {path!r} that makes an environment")
    return factory


class Games(VectorEnv):
    """B games of one PettingZoo ParallelEnv as a vector environment of our interface.

    Args:
        games: B of them, of one kind.
        name: what messages call them.
        mean: average the agents' rewards instead of adding them up.
        time_limit: when to cut a game off; by default what the game knows of itself, else after `STEPS`.
    Raises:
        ValueError: the game has something that our interface cannot hold.
    """

    metadata = METADATA

    def __init__(self, games, name, device="cpu", mean=False, time_limit=None):
        self.games, self.name, self.mean, self.best_return = games, name, mean, None
        self.num_envs, self.device, self.names = len(games), torch.device(device), list(games[0].possible_agents)
        self.num_agents, self.time_limit = len(self.names), time_limit or own_limit(games[0]) or STEPS
        if not self.names:
            self.refuse("it has no agents")
        views = [self.view_of(games[0].observation_space(agent)) for agent in self.names]
        moves = [games[0].action_space(agent) for agent in self.names]
        self.views, self.obs_dim = views, max(map(flatdim, views))
        self.discrete = all(isinstance(space, Discrete) for space in moves)
        if self.discrete:
            self.sizes = np.array([int(space.n) for space in moves])
            self.starts = [int(space.start) for space in moves]
        elif all(isinstance(space, Box) and len(space.shape) == 1 for space in moves):
            self.sizes = np.array([space.shape[0] for space in moves])
            if not all(np.isfinite([space.low, space.high]).all() for space in moves):
                self.refuse("its actions have no bounds")
            self.bounds = [(space.low, space.high) for space in moves]
        else:
            self.refuse("its actions are neither all Discrete nor all one-dimensional boxes")
        N, A = self.num_agents, int(self.sizes.max())
        self.num_actions = A
        first = self.start(0, 0)
        self.own_state = self.state_of(games[0]) is not None
        self.state_dim = len(self.state_of(games[0])) if self.own_state else N * self.obs_dim
        self.single_observation_space = Box(-np.inf, np.inf, (N, self.obs_dim))
        self.single_action_space = MultiDiscrete([A] * N) if self.discrete else Box(-1, 1, (N, A))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.obs = np.zeros((self.num_envs, N, self.obs_dim), np.float32)
        self.state = np.zeros((self.num_envs, self.state_dim), np.float32)
        self.avail = np.zeros((self.num_envs, N, A), bool)
        self.over, self.steps = np.ones(self.num_envs, bool), np.zeros(self.num_envs, int)
        self.see(0, *first)

    def reset(self, *, seed=None, options=None):
        for b in games_to_reset(self, options).nonzero()[:, 0].tolist():
            self.see(b, *self.start(b, seed))
            self.over[b], self.steps[b] = False, 0
        return self.observe()

    def step(self, actions):
        actions = actions.detach().cpu().numpy()
        reward, ended, cut = np.zeros(self.num_envs, np.float32), *np.zeros((2, self.num_envs), bool)
        for b in (~self.over).nonzero()[0]:
            game = self.games[b]
            living = [i for i, agent in enumerate(self.names) if agent in game.agents]
            played = {self.names[i]: self.played(i, actions[b, i]) for i in living}
            obs, rewards, terminated, truncated, infos = game.step(played)
            self.see(b, obs, infos)
            self.steps[b] += 1
            reward[b] = sum(map(float, rewards.values())) / (self.num_agents if self.mean else 1)
            gone = all(terminated[agent] or truncated[agent] for agent in played)
            late = self.steps[b] >= self.time_limit and not gone
            cut[b] = late or gone and any(truncated[agent] and not terminated[agent] for agent in played)
            ended[b], self.over[b] = gone and not cut[b], gone or late
        obs, info = self.observe()
        return obs, *(torch.tensor(x, device=self.device) for x in (reward, ended, cut)), info

    def close(self, **_):
        for game in self.games:
            game.close()

    def picture(self, actions=None):
        """The first game as its `render` draws it, an array (height, width, 3); ValueError if it does not."""
        drawn = self.games[0].render()
        if not isinstance(drawn, np.ndarray) or drawn.ndim != 3:
            raise ValueError(f"{self.name} draws no pictures: try --env-kwargs '{{\"render_mode\": \"rgb_array\"}}'")
        return drawn

    # ------------------------------------------------------------ one game
    def refuse(self, why):
        raise ValueError(f"{self.name} does not fit our interface: {why}")

    def view_of(self, space):
        """The space of what an agent sees, without the action mask beside it."""
        if isinstance(space, Dict) and "observation" in space.spaces:
            space = space["observation"]
        if isinstance(space, Box) and len(space.shape) > 1:
            self.refuse(f"its observations have the shape {space.shape}: flatten them first")
        if not isinstance(space, Box | Discrete | MultiBinary | MultiDiscrete):
            self.refuse(f"its observations are a {type(space).__name__}: make one array of them first")
        return space

    def start(self, b, seed):
        """Begin game b anew: what its agents see, and their infos."""
        obs, infos = self.games[b].reset(seed=None if seed is None else (1_000_003 * (seed + 1) + b) % 2**31)
        if missing := set(self.names) - set(obs):
            self.refuse(f"the agent {min(missing)} is not there from the start")
        return obs, infos

    def state_of(self, game):
        """The state that the game tells, or None."""
        try:
            return np.asarray(game.state(), np.float32).ravel()
        except (NotImplementedError, AttributeError, TypeError, ValueError, KeyError):
            return None

    def see(self, b, obs, infos):
        """Note what the agents of game b see, and may do."""
        self.obs[b], self.avail[b] = 0, False
        for i, agent in enumerate(self.names):
            self.avail[b, i, 0] = True
            if agent not in obs:  # it is dead
                continue
            seen, mask = obs[agent], infos.get(agent, {}).get("action_mask")
            if isinstance(seen, dict):
                seen, mask = seen["observation"], seen.get("action_mask", mask)
            flat = flatten(self.views[i], seen)
            self.obs[b, i, : len(flat)] = flat
            if self.discrete:
                self.avail[b, i, : self.sizes[i]] = True if mask is None else np.asarray(mask, bool)
        if unknown := set(obs) - set(self.names):
            self.refuse(f"the agent {min(unknown)} joins later")
        told = self.state_of(self.games[b]) if self.own_state else self.obs[b].ravel()
        if told is not None and len(told) == self.state_dim:  # at the end some games have no state any more
            self.state[b] = told

    def played(self, i, action):
        """Agent i's action as its game wants it."""
        if self.discrete:
            return int(action) + self.starts[i]
        low, high = self.bounds[i]
        return (low + (action[: self.sizes[i]].clip(-1, 1) + 1) / 2 * (high - low)).astype(low.dtype)

    def observe(self):
        info = {"state": torch.tensor(self.state, device=self.device)}
        if self.discrete:
            info["avail_actions"] = torch.tensor(self.avail, device=self.device)
        return torch.tensor(self.obs, device=self.device), info


def own_limit(game):
    """The most steps that a game of PettingZoo's says it takes, or None."""
    inside = getattr(game, "aec_env", game)
    for part in (game, getattr(game, "unwrapped", game), inside, getattr(inside, "unwrapped", inside)):
        for name in ("max_cycles", "max_steps", "max_num_steps", "max_episode_steps"):
            limit = getattr(part, name, None)
            if isinstance(limit, int) and limit > 0:
                return limit
    return None
