"""MAPPO: its estimates and losses against slow loops, what it learns, and its files through the command line."""

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, command, complains, load_script
from gymnasium.vector import VectorEnv
from updates import UPDATES

import envs
from data.behaviours import choose_behaviours, read_behaviour
from envs.smac import MEMORY, POLICIES

mappo = load_script("mappo")
S, M, N, A, D, W = 3, 6, 4, 5, 7, 8


def stream(seed):
    return torch.Generator().manual_seed(seed)


def networks(discrete=True, hidden=9):
    """An actor, with larger outputs than at the start of a run, and a critic."""
    generators, args = [stream(s) for s in range(S)], mappo.Args(hidden=hidden)
    actor = mappo.Actor(W, A, discrete, args, generators)
    actor.body[-1].weight.data.mul_(100)
    return actor, mappo.mlp(D, 1, 1.0, args, generators)


def new_team(args, num_envs, *seeds):
    """Games, and a new team for them, made by a generator for each of these seeds."""
    games = mappo.Games(args, num_envs, "cpu")
    return games, mappo.Team(*games.sizes, args, [stream(seed) for seed in seeds])


class Target(VectorEnv):
    """Two agents with one continuous action each pay |a - target|^2, for five steps; nothing ends but by the clock.

    An agent sees its own target, which `reset` draws, and the clock; a state is all that is seen.
    """

    num_agents, num_actions, obs_dim, state_dim, time_limit, best_return = 2, 1, 2, 4, 5, 0.0

    def __init__(self, num_envs, device="cpu"):
        self.num_envs, self.device, self.generator = num_envs, torch.device(device), stream(0)
        self.target, self.clock = torch.zeros(num_envs, 2), torch.zeros(num_envs)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.generator.manual_seed(seed)
        mask = (options or {}).get("reset_mask", torch.ones(self.num_envs, dtype=torch.bool))
        drawn = 1.6 * torch.rand(self.num_envs, 2, generator=self.generator) - 0.8
        self.target = torch.where(mask[:, None], drawn, self.target)
        self.clock = torch.where(mask, 0.0, self.clock)
        return self.see()

    def see(self):
        obs = torch.stack([self.target, self.clock[:, None].expand(-1, 2)], -1)
        return obs, {"state": obs.flatten(1)}

    def step(self, actions):
        assert actions.dtype == torch.float32 and actions.shape == (self.num_envs, 2, 1) and actions.abs().max() <= 1
        over = self.clock >= self.time_limit
        reward = -(actions[..., 0] - self.target).square().sum(1) * ~over
        self.clock = self.clock + ~over.bool()
        obs, info = self.see()
        truncated = self.clock >= self.time_limit
        return obs, reward, torch.zeros_like(truncated), truncated, info


@pytest.fixture
def target_env(monkeypatch):
    real = envs.make
    monkeypatch.setattr(
        envs, "make", lambda env, task, *sizes: Target(*sizes) if env == "target" else real(env, task, *sizes)
    )


# ---------------------------------------------------------------- against slow loops
def test_advantages_are_discounted_sums_of_errors(float64):
    L, B, gamma, lam = 9, 5, 0.9, 0.8
    g = stream(0)
    reward, value, after = (torch.randn(S, L, B, generator=g) for _ in range(3))
    terminated = torch.rand(S, L, B, generator=g) < 0.2
    truncated = (torch.rand(S, L, B, generator=g) < 0.2) & ~terminated
    assert terminated.any() and truncated.any()
    found = mappo.gae(reward, terminated, truncated, value, after, gamma, lam)
    for s in range(S):
        for b in range(B):
            for t in range(L):
                expected, weight = 0.0, 1.0
                for k in range(t, L):
                    bootstrap = 0.0 if terminated[s, k, b] else gamma * after[s, k, b].item()
                    expected += weight * (reward[s, k, b].item() + bootstrap - value[s, k, b].item())
                    if terminated[s, k, b] or truncated[s, k, b]:
                        break
                    weight *= gamma * lam
                assert found[s, t, b].item() == pytest.approx(expected, abs=1e-12)


def test_a_time_limit_looks_beyond_the_end_from_the_last_state(target_env, monkeypatch):
    args, seen = mappo.Args(env="target", num_envs=3, rollout=7, num_seeds=2), {}
    games, team = new_team(args, 3, 0, 1)
    monkeypatch.setattr(team, "value", lambda state: state[..., 1])  # the clock, in place of V
    monkeypatch.setattr(mappo, "gae", lambda *x: seen.update(x=x) or torch.zeros_like(x[0]))
    mappo.estimate(team, mappo.roll_out(games, team, [stream(0), stream(1)], args), args)
    _, terminated, truncated, value, after, *_ = seen["x"]
    assert not terminated.any() and truncated[:, 4].all() and truncated.sum() == 6
    assert value[0, :, 0].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert after[0, :, 0].tolist() == [1, 2, 3, 4, 5, 1, 2]  # 5 is the state that the limit met, not the next game's


