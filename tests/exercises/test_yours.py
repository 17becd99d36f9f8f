"""The suite that grades: what makes a path a path, a clock a clock, and a velocity, a step, a
loss, a trunk and data right. It runs over what the project has, or over yours, and says in words
what is wrong:

    python -m pytest --path my:Path         my.py in this folder, with `class Path(fudoki.Path)`
    python -m pytest --clock my:slow        also --velocity --step --loss --trunk --data
    python -m pytest --path my:Path --seed 7

The number of tokens, their distances and frequencies, x₁, t and s are drawn anew for yours in
every run. The seed is printed, and --seed draws the same ones again.
"""
import math
import time

import contract
import pytest
import torch
from drawn import Drawn

import fudoki
import sample
import train

N = 8_000                       # tokens that make a step
ENDS = torch.logspace(-6, -1.5, 46)
DENSE = torch.cat([torch.zeros(1), ENDS, torch.linspace(0.033, 0.967, 250), 1 - ENDS.flip(0),
                   torch.ones(1)])


def wrong(message):
    pytest.fail(message, pytrace=False)


def made(name, drawn, clock="linear"):
    path, said = fudoki.PATHS[name](drawn.places, drawn.frequency), ""
    try:
        if ":" in name:
            contract.check_logits(name, path, drawn.V, "this suite")
    except sample.InputError as error:
        said = str(error)
    if said:
        wrong(said)
    return path.on(clock)


def ps(path, x_1, times):
    """p_t(· | x₁) of one token at these times: (times, states), float64. States are tokens, and
    whatever only noise has."""
    times = torch.as_tensor(times, dtype=torch.float32)[:, None]
    l = path(torch.full((len(times),), x_1), times)
    if l.shape != (len(times), len(path.embedding)):
        wrong(f"logits of x_1 {(len(times),)} and t {(len(times), 1)} should have the shape "
              f"{(len(times), len(path.embedding))}, one number for each token; yours have "
              f"{tuple(l.shape)}")
    bad = l.isnan().any(1) | (l == torch.inf).any(1) | ~(l > -torch.inf).any(1)
    if bad.any():
        i = bad.nonzero()[0].item()
        wrong(f"t = {times[i].item():.6g}, x₁ = {x_1}: log-probabilities are finite or −∞, yours "
              f"are {[round(v, 2) for v in l[i].tolist()]} (0 · ∞? a logarithm of something "
              "negative? a division by 1 − t?)")
    return l.double().softmax(-1)


def p(path, x_1, t):
    """The same at one time: (states,)."""
    return ps(path, x_1, [t])[0]


def moved(a, b):
    """Total variation of two distributions, or of rows of them."""
    return (a - b).abs().sum(-1) / 2


def jump(function, a, b):
    """How far a function of time is from being continuous between two times: the change that is
    left after halving the interval, to the half with the larger change, down to 1e-5; where."""
    at = {t: function([t])[0] for t in (a, b)}
    while b - a > 1e-5:
        middle = (a + b) / 2
        at[middle] = function([middle])[0]
        first, second = moved(at[a], at[middle]), moved(at[middle], at[b])
        a, b = (a, middle) if first > second else (middle, b)
    return moved(at[a], at[b]).item(), a


def check_continuity_in_time(function, what):
    """A jump at any time would need an infinite rate."""
    change = moved(*(function(DENSE)[i] for i in (slice(1, None), slice(None, -1))))
    for i in change.topk(3).indices.tolist():
        left, t = jump(function, DENSE[i].item(), DENSE[i + 1].item())
        if left > 0.05:
            wrong(f"{what}: a share of {left:.2f} moves at once at t = {t:.4f}; no rate is large "
                  "enough for that")


# --------------------------------------------------------------------------------------- the paths

