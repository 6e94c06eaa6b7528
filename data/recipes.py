import envs
from data.collect import about, is_path, load, names  # noqa: F401


def default(env, task=""):
    task = task or ("xor" if env == "matrix" else envs.TASKS[env][0])
    usual = {"bridge": "mixed", "smac": "medium-replay", "polynomial": "peak-0.5", "halfcheetah": "good"}
    usual |= {"reacher": "expert-mix", "ant": "full-replay"}
    return task, names(env, task)[-1] if env == "matrix" else usual[env]
