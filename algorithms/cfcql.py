"""CFCQL: counterfactual conservative Q-learning (Shao et al., NeurIPS 2023, arXiv 2309.12696); and MACQL, and QMIX.

The problem. A team of N agents learns from a fixed dataset. Conservative Q-learning (CQL) guards against actions that
nobody tried: it pushes the values of all actions down and that of the recorded one up. For a team "all actions" means
all joint actions, A^N of them, nearly none of which was recorded, and so the penalty grows with the team.

The idea. Replace one agent's action at a time and leave the others' as they were recorded: N penalties over A actions
each, in place of one over A^N. How much each of them counts depends on how far that agent's choice would lead from its
recorded behaviour. The team's value is mixed from local ones (QMIX) and grows with every one of them, so that the best
joint action is found by every agent alone, and that is how the team acts. But this form of the value is all that holds
the team together. It cannot say "A if you play B, and B if you play A": where the data hold both of XOR's conventions
it fails by its form, and where it succeeds all the same, luck broke a tie between fits that are equally bad.

Equations, by numbers of our own. h_i is what agent i saw and did so far, q_i(h_i, .) its local values; a prime marks
slowly moving copies; m_t is 0 where the game ended by its own rules.
 1 mixing     Q(s, a)   = w2(s) . elu( sum_i w1_i(s) q_i(h_i, a_i) + b1(s) ) + b2(s),   w1, w2 >= 0
 2 target     G_t       = r_t + gamma m_t [ (1 - lambda) Q'_{t+1} + lambda G_{t+1} ]    in the last step [ ] is Q'_{t+1}
              Q'_t      = Q'(s_t, a*),   a*_i = argmax_a q_i(h_i, a)
 3 deviation  K_i       = KL( p_i || beta_i ),   p_i(a') = softmax_a' Q(s, (a', a_-i))
 4 weights    u_i       = softmax_i( tau_lambda K_i )                   numbers; no gradient goes through them
 5 gap        C         = sum_i u_i log sum_a' exp Q(s, (a', a_-i)) - Q(s, a)
              C         = log mean_a' exp Q(s, a') - Q(s, a)            MACQL, a' joint actions drawn at random
 6 loss       L(q, w, b) = E [ 1/2 (Q(s, a) - G)^2 + cql C ]            QMIX with cql = 0
 7 behaviour  L(beta_i) = -E log beta_i(a_i|h_i)                        learned before
With one agent Eq. 6 is plain CQL. With tau_lambda = 0 all u_i are 1/N, and no behaviour has to be learned.

Commands, and the return you should see (last team; one CPU core of a small server, torch 2.13):
  python algorithms/cfcql.py                          XOR, data aa-ab-ba, 10 seeds at once, 11 s: 0 in 10 of 10 seeds,
      both play B; --joint-cql and --cql 0 the same; --dataset ab 1; ab-ba 0.2 +- 0.13 and all 0.6 +- 0.16, by luck
  python algorithms/cfcql.py --env matrix --task m-ne  12 s: 5, the data's local optimum, in 10 of 10 seeds (the best:
      20); --dataset balanced 20 in 10 of 10
  python algorithms/cfcql.py --env bridge             Bridge, mixed data, 5 seeds, 28 s: -15.5 in 5 of 5, as they block
      each other (the data -9.31, the best possible -1.2355)
  ... with --dataset optimal                          12 s: -1.25 in 5 of 5, where the papers see it fail; 9 of the
      seeds 100 to 109. The weight does it (--cql 1): the greedy team then does what was done most often, and in these
      data one side goes first a little more often. --cql 0.1: -7.9 +- 4.1; --cql 0: -15.5
  python algorithms/cfcql.py --env smac               5m_vs_6m, medium-replay data, 3 seeds, 3.5 min: 56 % of the
      battles won (return 15.8), cloning 43 %, the data 9 % (7.8); --task 2s3z 89 % in five seeds

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, cfcql
  S, N, A, M = 2, 3, 4, 500                                        # seeds, agents, actions, steps of one long episode
  obs, state, action = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6), torch.randint(A, (M + 1, N))
  reward, none = (action == obs[..., :A].argmax(-1)).float().mean(1), torch.zeros(M + 1)
  row = torch.arange(M + 1)                                        # sequences of 3 rows: 2 steps, and what comes then
  data = cfcql.Data(obs, state, torch.ones(M + 1, N, A).bool(), action, reward, none, (row < M).float(), row == 0,
                    row.view(-1, 3))
  args = cfcql.Args(num_seeds=S, clone_steps=50)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = cfcql.Team(data, args, generators)
  adam, log_beta = cfcql.optimizer(team, args), cfcql.clone(team, data, generators, args)
  for step in range(200):
      rows, joint = cfcql.draw_rows(generators, data, args), cfcql.draw_joint(generators, data, args)
      logs = cfcql.update(team, adam, data, log_beta, rows, joint, args)

Differences from the authors' code, and choices made here:
  1. Each agent has networks of its own; the authors' agents share one of each kind, told which agent it is.
  2. The N A mixed values of Eq. 5 are found at once, from what changes in the sum of Eq. 1; theirs loop over both.
  3. In Eq. 4 the agent that would deviate most counts most: the sign is that of the authors' code. There a tau_lambda
     of 100 means that agent alone; here it is a softmax like any other, which then leaves the others little.
  4. Random joint actions of MACQL are available ones; in the authors' code unavailable ones count, and are worth 0.
  5. An episode that was cut goes on to be worth Q' after its last step. In the authors' code that holds only for those
     as long as the longest of the minibatch. What is padding enters no mean.
  6. Target networks move a little in each update; theirs are copied every 200 episodes.
  7. One network of the state gives all weights and biases of Eq. 1; theirs are four.
  8. beta_i is cloned for a fixed number of updates; theirs until 20 minibatches bring no lower loss. log beta_i is
     at least -12 in Eq. 3, where theirs adds 1e-5 to both probabilities.
  9. In battles q_i and beta_i are GRUs that see their agent's last action too (--recurrent); elsewhere they have no
     memory. Views are in units of the data's mean and spread, or one-hot (Bridge's cells), or as they are (battles).
     The step size falls linearly to 0, but for the behaviour's.
 10. In battles that may last 100 steps and more lambda is 0.9, not 0.6. Eq. 5 leaves the best action worth about 1 more
     than recorded ones, whatever a reward is worth, and 1 - lambda of that enters Eq. 2 in every step: with 0.6, on
     2s3z's medium-replay data, Q promises 25 at a battle's start, where 15 can be had, and its team loses.

A minibatch consists of whole episodes, laid end to end in sequences of one length: Eq. 2 looks ahead. Seeds differ in
all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, Q = S N networks, M sequences of the data, L rows of a sequence, B sequences of a minibatch,
R rows (observations), A actions, J joint actions, W units of the mixer, H of a memory, E games, O observation,
I inputs, D state.
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

ILLEGAL = -1e10  # the value of an action that is not available


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "matrix"  # the environment: matrix, bridge, smac, or module:factory
    task: str = ""  # its task; by default XOR, or the environment's first
    dataset: str = "aa-ab-ba"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in an environment that is not ours
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
    tau_lambda: float = 1.0  # how much an agent's weight in it grows with its deviation; 0: all count alike
    joint_cql: bool = False  # MACQL: penalise random joint actions, not one agent's at a time
    joint_samples: int = 100  # MACQL: how many joint actions are drawn for each step
    td_lambda: float = 0.6  # how far the targets look ahead: 0 one step, 1 to the end
    gamma: float = 0.99  # discount
    # --- the optimisation
    normalize: bool = True  # views in units of the data's mean and spread
    one_hot: bool = False  # feed whole numbers as one-hot values (the cells of a grid)
    recurrent: bool = False  # local values with a memory (GRU) that see their agent's last action too
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    width: int = 32  # units of the mixer
    sequences: int = 64  # sequences of whole episodes per update
    lr: float = 1e-3  # Adam's step size, which falls linearly to 0
    tau: float = 0.01  # how far a target network moves in an update
    max_grad_norm: float = 10.0  # longest gradient of one seed
    clone_steps: int = 300  # updates of the behaviour model, before all others
    clone_lr: float = 2e-3  # their step size


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end, and at last one row of padding.

    In an episode's last row, and in the padding, no step begins: there `acted` is 0, and what belongs to a step too.
    """

    obs: torch.Tensor  # (R, N, I) what the agents see; with a memory their last action belongs to it
    state: torch.Tensor  # (R, D) what the mixer sees
    avail: torch.Tensor  # (R, N, A) bool, the available actions
    action: torch.Tensor  # (R, N) int64, of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    acted: torch.Tensor  # (R,) 1 where there is a step
    first: torch.Tensor  # (R,) bool: an episode begins
    sequences: torch.Tensor  # (M, L) row numbers: whole episodes end to end, padded


