"""BC: its loss against slow loops, its masks, what `moma_ppo.py --method ibc` had, and the script from outside."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import command, complains, load_script, refuses

import data
import envs
from data import layout, runs
from data.collect import record
from envs.smac import random as random_play

bc = load_script("bc")

S, N, A, M, I = 2, 3, 4, 30, 5


def generators(count=S, purpose=1):
    return [runs.stream(s, purpose) for s in range(count)]


def some_data(discrete=True):
    """M random steps; an action that was taken is available, and some others are not."""
    torch.manual_seed(0)
    if not discrete:
        return bc.Data(torch.randn(M, N, I), None, 2 * torch.rand(M, N, A) - 1)
    action, avail = torch.randint(A, (M, N)), torch.rand(M, N, A) > 0.4
    return bc.Data(torch.randn(M, N, I), avail.scatter(-1, action[..., None], True), action)


def some_policies(found, **changes):
    args = bc.Args(hidden=8, batch_size=6, num_seeds=S, **changes)
    policies = bc.Policies(found, args, generators(purpose=0))
    with torch.no_grad():
        for parameter in policies.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return args, policies


# ---------------------------------------------------------------- equations
def alone(policies, s, i):
    """The network of one agent of one seed, made of torch's own layers."""
    layers = []
    for layer in policies.body:
        if isinstance(layer, bc.Linear):
            single, q = torch.nn.Linear(*layer.weight.shape[1:]), s * N + i
            single.weight.data, single.bias.data = layer.weight[q].T, layer.bias[q, 0]
            layer = single
        layers.append(layer)
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("discrete", [True, False])
def test_the_loss_is_a_slow_loop(float64, discrete):
    found = some_data(discrete)
    args, policies = some_policies(found)
    rows = bc.draw_rows(generators(), found, args)  # (S, B)
    avail = found.avail[rows].transpose(1, 2) if discrete else None
    loss = bc.clone_loss(policies, found.obs[rows].transpose(1, 2), avail, found.action[rows].transpose(1, 2))
    assert not torch.equal(rows[0], rows[1])
    for s in range(S):
        total = 0.0
        for row in rows[s].tolist():
            for i in range(N):
                out = alone(policies, s, i)(found.obs[row, i]).detach()
                if discrete:
                    legal = [a for a in range(A) if found.avail[row, i, a]]
                    total -= math.log(math.exp(out[found.action[row, i]]) / sum(math.exp(out[a]) for a in legal))
                    continue
                for a in range(A):
                    spread = min(max(found.action[:, i, a].std(correction=0).item(), math.exp(-6)), 1)
                    log_std = min(max(math.log(spread) + out[A + a].item(), -6), 0)
                    normal = torch.distributions.Normal(out[a], torch.tensor(log_std).exp())
                    total -= normal.log_prob(found.action[row, i, a]).item()
        assert loss[s].item() == pytest.approx(total / len(rows[s]), rel=1e-10)


def test_policies_begin_as_far_apart_as_the_data_and_no_two_alike(float64):
    found = some_data(discrete=False)
    found = found._replace(action=found.action * torch.tensor([1.0, 0.1, 1e-9])[:, None])
    policies = bc.Policies(found, bc.Args(hidden=64), generators(purpose=0))
    out = policies(found.obs.transpose(0, 1).expand(S, N, M, I), None)
    wanted = found.action.std(0, correction=0).clamp(min=math.exp(-6))  # (N, A)
    assert torch.allclose(out[..., A:].mean((0, 2)).exp(), wanted, rtol=0.2)
    assert len({tuple(row) for row in policies.body[0].weight.flatten(1).tolist()}) == S * N


def test_an_unavailable_action_is_never_taken():
    found = some_data()
    _, policies = some_policies(found)
    obs, avail = found.obs.transpose(0, 1).expand(S, N, M, I), found.avail.transpose(0, 1).expand(S, N, M, A)
    out = policies(obs, avail)
    assert (out.exp()[~avail] == 0).all() and torch.allclose(out.exp().sum(-1), torch.ones(S, N, M))
    drawn = [policies.sample(out)] + [policies.sample(out, torch.empty_like(out).exponential_()) for _ in range(200)]
    assert all(avail.gather(-1, action[..., None]).all() for action in drawn)
    assert torch.equal(drawn[0], out.argmax(-1))
    share = torch.stack([torch.nn.functional.one_hot(action, A) for action in drawn[1:]]).double().mean(0)
    assert torch.allclose(share, out.exp().double(), atol=0.2) and (share - out.exp()).abs().mean() < 0.03


