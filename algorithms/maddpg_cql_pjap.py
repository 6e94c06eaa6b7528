"""MADDPG + CQL with proximal joint-action prioritisation, PJAP (Tilbury et al., ICML 2024 ARLET, arXiv 2407.01343).

The problem. N agents with continuous actions learn from a fixed dataset. MADDPG moves each agent's policy uphill on a
centralised Q-function, with the teammates' actions taken from the data: the best response under data (BRUD). It answers
what the teammates did, which need not be what their policies do by now. Where the two differ, agents step past each
other, and no new data ever puts that right.

The idea. Change nothing but which windows of the data are drawn. A window is drawn often if its recorded joint actions
are close to what the policies would do there, rarely otherwise. Then the recorded teammates are a good stand-in for the
real ones, in the policies' loss above all. CQL keeps the Q-function low at joint actions that nobody recorded.

Equations (numbers of the paper; it gives none of those without). mu is the policy that all agents share, o_i agent i's
view and its number, s the state, a the joint action, Q_1 and Q_2 two critics; a dash marks slowly moving copies. A
window is L successive rows of one episode.
  Eq. 3   L(mu)    = E_i [ -min_c Q_c(s, (mu(o_i), a_-i)) + reg |mu(o_i)|^2 / A ]          a_-i as recorded: BRUD
  Eq. 6   rho      = max( exp(-(k d)^2), floor );   P(window) ~ rho^exponent;   k grows to its full value
  Eq. 8   d        = mean over the window's steps, agents and entries of |a_recorded - mu'(o)|; see choice 1
          y        = r + gamma (1 - terminated) min_c Q'_c(s', mu'(o'))
          L(Q_c)   = 1/2 E (y - Q_c(s,a))^2 + cql E_i [ log sum_m exp( Q_c(s,a_m) - log p_i(a_m) ) - Q_c(s,a) ]
          a_m      a third each: uniform; mu(o_t) + noise; mu(o_t+1) + noise. p_i: density of agent i's part of a_m

Commands, and the return you should see (mean of three seeds; one CPU core of a small server, torch 2.13):
  python algorithms/maddpg_cql_pjap.py      2-agent HalfCheetah, good data (4,975), PJAP, 6 min:
      2,608 +- 240. It learns on: 4,182 +- 477 after --steps 20000 --batch-size 8 (former data, 4,999)
  ... --no-pjap                             the baseline, every window equally likely: 2,621 +- 107; 4,090 +- 517 after
      as many. At this size PJAP makes no difference; maddpg_cql_pjap.md says why
  ... --dataset good-medium                 half of it by worse teams: 1,879 +- 238, without PJAP 1,903 +- 271
  ... --env polynomial --task sign-agreement --dataset uniform    R = xy, 10 seeds, 3 min: 0.76 +- 0.06, -0.28 without
  ... --steps 500000 --num-seeds 10 --batch-size 64 --ood-actions 10 --eval-every 5000 --no-normalize      the paper's

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, maddpg_cql_pjap as maddpg
  S, N, A, R = 2, 2, 3, 1000                                 # seeds, agents, entries of an action, rows of one episode
  args = maddpg.Args(num_seeds=S, steps=20, window=10, batch_size=4)
  obs = torch.cat([torch.eye(N).expand(R, N, N), torch.randn(R, N, 5)], -1)        # each agent's number and its view
  state, actions, acted = torch.randn(R, 4), 2 * torch.rand(R, N, A) - 1, (torch.arange(R) < R - 1).float()
  reward = -(actions - state[:, None, :A]).abs().mean((1, 2))                     # to follow the state is what pays
  data = maddpg.Data(obs, state, actions, reward, 0 * reward, acted)
  windows = maddpg.Windows(torch.arange(R - args.window + 1), args.window, S)     # by their first rows: all there are
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = maddpg.Team(data, args, generators)
  rmsprops = maddpg.optimizers(team, args)
  for step in range(args.steps):
      noise, k = maddpg.draw_noise(generators, data, args), torch.tensor(maddpg.steepness_at(step, args))
      logs = maddpg.update(team, rmsprops, data, windows, noise, k, args)

Choices made here; "code" is the authors' as submitted (June 2024). Reasons, by the numbers: maddpg_cql_pjap.md.
  1. d is a mean over an agent's A entries, and taken to the target policy before the update (code; --refresh: after
     it); Eq. 8 has a sum.
  2. k grows over the first 30 % of the updates (code). The paper has no such ramp.
  3. Refreshed are the priorities of the windows just trained on (code); --refresh N adds N uniformly drawn ones.
  4. Windows never straddle two episodes (code: they may). The last row may be what was seen after a last step.
  5. A window begins with an empty memory wherever it lies in its episode (code), while play carries the memory on.
  6. The critics see the prioritised windows too, and nothing corrects for how likely a window was (paper, code).
  7. A time limit is not the end: Q looks beyond it. In OG-MARL's data it is: --time-limit-terminates.
  8. Target networks start as copies (code: most likely from weights of their own). The critics start apart.
  9. RMSProp adds 1e-5 to the root of the mean square (code: 1e-10 to the mean square).
 10. CQL's terms differ in p_i only, so each joint action is evaluated once; p_i is the density before clipping (code).
 11. Both losses look at the networks as they were before the update (code).
 12. Batches are smaller, updates fewer, and inputs in units of the data's mean and spread (code: raw, --no-normalize).
 13. --steepness is the code's k on HalfCheetah, whose actions vary by about 0.7; elsewhere k is in proportion to 0.7
     over the recorded actions' spread.
 14. Seeds differ in all that is random here, but are evaluated in one environment.

Shapes: S seeds, L rows of a window, B windows, K joint actions, N agents, A entries of an
agent's action, I inputs, D state, R rows (observations) of the dataset, W windows, E games.
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

CACHE = 2**17  # numbers that a layer of the critics makes at a time on a CPU, so that they stay in the cache
SAMPLE = 2000  # windows, evenly spaced, that stand for the whole dataset when its distance is measured


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "halfcheetah"  # the environment: halfcheetah, reacher, ant, polynomial, or module:factory
    task: str = ""  # its task; by default the environment's first
    dataset: str = "good"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in an environment that is not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 3  # how many seeds train, all at once
    steps: int = 5000  # updates
    eval_every: int = 1000  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 4  # games per seed and evaluation; 0 to train without an environment
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # compile the update with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/maddpg_cql_pjap
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    pjap: bool = True  # draw windows by their priorities; with --no-pjap all are equally likely
    steepness: float = 4.0  # k: how fast priorities fall with the distance, where actions vary as HalfCheetah's do
    ramp: float = 0.3  # the share of the updates over which k grows to its full value
    floor: float = 0.001  # the smallest priority, before the exponent
    exponent: float = 0.99  # of the priorities
    refresh: int = 0  # further windows, drawn uniformly, whose priorities each update refreshes
    cql: float = 5.0  # weight of the conservative term
    ood_actions: int = 4  # joint actions of each of the three kinds in the conservative term
    ood_noise: float = 0.3  # standard deviation of the noise on the policies' actions there
    action_reg: float = 1e-3  # weight of the squared actions in the policy's loss
    gamma: float = 0.99  # discount
    time_limit_terminates: bool = False  # count a time limit as the end, as OG-MARL's data do
    # --- the optimisation
    window: int = 20  # rows of a window
    batch_size: int = 16  # windows per update
    policy_hidden: int = 64  # units of the policy's layer and of its memory
    critic_hidden: int = 128  # units of the critics' two layers
    policy_lr: float = 3e-4  # RMSProp's step size for the policy
    critic_lr: float = 1e-3  # RMSProp's step size for the critics
    tau: float = 0.005  # how far the target networks move in an update
    normalize: bool = True  # feed views and states in units of the dataset's mean and standard deviation


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end. In an episode's last row no step begins:
    there `acted` is 0, and what belongs to a step too. A minibatch is the same with (S, L, B) in place of R."""

    obs: torch.Tensor  # (R, N, I) what the policy sees; as it is one for all agents, the agent's number belongs to it
    state: torch.Tensor  # (R, D) what the critics see
    actions: torch.Tensor  # (R, N, A) in [-1, 1], of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    acted: torch.Tensor  # (R,) 1 where there is a step; in a window that is everywhere but, maybe, in the last row


