"""IQL and MAIQL: implicit Q-learning for teams.

Kostrikov et al., ICLR 2022; for teams as in MOMA-PPO's comparison, arXiv 2305.17198.

The problem. To learn from a fixed dataset, values must not be asked about actions that nobody
recorded. Nothing would correct a wrong answer, and the policy would run after it.

The idea. Do not look for the best action; look at the good ones among the recorded. V is an upper
expectile of Q over recorded actions: a regression that weighs what lies above it more than what
lies below. Q looks ahead through V. Then the policy clones the recorded actions, those with a large
advantage most. How far a team can agree depends on who does this (--team). "central": one learner
sees all views and chooses the joint action. It can weigh whole conventions against each other, but
no agent could act on its own view alone; it is an upper bound. "mixed" (MAIQL): each agent has
values and a policy of its own, and a mixer adds the values up for the team. Every agent then clones
its own part of good joint actions, and the parts of two conventions need not fit. "independent":
each agent alone, with the team's reward.

Equations, by numbers of our own. Player i = 1..K has Q_i(o_i, a_i), twice, and V_i(o_i). The
players are the agents; with "central" there is one, which has the views and the actions of all. A
prime marks slowly moving copies, s' the next state; m is 0 where the game ended by its own rules.
 1 mixing   Q = sum_i w_i(s, a) Q_i + b(s, a),   V = sum_i u_i(s) V_i + c(s)
 2          A(s, a)  = Q'(s, a) - V(s)
 3          L(V)     = E [ |expectile - 1(A < 0)| A^2 ]
 4          L(Q)     = E [ r + gamma m V(s') - Q(s, a) ]^2      for both Q
 5          L(pi)    = -E [ min( exp(temperature A), 100 ) sum_i log pi_i(a_i|o_i) ]
Eq. 1 is for "mixed"; otherwise Q = Q_i and V = V_i, and Eqs. 2 to 5 hold for each player. Q' mixes
the lower of both copies of each Q_i, by copies of w and b. With --temperature 0 all weights are 1:
plain cloning.

Commands, and the return you should see (last policy, greedy; one CPU core, torch 2.13):
  python algorithms/iql.py --team central
      the coordination game, unfavourable data, 10 seeds at once, 24 s: IQL, 1 in 10 of 10 seeds;
      the data 0.37
  python algorithms/iql.py
      the same for MAIQL, 35 s: 0.1 +- 0.1, sampled 0.52
  python algorithms/iql.py --finetune 1
      50 s: MAIQL-ft, 0.9 +- 0.1, sampled 0.51
  python algorithms/iql.py --env matrix --task xor --dataset aa-ab-ba
      43 s: MAIQL, greedy 0.4 +- 0.16, sampled 0.48

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, iql
  S, N, A, M = 2, 3, 4, 1000  # seeds, players, actions, steps of one long episode
  obs, state = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6)
  avail, action = torch.ones(M + 1, N, A).bool(), torch.randint(A, (M + 1, N))
  reward = (action == obs[..., :A].argmax(-1)).float().mean(1)
  data = iql.Data(obs, state, avail, action, reward, torch.zeros(M + 1), torch.arange(M))
  args = iql.Args(num_seeds=S, team="mixed")
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = iql.Team(data, args, generators)
  adam = iql.optimizer(team, args)
  for step in range(200):
      logs = iql.update(team, adam, data, iql.draw_rows(generators, data, args), args)
  out = team.policies(obs.transpose(0, 1).expand(S, N, M + 1, 5), avail.transpose(0, 1))
  greedy = team.policies.sample(out)  # (S, N, M + 1)

Differences from the authors' code (of MOMA-PPO's baselines), and choices made here:
  1. The mixers see the state, Q's also the joint action, rather than all views. Their weights may
     have any sign, as in the code; the paper says QMIX, where they may not.
  2. On games with discrete actions the central player has one logit for each joint action. With one
     for each agent's action it could not tell two conventions from their mixture.
  3. Agents have no memory; the authors' look at their last ten views and actions. Networks are
     smaller (theirs 256 units), copies move twice as fast, and a seed's gradient has a limited
     length also without mixers. Views of bodies are in units of the data's mean and spread.
  4. Continuous policies are normal and clipped when played, as in bc.py; the authors' go through a
     tanh.
  5. Rewards are as recorded, but on the ant, as in the code. There --scale-rewards measures them in
     thousandths of the difference between the best and the worst return of the data. IQL's own code
     does so on every body that walks.
  6. Step sizes of the policies fall linearly to 0 (the code: along a cosine).
  7. --finetune 1 (MAIQL-ft): as many updates again, in which the teams play as well. Before every
     tenth each seed plays games of up to ten steps from recorded states (the authors' one). In the
     end half of all steps are its own, or fewer where games end early. A minibatch draws from all
     alike.
  8. The ant's temperature is 0.3 (--temperature 3: the code's). After so few updates the errors of
     V differ more from state to state than actions do in value. With 3 only a tenth of a minibatch
     has weights that count.

Seeds differ in all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, K players (N or 1), Q = S K networks, B steps of a minibatch, M recorded
steps, R rows (observations), E games, T steps, A actions (or entries of an action), O observation,
I inputs, D state.
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
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "matrix"  # matrix, bridge, smac, polynomial, a body's name, or module:factory
    task: str = ""  # its task; by default the coordination game, or the environment's first
    dataset: str = "unfavourable"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of agents' rewards, in games that are not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 10  # how many seeds train, all at once
    steps: int = 1000  # updates, one minibatch each
    eval_every: int = 250  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 10  # games per seed and evaluation; 0 to train without an environment
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # compile updates with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/iql
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    team: Literal["central", "mixed", "independent"] = "mixed"  # one learner for all, or each agent
    finetune: float = 0.0  # more updates, in units of --steps, while the teams play the true game
    expectile: float = 0.7  # which expectile of the recorded actions' Q is V
    temperature: float = 3.0  # how much more a good action counts than a bad one; 0 clones
    scale_rewards: bool = False  # measure them in thousandths of the range of the data's returns
    gamma: float = 0.99  # discount
    # --- the optimisation
    normalize: bool = True  # views in units of the data's mean and spread
    one_hot: bool = False  # feed whole numbers as one-hot values (the cells of a grid)
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    batch_size: int = 64  # recorded steps per update
    lr: float = 1e-3  # Adam's step size; the policies' falls linearly to 0
    tau: float = 0.01  # how far a target network moves in an update
    max_grad_norm: float = 1.0  # longest gradient of one seed's agents


SMALL = dict(normalize=False, steps=3000, eval_every=500, eval_episodes=32)
LONG = dict(num_seeds=3, steps=10_000, eval_every=2000)
BODY = LONG | dict(hidden=128, batch_size=256, lr=5e-4)
PRESETS = {  # what differs from the values above, by environment; "" is a game that is not ours
    "matrix": dict(task="coordination"),
    "bridge": SMALL | dict(num_seeds=5, one_hot=True, batch_size=128),
    "smac": SMALL | dict(task="5m_vs_6m", num_seeds=3, batch_size=512),
    "polynomial": dict(steps=3000, eval_every=1000, normalize=False),
    "reacher": BODY,
    "halfcheetah": BODY,
    "ant": BODY | dict(scale_rewards=True, temperature=0.3),
    "": BODY,
}


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end.

    In an episode's last row no step begins.
    """

    obs: torch.Tensor  # (R, K, I) what the players see
    state: torch.Tensor  # (R, D) what the mixers see
    avail: torch.Tensor | None  # (R, K, A) bool, what can be played; None if actions are continuous
    action: torch.Tensor  # (R, K) int64, or (R, K, A) in [-1, 1], of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    steps: torch.Tensor  # (M,) rows where a step begins; its next observation is in the next row


