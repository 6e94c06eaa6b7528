"""Polynomial games: why offline MADDPG miscoordinates, and how PJAP repairs it.

Paper: Tilbury, Formanek, Beyers, Shock, Pretorius. Coordination Failure in Cooperative Offline MARL. ICML 2024 ARLET
workshop, arXiv 2407.01343, sections 2 to 4 (Figures 1 to 5).

The problem. Two agents, no state; each agent's policy is one number, theta_x and theta_y, and that number is its
action. The shared reward R(a_x, a_y) is a known polynomial and plays the critic. A critic-based offline method asks
for each agent: how should I move, given what the other one did *in the data*? The paper calls the answer the best
response under data (BRUD). It is right for the joint actions in the data and can be wrong for the policies being
learnt: in R = xy it never looks at them. Online, fresh data keeps the two together; offline, nothing does.

The idea. Proximal joint-action prioritisation (PJAP) changes only which data are drawn: joint actions close to the
current joint policy, so that the other agent's logged action is again a good stand-in for what it would do now. The
games are small enough to check all this in closed form.

Equations (numbers from the paper; m, s^2 = mean and variance of the *other* agent's data):
  Eq. 4   theta_x += eta E_data[dR/da_x at (theta_x, a_y)]; theta_y likewise, from the same theta
  Eq. 5   twin peaks: BRUD ends on the peak iff s^2 = -m^2 + C m / sqrt(2B (C - 2A)) - A/B
          (below it in the paper) twin peaks: theta* = C m / (2A + 2B (m^2 + s^2))
  Eq. 6   rho = max(exp(-alpha d^2), epsilon); data are drawn in proportion to rho
  Eq. 7   d = |a_x - theta_x| + |a_y - theta_y|, the L1 distance of a data point to the policy

Where PJAP ends (ours), and why not at the peak's .5625. It draws data near the policy, and BRUD feels their spread. In
equally dense data d has density 2 alpha d exp(-alpha d^2), so E d^2 = 1/alpha; given d, |a_x - theta_x| is uniform on
[0, d]: per coordinate the draws have mean theta and variance v = 1/(3 alpha). The expression below Eq. 5, with theta
for m and v for s^2, then gives theta*^2 = (C - 2A) / (2B) - v and R(theta*) = R(peak) - B v^2, .5502 for alpha = 6. The
data of Figure 5 are dense around the peak, which trims the kernel and pulls it there; many far points widen it again.

Commands:
  python algorithms/polygames.py                             every figure and the table
  python algorithms/polygames.py --figures 5 --alpha 10      one figure, other settings
  python algorithms/polygames.py --interactive               a window with sliders

What you should see (9 s on one core of a shared 2-core server, torch 2.13; there is no checkpoint, a run being so
short). Files: config.json, metrics.csv, summary.json, one PNG per figure; they replace those of an earlier run.
  Table   BRUD ends where the closed form says, to 1e-5; the same sample's moments on both sides
  Fig. 1  the BRUD step points away from the true gradient
  Fig. 2  online, reward 1 in every run; mean path length 2.20, 2.38, 2.67, 3.06 for buffers of 32, 1280, 2560, 5120
  Fig. 3  from three starts, a straight line to the bottom right, where the reward is negative
  Fig. 4  a: always the origin; b: the peak only at sigma = 0
  Fig. 5  reward after 100 epochs, mean of 10 seeds (paper: read off its plots by pixel):
          sigma              0     0.2    0.5    1.0            0     0.2    0.5    1.0
          MADDPG           0.562  0.555  0.427  0.157   paper  .5625  .555   .43    .15
          MADDPG + PJAP    0.562  0.560  0.554  0.544   paper  .5625  .56    .55    .54

In your own loop (this file alone will do; a game is any function of two tensors):
  import torch, polygames
  reward = lambda x, y: -((x * y - 0.5) ** 2)                      # best where x y = 1/2
  S, M, B = 10, 1000, 32                                           # seeds, data points, batch size
  data = 2 * torch.rand(S, M, 2, dtype=torch.float64) - 1          # uniform joint actions
  theta = torch.tensor([-0.5, 0.5], dtype=torch.float64).expand(S, 2)
  pjap = torch.tensor(True), 6.0, 1e-3                             # alpha and epsilon
  for step in range(300):
      uniforms = torch.rand(S, B, dtype=torch.float64)
      theta, distance = polygames.update(reward, theta, data, 0.05, uniforms, *pjap)
  print(reward(*theta.T).mean(), distance.mean())                  # -0.0002 and 0.16; with False -0.25 and 0.50

Differences from the paper, and choices that it leaves open; algorithms/polygames.md has the measurements:
  1. Figure 5's settings are not printed but A, B, C. The project page's plots, measured by pixel, show the start
     (-0.5, 0.5), 100 epochs, and ends, rewards and distances that fit sigma = 0, 0.2, 0.5, 1.0 to two or three digits.
     At sigma = 0 an epoch leaves 0.900 of the distance to the peak and a step 1 - eta (2A + 2B m^2): eta is 0.02.
  2. Not to be seen there either: alpha, epsilon, size of dataset and batch. Ours: alpha = 6 (on the summed distance,
     Eq. 7) and epsilon = 1e-3, of fifteen pairs one of the closest to those plots; 1000 points, batches of 32.
  3. Every priority is refreshed at every step, which is cheap here; the paper refreshes a subset.
  4. Not printed for Figure 2: start, noise, step, batch and buffer sizes. Ours, chosen to show the effect: start
     (-0.75, 0.8), noise 0.2, eta = 0.02; each step adds 32 joint actions and uses 32, one from each 32nd of the buffer,
     so the smallest buffer is exactly on-policy. The policy is kept inside [-1, 1]^2, because R = xy has no maximum.
  5. Figures 3 and 4 use the whole dataset in every update, and samples shifted to the exact mean that the text speaks
     of, so end points are exact; Figure 5 uses raw samples and minibatches. Starts and spreads of 3 and 4 are ours.
  6. Double precision throughout: exact comparisons, and no slower at this size.

Legend: S seeds, M data points, B batch size, K steps; the last dimension 2 is (x, y). "..." stands for the runs that
train at once: any leading dimensions (spreads, starts, methods, seeds), which broadcast as usual.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- the run
    figures: tuple[str, ...] = ("1", "2", "3", "4a", "4b", "5")  # which figures to make; the table is always made
    interactive: bool = False  # open a window with sliders instead of writing files
    out_dir: str = "runs/polygames"  # folder for the figures, metrics.csv, config.json and summary.json
    seed: int = 0  # the first seed; every seed has its own random stream
    num_seeds: int = 10  # how many seeds, all run at once
    device: str = "auto"  # auto, cpu or cuda
    # --- learning
    learning_rate: float = 0.02  # step size eta of plain gradient ascent
    batch_size: int = 32  # joint actions per update in Figures 2 and 5
    steps: int = 100  # epochs of Figure 5 and of the interactive window; one update each
    full_batch_steps: int = 300  # updates with the whole dataset in Figures 3 and 4 and in the table
    # --- offline data
    num_samples: int = 1000  # joint actions in a dataset
    sigmas: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0)  # spreads of the Gaussian datasets of Figures 4 and 5
    # --- PJAP
    alpha: float = 6.0  # steepness of the priority in the squared L1 distance (Eq. 6)
    epsilon: float = 1e-3  # smallest priority (Eq. 6); above 0 and at most 1
    # --- online data
    online_steps: int = 400  # updates of Figure 2
    capacities: tuple[int, ...] = (32, 1280, 2560, 5120)  # replay buffer sizes of Figure 2, in joint actions
    noise: float = 0.2  # standard deviation of the exploration noise of Figure 2
    # --- twin peaks
    a: float = 1.0  # constant A of the twin peaks game, above 0
    b: float = 4.0  # constant B of the twin peaks game, above 0
    c: float = 5.0  # constant C of the twin peaks game, above 2A


# ---------------------------------------------------------------- games
class Game(NamedTuple):
    reward: Callable  # R(a_x, a_y), elementwise on tensors
    end: Callable | None = None  # where BRUD ends, if known: (theta, t, m, s2) of the start, eta times steps, the data

    def __call__(self, x, y):
        return self.reward(x, y)


def games(args):
    """The paper's four games by name. A new game is one line here: the table, the window and the tests see it."""
    a, b, c = args.a, args.b, args.c
    return {
        # no fixed point in these two: the field is constant, so the end depends on the time
        "decoupled": Game(lambda x, y: x + y, lambda theta, t, m, s2: theta + t),
        "sign agreement": Game(lambda x, y: x * y, lambda theta, t, m, s2: theta + t * m),
        "action agreement": Game(lambda x, y: -((x - y) ** 2), lambda theta, t, m, s2: m),  # the two means, swapped
        "twin peaks": Game(lambda x, y: -a * (x**2 + y**2) - b * (x * y) ** 2 + c * x * y,
                           lambda theta, t, m, s2: c * m / (2 * a + 2 * b * (m**2 + s2))),  # stands below Eq. 5
    }  # fmt: skip


