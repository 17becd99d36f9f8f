"""Draws the pictures of the tutorial's derivations (a minute):

    python tests/bench/book.py [SCENES_CHECKPOINT]

With a checkpoint of scenes also what it draws: scenes of each ability, a thing drawn anew in its
place, and scenes that are mended; seed 0.
"""
import random
import sys

import matplotlib
import tables
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

sys.path[:0] = [str(tables.ROOT), str(tables.ROOT / "tests/worlds")]
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import fudoki  # noqa: E402
import sample  # noqa: E402
import scenes as world  # noqa: E402
import train  # noqa: E402

LINE, VALUES = fudoki.MetricPath(torch.arange(5.)[:, None]).on("calibrated"), torch.arange(5)


def p(path, x_1, t):
    """p_t(· | x₁) of one token at times t (N,): (N, V)."""
    t = torch.as_tensor(t).float().view(-1, 1)
    return path(torch.full((len(t),), x_1), t).softmax(-1)


def save(figure, name):
    figure.tight_layout()
    figure.savefig(tables.ROOT / "figures" / f"{name}.png", dpi=110)
    plt.close(figure)


def codebook():
    """The codes, three of them with their neighbours, and how likely these are along the path."""
    torch.manual_seed(0)
    patches = F.unfold(train.DATA["smoke"].rendered(2000, seed=0)[0], 4, stride=4).mT.flatten(0, 1)
    codes = train.k_means(patches, 64)
    frequency = torch.bincount(torch.cdist(patches, codes).argmin(1), minlength=64)
    d, path = torch.cdist(codes, codes), fudoki.MetricPath(codes, frequency).on("calibrated")
    figure = plt.figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2))
    axis = left.subplots()
    axis.imshow(make_grid(codes[frequency.argsort(descending=True)].view(-1, 1, 4, 4), 8, 1,
                          pad_value=0.5).permute(1, 2, 0))
    axis.set_title("64 codes, most frequent first", fontsize=9)
    axis.axis("off")
    some = frequency.argsort(descending=True)[[3, 10, 20]].tolist()
    for row, x_1 in zip(right.subplots(3, 2, width_ratios=(1.2, 1), sharex="col"), some):
        near = d[x_1].argsort()
        picture = make_grid(codes[near[:9]].view(-1, 1, 4, 4), 9, 1, pad_value=0.5)
        row[0].imshow(picture.permute(1, 2, 0))
        row[0].axis("off")
        for t in (0.3, 0.5, 0.7):
            row[1].plot(p(path, x_1, t)[0, near], label=f"t = {t}")
        row[1].set_ylabel("p_t")
        row[1].set_yscale("log")
    row[1].set_xlabel("neighbours of x₁, in order of distance")
    row[1].legend(fontsize=7)
    right.suptitle("three patches with their 8 nearest; how likely all 64 are", fontsize=9)
    figure.savefig(tables.ROOT / "figures/codebook.png", dpi=110)
    plt.close(figure)


def simplex():
    """Distributions of three tokens, of which two are alike: the paths as curves, with ticks."""
    points, side = torch.tensor([[0.], [0.7], [3.]]), 3 ** 0.5 / 2
    corners = torch.tensor([[0., 0.], [0.5, side], [1., 0.]])
    figure, axis = plt.subplots(figsize=(5, 4.4))
    axis.plot(*corners[[0, 1, 2, 0]].T, "k", linewidth=0.8)
    paths = {"uniform": fudoki.UniformPath(points),
             "by frequency": fudoki.MarginalPath(points, torch.tensor([100., 200, 700])),
             **{f"metric, exponent {e:g}": fudoki.MetricPath(points, exponent=e)
                for e in (1, 2)}}
    for name, path in paths.items():
        path.on("calibrated")
        curve, ticks = (p(path, 0, torch.linspace(0, 1, n)) @ corners for n in (401, 11))
        line, = axis.plot(*curve.T, label=name)
        axis.plot(*ticks.T, "o", markersize=3.5, color=line.get_color())
    for corner, text, place in zip(corners, ("x₁", "near x₁", "far from x₁"),
                                   ((-0.04, -0.07), (0, 0.03), (-0.08, -0.07))):
        axis.text(corner[0] + place[0], corner[1] + place[1], text)
    axis.set_ylim(-0.12, 1)
    axis.legend(fontsize=8, loc="upper right")
    axis.set_aspect("equal")
    axis.axis("off")
    save(figure, "simplex")


