"""OMIGA: offline multi-agent RL with implicit global-to-local value regularisation.

Wang et al., NeurIPS 2023.

The problem. A team of N agents learns from a fixed dataset. A penalty that keeps the *joint* policy
near the recorded one is the right safeguard against actions that nobody tried. But each agent has
to act, and to learn, by itself.

The idea. Write the team's value as a weighted sum of local values, with weights w_i(s) >= 0. Then
the penalty on the joint policy falls apart into one for each agent. Every agent has a closed
solution: its recorded behaviour, times the exponential of its own advantage. Nothing is ever asked
about an action that is not in the data. V_i comes from a regression whose minimum is the soft
maximum over recorded actions, and the policy from cloning with weights. The weights and one bias,
b(s), hold the team together. So the method sees a joint action's worth only as far as a sum of
local values can tell it. A mixture of two conventions that exclude each other looks as good to it
as either, or better.

Equations, by numbers of our own. q_i(o_i, a_i) and v_i(o_i) are agent i's values, w_i(s) >= 0 and
b(s) the mixer's weights. A prime marks slowly moving copies, s' the next state; m is 0 where the
game ended by its own rules.
 1 mixing     Q(s, a) = sum_i w_i(s) q_i(o_i, a_i) + b(s),     V(s) = sum_i w_i(s) v_i(o_i) + b(s)
 2            L(q, w, b) = E [ Q(s, a) - r - gamma m V'(s') ]^2
 3 advantage  z_i     = clip( w'_i(s) (q'_i(o_i, a_i) - v_i(o_i)) / alpha, -10, 10 )
 4            L(v_i)  = E [ exp(z_i) + w'_i(s) v_i(o_i) / alpha ]
 5            L(pi_i) = -E [ exp(z_i) log pi_i(a_i|o_i) ]
Eq. 4 is level where E exp(z_i) = 1. The best policy is mu_i exp(w_i (q_i - v_i) / alpha), with mu_i
the recorded behaviour. With a large alpha every exp(z_i) is 1: plain cloning.

Commands, and the return you should see (last policy, greedy; one CPU core, torch 2.13):
  python algorithms/omiga.py
      the coordination game, unfavourable data, 10 seeds at once, 13 s: 0 in 10 of 10 seeds,
      sampled 0.05; the data 0.37
  python algorithms/omiga.py --env matrix --task xor --dataset aa-ab-ba
      13 s: 0 greedily and sampled: all play BB, which nobody recorded; the data 0.67
  python algorithms/omiga.py --env matrix --task m-ne --dataset imbalanced
      13 s: 5, the data's local optimum; best 20
  python algorithms/omiga.py --env bridge
      mixed data, 5 seeds, 81 s: sampled -2.19 +- 0.06; greedy -15.5, as both wait; best -1.2355,
      the data -9.31

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, omiga
  S, N, A, M = 2, 3, 4, 1000  # seeds, agents, actions, steps of one long episode
  obs, state = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6)
  avail, action = torch.ones(M + 1, N, A).bool(), torch.randint(A, (M + 1, N))
  reward = (action == obs[..., :A].argmax(-1)).float().mean(1)
  data = omiga.Data(obs, state, avail, action, reward, torch.zeros(M + 1), torch.arange(M))
  args = omiga.Args(num_seeds=S, alpha=0.1)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = omiga.Team(data, args, generators)
  adam = torch.optim.Adam(team.parameters(), args.lr, fused=True)
  for step in range(200):
      logs = omiga.update(team, adam, data, omiga.draw_rows(generators, data, args), args)
  out = team.policies(obs.transpose(0, 1).expand(S, N, M + 1, 5), avail.transpose(0, 1))
  greedy = team.policies.sample(out)  # (S, N, M + 1)

Differences from the authors' code, and choices made here:
  1. Each agent has networks of its own. The authors' agents share one of each kind, and are told
     which agent they are: --shared.
  2. alpha is in units of the rewards as they are. Both branches of the authors' code have 10, which
     with returns of 1 to 20 is almost cloning. `PRESETS` has less, but where returns are thousands.
  3. The authors divide Eq. 4 by exp(max z) of the whole minibatch, so that its scale hangs on one
     step, and limit the length of the gradient. Here only the latter is done, for each seed.
  4. log pi counts available actions only; theirs gives some of the mass to actions that cannot be
     played.
  5. Continuous policies are normal and clipped when played, as in bc.py, with log-deviations from
     -6 to 0. Theirs go through a tanh, which cannot reach the recorded actions at the bounds, and
     have log-deviations from -5 to 2.
  6. The end of the game is the environment's word; in the authors' StarCraft branch it is a state
     that does not change.
  7. The mixer is a network like the others, of the state. Theirs has one hidden layer of 64 units,
     and two linear heads, for w and for b; in StarCraft it sees what all agents see.
  8. Hidden layers have 64 units, and 128 on bodies; theirs 256. Copies move by tau = 0.01 an
     update; theirs by 0.005. A minibatch has from 64 steps in a matrix game to 512 in battles;
     theirs 128.
  9. Adam's step size is 0.001, and 0.0005 on bodies and in games that are not ours, and falls
     linearly to 0. Theirs stays 0.0005. They make a million updates.
 10. Policies have no memory, as in the authors' code, also in battles.

Seeds differ in all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, Q = S N networks (S if shared), B steps of a minibatch, M recorded steps,
R rows (observations), E games, A actions (or entries of an action), O observation, I inputs,
D state.
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

ILLEGAL = -1e10  # the logit of an action that is not available
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "matrix"  # matrix, bridge, smac, polynomial, a body's name, or module:factory
    task: str = ""  # its task; by default the coordination game, or the environment's first
    dataset: str = "unfavourable"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of agents' rewards, in games that are not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 10  # how many seeds train, all at once
    steps: int = 1000  # updates, one minibatch each
    eval_every: int = 250  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 10  # games per seed and evaluation; 0 to train without an environment
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # compile updates with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/omiga
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    alpha: float = 0.1  # the price of leaving the recorded behaviour, in units of the return
    gamma: float = 0.99  # discount
    shared: bool = False  # one network of each kind for all agents, told which agent it is
    # --- the optimisation
    normalize: bool = True  # views in units of the data's mean and spread
    one_hot: bool = False  # feed whole numbers as one-hot values (the cells of a grid)
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    batch_size: int = 64  # recorded steps per update
    lr: float = 1e-3  # Adam's step size, which falls linearly to 0
    tau: float = 0.01  # how far a target network moves in an update
    max_grad_norm: float = 1.0  # longest gradient of one seed's agents


SMALL = dict(normalize=False, steps=3000, eval_every=500, eval_episodes=32)
LONG = dict(num_seeds=3, steps=10_000, eval_every=2000)
BODY = LONG | dict(hidden=128, batch_size=256, lr=5e-4, alpha=1.0)
PRESETS = {  # what differs from the values above, by environment; "" is a game that is not ours
    "matrix": dict(task="coordination"),
    "bridge": SMALL | dict(num_seeds=5, one_hot=True, batch_size=128),
    "smac": SMALL | dict(task="5m_vs_6m", num_seeds=3, batch_size=512, alpha=1.0),
    "polynomial": dict(steps=3000, eval_every=1000, alpha=1.0, normalize=False),
    "reacher": BODY,
    "halfcheetah": BODY | dict(alpha=10.0),
    "ant": BODY | dict(alpha=10.0),
    "": BODY,
}


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end.

    In an episode's last row no step begins. If agents share networks, `obs` says whose eyes it is.
    """

    obs: torch.Tensor  # (R, N, I) what the policies see
    state: torch.Tensor  # (R, D) what the mixer sees
    avail: torch.Tensor | None  # (R, N, A) bool, what can be played; None if actions are continuous
    action: torch.Tensor  # (R, N) int64, or (R, N, A) in [-1, 1], of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    steps: torch.Tensor  # (M,) rows where a step begins; its next observation is in the next row


