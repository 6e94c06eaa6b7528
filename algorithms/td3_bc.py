"""TD3+BC for teams, and its relatives ICQL and IOMAR.

Fujimoto & Gu, NeurIPS 2021; Pan et al., ICML 2022.

The problem. A policy that climbs its critic soon proposes actions that nobody
recorded, for which the critic is a guess. Something has to hold it near the data.
And in a team every agent climbs a critic that has seen the teammates' recorded
actions, not what they will do now.

The idea. TD3+BC adds to a deterministic actor-critic the squared distance to the
recorded action, and measures both terms in units that make them comparable.
Independent learners (ITD3+BC) do that for each agent alone, with the team's reward.
With --mixing (MATD3+BC) the agents' values are summed up, with weights that depend
on the state, and all actors climb the sum together. ICQL leaves the distance out,
and lowers the critic itself where there are no data. IOMAR adds to ICQL a search,
as the gradient alone gets stuck in poor corners of the critic. Among random
actions, refined a few times, it takes the one with the highest value, and pulls the
actor there.

Equations, by numbers of our own. Agent i has pi_i(o_i) and Q_i(o_i, a_i), twice. A
prime marks slowly moving copies, s' the next state; m is 0 where the game ended by
its own rules.
 1 mixing    Q(s, a)  = sum_i |w_i(s)| Q_i(o_i, a_i) + b(s)
 2           y        = r + gamma m min_c Q'_c(s', a'),   a'_i = clip( pi'_i(o'_i) + clip(noise) )
 3           L(Q)     = sum_c E (y - Q_c)^2
                        + cql E [ logsumexp_a ( Q_c(o, a) - log p(a) ) - Q_c(o, a_recorded) ]
 4           L(pi)    = -(1 - omar) lambda E Q_1(o, pi(o)) + bc E |pi(o) - a|^2
                        + omar E |pi(o) - a*|^2 / A
 5           lambda   = 2.5 / E |Q_1(o, pi(o))|  if bc > 0, else 1
 6 search    a*       = the best by Q_1 of pi(o) and the elites of all rounds
Eq. 1 is for --mixing; otherwise each Q_i stands by itself. The actions a in Eq. 3
are drawn, a third each, uniformly, around pi(o) and around pi(o'); p is each one's
density. Without bc, 0.001 |pi(o)|^2 / A belongs to Eq. 4 as well. In Eq. 6 a
round's candidates are normal around the elites before. The elites are the best of
the candidates and of the elites before.

Commands, and the return you should see (last policy; one CPU core, torch 2.13):
  python algorithms/td3_bc.py --env polynomial
      two agents on twin peaks, 10 seeds at once, 25 s: ITD3+BC 0.470 +- 0.010; the data -0.30,
      the peak 0.5625
  python algorithms/td3_bc.py --env polynomial --mixing
      69 s: MATD3+BC 0.480 +- 0.005
  python algorithms/td3_bc.py --env polynomial --bc 0 --cql 1
      7 min on a busy core: ICQL 0.545 +- 0.001
  python algorithms/td3_bc.py --env reacher --task independent
      two agents share an arm, 3 seeds, 3 min: ITD3+BC 0.40 of the data's teams, with --mixing 0.63;
      with the full view (all-observant) 1.01 and 1.03; cloning 0.70 and 0.89
  ... --bc 0 --cql 1
      ICQL 0.29, 5 min; all-observant 0.66
  ... --bc 0 --cql 1 --omar 0.9
      IOMAR, 12 min on a busy core

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, td3_bc
  S, N, A, M = 2, 3, 2, 1000  # seeds, agents, action entries, steps of one long episode
  obs, state = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6)
  action = 2 * torch.rand(M + 1, N, A) - 1
  reward = -(action - obs[..., :A].tanh()).abs().mean((1, 2))
  data = td3_bc.Data(obs, state, action, reward, torch.zeros(M + 1), torch.arange(M))
  args = td3_bc.Args(num_seeds=S)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = td3_bc.Team(data, args, generators)
  adam = torch.optim.Adam(team.parameters(), args.lr, fused=True)
  for step in range(100):
      noise = td3_bc.draw_noise(generators, data, args)
      logs = td3_bc.update_critics(team, adam, data, noise, args)
      if step % args.delay == 0:
          logs |= td3_bc.update_policies(team, adam, data, noise, args)
  action = team.policies(obs.transpose(0, 1).expand(S, N, M + 1, 5))  # (S, N, M + 1, A)

Differences from the authors' code (of MOMA-PPO's baselines, and OMAR's), and
choices made here:
  1. The distance is summed over an action's entries, as in MOMA-PPO's code;
     TD3+BC's own takes the mean.
  2. Where both codes of ICQL and IOMAR subtract the density of a drawn action, Eq.
     3 has its logarithm.
  3. MATD3+BC is in no released code. That all actors move in Q(s, pi_1..pi_N), the
     others' actions from their policies, is ours. So is that w depends on the state
     only and is not negative.
  4. ICQL's policies have the penalty 0.001 |pi(o)|^2 / A, as IOMAR's. In MOMA-PPO's
     code it is gone with the search.
  5. The target has TD3's noise in all methods, as in MOMA-PPO's code; OMAR's code
     has none.
  6. Agents have no memory; the authors' look at their last ten views and actions.
     Networks have 128 units (theirs 256), copies move twice as fast, step sizes
     fall to 0, and a seed's gradient has a limited length.
  7. Views are in units of the data's mean and spread; the authors' are as they are.
  8. The reacher's recorded actions vary by 0.09 only, where those of TD3+BC's tasks
     fill the box. There the distance weighs 10 times as much (--bc 1:
     `all-observant` 0.42 in place of 1.01).
  9. With --cql, bodies' minibatches have 64 steps and 4 actions of each kind (the
     authors' 256 and 10): a laptop takes minutes, not hours.

Seeds differ in all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, Q = S N networks, B steps of a minibatch, J actions for
one view, M recorded steps, R rows (observations), A entries of an action, O
observation, I inputs, D state.
"""

