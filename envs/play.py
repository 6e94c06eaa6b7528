"""How a team plays a batch of games: the one loop behind every evaluation and every recording.

As a command it lets the teams that a finished run has kept play again:
  python envs/play.py runs/inspo/bridge-mixed-20261125-120000 --games 100 --gif bridge.gif
"""

import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import uuid
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is loaded, Ctrl-C ends the program without a traceback
import numpy as np
import torch
import tyro

if __name__ == "__main__":  # let `python envs/play.py` find the packages beside its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from envs.rollout import Played, play  # noqa: E402, F401


# ---------------------------------------------------------------- a kept team
# A team.pt2 is a zip archive: numbers as plain bytes, and JSON that says how to compute with them. torch.export.load is
# not made for a stranger's: in torch 2.13 it unpickles what the archive says is pickled, and hands texts in the JSON to
# eval and exec (sizes, to SymPy; guards; names, which become part of a function's code). So each part is read here, and
# a copy of it handed on, if it has a form that kept teams need. The forms, as regular expressions:
PARTS = (
    r"(data/weights/weight|data/constants/tensor)_\d+|data/weights/model_weights_config\.json|models/model\.json|"
    r"data/constants/model_constants_config\.json|data/sample_inputs/model\.pt|archive_(format|version)|byteorder|"
    r"\.data/(version|serialization_id)"
)
NAME = r"([A-Za-z_]\w*(\.\w+)*)?"
TREE = r'("(type|context|children_spec|builtins\.(tuple|list|dict)|null|\[\])"|null|[][{}:,1 ])+'  # nested arguments
FORMS = {  # of the JSON's texts by their key; all others are names
    "name": r"\w*",
    "as_name": r"\w*",
    "path_name": r"(weight|tensor)_\d+",
    "target": r"torch\.ops\.aten\.(?!from_file|save)\w+\.[A-Za-z]\w*|torch\.sym_\w+|"  # what is computed
    r"_operator\.(add|sub|mul|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|getitem)",
    "expr_str": r"([A-Z]\w*\(|Symbol\('\w+'|(positive|integer)=True|-?\d+|\)|, )+",  # a size: Mul(Integer(2), ...)
    "in_spec": TREE,
    "out_spec": TREE,
    "torch_version": r"[\w.+]+",
}


def checked(part, key=""):
    """A copy of a kept team's JSON, moved to the CPU, without what only describes the program.

    Raises:
        ValueError: a text has another form than those above.
    """
    if isinstance(part, list):
        return [checked(x, key) for x in part]
    if isinstance(part, dict):
        if part.get("use_pickle"):
            raise ValueError("it holds pickles")
        if part.get("type") == "cuda":
            return {"type": "cpu", "index": None}
        blank = {"metadata": {}, "guards_code": []}
        return {checked(k): blank[k] if k in blank else checked(x, k) for k, x in part.items()}
    if isinstance(part, str) and not re.fullmatch(FORMS.get(key, NAME), part, re.ASCII):
        raise ValueError(f"its {key or 'name'} {part[:40]!r} is not one of a kept team")
    return part


