"""The adapter to the real StarCraft II, against a stand-in for the package `smac` with the same methods.

The game itself needs gigabytes and a licence, so it is not here. The stand-in fights by tiny rules that make every
ending easy to reach, asserts what SMAC asserts, and leaves a line in a log when a game starts and when it is closed.
Each worker imports torch, which takes seconds; so most tests share three of them.
"""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import gymnasium
import pytest
import torch
from conftest import ROOT

import envs
from data import runs
from envs.sc2 import StarCraft2

# 3 agents, 2 enemies with 2 health each, at most 6 steps. Actions: 0 nothing, 1 stop, 2 north is never possible,
# 3 south kills the agent itself, 4 east does nothing, 5 west loses the connection, 6 + j takes 1 health off enemy j.
STAND_IN = """
import atexit
import os
import numpy as np

N, M, LIMIT, MAPS = 3, 2, 6, ("5m_vs_6m", "3m")


def log(word):
    with open(os.path.join(os.environ["SC2PATH"], "log"), "a") as file:
        file.write(f"{word} {os.getpid()}\\n")


class StarCraft2Env:
    def __init__(self, map_name="8m", seed=None, continuing_episode=False):
        if map_name not in MAPS:
            raise KeyError(map_name)
        self.seed, self.games, self.over, self.tell = seed, 0, True, continuing_episode
        atexit.register(lambda: self.close())

    def get_env_info(self):
        return {"state_shape": 7, "obs_shape": 5, "n_actions": 6 + M, "n_agents": N, "episode_limit": LIMIT}

    def reset(self):
        if self.games == 0:
            if not os.path.isdir(os.path.join(os.environ["SC2PATH"], "Maps")):
                raise FileNotFoundError("no map\\nsecond line")
            log("start")
        self.games, self.steps, self.over = self.games + 1, 0, False
        self.agents, self.enemies = [1] * N, [2] * M
        return self.get_obs(), self.get_state()

    def get_obs(self):
        assert self.games, "no game yet"
        seed = -1 if self.seed is None else self.seed
        return [np.array([seed, self.games, self.steps, n, alive]) for n, alive in enumerate(self.agents)]  # float64

    def get_state(self):
        return np.array([*self.agents, *self.enemies, self.steps, os.getpid() % 10000], dtype=np.float32)

    def get_avail_actions(self):
        attack = [int(health > 0) for health in self.enemies]
        return [[0, 1, 0, 1, 1, 1, *attack] if alive else [1] + [0] * (5 + M) for alive in self.agents]

    def step(self, actions):
        assert not self.over, "the game is over"
        assert type(actions) is list and all(type(a) is int for a in actions)
        for avail, action in zip(self.get_avail_actions(), actions):
            assert avail[action] == 1, "illegal action"
        self.steps += 1
        if 5 in actions:
            return 0, True, {}
        for n, action in enumerate(actions):
            if action == 3:
                self.agents[n] = 0
            if action >= 6:
                self.enemies[action - 6] = max(0, self.enemies[action - 6] - 1)
        won = any(self.agents) and not any(self.enemies)
        lost = not any(self.agents[:2]) and any(self.enemies)  # agent 2 cannot fight on alone, like a Medivac
        self.over = lost or not any(self.agents) or not any(self.enemies) or self.steps >= LIMIT
        info = {"battle_won": won}
        if self.over and not (won or lost) and any(self.agents) and self.tell:
            info["episode_limit"] = True
        return sum(a >= 6 for a in actions) + 10 * won, self.over, info

    def close(self):
        if self.games:
            log("close")
        self.games = 0
"""
STOP, SOUTH, WEST, HIT, HIT_OTHER = 1, 3, 5, 6, 7
WAIT = [STOP] * 3


def install(folder, env="from smac.env.starcraft2 import StarCraft2Env", module=STAND_IN, init=""):
    """A package `smac` and a folder that looks like StarCraft II, both under `folder`."""
    package = folder / "smac" / "env"
    package.mkdir(parents=True)
    (folder / "smac" / "__init__.py").write_text(init)
    (package / "__init__.py").write_text(env)
    (package / "starcraft2.py").write_text(module)
    (folder / "game" / "Versions").mkdir(parents=True)
    (folder / "game" / "Maps").mkdir()
    return folder


