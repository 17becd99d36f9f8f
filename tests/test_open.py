"""What coursework opens, done from outside of fudoki.py: each is one place, or two."""
import math
import os
import random
from pathlib import Path

import pytest
import torch
from test_model import batch, small
from torch import nn
from torch.testing import assert_close

import fudoki
import sample
import train
from fudoki import LOSSES, PATHS, STEPS, TRUNKS, VELOCITIES


def saved(model, path):
    """The model after a checkpoint."""
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams),
                "pytorch-lightning_version": "2.6.6"}, path)
    return sample.open_model(path)[0].cpu()


def test_a_checkpoint_opens_as_it_was_or_is_refused_in_one_line(tmp_path):
    """Whatever happened to it: bytes that changed, hyperparameters and weights that cannot be."""
    path, rng, model = tmp_path / "model.ckpt", random.Random(0), small()
    saved(model, path)
    whole, same = path.read_bytes(), 0
    for _ in range(60):
        bytes_ = bytearray(whole)
        bytes_[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes_)
        try:
            again = sample.open_model(path)[0].state_dict()
        except sample.InputError as error:
            assert "\n" not in str(error) and "model.ckpt is" in str(error)
        else:
            same += 1                                       # of a part that says nothing
            assert all(torch.equal(v.cpu(), again[k].cpu())
                       for k, v in model.state_dict().items())
    assert same < 30
    torch.save(torch.zeros(3), path)
    with pytest.raises(sample.InputError, match="is damaged"):
        sample.open_model(path)
    for name, options in (("trunk_options", dict(width=32, depth=1, heads=-1)), ("path", "x y"),
                          ("trunk_options", dict(width=32, depth=1, heads=math.nan)),
                          ("tokens", dict(model.hparams.tokens) | {"text": ["{}", 4]}),
                          ("tokens", dict(model.hparams.tokens) | {"image": [[], 0, 0]})):
        torch.save({"state_dict": model.state_dict(),
                    "hyper_parameters": dict(model.hparams) | {name: options}}, path)
        with pytest.raises(sample.InputError, match="is no checkpoint"):
            sample.open_model(path)


