"""Draws from words, reads pictures, answers questions, writes texts, with a model of train.py:

    python sample.py "a bold slanted seven"
    python sample.py "seven"                    the other words are left to chance
    python sample.py                            a picture with its caption, or a text
    python sample.py --image picture.png        its caption
    python sample.py --image picture.png --ask "what digit"
    python sample.py --image picture.png "a bold ___ seven"         the missing word
    python sample.py --image picture.png --keep top "a bold three"  draws the rest anew
    python sample.py --image picture.png --from 0.5 "a bold seven"  another version of it
    python sample.py --text "The ___"           goes on; within it, ___ are three tokens

Whatever is not given is free, and one and the same function fills it.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # threads that wait do not spin

import argparse
import csv
import math
import pathlib
import re
import shutil
import sys
import warnings

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from fudoki import (STEPS, UNREADABLE, Fudoki, InputError, Parser, command, crop, nearest,
                    open_picture, take)


def add_generation(parser):
    """The options of `generate`, as flags; None where the default depends on what is free."""
    draw, read, gaps, write = Fudoki.DRAW, Fudoki.READ, Fudoki.GAPS, Fudoki.WRITE
    parser.add_argument("--steps", type=int, help=f"default: {draw['steps']} to draw, "
                        f"{read['steps']} to read, {gaps['steps']} to fill a caption, "
                        f"{write['steps']} to write")
    parser.add_argument("--step", default="race", help=f"{', '.join(STEPS)} (default: race)")
    parser.add_argument("--eta", type=float, default=0., help="corrector: share of tokens that "
                        "every step draws anew (default: 0)")
    parser.add_argument("--guidance", type=float, help="g of u + g(c − u), 1 is off "
                        f"(default: {draw['guidance']:g} to draw, 1 for text)")
    parser.add_argument("--temperature", type=float, help="of x₁ ~ p(x₁ | x_t), 0 is greedy "
                        f"(default: {draw['temperature']:g} to draw, {read['temperature']:g} to "
                        f"read, {write['temperature']:g} to write)")


def generation(given):
    """What was given of them: options of `generate`. InputError: a value that cannot be."""
    for name, least, most in (("eta", 0, 1), ("steps", 1, math.inf), ("temperature", 0, math.inf)):
        bounded(given, name, least, most)
    if given.step not in STEPS:
        raise InputError(f"no step {given.step}; {nearest(given.step, STEPS)}")
    return {name: value for name in ("steps", "step", "eta", "guidance", "temperature")
            if (value := getattr(given, name)) is not None}


def bounded(given, name, least, most=math.inf):
    """InputError: a number that is given and does not lie between."""
    value = getattr(given, name)
    if value is not None and not (least <= value <= most and value < math.inf):
        raise InputError(f"--{name.replace('_', '-')} has to be at least {least}"
                         f"{f' and at most {most}' * (most < math.inf)}, it is {value:g}")


def parse(argv=None):
    """The command line. InputError: a value that cannot be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="*", help='what to draw, e.g. "a bold slanted seven", '
                        "or the text to be filled")
    parser.add_argument("--text", help="the same: a caption, or the text to be filled")
    parser.add_argument("--image", help="a picture to read or to change: any size, colour or grey")
    parser.add_argument("--ask", help="a question about the picture")
    parser.add_argument("--keep", help="part of the picture to keep: top, bottom, left, right or "
                        "ROW:COL-ROW:COL in patches, counted from 0, both ends included")
    parser.add_argument("--from", type=float, dest="start", metavar="T", help="start from the "
                        "picture as it is at time T, between 0 (noise) and 1 (untouched)")
    parser.add_argument("--checkpoint", help="default: the newest under runs/")
    parser.add_argument("--n", type=int, help="pictures to draw (default: 16), texts to write (1)")
    parser.add_argument("--best-of", type=int, default=1, metavar="N", help="draw N for each, "
                        "keep the one of which the model itself reads the caption best")
    add_generation(parser)
    parser.add_argument("--seed", type=int, help="default: another result every time")
    parser.add_argument("--out", default="samples.png", help="the picture (default: samples.png)")
    parser.add_argument("--gif", help="a film of the generation; beside it a strip, _strip.png")
    parser.add_argument("--trace", help="every token at every step, as a CSV file")
    given = parser.parse_args(argv)
    given.prompt = " ".join(given.prompt + ([given.text] if given.text else []))
    given.options = generation(given)
    bounded(given, "n", 1)
    bounded(given, "best_of", 1)
    if given.start is not None and not 0 <= given.start < 1:
        raise InputError(f"--from has to be a time from 0 to below 1, it is {given.start:g}")
    for name in ("ask", "keep", "start"):
        if getattr(given, name) is not None and not given.image:
            raise InputError(f"--{'from' if name == 'start' else name} needs a picture, --image")
    if given.ask and (given.prompt or given.keep or given.start is not None):
        raise InputError("--ask goes with a picture alone, without a caption, --keep or --from")
    for name in ("out", "gif", "trace"):
        ending, path = {"out": ".png", "trace": ".csv"}.get(name, ".gif"), getattr(given, name)
        path = path and pathlib.Path(path)
        if path and (path.suffix.lower() != ending or not path.resolve().parent.is_dir()):
            raise InputError(f"--{name} {path} has to be a name ending in {ending}, in a folder "
                             "that exists")
        setattr(given, name, path)
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


