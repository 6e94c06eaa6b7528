"""InSPO: In-Sample Sequential Policy Optimization (Liu et al., AAAI 2025, arXiv 2412.07639).

The problem. A team of N agents learns from a fixed dataset. Where several joint actions are equally good (pass on
the left, pass on the right), each agent's own choice looks good in the data, and the combination of choices may be
one that nobody ever took. Regularising each agent towards the data does not help: both halves are in it.

The idea. The agents learn in turns. When it is agent i's turn, the minibatch is resampled so that the teammates'
recorded actions look as if drawn from their *current* policies; so i answers the convention that the team leans
towards by now, not the average of the dataset, and its answer tips the team further. Policies learn by weighted
cloning of recorded actions only, so no unseen action is ever evaluated for the policy. An entropy bonus, decaying
over training, flattens the behaviour's preferences first, so that a rare but better equilibrium can win.

Equations (numbers as in the paper; T = alpha + beta):
  Eq. 9   J = E sum_t gamma^t [ r_t - alpha log(pi/mu) + beta H(pi) ]     mu: the behaviour in the dataset
  Eq. 12  pi_i(a) = mu_i(a)^(alpha/T) exp(Q_i(s,a) / T) / Z              the fixed point, a quantal response equilibrium
  Eq. 15  L(Q_i)  = E_resampled [ (Q_i(s,a_i) - y_i)^2 ]
          y_i     = r + gamma E_{a~pi_i(s')} [ Q_i'(s',a) - alpha log(pi_i/mu_i) - beta log pi_i ]
  Eq. 20  L(pi_i) = -E [ exp( (Q_i'(s,a_i) - V_i(s) - beta log mu_i(a_i|s)) / T ) log pi_i(a_i|s) ]
  Eq. 21  L(mu_i) = -E log mu_i(a_i|s)                                    behavioural cloning
  Eq. 22  L(mu)   = -E log mu(a_-i|s,a_i)                                 teammates, one after the other
  Eq. 23  rho_i   = ( prod_{j!=i} pi_j(a_j|s) / mu(a_-i|s,a_i) )^(1/(N-1))
  Eq. 24  L(Q_i)  = Eq. 15 + cql E_resampled [ logsumexp_a Q_i(s,a) - Q_i(s,a_i) ]
  Eq. 25  L(alpha) = -alpha E [ KL(pi_i || mu_i) - target ]

Commands:
  python algorithms/inspo.py                                                  Bridge, mixed data, 5 seeds at once
  python algorithms/inspo.py --env matrix --task xor --dataset aa-ab-ba
  python algorithms/inspo.py --env matrix --task m-ne --dataset imbalanced

Legend: S seeds, B minibatch, N agents, A actions, R rows (observations), M steps (rows that have an action).
"""

import copy
import functools
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `data` and `envs` stand beside this file's folder
import data as datasets
import envs
from data import runs
from envs.bridge import draw_bridge
from envs.matrix import draw_joint

ILLEGAL = -1e10  # the logit of an action that is not available


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "bridge"  # the environment: bridge or matrix
    task: str = ""  # its task; for matrix a name, or any payoff table as JSON
    dataset: str = "mixed"  # a dataset's name, or the path of a file
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 5  # how many seeds train, all at once
    steps: int = 3000  # sweeps; each one updates every agent
    eval_every: int = 500  # sweeps between evaluations; each writes a checkpoint
    eval_episodes: int = 32  # games per seed and evaluation, each played greedily and by sampling
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads; networks this small gain little from more, and lose much on a busy machine
    compile: bool = torch.cuda.is_available()  # compile the losses with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/inspo
    resume: bool = False  # go on from the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    alpha: float = 0.02  # weight of the KL divergence to the behaviour
    auto_alpha: bool = False  # tune alpha until the KL divergence meets --kl-target (Eq. 25)
    kl_target: float = 1.0  # the KL divergence that --auto-alpha aims at, in nats
    beta: float = 0.05  # weight of the entropy at the start; 0 leaves it out
    beta_end: float = 0.001  # weight of the entropy at the end; it decays exponentially
    beta_hold: int = 0  # sweeps before beta begins to decay
    warmup: int = 0  # sweeps in which only the Q-functions learn
    cql: float = 0.1  # weight of the conservative term in Eq. 24
    order: str = "random"  # who goes first in a sweep: random, fixed or semi-greedy
    inner: int = 1  # gradient steps per agent and turn
    sequential: bool = True  # see the teammates' policies as they are now, not as they were when the sweep began
    resampling: bool = True  # see the teammates' policies at all: with --no-resampling every ratio is 1
    actor_data: str = "resampled"  # the minibatch of the policy loss: resampled or uniform
    gamma: float = 0.99  # discount
    # --- the optimisation
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    one_hot: bool = True  # feed integer observations as one-hot values (a grid's cells)
    batch_size: int = 128  # recorded steps per update
    policy_lr: float = 1e-3  # Adam's step size for the policies
    critic_lr: float = 1e-3  # Adam's step size for the Q-functions
    alpha_lr: float = 1e-3  # Adam's step size for log alpha
    tau: float = 0.02  # how far a target network moves in an update
    weight_cap: float = 100.0  # largest weight in the policy loss
    ratio_cap: float = 100.0  # largest importance ratio
    clone_steps: int = 1000  # updates of the behaviour models before the sweeps
    clone_lr: float = 2e-3  # their step size
    clone_batch: int = 128  # their minibatch


