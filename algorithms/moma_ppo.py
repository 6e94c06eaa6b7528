"""MOMA-PPO: a team rehearses in a learned world (Barde et al., AAMAS 2024, arXiv 2305.17198).

The problem. N agents learn from a fixed dataset that mixes several ways of working together. What one agent does there
may be a good half of some convention, but the halves of two conventions do not fit, and nothing in the data shows what
happens if they meet. A method that never plays cannot find out.

The idea. Learn a model of the world from the data (act 1), and let the team play in it, with an ordinary on-policy
method (MAPPO), for a few steps from recorded situations (act 2). Agents that meet in the model can agree on one
convention. An ensemble says where the model is guessing: there the reward is lowered, and beyond a limit the rollout
stops.

Equations, by numbers of our own. s is the state, a the joint action, o_i agent i's view, h_i its last views and
actions. Members e = 1..n of the ensemble, from Eq. 2 on the best ones only, predict s'_e and r_e; x_e = (s'_e, r_e).
 1 ensemble   L_e     = -log N(s'; s'_e, sigma_e) / D' - log N(r; r_e, sigma_e) + BCE(end)    D' entries of s' that vary
 2            r^      = mean_e r_e,  s^ = s'_e of one member drawn for each step,  end = majority of the members
 3            eps_r   = var_e r_e,   eps_g = | cov_e x_e |_F = | X X^T |_F / (n - 1),   rows of X: x_e - mean_e x_e
 4            r~      = box(r^) - lambda_r min(eps_r, c) - lambda_g min(eps_g, c),  s^ = box(s^)
 5 masks      m       = 0 where the game ended;   zeta = 0 at the k-th step, or where eps_g >= l
 6 GAE        delta_t = r~_t + gamma m_t V(s_{t+1}) - V(s_t)
 7            A_t     = delta_t + gamma lambda m_t zeta_t A_{t+1}
 8            R_t     = r~_t + gamma m_t [ zeta_t R_{t+1} + (1 - zeta_t) V(s_{t+1}) ]
 9 agents     V       = sum_i w_i(s) V_i(h_i, o_i) + b(s),   log pi = sum_i log pi_i(a_i|h_i, o_i)
10            L(pi)   = -E min( rho A, clip(rho) A ) + E sum max(0, |mean action| - 1)^2 - alpha H, rho = pi / pi_played
11            L(V)    = 1/2 max( E (V - R)^2, E (V_old + clip(V - V_old) - R)^2 )
The cap c and the limit l are one number in the paper. rho is cut at e^10, and A enters Eq. 10 less its mean and over
its spread in all rollouts of an update. Each minibatch is a step of Adam down L(pi) + L(V), with a gradient of limited
length. The price of entropy alpha begins at 0, and after each minibatch becomes max(0, alpha + 0.001 (H_least - H)):
there is no bonus before the team's joint entropy H falls below H_least.

Commands, and the return you should see (last policy, greedy; one CPU core of a small server, torch 2.13). All tasks,
datasets and trials: algorithms/moma_ppo.md.
  python algorithms/moma_ppo.py                          the coordination game, unfavourable data, 10 seeds at once, 8 s
      of CPU time: 1, the best return, in 10 of 10 seeds; cloning (bc.py) has 0
  python algorithms/moma_ppo.py --env reacher --task all-observant   two agents share an arm, 3 seeds, 9 minutes:
      normalised 1.00 +- 0.01 (cloning 0.89; data before commit 3489905)
  python algorithms/moma_ppo.py --env ant --dataset medium           four agents share an ant, a leg each, 34 minutes:
      2,743 +- 47 (the data 1,870, cloning 2,429)
  ... --world-model runs/moma_ppo/OTHER                              with the model of another run of the same body
  ... --penalty aleatoric | --reward-penalty 0 --state-penalty 0 | --no-box | --horizon 5 | --simulator    ablations

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, moma_ppo as moma
  S, T, row = 2, 10, torch.arange(20 * 11)                         # seeds; 20 episodes of T steps, T + 1 rows each
  state, action, age = torch.randn(len(row), 3), 2 * torch.rand(len(row), 2, 1) - 1, row % (T + 1)
  reward, steps, views = -state.abs().sum(1), row[age < T], torch.tensor([[0, 1], [1, 2]])  # each agent sees 2 entries
  data = moma.Data(state, action, reward, 0 * reward, reward, age, steps, row[age == 0], steps, steps, views, None)
  args = moma.Args(num_seeds=S, rollouts=32, horizon=5)
  streams = [torch.Generator().manual_seed(s) for s in range(S)]
  agents, world = moma.Agents(data, args, streams), moma.World(data, args, streams)
  adam, model_adam = moma.Adam(agents.parameters(), args.lr), moma.Adam(world.parameters(), args.model_lr)
  for step in range(200):
      moma.model_update(world, model_adam, data, moma.draw_rows(streams, data.train, args.members, 64), args)
  play = moma.dream(world.choose(moma.best(moma.validate(world, data, S), args)), data, args)
  for step in range(20):
      batch, logs = moma.rehearse(agents, play, data, moma.draw_noise(streams, data, args), args)
      logs |= moma.update(agents, adam, batch, moma.draw_orders(streams, batch.returns.shape[1], args), args)

Where the paper and its authors' code disagree, this is the paper's:
  1. The reward is all members' mean, not one's; a game ends by their vote, not by the agents' heads of the one drawn.
  2. eps_g is compared with its limit before it is capped, and before s^ and r^ are put into the box. In the code it is
     capped first, so that no rollout ever stops for it (--no-adaptive). Here, too, none did (off in the ant's preset).
  3. In the ant each agent drives the leg it sees (see envs/mamujoco.py).
Choices made here, and in brackets the flags for what the paper or its code has. Why, and what each is worth, is told
under the same numbers in algorithms/moma_ppo.md.
  4. The model predicts the global state once. In eps_g an entry counts as often as the agents see it.
  5. All that networks see and predict is in units of the data's spread, and they predict changes (--no-normalize).
  6. Whole episodes are held out, and members ranked by how their means err there.
  7. A rollout that ends early makes room for a new one, so that an update always sees rollouts x horizon steps.
  8. The policies' entropy and the penalty on actions are exact means, not weighted by rho.
  9. Networks are smaller than the code's, and step sizes larger; they fall to 0.
 10. L(V) and its clip are in units of the returns' spread; w(s) may be negative, as in the code, though not in QMIX.
 11. Policies begin with the spread of the recorded actions, not with 1: beyond it the model only guesses.
 12. Bodies' box is wider than the data (--box-margin 0), but the ant's, whose V(s') is bounded (--no-bound-values).
 13. Bodies rehearse 25 or 50 steps (--horizon 10), some from an episode's start (--first 0); no memory (--memory 10).
 14. The ant's agents first clone the data (--warmup 0), and V learns its returns, which take a time limit for the end.
 15. Bodies' models learn with --beta-nll 0.5 (0), the ant's draws its next states (--no-sample-states) and tells a fall
     by s'_e, neither drawn nor in the box (--end-from step).
 16. The ant's limit, penalties, --no-adaptive and least entropy are ours. The game has no penalties, as in the code.

Seeds differ in all that is random here, but share the held-out episodes, and are evaluated in one environment.

Shapes: S seeds, N agents, B rollouts or steps of a minibatch, k steps of a rollout, n members, U = S n models, Q = S N
networks of agents, A actions (or entries of an action), X = N A, O observation, D state, H steps of memory, W its
width, R rows (observations) of the dataset, M rows in which a step begins, E episodes.
"""

