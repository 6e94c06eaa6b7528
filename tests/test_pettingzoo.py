"""Real PettingZoo games through envs/foreign.py: they keep the contract, and nothing of them is lost or invented.

The games are those of mpe2, pettingzoo and gymnasium-robotics in requirements.txt, "only for tests"; without them the
tests are skipped. Together they are discrete, continuous, masked, with dying agents, with agents of different shapes,
and with bounds other than [-1, 1]. What toys can show better is in tests/test_foreign.py.
"""

import importlib
import os
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.utils import env_checker
from gymnasium.vector import VectorWrapper

import envs
from envs.play import play

HELPERS = '''"""Games that need a wrapper first, as a user would write it, and factories that do not fit."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from pettingzoo.utils import BaseParallelWrapper, ParallelEnv

from mpe2 import simple_spread_v3


class Flat(BaseParallelWrapper):
    """Each agent's observation in one row; an action mask beside it stays."""

    def observation_space(self, agent):
        space = super().observation_space(agent)
        box = space["observation"] if isinstance(space, Dict) else space
        flat = Box(-np.inf, np.inf, (int(np.prod(box.shape)),), np.float32)
        self.spaces = getattr(self, "spaces", {})
        return self.spaces.setdefault(agent, Dict(dict(space.spaces, observation=flat)) if space != box else flat)

    def flat(self, seen):
        if isinstance(seen, dict):
            return dict(seen, observation=self.flat(seen["observation"]))
        return np.asarray(seen, np.float32).ravel()

    def reset(self, seed=None, options=None):
        obs, infos = self.env.reset(seed, options)
        self.agents = self.env.agents
        return {agent: self.flat(seen) for agent, seen in obs.items()}, infos

    def step(self, actions):
        obs, *rest = self.env.step(actions)
        self.agents = self.env.agents
        return {agent: self.flat(seen) for agent, seen in obs.items()}, *rest


def zombies(**options):
    from pettingzoo.butterfly import knights_archers_zombies_v11

    return Flat(knights_archers_zombies_v11.parallel_env(**options))


def noughts_and_crosses():
    from pettingzoo.classic import tictactoe_v3
    from pettingzoo.utils.conversions import turn_based_aec_to_parallel

    return Flat(turn_based_aec_to_parallel(tictactoe_v3.env()))


once = simple_spread_v3.parallel_env()


def the_same():
    return once


def many(num_envs):
    return gymnasium.make_vec("CartPole-v1", num_envs)


class Toy(ParallelEnv):
    """Two agents, five steps."""

    possible_agents, metadata = ["a", "b"], {}
    view, move = Box(0, 1, (2,)), Discrete(3)

    def __init__(self, kind="", when=2):
        self.kind, self.when = kind, when
        self.move = {"whole": Box(0, 9, (2,), np.int64), "two": MultiDiscrete([2, 2])}.get(kind, Discrete(3))
        if kind == "more":
            self.view = Dict(observation=self.view, action_mask=Box(0, 1, (3,)), more=self.view)

    def observation_space(self, agent):
        return self.view

    def action_space(self, agent):
        return self.move

    def look(self):
        size = 3 if self.kind == "long" and self.t == self.when else 2
        mask = np.zeros(2 if self.kind == "short" and self.t == self.when else 3, np.int8)
        infos = {agent: {"action_mask": mask} if self.kind in ("short", "none") else {} for agent in self.agents}
        return {agent: np.full(size, self.t, np.float32) for agent in self.agents}, infos

    def reset(self, seed=None, options=None):
        self.agents, self.t = list(self.possible_agents), 0
        obs, infos = self.look()
        return obs if self.kind == "old" else (obs, infos)

    def step(self, actions):
        self.t += 1
        dead = {agent: self.kind == "again" and agent == "b" and self.t == 1 for agent in self.agents}
        cut = dict.fromkeys(self.agents, self.t == 5)
        obs, infos = ({}, {}) if self.kind == "quiet" and self.t >= self.when else self.look()
        self.agents = [] if self.t == 5 else [agent for agent in self.agents if not dead[agent]]
        if self.kind == "again" and self.t == self.when:
            self.agents = ["a", "b"]
        return obs, dict.fromkeys(dead, 1.0), dead, cut, infos

    def state(self):
        size = 3 if self.kind == "grow" and self.t == self.when else 4
        return np.zeros((3, 4, 4) if self.kind == "picture" else size)

    def close(self):
        assert not hasattr(self, "closed")
        self.closed = True


def fails():
    raise RuntimeError("no screen,\\n  no game")
'''
DICTIONARY = {"scenario": "HalfCheetah", "agent_conf": "2x3", "agent_obsk": 1}
REAL = {  # name, options, what it shows
    "spread": ("mpe2.simple_spread_v3:parallel_env", {"N": 4}, "discrete"),
    "spread, continuous": ("mpe2.simple_spread_v3:parallel_env", {"continuous_actions": True}, "continuous bounds"),
    "speaker": ("mpe2.simple_speaker_listener_v4:parallel_env", {}, "discrete mixed"),
    "speaker, continuous": ("mpe2.simple_speaker_listener_v4:parallel_env", {"continuous_actions": True},
                            "continuous mixed bounds"),
    "tag": ("mpe2.simple_tag_v3:parallel_env", {}, "discrete mixed"),
    "rock, paper, scissors": ("pettingzoo.classic.rps_v2:parallel_env", {}, "discrete"),
    "noughts and crosses": ("pz_helpers:noughts_and_crosses", {}, "discrete masked terminates"),
    "zombies": ("pz_helpers:zombies", {"spawn_delay": 5, "max_zombies": 20}, "discrete dying terminates"),
    "cheetah": ("gymnasium_robotics.mamujoco_v1:parallel_env", DICTIONARY, "continuous"),
    "cheetah, 0": ("gymnasium_robotics.mamujoco_v1:parallel_env", dict(DICTIONARY, agent_obsk=0), "continuous"),
    "ant, 4x2": ("gymnasium_robotics.mamujoco_v1:parallel_env", {"scenario": "Ant", "agent_conf": "4x2"},
                 "continuous terminates"),
}  # fmt: skip
B = 3
OURS = ["matrix", "bridge", "smac", "halfcheetah", "reacher", "ant"]


