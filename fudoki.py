"""FUDOKI in one file: discrete flow matching without masks, for pictures and words in one model.

Tokens start as noise and move, one jump at a time, towards the answer that a network predicts;
every token stays open to revision until the end (arXiv 2505.20147). The file reads from top to
bottom: paths, velocities, steps, tokens, network, LightningModule. The first three are the
mathematics and need no network. `tutorial.md` tells the same story with pictures.

| code     | maths            | shape           | meaning                                         |
|----------|------------------|-----------------|-------------------------------------------------|
| `x_1`    | x₁               | (B, L) long     | clean tokens                                    |
| `t`, `s` | t < s            | (B, 1, 1) float | time now, time after the step, in [0, 1]        |
| `logits` | ℓ_t(x ∣ x₁)      | (B, L, V)       | unnormalised log p_t: a path is this function   |
| `p_t`    | p_t(x ∣ x₁)      | (B, L, V)       | softmax of ℓ_t; p_0 ignores x₁, p_1 = δ(x₁)     |
| `x_t`    | x_t ~ p_t        | (B, L) long     | noisy tokens                                    |
| `p_1t`   | p(x₁ ∣ x_t)      | (B, L, V)       | what the network predicts, position by position |
| `u_t`    | u_t(x, x_t ∣ x₁) | (B, L, V)       | rate of jumping from x_t to x; 0 at x = x_t     |
| `lam`    | λ = Σ_x u_t      | (B, L)          | total jump rate                                 |
"""
import copy
import functools
import inspect
import itertools
import math
import pathlib
import re
import runpy
import types

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

FAR = 1e30          # β at t = 1: every other token is out of reach, and float32 stays finite
CHUNK = 2 ** 19     # numbers in one (rows, V) array, which a CPU's cache holds; of a GPU, 32 times


class Registry(dict):
    """Things by their names. `my:Path` is the Path of my.py here, a file that mentions fudoki: a
    checkpoint names such things, too, and no other file has to run when it is opened."""

    def __missing__(self, name):
        file, _, what = name.partition(":")
        source = pathlib.Path(f"{file}.py")
        if file.isidentifier() and source.is_file() and "fudoki" in source.read_text():
            return self.setdefault(name, runpy.run_path(str(source))[what])
        raise KeyError(name)


# ---------------------------------------------------------------------------------------- 1. paths

class Path(nn.Module):
    """A probability path p_t(x | x₁) from noise (t = 0) to data (t = 1), defined by `logits`.

    embedding (V, D): a frozen vector per token, D = 0 if all are equally far from each other;
    frequency (V,): how often each occurs in the data; what else a path may be told has a default,
    and train.py makes a flag of it.
    """

    def __init__(self, embedding, frequency=None):
        super().__init__()
        self.register_buffer("embedding", embedding.float(), persistent=False)  # made anew

    def _apply(self, fn, recurse=True):     # stays in float32 when the network goes to bfloat16
        return super()._apply(lambda a: fn(a.view(torch.int32)).view(a.dtype), recurse)

    def logits(self, x_1, t):
        """ℓ_t(x | x₁) of every token x, up to a constant: (…) long, (…, 1) float -> (…, V)."""
        raise NotImplementedError

    def one_hot(self, x):
        """1[· = x]: (…) long -> (…, V) bool."""
        return torch.arange(len(self.embedding), device=x.device) == x[..., None]


class UniformPath(Path):
    """Each token is clean with probability t, otherwise drawn uniformly."""

    def logits(self, x_1, t):           # ℓ_t(x | x₁) = log( t·1[x = x₁] + (1 − t)/V )
        return torch.log(t * self.one_hot(x_1) + (1 - t) / len(self.embedding))


class MarginalPath(UniformPath):
    """Each token is clean with probability t, otherwise drawn as often as the data have it, so
    that the noise says no more than it must (2209.14734)."""

    def __init__(self, embedding, frequency=None):
        super().__init__(embedding)
        count = torch.ones(len(embedding)) if frequency is None else frequency + 1.  # none is 0
        self.register_buffer("noise", count / count.sum(), persistent=False)

    def logits(self, x_1, t):           # ℓ_t(x | x₁) = log( t·1[x = x₁] + (1 − t)·q(x) )
        return torch.log(t * self.one_hot(x_1) + (1 - t) * self.noise)


class MaskPath(Path):
    """Each token is clean with probability t, otherwise the extra id [MASK]; it cannot revise."""

    def __init__(self, embedding, frequency=None):
        super().__init__(F.pad(embedding, (0, 1, 0, 1)))
        self.embedding[-1, -1] = 1      # [MASK] is the last id, at right angles to all others

    def logits(self, x_1, t):           # ℓ_t = log t at x₁, log(1 − t) at [MASK], −∞ elsewhere
        mask = self.one_hot(torch.full_like(x_1, len(self.embedding) - 1))
        l = torch.where(self.one_hot(x_1), torch.log(t), -torch.inf)
        return torch.where(mask, torch.log(1 - t), l)