import copy
import math
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is loaded, Ctrl-C ends the program without a traceback
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.adam import adam as adam_step

ILLEGAL = -1e10  # the logit of an action that is not available
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "matrix"  # the environment: matrix, polynomial, reacher, ant, halfcheetah, or module:factory
    task: str = ""  # its task; by default the coordination game, or the environment's first
    dataset: str = "unfavourable"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in an environment that is not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 10  # how many seeds train, all at once
    steps: int = 20  # updates of MAPPO, each with its own rollouts
    eval_every: int = 5  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 10  # games per seed and evaluation; 0 to train without an environment
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # compile updates and rehearsals with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/moma_ppo
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- act 1, the world model
    world_model: str = ""  # the folder of a run, or the file, whose model to use in place of learning one
    model_steps: int = 300  # updates of the model
    model_eval_every: int = 100  # updates between looks at the held-out episodes; each writes a checkpoint
    model_batch: int = 64  # steps per update, drawn by each member on its own
    model_hidden: int = 32  # units per hidden layer of what predicts the state
    reward_hidden: int = 32  # and of what predicts the reward and the end
    model_layers: int = 2  # hidden layers
    end_from: Literal["step", "state"] = "step"  # what tells the game's end: s and a, or the s' that they lead to
    beta_nll: float = 0.0  # how far steps with a large sigma count as the others: 0 is the likelihood, 1 squared errors
    model_lr: float = 3e-3  # Adam's step size, which falls linearly to 0
    members: int = 7  # how many models are learned
    elites: int = 5  # how many of them, the best, are kept
    holdout: float = 0.1  # the share of the episodes to judge them by; with 0 by what they learned from
    normalize: bool = True  # inputs in units of the data's mean and spread; the model predicts changes
    # --- act 2, rollouts in it
    simulator: bool = False  # play in the true simulator in place of the model
    rollouts: int = 256  # rollouts at once
    horizon: int = 1  # k, their steps
    first: float = 0.0  # the share of them that begin where an episode did, the others anywhere in one
    penalty: Literal["epistemic", "aleatoric"] = "epistemic"  # what lowers the reward: Eq. 4, or MOPO's spread
    reward_penalty: float = 0.0  # lambda_r, weight of eps_r
    state_penalty: float = 0.0  # lambda_g, weight of eps_g
    penalty_cap: float = 2.0  # c, the most that eps_r and eps_g count
    aleatoric: float = 1.0  # weight of the largest spread that a member predicts, with --penalty aleatoric
    adaptive: bool = True  # stop rollouts where eps_g reaches the limit
    limit: float = 2.0  # l, this limit
    box: bool = True  # clip states and rewards to the range of the data
    box_margin: float = 0.0  # it is wider by this share of itself on either side, for rewards below only
    bound_values: bool = False  # keep V(s') of the model's states from rising far above the data's returns
    sample_states: bool = False  # draw the next state from the member's Gaussian in place of its mean
    # --- act 2, MAPPO
    warmup: int = 0  # updates of cloning before the first rehearsal, in which the critic learns from the data as well
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.98  # how far advantages look past the critic
    clip: float = 0.2  # how far the joint action's probability, as a ratio, and the value may move in an update
    action_penalty: float = 1.0  # weight of mean actions beyond [-1, 1]
    least_entropy: float = -2.0  # H_least, of the joint action: below it, a bonus grows
    epochs: int = 5  # passes over the rollouts
    batch_size: int = 64  # steps in a minibatch
    lr: float = 1e-3  # Adam's step size, which falls linearly to 0 after the warm-up
    max_grad_norm: float = 1.0  # longest gradient of one seed's agents, or of one member of the model
    hidden: int = 64  # units of the two hidden layers of policies, values and mixer
    memory: int = 0  # how many steps an agent remembers; 0 for none
    width: int = 128  # of the memory's attention


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end. In an episode's last row no step begins.

    A state holds each distinct entry of all that there is to see once; what the agents see is picked from it.
    """

    state: torch.Tensor  # (R, D)
    action: torch.Tensor  # (R, N, A) in [-1, 1], or one-hot, of the step that begins in a row; 0 where none does
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    togo: torch.Tensor  # (R,) what the rest of the episode was worth, discounted by gamma
    age: torch.Tensor  # (R,) int64, how many steps ago the episode began
    steps: torch.Tensor  # (M,) the rows in which a step begins
    openings: torch.Tensor  # (E,) each episode's first row
    train: torch.Tensor  # (M',) those of `steps` that the model learns from
    held: torch.Tensor  # (M'',) and those by which it is judged
    columns: torch.Tensor  # (N, O) the entries of the state that each agent sees; D: a 0, which fills up short views
    avail: torch.Tensor | None  # (N, A) bool, the available actions; None where actions are continuous


def units(x, on, least=0.0, mean=None):
    """The mean, if it is not given, and the spread of each entry of x (M, ...), at least `least`; where it is not `on`,
    with --no-normalize, 0 and 1."""
    mean, low, std = x.mean(0) if mean is None else mean, x.amin(0), x.std(0, correction=0)
    same = low == x.amax(0)  # a constant gets its value and 0, without rounding errors
    mean, std = torch.where(same, low, mean), torch.where(same, 0, std).clamp(min=least)
    return (mean, std) if on else (torch.zeros_like(mean), torch.ones_like(std))


class Noise(NamedTuple):
    """All that a rehearsal draws: given it, k steps in B places for each seed are a function without chance.

    That of one step has the same shapes without k.
    """

    rows: torch.Tensor  # (S, k, B) where in the data a rollout begins: at step 0, and where one was over just before
    member: torch.Tensor  # (S, k, B) the member whose next state is taken
    action: torch.Tensor  # (S, k, N, B, A) for `Agents.sample`
    state: torch.Tensor | None  # (S, k, B, D) with --sample-states


def draw(generators, how, *shape):
    """Random numbers (S, *shape), each seed's from its own generator: uniform_, normal_ or exponential_ ones."""
    return torch.stack([getattr(torch.empty(shape, device=g.device), how)(generator=g) for g in generators])


