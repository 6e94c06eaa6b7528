"""OMAR for discrete actions (Pan et al., ICML 2022), as CFCQL and InSPO compare with it.

Without its search (--omar 0) it is an independent actor-critic with CQL.

The problem. A team of N agents learns from a fixed dataset. Each agent learns by itself:
it has a policy, and critics of its own actions. Conservative Q-learning (CQL) keeps the
critics low where nothing was recorded.

The idea. Gradient steps up a conservative critic get stuck, as its surface is full of
small hills. So the policy is also drawn towards the best action that a search over the
critic finds. With a finite number of actions the search is an argmax, and OMAR is a
regression of the policy on it, mixed with the usual policy gradient. Critics do not see
what the others do. So agent i's value of an action is its mean over what they did in the
data. Where the data hold several conventions, this mean can favour the action that goes
with none of them. On XOR (aa-ab-ba) B is worth 1 to each agent and A a half, both play B,
and that is worth 0. No search over such a critic can help.

Equations, by numbers of our own. h_i is what agent i saw and did so far. Each agent has
two critics q_ic(s, o_i, .). A prime marks slowly moving copies. m_t is 0 where the game
ended by its own rules; in an episode's last step [ ] is Q'_{t+1}.
 1 target     G_t     = r_t + gamma m_t [ (1 - lambda) Q'_{t+1} + lambda G_{t+1} ]
              Q'_t    = q'_ic(s_t, o_i, a*),  a* = argmax_a pi_i(a|h_i)
              y_i     = the smaller G of the two critics
 2 critics    L(q_ic) = E [ (q_ic(a_i) - y_i)^2
                            + cql ( log sum_a exp q_ic(a) - q_ic(a_i) ) ]
 3 advantage  A_i     = q_i1(a_i) - sum_a pi_i(a|h_i) q_i1(a)
 4 policy     L(pi_i) = (1 - omar) E [ -A_i log (pi_i(a_i|h_i) + 1e-5) ]
                        + omar E mean_a [ pi_i(a|h_i) - 1(a is argmax q_i1) ]^2

Commands, and the return you should see (last policy, greedy; one CPU core, torch 2.13):
  python algorithms/omar.py
      XOR, data aa-ab-ba, 10 seeds, 10 s: 0 in all, both play B; --dataset ab 1;
      ab-ba 0.6 +- 0.16 and all 0.7 +- 0.15, as each agent tosses a coin (sampled 0.5)
  python algorithms/omar.py --env matrix --task m-ne
      10 s: 5, the data's local optimum, in 10 of 10 seeds; --dataset balanced 20, the best
  python algorithms/omar.py --env bridge
      mixed data, 5 seeds, 22 s: -15.5 in all, as the agents block each other (the data
      -9.31, the best -1.2355); --dataset optimal sampled -1.94 +- 0.03, greedy -10.3 +- 3.7
  python algorithms/omar.py --env smac
      5m_vs_6m, medium-replay data, 3 seeds, 3 min: no battle won (return 7.3; cloning
      43 %, the data 9 %); --dataset expert 65 %, sampled 53 % (the data 90 %);
      --task 2s3z 97 % in five seeds, sampled 93 % (--omar 0 96 % and 89 % in two)

In your own loop (this file alone will do; `Data` says what the tensors are):
  import torch, omar
  S, N, A, M = 2, 3, 4, 500           # seeds, agents, actions, steps of one long episode
  obs, state = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6)
  avail, action = torch.ones(M + 1, N, A).bool(), torch.randint(A, (M + 1, N))
  reward = (action == obs[..., :A].argmax(-1)).float().mean(1)
  row, done = torch.arange(M + 1), torch.zeros(M + 1)
  acted, first = (row < M).float(), row == 0
  sequences = row.view(-1, 3)         # of 3 rows: 2 steps, and what comes then
  data = omar.Data(obs, state, avail, action, reward, done, acted, first, sequences)
  args = omar.Args(num_seeds=S)
  generators = [torch.Generator().manual_seed(seed) for seed in range(S)]
  team = omar.Team(data, args, generators)
  adam = torch.optim.Adam(team.parameters(), args.lr, fused=True)
  for step in range(200):
      rows = omar.draw_rows(generators, data, args)
      logs = omar.update(team, adam, data, rows, args)

Differences from the authors' code (in CFCQL's repository), and choices made here:
  1. Each agent has networks of its own. Their agents share one and know who they are.
  2. Both critics have layers of their own. Theirs use the first one's last layers twice.
  3. Actions that are not available enter neither the logarithm of Eq. 2 nor an argmax,
     and have no share in pi_i. In theirs they enter both: a policy may be drawn towards
     what it cannot do, and pi_i does not add up to 1.
  4. One step of the critics goes with one of the policies. Theirs make one for every
     time step of the minibatch.
  5. a* is the policy's own choice. Theirs is that of a copy.
  6. Target networks move a little in each update. Theirs jump every 200 episodes of a
     counter that grows by 8 an update, which is every 25 updates.
  7. An episode that was cut goes on to be worth Q' after its last step. In their code
     this holds for the longest of a minibatch only. Padding enters no mean.
  8. Critics are plain networks, as wide as the policies: two layers of 64 units. Theirs
     have 256 and a dueling head. Eq. 4 takes the critic before its step.
  9. In battles policies are GRUs that see their agent's last action, as theirs.
     Elsewhere they have no memory, and critics have none. Inputs are in units of the
     data's mean and spread, or one-hot (Bridge's cells), or as they are (battles).
 10. A minibatch of battles holds some 500 steps, theirs 128 episodes. Training ends
     after 2,000 updates, theirs after 10 million steps. Adam's step sizes fall to 0.
 11. cql is 5 in battles, as theirs, 1 on Bridge and 0.1 in matrix games.
 12. For continuous actions OMAR searches by samples: see td3_bc.py.

A minibatch consists of whole episodes, laid end to end in sequences of one length, as
Eq. 1 looks ahead. Seeds differ in all that is random here, and are evaluated in one
environment.

Shapes: S seeds, N agents, Q = S N networks, M sequences of the data, L rows of one,
B sequences of a minibatch, C critics, R rows (observations), A actions, H of a memory,
I inputs, D state.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

ILLEGAL = -1e10  # of an action that is not available; finite, as 0 times it must be 0


# ---------------------------------------------------------------- arguments
@dataclass
class Args:
    # --- what to learn
    env: str = "matrix"  # the environment: matrix, bridge, smac, or module:factory
    task: str = ""  # its task; by default the environment's usual one
    dataset: str = ""  # a dataset's name, or the path of a file; by default the usual one
    episodes: int = 0  # how many episodes a named dataset has; 0 for its default
    env_kwargs: str = ""  # more for the environment, as JSON
    team_reward: Literal["sum", "mean"] = "sum"  # of agents' rewards, in a game not ours
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
    recurrent: bool = False  # a memory (GRU) that sees the last action too
    hidden: int = 64  # units per hidden layer
    layers: int = 2  # hidden layers
    sequences: int = 64  # sequences of whole episodes per update
    lr: float = 1e-3  # Adam's step size, which falls linearly to 0
    tau: float = 0.01  # how far a target network moves in an update
    max_grad_norm: float = 10.0  # longest gradient of one seed's agents


GAME = dict(
    normalize=False,
    num_seeds=3,
    steps=2000,
    eval_every=500,
    eval_episodes=32,
    cql=1.0,
)
BATTLE = dict(
    task="5m_vs_6m",
    recurrent=True,
    cql=5.0,
    sequences=3,  # some 500 steps, if battles last to the end
)
PRESETS = {  # what differs from the values above; "" is a game that is not ours
    "matrix xor": dict(dataset="aa-ab-ba"),
    "bridge": GAME | dict(num_seeds=5, one_hot=True, sequences=4),
    "smac": GAME | BATTLE,
    "smac 3m": dict(sequences=9),
    "smac 5m_vs_6m": dict(sequences=8),
    "smac 8m": dict(sequences=4),
    "smac 2s3z": dict(sequences=4),
    "smac 3s_vs_5z": dict(sequences=2),
    "": GAME | dict(normalize=True, sequences=8),
}


# ---------------------------------------------------------------- data
class Data(NamedTuple):
    """The dataset as R rows, an observation each: episodes end to end, then padding.

    No step begins in an episode's last row and in the padding. All of a step is 0 there.
    """

    obs: torch.Tensor  # (R, N, I) what agents see; with a memory their last action behind it
    state: torch.Tensor  # (R, D) what the critics see too
    avail: torch.Tensor  # (R, N, A) bool, the available actions
    action: torch.Tensor  # (R, N) int64, of the step that begins in a row
    reward: torch.Tensor  # (R,)
    done: torch.Tensor  # (R,) 1 where the game ended by its own rules with this step
    acted: torch.Tensor  # (R,) 1 where a step begins
    first: torch.Tensor  # (R,) bool: an episode begins, or it is padding
    sequences: torch.Tensor  # (M, L) row numbers: whole episodes end to end, padded


def draw_rows(generators, data, args):
    """Sequences for each seed, drawn with replacement: row numbers (S, L, B)."""
    M, B = len(data.sequences), args.sequences
    drawn = [torch.randint(M, (B,), generator=g, device=g.device) for g in generators]
    return data.sequences[torch.stack(drawn)].mT


# ---------------------------------------------------------------- networks
def initial(rows, columns, bound, generators):
    """Numbers within the bound, (Q, rows, columns), of each network's own generator."""
    start = torch.empty(rows, columns)
    drawn = [start.uniform_(-bound, bound, generator=g).clone() for g in generators]
    return torch.stack(drawn)