@pytest.fixture(scope="module", autouse=True)
def helpers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("helpers")
    (folder / "pz_helpers.py").write_text(HELPERS)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def libraries(request):
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    for name in ("pettingzoo", "mpe2", "gymnasium_robotics") if params.get("name") not in OURS else ():
        pytest.importorskip(name)


def factory(case):
    """The factory of a real game, as a user imports it, and its options."""
    name, options, _ = REAL[case]
    module, _, function = name.partition(":")
    if module == "gymnasium_robotics.mamujoco_v1":
        module = "gymnasium_robotics.envs.multiagent_mujoco.mamujoco_v1"
    return getattr(importlib.import_module(module), function), options


def make(case, num_envs=B, **more):
    name, options, _ = REAL[case]
    return envs.make(name, num_envs=num_envs, **options, **more)


def any_action(game, info, generator):
    """Random actions (B, N) or (B, N, A), available ones where there are masks."""
    if "avail_actions" in info:
        avail = info["avail_actions"]
        return torch.multinomial(avail.flatten(0, 1).double(), 1, generator=generator).view(avail.shape[:2])
    return 2 * torch.rand(game.num_envs, game.num_agents, game.num_actions, generator=generator) - 1


@pytest.mark.filterwarnings("ignore")  # PettingZoo's test warns of much that is allowed
@pytest.mark.parametrize("case", REAL)
def test_they_are_what_they_claim(case):
    from pettingzoo.test import parallel_api_test

    make_game, options = factory(case)
    parallel_api_test(make_game(**options), num_cycles=60)


