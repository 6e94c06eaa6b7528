"""InSPO: In-Sample Sequential Policy Optimization (Liu et al., AAAI 2025, arXiv 2412.07639).

The problem. A team of N agents learns from a fixed dataset. Where several joint actions are equally good (both go
left, both go right), each agent's own choice looks good in the data, and yet the combination of two such choices may
be bad, or one that nobody ever took. Keeping each agent close to the data does not help: both halves are in it.

The idea. The agents learn in turns. When it is agent i's turn, the minibatch is resampled so that its teammates'
recorded actions look as if they came from their *current* policies. So agent i answers the convention that the team
leans towards by now, not the average of the dataset, and its answer tips the team further. Policies learn by weighted
cloning of recorded actions, so no policy is ever trained towards an action that was not recorded. An entropy bonus that
decays over training first flattens the behaviour's preferences, so that a rare but better convention can win. With
exact values every such turn raises J, and the team ends at a quantal response equilibrium (the paper's theorems).

Equations (numbers of the paper). Agent i acts by pi_i; mu_i is its recorded behaviour. Q_i(s, a_i) is its local value,
the joint value averaged over what its teammates do now, and Q'_i a slowly moving copy of Q_i. T = alpha + beta. E is
the mean over recorded steps, E_resampled the same with each weighted by rho_i.
  Eq. 9   J        = E sum_t gamma^t [ r_t - alpha log(pi/mu) + beta H(pi) ]          mu: who recorded the dataset
  Eq. 12  pi_i(a)  = mu_i(a)^(alpha/T) exp(Q_i(s,a)/T) / Z             the fixed point, a quantal response equilibrium
  Eq. 15  L(Q_i)   = E_resampled [ (Q_i(s,a_i) - y_i)^2 ]
          y_i      = r + gamma (1 - done) E_{a ~ pi_i(s')} [ Q'_i(s',a) - alpha log(pi_i/mu_i) - beta log pi_i ]
  Eq. 20  L(pi_i)  = -E [ exp( (Q'_i(s,a_i) - V_i(s) - beta log mu_i(a_i|s)) / T ) log pi_i(a_i|s) ]
          V_i(s)   = T log sum_a mu_i(a|s)^(alpha/T) exp(Q'_i(s,a)/T)      T log Z: it only rescales how a state counts
  Eq. 21  L(mu_i)  = -E log mu_i(a_i|s)                                behavioural cloning
  Eq. 22  L(mu)    = -E log mu(a_-i|s,a_i)                             the teammates, one after the other
  Eq. 23  rho_i    = ( prod_{j != i} pi_j(a_j|s) / mu(a_-i|s,a_i) )^(1/(N-1))        at most --ratio-cap
  Eq. 24  L(Q_i)   = Eq. 15 + cql E_resampled [ logsumexp_a Q_i(s,a) - Q_i(s,a_i) ]
  Eq. 25  L(alpha) = -alpha E [ KL(pi_i || mu_i) - target ]
The public text of the paper has lost its formulas. Eqs. 9 to 25 follow from its words; the forms of V_i (Eq. 20) and of
the conservative term (Eq. 24), and that beta is what decays, are our reading.

Commands, and the return you should see (mean of all seeds; one CPU core of a small server, torch 2.13):
  python algorithms/inspo.py                                              Bridge, mixed data, 5 seeds at once, 50 s:
      greedy -1.2355 (the best possible) in 5 of 5 seeds, sampled -1.24 to -1.25; the data -9.31, cloning -13.6
  python algorithms/inspo.py --env matrix --task xor --num-seeds 10       aa-ab-ba, 17 s: 1 in 10 of 10, cloning 0.45
  python algorithms/inspo.py --env matrix --task m-ne --num-seeds 10      imbalanced, 32 s: 20 in 10 of 10, cloning 3.6
  ... with --beta 0                                                       5: caught in the data's local optimum
  ... on xor with --no-resampling                                         0: both play the action nobody combined
  ... on xor with --no-sequential        still 1: it fails where policies move all the way within a turn, see inspo.md
  python algorithms/inspo.py --env smac --num-seeds 5    5m_vs_6m, medium-replay data, 8 min beside other work: by
      sampling it wins 28 % of the battles, its clones 2 %, the data 9 %; greedily both win 48 %. By default 3 seeds

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, inspo
  S, N, A, M = 2, 2, 3, 500                                        # seeds, agents, actions, steps of one long episode
  args = inspo.Args(num_seeds=S, steps=100, batch_size=64, clone_steps=50)
  obs, state = torch.rand(M + 2, N, 4), torch.rand(M + 2, 6)       # the last row is padding, the one before it the end
  last, action = torch.arange(M + 2) >= M, torch.randint(A, (M + 2, N))
  reward = (action[:, 0] == action[:, 1]) * (~last).float()
  data = inspo.Data(obs, state, torch.ones(M + 2, N, A).bool(), action, reward, 0 * reward, (~last).float(),
                    torch.arange(M + 2) == 0, torch.arange(M)[:, None] + torch.arange(2))  # sequences: a row, the next
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = inspo.Team(data, args, generators)
  adams, behaviour = inspo.optimizers(team, args), inspo.clone(team, data, generators, args)
  for step in range(args.steps):
      inspo.schedule(team, adams, step, args)
      logs = inspo.update(team, adams, data, behaviour, inspo.draw_noise(generators, N, args), [0, 1], True, args)

Choices made here (the authors have published no code):
  1. alpha, beta, cql, step sizes and lengths are ours. One alpha serves all agents of a seed, one network models all
     teammates.
  2. Policies start as copies of the cloned mu_i. Two layers of 64 units do what the paper's three of 256 do, faster.
  3. In games such as M-NE, beta stays at its start until the policies have flattened, and the Q-functions get a head
     start; see `preset` for the weights in units of the payoffs. On Bridge, where a detour of one cell is worth .02,
     and in games that nobody tuned, alpha, the conservative weight and the step sizes fall at the end (--cooldown).
  4. Steps are resampled within the minibatch that was drawn, not from the whole dataset. On XOR and in the
     coordination game Eq. 20 uses the resampled minibatch too (--actor-data).
  5. Bridge's cells enter the networks as one-hot values. A time limit is not the end: Q looks beyond it (the step that
     meets the limit pays 0 by Bridge's rules, in these data as in AlberDICE's, and is used as it stands).
  6. Who goes first is drawn once for all seeds, from a stream that no flag changes.
  7. In battles there is no entropy bonus (beta = 0), alpha is 0.4 (a battle pays up to 20), and the Q-functions learn
     alone for the first 1,500 updates, as Eq. 20's weights are no better than the Q-functions.

Policies with a memory (--recurrent, the default in StarCraft-like battles, --env smac). There pi_i and mu_i are GRUs
that see agent i's views and last actions; the Q-functions see the state. A minibatch consists of whole episodes, laid
end to end in sequences of one length. Eq. 23 is a ratio of single steps, so single steps are resampled from it. One
minibatch serves a whole sweep: after agent i's turn only log pi_i has to be unrolled again. Without a memory the same
code runs on "sequences" of two rows, an observation and the next.

Shapes: S seeds, B steps or B' sequences of a minibatch, L rows of a sequence, K = (L - 1) B' its steps, N agents,
A actions, O observation, I inputs, D state, R rows (observations).
"""

