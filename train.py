"""Trains a model, shows what it learns, and measures what it can do:

    python train.py                     tokenised MNIST with captions (--preset toy)
    python train.py --preset smoke      rendered digits, half a minute: does everything run?

The model learns to draw "a bold slanted seven" and to read one. What it writes is in
runs/<preset>/: model.ckpt, samples/*.png, report.csv and the log of every run.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # threads that wait do not spin

import argparse
import csv
import datetime
import logging
import math
import pathlib
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
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import MNIST
from torchvision.utils import save_image

from fudoki import PATHS, SCHEDULES, Fudoki, InputError, Parser, Patches, command, k_means, nearest

PRESETS = {         # what they cost and reach: tests/bench/*.csv, README
    "toy": dict(
        codes=256, patch=4, path="metric", exponent=2.0, normalize=False, schedule="calibrated",
        width=96, depth=4, heads=3, lr=3e-3, weight_decay=0.01, share=0.65, drop=0.1, infill=0.0,
        batch=64, steps=4500, max_minutes=12.5, ema=0.999, val_every=500, train_images=60_000,
        test_images=10_000, drawings=1000, threads=0, seed=0),
    "smoke": dict(
        codes=128, patch=7, width=64, depth=2, heads=2, lr=5e-3, steps=600, max_minutes=1 / 3,
        share=0.5, ema=0.98, val_every=300, train_images=4000, test_images=500, drawings=200,
        threads=1),
}
TRAINER = dict(accelerator="auto", devices="auto", num_nodes=1, strategy="auto", precision="auto")
HELP = dict(
    codes="size of the codebook of patches", patch="side of a patch in pixels",
    path=" or ".join(PATHS), exponent="of the distance in the metric path; FUDOKI 4, URSA 2",
    normalize="L2-normalise the embeddings of the metric path",
    schedule=" or ".join(SCHEDULES), width="of the transformer", depth="blocks of the transformer",
    heads="of its attention", lr="peak learning rate", weight_decay="of AdamW",
    share="of a batch that is drawn, the rest is read",
    drop="how often captions are left out when drawing, for guidance",
    infill="share of rows in which a coin decides for each word whether it is given, so that "
    "sample.py may leave words to the model; costs accuracy in drawing", batch="rows per step",
    steps="training steps at most", max_minutes="minutes of training at most; both ends are known "
    "to the learning rate", ema="decay of the averaged weights",
    val_every="steps between validations, sample grids and checkpoints",
    train_images="training images used", test_images="test images read in the report",
    drawings="images drawn in the report", threads="of the CPU; 0 leaves it to PyTorch, 1 is "
    "faster for very small models", seed="of everything random")
AT_LEAST_ONE = ("codes", "patch", "width", "depth", "heads", "steps", "val_every", "train_images",
                "test_images", "drawings")
SIZE = 28           # side of a picture in pixels


def parse(argv=None):
    """The settings of a run: the preset's, overridden by flags. InputError: a wrong one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="toy", help=f"{' or '.join(PRESETS)} (default: toy)")
    parser.add_argument("--data-dir", help="a folder with MNIST in torchvision's layout, "
                        "<folder>/MNIST/raw; by default it is downloaded to data/")
    parser.add_argument("--resume", action="store_true",
                        help="go on from runs/<preset>/model.ckpt, with its model")
    for name, value in PRESETS["toy"].items():
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(value, bool) \
            else dict(type=type(value))
        parser.add_argument("--" + name.replace("_", "-"), **kind,
                            help=f"{HELP[name]} (toy: {value})")
    for name, value in TRAINER.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value),
                            help=f"of Lightning's Trainer (default: {value})")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if given["preset"] not in PRESETS:
        raise InputError(f"no preset {given['preset']}; {nearest(given['preset'], PRESETS)}")
    run = argparse.Namespace(
        **{"data_dir": None} | TRAINER | PRESETS["toy"] | PRESETS[given["preset"]] | given)
    for name, known in (("path", PATHS), ("schedule", SCHEDULES)):
        value = getattr(run, name)
        if value not in known:
            raise InputError(f"no {name} {value}; {nearest(value, known)}")
    for name in AT_LEAST_ONE:
        if getattr(run, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} has to be at least 1")
    if SIZE % run.patch:
        raise InputError(f"--patch {run.patch} does not divide the picture's side, {SIZE}")
    if run.width % (4 * run.heads):
        raise InputError(f"--width {run.width} is no multiple of 4·heads = {4 * run.heads}")
    if not (0 < run.share < 1 and run.batch > 1 and run.max_minutes > 0 and 0 <= run.drop <= 1):
        raise InputError("--share has to lie between 0 and 1, --drop from 0 to 1, --batch has to "
                         "be at least 2 and --max-minutes above 0")
    return run


