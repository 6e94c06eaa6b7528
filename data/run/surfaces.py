"""The pictures of algorithms/polygames.py: what policies do on the surface of a polynomial reward.

Joint actions, policies (x, y) and paths are tensors whose last dimension is 2. S seeds, K steps, M
data points.
"""

from matplotlib.figure import Figure

from envs.polynomial import DATA, surface

MADDPG, PJAP, PART, TRUE = "#d1510c", "#0b6fb8", "#eea37d", "#111111"
WIDTH = {MADDPG: 3.0, PJAP: 1.6}  # both stay visible where they coincide


def draw_paths(axis, paths, colour):
    """Policies over time (S, K+1, 2): lines from a ring to a star, the first seed in bold."""
    x, y = paths.cpu().numpy().T  # (K+1, S)
    axis.plot(x, y, color=colour, lw=0.7, alpha=0.4)
    axis.plot(x[:, 0], y[:, 0], color=colour, lw=WIDTH[colour])
    axis.plot(x[0, 0], y[0, 0], "o", mfc="white", mec=colour)
    axis.plot(x[-1, 0], y[-1, 0], "*", ms=13, mfc=colour, mec="white")


def mark_peaks(axis, peak):
    """Crosses at both peaks of twin peaks."""
    axis.plot((-peak, peak), (-peak, peak), "x", color=TRUE)


def band(axis, values, colour, label=None):
    """Curves of all seeds (S, K): their mean as a line, their range as a band."""
    values = values.cpu()
    low, high = values.amin(0), values.amax(0)
    axis.plot(values.mean(0), color=colour, lw=WIDTH[colour], label=label)
    axis.fill_between(range(values.shape[1]), low, high, color=colour, alpha=0.2)


def draw_step(reward, policy, point, brud, true):
    """One step from a policy, given a data point: BRUD's, its parts, the true gradient, (2,)."""
    figure = Figure(figsize=(5.6, 5.6), layout="constrained")
    axis = figure.subplots()
    surface(axis, reward, "One BRUD step in sign agreement, R = xy")
    step_x, step_y = brud
    steps = brud, (step_x, 0), (0, step_y), true
    names = "BRUD step", "its part of x", "its part of y", "true gradient"
    for step, name, colour in zip(steps, names, (MADDPG, PART, PART, TRUE)):
        scale = dict(scale=1, scale_units="xy", angles="xy")
        axis.quiver(*policy, *step, color=colour, label=name, **scale)
    axis.plot(*policy, "o", mfc="white", mec=TRUE, label="policy")
    axis.plot(*point, "o", color=DATA, label="data point")
    axis.legend(loc="lower left")
    return figure


def draw_buffers(reward, capacities, batch_size, paths, buffers):
    """A column for each size of a replay buffer.

    paths (sizes, S, K+1, 2), their rewards, and what the first seed's buffer holds at the end, of
    buffers (sizes, S, largest size, 2).
    """
    figure = Figure(figsize=(3.6 * len(capacities), 10), layout="constrained")
    axes = figure.subplots(3, len(capacities), squeeze=False).T
    for (top, middle, bottom), capacity, path, buffer in zip(axes, capacities, paths, buffers):
        surface(top, reward, f"buffer of {capacity}, batches of {batch_size}")
        draw_paths(top, path, MADDPG)
        band(middle, reward(*path.unbind(-1)), MADDPG)
        middle.set(xlabel="update", ylabel="reward of the policy")
        surface(bottom, reward, "buffer at the last update", buffer[0], "a", size=1.5)
        draw_paths(bottom, path[:1, -1:], MADDPG)
    return figure


def draw_fields(reward, data, mean, grid, brud, true, paths):
    """Data (M, 2) and their mean; gradients (G, 2) at a grid (G, 2); paths (starts, S, K+1, 2)."""
    figure = Figure(figsize=(13.5, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    surface(left, reward, f"a. {len(data)} data points, mean {mean}", data, "a")
    left.plot(*mean, "P", ms=12, color=TRUE)
    surface(middle, reward, r"b. $\nabla R$ (black) and $\nabla J$ (orange, not to scale)")
    brud = 0.6 * brud / brud.norm(dim=1, keepdim=True)
    for field, colour in ((true, TRUE), (brud, MADDPG)):
        middle.quiver(*grid.cpu().T, *field.cpu().T, color=colour, scale=7, width=0.006)
    surface(right, reward, "c. offline MADDPG from three starts")
    for path in paths:
        draw_paths(right, path, MADDPG)
    return figure


def draw_ends(reward, peak, sigmas, data, paths, centre):
    """A column for each spread of the data (sigmas, M, 2), with one seed's paths and its end.

    paths (sigmas, starts, K+1, 2).
    """
    figure = Figure(figsize=(3.5 * len(sigmas), 4.1), layout="constrained")
    axes = figure.subplots(1, len(sigmas), squeeze=False)[0]
    for axis, sigma, points, starts in zip(axes, sigmas, data, paths):
        surface(axis, reward, rf"$\sigma$ = {sigma:g}", points)
        mark_peaks(axis, peak)
        for path in starts:
            draw_paths(axis, path[None], MADDPG)
    figure.suptitle(f"Offline MADDPG, twin peaks (crosses), data around {centre:.3g}")
    return figure


def draw_methods(reward, peak, sigmas, data, paths, distances):
    """A row for each spread of the data (sigmas, M, 2), with MADDPG and PJAP.

    Their paths (sigmas, 2, S, K+1, 2), how far the data drawn were from the policy (sigmas, 2, S,
    K), and the rewards.
    """
    figure = Figure(figsize=(15.5, 3.7 * len(sigmas)), layout="constrained")
    axes = figure.subplots(len(sigmas), 4, squeeze=False)
    for row, (left, middle, gaps, rewards) in enumerate(axes):
        surface(left, reward, rf"data, $\sigma$ = {sigmas[row]:g}", data[row], "a")
        surface(middle, reward, rf"policies, $\sigma$ = {sigmas[row]:g}")
        mark_peaks(middle, peak)
        for method, colour in enumerate((MADDPG, PJAP)):
            path = paths[row, method]  # (S, K+1, 2)
            name = ("MADDPG", "MADDPG + PJAP")[method]
            draw_paths(middle, path, colour)
            band(gaps, distances[row, method], colour)
            band(rewards, reward(*path.unbind(-1)), colour, name)
        distance = r"mean $|a - \theta|$ of sampled data"
        gaps.set(xlabel="epoch", ylabel=distance)
        rewards.set(xlabel="epoch", ylabel="reward of the policy", ylim=(-1, None))
        rewards.axhline(reward(peak, peak), color=TRUE, ls=":", label="peak")
        rewards.legend(loc="lower right")
    return figure