@pytest.mark.parametrize("case", REAL)
def test_a_thousand_random_steps_keep_the_contract(case):
    game, shows, generator = make(case), REAL[case][2].split(), torch.Generator().manual_seed(0)
    N, A, width, S = game.num_agents, game.num_actions, game.obs_dim, game.state_dim
    assert isinstance(game, gymnasium.vector.VectorEnv) and game.num_envs == B and game.best_return is None
    assert game.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.DISABLED
    first = game.games[0]
    views, moves = zip(*((first.observation_space(a), first.action_space(a)) for a in first.possible_agents))
    sizes = [move.n if isinstance(move, Discrete) else len(move.low) for move in moves]
    widths = [gymnasium.spaces.flatdim(view["observation"] if hasattr(view, "spaces") else view) for view in views]
    assert (width, A) == (max(widths), max(sizes))
    assert ("mixed" in shows) == (len(set(sizes)) > 1 or len(set(widths)) > 1)
    assert ("bounds" in shows) == any(isinstance(move, Box) and move.low.min() != -1 for move in moves)
    obs, info = game.reset(seed=0)
    ends, masked, died, over = [0, 0], False, False, torch.zeros(B, dtype=torch.bool)
    for t in range(1000):
        assert obs.dtype == torch.float32 and obs.shape == (B, N, width) and obs.isfinite().all()
        assert game.observation_space.contains(obs.numpy())
        assert info["state"].dtype == torch.float32 and info["state"].shape == (B, S)
        assert ("avail_actions" in info) == ("discrete" in shows) and "won" not in info
        for i in range(N):
            assert not obs[:, i, widths[i] :].any()
        there = torch.tensor([[agent in g.agents for agent in g.possible_agents] for g in game.games])
        living = there | over[:, None]  # the last ones' last views are kept
        died |= not living.all()
        assert not obs[~living].any()
        if "avail_actions" in info:
            avail = info["avail_actions"]
            assert avail.dtype == torch.bool and avail.shape == (B, N, A) and avail.any(-1).all()
            for i in range(N):
                assert not avail[:, i, sizes[i] :].any()
                masked |= not avail[:, i, : sizes[i]][there[:, i]].all()
            assert avail[~living][:, 0].all() and not avail[~living][:, 1:].any()
        actions = any_action(game, info, generator)
        assert game.action_space.contains(actions.numpy())
        obs, reward, ended, cut, info = game.step(actions)
        assert reward.dtype == torch.float32 and reward.shape == (B,) and reward.isfinite().all()
        assert ended.dtype == cut.dtype == torch.bool and ended.shape == cut.shape == (B,) and not (ended & cut).any()
        over = ended | cut
        ends = [ends[0] + int(ended.sum()), ends[1] + int(cut.sum())]
        if over.any() and t % 3 == 0:  # until then finished games stay put
            obs, info = game.reset(options={"reset_mask": over})
            over = torch.zeros_like(over)
    assert masked == ("masked" in shows) and died == ("dying" in shows) and sum(ends) > 0
    assert (ends[0] > 0) == ("terminates" in shows)
    game.close()


@pytest.mark.parametrize("case", REAL)
def test_nothing_is_lost_or_invented(case):
    """Beside each of the batch's games plays one of the library's, with the same seeds and actions."""
    game, (make_game, options), seeds = make(case), factory(case), [[] for _ in range(B)]

    def spied(reset, seen):
        return lambda seed=None, **more: (seen.append(seed), reset(seed, **more))[1]

    for b, inner in enumerate(game.games):
        inner.reset = spied(inner.reset, seeds[b])
    alone = [make_game(**options) for _ in range(B)]
    names, generator = alone[0].possible_agents, torch.Generator().manual_seed(1)
    obs, info = game.reset(seed=3)
    looks = [alone[b].reset(seed=seeds[b][-1])[0] for b in range(B)]
    over = torch.zeros(B, dtype=torch.bool)
    for t in range(120):
        for b in range(B):
            for i, agent in enumerate(names):
                if agent in looks[b] and (over[b] or agent in alone[b].agents):
                    seen = looks[b][agent]
                    seen = seen["observation"] if isinstance(seen, dict) else seen
                    seen = np.eye(4)[seen] if case.startswith("rock") else np.ravel(seen).astype(np.float32)
                    assert np.array_equal(obs[b, i, : len(seen)].numpy(), seen)
        actions = any_action(game, info, generator)
        obs, reward, ended, cut, info = game.step(actions)
        for b in range(B):
            if over[b]:
                assert reward[b] == 0 and (ended | cut)[b]
                continue
            orders = {}
            for i, agent in enumerate(names):
                space = alone[b].action_space(agent)
                if isinstance(space, Discrete):
                    orders[agent] = int(space.start + actions[b, i])
                else:
                    low, high = space.low.astype(float), space.high.astype(float)
                    share = (actions[b, i, : len(low)].double().numpy() + 1) / 2
                    orders[agent] = (low + share * (high - low)).astype(space.dtype)
            living = list(alone[b].agents)
            looks[b], rewards, gone, late, _ = alone[b].step({agent: orders[agent] for agent in living})
            assert reward[b].item() == pytest.approx(sum(rewards.values()), abs=1e-4, rel=1e-5)
            last = not alone[b].agents
            assert (ended | cut)[b] == last and (not last or cut[b] == any(late[a] and not gone[a] for a in living))
        over = ended | cut
        if over.all():
            obs, info = game.reset(options={"reset_mask": over})
            looks = [alone[b].reset(seed=seeds[b][-1])[0] for b in range(B)]
            over = torch.zeros_like(over)
    assert len({seed for row in seeds for seed in row}) == sum(map(len, seeds))  # every start has its own


