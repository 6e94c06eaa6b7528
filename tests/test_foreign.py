"""Other people's games behind our interface: a toy for what can happen, and real ones."""

import importlib
import sys

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import envs
from envs.rollout import play

GAMES = '''"""Toys with PettingZoo's interface, written without it."""

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class Toy:
    """Three agents count steps. "c" dies after two, the others end, or are cut off, at `length`."""

    possible_agents = ["a", "b", "c"]

    def __init__(self, length=5, ends=True, masks="info", moves="discrete", state=True, odd=""):
        self.length, self.ends, self.masks, self.moves = length, ends, masks, moves
        self.has_state, self.odd = state, odd

    def observation_space(self, agent):
        box = Box(-9, 9, ({"a": 3, "b": 2, "c": 1}[agent],))
        if self.odd == "nested":
            return Dict({"here": box, "there": box})
        if self.masks == "dict":
            return Dict({"observation": box, "action_mask": Box(0, 1, (3,), np.int8)})
        return box

    def action_space(self, agent):
        if self.odd == "unbounded":
            return Box(-np.inf, np.inf, (2,))
        if self.odd == "mixed" and agent == "a":
            return Box(-1, 1, (2,))
        if self.moves == "discrete":
            return Discrete({"a": 3, "b": 2, "c": 3}[agent], start=5 if agent == "a" else 0)
        size = 1 if agent == "b" else 2
        return Box(np.float32([-1, 0])[:size], np.float32([1, 4])[:size])

    def _see(self):
        views, infos = {}, {}
        for agent in self.agents:
            i = self.possible_agents.index(agent)
            view = np.full(3 - i, 10 * i + self.t, np.float32)
            mask = np.array([1, self.t % 2, 1])[: 3 - (agent == "b")]
            both = {"observation": view, "action_mask": mask}
            views[agent] = both if self.masks == "dict" else view
            infos[agent] = {"action_mask": mask} if self.masks == "info" else {}
        return views, infos

    def reset(self, seed=None, options=None):
        self.agents, self.t, self.seed, self.got = list(self.possible_agents), 0, seed, []
        views, infos = self._see()
        return ({"a": views["a"]} if self.odd == "joins" else views), infos

    def step(self, actions):
        self.got.append(actions)
        assert list(actions) == self.agents
        self.t += 1
        rewards = {agent: 1.0 + i for i, agent in enumerate(self.agents)}
        over = self.t >= self.length
        ended = {agent: agent == "c" and self.t == 2 or over and self.ends for agent in self.agents}
        cut = {agent: over and not self.ends for agent in self.agents}
        views, infos = self._see()
        self.agents = [agent for agent in self.agents if not (ended[agent] or cut[agent])]
        return views, rewards, ended, cut, infos

    def state(self):
        if not self.has_state:
            raise NotImplementedError
        return np.array([self.t, len(self.agents)])

    def close(self):
        self.agents = None


def vector(num_envs, device, wrong=False):
    import envs

    return envs.make("bridge", num_envs=num_envs + wrong, device=device)


nothing = 3
'''
STAY = torch.zeros(2, 3, dtype=torch.int64)


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy_games.py").write_text(GAMES)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))


def make(name="Toy", num_envs=2, **options):
    return envs.make(f"toy_games:{name}", num_envs=num_envs, **options)


# ---------------------------------------------------------------- a toy
def test_agents_of_different_shapes_are_padded():
    game = make()
    obs, info = game.reset(seed=0)
    assert obs[0].tolist() == [[0, 0, 0], [10, 10, 0], [20, 0, 0]] and obs.dtype == torch.float32
    assert info["state"].tolist() == [[0, 3], [0, 3]]
    wanted = [[True, False, True], [True, False, False], [True, False, True]]
    assert info["avail_actions"][0].tolist() == wanted
    assert make(state=False).reset(seed=0)[1]["state"].shape == (2, 9)


@pytest.mark.parametrize("masks", ["info", "dict", "none"])
def test_masks_are_found_wherever_they_are(masks):
    game = make(masks=masks)
    game.reset(seed=0)
    *_, info = game.step(STAY)
    assert info["avail_actions"][0, :2].tolist() == [[True] * 3, [True, True, False]]
    *_, info = game.step(STAY)
    assert info["avail_actions"][0, 0].tolist() == [True, masks == "none", True]


def test_the_dead_see_nothing_and_do_nothing():
    game = make(length=4, masks="none")
    game.reset(seed=0)
    for t in range(1, 5):
        obs, reward, ended, cut, info = game.step(torch.tensor([[0, 1, 2 * (t <= 2)]] * 2))
        if t >= 2:
            assert not obs[:, 2].any()
            assert info["avail_actions"][0, 2].tolist() == [True, False, False]
    got = game.games[0].got
    assert got[0] == {"a": 5, "b": 1, "c": 2} and list(got[-1]) == ["a", "b"]
    assert reward.tolist() == [3, 3] and ended.all() and not cut.any()
    obs, reward, ended, cut, _ = game.step(STAY)  # a finished game stays put
    assert not reward.any() and ended.all() and len(got) == 4


@pytest.mark.parametrize(
    "options, length, ended",
    [
        ({"length": 3}, 3, True),
        ({"length": 3, "ends": False}, 3, False),
        ({"length": 50, "time_limit": 4}, 4, False),
    ],
)
def test_termination_is_told_from_truncation(options, length, ended):
    film = play(make(**options), lambda obs, info, memory: (STAY, None), None, 0, film=True).film
    assert film["mask"].sum(1).tolist() == [length] * 2
    assert film["terminated"].any(1).tolist() == [ended] * 2


