"""Measure speed; nothing here is asserted.  python tests/bench.py [--cuda]

CPU figures are for one thread and count CPU seconds, so that other work on the machine disturbs them little.
An InSPO update is a sweep: every agent's Q-function and policy once, for all seeds.
"""

import contextlib
import io
import sys
import tempfile
import time

import torch
from conftest import load_script

import envs


def environment(name, task, num_envs, device, steps=200):
    """Environment steps per second (CPU seconds on the CPU, wall seconds on a GPU) of random play."""
    game = envs.make(name, task, num_envs=num_envs, device=device)
    actions = torch.randint(game.num_actions, (num_envs, game.num_agents), device=device)
    mask = torch.ones(num_envs, dtype=torch.bool, device=device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    for count in (10, steps):  # the first is a warm-up
        begin = clock()
        for _ in range(count):
            game.reset(options={"reset_mask": mask})
            game.step(actions)
        if device != "cpu":
            torch.cuda.synchronize()
    return num_envs * steps / (clock() - begin)


def inspo(device, *flags, steps):
    """Milliseconds per update on Bridge's mixed data, evaluations and compilation not counted."""
    script = load_script("inspo")
    for count in (20, steps):  # the first run warms up and compiles
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            words = ["--steps", str(count), "--eval-every", str(count), "--eval-episodes", "1", "--clone-steps", "1"]
            begin = time.process_time(), time.perf_counter()
            summary = script.main(script.parse([*words, "--device", device, "--out-dir", f"{folder}/run", *flags]))
            busy = (time.process_time() - begin[0]) / (time.perf_counter() - begin[1])  # CPU seconds per wall second
    return 1000 / summary["updates_per_second"] * (busy if device == "cpu" else 1)


def main(device):
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU, one thread'}\n")
    print("environment steps per second")
    for name, task in (("matrix", "xor"), ("bridge", "")):
        speeds = [f"{n} games {environment(name, task, n, device):,.0f}" for n in (32, 512, 8192)]
        print(f"  {name:8s}" + "   ".join(speeds))
    print("\nInSPO on Bridge, milliseconds per update")
    for network, flags in (("64 x 2", ()), ("256 x 3", ("--hidden", "256", "--layers", "3"))):
        for seeds in (1, 5, 10):
            for compiled in ("--no-compile", "--compile"):
                if network == "64 x 2" or seeds == 5:
                    took = inspo(device, "--num-seeds", str(seeds), compiled, *flags, steps=100 if flags else 400)
                    print(f"  {network}, {seeds:2d} seeds, {compiled:13s}{took:8.2f}", flush=True)


if __name__ == "__main__":
    main("cuda" if "--cuda" in sys.argv[1:] else "cpu")
