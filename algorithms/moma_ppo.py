"""MOMA-PPO: a team rehearses in a learned world (Barde et al., AAMAS 2024, arXiv 2305.17198).

The problem. N agents learn from a fixed dataset that mixes several ways of working together. What one agent does there
may be a good half of some convention, but the halves of two conventions do not fit, and nothing in the data shows what
happens if they meet. A method that never plays cannot find out.

The idea. Learn a model of the world from the data, and let the team play in it, with an ordinary on-policy method
(MAPPO), for a few steps from recorded situations. Agents that meet in the model can agree on one convention. An
ensemble says where the model is guessing: there the reward is lowered, and beyond a limit the rollout stops.

Equations, by numbers of our own. s is the state, a the joint action, o_i agent i's view, h_i its last views and
actions. Members e = 1..n of the ensemble predict s'_e and r_e; x_e = (s'_e, r_e) in one vector.
 1 ensemble   L_e     = -log N(s'; s'_e, sigma_e) - log N(r; r_e, sigma_e) + BCE(end)
 2            r^      = mean_e r_e,  s^ = s'_e of one member drawn for each step,  end = majority of the members
 3            eps_r   = var_e r_e,   eps_g = | cov_e x_e |_F = | X X^T |_F / (n - 1),   rows of X: x_e - mean_e x_e
 4            r~      = box(r^) - lambda_r min(eps_r, l) - lambda_g min(eps_g, l),  s^ = box(s^)
 5 masks      m       = 0 where the game ended;   zeta = 0 at a rollout's k-th step, or where eps_g >= l
 6 GAE        delta_t = r~_t + gamma m_t V(s_{t+1}) - V(s_t)
 7            A_t     = delta_t + gamma lambda m_t zeta_t A_{t+1}
 8            R_t     = r~_t + gamma m_t [ zeta_t R_{t+1} + (1 - zeta_t) V(s_{t+1}) ]
 9 agents     V       = sum_i w_i(s) V_i(h_i, o_i) + b(s),   log pi = sum_i log pi_i(a_i|h_i, o_i)
10            L(pi)   = -E min( rho A, clip(rho) A ) + E sum max(0, |mean action| - 1)^2 - alpha H, rho = pi / pi_played
11            L(V)    = 1/2 max( E (V - R)^2, E (V_old + clip(V - V_old) - R)^2 )

Commands, and the return you should see (last policy, greedy; one CPU core of a small server, torch 2.13):
  python algorithms/moma_ppo.py                          the coordination game, unfavourable data, 10 seeds at once, 8 s
      of CPU time: 1 in 10 of 10 seeds, and so with --dataset neutral and favourable
  python algorithms/moma_ppo.py --method ibc             the yardstick, each agent clones its own actions, 6 s: 0; on
      neutral data 0.6 +- 0.16, on favourable data 1
  python algorithms/moma_ppo.py --env reacher --task all-observant   two agents share an arm, 3 seeds, 9 minutes:
      normalised 1.01 +- 0.02 (cloning 0.89); --task independent 0.97 +- 0.02 (0.71), leader-only 0.91 +- 0.02 (0.83)
  python algorithms/moma_ppo.py --env ant --dataset medium           four agents share an ant, a leg each, 34 minutes:
      2,700 +- 64 (the data 1,719, cloning 2,332); on full-replay 3,789 +- 45 (2,644; 3,480); --task partial, where
      three of them see their own leg only, 1,212 +- 82 on full-replay (cloning 814)
  ... --world-model runs/moma_ppo/OTHER                              with the model of another run of the same body
  ... --penalty aleatoric | --penalty none | --no-adaptive | --no-box | --horizon 5 | --simulator          ablations

Where the paper and its authors' code disagree the default is the paper's; the flag in brackets gives the code's.
  1. The reward is the ensemble's mean, not one member's (--reward-from member); a game ends by the vote of the members,
     not by the one drawn (--end-by member).
  2. eps_g is compared with its limit before it is capped. In the code it is capped first, so that no rollout ever stops
     for it (--no-adaptive).
  3. In the ant each agent drives the leg it sees (see envs/mamujoco.py).
Other differences from the code, and choices made here:
  4. The model predicts the global state once, not every agent's view of it. eps_g still counts an entry as often as the
     agents see it, and the reward once for each agent, so that lambda_g and the limit keep their meaning.
  5. The model's inputs, actions too, are in units of the data's mean and spread, and it predicts changes in units of
     theirs (--no-normalize: raw numbers and the next state itself). So are the agents' inputs and the critics' returns.
     Where a team hardly varies its actions, a model that sees them raw does not learn what they do. After 400 updates
     on the reacher, the error after 1 and 10 steps, in units of the entries' spread, is 0.01 and 0.10; with the code's
     sizes, step size and raw numbers 0.84 and 1.00.
  6. 10 % of the *episodes* are held out; the members kept are those whose mean prediction errs least on them, with
     states and rewards in units of the spread of what is to be predicted.
  7. A rollout that ends early makes room for a new one, so that an update always sees rollouts x horizon steps. The
     last one may be cut short, which zeta tells.
  8. The policies' entropy and the penalty on actions are exact means, not weighted by rho.
  9. The networks are smaller than the code's (its model: 4 layers of 1,024), and step sizes larger; they fall to 0.
 10. The clip of L(V) is in units of the spread of the data's returns, not of the reward. w(s) and b(s) read the state,
     as the paper writes, not everybody's views.
 11. Policies begin with the spread of the recorded actions, not with 1: beyond it the model only guesses.
 12. The box is half as wide again on either side on the reacher, for rewards below only (--box-margin 0: the paper's).
     There each arm comes from one side, so that a tip that passes its target would be held beside it, and noisy teams
     never waste torque as much as an agent can: agents learn to use both. On the ant V(s_{t+1}) of the model's states
     stays below the best that a recorded rest of an episode was worth, and half of their range (--no-bound-values: the
     paper's): else it may run away where no reward contradicts it.
 13. Bodies rehearse for 25 steps (reacher) or 50 (ant), not for 10: so V matters less, and few updates do. Half of
     the reacher's rollouts begin where an episode did (--first 0: the paper's). Agents have no memory (--memory 10: the
     paper's), which makes an update three times as dear.
 14. The ant's agents first clone the data for 3,000 updates, in which V learns the data's returns (--warmup 0: the
     paper's), and a tenth of their rollouts begin where an episode did (--first 0).
 15. The ant's model draws its next states (--no-sample-states: the code's), for without noise agents look better than
     they are. Whether it fell is told by the predicted s' (--end-from step: the paper's), as a hundred falls do not
     teach which s and a lead to one. Models of bodies are learned with --beta-nll 0.5 (Seitzer et al., ICLR 2022; 0:
     the paper's): where a foot may touch the ground or not sigma is large, and the plain likelihood neglects the mean.
 16. The ant's limit, penalties, --no-adaptive and least entropy are ours: the paper's appendix was out of reach.

Speed (tests/bench.py moma), CPU time on one core of a shared server, one seed on the ant's partial view with memory: an
update of the model 72 ms, 2,000 steps in it 0.27 s, an update of MAPPO (5 epochs) 0.8 s. At the sizes of the authors'
code 1.0 s, 2.1 s and 3.5 s, where theirs takes 1.4 s, 3.1 s and 11.6 s.

Seeds differ in all that is random here, but share the held-out episodes, and are evaluated in one environment.

Shapes: S seeds, N agents, B rollouts or steps of a minibatch, k steps of a rollout, Q = S times the members or times
the agents, n members, A actions (or entries of an action), X = N A, O observation, D state, H steps of memory,
W its width, R rows (observations) of the dataset, E episodes.
"""

