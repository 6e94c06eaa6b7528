from data.dataset import fingerprint  # noqa: F401  until data/runs.py goes