def draw_rows(generators, data, args):
    """Rows (S, B) where a step begins: each seed's minibatch, drawn with replacement."""
    M, B = len(data.steps), args.batch_size
    drawn = [torch.randint(M, (B,), generator=g, device=g.device) for g in generators]
    return data.steps[torch.stack(drawn)]


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


def side_by_side(network, x):
    """What the players' own networks make of x: (S, K, B, I) -> (S, K, B, out)."""
    return network(x.flatten(0, 1)).view(*x.shape[:3], -1)


class Policies(nn.Module):
    """A policy for each player of S teams."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.discrete = data.avail is not None
        self.A = (data.avail if self.discrete else data.action).shape[-1]
        _, self.N, I = data.obs.shape
        outputs = self.A if self.discrete else 2 * self.A
        each = [g for g in generators for _ in range(self.N)]
        self.body = mlp(I, outputs, args, each, scale=0.1)
        if not self.discrete:  # actions begin as far apart as the recorded ones
            spread = data.action[data.steps].std(0, correction=0)
            log_spread = spread.clamp(min=math.exp(-6), max=1).log()
            self.register_buffer("log_spread", log_spread[:, None])  # (K, 1, A)

    def forward(self, obs, avail):
        """From views (S, K, B, I), and what can be played (..., K, B, A), None if continuous.

        Returns the log-probabilities of all actions (S, K, B, A), or the means and log-deviations
        of continuous ones (S, K, B, 2A).
        """
        out = side_by_side(self.body, obs)
        if self.discrete:
            return F.log_softmax(out.masked_fill(~avail, ILLEGAL), -1)
        mean, log_std = out.chunk(2, -1)
        return torch.cat([mean, (self.log_spread + log_std).clamp(-6, 0)], -1)

    def log_prob(self, out, action):
        """log pi_i of Eq. 5 for actions (S, K, B, A), (S, K, B); `out` from `forward`."""
        if self.discrete:  # of one-hot actions
            return (out * action).sum(-1)
        mean, log_std = out.chunk(2, -1)
        z = (action - mean) / log_std.exp()
        return (-0.5 * z**2 - log_std - HALF_LOG_2PI).sum(-1)

    def sample(self, out, clocks=None):
        """The likeliest actions, (S, K, B) or (S, K, B, A).

        With clocks (S, K, B, A) actions are drawn from the policies; the clocks are exponential
        numbers or, where actions are continuous, normal ones.
        """
        if self.discrete:  # which clock rings first is a draw from pi
            return (out if clocks is None else out - clocks.log()).argmax(-1)
        mean, log_std = out.chunk(2, -1)
        return mean if clocks is None else mean + log_std.exp() * clocks


class Mixer(nn.Module):
    """Eq. 1: a team's value, (S, 1, B), of the players' own, (S, K, B), if they are "mixed".

    Its weights, of any sign, and its bias depend on the context (S, B, I).
    """

    def __init__(self, inputs, num_players, args, generators):
        super().__init__()
        self.net = None
        if args.team == "mixed":
            self.net = mlp(inputs, num_players + 1, args, generators)

    def forward(self, local, context):
        if self.net is None:
            return local
        out = self.net(context).movedim(2, 1)  # (S, K + 1, B)
        return (out[:, :-1] * local).sum(1, keepdim=True) + out[:, -1:]


class Team(nn.Module):
    """Everything that S teams learn."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.policies = Policies(data, args, generators)
        (_, K, I), A, D = data.obs.shape, self.policies.A, data.state.shape[1]
        each = [g for g in generators for _ in range(K)]
        twins = nn.ModuleList(mlp(I + A, 1, args, each) for _ in range(2))
        v = mlp(I, 1, args, each)
        self.critic = nn.ModuleList([twins, Mixer(D + K * A, K, args, generators)])
        self.value = nn.ModuleList([v, Mixer(D, K, args, generators)])
        self.target = copy.deepcopy(self.critic).requires_grad_(False)


