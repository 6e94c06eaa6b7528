"""The games: rules, the vector interface, and Bridge against the real dataset of its authors."""

import functools

import gymnasium
import numpy as np
import pytest
import torch
from conftest import SHARED
from pretended_gpu import AWAY, PretendedGPU

import envs
from envs.bridge import BEST_RETURN
from envs.matrix import MATRIX_TASKS
from envs.polynomial import GAMES
from envs.rollout import play

STAY, UP, DOWN, RIGHT, LEFT = range(5)
REAL = SHARED / "alberdice_bridge_optimal"
ONE_STEP = [("matrix", task) for task in MATRIX_TASKS] + [("polynomial", task) for task in GAMES]


def place(cells, time_limit=50):
    """A Bridge game with the agents on the given (row, column) pairs."""
    game = envs.make("bridge", time_limit=time_limit)
    game.reset()
    game.cells = torch.tensor([[row * 6 + column for row, column in cells]])
    return game


def move(cells, actions):
    """Where the agents end: one step from the given cells."""
    *_, info = place(cells).step(torch.tensor([actions]))
    row_0, column_0, _, _, row_1, column_1, _, _ = info["state"][0].tolist()
    return [(row_0, column_0), (row_1, column_1)]


def sample(game, generator):
    """Any actions, as the action space has them."""
    if isinstance(game.single_action_space, gymnasium.spaces.Box):
        return 2 * torch.rand(game.action_space.shape, generator=generator) - 1
    return torch.randint(game.num_actions, game.action_space.shape, generator=generator)


@pytest.mark.parametrize("env, task", [("bridge", ""), *ONE_STEP])
def test_is_a_gymnasium_vector_environment(env, task):
    game = envs.make(env, task, num_envs=4)
    assert game.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.DISABLED
    obs, info = game.reset(seed=0)
    assert game.observation_space.contains(obs.numpy())
    actions = torch.as_tensor(game.action_space.sample())
    obs, reward, terminated, truncated, info = game.step(actions)
    assert obs.shape == (4, game.num_agents, game.obs_dim)
    assert info["state"].shape == (4, game.state_dim) and reward.shape == (4,)
    assert obs.dtype == reward.dtype == info["state"].dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool
    assert game.picture(actions).shape[2] == 3


def test_matrix_game_pays_its_table():
    game = envs.make("matrix", "climbing", num_envs=9)
    game.reset()
    actions = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    assert game.step(actions)[1].tolist() == sum(MATRIX_TASKS["climbing"], [])
    game.reset(options={"reset_mask": torch.arange(9) == 0})
    assert game.step(actions)[1].tolist() == [11] + [0] * 8  # only the first one was restarted


def test_matrix_game_of_three_agents_with_different_numbers_of_actions():
    game = envs.make("matrix", "[[[1, 2, 3], [4, 5, 6]]]", num_envs=1)  # 1 x 2 x 3 actions
    _, info = game.reset()
    assert info["avail_actions"][0].sum(1).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="game 0, agent 1: action 2 is not available"):
        game.step(torch.tensor([[0, 2, 2]]))
    assert game.step(torch.tensor([[0, 1, 2]]))[1].item() == 6


@pytest.mark.parametrize("make, said", [
    (("chess",), "unknown environment 'chess': choose one of matrix, bridge"),
    (("bridge", "wide"), "bridge has no task 'wide'"),
    (("matrix", "[[1, 2], [3]]"), "matrix has no task"),
    (("matrix", "[" * 3000), "matrix has no task"),
    (("matrix", "[[1, NaN], [0, 1]]"), "finite"),
])  # fmt: skip
def test_what_there_is_not_is_named(make, said):
    with pytest.raises(ValueError, match=said) as error:
        envs.make(*make)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("env", ["bridge", "matrix", "polynomial", "smac", "reacher"])
def test_a_game_that_runs_takes_only_what_it_can_play(env):
    game = envs.make(env, num_envs=2)
    game.reset(seed=0)
    bad = torch.ones(2, game.num_agents, dtype=torch.int64)
    bad[1, 1] = -1
    if env in ("polynomial", "reacher"):
        bad = (2 * bad - 1).clamp(max=1)[..., None].float()
    with pytest.raises(ValueError, match="game 1, agent 1: action -[13].* is not"):
        game.step(bad)
    with pytest.raises(ValueError, match="actions must be .* of shape"):
        game.step(bad[:1])
    with pytest.raises(ValueError, match="reset_mask must be 2 bools"):
        game.reset(options={"reset_mask": torch.ones(2)})


def test_a_finished_game_takes_any_action():
    """Datasets and states pad with -1: in a finished game it means nothing."""
    game = envs.make("bridge", num_envs=2, time_limit=1)
    game.reset()
    *_, info = game.step(torch.zeros(2, 2, dtype=torch.int64))
    _, reward, _, _, after = game.step(torch.full((2, 2), -1))
    assert reward.tolist() == [0, 0] and torch.equal(after["state"], info["state"])


# ---------------------------------------------------------------- graphs
@pytest.mark.parametrize("env", ["bridge", "matrix", "polynomial"])
def test_compiled_steps_are_the_same(env):
    plain, graph = (envs.make(env, num_envs=5) for _ in range(2))
    torch._dynamo.reset()
    graph.compile(functools.partial(torch.compile, fullgraph=True, backend="aot_eager"))
    generator = torch.Generator().manual_seed(0)
    for t in range(4):
        actions, mask = sample(plain, generator), torch.rand(5, generator=generator) < 0.5
        for game in (plain, graph):
            game.reset(options={"reset_mask": mask})
        *one, info = plain.step(actions)
        *other, more = graph.step(actions)
        assert all(map(torch.equal, [*one, *info.values()], [*other, *more.values()]))


