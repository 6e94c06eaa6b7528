"""MADDPG + CQL with proximal joint-action prioritisation, PJAP (Tilbury et al., ICML 2024 ARLET, arXiv 2407.01343).

The problem. N agents with continuous actions learn from a fixed dataset. MADDPG moves each agent's policy uphill on a
centralised Q-function, with the teammates' actions taken from the data: the best response under data (BRUD). It answers
what the teammates did, which need not be what their policies do by now. Where the two differ, agents step past each
other, and no new data ever puts that right.

The idea. Change nothing but which windows of the data are drawn. A window is drawn often if its recorded joint actions
are close to what the policies would do there, rarely otherwise. Then the recorded teammates are a good stand-in for the
real ones, in the policies' loss above all. CQL keeps the Q-function low at joint actions that nobody recorded.

Equations. mu is the policy that all agents share, o_i agent i's view and its number, s the state, a the joint action,
Q_1 and Q_2 two critics; a dash marks slowly moving copies. A window is L successive rows of one episode.
  Eq. 6   rho      = max( exp(-(k d)^2), floor );   P(window) ~ rho^exponent;   k grows to its full value
          d        = mean over the window's steps, agents and entries of |a_recorded - mu'(o)|
          y        = r + gamma (1 - terminated) min_c Q'_c(s', mu'(o'))
          L(Q_c)   = 1/2 E (y - Q_c(s,a))^2 + cql E_i [ log sum_m exp( Q_c(s,a_m) - log p_i(a_m) ) - Q_c(s,a) ]
          a_m      a third each: uniform; mu(o_t) + noise; mu(o_t+1) + noise. p_i: density of agent i's part of a_m
  Eq. 4   L(mu)    = E_i [ -min_c Q_c(s, (mu(o_i), a_-i)) + reg |mu(o_i)|^2 / A ]          a_-i as recorded: BRUD

Commands (for what they give see the README):
  python algorithms/maddpg_cql_pjap.py                               2-agent HalfCheetah, good data, PJAP
  python algorithms/maddpg_cql_pjap.py --no-pjap                     the baseline: every window equally likely
  python algorithms/maddpg_cql_pjap.py --dataset good-medium         two kinds of data, of which one should win
  ... --steps 500000 --num-seeds 10 --batch-size 64 --ood-actions 10 --eval-every 5000 --no-normalize      the paper's

Where paper and code disagree, "code" is the authors' as submitted (June 2024). Choices made here:
  1. d is a mean over an agent's entries (code), not a sum (paper): k = 4 here is 16 d^2, and 1.78 d^2 in the paper's
     alpha. metrics.csv has both. It is taken to the target policy, as it was before the update (code).
  2. k grows linearly over the first 30 % of the updates (code: 150,000 of the paper's 500,000). The paper has no ramp.
  3. Refreshed are the priorities of the windows just trained on (code); --refresh N adds N uniformly drawn ones.
  4. Windows never straddle two episodes (in the code they may). The last of the L rows may be what was seen after an
     episode's last step, so that terminal steps are learned too; it counts in no mean over actions. An episode of
     fewer rows than L has no window.
  5. A time limit is not the end: Q looks beyond it. In OG-MARL's data it is: --time-limit-terminates.
  6. Target networks start as copies; in the code most likely from weights of their own. The critics start apart.
  7. RMSProp as in Sonnet, which adds 1e-10 to the mean square under the root; here its root is added behind it, 1e-5.
  8. Each distinct joint action is evaluated once: in CQL all agents' actions are replaced, so the agents' terms differ
     in p_i only. The density of noise is that before clipping, and of uniform actions that of one agent's (code).
  9. Both losses look at the networks as they were before the update (code).
 10. By default a batch of 16 windows and 4 actions of each kind in CQL, in place of 64 and 10, and fewer steps: a
     laptop does that in minutes. For the same reason views and states enter in units of the dataset's mean and spread.
     The code feeds them raw (--no-normalize), with the position x, which grows to hundreds, among them: in as few
     updates the policy then comes less close to the data, and its return swings from one evaluation to the next.

Speed (`python tests/bench.py maddpg`), CPU time of an update on one core of a shared server: 27 ms by default for one
seed and 68 ms for three; 155 ms and 478 ms at the paper's size, where OG-MARL's PyTorch version takes 292 ms for one.
Drawing from a million windows and refreshing 64 of them are 0.2 ms of it.

Seeds differ in all that is random here, but are evaluated in one environment: how a seed's games begin depends on how
many seeds run beside it.

Shapes: S seeds, L rows of a window, B windows, M = (L - 1) B transitions, K joint actions, N agents, A entries of an
agent's action, O observation, I inputs, D state, R rows (observations) of the dataset, W windows, E episodes.
"""