class Noise(NamedTuple):
    """What is random in an update; given it, an update is a function without chance."""

    windows: torch.Tensor  # (S, B) in [0, 1), double precision: which windows to draw
    uniform: torch.Tensor  # (S, L-1, B, K, N, A) in [-1, 1): CQL's uniform actions
    normal: torch.Tensor  # (S, 2, L-1, B, K, N, A): what CQL adds to the policies' actions, in units of its sigma
    refresh: torch.Tensor  # (S, refresh) in [0, 1), double precision: which further priorities to refresh


def draw_noise(generators, data, args):
    """The `Noise` of one update, each seed's from its own generator."""

    def draw(kind, *shape, dtype=None):
        return torch.stack([kind(shape, generator=g, device=g.device, dtype=dtype) for g in generators])

    shape = (args.window - 1, args.batch_size, args.ood_actions, *data.actions.shape[1:])
    windows = draw(torch.rand, args.batch_size, dtype=torch.float64)
    uniform, normal = draw(torch.rand, *shape) * 2 - 1, draw(torch.randn, 2, *shape)
    return Noise(windows, uniform, normal, draw(torch.rand, args.refresh, dtype=torch.float64))


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """S independent linear layers as one batched product; seed s is initialised by its own generator."""

    def __init__(self, inputs, outputs, generators):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        start = [torch.empty(inputs + 1, outputs).uniform_(-bound, bound, generator=g) for g in generators]
        self.weight = nn.Parameter(torch.stack(start)[:, :-1].clone())  # (S, in, out)
        self.bias = nn.Parameter(torch.stack(start)[:, -1:].clone())  # (S, 1, out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (S, B, out)


