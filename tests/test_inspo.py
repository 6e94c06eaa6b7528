"""InSPO: its losses and sweeps by slow loops, the propositions on tables, the paper's claims."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, load_script
from tabular import boltzmann, evaluate, local_q, one_state_operator, random_game, sweep

from data import layout, load

inspo = load_script("inspo")
S, B, N, A, D, O = 2, 7, 3, 4, 5, 6
LENGTHS = (2, 5, 3, 4, 1, 5)  # of the episodes, in steps


def streams(count=S, seed=0):
    return [torch.Generator().manual_seed(seed + s) for s in range(count)]


# ---------------------------------------------------------------- the losses, number by number
def test_the_losses_are_equations_15_20_and_24(float64):
    """Some actions are not available, some weights beyond their cap, some places no steps."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(S, B, *shape, generator=g).requires_grad_()

    avail = torch.rand(S, B, A, generator=g) > 0.3
    avail[..., 1] = True
    action = (torch.rand(S, B, A, generator=g) * avail).argmax(-1)
    log_pi, log_mu = (normal(A).masked_fill(~avail, inspo.ILLEGAL).log_softmax(-1) for _ in "12")
    log_mu = log_mu.detach().clamp(min=-20)
    done, valid = ((torch.rand(S, B, generator=g) > 0.4).double() for _ in range(2))
    q, reward, alpha, beta = normal(A), normal(), torch.tensor([[0.1], [2.0]]), torch.tensor(0.3)

    y = inspo.soft_target(q, log_pi, log_mu, reward, done, alpha, beta, 0.9)
    q_loss = inspo.critic_loss(q, y, action, avail, torch.tensor(0.7))
    weight = inspo.policy_weight(q, log_mu, action, avail, alpha, beta, cap=1.5)
    pi_loss, kl = inspo.policy_loss(log_pi, log_mu, action, weight, valid)
    assert not (y.requires_grad or weight.requires_grad or kl.requires_grad)
    assert (weight == 1.5).any()
    for s in range(S):
        a, T, sums = alpha[s, 0].item(), alpha[s, 0].item() + 0.3, [0.0, 0.0, 0.0]
        for b in range(B):
            legal, taken = avail[s, b].nonzero()[:, 0].tolist(), action[s, b].item()
            pi, mu, value = (
                log_pi[s, b].exp().tolist(),
                log_mu[s, b].exp().tolist(),
                q[s, b].tolist(),
            )
            soft = sum(pi[k] * (value[k] - 0.3 * math.log(pi[k])) for k in legal)
            divergence = sum(pi[k] * math.log(pi[k] / mu[k]) for k in legal)
            target = reward[s, b].item() + 0.9 * (1 - done[s, b].item()) * (soft - a * divergence)
            assert y[s, b].item() == pytest.approx(target, rel=1e-12)
            gap = math.log(sum(math.exp(value[k]) for k in legal)) - value[taken]
            sums[0] += ((value[taken] - target) ** 2 + 0.7 * gap) / B
            terms = {k: mu[k] ** (a / T) * math.exp(value[k] / T) for k in legal}
            equation_12 = terms[taken] / sum(terms.values())
            assert weight[s, b].item() == pytest.approx(
                min(1.5, equation_12 / mu[taken]), rel=1e-10
            )
            if valid[s, b]:
                sums[1] -= weight[s, b].item() * math.log(pi[taken]) / valid[s].sum().item()
                sums[2] += divergence / valid[s].sum().item()
        found = [x[s].item() for x in (q_loss, pi_loss, kl)]
        assert found == pytest.approx(sums, rel=1e-10)


def test_the_ratio_is_equation_23(float64):
    g = torch.Generator().manual_seed(0)
    log_pi, log_mu = (torch.log(torch.rand(S, B, 3, generator=g)) for _ in range(2))
    found = inspo.importance_ratio(log_pi.sum(-1), log_mu.sum(-1), 4, cap=1.5)
    for s, b in itertools.product(range(S), range(B)):
        product = math.prod((log_pi[s, b] - log_mu[s, b]).exp().tolist())
        assert found[s, b].item() == pytest.approx(min(product ** (1 / 3), 1.5), rel=1e-12)
    assert (found == 1.5).any() and (found < 1.5).any()


