"""MADDPG + CQL + PJAP: whole updates against slow loops, the priorities, the windows."""

import copy
import csv
import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import load_script

import data as datasets

maddpg = load_script("maddpg_cql_pjap")
polygames = load_script("polygames")

S, L, B, N, A, O, D, K = 2, 4, 3, 2, 3, 5, 4, 2  # K: joint actions of each kind in CQL
SMALL = dict(num_seeds=S, window=L, batch_size=B, ood_actions=K, policy_hidden=6, critic_hidden=7)


def every(*sizes):
    return itertools.product(*map(range, sizes))


def arguments(**changes):
    return maddpg.Args(**SMALL | changes)


def streams(count=S, first=0):
    return [torch.Generator().manual_seed(first + s) for s in range(count)]


def make_data():
    """Episodes of 7, 5 and 6 rows, as `arrange` lays them out; the second hits a time limit."""
    torch.manual_seed(3)
    R = 18
    acted, done = torch.ones(R), torch.zeros(R)
    acted[[6, 11, 17]] = 0
    done[[5, 16]] = 1
    obs = torch.cat([torch.eye(N).expand(R, N, N), torch.randn(R, N, O)], -1)
    actions = (2 * torch.rand(R, N, A) - 1) * acted[:, None, None]
    return maddpg.Data(obs, torch.randn(R, D), actions, torch.randn(R) * acted, done, acted)


def make_windows():
    starts = torch.tensor([0, 1, 2, 3, 7, 8, 12, 13, 14])
    return maddpg.Windows(starts, L, S)


def make_batch():
    return make_windows().gather(torch.tensor([[3, 0, 5], [8, 4, 2]]), make_data())


def make_team(args=None):
    """A team whose targets have moved away from its networks."""
    team = maddpg.Team(make_data(), args or arguments(), streams())
    torch.manual_seed(5)
    for parameter in team.targets.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return team


# ---------------------------------------------------------------- one network at a time
def single_critic(critics, c, s):
    """Critic c of seed s as a function of one state (D,) and one joint action (N, A)."""
    first, _, second, _, third = critics.layers

    def q(state, action):
        x = torch.cat([state, action.flatten()])
        for layer in (first, second):
            x = torch.relu(x @ layer.weight[2 * s + c] + layer.bias[2 * s + c, 0])
        return (x @ third.weight[2 * s + c] + third.bias[2 * s + c, 0])[0]

    return q


def single_policy(policy, s):
    """Seed s's policy as a function of one agent's inputs along a window (L, I)."""
    gru = policy.gru

    def act(x):
        h = torch.zeros(policy.hidden)
        actions = []
        for row in x:
            row = torch.relu(row @ policy.encoder.weight[s] + policy.encoder.bias[s, 0])
            weights = gru.input[s].T, gru.state[s].T, gru.input_bias[s, 0], gru.state_bias[s, 0]
            h = torch.gru_cell(row[None], h[None], *weights)[0]
            actions.append(torch.tanh(h.relu() @ policy.head.weight[s] + policy.head.bias[s, 0]))
        return torch.stack(actions)

    return act


def slow_actions(policy, batch):
    """What a policy does along windows, one agent at a time: (S, L, B, N, A)."""
    actions = []
    for s, b, i in every(S, batch.acted.shape[2], N):
        actions.append(single_policy(policy, s)(batch.obs[s, :, b, i]))
    return torch.stack(actions).unflatten(0, (S, -1, N)).permute(0, 3, 1, 2, 4)


def test_a_policy_goes_on_with_its_memory(float64):
    policy, batch = make_team().policy, make_batch()
    early, h = policy(batch.obs[:, :2])
    late, _ = policy(batch.obs[:, 2:], h)
    torch.testing.assert_close(torch.cat([early, late], 1), policy(batch.obs)[0])


def test_critics_in_pieces_are_critics(float64, monkeypatch):
    critics = make_team().critics
    inputs = torch.randn(S, 3, B, D), torch.randn(S, 3, B, 4, N * A)
    whole = critics(*inputs)
    for cache in (1, 500):
        monkeypatch.setattr(maddpg, "CACHE", cache)
        torch.testing.assert_close(critics(*inputs), whole)