import copy
import functools
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import tyro
from gymnasium.spaces import Box

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `data` and `envs` stand beside this file's folder
import data as datasets
import envs
from data import runs

BLOCK = 128  # windows whose priorities share a partial sum
CACHE = 2**18  # numbers that one piece of the critics' work should hold on a CPU, so that it stays in the cache
SAMPLE = 2000  # windows, evenly spaced, that stand for the whole dataset when its distance is measured


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "halfcheetah"  # the environment: halfcheetah, reacher or ant
    task: str = ""  # its task; by default the environment's first
    dataset: str = "good"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 3  # how many seeds train, all at once
    steps: int = 5000  # updates
    eval_every: int = 1000  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 4  # games per seed and evaluation
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # compile the losses with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/maddpg_cql_pjap
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    pjap: bool = True  # draw windows by their priorities; with --no-pjap all are equally likely
    steepness: float = 4.0  # k: how fast priorities fall with the distance
    ramp: float = 0.3  # the share of the updates over which k grows to its full value
    floor: float = 0.001  # the smallest priority, before the exponent
    exponent: float = 0.99  # of the priorities
    refresh: int = 0  # further windows, drawn uniformly, whose priorities each update refreshes
    cql: float = 5.0  # weight of the conservative term
    ood_actions: int = 4  # joint actions of each of the three kinds in the conservative term
    ood_noise: float = 0.3  # standard deviation of the noise on the policies' actions there
    action_reg: float = 1e-3  # weight of the squared actions in the policy's loss
    gamma: float = 0.99  # discount
    time_limit_terminates: bool = False  # count a time limit as the end, as OG-MARL's data do
    # --- the optimisation
    window: int = 20  # rows of a window
    batch_size: int = 16  # windows per update
    policy_hidden: int = 64  # units of the policy's layer and of its memory
    critic_hidden: int = 128  # units of the critics' two layers
    policy_lr: float = 3e-4  # RMSProp's step size for the policy
    critic_lr: float = 1e-3  # RMSProp's step size for the critics
    tau: float = 0.005  # how far the target networks move in an update
    normalize: bool = True  # feed views and states in units of the dataset's mean and standard deviation


def preset(env):
    """What differs from HalfCheetah's values, above, in the other environments."""
    return {"reacher": dict(dataset="expert-mix"), "ant": dict(dataset="medium")}.get(env, {})


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """S independent linear layers as one batched product; seed s is initialised by its own generator."""

    def __init__(self, inputs, outputs, generators):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        start = [torch.empty(inputs + 1, outputs).uniform_(-bound, bound, generator=g) for g in generators]
        self.weight = nn.Parameter(torch.stack(start)[:, :-1].clone())  # (S, in, out)
        self.bias = nn.Parameter(torch.stack(start)[:, -1:].clone())  # (S, 1, out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (S, B, out)


class GRU(nn.Module):
    """S independent gated recurrent units with the weights' layout and equations of nn.GRU, but batched over seeds."""

    def __init__(self, inputs, hidden, generators):
        super().__init__()
        bound = hidden**-0.5
        start = [torch.empty(inputs + hidden + 2, 3 * hidden).uniform_(-bound, bound, generator=g) for g in generators]
        split = torch.stack(start).split([inputs, hidden, 1, 1], 1)  # columns: reset, update, new
        self.input, self.state, self.input_bias, self.state_bias = (nn.Parameter(part.clone()) for part in split)

    def forward(self, x, h):
        """Run over sequences x (S, L, B, I) from h (S, B, H): (S, L, B, H)."""
        S, L, B, _ = x.shape
        gates = torch.baddbmm(self.input_bias, x.flatten(1, 2), self.input).view(S, L, B, -1).unbind(1)
        states, H = [], h.shape[-1]
        for gate in gates:
            recurrent = torch.baddbmm(self.state_bias, h, self.state)  # (S, B, 3H)
            reset, update = (gate[..., : 2 * H] + recurrent[..., : 2 * H]).sigmoid().chunk(2, -1)
            new = (gate[..., 2 * H :] + reset * recurrent[..., 2 * H :]).tanh()
            h = torch.lerp(new, h, update)
            states.append(h)
        return torch.stack(states, 1)