def draw_rows(generators, data, args):
    """A minibatch of sequences for each seed, with replacement, from its own generator: row numbers (S, L, B)."""
    M, B = len(data.sequences), args.sequences
    return data.sequences[torch.stack([torch.randint(M, (B,), generator=g, device=g.device) for g in generators])].mT


def draw_joint(generators, data, args):
    """Uniform numbers in [0, 1) that choose MACQL's joint actions, (S, L - 1, B, J, N); None for other methods."""
    if not args.joint_cql:
        return None
    shape = data.sequences.shape[1] - 1, args.sequences, args.joint_samples, data.avail.shape[1]
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """Q independent linear layers as one batched product; each is initialised by its own seed's generator."""

    def __init__(self, inputs, outputs, generators):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        start = [torch.empty(inputs + 1, outputs).uniform_(-bound, bound, generator=g) for g in generators]
        self.weight = nn.Parameter(torch.stack(start)[:, :-1].clone())  # (Q, in, out)
        self.bias = nn.Parameter(torch.stack(start)[:, -1:].clone())  # (Q, 1, out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (Q, B, out)


def mlp(inputs, outputs, args, generators):
    """A ReLU network for each generator: (Q, B, inputs) -> (Q, B, outputs)."""
    sizes = [inputs] + [args.hidden] * args.layers
    body = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o, generators), nn.ReLU())]
    return nn.Sequential(*body, Linear(sizes[-1], outputs, generators))


