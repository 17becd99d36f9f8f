"""Draws the pictures of README and tutorial from runs/toy/model.ckpt (a minute, seed 0):

    python tests/bench/figures.py [--data-dir FOLDER]
"""
import sys
from pathlib import Path

import matplotlib
import torch
from torchvision.utils import make_grid, save_image

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import fudoki  # noqa: E402
import train  # noqa: E402

model = fudoki.Fudoki.open("runs/toy/model.ckpt").cpu()
torch.manual_seed(0)


def save(images, name, columns):
    """A grid of pictures (B, 1, H, W), enlarged twice, on grey."""
    grid = make_grid(images.clamp(0, 1), columns, pad_value=0.3)
    save_image(grid.repeat_interleave(2, -1).repeat_interleave(2, -2), ROOT / "figures" / name)


# 1. every caption
weights, slants, digits = model.words.slots
save(model.draw([f"{a} {b} {c}" for a in weights for b in slants for c in digits]), "digits.png", 10)

# 2. three generations, from noise to the picture
x, free = model.blank(3, text=model.words.encode(["bold slanted seven", "thin upright two", "bold upright five"]))
states = model.generate(x, free, **model.DRAW | dict(steps=9))
frames = torch.stack([model.patches.decode(state["image"]) for state in states], 1)     # (3, 10, 1, H, W)
save(frames.flatten(0, 1), "unfolding.png", 10)

# 3. P(x_t = x₁) along the paths, x₁ being the tokens of test images
test = train.load_digits(train.parse(sys.argv[1:]))[1][0][:500]
x_1 = model.patches.encode(test).flatten()
codebook = model.patches.codebook
paths = {"metric, calibrated": model.paths["image"],
         "metric, power law": fudoki.MetricPath(codebook, exponent=2., normalize=False, schedule="power"),
         "uniform": fudoki.UniformPath(codebook), "mask": fudoki.MaskPath(codebook)}
times = torch.linspace(0, 1, 41)
plt.figure(figsize=(5, 3))
for (name, path), style in zip(paths.items(), ("-", "--", "-", ":")):
    kept = [fudoki.at(path.logits(x_1, t.view(1, 1)).softmax(-1), x_1).mean() for t in times]
    plt.plot(times, kept, style, label=name)
plt.xlabel("t")
plt.ylabel("P(x_t = x₁)")
plt.legend()
plt.tight_layout()
plt.savefig(ROOT / "figures" / "kept.png", dpi=110)
