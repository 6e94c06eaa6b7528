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
  L(pi)    = -E_i [ min( rho_i A, clip(rho_i, 1 - clip, 1 + clip) A ) ] - entropy E_i [ H(pi(.|o_i)) ]
  L(V)     = E [ Huber( (V(s) - mean) / std, (R - mean) / std ) ]

Commands, and the return you should see (last policy; one CPU core of a small server, torch 2.13):
  python algorithms/mappo.py --env smac --task 3m --steps 300000 --eval-every 50000     32 s of CPU time, one seed:
      98 % of battles won greedily (return 19.8), 70 % by sampling (16.4), and still rising
  python algorithms/mappo.py --env smac --task 5m_vs_6m --steps 2000000                 4.5 minutes of CPU time, one
      seed: 94 % won greedily (19.4), 92 % by sampling (19.3), where no script wins a battle
  python algorithms/mappo.py --env smac --task 3s_vs_5z --recall 4 --num-envs 128 --epochs 10 --lr 1e-3 --gamma 0.97
      --gae-lambda 0.97 --steps 2097152 --eval-every 131072 --eval-episodes 32     10 minutes of CPU time, one seed:
      all battles won, return 21.8; with the defaults (and 64 games) it stood at 12, no battle won, after 2.3 million.
      6h_vs_8z with the same flags and --steps 4063232: 80 % won greedily (19.1), 59 % by sampling (18.0)
  python algorithms/mappo.py --env bridge --steps 500000 --num-seeds 3    71 s of CPU time: greedy -1.2433 (2 of 3
      seeds reach the best possible, -1.2355), sampled -1.2500
  python algorithms/mappo.py --env ant --num-envs 64 --normalize --lr 3e-4 --epochs 10 --entropy 0 --steps 4587520
      --eval-every 131072 --eval-episodes 4     30 minutes of CPU time, one seed: 3,771 by sampling (4 games)
  python algorithms/mappo.py --env matrix --task m-ne --num-seeds 10 --steps 100000 --num-envs 32 --rollout 8
      20, the best, in 10 of 10 seeds; xor 1, the best; but climbing 7 of 11, and penalty 2 of 10: where a mistake of
      one agent is dear, both settle for what is safe

Differences from the authors' code, and choices made here:
  1. The networks have no recurrence. An agent's input is its view, its own last action (--recall: its last few, from
     which it can tell when its weapon is ready) and its number.
  2. The critic sees the state once for the whole team, not once for each agent with that agent's features.
  3. The value loss is not clipped: the Huber loss with delta 10 on normalised returns is the authors' other safeguard.
  4. Dead agents, who may only play action 0, count in no mean of the policy's loss or of the advantages.
  5. A time limit is not the end of the game: the return beyond it is taken from the critic, at the last state seen.
  6. --normalize feeds views and states in units of their running mean and spread, as the authors do; only bodies, whose
     entries differ by orders of magnitude, need it.
  7. 256 games at once and 64 steps of each make a rollout: few large batches suit a simulator made of tensors.
  8. Continuous actions are normal with mean tanh(.), so that the mean is always an action that can be played, and a
     spread that does not depend on the view. A sample outside [-1, 1] is clipped when played; rho uses the sample.
  9. Every evaluation restarts the games, so that a resumed run needs no record of the simulator's inside. A game that
     was under way is cut off there, as at the end of any rollout.

Seeds differ in all that is random here, but play in one environment: where it is random itself, what it draws for a
seed depends on which seeds run beside it.

