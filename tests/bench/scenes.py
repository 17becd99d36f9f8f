"""Draws figures/scenes.png from runs/scenes/model.ckpt: a caption of each ability, and what
becomes of a thing whose place is drawn anew while the rest stays; eight each, of seed 0, none
chosen.

    python tests/bench/scenes.py
"""
import matplotlib
import study                    # first: it puts the project on the path
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402

CAPTIONS = ("a star", "a circle and a triangle", "three squares", "a purple diamond",
            "a triangle left of a star", "a green circle and a blue square")
CHANGED = "a green circle and a yellow star"
GIVEN = [train.Thing("circle", "green", 8, 8, 8), train.Thing("square", "blue", 16, 16, 8)]


def main():
    model = sample.open_model("runs/scenes/model.ckpt")[0].cpu()
    patches = model.tokens["image"]
    torch.manual_seed(0)
    rows = [(caption, sample.draw(model, [caption] * 8)) for caption in CAPTIONS]
    n = 16 // patches.patch
    place = sample.region(f"not {n}:{n}-{n + 8 // patches.patch - 1}:{n + 8 // patches.patch - 1}",
                          train.FIELD // patches.patch)
    image = patches.encode(train.render(GIVEN)[None]).expand(7, -1)
    text = model.tokens["text"].encode([CHANGED] * 7)
    options = sample.defaults(model, "draw") | dict(guidance=2.)        # see revise.csv
    end = sample.fill(model, options, text=text, image=image.where(place, -1))["image"]
    rows.append((f"the first, but for one place:\n{CHANGED}",
                 patches.decode(torch.cat([image[:1], end]))))
    figure, axes = plt.subplots(len(rows), 8, figsize=(9, 0.75 * len(rows)))
    for (caption, pictures), line in zip(rows, axes):
        for picture, axis in zip(pictures, line):
            axis.imshow(picture.permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(study.ROOT / "figures/scenes.png", dpi=100)


if __name__ == "__main__":
    main()
