"""The games: their rules, the vector interface, and Bridge against the real dataset of its authors."""

import gymnasium
import numpy as np
import pytest
import torch
from conftest import SHARED

import envs
from envs.bridge import BEST_RETURN
from envs.matrix import MATRIX_TASKS
from envs.polynomial import GAMES

STAY, UP, DOWN, RIGHT, LEFT = range(5)


def place(cells, time_limit=50):
    """A Bridge game with the agents on the given (row, column) pairs."""
    game = envs.make("bridge", time_limit=time_limit)
    game.reset()
    game.cells = torch.tensor([[row * 6 + column for row, column in cells]])
    return game


def move(cells, actions):
    """Where the agents end: one step from the given cells."""
    _, _, _, _, info = place(cells).step(torch.tensor([actions]))
    state = info["state"][0].int().tolist()
    return (state[0], state[1]), (state[4], state[5])


ONE_STEP = [("matrix", task) for task in MATRIX_TASKS] + [("polynomial", task) for task in GAMES]


@pytest.mark.parametrize("env, task", [("bridge", ""), *ONE_STEP])
def test_is_a_gymnasium_vector_environment(env, task):
    game = envs.make(env, task, num_envs=4)
    assert isinstance(game, gymnasium.vector.VectorEnv)
    assert game.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.DISABLED
    obs, info = game.reset(seed=0)
    assert game.observation_space.contains(obs.numpy())
    actions = torch.as_tensor(game.action_space.sample())
    obs, reward, terminated, truncated, info = game.step(actions)
    B, N = 4, game.num_agents
    assert obs.shape == (B, N, game.obs_dim) and obs.dtype == torch.float32
    assert reward.shape == (B,) and reward.dtype == torch.float32
    assert terminated.shape == truncated.shape == (B,) and terminated.dtype == truncated.dtype == torch.bool
    assert info["state"].shape == (B, game.state_dim) and info["state"].dtype == torch.float32
    if env == "polynomial":  # continuous
        assert game.single_action_space.shape == (N, game.num_actions) and "avail_actions" not in info
    else:
        assert info["avail_actions"].shape == (B, N, game.num_actions) and info["avail_actions"].dtype == torch.bool


def test_matrix_game_pays_its_table_once():
    game = envs.make("matrix", "climbing", num_envs=9)
    game.reset()
    actions = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    _, reward, terminated, truncated, _ = game.step(actions)
    assert reward.tolist() == [x for row in MATRIX_TASKS["climbing"] for x in row]
    assert terminated.all() and not truncated.any()
    assert game.step(actions)[1].tolist() == [0] * 9  # a finished game pays nothing
    mask = torch.arange(9) == 0
    game.reset(options={"reset_mask": mask})
    assert game.step(actions)[1].tolist() == [11] + [0] * 8  # only the first one was restarted


def test_matrix_game_of_three_agents_with_different_numbers_of_actions():
    game = envs.make("matrix", "[[[1, 2, 3], [4, 5, 6]]]", num_envs=1)  # 1 x 2 x 3 actions
    _, info = game.reset()
    assert info["avail_actions"][0].sum(1).tolist() == [1, 2, 3]
    assert game.step(torch.tensor([[0, 1, 2]]))[1].item() == 6


DEEP = "[" * 3000 + "1" + "]" * 3000  # deeper than Python's own stack
NO_TABLES = ["chess", "[1, 2]", "[[1, 2], [3]]", "[[1, NaN], [0, 1]]", "{}", DEEP, "[[1e400, 1], [0, 0]]",
             f"[[{'9' * 400}, 1], [0, 0]]", [["1", 2], [3, 4]], [[None, 1], [0, 0]], [[10**400, 1], [0, 0]], [1]]
for _ in range(3000):
    NO_TABLES[-1] = [NO_TABLES[-1]]


@pytest.mark.parametrize("task", NO_TABLES, ids=range(len(NO_TABLES)))
def test_matrix_rejects_what_is_no_table(task):
    with pytest.raises(ValueError, match="matrix|payoff") as error:
        envs.make("matrix", task)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="unknown environment 'chess': choose one of matrix, bridge"):
        envs.make("chess")
    with pytest.raises(ValueError, match="bridge has no task 'wide'"):
        envs.make("bridge", "wide")
    with pytest.raises(ValueError, match="actions must be integers of shape"):
        envs.make("bridge", num_envs=3).step(torch.zeros(2, 2, dtype=torch.int64))