def test_networks_begin_as_torchs_do_and_targets_as_copies():
    for network in (maddpg.Linear(50, 60, streams()), maddpg.GRU(40, 50, streams())):
        for parameter in network.parameters():  # each seed's within 1 / sqrt(50)
            assert 0.9 < parameter.abs().max() * 50**0.5 <= 1
            assert not torch.equal(parameter[0], parameter[1])
    team = maddpg.Team(make_data(), arguments(), streams())
    for name, target in team.targets.named_parameters():
        assert torch.equal(target, team.get_parameter(name)) and not target.requires_grad


# ---------------------------------------------------------------- whole updates
def slow_target(targets, batch, gamma):
    y, theirs = batch.reward[:, :-1].clone(), slow_actions(targets.policy, batch)
    for s, t, b in every(*y.shape):
        if not batch.done[s, t, b]:
            values = []
            for c in range(2):
                q = single_critic(targets.critics, c, s)
                values.append(q(batch.state[s, t + 1, b], theirs[s, t + 1, b]))
            y[s, t, b] += gamma * min(values)
    return y


def slow_critic_losses(critics, batch, y, own, noise, sigma):
    """Half the mean squared error and CQL's term of each critic and seed, (2, S) each, by loops."""
    errors = torch.zeros(2, S)
    gaps = torch.zeros(2, S)
    density = torch.distributions.Normal(0, sigma)
    for c, s, t, b in every(2, *y.shape):
        q, state = single_critic(critics, c, s), batch.state[s, t, b]
        taken = q(state, batch.actions[s, t, b])
        errors[c, s] += 0.5 * (y[s, t, b] - taken) ** 2 / y[s].numel()
        for i in range(N):
            terms = []
            for k in range(K):
                terms.append(q(state, noise.uniform[s, t, b, k]) + A * math.log(2))
                for later in (0, 1):  # the policies' actions now and one step later
                    added = sigma * noise.normal[s, later, t, b, k]
                    action = (own[s, t + later, b] + added).clamp(-1, 1)
                    terms.append(q(state, action) - density.log_prob(added[i]).sum())
            gap = torch.stack(terms).logsumexp(0) - taken
            gaps[c, s] += gap / (y[s].numel() * N)
    return errors, gaps


def slow_policy_loss(critics, batch, own, action_reg):
    loss = torch.zeros(S)
    for s, t, b, i in every(*own.shape[:4]):
        if batch.acted[s, t, b]:
            joint = batch.actions[s, t, b].clone()
            joint[i] = own[s, t, b, i]
            values = [single_critic(critics, c, s)(batch.state[s, t, b], joint) for c in range(2)]
            cost = action_reg * (own[s, t, b, i] ** 2).mean() - torch.minimum(*values)
            loss[s] += cost / (N * batch.acted[s].sum())
    return loss


def slow_distance(actions, batch):
    d = torch.zeros(S, batch.acted.shape[2])
    for s, b in every(*d.shape):
        steps = [t for t in range(L) if batch.acted[s, t, b]]
        gaps = [(batch.actions[s, t, b] - actions[s, t, b]).abs().mean() for t in steps]
        d[s, b] = sum(gaps) / len(steps)
    return d


def slow_draw(rho, u):
    """The window in whose piece of the line u times the whole lies."""
    total, end = float(rho.sum()), 0.0
    for w, piece in enumerate(rho.tolist()):
        end += piece
        if u * total < end:
            return w


def slow_gather(data, starts, index):
    rows = [[starts[w] + t for w in row] for row in index.tolist() for t in range(L)]
    rows = torch.tensor(rows).view(S, L, -1)
    return maddpg.Data(*(table[rows] for table in data))


def slow_refresh(rho, index, d, k, args):
    for s, b in every(*index.shape):
        priority = max(math.exp(-((k * d[s, b].item()) ** 2)), args.floor)
        rho[s, index[s, b]] = priority**args.exponent


