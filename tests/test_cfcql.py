"""CFCQL: losses and updates against slow loops, its identities, where it must fail."""

import copy
import itertools

import pytest
import torch
from conftest import load_script

cfcql = load_script("cfcql")

S, N, A, I, D = 2, 3, 4, 5, 6
LENGTHS = 2, 5, 3, 4, 1, 5  # steps of the episodes
PACKED = (1,), (5,), (2, 4), (0,), (3,)  # which of them make a sequence
SINGLE = (0,), (1,), (2,), (3,), (4,), (5,)


def streams(count=S, purpose=1):
    return [torch.Generator().manual_seed(10 * s + purpose) for s in range(count)]


def some_data(num_agents=N, packed=PACKED):
    """Random episodes: some are cut and some end, actions are barred, agents die on the way."""
    g = torch.Generator().manual_seed(0)
    R = sum(LENGTHS) + len(LENGTHS) + 1
    acted, done, first, rows = torch.ones(R), torch.zeros(R), torch.zeros(R).bool(), []
    for k, length in enumerate(LENGTHS):
        begin = sum(LENGTHS[:k]) + k
        rows.append([*range(begin, begin + length + 1)])
        first[begin], acted[begin + length], done[begin + length - 1] = True, 0, k % 2
    acted[-1], first[-1] = 0, True
    avail = torch.rand(R, num_agents, A, generator=g) > 0.3
    avail[..., 1] = True
    avail[torch.rand(R, num_agents, generator=g) < 0.2] = torch.arange(A) == 0  # the dead
    action = (torch.rand(R, num_agents, A, generator=g) * avail).argmax(-1)
    obs, state = torch.randn(R, num_agents, I, generator=g), torch.randn(R, D, generator=g)
    reward, sequences = (
        torch.randn(R, generator=g),
        [sum((rows[k] for k in own), []) for own in packed],
    )
    sequences = torch.tensor([own + [R - 1] * (6 - len(own)) for own in sequences])
    return cfcql.Data(obs, state, avail, action, reward, done, acted, first, sequences)


def moved(team, *copies):
    """The team with other parameters, and copies that are not their networks."""
    with torch.no_grad():
        for p in team.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        for p in itertools.chain(*(x.parameters() for x in copies)):
            p *= 0.8
    return team


def made(data=None, **flags):
    small = dict(hidden=8, width=4, sequences=3, num_seeds=S, clone_steps=3, joint_samples=7)
    args = cfcql.Args(**small | flags)
    data = data or some_data()
    team = cfcql.Team(data, args, streams(purpose=0))
    return args, data, moved(team, team.target)


# ---------------------------------------------------------------- slow loops
def linear(layer, q, x):
    return x @ layer.weight[q] + layer.bias[q, 0]


def alone(network, q, x):
    """Network q of an `mlp`: (..., I) -> (..., A), with gradients for its weights."""
    for layer in network:
        x = linear(layer, q, x) if hasattr(layer, "weight") else x.relu()
    return x


def along(agents, q, x):
    """Network q of agents along one episode, (L, I) -> (L, A), with torch's own memory unit."""
    if not agents.hidden:
        return alone(agents.body, q, x)
    states, h, g = [], x.new_zeros(1, agents.hidden), agents.gru
    weights = g.input[q].T, g.state[q].T, g.input_bias[q, 0], g.state_bias[q, 0]
    for each in linear(agents.encoder, q, x).relu():
        h = torch.gru_cell(each[None], h, *weights)
        states.append(h[0])
    return linear(agents.head, q, torch.stack(states))


def episodes_in(rows, data):
    """The episodes in one sequence of row numbers (L,): where each begins, and its rows."""
    begin = 0
    while begin < len(rows) and rows[begin] < len(data.obs) - 1:
        end = begin
        while data.acted[rows[end]]:
            end += 1
        yield begin, rows[begin : end + 1].tolist()
        begin = end + 1


def lambda_return(reward, value, terminated, args, t):
    """G_t of an episode of T steps with values (T + 1,): the weighted mean of n-step returns."""
    T, gamma, lam = len(reward), args.gamma, args.td_lambda

    def n_step(n):
        worth = sum(gamma**k * reward[t + k] for k in range(n))
        return worth + gamma**n * value[t + n] * (0 if terminated and t + n == T else 1)

    earlier = sum((1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, T - t))
    return earlier + lam ** (T - t - 1) * n_step(T - t)


def mixed(value, s, state, q):
    """Eq. 1 for one state (D,) and N local values."""
    out, W, n = alone(value.mixer, s, state), value.sizes[1], len(q)
    inner = out[n * W :][:W] + torch.stack(q) @ out[: n * W].view(n, W).abs()
    return torch.where(inner > 0, inner, inner.exp() - 1) @ out[-W - 1 : -1].abs() + out[-1]


