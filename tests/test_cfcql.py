"""CFCQL: its losses against slow loops over episodes, its identities, where it fails as it must, and the script."""

import csv
import itertools
import json
import math

import pytest
import torch
from conftest import command, complains, load_script, refuses

import data
from data import runs

cfcql = load_script("cfcql")

S, N, A, O, D = 2, 3, 4, 5, 6
UNEVEN = 2, 5, 3, 4, 1, 5


def streams(count=S, purpose=1):
    return [runs.stream(s, purpose) for s in range(count)]


def random_dataset(lengths=UNEVEN, num_agents=N):
    """Random episodes: some are cut off and some end, actions are barred by chance, and agents die on the way."""
    g = torch.Generator().manual_seed(0)
    E, T = len(lengths), max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    seen = torch.cat([torch.ones(E, 1, dtype=torch.bool), mask], 1)
    avail = torch.rand(E, T + 1, num_agents, A, generator=g) > 0.3
    avail[..., 1] = True
    avail[torch.arange(T + 1)[:, None] >= torch.randint(1, 2 * T, (E, 1, num_agents), generator=g)] = (
        torch.arange(A) == 0  # as in StarCraft: the dead do nothing
    )
    actions = (torch.rand(E, T, num_agents, A, generator=g) * avail[:, :-1]).argmax(-1)
    last = mask & ~torch.cat([mask[:, 1:], ~seen[:, :1]], 1)
    obs, state = (torch.randn(E, T + 1, *size, generator=g, dtype=torch.float32) for size in ((num_agents, O), (D,)))
    return data.Dataset(
        obs * seen[..., None, None], state * seen[..., None], avail & seen[..., None, None], actions * mask[..., None],
        torch.randn(E, T, generator=g, dtype=torch.float32) * mask, last & (torch.arange(E) % 2 > 0)[:, None], mask,
    ).check()  # fmt: skip


def made(dataset=None, **flags):
    """Arguments, data, and a team whose target networks are not its networks."""
    args = cfcql.Args(**dict(hidden=8, width=5, sequences=4, num_seeds=S, clone_steps=3) | flags)
    found, _ = cfcql.arrange(dataset or random_dataset(), args)
    team = cfcql.Team(found, args, streams(purpose=0))
    with torch.no_grad():
        for parameter in team.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        for parameter in team.targets.parameters():
            parameter *= 0.8
    return args, found, team


# ---------------------------------------------------------------- slow loops
def linear(layer, q, x):
    return x @ layer.weight[q] + layer.bias[q, 0]


def alone(network, q, x):
    """Network q of an `mlp`: (..., I) -> (..., A), with gradients for its weights."""
    for layer in network:
        x = linear(layer, q, x) if hasattr(layer, "weight") else x.relu()
    return x


def along(agents, q, x):
    """Network q of agents along one episode: (L, I) -> (L, A); its memory is torch's own unit, step by step."""
    if not agents.hidden:
        return alone(agents.body, q, x)
    found, h, g = [], x.new_zeros(1, agents.hidden), agents.gru
    for each in linear(agents.encoder[0], q, x).relu():
        h = torch.gru_cell(each[None], h, g.input[q].T, g.state[q].T, g.input_bias[q, 0], g.state_bias[q, 0])
        found.append(h[0])
    return linear(agents.head, q, torch.stack(found))


def episodes_in(rows, found):
    """The episodes in one sequence of row numbers (L,): where each begins, and its rows."""
    padding, begin = len(found.obs) - 1, None
    for t, row in enumerate([*rows.tolist(), padding]):
        if begin is not None and (found.first[row] or row == padding):
            yield begin, rows[begin:t].tolist()
            begin = None
        if begin is None and row != padding:
            assert found.first[row]
            begin = t


