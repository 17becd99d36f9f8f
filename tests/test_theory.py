"""The equations, for every entry of PATHS, CLOCKS, VELOCITIES and STEPS: add one, it is tested.

Frequencies are compared with probabilities within five standard deviations of the draws."""
import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import fudoki
from bound import bound, of_rows, time_reversal
from fudoki import CLOCKS, PATHS, STEPS, VELOCITIES, corrupt, kinetic_optimal, race

V, N = 6, 20_000
CASES = [*itertools.product(PATHS, ["calibrated"]), ("metric", "linear"), ("mask", "linear")]
NAMES = ["-".join(case) for case in CASES]
GAUSS = torch.randn(V, 3, generator=torch.Generator().manual_seed(3))


def campbell(path, x_t, x_1, t):
    """u_t = [ṗ_t(x) − ṗ_t(x_t)]₊ / (S p_t(x_t)), S the number of tokens with p_t > 0 (2402.04997):
    a velocity from outside of the file."""
    p_t, dl = fudoki.growth(path, x_t, x_1, t)
    dp_t = p_t * (dl - (p_t * dl).sum(-1, keepdim=True))
    S = (p_t > 0).sum(-1, keepdim=True)
    here = fudoki.entry(p_t, x_t).clamp(min=1e-19)
    return (dp_t - fudoki.entry(dp_t, x_t)).relu() * (p_t > 0) / (S * here)


ALL_VELOCITIES = [*VELOCITIES, "campbell"]          # one entry: all of this file tests it
ALL_STEPS = [*STEPS, *ALL_VELOCITIES[1:]]           # Euler's own is the first


def step_named(name):
    """An entry of STEPS, or Euler's step along one of VELOCITIES."""
    if name in VELOCITIES:
        return functools.partial(fudoki.euler, velocity=VELOCITIES[name])
    return STEPS[name]


def make(name, embedding=GAUSS, clock="calibrated", **options):
    return PATHS[name](embedding, **options).on(clock)


@pytest.fixture(params=CASES, ids=NAMES)
def path(request):
    torch.manual_seed(0)
    name, clock = request.param
    return make(name, clock=clock, frequency=torch.arange(V))


@pytest.fixture(scope="module", autouse=True)
def only_here():
    VELOCITIES["campbell"] = campbell
    yield
    VELOCITIES.pop("campbell")


def p(path, x_1, t):
    """p_t(· | x₁) of one token: (V,)."""
    return path(torch.tensor([int(x_1)]), torch.tensor([[float(t)]])).softmax(-1)[0]


def matrix(path, velocity, x_1, t):
    """u[z, x]: the rate from z to x."""
    states = torch.arange(len(path.embedding))
    t = torch.full((len(states), 1), t)
    return velocity(path, states, torch.full_like(states, x_1), t).double()


def assert_drawn(x, expected):
    """The draws x (N,) have the probabilities expected (V,)."""
    found = torch.bincount(x, minlength=len(expected)) / len(x)
    wrong = (found - expected).abs() - 5 * (expected * (1 - expected) / len(x)).sqrt()
    assert wrong.max() < 2e-6, (found, expected)


# ------------------------------------------------------------------------------------------- paths

@pytest.mark.parametrize("embedding", [GAUSS, torch.eye(6), torch.rand(300, 2), torch.ones(4, 2)],
                         ids=["V=6", "V=D", "V=300", "all alike"])
@pytest.mark.parametrize("name, clock", CASES, ids=NAMES)
def test_a_path_is_a_distribution_at_every_time(name, clock, embedding):
    path = make(name, embedding, clock)
    x_1 = torch.arange(4)[:, None]
    for t in [0., 1e-12, 1e-6, 0.01, 0.3, 0.7, 0.99, 1 - 1e-6, 1.]:
        p_t = path(x_1, torch.full((1, 1, 1), t)).softmax(-1)
        assert p_t.shape == (4, 1, len(path.embedding)) and torch.isfinite(p_t).all()
        assert_close(p_t.sum(-1), torch.ones(4, 1))


