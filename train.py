"""Trains a model, shows what it learns, and measures what it can do:

    python train.py                             tokenised MNIST with captions (--preset toy)
    python train.py --preset smoke              rendered digits, half a minute: does it run?
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
import csv
import itertools
import logging
import math
import pathlib
import random
import re
import signal
import sys
import time
import warnings

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import TQDMProgressBar, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import MNIST
from torchvision.utils import save_image

from fudoki import (PATHS, SCHEDULES, TEXTS, UNREADABLE, Fudoki, InputError, Parser, Patches,
                    Pieces, Vocabulary, command, crop, k_means, nearest, open_picture)
from sample import add_generation, generation

PRESETS = {         # what they cost and reach: tests/bench/*.csv, README
    "toy": dict(
        codes=256, patch=4, path="metric", exponent=2.0, normalize=False, schedule="calibrated",
        width=96, depth=4, heads=3, lr=6e-3, weight_decay=0.01, t_power=3.0, share=0.5, drop=0.1,
        ask=0.15, batch=64, steps=2500, max_minutes=math.inf, ema=0.999, val_every=200,
        train_images=60_000, test_images=10_000, drawings=1000, threads=0, seed=0, data="",
        image_size=64, text="", length=128, backbone="", shift=True, freeze=0.0),
    "smoke": dict(
        codes=128, patch=7, width=64, depth=2, heads=2, steps=500, ema=0.98, val_every=250,
        train_images=4000, test_images=1000, drawings=200, threads=1),
    "folder": dict(batch=32),
    "text": dict(width=128, heads=4, batch=32, t_power=1.0, steps=1600),
    "ar": dict(backbone="HuggingFaceTB/SmolLM2-135M", lr=3e-4, batch=16),
}
TRAINER = dict(accelerator="auto", devices="auto", num_nodes=1, strategy="auto", precision="auto")
HELP = dict(
    codes="size of the codebook of patches", patch="side of a patch in pixels",
    path=" or ".join(PATHS), exponent="of the distance in the metric path; FUDOKI 4, URSA 2",
    normalize="L2-normalise the embeddings of the metric path",
    schedule=" or ".join(SCHEDULES), width="of the transformer", depth="blocks of the transformer",
    heads="of its attention", lr="peak learning rate", weight_decay="of AdamW",
    t_power="noise levels of training are t = u^power, u uniform: above 1 more of them are early",
    share="of a batch that is drawn, the rest is read",
    drop="how often pictures and captions go without each other, for guidance",
    ask="share of digits with a question and its answer instead of a caption; not with a "
    "backbone; captions of a folder may hold questions of their own: what colour? red",
    batch="rows per step",
    steps="training steps", max_minutes="minutes after which training ends early, wherever the "
    "learning rate is by then", ema="decay of the averaged weights",
    val_every="steps between validations, sample grids and checkpoints",
    train_images="training images used", test_images="test images read in the report",
    drawings="images drawn in the report", threads="of the CPU; 0 leaves it to PyTorch, 1 is "
    "faster for very small models", seed="of everything random",
    data="a folder of pictures and a metadata.csv with the columns file_name and text",
    image_size="of those pictures, in pixels", text="a file to learn, UTF-8; between its "
    "documents stands <|endoftext|>; presets text and ar", length="tokens of its windows",
    backbone="a folder or a name on the Hugging Face hub: the causal language model to start from",
    shift="predict token i from the backbone's state of token i − 1, as it learned to",
    freeze="share of the training in which the backbone's words are kept as they are")
AT_LEAST_ONE = ("codes", "patch", "width", "depth", "heads", "steps", "val_every", "train_images",
                "test_images", "drawings", "image_size", "length")
SIZE = 28           # side of a picture in pixels


def parse(argv=None):
    """The settings of a run: the preset's, overridden by flags. InputError: a wrong one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help=f"{', '.join(PRESETS)} (default: toy, folder for --data)")
    parser.add_argument("--data-dir", help="a folder with MNIST in torchvision's layout, "
                        "<folder>/MNIST/raw; by default it is downloaded to data/")
    parser.add_argument("--resume", action="store_true",
                        help="go on from runs/<preset>/model.ckpt, with its model")
    for name, value in PRESETS["toy"].items():
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(value, bool) \
            else dict(type=type(value))
        parser.add_argument("--" + name.replace("_", "-"), **kind,
                            help=HELP[name] + (f" (toy: {value})" if value != "" else ""))
    for name, value in TRAINER.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value),
                            help=f"of Lightning's Trainer (default: {value})")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    given = {"preset": "folder" if "data" in given else "toy"} | given
    if given["preset"] not in PRESETS:
        raise InputError(f"no preset {given['preset']}; {nearest(given['preset'], PRESETS)}")
    text = PRESETS["text"] if "text" in given else {}
    run = argparse.Namespace(**{"data_dir": None} | TRAINER | PRESETS["toy"] | text
                             | PRESETS[given["preset"]] | given)
    for name, known in (("path", PATHS), ("schedule", SCHEDULES)):
        value = getattr(run, name)
        if value not in known:
            raise InputError(f"no {name} {value}; {nearest(value, known)}")
    for name in AT_LEAST_ONE:
        if getattr(run, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} has to be at least 1")
    run.size = run.image_size if run.data else SIZE
    if run.size % run.patch:
        raise InputError(f"--patch {run.patch} does not divide the picture's side, {run.size}")
    if not run.backbone and run.width % (4 * run.heads):
        raise InputError(f"--width {run.width} is no multiple of 4·heads = {4 * run.heads}")
    if not (0 < run.share < 1 and run.batch > 1 and run.max_minutes > 0 and run.t_power > 0
            and 0 <= run.drop <= 1 and 0 <= run.ask < 1 and 0 <= run.freeze < 1):
        raise InputError("--share has to lie between 0 and 1, --drop, --ask and --freeze from 0 "
                         "to 1, --batch has to be at least 2, --max-minutes and --t-power above 0")
    if run.text and (run.data or run.preset not in ("text", "ar")):
        raise InputError("--text goes with --preset text or --preset ar, and without --data")
    if run.backbone and run.path == "mask":
        raise InputError("--path mask needs a token that the backbone does not have")
    return run


