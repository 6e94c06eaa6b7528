"""MAPPO: proximal policy optimisation for cooperative teams (Yu et al., NeurIPS 2022, arXiv 2103.01955).

The problem. N agents see different parts of one game and share one reward. They must learn together, by playing, but
each of them has to act on its own view in the end.

The idea. Plain PPO, with three things that suit a team. All agents share one policy network, told which agent it is, so
each learns from everybody's games. A critic, needed in training only, sees the whole state: its estimate of how a step
turned out is one number that serves the whole team. And the critic predicts returns in units of their own running mean
and spread, so that one step size fits every game. All that remains is care: large batches, few passes over them.

Equations. Agent i acts by pi(.|o_i), o_i its view; s is the state, V the critic, r the team's reward, t a step.
  delta_t  = r_t + gamma V(s_{t+1}) - V(s_t)            V(s_{t+1}) = 0 if the game ended by its own rules at t
  A_t      = delta_t + gamma lambda A_{t+1}             stops where a game ends, for whatever reason
  R_t      = A_t + V(s_t)                               what the critic learns to predict
  rho_i    = pi(a_i|o_i) / pi_played(a_i|o_i)           pi_played recorded the rollout
  A        = ( A_t - mean ) / spread                    over the rollout's living agents
  L(pi)    = -E_i [ min( rho_i A, clip(rho_i, 1 - clip, 1 + clip) A ) ] - entropy E_i [ H(pi(.|o_i)) ]
  L(V)     = E [ Huber( (V(s) - mean) / std, (R - mean) / std ) ]

Commands, and the return you should see (last policy; one CPU core of a small server, torch 2.13):
  python algorithms/mappo.py --env smac --task 3m --steps 300000 --eval-every 50000     32 s of CPU time, one seed:
      98 % of battles won greedily (return 19.8), 70 % by sampling (16.4), and still rising
  python algorithms/mappo.py --env smac --task 5m_vs_6m --steps 2000000                 4.5 minutes of CPU time, one
      seed: 94 % won greedily (19.4), 92 % by sampling (19.3), where no scripted team wins one
  python algorithms/mappo.py --env bridge --steps 500000 --num-seeds 3    71 s of CPU time: greedy -1.2433 (2 of 3
      seeds reach the best possible, -1.2355), sampled -1.2500
algorithms/mappo.md has those of harder battles, the ant and matrix games, and the reasons for the choices below.

In your own loop (this file alone will do; `Rollout` says what the tensors are):
  import torch, mappo
  S, L, B, N, A = 2, 8, 32, 2, 3                                   # seeds, steps, games, agents, actions
  args, generators = mappo.Args(hidden=32, lr=5e-3), [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = mappo.Team(N, A, 4, 6, True, args, generators)            # views of 4 entries, states of 6
  adam, last, avail = mappo.Adam(team.parameters(), args.lr), torch.zeros(S, B, N, A), torch.ones(S, B, N, A).bool()
  for iteration in range(20):
      noise, steps = team.actor.noise(generators, L, B, N), []
      for t in range(L):                                           # who agrees earns 1; a game ends by its clock
          obs, state, after = torch.rand(S, B, N, 4), torch.rand(S, B, 6), torch.rand(S, B, 6)
          x, action, log_prob, last = mappo.act(team.actor, obs, last, avail, noise[:, t])
          reward, over = (action[..., 0] == action[..., 1]).float(), torch.rand(S, B) < 0.2
          last = last * ~over[..., None, None]                     # in your games, start those that are over anew
          steps.append((x, avail, action, log_prob, state, after, reward, torch.zeros_like(over), over))
      rollout = mappo.Rollout(*(torch.stack(each, 1) for each in zip(*steps)))
      logs = mappo.update(team, adam, rollout, mappo.draw_orders(generators, L * B, args), args)

Differences from the authors' code, and choices made here:
  1. No recurrence: an agent's input is its view, its own last action (--recall: its last few) and its number.
  2. The critic sees the state once for the whole team, not once for each agent with that agent's features.
  3. The value loss is not clipped: the Huber loss on normalised returns is the authors' other safeguard.
  4. Dead agents, who may only play action 0, count in no mean of the policy's loss or of the advantages.
  5. A time limit is not the end of the game: the return beyond it is taken from the critic, at the last state seen.
  6. No LayerNorm, which the authors have on inputs and hidden layers. --normalize feeds all inputs in units of their
     running mean and spread; bodies need it.
  7. Continuous actions are normal with mean tanh(.) and a spread that does not depend on the view. A sample outside
     [-1, 1] is clipped when played; rho uses the sample.
  8. Every evaluation restarts the games, so that a resumed run needs no record of the simulator's inside.
Seeds differ in all that is random here, but play in one environment: where that is random itself, what it draws for a
seed depends on which seeds run beside it.

Shapes: S seeds, B games of each, L steps of a rollout, M = L B, N agents, A actions (or the size of an agent's action),
O observation, D state, I actor inputs, E episodes of an evaluation.
"""

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
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "smac"  # the environment, one of ours or module:factory
    task: str = ""  # its task; by default the environment's first
    env_kwargs: str = ""  # more for the environment, as JSON: '{"limits": {"joint1": [0, 3]}}' turns a joint no further
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in an environment that is not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 1  # how many seeds train, all at once
    steps: int = 1_000_000  # environment steps of each seed, all its games together; rounded up to whole rollouts
    eval_every: int = 100_000  # environment steps between evaluations; each writes a checkpoint, restarts the games
    eval_episodes: int = 64  # games per seed and evaluation, each played greedily and by sampling; 0 for none
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads; networks this small gain little from more, and lose much on a busy machine
    compile: bool = torch.cuda.is_available()  # compile play, update and, except bodies, the environment
    out_dir: str = ""  # the run's folder; by default a new one in runs/mappo
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    save_snapshots: bool = False  # keep every evaluated actor, and pick behaviour teams for datasets from them
    # --- the method
    num_envs: int = 256  # games that each seed plays at once
    rollout: int = 64  # steps of every game between two updates
    epochs: int = 5  # passes over a rollout
    minibatches: int = 4  # gradient steps in a pass
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # how far advantages look past the critic
    recall: int = 1  # how many of its own last actions an agent sees (discrete actions)
    min_std: float = 0.0  # the smallest spread of continuous actions: teams to be recorded with noise should know it
    normalize: bool = False  # feed views and states in units of their own running mean and spread
    clip: float = 0.2  # how far an action's probability may move in an update, as a ratio
    entropy: float = 0.01  # weight of the entropy bonus
    # --- the optimisation
    hidden: int = 128  # units per hidden layer
    layers: int = 2  # hidden layers
    lr: float = 5e-4  # Adam's step size
    max_grad_norm: float = 10.0  # longest gradient of one seed's actor or critic
    huber: float = 10.0  # the critic's errors beyond this many standard deviations count linearly


