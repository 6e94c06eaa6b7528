"""Bodies shared by a team: Gymnasium's own MuJoCo HalfCheetah, Reacher and Ant, split into agents.

    envs.make("halfcheetah", "2x3")       2 agents: hind leg, front leg; 13 entries each (OG-MARL's
    vaults) envs.make("reacher", "leader-only")   2 agents, one joint each; all-observant,
    independent or leader-only envs.make("ant", "partial")           4 agents, one leg each; full or
    partial

Physics, starting states and rewards are those of Gymnasium's HalfCheetah-v5, Reacher-v5 and Ant-v5:
a test steps both side by side and asks for the same bits. `VIEWS` says which joints an agent moves
and what it sees, by name.

The state is what the papers' datasets hold:
  halfcheetah   17 entries: Gymnasium's observation, all positions but x and all velocities. Only
                the agents see x.
  reacher       11 entries, the layout of v2 to v4: v5's ten, then the fingertip's height above the
                target, always 0. Entry 3, sin θ2, tells how the arm bends: counter-clockwise, seen
                from above, where it is positive.
  ant           27 entries as in D4RL: Gymnasium's observation without contact forces.

Rewards, in the versions that the papers' datasets were recorded with (v2) and here:
  halfcheetah   the same: forward speed - 0.1 |action|^2.
  reacher       -distance - |action|^2. v5 takes the distance after the step, v2 took it before: a
                return is higher by the first distance minus the last, about 0.2 for a team that
                arrives.
  ant           forward speed + 1 - 0.5 |action|^2, without the contact cost, which D4RL's MuJoCo
                left at zero as well. v2 paid the 1 for being alive also in the step in which the
                ant falls.
An ant is terminated when its torso leaves the heights 0.2 to 1.0; the others only end by their time
limit.

In the ant, each agent drives the leg that it sees. MOMA-PPO's paper says so too; its code gives
torques (2i, 2i + 1) to agent i, which sees leg i + 1, but the order of Ant's motors is leg 4, 1, 2,
3.

Each game has its own `mujoco.MjData`, and one loop steps them; all else is NumPy over the batch.
`mujoco.rollout` would not be exact: it forgets from call to call where MuJoCo's solver had stopped.
Scores depend on MuJoCo's version, which requirements.txt pins.

Shapes: B games, N agents, A motors of one agent, F entries, O entries of the longest view.
"""

import os
import sys
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv

from envs.common import METADATA, check_actions, describe, games_to_reset


class Body(NamedTuple):
    """A body of Gymnasium's: what it is called there, and the names of its entries, "v." before a
    velocity.
    """

    name: str
    entries: str
    hidden: int = 0  # so many entries at the start are not in the state
    options: dict = {}  # for gymnasium.make


# b: the cheetah's hind leg, f: its front leg; gap: from the reacher's target to its fingertip.
CHEETAH = (
    "x z pitch bthigh bshin bfoot fthigh fshin ffoot "
    "v.x v.z v.pitch v.bthigh v.bshin v.bfoot v.fthigh v.fshin v.ffoot"
)
REACHER = "cos_1 cos_2 sin_1 sin_2 target_x target_y v.joint0 v.joint1 gap_x gap_y gap_z"
ANT = (
    "z qw qx qy qz hip_1 ankle_1 hip_2 ankle_2 hip_3 ankle_3 hip_4 ankle_4 "
    "v.x v.y v.z v.roll_rate v.pitch_rate v.yaw_rate "
    "v.hip_1 v.ankle_1 v.hip_2 v.ankle_2 v.hip_3 v.ankle_3 v.hip_4 v.ankle_4"
)
REMEDY = "set MUJOCO_GL to egl or osmesa, and install that library (libegl1, libosmesa6)"
NO_CONTACTS = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0}
BODIES = {
    "halfcheetah": Body("HalfCheetah-v5", CHEETAH, hidden=1),
    "reacher": Body("Reacher-v5", REACHER),
    "ant": Body("Ant-v5", ANT, options=NO_CONTACTS),
}

# For each task and agent: the joints that it moves, in the order of its actions, and the entries
# that it sees.
VIEWS = {
    "halfcheetah": {
        "2x3": (
            (
                "bfoot bshin bthigh",
                "bfoot v.bfoot bshin v.bshin bthigh v.bthigh fthigh v.x v.pitch v.z x pitch z",
            ),
            (
                "ffoot fshin fthigh",
                "ffoot v.ffoot fshin v.fshin fthigh v.fthigh bthigh v.x v.pitch v.z x pitch z",
            ),
        ),
    },
    "reacher": {
        "all-observant": (("joint0", REACHER), ("joint1", REACHER)),
        "independent": (
            ("joint0", "cos_1 sin_1 v.joint0 target_x target_y"),
            ("joint1", "cos_2 sin_2 v.joint1 target_x target_y"),
        ),
        "leader-only": (
            ("joint0", "cos_1 sin_1 v.joint0 cos_2 sin_2 v.joint1 target_x target_y"),
            ("joint1", "cos_1 sin_1 v.joint0 cos_2 sin_2 v.joint1"),
        ),
    },
    "ant": {
        "full": tuple((f"hip_{i} ankle_{i}", ANT) for i in (1, 2, 3, 4)),
        "partial": (
            (
                "hip_1 ankle_1",
                "z qw qx qy qz v.roll_rate v.pitch_rate v.yaw_rate v.x v.y v.z "
                "hip_1 v.hip_1 ankle_1 v.ankle_1",
            ),
            ("hip_2 ankle_2", "hip_2 v.hip_2 ankle_2 v.ankle_2"),
            ("hip_3 ankle_3", "hip_3 v.hip_3 ankle_3 v.ankle_3"),
            ("hip_4 ankle_4", "hip_4 v.hip_4 ankle_4 v.ankle_4"),
        ),
    },
}