@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-6, 7e5])
def test_what_has_ratio_0_is_never_drawn(scale):
    """Not at u = 0 either, nor at a border, nor at the largest number that `torch.rand` makes."""
    ratio = scale * torch.tensor([[0, 0, 1, 0, 2, 0, 0, 1, 0], [0, 4, 0, 0, 0, 0, 0, 0, 0]])
    u = torch.tensor([0, 2.0**-24, 0.25, 0.5, 0.75, 1 - 2.0**-24]).expand(2, -1)
    drawn = inspo.resample(ratio, u)
    assert (ratio.gather(1, drawn) > 0).all()
    assert drawn[0, [0, 1, 3, 5]].tolist() == [2, 2, 4, 7] and (drawn[1] == 1).all()


# ---------------------------------------------------------------- one seed, slowly
def alone(module, s):
    """Seed s of a network, on torch's own layers."""
    if isinstance(module, inspo.Linear):
        single = torch.nn.Linear(*module.weight.shape[1:])
        single.weight.data = module.weight[s].detach().T.clone()
        single.bias.data = module.bias[s, 0].detach().clone()
        return single
    if isinstance(module, inspo.Policy):
        return AlonePolicy(module, s) if module.hidden else alone(module.body, s)
    if isinstance(module, torch.nn.Sequential):
        return torch.nn.Sequential(*(alone(layer, s) for layer in module))
    return module


class AlonePolicy(torch.nn.Module):
    """Seed s of a policy with a memory: the logits along one episode, (L, I) -> (L, A)."""

    def __init__(self, policy, s):
        super().__init__()
        self.encoder, self.head = alone(policy.encoder, s), alone(policy.head, s)
        self.gru, gru = torch.nn.GRU(*policy.gru.state.shape[1:2] * 2), policy.gru
        for name, part in (("ih", gru.input), ("hh", gru.state)):
            getattr(self.gru, f"weight_{name}_l0").data = part[s].detach().T.clone()
        for name, part in (("ih", gru.input_bias), ("hh", gru.state_bias)):
            getattr(self.gru, f"bias_{name}_l0").data = part[s, 0].detach().clone()

    def forward(self, x):
        return self.head(self.gru(self.encoder(x))[0])


MODULES = "mus", "critics", "targets", "policies"