# ------------------------------------------------------------------------- digits with captions

DIGITS = "zero one two three four five six seven eight nine".split()
SLOTS = [["thin", "bold"], ["upright", "slanted"], DIGITS]
QUESTIONS = [[["what"], ["digit?"], DIGITS], *(
    [["is"], [word], ["no", "yes"]] for word in ("bold?", "slanted?"))]
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
    return [f"a {SLOTS[0][bold]} {SLOTS[1][slanted]} {DIGITS[d]}" for bold, slanted, d in rows]


def questions(caption):
    """What may be asked about a picture of this caption, with the answer: the three QUESTIONS."""
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


def load_digits(run):
    """(images, digits) for training and for testing, and where they are from. InputError: there
    is no MNIST in --data-dir. Without a network: rendered digits, said loudly."""
    if run.preset == "smoke":
        return (rendered(run.train_images, run.seed), rendered(run.test_images, run.seed + 1),
                "digits rendered with a font")
    try:
        train, test = ((s.data[:, None] / 255, s.targets) for s in (
            MNIST(run.data_dir or "data", train=train, download=True) for train in (True, False)))
        origin = "MNIST"
    except (OSError, RuntimeError) as error:
        if run.data_dir:
            raise InputError(f"--data-dir {run.data_dir} holds no MNIST: it needs "
                             "MNIST/raw/train-images-idx3-ubyte.gz and its three companions") \
                from error
        print("MNIST CANNOT BE DOWNLOADED: training on digits rendered with a font instead. "
              "Nothing below is about MNIST. --data-dir FOLDER uses a copy.", flush=True)
        train = rendered(min(20_000, run.train_images), run.seed)
        test = rendered(run.test_images, run.seed + 1)
        origin = "digits rendered with a font, since MNIST could not be downloaded"
    return (tuple(part[:run.train_images] for part in train),
            tuple(part[:run.test_images] for part in test), origin)


# ------------------------------------------------------------------------------------ the measures

