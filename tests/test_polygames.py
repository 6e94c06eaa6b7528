"""Tests of algorithms/polygames.py: the update by hand, the claims of every figure, the files."""

import csv
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import updates
from conftest import ROOT, complains, load_script
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch._dynamo.testing import CompileCounterWithBackend

polygames = load_script("polygames")
Args = polygames.Args
PEAK = math.sqrt(3 / 8)


@pytest.fixture(scope="module")
def figure_5_rows():
    return polygames.figure_5(Args(device="cpu"))[1]


def args(**changes) -> Args:
    return Args(device="cpu", **changes)


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(rows: list, name: str = "reward", **labels) -> float:
    values = [row[name] for row in rows if all(row[key] == value for key, value in labels.items())]
    assert values, labels
    return sum(values) / len(values)


def run(*flags, cwd=ROOT) -> subprocess.CompletedProcess:
    """The script from the command line, with no display; `cwd` shows that it needs no particular folder."""
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    words = [sys.executable, ROOT / "algorithms" / "polygames.py", *map(str, flags)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)


# ---------------------------------------------------------------- the update


def brud_by_hand(game, theta, data, a, b, c):
    own, m, s2 = theta, data.mean(1).flip(1), data.var(1, unbiased=False).flip(1)
    return {
        "decoupled": torch.ones_like(own),
        "sign agreement": m,
        "action agreement": 2 * m - 2 * own,
        "twin peaks": -2 * a * own - 2 * b * own * (m**2 + s2) + c * m,
    }[game]


def true_by_hand(game, theta, a, b, c):
    own, other = theta, theta.flip(1)
    return {
        "decoupled": torch.ones_like(own),
        "sign agreement": other,
        "action agreement": 2 * other - 2 * own,
        "twin peaks": -2 * a * own - 2 * b * own * other**2 + c * other,
    }[game]


def differences(reward, own, other, h=1e-4):
    """The slope of R along one's own action, (6, 2), against everything that the other one may do, (6, B, 2)."""
    x, y, others = own[:, :1], own[:, 1:], other.flip(2)
    along_x = (reward(x + h, others[..., 0]) - reward(x - h, others[..., 0])) / (2 * h)
    along_y = (reward(others[..., 1], y + h) - reward(others[..., 1], y - h)) / (2 * h)
    return torch.stack([along_x.mean(1), along_y.mean(1)], 1)


