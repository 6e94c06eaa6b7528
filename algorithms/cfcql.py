"""CFCQL: counterfactual conservative Q-learning (Shao et al., NeurIPS 2023).

The file holds MACQL (--joint-cql) and QMIX (--cql 0), too. Paper: arXiv 2309.12696.

The problem. A team of N agents learns from a fixed dataset. Conservative Q-learning
(CQL) guards against actions that nobody tried: it pushes the values of all actions
down and that of the recorded one up. For a team "all actions" are A^N joint actions.
Nearly none of them was recorded, and the penalty grows with the team.

The idea. Replace one agent's action at a time and leave the others' as they were
recorded. That makes N penalties over A actions each, in place of one over A^N. A
penalty counts the more, the further its agent's choice leads from its recorded
behaviour. The team's value is mixed from local ones (QMIX) and grows with each of
them. So every agent finds its part of the best joint action alone, and that is how the
team acts. But nothing else holds the team together. Such a value cannot say "A if you
play B, and B if you play A". Where the data hold both conventions of XOR it must fail.

Equations, by numbers of our own. h_i is what agent i saw and did so far, q_i(h_i, .)
its local values. A prime marks slowly moving copies. m_t is 0 where the game ended by
its own rules; in an episode's last step [ ] is Q'_{t+1}.
 1 mixing     Q(s, a) = w2(s) . elu( sum_i w1_i(s) q_i(h_i, a_i) + b1(s) ) + b2(s)
                        with w1, w2 >= 0
 2 target     G_t     = r_t + gamma m_t [ (1 - lambda) Q'_{t+1} + lambda G_{t+1} ]
              Q'_t    = Q'(s_t, a*),  a*_i = argmax_a q_i(h_i, a)
 3 deviation  K_i     = KL( p_i || beta_i ),  p_i(a') = softmax_a' Q(s, (a', a_-i))
 4 weights    u_i     = softmax_i( tau_lambda K_i ),  without gradients
 5 gap        C       = sum_i u_i log sum_a' exp Q(s, (a', a_-i)) - Q(s, a)
              C       = log mean_a' exp Q(s, a') - Q(s, a)  for MACQL, a' drawn at random
 6 loss       L(q, w, b) = E [ 1/2 (Q(s, a) - G)^2 + cql C ]
 7 behaviour  L(beta_i)  = -E log beta_i(a_i|h_i),  learned before all else
With one agent Eq. 6 is plain CQL. With tau_lambda = 0 all u_i are 1/N.

Commands, and the return you should see (last team, greedy; one CPU core, torch 2.13):
  python algorithms/cfcql.py
      XOR, data aa-ab-ba, 10 seeds, 11 s: 0 in all, both play B; --joint-cql and --cql 0
      the same; --dataset ab 1; ab-ba 0.2 +- 0.13 and all 0.6 +- 0.16, by luck
  python algorithms/cfcql.py --env matrix --task m-ne
      12 s: 5, the data's local optimum, in 10 of 10 seeds; --dataset balanced 20, the best
  python algorithms/cfcql.py --env bridge
      mixed data, 5 seeds, 28 s: -15.5 in all, as the agents block each other (the data
      -9.31, the best -1.2355); --dataset optimal -1.25 in 5 of 5; --cql 0.1 -7.9 +- 4.1
  python algorithms/cfcql.py --env smac
      5m_vs_6m, medium-replay data, 3 seeds, 3.5 min: 56 % of the battles won (return
      15.8; cloning 43 %, the data 9 %); --task 2s3z 89 % in five seeds

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, cfcql
  S, N, A, M = 2, 3, 4, 500           # seeds, agents, actions, steps of one long episode
  obs, state = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6)
  avail, action = torch.ones(M + 1, N, A).bool(), torch.randint(A, (M + 1, N))
  reward = (action == obs[..., :A].argmax(-1)).float().mean(1)
  row, done = torch.arange(M + 1), torch.zeros(M + 1)
  acted, first = (row < M).float(), row == 0
  sequences = row.view(-1, 3)         # of 3 rows: 2 steps, and what comes then
  data = cfcql.Data(obs, state, avail, action, reward, done, acted, first, sequences)
  args = cfcql.Args(num_seeds=S, clone_steps=50)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = cfcql.Team(data, args, generators)
  adam = torch.optim.Adam(team.value.parameters(), args.lr, fused=True)
  cfcql.clone(team.behaviour, data, generators, args)
  log_beta = cfcql.tabulate(team.behaviour, data)
  for step in range(200):
      rows = cfcql.draw_rows(generators, data, args)
      joint = cfcql.draw_joint(generators, data, args)
      logs = cfcql.update(team, adam, data, log_beta, rows, joint, args)

Differences from the authors' code, and choices made here:
  1. Each agent has networks of its own. Their agents share one and know who they are.
  2. The N A mixed values of Eq. 5 are found at once. Theirs are found by two loops.
  3. In Eq. 4 the agent that deviates most counts most, as in their code. There a
     tau_lambda of 100 means this agent alone. Here it is a softmax like any other.
  4. MACQL's random actions are available ones. Theirs may not be: these are worth 0.
  5. An episode that was cut goes on to be worth Q' after its last step. In their code
     this holds for the longest of a minibatch only. Padding enters no mean.
  6. Target networks move a little in each update. Theirs jump every 200 episodes of a
     counter that grows by 8 an update, which is every 25 updates.
  7. One network of the state gives all of Eq. 1's weights and biases. Theirs are four.
  8. beta_i is cloned for a fixed number of updates, theirs until 20 minibatches bring
     no lower loss. In Eq. 3 log beta_i is at least -12, so that K_i is bounded. Theirs
     adds 1e-5 to both probabilities.
  9. In battles q_i and beta_i are GRUs that see their agent's last action, as theirs.
     Elsewhere they have no memory. Inputs are in units of the data's mean and spread,
     or one-hot (Bridge's cells), or as they are (battles).
 10. A minibatch of battles holds some 500 steps, theirs 128 episodes. Training ends
     after 2,000 updates, theirs after 10 million steps. Adam's step size falls to 0.
 11. lambda is 0.6 where battles last less than 100 steps, else 0.9. Theirs is 0.6, and
     0.3 on 6h_vs_8z. Eq. 5 leaves the best action worth about 1 more than recorded
     ones, and 1 - lambda of that enters Eq. 2 in every step: too much on 2s3z.
 12. cql is 5 in battles, 1 on Bridge and 0.1 in matrix games, and tau_lambda is 1.
     Theirs depend on the dataset: cql from 0.1 to 50, mostly 50; tau_lambda from 0 to 1,
     once the agent that deviates most alone.

A minibatch consists of whole episodes, laid end to end in sequences of one length, as
Eq. 2 looks ahead. Seeds differ in all that is random here, and are evaluated in one
environment.

Shapes: S seeds, N agents, Q = S N networks, M sequences of the data, L rows of one,
B sequences of a minibatch, R rows (observations), A actions, J joint actions, W units
of the mixer, H of a memory, I inputs, D state.
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

ILLEGAL = -1e10  # of an action that is not available; finite, as 0 times it must be 0


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "matrix"  # the environment: matrix, bridge, smac, or module:factory
    task: str = ""  # its task; by default the environment's usual one
    dataset: str = ""  # a dataset's name, or the path of a file; by default the usual one
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of agents' rewards, in a game not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 10  # how many seeds train, all at once
    steps: int = 1000  # updates, one minibatch each
    eval_every: int = 250  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 10  # games per seed and evaluation; 0 to train without an environment
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # compile updates with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/cfcql
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    cql: float = 0.1  # weight of the conservative term; 0: QMIX
    tau_lambda: float = 1.0  # how fast an agent's weight grows with its deviation
    joint_cql: bool = False  # MACQL: penalise random joint actions
    joint_samples: int = 100  # MACQL: how many of them for each step
    td_lambda: float = 0.6  # how far the targets look ahead: 0 one step, 1 to the end
    gamma: float = 0.99  # discount
    # --- the optimisation
    normalize: bool = True  # views in units of the data's mean and spread
    one_hot: bool = False  # feed whole numbers as one-hot values (the cells of a grid)
    recurrent: bool = False  # a memory (GRU) that sees the last action too
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    width: int = 32  # units of the mixer
    sequences: int = 64  # sequences of whole episodes per update
    lr: float = 1e-3  # Adam's step size, which falls linearly to 0
    tau: float = 0.01  # how far a target network moves in an update
    max_grad_norm: float = 10.0  # longest gradient of one seed
    clone_steps: int = 300  # updates of the behaviour model, before all others
    clone_lr: float = 2e-3  # their step size


GAME = dict(
    normalize=False,
    num_seeds=3,
    steps=2000,
    eval_every=500,
    eval_episodes=32,
    cql=1.0,
)
BATTLE = dict(
    task="5m_vs_6m",
    recurrent=True,
    cql=5.0,
    clone_steps=500,
    sequences=3,  # some 500 steps, if battles last to the end
    td_lambda=0.9,
)
PRESETS = {  # what differs from the values above; "" is a game that is not ours
    "matrix xor": dict(dataset="aa-ab-ba"),
    "bridge": GAME | dict(num_seeds=5, one_hot=True, sequences=4),
    "smac": GAME | BATTLE,
    "smac 3m": dict(sequences=9, td_lambda=0.6),
    "smac 5m_vs_6m": dict(sequences=8, td_lambda=0.6),
    "smac 8m": dict(sequences=4),
    "smac 2s3z": dict(sequences=4),
    "smac 3s_vs_5z": dict(sequences=2),
    "": GAME | dict(normalize=True, sequences=8),
}


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, an observation each: episodes end to end, then padding.

    No step begins in an episode's last row and in the padding. All of a step is 0 there.
    """

    obs: torch.Tensor  # (R, N, I) what agents see; with a memory their last action behind it
    state: torch.Tensor  # (R, D) what the mixer sees
    avail: torch.Tensor  # (R, N, A) bool, the available actions
    action: torch.Tensor  # (R, N) int64, of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    acted: torch.Tensor  # (R,) 1 where a step begins
    first: torch.Tensor  # (R,) bool: an episode begins, or it is padding
    sequences: torch.Tensor  # (M, L) row numbers: whole episodes end to end, padded


