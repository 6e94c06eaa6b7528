"""OMAR for discrete actions (Pan et al., ICML 2022), in the form that CFCQL and InSPO compare with.

Without its search (--omar 0) it is independent actor-critic with CQL.

The problem. A team of N agents learns from a fixed dataset. Each agent learns by itself: it has critics of its own
actions and a policy, and conservative Q-learning (CQL) keeps the critics low where nothing was recorded.

The idea. Gradient steps up a conservative critic get stuck: its surface is full of small hills. So the policy is also
drawn towards the best action that a search over the critic finds. With a finite number of actions the search is an
argmax, and what is left of OMAR is a regression of the policy on it, mixed with the usual policy gradient. Critics do
not see what the others do, so agent i's value of an action is its mean over what they did in the data. Where the data
hold several conventions, this mean can favour the action that goes with none of them: on XOR (aa-ab-ba) B is worth 1 to
each agent and A a half, both play B, and that is worth 0. No search over such a critic can help.

Equations, by numbers of our own. h_i is what agent i saw and did so far; each agent has two critics q_ic(s, o_i, .); a
prime marks slowly moving copies; m_t is 0 where the game ended by its own rules.
 1 target     G_t      = r_t + gamma m_t [ (1 - lambda) Q'_{t+1} + lambda G_{t+1} ]     in the last step [ ] is Q'_{t+1}
              Q'_t     = q'_ic(s_t, o_i, a*),   a* = argmax pi_i(.|h_i);     y_i = the smaller G of the two critics
 2 critics    L(q_ic)  = E [ (q_ic(a_i) - y_i)^2 + cql ( log sum_a exp q_ic(a) - q_ic(a_i) ) ]
 3 advantage  A_i      = q_i1(a_i) - sum_a pi_i(a|h_i) q_i1(a)
 4 policy     L(pi_i)  = (1 - omar) E [ -A_i log (pi_i(a_i|h_i) + 1e-5) ]
                        + omar E mean_a [ pi_i(a|h_i) - 1(a is argmax q_i1) ]^2

Commands, and the return you should see (last policy, greedy; one CPU core of a small server, torch 2.13):
  python algorithms/omar.py                           XOR, data aa-ab-ba, 10 seeds at once, 10 s: 0 in 10 of 10 seeds,
      both play B; --dataset ab 1; ab-ba 0.6 +- 0.16 and all 0.7 +- 0.15: each agent tosses a coin (sampled 0.5)
  python algorithms/omar.py --env matrix --task m-ne  10 s: 5, the data's local optimum, in 10 of 10 seeds (the best:
      20); --dataset balanced 20 in 10 of 10
  python algorithms/omar.py --env bridge              Bridge, mixed data, 5 seeds, 22 s: -15.5 in 5 of 5, as they block
      each other (the data -9.31, the best possible -1.2355); optimal data: sampled -1.94 +- 0.03, greedy -10.3 +- 3.7
  python algorithms/omar.py --env smac                5m_vs_6m, medium-replay data, 3 seeds, 3 min: no battle won
      (return 7.3; the data 9 % and 7.8; cloning 43 %); --dataset expert 65 % (sampled 53 %, the data 90 %);
      but --task 2s3z 97 % in five seeds (sampled 93 %; the data 9 %), --omar 0 96 % in two (sampled 89 %)

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, omar
  S, N, A, M = 2, 3, 4, 500                                        # seeds, agents, actions, steps of one long episode
  obs, state, action = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6), torch.randint(A, (M + 1, N))
  reward, none = (action == obs[..., :A].argmax(-1)).float().mean(1), torch.zeros(M + 1)
  row = torch.arange(M + 1)                                        # sequences of 3 rows: 2 steps, and what comes then
  data = omar.Data(obs, state, torch.ones(M + 1, N, A).bool(), action, reward, none, (row < M).float(), row == 0,
                   row.view(-1, 3))
  args = omar.Args(num_seeds=S)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = omar.Team(data, args, generators)
  adams = omar.optimizers(team, args)
  for step in range(200):
      logs = omar.update(team, adams, data, omar.draw_rows(generators, data, args), args)

Differences from the authors' code (that of CFCQL's repository), and choices made here:
  1. Each agent has networks of its own; the authors' agents share one of each kind, told which agent it is.
  2. Both critics have layers of their own; theirs use the first one's last layers twice.
  3. Actions that are not available enter neither the logarithm of Eq. 2 nor an argmax, and have no share in pi_i. In
     theirs they enter both, so that a policy may be drawn towards what it cannot do, and pi_i does not add up to 1.
  4. One step of the critics goes with one of the policies; theirs make one for every time step of the minibatch.
  5. a* is the policy's own choice; theirs is that of a copy. Copies of critics move a little in each update; theirs all
     jump every 200 episodes.
  6. An episode that was cut goes on to be worth Q' after its last step. In the authors' code that holds only for those
     as long as the longest of the minibatch. What is padding enters no mean.
  7. Critics are plain networks of two layers without a dueling head. Eq. 4 takes the critic before its step.
  8. In battles policies are GRUs that see their agent's last action too (--recurrent); elsewhere, and in the critics,
     there is no memory. Views are in units of the data's mean and spread, or one-hot (Bridge's cells), or as they are
     (battles). Step sizes fall linearly to 0.
  9. For continuous actions OMAR is another method, with a search by samples: see td3_bc.py.

A minibatch consists of whole episodes, laid end to end in sequences of one length: Eq. 1 looks ahead. Seeds differ in
all that is random here, and are evaluated in one environment.

Shapes: S seeds, N agents, Q = S N networks, L rows of a sequence, B sequences of a minibatch, R rows (observations),
A actions, H of a memory, E games, O observation, I inputs, D state.
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

ILLEGAL = -1e10  # the value of an action that is not available


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "matrix"  # the environment: matrix, bridge, smac, or module:factory
    task: str = ""  # its task; by default XOR, or the environment's first
    dataset: str = "aa-ab-ba"  # a dataset's name, or the path of a file
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of the agents' rewards, in an environment that is not ours
    # --- the run
    seed: int = 0  # the first seed
    num_seeds: int = 10  # how many seeds train, all at once
    steps: int = 1000  # updates, one minibatch each
    eval_every: int = 250  # updates between evaluations; each writes a checkpoint
    eval_episodes: int = 10  # games per seed and evaluation; 0 to train without an environment
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 1  # CPU threads
    compile: bool = torch.cuda.is_available()  # compile updates with torch.compile
    out_dir: str = ""  # the run's folder; by default a new one in runs/omar
    resume: bool = False  # go on with the run in --out-dir
    track: bool = False  # also log to Weights & Biases
    # --- the method
    omar: float = 0.5  # share of the regression in the policy's loss; 0: actor-critic with CQL
    cql: float = 0.1  # weight of the conservative term
    td_lambda: float = 0.6  # how far the targets look ahead: 0 one step, 1 to the end
    gamma: float = 0.99  # discount
    # --- the optimisation
    normalize: bool = True  # views in units of the data's mean and spread
    one_hot: bool = False  # feed whole numbers as one-hot values (the cells of a grid)
    recurrent: bool = False  # policies with a memory (GRU) that see their agent's last action too
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    sequences: int = 64  # sequences of whole episodes per update
    lr: float = 1e-3  # Adam's step size, which falls linearly to 0
    tau: float = 0.01  # how far a target network moves in an update
    max_grad_norm: float = 10.0  # longest gradient of one seed's agents


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, one for each observation: episodes end to end, and at last one row of padding.

    In an episode's last row, and in the padding, no step begins: there `acted` is 0, and what belongs to a step too.
    """

    obs: torch.Tensor  # (R, N, I) what the agents see; with a memory their last action belongs to it
    state: torch.Tensor  # (R, D) what the critics see too
    avail: torch.Tensor  # (R, N, A) bool, the available actions
    action: torch.Tensor  # (R, N) int64, of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    acted: torch.Tensor  # (R,) 1 where there is a step
    first: torch.Tensor  # (R,) bool: an episode begins
    sequences: torch.Tensor  # (M, L) row numbers: whole episodes end to end, padded


