"""Digits that are rendered with a font (`--preset smoke`), and the judge by which the report of
drawn digits is made: what invents data and what measures stands here, training in train.py."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from sample import defaults, draw, read
from train import Digits, captions, questions   # a kind of data of fudoki

SIZE = 28                           # side of a rendered digit in pixels


def rendered(count, seed):
    """Digits of Pillow's font, randomly thick, sheared, scaled and a little bent: images
    (count, 1, 28, 28) in [0, 1] and digits (count,)."""
    def glyph(digit, stroke):
        picture = Image.new("L", (84, 84))
        ImageDraw.Draw(picture).text((42, 42), str(digit), 255, ImageFont.load_default(58), "mm",
                                     stroke_width=stroke)
        return torch.from_numpy(np.array(picture)).float() / 255

    g = torch.Generator().manual_seed(seed)
    bank = torch.stack([glyph(digit, stroke) for digit in range(10) for stroke in (0, 1, 3)])
    digits = torch.randint(10, (count,), generator=g)
    glyphs = bank[3 * digits + torch.randint(3, (count,), generator=g)][:, None]

    # an affine map and a smooth field of small shifts
    mean, spread = torch.tensor([[0., .04], [.2, .2], [.8, .03], [.8, .03]]).T[..., None]
    spin, shear, wide, tall = mean + spread * torch.randn(4, count, generator=g)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, :2] = torch.stack([wide, shear + spin], 1)
    theta[:, 1, :2] = torch.stack([-spin, tall], 1)
    bend = 0.02 * torch.randn(count, 2, 4, 4, generator=g)
    bend = F.interpolate(bend, (SIZE, SIZE), mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(theta, (count, 1, SIZE, SIZE), align_corners=False) + bend
    return F.grid_sample(glyphs, grid, align_corners=False).clamp(0, 1), digits


# ------------------------------------------------------------------------------------ measures

class Judge(nn.Module):
    """A small CNN that has seen real digits only, and tells what a drawn one shows."""
    STEPS = 150                     # of its training, at least

    def __init__(self, size=SIZE):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def fit(self, images, digits):
        """Learns real digits, moved by up to two pixels: three epochs, at least STEPS steps."""
        steps = max(self.STEPS, 3 * len(images) // 128)
        optimizer = torch.optim.AdamW(self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        for rows in torch.randint(len(images), (steps, 128)):
            moved = images[rows].roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
            loss = F.cross_entropy(self.head(self.body(moved)), digits[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self

    @torch.no_grad()
    def forward(self, images):
        """Features (B, 64) and digits (B,) of pictures (B, 1, size, size)."""
        features = torch.cat([self.body(some) for some in images.split(1000)])
        return features, self.head(features).argmax(-1)


def frechet(a, b):
    """|μ_a − μ_b|² + tr(A + B − 2(AB)^½): the distance of two Gaussians, fitted to (N, D) each;
    not a number for fewer than two rows."""
    if min(len(a), len(b)) < 2:
        return math.nan
    A, B = torch.cov(a.T.double()), torch.cov(b.T.double())
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum()
    return (shift + A.trace() + B.trace() - 2 * root).item()


def frechet_of_parts(a, n):
    """Fréchet distance of n rows of (N, D) to the others, the mean over rows 1 to n, n + 1 to 2n
    and so on: what n drawings would have if they were real."""
    parts = [(a[i:i + n], torch.cat([a[:i], a[i + n:]])) for i in range(0, len(a) - n + 1, n)]
    return sum(frechet(*part) for part in parts) / max(1, len(parts))


def right(texts, truth):
    """The shares of captions of which the digit, the last word, is right, and which are whole."""
    pairs = [(text.split(), true.split()) for text, true in zip(texts, truth)]
    return dict(digit=sum(a[-1:] == b[-1:] for a, b in pairs) / len(pairs),
                caption=sum(a == b for a, b in pairs) / len(pairs))


def answers(model, image, truth):
    """The shares of questions about the digit, and of all, that are answered right; image: tokens
    (B, I), truth: their captions."""
    shares = []
    for texts in zip(*map(questions, truth)):
        asked = [text.rpartition(" ")[0] + " ___" for text in texts]
        shares.append(right(read(model, image, asked), texts)["digit"])
    return dict(digit=shares[0], caption=sum(shares) / len(shares))


class Rendered(Digits):
    """Digits rendered with a font, for half a minute: does it run?"""
    preset = Digits.preset | dict(
        codes=128, patch=7, width=64, depth=2, heads=2, steps=500, ema=0.98, val_every=250,
        train_images=4000, test_images=1000, drawings=200, threads=1)
    origin, rendered = "digits rendered with a font", staticmethod(rendered)

    def load(self, run):
        """Those for testing have odd seeds, so that no training has seen them."""
        if run.data_dir:                    # digits of one's own, for as small a model
            return super().load(run)
        return (rendered(min(20_000, run.train_images), 2 * run.seed),
                rendered(run.test_images, 2 * run.seed + 1))

    def report(self, model, run, options):
        """Draws the captions of some test images and reads all of them: yields (what, {column:
        number}). The Fréchet distance is that to the decoded *other* test images, for the drawings
        and for as many real ones."""
        order, n = torch.randperm(len(self.test[0])), run.drawings  # MNIST's are sorted by writer
        images, digits = (part[order] for part in self.test)
        judge = Judge(images.shape[-1]).fit(*self.train)
        yield "judge, test images", dict(digit=(judge(images)[1] == digits).float().mean().item())

        rows, truth = self.rows(model, images, digits)
        tokens = rows["image"].to(model.device)
        decoded = model.tokens["image"].decode(tokens).cpu()
        real, seen = judge(decoded)
        yield "ceiling, decoded test images", right(captions(decoded, seen), truth) | dict(
            frechet=frechet_of_parts(real, n))

        options = dict(step="race") | defaults(model, "draw") | options
        drawn = draw(model, truth[:n], **options).cpu()
        features, seen = judge(drawn)
        how = "drawing, {steps} {0} steps, g {guidance:g}, T {temperature:g}".format(
            options.get("velocity") or options["step"], **options)
        yield how, right(captions(drawn, seen), truth[:n]) | dict(
            frechet=frechet(features, real[n:]))

        yield (f"reading, steps {defaults(model, 'read')['steps']}, greedy",
               right(read(model, tokens), truth))
        if self.ask:
            yield "answers, digit and all, greedy", answers(model, tokens, truth)