# ------------------------------------------------------------------ the data: digits with captions

DIGITS = "zero one two three four five six seven eight nine".split()
SLOTS = [["thin", "bold"], ["upright", "slanted"], DIGITS]
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


class Pairs(torch.utils.data.Dataset):
    """Tokens {name: (N, L)} with their captions; rows leave as one batch, without a loop."""

    def __init__(self, model, images, digits):
        image = model.patches.encode(images.to(model.device))
        seen = model.patches.decode(image).cpu()        # captions of what the model can see
        self.texts = captions(seen, digits)
        self.tokens = {"text": model.words.encode(self.texts), "image": image.cpu()}

    def __len__(self):
        return len(self.texts)

    def __getitems__(self, rows):
        return {m: tokens[rows] for m, tokens in self.tokens.items()}


def build(run, images, origin):
    """A new model whose codebook and schedules fit these pictures."""
    some = images[torch.randperm(len(images))[:8000]]
    patches = F.unfold(some, run.patch, stride=run.patch).transpose(1, 2).flatten(0, 1)
    codebook = k_means(patches, run.codes)
    tokens = Patches(codebook, run.patch, SIZE).encode(some)
    names = ("codes patch path exponent normalize schedule width depth heads lr weight_decay "
             "share drop infill").split()
    return Fudoki(SLOTS, size=SIZE, data=origin, codebook=codebook,
                  frequency={"image": torch.bincount(tokens.flatten(), minlength=run.codes)},
                  **{name: getattr(run, name) for name in names})


# ------------------------------------------------------------------------------------ the training

class Bar(TQDMProgressBar):
    """Lightning's progress bar, with the time that is left until the last step or minute."""

    def get_metrics(self, trainer, model):
        """Loss, accuracy, time left."""
        metrics = super().get_metrics(trainer, model)
        metrics.pop("v_num", None)
        done = model.progress()
        left = (time.time() - self.begin) * (1 - done) / max(done - self.before, 1e-9)
        return metrics | {"left": f"{int(left) // 60}:{int(left) % 60:02}"}

    def on_train_start(self, trainer, model):
        self.begin, self.before = time.time(), model.progress()
        super().on_train_start(trainer, model)


class Keep(L.Callback):
    """Sample grids and checkpoints at every validation, and at the end however it comes. It has to
    stand before the averaging, so that it draws with the averaged weights and saves both kinds."""

    def __init__(self, folder, resume):
        self.folder, self.fresh = folder, not resume
        self.signal, self.handlers, self.first = None, {}, math.inf

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
            texts = [f"{a} {b} {digit}" for a in SLOTS[0] for b in SLOTS[1] for digit in DIGITS]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                images = model.draw(texts)
            path = self.folder / "samples" / f"step_{trainer.global_step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(images, path, nrow=10)

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