class Linear(nn.Module):
    """Q independent linear layers as one batched product."""

    def __init__(self, inputs, outputs, generators):
        super().__init__()
        bound = inputs**-0.5  # as in nn.Linear; nn.init would misread the fan-in
        start = initial(inputs + 1, outputs, bound, generators)
        self.weight = nn.Parameter(start[:, :-1].clone())  # (Q, in, out)
        self.bias = nn.Parameter(start[:, -1:].clone())  # (Q, 1, out)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (Q, B, out)


def mlp(inputs, outputs, args, generators):
    """A ReLU network for each generator: (Q, B, inputs) -> (Q, B, outputs)."""
    layers = []
    for _ in range(args.layers):
        layers += [Linear(inputs, args.hidden, generators), nn.ReLU()]
        inputs = args.hidden
    return nn.Sequential(*layers, Linear(inputs, outputs, generators))


class GRU(nn.Module):
    """Q independent gated recurrent units with the equations of nn.GRU."""

    def __init__(self, inputs, hidden, generators):
        super().__init__()
        start = initial(inputs + hidden + 2, 3 * hidden, hidden**-0.5, generators)
        parts = start.split([inputs, hidden, 1, 1], 1)  # columns: reset, update, new
        parts = [nn.Parameter(part.clone()) for part in parts]
        self.input, self.state, self.input_bias, self.state_bias = parts

    def forward(self, x, first, h):
        """The states (Q, L, B, H) along x (Q, L, B, I) from h (Q, B, H).

        It forgets everything where an episode begins, first (Q, L, B) bool.
        """
        H = h.shape[-1]
        gates = torch.baddbmm(self.input_bias, x.flatten(1, 2), self.input)
        gates, news = gates.view(*first.shape, 3 * H).split([2 * H, H], -1)
        steps = zip(gates.unbind(1), news.unbind(1), first[..., None].unbind(1))
        states = []
        for gate, new, begins in steps:
            h = h.masked_fill(begins, 0.0)
            past = torch.baddbmm(self.state_bias, h, self.state)  # (Q, B, 3H)
            past, past_new = past.split([2 * H, H], -1)
            reset, update = (gate + past).sigmoid().chunk(2, -1)
            h = torch.lerp((new + reset * past_new).tanh(), h, update)
            states.append(h)
        return torch.stack(states, 1)


