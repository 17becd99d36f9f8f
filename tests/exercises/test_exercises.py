"""What exercises.py has to do, in plain loops, on tokens and times that are drawn anew (--seed).
Yours is tested where it is written, the reference solution always."""
import math
import random
import sys

import exercises
import numpy as np
import pytest
import solutions
import torch
from test_yours import check_continuity, check_end, check_source
from torch.testing import assert_close

import fudoki

N = 20_000


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


@pytest.fixture(params=["metric", "uniform"])
def path(request, drawn):
    return fudoki.PATHS[request.param](drawn.places, drawn.frequency)


@pytest.fixture
def metric(drawn):
    return fudoki.MetricPath(drawn.places, drawn.frequency)


@pytest.fixture
def x_1(drawn):
    return drawn.tokens(1)[0]


def p(path, x_1, t):
    return path(torch.tensor([x_1]), torch.tensor([[t]])).softmax(-1)[0]


def at(path, x_1, t):
    """Rates from every z: the path, and arguments x_t, x_1, t."""
    V = len(path.embedding)
    return path, torch.arange(V), torch.full((V,), x_1), torch.full((V, 1), t)


class TestCosinePath:
    def test_probabilities(self, of, drawn, x_1):
        path = of("CosinePath")(drawn.places)
        for t in (0., *drawn.times(4), 1.):
            clean = math.sin(math.pi * t / 2) ** 2
            for x in range(drawn.V):
                should = clean * (x == x_1) + (1 - clean) / drawn.V
                assert abs(p(path, x_1, t)[x] - should) < 1e-5, (
                    f"t = {t:.3f}, x₁ = {x_1}: token {x} should have {should:.3f}, "
                    f"yours has {p(path, x_1, t)[x]:.3f}")

    def test_a_race_follows_it(self, of, drawn, x_1):
        path, clean, (t, s) = of("CosinePath")(drawn.places), torch.full((N,), x_1), drawn.times(2)
        x = fudoki.race(path, fudoki.corrupt(path, clean, t), clean, t, s)
        found = torch.bincount(x, minlength=drawn.V) / N
        assert (found - p(path, x_1, s)).abs().max() < 5 * 0.5 / N ** 0.5


class TestUniformVelocity:
    def test_rates_one_by_one(self, of, drawn, x_1):
        path = fudoki.UniformPath(drawn.places)
        for t in drawn.times(3, 0.05, 0.95):
            u = of("uniform_velocity")(*at(path, x_1, t))
            for z in range(drawn.V):
                for x in range(drawn.V):
                    should = 1 / (1 - t) if x == x_1 and z != x_1 else 0.
                    assert abs(u[z, x] - should) < 1e-4 * (1 + should), (
                        f"t = {t:.3f}: the rate from {z} to {x} should be {should:.2f}, yours is "
                        f"{u[z, x]:.2f}")

    def test_it_is_the_kinetic_optimal_one(self, of, drawn):
        path = fudoki.UniformPath(drawn.places)
        for x_1, t in zip(drawn.tokens(2), drawn.times(2, 0.05, 0.95)):
            assert_close(of("uniform_velocity")(*at(path, x_1, t)).float(),
                         fudoki.kinetic_optimal(*at(path, x_1, t)), atol=1e-3, rtol=1e-3)

    def test_it_is_written_by_hand(self, of, drawn, x_1, monkeypatch):
        velocity = of("uniform_velocity")
        for module, name in ((torch.func, "jvp"), (torch.autograd, "grad"),
                             (fudoki, "growth"), (fudoki, "kinetic_optimal")):
            monkeypatch.setattr(module, name, lambda *of, **how: pytest.fail(
                "the task is a formula, without automatic differentiation", pytrace=False))
        velocity(*at(fudoki.UniformPath(drawn.places), x_1, 0.5))


class TestMetropolis:
    def test_detailed_balance(self, of, drawn, metric, x_1):
        """Of the jumps beyond the kinetic-optimal velocity as many go from z to x as back."""
        (t,) = drawn.times(1, 0.2, 0.6)
        now = p(metric, x_1, t)
        extra = of("metropolis")(*at(metric, x_1, t), eta=3.) - fudoki.kinetic_optimal(
            *at(metric, x_1, t))
        for z in range(drawn.V):
            assert abs(extra[z, z]) < 1e-5, f"a token does not jump from {z} to {z}"
            for x in range(drawn.V):
                there, back = now[z] * extra[z, x], now[x] * extra[x, z]
                assert abs(there - back) < 1e-5, f"{z} to {x}: {there:.4f}, back: {back:.4f}"
                if x != z:
                    assert_close(extra[z, x], 3 * min(now[x], now[z]) / now[z] / drawn.V,
                                 atol=1e-5, rtol=1e-3)

    def test_eta_is_how_much_of_it(self, of, metric, x_1):
        assert_close(of("metropolis")(*at(metric, x_1, 0.5), eta=0.),
                     fudoki.kinetic_optimal(*at(metric, x_1, 0.5)))