def peak(args):
    """Both coordinates of the ++ peak of twin peaks; the other peak is its mirror image (section 3.2)."""
    return math.sqrt((args.c - 2 * args.a) / (2 * args.b))


def eq5_sigma(m, args):
    """Eq. 5: the spread at which BRUD ends on the ++ peak for data of mean m; NaN if there is none."""
    variance = -(m**2) + args.c / math.sqrt(2 * args.b * (args.c - 2 * args.a)) * m - args.a / args.b
    return math.sqrt(max(variance, 0.0)) if variance > -1e-12 else math.nan


# ---------------------------------------------------------------- data
def draw(args, *wanted):
    """Random numbers for each (kind, *shape), kind torch.rand or torch.randn: (S, *shape), alike on every device."""
    # Every seed has a random stream of its own, so that S seeds at once equal S runs of one seed.
    streams = [torch.Generator().manual_seed(args.seed + s) for s in range(args.num_seeds)]
    numbers = [[kind(shape, generator=g, dtype=torch.float64) for g in streams] for kind, *shape in wanted]
    return [torch.stack(each).to(args.device) for each in numbers]


def recentre(data, mean):
    """Shift (..., M, 2) so that the sample mean is exactly `mean`."""
    return data - data.mean(-2, keepdim=True) + data.new_tensor(mean)