class Judge(nn.Module):
    """A small CNN that has seen real digits only, and tells what a drawn one shows."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Flatten(), nn.Linear(32 * (SIZE // 4) ** 2, 64), nn.ReLU())
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
        """Features (B, 64) and digits (B,) of pictures (B, 1, 28, 28)."""
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
    whole = sum(a == b for a, b in zip(texts, truth))
    return digit / len(texts), whole / len(texts)


def agreement(texts, truth):
    """The shares of texts that are right altogether, and of the words of truth in their place."""
    whole = sum(a == b for a, b in zip(texts, truth)) / len(truth)
    words = [(x == y) for a, b in zip(texts, truth)
             for x, y in itertools.zip_longest(a.split(), b.split()) if y is not None]
    return whole, sum(words) / max(1, len(words))


def vocabulary(text):
    """The words of a text, in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


# ---------------------------------------------------------- all data: digits, folders, long texts

class Rows(torch.utils.data.Dataset):
    """Tokens {name: (N, L)}; rows leave as one batch, without a loop."""

    def __init__(self, **tokens):
        self.tokens = tokens

    def __len__(self):
        return len(next(iter(self.tokens.values())))

    def __getitems__(self, rows):
        return {m: tokens[rows] for m, tokens in self.tokens.items()}


class Windows(torch.utils.data.Dataset):
    """Windows of `length` tokens of a stream (N,), one every `stride`."""

    def __init__(self, stream, length, stride=1):
        self.windows = stream.unfold(0, length, stride)

    def __len__(self):
        return len(self.windows)

    def __getitems__(self, rows):
        return {"text": self.windows[rows]}


