"""AlberDICE: alternating stationary distribution correction (Matsunaga et al., NeurIPS 2023, arXiv 2311.02194).

The problem. A team of N agents learns from a fixed dataset. Where several joint actions are equally good (both go
left, both go right), each agent's own choice looks good in the data, and yet the combination of two such choices may
be bad, or one that nobody ever took. Keeping each agent close to the data does not help: both halves are in it.

The idea. The agents learn in turns. When it is agent i's turn, its teammates belong to the world that it lives in: the
minibatch is resampled so that their recorded actions look as if they came from their *current* policies, and agent i
pays where these policies do what never went with its own action. What is left is a problem of one agent. It is not
asked what the best action is worth, as a Q-function would tell, but how often each state should be visited: that has a
convex dual, whose only unknown is a function nu(s) of states. Where nu says that a step leads to more than it costs,
the step should be more frequent than in the data; e(s,a) says by how much, and the policy follows it. Alpha, the weight
of the KL divergence to the data, decays over training. (`inspo.py` takes its turns and its resampling from here; the
losses of nu, e and pi stand in place of those of its Q and pi.)

Equations, by numbers of our own. Agent i acts by pi_i; mu_i is its recorded behaviour, mu(a_-i|s,a_i) what the others
did when it took a_i. D is the data; "resampled" means D weighted by rho_i.
  1  the problem  max over d_i of  E r - alpha KL( d_i(s,a_i) pi_-i(a_-i|s) || D(s,a) ),   d_i: visits to (s, a_i)
  2  KL_i(s,a)   = sum_{j != i} KL( pi_j(.|s) || mu(.|s,a_i,a_<j) )        what the teammates' part of Eq. 1 costs
  3  E_i(s,a)    = r - alpha KL_i + gamma nu_i(s') - nu_i(s)               the advantage
  4  rho_i       = min( prod_{j != i} pi_j(a_j|s) / mu(a_-i|s,a_i), 100 )
  5  L(nu_i)     = alpha log E_D [ rho_i exp(E_i/alpha) ] + (1 - gamma) E_D nu_i(s) + penalty E |grad nu_i(s~)|^2
  6  L(e_i)      = E_resampled [ (e_i(s,a_i) - E_i)^2 + cql ( logsumexp_a e_i(s,a) - sum_a mu_i(a|s) e_i(s,a) ) ]
  7  L(pi_i)     = E_resampled [ sum_a pi_i(a|s) ( alpha log(pi_i/mu_i) - e_i(s,a) ) ]    least at mu_i exp(e_i/alpha)/Z
  8  L(mu_i)     = -E log mu_i(a_i|s),   L(mu) = -E log mu(a_-i|s,a_i)     behavioural cloning
If teammates and world leave nothing to chance and games begin anywhere in D, Eq. 5 without its penalty is the dual of
Eq. 1: at its minimum rho_i exp(E_i/alpha), normalised, is d_i pi_-i over D. Else it lies above the dual, as the mean
over what chance does stands outside the exponential: good luck counts for too much. s~ lies between two states of the
minibatch. A game that ends goes on in a state in which nothing happens: adding a constant to nu changes nothing, so
nu may be 0 there, and then E_i is, too.

Commands, and the return you should see (mean of all seeds; one CPU core of a small server, torch 2.13):
  python algorithms/alberdice.py --env matrix --task xor   data aa-ab-ba, 10 seeds at once, under a minute: 1 in 10 of
      10 seeds (sampled 0.93 +- 0.05); --dataset ab, ab-ba and all the same
  ... --task m-ne --dataset imbalanced                     5, the data's local optimum, in 10 of 10, as in the papers
      (the best is 20); balanced 20; --task penalty 10; --task climbing 7.2 +- 0.7 (the best is 11)
  python algorithms/alberdice.py                           Bridge, mixed data, 5 seeds, 2 min (the best is -1.2355): of
      10 seeds 6 at -1.2355 and 4 at -10.04, one side stuck; sampled -3.5 +- 0.9, the data -9.31
  ... --dataset optimal                                    7 of 10 seeds at -1.2355, 3 at -1.259; sampled -1.31 +- 0.06.
      On the authors' own file of such data: -1.2355 in 5 of 5, sampled -1.237

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, alberdice
  S, N, A, M = 2, 2, 3, 500                                        # seeds, agents, actions, steps of one long episode
  args = alberdice.Args(num_seeds=S, steps=100, batch_size=64, clone_steps=50)
  obs, state, action = torch.rand(M + 1, N, 4), torch.rand(M + 1, 6), torch.randint(A, (M + 1, N))
  reward, done = (action[:, 0] == action[:, 1]).float(), (torch.arange(M + 1) == M - 1).float()
  data = alberdice.Data(obs, state, torch.ones(M + 1, N, A).bool(), action, reward, done, torch.arange(M))
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = alberdice.Team(data, args, generators)
  adams, behaviour = alberdice.optimizers(team, args), alberdice.clone(team, data, generators, args)
  for step in range(args.steps):
      alberdice.schedule(team, adams, step, args)
      logs = alberdice.update(team, adams, data, behaviour, alberdice.draw_noise(generators, N, args), args)

Differences from the authors' code, and choices made here:
  1. One gradient step each for nu, e and pi in an agent's turn, agents in a fixed order, as theirs; but each turn has
     a minibatch of its own, of single steps, not of whole episodes, and mu_i and mu(a_-i|s,a_i) are cloned before the
     turns begin and then kept as tables, where theirs learn all along. The policies start as clones.
  2. Eq. 2 is a sum over all actions of teammate j, given those that the teammates before it took in the data. Theirs is
     a mean over 16 draws, in which each a_j is drawn and the rest recorded, too. Weighted by rho_i both have the right
     mean, but for the cap of Eq. 4.
  3. One teammate model serves every i and j, as in `inspo.py`; theirs has one for each i, but one mu for all agents.
  4. The state after the end: theirs appends it to every episode as rows of its own, in which nu learns. Here it has
     nu = 0, and weighs as much as all recorded steps (`--absorbed 1`).
  5. E nu(s) is over all recorded states, as theirs, not over the first ones, as the derivation has it.
  6. s~ lies between a state of the minibatch and the one drawn before it; theirs between two halves. nu's gradient is
     written out (`slope`), as a gradient within a gradient is not for a graph.
  7. alpha falls from 0.3 to 0.003 in Bridge, from the payoffs' range to a hundredth of it in games of one step; theirs
     from 5 to 0.001, over 11 (XOR) to 37 times (Bridge) as many updates, with Adam at 1e-4 and batches of 128 episodes.
     On Bridge the conservative weight falls as well; theirs is 0.1 throughout.
  8. Networks have 64 units, theirs 128. nu has a last bias, as it is 0 after the end; theirs has none. All step sizes
     but the clones' fall linearly to 0. There is no memory, as in theirs: no battles.
  9. Scores are those of greedy play and of sampling; theirs are sampled.

Shapes: S seeds, B steps of a minibatch, N agents, A actions, O observation, I inputs, D state, R rows (observations),
M recorded steps, E games.
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


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "bridge"  # the environment: bridge, matrix, or module:factory
    task: str = ""  # its task; for matrix a name, or any payoff table as JSON
    dataset: str = "mixed"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in an environment that is not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 5  # how many seeds train, all at once
    steps: int = 4000  # updates; each is a sweep that trains every agent once
    eval_every: int = 200  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 32  # games per seed and evaluation, each played greedily and by sampling; 0 for none
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads; networks this small gain little from more, and lose much on a busy machine
    compile: bool = torch.cuda.is_available()  # compile each turn, as one graph, with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/alberdice
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    alpha: float = 0.3  # weight of the KL divergence to the data at the start, in units of the return
    alpha_end: float = 0.003  # and in the last update; it decays exponentially
    cql: float = 1.0  # weight of the conservative term in Eq. 6 at the start
    cql_end: float = 0.1  # and in the last update; it decays exponentially, too
    penalty: float = 0.1  # weight of the gradient penalty in Eq. 5
    absorbed: float = 1.0  # how many steps in the state after the end stand beside one recorded step
    gamma: float = 0.99  # discount
    # --- the optimisation
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    one_hot: bool = True  # feed integer observations as one-hot values (the cells of a grid)
    batch_size: int = 256  # recorded steps per turn
    policy_lr: float = 1e-3  # Adam's step size for the policies; it falls linearly to 0, as that for nu and e
    critic_lr: float = 3e-3  # Adam's step size for nu and e
    ratio_cap: float = 100.0  # largest importance ratio
    clone_steps: int = 1000  # updates of the behaviour models before the sweeps, at most
    hold_back: float = 0.0  # share of the episodes by which they are judged: each seed stops where they get no better
    clone_lr: float = 2e-3  # their step size
    clone_batch: int = 128  # their minibatch


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end. In an episode's last row no step begins."""

    obs: torch.Tensor  # (R, N, I) what the policies see
    state: torch.Tensor  # (R, D) what nu and e see
    avail: torch.Tensor  # (R, N, A) bool, the available actions
    actions: torch.Tensor  # (R, N) int64, of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    steps: torch.Tensor  # (M,) the rows where a step begins; the next observation is in the next row