class Policy(nn.Module):
    """One recurrent policy for all agents of a team, for S seeds."""

    def __init__(self, inputs, outputs, hidden, generators):
        super().__init__()
        self.hidden = hidden
        self.encoder = Linear(inputs, hidden, generators)
        self.gru = GRU(hidden, hidden, generators)
        self.head = Linear(hidden, outputs, generators)

    def forward(self, x, h=None):
        """Actions along sequences, (S, L, B, N, I) -> (S, L, B, N, A), and the last memory (S, B N, H)."""
        S, L, B, N, _ = x.shape
        h = x.new_zeros(S, B * N, self.hidden) if h is None else h
        encoded = self.encoder(x.flatten(1, 3)).relu_().view(S, L, B * N, -1)
        states = self.gru(encoded, h)
        return self.head(states.flatten(1, 2).relu()).tanh().view(S, L, B, N, -1), states[:, -1]


class Critics(nn.Module):
    """Q_1 and Q_2 of S seeds as 2 S networks: the first S of them are Q_1's."""

    def __init__(self, state_dim, action_dim, hidden, generators):
        super().__init__()
        twice = [*generators, *generators]
        self.first = Linear(state_dim + action_dim, hidden, twice)
        self.second = Linear(hidden, hidden, twice)
        self.third = Linear(hidden, 1, twice)

    def forward(self, state, action):
        """Q of K joint actions in each state: (S, M, D), (S, M, K, N A) -> (2, S, M, K).

        The first layer multiplies a state once, whatever K is.
        """
        S, M, K, X = action.shape
        for_state, for_action = self.first.weight.split([state.shape[-1], X], 1)
        seen = torch.baddbmm(self.first.bias, state.repeat(2, 1, 1), for_state)  # (2S, M, H)
        action, H = action.repeat(2, 1, 1, 1), seen.shape[-1]
        piece = max(1, CACHE // (2 * S * K * H)) if action.device.type == "cpu" else M
        q = []
        for s, a in zip(seen.split(piece, 1), action.split(piece, 1)):
            x = torch.bmm(a.flatten(1, 2), for_action).view(2 * S, -1, K, H) + s[:, :, None]
            x = self.second(x.relu_().flatten(1, 2)).relu_()  # (2S, piece K, H)
            # The third layer has one output: as a matrix product it would take a sixth of an update's time.
            q.append(((x * self.third.weight.mT).sum(-1) + self.third.bias[..., 0]).view(2, S, -1, K))
        return torch.cat(q, 2)


class Team(nn.Module):
    """Everything that S teams learn, and the target networks."""

    def __init__(self, game, args, generators):
        super().__init__()
        N, A = game.num_agents, game.num_actions
        self.policy = Policy(N + game.obs_dim, A, args.policy_hidden, generators)
        self.critics = Critics(game.state_dim, N * A, args.critic_hidden, generators)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)


