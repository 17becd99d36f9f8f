"""Invented scenes of coloured shapes (`--preset scenes`), their captions and questions, and a
checker that is exact. It is also the example of data of one's own: `Scenes` at the end is all
that train.py and sample.py of fudoki ask for.
"""
import collections
import functools
import itertools
import math
import random
import re
import typing

import numpy as np
import torch
import torch.nn.functional as F

from fudoki import Text
from sample import defaults, draw, read
from train import Pictures, tokenizer

SHAPES = "circle square triangle diamond star".split()
COLOURS = dict(red=(1, .1, .1), green=(.1, .8, .1), blue=(.2, .3, 1), yellow=(1, .9, .1),
               purple=(.7, .2, .9), white=(1, 1, 1))
NUMBERS = "none one two three four".split()
SIDES = "left of", "right of", "above", "below"
ABILITIES = "single two counting colours position attribution".split()      # those of GenEval
HARD = ["position"] * 4 + ["counting", "attribution"]       # more scenes, and questions, are these
UNSEEN = re.compile("red circle|green square|blue triangle|yellow diamond|purple star|two stars|"
                    "three triangles|four circles|circle .*star|star .*circle|square .*diamond|"
                    "diamond .*square")         # of captions that are kept from training
FIELD, RASTER = 32, 4               # side of a scene and distance of possible places, in pixels


class Thing(typing.NamedTuple):
    """An object of a scene: row and column of its corner, and its side, in pixels."""
    shape: str
    colour: str
    row: int
    column: int
    side: int

    def is_beside(self, other):
        """On which side of the other it is, if that is true of one more than of all others."""
        dy, dx = (a + self.side / 2 - b - other.side / 2 for a, b in zip(self[2:4], other[2:4]))
        if abs(dx) != abs(dy):
            return SIDES[(dx > 0) if abs(dx) > abs(dy) else 2 + (dy > 0)]


@functools.cache
def stencil(shape, side):
    """What a shape covers of its square: (side, side) bool. The last row and column stay free, so
    that neighbours do not touch."""
    r = side / 2 - 1
    y, x = np.mgrid[:side, :side] - r
    inside = {"circle": x ** 2 + y ** 2 <= (r + 0.3) ** 2, "diamond": abs(x) + abs(y) <= r,
              "square": x == x, "triangle": 2 * abs(x) <= y + r,
              "star": x * y * (abs(x) - abs(y)) == 0}[shape]
    return inside & (np.maximum(abs(x), abs(y)) <= r)


def render(things, size=FIELD):
    """A picture (3, size, size) in [0, 1] of things, on black."""
    picture = np.zeros((size, size, 3), np.float32)
    for shape, colour, y, x, side in things:
        picture[y:y + side, x:x + side][stencil(shape, side)] = COLOURS[colour]
    return torch.from_numpy(picture).permute(2, 0, 1)


def see(pictures):
    """The things that pictures (B, 3, FIELD, FIELD) show, each drawn exactly; None for one which
    they do not make up altogether: -> list of B lists"""
    found, edge = [[] for _ in pictures], (1, 0, 1, 0)      # free, too: a thing is no part of one
    for side in (8, 12):
        ideal = [Thing(shape, colour, 0, 0, side) for shape in SHAPES for colour in COLOURS]
        bank = torch.stack([F.pad(render([thing], side), edge).flatten() for thing in ideal])
        windows = F.unfold(F.pad(pictures, edge), side + 1, stride=RASTER).mT   # (B, n², …)
        n = (FIELD - side) // RASTER + 1
        for b, place, kind in (torch.cdist(windows, bank) < 0.1).nonzero().tolist():
            row, column = (RASTER * i for i in divmod(place, n))
            found[b].append(ideal[kind]._replace(row=row, column=column))
    return [things if (render(things) - picture).abs().max() < 0.02 else None
            for things, picture in zip(found, pictures)]


