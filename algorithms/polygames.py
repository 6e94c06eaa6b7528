"""Polynomial games: why offline MADDPG miscoordinates, and how PJAP repairs it.

Paper: Tilbury, Formanek, Beyers, Shock, Pretorius. Coordination Failure in
Cooperative Offline MARL. ICML 2024 ARLET workshop, arXiv 2407.01343, sections 2
to 4 (Figures 1 to 5).

The problem. Two agents, no state; each agent's policy is one number, theta_x
and theta_y, and that number is its action. The shared reward R(a_x, a_y) is a
known polynomial and plays the critic. A critic-based offline method asks for
each agent: how should I move, given what the other one did *in the data*? The
paper calls the answer the best response under data (BRUD). It is right for the
joint actions in the data and can be wrong for the policies being learnt. In R =
xy, for one, each agent follows the sign of the other's mean in the data,
whatever the other's policy is. Online, fresh data stay close to the policies;
offline, nothing keeps them close.

The idea. Proximal joint-action prioritisation (PJAP) changes only which data
are drawn: mostly joint actions close to the current joint policy. Then the
other agent's logged action is again a good stand-in for what it would do now.
Nothing corrects for how likely a draw was. The games are small enough to check
all this in closed form.

Why not simply follow the true gradient, the slope of R at theta? Here one
could, as R is known everywhere. A critic that was learned from data is known
only near the data. So MADDPG takes one agent's action from its policy and the
other's from the data.

Equations (numbers from the paper; m, s^2: mean and variance of the *other*
agent's data; twin peaks: R = -A (x^2 + y^2) - B x^2 y^2 + C x y, one peak in ++
and its mirror image in --):
  Eq. 4   theta_x += eta E_data[dR/da_x at (theta_x, a_y)]; theta_y likewise, from the
          same theta
  Eq. 5   twin peaks: BRUD ends on the ++ peak iff, for both agents,
          s^2 = -m^2 + C m / sqrt(2B (C - 2A)) - A/B
          (below it in the paper) it ends at theta* = C m / (2A + 2B (m^2 + s^2))
  Eq. 6   rho = max(exp(-alpha d^2), epsilon); data are drawn in proportion to rho
  Eq. 7   d = |a_x - theta_x| + |a_y - theta_y|, the distance of a data point to the policy
d counts both coordinates, as a draw serves both agents: each one's coordinate
is what the other one answers. epsilon keeps every point within reach. Where all
data are so far that each rho is epsilon, draws are even: plain MADDPG leads the
policy to the data. Plain MADDPG is alpha = 0: all rho are 1.

Where PJAP ends (our derivation), and why not at the peak's .5625. It draws data
near the policy, and BRUD feels their spread. Let the data be equally dense
everywhere and epsilon tiny. Then d has density 2 alpha d exp(-alpha d^2), so E
d^2 = 1/alpha. Given d, |a_x - theta_x| is uniform on [0, d]. So per coordinate
the draws have mean theta and variance v = 1/(3 alpha). The expression below Eq.
5, with theta for m and v for s^2, gives theta*^2 = (C - 2A) / (2B) - v and
R(theta*) = R(peak) - B v^2, .5502 for alpha = 6. In Figure 5 the data are
densest at the peak, so draws are narrower and nearer to it. The many far points
at sigma = 1, each with rho = epsilon, widen them again.

Commands:
  python algorithms/polygames.py                           every figure and the table
  python algorithms/polygames.py --figures 5 --alpha 10    one figure, other settings

What you should see (9 s on one core of a small server). The files are config.json,
metrics.csv, summary.json and a PNG a figure; they replace those of an earlier run.
  Table   (summary.json) four games: BRUD ends where the closed form says, to 1e-5, given
          the sample's own mean and variance
  Fig. 1  R = xy: the BRUD step points away from the true gradient
  Fig. 2  R = xy, online: reward 1 in every run; the mean path is 2.20, 2.38, 2.67, 3.06
          long for buffers of 32, 1280, 2560, 5120
  Fig. 3  R = xy, offline: from three starts a straight line to the bottom right, where the
          reward is below 0
  Fig. 4  twin peaks; a, data around the origin: always ends at the origin; b, data around
          the ++ peak: ends on it only at sigma = 0
  Fig. 5  twin peaks, data around the ++ peak: reward after 100 epochs (one update each),
          mean of 10 seeds (paper: its web page's plots, measured by pixel):
          sigma              0     0.2    0.5    1.0            0     0.2    0.5    1.0
          MADDPG           0.562  0.555  0.427  0.157   paper  .5625  .555   .43    .15
          MADDPG + PJAP    0.562  0.560  0.554  0.544   paper  .5625  .56    .55    .54

In your own loop (this file alone will do; a game is any function of two tensors):
  import torch, polygames
  reward = lambda x, y: -((x * y - 0.5) ** 2)            # best where x y = 1/2
  S, M, B = 10, 1000, 32                                 # seeds, data points, batch size
  data = 2 * torch.rand(S, M, 2, dtype=torch.float64) - 1
  theta = torch.tensor([-0.5, 0.5], dtype=torch.float64).expand(S, 2)
  for step in range(300):
      uniforms = torch.rand(S, B, dtype=torch.float64)
      theta, distance = polygames.update(reward, theta, data, 0.05, uniforms, 6.0, 1e-3)
  print(reward(*theta.T).mean(), distance.mean())        # -0.0002 and 0.16
Without PJAP, alpha = 0.0, it prints -0.25 and 0.50.

Differences from the paper, and choices that it leaves open; polygames.md has
more:
  1. Figure 5's settings are not printed but A, B, C. The project page's plots,
     measured by pixel, show the start (-0.5, 0.5), 100 epochs, and ends,
     rewards and distances that fit sigma = 0, 0.2, 0.5, 1.0 to two or three
     digits. At sigma = 0 an epoch leaves 0.900 of the distance to the peak and
     a step 1 - eta (2A + 2B m^2): eta is 0.02.
  2. Not to be seen there either: alpha, epsilon, size of dataset and batch.
     Ours: alpha = 6 (on the summed distance, Eq. 7) and epsilon = 1e-3, of
     fifteen pairs one of the closest to those plots; 1000 points, batches of
     32.
  3. Every priority is refreshed at every step, which is cheap here; the paper
     refreshes a subset.
  4. Not printed for Figure 2: start, noise, step, batch and buffer sizes. Ours,
     chosen to show the effect: start (-0.75, 0.8), noise 0.2, eta = 0.02. Each
     step adds 32 joint actions to the buffer. It then parts what is held into
     32 equal pieces and draws one from each, so the smallest buffer is used
     whole: exactly on-policy. The policy is kept inside [-1, 1]^2, because R =
     xy has no maximum.
  5. Figures 3 and 4 use the whole dataset in every update, and samples shifted
     to the exact mean that the text speaks of, so end points are exact; Figure
     5 uses raw samples and minibatches. Offline nothing keeps the policy inside
     the square. Starts and spreads of 3 and 4 are ours, as is the step size of
     3, five times that of the others.
  6. Double precision throughout: exact comparisons, and no slower at this size.

Legend: S seeds, M data points, B batch size, K steps; the last dimension 2 is
(x, y). "..." stands for the runs that train at once: any leading dimensions
(spreads, starts, methods, seeds), which broadcast as usual.
"""

