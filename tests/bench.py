"""Measure speed; nothing here is asserted.  python tests/bench.py [games] [smac] [updates] [windows] [peers] [--cuda]

Without a word it measures all. CPU figures are for one thread and count CPU seconds, so that other work on the machine
disturbs them little. `updates` takes one update of each script, for all of its seeds, eager and compiled. InSPO's is a
sweep: every agent's Q-function and policy once.

`smac` also measures two other simulators of the same game, where they can be imported:

    SMAX        pip install jaxmarl
    SMAClite    pip install PATH_TO_A_CHECKOUT, then pip install -U "Rtree>=1.3"

All three play available actions at random, restart finished battles, and make observations, state and masks at every
step. Their rules differ: a step of SMAX and SMAClite holds 1.4 times as much fighting, SMAX has no shields, and
SMAClite steers units around one another. XLA takes as many threads as it likes, so compare CPU seconds.

`peers` also measures OG-MARL's PyTorch version, where it can be imported (a checkout on PYTHONPATH, and pip install
hydra-core omegaconf dm-tree chex flashbax jax). It is given its windows, while ours draws its own.
"""

import contextlib
import functools
import importlib.util
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import updates
from conftest import load_script
from pretended_gpu import VIEWS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import envs
from data import runs
from envs.smac import MAPS, POLICIES


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


def median_speed(play, steps, clock, repeats=3):
    """Environment steps per second of `play()`, which makes `steps` of them: the median, after a warm-up."""
    play()
    speeds = []
    for _ in range(repeats):
        begin = clock()
        play()
        speeds.append(steps / (clock() - begin))
    return statistics.median(speeds)


def smac(task, num_envs, device, steps=100, compiled=False):
    """Environment steps per second (CPU seconds on the CPU, wall seconds on a GPU) of our simulator."""
    game = envs.make("smac", task, num_envs=num_envs, device=device)
    if compiled:
        game.compile(functools.partial(torch.compile, fullgraph=True, dynamic=False))
    _, info = game.reset(seed=0)

    def play():
        nonlocal info
        for _ in range(steps):
            _, _, terminated, truncated, _ = game.step(POLICIES["random"](game, info))
            _, info = game.reset(options={"reset_mask": terminated | truncated})
        if device != "cpu":
            torch.cuda.synchronize()

    return median_speed(play, num_envs * steps, time.process_time if device == "cpu" else time.perf_counter)


def smax(task, num_envs, steps=200):
    """The same for SMAX, compiled: environment steps per CPU second."""
    import jax

    with contextlib.redirect_stdout(io.StringIO()):  # it prints while it is imported
        from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    game = HeuristicEnemySMAX(scenario=map_name_to_scenario(task))

    def step(carry, key):
        state, total = carry
        keys = jax.random.split(key, 1 + len(game.agents))
        avail = jax.vmap(game.get_avail_actions)(state)
        actions = {
            name: jax.random.categorical(k, jax.numpy.where(avail[name] > 0, 0.0, -jax.numpy.inf))
            for name, k in zip(game.agents, keys[1:])
        }
        obs, state, reward, _, _ = jax.vmap(game.step)(jax.random.split(keys[0], num_envs), state, actions)
        return (state, total + sum(x.sum() for x in (*obs.values(), *reward.values()))), None  # so that all is computed

    @jax.jit
    def play(key):
        _, state = jax.vmap(game.reset)(jax.random.split(key, num_envs))  # obs["world_state"] is the state
        return jax.lax.scan(step, (state, 0.0), jax.random.split(key, steps))[0][1]

    key = jax.random.PRNGKey(0)
    return median_speed(lambda: play(key).block_until_ready(), num_envs * steps, time.process_time)


def smaclite(task, steps=300):
    """The same for SMAClite, which plays one battle at a time: environment steps per CPU second."""
    import numpy as np
    from smaclite.env import SMACliteEnv

    battle, shields = MAPS[task], ("stalker", "zealot")  # it lacks some of the maps, so it gets ours
    groups = [
        {"x": int(x), "y": int(y), "faction": side, "units": {name.upper(): count for name, count in team.items()}}
        for side, team, (x, y) in (("ALLY", battle.agents, battle.start), ("ENEMY", battle.enemies, battle.enemy_start))
    ]
    plan = {
        "name": task, "num_allied_units": sum(battle.agents.values()), "num_enemy_units": sum(battle.enemies.values()),
        "groups": groups, "attack_point": [int(x) for x in battle.start], "terrain_preset": "SIMPLE",
        "num_unit_types": len(battle.agents), "ally_has_shields": any(name in shields for name in battle.agents),
        "enemy_has_shields": any(name in shields for name in battle.enemies),
        "unit_type_ids": {name.upper(): i for i, name in enumerate(battle.agents)},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "map.json").write_text(json.dumps(plan))
        with contextlib.redirect_stdout(io.StringIO()):  # it says which library steers the units: the numpy one
            game = SMACliteEnv(map_file=f"{folder}/map.json", seed=0)
    choose = np.random.default_rng(0)

    def play():
        game.reset()
        played = 0
        for _ in range(steps):
            actions = [int(choose.choice(np.flatnonzero(mask))) for mask in game.get_avail_actions()]
            _, _, done, _, _ = game.step(actions)
            game.get_state()
            played += 1
            if done or played >= battle.limit:
                game.reset()
                played = 0

    return median_speed(play, steps, time.process_time)


