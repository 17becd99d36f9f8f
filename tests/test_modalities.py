"""A third modality beside captions and pictures is a class and two entries in a file of one's own,
and trains, reports, resumes and samples by the commands that there are."""
import csv

import pytest
import torch

import fudoki
import sample
import train

BAND = '''
import torch
import fudoki
import train

class Notes:
    """Four notes of a scale of twelve, which lie on a line."""
    eos, marks, length = None, (), 4

    def __init__(self, scale):
        self.embedding = torch.arange(float(scale))[:, None]

fudoki.TOKENS["notes"] = Notes
fudoki.INPUTS["notes"] = fudoki.WordInput

WORDS = [f"a {size} {shape}" for size in ("tiny", "small", "large", "huge")
         for shape in ("disk", "box", "star")]

class Band(train.Data):
    """Of twelve things a caption, a picture of four patches and a note, held four times."""
    preset = dict(width=32, depth=2, heads=2, batch=48, steps=240, val_every=120, threads=1,
                  ema=0.9, t_power=2., drop=0.3)
    own = dict(things=(12, (2, 12), "how many things there are"))
    anew = dict(rows=(200, (1,), "things measured in the report"))
    origin, prompt = "a dozen things", WORDS[0]

    def __init__(self, run):
        self.which = torch.arange(run.things)

    def build(self, run):
        tokens = {"text": [train.tokenizer(WORDS), 3], "image": [torch.rand(12, 4), 2, 4],
                  "notes": [12]}
        frequency = {"text": torch.ones(8), "image": torch.ones(12), "notes": torch.ones(12)}
        return self.make(run, tokens, frequency, notes=dict(form="square"))

    def rows(self, model, i):
        return dict(text=model.tokens["text"].encode([WORDS[k] for k in i]),
                    image=i[:, None].repeat(1, 4),
                    notes=(5 * i[:, None]).repeat(1, 4) % 12)

    def tokens(self, model):
        return self.rows(model, self.which.repeat(8)), self.rows(model, self.which)

    def sample(self, model, path):
        path.with_suffix(".txt").write_text("la la la la")

    @torch.no_grad()
    def report(self, model, run, options):
        x = self.rows(model, torch.randint(len(self.which), (run.rows,)))
        for m in x:
            loss, accuracy = model.loss(x, model.mark_free(x, m), 0.)
            yield f"finding {m}", dict(loss=loss.item(), accuracy=accuracy.item())
'''


@pytest.fixture(scope="module")
def band(tmp_path_factory):
    """A folder in which such data were trained on."""
    folder = tmp_path_factory.mktemp("band")
    (folder / "band.py").write_text(BAND, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(["--preset", "band:Band"]) == 0
    yield folder
    for entries in (fudoki.TOKENS, fudoki.INPUTS):
        entries.pop("notes", None)


def test_all_three_directions_are_learned(band):
    report = csv.DictReader(open(band / "runs/band_Band/report.csv", encoding="utf-8"))
    rows = {row["what"]: row for row in report}
    assert set(rows) == {"finding text", "finding image", "finding notes"}
    assert all(float(row["accuracy"]) > 0.6 for row in rows.values())
    metrics = next(band.glob("runs/band_Band/log/*/metrics.csv"))
    log = next(csv.DictReader(open(metrics, encoding="utf-8")))
    assert {"val_text_loss", "val_image_loss_t0.25", "val_notes_acc"} <= {*log}


@pytest.mark.parametrize("given", ["text", "image", "notes"])
def test_from_one_modality_the_two_others_follow(band, given, monkeypatch):
    """Also in a process that knows nothing of notes: the checkpoint names the file."""
    monkeypatch.chdir(band)
    for entries in (fudoki.TOKENS, fudoki.INPUTS):
        entries.pop("notes", None)
    fudoki.definitions.cache_clear()
    model, _ = sample.open_model()
    x = train.DATA["band:Band"].rows(None, model, torch.arange(12).repeat(10))
    torch.manual_seed(0)
    end = sample.fill(model, dict(steps=8, temperature=0.5), **{given: x[given]})
    for m in x:
        right = (end[m].cpu() == x[m]).float().mean()
        assert right == 1 if m == given else right > 0.5, (m, right)


def test_all_commands_know_it(band, monkeypatch, capsys):
    monkeypatch.chdir(band)
    assert train.main(["score", "--rows", "20", "--csv", "more.csv"]) == 0
    assert len(list(csv.DictReader(open("more.csv", encoding="utf-8")))) == 3
    assert train.main(["--preset", "band:Band", "--resume", "--steps", "242"]) == 0
    assert "--things 3 contradicts" in wrong(capsys, "--preset", "band:Band", "--resume",
                                             "--things", "3")
    assert "--things: 13 has to be from 2 to 12" in wrong(capsys, "--preset", "band:Band",
                                                          "--things", "13")
    for command in (["a tiny disk", "--n", "2"], [], ["a tiny ___", "--best-of", "2"]):
        assert sample.main(command) == 0
    assert "samples.png: 16 drawn" in capsys.readouterr().out


def wrong(capsys, *arguments):
    """The last line of stderr."""
    capsys.readouterr()
    try:
        assert train.main(list(arguments)) == 2
    except SystemExit as end:
        assert end.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("lines, says", [
    ("def Mine(run):\n    pass", "has to be a subclass of train.Data"),
    ("class Mine:\n    pass", "has to be a subclass of train.Data"),
    ("class Mine(train.Data):\n    def sample(self, model, path):\n        pass",
     "it has no build, report, tokens"),
    ("class Mine(train.Digits):\n    own = train.Digits.own | dict(patch=(5, (1,), 'pixels'))",
     "--patch 5 does not divide the pictures' side, 28"),
    ("class Mine(train.Digits):\n    def tokens(self, model):\n        known, more = "
     "super().tokens(model)\n        return known | dict(text=known['text'][1:]), more",
     "training has {'text': 35, 'image': 36} rows")])
def test_what_is_no_kind_of_data_is_told_what_is_missing(lines, says, tmp_path, monkeypatch,
                                                         capsys):
    (tmp_path / "mine.py").write_text("import fudoki\nimport train\n\n" + lines, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Digits, "load", lambda *_: world_of_noise())
    assert says in wrong(capsys, "--preset", "mine:Mine")


def world_of_noise():
    """Pictures and digits for training and for testing."""
    return [(torch.rand(40, 1, 28, 28), torch.arange(40) % 10)] * 2