@pytest.mark.parametrize("case", ["spread", "zombies", "cheetah"])
def test_a_game_depends_on_the_seed_and_its_number_only(case):
    """Twice the same trajectory; and in a smaller batch, whatever the other games do."""
    films = []
    for num_envs, seed in ((B, 5), (B, 5), (2, 5), (B, 6)):
        game, generators = make(case, num_envs), [torch.Generator().manual_seed(b) for b in range(num_envs)]
        obs, info = game.reset(seed=seed)
        film = [obs[:2]]
        for t in range(60):
            obs, info = game.reset(options={"reset_mask": torch.arange(num_envs) == 2}) if t % 7 == 6 else (obs, info)
            if "avail_actions" in info:
                weights = [torch.rand(game.num_agents, game.num_actions, generator=g) for g in generators]
                actions = (torch.stack(weights) * info["avail_actions"] + info["avail_actions"]).argmax(-1)
            else:
                shape = game.action_space.shape[1:]
                actions = torch.stack([2 * torch.rand(shape, generator=g) - 1 for g in generators])
            obs, *_, info = game.step(actions)
            film.append(obs[:2])
        films.append(torch.stack(film))
    assert torch.equal(films[0], films[1]) and torch.equal(films[0], films[2]) and not torch.equal(films[0], films[3])
    assert not torch.equal(films[0][:, 0], films[0][:, 1])


@pytest.mark.parametrize("name, options, limit", [
    ("mpe2.simple_spread_v3:parallel_env", {}, 25), ("mpe2.simple_spread_v3:parallel_env", {"max_cycles": 7}, 7),
    ("gymnasium_robotics.mamujoco_v1:parallel_env", DICTIONARY, 1000),
    ("gymnasium_robotics.mamujoco_v1:parallel_env", {"scenario": "Reacher", "agent_conf": "2x1"}, 50),
    ("gymnasium_robotics.mamujoco_v1:parallel_env", DICTIONARY | {"max_episode_steps": 9}, 9),
    ("mpe2.simple_spread_v3:parallel_env", {"time_limit": 4}, 4), ("pz_helpers:Toy", {}, 1000),
])  # fmt: skip
def test_the_time_limit_is_the_games_own_or_given_or_a_thousand(name, options, limit):
    game = envs.make(name, num_envs=2, **options)
    assert game.time_limit == limit
    if limit < 100:
        generator = torch.Generator().manual_seed(0)
        played = play(game, lambda obs, info, _: (any_action(game, info, generator), None), seed=0, film=True)
        assert played.film["mask"].sum(1).tolist() == [limit] * 2 and not played.film["terminated"].any()


