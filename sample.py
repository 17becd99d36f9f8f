"""Draws from words, and reads pictures, with a model that train.py has made:

    python sample.py "a bold slanted seven"
    python sample.py "seven"                    the other words are left to chance
    python sample.py --image digit.png          its caption

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
from PIL import Image, ImageOps
from torchvision.utils import save_image

from fudoki import STEPS, Fudoki, InputError, Parser, command, nearest


def parse(argv=None):
    """The command line. InputError: a value that cannot be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="*", help='what to draw, e.g. "a bold slanted seven"')
    parser.add_argument("--image", help="a picture to read: any size, colour or grey")
    parser.add_argument("--checkpoint", help="default: the newest under runs/")
    parser.add_argument("--n", type=int, default=16, help="pictures to draw (default: 16)")
    parser.add_argument("--steps", type=int, help=f"default: {Fudoki.DRAW['steps']} to draw, "
                        f"{Fudoki.READ['steps']} to read")
    parser.add_argument("--step", default="race", help=f"{', '.join(STEPS)} (default: race)")
    parser.add_argument("--guidance", type=float, help="g of u + g(c − u), 1 is off "
                        f"(default: {Fudoki.DRAW['guidance']:g} to draw, 1 to read)")
    parser.add_argument("--temperature", type=float, help="of x₁ ~ p(x₁ | x_t), 0 is greedy "
                        f"(default: {Fudoki.DRAW['temperature']:g} to draw, 0 to read)")
    parser.add_argument("--seed", type=int, help="default: another result every time")
    parser.add_argument("--out", default="samples.png", help="the picture (default: samples.png)")
    given = parser.parse_args(argv)
    if not given.prompt and not given.image:
        raise InputError('say what to draw ("a bold slanted seven") or read (--image FILE)')
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


def open_picture(path):
    """A picture file as grey values (H, W) in [0, 1], transparent parts on white, and its size and
    mode in words. InputError: there is none, or it is none."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except FileNotFoundError as error:
        raise InputError(f"there is no picture {path}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no picture that can be read") from error
    said = f"{picture.width}×{picture.height} {picture.mode}"
    if picture.mode[0] in "IF":                         # 16 and 32 bits: whatever range it has
        grey = np.asarray(picture, dtype=np.float32)
        return (grey - grey.min()) / max(grey.max() - grey.min(), 1e-6), said
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("L"), dtype=np.float32) / 255, said


def training_form(grey, size):
    """A digit as in training: light on dark, and if the size differs cut out, scaled to 20/28 of
    the side and put with its centre of mass in the middle. (H, W) -> (1, 1, size, size) and
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
    return torch.from_numpy(np.ascontiguousarray(grey))[None, None], done


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
    known, n, gaps = {}, 1 if given.image else given.n, True
    if given.prompt:
        known["text"] = model.words.encode([" ".join(given.prompt)]).expand(n, -1)
        gaps = bool((known["text"] < 0).any())
        if not given.image and not model.hparams.infill:    # it never learned to fill such gaps
            known["text"] = model.words.complete(known["text"])
    if given.image:
        grey, said = open_picture(given.image)
        picture, done = training_form(grey, model.patches.size)
        print(f"{given.image}: {'; '.join([said, *done])}")
        known["image"] = model.patches.encode(picture.to(model.device))
        preview(model.patches.decode(known["image"]))
    x, free = model.blank(n, **known)
    if not any(f.any() for f in free.values()):
        raise InputError("the picture and its whole caption are given: nothing is left to fill")

    options = dict(model.READ if given.image else model.DRAW, step=given.step)
    options |= {k: v for k, v in vars(given).items() if k in model.DRAW and v is not None}
    if options.get("guidance", 1) != 1 and all(f.any() for f in free.values()):
        print("guidance is off: no caption is given whole, so there is nothing to leave out")
        options["guidance"] = 1
    states = list(model.generate(x, free, **options))
    calls = options["steps"] * (1 if options.get("guidance", 1) == 1 else 2)
    moves = sum((a[m] != b[m]).sum().item() for a, b in zip(states, states[1:]) for m in x)
    moves /= sum(f.sum().item() for f in free.values())

    if free["image"].any():
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
