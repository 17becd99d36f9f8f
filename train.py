"""Trains a model, shows what it learns, and measures what it can do:

    python train.py                             tokenised MNIST with captions (--preset toy)
    python train.py --preset smoke              rendered digits, half a minute: does it run?
    python train.py --preset scenes             invented scenes of coloured shapes, and questions
    python train.py --data FOLDER               your pictures, their captions in metadata.csv
    python train.py --preset text --text FILE   a text, character by character
    python train.py --preset ar --text FILE     a text, from a pretrained language model
    python train.py --preset ar                 the toy, from a pretrained language model
    python train.py --preset my:Data            data of your own, the class Data of my.py
    python train.py score                       the report of the newest checkpoint once more,
                                                with any options of generation: score --help

Pictures with captions are learned in both directions, drawing and reading; texts are written,
continued and completed. What it writes is in runs/<preset>/, or runs/<name>/ with --name:
model.ckpt, samples/, report.csv and the log of every run.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # waiting threads must not block others

import argparse
import ast
import csv
import gzip
import itertools
import json
import logging
import math
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import TQDMProgressBar, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import MNIST
from torchvision.utils import save_image

from fudoki import CLOCKS, LOSSES, OPTIMIZERS, PATHS, TRUNKS, Fudoki, Patches, Registry, Text
from sample import (SEED, WRITE, InputError, add_generation, command, contract, defaults, draw,
                    first_line, generation, middle_square, named, number, open_model, open_picture,
                    opened, read, take, write)

# -------------------------------------------------------------------------------- 1. settings
# name: (default, limits or choices, what it is). A kind of data changes defaults and adds its own.

MODEL = dict(               # what a model is and how it learns: fixed by its checkpoint
    path=("metric", PATHS, "probability path from noise to data"),
    path_options=({}, None, "options of the path, such as exponent=2 normalize=True"),
    clock=("calibrated", CLOCKS, "clock: how fast the path moves at each time"),
    trunk=("blocks", TRUNKS, "trunk of the network"),
    trunk_options=({}, None, "options of the trunk other than width, depth and heads"),
    width=(96, (4, 2 ** 16), "width of the trunk"),
    depth=(4, (1, 2 ** 10), "number of blocks of the trunk"),
    heads=(3, (1,), "attention heads of a block"),
    backbone=("", None, "causal language model to start from: a folder, or a name on the hub"),
    loss=("cross_entropy", LOSSES, "loss of a position"),
    optimizer=("muon", OPTIMIZERS, "optimizer"),
    lr=(6e-3, (0,), "peak learning rate"),
    t_power=(1., (0.01,), "noise levels of training are t = u^power, u uniform"),
    drop=(0.05, (0, 1), "how often a modality is left out of a batch, for guidance"),
    clean=(0.1, (0, 1), "share of rows in which a part of the answer is given"),
    batch=(64, (2, 2 ** 16), "rows per step and device"),
    ema=(0.999, (0, 1), "decay of the averaged weights"))

RUN = dict(                 # how a run is done: may change when it is resumed
    steps=(2500, (1,), "training steps"),
    val_every=(200, (1,), "steps between validations, samples and checkpoints"),
    seed=(0, SEED, "seed of all random numbers"),
    threads=(0, (0, 1024), "CPU threads; 0: as many as PyTorch chooses"),
    num_nodes=(1, (1,), "argument of Lightning's Trainer"),
    **{name: ("auto", None, "argument of Lightning's Trainer") for name in (
        "accelerator", "devices", "strategy", "precision")})


def settings_of(kind):
    """{name: (default, limits, help)} for runs with a kind of data. InputError: it is none."""
    if not (isinstance(kind, type) and issubclass(kind, Data)):
        raise InputError(f"{kind} is no kind of data: it has to be a subclass of train.Data")
    if missing := {"build", "tokens", "sample", "report"} - {*dir(kind)}:
        raise InputError(f"{kind} is no kind of data: it has no {', '.join(sorted(missing))}")
    known = (MODEL | RUN | kind.own | kind.anew).items()
    return {name: (kind.preset.get(name, setting[0]), *setting[1:]) for name, setting in known}


def option(text):
    """argparse's type of NAME=VALUE -> (name, value): a number, a list …, or else a string."""
    name, value = text.split("=", 1)
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def add_flags(parser, known):
    """A flag for each setting, of the type of its default, within its limits or choices."""
    for name, (default, limits, about) in known.items():
        how = {}                        # a string needs nothing
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, dict):
            how = dict(nargs="+", type=option, metavar="NAME=VALUE")
        elif isinstance(limits, Registry):
            how = named(limits)
        elif isinstance(default, (int, float)):
            how["type"] = number(type(default), *limits or (-math.inf,))

        about += "" if default in ("", {}) else f" (default: {default})"
        parser.add_argument("--" + name.replace("_", "-"), **how, help=about.replace("%", "%%"))


