"""TD3+BC, ICQL and IOMAR: whole updates and the search against slow loops, and presets."""

import copy
import csv
import math

import pytest
import torch
from by_hand import begins_well, draws_well, follow, one, same, step, stir, streams
from conftest import load_script

td3 = load_script("td3_bc")
S, N, A, B = 2, 3, 2, 5
STARTS = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8])  # two episodes, of 5 and 3 steps
KINDS = {
    "ITD3+BC": dict(bc=0.7),
    "MATD3+BC": dict(bc=0.7, mixing=True),
    "ICQL": dict(bc=0.0, cql=0.6),
    "IOMAR": dict(bc=0.0, cql=0.6, omar=0.8),
    "everything but a mixer": dict(bc=0.7, cql=0.6, omar=0.8),
}


def made(**flags):
    """Two episodes, arguments, and teams of S seeds whose target networks have moved away."""
    torch.manual_seed(0)
    R = 10
    obs, state, reward = torch.randn(R, N, 5), torch.randn(R, 6), torch.randn(R)
    action, done = 2 * torch.rand(R, N, A) - 1, torch.zeros(R)
    done[4] = 1
    sizes = dict(hidden=16, batch_size=B, samples=2, candidates=5, elites=2, rounds=3)
    args = td3.Args(**sizes | flags)
    data = td3.Data(obs, state, action, reward, done, STARTS)
    team = td3.Team(data, args, streams())
    stir(team)
    return data, args, team


class Hand:
    """The losses of one seed, a step and an agent at a time."""

    def __init__(self, team, data, noise, args, s):
        self.team, self.data, self.noise, self.args, self.s = team, data, noise, args, s
        self.rows = noise.rows[s].tolist()

    def act(self, policies, row, i):
        return one(policies.body, self.s * N + i, self.data.obs[row, i]).tanh()

    def own(self, critic, row, i, action):
        x = torch.cat([self.data.obs[row, i], action])
        return one(critic.local, self.s * N + i, x)[0]

    def values(self, critic, row, actions):
        """Of the agents, or of the team."""
        local = [self.own(critic, row, i, actions[i]) for i in range(N)]
        if not self.args.mixing:
            return local
        out = one(critic.mixer, self.s, self.data.state[row])
        return [sum(out[i].abs() * local[i] for i in range(N)) + out[N]]

    def targets(self, k):
        """Eq. 2 for step k of the minibatch."""
        policies, critics = self.team.targets
        row, actions = self.rows[k], []
        for i in range(N):
            noise = self.args.noise * self.noise.target[self.s, i, k]
            limit = self.args.noise_clip
            noise = torch.tensor([max(-limit, min(limit, x)) for x in noise.tolist()])
            actions.append((self.act(policies, row + 1, i) + noise).clamp(-1, 1))
        first, second = (self.values(critic, row + 1, actions) for critic in critics)
        go_on = self.args.gamma * (1 - self.data.done[row])
        return [self.data.reward[row] + go_on * min(a, b).detach() for a, b in zip(first, second)]

    def drawn(self, k, i):
        """The actions that Eq. 3 looks at, and their log-densities."""
        row, normal = self.rows[k], torch.distributions.Normal(0.0, self.args.noise)
        for j in range(self.args.samples):
            yield self.noise.uniform[self.s, i, k, j], A * math.log(0.5)
            for kind, at in enumerate((row, row + 1)):
                shift = self.args.noise * self.noise.near[kind, self.s, i, k, j]
                action = (self.act(self.team.policies, at, i) + shift).clamp(-1, 1).detach()
                yield action, normal.log_prob(shift).sum()

    def critic_loss(self):
        total = 0.0
        for k, row in enumerate(self.rows):
            y = self.targets(k)
            for critic in self.team.critics:
                values = self.values(critic, row, self.data.action[row])
                total += sum((a - b) ** 2 for a, b in zip(y, values)) / (B * len(y))
                for i in range(N) if self.args.cql else ():
                    high = [self.own(critic, row, i, a) - p for a, p in self.drawn(k, i)]
                    low = self.own(critic, row, i, self.data.action[row, i])
                    gap = torch.stack(high).exp().sum().log() - low
                    total += self.args.cql * gap / (B * N)
        return total

    def search(self, k, i, mine):
        """Eq. 6, with every candidate's value asked for one by one."""

        def value(action):
            return self.own(self.team.critics[0], self.rows[k], i, action).item()

        mean, std, elites = torch.zeros(A), 2.0, []
        for normal in self.noise.search[:, self.s, i, k]:
            candidates = [(mean + std * x).clamp(-1, 1) for x in normal]
            elites = sorted(candidates + elites, key=value)[-self.args.elites :]
            mean, std = torch.stack(elites).mean(0), torch.stack(elites).std(0) + 1e-6
        return max([*elites, mine], key=value)

    def policy_loss(self):
        args, critic, total = self.args, self.team.critics[0], 0.0
        mine = [[self.act(self.team.policies, row, i) for i in range(N)] for row in self.rows]
        q = [self.values(critic, row, actions) for row, actions in zip(self.rows, mine)]
        for n in range(len(q[0])):
            size = sum(abs(values[n].item()) for values in q) / B
            scale = 2.5 / size if args.bc else 1.0
            total -= (1 - args.omar) * scale * sum(values[n] for values in q) / B
        for k, row in enumerate(self.rows):
            for i, action in enumerate(mine[k]):
                near = args.bc * ((action - self.data.action[row, i]) ** 2).sum()
                total += (near if args.bc else 0.001 * (action**2).mean()) / B
                if args.omar:
                    best = self.search(k, i, action.detach())
                    total += args.omar * ((action - best) ** 2).mean() / B
        return total