class Slow:
    """One seed of a team that learns in plain loops, on torch's own layers and optimisers."""

    def __init__(self, team, data, args, s):
        self.data, self.args = data, args
        for name in MODULES:
            setattr(self, name, [alone(module, s) for module in getattr(team, name)])
        self.teammates = alone(team.teammates, s)
        self.log_alpha = team.log_alpha[0][s, 0].detach().clone().requires_grad_()
        self.adams = {}
        self.seen = set()  # what happened, or it was not tested
        self.begins = [*data.first.nonzero()[:, 0].tolist(), len(data.obs)]

    def tables(self, policies):
        """log-probabilities (R, A) of each agent, -inf where barred, every episode by itself."""
        tables = []
        for i, policy in enumerate(policies):
            spans = zip(self.begins, self.begins[1:])
            logits = torch.cat([policy(self.data.obs[begin:end, i]) for begin, end in spans])
            tables.append(logits.masked_fill(~self.data.avail[:, i], -torch.inf).log_softmax(-1))
        return tables

    def log_others(self, row, i, log_mu):
        """Eq. 22 of the joint action in a row."""
        total, actions = 0.0, self.data.actions[row]
        for j in [j for j in range(N) if j != i]:
            known = torch.zeros(N, A)
            for k in range(N):
                if k == i or k < j:
                    known[k, actions[k]] = 1
            x = torch.cat([self.data.state[row], torch.eye(N)[j], known.flatten()])
            logits = self.teammates(x)
            if self.args.recurrent:
                logits = logits + log_mu[j][row].detach()
            logits = logits.masked_fill(~self.data.avail[row, j], -torch.inf)
            total = total + logits.log_softmax(-1)[actions[j]]
        return total

    def draw(self, generator, count):
        """The places of some sequences: pairs of a row where a step may begin and the next."""
        sequences = self.data.sequences
        drawn = [int(u * len(sequences)) for u in torch.rand(count, generator=generator).tolist()]
        sequences = [sequences[q].tolist() for q in drawn]
        self.seen |= {"padding"} if len(self.data.obs) - 1 in sum(sequences, []) else set()
        return [(x[t], x[t + 1]) for t in range(len(sequences[0]) - 1) for x in sequences]

    def resample(self, places, ratios, generator, count):
        noise = torch.rand(count, generator=generator).tolist()
        sums = list(itertools.accumulate(ratios))
        return [next(place for place, x in zip(places, sums) if x > u * sums[-1]) for u in noise]

    def step(self, name, parameters, loss, lr):
        parameters = list(parameters)
        if name not in self.adams:
            self.adams[name] = torch.optim.Adam(parameters)
        self.adams[name].param_groups[0]["lr"] = lr
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        self.adams[name].step()

    # ------------------------------------------------------------ cloning
    def clone(self, generator):
        args = self.args
        models = [x for model in (*self.mus, self.teammates) for x in model.parameters()]
        for _ in range(args.clone_steps):
            places = self.draw(generator, args.sequences if args.recurrent else args.clone_batch)
            log_mu, loss = self.tables(self.mus), 0.0
            steps = [row for row, _ in places if self.data.acted[row]]
            for row, i in itertools.product(steps, range(N)):
                loss = loss - log_mu[i][row, self.data.actions[row, i]] / len(steps)
            if args.recurrent:
                acted = [self.data.acted[row].item() for row, _ in places]
                places = self.resample(places, acted, generator, args.clone_batch)
            for (row, _), i in itertools.product(places, range(N)):
                loss = loss - self.log_others(row, i, log_mu) / len(places)
            self.step("clone", models, loss, args.clone_lr)

    def tabulate(self):
        with torch.no_grad():
            self.log_mu, rows = self.tables(self.mus), self.data.acted.nonzero()[:, 0].tolist()
            self.log_mu_others = torch.zeros(N, len(self.data.obs))
            for row, i in itertools.product(rows, range(N)):
                self.log_mu_others[i, row] = self.log_others(row, i, self.log_mu)

    # ------------------------------------------------------------ a sweep
    def update(self, generator, order, beta, fade, pace, improve):
        """Returns the logs' means over the turns."""
        args, logs = self.args, []
        before = [x.detach() for x in self.tables(self.policies)]
        for t, i in enumerate([i for i in order for _ in range(args.inner)]):
            if t == 0 or not args.recurrent:
                places = self.draw(generator, args.sequences if args.recurrent else args.batch_size)
            now = self.tables(self.policies)
            log_pi = [x.detach() for x in now] if args.sequential else before
            alpha = self.alpha(fade)
            ratios = [self.ratio(i, row, log_pi) for row, _ in places]
            drawn = self.resample(places, ratios, generator, args.batch_size)
            if not (args.resampling or args.recurrent):
                drawn = places

            loss = self.critic_loss(i, drawn, log_pi[i], alpha, beta, args.cql * fade)
            log = {"q_loss": loss.item()}
            self.step(f"q{i}", self.critics[i].parameters(), loss, pace * args.critic_lr)
            with torch.no_grad():
                for old, new in zip(self.targets[i].parameters(), self.critics[i].parameters()):
                    old += args.tau * (new - old)
            if improve:
                places_of_pi = drawn if args.actor_data == "resampled" else places
                rows = [row for row, _ in places_of_pi if self.data.acted[row]]
                loss, kl = self.policy_loss(i, rows, now[i], alpha, beta)
                log |= {"policy_loss": loss.item(), "kl": kl}
                self.step(f"pi{i}", self.policies[i].parameters(), loss, pace * args.policy_lr)
                if args.auto_alpha:
                    loss = self.log_alpha.exp() * (args.kl_target - kl)
                    self.step("alpha", [self.log_alpha], loss, 1e-3)
            logs.append(log)
        means = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
        return means | {"alpha": self.alpha(fade)}

    def alpha(self, fade):
        return self.log_alpha.exp().item() * (1 if self.args.auto_alpha else fade)

    def ratio(self, i, row, log_pi):
        if not self.data.acted[row]:
            return 0.0
        if not self.args.resampling:
            return 1.0
        log_ratio = -self.log_mu_others[i, row].item()
        for j in [j for j in range(N) if j != i]:
            log_ratio += log_pi[j][row, self.data.actions[row, j]].item()
        ratio = math.exp(log_ratio / (N - 1))
        self.seen.add("capped ratio" if ratio > self.args.ratio_cap else "free ratio")
        return min(ratio, self.args.ratio_cap)

    def critic_loss(self, i, drawn, log_pi, alpha, beta, cql):
        data, total = self.data, 0.0
        for row, after in drawn:
            q_next, value = self.targets[i](data.state[after]).tolist(), 0.0
            for a in data.avail[after, i].nonzero()[:, 0].tolist():
                log_p = log_pi[after, a].item()
                price = alpha * (log_p - self.log_mu[i][after, a].item()) + beta * log_p
                value += math.exp(log_p) * (q_next[a] - price)
            self.seen.add(
                "end" if data.done[row] else "time limit" if not data.acted[after] else ""
            )
            y = data.reward[row].item()
            if not data.done[row]:
                y += self.args.gamma * value
            q = self.critics[i](data.state[row])
            taken = q[data.actions[row, i]]
            gap = q[data.avail[row, i]].logsumexp(0) - taken
            total = total + (taken - y) ** 2 + cql * gap
        return total / len(drawn)

    def policy_loss(self, i, rows, log_pi, alpha, beta):
        data, T, total, divergence = self.data, alpha + beta, 0.0, 0.0
        for row in rows:
            legal, a = data.avail[row, i].nonzero()[:, 0].tolist(), data.actions[row, i].item()
            q, mu = self.targets[i](data.state[row]).tolist(), self.log_mu[i][row].tolist()
            z = sum(math.exp((q[k] + alpha * mu[k]) / T) for k in legal)
            weight = math.exp((q[a] - beta * mu[a]) / T) / z
            self.seen.add("capped weight" if weight > self.args.weight_cap else "free weight")
            total = total - min(weight, self.args.weight_cap) * log_pi[row, a]
            for k in legal:
                log_p = log_pi[row, k].item()
                divergence += math.exp(log_p) * (log_p - mu[k])
        return total / len(rows), divergence / len(rows)

    def semi_greedy(self, places):
        """The sums of |Q'_i(s,a_i) - E_pi Q'_i(s,.)| over the steps of a minibatch."""
        sums = torch.zeros(N)
        for i, log_pi in enumerate(self.tables(self.policies)):
            for row in [row for row, _ in places if self.data.acted[row]]:
                q = self.targets[i](self.data.state[row])
                sums[i] += (q[self.data.actions[row, i]] - log_pi[row].exp() @ q).abs().item()
        return sums

    def check(self, team, s, atol=1e-9):
        """Every network of the team is this one."""
        pairs = [(self.teammates, team.teammates)]
        for name in MODULES:
            pairs += zip(getattr(self, name), getattr(team, name), strict=True)
        for slow, fast in pairs:
            for one, other in zip(slow.parameters(), alone(fast, s).parameters(), strict=True):
                assert torch.allclose(one, other, rtol=0, atol=atol)
        assert self.log_alpha.item() == pytest.approx(team.log_alpha[0][s, 0].item(), abs=1e-9)


