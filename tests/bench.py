"""Measure speed; nothing here is asserted.

    python tests/bench.py                                # all, on one thread of the CPU
    python tests/bench.py --parts updates --device cuda  # some of: updates, simulator, windows

`updates` starts each script with its preset, as a user would, for a few updates without games,
eager and compiled, and reads updates per second (the compiler's time left out) from its summary.
InSPO's and AlberDICE's update is a sweep over all agents, MAPPO's and MOMA-PPO's an iteration.
`simulator` plays available actions at random, and `windows` draws from PJAP's sampler.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import load_script

import envs
from data.run import launch, read_flags, say
from envs.smac import POLICIES

UPDATES = {  # name: (script, flags, updates)
    "BC, coordination, 10 seeds": ("bc", "", 300),
    "InSPO, Bridge, 5 seeds": ("inspo", "--clone-steps 1", 60),
    "InSPO, 5m_vs_6m, 3 seeds": ("inspo", "--env smac --clone-steps 1 --warmup 1", 6),
    "AlberDICE, Bridge, 5 seeds": ("alberdice", "--clone-steps 1", 30),
    "MADDPG+CQL+PJAP, HalfCheetah, 3 seeds": ("maddpg_cql_pjap", "", 30),
    "MAPPO, 5m_vs_6m, 1 seed": ("mappo", "--task 5m_vs_6m", 2),
    "MOMA-PPO, coordination, 10 seeds": ("moma_ppo", "--model-steps 10", 20),
    "MOMA-PPO, reacher, 3 seeds": ("moma_ppo", "--env reacher --model-steps 10", 4),
    "CFCQL, 5m_vs_6m, 3 seeds": ("cfcql", "--env smac --clone-steps 1", 30),
    "OMAR, 5m_vs_6m, 3 seeds": ("omar", "--env smac", 30),
    "OMIGA, 5m_vs_6m, 3 seeds": ("omiga", "--env smac", 60),
    "IQL, coordination, 10 seeds": ("iql", "", 300),
    "TD3+BC, twin peaks": ("td3_bc", "--env polynomial", 200),
}


def updates(device):
    for name, (script, flags, count) in UPDATES.items():
        for how in ("--no-compile", "--compile"):
            # The compiler does not come to an end with 70 unrolled steps of five agents.
            if how == "--no-compile" or device != "cpu" or not name.startswith("InSPO, 5m"):
                speed, seconds = updates_per_second(script, [*flags.split(), how], count, device)
                words = f"{name:40s} {how[2:]:10s} {1000 / speed:9.2f} ms an update"
                say(f"{words}   (whole run {seconds:.0f} s)")


def updates_per_second(script, flags, count, device):
    """The speed of a script's updates, and the seconds that the whole run took."""
    module = load_script(script)
    if script == "mappo":
        defaults = module.Args()
        count *= defaults.num_envs * defaults.rollout
    with tempfile.TemporaryDirectory() as folder:
        words = [*flags, "--steps", str(count), "--eval-every", str(count), "--eval-episodes", "0"]
        words += ["--device", device, "--out-dir", str(Path(folder) / "run")]
        summary = module.main(module.parse(words))
    return summary["updates_per_second"], summary["wall_seconds"]


def median_speed(play, count, device, repeats=3):
    """How many a second, where `play()` makes `count`: the median; of CPU time on a CPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    speeds = []
    for _ in range(repeats + 1):
        begin = clock()
        play()
        if device != "cpu":
            torch.cuda.synchronize()
        speeds.append(count / (clock() - begin))
    return statistics.median(speeds[1:])


def simulator(device):
    for task, num_envs in (("5m_vs_6m", 32), ("5m_vs_6m", 512), ("5m_vs_6m", 4096), ("2s3z", 512)):
        say(f"{task:9s} {num_envs:5d} battles {battles(task, num_envs, device):12,.0f} steps/s")


def battles(task, num_envs, device, steps=50):
    """Environment steps per second of random play."""
    game = envs.make("smac", task, num_envs, device)
    _, info = game.reset(seed=0)

    def play():
        nonlocal info
        for _ in range(steps):
            _, _, terminated, truncated, _ = game.step(POLICIES["random"](game, info))
            _, info = game.reset(options={"reset_mask": terminated | truncated})

    return median_speed(play, num_envs * steps, device)


def windows(device):
    """PJAP's sampler: to draw 64 of a million windows and to renew their priorities."""
    script = load_script("maddpg_cql_pjap")
    sampler = script.Windows(torch.arange(1_000_000, device=device), 20, 1)

    def draw():
        for _ in range(200):
            uniform = torch.rand(1, 64, device=device, dtype=torch.float64)
            distance = torch.rand(1, 64, device=device)
            sampler.refresh(sampler.draw(uniform), distance, 4.0, script.Args())

    milliseconds = 1000 / median_speed(draw, 200, device)
    say(f"64 of a million windows drawn and renewed: {milliseconds:.2f} ms")


PARTS = {"updates": updates, "simulator": simulator, "windows": windows}


@dataclass
class Args:
    parts: tuple[str, ...] = tuple(PARTS)  # which to measure
    device: str = "cpu"  # or cuda


def main(args):
    torch.set_num_threads(1)
    say(f"torch {torch.__version__}, {args.device}, one thread")
    for part in args.parts:
        PARTS[part](args.device)


if __name__ == "__main__":
    launch(main, lambda: read_flags(Args, None, __doc__))
