"""One update of each script as a function without arguments, for tests and measurements: eager, compiled, or on a
pretended GPU.

Each maker takes a device, a function that compiles (by default one that does nothing), and flags of the script. It
returns a `Made`. Its updates draw their noise from seeded generators, so that two of the same make do the same.
"""

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


def inspo(device="cpu", compiled=plain, flags=()):
    script = load_script("inspo")
    args = script.parse([*flags, "--no-compile"])
    single = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # the collectors' networks
    dataset = datasets.load(args.env, args.task, args.dataset, device, episodes=args.episodes)
    torch.set_default_dtype(single)
    data, _ = script.arrange(dataset, args)
    (_, N, A), seeds = data.avail.shape, range(args.num_seeds)
    team = script.Team(N, A, data.obs.shape[-1], data.state.shape[-1], args, [runs.stream(s, 0) for s in seeds])
    team, generators = team.to(device), [runs.stream(s, 2, device) for s in seeds]
    adams = script.optimizers(team, args)
    behaviour, beta = script.tabulate(team, data, args), torch.full((), 0.03, device=device)
    cloning = script.Adam([*team.mus.parameters(), *team.teammates.parameters()], args.clone_lr)
    turn, look, clone = compiled(script.turn), compiled(script.look), compiled(script.clone_update)

    def sweep():
        noise = script.draw_noise(generators, N, args)
        script.update(team, adams, data, behaviour, noise, beta, range(N), True, args, turn, look)

    def cloned():
        size = args.sequences if args.recurrent else args.clone_batch
        noise = script.uniform(generators, size), script.uniform(generators, args.clone_batch)
        clone(team, cloning, data, *noise, args)

    return Made({"sweep": sweep, "clone": cloned}, [team])


UPDATES = {
    "inspo bridge": (inspo, ["--clone-steps", "1"]),
    "inspo battles": (inspo, "--env smac --task 3m --episodes 20 --sequences 2 --batch-size 32 --num-seeds 2".split()),
}
