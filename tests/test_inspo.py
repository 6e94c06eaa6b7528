"""InSPO: each equation against a slow loop, the propositions on tables, the paper's claims through the command line."""

import copy
import csv
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

import h5py
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHARED, command, complains, load_script
from tabular import boltzmann, evaluate, local_q, one_state_operator, random_game, sweep
from test_layout import by_hand

import data
import envs
from data import runs
from data.record import record
from envs.smac import random as random_play

inspo = load_script("inspo")
LONG = partial(pytest.param, marks=pytest.mark.long)
S, B, A, D, O = 3, 7, 4, 5, 6


def table(rows):
    return [[float(x) for x in row] for row in rows]


def streams(seed=0, count=S):
    """A generator for each of S seeds."""
    return [torch.Generator().manual_seed(seed + s) for s in range(count)]


class Batch(NamedTuple):
    """What agent i needs of B recorded steps, for each seed; log_pi and next_log_pi are its own policy's."""

    state: torch.Tensor  # (S, B, D)
    avail: torch.Tensor  # (S, B, A) bool
    log_mu: torch.Tensor  # (S, B, A)
    next_state: torch.Tensor
    next_log_mu: torch.Tensor
    action: torch.Tensor  # (S, B)
    reward: torch.Tensor  # (S, B)
    done: torch.Tensor  # (S, B)
    valid: torch.Tensor  # (S, B)
    log_pi: torch.Tensor  # (S, B, A)
    next_log_pi: torch.Tensor


def critic_loss(critic, target, batch, alpha, beta, gamma, cql):
    """Eqs. 15 and 24 of a critic and its target."""
    next_q, logs = target(batch.next_state), (batch.next_log_pi, batch.next_log_mu)
    y = inspo.soft_target(next_q, *logs, batch.reward, batch.done, alpha, beta, gamma)
    return inspo.critic_loss(critic(batch.state), y, batch.action, batch.avail, batch.valid, cql)


def policy_loss(target, batch, alpha, beta, cap):
    """Eq. 20 of a target."""
    weight = inspo.policy_weight(target(batch.state), batch.log_mu, batch.action, batch.avail, alpha, beta, cap)
    return inspo.policy_loss(batch.log_pi, batch.log_mu, batch.action, weight, batch.valid)


def random_batch(seed=0):
    """A `Batch` of random numbers in which some actions are not available."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    avail, next_avail = (torch.rand(S, B, A, generator=g) > 0.3 for _ in range(2))
    avail[..., 1] = next_avail[..., 2] = True
    action = (torch.rand(S, B, A, generator=g) * avail).argmax(-1)
    log_mu, next_log_mu = (
        torch.log_softmax(normal(S, B, A).masked_fill(~a, inspo.ILLEGAL), -1).clamp(min=-20)
        for a in (avail, next_avail)
    )
    log_pi, next_log_pi = (
        torch.log_softmax(normal(S, B, A).masked_fill(~a, inspo.ILLEGAL), -1) for a in (avail, next_avail)
    )
    valid = (torch.rand(S, B, generator=g) > 0.3).double()
    valid[:, 0] = 1
    return Batch(
        state=normal(S, B, D), avail=avail, log_mu=log_mu, next_state=normal(S, B, D), next_log_mu=next_log_mu,
        action=action, reward=normal(S, B), done=(torch.rand(S, B, generator=g) > 0.7).double(), valid=valid,
        log_pi=log_pi.requires_grad_(), next_log_pi=next_log_pi.requires_grad_(),
    )  # fmt: skip


def networks(seed=0):
    """A critic and a target with S seeds."""
    generators = streams(seed)
    args = inspo.Args(hidden=8)
    return inspo.mlp(D, A, args, generators), inspo.mlp(D, A, args, generators)


# ---------------------------------------------------------------- the equations, one number at a time
def test_linear_layers_are_s_single_layers(float64):
    g = [torch.Generator().manual_seed(s) for s in range(S)]
    layer, x = inspo.Linear(D, A, g), torch.randn(S, B, D)
    assert layer.weight.abs().max() <= D**-0.5 and layer.weight.std() > 0.4 * D**-0.5
    for s in range(S):
        single = torch.nn.Linear(D, A)
        single.weight.data, single.bias.data = layer.weight[s].T, layer.bias[s, 0]
        assert torch.allclose(layer(x)[s], single(x[s]), atol=1e-14)


def test_critic_loss_is_equation_24(float64):
    batch, (critic, target) = random_batch(), networks()
    alpha, beta, gamma, cql = torch.tensor([[0.1], [0.5], [2.0]]), torch.tensor(0.3), 0.9, 0.7
    q, q_next = critic(batch.state), target(batch.next_state)
    found = critic_loss(critic, target, batch, alpha, beta, gamma, cql)
    for s in range(S):
        total, steps = 0.0, 0
        for b in range(B):
            if not batch.valid[s, b]:
                continue
            steps += 1
            pi = batch.next_log_pi[s, b].exp().tolist()
            value = 0.0
            for a in range(A):
                if pi[a] > 0:
                    log_ratio = math.log(pi[a]) - batch.next_log_mu[s, b, a].item()
                    value += pi[a] * (q_next[s, b, a].item() - alpha[s, 0].item() * log_ratio - 0.3 * math.log(pi[a]))
            y = batch.reward[s, b].item() + (0.0 if batch.done[s, b] else gamma * value)
            taken = q[s, b, batch.action[s, b]].item()
            all_q = sum(math.exp(q[s, b, a].item()) for a in range(A) if batch.avail[s, b, a])
            total += (taken - y) ** 2 + cql * (math.log(all_q) - taken)
        assert found[s].item() == pytest.approx(total / steps, rel=1e-12)
    found.sum().backward()
    assert all(p.grad is None for p in [*target.parameters(), batch.log_pi, batch.next_log_pi])  # y is a constant


def test_conservative_term_pushes_unseen_actions_down(float64):
    batch, (critic, target) = random_batch(), networks()
    batch = batch._replace(avail=torch.ones_like(batch.avail), action=torch.zeros_like(batch.action))
    batch = batch._replace(reward=torch.zeros(S, B), done=torch.ones(S, B))
    adam = inspo.Adam(critic.parameters(), 1e-2)
    for _ in range(300):
        inspo.descend(adam, critic_loss(critic, target, batch, torch.ones(S, 1), torch.tensor(0.0), 0.9, 0.5))
    q = critic(batch.state)
    assert (q[..., 0, None] > q[..., 1:] + 1).all()


def test_policy_loss_is_equation_20(float64):
    batch, (_, target) = random_batch(), networks()
    alpha, beta = torch.tensor([[0.1], [0.5], [2.0]]), torch.tensor(0.3)
    q = target(batch.state)
    found, kl = policy_loss(target, batch, alpha, beta, cap=1.5)
    capped = 0
    for s in range(S):
        T, total, divergence, steps = alpha[s, 0].item() + 0.3, 0.0, 0.0, 0
        for b in range(B):
            if not batch.valid[s, b]:
                continue
            steps += 1
            legal = [a for a in range(A) if batch.avail[s, b, a]]
            mu, taken = batch.log_mu[s, b].exp().tolist(), batch.action[s, b].item()
            z = sum(mu[a] ** (alpha[s, 0].item() / T) * math.exp(q[s, b, a].item() / T) for a in legal)
            weight = math.exp((q[s, b, taken].item() - 0.3 * math.log(mu[taken]) - T * math.log(z)) / T)
            capped += weight > 1.5
            assert weight <= 1 / mu[taken] * (1 + 1e-9)
            pi = batch.log_pi[s, b].exp().tolist()
            total -= min(weight, 1.5) * math.log(pi[taken])
            divergence += sum(pi[a] * math.log(pi[a] / mu[a]) for a in legal)
        assert found[s].item() == pytest.approx(total / steps, rel=1e-10)
        assert kl[s].item() == pytest.approx(divergence / steps, rel=1e-10)
    assert capped  # or the cap was not tested
    found.sum().backward()
    assert all(p.grad is None for p in target.parameters()) and not kl.requires_grad
    assert (batch.log_pi.grad[batch.valid == 0] == 0).all() and (batch.log_pi.grad[batch.valid == 1] < 0).any()


def one_state_batch(actions, mu):
    """A `Batch` of recorded actions (1, B) of one agent in one state, in which mu (A,) is its behaviour."""
    (_, n), number = actions.shape, len(mu)
    row, no = torch.zeros(1, n, 1), None
    avail = torch.ones(1, n, number, dtype=torch.bool)
    return Batch(row, avail, mu.log().expand(1, n, number), row, no, actions, no, no, torch.ones(1, n), no, no)


def best_clone(batch, q, alpha, beta):
    """The logits (A,) of one policy that the policy loss ends at, when Q is q (A,) everywhere."""
    logits = torch.zeros(len(q), requires_grad=True)
    adam = inspo.Adam([logits], 0.05)
    for _ in range(200):
        batch = batch._replace(log_pi=torch.log_softmax(logits, 0).expand_as(batch.log_mu))
        loss, _ = policy_loss(lambda x: q.expand_as(batch.log_mu), batch, alpha, beta, cap=1e9)
        inspo.descend(adam, loss)
    return logits


def test_the_best_clone_is_equation_12(float64):
    """Minimising the policy loss over recorded actions gives mu^(alpha/T) exp(Q/T) / Z."""
    g = torch.Generator().manual_seed(1)
    mu, q = torch.softmax(torch.randn(A, generator=g), 0), torch.randn(A, generator=g)
    actions = torch.multinomial(mu, 100_000, True, generator=g)[None]  # (1, B)
    batch = one_state_batch(actions, mu)
    logits = best_clone(batch, q, torch.tensor([[0.4]]), torch.tensor(0.2))
    assert torch.allclose(torch.softmax(logits, 0), boltzmann(q, mu, 0.4, 0.2), atol=0.01)


def test_importance_ratio_is_equation_23(float64):
    g = torch.Generator().manual_seed(0)
    log_pi, log_mu = (torch.log(torch.rand(S, B, 3, generator=g)) for _ in range(2))  # three teammates of four agents
    found = inspo.importance_ratio(log_pi.sum(-1), log_mu.sum(-1), 4, cap=1.5)
    for s, b in itertools.product(range(S), range(B)):
        product = math.prod(math.exp(log_pi[s, b, j].item()) / math.exp(log_mu[s, b, j].item()) for j in range(3))
        assert found[s, b].item() == pytest.approx(min(product ** (1 / 3), 1.5), rel=1e-12)
    assert (found == 1.5).any() and (found < 1.5).any()


def test_resampling_frequencies_follow_the_ratio():
    g = torch.Generator().manual_seed(0)
    ratio = torch.rand(2, 6, generator=g)
    ratio[0, 3] = 1e-10
    drawn = torch.cat([inspo.resample(ratio, torch.rand(2, 6, generator=g)) for _ in range(5000)], 1)  # (2, 30000)
    for s in range(2):
        expected = ratio[s] / ratio[s].sum() * 30_000
        counts = torch.bincount(drawn[s], minlength=6)
        chi2 = ((counts - expected) ** 2 / expected.clamp(min=1e-3)).sum().item()
        assert chi2 < 20.5  # the 99.9 % point for 5 degrees of freedom
    edge = inspo.resample(torch.ones(1, 4), torch.tensor([[0.0, 0.25, 0.5, 0.9999999]]))
    assert edge.max() <= 3 and edge.min() >= 0


@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-6, 7e5])
def test_what_has_ratio_0_is_never_drawn(scale):
    """Not at u = 0 either, nor where u meets a border, nor at the largest number that `torch.rand` makes."""
    ratio = scale * torch.tensor([[0, 0, 1, 0, 2, 0, 0, 1, 0], [0, 4, 0, 0, 0, 0, 0, 0, 0]])
    u = torch.tensor([0, 2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24]).expand(2, -1)
    drawn = inspo.resample(ratio, u)
    assert (ratio.gather(1, drawn) > 0).all()
    assert drawn[0, [0, 1, 3, 5]].tolist() == [2, 2, 4, 7] and (drawn[1] == 1).all()


@pytest.mark.parametrize("with_prior", [False, True])
def test_teammate_model_is_autoregressive(float64, with_prior):
    """Eq. 22: it normalises, sees a_i and earlier teammates, and does not see a later one's action; a prior adds."""
    N = 3
    net = inspo.mlp(D + N + N * A, A, inspo.Args(hidden=8), streams())
    prior = torch.log_softmax(torch.randn(S, 1, N, A), -1) if with_prior else None
    state, avail = torch.randn(S, 1, D), torch.ones(S, 1, N, A, dtype=torch.bool)
    avail[:, :, 2, 3] = False
    for i in range(N):
        total = 0.0
        for actions in itertools.product(range(A), repeat=N):
            if actions[i] == 1 and actions[2] != 3:
                joint = torch.tensor(actions).expand(S, 1, N)
                log_prob = inspo.teammate_log_prob(net, state, avail, joint, i, prior)
                total = total + log_prob.exp()
                slow = 0.0
                for j in [j for j in range(N) if j != i]:
                    known = torch.zeros(N, A)
                    for k in range(N):
                        if k == i or k < j:
                            known[k, actions[k]] = 1
                    x = torch.cat([state[:, 0], torch.eye(N)[j].expand(S, -1), known.flatten().expand(S, -1)], -1)
                    logits = net(x[:, None])[:, 0] + (prior[:, 0, j] if with_prior else 0)
                    logits = logits.masked_fill(~avail[:, 0, j], -torch.inf)
                    slow = slow + torch.log_softmax(logits, -1)[:, actions[j]]
                assert torch.allclose(log_prob[:, 0], slow, atol=1e-12)
        assert torch.allclose(total, torch.ones(S, 1))