class GRU(nn.Module):
    """S independent gated recurrent units with the weights' layout and equations of nn.GRU, but batched over seeds."""

    def __init__(self, inputs, hidden, generators):
        super().__init__()
        bound = hidden**-0.5
        start = [torch.empty(inputs + hidden + 2, 3 * hidden).uniform_(-bound, bound, generator=g) for g in generators]
        split = torch.stack(start).split([inputs, hidden, 1, 1], 1)  # columns: reset, update, new
        self.input, self.state, self.input_bias, self.state_bias = (nn.Parameter(part.clone()) for part in split)

    def forward(self, x, h):
        """Run over sequences x (S, L, B, I) from h (S, B, H): (S, L, B, H)."""
        S, L, B, _ = x.shape
        sizes, states = [2 * h.shape[-1], h.shape[-1]], []  # reset and update; new
        gates = torch.baddbmm(self.input_bias, x.flatten(1, 2), self.input).view(S, L, B, -1).split(sizes, -1)
        for gate, new in zip(*(each.unbind(1) for each in gates)):
            past, past_new = torch.baddbmm(self.state_bias, h, self.state).split(sizes, -1)  # (S, B, 2H), (S, B, H)
            reset, update = (gate + past).sigmoid().chunk(2, -1)
            h = torch.lerp((new + reset * past_new).tanh(), h, update)
            states.append(h)
        return torch.stack(states, 1)


class Policy(nn.Module):
    """One recurrent policy for all agents of a team, for S seeds."""

    def __init__(self, inputs, outputs, hidden, generators):
        super().__init__()
        self.hidden = hidden
        self.encoder = Linear(inputs, hidden, generators)
        self.gru = GRU(hidden, hidden, generators)
        self.head = Linear(hidden, outputs, generators)

    def forward(self, x, h=None):
        """Actions along sequences, (S, L, B, N, I) -> (S, L, B, N, A), and the last memory (S, B N, H)."""
        S, L, B, N, _ = x.shape
        h = x.new_zeros(S, B * N, self.hidden) if h is None else h
        encoded = self.encoder(x.flatten(1, 3)).relu_().view(S, L, B * N, -1)
        states = self.gru(encoded, h)
        return self.head(states.flatten(1, 2).relu()).tanh().view(S, L, B, N, -1), states[:, -1]


