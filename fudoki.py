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
import functools
import itertools
import math
import pathlib
import re
import runpy

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

CHUNK = 2 ** 19     # elements of a (rows, V) array computed at once: fits a CPU's cache; GPU: × 32


@functools.cache
def definitions(file, changed):
    """{name: object} of a Python file, which is run again only if the time of its last change is
    another one."""
    return runpy.run_path(file)


class Registry(dict):
    """Things by their names.

    An entry may also be named FILE:NAME: `my:Path` is the class Path of the file my.py, in this
    folder or beside fudoki.py. The file has to mention fudoki: a checkpoint names its path in this
    way, and opening a checkpoint must not run any other file. LookupError: there is no such entry.
    ImportError: the file ends with an error of its own.
    """
    files = set()               # of users, that have been run

    def __getitem__(self, name):
        entry = self.get(name, name)
        if not isinstance(entry, str):
            return entry

        file, _, what = entry.partition(":")                # a string is FILE:NAME
        file = file.removesuffix(".py") + ".py"
        for source in (pathlib.Path(file), pathlib.Path(__file__).parent / file):
            if (what and re.fullmatch(r"[\w-]+(/[\w-]+)*\.py", file) and source.is_file()
                    and b"fudoki" in source.read_bytes()):
                self.files |= {str(source)} if ":" in name else set()
                try:
                    found = definitions(str(source), source.stat().st_mtime_ns)
                except (Exception, SystemExit) as error:
                    raise ImportError(f"{source} cannot be read") from error
                if what not in found:
                    raise LookupError(f"{source} has no {what}")
                return found[what]

        raise LookupError(f"invalid choice: {name!r} (choose from {', '.join(self)} or FILE:NAME, "
                          "as my:Path for the Path of my.py, a file here that mentions fudoki)")


# ---------------------------------------------------------------------------------------- 1. paths

class Path(nn.Module):
    """A probability path p_t(x | x₁) from noise (t = 0) to data (t = 1), defined by `logits`.

    embedding (V, D): a frozen vector per token, D = 0 if all are equally far from each other;
    frequency (V,): how often each token occurs in the data. Further arguments are options of the
    path, each with a default. Buffers may have any dtype, and parameters are trained.

    A path does not decide how fast it moves: `logits` takes the path's own time, and a clock maps
    t to it (`on`). Without a clock the own time is t.
    """

    def __init__(self, embedding, frequency=None):
        super().__init__()
        self.register_buffer("embedding", embedding.float(), persistent=False)
        self.frequency = torch.ones(len(embedding)) if frequency is None else frequency
        self.clock = nn.Identity()

    def _apply(self, fn, recurse=True):     # a path changes its device, but never its dtype
        return super()._apply(lambda a: a.to(fn(a.new_empty(0)).device), recurse)

    def logits(self, x_1, t):
        """ℓ(x | x₁) of every token x, up to a constant, in the path's own time t from 0 to 1:
        (…) long, (…, 1) float -> (…, V)."""
        raise NotImplementedError

    def forward(self, x_1, t):
        """ℓ_t(x | x₁) by the path's clock, as everything else calls it; shapes as of `logits`."""
        return self.logits(x_1, self.clock(t))

    def on(self, clock):
        """This path, from now on by another clock, an entry of CLOCKS."""
        del self.clock                          # it may be a module or a function
        self.clock = CLOCKS[clock](self)
        return self

    def one_hot(self, x):
        """1[· = x]: (…) long -> (…, V) bool."""
        return torch.arange(len(self.embedding), device=x.device) == x[..., None]


class UniformPath(Path):
    """Each token is clean with probability t, otherwise drawn uniformly."""

    def logits(self, x_1, t):           # ℓ_t(x | x₁) = log( t·1[x = x₁] + (1 − t)/V )
        return torch.log(t * self.one_hot(x_1) + (1 - t) / len(self.embedding))