def priorities(theta, data, alpha, epsilon):
    """Eq. 6 and 7: theta (..., 2), data (..., M, 2) -> rho (..., M)."""
    distance = (data - theta[..., None, :]).abs().sum(-1)  # Eq. 7: L1 norm over both agents, (..., M)
    return torch.exp(-alpha * distance**2).clamp(min=epsilon)  # Eq. 6


def sample(data, rho, uniforms):
    """Draw from data (..., M, 2), with replacement, in proportion to rho (..., M); uniforms (..., B) -> (..., B, 2)."""
    # Each uniform number is looked up in the cumulative sum of rho, so all randomness can be drawn before the loop.
    cumulative = rho.cumsum(-1)
    index = torch.searchsorted(cumulative, uniforms * cumulative[..., -1:], right=True)  # (..., B)
    index = index.clamp(max=data.shape[-2] - 1)  # rounding at the far end
    return data.expand(*rho.shape, 2).take_along_dim(index[..., None], -2)


# ---------------------------------------------------------------- update
def brud_gradient(reward, theta, batch):
    """Eq. 4, the update of MADDPG: theta (..., 2), batch (..., B, 2) -> (..., 2)."""
    # With the joint policy itself as the only data point, theta[..., None, :], this is the true gradient of R.
    theta = theta.detach().requires_grad_()
    own_x, own_y = theta[..., :1], theta[..., 1:]  # (..., 1)
    # Eq. 4: each agent's own action comes from its policy, the other agent's from the data.
    objective = reward(own_x, batch[..., 1]) + reward(batch[..., 0], own_y)  # (..., B)
    # Mean over the data, sum over the runs: no run feels another one's gradient.
    return torch.autograd.grad(objective.mean(-1).sum(), theta)[0]