def folder_of(run):
    """The folder of a run, by its name or its preset."""
    return pathlib.Path("runs", re.sub(r"\W", "_", run.name or run.preset))


def settings(path):
    """The settings with which a checkpoint was made, and the steps that it has had. InputError: it
    is not there, damaged, or does not say."""
    saved = opened(path)
    if "Keep" not in saved.get("callbacks", {}):
        raise InputError(f"{path} does not say how it was trained")
    return saved["callbacks"]["Keep"]["run"], saved["global_step"]


def parse(argv=None):
    """The settings of a run: the defaults, those of its kind of data, those of a checkpoint to be
    resumed, and flags, each over the ones before. InputError: they do not go together."""
    early = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    early.add_argument("--preset", **named(DATA), help="kind of data, with settings for it")
    early.add_argument("--name", help="the run's folder is runs/<name>/ (default: the preset)")
    early.add_argument("--resume", action="store_true", help="go on from that folder's model.ckpt")
    first, others = early.parse_known_args(argv)
    flags = {word.partition("=")[0] for word in others}
    preset = first.preset or ("folder" if "--data" in flags else "toy")
    preset = "ar-text" if preset == "ar" and "--text" in flags else preset

    known = settings_of(DATA[preset])
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, parents=[early],
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add_flags(parser, known)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    given |= {k: dict(given[k]) for k in ("path_options", "trunk_options") if k in given}

    saved, first.preset = {}, preset
    if first.resume:
        saved, _ = settings(path := folder_of(first) / "model.ckpt")
        for name in given.keys() - {*vars(first), *RUN, *DATA[preset].anew}:
            if given[name] != saved.get(name):
                raise InputError(f"--{name.replace('_', '-')} {given[name]} contradicts {path}, "
                                 f"which has {saved.get(name)}: leave it out")
    usual = {k: v[0] for k, v in known.items()}
    return argparse.Namespace(**usual | saved | given | vars(first))


# -------------------------------------------------------------------------- 2. digits and captions

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
    yes_no = [f"is {word}? {'yes' if word in caption else 'no'}" for word in ("bold", "slanted")]
    return [f"what digit? {caption.split()[-1]}", *yes_no]


def read_idx(folder, name):
    """The numbers of one of MNIST's four files, gzipped or not. InputError: it is not there, or
    not whole."""
    path = min(folder.rglob(f"*{name}?idx*"), default=folder / f"{name}-idx")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        shape = np.frombuffer(data, ">u4", data[3], offset=4)
        return torch.tensor(np.frombuffer(data, "u1", offset=4 + 4 * data[3]).reshape(shape))
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is no whole file in MNIST's format: {error}") from error


def read_digits(folder, name):
    """Pictures (N, 1, size, size) in [0, 1] and digits (N,). InputError: they are not that."""
    images, digits = (read_idx(folder, f"{name}-{what}") for what in ("images", "labels"))
    N, side = images.shape[0], images.shape[-1]
    if images.shape != (N, side, side) or digits.shape != (N,) or N < 20 or digits.max() > 9:
        raise InputError(f"{folder} has {name} images {[*images.shape]} and {len(digits)} labels "
                         f"up to {digits.max()}: needed are at least 20 squares, labels up to 9")
    return images[:, None] / 255, digits.long()


# ------------------------------------------------------------ 3. words, patches and backbones

def tokenizer(texts, characters=False, eos=()):
    """A tokenizer, as JSON, of the words and punctuation marks of some texts, in lower case, or of
    their characters. What they do not have is an error; `eos` is another word, the last one."""
    made = Tokenizer(models.WordLevel(unk_token="<unknown>"))
    if characters:
        made.normalizer, made.decoder = normalizers.NFC(), decoders.Fuse()
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\X"), "isolated")
    else:
        made.normalizer = normalizers.Sequence([
            normalizers.NFC(), normalizers.BertNormalizer(strip_accents=False)])
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()

    trainer = trainers.WordLevelTrainer(vocab_size=2 ** 20, show_progress=False)
    made.train_from_iterator((line for text in texts for line in text.splitlines(True)), trainer)
    made.add_tokens([*eos])
    return made.to_str()


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


