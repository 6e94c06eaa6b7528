"""What `mappo.py --save-snapshots` writes: behaviour teams, which can record datasets.

`data/teams.py` reads them, and says what a file holds.
"""

import io
import json

import numpy as np

from data.run.files import provenance, save


def save_snapshots(run, actor):
    """Write every seed's policy as OUT/snapshots/STEP-seedSEED.npz, with what it was worth.

    Args:
        run: a `Run` that has just evaluated it.
        actor: MAPPO's, for S seeds.
    """
    folder = run.folder / "snapshots"
    folder.mkdir(exist_ok=True)
    commit = provenance(run.device)["git_commit"]
    for s, row in enumerate(run.rows[-len(run.seeds) :]):
        info = describe(run, actor, row) | {"git_commit": commit}
        content = io.BytesIO()
        np.savez_compressed(content, info=np.array(json.dumps(info)), **weights(actor, s))
        save(folder / f"{row['step']}-seed{row['seed']}.npz", content.getvalue())


def weights(actor, s):
    """The network of seed s as arrays; its first layer takes the inputs as they are."""
    layers = actor.body[::2]
    arrays = {f"weight{k}": layer.weight[s] for k, layer in enumerate(layers)}
    arrays |= {f"bias{k}": layer.bias[s, 0] for k, layer in enumerate(layers)}
    mean, std = actor.scale.mean[s], actor.scale.std[s]  # (1, I)
    arrays["bias0"] = arrays["bias0"] - (mean / std @ arrays["weight0"])[0]
    arrays["weight0"] = arrays["weight0"] / std.T
    if not actor.discrete:
        arrays["log_std"] = actor.log_std[s, 0]
    return {name: value.detach().half().cpu().numpy() for name, value in arrays.items()}


def describe(run, actor, row):
    """What stands in a file's `info`; `row` is the policy's in the run's table."""
    args = run.args
    inputs = ["obs", "last_action", "agent_id"] if actor.discrete else ["obs", "agent_id"]
    info = {"env": args.env, "task": args.task, "seed": row["seed"], "steps": row["step"]}
    info |= {"inputs": inputs, "recall": args.recall, "activation": "relu"}
    info["output"] = "logits" if actor.discrete else "tanh"
    for name in ("return", "sampled_return", "win_rate", "sampled_win_rate"):
        info[name] = row.get(name)
    return info | {"eval_episodes": args.eval_episodes, "script": run.script}


def choose_behaviours(rows):
    """Which evaluations of one seed become behaviour teams: {file name: step}.

    The expert is the last policy. Medium is the earlier one that wins, by sampling, most nearly
    half as often; where the expert never wins, the one whose return has come most nearly half of
    the way. The replay teams are up to ten, evenly spaced from the first policy to medium.
    """
    score, half = "sampled_return", (rows[0]["sampled_return"] + rows[-1]["sampled_return"]) / 2
    if rows[-1].get("sampled_win_rate"):
        score, half = "sampled_win_rate", rows[-1]["sampled_win_rate"] / 2
    medium = min(range(len(rows) - 1), key=lambda k: abs(rows[k][score] - half))
    places = {"expert": -1, "medium": medium}
    count = min(10, medium + 1)
    for k in range(count):
        places[f"replay-{k}"] = round(k * medium / max(1, count - 1))
    return {f"{name}.npz": rows[place]["step"] for name, place in places.items()}


def keep_behaviours(run, actor):
    """At the end: the last snapshots, and those that become behaviour teams in OUT/behaviour.

    The teams are those of the first seed.
    """
    save_snapshots(run, actor)
    seed = run.seeds[0]
    folder = run.folder / "behaviour"
    folder.mkdir(exist_ok=True)
    for name, step in choose_behaviours([row for row in run.rows if row["seed"] == seed]).items():
        snapshot = run.folder / "snapshots" / f"{step}-seed{seed}.npz"
        save(folder / name, snapshot.read_bytes())
        run.say(f"behaviour/{name}: the policy of seed {seed} after {step} steps")
