"""InSPO: each equation against a slow loop, the propositions on tables, and the paper's claims through the command line."""

import copy
import csv
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import h5py
import pytest
import torch
from conftest import ROOT, SHARED, command, complains, load_script
from tabular import boltzmann, evaluate, local_q, one_state_operator, random_game, sweep

import data

inspo = load_script("inspo")
S, B, A, D, O = 3, 7, 4, 5, 6


def table(rows):
    return [[float(x) for x in row] for row in rows]


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
    return inspo.Batch(
        state=normal(S, B, D), obs=normal(S, B, O), avail=avail, log_mu=log_mu, next_state=normal(S, B, D),
        next_obs=normal(S, B, O), next_avail=next_avail, next_log_mu=next_log_mu, action=action,
        reward=normal(S, B), done=(torch.rand(S, B, generator=g) > 0.7).double(),
    )  # fmt: skip


def networks(seed=0):
    """A critic, a target and a policy with S seeds."""
    generators = [torch.Generator().manual_seed(seed + s) for s in range(S)]
    args = inspo.Args(hidden=8)
    return inspo.mlp(D, A, args, generators), inspo.mlp(D, A, args, generators), inspo.mlp(O, A, args, generators)


def softmax_of(logits, avail):
    weights = [math.exp(x) if ok else 0.0 for x, ok in zip(logits, avail)]
    return [w / sum(weights) for w in weights]


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
    batch, (critic, target, policy) = random_batch(), networks()
    alpha, beta, gamma, cql = torch.tensor([[0.1], [0.5], [2.0]]), torch.tensor(0.3), 0.9, 0.7
    q, q_next, logits = critic(batch.state), target(batch.next_state), policy(batch.next_obs)
    found = inspo.critic_loss(critic, target, policy, batch, alpha, beta, gamma, cql)
    for s in range(S):
        total = 0.0
        for b in range(B):
            pi = softmax_of(logits[s, b].tolist(), batch.next_avail[s, b].tolist())
            value = 0.0
            for a in range(A):
                if pi[a] > 0:
                    log_ratio = math.log(pi[a]) - batch.next_log_mu[s, b, a].item()
                    value += pi[a] * (q_next[s, b, a].item() - alpha[s, 0].item() * log_ratio - 0.3 * math.log(pi[a]))
            y = batch.reward[s, b].item() + (0.0 if batch.done[s, b] else gamma * value)
            taken = q[s, b, batch.action[s, b]].item()
            all_q = sum(math.exp(q[s, b, a].item()) for a in range(A) if batch.avail[s, b, a])
            total += (taken - y) ** 2 + cql * (math.log(all_q) - taken)
        assert found[s].item() == pytest.approx(total / B, rel=1e-12)
    found.sum().backward()
    assert all(p.grad is None for p in [*target.parameters(), *policy.parameters()])  # y is a constant


def test_conservative_term_pushes_unseen_actions_down(float64):
    batch, (critic, target, policy) = random_batch(), networks()
    batch = batch._replace(avail=torch.ones_like(batch.avail), action=torch.zeros_like(batch.action), reward=torch.zeros(S, B),
                           done=torch.ones(S, B))  # fmt: skip
    adam = torch.optim.Adam(critic.parameters(), 1e-2)
    for _ in range(300):
        inspo.descend(
            adam, inspo.critic_loss(critic, target, policy, batch, torch.ones(S, 1), torch.tensor(0.0), 0.9, 0.5)
        )
    q = critic(batch.state)
    assert (q[..., 0, None] > q[..., 1:] + 1).all()


