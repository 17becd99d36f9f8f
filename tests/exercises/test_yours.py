"""The suite that grades: what makes a path a path, a clock a clock, a velocity and a step
right. It runs over what fudoki.py has, or over yours, and says in words what is wrong:

    python -m pytest --path my:Path         my.py in this folder, with `class Path(fudoki.Path)`
    python -m pytest --clock my:slow     --velocity my:velocity     --step my:step
"""
import math

import contract
import pytest
import torch

import fudoki
import sample

V, N = 6, 20_000
PLACES = torch.tensor([[0., 0.], [1., 0.], [0., 1.], [1.2, 1.], [2., 0.3], [3., 3.]])
FREQUENCY = torch.tensor([10, 40, 20, 5, 15, 10])
TIMES = torch.linspace(0, 1, 21)


def wrong(message):
    pytest.fail(message, pytrace=False)


def made(name, clock="linear"):
    path, said = fudoki.PATHS[name](PLACES, FREQUENCY), ""
    try:
        if ":" in name:
            contract.check_logits(name, path, V, "this suite")
    except sample.InputError as error:
        said = str(error)
    if said:
        wrong(said)
    return path.on(clock)


def p(path, x_1, t):
    """p_t(· | x₁) of one token: (states,). States are tokens, and whatever only noise has."""
    l = path(torch.tensor([x_1]), torch.tensor([[float(t)]]))
    if l.shape != (1, len(path.embedding)):
        wrong(f"logits of x_1 {(1,)} and t {(1, 1)} should have the shape "
              f"{(1, len(path.embedding))}, one number for each token; yours have "
              f"{tuple(l.shape)}")
    if l.isnan().any() or (l == torch.inf).any() or not (l > -torch.inf).any():
        wrong(f"t = {t:.2f}, x₁ = {x_1}: log-probabilities are finite or −∞, yours are "
              f"{[round(v, 2) for v in l[0].tolist()]} (0 · ∞? a logarithm of something negative? "
              "a division by 1 − t?)")
    return l.double().softmax(-1)[0]


# --------------------------------------------------------------------------------------- the paths

def check_source(path):
    first = p(path, 0, 0.)
    for x_1 in range(1, V):
        off = (p(path, x_1, 0.) - first).abs()
        if off.max() > 1e-6:
            x = off.argmax().item()
            wrong(f"at t = 0 nothing may be known of x₁, but token {x} has "
                  f"{first[x]:.2f} if x₁ = 0, and {p(path, x_1, 0.)[x]:.2f} if x₁ = {x_1}")


def check_end(path):
    for x_1 in range(V):
        last = p(path, x_1, 1.)
        if last[x_1] < 1 - 1e-6:
            x = last.argmax().item()
            far = torch.cdist(PLACES, PLACES)[x_1]
            note = ", the farthest (sign?)" if x == far.argmax() else ""
            wrong(f"at t = 1 it should be certain of x₁ = {x_1}, yours gives it {last[x_1]:.2f}; "
                  f"likeliest is token {x}{note}")


def check_growth(path):
    for x_1 in range(V):
        kept = [p(path, x_1, t)[x_1].item() for t in TIMES.tolist()]
        for (t, s), (a, b) in zip(zip(TIMES, TIMES[1:]), zip(kept, kept[1:])):
            if b < a - 1e-6:
                wrong(f"x₁ should become likelier all the time, but P(x_t = {x_1}) falls from "
                      f"{a:.2f} at t = {t:.2f} to {b:.2f} at t = {s:.2f}")


def check_smoothness(path):
    """A jump of p_t in t would need an infinite rate."""
    t = torch.linspace(0.02, 0.98, 961)[:, None]
    for x_1 in range(V):
        p_t = path(torch.full((len(t),), x_1), t).softmax(-1)
        moved = p_t.diff(dim=0).abs().sum(-1) / 2
        if moved.max() > 0.05:
            wrong(f"x₁ = {x_1}: a share of {moved.max():.2f} moves at once at "
                  f"t = {t[moved.argmax()].item():.3f}; no rate is large enough for that")


def check_derivative(path):
    """∂_t ℓ by forward-mode differentiation, which the velocities need, against differences."""
    for t in (0.2, 0.5, 0.8):
        states = torch.arange(len(path.embedding))
        x_1, time = torch.full_like(states, 2), torch.full((len(states), 1), t)
        u = fudoki.kinetic_optimal(path, states, x_1, time).double()
        check_continuity(path, u, 2, t, "the kinetic-optimal rates")


