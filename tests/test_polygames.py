"""Polygames: updates by hand, the closed forms, and what every figure must show."""

import csv
import json
import math

import pytest
import torch
from conftest import load_script

polygames = load_script("polygames")
PEAK = math.sqrt(3 / 8)


def args(**changes):
    return polygames.Args(**{"device": "cpu"} | changes)


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mean(rows, name="reward", **labels):
    values = [row[name] for row in rows if labels.items() <= row.items()]
    return sum(values) / len(values)


# ---------------------------------------------------------------- updates by hand
def slope(game, own, other, a=1.0, b=4.0, c=5.0):
    """dR / d own, for numbers."""
    return {
        "decoupled": 1.0,
        "sign agreement": other,
        "action agreement": 2 * other - 2 * own,
        "twin peaks": -2 * a * own - 2 * b * own * other**2 + c * other,
    }[game]


def step_by_hand(game, theta, batch, eta):
    """Eq. 4 for one run: both agents move from the same theta."""
    x, y = theta
    dx = sum(slope(game, x, other) for _, other in batch) / len(batch)
    dy = sum(slope(game, y, other) for other, _ in batch) / len(batch)
    return [x + eta * dx, y + eta * dy]


@pytest.mark.parametrize("game", polygames.games(args()))
def test_gradients(game):
    reward = polygames.games(args(a=1.3, b=3.7, c=4.9))[game]
    theta, data = normal(0, 3, 2), 0.3 + normal(1, 3, 20, 2)
    brud = polygames.brud_gradient(reward, theta, data)
    true = polygames.brud_gradient(reward, theta, theta[:, None])
    for i in range(2):
        own, others = theta[:, i], data[..., 1 - i]
        slopes = slope(game, own[:, None], others, 1.3, 3.7, 4.9) + 0 * others
        torch.testing.assert_close(brud[:, i], slopes.mean(1))
        slopes = slope(game, own, theta[:, 1 - i], 1.3, 3.7, 4.9) + 0 * own
        torch.testing.assert_close(true[:, i], slopes)


def test_offline_training_by_hand():
    """Three updates; a run with PJAP, whose floor bites, and one without (alpha 0)."""
    theta, data = normal(2, 2, 2), normal(3, 2, 30, 2)
    uniforms = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    alpha = torch.tensor([[6.0], [0.0]])
    reward = polygames.games(args())["twin peaks"]
    inputs = reward, theta, data, 3, 0.02, uniforms, alpha, 0.01
    path, distances = polygames.train_offline(*inputs)
    assert path.shape == (2, 4, 2) and distances.shape == (2, 3)
    floors = 0
    for run in range(2):
        x, y = theta[run].tolist()
        for k in range(3):
            points, rho = data[run].tolist(), []
            for ax, ay in points:
                d = abs(ax - x) + abs(ay - y)
                rho.append(max(math.exp(-alpha[run].item() * d**2), 0.01))
            floors += rho.count(0.01)
            batch = []
            for u in uniforms[run, k].tolist():
                place, m = u * sum(rho), 0
                while sum(rho[: m + 1]) <= place:
                    m += 1
                batch.append(points[m])
            far = sum(abs(ax - x) + abs(ay - y) for ax, ay in batch) / (2 * len(batch))
            assert distances[run, k].item() == pytest.approx(far)
            x, y = step_by_hand("twin peaks", (x, y), batch, 0.02)
            assert path[run, k + 1].tolist() == pytest.approx([x, y])
    assert 0 < floors < 90


def test_all_data_in_every_update():
    theta, data = normal(5, 1, 2), normal(6, 1, 30, 2)
    reward = polygames.games(args())["action agreement"]
    path, distances = polygames.train_offline(reward, theta, data, 1, 0.1)
    expected = step_by_hand("action agreement", theta[0].tolist(), data[0].tolist(), 0.1)
    assert path[0, 1].tolist() == pytest.approx(expected)
    torch.testing.assert_close(distances[:, 0], (data - theta[:, None]).abs().mean((1, 2)))


