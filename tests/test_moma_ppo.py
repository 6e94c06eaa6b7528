"""MOMA-PPO: its masks, penalties, rollouts and memory against slow loops, and the script from outside."""

import csv
import functools
import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command, complains, load_script, refuses

import data
import envs
from data import layout, runs
from data.collect import record
from data.dataset import Dataset
from envs.simulator import open_loop, simulator

moma = load_script("moma_ppo")

S, N, A, D = 2, 2, 1, 11  # as in the reacher


def reach(folder, task="independent", episodes=12, steps=8, seed=0):
    """A file of the reacher moved at random."""
    game = envs.make("reacher", task, episodes, time_limit=steps)
    g = torch.Generator().manual_seed(seed)
    dataset = record(
        game, lambda t, obs, info: 2 * torch.rand(episodes, 2, 1, generator=g, dtype=torch.float32) - 1, seed=seed
    )
    game.close()
    dataset.info |= {"env": "reacher", "task": task, "references": {"random": -40.0, "expert": -4.0}}
    data.write(dataset, folder / f"{task}-{episodes}-{steps}.h5")
    return folder / f"{task}-{episodes}-{steps}.h5"


SMALL = {
    "num-seeds": S, "model-steps": 6, "model-eval-every": 3, "model-batch": 5, "model-hidden": 8, "reward-hidden": 8,
    "model-layers": 2, "members": 3, "elites": 2, "steps": 2, "eval-every": 1, "eval-episodes": 1, "rollouts": 6,
    "horizon": 3, "batch-size": 4, "epochs": 1, "memory": 3, "width": 4, "hidden": 8,
}  # fmt: skip


def words(folder, *more, **changes):
    """A command line for a tiny run on the reacher."""
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    flags = {"env": "reacher", "task": "independent"} | SMALL | changes
    flags["dataset"] = flags.get("dataset") or folder / "independent-12-8.h5"
    if not flags["dataset"].exists():
        reach(folder)
    return [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)] + [*more]


def setting(folder, *more, **changes):
    """Arguments, data and agents of a tiny run."""
    args = moma.parse(words(folder, *more, **changes))
    found, _ = moma.arrange(data.load(args.env, args.task, args.dataset), args)
    return args, found, moma.Agents(found, args, [runs.stream(s, 0) for s in range(args.num_seeds)])


def generators(count=S, purpose=1):
    return [runs.stream(s, purpose) for s in range(count)]


def rehearse(args, found, agents, play):
    return moma.rehearse(agents, play, found, moma.draw_noise(generators(), found, args), args)


# ---------------------------------------------------------------- equations
def test_gae_with_both_masks_is_a_slow_loop(float64):
    torch.manual_seed(0)
    k, gamma, lam = 6, 0.9, 0.7
    reward, value, after = torch.randn(3, S, 4, k)
    m, zeta = (torch.rand(2, S, 4, k) > 0.3).double()
    zeta[..., -1] = 0
    advantage, returns = moma.gae(reward, value, after, m, zeta, gamma, lam)
    for s in range(S):
        for b in range(4):
            for t in range(k):
                want, total, weight, factor = 0.0, 0.0, 1.0, 1.0
                for j in range(t, k):  # forwards, as sums until the first mask
                    r, v, u = reward[s, b, j], value[s, b, j], after[s, b, j]
                    want += weight * (r + gamma * m[s, b, j] * u - v)
                    total += factor * r
                    if not m[s, b, j]:
                        break
                    if not zeta[s, b, j]:
                        total += factor * gamma * u
                        break
                    weight, factor = weight * gamma * lam, factor * gamma
                assert advantage[s, b, t] == pytest.approx(want.item(), abs=1e-12)
                assert returns[s, b, t] == pytest.approx(total.item(), abs=1e-12)


def test_gram_form_is_the_norm_of_the_covariance(float64):
    torch.manual_seed(0)
    x = torch.randn(S, 5, 3, 7)
    norm = moma.gram_norm(x)
    for s in range(S):
        for b in range(3):
            assert norm[s, b] == pytest.approx(torch.cov(x[s, :, b].T).norm().item(), abs=1e-12)


def test_entries_count_as_often_as_the_agents_see_them(tmp_path, float64):
    """eps_g is that of the agents' views and rewards, laid side by side as in the authors' code."""
    args, found, _ = setting(tmp_path, "--no-box", elites=3, num_seeds=1, reward_penalty=0, state_penalty=1)
    torch.manual_seed(0)
    each, reward = torch.randn(3, 4, found.state.shape[1]), torch.randn(3, 4)
    rest = found.state[:4][None], torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.long)

    def eps_g(columns):
        play = moma.dream(
            lambda *_: moma.Guess(each, each, reward, reward, reward), found._replace(columns=columns),
            replace(args, penalty_cap=1e6),
        )  # fmt: skip
        return reward.mean(0) - play(*rest)[1][0]

    def side_by_side(columns, each):
        views = each[..., columns].flatten(2)  # (n, B, N O)
        return moma.gram_norm(torch.cat([views, reward[..., None], reward[..., None]], -1)[None])[0]

    hidden = found.columns.masked_fill(found.columns == 6, 0)  # now nobody sees entry 6
    for columns in (found.columns, hidden):
        assert torch.allclose(eps_g(columns), side_by_side(columns, each), atol=1e-12)
    assert not torch.allclose(eps_g(found.columns), eps_g(hidden))
    # An entry that never is anything but 0 does not count, whatever the members say of it.
    (dead,) = (found.state == 0).all(0).nonzero()[:, 0].tolist()
    idle = found.columns.masked_fill(found.columns == 6, dead)
    said = each.index_fill(2, torch.tensor([dead]), 0)
    assert torch.allclose(eps_g(idle), side_by_side(idle, said), atol=1e-12)
    assert not torch.allclose(eps_g(idle), side_by_side(idle, each))


