"""OMIGA: offline multi-agent RL with implicit global-to-local value regularisation (Wang et al., NeurIPS 2023).

The problem. A team of N agents learns from a fixed dataset. A penalty that keeps the *joint* policy near the recorded
one is the right safeguard against actions that nobody tried, but each agent has to act, and to learn, by itself.

The idea. Write the team's value as a weighted sum of local values, with weights w_i(s) >= 0. Then the penalty on the
joint policy falls apart into one for each agent, and every agent has a closed solution: its recorded behaviour, times
the exponential of its own advantage. Nothing is ever asked about an action that is not in the data: V_i is found by a
regression whose minimum is the soft maximum over recorded actions, and the policy by cloning with weights. What holds
the team together are the weights and one bias, b(s), and so the method sees a joint action's worth only as far as a sum
of local values can tell it: a mixture of two conventions that exclude each other looks as good to it, or better.

Equations, by numbers of our own. q_i(o_i, a_i) and v_i(o_i) are agent i's values, w_i(s) >= 0 and b(s) the mixer's
weights; a prime marks slowly moving copies, s' the next state; m is 0 where the game ended by its own rules.
 1 mixing     Q(s, a) = sum_i w_i(s) q_i(o_i, a_i) + b(s),     V(s) = sum_i w_i(s) v_i(o_i) + b(s)
 2            L(q, w, b) = E [ Q(s, a) - r - gamma m V'(s') ]^2
 3 advantage  z_i     = clip( w'_i(s) (q'_i(o_i, a_i) - v_i(o_i)) / alpha, -10, 10 )
 4            L(v_i)  = E [ exp(z_i) + w'_i(s) v_i(o_i) / alpha ]       level where E exp(z_i) = 1
 5            L(pi_i) = -E [ exp(z_i) log pi_i(a_i|o_i) ]               so pi_i is mu_i exp(w_i (q_i - v_i) / alpha)
mu_i is the recorded behaviour. With a large alpha every exp(z_i) is 1: plain cloning.

Commands, and the return you should see (last policy, greedy; one CPU core of a small server, torch 2.13):
  python algorithms/omiga.py                                   the coordination game, unfavourable data, 10 seeds at
      once, 13 s: 0 in 10 of 10 seeds, sampled 0.05; the data 0.37
  python algorithms/omiga.py --env matrix --task xor --dataset aa-ab-ba   13 s: 0 greedily and sampled: all play BB,
      which nobody recorded; the data 0.67
  python algorithms/omiga.py --env matrix --task m-ne --dataset imbalanced   13 s: 5, the data's local optimum; best 20
  python algorithms/omiga.py --env bridge                      mixed data, 5 seeds, 81 s: sampled -2.19 +- 0.06, greedy
      -15.5, both wait; best -1.2355, the data -9.31

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, omiga
  S, N, A, M = 2, 3, 4, 1000                                       # seeds, agents, actions, steps of one long episode
  obs, state, action = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6), torch.randint(A, (M + 1, N))
  reward, none = (action == obs[..., :A].argmax(-1)).float().mean(1), torch.zeros(M + 1)
  data = omiga.Data(obs, state, torch.ones(M + 1, N, A).bool(), action, reward, none, torch.arange(M))
  args = omiga.Args(num_seeds=S, alpha=0.1)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = omiga.Team(data, args, generators)
  adams = omiga.optimizers(team, args)
  for step in range(200):
      logs = omiga.update(team, adams, data, omiga.draw_rows(generators, data, args), args)
  greedy = team.policies.sample(team.policies(obs.transpose(0, 1).expand(S, N, M + 1, 5), data.avail.transpose(0, 1)))

Differences from the authors' code, and choices made here:
  1. Each agent has networks of its own; the authors' agents share one of each kind, told which agent it is: --shared.
  2. alpha is in units of the rewards as they are: 10 in both branches of the authors' code, which with returns of 1 to
     20 is almost cloning. Ours is smaller (see `preset`), but where returns are thousands, on HalfCheetah and the ant.
  3. The authors divide Eq. 4 by exp(max z) of the whole minibatch, so that its scale hangs on one step, and limit the
     length of the gradient. Here only the latter is done, for each seed.
  4. log pi counts available actions only; theirs gives some of the mass to actions that cannot be played.
  5. Continuous policies are normal and clipped when played, as in bc.py; theirs go through a tanh, which cannot reach
     the recorded actions at the bounds.
  6. The end of the game is the environment's word; in the authors' StarCraft branch it is a state that does not change.
  7. Policies have no memory, as in the authors' code, also in battles. Step sizes fall linearly to 0.

Seeds differ in all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, Q = S N networks (S if shared), B steps of a minibatch, M recorded steps, R rows
(observations), E games, A actions (or entries of an action), O observation, I inputs, D state.
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
    out_dir: str = ""  # the run's folder; by default a new one in runs/omiga
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    alpha: float = 0.1  # how dear it is to leave the recorded behaviour, in units of the return
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


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end. In an episode's last row no step begins."""

    obs: torch.Tensor  # (R, N, I) what the policies see; if they share a network, whose eyes these are belongs to it
    state: torch.Tensor  # (R, D) what the mixer sees
    avail: torch.Tensor | None  # (R, N, A) bool, the available actions; None where actions are continuous
    action: torch.Tensor  # (R, N) int64, or (R, N, A) in [-1, 1], of the step that begins in a row
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


