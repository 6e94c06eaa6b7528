"""InSPO: In-Sample Sequential Policy Optimization (Liu et al., AAAI 2025, arXiv 2412.07639).

The problem. A team of N agents learns from a fixed dataset. Say that two joint actions are equally
good in it: both go left, or both go right. To each agent alone, left and right look the same. Two
agents that choose alone may meet in a pair that is bad, or that nobody ever recorded. Staying close
to the data does not help, as both halves are in the data.

The idea. The agents learn in turns. In agent i's turn the minibatch is resampled, so that its
teammates' recorded actions look as if their *current* policies had chosen them. Agent i thus
answers the convention towards which the team leans by now, and its answer tips the team further.
Policies learn by weighted cloning of recorded actions: none is trained towards an action that was
not recorded. An entropy bonus first flattens the preferences of the behaviour, so that a rare but
better convention can win; then it decays. With exact values no such turn lowers J, and the team
ends at a quantal response equilibrium (the paper's theorems).

Equations (numbers of the paper). Agent i acts by pi_i; mu_i is its recorded behaviour. Q_i(s,a_i)
is the joint value averaged over what the teammates do now; Q'_i is a copy that follows slowly.
T = alpha + beta. E is the mean over recorded steps, E_rho the mean over steps resampled by rho_i.
  Eq. 9   J        = E sum_t gamma^t [ r_t - alpha log(pi/mu) + beta H(pi) ]
  Eq. 12  pi_i(a)  = mu_i(a)^(alpha/T) exp(Q_i(s,a)/T) / Z       the fixed point, an equilibrium
  Eq. 15  L(Q_i)   = E_rho [ (Q_i(s,a_i) - y_i)^2 ]
          y_i      = r + gamma (1 - done) E_{a ~ pi_i(s')} [ Q'_i(s',a) - alpha log(pi_i/mu_i)
                                                             - beta log pi_i ]
  Eq. 20  L(pi_i)  = -E [ exp((Q'_i(s,a_i) - V_i(s) - beta log mu_i(a_i)) / T) log pi_i(a_i) ]
          V_i(s)   = T log Z, with the Z of Eq. 12; it only rescales how much a state counts
  Eq. 21  L(mu_i)  = -E log mu_i(a_i|s)                          behavioural cloning
  Eq. 22  L(mu)    = -E log mu(a_-i|s,a_i)                       teammates, one after the other
  Eq. 23  rho_i    = ( prod_{j != i} pi_j(a_j|s) / mu(a_-i|s,a_i) )^(1/(N-1))
  Eq. 24  L(Q_i)   = Eq. 15 + cql E_rho [ logsumexp_a Q_i(s,a) - Q_i(s,a_i) ]
  Eq. 25  L(alpha) = -alpha E [ KL(pi_i || mu_i) - target ]      only with --auto-alpha
Eq. 23 divides by how recorded teammates act given a_i, not by the product of their mu_j: so, after
resampling, they act by pi_-i whatever a_i is. Its root, a geometric mean, keeps ratios of many
teammates tame; with two agents there is none. With more it is a compromise: the resampled teammates
act only partly by pi_-i. To draw steps again instead of weighting them keeps the gradient's
variance low. Resampling corrects actions only: states stay as frequent as the data has them. The
next state's teammates need no ratio of their own, as Q'_i(s',a) has averaged over them already. Eq.
20 needs no resampling: it is about a_i alone, and Q_i knows the teammates. One update of a run is a
sweep: each agent's turn once, first its Q_i (Eq. 24), then its pi_i (Eq. 20). mu_i and mu (Eqs. 21,
22) are fitted before the sweeps and never change again.

Commands, and the return to expect (mean of all seeds; seconds on one CPU core):
  python algorithms/inspo.py
      Bridge, mixed data, 50 s: greedy -1.2355, the best possible, in 5 of 5 seeds
      sampled -1.24; the data -9.31, cloning -13.6
  python algorithms/inspo.py --env matrix --task xor --num-seeds 10
      17 s: 1 in 10 of 10 seeds; cloning 0.45; with --no-resampling 0
  python algorithms/inspo.py --env matrix --task m-ne --num-seeds 10
      32 s: 20 in 10 of 10 seeds; cloning 3.6; with --beta 0 5, the data's local optimum
  python algorithms/inspo.py --env smac --num-seeds 5
      5m_vs_6m, 8 min: sampled it wins 28 % of the battles, cloning 2 %, the data 9 %
      greedily both win 48 %

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, inspo
  S, N, A, M = 2, 2, 3, 500                         # seeds, agents, actions, steps of one episode
  args = inspo.Args(num_seeds=S, steps=100, batch_size=64, clone_steps=50)
  row = torch.arange(M + 2)                         # M is the episode's end, M + 1 is padding
  obs, state = torch.rand(M + 2, N, 4), torch.rand(M + 2, 6)
  acted, action = (row < M).float(), torch.randint(A, (M + 2, N))
  reward = (action[:, 0] == action[:, 1]) * acted
  avail, pairs = torch.ones(M + 2, N, A).bool(), torch.stack([row[:M], row[:M] + 1], 1)
  data = inspo.Data(obs, state, avail, action, reward, 0 * reward, acted, row == 0, pairs)
  generators, shared = [torch.Generator().manual_seed(s) for s in range(S)], torch.Generator()
  team = inspo.Team(data, args, generators)
  adam = inspo.optimizer(team)
  data = inspo.clone(team, data, generators, args)
  for step in range(args.steps):
      logs = inspo.update(team, adam, data, shared, generators, step, args)

Choices made here. The authors have published no code, and the public text of the paper has lost its
formulas: the equations follow from its words.
  1. The forms of V_i (Eq. 20) and of the conservative term (Eq. 24) are our reading. So is that
     beta, not alpha, is what decays.
  2. alpha, beta, cql, step sizes, batches and caps are ours, as the paper's numbers are lost.
  3. The networks have two layers of 64 units, where the paper has three of 256. A run has thousands
     of sweeps, where the paper speaks of 10^7 steps without their unit.
  4. Policies start as copies of the cloned mu_i.
  5. One alpha serves all agents of a seed; one network models all teammates of all agents.
  6. Steps are resampled within the minibatch, not from the whole dataset. The policy loss takes the
     minibatch as it was drawn; on XOR and in coordination the resampled one (--actor-data).
  7. Q-functions may get a head start (--warmup), and beta may be held before it decays
     (--beta-hold): a weight of Eq. 20 is no better than the Q-function that it is made of.
  8. In the last part of a run alpha, cql and the step sizes fall (--cooldown): else, between nearly
     equal policies, luck decides which one is the last. Not in matrix games and battles.
  9. log mu_i is at least -20 in the tables of the behaviour, so that beta log mu_i stays finite.
 10. Grid cells enter the networks as one-hot values. A time limit is not an end: Q looks beyond it.
 11. Who goes first is drawn once for all seeds. Semi-greedy order is A2PO's (Wang et al., 2023);
     the paper finds that the order hardly matters.
 12. In battles there is no entropy bonus (beta = 0), and alpha is 0.4, as a battle pays up to 20.
 13. In a game that nobody tuned, a tenth of the episodes tells when cloning stops (--hold-back).
 14. A simultaneous sweep (--no-sequential) shows everybody the policies of the sweep's beginning.

Policies with a memory (--recurrent, the preset in battles). Then pi_i and mu_i are GRUs that see
agent i's views and last actions, while the Q-functions still see the state. A minibatch consists of
whole episodes, laid end to end in sequences of one length; single steps are resampled from it, as
Eq. 23 is a ratio of single steps. One minibatch serves a whole sweep, as it is dear to unroll all
policies: after a turn only the agent that moved is unrolled again. Without a memory the same code
runs on "sequences" of two rows, an observation and the next, drawn anew for each turn.

Shapes: S seeds, B' sequences of a minibatch, L rows of a sequence, K = (L - 1) B' places where a
step may begin, B resampled steps, N agents, A actions, I inputs, D state, H memory, R rows.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

ILLEGAL = -1e10  # the logit of an action that is not available


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "bridge"  # the environment: bridge, matrix, smac, or module:factory
    task: str = ""  # its task: a map of smac; for matrix a name, or any payoff table as JSON
    dataset: str = ""  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = (
        "sum"  # of the agents' rewards, in a game that is not ours
    )
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 5  # how many seeds train, all at once
    steps: int = 4000  # updates; each is a sweep in which every agent has its turn
    eval_every: int = 100  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 32  # games per seed and evaluation, greedy and sampled; 0 for none
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads; networks this small gain little from more
    compile: bool = torch.cuda.is_available()  # compile each turn of an agent with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/inspo
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    backend: Literal["torch", "sc2"] = "torch"  # smac: our simulator, or the real StarCraft II
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
    order: Literal["random", "fixed", "semi-greedy"] = "random"  # who goes first in a sweep
    inner: int = 1  # turns that an agent has in a row
    sequential: bool = True  # show the policies as they are now, not as when the sweep began
    resampling: bool = True  # resample by Eq. 23; with --no-resampling every ratio is 1
    actor_data: Literal["uniform", "resampled"] = "uniform"  # the minibatch of the policy loss
    gamma: float = 0.99  # discount
    # --- the optimisation
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    one_hot: bool = True  # feed integer observations as one-hot values (the cells of a grid)
    recurrent: bool = False  # policies with a memory (GRU) that see their last action too
    sequences: int = 8  # recurrent: sequences of whole episodes in a sweep's minibatch
    batch_size: int = 128  # steps that Q learns from in a turn; without a memory the policy too
    policy_lr: float = 1e-3  # Adam's step size for the policies
    critic_lr: float = 3e-3  # Adam's step size for the Q-functions
    cooldown: float = 0.6  # share of the updates, the last ones, in which weights and steps fall
    tau: float = 0.05  # how far a target network moves in a turn
    weight_cap: float = 100.0  # largest weight in the policy loss
    ratio_cap: float = 100.0  # largest importance ratio
    clone_steps: int = 1000  # updates of the behaviour models before the sweeps, at most
    hold_back: float = 0.0  # share of the episodes by which the clones are judged
    clone_lr: float = 2e-3  # Adam's step size for the behaviour models
    clone_batch: int = 128  # their minibatch; recurrent: of the teammate model only


CONVENTION = dict(  # joint actions that pay the same; a tie breaks where alpha + beta < cql / 2
    alpha=0.02,
    beta=0.1,
    beta_end=0.001,
    beta_hold=0,
    warmup=0,
    cql=0.5,
    actor_data="resampled",
    batch_size=64,
    policy_lr=5e-4,
    critic_lr=1e-3,
    clone_steps=300,
    clone_batch=128,
)
PRESETS = {  # what differs from `Args`; "env task" comes on top of "env"; "" is a game not ours
    "matrix": dict(  # alpha, beta and cql in units of the largest difference between payoffs
        steps=1500,
        one_hot=False,
        cooldown=0.0,
        alpha=0.005,
        beta=1.0,
        beta_end=0.0005,
        beta_hold=500,
        warmup=200,
        cql=0.025,
        batch_size=256,
        weight_cap=1000.0,
        ratio_cap=1000.0,
        clone_lr=1e-3,
        clone_batch=256,
    ),
    "matrix xor": dict(CONVENTION, dataset="aa-ab-ba"),
    "matrix coordination": CONVENTION,
    "smac": dict(
        task="5m_vs_6m",
        num_seeds=3,
        steps=2500,
        eval_every=500,
        warmup=1500,
        recurrent=True,
        one_hot=False,
        cooldown=0.0,
        alpha=0.4,
        beta=0.0,
        batch_size=512,  # sequences: they hold some 500 steps
        critic_lr=2e-3,
        clone_lr=1e-3,
        clone_steps=2000,
    ),
    "smac 3m": dict(sequences=9),
    "smac 8m": dict(sequences=4),
    "smac 2s3z": dict(sequences=4),
    "smac 3s5z": dict(sequences=3),
    "smac 3s_vs_5z": dict(sequences=2),
    "smac 6h_vs_8z": dict(sequences=3),
    "": dict(  # alpha, beta and cql in units of the spread of the data's returns
        num_seeds=3,
        eval_every=1000,
        eval_episodes=10,
        warmup=1000,
        cooldown=0.4,
        alpha=0.05,
        beta=0.01,
        beta_end=0.001,
        cql=0.02,
        batch_size=256,
        critic_lr=1e-3,
        clone_lr=1e-3,
        clone_batch=256,
        clone_steps=50_000,
        hold_back=0.1,
    ),
}


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end, then a row of padding.

    In an episode's last row, and in the padding, no step begins: there acted, actions, reward and
    done are 0.
    """

    obs: torch.Tensor  # (R, N, I) what the policies see; with a memory their last actions too
    state: torch.Tensor  # (R, D) what the Q-functions see
    avail: torch.Tensor  # (R, N, A) bool, the available actions
    actions: torch.Tensor  # (R, N) int64, of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    acted: torch.Tensor  # (R,) 1 where a step begins
    first: torch.Tensor  # (R,) bool: an episode begins
    sequences: torch.Tensor  # (Q, L) row numbers: a step's two rows (L = 2), or whole episodes
    # What the cloned models say of every row, added by `clone`: they never change again.
    log_mu: list = ()  # for each agent i (S, R, A): log mu_i(.|s)
    log_mu_others: list = ()  # and (S, R): log mu(a_-i|s,a_i) of the recorded joint actions


