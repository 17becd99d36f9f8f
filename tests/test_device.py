"""On a GPU that is not there. Fake tensors live on cuda:0: nothing is computed, but operations
check that their arguments are on one device. What waits for the device is counted, and so is what
a step launches. (Fake tensors cannot live on mps, which has no float64; none is made here.)"""
import contextlib
import functools
import itertools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fudoki
import launches
import sample
import test_backbone
import test_model
import train
from fudoki import PATHS, STEPS, VELOCITIES


class Watch(TorchDispatchMode):
    """Answers what fake tensors cannot, and remembers what makes the host wait for its device."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.waits = itertools.cycle(answers), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, args = function.__name__.partition(".")[0], list(args)
        here = next((a.device for a in args if isinstance(a, torch.Tensor)), torch.device("cpu"))
        if name == "_local_scalar_dense":                   # item, tolist, if …
            if here.type != "cpu":
                self.waits.append(name)
            return next(self.answers) if args[0].dtype == torch.bool else 1
        if name in ("index", "index_put", "index_put_"):    # a mask: all of it
            if any(i is not None and i.dtype == torch.bool and i.device.type != "cpu"
                   for i in args[1]):
                self.waits.append(f"{name} by a mask")
            args[1] = [i if i is None or i.dtype != torch.bool else
                       torch.arange(len(i), device=i.device) for i in args[1]]
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, torch.Tensor) else torch.empty(0)
        if name in ("_to_copy", "copy_") and {here.type, made.device.type} > {made.device.type}:
            self.waits.append(f"{name} from {here.type} to {made.device.type}")
        assert made.device.type in ("cpu", "meta") or made.dtype != torch.float64, \
            f"{name} has float64"                           # meta: numbers of jvp's formulas
        return out


class Device:
    """with Device() as device: device.move(model), device.move(x)."""

    def __init__(self, precision=None, answers=(True,)):
        self.mode, self.watch = FakeTensorMode(allow_non_fake_inputs=True), Watch(answers)
        self.autocast = torch.autocast("cuda", precision, enabled=precision is not None)
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        fudoki.constant.cache_clear()
        for entered in (self.mode, self.watch, self.autocast):
            self.stack.enter_context(entered)
        return self

    def __exit__(self, *error):
        self.stack.__exit__(*error)
        fudoki.constant.cache_clear()

    def move(self, x):
        """A tensor, tensors by their names, or a module, which is changed."""
        if isinstance(x, torch.Tensor):
            return self.mode.from_tensor(x.detach()).to("cuda")
        if isinstance(x, dict):
            return {m: self.move(a) for m, a in x.items()}
        for module in x.modules():
            for known in (module._parameters, module._buffers):
                for name, a in known.items():
                    if a is not None:
                        new = self.move(a)
                        known[name] = torch.nn.Parameter(new) if a.requires_grad else new
        x._device = torch.device("cuda", 0)
        self.watch.waits.clear()                            # those of moving
        return x


def small(trunk="blocks", **options):
    """A model, and rows for it."""
    if trunk == "backbone":
        model, x = test_backbone.model(**options), test_backbone.batch()
    else:
        sizes = dict(width=16, depth=1, heads=1)
        model = test_model.small(optimizer="muon", trunk_options=sizes, **options)
        x = test_model.batch()
        model.tokens["text"].marks = (3,)                   # some rows are questions
    model.log_dict = lambda *args, **kwargs: None
    return model, x


@pytest.mark.parametrize("trunk, precision", [
    ("blocks", None), ("blocks", torch.float16), ("backbone", torch.bfloat16)], ids=str)
def test_a_training_step_is_on_the_device_and_does_not_wait_for_it(trunk, precision):
    """With all modalities and with one left out: forward, clipping, the optimiser."""
    model, x = small(trunk)
    with Device(precision, answers=[True, False, True]) as device:
        device.move(model.train())
        x = device.move(x)
        model.mark_free(x)                                  # question marks are copied once
        device.watch.waits.clear()
        for index in range(2):
            loss = model.training_step(x, index)
            assert loss.is_cuda and loss.dtype == torch.float32
        assert device.watch.waits == []

        model.trainer = test_model.SimpleNamespace(estimated_stepping_batches=10)
        optimizer, = model.configure_optimizers()[0]
        for p in model.parameters():                        # backward needs a real device
            p.grad = torch.zeros_like(p)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        assert device.watch.waits == []
        model.validation_step(x, 0)


@pytest.mark.parametrize("trunk, precision", [
    ("blocks", torch.bfloat16), ("backbone", torch.float16)], ids=str)
def test_all_that_a_model_does_is_on_the_device(trunk, precision):
    model, x = small(trunk)
    with torch.no_grad(), Device(precision) as device:
        device.move(model)
        x, captions = device.move(x), ["the cat sat"] * 2 if trunk == "backbone" else ["red"] * 2
        free = model.mark_free(x, "image")
        *_, end = model.generate(x, free, steps=2, guidance=2., t=0.3, late=2.)
        assert end["image"].is_cuda
        free["image"][:, 4:] = False                        # a part of the picture is given
        list(model.generate(x, free, steps=1))
        sample.best(model, x, free, 2)

        model.tokens["text"].encode = lambda texts: torch.zeros(len(texts), 3, dtype=torch.long)
        assert sample.draw(model, captions, steps=1, best_of=2).is_cuda
        model.tokens["text"].decode = lambda tokens: captions
        sample.read(model, x["image"])


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_on_the_device(path):
    model, x = small(path=path)
    with torch.no_grad(), Device() as device:
        device.move(model)
        x = device.move(x)
        for step in (fudoki.finish, *STEPS.values(), *(
                functools.partial(fudoki.euler, velocity=known) for known in VELOCITIES.values())):
            assert step(model.paths["image"], x["image"], x["image"], 0.3, 0.6).is_cuda


def test_a_tensor_on_the_host_and_a_wait_are_found(monkeypatch):
    model, x = small()
    with Device() as device:
        device.move(model)
        x = device.move(x)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="same device"):
            patch.setattr(fudoki, "exp_1", lambda like: torch.rand(like.shape).log().neg())
            fudoki.race(model.paths["image"], x["image"], x["image"], 0.3, 0.6)
        for slow in (lambda p: p.argmax(-1) if p.sum() > 0 else 0, lambda p: p.argmax(-1).cpu(),
                     lambda p: p.argmax(-1) + torch.tensor([0], device=p.device)):
            device.watch.waits.clear()
            monkeypatch.setattr(fudoki, "categorical", slow)
            with contextlib.suppress(RuntimeError):
                model.training_step(x, 0)
            assert device.watch.waits


def test_a_path_that_becomes_nan_ends_the_training_with_a_sentence(monkeypatch):
    """On a CPU; a GPU is given a token that does not exist, at which it stops."""
    class Late(fudoki.UniformPath):
        def logits(self, x_1, t):
            return super().logits(x_1, t) + torch.where(t > 0.5, torch.nan, 0.)
    monkeypatch.setitem(PATHS, "late", Late)
    model, x = small(path="late")
    with pytest.raises(ValueError, match="not finite: did the network or a path return NaN"):
        model.training_step(x, 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cpu", False)
        for p in ([0.5, torch.nan, 0.5], [torch.nan, 1., 0.], [1., torch.inf, 0.]):
            assert fudoki.categorical(torch.tensor([p])).item() == 3


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_path_mathematics_stays_float32_under_autocast(precision):
    """Against float64: p_t of the metric path, and the kinetic-optimal rates."""
    path, x_1, t = PATHS["metric"](10 * torch.randn(64, 8)), torch.arange(32), torch.rand(32, 1)
    found = []

    @fudoki.rowwise
    def look(path, x_1, t):
        found.append((path(x_1, t).softmax(-1),
                      fudoki.kinetic_optimal(path, x_1.flip(0), x_1, t)))
        return x_1
    with torch.autocast("cpu", precision):
        look(path, x_1, t)
    (p, u), = found
    d = torch.cdist(path.embedding.double()[x_1], path.embedding.double())
    t = t.double()
    beta, rate = 3 * (t / (1 - t)) ** 0.9, 2.7 * (t / (1 - t)) ** -0.1 / (1 - t) ** 2
    exact = (-beta * d).softmax(-1)
    torch.testing.assert_close(p.double(), exact, atol=1e-5, rtol=1e-3)
    toward = (d.gather(1, x_1.flip(0)[:, None]) - d).relu()
    torch.testing.assert_close(u.double(), exact * rate * toward, atol=1e-3, rtol=1e-3)


def test_a_step_of_the_toy_has_at_most_900_launches():
    counted = launches.of_step()
    assert sum(counted.values()) <= 900 and min(counted.values()) > 0, counted
    readme = (launches.study.ROOT / "README.md").read_text("utf-8")
    assert abs(int(re.search(r"about (\d+) kernels", readme)[1]) - sum(counted.values())) <= 10


def test_matrices_that_go_together_go_as_they_would_alone():
    g = torch.randn(5, 24, 8, generator=torch.Generator().manual_seed(0))
    for one, all_ in zip(g, train.orthogonal(g)):
        torch.testing.assert_close(train.orthogonal(one), all_, atol=1e-5, rtol=1e-4)
