"""OMIGA: losses and whole updates against slow loops, its limits, and what it does on XOR."""

import copy
import math

import pytest
import torch
from by_hand import begins_well, draws_well, follow, one, same, step, stir, streams
from conftest import load_script

from data import load

omiga = load_script("omiga")
S, N, A, B = 2, 3, 4, 7
STARTS = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8])  # two episodes, of 5 and 3 steps
KINDS = [(True, False), (True, True), (False, False)]  # discrete, shared


def made(discrete=True, shared=False, **flags):
    """Two episodes, arguments, and teams of S seeds whose target networks have moved away."""
    torch.manual_seed(0)
    R = 10
    obs, state, reward = torch.randn(R, N, 5), torch.randn(R, 6), torch.randn(R)
    avail, action = None, torch.rand(R, N, 2) - 0.5
    if discrete:
        avail = torch.rand(R, N, A) < 0.6
        avail[..., 1] = True
        action = torch.multinomial(avail.flatten(0, 1).double(), 1).view(R, N)
    done = torch.zeros(R)
    done[4] = 1
    args = omiga.Args(hidden=8, batch_size=B, shared=shared, **flags)
    data = omiga.Data(obs, state, avail, action, reward, done, STARTS)
    team = omiga.Team(data, args, streams())
    begins_well(omiga.Linear, team.policies)
    stir(team)
    return data, args, team


def log_prob(policies, q, i, obs, avail, action):
    """log pi_i of one action."""
    out = one(policies.body, q, obs)
    if avail is not None:
        return out[action] - torch.logsumexp(out[avail], 0)
    mean, log_std = out[:2], out[2:]
    spread = (policies.log_spread[i, 0] + log_std).clamp(-6, 0).exp()
    return torch.distributions.Normal(mean, spread).log_prob(action).sum()


def losses_by_hand(team, data, rows, args):
    """Eqs. 2, 4 and 5 of each seed, and all z before they are clipped."""
    (q_net, mixer), v_net = team.critic, team.v
    (target_q, target_mixer), target_v = team.targets
    critic, value, policy, all_z = [], [], [], []
    for s in range(S):
        critic_loss = value_loss = policy_loss = 0.0
        for row in rows[s].tolist():
            weights, later = one(mixer.net, s, data.state[row]), data.state[row + 1]
            target_weights = one(target_mixer.net, s, data.state[row]).detach()
            next_weights = one(target_mixer.net, s, later)
            total, next_total = weights[N], next_weights[N]
            for i in range(N):
                n = s if args.shared else s * N + i
                obs, action, taken = data.obs[row, i], data.action[row, i], data.action[row, i]
                avail = None if data.avail is None else data.avail[row, i]
                if avail is not None:
                    taken = torch.eye(A)[action]
                q = one(q_net, n, torch.cat([obs, taken]))[0]
                total = total + abs(weights[i]) * q
                next_v = one(target_v, n, data.obs[row + 1, i])[0]
                next_total = next_total + abs(next_weights[i]) * next_v
                q = one(target_q, n, torch.cat([obs, taken]))[0].detach()
                v, w = one(v_net, n, obs)[0], abs(target_weights[i])
                z = w * (q - v) / args.alpha
                all_z.append(z.item())
                exp_z = math.exp(10) if z > 10 else math.exp(-10) if z < -10 else z.exp()
                value_loss += (exp_z + w * v / args.alpha) / (N * B)
                log_pi = log_prob(team.policies, n, i, obs, avail, action)
                policy_loss -= torch.as_tensor(exp_z).detach() * log_pi / B
            y = data.reward[row] + args.gamma * (1 - data.done[row]) * next_total.detach()
            critic_loss += (total - y) ** 2 / B
        critic.append(critic_loss), value.append(value_loss), policy.append(policy_loss)
    return critic, value, policy, all_z