def load_backbone(run):
    """A pretrained model and tokenizer -> options of `Fudoki`; of `Text` the tokenizer's JSON, its
    closing token and the embedding. InputError: it cannot be had."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as quiet
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        words = AutoTokenizer.from_pretrained(run.backbone)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            run.backbone, use_safetensors=True, dtype="float32", output_loading_info=True)
        if lost := sorted({*loaded["missing_keys"], *loaded["unexpected_keys"]}):
            raise ValueError(f"its file lacks weights, or has others: {', '.join(lost[:4])}")
        tokens = Tokenizer.from_str(words.backend_tokenizer.to_str())
        n, eos = max(tokens.get_vocab().values()) + 1, words.eos_token_id
        if eos is None or n > len(model.get_input_embeddings().weight):
            raise ValueError("its tokenizer has no token that ends a text, or too many tokens")
    except Exception as error:          # whatever these libraries and their files say
        raise InputError(f"the backbone {run.backbone} cannot be loaded as a language model with "
                         f"safetensors and tokenizer.json: {first_line(error)}") from error
    tokens.no_truncation()              # a saved tokenizer may cut and fill up texts, or drop
    tokens.no_padding()                 # parts of words
    if hasattr(tokens.model, "dropout"):
        tokens.model.dropout = None

    model.resize_token_embeddings(n)    # drops ids that no text has: they would be noise
    about = "_name_or_path", "architectures", "transformers_version", "quantization_config"
    config = {k: v for k, v in model.config.to_dict().items() if k not in about}
    bos = eos if words.bos_token_id is None else words.bos_token_id
    trunk = dict(trunk="backbone", pretrained=model,
                 trunk_options=dict(config=config, bos=bos) | run.trunk_options)
    return trunk, tokens.to_str(), eos, F.normalize(model.get_input_embeddings().weight.detach())


# -------------------------------------------------------------------------------- 4. kinds of data

class Data:
    """A kind of data, an entry of DATA, says all that a training has to know about it.

    preset: defaults that suit it, {name: value}; own: settings of its own, {name: (default,
    limits, help)}; anew: the same for those that may change when a run is resumed or scored.

    Kind(run) loads the data, says their `origin`, and leaves `run` as it is. Then
    build(run) -> a model that fits, by `make`;
    tokens(model) -> rows for training and for validation, {name: (N, L)} long each, in which row
    i of every modality belongs together;
    sample(model, path) writes what a model can do into files that begin with `path`;
    report(model, run, options) measures it: yields (what, {column: number});
    prompt: what to ask of sample.py first.
    """
    preset, own, anew = {}, {}, {}
    origin, prompt = "data of your own", "___"

    def make(self, run, tokens, frequency, share=None, notes=None, **backbone):
        """A new model with the settings of a run. InputError: the data have one kind of token
        only, or the backbone does not fit."""
        for m, count in frequency.items():
            if (count > 0).sum() < 2:
                raise InputError(f"all {m} tokens of {self.origin} are alike: nothing to learn")

        names = "path path_options clock trunk loss optimizer lr t_power drop clean".split()
        sizes = dict(width=run.width, depth=run.depth, heads=run.heads) | run.trunk_options
        known = dict(preset=run.preset, data=self.origin, captions=None, asks=False)

        options = {name: vars(run)[name] for name in names} | dict(
            tokens=tokens, frequency=frequency, share=share, notes=known | (notes or {}),
            trunk_options=sizes)
        contract("parts", options | backbone)
        return Fudoki(**options | backbone)


class Pictures(Data):
    """Pictures with captions. A kind of them adds train, held_out and test, each pictures and
    labels; captions(pictures, labels); text, the arguments of Text; examples, captions to draw;
    notes for sample.py."""
    preset = dict(t_power=3.)
    own = dict(codes=(256, (2, 2 ** 16), "size of the codebook of patches"),
               patch=(4, (1,), "side of a patch in pixels"),
               share=(0.5, (0.01, 0.99), "share of a batch that is drawn; the rest is read"))

    def build(self, run):
        images, size = self.train[0], self.train[0].shape[-1]
        if size % run.patch:
            raise InputError(f"--patch {run.patch} does not divide the pictures' side, {size}")

        n = 8000 * 49 * run.patch ** 2 // size ** 2         # of pictures, for as many patches
        some = images[torch.randperm(len(images))[:max(1, n)]]
        patches = F.unfold(some, run.patch, stride=run.patch).mT.flatten(0, 1)
        image = [self.codebook(patches, run.codes), run.patch, size, images.shape[1]]
        frequency = {"image": torch.bincount(Patches(*image).encode(some).flatten(),
                                             minlength=len(image[0]))}

        backbone, text, notes = {}, self.text, self.notes
        if run.backbone:                                    # its words instead of those of `text`
            backbone, made, eos, embedding = load_backbone(run)
            words = Text(made, math.inf, eos).encode(self.examples)
            text = [made, words.shape[1], eos, False, embedding]
            frequency["text"] = torch.bincount(words.flatten(), minlength=len(embedding))
            notes = notes | dict(read=dict(steps=4))        # a word has parts that have to agree

        return self.make(run, dict(text=text, image=image), frequency,
                         {"image": run.share, "text": 1 - run.share}, notes, **backbone)

    def codebook(self, patches, n):
        """At most n patches that stand for all: (N, D) -> (≤ n, D)"""
        return k_means(patches, n)

    def captions(self, images, labels):
        """What pictures (B, C, size, size) with these labels show: -> list of B strings"""
        return labels

    def rows(self, model, images, labels):
        """Tokens of pictures and captions, and the captions. InputError: another size."""
        kind = model.tokens["image"]
        if images.shape[-1] != kind.size:
            raise InputError(f"{self.origin} has pictures of another size than {kind.size} pixels")
        image = kind.encode(images.to(model.device))
        texts = self.captions(kind.decode(image).cpu(), labels)
        return dict(text=model.tokens["text"].encode(texts), image=image.cpu()), texts

    def tokens(self, model):
        held_out = (part[:1000] for part in self.held_out)
        return self.rows(model, *self.train)[0], self.rows(model, *held_out)[0]

    prompt = property(lambda self: self.examples[-3:][0])

    def sample(self, model, path):
        save_image(draw(model, self.examples[:40]), path.with_suffix(".png"), nrow=10)
        save_image(self.test[0][0], path.parents[1] / "picture.png")        # one to be read


class Digits(Pictures):
    """MNIST, or digits like it in a folder, captioned by a rule."""
    own = Pictures.own | dict(
        train_images=(60_000, (20,), "number of training images"),
        ask=(0.15, (0, 0.99), "share of training images whose caption is a question with its "
             "answer; 0 with a backbone"))
    anew = dict(
        data_dir=("", None, "a folder with digits in MNIST's format; else MNIST comes to data/"),
        test_images=(10_000, (20,), "number of test images that the report reads"),
        drawings=(1000, (2,), "number of images that the report draws"))
    examples = [f"a {a} {b} {c}" for a in WEIGHTS for b in SLANTS for c in DIGITS]
    captions = staticmethod(captions)

    def __init__(self, run):
        if not pathlib.Path(__file__).with_name("tests").is_dir():
            raise InputError("digits need the folder tests beside train.py: their judge is there")
        known, test = self.load(run)
        if known[0].shape[1:] != test[0].shape[1:]:
            raise InputError(f"{self.origin}: images for training and testing differ in size")
        images, digits = (part[:run.train_images] for part in known)
        n = min(1000, len(images) // 10)
        self.train, self.held_out = (images[n:], digits[n:]), (images[:n], digits[:n])
        self.test = tuple(part[:run.test_images] for part in test)

        self.ask = 0. if run.backbone else run.ask
        self.notes = dict(form="digit", captions=self.examples, asks=self.ask > 0)
        asked = [text for caption in self.examples for text in questions(caption)]
        self.text = [tokenizer(self.examples + asked if self.ask else self.examples), 4]

    def load(self, run):
        """Images and digits for training and for testing; sets `origin`. MNIST is downloaded to
        data/ whole or not at all. InputError: they are not as they have to be."""
        folder = pathlib.Path(run.data_dir or "data")
        self.origin = f"the digits in {folder.resolve().name}" if run.data_dir else "MNIST"

        if not (run.data_dir or any(folder.glob("MNIST/raw/*"))):
            try:
                with tempfile.TemporaryDirectory() as new:
                    MNIST(new, download=True)
                    shutil.copytree(new, folder, dirs_exist_ok=True)
            except (OSError, RuntimeError):
                print("MNIST CANNOT BE DOWNLOADED: these are rendered digits. Or use --data-dir.")
                self.origin = "digits rendered with a font, since MNIST could not be downloaded"
                return DATA["smoke"].load(self, run)

        return read_digits(folder, "train"), read_digits(folder, "t10k")

    def tokens(self, model):
        training, held_out = super().tokens(model)
        picked = torch.randperm(len(training["text"]))[:int(len(training["text"]) * self.ask)]
        if len(picked):                                     # these have a question instead
            texts = model.tokens["text"].decode(training["text"][picked])
            which = torch.randint(3, (len(texts),))
            asked = [questions(text)[i] for text, i in zip(texts, which)]
            training["text"][picked] = model.tokens["text"].encode(asked)
        return training, held_out

    def report(self, model, run, options):
        """By a judge that knows real digits, in tests/worlds/digits.py."""
        return DATA["smoke"].report(self, model, run, options)


def metadata(folder):
    """(file, caption) of the rows of a folder's metadata.csv or metadata.jsonl. InputError: it is
    not there, or not as it has to be, or a caption is empty."""
    path = next(iter(folder.glob("metadata.jsonl")), folder / "metadata.csv")
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            rows = (map(json.loads, lines) if path.suffix == ".jsonl" else
                    csv.DictReader(lines, strict=True, restkey="text"))     # too many: no text
            pairs = [(folder / row["file_name"], row["text"].strip()) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(f"{path} has to be in UTF-8 with the columns file_name and text, a text "
                         f"with commas or line breaks in quotation marks: {error!r}") from error

    if empty := [file.name for file, text in pairs if not re.search(r"\w", text)]:
        raise InputError(f"{path}: {empty[0]} has no text")
    return pairs


class Folder(Pictures):
    """Pictures and captions of a user: a folder with a metadata.csv or metadata.jsonl. A tenth of
    the pictures, with all their captions, is for testing, another for validation."""
    preset = Pictures.preset | dict(batch=32)
    own = Pictures.own | dict(image_size=(64, (4, 4096), "side of the scaled pictures in pixels"))
    anew = dict(data=("", None, "the folder: pictures, and a metadata.csv or metadata.jsonl with "
                      "the columns file_name and text"))

    def __init__(self, run):
        folder, known, rows = pathlib.Path(run.data), {}, []
        for file, text in metadata(folder):
            if file not in known:
                image = open_picture(file).convert("RGB")
                known[file] = zlib.crc32(image.tobytes()), middle_square(image, run.image_size, 3)
            rows.append((*known[file], re.sub("_{3,}", "__", text)))        # "___" is a blank

        # a picture's tenth follows from its pixels, so that copies in any format stay together
        sums = sorted({checksum for checksum, _ in known.values()}, key=lambda c: (c % 10, c))
        if len(sums) < 20:
            raise InputError(f"{folder} has {len(sums)} different pictures; 20 are needed")
        parts = [], [], []
        for checksum, image, text in rows:
            tenth = checksum % 10 if checksum not in sums[:2] else sums.index(checksum)
            parts[min(tenth, 2)].append((image, text))
        self.test, self.held_out, self.train = (
            (torch.stack([image for image, _ in part]), [text for _, text in part])
            for part in parts)

        self.origin = f"the folder {folder.resolve().name}"
        self.examples = list(dict.fromkeys(text for *_, text in rows))
        made = tokenizer(self.examples, eos=["<end>"])
        words = Text(made, math.inf)
        longest = max(len(words.ids(text)) for text in self.examples)
        self.text = [made, longest + 1, len(words.embedding) - 1]
        self.notes = dict(form="square", asks=any("?" in text for text in self.examples))

    def report(self, model, run, options):
        """How many captions of test pictures are read right, and what the model itself reads in
        its drawings of these captions."""
        rows, texts = self.rows(model, *self.test)
        truth = [text.split() for text in model.tokens["text"].decode(rows["text"])]
        asked = ["".join(text.rpartition("?")[:2]) + " ___" for text in texts]
        drawn = model.tokens["image"].encode(draw(model, texts, **options))
        for what, image in (("reading", rows["image"]), ("drawing, read by the model", drawn)):
            found = [text.split() for text in read(model, image, asked)]
            words = sum(sum(a == b for a, b in zip(*pair)) for pair in zip(found, truth))
            yield what, dict(captions=sum(map(list.__eq__, found, truth)) / len(truth),
                             words=words / sum(map(len, truth)))


class Corpus(Data):
    """A long text. The last tenth is held out."""
    preset = dict(width=128, heads=4, batch=32, steps=1600)
    own = dict(length=(128, (2,), "tokens in a training window"))
    anew = dict(text=("", None, "the file, in UTF-8; <|endoftext|> stands between documents"),
                test_images=(200, (1,), "number of held-out windows in the report"))

    def __init__(self, run):
        try:
            text = pathlib.Path(run.text).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise InputError(f"--text '{run.text}' is no file in UTF-8") from error
        self.origin = f"the text {pathlib.Path(run.text).name}"
        self.prompt = "".join(text.split()[:1]).lstrip("-_") + "___"
        self.train, self.test = text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]
        if len(self.test) < 10 * run.length:
            raise InputError(f"{len(text)} characters are too few for --length {run.length}")

    def build(self, run):
        backbone, made, eos, embedding = load_backbone(run) if run.backbone else (
            {}, tokenizer([self.train, self.test], characters=True), None, None)
        text = [made, run.length, None, True, embedding]
        words = Text(*text)
        count = torch.bincount(self.stream(words, self.train, eos), minlength=len(words.embedding))
        return self.make(run, {"text": text}, {"text": count}, notes=dict(eos=eos), **backbone)

    def stream(self, words, text, eos):
        """A long text as tokens (N,); a backbone's closing token stands between its documents."""
        rows = map(words.ids, text.splitlines(keepends=True))   # all at once takes much memory
        if eos is not None:
            rows = (words.ids(part.strip()) + [eos] for part in text.split("<|endoftext|>"))
        return torch.tensor(list(itertools.chain.from_iterable(rows)))

    def tokens(self, model):
        """Training windows, which begin anywhere, and held-out ones, side by side."""
        words, eos = model.tokens["text"], model.hparams.notes["eos"]
        training, held_out = (self.stream(words, text, eos) for text in (self.train, self.test))
        return (dict(text=training.unfold(0, words.length, 1)),
                dict(text=held_out.unfold(0, words.length, words.length)[:1000]))

    def sample(self, model, path):
        texts = write(model, ["___"] * 4)
        path.with_suffix(".txt").write_text("\n\n----\n\n".join(texts), encoding="utf-8")

    @torch.no_grad()
    def report(self, model, run, options):
        """Cross-entropy of held-out text by t."""
        windows = self.tokens(model)[1]["text"][:run.test_images].to(model.device)
        for t in torch.linspace(0.05, 0.95, 10).tolist():
            parts = [{"text": x} for x in windows.split(20)]
            losses = [model.loss(x, model.mark_free(x, "text"), t)[0].item() for x in parts]
            yield f"held-out cross-entropy at t = {t:.2f}", dict(value=sum(losses) / len(losses))