def stub(spread=0.0, jump=0.0, end=(-1, -1, -1), std=(0.5, 0.5, 0.5)):
    """Members that differ by `spread` in the first entry and in the reward, and agree on the rest."""
    n = len(end)

    def world(state, action):
        U, B, _ = state.shape

        def each(values):
            return torch.tensor(values, dtype=torch.float32).repeat(U // n)[:, None].expand(U, B)

        offset, after = each([-1.0, 0.0, 1.0, 0.0][:n]), state + jump
        after[..., 0] += spread * offset
        std_ = each(std)[..., None].expand_as(after)
        return moma.Guess(after, std_, -1.0 + spread * offset, each(std), each(end))

    return world


def boxed(found, first=None, reward=None):
    """The data, but the first entry of their states and their rewards lie in these intervals."""
    if first:
        found = found._replace(state=found.state.clone())
        found.state[:, 0] = torch.linspace(*first, len(found.state))
    return found._replace(reward=torch.linspace(*reward, len(found.reward)), steps=torch.arange(len(found.reward)))


def test_a_step_in_the_model(tmp_path):
    args, found, _ = setting(tmp_path, elites=3, **{"num-seeds": 1})
    state, action, drawn = found.state[:4][None], torch.zeros(1, 4, 2), torch.tensor([[0, 1, 2, 2]])
    found = boxed(found, (-9, 9), (-9, 9))

    def step(spread=0.0, *more, **kind):
        changed = moma.parse(words(tmp_path, *more, elites=3))
        return moma.dream(stub(spread, **kind), found, changed)(state, action, drawn)

    after, reward, over, sure = step(0.3)
    assert torch.allclose(after[0, :, 0], state[0, :, 0] + 0.3 * torch.tensor([-1.0, 0, 1, 1]))
    # eps_r = 0.3^2; two entries vary together, one seen by one agent, the reward by two: |cov| = 0.3^2 (1 + 2).
    want = -1 - 0.05 * 0.09 - 0.1 * 0.27
    assert torch.allclose(reward, torch.full((1, 4), want)) and not over.any() and sure.all()
    # A spread beyond the limit: penalties are capped, and rollouts stop, unless told not to.
    _, reward, _, sure = step(2.0)
    assert torch.allclose(reward, torch.full((1, 4), -1 - 0.15 * 2)) and not sure.any()
    assert step(2.0, "--no-adaptive")[3].all()
    # What a penalty counts and where rollouts stop are two things: eps_r = 4, eps_g = 12.
    _, reward, _, sure = step(2.0, "--penalty-cap", "3")
    assert torch.allclose(reward, torch.tensor(-1 - 0.15 * 3)) and not sure.any()
    assert step(2.0, "--limit", "12.1")[3].all() and not step(2.0, "--limit", "11.9")[3].any()
    # Ablations.
    free = ("--reward-penalty", "0", "--state-penalty", "0")
    assert torch.equal(step(0.3, *free)[1], torch.full((1, 4), -1.0))
    spread = 0.5 * math.sqrt(found.state.shape[1] + 1)
    assert torch.allclose(step(0.3, "--penalty", "aleatoric")[1], torch.tensor(-1.0 - spread))
    assert step(0.0, end=(1, 1, -1))[2].all() and not step(0.0, end=(1, -1, -1))[2].any()


def test_the_aleatoric_penalty_is_that_of_the_least_certain_member(tmp_path):
    args, found, _ = setting(tmp_path, "--penalty", "aleatoric", "--aleatoric", "0.3", "--no-box", elites=3)
    play, B = moma.dream(stub(std=(0.1, 0.9, 0.2)), found, args), 4
    state = found.state[: S * B].view(S, B, -1)
    _, reward, *_ = play(state, torch.zeros(S, B, 2), torch.zeros(S, B, dtype=torch.long))
    assert torch.allclose(reward, torch.tensor(-1 - 0.3 * 0.9 * math.sqrt(found.state.shape[1] + 1)))


@pytest.mark.parametrize("votes, ends", [((1, 1, -1, -1), False), ((1, 1, 1, -1), True), ((1, -1, -1, -1), False)])
def test_half_of_the_votes_are_no_majority(tmp_path, votes, ends):
    args, found, _ = setting(tmp_path, members=4, elites=4, num_seeds=1)
    play = moma.dream(stub(end=votes, std=(1, 1, 1, 1)), found, args)
    for drawn in range(4):  # whoever is drawn
        end = play(found.state[:1][None], torch.zeros(1, 1, 2), torch.full((1, 1), drawn))[2]
        assert end.item() == ends


def test_members_disagree_before_the_box_makes_them_equal(tmp_path):
    """Members that all leave the box on one side end at the same place in it, but are no surer for that."""
    args, found, _ = setting(tmp_path, elites=3, num_seeds=1, box_margin=0, reward_penalty=1, state_penalty=1)
    found = boxed(found, reward=(7, 8))
    rest = found.state[:4][None], torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.long)
    for spread, sure in ((0.3, True), (2.0, False)):
        after, reward, _, found_sure = moma.dream(stub(spread, jump=100.0), found, args)(*rest)
        assert torch.equal(after[0], found.state.amax(0).expand(4, -1))
        want = 7 - min(spread**2, 2) - min(3 * spread**2, 2)  # the members' reward is -1 and more
        assert torch.allclose(reward, torch.tensor(float(want)), atol=1e-4) and (found_sure == sure).all()


def test_a_state_outside_the_box_is_clipped_to_it(tmp_path):
    args, found, _ = setting(tmp_path, elites=3, **{"num-seeds": 1, "box-margin": 0})
    rest = found.state[:4][None], torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.long)
    low, high = found.state.aminmax(dim=0)
    for jump, bound in ((100.0, high), (-100.0, low)):
        after = moma.dream(stub(0.0, jump), found, args)(*rest)[0]
        assert torch.equal(after[0], bound.expand(4, -1))
        wide = moma.parse(words(tmp_path, "--box-margin", "0.5", elites=3))
        after = moma.dream(stub(0.0, jump), found, wide)(*rest)[0]
        beyond = bound + (0.5 if jump > 0 else -0.5) * (high - low)
        assert torch.equal(after[0], beyond.expand(4, -1))
    free = moma.parse(words(tmp_path, "--no-box", elites=3))
    assert torch.equal(moma.dream(stub(0.0, 100.0), found, free)(*rest)[0], rest[0] + 100)
    found = boxed(found, reward=(-0.5, 0))  # below it the members' -1
    assert torch.equal(moma.dream(stub(), found, args)(*rest)[1], torch.full((1, 4), -0.5))
    assert torch.equal(moma.dream(stub(), found, wide)(*rest)[1], torch.full((1, 4), -0.75))


def test_the_memory_is_attention_step_by_step(tmp_path, float64):
    args, _, agents = setting(tmp_path)
    torch.manual_seed(0)
    obs, history = torch.randn(S, N, 3, agents.O), torch.randn(S, N, 3, 3, agents.O + 1)
    x, memory = agents.remember(obs, history), agents.memory
    for q in range(S * N):
        s, i = divmod(q, N)
        for b in range(3):
            tokens = history[s, i, b] @ memory.embed.weight[q] + memory.embed.bias[q] + memory.position  # (H, W)
            query, key, value = (tokens @ memory.attend.weight[q] + memory.attend.bias[q]).chunk(3, -1)
            h = tokens + (query @ key.T / args.width**0.5).softmax(-1) @ value
            h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            h = h * memory.gain[q] + memory.shift[q]
            score = ((h @ memory.judge[q]).tanh() @ memory.wanted[q, 0]).softmax(0)
            assert torch.allclose(x[q, b], torch.cat([score @ h, obs[s, i, b]]), atol=1e-12)


@torch.no_grad()
def test_a_mixers_weight_may_be_negative(tmp_path, float64):
    """Eq. 9, one number at a time: V falls as the value of an agent with a negative weight rises."""
    _, found, agents = setting(tmp_path)
    torch.manual_seed(0)
    togo = found.togo[found.steps]
    unit = togo.std(correction=0)
    x, state = torch.randn(S * N, 5, agents.policy[0].weight.shape[1]), torch.randn(S, 5, found.state.shape[1])
    agents.mixer[-1].bias[:, 0, 0] = -3
    weights, own = agents.mixer(agents.scaled(state)), agents.values(x)[..., 0].unflatten(0, (S, N))
    value = agents.value(x, state)
    assert (weights[..., 0] < 0).all() and (weights[..., 1] > -2).all()
    for s in range(S):
        for b in range(5):
            mixed = sum(weights[s, b, i] * own[s, i, b] for i in range(N)) + weights[s, b, N]
            assert value[s, b] == pytest.approx((togo.mean() + unit * mixed).item(), abs=1e-12)
    agents.values[-1].bias.view(S, N)[:, 0] += 1
    assert torch.allclose(agents.value(x, state) - value, unit * weights[..., 0])