# ---------------------------------------------------------------- priorities
class Windows(nn.Module):
    """The priorities of W windows for each seed, all 1 at first, and draws in proportion to them.

    Every BLOCK priorities keep their sum. A draw inverts the cumulative distribution in two steps, exactly: one uniform
    number, times the sum of all, falls into a block, and what is left of it falls on a window of that block. So a draw
    reads W / BLOCK sums and BLOCK priorities, and a change of a priority renews one sum. A sum is always added up
    anew, so no rounding error gathers; with numbers in double precision, a small priority is neither lost in the sum
    of a million nor missed by the grid of the random numbers.
    """

    def __init__(self, count, seeds):
        super().__init__()
        self.count = count
        rho = torch.zeros(seeds, -(-count // BLOCK), BLOCK, dtype=torch.float32)
        rho.flatten(1)[:, :count] = 1
        self.register_buffer("rho", rho)
        self.register_buffer("sums", rho.sum(-1, dtype=torch.float64))  # (S, blocks)
        self.register_buffer("seed", torch.arange(seeds)[:, None], persistent=False)

    def draw(self, uniform):
        """uniform (S, B) in [0, 1), double precision -> the numbers of the windows drawn (S, B)."""
        end = self.sums.cumsum(1)
        place = uniform * end[:, -1:]
        block = torch.searchsorted(end, place, right=True).clamp(max=end.shape[1] - 1)
        place = place - (end - self.sums).gather(1, block)
        inside = self.rho[self.seed, block].double().cumsum(-1)  # (S, B, BLOCK)
        offset = torch.searchsorted(inside, place[..., None], right=True)[..., 0]
        return (block * BLOCK + offset).clamp(max=self.count - 1)  # if rounding led past the end

    def write(self, index, rho):
        """Give the windows `index` (S, B) the priorities rho (S, B)."""
        self.rho.flatten(1).scatter_(1, index, rho.float())
        block = index // BLOCK
        self.sums.scatter_(1, block, self.rho[self.seed, block].sum(-1, dtype=torch.float64))

    def effective(self):
        """The effective share of the windows, (sum rho)^2 / (W sum rho^2), (S,): 1 if all are equally likely."""
        return self.sums.sum(1) ** 2 / (self.rho.double() ** 2).sum((1, 2)) / self.count


def priority(distance, steepness, floor, exponent):
    """Eq. 6, elementwise: rho^exponent, what a window's probability is in proportion to."""
    return torch.exp(-((steepness * distance) ** 2)).clamp(min=floor) ** exponent


def distance(mine, recorded, acted):
    """Mean |a - mu(o)| along windows: (S, L, B, N, A) twice, acted (S, L, B) -> (S, B)."""
    gap = (recorded - mine).abs().mean((3, 4))  # (S, L, B)
    return (gap * acted).sum(1) / acted.sum(1)


# ---------------------------------------------------------------- update
class Batch(NamedTuple):
    """B windows of L rows for each seed."""

    x: torch.Tensor  # (S, L, B, N, I) the policy's inputs
    state: torch.Tensor  # (S, L, B, D)
    action: torch.Tensor  # (S, L, B, N, A) as recorded
    reward: torch.Tensor  # (S, L, B) of the step that begins in a row
    done: torch.Tensor  # (S, L, B) 1 where the game ended with it
    acted: torch.Tensor  # (S, L, B) 1 where there is such a step: everywhere but, maybe, in the last row


def gather(index, data, encode):
    """The windows `index` (S, B) as a `Batch`."""
    rows = data["start"][index][:, None] + torch.arange(data["window"], device=index.device)[:, None]  # (S, L, B)
    rest = (data[name][rows] for name in ("state", "actions", "reward", "done", "acted"))
    return Batch(encode(data["obs"][rows]), *rest)


def draw_noise(generators, B, N, A, args):
    """The random part of the conservative term: uniform (S, L-1, B, K, N, A) and normal (S, 2, L-1, B, K, N, A)."""
    shape = (args.window - 1, B, args.ood_actions, N, A)
    uniform = runs.uniform(generators, *shape) * 2 - 1
    return uniform, torch.stack([torch.randn(2, *shape, generator=g, device=g.device) for g in generators])


def candidates(own, uniform, normal, sigma):
    """CQL's joint actions in each transition's state, (S, L-1, B, 3K, N, A), and log p_i, (S, L-1, B, 3K, N).

    own (S, L, B, N, A) are the policies' actions along the windows, the rest comes from `draw_noise`.
    """
    noise = sigma * normal
    near = torch.stack([own[:, :-1], own[:, 1:]], 1)[:, :, :, :, None] + noise  # (S, 2, L-1, B, K, N, A)
    log_p = (-0.5 * normal**2 - math.log(sigma) - 0.5 * math.log(2 * math.pi)).sum(-1)  # before clipping
    flat = torch.full_like(log_p[:, 0], uniform.shape[-1] * math.log(0.5))  # the density of one agent's part
    actions = torch.cat([uniform, *near.clamp(-1, 1).unbind(1)], 3)
    return actions, torch.cat([flat, *log_p.unbind(1)], 3)


def td_target(target_critics, batch, theirs, gamma):
    """y of the M transitions, (S, M); theirs (S, L, B, N, A) are the target policy's actions."""
    next_state, next_action = batch.state[:, 1:].flatten(1, 2), theirs[:, 1:].flatten(3).flatten(1, 2)
    q = target_critics(next_state, next_action[:, :, None])[..., 0].amin(0)  # the lower of the two
    reward, done = (x[:, :-1].flatten(1, 2) for x in (batch.reward, batch.done))
    return reward + gamma * (1 - done) * q


def critic_loss(critics, batch, y, actions, log_p, cql):
    """L(Q_c), the mean of both critics: the loss, its squared error and its conservative part, each (S,)."""
    state, recorded = batch.state[:, :-1].flatten(1, 2), batch.action[:, :-1].flatten(3).flatten(1, 2)
    actions = torch.cat([recorded[:, :, None], actions.flatten(4).flatten(1, 2)], 2)  # (S, M, 1 + 3K, N A)
    q = critics(state, actions)
    taken, other = q[..., 0], q[..., 1:]  # (2, S, M), (2, S, M, 3K)
    corrected = other[..., None] - log_p.flatten(1, 2)  # (2, S, M, 3K, N); only here do the agents differ
    gap = corrected.logsumexp(3).mean(-1) - taken
    error, gap = (0.5 * (y - taken) ** 2).mean((0, 2)), gap.mean((0, 2))
    return error + cql * gap, error, gap


def policy_loss(critics, batch, own, action_reg):
    """L(mu), (S,): each agent's own action (S, L, B, N, A) among the others' recorded ones, Eq. 4."""
    N = own.shape[3]
    me = torch.eye(N, dtype=torch.bool, device=own.device)[..., None]  # (N, N, 1)
    joint = torch.where(me, own[:, :, :, None], batch.action[:, :, :, None])  # (S, L, B, N, N, A)
    q = critics(batch.state.flatten(1, 2), joint.flatten(4).flatten(1, 2)).amin(0)  # (S, L B, N)
    cost = action_reg * (own**2).mean((3, 4)).flatten(1) - q.mean(-1)
    weight = batch.acted.flatten(1)
    return (weight * cost).sum(1) / weight.sum(1)


def losses(team, batch, uniform, normal, args):
    """The critics' and the policy's loss (S,), and what to log (S,) and to prioritise by (S, B).

    Given the noise a function without chance, of tensors whose shapes never change.
    """
    own, _ = team.policy(batch.x)
    with torch.no_grad():
        theirs, _ = team.target_policy(batch.x)
        y = td_target(team.target_critics, batch, theirs, args.gamma)
        gap = distance(theirs, batch.action, batch.acted)
    actions, log_p = candidates(own.detach(), uniform, normal, args.ood_noise)
    for_critics, q_loss, cql = critic_loss(team.critics, batch, y, actions, log_p, args.cql)
    frozen = {name: parameter.detach() for name, parameter in team.critics.named_parameters()}

    def judge(*x):  # the critics, which the policy's loss leaves as they are
        return torch.func.functional_call(team.critics, frozen, x)

    for_policy = policy_loss(judge, batch, own, args.action_reg)
    return for_critics, for_policy, q_loss.detach(), cql.detach(), gap


def optimizer(team, args):
    groups = [{"params": [*team.critics.parameters()], "lr": args.critic_lr},
              {"params": [*team.policy.parameters()], "lr": args.policy_lr}]  # fmt: skip
    return torch.optim.RMSprop(groups, alpha=0.9, eps=1e-5, foreach=True)


def uniform64(generators, count):
    """Uniform numbers (S, count) in double precision, whatever the networks have."""
    return torch.stack([torch.rand(count, generator=g, device=g.device, dtype=torch.float64) for g in generators])


def update(team, rmsprop, windows, data, encode, loss, steepness, generators, args):
    """One update of all networks and of the priorities; returns what to log, a dictionary of (S,) tensors.

    Nothing in it waits for the device.
    """
    _, N, A = data["actions"].shape
    index = windows.draw(uniform64(generators, args.batch_size))
    batch = gather(index, data, encode)
    noise = draw_noise(generators, args.batch_size, N, A, args)
    for_critics, for_policy, q_loss, cql, gap = loss(team, batch, *noise, args)
    rmsprop.zero_grad()
    # The sum over seeds leaves each seed the gradient that it would have alone.
    (for_critics + for_policy).sum().backward()
    rmsprop.step()
    with torch.no_grad():
        for network, target in ((team.critics, team.target_critics), (team.policy, team.target_policy)):
            torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), args.tau)
        if args.pjap:
            windows.write(index, priority(gap, steepness, args.floor, args.exponent))
            if args.refresh:
                index = (uniform64(generators, args.refresh) * windows.count).long()
                more = gather(index, data, encode)
                far = distance(team.target_policy(more.x)[0], more.action, more.acted)
                windows.write(index, priority(far, steepness, args.floor, args.exponent))
    return {"q_loss": q_loss, "cql": cql, "policy_loss": for_policy.detach(), "distance": gap.mean(1)}