def draw_rows(generators, data, args):
    """A minibatch of sequences for each seed, with replacement, from its own generator: row numbers (S, L, B)."""
    M, B = len(data.sequences), args.sequences
    return data.sequences[torch.stack([torch.randint(M, (B,), generator=g, device=g.device) for g in generators])].mT


# ---------------------------------------------------------------- networks
class Linear(nn.Module):
    """Q independent linear layers as one batched product; each is initialised by its own seed's generator."""

    def __init__(self, inputs, outputs, generators):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in of a 3-d weight
        start = [torch.empty(inputs + 1, outputs).uniform_(-bound, bound, generator=g) for g in generators]
        self.weight = nn.Parameter(torch.stack(start)[:, :-1].clone())  # (Q, in, out)
        self.bias = nn.Parameter(torch.stack(start)[:, -1:].clone())  # (Q, 1, out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (Q, B, out)


def mlp(inputs, outputs, args, generators):
    """A ReLU network for each generator: (Q, B, inputs) -> (Q, B, outputs)."""
    sizes = [inputs] + [args.hidden] * args.layers
    body = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o, generators), nn.ReLU())]
    return nn.Sequential(*body, Linear(sizes[-1], outputs, generators))


class GRU(nn.Module):
    """Q independent gated recurrent units with the weights' layout and equations of nn.GRU, as batched products."""

    def __init__(self, inputs, hidden, generators):
        super().__init__()
        bound = hidden**-0.5
        start = [torch.empty(inputs + hidden + 2, 3 * hidden).uniform_(-bound, bound, generator=g) for g in generators]
        split = torch.stack(start).split([inputs, hidden, 1, 1], 1)  # columns: reset, update, new
        self.input, self.state, self.input_bias, self.state_bias = (nn.Parameter(part.clone()) for part in split)

    def forward(self, x, first, h):
        """Run over sequences x (Q, L, B, I) from h (Q, B, H), forgetting where first (Q, L, B): (Q, L, B, H)."""
        Q, L, B, _ = x.shape
        sizes, states = [2 * h.shape[-1], h.shape[-1]], []  # reset and update; new
        gates = torch.baddbmm(self.input_bias, x.flatten(1, 2), self.input).view(Q, L, B, -1).split(sizes, -1)
        keep = (~first)[..., None].to(x.dtype)
        for gate, new, kept in zip(*(each.unbind(1) for each in (*gates, keep))):
            h = h * kept
            past, past_new = torch.baddbmm(self.state_bias, h, self.state).split(sizes, -1)  # (Q, B, 2H), (Q, B, H)
            reset, update = (gate + past).sigmoid().chunk(2, -1)
            h = torch.lerp((new + reset * past_new).tanh(), h, update)
            states.append(h)
        return torch.stack(states, 1)