def copy_archive(path):
    """A team.pt2 with what has one of the forms above, as an open file; ValueError if there is more."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as anew:
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            if not re.fullmatch(PARTS, name, re.ASCII) or info.compress_type:  # nor are they ever packed
                raise ValueError(f"it holds {info.filename}")
            part = archive.read(info)
            if name.endswith(".json"):
                part = json.dumps(checked(json.loads(part)))
            elif name.endswith(".pt"):  # an example of what it is asked, which torch would unpickle if need be
                torch.save(torch.load(io.BytesIO(part), "cpu", weights_only=True), example := io.BytesIO())
                part = example.getvalue()
            anew.writestr(f"team/{name}", part)
    copy.seek(0)
    return copy


def load_team(run):
    """The program in a run's team.pt2: (obs (B, N, O), avail (B, N, A) if actions are discrete, memory (S, B, N, W))
    -> actions (S, B, N) or (S, B, N, A) of all S seeds, memory. `start` (S, 1, N, W) is the memory of one new game.

    It is on the CPU. Nothing in the file is run but the program's own operations on tensors, and nothing is unpickled
    but an example of its inputs, with `weights_only`.

    Raises:
        ValueError: there is none, or it is damaged, or holds something else.
    """
    path = Path(run) / "team.pt2" if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise ValueError(f"no kept team {path}: a finished run of algorithms/ leaves one in its folder")
    logging.disable(logging.WARNING)  # torch tells of its own errors at length
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            team = torch.export.load(copy_archive(path)).module()
        if team.start.dim() != 4:
            raise ValueError("it has no memory")
        return team
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        said = str(error).partition("\n")[0][:100]
        raise ValueError(f"{path} is no kept team, or damaged ({type(error).__name__}: {said})") from None
    finally:
        logging.disable(logging.NOTSET)


def ask(team, obs, info, memory):
    """What all teams would do in B games, (S, B, N) or (S, B, N, A), and their memory (S, B, N, W).

    Raises:
        ValueError: the environment does not show what the team was made for.
    """
    seen = (obs, info["avail_actions"]) if "avail_actions" in info else (obs,)
    try:
        return team(*seen, memory)
    except Exception as error:  # an AssertionError of the program's guards, or what its operations raise
        said = str(error).partition("\n")[0][:80]
        raise ValueError(f"the team does not fit this environment ({said})") from None


def play_teams(game, team, seed):
    """Let all S teams play at once, greedily: `Played` of B = S E games, of which the first E are the first team's."""
    S, own = len(team.start), torch.arange(len(team.start))

    def act(obs, info, memory):
        actions, memory = ask(team, obs, info, memory)  # each team in all games: all but its own are left aside
        return actions.unflatten(1, (S, -1))[own, own].flatten(0, 1), memory  # (B, N) or (B, N, A)

    return play(game, act, team.start.repeat(1, game.num_envs, 1, 1), seed)


# ---------------------------------------------------------------- the command line
AT_ONCE = 1024  # games


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # the folder of a finished run
    games: int = 100  # games for each seed's team
    seed: int = 0  # of the games
    gif: Path | None = None  # draw a game as an animated picture
    film_seed: int | None = None  # whose game to draw; by default the run's first seed
    env: str = ""  # the run's environment, if it is not ours: it is needed, as playing there runs that module