def lambda_return(reward, value, terminated, gamma, lam, t):
    """G_t of an episode of T steps with values (T + 1,) as the weighted mean of its n-step returns."""
    T = len(reward)

    def n_step(n):
        worth = sum(gamma**k * reward[t + k] for k in range(n))
        return worth + gamma**n * value[t + n] * (0 if terminated and t + n == T else 1)

    return sum((1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, T - t)) + lam ** (T - t - 1) * n_step(T - t)


def mixed(mixer, s, state, q):
    """Eq. 1 by hand for one state (D,) and N local values."""
    out, W, agents = alone(mixer.net, s, state), mixer.sizes[1], len(q)
    w1, b1, w2, b2 = out[: agents * W].view(agents, W).abs(), out[agents * W :][:W], out[-W - 1 : -1].abs(), out[-1]
    total = b2
    for u in range(W):
        inner = b1[u] + sum(w1[i, u] * q[i] for i in range(agents))
        total = total + w2[u] * (inner if inner > 0 else inner.exp() - 1)
    return total


def slow_losses(team, found, behaviour, rows, joint, args):
    """`losses` step by step, with plain loops over seeds, sequences, episodes, steps, agents and actions."""
    per_seed, num_agents = [], found.obs.shape[1]
    agents = range(num_agents)
    for s, b in itertools.product(range(S), range(rows.shape[2])):
        per_seed += [[]] if b == 0 else []
        for begin, episode in episodes_in(rows[s, :, b], found):
            obs = found.obs[episode]
            q = [along(team.agents, s * num_agents + i, obs[:, i]) for i in agents]  # of (L, A)
            old = [along(team.targets[0], s * num_agents + i, obs[:, i]) for i in agents]
            legal = [[[a for a in range(A) if found.avail[row, i, a]] or [0] for i in agents] for row in episode]
            value = []
            for t, row in enumerate(episode):
                best = [max(legal[t][i], key=lambda a: q[i][t, a].item()) for i in agents]  # noqa: B023
                value.append(mixed(team.targets[1], s, found.state[row], [old[i][t, best[i]] for i in agents]).item())
            reward, T = found.reward[episode].tolist(), len(episode) - 1
            for t, row in enumerate(episode[:-1]):
                G = lambda_return(reward[:T], value, found.done[episode[-2]] > 0, args.gamma, args.td_lambda, t)
                taken = [q[i][t, found.action[row, i]] for i in agents]
                worth, extra = mixed(team.mixer, s, found.state[row], taken), torch.zeros(())
                if args.joint_cql:
                    drawn = [[legal[t][i][int(u * len(legal[t][i]))] for i, u in enumerate(us)]
                             for us in joint[s, begin + t, b].tolist()]  # fmt: skip
                    random = [mixed(team.mixer, s, found.state[row], [q[i][t, a[i]] for i in agents]) for a in drawn]
                    extra = torch.stack(random).exp().mean().log() - worth
                elif args.cql:
                    sums, deviations = [], []
                    for i in agents:
                        values = torch.stack([
                            mixed(team.mixer, s, found.state[row], taken[:i] + [q[i][t, a]] + taken[i + 1 :])
                            for a in legal[t][i]
                        ])  # fmt: skip
                        sums.append(values.exp().sum().log())
                        p = values.detach().softmax(0)
                        beta = [0 if behaviour is None else behaviour[s, row, i, a].item() for a in legal[t][i]]
                        deviations.append(sum(x.item() * (x.log().item() - y) for x, y in zip(p, beta)))
                    if behaviour is None:
                        shares = [1 / num_agents] * num_agents
                    else:
                        shares = torch.tensor([args.tau_lambda * k for k in deviations]).softmax(0).tolist()
                    extra = sum(share * x for share, x in zip(shares, sums)) - worth
                per_seed[-1].append(torch.stack([0.5 * (worth - G) ** 2, extra]))
    return torch.stack([torch.stack(steps).mean(0) for steps in per_seed]).unbind(1)


