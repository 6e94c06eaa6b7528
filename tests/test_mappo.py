"""MAPPO: its rollouts, estimates and whole updates by hand, what it learns, and its snapshots."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import forward, leaves, streams
from conftest import load_script

import envs
from data.run.snapshots import choose_behaviours, save_snapshots

mappo = load_script("mappo")
S, L, B, N, A, D, O = 2, 5, 3, 3, 4, 7, 4
M = L * B


def made(discrete=True, **flags):
    """Arguments and a team whose policies are far from uniform, with inputs already scaled."""
    torch.manual_seed(0)
    args = mappo.Args(**dict(hidden=8, num_seeds=S, normalize=True, min_std=0.6) | flags)
    team = mappo.Team(N, A, O, D, discrete, args, streams())
    team.actor.body[-1].weight.data *= 100
    if not discrete:
        start = torch.linspace(-1, 0, S * A)  # some below min_std
        team.actor.free_log_std.data = start.view(A, S, 1).movedim(0, -1)
    for scale in (team.actor.scale, team.critic[0]):
        scale.watch(2 + 3 * torch.randn(S, 50, scale.mean.shape[-1]))
    return args, team


def test_a_rollout_is_what_was_played():
    """Played again step by step in another environment, with what the actors saw and chose."""
    flags = dict(env="smac", task="3m", num_envs=4, rollout=70, num_seeds=2, recall=2)
    args = mappo.Args(**flags)
    games = mappo.Games(args, "cpu")
    actor = mappo.Team(*games.sizes, args, streams()).actor
    actor.body[-1].weight.data *= 100
    games.restart(5)
    found = mappo.roll_out(games, actor, streams((2, 3)), args)
    noise = actor.noise(streams((2, 3)), 70, 4, 3)
    env, A, ended = envs.make("smac", "3m", num_envs=8), 9, 0
    obs, info = env.reset(seed=5)
    last = torch.zeros(8, 3, 2 * A)
    for t in range(70):
        x = torch.cat([obs, last, torch.eye(3).expand(8, 3, 3)], -1)
        state, avail = info["state"], info["avail_actions"]
        out = actor(found.x[:, t], found.avail[:, t]).detach()
        action = (out + noise[:, t]).argmax(-1)
        log_prob = out.gather(-1, action[..., None])[..., 0]
        action, log_prob = action.flatten(0, 1), log_prob.flatten(0, 1)
        obs, reward, terminated, truncated, info = env.step(action)
        played = x, avail, action, log_prob, state, info["state"], reward, terminated, truncated
        for name, value in zip(found._fields, played, strict=True):
            assert torch.equal(getattr(found, name)[:, t].flatten(0, 1), value), name
        over = terminated | truncated
        newest = torch.nn.functional.one_hot(action, A)
        last = torch.cat([newest, last[..., :A]], -1) * ~over[:, None, None]
        ended += over.sum().item()
        if over.any():
            obs, info = env.reset(options={"reset_mask": over})
    assert ended >= 8


@pytest.mark.parametrize("discrete", [True, False])
def test_samples_follow_the_policy_in_rollouts_and_evaluations(discrete):
    """The former draw Gumbel or normal noise, the latter make it of exponential numbers."""
    _, team = made(discrete)
    actor, G = team.actor, 40_000

    class Games:
        sizes, last = (N, A, O, D, discrete), torch.zeros(S, B, N, A * discrete)

    player = mappo.player(actor, Games)
    obs, last = torch.randn(S, 1, N, O), torch.zeros(S, 1, N, A * discrete)
    avail = torch.ones(S, 1, N, A).bool() if discrete else None
    out = actor(mappo.look(obs, last), avail)
    action, _ = player.act(obs, avail, last)
    assert torch.equal(action, out.argmax(-1) if discrete else out)
    clocks = torch.empty(S, G, *player.clocks[1:]).exponential_(generator=streams()[0])
    obs, last = obs.expand(-1, G, -1, -1), last.expand(-1, G, -1, -1)
    std = None if discrete else actor.log_std.exp()[:, None].expand(-1, -1, N, -1)
    rolled = mappo.playable(actor.sample(out, actor.noise(streams(), G, N)))
    for action in (player.act(obs, avail, last, clocks)[0], rolled):
        if discrete:
            shares = torch.nn.functional.one_hot(action, A).double().mean(1)
            assert (shares - out[:, 0].exp()).abs().max() < 0.01
            continue
        drawn = (out + std * torch.randn(S, G, N, A)).clamp(-1, 1)
        for power in (1, 2):
            assert ((action**power).mean(1) - (drawn**power).mean(1)).abs().max() < 0.02


def test_networks_begin_orthogonal():
    """`made` has multiplied the actor's last layer by 100."""
    _, team = made()
    layers = {team.actor.body[0]: 2**0.5, team.actor.body[-1]: 1, team.critic[-1]: 1}
    for layer, gain in layers.items():
        assert (torch.linalg.svdvals(layer.weight) - gain).abs().max() < 1e-5