import copy
import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is loaded, Ctrl-C ends the program without a traceback
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.adam import adam as adam_step

ILLEGAL = -1e10  # the logit of an action that is not available


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "bridge"  # the environment: bridge, matrix, smac, or module:factory
    task: str = ""  # its task: a map of smac; for matrix a name, or any payoff table as JSON
    dataset: str = "mixed"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in an environment that is not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 5  # how many seeds train, all at once
    steps: int = 4000  # updates; each is a sweep that trains every agent's Q-function and policy once
    eval_every: int = 100  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 32  # games per seed and evaluation, each played greedily and by sampling; 0 for none
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads; networks this small gain little from more, and lose much on a busy machine
    compile: bool = torch.cuda.is_available()  # compile each turn of an agent, as one graph, with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/inspo
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    backend: Literal["torch", "sc2"] = "torch"  # smac: evaluate in our simulator, or in the real StarCraft II
    games: int = 8  # sc2: battles at once, each a process of about 1 GB; at least one a seed
    # --- the method
    alpha: float = 0.02  # weight of the KL divergence to the behaviour
    auto_alpha: bool = False  # tune alpha until the KL divergence meets --kl-target (Eq. 25)
    kl_target: float = 1.0  # the KL divergence that --auto-alpha aims at, in nats
    beta: float = 0.05  # weight of the entropy at the start; 0 leaves it out
    beta_end: float = 0.001  # weight of the entropy at the end; it decays exponentially
    beta_hold: int = 0  # updates before beta begins to decay
    warmup: int = 0  # updates in which only the Q-functions learn
    cql: float = 0.1  # weight of the conservative term in Eq. 24
    order: Literal["random", "fixed", "semi-greedy"] = "random"  # in which order agents take their turns
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
    sequences: int = 8  # recurrent: sequences of whole episodes per sweep, from which the Q-functions' steps are drawn
    batch_size: int = 128  # recorded steps per turn; recurrent: of the Q-functions, policies learn from all
    policy_lr: float = 1e-3  # Adam's step size for the policies
    critic_lr: float = 3e-3  # Adam's step size for the Q-functions
    alpha_lr: float = 1e-3  # Adam's step size for log alpha
    cooldown: float = 0.6  # the share of the updates, the last ones, in which weights and then step sizes fall
    tau: float = 0.05  # how far a target network moves in a gradient step
    weight_cap: float = 100.0  # largest weight in the policy loss
    ratio_cap: float = 100.0  # largest importance ratio
    clone_steps: int = 1000  # updates of the behaviour models before the sweeps, at most
    hold_back: float = 0.0  # share of the episodes by which they are judged: each seed stops where they get no better
    clone_lr: float = 2e-3  # their step size
    clone_batch: int = 128  # their minibatch; recurrent: of the teammate model, mu_i learn from --sequences


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end, and at last one row of padding.

    In an episode's last row, and in the padding, no step begins: there acted, actions, reward and done are 0.
    """

    obs: torch.Tensor  # (R, N, I) what the policies see; with a memory their last action belongs to it
    state: torch.Tensor  # (R, D) what the Q-functions see
    avail: torch.Tensor  # (R, N, A) bool, the available actions
    actions: torch.Tensor  # (R, N) int64, of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    acted: torch.Tensor  # (R,) 1 where there is a step
    first: torch.Tensor  # (R,) bool: an episode begins
    sequences: torch.Tensor  # (Q, L) row numbers: successive pairs (L = 2), or whole episodes end to end, padded


class Behaviour(NamedTuple):
    """What the cloned models say of every row. They never change again, so each agent i has two tables."""

    log_mu: list  # of (S, R, A): log mu_i(.|s)
    log_mu_others: list  # of (S, R): log mu(a_-i | s, a_i) of the recorded joint actions


class Noise(NamedTuple):
    """Uniform numbers in [0, 1) for a sweep of N x inner turns; given them, an update is a function without chance."""

    rows: list  # of (S, B'): which sequences to draw, for each turn; with a memory once for the sweep
    steps: list  # of (S, B): which of their steps to draw again, for each turn


def uniform(generators, *shape):
    """Uniform numbers in [0, 1), (S, *shape), each seed's from its own generator."""
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])