@pytest.mark.parametrize("flags", [
    {}, {"recurrent": True}, {"tau_lambda": 0.0}, {"tau_lambda": 5.0, "td_lambda": 1.0, "gamma": 0.8}, {"cql": 0.0},
    {"joint_cql": True, "joint_samples": 7, "recurrent": True}, {"td_lambda": 0.0},
])  # fmt: skip
def test_losses_and_their_gradients_are_slow_loops(float64, flags):
    args, found, team = made(**flags)
    behaviour = cfcql.tabulate(team, found, args)
    assert (behaviour is None) == (not args.tau_lambda or not args.cql or args.joint_cql)
    rows, joint = cfcql.draw_rows(streams(), found, args), cfcql.draw_joint(streams(), found, args)
    assert not torch.equal(rows[0], rows[1]) and (joint is None) == (not args.joint_cql)
    fast = cfcql.losses(team, found, behaviour, rows, joint, args)
    slow = slow_losses(team, found, behaviour, rows, joint, args)
    moved = [*team.agents.parameters(), *team.mixer.parameters()]
    for one, other in zip(fast, slow, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad((two[0] + 0.7 * two[1]).sum(), moved) for two in (fast, slow)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    assert max(x.abs().max() for x in gradients[0]) > 1e-2


# ---------------------------------------------------------------- identities
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_td_lambda_at_its_ends_and_between(float64, lam):
    """0: one step; 1: what was earned, and the value where an episode was cut off. Nothing passes from one episode,
    or from padding, to another."""
    torch.manual_seed(0)
    lengths, cut, gamma = (3, 1, 2), (True, False, True), 0.9  # steps; rows: 4 + 2 + 3, and 2 of padding
    acted = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0.0])
    done = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0.0])
    reward, value = torch.randn(11) * acted, torch.randn(11)
    G = cfcql.td_lambda(*(x.view(1, 11, 1) for x in (reward, done, acted, value)), gamma, lam)
    assert G.shape == (1, 10, 1)
    begin = 0
    for length, goes_on in zip(lengths, cut):
        r, v = reward[begin : begin + length].tolist(), value[begin : begin + length + 1].tolist()
        for t in range(length):
            found = G[0, begin + t, 0].item()
            assert found == pytest.approx(lambda_return(r, v, not goes_on, gamma, lam, t), abs=1e-12)
            end = 0 if not goes_on else v[length]
            if lam == 0:
                assert found == pytest.approx(r[t] + gamma * (v[t + 1] if t + 1 < length else end))
            if lam == 1:
                earned = sum(gamma ** (k - t) * r[k] for k in range(t, length))
                assert found == pytest.approx(earned + gamma ** (length - t) * end)
        begin += length + 1


def test_padding_and_how_episodes_are_laid_out_do_not_matter(float64):
    args, found, team = made(recurrent=True)
    behaviour, M = cfcql.tabulate(team, found, args), len(found.obs) - 1
    packed = found.sequences.mT.expand(S, -1, -1)  # (S, L, M)
    ends = (found.first.nonzero()[:-1, 0].tolist() + [M])[: len(UNEVEN) + 1]
    single = [[*range(begin, end)] + [M] * (9 - end + begin) for begin, end in zip(ends, ends[1:])]
    single = torch.tensor(single).mT.expand(S, -1, -1)
    assert packed.shape[2] < single.shape[2] == len(UNEVEN)
    wild = found._replace(obs=found.obs.clone(), state=found.state.clone())
    wild.obs[M], wild.state[M] = 1e3, -1e3
    kept = cfcql.losses(team, found, behaviour, packed, None, args)
    for rows, each in ((single, found), (single, wild), (packed, wild)):
        for one, other in zip(cfcql.losses(team, each, behaviour, rows, None, args), kept):
            assert torch.allclose(one, other, atol=1e-12)
        assert torch.allclose(*(cfcql.clone_loss(team.behaviour, x, r) for x, r in ((each, rows), (found, packed))))