def slow_gap(mix, q, action, legal, log_beta, joint, args):
    """Eq. 5 of one step: mix(values), local values of (A,), log_beta of (A,), joint (J, N)."""
    taken = [q[i][action[i]] for i in range(len(q))]
    if args.joint_cql:
        total = 0
        for numbers in joint.tolist():
            drawn = [own[min(int(u * len(own)), len(own) - 1)] for own, u in zip(legal, numbers)]
            total = total + mix([q[i][a] for i, a in enumerate(drawn)]).exp()
        return (total / len(joint)).log() - mix(taken)
    sums, strengths = [], []
    for i, own in enumerate(legal):
        values = torch.stack([mix([*taken[:i], q[i][a], *taken[i + 1 :]]) for a in own])
        p, beta = values.detach().softmax(0), log_beta[i][own]
        strengths.append(args.tau_lambda * sum(p * (p.log() - beta)))  # Eq. 3
        sums.append(values.exp().sum().log())
    return sum(torch.stack(strengths).softmax(0) * torch.stack(sums)) - mix(taken)


def slow_losses(team, data, log_beta, rows, joint, args):
    """`losses` by loops over seeds, sequences, episodes, steps, agents and actions."""
    n, per_seed = data.obs.shape[1], []
    for s in range(S):
        steps = []
        for b in range(rows.shape[2]):
            for begin, episode in episodes_in(rows[s, :, b], data):
                obs, avail, end = data.obs[episode], data.avail[episode], len(episode) - 1
                q = [
                    along(team.value.agents, s * n + i, obs[:, i]) for i in range(n)
                ]  # (L, A) each
                old = [along(team.target.agents, s * n + i, obs[:, i]) for i in range(n)]
                legal = [[own.nonzero()[:, 0].tolist() for own in x] for x in avail]
                value = []
                for t, row in enumerate(episode):
                    best = [max(legal[t][i], key=lambda a: q[i][t, a].item()) for i in range(n)]  # noqa: B023
                    values = [old[i][t, a] for i, a in enumerate(best)]
                    value.append(mixed(team.target, s, data.state[row], values).item())
                over = data.done[episode[-2]] > 0
                for t, row in enumerate(episode[:-1]):
                    G = lambda_return(data.reward[episode[:end]].tolist(), value, over, args, t)
                    mix = lambda x: mixed(team.value, s, data.state[row], x)  # noqa: E731, B023
                    own, action = [x[t] for x in q], data.action[row]
                    numbers = None if joint is None else joint[s, begin + t, b]
                    extra = torch.zeros(())
                    if args.cql:
                        beta = log_beta[s, row]
                        extra = slow_gap(mix, own, action, legal[t], beta, numbers, args)
                    Q = mix([own[i][action[i]] for i in range(n)])
                    steps.append(torch.stack([0.5 * (Q - G) ** 2, extra]))
        per_seed.append(torch.stack(steps).mean(0))
    return torch.stack(per_seed).unbind(1)


def hand_step(adam, module, losses, limit):
    """A step with torch's optimiser down one loss a seed; returns the gradients' lengths."""
    parameters, lengths = list(module.parameters()), []
    adam.zero_grad()
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        lengths.append(torch.cat([x.flatten() for x in gradients]).norm().item())
        for p, gradient in zip(parameters, gradients):
            gradient = gradient * min(1, limit / lengths[-1])
            p.grad = gradient if p.grad is None else p.grad + gradient
    adam.step()
    return lengths


def follow(copies, networks, share):
    """Move the copies by hand."""
    with torch.no_grad():
        for slow, quick in zip(copies.parameters(), networks.parameters(), strict=True):
            slow.copy_((1 - share) * slow + share * quick)


def assert_same(one, other):
    """Two modules have the same parameters."""
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-9), name


WAYS = [
    dict(recurrent=True),
    dict(tau_lambda=5.0, td_lambda=1.0, gamma=0.8),
    dict(tau_lambda=0.0, td_lambda=0.0),
    dict(joint_cql=True, recurrent=True),
    dict(cql=0.0),
]