def make_team(recurrent=False, lengths=LENGTHS, **changes):
    """Random episodes, in which actions are barred, and a team that has moved: team, data, args."""
    sizes = dict(hidden=5, batch_size=6, sequences=3, clone_batch=5, num_seeds=S)
    args = inspo.Args(recurrent=recurrent, **sizes | changes)
    lengths, g = torch.tensor(lengths), torch.Generator().manual_seed(1)
    R = int((lengths + 1).sum()) + 1
    ends = (lengths + 1).cumsum(0) - 1
    acted = torch.ones(R)
    acted[ends], acted[-1] = 0, 0
    avail = torch.rand(R, N, A, generator=g) > 0.3
    avail[..., 1], avail[-1] = True, True
    actions = (torch.rand(R, N, A, generator=g) * avail).argmax(-1) * acted[:, None].long()
    first = torch.cat([torch.ones(1), 1 - acted[:-1]]).bool()
    done = torch.zeros(R)
    done[ends[::2] - 1] = 1  # the other episodes met a time limit
    pairs = layout.pairs(acted.nonzero()[:, 0])
    data = inspo.Data(
        obs=torch.randn(R, N, O, generator=g),
        state=torch.randn(R, D, generator=g),
        avail=avail,
        actions=actions,
        reward=torch.randn(R, generator=g) * acted,
        done=done,
        acted=acted,
        first=first,
        sequences=layout.pack(lengths + 1, R - 1) if recurrent else pairs,
    )
    team = inspo.Team(data, args, streams())
    for module in (team.policies, team.targets, team.mus):
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=g)
    return team, data, args