Shapes: S seeds, B games of each, L steps of a rollout, M = L B, N agents, A actions (or the size of an agent's action),
O observation, D state, I actor inputs, E episodes of an evaluation.
"""

import functools
import io
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `data` and `envs` stand beside this file's folder
import envs
from data import runs

ILLEGAL = -1e10  # the logit of an action that is not available
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "smac"  # the environment
    task: str = ""  # its task; by default the environment's first
    options: str = ""  # more for the environment, as JSON: '{"limits": {"joint1": [0, 3]}}' turns a joint no further
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 1  # how many seeds train, all at once
    steps: int = 1_000_000  # environment steps of each seed, all its games together; rounded up to whole rollouts
    eval_every: int = 100_000  # environment steps between evaluations; each writes a checkpoint, restarts the games
    eval_episodes: int = 64  # games per seed and evaluation, each played greedily and by sampling
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads; networks this small gain little from more, and lose much on a busy machine
    compile: bool = torch.cuda.is_available()  # compile the loss with torch.compile
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
    lr_decay: bool = False  # let the step size fall linearly to 0
    max_grad_norm: float = 10.0  # longest gradient of one seed's actor or critic
    huber: float = 10.0  # the critic's errors beyond this many standard deviations count linearly

    @property
    def dataset(self):  # this script has none; its folder is named after env and task
        return ""


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
    body = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o, 2**0.5, generators), nn.ReLU())]
    return nn.Sequential(*body, Linear(sizes[-1], outputs, gain, generators))


class Scale(nn.Module):
    """Inputs in units of the mean and the standard deviation of all that each seed has seen; at first unchanged."""

    def __init__(self, inputs, seeds):
        super().__init__()
        self.register_buffer("seen", torch.zeros(seeds, 1, 1))
        self.register_buffer("mean", torch.zeros(seeds, 1, inputs))
        self.register_buffer("var", torch.ones(seeds, 1, inputs))

    def forward(self, x):
        return (x - self.mean) / self.var.clamp(min=1e-4).sqrt()  # (S, B, inputs)

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
        self.scale = Scale(inputs, len(generators))
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
        """(S, B, N, I), (S, B, N, A) or None -> log-probabilities of all actions, or the mean action: (S, B, N, A)."""
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
        """What `sample` needs to be random, (S, *shape, A); each seed's from its own generator."""
        blank = (torch.empty(*shape, self.outputs, device=g.device) for g in generators)
        if self.discrete:
            return torch.stack([x.exponential_(generator=g) for x, g in zip(blank, generators)]).clamp(min=1e-30)
        return torch.stack([x.normal_(generator=g) for x, g in zip(blank, generators)])

    def sample(self, out, noise):
        """Actions drawn from the policy, (S, B, N) or (S, B, N, A); without noise (None) its most likely ones."""
        if self.discrete:  # which exponential clock rings first is a draw from pi
            return (out if noise is None else out - noise.log()).argmax(-1)
        return out if noise is None else out + self.log_std[:, None].exp() * noise


class Team(nn.Module):
    """All that S teams learn, and the running mean and spread of the returns that each critic predicts."""

    def __init__(self, game, discrete, args, generators):
        super().__init__()
        N, A, S = game.num_agents, game.num_actions, len(generators)
        self.actor = Actor(game.obs_dim + args.recall * A * discrete + N, A, discrete, args, generators)
        self.critic = nn.Sequential(Scale(game.state_dim, S), *mlp(game.state_dim, 1, 1.0, args, generators))
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
class Games:
    """B games of each seed in one environment, and what the actors see of them."""

    def __init__(self, args, num_envs, device):
        options = json.loads(args.options or "{}")
        try:
            self.env = envs.make(args.env, args.task, num_envs=args.num_seeds * num_envs, device=device, **options)
        except TypeError as error:
            raise ValueError(f"{args.env} does not take --options {args.options}: {error}") from None
        self.shape, self.dtype = (args.num_seeds, num_envs), torch.get_default_dtype()
        self.agent = torch.eye(self.env.num_agents, device=device, dtype=self.dtype)
        self.recall = args.recall * self.env.num_actions
        self.restart(0)
        self.discrete = "avail_actions" in self.info

    def restart(self, seed):
        """Start all games anew; `seed` fixes all that the environment draws until the next restart."""
        self.obs, self.info = self.env.reset(seed=seed % 2**31)
        # Everybody's last actions as one-hot vectors, the newest first: (S B, N, recall A).
        self.last = torch.zeros(*self.obs.shape[:2], self.recall, device=self.obs.device, dtype=self.dtype)

    def view(self):
        """What the actor needs: its input (S, B, N, I) and the available actions (S, B, N, A), or None."""
        parts, avail = [self.obs.to(self.dtype), self.agent.expand(len(self.obs), -1, -1)], None
        if self.discrete:
            avail = self.info["avail_actions"]
            parts.insert(1, self.last)
            avail = avail.unflatten(0, self.shape)
        return torch.cat(parts, -1).unflatten(0, self.shape), avail

    def state(self):
        return self.info["state"].to(self.dtype).unflatten(0, self.shape)  # (S, B, D)

    def step(self, action):
        """Play actions (S, B, N) or (S, B, N, A); returns reward, terminated and truncated, each (S, B)."""
        action = action.flatten(0, 1)
        if self.discrete:
            newest = F.one_hot(action, self.env.num_actions).to(self.dtype)
            self.last = torch.cat([newest, self.last], -1)[..., : self.recall]
        else:
            action = action.clamp(-1, 1).float()
        self.obs, reward, terminated, truncated, self.info = self.env.step(action)
        return (x.unflatten(0, self.shape) for x in (reward.to(self.dtype), terminated, truncated))

    def restart_finished(self, over):
        """Start the games `over` (S, B) anew."""
        if over.any():
            over = over.flatten()
            self.obs, self.info = self.env.reset(options={"reset_mask": over})
            if self.discrete:
                self.last = self.last * ~over[:, None, None]


class Batch(NamedTuple):
    """Steps to learn from, for each seed: M of them, or those of a minibatch."""

    x: torch.Tensor  # (S, M, N, I) the actor's input
    avail: torch.Tensor  # (S, M, N, A) bool; without it (continuous actions) an empty tensor
    action: torch.Tensor  # (S, M, N) int64 or (S, M, N, A)
    log_prob: torch.Tensor  # (S, M, N) when it was played
    alive: torch.Tensor  # (S, M, N) 1 for agents that had a choice
    state: torch.Tensor  # (S, M, D)
    advantage: torch.Tensor  # (S, M)
    returns: torch.Tensor  # (S, M), in standard deviations from the mean


def gae(reward, terminated, truncated, value, next_value, gamma, lam):
    """The advantages A_t of generalised advantage estimation; all are (S, L, B).

    next_value[:, t] is V of the state in which step t ended, before any restart.
    """
    delta = reward + gamma * next_value * ~terminated - value
    carry = gamma * lam * ~(terminated | truncated)
    advantage, later = torch.empty_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        advantage[:, t] = later = delta[:, t] + carry[:, t] * later
    return advantage


@torch.no_grad()
def play(games, team, generators, args):
    """Go on with all games for L steps, and return what to learn from them, a `Batch` of M = L B steps."""
    noise = team.actor.noise(generators, args.rollout, games.shape[1], games.env.num_agents)
    steps = []
    for t in range(args.rollout):
        x, avail = games.view()
        state, out = games.state(), team.actor(x, avail)
        action = team.actor.sample(out, noise[:, t])
        log_prob, _ = team.actor.log_prob(out, action)
        reward, terminated, truncated = games.step(action)
        kept = (x.new_empty(*games.shape, 0) if avail is None else avail, action, log_prob, state, games.state())
        steps.append((x, *kept, reward, terminated, truncated))
        games.restart_finished(terminated | truncated)
    x, avail, action, log_prob, state, next_state, reward, terminated, truncated = (
        torch.stack(each, 1) for each in zip(*steps)
    )  # (S, L, B, ...)
    shape = reward.shape
    value, next_value = (team.value(s.flatten(1, 2)).view(shape) for s in (state, next_state))
    advantage = gae(reward, terminated, truncated, value, next_value, args.gamma, args.gae_lambda)
    team.watch((advantage + value).flatten(1))
    mean, std = team.scale()
    returns = ((advantage + value).flatten(1) - mean) / std
    alive = avail[..., 1:].any(-1).to(x.dtype) if games.discrete else torch.ones_like(log_prob)

    # Every living agent counts once in the mean and the spread of the advantages.
    weight = alive.sum(-1) / alive.sum((1, 2, 3), keepdim=True)[..., 0].clamp(min=1)  # (S, L, B)
    advantage = advantage - (weight * advantage).sum((1, 2), keepdim=True)
    advantage = advantage / ((weight * advantage**2).sum((1, 2), keepdim=True).sqrt() + 1e-5)
    rest = (each.flatten(1, 2) for each in (x, avail, action, log_prob, alive, state, advantage))
    return Batch(*rest, returns)


# ---------------------------------------------------------------- update
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


def limit_norm(network, longest):
    """Scale the gradient of each seed's network down to the length `longest`, if it is longer."""
    grads = [parameter.grad for parameter in network.parameters()]
    length = sum((grad**2).sum((1, 2)) for grad in grads).sqrt()  # (S,)
    factor = (longest / length.clamp(min=longest))[:, None, None]
    for grad in grads:
        grad.mul_(factor)


def update(team, adam, loss, batch, generators, args):
    """Go over the rollout `epochs` times; returns diagnostics of the last minibatch, a dictionary of (S,) tensors."""
    S, M = batch.returns.shape
    seed = torch.arange(S, device=batch.returns.device)[:, None]
    for _ in range(args.epochs):
        order = torch.stack([torch.randperm(M, generator=g, device=g.device) for g in generators])  # (S, M)
        for pick in order.chunk(args.minibatches, 1):
            part = Batch(*(each[seed, pick] for each in batch))
            policy_loss, value_loss, entropy, kl = loss(team.actor, team.critic, part, args.clip, args.huber)
            adam.zero_grad()
            # The sum over seeds leaves each seed the gradient that it would have alone.
            (policy_loss - args.entropy * entropy + value_loss).sum().backward()
            limit_norm(team.actor, args.max_grad_norm)
            limit_norm(team.critic, args.max_grad_norm)
            adam.step()
    if args.normalize:  # only now, so that the first rho of an update was 1
        team.actor.scale.watch(batch.x.flatten(1, 2))
        team.critic[0].watch(batch.state)
    logs = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "kl": kl}
    return {name: value.detach() for name, value in logs.items()}


