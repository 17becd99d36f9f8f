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
import copy
import functools
import itertools
import math
import pathlib
import random
import re
import shutil
import sys
import warnings
import zipfile

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from fudoki import STEPS, VELOCITIES, Fudoki, entry, question

DRAW = dict(steps=4, guidance=2., temperature=0.7)      # options of `generate` for pictures,
READ = dict(steps=1, temperature=0.)                    # for captions,
GAPS = dict(steps=8, temperature=0.)                    # for words that have to hear given ones
WRITE = dict(steps=64, temperature=0.7)                 # and for long texts


class InputError(ValueError):
    """What a user got wrong and what to do, in one line; the commands end with it."""


def command(main):
    """main(argv) -> exit code: 0, 2 after one line about what a user or the disk got wrong, 130
    after Ctrl-C. What a terminal cannot show is a question mark there; it may be closed early."""
    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):          # a notebook's has none
                stream.reconfigure(errors="replace")
        torch.set_flush_denormal(True)                  # numbers below 1e-38 are slow: 0
        try:
            main(argv)
            sys.stdout.flush()
            return 0
        except BrokenPipeError:                         # nobody reads on: `… | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (InputError, OSError) as error:
            print(f"{pathlib.Path(sys.modules[main.__module__].__file__).name}: {error}",
                  file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return wrapped


# ---------------------------------------------------------------------- what one does with a model

def opened(path):
    """What is in a checkpoint. InputError: it is not there, damaged, or something else."""
    if not pathlib.Path(path).is_file():
        raise InputError(f"there is no checkpoint {path}; train one first: python train.py")
    try:
        with zipfile.ZipFile(path) as parts:
            if parts.testzip():                         # PyTorch does not look at the checksums
                raise ValueError("its checksums are wrong")
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))
        return {k: saved[k] for k in ("state_dict", "hyper_parameters")} | saved
    except Exception as error:                          # whatever a file can do to these libraries
        raise InputError(f"{path} is damaged, or no checkpoint of this version of fudoki "
                         f"({first_line(error)[:99]})") from error


def open_model(path=None):
    """The model of a checkpoint and its path, by default the newest under runs/, ready to sample,
    on the GPU if there is one. InputError: none there, damaged, or of something else."""
    found = sorted(pathlib.Path("runs").glob("*/*.ckpt"), key=lambda p: p.stat().st_mtime)
    if path is None and not found:
        raise InputError("no checkpoint under runs/; train one first: python train.py")
    path = pathlib.Path(path or found[-1])
    saved = opened(path)
    try:
        model = Fudoki(**saved["hyper_parameters"])
        model.load_state_dict(saved["state_dict"])
        model.eval()
        if not all(part.isfinite().all() for part in saved["state_dict"].values()):
            raise ValueError("its weights are not finite")
        with torch.random.fork_rng():                   # can it be used?
            list(model.generate(*model.to_fill(1), steps=1))
    except Exception as error:
        raise InputError(f"{path} is no checkpoint of this version of fudoki, or needs a file "
                         f"that is not here ({first_line(error)[:99]})") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), path


def defaults(model, what):
    """Options of `generate` to draw or to read: the model's own, or those of this file."""
    return {"draw": DRAW, "read": READ}[what] | (model.hparams.notes or {}).get(what, {})


def take(x, rows):
    """The rows of every modality: {name: (B, N)} -> {name: (b, N)}."""
    return {m: x_m[rows] for m, x_m in x.items()}