class MetricPath(Path):
    """FUDOKI's path: tokens near x₁ stay likely longest. The released model has exponent 4 on
    normalised embeddings, d = (2 − 2cos)², URSA 2, and 1 is the best found here (tutorial, chapter
    9). schedule: an entry of SCHEDULES."""

    def __init__(self, embedding, frequency=None, exponent=1., normalize=False,
                 schedule="calibrated"):
        super().__init__(F.normalize(embedding, dim=-1) if normalize else embedding)
        self.register_buffer("square", self.embedding.square().sum(-1), persistent=False)
        self.exponent, self.rounding = exponent, 1e-5 * self.square.max().item()
        self.beta = SCHEDULES[schedule](self, frequency)

    def distance(self, x_1):            # d(x, x₁) = ‖e_x − e_{x₁}‖^exponent
        if not self.embedding.shape[1]:
            return 1. - self.one_hot(x_1).float()
        d = F.linear(-2 * self.embedding[x_1], self.embedding, self.square)
        d += self.square[x_1, None]                             # ‖e_x − e_{x₁}‖², and what is
        return F.threshold_(d, self.rounding, 0.).pow_(self.exponent / 2)   # of rounding size, 0

    def logits(self, x_1, t):           # ℓ_t(x | x₁) = −β_t d(x, x₁)
        return -self.beta(t) * self.distance(x_1)


PATHS = Registry(metric=MetricPath, uniform=UniformPath, marginal=MarginalPath, mask=MaskPath)


def power(path=None, frequency=None, a=0.9, c=3.0):
    """FUDOKI's schedule. Its a and c suit the codebook they were chosen for, hardly any other."""
    return lambda t: c * (t / (1 - t).clamp(min=1e-30)) ** a        # β_t = c (t / (1 − t))^a


def evenly(speed, beta, n):
    """n values of β, evenly spaced along the way S(β) = ∫₀^β speed db: (N,), (N,) -> (n,)"""
    S = F.pad(torch.cumulative_trapezoid(speed, beta), (1, 0)).double().numpy()
    return torch.from_numpy(np.interp(np.linspace(0, S[-1], n), S, beta.numpy())).float()