@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("kind", KINDS)
def test_whole_updates_by_hand(float64, kind):
    """The policies, and all copies, may move in some updates only."""
    sizes = dict(lr=0.01, tau=0.1, max_grad_norm=5.0, noise=0.4, noise_clip=0.3)
    data, args, team = made(**sizes, **KINDS[kind])
    other = copy.deepcopy(team)
    adam = torch.optim.Adam(team.parameters(), args.lr, fused=True)
    generators = streams()
    parts = {"critics": other.critics, "policies": other.policies}
    stock = {name: torch.optim.Adam(part.parameters(), args.lr) for name, part in parts.items()}
    longer, ended = [], []
    for improve in (True, False, True):
        noise = td3.draw_noise(generators, data, args)
        hands = [Hand(other, data, noise, args, s) for s in range(S)]
        logs = td3.update_critics(team, adam, data, noise, args)
        loss = torch.stack([hand.critic_loss() for hand in hands])
        assert torch.allclose(logs["q_loss"], loss, rtol=1e-9)
        longer += step(stock["critics"], other.critics, loss, args.max_grad_norm)
        if improve:
            logs = td3.update_policies(team, adam, data, noise, args)
            loss = torch.stack([hand.policy_loss() for hand in hands])
            assert torch.allclose(logs["policy_loss"], loss, rtol=1e-9)
            longer += step(stock["policies"], other.policies, loss, args.max_grad_norm)
            networks = [*other.policies.parameters(), *other.critics.parameters()]
            follow(other.targets.parameters(), networks, args.tau)
        assert same(team, other)
        ended.append(data.done[noise.rows])
    assert any(longer) and not all(longer) and torch.cat(ended).any()
    assert (args.noise * noise.target).abs().max() > args.noise_clip


