"""Bodies shared by a team: Gymnasium's own MuJoCo HalfCheetah, Reacher and Ant, split into agents.

    envs.make("halfcheetah", "2x3")       2 agents: hind leg, front leg; 13 entries each (OG-MARL's vaults)
    envs.make("reacher", "leader-only")   2 agents, one joint each; all-observant, independent or leader-only
    envs.make("ant", "partial")           4 agents, one leg each; full or partial

Physics, starting states and rewards are those of Gymnasium's HalfCheetah-v5, Reacher-v5 and Ant-v5: a test steps both
side by side and asks for the same bits. `VIEWS` says which joints an agent moves and what it sees, by name.

The state is what the papers' datasets hold:
  halfcheetah   17 entries: Gymnasium's observation, all positions but x and all velocities. Only the agents see x.
  reacher       11 entries, the layout of v2 to v4: v5's ten, then the fingertip's height above the target, always 0.
                Entry 3, sin θ2, tells how the arm bends: counter-clockwise, seen from above, where it is positive.
  ant           27 entries as in D4RL: Gymnasium's observation without contact forces.

Rewards, in the versions that the papers' datasets were recorded with (v2) and here:
  halfcheetah   the same: forward speed - 0.1 |action|^2.
  reacher       -distance - |action|^2. v5 takes the distance after the step, v2 took it before: a return is higher
                by the first distance minus the last, about 0.2 for a team that arrives.
  ant           forward speed + 1 - 0.5 |action|^2, without the contact cost, which D4RL's MuJoCo left at zero as well.
                v2 paid the 1 for being alive also in the step in which the ant falls.
An ant is terminated when its torso leaves the heights 0.2 to 1.0; the others only end by their time limit.

In the ant, each agent drives the leg that it sees. MOMA-PPO's paper says so too; its code gives torques (2i, 2i + 1) to
agent i, which sees leg i + 1, but the order of Ant's motors is leg 4, 1, 2, 3.

Each game has its own `mujoco.MjData`, and one loop steps them; all else is NumPy over the batch. `mujoco.rollout` would
not be exact: it forgets from call to call where MuJoCo's solver had stopped. Scores depend on MuJoCo's version, which
requirements.txt pins.

Shapes: B games, N agents, A motors of one agent, F entries, O entries of the longest view.
"""

import os
import sys
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from matplotlib.figure import Figure

from envs.common import METADATA, check_actions, describe, games_to_reset


class Body(NamedTuple):
    """A body of Gymnasium's: what it is called there, and the names of its entries, "v." before a velocity."""

    name: str
    entries: str
    hidden: int = 0  # so many entries at the start are not in the state
    options: dict = {}  # for gymnasium.make


def _speeds(names):
    return " ".join(f"v.{name}" for name in names.split())


CHEETAH = "x z pitch bthigh bshin bfoot fthigh fshin ffoot"  # b: hind leg, f: front leg
TORSO = "z qw qx qy qz"  # height and orientation
TURNS = _speeds("roll_rate pitch_rate yaw_rate")
LEGS = (
    "hip_1 ankle_1 hip_2 ankle_2 hip_3 ankle_3 hip_4 ankle_4"  # front left, right, back left, right
)
ANT = f"{TORSO} {LEGS} v.x v.y v.z {TURNS} {_speeds(LEGS)}"
REACHER = "cos_1 cos_2 sin_1 sin_2 target_x target_y v.joint0 v.joint1 gap_x gap_y gap_z"
NO_CONTACTS = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0}
BODIES = {
    "halfcheetah": Body("HalfCheetah-v5", f"{CHEETAH} {_speeds(CHEETAH)}", hidden=1),
    "reacher": Body("Reacher-v5", REACHER),  # gap: fingertip - target
    "ant": Body("Ant-v5", ANT, options=NO_CONTACTS),
}


def _leg(side, other):
    """A leg's joints, from the ground up, and what its agent sees: it, the other thigh, the torso."""
    joints = f"{side}foot {side}shin {side}thigh"
    own = " ".join(f"{joint} v.{joint}" for joint in joints.split())
    return joints, f"{own} {other}thigh v.x v.pitch v.z x pitch z"