# ---------------------------------------------------------------- data
class Rollout(NamedTuple):
    """L steps of B games of each seed, as they were played."""

    x: torch.Tensor  # (S, L, B, N, I) what the actors saw
    avail: torch.Tensor  # (S, L, B, N, A) bool, the available actions; (S, L, B, N, 0) where actions are continuous
    action: torch.Tensor  # (S, L, B, N) int64, or (S, L, B, N, A)
    log_prob: torch.Tensor  # (S, L, B, N) of the policy that played
    state: torch.Tensor  # (S, L, B, D)
    next_state: torch.Tensor  # (S, L, B, D) in which the step ended, before any restart
    reward: torch.Tensor  # (S, L, B)
    terminated: torch.Tensor  # (S, L, B) bool: the game ended by its own rules with this step
    truncated: torch.Tensor  # (S, L, B) bool: it was cut off


class Batch(NamedTuple):
    """Steps to learn from, for each seed: the M = L B steps of a rollout, or the m of a minibatch."""

    x: torch.Tensor  # (S, M, N, I)
    avail: torch.Tensor  # (S, M, N, A) bool, or (S, M, N, 0)
    action: torch.Tensor  # (S, M, N) int64, or (S, M, N, A)
    log_prob: torch.Tensor  # (S, M, N)
    alive: torch.Tensor  # (S, M, N) 1 for agents that had a choice
    state: torch.Tensor  # (S, M, D)
    advantage: torch.Tensor  # (S, M)
    returns: torch.Tensor  # (S, M), in standard deviations from the mean