def update(maker, device, flags, compiled):
    """What an update costs: {part: (milliseconds, operations launched, multiples of the floor)}, and the seconds that
    compiling took.

    Milliseconds are of CPU time on the CPU, else of wall time: the median of some, after two that set things up. The
    floor is the matrix products alone, at the rate of one large product.
    """
    x = torch.rand(1024, 1024, device=device)
    with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64):
        mode = "reduce-overhead" if device == "cuda" else None
        whole = (
            functools.partial(torch.compile, fullgraph=True, dynamic=False, mode=mode) if compiled else updates.plain
        )
        made, clock = maker(device, whole, flags), time.process_time if device == "cpu" else time.perf_counter
        rate = 2 * 1024**3 * median_speed(lambda: [x @ x for _ in range(20)], 20, clock)  # operations a second
        rows, begin = {}, clock()
        for work in made.updates.values():
            work()
            work()
        compiling = clock() - begin
        for part, work in made.updates.items():

            def once():
                work()
                if device != "cpu":
                    torch.cuda.synchronize()

            count, products = Operations(), FlopCounterMode(display=False)
            if not compiled:  # neither can look into a graph
                with count, products:
                    work()
            took = 1 / median_speed(once, 1, clock, repeats=7)
            rows[part] = 1000 * took, count.total, took * rate / (products.get_total_flops() or float("inf"))
    return rows, compiling


class Operations(TorchDispatchMode):
    """Counts ATen operations, those left out that only look at a tensor in another way."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += func._overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


# Every update at its script's default sizes, and at the papers' where these differ much: maker, flags.
SIZES = {
    "InSPO, Bridge, 5 seeds": (updates.inspo, ["--clone-steps", "1"]),
    "InSPO, 5m_vs_6m, 3 seeds": (updates.inspo, ["--env", "smac", "--clone-steps", "1"]),
    "MADDPG+CQL+PJAP, HalfCheetah, 3 seeds": (updates.maddpg, []),
    "MADDPG+CQL+PJAP, paper's size, 1 seed": (
        updates.maddpg, "--num-seeds 1 --batch-size 64 --ood-actions 10".split()),
    "MAPPO, 5m_vs_6m, 1 seed": (updates.mappo, ["--task", "5m_vs_6m"]),
    "MOMA-PPO, coordination, 10 seeds": (updates.moma, []),
    "MOMA-PPO, reacher, 3 seeds": (updates.moma, "--env reacher --task all-observant".split()),
    "polygames, Figure 5, 10 seeds": (updates.polygames, []),
    "BC, coordination, 10 seeds": (updates.bc, []),
    # the sizes at which shared measurements of the authors' codes were made, one seed
    "CFCQL, 5m_vs_6m, 128 episodes": (updates.cfcql, "--env smac --num-seeds 1 --sequences 128".split()),
    "OMIGA, 5m_vs_6m, 128 steps, hidden 256": (
        updates.omiga, "--env smac --num-seeds 1 --batch-size 128 --hidden 256".split()),
    "OMIGA, the same, agents share networks": (
        updates.omiga, "--env smac --num-seeds 1 --batch-size 128 --hidden 256 --shared".split()),
    "AlberDICE, Bridge, 2,560 steps, hidden 128": (
        updates.alberdice, "--num-seeds 1 --batch-size 2560 --hidden 128".split()),
    "OMAR, 5m_vs_6m, 3 seeds": (updates.omar, "--env smac".split()),
    "IQL, coordination, 10 seeds": (updates.iql, []),
    "ITD3+BC, twin peaks": (updates.td3_bc, []),
}  # fmt: skip


def bench_updates(device):
    print("\nmilliseconds per update (ATen operations, multiples of the floor), eager and compiled")
    for name, (maker, flags) in SIZES.items():
        # On a CPU the compiler has not come to an end with 70 unrolled steps of five agents in a quarter of an hour.
        for compiled in (False,) if device == "cpu" and name.startswith("InSPO, 5m") else (False, True):
            rows, compiling = update(maker, device, flags, compiled)
            line = "   ".join(
                f"{part} {took:8.2f}" + f" ({count:6,d}, {floor:4.1f})" * (not compiled)
                for part, (took, count, floor) in rows.items()
            )
            note = f"   (compiling and two updates each: {compiling:.0f} s)" * compiled
            print(f"  {name:38s} {'compiled' if compiled else 'eager':8s} {line}{note}", flush=True)


def bench_windows(device):
    """PJAP's sampler: to draw 64 of a million windows and to renew their priorities."""
    script, clock = load_script("maddpg_cql_pjap"), time.process_time if device == "cpu" else time.perf_counter
    windows = script.Windows(torch.arange(1_000_000, device=device), 20, 1)

    def draw():
        for _ in range(200):
            windows.write(
                windows.draw(torch.rand(1, 64, device=device, dtype=torch.float64)), torch.rand(1, 64, device=device)
            )

    print(f"\n64 of a million windows drawn and renewed: {1000 / median_speed(draw, 200, clock):.2f} ms")