@contextmanager
def no_smac():
    """Forget the package `smac` that was imported, for a while."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "smac"}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "smac"]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The stand-in on the parent's path, which spawned workers inherit."""
    folder = install(tmp_path_factory.mktemp("sc2"))
    with pytest.MonkeyPatch.context() as patch, no_smac():
        patch.syspath_prepend(folder)
        patch.setenv("SC2PATH", str(folder / "game"))
        yield folder


@pytest.fixture(scope="module")
def shared(place):
    """Three games that most tests play on."""
    started = place / "game" / "log"  # tests that play on games of their own may have come before
    before = started.exists() and started.read_text()
    env = StarCraft2(num_envs=3)
    assert (started.exists() and started.read_text()) == before  # no game has started yet
    env.first = env.reset(seed=7)
    yield env
    env.close()


@pytest.fixture
def games(shared):
    shared.reset()
    return shared


def pids(env):
    return [worker.submit(os.getpid).result() for worker in env.workers]


def log(place, word):
    path = place / "game" / "log"
    return {int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(word)}


def play(env, *steps):
    """Step all games with each of the given joint actions, (N,) for all games or (B, N); returns the last result."""
    for actions in steps:
        result = env.step(torch.tensor(actions).expand(env.num_envs, env.num_agents))
    return result


def test_is_a_gymnasium_vector_environment(games):
    assert isinstance(games, gymnasium.vector.VectorEnv)
    assert games.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.DISABLED
    assert (games.num_agents, games.num_actions, games.obs_dim, games.state_dim, games.time_limit) == (3, 8, 5, 7, 6)
    for obs, reward, terminated, truncated, info in [
        (games.first[0], None, None, None, games.first[1]),
        play(games, WAIT),
    ]:
        assert obs.shape == (3, 3, 5) and obs.dtype == torch.float32 and games.observation_space.contains(obs.numpy())
        assert info["state"].shape == (3, 7) and info["state"].dtype == torch.float32
        assert info["avail_actions"].shape == (3, 3, 8) and info["avail_actions"].dtype == torch.bool
        assert info["won"].shape == (3,) and info["won"].dtype == torch.bool
    assert reward.shape == (3,) and reward.dtype == torch.float32
    assert terminated.shape == truncated.shape == (3,) and terminated.dtype == truncated.dtype == torch.bool


def test_the_first_seed_counts_and_later_ones_are_ignored(games):
    assert games.first[0][:, 0, 0].tolist() == [7, 8, 9]
    assert games.reset(seed=1)[0][:, 0, 0].tolist() == [7, 8, 9]


def test_each_game_has_its_own_process_and_its_own_battle(games):
    _, reward, _, _, info = play(games, [[HIT, STOP, STOP], [HIT, HIT_OTHER, STOP], [STOP, SOUTH, HIT_OTHER]])
    a, b, c = pids(games)
    assert len({os.getpid(), a, b, c}) == 4
    assert info["state"].tolist() == [
        [1, 1, 1, 1, 2, 1, a % 10000],
        [1, 1, 1, 1, 1, 1, b % 10000],
        [1, 0, 1, 2, 1, 1, c % 10000],
    ]
    assert reward.tolist() == [1, 2, 1]
    assert info["avail_actions"][2].int().tolist() == [
        [0, 1, 0, 1, 1, 1, 1, 1],
        [1] + [0] * 7,
        [0, 1, 0, 1, 1, 1, 1, 1],
    ]


FALL = [[SOUTH] * 3]  # all agents at once
SPLIT = [HIT, HIT_OTHER, STOP]  # each enemy loses 1


