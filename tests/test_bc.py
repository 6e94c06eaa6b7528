"""BC: its loss against slow loops, one update by hand, its masks, and what cloning comes to."""

import math

import pytest
import torch
from conftest import load_script

from data.run import stream

bc = load_script("bc")

S, N, A, M, I = 2, 3, 4, 30, 5


def generators(count=S, purpose=1):
    return [stream(s, purpose) for s in range(count)]


def some_data(discrete=True):
    """M random steps; an action that was taken is available, and some others are not."""
    torch.manual_seed(0)
    if not discrete:
        return bc.Data(torch.randn(M, N, I), None, 2 * torch.rand(M, N, A) - 1)
    action, avail = torch.randint(A, (M, N)), torch.rand(M, N, A) > 0.4
    return bc.Data(torch.randn(M, N, I), avail.scatter(-1, action[..., None], True), action)


def some_policies(found, **changes):
    args = bc.Args(hidden=8, batch_size=6, num_seeds=S, **changes)
    policies = bc.Policies(found, args, generators(purpose=0))
    with torch.no_grad():
        for parameter in policies.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return args, policies


# ---------------------------------------------------------------- equations
def alone(policies, s, i):
    """The network of one agent of one seed, made of torch's own layers."""
    layers = []
    for layer in policies.body:
        if isinstance(layer, bc.Linear):
            single, q = torch.nn.Linear(*layer.weight.shape[1:]), s * N + i
            single.weight.data, single.bias.data = layer.weight[q].T, layer.bias[q, 0]
            layer = single
        layers.append(layer)
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("discrete", [True, False])
def test_the_loss_is_a_slow_loop(float64, discrete):
    found = some_data(discrete)
    args, policies = some_policies(found)
    rows = bc.draw_rows(generators(), found, args)  # (S, B)
    avail = found.avail[rows].transpose(1, 2) if discrete else None
    loss = bc.clone_loss(
        policies, found.obs[rows].transpose(1, 2), avail, found.action[rows].transpose(1, 2)
    )
    assert not torch.equal(rows[0], rows[1])
    for s in range(S):
        total = 0.0
        for row in rows[s].tolist():
            for i in range(N):
                out = alone(policies, s, i)(found.obs[row, i]).detach()
                if discrete:
                    legal = [a for a in range(A) if found.avail[row, i, a]]
                    total -= math.log(
                        math.exp(out[found.action[row, i]]) / sum(math.exp(out[a]) for a in legal)
                    )
                    continue
                for a in range(A):
                    spread = min(
                        max(found.action[:, i, a].std(correction=0).item(), math.exp(-6)), 1
                    )
                    log_std = min(max(math.log(spread) + out[A + a].item(), -6), 0)
                    normal = torch.distributions.Normal(out[a], torch.tensor(log_std).exp())
                    total -= normal.log_prob(found.action[row, i, a]).item()
        assert loss[s].item() == pytest.approx(total / len(rows[s]), rel=1e-10)


def test_policies_begin_as_far_apart_as_the_data_and_no_two_alike(float64):
    found = some_data(discrete=False)
    found = found._replace(action=found.action * torch.tensor([1.0, 0.1, 1e-9])[:, None])
    policies = bc.Policies(found, bc.Args(hidden=64), generators(purpose=0))
    out = policies(found.obs.transpose(0, 1).expand(S, N, M, I), None)
    wanted = found.action.std(0, correction=0).clamp(min=math.exp(-6))  # (N, A)
    assert torch.allclose(out[..., A:].mean((0, 2)).exp(), wanted, rtol=0.2)
    assert not policies.body[-1].bias.any() and policies.body[0].bias.all()
    assert len({tuple(row) for row in policies.body[0].weight.flatten(1).tolist()}) == S * N


def test_an_unavailable_action_is_never_taken():
    found = some_data()
    _, policies = some_policies(found)
    obs, avail = (
        found.obs.transpose(0, 1).expand(S, N, M, I),
        found.avail.transpose(0, 1).expand(S, N, M, A),
    )
    out = policies(obs, avail)
    assert (out.exp()[~avail] == 0).all() and torch.allclose(out.exp().sum(-1), torch.ones(S, N, M))
    drawn = [policies.sample(out)] + [
        policies.sample(out, torch.empty_like(out).exponential_()) for _ in range(200)
    ]
    assert all(avail.gather(-1, action[..., None]).all() for action in drawn)
    assert torch.equal(drawn[0], out.argmax(-1))
    share = (
        torch.stack([torch.nn.functional.one_hot(action, A) for action in drawn[1:]])
        .double()
        .mean(0)
    )
    assert (
        torch.allclose(share, out.exp().double(), atol=0.2)
        and (share - out.exp()).abs().mean() < 0.03
    )


