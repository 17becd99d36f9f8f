"""What does pretraining bring to a flow? The body of a language model learns digits, scenes and
children's stories from its weights and from random ones, in equal steps:

    python tests/bench/body.py --lm FOLDER --text FILE [--data digits] [START …] [--seeds 0 1]
    python tests/bench/body.py --plot           figures/body.png

START: pretrained; random (all weights); layers (all but the words are random); lower (the lower
half of the layers is random); frozen (layers are pretrained and stay as they are); stages (words
stay as they are for a third of the steps); noshift; uniform (another path); adamw; small (another
trunk, that of the toy); shallow (the toy's, with the width and depth of story-656K); added (as
shallow, but coordinates are added to the vectors); unnormed (queries and keys are not normalised);
both. random@6e-3 has another learning rate than the preset's. What is in body.csv is skipped.

Rows are validations, by the averaged weights: the held-out cross-entropy of a modality at ten
noise levels, and after the last step what is right of the report's drawings and readings, of
digits also when they are read in one call, or the bits of a token.
"""
import argparse
import csv
import itertools
import re
import sys
import tempfile
from pathlib import Path

import lightning as L
import study                    # first: it puts the project on the path
import torch
from backbone import bits
from torch import nn

import fudoki
import sample

STEPS = dict(digits=1000, scenes=5000, stories=430)
TIMES = [f"t{(i + 0.5) / 10:.2f}" for i in range(10)]
KEYS = "data model start seed steps step modality".split()
SHOWN = [("layers", "layers random", "C1"), ("random", "all random", "C3"),
         ("random@6e-3", "all random, .006", "C2")]
SHALLOW = "--width 128 --depth 2 --heads 4".split()
SMALL = dict(small=[], shallow=SHALLOW) | {
    start: [*SHALLOW, "--trunk", f"tests/bench/body:{start.title()}"]
    for start in ("added", "unnormed", "both")}
RANDOM = dict(random="", layers=r"body\.layers\.", lower=r"body\.layers\.(\d+)\.")


class Added(fudoki.Blocks):
    """Coordinates are added to the vectors, as in `Backbone`. Queries and keys are not turned."""

    def __init__(self, width, depth, heads):
        super().__init__(width, depth, heads)
        self.place = nn.Parameter(torch.zeros(width, width))

    def forward(self, h, places, visible, t):
        h = h + torch.cat(fudoki.rotary(places, self.width), -1) @ self.place
        return super().forward(h, torch.zeros_like(places), visible, t)


class Unnormed(fudoki.Blocks):
    """Queries and keys are not normalised."""

    def __init__(self, width, depth, heads):
        super().__init__(width, depth, heads)
        for block in self.blocks:
            block.attention.norm_q = block.attention.norm_k = nn.Identity()


class Both(Added, Unnormed):
    pass


def flags(data, start, given):
    """Of train.py."""
    start, _, lr = start.partition("@")
    body = ["--backbone", given.lm]
    text = ["--text", given.text, "--batch", str(given.batch), "--length", str(given.length),
            "--optimizer", "muon", "--lr", "2e-2"]
    where = {"digits": ["--preset", "ar", *study.where(given)],
             "scenes": ["--preset", "scenes", "--lr", "2e-2", *body],
             "stories": ["--preset", "ar", *text]}[data] + body
    if start in SMALL:
        where = {"digits": ["--preset", "toy", *study.where(given)],
                 "scenes": ["--preset", "scenes"]}[data] + SMALL[start]
    return where + {"noshift": ["--trunk-options", "shift=False"],
                    "uniform": ["--path", "uniform"], "adamw": ["--optimizer", "adamw"]}.get(
                        start, []) + ["--lr", lr] * bool(lr)


def begin(model, start, steps):
    """Makes some weights of the body random, or keeps them from learning."""
    start = start.partition("@")[0]
    body, half = model.net.trunk, model.hparams.trunk_options["config"]["num_hidden_layers"] / 2
    if start in RANDOM:
        fresh = fudoki.Backbone(**model.hparams.trunk_options).state_dict()
        found = {name: re.match(RANDOM[start], name) for name in fresh}
        body.load_state_dict({name: fresh[name] for name, match in found.items() if match and (
            not match.groups() or int(match[1]) < half)}, strict=False)
    body.body.layers.requires_grad_(start != "frozen")
    if start == "stages":
        third = steps / 3
        model.on_train_batch_start = lambda rows, i: body.words.requires_grad_(i >= third) and 0