def test_cloned_models_fit_the_counts():
    """Eq. 21 and 22 on correlated data: mu_i meets the marginals, mu(a_j | a_i) the conditionals, not their product."""
    recorded = data.collect_dataset("matrix", "xor", "aa-ab-ba")
    args = inspo.Args(**inspo.preset(inspo.Args(env="matrix", task="xor")) | {"num_seeds": S})
    flat, _ = inspo.arrange(recorded, args)
    team = inspo.Team(flat, args, streams())
    behaviour = inspo.clone(team, flat, streams(), args)
    assert same(behaviour, inspo.tabulate(team, flat, args))
    steps = flat.acted.bool()
    assert steps.sum() == len(recorded.returns)
    share = recorded.joint_actions()
    for i, table in enumerate((share, share.T)):  # rows: agent i
        marginal, conditional = table.sum(1), table / table.sum(1, keepdim=True)
        assert torch.allclose(behaviour.log_mu[i].exp()[:, 0], marginal.expand(S, 2), atol=0.05)
        taken, other = flat.actions[steps, i], flat.actions[steps, 1 - i]
        found = behaviour.log_mu_others[i][:, steps].exp()
        assert torch.allclose(found, conditional[taken, other].expand(S, -1), atol=0.07)
    cloned = team.mus.state_dict()
    assert all(torch.equal(weight, cloned[name]) for name, weight in team.policies.state_dict().items())


@pytest.mark.parametrize("recurrent", [False, True])
def test_clones_are_kept_where_held_back_episodes_are_likeliest(float64, recurrent):
    """From few games at random cloning soon learns what was chance; held-back games end it, for each seed by itself."""
    E, T, g = 24, 4, torch.Generator().manual_seed(0)
    obs, actions = torch.rand(E, T + 1, 2, 3, generator=g), torch.randint(3, (E, T, 2), generator=g)
    mask, avail = torch.ones(E, T, dtype=torch.bool), torch.ones(E, T + 1, 2, 3, dtype=torch.bool)
    recorded = data.Dataset(obs, obs.flatten(2), avail, actions, torch.zeros(E, T), torch.zeros_like(mask), mask)
    few = dict(recurrent=recurrent, one_hot=False, hidden=8, sequences=4, clone_batch=16, clone_lr=3e-3)

    def cloned(seeds, share):
        args = inspo.Args(num_seeds=len(seeds), clone_steps=2000, hold_back=share, **few)
        flat, _ = inspo.arrange(recorded.check(), args)
        team = inspo.Team(flat, args, [torch.Generator().manual_seed(s) for s in seeds])
        judge = data.layout.judge(args, flat.sequences, recorded.lengths)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        behaviour = inspo.clone(team, flat, generators, args, judge=judge)
        seen, games = flat.acted.bool(), torch.arange(E).repeat_interleave(T)
        log_mu = sum(behaviour.log_mu[i][:, seen].gather(-1, flat.actions[seen, i].expand(len(seeds), -1)[..., None])
                     for i in range(2))  # fmt: skip
        return team, log_mu[..., 0].mT[games % 4 == 0].mean(0)  # of the games that a share of 1/4 holds back

    both, likely = cloned((1, 5), 0.25)
    for s, seed in enumerate((1, 5)):
        alone, _ = cloned((seed,), 0.25)
        for (name, one), (_, two) in zip(alone.mus.state_dict().items(), both.mus.state_dict().items(), strict=True):
            assert torch.allclose(one[0], two[s], atol=1e-8), name
    assert ((-2.6 < likely) & (likely < -2.05)).all()  # guessing has -2 log 3 = -2.2; learned by heart they have more


def test_auto_alpha_moves_towards_the_target(tmp_path):
    """Eq. 25: alpha rises while the KL divergence is above its target, and falls below it."""
    for target, rises in ((0.05, True), (3.0, False)):
        out = tmp_path / f"{target}"
        flags = ["--env", "matrix", "--num-seeds", "2", "--steps", "300", "--eval-every", "300", "--auto-alpha"]
        flags += ["--kl-target", str(target), "--alpha-lr", "0.01", "--out-dir", str(out)]
        inspo.main(inspo.parse(flags))
        alphas = [float(row["alpha"]) for row in csv.DictReader((out / "metrics.csv").open()) if row["step"] == "300"]
        assert all((alpha > 0.02) == rises for alpha in alphas), alphas


def random_dataset(lengths, num_agents=3, seed=0, free=False, barred=None):
    """Random episodes of these lengths. Unless `free`, actions are barred by chance, and agents die on the way; the
    action `barred` is never available."""
    g = torch.Generator().manual_seed(seed)
    E, T, N, single = len(lengths), max(lengths), num_agents, torch.float32
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    seen = torch.cat([torch.ones(E, 1, dtype=torch.bool), mask], 1)
    avail = (torch.rand(E, T + 1, N, A, generator=g) > 0.3) | torch.tensor(free)
    avail[..., 1] = True
    dead = torch.arange(T + 1)[:, None] >= torch.randint(1, 2 * T, (E, 1, N), generator=g)  # (E, T+1, N)
    if not free:
        avail[dead] = torch.arange(A) == 0  # as in StarCraft: the dead do nothing
    if barred is not None:
        avail[..., barred] = False
    actions = (torch.rand(E, T, N, A, generator=g) * avail[:, :-1]).argmax(-1)
    last = mask & ~torch.cat([mask[:, 1:], ~seen[:, :1]], 1)
    obs, state = (torch.randn(E, T + 1, *size, generator=g, dtype=single) for size in ((N, O), (D,)))
    reward = torch.randn(E, T, generator=g, dtype=single)
    return data.Dataset(
        obs * seen[..., None, None], state * seen[..., None], avail & seen[..., None, None], actions * mask[..., None],
        reward * mask, last & (torch.rand(E, T, generator=g) > 0.5), mask,
    ).check()  # fmt: skip


def small_team(num_agents=4, lengths=(1,) * 20, free=True, dataset=None, **flags):
    """A team of S seeds, random data for it, and its behaviour: (team, data, behaviour, args)."""
    args = inspo.Args(hidden=8, batch_size=16, num_seeds=S, one_hot=False, **flags)
    flat, _ = inspo.arrange(dataset or random_dataset(lengths, num_agents, free=free), args)
    team = inspo.Team(flat, args, streams())
    return team, flat, inspo.tabulate(team, flat, args), args


def recurrent_team(num_agents=3, lengths=(2, 5, 3, 4, 1, 5), **flags):
    """The same with policies that remember, on episodes in which actions are barred and agents die; each policy has
    left its behaviour."""
    team, *rest = small_team(num_agents, lengths, False, recurrent=True, sequences=4, **flags)
    g = torch.Generator().manual_seed(7)
    for parameter in team.policies.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=g)
    return team, *rest


class Descent:
    """Plain gradient descent in the form that a turn takes."""

    def __init__(self, parameters, rate):
        self.moved, self.rate = list(parameters), rate

    def step(self, gradients):
        with torch.no_grad():
            for parameter, gradient in zip(self.moved, gradients, strict=True):
                parameter -= self.rate * gradient


def optimizers(team, kind=inspo.Adam, rate=1e-2):
    return {
        "critics": [kind(critic.parameters(), rate) for critic in team.critics],
        "policies": [kind(policy.parameters(), rate) for policy in team.policies],
        "alpha": kind([team.log_alpha], rate),
    }


def same(one, other):
    """Whether two nests of dictionaries, lists and tensors are equal to the bit."""
    if torch.is_tensor(one):
        return torch.equal(one, other)
    keys = one.keys() if isinstance(one, dict) else range(len(one))
    return len(one) == len(other) and all(same(one[key], other[key]) for key in keys)


UNEVEN = (2, 6, 3, 4, 1, 5, 6)


def minibatch(team, flat, args, seed=0):
    """A view, which is sequences (S, L, B') and every agent's log_pi along them, and noise (S, B): for a turn."""
    g, agents = streams(seed), range(len(team.policies))
    rows = inspo.draw(inspo.uniform(g, args.sequences if args.recurrent else args.batch_size), flat)
    with torch.no_grad():
        log_pi = dict(zip(agents, inspo.unroll(team.policies, agents, rows[:, :-1], flat)))
    return (rows, log_pi), inspo.uniform(g, args.batch_size)


def take_turn(i, made, view, noise, beta=0.1, improve=True, adams=None):
    """Agent i's turn in this view, with the teammates as the view shows them: its logs."""
    team, flat, behaviour, args = made
    team.beta.fill_(beta)
    adams = adams or optimizers(team)
    return inspo.turn(i, team, team.policies, adams, flat, behaviour, view, None, noise, improve, args)