def test_scale_knows_the_mean_and_the_spread_of_all_it_has_seen(float64):
    x = 5 + torch.randn(2, 100, 3) * torch.tensor([0.1, 1.0, 10.0])
    scale = mappo.Scale(3, 2, True)
    assert torch.equal(scale(x), x)  # before it has seen anything
    for part in x.split([20, 50, 30], 1):
        scale.watch(part)
    assert torch.allclose(scale.mean, x.mean(1, keepdim=True))
    assert torch.allclose(scale.var, x.var(1, correction=0, keepdim=True))
    assert torch.allclose(scale(x) * scale.var.sqrt() + scale.mean, x)
    scale.var.zero_()  # what never changes
    assert (scale.std == 0.01).all()
    _, team = made()
    assert [x.tolist() for x in team.scale()] == [[[0], [0]], [[1], [1]]]
    team.watch(torch.full((S, 4), 3.0))
    assert torch.allclose(torch.stack(team.scale()).flatten(), torch.tensor([3, 3, 0.01, 0.01]))


def random_rollout(team):
    """With dead agents, who may only play action 0, and ratios far from 1."""
    alive = torch.rand(S, L, B, N) > 0.3
    avail = (torch.rand(S, L, B, N, A) > 0.4) & alive[..., None]
    avail[..., 3] |= alive
    avail[..., 0] = ~alive
    action = (torch.rand(S, L, B, N, A) * avail).argmax(-1)
    if not team.actor.discrete:
        avail, action = avail[..., :0], torch.randn(S, L, B, N, A)
    x = torch.randn(S, L, B, N, team.actor.scale.mean.shape[-1])
    flat = x.flatten(1, 2), avail.flatten(1, 2), action.flatten(1, 2)
    log_prob = team.actor.log_prob(team.actor(*flat[:2]), flat[2])[0].detach()
    log_prob = log_prob.view(S, L, B, N) + 0.3 * torch.randn(S, L, B, N)
    states, reward = torch.randn(2, S, L, B, D), 3 * torch.randn(S, L, B)
    terminated, truncated = torch.rand(2, S, L, B) < 0.2
    return mappo.Rollout(x, avail, action, log_prob, *states, reward, terminated, truncated)