# ---------------------------------------------------------------- losses
def gather(data, rows):
    """What the rows (S, B) hold, as `Data` of a minibatch.

    Players come before steps, (S, K, B, ...), and discrete actions are one-hot, (S, K, B, A). State
    is (S, B, D), reward and done are (S, 1, B).
    """
    obs = data.obs[rows].transpose(1, 2)
    action = data.action[rows].transpose(1, 2)
    avail = data.avail
    if avail is not None:
        avail = avail[rows].transpose(1, 2)
        action = F.one_hot(action, avail.shape[-1]).to(obs.dtype)
    reward, done = data.reward[rows][:, None], data.done[rows][:, None]
    return Data(obs, data.state[rows], avail, action, reward, done, rows)


def state_value(value, obs, state):
    """V of Eq. 1, (S, 1, B) where the players' values are mixed, else (S, K, B)."""
    network, mixer = value
    return mixer(side_by_side(network, obs)[..., 0], state)


def local_values(twins, batch):
    """The players' Q_i(o_i, a_i), by both networks of each: (2, S, K, B)."""
    x = torch.cat([batch.obs, batch.action], -1)
    return torch.stack([side_by_side(network, x)[..., 0] for network in twins])


def joint_value(mixer, local, batch):
    """Q of Eq. 1 from the players' own (S, K, B), of the shape of V."""
    everyones = batch.action.transpose(1, 2).flatten(2)  # (S, B, K A)
    return mixer(local, torch.cat([batch.state, everyones], -1))


