"""The losses and updates of MADDPG + CQL against slow loops, the priorities, and the script from outside."""

import copy
import csv
import functools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, command, complains, load_script, refuses
from updates import UPDATES

import data
import envs
from data import layout, runs
from data.collect import record

maddpg = load_script("maddpg_cql_pjap")
polygames = load_script("polygames")

S, L, B, N, A, O, D, K = 2, 4, 3, 2, 3, 5, 4, 2  # K: joint actions of each kind in CQL


def arguments(**changes):
    return replace(maddpg.Args(num_seeds=S, window=L, batch_size=B, ood_actions=K, policy_hidden=6, critic_hidden=7,
                               compile=False, normalize=False), **changes)  # fmt: skip


def make_team(args=None, seeds=S):
    """A team whose target networks differ from the others."""
    team = maddpg.Team(make_data(), args or arguments(), [runs.stream(s, 0) for s in range(seeds)])
    torch.manual_seed(5)
    for network in (team.target_policy, team.target_critics):
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return team


def make_batch(rows=L):
    torch.manual_seed(1)
    acted = torch.ones(S, rows, B)
    acted[0, -1, 1] = acted[1, -1, 0] = 0  # windows that end with what was seen after an episode
    done = torch.zeros(S, rows, B)
    done[0, -2, 1] = done[1, 0, 2] = 1
    action = (2 * torch.rand(S, rows, B, N, A) - 1) * acted[..., None, None]
    who = torch.eye(N).expand(S, rows, B, N, N)
    x = torch.cat([who, torch.randn(S, rows, B, N, O)], -1)
    return maddpg.Data(x, torch.randn(S, rows, B, D), action, torch.randn(S, rows, B), done, acted)


def make_noise(args=None):
    return maddpg.draw_noise([runs.stream(s, 7) for s in range(S)], make_data(), args or arguments())


# ---------------------------------------------------------------- one network at a time, by nn.Linear and nn.GRU
def single_critic(critics, c, s):
    """Critic c of seed s as a function of one state (D,) and one joint action (N, A)."""
    i = c * S + s

    def q(state, action):
        x = torch.cat([state, action.flatten()])
        for layer in (critics.first, critics.second):
            x = torch.relu(x @ layer.weight[i] + layer.bias[i, 0])
        return (x @ critics.third.weight[i] + critics.third.bias[i, 0])[0]

    return q


def single_policy(policy, s):
    """Seed s's policy as a function of one agent's inputs along a window (L, I)."""
    H = policy.hidden
    gru = torch.nn.GRU(H, H).double()
    with torch.no_grad():
        gru.weight_ih_l0.copy_(policy.gru.input[s].T)
        gru.weight_hh_l0.copy_(policy.gru.state[s].T)
        gru.bias_ih_l0.copy_(policy.gru.input_bias[s, 0])
        gru.bias_hh_l0.copy_(policy.gru.state_bias[s, 0])

    def act(x):
        x = torch.relu(x @ policy.encoder.weight[s] + policy.encoder.bias[s, 0])
        return torch.tanh(gru(x)[0].relu() @ policy.head.weight[s] + policy.head.bias[s, 0])

    return act


def slow_actions(policy, batch):
    """The policy's actions along a batch's windows, one agent and window at a time: (S, L, B, N, A)."""
    actions = torch.empty_like(batch.actions)
    for s in range(S):
        act = single_policy(policy, s)
        for b in range(B):
            for i in range(N):
                actions[s, :, b, i] = act(batch.obs[s, :, b, i])
    return actions


def test_the_policy_is_torchs_gru(float64):
    team, batch = make_team(), make_batch()
    actions, h = team.policy(batch.obs)
    assert torch.allclose(actions, slow_actions(team.policy, batch), rtol=0, atol=1e-12)
    early, h_early = team.policy(batch.obs[:, :2])  # in two pieces, as the evaluation runs
    late, h_late = team.policy(batch.obs[:, 2:], h_early)
    assert torch.allclose(torch.cat([early, late], 1), actions, atol=1e-12) and torch.allclose(h, h_late, atol=1e-12)


@pytest.mark.parametrize("cache", [1, 500, 2**20])
def test_critics_in_pieces_are_plain_networks(float64, monkeypatch, cache):
    monkeypatch.setattr(maddpg, "CACHE", cache)  # whatever the size of the pieces
    critics = make_team().critics
    state, action = torch.randn(S, 3, B, D), torch.randn(S, 3, B, 4, N * A)
    q = critics(state, action)
    assert q.shape == (2, S, 3, B, 4)
    for c, s, t, b, k in torch.cartesian_prod(*map(torch.arange, q.shape)).tolist():
        plain = single_critic(critics, c, s)(state[s, t, b], action[s, t, b, k])
        assert q[c, s, t, b, k].item() == pytest.approx(plain.item(), abs=1e-12)
    assert not torch.allclose(q[0], q[1])  # two critics, not one twice