def draw_rows(generators, data, args):
    """Sequences for each seed, drawn with replacement: row numbers (S, L, B)."""
    M, B = len(data.sequences), args.sequences
    drawn = [torch.randint(M, (B,), generator=g, device=g.device) for g in generators]
    return data.sequences[torch.stack(drawn)].mT


def draw_joint(generators, data, args):
    """Numbers in [0, 1) that choose MACQL's actions, (S, L - 1, B, J, N); or None."""
    if not args.joint_cql:
        return None
    L, N = data.sequences.shape[1], data.avail.shape[1]
    shape = L - 1, args.sequences, args.joint_samples, N
    drawn = [torch.rand(shape, generator=g, device=g.device) for g in generators]
    return torch.stack(drawn)


# ---------------------------------------------------------------- networks
def initial(rows, columns, bound, generators):
    """Numbers within the bound, (Q, rows, columns), of each network's own generator."""
    start = torch.empty(rows, columns)
    drawn = [start.uniform_(-bound, bound, generator=g).clone() for g in generators]
    return torch.stack(drawn)


class Linear(nn.Module):
    """Q independent linear layers as one batched product."""

    def __init__(self, inputs, outputs, generators):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in
        start = initial(inputs + 1, outputs, bound, generators)
        self.weight = nn.Parameter(start[:, :-1].clone())  # (Q, in, out)
        self.bias = nn.Parameter(start[:, -1:].clone())  # (Q, 1, out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (Q, B, out)


