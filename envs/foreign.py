"""Your own game behind our interface: `envs.make("package.module:factory", num_envs=8)`.

The factory makes either a `VectorEnv` of our interface (see envs/__init__.py), and then takes `num_envs` and `device`;
or one game, a PettingZoo `ParallelEnv`, of which `Games` keeps B copies, stepped one after the other.

What `Games` does with a game:
  views       short ones are filled up with zeros; whole numbers (`Discrete`, ...) become one-hot
  actions     `Discrete`, of different sizes: what an agent lacks is not available to it; or bounded boxes, which our
              [-1, 1] is stretched to, and what an agent lacks is ignored
  masks       "action_mask" in an agent's observation dictionary or in its info; who may do nothing, may play action 0
  state       what `state()` returns; without it, or where it is a picture, all views
  the end     when no agent is left: truncated if one of the last was cut off, else terminated
  the dead    see zeros, and may only play action 0, until the game is over; the last ones' last views are kept
  reward      the sum of all agents' rewards, or their mean over all N, dead or alive (`team_reward`)
  chance      each start of each game has its own seed, drawn from the batch's: game b does not depend on the others
What it refuses: agents that join later, images and other nested observations, actions that are mixed, compound,
whole numbers in a box or unbounded, and in `step` what an agent cannot do.
"""

import importlib
import inspect
import os
import sys

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, flatdim, flatten
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.common import METADATA, check_actions, games_to_reset

STEPS = 1000  # after which a game is cut off that does not tell its own limit