def owners(generators, num_agents, args):
    """A generator for each network: of each agent of each seed or, where agents share, of each seed."""
    return generators if args.shared else [g for g in generators for _ in range(num_agents)]


def side_by_side(network, x):
    """What the networks of S teams, an agent's own or shared, make of the agents' x: (S, N, B, I) -> (S, N, B, out)."""
    return network(x.reshape(len(network[0].weight), -1, x.shape[-1])).view(*x.shape[:3], -1)


class Policies(nn.Module):
    """A policy for each agent of S teams."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, self.N, I), self.discrete = data.obs.shape, data.avail is not None
        self.A = (data.avail if self.discrete else data.action).shape[-1]
        each = owners(generators, self.N, args)
        self.body = mlp(I, self.A * (1 if self.discrete else 2), args, each, scale=0.1)
        if not self.discrete:  # actions begin as far apart as the recorded ones
            spread = data.action[data.steps].std(0, correction=0).clamp(min=math.exp(-6), max=1)
            self.register_buffer("log_spread", spread.log()[:, None])  # (N, 1, A)

    def forward(self, obs, avail):
        """Log-probabilities of all actions (S, N, B, A) from views (S, N, B, I) and available actions (..., N, B, A);
        where actions are continuous (None) their means and log-deviations (S, N, B, 2A)."""
        out = side_by_side(self.body, obs)
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
        """The likeliest actions, (S, N, B) or (S, N, B, A); with exponential clocks (S, N, B, A) actions drawn from
        discrete policies."""
        if self.discrete:  # which clock rings first is a draw from pi
            return (out if clocks is None else out - clocks.log()).argmax(-1)
        return out.chunk(2, -1)[0]


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
        (_, N, I), A = data.obs.shape, self.policies.A
        each = owners(generators, N, args)
        self.q, self.v = mlp(I + A, 1, args, each), mlp(I, 1, args, each)
        self.mixer = Mixer(data.state.shape[1], N, args, generators)
        self.targets = copy.deepcopy(nn.ModuleList([self.q, self.v, self.mixer])).requires_grad_(False)

    def local(self, network, *x):
        """Values of agents, (S, N, B), by networks of inputs (S, N, B, ...)."""
        return side_by_side(network, torch.cat(x, -1)).squeeze(-1)


# ---------------------------------------------------------------- losses
class Batch(NamedTuple):
    """B recorded steps of each seed."""

    obs: torch.Tensor  # (S, N, B, I)
    next_obs: torch.Tensor
    state: torch.Tensor  # (S, B, D)
    next_state: torch.Tensor
    avail: torch.Tensor | None  # (S, N, B, A) bool
    action: torch.Tensor  # (S, N, B) or (S, N, B, A)
    taken: torch.Tensor  # (S, N, B, A) the same, one-hot where actions are discrete
    reward: torch.Tensor  # (S, B)
    done: torch.Tensor  # (S, B)


def gather(data, rows):
    """The steps that begin in the rows (S, B) as a `Batch`."""
    obs, next_obs, action = (x.transpose(1, 2) for x in (data.obs[rows], data.obs[rows + 1], data.action[rows]))
    avail = None if data.avail is None else data.avail[rows].transpose(1, 2)
    taken = action if avail is None else F.one_hot(action, avail.shape[-1]).to(obs.dtype)
    rest = data.reward[rows], data.done[rows]
    return Batch(obs, next_obs, data.state[rows], data.state[rows + 1], avail, action, taken, *rest)


def critic_loss(team, batch, gamma):
    """Eq. 2 for each seed, (S,)."""
    _, target_v, target_mixer = team.targets
    with torch.no_grad():
        weight, bias = target_mixer(batch.next_state)
        next_v = (weight * team.local(target_v, batch.next_obs)).sum(1) + bias  # (S, B)
        y = batch.reward + gamma * (1 - batch.done) * next_v
    weight, bias = team.mixer(batch.state)
    q = (weight * team.local(team.q, batch.obs, batch.taken)).sum(1) + bias
    return ((q - y) ** 2).mean(1)


def value_loss(team, batch, alpha):
    """Eq. 4, the mean over agents, for each seed, (S,), and the exp(z_i) of Eq. 3, (S, N, B)."""
    target_q, _, target_mixer = team.targets
    with torch.no_grad():
        weight, _ = target_mixer(batch.state)  # (S, N, B)
        q = team.local(target_q, batch.obs, batch.taken)
    v = team.local(team.v, batch.obs)
    exp_z = (weight * (q - v) / alpha).clamp(-10, 10).exp()
    return (exp_z + weight * v / alpha).mean((1, 2)), exp_z.detach()


def policy_loss(policies, batch, exp_z):
    """Eq. 5, summed over agents, for each seed, (S,)."""
    return -(exp_z * policies.log_prob(policies(batch.obs, batch.avail), batch.action)).sum(1).mean(1)


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
    """Adam for the policies, for q with the mixer, and for v."""
    parts = {"policies": [team.policies], "critics": [team.q, team.mixer], "values": [team.v]}
    return {name: Adam([p for net in nets for p in net.parameters()], args.lr) for name, nets in parts.items()}


def update(team, adams, data, rows, args):
    """One update of all networks of all seeds, on the steps that begin in `rows` (S, B); returns diagnostics, (S,)."""
    batch = gather(data, rows)
    v_loss, exp_z = value_loss(team, batch, args.alpha)
    losses = {"policies": policy_loss(team.policies, batch, exp_z), "critics": critic_loss(team, batch, args.gamma)}
    losses["values"] = v_loss
    for name, loss in losses.items():
        descend(adams[name], loss, args)
    with torch.no_grad():
        networks = nn.ModuleList([team.q, team.v, team.mixer])
        torch._foreach_lerp_(list(team.targets.parameters()), list(networks.parameters()), args.tau)
    logs = {"policy_loss": losses["policies"], "q_loss": losses["critics"], "v_loss": v_loss}
    return {name: loss.detach() for name, loss in logs.items()} | {"weight": exp_z.mean((1, 2))}


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
    body = dict(num_seeds=3, hidden=128, steps=10_000, eval_every=2000, batch_size=256, lr=5e-4, alpha=1.0)
    values = {
        "matrix": dict(dataset=datasets.names("matrix", task)[-1]) if env == "matrix" else {},
        "bridge": small | dict(dataset="mixed", num_seeds=5, one_hot=True, batch_size=128, eval_episodes=32),
        "smac": small | dict(dataset="medium-replay", num_seeds=3, batch_size=512, eval_episodes=32, alpha=1.0),
        "polynomial": body | dict(dataset="peak-0.5", num_seeds=10, steps=3000, eval_every=1000, hidden=64,
                                  batch_size=64, lr=1e-3, normalize=False),
        "halfcheetah": body | dict(dataset="good", alpha=10.0), "ant": body | dict(dataset="full-replay", alpha=10.0),
        "reacher": body | dict(dataset="expert-mix"),
    }  # fmt: skip
    return values.get(env, body | dict(dataset="")) | dict(env=env, task=task)


def arrange(dataset, args):
    """The dataset as `Data`, and the function that turns observations (..., N, O) into the policies' inputs."""
    rows = layout.rows(dataset)
    view, see = (layout.inputs(rows[name], args) for name in ("obs", "state"))
    N = rows["obs"].shape[1]

    def encode(obs):
        seen = view(obs)
        who = torch.eye(N, dtype=seen.dtype, device=seen.device)
        return torch.cat([seen, who.expand(*seen.shape[:-1], N)], -1) if args.shared else seen

    rest = (rows[name] for name in ("avail_actions", "actions", "reward", "done", "start"))
    return Data(encode(rows["obs"]), see(rows["state"]), *rest), encode


