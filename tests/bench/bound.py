"""What a flow's guesses cost: an upper bound of −log p̂(x₁), along any velocity, and the velocity
of which it is tight. Tutorial, chapters 6 and 9; for the tables of this folder.
"""
import torch

import fudoki


def time_reversal(path, x_t, x_1, t):
    """u_t = R_t(x, x_t) p_t(x | x₁) / p_t(x_t | x₁), where R_t(x, z) ≥ 0, the rate from x to z of
    a noise that does not know x₁, solves −∂_t p_t(z | x₁) = Σ_x p_t(x | x₁) R_t(x, z) as far as
    there is such a noise; what is left of ∂_t p_t moves with the least energy. O(V³); t is the
    same in all rows. (B, L) -> (B, L, V)"""
    states = torch.arange(len(path.embedding), device=x_t.device)
    p, dl = (a.double() for a in fudoki.growth(path, states, states, t[:1].repeat(len(states), 1)))
    dp = p * (dl - (p * dl).sum(-1, keepdim=True))                      # (x₁, x)
    R = torch.linalg.solve_ex(p, -dp).result.fill_diagonal_(0)          # (x, z)
    exists = -R.clamp(max=0).sum() < 0.1 * R.abs().sum()                # and is finite
    R = R.clamp(min=0) if exists else torch.zeros_like(R)
    left = (dp - p * R.sum(-1) + p @ R)[x_1]
    p, here = p[x_1], fudoki.entry(p[x_1], x_t)
    u = R[:, x_t].T * p / here + (left - fudoki.entry(left, x_t) / here * p).relu()
    return u.where(here > 1e-12, 0.).float()            # from where a token never is, none moves


@torch.no_grad()
def bound(path, p_1t, x_1, x_t, t, velocity=time_reversal):
    """What it costs, in nats, that a model does not know x₁: per unit of time at t, a number, and
    for stopping there; (B, L) each. With p(x₁ | x_t) as logits, and averages over x_t,

        −log p̂(x₁) ≤ ∫₀ᵀ Σ_x [u log(u/û) − u + û] dt − log p(x₁ | x_T),

    u = u_t(x, x_t | x₁), û = Σ_{x₁} p(x₁ | x_t) u_t(x, x_t | x₁): the divergence of the process
    that knows x₁ from the model's. Tight, if p is the posterior, along `time_reversal` of a noise
    that does not know x₁; otherwise the past has shown more of x₁ than x_t still does."""
    p, clean, noisy = p_1t.float().softmax(-1).flatten(0, -2), x_1.flatten(), x_t.flatten()
    V, X = p.shape[-1], len(path.embedding)
    every, cost = torch.arange(V, device=p.device), p.new_empty(2, len(p))
    impossible = (path(every, p.new_full((V, 1), t)) == -torch.inf).float()             # (x₁, z)
    for some in noisy.unique().split(8 * fudoki.at_once(V * X, p)):
        u_all = velocity(path, some.repeat_interleave(V), every.repeat(len(some)),
                         p.new_full((len(some) * V, 1), t)).view(-1, V, X)          # (z, x₁, x)
        for z, u_z in zip(some, u_all):
            at, own, u_z[:, z] = noisy == z, clean[noisy == z], 0.      # of rounding size, maybe
            u, û = u_z[own], (p[at] @ u_z).clamp(min=torch.finfo(p.dtype).tiny)
            cost[0, at] = (torch.xlogy(u, u) - torch.xlogy(u, û) - u + û).sum(-1)
            stays = p[at] @ impossible[:, z] * (own == z)               # as in `finish`
            cost[1, at] = -(fudoki.entry(p[at], own)[:, 0] + stays).log()
    return cost.view(2, *x_1.shape)


@torch.no_grad()
def of_rows(model, x_1, free, n=16, velocity=time_reversal):
    """Upper bounds of −log p̂ of what is free, given the rest, in nats: (n, B), one for each time
    T = ½/n, 1½/n … at which the process may stop."""
    cost = []
    for T in (torch.arange(n) + 0.5).div(n).tolist():
        x_t = model.corrupt(x_1, free, T)
        p_1t = model.net(x_t, free, T)
        cost.append(sum(
            (bound(model.paths[m], p_1t[m], x_1[m], x_t[m], T, velocity) * f).sum(-1)
            for m, f in free.items() if f.any()))
    rate, rest = torch.stack(cost, 1)                                           # (n, B)
    return (rate.cumsum(0) - rate / 2) / n + rest