def _quarter(i, torso=""):
    """A leg of the ant likewise: it, and the torso."""
    return f"hip_{i} ankle_{i}", f"{torso} hip_{i} v.hip_{i} ankle_{i} v.ankle_{i}"


# For each task and agent: the joints that it moves, in the order of its actions, and the entries that it sees.
ARM = ("cos_1 sin_1 v.joint0", "cos_2 sin_2 v.joint1")  # upper arm, forearm
TARGET = "target_x target_y"
VIEWS = {
    "halfcheetah": {"2x3": (_leg("b", "f"), _leg("f", "b"))},
    "reacher": {
        "all-observant": (("joint0", REACHER), ("joint1", REACHER)),
        "independent": (("joint0", f"{ARM[0]} {TARGET}"), ("joint1", f"{ARM[1]} {TARGET}")),
        "leader-only": (
            ("joint0", f"{ARM[0]} {ARM[1]} {TARGET}"),
            ("joint1", f"{ARM[0]} {ARM[1]}"),
        ),
    },
    "ant": {
        "full": tuple((f"hip_{i} ankle_{i}", ANT) for i in (1, 2, 3, 4)),
        "partial": (
            _quarter(1, f"{TORSO} {TURNS} v.x v.y v.z"),
            _quarter(2),
            _quarter(3),
            _quarter(4),
        ),
    },
}


def draw_convention(states, seeds, title):
    """How the arm bends in games of the reacher, over the place of the target: its entry 3, sin θ2, as a mean.

    Args:
        states: (S E, T+1, 11) of E games of each seed.
    Returns:
        Whether it bends counter-clockwise, (S, E), and a picture with a field for each seed.
    """
    states = states.unflatten(0, (len(seeds), -1))[..., :-1, :].cpu()
    x, y, bend = (states[..., entry].mean(-1) for entry in (4, 5, 3))  # (S, E) each
    figure = Figure(figsize=(2.6 * len(seeds), 2.9), layout="constrained")
    for s, axes in enumerate(figure.subplots(1, len(seeds), squeeze=False)[0]):
        axes.scatter(x[s], y[s], c=bend[s], cmap="coolwarm", vmin=-1, vmax=1, s=14)
        axes.set(title=f"seed {seeds[s]}", aspect="equal", xlabel="target x", ylabel="target y")
    figure.suptitle(f"{title}: mean sin θ2", fontsize=9)
    return bend > 0, figure