class GRU(nn.Module):
    """Q independent gated recurrent units with the weights' layout and equations of nn.GRU, as batched products."""

    def __init__(self, inputs, hidden, generators):
        super().__init__()
        bound = hidden**-0.5
        start = [torch.empty(inputs + hidden + 2, 3 * hidden).uniform_(-bound, bound, generator=g) for g in generators]
        split = torch.stack(start).split([inputs, hidden, 1, 1], 1)  # columns: reset, update, new
        self.input, self.state, self.input_bias, self.state_bias = (nn.Parameter(part.clone()) for part in split)

    def forward(self, x, first, h):
        """Run over sequences x (Q, L, B, I) from h (Q, B, H), forgetting where first (Q, L, B): (Q, L, B, H)."""
        Q, L, B, _ = x.shape
        sizes, states = [2 * h.shape[-1], h.shape[-1]], []  # reset and update; new
        gates = torch.baddbmm(self.input_bias, x.flatten(1, 2), self.input).view(Q, L, B, -1).split(sizes, -1)
        keep = (~first)[..., None].to(x.dtype)
        for gate, new, kept in zip(*(each.unbind(1) for each in (*gates, keep))):
            h = h * kept
            past, past_new = torch.baddbmm(self.state_bias, h, self.state).split(sizes, -1)  # (Q, B, 2H), (Q, B, H)
            reset, update = (gate + past).sigmoid().chunk(2, -1)
            h = torch.lerp((new + reset * past_new).tanh(), h, update)
            states.append(h)
        return torch.stack(states, 1)