import itertools
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- the run
    figures: tuple[Literal["1", "2", "3", "4a", "4b", "5"], ...] = ("1", "2", "3", "4a", "4b", "5")
    out_dir: str = "runs/polygames"  # folder for all files
    seed: int = 0  # the first seed; every seed has its own random stream
    num_seeds: int = 10  # how many seeds, all at once
    device: str = "auto"  # auto, cpu or cuda
    # --- learning
    learning_rate: float = 0.02  # step size eta of plain gradient ascent
    batch_size: int = 32  # joint actions per update in Figures 2 and 5
    steps: int = 100  # epochs of Figure 5, one update each
    full_batch_steps: int = 300  # updates in Figures 3 and 4 and in the table
    # --- offline data
    num_samples: int = 1000  # joint actions in a dataset
    sigmas: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0)  # spreads of data in Figures 4 and 5
    # --- PJAP
    alpha: float = 6.0  # steepness of the priority in the squared L1 distance (Eq. 6)
    epsilon: float = 1e-3  # smallest priority (Eq. 6)
    # --- online data
    online_steps: int = 400  # updates of Figure 2
    capacities: tuple[int, ...] = (32, 1280, 2560, 5120)  # buffer sizes of Figure 2
    noise: float = 0.2  # standard deviation of the exploration noise of Figure 2
    # --- twin peaks
    a: float = 1.0  # constant A of the twin peaks game
    b: float = 4.0  # constant B of the twin peaks game
    c: float = 5.0  # constant C of the twin peaks game, above 2A


