"""What is nearly right, and the sentence that it gets before it is used."""
import re
import textwrap

import pytest
import torch

import sample
from fudoki import CLOCKS, LOSSES, PATHS, STEPS, TRUNKS, VELOCITIES

KINDS = dict(path=PATHS, clock=CLOCKS, trunk=TRUNKS, loss=LOSSES, step=STEPS, velocity=VELOCITIES)
WORDS = '{"model": {"type": "WordLevel", "vocab": {%s}, "unk_token": "a"}}' % ", ".join(
    f'"{word}": {i}' for i, word in enumerate("abcde"))
IMPORTS = "import math\nimport numpy as np\nimport torch\nimport fudoki\nfrom torch import nn\n"
LOG = "torch.log(t * self.one_hot(x_1) + (1 - t) / len(self.embedding))"
RATES = "fudoki.kinetic_optimal(path, x_t, x_1, t)"


@pytest.fixture
def asks(tmp_path, monkeypatch):
    """Checks an entry Own of a file my.py, in a model of five words and seven patches; what is
    said, "" if nothing is."""
    monkeypatch.chdir(tmp_path)

    def ask(kind, source, **options):
        (tmp_path / "my.py").write_text(IMPORTS + textwrap.dedent(source), "utf-8")
        torch.manual_seed(0)
        hparams = dict(tokens=dict(text=[WORDS, 3], image=[torch.rand(7, 4), 2, 4]),
                       path="uniform", clock="linear", trunk="blocks",
                       trunk_options=dict(width=24, depth=1, heads=2)) | {kind: "my:Own"}
        try:
            sample.contract("parts", hparams | options)
        except sample.InputError as error:
            assert not sample.own_lines(error)
            return str(error)
        return ""
    return ask


def path(body, head="fudoki.Path"):
    """A path with this `logits`, or with all these methods."""
    body = textwrap.dedent(body).strip()
    if not body.startswith("def "):
        body = f"def logits(self, x_1, t):\n    {body}"
    return f"class Own({head}):\n" + textwrap.indent(body, "    ")


def function(arguments, result):
    return f"def Own({arguments}):\n    return {result}"


VELOCITY, STEP = "path, x_t, x_1, t", "path, x_t, x_1, t, s"
LOSS = "path, p_1t, x_1, x_t, t"


@pytest.mark.parametrize("kind, source", [
    ("path", path(f"return {LOG}")),
    ("path", path(f"""
                      def __init__(self, embedding, frequency=None):
                          super().__init__(embedding, frequency)
                          self.register_buffer("few", torch.tensor(True))
                          self.register_buffer("n", torch.tensor(3))
                          self.haste = nn.Parameter(torch.tensor(1.))
                      def logits(self, x_1, t):
                          t = t ** self.haste
                          return {LOG}""")),
    ("path", path(f"""
                      def __init__(self, embedding, frequency=None):
                          super().__init__(embedding, frequency)
                          self.register_buffer("haste", torch.rand(()) + 1)
                      def logits(self, x_1, t):
                          t = t ** self.haste
                          return {LOG}""")),
    ("path", "def Own(embedding, frequency=None):\n    return fudoki.MaskPath(embedding)"),
    ("path", path("pass", "fudoki.MetricPath").replace("def logits(self, x_1, t):\n", "")),
    ("clock", "def Own(path):\n    return lambda t: t ** 3"),
    ("clock", "Own = nn.Identity"),
    ("velocity", function(VELOCITY, f"2 * {RATES}")),
    ("step", function(STEP, "x_1")),
    ("loss", function(LOSS, "(1 - t[..., 0]) * fudoki.cross_entropy(path, p_1t, x_1, x_t, t)")),
    ("trunk", "class Own(fudoki.Blocks):\n    pass"),
])
def test_what_is_right_passes(asks, kind, source):
    assert asks(kind, source) == ""