def described(things):
    """The captions that are true of things, exactly what they say and nothing else, by ability:
    {ability: list of strings}"""
    names = [f"a {thing.shape}" for thing in things]
    full = [f"a {thing.colour} {thing.shape}" for thing in things]
    if len(things) == 1:
        return {"single": names, "colours": full}
    if len({*names}) == 1:
        n = NUMBERS[len(things)] if len(things) < len(NUMBERS) else "many"
        return {"counting": [f"{n} {things[0].shape}s"]}
    if len(things) != 2:
        return {}
    said = {"two": [" and ".join(pair) for pair in itertools.permutations(names)],
            "attribution": [" and ".join(pair) for pair in itertools.permutations(full)]}
    (a, b), (name, other) = things, names
    if a.is_beside(b):
        said["position"] = [f"{name} {a.is_beside(b)} {other}", f"{other} {b.is_beside(a)} {name}"]
    return said


def is_true(caption, things):
    """GenEval's rule: what is said is there, and nothing else."""
    return things is not None and any(caption in some for some in described(things).values())


def questions_of(things):
    """Questions about things with their answers: {kind: list of strings}"""
    count = collections.Counter(thing.shape for thing in things)
    alone, there = [a for a in things if count[a.shape] == 1], {thing[:2] for thing in things}
    beside = {(a.is_beside(b), b.shape): a.shape for a, b in itertools.permutations(alone, 2)}
    return {
        "colour": [f"what colour is the {a.shape}? {a.colour}" for a in alone],
        "count": [f"how many {shape}s? {NUMBERS[count[shape]]}" for shape in SHAPES],
        "position": [f"what is {side} the {a.shape}? {beside.get((side, a.shape), 'nothing')}"
                     for a in alone for side in SIDES],
        "presence": [f"is there a {colour} {shape}? {'yes' if (shape, colour) in there else 'no'}"
                     for shape in SHAPES for colour in COLOURS]}


