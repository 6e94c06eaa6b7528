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

Speed: one `mujoco.MjData` per game and one loop over the games; all else is NumPy over the batch. Measured with 64
games and MuJoCo 3.3.7, in steps per CPU-second of one core on a shared machine:
                                           halfcheetah    reacher      ant
  this file                                     31,700     42,800    5,100
  gymnasium.make, one game                      24,200     26,900    4,100
  gymnasium.make_vec, "sync"                    19,800     23,300    3,600
  mujoco.rollout, physics alone                 36,600     53,900    5,500
`mujoco.rollout` forgets from call to call where MuJoCo's solver had stopped, so it is not exact: 4e-16 off at the third
step of HalfCheetah, 0.09 at the thousandth. Scores depend on MuJoCo's version too: requirements.txt pins it.

Shapes: B games, N agents, A motors of one agent, F entries, O entries of the longest view.
"""

import os
import sys
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from envs.common import METADATA, games_to_reset


class Body(NamedTuple):
    """A body of Gymnasium's: what it is called there, and the names of its entries, "v." before a velocity."""

    name: str
    entries: str
    hidden: int = 0  # so many entries at the start are not in the state
    options: dict = {}  # for gymnasium.make


CHEETAH = "bthigh bshin bfoot fthigh fshin ffoot"  # b: hind leg, f: front leg
LEGS = "hip_1 ankle_1 hip_2 ankle_2 hip_3 ankle_3 hip_4 ankle_4"  # front left, front right, back left, back right
TORSO = "z qw qx qy qz"  # height and orientation
REACHER = "cos_1 cos_2 sin_1 sin_2 target_x target_y v.joint0 v.joint1 gap_x gap_y gap_z"  # gap: fingertip - target


def _speeds(names):
    return " ".join("v." + name for name in names.split())


