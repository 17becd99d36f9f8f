"""Draws the pictures of README and tutorial that show tables of this folder (seconds):

    python tests/bench/plots.py
"""
import matplotlib
import tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FIGURES = tables.ROOT / "figures"
EXPONENTS = {0.: "uniform, linear"} | {e: f"metric {e:g}" for e in (0.5, 1., 2., 4.)}
CLOCKS = {", linear": "own time", "": "calibrated clock",
          ", t^1": "calibrated clock, t uniform (codes)"}
TOKENS = {"codes": "256 codes", "grey": "grey levels", "shuffled": "grey levels, shuffled metric"}


def steps():
    """Captions and Fréchet distance by steps, from sampling.csv."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    lines = [(label, dict(step=step), "-") for step, label in tables.STEPS.items()]
    lines += [(f"{name}: race", dict(checkpoint=name), "--") for name in tables.PATHS[1:]]
    for axis, column in zip(axes, ("caption", "frechet")):
        for label, option, style in lines:
            found = [(n, *tables.mean(some, column)) for n in (1, 2, 4, 8, 16, 32)
                     if (some := tables.cell(steps=str(n), **option))]
            axis.errorbar(*zip(*found), fmt=style, label=label, capsize=2)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32])
        axis.set_xlabel("steps (two network calls each)")
    axes[0].set_ylabel("captions right")
    axes[1].set_ylabel("Fréchet distance")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FIGURES / "steps.png", dpi=110)


def metric():
    """What the exponent of the distance does, from paths.csv: 0 is the uniform path, the mask path
    a dotted line, the marginal path a dashed one."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2))
    panels = [("bits per picture, at most", "bits", "image_bits", False),
              ("captions right, 8 steps", "drawing", "caption", True),
              ("Fréchet distance, 8 steps", "drawing", "frechet", True),
              ("far damage repaired", "repair image state 0.9", "repaired", False)]
    for axis, (label, what, column, by_steps) in zip(axes, panels):
        for (tokens, known), colour in zip(TOKENS.items(), ("C0", "C1", "C2")):
            found = []
            for exponent, path in EXPONENTS.items():
                name = f"{tokens.replace('shuffled', 'grey') if not exponent else tokens}/{path}"
                options = dict(steps="8") | tables.chosen(name) if by_steps else {}
                value = tables.worth(name, what, column, **options)
                found += [(exponent, *value)] if value else []
            axis.errorbar(*zip(*found), fmt="o-", color=colour, label=known, capsize=2)
            for path, style in (("mask, linear", ":"), ("marginal, linear", "--")):
                options = dict(steps="8") | tables.chosen(f"{tokens}/{path}") if by_steps else {}
                if value := tables.worth(f"{tokens}/{path}", what, column, **options):
                    axis.axhline(value[0], color=colour, linestyle=style)
        axis.set_xlabel("exponent of the distance")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FIGURES / "metric.png", dpi=110)


def clocks():
    """What the clock does to a training, every dot one of them: bits and Fréchet distance of the
    toy's codes, from paths.csv, and scenes that are true of their caption, from scenes.csv."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    panels = [("bits per picture, at most", lambda name: tables.bits(f"codes/{name}")),
              ("Fréchet distance, 8 steps", lambda name: [
                  float(row["frechet"]) for row in tables.drawn(f"codes/{name}", "8")]),
              ("scenes as captions say", tables.seen)]
    for axis, (label, values) in zip(axes, panels):
        for place, path in enumerate(("metric 1", "uniform", "marginal", "mask")):
            for k, (clock, how) in enumerate(CLOCKS.items()):
                dots = values(path + clock)
                axis.plot([place + 0.2 * (k - 1)] * len(dots), dots, "osD"[k], color=f"C{k}",
                          label=how if not place else None)
        axis.set_xticks(range(4), ["metric", "uniform", "marginal", "mask"])
        axis.set_xlim(-0.5, 3.5)
        axis.set_ylabel(label)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FIGURES / "clocks.png", dpi=110)


if __name__ == "__main__":
    steps()
    metric()
    clocks()