def og_marl(repeats=5):
    """The same for OG-MARL's PyTorch version, one seed, batch 64, 10 actions of each kind, uniform windows."""
    from og_marl.baselines.torch_systems.offline.maddpg_cql import MADDPGCQLSystem

    shapes = {"observation_shape": (13,), "state_shape": (17,), "num_actions": 3, "agents": ["0", "1"]}
    system = MADDPGCQLSystem(SimpleNamespace(**shapes), None, cql_weight=5.0, cql_sigma=0.3, device="cpu")
    rest = {"observations": (13,), "actions": (3,), "rewards": (), "terminals": (), "truncations": ()}
    batch = {name: torch.rand(64, 20, 2, *size).numpy() for name, size in rest.items()}
    batch |= {name: 0 * batch[name] for name in ("terminals", "truncations")}
    batch["infos"] = {"state": torch.rand(64, 20, 17).numpy()}

    def play():
        for _ in range(repeats):
            system.train_step(batch)

    return 1000 / median_speed(play, repeats, time.process_time)


def bench_peers(device):
    """Other people's code at its own sizes, and ours at the same."""
    print("\nat the peers' sizes, one seed, milliseconds per update")
    if device == "cpu" and importlib.util.find_spec("og_marl") is not None:
        print(f"  MADDPG+CQL, 64 windows, 10 actions, OG-MARL's PyTorch: {og_marl():8.1f}")
    rows, _ = update(updates.moma, device, MOMA_SIZES, False)
    line = "   ".join(f"{part} {took:7.0f}" for part, (took, *_) in rows.items())
    print(f"  MOMA-PPO on 4-agent Ant, partial view, ours: {line}")
    line = "   ".join(f"{part} {took:7.0f}" for part, took in MOMA_AUTHORS.items())
    print(f"    the authors' code, CPU, as measured earlier on a machine like ours: {line}")


# The sizes of MOMA-PPO's authors (2,000 transitions), and the CPU milliseconds of their code, on one thread.
MOMA_SIZES = """--env ant --task partial --episodes 10 --num-seeds 1 --memory 10 --rollouts 200 --horizon 10 --hidden 256
    --width 128 --batch-size 64 --model-hidden 1024 --reward-hidden 1024 --model-layers 4""".split()
MOMA_AUTHORS = {"model update": 1351, "rollouts": 3102, "MAPPO update": 11555}


def bench_games(device):
    print("\nenvironment steps per second")
    for name, task in (("matrix", "xor"), ("bridge", "")):
        speeds = [f"{n} games {environment(name, task, n, device):,.0f}" for n in (32, 512, 8192)]
        print(f"  {name:8s}" + "   ".join(speeds))


def bench_smac(device):
    print(f"\nenvironment steps per {'CPU second' if device == 'cpu' else 'second'}, StarCraft micromanagement")
    for task, sizes in (("5m_vs_6m", (32, 512, 4096)), ("2s3z", (512,))):
        for n in sizes:
            print(f"  {task:9s} {n:5d} battles   ours {smac(task, n, device):10,.0f}", flush=True)
    print(
        f"  5m_vs_6m    512 battles   ours, compiled {smac('5m_vs_6m', 512, device, compiled=True):10,.0f}", flush=True
    )
    for name, package, measure, sizes in (
        ("SMAX", "jaxmarl", smax, (32, 512)),
        ("SMAClite", "smaclite", smaclite, (1,)),
    ):
        if device != "cpu" or importlib.util.find_spec(package) is None:
            print(f"  {name}: {'measured on the CPU only' if device != 'cpu' else 'peer not installed'}")
            continue
        for task in ("5m_vs_6m", "2s3z"):
            for n in sizes:
                speed = measure(task, n) if name == "SMAX" else measure(task)
                print(f"  {task:9s} {n:5d} battles   {name} {speed:10,.0f}", flush=True)


PARTS = {
    "games": bench_games,
    "smac": bench_smac,
    "updates": bench_updates,
    "windows": bench_windows,
    "peers": bench_peers,
}


def main(words):
    device = "cuda" if "--cuda" in words else "cpu"
    parts = [word for word in words if word != "--cuda"] or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"error: unknown words {sorted(unknown)}: choose from {', '.join(PARTS)} and --cuda")
    torch.set_num_threads(1)
    runs.keep_memory()  # as every run does
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU, one thread'}")
    for part in parts:
        PARTS[part](device)


if __name__ == "__main__":
    main(sys.argv[1:])