def draw_orders(generators, steps, args):
    """In which order an update goes over the M steps of a rollout, each time anew: (epochs, S, M)."""
    draws = [[torch.randperm(steps, generator=g, device=g.device) for g in generators] for _ in range(args.epochs)]
    return torch.stack([torch.stack(epoch) for epoch in draws])


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """S independent linear layers as one batched product; seed s is initialised by its own generator."""

    def __init__(self, inputs, outputs, gain, generators):
        super().__init__()
        start = [nn.init.orthogonal_(torch.empty(inputs, outputs), gain, generator=g) for g in generators]
        self.weight = nn.Parameter(torch.stack(start))  # (S, in, out)
        self.bias = nn.Parameter(torch.zeros(len(start), 1, outputs))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (S, B, out)


def mlp(inputs, outputs, gain, args, generators):
    """A ReLU network for each seed: (S, B, inputs) -> (S, B, outputs); `gain` scales the last layer's weights."""
    sizes = [inputs] + [args.hidden] * args.layers
    body = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o, 2**0.5, generators), nn.ReLU(True))]
    return nn.Sequential(*body, Linear(sizes[-1], outputs, gain, generators))


class Scale(nn.Module):
    """With --normalize, inputs in units of the mean and the standard deviation of all that each seed has seen."""

    def __init__(self, inputs, seeds, on=True):
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
    """One policy for all agents of a team, for S seeds. The small last layer makes the first policy almost uniform."""

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
        """(S, B, N, I), (S, B, N, A or 0) -> log-probabilities of all actions, or the mean action: (S, B, N, A)."""
        out = self.body(self.scale(x.flatten(1, 2))).unflatten(1, x.shape[1:3])
        return F.log_softmax(out.masked_fill(~avail, ILLEGAL), -1) if self.discrete else out.tanh()

    def log_prob(self, out, action):
        """Log-probability of actions, (S, B, N), and the policy's entropy, (S, B, N) or (S, 1, 1); `out` as above."""
        if self.discrete:
            return out.gather(-1, action[..., None])[..., 0], -(out.exp() * out).sum(-1)
        log_std = self.log_std[:, None]  # (S, 1, 1, A)
        log_density = -0.5 * ((action - out) / log_std.exp()) ** 2 - log_std - HALF_LOG_2PI
        return log_density.sum(-1), (log_std + 0.5 + HALF_LOG_2PI).sum(-1)

    def noise(self, generators, *shape):
        """What makes `sample` random, (S, *shape, A): Gumbel or normal noise, each seed's from its own generator."""
        draw = torch.Tensor.exponential_ if self.discrete else torch.Tensor.normal_
        noise = torch.stack([draw(torch.empty(*shape, self.outputs, device=g.device), generator=g) for g in generators])
        return -noise.clamp(min=1e-30).log() if self.discrete else noise

    def sample(self, out, noise):
        """Actions drawn from the policy, (S, B, N) or (S, B, N, A); where the noise is 0, its most likely ones."""
        if self.discrete:  # where log pi and Gumbel noise have their largest sum is a draw from pi
            return (out + noise).argmax(-1)
        return out + self.log_std[:, None].exp() * noise


class Team(nn.Module):
    """All that S teams learn, and the running mean and spread of the returns that each critic predicts."""

    def __init__(self, N, A, obs_dim, state_dim, discrete, args, generators):
        super().__init__()
        S, inputs = len(generators), obs_dim + args.recall * A * discrete + N
        self.actor = Actor(inputs, A, discrete, args, generators)
        self.critic = nn.Sequential(Scale(state_dim, S, args.normalize), *mlp(state_dim, 1, 1.0, args, generators))
        self.register_buffer("moments", torch.zeros(3, S, 1))  # decaying means of 1, R and R^2, which begin at 0

    def scale(self):
        """Mean and standard deviation of the returns, (S, 1) each: 0 and 1 before the first."""
        weight, mean, square = self.moments / self.moments[0].clamp(min=1e-8)
        return mean, torch.where(weight > 0, (square - mean**2).clamp(min=1e-4).sqrt(), 1.0)

    def value(self, state):
        """V(s) in units of the reward, (S, M, D) -> (S, M)."""
        mean, std = self.scale()
        return self.critic(state)[..., 0] * std + mean

    def watch(self, returns, decay=0.99):
        """Move the running mean and spread towards those of `returns` (S, M)."""
        now = torch.stack([torch.ones_like(returns), returns, returns**2]).mean(2, keepdim=True)  # (3, S, 1)
        self.moments.lerp_(now, 1 - decay)


# ---------------------------------------------------------------- playing
def look(obs, last):
    """What an actor gets: its view (S, B, N, O), last actions (S, B, N, recall A) and number -> (S, B, N, I)."""
    number = torch.eye(obs.shape[2], dtype=obs.dtype, device=obs.device).expand(*obs.shape[:2], -1, -1)
    return torch.cat([obs, last, number], -1)