def changes(given):
    """Whether a picture is given to be changed, not to be read."""
    return given.keep is not None or given.start is not None


def kept(region, side):
    """Which of side × side patches lie in a region such as top or 0:0-2:6: (side²,) bool.
    InputError: there is no such region."""
    half, last = side // 2, side - 1
    named = {"top": f"0:0-{half - 1}:{last}", "bottom": f"{side - half}:0-{last}:{last}",
             "left": f"0:0-{last}:{half - 1}", "right": f"0:{side - half}-{last}:{last}"}
    found = re.fullmatch(r"(\d+):(\d+)-(\d+):(\d+)", named.get(region, region))
    top, left, bottom, right = map(int, found.groups()) if found else (1, 1, 0, 0)
    if not (top <= bottom < side and left <= right < side):
        raise InputError(f"--keep {region} has to be top, bottom, left, right or ROW:COL-ROW:COL, "
                         f"rows and columns of patches from 0 to {last}")
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[top:bottom + 1, left:right + 1] = True
    return inside.flatten()


def begin(given, model, n):
    """What is given, and which positions are free: x, free {name: (n, N)}, n rows alike.
    InputError: this model cannot do that, or nothing is left to fill."""
    alone, changed, known, text = model.patches is None, changes(given), {}, given.prompt
    about_pictures = given.image, given.gif, given.best_of > 1, given.guidance not in (None, 1)
    if alone and any(about_pictures):
        raise InputError("this model knows texts only: no --image, --gif, --best-of, --guidance")
    if given.ask:
        if not model.words.marks:
            raise InputError("this model has learned no questions; train.py --ask teaches them")
        text = given.ask.rstrip(" ?") + "? ___"
    if given.image:
        image = model.patches.encode(see(given.image, model).to(model.device)).expand(n, -1)
        preview(model.patches.decode(image[:1]))
        keep = torch.full_like(image, not changed, dtype=torch.bool)
        if given.keep:
            keep |= kept(given.keep, math.isqrt(model.patches.length)).to(keep.device)
        known["image"] = image.where(keep, -1)
    if text or not given.image:
        known["text"] = model.words.encode([text or "___"]).expand(n, -1)
        if not alone and (changed or not given.image):          # first the words, then the picture
            known["text"] = model.complete(known["text"])
    x, free = model.blank(n, **known)
    if given.image:
        x["image"] = image
    if changed and not text:                                    # no caption, no guidance
        x, free = {"image": x["image"]}, {"image": free["image"]}
    if not any(f.any() for f in free.values()):
        raise InputError("all is given, nothing is left to fill: ___ is a blank, --keep and "
                         "--from change a picture")
    if given.gif and not free["image"].any():
        raise InputError("--gif shows how a picture is drawn; this one is given")
    if "text" not in x and (given.best_of > 1 or given.guidance not in (None, 1)):
        raise InputError("--best-of and --guidance need a caption")
    return x, free


def marked(pictures, changed, patch, zoom):
    """Enlarged pictures (B, C, H, W), in colour, with a frame around patches that changed (B, I)
    -> (B, 3, zoom·H, zoom·W)"""
    B, C, H, W = pictures.shape
    big = F.interpolate(pictures.clamp(0, 1).expand(B, 3, H, W), scale_factor=zoom)
    edge = torch.ones(zoom * patch, zoom * patch, dtype=torch.bool, device=big.device)
    edge[1:-1, 1:-1] = False
    side = H // patch
    where = torch.kron(changed.view(B, 1, side, side).long(), edge.long()).bool()
    return torch.where(where, torch.tensor([1., 0.5, 0.], device=big.device).view(3, 1, 1), big)


