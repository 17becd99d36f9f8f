"""What a user types: every command works, and every mistake ends in one line and exit code 2."""
import csv
import gzip
import math
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import fudoki
import sample
import train

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data" / "MNIST"
TINY = ("--codes 32 --patch 14 --width 16 --depth 1 --heads 1 --train-images 600 --test-images 60 "
        "--drawings 20").split()
PICTURE = "runs/smoke/picture.png"


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, world):
    """A folder in which `python train.py --preset smoke` was run, a little shorter."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(world.Judge, "STEPS", 75)
        assert train.main("""--preset smoke --steps 200 --val-every 100 --seed 1
                          --test-images 500 --drawings 100""".split()) == 0
    return folder


@pytest.fixture
def here(smoke, monkeypatch):
    monkeypatch.chdir(smoke)
    return smoke


def complaint(capsys, main, *arguments):
    """The last line of stderr with which main ends; before it stands nothing but the usage."""
    capsys.readouterr()
    try:
        assert main([str(a) for a in arguments]) == 2
    except SystemExit as end:
        assert end.code == 2
    *usage, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"{main.__module__}.py") and all(
        line.startswith(" ") for line in usage[1:]), (usage, error)
    return error


# ---------------------------------------------------------------------------------------- training

def test_smoke_learns_and_reports(smoke):
    run = smoke / "runs/smoke"
    assert {p.name for p in run.iterdir()} == \
        {"model.ckpt", "samples", "log", "report.csv", "picture.png"}
    report = csv.DictReader(open(run / "report.csv", encoding="utf-8"))
    rows = {row["what"].split(",")[0]: row for row in report}
    assert set(rows) == {"judge", "ceiling", "drawing", "reading", "answers"}
    assert float(rows["judge"]["digit"]) > 0.9
    for what, digit, caption in (("drawing", 0.55, 0.4), ("reading", 0.35, 0.25)):
        assert float(rows[what]["digit"]) > digit and float(rows[what]["caption"]) > caption
    assert "rendered" in rows["reading"]["data"] and rows["reading"]["frechet"] == ""
    log = list(csv.DictReader(open(next(run.glob("log/*/metrics.csv")), encoding="utf-8")))
    last = [row for row in log if row["val_image_loss_t0.05"]][-1]
    assert float(last["val_image_loss_t0.05"]) > float(last["val_image_loss_t0.95"])


def test_checkpoint_holds_all_of_the_averaged_model(here):
    path = Path("runs/smoke/model.ckpt")
    saved = torch.load(path, weights_only=True)
    model, found = sample.open_model()
    assert found == path and not model.training
    for k, v in model.state_dict().items():
        assert torch.equal(v.cpu(), saved["state_dict"][k]), k
    raw = saved["current_model_state"]
    assert any((raw[k] != v).any() for k, v in saved["state_dict"].items())
    made = fudoki.Fudoki(**saved["hyper_parameters"])
    made.load_state_dict(saved["state_dict"])
    assert torch.equal(made.net.input["image"].vectors, model.paths["image"].embedding.cpu())
    torch.manual_seed(0)                                        # the last grid again: same weights
    texts = train.Digits.examples
    save_image(sample.draw(model, texts), here / "again.png", nrow=10)
    grid = sorted(here.glob("runs/smoke/samples/step*.png"))[-1]
    again, grid = (np.asarray(Image.open(path)) for path in (here / "again.png", grid))
    assert (again == grid).mean() > 0.999


class Killed(BaseException):
    """As far as a training is concerned, SIGKILL: nothing is saved any more."""


def interrupt(how):
    """Another Keep.on_train_batch_end: a signal or the end after seven steps."""
    own = train.Keep.on_train_batch_end

    def on_train_batch_end(keep, trainer, *others):
        if trainer.global_step == 7:
            how()
        own(keep, trainer, *others)
    return on_train_batch_end


def killed():
    raise Killed


@pytest.fixture
def heard(number):
    """Also where the suite itself runs in the background, with SIGINT ignored."""
    before = signal.signal(number, signal.default_int_handler)
    yield
    signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_resume_goes_on(number, heard, no_judge, tmp_path,
                                                         monkeypatch, capsys):
    """Bit for bit as without a break, and so it does after SIGKILL, from the last checkpoint."""
    monkeypatch.chdir(tmp_path)
    before, path = signal.getsignal(number), tmp_path / "runs/smoke/model.ckpt"
    arguments = ["--preset", "smoke", *TINY, "--steps", "12", "--val-every", "5"]

    def weights():
        saved = torch.load(path, weights_only=True)
        return saved["global_step"], {kind: saved[kind] for kind in (
            "state_dict", "current_model_state")}

    with monkeypatch.context() as patch:
        patch.setattr(train.Keep, "on_train_batch_end", interrupt(
            lambda: signal.raise_signal(number)))
        assert train.main(arguments) == 0
    assert "--resume" in capsys.readouterr().out and signal.getsignal(number) is before
    assert weights()[0] == 7
    assert train.main(["--preset", "smoke", "--steps", "12", "--resume"]) == 0
    step, ended = weights()
    assert step == 12 and not path.with_name("previous.ckpt").exists()
    if number == signal.SIGINT:                     # only reports, then has more to do
        assert train.main([*arguments, "--resume"]) == 0
        assert torch.equal(weights()[1]["state_dict"]["net.free"], ended["state_dict"]["net.free"])
        assert train.main(["--preset", "smoke", "--steps", "15", "--resume"]) == 0
        step, more = weights()
        assert step == 15 and (more["state_dict"]["net.free"]
                               != ended["state_dict"]["net.free"]).any()

    assert train.main(arguments) == 0               # without a break
    _, whole = weights()
    assert path.with_name("previous.ckpt").exists()
    report = list(csv.DictReader(open(path.with_name("report.csv"), encoding="utf-8")))
    assert len({row["what"] for row in report}) == len(report)      # of this run, not of others
    if number == signal.SIGTERM:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(train.Keep, "on_train_batch_end", interrupt(killed))
            train.main(arguments)
        assert weights()[0] == 5
        path.with_suffix(".part").write_text("what was written when it was killed", "utf-8")
        assert train.main([*arguments, "--resume"]) == 0
        assert not path.with_suffix(".part").exists()
    for other in (ended, weights()[1]):
        for kind in whole:
            for k, v in whole[kind].items():
                assert torch.equal(v, other[kind][k]), (kind, k)


def test_runs_with_names_do_not_touch_each_other(no_judge, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "smoke", *TINY, "--steps", "8", "--val-every", "4"]
    assert train.main([*arguments, "--name", "second try"]) == 0
    assert "runs/second_try. Next" in capsys.readouterr().out
    assert train.main(arguments) == 0
    first, second = (Path(f"runs/{name}/model.ckpt") for name in ("second_try", "smoke"))
    before = second.read_bytes()
    assert train.main(["--preset", "smoke", "--name", "second try", "--resume", "--steps",
                       "9"]) == 0
    assert train.settings(first)[1] == 9 and second.read_bytes() == before
    assert train.main(["score", str(first), "--test-images", "20"]) == 0


def test_a_second_run_in_the_same_folder_ends_the_first(no_judge, tmp_path, monkeypatch, capsys):
    """Without it both say "saved", and one of them is lost."""
    monkeypatch.chdir(tmp_path)
    path = Path("runs/smoke/model.ckpt")

    def another():
        path.replace(path.with_name("previous.ckpt"))
        path.write_bytes(b"of another run")
    monkeypatch.setattr(train.Keep, "on_train_batch_end", interrupt(another))
    said = complaint(capsys, train.main, "--preset", "smoke", *TINY, "--steps", "10",
                     "--val-every", "5")
    assert "another run writes runs/smoke/model.ckpt, too" in said and "--name" in said
    assert path.read_bytes() == b"of another run"
    assert train.settings(path.with_name("previous.ckpt"))[1] == 5


def test_all_that_may_end_a_run_saves_it_but_nohup_stays(tmp_path, monkeypatch):
    """A closed terminal, the time limit of SLURM (`--signal=USR1@120`)."""
    run = SimpleNamespace(resume=False)
    monkeypatch.setattr(signal, "signal", lambda name, handler: set_up.append(name))
    for ignored in ({signal.SIGHUP}, set()):
        monkeypatch.setattr(signal, "getsignal", lambda name: (
            signal.SIG_IGN if name in ignored else signal.SIG_DFL))
        set_up = []
        train.Keep(run, tmp_path, None).on_train_start(None, None)
        assert {*set_up} | ignored == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP,
                                       signal.SIGUSR1}
        assert not ignored & {*set_up}


def test_a_run_may_be_started_in_another_thread(no_judge, tmp_path, monkeypatch):
    """Python lets the main thread alone handle signals."""
    monkeypatch.chdir(tmp_path)
    codes, arguments = [], ["--preset", "smoke", *TINY, "--steps", "3"]
    started = threading.Thread(target=lambda: codes.append(train.main(arguments)))
    started.start()
    started.join()
    assert codes == [0] and train.settings("runs/smoke/model.ckpt")[1] == 3


def test_slurm_ends_a_run_as_anything_else_does(no_judge, tmp_path, monkeypatch, capsys):
    """Lightning would write a checkpoint of its own here, and a fresh run would start from it."""
    monkeypatch.chdir(tmp_path)
    for name, value in dict(NTASKS=1, JOB_ID=7, JOB_NAME="toy", PROCID=0, LOCALID=0, NODEID=0,
                            NODELIST="localhost").items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr(train.Keep, "on_train_batch_end", interrupt(
        lambda: signal.raise_signal(signal.SIGUSR1)))
    arguments = ["--preset", "smoke", *TINY, "--steps", "12"]
    assert train.main(arguments) == 0
    assert "go on with --resume" in capsys.readouterr().out
    assert train.settings("runs/smoke/model.ckpt")[1] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert train.main(["--preset", "smoke", "--seed", "1", *TINY, "--steps", "3"]) == 0
    assert train.settings("runs/smoke/model.ckpt")[1] == 3


def test_batches_are_a_function_of_seed_step_and_rank():
    rows, run = {"a": torch.arange(48)[:, None]}, dict(steps=18, batch=8)

    def batches(done=0, rank=0, ranks=1, seed=0):
        made = train.Batches(rows, SimpleNamespace(**run, seed=seed),
                             SimpleNamespace(global_rank=rank, world_size=ranks), done)
        assert len(made) == 18
        return torch.stack([batch["a"][:, 0] for batch in made])
    whole = batches()
    assert torch.equal(whole, batches()) and torch.equal(whole[4:], batches(done=4))
    assert (whole[:6] != batches(seed=1)[:6]).any()
    for epoch in whole.view(3, 48):                             # each row once, before any twice
        assert epoch.unique().numel() == 48
    one, two = (batches(rank=rank, ranks=2) for rank in (0, 1))
    for a, b in zip(one, two):
        assert not {*a.tolist()} & {*b.tolist()}


def test_two_processes_are_one_training(tmp_path, monkeypatch):
    """The ranks end with the same weights, bit for bit, see other rows and other noise, and end
    together."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "report", lambda *arguments, **same: None)
    begin, seen = train.Keep.on_train_batch_start, []

    def watch(keep, trainer, model, batch, index):
        begin(keep, trainer, model, batch, index)
        seen.append((batch["image"], torch.get_rng_state()))
        if index == 8 and trainer.global_rank == 1:
            signal.raise_signal(signal.SIGTERM)

    def end(keep, trainer, model):
        torch.save((seen, model.state_dict()), f"{trainer.global_rank}.pt")
    monkeypatch.setattr(train.Keep, "on_train_batch_start", watch)
    monkeypatch.setattr(train.Keep, "on_train_end", end)
    assert train.main(["--preset", "smoke", *TINY, "--steps", "12", "--val-every", "4", "--batch",
                       "8", "--devices", "2", "--accelerator", "cpu", "--strategy",
                       "ddp_fork"]) == 0
    (a, weights), (b, others) = (torch.load(f"{i}.pt") for i in (0, 1))
    assert len(a) == len(b) == 9
    assert not any((x == y).all() for one, two in zip(a, b) for x, y in zip(one, two))
    assert all(torch.equal(v, others[k]) for k, v in weights.items())