def uniform(generators, count):
    """Uniform numbers in [0, 1), (S, count), each seed's from its own generator."""
    return torch.stack([torch.rand(count, generator=g, device=g.device) for g in generators])


def draw(generators, sequences, batch, args):
    """B' of the sequences (Q, L) for each seed, without a memory a `batch`: rows (S, L, B')."""
    noise = uniform(generators, args.sequences if args.recurrent else batch)
    return sequences[noise.mul(len(sequences)).long()].mT


# ---------------------------------------------------------------- networks
def initial(rows, columns, bound, generators):
    """Uniform numbers within the bound (S, rows, columns), each seed's from its own generator."""
    start = torch.empty(rows, columns)
    return torch.stack([start.uniform_(-bound, bound, generator=g).clone() for g in generators])


class Linear(nn.Module):
    """S linear layers as one batched product."""

    def __init__(self, inputs, outputs, generators):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        start = initial(inputs + 1, outputs, bound, generators)
        self.weight = nn.Parameter(start[:, :-1].clone())  # (S, in, out)
        self.bias = nn.Parameter(start[:, -1:].clone())  # (S, 1, out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (S, B, out)


def mlp(inputs, outputs, args, generators):
    """A ReLU network for each seed: (S, B, inputs) -> (S, B, outputs)."""
    layers, width = [], inputs
    for _ in range(args.layers):
        layers += [Linear(width, args.hidden, generators), nn.ReLU()]
        width = args.hidden
    return nn.Sequential(*layers, Linear(width, outputs, generators))