def check_continuity(path, u, x_1, t, whose="your rates"):
    """u (z, x): what every token gains."""
    now, h = p(path, x_1, t), 1e-3
    gain = (now[:, None] * u).sum(0) - now * u.sum(1)
    should = (p(path, x_1, t + h) - p(path, x_1, t - h)) / (2 * h)
    off = (gain - should).abs()
    if off.max() > 0.01 * (1 + should.abs().max()):
        x = off.argmax().item()
        note = " (sign?)" if abs(gain[x] + should[x]) < 0.05 * abs(should[x]) else ""
        wrong(f"t = {t}, x₁ = {x_1}: token {x} should gain {should[x]:+.2f} per unit of time, "
              f"{whose} give {gain[x]:+.2f}{note}")


def speeds(path, x_1):
    """√I = √(Σ ṗ²/p) at the middles of 200 intervals: the speed along the path (chapter 3)."""
    found = []
    for k in range(200):
        a, b = (p(path, x_1, (k + i) / 200) for i in (0, 1))
        found.append(4 * 200 * (a.sqrt() - b.sqrt()).norm().item() / 2)
    return torch.tensor(found)


PATH_CHECKS = [check_source, check_end, check_growth, check_smoothness, check_derivative]


@pytest.mark.parametrize("check", PATH_CHECKS, ids=lambda check: check.__name__)
def test_path(a_path, check):
    check(made(a_path))


def test_path_report(a_path, report):
    """Not graded: the curve of a path, and how far its clock is from the optimal one."""
    path = made(a_path)
    curve = [sum(p(path, x_1, t)[x_1].item() * FREQUENCY[x_1].item() for x_1 in range(V))
             / FREQUENCY.sum().item() for t in (0.1, 0.3, 0.5, 0.7, 0.9)]
    v = torch.stack([speeds(path, x_1) for x_1 in range(V)]).mean(0)
    report += [f"{a_path}: P(x_t = x₁) at t = .1, .3, .5, .7, .9: "
               + " ".join(f"{c:.2f}" for c in curve),
               f"{a_path}: length ∫√I dt = {v.mean():.2f}, energy ∫I dt = {(v ** 2).mean():.2f}, "
               f"at constant speed {v.mean() ** 2:.2f} (chapter 3)"]
    assert v.mean() > 0


# -------------------------------------------------------------------------------------- the clocks

def check_clock(clock):
    t = torch.linspace(0, 1, 201)[:, None]
    times = clock(t)
    if not torch.is_tensor(times) or times.shape != t.shape:
        wrong(f"for t of the shape {tuple(t.shape)} the path's own times should have this shape, "
              f"yours are {tuple(times.shape) if torch.is_tensor(times) else times}")
    times = times.flatten()
    for i, end in ((0, "noise"), (-1, "x₁ only")):
        if not abs(times[i] - t[i].item()) < 1e-6:
            wrong(f"at t = {t[i].item():.0f} the path's own time has to be {t[i].item():.0f}, so "
                  f"that there is {end}; yours is {times[i]:.3f}")
    falls = (~(times.diff() >= 0)).nonzero()
    if len(falls):
        i = falls[0].item()
        wrong(f"a clock has to go forward, but yours goes from {times[i]:.3f} at "
              f"t = {t[i].item():.3f} to {times[i + 1]:.3f} at t = {t[i + 1].item():.3f} (sign?)")


@pytest.mark.parametrize("path", ["metric", "uniform", "mask"])
def test_clock(a_clock, path):
    check_clock(made(path, a_clock).clock)


@pytest.mark.parametrize("check", PATH_CHECKS, ids=lambda check: check.__name__)
def test_a_path_by_this_clock_is_a_path(a_clock, check):
    check(made("metric", a_clock))


# ---------------------------------------------------------------------------------- the velocities

