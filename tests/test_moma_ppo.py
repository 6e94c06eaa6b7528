"""MOMA-PPO: its losses, one update of each kind and one rehearsal by hand, and what it claims."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import load_script

from data.dataset import Dataset
from data.run import stream

moma = load_script("moma_ppo")

S, N, D = 2, 2, 5
LENGTHS = 4, 6, 5  # of three episodes, in steps
COLUMNS = [[0, 1, 4], [1, 3, D]]  # the last agent's view is padded


def make_data(discrete=False):
    """Three episodes, one held out. Entry 3 of the state never changes, entry 4 is always 0."""
    torch.manual_seed(0)
    age = torch.cat([torch.arange(length + 1) for length in LENGTHS])
    acts = torch.cat([torch.arange(length + 1) < length for length in LENGTHS])
    R = len(age)
    state = torch.randn(R, D)
    state[:, 3], state[:, 4] = 0.7, 0
    action, avail = 2 * torch.rand(R, N, 2) - 1, None
    if discrete:
        avail = torch.tensor([[True, True, False], [True, True, True]])
        action = torch.nn.functional.one_hot(torch.randint(2, (R, N)), 3) * 1.0
    start = acts.nonzero()[:, 0]
    done = torch.zeros(R)
    done[LENGTHS[0] - 1] = 1
    opening = (age == 0).nonzero()[:, 0]
    held = start >= opening[2]
    return moma.Data(
        state,
        action * acts[:, None, None],
        torch.randn(R) * acts,
        done,
        3 * torch.randn(R) + 1,
        age,
        start,
        opening,
        start[~held],
        start[held],
        torch.tensor(COLUMNS),
        avail,
    )


def arguments(**changes):
    small = dict(
        num_seeds=S, members=3, elites=3, model_hidden=6, reward_hidden=5, hidden=6, width=4
    )
    small |= dict(rollouts=3, horizon=4, memory=2, batch_size=3, epochs=2)
    return moma.Args(**small | changes)


def streams(purpose=1, count=S):
    return [stream(s, purpose) for s in range(count)]


def close(one, other, tolerance=1e-9):
    return torch.allclose(one, other, rtol=0, atol=tolerance)


def shaken(module, size=0.3):
    """The module with other parameters than those it began with."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn_like(parameter)
    return module


# ---------------------------------------------------------------- by hand
def through(network, q, x):
    """What the q-th of some networks makes of x."""
    layers = [layer for layer in network if hasattr(layer, "weight")]
    for layer in layers[:-1]:
        x = (x @ layer.weight[q] + layer.bias[q, 0]).clamp(min=0)
    return x @ layers[-1].weight[q] + layers[-1].bias[q, 0]


def step_down(module, optimiser, losses, longest):
    """One step down independent losses, each with its own gradient of limited length."""
    total = [torch.zeros_like(p) for p in module.parameters()]
    for loss in losses:
        own = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
        length = math.sqrt(sum(float((g**2).sum()) for g in own))
        assert length > longest  # so that the limit is seen to work
        total = [old + g * longest / length for old, g in zip(total, own)]
    for parameter, gradient in zip(module.parameters(), total):
        parameter.grad = gradient
    optimiser.step()


def predict(model, data, u, state, action, next_state=None):
    """Mean and deviation of s', of r, and the logit of the end, by the u-th model."""
    start = data.start
    moves, rewards = data.state[start + 1] - data.state[start], data.reward[start]
    actions = data.action[start].flatten(1)
    spread = data.state.std(0, correction=0).clamp(min=1e-3)
    seen = (state - data.state.mean(0)) / spread
    did = (action.flatten() - actions.mean(0)) / actions.std(0, correction=0).clamp(min=1e-3)
    x = torch.cat([seen, did])
    move, log_std = through(model.for_state, u, x).chunk(2)
    reward, reward_log_std = through(model.for_reward, u, x)
    unit = moves.std(0, correction=0)
    after = state + moves.mean(0) + unit * move
    if model.end_from == "state":
        x = ((after.detach() if next_state is None else next_state) - data.state.mean(0)) / spread
    return (
        after,
        unit.clamp(min=1e-8) * log_std.clamp(-6, 2).exp(),
        rewards.mean() + rewards.std(correction=0) * reward,
        rewards.std(correction=0) * reward_log_std.clamp(-6, 2).exp(),
        through(model.for_end, u, x)[0],
    )