BODIES = {
    "halfcheetah": Body("HalfCheetah-v5", f"x z pitch {CHEETAH} {_speeds(f'x z pitch {CHEETAH}')}", hidden=1),
    "reacher": Body("Reacher-v5", REACHER),
    "ant": Body(
        "Ant-v5",
        f"{TORSO} {LEGS} {_speeds(f'x y z roll_rate pitch_rate yaw_rate {LEGS}')}",
        options={"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0},
    ),
}

# For each task and agent: the joints that it moves, in the order of its actions, and the entries that it sees.
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
        "full": tuple((f"hip_{i} ankle_{i}", BODIES["ant"].entries) for i in (1, 2, 3, 4)),
        "partial": tuple(
            (f"hip_{i} ankle_{i}", torso + f"hip_{i} v.hip_{i} ankle_{i} v.ankle_{i}")
            for i, torso in enumerate((f"{TORSO} v.roll_rate v.pitch_rate v.yaw_rate v.x v.y v.z ", "", "", ""), 1)
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
    from matplotlib.figure import Figure

    states = states.unflatten(0, (len(seeds), -1))
    x, y, bend = (states[..., :-1, entry].mean(-1).cpu() for entry in (4, 5, 3))  # the target's place; mean sin θ2
    figure = Figure(figsize=(2.6 * len(bend), 2.9), layout="constrained")
    for s, axes in enumerate(figure.subplots(1, len(bend), squeeze=False)[0]):
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
        ValueError: an unknown task, limits of no joint or no interval; in `step`, actions of a wrong shape or not in
            [-1, 1].
        FloatingPointError: in `step`, a simulation has become unstable (MuJoCo itself also notes it in a file
            MUJOCO_LOG.TXT). Reset that game to go on.
    """

    metadata = METADATA

    def __init__(self, body="halfcheetah", task="2x3", num_envs=1, device="cpu", time_limit=None, limits=None):
        try:
            import mujoco  # here, so that games without bodies start without it
        except Exception as error:  # also of the library that MUJOCO_GL asks for, which has many kinds
            gl = os.environ.get("MUJOCO_GL")
            remedy = f"MUJOCO_GL={gl} needs that library (libegl1, libosmesa6)" if gl else "pip install mujoco"
            raise ValueError(f"MuJoCo cannot be loaded ({type(error).__name__}: {error}): {remedy}") from None

        if task not in VIEWS[body]:
            raise ValueError(f"{body} has no task {task!r}: choose one of {', '.join(VIEWS[body])}")
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        spec, self.body, self.mujoco = BODIES[body], body, mujoco
        self.renderer = None  # made when a picture is asked for
        self.plain = gymnasium.make(spec.name, **spec.options).unwrapped  # lends its model, and resets the games
        self.model = self.plain.model
        hinges = [self.model.joint(i).name for i in range(self.model.njnt) if self.model.jnt_limited[i]]
        for name, span in (limits or {}).items():
            if name not in hinges or len(span) != 2 or not span[0] < span[1]:
                raise ValueError(
                    f"{body} cannot have the limits {name}: {span}: give [least, most] for one of {', '.join(hinges)}"
                )
            self.model.joint(name).range = span
        # By default MuJoCo quietly puts an unstable body back to its starting place. Let it show instead.
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET

        joints, views = zip(*((moves.split(), sees.split()) for moves, sees in VIEWS[body][task]))
        driven = [self.model.joint(i).name for i in self.model.actuator_trnid[:, 0]]
        self.motors = np.array([[driven.index(joint) for joint in group] for group in joints])  # (N, A)
        names = spec.entries.split()
        longest = max(map(len, views))
        columns = [[names.index(name) for name in view] + [len(names)] * (longest - len(view)) for view in views]
        self.columns = np.array(columns)  # (N, O) into the entries and one zero after them, the padding
        self.hidden = spec.hidden

        self.num_envs, self.device, self.best_return = num_envs, torch.device(device), None
        self.num_agents, self.num_actions = self.motors.shape
        self.obs_dim, self.state_dim = longest, len(names) - spec.hidden
        self.time_limit = gymnasium.spec(spec.name).max_episode_steps if time_limit is None else time_limit
        self.single_observation_space = Box(-np.inf, np.inf, (self.num_agents, longest), np.float32)
        self.single_action_space = Box(-1, 1, self.motors.shape, np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self.data = [mujoco.MjData(self.model) for _ in range(num_envs)]
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
        self._check(actions)
        actions = actions.detach().cpu().numpy().astype(np.float64)
        over = self.fallen | (self.elapsed >= self.time_limit)
        torques = np.empty((self.num_envs, self.motors.size))
        torques[:, self.motors] = actions  # (B, N, A) into (B, motors)
        place, step, repeat = self.place, self.mujoco.mj_step, self.plain.frame_skip
        for b in (~over).nonzero()[0].tolist():
            self.ctrl[b][:] = torques[b]
            step(self.model, self.data[b], repeat)
        self._read()
        self.elapsed = self.elapsed + ~over

        speed, effort = (self.place - place) / self.plain.dt, np.square(torques).sum(-1)  # (B,)
        if self.body == "halfcheetah":
            reward = speed - 0.1 * effort
        elif self.body == "reacher":
            reward = -np.sqrt(np.square(self.entries[:, 8:]).sum(-1)) - effort
        else:
            low, high = self.plain._healthy_z_range
            self.fallen = (self.entries[:, 0] < low) | (self.entries[:, 0] > high)
            reward = speed + ~self.fallen - 0.5 * effort
        truncated = (self.elapsed >= self.time_limit) & ~self.fallen
        obs, info = self._observe()
        return obs, self._tensor(reward * ~over), self._tensor(self.fallen), self._tensor(truncated), info

    def set_state(self, state):
        """Put all games into states (B, D) as `info["state"]` gives them, with their clocks at 0; returns obs and info.

        What a state leaves out, the place in the world, is 0. A reacher's gap is made from its joints: after a step
        MuJoCo's own lags behind them by a part of a step.
        """
        self.elapsed[:], self.fallen[:] = 0, False
        for b, x in enumerate(state.double().cpu().numpy()):
            if self.body == "reacher":
                self.qpos[b][:] = np.concatenate([np.arctan2(x[2:4], x[:2]), x[4:6]])
                self.qvel[b][:] = np.concatenate([x[6:8], np.zeros(2)])
            else:
                place = len(self.qpos[b]) + len(self.qvel[b]) - len(x)  # entries that the state leaves out
                entries = np.concatenate([np.zeros(place), x])
                self.qpos[b][:], self.qvel[b][:] = np.split(entries, [len(self.qpos[b])])
            self.data[b].qacc_warmstart[:] = 0  # or what was played before would show in the last digits
            self.mujoco.mj_forward(self.model, self.data[b])
        self._read()
        return self._observe()

    def picture(self, actions=None):
        """The first game through MuJoCo's renderer, as an array (height, width, 3).

        Raises:
            ValueError: no renderer works here.
        """
        remedy = "set MUJOCO_GL to egl or osmesa, and install that library (libegl1, libosmesa6)"
        offscreen = os.environ.get("MUJOCO_GL", "").lower() in ("egl", "osmesa")
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or offscreen):
            raise ValueError(f"MuJoCo cannot draw without a display: {remedy}")
        try:
            if self.renderer is None:
                self.renderer = self.mujoco.Renderer(self.model, 240, 320)
            self.renderer.update_scene(self.data[0], camera="track" if self.body != "reacher" else -1)
            return self.renderer.render()
        except Exception as error:  # of OpenGL, which has many kinds
            raise ValueError(f"MuJoCo cannot draw on this machine ({type(error).__name__}): {remedy}") from None

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
        """Fetch the entries (B, F), and the place (B,) whose change is the forward speed, from MuJoCo."""
        qpos, qvel, xpos = np.array(self.qpos), np.array(self.qvel), np.array(self.xpos)  # (B, ...), copies
        unstable = ~((np.abs(qpos) < 1e10).all(-1) & (np.abs(qvel) < 1e10).all(-1))  # MuJoCo's own bound; or NaN
        if unstable.any():
            b = unstable.argmax()
            raise FloatingPointError(
                f"{self.body}: MuJoCo became unstable in game {b}, {self.elapsed[b]} steps after its start: its state "
                f"is not finite (start the game anew with reset)"
            )
        if self.body == "halfcheetah":
            self.entries, self.place = np.concatenate([qpos, qvel], -1), qpos[:, 0]
        elif self.body == "reacher":
            angle, gap = qpos[:, :2], xpos[:, 3] - xpos[:, 4]  # fingertip - target
            self.entries = np.concatenate([np.cos(angle), np.sin(angle), qpos[:, 2:], qvel[:, :2], gap], -1)
        else:
            self.entries, self.place = np.concatenate([qpos[:, 2:], qvel], -1), xpos[:, 1, 0]  # the torso

    def _observe(self):
        padded = np.concatenate([self.entries, np.zeros((self.num_envs, 1))], -1)
        return self._tensor(padded[:, self.columns]), {"state": self._tensor(self.entries[:, self.hidden :])}

    def _tensor(self, array):
        """A copy on the device; numbers as float32."""
        kind = torch.bool if array.dtype == bool else torch.float32
        return torch.tensor(array, dtype=kind, device=self.device)

    def _check(self, actions):
        shape = (self.num_envs, *self.motors.shape)
        if actions.shape != shape or not actions.is_floating_point():
            raise ValueError(
                f"actions must be floating-point numbers of shape {shape}, not {actions.dtype} of shape "
                f"{tuple(actions.shape)}"
            )
        wrong = ~(actions.abs() <= 1)  # also NaN
        if wrong.any():
            b, i, a = wrong.nonzero()[0].tolist()
            raise ValueError(f"actions must lie in [-1, 1]; action {a} of agent {i} in game {b} is {actions[b, i, a]}")
