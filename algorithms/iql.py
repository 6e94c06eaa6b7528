"""IQL and MAIQL: implicit Q-learning for teams (Kostrikov et al., ICLR 2022; for teams as in arXiv 2305.17198).

The problem. To learn from a fixed dataset, values must not be asked about actions that nobody recorded: nothing would
correct a wrong answer, and the policy would run after it.

The idea. Do not look for the best action; look at the good ones among the recorded. V is an upper expectile of Q over
recorded actions, a regression that weighs what lies above it more than what lies below, and Q looks ahead through V.
Then the policy clones the recorded actions, those with a large advantage most. Who does this decides how far a team can
agree (--team). "central": one learner sees all views and chooses the joint action. It can weigh whole conventions
against each other, but no agent could act on its own view alone; it is an upper bound. "mixed" (MAIQL): each agent has
values and a policy of its own, and a mixer adds the values up for the team. Every agent then clones its own part of
good joint actions, and the parts of two conventions need not fit. "independent": each agent alone, with the team's
reward.

Equations, by numbers of our own. Player i = 1..K has Q_i(o_i, a_i), twice, and V_i(o_i); a prime marks slowly moving
copies, s' the next state; m is 0 where the game ended by its own rules. "central" is one player.
 1 mixing   Q = sum_i w_i(s, a) Q_i + b(s, a),   V = sum_i u_i(s) V_i + c(s)   (mixed; otherwise Q = Q_i, V = V_i)
 2          A(s, a)  = Q'(s, a) - V(s),          Q' of the lower copy of each Q_i, and of copies of w and b
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
  1. The mixers see the state (and the joint action) rather than all views. Their weights may have any sign, as in the
     code; the paper says QMIX, where they may not.
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
  8. The ant's temperature is 0.3 (--temperature 3: the code's): after as few updates V errs by more from state to state
     than actions differ, and weights of 3 leave a tenth of a minibatch.

Seeds differ in all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, K players, Q = S K networks, B steps of a minibatch, M recorded steps, R rows (observations),
E games, T steps, A actions (or entries of an action), O observation, I inputs, D state.
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
    finetune: float = 0.0  # then so many times --steps more, in which the teams play the true game as well
    expectile: float = 0.7  # which expectile of the recorded actions' Q is V
    temperature: float = 3.0  # how much more a good action counts than a bad one; 0 clones
    scale_rewards: bool = False  # in thousandths of the spread of the data's returns
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
        (_, self.N, I), self.S, self.discrete = data.obs.shape, len(generators), data.avail is not None
        self.A = (data.avail if self.discrete else data.action).shape[-1]
        each = [g for g in generators for _ in range(self.N)]
        self.body = mlp(I, self.A * (1 if self.discrete else 2), args, each, scale=0.1)
        if not self.discrete:  # actions begin as far apart as the recorded ones
            spread = data.action[data.steps].std(0, correction=0).clamp(min=math.exp(-6), max=1)
            self.register_buffer("log_spread", spread.log()[:, None])  # (N, 1, A)

    def forward(self, obs, avail):
        """Log-probabilities of all actions (S, N, B, A) from views (S, N, B, I) and available actions (..., N, B, A);
        where actions are continuous (None) their means and log-deviations (S, N, B, 2A)."""
        out = self.body(obs.flatten(0, 1)).unflatten(0, (self.S, self.N))
        if self.discrete:
            return F.log_softmax(out.masked_fill(~avail, ILLEGAL), -1)
        mean, log_std = out.chunk(2, -1)
        return torch.cat([mean, (self.log_spread + log_std).clamp(-6, 0)], -1)

    def log_prob(self, out, action):
        """log pi_i of Eq. 5 for each agent's action, (S, N, B); `out` from `forward`."""
        if self.discrete:
            return out.gather(-1, action[..., None])[..., 0]
        mean, log_std = out.chunk(2, -1)
        return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - HALF_LOG_2PI).sum(-1)

    def sample(self, out, clocks=None):
        """The likeliest actions, (S, N, B) or (S, N, B, A); with exponential clocks, or normal numbers where actions
        are continuous, (S, N, B, A), actions drawn from the policies."""
        if self.discrete:  # which clock rings first is a draw from pi
            return (out if clocks is None else out - clocks.log()).argmax(-1)
        mean, log_std = out.chunk(2, -1)
        return mean if clocks is None else mean + log_std.exp() * clocks


class Mixer(nn.Module):
    """The weights and the bias of Eq. 1."""

    def __init__(self, inputs, num_agents, args, generators):
        super().__init__()
        self.net = mlp(inputs, num_agents + 1, args, generators)

    def forward(self, local, *context):
        """Local values (S, K, B), and what the weights depend on, (S, B, ...) -> the team's value, (S, 1, B)."""
        out = self.net(torch.cat(context, -1)).movedim(2, 1)  # (S, K + 1, B)
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
        critics = filter(None, [self.q, self.q_mixer])
        self.targets = copy.deepcopy(nn.ModuleList(critics)).requires_grad_(False)


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
    return team.v_mixer(local, state) if team.v_mixer else local