def test_online_training_by_hand():
    """Buffers of 1, 2 1/2 and more batches than are made, first in, first out."""
    batch, steps, capacities = 4, 9, [4, 10, 100]
    noise, theta = 0.2 * normal(7, 3, steps, batch, 2), torch.tensor([[-0.9, 0.95]] * 3).double()
    uniforms = torch.rand(3, steps, batch, generator=torch.Generator().manual_seed(8)).double()
    reward = polygames.games(args())["sign agreement"]
    inputs = reward, theta, torch.tensor(capacities), noise, uniforms, 0.5
    path, buffers = polygames.train_online(*inputs)
    for run, capacity in enumerate(capacities):
        policy, slots, count = theta[run].tolist(), [None] * capacity, 0
        for k in range(steps):
            for point in noise[run, k].tolist():
                slots[count % capacity] = [policy[0] + point[0], policy[1] + point[1]]
                count += 1
            held = min(count, capacity)
            places = torch.arange(batch) + uniforms[run, k]  # one in each quarter of what is held
            drawn = [slots[int(place * held / batch)] for place in places.tolist()]
            policy = step_by_hand("sign agreement", policy, drawn, 0.5)
            policy = [min(max(x, -1.0), 1.0) for x in policy]
            assert path[run, k + 1].tolist() == pytest.approx(policy)
        filled = [slot for slot in slots if slot]
        torch.testing.assert_close(buffers[run, : len(filled)], torch.tensor(filled).double())
        assert buffers[run, len(filled) :].isnan().all()
    assert (path == -1).any() or (path == 1).any()  # the box bites


def test_each_seed_has_its_own_numbers():
    wanted = (torch.randn, 5, 2), (torch.rand, 3)
    both = polygames.draw(args(num_seeds=3), *wanted)
    alone = polygames.draw(args(num_seeds=1, seed=2), *wanted)
    for numbers, own in zip(both, alone):
        assert torch.equal(numbers[2:], own) and not torch.equal(numbers[0], numbers[1])
    assert both[0].min() < 0 <= both[1].min()


# ---------------------------------------------------------------- closed forms
def test_brud_ends_where_the_closed_form_says():
    a, b, c = 0.7, 4.4, 5.0
    rows = polygames.table(args(num_seeds=1, a=a, b=b, c=c))
    assert len(rows) == 17 and max(row["difference"] for row in rows) < 2e-4
    ends = {row["game"]: row["end"] for row in rows if not row["note"]}
    assert ends["decoupled"] == pytest.approx([5.5, 6.5])
    assert ends["sign agreement"] == pytest.approx([-0.26, 0.38])
    assert ends["action agreement"] == pytest.approx([0.04, -0.02], abs=1e-4)  # means, swapped
    at_peak = {"Fig. 4a": False, "Eq. 5": True, "2 x Eq. 5": False}
    for row in rows[3:]:
        assert row["at_peak"] == at_peak.get(row["note"], row["sigma"] == 0)
    widest = max((row for row in rows if row["note"] == "Eq. 5"), key=lambda row: row["sigma"])
    middle = c / math.sqrt(8 * b * (c - 2 * a))
    expected = middle, middle, math.sqrt(middle**2 - a / b)
    assert (*widest["mean"], widest["sigma"]) == pytest.approx(expected)


def test_eq_5_by_hand():
    assert polygames.peak(args()) == pytest.approx(0.612372, abs=1e-6)
    assert polygames.eq5_sigma(PEAK, args()) == pytest.approx(0, abs=1e-6)
    by_hand = math.sqrt(-(0.45**2) + 1.020621 * 0.45 - 0.25)
    assert polygames.eq5_sigma(0.45, args()) == pytest.approx(by_hand, abs=1e-5)
    assert math.isnan(polygames.eq5_sigma(0.7, args()))


def test_where_pjap_ends_in_equally_dense_data():
    """theta^2 = peak^2 - v and R = R(peak) - B v^2, where v = 1 / (3 alpha)."""
    alpha = 6.0
    line = torch.linspace(-1.5, 2.7, 150, dtype=torch.float64)
    grid, start = torch.cartesian_prod(line, line), torch.tensor([0.9, 0.4], dtype=torch.float64)
    even = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    reward = polygames.games(args())["twin peaks"]
    inputs = reward, start, grid, 80, 0.08, even.expand(80, -1), alpha, 1e-12
    end = polygames.train_offline(*inputs)[0][-1]
    theta = math.sqrt(PEAK**2 - 1 / (3 * alpha))
    assert end.tolist() == pytest.approx([theta, theta], abs=2e-3)
    assert reward(*end).item() == pytest.approx(0.5625 - 4 / (3 * alpha) ** 2, abs=1e-3)