def test_ends(path):
    source = torch.stack([p(path, x_1, 0.) for x_1 in range(V)])
    assert (source == source[0]).all()                              # p_0 does not know x₁ …
    for x_1 in range(V):
        assert (p(path, x_1, 1.)[x_1] == 1).all()                   # … and p_1 nothing else
        assert (corrupt(path, torch.full((1000,), x_1), 1.) == x_1).all()
    assert_drawn(corrupt(path, torch.full((N,), 2), 0.), source[0])


def test_sources():
    for name in ("metric", "uniform"):
        assert_close(p(make(name), 2, 0.), torch.full((V,), 1 / V))
    assert_close(p(make("mask"), 2, 0.), torch.eye(V + 1)[V])
    path = make("marginal", frequency=torch.arange(V))          # as often as in the data, and one
    assert_close(p(path, 2, 0.), (torch.arange(V) + 1.) / (V * (V + 1) / 2))


def test_twins_are_all_that_is_left_at_the_end():
    twins = torch.cat([GAUSS, GAUSS[2:3]])
    for clock in CLOCKS:
        last = p(make("metric", twins, clock), 2, 1.)
        assert_close(last, torch.tensor([0, 0, .5, 0, 0, 0, .5]))


def test_the_released_models_path_and_velocity():
    """exponent 4, normalised, the path's own time, written out as in the paper."""
    path, x_1, t = fudoki.MetricPath(GAUSS, exponent=4, normalize=True), 1, 0.4
    cos = torch.nn.functional.cosine_similarity(GAUSS, GAUSS[x_1:x_1 + 1])
    d = (2 - 2 * cos) ** 2
    beta, growth = 3 * (t / (1 - t)) ** .9, 3 * .9 * (t / (1 - t)) ** (-.1) / (1 - t) ** 2
    p_t = (-beta * d).exp() / (-beta * d).exp().sum()
    assert_close(p(path, x_1, t), p_t, atol=1e-5, rtol=1e-4)
    u_t = torch.stack([p_t * growth * (d[z] - d).relu() for z in range(V)]).double()
    assert_close(matrix(path, kinetic_optimal, x_1, t), u_t, atol=1e-5, rtol=1e-4)


def speed(path, t):
    """√( E_{x₁} Var_p[∂_t ℓ] ), x₁ by its frequency: the Fisher–Rao speed at t."""
    x_1 = torch.arange(len(path.frequency))
    l, dl = torch.func.jvp(lambda t: path(x_1, t), (torch.full((len(x_1), 1), t),),
                           (torch.ones(len(x_1), 1),))
    p_t = l.softmax(-1)
    variance = (p_t * (dl - (p_t * dl).sum(-1, keepdim=True)) ** 2).sum(-1)
    return (variance @ path.frequency / path.frequency.sum()).sqrt().item()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("options", [dict(embedding=torch.eye(2)), dict(embedding=torch.eye(20)),
                                     dict(embedding=torch.randn(64, 8) ** 3, exponent=4),
                                     dict(embedding=1e-3 * torch.randn(64, 2)),
                                     dict(embedding=torch.randn(300, 8), exponent=2)],
                         ids=["V=2", "V=20", "exponent 4", "tiny", "V=300"])
def test_the_calibrated_clock_runs_at_constant_speed(name, options):
    if name != "metric":
        options = dict(embedding=options["embedding"])
    g = torch.Generator().manual_seed(0)
    frequency = torch.rand(len(options["embedding"]), generator=g) + 0.1
    path = make(name, frequency=frequency, **options)
    speeds = torch.tensor([speed(path, t) for t in torch.linspace(0.025, 0.975, 20).tolist()])
    assert speeds.std() / speeds.mean() < 0.12, speeds
    assert p(path, 0, 1 / 256)[0] < 0.6 < p(path, 0, 255 / 256)[0]


def test_the_clocks_of_mixtures_are_known():
    """Of the mask path it is sin²(πt/2), of uniform noise S(κ) = 2 arcsin √p(x₁) up to constants:
    the way is an arc, since only p(x₁) against the rest changes."""
    t = torch.linspace(0, 1, 21)
    assert_close(make("mask").clock(t), torch.sin(math.pi * t / 2) ** 2, atol=2e-3, rtol=0)
    for V in (2, 31, 50_000):
        first = math.asin((1 / V) ** 0.5)
        right = torch.sin(first + (math.pi / 2 - first) * t) ** 2               # p(x₁) at t
        clock = make("uniform", torch.zeros(V, 0)).clock(t)
        assert clock[0] == 0 and clock[-1] == 1 and (clock.diff() > 0).all()
        assert_close(clock, (right - 1 / V) / (1 - 1 / V), atol=2e-3, rtol=0)


