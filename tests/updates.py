"""One update of each script as a function without arguments, for tests and measurements: eager, compiled, or on a
pretended GPU.

Each maker takes a device, a function that compiles (by default one that does nothing), and flags of the script. It
returns a `Made`. Its updates draw their noise from seeded generators, so that two of the same make do the same.
"""

from functools import partial
from typing import NamedTuple

import torch
from conftest import load_script

import data as datasets
from data import runs


class Made(NamedTuple):
    updates: dict  # {name: function without arguments that makes one update}
    modules: list  # all that the updates change


def plain(function):
    return function


def load(args, device):
    """The dataset that the arguments name."""
    single = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # the collectors' networks
    dataset = datasets.load(args.env, args.task, args.dataset, device, episodes=args.episodes)
    torch.set_default_dtype(single)
    return dataset


def inspo(device="cpu", compiled=plain, flags=()):
    script = load_script("inspo")
    args = script.parse([*flags, "--no-compile"])
    dataset = load(args, device)
    data, _ = script.arrange(dataset, args)
    N, seeds = data.avail.shape[1], range(args.num_seeds)
    team = script.Team(data, args, [runs.stream(s, 0) for s in seeds])
    team, generators = team.to(device), [runs.stream(s, 2, device) for s in seeds]
    adams = script.optimizers(team, args)
    behaviour = script.tabulate(team, data, args)
    team.beta.fill_(0.03)
    cloning = script.Adam([*team.mus.parameters(), *team.teammates.parameters()], args.clone_lr)
    turn, look, clone = compiled(script.turn), compiled(script.look), compiled(script.clone_update)

    def sweep():
        noise = script.draw_noise(generators, N, args)
        script.update(team, adams, data, behaviour, noise, range(N), True, args, turn, look)

    def cloned():
        size = args.sequences if args.recurrent else args.clone_batch
        noise = script.uniform(generators, size), script.uniform(generators, args.clone_batch)
        clone(team, cloning, data, args, *noise)

    return Made({"sweep": sweep, "clone": cloned}, [team])


def maddpg(device="cpu", compiled=plain, flags=()):
    script = load_script("maddpg_cql_pjap")
    args = script.parse([*flags, "--no-compile"])
    dataset = load(args, device)
    data, start, _ = script.arrange(dataset, args)
    seeds = range(args.num_seeds)
    team = script.Team(data, args, [runs.stream(s, 0) for s in seeds]).to(device)
    generators = [runs.stream(s, 1, device) for s in seeds]
    windows, rmsprops = script.Windows(start, args.window, args.num_seeds), script.optimizers(team, args)
    update, steepness = compiled(script.update), torch.full((), args.steepness, device=device)

    def learn():
        noise = script.draw_noise(generators, data, args)
        update(team, rmsprops, data, windows, noise, steepness, args)

    return Made({"update": learn}, [team, windows])


def polygames(device="cpu", compiled=plain, flags=()):
    script = load_script("polygames")
    args = script.parse([*flags])
    args.device = device
    game, (unit,) = script.games(args)["twin peaks"], script.draw(args, (torch.randn, args.num_samples, 2))
    data = script.peak(args) + unit.new_tensor(args.sigmas).view(-1, 1, 1, 1, 1) * unit  # as in Figure 5
    theta = unit.new_tensor((-0.5, 0.5)).expand(len(args.sigmas), 2, args.num_seeds, 2)
    theta = torch.nn.ParameterList([theta.clone()]).requires_grad_(False)
    pjap = torch.tensor([[False], [True]], device=device)
    eta, *pjap = pjap.new_tensor(args.learning_rate, dtype=unit.dtype), pjap, args.alpha, args.epsilon
    pjap[1:] = (eta.new_tensor(x) for x in pjap[1:])
    generators, update = [runs.stream(s, 2, device) for s in range(args.num_seeds)], compiled(script.update)

    def learn(*chance):
        theta[0].copy_(update(game, theta[0].detach(), data, eta, *chance)[0])

    def drawn():
        uniforms = [torch.rand(args.batch_size, generator=g, device=device, dtype=unit.dtype) for g in generators]
        learn(torch.stack(uniforms), *pjap)

    return Made({"drawn": drawn, "whole": learn}, [theta])


