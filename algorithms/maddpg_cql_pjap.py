"""MADDPG + CQL with proximal joint-action prioritisation, PJAP (Tilbury et al., 2024).

Paper: Coordination Failure in Cooperative Offline MARL. ICML 2024 ARLET,
arXiv 2407.01343.

The problem. N agents with continuous actions learn from a fixed dataset.
MADDPG moves each agent's policy uphill on a centralised Q-function, with
the teammates' actions taken from the data: the best response under data
(BRUD). Each agent answers what its teammates did, which need not be what
their policies do by now. Where the two differ, agents step past each other,
and no new data ever puts that right.

Why recorded teammates at all? Online it costs little: the replay buffer is
fresh, so what the teammates did is about what they do. Offline it keeps to
where Q is known: Q is fitted at recorded joint actions, and one with a
single agent's part replaced is still close to them. With everybody's part
replaced it may be far from all of them, and Q a guess there.

The idea. Change nothing but which windows of the data are drawn. A window
is drawn often if its recorded joint actions are close to what the policies
would do there, rarely otherwise. Then the recorded teammates are a good
stand-in for the real ones, in the policy's loss above all. CQL keeps Q low
at joint actions that nobody recorded.

Equations (those with a number are the paper's; the others, min_c, reg and
exponent are only in the authors' code). All agents share one policy mu. o_i
is agent i's view with its number, s the state, a the joint action. Q_1 and
Q_2 are two critics. A prime marks a network's slowly moving copy, and of o
and s the next step's. A window is L successive rows of one episode. mu has a
memory, which is empty where a window begins. E averages over the steps drawn,
E_i over agents too.
  Eq. 3   J(mu)  = E_i [ -min_c Q_c(s, (mu(o_i), a_-i)) + reg |mu(o_i)|^2 / A ]
                   a_-i as recorded: BRUD
  Eq. 6   rho    = max( exp(-(k d)^2), floor );   P(window) ~ rho^exponent
                   the paper's alpha is k^2 / A^2, as its d is A times this one
  Eq. 8   d      = mean over steps, agents and entries of |a - mu'(o)|; see choice 1
          y      = r + gamma (1 - terminated) min_c Q'_c(s', mu'(o'))
          J(Q_c) = 1/2 E (y - Q_c(s,a))^2
                   + cql E_i [ log sum_m exp( Q_c(s,a_m) - log p_i(a_m) ) - Q_c(s,a) ]
          a_m    a third each: uniform; mu(o) + noise; mu(o') + noise. Q judges all
                   of them in s, the third kind too, as in CQL's own code
          p_i    the density of agent i's part of a_m
mu descends J(mu), the critics the mean of J(Q_1) and J(Q_2). CQL's sum stands
for the integral of exp(Q) over actions, but for a constant factor: the weight
1/p_i makes up for how an action was drawn. Where Q is high at actions that
nobody recorded, the sum is high. CQL pushes Q down there, and up at the
recorded action.

Commands, and the return you should see (three seeds; one CPU core of a small server):
  python algorithms/maddpg_cql_pjap.py   2-agent HalfCheetah, 6 min: 2,608 +- 240; the
                                         data's own mean is 4,975 (dataset good)
  ... --no-pjap                          all windows equally likely: 2,621 +- 107
  ... --dataset good-medium              1,879 +- 238; without PJAP 1,903 +- 271
  ... --env polynomial --task sign-agreement --dataset uniform
                                         R = xy, 10 seeds, 3 min: 0.76 +- 0.06;
                                         without PJAP -0.28 +- 0.03
  ... --steps 500000 --num-seeds 10 --batch-size 64 --ood-actions 10 --no-normalize
                                         the paper's size
At this size PJAP makes no difference on HalfCheetah; maddpg_cql_pjap.md says why.

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, maddpg_cql_pjap as maddpg
  S, N, A, R = 2, 2, 3, 1000                    # seeds, agents, entries of an action, rows
  args = maddpg.Args(num_seeds=S, steps=20, window=10, batch_size=4)
  number = torch.eye(N).expand(R, N, N)         # one policy for all: it must know for whom
  obs = torch.cat([number, torch.randn(R, N, 5)], -1)
  state, actions = torch.randn(R, 4), 2 * torch.rand(R, N, A) - 1
  reward = -(actions - state[:, None, :A]).abs().mean((1, 2))      # to follow s is what pays
  acted = (torch.arange(R) < R - 1).float()     # one episode; no step begins in its last row
  data = maddpg.Data(obs, state, actions, reward, 0 * reward, acted)
  starts = torch.arange(R - args.window + 1)    # the windows' first rows: all that there are
  windows = maddpg.Windows(starts, args.window, S)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = maddpg.Team(data, args, generators)
  rmsprop = maddpg.optimizer(team, args)
  spread = maddpg.spread_of(data)
  for step in range(args.steps):
      noise = maddpg.draw_noise(generators, data, args)
      k = torch.tensor(maddpg.steepness_at(step, spread, args))
      logs = maddpg.update(team, rmsprop, data, windows, noise, k, args)

Choices made here; "code" is the authors' as submitted (June 2024). Reasons
and numbers: maddpg_cql_pjap.md.
  1. d is a mean over an agent's A entries (code); Eq. 8 has a sum. It is
     the distance to the target policy before the update (code); the paper
     says to the current policy. What --refresh adds is measured after the
     update.
  2. k grows over the first 30 % of the updates (code): at first all windows
     are alike, as no policy is worth being close to yet. The paper has no
     such ramp.
  3. An update refreshes the priorities of the windows just trained on (code).
     A window keeps its priority, and so the policy and the k of then, until
     it is drawn again; the floor lets each return. One never drawn has 1, the
     highest. --refresh N adds N windows drawn uniformly.
  4. Windows never straddle two episodes (code: they may). The last row may
     be what was seen after an episode's last step; it counts in no mean
     over actions.
  5. A window begins with an empty memory wherever it lies in its episode
     (code), while play carries the memory on.
  6. The critics see the prioritised windows too, and nothing corrects for
     how likely a window was (paper, code).
  7. A time limit is not the end: Q looks beyond it. In OG-MARL's data it
     is: --time-limit-terminates.
  8. Target networks start as copies (code: most likely from weights of
     their own). The critics start apart.
  9. RMSProp adds 1e-5 to the root of the mean square (code: 1e-10 to the
     mean square). Gradients are not clipped (code).
 10. CQL replaces all agents' actions at once, yet p_i is the density of
     agent i's part alone, before clipping (code). So Q is evaluated once
     for all agents.
 11. Both losses look at the networks as they were before the update (code).
 12. Batches are smaller, updates fewer, and inputs in units of the data's
     mean and spread (code: raw, --no-normalize).
 13. --steepness is the code's k on HalfCheetah, where the standard deviation
     of recorded actions is about 0.7. Elsewhere k is multiplied by 0.7 over
     theirs: what is close depends on how much actions vary at all.
 14. Seeds differ in all that is random here, but are evaluated in one
     environment.

Shapes: S seeds, L rows of a window, B windows of a minibatch, K joint actions
in a state (in CQL: of each kind), N agents, A entries of an agent's action, I
inputs, D state, R rows (observations) of the dataset, W windows of all of it.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn

CACHE = 2**17  # numbers that a critics' layer makes at a time: they fit a CPU's cache


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "halfcheetah"  # halfcheetah, reacher, ant, polynomial, or module:factory
    task: str = ""  # its task; by default the environment's first
    dataset: str = ""  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in a foreign game
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 3  # how many seeds, all at once
    steps: int = 5000  # updates
    eval_every: int = 1000  # updates between evaluations
    eval_episodes: int = 4  # games per seed and evaluation; 0 for none
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # use torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    pjap: bool = True  # draw windows by their priorities, not evenly
    steepness: float = 4.0  # k: how fast priorities fall with the distance
    scale_steepness: bool = True  # k in units of the actions' spread, choice 13
    ramp: float = 0.3  # the share of the updates over which k grows
    floor: float = 0.001  # the smallest priority, before the exponent
    exponent: float = 0.99  # of the priorities
    refresh: int = 0  # further windows whose priorities an update refreshes
    cql: float = 5.0  # weight of the conservative term
    ood_actions: int = 4  # joint actions of each of the three kinds there
    ood_noise: float = 0.3  # deviation of the noise on the policies' actions there
    action_reg: float = 1e-3  # weight of squared actions in the policy's loss
    gamma: float = 0.99  # discount
    time_limit_terminates: bool = False  # count a time limit as the end
    # --- the optimisation
    window: int = 20  # rows of a window
    batch_size: int = 16  # windows per update
    policy_hidden: int = 64  # units of the policy's layer and of its memory
    critic_hidden: int = 128  # units of the critics' two layers
    policy_lr: float = 3e-4  # RMSProp's step size for the policy
    critic_lr: float = 1e-3  # RMSProp's step size for the critics
    tau: float = 0.005  # how far the target networks move in an update
    normalize: bool = True  # inputs in units of the data's mean and spread


PRESETS = {  # what differs from the values above
    "halfcheetah": dict(scale_steepness=False),  # the code's k is meant for it
    "ant": dict(dataset="medium"),
    "polynomial": dict(
        num_seeds=10,
        steps=2000,
        window=2,
        batch_size=64,
        cql=0.1,
        policy_lr=1e-3,
        normalize=False,
    ),
}


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end.

    No step begins in an episode's last row: `acted` is 0 there, and so is all
    that belongs to a step. A minibatch is the same with (S, L, B) in place of R. Of a
    window's rows only the last may have no step, so its L - 1 transitions need no
    mask.
    """

    obs: torch.Tensor  # (R, N, I) what the policy sees, with the agent's number
    state: torch.Tensor  # (R, D) what the critics see
    actions: torch.Tensor  # (R, N, A) in [-1, 1], of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    acted: torch.Tensor  # (R,) 1 where a step begins