def test_the_clock_asks_for_tokens_that_occur_as_often_as_they_do():
    """Of the first token there is none, the others are one in four, and three."""
    asked = []

    class Path(fudoki.UniformPath):
        def logits(self, x_1, t):
            asked.append(x_1)
            return super().logits(x_1, t)

    Path(torch.zeros(4, 0), torch.tensor([0, 100, 300, 0])).on("calibrated")
    share = torch.bincount(torch.cat(asked), minlength=4) / len(torch.cat(asked))
    assert share.tolist() == [0., 0.25, 0.75, 0.]


def test_a_path_that_waits_at_first_has_a_clock_from_0_to_1():
    class Late(fudoki.UniformPath):
        def logits(self, x_1, t):
            return super().logits(x_1, (t - 0.3).clamp(min=0) / 0.7)

    clock = Late(torch.zeros(4, 0)).on("calibrated").clock
    assert clock(torch.tensor([0., 1.])).tolist() == [0., 1.] and (clock.table.diff() > 0).all()
    assert clock(torch.tensor([0.01])) > 0.29                   # and does not wait


def test_the_mask_is_a_point_of_its_own():
    """At right angles to all tokens, also to the blank one."""
    path = fudoki.MaskPath(torch.cat([torch.zeros(1, 4), torch.rand(5, 4)]))
    assert path.embedding.shape == (7, 5) and path.embedding[-1].norm() == 1
    assert (path.embedding[:-1] @ path.embedding[-1] == 0).all()


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1., 2.])
def test_temperature_is_the_power_one_over_it(temperature):
    """x₁ ~ p^(1/T), 20,000 draws, five standard errors."""
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.4, 0.1])
    target = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    x_1 = fudoki.sample_x_1(p.log().expand(1, 20_000, 3), temperature)
    share = torch.bincount(x_1.flatten(), minlength=3) / 20_000
    assert ((share - target).abs() < 5 * (target * (1 - target) / 20_000).sqrt() + 1e-6).all()


def test_exponential_numbers_are_exponential_far_out():
    """P(E > x) = e^−x, of a million within five standard errors."""
    torch.manual_seed(0)
    E = fudoki.exp_1(torch.empty(10 ** 6))
    for x in (0.1, 1., 5., 9.):
        p = math.exp(-x)
        assert abs((E > x).double().mean().item() - p) < 5 * (p * (1 - p) / 10 ** 6) ** 0.5, x
    assert E.min() > 0 and E.isfinite().all()


def test_a_path_is_the_same_path_by_any_clock():
    """Only when it is where changes; and a clock is of the path's own time, not of another's."""
    for name in PATHS:
        path = make(name, frequency=torch.arange(V))
        own = path.clock(torch.tensor([[0.3]]))
        found = p(path, 2, 0.3)
        assert_close(p(path.on("linear"), 2, own), found)
        again = path.on("calibrated").on("calibrated")
        assert_close(again.clock(torch.tensor([[0.3]])), own)


def test_a_distance_of_zero_or_one_is_the_uniform_mixture():
    """softmax(−β·1[x ≠ x₁]) is a mixture: one path, which by the calibrated clock is at the same
    place at any time."""
    uniform, metric = (make(name, torch.eye(V)) for name in ("uniform", "metric"))
    for t in (0., 0.1, 0.5, 0.9, 1.):
        assert_close(p(metric, 3, t), p(uniform, 3, t), atol=2e-3, rtol=0)

    # with κ = t if e^−β = (1 − t)/(1 + (V − 1)t)
    uniform.on("linear")
    metric.on("linear")
    metric.logits = lambda x_1, t: metric.distance(x_1) / 2 ** .5 * torch.log(
        (1 - t) / (1 + (V - 1) * t))                                            # d = √2
    for t in (0.1, 0.5, 0.9):
        assert_close(p(metric, 3, t), p(uniform, 3, t), atol=1e-6, rtol=1e-4)
        for velocity in VELOCITIES.values():
            assert_close(matrix(metric, velocity, 3, t), matrix(uniform, velocity, 3, t),
                         atol=1e-5, rtol=1e-3)