@torch.no_grad()
def act(actor, obs, last, avail, noise):
    """A step of play, with `noise` (S, B, N, A) or, if it is 0, greedily.

    Returns the inputs x (S, B, N, I), the actions, their log-probability (S, B, N), and everybody's last actions as
    one-hot vectors (S, B, N, recall A), the newest first.
    """
    x = look(obs, last)
    out = actor(x, avail)
    action = actor.sample(out, noise)
    if actor.discrete:  # otherwise they are (S, B, N, 0)
        last = torch.cat([F.one_hot(action, actor.outputs).to(last.dtype), last], -1)[..., : last.shape[-1]]
    return x, action, actor.log_prob(out, action)[0], last


# ---------------------------------------------------------------- estimates
def gae(reward, terminated, truncated, value, next_value, gamma, lam):
    """The advantages A_t, all (S, L, B); next_value[:, t] is V of the state in which step t ended, before a restart."""
    delta = reward + gamma * next_value * ~terminated - value
    carry = gamma * lam * ~(terminated | truncated)
    advantage, later = torch.empty_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        advantage[:, t] = later = delta[:, t] + carry[:, t] * later
    return advantage


@torch.no_grad()
def estimate(team, rollout, args):
    """What a rollout teaches, a `Batch`; the returns move the running mean and spread in which they are measured."""
    x, avail, action, log_prob, state, next_state, reward, terminated, truncated = rollout
    value, next_value = (team.value(s.flatten(1, 2)).view_as(reward) for s in (state, next_state))  # (S, L, B)
    advantage = gae(reward, terminated, truncated, value, next_value, args.gamma, args.gae_lambda)
    team.watch((advantage + value).flatten(1))
    mean, std = team.scale()
    returns = ((advantage + value).flatten(1) - mean) / std
    alive = avail[..., 1:].any(-1).to(x.dtype) if team.actor.discrete else torch.ones_like(log_prob)

    # Every living agent counts once in the mean and the spread of the advantages.
    weight = alive.sum(-1) / alive.sum((1, 2, 3), keepdim=True)[..., 0].clamp(min=1)  # (S, L, B)
    advantage = advantage - (weight * advantage).sum((1, 2), keepdim=True)
    advantage = advantage / ((weight * advantage**2).sum((1, 2), keepdim=True).sqrt() + 1e-5)
    rest = (each.flatten(1, 2) for each in (x, avail, action, log_prob, alive, state, advantage))
    return Batch(*rest, returns)


# ---------------------------------------------------------------- losses
def ppo_loss(actor, critic, batch, clip, huber):
    """For each seed, all (S,): L(pi) without its entropy, L(V), the entropy, and KL(pi_played || pi), an estimate."""
    out = actor(batch.x, batch.avail)
    log_prob, entropy = actor.log_prob(out, batch.action)
    log_ratio, advantage = log_prob - batch.log_prob, batch.advantage[..., None]  # (S, M, N), (S, M, 1)
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    weight = batch.alive / batch.alive.sum((1, 2), keepdim=True).clamp(min=1)  # of each agent and step, sum 1
    value = critic(batch.state)[..., 0]  # (S, M)
    value_loss = F.huber_loss(value, batch.returns, reduction="none", delta=huber).mean(1)
    kl = (weight * (ratio - 1 - log_ratio)).sum((1, 2))
    return -(weight * gain).sum((1, 2)), value_loss, (weight * entropy).sum((1, 2)), kl


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
        how |= dict(lr=self.lr, beta1=0.9, beta2=0.999, eps=1e-5, weight_decay=0.0)  # eps is the authors'
        gradients = [gradient.contiguous() for gradient in gradients]  # fused on a CPU, it takes strides for granted
        adam_step(self.moved, gradients, *state, **how)


def limit_norm(gradients, longest):
    """The gradients of one network, those of each seed scaled down to the length `longest` if they are longer."""
    length = sum((grad**2).sum((1, 2)) for grad in gradients).sqrt()  # (S,)
    factor = (longest / length.clamp(min=longest))[:, None, None]
    return [grad * factor for grad in gradients]