def mappo(device="cpu", compiled=plain, flags=()):
    script = load_script("mappo")
    args = script.parse([*flags, "--no-compile"])
    games, seeds = script.Games(args, args.num_envs, device), range(args.num_seeds)
    team = script.Team(*games.sizes, args, [runs.stream(s, 0) for s in seeds]).to(device)
    adam, generators = script.Adam(team.parameters(), args.lr), [runs.stream(s, 1, device) for s in seeds]
    act, estimate, minibatch = map(compiled, (script.act, script.estimate, script.minibatch))
    if hasattr(games.env, "compile"):
        games.env.compile(compiled)
    played = []

    def play():
        played[:] = [script.roll_out(games, team, generators, args, act)]

    def learn():
        orders = script.draw_orders(generators, args.rollout * args.num_envs, args)
        script.update(team, adam, played[0], orders, args, estimate, minibatch)

    return Made({"play": play, "update": learn}, [team, adam])


def moma(device="cpu", compiled=plain, flags=()):
    script = load_script("moma_ppo")
    args = script.parse([*flags, "--no-compile"])
    data, whole = script.arrange(load(args, device), args)
    seeds = range(args.num_seeds)
    agents = script.Agents(data, args, [runs.stream(s, 0) for s in seeds]).to(device)
    world = script.World(data, args, [runs.stream(s, 2) for s in seeds]).to(device)
    adam, model_adam = script.Adam(agents.parameters(), args.lr), script.Adam(world.parameters(), args.model_lr)
    generators, learning = [runs.stream(s, 1, device) for s in seeds], compiled(script.model_update)
    errors = dict.fromkeys(("state", "reward"), torch.zeros(args.num_seeds, args.members, device=device))
    play, batch = script.dream(world.choose(script.best(errors, args)), data, args), []
    steps = [*map(compiled, (script.rehearsal_step, script.settle))]
    part, cloning = compiled(script.minibatch), compiled(script.clone_update)

    def learn():
        rows = script.draw_rows(generators, data.train, args.members, args.model_batch)
        learning(world, model_adam, data, rows, args)

    def rehearse():
        batch[:] = script.rehearse(agents, play, data, script.draw_noise(generators, data, args), args, *steps)

    def update():
        orders = script.draw_orders(generators, args.rollouts * args.horizon, args)
        script.update(agents, adam, batch[0], orders, args, part)

    def clone():
        rows = script.draw_rows(generators, data.steps, args.batch_size)
        cloning(agents, adam, data, rows, args)

    updates = {"model update": learn, "rollouts": rehearse, "MAPPO update": update, "warm-up": clone}
    return Made(updates, [world, agents])


def bc(device="cpu", compiled=plain, flags=()):
    script = load_script("bc")
    args = script.parse([*flags, "--no-compile"])
    data, _ = script.arrange(load(args, device), args)
    policies = script.Policies(data, args, [runs.stream(s, 0) for s in range(args.num_seeds)]).to(device)
    adam, update = script.Adam(policies.parameters(), args.lr), compiled(script.update)
    generators = [runs.stream(s, 1, device) for s in range(args.num_seeds)]

    def learn():
        update(policies, adam, data, script.draw_rows(generators, data, args), args)

    return Made({"update": learn}, [policies])


def cfcql(device="cpu", compiled=plain, flags=()):
    script = load_script("cfcql")
    args = script.parse([*flags, "--no-compile"])
    data, _ = script.arrange(load(args, device), args)
    team = script.Team(data, args, [runs.stream(s, 0) for s in range(args.num_seeds)]).to(device)
    adam, generators = script.optimizer(team, args), [runs.stream(s, 2, device) for s in range(args.num_seeds)]
    behaviour, cloning = script.tabulate(team, data, args), script.Adam(team.behaviour.parameters(), args.clone_lr)
    update, clone_update = compiled(script.update), compiled(script.clone_update)

    def learn():
        rows, joint = script.draw_rows(generators, data, args), script.draw_joint(generators, data, args)
        update(team, adam, data, behaviour, rows, joint, args)

    def clone():
        clone_update(team.behaviour, cloning, data, script.draw_rows(generators, data, args), args)

    return Made({"update": learn, "clone": clone}, [team])


