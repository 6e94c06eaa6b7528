"""BC: behavioural cloning, the yardstick, and the file to read first. Each agent imitates its own
recorded actions.

The problem. A team of N agents learns from a fixed dataset of how others acted. It never plays
while it learns.

The idea. Agent i takes what was recorded for it, views o_i and actions a_i, as a supervised lesson,
and makes the recorded actions as likely as it can. It does not look at its teammates. It does not
ask what an action was worth. So it plays about as well as those who recorded the data, if these all
did the same. Where they followed several conventions, each agent learns a mixture of its halves of
them, and the halves that meet need not fit. What cloning gets from a dataset is what every other
method has to beat.

Equations, by numbers of our own. pi_i is agent i's policy, (o, a) a recorded step of all agents.
 1 discrete     log pi_i(a_i|o_i) = log softmax(f_i(o_i))[a_i], over the available actions
 2 continuous   log pi_i(a_i|o_i) = log N(a_i; mean_i(o_i), sigma_i(o_i)), entries independent,
     clipped when played
 3 loss         L(pi)             = -E sum_i log pi_i(a_i|o_i)
As the agents share nothing, the sum trains each of them by itself. Only the limit on a gradient's
length is the team's.

Commands, and the return you should see (last policy, greedy; one CPU core, torch 2.13):
  python algorithms/bc.py
      the coordination game, unfavourable data, 10 seeds at once, 6 s: 0 in 10 of 10 seeds;
      --dataset neutral 0.6 +- 0.16, favourable 1
  python algorithms/bc.py --env matrix --task xor --dataset aa-ab-ba
      XOR, 5 s: 0, both play A; sampled 0.41
  python algorithms/bc.py --env bridge
      Bridge, mixed data, 5 seeds, 6 s: sampled -13.8 +- 0.2 (the data -9.31); greedy anything from
      -1.2355, the best possible, to -19: who goes first is luck
  python algorithms/bc.py --env smac
      5m_vs_6m, medium-replay data, 3 seeds, 32 s: 43 % of the battles won (return 14.1), sampled
      0.2 % (5.2); the data 9 % (7.8)
  python algorithms/bc.py --env ant
      four agents share an ant, full-replay data, 3 seeds, 3 min: 3,567 +- 38 (the data 2,594)
  python algorithms/bc.py --env reacher
      two agents share an arm, 3 seeds, 2 min: normalised 0.89 +- 0.02 (1: the data);
      --task independent 0.70 +- 0.03, leader-only 0.83 +- 0.01

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, bc
  S, N, A, M = 2, 3, 4, 1000                          # seeds, agents, actions, recorded steps
  obs = torch.randn(M, N, 5)
  data = bc.Data(obs, torch.ones(M, N, A).bool(), obs[..., :A].argmax(-1))
  args = bc.Args(num_seeds=S, lr=1e-2)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  policies = bc.Policies(data, args, generators)
  adam = torch.optim.Adam(policies.parameters(), args.lr, fused=True)
  for step in range(300):
      logs = bc.update(policies, adam, data, bc.draw_rows(generators, data, args), args)
  views, avail = obs.transpose(0, 1).expand(S, N, M, 5), data.avail.transpose(0, 1)
  action = policies.sample(policies(views, avail))    # (S, N, M)

Choices made here:
  1. Every agent has a network of its own, without a memory: it acts on what it sees now.
  2. Views are in units of the data's mean and spread, or one-hot (Bridge's cells), or as they are
      (battles).
  3. A spread sigma_i depends on the view, begins at that of the recorded actions, and lies in
     [e^-6, 1]. Nothing squashes the mean. An action beyond [-1, 1] is clipped when it is played.
  4. Step sizes fall linearly to 0.
  5. Discrete policies are played by sampling, too: a mixture of conventions may be worth more than
     its likeliest action, or less.

Seeds differ in all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, Q = S N networks, B steps of a minibatch, M recorded steps, A actions (or
entries of an action), O observation, I inputs.
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
    env: str = (
        "matrix"  # matrix, bridge, smac, polynomial, reacher, halfcheetah, ant, or module:factory
    )
    task: str = ""  # its task; by default the coordination game, or the environment's first
    dataset: str = "unfavourable"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = (
        "sum"  # of the agents' rewards, in a game that is not ours
    )
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


BODY = dict(num_seeds=3, hidden=128, steps=5000, eval_every=1000, batch_size=256, lr=3e-4)
PRESETS = {  # what differs from the values above; "" is a game that is not ours
    "matrix": dict(task="coordination"),
    "bridge": dict(
        num_seeds=5, normalize=False, one_hot=True, batch_size=128, lr=2e-3, eval_episodes=32
    ),
    "smac": dict(
        task="5m_vs_6m",
        num_seeds=3,
        normalize=False,
        steps=2000,
        eval_every=500,
        eval_episodes=32,
        batch_size=512,
        lr=1e-3,
    ),
    "polynomial": BODY,
    "halfcheetah": BODY,
    "reacher": BODY,
    "ant": BODY,
    "": BODY,
}


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as M steps; in which order does not matter."""

    obs: torch.Tensor  # (M, N, I) what the policies see
    avail: torch.Tensor | None  # (M, N, A) bool; None where actions are continuous
    action: torch.Tensor  # (M, N) int64, or (M, N, A) in [-1, 1]


