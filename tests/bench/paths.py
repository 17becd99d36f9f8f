"""When is a metric worth it? Trains the toy on several paths and kinds of tokens, as many steps
each, and measures what they have learned; appends to paths.csv, skips what is there.

    python tests/bench/paths.py train [NAME …] [--seeds 0 1 2] [--data-dir FOLDER]
    python tests/bench/paths.py measure [NAME …] [--seeds 0 1 2] [--data-dir FOLDER]

NAME is tokens/path, "grey/metric 2", by default all. Tokens: `codes`, the toy's 256 patches of
4 × 4 pixels; `tenth`, the same after 6,000 training pictures, a tenth; `fine`, 1,024 such patches;
`grey`, 14 × 14 pixels of 16 grey levels; `shuffled`, the same pixels, but the path is told the
levels in a random order, so that its distances mean nothing. After a path may stand ", linear",
the clock of its own time instead of the calibrated one; ", t^3", trained by u³; ", evidence", a
network that says what the others say of a token, to which what the token says itself is added
(`Prior`); ", tempered", a model of which the first part only is sharpened (`Tempered`).
Checkpoints are in runs/paths/. Everything is measured on the first thousand training images, which
neither model nor judge has seen; so the test set is left for the reports.
"""
import argparse
import csv
import itertools
import math
from pathlib import Path

import lightning as L
import study                    # first: it puts the project on the path
import torch
import torch.nn.functional as F

import bound
import fudoki
import repair
import sample
import train

RUNS = Path("runs/paths")
WAYS = ("state", 0.9), ("state", 0.5), ("told", 0.)
VALUES = "digit caption frechet minds left left_oracle repaired spoiled error " \
         "image_bits text_bits image_bits_ko text_bits_ko"


class StudentPath(fudoki.MetricPath):
    """A heavy tail: d = log(1 + ‖·‖²/s), so p_t(x | x₁) is a power of 1 + ‖·‖²/s; s is the
    squared distance of the nearest other token, of the median one."""

    def distance(self, x_1):
        if not self.embedding.shape[1]:
            return super().distance(x_1)
        if not hasattr(self, "scale"):
            d = torch.cdist(self.embedding, self.embedding).fill_diagonal_(torch.inf)
            self.scale = d.amin(-1).median().item() ** 2
        return torch.log1p(super().distance(x_1) / self.scale)


class MarginalMetricPath(fudoki.MetricPath):
    """Metric noise that begins with tokens as often as they occur in the data."""

    def __init__(self, embedding, frequency=None, exponent=1.):
        super().__init__(embedding, frequency, exponent)
        noise = torch.ones(len(embedding)) if frequency is None else frequency + 1.
        self.register_buffer("noise", noise.log(), persistent=False)

    def logits(self, x_1, t):
        return super().logits(x_1, t) + self.noise


def evidence(path, x_t, t, V):
    """log p_t(x_t | x₁) for every x₁: (B, L) long, (B, 1, 1) or a number -> (B, L, V)"""
    every, t = torch.arange(V), torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1)
    l = path(every.expand(len(t), V), t.expand(-1, V, 1)).log_softmax(-1)           # (B, x₁, x_t)
    return l.clamp(min=-30).mT.expand(len(x_t), -1, -1).gather(
        1, x_t[..., None].expand(-1, -1, V))


class Prior(fudoki.Network):
    """Says what the others say of a token; what it says itself is known: by Bayes' rule
    p(x₁ | x_t) ∝ p(x₁ | the others) p_t(x_t | x₁). Both are logarithms here."""

    def forward(self, x, free, t):
        return {m: prior + evidence(self.paths[m], x[m], t, prior.shape[-1]) * free[m][..., None]
                for m, prior in super().forward(x, free, t).items()}


class Tempered(fudoki.Fudoki):
    """Sharpens the prior and leaves the evidence: log-probabilities of which `generate`, dividing
    them by the temperature, makes log p(x₁ | the others) / temperature + log p_t(x_t | x₁)."""
    sharpness = 1.

    def generate(self, x, free, *, temperature=1., **options):
        self.sharpness = temperature
        yield from super().generate(x, free, temperature=temperature, **options)

    def predict(self, x, noisy, t, guidance=1.):
        found = super().predict(x, noisy, t, guidance)
        if self.sharpness < 1e-6:
            return found
        return {m: l + (self.sharpness - 1) * evidence(self.paths[m], x[m], t, l.shape[-1])
                for m, l in found.items()}