class Behaviour(NamedTuple):
    """What the cloned models say of every row. They never change again, so each agent i has two tables."""

    log_mu: list  # of (S, R, A): log mu_i(.|s)
    log_mu_others: list  # of (S, R, N-1, A): log mu(.|s, a_i, a_<j) of each teammate j, given the recorded actions


class Noise(NamedTuple):
    """Uniform numbers in [0, 1) for a sweep of N turns; given them, an update is a function without chance."""

    rows: list  # of (S, B): which recorded steps to draw, for each turn
    steps: list  # of (S, B): which of them to draw again, for each turn
    mix: list  # of (S, B): where between two states nu's gradient is looked at


def uniform(generators, *shape):
    """Uniform numbers in [0, 1), (S, *shape), each seed's from its own generator."""
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])


def draw_noise(generators, num_agents, args):
    """The `Noise` of one sweep."""
    return Noise(*([uniform(generators, args.batch_size) for _ in range(num_agents)] for _ in range(3)))


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


def mlp(inputs, outputs, args, generators):
    """A ReLU network for each seed: (S, B, inputs) -> (S, B, outputs)."""
    sizes = [inputs] + [args.hidden] * args.layers
    body = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o, generators), nn.ReLU())]
    return nn.Sequential(*body, Linear(sizes[-1], outputs, generators))