# ---------------------------------------------------------------- the losses
def slow_critic_losses(critics, batch, y, own, noise, args):
    """For each critic and seed: the mean squared error / 2 and CQL's term, by loops; y (S, L-1, B)."""
    uniform, normal = noise.uniform, noise.normal
    errors, gaps = torch.zeros(2, S), torch.zeros(2, S)
    for c in range(2):
        for s in range(S):
            q = single_critic(critics, c, s)
            for t in range(L - 1):
                for b in range(B):
                    state, taken = batch.state[s, t, b], q(batch.state[s, t, b], batch.actions[s, t, b])
                    errors[c, s] = errors[c, s] + 0.5 * (y[s, t, b] - taken) ** 2 / ((L - 1) * B)
                    for i in range(N):
                        terms = []
                        for k in range(args.ood_actions):
                            terms.append(q(state, uniform[s, t, b, k]) + A * math.log(2))
                            for step in (0, 1):  # the policies' actions now and one step later
                                e = args.ood_noise * normal[s, step, t, b, k]
                                action = (own[s, t + step, b] + e).clamp(-1, 1)
                                log_p = torch.distributions.Normal(0, args.ood_noise).log_prob(e[i]).sum()
                                terms.append(q(state, action) - log_p)
                        gap = torch.stack(terms).logsumexp(0) - taken
                        gaps[c, s] = gaps[c, s] + gap / ((L - 1) * B * N)
    return errors, gaps


def slow_target(team, batch, gamma):
    y, theirs = torch.zeros(S, L - 1, B), slow_actions(team.target_policy, batch)
    for s in range(S):
        first, second = (single_critic(team.target_critics, c, s) for c in range(2))
        for t in range(L - 1):
            for b in range(B):
                after = batch.state[s, t + 1, b], theirs[s, t + 1, b]
                y[s, t, b] = batch.reward[s, t, b]
                if not batch.done[s, t, b]:
                    y[s, t, b] += gamma * min(first(*after), second(*after))
    return y


def slow_policy_loss(critics, batch, own, action_reg):
    loss = torch.zeros(S)
    for s in range(S):
        first, second = (single_critic(critics, c, s) for c in range(2))
        for t in range(L):
            for b in range(B):
                for i in range(N):
                    if batch.acted[s, t, b]:
                        joint = batch.actions[s, t, b].clone()
                        joint[i] = own[s, t, b, i]
                        q = torch.minimum(first(batch.state[s, t, b], joint), second(batch.state[s, t, b], joint))
                        cost = -q + action_reg * (own[s, t, b, i] ** 2).mean()
                        loss[s] = loss[s] + cost / (N * batch.acted[s].sum())
    return loss


def test_td_target_is_a_slow_loop(float64):
    team, batch = make_team(), make_batch()
    with torch.no_grad():
        y = maddpg.td_target(team.target_critics, batch, team.target_policy(batch.obs)[0], 0.9)
        assert torch.allclose(y, slow_target(team, batch, 0.9), rtol=0, atol=1e-12)


def test_critic_loss_is_a_slow_loop_and_each_critic_has_its_own_values(float64):
    team, batch, noise, args = make_team(), make_batch(), make_noise(), arguments()
    own, y = team.policy(batch.obs)[0].detach(), torch.randn(S, L - 1, B)
    actions, log_p = maddpg.candidates(own, noise.uniform, noise.normal, args.ood_noise)
    loss, error, gap = maddpg.critic_loss(team.critics, batch, y, actions, log_p, args.cql)
    errors, gaps = slow_critic_losses(team.critics, batch, y, own, noise, args)
    assert torch.allclose(error, errors.mean(0), atol=1e-12) and torch.allclose(gap, gaps.mean(0), atol=1e-12)
    assert torch.allclose(loss, (errors + 5 * gaps).mean(0), atol=1e-12)
    # Critic 2's share of the gradient is that of its own error and its own out-of-distribution values, no one else's.
    parameters = [*team.critics.parameters()]
    whole = torch.autograd.grad(loss.sum(), parameters)
    for c, mine in ((0, slice(0, S)), (1, slice(S, None))):
        alone = torch.autograd.grad((0.5 * (errors + 5 * gaps)[c]).sum(), parameters, retain_graph=True)
        for one, other in zip(whole, alone):
            assert torch.allclose(one[mine], other[mine], rtol=0, atol=1e-11) and one[mine].abs().max() > 0


def test_policy_loss_is_a_slow_loop_of_best_responses_under_data(float64):
    team, batch = make_team(), make_batch()
    own = team.policy(batch.obs)[0]
    loss = maddpg.policy_loss(team.critics, batch, own, 0.1)
    assert torch.allclose(loss, slow_policy_loss(team.critics, batch, own, 0.1), rtol=0, atol=1e-12)
    # What agent 1's policy would do makes no difference to agent 0.
    (before,) = torch.autograd.grad(loss.sum(), own, retain_graph=True)
    moved = torch.cat([own[..., :1, :], torch.rand_like(own[..., 1:, :])], 3).detach().requires_grad_()
    (after,) = torch.autograd.grad(maddpg.policy_loss(team.critics, batch, moved, 0.1).sum(), moved)
    assert torch.allclose(before[..., 0, :], after[..., 0, :], atol=1e-14) and before.abs().max() > 0


def test_distance_counts_what_was_recorded(float64):
    batch, mine = make_batch(), torch.randn(S, L, B, N, A)
    found = maddpg.distance(mine, batch)
    for s in range(S):
        for b in range(B):
            steps = [t for t in range(L) if batch.acted[s, t, b]]
            wanted = sum((batch.actions[s, t, b] - mine[s, t, b]).abs().mean() for t in steps) / len(steps)
            assert found[s, b].item() == pytest.approx(wanted.item(), abs=1e-12)