def mlp(inputs, outputs, args, generators):
    """A ReLU network for each generator: (Q, B, inputs) -> (Q, B, outputs)."""
    layers = []
    for _ in range(args.layers):
        layers += [Linear(inputs, args.hidden, generators), nn.ReLU()]
        inputs = args.hidden
    return nn.Sequential(*layers, Linear(inputs, outputs, generators))


class GRU(nn.Module):
    """Q independent gated recurrent units with the equations of nn.GRU."""

    def __init__(self, inputs, hidden, generators):
        super().__init__()
        start = initial(inputs + hidden + 2, 3 * hidden, hidden**-0.5, generators)
        parts = start.split([inputs, hidden, 1, 1], 1)  # columns: reset, update, new
        parts = [nn.Parameter(part.clone()) for part in parts]
        self.input, self.state, self.input_bias, self.state_bias = parts

    def forward(self, x, first, h):
        """The states (Q, L, B, H) along x (Q, L, B, I) from h (Q, B, H).

        It forgets everything where an episode begins, first (Q, L, B) bool.
        """
        H = h.shape[-1]
        gates = torch.baddbmm(self.input_bias, x.flatten(1, 2), self.input)
        gates, news = gates.view(*first.shape, 3 * H).split([2 * H, H], -1)
        steps = zip(gates.unbind(1), news.unbind(1), first[..., None].unbind(1))
        states = []
        for gate, new, begins in steps:
            h = h.masked_fill(begins, 0.0)
            past = torch.baddbmm(self.state_bias, h, self.state)  # (Q, B, 3H)
            past, past_new = past.split([2 * H, H], -1)
            reset, update = (gate + past).sigmoid().chunk(2, -1)
            h = torch.lerp((new + reset * past_new).tanh(), h, update)
            states.append(h)
        return torch.stack(states, 1)