class Team(nn.Module):
    """Everything that S teams learn. Each agent has networks of its own, or its turn would change the others."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, N, A), I, D = data.avail.shape, data.obs.shape[-1], data.state.shape[-1]
        self.mus = nn.ModuleList(mlp(I, A, args, generators) for _ in range(N))  # behaviour, Eq. 8
        self.teammates = mlp(D + N + N * A, A, args, generators)  # joint behaviour, Eq. 8
        self.nus = nn.ModuleList(mlp(D, 1, args, generators) for _ in range(N))  # nu_i(s)
        self.es = nn.ModuleList(mlp(D, A, args, generators) for _ in range(N))  # e_i(s, .), one output an action
        self.policies = copy.deepcopy(self.mus)
        for name in ("alpha", "cql"):  # what they weigh now, see `schedule`
            self.register_buffer(name, torch.zeros(()), persistent=False)


def log_probs(policy, obs, avail):
    """Log-probabilities of all actions (S, B, A) from inputs (S, B, I); one that is not available has no mass."""
    return F.log_softmax(policy(obs).masked_fill(~avail, ILLEGAL), -1)


def together(policies):
    """N policies of S seeds as one function of N S seeds: every layer is one batched product for the whole team."""
    parts = [dict(policy.named_parameters()) for policy in policies]
    stacked = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # (N S, ...)
    return lambda *inputs: torch.func.functional_call(policies[0], stacked, inputs)


def chosen(values, action):
    """The entries of the actions taken: (..., A), (...) -> (...)."""
    return values.gather(-1, action[..., None])[..., 0]


def teammate_log_prob(network, state, avail, actions, i):
    """Eq. 8: log mu(.|s, a_i, a_<j), (S, B, N-1, A), of each teammate j, given a_i and the teammates before it.

    state (S, B, D), avail (S, B, N, A), actions (S, B, N). One network serves every i and j: its input holds the
    state, which j is asked for, and the known part of the joint action, zeros in place of the rest.
    """
    S, B, N, A = avail.shape
    agent = torch.arange(N, device=state.device)
    j = agent[:-1] + (agent[:-1] >= i)  # (N-1,) everybody but i
    known = (agent == i) | (agent < j[:, None])  # (N-1, N)
    joint = F.one_hot(actions, A)[:, :, None] * known[..., None]  # (S, B, N-1, N, A)
    who = F.one_hot(j, N).expand(S, B, -1, -1)  # (S, B, N-1, N)
    x = torch.cat([state[:, :, None].expand(-1, -1, N - 1, -1), who, joint.flatten(3)], -1)
    logits = network(x.flatten(1, 2)).view(S, B, N - 1, A)
    return F.log_softmax(logits.masked_fill(~avail[:, :, j], ILLEGAL), -1)


def slope(network, x):
    """The gradient (S, B, D) of a ReLU network's only output by its inputs x, as a function to differentiate again."""
    layers, kept = [layer for layer in network if isinstance(layer, Linear)], []
    for layer in layers[:-1]:
        x = layer(x)
        kept.append(x > 0)
        x = x.relu()
    gradient = layers[-1].weight.mT  # (S, 1, hidden)
    for layer, mask in zip(layers[-2::-1], kept[::-1]):
        gradient = (gradient * mask) @ layer.weight.mT
    return gradient