@pytest.mark.parametrize("how, rewards", [("sum", [6, 6, 3, 3, 3]), ("mean", [2, 2, 1, 1, 1])])
def test_rewards_are_summed_or_averaged(how, rewards):
    game = make(team_reward=how)
    game.reset(seed=0)
    assert [game.step(STAY)[1][0].item() for _ in range(5)] == rewards


def test_continuous_actions_are_stretched_to_their_bounds():
    game = make(moves="continuous")
    game.reset(seed=0)
    *_, info = game.step(torch.tensor([[[0.5, -1.0], [-1.0, 0.3], [1.0, 1.0]]] * 2))
    got = {agent: action.tolist() for agent, action in game.games[0].got[0].items()}
    assert got == {"a": [0.5, 0.0], "b": [-1.0], "c": [1.0, 4.0]}
    assert "avail_actions" not in info


def test_some_games_begin_anew_and_a_game_depends_on_its_number_only():
    game, other = make(num_envs=3), make(num_envs=2)
    game.reset(seed=7)
    other.reset(seed=7)
    assert len({toy.seed for toy in game.games}) == 3
    game.step(torch.zeros(3, 3, dtype=torch.int64))
    _, info = game.reset(options={"reset_mask": torch.tensor([False, False, True])})
    assert info["state"][:, 0].tolist() == [1, 1, 0]
    assert [toy.seed for toy in other.games] == [toy.seed for toy in game.games][:2]


@pytest.mark.parametrize(
    "name, options",
    [
        ("Toy", {"odd": "joins"}),
        ("Toy", {"odd": "nested"}),
        ("Toy", {"odd": "unbounded"}),
        ("Toy", {"odd": "mixed"}),
        ("Toy", {"speed": 3}),
        ("nothing", {}),
        ("vector", {"wrong": True}),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, options):
    with pytest.raises(ValueError, match=f"toy_games:{name}"):
        make(name, **options)


def test_a_vector_environment_of_our_interface_is_taken_as_it_is():
    game = make("vector", 5)
    assert type(game).__name__ == "Bridge" and game.num_envs == 5


# ---------------------------------------------------------------- real games
CHEETAH = {"scenario": "HalfCheetah", "agent_conf": "2x3", "agent_obsk": 1}
ROBOTICS = "gymnasium_robotics.envs.multiagent_mujoco.mamujoco_v1:parallel_env"
REAL = {
    "spread": ("mpe2.simple_spread_v3:parallel_env", {"N": 4}),
    "speaker": ("mpe2.simple_speaker_listener_v4:parallel_env", {"continuous_actions": True}),
    "tag": ("mpe2.simple_tag_v3:parallel_env", {}),
    "rock, paper, scissors": ("pettingzoo.classic.rps_v2:parallel_env", {}),
    "cheetah": (ROBOTICS, CHEETAH),
    "ant": (ROBOTICS, {"scenario": "Ant", "agent_conf": "4x2"}),
}


def draw(game, info, generator):
    """Random actions (B, N) or (B, N, A), available ones where there are masks."""
    if "avail_actions" not in info:
        return 2 * torch.rand(game.action_space.shape, generator=generator) - 1
    avail = info["avail_actions"]
    drawn = torch.multinomial(avail.flatten(0, 1).double(), 1, generator=generator)
    return drawn.view(avail.shape[:2])


def orders(one, actions):
    """What a library's game gets for our actions (N,) or (N, A)."""
    told = {}
    for i, agent in enumerate(one.possible_agents):
        space = one.action_space(agent)
        if isinstance(space, Discrete):
            told[agent] = int(space.start + actions[i])
        else:
            low, high = space.low.astype(float), space.high.astype(float)
            share = (actions[i, : len(low)].double().numpy() + 1) / 2
            told[agent] = (low + share * (high - low)).astype(space.dtype)
    return {agent: told[agent] for agent in one.agents}


@pytest.mark.parametrize("case", REAL)
def test_a_real_game_is_as_the_library_plays_it(case):
    """Beside our batch of one plays the library's, with the same seeds and actions."""
    name, options = REAL[case]
    module, _, function = name.partition(":")
    pytest.importorskip(module.partition(".")[0])
    alone = getattr(importlib.import_module(module), function)(**options)
    game, seeds = envs.make(name, num_envs=1, **options), []
    reset = game.games[0].reset
    game.games[0].reset = lambda seed=None, **more: (seeds.append(seed), reset(seed, **more))[1]
    generator = torch.Generator().manual_seed(0)
    obs, info = game.reset(seed=3)
    looks, _ = alone.reset(seed=seeds[-1])
    for _ in range(60):
        assert game.observation_space.contains(obs.numpy())
        for i, agent in enumerate(alone.possible_agents):
            seen = looks[agent]
            if isinstance(alone.observation_space(agent), Box):
                assert np.array_equal(obs[0, i, : seen.size].numpy(), seen.astype(np.float32))
                assert not obs[0, i, seen.size :].any()
        actions = draw(game, info, generator)
        obs, reward, ended, cut, info = game.step(actions)
        looks, rewards, gone, late, _ = alone.step(orders(alone, actions[0]))
        assert reward.item() == pytest.approx(sum(rewards.values()), abs=1e-4, rel=1e-5)
        assert (ended | cut).item() == (not alone.agents)
        if not alone.agents:
            assert cut.item() == any(late[agent] and not gone[agent] for agent in late)
            obs, info = game.reset(options={"reset_mask": ended | cut})
            looks, _ = alone.reset(seed=seeds[-1])
    game.close()