def check_source(path, drawn):
    first = p(path, 0, 0.)
    for x_1 in range(1, drawn.V):
        off = (p(path, x_1, 0.) - first).abs()
        if off.max() > 1e-6:
            x = off.argmax().item()
            wrong(f"at t = 0 nothing may be known of x₁, but token {x} has "
                  f"{first[x]:.2f} if x₁ = 0, and {p(path, x_1, 0.)[x]:.2f} if x₁ = {x_1}")


def check_end(path, drawn):
    for x_1 in range(drawn.V):
        last = p(path, x_1, 1.)
        if last[x_1] < 1 - 1e-6:
            x = last.argmax().item()
            far = torch.cdist(drawn.places, drawn.places)[x_1]
            note = ", the farthest (sign?)" if x == far.argmax() else ""
            wrong(f"at t = 1 it should be certain of x₁ = {x_1}, yours gives it {last[x_1]:.2f}; "
                  f"likeliest is token {x}{note}")


def check_smoothness(path, drawn):
    for x_1 in range(drawn.V):
        check_continuity_in_time(lambda times: ps(path, x_1, times), f"x₁ = {x_1}")


def check_derivative(path, drawn):
    """∂_t ℓ by forward-mode differentiation, which the velocities need, against differences."""
    states = torch.arange(len(path.embedding))
    for x_1 in range(drawn.V):
        for t in (drawn.chance.uniform(0.005, 0.02), *drawn.times(4),
                  drawn.chance.uniform(0.98, 0.995)):
            time = torch.full((len(states), 1), t)
            u = fudoki.kinetic_optimal(path, states, torch.full_like(states, x_1), time).double()
            check_continuity(path, u, x_1, t, "the kinetic-optimal rates")


def check_continuity(path, u, x_1, t, whose="your rates"):
    """u (z, x): what every token gains."""
    h = max(0.002 * min(t, 1 - t), 4e-5)
    before, now, after = ps(path, x_1, [t - h, t, t + h])
    gain = (now[:, None] * u).sum(0) - now * u.sum(1)
    left, right, should = (now - before) / h, (after - now) / h, (after - before) / (2 * h)
    # a clock with a table has corners: between the slopes of both sides is right
    off = (torch.minimum(left, right) - gain).clamp(min=gain - torch.maximum(left, right))
    if not off.max() <= 0.01 * (1 + should.abs().max()):
        x = off.nan_to_num(torch.inf).argmax().item()
        note = " (sign?)" if abs(gain[x] + should[x]) < 0.05 * abs(should[x]) else ""
        wrong(f"t = {t:.3f}, x₁ = {x_1}: token {x} should gain {should[x]:+.2f} per unit of time, "
              f"{whose} give {gain[x]:+.2f}{note}")


def speeds(path, x_1):
    """√I = √(Σ ṗ²/p) in 200 intervals: the speed along the path (chapter 3)."""
    return 2 * 200 * ps(path, x_1, torch.linspace(0, 1, 201)).sqrt().diff(dim=0).norm(dim=-1)


def seconds(path):
    """Of 20 calls of `logits`, the least."""
    x_1, t, found = torch.randint(len(path.embedding), (256,)), torch.rand(256, 1), []
    for _ in range(20):
        started = time.perf_counter()
        path.logits(x_1, t)
        found.append(time.perf_counter() - started)
    return min(found)


PATH_CHECKS = [check_source, check_end, check_smoothness, check_derivative]


@pytest.mark.parametrize("check", PATH_CHECKS, ids=lambda check: check.__name__)
def test_path(a_path, check, both):
    for drawn in both:
        check(made(a_path, drawn), drawn)