def draw_noise(generators, data, args):
    """The `Noise` of one rehearsal."""
    (N, A), k, B = data.action.shape[1:], args.horizon, args.rollouts
    where = draw(generators, "uniform_", k, B)
    rows = data.steps[(where * len(data.steps)).long()]
    if args.first:
        opening = data.openings[(where * len(data.openings)).long()]
        rows = torch.where(draw(generators, "uniform_", k, B) < args.first, opening, rows)
    member = (draw(generators, "uniform_", k, B) * args.elites).long()
    action = draw(generators, "normal_" if data.avail is None else "exponential_", k, N, B, A)
    state = draw(generators, "normal_", k, B, data.state.shape[1]) if args.sample_states else None
    return Noise(rows, member, action, state)


def draw_rows(generators, rows, *shape):
    """Some of the rows for each seed, with replacement: (S, *shape)."""
    return rows[torch.stack([torch.randint(len(rows), shape, generator=g, device=g.device) for g in generators])]


def draw_orders(generators, steps, args):
    """In which order an update goes over the B k steps of a rehearsal, each time anew: (epochs, S, B k)."""
    draws = [[torch.randperm(steps, generator=g, device=g.device) for g in generators] for _ in range(args.epochs)]
    return torch.stack([torch.stack(epoch) for epoch in draws])


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """Independent linear layers as one batched product, one for each generator, which initialises it."""

    def __init__(self, inputs, outputs, generators, scale=1.0):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        start = [torch.empty(inputs + 1, outputs).uniform_(-bound, bound, generator=g) for g in generators]
        self.weight = nn.Parameter(scale * torch.stack(start)[:, :-1])  # (G, in, out), G generators
        self.bias = nn.Parameter(torch.stack(start)[:, -1:] * (scale == 1))  # (G, 1, out); small heads begin at 0

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (G, B, out)


def mlp(inputs, outputs, hidden, layers, generators, scale=1.0):
    """A ReLU network for each generator: (G, B, inputs) -> (G, B, outputs)."""
    sizes = [inputs] + [hidden] * layers
    body = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o, generators), nn.ReLU())]
    return nn.Sequential(*body, Linear(sizes[-1], outputs, generators, scale))


class Guess(NamedTuple):
    """What U models predict of a step, in the units of the data."""

    state: torch.Tensor  # (U, B, D) the mean of the next state
    state_std: torch.Tensor  # (U, B, D)
    reward: torch.Tensor  # (U, B) the mean
    reward_std: torch.Tensor  # (U, B)
    end: torch.Tensor  # (U, B) the logit of the game's end


class World(nn.Module):
    """n models for each seed: Gaussians over the next state and the reward, and a probability that the game ends."""

    def __init__(self, data, args, generators):
        super().__init__()
        D, X, each = data.state.shape[1], data.action[0].numel(), [g for g in generators for _ in range(args.members)]
        self.for_state = mlp(D + X, 2 * D, args.model_hidden, args.model_layers, each)
        self.for_reward = mlp(D + X, 2, args.reward_hidden, args.model_layers, each)
        self.end_from_state = args.end_from == "state"
        self.for_end = mlp(D + X * (not self.end_from_state), 1, args.reward_hidden, min(2, args.model_layers), each)
        self.register_buffer("keep", torch.full_like(data.state[0], args.normalize))  # 1: it predicts changes
        steps, on = data.steps, args.normalize
        action = data.action[steps].flatten(1)
        for name, (mean, std) in {
            "": units(data.state, on, 1e-3),  # (D,)
            "move_": units(data.state[steps + 1] - data.state[steps], on),  # (D,) what a step changes
            "action_": units(action, on, 1e-3, torch.std_mean(action, 0)[1]),  # (X,) to the digit as in earlier runs
            "reward_": units(data.reward[steps], on),  # ()
        }.items():
            self.register_buffer(name + "mean", mean)
            self.register_buffer(name + "std", std)

    def forward(self, state, action, next_state=None):
        """(U, B, D), (U, B, X) -> `Guess`. With --end-from state the end is told by next_state (U, B, D), or without it
        by what is predicted."""
        x = torch.cat([(state - self.mean) / self.std, (action - self.action_mean) / self.action_std], -1)
        move, log_std = self.for_state(x).chunk(2, -1)  # (U, B, D) each
        earned, reward_log_std = self.for_reward(x).unbind(-1)  # (U, B) each
        guess = self.keep * state + self.move_mean + self.move_std * move
        if self.end_from_state:
            x = ((guess.detach() if next_state is None else next_state) - self.mean) / self.std
        return Guess(
            guess,
            self.move_std * log_std.clamp(-6, 2).exp(),
            self.reward_mean + self.reward_std * earned,
            self.reward_std * reward_log_std.clamp(-6, 2).exp(),
            self.for_end(x)[..., 0],
        )

    def choose(self, which):
        """A copy with only the models `which` (U',), which learns no more."""
        chosen = copy.deepcopy(self).requires_grad_(False)
        for parameter in chosen.parameters():
            parameter.data = parameter.data[which]
        return chosen