class GRU(nn.Module):
    """S gated recurrent units with the equations of nn.GRU, as batched products."""

    def __init__(self, inputs, hidden, generators):
        super().__init__()
        start = initial(inputs + hidden + 2, 3 * hidden, hidden**-0.5, generators)
        parts = start.split([inputs, hidden, 1, 1], 1)  # columns: reset, update, new
        parts = [nn.Parameter(part.clone()) for part in parts]
        self.input, self.state, self.input_bias, self.state_bias = parts

    def forward(self, x, first, h):
        """Run along sequences x (S, L B, I) from h (S, B, H): the states (S, L, B, H).

        It forgets everything where an episode begins, first (S, L, B) bool.
        """
        H = h.shape[-1]
        inputs = torch.baddbmm(self.input_bias, x, self.input).view(*first.shape, 3 * H)
        gates, news = inputs.split([2 * H, H], -1)
        states = []
        for gate, new, begins in zip(gates.unbind(1), news.unbind(1), first[..., None].unbind(1)):
            h = h.masked_fill(begins, 0.0)
            past = torch.baddbmm(self.state_bias, h, self.state)  # (S, B, 3H)
            past_gate, past_new = past.split([2 * H, H], -1)
            reset, update = (gate + past_gate).sigmoid().chunk(2, -1)
            h = torch.lerp((new + reset * past_new).tanh(), h, update)
            states.append(h)
        return torch.stack(states, 1)


