"""Killed at moments that nobody chose, and resumed: every script ends with the same bits as a run left alone."""

import json
import random
import time

import pytest
import torch
from test_bad_inputs import SCRIPTS, attempt, words

import data

LONGER = ("--steps", "60", "--eval-every", "7")
MORE = {"mappo": ("--steps", "240", "--eval-every", "24"), "moma_ppo": ("--model-steps", "40")}
NAMES = [name for name in SCRIPTS if name != "polygames"]  # whose figures are made in seconds, all or none


def lasting(folder):
    """All that a run learned and measured, without the time that it took."""
    about = json.loads((folder / "summary.json").read_text())
    model = about.get("world_model", {})
    for clock in (about, model):
        for name in ("wall_seconds", "updates_per_second", "env_steps_per_second"):
            clock.pop(name, None)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    del state["seconds"], state["wall"]
    tables = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    return about, tables, state


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


LONG = [pytest.param(name, kills, marks=pytest.mark.long) for kills in (1, 4) for name in NAMES]


@pytest.mark.parametrize("name, kills", [("alberdice", 1), ("td3_bc", 1), *LONG])  # others have a test of their own
def test_the_same_bits(tmp_path, name, kills):
    data.write(data.load("matrix", "xor", "aa-ab-ba", episodes=20), tmp_path / "data.h5")
    data.write(data.load("polynomial", "twin-peaks", "peak-0.5", episodes=20), tmp_path / "moves.h5")
    argv, begun = words(tmp_path, name, *LONGER, *MORE.get(name, ())), time.monotonic()
    code, said = attempt(tmp_path, name, argv, tmp_path / "whole", 120)
    assert code == 0, said
    takes, chance, dead, folder = time.monotonic() - begun, random.Random(f"{name} {kills}"), 0, tmp_path / "broken"
    for _ in range(kills):
        code, said = go_on(tmp_path, name, argv, folder, takes * chance.uniform(0.05, 0.95))
        assert code in (None, 0), said
        dead += code is None
        if code == 0:
            break
    assert dead
    if code is None:
        code, said = go_on(tmp_path, name, argv, folder, 120)
        assert code == 0, said
    assert same(lasting(folder), lasting(tmp_path / "whole"))


def go_on(place, name, argv, folder, seconds):
    """Resume a run, or begin it where the kill came before there was one."""
    begun = (folder / "config.json").exists()
    return attempt(place, name, ["--resume"] if begun else argv, folder, seconds)