def draw_rows(generators, data, args):
    """Rows (S, B) where a step begins: each seed's minibatch, drawn with replacement."""
    M, B = len(data.steps), args.batch_size
    drawn = [torch.randint(M, (B,), generator=g, device=g.device) for g in generators]
    return data.steps[torch.stack(drawn)]


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


def owners(generators, num_agents, args):
    """A generator for each network: one an agent or, if they share, one a seed."""
    return generators if args.shared else [g for g in generators for _ in range(num_agents)]


def side_by_side(network, x):
    """What agents' networks make of x: (S, N, B, I) -> (S, N, B, out)."""
    Q = len(network[0].weight)
    return network(x.reshape(Q, -1, x.shape[-1])).view(*x.shape[:3], -1)


class Policies(nn.Module):
    """A policy for each agent of S teams."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.discrete = data.avail is not None
        self.A = (data.avail if self.discrete else data.action).shape[-1]
        _, self.N, I = data.obs.shape
        outputs = self.A if self.discrete else 2 * self.A
        self.body = mlp(I, outputs, args, owners(generators, self.N, args), scale=0.1)
        if not self.discrete:  # actions begin as far apart as the recorded ones
            spread = data.action[data.steps].std(0, correction=0)
            log_spread = spread.clamp(min=math.exp(-6), max=1).log()
            self.register_buffer("log_spread", log_spread[:, None])  # (N, 1, A)

    def forward(self, obs, avail):
        """From views (S, N, B, I), and what can be played (..., N, B, A), None if continuous.

        Returns the log-probabilities of all actions (S, N, B, A), or the means and log-deviations
        of continuous ones (S, N, B, 2A).
        """
        out = side_by_side(self.body, obs)
        if self.discrete:
            return F.log_softmax(out.masked_fill(~avail, ILLEGAL), -1)
        mean, log_std = out.chunk(2, -1)
        return torch.cat([mean, (self.log_spread + log_std).clamp(-6, 0)], -1)

    def log_prob(self, out, action):
        """log pi_i of Eq. 5 for actions (S, N, B, A), (S, N, B); `out` from `forward`."""
        if self.discrete:  # of one-hot actions
            return (out * action).sum(-1)
        mean, log_std = out.chunk(2, -1)
        z = (action - mean) / log_std.exp()
        return (-0.5 * z**2 - log_std - HALF_LOG_2PI).sum(-1)

    def sample(self, out, clocks=None):
        """The likeliest actions, (S, N, B) or (S, N, B, A).

        With exponential clocks (S, N, B, A) discrete policies are sampled.
        """
        if not self.discrete:
            return out.chunk(2, -1)[0]
        if clocks is None:
            return out.argmax(-1)
        return (out - clocks.log()).argmax(-1)  # which clock rings first is a draw from pi


class Mixer(nn.Module):
    """The weights w_i(s) >= 0 and the bias b(s) of Eq. 1."""

    def __init__(self, inputs, num_agents, args, generators):
        super().__init__()
        self.net = mlp(inputs, num_agents + 1, args, generators)

    def forward(self, state):
        """(S, B, D) -> (S, N, B) and (S, B)."""
        out = self.net(state).movedim(2, 1)  # (S, N + 1, B)
        return out[:, :-1].abs(), out[:, -1]


class Team(nn.Module):
    """Everything that S teams learn."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.policies = Policies(data, args, generators)
        _, N, I = data.obs.shape
        each = owners(generators, N, args)
        q = mlp(I + self.policies.A, 1, args, each)
        self.v = mlp(I, 1, args, each)
        mixer = Mixer(data.state.shape[1], N, args, generators)
        self.critic = nn.ModuleList([q, mixer])
        networks = nn.ModuleList([self.critic, self.v])
        self.targets = copy.deepcopy(networks).requires_grad_(False)


