"""InSPO: In-Sample Sequential Policy Optimization (Liu et al., AAAI 2025, arXiv 2412.07639).

The problem. A team of N agents learns from a fixed dataset. Where several joint actions are equally good (both go
left, both go right), each agent's own choice looks good in the data, and yet the combination of two such choices may
be bad, or one that nobody ever took. Keeping each agent close to the data does not help: both halves are in it.

The idea. The agents learn in turns. When it is agent i's turn, the minibatch is resampled so that its teammates'
recorded actions look as if they came from their *current* policies. So agent i answers the convention that the team
leans towards by now, not the average of the dataset, and its answer tips the team further. Policies learn by weighted
cloning of recorded actions, so no policy is ever trained towards an action that was not recorded. An entropy bonus that
decays over training first flattens the behaviour's preferences, so that a rare but better convention can win.

Equations (numbers of the paper). Agent i acts by pi_i; mu_i is its recorded behaviour. Q_i(s, a_i) is its local value,
the joint value averaged over what its teammates do now, and Q'_i a slowly moving copy of Q_i. T = alpha + beta.
  Eq. 9   J        = E sum_t gamma^t [ r_t - alpha log(pi/mu) + beta H(pi) ]          mu: who recorded the dataset
  Eq. 12  pi_i(a)  = mu_i(a)^(alpha/T) exp(Q_i(s,a)/T) / Z             the fixed point, a quantal response equilibrium
  Eq. 15  L(Q_i)   = E_resampled [ (Q_i(s,a_i) - y_i)^2 ]
          y_i      = r + gamma E_{a ~ pi_i(s')} [ Q'_i(s',a) - alpha log(pi_i/mu_i) - beta log pi_i ]
  Eq. 20  L(pi_i)  = -E [ exp( (Q'_i(s,a_i) - V_i(s) - beta log mu_i(a_i|s)) / T ) log pi_i(a_i|s) ]
  Eq. 21  L(mu_i)  = -E log mu_i(a_i|s)                                behavioural cloning
  Eq. 22  L(mu)    = -E log mu(a_-i|s,a_i)                             the teammates, one after the other
  Eq. 23  rho_i    = ( prod_{j != i} pi_j(a_j|s) / mu(a_-i|s,a_i) )^(1/(N-1))
  Eq. 24  L(Q_i)   = Eq. 15 + cql E_resampled [ logsumexp_a Q_i(s,a) - Q_i(s,a_i) ]
  Eq. 25  L(alpha) = -alpha E [ KL(pi_i || mu_i) - target ]

Commands, and the return you should see (mean of all seeds; one CPU core of a small server, torch 2.13):
  python algorithms/inspo.py                                              Bridge, mixed data, 5 seeds at once, 50 s:
      greedy -1.2355 (the best possible) in 5 of 5 seeds, sampled -1.257; the data -9.31, behavioural cloning -13.3
  python algorithms/inspo.py --env matrix --task xor --num-seeds 10       18 s: 1 in 10 of 10 seeds, cloning 0.45
  python algorithms/inspo.py --env matrix --task m-ne --num-seeds 10      45 s: 20 in 10 of 10 seeds, cloning 3.6
  ... with --beta 0                                                       5: caught in the data's local optimum
  ... on xor with --no-resampling                                         0: both play the action nobody combined
  python algorithms/inspo.py --env smac          5m_vs_6m, medium-replay data, 3 seeds, 6 min with the data: 31 % of the
      battles won by sampling (return 12.8), cloning 2 %, the data 9 %; greedily 56 %, cloning 48 %

The authors' code is not public, and public copies of the paper have lost some of its numbers. Choices made here:
  1. V_i in Eq. 20 is the exact normaliser of Eq. 12 over mu; it only rescales how much a state counts.
  2. The conservative term of Eq. 24 has the logsumexp form. alpha, beta, cql, step sizes and lengths are ours.
  3. One network models all teammates: mu(a_j | s, what is known of the joint action), see `teammate_log_prob`.
  4. Policies start as copies of the cloned mu_i. Two layers of 64 units do what the paper's three of 256 do, faster.
  5. In games such as M-NE, beta stays at its start until the policies have flattened, and the Q-functions get a head
     start; see `preset` for the weights in units of the payoffs.
  6. On XOR, where not every joint action is recorded, Eq. 20 uses the resampled minibatch (--actor-data).
  7. Bridge's cells enter the networks as one-hot values. A time limit is not the end: Q looks beyond it (the step that
     meets the limit pays 0 by Bridge's rules, in these data as in AlberDICE's, and is used as it stands).
  8. Who goes first is drawn once for all seeds, from a stream that no flag changes; "semi-greedy" averages over seeds.
  9. In battles there is no entropy bonus (beta = 0), alpha is 0.4 (a battle pays up to 20), and the Q-functions learn
     alone for the first 1,500 updates, as the weights of Eq. 20 are worth no more than they are.

Policies with a memory (--recurrent, the default in StarCraft-like battles, --env smac). There pi_i and mu_i are GRUs
that see agent i's views and last actions; the Q-functions see the state. A minibatch consists of whole episodes, laid
end to end in sequences of one length. Eq. 23 is a ratio of single steps, so single steps are resampled from it; padding
has ratio 0. One minibatch serves a whole sweep: after agent i's turn only log pi_i has to be unrolled again. The
teammate model adds what the joint action tells to log mu_j, which has seen the episode. Without a memory the same code
runs on "sequences" of two rows, an observation and the next.

Shapes: S seeds, B steps or B' sequences of a minibatch, L rows of a sequence, K = (L - 1) B' its steps, N agents,
A actions, O observation, I inputs, D state, R rows (observations).
"""

