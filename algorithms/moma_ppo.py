"""MOMA-PPO: a team rehearses in a learned world (Barde et al., AAMAS 2024, arXiv 2305.17198).

The problem. N agents learn from a fixed dataset that mixes several ways of working
together. What one agent does there may be a good half of some convention. The halves of
two conventions do not fit, and nothing in the data shows what happens if they meet. A
method that never plays cannot find out.

The idea. Act 1 learns a model of the world from the data. In act 2 the team plays in it
for a few steps from recorded situations, and learns with an ordinary on-policy method
(MAPPO). Agents that meet in the model can agree on one convention. An ensemble says where
the model is guessing: there the reward is lowered, and beyond a limit the rollout stops.

Equations, by numbers of our own. s is the state, a the joint action, o_i agent i's view,
h_i its last views and actions. Members e = 1..n of the ensemble predict s'_e and r_e;
x_e = (s'_e, r_e). From Eq. 2 on, the members are the best ones only.
 1 ensemble   L_e   = -log N(s'; s'_e, sigma_e) / D' - log N(r; r_e, sigma_e) + BCE(end),
                      D' entries of s' that vary
 2            r^    = mean_e r_e,  s^ = s'_e of one member drawn for each step,
                      end = majority of the members
 3            eps_r = var_e r_e,  eps_g = | cov_e x_e |_F
 4            r~    = box(r^) - lambda_r min(eps_r, l) - lambda_g min(eps_g, l),
                      s^ = box(s^)
 5 masks      m     = 0 where the game ended,
              zeta  = 0 at the k-th step, or where eps_g >= l
 6 GAE        delta_t = r~_t + gamma m_t V(s_{t+1}) - V(s_t)
 7            A_t   = delta_t + gamma lambda m_t zeta_t A_{t+1}
 8            R_t   = r~_t + gamma m_t [ zeta_t R_{t+1} + (1 - zeta_t) V(s_{t+1}) ]
 9 agents     V     = sum_i w_i(s) V_i(h_i, o_i) + b(s),
              log pi = sum_i log pi_i(a_i | h_i, o_i)
10            L(pi) = -E min( rho A, clip(rho) A )
                      + mu E sum max(0, |mean action| - 1)^2 - alpha H
11            L(V)  = 1/2 max( E (V - R)^2, E (V_old + clip(V - V_old) - R)^2 )

Eq. 1: each member learns alone, from minibatches of its own. That members differ where
there are no data is all that Eq. 3 measures. sigma_e is an output, too, between e^-6 and
e^2 times the spread of what is predicted.

Eqs. 3 and 4: members are compared in the data's own units, so a task has its own l and
lambdas. eps_g compares them before the box, which would make them equal.

Eqs. 5 to 8: where the game ends, nothing follows. Where a rollout only stops, V(s_{t+1})
stands for what would have followed. The step that was unsure still counts. A, R
and V_old are found once, before an update's first minibatch.

Eq. 9: V serves training only. To play, an agent needs its own view and memory.

Eq. 10: rho = pi / pi_played is the ratio of the *joint* action, the product of all agents'
ratios. A is the team's, earned by what all did together, so it is weighted by how likely
that is now. One clip limits how far the whole team moves; a clip for each agent would let
it move N times as far. rho is cut at e^10. A is less its mean and over its spread in all
rollouts of an update. Policies are Gaussians on the whole line, and their actions are
clipped to [-1, 1] where they are played. Beyond that the reward no longer teaches the
mean, so the term with mu (--action-penalty, 1) brings it back. A policy's deviation lies
between e^-6 and 1.

Each minibatch is a step of Adam down L(pi) + L(V), with a gradient of limited length. The
price of entropy alpha begins at 0, and after each minibatch becomes max(0, alpha + 0.001
(H_least - H)): there is no bonus before the team's joint entropy H falls below H_least.

Commands, and the return to expect (last policy, greedy; one CPU core):
  python algorithms/moma_ppo.py
      the coordination game, unfavourable data, 10 seeds, 8 s: 1, the best return, in all
      seeds; cloning (bc.py) has 0
  python algorithms/moma_ppo.py --env reacher --task all-observant
      two agents share an arm, 3 seeds, 9 minutes: normalised 1.00 (cloning 0.89)
  python algorithms/moma_ppo.py --env ant --dataset medium
      four agents share an ant, 3 seeds, 34 minutes: 2,743 (data 1,870, cloning 2,429)
  ... --reward-penalty 0 --state-penalty 0 | --no-box | --horizon 5
  ... --reward-penalty 0 --state-penalty 0 --aleatoric 1   (MOPO's penalty)

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, moma_ppo as moma
  S, T, row = 2, 10, torch.arange(20 * 11)  # seeds; 20 episodes of T steps, T + 1 rows each
  age, start = row % (T + 1), row[row % (T + 1) < T]
  state, action = torch.randn(len(row), 3), 2 * torch.rand(len(row), 2, 1) - 1
  reward, held = -state.abs().sum(1), start >= 18 * (T + 1)  # two episodes are held out
  columns = torch.tensor([[0, 1], [1, 2]])  # each agent sees two entries of the state
  data = moma.Data(state, action, reward, 0 * reward, reward, age, start, row[age == 0],
                   start[~held], start[held], columns, None)
  small = dict(num_seeds=S, model_steps=200, model_hidden=32, reward_hidden=32)
  small |= dict(model_batch=32, steps=20, rollouts=32, horizon=5)
  args = moma.Args(**moma.PRESETS[""] | small)
  streams = [torch.Generator().manual_seed(s) for s in range(S)]
  agents, model = moma.Agents(data, args, streams), moma.Model(data, args, streams)
  adam = torch.optim.Adam(agents.parameters(), args.lr)
  model_adam = torch.optim.Adam(model.parameters(), args.model_lr)
  for step in range(args.model_steps):  # act 1
      model_adam.param_groups[0]["lr"] = args.model_lr * (1 - step / args.model_steps)
      rows = moma.draw_batches(streams, data, args)
      moma.model_update(model, model_adam, data, rows, args)
  elites = model.choose(moma.best(moma.validate(model, data, S), args))
  world = moma.dream(elites, data, args)
  for step in range(args.warmup):  # 0 here; an ant's agents clone first
      rows = moma.draw_rows(streams, data.start, args.batch_size)
      moma.clone_update(agents, adam, data, rows, args)
  for step in range(args.steps):  # act 2
      adam.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
      noise = moma.draw_noise(streams, data, args)
      batch, logs = moma.rehearse(agents, world, data, noise, args)
      orders = moma.draw_orders(streams, batch.returns.shape[1], args)
      logs |= moma.update(agents, adam, batch, orders, args)

Where the paper and its authors' code disagree, this is the paper's:
  1. The reward is all members' mean, not one's. A game ends by the members' vote; in the
     code the agents' heads of the one drawn member vote.
  2. eps_g is compared with its limit before it is capped. The code caps it first, so that
     no rollout ever stops for it (--no-adaptive).
  3. In the ant each agent drives the leg that it sees (see envs/mamujoco.py).
Choices made here, and in brackets the flags for what the paper or its code has. Reasons
stand under the same numbers in algorithms/moma_ppo.md.
  4. The model predicts the global state once; the code, every agent's view of it. In eps_g
     an entry counts as often as agents see it, and the reward once for each agent.
  5. Networks see and predict in units of the data's spread, and the model predicts changes.
     The code has raw numbers and the next state.
  6. Whole episodes are held out, and members ranked by how their means err there. The code
     holds out steps, and ranks by drawn predictions.
  7. A rollout that ends early makes room for a new one: an update always sees rollouts x
     horizon steps.
  8. The policies' entropy and the penalty on actions are exact means. The code weights
     them by rho.
  9. Networks are smaller than the code's, and step sizes larger; these fall to 0.
 10. L(V) and its clip are in units of the returns' spread. w(s) may be negative, as in the
     code, though not in QMIX.
 11. Policies begin with the spread of the recorded actions, not with 1.
 12. The arm's box is wider than the data (--box-margin 0). The ant's V(s') is bounded
     (--no-bound-values).
 13. Bodies rehearse 25 or 50 steps (--horizon 10), some from an episode's start
     (--first 0), and remember nothing (--memory 10 --width 128).
 14. The ant's agents first clone the data (--warmup 0), while V learns the data's returns.
     These take a time limit for the end.
 15. Bodies' models learn with --beta-nll 0.5 (0). The ant's draws its next states
     (--no-sample-states) and tells a fall by s'_e (--end-from step).
 16. The ant's limit, penalties, --no-adaptive and least entropy are ours. The game has no
     penalties, as in the code.

Seeds differ in all that is random here, but share the held-out episodes.

Shapes: S seeds, N agents, B rollouts or steps of a minibatch, k steps of a rollout,
n members, U = S n models, Q = S N networks of agents, A actions (or entries of an action),
X = N A, O observation, D state, H steps of memory, W its width, R rows (observations) of
the dataset, M rows in which a step begins, E episodes.
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
from torch import Tensor

ILLEGAL = -1e10  # the logit of an action that is not available
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "matrix"  # matrix, polynomial, reacher, ant, halfcheetah, or module:factory
    task: str = ""  # its task; by default the coordination game, or the environment's first
    dataset: str = ""  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of rewards in games that are not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 10  # how many seeds train, all at once
    steps: int = 20  # updates of MAPPO, each with its own rollouts
    eval_every: int = 5  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 10  # games per seed and evaluation; 0: no environment
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/moma_ppo
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- act 1, the world model
    model_steps: int = 300  # updates of the model
    model_eval_every: int = 100  # updates between looks at the held-out episodes
    model_batch: int = 64  # steps per update, drawn by each member on its own
    model_hidden: int = 32  # units per hidden layer of what predicts the state
    reward_hidden: int = 32  # and of what predicts the reward and the end
    model_layers: int = 2  # hidden layers
    end_from: Literal["step", "state"] = "step"  # what tells the end: (s, a) or s'
    beta_nll: float = 0.0  # 0: likelihood; 1: squared errors, whatever sigma
    model_lr: float = 3e-3  # Adam's step size, which falls linearly to 0
    members: int = 7  # how many models are learned
    elites: int = 5  # how many of them, the best, are kept
    holdout: float = 0.1  # the share of the episodes to judge them by
    # --- act 2, rollouts in it
    rollouts: int = 256  # rollouts at once
    horizon: int = 1  # k, their steps
    first: float = 0.0  # the share of them that begin where an episode did
    reward_penalty: float = 0.0  # lambda_r, weight of eps_r
    state_penalty: float = 0.0  # lambda_g, weight of eps_g
    limit: float = 2.0  # l, the most that eps_r and eps_g count
    aleatoric: float = 0.0  # weight of MOPO's penalty, the largest spread a member predicts
    adaptive: bool = True  # and rollouts stop where eps_g reaches it
    box: bool = True  # clip states and rewards to the range of the data
    box_margin: float = 0.0  # it is wider by this share; for rewards below only
    bound_values: bool = False  # keep V(s') from rising far above the data's returns
    sample_states: bool = False  # draw the next state, do not take the mean
    # --- act 2, MAPPO
    warmup: int = 0  # updates of cloning before the first rehearsal
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.98  # how far advantages look past the critic
    clip: float = 0.2  # how far the joint ratio, and V, may move in an update
    action_penalty: float = 1.0  # weight of mean actions beyond [-1, 1]
    least_entropy: float = -2.0  # H_least, of the joint action: below it, a bonus grows
    epochs: int = 5  # passes over the rollouts
    batch_size: int = 64  # steps in a minibatch
    lr: float = 1e-3  # Adam's step size, which falls linearly to 0 after the warm-up
    max_grad_norm: float = 1.0  # longest gradient of a team, or of a member
    hidden: int = 64  # units of the two hidden layers of policies, values and mixer
    memory: int = 0  # how many steps an agent remembers; 0 for none
    width: int = 32  # of the memory's attention


BODY = dict(
    num_seeds=3,
    model_steps=3000,
    model_eval_every=500,
    model_batch=256,
    model_hidden=200,
    reward_hidden=200,
    model_layers=3,
    model_lr=5e-3,
    beta_nll=0.5,
    reward_penalty=0.05,
    state_penalty=0.1,
    box_margin=0.5,
    horizon=25,
    first=0.5,
    rollouts=80,
    steps=300,
    eval_every=50,
    lr=3e-4,
    batch_size=500,
    hidden=128,
)
ANT = dict(
    model_steps=6000,
    model_hidden=400,
    end_from="state",
    box_margin=0.0,
    bound_values=True,
    horizon=50,
    first=0.1,
    limit=60.0,
    state_penalty=1.5,
    adaptive=False,
    sample_states=True,
    least_entropy=-8.0,
    warmup=3000,
    steps=100,
    eval_every=25,
)
PRESETS = {  # what differs from the values above; "" is a game that is not ours
    "matrix": dict(task="coordination"),
    "polynomial": {},
    "reacher": BODY,
    "halfcheetah": BODY,
    "ant": BODY | ANT,
    "ant partial": dict(steps=150, eval_every=50),  # there agents learn more slowly
    "": BODY,
}


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end.

    In an episode's last row no step begins. A state holds each distinct entry of all that
    there is to see once; what the agents see is picked from it.
    """

    state: Tensor  # (R, D)
    action: Tensor  # (R, N, A) in [-1, 1], or one-hot, of the step that begins here; or 0
    reward: Tensor  # (R,)
    done: Tensor  # (R,) 1 where the game ended by its own rules with this step
    togo: Tensor  # (R,) what the rest of the episode was worth, discounted by gamma
    age: Tensor  # (R,) int64, how many steps ago the episode began
    start: Tensor  # (M,) the rows in which a step begins
    openings: Tensor  # (E,) each episode's first row
    train: Tensor  # (M',) those of `start` that the model learns from
    held: Tensor  # (M'',) and those by which it is judged
    columns: Tensor  # (N, O) the entries of s that each agent sees; D: a 0, for short views
    avail: Tensor | None  # (N, A) bool, available actions; None where they are continuous