def test_conservative_term_pushes_unseen_actions_down():
    """All recorded actions are near 0.5 and pay 1; Q at -0.5, far from them, is lower with the term than without."""
    found = {}
    for cql in (0.0, 5.0):
        args = arguments(critic_hidden=32, ood_actions=5)
        critics, g = make_team(args).critics, torch.Generator().manual_seed(0)
        adam = torch.optim.Adam(critics.parameters(), 3e-3)
        blank = make_batch()
        for _ in range(200):
            action = 0.5 + 0.1 * torch.randn(S, L, B, N, A, generator=g)
            batch = blank._replace(state=torch.randn(S, L, B, D, generator=g), actions=action)
            uniform = 2 * torch.rand(S, L - 1, B, 5, N, A, generator=g) - 1
            normal = torch.randn(S, 2, L - 1, B, 5, N, A, generator=g)
            own, y = torch.full_like(action, -0.5), torch.ones(S, L - 1, B)  # the policy has wandered off
            loss, *_ = maddpg.critic_loss(critics, batch, y, *maddpg.candidates(own, uniform, normal, 0.3), cql)
            adam.zero_grad()
            loss.sum().backward()
            adam.step()
        with torch.no_grad():
            joint = torch.tensor([0.5, -0.5])[:, None].expand(S, 1, 50, 2, N * A)
            found[cql] = critics(torch.randn(S, 1, 50, D, generator=g), joint).mean((2, 3))  # (2, S, 2)
    inside, outside = found[5.0].unbind(-1)
    assert (outside < inside - 3).all()  # of both critics
    assert (outside < found[0.0][..., 1] - 3).all()


# ---------------------------------------------------------------- an update
def make_data(windows=50):
    """A dataset of one episode with so many windows, as `arrange` would make it."""
    torch.manual_seed(3)
    R = windows + L - 1
    obs, state, actions = torch.randn(R, N, O), torch.randn(R, D), 2 * torch.rand(R, N, A) - 1
    obs = torch.cat([torch.eye(N).expand(R, N, N), obs], -1)
    return maddpg.Data(obs, state, actions, torch.randn(R), torch.zeros(R), torch.ones(R))


def make_windows(count, seeds=S):
    return maddpg.Windows(torch.arange(count), L, seeds)


def run_update(args, steepness=4.0, count=1):
    team, content = make_team(args, args.num_seeds), make_data()
    windows, rmsprops = make_windows(50, args.num_seeds), maddpg.optimizers(team, args)
    generators = [runs.stream(s, 1) for s in range(args.num_seeds)]
    before = copy.deepcopy(team)
    for _ in range(count):
        noise = maddpg.draw_noise(generators, content, args)
        logs = maddpg.update(team, rmsprops, content, windows, noise, torch.tensor(steepness), args)
    return before, team, windows, content, logs


def test_an_update_is_a_slow_loop(float64):
    """Every number that an update changes, from the losses as loops, RMSProp by hand, and the priorities by hand."""
    args = arguments()
    before, team, windows, content, logs = run_update(args)
    noise = maddpg.draw_noise([runs.stream(s, 1) for s in range(S)], content, args)
    index = make_windows(50).draw(noise.windows)
    batch = make_windows(50).gather(index, content)
    for s in range(S):
        for b in range(B):  # a window is successive rows
            rows = slice(index[s, b], index[s, b] + L)
            assert all(torch.equal(part[s, :, b], table[rows]) for part, table in zip(batch, content, strict=True))

    with torch.no_grad():
        y, theirs = slow_target(before, batch, args.gamma), slow_actions(before.target_policy, batch)
    own = before.policy(batch.obs)[0]
    errors, gaps = slow_critic_losses(before.critics, batch, y, own.detach(), noise, args)
    of_policy = slow_policy_loss(before.critics, batch, own, args.action_reg)
    wanted = {"q_loss": errors.mean(0), "cql": gaps.mean(0), "policy_loss": of_policy}
    assert all(torch.allclose(logs[name], value, atol=1e-11) for name, value in wanted.items())
    for name, loss, lr in (("critics", (errors + 5 * gaps).mean(0), 1e-3), ("policy", of_policy, 3e-4)):
        old, new, target, slow = (
            [*getattr(t, n).parameters()]
            for t, n in ((before, name), (team, name), (team, f"target_{name}"), (before, f"target_{name}"))
        )
        for p, q, t, u, g in zip(old, new, target, slow, torch.autograd.grad(loss.sum(), old)):
            moved = p - lr * g / ((0.1 * g**2).sqrt() + 1e-5)  # decay 0.9, from a mean square of 0
            assert torch.allclose(q, moved, rtol=0, atol=1e-9)
            assert torch.allclose(t, 0.995 * u + 0.005 * moved, rtol=0, atol=1e-9)

    d = (batch.actions - theirs).abs().mean((1, 3, 4))  # the target policy's, from before the update
    assert torch.allclose(logs["distance"], d.mean(1), atol=1e-12)
    rho = torch.ones(S, 50)
    for s in range(S):
        for b in range(B):
            rho[s, index[s, b]] = max(math.exp(-((4 * d[s, b].item()) ** 2)), 0.001) ** 0.99
    assert torch.allclose(windows.rho, rho, rtol=0, atol=1e-12)


