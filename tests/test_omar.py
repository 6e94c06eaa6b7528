"""OMAR: its losses against slow loops over episodes, its identities, where it fails as it must, and the script."""

import csv
import itertools
import json
import math

import pytest
import torch
from conftest import command, complains, load_script, refuses
from test_cfcql import BRIDGE, UNEVEN, A, D, N, O, S, alone, along, episodes_in, lambda_return, random_dataset, streams

import data
from data import runs

omar = load_script("omar")


def made(dataset=None, **flags):
    """Arguments, data, and a team whose target networks are not its networks."""
    args = omar.Args(**dict(hidden=8, sequences=4, num_seeds=S) | flags)
    found, _ = omar.arrange(dataset or random_dataset(), args)
    team = omar.Team(found, args, streams(purpose=0))
    with torch.no_grad():
        for parameter in team.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        for parameter in team.targets.parameters():
            parameter *= 0.8
    return args, found, team


# ---------------------------------------------------------------- slow loops
def slow_losses(team, found, rows, args):
    """`losses` step by step, with plain loops over seeds, sequences, episodes, agents and steps."""
    per_seed = []
    for s, b in itertools.product(range(S), range(rows.shape[2])):
        per_seed += [[]] if b == 0 else []
        for _, episode in episodes_in(rows[s, :, b], found):
            T, steps, agent = len(episode) - 1, torch.zeros(len(episode) - 1, 2), range(N)
            for i in agent:
                network, obs, avail = s * N + i, found.obs[episode, i], found.avail[episode, i]
                log_pi = along(team.policies, network, obs).masked_fill(~avail, omar.ILLEGAL).log_softmax(-1)
                x = torch.cat([found.state[episode], obs], -1)
                q, old = ([alone(critic, network, x) for critic in nets] for nets in (team.critics, team.targets))
                best = log_pi.argmax(-1)
                reward, over, parts = found.reward[episode[:-1]].tolist(), found.done[episode[-2]] > 0, []
                for t, row in enumerate(episode[:-1]):
                    values = [each[range(T + 1), best].tolist() for each in old]
                    y = min(lambda_return(reward, v, over, args.gamma, args.td_lambda, t) for v in values)
                    legal, a, pi = avail[t].nonzero()[:, 0], found.action[row, i], log_pi[t].exp()
                    critics = sum((each[t, a] - y) ** 2 + args.cql * (each[t, legal].exp().sum().log() - each[t, a])
                                  for each in q)  # fmt: skip
                    first = q[0][t].detach()
                    advantage = first[a] - sum(pi[k].item() * first[k] for k in range(A))
                    top = max(legal.tolist(), key=lambda k: first[k].item())  # noqa: B023
                    away = sum((pi[k] - int(k == top)) ** 2 for k in range(A)) / A
                    gradient = -advantage * (pi[a] + 1e-5).log()
                    parts.append(torch.stack([critics, (1 - args.omar) * gradient + args.omar * away]))
                steps = steps + torch.stack(parts)
            per_seed[-1].append(steps)
    return torch.stack([torch.cat(steps).mean(0) for steps in per_seed]).unbind(1)


@pytest.mark.parametrize("flags", [
    {}, {"recurrent": True}, {"omar": 0.0, "td_lambda": 0.0}, {"omar": 1.0, "td_lambda": 1.0, "gamma": 0.8},
    {"cql": 0.0, "recurrent": True},
])  # fmt: skip
def test_losses_and_their_gradients_are_slow_loops(float64, flags):
    args, found, team = made(**flags)
    rows = omar.draw_rows(streams(), found, args)
    assert not torch.equal(rows[0], rows[1])
    fast, slow = omar.losses(team, found, rows, args), slow_losses(team, found, rows, args)
    for one, other, networks in zip(fast, slow, (team.critics, team.policies), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
        moved = list(networks.parameters())
        gradients = [torch.autograd.grad(loss.sum(), moved) for loss in (one, other)]
        for left, right in zip(*gradients, strict=True):
            assert torch.allclose(left, right, atol=1e-12)
        assert max(x.abs().max() for x in gradients[0]) > 1e-3


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_td_lambda_at_its_ends_and_between(float64, lam):
    """One step at 0, the whole rest at 1; for every agent and critic at once, from the team's reward."""
    torch.manual_seed(0)
    acted = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0, 0.0])
    done = torch.tensor([0, 0, 0, 0, 1, 0, 0, 1, 0, 0.0])
    reward, value = torch.randn(10) * acted, torch.randn(1, 10, 1, N, 2)
    G = omar.td_lambda(*(x.view(1, 10, 1, 1, 1) for x in (reward, done, acted)), value, 0.9, lam)
    assert G.shape == (1, 9, 1, N, 2)
    for begin, end, over in ((0, 3, False), (4, 5, True), (6, 8, True)):
        for t, i, c in itertools.product(range(end - begin), range(N), range(2)):
            v = value[0, begin : end + 1, 0, i, c].tolist()
            r = reward[begin:end].tolist()
            wanted = lambda_return(r, v, over, 0.9, lam, t)
            assert G[0, begin + t, 0, i, c].item() == pytest.approx(wanted, abs=1e-12)
            if lam == 0:
                assert wanted == pytest.approx(r[t] + 0.9 * v[t + 1] * (not over or t + 1 < len(r)))