# -------------------------------------------------------------------------------------- velocities

@pytest.mark.parametrize("name", ALL_VELOCITIES)
def test_continuity_equation(path, name):
    """∂_t p_t(x) = Σ_z p_t(z) u(x, z) − p_t(x) Σ_z u(z, x), with rates ≥ 0, and 0 at home."""
    for x_1 in (0, 4):
        for t in (0.05, 0.3, 0.6) if name == "campbell" else (0.05, 0.3, 0.6, 0.9):
            u = matrix(path, VELOCITIES[name], x_1, t)
            assert (u >= 0).all() and (u.diagonal() == 0).all() and torch.isfinite(u).all()
            logits = functools.partial(path, torch.tensor([x_1]))
            p_t, dp_t = (a[0].double() for a in torch.func.jvp(
                lambda t: logits(t).softmax(-1), (torch.tensor([[t]]),), (torch.ones(1, 1),)))
            balance = p_t @ u - p_t * u.sum(1)
            assert_close(balance, dp_t, atol=2e-4 * dp_t.abs().max().item() + 1e-6, rtol=2e-3)


def test_mixtures_jump_to_x_1_and_nowhere_else():
    for name in ("uniform", "mask"):                # rate κ̇/(1 − κ) with κ_t = t
        u = matrix(make(name, clock="linear"), kinetic_optimal, 2, 0.3)
        expected = torch.zeros_like(u)
        expected[:, 2] = 1 / (1 - 0.3)
        expected[2, 2] = 0
        if name == "mask":                          # a token revealed for another x₁ is stuck
            expected[:V] = 0
        assert_close(u, expected, atol=1e-5, rtol=1e-5)


def test_metric_velocity_only_approaches_the_answer():
    path = make("metric")
    d = path.distance(torch.tensor([1]))[0]
    u = matrix(path, kinetic_optimal, 1, 0.3)
    assert ((u > 0) == (d[None] < d[:, None])).all()


# ------------------------------------------------------------------------------------------- steps

def test_euler_is_the_frozen_velocity_of_mid_step():
    """A token leaves with probability 1 − e^−hλ and goes to x with u(x)/λ, u of the middle."""
    path, t, s, z = make("metric"), 0.2, 0.6, 0
    u = matrix(path, kinetic_optimal, 1, 0.4)[z].float()
    leave = 1 - math.exp(-(s - t) * u.sum().item())
    expected = leave * u / u.sum()
    expected[z] = 1 - leave
    x_s = fudoki.euler(path, torch.full((N,), z), torch.full((N,), 1), t, s)
    assert_drawn(x_s, expected)