class Agents(nn.Module):
    """A network for each agent of S teams, which gives numbers for all actions."""

    def __init__(self, data, args, generators):
        super().__init__()
        _, self.N, I = data.obs.shape
        self.A, self.S = data.avail.shape[-1], len(generators)
        each = [g for g in generators for _ in range(self.N)]
        self.hidden = args.hidden if args.recurrent else 0
        if args.recurrent:  # no single observation shows the whole battle
            self.encoder = Linear(I, args.hidden, each)
            self.gru = GRU(args.hidden, args.hidden, each)
            self.head = Linear(args.hidden, self.A, each)
        else:
            self.body = mlp(I, self.A, args, each)

    def forward(self, obs, avail, first, h):
        """The numbers along sequences, (S, L, B, N, A), and the last memories.

        Args:
            obs: (S, L, B, N, I).
            avail: (S, L, B, N, A) bool; where not, the number is ILLEGAL.
            first: (S, L, B) bool, where an episode begins.
            h: (S, N, B, H), the memories before.
        """
        S, L, B, N, _ = obs.shape
        x = obs.movedim(3, 1).flatten(0, 1).flatten(1, 2)  # (Q, L B, I)
        if self.hidden:
            x = self.encoder(x).relu().view(S * N, L, B, -1)
            first = first.repeat_interleave(N, 0)  # (Q, L, B)
            states = self.gru(x, first, h.flatten(0, 1))
            h = states[:, -1].unflatten(0, (S, N))
            out = self.head(states.flatten(1, 2))
        else:
            out = self.body(x)
        out = out.view(S, N, L, B, -1).movedim(1, 3)
        return out.masked_fill(~avail, ILLEGAL), h