def test_policy_loss_is_equation_20(float64):
    batch, (_, target, policy) = random_batch(), networks()
    alpha, beta = torch.tensor([[0.1], [0.5], [2.0]]), torch.tensor(0.3)
    q, logits = target(batch.state), policy(batch.obs)
    found, kl = inspo.policy_loss(policy, target, batch, alpha, beta, cap=1.5)
    capped = 0
    for s in range(S):
        T, total, divergence = alpha[s, 0].item() + 0.3, 0.0, 0.0
        for b in range(B):
            legal = [a for a in range(A) if batch.avail[s, b, a]]
            mu, taken = batch.log_mu[s, b].exp().tolist(), batch.action[s, b].item()
            z = sum(mu[a] ** (alpha[s, 0].item() / T) * math.exp(q[s, b, a].item() / T) for a in legal)
            weight = math.exp((q[s, b, taken].item() - 0.3 * math.log(mu[taken]) - T * math.log(z)) / T)
            capped += weight > 1.5
            assert weight <= 1 / mu[taken] * (1 + 1e-9)
            pi = softmax_of(logits[s, b].tolist(), batch.avail[s, b].tolist())
            total -= min(weight, 1.5) * math.log(pi[taken])
            divergence += sum(pi[a] * math.log(pi[a] / mu[a]) for a in legal)
        assert found[s].item() == pytest.approx(total / B, rel=1e-10)
        assert kl[s].item() == pytest.approx(divergence / B, rel=1e-10)
    assert capped  # or the cap was not tested
    found.sum().backward()
    assert all(p.grad is None for p in target.parameters())


def test_the_best_clone_is_equation_12(float64):
    """Minimising the policy loss over recorded actions gives mu^(alpha/T) exp(Q/T) / Z."""
    g = torch.Generator().manual_seed(1)
    mu, q = torch.softmax(torch.randn(A, generator=g), 0), torch.randn(A, generator=g)
    actions = torch.multinomial(mu, 100_000, True, generator=g)[None]  # (1, B)
    n = actions.shape[1]
    row = torch.zeros(1, n, 1)
    batch = inspo.Batch(row, row, torch.ones(1, n, A, dtype=torch.bool), mu.log().expand(1, n, A), row, row, None, None,
                        actions, None, None)  # fmt: skip
    logits = torch.zeros(A, requires_grad=True)
    adam = torch.optim.Adam([logits], 0.05)
    for _ in range(200):
        loss, _ = inspo.policy_loss(lambda x: logits.expand(1, n, A), lambda x: q.expand(1, n, A), batch,
                                    torch.tensor([[0.4]]), torch.tensor(0.2), cap=1e9)  # fmt: skip
        inspo.descend(adam, loss)
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


def test_teammate_model_is_autoregressive(float64):
    """Eq. 22: it normalises, sees a_i and earlier teammates, and does not see a later one's action."""
    N = 3
    g = [torch.Generator().manual_seed(s) for s in range(S)]
    net = inspo.mlp(D + N + N * A, A, inspo.Args(hidden=8), g)
    state, avail = torch.randn(S, 1, D), torch.ones(S, 1, N, A, dtype=torch.bool)
    avail[:, :, 2, 3] = False
    for i in range(N):
        total = 0.0
        for actions in itertools.product(range(A), repeat=N):
            if actions[i] == 1 and actions[2] != 3:
                joint = torch.tensor(actions).expand(S, 1, N)
                log_prob = inspo.teammate_log_prob(net, state, avail, joint, i)
                total = total + log_prob.exp()
                slow = 0.0
                for j in [j for j in range(N) if j != i]:
                    known = torch.zeros(N, A)
                    for k in range(N):
                        if k == i or k < j:
                            known[k, actions[k]] = 1
                    x = torch.cat([state[:, 0], torch.eye(N)[j].expand(S, -1), known.flatten().expand(S, -1)], -1)
                    logits = net(x[:, None])[:, 0].masked_fill(~avail[:, 0, j], -torch.inf)
                    slow = slow + torch.log_softmax(logits, -1)[:, actions[j]]
                assert torch.allclose(log_prob[:, 0], slow, atol=1e-12)
        assert torch.allclose(total, torch.ones(S, 1))