import copy
import functools
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `data` and `envs` stand beside this file's folder
import data as datasets
import envs
from data import runs
from envs.bridge import draw_strips
from envs.matrix import draw_joints

ILLEGAL = -1e10  # the logit of an action that is not available


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "bridge"  # the environment: bridge, matrix or smac
    task: str = ""  # its task: a map of smac; for matrix a name, or any payoff table as JSON
    dataset: str = "mixed"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 5  # how many seeds train, all at once
    steps: int = 3000  # updates; each is a sweep that trains every agent's Q-function and policy once
    eval_every: int = 100  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 32  # games per seed and evaluation, each played greedily and by sampling
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads; networks this small gain little from more, and lose much on a busy machine
    compile: bool = torch.cuda.is_available()  # compile the losses with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/inspo
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    backend: Literal["torch", "sc2"] = "torch"  # smac: evaluate in our simulator, or in the real StarCraft II
    games: int = 8  # sc2: battles at once, each a process of about 1 GB
    # --- the method
    alpha: float = 0.02  # weight of the KL divergence to the behaviour
    auto_alpha: bool = False  # tune alpha until the KL divergence meets --kl-target (Eq. 25)
    kl_target: float = 1.0  # the KL divergence that --auto-alpha aims at, in nats
    beta: float = 0.05  # weight of the entropy at the start; 0 leaves it out
    beta_end: float = 0.001  # weight of the entropy at the end; it decays exponentially
    beta_hold: int = 0  # updates before beta begins to decay
    warmup: int = 0  # updates in which only the Q-functions learn
    cql: float = 0.1  # weight of the conservative term in Eq. 24
    order: Literal["random", "fixed", "semi-greedy"] = "random"  # who goes first in a sweep
    inner: int = 1  # gradient steps per agent and turn
    sequential: bool = True  # see the teammates' policies as they are now, not as they were when the sweep began
    resampling: bool = True  # see the teammates' policies at all: with --no-resampling every ratio is 1
    actor_data: Literal["uniform", "resampled"] = "uniform"  # the minibatch of the policy loss
    gamma: float = 0.99  # discount
    # --- the optimisation
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    one_hot: bool = True  # feed integer observations as one-hot values (the cells of a grid)
    recurrent: bool = False  # policies with a memory (GRU) that see their last action too
    sequences: int = 8  # recurrent: sequences of whole episodes per sweep, from which each turn draws its steps
    batch_size: int = 128  # recorded steps per update
    policy_lr: float = 1e-3  # Adam's step size for the policies
    critic_lr: float = 1e-3  # Adam's step size for the Q-functions
    alpha_lr: float = 1e-3  # Adam's step size for log alpha
    tau: float = 0.02  # how far a target network moves in an update
    weight_cap: float = 100.0  # largest weight in the policy loss
    ratio_cap: float = 100.0  # largest importance ratio
    clone_steps: int = 1000  # updates of the behaviour models before the sweeps
    clone_lr: float = 2e-3  # their step size
    clone_batch: int = 128  # their minibatch


def preset(env, task):
    """What differs from Bridge's values, above, in the other environments; each value can be set by its flag."""
    if env == "smac":
        values = dict(dataset="medium-replay", num_seeds=3, steps=2500, warmup=1500, eval_every=500, recurrent=True)
        values |= dict(one_hot=False, alpha=0.4, beta=0.0, batch_size=512, critic_lr=2e-3, tau=0.05)
        values |= dict(clone_steps=2000, clone_lr=1e-3)
        values |= dict(sequences=max(2, 560 // envs.make("smac", task).time_limit))  # so that they hold some 500 steps
        return values
    payoff = envs.make("matrix", task).payoff
    values = dict(dataset=datasets.names("matrix", task)[-1], steps=1500, one_hot=False, tau=0.05, clone_lr=1e-3)
    if task in ("xor", "coordination"):  # conventions that pay the same; a tie breaks where alpha + beta < cql / 2
        values |= dict(beta=0.1, cql=0.5, actor_data="resampled", batch_size=64, policy_lr=5e-4, clone_steps=300)
    else:  # unequal ones: beta starts at the largest difference between payoffs, the other weights in proportion
        unit = (payoff.max() - payoff.min()).item() / 200 or 1.0
        values |= dict(alpha=unit, beta=200 * unit, beta_end=0.1 * unit, cql=5 * unit, beta_hold=500, warmup=200)
        values |= dict(batch_size=256, critic_lr=3e-3, weight_cap=1000.0, ratio_cap=1000.0, clone_batch=256)
    return values | (dict(dataset="aa-ab-ba") if task == "xor" else {})


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


def mlp(inputs, outputs, args, generators):
    """A ReLU network for each seed: (S, B, inputs) -> (S, B, outputs)."""
    sizes = [inputs] + [args.hidden] * args.layers
    body = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o, generators), nn.ReLU())]
    return nn.Sequential(*body, Linear(sizes[-1], outputs, generators))