class ByHand:
    """One seed's team, trained on a step and an agent at a time."""

    def __init__(self, team, s, args):
        self.args, self.cut = args, []
        self.actor, self.critic = leaves(team.actor.body, s), leaves(team.critic, s)
        self.log_std, self.moments = None, [0.0, 0.0, 0.0]
        if not team.actor.discrete:
            self.log_std = team.actor.free_log_std[s, 0].detach().clone().requires_grad_()
        both = [x for pair in (*self.actor, *self.critic) for x in pair]
        self.parameters = both + ([] if self.log_std is None else [self.log_std])
        self.adam = torch.optim.Adam(self.parameters, args.lr, eps=1e-5)

    def unit(self):
        """The mean and the spread of the returns."""
        weight, mean, square = self.moments
        if weight == 0:
            return 0.0, 1.0
        mean, square = mean / weight, square / weight
        return mean, max(square - mean**2, 1e-4) ** 0.5

    def estimate(self, r, scale):
        """Advantages and returns of a rollout r, one seed's: lists over its steps and games."""
        mean, std = self.unit()
        value, after = (
            [[forward(self.critic, scale(x))[0].item() * std + mean for x in row] for row in each]
            for each in (r.state, r.next_state)
        )
        advantage = [[0.0] * B for _ in range(L)]
        for b in range(B):
            later = 0.0
            for t in reversed(range(L)):
                go_on = 0.0 if r.terminated[t, b] else self.args.gamma * after[t][b]
                if r.terminated[t, b] or r.truncated[t, b]:
                    later = 0.0
                delta = r.reward[t, b].item() + go_on - value[t][b]
                later = delta + self.args.gamma * self.args.gae_lambda * later
                advantage[t][b] = later
        returns = np.array(advantage) + np.array(value)
        for k, power in enumerate((0, 1, 2)):
            self.moments[k] += 0.01 * ((returns**power).mean() - self.moments[k])
        mean, std = self.unit()
        alive = np.ones((L, B, N), dtype=bool)
        if self.log_std is None:
            alive = r.avail[..., 1:].any(-1).numpy()
        every = np.repeat(np.array(advantage)[..., None], N, -1)[alive]
        advantage = (np.array(advantage) - every.mean()) / (every.std() + 1e-5)
        return advantage.flatten(), ((returns - mean) / std).flatten(), alive.reshape(M, N)

    def policy(self, x, legal):
        out = forward(self.actor, x)
        if self.log_std is None:
            return torch.distributions.Categorical(logits=out.masked_fill(~legal, -torch.inf))
        std = self.log_std.clamp(min=np.log(self.args.min_std)).exp()
        return torch.distributions.Independent(torch.distributions.Normal(out.tanh(), std), 1)

    def minibatch(self, steps, flat, estimates, scales):
        """One gradient step on these steps; returns diagnostics."""
        advantage, returns, alive = estimates
        gains, entropies, errors = [], [], []
        for m in steps:
            error = forward(self.critic, scales[1](flat.state[m]))[0] - returns[m]
            small, h = error.abs() < self.args.huber, self.args.huber
            errors.append(torch.where(small, error**2 / 2, h * (error.abs() - h / 2)))
            for i in range(N):
                if alive[m, i]:
                    pi = self.policy(scales[0](flat.x[m, i]), flat.avail[m, i])
                    ratio = (pi.log_prob(flat.action[m, i]) - flat.log_prob[m, i]).exp()
                    clipped = ratio.clamp(1 - self.args.clip, 1 + self.args.clip)
                    gains.append(torch.min(ratio * advantage[m], clipped * advantage[m]))
                    if self.log_std is None:
                        p = pi.probs[pi.probs > 0]
                        entropies.append(-(p * p.log()).sum())
                    else:
                        entropies.append(pi.entropy())
        gain, entropy, error = (sum(x) / len(x) for x in (gains, entropies, errors))
        self.adam.zero_grad()
        (error - gain - self.args.entropy * entropy).backward()
        critic = {id(x) for pair in self.critic for x in pair}
        for own in (True, False):
            gradients = [p.grad for p in self.parameters if (id(p) in critic) == own]
            length = sum((g**2).sum() for g in gradients) ** 0.5
            self.cut.append(length.item() > self.args.max_grad_norm)
            for gradient in gradients:
                gradient *= min(1.0, self.args.max_grad_norm / length.item())
        self.adam.step()
        return {"policy_loss": -gain.item(), "entropy": entropy.item(), "value_loss": error.item()}


def scaled_by(scale, s):
    """What a `Scale` does now, as a function for one seed."""
    mean, std = scale.mean[s, 0].clone(), scale.var[s, 0].sqrt()
    return lambda x: (x - mean) / std


@pytest.mark.parametrize("discrete", [True, False])
def test_two_updates_are_those_by_hand(float64, discrete):
    flags = dict(max_grad_norm=0.7, lr=0.01, entropy=0.1, clip=0.1, huber=0.7)
    args, team = made(discrete, epochs=2, gamma=0.9, gae_lambda=0.8, **flags)
    slow = [ByHand(team, s, args) for s in range(S)]
    adam = torch.optim.Adam(team.parameters(), args.lr, eps=1e-5, fused=True)
    generators = streams()
    for _ in range(2):
        rollout, orders = random_rollout(team), mappo.draw_orders(generators, M, args)
        assert (orders.sort(-1).values == torch.arange(M)).all() and len(orders) == 2
        scales = [(scaled_by(team.actor.scale, s), scaled_by(team.critic[0], s)) for s in range(S)]
        seen = team.actor.scale.seen.clone()
        logs = mappo.update(team, adam, rollout, orders, args)
        for s in range(S):
            own = mappo.Rollout(*(field[s] for field in rollout))
            estimates = slow[s].estimate(own, scales[s][1])
            flat = mappo.Rollout(*(field.flatten(0, 1) for field in own))
            for order in orders[:, s].tolist():
                for steps in (order[:4], order[4:8], order[8:12], order[12:]):
                    wanted = slow[s].minibatch(steps, flat, estimates, scales[s])
            found = {name: value[s].item() for name, value in logs.items()}
            assert found == pytest.approx(wanted, abs=1e-9)
            assert team.moments[s].tolist() == pytest.approx(slow[s].moments, abs=1e-9)
        assert (team.actor.scale.seen == seen + M * N).all()
    for s in range(S):
        parts = leaves(team.actor.body, s) + leaves(team.critic, s)
        found = [x for pair in parts for x in pair]
        found += [] if discrete else [team.actor.free_log_std[s, 0]]
        for one, other in zip(found, slow[s].parameters, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-9)
        assert 0 < sum(slow[s].cut) < len(slow[s].cut)