import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "reacher"  # polynomial, reacher, halfcheetah, ant, or module:factory
    task: str = ""  # its task; by default the environment's first
    dataset: str = "expert-mix"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of agents' rewards, in games that are not ours
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
    noise: float = 0.2  # deviation of the target policy's noise, and of near actions in Eq. 3
    noise_clip: float = 0.5  # the target policy's noise ends there
    delay: int = 2  # updates of the critics for one of the policies and of the targets
    samples: int = 10  # actions of each kind in the conservative term
    rounds: int = 2  # of the search
    candidates: int = 20  # in each round
    elites: int = 5  # the best, at least 2, on which the next round is centred
    gamma: float = 0.99  # discount
    # --- the optimisation
    normalize: bool = True  # views in units of the data's mean and spread
    hidden: int = 128  # units per hidden layer
    layers: int = 2  # hidden layers
    batch_size: int = 256  # recorded steps per update
    lr: float = 5e-4  # Adam's step size, which falls linearly to 0
    tau: float = 0.01  # how far a target network moves in an update
    max_grad_norm: float = 1.0  # longest gradient of one seed's agents


GAME = dict(
    num_seeds=10,
    steps=3000,
    eval_every=1000,
    normalize=False,
    hidden=64,
    batch_size=64,
    lr=1e-3,
)
PRESETS = {"polynomial": GAME, "reacher": dict(bc=10.0)}  # what differs from the values above
FEWER = dict(samples=4, batch_size=64)  # 12 drawn actions a view, not 30
PRESETS_WITH_CQL = {"polynomial": GAME} | dict.fromkeys(("reacher", "halfcheetah", "ant"), FEWER)


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end.

    In an episode's last row no step begins.
    """

    obs: torch.Tensor  # (R, N, I) what the agents see
    state: torch.Tensor  # (R, D) what the mixer sees
    action: torch.Tensor  # (R, N, A) in [-1, 1], of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    steps: torch.Tensor  # (M,) rows where a step begins; its next observation is in the next row


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
    J = args.samples if args.cql else 0
    C = args.candidates if args.omar else 0

    def each(draw, *shape):
        return torch.stack([draw(shape, generator=g, device=g.device) for g in generators])

    rows = data.steps[each(partial(torch.randint, M), B)]
    target, uniform = each(torch.randn, N, B, A), 2 * each(torch.rand, N, B, J, A) - 1
    near = each(torch.randn, 2, N, B, J, A).transpose(0, 1)
    search = each(torch.randn, args.rounds, N, B, C, A).transpose(0, 1)
    return Noise(rows, target, uniform, near, search)


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
    """A deterministic policy for each agent of S teams."""

    def __init__(self, data, args, generators):
        super().__init__()
        _, N, I = data.obs.shape
        each = [g for g in generators for _ in range(N)]
        self.body = mlp(I, data.action.shape[-1], args, each, scale=0.1)

    def forward(self, obs):
        """Actions (S, N, B, A) from views (S, N, B, I)."""
        return self.body(obs.flatten(0, 1)).view(*obs.shape[:3], -1).tanh()


class Critic(nn.Module):
    """Q_i(o_i, a_i) of each agent of S teams, and what mixes them, if anything does."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, N, I), A, D = data.obs.shape, data.action.shape[-1], data.state.shape[1]
        self.local = mlp(I + A, 1, args, [g for g in generators for _ in range(N)])
        self.mixer = mlp(D, N + 1, args, generators) if args.mixing else None

    def forward(self, obs, actions, state):
        """(S, N, B, I), (S, N, B, A), (S, B, D) -> (S, N, B), or (S, 1, B) with a mixer."""
        local = self.many(obs, actions[..., None, :])[..., 0]
        if self.mixer is None:
            return local
        out = self.mixer(state).movedim(2, 1)  # (S, N + 1, B)
        return (out[:, :-1].abs() * local).sum(1, keepdim=True) + out[:, -1:]  # Eq. 1

    def many(self, obs, actions):
        """Agents' own values of J actions a view: (S, N, B, I), (S, N, B, J, A) -> (S, N, B, J)."""
        views = obs[..., None, :].expand(*actions.shape[:-1], -1)
        x = torch.cat([views, actions], -1)  # (S, N, B, J, I + A)
        return self.local(x.flatten(2, 3).flatten(0, 1)).view(actions.shape[:-1])