def minibatch(team, adam, batch, pick, args):
    """One gradient step of all seeds on the steps `pick` (S, m) of the batch; returns diagnostics, {name: (S,)}."""
    seed = torch.arange(len(pick), device=pick.device)[:, None]
    part = Batch(*(each[seed, pick] for each in batch))
    policy_loss, value_loss, entropy, kl = ppo_loss(team.actor, team.critic, part, args.clip, args.huber)
    # The sum over seeds leaves each seed the gradient that it would have alone.
    loss = (policy_loss - args.entropy * entropy + value_loss).sum()
    gradients, n = torch.autograd.grad(loss, adam.moved), len(list(team.actor.parameters()))
    adam.step(limit_norm(gradients[:n], args.max_grad_norm) + limit_norm(gradients[n:], args.max_grad_norm))
    logs = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "kl": kl}
    return {name: value.detach() for name, value in logs.items()}


def update(team, adam, rollout, orders, args, estimate=estimate, minibatch=minibatch):
    """Learn from a rollout, in minibatches, in these orders (epochs, S, M); returns the diagnostics of the last one.
    `estimate` and `minibatch` can be given in compiled form."""
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
if (HOME / "data" / "runs.py").exists() and (HOME / "envs" / "play.py").exists():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    import envs
    from data import behaviours, runs
    from envs.play import play
elif __name__ == "__main__":
    sys.exit("error: this file runs inside its repository, beside data/ and envs/; alone, it is to be imported")


def preset(args):
    """The first task of the environment, where no flag names one; and sizes for games that are not ours, and slow."""
    slow = dict(num_envs=8, rollout=128, steps=100_000, eval_every=20_000, eval_episodes=10, normalize=True)
    return (slow if ":" in args.env else {}) | dict(env=args.env, task=args.task or envs.TASKS.get(args.env, ("",))[0])


class Games:
    """B games of each seed in one environment, and what the actors see of them."""

    def __init__(self, args, num_envs, device):
        self.shape, self.recall = (args.num_seeds, num_envs), args.recall
        self.env = env = runs.game(args, args.num_seeds * num_envs, device)
        self.restart(0)
        discrete = self.avail.shape[-1] > 0
        self.sizes = env.num_agents, env.num_actions, env.obs_dim, env.state_dim, discrete  # as a `Team` takes them

    def see(self, obs, info):
        """Take in what the environment gives, with an axis for the seeds: obs (S, B, N, O), state (S, B, D), avail
        (S, B, N, A), or (S, B, N, 0) where actions are continuous."""
        seen = obs, info["state"], info.get("avail_actions", obs[..., :0].bool())
        obs, state, self.avail = (x.unflatten(0, self.shape) for x in seen)
        self.obs, self.state = (x.to(torch.get_default_dtype()) for x in (obs, state))

    def restart(self, seed):
        """Start all games anew; `seed` fixes all that the environment draws until the next restart."""
        self.see(*self.env.reset(seed=seed % 2**31))
        self.last = self.obs.new_zeros(*self.obs.shape[:3], self.recall * self.avail.shape[-1])

    def restart_finished(self, over):
        """Start the games `over` (S, B) anew, without last actions."""
        if over.device.type != "cpu" or over.any():  # on a GPU to ask would be to wait
            self.see(*self.env.reset(options={"reset_mask": over.flatten()}))
            self.last = self.last * ~over[..., None, None]

    def step(self, action):
        """Play actions (S, B, N) or (S, B, N, A); returns reward, terminated and truncated, each (S, B)."""
        obs, reward, terminated, truncated, info = self.env.step(together(action))
        self.see(obs, info)
        return (x.unflatten(0, self.shape) for x in (reward.to(self.obs.dtype), terminated, truncated))


def together(action):
    """Actions of all seeds as an environment takes them: (S, B, N) -> (S B, N), or continuous ones, clipped."""
    action = action.flatten(0, 1)
    return action.clamp(-1, 1).float() if action.is_floating_point() else action


@torch.no_grad()
def roll_out(games, team, generators, args, act=act):
    """Go on with all games for L steps: a `Rollout`. `act` can be given in compiled form."""
    noise, steps = team.actor.noise(generators, args.rollout, *games.obs.shape[1:3]), []
    for t in range(args.rollout):
        avail, state = games.avail, games.state
        x, action, log_prob, games.last = act(team.actor, games.obs, games.last, avail, noise[:, t])
        reward, terminated, truncated = games.step(action)
        steps.append((x, avail, action, log_prob, state, games.state, reward, terminated, truncated))
        games.restart_finished(terminated | truncated)
    return Rollout(*(torch.stack(each, 1) for each in zip(*steps)))


