"""Exact InSPO on tables, to hold the script and the paper's propositions against. In float64.

Two agents, X states, A actions each. `mu` and `pi` are pairs of policies (X, A), T = alpha + beta.
The joint behaviour is taken as the product of its marginals, as the paper's decomposition does.
"""

import torch


def random_game(seed, states=3, actions=3):
    """Transitions (X, A, A, X), rewards (X, A, A) and behaviour policies of a cooperative game."""
    g, kind = torch.Generator().manual_seed(seed), torch.float64
    shape = states, actions, actions
    transitions = torch.rand(*shape, states, generator=g, dtype=kind) ** 3
    rewards = torch.randn(shape, generator=g, dtype=kind)
    mu = [torch.rand(states, actions, generator=g, dtype=kind) + 0.05 for _ in range(2)]
    mu = [m / m.sum(-1, keepdim=True) for m in mu]
    return transitions / transitions.sum(-1, keepdim=True), rewards, mu


def evaluate(game, pi, alpha, beta, gamma):
    """Eq. 10, solved exactly: the regularised value V (X,) and joint Q (X, A, A) of a policy."""
    transitions, rewards, mu = game
    joint = pi[0][:, :, None] * pi[1][:, None, :]  # (X, A, A)
    cost = 0.0
    for p, m in zip(pi, mu):
        cost = cost + (p * (alpha * (p / m).log() + beta * p.log())).sum(-1)  # (X,)
    P = (joint[..., None] * transitions).sum((1, 2))  # (X, X)
    paid = (joint * rewards).sum((1, 2)) - cost
    V = torch.linalg.solve(torch.eye(len(P), dtype=P.dtype) - gamma * P, paid)
    return V, rewards + gamma * transitions @ V


def local_q(Q, pi, i):
    """Q_i(s, a_i): the joint Q averaged over what the teammate does now, (X, A)."""
    return torch.einsum("xab,xb->xa" if i == 0 else "xab,xa->xb", Q, pi[1 - i])


def boltzmann(q, mu, alpha, beta):
    """Eq. 12: mu^(alpha/T) exp(Q/T), normalised."""
    return torch.softmax((q + alpha * mu.log()) / (alpha + beta), -1)


def sweep(game, pi, alpha, beta, gamma, order=(0, 1)):
    """Eq. 13: the agents improve in turn, each against the new policies of those before it."""
    _, Q = evaluate(game, pi, alpha, beta, gamma)
    pi = list(pi)
    for i in order:
        pi[i] = boltzmann(local_q(Q, pi, i), game[2][i], alpha, beta)
    return pi


def one_state_operator(share, reward, pi, alpha, beta, order=(0, 1), see="now"):
    """One sweep of InSPO on a one-step game, in the limit of infinitely many samples.

    The resampled joint distribution is W = share * pi_j / mu(a_j|a_i). Q_i is its mean reward, and
    the lowest reward where it has no mass; the policy is cloned from the resampled actions.

    Args:
        share: (A, A) how often each joint action is in the data; reward (A, A).
        see: "now" (sequential), "before" (all see the sweep's first policies), "nothing" (every
            ratio is 1).
    """
    pi, before = list(pi), list(pi)
    for i in order:
        P, R = (share, reward) if i == 0 else (share.T, reward.T)  # rows: agent i
        mu, W = P.sum(1), P
        if see != "nothing":
            teammate = (pi if see == "now" else before)[1 - i]
            conditional = P / mu.clamp(min=1e-300)[:, None]
            W = torch.where(P > 0, P * teammate / conditional, 0.0)
        d = W.sum(1)
        q = torch.where(d > 0, (W * R).sum(1) / d, reward.min())
        logit = d.log() + (q - beta * mu.log()) / (alpha + beta)
        pi[i] = torch.softmax(torch.where(d > 0, logit, -torch.inf), 0)
    return pi
