"""Draws from words, reads pictures and writes texts, with a model that train.py has made:

    python sample.py "a bold slanted seven"
    python sample.py "seven"                    the other words are left to chance
    python sample.py --image picture.png        its caption
    python sample.py --text "The ___"           goes on; within a text, ___ are three tokens
    python sample.py                            a text from nothing

Whatever is not given is free, and one and the same function fills it.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # threads that wait do not spin

import argparse
import math
import pathlib
import shutil
import sys
import warnings

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from fudoki import (STEPS, UNREADABLE, Fudoki, InputError, Parser, command, crop, nearest,
                    open_picture)


def parse(argv=None):
    """The command line. InputError: a value that cannot be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="*", help='what to draw, e.g. "a bold slanted seven", '
                        "or the text to be filled")
    parser.add_argument("--text", help="the same: a caption, or the text to be filled")
    parser.add_argument("--image", help="a picture to read: any size, colour or grey")
    parser.add_argument("--checkpoint", help="default: the newest under runs/")
    parser.add_argument("--n", type=int, help="pictures to draw (default: 16), texts to write (1)")
    parser.add_argument("--steps", type=int, help=f"default: {Fudoki.DRAW['steps']} to draw, "
                        f"{Fudoki.READ['steps']} to read, {Fudoki.WRITE['steps']} to write")
    parser.add_argument("--step", default="race", help=f"{', '.join(STEPS)} (default: race)")
    parser.add_argument("--guidance", type=float, help="g of u + g(c − u), 1 is off "
                        f"(default: {Fudoki.DRAW['guidance']:g} to draw, 1 for text)")
    parser.add_argument("--temperature", type=float, help="of x₁ ~ p(x₁ | x_t), 0 is greedy "
                        f"(default: {Fudoki.DRAW['temperature']:g} to draw, 0 to read, "
                        f"{Fudoki.WRITE['temperature']:g} to write)")
    parser.add_argument("--seed", type=int, help="default: another result every time")
    parser.add_argument("--out", default="samples.png", help="the picture (default: samples.png)")
    given = parser.parse_args(argv)
    given.prompt = " ".join(given.prompt + ([given.text] if given.text else []))
    for name, least in (("n", 1), ("steps", 1), ("temperature", 0)):
        value = getattr(given, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name} has to be at least {least}, it is {value:g}")
    if given.step not in STEPS:
        raise InputError(f"no step {given.step}; {nearest(given.step, STEPS)}")
    out = pathlib.Path(given.out)
    if out.suffix.lower() != ".png" or not out.resolve().parent.is_dir():
        raise InputError(f"--out {out} has to be a name ending in .png, in a folder that exists")
    return given


def training_form(grey, size):
    """A digit as in training: light on dark, and if the size differs cut out, scaled to 20/28 of
    the side and put with its centre of mass in the middle. (H, W) -> (1, size, size) and
    what was done, in words. InputError: there is nothing on it."""
    done = []
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    if np.median(border) > 0.5:
        grey, border = 1 - grey, 1 - border
        done.append("dark on light turned into light on dark")
    if np.ptp(grey) < 0.1:
        raise InputError("the picture is empty: all of it has one brightness")
    if grey.shape != (size, size):
        grey = (grey - np.median(border)).clip(0)
        grey = grey / grey.max()
        rows, columns = np.where((grey > 0.3).any(1))[0], np.where((grey > 0.3).any(0))[0]
        ink = torch.from_numpy(grey[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1])[None, None]
        scale = size * 20 / 28 / max(ink.shape)
        shape = [max(1, round(side * scale)) for side in ink.shape[2:]]
        ink = F.interpolate(ink, shape, mode="bilinear", antialias=True)[0, 0].numpy()
        corner = []
        for axis, n in enumerate(ink.shape):
            centre = (ink.sum(1 - axis) * (np.arange(n) + 0.5)).sum() / ink.sum()
            corner.append(min(max(0, round(size / 2 - centre)), size - n))
        grey = np.zeros((size, size), np.float32)
        grey[corner[0]:corner[0] + ink.shape[0], corner[1]:corner[1] + ink.shape[1]] = ink
        done.append(f"cut out, scaled and centred in {size}×{size}")
    return torch.from_numpy(np.ascontiguousarray(grey))[None], done