def omar(device="cpu", compiled=plain, flags=()):
    script = load_script("omar")
    args = script.parse([*flags, "--no-compile"])
    data, _ = script.arrange(load(args, device), args)
    team = script.Team(data, args, [runs.stream(s, 0) for s in range(args.num_seeds)]).to(device)
    adams, update = script.optimizers(team, args), compiled(script.update)
    generators = [runs.stream(s, 1, device) for s in range(args.num_seeds)]

    def learn():
        update(team, adams, data, script.draw_rows(generators, data, args), args)

    return Made({"update": learn}, [team])


def alberdice(device="cpu", compiled=plain, flags=()):
    script = load_script("alberdice")
    args = script.parse([*flags, "--no-compile"])
    data, _ = script.arrange(load(args, device), args)
    team = script.Team(data, args, [runs.stream(s, 0) for s in range(args.num_seeds)]).to(device)
    adams, generators = script.optimizers(team, args), [runs.stream(s, 2, device) for s in range(args.num_seeds)]
    behaviour = script.tabulate(team, data, args)
    script.schedule(team, adams, 0, args)
    cloning = script.Adam([*team.mus.parameters(), *team.teammates.parameters()], args.clone_lr)
    turn, clone = compiled(script.turn), compiled(script.clone_update)

    def sweep():
        noise = script.draw_noise(generators, data.avail.shape[1], args)
        script.update(team, adams, data, behaviour, noise, args, turn)

    def cloned():
        clone(team, cloning, data, script.uniform(generators, args.clone_batch))

    return Made({"sweep": sweep, "clone": cloned}, [team])


def rival(name, device="cpu", compiled=plain, flags=()):
    """OMIGA, IQL or TD3+BC, which are alike in this."""
    script = load_script(name)
    args = script.parse([*flags, "--no-compile"])
    data, _ = script.arrange(load(args, device), args)
    team = script.Team(data, args, [runs.stream(s, 0) for s in range(args.num_seeds)]).to(device)
    adams, update = script.optimizers(team, args), compiled(script.update)
    generators = [runs.stream(s, 1, device) for s in range(args.num_seeds)]

    def learn():
        if name == "td3_bc":
            update(team, adams, data, script.draw_noise(generators, data, args), True, args)
        else:
            update(team, adams, data, script.draw_rows(generators, data, args), args)

    return Made({"update": learn}, [team])


omiga, iql, td3_bc = (partial(rival, name) for name in ("omiga", "iql", "td3_bc"))

BATTLES = "--env smac --task 3m --episodes 20 --sequences 2 --num-seeds 2 --hidden 16".split()
UPDATES = {
    "cfcql game": (cfcql, ["--num-seeds", "2"]),
    "cfcql battles": (cfcql, BATTLES),
    "macql": (cfcql, "--num-seeds 2 --joint-cql --joint-samples 5".split()),
    "omar game": (omar, ["--num-seeds", "2"]),
    "omar battles": (omar, BATTLES),
    "alberdice bridge": (alberdice, "--episodes 40 --num-seeds 2 --batch-size 16 --hidden 16".split()),
    "omiga game": (omiga, "--env matrix --task m-ne --num-seeds 2".split()),
    "omiga reacher": (omiga, "--env reacher --episodes 20 --num-seeds 2 --hidden 16".split()),
    "iql central": (iql, "--num-seeds 2 --team central".split()),
    "maiql reacher": (iql, "--env reacher --episodes 20 --num-seeds 2 --hidden 16".split()),
    "matd3+bc": (td3_bc, "--env reacher --episodes 20 --num-seeds 2 --hidden 16 --mixing".split()),
    "iomar": (td3_bc, "--env reacher --episodes 20 --num-seeds 2 --hidden 16 --bc 0 --cql 1 --omar 0.9".split()),
    "bc game": (bc, ["--num-seeds", "2"]),
    "bc reacher": (bc, "--env reacher --episodes 20 --num-seeds 2 --hidden 16".split()),
    "inspo bridge": (inspo, ["--clone-steps", "1"]),
    "inspo battles": (inspo, "--env smac --task 3m --episodes 20 --sequences 2 --batch-size 32 --num-seeds 2".split()),
    "maddpg reacher": (
        maddpg,
        "--env reacher --episodes 20 --num-seeds 2 --window 5 --batch-size 4 --refresh 3".split(),
    ),  # fmt: skip
    "mappo bridge": (mappo, "--env bridge --num-seeds 2 --num-envs 4 --rollout 6 --epochs 2 --minibatches 2".split()),
    "mappo battles": (
        mappo,
        "--env smac --task 3m --num-envs 3 --rollout 5 --epochs 1 --minibatches 2 --recall 2 --normalize".split(),
    ),
    "moma game": (
        moma,
        "--num-seeds 2 --rollouts 8 --horizon 2 --epochs 2 --batch-size 5 --members 3 --elites 2".split(),
    ),  # fmt: skip
    "moma ant": (
        moma,
        "--env ant --task partial --dataset medium --episodes 2 --num-seeds 2 --members 3 --elites 2 "
        "--rollouts 4 --horizon 3 --memory 3 --hidden 16 --width 4 --model-hidden 16 --reward-hidden 16 "
        "--model-batch 8 --batch-size 5 --epochs 2 --adaptive --limit 1".split(),
    ),
    "polygames": (polygames, ["--num-seeds", "2"]),
}

