"""The tutorial's blocks run in order and print what stands below them, its quotations are
fudoki.py's own words, and nothing that the book is about is left out."""
import ast
import io
import math
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIAL, README = ROOT / "tutorial.md", ROOT / "README.md"
MEASUREMENTS = ROOT / "tests/bench/README.md"
QUOTATION = re.compile(r"^```python (\S+\.py)\n(.*?)^```$", re.S | re.M)
NUMBER = re.compile(r"-?\d*\.?\d+")


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    import tables
    return tables


@pytest.fixture
def book():
    """Tutorial and measurements, on one line."""
    return " ".join((TUTORIAL.read_text("utf-8") + MEASUREMENTS.read_text("utf-8")).split())


def alike(printed, shown):
    """The same words, and numbers that differ in their last digit at most, or by .02."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    for a, b in zip(NUMBER.findall(printed), NUMBER.findall(shown)):
        digits = len(b.partition(".")[2])
        assert float(a) == pytest.approx(float(b), abs=max(0.021, 10 ** -digits) * (digits > 0)), \
            f"printed:\n{printed}\nshown:\n{shown}"


def test_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, namespace = TUTORIAL.read_text("utf-8"), {}
    found = list(re.finditer(r"^```python\n(.*?)^```$", text, re.S | re.M))
    for block in found:
        line = text[:block.start(1)].count("\n")        # so that a traceback names the right one
        capsys.readouterr()
        exec(compile("\n" * line + block[1], "tutorial.md", "exec"), namespace)
        printed = capsys.readouterr().out
        shown = re.match(r"\n\n```text( for instance)?\n(.*?)^```$", text[block.end():],
                         re.S | re.M)                   # another machine trains another model
        assert bool(shown) == bool(printed), f"line {line}"
        if shown and not shown[1]:
            alike(printed, shown[2])
        for file in re.findall(r'"runs/(\w+\.png)"', block[1]):
            assert (tmp_path / "runs" / file).exists()
            assert f"(figures/{file})" in text[block.end():]
    assert len(found) > 20 and [*tmp_path.iterdir()] == [tmp_path / "runs"]


def test_a_result_that_differs_is_found():
    alike("uniform 0.52 of 12", "uniform 0.50 of 12")
    for wrong in ("uniform 0.53 of 12", "uniform 0.50 of 13", "mask 0.50 of 12"):
        with pytest.raises(AssertionError):
            alike(wrong, "uniform 0.50 of 12")


def test_quotations_are_verbatim():
    texts = TUTORIAL.read_text("utf-8") + README.read_text("utf-8")
    for name, quotation in QUOTATION.findall(texts):
        source = (ROOT / name).read_text("utf-8")
        assert "\n" + quotation in source, f"not as in {name}:\n{quotation}"


def test_what_the_book_is_about_is_quoted():
    """The paths' equations, velocities, steps, network and the method's own part of the module:
    each of these definitions, or a piece of it."""
    file = (ROOT / "fudoki.py").read_text("utf-8")
    spans = {}
    for node in ast.walk(ast.parse(file)):
        if isinstance(node, ast.ClassDef):
            spans |= {f"{node.name}.{part.name}": part for part in node.body
                      if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            spans.setdefault(node.name, node)
    places = []
    for name, quotation in QUOTATION.findall(TUTORIAL.read_text("utf-8")):
        if name != "fudoki.py":
            continue
        first = file[:file.index(quotation)].count("\n") + 1
        places.append(range(first, first + quotation.count("\n")))
    for name in ("UniformPath.logits MarginalPath.logits MaskPath.logits MetricPath.logits "
                 "Path.forward Calibrated.__init__ growth kinetic_optimal euler race "
                 "Block.forward Backbone.forward Network.forward Fudoki.loss Fudoki.training_step "
                 "Fudoki.predict Fudoki.generate").split():
        assert any(spans[name].lineno <= line <= spans[name].end_lineno
                   for place in places for line in place), name


def test_the_book_explains_more_than_it_quotes():
    text = TUTORIAL.read_text("utf-8").partition("\n## 12")[0]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    prose = [line for line in prose.splitlines() if line.strip() and line[0] not in "|!#"]
    assert len(prose) > sum(q.count("\n") for _, q in QUOTATION.findall(text))


def test_notation_table_is_the_same_in_both():
    tables = [re.findall(r"^\| .*\|$", text, re.M)[:9] for text in
              ((ROOT / "fudoki.py").read_text("utf-8"),
               TUTORIAL.read_text("utf-8").partition("### Names\n")[2])]
    assert tables[0] == tables[1] and "λ" in tables[0][-1]


def lines_of_code(file):
    """Lines that are neither blank, nor a comment, nor a docstring."""
    text, docstrings, found = file.read_text("utf-8"), set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                docstrings |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            found |= {*range(token.start[0], token.end[0] + 1)}
    return len(found - docstrings)


def test_readme_counts_the_lines_of_code_and_is_short_itself():
    most, counted = {"fudoki": 460, "sample": 345, "train": 600}, {}
    for name, limit in most.items():
        counted[name] = lines_of_code(ROOT / f"{name}.py")
        assert counted[name] <= limit, name
    readme = README.read_text("utf-8")
    assert "{fudoki}, {sample} and {train} lines of code".format(**counted) in readme
    assert sum(counted.values()) <= 1400 and len(README.read_text("utf-8").splitlines()) <= 150


def test_an_afternoon_is_enough_for_chapters_0_to_6_and_8():
    chapters = re.split(r"^## \d+\. ", TUTORIAL.read_text("utf-8"), flags=re.M)[1:]
    afternoon = "".join(chapters[i] for i in (0, 1, 2, 3, 4, 5, 6, 8))
    prose = re.sub(r"^```.*?^```$", "", afternoon, flags=re.S | re.M)
    assert afternoon.count("\n") <= 1000 and len(prose.split()) <= 6500


def test_no_name_hides_an_import():
    """Neither a parameter nor a variable of a function has the name of something imported."""
    for name in ("fudoki", "sample", "train"):
        tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
        imported = {(alias.asname or alias.name).split(".")[0] for node in tree.body
                    if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        found = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        found |= {node.id for node in ast.walk(tree)
                  if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assert not found & imported, (name, found & imported)


def test_files_are_opened_as_utf_8_whatever_the_system_has():
    """A call without it fails on Windows, in any file that has a formula."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]:
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(call, ast.Call):
                said = ast.unparse(call)
                how = said[len(ast.unparse(call.func)):]
                if re.fullmatch("(?!Image|gzip)(.*\\.)?(open|read_text|write_text)",
                                ast.unparse(call.func)):
                    assert re.search("utf-8|encoding|'[rwa]b'", how), (file.name, said)


