"""AlberDICE: alternating stationary distribution correction
(Matsunaga et al., NeurIPS 2023, arXiv 2311.02194).

The problem. A team of N agents learns from a fixed dataset. Where several joint
actions are equally good (both go left, both go right), each agent's own choice looks
good in the data. Yet two such choices together may be bad, or a combination that
nobody ever took. Keeping each agent close to the data does not help: both halves are
in it.

The idea. The agents learn in turns. In agent i's turn its teammates belong to the
world that it lives in. The minibatch is resampled so that their recorded actions look
as if they came from their *current* policies. And agent i pays where these policies
do what never went with its own action. What is left is a problem of one agent. Its
question is not what the best action is worth, as in Q-learning, but how often each
state should be visited. That problem has a convex dual, whose only unknown is a
function nu(s) of states. Where nu says that a step leads to more than it costs, the
step should be more frequent than in the data. e(s,a) learns by how much, and the
policy follows e. Alpha, the weight of the KL divergence to the data, decays over
training.
(`inspo.py` takes its turns and its resampling from here, and learns Q and pi in them.)

Equations, by numbers of our own. Agent i acts by pi_i; mu_i is its recorded
behaviour. a_-i is what the others did, and mu(a_-i|s,a_i) how often they did it when
i took a_i. D is the data; "resampled" means D weighted by rho_i.
  1  the problem  max over d_i of
                  E r - alpha KL( d_i(s,a_i) pi_-i(a_-i|s) || D(s,a) )
                  d_i: how often agent i visits (s, a_i)
  2  KL_i(s,a)  = sum_{j != i} KL( pi_j(.|s) || mu(.|s,a_i,a_<j) )
                  the teammates' price in Eq. 1
  3  E_i(s,a)   = r - alpha KL_i + gamma nu_i(s') - nu_i(s)      the advantage
  4  rho_i      = min( prod_{j != i} pi_j(a_j|s) / mu(a_-i|s,a_i), 100 )
  5  L(nu_i)    = alpha log E_D [ rho_i exp(E_i/alpha) ] + (1 - gamma) E_D nu_i(s)
                  + penalty E |grad nu_i(s~)|^2
                  s~ lies between two states of the minibatch
  6  L(e_i)     = E_resampled [ (e_i(s,a_i) - E_i)^2
                  + cql ( logsumexp_a e_i(s,a) - sum_a mu_i(a|s) e_i(s,a) ) ]
  7  L(pi_i)    = E_resampled [ sum_a pi_i(a|s) ( alpha log(pi_i/mu_i) - e_i(s,a) ) ]
                  least at  mu_i exp(e_i/alpha) / Z
  8  L(mu_i)    = -E log mu_i(a_i|s)                             behavioural cloning
     L(mu)      = -E log mu(a_-i|s,a_i)
If teammates and world leave nothing to chance and games begin anywhere in D, Eq. 5
without its penalty is the dual of Eq. 1: at its minimum rho_i exp(E_i/alpha),
normalised, is d_i pi_-i over D. Else it lies above the dual. The mean over what
chance does stands outside the exponential, so good luck counts for too much.
A game that ends goes on in a state in which nothing happens. Adding a constant to nu
changes nothing, so nu may be 0 there, and then E_i is 0, too.

Commands, and the return you should see (mean of all seeds; one CPU core, torch 2.13):
  python algorithms/alberdice.py --env matrix --task xor
      data aa-ab-ba, 10 seeds, under a minute: 1 in 10 of 10 seeds, sampled
      0.93 +- 0.05; with --dataset ab, ab-ba and all the same
  ... --task m-ne --dataset imbalanced
      5, the data's local optimum, in 10 of 10, as in the papers (the best is 20);
      balanced 20; --task penalty 10; --task climbing 7.2 +- 0.7 (the best is 11)
  python algorithms/alberdice.py
      Bridge, mixed data (mean -9.31), 5 seeds, 2 min; the best is -1.2355: of 10
      seeds 6 at -1.2355 and 4 at -10.04, one side stuck; sampled -3.5 +- 0.9
  ... --dataset optimal
      7 of 10 seeds at -1.2355, 3 at -1.259; sampled -1.31 +- 0.06; on the authors'
      own file of such data -1.2355 in 5 of 5, sampled -1.237

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, alberdice
  S, N, A, M = 2, 2, 3, 500      # seeds, agents, actions, steps of one long episode
  args = alberdice.Args(num_seeds=S, steps=100, batch_size=64, clone_steps=50)
  obs, state = torch.rand(M + 1, N, 4), torch.rand(M + 1, 6)
  avail, action = torch.ones(M + 1, N, A).bool(), torch.randint(A, (M + 1, N))
  reward = (action[:, 0] == action[:, 1]).float()
  done = (torch.arange(M + 1) == M - 1).float()
  steps = torch.arange(M)
  data = alberdice.Data(obs, state, avail, action, reward, done, steps)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = alberdice.Team(data, args, generators)
  adam = alberdice.optimizer(team, args)
  behaviour = alberdice.clone(team, data, generators, args)
  for step in range(args.steps):
      alberdice.schedule(team, adam, step, args)
      noise = alberdice.draw_noise(generators, N, args)
      logs = alberdice.update(team, adam, data, behaviour, noise, args)

Differences from the authors' code, and choices made here:
  1. One gradient step each for nu, e and pi in an agent's turn, agents in a fixed
     order, as theirs. But each turn has a minibatch of its own, of single steps, not
     of whole episodes. And mu_i and mu(a_-i|s,a_i) are cloned before the turns begin
     and kept as tables; theirs learn all along. The policies start as clones.
  2. Eq. 2 is a sum over all actions of teammate j, given those that the teammates
     before it took in the data. Theirs is a mean over 16 draws of a_j, given the
     same. Weighted by rho_i both have the right mean, but for the cap of Eq. 4.
  3. One teammate model serves every i and j, as in `inspo.py`; theirs has one for
     each i.
  4. The state after the end: theirs appends it to every episode as rows of its own,
     in which nu learns. Here nu is 0 there, and it weighs as much as all recorded
     steps.
  5. E nu(s) is over all recorded states, as theirs. The derivation has first ones.
  6. s~ lies between a state of the minibatch and the one drawn before it; theirs
     between two halves of it. nu's gradient is written out (`slope`), as a graph
     cannot hold a gradient within a gradient.
  7. alpha falls from 0.3 to 0.003 in Bridge, from the payoffs' range to a hundredth
     of it in games of one step; theirs from 5 to 0.001. They make 11 (XOR) to 37
     times (Bridge) as many updates, with Adam at 1e-4 and batches of 128 episodes.
     On Bridge the conservative weight falls as well; theirs is 0.1 throughout.
  8. Networks have 64 units, theirs 128. nu has a last bias, as it is 0 after the end;
     theirs has none. e has an output for each action; theirs takes the action as an
     input. All step sizes but the clones' fall linearly to 0. There is no memory, as
     in theirs: no battles.
  9. The logsumexp of Eq. 6 is over the available actions; theirs is over all.
 10. log mu is at least -20, so that what the data lack has a finite price; theirs adds
     1e-10 to each probability. rho_i is at least 1e-10: its mean needs a logarithm.
 11. In games that nobody tuned, cloning stops where held-back episodes get no
     likelier.
 12. Scores are those of greedy play and of sampling; theirs are sampled.

Shapes: S seeds, B steps of a minibatch, N agents, A actions, I inputs, D state,
R rows (observations), M recorded steps.
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


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "bridge"  # the environment: bridge, matrix, or module:factory
    task: str = ""  # its task; for matrix a name, or any payoff table as JSON
    dataset: str = "mixed"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in games not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 5  # how many seeds train, all at once
    steps: int = 4000  # updates; each is a sweep that trains every agent once
    eval_every: int = 200  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 32  # games a seed and evaluation, greedy and again sampled; 0: none
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads; networks this small gain little from more
    compile: bool = torch.cuda.is_available()  # compile each turn
    out_dir: str = ""  # the run's folder; by default a new one in runs/alberdice
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    alpha: float = 0.3  # weight of the KL divergence to the data, in the first update
    alpha_end: float = 0.003  # and in the last one; it decays exponentially
    cql: float = 1.0  # weight of the conservative term in Eq. 6, in the first update
    cql_end: float = 0.1  # and in the last one; it decays exponentially, too
    penalty: float = 0.1  # weight of the gradient penalty in Eq. 5
    gamma: float = 0.99  # discount
    # --- the optimisation
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    one_hot: bool = True  # feed integer observations as one-hot values (the cells of a grid)
    batch_size: int = 256  # recorded steps per turn
    policy_lr: float = 1e-3  # Adam's step size for the policies; it falls linearly to 0
    critic_lr: float = 3e-3  # Adam's step size for nu and e; so does this
    ratio_cap: float = 100.0  # largest importance ratio
    clone_steps: int = 1000  # updates of the behaviour models before the sweeps, at most
    hold_back: float = 0.0  # share of the episodes that tell when to stop that; 0: never
    clone_lr: float = 2e-3  # their step size
    clone_batch: int = 128  # their minibatch


PRESETS = {  # what differs from Bridge's values, above
    "matrix": dict(  # the weights in units of the payoffs' range
        num_seeds=10,
        steps=1000,
        one_hot=False,
        clone_lr=1e-3,
        alpha=1.0,
        alpha_end=0.01,
        cql=0.1,
        cql_end=0.1,
    ),
    "matrix xor": dict(dataset="aa-ab-ba"),
    "": dict(  # games that are not ours; the weights in units of the spread of returns
        num_seeds=3,
        eval_every=500,
        clone_steps=50_000,
        hold_back=0.1,
        clone_lr=1e-3,
        alpha=0.3,
        alpha_end=0.003,
        cql=0.1,
        cql_end=0.1,
    ),
}


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end.

    In an episode's last row no step begins.
    """

    obs: torch.Tensor  # (R, N, I) what the policies see
    state: torch.Tensor  # (R, D) what nu and e see
    avail: torch.Tensor  # (R, N, A) bool, the available actions
    actions: torch.Tensor  # (R, N) int64, of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    steps: torch.Tensor  # (M,) the rows where a step begins; it ends in the next row


