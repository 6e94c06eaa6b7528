"""MAPPO: proximal policy optimisation for cooperative teams
(Yu et al., NeurIPS 2022, arXiv 2103.01955).

The problem. N agents see different parts of one game and share one reward. They must
learn together, by playing, but each of them has to act on its own view in the end.

The idea. Plain PPO, with three things that suit a team. All agents share one policy
network, told which agent it is, so each learns from everybody's games. A critic, needed
in training only, sees the whole state: its estimate of how a step turned out is one
number that serves the whole team. And the critic predicts returns in units of their own
running mean and spread, so that one step size fits every game. All that remains is care:
large batches, few passes over them.

Equations. Agent i acts by pi(.|o_i), o_i its view; s is the state, V the critic, r the
team's reward, t a step.
  delta_t  = r_t + gamma V(s_{t+1}) - V(s_t)
             V(s_{t+1}) = 0 if the game ended by its own rules at t
  A_t      = delta_t + gamma lambda A_{t+1}
             it stops where a game ends, for whatever reason
  R_t      = A_t + V(s_t)                           what the critic learns to predict
  rho_i    = pi(a_i|o_i) / pi_played(a_i|o_i)       pi_played recorded the rollout
  A        = ( A_t - mean ) / spread                over the rollout's living agents
  L(pi)    = -E_i [ min( rho_i A, clip(rho_i, 1 - clip, 1 + clip) A ) ]
             - entropy E_i [ H(pi(.|o_i)) ]
  L(V)     = E [ Huber( (V(s) - mean) / std, (R - mean) / std ) ]

Commands, and the return you should see (last policy; one CPU core, torch 2.13):
  python algorithms/mappo.py --env smac --task 3m --steps 300000 --eval-every 50000
      32 s of CPU time, one seed: 98 % of battles won greedily (return 19.8), 70 % by
      sampling (16.4), and still rising
  python algorithms/mappo.py --env smac --task 5m_vs_6m --steps 2000000
      4.5 minutes of CPU time, one seed: 94 % won greedily (19.4), 92 % by sampling
      (19.3), where no scripted team wins one
  python algorithms/mappo.py --env bridge --steps 500000 --num-seeds 3
      71 s of CPU time: greedy -1.2433 (2 of 3 seeds reach the best possible, -1.2355),
      sampled -1.2500
algorithms/mappo.md has those of harder battles, the ant and matrix games, and the
reasons for the choices below.

In your own loop (this file alone will do; `Rollout` says what the tensors are):
  import torch, mappo
  S, L, B, N, A = 2, 8, 32, 2, 3                  # seeds, steps, games, agents, actions
  args = mappo.Args(hidden=32, lr=5e-3)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = mappo.Team(N, A, 4, 6, True, args, generators)  # views of 4, states of 6
  adam = torch.optim.Adam(team.parameters(), args.lr, eps=1e-5, fused=True)
  last, avail = torch.zeros(S, B, N, A), torch.ones(S, B, N, A).bool()
  never = torch.zeros(S, B).bool()
  for iteration in range(20):
      noise, steps = team.actor.noise(generators, L, B, N), []
      for t in range(L):               # who agrees earns 1; a game ends by its clock
          obs, state, after = (torch.rand(S, B, *n) for n in ((N, 4), (6,), (6,)))
          x, action, log_prob, last = mappo.act(team.actor, obs, last, avail, noise[:, t])
          reward, over = (action[..., 0] == action[..., 1]).float(), torch.rand(S, B) < 0.2
          last = last * ~over[..., None, None]      # in your games, start those anew
          played = x, avail, action, log_prob
          steps.append(mappo.Rollout(*played, state, after, reward, never, over))
      rollout = mappo.Rollout(*(torch.stack(field, 1) for field in zip(*steps)))
      orders = mappo.draw_orders(generators, L * B, args)
      logs = mappo.update(team, adam, rollout, orders, args)

Differences from the authors' code, and choices made here:
  1. No recurrence: an agent's input is its view, its own last action (--recall: its
     last few) and its number.
  2. The critic sees the state once for the whole team, not once for each agent with
     that agent's features.
  3. The value loss is not clipped: the Huber loss on normalised returns is the authors'
     other safeguard. When the units of returns move, the critic's last layer is not
     corrected for it (PopArt would); it follows by learning.
  4. Dead agents, who may only play action 0, count in no mean of the policy's loss or
     of the advantages.
  5. A time limit is not the end of the game: the return beyond it is taken from the
     critic, at the last state seen.
  6. No LayerNorm, which the authors have on inputs and hidden layers. --normalize feeds
     all inputs in units of their running mean and spread; bodies need it.
  7. Continuous actions are normal with mean tanh(.) and a spread that does not depend
     on the view. A sample outside [-1, 1] is clipped when played; rho uses the sample.
  8. Every evaluation restarts the games, so that a resumed run needs no record of the
     simulator's inside.
Seeds differ in all that is random here, but play in one environment: where that is
random itself, what it draws for a seed depends on which seeds run beside it.

Shapes: S seeds, B games of each, L steps of a rollout, M = L B, N agents, A actions (or
the size of an agent's action), O observation, D state, I actor inputs.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

ILLEGAL = -1e10  # the logit of an action that is not available
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "smac"  # the environment, one of ours or module:factory
    task: str = ""  # its task; by default the environment's first
    env_kwargs: str = ""  # more for the environment, as JSON: '{"limits": {"joint1": [0, 3]}}'
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in games not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 1  # how many seeds train, all at once
    steps: int = 1_000_000  # environment steps of each seed, in whole rollouts
    eval_every: int = 100_000  # environment steps between evaluations, which restart the games
    eval_episodes: int = 64  # games per seed and evaluation, greedy and again sampled; 0: none
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads; networks this small gain little from more
    compile: bool = torch.cuda.is_available()  # compile play, update and, but bodies, the games
    out_dir: str = ""  # the run's folder; by default a new one in runs/mappo
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    save_snapshots: bool = False  # keep evaluated actors, pick behaviour teams from them
    # --- the method
    num_envs: int = 256  # games that each seed plays at once
    rollout: int = 64  # steps of every game between two updates
    epochs: int = 5  # passes over a rollout
    minibatches: int = 4  # gradient steps in a pass
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # how far advantages look past the critic
    recall: int = 1  # how many of its own last actions an agent sees (discrete actions)
    min_std: float = 0.0  # the smallest spread of continuous actions
    normalize: bool = False  # feed views and states in units of their running mean and spread
    clip: float = 0.2  # how far an action's probability may move in an update, as a ratio
    entropy: float = 0.01  # weight of the entropy bonus
    # --- the optimisation
    hidden: int = 128  # units per hidden layer
    layers: int = 2  # hidden layers
    lr: float = 5e-4  # Adam's step size
    max_grad_norm: float = 10.0  # longest gradient of one seed's actor or critic
    huber: float = 10.0  # the critic's errors beyond this many deviations count linearly


PRESETS = {
    "": dict(  # a game that is not ours is slow
        num_envs=8,
        rollout=128,
        steps=100_000,
        eval_every=20_000,
        eval_episodes=10,
        normalize=True,
    ),
}


# ---------------------------------------------------------------- data
class Rollout(NamedTuple):
    """L steps of B games of each seed, as they were played; or one step, without the axis L."""

    x: torch.Tensor  # (S, L, B, N, I) what the actors saw
    avail: torch.Tensor  # (S, L, B, N, A) bool, available actions; (S, L, B, N, 0) if continuous
    action: torch.Tensor  # (S, L, B, N) int64, or (S, L, B, N, A)
    log_prob: torch.Tensor  # (S, L, B, N) of the policy that played
    state: torch.Tensor  # (S, L, B, D)
    next_state: torch.Tensor  # (S, L, B, D) in which the step ended, before any restart
    reward: torch.Tensor  # (S, L, B)
    terminated: torch.Tensor  # (S, L, B) bool: the game ended by its own rules with this step
    truncated: torch.Tensor  # (S, L, B) bool: it was cut off


class Batch(NamedTuple):
    """Steps to learn from, for each seed: the M of a rollout, or the m of a minibatch."""

    x: torch.Tensor  # (S, M, N, I)
    avail: torch.Tensor  # (S, M, N, A) bool, or (S, M, N, 0)
    action: torch.Tensor  # (S, M, N) int64, or (S, M, N, A)
    log_prob: torch.Tensor  # (S, M, N)
    alive: torch.Tensor  # (S, M, N) 1 for agents that had a choice
    state: torch.Tensor  # (S, M, D)
    advantage: torch.Tensor  # (S, M)
    returns: torch.Tensor  # (S, M), in standard deviations from the mean


def draw_orders(generators, count, args):
    """In which order each pass goes over the M steps of a rollout: (epochs, S, M)."""
    orders = []
    for _ in range(args.epochs):
        order = [torch.randperm(count, generator=g, device=g.device) for g in generators]
        orders.append(torch.stack(order))
    return torch.stack(orders)


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """S independent linear layers as one batched product; each seed has its own generator."""

    def __init__(self, inputs, outputs, gain, generators):
        super().__init__()
        start = [torch.empty(inputs, outputs) for _ in generators]
        start = [nn.init.orthogonal_(x, gain, generator=g) for x, g in zip(start, generators)]
        self.weight = nn.Parameter(torch.stack(start))  # (S, in, out)
        self.bias = nn.Parameter(torch.zeros(len(start), 1, outputs))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (S, B, out)


def mlp(inputs, outputs, gain, args, generators):
    """A ReLU network for each seed: (S, B, inputs) -> (S, B, outputs).

    `gain` scales the last layer's weights.
    """
    layers = []
    for _ in range(args.layers):
        layers += [Linear(inputs, args.hidden, 2**0.5, generators), nn.ReLU()]
        inputs = args.hidden
    return nn.Sequential(*layers, Linear(inputs, outputs, gain, generators))


class Scale(nn.Module):
    """With --normalize, inputs in units of the mean and spread of all that each seed has seen."""

    def __init__(self, inputs, seeds, on):
        super().__init__()
        self.on = on
        self.register_buffer("seen", torch.zeros(seeds, 1, 1))
        self.register_buffer("mean", torch.zeros(seeds, 1, inputs))
        self.register_buffer("var", torch.ones(seeds, 1, inputs))

    @property
    def std(self):
        return self.var.clamp(min=1e-4).sqrt()  # (S, 1, inputs)

    def forward(self, x):
        return (x - self.mean) / self.std if self.on else x  # (S, B, inputs)

    def watch(self, x):
        """Take x (S, B, inputs) into the mean and the variance."""
        share = x.shape[1] / (self.seen + x.shape[1])
        var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        gap = mean - self.mean
        self.var += share * (var - self.var + (1 - share) * gap**2)
        self.mean += share * gap
        self.seen += x.shape[1]


class Actor(nn.Module):
    """One policy for all agents of a team, for S seeds.

    The small last layer makes the first policy almost uniform.
    """

    def __init__(self, inputs, outputs, discrete, args, generators):
        super().__init__()
        self.scale = Scale(inputs, len(generators), args.normalize)
        self.body = mlp(inputs, outputs, 0.01, args, generators)
        self.discrete, self.outputs = discrete, outputs
        if not discrete:
            self.free_log_std = nn.Parameter(torch.full((len(generators), 1, outputs), -0.5))
            self.least = math.log(max(args.min_std, 1e-6))

    @property
    def log_std(self):
        """The logarithm of the actions' spread, (S, 1, A)."""
        return self.free_log_std.clamp(min=self.least)

    def forward(self, x, avail):
        """(S, B, N, I), (S, B, N, A or 0) -> log-probabilities of all actions, (S, B, N, A).

        Where actions are continuous, the mean action, (S, B, N, A).
        """
        out = self.body(self.scale(x.flatten(1, 2))).unflatten(1, x.shape[1:3])
        if self.discrete:
            return F.log_softmax(out.masked_fill(~avail, ILLEGAL), -1)
        return out.tanh()

    def log_prob(self, out, action):
        """Log-probability of actions, (S, B, N), and the policy's entropy; `out` as above.

        The entropy is (S, B, N), or (S, 1, 1) where actions are continuous.
        """
        if self.discrete:
            return out.gather(-1, action[..., None])[..., 0], -(out.exp() * out).sum(-1)
        log_std = self.log_std[:, None]  # (S, 1, 1, A)
        log_density = -0.5 * ((action - out) / log_std.exp()) ** 2 - log_std - HALF_LOG_2PI
        return log_density.sum(-1), (log_std + 0.5 + HALF_LOG_2PI).sum(-1)

    def noise(self, generators, *shape):
        """What makes `sample` random, (S, *shape, A): Gumbel noise, or normal noise.

        Each seed's comes from its own generator.
        """
        draw = torch.Tensor.exponential_ if self.discrete else torch.Tensor.normal_
        noise = torch.stack(
            [
                draw(torch.empty(*shape, self.outputs, device=g.device), generator=g)
                for g in generators
            ]
        )
        return -noise.clamp(min=1e-30).log() if self.discrete else noise

    def sample(self, out, noise):
        """Actions drawn from the policy, (S, B, N) or (S, B, N, A); its likeliest with noise 0."""
        if self.discrete:  # where log pi and Gumbel noise have their largest sum is a draw from pi
            return (out + noise).argmax(-1)
        return out + self.log_std[:, None].exp() * noise