class Memory(nn.Module):
    """What Q agents remember: attention over their last H views and actions, then a weighted mean. No preset has it."""

    def __init__(self, inputs, steps, W, generators):
        super().__init__()
        self.embed, self.attend = Linear(inputs, W, generators), Linear(W, 3 * W, generators)
        self.gain = nn.Parameter(torch.ones(len(generators), 1, W))
        self.shift = nn.Parameter(torch.zeros(len(generators), 1, W))
        self.judge = nn.Parameter(Linear(W, W, generators).weight.detach().clone())  # (Q, W, W), without a bias
        self.wanted = nn.Parameter(torch.stack([torch.randn(1, W, generator=g) for g in generators]))  # (Q, 1, W)
        angle = torch.arange(steps)[:, None] / 10_000 ** (torch.arange(0, W, 2) / W)
        position = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # (H, W)
        self.register_buffer("position", position.to(torch.get_default_dtype()), persistent=False)

    def forward(self, history):
        """(Q, B, H, O + A) -> (Q, B, W)."""
        Q, B, H = history.shape[:3]
        # Embedding and attention, two linear layers in a row, are multiplied into one: a third of the arithmetic. The
        # part that depends on the place only enters as the weights of a one-hot place.
        entries, places = self.embed.weight, self.embed.bias + self.position  # (Q, O + A, W), (Q, H, W)
        embed = torch.cat([entries, places], 1)
        attend = torch.cat([entries @ self.attend.weight, self.attend(places)], 1).chunk(3, -1)
        place = torch.eye(H, dtype=history.dtype, device=history.device).expand(Q, B, H, H)
        tokens = torch.cat([history, place], -1).flatten(1, 2)  # (Q, B H, O + A + H)
        x, query, key, value = (torch.bmm(tokens, weight).view(Q, B, H, -1) for weight in (embed, *attend))
        x = x + F.scaled_dot_product_attention(query, key, value)
        x = F.layer_norm(x, x.shape[-1:]).flatten(1, 2) * self.gain + self.shift  # (Q, B H, W)
        score = (torch.bmm(x, self.judge).tanh() * self.wanted).sum(-1).view(Q, B, H)
        return (score.softmax(-1)[..., None] * x.view(Q, B, H, -1)).sum(2)


class Agents(nn.Module):
    """All that S teams learn by rehearsal: N memories, policies and values each, nothing shared, and a mixer.

    For the networks (S, N, B, ...) is laid out as (Q, B, ...), Q = S N.
    """

    def __init__(self, data, args, generators):
        super().__init__()
        self.S, (self.N, self.O), self.H = len(generators), data.columns.shape, args.memory
        self.A, self.discrete = data.action.shape[-1], data.avail is not None
        each = [g for g in generators for _ in range(self.N)]
        self.memory = Memory(self.O + self.A, self.H, args.width, each) if self.H else None
        inputs = self.O + args.width * bool(self.H)
        self.policy = mlp(inputs, self.A * (1 if self.discrete else 2), args.hidden, 2, each, scale=0.1)
        self.values = mlp(inputs, 1, args.hidden, 2, each)
        self.mixer = mlp(data.state.shape[-1], self.N + 1, args.hidden, 2, generators)
        self.register_buffer("alpha", torch.zeros(self.S))  # the price of entropy
        # What the data say, anew in each run and in no checkpoint; log_spread is that of choice 11.
        togo, (mean, std) = data.togo[data.steps], units(data.state, args.normalize, 1e-3)
        return_mean, return_std = units(togo, args.normalize)
        spread = data.action[data.steps].std(0, correction=0)[:, None].clamp(min=math.exp(-6), max=1)  # (N, 1, A)
        for name, value in dict(
            mean=mean, std=std, view_mean=F.pad(mean, (0, 1))[data.columns],  # (D,), (D,), (N, O)
            view_std=F.pad(std, (0, 1), value=1)[data.columns],  # (N, O)
            return_mean=return_mean, return_std=torch.where(return_std > 1e-6, return_std, 1),
            highest=togo.max() + (togo.max() - togo.min()) / 2,  # the bound of --bound-values
            log_spread=spread.log(), columns=data.columns, avail=data.avail,
        ).items():  # fmt: skip
            self.register_buffer(name, value, persistent=False)

    def scaled(self, state):
        """States (S, B, ..., D) in units of the data's."""
        return (state - self.mean) / self.std

    def see(self, state):
        """What the agents see of states (S, B, ..., D), in the same units: (S, N, B, ..., O)."""
        return F.pad(self.scaled(state), (0, 1))[..., self.columns].movedim(-2, 1)

    def remember(self, obs, history):
        """An agent's input: its memory of the last H steps, then its view; (Q, B, inputs)."""
        obs = obs.flatten(0, 1)
        return torch.cat([self.memory(history.flatten(0, 1)), obs], -1) if self.H else obs

    def act(self, x):
        """Log-probabilities of all actions (S, N, B, A), or means and log-deviations (S, N, B, 2A)."""
        out = self.policy(x).unflatten(0, (self.S, self.N))
        if self.discrete:
            return F.log_softmax(out.masked_fill(~self.avail[:, None], ILLEGAL), -1)
        mean, log_std = out.chunk(2, -1)
        return torch.cat([mean, (self.log_spread + log_std).clamp(-6, 0)], -1)

    def value(self, x, state):
        """Eq. 9: V of states (S, B, D), in units of the reward, (S, B)."""
        own = self.values(x)[..., 0].unflatten(0, (self.S, self.N))  # (S, N, B)
        weight, bias = self.mixer(self.scaled(state)).transpose(1, 2).split([self.N, 1], 1)
        return self.return_mean + self.return_std * ((weight * own).sum(1) + bias[:, 0])

    def log_prob(self, out, action):
        """Log-probability and entropy of the team's joint action, (S, B) each; `out` from `act`."""
        if self.discrete:
            return out.gather(-1, action[..., None])[..., 0].sum(1), -(out.exp() * out).sum((1, 3))
        mean, log_std = out.chunk(2, -1)
        density = -0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - HALF_LOG_2PI
        return density.sum((1, 3)), (log_std + 0.5 + HALF_LOG_2PI).sum((1, 3))

    def sample(self, out, noise=None):
        """Draw actions (S, N, B) or (S, N, B, A) by the noise (S, N, B, A); without it the most likely ones."""
        if self.discrete:  # which exponential clock rings first, none of them at 0, is a draw from pi
            return (out if noise is None else out - noise.clamp(min=1e-30).log()).argmax(-1)
        mean, log_std = out.chunk(2, -1)
        return mean if noise is None else mean + log_std.exp() * noise

    def carry_out(self, action):
        """Actions as the world and the memory see them, (S, N, B, A): one-hot, or clipped."""
        return F.one_hot(action, self.A).to(self.return_std.dtype) if self.discrete else action.clamp(-1, 1)


