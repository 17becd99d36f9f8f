"""FUDOKI in one file: discrete flow matching without masks, for pictures and words in one model.

Tokens start as noise and move, one jump at a time, towards the answer that a network predicts;
every token stays open to revision until the end (arXiv 2505.20147). The file reads from top to
bottom: paths, velocities, steps, tokenisers, network, LightningModule. The first three are the
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
import argparse
import difflib
import functools
import itertools
import math
import pathlib
import pickle
import re
import sys

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

FAR = 1e30          # β at t = 1: every other token is out of reach, and float32 stays finite
CHUNK = 2 ** 22     # numbers in one (rows, V) array; more rows than that take turns


# ---------------------------------------------------------------------------------------- 1. paths

class Path(nn.Module):
    """A probability path p_t(x | x₁) from noise (t = 0) to data (t = 1), defined by `logits`.

    embedding (V, D): a frozen vector per token; frequency (V,): how often each occurs in the
    data. Options that a path has no use for are ignored, so that nobody asks which path it is.
    """

    def __init__(self, embedding, frequency=None, **options):
        super().__init__()
        self.register_buffer("embedding", embedding.float())

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


class MaskPath(Path):
    """Each token is clean with probability t, otherwise the extra id [MASK]; it cannot revise."""

    def __init__(self, embedding, frequency=None, **options):
        super().__init__(F.pad(embedding, (0, 1, 0, 1)))
        self.embedding[-1, -1] = 1      # [MASK] is the last id, at right angles to all others

    def logits(self, x_1, t):           # ℓ_t = log t at x₁, log(1 − t) at [MASK], −∞ elsewhere
        mask = self.one_hot(torch.full_like(x_1, len(self.embedding) - 1))
        l = torch.where(self.one_hot(x_1), torch.log(t), -torch.inf)
        return torch.where(mask, torch.log(1 - t), l)


class MetricPath(Path):
    """FUDOKI's path: tokens near x₁ stay likely longest.

    exponent 4 on normalised embeddings is the released model's d = (2 − 2cos)², exponent 2 is
    URSA's; schedule: an entry of SCHEDULES.
    """

    def __init__(self, embedding, frequency=None, exponent=4., normalize=True,
                 schedule="calibrated", **options):
        super().__init__(F.normalize(embedding, dim=-1) if normalize else embedding)
        self.exponent = exponent
        self.beta = SCHEDULES[schedule](self, frequency)

    def distance(self, x_1):            # d(x, x₁) = ‖e_x − e_{x₁}‖^exponent
        d = torch.cdist(self.embedding[x_1], self.embedding) ** self.exponent
        return d.masked_fill(self.one_hot(x_1), 0.)     # exactly, whatever was rounded

    def logits(self, x_1, t):           # ℓ_t(x | x₁) = −β_t d(x, x₁)
        return -self.beta(t) * self.distance(x_1)


PATHS = {"metric": MetricPath, "uniform": UniformPath, "mask": MaskPath}


class PowerSchedule(nn.Module):
    """FUDOKI's schedule. Its a and c suit the codebook they were chosen for, hardly any other."""

    def __init__(self, path=None, frequency=None, a=0.9, c=3.0):
        super().__init__()
        self.a, self.c = a, c

    def forward(self, t):               # β_t = c (t / (1 − t))^a
        return self.c * (t / (1 - t).clamp(min=1e-30)) ** self.a