import copy
import functools
import io
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

ILLEGAL = -1e10  # the logit of an action that is not available
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
SAMPLE = 2000  # held-out steps, evenly spaced, that stand for all of them


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    method: Literal["moma-ppo", "ibc"] = "moma-ppo"  # rehearse in a model, or clone each agent's recorded actions
    env: str = "matrix"  # the environment: matrix, reacher or ant
    task: str = ""  # its task; by default the coordination game, or the environment's first
    dataset: str = "unfavourable"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 10  # how many seeds train, all at once
    steps: int = 20  # updates: of MAPPO, each with its own rollouts; or of cloning, one minibatch each
    eval_every: int = 5  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 10  # games per seed and evaluation
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # compile the losses with torch.compile
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
    model_lr: float = 3e-3  # Adam's step size
    members: int = 7  # how many models are learned
    elites: int = 5  # how many of them, the best, are kept
    holdout: float = 0.1  # the share of the episodes to judge them by; with 0 by what they learned from
    normalize: bool = True  # inputs in units of the data's mean and spread; the model predicts changes
    # --- act 2, rollouts in it
    simulator: bool = False  # play in the true simulator in place of the model
    rollouts: int = 256  # rollouts at once
    horizon: int = 1  # k, their steps
    first: float = 0.0  # the share of them that begin where an episode did, the others anywhere in one
    penalty: Literal["epistemic", "aleatoric", "none"] = "none"  # what lowers the reward
    reward_penalty: float = 0.05  # lambda_r, weight of eps_r
    state_penalty: float = 0.1  # lambda_g, weight of eps_g
    aleatoric: float = 1.0  # weight of the largest spread that a member predicts, with --penalty aleatoric (MOPO)
    limit: float = 2.0  # l: the most that a penalty counts, and where rollouts stop
    adaptive: bool = True  # stop rollouts where eps_g reaches the limit
    box: bool = True  # clip states and rewards to the range of the data
    box_margin: float = 0.0  # it is wider by this share of itself on either side, for rewards below only
    bound_values: bool = False  # keep V(s') of the model's states from rising far above the data's returns
    reward_from: Literal["mean", "member"] = "mean"  # all members' mean reward, or that of the member drawn
    sample_states: bool = False  # draw the next state from the member's Gaussian in place of its mean
    end_by: Literal["majority", "member"] = "majority"  # all members' vote on the end, or that of the member drawn
    # --- act 2, MAPPO
    warmup: int = 0  # updates of cloning before the first rehearsal, in which the critic learns from the data as well
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.98  # how far advantages look past the critic
    clip: float = 0.2  # how far the joint action's probability, as a ratio, and the value may move in an update
    action_penalty: float = 1.0  # weight of mean actions beyond [-1, 1]
    least_entropy: float = -2.0  # of the joint action: below it, a bonus grows
    epochs: int = 5  # passes over the rollouts
    batch_size: int = 64  # steps in a minibatch
    lr: float = 1e-3  # Adam's step size
    lr_decay: bool = True  # let the step sizes of both acts fall linearly to 0
    max_grad_norm: float = 1.0  # longest gradient of one seed's agents, or of one member of the model
    hidden: int = 64  # units of the two hidden layers of policies, values and mixer
    memory: int = 0  # how many steps an agent remembers; 0 for none
    width: int = 128  # of the memory's attention


def preset(env, task, method):
    """What differs from the coordination game's values, above: sizes that a laptop trains in minutes."""
    if env == "matrix":
        return {} if method == "moma-ppo" else dict(steps=1000, eval_every=250, lr=1e-2)
    body = dict(
        dataset="expert-mix" if env == "reacher" else "full-replay", num_seeds=3, model_steps=3000,
        model_eval_every=500, model_batch=256, model_hidden=200, reward_hidden=200, model_layers=3, model_lr=5e-3,
        beta_nll=0.5, penalty="epistemic", box_margin=0.5, horizon=25, first=0.5, rollouts=80, steps=300, eval_every=50,
        lr=3e-4, batch_size=500, hidden=128, width=32,
    )  # fmt: skip
    if env == "ant":
        body |= dict(
            model_steps=6000, model_hidden=400, end_from="state", box_margin=0.0, bound_values=True, horizon=50,
            first=0.1, limit=60.0, state_penalty=1.5, adaptive=False, sample_states=True, least_entropy=-8.0,
            warmup=3000, steps=100, eval_every=25,
        )  # fmt: skip
        if task == "partial":  # there agents learn more slowly
            body |= dict(steps=150, eval_every=50)
    if method == "ibc":
        body |= dict(steps=5000, eval_every=1000, batch_size=256, lr=3e-4)
    return body


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """Q independent linear layers as one batched product; each is initialised by its own seed's generator."""

    def __init__(self, inputs, outputs, generators, scale=1.0):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        start = [torch.empty(inputs + 1, outputs).uniform_(-bound, bound, generator=g) for g in generators]
        self.weight = nn.Parameter(scale * torch.stack(start)[:, :-1])  # (Q, in, out)
        self.bias = nn.Parameter(torch.stack(start)[:, -1:] * (scale == 1))  # (Q, 1, out); small heads begin at 0

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (Q, B, out)


def mlp(inputs, outputs, hidden, layers, generators, scale=1.0):
    """A ReLU network for each generator: (Q, B, inputs) -> (Q, B, outputs)."""
    sizes = [inputs] + [hidden] * layers
    body = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o, generators), nn.ReLU())]
    return nn.Sequential(*body, Linear(sizes[-1], outputs, generators, scale))


class Guess(NamedTuple):
    """What Q models predict of a step."""

    state: torch.Tensor  # (Q, B, D) the mean of the next state
    state_std: torch.Tensor  # (Q, B, D)
    reward: torch.Tensor  # (Q, B) the mean
    reward_std: torch.Tensor  # (Q, B)
    end: torch.Tensor  # (Q, B) the logit of the game's end


class World(nn.Module):
    """Q models of the world: Gaussians over the next state and the reward, and a probability that the game ends."""

    def __init__(self, data, hidden, reward_hidden, layers, end_from, normalize, generators):
        super().__init__()
        D, X = data.state.shape[-1], data.action[0].numel()
        self.for_state = mlp(D + X, 2 * D, hidden, layers, generators)
        self.for_reward = mlp(D + X, 2, reward_hidden, layers, generators)
        self.end_from_state = end_from == "state"
        self.for_end = mlp(D + X * (not self.end_from_state), 1, reward_hidden, min(2, layers), generators)
        for name, value in data.units(normalize).items():
            self.register_buffer(name, value.clone())  # the data keep their own

    def forward(self, state, action, next_state=None):
        """(Q, B, D), (Q, B, X) -> `Guess`; given the true next states (Q, B, D), these tell whether the game ends."""
        x = torch.cat([(state - self.mean) / self.std, (action - self.action_mean) / self.action_std], -1)
        move, log_std = self.for_state(x).chunk(2, -1)  # (Q, B, D) each
        earned, reward_log_std = self.for_reward(x).unbind(-1)  # (Q, B) each
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
        """A copy with only the models `which` (Q',), which learns no more."""
        chosen = copy.deepcopy(self).requires_grad_(False)
        for parameter in chosen.parameters():
            parameter.data = parameter.data[which]
        return chosen


