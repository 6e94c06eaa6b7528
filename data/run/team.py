"""How teams play, and a team to keep: all seeds' greedy teams as one program for torch alone."""

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.export import Dim
from torch.export.passes import move_to_device_pass

from data.run.files import save


class Player(NamedTuple):
    """How the teams of all seeds play."""

    act: Callable  # (obs (S, B, N, O), avail (S, B, N, A) or None, memory (S, B, N, W), clocks)
    # -> actions (S, B, N) or (S, B, N, A), memory; greedy actions if clocks is None
    modules: object  # the network in it, or a list of them
    memory: int = 0  # W, how many numbers an agent remembers; they are 0 at first
    clocks: tuple | None = None  # the shape of one seed's exponential draws, with which `act`
    # samples, -1 in the place of its games; None: it plays greedily only


def memoryless(policies, encode):
    """The `Player` of policies that act on what they see now.

    Args:
        policies: a module of N agents and A actions: (inputs (S, N, B, I), avail (S, N, B, A) or
            None, if actions are continuous) -> what its `sample` makes actions of.
        encode: what makes inputs of observations (S, B, N, O).
    """

    def act(obs, avail, memory, clocks=None):
        obs = encode(obs).transpose(1, 2)
        avail = avail if avail is None else avail.transpose(1, 2)
        actions = policies.sample(policies(obs, avail), clocks).transpose(1, 2)
        return actions if policies.discrete else actions.clamp(-1, 1).float(), memory

    clocks = (policies.N, -1, policies.A) if policies.discrete else None
    return Player(act, policies, clocks=clocks)


def remembering(think, encode, N, A, H, modules, sampled=True):
    """The `Player` of agents with a GRU, or none, and discrete actions.

    Args:
        think: (inputs (S, B, N, I), avail (S, B, N, A), what the GRU knows (S, B, N, H)) -> the
            actions' log-probabilities or values (S, B, N, A), what the GRU knows now.
        encode: what makes inputs of observations (S, B, N, O) and last actions (S, B, N, A).
        H: 0 without a GRU; then nobody remembers the last action either.
        sampled: whether drawing actions makes sense.
    """
    width = A if H else 0

    def act(obs, avail, memory, clocks=None):
        h, last = memory.split([H, width], -1)
        values, h = think(encode(obs, last), avail, h)
        if clocks is not None:
            values = values - clocks.log()  # which clock rings first is a draw
        actions = values.argmax(-1)
        if H:
            memory = torch.cat([h, F.one_hot(actions, A).to(h.dtype)], -1)
        return actions, memory

    return Player(act, modules, H + width, (-1, N, A) if sampled else None)


# ---------------------------------------------------------------- writing
class Teams(nn.Module):
    """The program: (obs (B, N, O), avail (B, N, A) if discrete, memory (S, B, N, W)) ->
    actions, memory.

    All S teams see the same B games, and each says what it would do: (S, B, N) or (S, B, N, A). At
    a game's start its memory is 0; the buffer `start` (S, 1, N, W) is that of one game.
    """

    def __init__(self, player, start):
        super().__init__()
        modules = [player.modules] if isinstance(player.modules, nn.Module) else player.modules
        self.act, self.networks = player.act, nn.ModuleList(modules)
        self.register_buffer("start", start)

    def forward(self, obs, *rest):
        *avail, memory = rest
        obs, *avail = (x.expand(len(self.start), *x.shape) for x in (obs, *avail))
        return self.act(obs, avail[0] if avail else None, memory)


@torch.no_grad()
def save_team(path, player, seeds, views, actions, device):
    """Export the greedy teams of S `seeds` and write them whole.

    Args:
        views: N and O.
        actions: A, or 0 where actions are continuous and nothing says which are available.
    """
    games, (N, _) = 3, views  # an example; any number of games will do
    dtype = torch.get_default_dtype()
    start = torch.zeros(seeds, 1, N, player.memory, device=device, dtype=dtype)
    example = [torch.zeros(games, *views, device=device)]
    if actions:
        example.append(torch.ones(games, N, actions, dtype=torch.bool, device=device))
    obs, *avail = [{0: Dim.DYNAMIC} for _ in example]
    shapes = obs, (*avail, {1: Dim.DYNAMIC})
    example.append(start.repeat(1, games, 1, 1))
    program = torch.export.export(Teams(player, start), tuple(example), dynamic_shapes=shapes)
    if device.type != "cpu":  # it has to play where there is no GPU
        program = move_to_device_pass(program, "cpu")
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # of weights that are parts of one tensor
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer)
    save(path, buffer.getvalue())