def test_which_priorities_are_refreshed(float64):
    _, _, windows, _, _ = run_update(arguments(pjap=False), count=3)
    assert (windows.rho == 1).all()  # the baseline draws uniformly for ever
    few = (run_update(arguments())[2].rho != 1).sum(1)
    assert (few <= B).all() and (few > 0).all()
    before, _, windows, content, _ = run_update(arguments(refresh=400))
    assert (windows.rho != 1).all()
    assert run_update(arguments(refresh=400), steepness=0.0)[2].rho.eq(1).all()


def test_ramp_of_the_steepness(tmp_path, monkeypatch):
    seen = []

    def update(team, rmsprops, content, windows, noise, steepness, args):
        seen.append(steepness.item())
        return dict.fromkeys(("q_loss", "cql", "policy_loss", "distance"), torch.zeros(1))

    monkeypatch.setattr(maddpg, "update", update)
    monkeypatch.setattr(maddpg, "evaluate", lambda *_: {"return": torch.zeros(1, 4)})
    words = ["--env", "reacher", "--dataset", str(reach(tmp_path)), "--num-seeds", "1", "--steps", "10"]
    maddpg.main(maddpg.parse([*words, "--ramp", "0.5", "--out-dir", str(tmp_path / "a")]))
    recorded = data.read(reach(tmp_path))
    times = 0.7 / recorded.actions[recorded.mask].double().std(0).mean().item()  # not as HalfCheetah's actions, 0.7
    assert abs(times - 1) > 0.1 and seen == pytest.approx([times * k for k in (0, 0.8, 1.6, 2.4, 3.2, 4, 4, 4, 4, 4)])
    seen.clear()
    maddpg.main(maddpg.parse([*words, "--ramp", "0", "--steepness", "3", "--out-dir", str(tmp_path / "b")]))
    assert seen == pytest.approx([3 * times] * 10)


def test_another_distance_is_followed_everywhere(float64, monkeypatch):
    """By the priorities of the windows drawn and of those refreshed, and by what is logged and measured."""

    def apart(mine, batch):  # the largest difference between an agent's summed actions: no mean of anything
        return (batch.actions - mine).sum(4).abs().amax((1, 3))

    monkeypatch.setattr(maddpg, "distance", apart)
    args = arguments(refresh=4, num_seeds=S)
    before, team, windows, content, logs = run_update(args)
    noise = maddpg.draw_noise([runs.stream(s, 1) for s in range(S)], content, args)
    index, more = make_windows(50).draw(noise.windows), (50 * noise.refresh).long()
    rho = torch.ones(S, 50)
    for which, policy in ((index, before.target_policy), (more, team.target_policy)):
        batch = make_windows(50).gather(which, content)
        found = apart(policy(batch.obs)[0], batch)
        rho.scatter_(1, which, maddpg.priority(0.2 * found, 4.0, 0.001, 0.99))
        if which is index:
            assert torch.allclose(logs["distance"], found.mean(1), rtol=0, atol=1e-12)
    _, _, windows, _, _ = run_update(args, steepness=0.8)  # less steep, or all are at the floor
    assert torch.allclose(windows.rho, rho, rtol=0, atol=1e-12)
    assert rho.min() > 0.001 and ((rho < 1).sum(1) > B).all()  # those refreshed are among them
    everything = windows.gather(torch.arange(50).expand(S, -1), content)
    wanted = apart(team.policy(everything.obs)[0], everything).mean(1)
    assert torch.allclose(maddpg.measure(team.policy, windows, content), wanted, rtol=0, atol=1e-12)


def test_rmsprop_is_torchs_to_the_bit():
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=g) for shape in ((2, 3, 4), (2, 1, 4), (5,))]
    mine, its = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    rmsprop, torchs = maddpg.RMSProp(mine, 3e-4), torch.optim.RMSprop(its, 3e-4, alpha=0.9, eps=1e-5, foreach=True)
    for _ in range(20):
        gradients = [torch.randn(p.shape, generator=g) * 10 ** torch.randn((), generator=g) for p in start]
        rmsprop.step(gradients)
        for p, gradient in zip(its, gradients):
            p.grad = gradient
        torchs.step()
    assert all(torch.equal(p, q) and not torch.equal(p, r) for p, q, r in zip(mine, its, start))


# ---------------------------------------------------------------- priorities
def test_priority_is_equation_6(float64):
    d = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5, 0.66, 5.0])
    rho = maddpg.priority(d, 4.0, 0.001, 0.99)
    wanted = [max(math.exp(-((4 * x) ** 2)), 0.001) ** 0.99 for x in d.tolist()]
    assert rho.tolist() == pytest.approx(wanted, rel=1e-12)
    assert rho[:4].tolist() == pytest.approx([1, 0.85, 0.53, 0.24], abs=0.01)  # the facts sheet's figures
    assert maddpg.priority(d, 0.0, 0.001, 0.99).tolist() == [1] * 7  # when the ramp begins