def check_velocity(velocity, path, name):
    for x_1, t in ((2, 0.3), (0, 0.7)):
        states = torch.arange(len(path.embedding))
        u = velocity(path, states, torch.full_like(states, x_1), torch.full((len(states), 1), t))
        if u.shape != (len(states), len(states)):
            wrong(f"rates should have the shape (B, V) = {(len(states), len(states))}, "
                  f"yours have {tuple(u.shape)}")
        here, u = p(path, x_1, t) > 0, u.double()
        u = torch.where(here[:, None], u, 0.)
        if not torch.isfinite(u).all() or u.min() < -1e-6:
            z, x = divmod((~torch.isfinite(u) | (u < -1e-6)).flatten().nonzero()[0].item(), len(u))
            wrong(f"{name}, t = {t}, x₁ = {x_1}: rates are finite and at least 0, yours from "
                  f"{z} to {x} is {u[z, x]:.2f}")
        if u.diagonal().max() > 1e-6:
            z = u.diagonal().argmax().item()
            wrong(f"{name}, t = {t}, x₁ = {x_1}: a token does not jump to itself, but yours has a "
                  f"rate of {u[z, z]:.2f} from {z} to {z}")
        check_continuity(path, u, x_1, t, f"{name}: your rates")


def test_velocity(a_velocity, report):
    velocity, states = fudoki.VELOCITIES[a_velocity], torch.arange(V)
    for name in ("uniform", "metric", "marginal", "mask"):
        check_velocity(velocity, made(name), name)
    path, x_1, t = made("metric", "calibrated"), torch.full((V,), 2), torch.full((V, 1), 0.5)
    now = p(path, 2, 0.5)

    def energy(velocity):
        j = now[:, None] * velocity(path, states, x_1, t).double()
        return 0.5 * (j ** 2 / (now[:, None] * now)).sum().item(), j.sum().item()
    (own, jumps), (least, fewest) = energy(velocity), energy(fudoki.kinetic_optimal)
    report.append(f"{a_velocity}: on the metric path at t = ½ energy {own:.2f} (least: "
                  f"{least:.2f}), jumps per unit of time {jumps:.2f} (kinetic-optimal: "
                  f"{fewest:.2f})")
    assert own > least - 1e-6


# --------------------------------------------------------------------------------------- the steps

def ends(move, path, x_1, t, s, n):
    """Where N tokens are that start as p_t and make n steps to s: (states,)"""
    clean = torch.full((N, 1), x_1)
    x, times = fudoki.corrupt(path, clean, t), torch.linspace(t, s, n + 1).tolist()
    target = clean
    if getattr(move, "posterior", False):
        target = torch.nn.functional.one_hot(clean, V).float()
    for a, b in zip(times, times[1:]):
        x = move(path, x, target, a, b)
        if x.shape != (N, 1) or x.is_floating_point():
            wrong(f"a step returns tokens of the shape of x_t, {(N, 1)} long, yours are "
                  f"{tuple(x.shape)} {x.dtype}")
    return torch.bincount(x.flatten(), minlength=len(path.embedding)).double() / N


def check_step(move, path, name, say=lambda line: None):
    """The error of 16 steps is small, and chance's if a step is exact."""
    x_1, t, s = 2, 0.1, 0.8
    should = p(path, x_1, s)            # what N draws are off by, on average: √(2/π) ½ Σ √(p/N)
    chance = 3 * (2 / math.pi) ** 0.5 * ((should * (1 - should) / N) ** 0.5).sum().item() / 2
    off = {n: ends(move, path, x_1, t, s, n) - should for n in (1, 4, 16)}
    total = {n: d.abs().sum().item() / 2 for n, d in off.items()}
    if total[16] > 0.02 + chance:
        x = off[16].abs().argmax().item()
        found, start = (should + off[16])[x].item(), p(path, x_1, t)[x].item()
        note = " (as at the start: does anything move?)" if abs(found - start) < 0.02 else ""
        wrong(f"{name}, x₁ = {x_1}: tokens that are spread as p_t at t = {t} should, 16 steps "
              f"later, be spread as p_s at s = {s}; token {x} should have {should[x]:.2f} of "
              f"them, has {found:.2f}{note}")
    say(f"total variation from p_s after 1, 4, 16 steps on the {name} path: "
        + " ".join(f"{v:.3f}" for v in total.values())
        + (f", exact up to chance ({chance:.3f})" if max(total.values()) < chance else ""))


def test_step(a_step, report):
    torch.manual_seed(0)
    for name in ("uniform", "metric", "marginal", "mask"):
        check_step(fudoki.STEPS[a_step], made(name, "calibrated"), name,
                   lambda line: report.append(f"{a_step}: {line}"))


