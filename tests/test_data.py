"""What people bring: their own digits, long texts, pretrained language models, pictures."""
import csv
import itertools
import gzip
import json
import os
import shlex
import struct
import unicodedata
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_backbone import COMMON, STORY, tokenizer
from test_commands import REAL, complaint
from test_model import learn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fudoki
import sample
import train

SHARED = REAL.parent
SHORT = "--steps 4 --val-every 4 --threads 1 --batch 4".split()
TEXT = [*SHORT, "--length", "16"]
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
    with open(path / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])


# ----------------------------------------------------------------------------- digits of one's own

def idx(values):
    """An array of bytes in MNIST's format."""
    return bytes([0, 0, 8, values.ndim, *struct.pack(f">{values.ndim}I", *values.shape)]
                 ) + values.astype(np.uint8).tobytes()


def own_digits(name="own", n=40, size=(20, 20), labels=10):
    """Files in MNIST's layout: bright bars, labelled one after the other."""
    raw = Path(name) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    values = np.zeros((n, *size))
    for i in range(n):
        values[i, 3:-3, 3 + i % 9:6 + i % 9] = 200
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(values))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(idx(np.arange(n) % labels)))
    return raw


def test_ones_own_digits_of_any_size_are_trained_on_and_stay_as_they_are(here, capsys):
    raw = own_digits(labels=3)
    before = {path.name: path.read_bytes() for path in raw.iterdir()}
    for path in (*raw.iterdir(), raw, raw.parent, raw.parent.parent):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert train.main(["--data-dir", "own", "--patch", "5", "--codes", "8", "--drawings", "4",
                       *SHORT, *TINY]) == 0
    out = capsys.readouterr().out
    assert "the digits in own: 4 text tokens and 16 image tokens" in out
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == before
    model = sample.open_model()[0]
    assert model.tokens["image"].size == 20 and model.hparams.notes["data"].endswith("in own")
    run = train.parse(["--data-dir", "own", "--patch", "5"])
    before, data = deepcopy(vars(run)), train.Digits(run)
    images, digits = (torch.cat(parts) for parts in zip(data.held_out, data.train))
    assert vars(run) == before                              # what a run was told stays
    assert images.shape == (40, 1, 20, 20) and images.max() == torch.tensor(200.) / 255
    assert digits.tolist() == [i % 3 for i in range(40)]
    assert sample.main(["one", "--n", "1"]) == sample.main(
        ["--image", "runs/toy/picture.png"]) == 0


@pytest.mark.parametrize("name, change, says", [
    ("train-labels-idx1-ubyte.gz", lambda data: gzip.compress(idx(np.arange(40))),
     "40 labels up to 39: needed are at least 20 squares, labels up to 9"),
    ("t10k-labels-idx1-ubyte.gz", lambda data: data[:-15], "Compressed file ended"),
    ("t10k-labels-idx1-ubyte.gz", lambda data: gzip.compress(idx(np.arange(9))),
     "t10k images [40, 20, 20] and 9 labels"),
    ("train-images-idx3-ubyte", lambda data: data[:900], "no whole file in MNIST's format"),
    ("t10k-images-idx3-ubyte", lambda data: b"<!DOCTYPE html>", "no whole file in MNIST's"),
    ("t10k-images-idx3-ubyte", lambda data: idx(np.ones((40, 25, 25))), "differ in size"),
    ("t10k-images-idx3-ubyte", lambda data: idx(np.ones((40, 20, 25))), "[40, 20, 25]"),
    ("t10k-images-idx3-ubyte", lambda data: None, "No such file")])
def test_digits_that_cannot_be_used_are_named_before_the_training(name, change, says, here,
                                                                  capsys):
    raw = own_digits()
    new = change((raw / name).read_bytes())
    (raw / name).write_bytes(new) if new is not None else (raw / name).unlink()
    assert says in complaint(capsys, train.main, "--data-dir", "own", "--patch", "5")
    assert not Path("runs").exists()