def test_padding_and_how_episodes_are_laid_out_do_not_matter(float64):
    args, found, team = made(recurrent=True)
    M, packed = len(found.obs) - 1, found.sequences.mT.expand(S, -1, -1)
    ends = (found.first.nonzero()[:-1, 0].tolist() + [M])[: len(UNEVEN) + 1]
    single = [[*range(begin, end)] + [M] * (9 - end + begin) for begin, end in zip(ends, ends[1:])]
    single = torch.tensor(single).mT.expand(S, -1, -1)
    wild = found._replace(obs=found.obs.clone(), state=found.state.clone())
    wild.obs[M], wild.state[M] = 1e3, -1e3
    kept = omar.losses(team, found, packed, args)
    for rows, each in ((single, found), (single, wild), (packed, wild)):
        for one, other in zip(omar.losses(team, each, rows, args), kept):
            assert torch.allclose(one, other, atol=1e-12)


# ---------------------------------------------------------------- identities
def some_steps(seed=0):
    torch.manual_seed(seed)
    avail = torch.rand(S, 4, 3, N, A) > 0.3
    avail[..., 1] = True
    action = (torch.rand(avail.shape) * avail).argmax(-1)
    logits, q = torch.randn(avail.shape).requires_grad_(), torch.randn(avail.shape)
    return avail, action, logits, logits.masked_fill(~avail, omar.ILLEGAL).log_softmax(-1), q


def test_omar_1_is_regression_on_the_best_available_action(float64):
    avail, action, logits, log_pi, q = some_steps()
    q[~avail] = 100  # must not matter
    best = torch.nn.functional.one_hot(q.masked_fill(~avail, -math.inf).argmax(-1), A).double()
    wanted = torch.nn.functional.mse_loss(log_pi.exp(), best, reduction="none").mean(-1).sum(-1)
    assert torch.allclose(omar.policy_loss(log_pi, q, action, avail, 1.0), wanted, atol=1e-12)


