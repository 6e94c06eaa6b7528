"""IQL and MAIQL: implicit Q-learning for teams (Kostrikov et al., ICLR 2022; for teams as in arXiv 2305.17198).

The problem. To learn from a fixed dataset, values must not be asked about actions that nobody recorded: nothing would
correct a wrong answer, and the policy would run after it.

The idea. Do not look for the best action; look at the good ones among the recorded. V is an upper expectile of Q over
recorded actions, a regression that weighs what lies above it more than what lies below, and Q looks ahead through V.
Then the policy clones the recorded actions, those with a large advantage most. How far a team can agree depends on who
does this (--team). "central": one learner sees all views and chooses the joint action. It can weigh whole conventions
against each other, but no agent could act on its own view alone; it is an upper bound. "mixed" (MAIQL): each agent has
values and a policy of its own, and a mixer adds the values up for the team. Every agent then clones its own part of
good joint actions, and the parts of two conventions need not fit. "independent": each agent alone, with the team's
reward.

Equations, by numbers of our own. Player i = 1..K has Q_i(o_i, a_i), twice, and V_i(o_i); a prime marks slowly moving
copies, s' the next state; m is 0 where the game ended by its own rules. The players are the agents; with "central"
there is one, which has the views and the actions of all.
 1 mixing   Q = sum_i w_i(s, a) Q_i + b(s, a),   V = sum_i u_i(s) V_i + c(s)   (mixed; otherwise Q = Q_i, V = V_i)
 2          A(s, a)  = Q'(s, a) - V(s),          Q' made of copies of w and b, and the lower of both copies of Q_i
 3          L(V)     = E [ |expectile - 1(A < 0)| A^2 ]
 4          L(Q)     = E [ r + gamma m V(s') - Q(s, a) ]^2      for both Q
 5          L(pi)    = -E [ min( exp(temperature A), 100 ) sum_i log pi_i(a_i|o_i) ]
With --temperature 0 all weights are 1: plain cloning.

Commands, and the return you should see (last policy, greedy; one CPU core of a small server, torch 2.13):
  python algorithms/iql.py --team central                      the coordination game, unfavourable data, 10 seeds at
      once, 24 s: IQL, 1 in 10 of 10 seeds; the data 0.37
  python algorithms/iql.py                                     the same for MAIQL, 35 s: 0.1 +- 0.1, sampled 0.52
  python algorithms/iql.py --finetune 1                        50 s: MAIQL-ft, 0.9 +- 0.1, sampled 0.51
  python algorithms/iql.py --env matrix --task xor --dataset aa-ab-ba    43 s: MAIQL, greedy 0.4 +- 0.16, sampled 0.48

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, iql
  S, N, A, M = 2, 3, 4, 1000                                       # seeds, players, actions, steps of one long episode
  obs, state, action = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6), torch.randint(A, (M + 1, N))
  reward, none = (action == obs[..., :A].argmax(-1)).float().mean(1), torch.zeros(M + 1)
  data = iql.Data(obs, state, torch.ones(M + 1, N, A).bool(), action, reward, none, torch.arange(M))
  args = iql.Args(num_seeds=S, team="mixed")
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = iql.Team(data, args, generators)
  adams = iql.optimizers(team, args)
  for step in range(200):
      logs = iql.update(team, adams, data, iql.draw_rows(generators, data, args), args)
  greedy = team.policies.sample(team.policies(obs.transpose(0, 1).expand(S, N, M + 1, 5), data.avail.transpose(0, 1)))

Differences from the authors' code (of MOMA-PPO's baselines), and choices made here:
  1. The mixers see the state, Q's also the joint action, rather than all views. Their weights may have any sign, as in
     the code; the paper says QMIX, where they may not.
  2. On games with discrete actions the central player has one logit for each joint action. With one for each agent's
     action it could not tell two conventions from their mixture.
  3. Agents have no memory; the authors' look at their last ten views and actions. Networks are smaller, copies move
     twice as fast, and a seed's gradient has a limited length also without mixers.
  4. Continuous policies are normal and clipped when played, as in bc.py; the authors' go through a tanh.
  5. --scale-rewards (the ant's default, as in the code) measures rewards in thousandths of the difference between the
     best and the worst return of the data.
  6. Step sizes of the policies fall linearly to 0 (the code: along a cosine).
  7. --finetune 1 (MAIQL-ft): as many updates again, in which the teams play as well. Before every tenth each seed plays
     games of up to ten steps from recorded states (the authors' one), so many that half of all steps are its own in the
     end, or fewer where games end early; a minibatch draws from all alike.
  8. The ant's temperature is 0.3 (--temperature 3: the code's): after so few updates the errors of V differ more from
     state to state than actions do in value, and with 3 only a tenth of a minibatch has weights that count.

Seeds differ in all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, K players (N or 1), Q = S K networks, B steps of a minibatch, M recorded steps, R rows
(observations), E games, T steps, A actions (or entries of an action), O observation, I inputs, D state.
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
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "matrix"  # matrix, bridge, smac, polynomial, reacher, halfcheetah, ant, or module:factory
    task: str = ""  # its task; by default the coordination game, or the environment's first
    dataset: str = "unfavourable"  # a dataset's name, or the path of a file
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
    out_dir: str = ""  # the run's folder; by default a new one in runs/iql
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    team: Literal["central", "mixed", "independent"] = "mixed"  # who learns: one for all, or each agent
    finetune: float = 0.0  # updates after that, as a multiple of --steps, in which the teams play the true game as well
    expectile: float = 0.7  # which expectile of the recorded actions' Q is V
    temperature: float = 3.0  # how much more a good action counts than a bad one; 0 clones
    scale_rewards: bool = False  # measure them in thousandths of the range of the data's returns
    gamma: float = 0.99  # discount
    # --- the optimisation
    normalize: bool = True  # views in units of the data's mean and spread
    one_hot: bool = False  # feed whole numbers as one-hot values (the cells of a grid)
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    batch_size: int = 64  # recorded steps per update
    lr: float = 1e-3  # Adam's step size; the policies' falls linearly to 0
    tau: float = 0.01  # how far a target network moves in an update
    max_grad_norm: float = 1.0  # longest gradient of one seed's agents


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end. In an episode's last row no step begins."""

    obs: torch.Tensor  # (R, K, I) what the players see
    state: torch.Tensor  # (R, D) what the mixers see
    avail: torch.Tensor | None  # (R, K, A) bool, the available actions; None where actions are continuous
    action: torch.Tensor  # (R, K) int64, or (R, K, A) in [-1, 1], of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    steps: torch.Tensor  # (M,) the rows where a step begins; the next observation is in the next row