# ---------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(team, args, seed, episodes, device):
    """Play the greedy and the sampled team of every seed, all in one batch of games.

    Returns {"return", "sampled_return"} and, where games can be won, {"win_rate", "sampled_win_rate"}: (S, E) each.
    """
    E = episodes
    games = Games(args, 2 * E, device)
    games.restart(seed)
    generators = [runs.stream(args.seed + s, 10 + seed, device) for s in range(args.num_seeds)]
    total = torch.zeros(games.shape, device=device, dtype=torch.float64)
    for _ in range(games.env.time_limit):
        out = team.actor(*games.view())
        noise = team.actor.noise(generators, E, games.env.num_agents)
        greedy, sampled = team.actor.sample(out[:, :E], None), team.actor.sample(out[:, E:], noise)
        reward, terminated, truncated = games.step(torch.cat([greedy, sampled], 1))
        total += reward
        if (terminated | truncated).all():
            break
    scores = {"return": total[:, :E], "sampled_return": total[:, E:]}
    if "won" in games.info:
        won = games.info["won"].unflatten(0, games.shape).double()
        scores |= {"win_rate": won[:, :E], "sampled_win_rate": won[:, E:]}
    return scores


def save_snapshots(folder, team, rows, args, commit):
    """Write each seed's actor as OUT/snapshots/STEP-seedSEED.npz, with what this evaluation measured (`rows`).

    float16, as `x @ weight0 + bias0`, ReLU, and so on; for continuous actions tanh at the end, and `log_std`.
    """
    (folder / "snapshots").mkdir(exist_ok=True)
    layers = [layer for layer in team.actor.body if isinstance(layer, Linear)]
    for s, row in enumerate(rows):
        arrays = {f"weight{k}": layer.weight[s] for k, layer in enumerate(layers)}
        arrays |= {f"bias{k}": layer.bias[s, 0] for k, layer in enumerate(layers)}
        spread = team.actor.scale.var[s].clamp(min=1e-4).sqrt()  # the first layer takes the inputs as they are
        arrays["bias0"] = arrays["bias0"] - (team.actor.scale.mean[s] / spread @ arrays["weight0"])[0]
        arrays["weight0"] = arrays["weight0"] / spread.T
        if not team.actor.discrete:
            arrays["log_std"] = team.actor.log_std[s, 0]
        info = {
            "env": args.env, "task": args.task, "seed": row["seed"], "steps": row["step"],
            "inputs": ["obs", "last_action", "agent_id"] if team.actor.discrete else ["obs", "agent_id"],
            "recall": args.recall, "activation": "relu", "output": "logits" if team.actor.discrete else "tanh",
        }  # fmt: skip
        info |= {name: row.get(name) for name in ("return", "sampled_return", "win_rate", "sampled_win_rate")}
        info |= {"eval_episodes": args.eval_episodes, "script": "mappo", "git_commit": commit}
        content = io.BytesIO()
        arrays = {name: value.detach().half().cpu().numpy() for name, value in arrays.items()}
        np.savez_compressed(content, info=np.array(json.dumps(info)), **arrays)
        runs.save(folder / "snapshots" / f"{row['step']}-seed{row['seed']}.npz", content.getvalue())


