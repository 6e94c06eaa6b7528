"""BC: behavioural cloning, the yardstick, and the file to read first. Each agent imitates its own recorded actions.

The problem. A team of N agents learns from a fixed dataset of how others acted; it never plays while it learns.

The idea. Agent i takes what was recorded for it, views o_i and actions a_i, as a supervised lesson, and makes the
recorded actions as likely as it can. It does not look at its teammates, and it does not ask what an action was worth.
So it plays about as well as those who recorded the data if these all did the same. Where they followed several
conventions, each agent learns a mixture of its halves of them, and the halves that meet need not fit. What cloning gets
from a dataset is what every other method has to beat.

Equations, by numbers of our own. pi_i is agent i's policy, (o, a) a recorded step of all agents.
 1 discrete     log pi_i(a_i|o_i) = log softmax(f_i(o_i))[a_i], over the available actions
 2 continuous   log pi_i(a_i|o_i) = log N(a_i; mean_i(o_i), sigma_i(o_i)), entries independent, clipped when played
 3 loss         L(pi)             = -E sum_i log pi_i(a_i|o_i)
As the agents share nothing, the sum trains each of them by itself; only the limit on a gradient's length is the team's.

Commands, and the return you should see (last policy, greedy; one CPU core of a small server, torch 2.13):
  python algorithms/bc.py                                      the coordination game, unfavourable data, 10 seeds at
      once, 6 s: 0 in 10 of 10 seeds; --dataset neutral 0.6 +- 0.16, favourable 1
  python algorithms/bc.py --env matrix --task xor --dataset aa-ab-ba   XOR, 5 s: 0, both play A; sampled 0.41
  python algorithms/bc.py --env bridge                         Bridge, mixed data, 5 seeds, 6 s: sampled -13.8 +- 0.2
      (the data -9.31); greedy anything from -1.2355, the best possible, to -19, by luck: who goes first?
  python algorithms/bc.py --env smac                           5m_vs_6m, medium-replay data, 3 seeds, 32 s: 43 % of the
      battles won (return 14.1), sampled 0.2 % (5.2); the data 9 % (7.8)
  python algorithms/bc.py --env ant                            four agents share an ant, full-replay data, 3 seeds, 3
      min: 3,567 +- 38 (the data 2,594)
  python algorithms/bc.py --env reacher --task all-observant   two agents share an arm, 3 seeds, 2 min: normalised 0.89
      +- 0.02 (1: the data); --task independent 0.70 +- 0.03, leader-only 0.83 +- 0.01, of data before commit 3489905

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, bc
  S, N, A, M = 2, 3, 4, 1000                                       # seeds, agents, actions, recorded steps
  obs = torch.randn(M, N, 5)
  data = bc.Data(obs, torch.ones(M, N, A).bool(), obs[..., :A].argmax(-1))
  args = bc.Args(num_seeds=S, lr=1e-2)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  policies = bc.Policies(data, args, generators)
  adam = bc.Adam(policies.parameters(), args.lr)
  for step in range(300):
      logs = bc.update(policies, adam, data, bc.draw_rows(generators, data, args), args)
  action = policies.sample(policies(obs.transpose(0, 1).expand(S, N, M, 5), data.avail.transpose(0, 1)))  # (S, N, M)

Choices made here:
  1. Every agent has a network of its own, without a number of its own or a memory: it acts on what it sees now.
  2. Views are in units of the data's mean and spread, or one-hot (Bridge's cells), or as they are (battles).
  3. A spread sigma_i depends on the view, begins at that of the recorded actions, and lies in [e^-6, 1]. Nothing
     squashes the mean; an action beyond [-1, 1] is clipped when it is played.
  4. Step sizes fall linearly to 0.
  5. Discrete policies are played by sampling, too: a mixture of conventions may be worth more than its likeliest
     action, or less.

Seeds differ in all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, Q = S N networks, B steps of a minibatch, M recorded steps, E games, A actions (or entries of
an action), O observation, I inputs.
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
    out_dir: str = ""  # the run's folder; by default a new one in runs/bc
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the optimisation
    normalize: bool = True  # views in units of the data's mean and spread
    one_hot: bool = False  # feed whole numbers as one-hot values (the cells of a grid)
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    batch_size: int = 64  # recorded steps per update
    lr: float = 1e-2  # Adam's step size, which falls linearly to 0
    max_grad_norm: float = 1.0  # longest gradient of one seed's agents


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as M steps; in which order does not matter."""

    obs: torch.Tensor  # (M, N, I) what the policies see
    avail: torch.Tensor | None  # (M, N, A) bool, the available actions; None where actions are continuous
    action: torch.Tensor  # (M, N) int64, or (M, N, A) in [-1, 1]