def draw_rows(generators, data, args):
    """A minibatch for each seed from its own generator, with replacement: (S, B) of M steps."""
    M, B = len(data.obs), args.batch_size
    rows = [torch.randint(M, (B,), generator=g, device=g.device) for g in generators]
    return torch.stack(rows)


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """Q independent linear layers as one batched product, each initialised by its own generator."""

    def __init__(self, inputs, outputs, generators, scale=1.0):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        start = [
            torch.empty(inputs + 1, outputs).uniform_(-bound, bound, generator=g)
            for g in generators
        ]
        start = torch.stack(start)
        self.weight = nn.Parameter(scale * start[:, :-1])  # (Q, in, out)
        self.bias = nn.Parameter(start[:, -1:] * (scale == 1))  # (Q, 1, out); heads begin at 0

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (Q, B, out)


def mlp(inputs, outputs, args, generators, scale=1.0):
    """A ReLU network for each generator: (Q, B, inputs) -> (Q, B, outputs)."""
    layers = []
    for _ in range(args.layers):
        layers += [Linear(inputs, args.hidden, generators), nn.ReLU()]
        inputs = args.hidden
    return nn.Sequential(*layers, Linear(inputs, outputs, generators, scale))


class Policies(nn.Module):
    """A policy for each agent of S teams."""

    def __init__(self, data, args, generators):
        super().__init__()
        _, self.N, I = data.obs.shape
        self.discrete = data.avail is not None
        self.A = (data.avail if self.discrete else data.action).shape[-1]
        outputs = self.A if self.discrete else 2 * self.A
        each = [g for g in generators for _ in range(self.N)]
        self.body = mlp(I, outputs, args, each, scale=0.1)
        if not self.discrete:  # actions begin as far apart as the recorded ones
            spread = data.action.std(0, correction=0).clamp(min=math.exp(-6), max=1)
            self.register_buffer("log_spread", spread.log()[:, None])  # (N, 1, A)

    def forward(self, obs, avail):
        """Log-probabilities of all actions (S, N, B, A) from views (S, N, B, I) and available
        actions (..., N, B, A); where actions are continuous (None) their means and log-deviations
        (S, N, B, 2A)."""
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
        error = (action - mean) / log_std.exp()
        return (-0.5 * error**2 - log_std - HALF_LOG_2PI).sum(-1)

    def sample(self, out, clocks=None):
        """The likeliest actions, (S, N, B) or (S, N, B, A); with exponential clocks (S, N, B, A)
        actions drawn from discrete policies."""
        if not self.discrete:
            return out.chunk(2, -1)[0]
        if clocks is not None:
            out = out - clocks.log()  # which clock rings first is a draw from pi
        return out.argmax(-1)


# ---------------------------------------------------------------- losses
def clone_loss(policies, obs, avail, action):
    """Eq. 3 for each seed, (S,)."""
    log_pi = policies.log_prob(policies(obs, avail), action)  # (S, N, B)
    return -log_pi.sum(1).mean(1)


# ---------------------------------------------------------------- update
@torch.compiler.disable  # a graph ends here, as torch.compile cannot hold an optimiser's step
def take_step(adam, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    adam.step()
    adam.zero_grad()


def descend(adam, module, losses, max_grad_norm):
    """One step down the losses (S,) of independent seeds, each with a gradient of limited length;
    returns them, detached.

    Their sum leaves each seed the gradient that it would have alone.
    """
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(losses.sum(), parameters)
    rows = [gradient.reshape(len(losses), -1) for gradient in gradients]
    length = sum((row**2).sum(1) for row in rows).sqrt()  # (S,)
    factor = (max_grad_norm / length.clamp(min=max_grad_norm))[:, None]
    losses = losses.detach()
    take_step(adam, parameters, [(row * factor).view_as(p) for row, p in zip(rows, parameters)])
    return losses


def update(policies, adam, data, rows, args):
    """One update of all agents of all seeds, on the steps `rows` (S, B); returns logs, (S,)."""
    obs = data.obs[rows].transpose(1, 2)  # (S, N, B, I)
    action = data.action[rows].transpose(1, 2)
    avail = data.avail[rows].transpose(1, 2) if policies.discrete else None  # (S, N, B, A)
    loss = clone_loss(policies, obs, avail, action)
    return {"policy_loss": descend(adam, policies, loss, args.max_grad_norm)}


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import layout
    from data.run import Run, launch, memoryless, read_args
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")


def arrange(dataset, args):
    """The dataset as `Data`, and what turns observations (..., N, O) into the policies' inputs."""
    rows = layout.rows(dataset)
    steps, avail = rows["start"], rows["avail_actions"]
    encode = layout.inputs(rows["obs"], args)
    avail = avail if avail is None else avail[steps]
    return Data(encode(rows["obs"])[steps], avail, rows["actions"][steps]), encode


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("bc", args)
    data, encode = arrange(run.load(), args)
    policies = Policies(data, args, run.streams(0, "cpu")).to(run.device)
    adam = torch.optim.Adam(policies.parameters(), args.lr, fused=True)
    generators = run.streams(1)
    learn = run.compile(update)
    run.begin(policies=policies, adam=adam, generators=generators)
    team = memoryless(policies, encode)
    for step in run.steps(team):  # evaluates, records and keeps where it is due
        adam.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        run.logs = learn(policies, adam, data, draw_rows(generators, data, args), args)
    return run.finish("BC", team)


def parse(argv=None):
    """Read the command line; where no flag speaks, the preset's values or a resumed run's hold."""
    return read_args(Args, PRESETS, argv, __doc__, may_be_zero="seed episodes eval_episodes layers")


if __name__ == "__main__":
    launch(main, parse)
