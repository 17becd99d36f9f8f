"""Eight exercises to write: fill in what raises NotImplementedError, then

    python -m pytest tests/exercises/test_exercises.py -k yours

Each docstring is the whole task; what it asks for as a formula, it describes as a slow loop. Six
more exercises are in the README of this folder. x_1, x_t (B,) are tokens, t, s (B, 1) times, V the
number of tokens.
"""
import fudoki

TODO = "not written yet"


class CosinePath(fudoki.UniformPath):
    """1. Another clock for mixtures (15 minutes). A token is clean with probability sin²(πt/2),
    otherwise any. Where is this path faster than the uniform one, where is it slower?"""

    def logits(self, x_1, t):
        raise NotImplementedError(TODO)


def uniform_velocity(path, x_t, x_1, t):
    """2. A velocity by hand (20 minutes). The kinetic-optimal velocity of fudoki.UniformPath:
    derive it on paper from ℓ_t = log(t·1[x = x₁] + (1 − t)/V), and write the result here, without
    automatic differentiation. -> (B, V)"""
    raise NotImplementedError(TODO)


def metropolis(path, x_t, x_1, t, eta=1.):
    """3. A corrector (30 minutes). The kinetic-optimal velocity, and further jumps: with rate eta
    a token of all V is proposed, each as likely, and a token at z accepts x with probability
    min(1, p_t(x)/p_t(z)). Why does p_t stay the same under these jumps? -> (B, V)"""
    raise NotImplementedError(TODO)


def stays(path, x_t, x_1, t, s):
    """4. The race without a race (45 minutes). The probability that `fudoki.race` leaves a token
    where it is, as a formula. As a loop, of one token z:

        n = 100_000
        x = fudoki.race(path, torch.full((n,), z), torch.full((n,), x_1), t, s)
        return (x == z).float().mean()

    Derive it first: when does x overtake the leader z? What is the probability that none does,
    given the time of z's arrival? -> (B,)"""
    raise NotImplementedError(TODO)


def mean_rates(path, t):
    """5. From known to predicted (45 minutes). The rates at which tokens at z jump to x if nobody
    knows their x₁, which has the probabilities q = path.frequency / path.frequency.sum(). t is a
    number between 0 and 1. As a loop, for a small dt:

        n = 10_000_000
        x_1 = torch.multinomial(q, n, replacement=True)
        x_t = fudoki.corrupt(path, x_1, t)
        x_s = fudoki.race(path, x_t, x_1, t, t + dt)
        for z in range(V):
            for x in range(V):
                at_z = x_t == z
                u[z, x] = (at_z & (x_s == x)).sum() / at_z.sum() / dt if x != z else 0

    -> (V, V): from the row to the column"""
    raise NotImplementedError(TODO)


def linear_distance(path):
    """6. URSA's clock (1 hour). A clock for MetricPath by which the mean distance falls evenly:
    E_{x₁} Σ_x p_t(x | x₁) d(x, x₁) is (1 − t) of what it is at t = 0, x₁ by path.frequency.
    Returns a function of t -> the path's own time, (…, 1) each, differentiable in t: torch only.
    Look at fudoki.Calibrated."""
    raise NotImplementedError(TODO)


def claims():
    """7. Find the false claims (1 hour). Which of these sentences are true as they stand?

    a. Two paths that have the same p_t at all t have the same kinetic-optimal velocity.
    b. Along every path P(x_t = x₁ | x₁) never falls.
    c. On the metric path the kinetic-optimal velocity never moves a token away from x₁.
    d. A perfect network that is not given t predicts the same p(x₁ | x_t) for a single token,
       whether t is uniform in training or t = u³ with u uniform.
    e. If the places of the data are independent of each other, and the network is perfect, then
       generation in a single step is exact (without guidance, at temperature 1).
    f. Two places are drawn one after the other on the mask path, with guidance g = 2 and a perfect
       network. Then they are distributed as c²/u, normalised (c with the caption, u without).
    g. On every metric path with the exponent 1 there is noise that does not depend on x₁ and makes
       the path when it runs from t = 1 to 0 (chapter 9).
    h. A step that is exact moves at least a share ½ Σ_x |p_s(x) − p_t(x)| of the tokens.

    Returns a dictionary from "a" … "h" to True or to a counterexample: of b a class of path that
    can be made from an embedding (V, D); of d the name of an entry of PATHS; of f the pair c, u,
    two tensors (2, 2) of probabilities of both places; of g an embedding (V, D). For each other
    claim that is false, False will do."""
    raise NotImplementedError(TODO)


def race_by_two(path, x_t, x_1, t, s):
    """8. The race with two random numbers (2 hours). From every x_t, x_s has the same distribution
    as that of fudoki.race, but torch.rand is called for 2·B numbers and no more, where the race
    takes V·B. Derive first: let α be the time at which the first of the others arrives at s,
    divided by the time at which the leader z arrives at t. What is P(α > a), a mean over the
    latter? (Exercise 4 is a special case.) How is it inverted? Given α, which token is it?
    -> (B,)"""
    raise NotImplementedError(TODO)
