"""Real PettingZoo games through envs/foreign.py: nothing of them is lost or invented.

The games are those of mpe2, pettingzoo and gymnasium-robotics in tests/requirements.txt; without
them the tests are skipped. What toys can show better is in tests/test_foreign.py.
"""

import importlib
import sys

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.utils import env_checker
from gymnasium.vector import VectorWrapper

import envs
from data.record import random_player
from envs.rollout import play

HELPER = '''"""A game whose observations a wrapper flattens, as a user would write it."""

import numpy as np
from gymnasium.spaces import Box
from pettingzoo.utils import BaseParallelWrapper


class Flat(BaseParallelWrapper):
    def observation_space(self, agent):
        size = int(np.prod(super().observation_space(agent).shape))
        return Box(-np.inf, np.inf, (size,), np.float32)

    def reset(self, seed=None, options=None):
        obs, infos = self.env.reset(seed, options)
        self.agents = self.env.agents
        return {agent: np.ravel(seen).astype(np.float32) for agent, seen in obs.items()}, infos

    def step(self, actions):
        obs, *rest = self.env.step(actions)
        self.agents = self.env.agents
        return {agent: np.ravel(seen).astype(np.float32) for agent, seen in obs.items()}, *rest


def zombies(**options):
    from pettingzoo.butterfly import knights_archers_zombies_v11

    return Flat(knights_archers_zombies_v11.parallel_env(**options))
'''
MUJOCO = "gymnasium_robotics.mamujoco_v1:parallel_env"
CHEETAH = {"scenario": "HalfCheetah", "agent_conf": "2x3", "agent_obsk": 1}
REAL = {  # name, options, time limit
    "spread": ("mpe2.simple_spread_v3:parallel_env", {"N": 4}, 25),
    "speaker": (
        "mpe2.simple_speaker_listener_v4:parallel_env",
        {"continuous_actions": True, "max_cycles": 9},
        9,
    ),
    "tag": ("mpe2.simple_tag_v3:parallel_env", {}, 25),
    "rock, paper, scissors": ("pettingzoo.classic.rps_v2:parallel_env", {}, 15),
    "zombies": ("pz_helper:zombies", {"spawn_delay": 5, "max_zombies": 20}, 900),
    "cheetah": (MUJOCO, CHEETAH, 1000),
    "ant": (MUJOCO, {"scenario": "Ant", "agent_conf": "4x2"}, 1000),
}
B = 3
OURS = ["matrix", "bridge", "smac", "halfcheetah", "polynomial"]


@pytest.fixture(scope="module", autouse=True)
def helper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("helper")
    (folder / "pz_helper.py").write_text(HELPER)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))


def make(case, num_envs=B):
    if case in OURS:
        return envs.make(case, num_envs=num_envs)
    for name in ("pettingzoo", "mpe2", "gymnasium_robotics"):
        pytest.importorskip(name)
    name, options, _ = REAL[case]
    return envs.make(name, num_envs=num_envs, **options)


def factory(case):
    """The factory of a real game, as a user imports it."""
    module, _, function = REAL[case][0].partition(":")
    if module == "gymnasium_robotics.mamujoco_v1":
        module = "gymnasium_robotics.envs.multiagent_mujoco.mamujoco_v1"
    return getattr(importlib.import_module(module), function)


def orders_of(game, actions, b):
    """Our actions as the game wants them, {agent: action}."""
    orders = {}
    for i, agent in enumerate(game.possible_agents):
        space = game.action_space(agent)
        if isinstance(space, Discrete):
            orders[agent] = int(space.start + actions[b, i])
        else:
            low, high = space.low.astype(float), space.high.astype(float)
            share = (actions[b, i, : len(low)].double().numpy() + 1) / 2
            orders[agent] = (low + share * (high - low)).astype(space.dtype)
    return {agent: orders[agent] for agent in game.agents}


