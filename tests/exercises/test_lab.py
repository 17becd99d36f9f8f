"""The lab itself: what `-k yours` says of work that is done, wrong, copied, or not there."""
from pathlib import Path

import exercises
import pytest
import solutions

HERE = Path(__file__).parent


@pytest.fixture
def graded(capfd):
    """The exit status of `-k yours`, and what it prints."""
    def run():
        status = pytest.main(["-q", "-p", "no:cacheprovider", "--seed", "3", "-k", "yours",
                              str(HERE / "test_exercises.py")])
        return status, capfd.readouterr().out
    return run


def test_a_hand_in_without_work_fails(graded):
    status, said = graded()
    assert status == 1 and "no exercise is written yet" in said


def test_work_has_its_points_and_mistakes_are_told(graded, monkeypatch):
    hand_in = dict(
        uniform_velocity=lambda path, x_t, x_1, t: (
            path.one_hot(x_1) & ~path.one_hot(x_t)) / (1 - t),              # right
        claims=lambda: dict.fromkeys("abcdefgh", True),                     # half of it is right
        stays=lambda path, x_t, x_1, t, s: (1 - t)[:, 0],
        metropolis=lambda *of, eta=1.: 2 * solutions.metropolis(*of, eta=eta),
        mean_rates=lambda path, t: solutions.mean_rates(path, t).T,
        linear_distance=lambda path: lambda t: t,
        race_by_two=solutions.race_by_two)
    for name, work in hand_in.items():
        monkeypatch.setattr(exercises, name, work)

    status, said = graded()
    assert status == 1
    for part in ("CosinePath        0.0 of 1 points", "UniformVelocity   2.0 of 2 points",
                 "Claims            2.0 of 4 points", "RaceByTwo         0.0 of 5 points",
                 "of 24 points", "--seed 3 draws the same",
                 "claim b: your answer is not right, or no counterexample: True",
                 "races stay, yours says", "back: ", "should jump to",
                 "of the mean distance should be left", "race_by_two is the reference solution"):
        assert part in said, part