def draw_noise(generators, num_agents, args):
    """The `Noise` of one sweep."""
    rows, steps = [], []
    for _ in range(num_agents * args.inner):
        if not (args.recurrent and rows):
            rows.append(uniform(generators, args.sequences if args.recurrent else args.batch_size))
        steps.append(uniform(generators, args.batch_size))
    return Noise(rows, steps)


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
    """S independent gated recurrent units with the weights' layout and equations of nn.GRU, as batched products."""

    def __init__(self, inputs, hidden, generators):
        super().__init__()
        bound = hidden**-0.5
        start = [torch.empty(inputs + hidden + 2, 3 * hidden).uniform_(-bound, bound, generator=g) for g in generators]
        split = torch.stack(start).split([inputs, hidden, 1, 1], 1)  # columns: reset, update, new
        self.input, self.state, self.input_bias, self.state_bias = (nn.Parameter(part.clone()) for part in split)

    def forward(self, x, first, h):
        """Run over sequences x (S, L, B, I) from h (S, B, H), forgetting where first (S, L, B): (S, L, B, H)."""
        S, L, B, _ = x.shape
        sizes, states = [2 * h.shape[-1], h.shape[-1]], []  # reset and update; new
        gates = torch.baddbmm(self.input_bias, x.flatten(1, 2), self.input).view(S, L, B, -1).split(sizes, -1)
        keep = (~first)[..., None].to(x.dtype)
        for gate, new, kept in zip(*(each.unbind(1) for each in (*gates, keep))):
            h = h * kept
            past, past_new = torch.baddbmm(self.state_bias, h, self.state).split(sizes, -1)  # (S, B, 2H), (S, B, H)
            reset, update = (gate + past).sigmoid().chunk(2, -1)
            h = torch.lerp((new + reset * past_new).tanh(), h, update)
            states.append(h)
        return torch.stack(states, 1)


class Policy(nn.Module):
    """Log-probabilities of all actions along sequences of one agent's inputs."""

    def __init__(self, inputs, outputs, args, generators):
        super().__init__()
        self.hidden, self.outputs = args.hidden * args.recurrent, outputs
        if args.recurrent:  # it remembers what it saw and did: no single observation shows the whole battle
            self.encoder = nn.Sequential(Linear(inputs, args.hidden, generators), nn.ReLU())
            self.gru = GRU(args.hidden, args.hidden, generators)
            self.head = Linear(args.hidden, outputs, generators)
        else:
            self.body = mlp(inputs, outputs, args, generators)

    def forward(self, x, avail, first, h):
        """x (S, L, B, I), avail (S, L, B, A), first (S, L, B), True where an episode begins, and memory h (S, B, H), or
        (S, B, 0) without one -> (S, L, B, A), the last memory. An action that is not available has no mass."""
        if self.hidden:
            states = self.gru(self.encoder(x.flatten(1, 2)).unflatten(1, x.shape[1:3]), first, h)
            logits, h = self.head(states.flatten(1, 2)), states[:, -1]
        else:
            logits = self.body(x.flatten(1, 2))
        return F.log_softmax(logits.view_as(avail).masked_fill(~avail, ILLEGAL), -1), h