# ---------------------------------------------------------------- games
def games(args):
    """The rewards R(x, y) of the paper's four games, elementwise on tensors."""
    a, b, c = args.a, args.b, args.c
    return {
        "decoupled": lambda x, y: x + y,
        "sign agreement": lambda x, y: x * y,
        "action agreement": lambda x, y: -((x - y) ** 2),
        "twin peaks": lambda x, y: -a * (x**2 + y**2) - b * (x * y) ** 2 + c * x * y,
    }


def brud_ends(args, theta, time, m, s2):
    """Where BRUD leads in each game, in closed form, (..., 2).

    It begins at theta, and time is eta times the number of steps. m and s2 (..., 2) are mean and
    variance of the other agent's data. The first two games have no fixed point: their field is
    constant, so the end depends on the time.
    """
    return {
        "decoupled": theta + time,
        "sign agreement": theta + time * m,
        "action agreement": m,  # the two means, swapped
        "twin peaks": args.c * m / (2 * args.a + 2 * args.b * (m**2 + s2)),  # below Eq. 5
    }


def peak(args):
    """Both coordinates of the ++ peak of twin peaks; the other peak is its mirror image."""
    return math.sqrt((args.c - 2 * args.a) / (2 * args.b))


def eq5_sigma(m, args):
    """Eq. 5: the spread at which BRUD ends on the ++ peak for data of mean m; NaN for none."""
    slope = args.c / math.sqrt(2 * args.b * (args.c - 2 * args.a))
    variance = -(m**2) + slope * m - args.a / args.b
    return math.sqrt(max(variance, 0.0)) if variance > -1e-12 else math.nan


# ---------------------------------------------------------------- data
def draw(args, *wanted):
    """Random numbers for each (kind, *shape), kind torch.rand or torch.randn: (S, *shape).

    Every seed has a random stream of its own: S seeds at once equal S runs of one seed.
    """
    streams = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
    drawn = [
        [kind(shape, generator=g, dtype=torch.float64) for g in streams] for kind, *shape in wanted
    ]
    return [torch.stack(numbers).to(args.device) for numbers in drawn]


def recentre(data, mean):
    """Shift (..., M, 2) so that the sample mean is exactly `mean`."""
    return data - data.mean(-2, keepdim=True) + data.new_tensor(mean)


def priorities(theta, data, alpha, epsilon):
    """Eq. 6 and 7: theta (..., 2), data (..., M, 2) -> rho (..., M)."""
    distance = (data - theta[..., None, :]).abs().sum(-1)  # Eq. 7, (..., M)
    return torch.exp(-alpha * distance**2).clamp(min=epsilon)  # Eq. 6


