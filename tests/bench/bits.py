"""Bits per character of a text: three paths beside an autoregressive twin, the same trunk with a
causal mask, trained on the same windows in the same order for as many steps. Appends to bits.csv,
skips the rows that are there.

    python tests/bench/bits.py --text FILE [--seeds 2] [--steps 1600]

The paths have the bound of bound.py on held-out windows, once along the velocity that
reverses a noise which does not know x₁ and once along the kinetic-optimal one; the twin has its
exact likelihood. The best time to stop is taken on the same windows, one number of 32.
"""
import argparse
import itertools
import math

import lightning as L
import study                    # first: it puts the project on the path
import bound
import torch
import torch.nn.functional as F

import fudoki

NAMES = "uniform", "marginal", "mask", "twin"


class Twin(fudoki.Fudoki):
    """Predicts token i from those before it; the first from nothing, which is token 0."""

    def nats(self, x):
        """−log p(xⁱ | x^{<i}): (B, N) long -> (B, N)"""
        net, n = self.net, x.shape[1]
        h = net.input["text"](F.pad(x, (1, -1)))
        rotation = fudoki.rotary(net.input["text"].coordinates(n), net.trunk.head_width)
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        for block in net.trunk.blocks:
            h = block(h, rotation, causal)
        return F.cross_entropy(net.head["text"](net.trunk.norm(h)).mT, x, reduction="none")

    def training_step(self, x_1, index):
        return self.nats(x_1["text"]).mean()

    def validation_step(self, x_1, index):
        pass


@torch.no_grad()
def measure(model, x):
    """Nats per token, and the same along the kinetic-optimal velocity."""
    if isinstance(model, Twin):
        return model.nats(x).mean().item(), math.nan
    free = model.mark_free({"text": x}, "text")
    return [bound.of_rows(model, {"text": x}, free, 32, velocity).mean(1).min().item() / x.shape[1]
            for velocity in (bound.time_reversal, fudoki.kinetic_optimal)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1600)
    given = parser.parse_args()
    table = study.Table("bits", "model steps seed".split(), "bits bits_ko samples_per_s".split())
    for seed, name in itertools.product(range(given.seeds), NAMES):
        if (name, given.steps, seed) in table:
            continue
        run, data = study.prepared([
            "--preset", "text", "--text", given.text, "--path", name.replace("twin", "uniform"),
            "--seed", str(seed), "--steps", str(given.steps), "--val-every", str(given.steps)])
        L.seed_everything(seed, verbose=False)
        model = data.build(run)
        if name == "twin":
            model.__class__, data.sample = Twin, lambda model, path: None
        rate = study.trained(run, data, model)
        L.seed_everything(seed, verbose=False)
        nats = measure(model, data.tokens(model)[1]["text"][:200])
        table.add(name, given.steps, seed, *(f"{n / math.log(2):.4f}" for n in nats),
                  f"{rate:.0f}")


if __name__ == "__main__":
    main()