def load_backbone(name, shift):
    """A pretrained model and tokenizer. -> options of `Fudoki`, the tokenizer's JSON and its
    closing token. InputError: it cannot be had."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as quiet
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, dtype="float32")
        json = tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, AttributeError, ImportError, KeyError, RuntimeError) as error:
        raise InputError(f"the backbone {name} cannot be loaded; it has to be the folder of a "
                         "causal language model with safetensors and tokenizer.json, or the name "
                         "of one on the Hugging Face hub, which needs a network") from error
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(f"the tokenizer of the backbone {name} has no token that ends a text")
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    config = {k: v for k, v in model.config.to_dict().items()
              if k not in ("_name_or_path", "architectures", "transformers_version")}
    return dict(backbone=[config, start, shift], pretrained=model), json, end


OF_MODEL = ("path exponent normalize schedule width depth heads lr weight_decay t_power share "
            "drop freeze").split()


class Pictures:
    """Data: pictures with captions; what a kind of them adds is where they are from, `report`,
    `words` and `examples`, captions that are drawn at every validation."""

    def build(self, run):
        """A new model whose codebook, words and schedules fit the data."""
        images, n = self.train[0], run.size // run.patch
        some = images[torch.randperm(len(images))[:8000 * 49 // n ** 2]]
        patches = F.unfold(some, run.patch, stride=run.patch).transpose(1, 2).flatten(0, 1)
        image = [run.codes, run.patch, run.size, images.shape[1]]
        codebook = k_means(patches, run.codes)
        tokens = Patches(*image, codebook=codebook).encode(some)
        frequency = {"image": torch.bincount(tokens.flatten(), minlength=run.codes)}
        options, text = {}, self.words
        if run.backbone:
            options, json, end = load_backbone(run.backbone, run.shift)
            ids = Pieces(json, math.inf, end, True).encode(self.examples)
            text = ["pieces", json, ids.shape[1], end, True]
            size = options["pretrained"].get_input_embeddings().num_embeddings
            frequency["text"] = torch.bincount(ids.flatten(), minlength=size)
        return Fudoki(text, image, data=self.origin, form=self.form, codebook=codebook,
                      frequency=frequency, **options, **{k: getattr(run, k) for k in OF_MODEL})

    def rows(self, model, images, labels):
        """Tokens of pictures and captions, and the captions."""
        image = model.patches.encode(images.to(model.device))
        texts = self.captions(model.patches.decode(image).cpu(), labels)
        return Rows(text=model.words.encode(texts), image=image.cpu()), texts

    def tokens(self, model):
        """Training and validation rows."""
        rows, n = self.rows(model, *self.train)[0], min(1000, len(self.train[0]) // 10)
        return (Rows(**{m: x[n:] for m, x in rows.tokens.items()}),
                Rows(**{m: x[:n] for m, x in rows.tokens.items()}))

    def sample(self, model, path):
        """Draws the examples: path.png."""
        save_image(model.draw(self.examples[:40]), path.with_suffix(".png"), nrow=10)


class Digits(Pictures):
    """MNIST, or digits rendered with a font, captioned by a rule."""
    form, captions = "digit", staticmethod(captions)
    examples = [f"a {a} {b} {c}" for a in SLOTS[0] for b in SLOTS[1] for c in DIGITS]

    def __init__(self, run):
        self.train, self.test, self.origin = load_digits(run)
        self.ask = 0. if run.backbone else run.ask
        self.words = ["words", SLOTS, *(QUESTIONS if self.ask else [])]

    def tokens(self, model):
        """Training and validation rows; in the share `ask` of training a question is asked."""
        seen, held = super().tokens(model)
        picked = torch.randperm(len(seen))[:int(len(seen) * self.ask)]
        if len(picked):
            texts = model.words.decode(seen.tokens["text"][picked])
            seen.tokens["text"][picked] = model.words.encode(
                [random.choice(questions(text)) for text in texts])
        return seen, held

    def report(self, model, run, options):
        """Draws the captions of some test images, reads all of them: the share of right digits
        and of captions, images per second, network calls, and the Fréchet distance to the decoded
        *other* test images, of the drawings and of as many decoded real ones. -> columns, rows"""
        order, n, nan = torch.randperm(len(self.test[0])), run.drawings, math.nan
        images, digits = (part[order] for part in self.test)        # MNIST's are sorted by writer
        judge = Judge().fit(*self.train)
        rows, truth = self.rows(model, images, digits)
        tokens = rows.tokens["image"].to(model.device)
        decoded = model.patches.decode(tokens).cpu()
        real, real_seen = judge(decoded)
        options = dict(step="race", eta=0.) | model.DRAW | options
        begin = time.time()
        drawn = model.draw(truth[:n], **options).cpu()
        middle = time.time()
        read = model.read(tokens)
        end = time.time()
        features, drawn_seen = judge(drawn)
        calls = options["steps"] * (1 if options["guidance"] == 1 else 2)
        return ("digit", "caption", "frechet", "images_per_s", "calls"), [
            ("judge, test images", (judge(images)[1] == digits).float().mean().item(), nan, nan,
             nan, nan),
            ("ceiling, decoded test images", *right(captions(decoded, real_seen), truth),
             of_parts(real, n), nan, nan),
            ("drawing, {steps} {step} steps, g {guidance:g}, T {temperature:g}, η {eta:g}".format(
                **options), *right(captions(drawn, drawn_seen), truth[:n]),
             frechet(features, real[n:]), len(drawn) / (middle - begin), calls),
            ("reading, steps 1, greedy", *right(read, truth), nan, len(read) / (end - middle), 1),
            *self.answers(model, tokens, truth)]

    def answers(self, model, tokens, truth):
        """How many questions about the digit, and how many of all, are answered right. -> rows"""
        if not self.ask:
            return []
        right_ones = []
        for texts in zip(*map(questions, truth)):
            read = model.read(tokens, [text.rpartition(" ")[0] for text in texts])
            right_ones.append(right(read, texts)[0])
        nan, all_three = math.nan, sum(right_ones) / len(right_ones)
        return [("answers, digit and all, greedy", right_ones[0], all_three, nan, nan, 1)]


class Folder(Pictures):
    """Pictures and captions of a user: a folder with a metadata.csv."""
    form, captions = "crop", staticmethod(lambda images, texts: texts)

    def __init__(self, run):
        images, texts = load_folder(run)
        order = torch.randperm(len(images))
        images, texts = images[order], [texts[i] for i in order]
        n = max(1, len(images) // 10)
        self.train, self.test = (images[n:], texts[n:]), (images[:n], texts[:n])
        self.origin = f"the folder {pathlib.Path(run.data).resolve().name}"
        lists = [Vocabulary.split(text) for text in texts]
        self.words = ["vocabulary", sorted(set(itertools.chain(*lists))), max(map(len, lists)) + 1]
        self.examples = list(dict.fromkeys(texts))

    def report(self, model, run, options):
        """How many captions of held-out pictures are read right, and what the model itself reads
        in its drawings of these captions."""
        rows, texts = self.rows(model, *self.test)
        truth = model.words.decode(rows.tokens["text"])
        begin = time.time()
        asked = ["".join(text.rpartition("?")[:2]) + " ___" for text in texts]
        read = model.read(rows.tokens["image"], asked)
        middle = time.time()
        drawn = model.draw(texts, **options)
        end = time.time()
        seen = model.read(model.patches.encode(drawn), asked)
        error = (model.patches.decode(rows.tokens["image"].to(model.device)).cpu() - self.test[0])
        columns = "captions", "words", "images/s", "PSNR"
        return columns, [
            ("tokeniser", math.nan, math.nan, math.nan,
             -10 * math.log10(error.square().mean().clamp(min=1e-10))),
            ("reading", *agreement(read, truth), len(read) / (middle - begin), math.nan),
            ("drawing, read by the model itself", *agreement(seen, truth),
             len(drawn) / (end - middle), math.nan)]


def load_folder(run):
    """Pictures (N, C, size, size) in [0, 1], cropped to a square, and N captions, of a folder's
    metadata.csv (file_name, text). Pictures that cannot be read are named and skipped. InputError:
    no such folder, a row without a caption or outside of the folder, fewer than 20 pictures."""
    folder = pathlib.Path(run.data)
    try:
        with open(folder / "metadata.csv", newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"{folder / 'metadata.csv'} cannot be read; it has to be a CSV file with "
                         "the columns file_name and text") from error
    pictures, texts = [], []
    for number, row in enumerate(rows, 2):
        name, text = row.get("file_name"), row.get("text")
        if not (name and text and Vocabulary.split(text)):
            raise InputError(f"{folder / 'metadata.csv'}, line {number}: file_name or text is "
                             "missing")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{folder / 'metadata.csv'}, line {number}: {name} lies outside of "
                             "the folder")
        try:
            pictures.append(ImageOps.fit(open_picture(folder / name), (run.size, run.size)))
            texts.append(text)
        except UNREADABLE as error:
            print(f"skipped {name}: {error}", file=sys.stderr)
    if len(pictures) < len(rows):
        print(f"{len(rows) - len(pictures)} of {len(rows)} pictures were skipped", file=sys.stderr)
    if len(pictures) < 20:
        raise InputError(f"{folder} has {len(pictures)} pictures that can be read; at least 20 "
                         "are needed")
    channels = 1 if all(picture.mode == "L" for picture in pictures) else 3
    return torch.stack([crop(picture, run.size, channels) for picture in pictures]), texts


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
        cut = len(text) * 9 // 10
        self.alphabet, self.train, self.test = sorted(set(text)), text[:cut], text[cut:]
        if len(self.test) < 10 * run.length:
            raise InputError(f"the text has {len(text)} characters; --length {run.length} needs "
                             f"at least {100 * run.length}")

    def build(self, run):
        """A new model whose words and schedule fit the data."""
        options, text = {}, ["characters", "".join(self.alphabet), run.length]
        size = len(self.alphabet)
        if run.backbone:
            options, json, end = load_backbone(run.backbone, run.shift)
            text = ["pieces", json, run.length, end, False]
            size = options["pretrained"].get_input_embeddings().num_embeddings
        frequency = torch.bincount(stream(TEXTS[text[0]](*text[1:]), self.train), minlength=size)
        return Fudoki(text, data=self.origin, frequency={"text": frequency}, **options,
                      **{k: getattr(run, k) for k in OF_MODEL})

    def tokens(self, model):
        """Training windows, which begin anywhere, and held-out ones, side by side."""
        seen, held = (stream(model.words, text) for text in (self.train, self.test))
        length = model.words.length
        held = Windows(held, length, length)
        return (Windows(seen, length),
                torch.utils.data.Subset(held, range(min(200, len(held)))))

    def sample(self, model, path):
        """Writes four windows: path.txt."""
        texts = "\n\n----\n\n".join(model.write(["___"] * 4))
        path.with_suffix(".txt").write_text(texts, encoding="utf-8")

    def report(self, model, run, options):
        """Cross-entropy of held-out text by t, and how many of the words that the model writes
        occur in the training text, beside the same share of held-out text."""
        held = self.tokens(model)[1]
        known, rows = set(vocabulary(self.train)), []
        written = model.write(["___"] * 32, **options)
        for t in torch.linspace(0.05, 0.95, 10).tolist():
            losses = []
            for i in range(0, len(held), 20):
                x_1 = {"text": held.dataset.windows[i:i + 20].to(model.device)}
                with torch.no_grad():
                    losses.append(model.loss(x_1, model.only(x_1, "text"), t)[0].item())
            rows.append((f"held-out cross-entropy at t = {t:.2f}", sum(losses) / len(losses)))
        for what, texts in (("held-out", [self.test]), ("written", written)):
            words = [word for text in texts for word in vocabulary(text)[1:-1]]
            share = sum(word in known for word in words) / max(1, len(words))
            rows.append((f"share of {what} words that the training text has", share))
        return ("value",), rows


def stream(words, text):
    """A long text as tokens (N,); a backbone's `end` stands between its documents."""
    if words.end is None:
        return torch.tensor(words.ids(text))
    documents = (words.ids(part.strip()) for part in text.split("<|endoftext|>"))
    return torch.tensor([token for ids in documents for token in (*ids, words.end)])