class MarginalPath(UniformPath):
    """Each token is clean with probability t, otherwise drawn by its frequency in the data: such
    noise carries the least information about x₁ (2209.14734)."""

    def __init__(self, embedding, frequency=None):
        super().__init__(embedding, frequency)
        count = self.frequency + 1.             # one more of each, so that no token is impossible
        self.register_buffer("noise", count / count.sum(), persistent=False)

    def logits(self, x_1, t):           # ℓ_t(x | x₁) = log( t·1[x = x₁] + (1 − t)·q(x) )
        return torch.log(t * self.one_hot(x_1) + (1 - t) * self.noise)


class MaskPath(Path):
    """Each token is clean with probability t, otherwise the extra id [MASK]. A clean token stays
    clean, except along `corrector`, which may mask it again."""

    def __init__(self, embedding, frequency=None):
        super().__init__(F.pad(embedding, (0, 1, 0, 1)), frequency)
        self.embedding[-1, -1] = 1      # [MASK] is the last id, orthogonal to all others; as it
        self.frequency = self.frequency[:len(embedding)]        # is never clean, it has no count

    def logits(self, x_1, t):           # ℓ_t = log t at x₁, log(1 − t) at [MASK], −∞ elsewhere
        mask = self.one_hot(torch.full_like(x_1, len(self.embedding) - 1))
        l = torch.where(self.one_hot(x_1), torch.log(t), -torch.inf)
        return torch.where(mask, torch.log(1 - t), l)


class MetricPath(Path):
    """FUDOKI's path: tokens near x₁ stay likely longest.

    exponent: of the distance. FUDOKI's release has 4 on normalised embeddings, d = (2 − 2cos)²,
    URSA has 2; 1 is the best found here (tutorial, chapter 9). normalize: L2-normalises the
    embeddings. a, c: constants of the path's own time; they fit FUDOKI's codebook and few others.
    """

    def __init__(self, embedding, frequency=None, exponent=1., normalize=False, a=0.9, c=3.):
        super().__init__(F.normalize(embedding, dim=-1) if normalize else embedding, frequency)
        self.register_buffer("square", self.embedding.square().sum(-1), persistent=False)
        self.exponent, self.a, self.c = exponent, a, c
        self.rounding = 1e-5 * self.square.max().item()

    def distance(self, x_1):            # d(x, x₁) = ‖e_x − e_{x₁}‖^exponent
        if not self.embedding.shape[1]:
            return 1. - self.one_hot(x_1).float()
        d = F.linear(-2 * self.embedding[x_1], self.embedding, self.square)
        d += self.square[x_1, None]                             # ‖e_x − e_{x₁}‖²; rounding
        return F.threshold_(d, self.rounding, 0.).pow_(self.exponent / 2)   # errors become 0

    def logits(self, x_1, t):           # ℓ(x | x₁) = −β_t d(x, x₁), β_t = c (t / (1 − t))^a
        return -self.c * (t / (1 - t).clamp(min=1e-30)) ** self.a * self.distance(x_1)


PATHS = Registry(metric=MetricPath, uniform=UniformPath, marginal=MarginalPath, mask=MaskPath)