@pytest.mark.parametrize(
    "steps, terminated, truncated, won, reward",
    [
        ([SPLIT, SPLIT], True, False, True, 12),
        (FALL, True, False, False, 0),
        ([[SOUTH, SOUTH, STOP]], True, False, False, 0),  # lost with a survivor
        ([WAIT] * 6, False, True, False, 0),
        ([WAIT] * 4 + [SPLIT] * 2, True, False, True, 12),  # won in the last step
        ([WAIT] * 5 + FALL, True, False, False, 0),  # lost in the last step
        ([[SOUTH, STOP, STOP]] + [[0, STOP, STOP]] * 5, False, True, False, 0),  # out of time with losses
        ([SPLIT, [SOUTH, STOP, HIT], [0, SOUTH, HIT_OTHER]], True, False, True, 11),  # one survivor wins
        ([SPLIT] + [WAIT] * 4 + [[SOUTH, SOUTH, SOUTH]], True, False, False, 0),
        ([WAIT] * 5, False, False, False, 0),
    ],
)
def test_endings(games, steps, terminated, truncated, won, reward):
    result = play(games, *steps)
    assert result[2].tolist() == [terminated] * 3 and result[3].tolist() == [truncated] * 3
    assert result[4]["won"].tolist() == [won] * 3 and result[1].tolist() == [reward] * 3


def test_a_finished_game_stays_put_and_restarts_by_the_mask(games):
    first = play(games, [SPLIT, [SOUTH] * 3, WAIT])
    obs, reward, terminated, truncated, info = play(games, [SPLIT, [99] * 3, WAIT])
    assert terminated.tolist() == [True, True, False] and info["won"].tolist() == [True, False, False]
    # 99 is ignored, as the stand-in would refuse any step of a finished game
    for pid in pids(games):
        os.kill(pid, signal.SIGINT)  # nor does a Ctrl-C reach them
    after = play(games, [[99] * 3, [-1] * 3, SPLIT])
    assert after[1].tolist() == [0, 0, 2] and after[2].tolist() == [True, True, False]
    assert torch.equal(after[0][:2], obs[:2]) and torch.equal(after[4]["state"][:2], info["state"][:2])
    assert torch.equal(after[0][1], first[0][1]) and after[0][2, 0, 2] == 3
    assert after[4]["won"].tolist() == [True, False, False]

    episode = after[0][:, 0, 1]
    obs, info = games.reset(options={"reset_mask": torch.tensor([False, True, False])})
    assert (obs[:, 0, 1] - episode).tolist() == [0, 1, 0] and obs[:, 0, 2].tolist() == [2, 0, 3]
    assert info["won"].tolist() == [True, False, False]
    _, reward, terminated, truncated, _ = play(games, SPLIT)
    assert reward.tolist() == [0, 2, 12] and terminated.tolist() == [True, False, True] and not truncated.any()


def test_what_a_step_returned_does_not_change_later(games):
    obs, _, _, _, info = play(games, WAIT)
    before = obs.clone(), info["state"].clone()
    play(games, SPLIT)
    assert torch.equal(obs, before[0]) and torch.equal(info["state"], before[1])


@pytest.mark.parametrize("action", [0, 2, 8, -1])
def test_an_illegal_action_is_named_and_no_game_moves(games, action):
    with pytest.raises(ValueError, match=f"^game 1, agent 2: action {action} is not available$"):
        play(games, [WAIT, [STOP, STOP, action], WAIT])
    assert play(games, WAIT)[0][:, 0, 2].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="actions must be integers of shape"):
        games.step(torch.zeros(3, 2, dtype=torch.int64))


def gone(pid):
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_game_that_does_not_start_ends_with_one_line(place, capfd):
    env = StarCraft2("3m")
    (place / "game" / "Maps").rmdir()
    with pytest.raises(ConnectionError, match=r"^StarCraft II, game 0 failed: FileNotFoundError\('no map.*'\)$"):
        env.reset()
    (place / "game" / "Maps").mkdir()
    with pytest.raises(ConnectionError, match="^StarCraft II, game 0 failed: .*after shutdown"):
        env.reset()
    assert capfd.readouterr() == ("", "")  # no traceback from the worker


def test_close_ends_the_workers_and_their_games(place, capfd):
    env = StarCraft2(num_envs=2)
    obs, info = env.reset(options={"reset_mask": torch.tensor([False, True])})  # game 0 does not start
    assert obs[0].eq(0).all() and obs[1, 0].tolist() == [-1, 1, 0, 0, 1] and not info["avail_actions"][0].any()
    result = play(env, WAIT)
    assert result[2].tolist() == [True, False] and result[0][:, 0, 2].tolist() == [0, 1]
    pid = env.workers[1].submit(os.getpid).result()
    env.close()
    env.close()
    gone(pid)
    assert pid in log(place, "start") and pid in log(place, "close")
    assert capfd.readouterr() == ("", "")