class Team(nn.Module):
    """All that S teams learn, and the running mean and spread of the returns of each."""

    def __init__(self, N, A, obs_dim, state_dim, discrete, args, generators):
        super().__init__()
        S = len(generators)
        inputs = obs_dim + args.recall * A * discrete + N
        self.actor = Actor(inputs, A, discrete, args, generators)
        body = mlp(state_dim, 1, 1.0, args, generators)
        self.critic = nn.Sequential(Scale(state_dim, S, args.normalize), *body)
        self.register_buffer("moments", torch.zeros(S, 3))  # decaying means of 1, R and R^2

    def scale(self):
        """Mean and standard deviation of the returns, (S, 1) each: 0 and 1 before the first."""
        weight, mean, square = (self.moments / self.moments[:, :1].clamp(min=1e-8)).split(1, 1)
        std = (square - mean**2).clamp(min=1e-4).sqrt()
        return mean, torch.where(weight > 0, std, 1.0)

    def value(self, state):
        """V(s) in units of the reward, (S, L, B, D) -> (S, L, B)."""
        mean, std = self.scale()
        value = self.critic(state.flatten(1, 2))[..., 0] * std + mean  # (S, M)
        return value.unflatten(1, state.shape[1:3])

    def watch(self, returns):
        """Move the running mean and spread towards those of `returns` (S, M)."""
        now = torch.stack([torch.ones_like(returns), returns, returns**2], 1)  # (S, 3, M)
        self.moments.lerp_(now.mean(2), 0.01)