def test_the_search_forgets_nothing(float64):
    """a* is as good as the first candidates, as pi(o), and as what fewer rounds find, or better."""
    data, args, team = made(omar=0.9, rounds=4, batch_size=50)
    noise = td3.draw_noise(streams(), data, args)
    batch, critic = td3.gather(data, noise.rows), team.critics[0]
    mine = team.policies(batch.obs).detach()
    best = td3.search(critic, batch.obs, mine, noise.search, args.elites)
    value = critic(batch.obs, best, batch.state)
    first = critic.many(batch.obs, (2 * noise.search[0]).clamp(-1, 1))
    later = td3.search(critic, batch.obs, mine, noise.search[:2], args.elites)
    assert (value >= first.amax(-1)).all() and (value >= critic(batch.obs, mine, batch.state)).all()
    assert (value >= critic(batch.obs, later, batch.state)).all()
    assert best.abs().max() <= 1 and (best - mine).abs().max() > 0.1


def test_everything_begins_as_it_should(float64):
    data, args, _ = made(cql=1.0, omar=0.5)
    team = td3.Team(data, args, streams())
    begins_well(td3.Linear, team.policies)
    assert same(team.targets, torch.nn.ModuleList([team.policies, team.critics]))
    draws_well(lambda *given: td3.draw_noise(*given).rows, data, args)
    noise = td3.draw_noise(streams(), data, args)
    alone = td3.draw_noise(streams([1]), data, args)
    assert torch.equal(noise.target[1], alone.target[0])
    assert torch.equal(noise.search[:, 1], alone.search[:, 0])
    assert torch.equal(noise.near[:, 1], alone.near[:, 0])
    assert noise.uniform.min() < -0.9 and noise.uniform.max() > 0.9
    assert abs(noise.uniform.mean()) < 0.1 and noise.uniform.abs().max() <= 1
    for normal in (noise.target, noise.near, noise.search):
        assert abs(normal.std() - 1) < 0.1 and abs(normal.mean()) < 0.1
    args.cql = args.omar = 0.0
    noise = td3.draw_noise(streams(), data, args)
    assert noise.uniform.numel() == noise.near.numel() == noise.search.numel() == 0


def test_minibatches_and_distance_fit_the_method():
    args = td3.parse(["--env", "reacher"])
    assert (args.bc, args.batch_size, args.samples) == (10, 256, 10)
    args = td3.parse("--env reacher --bc 0 --cql 1".split())
    assert (args.bc, args.batch_size, args.samples) == (0, 64, 4)
    assert td3.parse("--env polynomial --cql 1".split()).samples == 10


def test_what_it_cannot_learn_is_refused():
    with pytest.raises(ValueError, match="continuous"):
        td3.parse(["--env", "bridge"])
    with pytest.raises(ValueError, match="--mixing"):
        td3.parse(["--mixing", "--cql", "1"])


def test_policies_move_in_every_second_update(tmp_path):
    words = "--env polynomial --num-seeds 1 --steps 4 --eval-every 1 --eval-episodes 0"
    td3.main(td3.parse([*words.split(), "--out-dir", str(tmp_path / "run")]))
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        losses = [row["policy_loss"] for row in csv.DictReader(file) if row["step"] != "0"]
    assert losses[0] == losses[1] != losses[2] == losses[3]


def test_it_comes_near_the_peak(tmp_path):
    words = "--env polynomial --dataset peak-0.2 --num-seeds 2 --steps 300 --eval-every 300"
    summary = td3.main(td3.parse([*words.split(), "--out-dir", str(tmp_path / "run")]))
    assert summary["return"]["mean"] > summary["dataset_return"] + 0.1


@pytest.mark.long
def test_on_the_reacher_learning_alone_is_worse_than_learning_together(tmp_path):
    """As in MOMA-PPO's Table 4, where no agent sees the other's joint: ITD3+BC < MATD3+BC < 0.9."""
    returns = []
    for flags in ([], ["--mixing"]):
        folder = tmp_path / f"run{len(flags)}"
        words = ["--env", "reacher", "--task", "independent", "--out-dir", str(folder), *flags]
        returns.append(td3.main(td3.parse(words))["normalized_return"]["mean"])
    assert returns[0] < returns[1] - 0.1 and returns[1] < 0.9
