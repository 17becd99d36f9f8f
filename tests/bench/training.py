"""What the settings of the toy's training are worth: trains it with one of them changed, as many
steps, and appends to training.csv; skips the rows that are there.

    python tests/bench/training.py [NAME …] [--steps 1000] [--seeds 0 1] [--data-dir FOLDER]

NAME is an entry of VARIANTS, by default all. Everything is measured on the first thousand training
images, which neither the model nor the judge has seen: their captions drawn and these pictures
read as in the report, the share of right answers, the cross-entropy of pictures by t. So the test
set is left for the report. 1,000 steps take three minutes on a core that has 350 samples a second.
"""
import argparse
import itertools

import lightning as L
import study                    # first: it puts the project on the path
import torch
from torch import nn

import sample
import train


def without_norms(model):
    """Takes the normalisation of queries and keys out."""
    for block in model.net.trunk.blocks:
        block.attention.norm_q = block.attention.norm_k = nn.Identity()


VARIANTS = {                    # flags, and what is done to the new model
    "as the preset": ("", None),
    "exponent 2": ("--path-options exponent=2.", None),
    "t = u²": ("--t-power 2", None),
    "t = u": ("--t-power 1", None),
    "AdamW, learning rate .003": ("--optimizer adamw --lr 3e-3", None),
    "queries and keys as they are": ("", without_norms),
}
TIMES = 0.05, 0.25, 0.5, 0.75


def measure(model, data, judge):
    """The values of a row."""
    rows, truth = data.rows(model, *data.held_out)
    patches = model.tokens["image"]
    x, ideal = rows, judge(patches.decode(patches.encode(data.test[0])))[0]
    drawn = sample.draw(model, truth)
    features, seen = judge(drawn)
    answers = study.world.answers(model, x["image"], truth)["caption"]
    with torch.no_grad():
        losses = [model.loss(x, model.mark_free(x, "image"), t)[0].item() for t in TIMES]
    values = [*study.right(train.captions(drawn, seen), truth),
              *study.right(sample.read(model, x["image"]), truth), answers, *losses]
    return [f"{study.world.frechet(features, ideal):.1f}",
            f"{study.world.frechet(judge(patches.decode(x['image']))[0], ideal):.1f}",
            *(f"{value:.3f}" for value in values)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--data-dir")
    given = parser.parse_args()
    table = study.Table("training", "variant steps seed".split(), [
        "frechet", "real", "digit", "caption", "reading_digit", "reading_caption", "answers",
        *(f"loss_t{t}" for t in TIMES), "samples_per_s"])
    judge = None
    for seed, name in itertools.product(given.seeds, given.names):
        if (name, given.steps, seed) in table:
            continue
        flags, change = VARIANTS[name]
        run, data = study.prepared([*flags.split(), *study.where(given), "--seed", str(seed),
                                    "--steps", str(given.steps), "--val-every", str(given.steps),
                                    "--clean", "0"])
        judge = judge or study.judge(data)
        L.seed_everything(seed, verbose=False)
        model = data.build(run)
        if change:
            change(model)
        rate = study.trained(run, data, model)
        L.seed_everything(seed, verbose=False)
        table.add(name, given.steps, seed, *measure(model, data, judge), f"{rate:.0f}")


if __name__ == "__main__":
    main()
