"""OMAR: updates against slow loops over episodes, its identities, where it must fail."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import load_script
from test_cfcql import (
    PACKED,
    SINGLE,
    A,
    I,
    N,
    S,
    alone,
    along,
    assert_same,
    begin_as_in_torch,
    episodes_in,
    follow,
    hand_step,
    lambda_return,
    moved,
    some_data,
    streams,
)

omar = load_script("omar")


def made(**flags):
    args = omar.Args(**dict(hidden=8, sequences=3, num_seeds=S) | flags)
    data = omar.Data(*some_data())
    team = omar.Team(data, args, streams(purpose=0))
    return args, data, moved(team, team.targets)


# ---------------------------------------------------------------- slow loops
def slow_step(q, log_pi, y, a, legal, args):
    """Eqs. 2 and 4 of one agent and step: q two critics' (A,), log_pi (A,), legal a list."""
    critics = sum((x[a] - y) ** 2 + args.cql * (x[legal].exp().sum().log() - x[a]) for x in q)
    first, pi = q[0].detach(), log_pi.exp()
    advantage = first[a] - sum(pi[k].item() * first[k] for k in range(A))
    top = max(legal, key=lambda k: first[k].item())
    away = sum((pi[k] - int(k == top)) ** 2 for k in range(A)) / A
    gradient = -advantage * (pi[a] + 1e-5).log()
    return torch.stack([critics, (1 - args.omar) * gradient + args.omar * away])


def slow_losses(team, data, rows, args):
    """The losses of the critics and the policies, by loops over episodes, agents and steps."""
    per_seed = []
    for s in range(S):
        steps = []
        for b, i in itertools.product(range(rows.shape[2]), range(N)):
            for _, episode in episodes_in(rows[s, :, b], data):
                obs, avail, network = data.obs[episode, i], data.avail[episode, i], s * N + i
                logits = along(team.policies, network, obs).masked_fill(~avail, omar.ILLEGAL)
                log_pi = logits.log_softmax(-1)
                x = torch.cat([data.state[episode], obs], -1)
                q = [alone(critic, network, x) for critic in team.critics]
                old = [alone(critic, network, x).detach() for critic in team.targets]
                values = [each[range(len(x)), log_pi.argmax(-1)].tolist() for each in old]
                reward, over = data.reward[episode[:-1]].tolist(), data.done[episode[-2]] > 0
                for t, row in enumerate(episode[:-1]):
                    y = min(lambda_return(reward, value, over, args, t) for value in values)
                    own, legal = [each[t] for each in q], avail[t].nonzero()[:, 0].tolist()
                    steps.append(slow_step(own, log_pi[t], y, data.action[row, i], legal, args))
        per_seed.append(N * torch.stack(steps).mean(0))
    return torch.stack(per_seed).unbind(1)


WAYS = [
    dict(recurrent=True),
    dict(omar=0.0, td_lambda=0.0),
    dict(omar=1.0, td_lambda=1.0, gamma=0.8),
    dict(cql=0.0, omar=0.3),
]


@pytest.mark.parametrize("flags", WAYS)
def test_two_updates_by_hand(float64, flags):
    """The limit on gradients bites in the first only."""
    args, data, team = made(tau=0.1, lr=0.01, **dict(cql=0.7) | flags)
    other, generators = copy.deepcopy(team), streams()
    adam = torch.optim.Adam(team.parameters(), args.lr, fused=True)
    modules = other.critics, other.policies
    by_hand = [torch.optim.Adam(module.parameters(), 0.01) for module in modules]
    for limit in (0.02, 1e3):
        args.max_grad_norm = limit
        rows = omar.draw_rows(generators, data, args)
        slow = slow_losses(other, data, rows, args)
        for stock, module, losses in zip(by_hand, modules, slow):
            parameters = copy.deepcopy(module.state_dict())
            lengths = hand_step(stock, module, losses, limit)
            assert all((length > limit) == (limit < 1) for length in lengths)
            assert not any(torch.equal(x, parameters[k]) for k, x in module.state_dict().items())
        follow(other.targets, other.critics, args.tau)
        logs = omar.update(team, adam, data, rows, args)
        found = torch.stack([logs["q_loss"], logs["policy_loss"]])
        assert torch.allclose(found, torch.stack(slow)) and not found.requires_grad
    assert_same(team, other)


def test_padding_and_how_episodes_are_laid_out_do_not_matter(float64):
    kept = None
    for wild, packed in itertools.product((False, True), (PACKED, SINGLE)):
        args, data, team = made(recurrent=True)
        if wild:
            data.obs[-1], data.state[-1] = 1e3, -1e3
        rows = some_data(packed=packed).sequences.mT.expand(S, -1, -1)
        logs = omar.update(team, torch.optim.Adam(team.parameters(), args.lr), data, rows, args)
        losses = torch.stack([*logs.values()])
        kept = losses if kept is None else kept
        assert torch.allclose(losses, kept, atol=1e-12)


def test_weights_begin_as_in_torch():
    agents = omar.Agents(some_data(), omar.Args(recurrent=True), streams(9))
    assert begin_as_in_torch(agents)