# What differs between tasks; the fields above hold Bridge's values. Every value can be set by its flag.
MATRIX = dict(steps=1500, eval_every=250, one_hot=False)
PRESETS = {
    "xor": dict(dataset="aa-ab-ba", batch_size=64, beta=0.1, cql=0.5, tau=0.05, clone_steps=300, **MATRIX),
    "m-ne": dict(
        dataset="imbalanced", batch_size=256, alpha=0.1, beta=20.0, beta_end=0.01, beta_hold=500, warmup=200,
        critic_lr=3e-3, tau=0.05, weight_cap=1000.0, ratio_cap=1000.0, clone_lr=1e-3, clone_batch=256, **MATRIX,
    ),  # fmt: skip
}  # fmt: skip


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """S independent linear layers as one batched product; seed s starts from its own generator."""

    def __init__(self, inputs, outputs, generators):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        draw = [torch.empty(inputs + 1, outputs).uniform_(-bound, bound, generator=g) for g in generators]
        self.weight = nn.Parameter(torch.stack(draw)[:, :-1].clone())  # (S, in, out)
        self.bias = nn.Parameter(torch.stack(draw)[:, -1:].clone())  # (S, 1, out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (S, B, out)


def mlp(inputs, outputs, args, generators):
    """A ReLU network for each seed: (S, B, inputs) -> (S, B, outputs)."""
    sizes = [inputs] + [args.hidden] * args.layers
    body = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o, generators), nn.ReLU())]
    return nn.Sequential(*body, Linear(sizes[-1], outputs, generators))


def log_probs(network, obs, avail):
    """Log-probabilities of every action, (S, B, A); ILLEGAL or less where an action is not available."""
    return F.log_softmax(network(obs).masked_fill(~avail, ILLEGAL), -1)


def chosen(values, action):
    """The entry of the action taken: (S, B, A), (S, B) -> (S, B)."""
    return values.gather(-1, action[..., None])[..., 0]


def teammate_log_prob(network, state, avail, actions, i):
    """Eq. 22: log mu(a_-i | s, a_i), (S, B), as a product over teammates j, each seeing a_i and those before it.

    state (S, B, D), avail (S, B, N, A), actions (S, B, N). One network serves every i and j: what it may see of
    the joint action stands in its input, the rest is zero.
    """
    S, B, N, A = avail.shape
    agent = torch.arange(N, device=state.device)
    j = agent[agent != i]
    seen = (agent == i) | (agent < j[:, None])  # (N-1, N): row of teammate j
    joint = F.one_hot(actions, A)[:, :, None] * seen[..., None]  # (S, B, N-1, N, A)
    who = F.one_hot(j, N).expand(S, B, -1, -1)
    x = torch.cat([state[:, :, None].expand(-1, -1, N - 1, -1), who, joint.flatten(3)], -1)
    log_mu = log_probs(network, x.flatten(1, 2), avail[:, :, j].flatten(1, 2))
    return chosen(log_mu, actions[:, :, j].flatten(1)).view(S, B, N - 1).sum(-1)


