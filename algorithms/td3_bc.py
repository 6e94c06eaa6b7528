"""TD3+BC for teams, and its relatives ICQL and IOMAR (Fujimoto & Gu, NeurIPS 2021; Pan et al., ICML 2022).

The problem. A policy that climbs its critic soon proposes actions that nobody recorded, for which the critic is a
guess. Something has to hold it near the data. And in a team every agent climbs a critic that has seen the teammates'
recorded actions, not what they will do now.

The idea. TD3+BC adds to a deterministic actor-critic the squared distance to the recorded action, and measures both
terms in units that make them comparable. Independent learners (ITD3+BC) do that for each agent alone, with the team's
reward. With --mixing (MATD3+BC) the agents' values are summed up, with weights that depend on the state, and all actors
climb the sum together. ICQL leaves the distance out and lowers the critic itself where there are no data. IOMAR adds to
it a search: among random actions, refined a few times, it takes the one with the highest value, and pulls the actor
there, since following the gradient alone gets stuck in poor corners of the critic.

Equations, by numbers of our own. Agent i has pi_i(o_i) and Q_i(o_i, a_i), twice; a prime marks slowly moving copies, s'
the next state; m is 0 where the game ended by its own rules.
 1 mixing    Q(s, a)  = sum_i |w_i(s)| Q_i(o_i, a_i) + b(s)            with --mixing; otherwise each Q_i by itself
 2           y        = r + gamma m min_c Q'_c(s', a'),   a'_i = clip( pi'_i(o'_i) + clip(noise) )
 3           L(Q)     = sum_c E (y - Q_c)^2 + cql E [ logsumexp_a ( Q_c(o, a) - log p(a) ) - Q_c(o, a_recorded) ]
 4           L(pi)    = -(1 - omar) lambda E Q_1(o, pi(o)) + bc E |pi(o) - a|^2 + omar E |pi(o) - a*|^2 / A
 5           lambda   = 2.5 / E |Q_1(o, pi(o))|  if bc > 0, else 1
 6 search    a*       = the best by Q_1 of the last candidates and pi(o); candidates ~ N(mean, std) of the elites before
The actions a in Eq. 3 are drawn, a third each, uniformly, around pi(o) and around pi(o'); p is each one's density.
Without bc, 0.001 |pi(o)|^2 / A belongs to Eq. 4 as well.

Commands, and the return you should see (last policy; one CPU core of a small server, torch 2.13; the reacher's are of
data before commit 3489905, which had other last digits):
  python algorithms/td3_bc.py --env polynomial                 two agents on twin peaks, 10 seeds at once, 25 s: ITD3+BC
      0.470 +- 0.010; the data -0.30, the peak 0.5625
  python algorithms/td3_bc.py --env polynomial --mixing        69 s: MATD3+BC 0.480 +- 0.005
  python algorithms/td3_bc.py --env polynomial --bc 0 --cql 1  7 min on a busy core: ICQL 0.545 +- 0.001
  python algorithms/td3_bc.py --env reacher --task independent two agents share an arm, 3 seeds, 3 min: ITD3+BC 0.40 of
      the data's teams, with --mixing 0.63; with the full view (all-observant) 1.01 and 1.03; cloning 0.70 and 0.89
  ... --bc 0 --cql 1                                           ICQL 0.29, 5 min; all-observant 0.66
  ... --bc 0 --cql 1 --omar 0.9                                IOMAR 0.30, 12 min on a busy core; all-observant 0.66

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, td3_bc
  S, N, A, M = 2, 3, 2, 1000                                       # seeds, agents, action entries, steps of one episode
  obs, state, action = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6), 2 * torch.rand(M + 1, N, A) - 1
  reward, none = -(action - obs[..., :A].tanh()).abs().mean((1, 2)), torch.zeros(M + 1)
  data = td3_bc.Data(obs, state, action, reward, none, torch.arange(M), torch.tensor(0.0))
  args = td3_bc.Args(num_seeds=S)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = td3_bc.Team(data, args, generators)
  adams = td3_bc.optimizers(team, args)
  for step in range(100):
      noise = td3_bc.draw_noise(generators, data, args)
      logs = td3_bc.update(team, adams, data, noise, step % args.delay == 0, args)
  action = team.policies(obs.transpose(0, 1).expand(S, N, M + 1, 5))                # (S, N, M + 1, A)

Differences from the authors' code (of MOMA-PPO's baselines, and OMAR's), and choices made here:
  1. The distance is summed over an action's entries, as in MOMA-PPO's code; TD3+BC's own takes the mean.
  2. Where both codes of ICQL and IOMAR subtract the density of a drawn action, Eq. 3 has its logarithm.
  3. MATD3+BC is in no released code: that all actors move in Q(s, pi_1..pi_N), the others' actions from their policies,
     is ours. So is that w depends on the state only and is not negative.
  4. --clip-target: y is at most what the rest of a recorded episode was ever worth, discounted (B3C, arXiv 2501.18138,
     has the best return of the data: with negative rewards, as on the reacher, most of what is left is worth more).
  5. Agents have no memory; the authors' look at their last ten views and actions. Networks are smaller, step sizes fall
     to 0, and a seed's gradient has a limited length.
  6. Views are in units of the data's mean and spread.
  7. The reacher's recorded actions vary by 0.09 only, where those of TD3+BC's tasks fill the box: there the distance
     weighs 10 times as much (--bc 1: `all-observant` 0.42 in place of 1.01).
  8. With --cql, bodies' minibatches have 64 steps and 4 actions of each kind: a laptop takes minutes, not hours.

Seeds differ in all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, Q = S N networks, B steps of a minibatch, J actions for one view, M recorded steps, R rows
(observations), E games, A entries of an action, O observation, I inputs, D state.
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
from torch.optim.adam import adam as adam_step

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "reacher"  # the environment: polynomial, reacher, halfcheetah, ant, or module:factory
    task: str = ""  # its task; by default the environment's first
    dataset: str = "expert-mix"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in an environment that is not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 3  # how many seeds train, all at once
    steps: int = 10_000  # updates, one minibatch each
    eval_every: int = 2000  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 10  # games per seed and evaluation; 0 to train without an environment
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # compile updates with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/td3_bc
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    bc: float = 1.0  # weight of the distance to the recorded action
    mixing: bool = False  # sum the agents' values up, with weights that depend on the state
    cql: float = 0.0  # weight of the conservative term
    omar: float = 0.0  # weight of the action that the search finds; the critic's slope has the rest
    clip_target: bool = False  # let no target exceed what the rest of a recorded episode was ever worth
    noise: float = 0.2  # deviation of the target policy's noise, and of the conservative term's near actions
    noise_clip: float = 0.5  # the target policy's noise ends there
    delay: int = 2  # updates of the critics for one of the policies and of the targets
    samples: int = 10  # actions of each kind in the conservative term
    rounds: int = 2  # of the search
    candidates: int = 20  # in each round
    elites: int = 5  # of them, on which the next round is centred
    gamma: float = 0.99  # discount
    # --- the optimisation
    normalize: bool = True  # views in units of the data's mean and spread
    hidden: int = 128  # units per hidden layer
    layers: int = 2  # hidden layers
    batch_size: int = 256  # recorded steps per update
    lr: float = 5e-4  # Adam's step size, which falls linearly to 0
    tau: float = 0.01  # how far a target network moves in an update
    max_grad_norm: float = 1.0  # longest gradient of one seed's agents


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end. In an episode's last row no step begins."""

    obs: torch.Tensor  # (R, N, I) what the agents see
    state: torch.Tensor  # (R, D) what the mixer sees
    action: torch.Tensor  # (R, N, A) in [-1, 1], of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    steps: torch.Tensor  # (M,) the rows where a step begins; the next observation is in the next row
    best: torch.Tensor  # () the most that the rest of an episode was worth, for --clip-target