def views(data, state):
    """What each agent sees of a state, in units of the data."""
    scaled = (state - data.state.mean(0)) / data.state.std(0, correction=0).clamp(min=1e-3)
    return torch.cat([scaled, scaled.new_zeros(1)])[torch.tensor(COLUMNS)]  # (N, O)


def recall(memory, q, history):
    """What the q-th agent remembers of a history (H, O + A)."""
    x = history @ memory.embed.weight[q] + memory.embed.bias[q]
    for t in range(len(x)):
        for w in range(0, x.shape[1], 2):
            angle = t / 10_000 ** (w / x.shape[1])
            place = torch.zeros_like(x)
            place[t, w], place[t, w + 1] = math.sin(angle), math.cos(angle)
            x = x + place
    query, key, value = (x @ memory.attend.weight[q] + memory.attend.bias[q]).chunk(3, -1)
    x = x + (query @ key.T / x.shape[1] ** 0.5).softmax(-1) @ value
    x = torch.nn.functional.layer_norm(x, x.shape[1:]) * memory.gain[q] + memory.shift[q]
    share = ((x @ memory.judge[q]).tanh() @ memory.wanted[q, 0]).softmax(0)
    return share @ x


def think(agents, data, s, state, histories):
    """Each agent's distribution, and V: of one state (D,) and the histories (N, H, O + A)."""
    policies, values, seen = [], [], views(data, state)
    spread = data.action[data.start].std(0, correction=0)  # (N, A)
    for i in range(N):
        q = s * N + i
        x = seen[i]
        if agents.H:
            x = torch.cat([recall(agents.memory, q, histories[i]), x])
        out = through(agents.policies, q, x)
        if agents.discrete:
            logits = torch.where(data.avail[i], out, -math.inf)
            policies.append(torch.distributions.Categorical(logits=logits))
        else:
            mean, log_std = out.chunk(2)
            std = (spread[i].clamp(max=1).log() + log_std).clamp(-6, 0).exp()
            policies.append(torch.distributions.Normal(mean, std))
        values.append(through(agents.values, q, x)[0])
    scaled = (state - data.state.mean(0)) / data.state.std(0, correction=0).clamp(min=1e-3)
    *weights, bias = through(agents.mixer, s, scaled)
    togo = data.togo[data.start]
    mixed = sum(w * v for w, v in zip(weights, values)) + bias
    return policies, togo.mean() + togo.std(correction=0) * mixed


def joint(policies, action):
    """The log-probability of a joint action."""
    return sum(policy.log_prob(action[i]).sum() for i, policy in enumerate(policies))


def joint_entropy(policies):
    total = 0
    for policy in policies:
        if hasattr(policy, "probs"):  # 0 log 0 is 0
            total = total - sum(p * p.log() for p in policy.probs if p > 0)
        else:
            total = total + policy.entropy().sum()
    return total