# ----------------------------------------------------------- mistakes, and what is said about them

class Upside(fudoki.MetricPath):
    def logits(self, x_1, t):
        return -super().logits(x_1, t)


class Informed(fudoki.UniformPath):
    def logits(self, x_1, t):
        return super().logits(x_1, 0.2 + 0.8 * t)


class Undecided(fudoki.UniformPath):
    def logits(self, x_1, t):
        return super().logits(x_1, 0.9 * t)


class Hesitant(fudoki.UniformPath):
    def logits(self, x_1, t):
        return super().logits(x_1, t + 0.3 * torch.sin(2 * math.pi * t))


class Sudden(fudoki.UniformPath):
    def logits(self, x_1, t):
        return super().logits(x_1, torch.where(t < 0.5, t / 2, t))


class Divided(fudoki.Path):
    def logits(self, x_1, t):
        return self.one_hot(x_1) * t / (1 - t)


class OneNumber(fudoki.Path):
    def logits(self, x_1, t):
        return -t[..., 0] * x_1


@pytest.mark.parametrize("mistake, check, told", [
    (Upside, check_end, r"certain of x₁ = 0, yours gives it 0.00; .* token 5, the farthest"),
    (Informed, check_source, "at t = 0 nothing may be known of x₁, but token 0 has 0.33"),
    (Undecided, check_end, "certain of x₁ = 0, yours gives it 0.92"),
    (Hesitant, check_growth, "falls from"),
    (Sudden, check_smoothness, "moves at once"),
    (Divided, check_end, "log-probabilities are finite"),
    (OneNumber, check_source, r"should have the shape \(1, 6\), one number for each token"),
])
def test_a_mistake_in_a_path_is_told(mistake, check, told):
    torch.manual_seed(0)
    with pytest.raises(pytest.fail.Exception, match=told), torch.no_grad():
        check(mistake(PLACES, FREQUENCY))


@pytest.mark.parametrize("clock, told", [
    (lambda t: 0.1 + 0.9 * t, "at t = 0 the path's own time has to be 0, .* yours is 0.100"),
    (lambda t: t / 2, "at t = 1 the path's own time has to be 1, .* yours is 0.500"),
    (lambda t: t + 0.3 * torch.sin(2 * math.pi * t), "a clock has to go forward, but yours goes"),
    (lambda t: torch.log(t) + 1, "yours is -inf"),
    (lambda t: torch.where(t == 0.5, torch.nan, t), "to nan at t = 0.500"),
    (lambda t: t[..., 0], "should have this shape"),
])
def test_a_mistake_in_a_clock_is_told(clock, told):
    with pytest.raises(pytest.fail.Exception, match=told):
        check_clock(clock)


@pytest.mark.parametrize("mistake, told", [
    (lambda *of: -fudoki.kinetic_optimal(*of), "rates are finite and at least 0, yours from"),
    (lambda *of: 2 * fudoki.kinetic_optimal(*of), r"should gain \+?-?\d.\d\d per unit of time"),
    (lambda *of: fudoki.growth(*of)[0] * (-fudoki.growth(*of)[1]).relu(), r"\(sign\?\)"),
    (lambda *of: fudoki.kinetic_optimal(*of) + 1, "does not jump to itself"),
    (lambda *of: fudoki.kinetic_optimal(*of).sum(-1), "shape"),
])
def test_a_mistake_in_a_velocity_is_told(mistake, told):
    with pytest.raises(pytest.fail.Exception, match=told):
        check_velocity(mistake, made("uniform"), "uniform")


@pytest.mark.parametrize("mistake, told", [
    (lambda path, x_t, x_1, t, s: x_t, r"as at the start: does anything move\?"),
    (lambda path, x_t, x_1, t, s: x_1, "token 2 should have 0.8. of them, has 1.00"),
    (lambda path, x_t, x_1, t, s: fudoki.race(path, x_t, x_1, t, (t + s) / 2), "should have"),
    (lambda path, x_t, x_1, t, s: x_t.flatten(), "tokens of the shape of x_t"),
])
def test_a_mistake_in_a_step_is_told(mistake, told):
    torch.manual_seed(0)
    with pytest.raises(pytest.fail.Exception, match=told):
        check_step(mistake, made("uniform"), "uniform")
