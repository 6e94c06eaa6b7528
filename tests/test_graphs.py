"""Every update as one graph, and on a GPU that is only pretended: no mixed devices, no wait for the host."""

import collections

import bench
import pytest
import torch
from pretended_gpu import AWAY, PretendedGPU
from updates import EVALUATIONS, GAMES, UPDATES

import envs
from envs.play import play


@pytest.fixture
def gpu():
    with PretendedGPU() as mode:
        yield mode


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64):
        yield torch._dynamo
    torch._dynamo.reset()


# ---------------------------------------------------------------- the pretended GPU itself
def test_a_planted_wait_is_seen(gpu):
    x = torch.rand(3, device=AWAY)
    for kind, plant in {
        "_local_scalar_dense": lambda: bool((x > 2).any()), "tolist": x.tolist, "copy to the host": x.cpu,
        "a mask as an index": lambda: x[x > 0.5], "an index from the host": lambda: x[[0, 1]], "nonzero": x.nonzero,
        "copy to the device": lambda: x + torch.ones(3).to(AWAY),
    }.items():  # fmt: skip
        gpu.clear()
        plant()
        assert any(wait.startswith(f"{kind} at tests/test_graphs.py:") for wait in gpu.waits), (kind, gpu.waits)
    gpu.clear()
    torch.where(x > 0.5, x, 0.0).sum() + x[torch.arange(2, device=AWAY)].mean()
    assert not gpu.waits and gpu.ops["sum"] == 1


def test_a_planted_mix_of_devices_is_seen(gpu):
    with pytest.raises(RuntimeError, match="mixed devices in add at tests/test_graphs.py"):
        torch.rand(3, device=AWAY) + torch.ones(3)


def test_its_numbers_and_gradients_are_those_of_a_cpu(gpu):
    x = torch.arange(3.0, device=AWAY).requires_grad_()
    (x**2).sum().backward()
    assert x.grad.tolist() == [0, 2, 4] and x.device.type == AWAY


# ---------------------------------------------------------------- the scripts
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_never_waits_for_the_host(gpu, name):
    make, flags = UPDATES[name]
    made = make(AWAY, flags=flags)  # mixed devices would raise, here or below
    assert all(p.device.type == AWAY for module in made.modules for p in module.parameters())
    for part, update in made.updates.items():
        update()  # the first may set things up
        gpu.clear()
        update()
        assert not gpu.waits, (part, gpu.waits)
        assert gpu.ops.total() > 20


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_is_one_graph_and_equals_eager(float64, dynamo, name):
    make, flags = UPDATES[name]
    graphs = collections.Counter()

    def whole(function):
        """`function` compiled, which fails if it is not one graph; what the backend gets is counted."""

        def backend(graph, inputs):
            graphs[function.__name__] += any(node.op.startswith("call") for node in graph.graph.nodes)
            return graph

        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    eager, compiled = make(flags=flags), make(flags=flags, compiled=whole)
    for part in eager.updates:
        for _ in range(3):
            eager.updates[part]()
            compiled.updates[part]()
    assert sum(graphs.values()) >= len(eager.updates), graphs
    before = dict(graphs)
    for part in eager.updates:  # and no further graph is made once all of them are there
        compiled.updates[part]()
        eager.updates[part]()
    assert dict(graphs) == before
    for one, other in zip(eager.modules, compiled.modules, strict=True):
        state = other.state_dict()
        for key, value in one.state_dict().items():
            assert torch.allclose(value.double(), state[key].double(), rtol=0, atol=1e-9), key


@pytest.mark.parametrize("name", GAMES)
def test_a_step_of_an_environment_never_waits_for_the_host(gpu, name):
    env, task = GAMES[name]
    game = envs.make(env, task, num_envs=3, device=AWAY)
    obs, info = game.reset(seed=0)
    for step in range(3):
        actions = info["avail_actions"].to(torch.uint8).argmax(-1)
        gpu.clear()
        obs, reward, terminated, truncated, info = game.step(actions)
        _, info = game.reset(options={"reset_mask": terminated | truncated})
        assert not gpu.waits, gpu.waits
    assert obs.device.type == reward.device.type == AWAY


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_waits_a_fixed_number_of_times(gpu, name):
    evaluate = EVALUATIONS[name](AWAY)
    gpu.clear()
    evaluate()
    assert 0 < gpu.waits.total() <= 20, gpu.waits


def test_a_game_of_any_length_is_asked_eight_times_whether_it_is_over(gpu):
    for limit in (9, 50, 400):
        game = envs.make("bridge", "", 3, AWAY, time_limit=limit)
        gpu.clear()
        play(game, lambda obs, info, memory: (torch.zeros(3, 2, dtype=torch.int64, device=AWAY), memory))
        assert sum(n for wait, n in gpu.waits.items() if "play.py" in wait) <= 8, gpu.waits


# ---------------------------------------------------------------- what measures speed
def test_speed_is_measured(capsys):
    """`tests/bench.py` names parts of scripts and environments that may change."""
    assert bench.environment("bridge", "", 4, "cpu", steps=5) > 0
    assert bench.smac("3m", 4, "cpu", steps=3) > 0
    bench.bench_windows("cpu")
    assert float(capsys.readouterr().out.split("renewed: ")[1].split()[0]) > 0