def sample(data, rho, uniforms):
    """Draw with replacement in proportion to rho (..., M): data (..., M, 2) -> (..., B, 2).

    Each of the uniforms (..., B) in [0, 1) is looked up in the cumulative sum of rho.
    """
    end = rho.cumsum(-1)
    index = torch.searchsorted(end, uniforms * end[..., -1:], right=True)  # (..., B)
    return data.expand(*rho.shape, 2).take_along_dim(index[..., None], -2)


# ---------------------------------------------------------------- update
def brud_gradient(reward, theta, batch):
    """Eq. 4, the update of MADDPG: theta (..., 2), batch (..., B, 2) -> (..., 2).

    With the joint policy itself as the only data point, theta[..., None, :], it is the true
    gradient of R.
    """
    theta = theta.detach().requires_grad_()
    own_x, own_y = theta[..., :1], theta[..., 1:]  # (..., 1)
    # Each agent's own action comes from its policy, the other agent's from the data.
    objective = reward(own_x, batch[..., 1]) + reward(batch[..., 0], own_y)  # (..., B)
    # Mean over the data, sum over the runs: no run feels another one's gradient.
    return torch.autograd.grad(objective.mean(-1).sum(), theta)[0]


def update(reward, theta, data, eta, uniforms=None, alpha=0.0, epsilon=1.0):
    """One update of offline MADDPG (Eq. 4) on data drawn by PJAP (Eq. 6, 7), or evenly (alpha 0).

    Args:
        theta: (..., 2), which has all the runs.
        data: (..., M, 2).
        uniforms: (..., B) in [0, 1); None to use all data.
        alpha, epsilon: numbers, or tensors that broadcast with (..., M).
    Returns:
        The new theta, and the batch's mean distance from the old one, per coordinate, (...,).
    """
    batch = data
    if uniforms is not None:  # every priority is refreshed at every step
        rho = priorities(theta, data, alpha, epsilon)  # (..., M)
        batch = sample(data, rho, uniforms)  # (..., B, 2)
    distance = (batch - theta[..., None, :]).abs().mean((-2, -1))
    return theta + eta * brud_gradient(reward, theta, batch), distance


def train_offline(reward, theta, data, steps, eta, uniforms=None, alpha=0.0, epsilon=1.0):
    """K = steps times `update`, with uniforms (..., K, B) or None.

    Returns:
        The policies (..., K+1, 2) and the distances (..., K).
    Raises:
        FloatingPointError: a policy diverges.
    """
    path, distances = [theta], []
    for k in range(steps):
        chance = None if uniforms is None else uniforms[..., k, :]
        theta, distance = update(reward, theta, data, eta, chance, alpha, epsilon)
        path.append(theta)
        distances.append(distance)
    if not (theta.abs() < 1e3).all():
        raise FloatingPointError("the policy diverged: lower --learning-rate or --sigmas")
    return torch.stack(path, -2), torch.stack(distances, -1)


def train_online(reward, theta, capacity, noise, uniforms, eta):
    """Online MADDPG with a first-in-first-out replay buffer, the policy kept inside [-1, 1]^2.

    Args:
        theta: (..., 2), which has all the runs.
        capacity: (...,) int, each at least B.
        noise: (..., K, B, 2), added to the policy to act.
        uniforms: (..., K, B).
    Returns:
        The policies (..., K+1, 2), and the last buffers (..., largest capacity, 2), NaN where a
        buffer is shorter or not yet full.
    """
    steps, batch_size = uniforms.shape[-2:]
    buffer = theta.new_full((*theta.shape[:-1], int(capacity.max()), 2), math.nan)
    place = torch.arange(batch_size, device=theta.device)  # (B,)
    capacity = capacity[..., None]
    path = [theta]
    for k in range(steps):
        actions = theta[..., None, :] + noise[..., k, :, :]  # (..., B, 2)
        slot = (k * batch_size + place) % capacity  # the oldest entries, (..., B)
        buffer.scatter_(-2, slot[..., None].expand_as(actions), actions)
        # One draw from each B-th of what is held: a buffer of size B is used whole (on-policy).
        held = capacity.clamp(max=(k + 1) * batch_size)  # (..., 1)
        index = ((place + uniforms[..., k, :]) * (held / batch_size)).long()  # (..., B)
        index = torch.minimum(index, held - 1)
        batch = buffer.take_along_dim(index[..., None], -2)  # (..., B, 2)
        theta = update(reward, theta, batch, eta)[0].clamp(-1, 1)
        path.append(theta)
    return torch.stack(path, -2), buffer


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data.run import choose_device, files, launch, over_seeds, read_flags, say, surfaces
    from data.run.command_line import check_numbers
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")