def flux():
    """p_t at mid-time on the line of five, and who moves where, as wide as the flux."""
    u = fudoki.kinetic_optimal(LINE, VALUES, torch.full((5,), 3), torch.full((5, 1), 0.5))
    height = p(LINE, 3, 0.5)[0]
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.bar(VALUES, height, width=0.5, color="0.75")
    for z in range(5):
        for x in range(5):
            flow = (height[z] * u[z, x]).item()
            if flow > 0.005:
                top = max(height[z], height[x]) if abs(x - z) > 1 else (height[z] + height[x]) / 2
                axis.annotate("", (x, height[x]), (z, height[z]), arrowprops=dict(
                    arrowstyle=f"-|>,head_width={0.15 + 0.4 * flow},head_length=0.4",
                    linewidth=12 * flow, color="C0", alpha=0.7, shrinkA=0, shrinkB=0,
                    connectionstyle=f"arc3,rad={-0.35 * (1 if x > z else -1)}"))
                if flow > 0.05:
                    axis.text((x + z) / 2 - 0.35 * (x - z) * (abs(x - z) == 1), top + 0.1,
                              f"{flow:.2f}", ha="center", fontsize=8)
    axis.set_ylim(0, 0.9)
    axis.set_xlabel("x")
    axis.set_ylabel("p_t(x | 3), t = ½")
    save(figure, "flux")


def race():
    """Arrival times of five tokens as t grows: who is lowest is x_t."""
    t, leader = torch.linspace(0, 0.97, 300), torch.zeros(1)
    for seed in range(100):                                 # the first with two overtakings
        if len(leader.unique_consecutive()) < 3 or leader[0] != leader[40]:
            torch.manual_seed(seed)
            arrival = fudoki.exp_1(torch.empty(5)).log() - p(LINE, 3, t).log()
            leader = arrival.argmin(1)
    figure, axis = plt.subplots(figsize=(6, 3.4))
    for x, line in enumerate(arrival.T):
        axis.plot(t, line, label=f"x = {x}")
    axis.plot(t, arrival.min(1).values, "k", linewidth=5, alpha=0.15)
    for i in (leader.diff() != 0).nonzero().flatten().tolist():
        axis.annotate(f"{leader[i]} → {leader[i + 1]}", (t[i], arrival[i].min()), (0, -22),
                      textcoords="offset points", ha="center", fontsize=9,
                      arrowprops=dict(arrowstyle="-", linewidth=0.6))
    axis.set_ylim(arrival.min() - 2, 6)
    axis.set_xlabel("t")
    axis.set_ylabel("log of the time of arrival")
    axis.legend(fontsize=8)
    save(figure, "race")


def error():
    """Total variation from p_s of where a million tokens are, against steps, from t = 0 to ¾."""
    figure, axis = plt.subplots(figsize=(5, 3.2))
    n, steps = 1_000_000, (1, 2, 4, 8, 16, 32)
    for name in ("euler", "race"):
        off = []
        for k in steps:
            torch.manual_seed(0)
            x, times = torch.randint(5, (n,)), torch.linspace(0, 0.75, k + 1).tolist()
            for t, s in zip(times, times[1:]):
                x = fudoki.STEPS[name](LINE, x, torch.full((n,), 3), t, s)
            off.append((torch.bincount(x, minlength=5) / n - p(LINE, 3, 0.75)[0]).abs().sum() / 2)
        axis.plot(steps, off, "o-", label=f"{name}{', mid-step' * (name == 'euler')}")
    chance = (p(LINE, 3, 0.75)[0] / n).sqrt().sum() / 2 * (2 / torch.pi) ** 0.5
    axis.axhline(chance, color="0.5", linestyle=":", label="chance, of a million draws")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(steps, steps)
    axis.set_xlabel("steps from t = 0 to t = ¾")
    axis.set_ylabel("total variation")
    axis.legend(fontsize=8)
    save(figure, "error")