@pytest.mark.parametrize("source, told", [
    # returns of a wrong shape or type
    (path(f"return ({LOG}).sum(-1)"), r"logits returned \(4,\), expected \(tokens, V, of text\) = "
     r"\(4, 5\)"),
    (path(f"return ({LOG})[..., 1:]"), r"my:Own.logits returned \(4, 4\), expected .* \(4, 5\)"),
    (path(f"return ({LOG})[None]"), r"returned \(1, 4, 5\)"),
    (path(f"return ({LOG})[0]"), r"returned \(5,\)"),
    (path("return torch.where(fudoki.F.one_hot(x_1, 5) > 0, t.log(), (1 - t).log())"),
     "class values must be smaller than num_classes|is not certain|of image|knows x_1"),
    (path("return -(torch.arange(5.) - x_1[..., None]).abs() * t / (1 - t).clamp(min=1e-9)"),
     r"expected \(tokens, V, of image\) = \(4, 7\)"),
    (path(f"return ({LOG}).numpy()"), "returned ndarray"),
    (path(f"return ({LOG}).double()"), "type torch.float64, expected torch.float32"),
    (path(f"return ({LOG}).long()"), "type torch.int64"),
    (path(f"return ({LOG}).half()"), "type torch.float16"),
    (path(f"{LOG}"), "returned None, expected a tensor"),
    (path(f"return [{LOG}]"), "returned list"),
    (path("return 0."), "returned float '0.0'"),
    # numbers that are none, at some t only
    (path("return self.one_hot(x_1) * t / (1 - t)"), "at t = 1, x_1 = 0 of text it is .*nan"),
    (path(f"return torch.where(t > 0.99999, torch.nan, {LOG})"), "at t = 0.99999.* it is .*nan"),
    (path(f"return torch.where((t > 0) & (t < 1e-5), torch.inf, {LOG})"), r"at t = 1e-07.*inf"),
    (path(f"return torch.where(t == 1, -torch.inf, {LOG})"), "has to be finite or −∞; at t = 1"),
    (path(f"return torch.where((x_1 == 6)[..., None], torch.nan, {LOG})"), "x_1 = 6 of image"),
    # no function of x_1 and t, row by row
    (path(f"""
                      def __init__(self, embedding, frequency=None):
                  super().__init__(embedding, frequency)
                  self.calls = 0
              def logits(self, x_1, t):
                  self.calls += 1
                  return (1 + 0.1 * self.calls) * {LOG}"""), "gives another answer when it is"),
    (path(f"return {LOG} * torch.rand(1)"), "gives another answer"),
    (path(f"t = t[:1]; return {LOG}"), "depends on the tokens|at t = 1|not certain"),
    (path(f"x_1 = x_1[:1].expand_as(x_1); return {LOG}"), "depends on the tokens that stand"),
    (path(f"t.mul_(1.); x_1 += 1; x_1 %= 5; return {LOG}"), "changes the x_1 or the t"),
    # ends
    (path("t = 0.9 * t; return " + LOG), r"not certain of x_1 at t = 1: token 0 of text has p_1"),
    (path("t = 0.1 + 0.9 * t; return " + LOG), "knows x_1 at t = 0 already"),
    (path("return -super().logits(x_1, t)", "fudoki.MetricPath"), "is not certain of x_1"),
    # the same in a checkpoint
    (path(f"""
              def __init__(self, embedding, frequency=None):
                  super().__init__(embedding, frequency)
                  self.haste = 1 + torch.rand(())
              def logits(self, x_1, t):
                  t = t ** self.haste
                  return {LOG}"""), "another path when it is made again.* as a buffer"),
    (path(f"""
              def __init__(self, embedding, frequency=None):
                  super().__init__(embedding, frequency)
                  self.haste = 2 * nn.Parameter(torch.ones(1))
              def logits(self, x_1, t):
                  t = t ** self.haste
                  return {LOG}"""), "copy of my:Own.* ends with RuntimeError: Only Tensors"),
    # nearly a class
    (path("def logit(self, x_1, t):\n    return 0"), r"my:Own has no method logits\(self"),
    (path("def __init__(self, embedding, frequency=None):\n    self.k = 3\n"), r"is no module: i"
     r"ts __init__ has to call super\(\).__init__\(embedding, frequency\)"),
    (path("def __init__(self, embedding):\n    super().__init__(embedding)"),
     r"my:Own\(embedding, frequency\) ends with TypeError: .* takes 2 positional arguments but 3"),
    (path("def __init__(self, embedding, frequency, power):\n    super().__init__(embedding)"),
     r"my:Own\(embedding, frequency\) ends with TypeError: .*'power'"),
    (path(f"""
                      def __init__(self, embedding, frequency=None):
                  super().__init__(embedding, frequency)
                  self.register_buffer("embedding", torch.zeros(2, 2))
              def logits(self, x_1, t):
                  return {LOG}"""), "2 rows in its buffer `embedding`, but there are 5 tokens"),
    (path("def __init__(self, embedding, frequency=None):\n    super().__init__(embedding)\n"
          "    self.embedding = None\ndef logits(self, x_1, t):\n    return x_1"),
     "has no rows in its buffer `embedding`"),
    (path(f"def logits(self, x_1):\n    t = 0.5\n    return {LOG}"),
     "my:Own.logits ends with TypeError: .* takes 2 positional arguments but 3"),
    ("Own = fudoki.UniformPath(torch.zeros(5, 0))", "is an object, UniformPath .*; a path is a"),
    ("Own = 3", "my:Own is an object, int '3'; a path is a class, with logits"),
    ("Own = nn.Linear(2, 2)", "is an object, Linear"),
    ("class Own(nn.Module):\n    pass", "has to be a subclass of fudoki.Path"),
    ("def Own(embedding, frequency=None):\n    pass", "is no module"),
])
def test_a_path_that_is_nearly_right_gets_a_sentence(asks, source, told):
    said = asks("path", source)
    assert re.search(told, said) and "my:Own" in said[:20] and "\n" not in said, said