class Behaviour(NamedTuple):
    """What the cloned models say of every row; they never change again."""

    log_mu: list  # of (S, R, A), for each agent i: log mu_i(.|s)
    log_mu_others: list  # of (S, R, N-1, A): log mu(.|s, a_i, a_<j) of each teammate j


class Noise(NamedTuple):
    """Uniform numbers in [0, 1) for one turn; nothing else in it is left to chance."""

    rows: torch.Tensor  # (S, B) which recorded steps to draw
    steps: torch.Tensor  # (S, B) which of them to draw again
    mix: torch.Tensor  # (S, B) where between two states nu's gradient is looked at


class View(NamedTuple):
    """B recorded steps of agent i's turn, and how its teammates play there now."""

    rows: torch.Tensor  # (S, B) where the steps begin
    ratio: torch.Tensor  # (S, B) rho_i
    again: torch.Tensor  # (S, B) which of the B steps were drawn again, by rho_i
    price: torch.Tensor  # (S, B) KL_i


def uniform(generators, *shape):
    """Uniform numbers in [0, 1), (S, *shape), each seed's from its own generator."""
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])


def draw_noise(generators, num_agents, args):
    """The `Noise` of each of a sweep's N turns, a list."""
    noise = uniform(generators, 3, num_agents, args.batch_size)  # (S, 3, N, B)
    return [Noise(*turn.unbind(1)) for turn in noise.unbind(2)]