class Policy(nn.Module):
    """Log-probabilities of all actions along sequences of one agent's inputs."""

    def __init__(self, inputs, outputs, args, generators):
        super().__init__()
        self.outputs = outputs
        self.hidden = args.hidden if args.recurrent else 0  # H
        if args.recurrent:  # no single view shows the whole battle
            self.encoder = nn.Sequential(Linear(inputs, args.hidden, generators), nn.ReLU())
            self.gru = GRU(args.hidden, args.hidden, generators)
            self.head = Linear(args.hidden, outputs, generators)
        else:
            self.body = mlp(inputs, outputs, args, generators)

    def forward(self, x, avail, first, h):
        """Log-probabilities (S, L B, A), about -1e10 where not available, and the last memory.

        x (S, L B, I), avail (S, L B, A), first (S, L, B) bool, where an episode begins, and memory
        h (S, B, H).
        """
        if self.hidden:
            states = self.gru(self.encoder(x), first, h)
            logits, h = self.head(states.flatten(1, 2)), states[:, -1]
        else:
            logits = self.body(x)
        return F.log_softmax(logits.masked_fill(~avail, ILLEGAL), -1), h


class Team(nn.Module):
    """What S teams learn. Agents share no network of these: a turn must not change the others."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, N, A), I, D = data.avail.shape, data.obs.shape[-1], data.state.shape[-1]
        agents = range(N)
        # behaviour, Eq. 21
        self.mus = nn.ModuleList(Policy(I, A, args, generators) for _ in agents)
        self.teammates = mlp(D + N + N * A, A, args, generators)  # joint behaviour, Eq. 22
        # Q_i(s, .), one output an action
        self.critics = nn.ModuleList(mlp(D, A, args, generators) for _ in agents)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.policies = copy.deepcopy(self.mus)
        if not args.sequential:  # the policies as they were when the sweep began
            self.before = copy.deepcopy(self.mus)
        log_alpha = torch.full((len(generators), 1), math.log(args.alpha))  # (S, 1)
        self.log_alpha = nn.ParameterList([log_alpha])
        # Set anew before each sweep by `schedule`: the entropy's weight, and a factor of alpha, cql
        self.register_buffer("beta", torch.zeros(()), persistent=False)
        self.register_buffer("fade", torch.ones(()), persistent=False)

    def alpha(self, args):
        """The weight of the KL divergence now, (S, 1)."""
        return self.log_alpha[0].detach().exp() * (1 if args.auto_alpha else self.fade)


def chosen(values, action):
    """The entries of the actions taken: (..., A), (...) -> (...)."""
    return values.gather(-1, action[..., None])[..., 0]


def teammate_log_prob(network, data, rows, i, prior=None):
    """Eq. 22: log mu(a_-i|s,a_i) in rows (S, B): a sum over teammates j, given those before j.

    One network serves every i and j. It sees the state, which j is asked for, and the known
    actions, zeros in place of the rest. With a prior, log mu_j (S, B, N, A) of models with a
    memory, it only adds what the known actions tell.
    """
    state, avail, actions = (take(x, rows) for x in (data.state, data.avail, data.actions))
    S, B, N, A = avail.shape
    agent = torch.arange(N, device=rows.device)
    j = agent[:-1] + (agent[:-1] >= i)  # (N-1,) everybody but i
    known = (agent == i) | (agent < j[:, None])  # (N-1, N)
    joint = F.one_hot(actions, A)[:, :, None] * known[..., None]  # (S, B, N-1, N, A)
    who = F.one_hot(j, N).expand(S, B, -1, -1)  # (S, B, N-1, N)
    state = state[:, :, None].expand(-1, -1, N - 1, -1)
    x = torch.cat([state, who, joint.flatten(3)], -1)
    logits = network(x.flatten(1, 2)).view(S, B, N - 1, A)
    if prior is not None:
        logits = logits + prior[:, :, j]
    log_mu = F.log_softmax(logits.masked_fill(~avail[:, :, j], ILLEGAL), -1)
    return chosen(log_mu, actions[:, :, j]).sum(-1)


# ---------------------------------------------------------------- looking at the data
def take(table, rows):
    """Rows (S, B) of a table of all seeds (R, ...): (S, B, ...). Plain indexing is slower."""
    return table.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def recall(table, rows):
    """Each seed's rows (S, B) of its own table (S, R, ...): (S, B, ...)."""
    S, R = table.shape[:2]
    start = torch.arange(0, S * R, R, device=rows.device)  # of each seed's table, end to end
    return take(table.flatten(0, 1), rows + start[:, None])