def test_all_replaced_values_at_once_are_a_double_loop(float64):
    args, found, team = made()
    rows = cfcql.draw_rows(streams(), found, args)[:, :-1]
    weights, q = team.mixer(found.state[rows]), torch.randn(*rows.shape, N, A)
    action = torch.randint(A, (*rows.shape, N))
    taken = cfcql.chosen(q, action)
    every = cfcql.mix_replaced(weights, q, taken)
    for i, a in itertools.product(range(N), range(A)):
        replaced = taken.clone()
        replaced[..., i] = q[..., i, a]
        assert torch.allclose(every[..., i, a], cfcql.mix(weights, replaced[..., None, :])[..., 0], atol=1e-12)
    assert torch.allclose(cfcql.chosen(every, action), cfcql.mix(weights, taken[..., None, :]).expand_as(taken))


def test_the_teams_value_grows_with_each_local_one(float64):
    """So the best joint action is what every agent finds alone."""
    args, found, team = made()
    rows = cfcql.draw_rows(streams(), found, args)
    q = torch.randn(*rows.shape, N, A).requires_grad_()
    taken = q[..., 0]
    (slope,) = torch.autograd.grad(cfcql.mix(team.mixer(found.state[rows]), taken[..., None, :]).sum(), q)
    assert (slope[..., 0] > 0).all()
    joint = torch.cartesian_prod(*[torch.arange(A)] * N)  # (J, N)
    values = torch.stack([q[..., i, joint[:, i]] for i in range(N)], -1)  # (S, L, B, J, N)
    best = cfcql.mix(team.mixer(found.state[rows]), values).argmax(-1)
    assert torch.equal(joint[best], q.argmax(-1))


def test_with_one_agent_it_is_cql(float64):
    """Whatever tau_lambda: log sum exp of the values of available actions, minus that of the one taken."""
    recorded = random_dataset(num_agents=1)
    for tau_lambda in (0.0, 1.0, 100.0):
        args, found, team = made(recorded, tau_lambda=tau_lambda)
        behaviour, rows = cfcql.tabulate(team, found, args), cfcql.draw_rows(streams(), found, args)
        extra, now = cfcql.losses(team, found, behaviour, rows, None, args)[1], rows[:, :-1]
        q = cfcql.unroll(team.agents, found, rows)[:, :-1]  # (S, L - 1, B, 1, A)
        values = cfcql.mix(team.mixer(found.state[now]), q.mT).masked_fill(~found.avail[now][..., 0, :], -math.inf)
        gap = torch.logsumexp(values, -1) - cfcql.chosen(values, found.action[now][..., 0])
        acted = found.acted[now] > 0
        wanted = torch.stack([gap[s][acted[s]].mean() for s in range(S)])
        assert torch.allclose(extra, wanted, atol=1e-12)


def test_weights_of_agents(float64):
    torch.manual_seed(0)
    avail = torch.rand(1, 1, 7, N, A) > 0.3
    avail[..., 1], avail[:, :, 0, 0] = True, torch.tensor([True, False, False, False])
    q = torch.randn(1, 1, 7, N, A).masked_fill(~avail, cfcql.ILLEGAL)
    log_beta = torch.randn(1, 1, 7, N, A).masked_fill(~avail, cfcql.ILLEGAL).log_softmax(-1).clamp(min=-12)
    assert torch.equal(cfcql.agent_weights(q, None, 3.0), torch.full((1, 1, 7, N), 1 / N))
    assert torch.allclose(cfcql.agent_weights(q, log_beta, 0.0), torch.full((1, 1, 7, N), 1 / N))
    deviation = torch.zeros(7, N)
    for b, i in itertools.product(range(7), range(N)):
        legal = avail[0, 0, b, i]
        p = torch.distributions.Categorical(logits=q[0, 0, b, i][legal])
        beta = torch.distributions.Categorical(logits=log_beta[0, 0, b, i][legal])
        deviation[b, i] = torch.distributions.kl_divergence(p, beta)
    assert deviation[0, 0] == 0  # who has no choice does not deviate
    for tau_lambda in (0.5, 3.0):
        found = cfcql.agent_weights(q, log_beta, tau_lambda)[0, 0]
        assert torch.allclose(found, (tau_lambda * deviation).softmax(-1), atol=1e-5)
    hard = cfcql.agent_weights(q, log_beta, 1e4)[0, 0]
    assert torch.allclose(hard, torch.nn.functional.one_hot(deviation.argmax(-1), N).double(), atol=1e-3)


