"""Toys with PettingZoo's interface through envs/foreign.py: what becomes of each part of a game."""

import sys

import numpy as np
import pytest
import torch

import envs
from envs.rollout import play

GAMES = '''"""Toys with PettingZoo's interface, written without it."""

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete


class Toy:
    """Three agents count steps. "c" dies after two, the others leave or are cut off at the end."""

    possible_agents = ["a", "b", "c"]

    views = (3, 2, 1)

    def __init__(self, length=5, ends=True, masks="info", moves="discrete", state=True):
        self.length, self.ends, self.masks, self.moves = length, ends, masks, moves
        self.has_state = state

    def observation_space(self, agent):
        box = Box(-9, 9, (self.views[self.possible_agents.index(agent)],))
        if self.masks != "dict":
            return box
        return Dict({"observation": box, "action_mask": Box(0, 1, (3,), np.int8)})

    def action_space(self, agent):
        if self.moves == "discrete":
            return Discrete({"a": 3, "b": 2, "c": 3}[agent], start=5 if agent == "a" else 0)
        size = 2 - (agent == "b")
        return Box(np.float32([-1, 0])[:size], np.float32([1, 4])[:size])

    def _see(self):
        found, infos = {}, {}
        for agent in self.agents:
            i = self.possible_agents.index(agent)
            view = np.full(self.views[i], 10 * i + self.t, np.float32)
            mask = np.array([1, self.t % 2, 1][: 3 - (agent == "b")])
            both = {"observation": view, "action_mask": mask}
            found[agent] = both if self.masks == "dict" else view
            infos[agent] = {"action_mask": mask} if self.masks == "info" else {}
        return found, infos

    def reset(self, seed=None, options=None):
        self.agents, self.t, self.seed, self.got = list(self.possible_agents), 0, seed, []
        return self._see()

    def step(self, actions):
        self.got.append(actions)
        assert list(actions) == self.agents
        self.t += 1
        rewards = {agent: 1.0 + i for i, agent in enumerate(self.agents)}
        over = self.t >= self.length
        ended = {agent: agent == "c" and self.t == 2 or over and self.ends for agent in self.agents}
        cut = {agent: over and not self.ends for agent in self.agents}
        obs, infos = self._see()
        self.agents = [agent for agent in self.agents if not (ended[agent] or cut[agent])]
        return obs, rewards, ended, cut, infos

    def state(self):
        if not self.has_state:
            raise NotImplementedError
        return np.array([self.t, len(self.agents)])

    def close(self):
        self.agents = None


class Late(Toy):
    def reset(self, seed=None, options=None):
        obs, infos = super().reset(seed)
        return {"a": obs["a"]}, infos


class Wide(Toy):
    views = (3, 3, 3)
    view, move = Box(0, 1, (3,)), Box(-0.1, 0.3, (1,), np.float64)

    def __init__(self, view=None, move=None):
        super().__init__(moves="box", masks="none")
        views = {"image": Box(0, 1, (4, 4, 3)), "nested": Dict(here=Box(0, 1, (2,)))}
        moves = {"unbounded": Box(-np.inf, np.inf, (2,)), "compound": MultiDiscrete([2, 2])}
        self.view, self.move = views.get(view, self.view), moves.get(move, self.move)

    def observation_space(self, agent):
        return self.view

    def action_space(self, agent):
        return self.move


def vector(num_envs, device, wrong=False):
    import envs

    return envs.make("bridge", num_envs=num_envs + wrong, device=device)


def breaks():
    raise RuntimeError("no screen,\\n  no game")
'''


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy_games.py").write_text(GAMES)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


def make(name="Toy", num_envs=2, **options):
    return envs.make(f"toy_games:{name}", num_envs=num_envs, **options)


def rest(game):
    return torch.zeros(game.num_envs, 3, dtype=torch.int64)


@pytest.mark.parametrize("masks", ["info", "dict", "none"])
def test_agents_of_different_shapes_are_padded_and_masks_found(masks):
    game = make(masks=masks)
    obs, info = game.reset(seed=0)
    assert obs.shape == (2, 3, 3) and (game.num_agents, game.num_actions) == (3, 3)
    assert obs[0].tolist() == [[0, 0, 0], [10, 10, 0], [20, 0, 0]]
    assert info["state"].tolist() == [[0, 3], [0, 3]]
    free = masks == "none"  # agent b has two actions
    expected = [[True, free, True], [True, free, False], [True, free, True]]
    assert info["avail_actions"][0].tolist() == expected
    *_, info = game.step(rest(game))
    assert info["avail_actions"][0].tolist() == [[True] * 3, [True, True, False], [True] * 3]