# ---------------------------------------------------------------- identities
def some_steps():
    torch.manual_seed(0)
    avail = torch.rand(S, 4, 3, N, A) > 0.3
    avail[..., 1] = True
    action = (torch.rand(avail.shape) * avail).argmax(-1)
    logits, q = torch.randn(avail.shape).requires_grad_(), torch.randn(avail.shape)
    return avail, action, logits, logits.masked_fill(~avail, omar.ILLEGAL).log_softmax(-1), q


def test_omar_1_is_regression_on_the_best_available_action(float64):
    avail, action, _, log_pi, q = some_steps()
    q[~avail] = 100  # must not matter
    best = F.one_hot(q.masked_fill(~avail, -torch.inf).argmax(-1), A).double()
    wanted = F.mse_loss(log_pi.exp(), best, reduction="none").mean(-1).sum(-1)
    assert torch.allclose(omar.policy_loss(log_pi, q, action, avail, 1.0), wanted, atol=1e-12)


def test_omar_0_is_the_policy_gradient(float64):
    """With pi's exact mean for one action's sample it is the gradient of sum_a pi(a) q(a)."""
    avail, action, logits, log_pi, q = some_steps()
    total = 0
    for a in range(A):  # one agent at a time, so that each has its own weight
        for i in range(N):
            own = [x[..., i : i + 1, :] for x in (log_pi, q, avail)]
            loss = omar.policy_loss(*own[:2], torch.full_like(action[..., :1], a), own[2], 0.0)
            total = total + (log_pi[..., i, a].detach().exp() * loss).sum()
    (found,) = torch.autograd.grad(total, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(-(log_pi.exp() * q).sum(), logits)
    assert torch.allclose(found, wanted, atol=1e-3) and wanted.abs().max() > 0.1  # but for 1e-5


# ---------------------------------------------------------------- play
@pytest.mark.parametrize("recurrent", [True, False])
def test_a_team_plays_as_it_learned(float64, recurrent):
    """Greedily and by sampling it chooses among the probabilities along the sequence."""
    args, _, team = made(recurrent=recurrent)
    E, L, seen, actions = 3, 6, [], []
    avail, clocks = torch.rand(S, L, E, N, A) > 0.3, torch.rand(S, L, E, N, A)
    avail[..., 1], clocks[:, ::2] = True, 1  # greedy in every other step

    def encode(obs, last):
        seen.append(torch.cat([obs, last], -1))
        return seen[-1]

    play = omar.player(team.policies, encode)
    memory = torch.zeros(S, E, N, play.memory)
    for t in range(L):
        drawn = clocks[:, t] if t % 2 else None
        obs = torch.randn(S, E, N, I - recurrent * A)
        action, memory = play.act(obs, avail[:, t], memory, drawn)
        actions.append(action)
    first, h = torch.zeros(S, L, E).bool(), torch.zeros(S, N, E, team.policies.hidden)
    logits, _ = team.policies(torch.stack(seen, 1), avail, first, h)
    actions, pi = torch.stack(actions, 1), logits.softmax(-1)
    assert torch.equal((pi / clocks).argmax(-1), actions)
    assert not torch.equal(pi.argmax(-1), actions) and play.clocks == (-1, N, A)


# ---------------------------------------------------------------- what it can and cannot do
def train(folder, words):
    return omar.main(omar.parse([*words.split(), "--out-dir", str(folder)]))


@pytest.mark.parametrize("cql, both", [(0.1, 1), (5.0, 0)])
def test_xor_ends_at_bb_or_with_a_heavy_penalty_at_aa(tmp_path, cql, both):
    """What looks best to each, or what each did most often; both are worth nothing."""
    few = "--dataset aa-ab-ba --steps 200 --eval-every 200 --num-seeds 4"
    summary = train(tmp_path / "run", f"{few} --cql {cql}")
    args = omar.parse(["--resume", "--out-dir", str(tmp_path / "run")])
    data, _ = omar.arrange(omar.Run("omar", args).load(), args)
    team = omar.Team(data, args, streams(4))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    team.load_state_dict(saved["parts"]["team"])
    logits = omar.unroll(team.policies, data, torch.zeros(4, 1, 1).long())  # (S, 1, 1, N, A)
    assert (logits.argmax(-1) == both).all() and not any(summary["return"]["per_seed"])


@pytest.mark.parametrize("words, best", [
    ("--task xor --dataset ab", 1),
    ("--task m-ne --dataset balanced", 20),
    ("--task m-ne --dataset imbalanced", 5),
])  # fmt: skip
@pytest.mark.long
def test_what_one_agent_can_see_alone_is_found(tmp_path, words, best):
    summary = train(tmp_path / "run", f"{words} --steps 500 --eval-every 500 --sequences 32")
    assert summary["return"]["per_seed"] == [best] * 10


# ---------------------------------------------------------------- the script
def test_it_says_which_method_it_was(tmp_path, capsys):
    few = "--num-seeds 1 --steps 1 --eval-every 1 --eval-episodes 1"
    for share, method in ((0.5, "OMAR"), (0, "independent actor-critic with CQL")):
        train(tmp_path / str(share), f"{few} --omar {share}")
        assert f"\n{method} on matrix-xor-aa-ab-ba" in capsys.readouterr().out


@pytest.mark.parametrize("words, name", [
    ("--env reacher", "td3_bc.py"), ("--omar 1.5", "--omar"), ("--sequences 0", "--sequences"),
])  # fmt: skip
def test_bad_input_is_refused(words, name):
    with pytest.raises(ValueError, match=name):
        omar.parse(words.split())
