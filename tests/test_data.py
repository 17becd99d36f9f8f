"""Other data than digits: long texts, pretrained language models, a folder of one's own."""
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_backbone import COMMON, STORY, tokenizer
from test_commands import REAL, complaint
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fudoki
import sample
import train

SHARED = REAL.parent
SHORT = "--steps 4 --val-every 4 --threads 1 --length 16 --batch 4".split()
TINY = "--width 16 --depth 1 --heads 1".split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def quick(no_judge):
    """No test here is about the judge of digits."""


@pytest.fixture
def backbone(here):
    """The folder of a language model with random weights."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**COMMON)).save_pretrained("lm")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<s>",
                            eos_token="</s>").save_pretrained("lm")
    return "lm"


def folder(name="mine", n=40, mode="RGB"):
    """Coloured disks and boxes with captions of different lengths."""
    path = Path(name)
    path.mkdir()
    colours = {"red": (220, 30, 30), "blue": (30, 30, 220)}
    rows = []
    for i in range(n):
        colour, shape = list(colours)[i % 2], ("disk", "box")[i // 2 % 2]
        picture = Image.new("RGB", (60 + i, 50), "white")
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "disk" else draw.rectangle)((20, 10, 50, 40), colours[colour])
        picture.convert(mode).save(path / f"{i}.png")
        rows.append((f"{i}.png", f"a {colour} {shape}" + ", on white" * (i % 3 == 0)))
    write(path, rows)
    return path, rows


def write(path, rows):
    with open(path / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])


# -------------------------------------------------------------------------------------- long texts

def test_a_text_is_learned_continued_and_completed(here, capsys):
    Path("story.txt").write_text(STORY)
    assert train.main(["--preset", "text", "--text", "story.txt", *SHORT, *TINY]) == 0
    said = capsys.readouterr().out
    assert "the text story.txt: 16 text tokens" in said
    assert "held-out cross-entropy at t = 0.95" in said
    rows = csv.DictReader(open("runs/text/report.csv"))
    report = {row["what"]: float(row["value"]) for row in rows}
    assert len(report) == 12 and report["share of held-out words that the training text has"] == 1
    assert Path("runs/text/samples/step_000004.txt").read_text().count("----") == 3
    for arguments in (["--text", "the c___"], ["the c___"]):
        assert sample.main([*arguments, "--steps", "4", "--n", "3", "--seed", "0"]) == 0
        assert capsys.readouterr().out.count("\nthe c") == 3
    assert sample.main(["--steps", "2", "--text", "the ___ sat"]) == 0
    said = capsys.readouterr().out
    said = said.split("\n")
    assert said[1].startswith("   0  ") and len(said[4]) == len("the ___ sat")
    assert said[3][6:] == said[4]
    assert "2 network calls" in said[5]  # as it settles, then whole
    assert sample.main(["--steps", "2"]) == 0                               # from nothing
    assert "nothing is left to fill" in complaint(capsys, sample.main, "--text", "the cat")
    assert "a part of 'Zoo ___' is unknown" in complaint(capsys, sample.main, "Zoo ___")
    assert "knows texts only" in complaint(capsys, sample.main, "--image", "x.png")


def test_a_small_model_learns_the_text(here):
    """After three seconds the letters around say more than the frequencies of letters."""
    torch.manual_seed(0)
    Path("story.txt").write_text(STORY)
    run = train.parse(["--preset", "text", "--text", "story.txt", "--length", "17",
                       "--width", "32", "--depth", "2", "--heads", "1"])
    data = train.Corpus(run)
    model = data.build(run).train()
    model.log_dict = lambda *args, **kwargs: None
    windows, optimizer = data.tokens(model)[0], torch.optim.AdamW(model.parameters(), 5e-3)
    for index in range(300):
        optimizer.zero_grad()
        batch = windows.__getitems__(torch.randint(len(windows), (32,)))
        model.training_step(batch, index).backward()
        optimizer.step()
    model.eval()
    x_1 = {"text": data.tokens(model)[1].tokens["text"]}
    free = {"text": (torch.arange(17) // 3 == 2).expand_as(x_1["text"])}     # three in the middle
    share = torch.bincount(x_1["text"].flatten()) / x_1["text"].numel()
    entropy = -(share * share.clamp(min=1e-9).log()).sum().item()
    assert model.loss(x_1, free)[0].item() < entropy / 2


def test_accents_in_two_characters_are_one_token(here):
    Path("accents.txt").write_text("cafe\u0301 " * 4000, encoding="utf-8")
    run = train.parse(["--preset", "text", "--text", "accents.txt", *TINY])
    data = train.Corpus(run)
    assert len(data.build(run).tokens["text"].embedding) == 5


def test_without_a_file_the_documentation_of_python_is_the_text():
    data = train.Corpus(train.parse(["--preset", "text"]))
    assert "documentation" in data.origin and len(data.train) > 300_000


# ------------------------------------------------------------------------------- language models

def test_a_language_model_becomes_a_flow_and_its_folder_may_go(backbone, here, capsys):
    Path("story.txt").write_text(STORY.replace(" . ", "<|endoftext|>"))
    assert train.main(["--preset", "ar", "--backbone", "lm", "--text", "story.txt",
                       "--freeze", "0.5", *SHORT]) == 0
    Path("lm").rename("gone")
    capsys.readouterr()
    assert sample.main(["--text", "the cat ___", "--steps", "3"]) == 0
    said = capsys.readouterr().out
    assert "\nthe cat " in said and "3 network calls" in said


def test_digits_through_a_language_model(backbone, capsys):
    assert train.main(["--preset", "smoke", "--backbone", "lm", "--codes", "32", "--patch", "14",
                       "--train-images", "600", "--test-images", "20", "--drawings", "20",
                       *SHORT]) == 0
    assert "drawing, 4 race steps" in capsys.readouterr().out
    assert sample.main(["a bold slanted seven", "--n", "2"]) == 0
    assert "8 network calls" in capsys.readouterr().out
    assert sample.main(["--image", "runs/smoke/picture.png"]) == 0


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/lm")
def test_the_real_language_model_writes_words(here):
    """With most of a text given, its guesses beat those of random weights from the start."""
    name = str(SHARED.parent / "lm" / "story-656K")
    run = train.parse(["--preset", "ar", "--backbone", name, "--length", "32", "--text",
                       str(SHARED / "text" / "tinystories_sample.txt")])
    data = train.Corpus(run)
    data.train, data.test = data.train[:40_000], data.test[:40_000]
    model = data.build(run).eval()
    x_1 = {"text": data.tokens(model)[1].tokens["text"][:64]}
    free = {"text": torch.arange(32).expand(64, 32) == 31}  # as in its training: the last token
    pretrained = model.loss(x_1, free, 0.)[0].item()
    random = fudoki.Backbone(**model.hparams.trunk_options)
    model.net.trunk.load_state_dict(random.state_dict())
    assert pretrained < model.loss(x_1, free, 0.)[0].item() - 1


# ------------------------------------------------------------------------- a folder of one's own

@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_folder_is_learned(here, capsys, mode):
    path, rows = folder(mode=mode)
    (path / "broken.png").write_text("no picture")
    write(path, [*rows, ("broken.png", "a red box"), ("absent.png", "a blue box")])
    arguments = ["--data", "mine", "--image-size", "16", "--codes", "16", "--patch", "8"]
    assert train.main([*arguments, *SHORT, *TINY]) == 0
    out, error = capsys.readouterr()
    for said in ("skipped broken.png", "skipped absent.png", "2 of 42 pictures"):
        assert said in error
    assert "the folder mine" in out and "reading" in out
    model, _ = sample.open_model()
    patches = model.tokens["image"]
    assert (patches.patch, patches.size, patches.channels) == (8, 16, len(mode))
    assert (model.tokens["text"].length, patches.length) == (7, 4)
    assert sample.main(["a red disk", "--n", "1"]) == 0
    with Image.open("samples.png") as picture:
        assert picture.size == (64, 64)
    assert sample.main(["--image", "mine/0.png"]) == 0
    assert sample.main(["a ___ disk"]) == 0
    error = complaint(capsys, sample.main, "--image", "mine/0.png", "--ask", "what")
    assert "learned no questions" in error
    error = complaint(capsys, sample.main, "a red disc")
    assert "a part of 'a red disc' is unknown; known are , " in error


def test_questions_about_ones_own_pictures(here, capsys):
    path, rows = folder()
    write(path, [(name, f"What colour? {text.split()[1]}") for name, text in rows])
    arguments = ["--data", "mine", "--image-size", "16", "--codes", "16", "--patch", "8"]
    assert train.main([*arguments, *SHORT, *TINY]) == 0
    for question in ("what colour", "What colour?"):
        assert sample.main(["--image", "mine/0.png", "--ask", question]) == 0
        answer = capsys.readouterr().out.split("\n")[-3]
        assert "colour?" not in answer and "network call" not in answer
    assert sample.main(["--image", "mine/0.png", "--keep", "left", "what colour? red",
                        "--n", "1"]) == 0


@pytest.mark.parametrize("rows, says", [
    ([("../secret.png", "a box")], "line 2: ../secret.png lies outside of the folder"),
    ([("0.png", "")], "line 2: file_name or text is missing"),
    ([("0.png", "a box")], "has 1 different pictures that can be read; at least 20"),
    (None, "metadata.csv cannot be read")])
def test_a_folder_that_cannot_be_used(rows, says, here, capsys):
    path, _ = folder(n=1)
    Image.new("RGB", (9, 9)).save("secret.png")
    write(path, rows) if rows else (path / "metadata.csv").unlink()
    assert says in complaint(capsys, train.main, "--data", "mine")


def test_pictures_are_cropped_to_the_middle_and_turned(here):
    path = Path("two")
    path.mkdir()
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255                                                # the middle third is white
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # lies on its side
    for i in range(20):
        wide[0, 0] = i                                                  # no two alike
        Image.fromarray(wide if i else wide.transpose(1, 0, 2)).save(path / f"{i}.png", exif=exif)
    write(path, [(f"{i}.png", f"number {i}") for i in range(20)])
    images, texts, _ = train.load_folder(train.parse(["--data", "two", "--image-size", "16"]))
    assert images.shape == (20, 3, 16, 16) and len(set(texts)) == 20 and (images > 0.9).all()


@pytest.mark.parametrize("arguments, says", [
    ("--preset text --text none.txt", "none.txt cannot be read"),
    ("--preset text --text empty.txt", "0 characters"),
    ("--preset text --text binary.txt", "as UTF-8"),
    ("--preset toy --text empty.txt", "--text goes with"),
    ("--preset ar --text story.txt --backbone none", "the backbone none cannot be loaded"),
    ("--preset ar --text story.txt --backbone empty", "the backbone empty cannot be loaded"),
    ("--preset ar --backbone empty --path mask", "--path mask"),
    ("--preset text --freeze 1", "--freeze")])
def test_mistakes_with_texts(arguments, says, here, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(bytes(range(256)) * 100)
    Path("story.txt").write_text(STORY * 10)
    Path("empty").mkdir()
    assert says in complaint(capsys, train.main, *arguments.split())
    assert not Path("runs").exists()