def random_batch(seed=0):
    """Steps with dead agents (only action 0), actions that are not available, and ratios far from 1."""
    g = stream(seed)
    alive = torch.rand(S, M, N, generator=g) > 0.3
    avail = (torch.rand(S, M, N, A, generator=g) > 0.4) & alive[..., None]
    avail[..., 3] |= alive
    avail[..., 0] = ~alive
    action = (torch.rand(S, M, N, A, generator=g) * avail).argmax(-1)
    x, state = torch.randn(S, M, N, W, generator=g), torch.randn(S, M, D, generator=g)
    advantage, returns = torch.randn(2, S, M, generator=g)
    played = torch.randn(S, M, N, generator=g) - 1
    return mappo.Batch(x, avail, action, played, alive.to(x.dtype), state, advantage, 3 * returns)


def test_loss_is_the_clipped_objective_of_living_agents(float64):
    (actor, critic), batch, clip, huber = networks(), random_batch(), 0.2, 0.7
    batch = batch._replace(
        log_prob=actor.log_prob(actor(batch.x, batch.avail), batch.action)[0].detach() + 0.3 * batch.log_prob
    )
    policy_loss, value_loss, entropy, kl = mappo.ppo_loss(actor, critic, batch, clip, huber)
    clipped = 0
    for s in range(S):
        gains, entropies, kls, errors = [], [], [], []
        for m in range(M):
            h = batch.state[s, m]
            for k in (0, 2, 4):
                h = h @ critic[k].weight[s] + critic[k].bias[s, 0]
                h = h.relu() if k < 4 else h
            error = abs(h.item() - batch.returns[s, m].item())
            errors.append(0.5 * error**2 if error < huber else huber * (error - 0.5 * huber))
            for i in range(N):
                if not batch.alive[s, m, i]:
                    continue
                h = batch.x[s, m, i]
                for k in (0, 2, 4):
                    h = h @ actor.body[k].weight[s] + actor.body[k].bias[s, 0]
                    h = h.relu() if k < 4 else h
                legal = batch.avail[s, m, i].nonzero()[:, 0].tolist()
                total = sum(h[a].exp().item() for a in legal)
                pi = {a: h[a].exp().item() / total for a in legal}
                ratio = pi[batch.action[s, m, i].item()] / np.exp(batch.log_prob[s, m, i].item())
                advantage = batch.advantage[s, m].item()
                gains.append(min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage))
                clipped += gains[-1] != ratio * advantage
                entropies.append(-sum(p * np.log(p) for p in pi.values()))
                kls.append(ratio - 1 - np.log(ratio))
        assert policy_loss[s].item() == pytest.approx(-np.mean(gains), abs=1e-12)
        assert value_loss[s].item() == pytest.approx(np.mean(errors), abs=1e-12)
        assert entropy[s].item() == pytest.approx(np.mean(entropies), abs=1e-12)
        assert kl[s].item() == pytest.approx(np.mean(kls), abs=1e-12)
    assert 3 < clipped < len(batch.alive.flatten()) and (batch.alive == 0).any()


def test_the_dead_and_what_is_forbidden_get_no_gradient(float64):
    (actor, critic), batch = networks(), random_batch()
    x = batch.x.clone().requires_grad_()
    batch = batch._replace(x=x)
    policy_loss, _, entropy, _ = mappo.ppo_loss(actor, critic, batch, 10.0, 1.0)
    (policy_loss - entropy).sum().backward()
    moved = x.grad.abs().sum(-1) > 0
    choices = batch.avail.sum(-1) > 1
    assert not moved[batch.alive == 0].any() and moved[choices].any()
    out = actor(batch.x, batch.avail)
    assert (out.exp()[~batch.avail] == 0).all() and torch.allclose(out.exp().sum(-1), torch.ones(S, M, N))
    for seed in range(20):
        action = actor.sample(out, actor.noise([stream(seed)] * S, M, N))
        assert batch.avail.gather(-1, action[..., None]).all()


def test_samples_follow_the_policy():
    actor, _ = networks()
    x, avail = torch.randn(S, 1, 1, W, generator=stream(0)), torch.ones(S, 1, 1, A, dtype=torch.bool)
    avail[..., 2] = False
    out = actor(x, avail)
    draws = actor.sample(out.expand(S, 40_000, 1, A), actor.noise([stream(s) for s in range(S)], 40_000, 1))
    shares = torch.nn.functional.one_hot(draws[..., 0], A).float().mean(1)
    assert (shares - out[:, 0, 0].exp()).abs().max() < 0.01
    assert torch.equal(actor.sample(out, 0), out.argmax(-1))