class MultiAgentMujoco(VectorEnv):
    """B bodies, each moved by a team of N agents.

    Each game has its own random stream, made from the seed and the game's number: game b is the
    same in a batch of any size, and a partial reset leaves the others' streams alone.
    `reset(seed=...)` with a mask seeds only its games.

    `qpos`, `qvel` and `xpos` are lists with one NumPy view of MuJoCo's float64 arrays for each
    game.

    Args:
        body: a key of `BODIES`.
        task: a key of `VIEWS[body]`.
        time_limit: in steps; Gymnasium's own if None.
        limits: how far joints turn, {name: (least, most)} in radians, where it is not as far as in
            Gymnasium's model: {"joint1": (0, 3)} gives the reacher an elbow that bends only
            counter-clockwise.
    Raises:
        ValueError: MuJoCo cannot be loaded; KeyError: limits of no joint.
        FloatingPointError: in `step`, a simulation has become unstable (MuJoCo itself also notes it
            in a file MUJOCO_LOG.TXT). Reset that game to go on.
    """

    metadata = METADATA

    def __init__(self, body, task, num_envs=1, device="cpu", time_limit=None, limits=None):
        spec, self.body, self.mujoco = BODIES[body], body, _mujoco()
        self.renderer = None  # made when a picture is asked for
        # Gymnasium's own environment lends its model, and resets the games.
        self.plain = gymnasium.make(spec.name, **spec.options).unwrapped
        self.model = self.plain.model
        for name, span in (limits or {}).items():
            self.model.joint(name).range = span
        # By default MuJoCo quietly puts an unstable body back to its starting place. Let it show
        # instead.
        self.model.opt.disableflags |= self.mujoco.mjtDisableBit.mjDSBL_AUTORESET

        names, agents = spec.entries.split(), VIEWS[body][task]
        driven = [self.model.joint(i).name for i in self.model.actuator_trnid[:, 0]]
        motors = [[driven.index(joint) for joint in moves.split()] for moves, _ in agents]
        views = [[names.index(name) for name in sees.split()] for _, sees in agents]
        width, padding = max(map(len, views)), len(names)  # the number of a zero after the entries
        views = [view + [padding] * (width - len(view)) for view in views]
        self.motors, self.columns = np.array(motors), np.array(views)  # (N, A), (N, O)
        self.hidden = spec.hidden
        if time_limit is None:
            time_limit = gymnasium.spec(spec.name).max_episode_steps
        sizes = *self.motors.shape, width, len(names) - spec.hidden
        describe(self, num_envs, device, *sizes, time_limit, discrete=False)

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
        """Put all games into states (B, D) as `info["state"]` gives them, with their clocks at 0;
        returns obs and info.

        What a state leaves out, the place in the world, is 0. A reacher's gap is made from its
        joints: after a step MuJoCo's own lags behind them by a part of a step.
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
            self.data[b].qacc_warmstart[:] = 0  # or the last digits would tell what was played
            self.mujoco.mj_forward(self.model, self.data[b])
        self._read()
        return self._observe()

    def picture(self, actions=None):
        """The first game through MuJoCo's renderer, as an array (height, width, 3).

        Raises:
            ValueError: no renderer works here.
        """
        if sys.platform == "linux" and not {"DISPLAY", "MUJOCO_GL"} & set(os.environ):
            raise ValueError(f"MuJoCo cannot draw without a display: {REMEDY}")
        try:
            if self.renderer is None:
                self.renderer = self.mujoco.Renderer(self.model, 240, 320)
        except Exception as error:  # of OpenGL, which has many kinds
            raise ValueError(f"MuJoCo cannot draw here ({error!r}): {REMEDY}") from None
        self.renderer.update_scene(self.data[0], -1 if self.body == "reacher" else "track")
        return self.renderer.render()

    def close_extras(self, **kwargs):
        if self.renderer is not None:
            self.renderer.close()
        self.plain.close()

    def _restart(self, games):
        """Gymnasium's own reset, with each game's data and random stream lent to it in turn."""
        for b in games:
            self.plain.data, self.plain.np_random = self.data[b], self.streams[b]
            self.plain.reset()
            self.elapsed[b], self.fallen[b] = 0, False
        self._read()

    def _read(self):
        """Fetch the entries (B, F), and the place (B,) whose change is the forward speed."""
        qpos, qvel, xpos = map(np.array, (self.qpos, self.qvel, self.xpos))  # (B, ...), copies
        stable = np.abs(np.concatenate([qpos, qvel], -1)) < 1e10  # MuJoCo's own bound; not of NaN
        if not stable.all():
            b = stable.all(-1).argmin()
            when = f"in game {b}, {self.elapsed[b]} steps after its start"
            raise FloatingPointError(f"{self.body}: MuJoCo became unstable {when}: reset that game")
        if self.body == "halfcheetah":
            self.entries, self.place = np.concatenate([qpos, qvel], -1), qpos[:, 0]
        elif self.body == "ant":
            self.entries = np.concatenate([qpos[:, 2:], qvel], -1)
            self.place = xpos[:, 1, 0]  # of the torso
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
        remedy = f"pip install mujoco, or {REMEDY}"
        raise ValueError(f"MuJoCo cannot be loaded ({error!r}): {remedy}") from None
    return mujoco