class Noise(NamedTuple):
    """What is random in an update; given it, an update is a function without chance."""

    windows: torch.Tensor  # (S, B) in [0, 1), float64: which windows to draw
    uniform: torch.Tensor  # (S, L-1, B, K, N, A) in [-1, 1): CQL's uniform actions
    normal: torch.Tensor  # (S, 2, L-1, B, K, N, A): CQL's noise on the policies' actions
    refresh: torch.Tensor  # (S, refresh) in [0, 1), float64: what else to refresh


def draw_noise(generators, data, args):
    """The `Noise` of one update, each seed's from its own generator."""

    def draw(kind, *shape, dtype=None):
        numbers = [kind(shape, generator=g, device=g.device, dtype=dtype) for g in generators]
        return torch.stack(numbers)

    shape = (args.window - 1, args.batch_size, args.ood_actions, *data.actions.shape[1:])
    windows = draw(torch.rand, args.batch_size, dtype=torch.float64)
    uniform = draw(torch.rand, *shape) * 2 - 1
    normal = draw(torch.randn, 2, *shape)
    refresh = draw(torch.rand, args.refresh, dtype=torch.float64)
    return Noise(windows, uniform, normal, refresh)


# ---------------------------------------------------------------- networks
def initial(generators, bound, *shape):
    """Weights to begin with, (S, *shape), each seed's from its own generator."""
    weights = [torch.empty(shape).uniform_(-bound, bound, generator=g) for g in generators]
    return torch.stack(weights)


