"""What noise and steps cost at FUDOKI's size, beside a plain way to write the same: seconds, the
median of interleaved repeats, and extra memory; writes speed.csv (Linux, one thread):

    OMP_NUM_THREADS=1 python tests/bench/speed.py
"""
import csv
import ctypes
import os
import statistics
import sys
import threading
import time
from pathlib import Path

import study                    # first: it puts the project on the path
import torch
import torch.nn.functional as F

import fudoki

REPEATS, T, S = 7, 0.4, 0.5
PAGE = os.sysconf("SC_PAGE_SIZE")


def peak(function):
    """The most extra megabytes while function ran."""
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident() - before)
    ctypes.CDLL(None).mallopt(-3, 1_000_000)            # glibc: give large arrays back at once,
    before, most, done = resident(), 0, threading.Event()       # which costs time, so time first
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
    beta, slope = (float(a) for a in torch.func.jvp(
        path.beta, (torch.tensor([T]),), (torch.ones(1),)))
    corrupt, step = plain(path, beta, slope)
    moves = {name: fudoki.step_named(name) for name in (*fudoki.STEPS, "corrector")}
    return {"corrupt": (lambda: fudoki.corrupt(path, x_1, T), lambda: corrupt(x_1))} | {
        name: (lambda move=move: move(path, x_t, x_1, T, S), lambda: step(x_t, x_1))
        for name, move in moves.items()}


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pairs = calls(16_384, 8, 1152)
    seconds = {(what, i): [] for what in pairs for i in (0, 1)}
    for _ in range(REPEATS):
        for (what, i), times in seconds.items():
            begin = time.perf_counter()
            pairs[what][i]()
            times.append(time.perf_counter() - begin)
    with (study.ROOT / "tests/bench/speed.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["V", "D", "rows", "what", "seconds", "plain_s", "MB", "plain_MB"])
        for what, pair in pairs.items():
            took = [f"{statistics.median(seconds[what, i]):.3f}" for i in (0, 1)]
            writer.writerow([16_384, 8, 1152, what, *took, *(peak(f) for f in pair)])
        for what, (ours, _) in calls(150_000, 64, 512).items():
            writer.writerow([150_000, 64, 512, what, "", "", peak(ours), ""])
    print((study.ROOT / "tests/bench/speed.csv").read_text())


if __name__ == "__main__":
    sys.exit(main())