def test_ppo_loss_is_a_slow_loop(tmp_path, float64):
    args, found, agents = setting(tmp_path)
    torch.manual_seed(0)
    batch, _ = rehearse(args, found, agents, known_world)
    with torch.no_grad():
        for parameter in agents.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    agents.alpha.copy_(torch.tensor([0.3, 0.0]))
    total, logs = moma.ppo_loss(agents, batch, 0.2, 1.5)
    out = agents.act(agents.remember(batch.obs, batch.history))
    value = agents.value(agents.remember(batch.obs, batch.history), batch.state)
    mean, log_std = out.chunk(2, -1)  # (S, N, B, A)
    unit = agents.return_std
    for s in range(S):
        gains, plain, clipped, entropy, excess = [], [], [], [], []
        for b in range(batch.returns.shape[1]):
            normal = torch.distributions.Normal(mean[s, :, b], log_std[s, :, b].exp())
            ratio = (normal.log_prob(batch.action[s, :, b]).sum() - batch.log_prob[s, b]).exp()
            gains.append(min(ratio * batch.advantage[s, b], ratio.clamp(0.8, 1.2) * batch.advantage[s, b]))
            old, new, target = (x[s, b] / unit for x in (batch.value, value, batch.returns))
            plain.append((new - target) ** 2)
            clipped.append((old + (new - old).clamp(-0.2, 0.2) - target) ** 2)
            entropy.append(normal.entropy().sum())
            excess.append(((mean[s, :, b].abs() - 1).clamp(min=0) ** 2).sum())
        gains, plain, clipped, entropy, excess = (
            torch.stack(x).mean() for x in (gains, plain, clipped, entropy, excess)
        )
        want = -gains + 0.5 * max(plain, clipped) - agents.alpha[s] * entropy + 1.5 * excess
        assert torch.allclose(total[s], want, atol=1e-10)
    # A ratio is cut at e^10: here each action was a thousand nats less likely when it was played.
    far = batch._replace(log_prob=batch.log_prob - 1000, advantage=-torch.ones_like(batch.advantage))
    assert torch.allclose(moma.ppo_loss(agents, far, 0.2, 1.5)[1]["policy_loss"], torch.tensor(10.0).exp())


def test_advantages_are_in_their_own_units_and_entropy_has_a_price_when_it_is_low(tmp_path, float64):
    args, found, agents = setting(tmp_path, rollouts=50, batch_size=150, least_entropy=-1)
    batch, _ = rehearse(args, found, agents, known_world)
    std, mean = torch.std_mean(batch.advantage, 1, correction=0)
    assert torch.allclose(mean, torch.zeros(S)) and torch.allclose(std, torch.ones(S), atol=0.02)
    pick, adam = torch.arange(150).expand(S, -1), moma.Adam(agents.parameters(), 0.0)
    for start, least in ((0.5, 4.0), (0.5, -9.0), (0.001, -9.0)):
        agents.alpha.fill_(start)
        entropy = moma.minibatch(agents, adam, batch, pick, replace(args, least_entropy=least))["entropy"]
        assert torch.allclose(agents.alpha, (start + 1e-3 * (least - entropy)).clamp(min=0))
    assert (agents.alpha == 0).all()


# ---------------------------------------------------------------- rollouts
def known_world(state, action, member, noise):
    """s' = s / 2 + 0.1 (a_0 - 2 a_1) in every entry, r = the sum of s; it never ends and is always sure."""
    after = 0.5 * state + 0.1 * (action[..., :1] - 2 * action[..., 1:])
    no = torch.zeros(state.shape[:2], dtype=torch.bool)
    return after, state.sum(-1), no, ~no


def test_sampled_states_are_the_members_gaussians(tmp_path, float64):
    args, found, agents = setting(tmp_path, "--sample-states", "--no-box", "--no-adaptive")
    world = moma.World(found, replace(args, members=args.elites), generators())
    play, B, D = moma.dream(world, found, args), 5, found.state.shape[1]
    state, action = found.state[found.steps[: S * B]].view(S, B, D), torch.randn(S, B, 2)
    member, noise = torch.randint(args.elites, (S, B)), torch.randn(S, B, D)
    drawn, *_ = play(state, action, member, noise)
    each = world(*(x.repeat_interleave(args.elites, 0) for x in (state, action)))
    for s in range(S):
        for b in range(B):
            u = s * args.elites + member[s, b]
            assert torch.allclose(drawn[s, b], each.state[u, b] + each.state_std[u, b] * noise[s, b])
    assert torch.equal(play(state, action, member, None)[0], play(state, action, member, 0 * noise)[0])

    seen = []
    rehearse(args, found, agents, lambda *step: seen.append(step[3]) or play(*step))
    shock = torch.stack(seen)  # (k, S, B, D)
    assert (
        shock.std() == pytest.approx(1, abs=0.1) and (shock[0] != shock[1]).all() and (shock[:, 0] != shock[:, 1]).all()
    )


def without_values(agents):
    """Agents whose values are all 0, so that returns hold rewards only."""
    agents.return_std.zero_(), agents.return_mean.zero_()
    return agents


def test_rollouts_in_a_known_linear_world_give_the_known_returns(tmp_path, float64):
    args, found, agents = setting(tmp_path, "--no-normalize")
    batch, _ = rehearse(args, found, without_values(agents), known_world)
    B, k = args.rollouts, args.horizon
    state, returns = (x.unflatten(1, (B, k)) for x in (batch.state, batch.returns))
    action, obs, history = (x.unflatten(2, (B, k)) for x in (batch.action, batch.obs, batch.history))
    assert batch.action.abs().max() > 1  # kept as drawn
    for s in range(S):
        for b in range(B):
            x, rewards = state[s, b, 0], []
            assert (found.state[found.steps] == x).all(-1).any()  # begins in the data
            for t in range(k):
                assert torch.allclose(state[s, b, t], x, atol=1e-12)
                rewards.append(x.sum())
                a = action[s, :, b, t, 0].clamp(-1, 1)  # the world sees it clipped
                x = 0.5 * x + 0.1 * (a[0] - 2 * a[1])
                for i in range(N):
                    assert torch.allclose(obs[s, i, b, t], state[s, b, t][found.columns[i]])
                    if t:  # the newest memory
                        newest = torch.cat([obs[s, i, b, t - 1], action[s, i, b, t - 1].clamp(-1, 1)])
                        assert torch.allclose(history[s, i, b, t, -1], newest)
                        assert torch.equal(history[s, i, b, t, :-1], history[s, i, b, t - 1, 1:])
            for t in range(k):
                want = sum(args.gamma ** (j - t) * rewards[j] for j in range(t, k))
                assert returns[s, b, t] == pytest.approx(want.item(), abs=1e-12)


