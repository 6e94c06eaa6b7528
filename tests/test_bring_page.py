"""The page "Bring your own" of data/README.md does what it says, in an empty folder."""

import re
import subprocess
import sys

from conftest import ROOT


def test_the_page_runs(tmp_path):
    page = (ROOT / "data" / "README.md").read_text()
    page = page.partition("## Bring your own")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "bring.py").write_text(f"REPO = {str(ROOT)!r}\n" + code)
    words = [sys.executable, "bring.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"tensor\(\[\[[0-3], [0-3]\]\]\)", done.stdout.splitlines()[-1])