def slow_update(team, squares, rho, data, noise, k, args):
    """What an update does to the team, RMSProp's mean squares and the priorities; returns logs."""
    starts = make_windows().start.tolist()
    index = torch.tensor([[slow_draw(rho[s], u) for u in noise.windows[s]] for s in range(S)])
    batch = slow_gather(data, starts, index)
    # Ends by the rules, and by a time limit.
    assert batch.done.any() and not (batch.acted[:, -1] + batch.done[:, -2]).all()
    own = slow_actions(team.policy, batch)
    y = slow_target(team.targets, batch, args.gamma)
    d = slow_distance(slow_actions(team.targets.policy, batch), batch)
    errors, gaps = slow_critic_losses(team.critics, batch, y, own.detach(), noise, args.ood_noise)
    loss = slow_policy_loss(team.critics, batch, own, args.action_reg)
    totals = {"critics": (errors + args.cql * gaps).mean(0).sum(), "policy": loss.sum()}
    gradients = {}
    for part, total in totals.items():
        parameters = dict(getattr(team, part).named_parameters(part))
        found = torch.autograd.grad(total, list(parameters.values()), retain_graph=True)
        gradients |= dict(zip(parameters, found))
    with torch.no_grad():
        for name, g in gradients.items():
            squares[name] = 0.9 * squares.get(name, 0) + 0.1 * g**2
            lr = args.critic_lr if "critics" in name else args.policy_lr
            parameter, target = team.get_parameter(name), team.targets.get_parameter(name)
            parameter -= lr * g / (squares[name].sqrt() + 1e-5)
            target.copy_((1 - args.tau) * target + args.tau * parameter)
    slow_refresh(rho, index, d, k, args)
    more = (noise.refresh * len(starts)).floor().long()
    batch = slow_gather(data, starts, more)
    again = slow_distance(slow_actions(team.targets.policy, batch), batch)  # after the update
    slow_refresh(rho, more, again, k, args)
    logs = {"q_loss": errors.mean(0), "cql": gaps.mean(0), "policy_loss": loss}
    return logs | {"distance": d.mean(1)}


