"""The grid of all methods and tasks: its cells, its statistics, and its pages from a made-up
results.csv."""

import csv
import math

import grid
import numpy as np
import pytest
import torch
from conftest import ROOT, load_script

from envs.matrix import read_payoff

WORDS, SHORT = grid.words, ["--steps", "3", "--eval-every", "2", "--eval-episodes", "2"]


def test_welch_on_known_numbers():
    """The p-value against drawn numbers of Student's distribution."""
    x, y = (
        [27.5, 21.0, 19.0, 23.6, 17.0, 17.9],
        [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9],
    )
    a, b = np.var(x, ddof=1) / len(x), np.var(y, ddof=1) / len(y)
    t, df = (np.mean(x) - np.mean(y)) / math.sqrt(a + b), (a + b) ** 2 / (a**2 / 5 + b**2 / 12)
    # by drawing: the share of t-distributed numbers that are as far out
    torch.manual_seed(0)
    drawn = torch.distributions.StudentT(torch.tensor(df)).sample((2_000_000,))
    assert grid.welch(x, y) == pytest.approx(
        (drawn.abs() > abs(t)).double().mean().item(), abs=2e-3
    )
    assert grid.welch([1, 1, 1], [1, 1]) == 1 and grid.welch([1, 1, 1], [2, 2]) == 0
    assert grid.welch(x, x) == pytest.approx(1)
    assert grid.welch([0, 1, 0, 1], [10, 11, 10, 11]) < 1e-4


def test_each_cell_is_a_command_that_its_script_takes():
    for cell in grid.cells():
        _, path, *argv = grid.words(cell, "somewhere", False)
        if cell.task.env in ("matrix", "bridge"):  # the others' presets look at data
            args = load_script(path.split("/")[-1][:-3]).parse(argv)
            assert (args.env, args.dataset, args.num_seeds) == (
                cell.task.env,
                cell.dataset,
                cell.task.seeds,
            )
    folders = [cell.folder for cell in grid.cells()]
    assert len(set(folders)) == len(folders)
    assert {script for script, _, _ in grid.METHODS.values()} | {"mappo", "polygames"} == {
        path.stem for path in (ROOT / "algorithms").glob("*.py")
    }


def test_random_play_is_worth_what_the_tasks_say():
    for task in grid.TASKS:
        if task.env == "matrix":
            assert task.worst == pytest.approx(read_payoff(task.task).mean().item(), abs=1e-6), (
                task.name
            )
    assert -20 < grid.random_play(next(t for t in grid.TASKS if t.env == "bridge")) < -5


def test_a_cell_is_trained_once_and_another_machines_lines_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid, "RESULTS", tmp_path / "results.csv")
    (cell,) = [c for c in grid.cells() if c.key == ("cloning", "xor", "ab")]
    monkeypatch.setattr(grid, "words", lambda *cell: WORDS(*cell) + SHORT)
    elsewhere = dict.fromkeys(grid.COLUMNS, "") | {
        "method": "OMAR",
        "task": "xor",
        "dataset": "all",
        "seed": "3",
        "return": "1",
    }
    with (tmp_path / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, grid.COLUMNS)
        table.writeheader()
        table.writerow(elsewhere)
    assert grid.train_all([cell], tmp_path / "runs", 1) == 0
    found = grid.read_results()
    assert [row["seed"] for row in found[cell.key]] == [str(seed) for seed in range(10)]
    assert all(row["return"] is not None and row["commit"] for row in found[cell.key])
    assert found["OMAR", "xor", "all"][0]["return"] == 1
    monkeypatch.setattr(grid, "words", None)  # a finished cell is not trained again
    assert grid.train_all([cell], tmp_path / "runs", 1) == 0 and "done" in capsys.readouterr().out


def test_what_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid, "RESULTS", tmp_path / "results.csv")
    keys = ("cloning", "xor", "ab"), ("cloning", "xor", "all")
    two = [cell for cell in grid.cells() if cell.key in keys]

    def broken(cell, folder, resume):
        return WORDS(cell, folder, resume) + (["--lr", "-1"] if cell.dataset == "all" else SHORT)

    monkeypatch.setattr(grid, "words", broken)
    assert grid.train_all(two, tmp_path / "runs", 2) == 1
    shown = capsys.readouterr().out
    assert "cloning xor all: error: --lr" in shown and "cloning xor ab: done" in shown
    assert set(grid.read_results()) == {("cloning", "xor", "ab")}


def test_the_table_and_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(grid, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(grid, "PICTURE", tmp_path / "grid.png")
    scores = {"InSPO": [1.0] * 10, "cloning": [0.0, 1.0] * 5, "CFCQL": [0.0] * 10}
    rows = []
    for method, values in scores.items():
        for seed, value in enumerate(values):
            row = dict.fromkeys(grid.COLUMNS, "") | {
                "method": method,
                "task": "xor",
                "dataset": "ab-ba",
                "seed": seed,
            }
            data = 0.5 if method == "CFCQL" else 1.0  # recorded on another machine
            rows.append(row | {"return": value, "dataset_return": data, "best_return": 1.0})
    with (tmp_path / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, grid.COLUMNS)
        table.writeheader()
        table.writerows(rows)
    (tmp_path / "README.md").write_text("before\n<!-- grid -->\nold\n<!-- end of grid -->\nafter\n")
    grid.render()
    page = (tmp_path / "README.md").read_text()
    assert (
        page.startswith("before\n<!-- grid -->")
        and page.endswith("<!-- end of grid -->\nafter\n")
        and "old" not in page
    )
    (line,) = [line for line in page.splitlines() if line.startswith("| xor")]
    assert line == "| xor `ab-ba` | 1.00 | 0.50±0.17 | 1.00* | 0.00† |"
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    again = page
    grid.render()
    assert (tmp_path / "README.md").read_text() == again


@pytest.mark.parametrize(
    "change, name",
    [
        ({"methods": ["nothing"]}, "nothing"),
        ({"tasks": ["chess"]}, "chess"),
        ({"index": 10_000}, "10000"),
    ],
)
def test_what_names_nothing(change, name):
    with pytest.raises(ValueError, match=name):
        grid.chosen(grid.Args(**change))


def test_the_list_numbers_the_cells(capsys):
    grid.main(grid.Args(list=True, methods=["inspo"], tasks=["xor/ab"]))
    (line,) = capsys.readouterr().out.splitlines()
    number, *key = line.split()
    assert key == ["InSPO", "xor", "ab"]
    grid.main(grid.Args(list=True, index=int(number)))
    assert capsys.readouterr().out.splitlines() == [line]
