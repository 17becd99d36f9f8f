"""Scenes check themselves: what is drawn is seen, and a single mistake is found."""
import csv
import random
import shlex

import pytest
import torch

import sample
import scenes
import train
from scenes import ABILITIES, COLOURS, SHAPES, Thing, described, invent, is_true, render, see

CIRCLE, SQUARE = Thing("circle", "red", 8, 0, 8), Thing("square", "blue", 16, 24, 8)
RUNGS = ["--patch 8", "--patch 4", "--patch 4 --anywhere"]


def many(anywhere, n=300):
    rng = random.Random(0)
    return [invent(rng, ABILITIES[i % 6], anywhere) for i in range(n)]


@pytest.mark.parametrize("rung", RUNGS)
def test_decoded_scenes_are_seen_as_they_are_and_their_captions_are_true(rung):
    """The checker is right about every scene, also after the tokeniser, which has all patches."""
    run = train.parse(["--preset", "scenes", *rung.split(), "--train-images", "2000",
                       "--test-images", "20", "--width", "16", "--depth", "1", "--heads", "1"])
    torch.manual_seed(0)
    patches = scenes.Scenes(run).build(run).tokens["image"]
    some = many(run.anywhere)
    pictures = torch.stack([render(things) for things, _ in some])
    decoded = patches.decode(patches.encode(pictures))
    assert torch.equal(decoded, pictures)
    for (things, caption), seen in zip(some, see(decoded)):
        assert {*seen} == {*things} and is_true(caption, seen)
    assert len({len(things) for things, _ in some}) == 4


def test_no_mistake_passes():
    """A thing that is missing, one too many, of another shape, colour or place; a pixel."""
    for things, caption in many(False, 36) + many(True, 36):
        n, ability = len(things), caption.split()
        assert not is_true(caption, things[1:])
        free = next(Thing(shape, "white", row, column, 8) for row in range(0, 25, 8)
                    for column in range(0, 25, 8) for shape in ("star", "circle")
                    if all(max(abs(row + 4 - a.row - a.side / 2), abs(column + 4 - a.column
                               - a.side / 2)) >= 4 + a.side / 2 for a in things))
        assert not is_true(caption, [*things, free])
        other = next(shape for shape in SHAPES if shape not in ability
                     and shape + "s" not in ability)
        assert not is_true(caption, [things[0]._replace(shape=other), *things[1:]])
        if things[0].colour in ability:
            other = next(colour for colour in COLOURS if colour not in ability)
            assert not is_true(caption, [things[0]._replace(colour=other), *things[1:]])
        if {"of", "above", "below"} & {*ability}:
            (a, b), end = things, scenes.FIELD
            turned = [thing._replace(row=end - thing.row - thing.side,
                                     column=end - thing.column - thing.side) for thing in (a, b)]
            assert not is_true(caption, turned)
        assert not is_true(caption, None) and n == len(see(render(things)[None])[0])
        smeared = render(things)
        _, _, row, column, side = things[0]
        smeared[:, row + side // 2 - 1, column + side // 2 - 1] = 0.5
        assert see(smeared[None]) == [None]
        speck = render(things)
        speck[:, 31, 31] = 1.
        assert see(speck[None]) == [None]


def test_swapped_colours_and_sides_are_false():
    """What a model gets wrong that knows the words, but not which belongs to which."""
    two = [CIRCLE, SQUARE]
    assert is_true("a red circle and a blue square", two)
    assert is_true("a blue square and a red circle", two)
    assert not is_true("a blue circle and a red square", two)
    assert is_true("a circle left of a square", two) and is_true("a square right of a circle", two)
    assert not is_true("a circle right of a square", two)
    assert not is_true("a circle above a square", two)          # by less than it is left of it
    diagonal = [CIRCLE, SQUARE._replace(row=16, column=8)]
    assert "position" not in described(diagonal)
    assert not is_true("a circle", two) and not is_true("two circles", two)
    assert is_true("two circles", [CIRCLE, CIRCLE._replace(row=24, colour="blue")])


def test_what_may_be_asked_and_what_is_answered():
    known = scenes.questions_of([CIRCLE, SQUARE])
    assert known["colour"] == ["what colour is the circle? red", "what colour is the square? blue"]
    assert "how many circles? one" in known["count"] and "how many stars? none" in known["count"]
    assert "what is left of the square? circle" in known["position"]
    assert "what is right of the square? nothing" in known["position"]
    assert "is there a red circle? yes" in known["presence"]
    assert "is there a blue circle? no" in known["presence"]
    twins = scenes.questions_of([CIRCLE, CIRCLE._replace(row=24)])
    assert not twins["colour"] and not twins["position"]
    assert "how many circles? two" in twins["count"]


def test_what_is_unseen_is_nowhere_in_training():
    run = train.parse("--preset scenes --train-images 3000 --test-images 100".split())
    data = scenes.Scenes(run)
    for _, texts in (data.train, data.held_out, data.test):
        assert not any(scenes.UNSEEN.search(text) for text in texts if "?" not in text)
    unseen = data.prompts(random.Random(0), 20, unseen=True)
    assert list(unseen) == ABILITIES[1:]
    assert all(scenes.UNSEEN.search(text) for texts in unseen.values() for text in texts)
    answers = [text.split()[-1] for text in data.train[1] if text.startswith("is there")]
    yes = answers.count("yes") / len(answers)
    assert abs(yes - 0.5) < 4 * 0.5 / len(answers) ** 0.5       # as likely as no


def test_scenes_are_learned_drawn_read_asked_and_changed(tmp_path, monkeypatch, capsys):
    """All the commands, after a few seconds of training on scenes with one of four things."""
    monkeypatch.chdir(tmp_path)
    for name, few in (("ABILITIES", ["single", "colours"]), ("HARD", []),
                      ("SHAPES", ["square", "star"]),
                      ("COLOURS", {k: COLOURS[k] for k in ("red", "green")})):
        monkeypatch.setattr(scenes, name, few)
    monkeypatch.setitem(train.DATA, "scenes", scenes.Scenes)
    assert train.main(["--preset", "scenes", *"""--steps 120 --val-every 60 --train-images 2000
        --width 32 --heads 2 --depth 1 --test-images 20 --drawings 20 --threads 1""".split()]) == 0
    report = csv.DictReader(open("runs/scenes/report.csv", encoding="utf-8"))
    rows = {row["what"]: row for row in report}
    assert float(rows["drawing, single"]["seen"]) > 0.3         # nothing else is in 16 patches
    for command, says in (
            ("'a red square' --n 4 --seed 1", "samples.png: 4 drawn"),
            ("--image runs/scenes/picture.png --seed 1", "trained on invented scenes"),
            ("--image runs/scenes/picture.png --ask 'is there a green star' --seed 1", ""),
            ("--image runs/scenes/picture.png --keep 'not 0:0-1:1' 'a red star' --seed 1", "sam"),
            ("--image runs/scenes/picture.png --from 0.5 'a green star' --seed 1", "samples.png")):
        assert sample.main(shlex.split(command)) == 0
        assert says in capsys.readouterr().out