class Agents(nn.Module):
    """All that S teams learn by rehearsal: N memories, policies and values each, nothing shared, and a mixer.

    In all methods (S, N, B, ...) is laid out as Q = S N networks.
    """

    def __init__(self, data, args, generators):
        super().__init__()
        self.S, (self.N, self.O) = len(generators), data.columns.shape
        self.A, self.discrete, H, W = data.action.shape[-1], data.discrete, args.memory, args.width
        each = [g for g in generators for _ in range(self.N)]
        self.embed = None
        if H:
            self.embed, self.attend = Linear(self.O + self.A, W, each), Linear(W, 3 * W, each)
            self.gain = nn.Parameter(torch.ones(len(each), 1, W))
            self.shift = nn.Parameter(torch.zeros(len(each), 1, W))
            self.judge = nn.Parameter(Linear(W, W, each).weight.detach().clone())  # (Q, W, W), without a bias
            self.wanted = nn.Parameter(torch.stack([torch.randn(1, W, generator=g) for g in each]))  # (Q, 1, W)
            place, half = torch.arange(H)[:, None], torch.arange(0, W, 2)
            angle = place / 10_000 ** (half / W)
            position = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :W]  # (H, W)
            self.register_buffer("position", position.to(torch.get_default_dtype()), persistent=False)
        inputs = self.O + W * bool(H)
        self.policy = mlp(inputs, self.A * (1 if self.discrete else 2), args.hidden, 2, each, scale=0.1)
        self.values = mlp(inputs, 1, args.hidden, 2, each)
        self.mixer = mlp(data.state.shape[-1], self.N + 1, args.hidden, 2, generators)
        for name, value in zip(("return_mean", "return_std"), data.return_units):
            self.register_buffer(name, value.clone())
        self.register_buffer("avail", data.avail, persistent=False)  # (N, A)
        # Actions begin about as far apart as the recorded ones: beyond those the model only guesses.
        spread = data.action[data.start].std(0, correction=0)[:, None]  # (N, 1, A)
        self.register_buffer("log_spread", spread.clamp(min=math.exp(-6), max=1).log(), persistent=False)
        self.register_buffer("alpha", torch.zeros(self.S, device=data.avail.device))  # the price of entropy

    def remember(self, obs, history):
        """An agent's input: its memory of the last H steps, then its view; (Q, B, inputs)."""
        obs = obs.flatten(0, 1)
        if self.embed is None:
            return obs
        Q, (B, H) = len(obs), history.shape[2:4]
        # Embedding and attention, two linear layers in a row, are multiplied into one: a third of the arithmetic. The
        # part that depends on the place only enters as the weights of a one-hot place.
        first, here = self.embed.weight, self.embed.bias + self.position  # (Q, O + A, W), (Q, H, W)
        embed = torch.cat([first, here], 1)
        attend = torch.cat([first @ self.attend.weight, self.attend(here)], 1).chunk(3, -1)
        place = torch.eye(H, dtype=obs.dtype, device=obs.device).expand(Q, B, H, H)
        tokens = torch.cat([history.flatten(0, 1), place], -1).flatten(1, 2)  # (Q, B H, O + A + H)
        x, query, key, value = (torch.bmm(tokens, weight).view(Q, B, H, -1) for weight in (embed, *attend))
        x = x + F.scaled_dot_product_attention(query, key, value)
        x = F.layer_norm(x, x.shape[-1:]).flatten(1, 2) * self.gain + self.shift  # (Q, B H, W)
        score = (torch.bmm(x, self.judge).tanh() * self.wanted).sum(-1).view(Q, B, H)
        memory = (score.softmax(-1)[..., None] * x.view(Q, B, H, -1)).sum(2)  # (Q, B, W)
        return torch.cat([memory, obs], -1)

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
        weight, bias = self.mixer(state).transpose(1, 2).split([self.N, 1], 1)
        return self.return_mean + self.return_std * ((weight * own).sum(1) + bias[:, 0])

    def log_prob(self, out, action):
        """Log-probability and entropy of the team's joint action, (S, B) each; `out` from `act`."""
        if self.discrete:
            return out.gather(-1, action[..., None])[..., 0].sum(1), -(out.exp() * out).sum((1, 3))
        mean, log_std = out.chunk(2, -1)
        density = -0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - HALF_LOG_2PI
        return density.sum((1, 3)), (log_std + 0.5 + HALF_LOG_2PI).sum((1, 3))

    def sample(self, out, noise=None):
        """Draw actions (S, N, B) or (S, N, B, A); without noise the most likely ones."""
        if self.discrete:  # which exponential clock rings first is a draw from pi
            return (out if noise is None else out - noise.log()).argmax(-1)
        mean, log_std = out.chunk(2, -1)
        return mean if noise is None else mean + log_std.exp() * noise

    def noise(self, generators, *shape):
        """What `sample` needs to be random, (S, *shape, A)."""
        blank = (torch.empty(*shape, self.A, device=g.device) for g in generators)
        if self.discrete:
            return torch.stack([x.exponential_(generator=g) for x, g in zip(blank, generators)]).clamp(min=1e-30)
        return torch.stack([x.normal_(generator=g) for x, g in zip(blank, generators)])

    def play(self, action):
        """Actions as the world and the memory see them, (S, N, B, A): one-hot, or clipped."""
        return F.one_hot(action, self.A).to(self.return_std.dtype) if self.discrete else action.clamp(-1, 1)