def see(path, model):
    """A picture file as the model's training saw them: -> (1, C, size, size); says what was done.
    InputError: it cannot be read."""
    try:
        picture = open_picture(path)
    except FileNotFoundError as error:
        raise InputError(f"there is no picture {path}") from error
    except UNREADABLE as error:
        raise InputError(f"{path} is no picture that can be read") from error
    said, size = [f"{picture.width}×{picture.height} {picture.mode}"], model.patches.size
    if model.hparams.form == "digit":
        grey = np.asarray(picture.convert("L"), dtype=np.float32) / 255
        image, done = training_form(grey, size)
    else:
        image, done = crop(picture, size, model.patches.channels), ["its middle square"]
    print(f"{path}: {'; '.join(said + done)}")
    return image[None]


def preview(images):
    """Prints as many pictures (B, C, H, W) side by side as fit, two rows of pixels to a line."""
    fit = max(1, shutil.get_terminal_size().columns // images.shape[-1])
    wide = torch.cat(list(images[:fit].mean(1).cpu()), 1)
    lines = F.avg_pool2d(wide[None], (2, 1))[0].clamp(0, 1)
    for line in (4 * lines).round().long().tolist():
        print("".join(" ░▒▓█"[level] for level in line).rstrip())


@command
def main(argv=None):
    """Fills what is free, and shows it."""
    given = parse(argv)
    warnings.simplefilter("ignore", FutureWarning)      # what libraries plan is no news for users
    model = Fudoki.open(given.checkpoint)
    print(f"{model.source}, trained on {model.hparams.data}")
    if given.seed is not None:
        L.seed_everything(given.seed, verbose=False)
    alone = model.patches is None
    if alone and given.image:
        raise InputError("this model knows texts only, no pictures")
    if not (alone or given.prompt or given.image):
        raise InputError("say what to draw, in words of its captions, or read (--image FILE)")
    known, n, gaps = {}, 1 if given.image else given.n or (1 if alone else 16), True
    if given.prompt or alone:
        known["text"] = model.words.encode([given.prompt or "___"]).expand(n, -1)
        gaps = bool((known["text"] < 0).any())
        if not (given.image or model.hparams.infill):       # it never learned to fill such gaps
            known["text"] = model.words.complete(known["text"])
    if given.image:
        picture = see(given.image, model)
        known["image"] = model.patches.encode(picture.to(model.device))
        preview(model.patches.decode(known["image"]))
    x, free = model.blank(n, **known)
    if not any(f.any() for f in free.values()):
        raise InputError("all is given, nothing is left to fill; ___ is a blank")

    defaults = model.WRITE if alone else model.READ if given.image else model.DRAW
    options = dict(defaults, step=given.step)
    options |= {k: v for k, v in vars(given).items() if k in model.DRAW and v is not None}
    if options.get("guidance", 1) != 1 and all(f.any() for f in free.values()):
        print("guidance is off: no caption is given whole, so there is nothing to leave out")
        options["guidance"] = 1
    states = list(model.generate(x, free, **options))
    calls = options["steps"] * (1 if options.get("guidance", 1) == 1 else 2)
    moves = sum((a[m] != b[m]).sum().item() for a, b in zip(states, states[1:]) for m in x)
    moves /= sum(f.sum().item() for f in free.values())

    if not alone and free["image"].any():
        pictures = model.patches.decode(states[-1]["image"]).clamp(0, 1)
        preview(pictures)
        try:
            save_image(F.interpolate(pictures, scale_factor=4), given.out,
                       nrow=math.ceil(n ** 0.5), padding=8, pad_value=0.3)
        except OSError as error:
            raise InputError(f"{given.out} cannot be written: {error}") from error
        print(f"{given.out}: {n} picture{'s' * (n > 1)}")
    if gaps:
        print("\n".join(model.words.decode(states[-1]["text"])))
    print(f"{calls} network call{'s' * (calls > 1)}; a token changed {moves:.1f} times on average")


if __name__ == "__main__":
    sys.exit(main())