class Agents(nn.Module):
    """A network for each agent of S teams, which gives numbers for all actions along sequences of what it sees."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, self.N, I), self.A, self.S = data.obs.shape, data.avail.shape[-1], len(generators)
        each = [g for g in generators for _ in range(self.N)]
        self.hidden = args.hidden * args.recurrent
        if args.recurrent:  # it remembers what it saw and did: no single observation shows the whole battle
            self.encoder = nn.Sequential(Linear(I, args.hidden, each), nn.ReLU())
            self.gru, self.head = GRU(args.hidden, args.hidden, each), Linear(args.hidden, self.A, each)
        else:
            self.body = mlp(I, self.A, args, each)

    def forward(self, obs, avail, first, h):
        """Views (S, L, B, N, I), available actions (S, L, B, N, A), where an episode begins (S, L, B), and memories
        (S, N, B, H) -> numbers (S, L, B, N, A), ILLEGAL for an action that is not available, and the last memories."""
        S, L, B, N, _ = obs.shape
        x = obs.movedim(3, 1).flatten(0, 1).flatten(1, 2)  # (Q, L B, I)
        if self.hidden:
            first = first[:, None].expand(-1, N, -1, -1).flatten(0, 1)
            states = self.gru(self.encoder(x).view(S * N, L, B, -1), first, h.flatten(0, 1))  # (Q, L, B, H)
            x, h = states.flatten(1, 2), states[:, -1].unflatten(0, (S, N))
        out = self.head(x) if self.hidden else self.body(x)
        return out.view(S, N, L, B, -1).movedim(1, 3).masked_fill(~avail, ILLEGAL), h


class Mixer(nn.Module):
    """The network of the state behind Eq. 1."""

    def __init__(self, inputs, num_agents, args, generators):
        super().__init__()
        self.sizes = [num_agents * args.width, args.width, args.width, 1]
        self.net = mlp(inputs, sum(self.sizes), args, generators)

    def forward(self, state):
        """(S, L, B, D) -> the weights of Eq. 1: w1 (S, L, B, N, W), b1 and w2 (S, L, B, W), b2 (S, L, B)."""
        out = self.net(state.flatten(1, 2)).unflatten(1, state.shape[1:3])
        w1, b1, w2, b2 = out.split(self.sizes, -1)
        return w1.unflatten(-1, (-1, b1.shape[-1])).abs(), b1, w2.abs(), b2[..., 0]


class Team(nn.Module):
    """Everything that S teams learn."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.agents = Agents(data, args, generators)  # q_i
        self.mixer = Mixer(data.state.shape[1], self.agents.N, args, generators)
        self.targets = copy.deepcopy(nn.ModuleList([self.agents, self.mixer])).requires_grad_(False)
        self.behaviour = Agents(data, args, generators)  # logits of beta_i


def unroll(agents, data, rows):
    """What the agents' networks give for all actions along the sequences `rows` (S, L, B): (S, L, B, N, A)."""
    h = data.obs.new_zeros(agents.S, agents.N, rows.shape[-1], agents.hidden)
    return agents(data.obs[rows], data.avail[rows], data.first[rows], h)[0]


def chosen(values, action):
    """The entries of the actions taken: (..., A), (...) -> (...)."""
    return values.gather(-1, action[..., None])[..., 0]


# ---------------------------------------------------------------- losses
def mix(weights, q):
    """Eq. 1 of J joint actions with the `Mixer`'s weights and local values q (S, L, B, J, N): (S, L, B, J)."""
    w1, b1, w2, b2 = weights
    inner = q @ w1 + b1[..., None, :]  # (S, L, B, J, W)
    return (F.elu(inner) @ w2[..., None])[..., 0] + b2[..., None]


def mix_replaced(weights, q, taken):
    """Q(s, (a', a_-i)) of every agent i and action a', (S, L, B, N, A), from local values q (S, L, B, N, A) and those
    of the actions taken (S, L, B, N). In the sum of Eq. 1 only one term changes: [q_i(a'), 1] [w1_i, the rest]."""
    w1, b1, w2, b2 = weights
    inner = (taken[..., None, :] @ w1)[..., 0, :] + b1  # (S, L, B, W)
    rest = inner[..., None, :] - taken[..., None] * w1  # (S, L, B, N, W)
    inner = torch.stack([q, torch.ones_like(q)], -1) @ torch.stack([w1, rest], -2)  # (S, L, B, N, A, W)
    hidden = F.elu(inner, inplace=True).flatten(-3, -2)  # in place, as it is large
    return (hidden @ w2[..., None]).view_as(q) + b2[..., None, None]