def test_continuous_actions_have_a_normal_density(float64):
    actor, _ = networks(discrete=False)
    actor.free_log_std.data = torch.randn(S, 1, A, generator=stream(1))
    mean = actor(torch.randn(S, M, N, W, generator=stream(2)), None)
    action = actor.sample(mean, actor.noise([stream(s) for s in range(S)], M, N))
    assert mean.abs().max() < 1 and torch.equal(actor.sample(mean, 0), mean)
    normal = torch.distributions.Normal(mean, actor.log_std.exp()[:, None])
    log_prob, entropy = actor.log_prob(mean, action)
    assert torch.allclose(log_prob, normal.log_prob(action).sum(-1), atol=1e-12)
    assert torch.allclose(entropy.expand(S, M, N), normal.entropy().sum(-1), atol=1e-12)
    actor.least = 0.0  # --min-std 1
    assert (actor.log_std == actor.free_log_std.clamp(min=0)).all() and (actor.free_log_std < 0).any()


def test_long_gradients_are_cut_for_each_seed_alone(float64):
    _, critic = networks()
    before = [torch.randn(p.shape, generator=stream(0)) for p in critic.parameters()]
    for grad in before:
        grad[0] *= 1e-3
    after = mappo.limit_norm(before, 2.0)
    for s in range(S):
        long = sum(g[s].square().sum() for g in before).sqrt()
        for cut, grad in zip(after, before, strict=True):
            assert torch.allclose(cut[s], grad[s] * min(1.0, 2.0 / long))
        assert (long > 2) == (s > 0)