def draw_rows(generators, data, args):
    """A minibatch for each seed, with replacement, from its own generator: (S, B) rows where a step begins."""
    M, B = len(data.steps), args.batch_size
    return data.steps[torch.stack([torch.randint(M, (B,), generator=g, device=g.device) for g in generators])]


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


def mlp(inputs, outputs, args, generators, scale=1.0):
    """A ReLU network for each generator: (Q, B, inputs) -> (Q, B, outputs)."""
    sizes = [inputs] + [args.hidden] * args.layers
    body = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o, generators), nn.ReLU())]
    return nn.Sequential(*body, Linear(sizes[-1], outputs, generators, scale))


class Policies(nn.Module):
    """A policy for each player of S teams."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, self.K, I), self.discrete = data.obs.shape, data.avail is not None
        self.A = (data.avail if self.discrete else data.action).shape[-1]
        each = [g for g in generators for _ in range(self.K)]
        self.body = mlp(I, self.A * (1 if self.discrete else 2), args, each, scale=0.1)
        if not self.discrete:  # actions begin as far apart as the recorded ones
            spread = data.action[data.steps].std(0, correction=0).clamp(min=math.exp(-6), max=1)
            self.register_buffer("log_spread", spread.log()[:, None])  # (K, 1, A)

    def forward(self, obs, avail):
        """Log-probabilities of all actions (S, K, B, A) from views (S, K, B, I) and available actions (..., K, B, A);
        where actions are continuous (None) their means and log-deviations (S, K, B, 2A)."""
        out = self.body(obs.flatten(0, 1)).view(*obs.shape[:3], -1)
        if self.discrete:
            return F.log_softmax(out.masked_fill(~avail, ILLEGAL), -1)
        mean, log_std = out.chunk(2, -1)
        return torch.cat([mean, (self.log_spread + log_std).clamp(-6, 0)], -1)

    def log_prob(self, out, action):
        """log pi_i of Eq. 5 for each player's action, (S, K, B); `out` from `forward`."""
        if self.discrete:
            return out.gather(-1, action[..., None])[..., 0]
        mean, log_std = out.chunk(2, -1)
        return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - HALF_LOG_2PI).sum(-1)

    def sample(self, out, clocks=None):
        """The likeliest actions, (S, K, B) or (S, K, B, A); with clocks (S, K, B, A), which are exponential or, where
        actions are continuous, normal numbers, actions drawn from the policies."""
        if self.discrete:  # which clock rings first is a draw from pi
            return (out if clocks is None else out - clocks.log()).argmax(-1)
        mean, log_std = out.chunk(2, -1)
        return mean if clocks is None else mean + log_std.exp() * clocks