def test_the_newest_checkpoint_is_opened_and_its_own_options_are_the_defaults(tmp_path,
                                                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    for day, (folder, notes) in enumerate({"b": None, "c": dict(draw=dict(steps=3)),
                                           "a": dict(read=dict(steps=2))}.items()):
        path = tmp_path / "runs" / folder / "model.ckpt"
        path.parent.mkdir(parents=True)
        saved(small(notes=notes), path)
        os.utime(path, (day, day))
    model, path = sample.open_model()
    assert path.parent.name == "a" and sample.defaults(model, "read")["steps"] == 2
    assert sample.defaults(model, "draw") == sample.DRAW
    model, _ = sample.open_model("runs/c/model.ckpt")
    assert sample.defaults(model, "draw") == sample.DRAW | dict(steps=3)


def test_options_that_are_given_come_before_those_of_the_model(monkeypatch):
    asked = []
    model = small(notes=dict(draw=dict(steps=3), read=dict(steps=2)))
    monkeypatch.setattr(sample, "fill", lambda model, options, **_: asked.append(options) or {
        "image": torch.zeros(1, 9, dtype=torch.long), "text": torch.zeros(1, 3, dtype=torch.long)})
    sample.draw(model, ["red round one"], steps=7)
    sample.read(model, torch.zeros(1, 9, dtype=torch.long), steps=5)
    sample.draw(model, ["red round one"])
    assert [options["steps"] for options in asked] == [7, 5, 3]
    given = sample.parse(["--temperature", "0", "--guidance", "0"])
    assert sample.generation(given) == dict(temperature=0., guidance=0.)


def test_a_file_that_does_not_mention_fudoki_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other.py").write_text("raise SystemExit('it was run')\nclass Path:\n    pass\n", "utf-8")
    with pytest.raises(LookupError, match="a file here that mentions fudoki"):
        PATHS["other:Path"]


class Blend(fudoki.Path):
    """A mixture that goes as fast as its option says, and computes a number from its codebook."""

    def __init__(self, embedding, frequency=None, haste=2., eager=False, steps=0):
        super().__init__(embedding)
        self.size, self.haste = self.embedding.norm().item(), haste

    def logits(self, x_1, t):
        kept = 1 - (1 - t) ** self.haste
        return torch.log(kept * self.one_hot(x_1) + (1 - kept) / len(self.embedding))


def test_a_clock_of_ones_own_is_a_function_in_a_file_and_a_checkpoint_remembers_it(tmp_path,
                                                                                    monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("import fudoki\ndef clock(path):\n    return lambda t: t ** 3",
                               "utf-8")
    run = train.parse(["--clock", "mine:clock"])
    model = saved(small("uniform", clock=run.clock), tmp_path / "model.ckpt")
    t = torch.tensor([[0.5]])
    for path in model.paths.values():
        x_1 = torch.tensor([2])
        torch.testing.assert_close(path(x_1, t), path.logits(x_1, t ** 3))
        assert path.on("calibrated").on("mine:clock").clock(t) == t ** 3    # there and back


def test_a_path_with_options_of_its_own_and_a_number_from_its_codebook(monkeypatch, tmp_path):
    """Of any sign and type, and with the name of a setting."""
    monkeypatch.setitem(PATHS, "blend", Blend)
    run = train.parse("--path blend --path-options haste=3 eager=True steps=-2 --steps 7".split())
    assert run.path_options == {"haste": 3, "eager": True, "steps": -2} and run.steps == 7
    model = small("blend", path_options=run.path_options)
    again = saved(model, tmp_path / "model.ckpt")
    for m in ("text", "image"):
        assert again.paths[m].haste == 3 and again.paths[m].size == model.paths[m].size
    *_, end = again.generate(*again.to_fill(2), steps=3)
    assert end["image"].shape == (2, 9)


OWN = """
import torch
import fudoki

class Slow(fudoki.Path):
    def __init__(self, embedding, frequency=None, power=2.):
        super().__init__(embedding)
        self.power = power

    def logits(self, x_1, t):
        return torch.log(t ** self.power * self.one_hot(x_1) + (1 - t ** self.power))

def twice(path, x_t, x_1, t):
    return 2 * fudoki.kinetic_optimal(path, x_t, x_1, t)

def jump(path, x_t, x_1, t, s):
    return x_1
"""


def test_a_path_and_steps_from_a_file_of_ones_own(monkeypatch, tmp_path, capsys):
    for entries, name in ((PATHS, "own:Slow"), (VELOCITIES, "own:twice"), (STEPS, "own:jump")):
        monkeypatch.setitem(entries, name, None)        # so that it is gone when this is over
        del entries[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    (tmp_path / "other.py").write_text("raise SystemExit", "utf-8")         # not about this
    run = train.parse(["--path", "own:Slow", "--path-options", "power=3."])
    assert run.path == "own:Slow" and run.path_options == {"power": 3.}
    model = small("own:Slow", path_options=run.path_options)
    again = saved(model, tmp_path / "model.ckpt")
    assert again.paths["image"].power == 3.
    given = sample.parse(["seven", "--step", "own:jump", "--velocity", "own:twice"])
    assert (given.step, given.velocity) == ("own:jump", "own:twice")
    x_t, x_1, path = torch.zeros(2000).long(), torch.full((2000,), 3), again.paths["image"]
    assert (STEPS["own:jump"](path, x_t, x_1, 0.3, 0.5) == 3).all()
    left, usual = ((fudoki.euler(path, x_t, x_1, 0.3, 0.5, velocity=VELOCITIES[name]) == 3
                    ).float().mean() for name in ("own:twice", "kinetic_optimal"))
    assert left > 1.3 * usual
    for options in (dict(step="own:jump"), dict(velocity="own:twice")):
        *_, end = again.generate(*again.to_fill(2), steps=3, **options)
        assert end["image"].shape == (2, 9)
    for wrong in ("own:None", "other:Slow", "own", "nowhere:Slow"):
        with pytest.raises(SystemExit):
            train.parse(["--path", wrong])
        said = capsys.readouterr().err
        assert "own.py has no None" in said or "(choose from metric" in said and wrong in said
    (tmp_path / "own.py").unlink()
    with pytest.raises(sample.InputError, match="needs what is not here any more: .*own:Slow"):
        sample.open_model(tmp_path / "model.ckpt")


def test_time_as_an_input_and_a_trunk_of_ones_own(monkeypatch, tmp_path):
    class Timed(fudoki.Blocks):
        def __init__(self, **options):
            super().__init__(**options)
            self.time = nn.Linear(1, self.width)

        def forward(self, h, places, visible, t):
            seen.append(t.flatten().tolist())
            return super().forward(h + self.time(t), places, visible, t)
    monkeypatch.setitem(TRUNKS, "timed", Timed)
    assert train.parse(["--trunk", "timed"]).trunk == "timed"
    seen, x = [], batch(2)
    model = saved(small(trunk="timed"), tmp_path / "model.ckpt")
    model.loss(x, model.mark_free(x, "image"), torch.tensor([0.2, 0.7]).view(2, 1, 1))
    list(model.generate(x, model.mark_free(x, "image"), steps=2, guidance=2.))
    list(model.generate(x, model.mark_free(x, "image"), steps=3, late=2., t=0.1))
    times = [[0.2, 0.7], [0., 0], [0, 0], [.5, .5], [.5, .5], [.1, .1], [.6, .6], [.9, .9]]
    assert_close(torch.tensor(seen), torch.tensor(times))


def test_a_loss_of_ones_own_trains_and_the_report_compares_cross_entropies(monkeypatch):
    def late(path, p_1t, x_1, x_t, t):
        assert p_1t.shape[:2] == x_1.shape == x_t.shape and isinstance(path, fudoki.Path)
        return t[..., 0] * fudoki.cross_entropy(path, p_1t, x_1, x_t, t)
    monkeypatch.setitem(LOSSES, "late", late)
    plain, other, logged = small(drop=0.), small(drop=0., loss="late"), []
    for model in (plain, other):
        model.log_dict = lambda values, **kwargs: logged.append(values)
        torch.manual_seed(0)
        model.training_step(batch(64), 0)
        model.validation_step(batch(64), 4)
    a, b = logged[:len(logged) // 2], logged[len(logged) // 2:]
    assert b[0]["loss"] < 0.7 * a[0]["loss"]
    assert a[1:] == b[1:] and len(a) == 1 + 10 * 2 and len(a[1]) == 4


def test_a_step_that_wants_the_posterior(monkeypatch):
    """Confidence first: of a row's open positions the surest half is filled in, in every step."""
    @fudoki.rowwise
    def average(path, x_t, p_1t, t, s):
        """Rates averaged over x₁ for a mixture: into x at κ̇/(1 − κ) p(x | x_t)."""
        stay = torch.rand_like(t[..., 0]) > (s - t)[..., 0] / (1 - t)[..., 0]
        return torch.where(stay, x_t, fudoki.categorical(p_1t))

    def surest(path, x_t, p_1t, t, s):
        shapes.append(p_1t.shape)
        assert torch.equal(p_1t[:, 8], path.one_hot(x["image"][:, 8])[:, :12].float())  # is given
        mask, (sure, x_1) = len(path.embedding) - 1, p_1t.max(-1)
        sure = sure.masked_fill(x_t != mask, -1.)
        order = sure.argsort(1, descending=True).argsort(1)
        half = order < (x_t == mask).sum(1, keepdim=True) // 2
        return torch.where(half & (x_t == mask), x_1, x_t)
    average.posterior = surest.posterior = True
    monkeypatch.setitem(STEPS, "average", average)
    monkeypatch.setitem(STEPS, "surest", surest)
    shapes, x = [], {"image": batch(50)["image"]}
    free = {"image": torch.arange(9).expand(50, 9) < 8}
    model = small("mask")
    *states, end = model.generate(x, free, steps=3, step="surest")
    assert shapes == [(50, 9, 12)] * 2 and end["image"].max() < 12
    assert [(state["image"] == 12).sum(1).unique().tolist() for state in states] == [[8], [4], [2]]
    *states, end = model.generate(x, free, steps=4, step="average")
    share = (states[2]["image"] == 12)[:, :8].float().mean().item()
    assert abs(share - 0.5) < 5 * (0.25 / 400) ** 0.5 and end["image"].max() < 12


def test_a_process_that_has_lost_another_ends_in_one_line(capsys):
    """The libraries write a page; what is no mistake of a user's stays a traceback."""
    def lost(argv):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer\n" * 30)

    def wrong(argv):
        raise RuntimeError("ours")
    lost.__module__ = wrong.__module__ = "train"
    assert sample.command(lost)() == 2
    assert capsys.readouterr().err == \
        "train.py: [gloo/transport/tcp/pair.cc:534] Connection closed by peer\n"
    with pytest.raises(RuntimeError, match="ours"):
        sample.command(wrong)()


MISTAKES = {
    "def f(:\n": "SyntaxError", "import nowhere\n": "No module named 'nowhere'",
    "def f():\n    raise TypeError('mine')\nf()\n": "in f\n    raise TypeError('mine')",
    "raise ValueError('mine')\n": "ValueError: mine",
    "raise KeyError('Path')\n": "KeyError: 'Path'",
    "import sys\nsys.exit()\n": "SystemExit", "{}['x']\n": "KeyError: 'x'",
    "import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n": "SystemExit: 2",
    "import train\ntrain.DATA['nothing']\n": "invalid choice: 'nothing'"}


@pytest.mark.parametrize("source, says", MISTAKES.items(), ids=range(len(MISTAKES)))
def test_an_error_while_a_file_is_read_is_the_students_own(source, says, tmp_path, monkeypatch,
                                                           capsys):
    """One sentence, and the traceback from the file's first line on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import fudoki\n" + source, "utf-8")
    for main, flag in ((train.main, "--path"), (train.main, "--preset"), (sample.main, "--step")):
        assert main([flag, "mine:Own"]) == 2
        said = capsys.readouterr().err.partition(f"{Path(main.__module__)}.py: ")[2]
        assert said.startswith('mine.py cannot be read\n  File "mine.py", line ') and says in said
        assert "runpy" not in said and "in wrapped" not in said


@pytest.mark.parametrize("name, says", [
    ("mine:Paht", "mine.py has no Paht"), ("nowhere:Path", "invalid choice: 'nowhere:Path'"),
    ("mine.Path", "FILE:NAME, as my:Path for the Path of my.py"), ("mine.py", "FILE:NAME, as my"),
    ("other:Path", "a file here that mentions fudoki"), ("../mine:Path", "invalid choice"),
    ("mine", "invalid choice: 'mine' (choose from metric, uniform"), ("mine:", "invalid choice")])
def test_a_name_that_is_nearly_right_is_answered_by_the_right_form(name, says, tmp_path,
                                                                   monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import fudoki\nPath = fudoki.UniformPath", "utf-8")
    (tmp_path / "other.py").write_text("Path = 1 / 0", "utf-8")
    with pytest.raises(SystemExit):
        train.parse(["--path", name])
    assert says in capsys.readouterr().err


def test_a_file_may_be_named_in_several_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("mi-ne.py", "sub/mine.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(
            "import fudoki\nclass Own(fudoki.UniformPath):\n    pass", "utf-8")
    for name in ("mi-ne:Own", "sub/mine:Own", "sub/mine.py:Own"):
        assert train.parse(["--path", name]).path == name
        assert issubclass(PATHS[name], fudoki.UniformPath)


def test_what_has_become_of_ones_own_file_is_said(tmp_path, monkeypatch, capsys):
    """A checkpoint names the file; it is gone, or has changed, or is broken, or still works."""
    monkeypatch.chdir(tmp_path)
    right = ("import fudoki\nclass Own(fudoki.UniformPath):\n"
             "    def __init__(self, embedding, frequency=None, power=1.):\n"
             "        super().__init__(embedding, frequency)\n")

    def said(source):
        (tmp_path / "mine.py").write_text(source, "utf-8")
        assert sample.main(["seven", "--checkpoint", "model.ckpt"]) == 2
        return capsys.readouterr().err
    (tmp_path / "mine.py").write_text(right, "utf-8")
    saved(small("mine:Own", path_options={"power": 2.},
                notes=dict(data="a test", captions=None, asks=False)), tmp_path / "model.ckpt")
    for source, says in ((right.replace("Own", "Other"), "mine.py has no Own"),
                         (right.replace("power", "haste"), "argument 'power'"),
                         (right + "1 / 0\n", "mine.py cannot be read"), ("", "invalid choice")):
        error = said(source)
        assert says in error and "model.ckpt" in error and "'path': 'mine:Own'" in error
    assert 'File "mine.py", line 5' in said(right + "1 / 0\n")
    (tmp_path / "mine.py").write_text(right + "    more = 3\n", "utf-8")
    assert sample.open_model(tmp_path / "model.ckpt")[0].paths["image"].more == 3


def test_an_error_in_the_middle_of_a_training_is_cut_to_ones_own_lines(tmp_path, monkeypatch):
    """Also if it comes from below, and not if the file says in one line what is wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import fudoki, sample\ndef loss(path, p_1t, x_1, x_t, t):\n"
        "    if len(x_1) > 2:\n        return p_1t.view(3)\n"
        "    return fudoki.cross_entropy(path, p_1t, x_1, x_t, t)\n"
        "def told(*of):\n    raise sample.InputError('mine')\n", "utf-8")
    LOSSES["mine:loss"], LOSSES["mine:told"]
    x_1 = torch.zeros(3, 4).long()
    for name, kind in (("mine:loss", RuntimeError), ("mine:told", sample.InputError)):
        with pytest.raises(kind) as caught:
            LOSSES[name](None, torch.rand(3, 4, 5), x_1, x_1, 0.5)
        lines = sample.own_lines(caught.value)
        assert ('File "mine.py", line 4, in loss' in lines) == (name == "mine:loss")
        assert "test_open" not in lines
