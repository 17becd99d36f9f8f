"""What a flow writes, as a language model likes it, beside held-out text; and which wrong words it
sees, at t = .9, in held-out text of which one is replaced, by any word or a likelier one:

    python tests/bench/written.py NAME=CHECKPOINT … --lm FOLDER [--step race renoise]
        [--steps 64 256] [--late 1 2] [--temperature .5 .7] [--windows 4] [--seeds 3]
        [--prefix story_]

To written.csv goes a row for each window: nats of a token, and, since a low value alone may be a
text that repeats itself, the share of different tokens. Rows that are there, and in seen.csv, are
skipped. Checkpoints are those of `train.py --preset ar --backbone FOLDER --text FILE`, with one
FILE for all. Another language model has files of its own, with a --prefix, and there is also what
the causal model itself writes, token by token, at these temperatures, and the bits of a token at
most, on the uniform path.
"""
import argparse
import itertools

import lightning as L
import study                    # first: it puts the project on the path
import torch
from backbone import bits, reversal
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import fudoki
import sample
import train


@torch.no_grad()
def nats(judge, bos, x):
    """What a token costs a causal model, of each window: (B, N) -> (B,)"""
    l = judge(F.pad(x, (1, 0), value=bos)).logits[:, :-1]
    return F.cross_entropy(l.mT, x, reduction="none").mean(1)


def add(table, judge, model, x, *key):
    """Rows of windows (B, N)."""
    costs = nats(judge, model.net.trunk.bos, x)
    for i, (row, cost, text) in enumerate(zip(x, costs, model.tokens["text"].decode(x))):
        table.add(*key, i, f"{cost:.3f}", f"{len(row.unique()) / len(row):.3f}", text)


@torch.no_grad()
def causal(judge, bos, n, length, temperature):
    """What the judge itself writes: (n, length)"""
    x = torch.full((n, 1), bos)
    for _ in range(length):
        x = torch.cat([x, fudoki.sample_x_1(judge(x).logits[:, -1:], temperature)], 1)
    return x[:, 1:]


@torch.no_grad()
def seen(model, held, rounds=5):
    """Which words are not the likeliest where they stand, by what they are: {kind: (n,)}"""
    (B, N), V = held.shape, len(model.tokens["text"].embedding)
    row, found = torch.arange(B), {}
    for _ in range(rounds):
        i = torch.randint(1, N, (B,))
        true = held[row, i]
        for kind, word in {"any word": torch.randint(V, (B,)),
                           "a word of the text": held.flatten()[torch.randint(B * N, (B,))],
                           "the word before it": held[row, i - 1], "the right word": true}.items():
            x = {"text": held.index_put((row, i), word)}
            l = model.net(x, model.mark_free(x, "text"), 0.9)["text"][row, i]
            meant = (word != true) | (kind == "the right word")
            found.setdefault(kind, []).append((l.argmax(-1) != word)[meant])
    return {kind: torch.cat(some).float() for kind, some in found.items()}


if __name__ == "__main__":
    parser = study.parser(__doc__)
    parser.add_argument("--lm", required=True)
    for name, kind, value in (("step", str, "race"), ("steps", int, 64), ("late", float, 1.),
                              ("temperature", float, 0.7)):
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=[value])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--prefix", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keys = "name step steps late temperature seed window".split()
    table = study.Table(given.prefix + "written", keys, ["nats", "different", "text"])
    sight = study.Table(given.prefix + "seen", ["name", "wrong"], ["words", "seen"])
    price = study.Table(given.prefix + "bits", ["name", "part"], ["bits", "bits_reversal"]) \
        if given.prefix else None
    judge = AutoModelForCausalLM.from_pretrained(given.lm)
    files = dict(argument.split("=", 1) for argument in given.checkpoints)
    for name, model in study.models(given):
        run = argparse.Namespace(**train.settings(files[name])[0])
        held = train.Corpus(run).tokens(model)[1]["text"][:run.test_images]
        if (name, "any word") not in sight:
            L.seed_everything(0, verbose=False)
            for kind, found in seen(model, held).items():
                sight.add(name, kind, len(found), f"{found.mean():.3f}")
        for part in range(6) if price else ():          # so that the error can be seen
            if (name, part) not in price:
                L.seed_everything(part, verbose=False)
                price.add(name, part, *(f"{bits(model, held[16 * part:][:16], velocity):.3f}"
                                        for velocity in (fudoki.kinetic_optimal, reversal)))
        if ("held-out", "", "", "", "", "", 0) not in table:
            add(table, judge, model, held, "held-out", "", "", "", "", "")
        for seed, T in itertools.product(range(given.seeds), given.temperature):
            if given.prefix and ("causal", "", "", "", T, seed, 0) not in table:
                L.seed_everything(seed, verbose=False)
                x = causal(judge, model.net.trunk.bos, given.windows, held.shape[1], T)
                add(table, judge, model, x, "causal", "", "", "", T, seed)
        for seed, *how in itertools.product(range(given.seeds), given.step, given.steps,
                                            given.late, given.temperature):
            if (name, *how, seed, 0) not in table:
                L.seed_everything(seed, verbose=False)
                options = dict(zip(("step", "steps", "late", "temperature"), how))
                blank = torch.full((given.windows, model.tokens["text"].length), -1)
                x = sample.fill(model, options, text=blank)["text"]
                add(table, judge, model, x, name, *how, seed)
