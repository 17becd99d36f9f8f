"""How well trained models draw, by the options of `generate`: appends to sampling.csv, skips the
rows that are there.

    python tests/bench/sampling.py NAME=CHECKPOINT … [--data-dir FOLDER] [--minutes 30]

NAME is what the checkpoint is called in the CSV: metric has all cells, the others those that
compare paths. 500 pictures a cell and seed; their captions are of the held-out images of training
(the first thousand), so that test captions are left for the report. The judge is the report's.
Two steps are defined here, to compare with: `released` is Euler with the velocity at the beginning
of a step, which FUDOKI's code sets to 0 at t = 0; `increments` has ℓ_s − ℓ_t for (s − t)·∂ℓ.
"""
import itertools
import time

import lightning as L
import numpy as np
import study                    # first: it puts the project on the path
import torch

import fudoki
import sample
import train

KEYS = "checkpoint step steps guidance temperature best_of times seed".split()
DRAW = dict(step="race", **sample.DRAW, best_of=1, times="even")


def jump(u, x_t, duration):
    lam = u.sum(-1)
    leaves = torch.rand_like(lam) < -torch.expm1(-duration * lam)
    return torch.where(leaves, fudoki.categorical(u), x_t)


@fudoki.rowwise
def released(path, x_t, x_1, t, s):
    if not t[0]:
        return x_t
    return jump(fudoki.kinetic_optimal(path, x_t, x_1, t), x_t, (s - t)[..., 0])


@fudoki.rowwise
def increments(path, x_t, x_1, t, s):
    l_t = path(x_1, t)
    dl = path(x_1, s) - l_t
    return jump(l_t.softmax(-1) * (dl - fudoki.entry(dl, x_t)).relu(), x_t, 1.)


fudoki.STEPS |= {"released": released, "increments": increments}


def cells(name):
    """The options to be tried on a checkpoint, the most important ones first."""
    found = [dict(steps=n) for n in (1, 2, 4, 8, 16, 32)]
    if name == "metric":
        found += [dict(steps=n, step=step) for n in (2, 4, 8)
                  for step in ("released", "increments", "euler", "renoise")]
        found += [dict(guidance=g) for g in (1., 1.5, 2.5, 3.)]
        found += [dict(temperature=T) for T in (0.5, 1.)]
        found += [dict(steps=n, times="loss") for n in (2, 4)]
        found += [dict(steps=n, times="late") for n in (2, 4, 8)]
        found += [dict(best_of=n) for n in (4, 16)]
    else:
        found += [dict(steps=8, step="renoise"), dict(steps=8, times="late")]
    return [DRAW | options for options in found]


def equal_loss(model, tokens):
    """`times` with the same fall of the model's loss in every step."""
    grid = torch.linspace(0, 1, 21)
    with torch.no_grad():
        free = model.mark_free(tokens, "image")
        loss = [model.loss(tokens, free, t)[0].item() for t in grid[:-1]]
    loss = np.minimum.accumulate([*loss, 0.])
    return lambda t, steps, late: np.interp(np.linspace(loss[0], 0, steps + 1)[::-1], loss[::-1],
                                            grid.numpy()[::-1])[::-1].tolist()


def run(cell, model, truth):
    """Pictures, changes of a token on average, the share that changed more than once."""
    options = {k: cell[k] for k in ("step", "steps", "guidance", "temperature")}
    options["late"] = 2. if cell["times"] == "late" else 1.
    text = model.tokens["text"].encode(truth)
    if cell["best_of"] > 1:
        x = sample.fill(model, options, rows=50, best_of=cell["best_of"], text=text)
        return model.tokens["image"].decode(x["image"]), "", ""
    states = [x["image"] for x in model.generate(*model.to_fill(len(text), text=text), **options)]
    count = sum((a != b).float() for a, b in itertools.pairwise(states))
    return (model.tokens["image"].decode(states[-1]), f"{count.mean().item():.3f}",
            f"{(count > 1).float().mean().item():.3f}")


def main():
    parser = study.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    given = parser.parse_args()
    end = time.time() + 60 * given.minutes
    table = study.Table("sampling", KEYS,
                        "digit caption frechet judge changes revised images_per_s".split())
    data = study.digits(given)
    judge, test, models = study.judge(data), data.test, dict(study.models(given))
    accuracy = (judge(test[0])[1] == test[1]).float().mean().item()
    for name, model in models.items():
        rows, model.truth = data.rows(model, *data.held_out)
        model.evenly = model.times
        model.by_loss = equal_loss(model, sample.take(rows, slice(0, 500)))
        model.ideal, _ = judge(model.tokens["image"].decode(model.tokens["image"].encode(test[0])))
        print(name, "times by loss:", *(f"{t:.3f}" for t in model.by_loss(0, 8, 1)), flush=True)
    for seed, (name, model) in itertools.product(range(given.seeds), models.items()):
        for cell in cells(name):
            key = name, *cell.values(), seed
            if key in table:
                continue
            if time.time() > end:
                return print("time is over; the same command goes on")
            model.times = model.by_loss if cell["times"] == "loss" else model.evenly
            L.seed_everything(seed, verbose=False)
            truth, begin = model.truth[500 * (seed % 2):][:500], time.time()
            drawn, changes, revised = run(cell, model, truth)
            rate = 500 / (time.time() - begin)
            features, seen = judge(drawn)
            table.add(*key, *study.right(train.captions(drawn, seen), truth),
                      f"{study.world.frechet(features, model.ideal):.2f}", f"{accuracy:.4f}",
                      changes, revised, f"{rate:.0f}")


if __name__ == "__main__":
    main()