class Linear(nn.Module):
    """S independent linear layers as one batched product."""

    def __init__(self, inputs, outputs, generators):
        super().__init__()
        start = initial(generators, inputs**-0.5, inputs + 1, outputs)  # bounds as in nn.Linear
        self.weight = nn.Parameter(start[:, :-1].clone())  # (S, in, out)
        self.bias = nn.Parameter(start[:, -1:].clone())  # (S, 1, out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (S, B, out)


class GRU(nn.Module):
    """S independent gated recurrent units, with the equations of nn.GRU."""

    def __init__(self, inputs, hidden, generators):
        super().__init__()
        start = initial(generators, hidden**-0.5, inputs + hidden + 2, 3 * hidden)
        parts = start.split([inputs, hidden, 1, 1], 1)  # columns: reset, update, new
        self.input, self.state, self.input_bias, self.state_bias = (
            nn.Parameter(part.clone()) for part in parts
        )

    def forward(self, x, h):
        """Run over sequences x (S, L, B, I) from h (S, B, H): (S, L, B, H)."""
        S, L, B, _ = x.shape
        sizes = [2 * h.shape[-1], h.shape[-1]]  # of both gates; of the new state
        seen = torch.baddbmm(self.input_bias, x.flatten(1, 2), self.input)
        states = []
        for now in seen.view(S, L, B, -1).unbind(1):  # (S, B, 3H)
            before = torch.baddbmm(self.state_bias, h, self.state)  # (S, B, 3H)
            gates, new = now.split(sizes, -1)
            gates_before, new_before = before.split(sizes, -1)
            reset, keep = (gates + gates_before).sigmoid().chunk(2, -1)
            h = torch.lerp((new + reset * new_before).tanh(), h, keep)
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
        """Actions along sequences, (S, L, B, N, I) -> (S, L, B, N, A), and the last memory.

        The memory h (S, B N, H) is 0 at first.
        """
        S, L, B, N, _ = x.shape
        if h is None:
            h = x.new_zeros(S, B * N, self.hidden)
        encoded = self.encoder(x.flatten(1, 3)).relu_().view(S, L, B * N, -1)
        states = self.gru(encoded, h)  # (S, L, B N, H)
        actions = self.head(states.flatten(1, 2).relu()).tanh()
        return actions.view(S, L, B, N, -1), states[:, -1]