class Units(nn.Module):
    """Numbers less the mean of x (M, ...), over its spread, for each entry.

    A spread is at least `least`. `vary` says which entries are no constants.
    """

    def __init__(self, x, least=1e-8):
        super().__init__()
        low, high = x.aminmax(dim=0)
        vary = low < high
        std = torch.where(vary, x.std(0, correction=0), 0).clamp(min=least)
        self.register_buffer("vary", vary)
        self.register_buffer("mean", torch.where(vary, x.mean(0), low))  # constants to the bit
        self.register_buffer("std", std)

    def forward(self, x):
        return (x - self.mean) / self.std


class Noise(NamedTuple):
    """All that a rehearsal draws; given it, there is no chance in it.

    The noise of one step has the same shapes without k.
    """

    rows: Tensor  # (S, k, B) where a rollout begins: at step 0, and where one was just over
    member: Tensor  # (S, k, B) the member whose next state is taken
    action: Tensor  # (S, k, B, N, A) for `Agents.sample`
    state: Tensor  # (S, k, B, D) of the next state; 0 without --sample-states


def draw(generators, how, *shape):
    """Random numbers (S, *shape), each seed's own."""
    draws = [getattr(torch.empty(shape, device=g.device), how)(generator=g) for g in generators]
    return torch.stack(draws)


