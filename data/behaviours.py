"""Behaviour teams: what `mappo.py --save-snapshots` writes, one `.npz` a team, and `collect.py` lets play.

A file holds arrays weight0, bias0, weight1, ... (float16) of a ReLU network that all agents share, x @ weight0 + bias0
and so on, and a JSON text `info`. Its inputs x are an agent's view, its last actions, the newest first (only where
actions are discrete), and its number, one-hot both. Its outputs are the logits of the actions, or through tanh the
mean of normal ones; `log_std` is then the logarithm of their spread.
"""

import io
import json

import numpy as np
import torch
import torch.nn.functional as F

import envs


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
        mean, std = actor.scale.mean[s], actor.scale.std[s]  # (1, I); the first layer takes the inputs as they are
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
    teams = {"expert": -1, "medium": medium} | {f"replay-{k}": place for k, place in enumerate(replay)}
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


# ---------------------------------------------------------------- reading
def normal(shape, generator):
    """Standard normal numbers, float32, the same on every machine: torch draws its own float32 ones with wide vectors."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def read_behaviour(path, env="smac"):
    """A team as a function that draws its actions, and what is known of it.

    Args:
        path: a file in data/behaviour/: MAP/TEAM.npz, or BODY/TEAM.npz.
        env: the environment that the team must be for, "smac" or a body.
    Returns:
        A function of (step, obs (B, N, O), info, generator) that returns actions (B, N), or (B, N, A), not clipped and
        without a generator (None) the most likely ones; and the file's info, a dictionary.
    Raises:
        ValueError: there is no such file, or it is damaged or for another environment.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["info"]))
            arrays = {name: torch.tensor(file[name]).double() for name in file.files if name != "info"}
        spread, recall = arrays["log_std"].exp() if "log_std" in arrays else None, about.get("recall", 1)
        layers = [(arrays[f"weight{k}"], arrays[f"bias{k}"]) for k in range(len(arrays) // 2)]
        widths = [len(layers[0][0]), *(len(b) for _, b in layers)]
        whole = all(w.shape == (i, o) and b.shape == (o,) for (w, b), i, o in zip(layers, widths, widths[1:]))
        whole = whole and (spread is None or spread.shape == (widths[-1],)) and type(recall) is int and recall >= 0
        if not (whole and {"env", "task", "script", "steps"} <= about.keys()):
            raise ValueError
    except FileNotFoundError:
        flags = f"--env {env} --task " + (path.parent.name if env == "smac" else f"{envs.TASKS[env][0]} --normalize")
        raise ValueError(
            f"no {path.stem} team for {path.parent.name} ships with the repository: train one with "
            f"`python algorithms/mappo.py {flags} --save-snapshots` (see {path.parents[1]}/README.md)"
        ) from None
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from None
    if about["env"] != env or about["task"] not in envs.TASKS[env] or (spread is None) != (env == "smac"):
        raise ValueError(f"{path} holds a team for {about['env']} {about['task']}, not for {env}")
    if not all(x.isfinite().all() for layer in layers for x in layer):
        raise ValueError(f"{path} holds weights that are not finite")
    game = envs.make(env, about["task"])
    N, A = game.num_agents, game.num_actions
    found, wanted = (widths[0], widths[-1]), (game.obs_dim + N + recall * A * (spread is None), A)
    if found != wanted:
        raise ValueError(
            f"{path} does not fit {env} {about['task']}: it has (inputs, outputs) = {found}, the environment calls "
            f"for {wanted}"
        )
    last = None

    def network(x):
        x = x.double()  # in float32 the last digits would be the processor's, and a body goes its own way from there
        for w, b in layers[:-1]:
            x = F.relu(x @ w + b)
        return x @ layers[-1][0] + layers[-1][1]

    def play_continuous(t, obs, info, generator):
        mean = network(torch.cat([obs, torch.eye(N).expand(len(obs), N, N)], -1)).tanh().float()  # (B, N, A)
        return mean if generator is None else mean + spread.float() * normal(mean.shape, generator)

    def play(t, obs, info, generator):
        nonlocal last
        avail = info["avail_actions"]  # (B, N, A)
        B = len(avail)
        last = torch.zeros(B, N, recall * A) if t == 0 else last  # the newest first
        logits = (
            network(torch.cat([obs, last, torch.eye(N).expand(B, N, N)], -1)).float().masked_fill(~avail, -torch.inf)
        )
        if generator is not None:
            logits = logits - torch.empty_like(logits).exponential_(generator=generator).log()
        action = logits.argmax(-1)  # with these clocks, a draw from the policy
        last = torch.cat([F.one_hot(action, A).float(), last], -1)[..., : recall * A]
        return action

    return play if spread is None else play_continuous, about