@torch.no_grad()
def td_lambda(reward, done, acted, value, gamma, lam):
    """Eq. 2 for the steps that begin in all rows but the last of sequences, (S, L - 1, B); inputs (S, L, B).

    Where no step begins, which is so in an episode's last row, what is still to come is worth what `value` says.
    """
    found, later = [], value[:, -1]
    for t in reversed(range(value.shape[1] - 1)):
        ahead = (1 - lam) * value[:, t + 1] + lam * later
        step = reward[:, t] + gamma * (1 - done[:, t]) * ahead
        found.append(step)
        later = torch.where(acted[:, t] > 0, step, value[:, t])
    return torch.stack(found[::-1], 1)


@torch.no_grad()
def agent_weights(replaced, log_beta, tau_lambda):
    """Eqs. 3 and 4: u_i, (S, L, B, N), from Q(s, (a', a_-i)), ILLEGAL where a' is not available, and log beta_i, both
    (S, L, B, N, A); without log beta_i all are 1/N."""
    if log_beta is None:
        return torch.full_like(replaced[..., 0], 1 / replaced.shape[-2])
    log_p = F.log_softmax(replaced, -1)
    deviation = (log_p.exp() * (log_p - log_beta)).sum(-1)
    return F.softmax(tau_lambda * deviation, -1)


def random_values(q, avail, uniform):
    """Local values of random joint actions, (S, L, B, J, N), chosen among the available ones by uniform numbers."""
    count = avail.sum(-1)[..., None, :]  # (S, L, B, 1, N)
    place = (uniform * count).long().clamp(max=count - 1)  # which of the available ones
    order = (~avail).to(torch.uint8).argsort(dim=-1, stable=True)  # (S, L, B, N, A) the available ones first
    action = order.gather(-1, place.movedim(-1, -2))  # (S, L, B, N, J)
    return q.gather(-1, action).movedim(-1, -2)


def gap(weights, q, taken, Q, avail, log_beta, joint, args):
    """Eq. 5 for each step, (S, L, B), MACQL's if there are numbers `joint` that choose joint actions.

    q, avail and log_beta (S, L, B, N, A); of the actions taken the local values (S, L, B, N) and Q(s, a) (S, L, B).
    """
    if joint is not None:
        drawn = mix(weights, random_values(q, avail, joint))  # (S, L, B, J)
        return drawn.logsumexp(-1) - math.log(drawn.shape[-1]) - Q
    replaced = mix_replaced(weights, q, taken).masked_fill(~avail, ILLEGAL)
    u = agent_weights(replaced, log_beta, args.tau_lambda)
    return (u * replaced.logsumexp(-1)).sum(-1) - Q


def losses(team, data, log_beta, rows, joint, args):
    """The two terms of Eq. 6 for each seed, (S,) each: half the squared error, and C. The arguments are `update`'s."""
    now, acted = rows[:, :-1], data.acted[rows]  # the rows where a step can begin
    q = unroll(team.agents, data, rows)  # (S, L, B, N, A)
    with torch.no_grad():  # Eq. 2
        agents, mixer = team.targets
        best = chosen(unroll(agents, data, rows), q.argmax(-1))  # (S, L, B, N)
        value = mix(mixer(data.state[rows]), best[..., None, :])[..., 0]  # (S, L, B)
        G = td_lambda(data.reward[rows], data.done[rows], acted, value, args.gamma, args.td_lambda)
    q, weights = q[:, :-1], team.mixer(data.state[now])
    taken = chosen(q, data.action[now])
    Q = mix(weights, taken[..., None, :])[..., 0]  # (S, L - 1, B)
    share = acted[:, :-1] / acted[:, :-1].sum((1, 2), keepdim=True)  # in the mean over steps; padding has none
    squared = (share * 0.5 * (Q - G) ** 2).sum((1, 2))
    if not args.cql:
        return squared, torch.zeros_like(squared)
    if log_beta is not None:
        seed = torch.arange(len(rows), device=rows.device)[:, None, None]
        log_beta = log_beta[seed, now]  # (S, L - 1, B, N, A)
    return squared, (share * gap(weights, q, taken, Q, data.avail[now], log_beta, joint, args)).sum((1, 2))