def draw_noise(generators, data, args):
    """The `Noise` of one rehearsal.

    A rollout begins in any recorded step, held out or not; with --first, some begin where an
    episode did. Members are drawn anew in each step.
    """
    (N, A), k, B = data.action.shape[1:], args.horizon, args.rollouts
    where = draw(generators, "uniform_", k, B)

    def pick(rows):
        return rows[(where * len(rows)).long()]

    rows = pick(data.start)
    if args.first:
        first = draw(generators, "uniform_", k, B) < args.first
        rows = torch.where(first, pick(data.openings), rows)
    member = (draw(generators, "uniform_", k, B) * args.elites).long()
    action = draw(generators, "normal_" if data.avail is None else "exponential_", k, N, B, A)
    state = action.new_zeros(*rows.shape, data.state.shape[1])
    if args.sample_states:
        state = draw(generators, "normal_", *state.shape[1:])
    return Noise(rows, member, action.transpose(2, 3), state)


def draw_rows(generators, rows, *shape):
    """Some of the rows for each seed, with replacement: (S, *shape)."""
    picks = [torch.randint(len(rows), shape, generator=g, device=g.device) for g in generators]
    return rows[torch.stack(picks)]


def draw_batches(generators, data, args):
    """What a model update learns from: rows (S, n, B), each member's own, none held out."""
    return draw_rows(generators, data.train, args.members, args.model_batch)


def draw_orders(generators, count, args):
    """The order in which each epoch goes over a rehearsal: (epochs, S, count)."""
    orders = []
    for _ in range(args.epochs):
        orders += [torch.randperm(count, generator=g, device=g.device) for g in generators]
    return torch.stack(orders).unflatten(0, (args.epochs, -1))


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """Independent linear layers as one batched product, one for each generator."""

    def __init__(self, inputs, outputs, generators, scale=1.0):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        shape = inputs + 1, outputs
        start = [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in generators]
        start = torch.stack(start)
        self.weight = nn.Parameter(scale * start[:, :-1])  # (G, in, out), G generators
        self.bias = nn.Parameter(start[:, -1:] * (scale == 1))  # (G, 1, out); 0 in small heads

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (G, B, out)