class Value(nn.Module):
    """Q(s, a) of S teams: local values, and a network of the state that mixes them."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.agents = Agents(data, args, generators)  # q_i
        self.sizes = [self.agents.N * args.width, args.width, args.width, 1]
        self.mixer = mlp(data.state.shape[1], sum(self.sizes), args, generators)

    def weights(self, state):
        """Of Eq. 1 in states (S, L, B, D).

        Returns:
            w1: (S, L, B, N, W); b1, w2: (S, L, B, W); b2: (S, L, B).
        """
        out = self.mixer(state.flatten(1, 2)).unflatten(1, state.shape[1:3])
        w1, b1, w2, b2 = out.split(self.sizes, -1)
        w1 = w1.unflatten(-1, (self.agents.N, -1))
        return w1.abs(), b1, w2.abs(), b2[..., 0]


class Team(nn.Module):
    """Everything that S teams learn."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.value = Value(data, args, generators)
        self.target = copy.deepcopy(self.value).requires_grad_(False)
        self.behaviour = Agents(data, args, generators)  # logits of beta_i


def unroll(agents, data, rows):
    """What the networks give along the sequences `rows` (S, L, B): (S, L, B, N, A)."""
    h = data.obs.new_zeros(agents.S, agents.N, rows.shape[-1], agents.hidden)
    return agents(data.obs[rows], data.avail[rows], data.first[rows], h)[0]


def chosen(values, action):
    """The entries of the actions taken: (..., A), (...) -> (...)."""
    return values.gather(-1, action[..., None])[..., 0]


# ---------------------------------------------------------------- losses
def mean_over_steps(x, acted):
    """Each seed's mean over its steps, (S,): x and `acted` are (S, L, B)."""
    share = acted / acted.sum((1, 2), keepdim=True)
    return (share * x).sum((1, 2))


@torch.no_grad()
def td_lambda(reward, done, acted, value, gamma, lam):
    """G_t of all rows but the last: (S, L, ...) -> (S, L - 1, ...).

    In an episode's last row no step begins: what is still to come is worth `value`.
    """
    targets = []
    later = value[:, -1]
    for t in reversed(range(value.shape[1] - 1)):
        ahead = (1 - lam) * value[:, t + 1] + lam * later
        target = reward[:, t] + gamma * (1 - done[:, t]) * ahead
        targets.append(target)
        later = torch.where(acted[:, t] > 0, target, value[:, t])
    return torch.stack(targets[::-1], 1)


def mix(weights, q):
    """Eq. 1 of J joint actions: local values (S, L, B, J, N) -> (S, L, B, J)."""
    w1, b1, w2, b2 = weights
    inner = q @ w1 + b1[..., None, :]  # (S, L, B, J, W)
    return (F.elu(inner) @ w2[..., None])[..., 0] + b2[..., None]


def mix_replaced(weights, q, taken):
    """Q(s, (a', a_-i)) of every agent i and action a', (S, L, B, N, A).

    In the sum of Eq. 1 one term changes: it is [q_i(a'), 1] times [w1_i, the rest].

    Args:
        q: (S, L, B, N, A), local values.
        taken: (S, L, B, N), those of the actions taken.
    """
    w1, b1, w2, b2 = weights
    inner = (taken[..., None, :] @ w1)[..., 0, :] + b1  # (S, L, B, W)
    rest = inner[..., None, :] - taken[..., None] * w1  # (S, L, B, N, W)
    inner = torch.stack([q, torch.ones_like(q)], -1) @ torch.stack([w1, rest], -2)
    hidden = F.elu(inner, inplace=True).flatten(-3, -2)  # in place as it is large
    return (hidden @ w2[..., None]).view_as(q) + b2[..., None, None]


@torch.no_grad()
def agent_weights(replaced, log_beta, strength):
    """Eqs. 3 and 4: u_i, (S, L, B, N).

    Args:
        replaced: (S, L, B, N, A), Q(s, (a', a_-i)); ILLEGAL if a' is not available.
        log_beta: (S, L, B, N, A).
        strength: tau_lambda.
    """
    log_p = F.log_softmax(replaced, -1)
    deviation = (log_p.exp() * (log_p - log_beta)).sum(-1)  # Eq. 3
    return F.softmax(strength * deviation, -1)  # Eq. 4