class Critics(nn.Module):
    """Q_1 and Q_2 of S seeds as 2 S networks, a pair for each seed in turn."""

    def __init__(self, state_dim, action_dim, hidden, generators):
        super().__init__()
        twice = [g for g in generators for _ in range(2)]
        self.layers = nn.Sequential(
            Linear(state_dim + action_dim, hidden, twice),
            nn.ReLU(inplace=True),
            Linear(hidden, hidden, twice),
            nn.ReLU(inplace=True),
            Linear(hidden, 1, twice),
        )

    def forward(self, state, action):
        """Q of K joint actions in each state.

        (S, L, B, D), (S, L, B, K, N A) -> (2, S, L, B, K).
        """
        S, L, B, K, _ = action.shape
        state = state[..., None, :].expand(-1, -1, -1, K, -1)
        x = torch.cat([state, action], -1).flatten(1, 3)
        x = x.repeat_interleave(2, 0)  # (2S, L B K, D + N A)
        rows = x.shape[1]
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # in pieces, for speed
            rows = max(1, CACHE // self.layers[0].bias.numel())
        q = [self.layers(part) for part in x.split(rows, 1)]
        return torch.cat(q, 1).view(S, 2, L, B, K).transpose(0, 1)


class Team(nn.Module):
    """Everything that S teams learn; `targets` has slowly moving copies of both."""

    def __init__(self, data, args, generators):
        super().__init__()
        N, A = data.actions.shape[1:]
        I, D = data.obs.shape[-1], data.state.shape[-1]
        self.policy = Policy(I, A, args.policy_hidden, generators)
        self.critics = Critics(D, N * A, args.critic_hidden, generators)
        self.targets = copy.deepcopy(self).requires_grad_(False)


# ---------------------------------------------------------------- priorities
class Windows(nn.Module):
    """W windows of L rows of the data, and their priorities for each seed, all 1 at first."""

    def __init__(self, start, length, seeds):
        """start (W,) holds each window's first row."""
        super().__init__()
        device = start.device
        rho = torch.ones(seeds, len(start), dtype=torch.float64, device=device)
        self.register_buffer("rho", rho)  # (S, W)
        self.start = start
        self.along = torch.arange(length, device=device)[:, None]  # (L, 1)

    def draw(self, uniform):
        """Windows in proportion to their priorities: uniform (S, B) in [0, 1) -> (S, B).

        Both in double precision: else the sum of a million would lose a small
        priority, and the grid of the random numbers miss it.
        """
        end = self.rho.cumsum(1)  # window w takes the piece of length rho_w that ends here
        return torch.searchsorted(end, uniform * end[:, -1:], right=True)

    def gather(self, index, data):
        """The windows `index` (S, B) as a minibatch, `Data` of (S, L, B) rows."""
        rows = self.start[index][:, None] + self.along
        return Data(*(table[rows] for table in data))

    def refresh(self, index, d, steepness, args):
        """Eq. 6: give the windows `index` (S, B) the priorities of their distances d (S, B)."""
        rho = torch.exp(-((steepness * d) ** 2)).clamp(min=args.floor)
        self.rho.scatter_(1, index, (rho**args.exponent).double())


def distance(actions, batch):
    """Eq. 8 over A: how far actions (S, L, B, N, A) are from the recorded ones, (S, B)."""
    gap = (batch.actions - actions).abs().mean((3, 4))  # (S, L, B)
    return (gap * batch.acted).sum(1) / batch.acted.sum(1)


def spread_of(data):
    """The recorded actions' standard deviation, a mean over agents and entries."""
    return data.actions[data.acted > 0].std(0).mean().item()


def steepness_at(step, spread, args):
    """k of Eq. 6 in update `step`, a number; spread: as from `spread_of`."""
    k = args.steepness
    if args.ramp:
        k = k * min(1.0, step / (args.ramp * args.steps))
    return k * (0.7 / spread) if args.scale_steepness else k


# ---------------------------------------------------------------- losses
def candidates(own, noise, sigma):
    """CQL's joint actions in each transition's state, and log p_i.

    own (S, L, B, N, A), the policy's actions, -> (S, L-1, B, 3K, N, A), (S, L-1, B, 3K, N).
    """
    centre = torch.stack([own[:, :-1], own[:, 1:]], 1)  # now; a step later
    near = (centre.unsqueeze(4) + sigma * noise.normal).clamp(-1, 1)  # (S, 2, L-1, B, K, N, A)
    log_p = -0.5 * noise.normal**2 - math.log(sigma) - 0.5 * math.log(2 * math.pi)
    log_p = log_p.sum(-1)  # (S, 2, L-1, B, K, N) of an agent's A entries, before clipping
    A = own.shape[-1]
    flat = torch.full_like(log_p[:, 0], A * math.log(0.5))  # uniform on [-1, 1]^A
    actions = torch.cat([noise.uniform, *near.unbind(1)], 3)
    return actions, torch.cat([flat, *log_p.unbind(1)], 3)


def td_target(target_critics, batch, theirs, gamma):
    """y of the transitions, (S, L-1, B); theirs (S, L, B, N, A): the target policy's actions."""
    joint = theirs[:, 1:].flatten(3).unsqueeze(3)  # (S, L-1, B, 1, N A)
    q = target_critics(batch.state[:, 1:], joint).amin(0)[..., 0]  # the lower of the two
    return batch.reward[:, :-1] + gamma * (1 - batch.done[:, :-1]) * q


def critic_loss(critics, batch, y, actions, log_p):
    """The squared error and the conservative part of J(Q_c), means of both critics, (S,) each.

    y is from `td_target`, actions and log_p from `candidates`.
    """
    recorded = batch.actions[:, :-1].unsqueeze(3)
    joint = torch.cat([recorded, actions], 3).flatten(4)  # (S, L-1, B, 1 + 3K, N A)
    q = critics(batch.state[:, :-1], joint)
    taken, other = q[..., 0], q[..., 1:]  # (2, S, L-1, B), (2, S, L-1, B, 3K)
    corrected = other[..., None] - log_p  # (2, S, L-1, B, 3K, N); only here do the agents differ
    gap = corrected.logsumexp(4).mean(-1) - taken
    error = 0.5 * (y - taken) ** 2
    return error.mean((0, 2, 3)), gap.mean((0, 2, 3))


def policy_loss(critics, batch, own, action_reg):
    """Eq. 3, (S,): each agent's own action among its teammates' recorded ones.

    own (S, L, B, N, A) are the policy's actions.
    """
    N = own.shape[3]
    me = torch.eye(N, dtype=torch.bool, device=own.device)[..., None]  # (N, N, 1)
    joint = torch.where(me, own.unsqueeze(3), batch.actions.unsqueeze(3))  # (S, L, B, N, N, A)
    q = critics(batch.state, joint.flatten(4)).amin(0)  # (S, L, B, N)
    cost = action_reg * (own**2).mean((3, 4)) - q.mean(3)
    return (batch.acted * cost).sum((1, 2)) / batch.acted.sum((1, 2))


# ---------------------------------------------------------------- update
@torch.compiler.disable  # a graph ends here, as torch.compile cannot hold an optimiser's step
def take_step(rmsprop, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    rmsprop.step()
    rmsprop.zero_grad()


def optimizer(team, args):
    """RMSProp of decay 0.9, with a step size for the critics and another for the policy."""
    critics = {"params": team.critics.parameters(), "lr": args.critic_lr}
    policy = {"params": team.policy.parameters(), "lr": args.policy_lr}
    return torch.optim.RMSprop([critics, policy], alpha=0.9, eps=1e-5)


def update(team, rmsprop, data, windows, noise, steepness, args):
    """One update of all networks and priorities; steepness () is k. Returns logs, (S,) each."""
    index = windows.draw(noise.windows)
    batch = windows.gather(index, data)  # (S, L, B, ...)
    own, _ = team.policy(batch.obs)  # (S, L, B, N, A)
    with torch.no_grad():
        theirs, _ = team.targets.policy(batch.obs)
        y = td_target(team.targets.critics, batch, theirs, args.gamma)
        d = distance(theirs, batch)
    actions, log_p = candidates(own.detach(), noise, args.ood_noise)

    # Both gradients before the step. A sum leaves each seed the gradient that it would have alone.
    policy, critics = list(team.policy.parameters()), list(team.critics.parameters())
    loss = policy_loss(team.critics, batch, own, args.action_reg)
    error, gap = critic_loss(team.critics, batch, y, actions, log_p)
    for_policy = torch.autograd.grad(loss.sum(), policy)
    for_critics = torch.autograd.grad((error + args.cql * gap).sum(), critics)
    logs = {"q_loss": error, "cql": gap, "policy_loss": loss, "distance": d.mean(1)}
    logs = {name: value.detach() for name, value in logs.items()}
    take_step(rmsprop, policy + critics, for_policy + for_critics)

    with torch.no_grad():
        torch._foreach_lerp_(list(team.targets.parameters()), policy + critics, args.tau)
        if args.pjap:
            windows.refresh(index, d, steepness, args)
        if args.pjap and args.refresh:
            index = (noise.refresh * len(windows.start)).long()  # (S, refresh)
            batch = windows.gather(index, data)
            d = distance(team.targets.policy(batch.obs)[0], batch)
            windows.refresh(index, d, steepness, args)
    return logs


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import layout
    from data.run import Player, Run, launch, read_args
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")


def arrange(dataset, args):
    """The dataset as `Data`, its windows' first rows (W,), and what turns observations (..., N, O)
    into the policy's inputs."""
    rows = layout.rows(dataset)
    _, remaining = layout.age(dataset.lengths)  # (R,) steps until the episode's end
    start = (remaining >= args.window - 1).nonzero()[:, 0]
    if args.window < 2 or len(start) == 0:
        longest = remaining.max().item() + 1
        raise ValueError(f"--window must be from 2 to {longest}, the longest episode's rows")
    see = layout.inputs(rows["obs"], args, correction=1)  # each agent's view in its own units
    see_state = layout.inputs(rows["state"], args, correction=1)

    def encode(obs):
        N = obs.shape[-2]
        inputs = see(obs)
        number = torch.eye(N, device=obs.device)
        return torch.cat([number.expand(*obs.shape[:-1], N), inputs], -1)

    steps = (rows[name] for name in ("actions", "reward", "done", "acted"))
    return Data(encode(rows["obs"]), see_state(rows["state"]), *steps), start, encode


# ---------------------------------------------------------------- evaluation
def player(policy, encode):
    """How the teams of all seeds play: without noise, and with their memory carried on."""

    def act(obs, avail, memory, clocks=None):
        """obs (S, B, N, O), memory (S, B, N, H) -> actions (S, B, N, A) and the memory."""
        actions, h = policy(encode(obs)[:, None], memory.flatten(1, 2))
        return actions[:, 0].float(), h.view(memory.shape)

    return Player(act, policy, policy.hidden)


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("maddpg_cql_pjap", args)
    dataset = run.load(False, limit_terminates=args.time_limit_terminates)
    data, start, encode = arrange(dataset, args)
    team = Team(data, args, run.streams(0, "cpu")).to(run.device)
    windows = Windows(start, args.window, args.num_seeds)
    rmsprop = optimizer(team, args)
    generators = run.streams(1)
    spread = spread_of(data)
    learn = run.compile(update)
    run.begin(team=team, windows=windows, rmsprop=rmsprop, generators=generators)
    play = player(team.policy, encode)
    totals, count = {}, 0  # of the logs since the last evaluation
    for step in run.steps(play):
        k = torch.full((), steepness_at(step, spread, args), device=run.device)
        noise = draw_noise(generators, data, args)
        logs = learn(team, rmsprop, data, windows, noise, k, args)
        totals = {name: totals.get(name, 0) + value for name, value in logs.items()}
        count += 1
        if run.scheduled(step + 1):
            run.logs = {name: total / count for name, total in totals.items()}
            totals, count = {}, 0
    return run.finish("MADDPG+CQL+PJAP" if args.pjap else "MADDPG+CQL", play)


def parse(argv=None):
    """Read the command line; where no flag speaks, the preset's values or a resumed run's hold."""
    return read_args(
        Args,
        PRESETS,
        argv,
        __doc__,
        kinds="MADDPG is for continuous actions",
        known=("halfcheetah", "reacher", "ant", "polynomial"),
        may_be_zero="seed episodes eval_episodes ramp cql gamma action_reg refresh",
        at_most_one="ramp floor gamma tau",
    )


if __name__ == "__main__":
    launch(main, parse)