def loss():
    """Held-out loss by t, early and late in a run of the toy."""
    log = [row for row in tables.rows("toy_log") if row["val_image_loss"]]
    times = [f"0.{k}5" for k in range(10)]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    for axis, m, what in zip(axes, ("image", "text"), ("drawing: patches", "reading: words")):
        for row, shade in zip((log[0], log[len(log) // 2], log[-1]), ("0.7", "0.4", "C0")):
            axis.plot([*map(float, times)], [float(row[f"val_{m}_loss_t{t}"]) for t in times],
                      "o-", color=shade, label=f"step {int(row['step']) + 1}")
        axis.set_xlabel("t")
        axis.set_title(what, fontsize=9)
    axes[0].set_ylabel("cross-entropy, nats")
    axes[0].legend(fontsize=8)
    save(figure, "loss")


def agree():
    """What exact posteriors reach by steps, from oracle.csv."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
    steps = 2, 4, 8, 16, 32
    for axis, (clock, late, what) in zip(axes, (
            ("linear", 1, "the path's own time"), ("calibrated", 1, "calibrated clock"),
            ("calibrated", 2, "calibrated clock, late 2"))):
        for path in tables.ORACLE:
            axis.plot(steps, [tables.true(path, clock, n, late) for n in steps],
                      "o--" if "," in path else "o-", label=path, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_xticks(steps, steps)
        axis.set_xlabel(f"steps, {what}")
    axes[0].set_ylabel("drawings that are true")
    axes[0].legend(fontsize=8)
    save(figure, "agree")


CAPTIONS = ("a star", "a circle and a triangle", "three squares", "a purple diamond",
            "a triangle left of a star", "a green circle and a blue square")
CHANGED = "a green circle and a yellow star"
GIVEN = [world.Thing("circle", "green", 8, 8, 8), world.Thing("square", "blue", 16, 16, 8)]


def scenes(checkpoint):
    """A caption of each ability, and a thing whose place is drawn anew; eight each, unselected."""
    model = sample.open_model(checkpoint)[0].cpu()
    patches = model.tokens["image"]
    torch.manual_seed(0)
    rows = [(caption, sample.draw(model, [caption] * 8)) for caption in CAPTIONS]
    n = 16 // patches.patch
    place = sample.region(f"not {n}:{n}-{n + 8 // patches.patch - 1}:{n + 8 // patches.patch - 1}",
                          world.FIELD // patches.patch)
    image = patches.encode(world.render(GIVEN)[None]).expand(7, -1)
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
    figure.savefig(tables.ROOT / "figures/scenes.png", dpi=100)


def repair(checkpoint):
    """Scenes that contradict their caption, and what the model makes of them."""
    import revise
    model, rng = sample.open_model(checkpoint)[0].cpu(), random.Random(1)
    patches, cases = model.tokens["image"], []
    kinds = [kind for kind in ("colour", "count", "position") for _ in range(2)]
    for kind in kinds:
        caption, _, wrong = revise.contradiction(rng, kind, False)
        cases.append((caption, wrong))
    torch.manual_seed(0)
    captions, wrong = zip(*cases)
    x = dict(text=model.tokens["text"].encode(captions), image=patches.encode(torch.stack(wrong)))
    *_, end = model.generate(x, model.mark_free(x, "image"), x_t=x, t=0.9,
                             **sample.defaults(model, "draw"))
    mended = patches.decode(end["image"])
    figure, axes = plt.subplots(2, 6, figsize=(11, 4))
    for column, (caption, before, after) in enumerate(zip(captions, wrong, mended)):
        for axis, picture in zip(axes[:, column], (before, after)):
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1))
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0, column].set_title(caption.replace(" and ", "\nand ").replace(" of ", "\nof "),
                                  fontsize=8)
    axes[0, 0].set_ylabel("as it is")
    axes[1, 0].set_ylabel("32 steps later")
    print("true:", [*map(world.is_true, captions, world.see(mended))])
    save(figure, "repair")


if __name__ == "__main__":
    for draw in (codebook, simplex, flux, race, error, loss, agree):
        draw()
    if sys.argv[1:]:
        scenes(sys.argv[1])
        repair(sys.argv[1])