def filled(rho):
    """The priorities rho (S, W), written in pieces and out of order, with some windows twice."""
    windows, count = make_windows(rho.shape[1], len(rho)), rho.shape[1]
    g = torch.Generator().manual_seed(0)
    for part in torch.randperm(count, generator=g).split(77):
        index = torch.cat([part, part[:5]]).expand(len(rho), -1)
        windows.write(index, torch.rand(index.shape, generator=g))  # overwritten below
        windows.write(index, rho.gather(1, index))
    return windows


def draws(windows, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return windows.draw(torch.rand(len(windows.rho), count, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("count", [1, 100, 128, 300, 1000])
def test_draws_follow_the_priorities(count):
    """Chi-square, each seed's own priorities, 200,000 draws."""
    g = torch.Generator().manual_seed(count)
    rho = maddpg.priority(torch.rand(S, count, generator=g), 4.0, 0.001, 0.99)
    windows = filled(rho)
    for s, drawn in enumerate(draws(windows, 200_000)):
        expected = 200_000 * rho[s].double() / rho[s].double().sum()
        found = torch.bincount(drawn, minlength=count).double()
        assert len(found) == count
        order = expected.argsort()  # join the rarest, so that every class expects some 10
        label = torch.empty_like(order)
        label[order] = (expected[order].cumsum(0) / 10).long().clamp(max=count)
        classes = label.unique(return_inverse=True)[1]
        sums = [
            torch.zeros(classes.max() + 1, dtype=torch.float64).index_add_(0, classes, x) for x in (found, expected)
        ]
        chi2, freedom = ((sums[0] - sums[1]) ** 2 / sums[1]).sum().item(), len(sums[0]) - 1
        assert chi2 <= freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_low_priorities_are_reached_at_the_rate_of_the_floor():
    """200 windows at the floor among 200 at 1: each of them once in 200 (1 + 1 / floor^0.99) draws."""
    far = torch.zeros(1, 400)
    far[:, ::2] = 10.0
    rho = maddpg.priority(far, 4.0, 0.001, 0.99)
    low = draws(filled(rho), 500_000)[0]
    low = low[low % 2 == 0]
    expected = 500_000 * 0.001**0.99 / (1 + 0.001**0.99)
    assert len(low) == pytest.approx(expected, abs=5 * expected**0.5)
    assert len(low.unique()) == pytest.approx(200 * (1 - math.exp(-expected / 200)), abs=15)  # and all have their turn


def test_a_draw_inverts_the_cumulative_distribution():
    """A quarter of a million priorities from 1e-3 to 1: the window is the one that a single cumulative sum names."""
    g = torch.Generator().manual_seed(1)
    rho = 10 ** (-3 * torch.rand(1, 250_003, generator=g))
    windows = make_windows(250_003, 1)
    windows.write(torch.arange(250_003)[None], rho)
    uniform = torch.rand(1, 20_000, generator=g, dtype=torch.float64)
    end = rho.double().cumsum(1)
    plain = torch.searchsorted(end, uniform * end[:, -1:], right=True)
    near = (
        (end.gather(1, plain) - uniform * end[:, -1:])
        .abs()
        .minimum((uniform * end[:, -1:] - (end - rho.double()).gather(1, plain)).abs())
    )
    assert ((windows.draw(uniform) == plain) | (near < 1e-9)).all()
    edges = windows.draw(torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64))
    assert edges.tolist() == [[0, 250_002]]


def test_effective_share():
    windows = make_windows(300)
    assert windows.effective().tolist() == [1, 1]
    windows.write(torch.arange(300).expand(S, -1), torch.eye(300)[:S].clamp(min=1e-12))
    assert windows.effective().tolist() == pytest.approx([1 / 300] * S, rel=1e-6)


def figure_5(sigma, pjap, seeds=4, seed=0):
    """Twin peaks, data around the peak: 100 updates by this script's policy loss, priorities and draws; mean reward.

    The known reward is the critic, a number the policy; all priorities are refreshed at every step.
    """
    args = polygames.Args()
    reward, top = polygames.games(args)["twin peaks"], polygames.peak(args)

    def critics(state, joint):  # (S, 1, B, 0), (S, 1, B, N, 2) -> (2, S, 1, B, N)
        return reward(joint[..., 0], joint[..., 1]).expand(2, *joint.shape[:-1])

    unit = torch.stack([torch.randn(1000, 2, generator=runs.stream(s, 0)) for s in range(seed, seed + seeds)])
    points = top + sigma * unit  # (S, 1000, 2)
    theta = torch.tensor([-0.5, 0.5]).repeat(seeds, 1).requires_grad_()
    windows, generators = make_windows(1000, seeds), [runs.stream(s, 1) for s in range(seed, seed + seeds)]
    everything = torch.arange(1000).expand(seeds, -1)

    def recorded(actions):  # (S, B, 2)
        ones, empty = torch.ones(seeds, 1, actions.shape[1]), torch.empty(seeds, 1, actions.shape[1], 0)
        return maddpg.Data(None, empty, actions[:, None, ..., None], None, None, ones)

    def alike(count):
        return theta[:, None, None, :, None].expand(-1, -1, count, -1, -1)  # (S, 1, count, 2, 1)

    for _ in range(100):
        if pjap:
            d = maddpg.distance(alike(1000).detach(), recorded(points))
            windows.write(everything, maddpg.priority(d, 24**0.5, 1e-3, 1.0))  # alpha = 6 on the sum of two entries
        index = windows.draw(torch.stack([torch.rand(32, generator=g, dtype=torch.float64) for g in generators]))
        batch = recorded(points.gather(1, index[..., None].expand(-1, -1, 2)))
        loss = 2 * maddpg.policy_loss(critics, batch, alike(32), 0.0)  # a mean over agents; Eq. 4 has one for each
        (gradient,) = torch.autograd.grad(loss.sum(), theta)
        theta.data -= 0.02 * gradient
    return reward(*theta.detach().T).mean().item()


@pytest.mark.parametrize("sigma, maddpg_reward, pjap_reward", [(0.5, 0.43, 0.55), (1.0, 0.15, 0.54)])
def test_the_sampler_repairs_twin_peaks_as_in_figure_5(float64, sigma, maddpg_reward, pjap_reward):
    assert figure_5(sigma, pjap=False) == pytest.approx(maddpg_reward, abs=0.03)
    assert figure_5(sigma, pjap=True) == pytest.approx(pjap_reward, abs=0.03)


# ---------------------------------------------------------------- windows
def episodes_of(lengths, terminated):
    """Episodes whose every number is 100 e + t, in episode e at step t."""
    E, T = len(lengths), max(lengths)
    stamp = 100.0 * torch.arange(E)[:, None] + torch.arange(T + 1)  # (E, T+1)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    ends = mask & (torch.arange(T) == torch.tensor(lengths)[:, None] - 1) & torch.tensor(terminated)[:, None]
    seen = torch.cat([torch.ones(E, 1, dtype=torch.bool), mask], 1)
    obs, state = (stamp * seen)[..., None, None].expand(-1, -1, N, O), (stamp * seen)[..., None].expand(-1, -1, D)
    actions = (stamp[:, :-1] * mask / 1000)[..., None, None].expand(-1, -1, N, A)
    return data.Dataset(obs, state, None, actions, stamp[:, :-1] * mask, ends, mask)


def test_windows_never_straddle_episodes():
    lengths, terminated = [7, 2, 3, 4, 9], [True, True, False, True, False]
    content, starts, encode = maddpg.arrange(episodes_of(lengths, terminated), arguments())
    steps, found = content.obs[:, 0, N].long(), set()
    for start in starts.tolist():
        rows = torch.arange(start, start + L)
        e, t = divmod(int(steps[start]), 100)
        assert steps[rows].tolist() == [100 * e + t + k for k in range(L)] and t + L - 1 <= lengths[e]
        acted = content.acted[rows]
        assert acted[:-1].all() and acted[-1] == (t + L - 1 < lengths[e])
        real = acted.bool()
        assert content.reward[rows][real].tolist() == steps[rows][real].tolist()
        assert (content.actions[rows][real] * 1000).round()[:, 0, 0].tolist() == steps[rows][real].tolist()
        assert content.done[rows].tolist() == [terminated[e] and t + k == lengths[e] - 1 for k in range(L)]
        found.add((e, t))
    assert found == {
        (e, t) for e, n in enumerate(lengths) for t in range(n - L + 2)
    }  # all that fit, episode 1 has none
    assert content.obs[1].tolist() == [[1, 0] + [1] * O, [0, 1] + [1] * O]  # the agent's number first
    assert encode(torch.ones(3, 1, N, O)).tolist() == [[content.obs[1].tolist()]] * 3  # as in play


def test_no_episode_is_long_enough_for_a_window():
    with pytest.raises(ValueError, match="has the 20 rows of a window, the longest has 10: choose a smaller --window"):
        maddpg.arrange(episodes_of([7, 9], [True, False]), arguments(window=20))


def test_normalized_inputs():
    dataset = episodes_of([7, 9], [True, False])
    dataset.obs = dataset.obs * torch.tensor([1.0, 7.0])[:, None] + 3  # the agents' views differ
    dataset.state = dataset.state + torch.tensor([0, 1, 2, 0.0])
    dataset.state[..., 3] = 5.0  # an entry that never changes
    content, _, encode = maddpg.arrange(dataset, arguments(normalize=True))
    x = content.obs[..., N:]
    assert torch.allclose(x.mean(0), torch.zeros(N, O), atol=1e-5) and torch.allclose(x.std(0), torch.ones(N, O))
    assert torch.equal(encode(layout.rows(dataset)["obs"]), content.obs)  # a team plays with what it learned from
    assert torch.allclose(content.state.std(0), torch.tensor([1.0, 1, 1, 0]), atol=1e-5)
    assert content.state.isfinite().all()


# ---------------------------------------------------------------- all seeds at once, compile, kill and resume
def reach(folder, task="all-observant"):
    """The path of a few episodes of Reacher that a random team played."""
    path = folder / f"{task}.h5"
    if not path.exists():
        game, g = envs.make("reacher", task, 8), torch.Generator().manual_seed(0)
        shape = (8, game.num_agents, game.num_actions)
        dataset = record(game, lambda t, obs, info: 2 * torch.rand(shape, generator=g, dtype=torch.float32) - 1, seed=0)
        dataset.info |= {"env": "reacher", "task": task, "references": {"random": -40.0, "expert": -10.0}}
        data.write(dataset, path)
    return path


def words(folder, **changes):
    flags = {"env": "reacher", "dataset": reach(folder), "steps": 6, "eval-every": 2, "eval-episodes": 1,
             "num-seeds": 2, "batch-size": 4, "ood-actions": 2, "window": 10, "refresh": 3}  # fmt: skip
    return [str(word) for flag, value in (flags | changes).items() for word in (f"--{flag}", value)]


def saved(folder, part="team"):
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content["parts"][part] if part in content["parts"] else content[part]


def table(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


def test_seeds_at_once_are_single_runs(tmp_path, float64, monkeypatch):
    # The games of an evaluation begin differently for each of all games, so that they depend on how many there are.
    monkeypatch.setattr(maddpg, "evaluate", lambda policy, encode, args, *_: {"return": torch.zeros(args.num_seeds, 1)})

    def train(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        maddpg.main(maddpg.parse([*words(tmp_path, **changes), "--out-dir", str(folder)]))
        return folder

    together = train(seed=3, **{"num-seeds": 3})
    for s in range(3):
        alone = train(seed=3 + s, **{"num-seeds": 1})
        for name, tensor in saved(alone).items():
            group = saved(together)[name]
            rows = [s, 3 + s] if "critics" in name else [s]  # critic 1 and critic 2
            assert torch.allclose(tensor, group[rows], rtol=0, atol=1e-9), name
        assert torch.allclose(saved(alone, "windows")["rho"][0], saved(together, "windows")["rho"][s], atol=1e-6)
        mine = [row for row in table(together) if row["seed"] == str(3 + s)]
        for one, other in zip(table(alone), mine, strict=True):
            assert {"q_loss", "cql", "policy_loss", "distance", "distance_l1", "data_distance"} < one.keys()
            numbers = [[float(row[key]) for key in one] for row in (one, other)]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-9, nan_ok=True)


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = words(tmp_path, steps=60, **{"eval-every": 10})
    finished = command("algorithms/maddpg_cql_pjap.py", *flags, "--out-dir", whole)
    assert finished.returncode == 0, finished.stderr
    assert "MADDPG+CQL+PJAP" in finished.stdout and "\ndataset " in finished.stdout
    process = subprocess.Popen(
        [sys.executable, "algorithms/maddpg_cql_pjap.py", *flags, "--out-dir", str(broken)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    for line in process.stdout:  # stop at once after an evaluation in the middle
        if line.startswith("step     20"):
            break
    process.kill()
    process.communicate()
    assert 20 <= saved(broken, "step") < 60
    resumed = command("algorithms/maddpg_cql_pjap.py", "--resume", "--out-dir", broken)
    assert resumed.returncode == 0, resumed.stderr
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()
    for part in ("team", "windows"):
        one, other = saved(whole, part), saved(broken, part)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    first, second = (json.loads((f / "summary.json").read_text()) for f in (whole, broken))
    for volatile in ("wall_seconds", "updates_per_second"):
        assert first.pop(volatile) > 0 and second.pop(volatile) > 0
    assert first == second and first["seeds"] == [0, 1] and first["steps"] == 60 and first["win_rate"] is None
    mean = (first["return"]["mean"] + 40) / 30  # in units of the dataset's references
    assert first["normalized_return"]["mean"] == pytest.approx(mean)
    assert all((broken / name).read_bytes().startswith(b"\x89PNG") for name in ("curve.png", "distance.png"))
    assert not list(broken.glob("*.part"))


def test_a_whole_update_is_one_graph_and_agrees_with_eager(float64):
    """The graph is run by PyTorch: to turn it into C++ as well takes minutes, and is PyTorch's part."""
    torch._dynamo.reset()
    torch._dynamo.config.trace_autograd_ops = True
    make, flags = UPDATES["maddpg reacher"]
    graphs, run = [], torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(run(graph, inputs))  # raises where it wants to be asked again
        return graphs[-1]

    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    eager, other = make(flags=flags), make(compiled=compiled, flags=flags)
    start = copy.deepcopy(eager.modules[0])
    for _ in range(5):
        eager.updates["update"]()
        other.updates["update"]()
    assert len(graphs) == 1
    for mine, its in zip(eager.modules, other.modules, strict=True):
        one, two = mine.state_dict(), its.state_dict()
        assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], rtol=0, atol=1e-9) for k in one)
    moved = zip(start.parameters(), eager.modules[0].parameters(), strict=True)
    assert all((p - q).abs().max() > 1e-7 for p, q in moved)
    assert (eager.modules[1].rho < 1).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_an_update_on_a_gpu_never_waits_for_the_host():
    make, flags = UPDATES["maddpg reacher"]
    learn = make("cuda", flags=flags).updates["update"]
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        learn()
    torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, said", [
    (("--env", "bridge", "--dataset", "mixed"), "or package.module:factory, not 'bridge'"),
    (("--env", "matrix"), "MADDPG is for continuous actions: choose --env halfcheetah, reacher, ant"),
    (("--env", "smac", "--task", "3m"), "or package.module:factory, not 'smac'"),
    (("--env", "chess"), "or package.module:factory, not 'chess'"),
    (("--task", "6x1"), "halfcheetah has no task '6x1'"),
    (("--dataset", "best"), "no dataset 'best': choose good, medium"),
    (("--dataset", "nowhere.h5"), "no dataset file nowhere.h5"),
    (("--device", "tpu"), "unknown device 'tpu'"),
    (("--window", "1"), "--window must be at least 2 rows"),
    (("--floor", "0"), "--floor must be above 0 and at most 1"),
    (("--exponent", "nan"), "--exponent must be above 0"),
    (("--ood-noise", "0"), "--ood-noise must be above 0"),
    (("--steepness", "-1"), "--steepness must be above 0"),
    (("--num-seeds", "0"), "--num-seeds must be above 0"),
    (("--ramp", "2"), "--ramp must be at least 0 and at most 1"),
    (("--resume", "--out-dir", "nowhere"), "no run to resume in nowhere"),
])  # fmt: skip
def test_bad_input_is_refused(tmp_path, flags, said):
    refuses(maddpg, flags, said, tmp_path / "run")