def test_path_report(a_path, drawn, report):
    """Not graded: the curve of a path, how far its clock is from the optimal one, its cost."""
    path, share = made(a_path, drawn), drawn.frequency / drawn.frequency.sum()
    kept = sum(ps(path, x_1, DENSE)[:, x_1] * share[x_1] for x_1 in range(drawn.V))
    at = [kept[(DENSE - t).abs().argmin()].item() for t in (0.1, 0.3, 0.5, 0.7, 0.9)]
    v = torch.stack([speeds(path, x_1) for x_1 in range(drawn.V)]).mean(0)
    falls = (kept.cummax(0).values - kept).max().item()
    report += [f"{a_path}: P(x_t = x₁) at t = .1, .3, .5, .7, .9: "
               + " ".join(f"{k:.2f}" for k in at)
               + f"; it falls by {falls:.2f} on the way" * (falls > 1e-3),
               f"{a_path}: length ∫√I dt = {v.mean():.2f}, energy ∫I dt = {(v ** 2).mean():.2f}, "
               f"at constant speed {v.mean() ** 2:.2f} (chapter 3)",
               f"{a_path}: `logits` takes {seconds(path) / seconds(made('metric', drawn)):.1f} "
               "times as long as that of the metric path"]
    assert v.mean() > 0


# -------------------------------------------------------------------------------------- the clocks

def check_clock(clock):
    t = DENSE[:, None]
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

    def share(times):           # as a distribution, of which a part has passed
        passed = clock(torch.as_tensor(times, dtype=torch.float32)[:, None])
        return torch.cat([passed, 1 - passed], 1)
    check_continuity_in_time(share, "the path's own time")


@pytest.mark.parametrize("path", ["metric", "uniform", "mask"])
def test_clock(a_clock, path, both):
    for drawn in both:
        check_clock(made(path, drawn, a_clock).clock)


@pytest.mark.parametrize("check", PATH_CHECKS, ids=lambda check: check.__name__)
def test_a_path_by_this_clock_is_a_path(a_clock, check, drawn):
    check(made("metric", drawn, a_clock), drawn)


# ---------------------------------------------------------------------------------- the velocities

def check_velocity(velocity, path, name, drawn):
    states = torch.arange(len(path.embedding))
    for x_1 in range(drawn.V):
        for t in drawn.times(3):
            where = f"{name}, t = {t:.3f}, x₁ = {x_1}"
            u = velocity(path, states, torch.full_like(states, x_1),
                         torch.full((len(states), 1), t))
            if u.shape != (len(states), len(states)):
                wrong(f"rates should have the shape (B, V) = {(len(states), len(states))}, "
                      f"yours have {tuple(u.shape)}")
            here, u = p(path, x_1, t) > 0, u.double()
            u = torch.where(here[:, None], u, 0.)
            bad = ~torch.isfinite(u) | (u < -1e-6)
            if bad.any():
                z, x = divmod(bad.flatten().nonzero()[0].item(), len(u))
                wrong(f"{where}: rates are finite and at least 0, yours from {z} to {x} is "
                      f"{u[z, x]:.2f}")
            if u.diagonal().max() > 1e-6:
                z = u.diagonal().argmax().item()
                wrong(f"{where}: a token does not jump to itself, but yours has a rate of "
                      f"{u[z, z]:.2f} from {z} to {z}")
            check_continuity(path, u, x_1, t, f"{name}: your rates")


def test_velocity(a_velocity, report, drawn):
    velocity, states = fudoki.VELOCITIES[a_velocity], torch.arange(drawn.V)
    for name in ("uniform", "metric", "marginal", "mask"):
        check_velocity(velocity, made(name, drawn), name, drawn)
    (x_1,), (t,) = drawn.tokens(1), drawn.times(1, 0.3, 0.7)
    path = made("metric", drawn, "calibrated")
    now = p(path, x_1, t)

    def energy(velocity):
        u = velocity(path, states, torch.full((drawn.V,), x_1), torch.full((drawn.V, 1), t))
        j = now[:, None] * u.double()
        return 0.5 * (j ** 2 / (now[:, None] * now)).sum().item(), j.sum().item()
    (own, jumps), (least, fewest) = energy(velocity), energy(fudoki.kinetic_optimal)
    report.append(f"{a_velocity}: on the metric path at t = {t:.2f} energy {own:.2f} (least: "
                  f"{least:.2f}), jumps per unit of time {jumps:.2f} (kinetic-optimal: "
                  f"{fewest:.2f})")
    assert own > least * (1 - 1e-6)