# ------------------------------------------------------------------------------------ the training

class Bar(TQDMProgressBar):
    """Lightning's progress bar without the number of the log."""

    def get_metrics(self, trainer, model):
        """Loss and accuracy."""
        return {k: v for k, v in super().get_metrics(trainer, model).items() if k != "v_num"}


class Keep(L.Callback):
    """Sample grids and checkpoints at every validation, and at the end however it comes. It has to
    stand before the averaging, so that it draws with the averaged weights and saves both kinds."""

    def __init__(self, data, run, folder):
        self.data, self.run, self.folder, self.fresh = data, run, folder, not run.resume
        self.signal, self.handlers, self.first = None, {}, math.inf

    def state_dict(self):
        """How the model was made, which `score` wants to know from its checkpoint."""
        return vars(self.run)

    def stop(self, number, frame):
        """A signal handler: end after this step."""
        self.signal, self.trainer.should_stop = number, True

    def on_train_start(self, trainer, model):
        self.trainer, self.first = trainer, trainer.global_step
        self.handlers = {n: signal.signal(n, self.stop) for n in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(self, trainer, model, outputs, batch, index):
        if trainer.global_step % 20 == 0 and not torch.isfinite(outputs["loss"]):
            raise InputError(f"the loss is {outputs['loss'].item()} at step "
                             f"{trainer.global_step}; try a lower --lr")

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
        path, new = self.folder / "model.ckpt", self.folder / "model.part"
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if self.fresh and path.exists():
                path.replace(self.folder / "previous.ckpt")
            new.replace(path)
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


def fit(model, data, run, folder):
    """Trains with Lightning; the model ends with its averaged weights. -> the Keep callback and
    samples per second, validations included"""
    if run.precision == "auto":
        on_gpu = torch.cuda.is_available() and run.accelerator in ("auto", "gpu", "cuda")
        half = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "16-mixed"
        run.precision = half if on_gpu else "32-true"

    def average(mean, now, n):          # at first the mean follows closely, it has seen little
        return torch.lerp(mean, now, 1 - ((1 + n) / (10 + n)).clamp(max=run.ema))

    keep, (seen, held) = Keep(data, run, folder), data.tokens(model)
    trainer = L.Trainer(
        **{name: getattr(run, name) for name in TRAINER}, max_steps=run.steps,
        max_time={"minutes": run.max_minutes} if run.max_minutes < math.inf else None,
        gradient_clip_val=1.0,
        val_check_interval=run.val_every, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=50,
        logger=CSVLogger(folder, "log"),
        callbacks=[Bar(refresh_rate=10), keep, WeightAveraging(use_buffers=False, avg_fn=average)])
    same = dict(collate_fn=lambda batch: batch)
    sampler = RandomSampler(seen, num_samples=run.steps * run.batch)
    loaders = (DataLoader(seen, run.batch, sampler=sampler, **same),
               DataLoader(held, max(1, len(held) // 10), **same))
    begin, resume = time.time(), folder / "model.ckpt" if run.resume else None
    trainer.fit(model, *loaders, ckpt_path=resume, weights_only=True)
    model.to(trainer.strategy.root_device).eval()       # Lightning hands it back on the CPU
    return keep, max(0, trainer.global_step - keep.first) * run.batch / (time.time() - begin)


def report(model, data, run, options, file, **same):
    """Measures what a model can do, always with the same random numbers, prints it and adds it to
    a CSV file, every row with the columns of `same`."""
    L.seed_everything(run.seed, verbose=False)
    columns, rows = data.report(model, run, options)
    show(columns, rows)
    same |= dict(seed=run.seed, data=data.origin,
                 device=f"{model.device.type}, {torch.get_num_threads()} threads")
    if file:
        new = not file.exists()
        with open(file, "a", newline="") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerows([["what", *columns, *same]] * new)
            writer.writerows([*row, *same.values()] for row in rows)


def show(columns, rows):
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
    return (Folder if run.data else Corpus if run.text or run.preset == "text" else Digits)(run)


def parse_score(argv):
    """What is to be scored, and how. InputError: a value that cannot be."""
    parser = Parser(prog="train.py score", description=score.__doc__)
    parser.add_argument("checkpoint", nargs="?", help="default: the newest under runs/")
    add_generation(parser)
    for name in ("data-dir", "data", "text"):
        parser.add_argument("--" + name, help="where its data are, if not where they were")
    parser.add_argument("--drawings", type=int, help="images drawn (default: as in training)")
    parser.add_argument("--seed", type=int, help="of the report (default: that of the training)")
    parser.add_argument("--csv", type=pathlib.Path, help="adds the report to this file")
    given = parser.parse_args(argv)
    if given.csv and not given.csv.resolve().parent.is_dir():
        raise InputError(f"--csv {given.csv} has to be in a folder that exists")
    given.options = generation(given)
    return given


def score(argv):
    """The report of a checkpoint with any options of generation, without training."""
    given = parse_score(argv)
    model = Fudoki.open(given.checkpoint)
    saved = torch.load(model.source, map_location="cpu", weights_only=True)
    if not saved["callbacks"].get("Keep"):
        raise InputError(f"{model.source} is of an older version, which did not save its settings")
    run = argparse.Namespace(**saved["callbacks"]["Keep"])
    for name in ("data_dir", "data", "text", "drawings"):
        setattr(run, name, getattr(given, name) or getattr(run, name))
    if given.guidance and not model.patches:
        raise InputError("this model knows texts only: no --guidance")
    options = (model.DRAW if model.patches else model.WRITE) | given.options
    quietly(run)
    data = dataset(run)
    run.seed = run.seed if given.seed is None else given.seed
    report(model, data, run, options, given.csv, training_steps=saved["global_step"],
           checkpoint=model.source, **options, command=" ".join(["python train.py score", *argv]))


@command
def main(argv=None):
    """Data, codebook, model, training, report; or a report only."""
    argv = sys.argv[1:] if argv is None else argv
    return score(argv[1:]) if argv[:1] == ["score"] else train(argv)


def train(argv):
    """Data, codebook, model, training, report."""
    run, begin = parse(argv), time.time()
    folder = pathlib.Path("runs") / run.preset
    if run.resume and not (folder / "model.ckpt").exists():
        raise InputError(f"nothing to go on from: there is no {folder / 'model.ckpt'}")
    quietly(run)
    data = dataset(run)
    model = Fudoki.open(folder / "model.ckpt").train() if run.resume else data.build(run)
    count = sum(p.numel() for p in model.net.parameters())
    what = " and ".join(f"{n} {m} tokens" for m, n in model.lengths.items())
    print(f"{data.origin}: {what} in a row; {count / 1e6:.2f} M parameters", flush=True)
    keep, rate = fit(model, data, run, folder)
    if keep.signal:
        print(f"\nstopped; {folder / 'model.ckpt'} is saved, go on with --resume")
        return
    if model.global_rank > 0:
        return                                          # one process reports
    steps, minutes = model.trainer.global_step, (time.time() - begin) / 60
    (folder / "report.csv").unlink(missing_ok=True)
    report(model, data, run, {}, folder / "report.csv", training_steps=steps,
           minutes=f"{minutes:.2f}", samples_per_s=f"{rate:.0f}",
           command=" ".join(["python train.py", *argv]))
    print(f"\n{steps} steps, {minutes:.1f} minutes, {rate:.0f} samples/s in training; model and "
          f"samples are in {folder}. Next:")
    if model.patches:
        save_image(data.test[0][0], folder / "picture.png")
        print(f'  python sample.py "{data.examples[-3:][0]}"\n'
              f"  python sample.py --image {folder / 'picture.png'}")
    else:
        print('  python sample.py\n  python sample.py --text "The ___"')


if __name__ == "__main__":
    sys.exit(main())