# ---------------------------------------------------------------- Gymnasium's checks
class Arrays(VectorWrapper):
    """What Gymnasium's checks look at: arrays in place of tensors."""

    def reset(self, *, seed=None, options=None):
        return self.convert(self.env.reset(seed=seed, options=options))

    def step(self, actions):
        return self.convert(self.env.step(torch.as_tensor(actions)))

    def convert(self, x):
        if isinstance(x, dict | tuple):
            return {k: self.convert(v) for k, v in x.items()} if isinstance(x, dict) else tuple(map(self.convert, x))
        return x.numpy()


@pytest.mark.parametrize("name", [*OURS, *REAL])
def test_gymnasiums_checks_that_apply_to_a_batch(name):
    """Gymnasium has no checker for vector environments, but most checks of `check_env` apply to a batch of one game.

    Those of `np_random` do not: a batch has a stream for each game.
    """
    game = Arrays(make(name, 1) if name in REAL else envs.make(name))
    env_checker.check_space_limit(game.observation_space, "observation")
    env_checker.check_reset_options(game)
    env_checker.check_reset_return_type(game)
    env_checker.check_seed_deprecation(game)
    if name not in ("smac", "noughts and crosses", "speaker", "tag"):  # there, what is sampled may not be available
        env_checker.check_returned_data_not_reused(game)
    one, other, new = (game.reset(seed=seed) for seed in (1, 1, 2))
    assert env_checker.data_equivalence(one, other, exact=True)
    if name in ("reacher", "ant", "spread", "speaker", "tag", "cheetah"):  # their starts are drawn
        assert not env_checker.data_equivalence(one, new)
    game.close()


# ---------------------------------------------------------------- what is refused
SPREAD = "mpe2.simple_spread_v3:"