# --------------------------------------------------------------------------------------- the steps

def ends(move, path, x_1, t, s, n, V):
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


def check_step(move, path, name, drawn, say=lambda line: None):
    """The error of many steps is small, chance's if a step is exact, and one large step does more
    than nothing."""
    (x_1,), t, s = drawn.tokens(1), drawn.chance.uniform(0.05, 0.2), drawn.chance.uniform(0.7, 0.9)
    many, where = drawn.chance.randint(13, 20), f"{name}, x₁ = {x_1}"
    start, should = p(path, x_1, t), p(path, x_1, s)
    # what N draws are off by, on average: √(2/π) ½ Σ √(p/N)
    chance = 3 * (2 / math.pi) ** 0.5 * ((should * (1 - should) / N) ** 0.5).sum().item() / 2
    found = {n: ends(move, path, x_1, t, s, n, drawn.V) for n in (1, 4, many, 2 * many)}
    total = {n: moved(d, should).item() for n, d in found.items()}
    for n, most in ((many, 0.02), (2 * many, 0.012)):
        if total[n] > most + chance:
            x = (found[n] - should).abs().argmax().item()
            note = " (as at the start: does anything move?)" \
                if abs(found[n][x] - start[x]) < 0.02 else ""
            wrong(f"{where}: tokens that are distributed as p_t at t = {t:.2f} should, {n} steps "
                  f"later, be distributed as p_s at s = {s:.2f}; token {x} should have "
                  f"{should[x]:.2f} of them, has {found[n][x]:.2f}{note}")
    if total[1] > 0.6 * moved(start, should) + chance:
        wrong(f"{where}: one large step from t = {t:.2f} to s = {s:.2f} should come near p_s; the "
              f"total variation is {total[1]:.2f} after it and {moved(start, should):.2f} before")
    say(f"total variation from p_s after {', '.join(map(str, total))} steps on the {name} path: "
        + " ".join(f"{v:.3f}" for v in total.values())
        + (f", exact up to chance ({chance:.3f})" if max(total.values()) < chance else ""))


def test_step(a_step, report, drawn):
    torch.manual_seed(0)
    for name in ("uniform", "metric", "marginal", "mask"):
        check_step(fudoki.STEPS[a_step], made(name, drawn, "calibrated"), name, drawn,
                   lambda line: report.append(f"{a_step}: {line}"))


# ------------------------------------------------------------------------- losses, trunks and data

def check_loss(loss, path, name, drawn):
    """Its mean over p(x₁ | x_t) has a minimum at this posterior."""
    q, all_x_1 = (drawn.frequency / drawn.frequency.sum()).double(), torch.arange(drawn.V)
    for t in drawn.times(3, 0.1, 0.9):
        p_t = torch.stack([p(path, x_1, t) for x_1 in range(drawn.V)])          # (x₁, x)
        for x_t in drawn.tokens(3):
            posterior = q * p_t[:, x_t] / (q * p_t[:, x_t]).sum()

            def mean(l):
                losses = loss(path, l.float().expand(drawn.V, 1, -1), all_x_1[:, None],
                              torch.full((drawn.V, 1), x_t), torch.full((drawn.V, 1, 1), t))
                if losses.shape != (drawn.V, 1):
                    wrong(f"a loss of p_1t {(drawn.V, 1, drawn.V)} and x_1 {(drawn.V, 1)} should "
                          f"have the shape of x_1, one number for each position; yours has "
                          f"{tuple(losses.shape)}")
                return (posterior * losses[:, 0].double()).sum()

            best = posterior.log().requires_grad_()
            far = torch.zeros(drawn.V, dtype=torch.double, requires_grad=True)
            slope, usual = (torch.autograd.grad(mean(l), l)[0] for l in (best, far))
            if not slope.abs().max() <= 0.01 * usual.abs().max() + 1e-7:
                x = slope.abs().argmax().item()
                wrong(f"{name}, t = {t:.2f}, x_t = {x_t}: the mean loss should be smallest at "
                      f"p(x₁ | x_t), but there its derivative by the logit of token {x} is "
                      f"{slope[x]:+.3f} (at equal logits {usual[x]:+.3f}); a network would learn "
                      "another distribution")
            for _ in range(4):
                other = best + torch.randn(drawn.V, dtype=torch.double)
                if mean(other) < mean(best) - 1e-6:
                    wrong(f"{name}, t = {t:.2f}, x_t = {x_t}: p(x₁ | x_t) is no minimum of the "
                          f"mean loss, {mean(best):.4f}; other logits have {mean(other):.4f}")


