"""Six exercises to write: fill in what raises NotImplementedError, then

    python -m pytest tests/exercises/test_exercises.py          what is not written is skipped

Each docstring is the whole task, the tests say in plain loops what is meant, and README.md in this
folder has six more, and how long they take.
"""
import fudoki

TODO = "not written yet"


class CosinePath(fudoki.UniformPath):
    """1. A clock for mixtures (15 minutes). A token is clean with probability κ_t = sin²(πt/2),
    otherwise any. Where does it run faster than the uniform path, where slower?"""

    def logits(self, x_1, t):
        raise NotImplementedError(TODO)


def uniform_velocity(path, x_t, x_1, t):
    """2. By hand (20 minutes). The kinetic-optimal velocity of fudoki.UniformPath without any
    derivative taken by machine: from ℓ_t = log(t·1[x = x₁] + (1 − t)/V), on paper, then here.
    x_t, x_1 (B,), t (B, 1) -> (B, V)"""
    raise NotImplementedError(TODO)


def metropolis(path, x_t, x_1, t, eta=1.):
    """3. A corrector (30 minutes). The kinetic-optimal velocity plus jumps that p_t does not
    notice: from z to x at rate η·min(p_t(x), p_t(z))/p_t(z)/V, 0 from z to z. Why does p_t not
    notice them? Use fudoki.growth. x_t, x_1 (B,), t (B, 1) -> (B, V)"""
    raise NotImplementedError(TODO)


def stays(path, x_t, x_1, t, s):
    """4. The race without a race (45 minutes). The probability that `fudoki.race` leaves x_t where
    it is: 1/(1 + Σ_x p_t(x) (e^{[Δℓ(x) − Δℓ(x_t)]₊} − 1)), Δℓ = ℓ_s − ℓ_t. Show it on paper
    first: what has x to do to overtake x_t, and when is nobody in time? (B,), (B, 1) -> (B,)"""
    raise NotImplementedError(TODO)


def linear_distance(path):
    """5. URSA's clock (1 hour). A clock for MetricPath by which the mean distance falls evenly:
    E_{x₁} Σ_x p_t(x | x₁) d(x, x₁) = (1 − t) of what it is at t = 0, x₁ by path.frequency. Returns
    a function of t -> the path's own time, (…, 1) each, differentiable in t: torch only. Look at
    fudoki.Calibrated."""
    raise NotImplementedError(TODO)


def race_by_two(path, x_t, x_1, t, s):
    """6. The race with two random numbers (2 hours). Let r_x = p_s(x)/p_t(x), and z = x_t. The
    time α of the next winner, in units of z's, has P(later than α) = 1/(1 + h(α)) with
    h(α) = Σ_x [α p_s(x) − p_t(x)]₊, and whoever wins at α is x with probability in proportion to
    p_s(x) among those with 1/r_x < α. So draw u: if h(1/r_z) ≤ 1/u − 1, z stays. Else solve
    h(α) = 1/u − 1, which is linear between the sorted 1/r_x, and draw the winner with v.
    x_t, x_1 (B,), t, s (B, 1) -> (B,); torch.rand for 2·B numbers and no more."""
    raise NotImplementedError(TODO)