def fill(model, options, rows=500, best_of=1, **given):
    """The last state of `generate`, `rows` at a time, fewer if they have many words, the best of
    some: tokens {name: (B, N)}, −1 where free."""
    logits = best_of * sum(kind.length * len(kind.embedding) for kind in model.tokens.values())
    parts, rows = [], max(1, min(rows, 2 ** 28 // logits))
    for i in range(0, len(next(iter(given.values()))), rows):
        some = {m: x[i:i + rows].repeat_interleave(best_of, 0) for m, x in given.items()}
        x, free = model.to_fill(len(next(iter(some.values()))), **some)
        *_, x = tqdm(model.generate(x, free, **options), "filling", options["steps"] + 1,
                     leave=False, delay=2)
        parts.append(take(x, best(model, x, free, best_of)) if best_of > 1 else x)
    return {m: torch.cat([x[m] for x in parts]) for m in parts[0]}


@torch.no_grad()
def agreement(model, x, free):
    """log p(text | picture) by the model's own reading, in one call, of all but the question that
    was given when these positions were free: {name: (B, N)} each -> (B,)"""
    words, marks = x["text"].masked_fill(free["text"], -1), model.tokens["text"].marks
    free = {m: ~question(words, marks) if m == "text" else torch.zeros_like(f)
            for m, f in free.items()}
    l = model.net(model.corrupt(x, free, 0.), free, 0.)["text"].log_softmax(-1)
    return (entry(l, x["text"])[..., 0] * free["text"]).sum(1)


def best(model, x, free, n):
    """Of every n rows the one that agrees best: {name: (B·n, N)} each -> indices (B,)"""
    score = agreement(model, x, free).view(-1, n)
    return score.argmax(1) + n * torch.arange(len(score), device=score.device)


def complete(model, text):
    """Words that are missing (−1), by what the model knows of words alone, when there is no
    picture yet: (B, N) long -> (B, N) long."""
    x, free = {"text": text.clamp(min=0).to(model.device)}, {"text": (text < 0).to(model.device)}
    *_, x = model.generate(x, free, **GAPS | dict(temperature=1.)) if free["text"].any() else [x]
    return x["text"]


def draw(model, texts, best_of=1, **options):
    """Pictures of B captions, the best of some: list of B strings -> (B, C, size, size) in
    [0, 1]."""
    text = complete(model, model.tokens["text"].encode(texts))
    found = fill(model, defaults(model, "draw") | options, best_of=best_of, text=text)
    return model.tokens["image"].decode(found["image"])


def read(model, image, asked=None, **options):
    """Captions of B pictures, given as tokens (B, I), or what is `asked` about them with the
    answers: list of B strings -> list of B strings. Given words are heard as steps go by."""
    kind = model.tokens["text"]
    text = kind.encode(asked) if asked else torch.full((len(image), kind.length), -1)
    heard = ((text >= 0) & ~question(text, kind.marks)).any(1) & (text < 0).any(1)
    for rows, default in ((heard, GAPS), (~heard, defaults(model, "read"))):
        if rows.any():
            some = dict(text=text[rows], image=image[rows.to(image.device)])
            text[rows] = fill(model, default | options, **some)["text"].cpu()
    return kind.decode(text)


def write(model, texts, **options):
    """Fills the blanks of B texts: list of B strings -> list of B strings."""
    kind = model.tokens["text"]
    return kind.decode(fill(model, WRITE | options, text=kind.encode(texts))["text"])


# ------------------------------------------------------------------------------ pictures and words

def first_line(error):
    """What a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def open_picture(path):
    """A picture file, upright, in mode L or RGB. InputError: it cannot be read, whatever its
    decoder raises."""
    try:
        with Image.open(path) as file:
            return plain(ImageOps.exif_transpose(file))
    except FileNotFoundError as error:
        raise InputError(f"there is no picture {path}") from error
    except Exception as error:
        raise InputError(f"{path} is no picture that can be read: {first_line(error)}") from error


def plain(picture):
    """A picture of any mode in L or RGB: what is transparent on white, numbers of 16 and 32 bits
    over whatever range they have, infinite ones at its ends."""
    if picture.mode[0] in "IF":
        values = np.asarray(picture, dtype=np.float64)
        finite = values[np.isfinite(values)]
        low, high = finite.min(), finite.max()
        values = (values.clip(low, high) - low) / max(high - low, 1e-6)
        picture = Image.fromarray((255 * np.nan_to_num(values)).astype(np.uint8))
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def middle_square(picture, size, channels):
    """The middle square of a picture, 1 or 3 channels -> (C, size, size) in [0, 1]."""
    picture = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (size, size))
    values = torch.from_numpy(np.array(picture)).view(size, size, channels)
    return values.permute(2, 0, 1) / 255


def training_form(grey, size):
    """A digit as in training, light on black, whatever its ground is; if the size differs, cut
    out, scaled to 20/28 of the side and put with its centre of mass in the middle: a picture in
    mode L -> one of size × size, and what was done, in words. InputError: there is no stroke."""
    resized, done = grey.size != (size, size), []
    grey = grey.copy()
    grey.thumbnail((10 * size, 10 * size))
    pixels = np.asarray(grey, dtype=float) / 255
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in pixels.shape), indexing="ij")
    basis, edge = np.stack([x ** 0, x, y, x * x, x * y, y * y], -1), np.ones_like(x, dtype=bool)
    edge[1:-1, 1:-1], weight = False, 1.
    for _ in range(10):         # the ground, uneven as it may be: a paraboloid through the border
        fit = np.linalg.lstsq(weight * basis[edge], (weight * pixels[edge, None])[:, 0])[0]
        off = np.abs(pixels[edge] - basis[edge] @ fit)
        weight = (off[:, None] + 0.01) ** -0.5          # by absolute deviations: it may have ink
    ground = (basis @ fit).clip(0, 1)
    low, high = np.quantile(pixels - ground, (2e-4, 1 - 2e-4))
    if high < -low:
        pixels, ground = 1 - pixels, 1 - ground
        done.append("dark on light turned into light on dark")
    ink = (pixels - ground) / (1 - ground).clip(0.05)   # as far towards white as it may be
    noise, contrast = 1.5 * np.median(np.abs(ink[edge])), np.quantile(ink, 1 - 2e-4)
    if max(high, -low) < 0.1 or contrast < 5 * noise or (ink > contrast / 2).mean() > 0.6:
        raise InputError("the picture is empty: no stroke stands out from its ground")
    if np.ptp(ground) > 0.05:
        done.append("its uneven ground taken away")
    if resized or high < -low or ground.max() > 0.05:
        ink = ((ink - noise) / (contrast - noise)).clip(0, 1)
        grey = Image.fromarray((255 * ink).round().astype(np.uint8))
    if resized:
        ink = grey.crop(grey.point(lambda value: 255 * (value > 76)).getbbox())
        ink = ImageOps.contain(ink, [round(size * 20 / 28)] * 2, Image.Resampling.BILINEAR)
        mass, corner = np.asarray(ink, dtype=float), []
        for axis, n in enumerate(ink.size):
            centre = (mass.sum(axis) * (np.arange(n) + 0.5)).sum() / mass.sum()
            corner.append(min(max(0, round(size / 2 - centre)), size - n))
        grey = Image.new("L", (size, size))
        grey.paste(ink, tuple(corner))
        done.append(f"cut out, scaled and centred in {size}×{size}")
    return grey, done


def load_picture(path, model):
    """A picture file as the model's training saw them: -> (1, C, size, size); says what was done.
    InputError: it cannot be read."""
    picture = open_picture(path)
    said, patches = [f"{picture.width}×{picture.height} {picture.mode}"], model.tokens["image"]
    done = ["its middle square"]
    if model.hparams.notes["form"] == "digit":
        picture, done = training_form(picture.convert("L"), patches.size)
    image = middle_square(picture, patches.size, patches.channels)
    print(f"{path}: {'; '.join(said + done)}")
    return image[None]


def encode(model, text, n, drawn):
    """A text as tokens of n rows (n, N), −1 where free. Where training knew all captions there
    are, words may be left out and in any order: for a picture that is `drawn` chance chooses one
    of these captions, else they are free. InputError: unknown words, or too many."""
    captions, texts = model.hparams.notes["captions"], [text or "___"] * n
    if captions and "___" not in text and "?" not in text:
        said = set(re.findall(r"\w+", text.lower()))
        fitting = [caption for caption in captions if said <= set(caption.split())]
        if not fitting:
            words = sorted({word for caption in captions for word in caption.split()})
            raise InputError(f"'{text}' is not part of a caption such as '{captions[-1]}'; "
                             f"known are {', '.join(words)}")
        always = set.intersection(*(set(caption.split()) for caption in captions))
        texts = random.choices(fitting, k=n) if drawn else [" ".join(
            word if word in said | always else "___" for word in fitting[0].split())] * n
    try:
        return model.tokens["text"].encode(texts)
    except ValueError as error:
        raise InputError(str(error)) from error


def region(name, side):
    """Which of side × side patches lie in a region such as top, 0:0-2:6 or not 0:0-2:6: (side²,)
    bool. InputError: there is no such region."""
    half, last = side // 2, side - 1
    named = {"top": f"0:0-{half - 1}:{last}", "bottom": f"{side - half}:0-{last}:{last}",
             "left": f"0:0-{last}:{half - 1}", "right": f"0:{side - half}-{last}:{last}"}
    others, name = name.startswith("not "), name.removeprefix("not ")
    found = re.fullmatch(r"(\d+):(\d+)-(\d+):(\d+)", named.get(name, name))
    top, left, bottom, right = map(int, found.groups()) if found else (1, 1, 0, 0)
    if not (top <= bottom < side and left <= right < side):
        raise InputError(f"--keep {name} has to be top, bottom, left, right or ROW:COL-ROW:COL, "
                         f"rows and columns of patches from 0 to {last}")
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[top:bottom + 1, left:right + 1] = True
    return inside.flatten() ^ others


# ------------------------------------------------------------------------------- what comes of it

def preview(images):
    """Prints as many pictures (B, C, H, W) side by side as fit, two rows of pixels to a line."""
    fit = max(1, shutil.get_terminal_size().columns // images.shape[-1])
    wide = torch.cat(list(images[:fit].mean(1).cpu()), 1)
    lines = F.avg_pool2d(wide[None], (2, 1))[0].clamp(0, 1)
    shades = " ░▒▓█"
    try:
        shades.encode(sys.stdout.encoding or "utf-8")
    except UnicodeError:
        shades = " .+%@"
    for line in (4 * lines).round().long().tolist():
        print("".join(shades[level] for level in line).rstrip())


def framed(pictures, changed, patch, zoom):
    """Enlarged pictures (B, C, H, W), in colour, with a frame around patches that changed (B, I)
    -> (B, 3, zoom·H, zoom·W)"""
    B, C, H, W = pictures.shape
    big = F.interpolate(pictures.clamp(0, 1).expand(B, 3, H, W), scale_factor=zoom)
    edge = torch.ones(zoom * patch, zoom * patch, dtype=torch.bool, device=big.device)
    edge[1:-1, 1:-1] = False
    where = torch.kron(changed.view(B, 1, H // patch, -1).long(), edge.long()).bool()
    return torch.where(where, torch.tensor([1., 0.5, 0.], device=big.device).view(3, 1, 1), big)


def film(states, model, path):
    """Writes a generation as an animation, and a strip of it with the number of changes of every
    patch at its end: path, path_strip.png. -> their names"""
    patches, images = model.tokens["image"], [state["image"] for state in states]
    still = torch.zeros_like(images[0], dtype=torch.bool)
    changed = [still, *(a != b for a, b in zip(images, images[1:])), still]
    zoom = max(1, 112 // patches.size)
    frames = [framed(patches.decode(x), c, patches.patch, zoom)
              for x, c in zip([*images, images[-1]], changed)]
    grids = [make_grid(frame, math.ceil(len(still) ** 0.5), pad_value=0.3) for frame in frames]
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


def present(states, free, model, given):
    """The result: pictures, films, texts, to files and then to the terminal."""
    last, words = states[-1], model.tokens["text"]
    films = film(states, model, given.gif) if given.gif else ()
    if "image" in free and free["image"].any():
        pictures = model.tokens["image"].decode(last["image"]).clamp(0, 1)
        save_image(F.interpolate(pictures, scale_factor=4), given.out,
                   nrow=math.ceil(len(pictures) ** 0.5), padding=8, pad_value=0.3)
        preview(pictures)
        print(f"{given.out}: {len(pictures)} picture{'s' * (len(pictures) > 1)}")
    for name, what in zip(films, ("the generation", "the same, changes per patch at the end")):
        print(f"{name}: {what}")
    if "text" not in last:
        print("\n".join(read(model, last["image"])))
    elif given.ask:
        answers = (x[f][None] for x, f in zip(last["text"], free["text"]))
        print("\n".join(words.decode(answer)[0] for answer in answers))
    else:
        if free["text"].any() and len(states) > 2:                      # the first as it settles
            for i in sorted({round(i * (len(states) - 1) / 8) for i in range(9)}):
                line = words.decode(states[i]["text"][:1])[0].replace("\n", "⏎")
                print(f"{i:4}  {line[:shutil.get_terminal_size().columns - 8]}")
        texts = words.decode(last["text"])
        if texts != [given.prompt] * len(texts):
            print("\n".join(texts))


def knowing(model, end):
    """The model as if it had predicted this state from the beginning."""
    model, sizes = copy.copy(model), {m: len(kind.embedding) for m, kind in model.tokens.items()}
    model.predict = lambda x, *_: {m: 1e4 * F.one_hot(end[m], sizes[m]) for m in x}
    return model


def departures(states, free):
    """How often a free token leaves the value that it ends with, on average."""
    return torch.cat([sum(((a[m] == states[-1][m]) & (b[m] != a[m])).float()
                          for a, b in itertools.pairwise(states))[free[m]] for m in free]).mean()


def count(model, states, free, options, t=0.):
    """Prints the network calls, and how often tokens left what they end with: as the path has it,
    by `knowing`, and in truth. What is above the path's is a change of mind."""
    guided = options.get("guidance", 1) != 1
    calls = options["steps"] * (1 + guided * sum(bool(f.any()) for f in free.values()))
    path = knowing(model, states[-1]).generate(states[0], free, x_t=states[0], t=t, **options)
    print(f"{calls} network call{'s' * (calls > 1)}; a token left what it ends with "
          f"{departures(states, free):.2f} times on average, {departures([*path], free):.2f} "
          "times if that is known from the start")


# ------------------------------------------------------------------------------- the command line

SEED = 0, 2 ** 32 - 1       # the numbers that seed everything


def number(kind, least, most=math.inf):
    """An argparse type: a finite int or float from least to most."""
    def parsed(text):
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} has to be at least {least}"
                                             + f" and at most {most}" * (most < math.inf))
        return value
    parsed.__name__ = kind.__name__
    return parsed