class Mixer(nn.Module):
    """Eq. 1: the players' values (S, K, B), and what the weights depend on (S, B, I) -> the team's value, (S, 1, B)."""

    def __init__(self, inputs, num_agents, args, generators):
        super().__init__()
        self.net = mlp(inputs, num_agents + 1, args, generators)

    def forward(self, local, context):
        out = self.net(context).movedim(2, 1)  # (S, K + 1, B)
        return (out[:, :-1] * local).sum(1, keepdim=True) + out[:, -1:]


class Team(nn.Module):
    """Everything that S teams learn."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.policies = Policies(data, args, generators)
        (_, K, I), A, D = data.obs.shape, self.policies.A, data.state.shape[1]
        each = [g for g in generators for _ in range(K)]
        self.q = nn.ModuleList(mlp(I + A, 1, args, each) for _ in range(2))
        self.v = mlp(I, 1, args, each)
        self.q_mixer = Mixer(D + K * A, K, args, generators) if args.team == "mixed" else None
        self.v_mixer = Mixer(D, K, args, generators) if args.team == "mixed" else None
        self.targets = copy.deepcopy(nn.ModuleList([self.q, self.q_mixer])).requires_grad_(False)


# ---------------------------------------------------------------- losses
class Batch(NamedTuple):
    """B recorded steps of each seed."""

    obs: torch.Tensor  # (S, K, B, I)
    next_obs: torch.Tensor
    state: torch.Tensor  # (S, B, D)
    next_state: torch.Tensor
    avail: torch.Tensor | None  # (S, K, B, A) bool
    action: torch.Tensor  # (S, K, B) or (S, K, B, A)
    taken: torch.Tensor  # (S, K, B, A) the same, one-hot where actions are discrete
    reward: torch.Tensor  # (S, 1, B)
    done: torch.Tensor  # (S, 1, B)


def gather(data, rows):
    """The steps that begin in the rows (S, B) as a `Batch`."""
    obs, next_obs, action = (x.transpose(1, 2) for x in (data.obs[rows], data.obs[rows + 1], data.action[rows]))
    avail = None if data.avail is None else data.avail[rows].transpose(1, 2)
    taken = action if avail is None else F.one_hot(action, avail.shape[-1]).to(obs.dtype)
    rest = data.reward[rows][:, None], data.done[rows][:, None]
    return Batch(obs, next_obs, data.state[rows], data.state[rows + 1], avail, action, taken, *rest)


def value(team, obs, state):
    """V of Eq. 1, (S, 1, B) where the players' values are mixed, else (S, K, B)."""
    local = team.v(obs.flatten(0, 1)).view(obs.shape[:3])
    return local if team.v_mixer is None else team.v_mixer(local, state)


def joint_value(mixer, local, batch):
    """Q of Eq. 1, likewise, from the players' own, (S, K, B)."""
    if mixer is None:
        return local
    return mixer(local, torch.cat([batch.state, batch.taken.transpose(1, 2).flatten(2)], -1))