class CalibratedSchedule(nn.Module):
    """The kinetic-optimal schedule of this codebook: constant Fisher–Rao speed along the path.

    Along β the Fisher information is Var_{p_β}[d]. With S(β) = ∫₀^β √( E_{x₁} Var_{p_b}[d] ) db,
    x₁ by its frequency, β_t = S⁻¹(t·S(∞)), tabulated here (2605.09386; tutorial, chapter 3).
    """

    def __init__(self, path, frequency=None):
        super().__init__()
        V = len(path.embedding)
        rows = min(256, max(16, 2 ** 20 // V))                      # x₁ at quantiles of frequency
        quantiles = (torch.ones(V) if frequency is None else frequency).double().cumsum(0)
        d = path.distance(torch.searchsorted(
            quantiles, quantiles[-1] * (torch.arange(rows) + 0.5) / rows))
        apart = d[d > 0] if d.any() else torch.ones(1)
        last = math.log(1e6 * V) / apart.min()                      # p(x₁ | x₁) ≥ 1 − 1e-6 there
        beta = torch.logspace(math.log10(1e-3 / apart.mean()), math.log10(last), 256)
        beta = F.pad(beta, (1, 0))                                  # 0 first: p_0 is uniform

        def speed(b):                                               # √( E_{x₁} Var_{p_b}[d] )
            p = (-b * d).softmax(-1)
            return (p * (d - (p * d).sum(-1, keepdim=True)) ** 2).sum(-1).mean().sqrt()
        self.register_buffer("table", evenly(torch.stack([speed(b) for b in beta]), beta, 257))

    def forward(self, t):               # linear between the entries
        place = t * (len(self.table) - 1)
        i = place.long().clamp(0, len(self.table) - 2)
        beta = torch.lerp(self.table[i], self.table[i + 1], place - i)
        return torch.where(t < 1, beta, FAR)


# exercise: any increasing β with β_0 = 0 and β_1 = FAR
SCHEDULES = Registry(calibrated=CalibratedSchedule, power=power)


# ---------------------------------------- 2. what follows for every path: noise, velocities, steps

def entry(l, x):
    """l[…, x]: (…, V) and (…) long -> (…, 1)."""
    return l.gather(-1, x[..., None])


def at_once(V, like):
    """How many rows of V numbers are computed at a time; more than those take turns."""
    return max(1, CHUNK * (1 if like.is_cpu else 32) // V)


def categorical(p):
    """x ~ p by inverse CDF, p ≥ 0 of any sum: (…, V) -> (…) long. Never a token with p = 0:
    the CDF has to exceed u, and u·sum < sum also after rounding. ValueError: p is not finite."""
    cdf = p.cumsum(-1)
    if not torch.isfinite(cdf[..., -1]).all():
        raise ValueError("probabilities are not finite: did the network or a path return NaN?")
    u = torch.rand_like(cdf[..., :1]) * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True)[..., 0]


def sample_x_1(p_1t, temperature):
    """x₁ ~ p(x₁ | x_t)^(1/temperature) from its logits, 0 takes the likeliest: (…, V) -> (…)"""
    if temperature < 1e-6:
        return p_1t.argmax(-1)
    rows = p_1t.flatten(0, -2).split(at_once(p_1t.shape[-1], p_1t))
    return torch.cat([categorical((r.float() / temperature).softmax(-1)) for r in rows]
                     ).view(p_1t.shape[:-1])


def rowwise(function):
    """Lets `function(path, *arguments)` see rows: tokens (N,), times (N, 1), distributions (N, V),
    where a caller has (B, L), (B, 1, 1) or a number, (B, L, V). In float32 whatever the network
    runs in, without gradient, and CHUNK numbers at a time: memory is bounded for any V."""
    @functools.wraps(function)
    @torch.no_grad()
    def wrapped(path, x, *others, **options):
        def rows(a):
            if not torch.is_tensor(a) or a.ndim == 0:
                a = torch.tensor([float(a)], dtype=torch.float32, device=x.device)
            if not a.is_floating_point():
                return a.reshape(-1)
            a = a.float().expand(*x.shape, a.shape[-1])
            return a.reshape(-1, a.shape[-1]).contiguous()  # for jvp, a time of its own per row

        n = at_once(len(path.embedding), x)
        with torch.autocast(x.device.type, enabled=False):
            chunks = zip(*(rows(a).split(n) for a in (x, *others)))
            return torch.cat([function(path, *c, **options) for c in chunks]).view(x.shape)
    return wrapped


@rowwise
def corrupt(path, x_1, t):
    """x_t ~ p_t(· | x₁); at t = 0 the source. (B, L) -> (B, L)"""
    return categorical(path.logits(x_1, t).softmax(-1))


def growth(path, x_t, x_1, t):
    """p_t(x) and ∂_t ℓ_t(x) − ∂_t ℓ_t(x_t), (…, V) each, for 0 < t < 1. The normaliser of ℓ
    cancels in the difference, which is 0 where p_t(x_t | x₁) = 0: such a token stays."""
    l, dl = torch.func.jvp(lambda t: path.logits(x_1, t), (t,), (torch.ones_like(t),))
    return l.softmax(-1), (dl - entry(dl, x_t)).masked_fill_(entry(l, x_t) == -torch.inf, 0.)


def kinetic_optimal(path, x_t, x_1, t):
    """u_t(x, x_t | x₁) = p_t(x) [∂_t ℓ_t(x) − ∂_t ℓ_t(x_t)]₊ carries p_t along with the least
    kinetic energy (2412.03487); of the metric path it is FUDOKI's eq. 5. (B, L) -> (B, L, V)"""
    p_t, dl = growth(path, x_t, x_1, t)
    return p_t * dl.relu()


def corrector(path, x_t, x_1, t, eta=0.5):
    """The kinetic-optimal velocity plus η p_t(x) |∂_t ℓ_t(x) − ∂_t ℓ_t(x_t)|, which is in detailed
    balance with p_t: more jumps, both ways, along the same path. (B, L) -> (B, L, V)"""
    p_t, dl = growth(path, x_t, x_1, t)
    return p_t * (dl.relu() + eta * dl.abs())


# exercise: u_t plus anything in detailed balance with p_t
VELOCITIES = Registry(kinetic_optimal=kinetic_optimal, corrector=corrector)


@rowwise
def euler(path, x_t, x_1, t, s, velocity=kinetic_optimal):
    """Freezes the velocity of mid-step, which is finite for every path also from t = 0: jump with
    probability 1 − e^−(s−t)λ, to x ~ u/λ. (B, L) -> (B, L)"""
    u = velocity(path, x_t, x_1, (t + s) / 2)
    lam = u.sum(-1)
    jump = torch.rand_like(lam) < -torch.expm1(-(s - t)[..., 0] * lam)
    return torch.where(jump, categorical(u), x_t)


def exp_1(like):
    """E = −log U ~ Exp(1) in the shape of `like`; above 0, since U < 1, and finite."""
    return torch.rand_like(like).clamp_(min=1e-8).log_().neg_()


@rowwise
def race(path, x_t, x_1, t, s):
    """The exact step: if x_t ~ p_t then x_s ~ p_s, however large s − t. (B, L) -> (B, L)

    Token x arrives at time E_x e^{−ℓ_t(x)}, E_x ~ Exp(1), and the first is x_t. As t grows it is
    overtaken by x at rate p_t(x) [∂ℓ_t(x) − ∂ℓ_t(x_t)]₊: the kinetic-optimal velocity. So draw the
    E_x given who leads at t, and see who leads at s. No derivative, nothing singular at 0 or 1.
    """
    l_t, l_s = (path.logits(x_1, time).log_softmax(-1) for time in (t, s))
    p_t, p_s = l_t.softmax(-1), l_s.softmax(-1)                 # exp of them, only quicker
    here, tau = entry(l_t, x_t), exp_1(l_t[..., :1])            # at t the leader arrives at τ, all
    arrival = (tau * p_t + exp_1(p_t)) / p_s                    # others later; this is at s
    arrival.scatter_(-1, x_t[..., None], tau * (here - entry(l_s, x_t)).exp())
    possible = here[..., 0] > -torch.inf                        # x₁ was drawn anew: x_t stays
    return torch.where(possible, arrival.argmin(-1), x_t)


def renoise(path, x_t, x_1, t, s):
    """x_s ~ p_s(· | x₁), forgetting x_t: exact too, and moves every token. (B, L) -> (B, L)"""
    return corrupt(path, x_1, s)


@rowwise
def finish(path, x_t, x_1, t, s):
    """The last step: x := x₁, unless p_t(x_t | x₁) = 0, which stays. (B, L) -> (B, L)"""
    return torch.where(entry(path.logits(x_1, t), x_t)[..., 0] > -torch.inf, x_1, x_t)


# exercise: a step marked `step.posterior = True` gets p(x₁ | x_t) in the place of a drawn x₁
STEPS = Registry(race=race, renoise=renoise, euler=euler)


def step_named(name):
    """An entry of STEPS or of VELOCITIES; one that knows no s, of four arguments, is a velocity,
    and the step is `euler` along it."""
    move = VELOCITIES[name] if name in VELOCITIES else STEPS[name]
    wanted = [a for a in inspect.signature(move).parameters.values() if a.default is a.empty]
    return functools.partial(euler, velocity=move) if len(wanted) == 4 else move


def time_reversal(path, x_t, x_1, t):
    """u_t = R_t(x, x_t) p_t(x | x₁) / p_t(x_t | x₁), where R_t(x, z) ≥ 0, the rate from x to z of
    a noise that does not know x₁, solves −∂_t p_t(z | x₁) = Σ_x p_t(x | x₁) R_t(x, z) as far as
    there is such a noise; what is left of ∂_t p_t moves with the least energy. O(V³); t is the
    same in all rows. (B, L) -> (B, L, V)"""
    states = torch.arange(len(path.embedding), device=x_t.device)
    p, dl = (a.double() for a in growth(path, states, states, t[:1].repeat(len(states), 1)))
    dp = p * (dl - (p * dl).sum(-1, keepdim=True))                      # (x₁, x)
    R = torch.linalg.solve_ex(p, -dp).result.fill_diagonal_(0)          # (x, z)
    exists = -R.clamp(max=0).sum() < 0.1 * R.abs().sum()                # and is finite
    R = R.clamp(min=0) if exists else torch.zeros_like(R)
    left = (dp - p * R.sum(-1) + p @ R)[x_1]
    p, here = p[x_1], entry(p[x_1], x_t)
    u = R[:, x_t].T * p / here + (left - entry(left, x_t) / here * p).relu()
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
    impossible = (path.logits(every, p.new_full((V, 1), t)) == -torch.inf).float()      # (x₁, z)
    for some in noisy.unique().split(8 * at_once(V * X, p)):
        u_all = velocity(path, some.repeat_interleave(V), every.repeat(len(some)),
                         p.new_full((len(some) * V, 1), t)).view(-1, V, X)          # (z, x₁, x)
        for z, u_z in zip(some, u_all):
            at, own, u_z[:, z] = noisy == z, clean[noisy == z], 0.      # of rounding size, maybe
            u, û = u_z[own], (p[at] @ u_z).clamp(min=torch.finfo(p.dtype).tiny)
            cost[0, at] = (torch.xlogy(u, u) - torch.xlogy(u, û) - u + û).sum(-1)
            stays = p[at] @ impossible[:, z] * (own == z)               # as in `finish`
            cost[1, at] = -(entry(p[at], own)[:, 0] + stays).log()
    return cost.view(2, *x_1.shape)


# --------------------------------------------------------------------------------------- 3. tokens

class Text:
    """Texts as rows of tokens, by a tokenizer of the library `tokenizers`, given as its JSON.

    length: of a row at most; eos: the id that closes a text and fills up shorter rows, None if
    all are equally long; window: texts are parts of a long one, of any length; embedding (V, D),
    by default all tokens are equally far from each other.
    """

    def __init__(self, json, length, eos=None, window=False, embedding=None):
        self.tokenizer, self.length, self.eos = Tokenizer.from_str(json), length, eos
        self.tokenizer.no_truncation()                      # nothing is left of what was saved
        self.tokenizer.no_padding()                         # with it and changes texts
        if hasattr(self.tokenizer.model, "dropout"):
            self.tokenizer.model.dropout = None
        known = self.tokenizer.get_vocab()
        self.embedding = torch.zeros(len(known), 0) if embedding is None else embedding
        self.marks = [i for word, i in known.items() if "?" in word and not window]
        self.gap = 1 if window else 3                       # underscores that are one free token
        self.shortest = length if eos is None and not window else 0

    def ids(self, text):
        """str -> list of int. ValueError: an unknown word."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:                          # the library has no other
            known = " ".join(sorted(self.tokenizer.get_vocab())[:99])
            raise ValueError(f"a part of '{text.strip()[:40]}' is unknown; known are "
                             + known) from error

    def encode(self, texts):
        """list of B strings -> (B, N ≤ length) long, −1 where free: "___" is one word, in a window
        three tokens, at the end of a text as many as still fit. ValueError: too long, unknown."""
        rows = []
        for text in texts:
            goes_on = text.endswith("___")
            parts = re.split("(_{3,})", text.rstrip("_") if goes_on else text)   # odd: gaps
            row = [i for n, part in enumerate(parts) for i in
                   (self.ids(part) if n % 2 == 0 else [-1] * (len(part) // self.gap))]
            if goes_on:
                row += [-1] * (self.length - len(row))
            elif self.eos is not None:
                row.append(self.eos)
            if not self.shortest <= len(row) <= self.length:
                raise ValueError(f"'{text[:40]}' has {len(row)} tokens; from {self.shortest} to "
                                 f"{self.length} fit in")
            rows.append(row)
        n = max(map(len, rows))
        return torch.tensor([row + [self.eos] * (n - len(row)) for row in rows])

    def decode(self, x):
        """(B, N) long -> list of B strings, each up to its end."""
        rows = (row[:row.index(self.eos)] if self.eos in row else row for row in x.tolist())
        return [self.tokenizer.decode(row, skip_special_tokens=False) for row in rows]


class Patches:
    """Square pictures as rows of square patches, a patch being the nearest entry of a codebook
    (V, channels·patch²), which is the metric's embedding, too, and what the network sees."""
    eos, marks = None, ()

    def __init__(self, codebook, patch, size, channels=1):
        self.embedding, self.patch, self.size, self.channels = codebook, patch, size, channels
        self.length = (size // patch) ** 2

    def encode(self, images):
        """(B, C, size, size) in [0, 1] -> (B, (size / patch)²) long."""
        rows, codes = F.unfold(images, self.patch, stride=self.patch), self.embedding.to(images)
        return torch.cat([torch.cdist(r, codes).argmin(-1) for r in rows.mT.split(1024)])

    def decode(self, x):
        """(B, (size / patch)²) long -> (B, C, size, size)."""
        rows = self.embedding.to(x.device)[x].mT
        return F.fold(rows, self.size, self.patch, stride=self.patch)


TOKENS = {"text": Text, "image": Patches}


def padding(x, eos):
    """True where `eos` stands after another `eos`: (B, N) long -> (B, N) bool."""
    closed = (x == eos) if eos is not None else torch.zeros_like(x, dtype=torch.bool)
    return closed & F.pad(closed, (1, -1))


def question(x, marks):
    """True up to the last of the question marks, never to be found: (B, N) long -> (B, N) bool."""
    mark = torch.isin(x, torch.tensor(marks, device=x.device, dtype=x.dtype)).long()
    return mark.flip(1).cummax(1).values.flip(1).bool()


# -------------------------------------------------------------------------------------- 4. network

class WordInput(nn.Module):
    """A learned vector per word; a word's two coordinates are its index, twice."""

    def __init__(self, embedding, width):
        super().__init__()
        self.words = nn.Embedding(len(embedding), width)

    def forward(self, x):
        return self.words(x)

    def coordinates(self, n):                           # (n, 2)
        return torch.arange(n, device=self.words.weight.device)[:, None].expand(n, 2)


class PatchInput(nn.Module):
    """An MLP of a code's frozen vector plus a small learned vector per code; a patch's
    coordinates are its row and its column."""

    def __init__(self, embedding, width):
        super().__init__()
        self.register_buffer("vectors", embedding, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(embedding.shape[1], width), nn.GELU(),
                                 nn.Linear(width, width))
        self.own = nn.Parameter(0.02 * torch.randn(len(embedding), width))

    def forward(self, x):
        return (self.mlp(self.vectors) + self.own)[x]   # once per code, not once per patch

    def coordinates(self, n):                           # (n, 2)
        i = torch.arange(n, device=self.own.device)
        return torch.stack([i // math.isqrt(n), i % math.isqrt(n)], -1)


INPUTS = {"text": WordInput, "image": PatchInput}


def rotary(places, width):
    """cos and sin of the angles by which a head of this width turns: (N, 2) -> (N, width / 2)
    each. Half of them grow with the first coordinate, half with the second."""
    n = width // 4
    slower = 10. ** (-torch.arange(n, dtype=torch.float32, device=places.device) / n)
    angle = places[..., None] * slower
    return angle.flatten(1).cos(), angle.flatten(1).sin()


def turn(q, cos, sin):
    """Rotates pairs of q (B, H, N, width), so that q·k depends on differences of coordinates."""
    a, b = q.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).type_as(q)


class Attention(nn.Module):
    """Every position looks at every other that means something: there is no causal mask. Queries
    and keys are normalised, so that no learning rate lets attention stick to one position."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, h, rotation, visible):
        B, N, D = h.shape
        q, k, v = self.qkv(h).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = turn(self.norm_q(q), *rotation), turn(self.norm_k(k), *rotation)
        h = F.scaled_dot_product_attention(q, k, v, visible)    # (B, H, N, D/H)
        return self.out(h.transpose(1, 2).reshape(B, N, D))     # (B, N, D)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h, rotation, visible):
        h = h + self.attention(self.norm_1(h), rotation, visible)
        return h + self.mlp(self.norm_2(h))


class Blocks(nn.Module):
    """The small trunk: blocks of this file, from scratch."""
    vocabulary = None                                       # no words of its own

    def __init__(self, width=96, depth=4, heads=3):
        super().__init__()
        self.width, self.head_width = width, width // heads
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, h, places, visible, t):
        """h (B, N, width), coordinates (N, 2), which positions mean something (B, N) bool, None if
        all do, time (B, 1, 1) -> (B, N, width). Time is not used: how noisy x_t is can be seen."""
        rotation = rotary(places, self.head_width)
        visible = None if visible is None else visible[:, None, None]       # (B, 1, 1, N)
        for block in self.blocks:
            h = block(h, rotation, visible)
        return self.norm(h)


class Given(types.SimpleNamespace):
    """What a language model's body returns, of which only the last states are known."""
    __getattr__, __getitem__ = lambda self, name: None, lambda self, i: self.last_hidden_state


class OwnLogits(nn.Module):
    """A causal language model from its body's states to its logits, which some scale or cap."""

    def __init__(self, model):
        super().__init__()
        self.model, through = copy.copy(model), nn.Module()
        through.forward = self.through
        self.model._modules = model._modules | {model.base_model_prefix: through}

    @staticmethod
    def through(*_, inputs_embeds, **__):               # in the place of the body
        return Given(last_hidden_state=inputs_embeds)

    def forward(self, h):                               # (B, N, width) -> (B, N, V)
        return self.model(inputs_embeds=h, use_cache=False).logits


class Backbone(nn.Module):
    """The large trunk: a causal language model of `transformers` that looks both ways.

    It has learned to predict token i from the state of token i − 1. With `shift`, so it stays:
    `bos`, its token for the beginning, goes before the first, and the last state is dropped.
    config: the model's as a dictionary; without `pretrained`, the model, its weights are random.
    """

    def __init__(self, config, bos, shift=True, pretrained=None):
        from transformers import AutoConfig, AutoModelForCausalLM
        super().__init__()
        model = pretrained or AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        self.body, self.bos, self.shift = model.base_model, bos, shift
        self.vocabulary = nn.ModuleList([model.get_input_embeddings(), OwnLogits(model)])
        self.width = self.vocabulary[0].embedding_dim

    def forward(self, h, places, visible, t):
        """As of `Blocks`; a position is the number of those before it that mean something."""
        visible = torch.ones_like(h[..., 0], dtype=torch.bool) if visible is None else visible
        bos = self.vocabulary[0](torch.full((len(h), 1), self.bos, device=h.device))
        h, visible = torch.cat([bos, h], 1), F.pad(visible, (1, 0), value=True)   # (B, 1+N, …)
        mask = torch.zeros_like(visible, dtype=h.dtype)     # one of four dimensions is not made
        mask = mask.masked_fill(~visible, torch.finfo(h.dtype).min)[:, None, None]      # causal
        h = self.body(inputs_embeds=h, attention_mask=mask.expand(-1, 1, h.shape[1], -1),
                      position_ids=visible.cumsum(1) - 1, use_cache=False).last_hidden_state
        return h[:, :-1] if self.shift else h[:, 1:]


TRUNKS = Registry(blocks=Blocks, backbone=Backbone)


class Network(nn.Module):
    """Inputs, trunk and heads over the modalities that are there, one after the other. tokens,
    paths {name: an object}: a path may have more states than there are tokens to predict."""

    def __init__(self, tokens, paths, trunk):
        super().__init__()
        width, self.trunk, self.eos = trunk.width, trunk, {m: k.eos for m, k in tokens.items()}
        self.input = nn.ModuleDict({m: INPUTS[m](p.embedding, width) for m, p in paths.items()})
        self.head = nn.ModuleDict({m: nn.Linear(width, len(k.embedding))
                                   for m, k in tokens.items()})
        self.modality = nn.ParameterDict({m: 0.02 * torch.randn(width) for m in tokens})
        self.free = nn.Parameter(0.02 * torch.randn(width))                 # "this is to be found"
        if trunk.vocabulary:                                # it knows words: do not disturb them
            self.input["text"].words, self.head["text"] = trunk.vocabulary
            for vector in (self.free, *self.modality.values()):
                nn.init.zeros_(vector)

    def forward(self, x, free, t):
        """x, free {name: (B, N)} long, bool; t (B, 1, 1) or a number -> logits of p(x₁ | x_t),
        {name: (B, N, V)}."""
        h = torch.cat([self.input[m](x[m]) + self.modality[m] + free[m][..., None] * self.free
                       for m in x], 1)                                      # (B, ΣN, width)
        places = torch.cat([self.input[m].coordinates(x[m].shape[1]) for m in x])
        visible = None                                      # of what is given, all but padding
        if any(self.eos[m] is not None for m in x):
            visible = torch.cat([free[m] | ~padding(x[m], self.eos[m]) for m in x], 1)
        t = torch.as_tensor(t, device=h.device, dtype=h.dtype).expand(len(h), 1, 1)
        h = self.trunk(h, places, visible, t).split([x[m].shape[1] for m in x], 1)
        return {m: self.head[m](h_m) for m, h_m in zip(x, h)}               # (B, N, V) each


# ------------------------------------------------------------------------------ 5. LightningModule

def cross_entropy(path, p_1t, x_1, x_t, t):
    """−log p(x₁ | x_t) of every position, from the logits: (B, L, V) -> (B, L)"""
    return F.cross_entropy(p_1t.float().mT, x_1, reduction="none")


# exercise: any loss with the same minimiser, the posterior p(x₁ | x_t)
LOSSES = Registry(cross_entropy=cross_entropy)


class Fudoki(L.LightningModule):
    """Fills the free positions of some modalities, given the others.

    x is {"text": (B, T), "image": (B, I)} long, `free` the same with bool: True where a token has
    to be found. A modality that is not in the dictionary is not in the sequence.
    """
    optimizer = torch.optim.AdamW

    def __init__(self, tokens, frequency=None, path="metric", path_options=None, trunk="blocks",
                 trunk_options=None, pretrained=None, loss="cross_entropy", lr=6e-3,
                 lr_new=3e-3, weight_decay=0.01, t_power=1., share=0.5, drop=0.1, freeze=0.,
                 notes=None):
        """tokens {name: arguments of its entry in TOKENS}, frequency {name: (V,)}; path, trunk and
        loss: entries of PATHS, TRUNKS and LOSSES, with options; pretrained: a causal language
        model for `Backbone` (a checkpoint restores what became of it); lr: the peak, lr_new: of
        inputs and heads beside a backbone; t_power: see `loss`;
        share: of a batch that is drawn, the rest is read; drop: how often either goes without the
        other; freeze: share of the training in which a backbone's words stay; notes: a
        dictionary for those who open the checkpoint. What is not learned is a hyperparameter."""
        super().__init__()
        self.save_hyperparameters(ignore="pretrained", logger=False)
        self.tokens = {m: TOKENS[m](*arguments) for m, arguments in tokens.items()}
        self.paths = nn.ModuleDict({
            m: PATHS[path](kind.embedding, (frequency or {}).get(m), **path_options or {})
            for m, kind in self.tokens.items()})
        trunk_options = (trunk_options or {}) | ({"pretrained": pretrained} if pretrained else {})
        self.net = Network(self.tokens, self.paths, TRUNKS[trunk](**trunk_options))

    # -- training: corrupt what is free, predict what was there

    def corrupt(self, x_1, where, t):
        """x_t ~ p_t(· | x₁) at these positions, x₁ at the others; t (B, 1, 1) or a number."""
        return {m: torch.where(where[m], corrupt(self.paths[m], x_1[m], t), x_1[m]) for m in x_1}

    def weight(self, x_1, free):
        """Of each position in the loss: 1 where it is free, but all padding of a row together
        weighs as one token; then a row's are divided by their sum. {name: (B, N)} float"""
        weight = {}
        for m in x_1:
            pad = padding(x_1[m], self.tokens[m].eos) & free[m]
            weight[m] = free[m] / torch.where(pad, pad.sum(1, keepdim=True), 1)
        n = sum(w.sum(1, keepdim=True) for w in weight.values()).clamp(min=1e-9)
        return {m: w / n for m, w in weight.items()}

    def loss(self, x_1, free, t=None, of=cross_entropy):
        """Mean loss of the free positions of a row, then of the batch, so that three words weigh
        as much as 49 patches. t (B, 1, 1) or a number, by default u^t_power with u spread evenly:
        any density of t has the same minimiser, and late t have little to teach.

        -> the loss and the accuracy, both a scalar."""
        B, device = len(next(iter(x_1.values()))), self.device
        if t is None:
            u = torch.rand(1, dtype=torch.float32, device=device)   # whatever the default is
            u = (torch.arange(B, device=device) + u) / B
            t = (u ** self.hparams.t_power).view(B, 1, 1)
        x_t, weight, loss, right = self.corrupt(x_1, free, t), self.weight(x_1, free), 0, 0
        for m, l in self.net(x_t, free, t).items():
            loss = loss + (of(self.paths[m], l, x_1[m], x_t[m], t) * weight[m]).sum() / B
            right = right + ((l.argmax(-1) == x_1[m]) * weight[m]).sum() / B
        return loss, right

    def mark_free(self, x, *names):
        """`free` of x where all of these modalities are free but questions, and nothing else."""
        return {m: ~question(x_m, self.tokens[m].marks) & (m in names) for m, x_m in x.items()}

    @torch.no_grad()
    def bound(self, x_1, free, n=16, velocity=time_reversal):
        """Upper bounds of −log p̂ of what is free, given the rest, in nats: (n, B), one for each
        time T = ½/n, 1½/n … at which the process may stop. See the function of this name."""
        cost = []
        for T in (torch.arange(n) + 0.5).div(n).tolist():
            x_t = self.corrupt(x_1, free, T)
            p_1t = self.net(x_t, free, T)
            cost.append(sum(
                (bound(self.paths[m], p_1t[m], x_1[m], x_t[m], T, velocity) * f).sum(-1)
                for m, f in free.items() if f.any()))
        rate, rest = torch.stack(cost, 1)                                           # (n, B)
        return (rate.cumsum(0) - rate / 2) / n + rest

    def task(self, x_1):
        """Free positions for training: some rows are drawn, the others read. -> free, and which
        rows are drawn (B,) bool"""
        B, share = len(next(iter(x_1.values()))), self.hparams.share
        share = share if len(x_1) > 1 else float("image" in x_1)
        drawn = (torch.arange(B, device=self.device) * share) % 1 < share
        free = self.mark_free(x_1, *x_1)
        return {m: f & (drawn[:, None] == (m == "image")) for m, f in free.items()}, drawn

    def training_step(self, x_1, index):
        """Lightning's hook: drawing and reading in one batch. Now and then pictures go without
        their captions and captions without their pictures: what guidance compares with."""
        (free, drawn), of = self.task(x_1), LOSSES[self.hparams.loss]
        if len(x_1) == 1 or torch.rand(()) >= self.hparams.drop:
            loss, accuracy = self.loss(x_1, free, of=of)
        else:
            a, b = (torch.stack(self.loss({m: x_1[m][rows]}, {m: free[m][rows]}, of=of))
                    for m, rows in (("image", drawn), ("text", ~drawn)))
            loss, accuracy = torch.lerp(b, a, drawn.float().mean())
        self.log_dict({"loss": loss, "accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, x_1, index):
        """Lightning's hook: drawing and reading of held-out rows, every tenth of a batch at the
        same t, with the same noise every time."""
        with torch.random.fork_rng():
            torch.manual_seed(index)
            for i, m in itertools.product(range(min(10, len(next(iter(x_1.values()))))), x_1):
                some, t = {name: x[i::10] for name, x in x_1.items()}, (i + 0.5) / 10
                loss, accuracy = self.loss(some, self.mark_free(some, m), t)
                for where in ("", f"_t{t:.2f}"):
                    self.log_dict({f"val_{m}_loss{where}": loss, f"val_{m}_acc{where}": accuracy},
                                  batch_size=len(some[m]), sync_dist=True)

    def configure_optimizers(self):
        """Lightning's hook: the learning rate rises over the first 5 % of the steps and falls as a
        cosine to 0. A backbone's words begin to learn when `freeze` of the steps are done, and
        inputs and heads that are new beside it have a rate of their own; the matrices of a trunk
        from scratch are a group, which train.py's Muon wants."""
        steps = self.trainer.estimated_stepping_batches     # resumed, a run may have more of them

        def rate(step, first=0):
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            return min((step + 1) / (0.05 * steps), cosine) * (step >= first)

        late = functools.partial(rate, first=self.hparams.freeze * steps)
        net, trunk, lr = self.net, self.net.trunk, self.hparams.lr
        words = {*trunk.vocabulary.parameters()} if trunk.vocabulary else set()
        matrices = set() if trunk.vocabulary else {p for p in trunk.parameters() if p.ndim == 2}
        new = {*net.input.parameters(), *net.head.parameters()} - words
        body = {*net.parameters()} - words - matrices - new
        parts = ((body, lr), (words, lr), (matrices, lr),
                 (new, self.hparams.lr_new if trunk.vocabulary else lr))
        groups = [{"params": [p for p in self.parameters() if p in part], "lr": peak,
                   "matrices": part is matrices} for part, peak in parts]
        optimizer = self.optimizer(groups, betas=(0.9, 0.98),
                                   weight_decay=self.hparams.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [rate, late, rate, rate])
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    # -- generation: start from noise; predict, step, predict again

    def predict(self, x, noisy, t, guidance=1.):
        """Logits of p(x₁ | x_t) at g = guidance: u + g (c − u) for every modality to be filled,
        where u sees this modality only. g = 1 is off. ValueError: there is no other modality."""
        c = self.net(x, noisy, t)
        if guidance == 1:
            return c
        if len(x) == 1:
            raise ValueError("guidance needs another modality to leave out")
        alone = {m: self.net({m: x[m]}, {m: noisy[m]}, t)[m] for m in x if noisy[m].any()}
        return {m: u + guidance * (c[m] - u) for m, u in alone.items()}

    def to_fill(self, n, **given):
        """x and free of n rows: tokens (n, N) of the given modalities, free where they are −1;
        all others are free altogether."""
        x = {m: given.get(m, torch.full((n, kind.length), -1)).to(self.device)
             for m, kind in self.tokens.items()}
        return {m: x_m.clamp(min=0) for m, x_m in x.items()}, {m: x_m < 0 for m, x_m in x.items()}

    def noisy(self, x, free):
        """Free positions and, in a row of a modality that has some, all others but questions."""
        asked = {m: question(x[m].masked_fill(f, -1), self.tokens[m].marks)
                 for m, f in free.items()}
        return {m: f | f.any(1, keepdim=True) & ~asked[m] for m, f in free.items()}

    def times(self, t, steps, late=1.):
        """t < … < 1, steps + 1 of them: what is left to 1 falls as (1 − u)^late, u evenly."""
        return (1 - (1 - t) * (1 - torch.linspace(0, 1, steps + 1)) ** late).tolist()

    @torch.no_grad()
    def generate(self, x, free, *, x_t=None, t=0., steps=8, late=1., step="race",
                 guidance=1., temperature=1.):
        """Fills the free positions of x: yields every state from noise to the answer, steps + 1.
        In a part that is free, the given tokens move, too, towards what they are: as noisy as the
        rest, which is all that training has shown. Questions stand still.

        x_t, t: the state to begin with and its time; without a state, x with the noise of that
        time. late: see `times`; step: see `step_named`; guidance: see `predict`; temperature: of
        x₁ ~ p(x₁ | x_t), 0 takes the likeliest. ValueError: steps < 1."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        noisy = self.noisy(x, free)
        x_t = self.corrupt(x, noisy, t) if x_t is None else x_t         # 1. x_t, at first noise
        yield x_t
        for t, s in itertools.pairwise(self.times(t, steps, late)):
            p_1t, x_t = self.predict(x_t, noisy, t, guidance), dict(x_t)    # 2. what will it be?
            move = step_named(step) if s < 1 else finish
            for m in (m for m in x if noisy[m].any()):
                path = self.paths[m]
                if getattr(move, "posterior", False):
                    p = (p_1t[m].float() / max(temperature, 1e-6)).softmax(-1)
                    x_1 = torch.where(free[m][..., None], p, F.one_hot(x[m], p.shape[-1]))
                else:
                    x_1 = sample_x_1(p_1t[m], temperature).where(free[m], x[m])     # 3. x₁ ~ p_1t
                x_s = move(path, x_t[m], x_1, t, s)                         # 4. a step towards it
                x_t[m] = torch.where(noisy[m], x_s, x_t[m])
            yield x_t