def choose_behaviours(rows):
    """Which evaluations of one seed become behaviour teams: {file name: step}.

    The expert is the last policy. Medium is the earlier one that wins, by sampling, most nearly half as often; where
    the expert never wins, the one whose return has come most nearly half of the way. The replay teams are up to ten,
    evenly spaced from the first policy to medium.
    """
    half = (rows[0]["sampled_return"] + rows[-1]["sampled_return"]) / 2
    score = "sampled_return"
    if rows[-1].get("sampled_win_rate"):
        score, half = "sampled_win_rate", rows[-1]["sampled_win_rate"] / 2
    medium = min(range(len(rows) - 1), key=lambda k: abs(rows[k][score] - half))
    count = min(10, medium + 1)
    replay = [round(k * medium / max(1, count - 1)) for k in range(count)]
    teams = {"expert": -1, "medium": medium} | {f"replay-{k}": place for k, place in enumerate(replay)}
    return {f"{name}.npz": rows[place]["step"] for name, place in teams.items()}


def report(folder, args, team, best, rows, updates, seconds, wall, device):
    """Evaluate the last policies on ten times as many games; write summary.json and the pictures, print the table."""
    S = args.num_seeds
    scores = evaluate(team, args, rows[-1]["step"], 10 * args.eval_episodes, device)
    summary = {"script": "mappo", "env": args.env, "task": args.task, "dataset": None, "steps": rows[-1]["step"]}
    summary |= {"seeds": list(range(args.seed, args.seed + S)), "normalized_return": None}
    summary |= {"win_rate": None, "sampled_win_rate": None} | {k: runs.over_seeds(v) for k, v in scores.items()}
    summary |= {
        "best_return": best, "updates_per_second": updates / seconds, "wall_seconds": time.perf_counter() - wall,
        "env_steps_per_second": S * summary["steps"] / seconds, "device": runs.device_name(device),
    }  # fmt: skip
    runs.save_json(folder / "summary.json", summary)
    title = f"MAPPO on {runs.slug(args.env, args.task)}, {S} seed{'s' * (S > 1)}"
    print(f"\n{title}: {folder}")
    for score in ("return", "win_rate") if "win_rate" in scores else ("return",):
        columns, name = {score: "greedy", f"sampled_{score}": "sampled"}, score.replace("_", " ")
        levels = {"best possible": best} if score == "return" and best is not None else {}
        figure = runs.draw_curves(rows, columns, levels, title, "environment steps", name)
        runs.save_figure(folder / ("curve.png" if score == "return" else f"{score}.png"), figure)
        runs.print_table(("greedy", "sampled"), {"MAPPO": [summary[column] for column in columns]}, levels, name)
    if args.save_snapshots:
        (folder / "behaviour").mkdir(exist_ok=True)
        for name, step in choose_behaviours([row for row in rows if row["seed"] == args.seed]).items():
            source = folder / "snapshots" / f"{step}-seed{args.seed}.npz"
            runs.save(folder / "behaviour" / name, source.read_bytes())
            print(f"behaviour/{name}: the policy of seed {args.seed} after {step} steps")
    return summary