def test_a_killed_worker_ends_with_one_line(place):
    env = StarCraft2()
    env.reset()
    os.kill(*pids(env), signal.SIGKILL)
    with pytest.raises(ConnectionError, match="^StarCraft II, game 0 failed: .*BrokenProcessPool.*$"):
        play(env, WAIT)


def test_games_end_with_a_killed_program(place, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "if __name__ == '__main__':\n"
        "    from envs.sc2 import StarCraft2\n"
        "    env = StarCraft2()\n"
        "    env.reset()\n"
        "    print(env.workers[0].submit(os.getpid).result(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(place)])}
    process = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, timeout=100
    )  # until the worker ends
    assert process.returncode == -signal.SIGKILL and b"Traceback" not in process.stderr, process.stderr
    assert int(process.stdout) in log(place, "start") & log(place, "close")


PIP = "pip install git.https://github.com/oxwhirl/smac.git"


@pytest.mark.parametrize(
    "files, words",
    [
        ({"init": "raise ModuleNotFoundError(\"No module named 'smac'\")"}, "No module named 'smac'"),
        (None, "No module named 'smac.env'"),
        ({"module": STAND_IN.replace('"5m_vs_6m"', '"8m"')}, "KeyError: '5m_vs_6m'"),
    ],
    ids=["missing", "AutoML", "unknown map"],
)
def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, capfd, files, words):
    install(tmp_path, **(files or {}))
    if files is None:  # the package of the same name has no `env` at all
        (tmp_path / "smac" / "env").rename(tmp_path / "smac" / "facade")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SC2PATH", str(tmp_path / "game"))
    with no_smac(), pytest.raises(ValueError, match=f"{words}.*{PIP}.*SC2PATH") as caught:
        StarCraft2()
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [None, "", "empty"])
def test_without_the_game_one_line_says_what_to_install(tmp_path, monkeypatch, value):
    (tmp_path / "Versions").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)  # an unset SC2PATH must not mean this folder
    monkeypatch.delenv("SC2PATH", raising=False)
    if value is not None:
        monkeypatch.setenv("SC2PATH", value)
    with pytest.raises(ValueError, match=f"{PIP}.*4.10.*SC2PATH$") as caught:
        envs.make("smac", "3m", backend="sc2")
    assert "\n" not in str(caught.value)


def test_an_evaluation_plays_as_many_games_at_a_time_as_it_may(place):
    """Two seeds, three games each, on four processes: two rounds, the second of which has a game too many."""
    args = SimpleNamespace(env="smac", task="3m", env_kwargs="", seed=0, num_seeds=2, backend="sc2", games=4)
    seen, film = [], []

    def attack(obs, avail, memory):  # the first seed's teams only; the second seed's stand still
        seen.append(avail.shape)
        action = torch.full(avail.shape[:3], STOP)
        action[0] = avail[0, ..., HIT:].byte().argmax(-1) + HIT  # the first enemy that is still there
        return torch.where(avail.gather(-1, action[..., None])[..., 0], action, 0), memory  # 0 for the fallen

    found = runs.score(attack, args, 5, 3, torch.device("cpu"), film=film)
    assert found["return"].tolist() == [[16.0] * 3, [0.0] * 3]  # two volleys and 10
    assert found["win_rate"].tolist() == [[1.0] * 3, [0.0] * 3]
    assert set(seen) == {(2, 2, 3, 8)} and film[0]["mask"].shape == (4, 6)  # LIMIT steps of the first round


def test_no_games_is_an_error(place):
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        StarCraft2(num_envs=0)


def test_a_lost_connection_ends_all_games_with_one_line(shared, place):  # the last test that plays on them
    shared.reset()
    workers = pids(shared)
    with pytest.raises(ConnectionError, match=r"^StarCraft II, game 1 failed: OSError\('the connection .* is lost'\)$"):
        play(shared, [WAIT, [STOP, STOP, WEST], WAIT])
    for pid in workers:
        gone(pid)
    assert log(place, "close") >= set(workers)
