"""What the path and the steps reach by themselves, when nothing is left to learn: scenes of 16
cells are few enough to list, so the posterior p(x₁ | x_t, caption) of every token is exact.
Positions are still drawn one by one. The share of pictures that show exactly what is said, and
nothing else, to oracle.csv.

    python tests/bench/oracle.py
"""
import itertools

import lightning as L
import study                    # first: it puts the project on the path
import torch

import fudoki
import scenes as world

CAPTIONS = ("a circle", "two circles", "a circle left of a square",
            "a red circle and a blue square")
PATHS = [*((name, 0) for name in fudoki.PATHS), *(("metric, shuffled", seed) for seed in range(5))]
WAYS = [("calibrated", 1., 1.), ("calibrated", 2., 1.), ("linear", 1., 1.), ("linear", 2., 1.),
        ("calibrated", 1., 0.5)]
N = 200


def scenes(caption, patches):
    """All scenes that a caption is true of: (S, 16) long."""
    n = max(map(caption.split().count, ("a", "two"))) + ("two" in caption)
    cells = list(itertools.product(range(0, 32, 8), repeat=2))
    kinds = [(shape, colour) for shape in world.SHAPES for colour in world.COLOURS
             if shape in caption]
    found = []
    for places in itertools.combinations(cells, n):
        for some in itertools.product(kinds, repeat=n):
            things = [world.Thing(*kind, *place, 8) for kind, place in zip(some, places)]
            if world.is_true(caption, things):
                found.append(world.render(things))
    return patches.encode(torch.stack(found))


def posterior(path, x_t, t, all_x_1):
    """p(x₁ | x_t) of every position, x₁ being one of some rows, all as likely: (B, N), a number,
    (S, N) -> (B, N, V)"""
    V = all_x_1.max() + 1
    l = path(torch.arange(V), torch.full((V, 1), t)).log_softmax(-1)            # (x₁, x)
    clean = torch.nn.functional.one_hot(all_x_1, V).float()
    scores = torch.einsum("bnv,snv->bs", l.T[x_t].clamp(min=-1e4), clean)
    return torch.einsum("bs,snv->bnv", scores.softmax(-1), clean)


def draw(path, all_x_1, times, temperature):
    """N pictures, by the race."""
    x_t = fudoki.corrupt(path, all_x_1[:1].expand(N, -1), 0.)
    for t, s in itertools.pairwise(times):
        p_1t = posterior(path, x_t, t, all_x_1).clamp(min=1e-30).log()
        x_1 = fudoki.sample_x_1(p_1t, temperature)
        x_t = (fudoki.race if s < 1 else fudoki.finish)(path, x_t, x_1, t, s)
    return x_t


def made(name, seed):
    """A path of `scenes` and its tokens. Of a shuffled metric the distances mean nothing: the seed
    is that of the order."""
    run, data = study.prepared(["--preset", "scenes", "--train-images", "6000", "--width", "16",
                                "--path", name.partition(",")[0], "--depth", "1", "--heads", "1"])
    L.seed_everything(0, verbose=False)
    model = data.build(run)
    path = model.paths["image"]
    if "shuffled" in name:
        torch.manual_seed(seed)
        path = fudoki.MetricPath(path.embedding[torch.randperm(len(path.embedding))],
                                 path.frequency)
    return path, model.tokens["image"]


def main():
    table = study.Table("oracle", "caption path clock late temperature steps seed".split(),
                        ["true"])
    for name, seed in PATHS:
        path, patches = made(name, seed)
        for caption, (clock, late, temperature) in itertools.product(CAPTIONS, WAYS):
            all_x_1 = scenes(caption, patches)
            path.on(clock)
            for steps in (1, 2, 4, 8, 16, 32):
                key = caption, name, clock, late, temperature, steps, seed
                if key in table:
                    continue
                L.seed_everything(0, verbose=False)
                times = [1 - (1 - i / steps) ** late for i in range(steps + 1)]
                pictures = patches.decode(draw(path, all_x_1, times, temperature))
                table.add(*key, sum(world.is_true(caption, things)
                                    for things in world.see(pictures)) / N)


if __name__ == "__main__":
    main()
