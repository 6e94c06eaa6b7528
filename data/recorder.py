"""Record episodes of any environment, ours or `package.module:factory`: a random team, or one that a run has kept."""

import torch

import envs
from data.collect import block_seed, concatenate, record

GAMES = 16  # played at once: a game that is not ours is a Python object of its own


def record_team(env, task, team, episodes, seed=0, noise=0.0, options=None):
    """Let a team play; returns a `Dataset` of what happened.

    Args:
        env, task, options: as `envs.make` takes them.
        team: "random" for uniformly random available actions, or the folder of a run, whose seeds take turns.
        episodes: how many.
        seed: of the games and of all that is drawn.
        noise: the share of an agent's actions that are drawn at random instead; where actions are continuous, the
            standard deviation of what is added to each entry.
    Raises:
        ValueError: no such environment or team, or they do not fit.
    """
    if episodes < 1:
        raise ValueError(f"a dataset needs at least one episode, not {episodes}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"--noise must be at least 0 and finite, not {noise}")
    generator, parts = torch.Generator().manual_seed(seed), []
    kept = None if team == "random" else envs.play.load_team(team)
    for block, start in enumerate(range(0, episodes, GAMES)):
        game = envs.make(env, task, min(GAMES, episodes - start), **options or {})
        try:
            act = player(game, kept, block, noise, generator)
            parts.append(record(game, act, block_seed(env, task, seed, start)))
        finally:
            game.close()
    dataset = concatenate(parts)
    said = "uniformly random actions" if kept is None else f"the team of {team}, noise {noise:g}"
    dataset.info |= {"env": env, "task": task, "name": str(team), "seed": seed, "behaviour": said}
    dataset.info |= {key: value for key, value in (options or {}).items() if key == "team_reward"}
    return dataset.check()


def player(game, team, block, noise, generator):
    """What plays a batch of games, a function (step, obs, info) -> actions."""
    B, N, A = game.num_envs, game.num_agents, game.num_actions
    memory = None if team is None else team.start.repeat(1, B, 1, 1)

    def at_random(avail):
        if avail is None:
            return 2 * torch.rand(B, N, A, generator=generator) - 1
        return torch.multinomial(avail.flatten(0, 1).double(), 1, generator=generator).view(B, N)

    def act(t, obs, info):
        nonlocal memory
        avail = info.get("avail_actions")
        if team is None:
            return at_random(avail)
        actions, memory = envs.play.ask(team, obs, info, memory)
        actions = actions[block % len(actions)]
        if avail is None:
            return (actions + noise * torch.randn(actions.shape, generator=generator)).clamp(-1, 1)
        return torch.where(torch.rand(B, N, generator=generator) < noise, at_random(avail), actions)

    return act
