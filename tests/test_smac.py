"""The StarCraft simulator: its numbers against SMAC's definitions, its fights against hand-made ones."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import command, complains
from PIL import Image

import envs
from envs import smac
from envs.smac import MAPS, POLICIES, Map, Smac, play

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
FULL = {"marine": (45, 0, 15), "stalker": (80, 80, 35), "zealot": (100, 50, 22), "hydralisk": (80, 0, 10)}
MEMORY = ("x", "y", "health", "shield", "cooldown", "pause", "quiet", "target", "last_action", "elapsed")


def scene(agents, enemies, goal=(16, 16), limit=1000, **options):
    """One battle without noise on open ground, its units placed by hand: [(name, x, y), ...] for each side.

    Enemies without a target walk to the goal.
    """
    counts = [Counter(name for name, _, _ in side) for side in (agents, enemies)]
    battle = Map(*counts, limit, ((0, 32, 0, 32),), goal, goal)
    game = Smac(battle, noise=False, **options)
    game.reset()
    game.x[:, 0], game.y[:, 0] = torch.tensor([place[1:] for place in [*agents, *enemies]]).float().T
    return game


def look(game):
    """What `reset` returns when it restarts nothing."""
    return game.reset(options={"reset_mask": torch.zeros(game.num_envs, dtype=torch.bool)})


def act(game, *actions):
    return game.step(torch.tensor([actions]))


def mixed(game, info):
    """Half of the actions at random, half from `focus`: long fights in which both sides lose units."""
    coin = torch.rand(game.num_envs, game.num_agents, generator=game.generator) < 0.5
    return torch.where(coin, POLICIES["random"](game, info), POLICIES["focus"](game, info))


# ---------------------------------------------------------------- what the agents get
@pytest.mark.parametrize("task", SIZES)
def test_sizes_are_smacs(task):
    game = envs.make("smac", task, num_envs=2)
    obs, info = game.reset(seed=0)
    N, M, A, O, S, limit, divisor = SIZES[task]
    assert (game.num_agents, game.num_enemies, game.num_actions, game.time_limit) == (N, M, A, limit)
    assert obs.shape == (2, N, O) == (2, N, game.obs_dim) and obs.dtype == torch.float32
    assert info["state"].shape == (2, S) == (2, game.state_dim) and info["state"].dtype == torch.float32
    assert info["avail_actions"].shape == (2, N, A) and info["avail_actions"].dtype == torch.bool
    assert 1 / game.unit_reward == pytest.approx(divisor)
    obs, reward, terminated, truncated, info = game.step(info["avail_actions"].int().argmax(-1))
    assert reward.shape == terminated.shape == truncated.shape == info["won"].shape == (2,)
    assert reward.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == info["won"].dtype == torch.bool
    assert game.observation_space.contains(obs.numpy())


def by_hand(agents, enemies, last_actions, walkable, types):
    """SMAC's observations, state and masks of one battle, from its definitions, number by number.

    Each unit is (name, x, y, health, shield, cooldown); a last action of -1 means none.
    """
    n_actions = 6 + len(enemies)
    agents_shield, enemies_shield = (any(FULL[unit[0]][1] for unit in side) for side in (agents, enemies))

    def can_stand(x, y):  # rounded as in single precision with a wall around the map: some units touch a wall
        x, y = (math.floor(np.float32(p) + np.float32(1)) - 1 for p in (x, y))
        return any(x0 <= x < x1 and y0 <= y < y1 for x0, x1, y0, y1 in walkable)

    def kind(unit, order):
        return [float(unit[0] == name) for name in order] if types else []

    def body(unit, shields, order):
        health, shield, _ = FULL[unit[0]]
        return [unit[3] / health] + ([unit[4] / shield if shield else 0.0] if shields else []) + kind(unit, order)

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


@pytest.mark.parametrize("task", ["2s3z", "3s_vs_5z", "5m_vs_6m", "6h_vs_8z"])
def test_observations_state_masks_and_rewards_by_hand(task):
    divisor, seen = SIZES[task][-1], Counter()
    game = Smac(task, 24)
    game.reset(seed=3)
    game.health[game.num_agents :, ::2] *= 0.3  # weak enemies in every other battle, so that some fall
    obs, info = look(game)
    actions = torch.full((24, game.num_agents), -1)
    over = [False] * 24
    for t in range(60):
        for b in range(24) if t % 6 == 0 else ():
            agents, enemies = units_of(game, b)
            o, s, a = by_hand(agents, enemies, actions[b].tolist(), MAPS[task].walkable, task == "2s3z")
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
                    raw += old[3] + old[4] - (new[3] + new[4] if new[3] > 0 else 0) + 10 * (new[3] == 0)
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
    assert reward == pytest.approx(5 * 1 / 50)  # five zealots regain 1 each: SMAC takes the absolute value


@pytest.mark.parametrize("task, policy", [("3m", "focus"), ("8m", "nearest")])
def test_a_win_over_marines_pays_20(task, policy):
    won, total, length = play(Smac(task, 64), POLICIES[policy])
    assert 10 < won.sum() < 64
    assert torch.allclose(total[won], torch.tensor(20.0), atol=1e-4)
    assert total[~won].max() < 20 - 200 / SIZES[task][-1] + 1e-4  # the 200 are lacking, even where both sides fall
    assert (length < MAPS[task].limit).all()


# ---------------------------------------------------------------- masks
def test_attack_reaches_6_and_sight_ends_before_9():
    game = scene([("marine", 10, 16)], [("marine", 16, 16), ("marine", 16.001, 16), ("marine", 19, 16)])
    obs, info = look(game)
    assert info["avail_actions"][0, 0].tolist() == [False, True, True, True, True, True, True, False, False]
    blocks = obs[0, 0, 4:19].view(3, 5)
    assert blocks[0].tolist() == pytest.approx([1, 6 / 9, 6 / 9, 0, 1])
    assert blocks[1, 0] == 0 and blocks[1, 1] > 0 and blocks[2].tolist() == [0] * 5


def test_the_dead_can_do_nothing():
    game = scene([("marine", 10, 16), ("marine", 12, 16)], [("marine", 14, 16)])
    game.health[0] = 1e-3
    game.shield[0] = 0
    game.x[1] = 28  # the other one is out of reach
    while look(game)[1]["avail_actions"][0, 0, 1]:
        obs, _, terminated, _, info = act(game, STOP, STOP)
    assert info["avail_actions"][0, 0].tolist() == [True] + [False] * 6
    assert not obs[0, 0].any() and not terminated.item()
    with pytest.raises(ValueError, match="battle 0: agent 0 may not do action 1 now"):
        act(game, STOP, STOP)
    act(game, 0, STOP)


@pytest.mark.parametrize("x, y, barred", [(0.5, 9.5, WEST), (31.5, 9.5, EAST), (4.5, 23.5, NORTH), (4.5, 8.5, SOUTH)])
def test_walls(x, y, barred):
    game = Smac("3m", noise=False, check=False)
    game.reset()
    game.x[0], game.y[0] = x, y
    avail = look(game)[1]["avail_actions"][0, 0, 2:6].tolist()
    assert avail == [action != barred for action in range(2, 6)]
    for _ in range(3):  # who tries in spite of that stays inside
        act(game, barred, STOP, STOP)
    assert 0 <= game.x[0].item() < 32 and 8 <= game.y[0].item() < 24


def test_nobody_leaves_the_octagon_nor_stands_in_another_for_long():
    def inside(x, y):  # the cells that SMAC's map leaves open
        row = y.floor()
        return (((row >= 8) & (row < 20)) & (x >= 10) & (x < 20)) | (((row >= 10) & (row < 18)) & (x >= 8) & (x < 22))

    game = Smac("6h_vs_8z", 64)
    _, info = game.reset(seed=0)
    apart = torch.tensor([0.5] * 6 + [0.375] * 8)
    apart = (apart[:, None] + apart)[..., None]  # (U, U, 1)
    close = torch.zeros(14, 14, 64, dtype=torch.int64)  # for how many steps a pair has been too close
    longest = crowded = pairs = 0
    for t in range(40):
        actions = mixed(game, info)
        actions = torch.where(info["avail_actions"][..., 2 + t % 4], 2 + t % 4, actions) if t % 8 > 3 else actions
        _, _, terminated, truncated, info = game.step(actions)
        alive = (game.health > 0) & ~(terminated | truncated)
        assert (game.health <= game.unit.health).all()  # the wounds heal, up to where they were
        assert inside(game.x, game.y)[alive].all()
        gap = torch.hypot(game.x - game.x[:, None], game.y - game.y[:, None])
        both = alive & alive[:, None] & ~torch.eye(14).bool()[..., None]
        close = (close + 1) * ((gap < 0.7 * apart) & both)
        longest, crowded = max(longest, int(close.max())), crowded + int(((gap < 0.8 * apart) & both).sum())
        pairs += int(both.sum())
    assert longest <= 6 and 0 < crowded < 0.03 * pairs  # 2 steps, 0.013 of the pairs when written


# ---------------------------------------------------------------- the fight
# One attack on 40 points of shield, on a broken shield, and on 5 points (then armour counts for what comes through).
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
    for shield, shield_lost, health_lost in ((40, on_shield, 0), (0, 0, on_health), (5, *(on_both or (0, 0)))):
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


def test_a_stalker_needs_13_shots_for_a_zealot():
    game = scene([("stalker", 10, 16)], [("zealot", 14, 16)])
    life, shots, terminated = 150.0, [], False
    while not terminated:
        game.cooldown[1] = 1e6  # the zealot cannot strike
        _, _, terminated, _, info = act(game, ATTACK)
        left = game.health[1].item() + game.shield[1].item()
        if left < life:
            shots.append(game.elapsed.item())
        life = left
    assert len(shots) == 13 and info["won"].item()
    assert shots[-1] - shots[0] == pytest.approx(12 * 1.87 / 0.5, abs=3)  # in substeps the period is 1.875 s


def test_all_shots_of_a_moment_land():
    game = scene([("marine", 10, 16), ("marine", 10, 17)], [("marine", 14, 16)])
    game.health[:] = 5
    _, reward, terminated, _, info = act(game, ATTACK, ATTACK)
    assert game.health[:, 0].tolist() == [5, 5, 0] or terminated.item()  # the enemy waits 0.3 s before its first shot
    game = scene([("marine", 10, 16)], [("marine", 14, 16)])
    game.health[:] = 5
    game.target[1] = 0  # it has aimed already
    _, reward, terminated, truncated, info = act(game, ATTACK)
    assert terminated.item() and not truncated.item() and not info["won"].item()  # both fall: nobody wins
    assert reward.item() == pytest.approx((5 + 10) * 20 / (10 + 200 + 45))


def test_a_shield_returns_after_10_seconds():
    game = scene([("stalker", 22, 16)], [("zealot", 16, 16)])
    act(game, ATTACK)  # it fires in the first substep
    game.x[0] = 31.5  # and is gone
    shield = []
    for _ in range(40):
        assert game.target[1].item() == -1 or not shield
        act(game, STOP)
        shield.append(game.shield[1].item())
    assert shield[:19] == [50 - 13] * 19  # 9.94 s after the hit
    assert 37 < shield[19] < 38 and shield[20] - shield[19] == pytest.approx(1)
    assert shield[25] - shield[24] == pytest.approx(1) and shield[-1] == 50


@pytest.mark.parametrize(
    "name, pace", [("marine", 1.125), ("stalker", 1.4765), ("zealot", 1.125), ("hydralisk", 1.125)]
)
def test_pace(name, pace):
    game = scene([(name, 16, 16)], [("marine", 1, 1)], goal=(1, 1))
    for action, dx, dy in ((NORTH, 0, 1), (SOUTH, 0, -1), (EAST, 1, 0), (WEST, -1, 0), (STOP, 0, 0)):
        x, y = game.x[0].item(), game.y[0].item()
        act(game, action)
        moved = game.x[0].item() - x, game.y[0].item() - y
        assert moved == pytest.approx((dx * pace, dy * pace), abs=1e-4)


def test_who_has_fired_stands_still_for_a_moment():
    game = scene([("stalker", 16, 16)], [("zealot", 21, 16)])
    game.cooldown[:, 0] = torch.tensor([6 / 16, 1e6])  # it fires in the seventh of the eight substeps
    act(game, ATTACK)
    x = game.x[0].item()
    assert game.shield[1].item() == 50 - 13 and x == 16
    act(game, WEST)  # two of three substeps of 1/16 s are left of its 0.17 s
    assert x - game.x[0].item() == pytest.approx(2.953 * 6 / 16, abs=1e-4)


def test_noise_moves_the_start_and_the_period():
    game = Smac(Map({"stalker": 1}, {"marine": 1}, 60, start=(16.0, 16.0), enemy_start=(20.0, 16.0)), 512)
    game.reset(seed=0)
    for place, centre in ((game.x, 16), (game.y, 16)):
        assert (place[0] - centre).abs().max() <= 0.1 + 1e-5 and place[0].std() > 0.05
    game.step(torch.full((512, 1), ATTACK))
    period = game.cooldown[0] + 8 / 16  # it fired in the first substep
    assert (period - 1.87).min() >= -1 / 16 - 1e-5 and (period - 1.87).max() <= 2 / 16 + 1e-5 and period.std() > 0.04


def test_an_attack_order_walks_up_to_its_target():
    game = scene([("zealot", 10, 16)], [("zealot", 16, 16)], goal=(16, 16))
    game.cooldown[1] = 1e6
    for _ in range(6):
        assert look(game)[1]["avail_actions"][0, 0, ATTACK]
        act(game, ATTACK)
    assert game.shield[1].item() < 50


# ---------------------------------------------------------------- the enemies' rule
def test_enemies_keep_their_first_target():
    game = scene([("marine", 12, 16), ("marine", 1, 1)], [("zealot", 16, 16)])
    act(game, STOP, STOP)
    assert game.target[2].item() == 0
    game.x[:, 0], game.y[:, 0] = torch.tensor([[11.0, 17.5, 16.0], [16.0, 16.0, 16.0]])  # the other one comes nearer
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
    for _ in range(3):
        act(game, STOP)
    assert game.target[1].item() == -1
    assert (game.x[1].item(), game.y[1].item()) == pytest.approx((16, 16 - 3 * 1.125), abs=1e-4)
    for _ in range(12):
        act(game, STOP)
    assert game.y[1].item() == pytest.approx(7, abs=0.2)  # it waits at the goal


def test_enemies_need_3_tenths_of_a_second_for_a_new_target(monkeypatch):
    monkeypatch.setattr(smac, "SUBSTEPS", 1)  # a step of 1/16 s
    game = scene([("marine", 12, 16), ("marine", 12, 17)], [("marine", 16, 16)])

    def hits():
        """At which of the next substeps the agents lose health."""
        found, life = [], game.health[:2].sum().item()
        for t in range(1, 15):
            act(game, STOP, STOP)
            if game.health[:2].sum().item() < life - 1:
                found.append(t)
            life = game.health[:2].sum().item()
        return found

    assert hits()[0] == 6  # five substeps are 0.31 s
    victim, other = (0, 1) if game.target[2] == 0 else (1, 0)
    game.cooldown[2] = 0
    assert hits()[0] == 1  # the same target again: at once
    game.x[victim] = 1
    game.cooldown[2] = 0
    assert hits()[0] == 6 and game.target[2].item() == other


def test_an_enemy_answers_a_shot_from_out_of_its_sight():
    for shoot in (False, True):
        game = scene([("stalker", 9, 16)], [("zealot", 16, 16)], check=False)  # 7 apart: reach 7.125, sight 6.125
        act(game, ATTACK if shoot else STOP)
        assert (game.shield[1].item() < 50) == shoot
        assert (game.target[1].item() == 0) == shoot
        assert (game.x[1].item() < 16) == shoot


# ---------------------------------------------------------------- whole battles
@pytest.mark.parametrize("task", ["3m", "8m", "2s3z", "3s5z"])
def test_equal_sides_win_equally_often(task):
    game = Smac(task, 1024, mirror=True)
    won, _, length = play(game, POLICIES["idle"])
    lost = (game.health[game.num_agents :] > 0).any(0) & (length < game.time_limit)
    assert 0.40 < won.float().mean() < 0.60 and 0.40 < lost.float().mean() < 0.60  # five standard errors and more


@pytest.mark.parametrize("task", SIZES)
@pytest.mark.parametrize("policy", ["idle", "random"])
def test_doing_nothing_or_anything_wins_nothing(task, policy):
    won, total, _ = play(Smac(task, 128), POLICIES[policy])
    assert not won.any() and (total > 0).any() == (policy == "random")


def test_skill_pays():
    def rate(task, policy):
        return play(Smac(task, 256), POLICIES[policy])[0].float().mean().item()

    assert rate("3s_vs_5z", "kite") > rate("3s_vs_5z", "focus") + 0.8
    assert rate("2s3z", "focus") > rate("2s3z", "nearest") + 0.5


def test_same_seed_same_battle():
    def trajectory(seed):
        game, pieces = Smac("2s3z", 16), []
        obs, info = game.reset(seed=seed)
        for _ in range(50):
            obs, reward, terminated, truncated, info = game.step(POLICIES["random"](game, info))
            pieces += [obs, reward, terminated, truncated, *info.values()]
        return pieces

    first, again, other = trajectory(1), trajectory(1), trajectory(2)
    assert all(map(torch.equal, first, again))
    assert not any(torch.equal(a, b) for a, b in list(zip(first, other))[::7])  # the observations


@pytest.mark.parametrize("task", SIZES)
def test_one_battle_equals_one_of_many(task):
    many, one = Smac(task, 64, noise=False), Smac(task, 1, noise=False)
    obs, info = many.reset(seed=0)
    single, extra = one.reset()
    assert torch.equal(obs[0], single[0]) and torch.equal(obs[0], obs[63])
    for _ in range(60):
        actions = mixed(many, info)
        obs, reward, terminated, truncated, info = many.step(actions)
        o, r, te, tr, extra = one.step(actions[:1])
        assert torch.equal(o[0], obs[0]) and r[0] == reward[0] and te[0] == terminated[0] and tr[0] == truncated[0]
        assert all(torch.equal(extra[key][0], info[key][0]) for key in info)


def test_finished_battles_stay_put_and_only_the_masked_ones_restart():
    game = Smac(MAPS["5m_vs_6m"]._replace(limit=21), 256)  # some are lost by then, the rest run out of time
    play(game, POLICIES["focus"])
    before = {name: getattr(game, name).clone() for name in MEMORY}
    obs, info = look(game)
    for actions in (torch.zeros(256, 5, dtype=torch.int64), torch.randint(12, (256, 5))):
        after, reward, terminated, truncated, more = game.step(actions)
        assert (terminated ^ truncated).all() and terminated.any() and truncated.any()
        assert (game.elapsed[truncated] == 21).all() and not reward.any() and torch.equal(after, obs)
        assert all(torch.equal(more[key], info[key]) for key in info)
        for name, value in before.items():
            assert torch.equal(getattr(game, name), value), name
    fresh = torch.arange(256) % 3 == 0
    again, _ = game.reset(options={"reset_mask": fresh})
    assert torch.equal(again[~fresh], obs[~fresh])
    assert (game.elapsed == torch.where(fresh, 0, before["elapsed"])).all()
    assert (game.health[:, fresh] == 45).all() and (game.last_action[:, fresh] == -1).all()
    for name, value in before.items():
        assert torch.equal(getattr(game, name)[..., ~fresh], value[..., ~fresh]), name
    reward = sum(game.step(POLICIES["focus"](game, look(game)[1]))[1] for _ in range(21))
    assert (reward[fresh] > 0).all() and not reward[~fresh].any()


def test_mirror_stays_put_too():
    game = Smac(MAPS["3m"]._replace(limit=14), 256, mirror=True)
    play(game, POLICIES["idle"])
    before = {name: getattr(game, name).clone() for name in MEMORY}
    game.step(torch.ones(256, 3, dtype=torch.int64))
    for name, value in before.items():
        assert torch.equal(getattr(game, name), value), name


@pytest.mark.parametrize("check", [True, False])
def test_forbidden_actions_are_named_or_harmless(check):
    game = Smac("2s3z", 32, check=check)
    _, info = game.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    over, refused, played = torch.zeros(32, dtype=torch.bool), 0, 0
    for t in range(200):
        legal = POLICIES["focus" if t % 3 else "random"](game, info)
        wild = torch.randint(-3, game.num_actions + 3, legal.shape, generator=generator)
        chance = (0.0, 0.003, 1.0)[t % 3]
        actions = torch.where(torch.rand(legal.shape, generator=generator) < chance, wild, legal)
        number = actions.clamp(0, game.num_actions - 1)
        fine = (number == actions) & info["avail_actions"].gather(2, number[..., None])[..., 0]
        if check and not (fine | over[:, None]).all():
            before = {name: getattr(game, name).clone() for name in MEMORY}
            with pytest.raises(ValueError, match=r"battle \d+: agent \d may not do action -?\d+ now"):
                game.step(actions)
            assert all(torch.equal(getattr(game, name), value) for name, value in before.items())
            refused += 1
            continue
        obs, reward, terminated, truncated, info = game.step(actions)
        assert obs.isfinite().all() and info["state"].isfinite().all() and reward.isfinite().all()
        assert (reward >= 0).all() and obs.abs().max() <= 1 and info["avail_actions"].any(-1).all()
        over, played = terminated | truncated, played + 1
        if t % 50 == 49:
            _, info = game.reset(options={"reset_mask": over})
            over &= False
    assert (refused > 50 and played > 80) if check else played == 200


def test_a_map_of_ones_own():
    game = Smac(Map({"stalker": 1, "marine": 2}, {"zealot": 1, "hydralisk": 2}, 60), 8)
    won, total, length = play(game, POLICIES["focus"])
    assert (length > 5).all() and (total > 0).all()
    game = Smac(Map({"marine": 1}, {"marine": 1}, 60), 512)  # one agent alone: its own health and the enemy
    obs, info = game.reset(seed=0)
    assert obs.shape == (512, 1, 4 + 5 + 1) and info["state"].shape == (512, 4 + 3 + 7)
    won, _, _ = play(game, POLICIES["nearest"])
    assert 0.1 < won.float().mean() < 0.9


def test_unknown_map():
    with pytest.raises(ValueError, match="smac has no map '2m': choose one of 3m, 8m, 5m_vs_6m"):
        envs.make("smac", "2m")


# ---------------------------------------------------------------- the command line
def test_the_film(tmp_path):
    done = command("envs/smac.py", "--map", "3m", "--policy", "focus", "--out", tmp_path / "film.gif", "--battles", 32)
    assert done.returncode == 0, done.stderr
    drawn, played = done.stdout.strip().splitlines()
    assert "3m, focus" in drawn and played.startswith("32 battles: win rate 0.")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.format == "GIF" and film.is_animated and f"after {film.n_frames} steps" in drawn
        film.seek(0)
        first = film.convert("RGB").tobytes()
        film.seek(film.n_frames - 1)
        assert film.convert("RGB").tobytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["film.gif"]
    assert (tmp_path / "film.gif").stat().st_size < 2e6


def test_what_the_command_line_refuses(tmp_path):
    complains(command("envs/smac.py", "--policy", "win", "--out", tmp_path / "film.gif"), "no policy 'win'", "kite")
    for words, message in (
        ({"map": "2m"}, "no map '2m'"),
        ({"battles": -1}, "must not be negative"),
        ({"seed": -1}, "must not be negative"),
        ({"out": tmp_path / "film.png"}, "must end in .gif"),
    ):
        with pytest.raises(ValueError, match=message):
            smac.main(smac.Args(**{"out": tmp_path / "film.gif", **words}))
    assert not list(tmp_path.iterdir())