def test_loss(a_loss, drawn):
    torch.manual_seed(0)
    for name in ("uniform", "metric"):
        check_loss(fudoki.LOSSES[a_loss], made(name, drawn), name, drawn)


def check_trunk(trunk, drawn):
    """Every visible place sees every other one, and its place; rows do not see each other."""
    torch.manual_seed(drawn.chance.randint(0, 999))
    B, N, trunk = 3, 7, trunk.eval()
    for parameter in trunk.parameters():                    # what starts at 0 may do something
        parameter.data += 0.02 * torch.randn_like(parameter)
    h, places = torch.randn(B, N, trunk.width), torch.stack([torch.arange(N)] * 2, -1)
    visible = torch.ones(B, N, dtype=torch.bool)
    visible[0, 4:6] = False
    out = trunk(h, places, visible, torch.full((B, 1, 1), 0.5))
    if out.shape != h.shape:
        wrong(f"a trunk returns the shape of h, {tuple(h.shape)}; yours returned "
              f"{tuple(out.shape)}")

    def changed(row, place):
        """Which outputs differ if another vector stands in this place: (B, N)"""
        other = h.clone()
        other[row, place] = torch.randn(trunk.width)
        return ((trunk(other, places, visible, torch.full((B, 1, 1), 0.5)) - out).abs()
                > 1e-6).any(-1)

    for place in (0, N - 1):
        seen = changed(1, place)
        if seen[[0, 2]].any():
            wrong("the output of a row depends on another row of the batch")
        blind = (~seen[1]).nonzero().flatten().tolist()
        if blind:
            wrong(f"every place should see every other, but the outputs at {blind} do not depend "
                  f"on the vector at {place} (a causal mask?)")
    if changed(0, 4)[0][visible[0]].any():
        wrong("the outputs at visible places depend on a place that is not visible")
    moved_on = places.clone()
    moved_on[2, 0] += 3
    if not (trunk(h, moved_on, visible, torch.full((B, 1, 1), 0.5)) - out).abs().max() > 1e-6:
        wrong("the outputs do not depend on the coordinates: the trunk cannot know where a patch "
              "is")
    with torch.enable_grad():
        out = trunk(h, places, visible, torch.full((B, 1, 1), 0.5))
        out[visible].square().sum().backward()
    idle = [name for name, q in trunk.named_parameters() if q.grad is None]
    if idle:
        wrong(f"these parameters never get a gradient: {', '.join(idle[:5])}")


def test_trunk(a_trunk, drawn):
    check_trunk(fudoki.TRUNKS[a_trunk](width=48, depth=2, heads=2), drawn)


def check_data(name, kind, folder):
    """A kind of data has rows for training and validation that fit its model, writes a sample and
    has a report."""
    try:
        run = train.parse(["--preset", name])
        data = kind(run)
        model = data.build(run).eval()
        contract.rows(model, *data.tokens(model))
        said = ""
    except sample.InputError as error:
        said = str(error)
    if said:
        wrong(said)
    data.sample(model, folder / "sample")
    if not [*folder.glob("sample*")]:
        wrong("`sample` should write a file whose name begins with the path that it is given")
    first = next(iter(data.report(model, run, {})), None)
    if not (isinstance(first, tuple) and [type(part) for part in first] == [str, dict]):
        wrong(f"`report` should yield (what, {{column: number}}), yours yields {first!r}")