def test_without_the_judge_nothing_begins(here, capsys, monkeypatch):
    monkeypatch.setattr(train, "__file__", "train.py")
    assert "need the folder tests beside train.py" in complaint(capsys, train.main)


def test_a_patch_that_does_not_divide_the_pictures_is_said_before_the_training(here, capsys):
    own_digits(size=(24, 24))
    assert "--patch 5 does not divide the pictures' side, 24" in complaint(
        capsys, train.main, "--data-dir", "own", "--patch", "5")
    assert not Path("runs").exists()


def test_digits_of_another_size_are_no_test_of_a_model(here, capsys):
    own_digits("own")
    own_digits("larger", size=(25, 25))
    assert train.main(["--data-dir", "own", "--patch", "5", "--codes", "8", *SHORT, *TINY]) == 0
    for command in (["score"], ["--resume", "--steps", "9"]):
        assert "the digits in larger has pictures of another size than 20 pixels" in complaint(
            capsys, train.main, *command, "--data-dir", "larger")


def test_files_that_are_there_are_not_downloaded_over(here, monkeypatch):
    """Without --data-dir, too, and a download is there altogether or not at all."""
    raw = own_digits("data")
    monkeypatch.setattr(train, "MNIST", lambda *args, **options: 1 / 0)
    run = train.parse([])
    assert train.Digits(run).test[0].shape == (40, 1, 20, 20)

    def download(folder, download):
        Path(folder, "MNIST").mkdir()
        raw.rename(Path(folder, "MNIST", "raw"))
    monkeypatch.setattr(train, "MNIST", download)
    raw.rename("elsewhere")
    raw = Path("elsewhere")
    assert len(train.Digits(run).test[1]) == 40 and len(os.listdir("data/MNIST/raw")) == 4


# -------------------------------------------------------------------------------------- long texts

def test_a_text_is_learned_continued_and_completed(here, capsys):
    Path("story.txt").write_text(STORY, "utf-8")
    assert train.main(["--preset", "text", "--text", "story.txt", *TEXT, *TINY]) == 0
    said = capsys.readouterr().out
    assert "the text story.txt: 16 text tokens" in said
    assert "held-out cross-entropy at t = 0.95" in said
    rows = csv.DictReader(open("runs/text/report.csv", encoding="utf-8"))
    report = {row["what"]: float(row["value"]) for row in rows}
    assert len(report) == 10 and all(0 < value < 9 for value in report.values())
    assert Path("runs/text/samples/step_000004.txt").read_text("utf-8").count("----") == 3
    for arguments in (["--text", "the c___"], ["the c___"]):
        assert sample.main([*arguments, "--steps", "4", "--n", "3", "--seed", "0"]) == 0
        assert capsys.readouterr().out.count("\nthe c") == 3
    assert sample.main(["--steps", "2", "--text", "the ___ sat"]) == 0
    said = capsys.readouterr().out.split("\n")
    assert len(said[1]) == len("the ___ sat") and said[1][:4] + said[1][7:] == "the  sat"
    assert sample.main(["--steps", "2"]) == 0                               # from nothing
    assert "nothing is left to fill" in complaint(capsys, sample.main, "--text", "the cat")
    assert "a part of 'Zoo ' is unknown" in complaint(capsys, sample.main, "Zoo ___")
    assert "knows texts only" in complaint(capsys, sample.main, "--image", "x.png")
    assert train.main(["score", "--guidance", "2", "--test-images", "1", "--steps", "1"]) == 0
    Path("other.txt").write_text(STORY[::-1], "utf-8")
    assert train.main(["score", "--text", "other.txt"]) == 0


