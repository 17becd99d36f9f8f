"""Draws figures/steps.png and figures/repair.png from sampling.csv and repair.csv, and prints the
tables of README: means over the seeds ± standard errors.

    python tests/bench/plots.py
"""
import csv
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[2]
DRAW = dict(checkpoint="metric", step="race", steps="4", guidance="2.5", temperature="0.5",
            eta="0.0", best_of="1", times="even")
LABELS = {"released": "Euler as released", "increments": "Euler, increments",
          "euler": "Euler, mid-step", "race": "race (exact)", "renoise": "renoise"}


def rows(name):
    return list(csv.DictReader(open(ROOT / f"tests/bench/{name}.csv")))


def mean(found, column):
    """Mean and standard error over seeds."""
    values = [float(row[column]) for row in found]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def cell(**options):
    """The rows of sampling.csv with these options and otherwise those of DRAW."""
    return [row for row in rows("sampling") if all(row[k] == v for k, v in (DRAW | options).items())]


def line(what, found):
    """A row of a table: digit, caption, Fréchet, changes, revised."""
    cells = [f"{mean(found, c)[0]:.3f} ± {mean(found, c)[1]:.3f}".replace("0.", ".")
             for c in ("digit", "caption")]
    cells.append("{:.1f} ± {:.1f}".format(*mean(found, "frechet")))
    cells += [f"{mean(found, c)[0]:.2f}" if found[0][c] else "" for c in ("changes", "revised")]
    return f"| {what} | " + " | ".join(cells) + " |"


def table():
    """The table of README: every line of it."""
    found = []
    for name in ("metric", "uniform", "mask"):
        for n in "1 2 4 8 16 32".split():
            found.append((f"{name}, {n} step{'s' * (n != '1')}", dict(checkpoint=name, steps=n)))
    for step in ("released", "increments", "euler", "renoise"):
        found += [(f"{LABELS[step]}, {n} steps", dict(step=step, steps=n)) for n in "2 4 8".split()]
    found += [(f"guidance {g}, 8 steps", dict(steps="8", guidance=g)) for g in ("1.0", "1.5", "2.0", "3.0")]
    found += [(f"temperature {T}", dict(temperature=T)) for T in ("0.7", "1.0")]
    found += [(f"η {eta}, {n} steps", dict(steps=n, eta=eta)) for n in "4 8".split() for eta in ("0.1", "0.3")]
    found += [(f"times by equal loss, {n} steps", dict(steps=n, times="loss")) for n in "2 4 8".split()]
    found += [(f"best of {n}", dict(best_of=n)) for n in "4 16".split()]
    for name in ("uniform", "mask"):
        found += [(f"{name}, renoise, 8 steps", dict(checkpoint=name, step="renoise", steps="8")),
                  (f"{name}, η 0.1, 8 steps", dict(checkpoint=name, eta="0.1", steps="8"))]
    return [line(what, cell(**options)) for what, options in found if cell(**options)]


def repairs(modality, damaged, way, t):
    """{path: (repaired, spoiled, left)}, means over the seeds."""
    found = {}
    for row in rows("repair"):
        if (row["modality"], row["damaged"], row["way"], row["t"]) == (modality, damaged, way, t):
            found.setdefault(row["checkpoint"], []).append(row)
    return {name: tuple(mean(mine, c)[0] if mine[0][c] else math.nan
                        for c in ("repaired", "spoiled", "left")) for name, mine in found.items()}


def repair_table():
    """The table of README about repairs."""
    return [f"| {modality}, {float(damaged):.0%} replaced | {way}{f', t = {t}' * (way != 'told')} | " +
            " | ".join(f"{a:.2f} / {b:.2f}".replace("0.", ".") for a, b, _ in
                       (repairs(modality, damaged, way, t)[name] for name in ("metric", "uniform", "mask"))) + " |"
            for modality, damaged in (("image", "0.2"), ("text", "0.33"))
            for way, t in (("state", "0.9"), ("draft", "0.3"), ("draft", "0.5"), ("draft", "0.7"), ("told", "0.0"))]


def main():
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, column in zip(axes, ("caption", "frechet")):
        for step, label in LABELS.items():
            found = [(n, mean(cell(step=step, steps=str(n)), column))
                     for n in (1, 2, 4, 8, 16, 32) if cell(step=step, steps=str(n))]
            axis.errorbar([n for n, _ in found], [m for _, (m, _) in found],
                          [e for _, (_, e) in found], label=label, capsize=2)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32])
        axis.set_xlabel("steps (two network calls each)")
    axes[0].set_ylabel("captions right")
    axes[1].set_ylabel("Fréchet distance")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "figures/steps.png", dpi=110)
    print("\n".join([*table(), "", *repair_table()]))


if __name__ == "__main__":
    main()