def test_data(a_data, tmp_path, no_judge):
    check_data(a_data, train.DATA[a_data], tmp_path)


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


class Sudden(fudoki.UniformPath):
    """Jumps at a time."""
    at = 0.5

    def logits(self, x_1, t):
        return super().logits(x_1, torch.where(t < self.at, t / 2, t))


class SuddenAtLast(Sudden):
    def logits(self, x_1, t):
        return fudoki.UniformPath.logits(self, x_1, torch.where(t < 1, t / 2, t))


class SuddenLate(Sudden):
    at = 0.985


class SuddenEarly(Sudden):
    def logits(self, x_1, t):
        return fudoki.UniformPath.logits(self, x_1, torch.where(t < 0.01, t, t.clamp(min=0.4)))


class Divided(fudoki.Path):
    def logits(self, x_1, t):
        return self.one_hot(x_1) * t / (1 - t)


class Gap(fudoki.UniformPath):
    """No numbers for some times."""

    def logits(self, x_1, t):
        return torch.where((t > 0.974) & (t < 0.979), torch.nan, super().logits(x_1, t))


class OneNumber(fudoki.Path):
    def logits(self, x_1, t):
        return -t[..., 0] * x_1


class HalfDifferentiable(fudoki.UniformPath):
    """The derivative is right for one x₁ only."""

    def logits(self, x_1, t):
        l = super().logits(x_1, t)
        return torch.where((x_1 == 2)[..., None], l, l.detach())


class Roundabout(fudoki.MetricPath):
    """Right, though x₁ becomes less likely for a while: most tokens pass by another one."""

    def logits(self, x_1, t):
        friend = (x_1 + 1) % len(self.embedding)
        aside = 30 * (t * (1 - t)) ** 2 * self.one_hot(friend)
        return super().logits(x_1, t) + aside


def test_a_path_may_pass_by_another_token():
    drawn = Drawn(0)
    for check in PATH_CHECKS:
        check(Roundabout(drawn.places, drawn.frequency), drawn)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("mistake, check, told", [
    (Upside, check_end, r"certain of x₁ = 0, yours gives it 0.00; .* token \d, the farthest"),
    (Informed, check_source, r"at t = 0 nothing may be known of x₁, but token 0 has 0\.\d\d"),
    (Undecided, check_end, r"certain of x₁ = 0, yours gives it 0\.9\d"),
    (Sudden, check_smoothness, "moves at once at t = 0.5000"),
    (SuddenAtLast, check_smoothness, "moves at once at t = 1.0000"),
    (SuddenLate, check_smoothness, "moves at once at t = 0.9850"),
    (SuddenEarly, check_smoothness, "moves at once at t = 0.0100"),
    (Divided, check_end, "log-probabilities are finite"),
    (Gap, check_smoothness, "t = 0.97.*log-probabilities are finite"),
    (OneNumber, check_source, r"should have the shape \(1, \d\), one number for each token"),
    (HalfDifferentiable, check_derivative, "should gain .* the kinetic-optimal rates give .0.00"),
])
def test_a_mistake_in_a_path_is_told(number, mistake, check, told):
    drawn = Drawn(number)
    with pytest.raises(pytest.fail.Exception, match=told), torch.no_grad():
        check(mistake(drawn.places, drawn.frequency), drawn)