# ---------------------------------------------------------------- the optimiser
@pytest.mark.parametrize("double", [False, True])
def test_adam_is_torchs_adam(double):
    """Over 50 steps on parameters of several shapes, with a step size that changes: to the bit where both are fused,
    and up to rounding as its plain form goes about it."""
    g = torch.Generator().manual_seed(0)
    kind = {"generator": g, "dtype": torch.float64 if double else torch.float32}
    start = [torch.randn(shape, **kind) for shape in ((3, 4, 5), (3, 1, 5), (), (7,))]
    mine, fused, plain = ([x.clone().requires_grad_() for x in start] for _ in range(3))
    adam, others = inspo.Adam(mine, 0.01), [torch.optim.Adam(fused, fused=True), torch.optim.Adam(plain)]
    for step in range(50):
        gradients = [torch.randn(x.shape, **kind) * 10 ** (step % 5 - 2) for x in start]
        lr = 0.01 * 0.9**step if step % 7 else 0.03
        adam.lr.fill_(lr)
        adam.step(tuple(gradients))
        for other in others:
            other.param_groups[0]["lr"] = lr
            for parameter, gradient in zip(other.param_groups[0]["params"], gradients):
                parameter.grad = gradient
            other.step()
        assert same(mine, fused), step
        for one, other in zip(mine, plain):
            assert torch.allclose(one, other, rtol=0, atol=1e-13 if double else 1e-5)
    assert not any(torch.equal(x, y) for x, y in zip(start, mine))
    assert all(x.requires_grad and x.grad is None for x in mine)  # it takes gradients, and leaves none behind


@pytest.mark.parametrize(
    "name", ["alberdice", "bc", "cfcql", "inspo", "iql", "mappo", "moma_ppo", "omar", "omiga", "td3_bc"]
)
def test_adam_takes_a_gradient_of_any_layout(name):
    """Torch's fused Adam on a CPU reads a transposed gradient in memory's order, and so moves the wrong weights."""
    script, gradient = load_script(name), torch.randn(3, 2)
    one, other = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    script.Adam([one], 0.1).step([gradient.mT])
    script.Adam([other], 0.1).step([gradient.mT.contiguous()])
    assert torch.equal(one, other)


def test_adam_goes_on_from_its_state():
    g = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(4, 3, generator=g), torch.randn(20, 4, 3, generator=g)
    (whole,), (broken,) = [start.clone().requires_grad_()], [start.clone().requires_grad_()]
    one, other = inspo.Adam([whole], 0.1), inspo.Adam([broken], 0.1)
    for gradient in gradients:
        one.step([gradient])
    for gradient in gradients[:8]:
        other.step([gradient])
    state, fresh = copy.deepcopy(other.state_dict()), inspo.Adam([broken], 0.7)
    fresh.load_state_dict(state)  # its step size is part of it
    for gradient in gradients[8:]:
        fresh.step([gradient])
    assert torch.equal(whole, broken) and fresh.lr == 0.1
    assert not list(filter(lambda p: p.requires_grad, fresh.parameters()))  # what it knows is nothing to learn


def test_optimizers_have_the_step_sizes_of_the_flags():
    team, *_ = small_team()
    made = inspo.optimizers(team, inspo.Args(policy_lr=0.1, critic_lr=0.2, alpha_lr=0.3))
    for name, modules, lr in (("policies", team.policies, 0.1), ("critics", team.critics, 0.2)):
        assert [adam.lr.item() for adam in made[name]] == [pytest.approx(lr)] * 4
        for adam, module in zip(made[name], modules, strict=True):
            assert all(one is other for one, other in zip(adam.moved, module.parameters(), strict=True))
    assert made["alpha"].lr.item() == pytest.approx(0.3) and made["alpha"].moved == [team.log_alpha]


# ---------------------------------------------------------------- noise and schedules
@pytest.mark.parametrize("flags", [{}, {"inner": 3}, {"recurrent": True, "inner": 2}])
def test_noise_has_the_shapes_that_it_says(flags):
    args = inspo.Args(batch_size=16, sequences=5, **flags)
    noise, turns = inspo.draw_noise(streams(), 4, args), 4 * args.inner
    sizes = [5] if args.recurrent else [16] * turns  # with memory, one minibatch serves the sweep
    assert [x.shape for x in noise.rows] == [(S, size) for size in sizes]
    assert [x.shape for x in noise.steps] == [(S, 16)] * turns
    every = torch.cat([*noise.rows, *noise.steps], 1)
    assert (every >= 0).all() and (every < 1).all() and len(every.unique()) > 0.99 * every.numel()
    alone = inspo.draw_noise(streams(1, 1), 4, args)  # seed 1 on its own
    for one, other in zip([*noise.rows, *noise.steps], [*alone.rows, *alone.steps], strict=True):
        assert torch.equal(one[1:2], other)


def test_sequences_are_drawn_evenly():
    flat = inspo.Data(*[None] * 8, sequences=torch.arange(20).view(10, 2))
    u = (torch.arange(1000) + 0.5) / 1000
    found = inspo.draw(u.expand(S, -1), flat)
    assert found.shape == (S, 2, 1000) and torch.equal(found[:, 1], found[:, 0] + 1)
    assert torch.bincount(found[0, 0], minlength=20).tolist() == [100, 0] * 10
    edges = inspo.draw(torch.tensor([[0.0, 1 - 2.0**-24]]), flat)
    assert edges[0].T.tolist() == [[0, 1], [18, 19]]


def test_beta_falls_to_its_end(float64):
    def betas(updates, **flags):
        team, *_, args = small_team(**flags)
        adams, found = inspo.optimizers(team, args), []
        for step in updates:
            inspo.schedule(team, adams, step, args)
            found.append(team.beta.item())
        return found

    found = betas(range(101), steps=101, beta=0.5, beta_end=0.02, beta_hold=40)
    assert found[:41] == [0.5] * 41 and found[100] == pytest.approx(0.02, rel=1e-12)  # in the last update
    ratios = [after / before for before, after in zip(found[40:], found[41:])]
    assert ratios == pytest.approx([0.04 ** (1 / 60)] * 60, rel=1e-9)
    assert betas([50], beta=0.0) == [0]
    assert betas([0], steps=1)[0] >= inspo.Args().beta_end  # a run of one update has no slope


@pytest.mark.parametrize("share, warm, full", [(0.4, 60, 80), (1.0, 0, 50), (0.0, 100, 100)])
def test_the_end_cools(share, warm, full):
    """From update `warm` alpha and the conservative weight fall to a tenth, from update `full` the step sizes to 0; the
    first update that would have step size 0 is the one after the last. Alpha's own step size stays."""
    team, *_, args = small_team(steps=100, cooldown=share, policy_lr=0.1, critic_lr=0.2, alpha_lr=0.3, alpha=0.5)
    adams = inspo.optimizers(team, args)
    assert team.left == 1
    for step in range(100):
        inspo.schedule(team, adams, step, args)
        left = 0.1 ** ((step - warm) / (full - warm)) if warm < step < full else 1 if step <= warm else 0.1
        assert team.left.item() == pytest.approx(left)
        assert team.alpha(args).tolist() == [[pytest.approx(0.5 * left)]] * S
        team.log_alpha.data += 0.1  # an alpha that is tuned is left to its target
        tuned = team.alpha(replace(args, auto_alpha=True))
        assert torch.equal(tuned, team.log_alpha.exp()) and not tuned.requires_grad
        team.log_alpha.data -= 0.1
        left = 1 if step < full else (100 - step) / (100 - full)
        assert [adam.lr.item() for adam in adams["policies"]] == pytest.approx([0.1 * left] * 4)
        assert [adam.lr.item() for adam in adams["critics"]] == pytest.approx([0.2 * left] * 4)
        assert adams["alpha"].lr.item() == pytest.approx(0.3)


def test_the_loop_lets_fall_what_should(tmp_path, monkeypatch):
    seen = []

    def spy(team, adams, data, behaviour, noise, order, improve, args, **steps):
        rates = adams["policies"][0].lr.item(), adams["critics"][1].lr.item()
        seen.append((team.beta.item(), *rates, team.alpha(args)[0, 0].item(), improve))
        return {}

    monkeypatch.setattr(inspo, "update", spy)
    words = "--env matrix --task xor --steps 20 --eval-every 20 --eval-episodes 1 --clone-steps 1 --warmup 3".split()
    words += "--beta 0.5 --beta-end 0.1 --beta-hold 4 --policy-lr 0.1 --critic-lr 0.2 --cooldown 1 --alpha 0.3".split()
    inspo.main(inspo.parse([*words, "--out-dir", str(tmp_path / "run")]))
    betas, policy, critic, alphas, improve = zip(*seen)
    assert betas == pytest.approx([0.5] * 4 + [0.5 * 0.2 ** (k / 15) for k in range(16)])
    assert policy == pytest.approx([0.1] * 10 + [0.01 * k for k in range(10, 0, -1)])
    assert critic == pytest.approx([0.2] * 10 + [0.02 * k for k in range(10, 0, -1)])
    assert alphas == pytest.approx([0.3 * 0.1 ** (k / 10) for k in range(10)] + [0.03] * 10)
    assert improve == (False,) * 3 + (True,) * 17
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [float(row["alpha"]) for row in rows] == pytest.approx([0.3] * 5 + [0.03] * 5)


FOUR = "[[[[1, 0], [0, 0]], [[0, 0], [0, 0]]], [[[0, 0], [0, 0]], [[0, 0], [0, 1]]]]"  # a game of four agents


def orders(monkeypatch, out, *words):
    """The orders in which the plain loop hands agents to `update`, in 400 sweeps."""
    found = []

    def spy(team, adams, data, behaviour, noise, order, improve, args, **steps):
        found.append(tuple(order))
        return {}

    monkeypatch.setattr(inspo, "update", spy)
    few = "--steps 400 --eval-every 400 --eval-episodes 1 --clone-steps 1 --hidden 4 --num-seeds 2".split()
    inspo.main(inspo.parse(["--env", "matrix", "--task", FOUR, *few, "--out-dir", str(out), *words]))
    return found


def test_the_loop_draws_an_order_for_each_sweep(tmp_path, monkeypatch):
    one = orders(monkeypatch, tmp_path / "one")
    assert len(one) == 400 and set(one) == set(itertools.permutations(range(4)))
    assert orders(monkeypatch, tmp_path / "two", "--seed", "7", "--beta", "0.3") == one  # from a stream of its own
    assert set(orders(monkeypatch, tmp_path / "fixed", "--order", "fixed")) == {(0, 1, 2, 3)}
    given = []

    def reverse(order, *_):
        given.append(tuple(order))
        return order[::-1]

    monkeypatch.setattr(inspo, "semi_greedy", reverse)
    greedy = orders(monkeypatch, tmp_path / "greedy", "--order", "semi-greedy")
    assert given == one and greedy == [order[::-1] for order in one]


@pytest.mark.parametrize("recurrent", [False, True])
def test_semi_greedy_order(recurrent):
    lengths = (1, 3, 2, 1) if recurrent else (1,) * 20
    team, data, behaviour, args = small_team(lengths=lengths, recurrent=recurrent, sequences=4)
    # Q_i = c_i on action 0 and -c_i on action 1, both recorded, against a uniform policy: |advantage| = c_i.
    data = data._replace(actions=data.actions % 2)
    for c, target, policy in zip((0.1, 0.7, 0.3, 0.2), team.targets, team.policies):
        for parameter in [*target.parameters(), *policy.parameters()]:
            parameter.data.zero_()
        target[-1].bias.data += torch.tensor([c, -c, 0, 0])
    # Agent 0's value is large where nobody acts: that must not count.
    data.state[:, 0] = 100 * (1 - data.acted)
    for layer in (0, 2, 4):
        team.targets[0][layer].weight.data[:, 0, 0] = 1
    generators, seconds = streams(), set()
    for order in itertools.permutations(range(4)):
        uniform = inspo.uniform(generators, args.sequences if recurrent else args.batch_size)
        found = inspo.semi_greedy(list(order), team, data, uniform)
        assert sorted(found) == [0, 1, 2, 3] and found[0] == 1
        assert found[1] == [j for j in order if j != 1][0]
        left = [j for j in (0, 2, 3) if j != found[1]]
        assert found[2] == max(left, key=(0.1, 0.7, 0.3, 0.2).__getitem__)
        seconds.add(found[1])
    assert seconds == {0, 2, 3}


