"""StarCraft micromanagement without StarCraft: hundreds of SMAC-like battles at once, as tensors.

    python envs/smac.py --map 3s_vs_5z --policy kite --out battle.gif

A team of agents, one for each unit, fights units that a fixed rule commands. What an agent sees, its actions, the
state, the shaped reward and the time limits are those of SMAC (Samvelyan et al., 2019), entry for entry. The fight
itself is a simulator of our own: the units' figures and the maps are StarCraft II's, the physics is simplified, and
results are *not* comparable with published SMAC numbers. `envs/sc2.py` plays the real game behind the same interface.

One step is half a second: eight substeps of 1/16 s. In each,
  1. enemies choose targets: they keep one while it stays within their scan range, else take the nearest, and need
     0.3 s before the first shot at a new one; without a target they walk to the place where the agents started;
  2. whoever has a living target in range and a ready weapon hits it; all hits of a substep land together;
  3. shields absorb damage first and know no armour; they come back 10 s after the last hit;
  4. units walk, are pushed apart where they overlap, and stop at walls.
Left out: facing, acceleration, projectiles, flying units, healers, terrain height.

Tensors are unit-major, (U, B): agents first, then enemies; the battles lie last, so that the pairwise tensors
(U, U, B) have a long contiguous dimension: several times as fast on a CPU as (B, U, U). Dead units wait in a graveyard,
far from everything and from one another, and so need no masks.

Actions: 0 nothing (the dead can do nothing else), 1 stop, 2 north, 3 south, 4 east, 5 west, 6 + j attack enemy j. A
move lasts the whole step. Attacking is allowed up to distance 6 between the centres, whatever the weapon; a unit walks
up to its target if it has to. Units on the agents' side do nothing on their own.

Shapes: B battles, N agents, M enemies, U = N + M units, A = 6 + M actions.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from gymnasium.vector import VectorEnv
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from PIL import Image

if __name__ == "__main__":  # let `python envs/smac.py` find the package that this file belongs to
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from envs.common import METADATA, check_actions, describe_discrete, games_to_reset, pixels

SUBSTEPS, DT = 8, 1 / 16  # seconds; one step is 0.5 s of the game's "Normal" speed
SIGHT, SHOOT = 9.0, 6.0  # how far an agent sees, and how far it may name a target
SCAN = 5.0  # how far an enemy looks for targets, from edge to edge; its weapon's range if that is longer
ALERT, ALERT_SCAN = 3.0, 2.0  # an enemy hit in the last 3 s looks 2 farther: it answers shots from out of its sight
REACTION = 0.3  # seconds between choosing a target and the first shot
SHIELD_DELAY, SHIELD_RATE = 10.0, 2.0  # a shield returns after 10 s without a hit, 2 points a second
JITTER, COOLDOWN_NOISE = 0.1, (-1 / 16, 2 / 16)  # of the starting places; of each weapon's period, in seconds
KILL, WIN, SCALE = 10, 200, 20  # the reward of a kill and of a win; a clean win sums to 20
MAP_SIZE = 32
MEMORY = ("x", "y", "health", "shield", "cooldown", "pause", "quiet", "target", "last_action", "elapsed")
STEP_X = (0, 0, 0, 0, 1, -1, 0)  # actions 0 to 5, and attack
STEP_Y = (0, 0, 1, -1, 0, 0, 0)


class Unit(NamedTuple):
    """One type of unit; times in seconds, lengths in cells, `damage` a hit."""

    health: float
    shield: float
    armour: float  # off each hit that reaches the health
    armoured: bool  # takes the attackers' bonus
    damage: float
    bonus: float
    hits: int  # in one attack
    period: float  # between attacks
    range: float  # from edge to edge
    speed: float
    radius: float
    separation: float  # half the distance that two such units keep
    pause: float  # the unit stands still so long after it has fired
    cooldown_scale: float  # SMAC's divisor for the cooldown in the state, in seconds
    healing: float  # health a second
    race: str


UNITS = {
    "marine": Unit(45, 0, 0, False, 6, 0, 1, 0.861, 5, 2.25, 0.375, 0.375, 0.05, 15 / 16, 0, "terran"),
    "stalker": Unit(80, 80, 1, True, 13, 5, 1, 1.87, 6, 2.953, 0.625, 0.625, 0.17, 35 / 16, 0, "protoss"),
    "zealot": Unit(100, 50, 1, False, 8, 0, 2, 1.2, 0.1, 2.25, 0.5, 0.375, 0.28, 22 / 16, 0, "protoss"),
    "hydralisk": Unit(80, 0, 0, False, 12, 0, 1, 0.83, 5, 2.25, 0.625, 0.5, 0.15, 10 / 16, 0.273, "zerg"),
}


class Map(NamedTuple):
    """A battle: how many of which unit, its limit in steps, who starts where, and where one can walk."""

    agents: dict
    enemies: dict
    limit: int
    walkable: tuple = ((0, 32, 8, 24),)  # rectangles (x from, x to, y from, y to) of cells
    start: tuple = (9.0, 16.0)  # the agents' centre; the enemies march here
    enemy_start: tuple = (23.0, 16.0)


OCTAGON = ((10, 20, 8, 20), (8, 22, 10, 18))
MAPS = {
    "3m": Map({"marine": 3}, {"marine": 3}, 60),
    "8m": Map({"marine": 8}, {"marine": 8}, 120),
    "5m_vs_6m": Map({"marine": 5}, {"marine": 6}, 70),
    "2s3z": Map({"stalker": 2, "zealot": 3}, {"stalker": 2, "zealot": 3}, 120),
    "3s5z": Map({"stalker": 3, "zealot": 5}, {"stalker": 3, "zealot": 5}, 150),
    "3s_vs_5z": Map({"stalker": 3}, {"zealot": 5}, 250, ((0, 32, 0, 32),)),
    "6h_vs_8z": Map({"hydralisk": 6}, {"zealot": 8}, 150, OCTAGON, (14.60, 9.49), (14.41, 16.76)),
}


class Smac(VectorEnv):
    """B battles on one map.

    `info` holds "state" (B, D), "avail_actions" (B, N, A) and "won" (B,). A time limit truncates. A battle in which
    both sides fall is terminated and not won. `win` pays even if shields came back on the way, so that returns
    above 20 are possible, as in SMAC.

    Args:
        task: a name in `MAPS`, or a `Map` of your own.
        noise: whether starting places and weapon periods vary.
        check: raise ValueError where a running battle gets an action that is not available. By default on the CPU
            only: on a GPU the look would stop the device at every step. A forbidden action is harmless: it is clipped
            to the valid numbers, and nobody can walk through walls or shoot the dead.
        mirror: the agents follow the enemies' rule in place of their actions (marching to the enemies' start).
    Raises:
        ValueError: an unknown map.

    On a GPU nothing here waits for the host. What a battle remembers, `MEMORY`, stays in the same tensors all along,
    and `_play` and `_begin` draw nothing, so that both can be graphs: see `compile`.
    """

    metadata = METADATA

    def __init__(self, task="5m_vs_6m", num_envs=1, device="cpu", noise=True, check=None, mirror=False):
        battle = MAPS.get(task) if isinstance(task, str) else task
        if battle is None:
            raise ValueError(f"smac has no map {task!r}: choose one of {', '.join(MAPS)}")
        names = [name for side in (battle.agents, battle.enemies) for name, count in side.items() for _ in range(count)]
        N, M = sum(battle.agents.values()), sum(battle.enemies.values())
        units, self.unit_names = [UNITS[name] for name in names], names
        types = sorted({*battle.agents, *battle.enemies})  # stalker before zealot
        self.type_bits = K = len(types) if len(battle.agents) > 1 else 0
        self.shields = [any(u.shield for u in side) for side in (units[:N], units[N:])]  # agents, enemies
        own, foe = (int(has) + K for has in self.shields)
        describe_discrete(
            self, num_envs, device, num_agents=N, num_actions=6 + M, time_limit=battle.limit, best_return=None,
            obs_dim=4 + M * (5 + foe) + (N - 1) * (5 + own) + 1 + own,
            state_dim=N * (4 + own) + M * (3 + foe) + N * (6 + M),
        )  # fmt: skip
        self.num_enemies, self.noise, self.mirror, self.battle = M, noise, mirror, battle
        self.check = self.device.type == "cpu" if check is None else check
        self.generator = torch.Generator(self.device).manual_seed(0)

        def column(values):
            return torch.tensor(values, dtype=torch.float32, device=self.device)[:, None]

        self.unit = Unit(*map(column, zip(*(u[:-1] for u in units))), race=None)  # each field as (U, 1)
        u, bonus = self.unit, [[(a.damage + a.bonus * b.armoured) * a.hits for b in units] for a in units]
        self.damage = torch.tensor(bonus, device=self.device).float().flatten()  # (U U) by a on b in one attack
        self.keep_apart = (u.separation + u.separation.T)[..., None]  # (U, U, 1)
        self.scan = (u.range.clamp(min=SCAN) + u.radius + u.radius.T)[..., None]  # (U, U, 1)
        self.reach = u.range + u.radius  # (U, 1) from the centre, to the target's edge
        self.far = 1e6 * torch.eye(N + M, device=self.device).float()[..., None]  # nobody is near itself
        self.grave = 1e3 * torch.arange(1, N + M + 1, device=self.device).float()[:, None]
        self.row = (N + M) * torch.arange(N + M, device=self.device)[:, None]  # offsets into `damage`
        self.spread = 0.0, 1.0
        if noise:
            self.spread = COOLDOWN_NOISE[0], COOLDOWN_NOISE[1] - COOLDOWN_NOISE[0]
        walk = torch.zeros(MAP_SIZE + 2, MAP_SIZE + 2, dtype=torch.bool)  # with a wall around
        for x0, x1, y0, y1 in battle.walkable:
            walk[x0 + 1 : x1 + 1, y0 + 1 : y1 + 1] = True
        self.walk = walk.flatten().to(self.device)
        place = torch.cat([_formation(units[:N], battle.start, 1), _formation(units[N:], battle.enemy_start, -1)])
        self.start_x, self.start_y = place.float().to(self.device).T[..., None]  # (U, 1)
        goals = [battle.enemy_start] * N + [battle.start] * M
        self.goal_x, self.goal_y = torch.tensor(goals, device=self.device).float().T[..., None]  # (U, 1)
        self.step_x, self.step_y = (torch.tensor(s, device=self.device).float() for s in (STEP_X, STEP_Y))
        bits = torch.eye(len(types), device=self.device).float()[[types.index(name) for name in names]]  # (U, K)
        bits[N:] = bits[N:].flip(1)  # SMAC writes the enemies' types the other way round
        self.bits = bits[..., None] if K else bits[:, :0, None]  # (U, K, 1)
        others = [[j for j in range(N) if j != i] for i in range(N)]
        self.others = torch.tensor(others, dtype=torch.int64, device=self.device).view(N, N - 1)
        self.unit_reward = SCALE / (KILL * M + WIN + sum(e.health + e.shield for e in units[N:]))
        shape = (N + M, num_envs)
        for name in MEMORY[:7]:
            setattr(self, name, torch.zeros(shape, dtype=torch.float32, device=self.device))
        self.target = torch.full(shape, -1, device=self.device)  # (U, B) a unit's number, or -1
        self.last_action = torch.full((N, num_envs), -1, device=self.device)
        self.elapsed = torch.zeros(num_envs, dtype=torch.int64, device=self.device)

    def reset(self, *, seed=None, options=None):
        fresh = games_to_reset(self, options)
        if seed is not None:
            self.generator.manual_seed(seed)
        shift = torch.zeros(2, *self.x.shape, dtype=torch.float32, device=self.device)
        if self.noise:
            shift = JITTER * (2 * torch.empty_like(shift).uniform_(generator=self.generator) - 1)
        return self._begin(fresh, shift)

    def step(self, actions):
        check_actions(self, actions)
        if self.check:
            self._complain(actions)
        chance = torch.empty_like(self.x).uniform_(generator=self.generator)
        return self._play(actions, chance)

    def compile(self, compiler):
        """Let `compiler`, a function of functions, make one graph of what a step computes and one of a reset.

        From then on actions are not checked. On a CPU the compiler's sums are rounded in another order: a battle
        follows the one that it would have been to some 1e-7, until that decides who is nearest or in range.
        """
        self.check = False
        for name in MEMORY:
            torch._dynamo.mark_static_address(getattr(self, name))  # a CUDA graph may write there
        self._play, self._begin = compiler(self._play), compiler(self._begin)

    def picture(self, actions=None):
        """The first battle from above, with lines to whom each unit attacks, as an array (height, width, 3)."""
        figure, axes = open_figure(self.battle)
        aims, alive = self.target[:, 0].tolist(), (self.health[:, 0] > 0).tolist()
        draw_battle(axes, self, [(i, j) for i, j in enumerate(aims) if j >= 0 and alive[i] and alive[j]])
        return pixels(figure)

    def _begin(self, fresh, shift):
        """Start the battles fresh (B,) anew, the units' places moved by shift (2, U, B)."""
        start = {
            "x": self.start_x + shift[0], "y": self.start_y + shift[1], "health": self.unit.health,
            "shield": self.unit.shield, "cooldown": 0.0, "pause": 0.0, "quiet": SHIELD_DELAY + 1, "target": -1,
            "last_action": -1, "elapsed": 0,
        }  # fmt: skip
        for name, value in start.items():
            kept = getattr(self, name)
            kept.copy_(torch.where(fresh, value, kept))
        return self._observe()

    def _play(self, actions, chance):
        """One step of all battles. chance (U, B) in [0, 1) varies the weapons' periods: none fires twice in a step."""
        N, over, kept = self.num_agents, self._over(), {name: getattr(self, name) for name in MEMORY}
        order = actions.T.clamp(0, self.num_actions - 1)  # (N, B)
        life, enemies = self._life(), (self.health[N:] > 0).sum(0)
        self.cooldown, self.target = self.cooldown.clone(), self.target.clone()  # `_acquire` writes into them
        if not self.mirror:
            self.target = torch.cat([torch.where(order >= 6, order - 6 + N, -1), self.target[N:]])
        heading = self.step_x[order.clamp(max=6)], self.step_y[order.clamp(max=6)]  # (N, B)
        period = self.unit.period + self.spread[0] * self.noise + self.spread[1] * chance * self.noise
        for _ in range(SUBSTEPS):
            self._substep(heading, period)
        self.last_action, self.elapsed = order, self.elapsed + 1
        for name, old in kept.items():  # a finished battle stays put
            setattr(self, name, old.copy_(torch.where(over, old, getattr(self, name))))

        # SMAC takes the absolute value, so a step in which shields only come back pays a little as well.
        killed = enemies - (self.health[N:] > 0).sum(0)
        obs, info = self._observe()
        reward = (life - self._life() + KILL * killed).abs() + WIN * (info["won"] & ~over)
        terminated = self._fallen()
        truncated = (self.elapsed >= self.time_limit) & ~terminated
        return obs, reward * self.unit_reward * ~over, terminated, truncated, info

    def _life(self):
        return (self.health + self.shield)[self.num_agents :].sum(0)  # (B,) of the enemies

    def _fallen(self):
        alive = self.health > 0
        return ~(alive[: self.num_agents].any(0) & alive[self.num_agents :].any(0))  # (B,) one side, or both

    def _over(self):
        return self._fallen() | (self.elapsed >= self.time_limit)

    def _complain(self, actions):
        """Raise ValueError if a running battle gets an action that is not available."""
        A, over = self.num_actions, self._over()
        legal = (
            self._available(self._distance()[2]).permute(2, 0, 1).gather(2, actions.clamp(0, A - 1)[..., None])[..., 0]
        )
        wrong = (~legal | (actions < 0) | (actions >= A)) & ~over[:, None]  # (B, N)
        if wrong.any():
            b, i = wrong.nonzero()[0].tolist()
            raise ValueError(f"battle {b}: agent {i} may not do action {int(actions[b, i])} now (see avail_actions)")

    # ------------------------------------------------------------ the fight
    def _distance(self):
        """dx, dy and distance from unit i to unit j, each (U, U, B); a unit is far from itself."""
        dx, dy = self.x - self.x[:, None], self.y - self.y[:, None]
        return dx, dy, (dx * dx + dy * dy + self.far).clamp_(min=1e-6).sqrt_()

    def _substep(self, heading, period):
        u, N = self.unit, self.num_agents
        dx, dy, distance = self._distance()

        # 1. Enemies keep, or choose, a target.
        self._acquire(distance, slice(N, None), slice(0, N))
        if self.mirror:
            self._acquire(distance, slice(0, N), slice(N, None))
        t = self.target.clamp(min=0)  # (U, B)
        dx_t, dy_t, distance_t = (d.gather(1, t[:, None])[:, 0] for d in (dx, dy, distance))  # (U, B)
        has = (self.target >= 0) & (distance_t < 100)  # not one that has died since
        near = has & (distance_t <= self.reach + u.radius[:, 0][t])

        # 4. (worked out first, from where everybody stands now) Walk to the target, or where told, or to the goal.
        goal_x, goal_y = self.goal_x - self.x, self.goal_y - self.y
        goal = (goal_x * goal_x + goal_y * goal_y).sqrt()
        walk_x, walk_y = (torch.where(goal > 1, g / goal, 0.0) for g in (goal_x, goal_y))
        if not self.mirror:
            walk_x, walk_y = torch.cat([heading[0], walk_x[N:]]), torch.cat([heading[1], walk_y[N:]])
        chase, length = has & ~near, u.speed * DT * (self.pause <= 0)
        overlap = (self.keep_apart - distance).clamp_(min=0).div_(distance).mul_(0.5)  # (U, U, B)
        to_x, to_y = (
            p + length * torch.where(chase, d_t / distance_t, torch.where(near, 0.0, walk))
            - (overlap * d).sum(1).clamp_(-0.3, 0.3)
            for p, d, d_t, walk in ((self.x, dx, dx_t, walk_x), (self.y, dy, dy_t, walk_y))
        )  # fmt: skip

        # 2. Fire.
        fire = near & (self.cooldown <= 0)
        self.cooldown = torch.where(fire, period, self.cooldown) - DT
        self.pause = torch.where(fire, u.pause, self.pause - DT)
        raw = torch.zeros_like(self.x).scatter_add_(0, t, self.damage[self.row + t] * fire)  # whole numbers: exact
        hits = torch.zeros_like(self.x).scatter_add_(0, t, u.hits * fire)

        # 3. Shields first; armour takes its part of what comes through.
        absorbed = torch.minimum(self.shield, raw)
        through = raw - absorbed
        wound = (through - u.armour * hits * through / raw.clamp(min=1)).clamp_(min=0)
        alive = self.health > 0
        health = torch.minimum(self.health + u.healing * DT * alive, u.health) - wound
        self.quiet = torch.where(raw > 0, 0.0, self.quiet + DT)
        returns = SHIELD_RATE * DT * (alive & (self.quiet > SHIELD_DELAY))
        alive = health > 0
        self.health = health * alive
        self.shield = torch.minimum(self.shield - absorbed + returns, u.shield) * alive

        # 4. Move, first along x, then along y, unless a wall stands there. The dead go to the graveyard.
        x = torch.where(self._free(to_x, self.y), to_x, self.x)
        y = torch.where(self._free(x, to_y), to_y, self.y)
        self.x, self.y = torch.where(alive, x, self.grave), torch.where(alive, y, self.grave)

    def _acquire(self, distance, side, foes):
        """Rule 1 for the units in the slice `side`: keep a target in scan range, else take the nearest one there."""
        distance, old = distance[side, foes], self.target[side] - foes.start
        alert = ALERT_SCAN * (self.quiet[side, None] < ALERT)
        seen = distance <= self.scan[side, foes] + alert  # (side, foes, B)
        keep = (old >= 0) & seen.gather(1, old.clamp(min=0)[:, None])[:, 0]  # (side, B)
        gap, nearest = torch.where(seen, distance - self.unit.radius[foes], torch.inf).min(1)
        found = torch.where(gap < torch.inf, nearest + foes.start, -1)
        self.target[side] = torch.where(keep, self.target[side], found)
        new = ~keep & (found >= 0)
        self.cooldown[side] = torch.where(new, self.cooldown[side].clamp(min=REACTION), self.cooldown[side])

    def _free(self, x, y):
        """Whether one can stand at (x, y), any shape."""
        column, row = ((p + 1).long().clamp_(0, MAP_SIZE + 1) for p in (x, y))
        return self.walk[column * (MAP_SIZE + 2) + row]

    # ------------------------------------------------------------ what the agents get
    def _available(self, distance):
        """Which actions are available, (N, A, B) bool."""
        N, alive = self.num_agents, self.health > 0
        mine = alive[:N, None]  # (N, 1, B)
        x, y = self.x[:N, None] + self.step_x[2:6, None], self.y[:N, None] + self.step_y[2:6, None]  # (N, 4, B)
        return torch.cat([~mine, mine, self._free(x, y) & mine, distance[:N, N:] <= SHOOT], 1)

    def _observe(self):
        """Observations and info of SMAC's layout, entry for entry."""
        N, u = self.num_agents, self.unit
        dx, dy, distance = self._distance()
        avail, alive = self._available(distance), (self.health > 0).float()
        health, shield = self.health / u.health, self.shield / u.shield.clamp(min=1)
        body = [torch.stack([h, s][: 1 + has], 1) for h, s, has in zip(
            (health[:N], health[N:]), (shield[:N], shield[N:]), self.shields)]  # fmt: skip
        bits = self.bits * alive[:, None]  # (U, K, B)
        body = [torch.cat([b, k], 1) for b, k in zip(body, (bits[:N], bits[N:]))]  # health, shield, type: (N|M, F, B)

        near = (distance[:N] < SIGHT).float()  # (N, U, B); the dead are far from everybody
        where = torch.stack([distance[:N], dx[:N], dy[:N]], 2) / SIGHT  # (N, U, 3, B)
        enemies = torch.cat([avail[:, 6:, None].float(), where[:, N:], body[1].expand(N, -1, -1, -1)], 2)
        enemies = enemies * near[:, N:, None]
        j = self.others  # (N, N-1)
        i = torch.arange(N, device=self.device)[:, None]
        allies = torch.cat([torch.ones_like(where[i, j, :1]), where[i, j], body[0][j]], 2) * near[i, j][:, :, None]
        pieces = avail[:, 2:6].float(), enemies.flatten(1, 2), allies.flatten(1, 2), body[0]
        obs = torch.cat(pieces, 1).permute(2, 0, 1).contiguous()  # (B, N, O)

        place = torch.stack([self.x, self.y], 1).sub_(MAP_SIZE / 2).div_(MAP_SIZE) * alive[:, None]  # (U, 2, B)
        ready = (self.cooldown[:N].clamp(min=0) / u.cooldown_scale[:N] * alive[:N])[:, None]  # (N, 1, B)
        agents = torch.cat([body[0][:, :1], ready, place[:N], body[0][:, 1:]], 1)
        enemies = torch.cat([body[1][:, :1], place[N:], body[1][:, 1:]], 1)
        numbers = torch.arange(self.num_actions, device=self.device)[:, None]
        last = (self.last_action[:, None] == numbers).float()  # (N, A, B), all 0 after a reset
        state = torch.cat([agents.flatten(0, 1), enemies.flatten(0, 1), last.flatten(0, 1)]).T.contiguous()  # (B, D)
        won = (alive[:N] > 0).any(0) & ~(alive[N:] > 0).any(0)
        return obs, {"state": state, "avail_actions": avail.permute(2, 0, 1).contiguous(), "won": won}