@pytest.mark.parametrize("arguments, says", [
    ("--lr 0.001", "--lr 0.001 contradicts runs/smoke/model.ckpt, which has 0.006: leave it out"),
    ("--path uniform", "--path uniform contradicts"),
    ("--path-options exponent=4", "--path-options {'exponent': 4} contradicts"),
    ("--codes 64 --seed 3", "which has 128")])
def test_what_belongs_to_the_model_cannot_be_changed_when_resumed(here, arguments, says, capsys):
    before = Path("runs/smoke/model.ckpt").read_bytes()
    assert says in complaint(capsys, train.main, "--preset", "smoke", "--resume",
                             *arguments.split())
    run = train.parse("--preset smoke --resume --width 64 --steps 9 --seed 5".split())
    assert (run.codes, run.width, run.steps, run.seed) == (128, 64, 9, 5)   # what agrees may stand
    assert Path("runs/smoke/model.ckpt").read_bytes() == before


def test_a_checkpoint_scores_as_after_its_training(no_judge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--preset", "smoke", *TINY, "--steps", "20"]) == 0
    before = Path("runs/smoke/report.csv").read_text("utf-8")
    assert train.main(["score", "--csv", "scores.csv"]) == 0
    columns = "what", "digit", "caption", "frechet", "training_steps", "data"
    first, again = ([[row[c] for c in columns] for row in csv.DictReader(lines.splitlines())]
                    for lines in (before, Path("scores.csv").read_text("utf-8")))
    assert first == again and Path("runs/smoke/report.csv").read_text("utf-8") == before


def test_scores_with_other_options_add_up(here, no_judge, world, monkeypatch):
    monkeypatch.setattr(world, "answers", lambda *arguments: {})                # saves seconds
    for options in ("--steps 2 --step race", "--step euler --steps 3 --guidance 1 --seed 3"):
        options += " --test-images 60 --drawings 20 --csv table.csv"
        assert train.main(["score", "runs/smoke/model.ckpt", *options.split()]) == 0
    Path("mine.csv").write_text("a,b\n1,2\n", "utf-8")
    assert train.main("score --test-images 60 --drawings 20 --csv mine.csv".split()) == 2
    assert Path("mine.csv").read_text("utf-8") == "a,b\n1,2\n"           # another table stays
    table = csv.DictReader(open("table.csv", encoding="utf-8"))
    drawn = [row for row in table if "drawing" in row["what"]]
    assert [[row[k] for k in ("step", "steps", "guidance", "seed")] for row in drawn] == \
        [["race", "2", "2.0", "1"], ["euler", "3", "1.0", "3"]]


def test_the_real_has_as_many_pictures_as_the_drawing_and_neither_is_measured_on_itself(
        here, no_judge, world, monkeypatch):
    """A model that draws exactly the test images: its Fréchet distance is that of the real ones,
    of which the others are as many parts."""
    asked = []

    def copy(model, texts, **options):
        asked.extend(texts)
        return model.tokens["image"].decode(image[[seen.index(text) for text in texts]])
    run = train.parse(["--preset", "smoke", "--drawings", "200", "--test-images", "400"])
    data, model = world.Rendered(run), sample.open_model("runs/smoke/model.ckpt")[0].cpu()
    rows, seen = data.rows(model, *data.test)
    image = rows["image"]
    monkeypatch.setattr(world, "draw", copy)
    monkeypatch.setattr(world, "read", lambda model, tokens, asked=None: asked or seen)
    found = {what.split(",")[0]: numbers for what, numbers in data.report(model, run, {})}
    assert 0 < found["ceiling"]["frechet"] and 0 < found["drawing"]["frechet"]
    assert asked != seen[:200] and len(asked) == 200                # in another order
    assert all(found[what]["digit"] < 0.5 for what in ("judge", "ceiling", "drawing"))  # by chance
    assert found["reading"]["caption"] < 0.2                # here they are read in the old order


def test_the_digit_is_the_last_word_and_the_real_are_compared_with_the_others(world):
    assert world.right(["a bold slanted two", "a thin upright two", "one"],
                       ["a thin slanted two", "a thin upright six", "a one"]) == \
        dict(digit=2 / 3, caption=0.)
    near, far = torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(0))
    far = far + 5
    parts = world.frechet_of_parts(torch.cat([near, far]), 400)
    assert math.isclose(parts, world.frechet(near, far), rel_tol=1e-6) and parts > 60


