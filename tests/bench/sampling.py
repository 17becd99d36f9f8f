"""How well a trained model draws, by the options of `generate`: appends to a CSV, skips what is there.

    python tests/bench/sampling.py [--checkpoint FILE] [--name NAME] [--out FILE] [--data-dir FOLDER]

500 pictures a cell and seed, their captions from the held-out images of training (the first thousand),
so that test captions are left for the report. A judge as in `train.report` looks at the pictures.
"""
import argparse
import csv
import itertools
import sys
import time
from pathlib import Path

import lightning as L
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import fudoki  # noqa: E402
import train  # noqa: E402

CELLS = [dict(step="race", steps=4, guidance=g, temperature=T)
         for g, T in itertools.product((1.5, 2., 2.5, 3.), (1., 0.7, 0.5, 0.3))]
COLUMNS = "checkpoint step steps guidance temperature seed digit caption frechet judge images_per_s".split()

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", default="runs/toy/model.ckpt")
parser.add_argument("--out", default=ROOT / "tests/bench/sampling.csv", type=Path)
parser.add_argument("--name", default="toy", help="of the checkpoint, for the CSV")
parser.add_argument("--data-dir")
parser.add_argument("--seeds", type=int, default=3)
given = parser.parse_args()

if not given.out.exists():
    given.out.write_text(",".join(COLUMNS) + "\n")
done = {tuple(row[k] for k in COLUMNS[:6]) for row in csv.DictReader(given.out.open())}
todo = [dict(checkpoint=given.name, **cell, seed=seed) for seed in range(given.seeds) for cell in CELLS]
todo = [cell for cell in todo if tuple(str(v) for v in cell.values()) not in done]

L.seed_everything(0, verbose=False)
digits = train.Digits(train.parse(["--data-dir", given.data_dir] if given.data_dir else []))
data, test = digits.train, digits.test
model = fudoki.Fudoki.open(given.checkpoint)
judge = train.Judge().fit(data[0][1000:], data[1][1000:])
truth = digits.rows(model, data[0][:1000], data[1][:1000])[1]
accuracy = (judge(test[0])[1] == test[1]).float().mean().item()
ideal, _ = judge(model.patches.decode(model.patches.encode(test[0])))
for cell in todo:
    seed, options = cell["seed"], {k: cell[k] for k in ("step", "steps", "guidance", "temperature")}
    L.seed_everything(seed, verbose=False)
    texts = truth[500 * (seed % 2):][:500]
    begin = time.time()
    drawn = model.draw(texts, **options)
    rate = 500 / (time.time() - begin)
    features, seen = judge(drawn)
    row = cell | dict(zip(("digit", "caption"), train.right(train.captions(drawn, seen), texts)),
                      frechet=f"{train.frechet(features, ideal):.2f}", judge=f"{accuracy:.4f}",
                      images_per_s=f"{rate:.0f}")
    with given.out.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(row)
    print(row, flush=True)