def test_two_updates_by_hand(float64):
    """Every number that an update changes; the second one begins with what the first one left."""
    sizes = dict(refresh=2, floor=0.15, exponent=0.8, tau=0.1, cql=2.0, action_reg=0.05)
    args = arguments(**sizes, gamma=0.9, ood_noise=0.5, policy_lr=5e-3)
    team = make_team(args)
    data = make_data()
    windows = make_windows()
    windows.rho.copy_(torch.rand(S, 9).clamp(min=0.2))
    rmsprop = maddpg.optimizer(team, args)
    generators = streams()
    hand = copy.deepcopy(team)
    squares = {}
    rho = windows.rho.clone()
    for k in (1.5, 3.0):
        noise = maddpg.draw_noise(generators, data, args)
        noise = noise._replace(windows=torch.tensor([[0.5, 0.999, 0.3], [0.56, 0.05, 0.95]]))
        expected = slow_update(hand, squares, rho, data, noise, k, args)
        logs = maddpg.update(team, rmsprop, data, windows, noise, torch.tensor(k), args)
        for name, value in expected.items():
            torch.testing.assert_close(logs[name], value, rtol=0, atol=1e-10)
            assert not logs[name].requires_grad
        for one, other in zip(team.parameters(), hand.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        torch.testing.assert_close(windows.rho, rho, rtol=0, atol=1e-9)
    assert (rho == 0.15**0.8).any()  # the floor bites some
    plain = replace(args, pjap=False)  # then priorities are left alone
    maddpg.update(team, rmsprop, data, windows, noise, torch.tensor(0.1), plain)
    torch.testing.assert_close(windows.rho, rho, rtol=0, atol=1e-9)


def test_noise_is_each_seeds_own():
    args = arguments(refresh=400, batch_size=300)
    both = maddpg.draw_noise(streams(), make_data(), args)
    alone = maddpg.draw_noise(streams(1, first=1), make_data(), args)
    bounds = (0, 1), (-1, 1), (-6, 6), (0, 1)
    for numbers, own, (low, high) in zip(both, alone, bounds):
        assert torch.equal(numbers[1:], own) and not torch.equal(numbers[0], numbers[1])
        assert low <= numbers.min() and numbers.max() < high
    assert both.windows.dtype == both.refresh.dtype == torch.float64
    stds = [numbers.std().item() for numbers in both]
    assert stds == pytest.approx([12**-0.5, 3**-0.5, 1, 12**-0.5], rel=0.05)


# ---------------------------------------------------------------- priorities
def test_draws_follow_the_priorities_down_to_the_floor():
    """Half of a quarter of a million windows are at the floor, and one is as likely as 100,000."""
    count = 250_000
    draws = 400_000
    windows = maddpg.Windows(torch.arange(count), 2, 1)
    windows.rho[0, ::2] = 0.001
    windows.rho[0, 1] = 100_000
    u = torch.rand(1, draws, generator=streams()[0], dtype=torch.float64)
    index = windows.draw(u)
    whole = windows.rho.sum().item()
    for hits, share in ((index == 1, 1e5), (index % 2 == 0, 0.001 * count / 2)):
        expected = draws * share / whole
        assert hits.sum().item() == pytest.approx(expected, abs=5 * expected**0.5)
    edges = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert windows.draw(edges).tolist() == [[0, count - 1]]


def test_steepness_grows_and_counts_in_units_of_the_spread():
    data = make_data()
    spread = data.actions[data.acted == 1].std(0).mean().item()
    assert maddpg.spread_of(data) == pytest.approx(spread)
    args = arguments(steps=10, ramp=0.5)
    ks = [maddpg.steepness_at(step, spread, args) for step in range(8)]
    full = 4 * 0.7 / spread
    assert ks == pytest.approx([full * share for share in (0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1)])
    plain = replace(args, ramp=0.0, scale_steepness=False, steepness=3.0)
    assert maddpg.steepness_at(0, spread, plain) == 3


def figure_5(pjap, seeds=4):
    """Twin peaks, sigma = 1, by this script's policy loss, priorities and draws: the mean reward.

    The known reward is the critic, a number the policy; all priorities are always refreshed.
    """
    games, args = polygames.Args(), arguments(exponent=1.0)
    reward = polygames.games(games)["twin peaks"]
    top = polygames.peak(games)

    def critics(state, joint):  # (S, 1, B, N, 2) -> (2, S, 1, B, N)
        return reward(joint[..., 0], joint[..., 1]).expand(2, *joint.shape[:-1])

    def recorded(actions):  # (S, B, 2)
        ones = torch.ones(seeds, 1, actions.shape[1])
        return maddpg.Data(None, None, actions[:, None, ..., None], None, None, ones)

    def alike(count):
        return theta[:, None, None, :, None].expand(-1, -1, count, -1, -1)  # (S, 1, count, 2, 1)

    (g,) = streams(1)
    points = top + torch.randn(seeds, 1000, 2, generator=g)
    theta = torch.tensor([-0.5, 0.5]).repeat(seeds, 1).requires_grad_()
    windows = maddpg.Windows(torch.arange(1000), 1, seeds)
    everything = torch.arange(1000).expand(seeds, -1)
    for _ in range(100):
        if pjap:
            d = maddpg.distance(alike(1000).detach(), recorded(points))
            windows.refresh(everything, d, 24**0.5, args)  # alpha = 6 on a sum of two entries
        index = windows.draw(torch.rand(seeds, 32, generator=g))
        batch = recorded(points.gather(1, index[..., None].expand(-1, -1, 2)))
        loss = 2 * maddpg.policy_loss(critics, batch, alike(32), 0.0)  # Eq. 4 has a sum of agents
        (gradient,) = torch.autograd.grad(loss.sum(), theta)
        theta.data -= 0.02 * gradient
    return reward(*theta.detach().T).mean().item()


def test_priorities_repair_twin_peaks_as_in_figure_5(float64):
    assert figure_5(pjap=False) == pytest.approx(0.15, abs=0.04)
    assert figure_5(pjap=True) == pytest.approx(0.54, abs=0.03)


# ---------------------------------------------------------------- the run
def episodes_of(lengths, terminated):
    """Episodes whose every number is 100 e + t, in episode e at step t."""
    E, T = len(lengths), max(lengths)
    ends = torch.tensor(lengths)[:, None]
    stamp = 100.0 * torch.arange(E)[:, None] + torch.arange(T + 1)  # (E, T+1)
    mask = torch.arange(T) < ends
    over = (torch.arange(T) == ends - 1) & torch.tensor(terminated)[:, None]
    obs, state = stamp[..., None, None].repeat(1, 1, N, O), stamp[..., None].repeat(1, 1, D)
    actions = (stamp[:, :-1] / 1000)[..., None, None].repeat(1, 1, N, A)
    return datasets.Dataset(obs, state, None, actions, stamp[:, :-1] * mask, over, mask)


def test_windows_never_straddle_episodes():
    lengths = [7, 2, 3, 4, 9]
    dataset = episodes_of(lengths, [True, True, False, True, False])
    data, starts, encode = maddpg.arrange(dataset, arguments(normalize=False))
    rows = starts[:, None] + torch.arange(L)
    stamps = data.obs[rows, 0, N].long()
    seen = [divmod(stamp, 100) for stamp in stamps[:, 0].tolist()]
    # All that fit; episode 1 is too short for one.
    assert seen == [(e, t) for e, length in enumerate(lengths) for t in range(length - L + 2)]
    assert (stamps.diff() == 1).all() and data.acted[rows[:, :-1]].all()
    assert torch.equal(data.reward[rows], stamps * data.acted[rows])
    assert stamps[data.done[rows] == 1].unique().tolist() == [6, 303]
    row = [[1, 0] + [1] * O, [0, 1] + [1] * O]  # the agent's number first
    assert data.obs[1].tolist() == row and encode(torch.ones(3, 1, N, O)).tolist() == [[row]] * 3


def test_inputs_are_in_units_of_each_agents_own_data():
    dataset = episodes_of([7, 9], [True, False])
    dataset.obs[:, :, 1] = 7 * dataset.obs[:, :, 1] + 3
    data, _, encode = maddpg.arrange(dataset, arguments())
    for x in (data.obs[..., N:], data.state):
        torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1:]), rtol=0, atol=1e-5)
        torch.testing.assert_close(x.std(0), torch.ones(x.shape[1:]))
    torch.testing.assert_close(encode(dataset.obs[0, :8]), data.obs[:8])