BACKBONE = dict(backbone="HuggingFaceTB/SmolLM2-135M")


class AdaptedDigits(Digits):
    """Digits, learned by a pretrained causal language model. Its matrices are much larger than
    those of a new trunk, and so is the learning rate."""
    preset = Digits.preset | BACKBONE | dict(lr=2e-2)


class AdaptedCorpus(Corpus):
    """A text, learned by a pretrained causal language model."""
    preset = Corpus.preset | BACKBONE | dict(optimizer="adamw", lr=3e-4, batch=16, steps=5000)


# exercise: a kind of data of your own is a class like these
DATA = Registry({"toy": Digits, "folder": Folder, "text": Corpus, "ar": AdaptedDigits,
                 "ar-text": AdaptedCorpus, "smoke": "tests/worlds/digits:Rendered",
                 "scenes": "tests/worlds/scenes:Scenes"})


# ------------------------------------------------------------------------------------ 5. training

def orthogonal(g):
    """About U Vᵀ of each g = U S Vᵀ, by five Newton–Schulz rounds: (…, m, n) -> (…, m, n)."""
    if g.shape[-2] > g.shape[-1]:
        return orthogonal(g.mT).mT
    x = g / g.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):                  # a polynomial that takes all of (0, 1] to .7 … 1.2
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW, except that a group with `matrices` moves along U Vᵀ of its momentum U S Vᵀ: equally
    far in all directions, also in those in which the gradient is small (K. Jordan et al., 2024).
    The length of a step is about AdamW's (2502.16982). Matrices of one shape are stacked, which is
    faster on a GPU. It computes in float32, since few CPUs are fast in bfloat16."""

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None

        for group in self.param_groups:
            known = [p for p in group["params"] if group["matrices"] and p.grad is not None]
            for shape in {p.shape for p in known}:
                same = [p for p in known if p.shape == shape]
                for p in same:
                    if not self.state[p]:       # AdamW, when restored, wants all to have a step
                        self.state[p].update(step=torch.tensor(0.), m=torch.zeros_like(p))

                g, m = [p.grad for p in same], [self.state[p]["m"] for p in same]
                torch._foreach_lerp_(m, g, 0.05)
                uv = orthogonal(torch.stack(torch._foreach_lerp(g, m, 0.95)))
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(same, uv.unbind(), alpha=group["lr"] * 0.2 * max(shape) ** 0.5)
                for p in same:
                    p.grad = None               # AdamW passes it by

        super().step()
        return loss


OPTIMIZERS["muon"] = Muon


class Batches:
    """Batches of rows in random order, {name: (B, N)}, a part of each for every rank. They depend
    on the seed and the step alone, so that a resumed run sees what it would have seen."""

    def __init__(self, rows, run, trainer, done):
        self.rows, self.run, self.trainer, self.done = rows, run, trainer, done

    def __len__(self):
        return self.run.steps

    def __iter__(self):
        n, ranks = self.run.batch * self.trainer.world_size, self.trainer.world_size
        order = iter(RandomSampler(next(iter(self.rows.values())), num_samples=n * len(self),
                                   generator=torch.Generator().manual_seed(self.run.seed)))
        for step in range(len(self)):
            rows = list(itertools.islice(order, n))[self.trainer.global_rank::ranks]
            if step >= self.done:
                yield take(self.rows, torch.tensor(rows))


class Keep(L.Callback):
    """Samples and a checkpoint at every validation, and a checkpoint at the end, whatever ends the
    training. Lightning calls it before the averaging: it samples with the average, saves both."""

    def __init__(self, run, folder, data):
        self.run, self.folder, self.data, self.signals = run, folder, data, []
        self.path = folder / "model.ckpt"
        self.written = self.path.stat().st_mtime_ns if run.resume else None

    def state_dict(self):
        return dict(run=vars(self.run))                 # see `settings`

    def on_train_start(self, trainer, model):
        """From now on a signal is only noted, until Lightning gives the handlers back. Python
        allows this in the main thread alone."""
        known = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"} & {*dir(signal)}
        main = threading.current_thread() is threading.main_thread()
        for kind in (getattr(signal, name) for name in known if main):
            if signal.getsignal(kind) != signal.SIG_IGN:        # nohup has this one ignored
                signal.signal(kind, lambda *seen: self.signals.append(seen))

    def on_train_batch_start(self, trainer, model, batch, index):
        """Noise is a function of the seed, the step and the rank, as in a run without a break."""
        torch.manual_seed(hash((self.run.seed, trainer.global_step, trainer.global_rank)))

    def on_train_batch_end(self, trainer, model, outputs, batch, index):
        """A signal to one rank ends the training on all, after this step."""
        trainer.should_stop |= trainer.strategy.reduce_boolean_decision(bool(self.signals), False)
        if trainer.global_step % 20 == 0:
            self.check(trainer, model)

    def check(self, trainer, model):
        """InputError: the training has gone wrong. What was saved before stays."""
        if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
            raise InputError(f"weights are not finite at step {trainer.global_step}: lower --lr")

    on_validation_start = check

    def on_validation_epoch_end(self, trainer, model):
        if trainer.is_global_zero:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.data.sample(model, self.folder / f"samples/step_{trainer.global_step:06d}")

    def on_validation_end(self, trainer, model):
        """Writes model.ckpt whole or not at all; that of an older run becomes previous.ckpt.
        InputError: another run has written there meanwhile."""
        self.check(trainer, model)
        trainer.save_checkpoint(new := self.path.with_suffix(".part"))
        if trainer.is_global_zero:
            if self.path.exists() and self.path.stat().st_mtime_ns != self.written:
                if self.written:
                    raise InputError(f"another run writes {self.path}, too: give one of them "
                                     "another --name")
                self.path.replace(self.path.with_name("previous.ckpt"))
            self.written = new.replace(self.path).stat().st_mtime_ns

    on_train_end = on_validation_end


def make_trainer(run, keep):
    """Lightning's Trainer with the settings of a run. InputError: it refuses them."""
    on_gpu = torch.cuda.is_available() and run.accelerator in ("auto", "gpu", "cuda")
    auto = ("bf16" if torch.cuda.is_bf16_supported() else "16") + "-mixed" if on_gpu else "32-true"

    def average(mean, now, n):          # at first the mean follows closely, it has seen little
        torch._foreach_lerp_(mean, [p.float() for p in now], max(1 - run.ema, 9 / (10 + n)))

    try:
        return L.Trainer(
            accelerator=run.accelerator, devices=run.devices, num_nodes=run.num_nodes,
            strategy=run.strategy, max_steps=run.steps, logger=CSVLogger(keep.folder, "log"),
            precision=auto if run.precision == "auto" else run.precision, log_every_n_steps=50,
            val_check_interval=run.val_every, check_val_every_n_epoch=None, num_sanity_val_steps=0,
            enable_model_summary=False, enable_checkpointing=False, gradient_clip_val=1.0,
            callbacks=[TQDMProgressBar(refresh_rate=10), keep,
                       WeightAveraging(use_buffers=False, multi_avg_fn=average)])
    except Exception as error:
        raise InputError(f"Lightning: {first_line(error)}") from error