class Calibrated(nn.Module):
    """The clock by which any path moves at constant speed: the path's own time at time t.

    The distance of two close distributions is √Σ dp²/p = 2 √Σ (d√p)² (Fisher and Rao). Let S be
    the length of the path from the noise on, a mean over x₁ by frequency. The own time at t is
    S⁻¹(t·S(1)), a table with linear interpolation (2605.09386 for metric paths; chapter 3).
    """

    def __init__(self, path):
        super().__init__()
        rows = min(128, max(8, 2 ** 17 // len(path.embedding)))

        # the mean is over these x₁: evenly spaced quantiles of the frequencies
        quantiles = path.frequency.double().cumsum(0)
        x_1 = torch.searchsorted(quantiles, quantiles[-1] * (torch.arange(rows) + 0.5) / rows)

        @torch.no_grad()
        def evenly(times, n):           # n own times, evenly spaced along the way
            roots = (path.logits(x_1, t.repeat(rows, 1)).softmax(-1).sqrt() for t in times)
            steps = [(b - a).square().sum(-1).mean().sqrt() for a, b in itertools.pairwise(roots)]
            S = np.cumsum([0., *steps]) + 1e-9 * np.arange(len(times))      # grows everywhere
            return torch.from_numpy(np.interp(np.linspace(0, S[-1], n), S, times)).float()

        # first from near 0 to near 1, as float32 allows; then more times where the path moves
        times = F.threshold(torch.linspace(-18, 18, 37).sigmoid(), 1e-7, 0.)
        times = torch.cat([times, evenly(times, 65)]).sort().values
        self.register_buffer("table", evenly(times, 257))

    def forward(self, t):
        place = t * (len(self.table) - 1)
        i = place.long().clamp(0, len(self.table) - 2)
        return torch.lerp(self.table[i], self.table[i + 1], place - i)


# exercise: any increasing function of t from 0 to 1
CLOCKS = Registry(calibrated=Calibrated, linear=nn.Identity)


# ---------------------------------------- 2. what follows for every path: noise, velocities, steps

def entry(l, x):
    """l[…, x]: (…, V) and (…) long -> (…, 1)."""
    return l.gather(-1, x[..., None])


def at_once(V, like):
    """How many rows of V numbers are computed at a time; `like` says on which device."""
    return max(1, CHUNK * (1 if like.is_cpu else 32) // V)


def categorical(p):
    """x ~ p by inverse CDF, p ≥ 0 of any sum: (…, V) -> (…) long. Never a token with p = 0:
    the CDF has to exceed u, and u·sum < sum also after rounding. ValueError: p is not finite. (A
    GPU would have to wait for this check, so it has none: the token is then V, an invalid id.)"""
    cdf = p.cumsum(-1)
    if p.is_cpu and not torch.isfinite(cdf[..., -1]).all():
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
    """Decorates `function(path, x, …)`, which is written for rows: tokens (N,), times (N, 1),
    distributions (N, V). Callers pass (B, L), (B, 1, 1) or a number, (B, L, V).

    It is computed in float32 whatever the network runs in, without gradient, and a few rows at a
    time (`at_once`), so that memory is bounded for any V.
    """
    @functools.wraps(function)
    @torch.no_grad()
    def wrapped(path, x, *others, **options):
        def rows(a):
            if not torch.is_tensor(a) or a.ndim == 0:
                a = torch.full((1,), float(a), dtype=torch.float32, device=x.device)
            if not a.is_floating_point():
                return a.reshape(-1)
            a = a.float().expand(*x.shape, a.shape[-1])
            return a.reshape(-1, a.shape[-1]).contiguous()  # jvp writes into it: no shared memory

        n = at_once(len(path.embedding), x)
        with torch.autocast(x.device.type, enabled=False):
            chunks = zip(*(rows(a).split(n) for a in (x, *others)))
            return torch.cat([function(path, *c, **options) for c in chunks]).view(x.shape)
    return wrapped


@rowwise
def corrupt(path, x_1, t):
    """x_t ~ p_t(· | x₁); at t = 0 the source. (B, L) -> (B, L)"""
    return categorical(path(x_1, t).softmax(-1))


def growth(path, x_t, x_1, t):
    """p_t(x) and ∂_t ℓ_t(x) − ∂_t ℓ_t(x_t), (…, V) each, for 0 < t < 1. The normaliser of ℓ
    cancels in the difference, which is 0 where p_t(x_t | x₁) = 0: such a token stays."""
    l, dl = torch.func.jvp(lambda t: path(x_1, t), (t,), (torch.ones_like(t),))
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
    """Uses the velocity in the middle of the step, which is finite for every path even from t = 0:
    jumps with probability 1 − e^−(s−t)λ, to x ~ u/λ. (B, L) -> (B, L)"""
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
    l_t, l_s = (path(x_1, time).log_softmax(-1) for time in (t, s))
    p_t, p_s = l_t.softmax(-1), l_s.softmax(-1)                 # equals exp, softmax is faster

    # at t the leader arrives at τ and all others later; these are their times at s
    here, tau = entry(l_t, x_t), exp_1(l_t[..., :1])
    arrival = (tau * p_t + exp_1(p_t)) / p_s
    arrival.scatter_(-1, x_t[..., None], tau * (here - entry(l_s, x_t)).exp())

    # x₁ is resampled at every step, so p_t(x_t | x₁) may be 0: then x_t stays
    possible = here[..., 0] > -torch.inf
    return torch.where(possible, arrival.argmin(-1), x_t)


def renoise(path, x_t, x_1, t, s):
    """x_s ~ p_s(· | x₁), forgetting x_t: exact too, and moves every token. (B, L) -> (B, L)"""
    return corrupt(path, x_1, s)


@rowwise
def finish(path, x_t, x_1, t, s):
    """The last step: x := x₁, unless p_t(x_t | x₁) = 0, which stays. (B, L) -> (B, L)"""
    return torch.where(entry(path(x_1, t), x_t)[..., 0] > -torch.inf, x_1, x_t)


# exercise: a step marked `step.posterior = True` is given p(x₁ | x_t) instead of a sampled x₁
STEPS = Registry(race=race, renoise=renoise, euler=euler)


# --------------------------------------------------------------------------------------- 3. tokens

class Text:
    """Texts as rows of tokens, by a tokenizer of the library `tokenizers`, given as its JSON.

    length: of a row at most; eos: the id that ends a text and fills up shorter rows, None if all
    rows are equally long; window: texts are parts of a long one, so that they may have any length;
    embedding (V, D): of the metric, by default all tokens are equally far from each other.
    """

    def __init__(self, json, length, eos=None, window=False, embedding=None):
        self.tokenizer, self.length, self.eos = Tokenizer.from_str(json), length, eos
        known = self.tokenizer.get_vocab()
        self.embedding = torch.zeros(len(known), 0) if embedding is None else embedding
        self.marks = tuple(i for word, i in known.items() if "?" in word and not window)
        self.gap = 1 if window else 3                       # underscores that are one free token
        self.shortest = length if eos is None and not window else 0

    def ids(self, text):
        """str -> list of int. ValueError: an unknown word."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:                          # the library raises nothing narrower
            known = " ".join(sorted(self.tokenizer.get_vocab())[:99])
            raise ValueError(f"a part of '{text[:40]}' is unknown; known: {known}") from error

    def row(self, text):
        """One text -> list of int, −1 where free. "___" is one free word; in a window, three free
        tokens; at the end of a text, as many as fit. ValueError: too long, too short, unknown."""
        goes_on, row = text.endswith("___"), []
        for part in re.split("(_{3,})", text.rstrip("_") if goes_on else text):
            row += [-1] * (len(part) // self.gap) if part.startswith("___") else self.ids(part)
        if goes_on:
            row += [-1] * (self.length - len(row))
        elif self.eos is not None:
            row.append(self.eos)

        if not self.shortest <= (n := len(row)) <= self.length:
            raise ValueError(f"'{text[:40]}' has {n} tokens; {self.shortest} to {self.length} fit")
        return row

    def encode(self, texts):
        """list of B strings -> (B, N ≤ length) long, −1 where free: see `row`. ValueError: a row
        is impossible, or the rows of a window have different lengths."""
        rows = [self.row(text) for text in texts]
        n = max(map(len, rows))
        if self.eos is None and any(len(row) < n for row in rows):
            raise ValueError("these texts have to be equally long: nothing fills up shorter ones")
        return torch.tensor([row + [self.eos] * (n - len(row)) for row in rows])

    def decode(self, x):
        """(B, N) long -> list of B strings, each up to its end."""
        rows = (row[:row.index(self.eos)] if self.eos in row else row for row in x.tolist())
        return [self.tokenizer.decode(row, skip_special_tokens=False) for row in rows]


class Patches:
    """Square pictures as rows of square patches: a token is the nearest entry of the codebook
    (V, channels·patch²), which is also the metric's embedding and what the network sees."""
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


# by modality; a third one, such as audio, is an entry here and one of INPUTS
TOKENS = Registry(text=Text, image=Patches)


def padding(x, eos):
    """True where `eos` stands after another `eos`: (B, N) long -> (B, N) bool."""
    closed = (x == eos) if eos is not None else torch.zeros_like(x, dtype=torch.bool)
    return closed & F.pad(closed, (1, -1))


constant = functools.cache(torch.tensor)        # copied to a device once: a copy waits for it


def question(x, marks):
    """True up to the last question mark: that part is always given. (B, N) long -> (B, N) bool"""
    mark = torch.isin(x, constant(marks, dtype=x.dtype, device=x.device)).long()
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
        self.register_buffer("vectors", embedding.clone(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(embedding.shape[1], width), nn.GELU(),
                                 nn.Linear(width, width))
        self.own = nn.Parameter(0.02 * torch.randn(len(embedding), width))

    def forward(self, x):
        return (self.mlp(self.vectors) + self.own)[x]   # once per code, not once per patch

    def coordinates(self, n):                           # (n, 2)
        i = torch.arange(n, device=self.own.device)
        return torch.stack([i // math.isqrt(n), i % math.isqrt(n)], -1)


INPUTS = Registry(text=WordInput, image=PatchInput)


def rotary(places, width):
    """cos and sin of the angles of rotary embeddings, for heads of this width: (N, 2) ->
    (N, width / 2) each. Half of them grow with the first coordinate, half with the second."""
    n = width // 4
    slower = 10. ** (-torch.arange(n, dtype=torch.float32, device=places.device) / n)
    angle = places[..., None] * slower
    return angle.flatten(1).cos(), angle.flatten(1).sin()


def turn(q, cos, sin):
    """Rotates pairs of q (B, H, N, width), so that q·k depends on differences of coordinates."""
    a, b = q.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).type_as(q)


class Attention(nn.Module):
    """Every position attends to every visible position: there is no causal mask. Queries and keys
    are normalised, so that attention cannot collapse onto one position at a high learning rate."""

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
    """The small trunk: the blocks of this file, from scratch."""
    vocabulary = {}                             # a trunk's own input and head, by modality

    def __init__(self, width=96, depth=4, heads=3):
        super().__init__()
        self.width, self.head_width = width, width // heads
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, h, places, visible, t):
        """h (B, N, width), coordinates (N, 2), visible positions (B, N) bool or None for all, time
        (B, 1, 1) -> (B, N, width). Time is not used: x_t itself shows how noisy it is."""
        rotation = rotary(places, self.head_width)
        visible = None if visible is None else visible[:, None, None]       # (B, 1, 1, N)
        for block in self.blocks:
            h = block(h, rotation, visible)
        return self.norm(h)


class Backbone(nn.Module):
    """The large trunk: a causal language model of `transformers`, without its causal mask.

    It has learned to predict token i from the state of token i − 1. With `shift` it still does:
    the token `bos` is put in front, and the last state is dropped. config: the model's, as a
    dictionary; pretrained: the model itself; without it the weights are random.
    """

    def __init__(self, config, bos, shift=True, pretrained=None, **sizes):
        from transformers import AutoConfig, AutoModelForCausalLM
        super().__init__()
        model = pretrained or AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        self.body, self.bos, self.shift = model.base_model, bos, shift
        self.words = model.get_input_embeddings()
        self.width = self.words.embedding_dim
        self.place = nn.Parameter(torch.zeros(self.width, self.width))  # at first without effect
        self.vocabulary = {"text": nn.ModuleList([self.words, model.get_output_embeddings()])}

    def forward(self, h, places, visible, t):
        """As of `Blocks`. The model's own position of a token is the number of visible tokens
        before it; its two coordinates are added to its vector, by a linear map of their waves."""
        if visible is None:
            visible = torch.ones_like(h[..., 0], dtype=torch.bool)
        h = h + torch.cat(rotary(places, self.width), -1) @ self.place
        bos = self.words(torch.full((len(h), 1), self.bos, device=h.device))
        h, visible = torch.cat([bos, h], 1), F.pad(visible, (1, 0), value=True)     # (B, 1+N, …)

        # transformers adds no causal mask to a mask of four dimensions
        mask = torch.where(visible, 0., torch.finfo(h.dtype).min).to(h.dtype)[:, None, None]
        h = self.body(inputs_embeds=h, attention_mask=mask.expand(-1, 1, h.shape[1], -1),
                      position_ids=visible.cumsum(1) - 1, use_cache=False).last_hidden_state
        return h[:, :-1] if self.shift else h[:, 1:]


TRUNKS = Registry(blocks=Blocks, backbone=Backbone)


class Network(nn.Module):
    """Inputs, trunk and heads; the sequence is all modalities that are present, concatenated.

    tokens, paths: {name: object}. A path may have more states than there are tokens to predict.
    """

    def __init__(self, tokens, paths, trunk):
        super().__init__()
        width, self.trunk = trunk.width, trunk
        self.eos = {m: kind.eos for m, kind in tokens.items()}
        self.input = nn.ModuleDict({m: INPUTS[m](p.embedding, width) for m, p in paths.items()})
        self.head = nn.ModuleDict({m: nn.Linear(width, len(kind.embedding))
                                   for m, kind in tokens.items()})
        self.modality = nn.ParameterDict({m: 0.02 * torch.randn(width) for m in tokens})
        self.free = nn.Parameter(0.02 * torch.randn(width))         # added where a token is free

        for m, (words, head) in trunk.vocabulary.items():
            self.input[m].words, self.head[m] = words, head
            for vector in (self.free, *self.modality.values()):     # pretrained embeddings start
                nn.init.zeros_(vector)                              # as they are

    def forward(self, x, free, t):
        """x, free {name: (B, N)} long, bool; t (B, 1, 1) or a number -> logits of p(x₁ | x_t),
        {name: (B, N, V)}."""
        h = torch.cat([self.input[m](x[m]) + self.modality[m] + free[m][..., None] * self.free
                       for m in x], 1)                                      # (B, ΣN, width)
        places = torch.cat([self.input[m].coordinates(x[m].shape[1]) for m in x])

        visible = None                                      # all but the padding of given texts
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


OPTIMIZERS = Registry(adamw=torch.optim.AdamW)


class Fudoki(L.LightningModule):
    """Fills the free positions of some modalities, given the others.

    x is {"text": (B, T), "image": (B, I)} long, `free` the same with bool: True where a token has
    to be found. A modality that is not in the dictionary is not in the sequence.
    """

    def __init__(self, tokens, frequency=None, path="metric", path_options=None,
                 clock="calibrated", trunk="blocks", trunk_options=None, pretrained=None,
                 loss="cross_entropy", optimizer="adamw", lr=6e-3, t_power=1.,
                 share=None, drop=0.05, clean=0.1, notes=None):
        """tokens {name: arguments of its entry in TOKENS}; frequency {name: (V,)};
        path, clock, trunk, loss, optimizer: entries of PATHS, CLOCKS, TRUNKS, LOSSES, OPTIMIZERS;
        pretrained: a causal language model for `Backbone`, not kept as a hyperparameter;
        lr: the peak; t_power: see `loss`; share {name: weight}: how many rows of a batch have this
        modality to find, by default equally many; drop: how often a modality is left out of a
        batch; clean: share of the rows that are given a part of what they have to find;
        notes: a dictionary for those who open the checkpoint."""
        super().__init__()
        self.save_hyperparameters(ignore="pretrained", logger=False)
        self.tokens = {m: TOKENS[m](*arguments) for m, arguments in tokens.items()}
        self.paths = nn.ModuleDict({
            m: PATHS[path](kind.embedding, (frequency or {}).get(m), **path_options or {})
            .on(clock) for m, kind in self.tokens.items()})
        known = {"pretrained": pretrained} if pretrained else {}
        self.net = Network(self.tokens, self.paths, TRUNKS[trunk](**trunk_options or {}, **known))
        self.position_loss = LOSSES[loss]

    # -- training: corrupt what is free, predict what was there

    def corrupt(self, x_1, where, t):
        """x_t ~ p_t(· | x₁) at these positions, x₁ at the others; t (B, 1, 1) or a number."""
        return {m: torch.where(where[m], corrupt(self.paths[m], x_1[m], t), x_1[m]) for m in x_1}

    def mark_free(self, x, *names):
        """`free` for x: True in these modalities but for their questions. {name: (B, N)} bool"""
        return {m: ~question(x_m, self.tokens[m].marks) & (m in names) for m, x_m in x.items()}

    def weight(self, x_1, free):
        """Weights of the positions in the loss, of sum 1 in every row: those that are free weigh
        the same, but all padding of a row together weighs as one token. {name: (B, N)} float"""
        weight = {}
        for m in x_1:
            pad = padding(x_1[m], self.tokens[m].eos) & free[m]
            weight[m] = free[m] / torch.where(pad, pad.sum(1, keepdim=True), 1)
        n = sum(w.sum(1, keepdim=True) for w in weight.values()).clamp(min=1e-9)
        return {m: w / n for m, w in weight.items()}

    def loss(self, x_1, free, t=None, position_loss=cross_entropy):
        """Mean loss of the free positions of a row, then of the rows, so that three words weigh as
        much as 49 patches, and the accuracy: two scalars.

        t (B, 1, 1) or a number, by default u^t_power, where u is spread evenly over any run of
        rows, by steps of the golden ratio: little is left to learn at late t, and where x_t shows
        t, any density of t has the same minimiser (tutorial, chapter 6).
        """
        B, device = len(next(iter(x_1.values()))), self.device
        if t is None:
            start = torch.rand(1, dtype=torch.float32, device=device)
            u = (start + 0.618034 * torch.arange(B, dtype=torch.float32, device=device)) % 1
            t = (u ** self.hparams.t_power).view(B, 1, 1)

        x_t = self.corrupt(x_1, free, t)
        weight = self.weight(x_1, free)
        loss, right = 0, 0
        for m, l in self.net(x_t, free, t).items():
            losses = position_loss(self.paths[m], l, x_1[m], x_t[m], t)         # (B, N)
            loss = loss + (losses * weight[m]).sum() / B
            right = right + ((l.argmax(-1) == x_1[m]) * weight[m]).sum() / B
        return loss, right

    def task(self, x_1):
        """`free`: every row has one modality to find, as many rows for each as its share says. In
        some rows a part of it is given, all places but one at most. {name: (B, N)} -> bool"""
        B = len(next(iter(x_1.values())))
        share = [(self.hparams.share or {}).get(m, 1.) for m in x_1]
        ends = [round(B * s / sum(share)) for s in itertools.accumulate(share)]

        free = self.mark_free(x_1, *x_1)
        for m, start, end in zip(x_1, [0, *ends], ends):
            free[m][:start] = free[m][end:] = False

        # the share of a row that is given: 0, but uniform in `clean` of the rows
        known = (1 - torch.rand(B, 1, device=self.device) / self.hparams.clean).relu()
        left = {m: f & (torch.rand(f.shape, device=self.device) >= known) for m, f in free.items()}
        return {m: f.where(~left[m].any(1, keepdim=True), left[m]) for m, f in free.items()}

    def training_step(self, x_1, index):
        """Lightning's hook: every row finds one modality, given the others. Some batches have not
        all modalities: guidance needs predictions without the condition."""
        present = {m: x for m, x in x_1.items() if torch.rand(()) >= self.hparams.drop} or x_1
        loss, accuracy = self.loss(present, self.task(present), position_loss=self.position_loss)
        if len(present) < len(x_1) and torch.distributed.is_initialized():
            loss = loss + 0 * sum(p.sum() for p in self.net.parameters())   # DDP wants all of them
        self.log_dict({"loss": loss, "accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, x_1, index):
        """Lightning's hook: each modality of held-out rows, given the others, every tenth row at
        the same t, with the same noise every time."""
        with torch.random.fork_rng():
            torch.manual_seed(index)
            for m, i in itertools.product(x_1, range(min(10, len(next(iter(x_1.values())))))):
                part, t = {k: x[i::10] for k, x in x_1.items()}, (i + 0.5) / 10
                loss, accuracy = self.loss(part, self.mark_free(part, m), t)
                log = {f"val_{m}_loss": loss, f"val_{m}_acc": accuracy}
                log |= {f"{name}_t{t:.2f}": value for name, value in log.items()}
                self.log_dict(log, batch_size=len(part[m]), sync_dist=True)

    def configure_optimizers(self):
        """Lightning's hook: the learning rate rises over the first 5 % of the steps, then falls as
        a cosine to 0. The trunk's matrices, but not its tables, are a group apart, for Muon."""
        steps, trunk = self.trainer.estimated_stepping_batches, self.net.trunk

        def rate(step):
            return min((step + 1) / (0.05 * steps), (1 + math.cos(math.pi * step / steps)) / 2)

        tables = {m.weight for m in trunk.modules() if isinstance(m, nn.Embedding)}
        matrices = {p for p in trunk.parameters() if p.ndim == 2} - tables
        groups = [{"params": [p for p in self.parameters() if (p in matrices) == which],
                   "lr": self.hparams.lr, "matrices": which} for which in (False, True)]

        optimizer = OPTIMIZERS[self.hparams.optimizer](
            groups, betas=(0.9, 0.98), weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    # -- generation: start from noise; predict, step, predict again

    def predict(self, x, free, t, guidance=1.):
        """Logits of p(x₁ | x_t) with guidance g: u + g (c − u) for every modality to be filled,
        c given all modalities and u this one alone; g = 1 is off. ValueError: nothing is given."""
        c = self.net(x, free, t)
        if guidance == 1:
            return c
        if len(x) == 1:
            raise ValueError("guidance needs another modality to leave out")
        alone = {m: self.net({m: x[m]}, {m: free[m]}, t)[m] for m in x if free[m].any()}
        return {m: u + guidance * (c[m] - u) for m, u in alone.items()}

    def to_fill(self, n, **given):
        """x and free of n rows: tokens (n, N) of the given modalities, free where they are −1;
        all others are free altogether."""
        x = {m: given.get(m, torch.full((n, kind.length), -1)).to(self.device)
             for m, kind in self.tokens.items()}
        return {m: x_m.clamp(min=0) for m, x_m in x.items()}, {m: x_m < 0 for m, x_m in x.items()}

    def noisy(self, x, free):
        """Which positions move: the free ones. A model that was trained with `clean` 0 has never
        seen clean tokens beside noise: there, all positions of a row with free ones move, except
        questions."""
        return free if self.hparams.clean else {
            m: f | f.any(1)[:, None] & ~question(x[m].masked_fill(f, -1), self.tokens[m].marks)
            for m, f in free.items()}

    def times(self, t, steps, late=1.):
        """t < … < 1, steps + 1 of them: 1 − t falls as (1 − u)^late with u evenly spaced. With
        late > 1 the last steps are the shortest, so that places can still correct each other."""
        return (1 - (1 - t) * (1 - torch.linspace(0, 1, steps + 1)) ** late).tolist()

    @torch.no_grad()
    def generate(self, x, free, *, x_t=None, t=0., steps=8, late=1., step="race", velocity=None,
                 guidance=1., temperature=1.):
        """Fills the free positions of x: yields every state from noise to the answer, steps + 1.

        Given tokens stay as they are, or, where `noisy` says so, become as noisy as the free ones
        and move back to what they are.

        x_t, t: the state to begin with and its time; without a state, x with the noise of that
        time where it moves. late: see `times`; step: an entry of STEPS; velocity: of VELOCITIES,
        for Euler's steps along it; guidance: see `predict`; temperature: of x₁ ~ p(x₁ | x_t), 0
        takes the likeliest. ValueError: steps < 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        noisy = self.noisy(x, free)
        move = functools.partial(euler, velocity=VELOCITIES[velocity]) if velocity else STEPS[step]

        x_t = self.corrupt(x, noisy, t) if x_t is None else x_t         # 1. x_t, at first noise
        yield x_t
        for t, s in itertools.pairwise(self.times(t, steps, late)):
            p_1t = self.predict(x_t, noisy, t, guidance)                # 2. what will it be?
            x_t = dict(x_t)
            for m in (m for m in x if noisy[m].any()):
                if getattr(move, "posterior", False) and s < 1:
                    p = (p_1t[m].float() / max(temperature, 1e-6)).softmax(-1)
                    x_1 = torch.where(free[m][..., None], p, F.one_hot(x[m], p.shape[-1]))
                else:
                    x_1 = sample_x_1(p_1t[m], temperature).where(free[m], x[m])     # 3. x₁ ~ p_1t

                # 4. a step towards it
                x_s = (move if s < 1 else finish)(self.paths[m], x_t[m], x_1, t, s)
                x_t[m] = torch.where(noisy[m], x_s, x_t[m])
            yield x_t