@pytest.mark.parametrize("window", [1, 20])
def test_a_window_must_fit_an_episode_and_have_a_step(window):
    with pytest.raises(ValueError, match="--window"):
        maddpg.arrange(episodes_of([7, 9], [True, False]), arguments(window=window))


def test_logs_are_means_since_the_last_evaluation(tmp_path, monkeypatch):
    """And each update gets its steepness, here in units of the polynomial game's actions."""
    update = maddpg.update
    distances = []
    ks = []

    def watched(*inputs):
        ks.append(inputs[5].item())
        logs = update(*inputs)
        distances.append(logs["distance"])
        return logs

    monkeypatch.setattr(maddpg, "update", watched)
    monkeypatch.setattr(maddpg.Run, "finish", lambda *_: None)
    words = "--env polynomial --episodes 30 --steps 5 --eval-every 3 --num-seeds 1 --ramp 0.4"
    maddpg.main(maddpg.parse([*words.split(), "--no-compile", "--out-dir", str(tmp_path / "run")]))
    actions = datasets.load("polynomial", "", "peak-0.5", episodes=30).actions
    full = 4 * 0.7 / actions.std((0, 1)).mean().item()
    assert ks == pytest.approx([0, full / 2, full, full, full], rel=1e-6)
    assert not maddpg.parse([]).scale_steepness  # on HalfCheetah
    table = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["step"] for row in table] == ["0", "3", "5"] and table[0]["distance"] == ""
    means = [torch.cat(distances[rows]).mean().item() for rows in (slice(3), slice(3, 5))]
    assert [float(row["distance"]) for row in table[1:]] == pytest.approx(means)
