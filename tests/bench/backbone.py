"""Does a pretrained causal model help a flow? Validation cross-entropy against steps, from its
weights and from random ones, with the shift and without, and with its words frozen for the first
third:

    python tests/bench/backbone.py --lm FOLDER --text FILE [START …] [--seeds 3]
    python tests/bench/backbone.py --plot

START is pretrained, scratch, noshift, scratch-noshift or frozen (one seed). Three to six minutes
each on one core; what is in backbone.csv is skipped. Samples of the end go to
backbone_samples.csv.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import csv
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import fudoki  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

STEPS, BATCH, AT = 430, 16, (0, 25, 50, 100, 150, 200, 250, 300, 350, 400, 430)
CURVES, SAMPLES = HERE / "backbone.csv", HERE / "backbone_samples.csv"

ALL = ["pretrained", "scratch", "noshift", "scratch-noshift", "frozen"]
parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("starts", nargs="*", default=ALL)
parser.add_argument("--lm")
parser.add_argument("--text")
parser.add_argument("--seeds", type=int, default=3, help="default: 3")
parser.add_argument("--plot", action="store_true", help="figures/backbone.png from the CSV")


def rows(path):
    return list(csv.DictReader(path.open())) if path.exists() else []


def append(path, new):
    """Adds dictionaries to a CSV file."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(new[0]))
        if not file.tell():
            writer.writeheader()
        writer.writerows(new)


def study(start, seed, given):
    """One training; all of its rows or none."""
    L.seed_everything(seed, verbose=False)
    torch.set_num_threads(1)
    run = train.parse(["--preset", "ar", "--backbone", given.lm, "--text", given.text,
                       "--exponent", "2", "--t-power", "1", "--lr", "2e-3",
                       "--freeze", "0.33" if start == "frozen" else "0",
                       "--no-shift" if "noshift" in start else "--shift"])
    data = train.Corpus(run)
    model = data.build(run)                             # the metric is the pretrained one's always
    trunk = model.net.trunk
    if "scratch" in start:
        trunk.load_state_dict(fudoki.Backbone(**model.hparams.trunk_options).state_dict())
    seen, held = data.tokens(model)
    held = [held.tokens["text"][i::10] for i in range(10)]
    model.log_dict = lambda *args, **kwargs: None
    model.trainer = SimpleNamespace(estimated_stepping_batches=STEPS)
    (optimizer,), (schedule,) = model.configure_optimizers()
    schedule = schedule["scheduler"]
    curve, begin, spent = [], time.time(), 0.
    for step in range(STEPS + 1):
        if step in AT:
            pause, losses = time.time(), []
            model.eval()
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                for i, windows in enumerate(held):      # each tenth of the windows at its own t
                    x_1 = {"text": windows}
                    free = model.mark_free(x_1, "text")
                    losses.append(model.loss(x_1, free, (i + 0.5) / 10)[0].item())
            model.train()
            curve.append(dict(start=start, seed=seed, step=step, loss=round(sum(losses) / 10, 4),
                              seconds=round(pause - begin - spent)))
            spent += time.time() - pause
            print(curve[-1], flush=True)
        if step < STEPS:
            x_1 = seen.__getitems__(torch.randint(len(seen), (BATCH,)))
            optimizer.zero_grad()
            model.training_step(x_1, step).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            schedule.step()
    model.eval()
    append(SAMPLES, [dict(start=start, seed=seed, step=STEPS, text=text)
                     for text in sample.write(model, ["___"] * 2)])
    append(CURVES, curve)


def plot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.figure(figsize=(5.5, 3.3))
    styles = {"pretrained": "C0-", "frozen": "C2--", "noshift": "C3-", "scratch": "C1-",
              "scratch-noshift": "C4-"}
    for start, style in styles.items():
        for seed in sorted({row["seed"] for row in rows(CURVES) if row["start"] == start}):
            mine = [row for row in rows(CURVES) if (row["start"], row["seed"]) == (start, seed)]
            plt.plot([int(r["step"]) for r in mine], [float(r["loss"]) for r in mine], style,
                     label=start if seed == "0" else None)
    plt.xlabel("training steps")
    plt.ylabel("held-out cross-entropy")
    plt.legend()
    plt.tight_layout()
    plt.savefig(HERE.parents[1] / "figures" / "backbone.png", dpi=110)


if __name__ == "__main__":
    given = parser.parse_args()
    if given.plot:
        plot()
        sys.exit()
    done = {(row["start"], int(row["seed"])) for row in rows(CURVES)}
    for seed in range(given.seeds):
        for start in given.starts:
            if (start, seed) not in done and (seed == 0 or start != "frozen"):
                study(start, seed, given)