@pytest.mark.parametrize("discrete, shared", KINDS)
def test_whole_updates_by_hand(float64, discrete, shared):
    data, args, team = made(discrete, shared, alpha=0.03, max_grad_norm=5.0, lr=0.01, tau=0.1)
    other = copy.deepcopy(team)
    adam = torch.optim.Adam(team.parameters(), args.lr, fused=True)
    generators = streams()
    parts = {"critic": other.critic, "v": other.v, "policies": other.policies}
    stock = {name: torch.optim.Adam(part.parameters(), args.lr) for name, part in parts.items()}
    longer, all_z, ended = [], [], []
    for k in range(3):
        rows = omiga.draw_rows(generators, data, args)
        logs = omiga.update(team, adam, data, rows, args)
        *losses, z = losses_by_hand(other, data, rows, args)
        for name, loss, log in zip(parts, losses, ("q_loss", "v_loss", "policy_loss")):
            assert torch.allclose(logs[log], torch.stack(loss), rtol=1e-9)
            longer += step(stock[name], parts[name], loss, args.max_grad_norm)
        exp_z = torch.tensor(z).clamp(-10, 10).exp().view(S, -1)
        assert torch.allclose(logs["weight"], exp_z.mean(1))
        networks = [*other.critic.parameters(), *other.v.parameters()]
        follow(other.targets.parameters(), networks, args.tau)
        assert same(team, other)
        all_z += z
        ended.append(data.done[rows])
    assert max(all_z) > 10 and min(all_z) < -10 and min(map(abs, all_z)) < 10
    assert any(longer) and not all(longer) and torch.cat(ended).any()


def test_a_huge_alpha_clones(float64):
    data, args, team = made()
    batch = omiga.gather(data, omiga.draw_rows(streams(), data, args))
    weight = omiga.advantage(team, batch, 1e12)[0].exp()
    assert torch.allclose(weight, torch.ones(S, N, B), atol=1e-9)


def test_everything_begins_as_it_should(float64):
    data, args, _ = made(discrete=False)
    draws_well(omiga.draw_rows, data, args)
    team = omiga.Team(data, args, streams())
    begins_well(omiga.Linear, team.policies)
    assert same(team.targets, torch.nn.ModuleList([team.critic, team.v]))
    spread = data.action[STARTS].std(0, correction=0)
    assert torch.allclose(team.policies.log_spread[:, 0], spread.log())


def test_agents_act_as_their_policies_say(float64):
    data, _, team = made()
    obs, avail = data.obs.transpose(0, 1), data.avail.transpose(0, 1)
    log_pi = team.policies(obs.expand(S, -1, -1, -1), avail)
    assert torch.allclose(log_pi.exp().sum(-1), torch.ones(S, N, 10))
    assert (log_pi.exp()[:, ~avail] == 0).all()
    assert torch.equal(team.policies.sample(log_pi), log_pi.argmax(-1))
    clocks = torch.empty(4000, S, N, 10, A).exponential_()
    drawn = torch.nn.functional.one_hot(team.policies.sample(log_pi, clocks), A).double().mean(0)
    assert (drawn - log_pi.exp()).abs().max() < 0.04
    data, _, team = made(discrete=False)
    out = team.policies(obs.expand(S, -1, -1, -1), None)
    assert torch.equal(team.policies.sample(out), out[..., :2])


def test_who_shares_a_network_is_told_who_it_is():
    args = omiga.parse(["--env", "matrix", "--task", "xor", "--shared"])
    data, encode = omiga.arrange(load("matrix", "xor", args.dataset), args)
    assert (data.obs[:, :, -2:] == torch.eye(2)).all()
    assert (encode(torch.ones(3, 4, 2, 1))[..., -2:] == torch.eye(2)).all()


def test_it_ends_where_nobody_was(tmp_path):
    words = "--env matrix --task xor --dataset aa-ab-ba --num-seeds 4 --steps 400 --eval-every 400"
    args = omiga.parse([*words.split(), "--out-dir", str(tmp_path / "run")])
    assert omiga.main(args)["sampled_return"]["mean"] <= 0.1