def value(agents, x, scaled):
    """Eq. 9 of states (S, B, D) that are in units of the data already: (S, B)."""
    weights, own = agents.mixer(scaled), agents.values(x)[..., 0].unflatten(0, (agents.S, agents.N)).transpose(1, 2)
    mixed = (weights[..., :-1] * own).sum(-1) + weights[..., -1]
    return agents.return_mean + agents.return_std * mixed


@torch.no_grad()
def test_values_are_of_states_in_units_of_the_data(tmp_path, float64):
    """The value of a state when it was played, and of the one that a rollout of one step leads to."""
    args, found, agents = setting(tmp_path, horizon=1)
    noise = moma.draw_noise(generators(), found, args)
    batch, _ = moma.rehearse(agents, known_world, found, noise, args)
    state, played = found.state[noise.rows[:, 0]], batch.action.clamp(-1, 1)
    after, reward, *_ = known_world(state, played.transpose(1, 2).flatten(2), None, None)
    mean, std = found.state.mean(0), found.state.std(0, correction=0).clamp(min=1e-3)
    x = agents.remember(batch.obs, batch.history)
    assert torch.equal(batch.state, state)
    assert torch.allclose(batch.value, value(agents, x, (state - mean) / std))
    x = agents.remember(agents.see(after), moma.push(batch.history, batch.obs, played))
    assert torch.allclose(batch.returns, reward + args.gamma * value(agents, x, (after - mean) / std))


@pytest.mark.parametrize("why", ["end", "unsure"])
def test_a_rollout_that_is_over_makes_room_for_another(tmp_path, float64, why):
    """Returns do not look across, and the next rollout begins in the data with that place's history."""

    def world(state, action, member, noise):
        over = state[..., 6] > found.state[:, 6].median()
        no = torch.zeros_like(over)
        return state + 100, torch.ones(over.shape), *((over, ~no) if why == "end" else (no, ~over))

    args, found, agents = setting(tmp_path, "--no-normalize", horizon=4)
    batch, logs = rehearse(args, found, without_values(agents), world)
    B, k = args.rollouts, args.horizon
    state, returns = (x.unflatten(1, (B, k)) for x in (batch.state, batch.returns))
    history, seen = batch.history.unflatten(2, (B, k)), 0
    for s in range(S):
        for b in range(B):
            later = 0.0
            for t in reversed(range(k)):
                over = state[s, b, t, 6] > found.state[:, 6].median()
                later = 1 + args.gamma * later * (not over and t < k - 1)
                assert returns[s, b, t] == pytest.approx(later, abs=1e-12)
                if t and state[s, b, t - 1, 6] > found.state[:, 6].median():
                    row = (found.state == state[s, b, t]).all(-1).nonzero()[0, 0]
                    assert row in found.steps
                    fresh = moma.begin(agents, found, row.view(1, 1))[1]
                    assert torch.equal(history[s, :, b, t], fresh[0, :, 0])
                    seen += 1
                elif t:
                    assert torch.equal(state[s, b, t], state[s, b, t - 1] + 100)
    assert seen > 0 and (logs["ended"] > 0).all() == (why == "end") and (logs["stopped"] > 0).all() == (why != "end")


def test_histories_never_cross_the_start_of_an_episode(tmp_path):
    """Also where an episode is shorter than the memory, and at the first rows of all."""
    args, found, agents = setting(tmp_path, memory=10)
    dataset = data.read(args.dataset)
    rows = found.steps.view(2, -1)
    state, history = moma.begin(agents, found, rows)
    seen = agents.see(found.state[None])[0].unflatten(1, (len(dataset.returns), -1))  # (N, E, T+1, O)
    assert history.shape == (2, N, rows.shape[1], 10, agents.O + 1)
    E, T = dataset.mask.shape
    flat = history.transpose(1, 2).flatten(0, 1).view(E, T, N, 10, -1)
    for e in range(E):
        for t in range(T):
            assert torch.equal(state.flatten(0, 1).view(E, T, -1)[e, t], found.state[e * (T + 1) + t])
            for h in range(10):
                past = t - 10 + h
                want = torch.zeros(N, agents.O + 1)
                if past >= 0:
                    want = torch.cat([seen[:, e, past], dataset.actions[e, past]], -1)
                assert torch.allclose(flat[e, t, :, h], want, atol=1e-6)