class GRU(nn.Module):
    """S independent gated recurrent units with the weights' layout and equations of nn.GRU, but batched over seeds."""

    def __init__(self, inputs, hidden, generators):
        super().__init__()
        bound = hidden**-0.5
        start = [torch.empty(inputs + hidden + 2, 3 * hidden).uniform_(-bound, bound, generator=g) for g in generators]
        split = torch.stack(start).split([inputs, hidden, 1, 1], 1)  # columns: reset, update, new
        self.input, self.state, self.input_bias, self.state_bias = (nn.Parameter(part.clone()) for part in split)

    def forward(self, x, first, h):
        """Run over sequences x (S, L, B, I) from h (S, B, H), forgetting where first (S, L, B): (S, L, B, H)."""
        S, L, B, _ = x.shape
        gates = torch.baddbmm(self.input_bias, x.flatten(1, 2), self.input).view(S, L, B, -1).unbind(1)
        keep, states, H = (~first)[..., None].to(x.dtype).unbind(1), [], h.shape[-1]
        for gate, kept in zip(gates, keep):
            h = h * kept
            recurrent = torch.baddbmm(self.state_bias, h, self.state)  # (S, B, 3H)
            reset, update = (gate[..., : 2 * H] + recurrent[..., : 2 * H]).sigmoid().chunk(2, -1)
            new = (gate[..., 2 * H :] + reset * recurrent[..., 2 * H :]).tanh()
            h = torch.lerp(new, h, update)
            states.append(h)
        return torch.stack(states, 1)


class Policy(nn.Module):
    """Logits of all actions along sequences of one agent's inputs, (S, L, B, I) -> (S, L, B, A)."""

    def __init__(self, inputs, outputs, args, generators):
        super().__init__()
        self.hidden = args.hidden if args.recurrent else 0
        if args.recurrent:  # it remembers what it saw and did: no single observation shows the whole battle
            self.encoder = nn.Sequential(Linear(inputs, args.hidden, generators), nn.ReLU())
            self.gru = GRU(args.hidden, args.hidden, generators)
            self.head = Linear(args.hidden, outputs, generators)
        else:
            self.body = mlp(inputs, outputs, args, generators)

    def forward(self, x, first, h):
        S, L, B, _ = x.shape
        if not self.hidden:
            return self.body(x.flatten(1, 2)).view(S, L, B, -1), h
        states = self.gru(self.encoder(x.flatten(1, 2)).view(S, L, B, -1), first, h)
        return self.head(states.flatten(1, 2)).view(S, L, B, -1), states[:, -1]


class Team(nn.Module):
    """Everything that S teams learn. Each agent has networks of its own, or its turn would change the others."""

    def __init__(self, num_agents, num_actions, obs_dim, state_dim, args, generators):
        super().__init__()
        N, A, O, D = num_agents, num_actions, obs_dim, state_dim
        self.mus = nn.ModuleList(Policy(O, A, args, generators) for _ in range(N))  # behaviour, Eq. 21
        self.teammates = mlp(D + N + N * A, A, args, generators)  # joint behaviour, Eq. 22
        self.critics = nn.ModuleList(mlp(D, A, args, generators) for _ in range(N))  # Q_i(s, .), one output an action
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.policies = copy.deepcopy(self.mus)
        self.log_alpha = nn.Parameter(torch.full((len(generators), 1), math.log(args.alpha)))  # (S, 1)


def log_probs(policy, obs, avail, first, h):
    """Log-probabilities of all actions along sequences (S, L, B, I) -> (S, L, B, A), and the last memory.

    An action that is not available has no mass. first (S, L, B) is True where an episode begins.
    """
    logits, h = policy(obs, first, h)
    return F.log_softmax(logits.masked_fill(~avail, ILLEGAL), -1), h


def together(policies):
    """N policies of S seeds as one function of N S seeds: every layer is one batched product for the whole team."""
    parts = [dict(policy.named_parameters()) for policy in policies]
    stacked = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # (N S, ...)
    return lambda *inputs: torch.func.functional_call(policies[0], stacked, inputs)


def chosen(values, action):
    """The entries of the actions taken: (..., A), (...) -> (...)."""
    return values.gather(-1, action[..., None])[..., 0]


def teammate_log_prob(network, state, avail, actions, i, prior=None):
    """Eq. 22: log mu(a_-i | s, a_i), (S, B): the sum over teammates j, each given a_i and the teammates before it.

    state (S, B, D), avail (S, B, N, A), actions (S, B, N). One network serves every i and j: its input holds the
    state, which j is asked for, and the known part of the joint action, zeros in place of the rest. With a prior,
    log mu_j (S, B, N, A) of models that remember the episode, the network only adds what the joint action tells.
    """
    S, B, N, A = avail.shape
    agent = torch.arange(N, device=state.device)
    j = agent[:-1] + (agent[:-1] >= i)  # (N-1,) everybody but i
    known = (agent == i) | (agent < j[:, None])  # (N-1, N)
    joint = F.one_hot(actions, A)[:, :, None] * known[..., None]  # (S, B, N-1, N, A)
    who = F.one_hot(j, N).expand(S, B, -1, -1)  # (S, B, N-1, N)
    x = torch.cat([state[:, :, None].expand(-1, -1, N - 1, -1), who, joint.flatten(3)], -1)
    logits = network(x.flatten(1, 2)).view(S, B, N - 1, A)
    if prior is not None:
        logits = logits + prior[:, :, j]
    log_mu = F.log_softmax(logits.masked_fill(~avail[:, :, j], ILLEGAL), -1)
    return chosen(log_mu, actions[:, :, j]).sum(-1)


# ---------------------------------------------------------------- update
class Batch(NamedTuple):
    """What agent i needs of B recorded steps, for each seed; log_pi and next_log_pi are its own policy's."""

    state: torch.Tensor  # (S, B, D)
    avail: torch.Tensor  # (S, B, A) bool
    log_mu: torch.Tensor  # (S, B, A) log mu_i(.|s)
    next_state: torch.Tensor
    next_log_mu: torch.Tensor
    action: torch.Tensor  # (S, B) int64
    reward: torch.Tensor  # (S, B)
    done: torch.Tensor  # (S, B) 1 where the game ended by its own rules
    valid: torch.Tensor  # (S, B) 1 where there is a step, 0 where a sequence is padded
    log_pi: torch.Tensor  # (S, B, A)
    next_log_pi: torch.Tensor