def random_values(q, avail, joint):
    """Local values (S, L, B, J, N) of random joint actions, all available and as likely.

    Args:
        q, avail: (S, L, B, N, A); joint: (S, L, B, J, N) numbers in [0, 1).
    """
    count = avail.sum(-1)[..., None, :]  # (S, L, B, 1, N)
    place = (joint * count).long().clamp(max=count - 1)  # among the available
    order = avail.argsort(dim=-1, descending=True, stable=True)  # these come first
    action = order.gather(-1, place.movedim(-1, -2))  # (S, L, B, N, J)
    return q.gather(-1, action).movedim(-1, -2)


@torch.no_grad()
def targets(target, data, rows, best, args):
    """Eq. 2, (S, L - 1, B), where the copies rate what is `best` (S, L, B, N)."""
    q = chosen(unroll(target.agents, data, rows), best)
    weights = target.weights(data.state[rows])
    value = mix(weights, q[..., None, :])[..., 0]  # (S, L, B)
    reward, done, acted = data.reward[rows], data.done[rows], data.acted[rows]
    return td_lambda(reward, done, acted, value, args.gamma, args.td_lambda)


def losses(team, data, log_beta, rows, joint, args):
    """The two terms of Eq. 6, (S,) each: half the squared error, and C."""
    q = unroll(team.value.agents, data, rows)  # (S, L, B, N, A)
    G = targets(team.target, data, rows, q.argmax(-1), args)
    now = rows[:, :-1]  # where a step can begin
    q, avail, acted = q[:, :-1], data.avail[now], data.acted[now]
    weights = team.value.weights(data.state[now])
    taken = chosen(q, data.action[now])
    Q = mix(weights, taken[..., None, :])[..., 0]  # (S, L - 1, B)
    squared = mean_over_steps(0.5 * (Q - G) ** 2, acted)
    if not args.cql:  # QMIX
        return squared, torch.zeros_like(squared)
    if args.joint_cql:  # MACQL
        drawn = mix(weights, random_values(q, avail, joint))  # (S, L - 1, B, J)
        top = drawn.logsumexp(-1) - math.log(drawn.shape[-1])
    else:
        replaced = mix_replaced(weights, q, taken).masked_fill(~avail, ILLEGAL)
        log_beta = torch.stack([table[row] for table, row in zip(log_beta, now)])
        u = agent_weights(replaced, log_beta, args.tau_lambda)
        top = (u * replaced.logsumexp(-1)).sum(-1)
    return squared, mean_over_steps(top - Q, acted)  # Eq. 5


def clone_loss(behaviour, data, rows):
    """Eq. 7 for each seed, (S,), summed over agents."""
    now = rows[:, :-1]
    acted, action = data.acted[now], data.action[now]
    log_beta = F.log_softmax(unroll(behaviour, data, now), -1)
    log_taken = chosen(log_beta, action).sum(-1)  # (S, L - 1, B)
    return -(acted * log_taken).sum((1, 2)) / acted.sum((1, 2))