def test_cloned_models_fit_the_counts():
    """Eq. 21 and 22 on correlated data: mu_i meets the marginals, mu(a_j | a_i) the conditionals, not their product."""
    recorded = data.collect_dataset("matrix", "xor", "aa-ab-ba")
    flat = recorded.flatten()
    args = inspo.Args(num_seeds=S, **{k: v for k, v in inspo.preset("xor").items() if k != "dataset"})
    team = inspo.Team(2, 2, 1, 1, args, [torch.Generator().manual_seed(s) for s in range(S)])
    inspo.clone(team, flat, args, [torch.Generator().manual_seed(s) for s in range(S)])
    inspo.tabulate(team, flat, S)
    share = recorded.joint_actions()
    for i, table in enumerate((share, share.T)):  # rows: agent i
        marginal, conditional = table.sum(1), table / table.sum(1, keepdim=True)
        assert torch.allclose(flat["log_mu"][i].exp()[:, 0], marginal.expand(S, 2), atol=0.05)
        taken, other = flat["actions"][:, i], flat["actions"][:, 1 - i]
        assert torch.allclose(flat["log_mu_others"][i].exp(), conditional[taken, other].expand(S, -1), atol=0.07)
    assert torch.equal(team.policies[0][0].weight, team.mus[0][0].weight)


def test_auto_alpha_moves_towards_the_target(tmp_path):
    """Eq. 25: alpha rises while the KL divergence is above its target, and falls below it."""
    for target, rises in ((0.05, True), (3.0, False)):
        out = tmp_path / f"{target}"
        inspo.main(inspo.parse(["--env", "matrix", "--num-seeds", "2", "--steps", "300", "--eval-every", "300", "--auto-alpha",
                                "--kl-target", str(target), "--alpha-lr", "0.01", "--out-dir", str(out)]))  # fmt: skip
        alphas = [float(row["alpha"]) for row in csv.DictReader((out / "metrics.csv").open()) if row["step"] == "300"]
        assert all((alpha > 0.02) == rises for alpha in alphas), alphas


def small_team(num_agents=4, M=20, **flags):
    """A team of S seeds and random one-step data for it: (team, data, args)."""
    args = inspo.Args(hidden=8, batch_size=16, num_seeds=S, **flags)
    g = torch.Generator().manual_seed(0)
    data = {
        "obs": torch.randn(2 * M, num_agents, O, generator=g),
        "state": torch.randn(2 * M, D, generator=g),
        "avail_actions": torch.ones(2 * M, num_agents, A, dtype=torch.bool),
        "row": torch.arange(0, 2 * M, 2),
        "actions": torch.randint(A, (M, num_agents), generator=g),
        "reward": torch.randn(M, generator=g),
        "done": torch.ones(M),
    }
    team = inspo.Team(num_agents, A, O, D, args, [torch.Generator().manual_seed(s) for s in range(S)])
    inspo.tabulate(team, data, S)
    return team, data, args


def test_orders():
    team, data, args = small_team()
    generators = [torch.Generator().manual_seed(s) for s in range(S + 1)]

    def order(kind):
        args.order = kind
        return inspo.agent_order(team, data, generators, args)

    assert {tuple(order("random")) for _ in range(400)} == set(itertools.permutations(range(4)))
    assert order("fixed") == [0, 1, 2, 3]
    # Q_i = c_i on action 0 and -c_i on action 1, both recorded, against a uniform policy: |advantage| = c_i.
    data["actions"] = data["actions"] % 2
    for c, target, policy in zip((0.1, 0.7, 0.3, 0.2), team.targets, team.policies):
        for parameter in [*target.parameters(), *policy.parameters()]:
            parameter.data.zero_()
        target[-1].bias.data += torch.tensor([c, -c, 0, 0])
    for _ in range(20):
        found = order("semi-greedy")
        assert sorted(found) == [0, 1, 2, 3] and found[0] == 1
        left = [j for j in (0, 2, 3) if j != found[1]]
        assert found[2] == max(left, key=(0.1, 0.7, 0.3, 0.2).__getitem__)