@pytest.mark.parametrize("flags", WAYS)
def test_two_updates_by_hand(float64, flags):
    """The limit on gradients bites in the first only."""
    args, data, team = made(tau=0.1, lr=0.01, **dict(cql=0.7) | flags)
    other = copy.deepcopy(team)
    adams = [torch.optim.Adam(x.value.parameters(), args.lr) for x in (team, other)]
    log_beta, generators = cfcql.tabulate(team.behaviour, data), streams()
    for limit in (0.1, 1e3):
        args.max_grad_norm = limit
        rows = cfcql.draw_rows(generators, data, args)
        joint = cfcql.draw_joint(generators, data, args)
        if args.joint_cql:
            joint[..., 0, :] = 1  # rounding may give that
        squared, C = slow_losses(other, data, log_beta, rows, joint, args)
        lengths = hand_step(adams[1], other.value, squared + args.cql * C, limit)
        assert all((length > limit) == (limit < 1) for length in lengths)
        follow(other.target, other.value, args.tau)
        logs = cfcql.update(team, adams[0], data, log_beta, rows, joint, args)
        found = torch.stack([logs["q_loss"], logs["gap"]])
        assert torch.allclose(found, torch.stack([squared, C])) and not found.requires_grad
    assert_same(team, other)


def test_cloning_by_hand_and_its_table(float64):
    """The table is the behaviour along every episode, and at least -12."""
    args, data, team = made(recurrent=True, max_grad_norm=0.3, clone_lr=0.01)
    team.behaviour.head.weight.data *= 10
    other = copy.deepcopy(team.behaviour)
    adam, generators = torch.optim.Adam(other.parameters(), args.clone_lr), streams()

    def log_beta(s, episode, i):
        out = along(other, s * N + i, data.obs[episode, i])
        return out.masked_fill(~data.avail[episode, i], -torch.inf).log_softmax(-1)

    for _ in range(args.clone_steps):
        rows = cfcql.draw_rows(generators, data, args)
        losses = [[] for _ in range(S)]
        for s, b in itertools.product(range(S), range(args.sequences)):
            for _, episode in episodes_in(rows[s, :, b], data):
                each = [log_beta(s, episode, i) for i in range(N)]
                for t, row in enumerate(episode[:-1]):
                    losses[s].append(-sum(x[t, a] for x, a in zip(each, data.action[row])))
        losses = torch.stack([torch.stack(steps).mean() for steps in losses])
        assert torch.allclose(cfcql.clone_loss(other, data, rows), losses)
        assert min(hand_step(adam, other, losses, args.max_grad_norm)) > args.max_grad_norm
    cfcql.clone(team.behaviour, data, streams(), args)
    table = cfcql.tabulate(team.behaviour, data)
    assert_same(team.behaviour, other)
    assert ((table == -12) & data.avail).any()
    for s, sequence, i in itertools.product(range(S), data.sequences, range(N)):
        for _, episode in episodes_in(sequence, data):
            wanted = log_beta(s, episode, i).clamp(min=-12)
            assert torch.allclose(table[s, episode, i], wanted, atol=1e-9)


@pytest.mark.parametrize("flags", [{"cql": 0.0}, {"tau_lambda": 0.0}, {"joint_cql": True}])
def test_nothing_is_cloned_that_nobody_needs(flags):
    args, _, team = made(**flags)
    cfcql.clone(team.behaviour, None, None, args)


def begin_as_in_torch(agents):
    """Whether a GRU and the layers about it begin between minus and plus fan-in ** -0.5."""
    sizes = (agents.encoder, I), (agents.gru, agents.hidden), (agents.head, agents.hidden)
    shares = [p.abs().max() * inputs**0.5 for x, inputs in sizes for p in x.parameters()]
    return all(0.9 < share <= 1 for share in shares)


def test_weights_begin_as_in_torch():
    agents = cfcql.Agents(some_data(), cfcql.Args(recurrent=True), streams(9))
    assert begin_as_in_torch(agents)


# ---------------------------------------------------------------- identities
def test_padding_and_how_episodes_are_laid_out_do_not_matter(float64):
    args, data, team = made(recurrent=True)
    log_beta, kept = cfcql.tabulate(team.behaviour, data), None
    wild = data._replace(obs=data.obs.clone(), state=data.state.clone())
    wild.obs[-1], wild.state[-1] = 1e3, -1e3
    for own, packed in itertools.product((data, wild), (PACKED, SINGLE)):
        rows = some_data(packed=packed).sequences.mT.expand(S, -1, -1)
        found = [*cfcql.losses(team, own, log_beta, rows, None, args)]
        found.append(cfcql.clone_loss(team.behaviour, own, rows))
        kept = kept or found
        assert torch.allclose(torch.stack(found), torch.stack(kept), atol=1e-12)


def test_with_one_agent_it_is_cql(float64):
    args, data, team = made(some_data(num_agents=1), tau_lambda=100.0)
    rows = cfcql.draw_rows(streams(), data, args)
    log_beta, now = cfcql.tabulate(team.behaviour, data), rows[:, :-1]
    C = cfcql.losses(team, data, log_beta, rows, None, args)[1]
    q = cfcql.unroll(team.value.agents, data, now)  # (S, L - 1, B, 1, A)
    values = cfcql.mix(team.value.weights(data.state[now]), q.mT)
    values = values.masked_fill(~data.avail[now][..., 0, :], -torch.inf)
    gap = torch.logsumexp(values, -1) - cfcql.chosen(values, data.action[now][..., 0])
    wanted = [gap[s][data.acted[now][s] > 0].mean() for s in range(S)]
    assert torch.allclose(C, torch.stack(wanted), atol=1e-12)


