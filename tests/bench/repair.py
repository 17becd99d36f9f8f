"""Does a model revise? Tokens of 300 held-out pictures, or of their captions, are replaced by
random others, and the model goes on from there, the other modality given, in one of three ways:
`state`, as if that were its state at time t; `corrector`, the same, but with 16 of Euler's steps
along this velocity, with jumps back; `draft`, with the noise of time t added; `told`, from noise
at the replaced tokens only. Random others lie anywhere; those of "image, near" are drawn
from the metric path at t = .5. Appends to repair.csv, skips the rows that are there.

    python tests/bench/repair.py NAME=CHECKPOINT … [--data-dir FOLDER]

repaired: share of the replaced tokens that end as they were; spoiled: share of the others that do
not; left: squared error of the pictures (in pixels) after, by that before. Else 4 steps; greedy,
no guidance.
"""
import itertools

import lightning as L
import study                    # first: it puts the project on the path
import torch

import fudoki
import train

WAYS = [("state", 0.5), ("state", 0.9), ("corrector", 0.5), ("corrector", 0.9), ("draft", 0.3),
        ("draft", 0.5), ("draft", 0.7), ("told", 0.)]
CELLS = [(*damage, way, t) for damage in (("image", 0.2), ("text", 0.33), ("image, near", 0.2))
         for way, t in WAYS]


def others(x, candidates):
    """A random other token for each: x (B, N), candidates per position, lists of tokens."""
    found = []
    for x_i, c in zip(x.T, candidates):
        place = (x_i[:, None] == c).long().argmax(1)
        found.append(c[(place + torch.randint(1, max(2, len(c)), x_i.shape)) % len(c)])
    return torch.stack(found, 1)


def damage(truth, kind, share, model):
    """Which tokens are replaced, and what is there then: (B, N) bool and long."""
    m = kind.split(",")[0]
    order = torch.rand(truth[m].shape)
    if m == "text":
        order[:, 0] = 2.                                            # the article says nothing
    order, n = order.argsort(1).argsort(1), order.shape[1] - (m == "text")
    hit = order < round(share * n)
    words, patches = model.tokens["text"].tokenizer, model.tokens["image"]
    slots = [["a"], train.WEIGHTS, train.SLANTS, train.DIGITS]
    candidates = {"image": [torch.arange(len(patches.embedding))] * patches.length,
                  "text": [torch.tensor([words.token_to_id(w) for w in slot]) for slot in slots]}
    other = others(truth[m], candidates[m])
    if "near" in kind:
        metric = fudoki.MetricPath(patches.embedding, exponent=2.).on("calibrated")
        l = metric(truth[m], torch.tensor(0.5))
        other = fudoki.sample_x_1(l.masked_fill(metric.one_hot(truth[m]), -torch.inf), 1.)
    return hit, torch.where(hit, other, truth[m])


def measure(truth, before, end, hit, m, model):
    """repaired, spoiled, left."""
    same, left = end == truth, ""
    if m == "image":
        real, bad, good = map(model.tokens["image"].decode, (truth, before, end))
        left = f"{((good - real).square().sum() / (bad - real).square().sum()).item():.4f}"
    spoiled = (~same[~hit]).float().mean().item() if not hit.all() else 0.
    return f"{same[hit].float().mean().item():.4f}", f"{spoiled:.4f}", left


def main():
    given = study.parser(__doc__).parse_args()
    table = study.Table("repair", "checkpoint modality damaged way t seed".split(),
                        "repaired spoiled left".split())
    data = study.digits(given)
    for name, model in study.models(given):
        truth = data.rows(model, *(part[:300] for part in data.held_out))[0]
        for seed, (kind, share, way, t) in itertools.product(range(given.seeds), CELLS):
            key = name, kind, share, way, t, seed
            if key in table:
                continue
            m = kind.split(",")[0]
            L.seed_everything(seed, verbose=False)
            hit, before = damage(truth, kind, share, model)
            x, free = truth | {m: before}, model.mark_free(truth, m)
            if way == "told":
                free[m] = hit
            how = dict(velocity="corrector", steps=16) if way == "corrector" else dict(steps=4)
            *_, end = model.generate(x, free, x_t=x if way in ("state", "corrector") else None,
                                     t=t, temperature=0., **how)
            table.add(*key, *measure(truth[m], before, end[m], hit, m, model))


if __name__ == "__main__":
    main()