def fit(trainer, model, data, run, done=0, path=None):
    """Trains with Lightning, from the checkpoint `path` on, if there is one, which has `done`
    steps; the model ends with its averaged weights. -> samples per second, with validations"""
    L.seed_everything(run.seed, verbose=False)          # what follows is the same when resumed
    try:
        rows, held_out = data.tokens(model)
    except ValueError as error:
        raise InputError(f"{data.origin} does not fit the model: {error}") from error
    contract("rows", model, rows, held_out)
    batches, n = Batches(rows, run, trainer, done), 10 * run.batch
    validation = [take(held_out, slice(i, i + n)) for i in range(0, 1000, n)]

    started = time.time()
    trainer.fit(model.train(), batches, DataLoader(validation, batch_size=None), ckpt_path=path,
                weights_only=True)
    model.to(trainer.strategy.root_device).eval()       # Lightning hands it back on the CPU
    return (trainer.global_step - done) * run.batch * trainer.world_size / (time.time() - started)


# ----------------------------------------------------------------------------- 6. report and main

def report(model, data, run, options, path, **same):
    """Measures what a model can do, always with the same random numbers; prints it and adds it to
    a CSV file, every row with the columns of `same`. InputError: the file has other columns."""
    L.seed_everything(run.seed, verbose=False)
    rows = []
    for what, numbers in data.report(model, run, options):
        print(f"{what:50}", *(f"{name} {n:.3f}" for name, n in numbers.items()), flush=True)
        rows.append({"what": what, **numbers})

    same |= dict(seed=run.seed, data=data.origin, device=model.device.type)
    columns = list(dict.fromkeys([name for row in rows for name in row] + [*same]))
    if path:
        with open(path, "a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            head = next(csv.reader(file), None)
            if head not in (None, columns):
                raise InputError(f"{path} has other columns than this report, which is not added")
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            if head is None:
                writer.writeheader()
            writer.writerows(row | same for row in rows)


def quietly(run):
    """Seeds and threads; libraries print no messages."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(run.seed, verbose=False)
    torch.set_num_threads(run.threads or torch.get_num_threads())


def score(argv):
    """The report of a checkpoint, which is named first, with any options of generation."""
    model, path = open_model(argv[0] if argv and not argv[0].startswith("-") else None)
    saved, done = settings(path)
    kind = DATA[saved["preset"]]
    parser = argparse.ArgumentParser(prog="train.py score", description=score.__doc__)
    parser.add_argument("checkpoint", nargs="?", help="default: newest under runs/, or else toy")
    parser.add_argument("--csv", help="a file to which the report is added")
    add_generation(parser)
    add_flags(parser, {name: settings_of(kind)[name] for name in [*kind.anew, "seed"]})
    given = parser.parse_args(argv)

    run = {name: setting[0] for name, setting in settings_of(kind).items()} | saved
    run |= {name: v for name, v in vars(given).items() if name in run and v is not None}
    run, options = argparse.Namespace(**run), dict(step="race", velocity=None, late=1.)
    options |= (defaults(model, "draw") if "image" in model.tokens else WRITE) | generation(given)
    quietly(run)
    contract("parts", dict(model.hparams) | options)
    report(model, kind(run), run, options, given.csv, training_steps=done, checkpoint=path,
           **options, command=" ".join(["python train.py score", *argv]))


def train(argv):
    """Data, codebook, model, training, report."""
    run, started = parse(argv), time.time()
    folder = folder_of(run)
    quietly(run)
    data, path, done = DATA[run.preset](run), None, 0
    trainer = make_trainer(run, Keep(run, folder, data))
    if run.resume:
        model, path = open_model(folder / "model.ckpt")
        done = settings(path)[1]
        contract("parts", model.hparams)
    else:
        model = data.build(run)

    (folder / "samples").mkdir(parents=True, exist_ok=True)     # if it fails, then before
    count = sum(p.numel() for p in model.net.parameters())
    what = " and ".join(f"{kind.length} {m} tokens" for m, kind in model.tokens.items())
    print(f"{data.origin}: {what} in a row; {count / 1e6:.2f} M parameters", flush=True)

    rate = fit(trainer, model, data, run, done, path)
    if trainer.global_step < run.steps:                 # a signal has ended it
        print(f"\nstopped; {folder / 'model.ckpt'} is saved, go on with --resume")
    elif trainer.is_global_zero:                        # one process reports
        data.sample(model, folder / "samples/end")
        (folder / "report.csv").unlink(missing_ok=True)
        minutes = (time.time() - started) / 60
        report(model, data, run, {}, folder / "report.csv", training_steps=trainer.global_step,
               minutes=f"{minutes:.2f}", samples_per_s=f"{rate:.1f}",
               command=" ".join(["python train.py", *argv]))
        print(f"\n{minutes:.1f} minutes, {rate:.1f} samples/s in training; model and samples: "
              f"{folder}. Next:\n  python sample.py", json.dumps(data.prompt, ensure_ascii=False))


@command
def main(argv=None):
    """Data, codebook, model, training, report; or a report only."""
    argv = sys.argv[1:] if argv is None else argv
    score(argv[1:]) if argv[:1] == ["score"] else train(argv)


if __name__ == "__main__":
    from train import main          # the module that data of one's own import as `train`, too
    sys.exit(main())