def mlp(inputs, outputs, hidden, layers, generators, scale=1.0):
    """A ReLU network for each generator: (G, B, inputs) -> (G, B, outputs)."""
    modules = []
    for _ in range(layers):
        modules += [Linear(inputs, hidden, generators), nn.ReLU()]
        inputs = hidden
    return nn.Sequential(*modules, Linear(inputs, outputs, generators, scale))


class Guess(NamedTuple):
    """What U models predict of a step: raw numbers, not in units of the data."""

    state: Tensor  # (U, B, D) the mean of the next state
    state_std: Tensor  # (U, B, D)
    reward: Tensor  # (U, B) the mean
    reward_std: Tensor  # (U, B)
    end: Tensor  # (U, B) the logit of the game's end


class Model(nn.Module):
    """n models for each seed: of the next state, the reward and the end.

    Networks see and predict in units of the data; `forward` returns raw numbers.
    """

    def __init__(self, data, args, generators):
        super().__init__()
        each = [g for g in generators for _ in range(args.members)]
        action = data.action[data.start].flatten(1)  # (M, X)
        D, layers, self.end_from = data.state.shape[1], args.model_layers, args.end_from
        inputs = D + action.shape[1]
        judged = inputs if self.end_from == "step" else D
        self.for_state = mlp(inputs, 2 * D, args.model_hidden, layers, each)
        self.for_reward = mlp(inputs, 2, args.reward_hidden, layers, each)
        self.for_end = mlp(judged, 1, args.reward_hidden, 2, each)
        self.state = Units(data.state, 1e-3)
        self.move = Units(data.state[data.start + 1] - data.state[data.start])
        self.action = Units(action, 1e-3)
        self.reward = Units(data.reward[data.start])

    def forward(self, state, action, next_state=None):
        """(U, B, D), (U, B, X) -> `Guess`.

        With --end-from state the end is told by next_state (U, B, D), or, where
        there is none, by the predicted one.
        """
        x = torch.cat([self.state(state), self.action(action)], -1)
        move, log_std = self.for_state(x).chunk(2, -1)  # (U, B, D) each
        reward, reward_log_std = self.for_reward(x).unbind(-1)  # (U, B) each
        guess = state + self.move.mean + self.move.std * self.move.vary * move
        if self.end_from == "state":
            x = self.state(guess if next_state is None else next_state)
        return Guess(
            guess,
            self.move.std * log_std.clamp(-6, 2).exp(),
            self.reward.mean + self.reward.std * reward,
            self.reward.std * reward_log_std.clamp(-6, 2).exp(),
            self.for_end(x)[..., 0],
        )

    def choose(self, which):
        """A copy with only the models `which` (U',), which learns no more."""
        chosen = copy.deepcopy(self).requires_grad_(False)
        for parameter in chosen.parameters():
            parameter.data = parameter.data[which]
        return chosen


class Memory(nn.Module):
    """What Q agents remember: attention over H views and actions, then their weighted mean.

    No preset has it.
    """

    def __init__(self, inputs, H, W, generators):
        super().__init__()
        self.embed = Linear(inputs, W, generators)
        self.attend = Linear(W, 3 * W, generators)
        self.gain = nn.Parameter(torch.ones(len(generators), 1, W))
        self.shift = nn.Parameter(torch.zeros(len(generators), 1, W))
        self.judge = Linear(W, W, generators).weight  # (Q, W, W), without a bias
        self.wanted = nn.Parameter(draw(generators, "normal_", 1, W))  # (Q, 1, W)
        angle = torch.arange(H)[:, None] / 10_000 ** (torch.arange(0, W, 2) / W)
        place = torch.stack([angle.sin(), angle.cos()], -1)  # (H, W / 2, 2)
        self.register_buffer("place", place.flatten(1))

    def forward(self, history):
        """(Q, B, H, O + A) -> (Q, B, W)."""
        apart = history.shape[1:3]  # B and H
        tokens = self.embed(history.flatten(1, 2)) + self.place.repeat(apart[0], 1)  # (Q, B H, W)
        query, key, value = self.attend(tokens).unflatten(1, apart).chunk(3, -1)
        seen = F.scaled_dot_product_attention(query, key, value).flatten(1, 2)
        x = F.layer_norm(tokens + seen, seen.shape[-1:]) * self.gain + self.shift
        score = (torch.bmm(x, self.judge).tanh() * self.wanted).sum(-1, keepdim=True)
        share = score.unflatten(1, apart).softmax(2)  # (Q, B, H, 1)
        return (share * x.unflatten(1, apart)).sum(2)