def test_random_joint_actions_are_available_ones_in_equal_parts():
    torch.manual_seed(0)
    avail = torch.tensor([[True, False, True, True], [False, False, False, True]]).expand(1, 1, 1, 2, 4)
    q, uniform = torch.arange(8.0).view(1, 1, 1, 2, 4), torch.rand(1, 1, 1, 30_000, 2)
    uniform[..., 0, :] = 1  # rounding may give that
    values = cfcql.random_values(q, avail, uniform)[0, 0, 0]
    assert set(values[:, 1].tolist()) == {7}
    share = {value: (values[:, 0] == value).float().mean().item() for value in values[:, 0].unique().tolist()}
    assert share.keys() == {0, 2, 3} and all(abs(x - 1 / 3) < 0.015 for x in share.values())


@pytest.mark.parametrize("flags", [{}, {"joint_cql": True}])
def test_the_conservative_term_pushes_down_what_is_not_recorded(float64, flags):
    """In a game whose payoffs are all alike the recorded actions, and only these, end up on top."""
    recorded = data.collect_dataset("matrix", "[[1, 1, 1], [1, 1, 1], [1, 1, 1]]", "[0.2, 0.8, 0]")
    tops = {}
    for cql in (0.0, 1.0):
        args, found, team = made(recorded, cql=cql, sequences=32, **flags)
        adam, generators = cfcql.optimizer(team, args), streams()
        adam.lr.fill_(1e-2)
        behaviour = cfcql.clone(team, found, generators, args)
        for _ in range(150):
            rows, joint = cfcql.draw_rows(generators, found, args), cfcql.draw_joint(generators, found, args)
            cfcql.update(team, adam, found, behaviour, rows, joint, args)
        q = cfcql.unroll(team.agents, found, torch.zeros(S, 1, 1, dtype=torch.int64))[:, 0, 0]  # (S, 2, 3)
        tops[cql] = q.argsort(-1, descending=True)
    assert tops[1.0].tolist() == [[[1, 0, 2]] * 2] * S != tops[0.0].tolist()


def test_the_behaviour_is_who_recorded():
    recorded = data.collect_dataset("matrix", "xor", "aa-ab-ba")
    args, found, team = made(recorded, clone_steps=300, clone_lr=1e-2, sequences=64)
    table = cfcql.clone(team, found, streams(), args)  # (S, R, N, A)
    assert torch.allclose(table[:, 0].exp(), torch.tensor([2 / 3, 1 / 3]).expand(S, 2, 2), atol=0.06)
    for flags in ({"cql": 0.0}, {"tau_lambda": 0.0}, {"joint_cql": True}):  # not asked for where nothing depends on it
        assert cfcql.clone(team, found, streams(), cfcql.Args(**flags), None) is None


def test_the_table_is_the_behaviour_along_every_episode(float64):
    args, found, team = made(recurrent=True)
    table, starts = cfcql.tabulate(team, found, args), found.first.nonzero()[:, 0].tolist()
    for s, i in itertools.product(range(S), range(N)):
        for begin, end in zip(starts, starts[1:]):
            logits = along(team.behaviour, s * N + i, found.obs[begin:end, i])
            mask = found.avail[begin:end, i]
            wanted = logits.masked_fill(~mask, cfcql.ILLEGAL).log_softmax(-1).clamp(min=-12)
            assert torch.allclose(table[s, begin:end, i], wanted, atol=1e-12)