# ---------------------------------------------------------------- main
def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    wall = time.perf_counter()
    torch.set_num_threads(args.threads)
    device = runs.choose_device(args.device)
    games = Games(args, args.num_envs, device)
    least = args.num_envs * games.env.time_limit
    if args.eval_every < least:  # or no game would ever reach its end
        raise ValueError(f"--eval-every restarts the games: it must be {least} or more, or --num-envs smaller")
    S, seeds = args.num_seeds, range(args.seed, args.seed + args.num_seeds)
    team = Team(games.env, games.discrete, args, [runs.stream(seed, 0) for seed in seeds]).to(device)
    adam = torch.optim.Adam([*team.parameters()], args.lr, eps=1e-5, fused=True)
    loss = runs.compiler(args.compile, device)(ppo_loss)
    generators = [runs.stream(seed, 1, device) for seed in seeds]
    size = args.rollout * args.num_envs  # environment steps of a seed in one iteration
    iterations, iteration, rows, seconds = -(-args.steps // size), 0, [], 0.0

    tracker = runs.start_tracking("mappo", args) if args.track else None
    folder, commit = runs.open_folder("mappo", args, device), runs.provenance(device)["git_commit"]
    saved = runs.load_checkpoint(folder, device) if args.resume else None
    if saved:
        try:
            team.load_state_dict(saved["team"])
            adam.load_state_dict(saved["adam"])
            for generator, state in zip(generators, saved["generators"], strict=True):
                generator.set_state(state.cpu())
            iteration, rows, seconds = saved["iteration"], saved["rows"], saved["seconds"]
            wall -= saved["wall"]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise ValueError(f"{folder}/checkpoint.pt is of another run: delete it to start this one again") from None

    logs = {name: torch.zeros(S, device=device) for name in ("policy_loss", "value_loss", "entropy", "kl")}
    while True:
        step = iteration * size
        due = iteration in (0, iterations) or step // args.eval_every > (step - size) // args.eval_every
        if due and (not rows or rows[-1]["step"] < step):  # a resumed run has this evaluation already
            for name, value in logs.items():
                if not value.isfinite().all():
                    raise FloatingPointError(f"{name} is not finite after {step} steps: try a smaller --lr")
            scores = {
                name: value.mean(1) for name, value in evaluate(team, args, step, args.eval_episodes, device).items()
            }
            columns = {name: value.tolist() for name, value in (logs | scores).items()}
            new = [
                {"step": step, "seed": seed} | {name: value[s] for name, value in columns.items()}
                for s, seed in enumerate(seeds)
            ]
            rows.extend(new)
            if args.save_snapshots:
                save_snapshots(folder, team, new, args, commit)
            runs.save_csv(folder / "metrics.csv", rows)
            runs.save_checkpoint(folder, {
                "team": team.state_dict(), "adam": adam.state_dict(), "iteration": iteration, "rows": rows,
                "generators": [generator.get_state() for generator in generators], "seconds": seconds,
                "wall": time.perf_counter() - wall, "args": asdict(args),
            })  # fmt: skip
            line = "   ".join(f"{name.replace('_', ' ')} {value.mean():8.4f}" for name, value in scores.items())
            print(f"step {step:8d}   {line}   {S * step / max(seconds, 1e-9):7.0f} steps/s", flush=True)
            if tracker:
                tracker.log({name: sum(value) / S for name, value in columns.items()}, step=step)
        if iteration == iterations:
            break
        begin = time.perf_counter()
        if due:  # the next games depend on the iteration's number only, so a resumed run plays the same ones
            games.restart(1_000_003 * args.seed + iteration + 1)
        if args.lr_decay:
            adam.param_groups[0]["lr"] = args.lr * (1 - iteration / iterations)
        batch = play(games, team, generators, args)
        logs = update(team, adam, loss, batch, generators, args)
        iteration += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - begin
    updates = iterations * args.epochs * args.minibatches
    return report(folder, args, team, games.env.best_return, rows, updates, seconds, wall, device)


def parse(argv=None):
    """Read the command line; where no flag speaks, the values of the resumed run hold."""
    read = functools.partial(tyro.cli, Args, args=argv, description=__doc__.splitlines()[0])
    args = read()
    if args.resume:
        args = read(default=replace(runs.saved_args(Args, args.out_dir), resume=True, out_dir=args.out_dir))
    elif args.env in envs.TASKS:
        args.task = args.task or envs.TASKS[args.env][0]
    runs.check_numbers(args, may_be_zero="seed gamma gae_lambda entropy layers min_std", at_most_one="gamma gae_lambda")
    try:
        usable = isinstance(json.loads(args.options or "{}"), dict)
    except json.JSONDecodeError:
        usable = False
    if not usable:
        raise ValueError(f"--options must be a JSON dictionary, not {args.options!r}")
    if args.minibatches > args.rollout * args.num_envs:
        raise ValueError(f"--minibatches {args.minibatches} of {args.rollout * args.num_envs} steps: choose fewer")
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