def advantage(team, batch):
    """Eq. 2, of the shape of V; only V has a gradient."""
    twins, mixer = team.target
    with torch.no_grad():
        q = joint_value(mixer, local_values(twins, batch).amin(0), batch)
    return q - state_value(team.value, batch.obs, batch.state)


def value_loss(team, batch, expectile):
    """Eq. 3 for each seed, (S,)."""
    gap = advantage(team, batch)
    weight = (expectile - (gap < 0).to(gap.dtype)).abs()
    return (weight * gap**2).mean((1, 2))


def critic_loss(team, batch, later, gamma):
    """Eq. 4 for each seed, (S,); later: what the next rows hold."""
    twins, mixer = team.critic
    with torch.no_grad():
        next_v = state_value(team.value, later.obs, later.state)
        y = batch.reward + gamma * (1 - batch.done) * next_v
    errors = [y - joint_value(mixer, local, batch) for local in local_values(twins, batch)]
    return sum((error**2).mean((1, 2)) for error in errors)


def policy_loss(team, batch, temperature):
    """Eq. 5 for each seed, (S,)."""
    with torch.no_grad():
        weight = (temperature * advantage(team, batch)).exp().clamp(max=100)
    out = team.policies(batch.obs, batch.avail)
    log_pi = team.policies.log_prob(out, batch.action)  # (S, K, B)
    return -(weight * log_pi).sum(1).mean(1)


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


def optimizer(team, args):
    """Adam. Its first group are the policies, as only their step size falls."""
    modules = team.policies, nn.ModuleList([team.value, team.critic])
    groups = [{"params": module.parameters()} for module in modules]
    return torch.optim.Adam(groups, args.lr, fused=True)


def update(team, adam, data, rows, args):
    """One update of all networks, on the steps that begin in `rows` (S, B); returns logs, (S,)."""
    batch = gather(data, rows)
    later = gather(data, rows + 1)
    limit = args.max_grad_norm
    v_loss = descend(adam, team.value, value_loss(team, batch, args.expectile), limit)
    pi_loss = descend(adam, team.policies, policy_loss(team, batch, args.temperature), limit)
    q_loss = descend(adam, team.critic, critic_loss(team, batch, later, args.gamma), limit)
    with torch.no_grad():
        for slow, quick in zip(team.target.parameters(), team.critic.parameters()):
            slow.lerp_(quick, args.tau)
    return {"policy_loss": pi_loss, "q_loss": q_loss, "v_loss": v_loss}


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import layout
    from data.dataset import Dataset
    from data.run import Player, Run, game, launch, memoryless, read_args
    from envs.rollout import play
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")