def local_values(network, *x):
    """The agents' q_i or v_i, (S, N, B), of inputs (S, N, B, ...)."""
    return side_by_side(network, torch.cat(x, -1)).squeeze(-1)


# ---------------------------------------------------------------- losses
def gather(data, rows):
    """What the rows (S, B) hold, as `Data` of a minibatch.

    Agents come before steps, (S, N, B, ...), and discrete actions are one-hot, (S, N, B, A). State
    is (S, B, D), reward and done are (S, B).
    """
    obs = data.obs[rows].transpose(1, 2)
    action = data.action[rows].transpose(1, 2)
    avail = data.avail
    if avail is not None:
        avail = avail[rows].transpose(1, 2)
        action = F.one_hot(action, avail.shape[-1]).to(obs.dtype)
    return Data(obs, data.state[rows], avail, action, data.reward[rows], data.done[rows], rows)


def critic_loss(team, batch, later, gamma):
    """Eq. 2 for each seed, (S,); later: what the next rows hold."""
    (_, target_mixer), target_v = team.targets
    with torch.no_grad():
        w, b = target_mixer(later.state)
        next_v = (w * local_values(target_v, later.obs)).sum(1) + b  # (S, B)
        y = batch.reward + gamma * (1 - batch.done) * next_v
    q, mixer = team.critic
    w, b = mixer(batch.state)
    joint_q = (w * local_values(q, batch.obs, batch.action)).sum(1) + b
    return ((joint_q - y) ** 2).mean(1)