# ---------------------------------------------------------------- looking at the data
def draw(noise, data):
    """Steps for each seed as row numbers (S, B), chosen by uniform numbers, noise (S, B)."""
    return data.steps[noise.mul(len(data.steps)).long()]


def unroll(policies, agents, rows, data):
    """log_pi of the agents' policies in the rows (S, B): (len(agents), S, B, A)."""
    obs, avail = (torch.stack([table[rows, i] for i in agents]) for table in (data.obs, data.avail))
    policy = together(policies) if len(agents) > 1 else policies[0]
    return log_probs(policy, obs.flatten(0, 1), avail.flatten(0, 1)).unflatten(0, (len(agents), -1))


def recall(table, rows):
    """Each seed's entries of its own table: (S, R, ...), rows (S, B) -> (S, B, ...)."""
    return table[torch.arange(len(rows), device=rows.device)[:, None], rows]


# ---------------------------------------------------------------- losses
def importance_ratio(log_pi_others, log_mu_others, cap):
    """Eq. 4: the product over teammates of pi_j / mu, (S, B), at least 1e-10, as Eq. 5 takes its mean's log; both
    inputs are sums of logs over teammates."""
    return (log_pi_others - log_mu_others).exp().clamp(1e-10, cap)


def resample(ratio, noise):
    """Draw places in the minibatch with replacement, with probability ratio / sum(ratio).

    ratio (S, B), noise (S, B) in [0, 1): the places (S, B); one whose ratio is 0 is never drawn.
    """
    cumulative = ratio.cumsum(1)
    places = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True)  # the first sum above it
    return places.clamp(max=ratio.shape[1] - 1)  # if rounding led past the end


def teammates_kl(log_pi_others, log_mu_others):
    """Eq. 2, (S, B), from log_pi_j and log mu of all teammates, both (S, B, N-1, A)."""
    return (log_pi_others.exp() * (log_pi_others - log_mu_others)).sum((-1, -2))


def advantage(nu, next_nu, reward, done, kl, alpha, gamma):
    """Eq. 3, (S, B); nu is 0 in the state after the end."""
    return reward - alpha * kl + gamma * (1 - done) * next_nu - nu


def nu_loss(advantages, ratio, nu, slopes, alpha, args):
    """Eq. 5 for each seed, (S,): `advantages` (S, B) of the resampled steps, ratio and nu (S, B) of the drawn ones,
    slopes (S, B, D) the gradients of nu between states.

    Drawing again by rho has divided by its mean, which comes back here. The steps in the state after the end, whose
    advantage and nu are 0, are not drawn: they add exp(0) for each.
    """
    recorded = (advantages / alpha).logsumexp(1) - math.log(nu.shape[1]) + ratio.mean(1).log()  # log of the mean
    after = torch.full_like(recorded, args.absorbed)
    log_mean = torch.logaddexp(recorded, after.log()) - (1 + after).log()
    start = (1 - args.gamma) * nu.mean(1) / (1 + after)
    return alpha * log_mean + start + args.penalty * (slopes**2).sum(-1).mean(1)


def e_loss(e, action, advantages, avail, log_mu, cql):
    """Eq. 6 for each seed, (S,): e and log_mu (S, B, A), advantages (S, B), of the resampled steps."""
    gap = e.masked_fill(~avail, ILLEGAL).logsumexp(-1) - (log_mu.exp() * e).sum(-1)
    return ((chosen(e, action) - advantages) ** 2 + cql * gap).mean(1)