# ---------------------------------------------------------------- play
@pytest.mark.parametrize("recurrent", [True, False])
def test_a_team_plays_as_it_learned(monkeypatch, recurrent):
    """In a game the memory and the last action go with the agents: the same values as along a sequence."""
    args = cfcql.Args(num_seeds=2, hidden=8, recurrent=recurrent, one_hot=True, env="bridge")
    found, encode = cfcql.arrange(data.collect_dataset("bridge", "", "mixed", episodes=20), args)
    agents, calls, E = cfcql.Agents(found, args, streams(purpose=0)), [], 3
    for parameter in agents.parameters():
        parameter.data *= 3  # so that memory matters
    forward = agents.forward

    def spy(x, avail, first, h):
        calls.append((x, avail, forward(x, avail, first, h)[0]))
        return forward(x, avail, first, h)

    monkeypatch.setattr(agents, "forward", spy)
    scores = cfcql.evaluate(agents, encode, args, 0, E, torch.device("cpu"))
    assert {name: x.shape for name, x in scores.items()} == {"return": (2, E)}
    x, avail, values = (torch.cat(parts, 1) for parts in zip(*calls))  # (S, L, E, N, .)
    none = torch.zeros(x.shape[:3], dtype=torch.bool)
    h = torch.zeros(2, 2, E, agents.hidden)
    assert x.shape[1] > 5 and torch.allclose(values, forward(x, avail, none, h)[0], atol=1e-5)
    assert recurrent != torch.allclose(values, forward(x, avail, ~none, h)[0], atol=1e-2)
    if recurrent:
        last = x[..., -values.shape[-1] :]  # what was done before
        assert (last[:, 0] == 0).all()
        greedy = torch.nn.functional.one_hot(values[:, :-1].argmax(-1), values.shape[-1])
        assert torch.equal(last[:, 1:], greedy.to(last.dtype))


def test_an_unavailable_action_is_never_taken():
    _, found, team = made()
    rows = torch.arange(len(found.obs) - 1)
    obs, avail = found.obs[rows].expand(S, -1, -1, -1), found.avail[rows].expand(S, -1, -1, -1)
    some = found.avail[rows].any(-1).all(-1)
    action, _ = cfcql.player(team.agents, lambda obs, last: obs)(obs, avail, torch.zeros(S, len(rows), N, 0))
    assert cfcql.chosen(avail, action)[:, some].all()


# ---------------------------------------------------------------- what it can do, and what it cannot
def train(folder, *words):
    return cfcql.main(cfcql.parse([*map(str, words), "--out-dir", str(folder)]))


def rows_of(folder):
    return [*csv.DictReader((folder / "metrics.csv").open())]


def greedy(folder, *words):
    """The final return of each seed."""
    return train(folder, *words)["return"]["per_seed"]


XOR = "--env matrix --task xor --steps 500 --eval-every 500 --sequences 32".split()


@pytest.mark.parametrize("dataset, fewest, most", [("ab", 10, 10), ("aa-ab-ba", 0, 0), ("ab-ba", 0, 7), ("all", 1, 9)])
@pytest.mark.long
def test_xor_beyond_one_convention_is_luck_or_worse(tmp_path, dataset, fewest, most):
    """How many of 10 seeds agree. Where B looks better to both (aa-ab-ba) none can. Where no monotone fit beats those
    that end at AA or BB (ab-ba, all), a seed may agree by luck."""
    returns = greedy(tmp_path / "run", *XOR, "--dataset", dataset)
    assert set(returns) <= {0, 1} and fewest <= sum(returns) <= most, returns