def film(states, model, path):
    """Writes a generation as an animation, and a strip of it with the number of changes of every
    patch at its end: path, path_strip.png. -> their names"""
    images = [state["image"] for state in states]
    changed = [torch.zeros_like(images[0], dtype=torch.bool),
               *(a != b for a, b in zip(images, images[1:]))]
    zoom = max(1, 112 // model.patches.size)
    frames = [marked(model.patches.decode(x), c, model.patches.patch, zoom)
              for x, c in zip(images, changed)]
    frames.append(marked(model.patches.decode(images[-1]), changed[0], model.patches.patch, zoom))
    rows = math.ceil(len(images[0]) ** 0.5)
    grids = [make_grid(frame, rows, pad_value=0.3) for frame in frames]
    grids = [Image.fromarray((255 * g).byte().permute(1, 2, 0).cpu().numpy()) for g in grids]
    grids[0].save(path, save_all=True, append_images=grids[1:], loop=0,
                  duration=[max(80, 2400 // len(grids))] * (len(grids) - 1) + [2000])
    count = sum(c.float() for c in changed)
    side = math.isqrt(count.shape[1])
    count = (count / count.amax().clamp(min=1)).view(-1, 1, side, side)
    count = F.interpolate(count, frames[0].shape[-2:]).expand_as(frames[0])
    shown = sorted({round(i * (len(frames) - 2) / 8) for i in range(9)})
    strip = torch.stack([*(frames[i] for i in shown), count], 1)[:8]    # (≤ 8, ≤ 10, 3, H, W)
    name = path.with_name(path.stem + "_strip.png")
    save_image(strip.flatten(0, 1), name, nrow=strip.shape[1], pad_value=0.3)
    return path, name


def settling(states, words):
    """Prints the first text as it settles, a dot for every token that will still change."""
    rows = torch.stack([state["text"][0] for state in states])
    for i in sorted({round(i * (len(rows) - 1) / 8) for i in range(9)}):
        settled = rows[i].where((rows[i:] == rows[i]).all(0), -1)
        line = words.decode(settled[None])[0].replace("\n", "⏎")
        print(f"{i:4}  {line[:shutil.get_terminal_size().columns - 8]}")


def trace(states, path):
    """Writes every token of every state: a CSV with a line per row, step, modality, position."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("row step modality position token changed".split())
        for i, (before, now) in enumerate(zip([states[0], *states], states)):
            for m, x in now.items():
                for (row, place), token in np.ndenumerate(x.cpu().numpy()):
                    changed = int(token != before[m][row, place])
                    writer.writerow([row, i, m, place, token, changed])


def show(states, free, model, given):
    """The result: pictures, films, texts, to files and to the terminal. InputError: a file cannot
    be written."""
    last, gaps = states[-1], "text" in free and bool(free["text"].any())
    try:
        if "image" in free and free["image"].any():
            pictures = model.patches.decode(last["image"]).clamp(0, 1)
            preview(pictures)
            save_image(F.interpolate(pictures, scale_factor=4), given.out,
                       nrow=math.ceil(len(pictures) ** 0.5), padding=8, pad_value=0.3)
            print(f"{given.out}: {len(pictures)} picture{'s' * (len(pictures) > 1)}")
        if given.gif:
            print("{}: the generation; {}: the same, changes per patch at the end".format(
                *film(states, model, given.gif)))
        if given.trace:
            trace(states, given.trace)
            print(f"{given.trace}: every token at every step")
    except OSError as error:
        raise InputError(f"{error.filename or given.out} cannot be written: {error}") from error
    if gaps and len(states) > 2:
        settling(states, model.words)
    if given.ask:
        print("\n".join(model.words.text(x[f].tolist())
                        for x, f in zip(last["text"], free["text"])))
    elif gaps or not given.prompt or (model.words.encode([given.prompt]) < 0).any():
        print("\n".join(model.words.decode(last["text"]) if "text" in last
                        else model.read(last["image"])))


def report(states, free, options):
    """Prints the network calls, and how often the free tokens changed."""
    guided = options.get("guidance", 1) != 1
    calls = options["steps"] * (1 + guided * sum(bool(f.any()) for f in free.values()))
    count = torch.cat([sum((a[m] != b[m]).long() for a, b in zip(states, states[1:]))[free[m]]
                       for m in free])
    share = torch.bincount(count.clamp(max=4), minlength=5) / len(count)
    shares = ", ".join(f"{name} {s:.0%}" for name, s in zip(
        ("never", "once", "twice", "3 times", "more often"), share.tolist()) if s)
    print(f"{calls} network call{'s' * (calls > 1)}; a token changed {count.float().mean():.1f} "
          f"times on average ({shares})")


@command
def main(argv=None):
    """Fills what is free, and shows it."""
    given = parse(argv)
    warnings.simplefilter("ignore", FutureWarning)      # what libraries plan is no news for users
    model = Fudoki.open(given.checkpoint)
    print(f"{model.source}, trained on {model.hparams.data}")
    if given.seed is not None:
        L.seed_everything(given.seed, verbose=False)
    writing, reading = model.patches is None, given.image and not changes(given)
    x, free = begin(given, model, (given.n or (1 if writing or reading else 16)) * given.best_of)
    captions = model.GAPS if given.prompt else model.READ       # given words need time to be heard
    options = model.WRITE if writing else captions if reading else model.DRAW
    options = options | given.options
    if len(x) == 1:
        options["guidance"] = 1.
    states = list(tqdm(model.generate(x, free, start=given.start or 0., **options), "steps",
                       options["steps"] + 1, leave=False, delay=2))
    if given.best_of > 1:
        best = model.best(states[-1], given.best_of)
        states, free = [take(state, best) for state in states], take(free, best)
    show(states, free, model, given)
    report(states, free, options)


if __name__ == "__main__":
    sys.exit(main())
