"""What noise, steps and training cost beside a plain way to write the same, and how that grows:
seconds, medians of interleaved repeats, and extra memory (Linux, one thread):

    OMP_NUM_THREADS=1 python tests/bench/speed.py           speed.csv, two minutes
    OMP_NUM_THREADS=1 python tests/bench/speed.py growth    growth.csv and figures/growth.png
"""
import csv
import ctypes
import functools
import math
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import study                    # first: it puts the project on the path
import torch
import torch.nn.functional as F

import fudoki
import sample
import train

REPEATS, T, S = 5, 0.4, 0.5
PAGE = os.sysconf("SC_PAGE_SIZE")


def peak(function):
    """The most extra megabytes while function ran."""
    def resident():
        return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * PAGE

    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident() - before)
    glibc = ctypes.CDLL(None)
    glibc.mallopt(-3, 1_000_000)                        # give large arrays back at once, which
    glibc.malloc_trim(0)                                # costs time: so time first
    before, most, done = resident(), 0, threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    function()
    done.set()
    thread.join()
    return round(most / 2 ** 20)


def plain(path, beta, slope):
    """Noise and a step of Euler's with whole arrays, as the formulas read. beta: β_t; slope: its
    derivative."""
    def distances(x):
        return torch.cdist(path.embedding[x], path.embedding) ** path.exponent

    def corrupt(x_1):
        return torch.multinomial((-beta * distances(x_1)).softmax(-1), 1)[:, 0]

    def step(x_t, x_1):
        d = distances(x_1)
        u = (-beta * d).softmax(-1) * slope * (d.gather(1, x_t[:, None]) - d).relu()
        u = u * (1 - F.one_hot(x_t, len(path.embedding)))
        lam = u.sum(-1)
        jump = torch.rand(len(x_t)) < 1 - torch.exp(-(S - T) * lam)
        where = torch.multinomial(torch.where(jump[:, None], u, 1.), 1)[:, 0]
        return torch.where(jump, where, x_t)
    return corrupt, step


def calls(V, D, rows):
    """{what: (ours, the plain way)}"""
    path = fudoki.MetricPath(torch.randn(V, D), exponent=4., normalize=True)
    x_1 = torch.randint(V, (rows,))
    x_t = fudoki.corrupt(path, x_1, T)
    beta, slope = 3 * (T / (1 - T)) ** 0.9, 2.7 * (T / (1 - T)) ** -0.1 / (1 - T) ** 2
    corrupt, step = plain(path, beta, slope)
    corrected = functools.partial(fudoki.euler, velocity=fudoki.corrector)
    moves = fudoki.STEPS | {"corrector": corrected}
    return {"corrupt": (lambda: fudoki.corrupt(path, x_1, T), lambda: corrupt(x_1))} | {
        name: (lambda move=move: move(path, x_t, x_1, T, S), lambda: step(x_t, x_1))
        for name, move in moves.items()}


def seconds(calls, repeats=REPEATS):
    """Medians of interleaved repeats of {name: function}, the first of which does not count."""
    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(took[1:]) for name, took in times.items()}


def training(steps):
    """(ours, the plain way): so many steps of training of the toy, by Lightning, and a loop with
    the same network, optimiser and clipping on tokens that are noisy already."""
    run, data = study.prepared([
        "--preset", "smoke", "--patch", "4", "--width", "96", "--depth", "4", "--heads", "3",
        "--steps", str(steps), "--val-every", str(10 * steps)])
    model = data.build(run)
    tokens, _ = data.tokens(model)
    train.Keep.on_validation_end = lambda *arguments: None          # writes no checkpoint

    def bare():
        model.trainer = SimpleNamespace(estimated_stepping_batches=steps)
        (optimizer,), _ = model.train().configure_optimizers()
        for _ in range(steps):
            x = sample.take(tokens, torch.randint(len(tokens["text"]), (run.batch,)))
            free = model.task(x)
            loss = sum(F.cross_entropy(l[free[m]], x[m][free[m]])
                       for m, l in model.net(x, free, T).items())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
    return lambda: study.trained(run, data, model), bare


def beside_a_plain_way():
    """speed.csv"""
    pairs = calls(16_384, 8, 1152)
    took = seconds({(what, i): pair[i] for what, pair in pairs.items() for i in (0, 1)})
    toy = seconds(dict(enumerate(training(60))), 5)
    with (study.ROOT / "tests/bench/speed.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["V", "D", "rows", "what", "seconds", "plain_s", "MB", "plain_MB"])
        for what, pair in pairs.items():
            writer.writerow([16_384, 8, 1152, what, *(f"{took[what, i]:.3f}" for i in (0, 1)),
                             *(peak(f) for f in pair)])
        for what, (ours, _) in calls(150_000, 64, 512).items():
            writer.writerow([150_000, 64, 512, what, "", "", peak(ours), ""])
        writer.writerow(["", "", "", "training", *(f"{toy[i] / 60:.3f}" for i in (0, 1)), "", ""])
    print((study.ROOT / "tests/bench/speed.csv").read_text("utf-8"))


def growth():
    """growth.csv: pictures only, 16 rows, the toy's network unless it says otherwise."""
    file = study.ROOT / "tests/bench/growth.csv"
    toy, rows = dict(codes=256, tokens=49, width=96), ["what,codes,tokens,width,seconds"]
    sizes = dict(codes=(256, 1024, 4096, 16_384), tokens=(49, 196, 784), width=(96, 192, 384))
    for V, N, width in dict.fromkeys(tuple((toy | {name: value}).values())
                                     for name, values in sizes.items() for value in values):
        model = fudoki.Fudoki({"image": (torch.randn(V, 16), 4, 4 * math.isqrt(N))},
                              trunk_options=dict(width=width, depth=4, heads=width // 32))
        x_1 = {"image": torch.randint(V, (16, N))}
        free, path = model.mark_free(x_1, "image"), model.paths["image"]
        x_t = model.corrupt(x_1, free, T)
        optimizer = torch.optim.AdamW(model.parameters())

        def step():
            optimizer.zero_grad()
            model.loss(x_1, free)[0].backward()
            optimizer.step()

        took = seconds({"a training step": step,
                        "a network call": torch.no_grad()(lambda: model.net(x_t, free, T)),
                        "a step of the race": lambda: fudoki.race(
                            path, x_t["image"], x_1["image"], T, S)})
        rows += [f"{what},{V},{N},{width},{s:.5f}" for what, s in took.items()]
    file.write_text("\n".join(rows) + "\n", "utf-8")
    plot(list(csv.DictReader(file.open(encoding="utf-8"))), toy)


def plot(rows, toy):
    """figures/growth.png, with the exponent between the last two of each line."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    for axis, name in zip(axes, toy):
        for what in dict.fromkeys(row["what"] for row in rows):
            line = sorted({(int(row[name]), float(row["seconds"])) for row in rows
                           if row["what"] == what and all(int(row[other]) == toy[other]
                                                          for other in toy if other != name)})
            (a, b), (c, d) = line[-2:]
            slope = math.log(d / b) / math.log(c / a)
            axis.loglog(*zip(*line), "o-", label=f"{what}, {slope:.1f}")
        axis.set(xlabel=name, xticks=[x for x, _ in line], xticklabels=[x for x, _ in line])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    axes[0].set_ylabel("seconds, 16 rows")
    plt.tight_layout()
    plt.savefig(study.ROOT / "figures" / "growth.png", dpi=110)


if __name__ == "__main__":
    L.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)                      # as all commands do
    sys.exit(growth() if sys.argv[1:] == ["growth"] else beside_a_plain_way())