def local_values(networks, batch):
    """The players' Q_i(o_i, a_i), by both networks of each: (2, S, K, B)."""
    x = torch.cat([batch.obs, batch.taken], -1).flatten(0, 1)
    return torch.stack([network(x) for network in networks]).view(2, *batch.obs.shape[:3])


def advantage(team, batch):
    """Eq. 2, of the shape of V; only V has a gradient here."""
    networks, mixer = team.targets
    with torch.no_grad():
        q = joint_value(mixer, local_values(networks, batch).amin(0), batch)
    return q - value(team, batch.obs, batch.state)


def value_loss(team, batch, expectile):
    """Eq. 3 for each seed, (S,)."""
    gap = advantage(team, batch)
    return ((expectile - (gap < 0).to(gap.dtype)).abs() * gap**2).mean((1, 2))


def critic_loss(team, batch, gamma):
    """Eq. 4 for each seed, (S,)."""
    with torch.no_grad():
        y = batch.reward + gamma * (1 - batch.done) * value(team, batch.next_obs, batch.next_state)
    return sum(((y - joint_value(team.q_mixer, q, batch)) ** 2).mean((1, 2)) for q in local_values(team.q, batch))


def policy_loss(team, batch, temperature):
    """Eq. 5 for each seed, (S,)."""
    with torch.no_grad():
        weight = (temperature * advantage(team, batch)).exp().clamp(max=100)
    log_pi = team.policies.log_prob(team.policies(batch.obs, batch.avail), batch.action)  # (S, K, B)
    return -(weight * log_pi).sum(1).mean(1)


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


def optimizers(team, args):
    """Adam for the policies, for V and for Q, each with its mixer."""
    parts = {"policies": [team.policies], "values": [team.v, team.v_mixer], "critics": [team.q, team.q_mixer]}
    return {name: Adam(nn.ModuleList(nets).parameters(), args.lr) for name, nets in parts.items()}


def update(team, adams, data, rows, args):
    """One update of all networks of all seeds, on the steps that begin in `rows` (S, B); returns diagnostics, (S,)."""
    batch = gather(data, rows)
    v_loss = value_loss(team, batch, args.expectile)
    descend(adams["values"], v_loss, args)
    pi_loss = policy_loss(team, batch, args.temperature)
    descend(adams["policies"], pi_loss, args)
    q_loss = critic_loss(team, batch, args.gamma)
    descend(adams["critics"], q_loss, args)
    with torch.no_grad():
        torch._foreach_lerp_(list(team.targets.parameters()), adams["critics"].moved, args.tau)
    return {"policy_loss": pi_loss.detach(), "q_loss": q_loss.detach(), "v_loss": v_loss.detach()}


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
    """What differs from the coordination game's values, above, in the other environments."""
    env, first = args.env, {"matrix": "coordination", "smac": "5m_vs_6m"}
    task = args.task or first.get(env) or envs.TASKS.get(env, ("",))[0]
    small = dict(normalize=False, steps=3000, eval_every=500)
    body = dict(num_seeds=3, hidden=128, steps=10_000, eval_every=2000, batch_size=256, lr=5e-4)
    values = {
        "matrix": dict(dataset=datasets.names("matrix", task)[-1]) if env == "matrix" else {},
        "bridge": small | dict(dataset="mixed", num_seeds=5, one_hot=True, batch_size=128, eval_episodes=32),
        "smac": small | dict(dataset="medium-replay", num_seeds=3, batch_size=512, eval_episodes=32),
        "polynomial": body | dict(dataset="peak-0.5", num_seeds=10, steps=3000, eval_every=1000, hidden=64,
                                  batch_size=64, lr=1e-3, normalize=False),
        "halfcheetah": body | dict(dataset="good"), "reacher": body | dict(dataset="expert-mix"),
        "ant": body | dict(dataset="full-replay", scale_rewards=True, temperature=0.3),
    }  # fmt: skip
    return values.get(env, body | dict(dataset="")) | dict(env=env, task=task)