# A player decides for G = N / K agents: for one, or for all if there is one player. Its discrete
# action is a number, whose digits to base A are its agents' actions.
def joint_avail(avail, K):
    """What players can do, (..., K, A^G), of what agents can, (..., N, A); None stays None."""
    if avail is None:
        return None
    joint, *others = avail.unflatten(-2, (K, -1)).unbind(-2)  # (..., K, A) each
    for other in others:
        joint = (joint[..., None] & other[..., None, :]).flatten(-2)
    return joint


def join(action, avail, K):
    """Players' actions of the agents': (..., N) -> (..., K), or (..., N, A) -> (..., K, G A)."""
    if avail is None:
        return action.flatten(-2).unflatten(-1, (K, -1))
    number, *digits = action.unflatten(-1, (K, -1)).unbind(-1)
    for digit in digits:
        number = number * avail.shape[-1] + digit
    return number


def split(action, avail, N):
    """The agents' actions of the players': `join` backwards."""
    if avail is None:
        return action.flatten(-2).unflatten(-1, (N, -1))
    A, G = avail.shape[-1], N // action.shape[-1]
    digits = [action // A**place % A for place in reversed(range(G))]
    return torch.stack(digits, -1).flatten(-2)


def arrange(dataset, args):
    """The dataset as `Data`, and two functions, for what is played later.

    Returns:
        The data; the function that turns observations (..., N, O) into the players' inputs; the
        one that turns what happened, under the names of a dataset, into `Data`.
    """
    rows = layout.rows(dataset)
    view = layout.inputs(rows["obs"], args)
    see_state = layout.inputs(rows["state"], args, correction=1)
    K = 1 if args.team == "central" else rows["obs"].shape[-2]
    scale = 1.0
    if args.scale_rewards:
        scale = 1000 / (dataset.returns.max() - dataset.returns.min()).clamp(min=1e-6)

    def encode(obs):
        return view(obs).flatten(-2).unflatten(-1, (K, -1))

    def see(played):
        avail = played["avail_actions"]
        return Data(
            encode(played["obs"]),
            see_state(played["state"]),
            joint_avail(avail, K),
            join(played["actions"], avail, K),
            played["reward"] * scale,
            played["done"],
            played["start"],
        )

    return see(rows), encode, see


def player(policies, encode):
    """How the teams of all seeds play."""
    players = memoryless(policies, encode)

    def act(obs, avail, memory, clocks=None):
        action, memory = players.act(obs, joint_avail(avail, policies.N), memory, clocks)
        return split(action, avail, obs.shape[2]), memory

    return Player(act, policies, clocks=players.clocks)


class Practice:
    """What the teams play while they are fine-tuned: in each round, E games of up to T steps.

    Attributes:
        data: the dataset's rows and, behind them, room for those of all games.
        end: how many rows are taken.
        steps: for each seed, the rows where recorded steps and its own begin.
        films: what happened, a dictionary a round.
    """

    def __init__(self, dataset, data, see, args, updates):
        S, M, rounds = args.num_seeds, len(data.steps), math.ceil(updates / 10)
        T = min(10, game(args).time_limit)
        E = math.ceil(M / (rounds * T))  # in the end, half of a seed's steps are its own
        self.game = game(args, S * E, data.obs.device)
        self.game.time_limit = T
        self.starts = layout.rows(dataset)["state"][data.steps]  # as the game knows them
        self.shape, self.see, self.end = (S, E), see, len(data.obs)
        self.steps, self.films = [data.steps] * S, []
        room = rounds * S * E * (T + 1)
        for name, x in zip(data._fields[:-1], data):
            if x is not None:
                x = torch.cat([x, x.new_zeros(room, *x.shape[1:])])
            data = data._replace(**{name: x})
        self.data = data

    def draw(self, generators, data, args):
        """Rows (S, B): each seed's minibatch, a step of its own as likely as a recorded one."""
        rows = []
        for steps, g in zip(self.steps, generators):
            share = torch.rand(args.batch_size, generator=g, device=g.device, dtype=torch.float64)
            rows.append(steps[(share * len(steps)).long()])
        return torch.stack(rows)

    def play(self, team, generators):
        """A round of games, from recorded states or, where a game takes none, as it begins."""
        (S, E), policies, M = self.shape, team.modules, len(self.starts)
        draw = torch.Tensor.exponential_ if policies.discrete else torch.Tensor.normal_
        chosen = [torch.randint(M, (E,), generator=g, device=g.device) for g in generators]
        starts = self.starts[torch.cat(chosen)]  # (S E, D)
        if hasattr(self.game, "set_state"):
            self.game.reset = lambda seed: self.game.set_state(starts)

        def act(obs, info, memory):
            avail = info.get("avail_actions")
            avail = avail if avail is None else avail.unflatten(0, (S, E))
            clocks = torch.empty(S, policies.N, E, policies.A, device=obs.device)
            for mine, generator in zip(clocks, generators):
                draw(mine, generator=generator)
            action, _ = team.act(obs.unflatten(0, (S, E)), avail, None, clocks)
            return action.flatten(0, 1), None

        self.add(play(self.game, act, film=True).film)

    def add(self, film):
        """Lay what happened behind the rows that are taken."""
        self.films.append(film)
        played = Dataset(**film)
        new = self.see(layout.rows(played))
        order = layout.age(played.lengths)[0][new.steps].argsort(stable=True)  # by time
        steps = new.steps[order]
        seed = layout.episodes(played.lengths)[steps] // self.shape[1]
        for s, own in enumerate(self.steps):
            self.steps[s] = torch.cat([own, steps[seed == s] + self.end])
        begin, self.end = self.end, self.end + len(new.obs)
        for x, y in zip(self.data[:-1], new):
            if x is not None:
                x[begin : self.end] = y

    def state_dict(self):
        return {"films": self.films}

    def load_state_dict(self, state):
        for film in state["films"]:
            self.add(film)


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("iql", args)
    dataset = run.load()
    data, encode, see = arrange(dataset, args)
    team = Team(data, args, run.streams(0, "cpu")).to(run.device)
    adam, generators = optimizer(team, args), run.streams(1)
    parts = dict(team=team, adam=adam, generators=generators)
    more = round(args.finetune * args.steps)
    if more:
        practice = parts["practice"] = Practice(dataset, data, see, args, more)
        data = practice.data
    learn = run.compile(update)
    run.begin(**parts)
    players = player(team.policies, encode)
    for step in run.steps(players, args.steps + more):
        tuned = step - args.steps  # updates of fine-tuning so far
        share = step / args.steps if tuned < 0 else tuned / more
        adam.param_groups[0]["lr"] = args.lr * (1 - share)
        if tuned >= 0 and tuned % 10 == 0:
            practice.play(players, generators)
        draw = draw_rows if tuned < 0 else practice.draw
        run.logs = learn(team, adam, data, draw(generators, data, args), args)
    names = {"central": "IQL", "mixed": "MAIQL", "independent": "independent IQL"}
    return run.finish(names[args.team] + "-ft" * (more > 0), players)


def parse(argv=None):
    """Read the command line; where no flag speaks, the preset's values or a resumed run's hold."""
    zero = "seed episodes eval_episodes layers gamma temperature finetune"
    most = "gamma tau expectile"
    args = read_args(Args, PRESETS, argv, __doc__, may_be_zero=zero, at_most_one=most)
    if args.finetune and args.env not in ("matrix", "polynomial", "reacher", "ant"):
        raise ValueError("--finetune is for matrix, polynomial, reacher or ant")
    return args


if __name__ == "__main__":
    launch(main, parse)
