"""Polynomial games: rewards, the best return, and the datasets that are named by their spread."""

import math
from fractions import Fraction

import pytest
import torch
from conftest import load_script

import data
import envs
from data.recipes import collect_dataset, is_path
from envs.polynomial import GAMES

TASKS = list(GAMES)


def by_hand(task, x, y):
    """The rewards once more, exactly."""
    return {
        "twin-peaks": -(x * x + y * y) - 4 * x * x * y * y + 5 * x * y,
        "sign-agreement": x * y,
        "action-agreement": -(x - y) * (x - y),
        "decoupled": x + y,
    }[task]


def grid(count):
    line = torch.linspace(-1, 1, count, dtype=torch.float64)
    return torch.cartesian_prod(line, line).T


# ---------------------------------------------------------------- the games
@pytest.mark.parametrize("task", TASKS)
def test_a_step_pays_the_polynomial_and_ends_the_game(task):
    quarters = [Fraction(k, 4) for k in range(-4, 5)]
    pairs = [(x, y) for x in quarters for y in quarters]
    game = envs.make("polynomial", task, num_envs=len(pairs))
    game.reset(seed=0)
    chosen = torch.tensor([[float(x), float(y)] for x, y in pairs])[..., None]  # (B, 2, 1)
    _, reward, terminated, truncated, info = game.step(chosen)
    paid = [float(by_hand(task, x, y)) for x, y in pairs]  # exact in binary, too
    assert reward.tolist() == paid and terminated.all() and not truncated.any()
    game.reset(options={"reset_mask": torch.arange(len(pairs)) < 2})
    again = game.step(chosen)[1]
    assert again[:2].tolist() == paid[:2] and not again[2:].any()


@pytest.mark.parametrize("task", TASKS)
def test_best_return_is_the_highest_reward_in_the_box(task):
    game, highest = GAMES[task], GAMES[task].reward(*grid(2001)).max().item()
    assert game.best - 2e-6 < highest <= game.best + 1e-12
    assert game.reward(game.peak, game.peak) == pytest.approx(game.best, abs=1e-12)


def test_the_games_are_those_of_polygames():
    polygames = load_script("polygames")
    theirs = polygames.games(polygames.Args())
    assert {name.replace(" ", "-") for name in theirs} == set(TASKS)
    for name, game in theirs.items():
        ours = GAMES[name.replace(" ", "-")].reward
        assert torch.equal(ours(*grid(41)), game(*grid(41))), name


# ---------------------------------------------------------------- the datasets
def clipped(centre, sigma):
    """Mean and variance of a Gaussian that is clipped to [-1, 1], over its quantiles."""
    share = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    values = (centre + sigma * math.sqrt(2) * torch.erfinv(2 * share - 1)).clamp(-1, 1)
    return values.mean().item(), values.var().item()


@pytest.mark.parametrize("task", ["twin-peaks", "decoupled"])
@pytest.mark.parametrize("name", ["peak-0.2", "peak-1", "origin-3e-1", "uniform"])
def test_datasets_are_spread_as_their_names_say(task, name):
    E = 20_000
    dataset = collect_dataset("polynomial", task, name, seed=3, episodes=E)
    assert dataset.actions.shape == (E, 1, 2, 1) and dataset.terminated.all()
    played = dataset.actions[:, 0, :, 0].double()  # (E, 2)
    mean, variance = 0, 1 / 3
    if name != "uniform":
        place, sigma = name.split("-", 1)
        mean, variance = clipped({"peak": GAMES[task].peak, "origin": 0}[place], float(sigma))
    for agent in (0, 1):
        chance = 5 * math.sqrt(variance / E)
        assert played[:, agent].mean().item() == pytest.approx(mean, abs=chance)
        assert played[:, agent].var().item() == pytest.approx(variance, rel=0.06)
    assert abs(torch.corrcoef(played.T)[0, 1].item()) < 5 / math.sqrt(E)  # each agent on its own
    assert torch.allclose(dataset.reward[:, 0].double(), by_hand(task, *played.T), atol=1e-5)


@pytest.mark.parametrize("name", ["peak", "peak-0", "peak-nan", "peak-1e999", "uniform-1"])
def test_a_name_that_there_is_not_is_refused_with_the_forms(name):
    with pytest.raises(ValueError, match="peak-0.5"):
        data.load("polynomial", "twin-peaks", name)
    assert not is_path("peak-0.5", "polynomial") and is_path("mine.h5", "polynomial")