def joint_value(mixer, local, batch):
    """Q of Eq. 1, likewise, from the players' own, (S, K, B)."""
    return mixer(local, batch.state, batch.taken.transpose(1, 2).flatten(2)) if mixer else local


def local_values(networks, batch):
    """Each network's Q_i(o_i, a_i): (2, S, K, B)."""
    x = torch.cat([batch.obs, batch.taken], -1).flatten(0, 1)
    return torch.stack([network(x) for network in networks]).view(2, *batch.obs.shape[:3])


def advantage(team, batch):
    """Eq. 2, of the shape of V; its gradient is V's."""
    networks, *mixer = team.targets  # slow copies of Q_i and, where values are mixed, of w and b
    with torch.no_grad():
        q = joint_value(mixer[0] if mixer else None, local_values(networks, batch).amin(0), batch)
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
    return {name: Adam([p for net in filter(None, nets) for p in net.parameters()], args.lr)
            for name, nets in parts.items()}  # fmt: skip


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
    rows, central = layout.rows(dataset), args.team == "central"
    see = layout.inputs(rows["obs"], args)

    def encode(obs):
        return see(obs).flatten(-2)[..., None, :] if central else see(obs)

    state, avail, action = see_state(rows["state"], args)(rows["state"]), rows["avail_actions"], rows["actions"]
    if central:
        action, avail = as_one(action, avail), avail if avail is None else joint_mask(avail)
    reward = rows["reward"] * reward_scale(dataset, args)
    return Data(encode(rows["obs"]), state, avail, action, reward, rows["done"], rows["start"]), encode


def see_state(state, args):
    """The function that turns states (..., D) into the mixers' inputs; state (R, D) are the recorded ones."""
    if args.one_hot:
        return layout.one_hot(state)
    middle, spread = layout.units(state) if args.normalize else (0.0, 1.0)
    return lambda x: (x.to(state.dtype) - middle) / spread


def reward_scale(dataset, args):
    """What rewards are multiplied by."""
    return 1000 / (dataset.returns.max() - dataset.returns.min()).clamp(min=1e-6) if args.scale_rewards else 1.0


def as_one(action, avail):
    """All agents' actions as those of the central player: (..., N) -> (..., 1), or (..., N, A) -> (..., 1, N A)."""
    return action.flatten(-2)[..., None, :] if avail is None else joint_index(action, avail.shape)


def joint_mask(avail):
    """Which joint actions are available: (..., N, A) bool -> (..., 1, A^N)."""
    joint = avail[..., 0, :]
    for i in range(1, avail.shape[-2]):
        joint = (joint[..., None] & avail[..., i, None, :]).flatten(-2)
    return joint[..., None, :]


def joint_index(action, sizes):
    """The number of each joint action: (..., N) -> (..., 1)."""
    *_, N, A = sizes
    powers = A ** torch.arange(N - 1, -1, -1, device=action.device)
    return (action * powers).sum(-1, keepdim=True)


def act(policies, encode, obs, avail, memory, clocks=None):
    """What the teams do in B games of each seed, and their memory (there is none): obs (S, B, N, O), avail
    (S, B, N, A) or None -> (S, B, N) or (S, B, N, A). Greedy without clocks."""
    N, K = obs.shape[2], policies.N
    mask = avail if avail is None or K == N else joint_mask(avail)
    x, mask = (None if each is None else each.transpose(1, 2) for each in (encode(obs), mask))
    action = policies.sample(policies(x, mask), clocks).transpose(1, 2)  # (S, B, K) or (S, B, K, A)
    if not policies.discrete:
        return action.clamp(-1, 1).float().reshape(*obs.shape[:3], -1), memory
    if K < N:  # the digits of a joint action's number
        powers = avail.shape[-1] ** torch.arange(N - 1, -1, -1, device=obs.device)
        action = action // powers % avail.shape[-1]
    return action, memory


