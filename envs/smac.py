"""StarCraft micromanagement without StarCraft: hundreds of SMAC-like battles at once, as tensors.

A team of agents, one for each unit, fights units that a fixed rule commands. What an agent sees,
its actions, the state, the shaped reward and the time limits are those of SMAC (Samvelyan et al.,
2019), entry for entry. The fight itself is a simulator of our own: the units' figures and the maps
are StarCraft II's, the physics is simplified, and results are *not* comparable with published SMAC
numbers. `envs/sc2.py` plays the real game behind the same interface.

One step is half a second: eight substeps of 1/16 s. In each,
  1. enemies choose targets: they keep one while it stays within their scan range, else take the
     nearest, and need 0.3 s before the first shot at a new one; without a target they walk to the
     place where the agents started;
  2. whoever has a living target in range and a ready weapon hits it; all hits of a substep land
     together;
  3. shields absorb damage first and know no armour; they come back 10 s after the last hit;
  4. units walk, are pushed apart where they overlap, and stop at walls.
Left out: facing, acceleration, projectiles, flying units, healers, terrain height.

Tensors are unit-major, (U, B): agents first, then enemies; the battles lie last, so that the
pairwise tensors (U, U, B) have a long contiguous dimension: several times as fast on a CPU as (B,
U, U). Dead units wait in a graveyard, far from everything and from one another, and so need no
masks.

Actions: 0 nothing (the dead can do nothing else), 1 stop, 2 north, 3 south, 4 east, 5 west, 6 + j
attack enemy j. A move lasts the whole step. Attacking is allowed up to distance 6 between the
centres, whatever the weapon; a unit walks up to its target if it has to. Units on the agents' side
do nothing on their own.

Shapes: B battles, N agents, M enemies, U = N + M units, A = 6 + M actions.
"""

from collections import Counter
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from envs.common import TensorGame, check_actions, check_shape, describe, games_to_reset, pixels

SUBSTEPS, DT = 8, 1 / 16  # seconds; one step is 0.5 s of the game's "Normal" speed
SIGHT, SHOOT = 9.0, 6.0  # how far an agent sees, and how far it may name a target
SCAN = 5.0  # how far an enemy looks, from edge to edge; its weapon's range if that is longer
ALERT, ALERT_SCAN = 3.0, 2.0  # hit in the last 3 s, it looks 2 farther: it answers from afar
REACTION = 0.3  # seconds between choosing a target and the first shot
SHIELD_DELAY, SHIELD_RATE = 10.0, 2.0  # after 10 s without a hit, 2 points a second return
JITTER, COOLDOWN_NOISE = 0.1, (-1 / 16, 2 / 16)  # of starting places; of a period, in seconds
KILL, WIN, SCALE = 10, 200, 20  # the reward of a kill and of a win; a clean win sums to 20
MAP_SIZE = 32
MEMORY = "x y health shield cooldown pause quiet target last_action elapsed".split()
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
    healing: float = 0.0  # health a second


UNITS = {
    "marine": Unit(45, 0, 0, False, 6, 0, 1, 0.861, 5, 2.25, 0.375, 0.375, 0.05, 15 / 16),
    "stalker": Unit(80, 80, 1, True, 13, 5, 1, 1.87, 6, 2.953, 0.625, 0.625, 0.17, 35 / 16),
    "zealot": Unit(100, 50, 1, False, 8, 0, 2, 1.2, 0.1, 2.25, 0.5, 0.375, 0.28, 22 / 16),
    "hydralisk": Unit(80, 0, 0, False, 12, 0, 1, 0.83, 5, 2.25, 0.625, 0.5, 0.15, 10 / 16, 0.273),
}


class Map(NamedTuple):
    """A battle: how many of which unit, its limit in steps, where they start, and the ground."""

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


