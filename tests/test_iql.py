"""IQL and MAIQL: whole updates against slow loops, what players are, practice, and who agrees."""

import copy
import math

import pytest
import torch
from by_hand import begins_well, draws_well, follow, one, same, step, stir, streams
from conftest import load_script

import envs
from data import layout, load

iql = load_script("iql")
S, K, A, B = 2, 3, 4, 6
STARTS = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8])  # two episodes, of 5 and 3 steps


def made(discrete=True, **flags):
    """Two episodes, arguments, and teams of S seeds whose target networks have moved away."""
    torch.manual_seed(0)
    R = 10
    obs, state, reward = torch.randn(R, K, 5), torch.randn(R, 6), torch.randn(R)
    avail, action = None, torch.rand(R, K, 2) - 0.5
    if discrete:
        avail = torch.rand(R, K, A) < 0.6
        avail[..., 1] = True
        action = torch.multinomial(avail.flatten(0, 1).double(), 1).view(R, K)
    done = torch.zeros(R)
    done[4] = 1
    args = iql.Args(hidden=8, batch_size=B, **flags)
    data = iql.Data(obs, state, avail, action, reward, done, STARTS)
    team = iql.Team(data, args, streams())
    begins_well(iql.Linear, team.policies)
    stir(team)
    return data, args, team


# ---------------------------------------------------------------- an update by hand
class Hand:
    """The losses of one seed, a step and a player at a time."""

    def __init__(self, team, data, args, s):
        self.team, self.data, self.args, self.s = team, data, args, s

    def mixed(self, mixer, local, context):
        if self.args.team != "mixed":
            return local
        out = one(mixer.net, self.s, context)
        return [sum(out[i] * local[i] for i in range(K)) + out[K]]

    def v(self, row):
        network, mixer = self.team.value
        obs, state = self.data.obs[row], self.data.state[row]
        local = [one(network, self.s * K + i, obs[i])[0] for i in range(K)]
        return self.mixed(mixer, local, state)

    def taken(self, row):
        action = self.data.action[row]
        return action if self.data.avail is None else torch.eye(A)[action]

    def local(self, network, row):
        x = torch.cat([self.data.obs[row], self.taken(row)], -1)
        return [one(network, self.s * K + i, x[i])[0] for i in range(K)]

    def q(self, mixer, local, row):
        context = torch.cat([self.data.state[row], self.taken(row).flatten()])
        return self.mixed(mixer, local, context)

    def advantage(self, row):
        twins, mixer = self.team.target
        both = [self.local(network, row) for network in twins]
        lower = [min(a, b) for a, b in zip(*both)]
        return [q.detach() - v for q, v in zip(self.q(mixer, lower, row), self.v(row))]

    def value_loss(self, rows):
        total = 0.0
        for row in rows:
            gaps = self.advantage(row)
            for gap in gaps:
                weight = self.args.expectile if gap > 0 else 1 - self.args.expectile
                total += weight * gap**2 / (B * len(gaps))
        return total

    def critic_loss(self, rows):
        twins, mixer = self.team.critic
        total = 0.0
        for row in rows:
            for network in twins:
                q = self.q(mixer, self.local(network, row), row)
                for mine, later in zip(q, self.v(row + 1)):
                    future = self.args.gamma * (1 - self.data.done[row]) * later.detach()
                    total += (self.data.reward[row] + future - mine) ** 2 / (B * len(q))
        return total

    def weights(self, row):
        return [min(math.exp(self.args.temperature * a), 100.0) for a in self.advantage(row)]

    def policy_loss(self, rows):
        total = 0.0
        for row in rows:
            weights = self.weights(row)
            for i in range(K):
                total -= weights[i % len(weights)] * self.log_prob(row, i) / B
        return total

    def log_prob(self, row, i):
        policies, action = self.team.policies, self.data.action[row, i]
        out = one(policies.body, self.s * K + i, self.data.obs[row, i])
        if self.data.avail is not None:
            return out[action] - torch.logsumexp(out[self.data.avail[row, i]], 0)
        spread = (policies.log_spread[i, 0] + out[2:]).clamp(-6, 0).exp()
        return torch.distributions.Normal(out[:2], spread).log_prob(action).sum()


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("kind", ["mixed", "independent"])
@pytest.mark.parametrize("discrete", [True, False])
def test_whole_updates_by_hand(float64, kind, discrete):
    """V moves first, and the policies and Q see it moved; last, Q's copies follow."""
    sizes = dict(lr=0.01, tau=0.1, max_grad_norm=8.0, temperature=30.0)
    data, args, team = made(discrete, team=kind, **sizes)
    other = copy.deepcopy(team)
    adam, generators = iql.optimizer(team, args), streams()
    hands = [Hand(other, data, args, s) for s in range(S)]
    parts = {"value": other.value, "policies": other.policies, "critic": other.critic}
    stock = {name: torch.optim.Adam(part.parameters(), args.lr) for name, part in parts.items()}
    longer, weights, ended = [], [], []
    for _ in range(2):
        rows = iql.draw_rows(generators, data, args)
        logs = iql.update(team, adam, data, rows, args)
        logs = dict(zip(("policies", "critic", "value"), logs.values()))
        for name, part in parts.items():
            loss_of = {"value": Hand.value_loss, "critic": Hand.critic_loss}
            loss_of = loss_of.get(name, Hand.policy_loss)
            loss = torch.stack([loss_of(hand, r) for hand, r in zip(hands, rows.tolist())])
            longer += step(stock[name], part, loss, args.max_grad_norm)
            assert torch.allclose(logs[name], loss, rtol=1e-9)
        follow(other.target.parameters(), other.critic.parameters(), args.tau)
        assert same(team, other)
        weights += sum([hands[0].weights(row) for row in rows[0].tolist()], [])
        ended.append(data.done[rows])
    assert any(longer) and not all(longer) and torch.cat(ended).any()
    assert max(weights) == 100 and 0 < min(weights) < 1