def draw_rows(generators, data, args):
    """A minibatch for each seed, with replacement, from its own generator: (S, B) of the M steps."""
    M, B = len(data.obs), args.batch_size
    return torch.stack([torch.randint(M, (B,), generator=g, device=g.device) for g in generators])


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
    """A policy for each agent of S teams."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, self.N, I), self.discrete = data.obs.shape, data.avail is not None
        self.A = (data.avail if self.discrete else data.action).shape[-1]
        each = [g for g in generators for _ in range(self.N)]
        self.body = mlp(I, self.A * (1 if self.discrete else 2), args, each, scale=0.1)
        if not self.discrete:  # actions begin as far apart as the recorded ones
            spread = data.action.std(0, correction=0).clamp(min=math.exp(-6), max=1)
            self.register_buffer("log_spread", spread.log()[:, None])  # (N, 1, A)

    def forward(self, obs, avail):
        """Log-probabilities of all actions (S, N, B, A) from views (S, N, B, I) and available actions (..., N, B, A);
        where actions are continuous (None) their means and log-deviations (S, N, B, 2A)."""
        out = self.body(obs.flatten(0, 1)).view(*obs.shape[:3], -1)
        if self.discrete:
            return F.log_softmax(out.masked_fill(~avail, ILLEGAL), -1)
        mean, log_std = out.chunk(2, -1)
        return torch.cat([mean, (self.log_spread + log_std).clamp(-6, 0)], -1)

    def log_prob(self, out, action):
        """Log-probability of each agent's action, (S, N, B); `out` from `forward`."""
        if self.discrete:  # Eq. 1
            return out.gather(-1, action[..., None])[..., 0]
        mean, log_std = out.chunk(2, -1)  # Eq. 2
        return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - HALF_LOG_2PI).sum(-1)

    def sample(self, out, clocks=None):
        """The likeliest actions, (S, N, B) or (S, N, B, A); with exponential clocks (S, N, B, A) actions drawn from
        discrete policies."""
        if self.discrete:  # which clock rings first is a draw from pi
            return (out if clocks is None else out - clocks.log()).argmax(-1)
        return out.chunk(2, -1)[0]


# ---------------------------------------------------------------- losses
def clone_loss(policies, obs, avail, action):
    """Eq. 3 for each seed, (S,)."""
    return -policies.log_prob(policies(obs, avail), action).sum(1).mean(1)


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


def update(policies, adam, data, rows, args):
    """One update of all agents of all seeds, on the steps `rows` (S, B); returns diagnostics, (S,) tensors."""
    avail = data.avail[rows].transpose(1, 2) if policies.discrete else None  # (S, N, B, A)
    loss = clone_loss(policies, data.obs[rows].transpose(1, 2), avail, data.action[rows].transpose(1, 2))
    descend(adam, loss, args)
    return {"policy_loss": loss.detach()}


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
    small = dict(hidden=64, normalize=False, steps=1000, eval_every=250)
    body = dict(num_seeds=3, hidden=128, steps=5000, eval_every=1000, batch_size=256, lr=3e-4)
    unknown = body | dict(dataset="")
    values = {
        "matrix": dict(dataset=datasets.names("matrix", task)[-1]) if env == "matrix" else {},
        "bridge": small | dict(dataset="mixed", num_seeds=5, one_hot=True, batch_size=128, lr=2e-3, eval_episodes=32),
        "smac": small | dict(dataset="medium-replay", num_seeds=3, steps=2000, eval_every=500, batch_size=512, lr=1e-3,
                             eval_episodes=32),
        "polynomial": body | dict(dataset="peak-0.5"), "halfcheetah": body | dict(dataset="good"),
        "reacher": body | dict(dataset="expert-mix"), "ant": body | dict(dataset="full-replay"),
    }  # fmt: skip
    return values.get(env, unknown) | dict(env=env, task=task)


def arrange(dataset, args):
    """The dataset as `Data`, and the function that turns observations (..., N, O) into the policies' inputs."""
    rows = layout.rows(dataset)
    steps, avail, encode = rows["start"], rows["avail_actions"], layout.inputs(rows["obs"], args)
    return Data(encode(rows["obs"])[steps], None if avail is None else avail[steps], rows["actions"][steps]), encode


def evaluate(policies, encode, args, step, episodes, device):
    """Scores (S, E) of the greedy teams of all seeds and, where actions are discrete, by sampling: `runs.score`."""
    clocks = (policies.N, -1, policies.A) if policies.discrete else None
    return runs.score(lambda *seen: runs.react(policies, encode, *seen), args, step, episodes, device, clocks=clocks)


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("bc", args)
    device = run.device
    dataset = run.load(episodes=args.episodes)
    data, encode = arrange(dataset, args)
    policies = Policies(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adam, generators = Adam(policies.parameters(), args.lr), [runs.stream(seed, 1, device) for seed in run.seeds]
    learn, logs = run.compile(update), {"policy_loss": torch.full((args.num_seeds,), math.nan)}
    run.begin(policies=policies, adam=adam, generators=generators)

    for step in run.steps(args.steps, args.eval_every):
        if run.due(logs):
            scores = evaluate(policies, encode, args, step, args.eval_episodes, device)
            run.record(logs, {name: x.mean(1) for name, x in scores.items()})
        if step < args.steps:
            adam.lr.fill_(args.lr * (1 - step / args.steps))
            logs = learn(policies, adam, data, draw_rows(generators, data, args), args)

    scores = evaluate(policies, encode, args, args.steps, 10 * args.eval_episodes, device)
    views, actions = dataset.obs.shape[2:], policies.A * policies.discrete
    run.keep_team(lambda *seen: runs.react(policies, encode, *seen), views, actions, 0, policies)
    return run.finish("BC", scores, dataset, run.best)


def parse(argv=None):
    """Read the command line; where no flag speaks, the environment's own values or those of the resumed run hold."""
    args = runs.parse(Args, preset, argv, __doc__)
    runs.check_numbers(args, may_be_zero="seed episodes eval_episodes layers")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