@pytest.mark.parametrize("make", [small_team, recurrent_team])
def test_a_turn_changes_one_agent_only(float64, make):
    team, data, behaviour, args = made = make()
    view, noise = minibatch(team, data, args)
    before, kept = copy.deepcopy(team.state_dict()), copy.deepcopy((data, behaviour, view))
    logs = take_turn(2, made, view, noise)
    assert same((data, behaviour, view), kept)
    after = team.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("critics.2.", "policies.2.", "targets.2."))}
    for name in (n for n in before if n.startswith("targets.2.")):  # tau of the way to the new critic
        expected = before[name] + args.tau * (after[name.replace("targets", "critics")] - before[name])
        assert torch.allclose(after[name], expected, atol=1e-14)
    assert all(value.shape == (S,) and not value.requires_grad for value in logs.values())
    # An action that nobody took with the team's current ones has a small ratio, so the sample shrinks.
    rows, _ = view
    assert ((logs["sample_size"] > 1) & (logs["sample_size"] < data.acted[rows[:, :-1]].sum((1, 2)))).all()


@pytest.mark.parametrize("improve", [True, False])
def test_a_turn_draws_its_own_view_where_it_is_given_none(float64, improve):
    results = []
    for given in (True, False):
        team, data, behaviour, args = small_team()
        row_noise, noise = inspo.uniform(streams(), args.batch_size), inspo.uniform(streams(5), args.batch_size)
        others = [0, 1, 3]
        view = inspo.look(others, team.policies, data, behaviour, row_noise, improve) if given else None
        team.beta.fill_(0.1)
        logs = inspo.turn(2, team, team.policies, optimizers(team), data, behaviour, view, row_noise, noise, improve, args)
        results.append((logs, team.state_dict()))
    assert same(*results) and ("kl" in logs) == improve


# ---------------------------------------------------------------- policies that remember
def alone_linear(layer, s):
    """Seed s of a `Linear` as torch.nn.Linear."""
    single = torch.nn.Linear(*layer.weight.shape[1:])
    single.weight.data, single.bias.data = layer.weight[s].detach().T.clone(), layer.bias[s, 0].detach().clone()
    return single


def alone_mlp(network, s):
    return torch.nn.Sequential(*(alone_linear(m, s) if isinstance(m, inspo.Linear) else m for m in network))


def alone_gru(gru, s):
    """Seed s of a `GRU` as torch.nn.GRU."""
    single = torch.nn.GRU(gru.input.shape[1], gru.state.shape[1])
    for name, weight in (("ih", gru.input), ("hh", gru.state)):
        getattr(single, f"weight_{name}_l0").data = weight[s].detach().T.clone()
    for name, bias in (("ih", gru.input_bias), ("hh", gru.state_bias)):
        getattr(single, f"bias_{name}_l0").data = bias[s, 0].detach().clone()
    return single


def gru_gradients(single):
    """The gradients of torch.nn.GRU in the layout of `GRU`."""
    weights = {"input": single.weight_ih_l0.grad.T, "state": single.weight_hh_l0.grad.T}
    return weights | {"input_bias": single.bias_ih_l0.grad[None], "state_bias": single.bias_hh_l0.grad[None]}


class AlonePolicy(torch.nn.Module):
    """Seed s of a recurrent `Policy` on torch's own layers: the logits along one episode, (L, I) -> (L, A)."""

    def __init__(self, policy, s):
        super().__init__()
        self.encoder, self.head = (alone_linear(layer, s) for layer in (policy.encoder[0], policy.head))
        self.gru = alone_gru(policy.gru, s)

    def forward(self, x):
        return self.head(self.gru(self.encoder(x).relu())[0])

    def gradients(self):
        """By the names that the parameters have in `Policy`."""
        found = {f"gru.{name}": gradient for name, gradient in gru_gradients(self.gru).items()}
        for name, layer in (("encoder.0", self.encoder), ("head", self.head)):
            found |= {f"{name}.weight": layer.weight.grad.T, f"{name}.bias": layer.bias.grad[None]}
        return found


def test_gru_is_torchs_gru(float64):
    L, H, starts = 6, 5, (None, 2, 0, 5)  # in sequence b an episode begins at starts[b]
    gru = inspo.GRU(D, H, streams())
    assert all(p.abs().max() <= H**-0.5 and p.std() > 0.4 * H**-0.5 for p in gru.parameters())
    none = torch.zeros(S, L, len(starts), dtype=torch.bool)
    some = none.clone()
    for b, start in enumerate(starts):
        if start is not None:
            some[:, start, b] = True
    for first in (none, some):
        x = torch.randn(S, L, len(starts), D, requires_grad=True)
        h, push = torch.randn(S, len(starts), H, requires_grad=True), torch.randn(S, L, len(starts), H)
        out = gru(x, first, h)
        gru.zero_grad()
        (out * push).sum().backward()
        for s in range(S):
            single, mine, memory = alone_gru(gru, s), x[s].detach().requires_grad_(), h[s].detach().requires_grad_()
            columns = []
            for b, start in enumerate(starts):
                cut = start if first is some and start is not None else L
                parts = [single(mine[:cut, b], memory[None, b])[0]] if cut else []
                parts += [single(mine[cut:, b])[0]] if cut < L else []  # a run of its own, from no memory
                columns.append(torch.cat(parts))
            expected = torch.stack(columns, 1)
            assert torch.allclose(out[s], expected, rtol=0, atol=1e-12)
            (expected * push[s]).sum().backward()
            assert torch.allclose(x.grad[s], mine.grad, rtol=0, atol=1e-12)
            assert torch.allclose(h.grad[s], memory.grad, rtol=0, atol=1e-12)
            for name, gradient in gru_gradients(single).items():
                assert torch.allclose(getattr(gru, name).grad[s], gradient, rtol=0, atol=1e-12), name
    assert (h.grad[:, 2] == 0).all() and (h.grad[:, :2] != 0).all()


def a_policy(recurrent, seed=0):
    return inspo.Policy(O, A, inspo.Args(hidden=8, recurrent=recurrent), streams(seed))


def policy_inputs(rows, L=7):
    """Random inputs, availability, beginnings of episodes and memories for `rows` rows of seeds."""
    avail, first = torch.rand(rows, L, B, A) > 0.3, torch.rand(rows, L, B) > 0.8
    avail[..., 1] = True
    return torch.randn(rows, L, B, O), avail, first, torch.randn(rows, B, 8)


@pytest.mark.parametrize("recurrent", [True, False])
def test_step_by_step_is_the_whole_sequence(float64, recurrent):
    policy, (x, avail, first, h) = a_policy(recurrent), policy_inputs(S)
    h = h[..., : policy.hidden]
    log_pi, end = policy(x, avail, first, h)
    for t in range(x.shape[1]):
        now = slice(t, t + 1)
        step, h = policy(x[:, now], avail[:, now], first[:, now], h)
        assert torch.allclose(step[:, 0].exp(), log_pi[:, t].exp(), rtol=0, atol=1e-12)
    assert torch.allclose(h, end, rtol=0, atol=1e-12)
    assert torch.allclose(log_pi.exp().sum(-1), torch.ones(()), atol=1e-12) and (log_pi.exp()[~avail] == 0).all()


@pytest.mark.parametrize("recurrent", [True, False])
def test_policies_together_are_each_one_alone(float64, recurrent):
    N = 3
    policies, (x, avail, first, h) = [a_policy(recurrent, 10 * i) for i in range(N)], policy_inputs(N * S)
    h = h[..., : policies[0].hidden]
    log_pi, end = inspo.together(policies)(x, avail, first, h)
    for i, policy in enumerate(policies):
        mine = slice(i * S, (i + 1) * S)
        one, memory = policy(x[mine], avail[mine], first[mine], h[mine])
        assert torch.allclose(log_pi[mine].exp(), one.exp(), rtol=0, atol=1e-12)
        assert torch.allclose(end[mine], memory, rtol=0, atol=1e-12)
    team, flat, _, args = recurrent_team() if recurrent else small_team()
    (rows, log_pi), _ = minibatch(team, flat, args)
    for i, policy in enumerate(team.policies):
        assert torch.allclose(
            inspo.unroll([policy], [i], rows[:, :-1], flat)[0].exp(), log_pi[i].exp(), rtol=0, atol=1e-12
        )


def test_arrange_by_hand():
    dataset = by_hand()
    flat, encode = inspo.arrange(dataset, inspo.Args(recurrent=True, one_hot=False))
    assert flat.first.int().tolist() == [1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 1]  # the last row is empty
    assert flat.acted.tolist() == [1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0]
    assert flat.done.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert flat.reward.tolist() == [1, 0, 2, 3, 4, 0, 5, 0, 6, 7, 0, 0]
    assert flat.state[:-1, 0].tolist() == [10 * row for row in range(11)]
    assert flat.actions[[0, 2, 3, 4, 6, 8, 9]].tolist() == [[1, 2], [0, 1], [2, 0], [1, 1], [2, 2], [0, 2], [1, 0]]
    assert flat.sequences.tolist() == [[2, 3, 4, 5], [8, 9, 10, 11], [6, 7, 0, 1]]
    nothing, a, b, c = [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]
    before = [nothing, b, nothing, a, c, b, nothing, c, nothing, a, b], [nothing, c, nothing, b, a, b, nothing, c,
                                                                        nothing, c, a]  # fmt: skip
    for i, sign in enumerate((1, -1)):
        assert flat.obs[:-1, i].tolist() == [[sign * row, *last] for row, last in enumerate(before[i])]
    assert flat.avail.shape == (12, 2, 3) and flat.obs.isfinite().all()
    # What a game shows is encoded like what was recorded.
    hot = partial(F.one_hot, num_classes=3)
    assert torch.equal(encode(dataset.obs[1, 2], hot(dataset.actions[1, 1])), flat.obs[4])
    assert torch.equal(encode(dataset.obs[:, 0], torch.zeros(4, 2, 3)), flat.obs[[0, 2, 6, 8]])

    plain, encode = inspo.arrange(dataset, inspo.Args(recurrent=False, one_hot=False))
    assert plain.sequences.tolist() == [[0, 1], [2, 3], [3, 4], [4, 5], [6, 7], [8, 9], [9, 10]]
    assert torch.equal(plain.obs[:-1], flat.obs[:-1, :, :1])
    assert torch.equal(encode(dataset.obs[1, 2], hot(dataset.actions[1, 1])), plain.obs[4])
    cells, encode = inspo.arrange(dataset, inspo.Args(recurrent=True, one_hot=True))
    assert cells.obs.shape == (12, 2, 21 + 3) and (cells.obs[:-1].sum(-1) == 2 - flat.first[:-1, None].int()).all()
    assert torch.equal(encode(dataset.obs[1, 2], hot(dataset.actions[1, 1])), cells.obs[4])


