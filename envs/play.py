"""How a team plays a batch of games: the one loop behind every evaluation and every recording.

As a command it lets the teams of a finished run play again:
  python envs/play.py runs/inspo/bridge-mixed-20261125-120000 --games 100 --gif bridge.gif
"""

import io
import json
import logging
import os
import re
import sys
import uuid
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

if __name__ == "__main__":  # let `python envs/play.py` find the packages beside its own folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])


class Played(NamedTuple):
    """What came of B games."""

    returns: torch.Tensor  # (B,) float64, undiscounted
    won: torch.Tensor | None  # (B,) bool; None where games cannot be won
    film: dict | None  # if asked for, what happened, zero behind each game's end, under the names of a dataset:
    # obs (B, T+1, N, O), state (B, T+1, D), avail_actions (B, T+1, N, A) or None, actions (B, T, N) or (B, T, N, A),
    # reward, terminated, mask (B, T); T is the longest game's length


@torch.no_grad()
def play(game, act, memory=None, seed=None, film=False):
    """Play all games of `game` once, from a reset to their ends.

    Args:
        game: one of our environments, with B games.
        act: function of (obs, info, memory) as the environment gives them, which returns the actions (B, N) or
            (B, N, A) and the memory for the next step. A game that is over goes on being asked, and ignores the answer.
        memory: what `act` gets at first.
        seed: of the environment.
    Raises:
        FloatingPointError: a simulation became unstable.
    """
    obs, info = game.reset(seed=seed)
    running = torch.ones(game.num_envs, dtype=torch.bool, device=game.device)
    total = torch.zeros(game.num_envs, dtype=torch.float64, device=game.device)
    seen = ["state"] + ["avail_actions"] * ("avail_actions" in info)
    before, after = [(obs, *(info[name] for name in seen))], []

    def alive(x):  # zero behind the end
        return x * running.view(-1, *[1] * (x.dim() - 1))

    # To ask whether all games are over means to wait for the device: on a GPU that is done eight times, not each step.
    look = 1 if game.device.type == "cpu" else -(-game.time_limit // 8)
    for t in range(1, game.time_limit + 1):
        actions, memory = act(obs, info, memory)
        obs, reward, terminated, truncated, info = game.step(actions)
        total += reward
        if film:
            before.append([alive(x) for x in (obs, *(info[name] for name in seen))])
            after.append((alive(actions), reward, terminated & running, running))
        running = running & ~(terminated | truncated)
        if t % look == 0 and not running.any():
            break
    if film:
        steps = int(torch.stack([mask.any() for *_, mask in after]).sum())  # without those that no game took
        obs, state, *avail = (torch.stack(x[: steps + 1], 1) for x in zip(*before))
        actions, reward, terminated, mask = (torch.stack(x[:steps], 1) for x in zip(*after))
        film = {"obs": obs, "state": state, "avail_actions": avail[0] if avail else None, "actions": actions,
                "reward": reward, "terminated": terminated, "mask": mask}  # fmt: skip
    return Played(total, info.get("won"), film or None)


# ---------------------------------------------------------------- a kept team
OURS = r"(data/(weights|constants)/(weight|tensor|model)_\w+(\.json)?|models/model\.json|data/sample_inputs/model\.pt|"
OURS += r"archive_(format|version)|byteorder|\.data/\w+)"  # what team.pt2 consists of: numbers and JSON


def load_team(run):
    """The program in a run's team.pt2: (obs (B, N, O), avail (B, N, A) if actions are discrete, memory (S, B, N, W))
    -> actions (S, B, N) or (S, B, N, A) of all S seeds, memory. `start` (S, 1, N, W) is the memory of one new game.

    torch.export.load would unpickle what a stranger may have put into such a file; here that is refused.

    Raises:
        ValueError: there is none, or it is damaged, or holds something else.
    """
    path = Path(run) / "team.pt2" if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise ValueError(f"no kept team {path}: a finished run of algorithms/ leaves one in its folder")
    logging.disable(logging.WARNING)  # torch tells of its own errors at length
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                if not re.fullmatch(OURS, name.partition("/")[2]):
                    raise ValueError(f"it holds {name}")
                if name.endswith("_config.json") and re.search(rb'"use_pickle":\s*true', archive.read(name)):
                    raise ValueError("it holds pickles")
                if name.endswith("sample_inputs/model.pt"):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        team = torch.export.load(io.BytesIO(content)).module()
        if team.start.dim() != 4:
            raise ValueError("it has no memory")
        return team
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        said = str(error).partition("\n")[0][:100]
        raise ValueError(f"{path} is no kept team, or damaged ({type(error).__name__}: {said})") from None
    finally:
        logging.disable(logging.NOTSET)


def play_team(game, team, seed, index, film=None):
    """Let the team of one seed, number `index` in the program, play all games once, greedily; returns `Played`.

    With a list `film`, pictures of the first game are added to it, one before each step and one after the last.
    """
    B, over = game.num_envs, False

    def act(obs, info, memory):
        nonlocal over
        seen = (obs, info["avail_actions"]) if "avail_actions" in info else (obs,)
        actions, memory = team(*seen, memory)
        if film is not None and not over:
            film.append(game.picture(actions[index]))
        return actions[index], memory

    step = game.step

    def watched(actions):
        nonlocal over
        answer = step(actions)
        if film is not None and not over:
            over = bool((answer[2] | answer[3])[0])
            if over:
                film.append(game.picture(actions))
        return answer

    game.step = watched
    try:
        return play(game, act, team.start.repeat(1, B, 1, 1), seed)
    except AssertionError as error:  # the program's own guards
        raise ValueError(f"the team does not fit this environment ({str(error)[:80]})") from None
    finally:
        game.step = step


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # the folder of a finished run
    games: int = 100  # games for each seed's team
    seed: int = 0  # of the games
    gif: Path | None = None  # draw the first game of the first seed as an animated picture
    fps: int = 4  # its pictures in a second


def main(args):
    """Play again what a run has learned, and print the score."""
    import envs

    try:
        config = json.loads((args.run / "config.json").read_text())
        kept, script = config["args"], config["script"]
        env, task, first, S = kept["env"], kept["task"], kept["seed"], kept["num_seeds"]
        options = json.loads(kept["env_kwargs"] or "{}")
        options |= {"team_reward": kept["team_reward"]} if ":" in env else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{args.run} is no run of ours ({type(error).__name__}: config.json)") from None
    if args.games < 1 or args.fps < 1 or args.seed < 0:
        raise ValueError("--games and --fps must be at least 1, --seed at least 0")
    if args.gif and not args.gif.absolute().parent.is_dir():
        raise ValueError(f"there is no folder for {args.gif}")
    if not env:
        raise ValueError(f"{args.run} was trained without an environment: there is nothing to play in")
    team, found = load_team(args.run), []
    lines = [f"{script} on {' '.join(filter(None, (env, task)))}, {args.games} games a seed, greedy"]
    for index in range(S):
        film = [] if args.gif and index == 0 else None
        game = envs.make(env, task, args.games, **options)
        try:
            played = play_team(game, team, args.seed, index, film)
        finally:
            game.close()
        if film:
            save_gif(args.gif, film, args.fps)
        found.append(played.returns.mean())
        won = "" if played.won is None else f", {100 * played.won.double().mean():.1f} % won"
        error = played.returns.std() / args.games**0.5
        lines.append(f"seed {first + index:<6d} return {found[-1]:10.4f} ± {error:.4f}{won}")
    if S > 1:
        mean = torch.stack(found)
        lines.append(f"all seeds   return {mean.mean():10.4f} ± {mean.std() / S**0.5:.4f}")
    print("\n".join(lines + [f"the first game of seed {first}: {args.gif}"] * bool(args.gif)))


def save_gif(path, pictures, fps):
    """Write arrays (height, width, 3) as an animated picture, whole or not at all."""
    from PIL import Image  # comes with Matplotlib

    content, images = io.BytesIO(), [Image.fromarray(picture) for picture in pictures]
    hold = [1000 // fps] * (len(images) - 1) + [2000]  # the end stays for two seconds
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], duration=hold, loop=0)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        part.write_bytes(content.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    try:
        main(tyro.cli(Args, description=__doc__.splitlines()[0]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
