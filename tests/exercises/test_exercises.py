"""What exercises.py has to do, said in plain loops, which are slow and cannot be misread. Yours is
tested where it is written, the reference solution always."""
import math
import sys

import exercises
import pytest
import solutions
import torch
from torch.testing import assert_close

import fudoki

V, N = 5, 20_000
PLACES = torch.tensor([[0., 0.], [1., 0.], [0., 1.], [1.2, 1.], [3., 2.]])
FREQUENCY = torch.tensor([10., 40, 20, 5, 25])
METRIC = fudoki.MetricPath(PLACES, FREQUENCY)
STATES = torch.arange(V)
on_two_paths = pytest.mark.parametrize("path", [METRIC, fudoki.UniformPath(PLACES)],
                                       ids=["metric", "uniform"])


@pytest.fixture(params=[exercises, solutions], ids=["yours", "solution"])
def of(request, monkeypatch):
    """of("name"): yours, or the solution's. Yours is neither the solution nor imports it."""
    if request.param is exercises:
        monkeypatch.setitem(sys.modules, "solutions", None)

    def found(name):
        what = getattr(request.param, name)
        if request.param is exercises and what.__module__ == "solutions":
            pytest.fail(f"{name} is the reference solution", pytrace=False)
        return what
    return found


def p(path, x_1, t):
    return path(torch.tensor([x_1]), torch.tensor([[t]])).softmax(-1)[0]


def at(x_1, t):
    """Rates from every z: arguments x_t, x_1, t."""
    return STATES, torch.full((V,), x_1), torch.full((V, 1), t)


class TestCosinePath:
    def test_probabilities(self, of):
        path = of("CosinePath")(PLACES)
        for t in (0., 0.2, 0.5, 0.9, 1.):
            kappa = math.sin(math.pi * t / 2) ** 2
            for x in range(V):
                should = kappa * (x == 3) + (1 - kappa) / V
                assert abs(p(path, 3, t)[x] - should) < 1e-5, (
                    f"t = {t}, x₁ = 3: token {x} should have {should:.3f}, "
                    f"yours has {p(path, 3, t)[x]:.3f}")

    def test_a_race_follows_it(self, of):
        path, x_1 = of("CosinePath")(PLACES), torch.full((N,), 3)
        x = fudoki.race(path, fudoki.corrupt(path, x_1, 0.2), x_1, 0.2, 0.7)
        found = torch.bincount(x, minlength=V) / N
        assert (found - p(path, 3, 0.7)).abs().max() < 0.02


class TestUniformVelocity:
    def test_rates_one_by_one(self, of):
        path, velocity = fudoki.UniformPath(PLACES), of("uniform_velocity")
        for t in (0.1, 0.5, 0.9):
            u = velocity(path, *at(3, t))
            for z in range(V):
                for x in range(V):
                    should = 1 / (1 - t) if x == 3 and z != 3 else 0.
                    assert abs(u[z, x] - should) < 1e-4, (
                        f"t = {t}: from {z} to {x} at rate {should:.2f}, yours is {u[z, x]:.2f}")

    def test_it_is_the_kinetic_optimal_one(self, of):
        path, velocity = fudoki.UniformPath(PLACES), of("uniform_velocity")
        for x_1, t in ((0, 0.3), (4, 0.8)):
            assert_close(velocity(path, *at(x_1, t)).float(),
                         fudoki.kinetic_optimal(path, *at(x_1, t)), atol=1e-4, rtol=1e-4)

    def test_it_is_written_by_hand(self, of, monkeypatch):
        velocity = of("uniform_velocity")
        for module, name in ((torch.func, "jvp"), (torch.autograd, "grad"),
                             (fudoki, "growth"), (fudoki, "kinetic_optimal")):
            monkeypatch.setattr(module, name, lambda *of, **how: pytest.fail(
                "the task is a formula: no derivative by machine", pytrace=False))
        velocity(fudoki.UniformPath(PLACES), *at(3, 0.5))


class TestMetropolis:
    def test_detailed_balance(self, of):
        """As many jump from z to x as back, of what is beyond the kinetic-optimal velocity."""
        now, velocity = p(METRIC, 2, 0.5), of("metropolis")
        extra = velocity(METRIC, *at(2, 0.5), eta=3.) - fudoki.kinetic_optimal(
            METRIC, *at(2, 0.5))
        for z in range(V):
            assert abs(extra[z, z]) < 1e-6, f"a token does not jump from {z} to {z}"
            for x in range(V):
                there, back = now[z] * extra[z, x], now[x] * extra[x, z]
                assert abs(there - back) < 1e-6, f"{z} to {x}: {there:.4f}, back: {back:.4f}"
                if x != z:
                    assert_close(extra[z, x], 3 * min(now[x], now[z]) / now[z] / V,
                                 atol=1e-5, rtol=1e-4)

    def test_eta_is_how_much_of_it(self, of):
        velocity = of("metropolis")
        assert_close(velocity(METRIC, *at(2, 0.5), eta=0.),
                     fudoki.kinetic_optimal(METRIC, *at(2, 0.5)))