def arrange(dataset, args):
    """The dataset as `Data`, and the function that turns observations (..., N, O) into the players' inputs."""
    rows = layout.rows(dataset)
    view, see = layout.inputs(rows["obs"], args), layout.inputs(rows["state"], args, correction=1)
    K = 1 if args.team == "central" else rows["obs"].shape[1]

    def encode(obs):
        return view(obs).flatten(-2).unflatten(-1, (K, -1))

    avail, reward = rows["avail_actions"], rows["reward"] * reward_scale(dataset, args)
    players = layout.joint_avail(avail, K), layout.join(rows["actions"], avail, K)
    return Data(encode(rows["obs"]), see(rows["state"]), *players, reward, rows["done"], rows["start"]), encode


def reward_scale(dataset, args):
    """What rewards are multiplied by."""
    return 1000 / (dataset.returns.max() - dataset.returns.min()).clamp(min=1e-6) if args.scale_rewards else 1.0


def act(policies, encode, obs, avail, memory, clocks=None):
    """What the agents do, by what `runs.react` says of the players, and the memory: obs (S, B, N, O), avail
    (S, B, N, A) or None -> (S, B, N) or (S, B, N, A). Greedy without clocks."""
    action, memory = runs.react(policies, encode, obs, layout.joint_avail(avail, policies.K), memory, clocks)
    return layout.split(action, avail, obs.shape[2]), memory