# ---------------------------------------------------------------- act 1
@pytest.mark.parametrize("end_from, beta", [("step", 0.0), ("state", 0.5)])
def test_two_model_updates_by_hand(float64, end_from, beta):
    data = make_data()
    args = arguments(end_from=end_from, beta_nll=beta, max_grad_norm=0.05)
    model = shaken(moma.Model(data, args, streams()), 0.5)
    twin = copy.deepcopy(model)
    adam = torch.optim.Adam(model.parameters(), 0.01, eps=1e-4)
    other = torch.optim.Adam(twin.parameters(), 0.01, eps=1e-4)
    vary = torch.tensor([1, 1, 1, 0, 0]).bool()
    for _ in range(2):
        rows = data.train[torch.randint(len(data.train), (S, 3, 4))]
        found = moma.model_update(model, adam, data, rows, args)
        losses = []
        for u, own in enumerate(rows.flatten(0, 1).tolist()):
            total = 0.0
            for row in own:
                true, reward = data.state[row + 1], data.reward[row]
                guess = predict(twin, data, u, data.state[row], data.action[row], true)
                moves = data.state[data.start + 1] - data.state[data.start]
                unit = moves.std(0, correction=0)[vary]
                sigma = guess[1][vary] / unit
                each = sigma.log() + ((true - guess[0])[vary] / unit / sigma) ** 2 / 2
                total += (each * sigma.detach() ** (2 * beta)).mean()
                unit = data.reward[data.start].std(correction=0)
                sigma = guess[3] / unit
                each = sigma.log() + ((reward - guess[2]) / unit / sigma) ** 2 / 2
                total += each * sigma.detach() ** (2 * beta)
                chance = guess[4].sigmoid()
                total -= (chance if data.done[row] else 1 - chance).log()
            losses.append(total / len(own))
        assert close(found.flatten(), torch.stack(losses))
        step_down(twin, other, losses, 0.05)
        assert all(close(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_a_model_learns_from_its_own_rows_and_from_none_that_are_held_out(float64):
    data, args = make_data(), arguments(model_batch=200)
    rows = moma.draw_batches(streams(), data, args)
    assert rows.shape == (S, 3, 200) and set(rows.unique().tolist()) == set(data.train.tolist())
    for one, other in itertools.combinations(rows.flatten(0, 1), 2):
        assert not torch.equal(one, other)


def test_the_members_that_err_least_on_held_out_steps_are_kept(float64):
    data = make_data()
    model = shaken(moma.Model(data, arguments(end_from="state"), streams()), 0.5)
    errors, vary = moma.validate(model, data, S), torch.tensor([0, 1, 2])
    moves, start = data.state[data.start + 1] - data.state[data.start], data.start
    for u in range(S * 3):
        off, earned = [], []
        for row in data.held.tolist():
            guess = predict(model, data, u, data.state[row], data.action[row])
            error = (guess[0] - data.state[row + 1]) / moves.std(0, correction=0)
            off.append(error[vary].square().mean().sqrt())
            earned.append(
                (guess[2] - data.reward[row]).abs() / data.reward[start].std(correction=0)
            )
        want = torch.stack(off).mean(), torch.stack(earned).mean()
        for value, name in zip(want, ("state_error", "reward_error")):
            assert close(errors[name].flatten()[u], value)
    errors = dict(
        state_error=torch.tensor([[5.0, 1, 2], [0, 0, 0]]), reward_error=torch.zeros(S, 3)
    )
    errors["reward_error"][1] = torch.tensor([3.0, 2, 1])
    which = moma.best(errors, arguments(elites=2))
    assert which.tolist() == [1, 2, 5, 4]
    chosen = model.choose(which)
    assert torch.equal(chosen.for_end[0].weight, model.for_end[0].weight[which])
    assert not any(p.requires_grad for p in chosen.parameters())


def test_a_model_learns_a_linear_world(float64):
    data = make_data()
    for row in data.start.tolist():
        push = data.action[row].sum(0).repeat(2)[:3]
        data.state[row + 1, :3] = 0.9 * data.state[row, :3] + 0.3 * push
        data.reward[row] = data.state[row, :3].sum()
    data = data._replace(train=data.start, held=data.start)
    args = arguments(model_hidden=32, reward_hidden=32, model_batch=16)
    model, generators = moma.Model(data, args, streams()), streams()
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    before = moma.validate(model, data, S)
    for _ in range(300):
        moma.model_update(model, adam, data, moma.draw_batches(generators, data, args), args)
    after = moma.validate(model, data, S)
    assert (after["state_error"] < 0.2 * before["state_error"]).all()
    assert (after["reward_error"] < 0.2 * before["reward_error"]).all()


# ---------------------------------------------------------------- the world to play in
@torch.no_grad()
@pytest.mark.parametrize("changes", [
    dict(limit=12.0, reward_penalty=0.3, state_penalty=0.2, box_margin=0.5),  # caps that bite
    dict(limit=1e4, reward_penalty=0.3, state_penalty=0.2, sample_states=True, end_from="state"),
    dict(limit=1e4, reward_penalty=0.3, state_penalty=0.2, box=False, adaptive=False),
    dict(aleatoric=0.4, reward_penalty=0.3, state_penalty=0.2, limit=12.0, box_margin=0.5),
])  # fmt: skip
def test_one_step_in_the_world_by_hand(float64, changes):
    data, args = make_data(), arguments(members=4, elites=4, **changes)
    model = shaken(moma.Model(data, args, streams()), 0.6)
    for linear in (model.for_end[-1], model.for_reward[-1]):
        linear.weight *= 3
    world, B = moma.dream(model, data, args), 12
    state, action = data.state[torch.randint(18, (S, B))], 2 * torch.rand(S, B, 4) - 1
    member, noise = torch.randint(4, (S, B)), torch.randn(S, B, D) * args.sample_states
    found = world(state, action, member, noise)
    low, high = data.state.amin(0), data.state.amax(0)
    worst, top = data.reward[data.start].min(), data.reward[data.start].max()
    seen = []
    for s, b in itertools.product(range(S), range(B)):
        each = [predict(model, data, 4 * s + e, state[s, b], action[s, b]) for e in range(4)]
        drawn = each[member[s, b]]
        after = drawn[0] + drawn[1] * noise[s, b]
        rewards = torch.stack([guess[2] for guess in each])
        reward = rewards.mean()
        # The agents' views and rewards side by side, but for what never is anything but 0.
        wide = [torch.cat([g[0][[0, 1, 1, 3]], g[2].repeat(N)]) for g in each]
        eps_g, eps_r = torch.cov(torch.stack(wide).T).norm(), rewards.var()
        if args.box:
            room = args.box_margin * (high - low)
            after = torch.minimum(torch.maximum(after, low - room), high + room)
            reward = reward.clamp(worst - args.box_margin * (top - worst), top)
        reward = reward - 0.3 * eps_r.clamp(max=args.limit) - 0.2 * eps_g.clamp(max=args.limit)
        spread = max((g[1].square().sum() + g[3] ** 2).sqrt() for g in each)
        reward = reward - args.aleatoric * spread
        end = sum(int(g[4] > 0) for g in each) > 2  # half of four are no majority
        sure = bool(eps_g < args.limit) or not args.adaptive
        assert close(found[0][s, b], after) and close(found[1][s, b], reward, 1e-7)
        assert (found[2][s, b].item(), found[3][s, b].item()) == (end, sure)
        seen.append((end, sure))
    assert len({end for end, _ in seen}) == 2
    assert len({sure for _, sure in seen}) == 1 + (args.limit == 12)


def test_the_covariance_is_found_by_the_small_matrix(float64):
    x = torch.randn(S, 5, 3, 7)
    for s, b in itertools.product(range(S), range(3)):
        assert close(moma.gram_norm(x)[s, b], torch.cov(x[s, :, b].T).norm())


def test_what_a_rehearsal_draws(float64):
    data = make_data()
    args = arguments(rollouts=400, horizon=3, elites=3, first=0.4, sample_states=True)
    noise = moma.draw_noise(streams(), data, args)
    assert noise.rows.shape == (S, 3, 400) and noise.action.shape == (S, 3, 400, N, 2)
    assert set(noise.rows.unique().tolist()) == set(data.start.tolist())  # held out or not
    opening = torch.isin(noise.rows, data.openings).double().mean()
    assert opening == pytest.approx(0.4 + 0.6 * 3 / 15, abs=0.05)
    assert noise.member.unique().tolist() == [0, 1, 2]
    for x in (noise.rows, noise.member, noise.action, noise.state):  # anew in each step and seed
        assert not torch.equal(x[:, 0], x[:, 1]) and not torch.equal(x[0], x[1])
    assert noise.action.std() == pytest.approx(1, abs=0.05)
    assert noise.state.std() == pytest.approx(1, abs=0.05)
    alone = moma.draw_noise(streams()[1:], data, args)  # a seed's draws are its own
    assert all(torch.equal(x[0], y[1]) for x, y in zip(alone, noise))
    plain = moma.draw_noise(streams(), make_data(True), replace(args, sample_states=False, first=0))
    assert not plain.state.any() and (plain.action > 0).all()
    orders = moma.draw_orders(streams(), 6, args)
    assert torch.equal(orders.sort()[0], torch.arange(6).expand(2, S, 6))
    assert len({tuple(order) for order in orders.flatten(0, 1).tolist()}) == 4


def uneven(state, action, member, noise):
    """A world that moves on, and is over or unsure here and there."""
    after = 0.5 * state + 0.1 * action.sum(-1, keepdim=True) + 0.3 * member[..., None] + noise
    after = torch.cat([after[..., :3], state[..., 3:]], -1)
    return after, state.sum(-1), after[..., 0] > 0.8, after[..., 1] < 0.3


@torch.no_grad()
@pytest.mark.parametrize("discrete", [False, True])
def test_a_rehearsal_by_hand(float64, discrete):
    data = make_data(discrete)
    args = arguments(rollouts=6, horizon=5, bound_values=not discrete, sample_states=not discrete)
    agents = shaken(moma.Agents(data, args, streams()), 0.6)
    noise = moma.draw_noise(streams(), data, args)
    batch, logs = moma.rehearse(agents, uneven, data, noise, args)
    k, H = 5, 2
    togo = data.togo[data.start]
    highest = 1.5 * togo.max() - 0.5 * togo.min()
    ends, stops, bounded = torch.zeros(S), torch.zeros(S), 0
    for s in range(S):
        advantages, returns = torch.zeros(6, k), torch.zeros(6, k)
        rewards = torch.zeros(6, k)
        for b in range(6):
            steps, row = [], noise.rows[s, 0, b]
            state, past = data.state[row], None
            for t in range(k):
                if past is None:  # a rollout begins
                    past = []
                    for h in range(row - H, row):
                        token = torch.zeros(N, 3 + data.action.shape[2])
                        if h >= row - data.age[row]:
                            token = torch.cat([views(data, data.state[h]), data.action[h]], -1)
                        past.append(token)
                history = torch.stack(past[-H:], 1)  # (N, H, O + A)
                at = b * k + t
                assert close(batch.state[s, at], state) and close(batch.history[s, at], history)
                policies, value = think(agents, data, s, state, history)
                drawn = noise.action[s, t, b]
                if discrete:
                    race = [p.probs / drawn[i] for i, p in enumerate(policies)]
                    action = torch.stack(race).argmax(-1)
                    carried = torch.nn.functional.one_hot(action, 3) * 1.0
                else:
                    action = torch.stack(
                        [p.loc + p.scale * drawn[i] for i, p in enumerate(policies)]
                    )
                    carried = action.clamp(-1, 1)
                assert close(batch.action[s, at] * 1.0, action * 1.0)
                assert close(batch.log_prob[s, at], joint(policies, action))
                assert close(batch.value[s, at], value)
                here = (noise.member[s, t, b], noise.state[s, t, b])
                here = [x[None, None] for x in (state, carried.flatten(), *here)]
                after, reward, end, sure = (x[0, 0] for x in uneven(*here))
                past.append(torch.cat([views(data, state), carried], -1))
                next_value = think(agents, data, s, after, torch.stack(past[-H:], 1))[1]
                if args.bound_values:
                    bounded += int(next_value > highest)
                    next_value = next_value.clamp(max=highest)
                steps.append((reward, value, next_value, not end, bool(sure)))
                state = after
                if end or not sure:
                    row = noise.rows[s, t + 1, b] if t + 1 < k else None
                    state, past = None if row is None else data.state[row], None
                rewards[b, t] = reward
                ends[s] += float(end)
                stops[s] += float(not sure and not end)
            for t in range(k):  # forwards from each step, to the first mask
                weight = discount = 1.0
                for j in range(t, k):
                    r, v, after, m, zeta = steps[j]
                    advantages[b, t] += weight * (r + args.gamma * m * after - v)
                    returns[b, t] += discount * r
                    if not m or not zeta or j == k - 1:
                        returns[b, t] += discount * args.gamma * m * after
                        break
                    weight, discount = weight * args.gamma * args.gae_lambda, discount * args.gamma
        spread = advantages.std(correction=0) + 1e-3 * togo.std(correction=0)
        advantages = (advantages - advantages.mean()) / spread
        assert close(batch.advantage[s], advantages.flatten())
        assert close(batch.returns[s], returns.flatten())
        assert close(logs["model_reward"][s], rewards.mean())
    assert close(logs["ended"], ends / 30) and close(logs["stopped"], stops / 30)
    assert (ends > 0).all() and (stops > 0).all()
    assert discrete or (bounded and batch.action.abs().max() > 1)


# ---------------------------------------------------------------- MAPPO
@pytest.mark.parametrize("discrete", [False, True])
def test_a_whole_ppo_update_by_hand(float64, discrete):
    data = make_data(discrete)
    args = arguments(max_grad_norm=0.05, least_entropy=1.2, action_penalty=1.5, clip=0.1)
    agents = shaken(moma.Agents(data, args, streams()), 0.5)
    agents.alpha.copy_(torch.tensor([0.3, 0.0]))
    batch, _ = moma.rehearse(agents, uneven, data, moma.draw_noise(streams(), data, args), args)
    shaken(agents, 0.2)  # what was played is long ago
    batch = batch._replace(value=batch.value + 0.5 * torch.randn_like(batch.value))
    twin, count = copy.deepcopy(agents), batch.returns.shape[1]
    adam = torch.optim.Adam(agents.parameters(), 0.01, eps=1e-4)
    other = torch.optim.Adam(twin.parameters(), 0.01, eps=1e-4)
    orders = moma.draw_orders(streams(3), count, args)
    logs = moma.update(agents, adam, batch, orders[..., :11], args)  # of which 2 are left out
    unit, clipped, outside = data.togo[data.start].std(correction=0), 0, 0
    for order, begin in itertools.product(orders, (0, 3, 6)):
        losses, entropies = [], []
        for s in range(S):
            gain, plain, near, entropy, beyond, kl = torch.zeros(6).unbind()
            for at in order[s, begin : begin + 3].tolist():
                policies, value = think(twin, data, s, batch.state[s, at], batch.history[s, at])
                log_ratio = joint(policies, batch.action[s, at]) - batch.log_prob[s, at]
                rho, A = log_ratio.exp(), batch.advantage[s, at]
                gain = gain + torch.minimum(rho * A, rho.clamp(0.9, 1.1) * A) / 3
                clipped += int((rho - 1).abs() > 0.1)
                old, target = batch.value[s, at] / unit, batch.returns[s, at] / unit
                plain = plain + (value / unit - target) ** 2 / 3
                moved = (value / unit - old).clamp(-0.1, 0.1)
                near = near + (old + moved - target) ** 2 / 3
                entropy = entropy + joint_entropy(policies) / 3
                kl = kl + (rho - 1 - log_ratio) / 3
                for policy in policies if not discrete else ():
                    excess = (policy.loc.abs() - 1).clamp(min=0)
                    beyond = beyond + 1.5 * excess.square().sum() / 3
                    outside += int(excess.max() > 0)
            value_loss = torch.maximum(plain, near) / 2
            losses.append(-gain + value_loss + beyond - twin.alpha[s] * entropy)
            entropies.append(entropy.detach())
            if begin == 6:
                wanted = dict(policy_loss=-gain, value_loss=value_loss, entropy=entropy, kl=kl)
                last = {name: x.item() for name, x in wanted.items()}
        step_down(twin, other, losses, 0.05)
        rise = 1e-3 * (1.2 - torch.stack(entropies))
        twin.alpha.copy_((twin.alpha + rise).clamp(min=0))
    assert all(close(p, q) for p, q in zip(agents.parameters(), twin.parameters()))
    assert close(agents.alpha, twin.alpha) and clipped > 5 and bool(outside) != discrete
    assert {name: x[-1].item() for name, x in logs.items()} == pytest.approx(last, abs=1e-9)


def test_a_ratio_is_cut_and_alpha_never_falls_below_0(float64):
    data, args = make_data(), arguments(least_entropy=-99.0)
    agents = moma.Agents(data, args, streams())
    batch, _ = moma.rehearse(agents, uneven, data, moma.draw_noise(streams(), data, args), args)
    far = batch._replace(
        log_prob=batch.log_prob - 1000, advantage=-torch.ones_like(batch.advantage)
    )
    assert close(moma.ppo_loss(agents, far, args)[1]["policy_loss"], torch.tensor(10.0).exp())
    agents.alpha.fill_(0.01)
    adam = torch.optim.Adam(agents.parameters(), 0.0)
    moma.minibatch(agents, adam, batch, torch.arange(3).expand(S, 3), args)
    assert (agents.alpha == 0).all()


@pytest.mark.parametrize("discrete", [False, True])
def test_a_warm_up_update_by_hand(float64, discrete):
    data, args = make_data(discrete), arguments(max_grad_norm=0.05)
    agents = shaken(moma.Agents(data, args, streams()), 0.5)
    twin = copy.deepcopy(agents)
    adam = torch.optim.Adam(agents.parameters(), 0.01, eps=1e-4)
    rows = torch.tensor([[0, 1, 6], [3, 12, 13]])  # also an episode's first and second
    found = moma.clone_update(agents, adam, data, rows, args)
    unit, losses = data.togo[data.start].std(correction=0), []
    for s in range(S):
        total = 0.0
        for row in rows[s].tolist():
            tokens = torch.zeros(N, 2, 3 + data.action.shape[2])
            for h in range(2):
                past = row - 2 + h
                if past >= row - data.age[row]:
                    tokens[:, h] = torch.cat([views(data, data.state[past]), data.action[past]], -1)
            policies, value = think(twin, data, s, data.state[row], tokens)
            action = data.action[row].argmax(-1) if discrete else data.action[row]
            total += ((value - data.togo[row]) / unit) ** 2 / 6 - joint(policies, action) / 3
        losses.append(total)
    assert close(found, torch.stack(losses))
    step_down(twin, torch.optim.Adam(twin.parameters(), 0.01, eps=1e-4), losses, 0.05)
    assert all(close(p, q) for p, q in zip(agents.parameters(), twin.parameters()))


def test_policies_begin_as_far_apart_as_the_data(float64):
    data = make_data()
    data.action.mul_(0.3)
    agents = moma.Agents(data, arguments(memory=0), streams())
    _, log_std = agents.policy(torch.randn(S, 50, N, 3)).chunk(2, -1)
    spread = data.action[data.start].std(0, correction=0)
    assert torch.allclose(log_std.exp().mean((0, 1)), spread, rtol=0.1)
    assert close(agents.alpha, torch.zeros(S))


# ---------------------------------------------------------------- the run
def recorded(E=6, T=4, avail=None):
    """A dataset of two agents whose views are parts of the state; one view is padded."""
    torch.manual_seed(0)
    state = torch.randn(E, T + 1, 4, dtype=torch.float32)
    state[..., 2] = 0
    obs = torch.stack([state[..., [3, 0]], state[..., [1, 1]]], 2)
    obs[..., 1, 1] = 0
    no = torch.zeros(E, T, dtype=torch.bool)
    action, info = torch.rand(E, T, 2, 1), {"env": "reacher", "task": "independent"}
    if avail is not None:
        action = torch.zeros(E, T, 2, dtype=torch.int64)
    return Dataset(obs, state, avail, action, torch.randn(E, T), no, ~no, info)


def test_the_dataset_is_arranged():
    dataset, args = recorded(), arguments(holdout=0.34, gamma=0.8)
    data = moma.arrange(dataset, args)
    assert torch.equal(data.state, dataset.state.flatten(0, 1))
    assert torch.equal(data.state[:, data.columns], dataset.obs.flatten(0, 1))  # entry 2 is 0, too
    held = data.held.view(2, 4)  # two whole episodes
    assert (held // 5 == held[:, :1] // 5).all() and held[0, 0] // 5 != held[1, 0] // 5
    assert sorted([*data.train.tolist(), *data.held.tolist()]) == data.start.tolist()
    assert torch.equal(data.openings, torch.arange(0, 30, 5)) and len(data.start) == 24
    for row in data.start.tolist():
        e, t = divmod(row, 5)
        togo = sum(0.8**j * dataset.reward[e, t + j] for j in range(4 - t))
        assert data.togo[row] == pytest.approx(togo.item(), abs=1e-5) and data.age[row] == t
    one = moma.arrange(recorded(1), args)
    assert torch.equal(one.train, one.start) and torch.equal(one.held, one.start)
    dataset.state[..., 2] = 1  # then no entry is the padding
    padded = moma.arrange(dataset, args)
    assert padded.columns.tolist() == [[3, 0], [1, 4]]


def test_changing_available_actions_are_refused():
    avail = torch.ones(6, 5, 2, 2, dtype=torch.bool)
    data = moma.arrange(recorded(avail=avail), arguments())
    assert data.action[data.start].sum() == 48 and data.avail.shape == (2, 2)
    avail[3, 1, 0, 1] = False
    with pytest.raises(ValueError, match="available actions"):
        moma.arrange(recorded(avail=avail), arguments())


@torch.no_grad()
def test_a_team_that_plays_remembers_what_it_saw_and_did(float64):
    data, args = make_data(), arguments()
    agents = shaken(moma.Agents(data, args, streams()), 0.6)
    team, B = moma.player(agents), 3
    memory = torch.zeros(S, B, N, team.memory)
    pasts = torch.zeros(S, B, N, 2, 5)
    for rows in torch.randint(18, (3, S, B)):
        plain = torch.cat([data.state[rows], torch.zeros(S, B, 1)], -1)[..., torch.tensor(COLUMNS)]
        action, memory = team.act(plain, None, memory)
        for s, b in itertools.product(range(S), range(B)):
            state = data.state[rows[s, b]]
            policies, _ = think(agents, data, s, state, pasts[s, b])
            want = torch.stack([policy.loc for policy in policies]).clamp(-1, 1)
            assert close(action[s, b].double(), want, 1e-6)
            newest = torch.cat([views(data, state), want], -1)
            pasts[s, b] = torch.stack([pasts[s, b, :, 1], newest], 1)


def test_the_coordination_game_is_solved(tmp_path, monkeypatch):
    """And what main feeds its parts: rows that are not held out, step sizes that fall to 0."""
    seen, model_update, minibatch = [], moma.model_update, moma.minibatch

    def learn(model, adam, data, rows, args):
        assert not torch.isin(rows, data.held).any() and not torch.equal(rows[0, 0], rows[0, 1])
        seen.append(adam.param_groups[0]["lr"])
        return model_update(model, adam, data, rows, args)

    def improve(agents, adam, *rest):
        seen.append(adam.param_groups[0]["lr"])
        return minibatch(agents, adam, *rest)

    monkeypatch.setattr(moma, "model_update", learn)
    monkeypatch.setattr(moma, "minibatch", improve)
    words = "--num-seeds 2 --steps 10 --rollouts 128 --no-compile --warmup 1".split()
    summary = moma.main(moma.parse([*words, "--out-dir", str(tmp_path / "run")]))
    assert summary["return"]["per_seed"] == [1.0] * 2
    assert seen[:300] == pytest.approx([3e-3 * (1 - k / 300) for k in range(300)])
    assert sorted(set(seen[300:]), reverse=True) == pytest.approx(
        [k * 1e-4 for k in range(10, 0, -1)]
    )


@pytest.mark.parametrize("words, name", [
    ("--env smac", "smac"), ("--elites 1", "--elites"), ("--elites 8", "--elites"),
    ("--first 1.5", "--first"), ("--dataset best", "best"),
])  # fmt: skip
def test_bad_input_is_refused(tmp_path, words, name):
    with pytest.raises(ValueError, match=name):
        moma.main(moma.parse([*words.split(), "--out-dir", str(tmp_path / "run")]))