SETTING = ["figure", "game", "method", "sigma", "capacity", "start"]
RESULT = ["theta_x", "theta_y", "reward", "path_length"]  # of metrics.csv, behind the seed
STARTS = ((-0.9, 0.5), (-0.3, 0.4), (-0.6, -0.2))  # Figures 3 and 4


# ---------------------------------------------------------------- results
def cases(args):
    """What to compare with the closed form: (game, note, the data's mean, their spread)."""
    top = peak(args)
    # Eq. 5 has a solution for means in middle -+ half; the spread is largest, half, in the middle.
    middle = args.c / math.sqrt(8 * args.b * (args.c - 2 * args.a))
    half = math.sqrt(max(middle**2 - args.a / args.b, 0.0))
    means = torch.linspace(middle - half, middle + half, 5, dtype=torch.float64).tolist()
    return [
        *[(game, "", (-0.02, 0.04), 0.5) for game in games(args) if game != "twin peaks"],
        *[("twin peaks", "Fig. 4a", (0.0, 0.0), sigma) for sigma in args.sigmas],
        *[("twin peaks", "Fig. 4b", (top, top), sigma) for sigma in args.sigmas],
        *[("twin peaks", "Eq. 5", (m, m), eq5_sigma(m, args)) for m in means],
        ("twin peaks", "2 x Eq. 5", (middle, middle), 2 * half),  # too wide: not the peak
    ]


def table(args):
    """BRUD run to its end on samples of known mean, beside the closed form; a dict per case."""
    (unit,) = draw(args, (torch.randn, args.num_samples, 2))  # (S, M, 2)
    theta = unit.new_tensor((-0.5, 0.5)).expand(args.num_seeds, 2)
    steps, eta = args.full_batch_steps, args.learning_rate
    rows = []
    for game, note, mean, sigma in cases(args):
        data = recentre(sigma * unit, mean)
        path, _ = train_offline(games(args)[game], theta, data, steps, eta)
        end = path[:, -1]  # (S, 2)
        # The closed form takes the sample's own moments; flip: each agent's are the other one's.
        m, s2 = data.mean(1).flip(1), data.var(1, unbiased=False).flip(1)
        formula = brud_ends(args, theta, steps * eta, m, s2)[game]
        at_peak = ((end - peak(args)).abs() < 0.005).all().item()
        row = {
            "game": game,
            "note": note,
            "mean": mean,
            "sigma": sigma,
            "end": end.mean(0).tolist(),
            "closed_form": formula.mean(0).tolist(),
            "difference": (end - formula).abs().max().item(),
            "at_peak": at_peak if game == "twin peaks" else None,
        }
        rows.append(row)
    return rows


def result_rows(args, figure, game, paths, **axes):
    """The rows of metrics.csv for paths (..., S, K+1, 2), where "..." are the axes, in order."""
    axes["seed"] = range(args.seed, args.seed + args.num_seeds)
    paths = paths.flatten(0, -3)
    x, y = paths[:, -1].T
    length = paths.diff(dim=1).norm(dim=2).sum(1)
    numbers = torch.stack([x, y, games(args)[game](x, y), length], 1).tolist()
    rows = []
    for labels, result in zip(itertools.product(*axes.values()), numbers):
        row = dict.fromkeys([*SETTING, "seed"], "")
        row |= {"figure": figure, "game": game, "method": "MADDPG"}
        rows.append(row | dict(zip(axes, labels)) | dict(zip(RESULT, result)))
    return rows