def test_a_dataset_of_other_sizes_ends_in_one_line(tmp_path):
    path = reach(tmp_path, "independent")
    with pytest.raises(ValueError, match="use --env reacher --task 'independent'"):
        maddpg.main(maddpg.parse(["--env", "reacher", "--dataset", str(path)]))
    anonymous = data.read(path)
    del anonymous.info["env"], anonymous.info["task"]  # as in files of other authors
    data.write(anonymous, path)
    flags = ("--env", "halfcheetah", "--dataset", path, "--out-dir", tmp_path / "run")
    sizes = ("(2, 5, 11, 1)", "(2, 13, 17, 3)", "reacher independent")  # and who has the first
    complains(command("algorithms/maddpg_cql_pjap.py", *flags), *sizes)
    assert not (tmp_path / "run").exists()


def test_step_sizes_that_diverge_end_in_one_line(tmp_path):
    with pytest.raises(FloatingPointError, match="is not finite after 2 steps: try smaller step sizes"):
        maddpg.main(maddpg.parse([*words(tmp_path, **{"critic-lr": 1e30}), "--out-dir", str(tmp_path / "run")]))
    assert saved(tmp_path / "run", "step") == 0  # the last good checkpoint stays


def test_unstable_physics_end_in_one_line(tmp_path):
    """MuJoCo gives up in the second evaluation."""
    program = f"""
import os, runpy, sys
os.chdir({str(tmp_path)!r})  # MuJoCo writes MUJOCO_LOG.TXT
sys.argv = ["maddpg", *{words(tmp_path)!r}, "--out-dir", "run"]
sys.path.insert(0, {str(ROOT)!r})
from envs import mamujoco
reset, count = mamujoco.MultiAgentMujoco.reset, []
def broken(self, **options):
    count.append(1)
    if len(count) == 2:
        self.qpos[0][0] = float("nan")
    return reset(self, **options) if len(count) != 2 else self._observe()
mamujoco.MultiAgentMujoco.reset = broken
runpy.run_path({str(ROOT / "algorithms" / "maddpg_cql_pjap.py")!r}, run_name="__main__")
"""
    said = ("in the evaluation after 2 updates", "MuJoCo became unstable in game 0")
    complains(command("-c", program), *said)
    assert saved(tmp_path / "run", "step") == 0 and not (tmp_path / "run" / "summary.json").exists()