def test_a_turn_changes_one_agent_only(float64):
    team, data, args = small_team()
    adams = {
        "critics": [torch.optim.Adam(critic.parameters(), 1e-2) for critic in team.critics],
        "policies": [torch.optim.Adam(policy.parameters(), 1e-2) for policy in team.policies],
    }
    before = copy.deepcopy(team.state_dict())
    noise = torch.rand(S, 2, args.batch_size)
    losses = inspo.critic_loss, inspo.policy_loss
    logs = inspo.turn(2, team, team.policies, data, noise, torch.tensor(0.1), True, adams, losses, args)
    after = team.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("critics.2.", "policies.2.", "targets.2."))}
    for name in (n for n in before if n.startswith("targets.2.")):  # tau of the way to the new critic
        expected = before[name] + args.tau * (after[name.replace("targets", "critics")] - before[name])
        assert torch.allclose(after[name], expected, atol=1e-14)
    assert all(value.shape == (S,) for value in logs.values())
    # An action that nobody took with the team's current ones has a small ratio, so the sample shrinks.
    assert ((logs["sample_size"] > 1) & (logs["sample_size"] <= args.batch_size)).all()


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
    row, rows = torch.zeros(1, n, 1), (1, n, 2)
    batch = inspo.Batch(row, row, torch.ones(rows, dtype=torch.bool), mu.log().expand(rows), row, row, None, None,
                        action[0, again][None], None, None)  # fmt: skip
    logits = torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([logits], 0.05)
    for _ in range(200):
        loss, _ = inspo.policy_loss(lambda x: logits.expand(rows), lambda x: q.expand(rows), batch,
                                    torch.tensor([[alpha]]), torch.tensor(beta), cap=1e9)  # fmt: skip
        inspo.descend(adam, loss)
    exact = one_state_operator(share, XOR, [mu, team], alpha, beta, order=(0,))[0]
    assert torch.allclose(torch.softmax(logits, 0), exact, atol=6e-3)


def test_script_finds_the_tables_fixed_point(tmp_path):
    """With constant alpha and beta and no conservative term, training ends at the quantal response equilibrium."""
    payoff, alpha, beta = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]), 1.0, 1.0
    task, behaviour = json.dumps(payoff.tolist()), "[0.5, 0.3, 0.2]"
    summary = inspo.main(inspo.parse([
        "--env", "matrix", "--task", task, "--dataset", behaviour, "--num-seeds", "3", "--steps", "1500", "--eval-every", "1500",
        "--alpha", str(alpha), "--beta", str(beta), "--beta-end", str(beta), "--beta-hold", "0", "--warmup", "0", "--cql", "0",
        "--out-dir", str(tmp_path / "run")]))  # fmt: skip
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


# ---------------------------------------------------------------- all seeds at once, compile, kill and resume
def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["team"]


SHORT = ["--dataset", "mixed", "--steps", "60", "--eval-every", "20", "--eval-episodes", "4", "--clone-steps", "50"]


def test_five_seeds_at_once_are_five_single_runs(tmp_path, float64):
    inspo.main(inspo.parse([*SHORT, "--seed", "3", "--out-dir", str(tmp_path / "all")]))
    together = weights(tmp_path / "all")
    rows = list(csv.DictReader((tmp_path / "all" / "metrics.csv").open()))
    for s in range(5):
        out = tmp_path / f"one{s}"
        inspo.main(inspo.parse([*SHORT, "--seed", str(3 + s), "--num-seeds", "1", "--out-dir", str(out)]))
        for name, tensor in weights(out).items():
            assert torch.allclose(tensor[0], together[name][s], atol=1e-9), name
        single = list(csv.DictReader((out / "metrics.csv").open()))
        mine = [row for row in rows if row["seed"] == str(3 + s)]
        for one, other in zip(single, mine, strict=True):
            assert one.keys() == other.keys()
            assert all(float(one[k]) == pytest.approx(float(other[k]), abs=1e-8) for k in one)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_losses_agree_with_eager(float64):
    batch, (critic, target, policy) = random_batch(), networks()
    alpha, beta = torch.full((S, 1), 0.3), torch.tensor(0.1)
    for loss, inputs in ((inspo.critic_loss, (critic, target, policy, batch, alpha, beta, 0.9, 0.5)),
                         (inspo.policy_loss, (policy, target, batch, alpha, beta, 5.0))):  # fmt: skip
        results = []
        for function in (loss, torch.compile(loss)):
            for parameter in [*critic.parameters(), *policy.parameters()]:
                parameter.grad = None
            out = function(*inputs)
            value = out[0] if isinstance(out, tuple) else out
            value.sum().backward()
            grads = [p.grad.clone() for p in [*critic.parameters(), *policy.parameters()] if p.grad is not None]
            results.append([value.detach(), *grads])
        assert len(results[0]) == len(results[1]) > 1
        assert all(torch.allclose(eager, compiled, atol=1e-12) for eager, compiled in zip(*results))