def mean_rewards(rows):
    """Each setting's reward over seeds, from the rows of metrics.csv."""
    means = []
    for setting, group in itertools.groupby(rows, lambda row: [row[name] for name in SETTING]):
        rewards = torch.tensor([[row["reward"]] for row in group], dtype=torch.float64)
        means.append(dict(zip(SETTING, setting)) | over_seeds(rewards))
    return means


def report(summary):
    """How well the closed forms hold, and the rewards of Figure 5."""
    worst = max(row["difference"] for row in summary["table"])
    text = f"BRUD ends where the closed forms say, to {worst:.0e}"
    line = "\nFigure 5, sigma {sigma:<3g} {method:6} reward {mean:.3f} +- {stderr:.3f}"
    for row in summary["rewards"]:
        if row["figure"] == "5":
            text += line.format(**row)
    return text


# ---------------------------------------------------------------- figures
def figure_1(args):
    """One BRUD step on R = xy, from one data point in the opposite corner."""
    reward = games(args)["sign agreement"]
    policy = (-0.35, 0.35)
    point = (0.45, -0.45)
    theta, data = torch.tensor([policy, point])
    brud = brud_gradient(reward, theta, data[None])
    true = brud_gradient(reward, theta, theta[None])
    return surfaces.draw_step(reward, policy, point, brud, true), []


def figure_2(args):
    """Online MADDPG on sign agreement, one column per replay buffer capacity."""
    reward = games(args)["sign agreement"]
    shape = args.online_steps, args.batch_size
    noise, uniforms = draw(args, (torch.randn, *shape, 2), (torch.rand, *shape))
    theta = noise.new_tensor((-0.75, 0.8)).expand(len(args.capacities), args.num_seeds, 2)
    capacity = torch.tensor(args.capacities, device=args.device)[:, None]  # (capacities, 1)
    noise, eta = args.noise * noise, args.learning_rate
    paths, buffers = train_online(reward, theta, capacity, noise, uniforms, eta)
    sizes = args.capacities
    rows = result_rows(args, "2", "sign agreement", paths, capacity=sizes, sigma=[args.noise])
    figure = surfaces.draw_buffers(reward, sizes, args.batch_size, paths, buffers)
    return figure, rows


def figure_3(args):
    """Offline MADDPG on sign agreement: uniform data of mean (-0.02, 0.04), three starts."""
    reward = games(args)["sign agreement"]
    mean = (-0.02, 0.04)
    args = replace(args, num_seeds=1)  # the mean decides everything and is the same for every seed
    (uniforms,) = draw(args, (torch.rand, args.num_samples, 2))
    data = recentre(2 * uniforms - 1, mean)  # (1, M, 2)
    theta = data.new_tensor(STARTS)[:, None]  # (starts, 1, 2)
    eta = 5 * args.learning_rate  # the field is constant and weak, 0.045 long
    paths, _ = train_offline(reward, theta, data, args.full_batch_steps, eta)
    rows = result_rows(args, "3", "sign agreement", paths, start=range(3))
    line = torch.linspace(-0.8, 0.8, 8, dtype=torch.float64, device=args.device)
    grid = torch.cartesian_prod(line, line)  # (64, 2)
    brud = brud_gradient(reward, grid, data)
    true = brud_gradient(reward, grid, grid[:, None])
    return surfaces.draw_fields(reward, data[0], mean, grid, brud, true, paths), rows