def measured(data, start, seed, given, table):
    """One training, and its rows."""
    steps = given.steps or STEPS[data]
    run, world = study.prepared([*flags(data, start, given), "--seed", str(seed), "--steps",
                                 str(steps), "--val-every", str(steps // given.validations)])
    model, world.sample = world.build(run), lambda model, path: None
    if data == "stories":
        training, held_out = world.tokens(model)
        world.tokens = lambda model: (training, {"text": held_out["text"][:given.windows]})
    if start.partition("@")[0] not in SMALL:
        begin(model, start, steps)

    with tempfile.TemporaryDirectory() as folder:
        study.trained(run, world, model, folder)
        log, = Path(folder).glob("log/*/metrics.csv")
        rows = csv.DictReader(log.open(encoding="utf-8"))
        found = [row for row in rows if row.get("val_text_loss")]

    L.seed_everything(seed, verbose=False)
    right, one_call = {}, ""
    if data == "digits":
        rows, truth = world.rows(model, *(part[:1000] for part in world.test))
        one_call = f"{study.right(sample.read(model, rows['image'], steps=1), truth)[1]:.3f}"
    if data != "stories":
        for what, numbers in world.report(model, run, {}):      # the last of a drawing is its mean
            modality = {"drawing": "image", "reading": "text"}.get(what.split(",")[0])
            right[modality] = f"{numbers.get('caption', numbers.get('seen', 0)):.3f}"
    else:
        held = world.tokens(model)[1]["text"][:16]
        right["text"] = f"{bits(model, held, fudoki.kinetic_optimal):.3f}"

    for row, modality in itertools.product(found, model.tokens):
        step = int(row["step"]) + 1
        losses = [row[f"val_{modality}_loss{t}"] for t in ("", *(f"_{t}" for t in TIMES))]
        end = (right[modality], one_call) if row is found[-1] else ("", "")
        table.add(data, Path(given.lm).name, start, seed, steps, step, modality,
                  *(f"{float(loss):.4f}" for loss in losses), *end)


def plot():
    """The last cross-entropy at each noise level, less that from the pretrained weights."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = {tuple(row[k] for k in ("data", "modality", "start", "seed")): row for row in
             csv.DictReader((study.ROOT / "tests/bench/body.csv").open(encoding="utf-8"))
             if row["step"] == row["steps"] and row["model"] == "story-656K"}
    panels = [("digits", "image"), ("scenes", "image"), ("stories", "text")]
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.3))
    for axis, panel in zip(axes, panels):
        axis.axhline(0, color="C0", label="pretrained")
        for (start, name, colour), seed in itertools.product(SHOWN, "01"):
            pair = [found.get((*panel, which, seed)) for which in (start, "pretrained")]
            if all(pair):
                its, usual = ([float(row[t]) for t in TIMES] for row in pair)
                axis.plot([float(t[1:]) for t in TIMES], [a - b for a, b in zip(its, usual)],
                          colour, marker=".", label=name if seed == "0" else None)
        axis.set(title=f"{panel[0]}: {dict(image='patches', text='words')[panel[1]]}", xlabel="t")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("nats more than pretrained")
    plt.tight_layout()
    plt.savefig(study.ROOT / "figures/body.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("starts", nargs="*", default=["pretrained", "random", "lower", "frozen"])
    parser.add_argument("--lm", help="a folder")
    parser.add_argument("--text", help="a file, for stories")
    parser.add_argument("--data", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--data-dir", help="a folder that holds MNIST/raw")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--batch", type=int, default=16, help="windows of stories (default: 16)")
    parser.add_argument("--length", type=int, default=128, help="of a window (default: 128)")
    parser.add_argument("--windows", type=int, help="of held-out stories (default: all)")
    parser.add_argument("--validations", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--plot", action="store_true", help="figures/body.png from the CSV")
    given = parser.parse_args()
    if given.plot:
        sys.exit(plot())
    table = study.Table("body", KEYS, ["loss", *TIMES, "right", "one_call"])
    for data, seed, start in itertools.product(given.data, given.seeds, given.starts):
        steps = given.steps or STEPS[data]
        if (data, Path(given.lm).name, start, seed, steps, steps, "text") not in table:
            measured(data, start, seed, given, table)
