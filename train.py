"""Trains a model, shows what it learns, and measures what it can do:

    python train.py                             tokenised MNIST with captions (--preset toy)
    python train.py --preset smoke              rendered digits, half a minute: does it run?
    python train.py --preset scenes             invented scenes of coloured shapes, and questions
    python train.py --data FOLDER               your pictures, their captions in metadata.csv
    python train.py --preset text --text FILE   a text, character by character
    python train.py --preset ar --text FILE     a text, from a pretrained language model
    python train.py --preset ar                 the toy, from a pretrained language model
    python train.py score                       the report of the newest checkpoint once more,
                                                with any options of generation: score --help

Pictures with captions are learned in both directions, drawing and reading; texts are written,
continued and completed. What it writes is in runs/<preset>/: model.ckpt, samples/, report.csv
and the log of every run.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # threads that wait do not spin

import argparse
import collections
import csv
import functools
import gzip
import inspect
import io
import itertools
import json
import logging
import math
import pathlib
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import typing
import unicodedata
import warnings
import zlib

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import TQDMProgressBar, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import MNIST
from torchvision.utils import save_image
from tqdm import tqdm

from fudoki import LOSSES, PATHS, SCHEDULES, TRUNKS, Fudoki, Patches, Text
from sample import (GAPS, SEED, WRITE, InputError, add_generation, command, defaults, draw, file,
                    first_line, generation, middle_square, named, number, open_model,
                    opened, open_picture, read, write)

PRESETS = {         # what they cost and reach: tests/bench/*.csv, README
    "toy": dict(
        codes=256, patch=4, path="metric", trunk="blocks", width=96, depth=4, heads=3,
        loss="cross_entropy", lr=6e-3, lr_new=3e-3, weight_decay=0.01, t_power=3.0, share=0.5,
        drop=0.1, ask=0.15, batch=64, steps=2500, max_minutes=math.inf, ema=0.999, val_every=200,
        train_images=60_000, test_images=10_000, drawings=1000, threads=0, seed=0, data="",
        image_size=64, anywhere=False, text="", length=128, backbone="", shift=True, freeze=0.0,
        checkpoint_blocks=False),
    "smoke": dict(
        codes=128, patch=7, width=64, depth=2, heads=2, steps=500, ema=0.98, val_every=250,
        train_images=4000, test_images=1000, drawings=200, threads=1),
    "scenes": dict(patch=8, t_power=1.0, share=0.7, ask=0.3, steps=20_000, test_images=1000),
    "folder": dict(batch=32),
    "text": dict(width=128, heads=4, batch=32, t_power=1.0, steps=1600, test_images=200,
                 drawings=32),
    "ar": dict(backbone="HuggingFaceTB/SmolLM2-135M", lr=3e-4, batch=16, length=256, steps=5000),
}
TRAINER = dict(accelerator="auto", devices="auto", num_nodes=1, strategy="auto", precision="auto",
               accumulate_grad_batches=1)
CHOICES = dict(path=PATHS, trunk=TRUNKS, loss=LOSSES, schedule=SCHEDULES)
LIMITS = dict(batch=(2,), share=(0.01, 0.99), drop=(0, 1), ask=(0, 0.99), freeze=(0, 0.99),
              t_power=(0.01,), max_minutes=(1e-3,), ema=(0, 1), threads=(0, 1024), seed=SEED,
              codes=(2,), exponent=(0.01, 16), train_images=(20,), test_images=(20,))
OF_A_RUN = {*TRAINER, "preset", "resume", "steps", "max_minutes", "val_every", "drawings", "seed",
            "threads", "test_images", "data_dir", "data", "text",
            "checkpoint_blocks"}        # the rest is of the model
HELP = dict(
    codes="size of the codebook of patches", patch="side of a patch in pixels",
    path="from noise to data", exponent="of the distance; FUDOKI 4, URSA 2",
    normalize="L2-normalise the embeddings", schedule="how fast β grows",
    trunk="of the network", width="of the trunk", depth="its blocks", heads="of its attention",
    loss="of a position", lr="peak learning rate",
    lr_new="of inputs and heads that are new beside a backbone", weight_decay="of Muon and AdamW",
    t_power="noise levels of training are t = u^power, u uniform: above 1 more of them are early",
    share="of a batch that is drawn, the rest is read",
    drop="how often pictures and captions go without each other, for guidance",
    ask="share of digits with a question and its answer instead of a caption; not with a "
    "backbone; captions of a folder may hold questions of their own: what colour? red",
    batch="rows per step, on every device",
    steps="training steps", max_minutes="minutes after which training ends early, wherever the "
    "learning rate is by then", ema="decay of the averaged weights",
    val_every="steps between validations, sample grids and checkpoints",
    train_images="training images used", test_images="test images, or windows of held-out text, "
    "read in the report", drawings="images drawn, or windows of text written, in the report",
    threads="of the CPU; 0 leaves it to PyTorch, 1 is faster for very small models",
    seed="of everything random",
    data="a folder of pictures with a metadata.csv or .jsonl: the columns file_name and text",
    image_size="of those pictures, in pixels",
    anywhere="scenes have things of two sizes anywhere, not of one size on cells of 8 pixels",
    text="a file to learn, UTF-8; between its documents stands <|endoftext|>; presets text and ar",
    length="tokens of its windows",
    backbone="a folder, a name on the Hugging Face hub or a .gguf file: the causal language model "
    "to start from",
    shift="predict token i from the backbone's state of token i − 1, as it learned to",
    freeze="share of the training in which the backbone's words are kept as they are",
    checkpoint_blocks="compute the backbone's blocks twice instead of remembering them: less "
    "memory")
SIZE = 28           # side of a picture in pixels
RUNS = pathlib.Path("runs")


def options_of(path):
    """{name: default} of what a path may be told beside its embedding and frequency."""
    known = inspect.signature(PATHS[path]).parameters.items()
    return {k: p.default for k, p in known if k not in ("embedding", "frequency")}


def add_flag(parser, name, default, note):
    """A flag for a setting, of the type of its default, within LIMITS or CHOICES."""
    kind, how = type(default), {}
    if kind is bool:
        how["action"] = argparse.BooleanOptionalAction
    elif name in CHOICES:
        how = named(CHOICES[name])
    elif kind in (int, float):
        how["type"] = number(kind, *LIMITS.get(name, (1,) if kind is int else (0,)))
    help = f"{HELP.get(name, '')} ({note})"
    parser.add_argument("--" + name.replace("_", "-"), **how, help=help)


def settings(path):
    """The settings with which a checkpoint was made, and the steps that it has had. InputError: it
    is not there, damaged, or does not say."""
    try:
        saved = opened(path)
        return saved["callbacks"]["Keep"]["run"], saved["global_step"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} does not say how it was trained") from error


def flags(argv):
    """The parser of all settings, and what paths may be told: {name: (default, path)}."""
    parser = argparse.ArgumentParser(description=__doc__, prog="train.py", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="default: toy, or folder for --data")
    parser.add_argument("--data-dir", help="a folder with MNIST, or digits in its format, "
                        "in <folder>/MNIST/raw; by default MNIST is downloaded to data/")
    parser.add_argument("--resume", action="store_true",
                        help="go on from runs/<preset>/model.ckpt, with all it was made with")
    for name, value in PRESETS["toy"].items():
        add_flag(parser, name, value, f"toy: {value}" if value != "" else "default: none")
    early = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    early.add_argument("--path", **named(PATHS))
    early.parse_known_args(argv)                # a path of one's own is known from here on, and
    options = {k: (v, name) for name in PATHS for k, v in options_of(name).items()}
    for name, (value, path) in options.items():
        add_flag(parser, name, value, f"of the path {path}: {value}")
    for name, value in TRAINER.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value),
                            help=f"of Lightning's Trainer (default: {value})")
    return parser, options


def parse(argv=None):
    """The settings of a run: the preset's, or those of the checkpoint to be resumed, overridden by
    flags. What the model was made with cannot be."""
    parser, options = flags(argv)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    given = {"preset": "folder" if "data" in given else "toy"} | given
    text, path = PRESETS["text"] if "text" in given else {}, RUNS / given["preset"] / "model.ckpt"
    if given["resume"] and not path.exists():
        raise InputError(f"nothing to go on from: there is no {path}")
    saved, done = settings(path) if given["resume"] else ({}, 0)
    run = argparse.Namespace(**{"data_dir": None} | TRAINER | PRESETS["toy"] | text
                             | PRESETS[given["preset"]] | saved | given)
    run.path_options = saved.get("path_options", {}) | {k: given[k] for k in options if k in given}
    run.done = done                                 # steps
    for name in set(run.path_options) - set(options_of(run.path)):
        parser.error(f"--{name} is no option of --path {run.path}")
    was = saved | options_of(run.path) | saved.get("path_options", {})
    for name in given.keys() - OF_A_RUN if saved else ():
        if given[name] != was[name]:
            parser.error(f"--{name.replace('_', '-')} {given[name]} contradicts {path}, which has "
                         f"{was[name]}; leave it out, or train anew without --resume")
    side = FIELD if run.preset == "scenes" else run.image_size if run.data else SIZE
    run.size = saved.get("size", side)
    if run.size % run.patch and (run.data or not run.data_dir):     # of those, the files will tell
        parser.error(f"--patch {run.patch} does not divide the picture's side, {run.size}")
    if not run.backbone and run.width % (4 * run.heads):
        parser.error(f"--width {run.width} is no multiple of 4·heads = {4 * run.heads}")
    if run.text and (run.data or run.preset not in ("text", "ar")):
        parser.error("--text goes with --preset text or --preset ar, and without --data")
    if run.backbone and run.path == "mask":
        parser.error("--path mask needs a token that the backbone does not have")
    if run.checkpoint_blocks and not run.backbone:
        parser.error("--checkpoint-blocks goes with a --backbone")
    return run


# ------------------------------------------------------------------------- digits with captions

DIGITS = "zero one two three four five six seven eight nine".split()
WEIGHTS, SLANTS = ("thin", "bold"), ("upright", "slanted")
BOLD, SLANTED = 0.13, 0.25          # mean pixel; tangent of the slant, 14 degrees


def captions(images, digits):
    """What pictures (B, 1, H, W) of digits (B,) show, by rule: bold if the mean pixel is above
    BOLD; slanted if −μ_xy/μ_yy, by the ink's second moments, is above SLANTED. -> B strings"""
    ink = images[:, 0]
    y, x = torch.meshgrid(*(torch.arange(float(n)) for n in ink.shape[1:]), indexing="ij")
    mass = ink.sum((1, 2)).clamp(min=1e-6)
    x = x - ((ink * x).sum((1, 2)) / mass)[:, None, None]
    y = y - ((ink * y).sum((1, 2)) / mass)[:, None, None]
    slant = -(ink * x * y).sum((1, 2)) / (ink * y * y).sum((1, 2)).clamp(min=1e-6)
    rows = zip((ink.mean((1, 2)) > BOLD).tolist(), (slant > SLANTED).tolist(), digits.tolist())
    return [f"a {WEIGHTS[bold]} {SLANTS[slanted]} {DIGITS[d]}" for bold, slanted, d in rows]