def clone_loss(behaviour, data, rows):
    """Eq. 7 for each seed, (S,), summed over agents."""
    now = rows[:, :-1]
    log_beta = chosen(F.log_softmax(unroll(behaviour, data, now), -1), data.action[now]).sum(-1)  # (S, L - 1, B)
    return -(data.acted[now] * log_beta).sum((1, 2)) / data.acted[now].sum((1, 2))


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


def descend(adam, losses, args):
    """One step down the losses (S,) of independent seeds, each with a gradient of limited length.

    Their sum leaves each seed the gradient that it would have alone.
    """
    gradients = torch.autograd.grad(losses.sum(), adam.moved)
    rows = [gradient.reshape(len(losses), -1) for gradient in gradients]
    length = sum((row**2).sum(1) for row in rows).sqrt()  # (S,)
    factor = (args.max_grad_norm / length.clamp(min=args.max_grad_norm))[:, None]
    adam.step((row * factor).view_as(gradient) for row, gradient in zip(rows, gradients))


def optimizer(team, args):
    """Adam for the local values with the mixer."""
    return Adam([*team.agents.parameters(), *team.mixer.parameters()], args.lr)


def update(team, adam, data, log_beta, rows, joint, args):
    """One update of all seeds' teams, on the sequences `rows` (S, L, B); returns diagnostics, (S,) tensors.

    log_beta is the table (S, R, N, A) of `clone`, joint is `draw_joint`'s.
    """
    squared, C = losses(team, data, log_beta, rows, joint, args)
    descend(adam, squared + args.cql * C, args)
    with torch.no_grad():
        torch._foreach_lerp_(list(team.targets.parameters()), adam.moved, args.tau)
    return {"q_loss": squared.detach(), "gap": C.detach()}


def clone_update(behaviour, adam, data, rows, args):
    """One update of the behaviour (Eq. 7) on the sequences `rows` (S, L, B)."""
    descend(adam, clone_loss(behaviour, data, rows), args)


def needs_behaviour(args):
    """Whether any u_i of Eq. 4 depends on beta_i."""
    return args.cql > 0 and args.tau_lambda > 0 and not args.joint_cql


def clone(team, data, generators, args, clone_update=clone_update):
    """Learn the behaviour before anything else, if anything depends on it, and return it as `tabulate` does."""
    adam = Adam(team.behaviour.parameters(), args.clone_lr)
    for _ in range(args.clone_steps * needs_behaviour(args)):
        clone_update(team.behaviour, adam, data, draw_rows(generators, data, args), args)
    return tabulate(team, data, args)