def policy_loss(log_pi, e, log_mu, alpha):
    """Eq. 7 for each seed: the loss (S,) and KL(pi_i || mu_i) (S,); all inputs (S, B, A), of the resampled steps."""
    pi = log_pi.exp()
    kl = (pi * (log_pi - log_mu)).sum(-1).mean(1)
    return alpha * kl - (pi * e).sum(-1).mean(1), kl.detach()


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


def optimizers(team, args):
    """Adam for each agent's nu, e and policy."""
    rates = {"nus": args.critic_lr, "es": args.critic_lr, "policies": args.policy_lr}
    return {name: [Adam(net.parameters(), lr) for net in getattr(team, name)] for name, lr in rates.items()}


def descend(adam, loss):
    """One step down a loss (S,). Its sum over seeds leaves each seed the gradient that it would have alone."""
    adam.step(torch.autograd.grad(loss.sum(), adam.moved))


def turn(i, team, adams, data, behaviour, row_noise, step_noise, mix_noise, args):
    """One update of agent i's nu, e and policy, with the teammates as they are now: diagnostics, (S,) tensors. The
    noise (S, B) is that of `Noise`."""
    others = [j for j in range(len(team.policies)) if j != i]
    rows = draw(row_noise, data)  # (S, B)
    actions = torch.stack([data.actions[rows, j] for j in others], -1)  # (S, B, N-1)
    with torch.no_grad():
        log_pi_others = unroll([team.policies[j] for j in others], others, rows, data).movedim(0, 2)  # (S, B, N-1, A)
    log_mu_others = recall(behaviour.log_mu_others[i], rows)  # (S, B, N-1, A)
    taken = (chosen(each, actions).sum(-1) for each in (log_pi_others, log_mu_others))  # (S, B) each
    ratio = importance_ratio(*taken, args.ratio_cap)
    again = resample(ratio, step_noise)

    # How often to be where: nu
    state, price = data.state[rows], teammates_kl(log_pi_others, log_mu_others)
    nu, next_nu = team.nus[i](torch.cat([state, data.state[rows + 1]], 1))[..., 0].chunk(2, 1)  # (S, B) each
    advantages = advantage(nu, next_nu, data.reward[rows], data.done[rows], price, team.alpha, args.gamma)
    advantages = advantages.gather(1, again)
    slopes = slope(team.nus[i], torch.lerp(state, state.roll(1, 1), mix_noise[..., None]))  # at s~, (S, B, D)
    loss_nu = nu_loss(advantages, ratio, nu, slopes, team.alpha, args)
    descend(adams["nus"][i], loss_nu)

    # What an action adds to that: e
    row = rows.gather(1, again)
    avail, log_mu, e = data.avail[row, i], recall(behaviour.log_mu[i], row), team.es[i](data.state[row])  # (S, B, A)
    loss_e = e_loss(e, data.actions[row, i], advantages.detach(), avail, log_mu, team.cql)
    descend(adams["es"][i], loss_e)

    # The policy that does it
    loss_pi, kl = policy_loss(unroll([team.policies[i]], [i], row, data)[0], e.detach(), log_mu, team.alpha)
    descend(adams["policies"][i], loss_pi)
    effective = ratio.sum(1) ** 2 / (ratio**2).sum(1)  # as many equally weighted steps would tell as much
    logs = {"nu_loss": loss_nu, "e_loss": loss_e, "policy_loss": loss_pi, "kl": kl, "sample_size": effective}
    return {name: x.detach() for name, x in logs.items()}


def update(team, adams, data, behaviour, noise, args, turn=turn):
    """One sweep: every agent's turn, for all seeds; returns the diagnostics of the last turn.

    `turn` can be given in compiled form.
    """
    for i, chance in enumerate(zip(*noise)):
        logs = turn(i, team, adams, data, behaviour, *chance, args)
    return logs


def schedule(team, adams, step, args):
    """Set what changes from update to update. The weights of the KL divergence and of the conservative term fall
    exponentially, to their ends in the last one; the step sizes fall linearly, to 0."""
    share = step / max(1, args.steps - 1)
    team.alpha.fill_(args.alpha * (args.alpha_end / args.alpha) ** share)
    team.cql.fill_(args.cql * (args.cql_end / args.cql) ** share if args.cql else 0.0)
    for name, lr in (("nus", args.critic_lr), ("es", args.critic_lr), ("policies", args.policy_lr)):
        for each in adams[name]:
            each.lr.fill_(lr * (1 - step / args.steps))