class MultiAgentMujoco(VectorEnv):
    """B bodies, each moved by a team of N agents.

    Each game has its own random stream, made from the seed and the game's number: game b is the same in a batch of
    any size, and a partial reset leaves the others' streams alone. `reset(seed=...)` with a mask seeds only its games.

    `qpos`, `qvel` and `xpos` are lists with one NumPy view of MuJoCo's float64 arrays for each game.

    Args:
        body: a key of `BODIES`.
        task: a key of `VIEWS[body]`.
        time_limit: in steps; Gymnasium's own if None.
        limits: how far joints turn, {name: (least, most)} in radians, where it is not as far as in Gymnasium's model:
            {"joint1": (0, 3)} gives the reacher an elbow that bends only counter-clockwise.
    Raises:
        ValueError: MuJoCo cannot be loaded, limits of no joint or no interval.
        FloatingPointError: in `step`, a simulation has become unstable (MuJoCo itself also notes it in a file
            MUJOCO_LOG.TXT). Reset that game to go on.
    """

    metadata = METADATA

    def __init__(self, body, task, num_envs=1, device="cpu", time_limit=None, limits=None):
        spec, self.body, self.mujoco = BODIES[body], body, _mujoco()
        self.renderer = None  # made when a picture is asked for
        self.plain = gymnasium.make(
            spec.name, **spec.options
        ).unwrapped  # lends its model, and resets the games
        self.model = self.plain.model
        for name, span in (limits or {}).items():
            self._limit(name, span)
        # By default MuJoCo quietly puts an unstable body back to its starting place. Let it show instead.
        self.model.opt.disableflags |= self.mujoco.mjtDisableBit.mjDSBL_AUTORESET

        joints, views = zip(*((moves.split(), sees.split()) for moves, sees in VIEWS[body][task]))
        driven = [self.model.joint(i).name for i in self.model.actuator_trnid[:, 0]]
        self.motors = np.array([[driven.index(joint) for joint in own] for own in joints])  # (N, A)
        names, longest = spec.entries.split(), max(map(len, views))
        padding = len(names)  # the number of a zero after the entries
        columns = np.full((len(views), longest), padding)
        for i, view in enumerate(views):
            columns[i, : len(view)] = [names.index(name) for name in view]
        self.columns, self.hidden = columns, spec.hidden  # (N, O)
        N, A = self.motors.shape
        limit = gymnasium.spec(spec.name).max_episode_steps if time_limit is None else time_limit
        state_dim = len(names) - spec.hidden
        describe(self, num_envs, device, N, A, longest, state_dim, limit, discrete=False)

        self.data = [self.mujoco.MjData(self.model) for _ in range(num_envs)]
        self.qpos, self.qvel, self.xpos, self.ctrl = (
            [getattr(data, name) for data in self.data] for name in ("qpos", "qvel", "xpos", "ctrl")
        )
        self.streams = [np.random.default_rng((0, b)) for b in range(num_envs)]
        self.elapsed = np.zeros(num_envs, dtype=np.int64)
        self.fallen = np.zeros(num_envs, dtype=bool)
        self.entries, self.place = np.zeros((num_envs, len(names))), np.zeros(num_envs)
        self._restart(range(num_envs))

    def reset(self, *, seed=None, options=None):
        games = games_to_reset(self, options).nonzero()[:, 0].tolist()
        if seed is not None:
            for b in games:
                self.streams[b] = np.random.default_rng((seed, b))
        self._restart(games)
        return self._observe()

    def step(self, actions):
        actions = actions.detach().cpu()
        check_actions(self, actions)
        torques = np.empty((self.num_envs, self.motors.size))
        torques[:, self.motors] = actions.double().numpy()  # (B, N, A) into (B, motors)
        over, place = self.fallen | (self.elapsed >= self.time_limit), self.place
        for b in np.flatnonzero(~over):
            self.ctrl[b][:] = torques[b]
            self.mujoco.mj_step(self.model, self.data[b], self.plain.frame_skip)
        self._read()
        self.elapsed = self.elapsed + ~over

        if self.body == "ant":
            low, high = self.plain._healthy_z_range
            self.fallen = (self.entries[:, 0] < low) | (self.entries[:, 0] > high)
        reward = self._reward((self.place - place) / self.plain.dt, np.square(torques).sum(-1))
        truncated = (self.elapsed >= self.time_limit) & ~self.fallen
        ends = self._tensor(self.fallen), self._tensor(truncated)
        obs, info = self._observe()
        return obs, self._tensor(reward * ~over), *ends, info

    def set_state(self, state):
        """Put all games into states (B, D) as `info["state"]` gives them, with their clocks at 0; returns obs and info.

        What a state leaves out, the place in the world, is 0. A reacher's gap is made from its joints: after a step
        MuJoCo's own lags behind them by a part of a step.
        """
        self.elapsed[:], self.fallen[:] = 0, False
        for b, x in enumerate(state.double().cpu().numpy()):
            if self.body == "reacher":
                self.qpos[b][:] = *np.arctan2(x[2:4], x[:2]), *x[4:6]
                self.qvel[b][:] = *x[6:8], 0, 0
            else:
                places = len(self.qpos[b])
                entries = np.zeros(places + len(self.qvel[b]))
                entries[-len(x) :] = x
                self.qpos[b][:], self.qvel[b][:] = entries[:places], entries[places:]
            self.data[b].qacc_warmstart[:] = (
                0  # or what was played before would show in the last digits
            )
            self.mujoco.mj_forward(self.model, self.data[b])
        self._read()
        return self._observe()

    def picture(self, actions=None):
        """The first game through MuJoCo's renderer, as an array (height, width, 3).

        Raises:
            ValueError: no renderer works here.
        """
        remedy = "set MUJOCO_GL to egl or osmesa, and install that library (libegl1, libosmesa6)"
        screen = os.environ.get("DISPLAY") or os.environ.get("MUJOCO_GL", "").lower() in (
            "egl",
            "osmesa",
        )
        if sys.platform == "linux" and not screen:
            raise ValueError(f"MuJoCo cannot draw without a display: {remedy}")
        try:
            if self.renderer is None:
                self.renderer = self.mujoco.Renderer(self.model, 240, 320)
            camera = -1 if self.body == "reacher" else "track"
            self.renderer.update_scene(self.data[0], camera)
            return self.renderer.render()
        except Exception as error:  # of OpenGL, which has many kinds
            why = f"{type(error).__name__}: {remedy}"
            raise ValueError(f"MuJoCo cannot draw on this machine: {why}") from None

    def close_extras(self, **kwargs):
        if self.renderer is not None:
            self.renderer.close()
        self.plain.close()

    def _limit(self, name, span):
        """Let the joint `name` turn within `span` only."""
        joints = [self.model.joint(i).name for i in np.flatnonzero(self.model.jnt_limited)]
        if name not in joints or len(span) != 2 or not span[0] < span[1]:
            remedy = f"give [least, most] for one of {', '.join(joints)}"
            raise ValueError(f"{self.body} cannot have the limits {name}: {span}: {remedy}")
        self.model.joint(name).range = span

    def _restart(self, games):
        """Gymnasium's own reset, with each game's data and random stream lent to it in turn."""
        for b in games:
            self.plain.data, self.plain.np_random = self.data[b], self.streams[b]
            self.plain.reset()
            self.elapsed[b], self.fallen[b] = 0, False
        self._read()

    def _read(self):
        """Fetch the entries (B, F), and the place (B,) whose change is the forward speed, from MuJoCo."""
        qpos, qvel, xpos = (
            np.array(self.qpos),
            np.array(self.qvel),
            np.array(self.xpos),
        )  # (B, ...), copies
        stable = np.abs(np.concatenate([qpos, qvel], -1)) < 1e10  # MuJoCo's own bound; not of NaN
        if not stable.all():
            b = stable.all(-1).argmin()
            raise FloatingPointError(
                f"{self.body}: MuJoCo became unstable in game {b}, {self.elapsed[b]} steps after its start: "
                "its state is not finite (start the game anew with reset)"
            )
        if self.body == "halfcheetah":
            self.entries, self.place = np.concatenate([qpos, qvel], -1), qpos[:, 0]
        elif self.body == "ant":
            self.entries, self.place = (
                np.concatenate([qpos[:, 2:], qvel], -1),
                xpos[:, 1, 0],
            )  # the torso
        else:
            angle, gap = qpos[:, :2], xpos[:, 3] - xpos[:, 4]  # fingertip - target
            parts = np.cos(angle), np.sin(angle), qpos[:, 2:], qvel[:, :2], gap
            self.entries = np.concatenate(parts, -1)

    def _reward(self, speed, effort):
        """What a step pays, (B,); speed: forward; effort: |action|^2."""
        if self.body == "halfcheetah":
            return speed - 0.1 * effort
        if self.body == "ant":
            return speed + ~self.fallen - 0.5 * effort
        return -np.sqrt(np.square(self.entries[:, 8:]).sum(-1)) - effort

    def _observe(self):
        padded = np.concatenate([self.entries, np.zeros((self.num_envs, 1))], -1)
        state = self._tensor(self.entries[:, self.hidden :])
        return self._tensor(padded[:, self.columns]), {"state": state}

    def _tensor(self, array):
        """A copy on the device; numbers as float32."""
        kind = torch.bool if array.dtype == bool else torch.float32
        return torch.tensor(array, dtype=kind, device=self.device)


def _mujoco():
    """The library; ValueError if it is not there."""
    try:
        import mujoco  # here, so that games without bodies start without it
    except Exception as error:  # also of the library that MUJOCO_GL asks for, which has many kinds
        remedy = "pip install mujoco"
        if "MUJOCO_GL" in os.environ:
            remedy = f"MUJOCO_GL={os.environ['MUJOCO_GL']} needs its library (libegl1, libosmesa6)"
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"MuJoCo cannot be loaded ({why}): {remedy}") from None
    return mujoco