def update(reward, theta, data, eta, uniforms=None, use_pjap=None, alpha=None, epsilon=None):
    """One update of offline MADDPG (Eq. 4), with PJAP (Eq. 6, 7) in the runs where `use_pjap` (...,) bool says so.

    theta (..., 2), which has all the runs; data (..., M, 2); eta, alpha, epsilon () tensors or numbers; uniforms
    (..., B) in [0, 1), or None to use all data. Returns the new theta, and the mean |a - theta| per coordinate from the
    batch to the policy that it updates (...,).
    """
    batch = data
    if uniforms is not None:  # every priority is refreshed at every step; plain MADDPG draws all data alike
        rho = torch.where(use_pjap[..., None], priorities(theta, data, alpha, epsilon), 1.0)  # (..., M)
        batch = sample(data, rho, uniforms)  # (..., B, 2)
    distance = (batch - theta[..., None, :]).abs().mean((-2, -1))
    return theta + eta * brud_gradient(reward, theta, batch), distance


def train_offline(reward, theta, data, steps, eta, uniforms=None, use_pjap=None, alpha=None, epsilon=None):
    """K = steps times `update`; uniforms (..., K, B) or None.

    Returns the policies (..., K+1, 2) and the distances (..., K). Raises FloatingPointError if a policy diverges.
    """
    path, distances = [theta], []
    for k in range(steps):
        now = None if uniforms is None else uniforms[..., k, :]
        theta, distance = update(reward, theta, data, eta, now, use_pjap, alpha, epsilon)
        path.append(theta)
        distances.append(distance)
    if not (theta.abs() < 1e3).all():
        raise FloatingPointError("the policy diverged: lower --learning-rate or --sigmas")
    return torch.stack(path, -2), torch.stack(distances, -1)


def train_online(reward, theta, capacity, noise, uniforms, eta):
    """Online MADDPG with a first-in-first-out replay buffer, the policy kept inside [-1, 1]^2.

    theta (..., 2), which has all the runs; capacity (...,) int, each at least B; noise (..., K, B, 2), added to the
    policy to act; uniforms (..., K, B). Returns the policies (..., K+1, 2) and the last buffers (..., largest
    capacity, 2), NaN where a buffer is shorter or not yet full.
    """
    steps, batch_size = uniforms.shape[-2:]
    buffer = theta.new_full((*theta.shape[:-1], int(capacity.max()), 2), math.nan)
    path, place = [theta], torch.arange(batch_size, device=theta.device)  # place (B,)
    for k in range(steps):
        actions = theta[..., None, :] + noise[..., k, :, :]  # (..., B, 2)
        slot = (k * batch_size + place) % capacity[..., None]  # the oldest entries, (..., B)
        buffer.scatter_(-2, slot[..., None].expand_as(actions), actions)
        # One draw from each B-th of what is held: a buffer of size B is used whole (on-policy).
        held = capacity[..., None].clamp(max=(k + 1) * batch_size)  # (..., 1)
        index = ((place + uniforms[..., k, :]) * (held / batch_size)).long()  # (..., B)
        batch = buffer.take_along_dim(torch.minimum(index, held - 1)[..., None], -2)  # (..., B, 2)
        theta = update(reward, theta, batch, eta)[0].clamp(-1, 1)
        path.append(theta)
    return torch.stack(path, -2), buffer


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "runs.py").exists() and (HOME / "envs" / "play.py").exists():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import flags, runs
    from envs import polynomial as pictures
elif __name__ == "__main__":
    sys.exit("error: this file runs inside its repository, beside data/ and envs/; alone, it is to be imported")

COLUMNS = "figure game method sigma capacity start seed theta_x theta_y reward path_length".split()  # of metrics.csv
STARTS = ((-0.9, 0.5), (-0.3, 0.4), (-0.6, -0.2))  # Figures 3 and 4
PLOTTED = {0: (0.5625, 0.5625), 0.2: (0.555, 0.56), 0.5: (0.43, 0.55), 1: (0.15, 0.54)}  # Figure 5 of the paper


