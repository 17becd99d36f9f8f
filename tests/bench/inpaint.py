"""Does a given half fit the drawn one? The upper or left half of 500 held-out pictures is kept,
the rest is drawn from their captions, in one of two ways: `still`, what is given stays clean, as
after a training with such rows; `moving`, it is as noisy as the rest, as after one without. And
one word of their captions is left out and found from the picture and the other two. Appends to
inpaint.csv, skips the rows that are there.

    python tests/bench/inpaint.py NAME=CHECKPOINT … [--data-dir FOLDER]

NAME is the path, for tables.py.
digit, caption, frechet: as in the report; seam: mean difference of the pixels on both sides of the
seam, and of the same pixels of the decoded picture. Of words, digit and caption: how many of the
missing words are found, in one greedy step (in given.csv and in the first rows 8), of digits and
of all.
"""
import itertools

import lightning as L
import study                    # first: it puts the project on the path
import torch

import sample
import train


WAYS = "moving", "still"


def halves(model, image, text, region):
    """x and free of pictures of which a region is kept; without one, of captions with a gap."""
    if region == "words":
        gap = torch.arange(4) == 1 + torch.arange(len(text))[:, None] % 3
        return model.to_fill(len(text), text=text.where(~gap, -1), image=image)
    return model.to_fill(len(text), text=text, image=image.where(sample.region(region, 7), -1))


def seam(pictures, region):
    """Mean difference of the pixels on both sides of the seam."""
    lines = pictures if region == "top" else pictures.transpose(2, 3)
    return (lines[:, :, 11] - lines[:, :, 12]).abs().mean().item()


def measure(end, x, free, truth, region, model, judge):
    """The numbers of a row."""
    if region == "words":
        right = (end["text"] == model.tokens["text"].encode(truth))[free["text"]]
        return right[2::3].float().mean().item(), right.float().mean().item(), "", "", ""
    drawn, real = (model.tokens["image"].decode(tokens["image"]) for tokens in (end, x))
    features, seen = judge(drawn)
    return (*study.right(train.captions(drawn, seen), truth),
            f"{study.world.frechet(features, judge(real)[0]):.2f}",
            f"{seam(drawn, region):.4f}", f"{seam(real, region):.4f}")


def main():
    given = study.parser(__doc__).parse_args()
    table = study.Table("inpaint", "checkpoint kept given seed".split(),
                        "digit caption frechet seam real_seam".split())
    data = study.digits(given)
    judge = study.judge(data)
    for name, model in study.models(given):
        rows, truth = data.rows(model, *(part[:500] for part in data.held_out))
        image = rows["image"]
        for seed, region, way in itertools.product(range(given.seeds), ("top", "left", "words"),
                                                   WAYS):
            key = name, region, way, seed
            if key in table:
                continue
            L.seed_everything(seed, verbose=False)
            x, free = halves(model, image, rows["text"], region)
            x["image"] = image
            model.hparams.clean = float(way == "still")
            *_, end = model.generate(x, free, **sample.READ if region == "words" else sample.DRAW)
            table.add(*key, *measure(end, x, free, truth, region, model, judge))


if __name__ == "__main__":
    main()