class Noise(NamedTuple):
    """All that is random in an update; given it, an update is a function without chance."""

    rows: torch.Tensor  # (S, B) rows of data where a step begins
    target: torch.Tensor  # (S, N, B, A) normal, for the target policy
    uniform: torch.Tensor  # (S, N, B, J, A) in [-1, 1], for the conservative term
    near: torch.Tensor  # (2, S, N, B, J, A) normal, for its actions near the policy's
    search: torch.Tensor  # (rounds, S, N, B, candidates, A) normal, for the search


def draw_noise(generators, data, args):
    """The `Noise` of one update, each seed's from its own generator."""
    M, B, (_, N, A) = len(data.steps), args.batch_size, data.action.shape
    J, C = args.samples * (args.cql > 0), args.candidates * (args.omar > 0)

    def each(draw, *shape):
        return torch.stack([draw(shape, generator=g, device=g.device) for g in generators])

    rows = torch.stack([torch.randint(M, (B,), generator=g, device=g.device) for g in generators])
    target, uniform = each(torch.randn, N, B, A), 2 * each(torch.rand, N, B, J, A) - 1
    near, search = each(torch.randn, 2, N, B, J, A), each(torch.randn, args.rounds, N, B, C, A)
    return Noise(data.steps[rows], target, uniform, near.transpose(0, 1), search.transpose(0, 1))


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
    """A deterministic policy for each agent of S teams."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, N, I), A = data.obs.shape, data.action.shape[-1]
        self.body = mlp(I, A, args, [g for g in generators for _ in range(N)], scale=0.1)

    def forward(self, obs):
        """Actions (S, N, B, A) from views (S, N, B, I)."""
        return self.body(obs.flatten(0, 1)).view(*obs.shape[:3], -1).tanh()


class Mixer(nn.Module):
    """Eq. 1: the agents' values (S, N, B) and the state (S, B, D) -> the team's value, (S, 1, B)."""

    def __init__(self, inputs, num_agents, args, generators):
        super().__init__()
        self.net = mlp(inputs, num_agents + 1, args, generators)

    def forward(self, local, state):
        out = self.net(state).movedim(2, 1)  # (S, N + 1, B)
        return (out[:, :-1].abs() * local).sum(1, keepdim=True) + out[:, -1:]


class Critic(nn.Module):
    """Q_i(o_i, a_i) of each agent of S teams, and what mixes them, if anything does."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, N, I), A, D = data.obs.shape, data.action.shape[-1], data.state.shape[1]
        self.local = mlp(I + A, 1, args, [g for g in generators for _ in range(N)])
        self.mixer = Mixer(D, N, args, generators) if args.mixing else None

    def forward(self, obs, actions, state):
        """(S, N, B, I), (S, N, B, A), (S, B, D) -> (S, 1, B) with a mixer, else (S, N, B)."""
        local = self.many(obs, actions[..., None, :])[..., 0]
        return local if self.mixer is None else self.mixer(local, state)

    def many(self, obs, actions):
        """Each agent's own values of J actions for a view: (S, N, B, I), (S, N, B, J, A) -> (S, N, B, J)."""
        x = torch.cat([obs[..., None, :].expand(*actions.shape[:-1], -1), actions], -1)  # (S, N, B, J, I + A)
        return self.local(x.flatten(2, 3).flatten(0, 1)).view(actions.shape[:-1])