# ---------------------------------------------------------------- results
def table(args):
    """Run BRUD to its end on samples of known mean, beside the closed form; returns one dict per row."""
    top, elapsed = peak(args), args.full_batch_steps * args.learning_rate
    # Eq. 5 has a solution for means in middle -+ half; the spread is largest, namely half, in the middle.
    middle = args.c / math.sqrt(8 * args.b * (args.c - 2 * args.a))
    half = math.sqrt(max(middle**2 - args.a / args.b, 0.0))
    cases = [(game, "", (-0.02, 0.04), 0.5) for game in games(args) if game != "twin peaks"]
    cases += [("twin peaks", "Fig. 4a", (0.0, 0.0), sigma) for sigma in args.sigmas]
    cases += [("twin peaks", "Fig. 4b", (top, top), sigma) for sigma in args.sigmas]
    means = torch.linspace(middle - half, middle + half, 5, dtype=torch.float64).tolist()
    cases += [("twin peaks", "Eq. 5", (m, m), eq5_sigma(m, args)) for m in means]
    cases += [("twin peaks", "2 x Eq. 5", (middle, middle), 2 * half)]
    rows, (unit,) = [], draw(args, (torch.randn, args.num_samples, 2))  # (S, M, 2)
    theta = unit.new_tensor((-0.5, 0.5)).expand(args.num_seeds, 2)
    for name, note, mean, sigma in cases:
        game, data = games(args)[name], recentre(sigma * unit, mean)
        path, _ = train_offline(game, theta, data, args.full_batch_steps, args.learning_rate)
        # The closed form uses the sample's own moments; each agent sees those of the other one's data, (S, 2).
        m, s2, end = data.mean(1).flip(1), data.var(1, unbiased=False).flip(1), path[:, -1]
        row = {"game": name, "note": note, "mean": mean, "sigma": sigma, "end": end.mean(0).tolist()}
        row |= {"closed_form": None, "difference": None}
        if game.end:
            formula = game.end(theta, elapsed, m, s2)
            row |= {"closed_form": formula.mean(0).tolist(), "difference": float((end - formula).abs().max())}
        rows.append(row | {"at_peak": bool(((end - top).abs() < 0.005).all()) if name == "twin peaks" else None})
    return rows


def result_rows(args, figure, game, paths, **axes):
    """The rows of metrics.csv for paths (..., S, K+1, 2), where "..." are the labelled axes in order."""
    paths, axes["seed"] = paths.flatten(0, -3), range(args.seed, args.seed + args.num_seeds)
    end, length = paths[:, -1].T, paths.diff(dim=1).norm(dim=2).sum(1)
    numbers = torch.stack([*end, games(args)[game](*end), length], 1).tolist()
    blank = dict.fromkeys(COLUMNS, "") | {"figure": figure, "game": game, "method": "MADDPG"}
    labels = [dict(zip(axes, label)) for label in itertools.product(*axes.values())]
    return [blank | label | dict(zip(COLUMNS[-4:], row)) for label, row in zip(labels, numbers)]


def mean_rewards(rows):
    """Each setting's reward over seeds, from the rows of metrics.csv."""
    settings = itertools.groupby(rows, key=lambda row: {name: row[name] for name in COLUMNS[:6]})
    each = ((key, [[row["reward"]] for row in group]) for key, group in settings)
    return [key | runs.over_seeds(torch.tensor(values, dtype=torch.float64)) for key, values in each]


def report(args, table, rewards):
    """The table as text, and the rewards of Figure 5 beside the paper's."""
    pair, line = "({0[0]:+.4f}, {0[1]:+.4f})".format, "{:17}{:10}{:>18}{:>8}{:>20}{:>20}{:>10}  {}".format
    lines = [line("game", "", "data mean", "sigma", "BRUD end", "closed form", "max diff", "at the peak")]
    for row in table:
        known = (pair(row["closed_form"]), f"{row['difference']:.0e}") if row["closed_form"] else ("-", "-")
        cells = pair(row["mean"]), f"{row['sigma']:.4f}", pair(row["end"]), *known
        lines.append(line(row["game"], row["note"], *cells, {True: "yes", False: "no", None: "-"}[row["at_peak"]]))
    for row in (row for row in rewards if row["figure"] == "5"):
        known = PLOTTED.get(row["sigma"]) if (args.a, args.b, args.c) == (1, 4, 5) else None
        paper = f", paper {known[row['method'] == 'PJAP']:.3f}" if known else ""
        lines.append("Figure 5, sigma {sigma:<3g} {method:6} reward {mean:.3f} +- {stderr:.3f}".format(**row) + paper)
    return "\n".join(lines)


