"""What the updates by hand share: one network at a time, and an optimiser's step for each seed."""

import torch


def one(network, q, x):
    """What network q of many, side by side, makes of one input (I,)."""
    for layer in network:
        if hasattr(layer, "weight"):
            x = x @ layer.weight[q] + layer.bias[q, 0]
        else:
            x = torch.where(x > 0, x, 0.0)
    return x


def leaves(network, s):
    """The weights and biases of seed s, (I, O) and (O,), to be trained on their own."""
    layers = [layer for layer in network if hasattr(layer, "weight")]
    pairs = [(layer.weight[s], layer.bias[s, 0]) for layer in layers]
    return [[x.detach().clone().requires_grad_() for x in pair] for pair in pairs]


def forward(layers, x):
    """What `leaves` make of inputs x (..., I)."""
    for k, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        x = x.relu() if k < len(layers) - 1 else x
    return x


def step(adam, module, losses, limit):
    """One step of a stock optimiser down the losses of all seeds, (S,) of a graph.

    A seed's gradient is as long as the limit at most. Returns whether it was longer, for each.
    """
    parameters = list(module.parameters())
    total, longer = [torch.zeros_like(p) for p in parameters], []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        length = torch.cat([g.flatten() for g in gradients]).norm().item()
        for whole, gradient in zip(total, gradients):
            whole += gradient * min(1, limit / length)
        longer.append(length > limit)
    for parameter, gradient in zip(parameters, total):
        parameter.grad = gradient
    adam.step()
    return longer


def streams(seeds=(0, 1)):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def begins_well(Linear, policies):
    """Assert that layers begin as torch's own do, a policy's head small, networks differently."""
    layer, head = Linear(100, 50, streams()), Linear(100, 50, streams(), scale=0.1)
    assert 0.099 < layer.weight.abs().max() <= 0.1 and 0.09 < layer.bias.abs().max() <= 0.1
    assert layer.weight.mean().abs() < 1e-3 and not torch.equal(*layer.weight)
    assert torch.allclose(head.weight, 0.1 * layer.weight) and not head.bias.any()
    head = policies.body[-1]
    assert 0.08 < head.weight.abs().max() * head.weight.shape[1] ** 0.5 < 0.1


def draws_well(draw_rows, data, args):
    """Assert that minibatches are of steps, all of them, and each seed's own."""
    args.batch_size = 100
    rows = draw_rows(streams(), data, args)
    assert torch.equal(draw_rows(streams([1]), data, args)[0], rows[1])
    assert set(rows[0].tolist()) == set(data.steps.tolist()) and not torch.equal(*rows)


@torch.no_grad()
def follow(targets, networks, tau):
    """Move copies (parameters) by tau to what they are copies of."""
    for target, network in zip(targets, networks, strict=True):
        target.copy_((1 - tau) * target + tau * network)


@torch.no_grad()
def stir(module, size=0.3):
    """Move all parameters at random, so that copies are not what they are copies of."""
    for parameter in module.parameters():
        parameter += size * torch.randn_like(parameter)


def same(module, other, error=1e-9):
    """Whether two modules hold the same numbers."""
    mine, theirs = module.state_dict(), other.state_dict()
    return all(torch.allclose(mine[k], theirs[k], rtol=error, atol=error) for k in mine)