# ---------------------------------------------------------------- act 1: the world model
def model_loss(world, data, rows, beta):
    """Eq. 1: L_e of U models, (U,), on the steps that begin in the rows (U, B)."""
    state, next_state = data.state[rows], data.state[rows + 1]
    guess = world(state, data.action[rows].flatten(2), next_state)

    def nll(error, std, unit):  # in units of what is to be predicted
        std, unit = std.clamp(min=1e-8), unit.clamp(min=1e-8)
        return ((std / unit).log() + 0.5 * (error / std) ** 2) * (std / unit).detach() ** (2 * beta)

    vary = (world.move_std > 0).to(state.dtype)  # constant entries teach nothing
    count = vary.sum().clamp(min=1)
    for_state = (nll(next_state - guess.state, guess.state_std, world.move_std) * vary).sum(-1) / count
    for_reward = nll(data.reward[rows] - guess.reward, guess.reward_std, world.reward_std) * (world.reward_std > 0)
    for_end = F.binary_cross_entropy_with_logits(guess.end, data.done[rows], reduction="none")
    return (for_state + for_reward + for_end).mean(1)


def model_update(world, adam, data, rows, args):
    """One update of all members of all seeds, from minibatches `rows` (S, n, B); returns their losses (S, n)."""
    losses = model_loss(world, data, rows.flatten(0, 1), args.beta_nll)  # (U,)
    descend(adam, losses, args)
    return losses.detach().view(rows.shape[:2])


@torch.no_grad()
def validate(world, data, S, most=2000):
    """Errors of the members on held-out steps, at most so many, evenly spaced, (S, n) each: of states (root mean square
    over entries, in units of the spread of changes) and rewards (absolute, in units of theirs); ends told wrong."""
    count, U = len(data.held), len(world.for_end[0].weight)
    rows = data.held[torch.linspace(0, count - 1, min(most, count), device=data.held.device).long()]
    guess = world(*(x[rows].flatten(1).expand(U, -1, -1) for x in (data.state, data.action)))
    _, move_std = units(data.state[data.steps + 1] - data.state[data.steps], True)
    _, reward_std = units(data.reward[data.steps], True)
    vary = move_std > 0
    error = ((guess.state - data.state[rows + 1]) / move_std.clamp(min=1e-8))[..., vary]
    for_state = (error**2).mean(-1).sqrt().mean(1) if vary.any() else error.sum((1, 2))
    for_reward = ((guess.reward - data.reward[rows]) / torch.where(reward_std > 0, reward_std, 1)).abs().mean(1)
    wrong = ((guess.end > 0) != (data.done[rows] > 0)).to(error.dtype).mean(1)
    return {name: x.view(S, -1) for name, x in (("state", for_state), ("reward", for_reward), ("end", wrong))}


def best(errors, args):
    """The members to keep, those that err least in states and rewards, the best first: (S elites) of the U models."""
    total = errors["state"] + errors["reward"]  # (S, n)
    order = total.sort(dim=1, stable=True)[1][:, : args.elites]
    return (order + total.shape[1] * torch.arange(len(order), device=order.device)[:, None]).flatten()


# ---------------------------------------------------------------- act 2: rollouts
def begin(agents, data, rows):
    """States (S, B, D) and histories (S, N, B, H, O + A) with which rollouts begin in the rows (S, B)."""
    past = rows[..., None] + torch.arange(-agents.H, 0, device=rows.device)  # (S, B, H)
    known = past >= (rows - data.age[rows])[..., None]  # of the same episode
    past = past.clamp(min=0)
    tokens = torch.cat([agents.see(data.state[past]), data.action[past].movedim(-2, 1)], -1)
    return data.state[rows], tokens * known[:, None, ..., None]


def push(history, obs, played):
    """Histories (S, N, B, H, O + A) one step later; (S, N, B, O) and (S, N, B, A) become their newest."""
    return torch.cat([history, torch.cat([obs, played], -1)[..., None, :]], -2)[..., 1:, :]


def dream(world, data, args):
    """The model as a world to play in: a function of states (S, B, D), joint actions (S, B, X), members (S, B), and of
    the noise (S, B, D) that the next states have with --sample-states.

    It returns the next states, the penalised rewards, where the game ends, and where the model is sure (S, B).
    """
    (low, high), (worst, top) = data.state.aminmax(dim=0), data.reward[data.steps].aminmax()  # the box
    weight = data.columns.flatten().bincount(minlength=len(low) + 1)  # how often agents see each entry
    weight[:-1][(low == 0) & (high == 0)] = 0  # what never is anything but 0 does not count
    weight[-1] = len(data.columns)  # the last place, of the padding, is now the reward's: it counts once for each agent
    root, room = weight.sqrt(), args.box_margin * (high - low)
    low, high, worst = low - room, high + room, worst - args.box_margin * (top - worst)

    def step(state, action, member, noise=None):
        S, n, c = len(state), args.elites, args.penalty_cap
        guess = world(*(x[:, None].expand(-1, n, -1, -1).flatten(0, 1) for x in (state, action)))
        each = Guess(*(x.unflatten(0, (S, n)) for x in guess))  # (S, n, B, ...)
        drawn = member[:, None, :, None].expand(-1, -1, -1, state.shape[-1])  # (S, 1, B, D)
        next_state = each.state.gather(1, drawn)[:, 0]
        if noise is not None:
            next_state = next_state + each.state_std.gather(1, drawn)[:, 0] * noise
        # Eq. 2: the mean of the members, and their vote
        reward, end = each.reward.mean(1), 2 * (each.end > 0).sum(1) > n
        # Eq. 3, of what the members say, before the box
        eps_r, eps_g = each.reward.var(1), gram_norm(torch.cat([each.state, each.reward[..., None]], -1) * root)
        if args.box:
            next_state, reward = next_state.clamp(low, high), reward.clamp(worst, top)
        if args.penalty == "epistemic":  # Eq. 4
            reward = reward - args.reward_penalty * eps_r.clamp(max=c) - args.state_penalty * eps_g.clamp(max=c)
        else:
            spread = ((each.state_std**2).sum(-1) + each.reward_std**2).sqrt().amax(1)
            reward = reward - args.aleatoric * spread
        sure = eps_g < args.limit if args.adaptive else torch.ones_like(end)
        return next_state, reward, end, sure

    return step


def gram_norm(x):
    """|cov|_F over the n members of x (S, n, B, d), (S, B), by the n x n matrix in place of the d x d one."""
    x = (x - x.mean(1, keepdim=True)).transpose(1, 2)  # (S, B, n, d)
    return (x @ x.mT).square().sum((-2, -1)).sqrt() / (x.shape[-2] - 1)


class Batch(NamedTuple):
    """Steps to learn from: all B k of a rehearsal, or the B of a minibatch."""

    obs: torch.Tensor  # (S, N, B, O)
    history: torch.Tensor  # (S, N, B, H, O + A)
    action: torch.Tensor  # (S, N, B) or (S, N, B, A)
    state: torch.Tensor  # (S, B, D)
    log_prob: torch.Tensor  # (S, B) of the joint action when it was played
    value: torch.Tensor  # (S, B) of then
    advantage: torch.Tensor  # (S, B)
    returns: torch.Tensor  # (S, B)