def unroll(policy, i, rows, data):
    """log pi_i, or log mu_i, along the sequences rows (S, L, B'): (S, L B', A)."""
    S, _, B = rows.shape
    flat, h = rows.flatten(1), data.obs.new_zeros(S, B, policy.hidden)
    log_pi, _ = policy(
        take(data.obs[:, i], flat), take(data.avail[:, i], flat), data.first[rows], h
    )
    return log_pi


def unroll_all(policies, rows, data):
    """The same of all N agents: (N, S, L B', A)."""
    return torch.stack([unroll(policy, i, rows, data) for i, policy in enumerate(policies)])


@torch.no_grad()
def look(agents, mover, policies, rows, data, improve, args):
    """How these agents act along the sequences rows (S, L, B'): a list of log pi (S, L B', A).

    Without a memory only the mover's is needed in the last row, where its step ends: the others'
    are (S, B', A). As long as no policy learns (improve is False), all still are their clones.
    """
    log_pi = []
    for j in agents:
        part = rows if j == mover or args.recurrent else rows[:, :-1]
        if improve:
            log_pi.append(unroll(policies[j], j, part, data))
        else:
            log_pi.append(recall(data.log_mu[j], part.flatten(1)))
    return log_pi


# ---------------------------------------------------------------- losses
def importance_ratio(log_pi_others, log_mu_others, num_agents, cap):
    """Eq. 23, (S, K): the geometric mean over teammates; both inputs are sums of their logs.

    It is never 0 for a step, so that there is always one to draw.
    """
    log_ratio = (log_pi_others - log_mu_others) / (num_agents - 1)
    return log_ratio.exp().clamp(1e-10, cap)


def resample(ratio, noise):
    """Draw places in the minibatch with replacement, with probability ratio / sum(ratio).

    ratio (S, K), noise (S, B) in [0, 1): the places (S, B); one whose ratio is 0 is never drawn.
    """
    cumulative = ratio.cumsum(1)
    heights = noise * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, heights, right=True)  # the first sum above it
    return places.clamp(max=ratio.shape[1] - 1)  # if rounding led past the end


@torch.no_grad()
def soft_target(q, log_pi, log_mu, reward, done, alpha, beta, gamma):
    """Eq. 15: y_i (S, B) from Q'_i, log pi_i and log mu_i of the next state (S, B, A).

    alpha (S, 1), beta (). As in the paper, it leaves out the teammates' KL and entropy. The mean is
    over all available actions. Of those never recorded, pi_i does few, and Eq. 24 lowers Q_i.
    """
    soft = q - alpha[..., None] * (log_pi - log_mu) - beta * log_pi
    return reward + gamma * (1 - done) * (log_pi.exp() * soft).sum(-1)


def critic_loss(q, y, action, avail, cql):
    """Eq. 24, for each seed (S,), from Q_i and avail (S, B, A), y and action (S, B).

    Between conventions that pay the same, the squared error has no preference. The conservative
    term has one: it lifts the resampled actions, those that go with what the teammates do now.
    """
    q_taken = chosen(q, action)
    gap = q.masked_fill(~avail, ILLEGAL).logsumexp(-1) - q_taken
    return ((q_taken - y) ** 2 + cql * gap).mean(1)


@torch.no_grad()
def policy_weight(q, log_mu, action, avail, alpha, beta, cap):
    """The weight of a recorded action in Eq. 20, (S, B): Eq. 12's pi_i(a) over mu_i(a).

    q is Q'_i, as log_mu (S, B, A); alpha (S, 1). With this V_i the weights average to 1 under mu_i,
    and no exp(Q/T) can overflow.
    """
    T = alpha + beta  # (S, 1)
    scaled = (q + alpha[..., None] * log_mu) / T[..., None]
    v_over_T = scaled.masked_fill(~avail, ILLEGAL).logsumexp(-1)  # (S, B)
    advantage = chosen(q, action) - beta * chosen(log_mu, action)
    return (advantage / T - v_over_T).exp().clamp(max=cap)


def policy_loss(log_pi, log_mu, action, weight, valid):
    """Eq. 20: the loss and KL(pi_i || mu_i) of each seed (S,); valid (S, B): 1 where a step is."""
    share = valid / valid.sum(1, keepdim=True)
    kl = (log_pi.exp() * (log_pi - log_mu)).sum(-1)
    loss = -(share * weight * chosen(log_pi, action)).sum(1)
    return loss, (share * kl).sum(1).detach()


# ---------------------------------------------------------------- update
def optimizer(team):
    """Adam. In a turn only the networks of one agent have gradients, so only these move."""
    parts = team.critics, team.policies, team.log_alpha
    return torch.optim.Adam([{"params": part.parameters()} for part in parts], fused=True)