def test_a_draw_with_u_of_zero_is_possible(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    assert fudoki.categorical(torch.tensor([[0., 0, 2, 1], [3, 0, 0, 0]])).tolist() == [2, 0]
    x_1 = torch.arange(V)                               # of rate 0: these stay
    assert torch.equal(fudoki.euler(make("uniform"), x_1, x_1, 0.2, 0.6), x_1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_probabilities_that_are_none_are_an_error(bad):
    with pytest.raises(ValueError, match="not finite"):
        fudoki.categorical(torch.tensor([[0.5, 0.5], [0.5, bad]]))
    with pytest.raises(ValueError, match="not finite"):
        fudoki.sample_x_1(torch.tensor([[0.5, bad]]), 1.)


@pytest.mark.parametrize("T", [0.5, 1., 2.])
def test_temperature_is_the_power_of_what_is_drawn(T):
    """p(x₁ | x_t)^(1/T), up to its sum: shares within five standard errors."""
    p, n = torch.tensor([0.5, 0.3, 0.2]), 40_000
    torch.manual_seed(0)
    found = torch.bincount(fudoki.sample_x_1(p.log().expand(n, 3), T), minlength=3) / n
    should = p ** (1 / T) / (p ** (1 / T)).sum()
    assert ((found - should).abs() < 5 * (should * (1 - should) / n).sqrt()).all()


def test_categorical_is_exact_and_never_draws_the_impossible():
    weights = torch.tensor([0., 3., 0., 1e-3, 1., 0.])
    x = fudoki.categorical(weights.expand(N, -1))
    assert_drawn(x, weights / weights.sum())
    assert_drawn(fudoki.categorical(weights.expand(N, -1) * 1e-30), weights / weights.sum())


@pytest.mark.parametrize("t, s", [(0., 0.5), (0.2, 0.6), (0.5, 1.), (0., 1.), (0.3, 0.3)])
@pytest.mark.parametrize("step", ["race", "renoise"])
def test_exact_steps_keep_the_marginals(path, step, t, s):
    for x_1 in (0, 3):
        x_1 = torch.full((N,), x_1)
        x_s = STEPS[step](path, corrupt(path, x_1, t), x_1, t, s)
        assert_drawn(x_s, p(path, x_1[0], s))


@pytest.mark.parametrize("step", ALL_STEPS)
def test_chains_reach_the_path(path, step):
    """Exact steps after any number of them, the others in the limit of many."""
    def distance(steps, last=0.7):
        x_1 = torch.full((N,), 1)
        x = corrupt(path, x_1, 0.)
        for t, s in itertools.pairwise(torch.linspace(0, last, steps + 1)):
            x = step_named(step)(path, x, x_1, t, s)
        found = torch.bincount(x, minlength=len(path.embedding)) / len(x)
        return (found - p(path, 1, last)).abs().sum().item() / 2
    assert distance(12) < 0.02
    assert distance(3) < (0.01 if step in ("race", "renoise") else 0.25)


def test_race_stays_as_often_as_its_formula_says():
    """P(stay) = 1/(1 + Σ_x p_t(x)(e^{[Δℓ(x) − Δℓ(z)]₊} − 1)), Δℓ = ℓ_s − ℓ_t."""
    path, t, s = make("metric"), 0.25, 0.6
    for z in range(V):
        l_t, l_s = (path(torch.tensor([2]), torch.tensor([[when]])) for when in (t, s))
        rise = l_s - l_t
        stay = 1 / (1 + (p(path, 2, t) * ((rise[0] - rise[0, z]).relu().exp() - 1)).sum())
        x_s = race(path, torch.full((N,), z), torch.full((N,), 2), t, s)
        assert_drawn((x_s == z).long(), torch.stack([1 - stay, stay]))


@pytest.mark.parametrize("name", ["uniform", "mask"])
def test_race_of_mixtures_is_known_exactly(name):
    """A noisy token becomes x₁ with probability (s − t)/(1 − t), and nothing else ever happens."""
    path, t, s, x_1 = make(name, clock="linear"), 0.3, 0.5, torch.full((N,), 2)
    z = V if name == "mask" else 4
    x_s = race(path, torch.full((N,), z), x_1, t, s)
    assert set(x_s.unique().tolist()) == {2, z}
    reach = torch.tensor((s - t) / (1 - t))
    assert_drawn((x_s == 2).long(), torch.stack([1 - reach, reach]))


@pytest.mark.parametrize("step", [name for name in ALL_STEPS if name != "renoise"])
def test_the_mask_path_cannot_revise(step):
    path, revealed, x_1 = make("mask"), torch.full((1000,), 4), torch.full((1000,), 2)
    for t, s in ((0.3, 0.5), (0.9, 1.)):
        assert (step_named(step)(path, revealed, x_1, t, s) == 4).all()
    assert (fudoki.finish(path, revealed, x_1, 0.9, 1.) == 4).all()
    if step == "corrector":                         # but what it takes for right is asked again
        again = step_named(step)(path, revealed, revealed, 0.3, 0.9)
        assert set(again.unique().tolist()) == {4, V}
    assert (fudoki.finish(make("metric"), revealed, x_1, 0.9, 1.) == 2).all()


@pytest.mark.parametrize("u", [0., 1 - 2 ** -24])
def test_race_bears_the_rarest_random_numbers(u, monkeypatch):
    """The smallest and the largest number that torch.rand gives: no NaN wins against [MASK]."""
    path, x_1 = make("mask"), torch.arange(V)
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, u))
    assert 0 < fudoki.exp_1(torch.zeros(3)).min() < torch.inf
    for t, s in ((0., 0.5), (0.3, 0.4), (0.9, 1.)):
        x_s = race(path, torch.full((V,), V), x_1, t, s)
        assert ((x_s == V) | (x_s == x_1)).all()