class Team(nn.Module):
    """Everything that S teams learn. Each agent has networks of its own, or its turn would change the others."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, N, A), I, D = data.avail.shape, data.obs.shape[-1], data.state.shape[-1]
        self.mus = nn.ModuleList(Policy(I, A, args, generators) for _ in range(N))  # behaviour, Eq. 21
        self.teammates = mlp(D + N + N * A, A, args, generators)  # joint behaviour, Eq. 22
        self.critics = nn.ModuleList(mlp(D, A, args, generators) for _ in range(N))  # Q_i(s, .), one output an action
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.policies = copy.deepcopy(self.mus)
        if not args.sequential:  # what the teammates see: the policies as they were when the sweep began
            self.before = copy.deepcopy(self.mus).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.full((len(generators), 1), math.log(args.alpha)))  # (S, 1)
        self.register_buffer("beta", torch.zeros(()), persistent=False)  # weight of the entropy now, see `schedule`
        self.register_buffer("left", torch.ones(()), persistent=False)  # what is left of alpha and cql

    def alpha(self, args):
        """The weight of the KL divergence now, (S, 1)."""
        return self.log_alpha.detach().exp() * (1 if args.auto_alpha else self.left)


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


# ---------------------------------------------------------------- looking at the data
def draw(noise, data):
    """Sequences for each seed as row numbers (S, L, B'), chosen by uniform numbers, noise (S, B')."""
    return data.sequences[noise.mul(len(data.sequences)).long()].mT


def unroll(policies, agents, rows, data):
    """log_pi of the agents' policies along the sequences rows (S, L, B): (len(agents), S, L, B, A)."""
    n, (S, _, B) = len(agents), rows.shape
    obs, avail = (torch.stack([table[rows, i] for i in agents]) for table in (data.obs, data.avail))
    h = obs.new_zeros(n * S, B, policies[0].hidden)
    first = data.first[rows].repeat(n, 1, 1)
    policy = together(policies) if n > 1 else policies[0]
    return policy(obs.flatten(0, 1), avail.flatten(0, 1), first, h)[0].unflatten(0, (n, S))


def recall(table, rows):
    """Each seed's entries of its own table: (S, R, A), rows (S, ...) -> (S, ..., A). Of log mu_i it is what `unroll`
    returns for a policy that is still the cloned mu_i."""
    return table[torch.arange(len(rows), device=rows.device).view(-1, *[1] * (rows.dim() - 1)), rows]


def look(agents, policies, data, behaviour, noise, improve):
    """Draw a minibatch and see how these agents play in it now: row numbers (S, L, B'), and {j: log_pi_j}, each
    (S, L - 1, B', A). As long as no policy learns (improve is False), all still are their clones."""
    rows = draw(noise, data)
    now = rows[:, :-1]
    with torch.no_grad():
        if not improve:
            return rows, {j: recall(behaviour.log_mu[j], now) for j in agents}
        return rows, dict(zip(agents, unroll([policies[j] for j in agents], agents, now, data)))


# ---------------------------------------------------------------- losses
def importance_ratio(log_pi_others, log_mu_others, num_agents, cap):
    """Eq. 23: the geometric mean over teammates of pi_j / mu, (S, B); both inputs are sums of logs over teammates."""
    return ((log_pi_others - log_mu_others) / (num_agents - 1)).exp().clamp(1e-10, cap)


def resample(ratio, noise):
    """Draw places in the minibatch with replacement, with probability ratio / sum(ratio).

    ratio (S, K), noise (S, B) in [0, 1): the places (S, B); one whose ratio is 0 is never drawn.
    """
    cumulative = ratio.cumsum(1)
    places = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True)  # the first sum above it
    return places.clamp(max=ratio.shape[1] - 1)  # if rounding led past the end


@torch.no_grad()
def soft_target(q, log_pi, log_mu, reward, done, alpha, beta, gamma):
    """Eq. 15: y_i (S, B) from Q'_i, log pi_i and log mu_i of the next state (S, B, A); alpha (S, 1), beta (). As in the
    paper, it leaves out the others' KL and entropy."""
    soft = q - alpha[..., None] * (log_pi - log_mu) - beta * log_pi
    return reward + gamma * (1 - done) * (log_pi.exp() * soft).sum(-1)


def critic_loss(q, y, action, avail, valid, cql):
    """Eq. 24, for each seed (S,), from Q_i (S, B, A); valid (S, B) is 1 where there is a step."""
    q_taken = chosen(q, action)
    # Between conventions that pay the same, the squared error has no preference. This term has one: it lifts the
    # resampled actions, those that go with what the teammates do now, and so breaks the tie.
    gap = q.masked_fill(~avail, ILLEGAL).logsumexp(-1) - q_taken
    return (valid / valid.sum(1, keepdim=True) * ((q_taken - y) ** 2 + cql * gap)).sum(1)


@torch.no_grad()
def policy_weight(q, log_mu, action, avail, alpha, beta, cap):
    """The weight of a recorded action in Eq. 20, (S, B): how much likelier Eq. 12 makes it than mu_i does. With this
    V_i they average to 1 under mu_i, and no exp(Q/T) can overflow. q is Q'_i, as log_mu (S, B, A); alpha (S, 1)."""
    T = alpha + beta  # (S, 1)
    scaled = (q + alpha[..., None] * log_mu) / T[..., None]
    v_over_T = scaled.masked_fill(~avail, ILLEGAL).logsumexp(-1)  # (S, B)
    return ((chosen(q, action) - beta * chosen(log_mu, action)) / T - v_over_T).exp().clamp(max=cap)


def policy_loss(log_pi, log_mu, action, weight, valid):
    """Eq. 20, for each seed: the loss (S,) and KL(pi_i || mu_i) (S,); valid (S, B) is 1 where there is a step."""
    share, kl = valid / valid.sum(1, keepdim=True), (log_pi.exp() * (log_pi - log_mu)).sum(-1)
    return -(share * weight * chosen(log_pi, action)).sum(1), (share * kl).sum(1).detach()