# ---------------------------------------------------------------- playing
def look(obs, last):
    """What an actor gets: its view (S, B, N, O), last actions (S, B, N, recall A) and number."""
    number = torch.eye(obs.shape[2], dtype=obs.dtype, device=obs.device)
    return torch.cat([obs, last, number.expand(*obs.shape[:2], -1, -1)], -1)  # (S, B, N, I)


@torch.no_grad()
def act(actor, obs, last, avail, noise):
    """A step of play, with `noise` (S, B, N, A) or, if it is 0, greedily.

    Returns the inputs x (S, B, N, I), the actions, their log-probability (S, B, N), and everybody's
    last actions as one-hot vectors (S, B, N, recall A), the newest first.
    """
    x = look(obs, last)
    out = actor(x, avail)
    action = actor.sample(out, noise)
    if actor.discrete:  # otherwise they are (S, B, N, 0)
        newest = F.one_hot(action, actor.outputs).to(last.dtype)
        last = torch.cat([newest, last], -1)[..., : last.shape[-1]]
    return x, action, actor.log_prob(out, action)[0], last


# ---------------------------------------------------------------- estimates
def gae(reward, terminated, truncated, value, next_value, gamma, lam):
    """The advantages A_t, all (S, L, B).

    next_value[:, t] is V of the state in which step t ended, before a restart.
    """
    delta = reward + gamma * next_value * ~terminated - value
    carry = gamma * lam * ~(terminated | truncated)
    advantage, later = torch.empty_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        advantage[:, t] = later = delta[:, t] + carry[:, t] * later
    return advantage


