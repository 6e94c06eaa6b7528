"""Offline datasets: one form in memory, one on disk, readers for others, and our own recipes.

    from data import load
    dataset = load("bridge", "", "mixed")                 # a name: recorded once, then cached
    dataset = load("bridge", "", "path/to/file.h5")       # a file of ours
    dataset = load("bridge", "", "path/to/alberdice")     # AlberDICE's folder of .npy files
    dataset = load("smac", "2s3z", "2s3z_medium.h5")      # CFCQL's HDF5, recorded in StarCraft II
    dataset = load("smac", "3m", "3m.vlt/Good")           # OG-MARL's vault (needs tensorstore)
    dataset = load("ant", "full", "ant_medium-v2.hdf5")   # D4RL's file, or a folder of Minari's

    write(Dataset.from_episodes(episodes, env="bridge"), "mine.h5")   # your own: a list of episodes
    write(Dataset.from_transitions(arrays, ends), "mine.h5")          # or a replay buffer

`python data/collect.py` records a dataset; `python data/describe.py FILE` says what it holds.
"""

from data.dataset import Dataset, write
from data.readers import read
from data.recipes import collect_dataset, load, names

__all__ = ["Dataset", "collect_dataset", "load", "names", "read", "write"]