def test_a_small_model_learns_the_text(here):
    """After two seconds the letters around say more than the frequencies of letters."""
    torch.manual_seed(0)
    Path("story.txt").write_text(STORY, "utf-8")
    run = train.parse("--preset text --text story.txt --length 17 --width 32 --heads 1".split())
    data = train.Corpus(run)
    model = data.build(run)
    windows, x_1 = data.tokens(model)
    learn(model, lambda: sample.take(windows, torch.randint(len(windows["text"]), (32,))),
          150, 5e-3)
    free = {"text": (torch.arange(17) // 3 == 2).expand_as(x_1["text"])}     # three in the middle
    share = torch.bincount(x_1["text"].flatten()) / x_1["text"].numel()
    entropy = -(share * share.clamp(min=1e-9).log()).sum().item()
    assert model.loss(x_1, free)[0].item() < entropy / 2


@pytest.mark.parametrize("text, words", [
    ("Caf\u00e9 cafe\u0301, x\u0302y!", ["caf\u00e9", "caf\u00e9", ",", "x\u0302y", "!"]),
    ("\u7ea2\u8272\u7684\u5706", ["\u7ea2", "\u8272", "\u7684", "\u5706"])])
def test_marks_belong_to_their_letters_and_scripts_without_spaces_have_words(text, words):
    """And captions come back as they were, composed and in lower case."""
    kind = fudoki.Text(train.tokenizer([text], eos=["<end>"]), 20, len(set(words)))
    assert [kind.tokenizer.id_to_token(i) for i in kind.ids(text)] == words
    again = kind.decode(kind.encode([text]))[0]             # scripts without spaces gain some
    assert again.replace(" ", "") == unicodedata.normalize("NFC", text.lower()).replace(" ", "")
    assert kind.encode([again]).tolist() == kind.encode([text]).tolist()


@pytest.mark.parametrize("text, units", [
    ("cafe\u0301 ", 5), ("a\nb", 3), ("\U0001f469\u200d\U0001f467 ", 2)])
def test_what_is_written_in_one_place_is_one_character(text, units):
    words = fudoki.Text(train.tokenizer([text * 80], characters=True), 9, window=True)
    assert len(words.embedding) == units
    assert words.decode(words.encode([text]))[0] == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", ["a\r\nb\n\nc", "\n\u0301a\u0301\u2028 \x0b\x1c\rb", "a", ""])
def test_a_text_that_is_read_by_lines_has_the_tokens_of_the_whole(text):
    """Twenty megabytes at once would take ten gigabytes."""
    whole, by_line = (train.tokenizer([some, "ab"], characters=True) for some in (text, text * 2))
    words = fudoki.Text(by_line, 9, window=True)
    assert train.Corpus.stream(None, words, text, None).tolist() == words.ids(text)
    assert fudoki.Text(whole, 9).tokenizer.get_vocab().keys() <= words.tokenizer.get_vocab().keys()


def test_a_text_of_one_character_is_refused(here, capsys):
    Path("text.txt").write_text("a" * 20_000, "utf-8")
    error = complaint(capsys, train.main, "--preset", "text", "--text", "text.txt")
    assert "all text tokens of the text text.txt are alike: nothing to learn" in error


def test_the_next_command_can_be_typed(here, capsys):
    """It begins with what the text has: no capitals, no spaces, quotation marks, marks on top."""
    Path("story.txt").write_text("-ix\u0302's\n\u7ea2\u8272" * 800, "utf-8")
    assert train.main(["--preset", "text", "--text", "story.txt", *TEXT, *TINY]) == 0
    command = capsys.readouterr().out.split("Next:\n  python sample.py ")[1].splitlines()[0]
    assert sample.main([*shlex.split(command), "--steps", "2"]) == 0


def test_many_characters_need_no_matrix():
    """Of 2,000 different ones the vectors, one-hot, would be four million numbers."""
    text = "".join(map(chr, range(0x4e00, 0x4e00 + 2000)))
    kind = fudoki.Text(train.tokenizer([text], characters=True), 128, window=True)
    path = fudoki.MetricPath(kind.embedding)
    assert path.embedding.numel() == 0 and len(path.embedding) == 2000
    x = torch.tensor([5, 70])
    assert torch.equal(path.distance(x), 1. - torch.nn.functional.one_hot(x, 2000))
    one_hot = fudoki.MetricPath(torch.eye(50), exponent=2.).on("calibrated")
    bare = fudoki.MetricPath(torch.zeros(50, 0)).on("calibrated")
    t = torch.linspace(0.1, 0.9, 5)[:, None]
    for a, b in zip(*(path(torch.arange(5), t).softmax(-1) for path in (one_hot, bare))):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)  # one scale is the clock's


# ------------------------------------------------------------------------------- language models

def test_a_language_model_becomes_a_flow_and_its_folder_may_go(backbone, here, capsys,
                                                               monkeypatch):
    Path("story.txt").write_text((STORY * 9).replace(" . ", "<|endoftext|>"), "utf-8")
    step = fudoki.Fudoki.training_step

    def in_training(model, *args):                              # with the family's dropout
        assert all(module.training for module in model.modules())
        return step(model, *args)
    monkeypatch.setattr(fudoki.Fudoki, "training_step", in_training)
    assert train.main(["--preset", "ar", "--backbone", "lm", "--text", "story.txt",
                       "--trunk-options", "shift=False", "--test-images", "20", *TEXT]) == 0
    Path("lm").rename("gone")
    assert "held-out cross-entropy at t = 0.95" in capsys.readouterr().out
    saved = torch.load("runs/ar_text/model.ckpt", weights_only=True)
    assert saved["global_step"] == 4 and len(saved["optimizer_states"][0]["state"]) > 10
    assert not sample.open_model()[0].net.trunk.shift
    assert {p.name for p in Path("runs/ar_text/samples").iterdir()} == {
        "step_000004.txt", "end.txt"}
    assert sample.main(["--text", "the cat ___", "--steps", "3"]) == 0
    said = capsys.readouterr().out
    assert "\nthe cat " in said


def test_backbones_that_cannot_be_used_are_said_before_the_training(backbone, here, capsys):
    Path("story.txt").write_text(STORY * 150, "utf-8")
    arguments = "--preset ar --backbone lm --text story.txt --length".split()
    Path("lm/model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\nsize 9\n", "utf-8")
    assert "the backbone lm cannot be loaded as a language model" in complaint(
        capsys, train.main, *arguments, "16")
    assert not Path("runs").exists()


def test_weights_that_would_not_be_loaded_are_said(backbone, here, capsys):
    """As torch.compile names them, and one that is not there."""
    from safetensors.torch import load_file, save_file
    Path("story.txt").write_text(STORY * 150, "utf-8")
    weights, arguments = load_file("lm/model.safetensors"), "--preset ar --backbone lm --text " \
        "story.txt --length 16".split()
    for changed in ({f"_orig_mod.{name}": w for name, w in weights.items()},
                    {name: w for name, w in weights.items() if "layers.0.mlp.up" not in name}):
        save_file(changed, "lm/model.safetensors", metadata={"format": "pt"})
        said = complaint(capsys, train.main, *arguments)
        assert "the backbone lm cannot be loaded" in said
        assert "its file lacks weights, or has others: " in said
    assert "model.layers.0.mlp.up_proj.weight" in said and not Path("runs").exists()


def test_ids_that_no_text_has_are_no_noise(backbone, here):
    """Some vocabularies are longer than their tokenizer, so that a GPU likes the size. These
    weights are in bfloat16, in several files."""
    Path("lm/model.safetensors").unlink()
    LlamaForCausalLM(LlamaConfig(**COMMON)).bfloat16().save_pretrained("lm", max_shard_size="9KB")
    assert len(list(Path("lm").glob("*.safetensors"))) > 1
    Path("story.txt").write_text(STORY, "utf-8")
    n = tokenizer().get_vocab_size()
    assert n < COMMON["vocab_size"]
    run = train.parse("--preset ar --backbone lm --text story.txt --length 16".split())
    model = train.Corpus(run).build(run)
    source = model.corrupt({"text": torch.zeros(200, 16).long()}, {"text": torch.tensor(True)}, 0.)
    assert source["text"].unique().tolist() == list(range(n))
    assert {len(p) for p in model.net.trunk.vocabulary["text"].parameters()} == {n}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    again = fudoki.Fudoki(**{k: v for k, v in model.hparams.items()})    # as a checkpoint does
    again.load_state_dict(model.state_dict())


def test_a_tokenizer_without_a_beginning_begins_with_its_end_and_needs_one(backbone, here):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="</s>").save_pretrained("lm")
    run = train.parse("--preset ar --backbone lm --text story.txt".split())
    options, _, eos, _ = train.load_backbone(run)
    assert options["trunk_options"]["bos"] == eos == 1
    PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<s>").save_pretrained("lm")
    with pytest.raises(sample.InputError, match="lm cannot .* has no token that ends a text"):
        train.load_backbone(run)