def named(*registries):
    """argparse's type and metavar of an entry of these dictionaries, or of FILE:NAME, which the
    last of them looks for: see `Registry`."""
    known = [name for registry in registries for name in registry]

    def parsed(text):
        try:
            return text if text in known else registries[-1][text] and text
        except KeyError as error:
            raise argparse.ArgumentTypeError(
                f"invalid choice: {text!r} (choose from {', '.join(known)}, or FILE:NAME of a "
                "FILE.py here that mentions fudoki and has this name)") from error
    return dict(type=parsed, metavar=f"{{{','.join(known)},FILE:NAME}}")


def file(ending):
    """An argparse type: a file with this ending that can be written."""
    def parsed(text):
        path = pathlib.Path(text)
        there = path if path.is_file() else path.resolve().parent
        if path.suffix.lower() != ending or path.is_dir() or not os.access(there, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text} has to be a name ending in {ending}, in a "
                                             "folder that exists and can be written to")
        return path
    return parsed


def add_generation(parser):
    """The options of `generate`, as flags; None where the default depends on what is free."""
    parser.add_argument("--steps", type=number(int, 1), help=f"default: {DRAW['steps']} to draw, "
                        f"{READ['steps']} to read, {GAPS['steps']} to fill a caption, "
                        f"{WRITE['steps']} to write")
    parser.add_argument("--late", type=number(float, 0.01), help="above 1, more of the steps are "
                        "late, and those are short: 1 − t falls as (1 − u)^late, u evenly "
                        "(default: 1, scenes 2)")
    parser.add_argument("--step", **named(VELOCITIES, STEPS), default="race",
                        help="default: race; a velocity is a step of Euler along it")
    parser.add_argument("--guidance", type=number(float, -1e3, 1e3), help="g of u + g(c − u), 1 "
                        f"is off (default: {DRAW['guidance']:g} to draw, 1 for text)")
    parser.add_argument("--temperature", type=number(float, 0), help="of x₁ ~ p(x₁ | x_t), 0 is "
                        f"greedy (default: {DRAW['temperature']:g} to draw, "
                        f"{READ['temperature']:g} to read, {WRITE['temperature']:g} to write)")


