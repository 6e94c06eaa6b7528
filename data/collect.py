"""Record datasets by rolling out behaviour policies in our own environments or in others.

python data/collect.py --env bridge --dataset mixed --out mixed.h5
python data/collect.py --env smac --task 2s3z --dataset medium-replay --episodes 5000 --out mine.h5
python data/collect.py --env matrix --task "[[1, 0], [0, 2]]" --dataset "[0.9, 0.1]" --out mine.h5
python data/collect.py --env polynomial --task twin-peaks --dataset peak-0.3 --out mine.h5
python data/collect.py --env bridge --team runs/bc/bridge-mixed-... --noise 0.3 --out mine.h5
python data/collect.py --env package.module:factory --team random --out mine.h5
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # let `python data/collect.py` find the packages beside its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.dataset import write
from data.recipes import collect_dataset, default
from data.record import Kept, record_team
from data.run import ask, game_options, launch, load_team, read_flags, say


@dataclass
class Args:
    env: str = "bridge"  # the environment, one of ours or package.module:factory
    task: str = ""  # its task: a map of smac, a body's views; for matrix also payoffs as JSON
    dataset: str = ""  # the behaviour; also probabilities (matrix) or any spread (polynomial)
    team: str = ""  # who plays in place of a named behaviour: random, or the folder of a run
    noise: float = 0.0  # with --team: the share of random actions, or the deviation of what is
    # added to continuous ones
    env_kwargs: str = ""  # with --team: more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, where a game is not ours
    episodes: int = 0  # how many episodes; 0 for the default
    seed: int = 0  # of the behaviour
    out: Path = Path("dataset.h5")  # the HDF5 file to write


def main(args):
    if args.episodes < 0 or args.seed < 0 or not 0 <= args.noise < float("inf"):
        raise ValueError("--episodes, --seed and --noise must be at least 0, and finite")
    team = args.team or ("random" if ":" in args.env else "")
    if args.dataset and team:
        raise ValueError(f"--dataset {args.dataset} names a behaviour: here --team says who plays")
    if (args.env_kwargs or args.noise) and not team:
        raise ValueError("--env-kwargs and --noise need --team")
    if team:
        dataset = let_play(team, args)
    else:
        name = args.dataset or default(args.env, args.task)[1]
        dataset = collect_dataset(args.env, args.task, name, args.seed, args.episodes)
    write(dataset, args.out)
    mean = dataset.returns.mean()
    say(f"{args.out}: {len(dataset.returns)} episodes, mean return {mean:.4f}")


def let_play(team, args):
    """The `Dataset` of a random team, or of that of a run."""
    if team != "random":
        program = load_team(team)
        team = Kept(team, program.start, functools.partial(ask, program))
    episodes, options = args.episodes or 500, game_options(args)
    return record_team(args.env, args.task, team, episodes, args.seed, args.noise, options)


def parse(argv=None):
    return read_flags(Args, argv, __doc__)


if __name__ == "__main__":
    launch(main, parse)