def test_the_dead_see_nothing_and_do_nothing():
    game = make(length=4, masks="none")
    game.reset(seed=0)
    for t in range(1, 5):
        obs, reward, ended, cut, info = game.step(torch.tensor([[0, 1, 2 * (t <= 2)]] * 2))
        if t >= 2:
            assert not obs[:, 2].any()
            assert info["avail_actions"][0, 2].tolist() == [True, False, False]
    assert obs[0, :2].tolist() == [[4, 4, 4], [14, 14, 0]]  # the last ones' last views are kept
    got = game.games[0].got
    assert got[0] == {"a": 5, "b": 1, "c": 2} and list(got[-1]) == ["a", "b"]
    assert reward.tolist() == [3, 3] and ended.all() and not cut.any()
    _, reward, ended, cut, _ = game.step(rest(game))  # a finished game stays put
    assert not reward.any() and ended.all() and not cut.any() and len(got) == 4


@pytest.mark.parametrize("options, length, ended", [
    ({"length": 3}, 3, True), ({"length": 3, "ends": False}, 3, False),
    ({"length": 50, "time_limit": 4}, 4, False),
])  # fmt: skip
def test_termination_is_told_from_truncation(options, length, ended):
    game = make(**options)
    film = play(game, lambda obs, info, memory: (rest(game), None), seed=0, film=True).film
    assert film["mask"].sum(1).tolist() == [length] * 2
    assert film["terminated"].any(1).tolist() == [ended] * 2


@pytest.mark.parametrize("how, sums", [("sum", [6, 6, 3, 3, 3]), ("mean", [2, 2, 1, 1, 1])])
def test_rewards_are_summed_or_averaged(how, sums):
    game = make(team_reward=how)
    game.reset(seed=0)
    assert [game.step(rest(game))[1][0].item() for _ in range(5)] == sums


def test_continuous_actions_are_stretched_to_their_bounds():
    game = make(moves="continuous")
    game.reset(seed=0)
    game.step(torch.tensor([[[0.5, -1.0], [-1.0, 7], [1.0, 1.0]]] * 2))  # b has one number, not two
    got = game.games[0].got[0]
    assert got["a"].tolist() == [0.5, 0.0] and got["b"].tolist() == [-1.0]
    assert got["c"].tolist() == [1.0, 4.0]
    for wrong in (1.5, float("nan")):
        with pytest.raises(ValueError, match="game 0, agent 0: action .* is not in"):
            game.step(torch.full((2, 3, 2), wrong))
    edge = make("Wide")._played(0, np.ones(1, "f"))
    assert edge.dtype == np.float64 and edge <= 0.3  # not left by rounding


def test_without_a_state_it_is_all_views():
    game = make(state=False)
    obs, info = game.reset(seed=0)
    assert torch.equal(info["state"], obs.flatten(1)) and game.state_dim == 9


def test_some_games_begin_anew_and_seeds_differ():
    game, other = make(num_envs=3), make(num_envs=3)
    for batch in (game, other):
        batch.reset(seed=7)
    assert len({toy.seed for toy in game.games}) == 3
    game.step(rest(game))
    obs, info = game.reset(options={"reset_mask": torch.tensor([True, False, False])})
    assert info["state"][:, 0].tolist() == [0, 1, 1]
    assert [toy.seed for toy in other.games][1:] == [toy.seed for toy in game.games][1:]


@pytest.mark.parametrize("name, options, said", [
    ("Late", {}, "the agent b is not there from the start"),
    ("Wide", {"view": "image"}, "flatten them first"), ("Wide", {"view": "nested"}, "are a Dict"),
    ("Wide", {"move": "unbounded"}, "no bounds"), ("Wide", {"move": "compound"}, "neither all"),
    ("Toy", {"speed": 3}, "speed"), ("breaks", {}, "RuntimeError: no screen, no game"),
    ("absent", {}, "has no function 'absent'"), ("Toy", {"team_reward": "most"}, "team_reward"),
    ("vector", {"wrong": True}, "3 games in place of 2"), ("Toy", {"time_limit": 0}, "time_limit"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(name, options, said):
    with pytest.raises(ValueError) as error:
        make(name, **options)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_vector_environment_of_our_interface_is_taken_as_it_is():
    game = make("vector", 5)
    assert type(game).__name__ == "Bridge" and game.num_envs == 5
    with pytest.raises(ValueError, match="No module named 'no_such'"):
        envs.make("no_such:factory")
