"""The keeper of a run: what a script's `main` takes care of besides learning."""

from data.dataset import fingerprint, save
from data.run.command_line import launch, read_args, read_flags
from data.run.curves import draw_curves, over_seeds
from data.run.evaluate import game, game_options, score, stream
from data.run.files import (
    provenance,
    read_config,
    read_tensors,
    save_csv,
    save_figure,
    save_json,
    save_tensors,
)
from data.run.keeper import Run, choose_device, say
from data.run.team import Player, ask, kept_player, load_team, memoryless, remembering