# ---------------------------------------------------------------- figures
def figure_1(args):
    """One BRUD step on R = xy, from one data point in the opposite corner."""
    reward, policy, point = games(args)["sign agreement"], (-0.35, 0.35), (0.45, -0.45)
    theta, data = torch.tensor([policy, point])
    brud, true = (brud_gradient(reward, theta, points[None]) for points in (data, theta))
    return pictures.draw_step(reward, policy, point, brud, true), []


def figure_2(args):
    """Online MADDPG on sign agreement, one column per replay buffer capacity."""
    reward, size, shape = games(args)["sign agreement"], len(args.capacities), (args.online_steps, args.batch_size)
    noise, uniforms = draw(args, (torch.randn, *shape, 2), (torch.rand, *shape))  # (S, K, B, 2), (S, K, B)
    theta = noise.new_tensor((-0.75, 0.8)).expand(size, args.num_seeds, 2)
    capacity = torch.tensor(args.capacities, device=args.device)[:, None]  # (capacities, 1)
    paths, buffers = train_online(reward, theta, capacity, args.noise * noise, uniforms, args.learning_rate)
    rows = result_rows(args, "2", "sign agreement", paths, capacity=args.capacities, sigma=[args.noise])
    return pictures.draw_buffers(reward, args.capacities, args.batch_size, paths, buffers), rows


def figure_3(args):
    """Offline MADDPG on sign agreement: uniform data of mean (-0.02, 0.04), three starts."""
    reward, mean = games(args)["sign agreement"], (-0.02, 0.04)
    args = replace(args, num_seeds=1)  # the mean decides everything here and is the same for every seed
    data = recentre(2 * draw(args, (torch.rand, args.num_samples, 2))[0] - 1, mean)  # (1, M, 2)
    theta = data.new_tensor(STARTS)[:, None]  # (starts, 1, 2)
    # The field is constant and weak (length 0.045), so the step is five times the usual one.
    paths, _ = train_offline(reward, theta, data, args.full_batch_steps, 5 * args.learning_rate)
    line = torch.linspace(-0.8, 0.8, 8, dtype=torch.float64, device=args.device)
    grid = torch.cartesian_prod(line, line)  # (64, 2)
    brud, true = (brud_gradient(reward, grid, points) for points in (data, grid[:, None]))
    rows = result_rows(args, "3", "sign agreement", paths, start=(0, 1, 2))
    return pictures.draw_fields(reward, data[0], mean, grid, brud, true, paths), rows


def figure_4(args, name, centre):
    """Offline MADDPG on twin peaks, data of mean (centre, centre), one column per spread."""
    reward, (unit,) = games(args)["twin peaks"], draw(args, (torch.randn, args.num_samples, 2))  # (S, M, 2)
    sigmas = unit.new_tensor(args.sigmas).view(-1, 1, 1, 1, 1)
    data = recentre(sigmas * unit, (centre, centre))  # (spreads, 1, S, M, 2)
    theta = unit.new_tensor(STARTS)[:, None].expand(len(sigmas), -1, args.num_seeds, 2)  # spreads x starts x seeds
    paths, _ = train_offline(reward, theta, data, args.full_batch_steps, args.learning_rate)
    rows = result_rows(args, name, "twin peaks", paths, sigma=args.sigmas, start=(0, 1, 2))
    return pictures.draw_ends(reward, peak(args), args.sigmas, data[:, 0, 0], paths[:, :, 0], centre), rows


def figure_5(args):
    """Offline MADDPG with and without PJAP on twin peaks, data around the ++ peak, one row per spread."""
    reward, top = games(args)["twin peaks"], peak(args)
    unit, uniforms = draw(args, (torch.randn, args.num_samples, 2), (torch.rand, args.steps, args.batch_size))
    data = top + unit.new_tensor(args.sigmas).view(-1, 1, 1, 1, 1) * unit  # (spreads, 1, S, M, 2)
    theta = unit.new_tensor((-0.5, 0.5)).expand(len(data), 2, args.num_seeds, 2)  # spreads x methods x seeds
    pjap = (uniforms, torch.tensor([[False], [True]], device=args.device), args.alpha, args.epsilon)
    paths, distances = train_offline(reward, theta, data, args.steps, args.learning_rate, *pjap)
    rows = result_rows(args, "5", "twin peaks", paths, sigma=args.sigmas, method=("MADDPG", "PJAP"))
    return pictures.draw_methods(reward, top, args.sigmas, data[:, 0, 0], paths, distances), rows