def test_a_recurrent_team_plays_as_it_learned(monkeypatch):
    """In a game the memory and the last action go with the agents: the same probabilities as along a sequence."""
    args = inspo.Args(num_seeds=2, hidden=8, recurrent=True)
    flat, encode = inspo.arrange(data.collect_dataset("bridge", "", "mixed", episodes=20), args)
    team = inspo.Team(flat, args, streams(count=2))
    for parameter in team.policies.parameters():
        parameter.data *= 3  # so that memory matters
    calls, forward, whole_team = [], inspo.Policy.forward, inspo.together(list(team.policies))

    def spy(policy, x, avail, first, h):
        calls.append((x, avail, forward(policy, x, avail, first, h)[0]))
        return forward(policy, x, avail, first, h)

    monkeypatch.setattr(inspo.Policy, "forward", spy)
    E, N = 3, 2
    scores = inspo.evaluate(team.policies, encode, args, 0, E, torch.device("cpu"))
    assert {name: x.shape for name, x in scores.items()} == {"return": (2, E), "sampled_return": (2, E)}
    monkeypatch.undo()
    starts = [t for t, (x, *_) in enumerate(calls) if not x[..., -calls[0][1].shape[-1] :].any()]  # no last actions
    assert starts[0] == 0 and len(starts) == 2 and min(starts[1], len(calls) - starts[1]) > 5
    for sampled, part in enumerate((calls[: starts[1]], calls[starts[1] :])):
        x, avail, found = (torch.cat(parts, 1) for parts in zip(*part))  # (N S, L, E, .)
        none = torch.zeros(x.shape[:3], dtype=torch.bool)
        whole, _ = whole_team(x, avail, none, torch.zeros(N * 2, E, 8))
        assert torch.allclose(found, whole, atol=1e-5)
        forgetful, _ = whole_team(x, avail, ~none, torch.zeros(N * 2, E, 8))
        assert not torch.allclose(forgetful, whole, atol=1e-2)
        last = x[:, 1:, :, -found.shape[-1] :]  # what was done before
        greedy = torch.nn.functional.one_hot(found[:, :-1].argmax(-1), found.shape[-1])
        assert (last.sum(-1) == 1).all() and torch.equal(last, greedy.to(last.dtype)) == (not sampled)


def test_cloned_policies_remember():
    """Agent 0 repeats what it did two steps ago, agent 1 does the same as agent 0; both see nothing."""
    E, T = 64, 6
    first_two = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(E // 4, 1)
    actions = first_two.repeat(1, T // 2)[..., None].expand(E, T, 2).clone()
    blank = torch.zeros(E, T + 1, 2, 1)
    mask, avail = torch.ones(E, T, dtype=torch.bool), torch.ones(E, T + 1, 2, 2, dtype=torch.bool)
    recorded = data.Dataset(blank, blank[..., 0, :], avail, actions, torch.zeros(E, T), torch.zeros_like(mask), mask)
    args = inspo.Args(
        num_seeds=S, recurrent=True, one_hot=False, hidden=16, sequences=16, clone_steps=150, clone_lr=0.01
    )
    flat, _ = inspo.arrange(recorded.check(), args)
    team = inspo.Team(flat, args, streams())
    behaviour = inspo.clone(team, flat, streams(), args)
    step, taken = flat.acted[:-1].view(E, T + 1).nonzero().T, flat.acted.nonzero()[:, 0]
    early, late = taken[step[1] < 2], taken[step[1] >= 2]
    for i in range(2):
        mu, others = behaviour.log_mu[i].exp(), behaviour.log_mu_others[i].exp()
        assert (mu[:, early] - 0.5).abs().mean() < 0.1  # nothing to go by
        assert mu[:, late, flat.actions[late, i]].min() > 0.9
        assert others[:, taken].min() > 0.8 and others[:, taken].mean() > 0.95  # the other agent's action tells


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_warm_up_turn_takes_the_cloned_policies_from_their_tables(float64, recurrent):
    """Before the policies move, tables save the unrolling: the critic's update is the one that unrolling gives, but
    for the tables' e^-20 where an action is barred."""
    results = []
    for improve in (False, True):
        team, flat, behaviour, args = made = small_team(3, UNEVEN, False, recurrent=recurrent, sequences=4)
        (rows, log_pi), noise = minibatch(team, flat, args)
        before = copy.deepcopy(team.state_dict())
        if not improve:
            unrolled, log_pi = log_pi, {i: inspo.recall(behaviour.log_mu[i], rows[:, :-1]) for i in log_pi}
            assert all(torch.allclose(log_pi[i].exp(), unrolled[i].exp(), rtol=0, atol=1e-8) for i in log_pi)
        logs = take_turn(1, made, (rows, log_pi), noise, improve=improve)
        results.append((logs["q_loss"], [p.detach() for p in team.critics.parameters()]))
        moved = any(not torch.equal(p, before[f"policies.{name}"]) for name, p in team.policies.state_dict().items())
        assert moved == improve
    (one, critics), (other, others) = results
    assert torch.allclose(one, other, rtol=0, atol=1e-7)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(critics, others))


def learn(dataset, spoil=lambda team, flat: None):
    """Clone a recurrent team and train it for two sweeps: the team, its start, the data, behaviour, every turn's logs.

    spoil: what to do to the new team and the data before anything else.
    """
    args = inspo.Args(num_seeds=S, hidden=8, batch_size=16, sequences=4, recurrent=True, one_hot=False, clone_steps=3,
                      auto_alpha=True)  # fmt: skip
    flat, _ = inspo.arrange(dataset, args)
    N, team = flat.obs.shape[1], inspo.Team(flat, args, streams())
    spoil(team, flat)
    start, logs, drawn = copy.deepcopy(team.state_dict()), [], []
    behaviour = inspo.clone(team, flat, streams(), args)

    def spy(i, team, seen, adams, data, behaviour, view, *rest):
        drawn.append(view[0])
        found = inspo.turn(i, team, seen, adams, data, behaviour, view, *rest)
        logs.append(found)
        return found

    adams, generators = optimizers(team), streams()
    team.beta.fill_(0.1)
    for _ in range(2):
        order = inspo.semi_greedy(range(N), team, flat, inspo.uniform(generators, args.sequences))
        noise = inspo.draw_noise(generators, N, args)
        inspo.update(team, adams, flat, behaviour, noise, order, True, args, turn=spy)
    assert (torch.cat(drawn) == len(flat.obs) - 1).any()  # padding was among what it learned from
    assert all(value.isfinite().all() for log in logs for value in log.values())
    return team.state_dict(), start, flat, behaviour, logs


def test_what_is_no_step_teaches_nothing():
    """The padding, what stands where an episode has no more action, and what lies behind the mask: no effect, bit for
    bit, on any loss, weight, or table entry of a real observation or step."""

    def padding(team, flat):
        g = torch.Generator().manual_seed(5)
        flat.obs[-1], flat.state[-1] = 9 * torch.randn(3, O + A, generator=g), 9 * torch.randn(D, generator=g)
        flat.avail[-1] = torch.arange(A) == 2
        idle = flat.acted == 0
        for tensor, value in ((flat.reward, 100.0), (flat.done, 1.0), (flat.actions, 3)):
            tensor[idle] = value

    def behind(dataset):
        beyond = ~torch.cat([torch.ones_like(dataset.mask[:, :1]), dataset.mask], 1)
        dataset.obs[beyond], dataset.state[beyond], dataset.avail_actions[beyond] = 7.0, -7.0, True
        dataset.actions[~dataset.mask], dataset.reward[~dataset.mask], dataset.terminated[~dataset.mask] = 2, 50.0, True
        assert beyond.any() and (dataset.lengths == torch.tensor(UNEVEN)).all()
        return dataset

    weights, _, flat, behaviour, logs = learn(random_dataset(UNEVEN))
    steps = flat.acted.bool()
    for dataset, spoil in (
        (random_dataset(UNEVEN), padding),
        (behind(random_dataset(UNEVEN)), lambda team, flat: None),
    ):
        other, _, _, tables, records = learn(dataset, spoil)
        assert len(logs) == 6 and same(logs, records) and same(weights, other)
        for i in range(3):
            assert torch.equal(behaviour.log_mu[i][:, :-1], tables.log_mu[i][:, :-1])
            assert torch.equal(behaviour.log_mu_others[i][:, steps], tables.log_mu_others[i][:, steps])


def test_an_episode_does_not_see_its_neighbours(float64):
    team, flat, *_ = recurrent_team(lengths=UNEVEN)
    begins = flat.first.nonzero()[:, 0].tolist()  # the last of them is the padding's
    assert flat.first[flat.sequences[:, 1:]].any()  # episodes do share sequences
    packed, agents = flat.sequences.T.expand(S, -1, -1), range(3)
    found = inspo.unroll(list(team.policies), agents, packed, flat).exp()  # (N, S, L, Q, A)
    table = found.new_zeros(3, S, len(flat.obs), A)
    for i in agents:
        table[i][:, flat.sequences.T] = found[i]
    for begin, end in zip(begins, begins[1:]):
        rows = torch.arange(begin, end)[:, None].expand(S, -1, 1)
        alone = inspo.unroll(list(team.policies), agents, rows, flat)[:, :, :, 0].exp()
        assert torch.allclose(alone, table[:, :, begin:end], rtol=0, atol=1e-12)


def test_an_action_that_is_never_available_has_no_part():
    """No probability, weight or share in the conservative term: whatever the networks say of it, nothing changes."""
    outputs = "head.bias", "critics.{}.4.bias", "targets.{}.4.bias", "teammates.4.bias"

    def is_output(name):
        return name.endswith(outputs[0]) or name in [text.format(i) for text in outputs[1:] for i in range(3)]

    def praise(team, flat):
        for name, tensor in team.state_dict().items():
            if is_output(name):
                tensor[..., -1] = 50.0

    dataset = random_dataset(UNEVEN, barred=A - 1)
    plain, plain_start, _, behaviour, logs = learn(dataset)
    praised, start, _, tables, records = learn(dataset, praise)
    assert same(logs, records) and sum(map(is_output, plain)) == 3 * 4 + 1
    for name in plain:
        if is_output(name):
            assert (praised[name][..., -1] == 50).all() and (plain[name][..., -1] == plain_start[name][..., -1]).all()
            assert torch.equal(praised[name][..., :-1], plain[name][..., :-1])
            assert not torch.equal(praised[name], start[name])
        else:
            assert torch.equal(praised[name], plain[name]), name
    for i in range(3):
        real = behaviour.log_mu[i][:, :-1]
        assert torch.equal(real, tables.log_mu[i][:, :-1]) and (real[..., -1] == -20).all()
        assert torch.allclose(real.exp()[..., :-1].sum(-1), torch.ones(()), atol=1e-5)


def test_a_dead_agent_neither_weighs_nor_learns():
    """It can take only action 0: its teammate's ratio is 1, and no update moves its policy."""
    dataset = random_dataset(UNEVEN, 2)
    seen = torch.cat([torch.ones_like(dataset.mask[:, :1]), dataset.mask], 1)
    dataset.avail_actions[:, :, 1] = (torch.arange(A) == 0) & seen[..., None]
    dataset.actions[:, :, 1] = 0
    team, flat, _, args = made = recurrent_team(dataset=dataset.check())
    before = copy.deepcopy(team.state_dict())
    view, noise = minibatch(team, flat, args)
    rows, _ = view
    one, other = (take_turn(i, made, view, noise) for i in range(2))
    assert torch.equal(one["sample_size"], flat.acted[rows[:, :-1]].sum((1, 2)))  # every ratio is 1
    assert (other["sample_size"] < one["sample_size"] - 0.1).all()  # the living teammate's are not
    assert (other["kl"] == 0).all() and (other["policy_loss"] == 0).all() and (one["kl"] > 0).all()
    after = team.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("policies.1."))
    assert not torch.equal(before["policies.0.gru.state"], after["policies.0.gru.state"])
    assert not torch.equal(before["critics.1.0.weight"], after["critics.1.0.weight"])