# ---------------------------------------------------------------- data
class Data:
    """The dataset as R rows, and the columns of its states in which each agent's view is found.

    The state here holds each distinct column of the dataset's states and views once, so that views are made from it
    by picking columns; column D, which it lacks, is the 0 that fills up short views. In the last row of an episode no
    step begins: its action and reward are 0.
    """

    def __init__(self, dataset, args, device):
        dtype, lengths = torch.get_default_dtype(), dataset.lengths
        flat = dataset.flatten(dtype)
        R, N, O = flat["obs"].shape
        self.discrete = flat["avail_actions"] is not None
        everything = torch.cat([flat["state"], flat["obs"].flatten(1)], 1)
        _, group = torch.unique(everything, dim=1, return_inverse=True)
        C = len(group)
        first = torch.full((int(group.max()) + 1,), C, device=device)
        first = first.scatter_reduce(0, group, torch.arange(C, device=device), "amin")
        pad = (first >= C - N * O) & (everything == 0).all(0)[first]  # fills up short views: no part of the world
        order = (first + C * pad).argsort()
        place = order.argsort()[group]  # (C,) where each column went; the padding, if any, is column D
        self.state = everything[:, first[order[: len(order) - int(pad.sum())]]].contiguous()  # (R, D)
        self.columns = place[C - N * O :].view(N, O)
        self.whole = place[: C - N * O]  # where the environment's own state is

        action = flat["actions"]
        if self.discrete:
            avail = flat["avail_actions"]
            if (avail != avail[0]).any():
                raise ValueError(
                    f"in {args.env} the available actions change, which the model does not learn: choose --env matrix"
                )
            self.avail, action = avail[0], F.one_hot(action, avail.shape[-1])
        else:
            self.avail = torch.ones(action.shape[1:], dtype=torch.bool, device=device)
        self.start = flat["row"]  # (M,) the rows where a step begins
        rest = (action, flat["reward"], flat["done"])
        self.action, self.reward, self.done = (
            x.new_zeros(R, *x.shape[1:], dtype=dtype).index_copy_(0, self.start, x.to(dtype)) for x in rest
        )  # (R, N, A), (R,), (R,)
        self.first = begin = (lengths + 1).cumsum(0) - lengths - 1  # (E,) each episode's first row
        episode = torch.arange(len(lengths), device=device).repeat_interleave(lengths + 1)
        self.age = torch.arange(R, device=device) - begin[episode]  # steps since the episode began
        self.left = lengths[episode] - self.age  # and still to come

        # The box, and what errors and inputs are measured in.
        steps = self.start
        self.low, self.high = self.state.amin(0), self.state.amax(0)
        self.reward_low, self.reward_high = self.reward[steps].amin(), self.reward[steps].amax()
        self.mean, self.std = self.state.mean(0), self.state.std(0, correction=0)
        move = self.state[steps + 1] - self.state[steps]
        self.move_mean, self.move_std = move.mean(0), move.std(0, correction=0)
        self.reward_mean, self.reward_std = self.reward[steps].mean(), self.reward[steps].std(correction=0)
        if self.reward_low == self.reward_high:
            print(f"note: every step of {args.dataset} earns {self.reward_low:g}; only the game's end matters")
            self.reward_mean, self.reward_std = self.reward_low.clone(), torch.zeros_like(self.reward_low)
        # How often an entry is seen, and the reward: once by each agent.
        seen = torch.bincount(self.columns.flatten(), minlength=len(self.mean))[: len(self.mean)].to(dtype)
        nothing = (self.low == 0) & (self.high == 0)
        self.weight = torch.cat([seen.masked_fill(nothing, 0), seen.new_full((1,), N)])  # (D + 1,)

        self.scaled = args.normalize
        togo, later = [], torch.zeros_like(dataset.reward[:, 0], dtype=dtype)
        for t in reversed(range(dataset.reward.shape[1])):  # what each step's rest of the episode was worth
            later = (dataset.reward[:, t].to(dtype) + args.gamma * later) * dataset.mask[:, t]
            togo.append(later)
        togo = torch.stack(togo[::-1], 1)[dataset.mask]
        self.togo = torch.zeros_like(self.reward).index_copy_(0, self.start, togo)  # (R,)
        self.value_high = togo.max() + (togo.max() - togo.min()) / 2
        unit = togo.std(correction=0)
        one = torch.ones_like(unit)
        self.return_units = (togo.mean(), torch.where(unit > 1e-6, unit, one)) if args.normalize else (one - 1, one)

        E = len(lengths)
        if args.holdout and E < 2 and args.method == "moma-ppo" and not (args.simulator or args.world_model):
            raise ValueError(
                f"{args.dataset} has one episode, so none can be held out to judge the model by: take more episodes, "
                f"or --holdout 0"
            )
        held = min(E - 1, max(1, round(args.holdout * E))) if args.holdout else 0
        order = torch.randperm(E, generator=runs.stream(0, 4)).to(device)
        out = torch.zeros(E, dtype=torch.bool, device=device).index_fill_(0, order[:held], True)[episode[steps]]
        self.train, self.held = steps[~out], steps[out] if held else steps

    def units(self, normalize):
        """The buffers of a `World`; constant entries get a move of exactly 0."""
        one, zero = torch.ones_like(self.mean), torch.zeros_like(self.mean)
        action = self.action[self.start].flatten(1)  # (M, X)
        spread, middle = torch.std_mean(action, 0, correction=0)
        if not normalize:
            action = {"action_mean": 0 * middle, "action_std": 0 * middle + 1}
            reward = {"reward_mean": zero.sum(), "reward_std": one[0].clone()}
            return {"mean": zero, "std": one, "keep": zero, "move_mean": zero, "move_std": one} | action | reward
        return {
            "mean": self.mean, "std": self.std.clamp(min=1e-3), "keep": one,
            "action_mean": middle, "action_std": spread.clamp(min=1e-3),
            "move_mean": self.move_mean, "move_std": self.move_std,
            "reward_mean": self.reward_mean, "reward_std": self.reward_std,
        }  # fmt: skip

    def normal(self, state):
        """States as the networks see them."""
        return (state - self.mean) / self.std.clamp(min=1e-3) if self.scaled else state

    def view(self, state):
        """What the agents see of states (S, B, ..., D): (S, N, B, ..., O)."""
        return F.pad(self.normal(state), (0, 1))[..., self.columns].movedim(-2, 1)

    def views(self, obs):
        """The same of observations (..., N, O) that the environment gives."""
        mean, std = (F.pad(x, (0, 1))[self.columns] for x in (self.mean, self.std))
        return (obs.to(mean.dtype) - mean) / std.clamp(min=1e-3) if self.scaled else obs.to(mean.dtype)

    def begin(self, rows, memory):
        """States (S, B, D) and histories (S, N, B, H, O + A) with which rollouts begin in the rows (S, B)."""
        past = rows[..., None] + torch.arange(-memory, 0, device=rows.device)  # (S, B, H)
        known = past >= (rows - self.age[rows])[..., None]  # of the same episode
        past = past.clamp(min=0)
        tokens = torch.cat([self.view(self.state[past]), self.action[past].movedim(-2, 1)], -1)
        return self.state[rows], tokens * known[:, None, ..., None]


def push(history, obs, played):
    """Histories (S, N, B, H, O + A) one step later; (S, N, B, O) and (S, N, B, A) become their newest."""
    newest = torch.cat([obs, played], -1)[..., None, :]
    return torch.cat([history, newest], -2)[..., 1:, :] if history.shape[-2] else history


# ---------------------------------------------------------------- act 1: the world model
def model_loss(world, state, action, next_state, reward, end, beta):
    """Eq. 1: L_e of Q models, (Q,): (Q, B, ...) each."""
    guess = world(state, action, next_state)

    def nll(error, std, unit):  # in units of what is to be predicted
        std, unit = std.clamp(min=1e-8), unit.clamp(min=1e-8)
        loss = (std / unit).log() + 0.5 * (error / std) ** 2
        return loss * (std / unit).detach() ** (2 * beta) if beta else loss

    vary = (world.move_std > 0).to(state.dtype)  # constant entries teach nothing
    count = vary.sum().clamp(min=1)
    for_state = (nll(next_state - guess.state, guess.state_std, world.move_std) * vary).sum(-1) / count
    for_reward = nll(reward - guess.reward, guess.reward_std, world.reward_std) * (world.reward_std > 0)
    for_end = F.binary_cross_entropy_with_logits(guess.end, end, reduction="none")
    return (for_state + for_reward + for_end).mean(1)


def descend(networks, adam, losses, args):
    """One step of Adam down the sum of the losses (G,) of G independent parts, each with a gradient of limited length.

    The sum leaves each part (a member of the model, or all that one seed's agents learn) its own gradient.
    """
    adam.zero_grad()
    losses.sum().backward()
    grads = [parameter.grad.view(len(losses), -1) for parameter in networks.parameters() if parameter.grad is not None]
    length = sum((grad**2).sum(1) for grad in grads).sqrt()  # (G,)
    factor = args.max_grad_norm / length.clamp(min=args.max_grad_norm)
    for grad in grads:
        grad.mul_(factor[:, None])
    adam.step()


def model_update(world, adam, loss, data, generators, args):
    """One update of all members of all seeds, each from a minibatch of its own; returns what to log, (Q,)."""
    size = (args.members, args.model_batch)
    rows = torch.cat([torch.randint(len(data.train), size, generator=g, device=g.device) for g in generators])
    rows = data.train[rows]  # (Q, B)
    target = data.state[rows + 1], data.reward[rows], data.done[rows]
    losses = loss(world, data.state[rows], data.action[rows].flatten(2), *target, args.beta_nll)
    descend(world, adam, losses, args)
    return {"loss": losses.detach()}


