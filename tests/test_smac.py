"""The simulator of battles: its numbers against SMAC's definitions, its rules in small scenes."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

import envs
from envs import smac
from envs.rollout import play
from envs.smac import MAPS, MEMORY, POLICIES, Map, Smac

STOP, NORTH, SOUTH, EAST, WEST, ATTACK = 1, 2, 3, 4, 5, 6
# SMAC's own figures: agents, enemies, actions, obs, state, limit, divisor of the reward
SIZES = {
    "3m": (3, 3, 9, 30, 48, 60, 18.25),
    "8m": (8, 8, 14, 80, 168, 120, 32.0),
    "5m_vs_6m": (5, 6, 12, 55, 98, 70, 26.5),
    "2s3z": (5, 5, 11, 80, 120, 120, 51.0),
    "3s5z": (8, 8, 14, 128, 216, 150, 75.5),
    "3s_vs_5z": (3, 5, 11, 48, 68, 250, 50.0),
    "6h_vs_8z": (6, 8, 14, 78, 140, 150, 74.0),
}
# maximal health, maximal shield, and SMAC's divisor of the cooldown in loops of 1/16 s
FULL = {
    "marine": (45, 0, 15),
    "stalker": (80, 80, 35),
    "zealot": (100, 50, 22),
    "hydralisk": (80, 0, 10),
}


def scene(agents, enemies, goal=(16, 16), limit=1000, **options):
    """One battle without noise on open ground, its units placed by hand.

    Args:
        agents, enemies: [(name, x, y), ...]; enemies without a target walk to the goal.
    """
    counts = [Counter(name for name, _, _ in side) for side in (agents, enemies)]
    battle = Map(*counts, limit, ((0, 32, 0, 32),), goal, goal)
    game = Smac(battle, noise=False, **options)
    game.reset()
    game.x[:, 0], game.y[:, 0] = (
        torch.tensor([place[1:] for place in [*agents, *enemies]]).float().T
    )
    return game


def look(game):
    """What `reset` returns when it restarts nothing."""
    return game.reset(options={"reset_mask": torch.zeros(game.num_envs, dtype=torch.bool)})


def act(game, *actions):
    return game.step(torch.tensor([actions]))


def mixed(game, info):
    """Half of the actions at random, half from `focus`: long fights, both sides lose units."""
    coin = torch.rand(game.num_envs, game.num_agents, generator=game.generator) < 0.5
    return torch.where(coin, POLICIES["random"](game, info), POLICIES["focus"](game, info))


def fight(game, policy):
    """Whole battles by a scripted team: won and return, (B,) each."""
    act = POLICIES[policy]
    played = play(game, lambda obs, info, memory: (act(game, info), memory), seed=0)
    return played.won, played.returns


# ---------------------------------------------------------------- what the agents get
@pytest.mark.parametrize("task", SIZES)
def test_sizes_are_smacs(task):
    game = envs.make("smac", task, num_envs=2)
    obs, info = game.reset(seed=0)
    N, M, A, O, S, limit, divisor = SIZES[task]
    assert (game.num_enemies, game.time_limit) == (M, limit)
    assert obs.shape == (2, N, O) and info["state"].shape == (2, S)
    assert info["avail_actions"].shape == (2, N, A)
    assert 1 / game.unit_reward == pytest.approx(divisor)


def by_hand(agents, enemies, last_actions, walkable, types):
    """SMAC's observations, state and masks of one battle, from its definitions, number by number.

    Each unit is (name, x, y, health, shield, cooldown); a last action of -1 means none.
    """
    n_actions = 6 + len(enemies)
    agents_shield, enemies_shield = (
        any(FULL[unit[0]][1] for unit in side) for side in (agents, enemies)
    )

    def can_stand(
        x, y
    ):  # rounded as in single precision with a wall around the map: some units touch a wall
        x, y = (math.floor(np.float32(p) + np.float32(1)) - 1 for p in (x, y))
        return any(x0 <= x < x1 and y0 <= y < y1 for x0, x1, y0, y1 in walkable)

    def kind(unit, order):
        return [float(unit[0] == name) for name in order] if types else []

    def body(unit, shields, order):
        health, shield, _ = FULL[unit[0]]
        return (
            [unit[3] / health]
            + ([unit[4] / shield if shield else 0.0] if shields else [])
            + kind(unit, order)
        )

    def gap(a, b):
        return math.hypot(a[1] - b[1], a[2] - b[2])

    def seen(me, other, first, rest):
        block = [first, gap(me, other) / 9, (other[1] - me[1]) / 9, (other[2] - me[2]) / 9, *rest]
        return block if me[3] > 0 and other[3] > 0 and gap(me, other) < 9 else [0.0] * len(block)

    agent_order, enemy_order = ("stalker", "zealot"), ("zealot", "stalker")
    avail, obs = [], []
    for i, me in enumerate(agents):
        x, y, alive = me[1], me[2], me[3] > 0
        moves = [can_stand(x, y + 1), can_stand(x, y - 1), can_stand(x + 1, y), can_stand(x - 1, y)]
        shots = [enemy[3] > 0 and gap(me, enemy) <= 6 for enemy in enemies]
        avail.append([False, True, *moves, *shots] if alive else [True] + [False] * (n_actions - 1))
        row = [float(move) for move in moves]
        for j, enemy in enumerate(enemies):
            row += seen(me, enemy, float(shots[j]), body(enemy, enemies_shield, enemy_order))
        for j, ally in enumerate(agents):
            if j != i:
                row += seen(me, ally, 1.0, body(ally, agents_shield, agent_order))
        row += body(me, agents_shield, agent_order)
        obs.append(row if alive else [0.0] * len(row))
    state = []
    for unit in agents:
        rest = body(unit, agents_shield, agent_order)
        cooldown = max(unit[5], 0) * 16 / FULL[unit[0]][2]
        row = [rest[0], cooldown, (unit[1] - 16) / 32, (unit[2] - 16) / 32, *rest[1:]]
        state += row if unit[3] > 0 else [0.0] * len(row)
    for unit in enemies:
        rest = body(unit, enemies_shield, enemy_order)
        row = [rest[0], (unit[1] - 16) / 32, (unit[2] - 16) / 32, *rest[1:]]
        state += row if unit[3] > 0 else [0.0] * len(row)
    for action in last_actions:
        state += [float(action == a) for a in range(n_actions)]
    return obs, state, avail


def units_of(game, b):
    """The units of battle b for `by_hand`: agents, enemies."""
    columns = (game.x, game.y, game.health, game.shield, game.cooldown)
    units = [(name, *(c[i, b].item() for c in columns)) for i, name in enumerate(game.unit_names)]
    return units[: game.num_agents], units[game.num_agents :]


@pytest.mark.parametrize("task", ["2s3z", "3s_vs_5z", "6h_vs_8z"])
def test_observations_state_masks_and_rewards_by_hand(task):
    divisor, seen = SIZES[task][-1], Counter()
    game = Smac(task, 24)
    game.reset(seed=3)
    game.health[game.num_agents :, ::2] *= 0.3  # weak enemies, so that some fall
    obs, info = look(game)
    actions = torch.full((24, game.num_agents), -1)
    over = [False] * 24
    for t in range(60):
        for b in range(24) if t % 6 == 0 else ():
            agents, enemies = units_of(game, b)
            last, ground = actions[b].tolist(), MAPS[task].walkable
            o, s, a = by_hand(agents, enemies, last, ground, task == "2s3z")
            torch.testing.assert_close(obs[b], torch.tensor(o), atol=1e-5, rtol=0)
            torch.testing.assert_close(info["state"][b], torch.tensor(s), atol=1e-5, rtol=0)
            assert info["avail_actions"][b].tolist() == a
            seen["dead agent"] += any(unit[3] == 0 for unit in agents) and not over[b]
            seen["dead enemy"] += any(unit[3] == 0 for unit in enemies) and not over[b]
            seen["wall"] += any(not all(row[2:6]) and row[1] for row in a)
            seen["far enemy"] += any(row[1] and not all(row[6:]) for row in a)
        before = [units_of(game, b)[1] for b in range(24)]
        new = mixed(game, info)
        for b in range(4):  # four teams make for the walls: north, south, east, west
            new[b] = torch.where(info["avail_actions"][b, :, 2 + b], 2 + b, new[b])
        actions = torch.where(torch.tensor(over)[:, None], actions, new)
        obs, reward, terminated, truncated, info = game.step(actions)
        for b in range(24):
            agents, enemies = units_of(game, b)
            raw, alive = 0.0, sum(unit[3] > 0 for unit in agents)
            for old, new in zip(before[b], enemies):
                if old[3] > 0:
                    left = new[3] + new[4] if new[3] > 0 else -10
                    raw += old[3] + old[4] - left
            won = alive > 0 and all(unit[3] == 0 for unit in enemies)
            pay = 0.0 if over[b] else (abs(raw) + 200 * won) / divisor
            assert reward[b].item() == pytest.approx(pay, abs=1e-4)
            assert info["won"][b].item() == won
            assert terminated[b].item() == (won or alive == 0)
        over = (terminated | truncated).tolist()
    assert seen["dead agent"] and seen["far enemy"] and seen["wall"] and seen["dead enemy"]


def test_a_step_in_which_only_shields_return_pays():
    game = Smac("3s_vs_5z", noise=False)
    game.reset()
    game.shield[3:] = 10
    reward = act(game, STOP, STOP, STOP)[1].item()
    assert reward == pytest.approx(
        5 * 1 / 50
    )  # five zealots regain 1 each: SMAC takes the absolute value


# ---------------------------------------------------------------- the fight
# One attack on 40 points of shield, on a broken shield, and on 5 points: then armour counts for
# what comes through.
BLOWS = [
    ("marine", "marine", None, 6, None),
    ("marine", "zealot", 6, 5, (5, 1 - 1 / 6)),
    ("stalker", "zealot", 13, 12, (5, 8 - 8 / 13)),
    ("stalker", "stalker", 18, 17, (5, 13 - 13 / 18)),  # the bonus against armoured units
    ("zealot", "zealot", 16, 14, (5, 11 - 2 * 11 / 16)),  # two hits: armour counts twice
    ("zealot", "stalker", 16, 14, (5, 11 - 2 * 11 / 16)),
    ("zealot", "marine", None, 16, None),
    ("hydralisk", "zealot", 12, 11, (5, 7 - 7 / 12)),
    ("zealot", "hydralisk", None, 16, None),
]


@pytest.mark.parametrize("attacker, victim, on_shield, on_health, on_both", BLOWS)
@pytest.mark.parametrize("side", [0, 1])
def test_one_attack(attacker, victim, on_shield, on_health, on_both, side):
    cases = (40, on_shield, 0), (0, 0, on_health), (5, *(on_both or (0, 0)))
    for shield, shield_lost, health_lost in cases:
        if shield and on_shield is None:
            continue
        first, second = [(attacker, 16, 16)], [(victim, 16.9, 16)]
        game = scene(first, second) if side == 0 else scene(second, first)
        a, v = side, 1 - side
        game.cooldown[v], game.shield[v], game.health[v], game.quiet[v] = 1e6, shield, 30, 0
        health = game.health[v].item()
        act(game, ATTACK if side == 0 else STOP)
        healed = 0.273 * 0.5 if victim == "hydralisk" else 0
        assert game.shield[v].item() == pytest.approx(shield - shield_lost)
        assert game.health[v].item() == pytest.approx(health - health_lost + healed, abs=1e-4)
        assert game.cooldown[a] > 0


@pytest.mark.parametrize(
    "attacker, victim, reach, period",
    [
        ("marine", "marine", 5.75, 0.861),
        ("stalker", "zealot", 7.125, 1.87),
        ("hydralisk", "zealot", 6.125, 0.83),
        ("zealot", "stalker", 1.225, 1.2),
        ("zealot", "zealot", 1.1, 1.2),
    ],
)
def test_reach_between_the_centres_and_period(monkeypatch, attacker, victim, reach, period):
    monkeypatch.setattr(smac, "SUBSTEPS", 1)  # a step of 1/16 s
    for distance, hit in ((reach - 0.01, True), (reach + 0.01, False)):
        game = scene([(attacker, 8, 16)], [(victim, 8 + distance, 16)], check=False)
        life = (game.health + game.shield)[1].item()
        act(game, ATTACK)
        assert ((game.health + game.shield)[1].item() < life) == hit
        assert not hit or game.cooldown[0].item() == pytest.approx(period - 1 / 16)


def test_all_shots_of_a_moment_land():
    game = scene([("marine", 10, 16)], [("marine", 14, 16)])
    game.health[:] = 5
    game.target[1] = 0  # it has aimed already
    _, reward, terminated, truncated, info = act(game, ATTACK)
    assert terminated.item() and not truncated.item() and not info["won"].item()  # both fall
    assert reward.item() == pytest.approx((5 + 10) * 20 / (10 + 200 + 45))


def test_a_shield_returns_after_10_seconds():
    game = scene([("stalker", 22, 16)], [("zealot", 16, 16)])
    act(game, ATTACK)  # it fires in the first substep
    game.x[0] = 31.5  # and is gone
    shield = []
    for _ in range(40):
        act(game, STOP)
        shield.append(game.shield[1].item())
    assert shield[:19] == [50 - 13] * 19  # 9.94 s after the hit
    assert 37 < shield[19] < 38 and shield[20] - shield[19] == pytest.approx(1)
    assert shield[25] - shield[24] == pytest.approx(1) and shield[-1] == 50


@pytest.mark.parametrize("name, pace", [("marine", 1.125), ("stalker", 1.4765), ("zealot", 1.125)])
def test_pace(name, pace):
    game = scene([(name, 16, 16)], [("marine", 1, 1)], goal=(1, 1))
    for action in (NORTH, EAST, EAST, SOUTH, SOUTH, WEST, STOP):
        act(game, action)
    place = game.x[0].item(), game.y[0].item()
    assert place == pytest.approx((16 + pace, 16 - pace), abs=1e-4)


def test_who_has_fired_stands_still_for_a_moment():
    game = scene([("stalker", 16, 16)], [("zealot", 21, 16)])
    game.cooldown[:, 0] = torch.tensor(
        [6 / 16, 1e6]
    )  # it fires in the seventh of the eight substeps
    act(game, ATTACK)
    x = game.x[0].item()
    assert game.shield[1].item() == 50 - 13 and x == 16
    act(game, WEST)  # two of three substeps of 1/16 s are left of its 0.17 s
    assert x - game.x[0].item() == pytest.approx(2.953 * 6 / 16, abs=1e-4)


def test_noise_moves_the_start_and_the_period():
    battle = Map({"stalker": 1}, {"marine": 1}, 60, start=(16.0, 16.0), enemy_start=(20.0, 16.0))
    game = Smac(battle, 512)
    game.reset(seed=0)
    assert (game.x[0] - 16).abs().max() <= 0.1 + 1e-5 and game.y[0].std() > 0.05
    game.step(torch.full((512, 1), ATTACK))
    late = game.cooldown[0] + 8 / 16 - 1.87  # it fired in the first substep
    assert late.min() >= -1 / 16 - 1e-5 and late.max() <= 2 / 16 + 1e-5 and late.std() > 0.04


# ---------------------------------------------------------------- the enemies' rule
def test_enemies_keep_their_first_target():
    game = scene([("marine", 12, 16), ("marine", 1, 1)], [("zealot", 16, 16)])
    act(game, STOP, STOP)
    assert game.target[2].item() == 0
    game.x[:, 0], game.y[:, 0] = torch.tensor([[11.0, 17.5, 16.0], [16.0] * 3])  # 1 comes nearer
    act(game, STOP, STOP)
    assert game.target[2].item() == 0 and game.x[2] < 16  # it keeps its target and goes after it
    game.x[0] = game.x[2] - 5.9  # out of its sight, 5 from edge to edge
    act(game, STOP, STOP)
    assert game.target[2].item() == 1


def test_an_enemy_without_a_target_takes_the_nearest_or_marches():
    game = scene([("marine", 12, 16), ("marine", 19, 16)], [("zealot", 16, 16)])
    act(game, STOP, STOP)
    assert game.target[2].item() == 1
    game = scene([("marine", 3, 3)], [("zealot", 16, 16)], goal=(16, 6))
    act(game, STOP)
    assert game.target[1].item() == -1 and game.x[1].item() == 16
    assert game.y[1].item() == pytest.approx(16 - 1.125, abs=1e-4)
    for _ in range(14):
        act(game, STOP)
    assert game.y[1].item() == pytest.approx(7, abs=0.2)  # it waits at the goal


def test_enemies_need_3_tenths_of_a_second_for_a_new_target(monkeypatch):
    monkeypatch.setattr(smac, "SUBSTEPS", 1)  # a step of 1/16 s
    game = scene([("marine", 12, 16), ("marine", 12, 17)], [("marine", 16, 16)])

    def first_hit():
        """In which of the next substeps the agents lose health."""
        life = game.health[:2].sum().item()
        for t in range(1, 15):
            act(game, STOP, STOP)
            if game.health[:2].sum().item() < life - 1:
                return t

    assert first_hit() == 6  # five substeps are 0.31 s
    victim = game.target[2].item()
    game.cooldown[2] = 0
    assert first_hit() == 1  # the same target again: at once
    game.x[victim] = 1
    game.cooldown[2] = 0
    assert first_hit() == 6 and game.target[2].item() == 1 - victim


def test_an_enemy_answers_a_shot_from_out_of_its_sight():
    for shoot in (False, True):
        game = scene(
            [("stalker", 9, 16)], [("zealot", 16, 16)], check=False
        )  # 7 apart: reach 7.125, sight 6.125
        act(game, ATTACK if shoot else STOP)
        assert (game.shield[1].item() < 50) == shoot
        assert (game.target[1].item() == 0) == shoot
        assert (game.x[1].item() < 16) == shoot


# ---------------------------------------------------------------- whole battles


def test_skill_pays():
    kite, focus = (fight(Smac("3s_vs_5z", 48), policy)[0] for policy in ("kite", "focus"))
    assert kite.float().mean() > focus.float().mean() + 0.8


def test_finished_battles_stay_put_and_only_the_masked_ones_restart():
    game = Smac(MAPS["5m_vs_6m"]._replace(limit=21), 128)  # some are lost, the rest run out of time
    fight(game, "focus")
    before = {name: getattr(game, name).clone() for name in MEMORY}
    _, reward, terminated, truncated, _ = game.step(torch.randint(12, (128, 5)))
    assert (terminated ^ truncated).all() and terminated.any() and truncated.any()
    assert not reward.any() and game.picture().shape[2] == 3
    fresh = torch.arange(128) % 3 == 0
    game.reset(options={"reset_mask": fresh})
    assert (game.health[:, fresh] == 45).all() and (game.last_action[:, fresh] == -1).all()
    assert not game.elapsed[fresh].any()
    for name, value in before.items():
        assert torch.equal(getattr(game, name)[..., ~fresh], value[..., ~fresh]), name


def test_a_forbidden_action_is_harmless():
    """Whatever agents are told: they stay on the map, and nobody shoots the dead."""
    game = Smac("6h_vs_8z", 32, check=False)
    game.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    for t in range(60):
        actions = torch.randint(-3, game.num_actions + 3, (32, 6), generator=generator)
        if t % 8 > 3:  # all make for one wall
            actions[:] = 2 + t % 4
        obs, reward, _, _, info = game.step(actions)
        x, y = (game.x + 1).floor() - 1, (game.y + 1).floor() - 1  # in single precision
        inside = (8 <= y) & (y < 20) & (10 <= x) & (x < 20)
        inside |= (10 <= y) & (y < 18) & (8 <= x) & (x < 22)
        assert inside[game.health > 0].all() and (reward >= 0).all()
        assert obs.abs().max() <= 1 and info["avail_actions"].any(-1).all()


def test_a_step_is_one_graph(monkeypatch):
    monkeypatch.setattr(smac, "SUBSTEPS", 2)
    plain, graph = (Smac("2s3z", 4) for _ in range(2))
    torch._dynamo.reset()
    graph.compile(lambda f: torch.compile(f, fullgraph=True, dynamic=False, backend="eager"))
    (_, info), _ = plain.reset(seed=0), graph.reset(seed=0)
    for _ in range(3):
        actions = POLICIES["random"](plain, info)
        graph.generator.set_state(plain.generator.get_state())
        *one, info = plain.step(actions)
        *other, more = graph.step(actions)
        assert all(map(torch.equal, [*one, *info.values()], [*other, *more.values()]))