class Team(nn.Module):
    """Everything that S teams learn."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.policies = Policies(data, args, generators)
        self.critics = nn.ModuleList(Critic(data, args, generators) for _ in range(2))
        networks = nn.ModuleList([self.policies, self.critics])
        self.targets = copy.deepcopy(networks).requires_grad_(False)


# ---------------------------------------------------------------- losses
def gather(data, rows):
    """What the rows (S, B) hold, as `Data` of a minibatch.

    Agents come before steps, (S, N, B, ...). State is (S, B, D), reward and done are (S, 1, B).
    """
    obs = data.obs[rows].transpose(1, 2)
    action = data.action[rows].transpose(1, 2)
    reward, done = data.reward[rows][:, None], data.done[rows][:, None]
    return Data(obs, data.state[rows], action, reward, done, rows)


@torch.no_grad()
def td_target(team, batch, later, noise, args):
    """Eq. 2: y, (S, N, B), or (S, 1, B) with a mixer; later: what the next rows hold."""
    policies, critics = team.targets
    shift = (args.noise * noise.target).clamp(-args.noise_clip, args.noise_clip)
    action = (policies(later.obs) + shift).clamp(-1, 1)
    q = [critic(later.obs, action, later.state) for critic in critics]
    return batch.reward + args.gamma * (1 - batch.done) * torch.minimum(*q)


@torch.no_grad()
def drawn_actions(policies, batch, later, noise, sigma):
    """The actions a of Eq. 3, (S, N, B, 3J, A), and their log p(a), (S, N, B, 3J)."""
    middle = torch.stack([policies(batch.obs), policies(later.obs)])  # (2, S, N, B, A)
    near = (middle[..., None, :] + sigma * noise.near).clamp(-1, 1)
    log_p = (-0.5 * noise.near**2 - math.log(sigma) - HALF_LOG_2PI).sum(-1)  # before clipping
    flat = torch.full_like(log_p[0], noise.uniform.shape[-1] * math.log(0.5))
    return torch.cat([noise.uniform, *near], -2), torch.cat([flat, *log_p], -1)


def conservative(critic, batch, actions, log_p):
    """Eq. 3's second term of one critic, (S,)."""
    recorded = critic(batch.obs, batch.action, batch.state)  # (S, N, B), as nothing is mixed
    values = critic.many(batch.obs, actions) - log_p  # (S, N, B, 3J)
    return (values.logsumexp(-1) - recorded).mean((1, 2))


def critic_loss(team, batch, later, noise, args):
    """Eq. 3 for each seed, (S,)."""
    y = td_target(team, batch, later, noise, args)
    errors = [y - critic(batch.obs, batch.action, batch.state) for critic in team.critics]
    loss = sum((error**2).mean((1, 2)) for error in errors)
    if args.cql:
        drawn = drawn_actions(team.policies, batch, later, noise, args.noise)
        gaps = [conservative(critic, batch, *drawn) for critic in team.critics]
        loss = loss + args.cql * sum(gaps)
    return loss


def best_actions(critic, obs, actions, count):
    """The best of the actions (S, N, B, J, A), by the agents' own values: (S, N, B, count, A)."""
    order = critic.many(obs, actions).topk(count, -1).indices
    return actions.gather(-2, order[..., None].expand(*order.shape, actions.shape[-1]))


@torch.no_grad()
def search(critic, obs, mine, noise, count):
    """Eq. 6: a*, (S, N, B, A), from policies' actions mine (S, N, B, A) and normal noise.

    count: of the elites.
    """
    mine = mine[..., None, :]
    mean, std, elites = torch.zeros_like(mine), 2.0, mine[..., :0, :]
    for normal in noise:  # (S, N, B, candidates, A)
        candidates = (mean + std * normal).clamp(-1, 1)
        elites = best_actions(critic, obs, torch.cat([candidates, elites], -2), count)
        mean, std = elites.mean(-2, keepdim=True), elites.std(-2, keepdim=True) + 1e-6
    return best_actions(critic, obs, torch.cat([elites, mine], -2), 1)[..., 0, :]