@pytest.mark.parametrize("discrete", [True, False])
def test_a_snapshots_network_is_the_actors(tmp_path, discrete):
    """In numpy, through the file; its weights are rounded."""
    args, team = made(discrete, env="smac", task="3m")
    rows = [{"step": step, "seed": seed} for step in (0, 64) for seed in (5, 6)]
    rows[-1]["return"] = 2.5
    run = SimpleNamespace(device=torch.device("cpu"), seeds=[5, 6], script="mappo", folder=tmp_path)
    run.args, run.rows = args, rows
    save_snapshots(run, team.actor)
    names = {path.name for path in (tmp_path / "snapshots").iterdir()}
    assert names == {"64-seed5.npz", "64-seed6.npz"}
    file = np.load(tmp_path / "snapshots" / "64-seed6.npz")
    info = json.loads(str(file["info"]))
    assert (info["steps"], info["seed"], info["return"], info["win_rate"]) == (64, 6, 2.5, None)
    assert info["inputs"] == ["obs", *["last_action"] * discrete, "agent_id"]
    x = torch.randn(S, 50, N, team.actor.scale.mean.shape[-1])
    out = team.actor(x, torch.ones(S, 50, N, A).bool())[1].detach()
    layers = [[torch.tensor(file[f"{part}{k}"]) for part in ("weight", "bias")] for k in range(3)]
    assert all(weight.dtype == torch.float16 for weight, _ in layers)
    y = forward([[part.float() for part in layer] for layer in layers], x[1])
    y = y.log_softmax(-1) if discrete else y.tanh()
    assert (y - out).abs().max() < 0.02
    if not discrete:
        assert np.allclose(file["log_std"], team.actor.log_std[1, 0].detach(), atol=1e-2)


def test_which_policies_become_behaviours():
    wins = enumerate([0, 0.1, 0.2, 0.45, 0.7, 0.9])
    rows = [{"step": 10 * k, "sampled_return": -k, "sampled_win_rate": w} for k, w in wins]
    replay = {f"replay-{k}.npz": 10 * k for k in range(4)}
    assert choose_behaviours(rows) == {"expert.npz": 50, "medium.npz": 30} | replay
    rows = [{"step": k, "sampled_return": 100.0 + k} for k in range(101)]  # it never wins
    chosen = choose_behaviours(rows)
    assert len(chosen) == 12 and [chosen[f"replay-{k}.npz"] for k in (0, 3, 9)] == [0, 17, 50]


def test_a_matrix_game_is_solved(tmp_path):
    words = "--env matrix --num-envs 32 --rollout 4 --hidden 32 --lr 1e-3 --eval-episodes 2 "
    words += "--num-seeds 5 --steps 5000 --eval-every 2500 --save-snapshots --task m-ne"
    folder = tmp_path / "run"
    summary = mappo.main(mappo.parse([*words.split(), "--out-dir", str(folder)]))
    assert summary["return"]["per_seed"] == [20] * 5
    assert len(list((folder / "snapshots").iterdir())) == 15
    last, expert = folder / "snapshots" / "5120-seed0.npz", folder / "behaviour" / "expert.npz"
    assert last.read_bytes() == expert.read_bytes()


def test_games_that_restarts_would_never_let_end_are_refused(tmp_path):
    flags = "--env bridge --num-envs 4 --rollout 40 --eval-every 200 --out-dir"
    with pytest.raises(ValueError, match="--eval-every .* 320"):
        mappo.main(mappo.parse([*flags.split(), str(tmp_path / "run")]))