@pytest.mark.parametrize("name, velocity", [
    ("race", "kinetic_optimal"), *((v, v) for v in ALL_VELOCITIES)])
def test_tiny_steps_jump_at_the_rate_of_the_velocity(name, velocity):
    path, t, n = make("metric"), 0.4, 200_000
    for z in (0, 3):
        u = matrix(path, VELOCITIES[velocity], 1, t)[z]
        h = 0.01 / u.sum().item()
        expected = (u * h).float()
        expected[z] = 1 - expected.sum()
        x_s = step_named(name)(path, torch.full((n,), z), torch.full((n,), 1), t, t + h)
        found = torch.bincount(x_s, minlength=V) / n
        bound = 5 * (expected / n).sqrt() + 0.03 * (1 - expected[z])        # first order in h
        assert ((found - expected).abs() < bound).all(), (found, expected)


def test_race_is_the_race_told_in_plain_loops(monkeypatch):
    """Slow and literal: every token runs with the noise that the fast code is given."""
    path, t, s, n = make("metric"), 0.3, 0.7, 200
    torch.manual_seed(1)
    x_t, x_1 = torch.randint(V, (n,)), torch.randint(V, (n,))
    first, others = -torch.rand(n, 1).log(), -torch.rand(n, V).log()
    noise = iter([first, others])
    monkeypatch.setattr(fudoki, "exp_1", lambda like: next(noise))
    expected = []
    for i in range(n):
        p_t, p_s = p(path, x_1[i], t).tolist(), p(path, x_1[i], s).tolist()
        clock = []
        for x in range(V):
            E = first[i].item() * p_t[x]            # at time t the leader arrives at `first`,
            if x != x_t[i]:
                E += others[i, x].item()            # all others later: an exponential forgets
            clock.append(E / p_s[x])
        expected.append(clock.index(min(clock)))
    assert race(path, x_t, x_1, t, s).tolist() == expected


@pytest.mark.parametrize("step", ["corrupt", *ALL_STEPS])
def test_rows_in_chunks_of_a_batch_are_rows_alone(path, step, monkeypatch):
    """(B, L) with t (B, 1, 1) is each row with its own t: from t = 0 to 1 nothing is chance."""
    monkeypatch.setattr(fudoki, "CHUNK", 3 * V)
    x_1 = torch.arange(40).view(8, 5) % V
    s = (torch.arange(8) % 2).view(8, 1, 1).float()         # every other row ends at t = 1
    if step == "corrupt":
        x_s = corrupt(path, x_1, s)
    elif step in ("race", "renoise"):
        x_s = STEPS[step](path, corrupt(path, x_1, 0.), x_1, 0., s)
    else:
        x_s = step_named(step)(path, x_1, x_1, (s + 1) / 4, (s + 1) / 4)     # no time passes
        assert (x_s == x_1).all()
    assert x_s.shape == x_1.shape and (x_s[1::2] == x_1[1::2]).all()
    assert step not in ("corrupt", "race", "renoise") or (x_s[::2] != x_1[::2]).any()


def test_path_mathematics_is_float32_under_autocast():
    path, x_1 = make("metric", torch.randn(64, 8)), torch.full((N,), 5)
    with torch.autocast("cpu", torch.bfloat16):
        x_s = race(path, corrupt(path, x_1, 0.3), x_1, 0.3, 0.6)
    assert_drawn(x_s, p(path, 5, 0.6))


# --------------------------------------------------------------------- from outside of the file

def test_copies_in_a_codebook_are_at_distance_zero_and_do_not_stop_the_clock():
    """A codebook of 300 vectors of unit length, each three times, some copies rounded: distances
    of rounding size are 0, and the clock is that of the codebook without copies."""
    once = torch.nn.functional.normalize(torch.randn(300, 8), dim=-1)
    thrice = torch.cat([once, once + 1e-7 * torch.randn(300, 8), once])
    path, alone = make("metric", thrice), make("metric", once)
    d = path.distance(torch.arange(900))
    assert (d[:300, 300:600].diagonal() == 0).all() and (d[:300, 600:].diagonal() == 0).all()
    assert (d == 0).sum() == 900 * 3
    t = torch.linspace(0.1, 0.9, 9)[:, None]
    assert_close(path.clock(t), alone.clock(t), rtol=0.1, atol=0.01)