def sees_the_gradients(reward):
    theta, data = rand(0, 6, 2), 0.3 + rand(1, 6, 50, 2)
    for points in (data, theta[:, None]):  # Eq. 4, and the true gradient
        found = polygames.brud_gradient(reward, theta, points)
        torch.testing.assert_close(found, differences(reward, theta, points), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("game", polygames.games(args()))
def test_gradients_equal_differences_of_the_reward(game):
    sees_the_gradients(polygames.games(args(a=1.3, b=3.7, c=4.9))[game])


@pytest.mark.parametrize("place, end", [(0, None), (4, lambda theta, t, m, s2: 1 - m)])
def test_a_new_game_is_one_line(monkeypatch, place, end):
    """The line in `games` is all that it takes: the table, its print, the window and the gradients' test see it."""
    paper, new = polygames.games, polygames.Game(lambda x, y: -((x + y - 1) ** 2), end)

    def with_a_fifth(args):
        lines = [*paper(args).items()]
        return dict([*lines[:place], ("sum of one", new), *lines[place:]])

    monkeypatch.setattr(polygames, "games", with_a_fifth)
    setting = args(num_seeds=2, num_samples=200)
    rows = polygames.table(setting)
    (row,) = [row for row in rows if row["game"] == "sum of one"]
    assert row["end"] == pytest.approx([0.96, 1.02], abs=1e-3) and len(rows) == 18
    assert (row["closed_form"], row["difference"]) == (None, None) if end is None else row["difference"] < 1e-4
    assert len(re.findall("sum of one .*", polygames.report(setting, rows, []))) == 1
    figure = Figure(figsize=(12, 8))
    FigureCanvasAgg(figure)
    radio = polygames.build_interactive(setting, figure)["game"]
    assert radio.value_selected == "twin peaks" and "sum of one" in [label.get_text() for label in radio.labels]
    radio.set_active(place)
    figure.canvas.draw()
    sees_the_gradients(new)
    with pytest.raises(AssertionError):
        sees_the_gradients(lambda x, y: new(x, y) + (x.detach() - y) ** 2)  # what the test would see


@pytest.mark.parametrize("game", ["decoupled", "sign agreement", "action agreement", "twin peaks"])
def test_gradients_equal_hand_formulas(game):
    constants = (1.3, 3.7, 4.9)
    reward = polygames.games(args(a=1.3, b=3.7, c=4.9))[game]
    theta, data = rand(0, 6, 2), 0.3 + rand(1, 6, 50, 2)
    brud, true = polygames.brud_gradient(reward, theta, data), polygames.brud_gradient(reward, theta, theta[:, None])
    torch.testing.assert_close(brud, brud_by_hand(game, theta, data, *constants), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(true, true_by_hand(game, theta, *constants), rtol=1e-12, atol=1e-12)


def test_both_agents_move_from_the_same_policy():
    """One step is theta + eta * field(theta), both agents at once; the distance is that to the old policy."""
    reward, data = polygames.games(args())["twin peaks"], rand(2, 3, 40, 2)
    theta = rand(3, 3, 2)
    path, distance = polygames.train_offline(reward, theta, data, 1, 0.02)
    expected = theta + 0.02 * brud_by_hand("twin peaks", theta, data, 1, 4, 5)
    torch.testing.assert_close(path[:, 1], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(distance[:, 0], (data - theta[:, None]).abs().sum(2).mean(1) / 2)


def test_priorities_are_eq_6_and_7():
    theta = torch.tensor([[0.1, -0.2]], dtype=torch.float64)
    data = torch.tensor([[[0.1, -0.2], [0.3, 0.1], [2.0, 2.0]]], dtype=torch.float64)
    rho = polygames.priorities(theta, data, 6.0, 1e-3)
    assert rho[0].tolist() == pytest.approx([1.0, math.exp(-6 * 0.5**2), 1e-3], rel=1e-9)


def test_sampler_follows_the_priorities():
    """Chi-square, 20 unequal cells, 200,000 draws; 43.8 is the 0.1 % point for 19 degrees of freedom."""
    cells, draws = 20, 200_000
    data = torch.arange(cells, dtype=torch.float64)[None, :, None].expand(1, cells, 2)
    rho = polygames.priorities(torch.zeros(1, 2, dtype=torch.float64), data / 25, 6.0, 1e-3)
    uniforms = torch.rand(1, draws, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    drawn = polygames.sample(data, rho, uniforms)
    assert torch.equal(drawn[..., 0], drawn[..., 1])  # both coordinates come from the same data point
    seen = torch.bincount(drawn[0, :, 0].long(), minlength=cells).double()
    expected = draws * rho[0] / rho.sum()
    assert float(((seen - expected) ** 2 / expected).sum()) < 43.8
    uniform = torch.full_like(expected, draws / cells)  # and the test has the power to see a wrong sampler
    assert float(((seen - uniform) ** 2 / uniform).sum()) > 1000


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_an_update_is_one_graph_and_equals_eager(backend):
    counters = []

    def compiled(function):
        counters.append(CompileCounterWithBackend(backend))
        return torch.compile(function, fullgraph=True, dynamic=False, backend=counters[-1])

    torch._dynamo.reset()
    flags = ["--num-seeds", "2", "--num-samples", "100"]
    eager, graph = updates.polygames(flags=flags), updates.polygames(compiled=compiled, flags=flags)
    for graphs, name in enumerate(eager.updates, 1):
        for _ in range(5):
            eager.updates[name]()
            graph.updates[name]()
        (one,), (other,) = eager.modules[0], graph.modules[0]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        calls = [any(node.op.startswith("call") for node in each.graph.nodes) for each in counters[0].graphs]
        assert sum(calls) == graphs  # torch itself may make an empty one when it is called for the first time


def test_offline_training_is_a_loop_over_the_update():
    reward, steps, chance = polygames.games(args())["twin peaks"], 7, torch.rand(2, 7, 8, dtype=torch.float64)
    data, theta, pjap = rand(2, 2, 40, 2), rand(3, 2, 2), torch.tensor([True, False])
    path, distances = polygames.train_offline(reward, theta, data, steps, 0.02, chance, pjap, 6.0, 1e-3)
    for k in range(steps):
        numbers = torch.tensor([6.0, 1e-3], dtype=torch.float64)  # a tensor does what a number does
        theta, distance = polygames.update(reward, theta, data, 0.02, chance[:, k], pjap, *numbers)
        assert torch.equal(theta, path[:, k + 1]) and torch.equal(distance, distances[:, k])


def test_smallest_buffer_is_on_policy():
    """With a buffer of one batch, each step uses exactly the B actions of that step."""
    reward, (batch, steps) = polygames.games(args())["sign agreement"], (8, 30)
    theta, noise = torch.tensor([[-0.3, 0.4]], dtype=torch.float64), 0.2 * rand(5, 1, steps, batch, 2)
    uniforms = torch.rand(1, steps, batch, dtype=torch.float64)
    path, buffer = polygames.train_online(reward, theta, torch.tensor([batch]), noise, uniforms, 0.02)
    expected = theta
    for k in range(steps):
        fresh = expected[:, None] + noise[:, k]
        expected = expected + 0.02 * fresh.mean(1).flip(1)
    torch.testing.assert_close(path[:, -1], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(buffer, fresh, rtol=1e-10, atol=1e-12)


def test_buffer_keeps_the_newest_actions():
    reward, (batch, steps, capacity) = polygames.games(args())["sign agreement"], (4, 9, 10)
    noise, theta = rand(6, 2, steps, batch, 2), torch.zeros(2, 2, dtype=torch.float64)
    sizes, uniforms = torch.tensor([capacity, 100]), torch.full((2, steps, batch), 0.5, dtype=torch.float64)
    path, buffer = polygames.train_online(reward, theta, sizes, noise, uniforms, 0.01)
    actions = (path[:, :-1, None] + noise).flatten(1, 2)  # (R, K * B, 2), in the order they were taken

    def newest(x):
        return x[x[:, 0].argsort()]

    torch.testing.assert_close(newest(buffer[0, :capacity]), newest(actions[0, -capacity:]))
    torch.testing.assert_close(newest(buffer[1, : steps * batch]), newest(actions[1]))
    assert buffer[0, capacity:].isnan().all() and buffer[1, steps * batch :].isnan().all()


@pytest.mark.parametrize("figure", ["2", "4b", "5"])
def test_seeds_in_one_batch_equal_single_runs(figure):
    small = {"steps": 40, "online_steps": 60, "full_batch_steps": 40, "num_samples": 200}
    small |= {"capacities": (32, 320)}
    together = polygames.FIGURES[figure](args(num_seeds=3, **small))[1]
    alone = []
    for seed in range(3):
        alone += polygames.FIGURES[figure](args(seed=seed, num_seeds=1, **small))[1]

    def key(row):
        return [str(row[name]) for name in ("sigma", "method", "capacity", "start", "seed")]

    assert len(together) == len(alone) and len({row["theta_x"] for row in together}) > 2
    for one, other in zip(sorted(together, key=key), sorted(alone, key=key)):
        assert key(one) == key(other)
        for name in ("theta_x", "theta_y", "reward", "path_length"):
            assert one[name] == pytest.approx(other[name], abs=1e-9)


# ---------------------------------------------------------------- the claims


def test_brud_ends_where_the_closed_form_says():
    rows = polygames.table(args(num_seeds=3))
    assert {row["game"] for row in rows} == set(polygames.games(args()))
    assert max(row["difference"] for row in rows) < 1e-3
    agreement = next(row for row in rows if row["game"] == "action agreement")
    assert agreement["end"] == pytest.approx([0.04, -0.02], abs=1e-3)  # the data means, swapped
    for row in rows:
        if row["note"] == "Fig. 4a":
            assert row["end"] == pytest.approx([0, 0], abs=1e-3) and not row["at_peak"]
        if row["note"] == "Fig. 4b":
            assert row["at_peak"] == (row["sigma"] == 0)
        if "Eq. 5" in row["note"]:
            assert row["at_peak"] == (row["note"] == "Eq. 5")
    middle = max((row for row in rows if row["note"] == "Eq. 5"), key=lambda row: row["sigma"])
    assert (middle["mean"][0], middle["sigma"]) == pytest.approx((0.5103, 0.1021), abs=1e-4)


def test_eq_5_by_hand():
    assert polygames.peak(args()) == pytest.approx(0.612372, abs=1e-6)
    assert polygames.eq5_sigma(PEAK, args()) == pytest.approx(0, abs=1e-6)
    by_hand = math.sqrt(-(0.45**2) + 1.020621 * 0.45 - 0.25)
    assert polygames.eq5_sigma(0.45, args()) == pytest.approx(by_hand, abs=1e-5)
    assert math.isnan(polygames.eq5_sigma(0.0, args())) and math.isnan(polygames.eq5_sigma(0.7, args()))


def test_figure_1_steps_away_from_the_true_gradient():
    reward = polygames.games(args())["sign agreement"]
    theta, point = rand(0, 1, 2).abs() * torch.tensor([-1, 1]), rand(1, 1, 1, 2).abs() * torch.tensor([1, -1])
    step, true = (polygames.brud_gradient(reward, theta, data)[0] for data in (point, theta[:, None]))
    assert step[0] < 0 < step[1] and float(step @ true) < 0


def test_figure_2_larger_buffers_take_a_longer_way_and_all_arrive():
    rows = polygames.figure_2(args())[1]
    assert len(rows) == 40
    for row in rows:
        assert row["reward"] > 0.9 and row["theta_x"] * row["theta_y"] > 0
    lengths = [mean(rows, "path_length", capacity=capacity) for capacity in (32, 1280, 2560, 5120)]
    assert lengths == sorted(lengths) and lengths[-1] > 1.2 * lengths[0]


def test_figure_3_runs_straight_to_the_bottom_right():
    rows = polygames.figure_3(args())[1]
    assert len(rows) == 3
    for row, (x, y) in zip(rows, polygames.STARTS):
        assert row["theta_x"] > 0 > row["theta_y"] and row["reward"] < 0
        assert row["theta_y"] - y == pytest.approx(-0.5 * (row["theta_x"] - x), abs=1e-9)
        straight = math.hypot(row["theta_x"] - x, row["theta_y"] - y)
        assert row["path_length"] == pytest.approx(straight, abs=1e-9)


def test_figure_4a_always_ends_at_the_origin():
    for row in polygames.figure_4(args(num_seeds=3), "4a", 0.0)[1]:
        assert abs(row["theta_x"]) < 1e-3 and abs(row["theta_y"]) < 1e-3


def test_figure_4b_follows_the_published_formula():
    expected = {0.0: 0.6124, 0.1: 0.6027, 0.2: 0.5755, 0.5: 0.4374, 1.0: 0.2355, 2.0: 0.0828}
    rows = polygames.figure_4(args(sigmas=tuple(expected)), "4b", PEAK)[1]
    for sigma, theta in expected.items():
        for axis in ("theta_x", "theta_y"):
            assert mean(rows, axis, sigma=sigma) == pytest.approx(theta, abs=0.007)
    at_peak = {s for s in expected if abs(mean(rows, "theta_x", sigma=s) - PEAK) < 1e-3}
    assert at_peak == {0.0}


@pytest.mark.parametrize(
    "sigma, maddpg, pjap", [(0.0, 0.5625, 0.562), (0.2, 0.555, 0.54), (0.5, 0.43, 0.53), (1.0, 0.15, 0.5)]
)
def test_figure_5_rewards(figure_5_rows, sigma, maddpg, pjap):
    assert mean(figure_5_rows, sigma=sigma, method="MADDPG") == pytest.approx(maddpg, abs=0.03)
    assert pjap <= mean(figure_5_rows, sigma=sigma, method="PJAP") <= 0.5626


def mid_points(count, low=0.0, high=1.0):
    return low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("alpha", [1.0, 6.0, 20.0])
def test_where_pjap_ends_in_equally_dense_data(alpha):
    """The bias in the docstring: the draws' spread, 1 / (3 alpha), and where it makes PJAP end."""
    point, line = torch.tensor([0.3, -0.1], dtype=torch.float64), mid_points(1200, -4.0, 4.0)
    grid = torch.cartesian_prod(line, line)
    rho = polygames.priorities(point, grid, alpha, 0.0)
    share = (rho / rho.sum())[:, None]
    mean = (share * grid).sum(0)
    torch.testing.assert_close(mean, point, atol=1e-6, rtol=0)
    variance = (share * (grid - mean) ** 2).sum(0)
    torch.testing.assert_close(variance, torch.full_like(variance, 1 / (3 * alpha)), rtol=1e-3, atol=0)

    setting, line = args(alpha=alpha), mid_points(300, -1.5, 2.7)
    grid, start = torch.cartesian_prod(line, line), torch.tensor([0.9, 0.4], dtype=torch.float64)
    chance = mid_points(20_000).expand(300, -1)  # one draw from each 20,000th of the mass
    game, pjap = polygames.games(setting)["twin peaks"], torch.tensor(True)
    path, _ = polygames.train_offline(game, start, grid, 300, 0.02, chance, pjap, alpha, 1e-12)
    end = math.sqrt(max(polygames.peak(setting) ** 2 - 1 / (3 * alpha), 0.0))  # the docstring's formula, from v above
    if alpha > 1:  # below 8/9, and with an edge to the data well above, it ends at the origin
        assert path[-1].tolist() == pytest.approx([end, end], abs=2e-3)
        assert float(game(*path[-1])) == pytest.approx(0.5625 - 4 / (9 * alpha**2), abs=1e-3)
    assert end == pytest.approx({1.0: 0.204124, 6.0: 0.565194, 20.0: 0.598609}[alpha], abs=1e-6)


def endless(sigma, setting, epsilon):
    """Figure 5 on endless data: the mean of Eq. 4 over the Gaussian density and the priorities, by quadrature."""
    z = mid_points(400, -5.0, 5.0)
    grid, weight = PEAK + sigma * torch.cartesian_prod(z, z), torch.exp(-(torch.cartesian_prod(z, z) ** 2).sum(1) / 2)
    theta = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    for _ in range(setting.steps):
        rho = polygames.priorities(theta, grid, setting.alpha, epsilon) * weight
        rho = rho / rho.sum()
        m, square = (rho[:, None] * grid).sum(0).flip(0), (rho[:, None] * grid**2).sum(0).flip(0)
        theta = theta + setting.learning_rate * (-2 * theta - 8 * theta * square + 5 * m)
    return float(polygames.games(setting)["twin peaks"](*theta))


@pytest.mark.parametrize("sigma, without, floor", [(0.2, 0.5601, 0.5601), (0.5, 0.5543, 0.5540), (1.0, 0.5511, 0.5425)])
def test_the_kernel_and_the_floor_explain_the_rewards_of_pjap(figure_5_rows, sigma, without, floor):
    """Why .544 to .560 and not .5625: polygames.md's numbers, and they are those of Figure 5."""
    assert endless(sigma, args(), 0.0) == pytest.approx(without, abs=6e-5)
    assert endless(sigma, args(), args().epsilon) == pytest.approx(floor, abs=6e-5)
    assert mean(figure_5_rows, sigma=sigma, method="PJAP") == pytest.approx(floor, abs=0.003)


def test_figure_5_step_size_follows_from_the_plot():
    """Without a spread, an epoch leaves 0.900 of the distance to the peak."""
    setting = args(num_seeds=1)
    data, theta = torch.full((1, 4, 2), PEAK, dtype=torch.float64), torch.tensor([[-0.5, 0.5]], dtype=torch.float64)
    reward = polygames.games(setting)["twin peaks"]
    path, _ = polygames.train_offline(reward, theta, data, 10, setting.learning_rate)
    left = (path[0] - PEAK).abs()
    torch.testing.assert_close(left[1:] / left[:-1], torch.full((10, 2), 0.9, dtype=torch.float64))


def test_figure_5_with_epsilon_1_is_plain_maddpg():
    """A floor of 1 makes every priority 1, so PJAP then draws the same data as MADDPG."""
    rows = polygames.figure_5(args(epsilon=1.0, num_seeds=2, num_samples=100, steps=20))[1]
    for method in ("theta_x", "theta_y"):
        maddpg, pjap = ([r[method] for r in rows if r["method"] == name] for name in ("MADDPG", "PJAP"))
        assert maddpg == pytest.approx(pjap, abs=1e-12)


# ---------------------------------------------------------------- the window, the command line, the files


def test_interactive_window_redraws_on_change():
    figure = Figure(figsize=(12, 8))
    FigureCanvasAgg(figure)
    widgets = polygames.build_interactive(args(num_samples=200, steps=60), figure)
    assert widgets["game"].value_selected == "twin peaks"
    assert set(widgets) == {"A", "B", "C", "mean", "spread", "alpha", "log10 epsilon", "game", "PJAP"}

    def curves():
        return [line.get_ydata()[-1] for line in figure.axes[1].lines]

    seen = [curves()]
    widgets["spread"].set_val(0.9)
    seen.append(curves())
    widgets["alpha"].set_val(1.0)
    seen.append(curves())
    widgets["PJAP"].set_active(0)
    seen.append(curves())
    widgets["alpha"].set_val(9.0)  # without PJAP, alpha changes nothing
    assert curves() == seen[-1]
    for name, value in (("A", 0.5), ("B", 2.0), ("C", 4.0), ("mean", 0.2)):
        widgets[name].set_val(value)
        seen.append(curves())
    widgets["game"].set_active(2)
    seen.append(curves())
    assert len({str(each) for each in seen}) == len(seen) and all(len(each) == 3 for each in seen)
    figure.canvas.draw()


def test_the_window_says_that_a_policy_diverges_and_goes_on():
    figure = Figure(figsize=(12, 8))
    FigureCanvasAgg(figure)
    widgets = polygames.build_interactive(args(num_samples=200, steps=60, learning_rate=0.1), figure)
    widgets["PJAP"].set_active(0)  # its data are near the policy, and it stays
    right = figure.axes[1]
    assert right.get_title() == "from the three starts" and len(right.lines) == 3
    widgets["spread"].set_val(1.5)
    assert "diverged" in right.get_title() and not right.lines
    widgets["spread"].set_val(0.1)
    assert right.get_title() == "from the three starts" and len(right.lines) == 3


def test_command_line_writes_every_file(tmp_path):
    out = tmp_path / "new" / "run"
    result = run("--num-seeds", 2, "--out-dir", out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    pictures = [f"figure{name}.png" for name in ("1", "2", "3", "4a", "4b", "5")]
    others = ["config.json", "metrics.csv", "summary.json"]
    assert sorted(p.name for p in out.iterdir()) == sorted(pictures + others)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]  # nothing anywhere else
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG") and (out / name).stat().st_size > 10_000
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert {name: sum(r["figure"] == name for r in rows) for name in ("2", "3", "4a", "4b", "5")} == {
        "2": 8, "3": 3, "4a": 24, "4b": 24, "5": 16,
    }  # fmt: skip
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("theta_x", "reward"))
    config, summary = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert config["num_seeds"] == 2 and config["device"] in ("cpu", "cuda")
    assert config["versions"]["torch"] == torch.__version__ and config["git_commit"]
    assert summary["seeds"] == [0, 1] and summary["wall_seconds"] > 0

    def key(row):
        return row["figure"], str(row["sigma"]), row["method"]

    pjap = next(r for r in summary["rewards"] if key(r) == ("5", "1.0", "PJAP"))
    values = [float(r["reward"]) for r in rows if key(r) == ("5", "1.0", "PJAP")]
    assert pjap["mean"] == pytest.approx(sum(values) / 2) and pjap["stderr"] > 0
    assert "closed form" in result.stdout and len(re.findall(r"reward .* paper", result.stdout)) == 8


def test_a_seed_gives_the_same_file_twice_and_one_figure_alone_changes_nothing(tmp_path):
    flags = ("--num-seeds", 2, "--num-samples", 100, "--steps", 20, "--full-batch-steps", 20)
    assert run("--figures", "5", "--out-dir", tmp_path / "a", *flags).returncode == 0
    assert run("--figures", "3", "5", "--out-dir", tmp_path / "b", *flags).returncode == 0
    one, both = ((tmp_path / name / "metrics.csv").read_text().splitlines() for name in "ab")
    assert [line for line in both if not line.startswith("3,")] == one
    assert run("--figures", "1", "--out-dir", tmp_path / "b", *flags).returncode == 0  # trains nothing: no rows
    assert (tmp_path / "b" / "metrics.csv").read_text().splitlines() == one[:1]


def test_results_are_written_before_anything_is_printed(tmp_path):
    flags = "--figures 1 --num-seeds 1 --out-dir run".split()
    words = [sys.executable, ROOT / "algorithms" / "polygames.py", *flags]
    with open("/dev/full", "w") as full:  # takes no letter
        process = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=120)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "figure1.png", "metrics.csv", "summary.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--figures", "7"], "unknown figure 7"),
        (["--c", "2"], "C > 2A"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--out-dir", "/dev/null/x"], "/dev/null/x"),
        (["--interactive"], "needs a display"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, flags, says):
    complains(run("--out-dir", tmp_path / "run", *flags), says)
    assert not (tmp_path / "run").exists()


def test_sizes_that_do_not_fit_end_with_one_line(tmp_path):
    complains(run("--out-dir", tmp_path / "run", "--num-samples", 10**15), "not enough memory")
    assert not [*(tmp_path / "run").iterdir()]


@pytest.mark.parametrize(
    "changes",
    [
        {"figures": ()}, {"alpha": -1.0}, {"alpha": math.nan}, {"epsilon": 0.0}, {"epsilon": 1.5},
        {"steps": 0}, {"num_seeds": 0}, {"seed": -1}, {"num_samples": 0}, {"sigmas": (0.1, -0.1)},
        {"capacities": (8,)}, {"noise": -0.1}, {"a": 0.0}, {"b": math.inf}, {"device": "tpu"},
        {"batch_size": -3}, {"sigmas": ()},
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(changes):
    polygames.check(Args())
    with pytest.raises(ValueError):
        polygames.check(Args(**changes))


def test_divergence_is_reported():
    with pytest.raises(FloatingPointError, match="learning-rate"):
        polygames.figure_4(args(learning_rate=0.9, num_seeds=1), "4b", PEAK)