class Practice(nn.Module):
    """Room behind the dataset's rows for what the teams play while they are fine-tuned: E games of T steps a round.

    Attributes:
        data: the dataset's rows, and behind them the teams', into which the other attributes are views.
        own: (S, C) the rows where steps begin that a seed has played; count (S,) says how many of them it has.
    """

    def __init__(self, data, S, updates, time_limit):
        super().__init__()
        R, M, rounds = len(data.obs), len(data.steps), -(-updates // 10)
        self.T = min(10, time_limit)
        self.E = -(-M // (rounds * self.T))  # in the end there are as many steps of their own as in the data
        sizes = S, rounds, self.E, self.T + 1
        rooms = {name: x.new_zeros(math.prod(sizes), *x.shape[1:]) for name, x in data._asdict().items()
                 if x is not None and name != "steps"}  # fmt: skip
        self.data = data._replace(**{name: torch.cat([getattr(data, name), room]) for name, room in rooms.items()})
        for name in rooms:
            self.register_buffer(name, getattr(self.data, name)[R:].unflatten(0, sizes))
        self.register_buffer("row", torch.arange(R, R + math.prod(sizes), device=data.obs.device).view(sizes))
        self.register_buffer("own", data.steps.new_zeros(S, rounds * self.E * self.T + 1))
        self.register_buffer("count", data.steps.new_zeros(S))

    def draw(self, generators, args):
        """A minibatch for each seed, of recorded steps and its own, all equally likely: (S, B) rows."""
        M, B = len(self.data.steps), args.batch_size
        uniform = [torch.rand(B, generator=g, device=g.device, dtype=torch.float64) for g in generators]
        at = (torch.stack(uniform) * (M + self.count[:, None])).long()
        return torch.where(at < M, self.data.steps[at.clamp(max=M - 1)], self.own.gather(1, (at - M).clamp(min=0)))

    @torch.no_grad()
    def play(self, r, game, policies, encode, see, states, scale, generators):
        """Round r: every seed plays E games of the batch from recorded states, by sampling.

        states (R, D) are as recorded, see and scale what `see_state` and `reward_scale` return.
        """
        M, E, N, S = len(self.data.steps), self.E, game.num_agents, len(generators)
        begin = [torch.randint(M, (E,), generator=g, device=g.device) for g in generators]
        begin = states[self.data.steps[torch.stack(begin)]]  # (S, E, D)
        obs, info = game.set_state(begin.flatten(0, 1)) if hasattr(game, "set_state") else game.reset()
        going = torch.ones(S, E, dtype=torch.bool, device=obs.device)
        for t in range(self.T + 1):
            obs, state, avail = (None if x is None else x.unflatten(0, (S, E))
                                 for x in (obs, info["state"], info.get("avail_actions")))  # fmt: skip
            self.obs[:, r, :, t], self.state[:, r, :, t] = encode(obs), see(state)
            if avail is not None:
                self.avail[:, r, :, t] = avail if policies.N == N else joint_mask(avail)
            if t == self.T:
                return
            draws = torch.empty(policies.N, E, policies.A, device=obs.device)
            how = draws.exponential_ if policies.discrete else draws.normal_
            chance = torch.stack([how(generator=g).clone() for g in generators])
            action, _ = act(policies, encode, obs, avail, None, chance)
            obs, reward, ended, cut, info = game.step(action.flatten(0, 1))
            self.action[:, r, :, t] = action if policies.N == N else as_one(action, avail)
            self.reward[:, r, :, t], self.done[:, r, :, t] = reward.view(S, E) * scale, ended.view(S, E)
            place = torch.where(going, self.count[:, None] + going.cumsum(1) - 1, self.own.shape[1] - 1)
            self.own.scatter_(1, place, self.row[:, r, :, t])  # what follows a game's end goes to the last place
            self.count += going.sum(1)
            going &= ~(ended | cut).view(S, E)


def evaluate(policies, encode, args, step, episodes, device):
    """Scores (S, E) of the greedy teams of all seeds and, where actions are discrete, by sampling: `runs.score`."""
    clocks = (policies.N, -1, policies.A) if policies.discrete else None
    return runs.score(lambda *seen: act(policies, encode, *seen), args, step, episodes, device, clocks=clocks)


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("iql", args)
    method = {"central": "IQL", "mixed": "MAIQL", "independent": "independent IQL"}[args.team]
    device = run.device
    dataset = run.load(episodes=args.episodes)
    data, encode = arrange(dataset, args)
    team = Team(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adams, generators = optimizers(team, args), [runs.stream(seed, 1, device) for seed in run.seeds]
    learn, policies, practice, more = run.compile(update), team.policies, None, round(args.finetune * args.steps)
    if more:
        practice, method = Practice(data, args.num_seeds, more, runs.game(args).time_limit), f"{method}-ft"
        game, data = runs.game(args, args.num_seeds * practice.E, device), practice.data
        rows = layout.rows(dataset)
        known = game, policies, encode, see_state(rows["state"], args), rows["state"], reward_scale(dataset, args)
    logs = dict.fromkeys(("policy_loss", "q_loss", "v_loss"), torch.full((args.num_seeds,), math.nan))
    run.begin(team=team, adams=adams, generators=generators, **({"practice": practice} if practice else {}))

    for step in run.steps(args.steps + more, args.eval_every):
        if run.due(logs):
            scores = evaluate(policies, encode, args, step, args.eval_episodes, device)
            run.record(logs, {name: x.mean(1) for name, x in scores.items()})
        if step < args.steps:
            adams["policies"].lr.fill_(args.lr * (1 - step / args.steps))
            logs = learn(team, adams, data, draw_rows(generators, data, args), args)
        elif (tuned := step - args.steps) < more:
            if tuned % 10 == 0:
                practice.play(tuned // 10, *known, generators)
            adams["policies"].lr.fill_(args.lr * (1 - tuned / more))
            logs = learn(team, adams, data, practice.draw(generators, args), args)

    scores = evaluate(policies, encode, args, args.steps + more, 10 * args.eval_episodes, device)
    views, actions = dataset.obs.shape[2:], dataset.avail_actions.shape[-1] if policies.discrete else 0
    run.keep_team(lambda *seen: act(policies, encode, *seen), views, actions, 0, policies)
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
