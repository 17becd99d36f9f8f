"""The models that come along can be used at once, and do what README says of such models."""
import csv
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
import weights
from digits import right
from scenes import Scenes, is_true, see

import sample
import train

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests/weights"
REAL = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize("name", ["toy", "scenes"])
def test_they_are_small_and_say_how_they_were_made(name):
    file = FOLDER / f"{name}.ckpt"
    saved = sample.opened(file)
    assert file.stat().st_size < 1.5e6 and "optimizer_states" not in saved
    run, steps = train.settings(file)
    usual = {k: v[0] for k, v in train.settings_of(train.DATA[name]).items()}
    assert steps == run["steps"] == usual["steps"]
    assert {k for k in usual if run[k] != usual[k]} <= {"threads", "val_every"}
    data = saved["hyper_parameters"]["notes"]["data"]
    assert f"| `{name}.ckpt` | {data} | {steps} | {run['seed']} |" in (
        FOLDER / "README.md").read_text(encoding="utf-8")


def test_weights_are_made_small_without_the_codebook(tmp_path):
    net, table = torch.randn(3, 4), torch.rand(5, dtype=torch.float32)
    saved = {"state_dict": {"net.a": net, "paths.image.clock.table": table}, "global_step": 7,
             "hyper_parameters": {}, "callbacks": {"Keep": {"run": {}}, "WeightAveraging": {}},
             "optimizer_states": [net]}
    kept = weights.small(saved)
    assert kept["state_dict"]["net.a"].dtype == torch.float16
    assert (kept["state_dict"]["net.a"] - net).abs().max() <= 2 ** -11 * net.abs().max()
    assert torch.equal(kept["state_dict"]["paths.image.clock.table"], table)
    assert set(kept) == {"state_dict", "hyper_parameters", "callbacks", "global_step"}
    assert set(kept["callbacks"]) == {"Keep"}


@pytest.mark.parametrize("command, which", [
    ("'a bold slanted seven' --n 4", "toy"), ("--n 1", "toy"),
    ("--checkpoint toy two --n 2 --step euler", "toy"),
    ("--checkpoint scenes 'a white circle and a blue square' --n 4", "scenes")])
def test_a_fresh_clone_draws_at_once(command, which, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main(shlex.split(command)) == 0
    said = capsys.readouterr().out
    assert re.search(rf"weights.{which}\.ckpt, trained on", said) and Path("samples.png").exists()


def test_a_run_comes_before_what_comes_along(tmp_path, monkeypatch):
    """So does a file of that name."""
    monkeypatch.chdir(tmp_path)
    assert sample.open_model()[1] == FOLDER / "toy.ckpt"
    for path in (Path("runs/mine/model.ckpt"), Path("mine.ckpt")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((FOLDER / "scenes.ckpt").read_bytes())
    model, path = sample.open_model()
    assert path == Path("runs/mine/model.ckpt") and model.hparams.notes["preset"] == "scenes"
    assert sample.open_model("mine.ckpt")[1] == Path("mine.ckpt")


def test_digits_are_drawn_as_their_captions_say():
    """The weight and the slant by the rule of captions, the digit by the model's own reading."""
    torch.manual_seed(0)
    model = sample.open_model(FOLDER / "toy.ckpt")[0]
    texts = 4 * train.Digits.examples
    drawn = sample.draw(model, texts)
    seen = sample.read(model, model.tokens["image"].encode(drawn))
    digits = torch.tensor([train.DIGITS.index(text.split()[-1]) for text in texts])
    assert right(seen, texts)["digit"] > 0.95
    assert right(train.captions(drawn, digits), texts)["caption"] > 0.93


def test_scenes_are_drawn_as_their_captions_say():
    """By the checker, which is exact; sixty captions, so the standard deviation is below .04."""
    torch.manual_seed(0)
    model = sample.open_model(FOLDER / "scenes.ckpt")[0]
    run = train.parse(["--preset", "scenes", "--train-images", "200", "--test-images", "20"])
    texts = sum(Scenes(run).prompts(random.Random(0), 10, False).values(), [])
    found = see(sample.draw(model, texts))
    assert sum(map(is_true, texts, found)) / len(texts) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "scenes"])
def test_their_report_is_that_of_readme(name, tmp_path, monkeypatch):
    """Within what a thousand drawings, and another machine, allow."""
    monkeypatch.chdir(tmp_path)
    where = ["--data-dir", str(REAL)] if name == "toy" else []
    if where and not (REAL / "MNIST").is_dir():
        pytest.skip("needs ../shared/data/MNIST")
    assert train.main(["score", name, "--csv", "report.csv", *where]) == 0
    rows = {row["what"].split(",")[0] + row["what"].split(",")[1] * (name == "scenes"): row
            for row in csv.DictReader(open("report.csv", encoding="utf-8"))}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if name == "toy":
        said = re.search(r"\| `toy`, seed 0 \| 2500 \| (\S+) / (\S+) \|[^|]+\| (\S+) / (\S+) \|",
                         readme)
        its = [rows[what][k] for what in ("drawing", "reading") for k in ("digit", "caption")]
    else:
        said = re.search(r"\| metric, seed 0 \| 20000 \|[^|]+\| (\S+) \|.*?\| (\S+) \|", readme)
        its = [rows["drawing mean"]["seen"], rows["drawing mean"]["best of 8"]]
    for a, b in zip(its, said.groups()):
        assert abs(float(a) - float(b)) < 0.02, (its, said[0])
