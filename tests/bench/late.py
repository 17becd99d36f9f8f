"""Are late steps worth it, if the clock runs at even speed? Scenes are drawn in 8 and 32 steps,
of which the last are shorter and shorter; the share that shows what the caption says, the mean of
six abilities, 100 captions each that training may have seen. Appends to late.csv, skips the rows
that are there.

    python tests/bench/late.py NAME=CHECKPOINT … --seeds 2          of --preset scenes
"""
import itertools
import random

import lightning as L
import study                    # first: it puts the project on the path

import sample
import scenes as world
import train

N = 100


def main():
    given = study.parser(__doc__).parse_args()
    table = study.Table("late", "checkpoint steps late seed".split(), ["true"])
    data = train.DATA["scenes"](train.parse(["--preset", "scenes", "--train-images", "20"]))
    for name, model in study.models(given):
        for seed, steps, late in itertools.product(range(given.seeds), (8, 32), (1., 1.5, 2., 3.)):
            if (name, steps, late, seed) in table:
                continue
            texts = sum(data.prompts(random.Random(seed), N).values(), [])
            L.seed_everything(seed, verbose=False)
            drawn = world.see(sample.draw(model, texts, steps=steps, late=late))
            true = sum(map(world.is_true, texts, drawn)) / len(texts)
            table.add(name, steps, late, seed, f"{true:.4f}")


if __name__ == "__main__":
    main()