@pytest.mark.parametrize("discrete", [True, False])
def test_agents_learn_by_themselves(float64, discrete):
    """Without the limit on the team's gradient, what others did and saw does not matter to an agent."""
    found = some_data(discrete)
    shuffled = torch.arange(M).roll(7)
    other = bc.Data(*(x if x is None else torch.cat([x[:, :1], x[shuffled, 1:]], 1) for x in found))
    weights, start = [], dict(some_policies(found)[1].named_parameters())
    for each in (found, other):
        args, policies = some_policies(each, max_grad_norm=1e9)
        policies.load_state_dict(start, strict=False)
        adam, streams = bc.Adam(policies.parameters(), 1e-2), generators()
        for _ in range(20):
            bc.update(policies, adam, each, bc.draw_rows(streams, each, args), args)
        weights.append([p.detach().view(S, N, -1) for p in policies.parameters()])
    for one, two in zip(*weights):
        assert torch.allclose(one[:, 0], two[:, 0], atol=1e-12)
    assert not torch.allclose(weights[0][0][:, 1], weights[1][0][:, 1], atol=1e-3)


def test_a_gradient_is_cut_for_each_seed_alone(float64):
    found = some_data()
    args, policies = some_policies(found)
    moved, adam = [], bc.Adam(policies.parameters(), 0.0)
    adam.step = lambda gradients: moved.extend(gradients)
    total = sum(p.reshape(S, -1).sum(1) for p in adam.moved)  # (S,), whose gradients are all 1
    size = sum(p.numel() for p in adam.moved) / S
    bc.descend(adam, total * torch.tensor([3.0, 0.2]) / size**0.5, args)
    length = sum(g.reshape(S, -1).square().sum(1) for g in moved).sqrt()
    assert torch.allclose(length, torch.tensor([args.max_grad_norm, 0.2]))


def test_counts_are_learned():
    """Where there is nothing to see, the policy becomes how often each action was taken."""
    recorded = data.collect_dataset("matrix", "xor", "aa-ab-ba")
    args = replace(bc.parse(["--env", "matrix", "--task", "xor"]), num_seeds=S)
    found, _ = bc.arrange(recorded, args)
    policies, streams = bc.Policies(found, args, generators(purpose=0)), generators()
    adam = bc.Adam(policies.parameters(), args.lr)
    for step in range(400):
        adam.lr.fill_(args.lr * (1 - step / 400))
        bc.update(policies, adam, found, bc.draw_rows(streams, found, args), args)
    pi = policies(found.obs[:1].transpose(0, 1).expand(S, 2, 1, 1), found.avail[:1].transpose(0, 1)).exp()[:, :, 0]
    joint = recorded.joint_actions()
    for i in range(2):
        assert torch.allclose(pi[:, i], joint.sum(1 - i).expand(S, 2), atol=0.06)


# ---------------------------------------------------------------- data and play
@pytest.mark.parametrize("env, task", [("reacher", "leader-only"), ("smac", "3m"), ("bridge", "")])
def test_what_is_learned_is_what_is_played(tmp_path, env, task, monkeypatch):
    """The steps hold views, available and taken actions of the dataset, and policies see the same when they play."""
    limit = {} if env == "smac" else {"time_limit": 10}
    game, g = envs.make(env, task, 4, **limit), torch.Generator().manual_seed(0)
    if env == "reacher":
        choose = lambda *_: 2 * torch.rand(4, 2, 1, generator=g) - 1  # noqa: E731
    elif env == "smac":
        choose = lambda t, obs, info: random_play(game, info)  # noqa: E731
    else:
        choose = lambda *_: torch.randint(5, (4, 2), generator=g)  # noqa: E731
    dataset = record(game, choose, seed=0)
    dataset.info |= {"env": env, "task": task}
    data.write(dataset, tmp_path / "x.h5")
    args = bc.parse(["--env", env, "--task", task, "--dataset", str(tmp_path / "x.h5"), "--num-seeds", "2"])
    found, encode = bc.arrange(data.load(env, task, args.dataset), args)
    rows, here = layout.rows(dataset), dataset.mask
    assert len(found.obs) == here.sum() and torch.equal(found.action, dataset.actions[here])
    assert torch.equal(found.obs, encode(dataset.obs[:, :-1][here]))
    assert found.avail is None if env == "reacher" else torch.equal(found.avail, dataset.avail_actions[:, :-1][here])
    if env == "bridge":
        assert found.obs.unique().tolist() == [0, 1]
    elif env == "smac":
        assert torch.equal(found.obs, rows["obs"][rows["start"]])
    else:
        std, mean = torch.std_mean(rows["obs"], 0, correction=0)
        assert torch.allclose(found.obs, ((rows["obs"] - mean) / std.clamp(min=1e-3))[rows["start"]])

    policies, seen, game = bc.Policies(found, args, generators(purpose=0)), [], envs.make(env, task, 2 * 3, **limit)
    monkeypatch.setattr(envs, "make", lambda *_: game)
    forward = policies.forward
    policies.forward = lambda obs, avail: seen.append((obs, avail)) or forward(obs, avail)
    scores = bc.evaluate(policies, encode, args, 0, 3, torch.device("cpu"))
    first, info = envs.make().reset(seed=0)
    assert torch.equal(seen[0][0].transpose(1, 2).flatten(0, 1), encode(first))
    assert (seen[0][1] is None) == (env == "reacher")
    if env != "reacher":
        assert torch.equal(seen[0][1].transpose(1, 2).flatten(0, 1), info["avail_actions"])
    assert ("sampled_return" in scores) == (env != "reacher")
    assert env == "smac" or len(seen) <= 10 * (1 + (env == "bridge"))
    assert ("win_rate" in scores) == (env == "smac")
    assert all(x.shape == (2, 3) and x.isfinite().all() for x in scores.values())