class Smac(TensorGame):
    """B battles on one map.

    `info` holds "state" (B, D), "avail_actions" (B, N, A) and "won" (B,). A time limit truncates. A
    battle in which both sides fall is terminated and not won. `win` pays even if shields came back
    on the way, so that returns above 20 are possible, as in SMAC.

    Args:
        task: a name in `MAPS`, or a `Map` of your own.
        noise: whether starting places and weapon periods vary.
        check: whether actions are checked, on a CPU. A forbidden one is harmless: it is clipped to
            the valid numbers, and nobody can walk through walls or shoot the dead.

    `_play` and `_begin` draw nothing, so that both can be graphs. Compiled for a CPU, sums are
    rounded in another order: a battle follows the one that it would have been to some 1e-7, until
    that decides who is nearest or in range.
    """

    memory = MEMORY

    def __init__(self, task, num_envs=1, device="cpu", noise=True, check=True):
        self.battle = MAPS[task] if isinstance(task, str) else task
        self.noise = noise
        self.check = check and torch.device(device).type == "cpu"
        agents, enemies = (list(Counter(side).elements()) for side in self.battle[:2])
        self.unit_names, self.num_enemies = agents + enemies, len(enemies)
        # SMAC tells a unit's health, its shield if its side has any, its type if there are several.
        self.shields = [any(UNITS[name].shield for name in side) for side in (agents, enemies)]
        self.types = sorted(set(self.unit_names)) if len(self.battle.agents) > 1 else []
        own, foe = (int(shield) + len(self.types) for shield in self.shields)
        N, M, A = len(agents), len(enemies), 6 + len(enemies)
        obs_dim = 4 + M * (5 + foe) + (N - 1) * (5 + own) + 1 + own
        state_dim = N * (4 + own) + M * (3 + foe) + N * A
        describe(self, num_envs, device, N, A, obs_dim, state_dim, self.battle.limit)
        self.generator = torch.Generator(self.device).manual_seed(0)
        units = [UNITS[name] for name in self.unit_names]
        self._prepare_units(units)
        self._prepare_map(units)
        for name in MEMORY[:7]:
            setattr(self, name, torch.zeros(N + M, num_envs, device=self.device).float())
        # The target is a unit's number; -1 is none, also of the last action.
        self.target = torch.full((N + M, num_envs), -1, device=self.device)
        self.last_action = torch.full((N, num_envs), -1, device=self.device)
        self.elapsed = torch.zeros(num_envs, dtype=torch.int64, device=self.device)

    def reset(self, *, seed=None, options=None):
        fresh = games_to_reset(self, options)
        if seed is not None:
            self.generator.manual_seed(seed)
        shift = torch.zeros(2, *self.x.shape, dtype=torch.float32, device=self.device)
        if self.noise:
            shift = JITTER * (2 * shift.uniform_(generator=self.generator) - 1)
        return self._begin(fresh, shift)

    def step(self, actions):
        if self.check:
            avail = self._available(self._distance()[2]).permute(2, 0, 1)
            check_actions(self, actions, avail, self._over())
        else:
            check_shape(self, actions)
        chance = torch.empty_like(self.x).uniform_(generator=self.generator)
        return self._play(actions, chance)

    def compile(self, compiler):
        """As `TensorGame` says; from then on actions are not checked."""
        self.check = False
        super().compile(compiler)

    def picture(self, actions=None):
        """The first battle from above, an array (height, width, 3); bars: life left."""
        figure = Figure(figsize=(5.5, 3.2), dpi=80, layout="constrained")
        axes = figure.subplots()
        for x0, x1, y0, y1 in self.battle.walkable:
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor="#f4efe4"))
        axes.autoscale_view()
        axes.set(aspect="equal", xticks=[], yticks=[], facecolor="#6b655b")
        axes.set_title(f"step {self.elapsed[0]}", fontsize=10)
        x, y = self.x[:, 0].tolist(), self.y[:, 0].tolist()
        life = (self.health + self.shield)[:, :1] / (self.unit.health + self.unit.shield)  # (U, 1)
        radius = self.unit.radius[:, 0].tolist()
        for i in self._alive()[:, 0].nonzero()[:, 0].tolist():
            colour, r = "#2c3e87" if i < self.num_agents else "#c0392b", radius[i]
            axes.add_patch(Circle((x[i], y[i]), r, facecolor=colour))
            corner, length = (x[i] - r, y[i] + r + 0.1), 2 * r * life[i].item()
            axes.add_patch(Rectangle(corner, length, 0.25, facecolor="#3a9d4a", zorder=2))
        return pixels(figure)

    # ------------------------------------------------------------ what stays the same
    def _tensor(self, values):
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def _prepare_units(self, units):
        """What the rules need to know of units and of pairs of them."""
        N, U = self.num_agents, len(units)
        number = torch.arange(U, device=self.device)[:, None]
        self.unit = u = Unit(
            *(self._tensor(field)[:, None] for field in zip(*units))
        )  # (U, 1) each
        damage = [[(a.damage + a.bonus * b.armoured) * a.hits for b in units] for a in units]
        self.damage = self._tensor(damage)  # (U, U) by a on b in one attack
        self.keep_apart = (u.separation + u.separation.T)[..., None]  # (U, U, 1)
        scan = u.range.clamp(min=SCAN) + u.radius + u.radius.T
        self.scan = scan[N:, :N, None]  # (M, N, 1)
        self.reach = u.range + u.radius  # (U, 1) from the centre, to the target's edge
        itself = torch.eye(U, dtype=torch.float32, device=self.device)[..., None]
        self.far = 1e6 * itself  # nobody is near itself
        self.grave = 1e3 * (number + 1).float()  # (U, 1) where the dead wait
        life = sum(unit.health + unit.shield for unit in units[N:])
        self.unit_reward = SCALE / (KILL * self.num_enemies + WIN + life)
        bits = [[name == kind for kind in self.types] for name in self.unit_names]
        self.bits = self._tensor(bits)  # (U, K)
        self.bits[N:] = self.bits[N:].flip(1)  # SMAC writes enemies' types the other way round
        others = [[j for j in range(N) if j != i] for i in range(N)]
        self.others = torch.tensor(others, dtype=torch.int64, device=self.device)  # (N, N-1)

    def _prepare_map(self, units):
        """Where one can walk, and where units start."""
        battle, N = self.battle, self.num_agents
        walk = torch.zeros(MAP_SIZE + 2, MAP_SIZE + 2, dtype=torch.bool)  # with a wall around
        for x0, x1, y0, y1 in battle.walkable:
            walk[x0 + 1 : x1 + 1, y0 + 1 : y1 + 1] = True
        self.walk = walk.flatten().to(self.device)
        starts = _formation(units[:N], battle.start, 1)
        starts += _formation(units[N:], battle.enemy_start, -1)
        self.start_x, self.start_y = self._tensor(starts).T[..., None]  # (U, 1)
        self.step_x, self.step_y = self._tensor(STEP_X), self._tensor(STEP_Y)

    # ------------------------------------------------------------ a step
    def _begin(self, fresh, shift):
        """Start the battles fresh (B,) anew, the units' places moved by shift (2, U, B)."""
        start = dict(x=self.start_x + shift[0], y=self.start_y + shift[1])
        start |= dict(health=self.unit.health, shield=self.unit.shield, quiet=SHIELD_DELAY + 1)
        start |= dict(cooldown=0.0, pause=0.0, target=-1, last_action=-1, elapsed=0)
        for name, value in start.items():
            memory = getattr(self, name)
            memory.copy_(torch.where(fresh, value, memory))
        return self._observe()

    def _play(self, actions, chance):
        """One step of all battles. chance (U, B) in [0, 1): no weapon needs two in a step."""
        N, over = self.num_agents, self._over()
        before = {name: getattr(self, name) for name in MEMORY}
        life, enemies = self._life(), self._alive()[N:].sum(0)
        order = actions.T.clamp(0, self.num_actions - 1)  # (N, B)
        aims = torch.where(order >= 6, order - 6 + N, -1)
        self.target = torch.cat([aims, self.target[N:]])
        self.cooldown = self.cooldown.clone()  # `_acquire` writes into it
        way = order.clamp(max=6)
        heading = self.step_x[way], self.step_y[way]  # (N, B)
        period = self.unit.period
        if self.noise:
            least, most = COOLDOWN_NOISE
            period = period + least + (most - least) * chance
        for _ in range(SUBSTEPS):
            self._substep(heading, period)
        self.last_action, self.elapsed = order, self.elapsed + 1
        for name, old in before.items():  # a finished battle stays put
            old.copy_(torch.where(over, old, getattr(self, name)))
            setattr(self, name, old)

        # SMAC takes the absolute value: a step in which shields only come back pays as well.
        killed = enemies - self._alive()[N:].sum(0)
        obs, info = self._observe()
        reward = (life - self._life() + KILL * killed).abs() + WIN * (info["won"] & ~over)
        terminated = self._fallen()
        truncated = (self.elapsed >= self.time_limit) & ~terminated
        return obs, reward * self.unit_reward * ~over, terminated, truncated, info

    def _alive(self):
        return self.health > 0  # (U, B)

    def _life(self):
        return (self.health + self.shield)[self.num_agents :].sum(0)  # (B,) of the enemies

    def _fallen(self):
        agents, enemies = self._alive().split([self.num_agents, self.num_enemies])
        return ~(agents.any(0) & enemies.any(0))  # (B,) one side, or both

    def _over(self):
        return self._fallen() | (self.elapsed >= self.time_limit)

    # ------------------------------------------------------------ the fight
    def _distance(self):
        """dx, dy and distance from unit i to unit j, each (U, U, B); a unit is far from itself."""
        dx, dy = self.x - self.x[:, None], self.y - self.y[:, None]
        return dx, dy, (dx * dx + dy * dy + self.far).clamp_(min=1e-6).sqrt_()

    def _substep(self, heading, period):
        """The rules 1 to 4.

        Args:
            heading: where agents are told to walk, x and y (N, B).
            period: of the weapons, (U, B).
        """
        gaps = self._distance()
        self._acquire(gaps[2][self.num_agents :, : self.num_agents])
        target = self.target.clamp(min=0)  # (U, B)
        to_target = [d.gather(1, target[:, None])[:, 0] for d in gaps]  # dx, dy, distance: (U, B)
        has = (self.target >= 0) & (to_target[2] < 100)  # not one that has died since
        near = has & (to_target[2] <= self.reach + self.unit.radius[:, 0][target])
        steps = self._steps(gaps, to_target, has, near, heading)  # from where everybody stands
        raw, hits = self._fire(near & (self.cooldown <= 0), target, period)
        self._wound(raw, hits)
        self._move(*steps)

    def _acquire(self, distance):
        """Rule 1: enemies keep a target in scan range, else take the nearest. distance (M, N, B)"""
        N = self.num_agents
        old, cooldown = self.target[N:], self.cooldown[N:]  # (M, B)
        alert = ALERT_SCAN * (self.quiet[N:, None] < ALERT)
        seen = distance <= self.scan + alert  # (M, N, B)
        keep = (old >= 0) & seen.gather(1, old.clamp(min=0)[:, None])[:, 0]  # (M, B)
        gap, nearest = torch.where(seen, distance - self.unit.radius[:N], torch.inf).min(1)
        found = torch.where(gap < torch.inf, nearest, -1)
        new = ~keep & (found >= 0)
        self.target[N:] = torch.where(keep, old, found)
        self.cooldown[N:] = torch.where(new, cooldown.clamp(min=REACTION), cooldown)

    def _fire(self, fire, target, period):
        """Rule 2: those in fire (U, B) shoot. Returns damage and hits that each takes, (U, B)."""
        self.cooldown = torch.where(fire, period, self.cooldown) - DT
        self.pause = torch.where(fire, self.unit.pause, self.pause - DT)
        nothing = torch.zeros_like(self.x)
        damage = self.damage.gather(1, target) * fire  # whole numbers, so that sums are exact
        raw = nothing.scatter_add(0, target, damage)
        return raw, nothing.scatter_add(0, target, self.unit.hits * fire)

    def _wound(self, raw, hits):
        """Rule 3: shields first; armour takes its part of what comes through."""
        u, alive = self.unit, self._alive()
        absorbed = torch.minimum(self.shield, raw)
        through = raw - absorbed
        wound = (through - u.armour * hits * through / raw.clamp(min=1)).clamp_(min=0)
        health = torch.minimum(self.health + u.healing * DT * alive, u.health) - wound
        self.quiet = torch.where(raw > 0, 0.0, self.quiet + DT)
        returns = SHIELD_RATE * DT * (alive & (self.quiet > SHIELD_DELAY))
        alive = health > 0
        self.health = health * alive
        self.shield = torch.minimum(self.shield - absorbed + returns, u.shield) * alive

    def _steps(self, gaps, to_target, has, near, heading):
        """Where units go, x and y (U, B): to a target, as told or to the goal, and apart."""
        N, distance = self.num_agents, gaps[2]
        overlap = (self.keep_apart - distance).clamp_(min=0).div_(distance).mul_(0.5)  # (U, U, B)
        goal_x, goal_y = self.battle.start
        goals = goal_x - self.x[N:], goal_y - self.y[N:]  # (M, B)
        far = (goals[0] * goals[0] + goals[1] * goals[1]).sqrt()
        length, places = self.unit.speed * DT * (self.pause <= 0), []
        for axis, place in enumerate((self.x, self.y)):
            march = torch.where(far > 1, goals[axis] / far, 0.0)
            march = torch.where(near, 0.0, torch.cat([heading[axis], march]))
            pace = length * torch.where(has & ~near, to_target[axis] / to_target[2], march)
            push = (overlap * gaps[axis]).sum(1).clamp_(-0.3, 0.3)
            places.append(place + pace - push)
        return places

    def _move(self, to_x, to_y):
        """Rule 4: first along x, then along y, unless a wall is there. The dead leave."""
        x = torch.where(self._free(to_x, self.y), to_x, self.x)
        y = torch.where(self._free(x, to_y), to_y, self.y)
        alive = self._alive()
        self.x, self.y = torch.where(alive, x, self.grave), torch.where(alive, y, self.grave)

    def _free(self, x, y):
        """Whether one can stand at (x, y), any shape."""
        column, row = ((p + 1).long().clamp_(0, MAP_SIZE + 1) for p in (x, y))
        return self.walk[column * (MAP_SIZE + 2) + row]

    # ------------------------------------------------------------ what the agents get
    def _available(self, distance):
        """Which actions are available, (N, A, B) bool."""
        N, step_x, step_y = self.num_agents, self.step_x[2:6, None], self.step_y[2:6, None]
        mine = self._alive()[:N, None]  # (N, 1, B)
        free = self._free(self.x[:N, None] + step_x, self.y[:N, None] + step_y)  # (N, 4, B)
        return torch.cat([~mine, mine, free & mine, distance[:N, N:] <= SHOOT], 1)

    def _observe(self):
        """Observations and info of SMAC's layout, entry for entry."""
        N, alive = self.num_agents, self._alive()
        gaps = self._distance()
        avail = self._available(gaps[2])
        bodies = self._bodies(alive)
        obs = self._views(gaps, avail, *bodies).permute(2, 0, 1).contiguous()  # (B, N, O)
        state = self._state(alive, *bodies).T.contiguous()  # (B, D)
        won = alive[:N].any(0) & ~alive[N:].any(0)
        avail = avail.permute(2, 0, 1).contiguous()
        return obs, {"state": state, "avail_actions": avail, "won": won}

    def _bodies(self, alive):
        """Health, shield, type of agents (N, F, B) and of enemies (M, F, B), of the dead zeros."""
        sides = [self.num_agents, self.num_enemies]
        health = (self.health / self.unit.health).split(sides)
        shield = (self.shield / self.unit.shield.clamp(min=1)).split(sides)
        kind = (self.bits[..., None] * alive[:, None]).split(sides)  # (U, K, B)
        bodies = []
        for side, shown in enumerate(self.shields):
            parts = [health[side][:, None], shield[side][:, None], kind[side]]
            bodies.append(torch.cat(parts if shown else parts[::2], 1))
        return bodies

    def _views(self, gaps, avail, agents, enemies):
        """Moves that are free, enemies in sight, other agents in sight, and oneself: (N, O, B)."""
        N, (dx, dy, distance) = self.num_agents, (gap[: self.num_agents] for gap in gaps)
        near = (distance < SIGHT).float()[:, :, None]  # (N, U, 1, B); the dead are far from all
        where = torch.stack([distance, dx, dy], 2) / SIGHT  # (N, U, 3, B)
        shots = avail[:, 6:, None].float()
        foes = torch.cat([shots, where[:, N:], enemies.expand(N, -1, -1, -1)], 2) * near[:, N:]
        i, j = torch.arange(N, device=self.device)[:, None], self.others  # (N, N-1)
        there = torch.ones_like(where[i, j, :1])
        friends = torch.cat([there, where[i, j], agents[j]], 2) * near[i, j]
        pieces = avail[:, 2:6].float(), foes.flatten(1, 2), friends.flatten(1, 2), agents
        return torch.cat(pieces, 1)

    def _state(self, alive, agents, enemies):
        """All agents, all enemies, and the agents' last actions: (D, B)."""
        N = self.num_agents
        place = (torch.stack([self.x, self.y], 1) - MAP_SIZE / 2) / MAP_SIZE  # (U, 2, B)
        place = place * alive[:, None]
        ready = self.cooldown[:N].clamp(min=0) / self.unit.cooldown_scale[:N] * alive[:N]
        agents = torch.cat([agents[:, :1], ready[:, None], place[:N], agents[:, 1:]], 1)
        enemies = torch.cat([enemies[:, :1], place[N:], enemies[:, 1:]], 1)
        numbers = torch.arange(self.num_actions, device=self.device)[:, None]
        last = (self.last_action[:, None] == numbers).float()  # (N, A, B), all 0 after a reset
        return torch.cat([agents.flatten(0, 1), enemies.flatten(0, 1), last.flatten(0, 1)])