@pytest.mark.parametrize("name, options, said", [
    ("pettingzoo.mpe.simple_spread_v3:parallel_env", {}, "pip install mpe2"),
    ("pettingzoo.butterfly.knights_archers_zombies_v1:parallel_env", {}, "knights_archers_zombies_v11"),
    (SPREAD + "env", {}, "take its parallel_env"),
    (SPREAD + "parallel", {}, "has no function 'parallel'"),
    ("mpe2.simple_spread_v9:parallel_env", {}, "No module named 'mpe2.simple_spread_v9'"),
    (SPREAD + "parallel_env", {"M": 3}, "does not take ['M'] arguments"),
    (SPREAD + "parallel_env", {"time_limit": 0}, "time_limit must be a number of steps"),
    (SPREAD + "parallel_env", {"time_limit": "9"}, "time_limit must be a number of steps"),
    (SPREAD + "parallel_env", {"num_envs": 0}, "num_envs must be at least 1"),
    ("pettingzoo.butterfly.knights_archers_zombies_v11:parallel_env", {}, "flatten them first"),
    ("pz_helpers:the_same", {}, "makes the same game again"),
    ("pz_helpers:many", {}, "starts finished games anew by itself"),
    ("pz_helpers:fails", {}, "RuntimeError: no screen, no game"),
    ("pz_broken:game", {}, "SyntaxError"),
    ("pz_missing:game", {}, "No module named 'no_such_library'"),
    ("gymnasium:Env", {}, "no PettingZoo ParallelEnv"),
    ("pz_helpers:Toy", {"kind": "whole"}, "its actions are boxes of whole numbers"),
    ("pz_helpers:Toy", {"kind": "two"}, "neither all Discrete nor all"),
    ("pz_helpers:Toy", {"kind": "more"}, "its observations are a Dict"),
    ("pz_helpers:Toy", {"kind": "old"}, "does not return observations and infos"),
    ("pz_helpers:Toy", {"kind": "long", "when": 0}, "sees 3 numbers in place of 2"),
    ("pz_helpers:Toy", {"kind": "short", "when": 0}, "has the shape (2,) for 3 actions"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(name, options, said):
    folder = next(path for path in sys.path if os.path.exists(os.path.join(path, "pz_helpers.py")))
    for module, text in (("pz_broken", "def game(:\n"), ("pz_missing", "import no_such_library\n")):
        with open(os.path.join(folder, f"{module}.py"), "w") as file:
            file.write(text)
    importlib.invalidate_caches()
    with pytest.raises(ValueError) as error:
        envs.make(name, **{"num_envs": 2} | options).reset()
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, said", [
    ("again", "the agent b joins later"), ("long", "sees 3 numbers in place of 2"),
    ("short", "has the shape (2,) for 3 actions"), ("grow", "its state changes its size"),
    ("quiet", "the agent a is alive but sees nothing"),
])  # fmt: skip
def test_what_changes_on_the_way_is_one_line(kind, said):
    game = envs.make("pz_helpers:Toy", kind=kind)
    game.reset(seed=0)
    with pytest.raises(ValueError, match="does not fit our interface") as error:
        for _ in range(5):
            game.step(torch.zeros(1, 2, dtype=torch.int64))
    assert said in str(error.value)


def test_last_views_are_kept_and_a_finished_game_stays_put():
    game = envs.make("pz_helpers:Toy", num_envs=2)
    game.reset(seed=0)
    steps = [game.step(torch.zeros(2, 2, dtype=torch.int64)) for _ in range(7)]
    for t, (obs, reward, ended, cut, info) in enumerate(steps, 1):
        assert (obs == min(t, 5)).all() and info["avail_actions"].all()
        assert (cut == (t >= 5)).all() and not ended.any() and (reward == (2 if t <= 5 else 0)).all()


def test_a_game_need_not_tell_what_is_seen_when_it_is_over():
    game = envs.make("pz_helpers:Toy", kind="quiet", when=5)
    game.reset(seed=0)
    *_, (obs, _, _, cut, _) = [game.step(torch.zeros(1, 2, dtype=torch.int64)) for _ in range(5)]
    assert cut.all() and not obs.any()


def test_who_may_do_nothing_may_play_action_0():
    _, info = envs.make("pz_helpers:Toy", kind="none").reset()
    assert info["avail_actions"].tolist() == [[[True, False, False]] * 2]


def test_a_picture_is_no_state():
    game = envs.make("pz_helpers:Toy", kind="picture")
    obs, info = game.reset()
    assert game.state_dim == 4 and torch.equal(info["state"], obs.flatten(1))


def test_games_are_closed_once():
    game = envs.make("pz_helpers:Toy", num_envs=2)
    game.close()
    game.close()
    assert all(inner.closed for inner in game.games)


@pytest.mark.parametrize("case, change, said", [
    ("spread", lambda a: a.float(), "actions must be integers of shape"),
    ("spread", lambda a: a[:, :2], "actions must be integers of shape"),
    ("spread", lambda a: a.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(-1)),
     "game 1, agent 2: action -1 is not available"),
    ("spread", lambda a: a.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(5)),
     "game 1, agent 0: action 5 is not available"),
    ("speaker", lambda a: a.index_put((torch.tensor(2), torch.tensor(0)), torch.tensor(4)),
     "game 2, agent 0: action 4 is not available"),
    ("cheetah", lambda a: a.int(), "actions must be floating-point numbers of shape"),
    ("cheetah", lambda a: a[..., :2], "actions must be floating-point numbers of shape"),
    ("cheetah", lambda a: a.index_put([torch.tensor(k) for k in (1, 1, 2)], torch.tensor(float("nan"))),
     "game 1, agent 1: action nan is not in [-1, 1]"),
    ("cheetah", lambda a: a.index_put([torch.tensor(k) for k in (0, 1, 0)], torch.tensor(-1.5)),
     "game 0, agent 1: action -1.5 is not in [-1, 1]"),
])  # fmt: skip
def test_actions_that_cannot_be_played_are_refused(case, change, said):
    game = make(case)
    _, info = game.reset(seed=0)
    actions = any_action(game, info, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError) as error:
        game.step(change(actions))
    assert said in str(error.value)
    game.step(actions)


def test_a_lacking_entry_of_an_action_is_ignored():
    game = make("speaker, continuous")
    game.reset(seed=0)
    actions = torch.zeros(game.action_space.shape)
    actions[:, 0, 3:] = 7  # the speaker has three of five
    game.step(actions)
    actions[:, 0, 2] = 7
    with pytest.raises(ValueError, match="game 0, agent 0: action 7.0 is not in"):
        game.step(actions)