def figure_4(args, name, centre):
    """Offline MADDPG on twin peaks, data of mean (centre, centre), one column per spread."""
    reward = games(args)["twin peaks"]
    (unit,) = draw(args, (torch.randn, args.num_samples, 2))  # (S, M, 2)
    sigmas = unit.new_tensor(args.sigmas).view(-1, 1, 1, 1, 1)
    data = recentre(sigmas * unit, (centre, centre))  # (spreads, 1, S, M, 2)
    starts = unit.new_tensor(STARTS)[:, None]
    theta = starts.expand(len(sigmas), -1, args.num_seeds, 2)  # spreads x starts x seeds
    paths, _ = train_offline(reward, theta, data, args.full_batch_steps, args.learning_rate)
    rows = result_rows(args, name, "twin peaks", paths, sigma=args.sigmas, start=range(3))
    first = data[:, 0, 0], paths[:, :, 0]  # of the first seed
    return surfaces.draw_ends(reward, peak(args), args.sigmas, *first, centre), rows


def figure_5(args):
    """Offline MADDPG with and without PJAP on twin peaks, data around the ++ peak."""
    reward = games(args)["twin peaks"]
    shape = args.steps, args.batch_size
    unit, uniforms = draw(args, (torch.randn, args.num_samples, 2), (torch.rand, *shape))
    sigmas = unit.new_tensor(args.sigmas).view(-1, 1, 1, 1, 1)
    data = peak(args) + sigmas * unit  # (spreads, 1, S, M, 2)
    theta = unit.new_tensor((-0.5, 0.5)).expand(len(data), 2, args.num_seeds, 2)
    alpha = unit.new_tensor((0.0, args.alpha))[:, None, None]  # spreads x methods x seeds
    setting = args.steps, args.learning_rate, uniforms, alpha, args.epsilon
    paths, distances = train_offline(reward, theta, data, *setting)
    sigmas = args.sigmas
    both = ("MADDPG", "PJAP")
    rows = result_rows(args, "5", "twin peaks", paths, sigma=sigmas, method=both)
    points = data[:, 0, 0]  # of the first seed
    return surfaces.draw_methods(reward, peak(args), sigmas, points, paths, distances), rows


FIGURES = {
    "1": figure_1,
    "2": figure_2,
    "3": figure_3,
    "4a": lambda args: figure_4(args, "4a", 0.0),
    "4b": lambda args: figure_4(args, "4b", peak(args)),
    "5": figure_5,
}


# ---------------------------------------------------------------- main
def main(args):
    """Compute everything, then write it, then print it."""
    began = time.perf_counter()
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings
    device = choose_device(args.device)
    folder = Path(args.out_dir)
    args = replace(args, device=device.type)
    figures, rows = {}, []
    for name in args.figures:
        figures[name], new_rows = FIGURES[name](args)
        rows += new_rows
    summary = {
        "script": "polygames",
        "device": args.device,
        "seeds": [args.seed + s for s in range(args.num_seeds)],
        "table": table(args),
        "rewards": mean_rewards(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.save_json(folder / "config.json", files.provenance(device) | asdict(args))
    for name, figure in figures.items():
        files.save_figure(folder / f"figure{name}.png", figure)
    if rows:  # Figure 1 alone trains nothing
        files.save_csv(folder / "metrics.csv", rows)
    summary["wall_seconds"] = time.perf_counter() - began
    files.save_json(folder / "summary.json", summary)
    say(report(summary))
    say(f"files: {folder}")


def parse(argv=None):
    """Read the command line; raises ValueError for what cannot be used."""
    args = read_flags(Args, argv, __doc__)
    check_numbers(args, ["seed", "sigmas", "noise"], ["epsilon"], [])
    if min(args.capacities) < args.batch_size:
        raise ValueError(f"--capacities must be at least --batch-size, {args.batch_size}")
    if args.c <= 2 * args.a:
        raise ValueError(f"twin peaks needs C > 2A, not A={args.a:g}, C={args.c:g}: raise --c")
    return args


if __name__ == "__main__":
    launch(main, parse)