class Team(nn.Module):
    """Everything that S teams learn."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.policies = Policies(data, args, generators)
        self.critics = nn.ModuleList(Critic(data, args, generators) for _ in range(2))
        self.targets = copy.deepcopy(nn.ModuleList([self.policies, *self.critics])).requires_grad_(False)


# ---------------------------------------------------------------- losses
class Batch(NamedTuple):
    """B recorded steps of each seed."""

    obs: torch.Tensor  # (S, N, B, I)
    next_obs: torch.Tensor
    state: torch.Tensor  # (S, B, D)
    next_state: torch.Tensor
    action: torch.Tensor  # (S, N, B, A)
    reward: torch.Tensor  # (S, 1, B)
    done: torch.Tensor  # (S, 1, B)


def gather(data, rows):
    """The steps that begin in the rows (S, B) as a `Batch`."""
    obs, next_obs, action = (x.transpose(1, 2) for x in (data.obs[rows], data.obs[rows + 1], data.action[rows]))
    rest = data.reward[rows][:, None], data.done[rows][:, None]
    return Batch(obs, next_obs, data.state[rows], data.state[rows + 1], action, *rest)


@torch.no_grad()
def td_target(team, batch, noise, best, args):
    """Eq. 2: y, (S, 1 or N, B)."""
    target_policies, *target_critics = team.targets
    shift = (args.noise * noise.target).clamp(-args.noise_clip, args.noise_clip)
    action = (target_policies(batch.next_obs) + shift).clamp(-1, 1)
    q = torch.stack([critic(batch.next_obs, action, batch.next_state) for critic in target_critics]).amin(0)
    y = batch.reward + args.gamma * (1 - batch.done) * q
    return y.minimum(best) if args.clip_target else y


def conservative(critic, batch, actions, log_p):
    """Eq. 3's second term of one critic, (S,): actions (S, N, B, 3J, A) and their log-densities (S, N, B, 3J)."""
    recorded = critic.many(batch.obs, batch.action[..., None, :])[..., 0]
    return ((critic.many(batch.obs, actions) - log_p).logsumexp(-1) - recorded).mean((1, 2))