class TestStays:
    @on_two_paths
    def test_against_many_races(self, of, path):
        function, x_1 = of("stays"), torch.full((N,), 2)
        torch.manual_seed(0)
        for z in range(V):
            for t, s in ((0.1, 0.3), (0.3, 0.9)):
                x_t = torch.full((N,), z)
                found = (fudoki.race(path, x_t, x_1, t, s) == z).float().mean()
                yours = function(path, x_t[:1], x_1[:1], torch.tensor([[t]]),
                                 torch.tensor([[s]]))[0]
                assert abs(found - yours) < 5 * 0.5 / N ** 0.5, (
                    f"from {z}, t = {t}, s = {s}: {found:.3f} of {N} races stay, "
                    f"yours says {yours:.3f}")

    def test_it_is_a_formula(self, of):
        """The same value again and again, and no random number is drawn for it."""
        arguments = METRIC, *(torch.tensor([i]) for i in (0, 2)), *(
            torch.tensor([[t]]) for t in (0.2, 0.6))
        before = torch.random.get_rng_state()
        first, again = (of("stays")(*arguments) for _ in range(2))
        assert torch.equal(first, again) and torch.equal(before, torch.random.get_rng_state()), \
            "the task is a formula, not a simulation"

    def test_by_clocks(self, of):
        """The same with nothing of fudoki's: clocks that ring, first at rates p_t, then at p_s."""
        torch.manual_seed(0)
        z, x_1, t, s = 0, 2, 0.2, 0.6
        rates, later = p(METRIC, x_1, t).tolist(), p(METRIC, x_1, s).tolist()
        clocks = -torch.rand(20_000, V).clamp(min=1e-9).log()
        first, stayed = 0, 0
        for row in clocks.tolist():
            if min(range(V), key=lambda x: row[x] / rates[x]) == z:
                first += 1
                stayed += min(range(V), key=lambda x: row[x] / later[x]) == z
        yours = of("stays")(METRIC, torch.tensor([z]), torch.tensor([x_1]),
                            torch.tensor([[t]]), torch.tensor([[s]]))[0]
        assert abs(stayed / first - yours) < 5 * 0.5 / first ** 0.5


class TestLinearDistance:
    def on_it(self, of, monkeypatch):
        monkeypatch.setitem(fudoki.CLOCKS, "linear_distance", of("linear_distance"))
        return fudoki.MetricPath(PLACES, FREQUENCY).on("linear_distance")

    def test_mean_distance_falls_evenly(self, of, monkeypatch):
        path = self.on_it(of, monkeypatch)

        def mean(t):
            d = torch.cdist(PLACES, PLACES)
            return sum((FREQUENCY[x_1] * (p(path, x_1, t) * d[x_1]).sum()).item()
                       for x_1 in range(V))
        for t in (0., 0.1, 0.25, 0.5, 0.75, 0.9):
            assert abs(mean(t) / mean(0.) - (1 - t)) < 0.01, (
                f"at t = {t} {1 - t:.2f} of the mean distance should be left, "
                f"yours has {mean(t) / mean(0.):.2f}")
        assert mean(1.) == 0

    def test_it_can_be_differentiated(self, of, monkeypatch):
        path = self.on_it(of, monkeypatch)
        u = fudoki.kinetic_optimal(path, *at(2, 0.5))
        gain = p(path, 2, 0.5) @ u - p(path, 2, 0.5) * u.sum(1)
        should = (p(path, 2, 0.505) - p(path, 2, 0.495)) / 0.01
        assert (gain - should).abs().max() < 0.05


class TestRaceByTwo:
    @on_two_paths
    def test_from_every_start_it_ends_as_the_race(self, of, path):
        step, x_1 = of("race_by_two"), torch.full((N,), 2)
        torch.manual_seed(0)
        for t, s in ((0.1, 0.4), (0.5, 0.8)):
            times = torch.full((N, 1), t), torch.full((N, 1), s)
            for z in range(V):
                ends = [torch.bincount(move(path, torch.full((N,), z), x_1, *times),
                                       minlength=V) / N for move in (fudoki.race, step)]
                for x in range(V):
                    assert abs(ends[0][x] - ends[1][x]) < 5 * (0.5 / N) ** 0.5, (
                        f"from {z}, t = {t}, s = {s}: the race ends at {x} with {ends[0][x]:.3f}, "
                        f"yours with {ends[1][x]:.3f}")

    def test_it_needs_two_numbers(self, of, monkeypatch):
        step, drawn, rand = of("race_by_two"), [], torch.rand
        monkeypatch.setattr(torch, "rand", lambda *size, **how: drawn.append(
            rand(*size, **how)) or drawn[-1])
        for name in ("rand_like", "multinomial"):
            monkeypatch.setattr(torch, name, lambda *args, **how: pytest.fail("torch.rand only"))
        step(METRIC, torch.zeros(100, dtype=torch.long), torch.full((100,), 2),
             torch.full((100, 1), 0.2), torch.full((100, 1), 0.6))
        assert sum(r.numel() for r in drawn) <= 200