def test_a_text_keeps_its_length_through_a_tokenizer_that_cuts(backbone, here):
    """Saved with truncation, padding and dropout, all of which would change the text."""
    saved = json.loads(Path("lm/tokenizer.json").read_text("utf-8"))
    saved["truncation"] = dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)
    saved["padding"] = dict(strategy={"Fixed": 40}, direction="Right", pad_to_multiple_of=None,
                            pad_id=1, pad_type_id=0, pad_token="</s>")
    saved["model"]["dropout"] = 0.5
    Path("lm/tokenizer.json").write_text(json.dumps(saved), "utf-8")
    _, made, eos, _ = train.load_backbone(train.parse("--preset ar --backbone lm".split()))
    words, plain = fudoki.Text(made, 16, eos), tokenizer().encode(STORY, add_special_tokens=False)
    assert words.ids(STORY) == plain.ids and len(plain.ids) > 600


def test_digits_through_a_language_model(backbone, capsys):
    assert train.main(["--preset", "smoke", "--backbone", "lm", "--codes", "32", "--patch", "14",
                       "--train-images", "600", "--test-images", "20", "--drawings", "20",
                       *SHORT]) == 0
    out = capsys.readouterr().out
    assert "drawing, 4 race steps" in out and "reading, steps 4, greedy" in out
    assert sample.main(["a bold slanted seven", "--n", "2"]) == 0
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
    x_1 = sample.take(data.tokens(model)[1], slice(0, 64))
    free = {"text": torch.arange(32).expand(64, 32) == 31}  # as in its training: the last token
    pretrained = model.loss(x_1, free, 0.)[0].item()
    random = fudoki.Backbone(**model.hparams.trunk_options)
    assert [f"{trunk.words.weight.std():.2f}" for trunk in (model.net.trunk, random)] == [
        "0.50", "0.02"]                                     # as the book says (chapter 10)
    model.net.trunk.load_state_dict(random.state_dict())
    assert pretrained < model.loss(x_1, free, 0.)[0].item() - 1


