"""Your own game behind our interface: `envs.make("package.module:factory", num_envs=8)`.

The factory makes either a `VectorEnv` of our interface (see envs/__init__.py), and then takes
`num_envs` and `device`; or one game, a PettingZoo `ParallelEnv`, of which `Games` keeps B copies,
stepped one after the other.

What `Games` does with a game:
  views       short ones are filled up with zeros; whole numbers (`Discrete`, ...) become one-hot
  actions     `Discrete`, of different sizes: what an agent lacks is not available to it; or bounded
              boxes, which our [-1, 1] is stretched to, and what an agent lacks is ignored
  masks       "action_mask" in an agent's observation dictionary or in its info; who may do nothing,
              may play action 0
  state       what `state()` returns; without it, or where it is a picture, all views
  the end     when no agent is left: truncated if one of the last was cut off, else terminated
  the dead    see zeros, and may only play action 0, until the game is over; the last ones' last
              views are kept
  reward      the sum of all agents' rewards, or their mean over all N, dead or alive
              (`team_reward`)
  chance      each start of each game has its own seed, drawn from the batch's: game b does not
              depend on the others
What it refuses: agents that join later, images and other nested observations, actions that are
mixed, compound, whole numbers in a box or unbounded, and in `step` what an agent cannot do.
"""

import importlib
import inspect
import os
import sys
from operator import attrgetter

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, flatdim, flatten
from gymnasium.vector import AutoresetMode, VectorEnv

from envs.common import METADATA, check_actions, describe, games_to_reset

STEPS = 1000  # after which a game is cut off that does not tell its own limit


def make_foreign(name, task="", num_envs=1, device="cpu", team_reward="sum", **options):
    """B games of the factory `name`, "package.module:factory".

    Args:
        task: handed to the factory as `task`, if it is not empty.
        team_reward: "sum" or "mean" of the agents' rewards, for a PettingZoo game.
        options: handed to the factory; `time_limit`, if the factory does not take it, is when
            `Games` cuts a game off.
    Raises:
        ValueError: there is no such factory, it fails, does not take the options, or makes
            something else.
    """
    if team_reward not in ("sum", "mean"):
        raise ValueError(f"team_reward must be sum or mean, not {team_reward!r}")
    factory, takes = _find(name)
    options = options | ({"task": task} if task else {})
    limit = None if "time_limit" in takes else options.pop("time_limit", None)
    batch = {"num_envs": num_envs, "device": device}
    options |= {key: value for key, value in batch.items() if key in takes}
    copies = 1 if "num_envs" in takes else num_envs
    try:
        games = [factory(**options) for _ in range(copies)]
    except Exception as error:  # what a stranger's factory may raise
        raise ValueError(f"{name} fails with {options} ({_short(error)})") from error
    if not isinstance(games[0], VectorEnv):
        return Games(games, name, device, team_reward == "mean", limit)
    game = games[0]
    told = game.num_envs, game.metadata.get("autoreset_mode")
    if told != (num_envs, AutoresetMode.DISABLED):
        _refuse(name, f"it has {num_envs} games and no autoreset, not {told}")
    game.best_return = getattr(game, "best_return", None)
    return game


def _find(name):
    """The factory of a "package.module:factory", and what it takes."""
    module, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing of ours is hidden
    try:
        factory = attrgetter(path)(importlib.import_module(module))
        return factory, inspect.signature(factory).parameters
    except Exception as error:  # what a stranger's module may raise
        raise ValueError(f"--env {name}: there is no such function ({_short(error)})") from error


def _short(error):
    """An error in one line."""
    return " ".join(repr(error).split())[:300]


def _refuse(name, why):
    raise ValueError(f"{name} does not fit our interface: {why}")


