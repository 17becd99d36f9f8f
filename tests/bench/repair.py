"""Does a model revise? Tokens of 300 held-out pictures, or of their captions, are replaced by
random others, and the model goes on from there, the other modality given, in one of three ways:
`state`, as if that were its state at time t; `draft`, with the noise of time t added; `told`, from
noise at the replaced tokens only. Random others lie anywhere; those of "image, near" are drawn
from the metric path at t = .5. Appends to repair.csv, skips the rows that are there.

    python tests/bench/repair.py NAME=CHECKPOINT … [--data-dir FOLDER]

repaired: share of the replaced tokens that end as they were; spoiled: share of the others that do
not; left: squared error of the pictures (in pixels) after, by that before. 4 steps, greedy, no
guidance.
"""
import argparse
import csv
import itertools
import sys
from pathlib import Path

import lightning as L
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import fudoki  # noqa: E402
import train  # noqa: E402

FILE = ROOT / "tests/bench/repair.csv"
KEYS = "checkpoint modality damaged way t seed".split()
COLUMNS = [*KEYS, "repaired", "spoiled", "left"]
WAYS = [("state", 0.5), ("state", 0.9), ("draft", 0.3), ("draft", 0.5), ("draft", 0.7),
        ("told", 0.)]
CELLS = [(m, share, way, t) for m, shares in (("image", (0.05, 0.2, 0.4)), ("text", (0.33, 1.)))
         for share in shares for way, t in WAYS]
CELLS += [("image, near", 0.2, way, t) for way, t in WAYS]

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
parser.add_argument("--data-dir")
parser.add_argument("--seeds", type=int, default=3)
given = parser.parse_args()

if not FILE.exists():
    FILE.write_text(",".join(COLUMNS) + "\n")
done = {tuple(row[k] for k in KEYS) for row in csv.DictReader(FILE.open())}
digits = train.Digits(train.parse(["--data-dir", given.data_dir] if given.data_dir else []))


def others(x, candidates):
    """A random other token for each: x (B, N), candidates per position, lists of tokens."""
    found = []
    for x_i, c in zip(x.T, candidates):
        place = (x_i[:, None] == c).long().argmax(1)
        found.append(c[(place + torch.randint(1, len(c), x_i.shape)) % len(c)])
    return torch.stack(found, 1)


for argument in given.checkpoints:
    name, path = argument.split("=", 1)
    model = fudoki.Fudoki.open(path).cpu()
    rows, _ = digits.rows(model, *(part[:300] for part in digits.train))
    truth = rows.tokens
    slots = [[model.words.token[w] for w in slot] for slot in model.words.forms[0]]
    candidates = {"image": [torch.arange(len(model.patches.codebook))] * model.patches.length,
                  "text": [torch.tensor(slot) for slot in slots]}
    metric = fudoki.MetricPath(model.patches.codebook, exponent=2., normalize=False)
    for seed, (kind, damaged, way, t) in itertools.product(range(given.seeds), CELLS):
        if tuple(map(str, (name, kind, damaged, way, t, seed))) in done:
            continue
        m = kind.split(",")[0]
        L.seed_everything(seed, verbose=False)
        order = torch.rand(truth[m].shape).argsort(1).argsort(1)
        hit = order < round(damaged * order.shape[1])
        other = others(truth[m], candidates[m])
        if "near" in kind:
            l = metric.logits(truth[m], torch.tensor(0.5))
            other = fudoki.guess(l.masked_fill(metric.one_hot(truth[m]), -torch.inf), 1.)
        before = torch.where(hit, other, truth[m])
        x, free = truth | {m: before}, model.only(truth, m)
        if way == "told":
            free[m] = hit
        *_, end = model.generate(x, free, x_t=x if way == "state" else None, start=t, steps=4,
                                 temperature=0.)
        same = end[m] == truth[m]
        left = ""
        if m == "image":
            real, bad, good = map(model.patches.decode, (truth[m], before, end[m]))
            left = f"{((good - real).square().sum() / (bad - real).square().sum()).item():.4f}"
        spoiled = (~same[~hit]).float().mean().item() if not hit.all() else 0.
        row = (name, kind, damaged, way, t, seed, f"{same[hit].float().mean().item():.4f}",
               f"{spoiled:.4f}", left)
        with FILE.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        print(*row, flush=True)