@pytest.mark.parametrize("clock, told", [
    (lambda t: 0.1 + 0.9 * t, "at t = 0 the path's own time has to be 0, .* yours is 0.100"),
    (lambda t: t / 2, "at t = 1 the path's own time has to be 1, .* yours is 0.500"),
    (lambda t: t + 0.3 * torch.sin(2 * math.pi * t), "a clock has to go forward, but yours goes"),
    (lambda t: torch.log(t) + 1, "yours is -inf"),
    (lambda t: torch.where((t > 0.49) & (t < 0.51), torch.nan, t), "to nan at t = 0.49"),
    (lambda t: t[..., 0], "should have this shape"),
    (lambda t: torch.where(t < 1, t / 2, t), "moves at once at t = 1.0000"),
    (lambda t: torch.where(t < 0.3, t / 3, t), "moves at once at t = 0.3000"),
])
def test_a_mistake_in_a_clock_is_told(clock, told):
    with pytest.raises(pytest.fail.Exception, match=told):
        check_clock(clock)


def late(path, x_t, x_1, t):
    """Right at t = .5 and wrong elsewhere."""
    return fudoki.kinetic_optimal(path, x_t, x_1, t) * (0.5 + t)


@pytest.mark.parametrize("mistake, told", [
    (lambda *of: -fudoki.kinetic_optimal(*of), "rates are finite and at least 0, yours from"),
    (lambda *of: 2 * fudoki.kinetic_optimal(*of), r"should gain \+?-?\d+.\d\d per unit of time"),
    (late, r"should gain \+?-?\d+.\d\d per unit of time"),
    (lambda *of: fudoki.growth(*of)[0] * (-fudoki.growth(*of)[1]).relu(), r"\(sign\?\)"),
    (lambda *of: fudoki.kinetic_optimal(*of) + 1, "does not jump to itself"),
    (lambda *of: fudoki.kinetic_optimal(*of).sum(-1), "shape"),
])
def test_a_mistake_in_a_velocity_is_told(mistake, told):
    drawn = Drawn(0)
    with pytest.raises(pytest.fail.Exception, match=told):
        check_velocity(mistake, made("uniform", drawn), "uniform", drawn)


def idle(path, x_t, x_1, t, s):
    """Right in small steps, and does nothing in a large one."""
    return fudoki.race(path, x_t, x_1, t, s) if s - t < 0.3 else x_t


@pytest.mark.parametrize("mistake, told", [
    (lambda path, x_t, x_1, t, s: x_t, r"as at the start: does anything move\?"),
    (lambda path, x_t, x_1, t, s: x_1, "should have 0.* of them, has 1.00"),
    (lambda path, x_t, x_1, t, s: fudoki.race(path, x_t, x_1, t, (t + s) / 2), "should have"),
    (lambda path, x_t, x_1, t, s: x_t.flatten(), "tokens of the shape of x_t"),
    (idle, "one large step from .* should come near p_s"),
])
def test_a_mistake_in_a_step_is_told(mistake, told):
    torch.manual_seed(0)
    drawn = Drawn(0)
    with pytest.raises(pytest.fail.Exception, match=told):
        check_step(mistake, made("uniform", drawn), "uniform", drawn)


