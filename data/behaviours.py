"""Behaviour teams: what `mappo.py --save-snapshots` writes, one `.npz` a team, and `collect.py` lets play.

A file holds arrays weight0, bias0, weight1, ... (float16) of a ReLU network that all agents share, x @ weight0 + bias0
and so on, and a JSON text `info`. Its inputs x are an agent's view, its last actions, the newest first (only where
actions are discrete), and its number, one-hot both. Its outputs are the logits of the actions, or through tanh the
mean of normal ones; `log_std` is then the logarithm of their spread.
"""

import io
import json

import numpy as np

from data.teams import normal, read_behaviour  # noqa: F401


# ---------------------------------------------------------------- writing
def save_snapshots(run, actor, scores):
    """Write the policy of every seed as OUT/snapshots/STEP-seedSEED.npz, with what this evaluation measured.

    Args:
        run: a `Run` at an evaluation.
        actor: MAPPO's, for S seeds.
        scores: {"return": (S,), ...}.
    """
    from data import runs  # which imports this file

    args, step, commit = run.args, run.step * run.stride, runs.provenance(run.device)["git_commit"]
    (run.folder / "snapshots").mkdir(exist_ok=True)
    params = list(actor.body.parameters())
    for s, seed in enumerate(run.seeds):
        arrays = {f"weight{k}": weight[s] for k, weight in enumerate(params[::2])}
        arrays |= {f"bias{k}": bias[s, 0] for k, bias in enumerate(params[1::2])}
        mean, std = (
            actor.scale.mean[s],
            actor.scale.std[s],
        )  # (1, I); the first layer takes the inputs as they are
        arrays["bias0"] = arrays["bias0"] - (mean / std @ arrays["weight0"])[0]
        arrays["weight0"] = arrays["weight0"] / std.T
        if not actor.discrete:
            arrays["log_std"] = actor.log_std[s, 0]
        info = {
            "env": args.env, "task": args.task, "seed": seed, "steps": step,
            "inputs": ["obs", "last_action", "agent_id"] if actor.discrete else ["obs", "agent_id"],
            "recall": args.recall, "activation": "relu", "output": "logits" if actor.discrete else "tanh",
        }  # fmt: skip
        for name in ("return", "sampled_return", "win_rate", "sampled_win_rate"):
            info[name] = scores[name][s].item() if name in scores else None
        info |= {"eval_episodes": args.eval_episodes, "script": run.script, "git_commit": commit}
        content = io.BytesIO()
        arrays = {name: value.detach().half().cpu().numpy() for name, value in arrays.items()}
        np.savez_compressed(content, info=np.array(json.dumps(info)), **arrays)
        runs.save(run.folder / "snapshots" / f"{step}-seed{seed}.npz", content.getvalue())


def choose_behaviours(rows):
    """Which evaluations of one seed become behaviour teams: {file name: step}.

    The expert is the last policy. Medium is the earlier one that wins, by sampling, most nearly half as often; where
    the expert never wins, the one whose return has come most nearly half of the way. The replay teams are up to ten,
    evenly spaced from the first policy to medium.
    """
    half = (rows[0]["sampled_return"] + rows[-1]["sampled_return"]) / 2
    score = "sampled_return"
    if rows[-1].get("sampled_win_rate"):
        score, half = "sampled_win_rate", rows[-1]["sampled_win_rate"] / 2
    medium = min(range(len(rows) - 1), key=lambda k: abs(rows[k][score] - half))
    count = min(10, medium + 1)
    replay = [round(k * medium / max(1, count - 1)) for k in range(count)]
    teams = {"expert": -1, "medium": medium} | {
        f"replay-{k}": place for k, place in enumerate(replay)
    }
    return {f"{name}.npz": rows[place]["step"] for name, place in teams.items()}


def keep_behaviours(run):
    """Copy the first seed's snapshots that become behaviour teams to OUT/behaviour, at the end of a run."""
    from data import runs

    seed = run.seeds[0]
    (run.folder / "behaviour").mkdir(exist_ok=True)
    for name, step in choose_behaviours([row for row in run.rows if row["seed"] == seed]).items():
        snapshot = run.folder / "snapshots" / f"{step}-seed{seed}.npz"
        runs.save(run.folder / "behaviour" / name, snapshot.read_bytes())
        runs.say(f"behaviour/{name}: the policy of seed {seed} after {step} steps")