def gather(i, pick, rows, log_pi, data):
    """The steps at the places `pick` (S, B) of the minibatch as a `Batch` for agent i.

    The minibatch is `rows` (S, L, B'), sequences of row numbers, with agent i's log_pi (S, L, B', A); its places are
    the entries that have a successor, L - 1 times B' of them.
    """
    seed = torch.arange(len(rows), device=rows.device)[:, None]
    now, after = (r.flatten(1).gather(1, pick) for r in (rows[:, :-1], rows[:, 1:]))
    pi, next_pi = (p.flatten(1, 2)[seed, pick] for p in (log_pi[:, :-1], log_pi[:, 1:]))
    state, log_mu = data["state"], data["log_mu"][i]
    return Batch(
        state[now], data["avail_actions"][now, i], log_mu[seed, now], state[after], log_mu[seed, after],
        data["actions"][now, i], data["reward"][now], data["done"][now], data["acted"][now], pi, next_pi,
    )  # fmt: skip


def draw(data, generators, args):
    """A minibatch for each seed: B' sequences as row numbers (S, L, B')."""
    noise = runs.uniform(generators, args.sequences if args.recurrent else args.batch_size)
    return data["sequences"][noise.mul(len(data["sequences"])).long()].mT


def unroll(policies, agents, rows, data):
    """log_pi of the agents' policies along the sequences rows (S, L, B): (len(agents), S, L, B, A)."""
    n, (S, _, B) = len(agents), rows.shape
    obs, avail = (torch.stack([data[name][rows, i] for i in agents]) for name in ("obs", "avail_actions"))
    h = obs.new_zeros(n * S, B, policies[0].hidden)
    first = data["first"][rows].repeat(n, 1, 1)
    policy = together(policies) if n > 1 else policies[0]
    return log_probs(policy, obs.flatten(0, 1), avail.flatten(0, 1), first, h)[0].unflatten(0, (n, S))


def recall(i, rows, data):
    """What `unroll` returns for a policy that is still the cloned mu_i, from its table: (S, L, B, A)."""
    seed = torch.arange(len(rows), device=rows.device)[:, None, None]
    return data["log_mu"][i][seed, rows]


def importance_ratio(log_pi_others, log_mu_others, num_agents, cap):
    """Eq. 23: the geometric mean over teammates of pi_j / mu, (S, B); both inputs are sums of logs over teammates."""
    return ((log_pi_others - log_mu_others) / (num_agents - 1)).exp().clamp(1e-10, cap)


