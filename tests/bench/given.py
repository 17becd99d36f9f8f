"""Should a network see given parts clean? Trains the toy with different shares of rows that are
given some places as they are, beside noise, and have to find the rest. Then a given part may stay
clean in `generate` (`still`), or be as noisy as the rest (`moving`). Appends to given.csv, skips
the rows that are there.

    python tests/bench/given.py [--steps 1500] [--seeds 0 1] [--data-dir FOLDER]

clean: the share of such rows, any share of whose places is given. Drawing and reading are as in
the report, halves and words as in inpaint.py. All is measured on the first 500 training images,
which neither model nor judge has seen.
"""
import argparse
import itertools

import lightning as L
import study                    # first: it puts the project on the path

import inpaint
import sample
import train

SHARES = 0., 0.1, 0.25


def measure(model, data, judge):
    """(what, given, digit, caption, frechet, seam) of a trained model."""
    rows, truth = data.rows(model, *(part[:500] for part in data.held_out))
    patches = model.tokens["image"]
    drawn = sample.draw(model, truth)
    features, seen = judge(drawn)
    real = judge(patches.decode(rows["image"]))[0]
    yield ("drawing", "", *study.right(train.captions(drawn, seen), truth),
           f"{study.world.frechet(features, real):.2f}", "")
    yield ("reading", "", *study.right(sample.read(model, rows["image"]), truth), "", "")

    for region, way in itertools.product(("top", "left", "words"), inpaint.WAYS):
        x, free = inpaint.halves(model, rows["image"], rows["text"], region)
        x["image"] = rows["image"]
        model.hparams.clean = float(way == "still")
        *_, end = model.generate(x, free, **sample.READ if region == "words" else sample.DRAW)
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
        model.hparams.clean = share
        study.trained(run, data, model)
        L.seed_everything(seed, verbose=False)
        for what, way, *values in measure(model, data, judge):
            table.add(*key, what, way, *(v if isinstance(v, str) else f"{v:.3f}" for v in values))


if __name__ == "__main__":
    main()