@torch.no_grad()
def candidates(policies, batch, noise, sigma):
    """What the conservative term looks at: actions (S, N, B, 3J, A), and their log-densities (S, N, B, 3J)."""
    middle = torch.stack([policies(batch.obs), policies(batch.next_obs)])[..., None, :]  # (2, S, N, B, 1, A)
    near = (middle + sigma * noise.near).clamp(-1, 1)
    log_p = (-0.5 * noise.near**2 - math.log(sigma) - HALF_LOG_2PI).sum(-1)  # before clipping
    flat = torch.full_like(log_p[0], noise.uniform.shape[-1] * math.log(0.5))
    return torch.cat([noise.uniform, *near], -2), torch.cat([flat, *log_p], -1)


def critic_loss(team, batch, y, noise, args):
    """Eq. 3 for each seed, (S,)."""
    loss = sum(((y - critic(batch.obs, batch.action, batch.state)) ** 2).mean((1, 2)) for critic in team.critics)
    if args.cql:
        drawn = candidates(team.policies, batch, noise, args.noise)
        loss = loss + args.cql * sum(conservative(critic, batch, *drawn) for critic in team.critics)
    return loss


@torch.no_grad()
def search(critic, obs, mine, noise, elites):
    """Eq. 6: a* for views (S, N, B, I), from the policy's actions mine (S, N, B, A) and normal noise."""
    mean, std, kept = torch.zeros_like(mine)[..., None, :], 2.0, None
    for normal in noise:  # (S, N, B, candidates, A)
        drawn = (mean + std * normal).clamp(-1, 1)
        pool = drawn if kept is None else torch.cat([drawn, kept], -2)
        order = critic.many(obs, pool).topk(elites, -1).indices
        kept = pool.gather(-2, order[..., None].expand(*order.shape, pool.shape[-1]))
        mean, std = kept.mean(-2, keepdim=True), kept.std(-2, keepdim=True) + 1e-6
    pool = torch.cat([drawn, mine[..., None, :]], -2)
    best = critic.many(obs, pool).argmax(-1)[..., None, None]
    return pool.gather(-2, best.expand(*best.shape[:-1], pool.shape[-1]))[..., 0, :]


def policy_loss(team, batch, noise, args):
    """Eq. 4 for each seed, (S,)."""
    critic, mine = team.critics[0], team.policies(batch.obs)  # (S, N, B, A)
    q = critic(batch.obs, mine, batch.state)  # (S, 1 or N, B)
    scale = 2.5 / q.detach().abs().mean(2, keepdim=True).clamp(min=1e-6) if args.bc else 1.0  # Eq. 5
    loss = -(1 - args.omar) * (scale * q).sum(1).mean(1)
    if args.bc:
        loss = loss + args.bc * ((mine - batch.action) ** 2).sum((1, 3)).mean(1)
    else:
        loss = loss + 1e-3 * (mine**2).mean(3).sum(1).mean(1)
    if args.omar:
        found = search(critic, batch.obs, mine.detach(), noise.search, args.elites)
        loss = loss + args.omar * ((mine - found) ** 2).mean(3).sum(1).mean(1)
    return loss


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
    """Adam for the policies and for the critics."""
    parts = {"policies": team.policies, "critics": team.critics}
    return {name: Adam(net.parameters(), args.lr) for name, net in parts.items()}


def update(team, adams, data, noise, improve, args):
    """One update of the critics of all seeds and, if it is their turn (improve), of the policies and all targets.

    Returns diagnostics, (S,) tensors.
    """
    batch = gather(data, noise.rows)
    y = td_target(team, batch, noise, data.best, args)
    q_loss = critic_loss(team, batch, y, noise, args)
    descend(adams["critics"], q_loss, args)
    logs = {"q_loss": q_loss.detach()}
    if improve:
        loss = policy_loss(team, batch, noise, args)
        descend(adams["policies"], loss, args)
        networks = nn.ModuleList([team.policies, *team.critics])
        with torch.no_grad():
            torch._foreach_lerp_(list(team.targets.parameters()), list(networks.parameters()), args.tau)
        logs["policy_loss"] = loss.detach()
    return logs


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "runs.py").exists() and (HOME / "envs" / "play.py").exists():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    import envs
    from data import layout, runs