def questions(caption):
    """What may be asked about a picture of this caption, with the answer: three."""
    digit = caption.split()[-1]
    return [f"what digit? {digit}", *(
        f"is {word}? {'yes' if word in caption else 'no'}" for word in ("bold", "slanted"))]


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
    mean, spread = torch.tensor([[0., .04], [.2, .2], [.8, .03], [.8, .03]]).T[..., None]
    spin, shear, wide, tall = mean + spread * torch.randn(4, count, generator=g)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, :2] = torch.stack([wide, shear + spin], 1)
    theta[:, 1, :2] = torch.stack([-spin, tall], 1)
    bend = 0.02 * torch.randn(count, 2, 4, 4, generator=g)
    bend = F.interpolate(bend, (SIZE, SIZE), mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(theta, (count, 1, SIZE, SIZE), align_corners=False) + bend
    return F.grid_sample(glyphs, grid, align_corners=False).clamp(0, 1), digits


def read_idx(folder, name):
    """One of MNIST's four files, gzipped or not: its path and its numbers. InputError: it is not
    there, or not whole."""
    path = min(folder.glob(f"*{name}?idx*"), default=None)
    if not path:
        raise InputError(f"{folder} has no {name}-idx… file; all four of MNIST's are needed")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        if data[:3] != b"\0\0\x08":
            raise ValueError(f"it begins with {data[:9]!r}, not as a file of MNIST's format does")
        shape = np.frombuffer(data, ">u4", data[3], offset=4).tolist()
        return path, torch.frombuffer(bytearray(data), dtype=torch.uint8,
                                      offset=4 + 4 * data[3]).view(shape)
    except (OSError, EOFError, IndexError, ValueError, RuntimeError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def read_digits(folder, name, patch):
    """Pictures (N, 1, size, size) in [0, 1] of any size, and digits (N,). InputError: they are not
    that, or do not belong together."""
    (path, images), (beside, digits) = (
        read_idx(folder, f"{name}-{what}") for what in ("images", "labels"))
    side, wrong = images.shape[-1], None
    if images.ndim != 3 or images.shape[1] != side or side < 4 or side % patch:
        wrong = (f"{path} has pictures of {'×'.join(map(str, images.shape[1:]))}; they have to be "
                 f"squares which --patch {patch} divides")
    elif digits.shape != images.shape[:1] or len(digits) < 20:
        wrong = f"{beside} has {len(digits)} labels for {len(images)} pictures; at least 20 of " \
                "each are needed"
    elif digits.max() > 9:
        wrong = f"{beside} has the label {digits.max()}; known are 0 to 9"
    if wrong:
        raise InputError(wrong)
    return images[:, None] / 255, digits.long()


def load_digits(run):
    """(images, digits) for training and for testing, and where they are from. Nothing is written
    into a folder that has some. InputError: they are not as they have to be. Without a network:
    rendered digits, said loudly."""
    folder = pathlib.Path(run.data_dir or "data")
    made, origin = run.preset == "smoke" and not run.data_dir, "digits rendered with a font"
    if not (made or run.data_dir or any(folder.glob("MNIST/raw/*"))):
        try:
            with tempfile.TemporaryDirectory() as new:
                MNIST(new, download=True)
                shutil.copytree(new, folder, dirs_exist_ok=True)
        except (OSError, RuntimeError):
            print("MNIST CANNOT BE DOWNLOADED: training on digits rendered with a font instead. "
                  "Nothing below is about MNIST. --data-dir FOLDER uses a copy.", flush=True)
            made, origin = True, origin + ", since MNIST could not be downloaded"
    if made:                            # odd seeds are for testing, whatever a resumed run's is
        train = rendered(min(20_000, run.train_images), 2 * run.seed)
        test = rendered(run.test_images, 2 * run.seed + 1)
    else:
        origin = f"the digits in {folder.resolve().name}" if run.data_dir else "MNIST"
        folder = next((f for f in (folder / "MNIST/raw", folder / "raw", folder)
                       if any(f.glob("*idx*"))), folder / "MNIST/raw")
        train, test = (read_digits(folder, name, run.patch) for name in ("train", "t10k"))
        if train[0].shape[1:] != test[0].shape[1:]:
            raise InputError(f"{folder}: the pictures of train and t10k have different sizes")
        run.size, was = train[0].shape[-1], run.size
        if run.resume and run.size != was:
            raise InputError(f"{folder} has pictures of {run.size}×{run.size}; the model to go on "
                             f"with has seen {was}×{was}")
    return (tuple(part[:run.train_images] for part in train),
            tuple(part[:run.test_images] for part in test), origin)


# ------------------------------------------------------------------------- scenes with captions

SHAPES = "circle square triangle diamond star".split()
COLOURS = dict(red=(1, .1, .1), green=(.1, .8, .1), blue=(.2, .3, 1), yellow=(1, .9, .1),
               purple=(.7, .2, .9), white=(1, 1, 1))
NUMBERS = "none one two three four".split()
SIDES = "left of", "right of", "above", "below"
ABILITIES = "single two counting colours position attribution".split()      # those of GenEval
HARD = ["position"] * 4 + ["counting", "attribution"]       # more scenes, and questions, are these
UNSEEN = re.compile("red circle|green square|blue triangle|yellow diamond|purple star|two stars|"
                    "three triangles|four circles|circle .*star|star .*circle|square .*diamond|"
                    "diamond .*square")         # of captions that are kept from training
FIELD, RASTER = 32, 4               # side of a scene and distance of possible places, in pixels


class Thing(typing.NamedTuple):
    """An object of a scene: row and column of its corner, and its side, in pixels."""
    shape: str
    colour: str
    row: int
    column: int
    side: int

    def is_beside(self, other):
        """On which side of the other it is, if that is true of one more than of all others."""
        dy, dx = (a + self.side / 2 - b - other.side / 2 for a, b in zip(self[2:4], other[2:4]))
        if abs(dx) != abs(dy):
            return SIDES[(dx > 0) if abs(dx) > abs(dy) else 2 + (dy > 0)]


@functools.cache
def stencil(shape, side):
    """What a shape covers of its square: (side, side) bool. The last row and column stay free, so
    that neighbours do not touch."""
    r = side / 2 - 1
    y, x = np.mgrid[:side, :side] - r
    inside = {"circle": x ** 2 + y ** 2 <= (r + 0.3) ** 2, "diamond": abs(x) + abs(y) <= r,
              "square": x == x, "triangle": 2 * abs(x) <= y + r,
              "star": x * y * (abs(x) - abs(y)) == 0}[shape]
    return inside & (np.maximum(abs(x), abs(y)) <= r)


def render(things, size=FIELD):
    """A picture (3, size, size) in [0, 1] of things, on black."""
    picture = np.zeros((size, size, 3), np.float32)
    for shape, colour, y, x, side in things:
        picture[y:y + side, x:x + side][stencil(shape, side)] = COLOURS[colour]
    return torch.from_numpy(picture).permute(2, 0, 1)


def see(pictures):
    """The things that pictures (B, 3, FIELD, FIELD) show, each drawn exactly; None for one which
    they do not make up altogether: -> list of B lists"""
    found, edge = [[] for _ in pictures], (1, 0, 1, 0)      # free, too: a thing is no part of one
    for side in (8, 12):
        ideal = [Thing(shape, colour, 0, 0, side) for shape in SHAPES for colour in COLOURS]
        bank = torch.stack([F.pad(render([thing], side), edge).flatten() for thing in ideal])
        windows = F.unfold(F.pad(pictures, edge), side + 1, stride=RASTER).mT   # (B, n², …)
        n = (FIELD - side) // RASTER + 1
        for b, place, kind in (torch.cdist(windows, bank) < 0.1).nonzero().tolist():
            row, column = (RASTER * i for i in divmod(place, n))
            found[b].append(ideal[kind]._replace(row=row, column=column))
    return [things if (render(things) - picture).abs().max() < 0.02 else None
            for things, picture in zip(found, pictures)]


def described(things):
    """The captions that are true of things, exactly what they say and nothing else, by ability:
    {ability: list of strings}"""
    names = [f"a {thing.shape}" for thing in things]
    full = [f"a {thing.colour} {thing.shape}" for thing in things]
    if len(things) == 1:
        return {"single": names, "colours": full}
    if len({*names}) == 1:
        n = NUMBERS[len(things)] if len(things) < len(NUMBERS) else "many"
        return {"counting": [f"{n} {things[0].shape}s"]}
    if len(things) != 2:
        return {}
    said = {"two": [" and ".join(pair) for pair in itertools.permutations(names)],
            "attribution": [" and ".join(pair) for pair in itertools.permutations(full)]}
    (a, b), (name, other) = things, names
    if a.is_beside(b):
        said["position"] = [f"{name} {a.is_beside(b)} {other}", f"{other} {b.is_beside(a)} {name}"]
    return said


def is_true(caption, things):
    """GenEval's rule: what is said is there, and nothing else."""
    return things is not None and any(caption in some for some in described(things).values())


def questions_of(things):
    """Questions about things with their answers: {kind: list of strings}"""
    count = collections.Counter(thing.shape for thing in things)
    alone, there = [a for a in things if count[a.shape] == 1], {thing[:2] for thing in things}
    beside = {(a.is_beside(b), b.shape): a.shape for a, b in itertools.permutations(alone, 2)}
    return {
        "colour": [f"what colour is the {a.shape}? {a.colour}" for a in alone],
        "count": [f"how many {shape}s? {NUMBERS[count[shape]]}" for shape in SHAPES],
        "position": [f"what is {side} the {a.shape}? {beside.get((side, a.shape), 'nothing')}"
                     for a in alone for side in SIDES],
        "presence": [f"is there a {colour} {shape}? {'yes' if (shape, colour) in there else 'no'}"
                     for shape in SHAPES for colour in COLOURS]}


def invent(rng, ability, anywhere):
    """Things of one of the abilities, and a caption: on cells of 8 pixels, or, of two sizes,
    `anywhere` on the raster."""
    n = {"single": 1, "colours": 1, "counting": rng.randint(2, 4)}.get(ability, 2)
    shapes = [rng.choice(SHAPES)] * n if ability == "counting" else rng.sample(SHAPES, n)
    while True:
        things = []
        for shape in shapes:
            side, grid = (rng.choice((8, 12)), RASTER) if anywhere else (8, 8)
            row, column = (grid * rng.randint(0, (FIELD - side) // grid) for _ in range(2))
            things.append(Thing(shape, rng.choice(list(COLOURS)), row, column, side))
        apart = all(2 * max(abs(a[i] + a.side / 2 - b[i] - b.side / 2) for i in (2, 3))
                    >= a.side + b.side for a, b in itertools.combinations(things, 2))
        if apart and (captions := described(things).get(ability)):
            return things, rng.choice(captions)


# ------------------------------------------------------------------------------------ the measures

class Judge(nn.Module):
    """A small CNN that has seen real digits only, and tells what a drawn one shows."""

    def __init__(self, size=SIZE):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def fit(self, images, digits):
        """Learns real digits, moved by up to two pixels: three epochs, at least 150 steps."""
        steps = max(150, 3 * len(images) // 128)
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
    """|μ_a − μ_b|² + tr(A + B − 2(AB)^½): the distance of two Gaussians, fitted to (N, D) each."""
    if min(len(a), len(b)) < 2:
        return math.nan
    A, B = torch.cov(a.T.double()), torch.cov(b.T.double())
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum()
    return (shift + A.trace() + B.trace() - 2 * root).item()


def of_parts(a, n):
    """Fréchet distance of n rows of (N, D) to the others, the mean over rows 1 to n, n + 1 to 2n
    and so on: what n drawings would have if they were real."""
    parts = [(a[i:i + n], torch.cat([a[:i], a[i + n:]])) for i in range(0, len(a) - n + 1, n)]
    return sum(frechet(*part) for part in parts) / max(1, len(parts))


def right(texts, truth):
    """The shares of texts with the right digit, and of those with every word right."""
    digit = sum(a.split()[-1:] == b.split()[-1:] for a, b in zip(texts, truth))
    whole = sum(a.split() == b.split() for a, b in zip(texts, truth))
    return digit / len(texts), whole / len(texts)


def bits(model, x_1, name):
    """Of rows of a modality, given the others, at most: −log₂ p̂ on average, by `Fudoki.bound` at
    the best time to stop; not a number for more than 1,024 tokens, each of which takes V²."""
    if len(model.tokens[name].embedding) > 1024:
        return math.nan
    x_1 = {m: x.to(model.device) for m, x in x_1.items()}
    return model.bound(x_1, model.mark_free(x_1, name), 8).mean(1).min().item() / math.log(2)


def same_words(texts, truth):
    """The shares of texts that are right altogether, and of the words of truth in their place."""
    whole = sum(a == b for a, b in zip(texts, truth)) / len(truth)
    words = [(x == y) for a, b in zip(texts, truth)
             for x, y in itertools.zip_longest(words_of(a), words_of(b)) if y is not None]
    return whole, sum(words) / max(1, len(words))


# A word has letters, digits and what is written above and below them; a letter of a script that
# is written without spaces is a word. A character is all that is written in one place.
TOGETHER = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORDS = pre_tokenizers.Split(
    Regex(rf"[{TOGETHER}]\p{{M}}*|[\w\p{{M}}&&[^{TOGETHER}]]+|[^\w\s\p{{M}}]+"), "removed", True)
CHARACTERS = pre_tokenizers.Split(Regex(r"\X"), "isolated")


def words_of(text):
    """The words of a text, in lower case."""
    return [word for word, _ in WORDS.pre_tokenize_str(text.lower())
            if any(map(str.isalnum, word))]


def tokenizer(texts, characters=False, eos=()):
    """A tokenizer, as JSON, of the words and punctuation marks of some texts, in lower case, or of
    their characters. What they do not have is an error; `eos` is another word, the last one."""
    made, split = Tokenizer(models.WordLevel()), WORDS
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made.decoder = decoders.Sequence([              # a space before a word that is not the first
        decoders.Replace(Regex(rf"^(?=[\w&&[^{TOGETHER}]])"), " "), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    if characters:
        split, made.normalizer, made.decoder = CHARACTERS, normalizers.NFC(), decoders.Fuse()
    made.pre_tokenizer = split
    words = {word for text in texts
             for word, _ in split.pre_tokenize_str(made.normalizer.normalize_str(text))}
    known = {word: i for i, word in enumerate([*sorted(words), *eos])}
    made.model = models.WordLevel(known, unk_token="<unknown>")
    return made.to_str()


# ---------------------------------------------------------- all data: digits, folders, long texts

def k_means(points, k, rounds=20):
    """At most k centres of points (N, D) by Lloyd's rounds -> (≤ k, D), no two alike. The first is
    0, the blank patch, and the blank points are its own; an empty centre starts again at random,
    and one that is empty at the end is left out."""
    points = torch.cat([points[points.abs().sum(-1) > 0], 0 * points[:1]])
    centres = points[torch.randint(len(points), (k,))]
    for _ in range(rounds + 1):
        centres[0] = 0
        nearest = torch.cat([torch.cdist(p, centres).argmin(-1) for p in points.split(8192)])
        count, used = torch.bincount(nearest, minlength=k)[:, None], centres
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        again = points[torch.randint(len(points), (k,))]
        centres = torch.where(count > 0, total / count.clamp(min=1), again)
    return used[(count[:, 0] > 0) | (torch.arange(k) == 0)]


class Rows(torch.utils.data.Dataset):
    """Tokens {name: (N, L)}; rows leave as one batch, without a loop. Windows of a stream may
    overlap: they are a view of it."""

    def __init__(self, **tokens):
        self.tokens = tokens

    def __len__(self):
        return len(next(iter(self.tokens.values())))

    def __getitems__(self, rows):
        return {m: tokens[rows] for m, tokens in self.tokens.items()}


def load_backbone(name, shift):
    """A pretrained model and tokenizer. -> options of `Fudoki`; of `Text` the tokenizer's JSON,
    its closing token and the embedding, of the ids that the tokenizer has; some models have more.
    InputError: it cannot be had."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as quiet
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    file, options = pathlib.Path(name), dict(trust_remote_code=False)
    if file.suffix == ".gguf":
        options["gguf_file"] = file.name
    place = file.parent if file.suffix == ".gguf" else name
    try:
        words = AutoTokenizer.from_pretrained(place, **options)
        model = AutoModelForCausalLM.from_pretrained(place, use_safetensors=True, dtype="float32",
                                                     **options)
        json = words.backend_tokenizer.to_str()
    except Exception as error:          # whatever these libraries and their files say
        raise InputError(f"the backbone {name} cannot be loaded; it has to be the folder of a "
                         "causal language model with safetensors and tokenizer.json, a .gguf file "
                         "or the name of one on the Hugging Face hub, which needs a network: "
                         + first_line(error)) from error
    n, eos = max(words.get_vocab().values()) + 1, words.eos_token_id
    if eos is None or n > len(model.get_input_embeddings().weight):
        raise InputError(f"the tokenizer of the backbone {name} has no token that ends a text, or "
                         "more tokens than its model")
    model.resize_token_embeddings(n)                    # no id is noise that no text has
    embedding = model.get_input_embeddings().weight.detach()
    bos = eos if words.bos_token_id is None else words.bos_token_id
    config = {k: v for k, v in model.config.to_dict().items() if k not in (
        "_name_or_path", "architectures", "transformers_version", "quantization_config")}
    options = dict(trunk="backbone", pretrained=model,
                   trunk_options=dict(config=config, bos=bos, shift=shift))
    return options, json, eos, F.normalize(embedding)


@torch.no_grad()
def check_backbone(name, trunk, model, n):
    """InputError unless a trunk that was made of a causal language model has the model's own
    logits when it looks back only, and is changed at each of n places by the last token."""
    words, logits = trunk.vocabulary
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    few, x, wrong = torch.arange(3)[None], torch.arange(n)[None] % len(words.weight), None
    try:
        back = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min).triu(1)
        h = trunk.body(inputs_embeds=words(few), attention_mask=back, position_ids=few,
                       use_cache=False).last_hidden_state
        own = model(few).logits
        if not torch.allclose(logits(h), own, rtol=1e-3, atol=1e-3 * own.std().item()):
            wrong = "its logits are others when its embeddings and its mask are given to it"
        elif n + 1 > limit:
            wrong = f"{n + 1} tokens are too many for it, it has {limit} positions"
        else:
            a, b = (trunk(words(torch.cat([x[:, :-1], few[:, i:i + 1]], 1)), None, None, None)
                    for i in (0, 1))
            if not (a != b).any(-1).all():
                wrong = "its mask cannot be taken away, what comes later changes nothing"
    except Exception as error:
        wrong = first_line(error)
    if wrong:
        raise InputError(f"the backbone {name} ({model.config.model_type}) cannot be made to look "
                         f"both ways: {wrong}")


def make(run, tokens, frequency, notes, **backbone):
    """A new model with the settings of a run. InputError: the data have one kind of token only,
    or the backbone is not fit for it."""
    for m, count in frequency.items():
        if (count > 0).sum() < 2:
            raise InputError(f"all {m} tokens of {notes['data']} are alike: there is nothing to "
                             "learn")
    trunk = {k: getattr(run, k) for k in ("width", "depth", "heads")}
    names = "path path_options loss lr lr_new weight_decay t_power share drop freeze".split()
    model = Fudoki(tokens, frequency, notes=notes, **dict(trunk=run.trunk, trunk_options=trunk)
                   | backbone | {k: getattr(run, k) for k in names})
    if backbone:
        check_backbone(run.backbone, model.net.trunk, backbone["pretrained"],
                       sum(kind.length for kind in model.tokens.values()))
    return model


class Pictures:
    """Data: pictures with captions; what a kind of them adds is `train`, `held_out` for validation
    and `test`, each pictures and labels, where they are from, `report`, `text` (the arguments of
    Text), `notes` and `examples`, captions drawn at every validation."""

    def build(self, run):
        """A new model whose codebook, words and schedules fit the data."""
        images, n = self.train[0], run.size // run.patch
        some = images[torch.randperm(len(images))[:max(1, 8000 * 49 // n ** 2)]]
        patches = F.unfold(some, run.patch, stride=run.patch).mT.flatten(0, 1)
        image = [self.codebook(patches, run.codes), run.patch, run.size, images.shape[1]]
        codes = Patches(*image).encode(some).flatten()
        frequency = {"image": torch.bincount(codes, minlength=len(image[0]))}
        options, text = {}, self.text
        if run.backbone:
            options, json, eos, embedding = load_backbone(run.backbone, run.shift)
            words = Text(json, math.inf, eos).encode(self.examples)
            text = [json, words.shape[1], eos, False, embedding]
            frequency["text"] = torch.bincount(words.flatten(), minlength=len(embedding))
        return make(run, dict(text=text, image=image), frequency, self.notes, **options)

    def codebook(self, patches, n):
        """At most n patches that stand for all: (N, D) -> (≤ n, D)"""
        return k_means(patches, n)

    def rows(self, model, images, labels):
        """Tokens of pictures and captions, and the captions."""
        image = model.tokens["image"].encode(images.to(model.device))
        texts = self.captions(model.tokens["image"].decode(image).cpu(), labels)
        return Rows(text=model.tokens["text"].encode(texts), image=image.cpu()), texts

    def tokens(self, model):
        """Training and validation rows."""
        some = (part[:1000] for part in self.held_out)
        return self.rows(model, *self.train)[0], self.rows(model, *some)[0]

    prompt = property(lambda self: self.examples[-3:][0])   # what to try first

    def sample(self, model, path):
        """Draws the examples: path.png."""
        save_image(draw(model, self.examples[:40]), path.with_suffix(".png"), nrow=10)


class Digits(Pictures):
    """MNIST, or digits rendered with a font, captioned by a rule."""
    captions = staticmethod(captions)
    examples = [f"a {a} {b} {c}" for a in WEIGHTS for b in SLANTS for c in DIGITS]

    def __init__(self, run):
        (images, digits), self.test, self.origin = load_digits(run)
        n = min(1000, len(images) // 10)
        self.train, self.held_out = (images[n:], digits[n:]), (images[:n], digits[:n])
        self.ask = 0. if run.backbone else run.ask
        asked = [text for caption in self.examples for text in questions(caption) if self.ask]
        self.text = [tokenizer(self.examples + asked), 4]
        self.notes = dict(data=self.origin, form="digit", captions=self.examples,
                          asks=self.ask > 0)

    def tokens(self, model):
        """Training and validation rows; in the share `ask` of training a question is asked."""
        training, held_out = super().tokens(model)
        picked = torch.randperm(len(training))[:int(len(training) * self.ask)]
        if len(picked):
            texts = model.tokens["text"].decode(training.tokens["text"][picked])
            training.tokens["text"][picked] = model.tokens["text"].encode(
                [random.choice(questions(text)) for text in texts])
        return training, held_out

    def report(self, model, run, options):
        """Draws the captions of some test images, reads all of them: the share of right digits
        and of captions, images per second, network calls, and the Fréchet distance to the decoded
        *other* test images, of the drawings and of as many decoded real ones. -> columns, rows"""
        order, n, nan = torch.randperm(len(self.test[0])), run.drawings, math.nan
        images, digits = (part[order] for part in self.test)        # MNIST's are sorted by writer
        judge = Judge(images.shape[-1]).fit(*self.train)
        rows, truth = self.rows(model, images, digits)
        tokens = rows.tokens["image"].to(model.device)
        decoded = model.tokens["image"].decode(tokens).cpu()
        real, real_digits = judge(decoded)
        options = dict(step="race") | defaults(model, "draw") | options
        started = time.time()
        drawn = draw(model, truth[:n], **options).cpu()
        middle = time.time()
        texts = read(model, tokens)
        end = time.time()
        features, drawn_digits = judge(drawn)
        calls = options["steps"] * (1 if options["guidance"] == 1 else 2)
        return ("digit", "caption", "frechet", "images_per_s", "calls"), [
            ("judge, test images", (judge(images)[1] == digits).float().mean().item(), nan, nan,
             nan, nan),
            ("ceiling, decoded test images", *right(captions(decoded, real_digits), truth),
             of_parts(real, n), nan, nan),
            ("drawing, {steps} {step} steps, g {guidance:g}, T {temperature:g}".format(**options),
             *right(captions(drawn, drawn_digits), truth[:n]),
             frechet(features, real[n:]), len(drawn) / (middle - started), calls),
            ("reading, steps 1, greedy", *right(texts, truth), nan, len(texts) / (end - middle),
             1),
            ("bits per picture, per caption, at most", *(
                bits(model, {m: x[:200] for m, x in rows.tokens.items()}, m)
                for m in ("image", "text")), nan, nan, nan),
            *self.answers(model, tokens, truth)]

    def answers(self, model, tokens, truth):
        """How many questions about the digit, and how many of all, are answered right. -> rows"""
        if not self.ask:
            return []
        right_ones = []
        for texts in zip(*map(questions, truth)):
            asked = [text.rpartition(" ")[0] + " ___" for text in texts]
            right_ones.append(right(read(model, tokens, asked), texts)[0])
        nan, all_three = math.nan, sum(right_ones) / len(right_ones)
        return [("answers, digit and all, greedy", right_ones[0], all_three, nan, nan, 1)]


class Scenes(Pictures):
    """Invented scenes, with captions that show six abilities, and questions."""
    captions = staticmethod(lambda images, texts: texts)

    def __init__(self, run):
        rng, self.anywhere = random.Random(run.seed), run.anywhere
        self.origin = "invented scenes"
        parts = [self.scenes(rng, n, ask) for n, ask in (
            (run.train_images, run.ask), (1000, run.ask), (run.test_images, 0))]
        self.train, self.held_out, self.test = parts
        texts = [text for _, some in parts for text in some]
        json = tokenizer(texts, eos=["<end>"])
        words = Text(json, math.inf)
        self.text = [json, max(len(words.ids(text)) for text in {*texts}) + 1,
                     len(words.embedding) - 1]
        self.examples = [text for some in self.prompts(rng, 5).values() for text in some]
        self.notes = dict(data=self.origin, form="square", captions=None, asks=run.ask > 0,
                          draw=dict(steps=32, late=2., guidance=1., temperature=1.), read=GAPS)

    def scenes(self, rng, n, ask):
        """n pictures with a caption that may be seen, or, in the share `ask`, a question."""
        pictures, texts = [], []
        while len(texts) < n:
            things, text = invent(rng, rng.choice(ABILITIES + HARD), self.anywhere)
            if not UNSEEN.search(text):
                pictures.append(render(things))
                texts.append(self.question(rng, things) if rng.random() < ask else text)
        return torch.stack(pictures), texts

    def question(self, rng, things, kind=None):
        """A question about things, of any kind, each answer as likely as the others."""
        known, by_answer = questions_of(things), collections.defaultdict(list)
        kinds = [kind for kind in [*known, *HARD] if known.get(kind)]
        for text in known[kind or rng.choice(kinds)]:
            by_answer[text.split()[-1]].append(text)
        return rng.choice(rng.choice([*by_answer.values()]))

    def prompts(self, rng, n, unseen=False):
        """n captions of every ability that has such: {ability: list of strings}"""
        found = {ability: [] for ability in ABILITIES[unseen:]}     # all single shapes are seen
        for ability, texts in found.items():
            while len(texts) < n:
                text = invent(rng, ability, self.anywhere)[1]
                texts += [text] * (bool(UNSEEN.search(text)) == unseen)
        return found

    def codebook(self, patches, n):
        """All patches there are: decoded scenes are exact."""
        return patches.unique(dim=0)

    def report(self, model, run, options):
        """How many drawings show exactly what is said, by ability, of captions as in training and
        of others, and if the best of eight is kept; how many captions that are read, and answers,
        are true; network calls per picture. -> columns, rows"""
        rng, n = random.Random(run.seed + 1), math.ceil(run.drawings / len(ABILITIES))
        options, nan, rows = defaults(model, "draw") | options, math.nan, {}
        calls = options["steps"] * (1 if options["guidance"] == 1 else 2)
        for unseen, best_of in ((False, 1), (True, 1), (False, 8)):
            texts = self.prompts(rng, n, unseen)
            drawn = see(draw(model, sum(texts.values(), []), best_of, **options).cpu())
            shares = {ability: sum(map(is_true, some, drawn[n * i:])) / n
                      for i, (ability, some) in enumerate(texts.items())}
            for ability in ABILITIES:
                rows.setdefault(ability, []).append(shares.get(ability, nan))
            rows.setdefault("mean", []).append(sum(shares.values()) / len(shares))
        tokens = self.rows(model, *self.test)[0].tokens
        things, image = see(self.test[0]), tokens["image"].to(model.device)
        true = sum(map(is_true, read(model, image), things)) / len(things)
        answers = []
        for kind in questions_of([]):
            some = [i for i, those in enumerate(things) if questions_of(those)[kind]]
            texts = [self.question(rng, things[i], kind) for i in some]
            open_ = [text.rpartition(" ")[0] + " ___" for text in texts]
            answers.append((f"answers, {kind}", right(read(model, image[some], open_), texts)[1]))
        steps = defaults(model, "read")["steps"]
        return ("seen", "unseen", "best of 8", "calls"), [
            *(("drawing, " + what, *shares, calls) for what, shares in rows.items()),
            ("reading, captions that are true", true, nan, nan, steps),
            *((what, share, nan, nan, steps) for what, share in answers),
            ("bits per picture, at most", bits(model, {m: x[:200] for m, x in tokens.items()},
                                               "image"), nan, nan, nan)]


class Folder(Pictures):
    """Pictures and captions of a user: a folder with a metadata.csv."""
    captions = staticmethod(lambda images, texts: texts)

    def __init__(self, run):
        images, texts, (a, b) = load_folder(run)
        self.test, self.held_out, self.train = (
            (images[rows], texts[rows]) for rows in (slice(a), slice(a, b), slice(b, None)))
        self.origin = f"the folder {pathlib.Path(run.data).resolve().name}"
        json = tokenizer(texts, eos=["<end>"])
        words = Text(json, math.inf)
        eos = len(words.embedding) - 1
        self.text = [json, max(len(words.ids(text)) for text in texts) + 1, eos]
        self.examples = list(dict.fromkeys(texts))
        self.notes = dict(data=self.origin, form="square", captions=None,
                          asks=any("?" in text for text in texts))

    def report(self, model, run, options):
        """How many captions of held-out pictures are read right, and what the model itself reads
        in its drawings of these captions."""
        rows, texts = self.rows(model, *self.test)
        truth, patches = model.tokens["text"].decode(rows.tokens["text"]), model.tokens["image"]
        started = time.time()
        asked = ["".join(text.rpartition("?")[:2]) + " ___" for text in texts]
        texts_read = read(model, rows.tokens["image"], asked)
        middle = time.time()
        drawn = draw(model, texts, **options)
        end = time.time()
        again = read(model, patches.encode(drawn), asked)
        error = patches.decode(rows.tokens["image"]) - self.test[0]
        columns = "captions", "words", "images/s", "PSNR"
        return columns, [
            ("tokeniser", math.nan, math.nan, math.nan,
             -10 * math.log10(error.square().mean().clamp(min=1e-10))),
            ("reading", *same_words(texts_read, truth), len(texts) / (middle - started), math.nan),
            ("drawing, read by the model itself", *same_words(again, truth),
             len(drawn) / (end - middle), math.nan)]


FILE = "filename file image imagefile imagepath path filepath imagename img picture".split()
TEXT = "text caption captions description prompt title label".split()


def metadata(folder):
    """Rows (line, file name, caption) of a folder's metadata.csv or metadata.jsonl, and which of
    them it is. InputError: there is none, it cannot be read, or it has other columns."""
    path = next((p for p in folder.glob("metadata.jsonl")), folder / "metadata.csv")
    rows, n = [], 0
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if path.suffix == ".jsonl":
            for n, line in enumerate(text.split("\n"), 1):
                rows += [(n, dict(json.loads(line)))] if line.strip() else []
        else:
            sign = max(",;\t|", key=text.partition("\n")[0].count)
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign,
                                skipinitialspace=True)
            head = next(reader, [])
            for fields in filter(None, reader):     # what is left over belongs to the last column
                n, last = reader.line_num, len(head) - 1
                rows.append((n, dict(zip(head, [*fields[:last], sign.join(fields[last:])]))))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{path}{f', line {n}' * (n > 0)} cannot be read: {first_line(error)}; "
                         "it has to be in UTF-8, with the columns file_name and text") from error
    names = {re.sub("[^a-z]", "", str(name).lower()): name for _, row in rows for name in row}
    file, text = (next((names[k] for k in known if k in names), None) for known in (FILE, TEXT))
    if rows and None in (file, text):
        raise InputError(f"{path} has the columns {', '.join(map(str, names.values()))}; it has "
                         "to have file_name and text")
    return [(n, str(row.get(file) or ""), str(row.get(text) or "")) for n, row in rows], path


def load_folder(run):
    """Pictures (N, C, size, size) in [0, 1], cropped to a square, and N captions, of a folder's
    metadata; "___" is a blank, so captions have at most "__". Pictures that cannot be read are
    named and skipped. The order, by checksum, belongs to the pictures alone: the third result is
    where the rows for testing end, the first ones, and then those for validation, a tenth of the
    pictures each. InputError: no such folder, a row without a caption or outside of it, fewer
    than 20 pictures."""
    folder, rows, seen = pathlib.Path(run.data), [], {}
    given, path = metadata(folder)
    inside = os.path.abspath(folder)            # a link may point anywhere, `..` may not
    for line, name, text in given:
        file = os.path.abspath(os.path.join(inside, name.strip().replace("\\", "/")))
        if not (name.strip() and re.search(r"\w", text)):
            raise InputError(f"{path}, line {line}: file_name or text is missing")
        if not pathlib.Path(file).is_relative_to(inside):
            raise InputError(f"{path}, line {line}: {name} lies outside of the folder")
        try:
            if file not in seen:
                picture = ImageOps.fit(open_picture(file), (run.size, run.size))
                seen[file] = zlib.crc32(pathlib.Path(file).read_bytes()), picture
            rows.append((*seen[file], re.sub("_{3,}", "__", text.strip())))
        except InputError as error:
            print(f"skipped {name}: {first_line(error.__cause__)}", file=sys.stderr)
    if len(rows) < len(given):
        print(f"{len(given) - len(rows)} of {len(given)} pictures were skipped", file=sys.stderr)
    sums = sorted({checksum for checksum, _, _ in rows})
    if len(sums) < 20:
        raise InputError(f"{folder} has {len(sums)} different pictures that can be read; at least "
                         "20 are needed")
    rows.sort(key=lambda row: row[0])
    tenths = [sum(checksum < part * 2 ** 32 / 10 for checksum in sums) for part in (1, 2)]
    a, b = max(1, tenths[0]), max(2, tenths[0] + 1, tenths[1])
    if not run.resume:                          # then the model has learned one or the other
        run.channels = 1 if all(picture.mode == "L" for _, picture, _ in rows) else 3
    images = torch.stack([middle_square(picture, run.size, run.channels)
                          for _, picture, _ in rows])
    parts = [sum(checksum < sums[n] for checksum, _, _ in rows) for n in (a, b)]
    return images, [text for _, _, text in rows], parts


class Corpus:
    """Data: a long text. The last tenth is held out."""

    def __init__(self, run):
        if run.text:
            try:
                text = pathlib.Path(run.text).read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise InputError(f"--text {run.text} cannot be read as UTF-8 text") from error
            self.origin = f"the text {pathlib.Path(run.text).name}"
        else:
            from pydoc_data.topics import topics
            text = "\n\n".join(topics[name] for name in sorted(topics))
            self.origin = "the documentation text that ships with Python"
        text = unicodedata.normalize("NFC", text)       # as the tokenizer does
        cut = len(text) * 9 // 10
        self.train, self.test = text[:cut], text[cut:]
        if len(self.test) < 10 * run.length:
            raise InputError(f"the text has {len(text)} characters; --length {run.length} needs "
                             f"at least {100 * run.length}")
        some = CHARACTERS.pre_tokenize_str(text[:run.length // 2])[:-1]
        some = re.search(r"[^\s_-]\S*( \S+){0,2}", "".join(c for c, _ in some))
        self.prompt = f"{some[0] if some else ''}___"               # what to try first
        self.reads, self.writes = run.test_images, run.drawings

    def build(self, run):
        """A new model whose words and schedule fit the data."""
        options, embedding, self.eos = {}, None, None
        if run.backbone:
            options, json, self.eos, embedding = load_backbone(run.backbone, run.shift)
        else:
            json = tokenizer([self.train, self.test], characters=True)
        text = [json, run.length, None, True, embedding]
        words = Text(*text)
        frequency = torch.bincount(self.stream(words, self.train), minlength=len(words.embedding))
        notes = dict(data=self.origin, captions=None, asks=False, eos=self.eos)
        return make(run, {"text": text}, {"text": frequency}, notes, **options)

    def stream(self, words, text):
        """A long text as tokens (N,); a backbone's closing token stands between its documents."""
        if self.eos is None:
            return torch.tensor(words.ids(text))
        documents = (words.ids(part.strip()) for part in text.split("<|endoftext|>"))
        return torch.tensor([token for ids in documents for token in (*ids, self.eos)])

    def tokens(self, model):
        """Training windows, which begin anywhere, and held-out ones, side by side."""
        self.eos, length = model.hparams.notes["eos"], model.tokens["text"].length
        training, held_out = (self.stream(model.tokens["text"], text)
                              for text in (self.train, self.test))
        return (Rows(text=training.unfold(0, length, 1)),
                Rows(text=held_out.unfold(0, length, length)[:self.reads]))

    def sample(self, model, path):
        """Writes up to four windows: path.txt."""
        texts = "\n\n----\n\n".join(write(model, ["___"] * min(4, self.writes)))
        path.with_suffix(".txt").write_text(texts, encoding="utf-8")

    def report(self, model, run, options):
        """Cross-entropy of held-out text by t, bits per character, and how many of the words that
        the model writes occur in the training text, beside the same share of held-out text."""
        held = self.tokens(model)[1]
        known, rows = set(words_of(self.train)), []
        print(f"\nthe report: writes {self.writes} windows, reads {len(held)} at 10 noise levels",
              flush=True)
        written = write(model, ["___"] * self.writes, **options)
        for t in tqdm(torch.linspace(0.05, 0.95, 10).tolist(), "reading", leave=False, delay=2):
            losses = []
            for i in range(0, len(held), 20):
                x_1 = {"text": held.tokens["text"][i:i + 20].to(model.device)}
                with torch.no_grad():
                    losses.append(model.loss(x_1, model.mark_free(x_1, "text"), t)[0].item())
            rows.append((f"held-out cross-entropy at t = {t:.2f}", sum(losses) / len(losses)))
        some = held.tokens["text"][:100]
        rows.append(("bits per character, at most", bits(model, {"text": some}, "text")
                     * len(some) / sum(map(len, model.tokens["text"].decode(some)))))
        for what, texts in (("held-out", [self.test]), ("written", written)):
            words = [word for text in texts for word in words_of(text)[1:-1]]
            share = sum(word in known for word in words) / max(1, len(words))
            rows.append((f"share of {what} words that the training text has", share))
        return ("value",), rows


# ------------------------------------------------------------------------------------ the training

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
    direction, also in those of which a gradient has little (K. Jordan et al., 2024), by the length
    of a step of AdamW's (2502.16982). In float32: few CPUs are made for PyTorch's, in bfloat16."""

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


class Share(torch.utils.data.Sampler):
    """What this rank has of an order of rows, from its row `start` on, where a resumed run is."""

    def __init__(self, order, trainer, start=0):
        self.order, self.trainer, self.start = order, trainer, start

    def __len__(self):
        return len(self.order) // self.trainer.world_size

    def __iter__(self):
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        return itertools.islice(self.order, ranks * self.start + rank, None, ranks)


class Keep(L.Callback):
    """Sample grids and checkpoints at every validation, and at the end however it comes. It has to
    stand before the averaging, so that it draws with the averaged weights and saves both kinds."""

    def __init__(self, run, folder):
        self.run, self.folder, self.fresh = run, folder, not run.resume
        self.data, self.signal, self.handlers = None, 0, {}

    def state_dict(self):
        """How the model was made."""
        return dict(run=vars(self.run))

    def stop(self, number, frame):
        """A signal handler: end after this step."""
        self.signal = number

    def on_train_start(self, trainer, model):
        self.ends = time.time() + 60 * self.run.max_minutes
        self.handlers = {n: signal.signal(n, self.stop) for n in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_start(self, trainer, model, batch, index):
        """Noise is a function of seed, step and rank: that of a resumed run is what it would have
        been."""
        which = (self.run.seed, trainer.global_step, index % trainer.accumulate_grad_batches,
                 trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(which).generate_state(1)[0]))

    def check(self, trainer):
        """InputError: the training has gone wrong. What was saved before stays."""
        if not all(p.isfinite().all() for p in trainer.lightning_module.parameters()):
            raise InputError(f"the weights are not finite at step {trainer.global_step}; try a "
                             "lower --lr")

    def on_train_batch_end(self, trainer, model, outputs, batch, index):
        """What ends one rank ends all, after a whole step."""
        wanted = torch.tensor([self.signal, time.time() > self.ends])
        if trainer.world_size > 1:
            wanted = trainer.strategy.reduce(wanted.to(model.device), reduce_op="max")
        self.signal, late = wanted.tolist()
        whole = (index + 1) % trainer.accumulate_grad_batches == 0
        trainer.should_stop |= whole and bool(self.signal or late)
        if trainer.global_step % 20 == 0:
            self.check(trainer)

    def on_validation_start(self, trainer, model):
        self.check(trainer)

    def on_validation_epoch_end(self, trainer, model):
        if trainer.is_global_zero:
            path = self.folder / "samples" / f"step_{trainer.global_step:06d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.data.sample(model, path)

    def on_validation_end(self, trainer, model):
        self.save(trainer)

    def save(self, trainer):
        """model.ckpt, whole or not at all; an older run's becomes previous.ckpt."""
        self.check(trainer)
        path, new = self.folder / "model.ckpt", self.folder / "model.part"
        try:
            trainer.save_checkpoint(new)
            if trainer.is_global_zero:
                if self.fresh and path.exists():
                    path.replace(self.folder / "previous.ckpt")
                new.replace(path)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise InputError(f"{path} cannot be written: {error}") from error
        self.fresh = False

    def on_train_end(self, trainer, model):
        self.save(trainer)
        self.restore()

    def on_exception(self, trainer, model, exception):
        self.restore()

    def restore(self):
        """The signal handlers of before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def make_trainer(run, keep):
    """Lightning's Trainer with the settings of a run. InputError: it refuses them."""
    if run.precision == "auto":
        on_gpu = torch.cuda.is_available() and run.accelerator in ("auto", "gpu", "cuda")
        half = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "16-mixed"
        run.precision = half if on_gpu else "32-true"

    def average(mean, now, n):          # at first the mean follows closely, it has seen little
        return torch.lerp(mean, now.to(mean), 1 - ((1 + n) / (10 + n)).clamp(max=run.ema))

    try:
        return L.Trainer(
            **{name: getattr(run, name) for name in TRAINER}, max_steps=run.steps,
            gradient_clip_val=1.0, num_sanity_val_steps=0, check_val_every_n_epoch=None,
            val_check_interval=run.val_every * run.accumulate_grad_batches,
            use_distributed_sampler=False,              # see Share
            enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=50,
            logger=CSVLogger(keep.folder, "log"),
            callbacks=[TQDMProgressBar(refresh_rate=10), keep,
                       WeightAveraging(use_buffers=False, avg_fn=average)])
    except Exception as error:
        raise InputError(f"Lightning: {first_line(error)}") from error


def fit(trainer, keep, model, data, run):
    """Trains with Lightning; the model ends with its averaged weights. -> samples per second,
    validations included"""
    L.seed_everything(run.seed, verbose=False)          # what follows is the same when resumed
    keep.data, same = data, dict(collate_fn=lambda batch: batch, generator=torch.Generator())
    try:
        training, held_out = data.tokens(model)
    except ValueError as error:
        raise InputError(f"{data.origin} does not fit the model: {error}") from error
    rows = run.batch * run.accumulate_grad_batches      # of a step, on each of the ranks
    ranks, n = trainer.num_devices * trainer.num_nodes, len(held_out)
    path = keep.folder / "model.ckpt" if run.resume else None
    order = RandomSampler(training, num_samples=run.steps * rows * ranks,
                          generator=torch.Generator().manual_seed(run.seed))
    every = [i % n for i in range(ranks * max(10, n // ranks))]         # at least ten for a rank
    loaders = (
        DataLoader(training, run.batch, sampler=Share(order, trainer, run.done * rows), **same),
        DataLoader(held_out, 10 * run.batch, sampler=Share(every, trainer), **same))
    started, model.optimizer = time.time(), Muon
    trainer.fit(model.train(), *loaders, ckpt_path=path, weights_only=True)
    model.to(trainer.strategy.root_device).eval()       # Lightning hands it back on the CPU
    return (trainer.global_step - run.done) * rows * ranks / (time.time() - started)


def report(model, data, run, options, file, **same):
    """Measures what a model can do, always with the same random numbers, prints it and adds it to
    a CSV file, every row with the columns of `same`."""
    L.seed_everything(run.seed, verbose=False)
    columns, rows = data.report(model, run, options)
    print_report(columns, rows)
    same |= dict(seed=run.seed, data=data.origin,
                 device=f"{model.device.type}, {torch.get_num_threads()} threads")
    if file:
        with open(file, "a+", newline="", encoding="utf-8") as opened:
            opened.seek(0)
            head, columns = next(csv.reader(opened), []), ["what", *columns, *same]
            if head and head != columns:
                raise InputError(f"{file} has other columns than this report, which is not added")
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerows([columns] * (not head))
            writer.writerows([*row, *same.values()] for row in rows)


def print_report(columns, rows):
    """Prints a report."""
    print(f"\n{'':50}" + "".join(f"{column:>14}" for column in columns))
    for what, *numbers in rows:
        cells = ("" if math.isnan(n) else f"{n:.3f}" if n < 10 and n % 1 else f"{n:.0f}"
                 for n in numbers)
        print(f"{what:50}" + "".join(f"{cell:>14}" for cell in cells))


# -------------------------------------------------------------------------------------------- main

def quietly(run):
    """Seeds, threads, and no word of libraries about their own plans."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(run.seed, verbose=False)
    torch.set_num_threads(run.threads or torch.get_num_threads())


def dataset(run):
    """The data of a run."""
    return (Folder if run.data else Corpus if run.text or run.preset == "text" else
            Scenes if run.preset == "scenes" else Digits)(run)


def parse_score(argv):
    """What is to be scored, and how."""
    parser = argparse.ArgumentParser(prog="train.py score", description=score.__doc__,
                                     allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?", help="default: the newest under runs/")
    add_generation(parser)
    for name in ("data-dir", "data", "text"):
        parser.add_argument("--" + name, help="where its data are, if not where they were")
    parser.add_argument("--drawings", type=number(int, 1),
                        help="images drawn (default: as in training)")
    parser.add_argument("--seed", type=number(int, *SEED),
                        help="of the report (default: that of the training)")
    parser.add_argument("--csv", type=file(".csv"), help="adds the report to this file")
    return parser.parse_args(argv)


def score(argv):
    """The report of a checkpoint with any options of generation, without training."""
    given = parse_score(argv)
    model, path = open_model(given.checkpoint)
    saved, steps = settings(path)
    run = argparse.Namespace(**PRESETS["toy"] | saved)
    for name in ("data_dir", "data", "text", "drawings"):
        setattr(run, name, getattr(given, name) or getattr(run, name))
    if given.guidance not in (None, 1) and "image" not in model.tokens:
        raise InputError("this model knows texts only: no --guidance")
    options = (defaults(model, "draw") if "image" in model.tokens else WRITE) | generation(given)
    quietly(run)
    data = dataset(run)
    run.seed = run.seed if given.seed is None else given.seed
    report(model, data, run, options, given.csv, training_steps=steps,
           checkpoint=path, **options, command=" ".join(["python train.py score", *argv]))


@command
def main(argv=None):
    """Data, codebook, model, training, report; or a report only."""
    argv = sys.argv[1:] if argv is None else argv
    return score(argv[1:]) if argv[:1] == ["score"] else train(argv)


def train(argv):
    """Data, codebook, model, training, report."""
    run, started = parse(argv), time.time()
    folder = RUNS / run.preset
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise InputError(f"{there} has to be a folder that can be written to")
    quietly(run)
    keep = Keep(run, folder)
    trainer = make_trainer(run, keep)                   # what can be refused is refused first
    data = dataset(run)
    model = open_model(folder / "model.ckpt")[0] if run.resume else data.build(run)
    count = sum(p.numel() for p in model.net.parameters())
    what = " and ".join(f"{kind.length} {m} tokens" for m, kind in model.tokens.items())
    print(f"{data.origin}: {what} in a row; {count / 1e6:.2f} M parameters", flush=True)
    if run.checkpoint_blocks:
        model.net.trunk.body.gradient_checkpointing_enable()
    rate = fit(trainer, keep, model, data, run)
    if keep.signal:
        print(f"\nstopped; {folder / 'model.ckpt'} is saved, go on with --resume")
        return
    if model.global_rank > 0:
        return                                          # one process reports
    steps, minutes = trainer.global_step, (time.time() - started) / 60
    (folder / "report.csv").unlink(missing_ok=True)
    report(model, data, run, {}, folder / "report.csv", training_steps=steps,
           minutes=f"{minutes:.2f}", samples_per_s=f"{rate:.1f}",
           command=" ".join(["python train.py", *argv]))
    print(f"\n{steps} steps, {minutes:.1f} minutes, {rate:.1f} samples/s in training; model and "
          f"samples are in {folder}. Next:\n  python sample.py "
          + "-- " * data.prompt.startswith("-") + shlex.quote(data.prompt))
    if "image" in model.tokens:
        save_image(data.test[0][0], folder / "picture.png")
        print(f"  python sample.py --image {folder / 'picture.png'}")
    else:
        print("  python sample.py")


if __name__ == "__main__":
    sys.exit(main())