FIGURES = {"1": figure_1, "2": figure_2, "3": figure_3, "4a": lambda args: figure_4(args, "4a", 0.0),
           "4b": lambda args: figure_4(args, "4b", peak(args)), "5": figure_5}  # fmt: skip


def build_interactive(args, figure):
    """Fill a figure with sliders and the paths they give; returns the controls, which stop when nobody holds them."""
    args = replace(args, num_seeds=1)  # always the same random numbers: only the changed setting makes a difference
    unit, draws = draw(args, (torch.randn, args.num_samples, 2), (torch.rand, args.steps, args.batch_size))
    theta = unit.new_tensor(((-0.5, 0.5), (0.2, -0.8), (-0.8, -0.3)))[:, None]  # (starts, 1, 2)

    def learn(game, pjap, a, b, c, mean, spread, alpha, power):
        """The game, its data (M, 2), and what trains from the three starts."""
        reward, data = games(replace(args, a=a, b=b, c=c))[game], mean + spread * unit
        chance = draws, torch.tensor(pjap), alpha, 10**power
        return reward, data[0], lambda: train_offline(reward, theta, data, args.steps, args.learning_rate, *chance)[0]

    values = args.a, args.b, args.c, peak(args), 0.5, args.alpha, math.log10(args.epsilon)
    return pictures.add_controls(figure, list(games(args)), "twin peaks", values, learn)


# ---------------------------------------------------------------- main
def check(args):
    """Raise ValueError on an argument that cannot be used, saying which values can."""
    if unknown := set(args.figures) - set(FIGURES):
        raise ValueError(f"unknown figure {min(unknown)}; the figures are {', '.join(FIGURES)}")
    if not (args.figures and args.sigmas and args.capacities):
        raise ValueError("--figures, --sigmas and --capacities need at least one value each")
    runs.check_numbers(args, may_be_zero="seed sigmas noise", at_most_one="epsilon")
    if min(args.capacities) < args.batch_size:
        raise ValueError(f"--capacities must all be at least --batch-size, which is {args.batch_size}")
    if args.c <= 2 * args.a:
        raise ValueError(f"twin peaks needs C > 2A, got A={args.a:g}, C={args.c:g}: raise --c or lower --a")
    runs.choose_device(args.device)


def main(args):
    """Compute everything, write it, and print it; or open the window."""
    began = time.perf_counter()
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings
    if args.interactive:
        return pictures.open_window(lambda figure: build_interactive(replace(args, device="cpu"), figure))
    device, folder = runs.choose_device(args.device), Path(args.out_dir)
    args = replace(args, device=device.type)
    folder.mkdir(parents=True, exist_ok=True)
    # Everything is computed before anything is written: a diverged run leaves an earlier run's files as they are.
    made = {f"figure{name}.png": FIGURES[name](args) for name in dict.fromkeys(args.figures)}  # {file: (figure, rows)}
    rows = [row for _, new in made.values() for row in new]
    summary = {"script": "polygames", "device": args.device, "seeds": [*range(args.seed, args.seed + args.num_seeds)]}
    summary |= {"table": table(args), "rewards": mean_rewards(rows)}
    runs.save_json(folder / "config.json", runs.provenance(device) | asdict(args))
    for name, (figure, _) in made.items():
        runs.save_figure(folder / name, figure)
    if rows:
        runs.save_csv(folder / "metrics.csv", rows)
    else:  # Figure 1 alone trains nothing
        runs.save(folder / "metrics.csv", (",".join(COLUMNS) + "\n").encode())
    summary["wall_seconds"] = time.perf_counter() - began
    runs.save_json(folder / "summary.json", summary)
    runs.say(report(args, summary["table"], summary["rewards"]))
    runs.say(f"{', '.join(made)}, metrics.csv, summary.json are in {folder} ({summary['wall_seconds']:.0f} s)")


def parse(argv=None):
    """Read the command line."""
    args = flags.read(Args, argv, description=__doc__.splitlines()[0])
    check(args)
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