@pytest.mark.parametrize("actor_data", ["uniform", "resampled"])
def test_a_recurrent_turn_is_a_slow_loop(float64, actor_data):
    """Ratio, resampled places, both losses and both gradients of one turn, number by number, on torch.nn.GRU. It is a
    late turn: half of alpha and of the conservative weight is left."""
    i, N, beta, rate = 1, 3, 0.3, 0.01
    made = recurrent_team(lengths=UNEVEN, actor_data=actor_data, alpha=0.4, gamma=0.9, cql=1.4, ratio_cap=1.3,
                          weight_cap=1.1)  # fmt: skip
    team, flat, _, args = made
    team.left.fill_(0.5)
    (rows, log_pi), noise = view, _ = minibatch(team, flat, args)
    before = copy.deepcopy(team)
    logs = take_turn(i, made, view, noise, beta, adams=optimizers(team, Descent, rate))
    ends = list(itertools.accumulate(length + 1 for length in UNEVEN))
    spans = list(zip([0, *ends], ends))
    steps = {row for begin, end in spans for row in range(begin, end - 1)}
    avail, actions, seen = flat.avail, flat.actions, set()

    def table(networks, s):
        """log-probabilities (R, A) of each network, -inf where barred, every episode on its own."""
        singles = [AlonePolicy(network, s) for network in networks]
        logits = (torch.cat([one(flat.obs[begin:end, j]) for begin, end in spans]) for j, one in enumerate(singles))
        masked = (each.masked_fill(~avail[: len(each), j], -torch.inf) for j, each in enumerate(logits))
        return singles, [each.log_softmax(-1) for each in masked]

    def legal(row):
        return [a for a in range(A) if avail[row, i, a]]

    for s in range(S):
        singles, pi = table(before.policies, s)
        _, prior = table(before.mus, s)
        mu, log_pi_now = prior[i].clamp(min=-20).tolist(), [p.detach().exp().tolist() for p in pi]
        teammates, critic, old, new = (
            alone_mlp(n, s) for n in (before.teammates, before.critics[i], before.targets[i], team.targets[i])
        )

        # Eq. 23, at every place of the minibatch
        places, ratios = [row for step in rows[s, :-1].tolist() for row in step], []
        for row in places:
            if row not in steps:
                ratios.append(0.0)
                continue
            product = 1.0
            for j in (0, 2):
                known = torch.zeros(N, A)
                for k in range(N):
                    if k == i or k < j:
                        known[k, actions[row, k]] = 1
                x = torch.cat([flat.state[row], torch.eye(N)[j], known.flatten()])
                logits = (teammates(x) + prior[j][row]).masked_fill(~avail[row, j], -torch.inf)
                a = actions[row, j].item()
                product *= log_pi_now[j][row][a] / torch.softmax(logits, -1)[a].item()
            ratios.append(min(product ** (1 / (N - 1)), 1.3))
        seen |= {name for name, value in (("capped", 1.3), ("padding", 0.0)) if value in ratios}
        seen |= {"free"} if 0 < min(filter(None, ratios)) < 1 else set()
        cumulative = list(itertools.accumulate(ratios))
        drawn = [next(row for row, c in zip(places, cumulative) if c >= u * cumulative[-1]) for u in noise[s].tolist()]
        size = sum(ratios) ** 2 / sum(r**2 for r in ratios)
        assert logs["sample_size"][s].item() == pytest.approx(size, rel=1e-10)

        # Eq. 24
        total = 0.0
        for row in drawn:
            value, a = 0.0, actions[row, i].item()
            q, q_next = critic(flat.state[row]), old(flat.state[row + 1]).tolist()
            for b in legal(row + 1):
                p = log_pi_now[i][row + 1][b]
                value += p * (q_next[b] - 0.2 * (math.log(p) - mu[row + 1][b]) - beta * math.log(p))
            done = flat.done[row].item()
            seen |= {"done" if done else "", "cut off" if not done and row + 1 not in steps else ""}
            gap = torch.stack([q[b] for b in legal(row)]).logsumexp(0) - q[a]
            total = total + (q[a] - flat.reward[row] - (0.0 if done else 0.9 * value)) ** 2 + 0.7 * gap
        loss = total / len(drawn)
        assert logs["q_loss"][s].item() == pytest.approx(loss.item(), rel=1e-10)
        loss.backward()
        for k, layer in enumerate(critic):
            if isinstance(layer, torch.nn.Linear):
                step = (before.critics[i][k].weight - team.critics[i][k].weight)[s] / rate
                assert torch.allclose(step, layer.weight.grad.T, rtol=1e-8, atol=1e-10)

        # Eq. 20
        total, divergence, T, used = 0.0, 0.0, 0.2 + beta, 0
        for row in drawn if actor_data == "resampled" else [row for row in places if row in steps]:
            q, a, used = new(flat.state[row]).tolist(), actions[row, i].item(), used + 1
            z = sum(math.exp((q[b] + 0.2 * mu[row][b]) / T) for b in legal(row))
            weight = math.exp((q[a] - beta * mu[row][a]) / T) / z
            seen |= {"heavy" if weight > 1.1 else "light"}
            total = total - min(weight, 1.1) * pi[i][row, a]
            divergence += sum(p * (math.log(p) - mu[row][b]) for b, p in enumerate(log_pi_now[i][row]) if p)
        assert logs["policy_loss"][s].item() == pytest.approx(total.item() / used, rel=1e-10)
        assert logs["kl"][s].item() == pytest.approx(divergence / used, rel=1e-10)
        (total / used).backward()
        after = dict(team.policies[i].named_parameters())
        for name, gradient in singles[i].gradients().items():
            step = (before.policies[i].get_parameter(name) - after.pop(name))[s] / rate
            assert torch.allclose(step, gradient, rtol=1e-8, atol=1e-10), name
        assert not after
    assert seen >= {"capped", "free", "padding", "done", "cut off", "heavy", "light"}  # or they were not tested


@pytest.mark.parametrize("make", [small_team, recurrent_team])
@pytest.mark.parametrize("sequential", [True, False])
def test_a_sweep_shows_the_teammates_as_they_are_or_as_they_were(float64, monkeypatch, make, sequential):
    team, flat, behaviour, args = make(sequential=sequential, inner=2)
    agents, learned, drawn, looks, look = range(len(team.policies)), set(), [], [], inspo.look
    start = copy.deepcopy(team.policies)

    def watch(*what):  # without memory, each turn looks for itself
        looks.append(look(*what))
        return looks[-1]

    def spy(i, team, seen, adams, data, behaviour, view, *rest):
        shown = None if view is None else (view[0], dict(view[1]))
        policies = copy.deepcopy(team.policies)
        found = inspo.turn(i, team, seen, adams, data, behaviour, view, *rest)
        rows, log_pi = shown or looks[-1]
        for j in {*agents} - {i}:
            now, before = (inspo.unroll([p[j]], [j], rows[:, :-1], flat)[0].exp() for p in (policies, start))
            assert torch.allclose(log_pi[j].exp(), now if sequential else before, rtol=0, atol=1e-12)
            assert torch.allclose(now, before, rtol=0, atol=1e-4) == (j not in learned)
        learned.add(i)
        drawn.append(rows)
        return found

    monkeypatch.setattr(inspo, "look", watch)
    noise = inspo.draw_noise(streams(), len(agents), args)
    order = [*agents][::-1]
    team.beta.fill_(0.1)
    logs = inspo.update(team, optimizers(team), flat, behaviour, noise, order, True, args, turn=spy, look=watch)
    assert len(learned) == len(agents) and len(drawn) == 2 * len(learned)
    fresh = sum(not torch.equal(one, other) for one, other in zip(drawn, drawn[1:]))
    assert fresh == (0 if args.recurrent else len(drawn) - 1)  # with memory, one minibatch serves the whole sweep
    # with memory, one look at all for the sweep and, where agents move in turns, one at each that has moved but the last
    assert len(looks) == (1 + sequential * (len(agents) - 1) if args.recurrent else len(drawn))
    assert {"q_loss", "policy_loss", "kl", "sample_size"} == logs.keys()


# ---------------------------------------------------------------- the propositions, on tables
@pytest.mark.parametrize("seed", range(5))
def test_propositions_3_and_4_on_tables(seed):
    game, alpha, beta, gamma = random_game(seed), 0.2, 0.3, 0.9
    pi = [torch.full_like(m, 1 / 3) for m in game[2]]
    value, _ = evaluate(game, pi, alpha, beta, gamma)
    for k in range(500):
        pi = sweep(game, pi, alpha, beta, gamma, order=(0, 1) if k % 2 else (1, 0))
        improved, Q = evaluate(game, pi, alpha, beta, gamma)
        assert (improved >= value - 1e-10).all()  # Proposition 4: no state ever gets worse
        value = improved
    for i in range(2):  # Proposition 3: at the limit, Eq. 12 holds
        assert torch.allclose(pi[i], boltzmann(local_q(Q, pi, i), game[2][i], alpha, beta), atol=1e-9)
    g = torch.Generator().manual_seed(seed)
    for i in range(2):  # Eq. 11: no agent gains by leaving alone
        for _ in range(50):
            other = list(pi)
            other[i] = torch.softmax(pi[i].log() + torch.randn(pi[i].shape, generator=g, dtype=torch.float64), -1)
            assert (evaluate(game, other, alpha, beta, gamma)[0] <= value + 1e-9).all()


XOR = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
MIX = {
    "ab-ba": torch.tensor([[0, 1], [1, 0]], dtype=torch.float64) / 2,
    "aa-ab-ba": torch.tensor([[1, 1], [1, 0]], dtype=torch.float64) / 3,
    "all": torch.tensor([[1, 1], [1, 1]], dtype=torch.float64) / 4,
}


@pytest.mark.parametrize("name", MIX)
def test_exact_operator_on_xor(name):
    share = MIX[name]
    expected = {"aa-ab-ba": {"now": 1.0, "before": 0.0, "nothing": 0.0}}.get(
        name, dict.fromkeys(("now", "before", "nothing"), 0.5)
    )
    for see, reward in expected.items():
        pi = [share.sum(1), share.sum(0)]
        for _ in range(4):
            pi = one_state_operator(share, XOR, pi, alpha=0.05, beta=0.0, see=see)
            assert (pi[0] @ XOR @ pi[1]).item() == pytest.approx(reward, abs=1e-3)