@pytest.mark.parametrize("words", [(), ("--joint-cql",), ("--cql", 0), ("--tau-lambda", 0)])
@pytest.mark.long
def test_no_penalty_lets_a_monotone_value_order_xor(tmp_path, words):
    """All teams end at BB: to the fit, B is better for each."""
    assert sum(greedy(tmp_path / "run", *XOR, "--dataset", "aa-ab-ba", *words)) == 0
    args = cfcql.parse(["--resume", "--out-dir", str(tmp_path / "run")])
    found, _ = cfcql.arrange(data.load("matrix", "xor", "aa-ab-ba"), args)
    team = cfcql.Team(found, args, streams(10))
    team.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]["team"])
    q = cfcql.unroll(team.agents, found, torch.zeros(10, 1, 1, dtype=torch.int64))[:, 0, 0]  # (S, N, A)
    assert (q.argmax(-1) == 1).all()


@pytest.mark.parametrize("dataset, found", [("balanced", 20), ("imbalanced", 5)])
@pytest.mark.long
def test_m_ne_is_found_where_the_data_do_not_hide_it(tmp_path, dataset, found):
    words = "--env matrix --task m-ne --steps 500 --eval-every 500 --sequences 32 --dataset".split()
    assert greedy(tmp_path / "run", *words, dataset) == [found] * 10


@pytest.mark.long
def test_bridge_is_blocked_on_mixed_data(tmp_path):
    words = "--env bridge --num-seeds 10 --steps 300 --eval-every 300 --sequences 2".split()
    assert max(greedy(tmp_path / "run", *words)) < -10


@pytest.mark.parametrize("cql, fewest, most", [(1, 6, 10), (0, 0, 0)])
@pytest.mark.long
def test_bridge_is_crossed_on_optimal_data_by_the_weight_of_the_penalty(tmp_path, cql, fewest, most):
    """How many of 10 seeds come near the best, -1.2355. With QMIX none does, which is what the papers report of CFCQL;
    under a heavy penalty the greedy team does what was done most often, and that is consistent in these data."""
    words = "--env bridge --dataset optimal --num-seeds 10 --steps 1000 --eval-every 1000".split()
    returns = greedy(tmp_path / "run", *words, "--cql", cql)
    assert fewest <= sum(x > -1.3 for x in returns) <= most, returns


@pytest.mark.parametrize("task, lam", [("5m_vs_6m", 0.6), ("3m", 0.6), ("2s3z", 0.9), ("3s_vs_5z", 0.9)])
def test_long_battles_look_further_ahead(task, lam):
    assert cfcql.parse(["--env", "smac", "--task", task]).td_lambda == lam


@pytest.mark.parametrize("words, least, most, won", [((), 12, 18, 0.6), (("--td-lambda", 0.6), 20, 40, 0)])
@pytest.mark.long
def test_what_q_promises_in_long_battles(tmp_path, words, least, most, won):
    """A battle pays 20 at most, discounted about 15. What the penalty adds to the best action's value is
    bootstrapped in every step, and with a lambda of 0.6 Q promises more than can be had."""
    battle = "--env smac --task 2s3z --dataset medium-replay --seed 100 --num-seeds 2".split()
    about = train(tmp_path / "run", *battle, *words)
    assert min(about["win_rate"]["per_seed"]) >= won
    args = cfcql.parse(["--resume", "--out-dir", str(tmp_path / "run")])
    found, _ = cfcql.arrange(data.load("smac", "2s3z", "medium-replay"), args)
    team = cfcql.Team(found, args, streams(2))
    team.load_state_dict(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]["team"])
    start = found.first.nonzero()[:, 0].expand(2, 1, -1)  # (S, 1, E)
    best = cfcql.unroll(team.agents, found, start).amax(-1)  # (S, 1, E, N)
    promised = cfcql.mix(team.mixer(found.state[start]), best[..., None, :])
    assert least < promised.mean() < most


WORDS = "--num-seeds 2 --steps 30 --eval-every 10 --eval-episodes 2 --clone-steps 5 --hidden 16 --sequences 2".split()
BRIDGE = ["--env", "bridge", "--episodes", 40]