class Critics(nn.Module):
    """Q_1 and Q_2 of S seeds as 2 S networks: the first S of them are Q_1's."""

    def __init__(self, state_dim, action_dim, hidden, generators):
        super().__init__()
        twice = [*generators, *generators]
        self.first = Linear(state_dim + action_dim, hidden, twice)
        self.second = Linear(hidden, hidden, twice)
        self.third = Linear(hidden, 1, twice)

    def forward(self, state, action):
        """Q of K joint actions in each state: (S, L, B, D), (S, L, B, K, N A) -> (2, S, L, B, K)."""
        S, L, B, K, _ = action.shape
        state = state[..., None, :].expand(-1, -1, -1, K, -1)
        x = torch.cat([state, action], -1).flatten(1, 3).repeat(2, 1, 1)  # (2S, L B K, D + N A)
        eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
        rows = max(1, CACHE // self.first.weight[:, 0].numel()) if eager else x.shape[1]
        q = [self.third(self.second(self.first(part).relu_()).relu_()) for part in x.split(rows, 1)]
        return torch.cat(q, 1).view(2, S, L, B, K)


class Team(nn.Module):
    """Everything that S teams learn, and the target networks."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, N, A), I, D = data.actions.shape, data.obs.shape[-1], data.state.shape[-1]
        self.policy = Policy(I, A, args.policy_hidden, generators)
        self.critics = Critics(D, N * A, args.critic_hidden, generators)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)


# ---------------------------------------------------------------- looking at the data
class Windows(nn.Module):
    """W windows of L rows of the data, and their priorities for each seed, all 1 at first."""

    def __init__(self, start, length, seeds):
        """start (W,) holds each window's first row."""
        super().__init__()
        self.register_buffer("rho", torch.ones(seeds, len(start), dtype=torch.float64, device=start.device))  # (S, W)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("along", torch.arange(length, device=start.device)[:, None], persistent=False)  # (L, 1)

    def draw(self, uniform):
        """Windows in proportion to their priorities: uniform (S, B) in [0, 1) -> their numbers (S, B).

        Both in double precision: else the sum of a million would lose a small priority, and the grid of the random
        numbers miss it.
        """
        end = self.rho.cumsum(1)  # window w takes the piece of length rho_w that ends here
        index = torch.searchsorted(end, uniform * end[:, -1:], right=True)
        return index.clamp(max=len(self.start) - 1)  # if rounding led past the end

    def gather(self, index, data):
        """The windows `index` (S, B) as a minibatch, `Data` of (S, L, B) rows."""
        rows = self.start[index][:, None] + self.along
        return Data(*(table[rows] for table in data))

    def write(self, index, rho):
        """Give the windows `index` (S, B) the priorities rho (S, B)."""
        self.rho.scatter_(1, index, rho.double())

    def effective(self):
        """The effective share of the windows, (sum rho)^2 / (W sum rho^2), (S,): 1 if all are equally likely."""
        return self.rho.sum(1) ** 2 / (self.rho**2).sum(1) / len(self.start)


def distance(mine, batch):
    """Eq. 8 over A: how far the actions mine (S, L, B, N, A) are from those recorded in each window, (S, B).

    This alone says what "close" means: the priorities, those refreshed and all that is measured follow. Only
    `distance_l1` in metrics.csv, A times what is found here, then loses its sense.
    """
    gap = (batch.actions - mine).abs().mean((3, 4))  # (S, L, B)
    return (gap * batch.acted).sum(1) / batch.acted.sum(1)


def priority(d, steepness, floor, exponent):
    """Eq. 6, elementwise: rho^exponent, what a window's probability is in proportion to."""
    return torch.exp(-((steepness * d) ** 2)).clamp(min=floor) ** exponent


def steepness_at(step, args):
    """k in update `step`."""
    return args.steepness * min(1.0, step / (args.ramp * args.steps) if args.ramp else 1.0)


# ---------------------------------------------------------------- losses
def candidates(own, uniform, normal, sigma):
    """CQL's joint actions in each transition's state, (S, L-1, B, 3K, N, A), and log p_i, (S, L-1, B, 3K, N).

    own (S, L, B, N, A) are the policies' actions along the windows, the rest comes from `Noise`.
    """
    noise = sigma * normal
    near = torch.stack([own[:, :-1], own[:, 1:]], 1)[:, :, :, :, None] + noise  # (S, 2, L-1, B, K, N, A)
    log_p = (-0.5 * normal**2 - math.log(sigma) - 0.5 * math.log(2 * math.pi)).sum(-1)  # before clipping
    flat = torch.full_like(log_p[:, 0], uniform.shape[-1] * math.log(0.5))  # the density of one agent's part
    actions = torch.cat([uniform, *near.clamp(-1, 1).unbind(1)], 3)
    return actions, torch.cat([flat, *log_p.unbind(1)], 3)


def td_target(target_critics, batch, theirs, gamma):
    """y of the transitions, (S, L-1, B); theirs (S, L, B, N, A) are the target policy's actions."""
    q = target_critics(batch.state[:, 1:], theirs[:, 1:].flatten(3)[..., None, :]).amin(0)  # the lower of the two
    return batch.reward[:, :-1] + gamma * (1 - batch.done[:, :-1]) * q[..., 0]


def critic_loss(critics, batch, y, actions, log_p, cql):
    """L(Q_c), the mean of both critics: the loss, its squared error and its conservative part, each (S,)."""
    actions = torch.cat([batch.actions[:, :-1, :, None], actions], 3).flatten(4)  # (S, L-1, B, 1 + 3K, N A)
    q = critics(batch.state[:, :-1], actions)
    taken, other = q[..., 0], q[..., 1:]  # (2, S, L-1, B), (2, S, L-1, B, 3K)
    corrected = other[..., None] - log_p  # (2, S, L-1, B, 3K, N); only here do the agents differ
    gap = corrected.logsumexp(4).mean(-1) - taken
    error, gap = (0.5 * (y - taken) ** 2).mean((0, 2, 3)), gap.mean((0, 2, 3))
    return error + cql * gap, error, gap


def policy_loss(critics, batch, own, action_reg):
    """Eq. 3, (S,): each agent's own action (S, L, B, N, A) among the others' recorded ones."""
    N = own.shape[3]
    me = torch.eye(N, dtype=torch.bool, device=own.device)[..., None]  # (N, N, 1)
    joint = torch.where(me, own[:, :, :, None], batch.actions[:, :, :, None])  # (S, L, B, N, N, A)
    q = critics(batch.state, joint.flatten(4)).amin(0)  # (S, L, B, N)
    cost = action_reg * (own**2).mean((3, 4)) - q.mean(3)
    return (batch.acted * cost).sum((1, 2)) / batch.acted.sum((1, 2))


# ---------------------------------------------------------------- update
class RMSProp(nn.Module):
    """RMSProp of decay 0.9. A graph can hold it; torch's own class would break it."""

    def __init__(self, parameters, lr):
        super().__init__()
        self.moved, self.lr = list(parameters), lr
        self.squares = nn.ParameterList(map(torch.zeros_like, self.moved)).requires_grad_(False)

    @torch.no_grad()
    def step(self, gradients):
        """p <- p - lr g / (sqrt(v) + 1e-5), where v <- 0.9 v + 0.1 g^2, for all parameters p at once."""
        squares = list(self.squares)
        torch._foreach_mul_(squares, 0.9)
        torch._foreach_addcmul_(squares, gradients, gradients, 0.1)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, 1e-5)
        torch._foreach_addcdiv_(self.moved, gradients, roots, -self.lr)


