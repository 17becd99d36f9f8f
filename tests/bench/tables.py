"""The tables of README and tutorial about sampling.csv, inpaint.csv and repair.csv: means over the
seeds ± standard errors.

    python tests/bench/tables.py
"""
import csv
import math
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRAW = dict(checkpoint="metric", step="race", steps="4", guidance="2.5", temperature="0.5",
            eta="0.0", best_of="1", times="even")
PATHS = "metric", "uniform", "mask"
STEPS = {"released": "Euler as released", "increments": "Euler, increments",
         "euler": "Euler, mid-step", "race": "race (exact)", "renoise": "renoise"}
GIVEN = {"moving": "as noisy as the rest", "still": "clean"}
WAYS = {"state": "as it is", "draft": "noise of t = {} added", "told": "told which"}


def rows(name):
    return list(csv.DictReader(open(ROOT / f"tests/bench/{name}.csv")))


def mean(found, column):
    """Mean and standard error over the seeds."""
    values = [float(row[column]) for row in found]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def cell(**options):
    """The rows of sampling.csv with these options, and otherwise those of DRAW."""
    wanted = (DRAW | options).items()
    return [row for row in rows("sampling") if all(row[k] == v for k, v in wanted)]


def line(what, found):
    """A row of a table: digit, caption, Fréchet, changes, share changed more than once."""
    cells = [share(found, c) for c in ("digit", "caption")]
    cells.append("{:.1f} ± {:.1f}".format(*mean(found, "frechet")))
    cells += ["{:.2f}".format(mean(found, c)[0]) if found[0][c] else ""
              for c in ("changes", "revised")]
    return f"| {what} | " + " | ".join(cells) + " |"


def paths():
    """README's table of the three paths by steps."""
    return [line(f"{name}, {n} step{'s' * (n != '1')}", found)
            for name in PATHS for n in "1 2 4 8 32".split()
            if (found := cell(checkpoint=name, steps=n))]


def options():
    """The tutorial's table of all other options, of the metric path if it says nothing else."""
    found = [(f"{STEPS[step]}, {n} steps", dict(step=step, steps=n))
             for n in "2 4 8 16".split() for step in STEPS]
    found += [(f"guidance {g}, 8 steps", dict(steps="8", guidance=g))
              for g in ("1.0", "1.5", "2.0", "2.5", "3.0")]
    found += [(f"temperature {T}, 4 steps", dict(temperature=T)) for T in ("0.5", "0.7", "1.0")]
    found += [(f"η {eta}, {n} steps", dict(steps=n, eta=eta))
              for n in "4 8".split() for eta in ("0.0", "0.1", "0.3")]
    found += [(f"times by equal loss, {n} steps", dict(steps=n, times="loss"))
              for n in "2 4 8".split()]
    found += [(f"best of {n}, 4 steps", dict(best_of=n)) for n in "1 4 16".split()]
    found += [(f"{name}, {what}, 8 steps", dict(checkpoint=name, steps="8") | extra)
              for name in PATHS[1:]
              for what, extra in (("renoise", dict(step="renoise")), ("η 0.1", dict(eta="0.1")))]
    found += [(f"schedule {name}, {n} steps", dict(checkpoint=name, steps=n))
              for n in "2 4 8".split() for name in ("power", "calibrated")]
    return [line(what, some) for what, option in found if (some := cell(**option))]


def share(found, column):
    """.987 ± .003"""
    return "{:.3f} ± {:.3f}".format(*mean(found, column)).replace("0.", ".")


def parts():
    """README's table of given parts: pictures of which a half is kept, captions with a gap."""
    found = []
    cases = [(name, name, given) for name in PATHS for given in GIVEN]
    cases.insert(2, ("learned", "metric, trained with clean parts", "still"))
    for checkpoint, name, given in cases:
        some = [row for row in rows("inpaint")
                if (row["given"], row["checkpoint"]) == (given, checkpoint)]
        words = [row for row in some if row["kept"] == "words"]
        halves = [[row for row in some if row["kept"] == kept] for kept in ("top", "left")]
        half = [{c: (float(a[c]) + float(b[c])) / 2 for c in "digit caption frechet seam".split()}
                for a, b in zip(*halves)]
        found.append(f"| {name}, {GIVEN[given]} | {share(half, 'digit')} | {share(half, 'caption')} | "
                     "{:.1f} ± {:.1f} | ".format(*mean(half, "frechet"))
                     + f"{share(half, 'seam')} | {share(words, 'caption')} |")
    return found


def repair(kind, damaged, way, t, name):
    """Means of repaired, spoiled, left."""
    key = kind, damaged, way, t, name
    found = [row for row in rows("repair") if key == tuple(
        row[k] for k in ("modality", "damaged", "way", "t", "checkpoint"))]
    return [mean(found, c)[0] for c in ("repaired", "spoiled", "left") if found[0][c]]


def repairs():
    """README's table of repairs: repaired / spoiled / left, for each path."""
    found = []
    for kind, damaged in (("image", "0.2"), ("image, near", "0.2"), ("text", "0.33")):
        for way, t in (("state", "0.9"), ("draft", "0.3"), ("draft", "0.7"), ("told", "0.0")):
            cells = [" / ".join(f"{v:.2f}" for v in repair(kind, damaged, way, t, name))
                     for name in PATHS]
            found.append(f"| {kind} | {WAYS[way].format(t)} | " + " | ".join(cells) + " |")
    return [row.replace(" 0.", " .") for row in found]


if __name__ == "__main__":
    print("\n".join([*paths(), "", *options(), "", *parts(), "", *repairs()]))
