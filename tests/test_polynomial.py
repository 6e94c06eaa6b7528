"""Polynomial games: rewards, the best return, and the datasets that are named by their spread."""

import math
from fractions import Fraction

import pytest
import torch
from conftest import load_script

import data
import envs
from data.recipes import collect_dataset, is_path
from envs.polynomial import GAMES, PEAK

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
    obs, info = game.reset(seed=0)
    assert (obs == 1).all() and (info["state"] == 1).all()
    chosen = torch.tensor([[float(x), float(y)] for x, y in pairs])[..., None]  # (B, 2, 1)
    after, reward, terminated, truncated, info = game.step(chosen)
    paid = [float(by_hand(task, x, y)) for x, y in pairs]  # exact in binary, too
    assert reward.tolist() == paid and terminated.all() and not truncated.any()
    assert torch.equal(after, obs) and set(info) == {"state"}
    _, reward, terminated, *_ = game.step(chosen)
    assert not reward.any() and terminated.all()  # a finished game pays nothing
    game.reset(options={"reset_mask": torch.arange(len(pairs)) < 2})
    again = game.step(chosen)[1]
    assert again[:2].tolist() == paid[:2] and not again[2:].any()


@pytest.mark.parametrize("task", TASKS)
def test_best_return_is_the_highest_reward_in_the_box(task):
    game, highest = GAMES[task], GAMES[task].reward(*grid(2001)).max().item()
    assert game.best - 2e-6 < highest <= game.best + 1e-12
    assert game.reward(game.peak, game.peak) == pytest.approx(game.best, abs=1e-12)
    assert envs.make("polynomial", task).best_return == game.best


def test_the_peak_of_twin_peaks_is_one():
    place = torch.tensor([PEAK, PEAK], dtype=torch.float64)

    def reward(place):
        return GAMES["twin-peaks"].reward(*place)

    assert torch.autograd.functional.jacobian(reward, place).abs().max() < 1e-12
    assert (torch.linalg.eigvalsh(torch.autograd.functional.hessian(reward, place)) < 0).all()


def test_the_games_are_those_of_polygames():
    polygames = load_script("polygames")
    theirs = polygames.games(polygames.Args())
    assert {name.replace(" ", "-") for name in theirs} == set(TASKS)
    for name, game in theirs.items():
        ours = GAMES[name.replace(" ", "-")].reward
        assert torch.equal(ours(*grid(41)), game(*grid(41))), name


def test_a_picture_shows_what_was_done():
    game = envs.make("polynomial", num_envs=2)
    blank, one = game.picture(), game.picture(torch.full((2, 2, 1), 0.5))
    assert blank.shape == one.shape and blank.shape[2] == 3 and (one != blank).any()


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


def test_the_same_seed_gives_the_same_bits():
    one, same, other = (collect_dataset("polynomial", "", "peak-0.5", s, 50) for s in (7, 7, 8))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert (one.info["task"], one.info["seed"]) == ("twin-peaks", 7)


@pytest.mark.parametrize("name", ["peak", "peak-nan", "peak-1e999", "uniform-1"])
def test_a_name_that_there_is_not_is_refused_with_the_forms(name):
    with pytest.raises(ValueError, match="peak-0.5"):
        data.load("polynomial", "twin-peaks", name)
    assert not is_path("peak-0.5", "polynomial") and is_path("mine.h5", "polynomial")