def optimizers(team, args):
    """RMSProp for the critics and for the policy."""
    rates = {"critics": args.critic_lr, "policy": args.policy_lr}
    return {name: RMSProp(getattr(team, name).parameters(), lr) for name, lr in rates.items()}


def update(team, rmsprops, data, windows, noise, steepness, args):
    """One update of all networks and of the priorities; steepness () is k in Eq. 6. Returns what to log, (S,) each."""
    index = windows.draw(noise.windows)
    batch = windows.gather(index, data)  # (S, L, B, ...)
    own, _ = team.policy(batch.obs)  # (S, L, B, N, A)
    with torch.no_grad():
        theirs, _ = team.target_policy(batch.obs)
        y = td_target(team.target_critics, batch, theirs, args.gamma)
        d = distance(theirs, batch)

    # Both gradients before the first step. The sum over seeds leaves each seed the gradient that it would have alone.
    actions, log_p = candidates(own.detach(), noise.uniform, noise.normal, args.ood_noise)
    loss, q_loss, cql = critic_loss(team.critics, batch, y, actions, log_p, args.cql)
    for_critics = torch.autograd.grad(loss.sum(), rmsprops["critics"].moved)
    loss = policy_loss(team.critics, batch, own, args.action_reg)
    for_policy = torch.autograd.grad(loss.sum(), rmsprops["policy"].moved)
    rmsprops["critics"].step(for_critics)
    rmsprops["policy"].step(for_policy)

    with torch.no_grad():
        for network, target in ((team.critics, team.target_critics), (team.policy, team.target_policy)):
            torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), args.tau)
        if args.pjap:
            windows.write(index, priority(d, steepness, args.floor, args.exponent))
        if args.pjap and args.refresh:
            index = (noise.refresh * len(windows.start)).long()
            more = windows.gather(index, data)
            again = distance(team.target_policy(more.obs)[0], more)
            windows.write(index, priority(again, steepness, args.floor, args.exponent))
    logs = {"q_loss": q_loss, "cql": cql, "policy_loss": loss, "distance": d.mean(1)}
    return {name: value.detach() for name, value in logs.items()}


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "runs.py").exists() and (HOME / "envs" / "play.py").exists():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    import envs
    from data import layout, runs