class Policies(nn.Module):
    """A policy for each agent of S teams, along sequences of what it sees."""

    def __init__(self, data, args, generators):
        super().__init__()
        (_, self.N, I), self.A, self.S = data.obs.shape, data.avail.shape[-1], len(generators)
        each = [g for g in generators for _ in range(self.N)]
        self.hidden = args.hidden if args.recurrent else 0
        if args.recurrent:  # it remembers what it saw and did: no single observation shows the whole battle
            self.encoder = nn.Sequential(Linear(I, args.hidden, each), nn.ReLU())
            self.gru, self.head = GRU(args.hidden, args.hidden, each), Linear(args.hidden, self.A, each)
        else:
            self.body = mlp(I, self.A, args, each)

    def forward(self, obs, avail, first, h):
        """Views (S, L, B, N, I), available actions (S, L, B, N, A), where an episode begins (S, L, B), and memories
        (S, N, B, H) -> log-probabilities of all actions (S, L, B, N, A), and the last memories."""
        S, L, B, N, _ = obs.shape
        x = obs.movedim(3, 1).flatten(0, 1).flatten(1, 2)  # (Q, L B, I)
        if self.hidden:
            first = first[:, None].expand(-1, N, -1, -1).flatten(0, 1)
            states = self.gru(self.encoder(x).view(S * N, L, B, -1), first, h.flatten(0, 1))  # (Q, L, B, H)
            x, h = states.flatten(1, 2), states[:, -1].unflatten(0, (S, N))
        logits = self.head(x) if self.hidden else self.body(x)
        logits = logits.view(S, N, L, B, -1).movedim(1, 3)
        return F.log_softmax(logits.masked_fill(~avail, ILLEGAL), -1), h


