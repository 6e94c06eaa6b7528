"""Tests of every script as a file to take away: what stands above its line `run` needs nothing of this repository."""

import ast
import os
import re
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, complains

LINE = "# " + 64 * "-" + " run\n"
SCRIPTS = sorted((ROOT / "algorithms").glob("*.py"))
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])

CHECK = """

def _tensors(value):
    if isinstance(value, torch.nn.Module):
        yield from value.state_dict().values()
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, torch.Tensor):
        yield value

_found = {name: [x for x in _tensors(value) if x.is_floating_point()] for name, value in list(globals().items())}
assert sum(map(len, _found.values())), "no tensor to look at"
assert all(x.isfinite().all() for xs in _found.values() for x in xs), [
    name for name, xs in _found.items() if not all(x.isfinite().all() for x in xs)]
"""


@pytest.fixture
def folder(tmp_path):
    """A folder to copy a file into, which has none of our files, but somebody else's `data` and `envs` in and above it.

    Whoever imports these fails, and cannot take it for a missing module.
    """
    place = tmp_path / "mine"
    place.mkdir()
    for where in (place, tmp_path):
        for name in ("data", "envs"):
            (where / name).mkdir()
            (where / name / "__init__.py").write_text(f"raise RuntimeError('this {name} is somebody else\\'s')\n")
    return place


def copied(script, folder, text=None):
    (folder / script.name).write_text(script.read_text() if text is None else text)


def python(folder, *words):
    """Run python in a folder from which nothing of this repository can be seen."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    words = [sys.executable, *words]
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)


def runs_alone(folder, code):
    """Run a program that may import from its own folder; it must end well, and without a word of nan."""
    first, last = "import sys\nsys.path.insert(0, '')\n", "\nassert not {'data', 'envs'} & sys.modules.keys()\n"
    process = python(folder, "-I", "-c", first + code + last)
    assert process.returncode == 0, process.stderr
    assert not re.search(r"\bnan\b", process.stdout + process.stderr, re.I), process.stdout + process.stderr
    return process


def foreign_imports(text):
    """What the code above the line `run` imports besides torch and the standard library, at any depth."""
    assert text.count(LINE) == 1, "there must be one line that parts the method from the run"
    found = []
    for node in ast.walk(ast.parse(text[: text.index(LINE)])):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Name) and node.id == "__import__":
            found.append(node.id)
    own = (sys.stdlib_module_names | {"torch"}) - {"importlib"}  # that one could import anything
    return [name for name in found if name.split(".")[0] not in own]


def own_loop(text):
    """The docstring's example: what stands between "In your own loop" and the next blank line."""
    lines = ast.get_docstring(ast.parse(text), clean=False).splitlines()
    (start,) = [n for n, line in enumerate(lines, 1) if line.startswith("In your own loop")]
    length = next(n for n, line in enumerate([*lines[start:], ""]) if not line.strip())
    return textwrap.dedent("\n".join(lines[start : start + length])).splitlines()


# ---------------------------------------------------------------- every script


@every_script
def test_imports_alone(script, folder):
    copied(script, folder)
    runs_alone(folder, f"import {script.stem}\n")


@every_script
def test_the_method_needs_torch_and_the_standard_library_only(script):
    assert foreign_imports(script.read_text()) == []


@every_script
def test_own_loop_trains(script, folder):
    lines = own_loop(script.read_text())
    assert 5 <= len(lines) <= 15
    assert any(re.match(r"import\b.*\b" + script.stem, line) for line in lines)
    copied(script, folder)
    runs_alone(folder, "\n".join(lines) + CHECK)


@every_script
def test_does_not_run_alone(script, folder):
    copied(script, folder)
    process = python(folder, script.name)
    complains(process, "error: ", "repository")
    assert not process.stdout and not (folder / "runs").exists()


# ---------------------------------------------------------------- the tests themselves


@pytest.mark.parametrize(
    "planted, found",
    [
        ("import numpy as np", ["numpy"]),
        ("from data import runs", ["data"]),
        ("import torch.nn as nn, tyro.conf", ["tyro.conf"]),
        ("def late():\n    if torch:\n        import envs.play", ["envs.play"]),
        ("from . import layout", ["."]),
        ("import importlib", ["importlib"]),
        ("np = __import__('numpy')", ["__import__"]),
        ("from torch.optim.adam import adam\nimport math, os.path", []),
    ],
)
def test_a_planted_import_is_seen(planted, found):
    text = f'"""Words, as in: import numpy."""\n\nimport torch\n\n{planted}\n\n\n{LINE}import numpy\n'
    assert foreign_imports(text) == found
    path = ROOT / "algorithms" / "polygames.py"
    assert foreign_imports(path.read_text().replace(LINE, f"{planted}\n\n\n{LINE}")) == found


def test_a_wrong_example_is_seen(folder):
    loop = "In your own loop (alone):\n  import torch, mine\n  x = torch.ones(2) / mine.ZERO\n    * 1\n\n  not this\n"
    lines = own_loop(f'"""Words.\n\n{loop}"""\n')
    assert lines == ["import torch, mine", "x = torch.ones(2) / mine.ZERO", "  * 1"]
    script = folder / "mine.py"
    for text, code in [
        ("ZERO = 0", "\n".join(lines[:2]) + CHECK),  # not finite
        ("import data", "import mine"),  # out of reach, or somebody else's
        ("", "import torch\nnet = torch.nn.Linear(2, 2)\nnet.bias.data /= 0\nparts = [{'a': net}]" + CHECK),
        ("", "print(float('nan'))"),
        ("", "import torch" + CHECK),  # nothing to look at
    ]:
        copied(script, folder, text)
        with pytest.raises(AssertionError):
            runs_alone(folder, code)
    copied(script, folder, "ZERO = 1")
    runs_alone(folder, "\n".join(lines[:2]) + CHECK)