# ---------------------------------------------------------------- behaviour
def clone_loss(team, data, rows):
    """Eq. 8 for each seed, (S,), on the steps that begin in the rows (S, B): mu_i of each agent, the teammate model."""
    agents = range(len(team.mus))
    state, avail, actions = data.state[rows], data.avail[rows], data.actions[rows]
    loss = -chosen(unroll(team.mus, agents, rows, data), actions.movedim(2, 0)).sum(0).mean(1)
    for i in agents:
        log_mu = teammate_log_prob(team.teammates, state, avail, actions, i)
        others = torch.stack([actions[..., j] for j in agents if j != i], -1)  # (S, B, N-1)
        loss = loss - chosen(log_mu, others).sum(-1).mean(1)
    return loss


def clone_update(team, adam, data, row_noise):
    """One update of the behaviour on steps that row_noise (S, B) draws."""
    descend(adam, clone_loss(team, data, draw(row_noise, data)))


def clone(team, data, generators, args, clone_update=clone_update, judge=None):
    """Fit the behaviour before anything else, start the policies from it, and return it as a `Behaviour`.

    judge: a `data.layout.Judge`, which holds episodes back and ends it when these get no likelier.
    """
    adam, S = Adam([*team.mus.parameters(), *team.teammates.parameters()], args.clone_lr), args.num_seeds
    learned = data._replace(steps=judge.rest) if judge else data

    def held_loss():
        return clone_loss(team, data, judge.held.expand(S, -1))

    for step in range(1, args.clone_steps + 1):
        clone_update(team, adam, learned, uniform(generators, args.clone_batch))
        if judge and judge.over(step, adam.moved, held_loss):
            break
    team.policies.load_state_dict(team.mus.state_dict())  # a cloned team is a good place to start from
    return tabulate(team, data, args)


@torch.no_grad()
def tabulate(team, data, args):
    """The behaviour never changes again, so it becomes tables: a `Behaviour`."""
    S, (R, N, A) = args.num_seeds, data.avail.shape
    log_mu, others = data.obs.new_zeros(N, S, R, A), data.obs.new_zeros(N, S, R, N - 1, A)
    for r in torch.arange(R, device=log_mu.device).split(5_000):
        log_mu[:, :, r] = unroll(team.mus, range(N), r.expand(S, -1), data)
        state, avail, actions = (x[r].expand(S, *x[r].shape) for x in (data.state, data.avail, data.actions))
        for i in range(N):
            others[i, :, r] = teammate_log_prob(team.teammates, state, avail, actions, i)
    return Behaviour(list(log_mu.clamp_(min=-20)), list(others.clamp_(min=-20)))  # as good as never


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "runs.py").exists() and (HOME / "envs" / "play.py").exists():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    import data as datasets
    import envs
    from data import layout, runs
    from envs.matrix import draw_policies
elif __name__ == "__main__":
    sys.exit("error: this file runs inside its repository, beside data/ and envs/; alone, it is to be imported")


def preset(args):
    """What differs from Bridge's values, above, in the other environments; each value can be set by its flag."""
    env, task, values = args.env, args.task or {"matrix": "xor"}.get(args.env, ""), {}
    if env == "matrix":
        payoff, name = envs.make(env, task).payoff, "aa-ab-ba" if task == "xor" else datasets.names(env, task)[-1]
        unit = (payoff.max() - payoff.min()).item() or 1.0
        values = dict(dataset=name, num_seeds=10, steps=1000, one_hot=False, clone_lr=1e-3)
        values |= dict(alpha=unit, alpha_end=0.01 * unit, cql=0.1 * unit, cql_end=0.1 * unit)
    elif env != "bridge":  # not ours: weights in units of the spread of the data's returns
        unit, cells = layout.scales(datasets.load("", "", args.dataset))
        values = dict(dataset="", num_seeds=3, one_hot=cells, alpha=0.3 * unit, alpha_end=0.003 * unit)
        values |= dict(cql=0.1 * unit, cql_end=0.1 * unit, clone_steps=50_000, hold_back=0.1, clone_lr=1e-3)
        values |= dict(eval_every=500)
    return values | dict(env=env, task=task)