def generation(given):
    """What was given of them, as options of `generate`."""
    return {name: value for name in ("steps", "late", "step", "guidance", "temperature")
            if (value := getattr(given, name)) is not None}


def parse(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="sample.py", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="*", help='what to draw, e.g. "a bold slanted seven", '
                        "or the text to be filled")
    parser.add_argument("--text", help="the same: a caption, or the text to be filled")
    parser.add_argument("--image", help="a picture to read or to change: any size, colour or grey")
    parser.add_argument("--ask", help="a question about the picture")
    parser.add_argument("--keep", help="part of the picture to keep: top, bottom, left, right or "
                        "ROW:COL-ROW:COL in patches, counted from 0, both ends included; "
                        "'not 1:1-2:2' keeps all others")
    parser.add_argument("--from", type=number(float, 0, 0.999), dest="from_t", metavar="T",
                        help="start from the picture as it is at time T, between 0 (noise) and 1 "
                        "(untouched)")
    parser.add_argument("--checkpoint", help="default: the newest under runs/")
    parser.add_argument("--n", type=number(int, 1),
                        help="pictures to draw (default: 16), texts to write (1)")
    parser.add_argument("--best-of", type=number(int, 1), default=1, metavar="N", help="draw N "
                        "for each, keep the one of which the model itself reads the caption best")
    add_generation(parser)
    parser.add_argument("--seed", type=number(int, *SEED),
                        help="default: another result every time")
    parser.add_argument("--out", type=file(".png"), default="samples.png",
                        help="the picture (default: samples.png)")
    parser.add_argument("--gif", type=file(".gif"),
                        help="a film of the generation; beside it a strip, _strip.png")
    given = parser.parse_args(argv)
    given.prompt = " ".join(given.prompt + ([given.text] if given.text else []))
    given.changes = given.keep is not None or given.from_t is not None
    if not given.image and (given.ask or given.changes):
        parser.error("--ask, --keep and --from need a picture, --image")
    if given.ask and (given.prompt or given.changes):
        parser.error("--ask goes with a picture alone, without a caption, --keep or --from")
    return given