# ------------------------------------------------------------------------- a folder of one's own

@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_folder_is_learned(here, capsys, mode):
    folder(mode=mode)
    arguments = ["--data", "mine", "--image-size", "16", "--codes", "16", "--patch", "8"]
    assert train.main([*arguments, *SHORT, *TINY]) == 0
    out = capsys.readouterr().out
    assert "the folder mine" in out and "reading" in out and "drawing, read by the model" in out
    model, _ = sample.open_model()
    patches = model.tokens["image"]
    assert (patches.patch, patches.size, patches.channels) == (8, 16, 3)
    assert (model.tokens["text"].length, patches.length) == (7, 4)
    assert sample.main(["a red disk", "--n", "1"]) == 0
    with Image.open("samples.png") as picture:
        assert picture.size == (64, 64)
    assert sample.main(["--image", "mine/0.png"]) == 0
    assert sample.main(["a ___ disk"]) == 0
    error = complaint(capsys, sample.main, "--image", "mine/0.png", "--ask", "what")
    assert "learned no questions" in error
    error = complaint(capsys, sample.main, "a red disc")
    assert "a part of 'a red disc' is unknown; known: , " in error


def test_questions_about_ones_own_pictures(here, capsys):
    path, rows = folder()
    write(path, [(name, f"What colour? {text.split()[1]}") for name, text in rows])
    arguments = ["--data", "mine", "--image-size", "16", "--codes", "16", "--patch", "8"]
    assert train.main([*arguments, *SHORT, *TINY]) == 0
    for question in ("what colour", "What colour?"):
        assert sample.main(["--image", "mine/0.png", "--ask", question]) == 0
        assert "colour?" not in capsys.readouterr().out.split("\n")[-2]
    assert sample.main(["--image", "mine/0.png", "--keep", "left", "what colour? red",
                        "--n", "1"]) == 0


