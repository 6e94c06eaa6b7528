"""Batched cooperative games behind one call: `envs.make("bridge", num_envs=64)`.

Every environment is a `gymnasium.vector.VectorEnv` that steps B games as torch tensors on one
device:

    obs, info = env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step(actions)

    obs         (B, N, O) float32      what each of the N agents sees, zero-padded to the longest
                view
    actions     (B, N) int64           or (B, N, A) float32 in [-1, 1] where actions are continuous
    reward      (B,) float32           one reward for the whole team
    terminated  (B,) bool              the game ended by its own rules
    truncated   (B,) bool              the game was cut off by the time limit
    info["state"]          (B, S) float32     for training only
    info["avail_actions"]  (B, N, A) bool     discrete actions only
    info["won"]            (B,) bool          where a game can be won

There is no autoreset: a finished game stays put, pays 0, and starts again with
`reset(options={"reset_mask": mask})`, where mask is (B,) bool.

On a CPU, `step` raises ValueError if a game that is not over gets actions of a wrong shape, that
are not available, or that are not in [-1, 1]; on a GPU, where to look would mean to wait, only the
shape counts.
"""

from envs.bridge import Bridge
from envs.foreign import make_foreign
from envs.mamujoco import VIEWS, MultiAgentMujoco
from envs.matrix import MATRIX_TASKS, MatrixGame
from envs.polynomial import GAMES, Polynomial
from envs.sc2 import StarCraft2
from envs.smac import MAPS, Smac

# What `--env` and `--task` accept; the first task is the default. Bridge has only one.
TASKS = {"matrix": tuple(MATRIX_TASKS), "bridge": ("",), "smac": tuple(MAPS)}
TASKS |= {body: tuple(tasks) for body, tasks in VIEWS.items()}  # halfcheetah, reacher, ant
TASKS["polynomial"] = tuple(GAMES)


def make(env, task="", num_envs=1, device="cpu", **options):
    """Make B = `num_envs` games of one task.

    Args:
        env: a key of `TASKS`, or "package.module:factory" for a game that is not ours (see
            envs/foreign.py).
        task: one of `TASKS[env]`; for "matrix" also a payoff table written as JSON, such as "[[1,
            0], [0, 2]]".
        options: passed on to the environment, such as `time_limit=20` for Bridge; for "smac" also
            `backend="sc2"`, the real StarCraft II in place of our simulator (see `envs/sc2.py`).
    Raises:
        ValueError: an unknown environment or task, options that it does not know, a malformed
            payoff table, or no StarCraft II.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, not {num_envs}")
    if ":" in env:
        return make_foreign(env, task, num_envs, device, **options)
    if env not in TASKS:
        names = ", ".join(TASKS)
        raise ValueError(
            f"unknown environment {env!r}: choose one of {names}, or package.module:factory"
        )
    task = task or TASKS[env][0]
    if task not in TASKS[env] and env != "matrix":
        names = ", ".join(TASKS[env]) or "none, it has only one"
        raise ValueError(f"{env} has no task {task!r}: choose one of {names}")
    try:
        return _make(env, task, num_envs, device, **options)
    except (TypeError, AttributeError, KeyError) as error:
        if not options:
            raise
        raise ValueError(f"{env} does not take --env-kwargs {options}: {error}") from None


def _make(env, task, *batch, **options):
    if env == "matrix":
        return MatrixGame(task, *batch, **options)
    if env == "bridge":
        return Bridge(*batch, **options)
    if env == "polynomial":
        return Polynomial(task, *batch, **options)
    if env in VIEWS:
        return MultiAgentMujoco(env, task, *batch, **options)
    battles = StarCraft2 if options.pop("backend", "torch") == "sc2" else Smac
    return battles(task, *batch, **options)