def draw(noise, data):
    """Recorded steps for each seed as row numbers (S, B), by noise (S, B) in [0, 1)."""
    return data.steps[noise.mul(len(data.steps)).long()]


def chosen(values, action):
    """The entries of the actions taken: (..., A), (...) -> (...)."""
    return values.gather(-1, action[..., None])[..., 0]


def recall(table, rows):
    """Each seed's entries of its own table: (S, R, ...), rows (S, B) -> (S, B, ...)."""
    return table[torch.arange(len(rows), device=rows.device)[:, None], rows]


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """S independent linear layers as one batched product, each from its own generator."""

    def __init__(self, inputs, outputs, generators):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        start = torch.stack(
            [
                torch.empty(inputs + 1, outputs).uniform_(-bound, bound, generator=g)
                for g in generators
            ]
        )
        self.weight = nn.Parameter(start[:, :-1].clone())  # (S, in, out)
        self.bias = nn.Parameter(start[:, -1:].clone())  # (S, 1, out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (S, B, out)


def mlp(inputs, outputs, args, generators):
    """A ReLU network for each seed: (S, B, inputs) -> (S, B, outputs)."""
    layers = []
    for _ in range(args.layers):
        layers += [Linear(inputs, args.hidden, generators), nn.ReLU()]
        inputs = args.hidden
    return nn.Sequential(*layers, Linear(inputs, outputs, generators))


