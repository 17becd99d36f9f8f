"""Should a network see given parts clean? Trains the toy with a share of rows of which some places
are given as they are, beside noise, and the rest are free: then a given part may stay clean in
`generate` (`still`), as well as be as noisy as the rest (`moving`). Appends to given.csv, skips
the rows that are there.

    python tests/bench/given.py [--steps 1500] [--seeds 0 1] [--data-dir FOLDER]

clean: the share of such rows; in each of them a position is given with a probability that is
uniform. Drawing and reading are as in the report, halves and words as in inpaint.py. All is
measured on the first 500 training images, which neither model nor judge has seen.
"""
import argparse
import itertools

import lightning as L
import study                    # first: it puts the project on the path
import torch

import fudoki
import inpaint
import sample
import train

SHARES = 0., 0.25


class Given(fudoki.Fudoki):
    """Of some rows a part of what would be free is given."""
    clean = 0.

    def task(self, x_1):
        free = super().task(x_1)
        for m, f in free.items():
            row = torch.rand(2, len(f), 1, device=f.device)
            free[m] = f & ((row[0] > self.clean) | (torch.rand(f.shape, device=f.device) < row[1]))
        return free


def measure(model, data, judge):
    """(what, given, digit, caption, frechet, seam) of a trained model."""
    rows, truth = data.rows(model, *(part[:500] for part in data.held_out))
    patches, noisy = model.tokens["image"], model.noisy
    drawn = sample.draw(model, truth)
    features, seen = judge(drawn)
    real = judge(patches.decode(rows["image"]))[0]
    yield ("drawing", "", *study.right(train.captions(drawn, seen), truth),
           f"{study.world.frechet(features, real):.2f}", "")
    yield ("reading", "", *study.right(sample.read(model, rows["image"]), truth), "", "")

    for region, way in itertools.product(("top", "left", "words"), ("moving", "still")):
        x, free = inpaint.halves(model, rows["image"], rows["text"], region)
        x["image"] = rows["image"]
        model.noisy = noisy if way == "moving" else lambda x, free: free
        *_, end = model.generate(x, free, **sample.GAPS if region == "words" else sample.DRAW)
        yield region, way, *inpaint.measure(end, x, free, truth, region, model, judge)[:4]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--paths", nargs="+", default=["metric"])
    parser.add_argument("--data-dir")
    given = parser.parse_args()
    table = study.Table("given", "path clean steps seed what given".split(),
                        "digit caption frechet seam".split())
    judge = None
    for seed, path, share in itertools.product(given.seeds, given.paths, SHARES):
        key = path, share, given.steps, seed
        if (*key, "words", "still") in table:           # the last of them
            continue
        run, data = study.prepared([*study.where(given), "--path", path, "--seed", str(seed),
                                    "--steps", str(given.steps), "--val-every", "10000"])
        judge = judge or study.judge(data)
        L.seed_everything(seed, verbose=False)
        model = data.build(run)
        model.__class__, model.clean = Given, share
        study.trained(run, data, model)
        L.seed_everything(seed, verbose=False)
        for what, way, *values in measure(model, data, judge):
            table.add(*key, what, way, *(v if isinstance(v, str) else f"{v:.3f}" for v in values))


if __name__ == "__main__":
    main()