def test_omar_0_is_the_policy_gradient(float64):
    """With the exact mean over pi in place of one action's sample it would be the gradient of sum_a pi(a) q(a)."""
    avail, _, logits, log_pi, q = some_steps()
    pi = log_pi.detach().exp()
    total = sum(  # E over a ~ pi_i, agent by agent
        (pi[..., a] * omar.policy_loss(log_pi[..., None, :], q[..., None, :],
                                       torch.full((*q.shape[:-1], 1), a), avail[..., None, :], 0.0)).sum()
        for a in range(A)
    )  # fmt: skip
    (found,) = torch.autograd.grad(total, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(-(log_pi.exp() * q).sum(), logits)
    assert torch.allclose(found, wanted, atol=1e-3) and wanted.abs().max() > 0.1  # but for the 1e-5


def test_the_two_critics_share_nothing_and_the_smaller_target_counts(float64):
    args, found, team = made()
    one, other = (list(critic.parameters()) for critic in team.critics)
    assert not {p.data_ptr() for p in one} & {p.data_ptr() for p in other}
    assert all(not torch.equal(a, b) for a, b in zip(one, other))
    rows = omar.draw_rows(streams(), found, args)
    q = omar.values(team.critics, found, rows)
    assert q.shape == (*rows.shape, N, 2, A) and not torch.allclose(q[..., 0, :], q[..., 1, :])
    y = torch.randn(*rows.shape, N)
    action, avail = found.action[rows], found.avail[rows]
    both = omar.critic_loss(q, y, action, avail, 0.5)
    halves = [omar.critic_loss(q[..., c : c + 1, :], y, action, avail, 0.5) for c in range(2)]
    assert torch.allclose(both, sum(halves), atol=1e-12)


def test_agents_learn_by_themselves(float64):
    """Without the limit on the team's gradient, what the others see and do does not matter to an agent."""
    args, found, team = made(max_grad_norm=1e9)
    start, weights = {name: x.clone() for name, x in team.state_dict().items()}, []
    for mixed in (False, True):
        other = found
        if mixed:  # what agents 1 and 2 were recorded to do
            action = found.action.clone()
            action[:, 1:] = found.avail.to(torch.uint8).argmax(-1)[:, 1:]
            other = found._replace(action=action)
        team.load_state_dict(start)
        adams, generators = omar.optimizers(team, args), streams()
        for _ in range(10):
            omar.update(team, adams, other, omar.draw_rows(generators, other, args), args)
        parts = [*team.policies.parameters(), *team.critics.parameters()]
        weights.append([p.detach().unflatten(0, (S, N)).clone() for p in parts])
    for one, two in zip(*weights, strict=True):
        assert torch.allclose(one[:, 0], two[:, 0], atol=1e-12)
    assert any(not torch.allclose(one[:, 1], two[:, 1], atol=1e-3) for one, two in zip(*weights))


# ---------------------------------------------------------------- play
@pytest.mark.parametrize("recurrent", [True, False])
def test_a_team_plays_as_it_learned(monkeypatch, recurrent):
    """In a game the memory and the last action go with the agents: the same probabilities as along a sequence."""
    args = omar.Args(num_seeds=2, hidden=8, recurrent=recurrent, one_hot=True, env="bridge")
    found, encode = omar.arrange(data.collect_dataset("bridge", "", "mixed", episodes=20), args)
    policies, calls, E = omar.Policies(found, args, streams(purpose=0)), [], 3
    for parameter in policies.parameters():
        parameter.data *= 3  # so that memory matters
    forward = policies.forward

    def spy(x, avail, first, h):
        calls.append((x, avail, forward(x, avail, first, h)[0]))
        return forward(x, avail, first, h)

    monkeypatch.setattr(policies, "forward", spy)
    scores = omar.evaluate(policies, encode, args, 0, E, torch.device("cpu"))
    assert {name: x.shape for name, x in scores.items()} == {"return": (2, E), "sampled_return": (2, E)}
    seen = [tuple(torch.cat(parts, 1) for parts in zip(*half)) for half in halves(calls)]
    for (x, avail, found), sampled in zip(seen, (False, True), strict=True):
        none, h = torch.zeros(x.shape[:3], dtype=torch.bool), torch.zeros(2, 2, E, policies.hidden)
        assert x.shape[1] > 5 and torch.allclose(found, forward(x, avail, none, h)[0], atol=1e-5)
        assert recurrent != torch.allclose(found, forward(x, avail, ~none, h)[0], atol=1e-2)
        if recurrent:
            last = x[..., -found.shape[-1] :]  # what was done before
            assert (last[:, 0] == 0).all() and (last[:, 1:].sum(-1) == 1).all()
            greedy = torch.nn.functional.one_hot(found[:, :-1].argmax(-1), found.shape[-1])
            assert torch.equal(last[:, 1:], greedy.to(last.dtype)) != sampled


def halves(calls):
    """The calls of the greedy and of the sampled games, which start alike."""
    start = calls[0][0]
    (second,) = [k for k, (x, *_) in enumerate(calls) if k and torch.equal(x, start)][-1:]
    return calls[:second], calls[second:]


def test_an_unavailable_action_is_never_taken():
    _, found, team = made()
    rows = torch.arange(len(found.obs) - 1)[found.avail[:-1].any(-1).all(-1)]
    obs, avail = found.obs[rows].expand(S, -1, -1, -1), found.avail[rows].expand(S, -1, -1, -1)
    for clocks in (None, *(torch.empty(avail.shape).exponential_() for _ in range(50))):
        blank = torch.zeros(S, len(rows), N, 0)
        action, _ = omar.player(team.policies, lambda obs, last: obs)(obs, avail, blank, clocks)
        assert omar.chosen(avail, action).all()
    assert team.policies.A == A and obs.shape[-1] == O and found.state.shape[1] == D


# ---------------------------------------------------------------- what it can do, and what it cannot
def train(folder, *words):
    return omar.main(omar.parse([*map(str, words), "--out-dir", str(folder)]))


def rows_of(folder):
    return [*csv.DictReader((folder / "metrics.csv").open())]


GAME = "--env matrix --eval-every 1000 --sequences 32".split()
XOR = (*GAME, "--task", "xor", "--steps", 500)


@pytest.mark.parametrize("dataset, fewest, most", [("ab", 10, 10), ("aa-ab-ba", 0, 0), ("ab-ba", 1, 9), ("all", 1, 9)])
@pytest.mark.parametrize("share", [0.5, 0.0])
@pytest.mark.long
def test_xor_beyond_one_convention_is_luck_or_worse(tmp_path, dataset, fewest, most, share):
    """How many of 10 seeds agree. Where B looks better to each (aa-ab-ba) none does; where both actions are worth the
    same (ab-ba, all) each agent tosses a coin."""
    words = (*XOR, "--dataset", dataset, "--omar", share)
    returns = train(tmp_path / "run", *words)["return"]["per_seed"]
    assert set(returns) <= {0, 1} and fewest <= sum(returns) <= most, returns


@pytest.mark.parametrize("cql, both", [(0.1, 1), (5.0, 0)])
def test_xor_ends_at_bb_or_with_a_heavy_penalty_at_aa(tmp_path, cql, both):
    """What looks best to each, or what each did most often."""
    train(tmp_path / "run", *XOR, "--dataset", "aa-ab-ba", "--cql", cql)
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]["team"]
    args = omar.parse(["--resume", "--out-dir", str(tmp_path / "run")])
    found, _ = omar.arrange(data.load("matrix", "xor", "aa-ab-ba"), args)
    team = omar.Team(found, args, streams(10))
    team.load_state_dict(weights)
    log_pi = omar.unroll(team.policies, found, torch.zeros(10, 1, 1, dtype=torch.int64))[:, 0, 0]  # (S, N, A)
    joint = log_pi[..., both].sum(-1).exp()
    assert (joint > 0.9).all(), joint