# ---------------------------------------------------------------- reading
# A team.pt2 is a zip archive of numbers and JSON. In torch 2.13 torch.export.load unpickles what
# the archive says is pickled, and hands texts in the JSON to eval and exec. So a stranger's file is
# read here first: it may hold these parts only, and texts of these forms only.
PARTS = (
    r"(data/weights/weight|data/constants/tensor)_\d+|data/\w+/model_\w+_config\.json|"
    r"models/model\.json|data/sample_inputs/model\.pt|archive_(format|version)|byteorder|"
    r"\.data/(version|serialization_id)"
)
NAME = r"([A-Za-z_]\w*(\.\w+)*)?"
TREE = r'("(type|context|children_spec|builtins\.(tuple|list|dict)|null|\[\])"|null|[][{}:,1 ])+'
FORMS = {  # of texts, by their key
    "name": r"\w*",
    "as_name": r"\w*",
    "path_name": r"(weight|tensor)_\d+",
    "target": r"torch\.ops\.aten\.(?!from_file|save)\w+\.[A-Za-z]\w*|torch\.sym_\w+|"
    r"_operator\.(add|sub|mul|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|getitem)",
    "expr_str": r"([A-Z]\w*\(|Symbol\('\w+'|(positive|integer)=True|-?\d+|\)|, )+",
    "in_spec": TREE,
    "out_spec": TREE,
    "torch_version": r"[\w.+]+",
}


def checked(part, key=""):
    """A copy of a kept team's JSON without what only describes it; ValueError for another form."""
    if isinstance(part, list):
        return [checked(x, key) for x in part]
    if isinstance(part, dict):
        if part.get("use_pickle"):
            raise ValueError("it holds pickles")
        blank = {"metadata": {}, "guards_code": []}
        return {checked(k): blank[k] if k in blank else checked(x, k) for k, x in part.items()}
    if isinstance(part, str) and not re.fullmatch(FORMS.get(key, NAME), part, re.ASCII):
        raise ValueError(f"its {key or 'name'} {part[:40]!r} is not one of a kept team")
    return part


def copy_archive(path):
    """A kept team's archive as an open file, each part checked; ValueError if there is more."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as anew:
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            if not re.fullmatch(PARTS, name, re.ASCII):
                raise ValueError(f"it holds {info.filename}")
            part = archive.read(info)
            if name.endswith(".json"):
                part = json.dumps(checked(json.loads(part)))
            elif name.endswith(".pt"):
                torch.load(io.BytesIO(part), "cpu", weights_only=True)
            anew.writestr(f"team/{name}", part)
    copy.seek(0)
    return copy


def load_team(run):
    """The program in a run's team.pt2: see `Teams`. Nothing in it is unpickled or evaluated.

    Raises:
        ValueError: there is none, or it is damaged, or holds something else.
    """
    path = Path(run) / "team.pt2" if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise ValueError(f"no kept team {path}: a finished run of algorithms/ leaves one")
    logging.disable(logging.WARNING)  # torch tells of its own errors at length
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(copy_archive(path)).module()
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        reason = str(error).partition("\n")[0][:100]
        kind = type(error).__name__
        raise ValueError(f"{path} is no kept team, or damaged ({kind}: {reason})") from None
    finally:
        logging.disable(logging.NOTSET)


def ask(team, obs, info, memory):
    """What all teams would do in B games, (S, B, N) or (S, B, N, A), and their memory (S, B, N, W).

    Raises:
        ValueError: the environment does not show what the team was made for.
    """
    seen = (obs, info["avail_actions"]) if "avail_actions" in info else (obs,)
    try:
        return team(*seen, memory)
    except Exception as error:  # an AssertionError of the program's guards, or of its operations
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(f"the team does not fit this environment ({reason})") from None


def kept_player(team):
    """The `Player` of a kept team, whose program plays all S teams in all games: own ones count."""
    S, own = len(team.start), torch.arange(len(team.start))

    def act(obs, avail, memory, clocks=None):
        info = {} if avail is None else {"avail_actions": avail.flatten(0, 1)}
        everybody = memory.new_zeros(S, *memory.shape)
        everybody[own, own] = memory
        actions, everybody = ask(team, obs.flatten(0, 1), info, everybody.flatten(1, 2))
        actions, everybody = (x.unflatten(1, (S, -1))[own, own] for x in (actions, everybody))
        return actions, everybody

    return Player(act, team, team.start.shape[-1])