class Team(nn.Module):
    """Everything that S teams learn; each agent has networks of its own."""

    def __init__(self, data, args, generators):
        super().__init__()
        _, N, A = data.avail.shape
        I, D = data.obs.shape[-1], data.state.shape[-1]
        agents = range(N)
        self.mus = nn.ModuleList(mlp(I, A, args, generators) for _ in agents)  # Eq. 8
        self.teammates = mlp(D + N + N * A, A, args, generators)  # Eq. 8
        self.nus = nn.ModuleList(mlp(D, 1, args, generators) for _ in agents)  # nu_i(s)
        self.es = nn.ModuleList(mlp(D, A, args, generators) for _ in agents)  # e_i(s, .)
        self.policies = copy.deepcopy(self.mus)
        for name in ("alpha", "cql"):  # what they weigh now, see `schedule`
            self.register_buffer(name, torch.zeros(()), persistent=False)


def log_probs(policy, obs, avail):
    """Log-probabilities of all actions (S, B, A) from inputs (S, B, I).

    An action that is not available has no mass.
    """
    return F.log_softmax(policy(obs).masked_fill(~avail, ILLEGAL), -1)


def recorded_log_probs(policies, i, rows, data):
    """The same of agent i's policy in the rows (S, B) of the data: (S, B, A)."""
    return log_probs(policies[i], data.obs[rows, i], data.avail[rows, i])


def teammate_log_prob(network, i, rows, data):
    """Eq. 8: log mu(.|s, a_i, a_<j), (S, B, N-1, A), of each teammate j, in the rows (S, B).

    One network serves every i and j. Its input holds the state, which j is asked for, and the known
    part of the joint action, that of i and of the teammates before j; zeros stand for the rest.
    """
    state, avail, actions = data.state[rows], data.avail[rows], data.actions[rows]
    N, A = avail.shape[2:]
    agent = torch.arange(N, device=rows.device)
    taken = F.one_hot(actions, A)  # (S, B, N, A)
    log_mu = []  # of (S, B, A)
    for j in [j for j in range(N) if j != i]:
        who = F.one_hot(agent[j], N).expand(*rows.shape, -1)  # (S, B, N)
        known = (agent == i) | (agent < j)  # (N,)
        x = torch.cat([state, who, (taken * known[:, None]).flatten(2)], -1)
        log_mu.append(log_probs(network, x, avail[:, :, j]))
    return torch.stack(log_mu, 2)


def slope(network, x):
    """The gradient (S, B, D) of a ReLU network's only output by its inputs x (S, B, D).

    It can be differentiated again.
    """
    layers = network[::2]  # without the activations
    active = []  # of (S, B, hidden) bool: which units pass something on
    for layer in layers[:-1]:
        x = layer(x)
        active.append(x > 0)
        x = x.relu()
    gradient = layers[-1].weight.mT  # (S, 1, hidden)
    for layer in layers[-2::-1]:
        gradient = (gradient * active.pop()) @ layer.weight.mT
    return gradient


# ---------------------------------------------------------------- losses
def importance_ratio(log_pi_others, log_mu_others, actions, cap):
    """Eq. 4: rho_i (S, B), at least 1e-10.

    log_pi_j and log mu of all teammates, both (S, B, N-1, A), and what these did, (S, B, N-1).
    """
    log_ratio = chosen(log_pi_others, actions) - chosen(log_mu_others, actions)
    return log_ratio.sum(-1).exp().clamp(1e-10, cap)


def resample(ratio, noise):
    """Draw places in the minibatch with replacement, with probability ratio / sum(ratio).

    ratio (S, B), noise (S, B) in [0, 1): the places (S, B). One whose ratio is 0 is never drawn.
    """
    cumulative = ratio.cumsum(1)
    heights = noise * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, heights, right=True)  # the first sum above it
    return places.clamp(max=ratio.shape[1] - 1)  # if rounding led past the end


def teammates_kl(log_pi_others, log_mu_others):
    """Eq. 2, (S, B), from log pi_j and log mu of all teammates, both (S, B, N-1, A)."""
    return (log_pi_others.exp() * (log_pi_others - log_mu_others)).sum((-1, -2))