def _formation(units, centre, front):
    """Starting places, n pairs: a block whose first column faces `front` (+1 east, -1 west).

    Melee units stand in front. The enemies' block is the agents' one turned by 180 degrees.
    """
    n, spacing = len(units), 2 * max(unit.separation for unit in units) + 0.05
    rows = int((n - 1) ** 0.5) + 1  # of a nearly square block
    place = [None] * n
    for k, i in enumerate(sorted(range(n), key=lambda i: units[i].range)):
        column, row = divmod(k, rows)
        filled = min(rows, n - column * rows)
        x, y = (n - 1) // rows / 2 - column, row - (filled - 1) / 2
        place[i] = (x * spacing, y * spacing)
    return (torch.tensor(centre) + front * torch.tensor(place)).tolist()


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
    """The free step that leads best along (dx, dy), each (N, B); stop if all are barred. (B, N)"""
    step_x, step_y = env.step_x[2:6, None], env.step_y[2:6, None]
    gain = step_x * dx[:, None] + step_y * dy[:, None]  # (N, 4, B)
    may = info["avail_actions"][..., 2:6].permute(1, 2, 0)
    best, step = torch.where(may, gain, -torch.inf).max(1)
    return torch.where(best > -torch.inf, step + 2, 1).T * info["avail_actions"][..., 1]


POLICIES = {"idle": idle, "random": random, "nearest": nearest, "focus": focus, "kite": kite}