class Games(VectorEnv):
    """B games of one PettingZoo ParallelEnv as a vector environment of our interface.

    Args:
        games: B of them, of one kind.
        name: what messages call them.
        mean: average the agents' rewards instead of adding them up.
        time_limit: when to cut a game off; by default what the game knows of itself, else after
            `STEPS`.
    Raises:
        ValueError: what `Games` refuses, also on the way.
    """

    metadata = METADATA

    def __init__(self, games, name, device="cpu", mean=False, time_limit=None):
        self.games, self.name, self.mean = games, name, mean
        if not getattr(games[0], "possible_agents", None) or hasattr(games[0], "agent_iter"):
            _refuse(name, "it is no PettingZoo ParallelEnv")
        self.names = list(games[0].possible_agents)
        self.views = [self._view_of(games[0].observation_space(agent)) for agent in self.names]
        self.moves = [games[0].action_space(agent) for agent in self.names]
        self.discrete = all(isinstance(move, Discrete) for move in self.moves)
        sizes = [int(move.n) if self.discrete else self._width(move) for move in self.moves]
        B, N, A, O = len(games), len(self.names), max(sizes), max(map(flatdim, self.views))
        self.owned = np.arange(A) < np.array(sizes)[:, None]  # (N, A) what an agent has of A
        self.streams = [np.random.default_rng((0, b)) for b in range(B)]
        self._start(0)  # for its state
        state = self._state_of(games[0])
        self.own_state = state is not None
        state_dim = len(state) if self.own_state else N * O
        if time_limit is None:
            time_limit = _own_limit(games[0]) or STEPS
        describe(self, B, device, N, A, O, state_dim, time_limit, discrete=self.discrete)
        self.obs, self.state = np.zeros((B, N, O), "f"), np.zeros((B, state_dim), "f")
        self.avail, self.steps = np.zeros((B, N, A), bool), np.zeros(B, int)
        self.ended, self.cut = np.ones(B, bool), np.zeros(B, bool)

    def reset(self, *, seed=None, options=None):
        for b in games_to_reset(self, options).nonzero()[:, 0].tolist():
            if seed is not None:
                self.streams[b] = np.random.default_rng((seed, b))
            self._see(b, *self._start(b))
            self.ended[b], self.cut[b], self.steps[b] = False, False, 0
        return self._observe()

    def step(self, actions):
        actions, over = actions.detach().cpu(), self.ended | self.cut
        allowed = torch.from_numpy(self.avail if self.discrete else self.owned)
        check_actions(self, actions, allowed, torch.from_numpy(over))
        actions, reward = actions.numpy(), np.zeros(self.num_envs, "f")
        for b in np.flatnonzero(~over):
            reward[b] = self._advance(b, actions[b])
        obs, info = self._observe()
        results = (torch.tensor(x, device=self.device) for x in (reward, self.ended, self.cut))
        return obs, *results, info

    def close_extras(self, **_):
        for game in self.games:
            game.close()

    def picture(self, actions=None):
        """The first game as its `render` draws it."""
        return self.games[0].render()

    def _observe(self):
        info = {"state": torch.tensor(self.state, device=self.device)}
        if self.discrete:
            info["avail_actions"] = torch.tensor(self.avail, device=self.device)
        return torch.tensor(self.obs, device=self.device), info

    # ------------------------------------------------------------ spaces
    def _view_of(self, space):
        """The space of what an agent sees, without the action mask beside it."""
        if isinstance(space, Dict) and set(space) - {"action_mask"} == {"observation"}:
            space = space["observation"]
        flat = isinstance(space, Box) and len(space.shape) <= 1
        if not flat and not isinstance(space, Discrete | MultiBinary | MultiDiscrete):
            _refuse(self.name, f"agents see {space}: flatten it first")
        return space

    def _width(self, space):
        """How many numbers an agent's action has."""
        bounded = isinstance(space, Box) and space.is_bounded() and len(space.shape) == 1
        if not bounded or not np.issubdtype(space.dtype, np.floating):
            _refuse(self.name, "actions must be all Discrete, or bounded boxes of one dimension")
        return len(space.low)

    # ------------------------------------------------------------ one game
    def _start(self, b):
        """Begin game b anew: what its agents see, and their infos."""
        obs, infos = self.games[b].reset(seed=int(self.streams[b].integers(2**31)))
        if not set(self.names) <= set(self.games[b].agents) & set(obs):
            _refuse(self.name, "agents join later")
        return obs, infos

    def _advance(self, b, actions):
        """One step of game b, by all actions (N,) or (N, A); returns its reward."""
        game = self.games[b]
        living = [(i, agent) for i, agent in enumerate(self.names) if agent in game.agents]
        played = {agent: self._played(i, actions[i]) for i, agent in living}
        obs, rewards, terminated, truncated, infos = game.step(played)
        if not set(game.agents) <= set(played):
            _refuse(self.name, "agents join later")
        cut = [truncated.get(agent) and not terminated.get(agent) for agent in played]
        gone = [truncated.get(agent) or terminated.get(agent) for agent in played]
        over = all(gone) or not game.agents
        self._see(b, obs, infos, last=played if over else ())
        self.steps[b] += 1
        self.cut[b] = any(cut) if over else self.steps[b] >= self.time_limit
        self.ended[b] = over and not self.cut[b]
        total = sum(map(float, rewards.values()))
        return total / self.num_agents if self.mean else total

    def _played(self, i, action):
        """Agent i's action as its game wants it."""
        move = self.moves[i]
        if self.discrete:
            return int(action + move.start)
        low, high = move.low.astype(float), move.high.astype(float)
        share = (action[: len(low)].astype(float) + 1) / 2
        within = np.clip(low + share * (high - low), low, high)  # rounding may lead out
        return within.astype(move.dtype)

    def _see(self, b, obs, infos, last=()):
        """Note what agents of game b see and may do: those left, or at its end the `last` ones."""
        self.obs[b], self.avail[b] = 0, False
        self.avail[b, :, 0] = True  # for the dead
        for i, agent in enumerate(self.names):
            if agent in obs and agent in (last or self.games[b].agents):
                info = infos.get(agent) or {}
                self._see_agent(b, i, obs[agent], info.get("action_mask"))
        state = self._state_of(self.games[b]) if self.own_state else self.obs[b].ravel()
        if state is not None:  # at the end some games have none any more
            self.state[b] = state

    def _see_agent(self, b, i, seen, mask):
        space = self.views[i]
        if isinstance(seen, dict):
            seen, mask = seen["observation"], seen.get("action_mask", mask)
        size = flatdim(space)
        view = np.asarray(seen, "f") if isinstance(space, Box) else flatten(space, seen)
        self.obs[b, i, :size] = view.reshape(size)
        if self.discrete:
            allowed = self.avail[b, i, : self.moves[i].n]
            allowed[:] = True if mask is None else np.asarray(mask, bool)
            allowed[0] |= not allowed.any()  # who may do nothing

    def _state_of(self, game):
        """The state that the game tells, or None."""
        try:
            state = np.asarray(game.state(), "f")
        except (NotImplementedError, AttributeError, TypeError, ValueError, KeyError):
            return None
        return state.ravel() if state.ndim < 3 else None


def _own_limit(game):
    """The most steps that a game says it takes, or the one that it wraps, or None."""
    parts = [game, getattr(game, "aec_env", None), getattr(game, "single_agent_env", None)]
    parts += [getattr(part, "unwrapped", None) for part in parts]
    parts += [getattr(part, "spec", None) for part in parts]
    for part in parts:
        for name in ("max_cycles", "max_steps", "max_episode_steps"):
            if isinstance(getattr(part, name, None), int):
                return getattr(part, name)
    return None
