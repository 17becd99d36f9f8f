"""Extra memory and seconds of `corrupt` and of every step for a large vocabulary (150,000 tokens
of dimension 64, 8 rows of 512 positions): python tests/bench/memory.py, writes memory.csv (Linux).
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import csv
import ctypes
import sys
import threading
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import fudoki  # noqa: E402

PAGE = os.sysconf("SC_PAGE_SIZE")
ctypes.CDLL(None).mallopt(-3, 1_000_000)        # glibc: give large arrays back at once


def resident():
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak(function):
    """-> the most extra bytes while function ran, and its seconds."""
    before, most, done = resident(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.005):
            most = max(most, resident() - before)
    thread, begin = threading.Thread(target=watch), time.time()
    thread.start()
    function()
    done.set()
    thread.join()
    return most, time.time() - begin


torch.manual_seed(0)
V = 150_000
path = fudoki.MetricPath(torch.randn(V, 64), exponent=4., normalize=True)
x_1, x_t = torch.randint(V, (2, 8, 512)).unbind(0)
calls = {"corrupt": lambda: fudoki.corrupt(path, x_1, 0.4)}
calls |= {name: lambda step=fudoki.step_named(name): step(path, x_t, x_1, 0.4, 0.5)
          for name in [*fudoki.STEPS, *fudoki.VELOCITIES]}
with open(HERE / "memory.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["what", "extra_MB", "seconds", "vocabulary", "positions", "threads"])
    for name, call in calls.items():
        extra, seconds = peak(call)
        writer.writerow([name, round(extra / 2 ** 20), round(seconds, 1), V, 8 * 512,
                         torch.get_num_threads()])
        file.flush()
        print(name, round(extra / 2 ** 20), "MB", round(seconds, 1), "s", flush=True)