# ---------------------------------------------------------------- the script
@pytest.mark.parametrize("more", [("--recurrent",), ("--joint-cql", "--joint-samples", 5)])
def test_seeds_at_once_are_single_runs(tmp_path, float64, more):
    words = (*BRIDGE, *WORDS, *more, "--steps", 8, "--eval-every", 4)
    train(tmp_path / "both", *words, "--seed", 3)
    for s in range(2):
        train(tmp_path / f"one{s}", *words, "--seed", 3 + s, "--num-seeds", 1)
        mine = [row for row in rows_of(tmp_path / "both") if row["seed"] == str(3 + s)]
        for one, other in zip(rows_of(tmp_path / f"one{s}"), mine, strict=True):
            assert [float(x) for x in one.values()] == pytest.approx([float(x) for x in other.values()], nan_ok=True)


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path, monkeypatch):
    words = (*BRIDGE, *WORDS, "--recurrent")
    train(tmp_path / "whole", *words)
    record, left = runs.Run.record, [2]

    def killed(self, *what):
        record(self, *what)
        left[0] -= 1
        if not left[0]:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(runs.Run, "record", killed)
        train(tmp_path / "broken", *words)
    assert len(rows_of(tmp_path / "broken")) == 4 and not (tmp_path / "broken" / "summary.json").exists()
    cfcql.main(cfcql.parse(["--resume", "--out-dir", str(tmp_path / "broken")]))
    assert (tmp_path / "whole" / "metrics.csv").read_text() == (tmp_path / "broken" / "metrics.csv").read_text()
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken"))
    for summary in (one, other):
        assert summary.pop("wall_seconds") > 0 and summary.pop("updates_per_second") > 0
    assert one == other and one["script"] == "cfcql" and "sampled_return" not in one


@pytest.mark.long
def test_battles_are_learned_with_a_memory(tmp_path):
    words = "--env smac --task 3m --episodes 20 --eval-episodes 1 --steps 3 --eval-every 3 --clone-steps 2".split()
    summary = train(tmp_path / "run", *words, "--num-seeds", 2, "--hidden", 8, "--sequences", 2)
    assert summary["win_rate"]["mean"] >= 0 and (tmp_path / "run" / "team.pt2").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["args"]["recurrent"]


@pytest.mark.parametrize("words, method", [((), "CFCQL"), (("--joint-cql",), "MACQL"), (("--cql", "0"), "QMIX")])
def test_it_says_which_method_it_was(tmp_path, words, method):
    few = "--num-seeds 1 --steps 1 --eval-every 1 --eval-episodes 1 --clone-steps 1".split()
    process = command("algorithms/cfcql.py", *few, *words, "--out-dir", tmp_path / "run")
    assert process.returncode == 0 and f"\n{method} on matrix-xor" in process.stdout, process.stderr


@pytest.mark.parametrize("flags, said", [
    (("--env", "chess"), "unknown environment: choose"),
    (("--env", "reacher"), "CFCQL is for discrete actions"),
    (("--task", "6x1"), "matrix has no task '6x1'"),
    (("--dataset", "best"), "choose ab, ab-ba"),
    (("--td-lambda", "1.5"), "--td-lambda must be at least 0 and at most 1"),
    (("--sequences", "0"), "--sequences must be above 0"),
    (("--cql", "-1"), "--cql must be at least 0"),
    (("--resume", "--out-dir", "nowhere"), "no run to resume in nowhere"),
])  # fmt: skip
def test_bad_input_is_refused(tmp_path, flags, said):
    refuses(cfcql, flags, said, tmp_path / "run")


def test_continuous_actions_of_any_environment_are_refused():
    with pytest.raises(ValueError, match="is for discrete actions, and these are continuous"):
        cfcql.arrange(data.collect_dataset("reacher", "all-observant", "expert-mix", episodes=2), cfcql.Args())


def test_step_sizes_that_diverge_end_in_one_line(tmp_path):
    words = (*BRIDGE, *WORDS, "--lr", 1e30, "--out-dir", tmp_path / "run")
    complains(command("algorithms/cfcql.py", *words), "q_loss is not finite after 10 steps")