@torch.no_grad()
def estimate(team, rollout, args):
    """What a rollout teaches, a `Batch`; its returns move the units in which they are measured."""
    x, avail, action, log_prob, state, next_state, reward, *ends = rollout
    value, next_value = team.value(state), team.value(next_state)  # (S, L, B)
    advantage = gae(reward, *ends, value, next_value, args.gamma, args.gae_lambda)
    returns = (advantage + value).flatten(1)  # (S, M)
    team.watch(returns)
    mean, std = team.scale()
    alive = avail[..., 1:].any(-1) | (not team.actor.discrete)  # who is dead may play action 0 only
    alive = alive.to(x.dtype)  # (S, L, B, N)

    # Every living agent counts once in the mean and the spread of the advantages.
    weight = alive.sum(-1) / alive.sum((1, 2, 3))[:, None, None]  # (S, L, B)
    advantage = advantage - (weight * advantage).sum((1, 2), keepdim=True)
    spread = (weight * advantage**2).sum((1, 2), keepdim=True).sqrt()
    advantage = advantage / (spread + 1e-5)
    fields = x, avail, action, log_prob, alive, state, advantage
    return Batch(*(field.flatten(1, 2) for field in fields), (returns - mean) / std)


# ---------------------------------------------------------------- losses
def policy_loss(actor, batch, clip):
    """For each seed, (S,): L(pi) without its entropy, and the entropy."""
    out = actor(batch.x, batch.avail)
    log_prob, entropy = actor.log_prob(out, batch.action)
    ratio = (log_prob - batch.log_prob).exp()  # (S, M, N)
    advantage = batch.advantage[..., None]  # (S, M, 1)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    weight = batch.alive / batch.alive.sum((1, 2), keepdim=True).clamp(min=1)  # sum 1 a seed
    return -(weight * gain).sum((1, 2)), (weight * entropy).sum((1, 2))