# ---------------------------------------------------------------- update
class Batch(NamedTuple):
    """What agent i needs of B recorded steps, for each seed."""

    state: torch.Tensor  # (S, B, D)
    obs: torch.Tensor  # (S, B, O)
    avail: torch.Tensor  # (S, B, A) bool
    log_mu: torch.Tensor  # (S, B, A) log mu_i(.|s)
    next_state: torch.Tensor
    next_obs: torch.Tensor
    next_avail: torch.Tensor
    next_log_mu: torch.Tensor
    action: torch.Tensor  # (S, B) int64
    reward: torch.Tensor  # (S, B)
    done: torch.Tensor  # (S, B) 1 where the game ended by its own rules


def importance_ratio(log_pi_others, log_mu_others, num_agents, cap):
    """Eq. 23: the geometric mean over teammates of pi_j / mu, (S, B); both inputs are sums of logs over teammates."""
    return ((log_pi_others - log_mu_others) / (num_agents - 1)).exp().clamp(1e-10, cap)


def resample(ratio, uniform):
    """Draw positions in the minibatch with replacement, with probability ratio / sum(ratio): all (S, B)."""
    cumulative = ratio.cumsum(1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp(max=ratio.shape[1] - 1)


def critic_loss(critic, target, policy, batch, alpha, beta, gamma, cql):
    """Eq. 24, for each seed (S,); alpha (S, 1), beta (). What the other agents' policies cost is left out of y."""
    with torch.no_grad():
        log_pi = log_probs(policy, batch.next_obs, batch.next_avail)  # (S, B, A)
        soft = target(batch.next_state) - alpha[..., None] * (log_pi - batch.next_log_mu) - beta * log_pi
        y = batch.reward + gamma * (1 - batch.done) * (log_pi.exp() * soft).sum(-1)  # Eq. 15: (S, B)
    q = critic(batch.state)
    q_taken = chosen(q, batch.action)
    # Among conventions that pay the same, the squared error has no preference. This term has one: it lifts the
    # resampled actions, those that go with what the teammates do now. Without it ties stay unbroken.
    gap = q.masked_fill(~batch.avail, ILLEGAL).logsumexp(-1) - q_taken
    return ((q_taken - y) ** 2 + cql * gap).mean(1)


def policy_loss(policy, target, batch, alpha, beta, cap):
    """Eq. 20, for each seed: the loss (S,) and KL(pi_i || mu_i) (S,). alpha (S, 1), beta ().

    The weight of a recorded action is pi*(a_i) / mu_i(a_i), Eq. 12 over the behaviour. V_i is the exact normaliser
    T log sum_a mu_i^(alpha/T) exp(Q_i/T), so the weights average to 1 under mu_i and no Q is ever exponentiated alone.
    """
    with torch.no_grad():
        T = alpha + beta
        q = target(batch.state)
        pulled = (q + alpha[..., None] * batch.log_mu) / T[..., None]
        v_over_T = pulled.masked_fill(~batch.avail, ILLEGAL).logsumexp(-1)  # (S, B)
        log_weight = (chosen(q, batch.action) - beta * chosen(batch.log_mu, batch.action)) / T - v_over_T
        weight = log_weight.exp().clamp(max=cap)
    log_pi = log_probs(policy, batch.obs, batch.avail)
    kl = (log_pi.exp() * (log_pi - batch.log_mu)).sum(-1).mean(1)
    return -(weight * chosen(log_pi, batch.action)).mean(1), kl.detach()


def descend(optimizer, loss):
    """One step down a loss (S,); the sum over seeds keeps each seed's gradient its own."""
    optimizer.zero_grad()
    loss.sum().backward()
    optimizer.step()


def agent_order(kind, num_agents, generator, advantages):
    """Who learns when in one sweep, a list of agents.

    "semi-greedy" (A2PO, Wang et al., 2023) gives every other place to the remaining agent with the largest
    advantage, the places between to random ones. `advantages` is called for it, and returns one number per agent.
    """
    order = torch.randperm(num_agents, generator=generator).tolist()
    if kind == "fixed":
        order = sorted(order)
    if kind == "semi-greedy":
        size, left, order = advantages(), order, []
        while left:
            order.append(left[0] if len(order) % 2 else max(left, key=size.__getitem__))
            left.remove(order[-1])
    return order


# ---------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(policies, encode, args, step, episodes, device):
    """Play the greedy and the sampled team of every seed, all in one batch of games.

    Returns the undiscounted returns of both, (S, E) each, and the states (T+1, 2, D) of the first seed's first
    greedy and first sampled game.
    """
    S, E = args.num_seeds, episodes
    game = envs.make(args.env, args.task, num_envs=S * 2 * E, device=device)
    generators = [runs.stream(args.seed + s, 10 + step, device) for s in range(S)]
    obs, info = game.reset(seed=step)
    total, film = torch.zeros(S, 2 * E, device=device, dtype=torch.float64), [info["state"][[0, E]]]
    for _ in range(game.time_limit):
        actions = []
        for i, policy in enumerate(policies):
            avail = info["avail_actions"][:, i].view(S, 2 * E, -1)
            log_pi = log_probs(policy, encode(obs[:, i]).view(S, 2 * E, -1), avail)  # (S, 2E, A)
            clocks = torch.stack([torch.empty_like(log_pi[0, E:]).exponential_(generator=g) for g in generators])
            sampled = (log_pi[:, E:] - clocks.log()).argmax(-1)  # the first clock to ring is a draw from pi
            actions.append(torch.cat([log_pi[:, :E].argmax(-1), sampled], 1).flatten())
        obs, reward, terminated, truncated, info = game.step(torch.stack(actions, 1))
        total += reward.view(S, 2 * E)
        film.append(info["state"][[0, E]])
        if (terminated | truncated).all():
            break
    return total[:, :E], total[:, E:], torch.stack(film).cpu()


def draw_joint_policy(joint, dataset, args):
    """The dataset's joint actions beside the joint policy of up to five seeds (the paper's Figures 3 and 5)."""
    actions, shown = dataset.actions[:, 0].cpu(), joint[:5]
    share = torch.zeros(joint.shape[1:]).index_put(tuple(actions.T), torch.tensor(1 / len(actions)), accumulate=True)
    figure = Figure(figsize=(2.1 * (1 + len(shown)), 2.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(shown))
    draw_joint(axes[0], share, "dataset")
    for s, table in enumerate(shown):
        draw_joint(axes[1 + s], table, f"seed {args.seed + s}")
    return figure


def draw_crossing(cloned, learned):
    """Film strips of a cloned and of a learned team on Bridge; both (T+1, 8)."""
    figure = Figure(figsize=(14, 3), layout="constrained")
    axes = figure.subplots(2, 9)
    for row, name, film in zip(axes, ("cloned team", "InSPO"), (cloned, learned)):
        for t, ax in enumerate(row):
            draw_bridge(ax, film[min(t, len(film) - 1)], f"{name}, start" if t == 0 else f"step {t}")
    return figure


# ---------------------------------------------------------------- main
def one_hot(x):
    """A function (..., D) -> (..., W) with one column for each value that an entry of x (R, D) takes; constants go."""
    values = [column.unique().tolist() for column in x.T]
    pairs = torch.tensor([(d, v) for d, vs in enumerate(values) if len(vs) > 1 for v in vs], device=x.device)
    if not 0 < len(pairs) <= 1000:
        raise ValueError(f"--one-hot would make {len(pairs)} inputs; it is for small grids: add --no-one-hot")
    return lambda raw: (raw[..., pairs[:, 0].long()] == pairs[:, 1]).to(torch.get_default_dtype())


def clone(mus, teammates, data, args, generators):
    """Fit the behaviour before anything else: mu_i of each agent (Eq. 21) and the teammate model (Eq. 22)."""
    optimizer = torch.optim.Adam([*mus.parameters(), *teammates.parameters()], args.clone_lr, fused=True)
    for _ in range(args.clone_steps):
        pick = runs.uniform(generators, args.clone_batch).mul(len(data["row"])).long()  # (S, B)
        row, actions = data["row"][pick], data["actions"][pick]
        obs, state, avail = data["obs"][row], data["state"][row], data["avail_actions"][row]
        loss = 0.0
        for i, mu in enumerate(mus):
            log_mu = chosen(log_probs(mu, obs[:, :, i], avail[:, :, i]), actions[:, :, i])
            loss = loss - (log_mu + teammate_log_prob(teammates, state, avail, actions, i)).mean(1)
        descend(optimizer, loss)


@torch.no_grad()
def tabulate(mus, teammates, data, S):
    """The behaviour never changes again, so it becomes two tables, each a list over agents i:
    log mu_i of every row, (S, R, A), and log mu(a_-i | s, a_i) of every step, (S, M)."""
    log_mu, log_mu_others = [], []
    for i, mu in enumerate(mus):
        chunks = torch.arange(len(data["obs"]), device=data["row"].device).split(10_000)
        own = [log_probs(mu, data["obs"][r, i].expand(S, -1, -1), data["avail_actions"][r, i]) for r in chunks]
        log_mu.append(torch.cat(own, 1).clamp(min=-20))  # as good as never, and safe to multiply by beta
        others = []
        for m in torch.arange(len(data["row"]), device=data["row"].device).split(10_000):
            r, m = data["row"][m].expand(S, -1), m.expand(S, -1)
            others.append(teammate_log_prob(teammates, data["state"][r], data["avail_actions"][r], data["actions"][m], i))
        log_mu_others.append(torch.cat(others, 1))
    return log_mu, log_mu_others


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    torch.set_num_threads(args.threads)
    device = runs.choose_device(args.device)
    dataset = datasets.load(args.env, args.task, args.dataset, device)
    folder = runs.open_folder("inspo", args, device)
    saved = runs.load_checkpoint(folder, device) if args.resume else None
    data = dataset.flatten(torch.get_default_dtype())
    encode = one_hot(data["obs"].flatten(0, 1)) if args.one_hot else lambda x: x.to(torch.get_default_dtype())
    data["obs"] = encode(data["obs"])  # (R, N, O)
    data["state"] = one_hot(data["state"])(data["state"]) if args.one_hot else data["state"]  # (R, D)
    S, (M, N), A = args.num_seeds, data["actions"].shape, data["avail_actions"].shape[-1]
    O, D = data["obs"].shape[-1], data["state"].shape[-1]
    seeds = range(args.seed, args.seed + S)

    # Every agent has networks of its own, or its turn would change the others; every network holds all seeds.
    init = [runs.stream(seed, 0) for seed in seeds]
    mus = nn.ModuleList(mlp(O, A, args, init) for _ in range(N)).to(device)
    teammates = mlp(D + N + N * A, A, args, init).to(device)
    critics = nn.ModuleList(mlp(D, A, args, init) for _ in range(N)).to(device)
    if not saved:
        clone(mus, teammates, data, args, [runs.stream(seed, 1, device) for seed in seeds])
    policies = copy.deepcopy(mus)  # a cloned team is a good place to start from
    targets = copy.deepcopy(critics).requires_grad_(False)
    log_alpha = nn.Parameter(torch.full((S, 1), math.log(args.alpha), device=device))
    critic_adams = [torch.optim.Adam(critic.parameters(), args.critic_lr, fused=True) for critic in critics]
    policy_adams = [torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True) for policy in policies]
    alpha_adam = torch.optim.Adam([log_alpha], args.alpha_lr, fused=True)

    networks = nn.ModuleDict(dict(mus=mus, teammates=teammates, critics=critics, policies=policies, targets=targets))
    adams = [*critic_adams, *policy_adams, alpha_adam]
    # Who goes first is the same for all seeds, whatever they are, so that a seed trained alone meets the same order.
    generators = [torch.Generator().manual_seed(0), *(runs.stream(seed, 2, device) for seed in seeds)]
    step, rows, seconds, wall = 0, [], 0.0, time.perf_counter()
    if saved:
        networks.load_state_dict(saved["networks"])
        log_alpha.data.copy_(saved["log_alpha"])
        for adam, state in zip(adams, saved["adams"]):
            adam.load_state_dict(state)
        for generator, state in zip(generators, saved["generators"]):
            generator.set_state(state.cpu())
        step, rows, seconds, wall = saved["step"], saved["rows"], saved["seconds"], wall - saved["wall"]
    log_mu, log_mu_others = tabulate(mus, teammates, data, S)
    each = torch.arange(S, device=device)[:, None]
    q_objective, pi_objective = (torch.compile(f) if args.compile else f for f in (critic_loss, policy_loss))

    def gather(i, pick):
        """What agent i needs of the recorded steps `pick` (S, B), as a `Batch`."""
        row = data["row"][pick]
        views = [
            (data["state"][r], data["obs"][r, i], data["avail_actions"][r, i], log_mu[i][each, r]) for r in (row, row + 1)
        ]
        return Batch(*views[0], *views[1], data["actions"][pick, i], data["reward"][pick], data["done"][pick])

    def turn(i, team, noise, beta, learn_policy):
        """One update of agent i, which sees `team`; noise (S, 2, B) picks the minibatch and resamples it."""
        pick = again = noise[:, 0].mul(M).long()  # (S, B)
        ratio = torch.ones_like(noise[:, 0])
        if args.resampling:
            with torch.no_grad():
                row, actions = data["row"][pick], data["actions"][pick]
                log_pi_others = sum(
                    chosen(log_probs(team[j], data["obs"][row, j], data["avail_actions"][row, j]), actions[..., j])
                    for j in range(N) if j != i
                )  # fmt: skip
                ratio = importance_ratio(log_pi_others, log_mu_others[i].gather(1, pick), N, args.ratio_cap)
                again = pick.gather(1, resample(ratio, noise[:, 1]))
        batch, alpha = gather(i, again), log_alpha.detach().exp()
        q_loss = q_objective(critics[i], targets[i], policies[i], batch, alpha, beta, args.gamma, args.cql)
        descend(critic_adams[i], q_loss)
        torch._foreach_lerp_(list(targets[i].parameters()), [p.detach() for p in critics[i].parameters()], args.tau)
        logs = {"q_loss": q_loss.detach(), "sample_size": ratio.sum(1) ** 2 / (ratio**2).sum(1)}
        if learn_policy:
            batch = batch if args.actor_data == "resampled" else gather(i, pick)
            pi_loss, kl = pi_objective(policies[i], targets[i], batch, alpha, beta, args.weight_cap)
            descend(policy_adams[i], pi_loss)
            logs |= {"policy_loss": pi_loss.detach(), "kl": kl}
            if args.auto_alpha:
                descend(alpha_adam, log_alpha.exp()[:, 0] * (args.kl_target - kl))  # Eq. 25
                log_alpha.data.clamp_(-12, 4)  # a target that cannot be met must not drive alpha to 0 or infinity
        return logs

    @torch.no_grad()
    def advantages():
        """Mean |Q_i(s, a_i) - E_pi Q_i(s, .)| of each agent on a minibatch, over all seeds."""
        sizes, pick = [], runs.uniform(generators[1:], args.batch_size).mul(M).long()
        for i, policy in enumerate(policies):
            batch = gather(i, pick)
            q, log_pi = targets[i](batch.state), log_probs(policy, batch.obs, batch.avail)
            sizes.append((chosen(q, batch.action) - (log_pi.exp() * q).sum(-1)).abs().mean().item())
        return sizes

    logs = {name: torch.zeros(S, device=device) for name in ("q_loss", "policy_loss", "kl", "sample_size")}
    beta = torch.zeros((), device=device)
    while True:
        if not rows or rows[-1]["step"] < step:  # not so right after a resume
            for name, value in logs.items():
                if not value.isfinite().all():
                    raise FloatingPointError(f"{name} is not finite after {step} sweeps: try smaller step sizes")
            greedy, sampled, _ = evaluate(policies, encode, args, step, args.eval_episodes, device)
            columns = {"return": greedy.mean(1), "sampled_return": sampled.mean(1), **logs, "alpha": log_alpha.exp()[:, 0]}
            columns = {name: value.tolist() for name, value in columns.items()}
            for s, seed in enumerate(seeds):
                rows.append({"step": step, "seed": seed} | {name: value[s] for name, value in columns.items()})
            runs.save_csv(folder / "metrics.csv", rows)
            runs.save_checkpoint(folder, {
                "args": asdict(args), "networks": networks.state_dict(), "log_alpha": log_alpha.data,
                "adams": [adam.state_dict() for adam in adams], "generators": [g.get_state() for g in generators],
                "step": step, "rows": rows, "seconds": seconds, "wall": time.perf_counter() - wall,
            })  # fmt: skip
            speed = f"{step / seconds:7.1f} updates/s" if step else "(cloned team)"
            print(f"step {step:6d}   greedy {greedy.mean():9.4f}   sampled {sampled.mean():9.4f}   {speed}", flush=True)
            if args.track:
                tracker.log({name: sum(value) / S for name, value in columns.items()}, step=step)
        if step == args.steps:
            break
        begin = time.perf_counter()
        for step in range(step, min(args.steps, step + args.eval_every - step % args.eval_every)):
            decay = max(0, step - args.beta_hold) / max(1, args.steps - args.beta_hold)
            beta.fill_(args.beta * (args.beta_end / args.beta) ** decay if args.beta else 0.0)
            team = policies if args.sequential else copy.deepcopy(policies)  # "simultaneous": as the sweep began
            for i in agent_order(args.order, N, generators[0], advantages):
                for _ in range(args.inner):
                    logs |= turn(i, team, runs.uniform(generators[1:], 2, args.batch_size), beta, step >= args.warmup)
        step += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - begin

    # The last policies, ten times as many games; and the cloned team, which is where they started.
    greedy, sampled, film = evaluate(policies, encode, args, step, 10 * args.eval_episodes, device)
    cloned_greedy, cloned_sampled, cloned_film = evaluate(mus, encode, args, step, 10 * args.eval_episodes, device)
    best = envs.make(args.env, args.task).best_return
    summary = {
        "script": "inspo", "env": args.env, "task": args.task, "dataset": args.dataset, "steps": step,
        "seeds": list(seeds), "return": runs.over_seeds(greedy), "sampled_return": runs.over_seeds(sampled),
        "cloned_return": runs.over_seeds(cloned_greedy), "cloned_sampled_return": runs.over_seeds(cloned_sampled),
        "dataset_return": dataset.returns.mean().item(), "best_return": best, "normalized_return": None,
        "win_rate": None, "updates_per_second": step / max(seconds, 1e-9),
        "wall_seconds": time.perf_counter() - wall, "device": runs.device_name(device),
    }  # fmt: skip
    levels = {"dataset": summary["dataset_return"]} | ({} if best is None else {"best possible": best})
    title = f"InSPO on {runs.slug(args.env, args.task, args.dataset)}, {S} seeds"
    columns = {"return": "greedy", "sampled_return": "sampled"}
    runs.save_figure(folder / "curve.png", runs.draw_curves(rows, columns, levels, title, "sweeps"))
    if args.env == "matrix" and N == 2:
        with torch.no_grad():
            pi = [log_probs(p, data["obs"][:1, i].expand(S, 1, -1), data["avail_actions"][:1, i]).exp() for i, p in enumerate(policies)]
        joint = (pi[0].mT * pi[1]).cpu()  # (S, A, A)
        summary["joint_policy"] = joint.tolist()
        runs.save_figure(folder / "policy.png", draw_joint_policy(joint, dataset, args))
        for seed, table in zip(seeds, joint.tolist()):
            print(f"joint policy, seed {seed}:  " + "   ".join(" ".join(f"{p:.2f}" for p in row) for row in table))
    if args.env == "bridge":
        runs.save_figure(folder / "policy.png", draw_crossing(cloned_film[:, 1], film[:, 0]))
    runs.save_json(folder / "summary.json", summary)

    print(f"\n{title}: {folder}\n{'return':20s} {'greedy':>18s} {'sampled':>18s}")
    for name, key in (("InSPO", ""), ("behavioural cloning", "cloned_")):
        cells = [summary[f"{key}{kind}return"] for kind in ("", "sampled_")]
        print(f"{name:20s}" + "".join(f" {cell['mean']:9.4f} ± {cell['stderr']:.4f}" for cell in cells))
    for name, level in levels.items():
        print(f"{name:20s} {level:9.4f}")
    return summary


def parse(argv=None):
    """Read the command line; where no flag speaks, the task's own defaults or those of the resumed run hold."""
    read = functools.partial(tyro.cli, Args, args=argv, description=__doc__.splitlines()[0])
    args = read()
    if args.resume:
        return read(default=Args(**runs.saved_args(args.out_dir) | {"resume": True, "out_dir": args.out_dir}))
    if args.env == "matrix":
        args.task = args.task or "xor"
        preset = {"dataset": datasets.names("matrix", args.task)[-1]} | PRESETS.get(args.task, PRESETS["m-ne"])
        args = read(default=Args(**preset, env="matrix", task=args.task))
    for name in ("num_seeds", "steps", "threads", "eval_every", "eval_episodes", "inner", "batch_size", "hidden", "clone_batch", "alpha"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    return args


if __name__ == "__main__":
    args = None
    try:
        args = parse()
        main(args)
    except KeyboardInterrupt:
        print(f"interrupted; go on with: --resume --out-dir {args.out_dir if args else '...'}", file=sys.stderr)
        sys.exit(130)  # the shell's code for Ctrl-C
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