def _formation(units, centre, front):
    """Starting places (n, 2): a compact block whose first column faces `front` (+1 east, -1 west).

    Melee units stand in front. The enemies' block is the agents' one turned by 180 degrees.
    """
    n, spacing = len(units), 2 * max(u.separation for u in units) + 0.05
    rows = int((n - 1) ** 0.5) + 1  # of a nearly square block
    place = [None] * n
    for k, i in enumerate(sorted(range(n), key=lambda i: units[i].range)):
        column, row = divmod(k, rows)
        filled = min(rows, n - column * rows)
        place[i] = (((n - 1) // rows / 2 - column) * spacing, (row - (filled - 1) / 2) * spacing)
    return torch.tensor(centre) + front * torch.tensor(place)


# ---------------------------------------------------------------- scripted teams
def idle(env, info):
    """Stop for ever."""
    return info["avail_actions"][..., 1].long()


def random(env, info):
    """Any available action."""
    weights = info["avail_actions"].flatten(0, 1).float()
    return torch.multinomial(weights, 1, generator=env.generator).view(env.num_envs, env.num_agents)


def nearest(env, info):
    """Attack the nearest enemy within reach; without one, walk to the nearest."""
    return _attack(env, info, lambda distance, life: distance)


def focus(env, info):
    """Attack the weakest enemy within reach; without one, walk to the nearest."""
    return _attack(env, info, lambda distance, life: life)


def kite(env, info):
    """`focus`, but while the weapon is not ready run from enemies closer than 4."""
    N = env.num_agents
    dx, dy, distance = env._distance()
    close = distance[:N, N:] < 4  # (N, M, B)
    pull = close / distance[:N, N:] ** 2  # the nearest counts most
    away = [-(d[:N, N:] * pull).sum(1) for d in (dx, dy)]  # (N, B)
    flee = close.any(1) & (env.cooldown[:N] > 0.15)
    return torch.where(flee.T & (env.health[:N] > 0).T, _walk(env, info, *away), focus(env, info))


def _attack(env, info, cost):
    """The available target that costs least; else a step towards the nearest enemy. (B, N)"""
    N = env.num_agents
    dx, dy, distance = env._distance()
    may = info["avail_actions"][..., 6:].permute(1, 2, 0)  # (N, M, B)
    life = (env.health + env.shield)[N:].expand(N, -1, -1)
    target = torch.where(may, cost(distance[:N, N:], life), torch.inf).argmin(1)  # (N, B)
    closest = N + distance[:N, N:].argmin(1, keepdim=True)
    walk = _walk(env, info, *(d[:N].gather(1, closest)[:, 0] for d in (dx, dy)))
    alive = info["avail_actions"][..., 1]
    return torch.where(may.any(1).T, target.T + 6, walk) * alive


def _walk(env, info, dx, dy):
    """The available step that leads best along (dx, dy), each (N, B); stop if all are barred. Returns (B, N)."""
    gain = env.step_x[2:6, None] * dx[:, None] + env.step_y[2:6, None] * dy[:, None]  # (N, 4, B)
    gain = torch.where(info["avail_actions"][..., 2:6].permute(1, 2, 0), gain, -torch.inf)
    best, step = gain.max(1)
    return torch.where(best > -torch.inf, step + 2, 1).T * info["avail_actions"][..., 1]


POLICIES = {"idle": idle, "random": random, "nearest": nearest, "focus": focus, "kite": kite}


# ---------------------------------------------------------------- the picture and the command line
@dataclass
class Args:
    map: str = "3s_vs_5z"  # 3m, 8m, 2s3z, 3s5z, 3s_vs_5z, 5m_vs_6m or 6h_vs_8z
    policy: str = "kite"  # who commands the agents: idle, random, nearest, focus or kite
    out: Path | None = None  # the animation of one battle; by default runs/smac/MAP-POLICY.gif
    seed: int = 0
    battles: int = 0  # also play so many battles and print win rate, mean return and mean length


def play(env, policy, seed=0, watch=lambda: None):
    """Play every battle to its end, calling `watch()` after each step. Returns won, return and length, each (B,)."""
    _, info = env.reset(seed=seed)
    total, over = torch.zeros(env.num_envs, device=env.device), torch.zeros((), dtype=torch.bool)
    while not over.all():
        _, reward, terminated, truncated, info = env.step(policy(env, info))
        total, over = total + reward, terminated | truncated
        watch()
    return info["won"], total, env.elapsed


class Filmed(Smac):
    """One battle that keeps a film of itself: `frames` grows by a picture whenever `watch` is called."""

    def __init__(self, task):
        super().__init__(task)
        self.frames, self.shots = [], []
        self.figure, self.axes = open_figure(self.battle)

    def _substep(self, heading, period):
        x, y, cooldown = self.x, self.y, self.cooldown.clone()
        super()._substep(heading, period)
        fired = (self.cooldown > cooldown) & (self.cooldown > REACTION)  # choosing a target never lifts it so high
        for i in fired[:, 0].nonzero()[:, 0].tolist():
            ends = [i, self.target[i, 0].item()]
            self.shots.append((x[ends, 0].tolist(), y[ends, 0].tolist(), colour_of(self, i)))

    def watch(self):
        """Draw the battle, with the shots since the last picture."""
        draw_battle(self.axes, self)
        for x, y, colour in self.shots:
            self.axes.plot(x, y, color=colour, linewidth=1, zorder=3)
        image = Image.fromarray(pixels(self.figure))
        # The first picture's colours serve all, so that the film does not flicker and stays small.
        self.frames.append(image.quantize(palette=self.frames[0], dither=0) if self.frames else image.quantize(64))
        self.shots = []


def open_figure(battle):
    """A figure that the battle fills but for a title, and its axes."""
    x0, x1, y0, y1 = zip(*battle.walkable)
    box = min(x0) - 0.5, max(x1) + 0.5, min(y0) - 0.5, max(y1) + 0.5
    high = 5.5 * (box[3] - box[2]) / (box[1] - box[0])  # inches, for a width of 5.5
    figure = Figure(figsize=(5.5, high + 0.3), dpi=80)
    return figure, figure.add_axes((0, 0, 1, high / (high + 0.3)), xlim=box[:2], ylim=box[2:])


def colour_of(env, i):
    return "#2c3e87" if i < env.num_agents else "#c0392b"


def draw_battle(axes, env, aims=()):
    """The first battle: walls, the living with their health and shield as bars, and for (i, j) in `aims` a line."""
    box, N = (axes.get_xlim(), axes.get_ylim()), env.num_agents
    axes.clear()
    axes.set(xlim=box[0], ylim=box[1], xticks=[], yticks=[], facecolor="#6b655b")
    alive = env.health[:, 0] > 0
    agents, enemies = alive[:N].sum(), alive[N:].sum()
    title = f"step {env.elapsed[0]}: {agents} of {N} agents (blue), {enemies} of {len(alive) - N} enemies (red)"
    axes.set_title(title, fontsize=10)
    for x0, x1, y0, y1 in env.battle.walkable:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor="#f4efe4"))
    for i, j in aims:
        ends = ((axis[i, 0].item(), axis[j, 0].item()) for axis in (env.x, env.y))
        axes.plot(*ends, color=colour_of(env, i), linewidth=0.6, alpha=0.5)
    for i in alive.nonzero()[:, 0].tolist():
        x, y, r = (v[i, 0].item() for v in (env.x, env.y, env.unit.radius))
        axes.add_patch(Circle((x, y), r, facecolor=colour_of(env, i)))
        for name, height, colour in (("health", 0.1, "#3a9d4a"), ("shield", 0.3, "#5aa9e6")):
            if full := getattr(env.unit, name)[i, 0].item():
                left = getattr(env, name)[i, 0].item() / full
                axes.add_patch(Rectangle((x - r, y + r + height), 2 * r * left, 0.2, facecolor=colour, zorder=2))