@pytest.mark.parametrize("rows, says", [
    ([("0.png", "")], "0.png has no text"), ([("1.png", "a box")], "No such file"),
    ([("0.png", "a box")], "mine has 1 different pictures; 20 are needed"),
    ([("metadata.csv", "a box")], "mine/metadata.csv is no picture that can be read"),
    (None, "metadata.csv has to be in UTF-8 with the columns file_name and text")])
def test_a_folder_that_cannot_be_used(rows, says, here, capsys):
    path, _ = folder(n=1)
    write(path, rows) if rows else (path / "metadata.csv").unlink()
    assert says in complaint(capsys, train.main, "--data", "mine")


@pytest.mark.parametrize("name, text", [
    ("metadata.csv", '\ufefffile_name,id,text\r\n0.png,7,"a red, round box"\r\n1.png,8,a dot\r\n'),
    ("metadata.jsonl", '{"file_name": "0.png", "text": "a red, round box"}\n'
                       '{"file_name": "1.png", "text": " a dot"}\n')])
def test_metadata_is_read_as_hugging_face_has_it(name, text, here):
    Path("mine").mkdir()
    Path("mine", name).write_text(text, encoding="utf-8")
    assert train.metadata(Path("mine")) == [(Path("mine/0.png"), "a red, round box"),
                                            (Path("mine/1.png"), "a dot")]


@pytest.mark.parametrize("data, says", [
    (b"name,words\n0.png,a\n", "in quotation marks: KeyError('file_name')"),
    (b"file_name;text\n0.png;a\n", "in quotation marks: KeyError('file_name')"),
    (b'file_name,text\n0.png,"a box\n1.png,a dot\n', "unexpected end of data"),
    (b"file_name,text\n0.png,a red, round box\n", "a text with commas or line breaks in "),
    ("file_name,text\n0.png,caf\u00e9\n".encode("latin-1"), "UnicodeDecodeError"),
    (b'file_name,text\n0.png,"a\nb"\n1.png,""\n', "1.png has no text"),
    (b"file_name,text\n\n\n0.png\n", "in quotation marks: AttributeError")])
def test_what_is_wrong_with_the_captions_is_said(data, says, here, capsys):
    folder(n=20)
    Path("mine", "metadata.csv").write_bytes(data)
    assert says in complaint(capsys, train.main, "--data", "mine")


def own_pictures(*arguments):
    run = train.parse(["--data", "mine", "--image-size", "16", *arguments])
    return train.Folder(run)


def test_pictures_are_held_out_with_all_their_captions_whatever_the_seed(here):
    """Five captions each, some files twice; then thirty more pictures."""
    path, rows = folder(n=60)
    copies = [f"copy{i}.{kind}" for i, kind in enumerate(["png", "bmp", "tiff", "png", "bmp"])]
    for i, copy in enumerate(copies):
        Image.open(path / f"{i}.png").save(path / copy)
    names = [name for name, _ in rows] + copies
    many = [(name, f"caption {i} of {name}") for name in names for i in range(5)]

    def parts(*arguments):
        data = own_pictures(*arguments)
        return [{text.split()[-1] for text in part[1]}
                for part in (data.test, data.held_out, data.train)]

    def same(part):                                             # a copy is the same picture
        return {name.replace("copy", "").split(".")[0] for name in part}
    write(path, many[:250])
    before = parts()
    assert parts("--seed", "7") == before
    write(path, many)
    test, held_out, training = parts()
    for part, was in zip((test, held_out, training), before):
        assert part and was <= part
    assert not (same(test) | same(held_out)) & same(training) and not same(test) & same(held_out)
    assert len(test) + len(held_out) + len(training) == len(names)