def given_and_free(given, model, n):
    """What is given, and which positions are free: x, free {name: (n, N)}, n rows alike.
    InputError: this model cannot do that, or nothing is left to fill."""
    patches, known, text = model.tokens.get("image"), {}, given.prompt
    guided = given.guidance not in (None, 1)
    if not patches and (given.image or given.gif or given.best_of > 1 or guided):
        raise InputError("this model knows texts only: no --image, --gif, --best-of, --guidance")
    if given.ask:
        if not model.hparams.notes["asks"]:
            raise InputError("this model has learned no questions; train.py --ask teaches them")
        text = given.ask.rstrip(" ?") + "? ___"
    if given.image:
        image = patches.encode(load_picture(given.image, model).to(model.device)).expand(n, -1)
        preview(patches.decode(image[:1]))
        keep = torch.full_like(image, not given.changes, dtype=torch.bool)
        if given.keep:
            keep |= region(given.keep, math.isqrt(patches.length)).to(keep.device)
        known["image"] = image.where(keep, -1)
    if text or not given.image:
        drawn = patches and (given.changes or not given.image)  # first the words, then the picture
        text = encode(model, text, n, drawn)
        known["text"] = complete(model, text) if drawn else text
    x, free = model.to_fill(n, **known)
    if given.image:
        x["image"] = image                                      # a draft where it is free
    if given.changes and "text" not in known:
        del x["text"], free["text"]                             # no caption, no guidance
    if not any(f.any() for f in free.values()):
        raise InputError("all is given, nothing is left to fill: ___ is a blank, --keep and "
                         "--from change a picture")
    if given.gif and not free["image"].any():
        raise InputError("--gif shows how a picture is drawn; this one is given")
    if "text" not in x and (given.best_of > 1 or guided):
        raise InputError("--best-of and --guidance need a caption")
    return x, free