fudoki.PATHS |= {"student": StudentPath, "marginal_metric": MarginalMetricPath}
CODES = "--batch 64 --steps 1500"
GREY = "--codes 16 --patch 1 --width 64 --heads 2 --batch 32 --steps 2000"
TOKENS = {"codes": CODES, "tenth": CODES, "fine": f"{CODES} --codes 1024", "grey": GREY,
          "shuffled": GREY}
METRICS = {f"metric {p}": f"--path metric --path-options exponent={p}" for p in (0.5, 1, 2, 4)}
PATHS = {"uniform": "--path uniform", "mask": "--path mask", **METRICS,
         "student": "--path student --path-options exponent=2.",
         "marginal": "--path marginal",
         "marginal 1": "--path marginal_metric --path-options exponent=1."}
FEW = "uniform", "metric 1", "mask"
NAMES = [f"{tokens}/{path}" for tokens in TOKENS for path in PATHS
         if path in {"codes": PATHS, "grey": PATHS, "shuffled": METRICS}.get(tokens, FEW)]


def folder_of(name, seed):
    name = name.replace(", tempered", "")               # the same training
    return RUNS / f"{name.replace('/', ' ')}, seed {seed}"


def prepared(name, seed, given):
    """The run, its data, and a function that makes a model what its name says."""
    tokens, path = name.split("/")
    path, *more = path.split(", ")
    power = next((word[2:] for word in more if word.startswith("t^")), "2")
    clock = "linear" if "linear" in more else "calibrated"
    flags = (f"{TOKENS[tokens]} {PATHS[path]} --clock {clock} --t-power {power} --seed {seed} "
             "--clean 0")
    run, data = study.prepared([*flags.split(), "--ask", "0", "--val-every", "10000",
                                *study.where(given)])
    if "patch 1" in TOKENS[tokens]:
        data.train, data.held_out, data.test = (
            (F.avg_pool2d(images, 2), digits)
            for images, digits in (data.train, data.held_out, data.test))

    def finished(model):
        if tokens == "shuffled":
            old, g = model.paths["image"], torch.Generator().manual_seed(seed)
            order = torch.randperm(len(old.embedding), generator=g)
            frequency = model.hparams.frequency["image"]
            model.paths["image"] = type(old)(
                old.embedding[order], frequency, **run.path_options).on(clock)
        if "evidence" in more:
            model.net.__class__, model.net.__dict__["paths"] = Prior, model.paths
        if "tempered" in more:
            model.__class__ = Tempered
        return model
    return run, data, finished


def learn(name, seed, given):
    """Trains a model unless it is there."""
    folder = folder_of(name, seed)
    if (folder / "model.ckpt").exists():
        return
    run, data, finished = prepared(name, seed, given)
    if name.startswith("tenth"):                        # the judge sees all
        data.train = tuple(part[:6000] for part in data.train)
    L.seed_everything(seed, verbose=False)
    rate = study.trained(run, data, finished(data.build(run)), folder)
    print(f"\n{name}, seed {seed}: {rate:.0f} samples/s", flush=True)


def choose(cells):
    """Guidance and temperature: the lowest Fréchet distance where the share of right captions is
    at most a hundredth below the best."""
    best = max(values[1] for values in cells.values())
    return min((k for k, v in cells.items() if v[1] >= best - 0.01), key=lambda k: cells[k][2])