class TestStays:
    def test_against_many_races(self, of, drawn, path, x_1):
        torch.manual_seed(0)
        clean, (t, s) = torch.full((N,), x_1), drawn.times(2)
        for z in range(drawn.V):
            x_t = torch.full((N,), z)
            found = (fudoki.race(path, x_t, clean, t, s) == z).float().mean()
            yours = of("stays")(path, x_t[:1], clean[:1], torch.tensor([[t]]),
                                torch.tensor([[s]]))[0]
            assert abs(found - yours) < 5 * 0.5 / N ** 0.5, (
                f"from {z}, t = {t:.2f}, s = {s:.2f}: {found:.3f} of {N} races stay, "
                f"yours says {yours:.3f}")

    def test_it_is_a_formula(self, of, metric):
        """The same value again and again, and no random number is drawn for it."""
        arguments = metric, *(torch.tensor([i]) for i in (0, 2)), *(
            torch.tensor([[t]]) for t in (0.2, 0.6))
        before = torch.random.get_rng_state()
        first, again = (of("stays")(*arguments) for _ in range(2))
        assert torch.equal(first, again) and torch.equal(before, torch.random.get_rng_state()), \
            "the task is a formula, not a simulation"

    def test_by_exponential_times(self, of, drawn, metric):
        """The same without fudoki: arrivals at the rates p_t, then of the same numbers at p_s."""
        torch.manual_seed(0)
        (z, x_1), (t, s) = drawn.tokens(2), drawn.times(2, 0.1, 0.7)
        rates, later = p(metric, x_1, t).tolist(), p(metric, x_1, s).tolist()
        first, stayed = 0, 0
        for row in (-torch.rand(N, drawn.V).clamp(min=1e-9).log()).tolist():
            if min(range(drawn.V), key=lambda x: row[x] / rates[x]) == z:
                first += 1
                stayed += min(range(drawn.V), key=lambda x: row[x] / later[x]) == z
        yours = of("stays")(metric, torch.tensor([z]), torch.tensor([x_1]),
                            torch.tensor([[t]]), torch.tensor([[s]]))[0]
        assert abs(stayed / max(1, first) - yours) < 5 * 0.5 / max(1, first) ** 0.5


class TestMeanRates:
    def test_rates_one_by_one(self, of, drawn, path):
        q = (drawn.frequency / drawn.frequency.sum()).tolist()
        for t in drawn.times(2, 0.1, 0.9):
            u = of("mean_rates")(path, t)
            rates = [fudoki.kinetic_optimal(*at(path, x_1, t)) for x_1 in range(drawn.V)]
            for z in range(drawn.V):
                known = [q[x_1] * p(path, x_1, t)[z] for x_1 in range(drawn.V)]
                for x in range(drawn.V):
                    should = sum(k * u_1[z, x] for k, u_1 in zip(known, rates)) / sum(known)
                    assert abs(u[z, x] - should) < 1e-3 * (1 + should), (
                        f"t = {t:.3f}: tokens at {z} should jump to {x} at the rate {should:.3f}, "
                        f"yours is {u[z, x]:.3f}")

    def test_tokens_of_all_kinds_follow_their_path(self, of, drawn, path):
        """The continuity equation of p_t(x) = Σ q(x₁) p_t(x | x₁)."""
        class Together(fudoki.Path):
            def logits(self, x_1, t):
                q = (self.frequency / self.frequency.sum())[:, None, None]
                return (q * torch.stack([path(torch.full_like(x_1, x), t).softmax(-1)
                                         for x in range(drawn.V)])).sum(0).log()
        for t in drawn.times(2, 0.1, 0.9):
            u = of("mean_rates")(path, t)
            check_continuity(Together(drawn.places, drawn.frequency), u.double(), 0, t)

    def test_it_is_a_formula(self, of, metric):
        before = torch.random.get_rng_state()
        of("mean_rates")(metric, 0.5)
        assert torch.equal(before, torch.random.get_rng_state()), \
            "the task is a formula, not a simulation"


class TestLinearDistance:
    def by_it(self, of, metric, monkeypatch):
        monkeypatch.setitem(fudoki.CLOCKS, "linear_distance", of("linear_distance"))
        return metric.on("linear_distance")

    def test_mean_distance_falls_evenly(self, of, metric, drawn, monkeypatch):
        path, d = self.by_it(of, metric, monkeypatch), torch.cdist(drawn.places, drawn.places)

        def mean(t):
            return sum((drawn.frequency[x_1] * (p(path, x_1, t) * d[x_1]).sum()).item()
                       for x_1 in range(drawn.V))
        for t in (0., *drawn.times(6, 0.02, 0.95)):
            assert abs(mean(t) / mean(0.) - (1 - t)) < 0.01, (
                f"at t = {t:.3f} {1 - t:.2f} of the mean distance should be left, "
                f"yours has {mean(t) / mean(0.):.2f}")
        assert mean(1.) == 0

    def test_it_can_be_differentiated(self, of, metric, drawn, x_1, monkeypatch):
        path, (t,) = self.by_it(of, metric, monkeypatch), drawn.times(1, 0.3, 0.7)
        check_continuity(path, fudoki.kinetic_optimal(*at(path, x_1, t)).double(), x_1, t,
                         "the kinetic-optimal rates by your clock")