def smoothed(path, p_1t, x_1, x_t, t):
    return torch.nn.functional.cross_entropy(p_1t.mT, x_1, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("loss, told", [
    (lambda *of: fudoki.cross_entropy(*of) * of[-1], "should have the shape of x_1"),
    (smoothed, r"should be smallest at p\(x₁ \| x_t\), but there its derivative"),
    (lambda *of: -fudoki.cross_entropy(*of), "no minimum"),
    (lambda *of: fudoki.cross_entropy(*of) ** 2, "a network would learn another distribution"),
])
def test_a_mistake_in_a_loss_is_told(loss, told):
    torch.manual_seed(0)
    drawn = Drawn(0)
    with pytest.raises(pytest.fail.Exception, match=told):
        check_loss(loss, made("uniform", drawn), "uniform", drawn)


def test_a_loss_may_be_weighted():
    torch.manual_seed(0)
    drawn = Drawn(0)
    check_loss(lambda *of: fudoki.cross_entropy(*of) * (2 - of[-1][..., 0]),
               made("metric", drawn), "metric", drawn)


class Causal(fudoki.Blocks):
    def forward(self, h, places, visible, t):
        return super().forward(h, places, visible, t).cumsum(1).cummin(1).values * 0 + h


class Blind(fudoki.Blocks):
    def forward(self, h, places, visible, t):
        return super().forward(h, places, None, t)


class Lost(fudoki.Blocks):
    def forward(self, h, places, visible, t):
        return super().forward(h, 0 * places, visible, t)


class Mixed(fudoki.Blocks):
    def forward(self, h, places, visible, t):
        h = super().forward(h, places, visible, t)
        return h - h.mean(0)


class Idle(fudoki.Blocks):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.more = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("trunk, told", [
    (Causal, r"every place should see every other, but the outputs at \[1, 2"),
    (Blind, "depend on a place that is not visible"),
    (Lost, "do not depend on the coordinates"),
    (Mixed, "depends on another row"),
    (Idle, "never get a gradient: more.weight, more.bias"),
])
def test_a_mistake_in_a_trunk_is_told(trunk, told):
    with pytest.raises(pytest.fail.Exception, match=told):
        check_trunk(trunk(width=24, depth=1, heads=2), Drawn(0))


class Words(train.Data):
    """Two words in any order."""
    preset = dict(width=24, depth=1, heads=2)

    def __init__(self, run):
        self.texts = ["a b", "b a", "a a"]

    def build(self, run):
        return self.make(run, {"text": [train.tokenizer(self.texts), 2]},
                         {"text": torch.tensor([4, 2])})

    def tokens(self, model):
        rows = model.tokens["text"].encode(self.texts)
        return dict(text=rows), dict(text=rows)

    def sample(self, model, path):
        path.with_suffix(".txt").write_text("a b", "utf-8")

    def report(self, model, run, options):
        yield "words", dict(share=1.)


def of_other(rows):
    return lambda data, model: ({m: change(x) for m, x in Words.tokens(data, model)[0].items()
                                 for change in [rows]}, Words.tokens(data, model)[1])


@pytest.mark.parametrize("methods, told", [
    ({}, ""),
    (dict(tokens=of_other(lambda x: x + 1)), "training, text has tokens from 1 to 2; there are"),
    (dict(tokens=of_other(lambda x: x - 1)), "tokens from -1 to 0"),
    (dict(tokens=of_other(lambda x: x.float())), r"is \(3, 2\) torch.float32; expected \(N, L\)"),
    (dict(tokens=of_other(lambda x: x.int())), r"is \(3, 2\) torch.int32"),
    (dict(tokens=of_other(lambda x: x.repeat(1, 2))), r"is \(3, 4\) torch.int64; .* L ≤ 2"),
    (dict(tokens=of_other(lambda x: x[0])), r"is \(2,\) torch.int64"),
    (dict(tokens=of_other(lambda x: x[:0])), r"has \{'text': 0\} rows"),
    (dict(tokens=of_other(lambda x: x.tolist())), "training, text is list .* expected a tensor"),
    (dict(tokens=lambda data, model: ({}, {})), "training has nothing; the model has text"),
    (dict(tokens=lambda data, model: ([1], {})), r"training is list '\[1\]', expected a dict"),
    (dict(sample=lambda *of: None), "`sample` should write a file"),
    (dict(report=lambda *of: iter([3, 4])), "`report` should yield .* yours yields 3"),
    (dict(report=lambda *of: iter([("words", 1.)])), "`report` should yield"),
])
def test_a_mistake_in_data_is_told(methods, told, tmp_path, monkeypatch):
    kind = type("Mine", (Words,), methods)
    monkeypatch.setitem(train.DATA, "mine", kind)
    if not told:
        return check_data("mine", kind, tmp_path)
    with pytest.raises(pytest.fail.Exception, match=told):
        check_data("mine", kind, tmp_path)
