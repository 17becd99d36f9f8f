"""What the studies of trained models share: their command line, their data, and a CSV that grows.

A study appends its rows and skips those that are there, so that it goes on where it stopped.
"""
import argparse
import csv
import sys
from pathlib import Path

import lightning as L

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
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


def digits(given):
    """The toy's data."""
    return train.Digits(train.parse(["--data-dir", given.data_dir] if given.data_dir else []))


def models(given):
    """(name, model) of every checkpoint."""
    for argument in given.checkpoints:
        name, path = argument.split("=", 1)
        yield name, sample.open_model(path)[0].cpu()


def judge(data):
    """The report's judge, which has not seen the images of validation."""
    L.seed_everything(0, verbose=False)
    return train.Judge().fit(*data.train)


class Table:
    """A CSV file whose rows are known by their first columns, `keys`."""

    def __init__(self, name, keys, values):
        self.file, self.keys, self.columns = ROOT / f"tests/bench/{name}.csv", keys, keys + values
        if not self.file.exists():
            self.file.write_text(",".join(self.columns) + "\n")
        rows = csv.DictReader(self.file.open())
        self.done = {tuple(row[k] for k in keys) for row in rows}

    def __contains__(self, key):
        return tuple(map(str, key)) in self.done

    def add(self, *row):
        """Writes a row to the file and to the terminal."""
        with self.file.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        print(*row, flush=True)