# ---------------------------------------------------------------- update
class Adam(nn.Module):
    """Adam with all that it knows in tensors, so that a graph can hold a whole update: torch's own class breaks it.

    The arithmetic is torch's: on a CPU fused, elsewhere and in a graph op by op, for the compiler to fuse.
    """

    def __init__(self, parameters, lr):
        super().__init__()
        self.moved = list(parameters)
        self.means, self.squares = (nn.ParameterList(map(torch.zeros_like, self.moved)) for _ in range(2))
        self.counts = nn.ParameterList(p.new_zeros((), dtype=torch.float64) for p in self.moved)
        self.requires_grad_(False)
        self.register_buffer("lr", self.moved[0].new_tensor(lr, dtype=torch.float64))  # may change between updates

    @torch.no_grad()
    def step(self, gradients):
        fused = self.lr.device.type == "cpu" and not torch.compiler.is_compiling()
        state = (list(each) for each in (self.means, self.squares, (), self.counts))
        how = dict(fused=fused, foreach=not fused, capturable=not fused, amsgrad=False, maximize=False)
        how |= dict(lr=self.lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
        gradients = [gradient.contiguous() for gradient in gradients]  # fused on a CPU, it takes strides for granted
        adam_step(self.moved, gradients, *state, **how)


def optimizers(team, args):
    """Adam for each agent's Q-function and policy, and for log alpha."""
    return {
        "critics": [Adam(critic.parameters(), args.critic_lr) for critic in team.critics],
        "policies": [Adam(policy.parameters(), args.policy_lr) for policy in team.policies],
        "alpha": Adam([team.log_alpha], args.alpha_lr),
    }


def descend(adam, loss):
    """One step down a loss (S,). Its sum over seeds leaves each seed the gradient that it would have alone."""
    adam.step(torch.autograd.grad(loss.sum(), adam.moved))


def turn(i, team, seen, adams, data, behaviour, view, row_noise, step_noise, improve, args):
    """One update of agent i, its Q-function and, if policies `improve` by now, its policy: diagnostics, (S,) tensors.

    Args:
        seen: the policies by which teammates are judged, `team.policies` or their copy from when the sweep began.
        view: the sweep's minibatch as `look` returns it, or None to draw one of its own by row_noise (S, B').
        step_noise: (S, B) in [0, 1), which resamples its steps.
    """
    N = len(team.policies)
    others = [j for j in range(N) if j != i]
    rows, log_pi = view or look(others, seen, data, behaviour, row_noise, improve)
    now = rows[:, :-1].flatten(1)  # (S, K) the minibatch's places, every entry that has a successor
    ratio = data.acted[now]  # 0 for padding and for an episode's last observation
    if args.resampling:
        # Eq. 23, with the teammates as they are now: this is what makes the method sequential
        actions = data.actions[now]  # (S, K, N)
        log_pi_others = sum(chosen(log_pi[j].flatten(1, 2), actions[..., j]) for j in others)
        log_mu_others = behaviour.log_mu_others[i].gather(1, now)
        ratio = ratio * importance_ratio(log_pi_others, log_mu_others, N, args.ratio_cap)
    every = torch.arange(now.shape[1], device=now.device).expand_as(now)
    again = resample(ratio, step_noise) if args.resampling or args.recurrent else every
    log_mu = behaviour.log_mu[i]
    own = unroll([team.policies[i]], [i], rows, data)[0] if improve else recall(log_mu, rows)  # (S, L, B', A)
    alpha, beta, cql = team.alpha(args), team.beta, args.cql * team.left

    # Policy evaluation
    row, after = now.gather(1, again), rows[:, 1:].flatten(1).gather(1, again)  # (S, B): where a step begins and ends
    next_pi, next_mu = recall(own.detach()[:, 1:].flatten(1, 2), again), recall(log_mu, after)  # (S, B, A), logs
    paid, next_q = (data.reward[row], data.done[row]), team.targets[i](data.state[after])
    y = soft_target(next_q, next_pi, next_mu, *paid, alpha, beta, args.gamma)
    taken = data.actions[row, i], data.avail[row, i]
    q_loss = critic_loss(team.critics[i](data.state[row]), y, *taken, data.acted[row], cql)
    descend(adams["critics"][i], q_loss)
    with torch.no_grad():
        torch._foreach_lerp_(list(team.targets[i].parameters()), list(team.critics[i].parameters()), args.tau)
    effective = ratio.sum(1) ** 2 / (ratio**2).sum(1)  # as many equally weighted steps would tell as much
    logs = {"q_loss": q_loss.detach(), "sample_size": effective}

    # Policy improvement
    if improve:
        at = again if args.actor_data == "resampled" else every
        row, own = now.gather(1, at), recall(own[:, :-1].flatten(1, 2), at)
        action, mu, q = data.actions[row, i], recall(log_mu, row), team.targets[i](data.state[row])
        weight = policy_weight(q, mu, action, data.avail[row, i], alpha, beta, args.weight_cap)
        pi_loss, kl = policy_loss(own, mu, action, weight, data.acted[row])
        descend(adams["policies"][i], pi_loss)
        logs |= {"policy_loss": pi_loss.detach(), "kl": kl}
        if args.auto_alpha:
            descend(adams["alpha"], team.log_alpha.exp()[:, 0] * (args.kl_target - kl))  # Eq. 25
            with torch.no_grad():
                team.log_alpha.clamp_(-12, 4)  # a target out of reach must not drive alpha to 0 or infinity
    return logs


def update(team, adams, data, behaviour, noise, order, improve, args, turn=turn, look=look):
    """One sweep: every agent's turn, in this order, for all seeds; returns the diagnostics of the last turn.

    `turn` and `look` can be given in compiled form.
    """
    seen, view = team.policies, None
    if not args.sequential:  # "simultaneous": all see the policies as they are now
        seen = team.before
        torch._foreach_copy_(list(seen.parameters()), [p.detach() for p in team.policies.parameters()])
    if args.recurrent:  # one minibatch serves the sweep
        view = look(range(len(order)), seen, data, behaviour, noise.rows[0], improve)
    turns = [i for i in order for _ in range(args.inner)]
    for t, i in enumerate(turns):
        mine = None if args.recurrent else noise.rows[t]
        logs = turn(i, team, seen, adams, data, behaviour, view, mine, noise.steps[t], improve, args)
        if args.recurrent and args.sequential and improve and turns[t + 1 :] and turns[t + 1] != i:
            view[1].update(look([i], seen, data, behaviour, noise.rows[0], True)[1])  # only agent i has moved
    return logs


def schedule(team, adams, step, args):
    """Set what changes from update to update. The weight of the entropy is held at first, then it falls exponentially,
    to its end in the last one. What would make the last team a matter of luck falls at the end (--cooldown): first, to
    a tenth, alpha (not with --auto-alpha) and the conservative weight together, as their ratio breaks ties; then, to 0,
    the step sizes."""
    decay = max(0, step - args.beta_hold) / max(1, args.steps - 1 - args.beta_hold)
    team.beta.fill_(args.beta * (args.beta_end / args.beta) ** decay if args.beta else 0.0)
    half = max(1.0, args.cooldown * args.steps / 2)
    team.left.fill_(0.1 ** min(1.0, max(0.0, (step - args.steps) / half + 2)) if args.cooldown else 1.0)
    left = min(1.0, (args.steps - step) / half)
    for name, lr in (("critics", args.critic_lr), ("policies", args.policy_lr)):
        for each in adams[name]:
            each.lr.fill_(left * lr)


@torch.no_grad()
def semi_greedy(order, team, data, noise):
    """A2PO's order of the agents (Wang et al., 2023), the same for all seeds.

    Every other place goes to the remaining agent with the largest mean |Q'_i(s,a_i) - E_pi Q'_i(s,.)| over a minibatch
    and all seeds, those between to the agents as they come in `order`. It waits for the device, once.
    """
    rows, size = draw(noise, data), []
    now = rows[:, :-1].flatten(1)  # (S, K)
    for i, log_pi in enumerate(unroll(team.policies, range(len(order)), rows, data)):
        q = team.targets[i](data.state[now])  # (S, K, A)
        mean = (log_pi[:, :-1].flatten(1, 2).exp() * q).sum(-1)
        size.append(((chosen(q, data.actions[now, i]) - mean).abs() * data.acted[now]).sum())
    left, order, size = list(order), [], torch.stack(size).tolist()
    while left:
        order.append(left[0] if len(order) % 2 else max(left, key=size.__getitem__))
        left.remove(order[-1])
    return order


# ---------------------------------------------------------------- behaviour
def clone_loss(team, data, rows, args, step_noise=None):
    """For each seed, (S,): the loss of mu_i of each agent (Eq. 21) and of the teammate model (Eq. 22) on the sequences
    rows (S, L, B'); with a memory step_noise (S, B) draws the steps that the teammate model learns from."""
    agents, rows = range(len(team.mus)), rows[:, :-1]  # (S, L - 1, B')
    log_mu = unroll(team.mus, agents, rows, data).flatten(2, 3)  # (N, S, K, A)
    rows = rows.flatten(1)  # (S, K)
    valid = data.acted[rows]
    own = sum(chosen(log_mu[i], data.actions[rows, i]) for i in agents)
    loss = -(own * valid).sum(1) / valid.sum(1)
    prior = None
    if args.recurrent:  # some of the steps are enough for the teammate model
        at = resample(valid, step_noise)
        rows, prior = rows.gather(1, at), recall(log_mu.detach().movedim(0, 2), at)  # (S, B), (S, B, N, A)
    known = data.state[rows], data.avail[rows], data.actions[rows]
    for i in agents:
        loss = loss - teammate_log_prob(team.teammates, *known, i, prior).mean(1)
    return loss


def clone_update(team, adam, data, args, row_noise, step_noise=None):
    """One update of the behaviour on sequences that row_noise (S, B') draws."""
    descend(adam, clone_loss(team, data, draw(row_noise, data), args, step_noise))


def clone(team, data, generators, args, clone_update=clone_update, judge=None):
    """Fit the behaviour before anything else, start the policies from it, and return it as a `Behaviour`.

    judge: a `data.layout.Judge`, which holds episodes back and ends it when these get no likelier.
    """
    adam, S = Adam([*team.mus.parameters(), *team.teammates.parameters()], args.clone_lr), args.num_seeds
    learned = data._replace(sequences=judge.rest) if judge else data
    sizes = [args.sequences, args.clone_batch] if args.recurrent else [args.clone_batch]
    even = torch.linspace(0, 0.999, args.clone_batch, device=data.obs.device).expand(S, -1)

    def held_loss():
        return clone_loss(team, data, judge.held.mT.expand(S, -1, -1), args, even)

    for step in range(1, args.clone_steps + 1):
        clone_update(team, adam, learned, args, *(uniform(generators, size) for size in sizes))
        if judge and judge.over(step, adam.moved, held_loss):
            break
    team.policies.load_state_dict(team.mus.state_dict())  # a cloned team is a good place to start from
    return tabulate(team, data, args)


@torch.no_grad()
def tabulate(team, data, args):
    """The behaviour never changes again, so it becomes tables: a `Behaviour`."""
    S, (R, N, A) = args.num_seeds, data.avail.shape
    log_mu, others = data.obs.new_zeros(N, S, R, A), data.obs.new_zeros(N, S, R)
    for rows in data.sequences.split(max(1, 10_000 // data.sequences.shape[1])):
        for i, table in enumerate(unroll(team.mus, range(N), rows.T.expand(S, -1, -1), data)):
            log_mu[i, :, rows.T] = table
    for r in torch.arange(R, device=log_mu.device).split(5_000):
        state, avail, actions = (x[r].expand(S, *x[r].shape) for x in (data.state, data.avail, data.actions))
        prior = log_mu[:, :, r].movedim(0, 2) if args.recurrent else None
        for i in range(N):
            others[i, :, r] = teammate_log_prob(team.teammates, state, avail, actions, i, prior)
    log_mu.clamp_(min=-20)  # as good as never, and safe to multiply by beta
    return Behaviour(list(log_mu), list(others))


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "runs.py").exists() and (HOME / "envs" / "play.py").exists():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    import data as datasets
    import envs
    from data import layout, runs
    from envs.bridge import draw_strips
    from envs.matrix import draw_policies
elif __name__ == "__main__":
    sys.exit("error: this file runs inside its repository, beside data/ and envs/; alone, it is to be imported")


def preset(args):
    """What differs from Bridge's values, above, in the other environments; each value can be set by its flag."""
    env, task, values = args.env, args.task or {"smac": "5m_vs_6m", "matrix": "xor"}.get(args.env, ""), {}
    if env == "smac":
        count = max(2, 560 // envs.make(env, task).time_limit)  # so that they hold some 500 steps
        values = dict(dataset="medium-replay", num_seeds=3, steps=2500, warmup=1500, eval_every=500, recurrent=True)
        values |= dict(one_hot=False, alpha=0.4, beta=0.0, batch_size=512, critic_lr=2e-3, sequences=count)
        values |= dict(clone_steps=2000, clone_lr=1e-3, cooldown=0.0)
    elif env == "matrix":
        payoff, name = envs.make(env, task).payoff, "aa-ab-ba" if task == "xor" else datasets.names(env, task)[-1]
        values = dict(dataset=name, steps=1500, one_hot=False, clone_lr=1e-3, cooldown=0.0)
        if task in ("xor", "coordination"):  # conventions that pay the same; a tie breaks where alpha + beta < cql / 2
            values |= dict(beta=0.1, cql=0.5, actor_data="resampled", batch_size=64, policy_lr=5e-4, critic_lr=1e-3)
            values |= dict(clone_steps=300)
        else:  # unequal ones: beta starts at the largest difference between payoffs, the other weights in proportion
            unit = (payoff.max() - payoff.min()).item() / 200 or 1.0
            values |= dict(alpha=unit, beta=200 * unit, beta_end=0.1 * unit, cql=5 * unit, beta_hold=500, warmup=200)
            values |= dict(batch_size=256, weight_cap=1000.0, ratio_cap=1000.0, clone_batch=256)
    elif env != "bridge":  # not ours: weights in units of the spread of the data's returns
        unit, cells = layout.scales(datasets.load("", "", args.dataset))
        values = dict(dataset="", num_seeds=3, one_hot=cells, alpha=0.05 * unit, beta=0.01 * unit)
        values |= dict(beta_end=0.001 * unit, cql=0.02 * unit, warmup=1000, clone_steps=50_000, hold_back=0.1)
        values |= dict(batch_size=256, clone_lr=1e-3, clone_batch=256, critic_lr=1e-3, cooldown=0.4)
        values |= dict(eval_every=1000, eval_episodes=10)
    return values | dict(env=env, task=task)


def arrange(dataset, args):
    """The dataset as `Data`, and the function that makes the policies' inputs of what a game shows: `layout.teams`.
    Raises ValueError for a single agent."""
    if dataset.obs.shape[2] < 2:
        raise ValueError("InSPO is for two agents or more, and here is one")
    tensors, encode = layout.teams(dataset, args, whole=args.recurrent)
    return Data(*tensors), encode


def player(policies, encode):
    """The teams of all seeds as they play: a `data.team.Player`."""
    policy, N = together(policies), len(policies)

    def think(*seen):  # x, avail, h
        x, avail, h = (each.movedim(2, 0).flatten(0, 1) for each in seen)  # (N S, B, ...)
        goes_on = torch.zeros(len(x), 1, x.shape[1], dtype=torch.bool, device=x.device)
        log_pi, h = policy(x[:, None], avail[:, None], goes_on, h)
        return (each.unflatten(0, (N, -1)).movedim(0, 2) for each in (log_pi[:, 0], h))  # (S, B, N, ...)

    return runs.Player(think, encode, N, policies[0].outputs, policies[0].hidden)


def evaluate(policies, encode, args, step, episodes, device, film=None):
    """Scores (S, E) of the teams of all seeds, greedily and by sampling, and what happened: `runs.score`."""
    teams = player(policies, encode)
    return runs.score(teams, args, step, episodes, device, teams.memory, teams.clocks, film)


@torch.no_grad()
def draw_pictures(args, team, data, dataset, films, seeds):
    """What the teams came to: on Bridge film strips, in a game of two agents the tables of their joint actions."""
    if args.env == "bridge" and films["InSPO"]:
        strips = {"cloned team": films["behavioural cloning"][1], "InSPO": films["InSPO"][0]}  # sampled, greedy
        return {"policy.png": draw_strips(strips)}, {}
    if args.env != "matrix" or len(team.policies) != 2:
        return {}, {}
    one = torch.zeros(len(seeds), 1, 1, dtype=torch.int64, device=data.obs.device)  # a row: there is one state
    figure, joint = draw_policies(unroll(team.policies, range(2), one, data)[:, :, 0, 0].exp(), dataset, seeds)
    return {"policy.png": figure}, {"joint_policy": joint.tolist()}


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("inspo", args)
    device = run.device
    dataset = run.load(True, episodes=args.episodes)
    data, encode = arrange(dataset, args)
    team = Team(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adams, N = optimizers(team, args), data.avail.shape[1]
    shared, own = torch.Generator().manual_seed(0), [runs.stream(seed, 2, device) for seed in run.seeds]
    steps = {"turn": run.compile(turn), "look": run.compile(look)}
    if run.begin(team=team, adams=list(adams.values()), generators=[shared, *own]):
        behaviour = tabulate(team, data, args)
    else:
        generators = [runs.stream(seed, 1, device) for seed in run.seeds]
        judge = layout.judge(args, data.sequences, dataset.lengths)
        behaviour = clone(team, data, generators, args, run.compile(clone_update), judge)

    if args.steps <= args.warmup:
        runs.say(f"note: only the Q-functions learn, as --steps {args.steps} are not more than --warmup {args.warmup}")
    logs = {name: torch.zeros(args.num_seeds, device=device) for name in ("q_loss", "policy_loss", "kl", "sample_size")}
    for step in run.steps(args.steps, args.eval_every):
        if run.due(logs):
            scores = evaluate(team.policies, encode, args, step, args.eval_episodes, device)
            run.record(logs | {"alpha": team.alpha(args)[:, 0]}, {name: x.mean(1) for name, x in scores.items()})
        if step < args.steps:
            schedule(team, adams, step, args)
            order = torch.randperm(N, generator=shared).tolist()
            if args.order == "semi-greedy":
                size = args.sequences if args.recurrent else args.batch_size
                order = semi_greedy(order, team, data, uniform(own, size))
            order = sorted(order) if args.order == "fixed" else order
            noise = draw_noise(own, N, args)
            logs |= update(team, adams, data, behaviour, noise, order, step >= args.warmup, args, **steps)

    scores, films, E = {}, {"InSPO": [], "behavioural cloning": []}, 10 * args.eval_episodes
    for policies, (name, film) in zip((team.policies, team.mus), films.items()):
        scores[name] = evaluate(policies, encode, args, args.steps, E, device, film if args.env == "bridge" else None)
    figures, more = draw_pictures(args, team, data, dataset, films, run.seeds)
    others, teams = {"behavioural cloning": ("cloned_", scores["behavioural cloning"])}, player(team.policies, encode)
    run.keep_team(teams, dataset.obs.shape[2:], teams.A, teams.memory)
    return run.finish("InSPO", scores["InSPO"], dataset, run.best, others, figures, **more)


def parse(argv=None):
    """Read the command line; where no flag speaks, the task's own values or those of the resumed run hold."""
    args = runs.parse(Args, preset, argv, __doc__, "InSPO is for discrete actions", ("bridge", "matrix", "smac"))
    if args.backend == "sc2" and args.env != "smac":
        raise ValueError("--backend sc2 plays the maps of --env smac")
    zero = "seed episodes eval_episodes beta beta_hold warmup cql kl_target gamma layers clone_steps cooldown hold_back"
    runs.check_numbers(args, may_be_zero=zero, at_most_one="gamma tau cooldown hold_back")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
