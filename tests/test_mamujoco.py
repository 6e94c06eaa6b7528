"""The bodies: Gymnasium's own beside ours, bit for bit; what agents see and move; seeds, ends."""

import gymnasium
import numpy as np
import pytest
import torch

import envs

TASKS = [(body, task) for body in ("halfcheetah", "reacher", "ant") for task in envs.TASKS[body]]
PLAIN = {
    "halfcheetah": ("HalfCheetah-v5", {}),
    "reacher": ("Reacher-v5", {}),
    "ant": ("Ant-v5", {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0}),
}

# Which number each action goes to in Gymnasium's action, (N, A).
MOTORS = {
    "halfcheetah": [[2, 1, 0], [5, 4, 3]],
    "reacher": [[0], [1]],
    "ant": [[2, 3], [4, 5], [6, 7], [0, 1]],
}
# What agents see: for HalfCheetah, entries of qpos (0 to 8: x z pitch, bthigh bshin bfoot, fthigh
# fshin ffoot) followed by qvel (9 to 17, in the same order); for the others, entries of the state.
SEES = {
    "2x3": [
        # bfoot   bshin   bthigh  fthigh, speeds x pitch z, places x pitch z
        [5, 14, 4, 13, 3, 12, 6, 9, 11, 10, 0, 2, 1],
        # ffoot   fshin   fthigh  bthigh
        [8, 17, 7, 16, 6, 15, 3, 9, 11, 10, 0, 2, 1],
    ],
    "all-observant": [list(range(11))] * 2,
    "independent": [[0, 2, 6, 4, 5], [1, 3, 7, 4, 5]],
    "leader-only": [[0, 2, 6, 1, 3, 7, 4, 5], [0, 2, 6, 1, 3, 7]],
    "full": [list(range(27))] * 4,
    "partial": [
        [0, 1, 2, 3, 4, 16, 17, 18, 13, 14, 15, 5, 19, 6, 20],
        [7, 21, 8, 22],
        [9, 23, 10, 24],
        [11, 25, 12, 26],
    ],
}


