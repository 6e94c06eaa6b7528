"""OMIGA, IQL and TD3+BC: losses against slow loops, exact special cases, seeds, graphs, and what the games show."""

import pytest
import torch
from conftest import command, complains, load_script, refuses

import envs
from data import layout, load

omiga, iql, td3 = (load_script(name) for name in ("omiga", "iql", "td3_bc"))
S, N, A, M, B = 2, 3, 4, 30, 8


def streams(seeds=range(S)):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def made(script, **flags):
    """A small dataset, arguments, teams of S seeds and their optimisers."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    obs, state, reward = torch.randn(M + 1, N, 5), torch.randn(M + 1, 6), torch.randn(M + 1)
    done = (torch.rand(M + 1) < 0.3).to(dtype)
    args = script.Args(hidden=8, batch_size=B, **flags)
    if script is td3:
        action = 2 * torch.rand(M + 1, N, A) - 1
        data = td3.Data(obs, state, action, reward, done, torch.arange(M), torch.tensor(0.3))
    else:
        avail = torch.rand(M + 1, N, A) < 0.8
        avail[..., 0] = True
        action = torch.multinomial(avail.flatten(0, 1).double(), 1).view(M + 1, N)
        data = script.Data(obs, state, avail, action, reward, done, torch.arange(M))
    team = script.Team(data, args, streams())
    for target in team.targets.parameters():  # so that they are not what they are copies of
        target += 0.1 * torch.randn_like(target)
    return data, args, team, script.optimizers(team, args)


def rows():
    return torch.stack([torch.randint(M, (B,), generator=g) for g in streams()])


def gradient(loss, module):
    return torch.autograd.grad(loss.sum(), list(module.parameters()))


def cloning(team, batch):
    return -team.policies.log_prob(team.policies(batch.obs, batch.avail), batch.action).sum(1).mean(1)


def test_omiga_with_a_huge_alpha_clones(float64):
    data, args, team, _ = made(omiga)
    batch = omiga.gather(data, rows())
    _, weight = omiga.value_loss(team, batch, 1e12)
    pairs = zip(gradient(omiga.policy_loss(team.policies, batch, weight), team.policies),
                gradient(cloning(team, batch), team.policies))  # fmt: skip
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in pairs)


def test_iql_with_temperature_0_clones(float64):
    data, args, team, _ = made(iql)
    batch = iql.gather(data, rows())
    pairs = zip(
        gradient(iql.policy_loss(team, batch, 0.0), team.policies), gradient(cloning(team, batch), team.policies)
    )
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in pairs)


def test_omigas_losses_against_a_slow_loop(float64):
    data, args, team, _ = made(omiga, alpha=0.7)
    batch = omiga.gather(data, rows())
    q_loss, (v_loss, weight) = omiga.critic_loss(team, batch, 0.9), omiga.value_loss(team, batch, 0.7)
    target_q, target_v, target_mixer = team.targets
    w, b = team.mixer(batch.state)
    tw, _ = target_mixer(batch.state)
    nw, nb = target_mixer(batch.next_state)
    q, tq = (team.local(net, batch.obs, batch.taken) for net in (team.q, target_q))
    v, nv = team.local(team.v, batch.obs), team.local(target_v, batch.next_obs)
    assert (w >= 0).all() and (tw >= 0).all()
    for s in range(S):
        want_q = want_v = 0.0
        for k in range(B):
            total = sum(w[s, i, k] * q[s, i, k] for i in range(N)) + b[s, k]
            later = sum(nw[s, i, k] * nv[s, i, k] for i in range(N)) + nb[s, k]
            y = batch.reward[s, k] + 0.9 * (1 - batch.done[s, k]) * later
            want_q += (total - y) ** 2 / B
            for i in range(N):
                z = (tw[s, i, k] * (tq[s, i, k] - v[s, i, k]) / 0.7).clamp(-10, 10)
                want_v += (z.exp() + tw[s, i, k] * v[s, i, k] / 0.7) / (N * B)
                assert torch.isclose(weight[s, i, k], z.exp())
        assert torch.isclose(q_loss[s], want_q) and torch.isclose(v_loss[s], want_v)


def test_agents_that_share_a_network_are_agents_with_equal_ones(float64):
    data, args, team, _ = made(omiga, shared=True)
    _, _, apart, _ = made(omiga)
    apart.load_state_dict({
        name: value if "mixer" in name or "targets.2" in name else value.repeat_interleave(N, 0)
        for name, value in team.state_dict().items()
    })  # fmt: skip
    batch = omiga.gather(data, rows())
    weights = [omiga.value_loss(each, batch, 0.7) for each in (team, apart)]
    losses = [
        (omiga.critic_loss(each, batch, 0.9), *weight, omiga.policy_loss(each.policies, batch, weight[1]))
        for each, weight in zip((team, apart), weights)
    ]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*losses))
    assert sum(p.numel() for p in apart.q.parameters()) == N * sum(p.numel() for p in team.q.parameters())


def test_who_shares_a_network_is_told_who_it_is():
    args = omiga.parse(["--env", "matrix", "--task", "xor", "--shared"])
    data, encode = omiga.arrange(load("matrix", "xor", args.dataset), args)
    assert (data.obs[:, :, -2:] == torch.eye(2)).all()
    assert (encode(torch.ones(3, 4, 2, 1))[..., -2:] == torch.eye(2)).all()


@pytest.mark.parametrize("team_", ["mixed", "independent"])
def test_iqls_losses_against_a_slow_loop(float64, team_):
    data, args, team, _ = made(iql, team=team_)
    batch = iql.gather(data, rows())
    v_loss, q_loss = iql.value_loss(team, batch, 0.7), iql.critic_loss(team, batch, 0.9)
    networks, mixer = team.targets
    local, lower = iql.local_values(team.q, batch), iql.local_values(networks, batch).amin(0)
    q = [iql.joint_value(team.q_mixer, x, batch) for x in local]
    low = iql.joint_value(mixer, lower, batch)
    assert (mixer is None) == (team_ == "independent")
    v, later = iql.value(team, batch.obs, batch.state), iql.value(team, batch.next_obs, batch.next_state)
    assert v.shape == (S, 1 if team_ == "mixed" else N, B)
    for s in range(S):
        want_v = want_q = 0.0
        for i in range(v.shape[1]):
            for k in range(B):
                gap = low[s, i, k] - v[s, i, k]
                want_v += (0.3 if gap < 0 else 0.7) * gap**2 / v[0].numel()
                y = batch.reward[s, 0, k] + 0.9 * (1 - batch.done[s, 0, k]) * later[s, i, k]
                want_q += sum((y - each[s, i, k]) ** 2 for each in q) / v[0].numel()
        assert torch.isclose(v_loss[s], want_v) and torch.isclose(q_loss[s], want_q)


def test_td3s_target_and_regression(float64):
    data, args, team, _ = made(td3, clip_target=True)
    noise = td3.draw_noise(streams(), data, args)
    batch = td3.gather(data, noise.rows)
    y = td3.td_target(team, batch, noise, data.best, args)
    policy, *critics = team.targets
    action = (policy(batch.next_obs) + (0.2 * noise.target).clamp(-0.5, 0.5)).clamp(-1, 1)
    low = torch.stack([critic(batch.next_obs, action, batch.next_state) for critic in critics]).amin(0)
    assert torch.allclose(y, (batch.reward + 0.99 * (1 - batch.done) * low).clamp(max=0.3)) and (y == 0.3).any()
    args.omar, args.bc = 1.0, 1.0  # without the critic's slope: regression on the data and on what the search finds
    noise = td3.draw_noise(streams(), data, args)
    mine = team.policies(batch.obs)
    found = td3.search(team.critics[0], batch.obs, mine.detach(), noise.search, args.elites)
    want = ((mine - batch.action) ** 2).sum((1, 3)).mean(1) + ((mine - found) ** 2).mean(3).sum(1).mean(1)
    assert torch.allclose(td3.policy_loss(team, batch, noise, args), want)
    best = team.critics[0].many(batch.obs, found[..., None, :])[..., 0]
    own = team.critics[0].many(batch.obs, mine[..., None, :])[..., 0]
    assert (best >= own).all() and (best > own).any()


def test_no_recorded_future_is_worth_more_than_the_clip():
    """Also where rewards are negative, so that a whole episode is worth less than what is left of it."""
    args = td3.parse(["--env", "reacher", "--task", "independent", "--clip-target", "--episodes", "20"])
    dataset = load("reacher", "independent", "expert-mix", episodes=20)
    future, best = layout.togo(dataset, args.gamma), td3.arrange(dataset, args)[0].best
    assert (future <= best).all() and (future == best).any() and best > dataset.returns.max()


def test_a_resumed_run_evaluates_before_its_policies_turn(tmp_path, monkeypatch):
    """A log that is of an earlier update than the last one is still known after a kill."""
    flags = ["--env", "polynomial", "--num-seeds", "1", "--steps", "4", "--eval-every", "1", "--eval-episodes", "0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    td3.main(td3.parse([*flags, "--out-dir", str(whole)]))
    record = td3.runs.Run.record

    def dies(run, *what, **more):
        record(run, *what, **more)
        if run.step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(td3.runs.Run, "record", dies)
        td3.main(td3.parse([*flags, "--out-dir", str(killed)]))
    td3.main(td3.parse(["--resume", "--out-dir", str(killed)]))
    assert (whole / "metrics.csv").read_text() == (killed / "metrics.csv").read_text()


def test_the_conservative_term_has_the_logarithm_of_the_density(float64):
    data, args, team, _ = made(td3, cql=1.0, bc=0.0)
    noise = td3.draw_noise(streams(), data, args)
    batch = td3.gather(data, noise.rows)
    actions, log_p = td3.candidates(team.policies, batch, noise, 0.2)
    normal = torch.distributions.Normal(0.0, 0.2)
    K = args.samples
    assert torch.allclose(log_p[..., :K], torch.tensor(0.5).log() * A)
    assert torch.allclose(log_p[..., K : 2 * K], normal.log_prob(0.2 * noise.near[0]).sum(-1))
    critic = team.critics[0]
    q, taken = critic.many(batch.obs, actions), critic.many(batch.obs, batch.action[..., None, :])[..., 0]
    want = (torch.log((q - log_p).exp().sum(-1)) - taken).mean((1, 2))
    assert torch.allclose(td3.conservative(critic, batch, actions, log_p), want)


CASES = {
    "omiga": (omiga, {}), "omiga, shared": (omiga, {"shared": True}),
    "MAIQL": (iql, {"team": "mixed"}), "IQL alone": (iql, {"team": "independent"}),
    "ITD3+BC": (td3, {}), "MATD3+BC": (td3, {"mixing": True}), "IOMAR": (td3, {"bc": 0.0, "cql": 1.0, "omar": 0.9}),
}  # fmt: skip


def trained(case, seeds, compiled=lambda f: f, steps=4):
    script, flags = CASES[case]
    data, args, _, _ = made(script, **flags)
    team = script.Team(data, args, streams(seeds))
    adams, generators, update = script.optimizers(team, args), streams(seeds), compiled(script.update)
    for step in range(steps):
        if script is td3:
            update(team, adams, data, td3.draw_noise(generators, data, args), step % 2 == 0, args)
        else:
            update(team, adams, data, script.draw_rows(generators, data, args), args)
    return team.policies.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_seeds_together_are_seeds_alone(float64, case):
    together = trained(case, (3, 8))
    for s, seed in enumerate((3, 8)):
        for name, value in trained(case, (seed,)).items():
            both = together[name]
            if both.shape != value.shape:  # a constant of the data has no axis for the seeds
                both = both.unflatten(0, (2, -1))[s]
                assert torch.allclose(both, value, atol=1e-12), name


@pytest.mark.parametrize("case", CASES)
def test_a_whole_update_is_one_graph(float64, case):
    torch._dynamo.config.trace_autograd_ops = True  # as data/runs.py does
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compiled(function):
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    eager, graph = trained(case, (0, 1)), trained(case, (0, 1), compiled)
    assert all(torch.allclose(eager[name], graph[name], atol=1e-9) for name in eager)
    assert len(graphs) <= 2  # TD3's updates with and without the policies' turn


def score(script, tmp_path, *words):
    words = ("--eval-episodes", "2", "--eval-every", "100000", "--out-dir", str(tmp_path / "run"), *words)
    return script.main(script.parse(list(words)))


def test_iql_agrees_where_it_decides_for_all(tmp_path):
    assert score(iql, tmp_path, "--team", "central")["return"]["per_seed"] == [1.0] * 10


def test_maiql_miscoordinates_on_unfavourable_data(tmp_path):
    assert score(iql, tmp_path)["return"]["mean"] <= 0.4


def test_omiga_ends_where_nobody_was(tmp_path):
    words = ("--env", "matrix", "--task", "xor", "--dataset", "aa-ab-ba")
    assert score(omiga, tmp_path, *words)["sampled_return"]["mean"] <= 0.1


# ---------------------------------------------------------------- fine-tuning
def recorded(env, task, dataset):
    """A dataset, collected if need be with the precision that the teams have."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return load(env, task, dataset, episodes=20 if env == "reacher" else 0)
    finally:
        torch.set_default_dtype(dtype)