def invent(rng, ability, anywhere):
    """Things of one of the abilities, and a caption: on cells of 8 pixels, or, of two sizes,
    `anywhere` on the raster."""
    n = {"single": 1, "colours": 1, "counting": rng.randint(2, 4)}.get(ability, 2)
    shapes = [rng.choice(SHAPES)] * n if ability == "counting" else rng.sample(SHAPES, n)
    while True:
        things = []
        for shape in shapes:
            side, grid = (rng.choice((8, 12)), RASTER) if anywhere else (8, 8)
            row, column = (grid * rng.randint(0, (FIELD - side) // grid) for _ in range(2))
            things.append(Thing(shape, rng.choice(list(COLOURS)), row, column, side))
        apart = all(2 * max(abs(a[i] + a.side / 2 - b[i] - b.side / 2) for i in (2, 3))
                    >= a.side + b.side for a, b in itertools.combinations(things, 2))
        if apart and (captions := described(things).get(ability)):
            return things, rng.choice(captions)


class Scenes(Pictures):
    """Invented scenes, with captions that show six abilities, and questions. Drawn with 32 steps,
    most of them late, and without guidance."""
    preset = dict(patch=8, share=0.7, steps=20_000, clean=0.)
    own = Pictures.own | dict(
        train_images=(60_000, (20,), "scenes to learn"),
        ask=(0.3, (0, 0.99), "share of scenes with a question instead of a caption"),
        anywhere=(False, None, "things of two sizes anywhere, not of one size on cells of 8"))
    anew = dict(test_images=(1000, (20,), "scenes read in the report"),
                drawings=(1000, (6,), "scenes drawn in the report"))
    origin = "invented scenes"

    def __init__(self, run):
        rng, self.anywhere = random.Random(run.seed), run.anywhere
        self.train = self.scenes(rng, run.train_images, run.ask)
        self.held_out = self.scenes(rng, 1000, run.ask)
        self.test = self.scenes(rng, run.test_images, 0)

        texts = sorted({text for _, some in (self.train, self.held_out, self.test)
                        for text in some})
        json = tokenizer(texts, eos=["<end>"])
        words = Text(json, math.inf)
        longest = max(len(words.ids(text)) for text in texts)
        self.text = [json, longest + 1, len(words.embedding) - 1]
        asked = [self.prompts(rng, 7), self.prompts(rng, 50, unseen=True)]
        asked = [text for prompts in asked for some in prompts.values() for text in some]
        self.examples = list(dict.fromkeys(asked + texts))      # a backbone wants to know them all
        self.notes = dict(form="square", asks=run.ask > 0, read=dict(steps=8, temperature=0.),
                          draw=dict(steps=32, late=2., guidance=1., temperature=1.))

    prompt = "a purple diamond and a white circle"

    def scenes(self, rng, n, ask):
        """n pictures with a caption that may be seen, or, in the share `ask`, a question."""
        pictures, texts = [], []
        while len(texts) < n:
            things, text = invent(rng, rng.choice(ABILITIES + HARD), self.anywhere)
            if not UNSEEN.search(text):
                pictures.append(render(things))
                texts.append(self.question(rng, things) if rng.random() < ask else text)
        return torch.stack(pictures), texts

    def question(self, rng, things, kind=None):
        """A question about things, of any kind, each answer as likely as the others."""
        known, by_answer = questions_of(things), collections.defaultdict(list)
        kinds = [kind for kind in [*known, *HARD] if known.get(kind)]
        for text in known[kind or rng.choice(kinds)]:
            by_answer[text.split()[-1]].append(text)
        return rng.choice(rng.choice([*by_answer.values()]))

    def prompts(self, rng, n, unseen=False):
        """n captions of every ability that has such: {ability: list of strings}"""
        found = {ability: [] for ability in ABILITIES[unseen:]}     # all single shapes are seen
        for ability, texts in found.items():
            while len(texts) < n:
                text = invent(rng, ability, self.anywhere)[1]
                if bool(UNSEEN.search(text)) == unseen:
                    texts.append(text)
        return found

    def codebook(self, patches, n):
        """All patches there are: decoded scenes are exact."""
        return patches.unique(dim=0)

    def report(self, model, run, options):
        """How many drawings show exactly what is said, by ability, of captions as in training and
        of unseen ones, and if the best of eight is kept; how many captions that are read, and how
        many answers, are true."""
        rng, n = random.Random(run.seed + 1), math.ceil(run.drawings / len(ABILITIES))
        options, rows = defaults(model, "draw") | options, {}
        for column, unseen, best_of in (("seen", False, 1), ("unseen", True, 1),
                                        ("best of 8", False, 8)):
            texts = self.prompts(rng, n, unseen)
            drawn = see(draw(model, sum(texts.values(), []), best_of, **options).cpu())
            shares = {ability: sum(map(is_true, some, drawn[n * i:])) / n
                      for i, (ability, some) in enumerate(texts.items())}
            shares["mean"] = sum(shares.values()) / len(shares)
            for ability, share in shares.items():
                rows.setdefault(ability, {})[column] = share
        for ability in (*ABILITIES, "mean"):
            yield f"drawing, {ability}", rows[ability]

        tokens = self.rows(model, *self.test)[0]
        things, image = see(self.test[0]), tokens["image"].to(model.device)
        true = sum(map(is_true, read(model, image), things)) / len(things)
        yield "reading, captions that are true", dict(seen=true)
        for kind in questions_of([]):
            some = [i for i, those in enumerate(things) if questions_of(those)[kind]]
            texts = [self.question(rng, things[i], kind) for i in some]
            asked = [text.rpartition(" ")[0] + " ___" for text in texts]
            found = read(model, image[some], asked)
            share = sum(a == b for a, b in zip(found, texts)) / max(1, len(texts))
            yield f"answers, {kind}", dict(seen=share)