class Team(nn.Module):
    """Everything that S teams learn."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.policies = Policies(data, args, generators)
        (_, N, I), D, A = data.obs.shape, data.state.shape[1], self.policies.A
        each = [g for g in generators for _ in range(N)]
        self.critics = nn.ModuleList(mlp(D + I, A, args, each) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)


def unroll(policies, data, rows):
    """log pi_i of all agents and actions along the sequences `rows` (S, L, B): (S, L, B, N, A)."""
    h = data.obs.new_zeros(policies.S, policies.N, rows.shape[-1], policies.hidden)
    return policies(data.obs[rows], data.avail[rows], data.first[rows], h)[0]


def values(critics, data, rows):
    """What both critics of all agents say of all actions in the rows (S, L, B): (S, L, B, N, 2, A)."""
    obs = data.obs[rows]  # (S, L, B, N, I)
    S, L, B, N, _ = obs.shape
    state = data.state[rows][..., None, :].expand(-1, -1, -1, N, -1)
    x = torch.cat([state, obs], -1).movedim(3, 1).flatten(0, 1).flatten(1, 2)  # (Q, L B, D + I)
    return torch.stack([critic(x).view(S, N, L, B, -1) for critic in critics], 4).movedim(1, 3)


def chosen(values, action):
    """The entries of the actions taken: (..., A), (...) -> (...)."""
    return values.gather(-1, action[..., None])[..., 0]


# ---------------------------------------------------------------- losses
@torch.no_grad()
def td_lambda(reward, done, acted, value, gamma, lam):
    """The G_t of Eq. 1 for the steps that begin in all rows but the last of sequences, (S, L - 1, B, ...), from `value`
    (S, L, B, ...) and what can be broadcast to it.

    Where no step begins, which is so in an episode's last row, what is still to come is worth what `value` says.
    """
    found, later = [], value[:, -1]
    for t in reversed(range(value.shape[1] - 1)):
        ahead = (1 - lam) * value[:, t + 1] + lam * later
        step = reward[:, t] + gamma * (1 - done[:, t]) * ahead
        found.append(step)
        later = torch.where(acted[:, t] > 0, step, value[:, t])
    return torch.stack(found[::-1], 1)


def critic_loss(q, y, action, avail, cql):
    """Eq. 2 for each step, (S, L, B), summed over agents and critics: q (S, L, B, N, 2, A), y and actions (S, L, B, N),
    available actions (S, L, B, N, A)."""
    taken = chosen(q, action[..., None].expand(q.shape[:-1]))  # (S, L, B, N, 2)
    gap = q.masked_fill(~avail[..., None, :], ILLEGAL).logsumexp(-1) - taken
    return ((taken - y[..., None]) ** 2 + cql * gap).sum((-2, -1))


def policy_loss(log_pi, q, action, avail, omar):
    """Eq. 4 for each step, (S, L, B), summed over agents: log_pi and the first critics' q (S, L, B, N, A)."""
    pi = log_pi.exp()
    advantage = (chosen(q, action) - (pi * q).sum(-1)).detach()  # Eq. 3
    best = F.one_hot(q.masked_fill(~avail, ILLEGAL).argmax(-1), q.shape[-1])
    away = ((pi - best) ** 2).mean(-1)
    log_taken = (chosen(pi, action) + 1e-5).log()  # bounded, as a negative advantage pushes it down without an end
    return ((omar - 1) * advantage * log_taken + omar * away).sum(-1)


def losses(team, data, rows, args):
    """Eqs. 2 and 4 for each seed, (S,) each, on the sequences `rows` (S, L, B)."""
    now = rows[:, :-1]
    action, avail, acted = data.action[now], data.avail[now], data.acted[now]
    log_pi, q = unroll(team.policies, data, rows), values(team.critics, data, now)
    with torch.no_grad():
        best = log_pi.argmax(-1)[..., None].expand(-1, -1, -1, -1, 2)  # a* for both critics
        value = chosen(values(team.targets, data, rows), best)  # (S, L, B, N, 2)
        step = (each[rows][..., None, None] for each in (data.reward, data.done, data.acted))
        y = td_lambda(*step, value, args.gamma, args.td_lambda).amin(-1)  # Eq. 1: (S, L - 1, B, N)
    critics = critic_loss(q, y, action, avail, args.cql)
    policies = policy_loss(log_pi[:, :-1], q[..., 0, :].detach(), action, avail, args.omar)
    share = acted / acted.sum((1, 2), keepdim=True)  # no padding
    return (share * critics).sum((1, 2)), (share * policies).sum((1, 2))


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
    """Adam for the critics and for the policies."""
    return {name: Adam(getattr(team, name).parameters(), args.lr) for name in ("critics", "policies")}


def update(team, adams, data, rows, args):
    """One update of all networks of all seeds, on the sequences `rows` (S, L, B); returns diagnostics, (S,) tensors."""
    q_loss, pi_loss = losses(team, data, rows, args)
    descend(adams["critics"], q_loss, args)
    descend(adams["policies"], pi_loss, args)
    with torch.no_grad():
        torch._foreach_lerp_(list(team.targets.parameters()), list(team.critics.parameters()), args.tau)
    return {"policy_loss": pi_loss.detach(), "q_loss": q_loss.detach()}


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "runs.py").exists() and (HOME / "envs" / "play.py").exists():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    import data as datasets
    import envs
    from data import layout, runs