# ---------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(policy, encode, args, step, episodes, device):
    """Play the teams of all seeds in one batch of games, without noise; the returns (S, E)."""
    S, game = args.num_seeds, envs.make(args.env, args.task, args.num_seeds * episodes, device)
    (obs, _), h, total = game.reset(seed=step), None, torch.zeros(S, episodes, device=device, dtype=torch.float64)
    try:
        for _ in range(game.time_limit):
            x = encode(obs).view(S, 1, episodes, game.num_agents, -1)
            action, h = policy(x, h)
            obs, reward, terminated, truncated, _ = game.step(action.flatten(0, 2).float())
            total += reward.view(S, episodes)
            if (terminated | truncated).all():
                break
    except FloatingPointError as error:
        raise FloatingPointError(f"in the evaluation after {step} updates, {error}") from None
    finally:
        game.close()
    return total


@torch.no_grad()
def measure(policy, windows, data, encode):
    """Mean |a - mu(o)| over evenly spaced windows of the dataset, (S,)."""
    S = len(windows.rho)
    index = torch.linspace(0, windows.count - 1, min(SAMPLE, windows.count), device=data["start"].device).long()
    total = 0
    for part in index.split(200):
        batch = gather(part.expand(S, -1), data, encode)
        total = total + distance(policy(batch.x)[0], batch.action, batch.acted).sum(1)
    return total / len(index)