@torch.no_grad()
def tabulate(team, data, args):
    """The behaviour never changes again, so it becomes a table: log beta_i of every row, (S, R, N, A); None if nothing
    depends on it."""
    if not needs_behaviour(args):
        return None
    S, table = team.behaviour.S, data.obs.new_zeros(team.behaviour.S, *data.avail.shape)
    for rows in data.sequences.split(max(1, 10_000 // data.sequences.shape[1])):
        log_beta = F.log_softmax(unroll(team.behaviour, data, rows.mT.expand(S, -1, -1)), -1)  # (S, L, B, N, A)
        table[:, rows.mT] = log_beta.clamp(min=-12)
    return table


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "runs.py").exists() and (HOME / "envs" / "play.py").exists():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    import data as datasets
    import envs
    from data import layout, runs
elif __name__ == "__main__":
    sys.exit("error: this file runs inside its repository, beside data/ and envs/; alone, it is to be imported")


def preset(args):
    """What differs from XOR's values, above, in the other environments; each value can be set by its flag."""
    env, task = args.env, args.task or {"smac": "5m_vs_6m", "matrix": "xor"}.get(args.env, "")
    values = dict(normalize=False, num_seeds=3, steps=2000, eval_every=500, eval_episodes=32, cql=1.0)
    if env == "matrix":
        values = dict(dataset="aa-ab-ba" if task == "xor" else datasets.names(env, task)[-1])
    elif env == "bridge":
        values |= dict(dataset="mixed", num_seeds=5, one_hot=True, sequences=4)
    elif env == "smac":
        limit = envs.make(env, task).time_limit
        values |= dict(dataset="medium-replay", recurrent=True, cql=5.0, clone_steps=500)
        values |= dict(sequences=max(2, 560 // limit), td_lambda=0.6 if limit < 100 else 0.9)  # some 500 steps
    else:  # not ours
        values |= dict(normalize=True, dataset="", sequences=8)
    return values | dict(env=env, task=task)


def arrange(dataset, args):
    """The dataset as `Data`, and the function that makes the networks' inputs of what a game shows: `layout.teams`.
    Raises ValueError for continuous actions."""
    if dataset.avail_actions is None:
        raise ValueError("CFCQL is for discrete actions, and these are continuous")
    tensors, encode = layout.teams(dataset, args)
    return Data(*tensors), encode


def player(agents, encode):
    """The teams of all seeds as they play: a `data.team.Player`."""

    def think(x, avail, h):
        goes_on = torch.zeros(agents.S, 1, x.shape[1], dtype=torch.bool, device=x.device)
        q, h = agents(x[:, None], avail[:, None], goes_on, h.transpose(1, 2))  # (S, 1, B, N, A), (S, N, B, H)
        return q[:, 0], h.transpose(1, 2)

    return runs.Player(think, encode, agents.N, agents.A, agents.hidden)


def evaluate(agents, encode, args, step, episodes, device):
    """Scores (S, E) of the teams of all seeds: `runs.score`."""
    teams = player(agents, encode)
    return runs.score(teams, args, step, episodes, device, teams.memory)


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run, method = runs.Run("cfcql", args), "QMIX" if not args.cql else "MACQL" if args.joint_cql else "CFCQL"
    device = run.device
    dataset = run.load(episodes=args.episodes)
    data, encode = arrange(dataset, args)
    team = Team(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adam, generators = optimizer(team, args), [runs.stream(seed, 2, device) for seed in run.seeds]
    learn, agents = run.compile(update), team.agents
    logs = dict.fromkeys(("q_loss", "gap"), torch.full((args.num_seeds,), math.nan))
    if run.begin(team=team, adam=adam, generators=generators):
        log_beta = tabulate(team, data, args)
    else:
        streams = [runs.stream(seed, 1, device) for seed in run.seeds]
        log_beta = clone(team, data, streams, args, run.compile(clone_update))

    for step in run.steps(args.steps, args.eval_every):
        if run.due(logs):
            scores = evaluate(agents, encode, args, step, args.eval_episodes, device)
            run.record(logs, {name: x.mean(1) for name, x in scores.items()})
        if step < args.steps:
            adam.lr.fill_(args.lr * (1 - step / args.steps))
            rows, joint = draw_rows(generators, data, args), draw_joint(generators, data, args)
            logs = learn(team, adam, data, log_beta, rows, joint, args)

    scores = evaluate(agents, encode, args, args.steps, 10 * args.eval_episodes, device)
    teams = player(agents, encode)
    run.keep_team(teams, dataset.obs.shape[2:], teams.A, teams.memory, agents)
    return run.finish(method, scores, dataset, run.best)


def parse(argv=None):
    """Read the command line; where no flag speaks, the environment's own values or those of the resumed run hold."""
    args = runs.parse(Args, preset, argv, __doc__, "CFCQL is for discrete actions", ("bridge", "matrix", "smac"))
    zero = "seed episodes eval_episodes layers cql tau_lambda td_lambda gamma clone_steps"
    runs.check_numbers(args, may_be_zero=zero, at_most_one="td_lambda gamma tau")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