def evaluate(policies, encode, args, step, episodes, device):
    """Scores (S, E) of the greedy teams of all seeds and, where actions are discrete, by sampling: `runs.score`."""
    clocks = (policies.N, -1, policies.A) if policies.discrete else None
    return runs.score(lambda *seen: runs.react(policies, encode, *seen), args, step, episodes, device, clocks=clocks)


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("omiga", args)
    device = run.device
    dataset = run.load(episodes=args.episodes)
    data, encode = arrange(dataset, args)
    team = Team(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adams, generators = optimizers(team, args), [runs.stream(seed, 1, device) for seed in run.seeds]
    learn, policies = run.compile(update), team.policies
    logs = dict.fromkeys(("policy_loss", "q_loss", "v_loss", "weight"), torch.full((args.num_seeds,), math.nan))
    run.begin(team=team, adams=adams, generators=generators)

    for step in run.steps(args.steps, args.eval_every):
        if run.due(logs):
            scores = evaluate(policies, encode, args, step, args.eval_episodes, device)
            run.record(logs, {name: x.mean(1) for name, x in scores.items()})
        if step < args.steps:
            for adam in adams.values():
                adam.lr.fill_(args.lr * (1 - step / args.steps))
            logs = learn(team, adams, data, draw_rows(generators, data, args), args)

    scores = evaluate(policies, encode, args, args.steps, 10 * args.eval_episodes, device)
    views, actions = dataset.obs.shape[2:], policies.A * policies.discrete
    run.keep_team(lambda *seen: runs.react(policies, encode, *seen), views, actions, 0, policies)
    return run.finish("OMIGA", scores, dataset, run.best)


def parse(argv=None):
    """Read the command line; where no flag speaks, the environment's own values or those of the resumed run hold."""
    args = runs.parse(Args, preset, argv, __doc__)
    runs.check_numbers(args, may_be_zero="seed episodes eval_episodes layers gamma", at_most_one="gamma tau")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