def report(folder, args, team, windows, data, dataset, encode, rows, seconds, wall, device):
    """Evaluate the last policies on ten times as many games; write summary.json and the pictures, print the table."""
    S, E = args.num_seeds, 10 * args.eval_episodes
    scores = evaluate(team.policy, encode, args, args.steps, E, device)
    last = rows[-S:]
    summary = {"script": "maddpg_cql_pjap", "env": args.env, "task": args.task, "dataset": args.dataset}
    summary |= {"pjap": args.pjap, "steps": args.steps, "seeds": [row["seed"] for row in last]}
    summary |= {"return": runs.over_seeds(scores), "normalized_return": None, "win_rate": None}
    if dataset.references:
        summary["normalized_return"] = runs.over_seeds(dataset.normalize(scores))  # 0 random, 1 expert
    for name in ("distance", "data_distance"):
        summary[name] = runs.over_seeds(torch.tensor([[row[name]] for row in last]))
    summary |= {
        "dataset_return": dataset.returns.mean().item(), "updates_per_second": args.steps / seconds,
        "wall_seconds": time.perf_counter() - wall, "device": runs.device_name(device),
    }  # fmt: skip
    method = "MADDPG+CQL" + "+PJAP" * args.pjap
    title = f"{method} on {runs.slug(args.env, args.task, args.dataset)}, {S} seed{'s' * (S > 1)}"
    levels = {"dataset": summary["dataset_return"]}
    figures = {"curve.png": runs.draw_curves(rows, {"return": method}, levels, title, "updates", "return")}
    columns = {"distance": "windows drawn", "data_distance": "whole dataset"}
    figures["distance.png"] = runs.draw_curves(rows, columns, {}, title, "updates", "mean |recorded - own action|")
    runs.save_json(folder / "summary.json", summary)
    for name, figure in figures.items():
        runs.save_figure(folder / name, figure)
    print(f"\n{title}: {folder}")
    runs.print_table(("greedy",), {method: [summary["return"]]}, levels)
    runs.print_table(("drawn", "dataset"), {method: [summary["distance"], summary["data_distance"]]}, {}, "distance")
    return summary


