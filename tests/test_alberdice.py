"""AlberDICE: its losses against slow loops, what is known of their minima, and the games that it settles."""

import pytest
import torch
from conftest import SHARED, load_script

from data import layout

alberdice = load_script("alberdice")
S, N, A, M, B = 2, 3, 4, 40, 16
REAL = SHARED / "alberdice_bridge_optimal"


def streams(seeds=range(S)):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def made(seeds=range(S), **flags):
    """A small dataset in which some actions are not available, arguments, teams, their optimisers and behaviour."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    avail = torch.rand(M + 1, N, A) < 0.8
    avail[..., 0] = True
    action = torch.multinomial(avail.flatten(0, 1).double(), 1).view(M + 1, N)
    obs, state, reward = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6), torch.randn(M + 1)
    done = (torch.rand(M + 1) < 0.3).to(dtype)
    data = alberdice.Data(obs, state, avail, action, reward, done, torch.arange(M))
    args = alberdice.Args(num_seeds=len(seeds), **dict(hidden=8, batch_size=B, clone_steps=3) | flags)
    team = alberdice.Team(data, args, streams(seeds))
    return data, args, team, alberdice.optimizers(team, args)


def others(i):
    return [j for j in range(N) if j != i]


# ---------------------------------------------------------------- equations
def test_the_teammates_model_is_asked_for_one_teammate_at_a_time(float64):
    data, args, team, _ = made()
    rows = torch.arange(S * 5).view(S, 5)
    for i in range(N):
        found = alberdice.teammate_log_prob(team.teammates, data.state[rows], data.avail[rows], data.actions[rows], i)
        for s in range(S):
            for b, row in enumerate(rows[s]):
                for place, j in enumerate(others(i)):
                    known = torch.zeros(N, A)
                    for k in range(N):
                        if k == i or k < j:
                            known[k, data.actions[row, k]] = 1
                    x = torch.cat([data.state[row], torch.eye(N)[j], known.flatten()])
                    for layer in team.teammates:
                        x = x @ layer.weight[s] + layer.bias[s, 0] if hasattr(layer, "weight") else x.relu()
                    legal = data.avail[row, j]
                    log_mu = torch.where(legal, x, -torch.inf).log_softmax(-1)
                    assert torch.allclose(found[s, b, place][legal], log_mu[legal])
                    assert (found[s, b, place][~legal].exp() == 0).all()


def test_the_ratio_and_the_teammates_price_against_slow_loops(float64):
    log_pi, log_mu = (torch.randn(S, B, N - 1, A).log_softmax(-1) for _ in range(2))
    actions = torch.randint(A, (S, B, N - 1))
    ratio = alberdice.importance_ratio(
        alberdice.chosen(log_pi, actions).sum(-1), alberdice.chosen(log_mu, actions).sum(-1), 3.0
    )
    price = alberdice.teammates_kl(log_pi, log_mu)
    for s in range(S):
        for b in range(B):
            product, kl = 1.0, 0.0
            for j in range(N - 1):
                a = actions[s, b, j]
                product = product * log_pi[s, b, j, a].exp() / log_mu[s, b, j, a].exp()
                for k in range(A):
                    kl += log_pi[s, b, j, k].exp() * (log_pi[s, b, j, k] - log_mu[s, b, j, k])
            assert torch.isclose(ratio[s, b], product.clamp(max=3.0)) and torch.isclose(price[s, b], kl)
    assert (ratio == 3).any()


def test_the_ratio_is_1_and_the_price_0_where_teammates_play_like_the_data(float64):
    log_mu = torch.randn(S, B, N - 1, A).log_softmax(-1)
    taken = alberdice.chosen(log_mu, torch.randint(A, (S, B, N - 1))).sum(-1)
    assert (alberdice.importance_ratio(taken, taken, 100.0) == 1).all()
    assert (alberdice.teammates_kl(log_mu, log_mu) == 0).all()


def test_the_losses_of_e_and_of_the_policy_against_slow_loops(float64):
    e, action, advantages = torch.randn(S, B, A), torch.zeros(S, B).long(), torch.randn(S, B)
    avail = torch.rand(S, B, A) < 0.7
    avail[..., 0] = True
    log_mu, log_pi = (torch.randn(S, B, A).masked_fill(~avail, -1e10).log_softmax(-1) for _ in range(2))
    log_mu = log_mu.clamp(min=-20)
    loss_e, (loss_pi, kl) = (
        alberdice.e_loss(e, action, advantages, avail, log_mu, 0.3), alberdice.policy_loss(log_pi, e, log_mu, 0.7)
    )  # fmt: skip
    for s in range(S):
        want_e = want_pi = want_kl = 0.0
        for b in range(B):
            legal = [a for a in range(A) if avail[s, b, a]]
            total = sum(e[s, b, a].exp() for a in legal).log() - sum(log_mu[s, b, a].exp() * e[s, b, a] for a in legal)
            want_e += ((e[s, b, 0] - advantages[s, b]) ** 2 + 0.3 * total) / B
            for a in legal:
                p, ratio = log_pi[s, b, a].exp(), log_pi[s, b, a] - log_mu[s, b, a]
                want_pi += p * (0.7 * ratio - e[s, b, a]) / B
                want_kl += p * ratio / B
        assert torch.isclose(loss_e[s], want_e) and torch.isclose(loss_pi[s], want_pi) and torch.isclose(kl[s], want_kl)


@pytest.mark.parametrize("alpha", [0.5, 1e9])
def test_the_best_policy_is_the_behaviour_tilted_by_e(float64, alpha):
    """Eq. 7 is least at mu exp(e / alpha) / Z; with a huge alpha that is cloning."""
    e, log_mu = torch.randn(S, B, A), torch.randn(S, B, A).log_softmax(-1)
    logits = (log_mu + e / alpha).requires_grad_()
    loss, _ = alberdice.policy_loss(logits.log_softmax(-1), e, log_mu, alpha)
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    assert slope.abs().max() < 1e-9 * alpha
    away = (logits + 0.1 * torch.randn_like(logits)).log_softmax(-1)
    assert (alberdice.policy_loss(away, e, log_mu, alpha)[0] > loss).all()
    if alpha > 1e6:
        assert torch.allclose(logits.softmax(-1), log_mu.exp(), atol=1e-8)


def test_the_slope_of_nus_loss_is_what_is_missing_from_the_flow_of_visits(float64):
    """Eq. 5's derivative by nu(s), state by state: visits that arrive, less those that leave, by weights d over the
    steps. At its minimum they are the visits of one way of playing."""
    states, gamma, alpha = 5, 0.9, 0.6
    args = alberdice.Args(gamma=gamma, penalty=0.0, absorbed=1.5)
    nu = torch.randn(S, states, requires_grad=True)
    now, after = torch.randint(states, (2, S, B))
    reward, kl, done = torch.randn(S, B), torch.rand(S, B), (torch.rand(S, B) < 0.3).double()
    ratio = torch.rand(S, B) + 0.1
    places = torch.randint(B, (S, B))  # any: what is drawn again stands for what it was drawn from
    advantages = alberdice.advantage(nu.gather(1, now), nu.gather(1, after), reward, done, kl, alpha, gamma)
    loss = alberdice.nu_loss(advantages.gather(1, places), ratio, nu.gather(1, now), nu.new_zeros(S, B, 1), alpha, args)
    (found,) = torch.autograd.grad(loss.sum(), nu)
    for s in range(S):
        mass = []
        for place in places[s]:
            go_on = gamma * (1 - done[s, place]) * nu[s, after[s, place]]
            E = reward[s, place] - alpha * kl[s, place] + go_on - nu[s, now[s, place]]
            mass.append(ratio[s].mean() * (E / alpha).exp() / B)
        total, want = sum(mass) + 1.5, torch.zeros(states)  # 1.5 steps after the end beside each recorded one
        assert torch.isclose(loss[s], alpha * (total / 2.5).log() + (1 - gamma) * nu[s, now[s]].mean() / 2.5)
        for d, place in zip(mass, places[s]):
            want[after[s, place]] += (d / total * gamma * (1 - done[s, place])).detach()
            want[now[s, place]] -= (d / total).detach()
        for k in range(B):
            want[now[s, k]] += (1 - gamma) / B / 2.5
        assert torch.allclose(found[s], want)


def test_the_slope_between_states_is_autograds(float64):
    data, args, team, _ = made(layers=3)
    x = torch.randn(S, B, 6, requires_grad=True)
    (want,) = torch.autograd.grad(team.nus[0](x).sum(), x)
    assert torch.allclose(alberdice.slope(team.nus[0], x), want) and (want != 0).any()


def test_the_table_of_the_behaviour_is_the_models(float64):
    data, args, team, _ = made()
    table, rows = alberdice.tabulate(team, data, args), torch.arange(M + 1).expand(S, -1)
    for i in range(N):
        log_mu = alberdice.log_probs(team.mus[i], data.obs[rows, i], data.avail[rows, i]).clamp(min=-20)
        beside = alberdice.teammate_log_prob(
            team.teammates, *(x[rows] for x in (data.state, data.avail, data.actions)), i
        )
        assert torch.allclose(table.log_mu[i], log_mu)
        assert torch.allclose(table.log_mu_others[i], beside.clamp(min=-20))


def test_both_weights_fall_by_a_constant_factor():
    def weights(args):
        _, _, team, adams = made()
        for step in range(args.steps):
            alberdice.schedule(team, adams, step, args)
            for name, lr in (("nus", args.critic_lr), ("es", args.critic_lr), ("policies", args.policy_lr)):
                assert {adam.lr.item() for adam in adams[name]} == {lr * (1 - step / args.steps)}
            yield team.alpha.item(), team.cql.item()

    alphas, cqls = zip(*weights(alberdice.Args(steps=5, alpha=1.6, alpha_end=0.1, cql=0.0)))
    assert alphas == pytest.approx([1.6, 0.8, 0.4, 0.2, 0.1]) and cqls == (0,) * 5
    args = alberdice.parse(["--steps", "7"])
    assert [*weights(args)][-1] == pytest.approx((args.alpha_end, args.cql_end)) and args.cql > args.cql_end
    assert [*weights(alberdice.Args(steps=1))] == [pytest.approx((args.alpha, args.cql))]
    args = alberdice.parse(["--env", "matrix"])
    assert args.cql == args.cql_end == 0.1


# ---------------------------------------------------------------- the whole
def trained(seeds, steps=3):
    data, args, team, adams = made(seeds)
    generators = streams(seeds)
    behaviour = alberdice.clone(team, data, generators, args)
    for step in range(steps):
        alberdice.schedule(team, adams, step, args)
        alberdice.update(team, adams, data, behaviour, alberdice.draw_noise(generators, N, args), args)
    return team.state_dict()


def test_seeds_together_are_seeds_alone(float64):
    together = trained((3, 8))
    for s, seed in enumerate((3, 8)):
        for name, value in trained((seed,)).items():
            assert torch.allclose(together[name][s], value[0], atol=1e-12), name


def test_clones_are_kept_where_held_back_steps_are_likeliest(float64):
    """Each seed keeps the best of its looks, wherever the others stop, and none learns from what is held back."""
    seed, seeds = 8, (3, 8)
    held = torch.arange(M) % 2 == 0
    data, args, team, _ = made(seeds, clone_steps=3000, clone_lr=1e-2)
    alberdice.clone(team, data, streams(seeds), args, judge=layout.Judge(held, data.steps, args.clone_steps))
    found = team.state_dict()

    data, args, team, _ = made((seed,), clone_lr=1e-2)
    adam = alberdice.Adam([*team.mus.parameters(), *team.teammates.parameters()], args.clone_lr)
    (generator,), best, since = streams((seed,)), (torch.inf, None), 0
    while since < 4:
        for _ in range(250):
            rows = (~held).nonzero()[:, 0][torch.rand(1, args.clone_batch, generator=generator).mul(M // 2).long()]
            alberdice.descend(adam, alberdice.clone_loss(team, data, rows))
        loss, since = alberdice.clone_loss(team, data, held.nonzero()[:, 0][None]).item(), since + 1
        if loss < best[0]:
            best, since = (loss, {name: value.clone() for name, value in team.state_dict().items()}), 0
    for name in (name for name in best[1] if name.split(".")[0] in ("mus", "teammates")):
        assert torch.allclose(found[name][1], best[1][name][0], atol=1e-10), name


def test_an_agent_learns_against_what_its_teammates_have_become(float64):
    """The second turn of a sweep sees the first agent's new policy, not the old one."""
    data, args, team, adams = made()
    behaviour = alberdice.clone(team, data, streams(), args)
    seen, unroll = [], alberdice.unroll

    def watch(policies, agents, rows, data):
        seen.append((tuple(agents), policies[0][0].weight.clone()))
        return unroll(policies, agents, rows, data)

    alberdice.unroll = watch
    try:
        alberdice.schedule(team, adams, 0, args)
        alberdice.update(team, adams, data, behaviour, alberdice.draw_noise(streams(), N, args), args)
    finally:
        alberdice.unroll = unroll
    assert [agents for agents, _ in seen] == [(1, 2), (0,), (0, 2), (1,), (0, 1), (2,)]
    assert not torch.equal(seen[1][1], seen[2][1]) and torch.equal(seen[2][1], seen[4][1])


