"""Batched cooperative games behind one call: `envs.make("bridge", num_envs=64)`.

Every environment is a `gymnasium.vector.VectorEnv` that steps B games as torch tensors on one device:

    obs, info = env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step(actions)

    obs         (B, N, O) float32      what each of the N agents sees, zero-padded to the longest view
    actions     (B, N) int64           or (B, N, A) float32 in [-1, 1] where actions are continuous
    reward      (B,) float32           one reward for the whole team
    terminated  (B,) bool              the game ended by its own rules
    truncated   (B,) bool              the game was cut off by the time limit
    info["state"]          (B, S) float32     for training only
    info["avail_actions"]  (B, N, A) bool     discrete actions only
    info["won"]            (B,) bool          where a game can be won

There is no autoreset: a finished game stays put, pays 0, and starts again with
`reset(options={"reset_mask": mask})`, where mask is (B,) bool.
"""

from envs.bridge import Bridge
from envs.foreign import make_foreign
from envs.mamujoco import VIEWS, MultiAgentMujoco
from envs.matrix import MATRIX_TASKS, MatrixGame
from envs.polynomial import GAMES, Polynomial
from envs.smac import MAPS, Smac

# What `--env` and `--task` accept; the first task is the default. Bridge has only one.
TASKS = {"matrix": tuple(MATRIX_TASKS), "bridge": ("",), "smac": tuple(MAPS)}
TASKS |= {body: tuple(tasks) for body, tasks in VIEWS.items()}  # halfcheetah, reacher, ant
TASKS["polynomial"] = tuple(GAMES)


def make(env, task="", num_envs=1, device="cpu", **options):
    """Make B = `num_envs` games of one task.

    Args:
        env: a key of `TASKS`, or "package.module:factory" for a game that is not ours (see envs/foreign.py).
        task: one of `TASKS[env]`; for "matrix" also a payoff table written as JSON, such as "[[1, 0], [0, 2]]".
        options: passed on to the environment, such as `time_limit=20` for Bridge; for "smac" also `backend="sc2"`,
            the real StarCraft II in place of our simulator (see `envs/sc2.py`).
    Raises:
        ValueError: an unknown environment or task, options that it does not know, a malformed payoff table, or no
            StarCraft II.
    """
    if ":" in env:
        return make_foreign(env, task, num_envs, device, **options)
    try:
        return _ours(env, task, num_envs, device, **options)
    except TypeError as error:
        if not options:
            raise
        raise ValueError(f"{env} does not take --env-kwargs {options}: {error}") from None


def _ours(env, task, num_envs, device, **options):
    if env not in TASKS:
        names = ", ".join(TASKS)
        raise ValueError(f"unknown environment {env!r}: choose one of {names}, or package.module:factory")
    limit = options.get("time_limit")
    if limit is not None and not (type(limit) is int and limit > 0):
        raise ValueError(f"time_limit must be a number of steps, at least 1, not {limit!r}")
    kinds = {"noise": bool, "mirror": bool} if env == "smac" else {"limits": dict | None} if env in VIEWS else {}
    for name, kind in kinds.items():
        if name in options and not isinstance(options[name], kind):
            raise ValueError(f"{name} cannot be {options[name]!r}")
    if env == "matrix":
        return MatrixGame(task or TASKS[env][0], num_envs, device, **options)
    if env == "polynomial":
        return Polynomial(task or TASKS[env][0], num_envs, device, **options)
    if env == "smac":
        if options.pop("backend", "torch") == "sc2":
            from envs.sc2 import StarCraft2

            return StarCraft2(task or TASKS[env][0], num_envs, device, **options)
        return Smac(task or TASKS[env][0], num_envs, device, **options)
    if env in VIEWS:
        return MultiAgentMujoco(env, task or TASKS[env][0], num_envs, device, **options)
    if task not in TASKS[env]:
        raise ValueError(f"{env} has no task {task!r}: leave --task out")
    return Bridge(num_envs, device, **options)