def test_script_parts_compose_to_the_exact_operator(float64):
    """Ratio, resampling and weights on a large minibatch of (b) give the operator's policy for the agent in turn."""
    g = torch.Generator().manual_seed(0)
    share, alpha, beta, n = MIX["aa-ab-ba"], 0.3, 0.1, 300_000
    team = torch.tensor([0.35, 0.65])  # what agent 1 does now
    cell = torch.multinomial(share.flatten(), n, True, generator=g)
    action = torch.stack([cell // 2, cell % 2])  # (2, B)
    mu = share.sum(1)
    log_mu_others = (share / mu[:, None]).log()[action[0], action[1]][None]
    ratio = inspo.importance_ratio(team.log()[action[1]][None], log_mu_others, 2, cap=1e9)
    again = inspo.resample(ratio, torch.rand(1, n, generator=g))[0]
    W = share * team / (share / mu[:, None]).where(share > 0, torch.inf)
    found = torch.zeros(2, 2).index_put((action[0, again], action[1, again]), torch.tensor(1.0 / n), accumulate=True)
    assert torch.allclose(found, W / W.sum(), atol=4e-3)

    q = (W * XOR).sum(1) / W.sum(1)
    batch = one_state_batch(action[0, again][None], mu)
    logits = best_clone(batch, q, torch.tensor([[alpha]]), torch.tensor(beta))
    exact = one_state_operator(share, XOR, [mu, team], alpha, beta, order=(0,))[0]
    assert torch.allclose(torch.softmax(logits, 0), exact, atol=6e-3)


def test_script_finds_the_tables_fixed_point(tmp_path):
    """With constant alpha and beta and no conservative term, training ends at the quantal response equilibrium."""
    payoff, alpha, beta = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]), 1.0, 1.0
    task, behaviour = json.dumps(payoff.tolist()), "[0.5, 0.3, 0.2]"
    summary = inspo.main(inspo.parse([
        "--env", "matrix", "--task", task, "--dataset", behaviour, "--num-seeds", "1", "--steps", "1500",
        "--eval-every", "1500", "--alpha", str(alpha), "--beta", str(beta), "--beta-end", str(beta), "--beta-hold", "0",
        "--warmup", "0", "--cql", "0", "--out-dir", str(tmp_path / "run")]))  # fmt: skip
    recorded = data.load("matrix", task, behaviour)
    counts = torch.zeros(3, 3).index_put(tuple(recorded.actions[:, 0].T), torch.tensor(1.0), accumulate=True)
    mu = [(counts.sum(1 - i) / counts.sum())[None].double() for i in range(2)]
    game = (torch.ones(1, 3, 3, 1, dtype=torch.float64), payoff[None].double(), mu)
    pi = [m.clone() for m in mu]
    for _ in range(500):
        pi = sweep(game, pi, alpha, beta, gamma=0.0)
    exact = pi[0].T * pi[1]
    assert (exact - mu[0].T * mu[1]).abs().max() > 0.1  # the equilibrium is not the behaviour
    for seed in summary["joint_policy"]:
        assert torch.allclose(torch.tensor(seed, dtype=torch.float64), exact, atol=0.03), (seed, exact)


# ---------------------------------------------------------------- all seeds at once, kill and resume
def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["team"]


SHORT = ["--dataset", "mixed", "--steps", "60", "--eval-every", "20", "--eval-episodes", "4", "--clone-steps", "50"]


def test_five_seeds_at_once_are_five_single_runs(tmp_path, float64):
    inspo.main(inspo.parse([*SHORT, "--seed", "3", "--out-dir", str(tmp_path / "all")]))
    together = weights(tmp_path / "all")
    rows = list(csv.DictReader((tmp_path / "all" / "metrics.csv").open()))
    for s in (0, 2, 4):
        out = tmp_path / f"one{s}"
        inspo.main(inspo.parse([*SHORT, "--seed", str(3 + s), "--num-seeds", "1", "--out-dir", str(out)]))
        for name, tensor in weights(out).items():
            assert torch.allclose(tensor[0], together[name][s], atol=1e-9), name
        single = list(csv.DictReader((out / "metrics.csv").open()))
        mine = [row for row in rows if row["seed"] == str(3 + s)]
        for one, other in zip(single, mine, strict=True):
            assert one.keys() == other.keys()
            assert all(float(one[k]) == pytest.approx(float(other[k]), abs=1e-8) for k in one)


def start(*words):
    def mind_ctrl_c():  # also where the tests run in the background, whose processes are begun not to
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen([sys.executable, "algorithms/inspo.py", *map(str, words)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=mind_ctrl_c)  # fmt: skip


def wait_for_step(folder, step):
    """Until the run in `folder` has written a row of metrics for `step`."""
    for _ in range(1200):
        path = folder / "metrics.csv"
        if path.exists() and any(row["step"] == str(step) for row in csv.DictReader(path.open())):
            return
        time.sleep(0.05)
    raise TimeoutError(f"{folder} never reached step {step}")


LONGER = ["--num-seeds", "2", "--steps", "600", "--eval-every", "100", "--eval-episodes", "4", "--clone-steps", "50",
          "--auto-alpha", "--order", "semi-greedy"]  # fmt: skip


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command("algorithms/inspo.py", *LONGER, "--out-dir", whole).returncode == 0
    process = start(*LONGER, "--out-dir", broken)
    wait_for_step(broken, 300)
    time.sleep(int.from_bytes(os.urandom(1), "big") / 255)  # anywhere within a second of training
    process.kill()
    process.communicate()
    killed_at = torch.load(broken / "checkpoint.pt", weights_only=True)["step"]
    assert 200 <= killed_at < 600
    resumed = command("algorithms/inspo.py", "--resume", "--out-dir", broken)
    assert resumed.returncode == 0, resumed.stderr
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()
    one, other = weights(whole), weights(broken)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    first, second = (json.loads((f / "summary.json").read_text()) for f in (whole, broken))
    for volatile in ("wall_seconds", "updates_per_second"):
        first.pop(volatile), second.pop(volatile)
    assert first == second
    assert not list(broken.glob("*.part"))


@pytest.fixture(scope="session")
def battles(tmp_path_factory):
    """The path of a few battles that a random team fought."""
    game = envs.make("smac", "3m", 12)
    dataset = record(game, lambda t, obs, info: random_play(game, info), seed=0)
    dataset.info |= {"env": "smac", "task": "3m", "name": "random"}
    path = tmp_path_factory.mktemp("battles") / "random.h5"
    data.write(dataset, path)
    return path


BATTLE = ["--env", "smac", "--task", "3m", "--recurrent", "--hidden", "16", "--sequences", "4", "--batch-size", "32",
          "--eval-episodes", "1", "--clone-steps", "4", "--warmup", "1"]  # fmt: skip


def test_recurrent_seeds_at_once_are_single_runs(tmp_path, float64, monkeypatch, battles):
    # Battles are drawn for all games at once, so that they depend on how many seeds there are: no evaluation here.
    def no_battles(policies, encode, args, *_):
        return {"return": torch.zeros(args.num_seeds, 1), "sampled_return": torch.zeros(args.num_seeds, 1)}

    monkeypatch.setattr(inspo, "evaluate", no_battles)
    words = [*BATTLE, "--dataset", str(battles), "--steps", "4", "--eval-every", "2", "--beta", "0.1", "--auto-alpha"]
    inspo.main(inspo.parse([*words, "--seed", "3", "--num-seeds", "3", "--out-dir", str(tmp_path / "all")]))
    together, rows = weights(tmp_path / "all"), list(csv.DictReader((tmp_path / "all" / "metrics.csv").open()))
    assert any("gru" in name for name in together)
    for s in range(3):
        out = tmp_path / f"one{s}"
        inspo.main(inspo.parse([*words, "--seed", str(3 + s), "--num-seeds", "1", "--out-dir", str(out)]))
        for name, tensor in weights(out).items():
            assert torch.allclose(tensor[0], together[name][s], rtol=0, atol=1e-9), name
        single = list(csv.DictReader((out / "metrics.csv").open()))
        mine = [row for row in rows if row["seed"] == str(3 + s)]
        assert {"q_loss", "policy_loss", "kl", "alpha"} <= single[0].keys() and float(single[-1]["kl"]) > 0
        for one, other in zip(single, mine, strict=True):
            assert all(float(one[k]) == pytest.approx(float(other[k]), abs=1e-9) for k in one)


def test_a_recurrent_run_killed_and_resumed_is_the_same_to_the_bit(tmp_path, battles):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = [*BATTLE, "--dataset", battles, "--num-seeds", "2", "--steps", "20", "--eval-every", "5"]
    assert command("algorithms/inspo.py", *words, "--out-dir", whole).returncode == 0
    process = start(*words, "--out-dir", broken)
    wait_for_step(broken, 10)
    process.kill()
    process.communicate()
    assert 5 <= torch.load(broken / "checkpoint.pt", weights_only=True)["step"] < 20
    resumed = command("algorithms/inspo.py", "--resume", "--out-dir", broken)
    assert resumed.returncode == 0, resumed.stderr
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()
    assert same(weights(whole), weights(broken))
    first, second = (json.loads((f / "summary.json").read_text()) for f in (whole, broken))
    for volatile in ("wall_seconds", "updates_per_second"):
        first.pop(volatile), second.pop(volatile)
    assert first == second and 0 <= first["win_rate"]["mean"] <= 1 and first["dataset_win_rate"] is not None
    assert all((broken / name).read_bytes().startswith(b"\x89PNG") for name in ("curve.png", "win_rate.png"))


def test_ctrl_c_leaves_the_last_checkpoint(tmp_path):
    process = start(*LONGER, "--out-dir", tmp_path / "run")
    wait_for_step(tmp_path / "run", 200)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines() == [f"interrupted; go on with: --resume --out-dir {tmp_path / 'run'}"]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("make", [small_team, recurrent_team])
def test_a_turn_on_a_gpu_never_waits_for_the_host(make):
    team, data, behaviour, args = make()
    team, data = team.cuda(), inspo.Data(*(x.cuda() for x in data))
    behaviour = inspo.Behaviour(*([x.cuda() for x in tables] for tables in behaviour))
    rows = data.sequences[None, :8].mT.expand(S, -1, -1)
    agents, noise = range(len(team.policies)), torch.rand(S, args.batch_size, device="cuda")
    with torch.no_grad():
        log_pi = dict(zip(agents, inspo.unroll(team.policies, agents, rows[:, :-1], data)))
    adams = optimizers(team)
    team.beta.fill_(0.1)
    for mode in ("default", "error"):  # the first turn sets things up
        torch.cuda.set_sync_debug_mode(mode)
        logs = inspo.turn(1, team, team.policies, adams, data, behaviour, (rows, log_pi), None, noise, True, args)
    torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in logs.values())


# ---------------------------------------------------------------- the paper's claims, through the command line
def train(out, *words):
    process = command("algorithms/inspo.py", *words, "--out-dir", out)
    assert process.returncode == 0, process.stderr
    return json.loads((out / "summary.json").read_text()), process.stdout


@pytest.mark.parametrize("dataset", [LONG("ab"), LONG("ab-ba"), "aa-ab-ba", LONG("all")])
def test_xor_is_solved_by_ten_of_ten_seeds(tmp_path, dataset):
    summary, _ = train(tmp_path / "run", "--env", "matrix", "--task", "xor", "--dataset", dataset, "--num-seeds", 10)
    assert summary["seeds"] == list(range(10))
    for joint in summary["joint_policy"]:
        assert max(joint[0][1], joint[1][0]) > 0.97  # one convention, AB or BA, and nearly nothing else
    assert summary["return"]["per_seed"] == [1.0] * 10


@pytest.mark.long
def test_xor_fails_without_looking_at_the_teammates(tmp_path):
    """The sheet's S2: without resampling, every seed lands on the joint action that nobody ever took."""
    summary, _ = train(
        tmp_path / "run", "--env", "matrix", "--dataset", "aa-ab-ba", "--num-seeds", 10, "--no-resampling"
    )
    assert all(joint[1][1] > 0.8 for joint in summary["joint_policy"])
    assert summary["return"]["per_seed"] == [0.0] * 10


@pytest.mark.long
def test_xor_simultaneous_updates_conflict(tmp_path):
    """The paper's Figure 5b, in a setting where the conflict is complete: linear policies, well-fitted clones, many
    steps per turn. It is no general failure: inspo.md lists settings in which simultaneous updates succeed."""
    words = "--env matrix --dataset aa-ab-ba --num-seeds 10 --layers 0 --inner 150 --steps 9 --eval-every 9".split()
    words += "--policy-lr 0.05 --critic-lr 0.05 --clone-lr 0.05 --actor-data uniform".split()
    sequential, _ = train(tmp_path / "now", *words)
    simultaneous, _ = train(tmp_path / "before", *words, "--no-sequential")
    assert sequential["return"]["per_seed"] == [1.0] * 10
    assert simultaneous["return"]["per_seed"] == [0.0] * 10