def policy_loss(team, batch, noise, args):
    """Eq. 4 for each seed, (S,)."""
    critic, mine = team.critics[0], team.policies(batch.obs)  # (S, N, B, A)
    q = critic(batch.obs, mine, batch.state)  # (S, N, B), or (S, 1, B) with a mixer
    scale = 1.0
    if args.bc:  # Eq. 5
        scale = 2.5 / q.detach().abs().mean(2, keepdim=True).clamp(min=1e-6)
    loss = -(1 - args.omar) * (scale * q).sum(1).mean(1)
    if args.bc:
        loss = loss + args.bc * ((mine - batch.action) ** 2).sum((1, 3)).mean(1)
    else:
        loss = loss + 1e-3 * (mine**2).mean(3).sum(1).mean(1)
    if args.omar:
        goal = search(critic, batch.obs, mine.detach(), noise.search, args.elites)
        loss = loss + args.omar * ((mine - goal) ** 2).mean(3).sum(1).mean(1)
    return loss


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


def update_critics(team, adam, data, noise, args):
    """One update of the critics; returns logs, (S,)."""
    batch = gather(data, noise.rows)
    later = gather(data, noise.rows + 1)
    loss = critic_loss(team, batch, later, noise, args)
    return {"q_loss": descend(adam, team.critics, loss, args.max_grad_norm)}


def update_policies(team, adam, data, noise, args):
    """One update of the policies and, after it, of all targets; returns logs, (S,)."""
    loss = policy_loss(team, gather(data, noise.rows), noise, args)
    loss = descend(adam, team.policies, loss, args.max_grad_norm)
    networks = [*team.policies.parameters(), *team.critics.parameters()]
    with torch.no_grad():
        for slow, quick in zip(team.targets.parameters(), networks):
            slow.lerp_(quick, args.tau)
    return {"policy_loss": loss}


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import layout
    from data.run import Player, Run, launch, read_args
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")


def arrange(dataset, args):
    """The dataset as `Data`, and the function from observations (..., N, O) to policies' inputs."""
    rows = layout.rows(dataset)
    encode = layout.inputs(rows["obs"], args, correction=1)
    see_state = layout.inputs(rows["state"], args, correction=1)
    rest = [rows[name] for name in ("actions", "reward", "done", "start")]
    return Data(encode(rows["obs"]), see_state(rows["state"]), *rest), encode


def player(policies, encode):
    """How the teams of all seeds play."""

    def act(obs, avail, memory, clocks=None):
        return policies(encode(obs).transpose(1, 2)).transpose(1, 2).float(), memory

    return Player(act, policies)


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("td3_bc", args)
    data, encode = arrange(run.load(discrete=False), args)
    team = Team(data, args, run.streams(0, "cpu")).to(run.device)
    adam = torch.optim.Adam(team.parameters(), args.lr, fused=True)
    generators = run.streams(1)
    learn, improve = run.compile(update_critics), run.compile(update_policies)
    if run.begin(team=team, adam=adam, generators=generators) and run.step:
        last = run.rows[-args.num_seeds :]  # the policies' loss may be of an earlier update
        run.logs = {"policy_loss": torch.tensor([row["policy_loss"] for row in last])}
    players = player(team.policies, encode)
    for step in run.steps(players):
        adam.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        noise = draw_noise(generators, data, args)
        run.logs |= learn(team, adam, data, noise, args)
        if step % args.delay == 0:
            run.logs |= improve(team, adam, data, noise, args)
    return run.finish(method_of(args), players)


def method_of(args):
    """What the papers call it."""
    name = "MATD3" if args.mixing else "ITD3"
    if args.cql:
        name = "ICQL"
    if args.omar:
        name = "IOMAR"
    return name + "+BC" * (args.bc > 0)


def parse(argv=None):
    """Read the command line; where no flag speaks, the preset's values or a resumed run's hold."""
    read = partial(
        read_args,
        Args,
        argv=argv,
        doc=__doc__,
        kinds="TD3+BC is for continuous actions",
        known=tuple(PRESETS_WITH_CQL),
        may_be_zero="seed episodes eval_episodes layers gamma bc cql omar noise_clip",
        at_most_one="gamma tau omar",
    )
    args = read(PRESETS)
    if args.cql:
        args = read(PRESETS_WITH_CQL)
    if args.mixing and (args.cql or args.omar):
        raise ValueError("--cql and --omar are for independent learners: leave --mixing out")
    return args


if __name__ == "__main__":
    launch(main, parse)