class Agents(nn.Module):
    """What S teams learn: N memories, policies and values each, and a mixer.

    Agents share nothing. Their networks are Q = S N, and see (Q, B, ...).
    """

    def __init__(self, data, args, generators):
        super().__init__()
        self.S, self.H = len(generators), args.memory
        self.N, self.O = data.columns.shape
        self.A, self.discrete = data.action.shape[-1], data.avail is not None
        each = [g for g in generators for _ in range(self.N)]
        inputs, outputs = self.O, self.A if self.discrete else 2 * self.A
        if self.H:
            self.memory = Memory(self.O + self.A, self.H, args.width, each)
            inputs += args.width
        self.policies = mlp(inputs, outputs, args.hidden, 2, each, scale=0.1)
        self.values = mlp(inputs, 1, args.hidden, 2, each)
        self.mixer = mlp(data.state.shape[-1], self.N + 1, args.hidden, 2, generators)
        # what the data say
        togo = data.togo[data.start]
        spread = data.action[data.start].std(0, correction=0)  # (N, A)
        self.state, self.returns = Units(data.state, 1e-3), Units(togo, 1e-3)
        for name, value in dict(
            alpha=torch.zeros(self.S),  # the price of entropy
            highest=togo.max() + (togo.max() - togo.min()) / 2,  # the bound of --bound-values
            log_spread=spread.log().clamp(-6, 0),
            view_mean=F.pad(self.state.mean, (0, 1))[data.columns],  # (N, O)
            view_std=F.pad(self.state.std, (0, 1), value=1)[data.columns],
            columns=data.columns,
            avail=data.avail,
        ).items():
            self.register_buffer(name, value)

    def see(self, state):
        """What agents see of states (..., D), in units of the data: (..., N, O)."""
        return self.scale(F.pad(state, (0, 1))[..., self.columns])

    def scale(self, obs):
        """Plain views (..., N, O) in units of the data."""
        return (obs - self.view_mean) / self.view_std

    def each(self, networks, x):
        """What Q networks make of x (S, B, N, ...)."""
        out = networks(x.transpose(1, 2).flatten(0, 1))  # (Q, B, ...)
        return out.unflatten(0, (self.S, self.N)).transpose(1, 2)

    def remember(self, obs, history):
        """What policies and values see: an agent's memory of H steps, and its view.

        (S, B, N, O), (S, B, N, H, O + A) -> (S, B, N, inputs).
        """
        return torch.cat([self.each(self.memory, history), obs], -1) if self.H else obs

    def policy(self, x):
        """Log-probabilities (S, B, N, A), or means and log sigmas (S, B, N, 2A)."""
        out = self.each(self.policies, x)
        if self.discrete:
            return F.log_softmax(out.masked_fill(~self.avail, ILLEGAL), -1)
        mean, log_std = out.chunk(2, -1)
        return torch.cat([mean, (self.log_spread + log_std).clamp(-6, 0)], -1)

    def value(self, x, state):
        """Eq. 9: V of states (S, B, D), in units of the reward, (S, B)."""
        own = self.each(self.values, x)[..., 0].mT  # (S, N, B)
        weight, bias = self.mixer(self.state(state)).mT.split([self.N, 1], 1)
        mixed = (weight * own).sum(1) + bias[:, 0]
        return self.returns.mean + self.returns.std * mixed

    def log_prob(self, policy, action):
        """Log-probability and entropy of the joint action: sums over agents, (S, B)."""
        if self.discrete:
            log_prob = policy.gather(-1, action[..., None])  # (S, B, N, 1)
            entropy = -policy.exp() * policy  # (S, B, N, A)
            return log_prob.sum(-1).sum(-1), entropy.sum(-1).sum(-1)
        mean, log_std = policy.chunk(2, -1)
        log_prob = -0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - HALF_LOG_2PI
        entropy = log_std + 0.5 + HALF_LOG_2PI
        return log_prob.sum(-1).sum(-1), entropy.sum(-1).sum(-1)

    def sample(self, policy, noise=None):
        """Actions (S, B, N) or (S, B, N, A), the likeliest without noise (S, B, N, A).

        Also as world and memory see them, (S, B, N, A): one-hot, or clipped.
        """
        if self.discrete:
            if noise is not None:  # which exponential clock rings first is a draw from pi
                policy = policy - noise.clamp(min=1e-30).log()
            action = policy.argmax(-1)
            return action, F.one_hot(action, self.A).to(self.alpha.dtype)
        mean, log_std = policy.chunk(2, -1)
        action = mean if noise is None else mean + log_std.exp() * noise
        return action, action.clamp(-1, 1)


# ---------------------------------------------------------------- act 1: the world model
def nll(error, std, units, beta):
    """-log N less a constant, in units of what is predicted; beta as in --beta-nll."""
    sigma = std / units.std
    loss = sigma.log() + 0.5 * (error / std) ** 2
    return loss * sigma.detach() ** (2 * beta) * units.vary  # constants teach nothing


def model_loss(model, data, rows, beta):
    """Eq. 1: L_e of U models, (U,), on the steps that begin in the rows (U, B)."""
    next_state, reward, done = data.state[rows + 1], data.reward[rows], data.done[rows]
    guess = model(data.state[rows], data.action[rows].flatten(2), next_state)
    for_state = nll(next_state - guess.state, guess.state_std, model.move, beta).sum(-1)
    for_state = for_state / model.move.vary.sum().clamp(min=1)
    for_reward = nll(reward - guess.reward, guess.reward_std, model.reward, beta)
    for_end = F.binary_cross_entropy_with_logits(guess.end, done, reduction="none")
    return (for_state + for_reward + for_end).mean(1)


@torch.no_grad()
def validate(model, data, S, most=2000):
    """Errors of the members on at most so many held-out steps, (S, n) each.

    Of states: the root mean square over entries, in units of the changes' spread.
    Of rewards: the absolute error, in units of their spread.
    """
    count, U = len(data.held), len(model.for_end[0].weight)
    even = torch.linspace(0, count - 1, min(most, count), device=data.held.device)
    rows = data.held[even.long()]  # (B,)
    inputs = data.state[rows], data.action[rows].flatten(1)
    guess = model(*(x.expand(U, -1, -1) for x in inputs))
    error = (guess.state - data.state[rows + 1]) / model.move.std
    for_state = (error**2 * model.move.vary).sum(-1) / model.move.vary.sum().clamp(min=1)
    for_reward = (guess.reward - data.reward[rows]) / model.reward.std
    errors = dict(state_error=for_state.sqrt(), reward_error=for_reward.abs())
    return {name: x.mean(1).view(S, -1) for name, x in errors.items()}


def best(errors, args):
    """The members that err least in states and rewards: (S elites) of U models."""
    total = errors["state_error"] + errors["reward_error"]  # (S, n)
    order = total.argsort(dim=1, stable=True)[:, : args.elites]
    seed = torch.arange(len(order), device=order.device)[:, None]
    return (order + total.shape[1] * seed).flatten()