# ---------------------------------------------------------------- what the games show
def score(tmp_path, *words):
    words = ("--eval-every", "100000", "--out-dir", str(tmp_path / "run"), *map(str, words))
    return alberdice.main(alberdice.parse(list(words)))


LONG = pytest.mark.long


@LONG
@pytest.mark.parametrize("dataset, reward", [("balanced", 20), ("imbalanced", 5)])
def test_m_nes_local_optimum_is_not_left(tmp_path, dataset, reward):
    """As the papers say: without an entropy bonus a rare but better convention stays rare."""
    found = score(tmp_path, "--env", "matrix", "--task", "m-ne", "--dataset", dataset, "--eval-episodes", 2)
    assert found["return"]["per_seed"] == [reward] * 10


@LONG
@pytest.mark.skipif(not REAL.exists(), reason="needs the authors' file")
def test_the_authors_own_bridge_data_lead_to_the_best(tmp_path):
    found = score(tmp_path, "--dataset", REAL)
    assert min(found["return"]["per_seed"]) > -1.2356 and found["sampled_return"]["mean"] > -1.25


@pytest.mark.parametrize("dataset", ["aa-ab-ba", *(pytest.param(d, marks=LONG) for d in ("ab", "ab-ba", "all"))])
def test_xor_is_settled_in_nine_of_ten_seeds(tmp_path, dataset):
    found = score(tmp_path, "--env", "matrix", "--task", "xor", "--dataset", dataset, "--eval-episodes", 2)
    assert found["return"]["per_seed"].count(1.0) >= 9
