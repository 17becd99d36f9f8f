"""Records generations for the page to play with, figures/play.html (seed 0, seconds):

    python tests/bench/play.py "a bold upright three" metric=FILE uniform=FILE mask=FILE [-- …]

A caption, and a checkpoint for each path; after `--` another caption and its checkpoints. Of every
state the page has the tokens, and of every prediction the three likeliest tokens of each place.
What the page has of other captions stays, and of this one, other paths with the same codebook.
"""
import base64
import itertools
import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "figures/play.html"
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402
from fudoki import PATHS  # noqa: E402

SLOT = re.compile(r'(<script id="recorded" type="application/json">\n)(.*?)(\n</script>)', re.S)


def recorded(model, caption, steps=8):
    """One generation, as the page wants it: states (steps + 1, N), and for each of the `steps`
    predictions the likeliest tokens and their percentages, [[token, percent] × 3] × N."""
    torch.manual_seed(0)
    x, free = model.to_fill(1, text=model.tokens["text"].encode([caption]))
    predict, seen = model.predict, []

    def listened(*arguments):
        logits = predict(*arguments)
        top = logits["image"][0].float().softmax(-1).topk(3)
        seen.append([[[i, round(100 * p)] for i, p in zip(*place)] for place in zip(
            top.indices.tolist(), top.values.tolist())])
        return logits

    model.predict = listened
    options = sample.defaults(model, "draw") | dict(steps=steps)
    states = [state["image"][0].tolist() for state in model.generate(x, free, **options)]
    times = model.times(0., steps, options.get("late", 1.))
    return dict(states=states, predictions=seen, times=[round(t, 3) for t in times])


def codes(model):
    """The codebook as bytes, row after row of each patch, red, green and blue of each pixel; noise
    has [MASK] as one token more, which is grey."""
    kind = model.tokens["image"]
    patches = kind.embedding.view(len(kind.embedding), kind.channels, -1).mT
    patches = torch.cat([patches, torch.full_like(patches[:1], 0.5)])
    levels = (255 * patches.clamp(0, 1)).round().byte()
    return base64.b64encode(levels.contiguous().numpy()).decode()


def main(arguments):
    page = PAGE.read_text(encoding="utf-8")
    shows = {show["caption"]: show for show in json.loads(SLOT.search(page)[2])}
    for named, words in itertools.groupby(arguments, lambda word: word != "--"):
        if named:
            caption, *files = words
            models = {name: sample.open_model(file)[0]
                      for name, _, file in (word.partition("=") for word in files)}
            first, (patches,) = next(iter(models.values())), {codes(m) for m in models.values()}
            kind = first.tokens["image"]
            old = shows.get(caption, {})
            paths = old["paths"] if old.get("codes") == patches else {}
            paths |= {name: recorded(model, caption) for name, model in models.items()}
            shows[caption] = dict(
                caption=caption, preset=first.hparams.notes["preset"], codes=patches,
                patch=kind.patch, channels=kind.channels, side=kind.size // kind.patch,
                paths={name: paths[name] for name in PATHS if name in paths})
    text = json.dumps([*shows.values()], separators=(",", ":"))
    PAGE.write_text(SLOT.sub(lambda found: found[1] + text + found[3], page), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