@pytest.mark.parametrize("discrete", [True, False])
def test_agents_learn_by_themselves(float64, discrete):
    """Without a limit on the team's gradient, what others did and saw does not matter."""
    found = some_data(discrete)
    shuffled = torch.arange(M).roll(7)
    other = bc.Data(*(x if x is None else torch.cat([x[:, :1], x[shuffled, 1:]], 1) for x in found))
    weights, start = [], dict(some_policies(found)[1].named_parameters())
    for each in (found, other):
        args, policies = some_policies(each, max_grad_norm=1e9)
        policies.load_state_dict(start, strict=False)
        adam, streams = torch.optim.Adam(policies.parameters(), 1e-2), generators()
        for _ in range(20):
            bc.update(policies, adam, each, bc.draw_rows(streams, each, args), args)
        weights.append([p.detach().view(S, N, -1) for p in policies.parameters()])
    for one, two in zip(*weights):
        assert torch.allclose(one[:, 0], two[:, 0], atol=1e-12)
    assert not torch.allclose(weights[0][0][:, 1], weights[1][0][:, 1], atol=1e-3)


@pytest.mark.parametrize("discrete, limit", [(True, 0.05), (True, 1e9), (False, 0.05)])
def test_one_update_by_hand(float64, discrete, limit):
    """Each seed by itself: a step of its own down the loss of its own rows, as far as it may go."""
    found = some_data(discrete)
    args, policies = some_policies(found, max_grad_norm=limit)
    sgd = torch.optim.SGD(policies.parameters(), 0.1)
    rows = bc.draw_rows(generators(), found, args)
    expected, lengths = [], []
    for s in range(S):
        _, single = some_policies(found)
        single.load_state_dict(policies.state_dict())
        loss = 0.0
        for row in rows[s].tolist():
            obs = found.obs[row, :, None].expand(S, N, 1, I)
            avail = found.avail[row, :, None] if discrete else None
            action = found.action[row, :, None].expand(S, *found.action[row, :, None].shape)
            log_pi = single.log_prob(single(obs, avail), action)
            loss = loss - log_pi[s].sum() / len(rows[s])
        own = torch.optim.SGD(single.parameters(), 0.1)
        loss.backward()
        length = sum(p.grad.square().sum() for p in single.parameters()) ** 0.5
        for p in single.parameters():
            p.grad *= min(1, limit / length)
        lengths.append(length)
        own.step()
        expected.append([p.reshape(S, -1)[s] for p in single.parameters()])
    logs = bc.update(policies, sgd, found, rows, args)
    assert min(lengths) > 0.05 and not logs["policy_loss"].requires_grad
    for s in range(S):
        for p, wanted in zip(policies.parameters(), expected[s], strict=True):
            assert torch.allclose(p.reshape(S, -1)[s], wanted, rtol=0, atol=1e-9)


def train(folder, *words):
    return bc.main(bc.parse([*map(str, words), "--out-dir", str(folder)]))


@pytest.mark.parametrize("dataset, best", [("unfavourable", 0), ("favourable", 1)])
def test_cloning_fails_where_each_agents_habit_misleads(tmp_path, dataset, best):
    summary = train(tmp_path / "a", "--num-seeds", 3, "--steps", 300, "--dataset", dataset)
    assert summary["return"]["mean"] == best
    assert 0.2 < summary["sampled_return"]["mean"] < 0.8


def test_counts_are_learned(tmp_path):
    """Where there is nothing to see, a policy becomes how often each action was taken."""
    words = "--env matrix --task xor --dataset aa-ab-ba --num-seeds 2 --steps 400".split()
    train(tmp_path / "a", *words)
    args = bc.parse(words)
    run = bc.Run("bc", args)
    dataset = run.load()
    found, _ = bc.arrange(dataset, args)
    policies = bc.Policies(found, args, generators(purpose=0))
    saved = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    policies.load_state_dict(saved["parts"]["policies"])
    obs, avail = found.obs[:1].transpose(0, 1), found.avail[:1].transpose(0, 1)
    pi = policies(obs.expand(S, 2, 1, -1), avail).exp()[:, :, 0]
    for i in range(2):
        share = torch.nn.functional.one_hot(dataset.actions[:, 0, i]).double().mean(0)
        assert torch.allclose(pi[:, i].double(), share.expand(S, 2).double(), atol=0.06)


def test_step_sizes_that_diverge_end_the_run(tmp_path):
    words = "--env reacher --episodes 4 --num-seeds 2 --steps 30 --eval-every 10 --lr 1e30"
    with pytest.raises(FloatingPointError, match="policy_loss"):
        train(tmp_path / "run", *words.split(), "--eval-episodes", 2)