def make_foreign(name, task="", num_envs=1, device="cpu", team_reward="sum", **options):
    """B games of the factory `name`, "package.module:factory".

    Args:
        task: handed to the factory as `task`, if it is not empty.
        team_reward: "sum" or "mean" of the agents' rewards, for a PettingZoo game.
        options: handed to the factory; `time_limit`, if the factory does not take it, is when `Games` cuts a game off.
    Raises:
        ValueError: there is no such factory, it fails, does not take the options, or makes something else.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")
    factory, options = find(name), dict(options) | ({"task": task} if task else {})
    try:
        takes = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a builtin
        takes = {}
    limit = None if "time_limit" in takes else options.pop("time_limit", None)
    batch = {"num_envs": num_envs, "device": device} if "num_envs" in takes else {}
    batch = {key: value for key, value in batch.items() if key in takes}

    def refuse(error):
        raise ValueError(f"{name} does not take {list(options) or 'no'} arguments: {short(error)}") from None

    try:
        inspect.signature(factory).bind(**options, **batch)
    except TypeError as error:
        refuse(error)
    except ValueError:  # a builtin
        pass

    def build():
        try:
            return factory(**options, **batch)
        except Exception as error:  # what a stranger's factory may raise
            strange = any(f"unexpected keyword argument '{key}'" in str(error) for key in options)
            if isinstance(error, TypeError) and strange:
                refuse(error)  # it hands on whatever it gets
            raise ValueError(f"{name} fails ({type(error).__name__}: {short(error)})") from error

    game = build()
    if isinstance(game, VectorEnv):
        if game.metadata.get("autoreset_mode") != AutoresetMode.DISABLED:
            raise ValueError(f"{name} starts finished games anew by itself: its autoreset_mode must be DISABLED")
        missing = [key for key in ("device", "num_agents", "num_actions", "obs_dim", "state_dim", "time_limit")
                   if not hasattr(game, key)]  # fmt: skip
        if missing or game.num_envs != num_envs:
            what = f"lacks {', '.join(missing)}" if missing else f"has {game.num_envs} games in place of {num_envs}"
            raise ValueError(f"{name} makes a vector environment that {what}: see envs/__init__.py for what it needs")
        game.best_return = getattr(game, "best_return", None)
        return game
    if not hasattr(game, "possible_agents") or hasattr(game, "agent_iter"):
        remedy = "take its parallel_env" if hasattr(game, "agent_iter") else "wrap it in one"
        raise ValueError(f"{name} makes a {type(game).__name__}, no PettingZoo ParallelEnv: {remedy}")
    if limit is not None and not (type(limit) is int and limit > 0):
        raise ValueError(f"time_limit must be a number of steps, at least 1, not {limit!r}")
    if team_reward not in ("sum", "mean"):
        raise ValueError(f"team_reward must be sum or mean, not {team_reward!r}")
    games = [game] + [build() for _ in range(num_envs - 1)]
    if len(set(map(id, games))) < num_envs:
        raise ValueError(f"{name} makes the same game again: it must make a new one each time")
    return Games(games, name, device, team_reward == "mean", limit)


def find(name):
    """The factory of a "package.module:factory", also in a module of the current folder."""
    module, _, path = name.partition(":")
    package, _, last = module.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing of ours is hidden
    try:
        try:
            factory = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module or not hasattr(importlib.import_module(package or module), last):
                raise
            factory = getattr(sys.modules[package], last)  # gymnasium_robotics.mamujoco_v1 is one by another name
        for part in path.split("."):
            factory = getattr(factory, part, None)
    except Exception as error:  # what a stranger's module may raise
        raise ValueError(f"--env {name}: cannot import {module!r} ({type(error).__name__}: {short(error)})") from error
    if not callable(factory):
        raise ValueError(f"--env {name}: {module} has no function {path!r} that makes an environment")
    return factory


def short(error):
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300]


class Games(VectorEnv):
    """B games of one PettingZoo ParallelEnv as a vector environment of our interface.

    Args:
        games: B of them, of one kind.
        name: what messages call them.
        mean: average the agents' rewards instead of adding them up.
        time_limit: when to cut a game off; by default what the game knows of itself, else after `STEPS`.
    Raises:
        ValueError: the game has something that our interface cannot hold; in `step`, actions of a wrong shape, not
            available, or not in [-1, 1].
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
            if not all(np.issubdtype(space.dtype, np.floating) for space in moves):
                self.refuse("its actions are boxes of whole numbers")
            self.bounds = [(space.low.astype(np.float64), space.high.astype(np.float64)) for space in moves]
            self.kinds = [space.dtype for space in moves]
            if not np.isfinite(np.concatenate([bound for pair in self.bounds for bound in pair])).all():
                self.refuse("its actions have no bounds")
        else:
            self.refuse("its actions are neither all Discrete nor all one-dimensional boxes")
        N, A = self.num_agents, int(self.sizes.max())
        self.num_actions, self.owned = A, np.arange(A) < self.sizes[:, None]  # (N, A) what an agent has of A
        self.streams = [np.random.default_rng((0, b)) for b in range(self.num_envs)]
        first = self.start(0)
        self.own_state = self.state_of(games[0]) is not None
        self.state_dim = len(self.state_of(games[0])) if self.own_state else N * self.obs_dim
        self.single_observation_space = Box(-np.inf, np.inf, (N, self.obs_dim))
        self.single_action_space = MultiDiscrete([A] * N) if self.discrete else Box(-1, 1, (N, A))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.obs = np.zeros((self.num_envs, N, self.obs_dim), np.float32)
        self.state = np.zeros((self.num_envs, self.state_dim), np.float32)
        self.avail = np.zeros((self.num_envs, N, A), bool)
        self.ended, self.cut, self.steps = *np.ones((2, self.num_envs), bool), np.zeros(self.num_envs, int)
        self.see(0, *first)

    def reset(self, *, seed=None, options=None):
        for b in games_to_reset(self, options).nonzero()[:, 0].tolist():
            if seed is not None:
                self.streams[b] = np.random.default_rng((seed, b))
            self.see(b, *self.start(b))
            self.ended[b], self.cut[b], self.steps[b] = False, False, 0
        return self.observe()

    def step(self, actions):
        actions, reward = self.checked(actions), np.zeros(self.num_envs, np.float32)
        for b in (~(self.ended | self.cut)).nonzero()[0]:
            game = self.games[b]
            living = [i for i, agent in enumerate(self.names) if agent in game.agents]
            played = {self.names[i]: self.played(i, actions[b, i]) for i in living}
            obs, rewards, terminated, truncated, infos = game.step(played)
            if joined := set(game.agents) - set(played):
                self.refuse(f"the agent {min(joined)} joins later")
            gone = not game.agents or all(terminated.get(agent) or truncated.get(agent) for agent in played)
            self.see(b, obs, infos, last=played if gone else ())
            self.steps[b] += 1
            reward[b] = sum(map(float, rewards.values())) / (self.num_agents if self.mean else 1)
            late = self.steps[b] >= self.time_limit and not gone
            self.cut[b] = late or gone and any(truncated.get(agent) and not terminated.get(agent) for agent in played)
            self.ended[b] = gone and not self.cut[b]
        obs, info = self.observe()
        return obs, *(torch.tensor(x, device=self.device) for x in (reward, self.ended, self.cut)), info

    def close_extras(self, **_):
        for game in self.games:
            game.close()

    def picture(self, actions=None):
        """The first game as its `render` draws it, an array (height, width, 3); ValueError if it does not."""
        drawn = self.games[0].render()
        if not isinstance(drawn, np.ndarray) or drawn.ndim != 3:
            raise ValueError(
                f'{self.name} draws no pictures: begin with --env-kwargs \'{{"render_mode": "rgb_array"}}\''
            )
        return drawn

    # ------------------------------------------------------------ one game
    def refuse(self, why):
        raise ValueError(f"{self.name} does not fit our interface: {why}")

    def view_of(self, space):
        """The space of what an agent sees, without the action mask beside it."""
        if isinstance(space, Dict) and "observation" in space.spaces and set(space) <= {"observation", "action_mask"}:
            space = space["observation"]
        if isinstance(space, Box) and len(space.shape) > 1:
            self.refuse(f"its observations have the shape {space.shape}: flatten them first")
        if not isinstance(space, Box | Discrete | MultiBinary | MultiDiscrete):
            self.refuse(f"its observations are a {type(space).__name__}: make one array of them first")
        return space

    def start(self, b):
        """Begin game b anew: what its agents see, and their infos."""
        found = self.games[b].reset(seed=int(self.streams[b].integers(2**31)))
        if not isinstance(found, tuple) or len(found) != 2:
            self.refuse("its reset does not return observations and infos")
        if missing := set(self.names) - (set(self.games[b].agents) & set(found[0])):
            self.refuse(f"the agent {min(missing)} is not there from the start")
        return found

    def state_of(self, game):
        """The state that the game tells, or None."""
        try:
            told = np.asarray(game.state(), np.float32)
            return told.ravel() if told.ndim < 3 else None
        except (NotImplementedError, AttributeError, TypeError, ValueError, KeyError):
            return None

    def see(self, b, obs, infos, last=()):
        """Note what the agents of game b see, and may do: those who are left, or at the very end the `last` ones."""
        game, self.obs[b], self.avail[b] = self.games[b], 0, False
        self.avail[b, :, 0] = True
        for i, agent in enumerate(self.names):
            if agent not in (last or game.agents) or last and agent not in obs:  # dead, or not told any more
                continue
            if agent not in obs:
                self.refuse(f"the agent {agent} is alive but sees nothing")
            seen, mask = obs[agent], (infos.get(agent) or {}).get("action_mask")
            if isinstance(seen, dict):
                seen, mask = seen["observation"], seen.get("action_mask", mask)
            space = self.views[i]
            flat = np.asarray(seen, np.float32).ravel() if isinstance(space, Box) else flatten(space, seen)
            if len(flat) != flatdim(space):
                self.refuse(f"the agent {agent} sees {len(flat)} numbers in place of {flatdim(space)}")
            self.obs[b, i, : len(flat)] = flat
            if self.discrete:
                mask = self.owned[i, : self.sizes[i]] if mask is None else np.asarray(mask, bool)
                if mask.shape != (self.sizes[i],):
                    self.refuse(f"the mask of agent {agent} has the shape {mask.shape} for {self.sizes[i]} actions")
                self.avail[b, i, : self.sizes[i]] = mask if mask.any() else np.arange(len(mask)) == 0
        told = self.state_of(game) if self.own_state else self.obs[b].ravel()
        if told is not None and len(told) == self.state_dim:
            self.state[b] = told
        elif not last:  # at the end some games have no state any more
            self.refuse("its state changes its size")

    def checked(self, actions):
        """The actions as an array; ValueError if a running game cannot take them."""
        running = ~(self.ended | self.cut)
        if self.discrete:
            check_actions(self, actions)
            actions = actions.cpu().numpy()
            choices = np.arange(self.num_actions) == actions[..., None]  # (B, N, A)
            wrong, what = ~(choices & self.avail).any(-1), "is not available"
        else:
            shape = self.action_space.shape
            if actions.shape != shape or not actions.is_floating_point():
                found = f"{actions.dtype} of shape {tuple(actions.shape)}"
                raise ValueError(f"actions must be floating-point numbers of shape {shape}, not {found}")
            actions = actions.detach().cpu().double().numpy()
            wrong, what = ~(np.abs(actions) <= 1) & self.owned, "is not in [-1, 1]"  # also NaN
        if (wrong := wrong & running.reshape(-1, *[1] * (wrong.ndim - 1))).any():
            b, i, *_ = place = tuple(np.argwhere(wrong)[0])
            raise ValueError(f"game {b}, agent {i}: action {actions[place]} {what}")
        return actions

    def played(self, i, action):
        """Agent i's action as its game wants it."""
        if self.discrete:
            return int(action) + self.starts[i]
        low, high = self.bounds[i]
        within = np.clip(low + (action[: self.sizes[i]] + 1) / 2 * (high - low), low, high)  # rounding may lead out
        return within.astype(self.kinds[i])

    def observe(self):
        info = {"state": torch.tensor(self.state, device=self.device)}
        if self.discrete:
            info["avail_actions"] = torch.tensor(self.avail, device=self.device)
        return torch.tensor(self.obs, device=self.device), info


def own_limit(game):
    """The most steps that a game says it takes, or the one that it wraps, or None."""
    shells = [game] + [getattr(game, name, None) for name in ("aec_env", "single_agent_env")]
    for part in (x for shell in shells for x in (shell, getattr(shell, "unwrapped", None))):
        told = [getattr(part, name, None) for name in ("max_cycles", "max_steps", "max_num_steps", "max_episode_steps")]
        for limit in told + [getattr(getattr(part, "spec", None), "max_episode_steps", None)]:
            if isinstance(limit, int | np.integer) and limit > 0:
                return int(limit)
    return None
