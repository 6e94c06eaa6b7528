"""How a team plays a batch of games: the one loop behind every evaluation and every recording."""

from typing import NamedTuple

import torch


class Played(NamedTuple):
    """What came of B games."""

    returns: torch.Tensor  # (B,) float64, undiscounted
    won: torch.Tensor | None  # (B,) bool; None where games cannot be won
    film: dict | None  # if asked for, what happened, under the names of a dataset:
    # obs (B, T+1, N, O), state (B, T+1, D), avail_actions (B, T+1, N, A) or None,
    # actions (B, T, N) or (B, T, N, A), reward, terminated, mask (B, T).
    # T is the longest game's length; behind a game's end all is zero.


@torch.no_grad()
def play(game, act, memory=None, seed=None, film=False):
    """Play all games of `game` once, from a reset to their ends.

    Args:
        game: one of our environments, with B games.
        act: function of (obs, info, memory) as the environment gives them, which returns the
            actions (B, N) or (B, N, A) and the memory for the next step. A game that is over goes
            on being asked, and ignores the answer.
        memory: what `act` gets at first.
        seed: of the environment.
        film: whether to keep what happened.
    Raises:
        FloatingPointError: a simulation became unstable.
    """
    obs, info = game.reset(seed=seed)
    running = torch.ones(game.num_envs, dtype=torch.bool, device=game.device)
    total = torch.zeros(game.num_envs, dtype=torch.float64, device=game.device)
    names = [name for name in ("state", "avail_actions") if name in info]
    seen, done = [(obs, *(info[name] for name in names))], []

    def alive(x):  # zero behind the end
        return x * running.view(-1, *[1] * (x.dim() - 1))

    # Whether all games are over one only knows by waiting for the device: on a GPU, eight times.
    look = 1 if game.device.type == "cpu" else -(-game.time_limit // 8)
    for t in range(1, game.time_limit + 1):
        actions, memory = act(obs, info, memory)
        obs, reward, terminated, truncated, info = game.step(actions)
        total += reward
        if film:
            seen.append([alive(x) for x in (obs, *(info[name] for name in names))])
            done.append((alive(actions), reward, terminated & running, running))
        running = running & ~(terminated | truncated)
        if t % look == 0 and not running.any():
            break
    return Played(total, info.get("won"), _develop(names, seen, done) if film else None)


def _develop(names, seen, done):
    """The film of T' steps, each a tuple in `done`, and one more in `seen`."""
    names = ("obs", *names)
    done = dict(zip(("actions", "reward", "terminated", "mask"), zip(*done)))
    steps = int(torch.stack(done["mask"]).any(1).sum())  # without those that no game took
    film = {name: torch.stack(x[: steps + 1], 1) for name, x in zip(names, zip(*seen))}
    film |= {name: torch.stack(x[:steps], 1) for name, x in done.items()}
    return {"avail_actions": None} | film