@pytest.mark.parametrize("case", REAL)
def test_nothing_is_lost_or_invented(case):
    """Beside each of the games plays one of the library's, by the same seeds and actions."""
    game = make(case)
    assert game.time_limit == REAL[case][2]
    alone = [factory(case)(**REAL[case][1]) for _ in range(B)]
    names, act = alone[0].possible_agents, random_player(game, torch.Generator().manual_seed(1))
    seeds = [np.random.default_rng((3, b)) for b in range(B)]

    def begin(b):
        return alone[b].reset(seed=int(seeds[b].integers(2**31)))[0]

    obs, info = game.reset(seed=3)
    looks = [begin(b) for b in range(B)]
    over = torch.zeros(B, dtype=torch.bool)
    for t in range(120):
        for b in range(B):
            for i, agent in enumerate(names):
                if agent in looks[b] and (over[b] or agent in alone[b].agents):
                    seen = looks[b][agent]
                    seen = np.eye(4)[seen] if case.startswith("rock") else seen
                    assert np.array_equal(obs[b, i, : len(seen)], np.float32(seen))
                    assert not obs[b, i, len(seen) :].any()
                else:
                    assert not obs[b, i].any()
        actions = act(t, obs, info)
        obs, reward, ended, cut, info = game.step(actions)
        for b in range(B):
            if over[b]:
                assert reward[b] == 0 and (ended | cut)[b]
                continue
            living = list(alone[b].agents)
            looks[b], rewards, gone, late, _ = alone[b].step(orders_of(alone[b], actions, b))
            assert reward[b].item() == pytest.approx(sum(rewards.values()), abs=1e-4, rel=1e-5)
            last = not alone[b].agents
            assert (ended | cut)[b] == last
            assert not last or cut[b] == any(late[a] and not gone[a] for a in living)
        over = ended | cut
        if over.all():
            obs, info = game.reset(options={"reset_mask": over})
            looks = [begin(b) for b in range(B)]
            over = torch.zeros_like(over)


@pytest.mark.parametrize("case", ["spread", "speaker", "zombies", "cheetah"])
def test_they_keep_the_contract_and_repeat_themselves(case):
    films = []
    for seed in (5, 5, 6):
        game = make(case)
        act = random_player(game, torch.Generator().manual_seed(0))
        played = play(game, lambda *seen: (act(0, *seen[:2]), None), seed=seed, film=True)
        films.append(played.film)
        game.close()
    film = films[0]
    N, A = game.num_agents, game.num_actions
    assert game.observation_space.contains(film["obs"][:, 0].numpy()) and game.best_return is None
    assert film["state"].shape[2] == game.state_dim and film["obs"].isfinite().all()
    if isinstance(game.single_action_space, Box):
        assert film["actions"].shape[2:] == (N, A) and film["avail_actions"] is None
    else:
        assert film["avail_actions"][:, :-1][film["mask"]].any(-1).all()
    for name in ("obs", "state", "actions", "reward"):
        assert torch.equal(film[name], films[1][name])
    if case != "zombies":  # they all start at the same place
        assert not torch.equal(film["obs"][:, 0], films[2]["obs"][:, 0])
        assert len(film["obs"][:, 0].unique(dim=0)) == B


class Arrays(VectorWrapper):
    """What Gymnasium's checks look at: arrays in place of tensors."""

    def reset(self, *, seed=None, options=None):
        return self.convert(self.env.reset(seed=seed, options=options))

    def step(self, actions):
        return self.convert(self.env.step(torch.as_tensor(actions)))

    def convert(self, x):
        if isinstance(x, dict):
            return {key: self.convert(value) for key, value in x.items()}
        return tuple(map(self.convert, x)) if isinstance(x, tuple) else x.numpy()


@pytest.mark.parametrize("case", [*OURS, "spread", "cheetah"])
def test_gymnasiums_checks_that_apply_to_a_batch(case):
    """Gymnasium has none for batches, but most of `check_env` apply to a batch of one game."""
    game = Arrays(make(case, 1))
    env_checker.check_space_limit(game.observation_space, "observation")
    env_checker.check_reset_options(game)
    env_checker.check_reset_return_type(game)
    env_checker.check_seed_deprecation(game)
    if case != "smac":  # there, what is sampled may not be available
        env_checker.check_returned_data_not_reused(game)
    one, other = (game.reset(seed=1) for _ in range(2))
    assert env_checker.data_equivalence(one, other, exact=True)
    game.close()