def random_actions(game, seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield 2 * torch.rand(game.action_space.shape, generator=generator) - 1


def rest(game):
    return torch.zeros(game.action_space.shape)


def expected(body, task, plain):
    """The state and the agents' views, zero-padded, from the plain body's own numbers."""
    q, v = plain.data.qpos, plain.data.qvel
    if body == "halfcheetah":
        state, seen = np.concatenate([q[1:], v]), np.concatenate([q, v])
    elif body == "reacher":
        gap = plain.get_body_com("fingertip") - plain.get_body_com("target")
        state = seen = np.array([*np.cos(q[:2]), *np.sin(q[:2]), q[2], q[3], v[0], v[1], *gap])
    else:
        state = seen = np.concatenate([q[2:], v])
    length = max(map(len, SEES[task]))
    views = [np.pad(seen[columns], (0, length - len(columns))) for columns in SEES[task]]
    return state.astype(np.float32), np.array(views).astype(np.float32)


@pytest.mark.parametrize("body, task", TASKS)
def test_side_by_side_with_gymnasium(body, task):
    B, steps = 2, 1000
    game = envs.make(body, task, num_envs=B)
    obs, info = game.reset(seed=7)
    name, options = PLAIN[body]
    plains = [gymnasium.make(name, **options) for _ in range(B)]
    for b, plain in enumerate(plains):
        plain.unwrapped.np_random = np.random.default_rng((7, b))
        plain.reset()
    actions, ends = random_actions(game), 0
    for _ in range(steps):
        for b, plain in enumerate(plains):
            state, views = expected(body, task, plain.unwrapped)
            assert np.array_equal(info["state"][b], state) and np.array_equal(obs[b], views)
        action = next(actions)
        obs, reward, terminated, truncated, info = game.step(action)
        for b, plain in enumerate(plains):
            one = np.zeros(plain.unwrapped.model.nu)
            one[np.array(MOTORS[body])] = action[b].double()
            seen, r, te, tr, _ = plain.step(one)
            state = info["state"][b].numpy()
            shown = np.delete(state, 10) if body == "reacher" else state  # the height is not in v5
            assert np.array_equal(shown[: len(seen)], seen.astype(np.float32))
            assert np.array_equal(game.qpos[b], plain.unwrapped.data.qpos)  # in double precision
            assert np.array_equal(game.qvel[b], plain.unwrapped.data.qvel)
            assert reward[b].item() == np.float32(r)
            assert (terminated[b].item(), truncated[b].item()) == (te, tr and not te)
            if te or tr:
                plain.reset()
                ends += 1
        over = terminated | truncated
        if over.any():  # the next states must be those of Gymnasium's second, third... games
            obs, info = game.reset(options={"reset_mask": over})
    assert ends >= {"halfcheetah": 2, "reacher": 40, "ant": 2}[body]


@pytest.mark.parametrize("body", PLAIN)
def test_a_partial_reset_leaves_the_others_alone(body):
    left, right = (envs.make(body, num_envs=3, time_limit=12) for _ in range(2))
    others, stream = [0, 2], random_actions(left)
    for game in (left, right):
        game.reset(seed=0)
    for t in range(12):
        action = next(stream)
        a, b = left.step(action), right.step(action)
        assert torch.equal(a[4]["state"][others], b[4]["state"][others])
        if t in (4, 9):
            middle = torch.tensor([False, True, False])
            left.reset(seed=9 if t == 4 else None, options={"reset_mask": middle})
    # The game that began again is not at its limit, and the others' random numbers are unused.
    assert (b[2] | b[3])[others].all() and not a[3][1]
    mask = torch.tensor([True, False, True])
    rows = [game.reset(options={"reset_mask": mask})[1]["state"] for game in (left, right)]
    assert torch.equal(rows[0][others], rows[1][others])


@pytest.mark.parametrize("height, falls", [(0.15, True), (0.7, False), (1.1, True)])
def test_an_ant_is_terminated_outside_its_heights(height, falls):
    # At the time limit, an end by the rules goes first; the ground would push the ant up.
    game = envs.make("ant", time_limit=1)
    game.reset(seed=0)
    game.qpos[0][2] = height
    game.model.opt.disableflags |= game.mujoco.mjtDisableBit.mjDSBL_CONTACT
    _, _, terminated, truncated, info = game.step(rest(game))
    assert terminated.item() == falls and truncated.item() != falls
    _, reward, _, _, after = game.step(rest(game))
    assert reward == 0 and torch.equal(after["state"], info["state"])


def test_a_limited_elbow_bends_one_way_only():
    """Its elbow is pushed the other way all the time; without limits it turns on."""
    for limits, low, high in (({"joint1": [0, 3]}, -0.1, 3), (None, -99, -2)):
        game = envs.make("reacher", num_envs=4, limits=limits)
        game.reset(seed=3)
        for _ in range(40):
            game.step(torch.tensor([[[0.0], [-1.0]]] * 4))
        elbow = np.array(game.qpos)[:, 1]
        assert (low < elbow).all() and (elbow < high).all()


@pytest.mark.parametrize("body, task", TASKS)
def test_a_state_can_be_put_back(body, task):
    """What follows is nearly as it was: MuJoCo's solver has forgotten where it stopped."""
    game, again = (envs.make(body, task, num_envs=3) for _ in range(2))
    game.reset(seed=0)
    actions = random_actions(game)
    for _ in range(5):  # no ant has fallen yet
        *_, info = game.step(next(actions))
    _, found = again.set_state(info["state"])
    own = 8 if body == "reacher" else None  # then comes the gap, which lags behind the joints
    assert torch.allclose(found["state"][:, :own], info["state"][:, :own], atol=1e-6)
    act = next(actions)
    for now, then in zip(game.step(act)[1:3], again.step(act)[1:3]):
        assert torch.allclose(now.float(), then.float(), atol=0.1)


@pytest.mark.parametrize("body, speed", [("ant", np.nan), ("reacher", 1e11)])
def test_an_unstable_simulation_is_reported(body, speed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    game = envs.make(body, num_envs=3)
    game.reset(seed=0)
    game.step(rest(game))
    game.qvel[1][1] = speed
    said = f"{body}: MuJoCo became unstable in game 1, 1 steps after its start"
    with pytest.raises(FloatingPointError, match=said):
        game.step(rest(game))
    game.reset(options={"reset_mask": torch.tensor([False, True, False])})
    obs, reward, _, _, _ = game.step(rest(game))
    assert obs.isfinite().all() and reward.isfinite().all()