def fit(model, pairs, run, folder):
    """Trains with Lightning; the model ends with its averaged weights. -> the Keep callback and
    samples per second"""
    if run.precision == "auto":
        on_gpu = torch.cuda.is_available() and run.accelerator in ("auto", "gpu", "cuda")
        half = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "16-mixed"
        run.precision = half if on_gpu else "32-true"

    def average(mean, now, n):          # at first the mean follows closely, it has seen little
        return torch.lerp(mean, now, 1 - ((1 + n) / (10 + n)).clamp(max=run.ema))

    keep = Keep(folder, run.resume)
    trainer = L.Trainer(
        **{name: getattr(run, name) for name in TRAINER}, max_steps=run.steps,
        max_time=datetime.timedelta(minutes=run.max_minutes), gradient_clip_val=1.0,
        val_check_interval=run.val_every, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=50,
        logger=CSVLogger(folder, "log"),
        callbacks=[Bar(refresh_rate=20), keep, WeightAveraging(use_buffers=False, avg_fn=average)])
    n = min(1000, len(pairs) // 10)                     # held out for validation
    rows = torch.arange(len(pairs))
    seen, held = (torch.utils.data.Subset(pairs, r.tolist()) for r in (rows[n:], rows[:n]))
    same = dict(collate_fn=lambda batch: batch)
    sampler = RandomSampler(seen, num_samples=run.steps * run.batch)
    loaders = (DataLoader(seen, run.batch, sampler=sampler, **same),
               DataLoader(held, max(1, n // 10), **same))
    begin, resume = time.time(), folder / "model.ckpt" if run.resume else None
    trainer.fit(model, *loaders, ckpt_path=resume, weights_only=True)
    model.to(trainer.strategy.root_device).eval()       # Lightning hands it back on the CPU
    return keep, max(0, trainer.global_step - keep.first) * run.batch / (time.time() - begin)


# -------------------------------------------------------------------------------------- the report

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


def right(texts, truth):
    """The shares of texts with the right digit, and of those with every word right."""
    digit = sum(a.split()[-1] == b.split()[-1] for a, b in zip(texts, truth))
    whole = sum(a == b for a, b in zip(texts, truth))
    return digit / len(texts), whole / len(texts)


def report(model, run, train, test):
    """Draws and reads test captions and images. -> rows (what, digit, caption, Fréchet, images per
    second, network calls)"""
    judge = Judge().fit(*train)
    images, digits = test
    pairs = Pairs(model, images, digits)
    truth, tokens = pairs.texts, pairs.tokens["image"].to(model.device)
    decoded = model.patches.decode(tokens).cpu()
    real, seen = judge(images)
    ideal, ideal_seen = judge(decoded)
    others = judge(train[0][:len(images)])[0]
    begin = time.time()
    drawn = model.draw(truth[:run.drawings]).cpu()
    middle = time.time()
    read = model.read(tokens)
    end = time.time()
    features, drawn_seen = judge(drawn)
    draw = ", ".join(f"{k} {v:g}" for k, v in model.DRAW.items())
    return [
        ("judge, real test images", (seen == digits).float().mean().item(), math.nan,
         frechet(others, real), math.nan, math.nan),
        ("ceiling, decoded test images", *right(captions(decoded, ideal_seen), truth), math.nan,
         math.nan, math.nan),
        (f"drawing, {draw}", *right(captions(drawn, drawn_seen), truth[:run.drawings]),
         frechet(features, ideal), run.drawings / (middle - begin), 2 * model.DRAW["steps"]),
        ("reading, steps 1, greedy", *right(read, truth), math.nan, len(read) / (end - middle), 1)]


def show(rows, run):
    """Prints the report."""
    columns = "digit", "caption", "Fréchet", "images/s", "calls"
    print(f"\n{run.drawings:,} images drawn, {run.test_images:,} read\n{'':46}"
          + "".join(f"{column:>9}" for column in columns))
    for what, *numbers in rows:
        cells = (format(n, "" if math.isnan(n) else form).replace("nan", "")
                 for n, form in zip(numbers, (".3f", ".3f", ".1f", ".0f", ".0f")))
        print(f"{what:46}" + "".join(f"{cell:>9}" for cell in cells))


# -------------------------------------------------------------------------------------------- main

@command
def main(argv=None):
    """Data, codebook, model, training, report."""
    run, begin = parse(argv), time.time()
    folder = pathlib.Path("runs") / run.preset
    if run.resume and not (folder / "model.ckpt").exists():
        raise InputError(f"nothing to go on from: there is no {folder / 'model.ckpt'}")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(run.seed, verbose=False)
    torch.set_num_threads(run.threads or torch.get_num_threads())
    train, test, origin = load_digits(run)
    model = Fudoki.open(folder / "model.ckpt").train() if run.resume else \
        build(run, train[0], origin)
    pairs = Pairs(model, *train)
    count = sum(p.numel() for p in model.net.parameters())
    print(f"{origin}: {len(pairs):,} images of {model.lengths['image']} tokens, captions of "
          f"{model.lengths['text']}; {count / 1e6:.2f} M parameters", flush=True)
    keep, rate = fit(model, pairs, run, folder)
    if keep.signal:
        print(f"\nstopped; {folder / 'model.ckpt'} is saved, go on with --resume")
        return
    if model.global_rank > 0:
        return                                          # one process reports
    rows = report(model, run, train, test)
    minutes = (time.time() - begin) / 60
    save_image(test[0][0], folder / "digit.png")
    show(rows, run)
    same = dict(minutes=f"{minutes:.2f}", samples_per_s=f"{rate:.0f}", seed=run.seed, data=origin,
                device=f"{model.device.type}, {torch.get_num_threads()} threads",
                command=" ".join(["python train.py", *(sys.argv[1:] if argv is None else argv)]))
    with open(folder / "report.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "digit", "caption", "frechet", "images_per_s", "calls", *same])
        writer.writerows([*row, *same.values()] for row in rows)
    print(f"\n{minutes:.1f} minutes, {rate:.0f} samples/s in training; model and samples are in "
          f"{folder}. Next:\n"
          f'  python sample.py "a bold slanted seven"\n'
          f"  python sample.py --image {folder / 'digit.png'}")


if __name__ == "__main__":
    sys.exit(main())