# ---------------------------------------------------------------- play
@pytest.mark.parametrize("recurrent", [True, False])
def test_a_team_plays_as_it_learned(float64, recurrent):
    """Memory and last action go with the agents: the same choice as along a sequence."""
    args, data, team = made(recurrent=recurrent)
    E, L, seen = 3, 6, []
    avail = torch.rand(S, L, E, N, A) > 0.3
    avail[..., 1] = True

    def encode(obs, last):
        seen.append(torch.cat([obs, last], -1))
        return seen[-1]

    play = cfcql.player(team.value.agents, encode)
    memory, actions = torch.zeros(S, E, N, play.memory), []
    for t in range(L):
        action, memory = play.act(torch.randn(S, E, N, I - recurrent * A), avail[:, t], memory)
        actions.append(action)
    first, h = torch.zeros(S, L, E).bool(), torch.zeros(S, N, E, team.value.agents.hidden)
    values, _ = team.value.agents(torch.stack(seen, 1), avail, first, h)
    actions = torch.stack(actions, 1)
    assert torch.equal(values.argmax(-1), actions) and cfcql.chosen(avail, actions).all()
    if recurrent:  # what was done before is behind what is seen
        last = torch.nn.functional.one_hot(actions, A).double()
        assert torch.equal(torch.stack(seen[1:], 1)[..., -A:], last[:, :-1])
        assert not seen[0][..., -A:].any()


# ---------------------------------------------------------------- what it can and cannot do
def test_the_conservative_term_pushes_down_what_is_not_recorded():
    gaps = []
    for cql in (0.0, 1.0):
        args, data, team = made(cql=cql)
        adam = torch.optim.Adam(team.value.parameters(), 0.01)
        log_beta = cfcql.tabulate(team.behaviour, data)
        rows = data.sequences.mT.expand(S, -1, -1)
        for _ in range(30):
            cfcql.update(team, adam, data, log_beta, rows, None, args)
        args.cql = 1.0
        gaps.append(cfcql.losses(team, data, log_beta, rows, None, args)[1])
    assert (gaps[1] < gaps[0] - 0.1).all()


def train(folder, words):
    return cfcql.main(cfcql.parse([*words.split(), "--out-dir", str(folder)]))


@pytest.mark.parametrize("words", ["", "--joint-cql --joint-samples 20", "--cql 0"])
def test_a_monotone_value_cannot_order_xor(tmp_path, words):
    """From AA, AB and BA all teams end at BB: to the fit, B is better for each."""
    few = "--dataset aa-ab-ba --steps 150 --eval-every 150 --clone-steps 30 --hidden 32"
    assert not any(train(tmp_path / "run", f"{few} {words}")["return"]["per_seed"])


@pytest.mark.long
def test_the_best_of_equally_likely_actions_is_found(tmp_path):
    words = "--task m-ne --dataset balanced --steps 500 --eval-every 500 --sequences 32"
    assert train(tmp_path / "run", words)["return"]["per_seed"] == [20] * 10


@pytest.mark.parametrize("cql", [1, 0])
@pytest.mark.long
def test_bridge_is_crossed_on_optimal_data_by_the_weight_of_the_penalty(tmp_path, cql):
    """Most seeds come near the best, -1.2355: a heavy penalty makes the greedy team do what was
    done most often, and that is consistent in these data."""
    words = f"--env bridge --dataset optimal --num-seeds 10 --steps 1000 --cql {cql}"
    returns = train(tmp_path / "run", words)["return"]["per_seed"]
    assert (sum(x > -1.3 for x in returns) > 5) == (cql > 0), returns


# ---------------------------------------------------------------- the script
def test_it_says_which_method_it_was(tmp_path, capsys):
    few = "--num-seeds 1 --steps 1 --eval-every 1 --eval-episodes 1 --clone-steps 1"
    for words, method in (("", "CFCQL"), ("--joint-cql", "MACQL"), ("--cql 0", "QMIX")):
        train(tmp_path / method, f"{few} {words}")
        assert f"\n{method} on matrix-xor-aa-ab-ba" in capsys.readouterr().out


@pytest.mark.parametrize("words, name", [
    ("--env reacher", "CFCQL"), ("--td-lambda 1.5", "--td-lambda"),
])  # fmt: skip
def test_bad_input_is_refused(words, name):
    with pytest.raises(ValueError, match=name):
        cfcql.parse(words.split())