# -------------------------------------------------------------------------- likelihood and entropy

LINE = torch.linspace(0, 1, 4)[:, None]
FORGET = {"mask": PATHS["mask"](LINE), "uniform": PATHS["uniform"](LINE),
          "marginal": PATHS["marginal"](LINE, torch.tensor([5., 2., 9., 0.])),
          "0/1 metric": make("metric", torch.zeros(4, 0)),
          "exponent 1/2": make("metric", LINE, exponent=0.5),
          "exponent 1": make("metric", LINE, exponent=1.)}      # a noise that does not know x₁
REMEMBER = {"exponent 2": make("metric", LINE, exponent=2.),
            "exponent 4": make("metric", LINE, exponent=4.)}


def mean_bound(path, q, velocity, n=50):
    """Of tokens with the distribution q (V, …, V), a dimension per token, given their exact
    posterior: a sum over all x₁ and x_t, and n times up to T = 1 − ½/n."""
    V, X, L = len(q), len(path.embedding), q.ndim
    clean = torch.tensor(list(itertools.product(range(V), repeat=L)))
    noisy = torch.tensor(list(itertools.product(range(X), repeat=L)))
    total = 0
    for t in ((torch.arange(n) + 0.5) / n).tolist():
        p_t = path(torch.arange(V), torch.full((V, 1), t)).softmax(-1).double()
        joint = q.flatten()[:, None] * p_t[clean[:, None], noisy].prod(-1)          # (x₁, x_t)
        p_1 = joint.unflatten(0, (V,) * L) / joint.sum(0).clamp(min=1e-300)
        p_1 = torch.stack([p_1.movedim(i, 0).reshape(V, -1, len(noisy)).sum(1).T
                           for i in range(L)], 1)                                   # (x_t, L, V)
        x_1, x_t = joint.nonzero().T
        rate, rest = bound(path, p_1.log()[x_t], clean[x_1], noisy[x_t], t, velocity).sum(-1)
        rate, rest = (joint[x_1, x_t] @ c.double() for c in (rate, rest))
        total += rate / n
    return (total - rate / n / 2 + rest).item()


@pytest.fixture(scope="module")
def two_tokens():
    q = (1.5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).double().exp()
    return q / q.sum()


@pytest.mark.parametrize("name", FORGET)
def test_the_bound_is_the_entropy_if_noise_does_not_know_x_1(name, two_tokens):
    entropy = -(two_tokens * two_tokens.log()).sum().item()
    assert abs(mean_bound(FORGET[name], two_tokens, time_reversal) - entropy) < 0.01


@pytest.mark.parametrize("name", [*FORGET, *REMEMBER])
def test_otherwise_it_is_above(name, two_tokens):
    entropy = -(two_tokens * two_tokens.log()).sum().item()
    gap = mean_bound((FORGET | REMEMBER)[name], two_tokens, kinetic_optimal) - entropy
    assert gap > 0.5 if name != "mask" else abs(gap) < 0.01


def test_the_bound_of_a_fair_coin_on_the_uniform_path():
    """½ log(2/(1 − t)) per unit of time, as one finds by hand: ½(log 2 + 1) in all."""
    path, coin = make("uniform", torch.eye(2), "linear"), torch.full((2,), 0.5).double()
    found = mean_bound(path, coin, kinetic_optimal, n=150)
    assert abs(found - (math.log(2) + 1) / 2) < 8e-3


@pytest.mark.parametrize("velocity", [kinetic_optimal, time_reversal])
def test_a_distance_of_zero_or_one_has_the_uniform_paths_bound(velocity, two_tokens):
    """Another clock, the same road."""
    a, b = (mean_bound(FORGET[name], two_tokens, velocity)
            for name in ("uniform", "0/1 metric"))
    assert abs(a - b) < 1e-2