@torch.no_grad()
def rehearsal_step(agents, play, data, state, history, noise, args):
    """One step in the world `play`, from states (S, B, D) and histories (S, N, B, H, O + A).

    It returns what `settle` needs of it, and the states and histories from which to go on: a place whose rollout is
    over begins another one, in the row that the step's `Noise` tells.
    """
    obs = agents.see(state)
    x = agents.remember(obs, history)
    out, value = agents.act(x), agents.value(x, state)
    action = agents.sample(out, noise.action)
    log_prob, _ = agents.log_prob(out, action)
    played = agents.carry_out(action)
    next_state, reward, end, sure = play(state, played.transpose(1, 2).flatten(2), noise.member, noise.state)
    next_history = push(history, obs, played)
    next_value = agents.value(agents.remember(agents.see(next_state), next_history), next_state)
    if args.bound_values and not args.simulator:
        next_value = next_value.clamp(max=agents.highest)  # from below, bad teams would look good
    step = obs, history, action, state, log_prob, value, reward, next_value
    step += 1 - end.to(reward.dtype), sure.to(reward.dtype)  # Eq. 5: m, and zeta as far as the model tells
    over, (fresh_state, fresh_history) = end | ~sure, begin(agents, data, noise.rows)
    next_state = torch.where(over[..., None], fresh_state, next_state)
    return step, next_state, torch.where(over[:, None, :, None, None], fresh_history, next_history)


def gae(reward, value, next_value, m, zeta, gamma, lam):
    """Eqs. 6 to 8: advantages A and returns R of rollouts (S, B, k), with both masks."""
    delta, advantage, returns = reward + gamma * m * next_value - value, [], []
    later = total = torch.zeros_like(delta[..., 0])
    for t in reversed(range(delta.shape[-1])):
        go_on = m[..., t] * zeta[..., t]
        later = delta[..., t] + gamma * lam * go_on * later
        beyond = zeta[..., t] * total + (1 - zeta[..., t]) * next_value[..., t]
        total = reward[..., t] + gamma * m[..., t] * beyond
        advantage.append(later)
        returns.append(total)
    return torch.stack(advantage[::-1], -1), torch.stack(returns[::-1], -1)


@torch.no_grad()
def settle(agents, steps, args):
    """What the k steps of a rehearsal teach: a `Batch` of B k steps, and what to log, (S,) each."""
    obs, history, action, state, *rest = zip(*steps)
    mine = [torch.stack(x, 3).flatten(2, 3) for x in (obs, history, action)]  # (S, N, B k, ...)
    state = torch.stack(state, 2).flatten(1, 2)  # (S, B k, D)
    log_prob, value, reward, next_value, m, zeta = (torch.stack(x, 2) for x in rest)  # (S, B, k)
    zeta = F.pad(zeta[..., :-1], (0, 1))  # Eq. 5: the k-th step is the last, also of a rollout that began on the way
    advantage, returns = gae(reward, value, next_value, m, zeta, args.gamma, args.gae_lambda)
    # How often the model was not sure where the game went on, of the steps before the k-th
    stopped = ((1 - zeta[..., :-1]) * m[..., :-1]).sum((1, 2)) / max(1, zeta[0, :, 1:].numel())
    logs = {"model_reward": reward.mean((1, 2)), "stopped": stopped, "ended": 1 - m.mean((1, 2))}
    std, mean = torch.std_mean(advantage, (1, 2), keepdim=True, correction=0)
    advantage = (advantage - mean) / (std + 1e-3 * agents.return_std)
    flat = (x.flatten(1) for x in (log_prob, value, advantage, returns))
    return Batch(*mine, state, *flat), logs


def rehearse(agents, play, data, noise, args, rehearsal_step=rehearsal_step, settle=settle):
    """Play k steps in B places for each seed in the world `play`; returns a `Batch` of B k steps, and what to log (S,).

    `rehearsal_step` and `settle` can be given in compiled form.
    """
    state, history = begin(agents, data, noise.rows[:, 0])
    noise, steps = noise._replace(rows=noise.rows.roll(-1, 1)), []  # a step's row is where the next one may begin
    for t in range(args.horizon):
        now = Noise(*(None if x is None else x[:, t] for x in noise))
        step, state, history = rehearsal_step(agents, play, data, state, history, now, args)
        steps.append(step)
    return settle(agents, steps, args)


# ---------------------------------------------------------------- losses
def ppo_loss(agents, batch, clip, action_penalty):
    """All of the agents' losses, for each seed (S,): their sum, and L(pi)'s first term, L(V), H, KL(played || pi)."""
    x = agents.remember(batch.obs, batch.history)
    out, value = agents.act(x), agents.value(x, batch.state)
    log_prob, entropy = agents.log_prob(out, batch.action)
    log_ratio = (log_prob - batch.log_prob).clamp(max=10)
    ratio, advantage = log_ratio.exp(), batch.advantage
    # Eq. 10
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    # Eq. 11, in units of the returns' spread
    value, before, returns = (v / agents.return_std for v in (value, batch.value, batch.returns))
    near = before + (value - before).clamp(-clip, clip)
    value_loss = 0.5 * torch.maximum(((value - returns) ** 2).mean(1), ((near - returns) ** 2).mean(1))
    policy_loss, entropy = -gain.mean(1), entropy.mean(1)
    total = policy_loss + value_loss - agents.alpha * entropy
    if not agents.discrete:
        excess = (out.chunk(2, -1)[0].abs() - 1).clamp(min=0)
        total = total + action_penalty * (excess**2).sum((1, 3)).mean(1)
    kl = (ratio - 1 - log_ratio).mean(1)
    return total, {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "kl": kl}