@torch.no_grad()
def evaluate(team, args, step, episodes, device):
    """Play the greedy and the sampled team of every seed, all in one batch of games.

    Returns {"return", "sampled_return"} and, where games can be won, {"win_rate", "sampled_win_rate"}: (S, E) each.
    """
    if not episodes:
        return {}
    S, E, games = args.num_seeds, episodes, Games(args, 2 * episodes, device)
    generators = [runs.stream(args.seed + s, 10 + step, device) for s in range(S)]

    def answer(obs, info, last):
        games.see(obs, info)
        noise = team.actor.noise(generators, E, obs.shape[1])
        noise = torch.cat([torch.zeros_like(noise), noise], 1)  # half of the games are played greedily
        _, action, _, last = act(team.actor, games.obs, last, games.avail, noise)
        return together(action), last

    played = play(games.env, answer, games.last, step % 2**31)
    games.env.close()
    scores = {"return": played.returns, "win_rate": played.won}
    scores = {name: x.view(S, 2, E).double() for name, x in scores.items() if x is not None}
    return {name: x[:, 0] for name, x in scores.items()} | {f"sampled_{name}": x[:, 1] for name, x in scores.items()}


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("mappo", args)
    S, device = args.num_seeds, run.device
    games = Games(args, args.num_envs, device)
    size, limit = args.rollout * args.num_envs, games.env.time_limit  # a seed's steps in an iteration
    if max(1, args.eval_every // size) * args.rollout < limit:  # or no game would ever reach its end
        least = -(-limit // args.rollout) * size
        raise ValueError(f"--eval-every restarts the games: it must be {least} or more, or --num-envs smaller")
    team = Team(*games.sizes, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adam, generators = Adam(team.parameters(), args.lr), [runs.stream(seed, 1, device) for seed in run.seeds]
    graphs = [run.compile(function) for function in (act, estimate, minibatch)]
    if args.compile and hasattr(games.env, "compile"):
        games.env.compile(run.compile)
    run.begin(team=team, adam=adam, generators=generators)

    iterations = -(-args.steps // size)
    logs = {name: torch.zeros(S, device=device) for name in ("policy_loss", "value_loss", "entropy", "kl")}
    for iteration in run.steps(iterations, args.eval_every, size):
        if run.due(logs):
            scores = evaluate(team, args, iteration * size, args.eval_episodes, device)
            scores = {name: value.mean(1) for name, value in scores.items()}
            if args.save_snapshots:
                behaviours.save_snapshots(run, team.actor, scores)
            run.record(logs, scores, f"{S * size * run.speed:7.0f} steps/s")
        if iteration < iterations:
            if run.scheduled():  # the next games depend on the iteration only, so a resumed run plays the same ones
                games.restart(1_000_003 * args.seed + iteration + 1)
            rollout = roll_out(games, team, generators, args, graphs[0])
            orders = draw_orders(generators, size, args)
            logs = update(team, adam, rollout, orders, args, *graphs[1:])

    scores = evaluate(team, args, iterations * size, 10 * args.eval_episodes, device)
    if args.save_snapshots:
        behaviours.keep_behaviours(run)

    def answer(obs, avail, last):
        avail = obs[..., :0].bool() if avail is None else avail
        _, action, _, last = act(team.actor, obs.to(last.dtype), last, avail, 0)
        return action if team.actor.discrete else action.clamp(-1, 1).float(), last

    N, A, O, _, discrete = games.sizes
    run.keep_team(answer, (N, O), A * discrete, args.recall * A * discrete, team.actor)
    more = {"env_steps_per_second": S * size * run.speed}
    return run.finish("MAPPO", scores, best=games.env.best_return, xlabel="environment steps", **more)


def parse(argv=None):
    """Read the command line; where no flag speaks, the values of the resumed run hold."""
    args, zero = runs.parse(Args, preset, argv, __doc__), "seed eval_episodes gamma gae_lambda entropy layers min_std"
    runs.check_numbers(args, may_be_zero=zero, at_most_one="gamma gae_lambda")
    if args.save_snapshots and not args.eval_episodes:
        raise ValueError("--save-snapshots keeps what was evaluated: --eval-episodes must be at least 1")
    if args.minibatches > args.rollout * args.num_envs:
        raise ValueError(f"--minibatches {args.minibatches} of {args.rollout * args.num_envs} steps: choose fewer")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