def main(args):
    """Play again what a run has learned, and print the score."""
    about, env, task, options, first, most = read_config(args.run)
    if args.env not in ("", env):
        raise ValueError(f"{args.run} was trained in {env}, not in {args.env}")
    if ":" in env and not args.env:  # no file decides which code runs
        raise ValueError(f"{args.run} was trained in a game that is not ours: add --env {env} to run that module")
    if not 1 <= args.games <= 10**6 or not 0 <= args.seed < 2**32:
        raise ValueError("--games must lie in 1 .. 1,000,000, --seed in 0 .. 2^32 - 1")
    team = load_team(args.run)
    S, said = len(team.start), []
    if args.gif:
        index = 0 if args.film_seed is None else args.film_seed - first
        if not 0 <= index < S:
            raise ValueError(f"--film-seed must be one of the run's seeds, {first} .. {first + S - 1}")
        if args.gif.suffix != ".gif" or not args.gif.absolute().parent.is_dir():
            raise ValueError(f"--gif must be a file .gif in a folder that exists, not {args.gif}")
        images, played = film(stage(env, task, options), team, index, args.seed)
        save_gif(args.gif, images)
        said = [f"{args.gif}: a game of seed {first + index}, {len(images) - 1} steps, return {played.returns[0]:.4f}"]
    E = min(args.games, max(1, most // S))
    game = make(env, task, S * E, options)
    try:
        rounds = [play_teams(game, team, (args.seed + 1_000_003 * k) % 2**32) for k in range(-(-args.games // E))]
    finally:
        game.close()
    scores = {"return": [x.returns for x in rounds], "win rate": [x.won for x in rounds]}
    scores = {name: torch.cat([x.view(S, E).double() for x in parts], 1)[:, : args.games]
              for name, parts in scores.items() if parts[0] is not None}  # fmt: skip
    say("\n".join([f"{about}: {args.games} games a seed, greedy", *table(scores, first), *said]))


def read_config(run):
    """What a run's config.json tells: what it is, in words; its environment, task and options; the first seed; and how
    many games may be played at once."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_text())
        kept, script = config["args"], str(config["script"])
        env, task, words, first = (kept[name] for name in ("env", "task", "env_kwargs", "seed"))
        options = json.loads(words or "{}") | ({"team_reward": kept["team_reward"]} if ":" in env else {})
        if not isinstance(task, str) or type(first) is not int:
            raise TypeError
        most = AT_ONCE
        if env == "smac" and kept.get("backend") == "sc2":  # each of its games is a process
            options, most = options | {"backend": "sc2"}, int(kept["games"])
    except FileNotFoundError:
        raise ValueError(f"{run} is no run: there is no {path}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or that of something else than a run ({type(error).__name__})") from None
    if not env:
        raise ValueError(f"{run} was trained without an environment: there is nothing to play in")
    return f"{script} on {env} {task}".strip(), env, task, options, first, most


def make(env, task, games, options):
    """The games of a run; ValueError if they are not to be had."""
    import envs  # here, since it is the package that this file belongs to

    try:
        return envs.make(env, task, games, **options)
    except TypeError as error:
        raise ValueError(f"{env} does not take {options}: {error}") from None


def table(scores, first):
    """Lines of a table: each seed's mean score ± its standard error over games, then over seeds.

    Args:
        scores: {heading: (S, E)}.
    """

    def row(name, values):
        cells = [f"{x.mean():12.4f}" + (f" ± {x.std() / len(x) ** 0.5:<9.4f}" if len(x) > 1 else "") for x in values]
        return name.ljust(12) + "".join(cells).rstrip()

    S = len(next(iter(scores.values())))
    lines = [" " * 12 + "".join(f"{name:>12s}".ljust(24) for name in scores).rstrip()]
    lines += [row(f"seed {first + s}", [x[s] for x in scores.values()]) for s in range(S)]
    return lines + ([row("all seeds", [x.mean(1) for x in scores.values()])] if S > 1 else [])


def say(text):
    """Print; a terminal that is gone is no error."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # or Python would try again as it leaves, and fail then


# ---------------------------------------------------------------- an animated picture
def stage(env, task, options):
    """A game to be drawn."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is loaded: it can draw without a display
    if ":" in env and "render_mode" not in options:  # so that games of PettingZoo's kind draw themselves
        with contextlib.suppress(ValueError):
            return make(env, task, 1, options | {"render_mode": "rgb_array"})
    return make(env, task, 1, options)


def film(game, team, index, seed):
    """Let the team of one seed, number `index` in the program, play one game: an image before each step and one after
    the last, and `Played`. The game is closed."""
    images, taken = [], None

    def act(obs, info, memory):
        nonlocal taken
        actions, memory = ask(team, obs, info, memory)
        taken = actions[index]  # (1, N) or (1, N, A)
        images.append(framed(picture(game, taken), f"step {len(images)}"))
        return taken, memory

    try:
        played = play(game, act, team.start, seed)
        won = ", won" if played.won is not None and played.won[0] else ""
        end = f"step {len(images)}, return {played.returns[0]:.2f}{won}"
        return images + [framed(picture(game, taken), end)], played
    finally:
        game.close()


def picture(game, actions):
    """A game as an array (height, width, 3); ValueError if it does not draw itself."""
    try:
        drawn = game.picture(actions) if hasattr(game, "picture") else game.render()
        drawn = np.asarray(drawn[0] if isinstance(drawn, list | tuple) else drawn)
    except (NotImplementedError, AttributeError):
        drawn = np.zeros(0)
    if drawn.ndim != 3 or drawn.shape[-1] < 3 or drawn.dtype != np.uint8:
        kind = type(game).__name__
        raise ValueError(f"{kind} cannot be drawn: it has no picture(actions), and no render() that returns an array")
    return drawn[..., :3]


def framed(drawn, text):
    """An array (height, width, 3) as an image with a line of text above it."""
    from PIL import Image, ImageDraw  # comes with Matplotlib

    image = Image.new("RGB", (drawn.shape[1], drawn.shape[0] + 16), "white")
    image.paste(Image.fromarray(drawn), (0, 16))
    ImageDraw.Draw(image).text((4, 2), text, fill="black")
    return image.quantize()


def save_gif(path, images):
    """Write an animated picture, whole or not at all. It lasts 20 seconds at most, if 50 images a second will do."""
    hold = min(250, max(20, 20_000 // len(images) // 10 * 10))  # milliseconds, of which the format counts tens
    content, holds = io.BytesIO(), [hold] * (len(images) - 1) + [2000]
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=holds, loop=0)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        part.write_bytes(content.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a terminal without "±" is no error
    try:
        from data import flags

        main(flags.read(Args, description=main.__doc__))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
