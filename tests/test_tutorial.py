"""The tutorial's blocks run in order, its quotations are fudoki.py's own words, and no definition
of the method is left out. After a change of fudoki.py, `python tests/test_tutorial.py` brings the
quotations up to date."""
import ast
import csv
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TUTORIAL, README = ROOT / "tutorial.md", ROOT / "README.md"
QUOTATION = re.compile(r"^```python fudoki\.py\n(.*?)^```$", re.S | re.M)


def definitions():
    """{name: source} of every function, class, method and constant of fudoki.py; a method's name
    is Class.method, and its source keeps the indentation."""
    lines = (ROOT / "fudoki.py").read_text().splitlines(keepends=True)
    found = {}

    def add(nodes, prefix=""):
        for node in nodes:
            if isinstance(node, ast.Assign):
                constant = ast.walk(node.targets[0])        # a name, or several: the first one
                first = next(part.id for part in constant if isinstance(part, ast.Name))
                found[prefix + first] = "".join(lines[node.lineno - 1:node.end_lineno])
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first = min([node.lineno] + [d.lineno for d in node.decorator_list])
                found[prefix + node.name] = "".join(lines[first - 1:node.end_lineno])
            if isinstance(node, ast.ClassDef):
                add(node.body, node.name + ".")
    add(ast.parse("".join(lines)).body)
    return found


def name(quotation):
    """What a quotation defines."""
    method = " " * 4 if quotation.startswith(" ") else ""
    plain = re.sub(r"^ *@.*\n", "", quotation)
    word = re.search(rf"^{method}(?:def |class )?(\w+)", plain, re.M)[1]
    return f"Fudoki.{word}" if method else word


def test_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, namespace = TUTORIAL.read_text(), {}
    found = list(re.finditer(r"^```python\n(.*?)^```$", text, re.S | re.M))
    assert len(found) >= 8
    for block in found:
        line = text[:block.start(1)].count("\n")        # so that a traceback names the right one
        capsys.readouterr()
        exec(compile("\n" * line + block[1], "tutorial.md", "exec"), namespace)
        printed = re.match(r"\n\n```text\n(.*?)^```$", text[block.end():], re.S | re.M)
        assert not printed or capsys.readouterr().out == printed[1]


def test_quotations_are_verbatim_and_whole():
    known = definitions()
    for quotation in QUOTATION.findall(TUTORIAL.read_text() + README.read_text()):
        assert quotation == known[name(quotation)], f"not as in fudoki.py:\n{quotation}"


def test_every_definition_that_the_book_is_about_is_quoted():
    """All but how texts become rows of tokens, what generation is called with, and how a language
    model is taken apart."""
    plumbing = {"Text", "TOKENS", "padding", "question", "Fudoki.optimizer", "Fudoki.to_fill",
                "Fudoki.times", "Given", "OwnLogits"}
    quoted = {name(q) for q in QUOTATION.findall(TUTORIAL.read_text())}
    for known in definitions():
        parts = known.split(".")
        if known == "Fudoki" or plumbing & {known, parts[0]}:
            continue                                    # Fudoki by its methods
        assert parts[0] in quoted or known in quoted, f"{known} is not in the tutorial"


def test_notation_table_is_the_same_in_both():
    tables = [re.findall(r"^\| .*\|$", text, re.M)[:9] for text in
              ((ROOT / "fudoki.py").read_text(), TUTORIAL.read_text())]
    assert tables[0] == tables[1] and "λ" in tables[0][-1]


def test_samples_are_those_of_the_study():
    shown = re.findall(r"^\| (noshift|pretrained|scratch) \| (.*) \|$", TUTORIAL.read_text(), re.M)
    found = csv.DictReader(open(ROOT / "tests/bench/backbone_samples.csv"))
    found = [(row["start"], " ".join(row["text"].split())) for row in found]
    assert len(shown) == 3
    for start, text in shown:
        assert any(row[0] == start and row[1].startswith(text) for row in found), start


def test_numbers_in_the_prose_are_those_of_the_study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    import tables
    text = " ".join(TUTORIAL.read_text().split())

    def caption(**options):
        return tables.share(tables.cell(steps="8", **options), "caption")
    assert f"captions {caption(step='renoise')} renoised, {caption()} by the race" in text
    for row in tables.trainings():
        assert row in TUTORIAL.read_text(), row
    grey, codes = (1 - tables.worth(f"{kind}/metric 1", "bits", "image_bits")[0]
                   / tables.worth(f"{kind}/uniform", "bits", "image_bits")[0]
                   for kind in ("grey", "codes"))
    assert f"than the uniform path, by {grey:.0%} on grey levels and {codes:.0%}" in text
    bits, near = (lambda name, what=what, column=column: tables.worth(name, what, column)[0]
                  for what, column in (("bits", "image_bits"),
                                       ("repair image, near state 0.9", "repaired")))
    assert near("grey/metric 1") > near("grey/uniform")
    assert near("codes/metric 1") < near("codes/uniform")
    for tokens in ("codes", "grey"):
        many = [bits(f"{tokens}/{path}") for path in ("mask", "metric 1", "uniform", "metric 2")]
        assert many == sorted(many) and many[-1] < bits(f"{tokens}/metric 4")
    assert bits("shuffled/metric 2") > bits("grey/metric 4")
    for tokens in ("codes", "grey"):
        best, *others = (tables.worth(f"{tokens}/{path}", steps="8", **tables.chosen(
            f"{tokens}/{path}"))[0] for path in ("marginal", "uniform", "metric 1", "mixed 1"))
        assert best > max(others)
    spoiled = [tables.worth(f"codes/{path}", "repair image state 0.9", "spoiled")[0]
               for path in ("marginal", "uniform")]
    assert spoiled == sorted(spoiled)
    left = max(float(row["left"]) for row in tables.rows("paths")
               if row["left"] and "tempered" not in row["name"])
    assert f"leaves it at most {left:.2f} times".replace("0.", ".") in text
    minds = [float(row["minds"]) for row in tables.rows("paths") if row["steps"] == "8"
             and "tempered" not in row["name"]
             and row["what"] == "drawing" and row["guidance"] != "1.0"]
    assert f"changes {min(minds):.1f} to {max(minds):.1f} times".replace("0.", ".") in text
    told = [tables.repair("image", "0.2", "told", "0.0", name)[0] for name in tables.PATHS]
    assert "who is told which ones are wrong finds two thirds" in text
    assert all(abs(x - 2 / 3) < 0.03 for x in told)


if __name__ == "__main__":
    known = definitions()
    for file in (TUTORIAL, README):
        file.write_text(QUOTATION.sub(lambda q: f"```python fudoki.py\n{known[name(q[1])]}```",
                                      file.read_text()))