def value_loss(critic, batch, huber):
    """L(V) for each seed, (S,)."""
    value = critic(batch.state)[..., 0]  # (S, M)
    return F.huber_loss(value, batch.returns, reduction="none", delta=huber).mean(1)


# ---------------------------------------------------------------- update
@torch.compiler.disable  # a graph ends here, as torch.compile cannot hold an optimiser's step
def take_step(adam, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    adam.step()
    adam.zero_grad()


def descend(adam, module, losses, max_grad_norm):
    """One step down the losses (S,) of independent seeds, each with a gradient of limited length.

    Their sum leaves each seed the gradient that it would have alone. Returns them, detached.
    """
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(losses.sum(), parameters)
    rows = [gradient.reshape(len(losses), -1) for gradient in gradients]
    length = sum((row**2).sum(1) for row in rows).sqrt()  # (S,)
    factor = (max_grad_norm / length.clamp(min=max_grad_norm))[:, None]
    losses = losses.detach()
    take_step(adam, parameters, [(row * factor).view_as(p) for row, p in zip(rows, parameters)])
    return losses


def minibatch(team, adam, batch, pick, args):
    """One gradient step of all seeds on the steps `pick` (S, m) of the batch.

    Returns diagnostics, {name: (S,)}.
    """
    seed = torch.arange(len(pick), device=pick.device)[:, None]
    part = Batch(*(field[seed, pick] for field in batch))
    losses, entropy = policy_loss(team.actor, part, args.clip)
    logs = {"policy_loss": losses.detach(), "entropy": entropy.detach()}
    descend(adam, team.actor, losses - args.entropy * entropy, args.max_grad_norm)
    losses = value_loss(team.critic, part, args.huber)
    return logs | {"value_loss": descend(adam, team.critic, losses, args.max_grad_norm)}


def update(team, adam, rollout, orders, args, estimate=estimate, minibatch=minibatch):
    """Learn from a rollout, in minibatches, in these orders (epochs, S, M).

    Returns the diagnostics of the last one. `estimate` and `minibatch` can be given in compiled
    form.
    """
    batch = estimate(team, rollout, args)
    for order in orders:
        for pick in order.tensor_split(args.minibatches, 1):
            logs = minibatch(team, adam, batch, pick, args)
    if args.normalize:  # only now, so that the first rho of an update was 1
        team.actor.scale.watch(batch.x.flatten(1, 2))
        team.critic[0].watch(batch.state)
    return logs


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data.run import Player, Run, game, launch, read_args
    from data.run.snapshots import keep_behaviours, save_snapshots
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")


class Games:
    """B games of each seed in one environment, and what the actors see of them."""

    def __init__(self, args, device):
        self.shape, self.recall = (args.num_seeds, args.num_envs), args.recall
        self.env = env = game(args, args.num_seeds * args.num_envs, device)
        self.restart(0)
        sizes = env.num_agents, env.num_actions, env.obs_dim, env.state_dim
        self.sizes = *sizes, self.avail.shape[-1] > 0  # as a `Team` takes them

    def see(self, obs, info):
        """Take in what the environment gives, with an axis for the seeds.

        obs (S, B, N, O), state (S, B, D), avail (S, B, N, A), or (S, B, N, 0) if continuous.
        """
        seen = obs, info["state"], info.get("avail_actions", obs[..., :0])
        obs, state, self.avail = (x.unflatten(0, self.shape) for x in seen)
        self.obs, self.state = (x.to(torch.get_default_dtype()) for x in (obs, state))

    def restart(self, seed):
        """Start all games anew; `seed` fixes what the environment draws until the next restart."""
        self.see(*self.env.reset(seed=seed))
        self.last = self.obs.new_zeros(*self.obs.shape[:3], self.recall * self.avail.shape[-1])

    def restart_finished(self, over):
        """Start the games `over` (S, B) anew, without last actions."""
        if over.device.type != "cpu" or over.any():  # on a GPU to ask would be to wait
            self.see(*self.env.reset(options={"reset_mask": over.flatten()}))
            self.last = self.last * ~over[..., None, None]

    def step(self, action):
        """Play actions (S, B, N) or (S, B, N, A); returns reward, terminated, truncated (S, B)."""
        obs, reward, *ends, info = self.env.step(playable(action).flatten(0, 1))
        self.see(obs, info)
        return [x.unflatten(0, self.shape) for x in (reward.to(self.obs.dtype), *ends)]


def playable(action):
    """Actions as environments take them: continuous ones clipped."""
    return action.clamp(-1, 1).float() if action.is_floating_point() else action


@torch.no_grad()
def roll_out(games, actor, generators, args, act=act):
    """Go on with all games for L steps: a `Rollout`. `act` can be given in compiled form."""
    noise, steps = actor.noise(generators, args.rollout, *games.obs.shape[1:3]), []
    for t in range(args.rollout):
        obs, avail, state = games.obs, games.avail, games.state
        x, action, log_prob, games.last = act(actor, obs, games.last, avail, noise[:, t])
        reward, terminated, truncated = games.step(action)
        steps.append(
            Rollout(x, avail, action, log_prob, state, games.state, reward, terminated, truncated)
        )
        games.restart_finished(terminated | truncated)
    return Rollout(*(torch.stack(field, 1) for field in zip(*steps)))


def player(actor, games):
    """How the teams of all seeds play; they remember their last actions."""

    def play(obs, avail, last, clocks=None):
        avail, noise = obs[..., :0] if avail is None else avail, 0
        if clocks is not None:  # as a Gumbel, or as a normal number
            noise = -clocks.log() if actor.discrete else torch.special.ndtri((-clocks).exp())
        _, action, _, last = act(actor, obs.to(last.dtype), last, avail, noise)
        return playable(action), last

    N, A, *_ = games.sizes
    return Player(play, actor, games.last.shape[-1], (-1, N, A))


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("mappo", args)
    games = Games(args, run.device)
    run.views, run.actions = games.obs.shape[2:], games.avail.shape[-1]
    run.best = games.env.best_return
    size = args.rollout * args.num_envs  # a seed's steps in an iteration
    least = -(-games.env.time_limit // args.rollout) * size  # or no game would reach its end
    if max(args.eval_every, size) < least:
        raise ValueError(f"--eval-every restarts the games: choose {least} or fewer --num-envs")
    team = Team(*games.sizes, args, run.streams(0, "cpu")).to(run.device)
    adam = torch.optim.Adam(team.parameters(), args.lr, eps=1e-5, fused=True)  # authors' eps
    generators = run.streams(1)
    graphs = [run.compile(function) for function in (act, estimate, minibatch)]
    if args.compile and hasattr(games.env, "compile"):
        games.env.compile(run.compile)
    run.begin(team=team, adam=adam, generators=generators)
    own = player(team.actor, games)
    for iteration in run.steps(own, -(-args.steps // size), stride=size):
        if run.scheduled(iteration):
            if args.save_snapshots:
                save_snapshots(run, team.actor)
            games.restart(1_000_003 * args.seed + iteration + 1)  # a resumed run's are the same
        rollout = roll_out(games, team.actor, generators, args, graphs[0])
        orders = draw_orders(generators, size, args)
        run.logs = update(team, adam, rollout, orders, args, *graphs[1:])
    if args.save_snapshots:
        keep_behaviours(run, team.actor)
    return run.finish("MAPPO", own)


def parse(argv=None):
    """Read the command line; where no flag speaks, the preset's values or a resumed run's hold."""
    return read_args(
        Args,
        PRESETS,
        argv,
        __doc__,
        may_be_zero="seed eval_episodes gamma gae_lambda entropy layers min_std",
        at_most_one="gamma gae_lambda",
    )


if __name__ == "__main__":
    launch(main, parse)