def test_samples_per_second_are_those_of_all_ranks(monkeypatch):
    """Ten steps of eight rows on each of two processes in four seconds; every held-out row is
    validated once, and the model is left as sampling wants it."""
    model, clock, calls = SimpleNamespace(), iter([100., 104.]), []
    model.train, model.eval = (lambda: calls.append("train") or model,
                               lambda: calls.append("eval") or model)
    model.to = lambda device: model
    trainer = SimpleNamespace(fit=lambda *args, **options: calls.append(args), world_size=2,
                              global_step=13, strategy=SimpleNamespace(root_device=0))
    rows = {"a": torch.arange(130)[:, None]}
    data = SimpleNamespace(tokens=lambda model: (rows, rows))
    monkeypatch.setattr(train.time, "time", lambda: next(clock))
    monkeypatch.setattr(train, "contract", lambda *of: calls.append(of[0]))
    run = SimpleNamespace(seed=0, batch=8, steps=13)
    assert train.fit(trainer, model, data, run, done=3) == 10 * 8 * 2 / 4
    rows_are_checked, first, (_, _, validation), last = calls
    assert (rows_are_checked, first, last) == ("rows", "train", "eval")
    assert torch.equal(torch.cat([batch["a"] for batch in validation]), rows["a"])


def test_threads_are_as_many_as_are_asked_for():
    before = torch.get_num_threads()
    train.quietly(SimpleNamespace(seed=0, threads=before + 1))
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before + 1