def test_an_action_that_there_is_not_is_refused():
    bridge, ragged = envs.make("bridge", num_envs=2), envs.make("matrix", "[[1, 2, 3], [4, 5, 6]]", num_envs=2)
    for game, actions, said in (
        (bridge, [[0, 0], [0, -1]], "agent 1 in game 1 has no action -1: it has 0 .. 4"),  # the last one, as an index
        (bridge, [[0, 0], [5, 0]], "agent 0 in game 1 has no action 5: it has 0 .. 4"),
        (ragged, [[0, 0], [-1, -1]], "agent 0 in game 1 has no action -1: it has 0 .. 1"),
        (ragged, [[2, 0], [0, 0]], "agent 0 in game 0 has no action 2: it has 0 .. 1"),
    ):
        game.reset()
        with pytest.raises(ValueError, match=said):
            game.step(torch.tensor(actions))
        _, _, terminated, *_ = game.step(torch.zeros(2, 2, dtype=torch.int64))  # nothing had happened
        assert terminated.all() == (game is ragged)


def test_a_finished_game_takes_no_action():
    """Datasets and states pad with -1: in a finished game it means nothing, and any other number stays wrong."""
    bridge, matrix = envs.make("bridge", num_envs=2, time_limit=1), envs.make("matrix", "xor", num_envs=2)
    for game in (bridge, matrix):
        game.reset()
        _, _, terminated, truncated, info = game.step(torch.zeros(2, 2, dtype=torch.int64))
        assert (terminated | truncated).all()
        _, reward, _, _, after = game.step(torch.full((2, 2), -1))
        assert reward.tolist() == [0, 0] and torch.equal(after["state"], info["state"])
        with pytest.raises(ValueError, match="has no action -2"):
            game.step(torch.full((2, 2), -2))
        game.reset(options={"reset_mask": torch.tensor([False, True])})
        with pytest.raises(ValueError, match="agent 0 in game 1 has no action -1"):
            game.step(torch.full((2, 2), -1))


@pytest.mark.parametrize(
    "cells, actions, ends, why",
    [
        ([(1, 2), (1, 3)], (RIGHT, LEFT), [(1, 2), (1, 3)], "nobody passes through anybody"),
        ([(1, 2), (1, 3)], (RIGHT, RIGHT), [(1, 3), (1, 4)], "in line, agent 0 follows"),
        ([(1, 2), (1, 3)], (LEFT, LEFT), [(1, 1), (1, 2)], "in line, agent 1 follows"),
        ([(1, 2), (1, 3)], (RIGHT, STAY), [(1, 2), (1, 3)], "a standing agent blocks"),
        ([(1, 2), (1, 3)], (UP, DOWN), [(1, 2), (1, 3)], "water"),
        ([(0, 0), (2, 1)], (LEFT, DOWN), [(0, 0), (2, 1)], "the edge of the grid"),
        ([(1, 2), (1, 4)], (RIGHT, LEFT), [(1, 3), (1, 4)], "agent 0 gets a contested cell"),
        ([(1, 4), (2, 5)], (RIGHT, UP), [(1, 5), (2, 5)], "agent 0 gets a contested cell, at a corner"),
        ([(1, 5), (2, 5)], (DOWN, STAY), [(2, 5), (2, 5)], "one's own goal is never occupied"),
        ([(2, 5), (2, 4)], (LEFT, RIGHT), [(2, 5), (2, 5)], "an agent on its goal stays, and does not block"),
        ([(1, 3), (1, 2)], (LEFT, UP), [(1, 3), (1, 2)], "the one ahead is stopped by water, so both stand"),
        ([(1, 1), (1, 2)], (RIGHT, UP), [(1, 1), (1, 2)], "following an agent that wants to move but cannot"),
    ],
)
def test_bridge_rules(cells, actions, ends, why):
    assert list(move(cells, actions)) == ends, why