def advantage(nu, next_nu, reward, done, price, alpha, gamma):
    """Eq. 3, (S, B); nu is 0 in the state after the end."""
    return reward - alpha * price + gamma * (1 - done) * next_nu - nu


def nu_loss(advantages, ratio, nu, slopes, alpha, args):
    """Eq. 5 for each seed, (S,).

    `advantages` (S, B) are those of the resampled steps, `ratio` and `nu` (S, B) those of the drawn
    ones, `slopes` (S, B, D) the gradients of nu between states.
    """
    # Drawing again by rho has divided by its mean, which comes back here.
    log_sum = (advantages / alpha).logsumexp(1)
    recorded = log_sum - math.log(nu.shape[1]) + ratio.mean(1).log()  # log of the mean
    # As many steps again are in the state after the end: nu and E are 0 there, and exp(E) is 1.
    log_mean = torch.logaddexp(recorded, torch.zeros_like(recorded)) - math.log(2)
    start = (1 - args.gamma) * nu.mean(1) / 2
    return alpha * log_mean + start + args.penalty * (slopes**2).sum(-1).mean(1)


def e_loss(e, action, advantages, avail, log_mu, cql):
    """Eq. 6 for each seed, (S,).

    e and log_mu (S, B, A), advantages (S, B): all of resampled steps.
    """
    gap = e.masked_fill(~avail, ILLEGAL).logsumexp(-1) - (log_mu.exp() * e).sum(-1)
    return ((chosen(e, action) - advantages) ** 2 + cql * gap).mean(1)


def policy_loss(log_pi, e, log_mu, alpha):
    """Eq. 7 for each seed: the loss (S,) and KL(pi_i || mu_i) (S,).

    All inputs are (S, B, A), of resampled steps.
    """
    pi = log_pi.exp()
    kl = (pi * (log_pi - log_mu)).sum(-1).mean(1)
    return alpha * kl - (pi * e).sum(-1).mean(1), kl.detach()