def start(*words):
    return subprocess.Popen([sys.executable, "algorithms/inspo.py", *map(str, words)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for_step(folder, step):
    """Until the run in `folder` has written a row of metrics for `step`."""
    for _ in range(1200):
        path = folder / "metrics.csv"
        if path.exists() and any(row["step"] == str(step) for row in csv.DictReader(path.open())):
            return
        time.sleep(0.05)
    raise TimeoutError(f"{folder} never reached step {step}")


LONGER = ["--num-seeds", "2", "--steps", "1200", "--eval-every", "100", "--eval-episodes", "4", "--clone-steps", "50",
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
    assert 200 <= killed_at < 1200
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


def test_ctrl_c_leaves_the_last_checkpoint(tmp_path):
    process = start(*LONGER, "--out-dir", tmp_path / "run")
    wait_for_step(tmp_path / "run", 200)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines() == [f"interrupted; go on with: --resume --out-dir {tmp_path / 'run'}"]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_turn_on_a_gpu_never_waits_for_the_host():
    team, data, args = small_team()
    team, data = team.cuda(), {k: [x.cuda() for x in v] if isinstance(v, list) else v.cuda() for k, v in data.items()}
    adams = {
        "critics": [torch.optim.Adam(critic.parameters(), 1e-2, fused=True) for critic in team.critics],
        "policies": [torch.optim.Adam(policy.parameters(), 1e-2, fused=True) for policy in team.policies],
    }
    noise, beta = torch.rand(S, 2, args.batch_size, device="cuda"), torch.tensor(0.1, device="cuda")
    losses = inspo.critic_loss, inspo.policy_loss
    for mode in ("default", "error"):  # the first turn sets things up
        torch.cuda.set_sync_debug_mode(mode)
        logs = inspo.turn(1, team, team.policies, data, noise, beta, True, adams, losses, args)
    torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in logs.values())


# ---------------------------------------------------------------- the paper's claims, through the command line
def train(out, *words):
    process = command("algorithms/inspo.py", *words, "--out-dir", out)
    assert process.returncode == 0, process.stderr
    return json.loads((out / "summary.json").read_text()), process.stdout


@pytest.mark.parametrize("dataset", ["ab", "ab-ba", "aa-ab-ba", "all"])
def test_xor_is_solved_by_ten_of_ten_seeds(tmp_path, dataset):
    summary, _ = train(tmp_path / "run", "--env", "matrix", "--task", "xor", "--dataset", dataset, "--num-seeds", 10)
    assert summary["seeds"] == list(range(10))
    for joint in summary["joint_policy"]:
        assert max(joint[0][1], joint[1][0]) > 0.97  # one convention, AB or BA, and nearly nothing else
    assert summary["return"]["per_seed"] == [1.0] * 10


def test_xor_fails_without_looking_at_the_teammates(tmp_path):
    """The sheet's S2: without resampling, every seed lands on the joint action that nobody ever took."""
    summary, _ = train(
        tmp_path / "run", "--env", "matrix", "--dataset", "aa-ab-ba", "--num-seeds", 10, "--no-resampling"
    )
    assert all(joint[1][1] > 0.8 for joint in summary["joint_policy"])
    assert summary["return"]["per_seed"] == [0.0] * 10


def test_xor_simultaneous_updates_conflict(tmp_path):
    """The paper's Figure 5b, in a setting where the conflict is complete: linear policies, well-fitted clones, many
    steps per turn. It is no general failure: the README lists settings in which simultaneous updates succeed."""
    words = "--env matrix --dataset aa-ab-ba --num-seeds 10 --layers 0 --inner 150 --steps 9 --eval-every 9".split()
    words += "--policy-lr 0.05 --critic-lr 0.05 --clone-lr 0.05 --actor-data uniform".split()
    sequential, _ = train(tmp_path / "now", *words)
    simultaneous, _ = train(tmp_path / "before", *words, "--no-sequential")
    assert sequential["return"]["per_seed"] == [1.0] * 10
    assert simultaneous["return"]["per_seed"] == [0.0] * 10


@pytest.mark.parametrize(
    "words, reward", [(("balanced",), 20), (("imbalanced",), 20), (("imbalanced", "--beta", 0), 5)]
)
def test_m_ne_needs_the_entropy_to_leave_a_local_optimum(tmp_path, words, reward):
    summary, _ = train(tmp_path / "run", "--env", "matrix", "--task", "m-ne", "--num-seeds", 10, "--dataset", *words)
    assert summary["return"]["per_seed"] == [reward] * 10


BRIDGE = ["optimal", "mixed", pytest.param(str(SHARED / "alberdice_bridge_optimal"), id="real", marks=pytest.mark.skipif(
    not (SHARED / "alberdice_bridge_optimal").exists(), reason="the real dataset is not here"))]  # fmt: skip


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
    assert [int(row["step"]) for row in rows] == [step for step in range(0, 3001, 100) for _ in range(5)]
    config = json.loads((folder / "config.json").read_text())
    assert config["args"] == asdict(inspo.Args(dataset=dataset, out_dir=str(folder))) and config["git_commit"]


@pytest.mark.parametrize(
    "words, worse_than",
    [(("--no-resampling",), -1.5), (("--cql", 0), -1.5), (("--alpha", 0.1), -1.4)],
    ids=["no resampling", "no conservative term", "alpha too large"],
)
def test_bridge_needs_each_part(tmp_path, words, worse_than):
    """On the optimal data a cloned team samples about -1.85, InSPO -1.25; without one of its parts it stays behind."""
    words = ("--dataset", "optimal", "--steps", 1500, "--eval-every", 1500, *words)
    summary, _ = train(tmp_path / "run", *words)
    assert summary["sampled_return"]["mean"] < worse_than


@pytest.mark.parametrize("dataset", ["neutral", "unfavourable"])
def test_coordination_is_solved_whatever_the_data_prefer(tmp_path, dataset):
    words = ("--env", "matrix", "--task", "coordination", "--dataset", dataset, "--num-seeds", 10)
    summary, _ = train(tmp_path / "run", *words)
    assert summary["return"]["per_seed"] == [1.0] * 10 and summary["sampled_return"]["mean"] > 0.95


def test_a_table_of_three_agents_written_on_the_command_line(tmp_path):
    words = ("--env", "matrix", "--task", "[[[1, 0], [0, 0]], [[0, 0], [0, 1]]]", "--steps", 600, "--eval-every", 200)
    summary, _ = train(tmp_path / "run", *words)
    assert summary["return"]["mean"] > summary["dataset_return"] and summary["best_return"] == 1


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("words, said", [
    (("--env", "chess"), "unknown environment 'chess': choose one of"),
    (("--env", "matrix", "--task", "chess"), "matrix has no task 'chess'"),
    (("--task", "wide"), "bridge has no task 'wide'"),
    (("--dataset", "expert"), "no dataset 'expert': choose optimal, mixed"),
    (("--dataset", "nowhere.h5"), "no dataset file nowhere.h5"),
    (("--num-seeds", "0"), "--num-seeds must be above 0"),
    (("--device", "tpu"), "unknown device 'tpu'"),
    (("--out-dir", "/dev/null/run"), "/dev/null"),
    (("--out-dir", "/proc/run"), "/proc/run"),
    (("--resume", "--out-dir", "nowhere"), "no run to resume in nowhere"),
    (("--critic-lr", "1e30", "--clone-steps", "5", "--eval-every", "20"), "q_loss is not finite after 20 updates"),
    (("--env", "matrix", "--one-hot", "--task", "xor"), "add --no-one-hot"),
])  # fmt: skip
def test_bad_input_ends_in_one_line(tmp_path, words, said):
    out = () if "--out-dir" in words else ("--out-dir", tmp_path / "run")
    complains(command("algorithms/inspo.py", *words, *out), said)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("summary.json"))


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
    complains(command("algorithms/inspo.py", "--dataset", path), "use --env matrix --task 'xor'")
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