elif __name__ == "__main__":
    sys.exit("error: this file runs inside its repository, beside data/ and envs/; alone, it is to be imported")


def preset(args):
    """What differs from HalfCheetah's values, above, in the other environments; each value can be set by its flag."""
    task = args.task or envs.TASKS.get(args.env, ("",))[0]
    small = dict(dataset="peak-0.5", num_seeds=10, steps=2000, window=2, batch_size=64, cql=0.1, policy_lr=1e-3)
    values = {
        "halfcheetah": {}, "reacher": dict(dataset="expert-mix"), "ant": dict(dataset="medium"),
        "polynomial": small | dict(normalize=False),
    }  # fmt: skip
    return values.get(args.env, dict(dataset="")) | dict(env=args.env, task=task)


def arrange(dataset, args):
    """The dataset as `Data`, its windows' first rows (W,), and the function that turns observations (..., N, O) into
    the policy's inputs."""
    dtype, rows, start = torch.get_default_dtype(), layout.rows(dataset), layout.windows(dataset.lengths, args.window)
    if len(start) == 0:
        raise ValueError(
            f"no episode of {args.dataset} has the {args.window} rows of a window, the longest has "
            f"{int(dataset.lengths.max()) + 1}: choose a smaller --window"
        )
    units = (layout.units(rows[name]) if args.normalize else (0.0, 1.0) for name in ("state", "obs"))
    (mean, std), (middle, spread) = units  # (D,), (D,); (N, O), (N, O): each agent has its own

    def encode(obs):
        N = obs.shape[-2]
        who = torch.eye(N, dtype=dtype, device=obs.device).expand(*obs.shape[:-1], N)
        return torch.cat([who, (obs.to(dtype) - middle) / spread], -1)

    rest = (rows[name] for name in ("actions", "reward", "done", "acted"))
    return Data(encode(rows["obs"]), (rows["state"] - mean) / std, *rest), start, encode


def act(policy, encode, obs, avail, memory):
    """What the teams do in B games of each seed, and their memory (S, B, N, H): obs (S, B, N, O) -> (S, B, N, A)."""
    actions, h = policy(encode(obs)[:, None], memory.flatten(1, 2))
    return actions[:, 0].float(), h.view(memory.shape)