def main(args):
    if args.policy not in POLICIES:
        raise ValueError(f"there is no policy {args.policy!r}: choose one of {', '.join(POLICIES)}")
    if args.battles < 0 or not 0 <= args.seed < 2**63:
        raise ValueError("--battles and --seed must not be negative, and --seed must be below 2^63")
    env, policy = Filmed(args.map), POLICIES[args.policy]
    out = args.out or Path("runs") / "smac" / f"{args.map}-{args.policy}.gif"
    if out.suffix != ".gif":
        raise ValueError(f"--out {out} must end in .gif")
    out.parent.mkdir(parents=True, exist_ok=True)
    won, total, length = play(env, policy, args.seed, env.watch)
    film, part = io.BytesIO(), out.with_name(out.name + ".part")
    held = [125] * (len(env.frames) - 1) + [2000]  # milliseconds: eight steps a second, and a rest at the end
    env.frames[0].save(film, "GIF", save_all=True, append_images=env.frames[1:], duration=held, loop=0)
    try:  # whole or not at all
        part.write_bytes(film.getvalue())
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    end = "won" if won.item() else "not won"
    print(f"{out}: {args.map}, {args.policy}, {end} after {length.item()} steps, return {total.item():.2f}")
    if args.battles:
        numbers = play(Smac(args.map, args.battles), policy, args.seed)
        rate, total, length = (x.double().mean().item() for x in numbers)
        print(f"{args.battles} battles: win rate {rate:.3f}, mean return {total:.2f}, mean length {length:.1f}")


if __name__ == "__main__":
    try:
        from data import flags

        main(flags.read(Args, description=__doc__.splitlines()[0]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