def practised(env, task, dataset, seeds=(0, 1), team="mixed", rounds=3):
    """`Practice` after some rounds, the recorded states, the teams' encoder, and the arguments."""
    known = recorded(env, task, dataset)
    args = iql.Args(env=env, task=task, team=team, hidden=8, num_seeds=len(seeds))
    found, encode = iql.arrange(known, args)
    players, states = iql.Team(found, args, streams(seeds)), layout.rows(known)["state"]
    practice, generators = iql.Practice(known, found, encode, args, 10 * rounds), streams(seeds)
    practice.scale = 2.0
    for r in range(rounds):
        practice.play(r, players.policies, generators)
    return practice, practice.see(states), encode, args


@pytest.mark.parametrize("team", ["mixed", "central"])
def test_what_is_practised_is_what_the_true_game_does(float64, team):
    """Each step of a reacher leads on as the game itself does from that state, the first from recorded ones."""
    practice, known, encode, _ = practised("reacher", "independent", "expert-mix", team=team)
    assert practice.T == 10 and practice.count.tolist() == [30 * practice.E] * 2
    rows, steps = practice.own[:, : 30 * practice.E], practice.data.steps
    assert all(len(own.unique()) == len(own) and own.min() > steps.max() for own in rows)
    assert len(steps) <= len(rows[0]) < 1.1 * len(steps)  # half of each at the end
    first, rows = practice.state[:, :, :, 0].flatten(0, 2), rows[:, ::5]
    assert (first[:, None] - known).abs().amax(-1).amin(1).max() < 0.01
    raw = envs.make("reacher", "independent", num_envs=rows.numel())
    std, mean = torch.std_mean(layout.rows(recorded("reacher", "independent", "expert-mix"))["state"], 0)
    raw.set_state(practice.data.state[rows].flatten(0, 1) * std.clamp(min=1e-3) + mean)
    action = practice.data.action[rows].flatten(0, 1)
    obs, reward, _, _, info = raw.step(action.reshape(rows.numel(), raw.num_agents, -1).float())
    assert action.abs().max() <= 1 and action.std() > 0.01
    assert torch.allclose(2 * reward.double(), practice.data.reward[rows].flatten(), atol=1e-4)
    assert torch.allclose(encode(obs), practice.data.obs[rows + 1].flatten(0, 1), atol=1e-2)