class Agents(nn.Module):
    """A network for each agent of S teams, which gives numbers for all actions."""

    def __init__(self, data, args, generators):
        super().__init__()
        _, self.N, I = data.obs.shape
        self.A, self.S = data.avail.shape[-1], len(generators)
        each = [g for g in generators for _ in range(self.N)]
        self.hidden = args.hidden if args.recurrent else 0
        if args.recurrent:  # no single observation shows the whole battle
            self.encoder = Linear(I, args.hidden, each)
            self.gru = GRU(args.hidden, args.hidden, each)
            self.head = Linear(args.hidden, self.A, each)
        else:
            self.body = mlp(I, self.A, args, each)

    def forward(self, obs, avail, first, h):
        """The numbers along sequences, (S, L, B, N, A), and the last memories.

        Args:
            obs: (S, L, B, N, I).
            avail: (S, L, B, N, A) bool; where not, the number is ILLEGAL.
            first: (S, L, B) bool, where an episode begins.
            h: (S, N, B, H), the memories before.
        """
        S, L, B, N, _ = obs.shape
        x = obs.movedim(3, 1).flatten(0, 1).flatten(1, 2)  # (Q, L B, I)
        if self.hidden:
            x = self.encoder(x).relu().view(S * N, L, B, -1)
            first = first.repeat_interleave(N, 0)  # (Q, L, B)
            states = self.gru(x, first, h.flatten(0, 1))
            h = states[:, -1].unflatten(0, (S, N))
            out = self.head(states.flatten(1, 2))
        else:
            out = self.body(x)
        out = out.view(S, N, L, B, -1).movedim(1, 3)
        return out.masked_fill(~avail, ILLEGAL), h