def test_temperature_0_clones(float64):
    data, args, team = made()
    batch = iql.gather(data, iql.draw_rows(streams(), data, args))
    log_pi = team.policies.log_prob(team.policies(batch.obs, batch.avail), batch.action)
    assert torch.allclose(iql.policy_loss(team, batch, 0.0), -log_pi.sum(1).mean(1), atol=1e-12)


def test_everything_begins_as_it_should(float64):
    data, args, _ = made(discrete=False)
    team = iql.Team(data, args, streams())
    begins_well(iql.Linear, team.policies)
    assert same(team.target, team.critic)
    spread = data.action[STARTS].std(0, correction=0)
    assert torch.allclose(team.policies.log_spread[:, 0], spread.log())
    draws_well(iql.draw_rows, data, args)


def test_actions_are_drawn_as_the_policies_say(float64):
    data, _, team = made()
    obs, avail = data.obs.transpose(0, 1).expand(S, -1, -1, -1), data.avail.transpose(0, 1)
    log_pi = team.policies(obs, avail)
    assert torch.allclose(log_pi.exp().sum(-1), torch.ones(S, K, 10))
    assert (log_pi.exp()[:, ~avail] == 0).all()
    assert torch.equal(team.policies.sample(log_pi), log_pi.argmax(-1))
    clocks = torch.empty(4000, S, K, 10, A).exponential_()
    drawn = torch.nn.functional.one_hot(team.policies.sample(log_pi, clocks), A).double().mean(0)
    assert (drawn - log_pi.exp()).abs().max() < 0.04
    _, _, team = made(discrete=False)
    out, normal = team.policies(obs, None), torch.randn(S, K, 10, 2)
    mean, log_std = out.chunk(2, -1)
    assert torch.equal(team.policies.sample(out), mean)
    assert torch.allclose(team.policies.sample(out, normal), mean + log_std.exp() * normal)


# ---------------------------------------------------------------- players
def test_players_decide_for_their_agents():
    avail = torch.rand(5, 3, A) < 0.6
    for K in (1, 3):
        joint = iql.joint_avail(avail, K)
        numbers = torch.arange(joint.shape[-1]).expand(5, K, -1).movedim(-1, 0)
        agents = iql.split(numbers, avail, 3)  # (A^G, 5, 3)
        assert torch.equal(iql.join(agents, avail, K), numbers)
        can = avail.expand(len(agents), -1, -1, -1).gather(-1, agents[..., None])[..., 0]
        assert torch.equal(can.unflatten(-1, (K, -1)).all(-1).movedim(0, -1), joint)
        action = torch.randn(5, 3, 2)
        assert torch.equal(iql.split(iql.join(action, None, K), None, 3), action)
    assert iql.join(torch.tensor([1, 0, 2]), avail, 1).tolist() == [1 * 16 + 0 * 4 + 2]
    assert iql.joint_avail(None, 1) is None


def test_one_player_sees_everything_and_rewards_are_scaled():
    dataset = load("reacher", "independent", "expert-mix", episodes=20)
    words = "--env reacher --task independent --no-normalize --scale-rewards --team".split()
    data, encode, _ = iql.arrange(dataset, iql.parse([*words, "central"]))
    raw = layout.rows(dataset)
    assert torch.equal(data.obs[:, 0], raw["obs"].flatten(1))
    assert torch.equal(data.action[:, 0], raw["actions"].flatten(1))
    returns = dataset.returns
    scaled = 1000 * raw["reward"] / (returns.max() - returns.min())
    assert torch.allclose(data.reward, scaled)