SWEEPS = {  # what is special about it
    "memory": dict(recurrent=True, auto_alpha=True),
    "memory, semi-greedy": dict(recurrent=True, order="semi-greedy", actor_data="resampled"),
    "memory, all at once": dict(recurrent=True, sequential=False),
    "memory, no resampling": dict(recurrent=True, resampling=False, order="fixed"),
    "memory, warm-up": dict(recurrent=True, warmup=99, inner=2),
    "views": dict(actor_data="resampled", inner=2),
    "views, all at once": dict(sequential=False, auto_alpha=True),
    "views, no resampling": dict(resampling=False, order="fixed"),
    "views, semi-greedy": dict(order="semi-greedy"),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_are_slow_loops(float64, name):
    """Two sweeps, in which ratios and weights are beyond their caps, in a late part of a run."""
    late = dict(steps=10, cooldown=0.8, beta=0.5, beta_end=0.1, beta_hold=2, alpha=0.4, cql=1.4)
    caps = dict(ratio_cap=1.3, weight_cap=1.1, gamma=0.9, policy_lr=0.02, critic_lr=0.03)
    team, data, args = make_team(**late, **caps, **SWEEPS[name])
    if args.warmup:
        team.policies.load_state_dict(team.mus.state_dict())
    close = 1e-6 if args.warmup else 1e-9  # then a barred action has e^-20 in the tables
    data = inspo.tabulate(team, data, args)
    slow = [Slow(team, data, args, s) for s in range(S)]
    adam, shared, again = inspo.optimizer(team), *streams(2, 9)
    again.set_state(shared.get_state())
    fast_generators, slow_generators = streams(), streams()
    for one in slow:
        one.tabulate()
    for step, fade, pace in ((4, 0.1**0.5, 1.0), (7, 0.1, 0.75)):  # cooling, and slowing down
        logs = inspo.update(team, adam, data, shared, fast_generators, step, args)
        order = torch.randperm(N, generator=again).tolist() if args.order != "fixed" else [0, 1, 2]
        if args.order == "semi-greedy":
            count = args.sequences if args.recurrent else args.batch_size
            pairs = zip(slow, slow_generators)
            best = int(sum(one.semi_greedy(one.draw(g, count)) for one, g in pairs).argmax())
            second = [i for i in order if i != best][0]
            order = [best, second, *({0, 1, 2} - {best, second})]
        beta = 0.5 * 0.2 ** ((step - 2) / 7)
        for s, (one, g) in enumerate(zip(slow, slow_generators)):
            expected = one.update(g, order, beta, fade, pace, not args.warmup)
            assert logs.keys() == expected.keys()
            for key, value in expected.items():
                assert logs[key][s].item() == pytest.approx(value, rel=close), key
            one.check(team, s, close)
    wanted = {"end", "time limit"} | ({"padding"} if args.recurrent else set())
    wanted |= {"free ratio", "capped ratio"} if args.resampling else set()
    wanted |= set() if args.warmup else {"free weight", "capped weight"}
    assert slow[0].seen | slow[1].seen >= wanted


@pytest.mark.parametrize("recurrent", [True, False])
def test_cloning_is_a_slow_loop(float64, recurrent):
    """Eqs. 21 and 22: mu_i learns from its own loss only, and the policies begin as the clones."""
    team, data, args = make_team(recurrent, clone_steps=3, clone_lr=0.02)
    slow = [Slow(team, data, args, s) for s in range(S)]
    tables = inspo.clone(team, data, streams(), args)
    for policy, mu in zip(team.policies.parameters(), team.mus.parameters()):
        assert torch.equal(policy, mu)
    acted = data.acted.bool()
    for s, (one, generator) in enumerate(zip(slow, streams())):
        one.clone(generator)
        one.policies = one.mus
        one.check(team, s)
        one.tabulate()
        for i in range(N):
            log_mu = one.log_mu[i][:-1].clamp(min=-20)
            assert torch.allclose(tables.log_mu[i][s, :-1], log_mu, rtol=0, atol=1e-9)
            others = tables.log_mu_others[i][s, acted]
            assert torch.allclose(others, one.log_mu_others[i, acted], rtol=0, atol=1e-9)


# ---------------------------------------------------------------- early stopping
def test_whole_episodes_are_held_back(float64):
    _, data, _ = make_team(lengths=(1, 2) * 10)  # 30 steps
    episode = (data.first.cumsum(0) - 1)[data.sequences[:, 0]]
    for share, most, every in ((0.25, 5000, 4), (0.25, 3, 10), (0.9, 5000, 2)):
        learned, held = inspo.hold_back(data, share, most)
        assert torch.equal(held, data.sequences[episode % every == 0])
        assert torch.equal(learned, data.sequences[episode % every > 0])
    _, single, _ = make_team(lengths=(4,))
    for given, share in ((data, 0.0), (single, 0.5)):
        learned, held = inspo.hold_back(given, share)
        assert torch.equal(learned, given.sequences) and len(held) == 0


def test_each_seed_keeps_the_clones_that_held_back_episodes_like_best(monkeypatch):
    """Seed 0 is best at the 2nd check, then waits too long for its 7th; seed 1 at the 4th."""
    losses = torch.tensor([[3.0, 1, 4, 4, 4, 4, 0, 9, 9], [5.0, 4, 4, 2, 3, 2, 3, 3, 0]])
    team, data, args = make_team(True, clone_steps=5000, hold_back=0.3)
    _, held = inspo.hold_back(data, 0.3)
    calls, (model, *_) = [], team.teammates.parameters()

    def pretend(team, models, adam, data, rows, args, noise):  # to learn
        assert not torch.isin(rows[:, 0], held[:, 0]).any()
        calls.append(1)
        model.copy_(torch.tensor(float(len(calls))))

    def loss(team, data, rows, args, noise):
        assert torch.equal(rows, held.mT.expand(S, -1, -1)) and noise.shape == (S, 5)
        return losses[:, -(-len(calls) // 250) - 1]

    monkeypatch.setattr(inspo, "clone_loss", loss)
    inspo.clone(team, data, streams(), args, pretend)
    assert len(calls) == 2000  # seed 1 is done at the 8th check
    assert (model[0] == 500).all() and (model[1] == 1000).all()
    calls.clear()
    inspo.clone(team, data, streams(), inspo.Args(**vars(args) | {"clone_steps": 300}), pretend)
    assert (model == 300).all()  # the last update is judged, too


# ---------------------------------------------------------------- networks, and how a team plays
def test_networks_begin_as_torchs_own():
    layer, gru = inspo.Linear(16, 300, streams()), inspo.GRU(7, 16, streams())
    for parameter in (*layer.parameters(), *gru.parameters()):
        assert 0.9 / 4 < parameter.abs().max() <= 1 / 4 and parameter.std() > 0.5 / 4
        assert not torch.equal(parameter[0], parameter[1])


def test_beta_is_held_and_falls_and_the_end_cools():
    team, data, args = make_team(steps=101, cooldown=0.4, beta=0.5, beta_end=0.02, beta_hold=40)
    adam, found = inspo.optimizer(team), {}
    for step in (0, 40, 60, 70, 80, 90, 100):
        inspo.schedule(team, adam, step, args)
        rates = [group["lr"] for group in adam.param_groups]
        found[step] = team.beta.item(), team.fade.item(), rates[0] / args.critic_lr
        assert team.alpha(args)[0, 0].item() == pytest.approx(0.02 * team.fade.item())
        assert rates[2] == 1e-3 and rates[1] / args.policy_lr == pytest.approx(found[step][2])
    betas, fades, paces = zip(*found.values())
    logs = [math.log(beta / 0.5) / math.log(0.04) for beta in betas]
    assert logs == pytest.approx([0, 0, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1], abs=1e-6)
    assert fades == pytest.approx((1, 1, 1, 0.1 ** (9.4 / 20.2), 0.1 ** (19.4 / 20.2), 0.1, 0.1))
    assert paces == pytest.approx((1, 1, 1, 1, 1, 11 / 20.2, 1 / 20.2))
    inspo.schedule(team, adam, 0, inspo.Args(cooldown=0, beta=0, steps=1))
    assert team.beta == 0 and team.fade == 1 and adam.param_groups[0]["lr"] == args.critic_lr


@pytest.mark.parametrize("recurrent", [True, False])
def test_a_team_plays_as_it_learned(float64, recurrent):
    """In a game the memory and the last action go with the agents, as along a sequence."""
    L, width = 5, A if recurrent else 0
    args = inspo.Args(hidden=8, recurrent=recurrent)
    policies = [inspo.Policy(O + width, A, args, streams(seed=10 * i)) for i in range(N)]
    for parameter in itertools.chain(*(policy.parameters() for policy in policies)):
        parameter.data *= 3  # so that memory matters

    def encode(obs, last):
        return torch.cat([obs, last[..., :width]], -1)

    player = inspo.player(torch.nn.ModuleList(policies), encode)
    obs, avail = torch.randn(L, S, B, N, O), torch.rand(L, S, B, N, A) > 0.4
    avail[..., 1] = True
    for clocks in (torch.ones(L, S, B, N, A), torch.rand(L, S, B, N, A)):  # greedy, and sampled
        memory, last = torch.zeros(S, B, N, player.memory), torch.zeros(S, B, N, A)
        inputs, played = [], []
        for t in range(L):
            inputs.append(encode(obs[t], last))
            chance = None if (clocks == 1).all() else clocks[t]
            action, memory = player.act(obs[t], avail[t], memory, chance)
            played.append(action)
            last = F.one_hot(action, A).double()
        x, known = torch.stack(inputs, 1).flatten(1, 2), avail.transpose(0, 1).flatten(1, 2)
        first, h = torch.zeros(S, L, B, dtype=torch.bool), torch.zeros(S, B, 8)
        for i, policy in enumerate(policies):
            log_pi, _ = policy(x[:, :, i], known[:, :, i], first, h)  # (S, L B, A)
            values = log_pi.unflatten(1, (L, B)).transpose(0, 1) - clocks[..., i, :].log()
            assert torch.equal(values.argmax(-1), torch.stack(played)[..., i])


# ---------------------------------------------------------------- the propositions, on tables
@pytest.mark.parametrize("seed", range(2))
def test_propositions_3_and_4_on_tables(seed):
    game, alpha, beta, gamma = random_game(seed), 0.2, 0.3, 0.9
    pi = [torch.full_like(m, 1 / 3) for m in game[2]]
    value, _ = evaluate(game, pi, alpha, beta, gamma)
    for k in range(300):
        pi = sweep(game, pi, alpha, beta, gamma, order=(0, 1) if k % 2 else (1, 0))
        improved, Q = evaluate(game, pi, alpha, beta, gamma)
        assert (improved >= value - 1e-10).all()  # Proposition 4: no state ever gets worse
        value = improved
    for i in range(2):  # Proposition 3: at the limit, Eq. 12 holds
        best = boltzmann(local_q(Q, pi, i), game[2][i], alpha, beta)
        assert torch.allclose(pi[i], best, atol=1e-9)
    g = torch.Generator().manual_seed(seed)
    for i in range(2):  # Eq. 11: no agent gains by leaving alone
        for _ in range(20):
            other = list(pi)
            noise = torch.randn(pi[i].shape, generator=g, dtype=torch.float64)
            other[i] = torch.softmax(pi[i].log() + noise, -1)
            assert (evaluate(game, other, alpha, beta, gamma)[0] <= value + 1e-9).all()


XOR = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
AA_AB_BA = torch.tensor([[1, 1], [1, 0]], dtype=torch.float64) / 3


@pytest.mark.parametrize("see, reward", [("now", 1.0), ("before", 0.0), ("nothing", 0.0)])
def test_the_exact_operator_on_xor(see, reward):
    """With exact values, turns find a convention, and simultaneous updates miss it."""
    pi = [AA_AB_BA.sum(1), AA_AB_BA.sum(0)]
    for _ in range(4):
        pi = one_state_operator(AA_AB_BA, XOR, pi, alpha=0.05, beta=0.0, see=see)
    assert (pi[0] @ XOR @ pi[1]).item() == pytest.approx(reward, abs=1e-3)


# ---------------------------------------------------------------- what it comes to
def learn(dataset, **changes):
    """Train on what two agents did in one state, in a loop of our own: joint policies (S, A, A)."""
    args = inspo.Args(one_hot=False, cooldown=0.0, **changes)
    data, _ = inspo.arrange(dataset, args)
    generators, shared = streams(args.num_seeds), torch.Generator().manual_seed(0)
    team = inspo.Team(data, args, generators)
    adam = inspo.optimizer(team)
    data = inspo.clone(team, data, generators, args)
    for step in range(args.steps):
        inspo.update(team, adam, data, shared, generators, step, args)
    rows = torch.zeros(args.num_seeds, 1, 1, dtype=torch.int64)
    pi = inspo.unroll_all(team.policies, rows, data)[:, :, 0].exp().detach()
    return pi[0][:, :, None] * pi[1][:, None, :]


def test_xor_is_solved_by_five_of_five_seeds():
    quick = dict(steps=150, hidden=32, layers=1, clone_steps=100)
    rates = dict(policy_lr=1e-2, critic_lr=2e-2, clone_lr=1e-2)
    joint = learn(load("matrix", "xor", "aa-ab-ba"), **inspo.CONVENTION | quick | rates)
    assert (torch.maximum(joint[:, 0, 1], joint[:, 1, 0]) > 0.9).all(), joint


@pytest.mark.long
def test_training_ends_at_the_tables_fixed_point():
    """With constant alpha and beta and no conservative term: the quantal response equilibrium."""
    payoff = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    dataset = load("matrix", json.dumps(payoff.tolist()), "[0.5, 0.3, 0.2]")
    weights = dict(alpha=1.0, beta=1.0, beta_end=1.0, cql=0.0)
    found = learn(dataset, num_seeds=1, steps=1500, **weights)[0]
    counts = F.one_hot(dataset.actions[:, 0]).double()  # (E, N, A)
    pi = mu = list(counts.mean(0)[:, None])
    game = torch.ones(1, 3, 3, 1, dtype=torch.float64), payoff[None].double(), mu
    for _ in range(500):
        pi = sweep(game, pi, 1.0, 1.0, gamma=0.0)
    assert torch.allclose(found.double(), pi[0].T * pi[1], atol=0.03)


def train(folder, words):
    return inspo.main(inspo.parse([*words.split(), "--out-dir", str(folder / "run")]))


TEN = "--env matrix --num-seeds 10 "
LINEAR = "--layers 0 --inner 150 --steps 9 --eval-every 9 --policy-lr 0.05 --critic-lr 0.05 "
LINEAR += "--clone-lr 0.05 --actor-data uniform"


@pytest.mark.long
@pytest.mark.parametrize(
    "words, reward",
    [
        ("--task xor --dataset ab", 1),
        ("--task xor --dataset ab-ba", 1),
        ("--task xor", 1),
        ("--task xor --dataset all", 1),
        ("--task xor --no-resampling", 0),
        (f"--task xor {LINEAR}", 1),
        (f"--task xor {LINEAR} --no-sequential", 0),
        ("--task coordination --dataset neutral", 1),
        ("--task coordination", 1),
        ("--task m-ne --dataset balanced", 20),
        ("--task m-ne", 20),
        ("--task m-ne --beta 0", 5),
    ],
)
def test_matrix_games_end_as_the_page_says(tmp_path, words, reward):
    assert train(tmp_path, TEN + words)["return"]["per_seed"] == [reward] * 10


DATASETS = ["optimal", "mixed", *map(str, SHARED.glob("alberdice_bridge_optimal"))]


@pytest.mark.long
@pytest.mark.parametrize("dataset", DATASETS)
def test_bridge_is_crossed_by_five_of_five_seeds(tmp_path, dataset):
    summary = train(tmp_path, f"--dataset {dataset}")
    assert all(value >= -1.2355 - 0.06 for value in summary["return"]["per_seed"])
    assert all(value >= -1.2355 - 0.1 for value in summary["sampled_return"]["per_seed"])
    assert summary["cloned_sampled_return"]["mean"] < -1.5
    assert (tmp_path / "run" / "policy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.parametrize("words", ["--no-resampling", "--cql 0", "--alpha 0.1 --cooldown 0"])
def test_bridge_needs_each_part(tmp_path, words):
    words = f"--dataset optimal --steps 1500 --eval-every 1500 {words}"
    assert train(tmp_path, words)["sampled_return"]["mean"] < -1.4


# ---------------------------------------------------------------- the command line
def test_presets_are_in_units_of_the_payoffs():
    args = inspo.parse(["--env", "matrix", "--task", json.dumps([[0, 0], [0, 40]])])
    assert (args.alpha, args.beta, args.beta_end, args.cql) == pytest.approx((0.2, 40, 0.02, 1))
    args = inspo.parse(["--env", "matrix", "--alpha", "0.3"])
    assert (args.task, args.dataset, args.alpha, args.beta) == ("xor", "aa-ab-ba", 0.3, 0.1)


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="discrete"):
        inspo.parse(["--env", "reacher"])
    with pytest.raises(ValueError, match="clone-lr"):
        inspo.parse(["--clone-lr", "0"])