def test_a_minibatch_moves_by_its_loss_with_each_networks_gradient_cut(float64):
    """Against torch's own Adam and gradients, network by network and seed by seed."""
    args = mappo.Args(hidden=9, layers=2, max_grad_norm=0.3, lr=0.01, entropy=0.1, clip=0.1, huber=0.7)
    team, batch = mappo.Team(N, A, 3, D, True, args, [stream(s) for s in range(S)]), random_batch()
    batch = batch._replace(x=torch.randn(S, M, N, 3 + A + N, generator=stream(9)))
    pick = torch.stack([torch.randperm(M, generator=stream(s))[:4] for s in range(S)])
    slow = copy.deepcopy(team)
    adams = {net: torch.optim.Adam(getattr(slow, net).parameters(), args.lr, eps=1e-5) for net in ("actor", "critic")}
    adam, cut = mappo.Adam(team.parameters(), args.lr), 0
    for _ in range(3):
        found = mappo.minibatch(team, adam, batch, pick, args)
        part = mappo.Batch(*(torch.stack([each[s, pick[s]] for s in range(S)]) for each in batch))
        policy_loss, value_loss, entropy, kl = mappo.ppo_loss(slow.actor, slow.critic, part, args.clip, args.huber)
        (policy_loss - args.entropy * entropy + value_loss).sum().backward()
        for net, optimizer in adams.items():
            for s in range(S):
                grads = [p.grad[s] for p in getattr(slow, net).parameters()]
                length = torch.cat([g.flatten() for g in grads]).norm()
                cut += length.item() > args.max_grad_norm
                for g in grads:
                    g.mul_(min(1.0, args.max_grad_norm / length.item()))
            optimizer.step()
            optimizer.zero_grad()
        wanted = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "kl": kl}
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], wanted[name], atol=1e-12) for name in wanted)
    assert 0 < cut < 6 * S  # some were cut, and some were not
    for one, other in zip(team.parameters(), slow.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_an_update_goes_over_every_step_once_an_epoch():
    args, seen = mappo.Args(num_seeds=2, epochs=3, minibatches=4), []
    orders = mappo.draw_orders([stream(0), stream(1)], 10, args)

    def minibatch(team, adam, batch, pick, args):
        seen.append((team, adam, batch, pick))
        return len(seen)

    logs = mappo.update("team", "adam", "rollout", orders, args, lambda *given: given, minibatch)
    assert logs == 12 and all(each[:3] == ("team", "adam", ("team", "rollout", args)) for each in seen)
    assert [pick.shape[1] for *_, pick in seen] == [3, 3, 2, 2] * 3  # as even as can be
    for epoch in range(3):
        order = torch.cat([pick for *_, pick in seen[4 * epoch : 4 * epoch + 4]], 1)
        assert (order.sort(1).values == torch.arange(10)).all() and not torch.equal(order[0], order[1])
    alone = mappo.draw_orders([stream(1)], 10, args)  # seed 1 on its own
    assert torch.equal(alone[:, 0], orders[:, 1])


def test_running_moments_are_weighted_means(float64):
    (_, team), g = new_team(mappo.Args(env="bridge", num_seeds=2), 1, 0, 1), stream(2)
    mean, std = team.scale()
    assert mean.tolist() == [[0], [0]] and std.tolist() == [[1], [1]]
    chunks = [torch.randn(2, 30, generator=g) * k + k for k in range(1, 5)]
    for chunk in chunks:
        team.watch(chunk, decay=0.7)
    mean, std = team.scale()
    weight = torch.tensor([0.7 ** (3 - k) for k in range(4)]).repeat_interleave(30) / 30
    every = torch.cat(chunks, 1)
    expected = (weight * every).sum(1) / weight.sum()
    assert torch.allclose(mean[:, 0], expected)
    spread = ((weight * (every - expected[:, None]) ** 2).sum(1) / weight.sum()).sqrt()
    assert torch.allclose(std[:, 0], spread)


def act_out(games, team, action, over):
    """Play these actions in place of the policies' own, and start the games `over` anew, as a rollout does."""
    team.actor.sample = lambda out, noise: action
    *_, games.last = mappo.act(team.actor, games.obs, games.last, games.avail, 0)
    del team.actor.sample
    games.step(action)
    games.restart_finished(over)


def test_actors_see_their_last_action_and_their_number():
    games, team = new_team(mappo.Args(env="bridge", num_seeds=2), 3, 0, 1)
    x, avail = mappo.look(games.obs, games.last), games.avail
    assert x.shape == (2, 3, 2, 8 + 5 + 2) and avail.shape == (2, 3, 2, 5)
    assert (x[..., 8:13] == 0).all() and torch.equal(x[1, 2, :, 13:], torch.eye(2))
    action = torch.arange(12).view(2, 3, 2) % 5
    act_out(games, team, action, torch.tensor([[True, False, False], [False, False, True]]))
    x = mappo.look(games.obs, games.last)
    assert (x[0, 0, :, 8:13] == 0).all() and (x[1, 2, :, 8:13] == 0).all()
    assert torch.equal(x[0, 1:, :, 8:13].argmax(-1), action[0, 1:]) and (x[0, 1:, :, 8:13].sum(-1) == 1).all()
    assert torch.equal(x[0, 0, 0, :8], games.env.reset()[0][0, 0])


def test_agents_recall_their_newest_actions_first():
    games, team = new_team(mappo.Args(env="bridge", recall=3), 2, 0)
    for t, over in enumerate([False, True, False, False]):
        act_out(games, team, torch.full((1, 2, 2), t), torch.tensor([[over, False]]))
    recalled = mappo.look(games.obs, games.last)[0, :, :, 8:-2].view(2, 2, 3, 5)
    assert (recalled[1].argmax(-1) == torch.tensor([3, 2, 1])).all() and (recalled[1].sum(-1) == 1).all()
    assert (recalled[0, :, :2].argmax(-1) == torch.tensor([3, 2])).all() and (recalled[0, :, 2] == 0).all()


def test_a_rollout_is_what_was_played():
    """Played again step by step in another environment, with what the actors saw, chose and thought of it."""
    args = mappo.Args(env="smac", task="3m", num_envs=4, rollout=70, num_seeds=2, recall=2)
    games, team = new_team(args, 4, 0, 1)
    team.actor.body[-1].weight.data.mul_(100)
    games.restart(5)
    found = mappo.roll_out(games, team, [stream(2), stream(3)], args)
    noise = team.actor.noise([stream(2), stream(3)], 70, 4, 3)
    env, A = envs.make("smac", "3m", num_envs=8), 9
    obs, info = env.reset(seed=5)
    last, ended = torch.zeros(8, 3, 2 * A), 0
    for t in range(70):
        x = torch.cat([obs, last, torch.eye(3).expand(8, 3, 3)], -1)
        assert torch.equal(found.x[:, t].flatten(0, 1), x)
        assert torch.equal(found.state[:, t].flatten(0, 1), info["state"])
        assert torch.equal(found.avail[:, t].flatten(0, 1), info["avail_actions"])
        out = team.actor(found.x[:, t], found.avail[:, t]).detach()
        action = (out + noise[:, t]).argmax(-1)
        assert torch.equal(found.action[:, t], action)
        assert torch.equal(found.log_prob[:, t], out.gather(-1, action[..., None])[..., 0])
        obs, reward, terminated, truncated, info = env.step(action.flatten(0, 1))
        for name, value in (("reward", reward), ("terminated", terminated), ("truncated", truncated),
                            ("next_state", info["state"])):  # fmt: skip
            assert torch.equal(getattr(found, name)[:, t].flatten(0, 1), value), name
        over = terminated | truncated
        last = torch.cat([torch.nn.functional.one_hot(action.flatten(0, 1), A), last[..., :A]], -1)
        last = last * ~over[:, None, None]
        ended += over.sum().item()
        if over.any():
            obs, info = env.reset(options={"reset_mask": over})
    assert ended >= 8


def test_advantages_have_mean_0_and_spread_1_over_living_agents(monkeypatch):
    args, g = mappo.Args(env="bridge", num_envs=16, rollout=8), stream(0)
    games, team = new_team(args, 16, 0)
    see = games.see

    def see_some_dead(obs, info):
        see(obs, info)
        games.avail = games.avail.clone()
        games.avail[..., 1, 1:] &= torch.rand(1, 16, 1, generator=g) < 0.5

    monkeypatch.setattr(games, "see", see_some_dead)
    games.restart(0)
    batch = mappo.estimate(team, mappo.roll_out(games, team, [stream(1)], args), args)
    assert 0.2 < 1 - batch.alive[..., 1].mean() < 0.8 and (batch.alive[..., 0] == 1).all()
    living = batch.advantage[..., None].expand_as(batch.alive)[batch.alive > 0]
    assert living.mean().abs() < 1e-5 and living.std(correction=0) == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------- graphs
@pytest.mark.parametrize("env, task", [("smac", "3m"), ("smac", "3s_vs_5z"), ("bridge", ""), ("matrix", "climbing")])
def test_a_step_and_a_reset_are_one_graph_each_and_the_same_games(env, task):
    """The graphs as torch's own operations; what a compiler makes of them may be rounded in another way."""
    graphs, options = [], {"check": False} if env == "smac" else {}
    game, other = (envs.make(env, task, 6, **options) for _ in range(2))
    other.compile(lambda f: torch.compile(f, fullgraph=True, dynamic=False, backend=lambda g, _: graphs.append(g) or g))
    memory = MEMORY if env == "smac" else ("cells", "elapsed") if env == "bridge" else ("over",)
    places = [getattr(other, name).data_ptr() for name in memory]
    (obs, info), (seen, known) = game.reset(seed=3), other.reset(seed=3)
    ended = 0
    for t in range(80):
        assert torch.equal(obs, seen) and info.keys() == known.keys()
        assert all(torch.equal(info[name], known[name]) for name in info)
        action = POLICIES["focus"](game, info) if env == "smac" else torch.randint(
            game.num_actions, (6, game.num_agents), generator=stream(t))  # fmt: skip
        obs, *rest, info = game.step(action)
        seen, *others, known = other.step(action)
        assert torch.equal(obs, seen) and all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
        over = rest[1] | rest[2]
        ended += over.sum().item()
        (obs, info), (seen, known) = (g.reset(options={"reset_mask": over}) for g in (game, other))
    assert ended and len(graphs) == 2
    assert [getattr(other, name).data_ptr() for name in memory] == places  # a CUDA graph writes where it did before


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_what_the_compiler_makes_of_a_minibatch_agrees_with_eager(float64):
    def learning(function):  # the rest would take a minute to compile
        name = function.__name__
        return torch.compile(function, fullgraph=True, dynamic=False) if name == "minibatch" else function

    make, flags = UPDATES["mappo bridge"]
    eager, compiled = make(flags=flags), make(flags=flags, compiled=learning)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for _ in range(3):
            for part in eager.updates:
                eager.updates[part]()
                compiled.updates[part]()
    for one, other in zip(eager.modules, compiled.modules, strict=True):
        state = other.state_dict()
        assert all(torch.allclose(x, state[name], rtol=0, atol=1e-9) for name, x in one.state_dict().items())


# ---------------------------------------------------------------- whole runs
TINY = ["--env", "bridge", "--num-envs", "8", "--rollout", "16", "--steps", "2000", "--eval-every", "512",
        "--eval-episodes", "4", "--hidden", "16", "--minibatches", "3"]  # fmt: skip


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["team"]


def table(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


@pytest.mark.parametrize("flags", [[], ["--normalize"]], ids=["raw", "normalized"])
def test_three_seeds_at_once_are_three_single_runs(tmp_path, float64, flags):
    mappo.main(mappo.parse([*TINY, *flags, "--num-seeds", "3", "--seed", "5", "--out-dir", str(tmp_path / "all")]))
    together = weights(tmp_path / "all")
    for s in range(3):
        out = tmp_path / f"one{s}"
        mappo.main(mappo.parse([*TINY, *flags, "--seed", str(5 + s), "--out-dir", str(out)]))
        alone = weights(out)
        assert (alone["critic.0.seen"] > 0).all() == bool(flags)
        assert (alone["critic.1.weight"] - together["critic.1.weight"][(s + 1) % 3]).abs().max() > 0.1
        for name, tensor in alone.items():
            axis = 1 if name == "moments" else 0
            assert torch.allclose(tensor.select(axis, 0), together[name].select(axis, s), atol=1e-9, rtol=0), name
        mine = [row for row in table(tmp_path / "all") if row["seed"] == str(5 + s)]
        for one, other in zip(table(out), mine, strict=True):
            assert all(float(one[k]) == pytest.approx(float(other[k]), abs=1e-8) for k in one)


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    words = [
        *TINY,
        "--env",
        "smac",
        "--task",
        "3m",
        "--num-seeds",
        "2",
        "--steps",
        "2500",
        "--eval-episodes",
        "2",
        "--save-snapshots",
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished = command("algorithms/mappo.py", *words, "--out-dir", whole)
    assert finished.returncode == 0, finished.stderr
    begun = [sys.executable, "algorithms/mappo.py", *words, "--out-dir", str(broken)]
    process = subprocess.Popen(begun, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for _ in range(1200):
        if (broken / "metrics.csv").exists() and len(table(broken)) >= 6:
            break
        time.sleep(0.05)
    time.sleep(int.from_bytes(os.urandom(1), "big") / 512)  # anywhere within half a second of training
    process.kill()
    process.communicate()
    assert 0 < torch.load(broken / "checkpoint.pt", weights_only=True)["step"] < 20
    resumed = command("algorithms/mappo.py", "--resume", "--out-dir", broken)
    assert resumed.returncode == 0, resumed.stderr
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()
    one, other = weights(whole), weights(broken)
    assert all(torch.equal(one[k], other[k]) for k in one)
    first, second = (json.loads((f / "summary.json").read_text()) for f in (whole, broken))
    for volatile in ("wall_seconds", "updates_per_second", "env_steps_per_second"):
        first.pop(volatile), second.pop(volatile)
    assert first == second and first["win_rate"] is not None
    for kind in ("snapshots", "behaviour"):
        names = sorted(path.name for path in (whole / kind).iterdir())
        assert names == sorted(path.name for path in (broken / kind).iterdir()) and len(names) >= 3
        for name in names:
            a, b = (np.load(f / kind / name, allow_pickle=False) for f in (whole, broken))
            assert all(np.array_equal(a[k], b[k]) for k in a)
    assert {"curve.png", "win_rate.png", "config.json"} <= {path.name for path in broken.iterdir()}
    assert not list(broken.rglob("*.part"))


@pytest.mark.parametrize("task, best", [("xor", 1), ("m-ne", 20), ("climbing", 7)])
def test_matrix_games_are_solved(tmp_path, task, best):
    """The best joint action, or in climbing, where it lies beside the worst ones, the second best."""
    words = ["--env", "matrix", "--task", task, "--num-seeds", "5", "--steps", "5000", "--eval-every", "5000"]
    words += [
        "--num-envs",
        "32",
        "--rollout",
        "4",
        "--hidden",
        "64",
        "--lr",
        "1e-3",
        "--out-dir",
        str(tmp_path / "run"),
    ]
    summary = mappo.main(mappo.parse(words))
    assert summary["return"]["per_seed"] == [best] * 5
    assert min(summary["sampled_return"]["per_seed"]) > 0.95 * best


def continuous(out):
    return mappo.Args(
        env="target", num_envs=64, rollout=10, num_seeds=2, steps=50_000, eval_every=10_000, hidden=32,
        save_snapshots=True, out_dir=str(out),
    )  # fmt: skip


def test_continuous_actions_find_their_target(tmp_path, target_env):
    summary = mappo.main(continuous(tmp_path / "run"))
    first = [float(row["return"]) for row in table(tmp_path / "run") if row["step"] == "0"]
    assert max(first) < -1.5  # what not moving costs
    assert min(summary["return"]["per_seed"]) > -0.1 and min(summary["sampled_return"]["per_seed"]) > -1
    assert summary["win_rate"] is None


def numpy_team(path):
    """A function (..., W) -> (..., A) made of the file's arrays only, and its info."""
    file = np.load(path, allow_pickle=False)
    assert all(file[name].dtype == np.float16 for name in file if name != "info")

    def run(x):
        for k in range(3):
            x = x @ file[f"weight{k}"].astype(np.float32) + file[f"bias{k}"].astype(np.float32)
            x = np.maximum(x, 0) if k < 2 else x
        return x

    return run, json.loads(str(file["info"])), file


def test_snapshots_play_as_the_actor_does(tmp_path):
    out = tmp_path / "run"
    args = mappo.parse([*TINY, "--num-seeds", "2", "--save-snapshots", "--out-dir", str(out)])
    mappo.main(args)
    games, team = new_team(args, 50, 0, 1)
    team.load_state_dict(weights(out))
    rows = table(out)
    agreed = []
    for t in range(8):
        x = mappo.look(games.obs, games.last)
        out_of_actor = team.actor(x, games.avail).detach()
        act_out(games, team, torch.randint(5, (2, 50, 2), generator=stream(t)), torch.zeros(2, 50, dtype=torch.bool))
        for s in range(2):
            run, info, _ = numpy_team(out / "snapshots" / f"2048-seed{s}.npz")
            logits = run(x[s].numpy())
            top = out_of_actor[s].topk(2).values
            clear = (top[..., 0] - top[..., 1] > 5e-3).numpy()
            agreed.append((logits.argmax(-1) == out_of_actor[s].argmax(-1).numpy())[clear])
            log_pi = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            assert np.abs(log_pi - out_of_actor[s].numpy()).max() < 5e-3
    assert len(np.concatenate(agreed)) > 100 and np.concatenate(agreed).all()
    row = next(row for row in rows if row["step"] == "2048" and row["seed"] == "1")
    assert info["inputs"] == ["obs", "last_action", "agent_id"] and info["steps"] == 2048 and info["seed"] == 1
    assert (info["env"], info["script"], info["activation"]) == ("bridge", "mappo", "relu")
    assert info["return"] == float(row["return"]) and info["win_rate"] is None and len(info["git_commit"]) >= 7
    _, expert, _ = numpy_team(out / "behaviour" / "expert.npz")
    assert expert["steps"] == 2048 and expert["seed"] == 0
    assert numpy_team(out / "behaviour" / "replay-0.npz")[1]["steps"] == 0


def test_scale_knows_the_mean_and_the_spread_of_all_it_has_seen(float64):
    scale, x = mappo.Scale(3, 2), 5 + torch.randn(2, 100, 3) * torch.tensor([0.1, 1.0, 10.0])
    assert torch.equal(scale(x), x)  # before it has seen anything
    for part in x.split([20, 50, 30], 1):
        scale.watch(part)
    assert torch.allclose(scale.mean, x.mean(1, keepdim=True))
    assert torch.allclose(scale(x).std(1), torch.ones(1), atol=1e-2)
    assert torch.allclose(scale.var, x.var(1, correction=0, keepdim=True))
    scale.on = False  # without --normalize
    assert torch.equal(scale(x), x)


@pytest.mark.parametrize("normalize", [False, True])
def test_continuous_snapshots_have_a_spread(tmp_path, target_env, normalize):
    args = continuous(tmp_path / "run")
    args.steps, args.num_seeds, args.normalize = 10_000, 1, normalize
    mappo.main(args)
    run, info, file = numpy_team(tmp_path / "run" / "behaviour" / "expert.npz")
    games, team = new_team(args, 50, 0)
    team.load_state_dict(weights(tmp_path / "run"))
    x = mappo.look(games.obs, games.last)
    assert np.abs(np.tanh(run(x.numpy())) - team.actor(x, games.avail).detach().numpy()).max() < 5e-3
    assert np.allclose(file["log_std"], team.actor.log_std.detach().numpy()[0, 0], atol=1e-2)
    assert info["inputs"] == ["obs", "agent_id"] and info["output"] == "tanh"


def test_which_policies_become_behaviours():
    wins = [0, 0.1, 0.2, 0.45, 0.7, 0.9]
    rows = [{"step": 10 * k, "sampled_return": -k, "sampled_win_rate": w} for k, w in enumerate(wins)]
    assert choose_behaviours(rows) == {
        "expert.npz": 50, "medium.npz": 30, "replay-0.npz": 0, "replay-1.npz": 10, "replay-2.npz": 20,
        "replay-3.npz": 30,
    }  # fmt: skip
    rows = [{"step": k, "sampled_return": 100.0 + k} for k in range(101)]  # half of the way, not of the return
    chosen = choose_behaviours(rows)
    assert chosen["medium.npz"] == 50 and chosen["expert.npz"] == 100
    replay = [chosen[f"replay-{k}.npz"] for k in range(10)]
    assert len(chosen) == 12 and replay[0] == 0 and replay[-1] == 50
    assert all(5 <= b - a <= 6 for a, b in zip(replay, replay[1:]))
    rows = [{"step": k, "sampled_return": float(k), "sampled_win_rate": 0.0} for k in range(3)]  # it never wins
    assert choose_behaviours(rows)["medium.npz"] == 1


def test_a_snapshot_plays_for_the_collector_as_the_actor_does(tmp_path):
    """Greedily, in battles, through the file and `read_behaviour`; its weights are rounded."""
    out = tmp_path / "run"
    words = [*TINY, "--env", "smac", "--task", "3m", "--eval-episodes", "2", "--recall", "2", "--normalize"]
    args = mappo.parse([*words, "--save-snapshots", "--out-dir", str(out)])
    mappo.main(args)
    games, team = new_team(args, 20, 0)
    team.load_state_dict(weights(out))
    play, about = read_behaviour(out / "behaviour" / "expert.npz", "smac")
    assert (about["task"], about["recall"], about["steps"]) == ("3m", 2, 2048)
    agreed = []
    for t in range(12):
        scores = team.actor(mappo.look(games.obs, games.last), games.avail)[0].detach()  # (B, N, A)
        action = play(t, games.obs[0], {"avail_actions": games.avail[0]}, None)
        clear = scores.topk(2).values.diff()[..., 0].abs() > 5e-3
        agreed.append((action == scores.argmax(-1))[clear])
        act_out(games, team, action[None], torch.zeros(1, 20, dtype=torch.bool))
    assert len(torch.cat(agreed)) > 100 and torch.cat(agreed).all()


MEDIUM = ROOT / "data" / "behaviour" / "3m" / "medium.npz"
UNFIT = {  # how a team's file is changed, and what is said of it
    "a list for its info": (lambda a, i: a.update(info=np.array("[1, 2]")), "is damaged"),
    "no info": (lambda a, i: a.pop("info"), "is damaged"),
    "brackets": (lambda a, i: a.update(info=np.array("[" * 5000)), "is damaged"),
    "no steps": (lambda a, i: i.pop("steps"), "is damaged"),
    "a task that is a list": (lambda a, i: i.update(task=["3m"]), "holds a team for smac"),
    "recall as a text": (lambda a, i: i.update(recall="1"), "is damaged"),
    "recall below 0": (lambda a, i: i.update(recall=-1), "is damaged"),
    "another recall": (lambda a, i: i.update(recall=2), "does not fit smac 3m"),
    "a bias that is missing": (lambda a, i: a.pop("bias1"), "is damaged"),
    "no weights": (lambda a, i: [a.pop(name) for name in list(a) if name != "info"], "is damaged"),
    "layers that do not meet": (lambda a, i: a.update(weight1=a["weight1"][:-1]), "is damaged"),
    "a wide bias": (lambda a, i: a.update(bias2=a["bias2"][None]), "is damaged"),
    "a bias of two dimensions": (lambda a, i: a.update(bias2=np.zeros((9, 9))), "is damaged"),
    "text for weights": (lambda a, i: a.update(weight0=np.full((3, 3), "x")), "is damaged"),
    "too few inputs": (lambda a, i: a.update(weight0=a["weight0"][1:]), "does not fit smac 3m"),
    "a spread": (lambda a, i: a.update(log_std=np.zeros(9)), "holds a team for smac 3m, not for smac"),
    "a spread of another size": (lambda a, i: a.update(log_std=np.zeros(8)), "is damaged"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_teams_file_that_is_unfit_is_refused_in_one_line(tmp_path, name):
    change, said = UNFIT[name]
    with np.load(MEDIUM) as file:
        arrays = dict(file)
    info = json.loads(str(arrays["info"]))
    np.savez(tmp_path / "whole.npz", **arrays)
    read_behaviour(tmp_path / "whole.npz")
    change(arrays, info)
    if str(arrays.get("info", "")).startswith("{"):
        arrays["info"] = np.array(json.dumps(info))
    np.savez(tmp_path / "team.npz", **arrays)
    with pytest.raises(ValueError, match=said) as error:
        read_behaviour(tmp_path / "team.npz")
    assert "\n" not in str(error.value) and "team.npz" in str(error.value)


def test_env_kwargs_reach_the_environment():
    args = mappo.parse(["--env", "bridge", "--env-kwargs", '{"time_limit": 7}'])
    assert mappo.Games(args, 2, "cpu").env.time_limit == 7


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "words, said",
    [
        (["--env", "chess"], "unknown environment: choose --env matrix, bridge, smac"),
        (["--steps", "-5"], "--steps must be above 0"),
        (["--resume", "--out-dir", "nowhere/at/all"], "no run to resume in nowhere/at/all"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, words, said):
    out = [] if "--out-dir" in words else ["--out-dir", tmp_path / "run"]
    complains(command("algorithms/mappo.py", *words, *out), said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--env", "matrix", "--task", "nim"], "matrix has no task 'nim'"),
        (["--env", "bridge", "--num-envs", "4", "--rollout", "40", "--eval-every", "200"], "it must be 320 or more"),
        (["--env", "matrix", "--num-envs", "1", "--rollout", "2"], "--minibatches 4 of 2 steps"),
        (["--env", "bridge", "--env-kwargs", "[3]"], "--env-kwargs must be a JSON object"),
        (["--env", "bridge", "--env-kwargs", '{"limits'], "--env-kwargs must be a JSON object"),
        (["--env", "bridge", "--env-kwargs", '{"limits": 3}'], "bridge does not take --env-kwargs"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        mappo.main(mappo.parse([*words, "--out-dir", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_and_changed_flags_are_refused(tmp_path):
    out, resume = str(tmp_path / "run"), ["--resume", "--out-dir", str(tmp_path / "run")]
    mappo.main(mappo.parse([*TINY, "--steps", "400", "--out-dir", out]))
    for words, said in (([*TINY, "--out-dir", out], "holds a run already"),
                        ([*resume, "--clip", "0.3"], "begun with --clip 0.2")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            mappo.main(mappo.parse(words))
    torch.save({"team": {}}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt is of another run"):
        mappo.main(mappo.parse(resume))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    words = [*TINY, "--lr", "1e30", "--max-grad-norm", "1e30", "--out-dir", str(tmp_path / "run")]
    with pytest.raises(FloatingPointError, match="not finite after .* smaller step sizes"):
        mappo.main(mappo.parse(words))
