"""Measure speed; nothing here is asserted.  python tests/bench.py [games] [smac] [inspo] [maddpg] [moma] [--cuda]

Without a word it measures all five. CPU figures are for one thread and count CPU seconds, so that other work on the
machine disturbs them little. An InSPO update is a sweep: every agent's Q-function and policy once, for all seeds.

`smac` also measures two other simulators of the same game, where they can be imported:

    SMAX        pip install jaxmarl
    SMAClite    pip install PATH_TO_A_CHECKOUT, then pip install -U "Rtree>=1.3"

All three play available actions at random, restart finished battles, and make observations, state and masks at every
step. Their rules differ: a step of SMAX and SMAClite holds 1.4 times as much fighting, SMAX has no shields, and
SMAClite steers units around one another. XLA takes as many threads as it likes, so compare CPU seconds.

`maddpg` also measures OG-MARL's PyTorch version, where it can be imported (a checkout on PYTHONPATH, and pip install
hydra-core omegaconf dm-tree chex flashbax jax). It is given its windows, while ours draws its own.

`moma` sets each figure beside its floor: the matrix products that it makes, at the rate of one large product.
"""

import contextlib
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
from conftest import load_script
from torch.utils.flop_counter import FlopCounterMode

import envs
from data import Dataset, runs
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


def smac(task, num_envs, device, steps=100):
    """Environment steps per second (CPU seconds on the CPU, wall seconds on a GPU) of our simulator."""
    game = envs.make("smac", task, num_envs=num_envs, device=device)
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


def inspo(device, *flags, steps):
    """Milliseconds per update, on Bridge's mixed data by default; evaluations and compilation are not counted."""
    script = load_script("inspo")
    for count in (20, steps):  # the first run warms up and compiles
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            words = ["--steps", str(count), "--eval-every", str(count), "--eval-episodes", "1", "--clone-steps", "1"]
            begin = time.process_time(), time.perf_counter()
            summary = script.main(script.parse([*words, "--device", device, "--out-dir", f"{folder}/run", *flags]))
            busy = (time.process_time() - begin[0]) / (time.perf_counter() - begin[1])  # CPU seconds per wall second
    return 1000 / summary["updates_per_second"] * (busy if device == "cpu" else 1)


def maddpg(device, seeds, batch, ood, compiled=False, repeats=5):
    """Milliseconds per update of MADDPG+CQL+PJAP on HalfCheetah's shapes, and those of drawing and refreshing."""
    script, clock = load_script("maddpg_cql_pjap"), time.process_time if device == "cpu" else time.perf_counter
    args = script.Args(num_seeds=seeds, batch_size=batch, ood_actions=ood)
    steps = torch.ones(10, 1000)
    sizes = {"obs": (1001, 2, 13), "state": (1001, 17), "actions": (1000, 2, 3), "reward": (1000,)}
    recorded = {name: torch.rand(10, *size) * 2 - 1 for name, size in sizes.items()}
    dataset = Dataset(**recorded, avail_actions=None, terminated=steps < 0, mask=steps > 0).to(device)
    data, encode = script.arrange(dataset, args)
    streams = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    team = script.Team(envs.make("halfcheetah", "2x3"), args, streams).to(device)
    windows, many = script.Windows(len(data["start"]), seeds).to(device), script.Windows(1_000_000, seeds).to(device)
    rmsprop, loss = script.optimizer(team, args), runs.compiler(compiled, torch.device(device))(script.losses)
    generators = [torch.Generator(device).manual_seed(seed) for seed in range(seeds)]

    def learn():
        script.update(team, rmsprop, windows, data, encode, loss, 4.0, generators, args)

    def draw():
        many.write(many.draw(script.uniform64(generators, batch)), torch.rand(seeds, batch, device=device))

    def took(work, count):
        def play():
            for _ in range(count):
                work()
            if device != "cpu":
                torch.cuda.synchronize()

        return 1000 / median_speed(play, count, clock)

    return took(learn, repeats), took(draw, 200)


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