@torch.no_grad()
def validate(world, data, S):
    """Errors of the members on held-out steps, (S, members) each; 1: no better than always guessing the mean change."""
    rows = data.held[torch.linspace(0, len(data.held) - 1, min(SAMPLE, len(data.held)), device=data.held.device).long()]
    Q = len(world.for_end[0].weight)
    state, action = (x[rows].flatten(1).expand(Q, -1, -1) for x in (data.state, data.action))
    guess, vary = world(state, action), data.move_std > 0
    error = ((guess.state - data.state[rows + 1]) / data.move_std.clamp(min=1e-8))[..., vary]
    for_state = (error**2).mean(-1).sqrt().mean(1) if vary.any() else error.sum((1, 2))
    unit = torch.where(data.reward_std > 0, data.reward_std, torch.ones_like(data.reward_std))
    for_reward = ((guess.reward - data.reward[rows]) / unit).abs().mean(1)
    wrong = ((guess.end > 0) != (data.done[rows] > 0)).to(error.dtype).mean(1)
    return {name: x.view(S, -1) for name, x in (("state", for_state), ("reward", for_reward), ("end", wrong))}


@torch.no_grad()
def open_loop(world, data, S, horizon):
    """Error of the elites' states after 1..k steps of recorded held-out actions, (S, k), and if nothing moved, (k,).

    It is the root mean square over starts, elites and entries, in units of the entries' spread.
    """
    k = min(horizon, int(data.left[data.held].max()))
    rows = data.held[data.left[data.held] >= k]
    rows = rows[torch.linspace(0, len(rows) - 1, min(SAMPLE // 4, len(rows)), device=rows.device).long()]
    Q, vary = len(world.for_end[0].weight), data.std > 0
    state = data.state[rows].expand(Q, -1, -1)
    errors, still = [], []
    for t in range(k):
        state = world(state, data.action[rows + t].flatten(1).expand(Q, -1, -1)).state
        error, stayed = (((x - data.state[rows + t + 1]) / data.std.clamp(min=1e-8))[..., vary] ** 2
                         for x in (state, data.state[rows]))  # fmt: skip
        errors.append(error.view(S, -1).mean(1).sqrt() if vary.any() else error.new_zeros(S))
        still.append(stayed.mean().sqrt() if vary.any() else error.new_zeros(()))
    return torch.stack(errors, 1), torch.stack(still)


# ---------------------------------------------------------------- act 2: rollouts
def dream(world, data, args):
    """The model as a world to play in: a function of states (S, B, D), joint actions (S, B, X), members (S, B), and of
    the noise (S, B, D) that the next states have with --sample-states.

    It returns the next states, the penalised rewards, where the game ends, and where the model is sure (S, B).
    """
    root, room = data.weight.sqrt(), args.box_margin * (data.high - data.low)
    worst = data.reward_low - args.box_margin * (data.reward_high - data.reward_low)

    def step(state, action, member, noise=None):
        S, n = len(state), args.elites
        guess = world(*(x[:, None].expand(-1, n, -1, -1).flatten(0, 1) for x in (state, action)))
        each = Guess(*(x.unflatten(0, (S, n)) for x in guess))  # (S, n, B, ...)
        drawn = member[:, None]  # (S, 1, B)
        entries = drawn[..., None].expand(-1, -1, -1, state.shape[-1])
        next_state = each.state.gather(1, entries)[:, 0]
        if noise is not None:
            next_state = next_state + each.state_std.gather(1, entries)[:, 0] * noise
        # Eq. 2: what happens next, by the mean of the members, by the one drawn, and by their vote.
        reward = each.reward.mean(1) if args.reward_from == "mean" else each.reward.gather(1, drawn)[:, 0]
        ends = each.end > 0
        end = 2 * ends.sum(1) > n if args.end_by == "majority" else ends.gather(1, drawn)[:, 0]

        uncertain = gram_norm(torch.cat([each.state, each.reward[..., None]], -1) * root)  # Eq. 3: eps_g
        if args.box:
            next_state = torch.minimum(torch.maximum(next_state, data.low - room), data.high + room)
            reward = torch.minimum(torch.maximum(reward, worst), data.reward_high)
        if args.penalty == "epistemic":  # Eq. 4
            reward = reward - args.reward_penalty * each.reward.var(1).clamp(max=args.limit)
            reward = reward - args.state_penalty * uncertain.clamp(max=args.limit)
        elif args.penalty == "aleatoric":
            spread = ((each.state_std**2).sum(-1) + each.reward_std**2).sqrt().amax(1)
            reward = reward - args.aleatoric * spread
        sure = uncertain < args.limit if args.adaptive else torch.ones_like(end)
        return next_state, reward, end, sure

    return step


def gram_norm(x):
    """|cov|_F over the n members of x (S, n, B, d), (S, B), by the n x n matrix in place of the d x d one."""
    x = (x - x.mean(1, keepdim=True)).transpose(1, 2)  # (S, B, n, d)
    return (x @ x.mT).square().sum((-2, -1)).sqrt() / (x.shape[-2] - 1)


def simulator(data, args):
    """The true world in place of `dream`: it is put into each state anew, so that it needs no record of a rollout.

    An ant's reward was up to 0.05 off then in 200 recorded steps, as MuJoCo's places lag a little behind.
    """
    shape = (args.num_seeds, args.rollouts)
    game = envs.make(args.env, args.task, math.prod(shape), data.state.device)

    def step(state, action, member, noise=None):
        state, action = state[..., data.whole].flatten(0, 1), action.flatten(0, 1)  # (S B, ...)
        game.reset() if args.env == "matrix" else game.set_state(state)
        action = action.view(len(action), game.num_agents, -1)
        obs, reward, end, _, info = game.step(action.argmax(-1) if data.discrete else action.float())
        everything = torch.cat([info["state"], obs.flatten(1)], 1).to(data.state.dtype)
        found = torch.empty(len(obs), data.state.shape[1] + 1, dtype=data.state.dtype, device=state.device)
        found[:, torch.cat([data.whole, data.columns.flatten()])] = everything
        sure = torch.ones(shape, dtype=torch.bool, device=state.device)
        return found[:, :-1].view(*shape, -1), reward.to(found.dtype).view(shape), end.view(shape), sure

    return step


class Batch(NamedTuple):
    """Steps to learn from: first (S, N, B, k, ...) or (S, B, k, ...), later with all steps of a minibatch as B."""

    obs: torch.Tensor  # (S, N, B, O)
    history: torch.Tensor  # (S, N, B, H, O + A)
    action: torch.Tensor  # (S, N, B) or (S, N, B, A), not clipped
    state: torch.Tensor  # (S, B, D) in units
    log_prob: torch.Tensor  # (S, B) of the joint action when it was played
    value: torch.Tensor  # (S, B) of then
    advantage: torch.Tensor  # (S, B)
    returns: torch.Tensor  # (S, B)


def gae(reward, value, next_value, m, zeta, gamma, lam):
    """Eqs. 6 to 8: advantages A and returns R of rollouts (S, B, k), with both masks."""
    delta = reward + gamma * m * next_value - value
    advantage, returns = torch.empty_like(delta), torch.empty_like(delta)
    later = total = torch.zeros_like(delta[..., 0])
    for t in reversed(range(delta.shape[-1])):
        go_on = m[..., t] * zeta[..., t]
        advantage[..., t] = later = delta[..., t] + gamma * lam * go_on * later
        beyond = zeta[..., t] * total + (1 - zeta[..., t]) * next_value[..., t]
        returns[..., t] = total = reward[..., t] + gamma * m[..., t] * beyond
    return advantage, returns


@torch.no_grad()
def rehearse(agents, world, data, generators, args):
    """Play k steps in B places for each seed; returns a `Batch` of B k steps, and what to log (S,)."""
    B, k, N = args.rollouts, args.horizon, agents.N
    where = runs.uniform(generators, k, B)
    rows = data.start[(where * len(data.start)).long()]  # (S, k, B)
    if args.first:
        first = data.first[(where * len(data.first)).long()]
        rows = torch.where(runs.uniform(generators, k, B) < args.first, first, rows)
    member = (runs.uniform(generators, k, B) * args.elites).long()
    noise = agents.noise(generators, k, N, B)
    shock = [None] * k
    if args.sample_states:
        blank = data.state.new_empty(k, B, data.state.shape[1])
        shock = torch.stack([torch.empty_like(blank).normal_(generator=g) for g in generators], 1)  # (k, S, B, D)
    state, history = data.begin(rows[:, 0], args.memory)
    steps = []
    for t in range(k):
        obs, seen = data.view(state), data.normal(state)
        x = agents.remember(obs, history)
        out, value = agents.act(x), agents.value(x, seen)
        action = agents.sample(out, noise[:, t])
        log_prob, _ = agents.log_prob(out, action)
        played = agents.play(action)
        next_state, reward, end, sure = world(state, played.transpose(1, 2).flatten(2), member[:, t], shock[t])
        next_history = push(history, obs, played)
        next_value = agents.value(agents.remember(data.view(next_state), next_history), data.normal(next_state))
        if args.bound_values and not args.simulator:
            next_value = next_value.clamp(max=data.value_high)  # from below, bad teams would look good
        # Eq. 5
        m, zeta = 1 - end.to(reward.dtype), sure.to(reward.dtype) * (t < k - 1)
        steps.append((obs, history, action, seen, log_prob, value, reward, next_value, m, zeta))
        if t < k - 1:  # where a rollout is over, another one begins
            over = end | ~sure  # (S, B)
            fresh_state, fresh_history = data.begin(rows[:, t + 1], args.memory)
            state = torch.where(over[..., None], fresh_state, next_state)
            history = torch.where(over[:, None, :, None, None], fresh_history, next_history)
    each = list(zip(*steps))
    mine = [torch.stack(x, 3).flatten(2, 3) for x in each[:3]]  # (S, N, B k, ...)
    seen = torch.stack(each[3], 2).flatten(1, 2)
    log_prob, value, reward, next_value, m, zeta = (torch.stack(x, 2) for x in each[4:])  # (S, B, k)
    advantage, returns = gae(reward, value, next_value, m, zeta, args.gamma, args.gae_lambda)
    stopped = ((1 - zeta[..., :-1]) * m[..., :-1]).sum((1, 2)) / max(1, B * (k - 1))
    logs = {"model_reward": reward.mean((1, 2)), "stopped": stopped, "ended": 1 - m.mean((1, 2))}
    std, mean = torch.std_mean(advantage, (1, 2), keepdim=True, correction=0)
    advantage = (advantage - mean) / (std + 1e-3 * agents.return_std)
    flat = (x.flatten(1) for x in (log_prob, value, advantage, returns))
    return Batch(*mine, seen, *flat), logs


# ---------------------------------------------------------------- act 2: MAPPO
def ppo_loss(agents, batch, clip, action_penalty):
    """All of the agents' losses, for each seed (S,): their sum, and L(pi), L(V), the entropy H, KL(played || pi)."""
    x = agents.remember(batch.obs, batch.history)
    out, value = agents.act(x), agents.value(x, batch.state)
    log_prob, entropy = agents.log_prob(out, batch.action)
    log_ratio = (log_prob - batch.log_prob).clamp(max=10)
    ratio, advantage = log_ratio.exp(), batch.advantage
    # Eq. 10
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    value, before, returns = (v / agents.return_std for v in (value, batch.value, batch.returns))
    # Eq. 11
    near = before + (value - before).clamp(-clip, clip)
    value_loss = 0.5 * torch.maximum(((value - returns) ** 2).mean(1), ((near - returns) ** 2).mean(1))
    policy_loss, entropy = -gain.mean(1), entropy.mean(1)
    total = policy_loss + value_loss - agents.alpha * entropy
    if not agents.discrete:
        excess = (out.chunk(2, -1)[0].abs() - 1).clamp(min=0)
        total = total + action_penalty * (excess**2).sum((1, 3)).mean(1)
    kl = (ratio - 1 - log_ratio).mean(1)
    return total, {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "kl": kl}


def update(agents, adam, loss, batch, generators, args):
    """Go over the rollouts `epochs` times; returns what to log of the last minibatch, (S,) each."""
    S, M = batch.returns.shape
    size = min(args.batch_size, M)
    seed, agent = (torch.arange(count, device=batch.returns.device)[:, None] for count in (S, agents.N))
    for _ in range(args.epochs):
        order = torch.stack([torch.randperm(M, generator=g, device=g.device) for g in generators])  # (S, M)
        for pick in order[:, : M // size * size].split(size, 1):
            mine = (each[seed[..., None], agent, pick[:, None]] for each in batch[:3])
            part = Batch(*mine, *(each[seed, pick] for each in batch[3:]))
            total, logs = loss(agents, part, args.clip, args.action_penalty)
            descend(agents, adam, total, args)
            # It rises while there is too little entropy.
            agents.alpha.add_(1e-3 * (args.least_entropy - logs["entropy"].detach())).clamp_(min=0)
    return {name: value.detach() for name, value in logs.items()}


def clone_loss(agents, obs, history, action, state, togo):
    """For each seed (S,): independent behavioural cloning, -log pi_i(a_i) of the recorded actions, summed over agents;
    and how far V is from what the recorded rest of the episode was worth."""
    x = agents.remember(obs, history)
    value_loss = 0.5 * (((agents.value(x, state) - togo) / agents.return_std) ** 2).mean(1)
    return -agents.log_prob(agents.act(x), action)[0].mean(1), value_loss


def clone(agents, adam, loss, data, generators, args):
    """One update of `--method ibc`, or of `--warmup`, in which the critic learns too; returns its loss (S,)."""
    pick = [torch.randint(len(data.start), (args.batch_size,), generator=g, device=g.device) for g in generators]
    rows = data.start[torch.stack(pick)]  # (S, B)
    state, history = data.begin(rows, args.memory)
    action = data.action[rows].transpose(1, 2)  # (S, N, B, A)
    action = action.argmax(-1) if data.discrete else action
    policy_loss, value_loss = loss(agents, data.view(state), history, action, data.normal(state), data.togo[rows])
    descend(agents, adam, policy_loss if args.method == "ibc" else policy_loss + value_loss, args)
    return {"policy_loss": policy_loss.detach()}


# ---------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(agents, data, args, step, episodes, device):
    """Play the teams of all seeds in one batch of games, greedily: returns (S, E), and for the reacher how it bent.

    The latter is (S, E, 3): the target's place, and the mean of sin θ2, positive if bent counter-clockwise.
    """
    S, game = args.num_seeds, envs.make(args.env, args.task, args.num_seeds * episodes, device)
    (obs, info), total = game.reset(seed=step), torch.zeros(S, episodes, device=device, dtype=torch.float64)
    history = torch.zeros(S, agents.N, episodes, args.memory, agents.O + agents.A, device=device,
                          dtype=torch.get_default_dtype())  # fmt: skip
    bend = torch.zeros(S * episodes, 3, device=device)
    try:
        for _ in range(game.time_limit):
            view = data.views(obs).unflatten(0, (S, episodes)).transpose(1, 2)  # (S, N, E, O)
            action = agents.sample(agents.act(agents.remember(view, history)))
            played = agents.play(action)
            history = push(history, view, played)
            if args.env == "reacher":
                bend += info["state"][:, [4, 5, 3]] / game.time_limit
            action = (action if data.discrete else played.float()).transpose(1, 2).flatten(0, 1)
            obs, reward, terminated, truncated, info = game.step(action)
            total += reward.view(S, episodes)
            if (terminated | truncated).all():
                break
    except FloatingPointError as error:
        raise FloatingPointError(f"in the evaluation after {step} updates, {error}") from None
    finally:
        game.close()
    return total, bend.view(S, episodes, 3)


def report(run, args, agents, data, dataset, rows, model, speed):
    """Evaluate the last policies on ten times as many games; write summary.json and the pictures, print the table."""
    S, E, folder = args.num_seeds, 10 * args.eval_episodes, run.folder
    scores, bend = evaluate(agents, data, args, args.steps, E, run.device)
    name = {"moma-ppo": "MOMA-PPO", "ibc": "cloning"}[args.method]
    summary = {"script": "moma_ppo", "method": args.method, "env": args.env, "task": args.task}
    summary |= {"dataset": args.dataset, "steps": args.steps, "seeds": [row["seed"] for row in rows[-S:]]}
    summary |= {"return": runs.over_seeds(scores), "normalized_return": None, "win_rate": None}
    if dataset.references:
        summary["normalized_return"] = runs.over_seeds(dataset.normalize(scores))  # 0 random, 1 expert
    summary |= {
        "dataset_return": dataset.returns.mean().item(), "world_model": model, "updates_per_second": speed,
        "wall_seconds": time.perf_counter() - run.begun, "device": runs.device_name(run.device),
    }  # fmt: skip
    title = f"{name} on {runs.slug(args.env, args.task, args.dataset)}, {S} seed{'s' * (S > 1)}"
    levels = {"dataset": summary["dataset_return"]}
    figure = runs.draw_curves(rows, {"return": name}, levels, title, "updates", "return")
    runs.save_figure(folder / "curve.png", figure)
    if args.env == "reacher":
        runs.save_figure(folder / "convention.png", draw_convention(bend, summary["seeds"], title))
        summary["counterclockwise"] = runs.over_seeds((bend[..., 2] > 0).double())
    runs.save_json(folder / "summary.json", summary)
    print(f"\n{title}: {folder}")
    scores = {"greedy": summary["return"], "normalised": summary["normalized_return"]}
    scores = {head: cell for head, cell in scores.items() if cell}
    runs.print_table([*scores], {name: [*scores.values()]}, levels)
    return summary


def draw_convention(bend, seeds, title):
    """Where the target was, and which way the arm bent there: (S, E, 3) as a picture for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(bend), 2.9), layout="constrained")
    for seed, axes, dots in zip(seeds, figure.subplots(1, len(bend), squeeze=False)[0], bend.cpu()):
        axes.scatter(dots[:, 0], dots[:, 1], c=dots[:, 2], cmap="coolwarm", vmin=-1, vmax=1, s=14)
        axes.set(title=f"seed {seed}", aspect="equal", xlabel="target x", ylabel="target y")
    figure.suptitle(f"{title}: mean sin θ2", fontsize=9)
    return figure


# ---------------------------------------------------------------- main
def read_model(path, data, args, device):
    """The elites of another run's world model; ValueError if it is of another world or lacks a seed."""
    path = Path(path) / "world_model.pt" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise ValueError(f"no world model {path}: --world-model takes the folder of a run that has learned one")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        about, weights = saved["about"], saved["world"]
        made, wanted = (", ".join(map(str, x)) for x in (about["world"], world_of(data, args)))
        sizes = about["hidden"], about["reward_hidden"], about["layers"], about["end_from"]
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"{path} is no world model, or damaged ({type(error).__name__})") from None
    if made != wanted:
        raise ValueError(f"{path} is a model of another world ({made}), not of this one ({wanted})")
    seeds = range(args.seed, args.seed + args.num_seeds)
    missing = [seed for seed in seeds if seed not in about["seeds"]]
    if missing or about["elites"] != args.elites:
        raise ValueError(
            f"{path} has {about['elites']} elites of the seeds {about['seeds']}: choose --seed, --num-seeds and "
            f"--elites among them"
        )
    Q = len(about["seeds"]) * args.elites
    world = World(data, *sizes, True, [runs.stream(0, 0)] * Q).to(device)
    try:
        world.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"{path} is damaged: its weights do not fit its sizes") from None
    place = torch.tensor([about["seeds"].index(seed) for seed in seeds], device=device)[:, None]
    which = (place * args.elites + torch.arange(args.elites, device=device)).flatten()
    return world.choose(which), about


def world_of(data, args):
    """What a world model is a model of: all tasks of a body are one world, seen through other eyes."""
    task = args.task if args.env == "matrix" else "all tasks"
    return [args.env, task, f"{data.state.shape[1]} entries", f"{data.action[0].numel()} action entries"]


def write_model(folder, world, about):
    buffer = io.BytesIO()
    torch.save({"world": world.state_dict(), "about": about}, buffer)
    runs.save(folder / "world_model.pt", buffer.getvalue())


class Run(NamedTuple):
    """Where a run keeps what it learns, and what is there to go on with."""

    folder: Path
    saved: dict | None  # the checkpoint of the run to resume
    device: torch.device
    begun: float  # when, on the clock `time.perf_counter`
    tracker: object = None


def train(run, act, table, networks, adam, generators, learn, look, args):
    """Call `learn` for each update of an act, `look` when an evaluation is due, and keep a checkpoint then.

    Args:
        act: 1 or 2, which tells their checkpoints apart; `table` is the file for what `look` finds.
        learn: function of the updates made that makes one more and returns what to log, tensors by name.
        look: function of the updates made and the last log, which returns rows for the table, and a line to print.
    Returns:
        All rows, and the updates per second.
    """
    steps, every, lr = args.model_steps, args.model_eval_every, args.model_lr
    if act == 2:
        steps, every, lr = args.steps, args.eval_every, args.lr
    step, rows, seconds, logs = 0, [], 0.0, {}
    if run.saved and run.saved["act"] == act:
        try:
            networks.load_state_dict(run.saved["network"])
            adam.load_state_dict(run.saved["adam"])
            for generator, state in zip(generators, run.saved["generators"], strict=True):
                generator.set_state(state.cpu())
            step, rows, seconds = (run.saved[name] for name in ("step", "rows", "seconds"))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            message = f"{run.folder}/checkpoint.pt is of another run: delete it to start this one again"
            raise ValueError(message) from None
    while True:
        if not rows or rows[-1]["step"] < step:  # a resumed run has looked here already
            for name, value in logs.items():
                if not value.isfinite().all():
                    flag = "--model-lr" if act == 1 else "--lr"
                    raise FloatingPointError(f"{name} is not finite after {step} updates: try a smaller {flag}")
            found, line = look(step, logs)
            rows += [{"step": step} | row for row in found]
            runs.save_csv(run.folder / table, rows)
            runs.save_checkpoint(run.folder, {
                "act": act, "network": networks.state_dict(), "adam": adam.state_dict(), "step": step, "rows": rows,
                "generators": [generator.get_state() for generator in generators], "seconds": seconds,
                "wall": time.perf_counter() - run.begun, "args": asdict(args),
            })  # fmt: skip
            speed = f"{step / max(seconds, 1e-9):7.1f} updates/s" if step else "(untrained)"
            print(f"{'model' if act == 1 else 'step'} {step:6d}   {line}   {speed}", flush=True)
            if run.tracker and act == 2:
                numbers = [name for name in rows[-1] if name not in ("step", "seed")]
                run.tracker.log({name: sum(row[name] for row in found) / len(found) for name in numbers}, step=step)
        if step >= steps:
            return rows, step / max(seconds, 1e-9)
        begin = time.perf_counter()
        for _ in range(min(every - step % every, steps - step)):
            adam.param_groups[0]["lr"] = lr * (1 - step / steps) if args.lr_decay else lr
            logs = learn(step)
            step += 1
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - begin


def learn_world(run, data, args):
    """Act 1: returns the elites of each seed (S elites models), and numbers about them."""
    S, seeds = args.num_seeds, list(range(args.seed, args.seed + args.num_seeds))
    start = [g for g in (runs.stream(seed, 2) for seed in seeds) for _ in range(args.members)]
    sizes = args.model_hidden, args.reward_hidden, args.model_layers, args.end_from
    world = World(data, *sizes, args.normalize, start).to(run.device)
    adam = torch.optim.Adam([*world.parameters()], args.model_lr, fused=True)
    loss = runs.compiler(args.compile, run.device)(model_loss)
    generators = [runs.stream(seed, 3, run.device) for seed in seeds]

    def look(step, logs):
        losses = logs.get("loss", torch.full((S * args.members,), math.nan)).view(S, -1).tolist()
        errors = {name: value.tolist() for name, value in validate(world, data, S).items()}
        found = [
            {"seed": seed, "member": e, "loss": losses[s][e]}
            | {f"{name}_error": value[s][e] for name, value in errors.items()}
            for s, seed in enumerate(seeds) for e in range(args.members)
        ]  # fmt: skip
        line = "   ".join(f"{name} {torch.tensor(value).mean():.4f}" for name, value in errors.items())
        return found, "held-out errors: " + line

    def learn(step):
        return model_update(world, adam, loss, data, generators, args)

    _, speed = train(run, 1, "world_model.csv", world, adam, generators, learn, look, args)

    errors = validate(world, data, S)
    best = (errors["state"] + errors["reward"]).sort(dim=1, stable=True)[1][:, : args.elites]  # (S, elites)
    chosen = world.choose((best + args.members * torch.arange(S, device=run.device)[:, None]).flatten())
    error, still = open_loop(chosen, data, S, args.horizon)
    about = {"world": world_of(data, args), "dataset": args.dataset, "seeds": seeds, "elites": args.elites}
    about |= {"hidden": args.model_hidden, "reward_hidden": args.reward_hidden, "layers": args.model_layers}
    about |= {"end_from": args.end_from, "steps": args.model_steps}
    about |= {f"{name}_error": value.gather(1, best).mean().item() for name, value in errors.items()}
    about |= {"open_loop": error.mean(0).tolist(), "open_loop_still": still.tolist(), "updates_per_second": speed}
    curve = [{"step": t + 1, "seed": seed, "error": error[s, t].item(), "still": still[t].item()}
             for t in range(error.shape[1]) for s, seed in enumerate(seeds)]  # fmt: skip
    title = f"open loop, {runs.slug(args.env, args.task, args.dataset)}"
    columns = {"error": "model", "still": "nothing moves"}
    figure = runs.draw_curves(curve, columns, {}, title, "steps", "error / spread")
    runs.save_figure(run.folder / "world_model.png", figure)
    return chosen, about


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    begun = time.perf_counter()
    torch.set_num_threads(args.threads)
    device = runs.choose_device(args.device)
    dataset = datasets.load(args.env, args.task, args.dataset, device, episodes=args.episodes)
    data = Data(dataset, args, device)
    S, seeds, rehearses = args.num_seeds, range(args.seed, args.seed + args.num_seeds), args.method == "moma-ppo"
    agents = Agents(data, args, [runs.stream(seed, 0) for seed in seeds]).to(device)
    adam = torch.optim.Adam([*agents.parameters()], args.lr, fused=True)
    rehearsal_loss, cloning_loss = (runs.compiler(args.compile, device)(loss) for loss in (ppo_loss, clone_loss))
    generators = [runs.stream(seed, 1, device) for seed in seeds]
    play, about = None, None
    model = Path(args.out_dir) / "world_model.pt" if args.resume else None  # act 1 of the run to resume is over
    model = model if model and model.exists() else args.world_model
    dreams = rehearses and not args.simulator
    found = read_model(model, data, args, device) if dreams and model else None

    tracker = runs.start_tracking("moma_ppo", args) if args.track else None
    folder = runs.open_folder("moma_ppo", args, device)
    saved = runs.load_checkpoint(folder, device) if args.resume else None
    run = Run(folder, saved, device, begun - (saved["wall"] if saved else 0), tracker)
    print(f"{len(dataset.returns)} episodes, {len(data.start)} steps, mean return {dataset.returns.mean():.2f}")
    if dreams:
        world, about = found or learn_world(run, data, args)
        write_model(folder, world, about | {"seeds": [*seeds]})
        errors = " ".join(f"{x:.3f}" for x in about["open_loop"])
        print(f"world model: {args.elites} elites, open-loop error after 1, 2, ... steps: {errors}", flush=True)
        play = dream(world, data, args)
    elif rehearses:
        play = simulator(data, args)

    def learn(step):
        if not rehearses:
            return clone(agents, adam, cloning_loss, data, generators, args)
        if args.warmup and step == 0:
            print(f"cloning first, {args.warmup} updates", flush=True)
        for _ in range(args.warmup if step == 0 else 0):
            clone(agents, adam, cloning_loss, data, generators, args)
        batch, logs = rehearse(agents, play, data, generators, args)
        return logs | update(agents, adam, rehearsal_loss, batch, generators, args)

    def look(step, logs):
        score = evaluate(agents, data, args, step, args.eval_episodes, device)[0].mean(1)
        names = ("model_reward", "stopped", "ended", "policy_loss", "value_loss", "entropy", "kl")
        unknown = torch.full((S,), math.nan)
        columns = {name: logs.get(name, unknown) for name in (names if rehearses else ("policy_loss",))}
        columns |= ({"alpha": agents.alpha} if rehearses else {}) | {"return": score}
        columns = {name: value.tolist() for name, value in columns.items()}
        more = f"   in the model {logs['model_reward'].mean():8.3f} a step" if "model_reward" in logs else ""
        found = [{"seed": seed} | {name: value[s] for name, value in columns.items()} for s, seed in enumerate(seeds)]
        return found, f"return {score.mean():9.3f}{more}"

    rows, speed = train(run, 2, "metrics.csv", agents, adam, generators, learn, look, args)
    return report(run, args, agents, data, dataset, rows, about, speed)


def parse(argv=None):
    """Read the command line; where no flag speaks, the environment's own values or those of the resumed run hold."""
    read = functools.partial(tyro.cli, Args, args=argv, description=__doc__.splitlines()[0])
    args = read()
    if args.resume:
        args = read(default=replace(runs.saved_args(Args, args.out_dir), resume=True, out_dir=args.out_dir))
    elif args.env in envs.TASKS:
        task = args.task or ("coordination" if args.env == "matrix" else envs.TASKS[args.env][0])
        mine = preset(args.env, task, args.method)
        args = read(default=Args(**mine, env=args.env, task=task, method=args.method))
    zero = "seed episodes holdout least_entropy first warmup reward_penalty state_penalty aleatoric gamma gae_lambda "
    zero += "action_penalty memory beta_nll box_margin"
    positive = replace(args, least_entropy=abs(args.least_entropy))
    runs.check_numbers(positive, may_be_zero=zero, at_most_one="gamma gae_lambda first beta_nll")
    if not 2 <= args.elites <= args.members:
        raise ValueError(f"--elites must be at least 2, or nothing tells how sure they are, and at most {args.members}")
    if args.holdout >= 1:
        raise ValueError(f"--holdout is a share of the episodes, below 1, not {args.holdout}")
    if args.simulator and args.env not in ("matrix", "reacher", "ant"):
        raise ValueError(f"--simulator cannot be put into a state of {args.env}: choose matrix, reacher or ant")
    if args.width % 2:
        raise ValueError(f"--width must be even, not {args.width}")
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