# ---------------------------------------------------------------- the script
WORDS = "--num-seeds 2 --steps 30 --eval-every 10 --eval-episodes 2".split()


def train(folder, *words):
    return bc.main(bc.parse([*map(str, words), "--out-dir", str(folder)]))


def rows_of(folder):
    return [*csv.DictReader((folder / "metrics.csv").open())]


def test_the_coordination_game_is_what_it_was_as_a_method_of_moma_ppo(tmp_path):
    """Numbers of `moma_ppo.py --method ibc`, before it moved here."""
    words = ("--dataset", "neutral", "--num-seeds", 2, "--steps", 200, "--eval-every", 100)
    train(tmp_path / "run", *words)
    losses = [float(row["policy_loss"]) for row in rows_of(tmp_path / "run")[2:]]
    assert losses == pytest.approx([1.3898815, 1.3886348, 1.3869767, 1.3863901], abs=1e-5)


@pytest.mark.parametrize("dataset, best", [("unfavourable", 0), ("favourable", 1)])
def test_cloning_fails_where_each_agents_habit_misleads(tmp_path, dataset, best):
    summary = train(tmp_path / "a", "--num-seeds", 3, "--steps", 300, "--dataset", dataset)
    assert summary["return"]["mean"] == best and 0.2 < summary["sampled_return"]["mean"] < 0.8
    assert summary["best_return"] == 1 and summary["script"] == "bc"


def test_bridge_is_crossed_by_whoever_goes_first(tmp_path):
    """Masks are of no use there, but one-hot cells are: cloned from the optimal data, a team samples about -1.9."""
    summary = train(tmp_path / "a", "--env", "bridge", "--dataset", "optimal", "--num-seeds", 2, "--steps", 600)
    assert summary["sampled_return"]["mean"] > -4


def test_seeds_at_once_are_single_runs(tmp_path, float64):
    words = ("--env", "bridge", "--episodes", 40, *WORDS)
    train(tmp_path / "both", *words, "--seed", 3)
    for s in range(2):
        train(tmp_path / f"one{s}", *words, "--seed", 3 + s, "--num-seeds", 1)
        mine = [row for row in rows_of(tmp_path / "both") if row["seed"] == str(3 + s)]
        for one, other in zip(rows_of(tmp_path / f"one{s}"), mine, strict=True):
            assert [float(x) for x in one.values()] == pytest.approx([float(x) for x in other.values()], nan_ok=True)


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path, monkeypatch):
    words = ("--env", "reacher", "--episodes", 20, *WORDS, "--hidden", 16)
    train(tmp_path / "whole", *words)
    record_, left = runs.Run.record, [2]

    def killed(self, *what):
        record_(self, *what)
        left[0] -= 1
        if not left[0]:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(runs.Run, "record", killed)
        train(tmp_path / "broken", *words)
    assert len(rows_of(tmp_path / "broken")) == 4 and not (tmp_path / "broken" / "summary.json").exists()
    bc.main(bc.parse(["--resume", "--out-dir", str(tmp_path / "broken")]))
    assert (tmp_path / "whole" / "metrics.csv").read_text() == (tmp_path / "broken" / "metrics.csv").read_text()
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "broken"))
    for summary in (one, other):
        assert summary.pop("wall_seconds") > 0 and summary.pop("updates_per_second") > 0
    assert one == other and one["normalized_return"] is not None and "sampled_return" not in one


def test_step_sizes_fall_to_nothing(tmp_path, monkeypatch):
    used, descend = [], bc.descend
    monkeypatch.setattr(bc, "descend", lambda adam, *rest: used.append(adam.lr.item()) or descend(adam, *rest))
    train(tmp_path / "run", "--steps", 4, "--lr", 0.4, "--eval-every", 4, "--eval-episodes", 1)
    assert used == pytest.approx([0.4, 0.3, 0.2, 0.1])


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("flags, said", [
    (("--env", "chess"), "unknown environment: choose"),
    (("--task", "6x1"), "matrix has no task '6x1'"),
    (("--dataset", "best"), "choose favourable, neutral"),
    (("--dataset", "nowhere.h5"), "no dataset file nowhere.h5"),
    (("--env", "reacher", "--episodes", "2", "--one-hot"), "add --no-one-hot"),
    (("--device", "tpu"), "unknown device 'tpu'"),
    (("--lr", "nan"), "--lr must be above 0"),
    (("--resume", "--out-dir", "nowhere"), "no run to resume in nowhere"),
])  # fmt: skip
def test_bad_input_is_refused(tmp_path, flags, said):
    refuses(bc, flags, said, tmp_path / "run")


def test_step_sizes_that_diverge_end_in_one_line(tmp_path):
    words = ("--env", "reacher", "--episodes", 4, *WORDS, "--lr", 1e30, "--out-dir", tmp_path / "run")
    complains(command("algorithms/bc.py", *words), "policy_loss is not finite after 10 steps")