# Batched environments made of tensors, by env and task.
GAMES = {
    "bridge": ("bridge", ""),
    "matrix": ("matrix", "climbing"),
    "battles": ("smac", "3m"),
    "shields": ("smac", "3s_vs_5z"),
}


def evaluate_inspo(device):
    """InSPO's evaluation on Bridge as a function without arguments."""
    script = load_script("inspo")
    args = script.parse(["--num-seeds", "2", "--no-compile"])
    data, encode = script.arrange(datasets.load("bridge", "", "mixed", device, episodes=40), args)
    team = script.Team(data, args, [runs.stream(s, 0) for s in range(2)])
    policies = team.to(device).policies
    return lambda: script.evaluate(policies, encode, args, 0, 3, torch.device(device))


def evaluate_mappo(device):
    """MAPPO's evaluation on Bridge as a function without arguments."""
    script = load_script("mappo")
    args = script.parse("--env bridge --num-seeds 2 --hidden 16 --no-compile".split())
    games = script.Games(args, 2, device)
    team = script.Team(*games.sizes, args, [runs.stream(s, 0) for s in range(2)]).to(device)
    return lambda: script.evaluate(team, args, 0, 2, torch.device(device))


def evaluate_moma(device):
    """MOMA-PPO's evaluation in a game as a function without arguments."""
    script = load_script("moma_ppo")
    args = script.parse(["--num-seeds", "2", "--no-compile"])
    data, _ = script.arrange(load(args, device), args)
    agents = script.Agents(data, args, [runs.stream(s, 0) for s in range(2)]).to(device)
    return lambda: script.evaluate(agents, args, 0, 2, torch.device(device))


def evaluate_bc(device):
    """BC's evaluation on Bridge as a function without arguments."""
    script = load_script("bc")
    args = script.parse("--env bridge --episodes 40 --num-seeds 2 --no-compile".split())
    data, encode = script.arrange(load(args, device), args)
    policies = script.Policies(data, args, [runs.stream(s, 0) for s in range(2)]).to(device)
    return lambda: script.evaluate(policies, encode, args, 0, 2, torch.device(device))


def evaluate_rival(device, name, flags, part="policies"):
    """The evaluation of a script whose `evaluate` takes policies and an encoder, as a function without arguments."""
    script = load_script(name)
    args = script.parse([*flags.split(), "--num-seeds", "2", "--hidden", "16", "--no-compile"])
    data, encode = script.arrange(load(args, device), args)
    team = script.Team(data, args, [runs.stream(s, 0) for s in range(2)]).to(device)
    return lambda: script.evaluate(getattr(team, part), encode, args, 0, 2, torch.device(device))


MEMORY = "--env bridge --episodes 40 --recurrent"
EVALUATIONS = {
    "bc": evaluate_bc, "inspo": evaluate_inspo, "mappo": evaluate_mappo, "moma": evaluate_moma,
    "cfcql": partial(evaluate_rival, name="cfcql", flags=MEMORY, part="agents"),
    "omar": partial(evaluate_rival, name="omar", flags=MEMORY),
    "alberdice": partial(evaluate_rival, name="alberdice", flags="--episodes 40"),
    "omiga": partial(evaluate_rival, name="omiga", flags="--env bridge --episodes 40"),
    "iql": partial(evaluate_rival, name="iql", flags="--team central"),
    "td3": partial(evaluate_rival, name="td3_bc", flags="--env polynomial"),
}  # fmt: skip
