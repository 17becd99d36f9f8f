"""What the studies of trained models share: their command line, data, trainings and measures, and
a CSV that grows.

A study appends its rows and skips those that are there, so that it goes on where it stopped.
"""
import argparse
import copy
import csv
import itertools
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/worlds")]
import digits as world  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402


def parser(description):
    """NAME=CHECKPOINT …, --data-dir, --seeds."""
    made = argparse.ArgumentParser(description=description,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    made.add_argument("--data-dir", help="a folder that holds MNIST/raw")
    made.add_argument("--seeds", type=int, default=3)
    return made


def where(given):
    """The flags that say where the digits are."""
    return ["--data-dir", given.data_dir] if given.data_dir else []


def digits(given):
    """The toy's data."""
    return train.Digits(train.parse(where(given)))


def models(given):
    """(name, model) of every checkpoint."""
    for argument in given.checkpoints:
        name, path = argument.split("=", 1)
        yield name, sample.open_model(path)[0].cpu()


def prepared(flags):
    """A run with these flags of train.py, on one core, and its data."""
    run = train.parse([*flags, "--threads", "1"])
    train.quietly(run)
    return run, train.DATA[run.preset](run)


def trained(run, data, model, folder=None):
    """Trains a model of such a run, in a folder that is kept, or in none. -> samples per second"""
    with tempfile.TemporaryDirectory() as new:
        folder = Path(folder or new)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        return train.fit(train.make_trainer(run, train.Keep(run, folder, data)), model, data, run)


def judge(data):
    """The report's judge, which has not seen the images of validation."""
    L.seed_everything(0, verbose=False)
    return world.Judge(data.train[0].shape[-1]).fit(*data.train)


def right(texts, truth):
    """The shares of right digits and of right captions."""
    return tuple(world.right(texts, truth).values())


def knowing(model, end):
    """The model as if it had predicted this state from the beginning: a change of mind is what a
    model does beyond that."""
    model, sizes = copy.copy(model), {m: len(kind.embedding) for m, kind in model.tokens.items()}
    model.predict = lambda x, *_: {m: 1e4 * F.one_hot(end[m], sizes[m]) for m in x}
    return model


def departures(states, free):
    """How often a free token leaves the value that it ends with, on average."""
    return torch.cat([sum(((a[m] == states[-1][m]) & (b[m] != a[m])).float()
                          for a, b in itertools.pairwise(states))[free[m]] for m in free]).mean()


class Table:
    """A CSV file whose rows are known by their first columns, `keys`."""

    def __init__(self, name, keys, values):
        self.file, self.keys, self.columns = ROOT / f"tests/bench/{name}.csv", keys, keys + values
        if not self.file.exists():
            self.file.write_text(",".join(self.columns) + "\n", "utf-8")
        rows = csv.DictReader(self.file.open(encoding="utf-8"))
        self.done = {tuple(row[k] for k in keys) for row in rows}

    def __contains__(self, key):
        return tuple(map(str, key)) in self.done

    def add(self, *row):
        """Writes a row to the file and to the terminal."""
        with self.file.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        print(*row, flush=True)