@pytest.mark.parametrize("kind, source, told", [
    ("clock", "def Own(path):\n    return 3", r"Own\(path\) returned int '3', expected a func"),
    ("clock", function("path", "lambda t: t[..., 0]"), r"the clock of my:Own returned \(\d+,\)"),
    ("clock", function("path", "lambda t: t / 2"), "has to go from 0 to 1; it goes from 0 to 0.5"),
    ("clock", function("path", "lambda t: 2 * t"), r"has to stay in \[0, 1\]; at t = 0.5"),
    ("clock", function("path", "lambda t: t.log()"), "at t = 0 it is -inf"),
    ("clock", function("path", "lambda t: 1 - t"), "goes back between"),
    ("velocity", function(VELOCITY, f"{RATES}.sum(-1)"), r"returned \(5,\), expected \(tokens, V"),
    ("velocity", function(VELOCITY, f"-{RATES}"), "rates are finite, at least 0"),
    ("velocity", function(VELOCITY, f"{RATES} + 1"), "0 from a token to itself"),
    ("velocity", function("path, x_t", "x_t"), r"Own\(path, x_t, x_1, t\) ends with TypeError"),
    ("velocity", function(VELOCITY, "None"), "returned None"),
    ("step", function(STEP, "x_1.float()"), "numbers of the type torch.float32, expected"),
    ("step", function(STEP, "x_1.flatten()"), r"returned \(10,\), expected \(rows, tokens\)"),
    ("step", function(STEP, "x_1 + 1"), "returned tokens from 1 to 5; there are those from 0"),
    ("step", function(VELOCITY, "x_1"), "takes 4 positional arguments but 5"),
    ("loss", function(LOSS, "fudoki.cross_entropy(path, p_1t, x_1, x_t, t).mean()"), r"returned "
     r"\(\), expected \(rows, tokens\) = \(2, 5\)"),
    ("loss", function(LOSS, "fudoki.cross_entropy(path, p_1t, x_1, x_t, t) / 0"), "is finite"),
    ("loss", function(LOSS, "x_1.float()"), "does not depend on p_1t"),
    ("trunk", "class Own(fudoki.Blocks):\n    def forward(self, *of):\n"
              "        return super().forward(*of)[..., 1:]", r"expected \(B, N, width\) = \(2,"),
    ("trunk", "class Own(fudoki.Blocks):\n    def forward(self, *of):\n"
              "        return super().forward(*of) / 0", "not finite"),
    ("trunk", "class Own(nn.Module):\n    def __init__(self, width, depth, heads):\n"
              "        super().__init__()", "no attribute 'width'"),
    ("trunk", "Own = 3", "is an object, int '3'; a trunk is a class, with forward"),
])
def test_other_entries_that_are_nearly_right_get_one_too(asks, kind, source, told):
    said = asks(kind, source)
    assert re.search(told, said) and "my:Own" in said and "\n" not in said, said


def test_a_backbone_has_no_mask(asks):
    assert "--path mask needs a token that" in asks("trunk", "", path="mask", trunk="backbone",
                                                    trunk_options=dict(config={}))


def test_an_error_in_ones_own_lines_stays_it(asks):
    """With its own traceback, from the first line of the file on."""
    with pytest.raises(ZeroDivisionError) as caught:
        asks("path", path("return 1 / 0"))
    lines = sample.own_lines(caught.value)
    assert "fudoki.py" not in lines and 'File "my.py", line 8, in logits' in lines
    assert lines.endswith("ZeroDivisionError: division by zero\n")


def test_a_frequency_has_a_number_for_every_token(asks):
    told = asks("path", path(f"return {LOG}"), frequency=dict(image=torch.ones(6)))
    assert "the frequency of image is (6,), expected (7,)" in told
