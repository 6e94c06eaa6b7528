"""Other people's games behind our interface: what the adapter does with them, and what it refuses."""

import importlib
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, command, complains
from gymnasium.spaces import Box, Dict, Discrete

import envs
from data import Dataset
from data.recorder import record_team
from envs.play import play

GAMES = '''"""Toys with PettingZoo's interface, written without it."""

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete


class Toy:
    """Three agents count steps; agent "c" dies after two, the others leave after `length`, or are cut off there."""

    possible_agents = ["a", "b", "c"]

    def __init__(self, length=5, ends=True, masks="info", moves="discrete", views=(3, 2, 1), state=True):
        self.length, self.ends, self.masks, self.moves = length, ends, masks, moves
        self.views, self.has_state = views, state

    def observation_space(self, agent):
        box = Box(-9, 9, (self.views[self.possible_agents.index(agent)],))
        return Dict({"observation": box, "action_mask": Box(0, 1, (3,), np.int8)}) if self.masks == "dict" else box

    def action_space(self, agent):
        if self.moves == "discrete":
            return Discrete({"a": 3, "b": 2, "c": 3}[agent], start=5 if agent == "a" else 0)
        return Box(np.float32([-1, 0])[: 2 - (agent == "b")], np.float32([1, 4])[: 2 - (agent == "b")])

    def _see(self):
        found, infos = {}, {}
        for agent in self.agents:
            i = self.possible_agents.index(agent)
            view = np.full(self.views[i], 10 * i + self.t, np.float32)
            mask = np.array([1, self.t % 2, 1][: 3 - (agent == "b")])
            found[agent] = {"observation": view, "action_mask": mask} if self.masks == "dict" else view
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


class Joins(Toy):
    def reset(self, seed=None, options=None):
        obs, infos = super().reset(seed)
        return {"a": obs["a"]}, infos


class Images(Toy):
    def observation_space(self, agent):
        return Box(0, 1, (4, 4, 3))


class Nested(Toy):
    def observation_space(self, agent):
        return Dict({"here": Box(0, 1, (2,)), "there": Box(0, 1, (2,))})


class Unbounded(Toy):
    def action_space(self, agent):
        return Box(-np.inf, np.inf, (2,))


class Mixed(Toy):
    def action_space(self, agent):
        return Discrete(2) if agent == "a" else Box(-1, 1, (2,))


def vector(num_envs, device, wrong=False):
    import envs

    return envs.make("bridge", num_envs=num_envs + wrong, device=device)


class Wide(Toy):
    def __init__(self):
        super().__init__(moves="box", masks="none")

    def action_space(self, agent):
        return Box(-0.1, 0.3, (1,), np.float64)


def fails(a):
    return Toy()


def breaks():
    return len(None)


nothing = 3
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


def test_agents_of_different_shapes_are_padded():
    game = make()
    obs, info = game.reset(seed=0)
    assert obs.dtype == torch.float32 and obs.shape == (2, 3, 3) and (game.num_agents, game.num_actions) == (3, 3)
    assert obs[0].tolist() == [[0, 0, 0], [10, 10, 0], [20, 0, 0]]
    assert info["state"].tolist() == [[0, 3], [0, 3]] and info["avail_actions"].dtype == torch.bool
    assert info["avail_actions"][0].tolist() == [[True, False, True], [True, False, False], [True, False, True]]


@pytest.mark.parametrize("masks", ["info", "dict", "none"])
def test_masks_are_found_wherever_they_are(masks):
    game = make(masks=masks)
    _, info = game.reset(seed=0)
    *_, info = game.step(torch.zeros(2, 3, dtype=torch.int64))
    assert info["avail_actions"][0, 0].all() and info["avail_actions"][0, 1].tolist() == [True, True, False]
    *_, info = game.step(torch.zeros(2, 3, dtype=torch.int64))
    assert info["avail_actions"][0, 0].tolist() == [True, masks == "none", True]


def test_the_dead_see_nothing_and_do_nothing():
    game = make(length=4, masks="none")
    game.reset(seed=0)
    for t in range(1, 5):
        obs, reward, ended, cut, info = game.step(torch.tensor([[0, 1, 2 * (t <= 2)]] * 2))
        if t >= 2:
            assert not obs[:, 2].any() and info["avail_actions"][0, 2].tolist() == [True, False, False]
    assert game.games[0].got[0] == {"a": 5, "b": 1, "c": 2} and list(game.games[0].got[-1]) == ["a", "b"]
    assert reward.tolist() == [3, 3] and ended.all() and not cut.any()
    obs, reward, ended, cut, _ = game.step(torch.zeros(2, 3, dtype=torch.int64))  # a finished game stays put
    assert not reward.any() and ended.all() and not cut.any() and len(game.games[0].got) == 4


@pytest.mark.parametrize("options, length, ended", [
    ({"length": 3}, 3, True), ({"length": 3, "ends": False}, 3, False), ({"length": 50, "time_limit": 4}, 4, False),
])  # fmt: skip
def test_termination_is_told_from_truncation(options, length, ended):
    game = make(**options)
    played = play(game, lambda obs, info, memory: (torch.zeros(2, 3, dtype=torch.int64), None), None, 0, film=True)
    assert played.film["mask"].sum(1).tolist() == [length] * 2
    assert played.film["terminated"].any(1).tolist() == [ended] * 2


@pytest.mark.parametrize("how, sums", [("sum", [6, 6, 3, 3, 3]), ("mean", [2, 2, 1, 1, 1])])
def test_rewards_are_summed_or_averaged(how, sums):
    game = make(team_reward=how)
    game.reset(seed=0)
    assert [game.step(torch.zeros(2, 3, dtype=torch.int64))[1][0].item() for _ in range(5)] == sums


def test_continuous_actions_are_stretched_to_their_bounds():
    game = make(moves="continuous")
    game.reset(seed=0)
    game.step(torch.tensor([[[0.5, -1.0], [-1.0, 0.3], [1.0, 1.0]]] * 2))
    got = game.games[0].got[0]
    assert got["a"].tolist() == [0.5, 0.0] and got["b"].tolist() == [-1.0] and got["c"].tolist() == [1.0, 4.0]
    assert "avail_actions" not in game.step(torch.zeros(2, 3, 2))[-1]


def test_without_a_state_it_is_all_views():
    game = make(state=False)
    obs, info = game.reset(seed=0)
    assert torch.equal(info["state"], obs.flatten(1)) and game.state_dim == 9


def test_some_games_begin_anew_and_seeds_differ():
    game = make(num_envs=3)
    game.reset(seed=7)
    assert len({toy.seed for toy in game.games}) == 3
    game.step(torch.zeros(3, 3, dtype=torch.int64))
    obs, info = game.reset(options={"reset_mask": torch.tensor([True, False, False])})
    assert info["state"][:, 0].tolist() == [0, 1, 1]
    other = make(num_envs=3)
    other.reset(seed=7)
    assert [toy.seed for toy in other.games][1:] == [toy.seed for toy in game.games][1:]


@pytest.mark.parametrize("name, options, said", [
    ("Joins", {}, "is not there from the start"), ("Images", {}, "flatten them first"),
    ("Nested", {}, "its observations are a Dict"), ("Unbounded", {}, "its actions have no bounds"),
    ("Mixed", {}, "neither all Discrete nor all"), ("Toy", {"speed": 3}, "does not take ['speed'] arguments"),
    ("fails", {}, "does not take no arguments"), ("breaks", {}, "fails (TypeError: object of type"), ("nothing", {}, "has no function 'nothing'"),
    ("absent", {}, "has no function 'absent'"), ("Toy", {"team_reward": "most"}, "team_reward must be sum or mean"),
    ("vector", {"wrong": True}, "has 3 games in place of 2"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(name, options, said):
    with pytest.raises(ValueError) as error:
        make(name, **options)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_vector_environment_of_our_interface_is_taken_as_it_is():
    game = make("vector", 5)
    assert type(game).__name__ == "Bridge" and game.num_envs == 5


def test_a_toy_is_recorded_cloned_and_played(toys, tmp_path):
    words = ("--env", "toy_games:Toy", "--env-kwargs", '{"length": 6}', "--team-reward", "mean")
    options = {"cwd": toys, "capture_output": True, "text": True}
    import subprocess

    def run(*more):
        return subprocess.run([sys.executable, *map(str, more)], **options)

    done = run(ROOT / "data" / "collect.py", *words, "--episodes", 20, "--out", tmp_path / "toy.h5")
    assert done.returncode == 0, done.stderr
    more = ("--dataset", tmp_path / "toy.h5", "--steps", 20, "--eval-every", 10, "--num-seeds", 2, "--eval-episodes", 2)
    done = run(ROOT / "algorithms" / "bc.py", *words, *more, "--out-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = run(ROOT / "algorithms" / "bc.py", *words[:4], *more, "--out-dir", tmp_path / "other")
    complains(done, "holds the mean of the agents' rewards: add --team-reward mean")
    more = ("--team", tmp_path / "run", "--noise", 0.2, "--episodes", 5, "--out", tmp_path / "more.h5")
    done = run(ROOT / "data" / "collect.py", *words, *more)
    assert done.returncode == 0, done.stderr


def test_neighbouring_seeds_share_no_games():
    one, other = (record_team("reacher", "independent", "random", 40, seed=seed) for seed in (0, 1))
    starts = {tuple(row) for row in one.state[:, 0].tolist()} & {tuple(row) for row in other.state[:, 0].tolist()}
    assert not starts and len(one.state) == 40


def test_a_team_that_does_not_fit_is_one_line(toys, tmp_path):
    run = ("--env", "matrix", "--steps", 2, "--eval-episodes", 1, "--num-seeds", 1, "--out-dir", tmp_path / "run")
    assert command("algorithms/bc.py", *run).returncode == 0
    done = command("data/collect.py", "--env", "bridge", "--team", tmp_path / "run", "--out", tmp_path / "x.h5")
    complains(done, "the team does not fit this environment")
    done = command(
        "data/collect.py", "--env", "bridge", "--team", "random", "--dataset", "optimal", "--out", tmp_path / "x.h5"
    )
    complains(done, "--dataset optimal names a behaviour: here --team says who plays")
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize("env, options", [
    ("bridge", {"time_limit": 0}), ("bridge", {"time_limit": 2.5}), ("reacher", {"time_limit": "x"}),
    ("reacher", {"time_limit": True}), ("reacher", {"limits": 5}), ("smac", {"noise": "x"}),
    ("toy_games:Toy", {"time_limit": True}),
])  # fmt: skip
def test_options_of_a_wrong_kind_are_refused(env, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        envs.make(env, **options)


@pytest.mark.parametrize("env", ["bridge", "reacher", "toy_games:Toy"])
def test_a_reset_mask_that_is_none_is_refused(env):
    game = envs.make(env, num_envs=3)
    game.reset(seed=0)
    for mask in (torch.tensor([0, 2]), [True], torch.ones(3)):
        with pytest.raises(ValueError, match="reset_mask must be 3 bools"):
            game.reset(options={"reset_mask": mask})
    game.reset(options={"reset_mask": [True, False, True]})


def test_float64_boxes_are_not_left_by_rounding():
    game = make("Wide")
    played = game.played(0, np.ones(1))
    assert played.dtype == np.float64 and played <= 0.3


def test_a_missing_module_is_one_line():
    complains(command("algorithms/bc.py", "--env", "no_such_module:factory", "--dataset", "x.h5"), "no_such_module")


# ---------------------------------------------------------------- real games
REAL = [
    ("mpe2.simple_spread_v3:parallel_env", {}),
    ("mpe2.simple_spread_v3:parallel_env", {"continuous_actions": True, "N": 4}),
    ("mpe2.simple_speaker_listener_v4:parallel_env", {}),
    ("mpe2.simple_tag_v3:parallel_env", {}),
    ("mpe2.simple_reference_v3:parallel_env", {}),
    ("mpe2.simple_world_comm_v3:parallel_env", {}),
    ("pettingzoo.sisl.multiwalker_v9:parallel_env", {}),
    ("gymnasium_robotics:mamujoco_v1.parallel_env", {"scenario": "HalfCheetah", "agent_conf": "2x3", "agent_obsk": 1}),
]


@pytest.mark.parametrize("name, options", REAL)
def test_real_games_keep_the_contract_for_a_thousand_steps(name, options):
    try:
        importlib.import_module(name.partition(":")[0])
    except ImportError as error:
        pytest.skip(f"only where it is installed: {error}")
    B = 2
    game = envs.make(name, num_envs=B, **options)
    N, A, width, D = game.num_agents, game.num_actions, game.obs_dim, game.state_dim
    generator, (obs, info) = torch.Generator().manual_seed(0), game.reset(seed=0)
    for t in range(1000):
        assert obs.dtype == torch.float32 and obs.shape == (B, N, width) and obs.isfinite().all()
        assert info["state"].dtype == torch.float32 and info["state"].shape == (B, D)
        if "avail_actions" in info:
            avail = info["avail_actions"]
            assert avail.dtype == torch.bool and avail.shape == (B, N, A) and avail.any(-1).all()
            actions = torch.multinomial(avail.flatten(0, 1).double(), 1, generator=generator).view(B, N)
        else:
            actions = 2 * torch.rand(B, N, A, generator=generator) - 1
        obs, reward, ended, cut, info = game.step(actions)
        assert reward.dtype == torch.float32 and reward.shape == (B,) and reward.isfinite().all()
        assert ended.dtype == cut.dtype == torch.bool and not (ended & cut).any()
        if (ended | cut).any():
            obs, info = game.reset(seed=t, options={"reset_mask": ended | cut})
    game.close()


@pytest.mark.parametrize("name, options", REAL[:3])
def test_real_games_repeat_themselves(name, options):
    pytest.importorskip(name.partition(".")[0])
    one, other = (record_team(name, "", "random", 3, seed=4, options=options) for _ in range(2))
    assert isinstance(one, Dataset) and torch.equal(one.obs, other.obs) and torch.equal(one.reward, other.reward)


def test_spaces_of_numbers_become_one_array():
    from envs.foreign import Games

    assert Games.view_of(None, Discrete(4)).n == 4
    assert Games.view_of(None, Dict({"observation": Box(0, 1, (2,)), "action_mask": Box(0, 1, (3,))})).shape == (2,)
    assert np.asarray(Games.view_of(None, Box(0, 1, (5,))).shape) == 5
