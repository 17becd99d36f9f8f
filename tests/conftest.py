"""What all tests share: the project on the path, threads that do not spin for each other, and the
flags that grade somebody's own path, clock, velocity, step, loss, trunk or data (tests/exercises):

    python -m pytest --path my:Path
"""
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch is imported
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/worlds"), str(ROOT / "tests/bench")]

import pytest                                           # noqa: E402
import torch                                            # noqa: E402

torch.set_num_threads(1)
KINDS = "path", "clock", "velocity", "step", "loss", "trunk", "data"
REPORT, SEED = pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    for kind in KINDS:
        parser.addoption(f"--{kind}", metavar="FILE:NAME",
                         help=f"grades this {kind}, and nothing else runs")
    parser.addoption("--seed", type=int, help="of what is drawn to grade it (default: a new one)")


def entries(kind):
    import fudoki
    import train
    names = dict(velocity="VELOCITIES", loss="LOSSES", data="DATA")
    return getattr(train if kind == "data" else fudoki, names.get(kind, f"{kind.upper()}S"))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script:FutureWarning")  # jvp's
    config.addinivalue_line("markers", "slow: minutes; runs with -m slow only")
    own = any(config.getoption(kind) for kind in KINDS) or "yours" in config.option.keyword
    config.stash[SEED] = config.getoption("seed")
    if config.stash[SEED] is None:                      # the project's own parts: always the same
        config.stash[SEED] = random.SystemRandom().randrange(10_000) if own else 0

    for kind in KINDS:
        name = config.getoption(kind)
        try:
            name and entries(kind)[name]
        except (ImportError, LookupError) as error:
            import sample
            raise pytest.UsageError(
                f"--{kind} {name}: {error}\n{sample.own_lines(error)}") from error


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        items[:] = [item for item in items if "slow" not in item.keywords]
    asked = {f"a_{kind}" for kind in KINDS if config.getoption(kind)}
    if asked:
        items[:] = [item for item in items if asked & set(item.fixturenames)]
    else:                                               # `smoke` has tests of its own
        items[:] = [item for item in items if "a_data" not in item.fixturenames]


def pytest_generate_tests(metafunc):
    """a_path and its kin: the names of all entries, or of the one that is asked for."""
    for kind in KINDS:
        if f"a_{kind}" in metafunc.fixturenames:
            name = metafunc.config.getoption(kind)
            usual = dict(trunk=["blocks"], data=["smoke"]).get(kind) or list(entries(kind))
            metafunc.parametrize(f"a_{kind}", [name] if name else usual)


@pytest.fixture
def seed(request):
    """Of everything that is drawn to grade somebody's own."""
    return request.config.stash[SEED]


@pytest.fixture
def report(request):
    """Lines to be read at the end, when somebody's own is graded."""
    return request.config.stash.setdefault(REPORT, [])


def pytest_terminal_summary(terminalreporter, config):
    if any(config.getoption(kind) for kind in KINDS):
        for line in config.stash.get(REPORT, []):
            terminalreporter.write_line(line)
    if any(config.getoption(kind) for kind in KINDS) or "yours" in config.option.keyword:
        terminalreporter.write_line(f"--seed {config.stash[SEED]} draws the same tokens and times")


@pytest.fixture(scope="session")
def world():
    """tests/worlds/digits.py, as train.py has it."""
    import digits

    import train
    train.DATA["smoke"] = digits.Rendered
    return digits


@pytest.fixture
def no_judge(monkeypatch, world):
    """Reports come from a judge that has learned nothing, which saves seconds."""
    monkeypatch.setattr(world.Judge, "fit", lambda judge, *data: judge)