def test_a_region_that_is_not_kept_is_all_but_that_one():
    inside = sample.region("1:0-2:1", 4)
    assert inside.view(4, 4).nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert torch.equal(sample.region("not 1:0-2:1", 4), ~inside)


@pytest.mark.parametrize("side", [6, 7])
def test_top_and_left_are_halves_without_the_middle_and_bottom_and_right_mirror_them(side):
    half = sample.region("top", side).view(side, side)
    assert half[:side // 2].all() and not half[side // 2:].any()
    for name, seen in (("bottom", half.flip(0)), ("left", half.T), ("right", half.flip(0).T)):
        assert torch.equal(sample.region(name, side).view(side, side), seen), name


@pytest.mark.parametrize("when", ["at once", "between two checks"])
def test_a_failed_run_says_so_and_leaves_the_old_model(when, here, capsys, monkeypatch):
    path = Path("runs/smoke/model.ckpt")
    before = path.read_bytes()
    if when != "at once":
        monkeypatch.setattr(train.Keep, "on_train_batch_end", lambda *args: None)
    error = complaint(capsys, train.main, "--preset", "smoke", *TINY, "--steps", 40,
                      "--lr", "1e9", "--val-every", 30)
    step = 20 if when == "at once" else 30
    assert f"weights are not finite at step {step}: lower --lr" in error
    assert path.read_bytes() == before and not list(path.parent.glob("*.part"))


def test_a_disk_that_is_full_is_said_and_leaves_the_old_model(here, capsys):
    path = Path("runs/smoke/model.ckpt")
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        assert train.main(["--preset", "smoke", *TINY, "--steps", "2"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: ") and "File too large" in error
    assert path.read_bytes() == before and not list(path.parent.glob("*.part"))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_paths_stay_in_float32_in_any_precision(precision, no_judge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen, plain = set(), fudoki.MetricPath.logits

    def logits(path, x_1, t):
        l = plain(path, x_1, t)
        seen.update({t.dtype, path.embedding.dtype, l.dtype})
        seen.update(buffer.dtype for buffer in getattr(path, "clock", path).buffers())
        return l
    monkeypatch.setattr(fudoki.MetricPath, "logits", logits)
    assert train.main(["--preset", "smoke", *TINY, "--steps", "4", "--val-every", "2",
                       "--precision", precision]) == 0
    assert seen == {torch.float32} and sample.main(["seven", "--n", "1"]) == 0
    made = sample.open_model()[0].cpu()
    assert next(made.net.parameters()).dtype == torch.float32
    path = made.paths["image"]
    before = path.clock.table.clone()
    assert path.to(torch.bfloat16) is path and torch.equal(path.clock.table, before)


def test_without_mnist_digits_are_rendered_and_everybody_is_told(no_judge, tmp_path, monkeypatch,
                                                                 capsys):
    def unreachable(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")
    monkeypatch.setattr(train, "MNIST", unreachable)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--preset", "toy", *TINY, "--steps", "3"]) == 0
    assert "MNIST CANNOT BE DOWNLOADED" in capsys.readouterr().out
    assert sample.main(["seven"]) == 0
    assert "since MNIST could not be downloaded" in capsys.readouterr().out
    assert "train-images-idx is no whole file" in complaint(
        capsys, train.main, "--data-dir", tmp_path)


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/MNIST")
def test_real_mnist_from_a_folder(tmp_path, monkeypatch):
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    for file in REAL.glob("raw/*.gz"):
        shutil.copyfile(file, tmp_path / "MNIST/raw" / file.name)
    run = train.parse(["--data-dir", str(tmp_path), "--train-images", "500",
                       "--test-images", "300"])
    data = train.Digits(run)
    images, digits = (torch.cat(parts) for parts in zip(data.held_out, data.train))
    assert data.origin.startswith("the digits in ")
    assert images.shape == (500, 1, 28, 28) and len(data.test[0]) == 300
    first = gzip.open(REAL / "raw/train-labels-idx1-ubyte.gz").read()[8:18]
    assert digits[:10].tolist() == list(first) and images.max() == 1
    found = train.captions(images, digits)
    words = [set(words) for words in zip(*(caption.split()[1:3] for caption in found))]
    assert words == [{"thin", "bold"}, {"upright", "slanted"}]


def test_captions_say_what_is_in_the_picture():
    y, x = torch.meshgrid(torch.arange(28.), torch.arange(28.), indexing="ij")
    def bar(width, slant):
        return ((x - 14 + slant * (y - 14)).abs() < width).float() * ((y - 14).abs() < 9)
    bars = (1.5, 0), (4, 0), (1.5, 0.5), (4, 0.5), (1.5, -0.5)
    images = torch.stack([bar(*one) for one in bars])[:, None]
    assert train.captions(images, torch.tensor([1, 1, 7, 7, 0])) == [
        "a thin upright one", "a bold upright one", "a thin slanted seven", "a bold slanted seven",
        "a thin upright zero"]


def test_frechet_distance_of_known_gaussians(world):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(100_000, 3, generator=g)
    b = torch.randn(100_000, 3, generator=g) * 2 + torch.tensor([1., 0, 0])
    assert abs(world.frechet(a, b) - (1 + 3 * (2 - 1) ** 2)) < 0.05
    assert abs(world.frechet(a, a)) < 1e-6
    assert np.isnan(world.frechet(a, b[:1]))            # LAPACK crashes on what is not a number


# ---------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("prompt, caption", [
    ("a bold slanted seven", "a bold slanted seven"), ("seven bold", r"a bold \w+ seven"),
    ("", r"a \w+ \w+ \w+")])
def test_draw(prompt, caption, here, capsys):
    """From a caption, from some of its words, from nothing; a seed decides the picture."""
    for out in ("one.png", "two.png"):
        assert sample.main([*prompt.split(), "--n", "5", "--seed", "3", "--out", out]) == 0
        said = capsys.readouterr().out
        assert f"{out}: 5 drawn" in said and "█" in said
        assert len(re.findall(f"^{caption}$", said, re.M)) == 5
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    assert Image.open("one.png").size == (3 * (28 * 4 + 8) + 8, 2 * (28 * 4 + 8) + 8)


@pytest.mark.parametrize("how", [*(f"--step {step}" for step in fudoki.STEPS),
                                 *(f"--velocity {name}" for name in fudoki.VELOCITIES)])
def test_draw_in_every_way(how, here):
    assert sample.main(["seven", "--n", "2", "--steps", "3", *how.split()]) == 0


def test_a_picture_is_changed_where_it_is_not_kept(here, capsys):
    """The kept patches come out as they went in, all others are drawn anew."""
    model = sample.open_model("runs/smoke/model.ckpt")[0]
    digit = torch.from_numpy(np.array(Image.open(PICTURE).convert("L")))[None, None] / 255
    decoded = model.tokens["image"].decode(model.tokens["image"].encode(digit))[0, 0]
    for region, kept in (("top", np.s_[:14]), ("right", np.s_[:, 14:]), ("1:0-2:3", np.s_[7:21])):
        arguments = ["--image", PICTURE, "--keep", region, "bold upright two", "--n", "1"]
        assert sample.main([*arguments, "--out", "kept.png", "--seed", "1"]) == 0
        drawn = torch.from_numpy(np.array(Image.open("kept.png").convert("L")))[::4, ::4] / 255
        same = (drawn - decoded).abs() < 0.01
        assert same[kept].all() and not same.all()
    capsys.readouterr()
    assert sample.main(["--image", PICTURE, "--keep", "top", "--n", "2", "--seed", "1"]) == 0
    # and says what it is
    assert len(re.findall(r"^a \w+ \w+ \w+$", capsys.readouterr().out, re.M)) == 2


def test_a_later_start_has_more_of_the_picture(here, monkeypatch):
    def ended(states, free, model, given):
        image = model.tokens["image"].encode(sample.load_picture(PICTURE, model).to(model.device))
        changed.append((states[0]["image"] != image).float().mean())
    changed = []
    monkeypatch.setattr(sample, "present", ended)
    for start in ("0.1", "0.95"):
        assert sample.main(["--image", PICTURE, "--from", start, "two", "--n", "50"]) == 0
    assert changed[1] < 0.5 < changed[0], changed


def test_a_film_has_every_state(here):
    assert sample.main("a bold upright two --n 4 --seed 1 --gif film.gif".split()) == 0
    film, frames = Image.open("film.gif"), []
    assert film.n_frames == 5 and film.size == (2 * 114 + 2, 2 * 114 + 2)
    for i in range(5):
        film.seek(i)
        frames.append(np.array(film.convert("L")).astype(int))
    last = np.array(Image.open("samples.png").convert("L")).astype(int)
    assert abs(frames[4][2:114, 2:114] - last[8:120, 8:120]).mean() < 3
    assert abs(frames[0] - frames[4]).mean() > 10


def test_the_best_of_some_agrees_better_with_its_caption(here, capsys):
    texts, agreement = train.Digits.examples, []
    model = sample.open_model("runs/smoke/model.ckpt")[0]
    for n in (1, 8):
        torch.manual_seed(0)
        x = sample.fill(model, sample.DRAW, best_of=n, text=model.tokens["text"].encode(texts))
        assert model.tokens["text"].decode(x["text"]) == texts
        given = {m: torch.full_like(x_m, m == "image", dtype=torch.bool) for m, x_m in x.items()}
        agreement.append(sample.agreement(model, x, given).mean().item())
    assert agreement[1] > agreement[0] + 0.05                   # log p, below 0
    assert sample.main("a bold upright two --n 2 --best-of 3".split()) == 0
    assert "samples.png: 2 drawn" in capsys.readouterr().out


def test_logits_of_many_words_take_turns(here, monkeypatch):
    """At most 2²⁸ of them at once: two rows of such a text."""
    model, sizes = sample.open_model()[0], []
    x = {"text": torch.full((5, 4), -1), "image": torch.zeros(5, 16).long()}
    text, generate = model.tokens["text"], model.generate
    monkeypatch.setattr(text, "length", int(2 ** 28 / 2.5 / len(text.embedding)))
    monkeypatch.setattr(model, "generate", lambda x, free, **options: sizes.append(len(x["text"]))
                        or generate(x, free, **options))
    found = sample.fill(model, sample.READ, **x)
    assert sizes == [2, 2, 1] and found["text"].shape == (5, 4)


def test_words_are_filled_before_the_picture_and_a_picture_is_read_once(here, capsys):
    model, _ = sample.open_model("runs/smoke/model.ckpt")
    for words in ("a ___ slanted SEVEN", "SEVEN", ""):
        x, free = sample.given_and_free(sample.parse([words] * bool(words)), model, 5)
        assert not free["text"].any() and free["image"].all()
        assert all("seven" in text for text in model.tokens["text"].decode(x["text"]) if words)
    assert sample.main(["--image", PICTURE]) == 0
    assert len(re.findall(r"^a \w+ \w+ \w+$", capsys.readouterr().out, re.M)) == 1


def test_the_best_is_of_one_request(here, monkeypatch):
    """Words that are left to chance are chosen once for all among which the best is."""
    seen, plain = [], sample.best

    def best(model, x, free, n):
        seen.append(x["text"].view(-1, n, x["text"].shape[1]))
        return plain(model, x, free, n)
    monkeypatch.setattr(sample, "best", best)
    for prompt in (["seven"], []):
        assert sample.main([*prompt, "--n", "6", "--best-of", "4", "--seed", "0"]) == 0
    for texts in seen:
        assert texts.shape[:2] == (6, 4) and (texts == texts[:, :1]).all()
        assert len(texts[:, 0].unique(dim=0)) > 1


def test_a_preview_has_as_many_pictures_as_fit(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for size, n, wide in ((28, 5, 56), (28, 1, 28), (32, 16, 64), (100, 3, 100)):
        sample.preview(torch.ones(n, 1, size, size))
        assert capsys.readouterr().out.splitlines() == ["█" * wide] * (size // 2)


def photo(digit, ground, ink, noise=0.):
    """A digit (28, 28) on a ground of 240 × 300 pixels, with ink as bright as `ink` of it."""
    page = np.zeros((300, 240))
    page[60:228, 40:208] = np.asarray(Image.fromarray(digit).resize((168, 168))) / 255
    page = ground * (1 - page * (1 - ink))
    page = page + noise * np.random.default_rng(0).normal(size=page.shape)
    return Image.fromarray((255 * page.clip(0, 1)).astype(np.uint8))


def test_ink_is_what_differs_from_evenly_lit_paper(world):
    digit = (255 * world.rendered(1, 7)[0][0, 0].numpy()).astype(np.uint8)
    form = np.asarray(sample.training_form(photo(digit, 0.97, 0.05), 28)) / 255
    for ground, ink, noise, far in ((0.45, 0.2, 0, 0.01), (0.8, 0.8, 0, 0.02), (0.2, 4, 0, 0.01),
                                    (0.6, 0.2, 0.03, 0.05), (0.2, 4, 0.03, 0.05)):
        found = sample.training_form(photo(digit, ground, ink, noise), 28)
        assert np.abs(np.asarray(found) / 255 - form).mean() < far < 0.08 < form.mean()
        with pytest.raises(sample.InputError, match="no stroke stands out"):
            sample.training_form(photo(0 * digit, ground, ink, noise), 28)
    for known in (digit, digit // 2):                           # what has the form stays as it is
        assert sample.training_form(Image.fromarray(known), 28) == Image.fromarray(known)
    assert ((np.indices(form.shape) + 0.5) * form).sum((1, 2)) / form.sum() == \
        pytest.approx([14, 14], abs=0.6)                        # the centre of mass
    block = np.full((300, 240), 230, np.uint8)
    block[20:280, 20:220] = 20
    with pytest.raises(sample.InputError, match="no stroke stands out"):
        sample.training_form(Image.fromarray(block), 28)
    y, x = np.meshgrid(np.linspace(-1, 1, 300), np.linspace(-1, 1, 240), indexing="ij")
    with pytest.raises(sample.InputError, match="or its light uneven"):
        sample.training_form(photo(digit, 0.6 - 0.4 * x, 0.5), 28)


def test_what_a_terminal_cannot_show_is_saved_and_shown_otherwise(here, monkeypatch, capfd):
    Path("samples.png").unlink(missing_ok=True)
    with open("out.txt", "w", encoding="cp1252") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert sample.main(["a bold upright two", "--n", "1"]) == 0
        print("seven: \u4e03", file=terminal)                   # a caption may have such a word
    said = Path("out.txt").read_text(encoding="cp1252")
    assert "??" in said and "1 drawn" in said and "seven: ?" in said
    assert Path("samples.png").exists() and capfd.readouterr().err == ""


def test_questions_are_answered(here, capsys):
    for question, answers in (("What digit?", train.DIGITS), ("is bold", ["yes", "no"])):
        assert sample.main(["--image", PICTURE, "--ask", question, "--steps", "2"]) == 0
        assert capsys.readouterr().out.split("\n")[-2] in answers


def test_read_any_form_of_a_picture(here, capsys):
    digit = Image.open(PICTURE).convert("L")
    Image.eval(digit, lambda v: 255 - v).save("dark.png")
    large = digit.resize((200, 200))
    wide = Image.new("RGB", (400, 300), (250, 240, 220))
    wide.paste((20, 30, 90), (30, 40, 230, 240), large)
    wide.save("colour.png")
    clear = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    clear.putalpha(large)
    clear.save("clear.png")
    dim = Image.new("L", (300, 250), 100)                       # darker than its grey paper
    dim.paste(20, (50, 25, 250, 225), large)
    dim.save("dim.png")
    black = Image.new("L", (300, 250))                      # colours of training, not its place
    black.paste(large, (80, 40))
    black.save("black.png")
    captions = {}
    for name in ("runs/smoke/picture.png", "dark.png", "colour.png", "clear.png", "dim.png",
                 "black.png"):
        assert sample.main(["--image", name, "--seed", "0"]) == 0
        said = capsys.readouterr().out
        assert f"{name}: " in said and "as the model sees it:" in said
        captions[name] = re.search(r"^a \w+ \w+ \w+$", said, re.M)[0]
    assert captions["dark.png"] == captions["runs/smoke/picture.png"]
    forms = [np.asarray(sample.training_form(sample.open_picture(name).convert("L"), 28)) / 255
             for name in ("colour.png", "clear.png", "dim.png", "black.png")]
    assert max(np.abs(form - forms[0]).mean() for form in forms) < 0.01 < 0.05 < forms[0].mean()
    assert sample.main(["--image", "dark.png", "a bold ___ seven"]) == 0  # only one word is free
    assert re.search(r"^a bold \w+ seven$", capsys.readouterr().out, re.M)


# ------------------------------------------------------------------------------------------ errors

@pytest.mark.parametrize("arguments, says", [
    ("--preset toyy", "invalid choice: 'toyy' (choose from"), ("--stepz 3", "--stepz"),
    ("--steps 0", "0 has to be from 1"), ("--path metrc", "invalid choice: 'metrc'"),
    ("--path-options exponent", "invalid option value: 'exponent'"),
    ("--share 1.5", "--share"), ("score none.ckpt", "no checkpoint none.ckpt"),
    ("--resume", "there is no checkpoint runs/toy/model.ckpt"),
    ("--resume --name a/b", "there is no checkpoint runs/a_b/model.ckpt"),
    ("--seed 5000000000", "has to be from 0 to 4294967295"),
    ("--precision fp16", "Lightning: Precision 'fp16' is invalid")])
def test_mistakes_in_training(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.Digits, "load", lambda *args: 2 * [(torch.rand(30, 1, 28, 28),
                                                                  torch.arange(30) % 10)])
    monkeypatch.setattr(train.Digits, "build", lambda *args: 1 / 0)     # nothing long has begun
    assert says in complaint(capsys, train.main, *arguments.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, says", [
    ("--path-options exponnent=2", "unexpected keyword argument 'exponnent'"),
    ("--path-options exponent=-2", "metric(embedding, frequency, exponent=-2) ends with"),
    ("--path-options exponent=x", "metric(embedding, frequency, exponent='x') on the clock"),
    ("--path-options c=fast", "c='fast'"), ("--trunk-options dept=2", "argument 'dept'"),
    ("--trunk-options heads=0", "blocks(width=16, depth=1, heads=0) ends with ZeroDivisionError"),
    ("--width 90 --heads 3", "--width 90 is no multiple of 4·heads = 12"),
    ("--trunk backbone", "--trunk backbone needs a --backbone to start from"),
    ("--path uniform --path-options exponent=2", "uniform(embedding, frequency, exponent=2)")])
def test_options_that_are_impossible_are_one_line(options, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = complaint(capsys, train.main, "--preset", "smoke", *TINY, *options.split())
    assert says in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, says", [
    ("'a bold sevn'", "'a bold sevn' is not part of a caption such as"),
    ("'a thin bold one'", "known are a, bold, eight"),
    ("seven --steps 0", "--steps: 0 has to be from 1"), ("--n 1001", "from 1 to 1000"),
    ("seven --temperature nan", "--temperature: nan has to be"),
    ("seven --step rase", "invalid choice: 'rase' (choose from"),
    ("seven --out no/x.png", "No such file or directory"),
    ("seven --checkpoint none.ckpt", "no checkpoint none.ckpt"),
    ("--image none.png", "none.png is no picture that can be read"),
    ("--image report.png", "no picture that can be read"),
    ("--image empty.png", "the picture is empty"), ("seven --checkpoint report.png", "damaged"),
    ("seven --checkpoint half.ckpt", "damaged"),
    ("seven --checkpoint other.ckpt", "is no checkpoint of this version"),
    ("'a bold slanted one' --image runs/smoke/picture.png", "nothing is left to fill"),
    ("one --keep top", "--keep and --from need a picture, --image"),
    ("--ask 'what digit'", "need a picture, --image"),
    ("--image runs/smoke/picture.png --keep middle", "--keep middle has to be top, bottom, left"),
    ("--image runs/smoke/picture.png --keep 0:0-4:0", "rows and columns of patches from 0 to 3"),
    ("--image runs/smoke/picture.png --from 1", "--from: 1 has to be from 0 to 0.999"),
    ("--image runs/smoke/picture.png --ask what seven", "--ask nothing else"),
    ("--image runs/smoke/picture.png --gif x.gif", "--gif shows how a picture is drawn"),
    ("--image runs/smoke/picture.png --keep top --best-of 2", "--guidance need a caption"),
    ("seven --guidance 1e38", "--guidance: 1e38 has to be"),
    ("seven --out runs.png", "Is a directory")])
def test_mistakes_in_sampling(arguments, says, capsys, here):
    Path("samples.png").unlink(missing_ok=True)
    shutil.copyfile("runs/smoke/report.csv", "report.png")
    Image.new("L", (50, 40), 77).save("empty.png")
    Path("runs.png").mkdir(exist_ok=True)
    whole = Path("runs/smoke/model.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(whole[:len(whole) // 2])
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "other.ckpt")
    assert says in complaint(capsys, sample.main, *shlex.split(arguments))
    assert not Path("samples.png").exists()


def test_runs_that_is_a_file_is_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("", "utf-8")
    monkeypatch.setattr(train, "fit", lambda *args: 1 / 0)
    assert "'runs" in complaint(capsys, train.main, "--preset", "smoke")


@pytest.mark.parametrize("main", [train.main, sample.main])
def test_help(main, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "python" in said and "default" in said


def test_the_commands_of_readme_tutorial_and_lab_exist(monkeypatch):
    for entries, name in ((fudoki.PATHS, "my:Path"), (fudoki.PATHS, "my:HalfwayPath"),
                          (fudoki.STEPS, "my:step"), (fudoki.VELOCITIES, "my:campbell"),
                          (train.DATA, "my:Data")):
        monkeypatch.setitem(entries, name, train.Digits)    # as if there were such a file
    text = "".join((ROOT / name).read_text("utf-8") for name in (
        "README.md", "tutorial.md", "tests/exercises/README.md"))
    commands = re.findall(r"^\s*python (train|sample)\.py *([^#\n]*)", text, re.M)
    assert len(commands) >= 4
    for name, arguments in commands:
        words, module = shlex.split(arguments), {"train": train, "sample": sample}[name]
        if words[:1] != ["score"]:              # which needs a checkpoint
            module.parse(words)