class Practice(nn.Module):
    """Room behind the dataset's rows for what the teams play while they are fine-tuned: E games of T steps a round.

    Attributes:
        data: the dataset's rows, and behind them the room: a row for each observation of each game.
        obs, state, avail, action, reward, done: (S, rounds, E, T + 1, ...) the room, as views into `data`.
        row: (S, rounds, E, T + 1) the numbers of its rows.
        own: (S, rounds E T + 1) the rows where steps begin that a seed has played, the first `count` (S,) of each.
    """

    def __init__(self, dataset, data, encode, args, updates):
        super().__init__()
        R, M, S, rounds, device = len(data.obs), len(data.steps), args.num_seeds, -(-updates // 10), data.obs.device
        self.T = min(10, runs.game(args).time_limit)
        self.E = -(-M // (rounds * self.T))  # in the end there are as many steps of their own as in the data
        sizes = S, rounds, self.E, self.T + 1
        self.data = data
        for name, x in data._asdict().items():
            if x is not None and name != "steps":
                x = torch.cat([x, x.new_zeros(math.prod(sizes), *x.shape[1:])])
                self.data = self.data._replace(**{name: x})
                self.register_buffer(name, x[R:].unflatten(0, sizes))
        self.register_buffer("row", torch.arange(R, R + math.prod(sizes), device=device).view(sizes))
        self.register_buffer("own", data.steps.new_zeros(S, rounds * self.E * self.T + 1))
        self.register_buffer("count", data.steps.new_zeros(S))
        states = layout.rows(dataset)["state"]  # (R, D) as the game knows them
        self.starts, self.see = states[data.steps], layout.inputs(states, args, correction=1)
        self.game, self.encode, self.scale = runs.game(args, S * self.E, device), encode, reward_scale(dataset, args)

    def draw(self, generators, args):
        """A minibatch for each seed, of recorded steps and its own, all equally likely: (S, B) rows."""
        M, B = len(self.data.steps), args.batch_size
        uniform = [torch.rand(B, generator=g, device=g.device, dtype=torch.float64) for g in generators]
        at = (torch.stack(uniform) * (M + self.count[:, None])).long()
        return torch.where(at < M, self.data.steps[at.clamp(max=M - 1)], self.own.gather(1, (at - M).clamp(min=0)))

    @torch.no_grad()
    def play(self, r, policies, generators):
        """Round r: every seed plays E games of the batch by sampling, from recorded states or, where the environment
        cannot be put into one, as all its games begin."""
        game, M, S, K, E = self.game, len(self.starts), len(generators), policies.K, self.E
        chosen = [torch.randint(M, (E,), generator=g, device=g.device) for g in generators]
        starts = self.starts[torch.stack(chosen)].flatten(0, 1)  # (S E, D)
        obs, info = game.set_state(starts) if hasattr(game, "set_state") else game.reset()
        draw = torch.Tensor.exponential_ if policies.discrete else torch.Tensor.normal_
        going = torch.ones(S, E, dtype=torch.bool, device=obs.device)
        for t in range(self.T + 1):
            seen = obs, info["state"], info.get("avail_actions")
            obs, state, avail = (None if x is None else x.unflatten(0, (S, E)) for x in seen)
            self.obs[:, r, :, t], self.state[:, r, :, t] = self.encode(obs), self.see(state)
            if avail is not None:
                self.avail[:, r, :, t] = layout.joint_avail(avail, K)
            if t == self.T:
                return
            chance = [draw(torch.empty(K, E, policies.A, device=obs.device), generator=g) for g in generators]
            action, _ = act(policies, self.encode, obs, avail, None, torch.stack(chance))
            obs, reward, ended, cut, info = game.step(action.flatten(0, 1))
            self.action[:, r, :, t] = layout.join(action, avail, K)
            self.reward[:, r, :, t], self.done[:, r, :, t] = reward.view(S, E) * self.scale, ended.view(S, E)
            place = torch.where(going, self.count[:, None] + going.cumsum(1) - 1, self.own.shape[1] - 1)
            self.own.scatter_(1, place, self.row[:, r, :, t])  # what follows a game's end goes to the last place
            self.count += going.sum(1)
            going &= ~(ended | cut).view(S, E)


def evaluate(policies, encode, args, step, episodes, device):
    """Scores (S, E) of the greedy teams of all seeds and, where actions are discrete, by sampling: `runs.score`."""
    clocks = (policies.K, -1, policies.A) if policies.discrete else None
    return runs.score(lambda *seen: act(policies, encode, *seen), args, step, episodes, device, clocks=clocks)


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("iql", args)
    device = run.device
    dataset = run.load(episodes=args.episodes)
    data, encode = arrange(dataset, args)
    team = Team(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adams, generators = optimizers(team, args), [runs.stream(seed, 1, device) for seed in run.seeds]
    learn, policies, more = run.compile(update), team.policies, round(args.finetune * args.steps)
    logs = dict.fromkeys(("policy_loss", "q_loss", "v_loss"), torch.full((args.num_seeds,), math.nan))
    parts = dict(team=team, adams=adams, generators=generators)
    if more:
        practice = parts["practice"] = Practice(dataset, data, encode, args, more)
        data = practice.data
    run.begin(**parts)

    for step in run.steps(args.steps + more, args.eval_every):
        if run.due(logs):
            scores = evaluate(policies, encode, args, step, args.eval_episodes, device)
            run.record(logs, {name: x.mean(1) for name, x in scores.items()})
        if step < args.steps:
            adams["policies"].lr.fill_(args.lr * (1 - step / args.steps))
            logs = learn(team, adams, data, draw_rows(generators, data, args), args)
        elif (tuned := step - args.steps) < more:
            if tuned % 10 == 0:
                practice.play(tuned // 10, policies, generators)
            adams["policies"].lr.fill_(args.lr * (1 - tuned / more))
            logs = learn(team, adams, data, practice.draw(generators, args), args)

    scores = evaluate(policies, encode, args, args.steps + more, 10 * args.eval_episodes, device)
    views, actions = dataset.obs.shape[2:], dataset.avail_actions.shape[-1] if policies.discrete else 0
    run.keep_team(lambda *seen: act(policies, encode, *seen), views, actions, 0, policies)
    method = {"central": "IQL", "mixed": "MAIQL", "independent": "independent IQL"}[args.team] + "-ft" * (more > 0)
    return run.finish(method, scores, dataset, run.best)


def parse(argv=None):
    """Read the command line; where no flag speaks, the environment's own values or those of the resumed run hold."""
    args = runs.parse(Args, preset, argv, __doc__)
    zero = "seed episodes eval_episodes layers gamma temperature finetune"
    runs.check_numbers(args, may_be_zero=zero, at_most_one="gamma tau expectile")
    if args.finetune and args.env not in ("matrix", "polynomial", "reacher", "ant"):
        raise ValueError(
            f"--finetune cannot put {args.env} into a recorded state: choose matrix, polynomial, reacher or ant"
        )
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
