"""Does a model mend what contradicts its caption? Scenes that are wrong in one word of it, in the
colour of a thing, in how many there are or on which side: the model goes on from there, as if that
were its state at time t (`state`), along the velocity with jumps back (`corrector`), or with the
noise of time t added (`draft`); or it is told where, and all else is given (`place`). Appends to
revise.csv, skips the rows that are there.

    python tests/bench/revise.py NAME=CHECKPOINT … --seeds 1        of --preset scenes

true: share of pictures that end as the caption says; kept: share of the tokens that were right,
and only of the pictures which end true, that are as they were. With the options of drawing that
the checkpoint has, but for guidance.
"""
import itertools
import random

import lightning as L
import study                    # first: it puts the project on the path
import torch

import sample
import scenes as world

N = 200
WAYS = [("state", 0.9), ("corrector", 0.5), ("corrector", 0.9), ("draft", 0.3), ("draft", 0.5),
        ("place", 0.)]


def contradiction(rng, kind, anywhere):
    """A caption, a scene of which it is true, and one of which it is not, alike but for a word."""
    while True:
        ability = {"colour": "attribution", "count": "counting"}.get(kind, kind)
        things, caption = world.invent(rng, ability, anywhere)
        wrong = list(things)
        if kind == "colour":
            wrong[0] = things[0]._replace(colour=rng.choice([*world.COLOURS]))
        elif kind == "position":                            # they change places
            wrong = [a._replace(row=b.row, column=b.column) for a, b in zip(things, things[::-1])]
        else:                                               # one more or fewer
            more, *others = world.invent(rng, ability, anywhere)[0]
            wrong = things[1:] if rng.random() < 0.5 else things + [
                more._replace(shape=things[0].shape)]
        seen = world.see(world.render(wrong)[None])[0]      # None: they lie on each other
        if seen and not world.UNSEEN.search(caption) and not world.is_true(caption, seen):
            return caption, world.render(things), world.render(wrong)


def main():
    given = study.parser(__doc__).parse_args()
    table = study.Table("revise", "checkpoint wrong way t guidance seed".split(),
                        "true kept".split())
    for name, model in study.models(given):
        patches = model.tokens["image"]
        for seed, kind in itertools.product(range(given.seeds), ("colour", "count", "position")):
            rng = random.Random(seed)
            captions, right, wrong = zip(*(contradiction(rng, kind, False) for _ in range(N)))
            right, wrong = (patches.encode(torch.stack(some)) for some in (right, wrong))
            x = dict(text=model.tokens["text"].encode(captions), image=wrong)
            for (way, t), guidance in itertools.product(WAYS, (1., 2.)):
                key = name, kind, way, t, guidance, seed
                if key in table:
                    continue
                L.seed_everything(seed, verbose=False)
                free = model.mark_free(x, "image")
                free["image"] &= (right != wrong) | (way != "place")
                options = sample.defaults(model, "draw") | dict(guidance=guidance)
                if way == "corrector":
                    options["velocity"] = way
                *_, end = model.generate(x, free, t=t, **options,
                                         x_t=x if way in ("state", "corrector") else None)
                true = torch.tensor([*map(world.is_true, captions,
                                          world.see(patches.decode(end["image"])))])
                same = (end["image"] == wrong)[true][(right == wrong)[true]]
                table.add(*key, f"{true.float().mean():.3f}", f"{same.float().mean():.4f}")


if __name__ == "__main__":
    main()