# ---------------------------------------------------------------- fine-tuning
def practised(env, task, dataset, team="mixed", rounds=3):
    """`Practice` after some rounds, the arguments, and a seed's own rows, (S, own)."""
    recorded = load(env, task, dataset, episodes=20 if env == "reacher" else 0)
    args = iql.Args(env=env, task=task, team=team, hidden=8, num_seeds=S)
    data, encode, see = iql.arrange(recorded, args)
    players = iql.player(iql.Team(data, args, streams()).policies, encode)
    practice, generators = iql.Practice(recorded, data, see, args, 10 * rounds), streams()
    for _ in range(rounds):
        practice.play(players, generators)
    return practice, args, [steps[len(data.steps) :] for steps in practice.steps]


@pytest.mark.parametrize("team", ["mixed", "central"])
def test_what_is_practised_is_what_the_true_game_does(team):
    """Each step of a reacher leads on as the game itself does, the first from recorded states."""
    practice, args, own = practised("reacher", "independent", "expert-mix", team)
    data, E, M = practice.data, practice.shape[1], len(practice.data.steps)
    assert [len(rows) for rows in own] == [30 * E] * 2 and M <= 30 * E < 1.1 * M  # half of each
    assert len(torch.cat([data.steps, *own]).unique()) == M + 60 * E
    raw = layout.rows(load("reacher", "independent", "expert-mix", episodes=20))
    std, mean = torch.std_mean(raw["state"], 0)
    states = data.state * std.clamp(min=1e-3) + mean
    begin = torch.cat([rows[:E] for rows in own])  # the first steps of the first games
    assert (states[begin][:, None] - raw["state"]).abs().amax(-1).amin(1).max() < 0.01
    rows = torch.cat([rows[::5] for rows in own])
    true = envs.make("reacher", "independent", num_envs=len(rows))
    true.set_state(states[rows])
    action = data.action[rows].view(len(rows), 2, 1)
    obs, reward, _, _, _ = true.step(action)
    assert action.abs().max() <= 1 and action.std() > 0.01
    assert torch.allclose(reward, data.reward[rows], atol=1e-4)
    std, mean = torch.std_mean(raw["obs"], 0, correction=0)
    seen = (obs - mean) / std.clamp(min=1e-3)
    assert torch.allclose(seen.flatten(1), data.obs[rows + 1].flatten(1), atol=1e-2)


@pytest.mark.parametrize("team", ["mixed", "central"])
def test_practice_in_a_game_of_one_step(team):
    practice, _, own = practised("matrix", "m-ne", "balanced", team, rounds=40)
    rows = torch.cat(own)
    both = practice.data.action[rows]
    if team == "central":
        both = torch.cat([both // 3, both % 3], -1)
    assert len(both.unique(dim=0)) == 9 and practice.data.done[rows].all()
    payoff = practice.game.payoff[both[:, 0], both[:, 1]]
    assert torch.equal(practice.data.reward[rows], payoff)


def test_no_step_follows_the_end_of_a_game(monkeypatch):
    """A reacher has no end of its own, so the first game ends in each round after four steps."""
    body, count = envs.mamujoco.MultiAgentMujoco, []
    real = body.step
    load("reacher", "independent", "expert-mix", episodes=20)  # not with the ends made up here

    def ending(self, actions):
        obs, reward, ended, cut, info = real(self, actions)
        count.append(1)
        ended[0] |= len(count) % 10 >= 4
        return obs, reward, ended, cut, info

    monkeypatch.setattr(body, "step", ending)
    practice, _, own = practised("reacher", "independent", "expert-mix")
    E = practice.shape[1]
    assert [len(rows) for rows in own] == [30 * E - 3 * 6, 30 * E]
    assert practice.data.done[own[0]].sum() == 3 and not practice.data.done[own[1]].any()


def test_recorded_and_own_steps_are_equally_likely():
    practice, args, own = practised("reacher", "independent", "expert-mix")
    M, E = len(practice.data.steps), practice.shape[1]
    practice.steps[1] = practice.data.steps
    args.batch_size = 20_000
    rows = practice.draw(streams(), practice.data, args)
    share = torch.isin(rows[0], own[0]).double().mean()
    assert (
        abs(share - 30 * E / (M + 30 * E)) < 0.02 and torch.isin(rows[0], practice.steps[0]).all()
    )
    assert torch.isin(rows[1], practice.data.steps).all()


def test_practice_needs_a_game_that_takes_states():
    for env in ("bridge", "halfcheetah", "smac"):
        with pytest.raises(ValueError, match="--finetune"):
            iql.parse(["--env", env, "--finetune", "1"])


# ---------------------------------------------------------------- who agrees
@pytest.mark.parametrize("team, low, high", [("central", 1, 1), ("mixed", 0, 0.4)])
def test_who_decides_for_all_agrees(tmp_path, team, low, high):
    words = f"--team {team} --num-seeds 3 --steps 200 --lr 3e-3 --eval-every 200".split()
    summary = iql.main(iql.parse([*words, "--out-dir", str(tmp_path / "run")]))
    assert low <= summary["return"]["mean"] <= high