def test_a_folder_is_resumed_with_its_own_settings_and_pictures_that_were_added(here, capsys):
    path, rows = folder(n=60, mode="L")
    write(path, rows[:40])
    first = "--image-size 16 --codes 16 --patch 8".split()
    assert train.main(["--data", "mine", *first, *SHORT, *TINY]) == 0
    Image.new("RGB", (30, 30), "red").save(path / "colour.png")
    write(path, [*rows, ("colour.png", "a red box")])
    assert train.main(["score"]) == 0
    assert train.main(["--data", "mine", "--resume", "--steps", "6", "--threads", "1"]) == 0
    write(path, [*rows, ("colour.png", "a green box")])
    error = complaint(capsys, train.main, "--preset", "folder", "--resume", "--steps", "8")
    assert "does not fit the model: a part of 'a green box' is unknown" in error
    error = complaint(capsys, train.main, "--data", "mine", "--resume", "--image-size", "32")
    assert "--image-size 32 contradicts runs/folder/model.ckpt, which has 16" in error


def test_what_would_be_a_blank_in_a_caption_is_none(here):
    path, rows = folder(n=30)
    write(path, [(name, text.replace(" ", "___", 1)) for name, text in rows])
    data = own_pictures()
    assert "___" not in "".join(data.examples) and data.examples[0].startswith("a__")
    assert (data.rows(data.build(train.parse(["--data", "mine", "--image-size", "16", "--codes",
                                              "16"])), *data.train)[0]["text"] >= 0).all()


def test_a_report_of_ones_own_pictures_compares_what_is_read_with_what_is_there(here,
                                                                                monkeypatch):
    folder(n=40)
    arguments = "--data mine --image-size 16 --codes 16 --patch 8".split()
    run = train.parse(arguments)
    data = train.Folder(run)
    model = data.build(run)
    truth = model.tokens["text"].decode(data.rows(model, *data.test)[0]["text"])
    monkeypatch.setattr(train, "read", lambda *_: [truth[0], *(["a red"] * (len(truth) - 1))])
    rows = dict(data.report(model, run, {}))
    words = len(truth[0].split()) + sum("red" in text for text in truth[1:]) + len(truth) - 1
    assert rows["reading"] == pytest.approx(
        dict(captions=1 / len(truth), words=words / sum(len(text.split()) for text in truth)))


def test_the_words_of_a_backbone_lie_on_a_sphere(backbone, here):
    run = train.parse(["--preset", "ar", "--backbone", "lm"])
    length = train.load_backbone(run)[3].norm(dim=-1)
    known = length[length > 0]                                  # the others are for padding
    assert len(known) > 40 and torch.allclose(known, torch.ones_like(known), atol=1e-5)


def test_held_out_windows_stand_side_by_side_and_those_of_training_begin_anywhere(here):
    Path("long.txt").write_text("".join(map(chr, range(0x4e00, 0x4e00 + 3000))), "utf-8")
    run = train.parse("--preset text --text long.txt --length 25".split())
    data = train.Corpus(run)
    training, held_out = (rows["text"] for rows in data.tokens(data.build(run)))
    assert training.shape == (2676, 25) and held_out.shape == (12, 25)
    assert len(held_out.unique()) == 300 and torch.equal(training[1, :-1], training[0, 1:])


def test_too_few_digits_are_refused_and_every_question_is_asked(here, monkeypatch):
    monkeypatch.setattr(train, "read_idx", lambda folder, name: (
        torch.zeros(19, 28, 28) if "images" in name else torch.zeros(19, dtype=torch.long)))
    with pytest.raises(sample.InputError, match="needed are at least 20 squares"):
        train.read_digits(Path("none"), "train")
    torch.manual_seed(0)
    some = torch.rand(1300, 1, 28, 28), torch.arange(1300) % 10
    monkeypatch.setattr(train.Digits, "load", lambda self, run: setattr(
        self, "origin", "noise") or [some, some])
    run = train.parse("--preset toy --codes 16 --patch 14 --ask 0.3".split())
    data = train.Digits(run)
    texts = data.build(run).tokens["text"].decode(data.tokens(data.build(run))[0]["text"])
    asked = [text.partition("?")[0] for text in texts if "?" in text]
    assert len(asked) == int(0.3 * len(texts))
    assert all(asked.count(kind) > len(asked) / 4
               for kind in ("what digit", "is bold", "is slanted"))