elif __name__ == "__main__":
    sys.exit("error: this file runs inside its repository, beside data/ and envs/; alone, it is to be imported")


def preset(args):
    """What differs from the reacher's values, above, in the other environments."""
    task = args.task or envs.TASKS.get(args.env, ("",))[0]
    body = dict(samples=4, batch_size=64) if args.cql else {}  # 12 drawn actions a view, not 30
    values = {
        "polynomial": dict(dataset="peak-0.5", num_seeds=10, steps=3000, eval_every=1000, hidden=64, batch_size=64,
                           lr=1e-3, normalize=False),
        "reacher": body or dict(bc=10.0),
        "halfcheetah": body | dict(dataset="good"), "ant": body | dict(dataset="full-replay"),
    }  # fmt: skip
    return values.get(args.env, dict(dataset="")) | dict(env=args.env, task=task)


def arrange(dataset, args):
    """The dataset as `Data`, and the function that turns observations (..., N, O) into the policies' inputs."""
    rows = layout.rows(dataset)
    encode, see = (layout.inputs(rows[name], args, correction=1) for name in ("obs", "state"))
    rest = (rows[name] for name in ("actions", "reward", "done", "start"))
    return Data(encode(rows["obs"]), see(rows["state"]), *rest, layout.togo(dataset, args.gamma).max()), encode


def act(policies, encode, obs, avail, memory):
    """What the teams do in B games of each seed, and their memory (there is none): (S, B, N, O) -> (S, B, N, A)."""
    return policies(encode(obs).transpose(1, 2)).transpose(1, 2).float(), memory


def evaluate(policies, encode, args, step, episodes, device):
    """The returns (S, E) of the teams of all seeds: `runs.score`."""
    return runs.score(lambda *seen: act(policies, encode, *seen), args, step, episodes, device)


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("td3_bc", args)
    device = run.device
    dataset = run.load(False, episodes=args.episodes)
    data, encode = arrange(dataset, args)
    team = Team(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adams, generators = optimizers(team, args), [runs.stream(seed, 1, device) for seed in run.seeds]
    learn, policies = run.compile(update), team.policies
    logs = dict.fromkeys(("policy_loss", "q_loss"), torch.full((args.num_seeds,), math.nan))
    if run.begin(team=team, adams=adams, generators=generators):  # the policies' loss may be of an earlier update
        logs = {name: torch.tensor([row[name] for row in run.rows[-args.num_seeds :]]) for name in logs}

    for step in run.steps(args.steps, args.eval_every):
        if run.due(logs):
            scores = evaluate(policies, encode, args, step, args.eval_episodes, device)
            run.record(logs, {name: x.mean(1) for name, x in scores.items()})
        if step < args.steps:
            for adam in adams.values():
                adam.lr.fill_(args.lr * (1 - step / args.steps))
            logs |= learn(team, adams, data, draw_noise(generators, data, args), step % args.delay == 0, args)

    scores = evaluate(policies, encode, args, args.steps, 10 * args.eval_episodes, device)
    run.keep_team(lambda *seen: act(policies, encode, *seen), dataset.obs.shape[2:], 0, 0, policies)
    return run.finish(method_of(args), scores, dataset, run.best)


def method_of(args):
    """What the papers call it."""
    name = "IOMAR" if args.omar else "ICQL" if args.cql else "MATD3" if args.mixing else "ITD3"
    return name + "+BC" * (args.bc > 0)


def parse(argv=None):
    """Read the command line; where no flag speaks, the environment's own values or those of the resumed run hold."""
    known = [env for env in envs.TASKS if env not in ("matrix", "bridge", "smac")]
    args = runs.parse(Args, preset, argv, __doc__, "TD3+BC is for continuous actions", known)
    zero = "seed episodes eval_episodes layers gamma bc cql omar noise_clip"
    runs.check_numbers(args, may_be_zero=zero, at_most_one="gamma tau omar")
    if args.mixing and (args.cql or args.omar):
        raise ValueError("--cql and --omar are for independent learners: leave --mixing out")
    if not 2 <= args.elites <= args.candidates:
        raise ValueError(f"--elites must be at least 2 and at most --candidates, which is {args.candidates}")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