def evaluate(policy, encode, args, step, episodes, device):
    """The returns (S, E) of the teams of all seeds, without noise: `runs.score`."""
    return runs.score(lambda *seen: act(policy, encode, *seen), args, step, episodes, device, policy.hidden)


@torch.no_grad()
def measure(policy, windows, data):
    """The mean distance of evenly spaced windows of the dataset to a policy, (S,)."""
    (S, W), total = windows.rho.shape, 0
    index = torch.linspace(0, W - 1, min(SAMPLE, W), device=data.obs.device).long()
    for part in index.split(200):
        batch = windows.gather(part.expand(S, -1), data)
        total = total + distance(policy(batch.obs)[0], batch).sum(1)
    return total / len(index)


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("maddpg_cql_pjap", args)
    device, S, method = run.device, args.num_seeds, "MADDPG+CQL" + "+PJAP" * args.pjap
    dataset = run.load(False, episodes=args.episodes, limit_terminates=args.time_limit_terminates)
    data, start, encode = arrange(dataset, args)
    team = Team(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    windows, rmsprops = Windows(start, args.window, S), optimizers(team, args)
    generators, learn = [runs.stream(seed, 1, device) for seed in run.seeds], run.compile(update)
    run.begin(team=team, windows=windows, rmsprops=rmsprops, generators=generators)

    # "Close" depends on how much actions vary at all. The code's k is HalfCheetah's, where they do by about 0.7.
    per_spread = 1.0 if args.env == "halfcheetah" else 0.7 / layout.units(data.actions[data.acted > 0])[1].mean().item()
    k, zero = torch.zeros((), device=device), torch.zeros(S, device=device)
    sums = nothing = dict.fromkeys(("q_loss", "cql", "policy_loss", "distance"), zero)  # since the last evaluation
    for step in run.steps(args.steps, args.eval_every):
        if run.due():
            since = step - (run.rows[-1]["step"] if run.rows else 0)
            logs = {name: value / since for name, value in sums.items()}  # NaN before the first update
            logs["distance_l1"] = data.actions.shape[-1] * logs["distance"]  # Eq. 8, which sums an agent's entries
            whole = measure(team.target_policy, windows, data)  # to that policy, as the distance of those drawn
            logs |= {"data_distance": whole, "effective_share": windows.effective()}
            run.check(logs)
            scores = evaluate(team.policy, encode, args, step, args.eval_episodes, device)
            far = f"distance {logs['distance'].mean():.4f} drawn, {logs['data_distance'].mean():.4f} dataset"
            run.record(logs, {name: x.mean(1) for name, x in scores.items()}, far)
            sums = nothing
        if step < args.steps:
            k.fill_(steepness_at(step, args) * per_spread)
            new = learn(team, rmsprops, data, windows, draw_noise(generators, data, args), k, args)
            sums = {name: sums[name] + value for name, value in new.items()}

    scores = evaluate(team.policy, encode, args, args.steps, 10 * args.eval_episodes, device)
    columns = {"distance": "windows drawn", "data_distance": "whole dataset"}
    last = {name: runs.over_seeds(torch.tensor([[row[name]] for row in run.rows[-S:]])) for name in columns}
    title = f"{method} on {run.subject}"
    curves = runs.draw_curves(run.rows, columns, {}, title, "updates", "distance to the target policy")
    views, policy = dataset.obs.shape[2:], team.policy
    run.keep_team(lambda *seen: act(policy, encode, *seen), views, 0, args.policy_hidden, policy)
    return run.finish(method, scores, dataset, run.best, figures={"distance.png": curves}, pjap=args.pjap, **last)


def parse(argv=None):
    """Read the command line; where no flag speaks, the environment's own values or those of the resumed run hold."""
    known = [env for env in envs.TASKS if env not in ("matrix", "bridge", "smac")]
    args = runs.parse(Args, preset, argv, __doc__, "MADDPG is for continuous actions", known)
    zero = "seed episodes eval_episodes ramp cql gamma action_reg refresh"
    runs.check_numbers(args, may_be_zero=zero, at_most_one="ramp floor gamma tau")
    if args.window < 2:
        raise ValueError("--window must be at least 2 rows: a step leads from one to the next")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
