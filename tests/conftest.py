"""What the tests share: the scripts as modules, and a command line."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = (
    ROOT.parent / "shared" / "data"
)  # real data by other authors; tests that need it are skipped without it
sys.path.insert(0, str(ROOT))


def load_script(name):
    """algorithms/NAME.py as a module, without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "algorithms" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def command(*words, **options):
    """Run `python WORDS` in the repository, as a user would; returns the finished process."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        **options,
    )


def complains(process, *words, code=1):
    """Assert that a command ended with one clear line with `words`, and with this exit code."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == code, process.stderr
    assert len(lines) == 1 and "Traceback" not in process.stderr, process.stderr
    for word in words:
        assert word in lines[0], lines[0]


def refuses(script, flags, said, folder):
    """Assert that a script ends with one line that holds `said`, and leaves no folder behind."""
    with pytest.raises((ValueError, OSError)) as error:
        script.main(
            script.parse([*flags, *(() if "--resume" in flags else ("--out-dir", str(folder)))])
        )
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not folder.exists()


@pytest.fixture
def float64():
    """Everything that the test makes has double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small networks: one thread each, so that the suite is steady on a shared machine."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="also run the claims that take too long for every time"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "long: a claim that takes too long for every time; only with --long"
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "long" in item.keywords and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="only with --long"))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests at once run on all cores, where pytest-xdist is installed; -n 0: on one."""
    whole = [Path(word).resolve() for word in config.args] in ([ROOT / "tests"], [ROOT])
    mine = config.pluginmanager.hasplugin("xdist") and "PYTEST_XDIST_WORKER" not in os.environ
    if mine and whole and config.option.numprocesses is None:
        config.option.numprocesses = min(8, os.cpu_count() or 1)