@pytest.mark.parametrize("dataset, reached", [("balanced", 20), ("imbalanced", 5)])
@pytest.mark.long
def test_m_ne_is_found_where_the_data_do_not_hide_it(tmp_path, dataset, reached):
    summary = train(tmp_path / "run", *GAME, "--task", "m-ne", "--dataset", dataset)
    assert summary["return"]["per_seed"] == [reached] * 10


@pytest.mark.parametrize("dataset, most", [("mixed", -10), ("optimal", -1.5)])
@pytest.mark.long
def test_bridge_fails(tmp_path, dataset, most):
    """Sampled, by the mean of 10 seeds; the best is -1.2355."""
    words = ("--env", "bridge", "--dataset", dataset, "--num-seeds", 10, "--steps", 300, "--eval-every", 300)
    assert train(tmp_path / "run", *words)["sampled_return"]["mean"] < most


# ---------------------------------------------------------------- the script
WORDS = "--num-seeds 2 --steps 30 --eval-every 10 --eval-episodes 2 --hidden 16 --sequences 2".split()


def test_seeds_at_once_are_single_runs(tmp_path, float64):
    words = (*BRIDGE, *WORDS, "--recurrent", "--steps", 8, "--eval-every", 4)
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
    omar.main(omar.parse(["--resume", "--out-dir", str(tmp_path / "broken")]))
    assert (tmp_path / "whole" / "metrics.csv").read_text() == (tmp_path / "broken" / "metrics.csv").read_text()
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken"))
    for summary in (one, other):
        assert summary.pop("wall_seconds") > 0 and summary.pop("updates_per_second") > 0
    assert one == other and one["script"] == "omar" and one["sampled_return"] is not None


@pytest.mark.long
def test_battles_are_learned_with_a_memory(tmp_path):
    words = "--env smac --task 3m --episodes 20 --eval-episodes 1 --steps 3 --eval-every 3".split()
    summary = train(tmp_path / "run", *words, "--num-seeds", 2, "--hidden", 8, "--sequences", 2)
    assert summary["win_rate"]["mean"] >= 0 and summary["sampled_win_rate"]["mean"] >= 0
    assert (tmp_path / "run" / "team.pt2").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["args"]["recurrent"]


@pytest.mark.parametrize("words, method", [((), "OMAR"), (("--omar", "0"), "independent actor-critic with CQL")])
def test_it_says_which_method_it_was(tmp_path, words, method):
    few = "--num-seeds 1 --steps 1 --eval-every 1 --eval-episodes 1".split()
    process = command("algorithms/omar.py", *few, *words, "--out-dir", tmp_path / "run")
    assert process.returncode == 0 and f"\n{method} on matrix-xor" in process.stdout, process.stderr


@pytest.mark.parametrize("flags, said", [
    (("--env", "chess"), "unknown environment: choose"),
    (("--env", "reacher"), "see td3_bc.py"),
    (("--task", "6x1"), "matrix has no task '6x1'"),
    (("--dataset", "best"), "choose ab, ab-ba"),
    (("--omar", "1.5"), "--omar must be at least 0 and at most 1"),
    (("--sequences", "0"), "--sequences must be above 0"),
    (("--resume", "--out-dir", "nowhere"), "no run to resume in nowhere"),
])  # fmt: skip
def test_bad_input_is_refused(tmp_path, flags, said):
    refuses(omar, flags, said, tmp_path / "run")


def test_continuous_actions_of_any_environment_are_refused():
    with pytest.raises(ValueError, match="see td3_bc.py"):
        omar.arrange(data.collect_dataset("reacher", "all-observant", "expert-mix", episodes=2), omar.Args())


def test_step_sizes_that_diverge_end_in_one_line(tmp_path):
    words = (*BRIDGE, *WORDS, "--lr", 1e30, "--out-dir", tmp_path / "run")
    process = command("algorithms/omar.py", *words)
    complains(process, "not finite after 10 steps")
