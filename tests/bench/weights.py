"""A copy of a language model in which some weights are random, to be a --backbone of its own:

    python tests/bench/weights.py all    FOLDER NEW     the whole model
    python tests/bench/weights.py layers FOLDER NEW     all but its words
    python tests/bench/weights.py lower  FOLDER NEW     the lower half of its layers

The random ones are those of a model before its training, from seed 0.
"""
import re
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(what, folder, new):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    fresh = AutoModelForCausalLM.from_config(model.config)
    half = model.config.num_hidden_layers / 2
    for (name, p), q in zip(model.named_parameters(), fresh.parameters()):
        layer = re.search(r"layers\.(\d+)", name)
        if what == "all" or layer and (what == "layers" or int(layer[1]) < half):
            p.data.copy_(q)
    model.save_pretrained(new)
    AutoTokenizer.from_pretrained(folder).save_pretrained(new)


if __name__ == "__main__":
    main(*sys.argv[1:])