def test_a_run_is_not_overwritten_or_changed(tmp_path):
    flags = [*words(tmp_path, steps=2), "--out-dir", str(tmp_path / "run")]
    maddpg.main(maddpg.parse(flags))
    with pytest.raises(ValueError, match="holds a run already: --resume goes on"):
        maddpg.main(maddpg.parse(flags))
    with pytest.raises(ValueError, match="begun with --floor 0.001"):
        maddpg.main(maddpg.parse(["--resume", "--out-dir", str(tmp_path / "run"), "--floor", "0.1"]))
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    del content["parts"]["windows"]
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt is of another run"):
        maddpg.main(maddpg.parse(["--resume", "--out-dir", str(tmp_path / "run")]))
    torch.save({"team": {}}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt is of another run"):
        maddpg.main(maddpg.parse(["--resume", "--out-dir", str(tmp_path / "run")]))


def test_the_other_bodies_train_too(tmp_path, monkeypatch):
    """Four agents, and views of several lengths."""
    monkeypatch.setattr(envs, "make", functools.partial(envs.make, time_limit=30))
    game, g = envs.make("ant", "partial", 3), torch.Generator().manual_seed(0)
    dataset = record(game, lambda t, obs, info: 0.4 * torch.rand(3, 4, 2, generator=g) - 0.2, seed=0)
    dataset.info |= {"env": "ant", "task": "partial"}
    data.write(dataset, tmp_path / "ant.h5")
    flags = words(tmp_path, env="ant", task="partial", dataset=tmp_path / "ant.h5", steps=2, **{"num-seeds": 1})
    summary = maddpg.main(maddpg.parse([*flags, "--no-pjap", "--no-normalize", "--out-dir", str(tmp_path / "run")]))
    assert math.isfinite(summary["return"]["mean"]) and summary["normalized_return"] is None
    assert summary["distance"]["mean"] > 0 and summary["pjap"] is False