# ---------------------------------------------------------------- act 2: rollouts
def dream(model, data, args):
    """The model, of each seed's elites, as a world to play in.

    It is a function of states (S, B, D), joint actions (S, B, X), members (S, B) and noise
    (S, B, D), which returns next states, penalised rewards, where the game ends, and where
    the model is sure (S, B).
    """
    low, high = data.state.aminmax(dim=0)
    worst, top = data.reward[data.start].aminmax()
    room = args.box_margin * (high - low)
    low, high, worst = low - room, high + room, worst - args.box_margin * (top - worst)  # the box
    # how often an entry counts in eps_g: as often as agents see it; the reward, once for each
    count = data.columns.flatten().bincount(minlength=len(low) + 1)  # (D + 1,)
    count[-1] = len(data.columns)

    def world(state, action, member, noise):
        n = args.elites
        guess = model(state.repeat_interleave(n, 0), action.repeat_interleave(n, 0))
        guess = Guess(*(x.unflatten(0, (-1, n)) for x in guess))  # (S, n, B, ...)
        # Eq. 2
        drawn = member[:, None, :, None]
        next_state, std = (x.take_along_dim(drawn, 1)[:, 0] for x in guess[:2])  # (S, B, D)
        next_state = next_state + std * noise
        reward, end = guess.reward.mean(1), 2 * (guess.end > 0).sum(1) > n
        # Eqs. 3 and 4: members are compared before the box makes them equal
        x = torch.cat([guess.state, guess.reward[..., None]], -1)  # (S, n, B, D + 1)
        eps_g = gram_norm(x * count.sqrt())
        if args.box:
            next_state, reward = next_state.clamp(low, high), reward.clamp(worst, top)
        reward = penalise(reward, guess, eps_g, args)
        sure = eps_g < args.limit if args.adaptive else torch.ones_like(end)
        return next_state, reward, end, sure

    return world


def gram_norm(x):
    """Eq. 3: |cov|_F over the n members of x (S, n, B, d), (S, B).

    |X^T X|_F = |X X^T|_F, so an n x n matrix will do in place of the d x d one.
    """
    x = (x - x.mean(1, keepdim=True)).transpose(1, 2)  # (S, B, n, d)
    return (x @ x.mT).square().sum((-2, -1)).sqrt() / (x.shape[-2] - 1)


def penalise(reward, guess, eps_g, args):
    """Eq. 4's reward; with --aleatoric also less MOPO's penalty."""
    eps_r, eps_g = (eps.clamp(max=args.limit) for eps in (guess.reward.var(1), eps_g))
    reward = reward - args.reward_penalty * eps_r - args.state_penalty * eps_g
    if args.aleatoric:
        variance = (guess.state_std**2).sum(-1) + guess.reward_std**2  # (S, n, B)
        reward = reward - args.aleatoric * variance.sqrt().amax(1)
    return reward


def begin(agents, data, rows):
    """States (S, B, D), histories (S, B, N, H, O + A) of rollouts that begin in rows.

    A history is what was recorded before, in the same episode; 0 where there was nothing.
    """
    past = rows[..., None] + torch.arange(-agents.H, 0, device=rows.device)  # (S, B, H)
    known = past >= (rows - data.age[rows])[..., None]  # of the same episode
    history = torch.cat([agents.see(data.state[past]), data.action[past]], -1)
    history = history * known[..., None, None]  # (S, B, H, N, O + A)
    return data.state[rows], history.transpose(2, 3)


def push(history, obs, carried):
    """Histories one step later: these views and actions (S, B, N, ...) are the newest."""
    newest = torch.cat([obs, carried], -1)[..., None, :]
    return torch.cat([history, newest], -2)[..., 1:, :]


class Played(NamedTuple):
    """One step of a rehearsal."""

    state: Tensor  # (S, B, D)
    history: Tensor  # (S, B, N, H, O + A) the agents' last views and actions
    action: Tensor  # (S, B, N) or (S, B, N, A), as it was drawn
    log_prob: Tensor  # (S, B) of the joint action
    value: Tensor  # (S, B) V(s_t)
    reward: Tensor  # (S, B) r~
    next_value: Tensor  # (S, B) V(s_{t+1})
    m: Tensor  # (S, B) bool, Eq. 5
    zeta: Tensor  # (S, B) bool, Eq. 5, as far as the model tells


@torch.no_grad()
def rehearsal_step(agents, world, data, state, history, noise, args):
    """One step in the world, from states (S, B, D) and histories, with this step's `Noise`.

    Returns `Played`, and the states and histories to go on from. Where a rollout is
    over another one begins, in the row that the noise tells.
    """
    obs = agents.see(state)
    x = agents.remember(obs, history)
    policy, value = agents.policy(x), agents.value(x, state)
    action, carried = agents.sample(policy, noise.action)
    log_prob, _ = agents.log_prob(policy, action)
    joint = carried.flatten(2)  # (S, B, X)
    next_state, reward, end, sure = world(state, joint, noise.member, noise.state)
    next_history = push(history, obs, carried)
    x = agents.remember(agents.see(next_state), next_history)
    next_value = agents.value(x, next_state)
    if args.bound_values:  # not from below, where bad teams would look good
        next_value = next_value.clamp(max=agents.highest)
    played = Played(state, history, action, log_prob, value, reward, next_value, ~end, sure)
    new_state, new_history = begin(agents, data, noise.rows)
    over = end | ~sure
    state = torch.where(over[..., None], new_state, next_state)
    history = torch.where(over[..., None, None, None], new_history, next_history)
    return played, state, history


def gae(reward, value, next_value, m, zeta, args):
    """Eqs. 6 to 8: advantages A and returns R of rollouts (S, B, k), with both masks."""
    steps = zip(*(x.unbind(-1) for x in (reward, value, next_value, m, zeta)))
    gamma, advantages, returns = args.gamma, [], []
    A = R = torch.zeros_like(reward[..., 0])
    for r_t, v_t, next_v, m_t, zeta_t in reversed(list(steps)):
        delta = r_t + gamma * m_t * next_v - v_t
        A = delta + gamma * args.gae_lambda * (m_t & zeta_t) * A
        R = r_t + gamma * m_t * torch.where(zeta_t, R, next_v)
        advantages.insert(0, A)
        returns.insert(0, R)
    return torch.stack(advantages, -1), torch.stack(returns, -1)


