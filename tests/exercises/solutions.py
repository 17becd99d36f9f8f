"""Reference solutions of exercises.py. Read them when yours are written.
























"""
import math

import numpy as np
import torch

import fudoki


class CosinePath(fudoki.UniformPath):
    def logits(self, x_1, t):
        return super().logits(x_1, torch.sin(math.pi * t / 2) ** 2)


def uniform_velocity(path, x_t, x_1, t):
    return path.one_hot(x_1) * ~path.one_hot(x_t) / (1 - t)


def metropolis(path, x_t, x_1, t, eta=1.):
    p_t, dl = fudoki.growth(path, x_t, x_1, t)
    accepted = (p_t / fudoki.entry(p_t, x_t).clamp(min=1e-30)).clamp(max=1)
    return p_t * dl.relu() + eta * accepted / p_t.shape[-1] * ~path.one_hot(x_t)


def stays(path, x_t, x_1, t, s):
    l_t = path(x_1, t).log_softmax(-1)
    change = path(x_1, s) - l_t
    ahead = (change - fudoki.entry(change, x_t)).relu()
    return 1 / (1 + (l_t.exp() * torch.expm1(ahead)).sum(-1))


def mean_rates(path, t):
    V, q = len(path.embedding), path.frequency / path.frequency.sum()
    x_1, z = torch.cartesian_prod(torch.arange(V), torch.arange(V)).T
    times = torch.full((V * V, 1), t)
    u = fudoki.kinetic_optimal(path, z, x_1, times).view(V, V, V)                   # (x₁, z, x)
    p_t = fudoki.entry(path(x_1, times).softmax(-1), z).view(V, V)                  # (x₁, z)
    joint = q[:, None] * p_t
    return torch.einsum("az, azx -> zx", joint / joint.sum(0), u)


def linear_distance(path):
    x_1 = torch.arange(len(path.embedding))
    d = path.distance(x_1)                                                          # (x₁, x)
    own = torch.nn.functional.threshold(torch.linspace(-18, 18, 2001).sigmoid(), 1e-7, 0.)
    mean = torch.stack([(path.logits(x_1, u.expand(len(d), 1)).softmax(-1) * d).sum(-1)
                        @ path.frequency.float() for u in own])
    done = (1 - mean / mean[0]).double().numpy()                                    # grows
    table = torch.from_numpy(np.interp(np.linspace(0, 1, 1001), done, own.numpy())).float()
    table[0], table[-1] = 0, 1

    def clock(t):
        i = (t * 1000).long().clamp(0, 999)
        return torch.lerp(table[i], table[i + 1], t * 1000 - i)
    return clock


class Roundabout(fudoki.UniformPath):
    """Most tokens are another one for a while."""

    def logits(self, x_1, t):
        friend = (x_1 + 1) % len(self.embedding)
        return super().logits(x_1, t) + 60 * (t * (1 - t)) ** 2 * self.one_hot(friend)


def claims():
    c, u = torch.tensor([[3., 0.], [2., 2.]]) / 7, torch.tensor([[1., 4.], [2., 2.]]) / 9
    points = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    return dict(a=True, b=Roundabout, c=True, d="uniform", e=True, f=(c, u), g=points, h=True)


@fudoki.rowwise
def race_by_two(path, x_t, x_1, t, s):
    p_t, p_s = (path(x_1, time).softmax(-1) for time in (t, s))
    u, v = torch.rand(2, len(x_t), 1)
    target, turn = 1 / u - 1, torch.where(p_s > 0, p_t / p_s, torch.inf)            # 1/r_x
    stay = (fudoki.entry(turn, x_t) * p_s - p_t).relu().sum(-1, keepdim=True) <= target
    order = turn.argsort(-1)
    early, late = (p.gather(-1, order).cumsum(-1) for p in (p_t, p_s))
    known = turn.gather(-1, order) * late - early <= target     # h at the turns, in their order
    among = late.gather(-1, known.sum(-1, keepdim=True).clamp(min=1) - 1)
    winner = torch.searchsorted(late, v * among, right=True).clamp(max=p_s.shape[-1] - 1)
    return torch.where(stay[:, 0], x_t, order.gather(-1, winner)[:, 0])