def test_bridge_rewards_and_ends():
    game = place([(2, 4), (0, 0)])
    _, reward, terminated, truncated, _ = game.step(torch.tensor([[UP, RIGHT]]))
    assert reward.item() == pytest.approx(-0.1 * 2**0.5 / 2)  # agent 1 is home: it costs nothing and stays
    game.step(torch.tensor([[DOWN, STAY]]))
    _, reward, terminated, truncated, info = game.step(torch.tensor([[RIGHT, STAY]]))
    assert reward.item() == 0 and terminated.item() and not truncated.item()
    again = game.step(torch.tensor([[LEFT, RIGHT]]))
    assert again[1].item() == 0 and torch.equal(again[4]["state"], info["state"])  # a finished game stays put


@pytest.mark.parametrize("limit, expected", [(50, -15.49516), (20, -6.00833)])
def test_bridge_standing_still_until_the_time_limit(limit, expected):
    game = envs.make("bridge", time_limit=limit)
    game.reset()
    total = 0.0
    for _ in range(limit):
        _, reward, terminated, truncated, _ = game.step(torch.zeros(1, 2, dtype=torch.int64))
        total += reward.item()
    assert total == pytest.approx(expected, abs=1e-4)  # the step that hits the limit pays 0
    assert truncated.item() and not terminated.item()


def test_bridge_best_return_by_dynamic_programming():
    game = envs.make("bridge")
    n0, n1 = game.table.unbind(-1)  # (18, 18, 5, 5)
    cell = torch.arange(18)
    home0, home1 = (cell == game.goal_cell[0]).view(18, 1, 1, 1), (cell == game.goal_cell[1]).view(1, 18, 1, 1)
    cost = 0.05 * (game.distance[n0, 0] * ~home0 + game.distance[n1, 1] * ~home1)
    value = torch.zeros(18, 18, dtype=torch.float64)
    for _ in range(60):
        value = (value[n0, n1] - cost).amax((-1, -2))
    assert value[game.start_cell[0], game.start_cell[1]].item() == pytest.approx(BEST_RETURN, abs=1e-7)


def test_bridge_batch_equals_single_games():
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(5, (50, 8, 2), generator=generator)
    many = envs.make("bridge", num_envs=8)
    many.reset()
    together = [many.step(a) for a in actions]
    for b in range(8):
        one = envs.make("bridge")
        one.reset()
        for a, (obs, reward, terminated, truncated, _) in zip(actions, together):
            o, r, te, tr, _ = one.step(a[b : b + 1])
            assert torch.equal(o[0], obs[b]) and r[0] == reward[b] and te[0] == terminated[b] and tr[0] == truncated[b]


def test_bridge_random_play_scores_as_measured_on_the_original():
    game = envs.make("bridge", num_envs=20_000)
    game.reset()
    generator = torch.Generator().manual_seed(0)
    total = sum(game.step(torch.randint(5, (20_000, 2), generator=generator))[1].double() for _ in range(50))
    assert total.mean().item() == pytest.approx(-17.56, abs=0.12)  # 95 % of such means lie within 0.06


@pytest.mark.skipif(not (SHARED / "alberdice_bridge_optimal").exists(), reason="the real dataset is not here")
def test_bridge_replays_the_real_dataset():
    real = {f.stem: np.load(f, allow_pickle=False) for f in (SHARED / "alberdice_bridge_optimal").glob("*.npy")}
    steps = real["filled"][..., 0].sum(1) - 1
    assert len(steps) == 500 and (steps == 8).all()
    game = envs.make("bridge", num_envs=500)
    _, info = game.reset()
    assert np.array_equal(info["state"].numpy(), real["state"][:, 0])
    for t in range(8):
        obs, reward, terminated, truncated, info = game.step(torch.as_tensor(real["actions"][:, t, :, 0]))
        assert np.array_equal(info["state"].numpy(), real["state"][:, t + 1])
        assert np.array_equal(obs.numpy(), real["obs"][:, t + 1])
        assert np.array_equal(reward.numpy(), real["reward"][:, t, 0])  # the same float32, bit for bit
        assert np.array_equal((terminated | truncated).numpy(), real["terminated"][:, t, 0].astype(bool))
    assert terminated.all()