def advantage(team, batch, alpha):
    """Eq. 3: z_i, and the w'_i and v_i in it, (S, N, B) each; only v has a gradient."""
    (target_q, target_mixer), _ = team.targets
    with torch.no_grad():
        w, _ = target_mixer(batch.state)
        q = local_values(target_q, batch.obs, batch.action)
    v = local_values(team.v, batch.obs)
    return (w * (q - v) / alpha).clamp(-10, 10), w, v


def value_loss(team, batch, alpha):
    """Eq. 4, the mean over agents, for each seed, (S,)."""
    z, w, v = advantage(team, batch, alpha)
    return (z.exp() + w * v / alpha).mean((1, 2))


def policy_loss(policies, batch, weight):
    """Eq. 5, summed over agents, for each seed, (S,); weight: exp(z_i), (S, N, B)."""
    log_pi = policies.log_prob(policies(batch.obs, batch.avail), batch.action)
    return -(weight * log_pi).sum(1).mean(1)


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


def update(team, adam, data, rows, args):
    """One update of all networks, on the steps that begin in `rows` (S, B); returns logs, (S,)."""
    batch = gather(data, rows)
    later = gather(data, rows + 1)
    limit = args.max_grad_norm
    with torch.no_grad():
        weight = advantage(team, batch, args.alpha)[0].exp()  # (S, N, B)
    pi_loss = descend(adam, team.policies, policy_loss(team.policies, batch, weight), limit)
    q_loss = descend(adam, team.critic, critic_loss(team, batch, later, args.gamma), limit)
    v_loss = descend(adam, team.v, value_loss(team, batch, args.alpha), limit)
    networks = [*team.critic.parameters(), *team.v.parameters()]
    with torch.no_grad():
        for slow, quick in zip(team.targets.parameters(), networks):
            slow.lerp_(quick, args.tau)
    weight = weight.mean((1, 2))
    return {"policy_loss": pi_loss, "q_loss": q_loss, "v_loss": v_loss, "weight": weight}


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import layout
    from data.run import Run, launch, memoryless, read_args
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")


def arrange(dataset, args):
    """The dataset as `Data`, and the function from observations (..., N, O) to policies' inputs."""
    rows = layout.rows(dataset)
    view = layout.inputs(rows["obs"], args)
    see_state = layout.inputs(rows["state"], args)
    N = rows["obs"].shape[1]

    def encode(obs):
        seen = view(obs)
        if not args.shared:
            return seen
        who = torch.eye(N, dtype=seen.dtype, device=seen.device)
        return torch.cat([seen, who.expand(*seen.shape[:-1], N)], -1)

    rest = [rows[name] for name in ("avail_actions", "actions", "reward", "done", "start")]
    return Data(encode(rows["obs"]), see_state(rows["state"]), *rest), encode


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("omiga", args)
    data, encode = arrange(run.load(), args)
    team = Team(data, args, run.streams(0, "cpu")).to(run.device)
    adam = torch.optim.Adam(team.parameters(), args.lr, fused=True)
    generators = run.streams(1)
    learn = run.compile(update)
    run.begin(team=team, adam=adam, generators=generators)
    players = memoryless(team.policies, encode)
    for step in run.steps(players):
        adam.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        run.logs = learn(team, adam, data, draw_rows(generators, data, args), args)
    return run.finish("OMIGA", players)


def parse(argv=None):
    """Read the command line; where no flag speaks, the preset's values or a resumed run's hold."""
    zero = "seed episodes eval_episodes layers gamma"
    return read_args(Args, PRESETS, argv, __doc__, may_be_zero=zero, at_most_one="gamma tau")


if __name__ == "__main__":
    launch(main, parse)