class Measured:
    """A trained model, what it is measured on, and its rows in the table."""

    def __init__(self, name, seed, given, table):
        run, data, finished = prepared(name, seed, given)
        self.key, self.seed, self.table = (name, seed), seed, table
        self.model = finished(sample.open_model(folder_of(name, seed) / "model.ckpt")[0].cpu())
        L.seed_everything(0, verbose=False)
        self.judge = study.judge(data)
        rows, self.truth = data.rows(self.model, *data.held_out)
        self.tokens, self.patches = rows, self.model.tokens["image"]
        self.real = self.judge(self.patches.decode(self.patches.encode(data.test[0])))[0]

    def missing(self, what, steps="", guidance="", temperature=""):
        return (*self.key, what, str(steps), str(guidance), str(temperature)) not in self.table

    def add(self, what, columns, values, steps="", guidance="", temperature=""):
        found = {c: f"{v:.4f}" for c, v in zip(columns.split(), map(float, values))}
        self.table.add(*self.key, what, steps, guidance, temperature,
                       *(found.get(c, "") for c in VALUES.split()))

    def bits(self):
        """Of a picture and of a caption, along the time reversal and kinetic-optimally."""
        x = sample.take(self.tokens, slice(0, 200))
        free = {m: self.model.mark_free(x, m) for m in x}
        self.add("bits", "image_bits text_bits image_bits_ko text_bits_ko", [
            bound.of_rows(self.model, x, free[m], 16, velocity).mean(1).min() / math.log(2)
            for velocity in (bound.time_reversal, fudoki.kinetic_optimal)
            for m in ("image", "text")])

    def repairs(self, kind, way, t):
        """Of damage to a fifth of the patches, of one kind, when the model goes on in one way."""
        L.seed_everything(self.seed, verbose=False)
        x = sample.take(self.tokens, slice(0, 200))
        hit, before = repair.damage(x, kind, 0.2, self.model)
        free = self.model.mark_free(x, "image")
        if way == "told":
            free["image"] = hit
        damaged = x | {"image": before}
        *_, end = self.model.generate(damaged, free, x_t=damaged if way == "state" else None,
                                      t=t, steps=4, temperature=0.)
        self.add(f"repair {kind} {way} {t}", "repaired spoiled error", repair.measure(
            x["image"], before, end["image"], hit, "image", self.model), 4)

    def reads(self):
        right = study.right(sample.read(self.model, self.tokens["image"]), self.truth)
        self.add("reading", "digit caption", right, 1)

    def draws(self, texts, **options):
        """digit, caption, frechet, minds, left, left_oracle of drawings of these captions."""
        L.seed_everything(self.seed, verbose=False)
        model, guesses = self.model, []
        x, free = model.to_fill(len(texts), text=model.tokens["text"].encode(texts))

        def predict(*arguments):
            found = type(model).predict(model, *arguments)
            guesses.append(found["image"].argmax(-1))
            return found
        model.predict = predict
        states = list(model.generate(x, free, **options))
        del model.predict
        path = list(study.knowing(model, states[-1]).generate(x, free, x_t=states[0], **options))
        pictures = self.patches.decode(states[-1]["image"])
        features, seen = self.judge(pictures)
        minds = sum((a != b).float().mean() for a, b in itertools.pairwise(guesses))
        return (*study.right(train.captions(pictures, seen), texts),
                study.world.frechet(features, self.real), minds,
                *(study.departures(s, {"image": free["image"]}) for s in (states, path)))

    def chooses(self):
        """Guidance and temperature, on captions of which no drawing is reported."""
        cells = {(g, T): self.draws(self.truth[500:800], steps=8, guidance=g, temperature=T)
                 for g in (1.5, 2., 3.) for T in (0.5, 0.7)}
        for (g, T), values in cells.items():
            self.add("choice", "digit caption frechet", values, 8, g, T)
        return choose(cells)


def measure(name, seed, given, table, chosen):
    """All rows of a model that has been trained, with the options chosen on the first seed."""
    if not (folder_of(name, seed) / "model.ckpt").exists():
        return
    found = Measured(name, seed, given, table)
    if found.missing("bits"):
        found.bits()
    for (way, t), kind in itertools.product(WAYS, ("image", "image, near")):
        if found.missing(f"repair {kind} {way} {t}", 4):
            found.repairs(kind, way, t)
    if found.missing("reading", 1):
        found.reads()
    if name not in chosen:
        chosen[name] = found.chooses()
    options = [(n, *chosen[name]) for n in (2, 4, 8, 32)]
    for n, g, T in options + [(n, 1., 1.) for n in (2, 8, 32) if not seed]:
        if found.missing("drawing", n, g, T):
            found.add("drawing", "digit caption frechet minds left left_oracle", found.draws(
                found.truth[:500], steps=n, guidance=g, temperature=T), n, g, T)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("names", nargs="*", metavar="NAME", default=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-dir")
    given = parser.parse_args()
    if given.what == "measure":
        table = study.Table("paths", "name seed what steps guidance temperature".split(),
                            VALUES.split())
        rows, chosen = list(csv.DictReader(table.file.open(encoding="utf-8"))), {}
        for name in {row["name"] for row in rows if row["what"] == "choice"}:
            chosen[name] = choose({
                (float(row["guidance"]), float(row["temperature"])):
                [float(row[c]) for c in ("digit", "caption", "frechet")]
                for row in rows if (row["name"], row["what"]) == (name, "choice")})
    for seed, name in itertools.product(given.seeds, given.names):
        if given.what == "train":
            learn(name, seed, given)
        else:
            measure(name, seed, given, table, chosen)


if __name__ == "__main__":
    main()