# ---------------------------------------------------------------- update
@torch.compiler.disable  # a graph ends here, as torch.compile cannot hold an optimiser's step
def take_step(adam, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.contiguous()  # a fused Adam reads gradients as if they were
    adam.step()
    adam.zero_grad()


def descend(adam, module, losses):
    """One step down the losses (S,) of independent seeds; returns them, detached.

    Their sum leaves each seed the gradient that it would have alone.
    """
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(losses.sum(), parameters)
    losses = losses.detach()
    take_step(adam, parameters, gradients)
    return losses


def optimizer(team, args):
    """Adam for everything but the clones; only what has a gradient takes a step."""
    critics = [*team.nus.parameters(), *team.es.parameters()]
    groups = [{"params": critics}, {"params": team.policies.parameters()}]
    return torch.optim.Adam(groups, fused=True)


def schedule(team, adam, step, args):
    """Set what changes from update to update.

    The weights of the KL divergence and of the conservative term fall exponentially, to their ends
    in the last one. The step sizes fall linearly, to 0.
    """
    share = step / max(1, args.steps - 1)
    team.alpha.fill_(args.alpha * (args.alpha_end / args.alpha) ** share)
    team.cql.fill_(args.cql * (args.cql_end / args.cql) ** share if args.cql else 0.0)
    for group, lr in zip(adam.param_groups, (args.critic_lr, args.policy_lr)):
        group["lr"] = lr * (1 - step / args.steps)


@torch.no_grad()
def look(i, team, data, behaviour, noise, args):
    """Draw the minibatch of agent i's turn; see how its teammates play there now."""
    others = [j for j in range(len(team.policies)) if j != i]
    rows = draw(noise.rows, data)  # (S, B)
    actions = torch.stack([data.actions[rows, j] for j in others], -1)  # (S, B, N-1)
    log_pi = torch.stack([recorded_log_probs(team.policies, j, rows, data) for j in others], 2)
    log_mu = recall(behaviour.log_mu_others[i], rows)  # (S, B, N-1, A)
    ratio = importance_ratio(log_pi, log_mu, actions, args.ratio_cap)
    return View(rows, ratio, resample(ratio, noise.steps), teammates_kl(log_pi, log_mu))


def evaluation(i, team, adam, data, view, noise, args):
    """How often to be where: one step of nu_i.

    Returns E_i (S, B) of the resampled steps, by nu_i before that step, and diagnostics.
    """
    rows, ratio, again, price = view
    nu_i, state = team.nus[i], data.state[rows]  # (S, B, D)
    nu, next_nu = nu_i(torch.cat([state, data.state[rows + 1]], 1))[..., 0].chunk(2, 1)
    paid = data.reward[rows], data.done[rows]
    advantages = advantage(nu, next_nu, *paid, price, team.alpha, args.gamma).gather(1, again)
    between = torch.lerp(state, state.roll(1, 1), noise.mix[..., None])  # s~, (S, B, D)
    losses = nu_loss(advantages, ratio, nu, slope(nu_i, between), team.alpha, args)
    advantages = advantages.detach()
    effective = ratio.sum(1) ** 2 / (ratio**2).sum(1)  # steps of equal weight that tell as much
    losses = descend(adam, nu_i, losses)
    return advantages, {"nu_loss": losses, "sample_size": effective}


def improvement(i, team, adam, data, behaviour, view, advantages, args):
    """Which actions lead there: one step of e_i, and one of pi_i, which follows it."""
    rows = view.rows.gather(1, view.again)  # (S, B) the resampled steps
    avail, log_mu = data.avail[rows, i], recall(behaviour.log_mu[i], rows)  # (S, B, A)
    e = team.es[i](data.state[rows])  # (S, B, A)
    losses = e_loss(e, data.actions[rows, i], advantages, avail, log_mu, team.cql)
    e = e.detach()
    e_losses = descend(adam, team.es[i], losses)
    log_pi = recorded_log_probs(team.policies, i, rows, data)  # (S, B, A)
    losses, kl = policy_loss(log_pi, e, log_mu, team.alpha)
    policy_losses = descend(adam, team.policies[i], losses)
    return {"e_loss": e_losses, "policy_loss": policy_losses, "kl": kl}


def turn(i, team, adam, data, behaviour, noise, args):
    """One update of agent i's nu, e and policy, with the teammates as they are now.

    Returns diagnostics, {name: (S,)}.
    """
    view = look(i, team, data, behaviour, noise, args)
    advantages, logs = evaluation(i, team, adam, data, view, noise, args)
    return logs | improvement(i, team, adam, data, behaviour, view, advantages, args)


def update(team, adam, data, behaviour, noise, args, turn=turn):
    """One sweep: every agent's turn, for all seeds; returns the last turn's diagnostics.

    noise: a `Noise` for each turn. `turn` can be given in compiled form.
    """
    for i, own_noise in enumerate(noise):
        logs = turn(i, team, adam, data, behaviour, own_noise, args)
    return logs


# ---------------------------------------------------------------- behaviour
def clone_loss(models, data, rows):
    """Eq. 8 for each seed, (S,), on the steps that begin in the rows (S, B).

    models: mu_i of each agent, and at last the teammate model.
    """
    agents = range(len(models) - 1)
    actions = data.actions[rows]  # (S, B, N)
    loss = 0
    for i in agents:
        log_mu = recorded_log_probs(models, i, rows, data)  # (S, B, A)
        log_mu_others = teammate_log_prob(models[-1], i, rows, data)  # (S, B, N-1, A)
        others = torch.stack([actions[..., j] for j in agents if j != i], -1)  # (S, B, N-1)
        loss = loss - chosen(log_mu, actions[..., i]).mean(1)
        loss = loss - chosen(log_mu_others, others).sum(-1).mean(1)
    return loss


@torch.enable_grad()
def clone_update(adam, models, data, row_noise):
    """One update of the behaviour models on steps that row_noise (S, B) draws."""
    descend(adam, models, clone_loss(models, data, draw(row_noise, data)))


def hold_back(data, share):
    """Part the recorded steps: the `Data` to clone, and the rows (B,) to judge the clones by.

    The latter are a `share` of the episodes, evenly spread over the data, less where that would be
    more than 5,000 steps; none if there is a single episode.
    """
    steps = data.steps
    episode = F.pad((steps.diff() > 1).cumsum(0), (1, 0))  # (M,) no step begins in a last row
    if share == 0 or episode[-1] == 0:
        return data, steps[:0]
    every = max(2, round(1 / min(share, 5_000 / len(steps))))
    held = episode % every == 0
    return data._replace(steps=steps[~held]), steps[held]


@torch.no_grad()
def clone(team, data, generators, args, clone_update=clone_update):
    """Fit the behaviour, start the policies from it, and return it as a `Behaviour`.

    With --hold-back each seed keeps the models that make the held-back episodes likeliest. These
    are asked every 250 updates; once 4 times in a row they are no likelier, a seed is done.
    """
    models = nn.ModuleList([*team.mus, team.teammates])
    parameters = list(models.parameters())
    adam = torch.optim.Adam(parameters, args.clone_lr, fused=True)
    learned, held = hold_back(data, args.hold_back)
    best = data.reward.new_full((args.num_seeds,), torch.inf)  # (S,)
    kept, checks = [x.clone() for x in parameters], torch.zeros_like(best)
    for step in range(1, args.clone_steps + 1):
        clone_update(adam, models, learned, uniform(generators, args.clone_batch))
        if len(held) and (step % 250 == 0 or step == args.clone_steps):
            loss = clone_loss(models, data, held.expand(args.num_seeds, -1))
            better = (loss < best) & (checks < 4)
            best, checks = torch.where(better, loss, best), torch.where(better, 0, checks + 1)
            for old, new in zip(kept, parameters):
                old[better] = new[better]
            if (checks >= 4).all():
                break
    if len(held):
        torch._foreach_copy_(parameters, kept)
    team.policies.load_state_dict(team.mus.state_dict())  # a good place to start from
    return tabulate(team, data, args)


@torch.no_grad()
def tabulate(team, data, args):
    """The behaviour never changes again, so it becomes tables: a `Behaviour`."""
    rows = torch.arange(len(data.obs), device=data.obs.device).expand(args.num_seeds, -1)  # (S, R)

    def table(log_probs, models, i):
        parts = [log_probs(models, i, part, data) for part in rows.split(5_000, 1)]
        return torch.cat(parts, 1).clamp(min=-20)  # as good as never

    agents = range(len(team.mus))
    log_mu = [table(recorded_log_probs, team.mus, i) for i in agents]
    return Behaviour(log_mu, [table(teammate_log_prob, team.teammates, i) for i in agents])


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import layout
    from data.run import Run, launch, read_args, remembering
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")


def arrange(dataset, args):
    """The dataset as `Data`, and what makes the policies' inputs of what a game shows.

    Raises ValueError for a single agent.
    """
    if dataset.obs.shape[2] < 2:
        raise ValueError("AlberDICE is for two agents or more, and here is one")
    (*tables, _, _, pairs), encode = layout.teams(dataset, args, whole=False)
    return Data(*(table[:-1] for table in tables), steps=pairs[:, 0]), encode  # no blank row


def player(policies, encode, num_actions):
    """How the teams of all seeds play."""

    def think(x, avail, memory):
        log_pi = [log_probs(pi, x[:, :, i], avail[:, :, i]) for i, pi in enumerate(policies)]
        return torch.stack(log_pi, 2), memory  # (S, B, N, A); there is no memory

    return remembering(think, encode, len(policies), num_actions, 0, policies)


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("alberdice", args)
    data, encode = arrange(run.load(discrete=True), args)
    team = Team(data, args, run.streams(0, "cpu")).to(run.device)
    adam, generators = optimizer(team, args), run.streams(2)
    learn = run.compile(turn)
    if run.begin(team=team, adam=adam, generators=generators):
        behaviour = tabulate(team, data, args)
    else:
        behaviour = clone(team, data, run.streams(1), args, run.compile(clone_update))
    own = player(team.policies, encode, run.actions)
    for step in run.steps(own):  # evaluates, records and keeps where it is due
        schedule(team, adam, step, args)
        noise = draw_noise(generators, len(team.policies), args)
        run.logs = update(team, adam, data, behaviour, noise, args, learn)
    cloned = run.score(player(team.mus, encode, run.actions))
    return run.finish("AlberDICE", own, others={"behavioural cloning": ("cloned_", cloned)})


def parse(argv=None):
    """Read the command line; where no flag speaks, the preset's values or a resumed run's hold."""
    return read_args(
        Args,
        PRESETS,
        argv,
        __doc__,
        kinds="AlberDICE is for discrete actions",
        known=("bridge", "matrix"),
        in_units="alpha alpha_end cql cql_end",
        may_be_zero="seed episodes eval_episodes cql penalty gamma layers clone_steps hold_back",
        at_most_one="gamma hold_back",
    )


if __name__ == "__main__":
    launch(main, parse)
