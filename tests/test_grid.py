"""The grid of all methods and tasks: its cells, its statistics, and its pages from a made-up
results.csv."""

import grid
import pytest
from conftest import ROOT, load_script

from data.run import files
from envs.matrix import read_payoff

WORDS, SHORT = grid.words, ["--steps", "3", "--eval-every", "2", "--eval-episodes", "2"]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Puts rows into an own results.csv: what they lack is empty."""
    monkeypatch.setattr(grid, "RESULTS", tmp_path / "results.csv")
    empty = dict.fromkeys(grid.COLUMNS, "") | {"task": "xor"}
    return lambda *rows: files.save_csv(grid.RESULTS, [empty | row for row in rows])


def test_each_cell_is_a_command_that_its_script_takes():
    for cell in grid.cells():
        _, path, *argv = grid.words(cell, "somewhere", False)
        if cell.task.env in ("matrix", "bridge"):  # the others' presets look at data
            args = load_script(path.split("/")[-1][:-3]).parse(argv)
            wanted = cell.task.env, cell.dataset, cell.task.seeds
            assert (args.env, args.dataset, args.num_seeds) == wanted
        if cell.task.env == "matrix":  # random play
            payoff = read_payoff(cell.task.task).mean().item()
            assert cell.task.worst == pytest.approx(payoff, abs=1e-6)
    folders = [cell.folder for cell in grid.cells()]
    assert len(set(folders)) == len(folders)
    assert {script for script, _, _ in grid.METHODS.values()} | {"mappo", "polygames"} == {
        path.stem for path in (ROOT / "algorithms").glob("*.py")
    }


def test_a_cell_is_trained_once_and_a_failure_is_told(tmp_path, monkeypatch, capsys, results):
    results({"method": "OMAR", "dataset": "all", "seed": 3, "return": 1})  # of another machine
    keys = ("cloning", "xor", "ab"), ("cloning", "xor", "all")
    good, bad = [cell for cell in grid.cells() if cell.key in keys]

    def words(cell, folder, resume):
        return WORDS(cell, folder, resume) + (["--lr", "-1"] if cell == bad else SHORT)

    monkeypatch.setattr(grid, "words", words)
    assert grid.train_all([good, bad], tmp_path / "runs", 2) == 1
    shown = capsys.readouterr().out
    assert "cloning xor all: error: --lr" in shown and "cloning xor ab: done" in shown
    found = grid.read_results()
    assert set(found) == {good.key, ("OMAR", "xor", "all")}
    assert [row["seed"] for row in found[good.key]] == [str(seed) for seed in range(10)]
    assert all(row["return"] is not None and row["commit"] for row in found[good.key])
    assert found["OMAR", "xor", "all"][0]["return"] == 1
    monkeypatch.setattr(grid, "words", None)  # a finished cell is not trained again
    assert grid.train_all([good], tmp_path / "runs", 1) == 0


def test_the_table_and_the_picture(tmp_path, monkeypatch, results):
    monkeypatch.setattr(grid, "PAGE", tmp_path / "README.md")
    monkeypatch.setattr(grid, "PICTURE", tmp_path / "grid.png")
    scores, rows = {"InSPO": [1.0] * 10, "cloning": [0.0, 1.0] * 5, "CFCQL": [0.0] * 10}, []
    for method, values in scores.items():
        row = {"method": method, "dataset": "ab-ba", "best_return": 1.0}
        row["dataset_return"] = 0.5 if method == "CFCQL" else 1.0  # recorded on another machine
        rows += [row | {"seed": seed, "return": value} for seed, value in enumerate(values)]
    results(*rows)
    grid.PAGE.write_text("before\n<!-- grid -->\nold\n<!-- end of grid -->\nafter\n")
    grid.render()
    page = grid.PAGE.read_text()
    assert page.startswith("before\n<!-- grid -->") and "old" not in page
    assert page.endswith("<!-- end of grid -->\nafter\n")
    assert "\n| xor `ab-ba` | 1.00 | 0.50±0.17 | 1.00* | 0.00† |\n" in page
    assert grid.PICTURE.read_bytes()[:4] == b"\x89PNG"
    grid.render()
    assert grid.PAGE.read_text() == page


def test_cells_are_chosen_by_names_patterns_or_numbers():
    ((number, cell),) = grid.chosen(grid.Args(methods=["ins*"], tasks=["xor/ab"]))
    assert cell.key == ("InSPO", "xor", "ab")
    assert grid.chosen(grid.Args(index=number)) == [(number, cell)]
    for change in ({"methods": ["chess"]}, {"tasks": ["chess"]}, {"index": 10_000}):
        with pytest.raises(ValueError, match="chess|10000"):
            grid.chosen(grid.Args(**change))