# ---------------------------------------------------------------- update
@torch.compiler.disable  # a graph ends here, as torch.compile cannot hold an optimiser's step
def take_step(adam, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    adam.step()
    adam.zero_grad()


def descend(adam, module, losses, max_grad_norm):
    """One step down the losses (S,) of independent seeds, each with a gradient of limited length;
    returns them, detached.

    Their sum leaves each seed the gradient that it would have alone.
    """
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(losses.sum(), parameters)
    rows = [gradient.reshape(len(losses), -1) for gradient in gradients]
    length = sum((row**2).sum(1) for row in rows).sqrt()  # (S,)
    factor = (max_grad_norm / length.clamp(min=max_grad_norm))[:, None]
    losses = losses.detach()
    take_step(adam, parameters, [(row * factor).view_as(p) for row, p in zip(rows, parameters)])
    return losses


def update(team, adam, data, log_beta, rows, joint, args):
    """One update of all seeds' teams; returns logs, (S,).

    Args:
        adam: of team.value's parameters.
        log_beta: (S, R, N, A) of `tabulate`.
        rows, joint: of `draw_rows` and `draw_joint`.
    """
    squared, C = losses(team, data, log_beta, rows, joint, args)
    logs = {"q_loss": squared.detach(), "gap": C.detach()}
    descend(adam, team.value, squared + args.cql * C, args.max_grad_norm)
    with torch.no_grad():
        for slow, quick in zip(team.target.parameters(), team.value.parameters()):
            slow.lerp_(quick, args.tau)
    return logs


def clone(behaviour, data, generators, args):
    """Learn the behaviour (Eq. 7), if any u_i of Eq. 4 depends on it."""
    needed = args.cql and args.tau_lambda and not args.joint_cql
    adam = torch.optim.Adam(behaviour.parameters(), args.clone_lr, fused=True)
    for _ in range(args.clone_steps if needed else 0):
        loss = clone_loss(behaviour, data, draw_rows(generators, data, args))
        descend(adam, behaviour, loss, args.max_grad_norm)


@torch.no_grad()
def tabulate(behaviour, data):
    """log beta_i of every row, (S, R, N, A), at least -12; it never changes again."""
    table = data.obs.new_zeros(behaviour.S, *data.avail.shape)
    for sequences in data.sequences.split(100):  # all at once might be too large
        rows = sequences.mT.expand(behaviour.S, -1, -1)  # (S, L, B)
        table[:, rows[0]] = F.log_softmax(unroll(behaviour, data, rows), -1)
    return table.clamp(min=-12)


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import layout
    from data.run import Run, launch, read_args, remembering
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")


def arrange(dataset, args):
    """The dataset as `Data`, and what makes inputs of observations and last actions."""
    tensors, encode = layout.teams(dataset, args)
    return Data(*tensors), encode


def player(agents, encode):
    """How the teams of all seeds play: greedily, by their local values."""

    def think(x, avail, h):
        """Inputs (S, B, N, I), memories (S, B, N, H) -> values (S, B, N, A), memories."""
        begins = avail.new_zeros(len(x), 1, x.shape[1])
        q, h = agents(x[:, None], avail[:, None], begins, h.transpose(1, 2))
        return q[:, 0], h.transpose(1, 2)

    sizes = agents.N, agents.A, agents.hidden
    return remembering(think, encode, *sizes, agents, sampled=False)


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("cfcql", args)
    data, encode = arrange(run.load(discrete=True), args)
    team = Team(data, args, run.streams(0, "cpu")).to(run.device)
    adam = torch.optim.Adam(team.value.parameters(), args.lr, fused=True)
    generators = run.streams(2)
    learn = run.compile(update)
    if not run.begin(team=team, adam=adam, generators=generators):
        clone(team.behaviour, data, run.streams(1), args)
    log_beta = tabulate(team.behaviour, data)
    play = player(team.value.agents, encode)
    for step in run.steps(play):
        adam.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        rows = draw_rows(generators, data, args)
        joint = draw_joint(generators, data, args)
        run.logs = learn(team, adam, data, log_beta, rows, joint, args)
    method = "MACQL" if args.joint_cql else "CFCQL"
    return run.finish(method if args.cql else "QMIX", play)


def parse(argv=None):
    """Read the command line; where no flag speaks, the preset's values or a resumed run's hold."""
    kinds, known = "CFCQL is for discrete actions", ("bridge", "matrix", "smac")
    zero = "seed episodes eval_episodes layers cql tau_lambda td_lambda gamma clone_steps"
    share = "td_lambda gamma tau"
    return read_args(Args, PRESETS, argv, __doc__, kinds, known, "", zero, share)


if __name__ == "__main__":
    launch(main, parse)