@command
def main(argv=None):
    """Fills what is free, and shows it."""
    given = parse(argv)
    warnings.simplefilter("ignore")                     # what libraries plan is no news for users
    model, path = open_model(given.checkpoint)
    print(f"{path}, trained on {model.hparams.notes['data']}")
    if given.seed is not None:
        L.seed_everything(given.seed, verbose=False)
    writing, reading = "image" not in model.tokens, given.image and not given.changes
    n = given.n or (1 if writing or reading else 16)
    x, free = given_and_free(given, model, n)
    x, free = ({m: a.repeat_interleave(given.best_of, 0) for m, a in y.items()} for y in (x, free))
    default = (WRITE if writing else GAPS if reading and given.prompt
               else defaults(model, "read" if reading else "draw"))
    options = default | generation(given)
    if len(x) == 1:
        options["guidance"] = 1.
    try:
        states = list(tqdm(model.generate(x, free, t=given.from_t or 0., **options), "steps",
                           options["steps"] + 1, leave=False, delay=2))
    except ValueError as error:
        raise InputError(str(error)) from error
    if given.best_of > 1:
        rows = best(model, states[-1], free, given.best_of)
        states, free = [take(state, rows) for state in states], take(free, rows)
    present(states, free, model, given)
    count(model, states, free, options, given.from_t or 0.)


if __name__ == "__main__":
    sys.exit(main())