elif __name__ == "__main__":
    sys.exit("error: this file runs inside its repository, beside data/ and envs/; alone, it is to be imported")


def preset(args):
    """What differs from XOR's values, above, in the other environments."""
    env, first = args.env, {"matrix": "xor", "smac": "5m_vs_6m"}
    task = args.task or first.get(env) or envs.TASKS.get(env, ("",))[0]
    small = dict(normalize=False, num_seeds=3, steps=2000, eval_every=500, eval_episodes=32, cql=1.0)
    values = {"bridge": small | dict(dataset="mixed", num_seeds=5, one_hot=True, sequences=4)}
    if env == "matrix":
        values[env] = dict(dataset="aa-ab-ba" if task == "xor" else datasets.names("matrix", task)[-1])
    if env == "smac":
        count = max(2, 560 // envs.make(env, task).time_limit)  # so that a minibatch holds some 500 steps
        values[env] = small | dict(dataset="medium-replay", recurrent=True, sequences=count, cql=5.0)
    return values.get(env, small | dict(normalize=True, dataset="", sequences=8)) | dict(env=env, task=task)


def arrange(dataset, args):
    """The dataset as `Data`, and the function that makes the policies' inputs of what a game shows: `layout.teams`.
    Raises ValueError for continuous actions."""
    if dataset.avail_actions is None:
        raise ValueError("this form of OMAR is for discrete actions, and these are continuous: see td3_bc.py")
    tensors, encode = layout.teams(dataset, args)
    return Data(*tensors), encode


def player(policies, encode):
    """The teams of all seeds as they play: a `data.team.Player`."""

    def think(x, avail, h):
        goes_on = torch.zeros(len(x), 1, x.shape[1], dtype=torch.bool, device=x.device)
        log_pi, h = policies(x[:, None], avail[:, None], goes_on, h.transpose(1, 2))
        return log_pi[:, 0], h.transpose(1, 2)

    return runs.Player(think, encode, policies.N, policies.A, policies.hidden)


def evaluate(policies, encode, args, step, episodes, device):
    """Scores (S, E) of the teams of all seeds, greedily and by sampling: `runs.score`."""
    teams = player(policies, encode)
    return runs.score(teams, args, step, episodes, device, teams.memory, teams.clocks)


def main(args):
    """Train, evaluate and fill the run folder; returns what summary.json holds."""
    run = runs.Run("omar", args)
    device = run.device
    dataset = run.load(episodes=args.episodes)
    data, encode = arrange(dataset, args)
    team = Team(data, args, [runs.stream(seed, 0) for seed in run.seeds]).to(device)
    adams, generators = optimizers(team, args), [runs.stream(seed, 1, device) for seed in run.seeds]
    learn, policies = run.compile(update), team.policies
    logs = dict.fromkeys(("policy_loss", "q_loss"), torch.full((args.num_seeds,), math.nan))
    run.begin(team=team, adams=adams, generators=generators)

    for step in run.steps(args.steps, args.eval_every):
        if run.due(logs):
            scores = evaluate(policies, encode, args, step, args.eval_episodes, device)
            run.record(logs, {name: x.mean(1) for name, x in scores.items()})
        if step < args.steps:
            for adam in adams.values():
                adam.lr.fill_(args.lr * (1 - step / args.steps))
            logs = learn(team, adams, data, draw_rows(generators, data, args), args)

    scores = evaluate(policies, encode, args, args.steps, 10 * args.eval_episodes, device)
    teams = player(policies, encode)
    run.keep_team(teams, dataset.obs.shape[2:], policies.A, teams.memory, policies)
    return run.finish("OMAR" if args.omar else "independent actor-critic with CQL", scores, dataset, run.best)


def parse(argv=None):
    """Read the command line; where no flag speaks, the environment's own values or those of the resumed run hold."""
    kinds = "this form of OMAR is for discrete actions (for others, see td3_bc.py)"
    args = runs.parse(Args, preset, argv, __doc__, kinds, ("bridge", "matrix", "smac"))
    zero = "seed episodes eval_episodes layers omar cql td_lambda gamma"
    runs.check_numbers(args, may_be_zero=zero, at_most_one="omar td_lambda gamma tau")
    return args


if __name__ == "__main__":
    runs.launch(main, parse)
