"""The adapter to the real StarCraft II, against a stand-in for the package `smac`.

The stand-in fights by tiny rules that make every ending easy to reach, and asserts what SMAC
asserts. Each worker takes seconds to start.
"""

import os

import pytest
import torch

import envs
from envs.sc2 import StarCraft2

# 3 agents, 2 enemies with 2 health each, at most 6 steps. Actions: 0 nothing, 1 stop, 3 kills the
# agent itself, 5 loses the connection, 6 + j takes 1 health off enemy j; 2 and 4 are impossible.
STAND_IN = """
import os
import numpy as np
class StarCraft2Env:
    def __init__(self, map_name="8m", seed=None, continuing_episode=False):
        if map_name != "3m":
            raise KeyError(map_name)
        self.seed, self.games, self.over, self.tell = seed or 0, 0, True, continuing_episode
    def get_env_info(self):
        return dict(state_shape=7, obs_shape=5, n_actions=8, n_agents=3, episode_limit=6)
    def reset(self):
        self.games, self.steps, self.over = self.games + 1, 0, False
        self.agents, self.enemies = [1] * 3, [2] * 2
    def get_obs(self):
        first = [self.seed, self.games, self.steps]
        return [np.array([*first, n, alive]) for n, alive in enumerate(self.agents)]  # float64
    def get_state(self):
        return np.array([*self.agents, *self.enemies, self.steps, os.getpid() % 10000])
    def get_avail_actions(self):
        mine = [0, 1, 0, 1, 0, 1, *(int(health > 0) for health in self.enemies)]
        return [mine if alive else [1] + [0] * 7 for alive in self.agents]
    def step(self, actions):
        assert not self.over, "the game is over"
        assert all(avail[a] == 1 for avail, a in zip(self.get_avail_actions(), actions))
        self.steps += 1
        if 5 in actions:
            return 0, True, {}
        self.agents = [int(alive and a != 3) for alive, a in zip(self.agents, actions)]
        for j in (0, 1):
            self.enemies[j] = max(0, self.enemies[j] - actions.count(6 + j))
        fallen = not any(self.agents), not any(self.enemies)
        self.over = any(fallen) or self.steps >= 6
        info = {"battle_won": fallen == (False, True)}
        if self.over and not any(fallen) and self.tell:
            info["episode_limit"] = True
        return sum(a >= 6 for a in actions) + 10 * info["battle_won"], self.over, info
"""
WAIT, FALL, SPLIT = [1, 1, 1], [3, 3, 3], [6, 7, 1]


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sc2")
    (folder / "smac").mkdir()
    (folder / "smac" / "env.py").write_text(STAND_IN)
    (folder / "Versions").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("SC2PATH", str(folder))
        env = envs.make("smac", "3m", num_envs=3, backend="sc2")
        yield env
        env.close()


def play(env, *steps):
    return [env.step(torch.tensor(actions).expand(3, 3)) for actions in steps][-1]


def test_battles_of_three_processes(games):
    assert type(games) is StarCraft2 and games.time_limit == 6
    obs, info = games.reset(seed=7)
    assert obs[:, 0, 0].tolist() == [7, 8, 9] and games.observation_space.contains(obs.numpy())
    assert games.reset(seed=1)[0][:, 0, 0].tolist() == [7, 8, 9]  # SMAC ignores later seeds
    assert len({os.getpid() % 10000, *info["state"][:, 6].tolist()}) == 4
    _, reward, _, _, info = play(games, [[6, 1, 1], [6, 7, 1], [1, 3, 7]])
    assert reward.tolist() == [1, 2, 1] and reward.dtype == torch.float32
    assert info["state"][2, :6].tolist() == [1, 0, 1, 2, 1, 1]
    assert info["avail_actions"][2, 1].tolist() == [True] + [False] * 7


STEPS = [[SPLIT] * 2, [FALL], [WAIT] * 6, [WAIT] * 4 + [SPLIT] * 2, [WAIT] * 5 + [FALL]]
ENDS = [(True, True, 12), (True, False, 0), (False, False, 0), (True, True, 12), (True, False, 0)]


@pytest.mark.parametrize("steps, end", zip(STEPS, ENDS))
def test_endings(games, steps, end):
    games.reset()
    _, paid, ended, cut, info = play(games, *steps)
    told = zip(ended.tolist(), info["won"].tolist(), paid.tolist())
    assert list(told) == [end] * 3 and torch.equal(cut, ~ended)


def test_a_finished_game_stays_put_and_restarts_by_the_mask(games):
    games.reset()
    with pytest.raises(ValueError, match="game 1, agent 2: action 2 is not available"):
        play(games, [WAIT, [1, 1, 2], WAIT])  # no game moves
    obs, _, terminated, _, _ = play(games, [SPLIT, FALL, WAIT], [SPLIT, [99] * 3, WAIT])
    assert terminated.tolist() == [True, True, False]
    after = play(games, [[99] * 3, [-1] * 3, SPLIT])  # the stand-in refuses steps of finished games
    assert after[1].tolist() == [0, 0, 2] and torch.equal(after[0][:2], obs[:2])
    begun, _ = games.reset(options={"reset_mask": torch.tensor([False, True, False])})
    assert begun[:, 0, 2].tolist() == [2, 0, 3]
    _, reward, terminated, truncated, _ = play(games, SPLIT)
    assert reward.tolist() == [0, 2, 12] and terminated.tolist() == [True, False, True]


def test_without_the_game_one_line_says_what_to_install(games, monkeypatch):
    with pytest.raises(ValueError, match="KeyError: '8m': this needs `pip install git.*SC2PATH"):
        envs.make("smac", "8m", backend="sc2")
    monkeypatch.delenv("SC2PATH")
    with pytest.raises(ValueError, match="pip install git.*4.10.*SC2PATH"):
        envs.make("smac", "3m", backend="sc2")


def test_a_lost_connection_ends_all_games_with_one_line(games):  # the last test that plays on them
    games.reset()
    with pytest.raises(ConnectionError, match="StarCraft II, game 1 failed: OSError.*is lost"):
        play(games, [WAIT, [1, 1, 5], WAIT])