@pytest.mark.parametrize("velocity", [kinetic_optimal, time_reversal])
def test_the_bound_of_the_mask_path_is_its_weighted_cross_entropy(velocity):
    path, l = make("mask", clock="linear"), torch.randn(5, 7, V)
    x_1 = torch.randint(V, (5, 7))
    x_t = torch.where(torch.rand(5, 7) < 0.5, V, x_1)
    rate, rest = bound(path, l, x_1, x_t, 0.3, velocity)
    ce = (x_t == V) * -fudoki.entry(l.log_softmax(-1), x_1)[..., 0]
    assert_close(rate, ce / 0.7)
    assert_close(rest, ce)


def test_the_bound_of_rows_is_summed_over_time_and_over_what_is_free():
    """A model that knows nothing pays log V for every free token, wherever the process stops; what
    is given costs nothing, whatever the model says of it."""
    x, free = torch.randint(V, (400, 6)), torch.arange(6).expand(400, 6) < 4
    for name, says, cost in (("mask", lambda here: 0. * here, 4 * math.log(V)),
                             ("uniform", lambda here: torch.where(free[..., None], 50., -50.)
                              * here, 0.)):
        path = make(name, clock="linear")
        model = SimpleNamespace(
            paths={"a": path}, net=lambda *of: {"a": says(path.one_hot(x)[..., :V].float())},
            corrupt=lambda x, free, t: {
                "a": torch.where(free["a"], corrupt(path, x["a"], t), x["a"])})
        found = of_rows(model, {"a": x}, {"a": free}, 8)
        assert found.shape == (8, 400)
        assert ((found.mean(1) - cost).abs() < 5 * found.std(1) / 400 ** 0.5 + 1e-3).all()


@pytest.mark.parametrize("velocity", [kinetic_optimal, time_reversal, fudoki.corrector])
def test_the_bound_is_the_divergence_of_two_chains_in_small_steps(path, velocity):
    """KL(1 + u dt ‖ 1 + û dt) / dt, for any logits."""
    dt, t, p_1 = 1e-7, 0.3, torch.randn(V).softmax(-1)
    for x_1, z in ((0, 1), (2, 2), (4, 0)):
        u = torch.stack([matrix(path, velocity, x, t)[z] for x in range(V)])        # (x₁, x)
        chains = u[x_1] * dt, (p_1.double()[:, None] * u).sum(0) * dt
        for chain in chains:
            chain[z] = 1 - (chain.sum() - chain[z])
        expected = torch.xlogy(chains[0], chains[0] / chains[1]).nansum() / dt
        if path(torch.tensor([x_1]), torch.tensor([[t]]))[0, z] > -torch.inf:
            found = bound(path, p_1.log()[None, None], torch.tensor([[x_1]]), torch.tensor([[z]]),
                          t, velocity)[0].item()
            assert found == pytest.approx(expected.item(), rel=0.01, abs=1e-3)


@pytest.mark.parametrize("name", [*FORGET, *REMEMBER])
def test_time_reversal_generates_its_path(name):
    """The continuity equation, also where no noise does without x₁."""
    path, t = (FORGET | REMEMBER)[name], 0.4
    for x_1 in range(4):
        u, now = matrix(path, time_reversal, x_1, t), p(path, x_1, t).double()
        dp = (p(path, x_1, t + 1e-3) - p(path, x_1, t - 1e-3)) / 2e-3
        assert (u >= 0).all()
        assert_close(now @ u - now * u.sum(-1), dp.double(), atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("name", FORGET)
def test_the_noise_that_it_reverses_does_not_know_x_1(name):
    """By Bayes, from x to z: p(z) u(x, z) / p(x), the same for every x₁ that allows x."""
    path = FORGET[name]
    noise = []
    for x_1 in range(4):
        now = p(path, x_1, 0.4).double()
        noise.append((matrix(path, time_reversal, x_1, 0.4).T * now / now[:, None]))
    noise = torch.stack(noise)                                                  # (x₁, x, z)
    for x in range(len(path.embedding)):
        possible = noise[:, x].isfinite().all(-1)
        assert_close(noise[possible, x], noise[possible, x][:1].expand(possible.sum(), -1),
                     atol=2e-4, rtol=2e-3)
