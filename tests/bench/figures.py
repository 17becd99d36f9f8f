"""Draws the pictures of README and tutorial from runs/toy/model.ckpt (a minute, seed 0):

    python tests/bench/figures.py [--data-dir FOLDER]
"""
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid, save_image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import fudoki  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

model = sample.open_model("runs/toy/model.ckpt")[0].cpu()
words, patches = model.tokens["text"], model.tokens["image"]
torch.manual_seed(0)


def save(images, name, columns):
    """A grid of pictures (B, 1, H, W), enlarged twice, on grey."""
    grid = make_grid(images.clamp(0, 1), columns, pad_value=0.3)
    save_image(grid.repeat_interleave(2, -1).repeat_interleave(2, -2), ROOT / "figures" / name)


def film(states, path):
    """An animation of a generation; patches that change are framed. Beside it a strip of it, with
    the number of changes of every patch at its end."""
    images = [state["image"] for state in states]
    still = torch.zeros_like(images[0], dtype=torch.bool)
    changed = [still, *(a != b for a, b in zip(images, images[1:])), still]
    edge = torch.ones(16, 16, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    frames, grids = [], []
    for x, c in zip([*images, images[-1]], changed):
        big = F.interpolate(patches.decode(x).clamp(0, 1).expand(-1, 3, -1, -1), scale_factor=4)
        where = torch.kron(c.view(-1, 1, 7, 7).long(), edge.long()).bool()
        frames.append(torch.where(where, torch.tensor([1., 0.5, 0.]).view(3, 1, 1), big))
        grid = make_grid(frames[-1], len(x), pad_value=0.3)
        grids.append(Image.fromarray((255 * grid).byte().permute(1, 2, 0).numpy()))
    grids[0].save(path, save_all=True, append_images=grids[1:], loop=0,
                  duration=[240] * (len(grids) - 1) + [2000])
    count = sum(c.float() for c in changed)
    count = (count / count.amax().clamp(min=1)).view(-1, 1, 7, 7)
    count = F.interpolate(count, frames[0].shape[-2:]).expand_as(frames[0])
    strip = torch.stack([*frames[:-1], count], 1)                           # (B, n, 3, H, W)
    save_image(strip.flatten(0, 1), path.with_name("film_strip.png"), nrow=strip.shape[1],
               pad_value=0.3)


# 1. every caption
save(sample.draw(model, train.Digits.examples), "digits.png", 10)

# 2. one picture, kept in its upper half, which is framed, or edited from t = .25; a film
test = train.Digits(train.parse(sys.argv[1:])).test[0][:500]
picture = patches.encode(test[:1]).expand(7, -1)
rows = []
for caption, kept, t in (("a bold upright three", sample.region("top", 7), 0.),
                         ("a bold slanted seven", sample.region("0:0-0:0", 7) & False, 0.25)):
    x, free = model.to_fill(7, text=words.encode([caption] * 7), image=picture.where(kept, -1))
    *_, x = model.generate(x | {"image": picture}, free, t=t, **sample.DRAW)
    rows += [picture[:1], x["image"]]
pictures = patches.decode(torch.cat(rows)).clamp(0, 1).repeat(1, 3, 1, 1)
frame = torch.zeros(28, 28, dtype=torch.bool)
frame[[0, 11]], frame[:12, [0, 27]] = True, True
pictures[:8, :, frame] = torch.tensor([1., 0.5, 0.]).view(3, 1)
save(pictures, "fill.png", 8)
x, free = model.to_fill(2, text=words.encode(["a bold slanted seven", "a thin upright two"]))
states = list(model.generate(x, free, **sample.DRAW | dict(steps=8)))
film(states, ROOT / "figures/film.gif")

# 3. P(x_t = x₁) along the paths, x₁ being the tokens of test images
x_1, codebook = patches.encode(test).flatten(), patches.embedding
frequency, times = model.paths["image"].frequency, torch.linspace(0, 1, 41)
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for axis, (clock, what) in zip(axes, {"linear": "the path's own time",
                                      "calibrated": "the calibrated clock"}.items()):
    for name in fudoki.PATHS:
        path = fudoki.PATHS[name](codebook, frequency).on(clock)
        kept = [fudoki.entry(path(x_1, t.view(1, 1)).softmax(-1), x_1).mean() for t in times]
        axis.plot(times, kept, label=name)
    axis.set_xlabel(f"t, {what}")
axes[0].set_ylabel("P(x_t = x₁)")
axes[0].legend()
plt.tight_layout()
plt.savefig(ROOT / "figures" / "kept.png", dpi=110)