def played_views(game, args, agents):
    """What the agents see in each step of an evaluation, (T, E, N, O), and the views (T, E, N, O) that were given."""
    seen, given, remember, reset, step = [], [], agents.remember, game.reset, game.step
    agents.remember = lambda obs, history: seen.append(obs[0].transpose(0, 1)) or remember(obs, history)
    game.reset = lambda **how: (lambda found: given.append(found[0]) or found)(reset(**how))
    game.step = lambda actions: (lambda found: given.append(found[0]) or found)(step(actions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs, "make", lambda *_: game)
        moma.evaluate(agents, args, 0, game.num_envs, torch.device("cpu"))
    return torch.stack(seen), torch.stack(given)[: len(seen)]


@pytest.mark.parametrize("task", ["all-observant", "independent", "leader-only"])
def test_views_are_made_from_the_state(tmp_path, task):
    path = reach(tmp_path, task)
    args, found, agents = setting(tmp_path, task=task, dataset=path, num_seeds=1)
    dataset = data.read(path)
    obs = layout.rows(dataset)["obs"]
    assert torch.equal(found.state[..., found.columns], obs) and found.state.shape[1] == 11
    views = agents.see(found.state[None])[0].transpose(0, 1)  # (R, N, O)
    std, mean = torch.std_mean(obs, 0, correction=0)
    assert torch.allclose(views, (obs - mean) / std.clamp(min=1e-3), atol=1e-5)
    seen, given = played_views(envs.make("reacher", task, 3, time_limit=4), args, agents)
    assert torch.allclose(seen, (given - mean) / std.clamp(min=1e-3), atol=1e-5)  # so it is when they play


def test_a_short_views_padding_is_no_part_of_the_world(tmp_path):
    """So that a model of the ant learned from one view serves the other."""
    sizes = []
    for task in ("full", "partial"):
        game = envs.make("ant", task, 3, time_limit=5)
        dataset = record(game, lambda t, obs, info: torch.full((3, 4, 2), 0.1 * t, dtype=torch.float32), seed=0)
        dataset.info |= {"env": "ant", "task": task, "references": {"random": 0.0, "expert": 1.0}}
        path = tmp_path / f"{task}.h5"
        data.write(dataset, path)
        args, found, agents = setting(tmp_path, env="ant", task=task, dataset=path, num_seeds=1)
        views = agents.see(found.state[None])[0].transpose(0, 1)  # (R, N, O)
        assert (views[:, -1, -1] == 0).all() == (task == "partial")  # the last agent sees 4 entries
        std, mean = torch.std_mean(layout.rows(dataset)["obs"], 0, correction=0)
        seen, given = played_views(envs.make("ant", task, 3, time_limit=5), args, agents)
        assert torch.allclose(seen, (given - mean) / std.clamp(min=1e-3), atol=1e-4)
        sizes.append(runs.world_of(found, args))
    assert sizes[0] == sizes[1] and "27 entries" in sizes[0]


def test_games_of_other_rewards_are_other_worlds():
    """A polynomial game's task is its rewards, where a body's is only what its agents see."""
    worlds = {}
    for env, task, dataset in (("polynomial", "twin-peaks", "uniform"), ("polynomial", "sign-agreement", "uniform"),
                               ("reacher", "independent", "expert-mix"), ("reacher", "leader-only", "expert-mix")):
        args = moma.parse(["--env", env, "--task", task, "--dataset", dataset, "--episodes", "10"])
        found, _ = moma.arrange(data.load(env, task, dataset, episodes=10), args)
        worlds[task] = runs.world_of(found, args)
    assert worlds["twin-peaks"] != worlds["sign-agreement"] and worlds["independent"] == worlds["leader-only"]


@pytest.mark.parametrize("env, task", [("reacher", "leader-only"), ("ant", "partial"), ("matrix", "coordination")])
def test_the_simulator_is_the_true_world(tmp_path, env, task):
    dataset, limit = "neutral", {} if env == "matrix" else {"time_limit": 30}
    if env != "matrix":
        game, g = envs.make(env, task, 4, **limit), torch.Generator().manual_seed(0)
        shape = (4, *game.single_action_space.shape)
        found = record(game, lambda *_: 2 * torch.rand(shape, generator=g) - 1, seed=0)
        found.info |= {"env": env, "task": task}
        data.write(found, tmp_path / "x.h5")
        dataset = tmp_path / "x.h5"
    flags = ("--env", env, "--task", task, "--dataset", str(dataset), "--num-seeds", "1", "--rollouts", "40")
    args = moma.parse([*flags, "--simulator"])
    found, whole = moma.arrange(data.load(env, task, str(dataset)), args)
    rows, action = found.steps[:40], found.action.flatten(1)
    play = simulator(envs.make(env, task, 40), (1, 40), whole, found.columns)
    after, reward, end, sure = play(found.state[rows][None], action[rows][None])
    assert torch.allclose(after[0], found.state[rows + 1], atol=1e-4) and sure.all()
    assert torch.allclose(
        reward[0], found.reward[rows], atol=0.1 if env == "ant" else 1e-5
    )  # where an ant touches ground
    assert torch.equal(end[0], found.done[rows] > 0)


@torch.no_grad()
def test_a_team_that_plays_remembers_what_it_saw_and_did(tmp_path, float64):
    """From the environment's own views, and with a memory laid out for it, it does what it does in a rehearsal."""
    args, found, agents = setting(tmp_path, memory=2)
    for parameter in agents.parameters():
        parameter *= 3  # so that the memory matters
    obs_and_action, B = agents.O + A, 5
    history, memory = torch.zeros(S, N, B, 2, obs_and_action), torch.zeros(S, B, N, 2 * obs_and_action)
    for rows in torch.randint(len(found.state), (4, S, B), generator=torch.Generator().manual_seed(0)):
        state = found.state[rows]
        seen = agents.see(state)
        want = agents.act(agents.remember(seen, history))[..., :A].clamp(-1, 1)  # (S, N, B, A)
        forgetful, _ = moma.act(agents, state[..., found.columns], None, 0 * memory)
        action, memory = moma.act(agents, state[..., found.columns], None, memory)
        assert action.dtype == torch.float32 and torch.allclose(action.double(), want.transpose(1, 2), atol=1e-6)
        history = torch.stack([history[..., 1, :], torch.cat([seen, want], -1)], -2)
    assert (forgetful - action).abs().max() > 1e-3


# ---------------------------------------------------------------- the model
def linear_system(folder):
    """Episodes of s' = 0.9 s + 0.1 a for the reacher's shapes: what a model should learn at once."""
    torch.manual_seed(0)
    E, T = 40, 12
    action, state = 2 * torch.rand(E, T, 2, 1) - 1, [torch.randn(E, 11)]
    for t in range(T):
        state.append(0.9 * state[-1] + 0.1 * action[:, t].flatten(1).repeat(1, 6)[:, :11])
    state = torch.stack(state, 1)
    views = [[0, 2, 6, 4, 5], [1, 3, 7, 4, 5]]
    no = torch.zeros(E, T, dtype=torch.bool)
    info = {"env": "reacher", "task": "independent"}
    found = Dataset(state[..., views], state, None, action, state[:, :-1].sum(-1), no, ~no, info)
    data.write(found, folder / "linear.h5")
    return folder / "linear.h5"


def test_the_model_learns_a_linear_world_and_the_best_members_are_kept(tmp_path):
    args, found, _ = setting(tmp_path, dataset=linear_system(tmp_path), model_steps=400, model_eval_every=400,
                                     model_batch=64, model_hidden=32, model_lr=3e-3)  # fmt: skip
    args.out_dir = str(tmp_path / "run")
    run, dataset = runs.Run("moma_ppo", args), data.read(args.dataset)
    chosen, about = moma.learn_world(run, dataset, found, args)
    rows = list(csv.DictReader((tmp_path / "run" / "world_model.csv").open()))
    assert float(rows[0]["state_error"]) > 0.8 and about["state_error"] < 0.35 and about["reward_error"] < 0.35
    assert all(a < b for a, b in zip(about["open_loop"], about["open_loop_still"]))
    assert about["end_error"] == 0
    kept = sum(moma.validate(chosen, found, S)[name] for name in ("state", "reward"))  # (S, elites)
    for s in range(S):
        last = [
            float(r["state_error"]) + float(r["reward_error"])
            for r in rows
            if (r["step"], r["seed"]) == ("400", str(s))
        ]
        assert kept[s].tolist() == pytest.approx(sorted(last)[:2], abs=1e-5)


def test_open_loop_errors_are_a_slow_loop(float64):
    """Of models that scale the state and add the action, in entries of which one never changes."""
    torch.manual_seed(0)
    k, factors = 3, torch.tensor([0.5, 0.9, 1.1, 1.0])  # two seeds of two models
    state, action, rows = torch.randn(30, 3), torch.randn(30, 3), torch.tensor([0, 7, 11])
    more, left = torch.tensor([0, 3, 7, 9, 11]), torch.tensor([4, 2, 3, 1, 3])  # of which two end too early
    state[:, 1] = 2.0
    model = lambda state, action: SimpleNamespace(state=factors[:, None, None] * state + action)  # noqa: E731
    found, still = open_loop(model, (2, 2), state, action, more, left, k)
    spread, errors, stayed = state.std(0, correction=0), torch.zeros(2, k), torch.zeros(k)
    for row in rows.tolist():
        for u in range(4):
            x = state[row]
            for t in range(k):
                x = factors[u] * x + action[row + t]
                off, idle = (((y - state[row + t + 1]) / spread)[[0, 2]] ** 2 for y in (x, state[row]))
                errors[u // 2, t] += off.mean() / 6
                stayed[t] += idle.mean() / 12
    assert torch.allclose(found, errors.sqrt(), atol=1e-12) and torch.allclose(still, stayed.sqrt(), atol=1e-12)


def test_held_out_episodes_are_whole(tmp_path):
    args, found, *_ = setting(tmp_path, holdout=0.3)
    episode = found.held // 9  # of 8 steps
    assert len(found.held) == 4 * 8 and len(episode.unique()) == 4
    assert sorted([*found.train.tolist(), *found.held.tolist()]) == found.steps.tolist()


# ---------------------------------------------------------------- the script
def saved(folder):
    """All numbers that the agents have learned."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["agents"]


@pytest.mark.parametrize("more", [
    "", "--sample-states --end-from state --beta-nll 0.5 --warmup 2 --first 0.3 --bound-values",
])  # fmt: skip
def test_seeds_at_once_are_single_runs(tmp_path, float64, monkeypatch, more):
    # The games of an evaluation begin differently for each of all games, so that they depend on how many there are.
    monkeypatch.setattr(moma, "evaluate", lambda agents, *_: {"return": torch.zeros(agents.S, 1)})
    monkeypatch.setattr(moma, "draw_convention", lambda *_: (torch.zeros(1, 1), None))
    monkeypatch.setattr(runs.Run, "finish", lambda *_, **__: None)

    def train(name, **changes):
        flags = words(tmp_path, *more.split(), **changes)
        moma.main(moma.parse([*flags, "--out-dir", str(tmp_path / name)]))
        return saved(tmp_path / name), [*csv.DictReader((tmp_path / name / "metrics.csv").open())]

    together, rows = train("together", seed=3, num_seeds=2)
    for s in range(2):
        alone, its_rows = train(f"alone{s}", seed=3 + s, num_seeds=1)
        for name, tensor in alone.items():
            group = together[name]
            if tensor.dim():  # S or S N networks
                each = len(tensor)
                group = group[s * each : (s + 1) * each]
            assert torch.allclose(tensor, group, rtol=0, atol=1e-9), name
        mine = [row for row in rows if row["seed"] == str(3 + s)]
        for one, other in zip(its_rows, mine, strict=True):
            assert [float(x) for x in one.values()] == pytest.approx([float(x) for x in other.values()], nan_ok=True)


@pytest.mark.parametrize("stop", ["model step      3", "model step      9", "step      0", "step      1"])
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path, stop):
    """Stopped in either act, between them, and before the warm-up."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = words(tmp_path, num_seeds=1, model_steps=9, steps=3, warmup=2)
    moma.main(moma.parse([*flags, "--out-dir", str(whole)]))
    process = subprocess.Popen(
        [sys.executable, "algorithms/moma_ppo.py", *flags, "--out-dir", str(broken)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    for line in process.stdout:  # stop at once after an evaluation in the middle
        if line.startswith(stop):
            break
    process.kill()
    process.communicate()
    assert not (broken / "summary.json").exists()
    moma.main(moma.parse(["--resume", "--out-dir", str(broken)]))
    for name in ("metrics.csv", "world_model.csv"):
        assert (whole / name).read_text() == (broken / name).read_text()
    one, other = saved(whole), saved(broken)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    one, other = (torch.load(f / "world_model.pt", weights_only=True)["world"] for f in (whole, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    first, second = (json.loads((f / "summary.json").read_text()) for f in (whole, broken))
    for summary in (first, second):
        assert summary.pop("wall_seconds") > 0 and summary.pop("updates_per_second") > 0
        del summary["world_model"]["updates_per_second"]
    assert first == second and first["normalized_return"] is not None and first["win_rate"] is None
    assert all((broken / f"{name}.png").exists() for name in ("curve", "world_model", "convention"))
    assert not list(broken.glob("*.part"))


@pytest.mark.parametrize("dataset", ["favourable", "neutral", "unfavourable"])
def test_the_coordination_game_is_solved(tmp_path, dataset):
    seeds = 10 if dataset == "unfavourable" else 3
    flags = ("--dataset", dataset, "--num-seeds", seeds, "--steps", 10)
    done = command("algorithms/moma_ppo.py", *flags, "--out-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["return"]["per_seed"] == [1.0] * seeds
    assert "MOMA-PPO" in done.stdout and "open-loop error" in done.stdout


@pytest.mark.parametrize("more", [
    ("--simulator",), ("--penalty", "aleatoric", "--no-box", "--no-adaptive"), ("--memory", "0", "--no-normalize"),
    ("--reward-penalty", "0", "--state-penalty", "0", "--warmup", "1"),
])  # fmt: skip
def test_the_flags_run_on_the_reacher(tmp_path, more):
    flags = words(tmp_path, num_seeds=1)
    summary = moma.main(moma.parse([*flags, *more, "--out-dir", str(tmp_path / "run")]))
    assert math.isfinite(summary["return"]["mean"])


@pytest.mark.parametrize("env, task, agents, torques", [("ant", "partial", 4, 2), ("halfcheetah", "2x3", 2, 3)])
def test_agents_share_an_ant_or_a_cheetah(tmp_path, monkeypatch, env, task, agents, torques):
    monkeypatch.setattr(envs, "make", functools.partial(envs.make, time_limit=20))
    game, g = envs.make(env, task, 3), torch.Generator().manual_seed(0)
    dataset = record(game, lambda *_: 0.4 * torch.rand(3, agents, torques, generator=g) - 0.2, seed=0)
    dataset.info |= {"env": env, "task": task}
    data.write(dataset, tmp_path / "body.h5")
    flags = words(tmp_path, env=env, task=task, dataset=tmp_path / "body.h5", num_seeds=1)
    summary = moma.main(moma.parse([*flags, "--out-dir", str(tmp_path / "run")]))
    assert math.isfinite(summary["return"]["mean"]) and len(summary["world_model"]["open_loop"]) == 3


def test_a_model_serves_all_tasks_of_its_body(tmp_path):
    moma.main(moma.parse([*words(tmp_path, seed=4, num_seeds=2), "--out-dir", str(tmp_path / "one")]))
    path = reach(tmp_path, "leader-only")
    again = words(tmp_path, task="leader-only", dataset=path, seed=5, num_seeds=1)
    reused = [*again, "--world-model", str(tmp_path / "one")]
    moma.main(moma.parse([*reused, "--out-dir", str(tmp_path / "two")]))
    one, two = (torch.load(tmp_path / f / "world_model.pt", weights_only=True) for f in ("one", "two"))
    assert two["about"]["seeds"] == [5] and one["about"]["seeds"] == [4, 5]
    assert torch.equal(one["world"]["for_end.0.weight"][2:], two["world"]["for_end.0.weight"])
    assert not (tmp_path / "two" / "world_model.csv").exists()
    args, found, _ = setting(tmp_path, task="leader-only", dataset=reach(tmp_path, "leader-only", 3), seed=4)
    run = SimpleNamespace(seeds=[4, 5], device=torch.device("cpu"))
    world, _ = moma.read_world(run, tmp_path / "one", found, args)
    assert torch.equal(world.mean, one["world"]["mean"])  # the model keeps its own units
    assert not torch.equal(world.mean, found.state.mean(0))


# ---------------------------------------------------------------- what helps on a laptop
def test_rollouts_can_begin_where_episodes_do(tmp_path, float64):
    for first, wanted in ((1.0, True), (0.0, False)):
        args, found, agents = setting(tmp_path, "--no-normalize", first=first, rollouts=40)
        batch, _ = rehearse(args, found, agents, known_world)
        begin = batch.state.unflatten(1, (40, args.horizon))[:, :, 0]  # (S, B, D)
        known = (begin[:, :, None] == found.state[found.openings]).all(-1).any(-1)
        assert known.all() == wanted and known.any()
    assert torch.equal(found.age[found.openings], torch.zeros(12)) and len(found.openings) == 12


def test_what_lies_beyond_a_rollout_is_worth_no_more_than_the_data_could_be(tmp_path, float64):
    for more, bounded in ((("--bound-values",), True), ((), False)):
        args, found, agents = setting(tmp_path, *more)
        with torch.no_grad():
            agents.mixer[-1].bias[..., -1] = 1e6
        batch, _ = rehearse(args, found, agents, known_world)
        last = batch.returns.unflatten(1, (args.rollouts, args.horizon))[..., -1]
        reward = found.state.abs().sum(1).max() * 3
        assert (last < reward + args.gamma * agents.highest).all() == bounded
    low, high = found.togo[found.steps].aminmax()
    assert agents.highest == high + (high - low) / 2


def test_togo_is_the_discounted_rest_of_the_episode(tmp_path, float64):
    args, found, *_ = setting(tmp_path, gamma=0.8)  # to the end of the recording, which for the reacher is a time limit
    lengths = data.read(args.dataset).lengths
    assert not found.done.any() and (lengths == 8).all()
    for row in found.steps[::7].tolist():
        left = 8 - int(found.age[row])
        want = sum(0.8**j * found.reward[row + j] for j in range(left))
        assert found.togo[row] == pytest.approx(want.item(), abs=1e-9)


def test_a_warm_up_teaches_the_actors_and_the_critic(tmp_path, float64):
    args, found, agents = setting(tmp_path, batch_size=64, lr=3e-3)
    found = found._replace(action=found.state[:, :2, None].contiguous())  # what each agent does is what it sees
    adam, rows, streams = moma.Adam(agents.parameters(), args.lr), found.steps.expand(S, -1), generators()

    before = [x.detach() for x in moma.clone_loss(agents, found, rows)]  # (S,) each
    for _ in range(60):
        moma.clone_update(agents, adam, found, moma.draw_rows(streams, found.steps, args.batch_size), args)
    after = moma.clone_loss(agents, found, rows)
    assert (after[0] < before[0] - 0.5).all() and (after[1] < 0.7 * before[1]).all()
    scores = []
    for warmup in (0, 30):
        out = ["--out-dir", str(tmp_path / f"run{warmup}")]
        moma.main(moma.parse([*words(tmp_path, warmup=warmup, lr=3e-3), *out]))
        scores.append((tmp_path / f"run{warmup}" / "metrics.csv").read_text().splitlines())
    assert scores[0][:3] == scores[1][:3] and scores[0][3:] != scores[1][3:]  # untrained teams are the same


def test_step_sizes_fall_to_nothing(tmp_path, monkeypatch):
    used, descend = [], moma.descend

    def watch(adam, losses, args):
        used.append(adam.lr.item())
        descend(adam, losses, args)

    monkeypatch.setattr(moma, "descend", watch)
    flags = words(tmp_path, model_steps=4, model_lr=0.4, steps=2, lr=0.2, rollouts=2, horizon=2)  # a minibatch each
    moma.main(moma.parse([*flags, "--out-dir", str(tmp_path / "run")]))
    assert used == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.2, 0.1])


def test_a_gradient_is_cut_for_each_part_alone(tmp_path, float64):
    """A member's, or a seed's, to the longest; the others' stay as they are."""
    args, found, agents = setting(tmp_path)
    moved, given = [], torch.tensor([3.0, 0.2])
    adam = SimpleNamespace(moved=list(agents.parameters()), step=lambda gradients: moved.extend(gradients))
    total = sum(p.reshape(S, -1).sum(1) for p in adam.moved)  # (S,), whose gradients are all 1
    size = sum(p.numel() for p in adam.moved) / S
    moma.descend(adam, total * given / size**0.5, args)
    length = sum(g.reshape(S, -1).square().sum(1) for g in moved).sqrt()
    assert torch.allclose(length, torch.tensor([args.max_grad_norm, 0.2]))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_beta_weighs_each_error_by_its_sigma(beta, tmp_path, float64):
    """The mean's gradient is that of squared errors over sigma^2, times sigma^(2 beta), in units of the moves."""
    args, found, _ = setting(tmp_path)
    world = moma.World(found, replace(args, members=1), generators(3))
    with torch.no_grad():
        world.for_state[-1].bias += torch.randn_like(world.for_state[-1].bias)  # sigmas that differ
    rows = found.steps[torch.randint(len(found.steps), (3, 7))]
    state, action, after = found.state[rows], found.action[rows].flatten(2), found.state[rows + 1]
    moma.model_loss(world, found, rows, beta).sum().backward()

    guess, vary = world(state, action), world.move_std > 0
    unit = world.move_std.clamp(min=1e-8)
    error, sigma = ((x / unit).detach() for x in (after - guess.state, guess.state_std))
    slope = torch.zeros_like(error)
    for index in torch.cartesian_prod(*map(torch.arange, error.shape)).tolist():
        e, b, d = index
        if vary[d]:
            slope[e, b, d] = -error[e, b, d] * sigma[e, b, d] ** (2 * beta - 2) / vary.sum() / error.shape[1]
    found_slope = world.for_state[-1].bias.grad[:, 0, : error.shape[2]]
    assert torch.allclose(found_slope, slope.sum(1)) and found_slope.abs().max() > 1e-3


def test_the_end_can_be_told_by_the_next_state(tmp_path, float64):
    """By the recorded one where the model learns, by the predicted one where it plays; neither teaches the other."""
    args, found, _ = setting(tmp_path)
    world = moma.World(found, replace(args, members=1, end_from="state"), generators(3))
    rows = found.steps[torch.randint(len(found.steps), (3, 7))]
    state, action, after = found.state[rows], found.action[rows].flatten(2), found.state[rows + 1]
    guess = world(state, action)
    judge = lambda x: world.for_end((x - world.mean) / world.std)[..., 0]  # noqa: E731
    assert torch.equal(guess.end, judge(guess.state)) and torch.equal(world(state, action, after).end, judge(after))
    assert not torch.equal(guess.end, judge(after))
    guess.end.sum().backward()
    assert world.for_end[0].weight.grad.abs().max() > 0 and world.for_state[0].weight.grad is None


def test_a_state_that_falls_by_its_noise_alone_does_not_end(tmp_path):
    """With --end-from state each member judges what it predicts itself, neither drawn nor in the box."""
    args, found, _ = setting(tmp_path, "--sample-states", "--end-from", "state", elites=3, num_seeds=1)
    low, high = found.state[:, 0].aminmax()
    top, std = high + args.box_margin * (high - low), found.state.std(0, correction=0)  # of the box, in the first entry

    def step(state, noise, most):
        """The next state and the end where a first entry above `most` ends the game."""
        world = moma.World(found, args, generators(1))
        with torch.no_grad():
            for layer in world.for_end[::2]:  # the entry, as its positive and its negative part, is handed through
                layer.weight.zero_(), layer.bias.zero_()
            world.for_end[0].weight[:, 0, :2] = torch.tensor([1.0, -1.0])
            world.for_end[2].weight[:, :2, :2] = torch.eye(2)
            world.for_end[4].weight[:, :2, 0] = torch.tensor([1.0, -1.0])
            world.for_end[4].bias.fill_(-(most - world.mean[0]) / world.std[0])
        play = moma.dream(world.choose([0, 1, 2]), found, args)
        rest = torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.long), torch.full_like(state, noise)
        after, _, end, _ = play(state, *rest)
        return after[..., 0], end

    state = found.state[:4][None]
    after, end = step(state, 1e6, top - 0.01)
    assert (after > top - 0.01).all() and not end.any()  # it was drawn there, but nobody expected it
    after, end = step(state + 9 * std, 0.0, top + 0.01)
    assert (after < top + 0.01).all() and end.all()  # all expect it there, but the box keeps it away


def test_actions_enter_the_model_in_units_of_their_spread(tmp_path, float64):
    args, found, _ = setting(tmp_path)
    one = replace(args, members=1)
    world = moma.World(found, one, generators(3))
    small = moma.World(found._replace(action=0.01 * found.action), one, generators(3))
    state, action = found.state[:5].expand(3, -1, -1), torch.randn(3, 5, 2)
    for one, other in zip(world(state, action), small(state, 0.01 * action)):
        assert torch.allclose(one, other, atol=1e-6)


def test_policies_begin_as_far_apart_as_the_data(tmp_path, float64):
    _, found, agents = setting(tmp_path)
    out = agents.act(torch.randn(S * N, 50, agents.policy[0].weight.shape[1]))
    spread = found.action[found.steps].std(0, correction=0)  # (N, A)
    assert torch.allclose(out[..., A:].mean((0, 2)).exp(), spread, rtol=0.2)


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, said", [
    (("--env", "chess"), "unknown environment: choose --env matrix, "),
    (("--env", "bridge"), "MOMA-PPO is for bodies, and games whose available actions never change: choose"),
    (("--env", "smac"), "choose --env matrix, halfcheetah, reacher, ant, polynomial, or package"),
    (("--task", "6x1"), "matrix has no task '6x1'"),
    (("--dataset", "best"), "choose favourable, neutral"),
    (("--dataset", "nowhere.h5"), "no dataset file nowhere.h5"),
    (("--env", "halfcheetah", "--simulator"), "--simulator cannot be put into a state of halfcheetah"),
    (("--device", "tpu"), "unknown device 'tpu'"),
    (("--elites", "1"), "--elites must be at least 2"),
    (("--elites", "8"), "--elites must be at least 2"),
    (("--holdout", "1"), "--holdout is a share"),
    (("--width", "3"), "--width must be even"),
    (("--gamma", "2"), "--gamma must be at least 0 and at most 1"),
    (("--limit", "nan"), "--limit must be above 0"),
    (("--first", "1.5"), "--first must be at least 0 and at most 1"),
    (("--least-entropy", "inf"), "--least-entropy must be finite, not inf"),
    (("--episodes", "1"), "has one episode, so none can be held out"),
    (("--world-model", "nowhere"), "no world model nowhere"),
    (("--world-model", "README.md"), "README.md is no world model, or damaged"),
    (("--resume", "--out-dir", "nowhere"), "no run to resume in nowhere"),
])  # fmt: skip
def test_bad_input_is_refused(tmp_path, flags, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    refuses(moma, flags, said, tmp_path / "run")


def test_one_episode_is_enough_if_none_is_held_out(tmp_path):
    flags = words(tmp_path, dataset=reach(tmp_path, episodes=1), holdout=0, num_seeds=1)
    moma.main(moma.parse([*flags, "--out-dir", str(tmp_path / "run")]))


def test_a_model_of_another_task_or_seed_is_refused(tmp_path):
    quick = ("--model-steps", "1", "--steps", "1", "--num-seeds", "2", "--members", "2", "--elites", "2")
    moma.main(moma.parse([*quick, "--out-dir", str(tmp_path / "run")]))
    reuse = (*quick, "--world-model", tmp_path / "run", "--out-dir", tmp_path / "new")
    complains(
        command("algorithms/moma_ppo.py", *reuse, "--task", "xor", "--dataset", "all"), "another world", "matrix, xor"
    )
    with pytest.raises(ValueError, match="another world"):
        moma.main(moma.parse([*words(tmp_path, elites=2), "--world-model", str(tmp_path / "run")]))
    for more in (("--seed", "1"), ("--members", "3", "--elites", "3")):
        with pytest.raises(ValueError, match=r"has 2 elites of the seeds \[0, 1\]"):
            moma.main(moma.parse([*map(str, reuse), *more]))
    file = tmp_path / "run" / "world_model.pt"
    saved = torch.load(file, weights_only=True)
    for harm, said in (
        (saved["about"]["sizes"] | {"model_hidden": 5}, "its weights do not fit its sizes"),
        ({"height": 3}, "do not fit"),
        (None, "is no world model, or damaged"),
    ):
        torch.save(saved | {"about": saved["about"] | {"sizes": harm}}, file)
        with pytest.raises(ValueError, match=said):
            moma.main(moma.parse([*map(str, reuse)]))
    del saved["about"]["sizes"]
    torch.save(saved, file)
    with pytest.raises(ValueError, match="is no world model, or damaged"):
        moma.main(moma.parse([*map(str, reuse)]))
    assert not (tmp_path / "new").exists()


def test_a_constant_reward_breaks_nothing(tmp_path, capsys):
    dataset = data.read(reach(tmp_path))
    dataset.reward.fill_(-0.3)
    data.write(dataset, tmp_path / "same.h5")
    flags = words(tmp_path, dataset=tmp_path / "same.h5", num_seeds=1)
    summary = moma.main(moma.parse([*flags, "--out-dir", str(tmp_path / "run")]))
    assert math.isfinite(summary["return"]["mean"]) and "earns -0.3" in capsys.readouterr().out
    assert summary["world_model"]["reward_error"] < 1e-6


def test_step_sizes_that_diverge_end_in_one_line(tmp_path):
    with pytest.raises(FloatingPointError, match="not finite after 1 steps: try smaller step sizes"):
        moma.main(moma.parse([*words(tmp_path, lr=1e30), "--out-dir", str(tmp_path / "one")]))
    with pytest.raises(FloatingPointError, match="loss is not finite after 3 model steps: try smaller step sizes"):
        moma.main(moma.parse([*words(tmp_path, model_lr=1e30), "--out-dir", str(tmp_path / "two")]))


def test_a_run_is_not_overwritten_or_changed(tmp_path):
    flags = [*words(tmp_path, num_seeds=1, steps=1), "--out-dir", str(tmp_path / "run")]
    moma.main(moma.parse(flags))
    with pytest.raises(ValueError, match="holds a run already: --resume goes on"):
        moma.main(moma.parse(flags))
    with pytest.raises(ValueError, match="begun with --limit 2.0"):
        moma.main(moma.parse(["--resume", "--out-dir", str(tmp_path / "run"), "--limit", "1"]))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    del saved["parts"]["agents"]["alpha"]
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt is of another run"):
        moma.main(moma.parse(["--resume", "--out-dir", str(tmp_path / "run")]))