def falls(path, drawn):
    """A path along which some x₁ becomes less likely for a while."""
    path = path(drawn.places, drawn.frequency)
    check_source(path, drawn)
    check_end(path, drawn)
    kept = torch.stack([torch.stack([p(path, x_1, t / 100)[x_1] for t in range(101)])
                        for x_1 in range(drawn.V)])
    return (kept.cummax(1).values - kept).max() > 0.01


def depends_on_the_times_trained(name, drawn):
    """The mean over t of p(x₁ | x_t), weighted by how likely x_t is, of some x_t."""
    path, q = fudoki.PATHS[name](drawn.places, drawn.frequency), drawn.frequency.float()
    means = []
    for power in (1, 3):
        joint = sum(q[:, None] * torch.stack([p(path, x_1, ((i + 0.5) / 200) ** power)
                                              for x_1 in range(drawn.V)]) for i in range(200))
        means.append(joint / joint.sum(0))
    return (means[0] - means[1]).abs().max() > 0.02


def differs_place_by_place(pair, drawn):
    """Guidance 2, the first place without the second, then the second given the first."""
    def tilted(c, u):
        weight = torch.where(c > 0, c ** 2 / u, 0.)
        return weight / weight.sum()
    c, u = (part.double() / part.sum() for part in pair)
    assert c.shape == u.shape == (2, 2) and (u > 0).all() and (c >= 0).all()
    first = tilted(c.sum(1), u.sum(1))
    one_by_one = torch.stack([first[i] * tilted(c[i] / c[i].sum(), u[i] / u[i].sum())
                              for i in (0, 1)])
    return (one_by_one - tilted(c, u)).abs().max() > 0.01


def needs_negative_rates(points, drawn):
    """Of Σ_x p_t(x | x₁) R(x, z) = −∂_t p_t(z | x₁) at t = ½."""
    path, V = fudoki.MetricPath(points).on("calibrated"), len(points)
    assert torch.pdist(points).min() > 1e-3, "two tokens are at the same place"
    p_t, dl = (a.double() for a in fudoki.growth(path, torch.arange(V), torch.arange(V),
                                                 torch.full((V, 1), 0.5)))
    R = torch.linalg.solve(p_t, -p_t * (dl - (p_t * dl).sum(-1, keepdim=True)))
    return R.fill_diagonal_(0).min() < -1e-3


CONTRADICTED = dict(b=falls, d=depends_on_the_times_trained, f=differs_place_by_place,
                    g=needs_negative_rates)


class TestClaims:
    @pytest.mark.parametrize("letter", "abcdefgh")
    def test_claim(self, of, drawn, letter):
        answer = of("claims")().get(letter)
        if letter not in CONTRADICTED:
            assert answer is True, f"claim {letter}: your answer is not right"
            return
        try:
            right = CONTRADICTED[letter](answer, drawn)
        except Exception as error:
            right, answer = False, f"{answer!r} ({error})"
        assert right, f"claim {letter}: your answer is not right, or no counterexample: {answer}"


class TestRaceByTwo:
    def test_from_every_start_it_ends_as_the_race(self, of, drawn, path, x_1):
        step, clean = of("race_by_two"), torch.full((N,), x_1)
        torch.manual_seed(0)
        t, s = drawn.times(2, 0.05, 0.9)
        times = torch.full((N, 1), t), torch.full((N, 1), s)
        for z in range(drawn.V):
            ends = [torch.bincount(move(path, torch.full((N,), z), clean, *times),
                                   minlength=drawn.V) / N for move in (fudoki.race, step)]
            for x in range(drawn.V):
                assert abs(ends[0][x] - ends[1][x]) < 5 * (0.5 / N) ** 0.5, (
                    f"from {z}, t = {t:.2f}, s = {s:.2f}: the race ends at {x} with "
                    f"{ends[0][x]:.3f}, yours with {ends[1][x]:.3f}")

    def test_it_needs_two_numbers(self, of, metric, monkeypatch):
        step, drawn, rand = of("race_by_two"), [], torch.rand
        monkeypatch.setattr(torch, "rand", lambda *size, **how: drawn.append(
            rand(*size, **how)) or drawn[-1])
        torch.manual_seed(0)
        others = random.getstate(), np.random.get_state()[1].tolist()
        step(metric, torch.zeros(100, dtype=torch.long), torch.full((100,), 2),
             torch.full((100, 1), 0.2), torch.full((100, 1), 0.6))
        assert sum(r.numel() for r in drawn) <= 200, "200 numbers are enough for 100 tokens"

        # the generators are as after these calls, so nothing else was drawn
        after = torch.random.get_rng_state()
        torch.manual_seed(0)
        for r in drawn:
            rand(r.shape)
        assert torch.equal(after, torch.random.get_rng_state()), "torch.rand only"
        assert others == (random.getstate(), np.random.get_state()[1].tolist()), "torch.rand only"