class CalibratedSchedule(nn.Module):
    """The kinetic-optimal schedule of this codebook: constant Fisher–Rao speed along the path.

    Along β the Fisher information is Var_{p_β}[d]. With S(β) = ∫₀^β √( E_{x₁} Var_{p_b}[d] ) db,
    x₁ by its frequency, β_t = S⁻¹(t·S(∞)), tabulated here (2605.09386; tutorial, chapter 1).
    """

    def __init__(self, path, frequency=None, points=257):
        super().__init__()
        V = len(path.embedding)
        frequency = torch.ones(V) if frequency is None else frequency
        share = frequency.double().cumsum(0) / frequency.sum()
        rows = min(256, max(16, 2 ** 20 // V))                      # x₁ at the quantiles of share
        d = path.distance(torch.searchsorted(share, (torch.arange(rows) + 0.5) / rows))
        last = math.log(1e6 * V) / d[d > 0].min()                   # p(x₁ | x₁) ≥ 1 − 1e-6 there
        beta = torch.logspace(math.log10(1e-3 / d.mean()), math.log10(last), 256)
        beta = F.pad(beta, (1, 0))                                  # 0 first: p_0 is uniform

        def speed(b):                                               # √( E_{x₁} Var_{p_b}[d] )
            p = (-b * d).softmax(-1)
            return (p * (d - (p * d).sum(-1, keepdim=True)) ** 2).sum(-1).mean().sqrt()

        way = torch.cumulative_trapezoid(torch.stack([speed(b) for b in beta]), beta).double()
        way = F.pad(way, (1, 0))
        evenly = torch.linspace(0, 1, points).double() * way[-1]
        table = np.interp(evenly.numpy(), way.numpy(), beta.numpy())
        self.register_buffer("table", torch.from_numpy(table).float())

    def forward(self, t):               # linear between the entries
        place = t * (len(self.table) - 1)
        i = place.long().clamp(0, len(self.table) - 2)
        beta = torch.lerp(self.table[i], self.table[i + 1], place - i)
        return torch.where(t < 1, beta, FAR)


# exercise: any increasing β with β_0 = 0 and β_1 = FAR
SCHEDULES = {"calibrated": CalibratedSchedule, "power": PowerSchedule}


# ---------------------------------------- 2. what follows for every path: noise, velocities, steps

def at(l, x):
    """l[…, x]: (…, V) and (…) long -> (…, 1)."""
    return l.gather(-1, x[..., None])


def categorical(p):
    """x ~ p by inverse CDF, p ≥ 0 of any sum: (…, V) -> (…) long. Never a token with p = 0:
    the CDF has to exceed u, and u·sum < sum also after rounding."""
    cdf = p.cumsum(-1)
    u = torch.rand_like(cdf[..., :1]) * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True)[..., 0]


def guess(l, temperature):
    """x ~ softmax(l / temperature), 0 takes the likeliest: (…, V) -> (…) long."""
    if not temperature:
        return l.argmax(-1)
    rows = l.flatten(0, -2).split(max(1, CHUNK // l.shape[-1]))
    return torch.cat([categorical((r.float() / temperature).softmax(-1)) for r in rows]
                     ).view(l.shape[:-1])


def in_rows(function):
    """Lets `function(path, *tokens, *times)` see rows: tokens (N,), times (N, 1), where a caller
    has tokens (B, L) and times (B, 1, 1) or numbers. In float32 whatever the network runs in,
    without gradient, and CHUNK numbers at a time, so that memory is bounded for any V."""
    @functools.wraps(function)
    @torch.no_grad()
    def wrapped(path, x, *others, **options):
        def row(a):
            if torch.is_tensor(a) and not a.is_floating_point():
                return a.reshape(-1)
            a = torch.as_tensor(a, device=x.device).float().expand(*x.shape, 1)
            return a.reshape(-1, 1).contiguous()        # for jvp, a number of its own per row

        n = max(1, CHUNK // len(path.embedding))
        with torch.autocast(x.device.type, enabled=False):
            chunks = zip(*(row(a).split(n) for a in (x, *others)))
            return torch.cat([function(path, *c, **options) for c in chunks]).view(x.shape)
    return wrapped


@in_rows
def corrupt(path, x_1, t):
    """x_t ~ p_t(· | x₁); at t = 0 the source. (B, L) -> (B, L)"""
    return categorical(path.logits(x_1, t).softmax(-1))


def ascent(path, x_t, x_1, t):
    """p_t(x) and ∂_t ℓ_t(x) − ∂_t ℓ_t(x_t), (…, V) each, for 0 < t < 1. The normaliser of ℓ
    cancels in the difference, which is 0 where p_t(x_t | x₁) = 0: such a token stays."""
    l, dl = torch.func.jvp(lambda t: path.logits(x_1, t), (t,), (torch.ones_like(t),))
    return l.softmax(-1), torch.where(at(l, x_t) > -torch.inf, dl - at(dl, x_t), 0.)


def kinetic_optimal(path, x_t, x_1, t):
    """u_t(x, x_t | x₁) = p_t(x) [∂_t ℓ_t(x) − ∂_t ℓ_t(x_t)]₊ carries p_t along with the least
    kinetic energy (2412.03487); of the metric path it is FUDOKI's eq. 5. (B, L) -> (B, L, V)"""
    p_t, rise = ascent(path, x_t, x_1, t)
    return p_t * rise.relu()


def corrector(path, x_t, x_1, t, eta=0.5):
    """The kinetic-optimal velocity plus η p_t(x) |∂_t ℓ_t(x) − ∂_t ℓ_t(x_t)|, which is in detailed
    balance with p_t: more jumps, both ways, along the same path. (B, L) -> (B, L, V)"""
    p_t, rise = ascent(path, x_t, x_1, t)
    return p_t * (rise.relu() + eta * rise.abs())


def campbell(path, x_t, x_1, t):
    """u_t = [ṗ_t(x) − ṗ_t(x_t)]₊ / (S p_t(x_t)), S the number of tokens with p_t > 0: another
    velocity of the same path (2402.04997). (B, L) -> (B, L, V)"""
    p_t, rise = ascent(path, x_t, x_1, t)
    dp_t = p_t * (rise - (p_t * rise).sum(-1, keepdim=True))
    S = (p_t > 0).sum(-1, keepdim=True)
    return (dp_t - at(dp_t, x_t)).relu() * (p_t > 0) / (S * at(p_t, x_t).clamp(min=1e-19))


# exercise: u_t plus anything in detailed balance with p_t
VELOCITIES = {"kinetic_optimal": kinetic_optimal, "corrector": corrector, "campbell": campbell}


@in_rows
def euler(path, x_t, x_1, t, s, velocity=kinetic_optimal):
    """Freezes the velocity of mid-step, which is finite for every path also from t = 0: jump with
    probability 1 − e^−(s−t)λ, to x ~ u/λ. (B, L) -> (B, L)"""
    u = velocity(path, x_t, x_1, (t + s) / 2)
    lam = u.sum(-1)
    jump = torch.rand_like(lam) < -torch.expm1(-(s - t)[..., 0] * lam)
    return torch.where(jump, categorical(u), x_t)


def log_exp(like):
    """log E with E = −log U ~ Exp(1), in the shape of `like`; finite, since 1e-8 ≤ U < 1."""
    return torch.rand_like(like).clamp_(min=1e-8).log_().neg_().log_()


@in_rows
def race(path, x_t, x_1, t, s):
    """The exact step: if x_t ~ p_t then x_s ~ p_s, however large s − t. (B, L) -> (B, L)

    Token x arrives at time E_x e^{−ℓ_t(x)}, E_x ~ Exp(1), and the first is x_t. As t grows it is
    overtaken by x at rate p_t(x) [∂ℓ_t(x) − ∂ℓ_t(x_t)]₊: the kinetic-optimal velocity. So draw the
    E_x given who leads at t, and see who leads at s. No derivative, nothing singular at 0 or 1.
    """
    l_t, l_s = path.logits(x_1, t).log_softmax(-1), path.logits(x_1, s)
    tau = log_exp(l_t[..., :1])                                 # log arrival of the leader at t;
    score = l_s - torch.logaddexp(l_t + tau, log_exp(l_t))      # all others arrive after it
    score.scatter_(-1, x_t[..., None], at(l_s, x_t) - at(l_t, x_t) - tau)
    possible = at(l_t, x_t)[..., 0] > -torch.inf                # x₁ was drawn anew: x_t stays
    return torch.where(possible, score.argmax(-1), x_t)


def renoise(path, x_t, x_1, t, s):
    """x_s ~ p_s(· | x₁), forgetting x_t: exact too, and moves every token. (B, L) -> (B, L)"""
    return corrupt(path, x_1, s)


@in_rows
def finish(path, x_t, x_1, t, s):
    """The last step: x := x₁, unless p_t(x_t | x₁) = 0, which stays. (B, L) -> (B, L)"""
    return torch.where(at(path.logits(x_1, t), x_t)[..., 0] > -torch.inf, x_1, x_t)


STEPS = {"race": race, "renoise": renoise, "euler": euler,
         "corrector": functools.partial(euler, velocity=corrector),
         "campbell": functools.partial(euler, velocity=campbell)}


# ----------------------------------------------------------------------------------- 3. tokenisers

class InputError(ValueError):
    """What a user got wrong and what to do, in one line; the commands end with it."""


def nearest(word, known):
    """'did you mean …?' with the most similar of the known words, else all of them."""
    close = difflib.get_close_matches(word, known, 3, 0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


class Text:
    """Texts as rows of tokens. What a token is, `ids` and `text` say: str <-> list of int.

    length: tokens of a window; end: the token that closes a text and fills up shorter ones, None
    if there is none; whole: each text stands for itself, or else is part of a longer one; marks:
    the tokens that end a question; blank: how many underscores stand for a free token.
    """
    end, whole, marks, blank = None, False, (), 1

    def encode(self, texts):
        """list of B strings -> (B, N ≤ length) long, −1 where free: "___" are three free tokens,
        or one word, and at the end of a text as many as still fit. InputError: too long, or an
        unknown token."""
        rows = []
        for text in texts:
            goes_on = text.endswith("___")
            parts = re.split("(_{3,})", text.rstrip("_") if goes_on else text)  # odd: blanks
            row = sum(([-1] * (len(part) // self.blank) if i % 2 else self.ids(part)
                       for i, part in enumerate(parts)), [])
            if goes_on:
                row += [-1] * (self.length - len(row))
            elif self.whole:
                row.append(self.end)
            if len(row) > self.length:
                raise InputError(f"'{text[:40]} …' has {len(row)} tokens, {self.length} fit in")
            rows.append(row)
        n = max(map(len, rows))
        return torch.tensor([row + [self.end] * (n - len(row)) for row in rows])

    def text(self, ids):
        """list of N int -> str, a dot for −1"""
        return " ".join(self.words[i] if i >= 0 else "·" for i in ids)

    def question(self, tokens):
        """True up to the last question mark, which is never to be found: (B, N) -> (B, N) bool"""
        mark = torch.isin(tokens, torch.tensor(self.marks, device=tokens.device)).long()
        return mark.flip(1).cummax(1).values.flip(1).bool()

    def decode(self, tokens):
        """(B, N) long -> list of B strings, each up to its end if it stands for itself."""
        rows = tokens.tolist()
        if self.whole:
            rows = [row[:row.index(self.end)] if self.end in row else row for row in rows]
        return [self.text(row) for row in rows]


class Words(Text):
    """Texts of one of a few forms, each with one word from each of its slots. Captions are the
    first, [["thin", "bold"], ["one", "two"]]; others ask: [["digit?"], ["one", "two"]].

    A text may leave out words and have them in any order. The article says nothing and is no
    token, nor does a question need its mark.
    """

    def __init__(self, *forms):
        self.forms, self.length = forms, len(forms[0])
        self.words = list(dict.fromkeys(w for form in forms for slot in form for w in slot))
        self.token = {word: i for i, word in enumerate(self.words)}
        self.marks = [i for i, word in enumerate(self.words) if word.endswith("?")]

    def encode(self, texts):
        """list of B strings -> (B, slots) long, −1 where a word was left out ("___" says so).
        InputError: an unknown word, or two words for one slot."""
        return torch.tensor([self.row(text) for text in texts])

    def row(self, text):
        """The tokens of one text, by the first form that has a place for all of its words."""
        said = {word.strip("?") for word in re.findall(r"[^\s,._]+", text.lower())}
        said -= {"", "a", "an", "it"}
        known = list(dict.fromkeys(word.strip("?") for word in self.words))
        for word in sorted(said.difference(known)):
            raise InputError(f"unknown word '{word}'; {nearest(word, known)}")
        for form in self.forms:
            found = [[word for word in slot if word.strip("?") in said] for slot in form]
            if max(map(len, found)) < 2 and sum(map(len, found)) == len(said):
                found = [f or slot for f, slot in zip(found, form)]     # one word is no choice
                return [self.token[f[0]] if len(f) == 1 else -1 for f in found]
        kinds = ", ".join("|".join(slot) for slot in self.forms[0])
        raise InputError(f"'{text}' is no caption: it has one word each of {kinds}")

    def decode(self, tokens):
        """(B, slots) long -> list of B strings."""
        return [text if "?" in text else "a " + text for text in super().decode(tokens)]


class Vocabulary(Text):
    """Captions of any length in the words that the training captions have."""
    whole, blank = True, 3

    def __init__(self, words, length):
        self.words, self.length, self.end = [*words, ""], length, len(words)
        self.token = {word: i for i, word in enumerate(words)}
        self.marks = [self.token[word] for word in words if word == "?"]

    @staticmethod
    def split(text):
        """A text as a list of words and punctuation marks, in lower case."""
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def ids(self, text):
        try:
            return [self.token[word] for word in self.split(text)]
        except KeyError as error:
            known = nearest(error.args[0], self.words[:-1])
            raise InputError(f"unknown word {error}; {known}") from error


class Characters(Text):
    """Windows of a long text, character by character."""

    def __init__(self, alphabet, length):
        self.words, self.length = alphabet, length
        self.token = {character: i for i, character in enumerate(alphabet)}

    def ids(self, text):
        try:
            return [self.token[character] for character in text]
        except KeyError as error:
            raise InputError(f"the training text has no character {error}") from error

    def text(self, ids):
        return "".join(self.words[i] if i >= 0 else "·" for i in ids)


class Pieces(Text):
    """The tokens of a Hugging Face tokenizer, given as its JSON: a window of a long text, or if
    `whole` a caption that `end` closes."""

    def __init__(self, json, length, end, whole):
        from tokenizers import Tokenizer
        self.tokenizer = Tokenizer.from_str(json)
        self.length, self.end, self.whole = length, end, whole
        if whole:
            self.marks = [i for piece, i in self.tokenizer.get_vocab().items() if "?" in piece]

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, ids):
        return "".join(
            "·" * len([*run]) if free else
            self.tokenizer.decode([*run], skip_special_tokens=False)
            for free, run in itertools.groupby(ids, lambda i: i < 0))


TEXTS = {"words": Words, "vocabulary": Vocabulary, "characters": Characters, "pieces": Pieces}


def padding(x, end):
    """True where `end` stands after another `end`: (B, N) long -> (B, N) bool."""
    closed = (x == end) if end is not None else torch.zeros_like(x, dtype=torch.bool)
    return closed & F.pad(closed, (1, -1))


class Patches(nn.Module):
    """Square pictures as rows of square patches, a patch being the nearest entry of a codebook
    (codes, channels·patch²); the codebook is also the metric's embedding and what the network
    sees. Without one it is random."""

    def __init__(self, codes, patch, size, channels=1, codebook=None):
        super().__init__()
        codebook = torch.rand(codes, channels * patch ** 2) if codebook is None else codebook
        self.register_buffer("codebook", codebook.float())
        self.patch, self.size, self.channels = patch, size, channels
        self.length = (size // patch) ** 2

    def encode(self, images):
        """(B, C, size, size) in [0, 1] -> (B, (size / patch)²) long."""
        rows = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        return torch.cat([torch.cdist(r, self.codebook).argmin(-1) for r in rows.split(1024)])

    def decode(self, tokens):
        """(B, (size / patch)²) long -> (B, C, size, size)."""
        rows = self.codebook[tokens].transpose(1, 2)
        return F.fold(rows, self.size, self.patch, stride=self.patch)


UNREADABLE = OSError, ValueError, SyntaxError, Image.DecompressionBombError


def open_picture(path):
    """A picture file, upright, what is transparent on white, in mode L or RGB. It may raise what
    UNREADABLE names."""
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
    if picture.mode[0] in "IF":                         # 16 and 32 bits: whatever range it has
        values = np.asarray(picture, dtype=np.float32)
        values = (values - values.min()) / max(np.ptp(values), 1e-6)
        picture = Image.fromarray((255 * values).astype(np.uint8))
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def crop(picture, size, channels):
    """The middle square of a picture, 1 or 3 channels -> (C, size, size) in [0, 1]."""
    picture = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (size, size))
    values = torch.from_numpy(np.array(picture)).view(size, size, channels)
    return values.permute(2, 0, 1) / 255


def k_means(points, k, rounds=20):
    """k centres of points (N, D) by Lloyd's rounds -> (k, D). The first is and stays 0, the blank
    patch, and the blank points are its own; an empty centre starts again at a random point."""
    points = points[points.abs().sum(-1) > 0]
    centres = points[torch.randint(len(points), (k,))]
    for _ in range(rounds):
        centres[0] = 0
        mine = torch.cat([torch.cdist(p, centres).argmin(-1) for p in points.split(8192)])
        count = torch.bincount(mine, minlength=k)[:, None]
        total = torch.zeros_like(centres).index_add_(0, mine, points)
        again = points[torch.randint(len(points), (k,))]
        centres = torch.where(count > 0, total / count.clamp(min=1), again)
    return centres.index_fill(0, torch.tensor(0), 0)


# -------------------------------------------------------------------------------------- 4. network

class WordInput(nn.Embedding):
    """A learned vector per word; a word's two coordinates are its index, twice."""

    def __init__(self, embedding, width):
        super().__init__(len(embedding), width)

    def coordinates(self, n):
        """(n, 2) float."""
        return torch.arange(float(n), device=self.weight.device)[:, None].expand(n, 2)


class PatchInput(nn.Module):
    """An MLP of a code's frozen vector plus a small learned vector per code; a patch's
    coordinates are its row and its column."""

    def __init__(self, embedding, width):
        super().__init__()
        self.register_buffer("vectors", embedding)
        self.mlp = nn.Sequential(nn.Linear(embedding.shape[1], width), nn.GELU(),
                                 nn.Linear(width, width))
        self.own = nn.Parameter(0.02 * torch.randn(len(embedding), width))

    def forward(self, x):
        return (self.mlp(self.vectors) + self.own)[x]   # once per code, not once per patch

    def coordinates(self, n):
        """(n, 2) float."""
        i = torch.arange(n, device=self.own.device)
        return torch.stack([i // math.isqrt(n), i % math.isqrt(n)], -1).float()


INPUTS = {"text": WordInput, "image": PatchInput}


def rotary(places, width):
    """cos and sin of the angles by which a head of this width turns: (N, 2) -> (N, width / 2)
    each. Half of them grow with the first coordinate, half with the second."""
    n = width // 4
    angle = places[..., None] * 10. ** (-torch.arange(n, device=places.device) / n)
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

    def forward(self, h, rotation, seen):
        B, N, D = h.shape
        q, k, v = self.qkv(h).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = turn(self.norm_q(q), *rotation), turn(self.norm_k(k), *rotation)
        h = F.scaled_dot_product_attention(q, k, v, seen)       # (B, H, N, D/H)
        return self.out(h.transpose(1, 2).reshape(B, N, D))     # (B, N, D)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h, rotation, seen):
        h = h + self.attention(self.norm_1(h), rotation, seen)
        return h + self.mlp(self.norm_2(h))


class Blocks(nn.Module):
    """The small trunk: blocks of this file, from scratch."""

    def __init__(self, width, depth, heads):
        super().__init__()
        self.width, self.head_width = width, width // heads
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, h, places, seen):
        """h (B, N, width), coordinates (N, 2), which positions mean something (B, N) bool, None if
        all do -> (B, N, width)"""
        rotation = rotary(places, self.head_width)
        seen = None if seen is None else seen[:, None, None]                # (B, 1, 1, N)
        for block in self.blocks:
            h = block(h, rotation, seen)
        return self.norm(h)


class Backbone(nn.Module):
    """The large trunk: a causal language model of `transformers` that looks both ways.

    It has learned to predict token i from the state of token i − 1. With `shift`, so it stays:
    `start`, its token for the beginning, goes before the first, and the last state is dropped.
    """

    def __init__(self, config, start, shift=True, model=None):
        """config: the model's as a dictionary; without `model`, its weights are random."""
        from transformers import AutoConfig, AutoModelForCausalLM
        super().__init__()
        if model is None:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        self.body, self.embedding = model.base_model, model.get_input_embeddings()
        self.head, self.start, self.shift = model.get_output_embeddings(), start, shift
        self.width = self.embedding.embedding_dim

    def forward(self, h, places, seen):
        """As of `Blocks`; a position is the number of those before it that mean something."""
        seen = torch.ones_like(h[..., 0], dtype=torch.bool) if seen is None else seen
        start = self.embedding.weight[self.start].expand(len(h), 1, -1)
        h, seen = torch.cat([start, h], 1), F.pad(seen, (1, 0), value=True)     # (B, 1 + N, …)
        far = torch.finfo(h.dtype).min                      # a mask of four dimensions is not
        mask = torch.zeros_like(seen, dtype=h.dtype).masked_fill(~seen, far)    # made causal
        mask = mask[:, None, None].expand(-1, 1, h.shape[1], -1)                # (B, 1, 1+N, 1+N)
        h = self.body(inputs_embeds=h, attention_mask=mask, position_ids=seen.cumsum(1) - 1,
                      use_cache=False).last_hidden_state
        return h[:, :-1] if self.shift else h[:, 1:]


class Network(nn.Module):
    """Inputs, trunk and heads over the modalities that are there, one after the other. No time
    input: how noisy x_t is can be seen.

    embeddings {name: (states, D)}; classes {name: V}; ends {name: closing token or None}.
    """

    def __init__(self, embeddings, classes, ends, trunk):
        super().__init__()
        self.trunk, self.ends = trunk, ends
        self.input = nn.ModuleDict({m: INPUTS[m](e, trunk.width) for m, e in embeddings.items()})
        self.head = nn.ModuleDict({m: nn.Linear(trunk.width, V) for m, V in classes.items()})
        self.kind = nn.ParameterDict({m: 0.02 * torch.randn(trunk.width) for m in embeddings})
        self.free = nn.Parameter(0.02 * torch.randn(trunk.width))           # "this is to be found"
        if isinstance(trunk, Backbone):                     # has words of its own; do not disturb
            self.input["text"].weight, self.head["text"] = trunk.embedding.weight, trunk.head
            for vector in (self.free, *self.kind.values()):
                nn.init.zeros_(vector)

    def forward(self, x, free):
        """x, free {name: (B, N)} long, bool -> logits of p(x₁ | x_t), {name: (B, N, V)}."""
        h = torch.cat([self.input[m](x[m]) + self.kind[m] + free[m][..., None] * self.free
                       for m in x], 1)                                      # (B, ΣN, width)
        places = torch.cat([self.input[m].coordinates(x[m].shape[1]) for m in x])
        seen = None                                         # of what is given, all but padding
        if any(self.ends[m] is not None for m in x):
            seen = torch.cat([free[m] | ~padding(x[m], self.ends[m]) for m in x], 1)
        h = self.trunk(h, places, seen).split([x[m].shape[1] for m in x], 1)
        return {m: self.head[m](h_m) for m, h_m in zip(x, h)}               # (B, N, V) each


# ------------------------------------------------------------------------------ 5. LightningModule

def orthogonal(g):
    """About U Vᵀ of g = U S Vᵀ, by five Newton–Schulz rounds: (m, n) -> (m, n)."""
    if len(g) > g.shape[1]:
        return orthogonal(g.T).T
    x = g / g.norm().clamp(min=1e-7)
    for _ in range(5):                  # a polynomial that takes all of (0, 1] to .7 … 1.2
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW, but a group with `matrices` goes along U Vᵀ of its momentum U S Vᵀ: as far in each
    direction, also in those of which a gradient has little (K. Jordan et al., 2024). The step has
    the length of one of AdamW's (2502.16982). In float32, since PyTorch's own is in bfloat16, for
    which few CPUs are made."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in (group for group in self.param_groups if group["matrices"]):
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:           # AdamW, when restored, wants all to have a step
                    self.state[p].update(step=torch.tensor(0.), m=torch.zeros_like(p))
                m = self.state[p]["m"].lerp_(p.grad, 0.05)
                length = 0.2 * max(p.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(orthogonal(p.grad.lerp(m, 0.95)), alpha=group["lr"] * length)
                p.grad = None                                   # AdamW passes it by
        super().step()
        return loss


def take(x, rows):
    """The rows of every modality: {name: (B, N)} -> {name: (b, N)}."""
    return {m: x_m[rows] for m, x_m in x.items()}


class Fudoki(L.LightningModule):
    """Fills the free positions of text and image, given the others.

    x is {"text": (B, T), "image": (B, I)} long, `free` the same with bool: True where a token has
    to be found. A modality that is not in the dictionary is not in the sequence.
    """
    DRAW = dict(steps=4, guidance=2., temperature=0.7)     # options of `generate` for pictures
    READ = dict(steps=1, temperature=0.)                    # for captions
    GAPS = dict(steps=8, temperature=0.)                    # for words beside given ones
    WRITE = dict(steps=64, temperature=0.7)                 # and for long texts

    def __init__(self, text=None, image=None, path="metric", exponent=2., normalize=False,
                 schedule="calibrated", width=96, depth=4, heads=3, backbone=None, lr=6e-3,
                 weight_decay=0.01, t_power=1., share=0.5, drop=0.1, freeze=0., data="",
                 form="digit", codebook=None, frequency=None, pretrained=None):
        """text: [an entry of TEXTS, its arguments]; image: the arguments of `Patches`; a model has
        one of them or both. path, exponent, normalize, schedule: an entry of PATHS and its
        options; width, depth, heads: of `Blocks`, or backbone: the arguments of `Backbone`.

        t_power: see `loss`; share: of a batch that is drawn, the rest is read; drop: how often
        either goes without the other; freeze: share of the training in which of a backbone only
        the body learns; data: where it is from; form: what sample.py makes of a picture, a "digit"
        or a "crop". codebook, frequency {name: (V,)} and pretrained, a causal language model, are
        what training starts from; a checkpoint restores what was made of them."""
        super().__init__()
        self.save_hyperparameters(ignore=["codebook", "frequency", "pretrained"], logger=False)
        self.words = TEXTS[text[0]](*text[1:]) if text else None
        self.patches = Patches(*image, codebook=codebook) if image else None
        trunk = Backbone(*backbone, model=pretrained) if backbone else Blocks(width, depth, heads)
        embeddings, ends = {}, {"text": None, "image": None}
        if text:
            embeddings["text"] = F.normalize(trunk.embedding.weight.detach()) if backbone \
                else torch.eye(len(self.words.words))
            ends["text"] = self.words.end
        if image:
            embeddings["image"] = self.patches.codebook
        self.lengths = {m: {"text": self.words, "image": self.patches}[m].length
                        for m in embeddings}
        options = dict(exponent=exponent, normalize=normalize, schedule=schedule)
        self.paths = nn.ModuleDict({m: PATHS[path](e, (frequency or {}).get(m), **options)
                                    for m, e in embeddings.items()})
        self.net = Network({m: p.embedding for m, p in self.paths.items()},
                           {m: len(e) for m, e in embeddings.items()}, ends, trunk)

    # -- training: corrupt what is free, predict what was there

    def noisy(self, x_1, free, t):
        """x_t ~ p_t(· | x₁) at the free positions, x₁ at the others; t (B, 1, 1) or a number."""
        return {m: torch.where(free[m], corrupt(self.paths[m], x_1[m], t), x_1[m]) for m in x_1}

    def weight(self, x_1, free):
        """Of each position in the loss: 1 where it is free, but all padding of a row together
        weighs as one token. {name: (B, N)} float"""
        def one(m):
            pad = padding(x_1[m], self.net.ends[m]) & free[m]
            return free[m] / torch.where(pad, pad.sum(1, keepdim=True), 1)
        return {m: one(m) for m in x_1}

    def loss(self, x_1, free, t=None):
        """Cross-entropy of x₁ at the free positions: the mean of a sample's, then of the batch, so
        that three words weigh as much as 49 patches. t (B, 1, 1), by default u^t_power with u
        spread evenly: any density of t has the same minimiser, and late t have little to teach.

        -> the loss and the accuracy, both a scalar."""
        B, device = len(next(iter(x_1.values()))), self.device
        if t is None:
            u = (torch.arange(B, device=device) + torch.rand(1, device=device)) / B
            t = (u ** self.hparams.t_power).view(B, 1, 1)
        p_1t = self.net(self.noisy(x_1, free, t), free)
        weight = self.weight(x_1, free)
        n = sum(w.sum(1) for w in weight.values()).clamp(min=1e-9)          # (B,)
        loss = right = 0
        for m, l in p_1t.items():
            entropy = F.cross_entropy(l.float().transpose(1, 2), x_1[m], reduction="none")
            loss = loss + (entropy * weight[m]).sum(1) / n                  # (B,)
            right = right + ((l.argmax(-1) == x_1[m]) * weight[m]).sum(1) / n
        return loss.mean(), right.mean()

    def only(self, x, *names):
        """`free` of x where all of these modalities are free and nothing else; questions never."""
        free = {m: torch.full_like(x_m, m in names, dtype=torch.bool) for m, x_m in x.items()}
        if "text" in x:
            free["text"] &= ~self.words.question(x["text"])
        return free

    def task(self, x_1):
        """Free positions for training: some rows are drawn, the others read. -> free, and which
        rows are drawn (B,) bool"""
        B, share = len(next(iter(x_1.values()))), self.hparams.share
        share = share if len(x_1) > 1 else float("image" in x_1)
        drawn = (torch.arange(B, device=self.device) * share) % 1 < share
        free = self.only(x_1, *x_1)
        return {m: f & (drawn[:, None] == (m == "image")) for m, f in free.items()}, drawn

    def training_step(self, x_1, index):
        """Lightning's hook: drawing and reading in one batch. Now and then pictures go without
        their captions and captions without their pictures: what guidance compares with."""
        free, drawn = self.task(x_1)
        if len(x_1) == 1 or torch.rand(()) >= self.hparams.drop:
            loss, accuracy = self.loss(x_1, free)
        else:
            a, b = (torch.stack(self.loss({m: x_1[m][rows]}, {m: free[m][rows]}))
                    for m, rows in (("image", drawn), ("text", ~drawn)))
            loss, accuracy = torch.lerp(b, a, drawn.float().mean())
        self.log_dict({"loss": loss, "accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, x_1, index):
        """Lightning's hook: drawing and reading of held-out rows, each batch at its own t, with
        the same noise every time."""
        t = (index % 10 + 0.5) / 10
        with torch.random.fork_rng():
            torch.manual_seed(index)
            for m in x_1:
                loss, accuracy = self.loss(x_1, self.only(x_1, m), t)
                for where in ("", f"_t{t:.2f}"):
                    self.log_dict({f"val_{m}_loss{where}": loss, f"val_{m}_acc{where}": accuracy},
                                  batch_size=len(x_1[m]), sync_dist=True)

    def configure_optimizers(self):
        """Muon for the matrices of `Blocks`, AdamW for all else; the learning rate rises over the
        first 5 % of the steps and falls as a cosine to 0. The words of a backbone begin to learn
        when `freeze` of the steps are done."""
        steps = self.trainer.estimated_stepping_batches     # resumed, a run may have more of them

        def rate(step):
            return min((step + 1) / (0.05 * steps), (1 + math.cos(math.pi * step / steps)) / 2)

        def late(step):
            return rate(step) * (step >= self.hparams.freeze * steps)

        trunk, words, matrices = self.net.trunk, [], []
        if self.hparams.backbone:
            words = [*dict.fromkeys([trunk.embedding.weight, *trunk.head.parameters()])]
        else:
            matrices = [p for p in trunk.parameters() if p.ndim == 2]
        others = [p for p in self.parameters() if all(p is not q for q in words + matrices)]
        groups = [{"params": p, "matrices": p is matrices} for p in (others, words, matrices)]
        optimizer = Muon(groups, self.hparams.lr, betas=(0.9, 0.98),
                         weight_decay=self.hparams.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [rate, late, rate])
        return {"optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- sampling: start from noise; predict, step, predict again

    def predict(self, x, free, guidance=1.):
        """Logits of p(x₁ | x_t) at g = guidance: u + g (c − u) for every modality to be filled,
        where u sees this modality only. g = 1 is off. ValueError: there is no other modality."""
        c = self.net(x, free)
        if guidance == 1:
            return c
        if len(x) == 1:
            raise ValueError("guidance needs another modality to leave out")
        alone = {m: self.net({m: x[m]}, {m: free[m]})[m] for m in x if free[m].any()}
        return {m: u + guidance * (c[m] - u) for m, u in alone.items()}

    @staticmethod
    def times(t, steps):
        """t < … < 1, steps + 1 of them."""
        return torch.linspace(t, 1, steps + 1).tolist()

    def moving(self, x, free):
        """Free positions and, in a modality that has some, all others but questions."""
        given = {m: x_m.masked_fill(free[m], -1) for m, x_m in x.items()}
        beside = self.only(given, *(m for m in x if free[m].any()))
        return {m: free[m] | beside[m] for m in x}

    @torch.no_grad()
    def generate(self, x, free, *, x_t=None, start=0., steps=8, step="race", eta=0.,
                 guidance=1., temperature=1.):
        """Fills the free positions of x: yields every state from noise to the answer, steps + 1.

        Of a modality that is given in part, the given tokens move, too, towards what they are: as
        noisy as the rest, which is all that training has shown. So parts need no training of
        their own. Questions stand still.

        x_t, start: the state to begin with and its time. Without a state it is x with the noise
        of that time, and x is a draft where it is free; at 0 it does not matter what it holds.
        step: an entry of STEPS; eta: share of tokens that every step draws anew from p_s instead,
        a corrector; guidance: see `predict`; temperature: of x₁ ~ p(x₁ | x_t), 0 takes the
        likeliest. ValueError: steps < 1."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        moving = self.moving(x, free)
        x_t = self.noisy(x, moving, start) if x_t is None else x_t      # 1. x_t, at first noise
        yield x_t
        for t, s in itertools.pairwise(self.times(start, steps)):
            p_1t, x_t = self.predict(x_t, moving, guidance), dict(x_t)  # 2. what will it be?
            for m, l in p_1t.items():
                x_1 = torch.where(free[m], guess(l, temperature), x[m])     # 3. x₁ ~ p(x₁ | x_t)
                x_s = (STEPS[step] if s < 1 else finish)(self.paths[m], x_t[m], x_1, t, s)
                if eta and s < 1:
                    anew = torch.rand(x_s.shape, device=x_s.device) < eta
                    x_s = torch.where(anew, renoise(self.paths[m], x_s, x_1, t, s), x_s)
                x_t[m] = torch.where(moving[m], x_s, x_t[m])                # 4. a step towards it
            yield x_t

    @torch.no_grad()
    def agreement(self, x):
        """log p(text | picture) by the model's own reading, in one call: {name: (B, N)} -> (B,)"""
        free = self.only(x, "text")
        l = self.net(self.noisy(x, free, 0.), free)["text"].log_softmax(-1)
        return (at(l, x["text"])[..., 0] * free["text"]).sum(1)

    def best(self, x, n):
        """Of every n rows the one that agrees best: {name: (B·n, N)} -> indices (B,)"""
        score = self.agreement(x).view(-1, n)
        return score.argmax(1) + n * torch.arange(len(score), device=score.device)

    def blank(self, n, **given):
        """x and free of n rows: tokens (n, N) of the given modalities, free where they are −1;
        all others are free altogether."""
        x = {m: given.get(m, torch.full((n, N), -1)).to(self.device)
             for m, N in self.lengths.items()}
        return {m: x_m.clamp(min=0) for m, x_m in x.items()}, {m: x_m < 0 for m, x_m in x.items()}

    def fill(self, options, rows=500, best_of=1, **given):
        """The last state of `generate`, `rows` at a time, the best of some: tokens {name: (B, N)},
        −1 where free."""
        parts = []
        for i in range(0, len(next(iter(given.values()))), rows):
            some = {m: x[i:i + rows].repeat_interleave(best_of, 0) for m, x in given.items()}
            n = len(next(iter(some.values())))
            *_, x = self.generate(*self.blank(n, **some), **options)
            parts.append(take(x, self.best(x, best_of)) if best_of > 1 else x)
        return {m: torch.cat([x[m] for x in parts]) for m in parts[0]}

    def complete(self, text):
        """Words that are missing (−1), by what the model knows of words alone, when there is no
        picture yet: (B, N) long -> (B, N) long."""
        x, free = {"text": text.clamp(min=0).to(self.device)}, {"text": (text < 0).to(self.device)}
        chance = self.GAPS | dict(temperature=1.)
        *_, x = self.generate(x, free, **chance) if free["text"].any() else [x]
        return x["text"]

    def draw(self, texts, **options):
        """Pictures of B captions: list of B strings -> (B, C, size, size) in [0, 1]."""
        x = self.fill(self.DRAW | options, text=self.complete(self.words.encode(texts)))
        return self.patches.decode(x["image"])

    def read(self, tokens, asked=None, **options):
        """Captions of B pictures, given as tokens (B, I), or what is `asked` about them with the
        answers: list of B strings -> list of B strings."""
        given = {"text": self.words.encode(asked)} if asked else {}
        return self.words.decode(self.fill(self.READ | options, image=tokens, **given)["text"])

    def write(self, texts, **options):
        """Fills the blanks of B texts: list of B strings -> list of B strings."""
        return self.words.decode(self.fill(self.WRITE | options,
                                           text=self.words.encode(texts))["text"])

    @classmethod
    def open(cls, path=None):
        """The model of a checkpoint, by default the newest under runs/, ready to sample, on the
        GPU if there is one. InputError: none there, damaged, or of something else."""
        found = sorted(pathlib.Path("runs").glob("*/*.ckpt"), key=lambda p: p.stat().st_mtime)
        if path is None and not found:
            raise InputError("no checkpoint under runs/; train one first: python train.py")
        path = pathlib.Path(path or found[-1])
        if not path.is_file():
            raise InputError(f"there is no checkpoint {path}; train one first: python train.py")
        try:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = cls.load_from_checkpoint(path, map_location=device, weights_only=True)
        except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, KeyError, TypeError,
                ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged, or no checkpoint of this version of fudoki") \
                from error
        model.source = path
        return model.eval()


# ------------------------------------------------------------------------ 6. the command line

class Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors, and which knows the nearest flag."""

    def parse_args(self, args=None, namespace=None):
        """The namespace. InputError: an unknown flag or a wrong value."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [f for a in self._actions for f in a.option_strings if f.startswith("--")]
            raise InputError(f"unknown argument {unknown[0]}; {nearest(unknown[0], flags)}")
        return found

    def error(self, message):
        raise InputError(message)


def command(main):
    """main(argv) -> exit code: 0, 2 after the one line of an InputError, 130 after Ctrl-C."""
    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
            return 0
        except InputError as error:
            print(f"{pathlib.Path(sys.modules[main.__module__].__file__).name}: {error}",
                  file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return wrapped