def moma(device, seeds, flags, compiled=False):
    """Milliseconds, and multiples of the floor, of an update of the world model, k-step rollouts, a MAPPO update."""
    script, clock = load_script("moma_ppo"), time.process_time if device == "cpu" else time.perf_counter
    args = script.parse(
        ["--env", "ant", "--task", "partial", "--num-seeds", str(seeds), *flags]
        + "--memory 10 --rollouts 200 --horizon 10".split()
    )  # 2,000 transitions
    steps, place = torch.ones(20, 500), torch.device(device)
    recorded = {"state": torch.rand(20, 501, 27), "actions": torch.rand(20, 500, 4, 2) * 2 - 1}
    game = envs.make("ant", "partial")
    entries = torch.nn.functional.pad(recorded["state"], (0, 1))  # views are made of the state's columns
    dataset = Dataset(entries[..., game.columns], avail_actions=None, reward=torch.rand(20, 500), terminated=steps < 0,
                      mask=steps > 0, **recorded).to(place)  # fmt: skip
    data = script.Data(dataset, args, place)
    agents = script.Agents(data, args, [runs.stream(s, 0) for s in range(seeds)]).to(place)
    members = [runs.stream(s, 2) for s in range(seeds * args.members)]
    sizes = args.model_hidden, args.reward_hidden, args.model_layers, args.end_from
    world = script.World(data, *sizes, args.normalize, members).to(place)
    adam, model_adam = (torch.optim.Adam([*net.parameters()], 1e-4, fused=True) for net in (agents, world))
    play = script.dream(world.choose(torch.arange(seeds * args.elites, device=place)), data, args)
    generators = [runs.stream(s, 1, place) for s in range(seeds)]
    model_loss, loss = (runs.compiler(compiled, place)(x) for x in (script.model_loss, script.ppo_loss))
    batch, _ = script.rehearse(agents, play, data, generators, args)
    x = torch.rand(1024, 1024, device=place)
    rate = (
        2 * 1024**3 * median_speed(lambda: [x @ x for _ in range(20)], 20, clock)
    )  # floating-point operations a second
    rows = {}
    for name, work in {
        "model update": lambda: script.model_update(world, model_adam, model_loss, data, generators, args),
        "rollouts": lambda: script.rehearse(agents, play, data, generators, args),
        "MAPPO update": lambda: script.update(agents, adam, loss, batch, generators, args),
    }.items():

        def once():
            work()
            if device != "cpu":
                torch.cuda.synchronize()

        with FlopCounterMode(display=False) as counter:
            once()
        seconds = 1 / median_speed(once, 1, clock)
        rows[name] = 1000 * seconds, seconds * rate / counter.get_total_flops()
    return rows


# The authors' sizes, and the CPU milliseconds of their code at them, on one thread of a machine like ours.
MOMA_SIZES = {
    "the code's sizes": "--hidden 256 --width 128 --batch-size 64 --model-hidden 1024 --reward-hidden 1024 --model-layers 4".split(),
    "our sizes": [],
}
MOMA_AUTHORS = {"model update": 1351, "rollouts": 3102, "MAPPO update": 11555}


def bench_moma(device):
    print("\nMOMA-PPO on 4-agent Ant, partial view: milliseconds (multiples of the arithmetic's floor)")
    for name, flags in MOMA_SIZES.items():
        for seeds in (1, 3) if not flags or device != "cpu" else (1,):
            for compiled in (False,) if device == "cpu" else (False, True):
                found = moma(device, seeds, flags, compiled).items()
                line = "   ".join(f"{part} {took:7.0f} ({floor:3.1f})" for part, (took, floor) in found)
                print(f"  {name:16s} {seeds} seeds{', compiled' * compiled}   {line}", flush=True)
    if device == "cpu":
        line = "   ".join(f"{part} {took:7.0f}" for part, took in MOMA_AUTHORS.items())
        print(f"  their code, 1 seed, as measured earlier on a machine like ours: {line}")


def bench_maddpg(device):
    print("\nMADDPG+CQL+PJAP on 2-agent HalfCheetah, windows of 20 steps, milliseconds per update")
    for batch, ood in ((64, 10), (16, 4)):
        for seeds in (1, 3) if device == "cpu" else (1, 10):
            for compiled in (False,) if device == "cpu" else (False, True):
                update, draw = maddpg(device, seeds, batch, ood, compiled)
                share = f"{update:8.1f}, of which a draw from 1M windows and their refresh {draw:.2f}"
                print(
                    f"  batch {batch}, {ood:2d} actions, {seeds:2d} seeds{', compiled' * compiled}  {share}", flush=True
                )
    if device == "cpu" and importlib.util.find_spec("og_marl") is not None:
        print(f"  batch 64, 10 actions,  1 seed, OG-MARL {og_marl():8.1f}")


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


def bench_inspo(device):
    print("\nInSPO on Bridge, milliseconds per update")
    for network, flags in (("64 x 2", ()), ("256 x 3", ("--hidden", "256", "--layers", "3"))):
        for seeds in (1, 5, 10):
            for compiled in ("--no-compile", "--compile"):
                if network == "64 x 2" or seeds == 5:
                    took = inspo(device, "--num-seeds", str(seeds), compiled, *flags, steps=100 if flags else 400)
                    print(f"  {network}, {seeds:2d} seeds, {compiled:13s}{took:8.2f}", flush=True)

    print("\nInSPO with a memory, 5 agents, milliseconds per update (policies and Q-functions)")
    for task in ("5m_vs_6m", "2s3z"):
        for seeds in (1, 3):
            for order in ("--sequential", "--no-sequential"):
                flags = ("--env", "smac", "--task", task, "--warmup", "0", "--num-seeds", str(seeds), order)
                print(f"  {task}, {seeds} seeds, {order:16s}{inspo(device, *flags, steps=60):8.1f}", flush=True)


PARTS = {"games": bench_games, "smac": bench_smac, "inspo": bench_inspo, "maddpg": bench_maddpg, "moma": bench_moma}


def main(words):
    device = "cuda" if "--cuda" in words else "cpu"
    parts = [word for word in words if word != "--cuda"] or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"error: unknown words {sorted(unknown)}: choose from {', '.join(PARTS)} and --cuda")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU, one thread'}")
    for part in parts:
        PARTS[part](device)


if __name__ == "__main__":
    main(sys.argv[1:])