def clone_loss(agents, data, rows):
    """The warm-up's losses on the steps that begin in the rows (S, B), for each seed (S,): independent behavioural
    cloning, -log pi_i(a_i) of the recorded actions, summed over agents; and how far V is from what the recorded rest of
    the episode was worth."""
    state, history = begin(agents, data, rows)
    x, action = agents.remember(agents.see(state), history), data.action[rows].transpose(1, 2)  # (S, N, B, A)
    log_prob, _ = agents.log_prob(agents.act(x), action.argmax(-1) if agents.discrete else action)
    error = (agents.value(x, state) - data.togo[rows]) / agents.return_std
    return -log_prob.mean(1), 0.5 * (error**2).mean(1)


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
    """One step down the losses (G,) of G independent parts, each with a gradient of limited length.

    Their sum leaves each part, a member of the model or all that one seed's agents learn, its own gradient.
    """
    gradients = torch.autograd.grad(losses.sum(), adam.moved)
    rows = [gradient.reshape(len(losses), -1) for gradient in gradients]
    length = sum((row**2).sum(1) for row in rows).sqrt()  # (G,)
    factor = (args.max_grad_norm / length.clamp(min=args.max_grad_norm))[:, None]
    adam.step((row * factor).view_as(gradient) for row, gradient in zip(rows, gradients))


def minibatch(agents, adam, batch, pick, args):
    """One gradient step of all seeds on the steps `pick` (S, B) of the batch; returns diagnostics, (S,) each."""
    seed, agent = (torch.arange(count, device=pick.device)[:, None] for count in (agents.S, agents.N))
    mine = (each[seed[..., None], agent, pick[:, None]] for each in batch[:3])
    part = Batch(*mine, *(each[seed, pick] for each in batch[3:]))
    total, logs = ppo_loss(agents, part, args.clip, args.action_penalty)
    descend(adam, total, args)
    logs = {name: value.detach() for name, value in logs.items()}
    agents.alpha.add_(1e-3 * (args.least_entropy - logs["entropy"])).clamp_(min=0)  # rises while H is too low
    return logs


def update(agents, adam, batch, orders, args, minibatch=minibatch):
    """Go over a rehearsal in minibatches, in these orders (epochs, S, B k); returns the diagnostics of the last one.

    `minibatch` can be given in compiled form.
    """
    size = min(args.batch_size, orders.shape[-1])
    for order in orders:
        for pick in order[:, : order.shape[1] // size * size].split(size, 1):  # what is left over is left out
            logs = minibatch(agents, adam, batch, pick, args)
    return logs


def clone_update(agents, adam, data, rows, args):
    """One update of the warm-up on the steps that begin in the rows (S, B); returns the policies' loss (S,)."""
    policy_loss, value_loss = clone_loss(agents, data, rows)
    descend(adam, policy_loss + value_loss, args)
    return policy_loss.detach()


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "runs.py").exists() and (HOME / "envs" / "play.py").exists():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    import envs
    from data import layout, runs
    from envs.mamujoco import draw_convention
    from envs.simulator import open_loop, simulator
elif __name__ == "__main__":
    sys.exit("error: this file runs inside its repository, beside data/ and envs/; alone, it is to be imported")


def preset(args):
    """What differs from the coordination game's values, above: sizes that a laptop trains in minutes."""
    env, task = args.env, args.task or ("coordination" if args.env == "matrix" else envs.TASKS.get(args.env, ("",))[0])
    body = dict(
        num_seeds=3, model_steps=3000, model_eval_every=500, model_batch=256, model_hidden=200, reward_hidden=200,
        model_layers=3, model_lr=5e-3, beta_nll=0.5, reward_penalty=0.05, state_penalty=0.1, box_margin=0.5, horizon=25,
        first=0.5, rollouts=80, steps=300, eval_every=50, lr=3e-4, batch_size=500, hidden=128, width=32,
    )  # fmt: skip
    ant = body | dict(
        dataset="full-replay", model_steps=6000, model_hidden=400, end_from="state", box_margin=0.0, bound_values=True,
        horizon=50, first=0.1, limit=60.0, penalty_cap=60.0, state_penalty=1.5, adaptive=False, sample_states=True,
        least_entropy=-8.0, warmup=3000, steps=100, eval_every=25,
    )  # fmt: skip
    if task == "partial":  # there agents learn more slowly
        ant |= dict(steps=150, eval_every=50)
    values = {"matrix": {}, "polynomial": dict(dataset="peak-0.5"), "reacher": body | dict(dataset="expert-mix"),
              "halfcheetah": body | dict(dataset="good"), "ant": ant}  # fmt: skip
    return values.get(env, body | dict(dataset="")) | dict(env=env, task=task)


def arrange(dataset, args):
    """The dataset as `Data`, and where in its states the environment's own (D',) are found."""
    dtype, rows = torch.get_default_dtype(), layout.rows(dataset)
    state, columns, whole = layout.distinct_columns(rows["state"], rows["obs"])
    action, avail, steps = rows["actions"], rows["avail_actions"], rows["start"]
    if avail is not None:
        if (avail != avail[0]).any():
            raise ValueError(f"in {args.dataset} the available actions change, which the model does not learn")
        avail, action = avail[0], F.one_hot(action, avail.shape[-1]).to(dtype) * rows["acted"][:, None, None]
    if args.holdout and len(dataset.lengths) < 2 and not (args.simulator or args.world_model):
        had = f"{args.dataset} has one episode, so none can be held out to judge the model by"
        raise ValueError(f"{had}: take more episodes, or --holdout 0")
    out = layout.hold_out(args.holdout, steps, dataset.lengths, runs.stream(0, 4))  # (M,)
    togo = torch.zeros_like(rows["reward"]).index_copy_(0, steps, layout.togo(dataset, args.gamma))
    return Data(
        state, action, rows["reward"], rows["done"], togo, layout.age(dataset.lengths)[0], steps,
        rows["first"].nonzero()[:, 0], steps[~out], steps[out] if out.any() else steps, columns, avail,
    ), whole  # fmt: skip


def read_world(run, path, data, args):
    """The elites of another run's world model, for this run's seeds, and numbers about them."""

    def make(count, sizes):
        return World(data, replace(args, members=args.elites, **sizes), [runs.stream(0, 0)] * count)

    return runs.read_model(path, runs.world_of(data, args), run.seeds, args.elites, run.device, make)