class Team(nn.Module):
    """Everything that S teams learn."""

    def __init__(self, data, args, generators):
        super().__init__()
        self.policies = Agents(data, args, generators)  # logits of pi_i
        each = [g for g in generators for _ in range(self.policies.N)]
        inputs = data.state.shape[1] + data.obs.shape[2]
        self.critics = nn.ModuleList(mlp(inputs, self.policies.A, args, each) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)


def unroll(agents, data, rows):
    """What the networks give along the sequences `rows` (S, L, B): (S, L, B, N, A)."""
    h = data.obs.new_zeros(agents.S, agents.N, rows.shape[-1], agents.hidden)
    return agents(data.obs[rows], data.avail[rows], data.first[rows], h)[0]


def values(critics, data, rows):
    """What the critics say of all actions in rows (S, L, B): (S, L, B, N, C, A)."""
    obs = data.obs[rows]  # (S, L, B, N, I)
    state = data.state[rows][..., None, :].expand(*obs.shape[:4], -1)
    x = torch.cat([state, obs], -1).movedim(3, 1)  # (S, N, L, B, D + I)
    flat = x.flatten(0, 1).flatten(1, 2)  # (Q, L B, D + I)
    said = [critic(flat).view(*x.shape[:4], -1) for critic in critics]
    return torch.stack(said, 4).movedim(1, 3)


def chosen(values, action):
    """The entries of the actions taken: (..., A), (...) -> (...)."""
    return values.gather(-1, action[..., None])[..., 0]


# ---------------------------------------------------------------- losses
def mean_over_steps(x, acted):
    """Each seed's mean over its steps, (S,): x and `acted` are (S, L, B)."""
    share = acted / acted.sum((1, 2), keepdim=True)
    return (share * x).sum((1, 2))


@torch.no_grad()
def td_lambda(reward, done, acted, value, gamma, lam):
    """G_t of all rows but the last: (S, L, ...) -> (S, L - 1, ...).

    In an episode's last row no step begins: what is still to come is worth `value`.
    """
    targets = []
    later = value[:, -1]
    for t in reversed(range(value.shape[1] - 1)):
        ahead = (1 - lam) * value[:, t + 1] + lam * later
        target = reward[:, t] + gamma * (1 - done[:, t]) * ahead
        targets.append(target)
        later = torch.where(acted[:, t] > 0, target, value[:, t])
    return torch.stack(targets[::-1], 1)


def critic_loss(q, y, action, avail, cql):
    """Eq. 2 for each step, (S, L, B), summed over agents and critics.

    Args:
        q: (S, L, B, N, C, A).
        y, action: (S, L, B, N).
        avail: (S, L, B, N, A) bool.
    """
    taken = chosen(q, action[..., None].expand(q.shape[:-1]))  # (S, L, B, N, 2)
    gap = q.masked_fill(~avail[..., None, :], ILLEGAL).logsumexp(-1) - taken
    return ((taken - y[..., None]) ** 2 + cql * gap).sum((-2, -1))


def policy_loss(log_pi, q, action, avail, omar):
    """Eq. 4 for each step, (S, L, B), summed over agents.

    Args:
        log_pi, avail: (S, L, B, N, A).
        q: (S, L, B, N, A), of the first critics, without gradients.
        action: (S, L, B, N).
    """
    pi = log_pi.exp()
    advantage = chosen(q, action) - (pi.detach() * q).sum(-1)  # Eq. 3
    best = F.one_hot(q.masked_fill(~avail, ILLEGAL).argmax(-1), q.shape[-1])
    away = ((pi - best) ** 2).mean(-1)
    log_taken = (chosen(pi, action) + 1e-5).log()  # bounded: A_i may be negative
    return ((omar - 1) * advantage * log_taken + omar * away).sum(-1)


