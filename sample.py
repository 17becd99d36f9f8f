"""Draws from words, reads pictures, answers questions, writes texts, with a model of train.py, or
with one of those that come along (toy, scenes):

    python sample.py "a bold slanted seven"
    python sample.py "seven"                    the other words are left to chance
    python sample.py                            a picture with its caption, or a text
    python sample.py --image picture.png        its caption
    python sample.py --image picture.png --ask "what digit"
    python sample.py --image picture.png "a bold ___ seven"         the missing word
    python sample.py --image picture.png --keep top "a bold three"  draws the rest again
    python sample.py --image picture.png --from 0.5 "a bold seven"  another version of it
    python sample.py --text "The ___"           goes on; within it, ___ are three tokens

Whatever is not given is free, and one and the same function fills it.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # waiting threads must not block others

import argparse
import functools
import math
import pathlib
import random
import re
import shutil
import sys
import traceback
import warnings
import zipfile

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from fudoki import STEPS, VELOCITIES, Fudoki, Registry, entry, question

DRAW = dict(steps=4, guidance=2., temperature=0.7)      # options of `generate` for pictures,
READ = dict(steps=1, temperature=0.)                    # for captions
WRITE = dict(steps=64, temperature=0.7)                 # and for long texts


class InputError(ValueError):
    """What a user got wrong and what to do, in one line; the commands end with it."""


def command(main):
    """Decorates main(argv), which then returns an exit code: 0, 2 after one line on stderr about
    what a user or the disk got wrong, 130 after Ctrl-C."""
    @functools.wraps(main)
    def wrapped(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):          # a notebook's stream has no such method
                stream.reconfigure(errors="replace")    # a terminal may not know "█"

        torch.set_flush_denormal(True)                  # numbers below 1e-38 are slow on a CPU
        warnings.simplefilter("ignore")                 # warnings of libraries, not for users
        try:
            main(argv)
            return 0
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            lines, lost = own_lines(error), "gloo" in str(error)     # another process has ended
            if not (lines or lost or isinstance(error, (InputError, OSError))):
                raise
            known = lost or isinstance(error, (InputError, ImportError, OSError))
            what = first_line(error) if known else "an error in your file"
            print(f"{main.__module__}.py: {what}\n{lines}".rstrip(), file=sys.stderr)
            return 2
    return wrapped


def own_lines(error):
    """The traceback of an error, or of its cause, from the first line in a FILE of a FILE:NAME on;
    "" if there is none."""
    while error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [i for i, frame in enumerate(frames) if frame.filename in Registry.files
                  and not isinstance(error, InputError)]        # which says what is wrong
        if places or getattr(error, "filename", None) in Registry.files:    # of a SyntaxError
            shown = [frame for frame in frames[min(places, default=len(frames)):]
                     if not re.search("^<|site-packages", frame.filename)]
            return "".join(traceback.format_list(shown) + traceback.format_exception_only(error))
        error = error.__cause__ or error.__context__
    return ""


# ---------------------------------------------------------------------- what one does with a model

def first_line(error):
    """What an exception of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def opened(path):
    """What is in a checkpoint. InputError: it is not there, damaged, or something else."""
    if not pathlib.Path(path).is_file():
        raise InputError(f"there is no checkpoint {path}; train one first: python train.py")
    try:
        if zipfile.ZipFile(path).testzip():             # PyTorch does not check the checksums
            raise ValueError("its checksums are wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:                          # a damaged file can cause any exception
        raise InputError(f"{path} is damaged: {first_line(error)[:99]}") from error


def contract(name, *of):
    """Asks a function of tests/contract.py whether something does what it has to: the `parts`
    among the arguments of `Fudoki` and of `generate`, or the `rows` of data. Without that file
    nothing is checked. InputError: it does not."""
    if pathlib.Path(__file__).with_name("tests").is_dir():
        Registry(it=f"tests/contract:{name}")["it"](*of)    # not FILE:NAME: that is a user's file


def open_model(path=None):
    """The model of a checkpoint and its path, ready to sample, on the GPU if there is one. `toy`
    and `scenes` come along, in tests/weights/; the default is the newest under runs/, or else
    `toy`. InputError: it is not there, damaged, or of something else."""
    runs = sorted(pathlib.Path("runs").glob("*/*.ckpt"), key=lambda p: p.stat().st_mtime)
    path = pathlib.Path(path or (runs or ["toy"])[-1])
    comes_along = pathlib.Path(__file__).parent / f"tests/weights/{path}.ckpt"
    path = comes_along if comes_along.is_file() else path
    saved = opened(path)

    try:
        options = saved["hyper_parameters"]
        preset = (options.get("notes") or {}).get("preset", "")
        if ":" in preset:                               # data of one's own may add a modality
            Registry()[preset]
        model = Fudoki(**options)
        model.load_state_dict(saved["state_dict"])
    except Exception as error:
        made = {k: v for k, v in dict(saved.get("hyper_parameters") or {}).items()
                if k in ("path", "path_options", "clock", "trunk")}
        raise InputError(f"{path} is no checkpoint of this version of fudoki, or needs what is "
                         f"not here any more: {first_line(error)[:200]}; it has {made}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), path


def defaults(model, what):
    """Options of `generate` to draw or to read: the model's own, or those of this file."""
    return {"draw": DRAW, "read": READ}[what] | (model.hparams.notes or {}).get(what, {})


def take(x, rows):
    """The rows of every modality: {name: (B, N)} -> {name: (b, N)}."""
    return {m: x_m[rows] for m, x_m in x.items()}


def fill(model, options, rows=500, best_of=1, **given):
    """Tokens {name: (B, N)}, −1 where free -> the last state of `generate`, and of `best_of`
    attempts the best. At most `rows` at a time, and at most 2²⁸ logits."""
    logits = best_of * sum(kind.length * len(kind.embedding) for kind in model.tokens.values())
    rows = max(1, min(rows, 2 ** 28 // logits))
    ends = []
    for i in range(0, len(next(iter(given.values()))), rows):
        some = {m: x[i:i + rows].repeat_interleave(best_of, 0) for m, x in given.items()}
        x, free = model.to_fill(len(next(iter(some.values()))), **some)
        *_, x = tqdm(model.generate(x, free, **options), "filling", options["steps"] + 1,
                     leave=False, delay=2)
        ends.append(take(x, best(model, x, free, best_of)) if best_of > 1 else x)
    return {m: torch.cat([end[m] for end in ends]) for m in ends[0]}


@torch.no_grad()
def agreement(model, x, free):
    """log p(text | the rest) by the model's own reading, in one call; a question that was given
    when the positions `free` were filled does not count: {name: (B, N)} each -> (B,)"""
    given = x["text"].masked_fill(free["text"], -1)
    read = {m: torch.zeros_like(f) for m, f in free.items()}
    read["text"] = ~question(given, model.tokens["text"].marks)
    l = model.net(model.corrupt(x, read, 0.), read, 0.)["text"].log_softmax(-1)
    return (entry(l, x["text"])[..., 0] * read["text"]).sum(1)


def best(model, x, free, n):
    """Of every n rows the one that agrees best: {name: (B·n, N)} each -> indices (B,)"""
    score = agreement(model, x, free).view(-1, n)
    return score.argmax(1) + n * torch.arange(len(score), device=score.device)


def complete(model, text):
    """Fills missing words (−1) by the model's distribution of texts alone, before there is a
    picture: (B, N) long -> (B, N) long."""
    x, free = {"text": text.clamp(min=0).to(model.device)}, {"text": (text < 0).to(model.device)}
    if free["text"].any():
        *_, x = model.generate(x, free, steps=8)
    return x["text"]


def draw(model, texts, best_of=1, **options):
    """Pictures of B captions: list of B strings -> (B, C, size, size) in [0, 1]."""
    text = complete(model, model.tokens["text"].encode(texts))
    found = fill(model, defaults(model, "draw") | options, best_of=best_of, text=text)
    return model.tokens["image"].decode(found["image"])


def read(model, image, asked=None, **options):
    """Captions of B pictures, given as tokens (B, I), or what is `asked` about them with the
    answers: list of B strings -> list of B strings."""
    kind = model.tokens["text"]
    text = kind.encode(asked) if asked else torch.full((len(image), kind.length), -1)
    options = defaults(model, "read") | options
    return kind.decode(fill(model, options, text=text, image=image)["text"])


def write(model, texts, **options):
    """Fills the blanks of B texts: list of B strings -> list of B strings."""
    kind = model.tokens["text"]
    return kind.decode(fill(model, WRITE | options, text=kind.encode(texts))["text"])


# --------------------------------------------------------------------------- pictures and words in

def open_picture(path):
    """A picture file, upright, in mode L or RGB, on white where it is transparent. InputError: it
    cannot be read."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode[0] in "IF":                 # conversion would cut the brightness off
                raise ValueError(f"it has mode {picture.mode}; save it with 8 bits per channel")

            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    except Exception as error:                          # decoders raise all kinds
        raise InputError(f"{path} is no picture that can be read: {first_line(error)}") from error


def middle_square(picture, size, channels):
    """The middle square of a picture, 1 or 3 channels -> (C, size, size) in [0, 1]."""
    picture = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (size, size))
    values = torch.from_numpy(np.array(picture)).view(size, size, channels)
    return values.permute(2, 0, 1) / 255


def training_form(grey, size):
    """A digit on evenly lit paper as training had it: light on black, 20/28 of the side, its
    centre of mass in the middle. Mode L -> mode L, size × size. InputError: no stroke is seen."""
    pixels = np.asarray(grey, dtype=float)
    edge = np.concatenate([pixels[[0, -1]].ravel(), pixels[:, [0, -1]].ravel()])
    paper = np.median(edge)
    if grey.size == (size, size) and paper == 0:        # it has this form
        return grey

    # the paper becomes black, the ink white
    pixels, noise = pixels - paper, 3 * np.median(abs(edge - paper))
    if pixels.max() < -pixels.min():
        pixels = -pixels
    ink = ((pixels - noise) / max(pixels.max() - noise, 1)).clip(0, 1)
    if pixels.max() < 25 + noise or (ink > 0.5).mean() > 0.5:
        raise InputError("the picture is empty, or its light uneven: no stroke stands out")

    grey = Image.fromarray((255 * ink).round().astype(np.uint8))
    if grey.size == (size, size):
        return grey

    # cut out, scaled, centred
    grey = grey.crop(grey.point(lambda value: 255 * (value > 76)).getbbox())
    grey = ImageOps.contain(grey, [round(size * 20 / 28)] * 2, Image.Resampling.BILINEAR)
    mass, centred = np.asarray(grey, dtype=float), Image.new("L", (size, size))
    row, column = (np.indices(mass.shape) * mass).sum((1, 2)) / mass.sum() + 0.5
    centred.paste(grey, (round(size / 2 - column), round(size / 2 - row)))
    return centred


def load_picture(path, model):
    """A picture file in the form of the model's training -> (1, C, size, size). InputError: it
    cannot be read."""
    picture, patches = open_picture(path), model.tokens["image"]
    print(f"{path}: {picture.width}×{picture.height} {picture.mode}, as the model sees it:")
    if model.hparams.notes["form"] == "digit":
        picture = training_form(picture.convert("L"), patches.size)
    return middle_square(picture, patches.size, patches.channels)[None]


def encode(model, text, n, drawn):
    """A text as tokens of n rows (n, N), −1 where free. If the model knows all captions of its
    training, a picture that is `drawn` needs only some words, in any order: a caption with these
    words is chosen at random. InputError: unknown words, or too many."""
    captions, texts = model.hparams.notes["captions"], [text or "___"] * n

    if drawn and captions and "___" not in text:
        said = set(re.findall(r"\w+", text.lower()))
        fitting = [caption for caption in captions if said <= set(caption.split())]
        if not fitting:
            words = sorted({word for caption in captions for word in caption.split()})
            raise InputError(f"'{text}' is not part of a caption such as '{captions[-1]}'; "
                             f"known are {', '.join(words)}")
        texts = random.choices(fitting, k=n)

    try:
        return model.tokens["text"].encode(texts)
    except ValueError as error:
        raise InputError(str(error)) from error


def region(name, side):
    """Which of side × side patches lie in a region such as top, 0:0-2:6 or not 0:0-2:6: (side²,)
    bool. InputError: there is no such region."""
    half, last, place = side // 2, side - 1, name.removeprefix("not ")
    named = {"top": (0, 0, half - 1, last), "bottom": (side - half, 0, last, last),
             "left": (0, 0, last, half - 1), "right": (0, side - half, last, last)}
    n = re.fullmatch(r"(\d+):(\d+)-(\d+):(\d+)", place)
    top, left, bottom, right = map(int, n.groups()) if n else named.get(place, (1, 1, 0, 0))

    if not (top <= bottom < side and left <= right < side):
        raise InputError(f"--keep {name} has to be top, bottom, left, right or ROW:COL-ROW:COL, "
                         f"rows and columns of patches from 0 to {last}")
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[top:bottom + 1, left:right + 1] = True
    return inside.flatten() ^ name.startswith("not ")


# -------------------------------------------------------------------------- pictures and words out

def preview(images):
    """Prints as many pictures (B, C, H, W) side by side as fit, two rows of pixels to a line."""
    fit = max(1, shutil.get_terminal_size().columns // images.shape[-1])
    wide = torch.cat(list(images[:fit].mean(1).cpu()), 1)
    for line in (4 * F.avg_pool2d(wide[None], (2, 1))[0].clamp(0, 1)).round().long().tolist():
        print("".join(" ░▒▓█"[level] for level in line).rstrip())


def film(states, model, path):
    """Writes the pictures of a generation as an animated GIF."""
    frames = []
    for state in states:
        pictures = model.tokens["image"].decode(state["image"]).clamp(0, 1)
        grid = make_grid(F.interpolate(pictures, scale_factor=4), math.ceil(len(pictures) ** 0.5))
        frames.append(Image.fromarray((255 * grid).byte().permute(1, 2, 0).cpu().numpy()))
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[max(80, 2400 // len(frames))] * (len(frames) - 1) + [2000])


def present(states, free, model, given):
    """The result: pictures and a film to files, a preview and texts to the terminal."""
    last, words = states[-1], model.tokens["text"]
    if "image" in free and free["image"].any():
        pictures = model.tokens["image"].decode(last["image"]).clamp(0, 1)
        save_image(F.interpolate(pictures, scale_factor=4), given.out, format="png",
                   nrow=math.ceil(len(pictures) ** 0.5), padding=8, pad_value=0.3)
        preview(pictures)
        print(f"{given.out}: {len(pictures)} drawn")
    if given.gif:
        film(states, model, given.gif)

    if "text" not in last:                              # changed without a caption
        texts = read(model, last["image"])
    elif given.ask:
        texts = [words.decode(x[f][None])[0] for x, f in zip(last["text"], free["text"])]
    else:
        texts = words.decode(last["text"])
    print("\n".join(texts))


# ------------------------------------------------------------------------------- the command line

SEED = 0, 2 ** 32 - 1       # the numbers that seed everything


def number(kind, least, most=2 ** 31):
    """An argparse type: an int or float from least to most."""
    def parsed(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} has to be from {least} to {most}")
        return kind(text)
    parsed.__name__ = kind.__name__
    return parsed


def named(registry):
    """argparse's type and metavar of an entry of a Registry, or of FILE:NAME."""
    def parsed(text):
        try:
            registry[text]
            return text
        except LookupError as error:
            raise argparse.ArgumentTypeError(error) from error
    return dict(type=parsed, metavar=f"{{{', '.join([*registry, 'FILE:NAME'])}}}")


def add_generation(parser):
    """The options of `generate`, as flags; None where the default depends on what is free."""
    parser.add_argument("--steps", type=number(int, 1),
                        help="default: 4 to draw, 1 to read (4: parts of words), 64 to write")
    parser.add_argument("--late", type=number(float, 0.01), help="1 − t = (1 − u)^late")
    parser.add_argument("--step", **named(STEPS), help="default: race")
    parser.add_argument("--velocity", **named(VELOCITIES), help="Euler steps along this velocity")
    parser.add_argument("--guidance", type=number(float, -1e3, 1e3),
                        help="g in u + g(c − u); 1 is none (default: 2 to draw, 1 for text)")
    parser.add_argument("--temperature", type=number(float, 0), help="temperature of "
                        "p(x₁ | x_t), 0 is greedy (default: 0.7 to draw and to write, 0 to read)")


def generation(given):
    """The options of `generate` that were given."""
    names = ("steps", "late", "step", "velocity", "guidance", "temperature")
    return {name: vars(given)[name] for name in names if vars(given)[name] is not None}


def parse(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="sample.py", allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    add = parser.add_argument
    add("prompt", nargs="*", help='what to draw, e.g. "a bold slanted seven", or a text to fill')
    add("--text", help="the same as the prompt")
    add("--image", help="a picture to read or to change: any size, colour or grey")
    add("--ask", help="a question about the picture")
    add("--keep", help="part of the picture to keep: top, bottom, left, right or ROW:COL-ROW:COL "
        "in patches, counted from 0, both ends included; 'not 1:1-2:2' keeps all others")
    add("--from", type=number(float, 0, 0.999), dest="from_t", metavar="T",
        help="start from the picture as it is at time T, from 0 (noise) to 1 (untouched)")

    add("--checkpoint", help="a file, toy or scenes (default: newest under runs/, else toy)")
    add("--n", type=number(int, 1, 1000), help="pictures (default: 16) or texts (default: 1)")
    add("--best-of", type=number(int, 1), default=1, metavar="N",
        help="draw N times as many; keep those in which the model reads their caption best")
    add("--seed", type=number(int, *SEED), help="default: a new one every time")
    add("--out", default="samples.png", help="the PNG file to write (default: samples.png)")
    add("--gif", help="a file for a film of the generation")
    add_generation(parser)

    given = parser.parse_args(argv)
    given.prompt = " ".join(given.prompt + ([given.text] if given.text else []))
    given.changes = given.keep is not None or given.from_t is not None
    if given.ask and (given.prompt or given.changes) or not given.image and (
            given.ask or given.changes):
        parser.error("--ask, --keep and --from need a picture, --image; --ask nothing else")
    return given


def check(given, model):
    """InputError: this model, or what is asked of it, does not go with an option."""
    guided = given.guidance not in (None, 1)
    if "image" not in model.tokens and (given.image or given.gif or given.best_of > 1 or guided):
        raise InputError("this model knows texts only: no --image, --gif, --best-of, --guidance")
    if given.ask and not model.hparams.notes["asks"]:
        raise InputError("this model has learned no questions; train.py --ask teaches them")
    if given.gif and given.image and not given.changes:
        raise InputError("--gif shows how a picture is drawn; this one is given")
    if given.changes and not given.prompt and (given.best_of > 1 or guided):
        raise InputError("--best-of and --guidance need a caption")


def given_and_free(given, model, n):
    """What is given, and which positions are free: x, free {name: (n, N)}, n rows alike.
    InputError: nothing is left to fill."""
    patches, known = model.tokens.get("image"), {}
    text = given.ask.rstrip(" ?") + "? ___" if given.ask else given.prompt
    if given.image:
        image = patches.encode(load_picture(given.image, model).to(model.device)).expand(n, -1)
        preview(patches.decode(image[:1]))
        keep = torch.full_like(image, not given.changes, dtype=torch.bool)
        if given.keep:
            keep |= region(given.keep, math.isqrt(patches.length)).to(keep.device)
        known["image"] = image.where(keep, -1)
    if text or not given.image:
        drawn = patches and (given.changes or not given.image)
        text = encode(model, text, n, drawn)
        known["text"] = complete(model, text) if drawn else text    # words first, then a picture

    x, free = model.to_fill(n, **known)
    if given.image:
        x["image"] = image                              # --from starts from it where it is free
    if given.changes and "text" not in known:
        del x["text"], free["text"]                     # no caption: guidance has to be off
    if not any(f.any() for f in free.values()):
        raise InputError("all is given, nothing is left to fill: ___ is a blank, --keep and "
                         "--from change a picture")
    return x, free


@command
def main(argv=None):
    """Fills what is free, and shows it."""
    given = parse(argv)
    model, path = open_model(given.checkpoint)
    check(given, model)
    contract("parts", dict(model.hparams) | generation(given))
    print(f"{path}, trained on {model.hparams.notes['data']}")
    if given.seed is not None:
        L.seed_everything(given.seed, verbose=False)
    writing, reading = "image" not in model.tokens, given.image and not given.changes
    n = given.n or (1 if writing or reading else 16)
    x, free = given_and_free(given, model, n)
    x, free = (take(y, torch.arange(n).repeat_interleave(given.best_of)) for y in (x, free))

    default = WRITE if writing else defaults(model, "read" if reading else "draw")
    options = default | generation(given) | ({} if len(x) > 1 else dict(guidance=1.))
    states = list(tqdm(model.generate(x, free, t=given.from_t or 0., **options), "steps",
                       options["steps"] + 1, leave=False, delay=2))
    if given.best_of > 1:
        rows = best(model, states[-1], free, given.best_of)
        states, free = [take(state, rows) for state in states], take(free, rows)

    present(states, free, model, given)


if __name__ == "__main__":
    from sample import main         # the module that files of one's own import as `sample`, too
    sys.exit(main())