def learn_world(run, dataset, data, args):
    """Act 1: learn the model; returns the elites of each seed, S elites models, and numbers about them."""
    S, n, seeds = args.num_seeds, args.elites, run.seeds
    world = World(data, args, [runs.stream(seed, 2) for seed in seeds]).to(run.device)
    adam, generators = Adam(world.parameters(), args.model_lr), [runs.stream(seed, 3, run.device) for seed in seeds]
    learn, loss = run.compile(model_update), torch.full((S, args.members), math.nan)
    run.begin("model step", "world_model.csv", world=world, adam=adam, generators=generators)
    for step in run.steps(args.model_steps, args.model_eval_every):
        if run.due():
            run.record({"loss": loss}, {f"{name}_error": x for name, x in validate(world, data, S).items()}, "held out")
        if step < args.model_steps:
            adam.lr.fill_(args.model_lr * (1 - step / args.model_steps))
            loss = learn(world, adam, data, draw_rows(generators, data.train, args.members, args.model_batch), args)

    errors = validate(world, data, S)
    which = best(errors, args)
    chosen, left = world.choose(which), layout.age(dataset.lengths)[1][data.held]  # steps to come
    curve, still = open_loop(chosen, (S, n), data.state, data.action.flatten(1), data.held, left, args.horizon)
    runs.save_figure(run.folder / "world_model.png", runs.draw_open_loop(curve, still, seeds, run.subject))
    sizes = {name: getattr(args, name) for name in ("model_hidden", "reward_hidden", "model_layers", "end_from")}
    about = {"world": runs.world_of(data, args), "dataset": args.dataset, "elites": n, "sizes": sizes}
    about |= {f"{name}_error": value.flatten()[which].mean().item() for name, value in errors.items()}
    about |= {"open_loop": curve.mean(0).tolist(), "open_loop_still": still.tolist(), "steps": args.model_steps}
    return chosen, about | {"seeds": seeds, "updates_per_second": run.speed}


def act(agents, obs, avail, memory):
    """What the teams do in B games of each seed, greedily, and their memory (S, B, N, H (O + A)): obs (S, B, N, O) ->
    (S, B, N) or (S, B, N, A). Which actions are available, here `avail`, never changes, so that the agents know it."""
    obs = ((obs.to(agents.view_mean.dtype) - agents.view_mean) / agents.view_std).transpose(1, 2)  # (S, N, B, O)
    history = memory.transpose(1, 2).unflatten(-1, (agents.H, agents.O + agents.A))  # (S, N, B, H, O + A)
    action = agents.sample(agents.act(agents.remember(obs, history)))
    played = agents.carry_out(action)
    memory = push(history, obs, played).flatten(-2).transpose(1, 2)
    return (action if agents.discrete else played.float()).transpose(1, 2), memory


def evaluate(agents, args, step, episodes, device, film=None):
    """Returns (S, E) of the greedy teams of all seeds, and what happened: `runs.score`."""
    memory = agents.H * (agents.O + agents.A)
    return runs.score(lambda *seen: act(agents, *seen), args, step, episodes, device, memory, film=film)


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("moma_ppo", args)
    device, S = run.device, args.num_seeds
    dataset = run.load(episodes=args.episodes)
    data, whole = arrange(dataset, args)
    agents = Agents(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adam, generators = Adam(agents.parameters(), args.lr), [runs.stream(seed, 1, device) for seed in run.seeds]

    # Act 1: a world to play in
    if args.simulator:
        game = runs.game(args, S * args.rollouts, device)
        world, about, steps = simulator(game, (S, args.rollouts), whole, data.columns), None, ()
    else:
        path = args.out_dir if run.reached() else args.world_model
        model, about = read_world(run, path, data, args) if path else learn_world(run, dataset, data, args)
        world, steps = dream(model, data, args), (run.compile(rehearsal_step), run.compile(settle))
        errors = " ".join(f"{x:.3f}" for x in about["open_loop"])
        run.learned_from["the world model"] = runs.fingerprint(model.state_dict())
        runs.say(f"world model: {args.elites} elites, open-loop error after 1, 2, ... steps: {errors}")

    # Act 2: rehearsals in it
    learn, clone = run.compile(minibatch), run.compile(clone_update)
    run.begin(agents=agents, adam=adam, generators=generators)
    if about:
        runs.save_model(run.folder, model, about | {"seeds": run.seeds})
    names = ("model_reward", "stopped", "ended", "policy_loss", "value_loss", "entropy", "kl")
    logs = dict.fromkeys(names, torch.full((S,), math.nan, device=device))
    for step in run.steps(args.steps, args.eval_every):
        if run.due(logs):
            scores = evaluate(agents, args, step, args.eval_episodes, device)
            line = f"in the model {logs['model_reward'].mean():8.3f} a step" if step else ""
            run.record(logs | {"alpha": agents.alpha}, {name: x.mean(1) for name, x in scores.items()}, line)
        if step == 0 and args.warmup:
            runs.say(f"cloning first, {args.warmup} updates")
            for _ in range(args.warmup):
                clone(agents, adam, data, draw_rows(generators, data.steps, args.batch_size), args)
        if step < args.steps:
            adam.lr.fill_(args.lr * (1 - step / args.steps))
            batch, logs = rehearse(agents, world, data, draw_noise(generators, data, args), args, *steps)
            orders = draw_orders(generators, batch.returns.shape[1], args)
            logs |= update(agents, adam, batch, orders, args, learn)

    figures, more, film = {}, {"world_model": about}, [] if args.env == "reacher" else None
    scores = evaluate(agents, args, args.steps, 10 * args.eval_episodes, device, film)
    if film:
        bend, figures["convention.png"] = draw_convention(film[0]["state"], run.seeds, f"MOMA-PPO on {run.subject}")
        more["counterclockwise"] = runs.over_seeds(bend)
    actions, memory = agents.A * agents.discrete, agents.H * (agents.O + agents.A)
    run.keep_team(lambda *seen: act(agents, *seen), dataset.obs.shape[2:], actions, memory, agents)
    return run.finish("MOMA-PPO", scores, dataset, run.best, None, figures, **more)


def parse(argv=None):
    """Read the command line; where no flag speaks, the environment's own values or those of the resumed run hold."""
    kinds = "MOMA-PPO is for bodies, and games whose available actions never change"
    known = [env for env in envs.TASKS if env not in ("bridge", "smac")]
    args = runs.parse(Args, preset, argv, __doc__, kinds, known)
    zero = "seed eval_episodes episodes holdout first warmup reward_penalty state_penalty aleatoric "
    zero += "gamma gae_lambda action_penalty memory beta_nll box_margin"
    runs.check_numbers(args, zero, "gamma gae_lambda first beta_nll", any_sign="least_entropy")
    if not 2 <= args.elites <= args.members:
        raise ValueError(f"--elites must be at least 2, or nothing tells how sure they are, and at most {args.members}")
    if args.holdout >= 1:
        raise ValueError(f"--holdout is a share of the episodes, below 1, not {args.holdout}")
    if args.simulator and args.env == "halfcheetah":
        raise ValueError("--simulator cannot be put into a state of halfcheetah: choose matrix, reacher or ant")
    if args.width % 2:
        raise ValueError(f"--width must be even, not {args.width}")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