class Batch(NamedTuple):
    """Steps to learn from: all B k of a rehearsal, or the B of a minibatch."""

    state: Tensor  # (S, B, D)
    history: Tensor  # (S, B, N, H, O + A)
    action: Tensor  # (S, B, N) or (S, B, N, A)
    log_prob: Tensor  # (S, B) of the joint action when it was played
    value: Tensor  # (S, B) of then
    advantage: Tensor  # (S, B)
    returns: Tensor  # (S, B)


@torch.no_grad()
def settle(agents, steps, args):
    """What k steps `Played` teach: a `Batch` of B k steps, and what to log, (S,) each."""
    played = Played(*(torch.stack(x, 2) for x in zip(*steps)))  # (S, B, k, ...)
    reward, value, m, sure = played.reward, played.value, played.m, played.zeta
    zeta = F.pad(sure[..., :-1], (0, 1))  # Eq. 5: a rollout's k-th step is its last
    advantage, returns = gae(reward, value, played.next_value, m, zeta, args)
    std, mean = torch.std_mean(advantage, (1, 2), keepdim=True, correction=0)
    advantage = (advantage - mean) / (std + 1e-3 * agents.returns.std)
    batch = Batch(*(x.flatten(1, 2) for x in (*played[:5], advantage, returns)))
    logs = dict(model_reward=reward, stopped=m & ~sure, ended=~m)
    return batch, {name: x.to(reward.dtype).mean((1, 2)) for name, x in logs.items()}


def rehearse(agents, world, data, noise, args, rehearsal_step=rehearsal_step):
    """Play k steps in B places for each seed: a `Batch` of B k steps, and logs, (S,).

    `rehearsal_step` can be given in compiled form.
    """
    state, history = begin(agents, data, noise.rows[:, 0])
    noise = noise._replace(rows=noise.rows.roll(-1, 1))  # a step's row is where the next may begin
    steps = []
    for t in range(args.horizon):
        drawn = Noise(*(x[:, t] for x in noise))
        played, state, history = rehearsal_step(agents, world, data, state, history, drawn, args)
        steps.append(played)
    return settle(agents, steps, args)


# ---------------------------------------------------------------- act 2: losses
def ppo_loss(agents, batch, args):
    """All of the agents' losses, (S,), and logs: L(pi)'s first term, L(V), H, KL."""
    x = agents.remember(agents.see(batch.state), batch.history)
    policy, value = agents.policy(x), agents.value(x, batch.state)
    log_prob, entropy = agents.log_prob(policy, batch.action)
    # Eq. 10
    log_ratio = (log_prob - batch.log_prob).clamp(max=10)
    ratio, clip = log_ratio.exp(), args.clip
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
    policy_loss, entropy = -gain.mean(1), entropy.mean(1)
    # Eq. 11, in units of the returns' spread
    value, before, returns = (v / agents.returns.std for v in (value, batch.value, batch.returns))
    near = before + (value - before).clamp(-clip, clip)
    errors = ((value - returns) ** 2).mean(1), ((near - returns) ** 2).mean(1)
    value_loss = 0.5 * torch.maximum(*errors)

    total = policy_loss + value_loss - agents.alpha * entropy
    if not agents.discrete:
        mean, _ = policy.chunk(2, -1)
        excess = (mean.abs() - 1).clamp(min=0)
        total = total + args.action_penalty * (excess**2).sum(-1).sum(-1).mean(1)
    kl = (ratio - 1 - log_ratio).mean(1)  # of pi_played from pi
    logs = dict(policy_loss=policy_loss, value_loss=value_loss, entropy=entropy, kl=kl)
    return total, {name: x.detach() for name, x in logs.items()}


def clone_loss(agents, data, rows):
    """The warm-up's loss on the steps that begin in the rows (S, B), (S,).

    Independent behavioural cloning, -log pi_i(a_i) of the recorded actions, summed over
    agents; and how far V is from what the recorded rest of the episode was worth.
    """
    state, history = begin(agents, data, rows)
    x, action = agents.remember(agents.see(state), history), data.action[rows]  # (S, B, N, A)
    action = action.argmax(-1) if agents.discrete else action
    log_prob, _ = agents.log_prob(agents.policy(x), action)
    error = (agents.value(x, state) - data.togo[rows]) / agents.returns.std
    return 0.5 * (error**2).mean(1) - log_prob.mean(1)