@pytest.mark.parametrize("env", ["bridge", "matrix", "polynomial", "smac"])
def test_a_step_never_waits_for_a_gpu(env):
    here = envs.make(env, num_envs=3)
    with PretendedGPU() as gpu:
        game = envs.make(env, num_envs=3, device=AWAY)
        actions = sample(here, torch.Generator()).to(AWAY)
        game.reset()
        gpu.clear()
        _, reward, terminated, *_ = game.step(actions)
        game.reset(options={"reset_mask": terminated})
        assert not gpu.waits and reward.device.type == AWAY


def test_play_keeps_what_happened_until_each_games_end():
    """Each battle's film, played again alone; no noise, so that its actions decide."""
    game, single = (envs.make("smac", "3m", num_envs=n, noise=False) for n in (12, 1))

    def act(obs, info, memory):
        policy = envs.smac.focus if memory % 4 else envs.smac.random
        return policy(game, info), memory + 1

    played = play(game, act, memory=0, seed=0, film=True)
    film, lengths = played.film, played.film["mask"].sum(1)
    assert film["mask"].shape[1] == lengths.max() > lengths.min() and len(played.won.unique()) == 2
    for b, length in enumerate(lengths.tolist()):
        obs, info = single.reset()
        for t in range(length):
            for name, seen in ({"obs": obs} | info).items():
                assert name == "won" or torch.equal(film[name][b, t], seen[0])
            obs, reward, terminated, truncated, info = single.step(film["actions"][b, t][None])
            assert film["reward"][b, t] == reward and film["terminated"][b, t] == terminated
        assert (terminated | truncated).all() and torch.equal(film["obs"][b, length], obs[0])
        total = film["reward"][b].sum().item()
        assert played.won[b] == info["won"] and played.returns[b].item() == pytest.approx(total)
        assert not film["obs"][b, length + 1 :].any() and not film["mask"][b, length:].any()


# ---------------------------------------------------------------- Bridge
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
        ([(1, 5), (2, 5)], (DOWN, STAY), [(2, 5), (2, 5)], "one's own goal is never occupied"),
        (
            [(2, 5), (2, 4)],
            (LEFT, RIGHT),
            [(2, 5), (2, 5)],
            "an agent on its goal stays, and does not block",
        ),
    ],
)
def test_bridge_rules(cells, actions, ends, why):
    assert move(cells, actions) == ends, why


def test_bridge_rewards_and_ends():
    game = place([(2, 4), (0, 0)])
    _, reward, terminated, truncated, _ = game.step(torch.tensor([[UP, RIGHT]]))
    assert reward.item() == pytest.approx(
        -0.1 * 2**0.5 / 2
    )  # agent 1 is home: it costs nothing and stays
    game.step(torch.tensor([[DOWN, STAY]]))
    _, reward, terminated, truncated, info = game.step(torch.tensor([[RIGHT, STAY]]))
    assert reward.item() == 0 and terminated.item() and not truncated.item()
    again = game.step(torch.tensor([[LEFT, RIGHT]]))
    assert again[1].item() == 0 and torch.equal(
        again[4]["state"], info["state"]
    )  # a finished game stays put


def test_bridge_standing_still_until_the_time_limit():
    game = envs.make("bridge", time_limit=20)
    played = play(game, lambda *_: (torch.zeros(1, 2, dtype=torch.int64), None))
    assert played.returns.item() == pytest.approx(-6.00833, abs=1e-4)  # the last step pays 0


def test_bridge_best_return_by_dynamic_programming():
    game = envs.make("bridge")
    moved = game.table  # (18, 18, 5, 5, 2)
    cell = torch.arange(18)
    goals, cost = ((2, 5), (0, 0)), 0
    for i, (row, column) in enumerate(goals):
        far = torch.hypot((cell // 6 - row).double(), (cell % 6 - column).double())  # (18,)
        home = (cell == row * 6 + column).view((18, 1, 1, 1) if i == 0 else (1, 18, 1, 1))
        cost = cost + 0.05 * far[moved[..., i]] * ~home
    value = torch.zeros(18, 18, dtype=torch.float64)
    for _ in range(60):
        value = (value[moved[..., 0], moved[..., 1]] - cost).amax((-1, -2))
    assert value[8, 9].item() == pytest.approx(BEST_RETURN, abs=1e-7)  # from (1, 2) and (1, 3)
    assert game.best_return == BEST_RETURN
    assert envs.make("bridge", time_limit=7).best_return is None  # it takes eight steps


@pytest.mark.skipif(not REAL.exists(), reason="the real dataset is not here")
def test_bridge_replays_the_real_dataset():
    real = {file.stem: np.load(file, allow_pickle=False) for file in REAL.glob("*.npy")}
    game = envs.make("bridge", num_envs=500)
    _, info = game.reset()
    assert np.array_equal(info["state"].numpy(), real["state"][:, 0])
    for t in range(8):
        actions = torch.as_tensor(real["actions"][:, t, :, 0])
        obs, reward, terminated, truncated, info = game.step(actions)
        over = (terminated | truncated).numpy()
        assert np.array_equal(info["state"].numpy(), real["state"][:, t + 1])
        assert np.array_equal(obs.numpy(), real["obs"][:, t + 1])
        assert np.array_equal(reward.numpy(), real["reward"][:, t, 0])  # bit for bit
        assert np.array_equal(over, real["terminated"][:, t, 0].astype(bool))
    assert terminated.all()