def arrange(dataset, args):
    """The dataset as `Data`, and the function that makes the policies' inputs of what a game shows: `layout.teams`.
    Raises ValueError for a single agent."""
    if dataset.obs.shape[2] < 2:
        raise ValueError("AlberDICE is for two agents or more, and here is one")
    (*tensors, _, _, pairs), encode = layout.teams(dataset, args, whole=False)
    return Data(*(table[:-1] for table in tensors), steps=pairs[:, 0]), encode  # no need of the blank row


def act(policies, encode, obs, avail, memory, clocks=None):
    """What the teams do in B games of each seed, and their memory (there is none): obs (S, B, N, O), avail
    (S, B, N, A) -> (S, B, N). Greedy without exponential clocks (S, N, B, A)."""
    x = encode(obs, memory)
    log_pi = torch.stack([log_probs(pi, x[:, :, i], avail[:, :, i]) for i, pi in enumerate(policies)], 1)
    actions = (log_pi if clocks is None else log_pi - clocks.log()).argmax(-1)  # which clock rings first is a draw
    return actions.transpose(1, 2), memory


def evaluate(policies, encode, args, step, episodes, device):
    """Scores (S, E) of the teams of all seeds, greedily and by sampling: `runs.score`."""
    clocks = (len(policies), -1, policies[0][-1].weight.shape[-1])
    return runs.score(lambda *seen: act(policies, encode, *seen), args, step, episodes, device, clocks=clocks)


@torch.no_grad()
def draw_pictures(args, team, data, dataset, seeds):
    """In a game of two agents the tables of their joint actions: what the teams came to."""
    if args.env != "matrix" or len(team.policies) != 2:
        return {}, {}
    one = torch.zeros(len(seeds), 1, dtype=torch.int64, device=data.obs.device)
    figure, joint = draw_policies(unroll(team.policies, range(2), one, data)[:, :, 0].exp(), dataset, seeds)
    return {"policy.png": figure}, {"joint_policy": joint.tolist()}


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("alberdice", args)
    device = run.device
    dataset = run.load(True, episodes=args.episodes)
    data, encode = arrange(dataset, args)
    team = Team(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adams, own = optimizers(team, args), [runs.stream(seed, 2, device) for seed in run.seeds]
    learn, (_, N, A) = run.compile(turn), data.avail.shape
    if run.begin(team=team, adams=list(adams.values()), generators=own):
        behaviour = tabulate(team, data, args)
    else:
        generators = [runs.stream(seed, 1, device) for seed in run.seeds]
        judge = layout.judge(args, data.steps, dataset.lengths)
        behaviour = clone(team, data, generators, args, run.compile(clone_update), judge)

    logs = dict.fromkeys(("nu_loss", "e_loss", "policy_loss", "kl", "sample_size"), torch.full((len(own),), math.nan))
    for step in run.steps(args.steps, args.eval_every):
        if run.due(logs):
            scores = evaluate(team.policies, encode, args, step, args.eval_episodes, device)
            run.record(logs, {name: x.mean(1) for name, x in scores.items()})
        if step < args.steps:
            schedule(team, adams, step, args)
            logs = update(team, adams, data, behaviour, draw_noise(own, N, args), args, learn)

    scores = {name: evaluate(policies, encode, args, args.steps, 10 * args.eval_episodes, device)
              for name, policies in (("AlberDICE", team.policies), ("behavioural cloning", team.mus))}  # fmt: skip
    figures, more = draw_pictures(args, team, data, dataset, run.seeds)
    others = {"behavioural cloning": ("cloned_", scores["behavioural cloning"])}
    run.keep_team(lambda *seen: act(team.policies, encode, *seen), dataset.obs.shape[2:], A, 0, team.policies)
    return run.finish("AlberDICE", scores["AlberDICE"], dataset, run.best, others, figures, **more)


def parse(argv=None):
    """Read the command line; where no flag speaks, the task's own values or those of the resumed run hold."""
    args = runs.parse(Args, preset, argv, __doc__, "AlberDICE is for discrete actions", ("bridge", "matrix"))
    zero = "seed episodes eval_episodes cql penalty gamma layers clone_steps hold_back"
    runs.check_numbers(args, may_be_zero=zero, at_most_one="gamma hold_back")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