def resample(ratio, uniform):
    """Draw places in the minibatch with replacement, with probability ratio / sum(ratio).

    ratio (S, K), uniform (S, B) in [0, 1): the places (S, B); one whose ratio is 0 is never drawn.
    """
    cumulative = ratio.cumsum(1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp(max=ratio.shape[1] - 1)


def critic_loss(critic, target, batch, alpha, beta, gamma, cql):
    """Eq. 24, for each seed (S,); alpha (S, 1), beta (). As in the paper, y leaves out the others' KL and entropy."""
    with torch.no_grad():
        log_pi = batch.next_log_pi  # (S, B, A)
        soft = target(batch.next_state) - alpha[..., None] * (log_pi - batch.next_log_mu) - beta * log_pi
        y = batch.reward + gamma * (1 - batch.done) * (log_pi.exp() * soft).sum(-1)  # Eq. 15: (S, B)
    q = critic(batch.state)  # (S, B, A)
    q_taken = chosen(q, batch.action)
    # Between conventions that pay the same, the squared error has no preference. This term has one: it lifts the
    # resampled actions, those that go with what the teammates do now, and so breaks the tie.
    gap = q.masked_fill(~batch.avail, ILLEGAL).logsumexp(-1) - q_taken
    return ((q_taken - y) ** 2 + cql * gap).mean(1)


def policy_loss(target, batch, alpha, beta, cap):
    """Eq. 20, for each seed: the loss (S,) and KL(pi_i || mu_i) (S,); alpha (S, 1), beta ().

    The weight of a recorded action is how much likelier Eq. 12 makes it than mu_i does. V_i is the normaliser
    T log sum_a mu_i^(alpha/T) exp(Q'_i/T): the weights average to 1 under mu_i, and no exp(Q/T) can overflow.
    """
    with torch.no_grad():
        T = alpha + beta  # (S, 1)
        q = target(batch.state)  # (S, B, A)
        scaled = (q + alpha[..., None] * batch.log_mu) / T[..., None]
        v_over_T = scaled.masked_fill(~batch.avail, ILLEGAL).logsumexp(-1)  # (S, B)
        log_weight = (chosen(q, batch.action) - beta * chosen(batch.log_mu, batch.action)) / T - v_over_T
        weight = log_weight.exp().clamp(max=cap)
    share = batch.valid / batch.valid.sum(1, keepdim=True)
    kl = (batch.log_pi.exp() * (batch.log_pi - batch.log_mu)).sum(-1)
    return -(share * weight * chosen(batch.log_pi, batch.action)).sum(1), (share * kl).sum(1).detach()


def descend(optimizer, loss):
    """One step down a loss (S,). Its sum over seeds leaves each seed the gradient that it would have alone."""
    optimizer.zero_grad()
    loss.sum().backward()
    optimizer.step()


def turn(i, team, log_pi, rows, data, noise, beta, learn_policy, adams, losses, args):
    """One update of agent i on the sequences rows (S, L, B'), in which its teammates j play by log_pi[j].

    Each log_pi[j] is (S, L - 1, B', A); noise (S, B) in [0, 1) resamples the steps: given it, a turn is a function
    without chance or host synchronisation. Returns diagnostics, a dictionary of (S,) tensors.
    """
    N = len(team.policies)
    now = rows[:, :-1].flatten(1)  # (S, K) the minibatch's places, every entry that has a successor
    ratio = data["acted"][now]  # 0 for padding and for an episode's last observation
    if args.resampling:
        # Eq. 23, with the teammates as they are now: this is what makes the method sequential
        actions, others = data["actions"][now], [j for j in range(N) if j != i]
        log_pi_others = sum(chosen(log_pi[j].flatten(1, 2), actions[..., j]) for j in others)
        log_mu_others = data["log_mu_others"][i].gather(1, now)
        ratio = ratio * importance_ratio(log_pi_others, log_mu_others, N, args.ratio_cap)
    every = torch.arange(now.shape[1], device=now.device).expand_as(now)
    again = resample(ratio, noise) if args.resampling or args.recurrent else every
    critic_objective, policy_objective = losses
    own = unroll([team.policies[i]], [i], rows, data)[0] if learn_policy else recall(i, rows, data)
    alpha = team.log_alpha.detach().exp()

    # Policy evaluation
    batch = gather(i, again, rows, own.detach(), data)
    q_loss = critic_objective(team.critics[i], team.targets[i], batch, alpha, beta, args.gamma, args.cql)
    descend(adams["critics"][i], q_loss)
    with torch.no_grad():
        torch._foreach_lerp_(list(team.targets[i].parameters()), list(team.critics[i].parameters()), args.tau)
    logs = {"q_loss": q_loss.detach(), "sample_size": ratio.sum(1) ** 2 / (ratio**2).sum(1)}

    # Policy improvement
    if learn_policy:
        batch = gather(i, again if args.actor_data == "resampled" else every, rows, own, data)
        pi_loss, kl = policy_objective(team.targets[i], batch, alpha, beta, args.weight_cap)
        descend(adams["policies"][i], pi_loss)
        logs |= {"policy_loss": pi_loss.detach(), "kl": kl}
        if args.auto_alpha:
            descend(adams["alpha"][0], team.log_alpha.exp()[:, 0] * (args.kl_target - kl))  # Eq. 25
            team.log_alpha.data.clamp_(-12, 4)  # a target out of reach must not drive alpha to 0 or infinity
    return logs


def sweep(team, data, beta, learn_policy, generators, adams, losses, args):
    """Every agent's turn, in some order; returns the diagnostics of the last."""
    N = len(team.policies)
    seen = team.policies if args.sequential else copy.deepcopy(team.policies)  # "simultaneous": a snapshot
    rows = None
    for turns, i in enumerate(agent_order(team, data, generators, args)):
        for _ in range(args.inner):
            if rows is None or not args.recurrent:
                rows = draw(data, generators[1:], args)  # (S, L, B')
                agents = [j for j in range(N) if j != i or args.recurrent]
                with torch.no_grad():
                    now = rows[:, :-1]
                    if learn_policy:
                        log_pi = dict(zip(agents, unroll([seen[j] for j in agents], agents, now, data)))
                    else:
                        log_pi = {j: recall(j, now, data) for j in agents}
            noise = runs.uniform(generators[1:], args.batch_size)
            logs = turn(i, team, log_pi, rows, data, noise, beta, learn_policy, adams, losses, args)
        if args.recurrent and args.sequential and learn_policy and turns < N - 1:
            with torch.no_grad():  # one minibatch serves the sweep, and only agent i has moved
                log_pi[i] = unroll([team.policies[i]], [i], rows[:, :-1], data)[0]
    return logs


@torch.no_grad()
def agent_order(team, data, generators, args):
    """Who learns when in one sweep, a list of agents, the same for all seeds.

    "random" and "fixed" do not depend on which seeds train together. "semi-greedy" (A2PO, Wang et al., 2023) does: it
    gives every other place to the remaining agent with the largest mean |Q'_i(s,a_i) - E_pi Q'_i(s,.)| over a
    minibatch and all seeds, and the places between to random agents.
    """
    order = torch.randperm(len(team.policies), generator=generators[0]).tolist()
    if args.order == "fixed":
        return sorted(order)
    if args.order == "semi-greedy":
        left, order, size = order, [], []
        rows = draw(data, generators[1:], args)
        every = torch.arange(rows[0, 1:].numel(), device=rows.device).expand(len(rows), -1)
        for i, log_pi in enumerate(unroll(team.policies, range(len(team.policies)), rows, data)):
            batch = gather(i, every, rows, log_pi, data)
            q = team.targets[i](batch.state)
            size.append(((chosen(q, batch.action) - (batch.log_pi.exp() * q).sum(-1)).abs() * batch.valid).sum().item())
        while left:
            order.append(left[0] if len(order) % 2 else max(left, key=size.__getitem__))
            left.remove(order[-1])
    return order


def clone(team, data, args, generators):
    """Fit the behaviour before anything else: mu_i of each agent (Eq. 21) and the teammate model (Eq. 22)."""
    adam = torch.optim.Adam([*team.mus.parameters(), *team.teammates.parameters()], args.clone_lr, fused=True)
    args = replace(args, batch_size=args.clone_batch)
    agents, seed = range(len(team.mus)), torch.arange(len(generators), device=data["acted"].device)[:, None]
    for _ in range(args.clone_steps):
        rows = draw(data, generators, args)[:, :-1]  # (S, L - 1, B')
        log_mu = unroll(team.mus, agents, rows, data).flatten(2, 3)  # (N, S, K, A)
        rows = rows.flatten(1)  # (S, K)
        valid = data["acted"][rows]
        own = sum(chosen(log_mu[i], data["actions"][rows, i]) for i in agents)
        loss = -(own * valid).sum(1) / valid.sum(1)
        prior = None
        if args.recurrent:  # some of the steps are enough for the teammate model
            at = resample(valid, runs.uniform(generators, args.batch_size))
            rows, prior = rows.gather(1, at), log_mu.detach().movedim(0, 2)[seed, at]  # (S, B), (S, B, N, A)
        known = data["state"][rows], data["avail_actions"][rows], data["actions"][rows]
        for i in agents:
            loss = loss - teammate_log_prob(team.teammates, *known, i, prior).mean(1)
        descend(adam, loss)
    team.policies.load_state_dict(team.mus.state_dict())  # a cloned team is a good place to start from


@torch.no_grad()
def tabulate(team, data, args):
    """The behaviour never changes again, so it becomes two tables, both lists over agents i: log mu_i of every row,
    (S, R, A), and log mu(a_-i | s, a_i) of every step, (S, R)."""
    S, (R, N, A) = args.num_seeds, data["avail_actions"].shape
    log_mu, others = data["obs"].new_zeros(N, S, R, A), data["obs"].new_zeros(N, S, R)
    for rows in data["sequences"].split(max(1, 10_000 // data["sequences"].shape[1])):
        for i, table in enumerate(unroll(team.mus, range(N), rows.T.expand(S, -1, -1), data)):
            log_mu[i, :, rows.T] = table
    for r in torch.arange(R, device=log_mu.device).split(5_000):
        known = (data[name][r].expand(S, *data[name][r].shape) for name in ("state", "avail_actions", "actions"))
        state, avail, actions = known
        prior = log_mu[:, :, r].movedim(0, 2) if args.recurrent else None
        for i in range(N):
            others[i, :, r] = teammate_log_prob(team.teammates, state, avail, actions, i, prior)
    data["log_mu"] = list(log_mu.clamp_(min=-20))  # as good as never, and safe to multiply by beta
    data["log_mu_others"] = list(others)


# ---------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(policies, encode, args, step, episodes, device):
    """Play the greedy and the sampled team of every seed, all in one batch of games.

    Returns two dictionaries, of the greedy and the sampled games: "return" (S, E), undiscounted, and, where games can
    be won, "win_rate" (S, E); and the states (T+1, 2, D) of the first seed's first greedy and first sampled game.
    """
    S, N = args.num_seeds, len(policies)
    E = episodes if args.backend == "torch" else max(1, args.games // (2 * S))  # in one round
    options = {"backend": args.backend} if args.env == "smac" else {}
    game = envs.make(args.env, args.task, S * 2 * E, device, **options)
    generators = [runs.stream(args.seed + s, 10 + step, device) for s in range(S)]
    team, total, won = together(policies), [], []
    for begin in range(0, episodes, E):
        obs, info = game.reset(seed=step)
        film, score = [info["state"][[0, E]]], torch.zeros(S, 2 * E, device=device, dtype=torch.float64)
        last = torch.full((S * 2 * E, N), -1, device=device)
        h = torch.zeros(N * S, 2 * E, policies[0].hidden, device=device, dtype=torch.get_default_dtype())
        first = torch.zeros(N * S, 1, 2 * E, dtype=torch.bool, device=device)
        for _ in range(game.time_limit):
            x = encode(obs, last).view(S, 1, 2 * E, N, -1).movedim(3, 0).flatten(0, 1)  # (N S, 1, 2E, I)
            avail = info["avail_actions"].view(S, 1, 2 * E, N, -1).movedim(3, 0).flatten(0, 1)
            log_pi, h = log_probs(team, x, avail, first, h)
            actions = []
            for log_p in log_pi[:, 0].unflatten(0, (N, S)):  # (S, 2E, A)
                clocks = torch.stack([torch.empty_like(log_p[0, E:]).exponential_(generator=g) for g in generators])
                sampled = (log_p[:, E:] - clocks.log()).argmax(-1)  # which clock rings first is a draw from pi
                actions.append(torch.cat([log_p[:, :E].argmax(-1), sampled], 1).flatten())
            last = torch.stack(actions, 1)
            obs, reward, terminated, truncated, info = game.step(last)
            score += reward.view(S, 2 * E)
            film.append(info["state"][[0, E]])
            if (terminated | truncated).all():
                break
        total.append(score.view(S, 2, E))
        won.append(info.get("won", reward).view(S, 2, E).double())
    game.close()
    scores = {"return": total} | ({"win_rate": won} if "won" in info else {})
    scores = {name: torch.cat(x, 2)[..., :episodes].unbind(1) for name, x in scores.items()}
    greedy, sampled = ({name: x[mode] for name, x in scores.items()} for mode in (0, 1))
    return greedy, sampled, torch.stack(film).cpu()


def report(folder, args, team, data, dataset, encode, rows, seconds, wall, device):
    """Evaluate the last policies, and the cloned team that they started from, on ten times as many games; write
    summary.json and the pictures, print the table."""
    S, best = args.num_seeds, envs.make(args.env, args.task).best_return
    summary = {"script": "inspo", "env": args.env, "task": args.task, "dataset": args.dataset, "steps": args.steps}
    summary |= {"seeds": list(range(args.seed, args.seed + S)), "normalized_return": None, "win_rate": None}
    films = {}
    for name, key, policies in (("cloned team", "cloned_", team.mus), ("InSPO", "", team.policies)):
        greedy, sampled, films[name] = evaluate(policies, encode, args, args.steps, 10 * args.eval_episodes, device)
        for mode, scores in (("", greedy), ("sampled_", sampled)):
            summary |= {f"{key}{mode}{score}": runs.over_seeds(value) for score, value in scores.items()}
    summary |= {
        "dataset_return": dataset.returns.mean().item(), "dataset_win_rate": dataset.win_rate, "best_return": best,
        "updates_per_second": args.steps / seconds, "wall_seconds": time.perf_counter() - wall,
        "device": runs.device_name(device),
    }  # fmt: skip
    title = f"InSPO on {runs.slug(args.env, args.task, args.dataset)}, {S} seeds"
    figures = {}
    for score in ("return", "win_rate") if summary["win_rate"] else ("return",):
        columns = {score: "greedy", f"sampled_{score}": "sampled"}
        levels = {"dataset": summary[f"dataset_{score}"]}
        if score == "return" and best is not None:
            levels["best possible"] = best
        levels = {name: level for name, level in levels.items() if level is not None}
        name = score.replace("_", " ")
        figures["curve.png" if score == "return" else f"{score}.png"] = runs.draw_curves(
            rows, columns, levels, title, "updates", name
        )
        print(f"\n{title}: {folder}" if score == "return" else "")
        scores = {"InSPO": "", "behavioural cloning": "cloned_"}
        cells = {name: [summary[f"{key}{mode}{score}"] for mode in ("", "sampled_")] for name, key in scores.items()}
        runs.print_table(("greedy", "sampled"), cells, levels, name)
    if args.env == "bridge":
        strips = {"cloned team": films["cloned team"][:, 1], "InSPO": films["InSPO"][:, 0]}
        figures["policy.png"] = draw_strips(strips)
    if args.env == "matrix" and len(team.policies) == 2:
        with torch.no_grad():
            one = torch.zeros(S, 1, 1, dtype=torch.int64, device=device)
            pi = unroll(team.policies, range(2), one, data)[:, :, 0].exp()  # (2, S, 1, A)
        joint = (pi[0].mT * pi[1]).cpu()  # (S, A, A)
        summary["joint_policy"] = joint.tolist()
        tables = {"dataset": dataset.joint_actions()} | {f"seed {s}": p for s, p in zip(summary["seeds"], joint[:5])}
        figures["policy.png"] = draw_joints(tables)
        for seed, table in zip(summary["seeds"], joint.tolist()):
            print(f"joint policy, seed {seed}:  " + "   ".join(" ".join(f"{p:.2f}" for p in row) for row in table))
    runs.save_json(folder / "summary.json", summary)
    for name, figure in figures.items():
        runs.save_figure(folder / name, figure)
    return summary


# ---------------------------------------------------------------- main
def one_hot(x):
    """A function (..., D) -> (..., W) with one column for each value that an entry of x (R, D) takes.

    An entry that never changes gets none, and a value that x does not hold becomes zeros.
    """
    if (x != x.round()).any():
        raise ValueError("--one-hot needs whole numbers as observations: add --no-one-hot")
    values = [column.unique().tolist() for column in x.T]
    pairs = torch.tensor([(d, v) for d, vs in enumerate(values) if len(vs) > 1 for v in vs], device=x.device)
    if not 0 < len(pairs) <= 1000:
        raise ValueError(f"--one-hot would make {len(pairs)} inputs; it is for small grids: add --no-one-hot")
    return lambda raw: (raw[..., pairs[:, 0].long()] == pairs[:, 1]).to(torch.get_default_dtype())


def arrange(dataset, args):
    """The dataset as R rows, one for each observation, and as sequences of row numbers to draw minibatches from.

    Returns the data and the function that turns observations (..., N, O) and everybody's last actions (..., N), -1
    for none, into the policies' inputs. The data is a dictionary: obs (R, N, I), state (R, D), avail_actions
    (R, N, A); of the step that begins in a row actions (R, N), reward, done and acted (R,), 0 where none does; first
    (R,) bool where an episode begins; sequences (Q, L). These are the pairs of successive rows, or, for policies
    with a memory, whole episodes laid end to end and padded with the last row, which is empty.
    """
    dtype = torch.get_default_dtype()
    data = dataset.flatten(dtype)
    row, A = data.pop("row"), data["avail_actions"].shape[-1]
    R = len(data["obs"]) + 1
    for name in ("obs", "state", "avail_actions"):
        data[name] = torch.cat([data[name], torch.ones_like(data[name][:1])])
    data["acted"] = torch.ones_like(data["reward"])
    for name in ("actions", "reward", "done", "acted"):
        step = data[name]
        data[name] = step.new_zeros(R, *step.shape[1:]).index_copy_(0, row, step)
    data["first"] = torch.cat([row.new_ones(1), 1 - data["acted"][:-1]]).bool()
    cells = one_hot(data["obs"][:-1].flatten(0, 1)) if args.one_hot else lambda obs: obs.to(dtype)
    if args.one_hot:
        data["state"] = one_hot(data["state"][:-1])(data["state"])

    def encode(obs, last):
        seen = cells(obs)
        return torch.cat([seen, F.one_hot(last + 1, A + 1)[..., 1:].to(dtype)], -1) if args.recurrent else seen

    last = torch.where(data["first"][:, None], -1, data["actions"].roll(1, 0))
    data["obs"] = encode(data["obs"], last)
    data["sequences"] = pack(dataset.lengths + 1, R - 1) if args.recurrent else torch.stack([row, row + 1], 1)
    return data, encode


def pack(lengths, empty):
    """Lay whole episodes of `lengths` (E,) rows end to end in sequences of the longest length: (Q, L) row numbers.

    Each sequence takes the longest episode that is left, then the shortest ones as long as they fit, so that little
    is padding (the row `empty`) and every update has the same shape.
    """
    begin = lengths.cumsum(0) - lengths
    left = sorted(zip(lengths.tolist(), begin.tolist()))
    longest, sequences = left[-1][0], []
    while left:
        length, start = left.pop()
        sequence = [*range(start, start + length)]
        while left and len(sequence) + left[0][0] <= longest:
            length, start = left.pop(0)
            sequence.extend(range(start, start + length))
        sequences.append(sequence + [empty] * (longest - len(sequence)))
    return torch.tensor(sequences, device=lengths.device)


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    wall = time.perf_counter()
    torch.set_num_threads(args.threads)
    device = runs.choose_device(args.device)
    if args.backend == "sc2":
        envs.make(args.env, args.task, device=device, backend="sc2").close()  # complain now if there is no such game
    dataset = datasets.load(args.env, args.task, args.dataset, device, episodes=args.episodes)
    data, encode = arrange(dataset, args)
    S, seeds = args.num_seeds, range(args.seed, args.seed + args.num_seeds)
    (_, N, A), O, D = data["avail_actions"].shape, data["obs"].shape[-1], data["state"].shape[-1]
    team = Team(N, A, O, D, args, [runs.stream(seed, 0) for seed in seeds]).to(device)
    adams = {
        "critics": [torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True) for critic in team.critics],
        "policies": [torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True) for policy in team.policies],
        "alpha": [torch.optim.Adam([team.log_alpha], args.alpha_lr, fused=True)],
    }
    losses = [*map(runs.compiler(args.compile, device), (critic_loss, policy_loss))]
    generators = [torch.Generator().manual_seed(0), *(runs.stream(seed, 2, device) for seed in seeds)]
    step, rows, seconds = 0, [], 0.0

    tracker = runs.start_tracking("inspo", args) if args.track else None
    folder = runs.open_folder("inspo", args, device)
    saved = runs.load_checkpoint(folder, device) if args.resume else None
    if saved:
        try:
            team.load_state_dict(saved["team"])
            for adam, state in zip(sum(adams.values(), []), saved["adams"], strict=True):
                adam.load_state_dict(state)
            for generator, state in zip(generators, saved["generators"], strict=True):
                generator.set_state(state.cpu())
            step, rows, seconds, wall = saved["step"], saved["rows"], saved["seconds"], wall - saved["wall"]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise ValueError(f"{folder}/checkpoint.pt is of another run: delete it to start this one again") from None
    else:
        clone(team, data, args, [runs.stream(seed, 1, device) for seed in seeds])
    tabulate(team, data, args)

    beta = torch.zeros((), device=device)
    logs = {name: torch.zeros(S, device=device) for name in ("q_loss", "policy_loss", "kl", "sample_size")}
    while True:
        if not rows or rows[-1]["step"] < step:  # a resumed run has this evaluation already
            for name, value in logs.items():
                if not value.isfinite().all():
                    raise FloatingPointError(f"{name} is not finite after {step} updates: try smaller step sizes")
            greedy, sampled, _ = evaluate(team.policies, encode, args, step, args.eval_episodes, device)
            logs |= {name: value.mean(1) for name, value in greedy.items()}
            logs |= {f"sampled_{name}": value.mean(1) for name, value in sampled.items()}
            logs |= {"alpha": team.log_alpha.exp()[:, 0]}
            columns = {name: value.tolist() for name, value in logs.items()}
            for s, seed in enumerate(seeds):
                rows.append({"step": step, "seed": seed} | {name: value[s] for name, value in columns.items()})
            runs.save_csv(folder / "metrics.csv", rows)
            runs.save_checkpoint(folder, {
                "team": team.state_dict(), "adams": [adam.state_dict() for adam in sum(adams.values(), [])],
                "generators": [generator.get_state() for generator in generators], "step": step, "rows": rows,
                "seconds": seconds, "wall": time.perf_counter() - wall, "args": asdict(args),
            })  # fmt: skip
            speed = f"{step / seconds:7.1f} updates/s" if step else "(the cloned team)"
            score = "   ".join(
                f"{mode} {scores['return'].mean():9.4f}"
                + (f" ({scores['win_rate'].mean():.0%} won)" if "win_rate" in scores else "")
                for mode, scores in (("greedy", greedy), ("sampled", sampled))
            )
            print(f"step {step:6d}   {score}   {speed}", flush=True)
            if tracker:
                tracker.log({name: sum(value) / S for name, value in columns.items()}, step=step)
        if step == args.steps:
            break
        begin = time.perf_counter()
        for step in range(step, min(args.steps, step + args.eval_every - step % args.eval_every)):
            decay = max(0, step - args.beta_hold) / max(1, args.steps - args.beta_hold)
            beta.fill_(args.beta * (args.beta_end / args.beta) ** decay if args.beta else 0.0)
            logs |= sweep(team, data, beta, step >= args.warmup, generators, adams, losses, args)
        step += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - begin
    return report(folder, args, team, data, dataset, encode, rows, seconds, wall, device)


def parse(argv=None):
    """Read the command line; where no flag speaks, the task's own values or those of the resumed run hold."""
    read = functools.partial(tyro.cli, Args, args=argv, description=__doc__.splitlines()[0])
    args = read()
    if args.resume:
        args = read(default=replace(runs.saved_args(Args, args.out_dir), resume=True, out_dir=args.out_dir))
    elif args.env in ("matrix", "smac"):
        task = args.task or {"matrix": "xor", "smac": "5m_vs_6m"}[args.env]
        args = read(default=Args(**preset(args.env, task), env=args.env, task=task))
    if args.backend == "sc2" and args.env != "smac":
        raise ValueError("--backend sc2 plays the maps of --env smac")
    zero = "seed episodes beta beta_hold warmup cql kl_target gamma layers clone_steps"
    runs.check_numbers(args, may_be_zero=zero, at_most_one="gamma tau")
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