@torch.compiler.disable  # a graph ends here, as torch.compile cannot hold an optimiser's step
def take_step(adam, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.contiguous()  # fused on a CPU, Adam ignores strides
    adam.step()
    adam.zero_grad()


def descend(adam, module, losses):
    """One step down the losses (S,) of independent seeds; returns them, detached.

    Their sum leaves each seed the gradient that it would have alone.
    """
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(losses.sum(), parameters)
    losses = losses.detach()
    take_step(adam, parameters, gradients)
    return losses


def evaluation(i, team, adam, data, rows, places, log_pi, args):
    """A step of Q_i on some places (S, B) of the sequences rows (S, L, B'); the loss (S,).

    log_pi (S, L B', A) is agent i's, before its step.
    """
    critic, target = team.critics[i], team.targets[i]
    after = places + rows.shape[2]  # one row further in the same sequence
    begin, end = (rows.flatten(1).gather(1, at) for at in (places, after))  # (S, B)
    y = soft_target(
        target(take(data.state, end)),
        recall(log_pi, after),
        recall(data.log_mu[i], end),
        data.reward[begin],
        data.done[begin],
        team.alpha(args),
        team.beta,
        args.gamma,
    )
    action, avail = data.actions[begin, i], take(data.avail[:, i], begin)
    loss = critic_loss(critic(take(data.state, begin)), y, action, avail, args.cql * team.fade)
    loss = descend(adam, critic, loss)
    with torch.no_grad():
        parts = list(target.parameters()), list(critic.parameters())
        torch._foreach_lerp_(*parts, args.tau)
    return loss


def improvement(i, team, adam, data, rows, places, args):
    """A step of pi_i, and of alpha, on some places (S, B) of the sequences; diagnostics (S,)."""
    part = rows if args.recurrent else rows[:, :-1]  # no step begins in the last row
    log_pi = recall(unroll(team.policies[i], i, part, data), places)  # (S, B, A)
    begin = rows.flatten(1).gather(1, places)  # (S, B)
    log_mu, action = recall(data.log_mu[i], begin), data.actions[begin, i]
    weight = policy_weight(
        team.targets[i](take(data.state, begin)),
        log_mu,
        action,
        take(data.avail[:, i], begin),
        team.alpha(args),
        team.beta,
        args.weight_cap,
    )
    loss, kl = policy_loss(log_pi, log_mu, action, weight, data.acted[begin])
    loss = descend(adam, team.policies[i], loss)
    if args.auto_alpha:  # Eq. 25
        alpha = team.log_alpha[0].exp()[:, 0]
        descend(adam, team.log_alpha, alpha * (args.kl_target - kl))
    return {"policy_loss": loss, "kl": kl}


def turn(i, team, adam, data, rows, log_pi, noise, improve, args):
    """Agent i's turn: its Q-function learns and, if policies `improve` by now, its policy.

    Args:
        rows: (S, L, B') the minibatch, as row numbers.
        log_pi: of every agent along it, as `look` returns it.
        noise: (S, B) in [0, 1), which resamples its steps.
    Returns:
        Diagnostics, (S,) each.
    """
    begin = rows[:, :-1].flatten(1)  # (S, K) where steps may begin, the first K of all places
    every = torch.arange(begin.shape[1], device=rows.device).expand_as(begin)
    ratio = data.acted[begin]
    if args.resampling:
        # Eq. 23, with the teammates as they are now: this is what makes the method sequential
        others = [j for j in range(len(log_pi)) if j != i]
        action = take(data.actions, begin)  # (S, K, N)
        log_pi_others = sum(chosen(log_pi[j][:, : begin.shape[1]], action[..., j]) for j in others)
        log_mu_others = data.log_mu_others[i].gather(1, begin)
        ratio *= importance_ratio(log_pi_others, log_mu_others, len(log_pi), args.ratio_cap)
    drawn = resample(ratio, noise) if args.resampling or args.recurrent else every  # (S, B)
    logs = {"q_loss": evaluation(i, team, adam, data, rows, drawn, log_pi[i], args)}
    if improve:
        places = drawn if args.actor_data == "resampled" else every
        logs |= improvement(i, team, adam, data, rows, places, args)
    return logs


def update(team, adam, data, shared, generators, step, args, turn=turn, look=look):
    """Update number `step`, a sweep: every agent's turn, for all seeds at once.

    Args:
        shared: a generator for the order of the agents, the same for all seeds.
        generators: one for each seed, for its minibatches.
        turn, look: may be compiled.
    Returns:
        Diagnostics (S,), means over the turns.
    """
    schedule(team, adam, step, args)
    improve = step >= args.warmup
    order = ORDERS[args.order](team, data, shared, generators, args)
    movers = [i for i in order for _ in range(args.inner)]
    seen = team.policies
    if not args.sequential:
        seen = team.before
        seen.load_state_dict(team.policies.state_dict())
    logs = []
    for t, i in enumerate(movers):
        if t == 0 or not args.recurrent:
            rows = draw(generators, data.sequences, args.batch_size, args)
            log_pi = look(range(len(order)), i, seen, rows, data, improve, args)
        elif args.sequential and improve:
            last = movers[t - 1]  # only the last one to act has moved
            log_pi[last] = look([last], i, seen, rows, data, improve, args)[0]
        noise = uniform(generators, args.batch_size)
        logs.append(turn(i, team, adam, data, rows, log_pi, noise, improve, args))
    means = {name: sum(log[name] for log in logs) / len(logs) for name in logs[0]}
    return means | {"alpha": team.alpha(args)[:, 0]}


def schedule(team, adam, step, args):
    """Set what changes from update to update.

    The weight of the entropy is held at first, then it falls exponentially, to its end in the last
    update. In the first half of the cool-down alpha (not with --auto-alpha) and cql fall to a
    tenth, together, as their ratio breaks ties; in the second half the step sizes fall to 0.
    """
    decay = max(0, step - args.beta_hold) / max(1, args.steps - 1 - args.beta_hold)
    team.beta.fill_(args.beta * (args.beta_end / args.beta) ** decay if args.beta else 0.0)
    half = args.cooldown * args.steps / 2 or 1e-9  # of the cool-down, in updates
    remaining = (args.steps - step) / half  # from 2 to 0 in the cool-down
    team.fade.fill_(0.1 ** min(1.0, max(0.0, 2 - remaining)))
    slow = min(1.0, remaining)
    for group, lr in zip(adam.param_groups, (args.critic_lr, args.policy_lr)):
        group["lr"] = slow * lr


# ---------------------------------------------------------------- order of the agents
def random_order(team, data, shared, generators, args):
    return torch.randperm(len(team.policies), generator=shared).tolist()


def fixed_order(team, data, shared, generators, args):
    return list(range(len(team.policies)))


@torch.no_grad()
def semi_greedy(team, data, shared, generators, args):
    """A2PO's order of the agents, the same for all seeds. It waits for the device, once.

    Every other place goes to the remaining agent with the largest advantage: the mean over a
    minibatch and all seeds of |Q'_i(s,a_i) - E_pi Q'_i(s,.)|. The others go to agents at random.
    """
    remaining = random_order(team, data, shared, generators, args)
    rows = draw(generators, data.sequences, args.batch_size, args)[:, :-1]
    begin, advantages = rows.flatten(1), []  # (S, K)
    for i, log_pi in enumerate(unroll_all(team.policies, rows, data)):
        q = team.targets[i](take(data.state, begin))  # (S, K, A)
        advantage = chosen(q, data.actions[begin, i]) - (log_pi.exp() * q).sum(-1)
        advantages.append((advantage.abs() * data.acted[begin]).sum())
    advantages = torch.stack(advantages).tolist()
    order = []
    for place in range(len(remaining)):
        greedy = max(remaining, key=advantages.__getitem__)
        order.append(remaining[0] if place % 2 else greedy)
        remaining.remove(order[-1])
    return order


ORDERS = {"random": random_order, "fixed": fixed_order, "semi-greedy": semi_greedy}


# ---------------------------------------------------------------- behaviour
def clone_loss(team, data, rows, args, noise=None):
    """Eqs. 21 and 22 on the sequences rows (S, L, B'): all mu_i, and all teammates; (S,).

    With a memory noise (S, B) draws the steps that the teammate model learns from.
    """
    agents, rows = range(len(team.mus)), rows[:, :-1]  # (S, L - 1, B')
    log_mu, rows = unroll_all(team.mus, rows, data), rows.flatten(1)  # (N, S, K, A), (S, K)
    acted = data.acted[rows]
    log_likelihood = sum(chosen(log_mu[i], data.actions[rows, i]) for i in agents)
    loss = -(log_likelihood * acted).sum(1) / acted.sum(1)
    prior = None
    if args.recurrent:  # some of the steps are enough for the teammate model
        places = resample(acted, noise)
        rows = rows.gather(1, places)  # (S, B)
        prior = recall(log_mu.detach().movedim(0, 2), places)  # (S, B, N, A)
    for i in agents:
        loss = loss - teammate_log_prob(team.teammates, data, rows, i, prior).mean(1)
    return loss


@torch.enable_grad()
def clone_update(team, models, adam, data, rows, args, noise=None):
    return descend(adam, models, clone_loss(team, data, rows, args, noise))


def hold_back(data, share, most=5000):
    """Part the sequences (Q, L): those to clone, and those to judge the clones by.

    The latter begin in a `share` of the episodes, evenly spread over the data, less where that
    would be more than `most` sequences; none if there is a single episode.
    """
    episode = data.first.cumsum(0)[data.sequences[:, 0]]
    names, number = episode.unique(return_inverse=True)  # (Q,) of those that have a sequence
    if share == 0 or len(names) == 1:
        return data.sequences, data.sequences[:0]
    every = max(2, round(1 / min(share, most / len(number))))
    held = number % every == 0
    return data.sequences[~held], data.sequences[held]


@torch.no_grad()
def clone(team, data, generators, args, clone_update=clone_update):
    """Fit the behaviour, start the policies from it, and return the data with its tables.

    With --hold-back each seed keeps the models that make the held-back episodes likeliest. These
    are asked every 250 updates; once 4 times in a row they are no likelier, a seed is done.
    """
    models, S = nn.ModuleList([team.mus, team.teammates]), args.num_seeds
    parameters = list(models.parameters())
    adam = torch.optim.Adam(parameters, args.clone_lr, fused=True)
    learned, held = hold_back(data, args.hold_back)
    best, kept = data.reward.new_full((S,), torch.inf), [x.clone() for x in parameters]
    checks = torch.zeros_like(best)  # since the best one
    even = torch.linspace(0, 0.999, args.clone_batch, device=best.device).expand(S, -1)
    for step in range(1, args.clone_steps + 1):
        rows = draw(generators, learned, args.clone_batch, args)
        noise = uniform(generators, args.clone_batch) if args.recurrent else None
        clone_update(team, models, adam, data, rows, args, noise)
        if len(held) and (step % 250 == 0 or step == args.clone_steps):
            loss = clone_loss(team, data, held.mT.expand(S, -1, -1), args, even)
            better = (loss < best) & (checks < 4)
            best, checks = torch.where(better, loss, best), torch.where(better, 0, checks + 1)
            for old, new in zip(kept, parameters):
                old[better] = new[better]
            if (checks >= 4).all():
                break
    if len(held):
        torch._foreach_copy_(parameters, kept)
    team.policies.load_state_dict(team.mus.state_dict())  # a good place to start from
    return tabulate(team, data, args)


@torch.no_grad()
def tabulate(team, data, args):
    """The data with the tables of the cloned models, which are made in parts, to spare memory."""
    S, (R, N, A) = args.num_seeds, data.avail.shape
    log_mu, log_mu_others = data.obs.new_zeros(N, S, R, A), data.obs.new_zeros(N, S, R)
    for rows in data.sequences.split(max(1, 10_000 // data.sequences.shape[1])):
        rows = rows.T.expand(S, -1, -1)  # (S, L, Q)
        table, rows = unroll_all(team.mus, rows, data), rows.flatten(1)  # (N, S, L Q, A)
        log_mu[:, :, rows[0]] = table.clamp(min=-20)  # as good as never; beta log mu stays finite
        prior = table.movedim(0, 2) if args.recurrent else None
        for i in range(N):
            others = teammate_log_prob(team.teammates, data, rows, i, prior)
            log_mu_others[i, :, rows[0]] = others
    return data._replace(log_mu=list(log_mu), log_mu_others=list(log_mu_others))


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import layout
    from data.run import Run, launch, read_args, remembering
    from envs.bridge import draw_strips
    from envs.matrix import draw_policies
elif __name__ == "__main__":
    sys.exit("error: this file runs beside data/ and envs/ of its repository; alone, import it")


def arrange(dataset, args):
    """The dataset as `Data`, and the function that makes inputs of what a game shows.

    Raises:
        ValueError: there is a single agent.
    """
    if dataset.obs.shape[2] < 2:
        raise ValueError("InSPO is for two agents or more, and here is one")
    tensors, encode = layout.teams(dataset, args, whole=args.recurrent)
    return Data(*tensors), encode


# ---------------------------------------------------------------- evaluation
def player(policies, encode):
    """How the teams of all seeds play."""

    def think(x, avail, h):
        first = torch.zeros_like(avail[:, None, :, 0, 0])  # (S, 1, B)
        answers = []
        for i, policy in enumerate(policies):
            answers.append(policy(x[:, :, i], avail[:, :, i], first, h[:, :, i]))
        return [torch.stack(parts, 2) for parts in zip(*answers)]  # log pi, memory

    sizes = len(policies), policies[0].outputs, policies[0].hidden
    return remembering(think, encode, *sizes, policies)


@torch.no_grad()
def draw_policy(run, team, data, film):
    """Pictures of the team: on Bridge film strips, of two agents in one state a table."""
    if film:
        greedy, _, _, cloned_sampled = film
        return {"policy.png": draw_strips({"cloned team": cloned_sampled, "InSPO": greedy})}
    if run.args.env == "matrix" and len(team.policies) == 2:
        row = data.sequences[None, :1, :1].expand(len(run.seeds), -1, -1)  # all are the same
        pi = unroll_all(team.policies, row, data)[:, :, 0].exp()  # (N, S, A)
        return {"policy.png": draw_policies(pi, run.dataset, run.seeds)[0]}
    return {}


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("inspo", args)
    data, encode = arrange(run.load(discrete=True), args)
    team = Team(data, args, run.streams(0, "cpu")).to(run.device)
    adam = optimizer(team)
    shared, generators = torch.Generator().manual_seed(0), run.streams(2)
    compiled = {"turn": run.compile(turn), "look": run.compile(look)}
    if run.begin(team=team, adam=adam, generators=[shared, *generators]):
        data = tabulate(team, data, args)
    else:
        data = clone(team, data, run.streams(1), args, run.compile(clone_update))
    learner, cloned = player(team.policies, encode), player(team.mus, encode)
    for step in run.steps(learner):
        run.logs = update(team, adam, data, shared, generators, step, args, **compiled)
    film = [] if args.env == "bridge" else None
    scores, cloned_scores = run.score(learner, film), run.score(cloned, film)
    figures = draw_policy(run, team, data, film)
    others = {"behavioural cloning": ("cloned_", cloned_scores)}
    return run.finish("InSPO", learner, scores, others, figures)


def parse(argv=None):
    """Read the command line; where no flag speaks, `PRESETS` or the resumed run do."""
    return read_args(
        Args,
        PRESETS,
        argv,
        __doc__,
        "InSPO is for discrete actions",
        ("bridge", "matrix", "smac"),
        in_units="alpha beta beta_end cql",
        may_be_zero="seed episodes eval_episodes beta beta_hold warmup cql kl_target gamma layers "
        "clone_steps cooldown hold_back",
        at_most_one="gamma tau cooldown hold_back",
    )


if __name__ == "__main__":
    launch(main, parse)