# ---------------------------------------------------------------- update
@torch.compiler.disable  # a graph ends here, as torch.compile cannot hold an optimiser's step
def take_step(adam, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    adam.step()
    adam.zero_grad()


def descend(adam, module, losses, max_grad_norm):
    """One step down the losses (G,) of independent parts; returns them, detached.

    A part is a member of the model, or all that one seed's agents learn. Their sum leaves
    each part the gradient that it would have alone; each gradient has a limited length.
    """
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(losses.sum(), parameters)
    rows = [gradient.reshape(len(losses), -1) for gradient in gradients]
    length = sum((row**2).sum(1) for row in rows).sqrt()  # (G,)
    factor = (max_grad_norm / length.clamp(min=max_grad_norm))[:, None]
    losses = losses.detach()
    take_step(adam, parameters, [(row * factor).view_as(p) for row, p in zip(rows, parameters)])
    return losses


def model_update(model, adam, data, rows, args):
    """One update of all members on their own rows (S, n, B); losses (S, n)."""
    losses = model_loss(model, data, rows.flatten(0, 1), args.beta_nll)  # (U,)
    losses = descend(adam, model, losses, args.max_grad_norm)
    return losses.view(rows.shape[:2])


def minibatch(agents, adam, batch, pick, args):
    """One gradient step of all seeds on the steps `pick` (S, B) of the batch; logs."""
    seed = torch.arange(agents.S, device=pick.device)[:, None]
    total, logs = ppo_loss(agents, Batch(*(x[seed, pick] for x in batch)), args)
    total = descend(adam, agents, total, args.max_grad_norm)
    rise = 1e-3 * (args.least_entropy - logs["entropy"])  # above 0 while H is too low
    agents.alpha.add_(rise).clamp_(min=0)
    return logs


def update(agents, adam, batch, orders, args, minibatch=minibatch):
    """Go over a rehearsal in these orders (epochs, S, B k); logs of the last minibatch.

    `minibatch` can be given in compiled form.
    """
    count = orders.shape[-1]
    size = min(args.batch_size, count)
    whole = count // size * size  # what remains is left out
    for order in orders:
        for pick in order[:, :whole].split(size, 1):
            logs = minibatch(agents, adam, batch, pick, args)
    return logs


def clone_update(agents, adam, data, rows, args):
    """One update of the warm-up on the rows (S, B); its loss (S,)."""
    return descend(adam, agents, clone_loss(agents, data, rows), args.max_grad_norm)


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import layout
    from data.run import Player, Run, launch, read_args, stream
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")


def distinct_columns(state, obs):
    """Each distinct column of states (R, D) and views (R, N, O) once: states (R, D').

    Also where the agents' views are found in them, (N, O); D' is the 0 that fills up
    short views.
    """
    D, table = state.shape[1], torch.cat([state, obs.flatten(1)], 1)  # (R, C)
    columns = [column.tobytes() for column in table.T.cpu().numpy()]
    kept = columns[:D] + [column for column in columns[D:] if any(column)]
    place = {column: k for k, column in enumerate(dict.fromkeys(kept))}
    views = [place.get(column, len(place)) for column in columns[D:]]
    state = table[:, [columns.index(column) for column in place]]
    return state, torch.tensor(views, device=obs.device).view(obs.shape[1:])


def arrange(dataset, args):
    """The dataset as `Data`."""
    rows = layout.rows(dataset)
    state, columns = distinct_columns(rows["state"], rows["obs"])
    action, avail, start = rows["actions"], rows["avail_actions"], rows["start"]
    if avail is not None:
        if (avail != avail[0]).any():
            raise ValueError(f"in {args.dataset} the available actions change")
        avail, action = avail[0], F.one_hot(action, avail.shape[-1]) * rows["acted"][:, None, None]
    E = len(dataset.lengths)
    count = min(E - 1, max(1, round(args.holdout * E)))
    episodes = torch.randperm(E, generator=stream(0, 4))[:count].to(start.device)  # held out
    out = torch.isin(layout.episodes(dataset.lengths)[start], episodes)  # (M,)
    togo = torch.zeros_like(rows["reward"])
    togo[start] = layout.togo(dataset, args.gamma)
    return Data(
        state,
        action,
        rows["reward"],
        rows["done"],
        togo,
        layout.age(dataset.lengths)[0],
        start,
        rows["first"].nonzero()[:, 0],
        start[~out],
        start[out] if count else start,
        columns,
        avail,
    )


def learn_model(run, model, data, args):
    """Act 1."""
    adam = torch.optim.Adam(model.parameters(), args.model_lr, fused=True)
    generators, learn = run.streams(3), run.compile(model_update)
    run.begin("model step", "world_model.csv", model=model, adam=adam, generators=generators)
    for step in run.steps(None, args.model_steps, args.model_eval_every):
        adam.param_groups[0]["lr"] = args.model_lr * (1 - step / args.model_steps)
        loss = learn(model, adam, data, draw_batches(generators, data, args), args)
        if run.scheduled(step + 1):
            run.logs = {"loss": loss} | validate(model, data, args.num_seeds)


def player(agents):
    """How the teams of all seeds play, greedily."""

    def act(obs, avail, memory, clocks=None):
        obs = agents.scale(obs.to(agents.alpha.dtype))  # (S, B, N, O)
        history = memory.unflatten(-1, (agents.H, agents.O + agents.A))
        action, carried = agents.sample(agents.policy(agents.remember(obs, history)))
        memory = push(history, obs, carried).flatten(-2)
        return action if agents.discrete else carried.float(), memory

    return Player(act, agents, memory=agents.H * (agents.O + agents.A))


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("moma_ppo", args)
    data = arrange(run.load(), args)
    agents = Agents(data, args, run.streams(0, "cpu")).to(run.device)
    adam = torch.optim.Adam(agents.parameters(), args.lr, fused=True)
    generators, team = run.streams(1), player(agents)

    # Act 1: a world to play in
    model = Model(data, args, run.streams(2, "cpu")).to(run.device)
    if not run.reached():
        learn_model(run, model, data, args)
    elites = model.choose(best(validate(model, data, args.num_seeds), args))
    world = dream(elites, data, args)

    # Act 2: rehearsals in it
    rehearsal, learn = run.compile(rehearsal_step), run.compile(minibatch)
    clone = run.compile(clone_update)
    run.begin(elites=elites, agents=agents, adam=adam, generators=generators)
    for step in run.steps(team):
        if step == 0:
            for _ in range(args.warmup):
                rows = draw_rows(generators, data.start, args.batch_size)
                clone(agents, adam, data, rows, args)
        adam.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        noise = draw_noise(generators, data, args)
        batch, logs = rehearse(agents, world, data, noise, args, rehearsal)
        orders = draw_orders(generators, batch.returns.shape[1], args)
        logs |= update(agents, adam, batch, orders, args, learn)
        run.logs = logs | {"alpha": agents.alpha}
    return run.finish("MOMA-PPO", team)


def parse(argv=None):
    """Read the command line; where no flag speaks, the preset's values or a resumed run's hold."""
    args = read_args(
        Args,
        PRESETS,
        argv,
        __doc__,
        kinds="MOMA-PPO is for bodies, and games whose available actions never change",
        known=("matrix", "polynomial", "reacher", "halfcheetah", "ant"),
        may_be_zero="seed eval_episodes episodes first warmup reward_penalty state_penalty "
        "aleatoric gamma gae_lambda action_penalty memory beta_nll box_margin",
        at_most_one="gamma gae_lambda first beta_nll holdout",
        any_sign="least_entropy",
    )
    if not 2 <= args.elites <= args.members:
        raise ValueError(f"--elites must be at least 2, and at most {args.members}")
    return args


if __name__ == "__main__":
    launch(main, parse)