@pytest.mark.parametrize("team", ["mixed", "central"])
def test_practice_in_a_game_of_one_step(team):
    practice, *_ = practised("matrix", "m-ne", "balanced", team=team, rounds=40)
    own = practice.own[:, : 40 * practice.E]
    assert practice.T == 1 and (practice.count == own.shape[1]).all()
    action = practice.data.action[own]  # (S, C, K)
    both = action if team == "mixed" else torch.cat([action // 3, action % 3], -1)
    assert torch.equal(practice.data.reward[own], 2 * practice.game.payoff[both[..., 0], both[..., 1]])
    assert (practice.data.done[own] == 1).all() and len(both.flatten(0, 1).unique(dim=0)) == 9


def test_no_step_follows_the_end_of_a_game(monkeypatch):
    """A reacher has no end of its own, so one is made up: the steps after it are not drawn, those of others are."""
    step, count = envs.mamujoco.MultiAgentMujoco.step, []

    def ending(self, actions):
        obs, reward, ended, cut, info = step(self, actions)
        count.append(1)
        ended[0] |= len(count) % 10 >= 4  # in each round after four of ten steps
        return obs, reward, ended, cut, info

    recorded("reacher", "independent", "expert-mix")  # before, or these games would be counted
    monkeypatch.setattr(envs.mamujoco.MultiAgentMujoco, "step", ending)
    practice, *_ = practised("reacher", "independent", "expert-mix")
    count = 30 * practice.E
    assert practice.count.tolist() == [count - 3 * 6, count]
    own = practice.own[0, : count - 18]
    place = own - practice.row[0].min()  # rounds, games, rows of a game
    game, t = place // 11 % practice.E, place % 11
    assert len(own.unique()) == len(own) and practice.own[1, :count].min() > own.max()
    ended = practice.data.done[own] == 1
    assert ended.sum() == 3 and (t[ended] == 3).all() and (game[ended] == 0).all()


def test_recorded_and_own_steps_are_equally_likely():
    practice, *_, args = practised("reacher", "independent", "expert-mix")
    practice.count[1] = 0
    rows = torch.cat([practice.draw(streams((s, s + 1000)), args) for s in range(200)], 1)  # (2, 12,800)
    own = rows >= practice.row.min()
    count = 30 * practice.E
    share = count / (count + len(practice.data.steps))
    assert abs(own[0].double().mean() - share) < 4 * (share / own.shape[1]) ** 0.5 and not own[1].any()
    assert torch.isin(rows[0][own[0]], practice.own[0, :count]).all()
    assert torch.isin(rows[~own], practice.data.steps).all()


def test_seeds_practise_as_they_would_alone(float64):
    together, *_ = practised("reacher", "independent", "expert-mix", seeds=(3, 8))
    for s, seed in enumerate((3, 8)):
        alone, *_ = practised("reacher", "independent", "expert-mix", seeds=(seed,))
        for name in ("obs", "state", "action", "reward", "done"):
            assert torch.allclose(getattr(together, name)[s], getattr(alone, name)[0], atol=1e-12), name


def test_practice_needs_a_game_that_takes_states(tmp_path):
    for env in ("bridge", "halfcheetah", "smac"):
        refuses(iql, ["--env", env, "--finetune", "1"], "--finetune cannot put", tmp_path / "run")


def test_a_run_killed_in_practice_ends_with_the_same_bits(tmp_path):
    words = "--env reacher --episodes 10 --steps 20 --finetune 2 --eval-every 15 --num-seeds 2 --hidden 8".split()
    words += ["--eval-episodes", "2"]
    whole = iql.main(iql.parse([*words, "--out-dir", str(tmp_path / "whole")]))
    argv = [*words, "--out-dir", str(tmp_path / "broken")]
    learn, calls = iql.update, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return learn(*args)

    iql.update = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            iql.main(iql.parse(argv))
    finally:
        iql.update = learn
    assert len(calls) == 50
    again = iql.main(iql.parse(["--resume", "--out-dir", str(tmp_path / "broken")]))
    assert again["return"] == whole["return"]
    one, other = (torch.load(tmp_path / name / "checkpoint.pt")["parts"] for name in ("whole", "broken"))
    assert all(torch.equal(one[part][name], other[part][name]) for part in ("team", "practice") for name in one[part])


def test_more_practice_than_any_memory_holds_is_refused_in_one_line(tmp_path):
    for times in ("1e300", "1e9"):
        complains(command("algorithms/iql.py", "--finetune", times, "--out-dir", tmp_path / "run"), "choose smaller")
    assert not (tmp_path / "run").exists()


def test_the_reachers_distance_and_minibatches_fit_it():
    args = td3.parse(["--env", "reacher"])
    assert (args.bc, args.batch_size, args.samples) == (10, 256, 10)
    args = td3.parse("--env reacher --bc 0 --cql 1".split())
    assert (args.bc, args.batch_size, args.samples) == (0, 64, 4)


@pytest.mark.long
def test_on_the_reacher_learning_alone_is_worse_than_learning_together(tmp_path):
    """As in MOMA-PPO's Table 4, where no agent sees the other's joint: ITD3+BC < MATD3+BC < 0.9."""
    found = []
    for flags in ([], ["--mixing"]):
        words = ["--env", "reacher", "--task", "independent", "--out-dir", str(tmp_path / f"run{len(flags)}"), *flags]
        found.append(td3.main(td3.parse(words))["normalized_return"]["mean"])
    assert found[0] < found[1] - 0.1 and found[1] < 0.9