def test_a_small_folder_has_a_picture_of_every_part(here, monkeypatch):
    """Also if chance, the checksums, puts all of them into one."""
    folder(n=30)
    sums = itertools.count(5, 10)
    monkeypatch.setattr(train, "zlib", SimpleNamespace(crc32=lambda _: next(sums)))
    data = train.Folder(train.parse("--data mine --image-size 16".split()))
    assert [len(part[0]) for part in (data.test, data.held_out, data.train)] == [1, 1, 28]


def test_a_text_is_learned_but_for_its_last_tenth(here):
    Path("long.txt").write_text("".join(chr(97 + i // 1000) for i in range(10_000)), "utf-8")
    data = train.Corpus(train.parse("--preset text --text long.txt --length 50".split()))
    assert {*data.train} == {*"abcdefghi"} and {*data.test} == {"j"}
    words = train.Text(train.tokenizer("ab", characters=True), 8, window=True)
    a, b = words.ids("ab")
    assert data.stream(words, "ab<|endoftext|>\nb\n", 7).tolist() == [a, b, 7, b, 7]
    assert data.stream(words, "abb", None).tolist() == [a, b, b]


def test_validation_has_the_pictures_that_are_held_out(here):
    folder(n=60)
    data = train.Folder(train.parse("--data mine --image-size 16 --codes 16 --patch 8".split()))
    model = data.build(train.parse("--data mine --image-size 16 --codes 16 --patch 8".split()))
    for rows, (pictures, texts) in zip(data.tokens(model), (data.train, data.held_out)):
        assert torch.equal(rows["image"], model.tokens["image"].encode(pictures))
        assert model.tokens["text"].decode(rows["text"]) == texts


def test_whatever_a_decoder_raises_the_picture_is_named(here):
    path, _ = folder(n=3)
    (path / "1.png").write_bytes((path / "1.png").read_bytes()[:90])
    (path / "2.png").unlink()
    (path / "2.png").mkdir()
    Image.fromarray(np.linspace(0, 5, 64, dtype=np.float32).reshape(8, 8)).save(path / "3.tiff")
    for name in ("1.png", "2.png", "3.tiff", "4.png"):
        with pytest.raises(sample.InputError, match=f"{name} is no picture that can be read"):
            sample.open_picture(path / name)


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
    assert sample.open_picture(path / "1.png").size == (20, 60)
    write(path, [(f"{i}.png", f"number {i}") for i in range(20)])
    data = train.Folder(train.parse(["--data", "two", "--image-size", "16"]))
    images = torch.cat([part[0] for part in (data.train, data.held_out, data.test)])
    assert images.shape == (20, 3, 16, 16) and len(data.examples) == 20 and (images > 0.9).all()


@pytest.mark.parametrize("arguments, says", [
    ("--preset text --text none.txt", "'none.txt' is no file in UTF-8"),
    ("--preset text", "--text '' is no file in UTF-8"),
    ("--preset text --text empty.txt", "0 characters are too few for --length 128"),
    ("--preset text --text binary.txt", "'binary.txt' is no file in UTF-8"),
    ("--preset toy --text empty.txt", "unrecognized arguments: --text"),
    ("--preset ar --text story.txt --backbone none", "the backbone none cannot be loaded"),
    ("--preset text --text story.txt --trunk backbone", "--trunk backbone needs a --backbone")])
def test_mistakes_with_texts(arguments, says, here, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("empty.txt").write_text("", "utf-8")
    Path("binary.txt").write_bytes(bytes(range(256)) * 100)
    Path("story.txt").write_text(STORY * 20, "utf-8")
    Path("empty").mkdir()
    assert says in complaint(capsys, train.main, *arguments.split())
    assert not Path("runs").exists()