# ---------------------------------------------------------------- figures
def test_figure_1_steps_away_from_the_true_gradient():
    reward = polygames.games(args())["sign agreement"]
    theta, point = torch.tensor([[-0.35, 0.35], [0.45, -0.45]])
    brud = polygames.brud_gradient(reward, theta, point[None])
    assert brud[0] < 0 < brud[1] and brud @ theta.flip(0) < 0


def test_figure_2_larger_buffers_take_a_longer_way_and_all_arrive():
    rows = polygames.figure_2(args())[1]
    assert len(rows) == 40 and min(row["reward"] for row in rows) > 0.9
    sizes = (32, 1280, 2560, 5120)
    lengths = [mean(rows, "path_length", capacity=capacity) for capacity in sizes]
    assert lengths == pytest.approx([2.20, 2.38, 2.67, 3.06], abs=0.005)


def test_figure_3_runs_straight_to_the_bottom_right():
    for row, (x, y) in zip(polygames.figure_3(args())[1], polygames.STARTS, strict=True):
        dx, dy = row["theta_x"] - x, row["theta_y"] - y
        assert row["theta_x"] > 0 > row["theta_y"] and dy == pytest.approx(-dx / 2)
        assert row["path_length"] == pytest.approx(math.hypot(dx, dy))


def test_figure_4_ends_at_the_origin_or_along_the_published_formula():
    for row in polygames.FIGURES["4a"](args(num_seeds=1, num_samples=100))[1]:
        assert (row["theta_x"], row["theta_y"]) == pytest.approx((0, 0), abs=1e-3)
    expected = {0.0: 0.6124, 0.1: 0.6027, 0.5: 0.4374}
    rows = polygames.FIGURES["4b"](args(num_seeds=2, sigmas=tuple(expected)))[1]
    for sigma, theta in expected.items():
        ends = [mean(rows, axis, sigma=sigma) for axis in ("theta_x", "theta_y")]
        assert ends == pytest.approx([theta, theta], abs=0.015)


def test_figure_5_is_the_docstrings():
    rows = polygames.figure_5(args())[1]
    expected = {
        "MADDPG": {0.0: 0.562, 0.2: 0.555, 0.5: 0.427, 1.0: 0.157},
        "PJAP": {0.0: 0.562, 0.2: 0.560, 0.5: 0.554, 1.0: 0.544},
    }
    for method, rewards in expected.items():
        for sigma, reward in rewards.items():
            found = mean(rows, sigma=sigma, method=method)
            assert found == pytest.approx(reward, abs=6e-4)
    # Without a spread an epoch leaves 0.9 of the distance to the peak.
    distance = PEAK - mean(rows, "theta_x", sigma=0.0, method="PJAP")
    assert distance == pytest.approx((PEAK + 0.5) * 0.9**100, rel=1e-6)


# ---------------------------------------------------------------- files
SMALL = "--num-seeds 2 --num-samples 50 --steps 5 --full-batch-steps 5 --online-steps 5".split()


def test_a_run_writes_its_files(tmp_path):
    words = [*SMALL, "--sigmas", "0.2", "--figures", "1", "5", "--out-dir", str(tmp_path / "a")]
    polygames.main(polygames.parse(words))
    names = "config.json figure1.png figure5.png metrics.csv summary.json".split()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    rows = list(csv.DictReader((tmp_path / "a" / "metrics.csv").open()))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("MADDPG", "0"),
        ("MADDPG", "1"),
        ("PJAP", "0"),
        ("PJAP", "1"),
    ]
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    means = [row["mean"] for row in summary["rewards"]]
    rewards = [float(row["reward"]) for row in rows]
    assert means == pytest.approx([sum(rewards[:2]) / 2, sum(rewards[2:]) / 2])


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--capacities 8 64", "--capacities"),
        ("--c 2", "C > 2A"),
        ("--epsilon 0", "--epsilon"),
    ],
)
def test_bad_flags_are_refused(flags, word):
    with pytest.raises(ValueError, match=word):
        polygames.parse(flags.split())


def test_divergence_is_reported():
    setting = args(learning_rate=1.0, num_seeds=1, num_samples=50)
    with pytest.raises(FloatingPointError, match="--learning-rate"):
        polygames.figure_5(setting)