def test_lines_have_at_most_99_characters():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]:
        for i, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            assert len(line) <= 99, f"{file.name}:{i}"


def test_bodies_have_paragraphs():
    """A function of more than a dozen lines of code has a blank line or a comment in it."""
    for name in ("fudoki", "sample", "train"):
        text = (ROOT / f"{name}.py").read_text("utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = lines[node.body[0].end_lineno:node.end_lineno]
                code = [line for line in body if line.strip() and line.strip()[0] != "#"]
                assert len(code) <= 12 or len(body) > len(code), f"{name}.{node.name}"


def test_links_lead_somewhere():
    """Files that README, tutorial and measurements link to exist, and so do the headings."""
    for file in (TUTORIAL, README, MEASUREMENTS):
        text = re.sub(r"^```.*?^```$", "", file.read_text("utf-8"), flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, heading = target.partition("#")
            if not name.startswith("http"):
                linked = file.parent / name if name else file
                assert linked.exists(), target
                if heading:
                    known = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.M)
                    known = [re.sub(r"[^\w\- ]", "", k.lower()).replace(" ", "-") for k in known]
                    assert heading in known, target


def test_what_the_real_model_learns_is_in_the_study(tables, book):
    real = {(r["start"], r["step"], r["seed"]): r for r in tables.rows("backbone")
            if r["model"] == "SmolLM2-135M" and r["text"] == "tinystories_sample"}

    def pair(start, step, what="loss", digits=2):
        first, second = (f"{float(real[start, step, seed][what]):.{digits}f}" for seed in "01")
        return f"{first} ({second})"
    assert (f"the pretrained model has {pair('pretrained', '0')}. Random weights are still worse "
            f"after 150 steps: {pair('scratch', '150')}. After ten steps the pretrained model has "
            f"{pair('pretrained', '10')}, at the end {pair('pretrained', '150')}. A token then "
            f"costs at most {pair('pretrained', '150', 'bits', 1)} bits; from random weights it "
            f"costs {pair('scratch', '150', 'bits', 1)}.") in book
    assert "uniform noise has a lower bound, {:.1f} and {:.1f} bits for SmolLM2".format(*(
        float(real["uniform", "150", seed]["bits_reversal"]) for seed in "01")) in book
    (loss, bits), (random_loss, random_bits) = (
        [float(r[what]) for what in ("loss", "bits")] for r in tables.rows("backbone")
        if (r["text"], r["step"]) == ("tinyshakespeare", "150"))
    assert (f"less about Shakespeare: {loss:.2f} after 150 steps and {bits:.1f} bits, from "
            f"random weights {random_loss:.2f} and {random_bits:.1f}") in book
    for start, said in (("noshift", "the training ends with {} and {} bits"),
                        ("frozen", "one training showed no difference: {} and {} bits")):
        row = real[start, "150", "0"]
        assert said.format(f"{float(row['loss']):.2f}", f"{float(row['bits']):.1f}") in book
    samples = [" ".join(r["sample"].split()) for r in tables.rows("backbone_samples")
               if (r["model"], r["start"], r["seed"]) == ("SmolLM2-135M", "pretrained", "0")]
    assert all(samples[i] in book for i in (0, 1, 5))


def test_what_is_said_of_parts_of_words_was_measured(tables, book):
    found = {kind: [short(float(row["caption"]), 3) for row in tables.rows("adapted")
                    if row["what"].startswith(kind)] for kind in ("one call", "reading")}
    assert ("With one call {} and {} of the captions are right, in two trainings, with four steps "
            "{} and {}.").format(*found["one call"], *found["reading"]) in book


def test_what_is_said_of_the_small_model_was_measured(tables, book):
    texts, ((bits, error), (reverse, its_error)) = tables.stories()
    assert all(text in book for text in texts)
    nats = {row.split(" | ")[0].strip("| "): row.split(" | ")[2]
            for row in tables.written("story_")}
    held_out, own = nats["held-out text"], nats["causal, T = .7"]
    assert (f"costs it {nats['uniform, race, 64 steps, T = .7']} nats, a token of held-out text "
            f"{held_out}, and a token of what it writes itself at the same temperature {own}.") \
        in book
    least = min(float(n) for how, n in nats.items() if how.startswith("uniform"))
    assert f"the least, {least:.2f} nats, has `renoise` with 256 steps at temperature 1." in book
    assert float(nats["uniform, renoise, 256 steps, T = 1.0"]) == least
    assert (f"is {bits:.1f} ± {error:.1f} bits along the kinetic-optimal velocity and "
            f"{reverse:.1f} ± {its_error:.1f} along its time reversal; the causal model needs "
            f"{float(held_out) / math.log(2):.1f} bits") in book
    assert f"standard deviation of {short(error * 6 ** 0.5, 1)}." in book
    before = next(row for row in tables.rows("story_seen") if row["wrong"] == "the word before it")
    assert f"the flow finds {short(float(before['seen']))} wrong" in book
    rows = [row for row in tables.rows("body") if row["data"] == "stories" and row["right"]]
    assert "{} and {} bits with uniform noise, {} and {} with the metric".format(*(
        f"{float(row['right']):.1f}" for start in ("uniform", "pretrained") for row in rows
        if row["start"] == start)) in book


def test_what_is_said_of_pretraining_was_measured(tables, book):
    last = {tuple(row[k] for k in ("data", "modality", "start", "seed")): row for row in
            tables.rows("body") if row["right"] and row["model"] == "story-656K"}

    def both(data, modality, start, column):
        return [float(last[data, modality, start, seed][column]) for seed in "01"]
    patches = {start: both("digits", "image", start, "loss") for start in ("random", "pretrained")}
    assert ("nearly that from pretrained weights, {} and {} against {} and {}".format(
        *(short(loss) for pair in patches.values() for loss in pair))) in book
    right = {start: both("digits", "image", start, "right") for start in (
        "random", "pretrained", "random@6e-3", "frozen")}
    assert max(right["random"]) < min(right["pretrained"]) / 3          # "less than a third"
    assert min(right["random@6e-3"]) > sum(right["pretrained"]) / 2
    assert {short(share) for share in right["frozen"]} == {".05"}

    def more(t):                                                        # at a noise level
        pairs = (both("digits", "image", start, t) for start in ("random", "pretrained"))
        return [a - b for a, b in zip(*pairs)]
    assert f"up to {short(max(more('t0.05') + more('t0.15')))} nats more" in book
    assert max(more("t0.95")) < 0
    words = [both("stories", "text", start, "loss") for start in ("layers", "pretrained")]
    assert max(abs(a - b) for a, b in zip(*words)) < 0.05
    drawn = (short(float(last["scenes", "image", start, "0"]["right"])) for start in (
        "random@6e-3", "pretrained", "small"))
    assert ("a random body draws {}, the pretrained one {}, and the small trunk {}.".format(*drawn)
            in book)
    drawn, read = (short(float(last["scenes", modality, "pretrained@6e-3", "0"]["right"]))
                   for modality in ("image", "text"))
    small = [short(float(row["seen"])) for row in tables.rows("scenes") if row["command"].endswith(
        "scenes --threads 1 --val-every 1000") and row["what"].split(",")[-1] in (
        " mean", " captions that are true")]
    assert (f"body draws {drawn} and reads {read}, the small trunk {small[0]} and {small[1]}."
            in book)
    layers, added, unnormed, neither, random = (
        float(last["scenes", "image", start, "0"]["right"])
        for start in ("shallow", "added", "unnormed", "both", "random@6e-3"))
    assert f"as this body has, the small trunk draws {short(layers)}." in book
    assert (f"it draws {short(added)}; without the normalisation {short(unnormed)}; with neither "
            f"{short(neither)}, which is more than half of the way" in book)
    assert layers - neither > neither - random


def test_what_is_said_of_optimisers_for_texts_was_measured(tables, book):
    nats = {(row["model"], row["start"]): short(float(row["loss"])) for row in tables.rows("body")
            if row["data"] == "stories" and row["seed"] == "0" and row["step"] == row["steps"]}
    assert "story-656K has {} nats with Muon, {} with AdamW at the rate .003".format(
        nats["story-656K", "pretrained"], nats["story-656K", "adamw@3e-3"]) in book
    assert ("SmolLM2-135M has {} with Muon at the rate .002, {} with AdamW at .0003".format(
        nats["SmolLM2-135M", "pretrained@2e-3"], nats["SmolLM2-135M", "adamw@3e-4"])) in book


def test_neighbours_are_those_of_the_study():
    found = (ROOT / "tests/bench/neighbours.txt").read_text("utf-8")
    table = found.index("exponent")
    assert all(part in TUTORIAL.read_text("utf-8") for part in (found[:table], found[table:]))


def test_tables_are_those_of_the_studies(tables):
    """`tables.py` would change nothing."""
    names = set()
    for file in tables.FILES:
        text = file.read_text("utf-8")
        assert tables.filled(text) == text, file
        for _, calls, rows in tables.TABLE.findall(text):
            names |= {*calls.split(", ")}
            assert rows
    assert len(names) >= 21 and len(names) == sum(
        len(calls.split(", ")) for file in tables.FILES
        for calls in re.findall("<!-- (.*) -->", file.read_text("utf-8")))


def short(number, digits=2):
    """As the book writes it: .95"""
    return f"{number:.{digits}f}".removeprefix("0")


def test_what_the_answers_say_of_settings_was_measured(tables, book):
    rows = {row.split(" | ")[0]: row.split(" | ") for row in tables.trainings()}
    preset, adamw, even = ([rows[f"| {name}"][k].split(" / ")[0] for k in (2, 4)] for name in (
        "as the preset", "AdamW, learning rate .003", "t = u"))
    draws, reads = ([short(float(row[k])) for row in (adamw, preset)] for k in (0, 1))
    assert (f"AdamW draws {draws[0]} of the digits and Muon {draws[1]}; reading suffers less, "
            f"{reads[0]} against {reads[1]}.") in book
    assert f"the drawings are worse, {short(float(even[0]))}" in book


def test_what_is_said_of_sampling_was_measured(tables, book):
    def caption(**options):
        return tables.share(tables.cell(steps="8", **options), "caption")
    assert f"captions {caption(step='renoise')} renoised, {caption()} by the race" in book
    with_g1, with_g2 = (short(tables.mean(tables.cell(guidance=g), "digit")[0], 3)
                        for g in ("1.0", "2.0"))
    assert f"with $g=1$ {with_g1} of the digits are right, with $g = 2$ {with_g2}" in book
    best = tables.mean(tables.cell(best_of="16"), "caption")[0]
    assert f"With 16 drawings {short(best, 3)}" in book
    call, race = (float(r["seconds"]) for r in tables.rows("growth")[1:3])
    assert f"takes {short(race / call)} of a network call" in book


def test_what_is_said_of_paths_was_measured(tables, book):
    def bits(name):
        return tables.worth(name, "bits", "image_bits")[0]

    def near(name):
        return tables.worth(name, "repair image, near state 0.9", "repaired")[0]

    def captions(name):
        return tables.worth(name, steps="8", **tables.chosen(name))[0]
    grey, codes = (1 - bits(f"{tokens}/metric 1") / bits(f"{tokens}/uniform, linear")
                   for tokens in ("grey", "codes"))
    assert (f"than the uniform path by its own time, by {grey:.0%} on grey levels and {codes:.0%} "
            "on codes") in book
    assert near("grey/metric 1") > near("grey/uniform, linear")
    assert near("codes/metric 1") < near("codes/uniform, linear")
    assert bits("shuffled/metric 2") > bits("grey/metric 4")
    for tokens in ("codes", "grey"):
        many = [bits(f"{tokens}/{path}") for path in (
            "mask, linear", "metric 1", "uniform, linear", "metric 2")]
        assert many == sorted(many) and many[-1] < bits(f"{tokens}/metric 4")
        assert captions(f"{tokens}/marginal, linear") > max(
            captions(f"{tokens}/{path}") for path in ("uniform, linear", "metric 1"))
    for path in ("uniform", "marginal", "mask"):        # by clock and noise levels of training
        own, same, even = (bits(f"codes/{path}{how}") for how in (", linear", "", ", t^1"))
        assert max(own, even) < 0.97 * same and abs(own - even) < 0.03 * own
        fewer = captions(f"codes/{path}, linear") - captions(f"codes/{path}, t^1")
        assert ".01 to .02 fewer captions" in book and 0.005 < fewer < 0.025
    metric, uniform, own = (statistics.mean(tables.seen(name)) for name in (
        "metric 1", "uniform", "uniform, linear"))      # whole scenes
    assert "half of its lead" in book and 0.4 < (uniform - own) / (metric - own) < 0.6
    (noise,), (noise_own,) = map(tables.seen, ("marginal", "marginal, linear"))
    assert f"{short(noise)} by either clock" in book and short(noise) == short(noise_own)
    values = tables.bits("codes/metric 1")
    assert f"The metric path has {min(values):.0f} to {max(values):.0f} bits" in book
    assert "needs hardly more ({:.0f} against {:.0f}, two trainings)".format(
        bits("codes/uniform, t^1"), bits("codes/metric 1")) in book
    for path in ("uniform", "marginal"):                # far damage, by either clock
        assert all(0.6 < tables.worth(name, "repair image state 0.9", "repaired")[0] < 0.7
                   for name in (f"codes/{path}", f"codes/{path}, linear"))
    spoiled = [tables.worth(f"codes/{path}", "repair image state 0.9", "spoiled")[0]
               for path in ("marginal, linear", "uniform, linear")]
    assert spoiled == sorted(spoiled)


def test_what_is_said_of_changes_of_mind_and_repair_was_measured(tables, book):
    usual = [row for row in tables.rows("paths") if "tempered" not in row["name"]]
    left = max(float(row["left"]) for row in usual if row["left"])
    assert f"leaves it at most {short(left)} times" in book
    minds = [float(row["minds"]) for row in usual if row["what"] == "drawing"
             and row["steps"] == "8" and row["guidance"] != "1.0"]
    assert f"changes {short(min(minds), 1)} to {short(max(minds), 1)} times" in book
    far = tables.repair("image", "0.2", "state", "0.9", "metric")[0]
    assert f"and repairs {short(far)}" in book
    told = [tables.repair("image", "0.2", "told", "0.0", name)[0] for name in tables.PATHS]
    assert "which patches are wrong repairs two thirds of them" in book
    assert all(abs(x - 2 / 3) < 0.03 for x in told)


def test_what_is_said_of_scenes_was_measured(tables, book):
    mended = {r["wrong"]: r for r in tables.rows("revise") if (
        r["checkpoint"], r["way"], r["guidance"]) == ("metric", "state", "1.0")}
    true, kept = ([short(float(mended[k][c])) for k in ("colour", "count", "position")]
                  for c in ("true", "kept"))
    assert (f"mends {true[0]}, {true[1]} and {true[2]}, and {min(kept)} to {max(kept)} of the "
            "tokens") in book
    assert all(float(r["true"]) == 0 for r in tables.rows("revise")
               if "mask" in r["checkpoint"] and r["way"] == "state")
    for path, way, t, said in (("uniform", "state", "0.9", "the uniform path {}, {} and {}."),
                               ("mask", "corrector", "0.5", "from $t=.5$ on {}, {} and {} (")):
        found = {r["wrong"]: short(float(r["true"])) for r in tables.rows("revise") if (
            r["checkpoint"], r["way"], r["t"], r["guidance"]) == (path, way, t, "1.0")}
        assert said.format(*(found[k] for k in ("colour", "count", "position"))) in book.replace(
            "([table]", "(")


def test_what_is_said_of_clocks_was_measured(tables, book):
    def true(path, clock, late=1):
        return short(tables.true(path, clock, 8, late))
    assert f"{true('mask', 'calibrated')} of its drawings are right after 8 steps" in book
    assert (f"reach {true('metric', 'linear')} on the metric path and {true('uniform', 'linear')} "
            f"on the uniform one") in book
    assert ("it is {} and {}, in late steps {} and {}.".format(*(
        true(path, "calibrated", late) for late in (1, 2) for path in ("metric", "uniform")))
        in book)
    assert f"means nothing: {true('metric, shuffled', 'calibrated')}, the mean of five" in book
    own, uniform, shuffled, metric = (tables.true(path, clock, 8) for path, clock in (
        ("uniform", "linear"), ("uniform", "calibrated"), ("metric, shuffled", "calibrated"),
        ("metric", "calibrated")))
    assert abs((uniform - own) / (metric - own) - 2 / 3) < 0.05
    assert abs((shuffled - uniform) / (metric - own) - 1 / 5) < 0.05
    assert f"left, {short(metric - shuffled)}, is the metric" in book


def test_what_is_said_of_late_steps_and_of_the_corrector_was_measured(tables, book):
    even, two, three = ([short(tables.late(steps, late)) for steps in (8, 32)]
                        for late in (1, 2, 3))
    assert (f"draws {even[0]} of 1,200 scenes in 8 even steps as their captions say, {two[0]} "
            f"with `late` 2 and {three[0]} with 3; in 32 steps {even[1]}, {two[1]} and "
            f"{three[1]}") in book
    assert "they hurt: {} even, {} with 3".format(*(
        short(tables.late(8, late, "mask")) for late in (1, 3))) in book
    (found, spoiled), (words, others) = (
        [short(x) for x in tables.repair(kind, damaged, "corrector", "0.5", "mask")[:2]]
        for kind, damaged in (("image", "0.2"), ("text", "0.33")))
    assert f"it repairs {found} of the patches and spoils {spoiled} of the others" in book
    assert f"of wrong words it repairs {words} and spoils {others}" in book


def test_what_is_said_of_clean_parts_in_training_was_measured(tables, book):
    def value(share, column, what, given=""):
        return tables.mean([r for r in tables.rows("given") if float(r["clean"]) == share
                            and r["what"] in what and r["given"] == given], column)[0]
    halves = {(share, given): [short(value(share, c, ("top", "left"), given), 3)
                               for c in ("caption", "seam")]
              for share in (0.25, 0.1, 0.) for given in ("still", "moving")}
    real = tables.mean([r for r in tables.rows("inpaint") if r["real_seam"]], "real_seam")[0]
    assert "of no use: {} of the captions are right. As noisy as the rest it gives {}, but".format(
        halves[0., "still"][0], halves[0., "moving"][0]) in book
    assert ("pixels differ by {}, in real pictures by {}. With a tenth of such rows and a clean "
            "half it is {}, and {} of the captions are right; with a quarter {} and {}.").format(
                halves[0., "moving"][1], short(real, 3), *halves[0.1, "still"][::-1],
                *halves[0.25, "still"][::-1]) in book
    assert "with a Fréchet distance of {:.0f} and {:.0f} instead of {:.0f}.".format(
        *(value(share, "frechet", ("drawing",)) for share in (0.1, 0.25, 0.))) in book
    sides = [next(short(float(r["seen"])) for r in tables.rows("scenes") if end in r["command"]
                  and r["what"] == "drawing, position") for end in ("clean 0.25", "clean 0.1", "")]
    assert "drawings {} were right after 20,000 steps; with a tenth it did not come, {}; " \
        "without, {} (".format(*sides) in book
    told = [next(short(float(r["true"])) for r in tables.rows("revise") if (
        r["checkpoint"], r["wrong"], r["way"], r["guidance"]) == (name, "colour", "place", "1.0"))
        for name in ("metric, clean .1", "metric, clean .25", "metric")]
    assert "mends {} and {} at $g=1$ instead of {}.".format(*told) in book


def test_minutes_and_the_seam_are_those_of_the_studies(tables, book):
    minutes = [float(row["minutes"]) for row in tables.rows("toy")]
    assert (f"2,500 steps: about {sum(minutes) / len(minutes):.0f} minutes on one core"
            in README.read_text("utf-8"))
    seams = {row["kept"]: row["real_seam"] for row in tables.rows("inpaint")}
    seam = (float(seams["top"]) + float(seams["left"])) / 2
    assert f"its two sides, {short(seam, 3)} in real" in book


def test_what_is_said_of_texts_was_measured(tables, book):
    uniform, marginal, mask, twin = tables.characters()
    assert f"twin, has {twin} bits per character" in book
    assert (f"the mask path has at most {mask}, the uniform path {uniform}, and the marginal path "
            f"{marginal}") in book
    minutes = float(tables.rows("ar")[0]["minutes"])
    assert f"{minutes:.0f} minutes on one core" in book
    assert f"{minutes:.0f} minutes](tutorial.md#what-it-does-not-see)" in README.read_text("utf-8")
    held_out, default = ([r for r in tables.rows("written") if (
        r["name"], r["step"], r["temperature"]) == kind] for kind in (
            ("held-out", "", ""), ("uniform", "race", "0.7")))
    assert "costs it {:.2f} nats, one of held-out text {:.2f}".format(*(
        tables.mean(some, "nats")[0] for some in (default, held_out))) in book


def test_what_is_said_of_emoji_was_measured(tables, book):
    row = {row["what"].split(",")[0]: row for row in tables.rows("emoji")}
    words, again = (short(float(row[what]["words"])) for what in ("reading", "drawing"))
    captions = short(float(row["reading"]["captions"]))
    assert f"in {int(row['reading']['training_steps']):,} steps" in book
    assert f"it reads {words} of the words (captions: {captions})" in book
    assert f"of which it reads {again} again" in book
    assert f"render the pictures at {float(row['tokeniser']['PSNR']):.1f} dB" in book


def test_the_twenty_texts_are_those_of_the_study(tables, book):
    texts = tables.texts()
    assert len(texts) == 20 and " ".join(texts) in book


def test_the_notebook_has_all_blocks_as_cells_and_quotations_as_text(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "exercises")
    from notebook import notebook
    text = TUTORIAL.read_text("utf-8")
    cells = notebook(text)["cells"]
    code = ["".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"]
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    assert len(code) == len(blocks)
    for cell, block in zip(code, blocks):                   # and then the picture that it saves
        more = cell.removeprefix(block.strip("\n") + "\n")
        assert more.count("Image(") == block.count("save_image("), cell
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert prose.count("```python ") == len(QUOTATION.findall(text))
    assert len({cell["id"] for cell in cells}) == len(cells)
    namespace = {}
    for cell in code[2:4]:                                              # chapter 1 by itself
        exec("import torch\n" + cell, namespace)


def test_a_notebook_fetches_the_project_where_it_is_not_beside_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "exercises")
    import notebook
    first = notebook.notebook(TUTORIAL.read_text("utf-8"), "https://there/fudoki")["cells"][0]
    ran = []

    def run(command, check):
        ran.append(command)
        Path(command[-1]).mkdir() if "clone" in command else None
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    exec("".join(first["source"]), {})
    assert ran[0][:2] == ["git", "clone"] and "https://there/fudoki" in ran[0]
    assert ran[1][1:4] == ["-m", "pip", "install"] and Path.cwd() == tmp_path / "fudoki"

    Path("fudoki.py").touch()                               # beside it: nothing is fetched
    exec("".join(first["source"]), {})
    assert len(ran) == 2 and sys.path[0] == str(Path.cwd())