@pytest.mark.parametrize(
    "words, reward", [LONG(("balanced",), 20), (("imbalanced",), 20), LONG(("imbalanced", "--beta", 0), 5)]
)
def test_m_ne_needs_the_entropy_to_leave_a_local_optimum(tmp_path, words, reward):
    summary, _ = train(tmp_path / "run", "--env", "matrix", "--task", "m-ne", "--num-seeds", 10, "--dataset", *words)
    assert summary["return"]["per_seed"] == [reward] * 10


REAL = SHARED / "alberdice_bridge_optimal"
WHERE_REAL = pytest.mark.skipif(not REAL.exists(), reason="the real dataset is not here")
BRIDGE = [LONG("optimal"), "mixed", pytest.param(str(REAL), id="real", marks=[WHERE_REAL, pytest.mark.long])]


@pytest.mark.parametrize("dataset", BRIDGE)
def test_bridge_is_crossed_by_five_of_five_seeds(tmp_path, dataset):
    summary, output = train(tmp_path / "run", "--dataset", dataset)
    assert all(value >= -1.2355 - 0.06 for value in summary["return"]["per_seed"])
    assert all(value >= -1.2355 - 0.1 for value in summary["sampled_return"]["per_seed"])
    assert summary["cloned_sampled_return"]["mean"] < -1.5  # what cloning alone reaches
    assert "behavioural cloning" in output and "best possible" in output
    folder = tmp_path / "run"
    for picture in ("curve.png", "policy.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == [step for step in range(0, 4001, 100) for _ in range(5)]
    config = json.loads((folder / "config.json").read_text())
    assert config["args"] == asdict(inspo.Args(dataset=dataset, out_dir=str(folder))) and config["git_commit"]


@pytest.mark.long
@pytest.mark.parametrize(
    "words, worse_than",
    [(("--no-resampling",), -1.5), (("--cql", 0), -1.5), (("--alpha", 0.1, "--cooldown", 0), -1.4)],
    ids=["no resampling", "no conservative term", "alpha too large"],
)
def test_bridge_needs_each_part(tmp_path, words, worse_than):
    """On the optimal data a cloned team samples about -1.85, InSPO -1.25; without one of its parts it stays behind."""
    words = ("--dataset", "optimal", "--steps", 1500, "--eval-every", 1500, *words)
    summary, _ = train(tmp_path / "run", *words)
    assert summary["sampled_return"]["mean"] < worse_than


@pytest.mark.parametrize("dataset", [LONG("neutral"), "unfavourable"])
def test_coordination_is_solved_whatever_the_data_prefer(tmp_path, dataset):
    words = ("--env", "matrix", "--task", "coordination", "--dataset", dataset, "--num-seeds", 10)
    summary, _ = train(tmp_path / "run", *words)
    assert summary["return"]["per_seed"] == [1.0] * 10 and summary["sampled_return"]["mean"] > 0.95


@pytest.mark.long
def test_a_table_of_three_agents_written_on_the_command_line(tmp_path):
    words = ("--env", "matrix", "--task", "[[[1, 0], [0, 0]], [[0, 0], [0, 1]]]", "--steps", 600, "--eval-every", 200)
    summary, _ = train(tmp_path / "run", *words)
    assert summary["return"]["mean"] > summary["dataset_return"] and summary["best_return"] == 1


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("words, said", [
    (("--env", "chess"), "unknown environment: choose --env bridge, matrix, smac"),
    (("--env", "halfcheetah"), "InSPO is for discrete actions: choose --env bridge, matrix, smac, or"),
    (("--env", "matrix", "--task", "chess"), "matrix has no task 'chess'"),
    (("--task", "wide"), "bridge has no task 'wide'"),
    (("--dataset", "expert"), "no dataset 'expert': choose optimal, mixed"),
    (("--dataset", "nowhere.h5"), "no dataset file nowhere.h5"),
    (("--num-seeds", "0"), "--num-seeds must be above 0"),
    (("--device", "tpu"), "unknown device 'tpu'"),
    (("--env", "smac", "--task", "chess"), "smac has no map 'chess'"),
    (("--out-dir", "/dev/null/run"), "/dev/null"),
    (("--out-dir", "/dev/null/run", "--dataset", "nowhere.h5"), "/dev/null"),  # before any data
    (("--num-seeds", "10000000"), "--num-seeds must be above 0 and at most 100000, not 10000000"),
    (("--out-dir", "/proc/run"), "/proc/run"),
    (("--resume", "--out-dir", "nowhere"), "no run to resume in nowhere"),
    (("--critic-lr", "1e30", "--clone-steps", "5", "--eval-every", "20"), "q_loss is not finite after 20 steps"),
    (("--env", "matrix", "--one-hot", "--task", "xor"), "add --no-one-hot"),
])  # fmt: skip
def test_bad_input_ends_in_one_line(tmp_path, words, said):
    out = () if "--out-dir" in words else ("--out-dir", tmp_path / "run")
    complains(command("algorithms/inspo.py", *words, *out), said)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize("words", [
    ("--hidden", "100000000"),
    ("--batch-size", "99999999999"),
    ("--clone-batch", "9223372036854775807"),
    ("--eval-episodes", "100000000000"),
    ("--num-seeds", "100000", "--hidden", "1000"),
])  # fmt: skip
def test_sizes_that_no_memory_holds_end_in_one_line(tmp_path, words):
    """On a machine of 4 GB, as it were: so the test does not fill the one that it runs on."""

    def little():
        resource.setrlimit(resource.RLIMIT_DATA, (4 * 10**9, 4 * 10**9))

    words = (*words, "--clone-steps", "1", "--eval-every", "1", "--out-dir", tmp_path / "run")
    complains(command("algorithms/inspo.py", *words, preexec_fn=little), "not enough memory: choose smaller sizes")


def test_a_folder_with_a_run_is_seen_before_any_data(tmp_path):
    """They may take hours to collect: a dataset that does not even exist is not asked for."""
    (tmp_path / "config.json").write_text("{}")
    words = ("--dataset", "nowhere.h5", "--out-dir", tmp_path)
    complains(command("algorithms/inspo.py", *words), f"{tmp_path} holds a run already: --resume goes on")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_ctrl_c_while_data_are_collected_names_no_folder(tmp_path, monkeypatch, capsys):
    """The folder is not this run's yet; nothing is left, neither there nor among the cached datasets."""
    steps = []

    def interrupted(*_):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*_)

    game = type(envs.make("smac", "3m", 1))
    step = game.step
    monkeypatch.setattr(game, "step", interrupted)
    monkeypatch.setattr(data.recipes, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(runs, "owned", None)  # other tests had runs in this process
    words = ["--env", "smac", "--task", "3m", "--episodes", "123", "--out-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        runs.launch(inspo.main, lambda: inspo.parse(words))
    assert end.value.code == 130 and capsys.readouterr().err.strip() == "interrupted"
    assert len(steps) >= 3 and not (tmp_path / "run").exists() and not list((tmp_path / "cache").glob("*"))


def damage(name):
    """A way to make a good file bad, by the name of the harm."""

    def nan(file):
        file["reward"][3, 0] = float("nan")

    def out_of_range(file):
        file["actions"][3, 0] = 7

    def wrong_shape(file):
        reward = file["reward"][:, :0]
        del file["reward"]
        file["reward"] = reward

    def empty(file):
        for key in list(file):
            array = file[key][:0]
            del file[key]
            file[key] = array

    def text(file):
        del file["reward"]
        file["reward"] = ["one", "two"]

    def missing(file):
        del file["obs"]

    return locals()[name]


@pytest.mark.parametrize(
    "harm, said",
    [
        ("nan", "reward holds NaN or infinite numbers"),
        ("out_of_range", "actions must lie in 0 .. 1; found 0 .. 7"),
        ("wrong_shape", "reward has shape (1000, 0)"),
        ("empty", "an empty dataset teaches nothing"),
        ("text", "reward holds object, not numbers"),
        ("missing", "lacks obs"),
    ],
)
def test_a_damaged_dataset_ends_in_one_line(tmp_path, harm, said):
    path = tmp_path / "xor.h5"
    data.write(data.collect_dataset("matrix", "xor", "all"), path)
    with h5py.File(path, "a") as file:
        damage(harm)(file)
    words = ("--env", "matrix", "--dataset", path, "--out-dir", tmp_path / "run")
    complains(command("algorithms/inspo.py", *words), "xor.h5", said)
    assert not (tmp_path / "run").exists()


def test_a_foreign_or_cut_dataset_ends_in_one_line(tmp_path):
    path = tmp_path / "xor.h5"
    data.write(data.collect_dataset("matrix", "xor", "all"), path)
    complains(command("algorithms/inspo.py", "--env", "bridge", "--dataset", path), "use --env matrix --task 'xor'")
    path.write_bytes(path.read_bytes()[:2000])
    complains(command("algorithms/inspo.py", "--env", "matrix", "--dataset", path), "xor.h5 is damaged")


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    script = ROOT / "algorithms" / "inspo.py"
    words = "--env matrix --steps 2 --eval-every 2 --eval-episodes 1 --clone-steps 2".split()
    together = [
        subprocess.Popen([sys.executable, script, *words], cwd=tmp_path, stdout=subprocess.PIPE) for _ in range(3)
    ]
    assert [process.communicate(timeout=120) and process.returncode for process in together] == [0, 0, 0]
    assert len(list((tmp_path / "runs" / "inspo").glob("*/summary.json"))) == 3  # and from another working folder


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    words = ("--env", "matrix", "--steps", 4, "--eval-every", 2, "--clone-steps", 2, "--out-dir", tmp_path / "run")
    train(tmp_path / "run", *words[:-2])
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    complains(command("algorithms/inspo.py", *words), "holds a run already: --resume goes on")
    complains(
        command("algorithms/inspo.py", "--resume", "--out-dir", tmp_path / "run", "--alpha", 1),
        "begun with --alpha 0.02",
    )
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    resume = ("algorithms/inspo.py", "--resume", "--out-dir", tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    complains(command(*resume), "checkpoint.pt is damaged")
    torch.save({"team": {}}, tmp_path / "run" / "checkpoint.pt")
    complains(command(*resume), "checkpoint.pt is of another run")
    (tmp_path / "run" / "config.json").write_text('{"args": {"alpha": 1}}')
    complains(command(*resume), "config.json is damaged, or of another version")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands in for a full disk: the config fits, the checkpoint does not."""
    words = ("--env", "matrix", "--steps", 4, "--eval-every", 2, "--clone-steps", 2, "--out-dir", tmp_path / "run")
    limited = command(
        "algorithms/inspo.py", *words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    )
    complains(limited, "File too large")
    assert not list((tmp_path / "run").glob("*.part")) and not (tmp_path / "run" / "checkpoint.pt").exists()
    assert command("algorithms/inspo.py", "--resume", "--out-dir", tmp_path / "run").returncode == 0


def test_tracking_without_the_package_says_so(tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError")  # as if it were not installed, wherever this runs
    hidden = os.environ | {"PYTHONPATH": str(tmp_path)}
    complains(command("algorithms/inspo.py", "--track", "--out-dir", tmp_path / "run", env=hidden), "pip install wandb")
    assert not (tmp_path / "run").exists()