@torch.no_grad()
def targets(critics, data, rows, best, args):
    """Eq. 1, (S, L - 1, B, N), where the copies rate what is `best` (S, L, B, N)."""
    q = values(critics, data, rows)  # (S, L, B, N, 2, A)
    value = chosen(q, best[..., None].expand(q.shape[:-1]))
    step = [x[rows][..., None, None] for x in (data.reward, data.done, data.acted)]
    return td_lambda(*step, value, args.gamma, args.td_lambda).amin(-1)


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


def update(team, adam, data, rows, args):
    """One update of all networks on the sequences `rows` (S, L, B); returns logs, (S,)."""
    now = rows[:, :-1]  # where a step can begin
    action, avail, acted = data.action[now], data.avail[now], data.acted[now]
    log_pi = F.log_softmax(unroll(team.policies, data, rows), -1)  # (S, L, B, N, A)
    best = log_pi.argmax(-1)  # a*, before the policies' step
    with torch.no_grad():  # the critics, before theirs
        q = values(team.critics[:1], data, now)[..., 0, :]
    loss = policy_loss(log_pi[:, :-1], q, action, avail, args.omar)
    loss = mean_over_steps(loss, acted)
    pi_loss = descend(adam, team.policies, loss, args.max_grad_norm)

    q = values(team.critics, data, now)
    y = targets(team.targets, data, rows, best, args)
    loss = mean_over_steps(critic_loss(q, y, action, avail, args.cql), acted)
    q_loss = descend(adam, team.critics, loss, args.max_grad_norm)
    with torch.no_grad():
        for slow, quick in zip(team.targets.parameters(), team.critics.parameters()):
            slow.lerp_(quick, args.tau)
    return {"policy_loss": pi_loss, "q_loss": q_loss}


# ---------------------------------------------------------------- run
HOME = Path(__file__).resolve().parents[1]
if (HOME / "data" / "run").is_dir():  # not if this file was copied alone
    sys.path.insert(0, str(HOME))
    from data import layout
    from data.run import Run, launch, read_args, remembering
elif __name__ == "__main__":
    sys.exit("error: this file runs in its repository, beside data/ and envs/; alone, import it")


def arrange(dataset, args):
    """The dataset as `Data`, and what makes inputs of observations and last actions."""
    tensors, encode = layout.teams(dataset, args)
    return Data(*tensors), encode


def player(policies, encode):
    """How the teams of all seeds play, with a memory: greedily, or by sampling."""

    def think(x, avail, h):
        """Inputs (S, B, N, I), memories (S, B, N, H) -> log pi (S, B, N, A), memories."""
        begins = avail.new_zeros(len(x), 1, x.shape[1])
        logits, h = policies(x[:, None], avail[:, None], begins, h.transpose(1, 2))
        return F.log_softmax(logits[:, 0], -1), h.transpose(1, 2)

    return remembering(think, encode, policies.N, policies.A, policies.hidden, policies)


def main(args):
    """Train, evaluate and fill the run's folder; returns what summary.json holds."""
    run = Run("omar", args)
    data, encode = arrange(run.load(discrete=True), args)
    team = Team(data, args, run.streams(0, "cpu")).to(run.device)
    adam = torch.optim.Adam(team.parameters(), args.lr, fused=True)
    generators = run.streams(1)
    learn = run.compile(update)
    run.begin(team=team, adam=adam, generators=generators)
    play = player(team.policies, encode)
    for step in run.steps(play):  # evaluates, records and keeps where it is due
        adam.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        run.logs = learn(team, adam, data, draw_rows(generators, data, args), args)
    return run.finish("OMAR" if args.omar else "independent actor-critic with CQL", play)


def parse(argv=None):
    """Read the command line; where no flag speaks, the preset's values or a resumed run's hold."""
    kinds = "this form of OMAR is for discrete actions (for others see td3_bc.py)"
    known = "bridge", "matrix", "smac"
    zero = "seed episodes eval_episodes layers omar cql td_lambda gamma"
    share = "omar td_lambda gamma tau"
    return read_args(Args, PRESETS, argv, __doc__, kinds, known, "", zero, share)


if __name__ == "__main__":
    launch(main, parse)
