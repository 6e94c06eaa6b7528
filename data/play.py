"""Let the teams that a finished run has kept play again.

python data/play.py runs/inspo/bridge-mixed-20261125-120000 --games 100 --gif bridge.gif
"""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tyro
from PIL import Image, ImageDraw  # comes with Matplotlib

if __name__ == "__main__":  # let `python data/play.py` find the packages beside its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.run import (
    ask,
    game,
    kept_player,
    launch,
    load_team,
    read_config,
    read_flags,
    save,
    say,
    score,
)
from envs.rollout import play


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # the folder of a finished run
    games: int = 100  # games for each seed's team
    seed: int = 0  # of the games
    gif: Path | None = None  # draw a game as an animated picture
    film_seed: int | None = None  # whose game to draw; by default the run's first seed
    env: str = ""  # the run's environment, if it is not ours: playing there runs that module


def main(args):
    """Play again what a run has learned, and print the score."""
    config = read_config(args.run)
    kept = SimpleNamespace(**config["args"])
    check(args, kept)
    team = load_team(args.run)
    if args.gif:
        index = 0 if args.film_seed is None else args.film_seed - kept.seed
        if not 0 <= index < len(team.start):
            raise ValueError(f"--film-seed {args.film_seed} is none of the run's seeds")
        images = film(kept, team, index, args.seed)
        save_gif(args.gif, images)
    scores = score(kept_player(team), kept, args.seed, args.games, "cpu")
    title = f"{config['script']} on {kept.env} {kept.task}".strip()
    say("\n".join([f"{title}: {args.games} games a seed, greedy", *table(scores, kept.seed)]))
    if args.gif:
        say(f"{args.gif}: a game of seed {kept.seed + index}, {len(images) - 1} steps")


def check(args, kept):
    """Raise ValueError for a run that cannot be played, or a picture that cannot be written."""
    if not kept.env:
        raise ValueError(f"{args.run} was trained without an environment: nothing to play in")
    if args.env not in ("", kept.env):
        raise ValueError(f"{args.run} was trained in {kept.env}, not in {args.env}")
    if ":" in kept.env and not args.env:  # no file decides which code runs
        remedy = f"add --env {kept.env} to run that module"
        raise ValueError(f"{args.run} was trained in a game that is not ours: {remedy}")
    if args.games < 1:
        raise ValueError(f"--games must be above 0, not {args.games}")
    if args.gif and (args.gif.suffix != ".gif" or not args.gif.absolute().parent.is_dir()):
        raise ValueError(f"--gif must be a file .gif in a folder that exists, not {args.gif}")


def table(scores, first):
    """Lines of a table: each seed's mean ± standard error over games, then over seeds.

    Args:
        scores: {heading: (S, E)}.
    """

    def line(name, values):
        cells = []
        for x in values:
            error = f" ± {x.std() / len(x) ** 0.5:<9.4f}" if len(x) > 1 else ""
            cells.append(f"{x.mean():12.4f}{error}")
        return (name.ljust(12) + "".join(cells)).rstrip()

    S = len(next(iter(scores.values())))
    heads = [name.replace("_", " ") for name in scores]
    lines = [" " * 12 + "".join(f"{head:>12s}".ljust(24) for head in heads).rstrip()]
    for s in range(S):
        lines.append(line(f"seed {first + s}", [x[s] for x in scores.values()]))
    if S > 1:
        lines.append(line("all seeds", [x.mean(1) for x in scores.values()]))
    return lines


# ---------------------------------------------------------------- an animated picture
def stage(kept):
    """A game to be drawn."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault(
            "MUJOCO_GL", "egl"
        )  # before MuJoCo is loaded: draws without a display
    if ":" in kept.env:
        with contextlib.suppress(ValueError):  # so that games of PettingZoo's kind draw themselves
            return game(kept, render_mode="rgb_array")
    return game(kept)


def film(kept, team, index, seed):
    """Let team `index` play one game: an image before each step, and one after the last."""
    images = []
    taken = None

    def act(obs, info, memory):
        nonlocal taken
        actions, memory = ask(team, obs, info, memory)
        taken = actions[index]  # (1, N) or (1, N, A)
        images.append(framed(picture(one, taken), f"step {len(images)}"))
        return taken, memory

    with contextlib.closing(stage(kept)) as one:
        played = play(one, act, team.start, seed)
        won = ", won" if played.won is not None and played.won[0] else ""
        end = f"step {len(images)}, return {played.returns[0]:.2f}{won}"
        return [*images, framed(picture(one, taken), end)]


def picture(one, actions):
    """A game as an array (height, width, 3); ValueError if it does not draw itself."""
    try:
        drawn = one.picture(actions) if hasattr(one, "picture") else one.render()
        drawn = np.asarray(drawn[0] if isinstance(drawn, list | tuple) else drawn)
    except (NotImplementedError, AttributeError):
        drawn = np.zeros(0)
    if drawn.ndim != 3 or drawn.dtype != np.uint8:
        raise ValueError(f"{type(one).__name__} has no picture(actions), and no render() of arrays")
    return drawn[..., :3]


def framed(drawn, text):
    """An array (height, width, 3) as an image with a line of text above it."""
    image = Image.new("RGB", (drawn.shape[1], drawn.shape[0] + 16), "white")
    image.paste(Image.fromarray(drawn), (0, 16))
    ImageDraw.Draw(image).text((4, 2), text, fill="black")
    return image.quantize()


def save_gif(path, images):
    """Write an animated picture, which lasts 20 seconds at most, if 50 images a second will do."""
    hold = min(250, max(20, 20_000 // len(images) // 10 * 10))  # milliseconds, in tens
    holds = [hold] * (len(images) - 1) + [2000]
    content = io.BytesIO()
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=holds, loop=0)
    save(path, content.getvalue())


def parse():
    return read_flags(Args, None, __doc__)


if __name__ == "__main__":
    launch(main, parse)