# ---------------------------------------------------------------- main
def arrange(dataset, args):
    """The dataset as R rows and as windows into them, and the function that makes the policy's inputs.

    Returns the data and a function (..., N, O) -> (..., N, I). The data is a dictionary: obs (R, N, O), state (R, D);
    of the step that begins in a row actions (R, N, A), reward, done and acted (R,), 0 where none does; start (W,), the
    windows' first rows; window, their length L.
    """
    dtype, lengths, L = torch.get_default_dtype(), dataset.lengths, args.window
    data = dataset.flatten(dtype)
    row, R = data.pop("row"), len(data["obs"])
    del data["avail_actions"]
    data["acted"] = torch.ones_like(data["reward"])
    for name in ("actions", "reward", "done", "acted"):
        step = data[name].to(dtype)
        data[name] = step.new_zeros(R, *step.shape[1:]).index_copy_(0, row, step)
    end = (lengths + 1).cumsum(0) - 1  # (E,) each episode's last row
    first = torch.arange(R, device=row.device)
    data["start"] = (first + L - 1 <= end.repeat_interleave(lengths + 1)).nonzero()[:, 0]
    data["window"] = L
    if len(data["start"]) == 0:
        raise ValueError(
            f"no episode of {args.dataset} has the {L} rows of a window, the longest has {int(lengths.max()) + 1}: "
            f"choose a smaller --window"
        )
    mean, std = torch.zeros((), dtype=dtype, device=row.device), torch.ones((), dtype=dtype, device=row.device)
    if args.normalize:
        std, mean = torch.std_mean(data["state"], 0)
        data["state"] = (data["state"] - mean) / std.clamp(min=1e-3)
        std, mean = torch.std_mean(data["obs"], 0)  # (N, O), of each agent
        std = std.clamp(min=1e-3)

    def encode(obs):
        N = obs.shape[-2]
        who = torch.eye(N, dtype=dtype, device=obs.device).expand(*obs.shape[:-1], N)
        return torch.cat([who, (obs.to(dtype) - mean) / std], -1)

    return data, encode


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    wall = time.perf_counter()
    torch.set_num_threads(args.threads)
    device = runs.choose_device(args.device)
    game = envs.make(args.env, args.task)
    if not isinstance(game.single_action_space, Box):
        raise ValueError(f"{args.env} has discrete actions: this method is for continuous ones, --env halfcheetah")
    options = {"episodes": args.episodes, "limit_terminates": args.time_limit_terminates}
    dataset = datasets.load(args.env, args.task, args.dataset, device, **options)
    data, encode = arrange(dataset, args)
    S, seeds = args.num_seeds, range(args.seed, args.seed + args.num_seeds)
    team = Team(game, args, [runs.stream(seed, 0) for seed in seeds]).to(device)
    windows = Windows(len(data["start"]), S).to(device)
    rmsprop = optimizer(team, args)
    loss = runs.compiler(args.compile, device)(losses)
    generators = [runs.stream(seed, 1, device) for seed in seeds]
    step, rows, seconds = 0, [], 0.0

    tracker = runs.start_tracking("maddpg_cql_pjap", args) if args.track else None
    folder = runs.open_folder("maddpg_cql_pjap", args, device)
    saved = runs.load_checkpoint(folder, device) if args.resume else None
    if saved:
        try:
            team.load_state_dict(saved["team"])
            windows.load_state_dict(saved["windows"])
            rmsprop.load_state_dict(saved["rmsprop"])
            for generator, state in zip(generators, saved["generators"], strict=True):
                generator.set_state(state.cpu())
            step, rows, seconds, wall = saved["step"], saved["rows"], saved["seconds"], wall - saved["wall"]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise ValueError(f"{folder}/checkpoint.pt is of another run: delete it to start this one again") from None
    print(f"{len(dataset.returns)} episodes, {windows.count} windows, mean return {dataset.returns.mean():.1f}")

    nothing = dict.fromkeys(("q_loss", "cql", "policy_loss", "distance"), torch.zeros(S, device=device))
    logs, count = nothing, 0  # sums since the last evaluation
    while True:
        if not rows or rows[-1]["step"] < step:  # a resumed run has this evaluation already
            logs = {name: value / count for name, value in logs.items()}  # NaN before the first update
            logs["distance_l1"] = logs["distance"] * game.num_actions  # as in the paper
            logs["data_distance"] = measure(team.policy, windows, data, encode)
            for name, value in logs.items():
                if step and not value.isfinite().all():
                    raise FloatingPointError(f"{name} is not finite after {step} updates: try smaller step sizes")
            logs["effective_share"] = windows.effective()
            logs["return"] = evaluate(team.policy, encode, args, step, args.eval_episodes, device).mean(1)
            columns = {name: value.tolist() for name, value in logs.items()}
            for s, seed in enumerate(seeds):
                rows.append({"step": step, "seed": seed} | {name: value[s] for name, value in columns.items()})
            runs.save_csv(folder / "metrics.csv", rows)
            runs.save_checkpoint(folder, {
                "team": team.state_dict(), "windows": windows.state_dict(), "rmsprop": rmsprop.state_dict(),
                "generators": [generator.get_state() for generator in generators], "step": step, "rows": rows,
                "seconds": seconds, "wall": time.perf_counter() - wall, "args": asdict(args),
            })  # fmt: skip
            score = f"return {logs['return'].mean():9.2f}   distance {logs['distance'].mean():.4f} drawn"
            speed = f"{step / seconds:7.1f} updates/s" if step else "(untrained)"
            print(f"step {step:6d}   {score}, {logs['data_distance'].mean():.4f} dataset   {speed}", flush=True)
            if tracker:
                tracker.log({name: sum(value) / S for name, value in columns.items()}, step=step)
        if step == args.steps:
            break
        begin, logs, count = time.perf_counter(), nothing, 0
        for step in range(step, min(args.steps, step + args.eval_every - step % args.eval_every)):
            steepness = args.steepness * min(1.0, step / (args.ramp * args.steps) if args.ramp else 1.0)
            new = update(team, rmsprop, windows, data, encode, loss, steepness, generators, args)
            logs, count = {name: logs[name] + value for name, value in new.items()}, count + 1
        step += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - begin
    return report(folder, args, team, windows, data, dataset, encode, rows, seconds, wall, device)


def parse(argv=None):
    """Read the command line; where no flag speaks, the environment's own values or those of the resumed run hold."""
    read = functools.partial(tyro.cli, Args, args=argv, description=__doc__.splitlines()[0])
    args = read()
    if args.resume:
        args = read(default=replace(runs.saved_args(Args, args.out_dir), resume=True, out_dir=args.out_dir))
    elif args.env in envs.TASKS:
        args = read(default=Args(**preset(args.env), env=args.env, task=args.task or envs.TASKS[args.env][0]))
    zero = "seed episodes ramp cql gamma action_reg refresh"
    runs.check_numbers(args, may_be_zero=zero, at_most_one="ramp floor gamma tau")
    if args.window < 2:
        raise ValueError("--window must be at least 2 rows: a step leads from one to the next")
    return args


if __name__ == "__main__":
    args = None
    try:
        args = parse()
        main(args)
    except KeyboardInterrupt:
        folder = args.out_dir if args else ""
        print(f"interrupted; go on with: --resume --out-dir {folder}" if folder else "interrupted", file=sys.stderr)
        sys.exit(130)  # the shell's code for Ctrl-C
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
