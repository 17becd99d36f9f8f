"""Writes the tables of README, tutorial and tests/bench/README.md from the CSVs of this folder:

    python tests/bench/tables.py

A table stands below a comment `<!-- name argument -->`, or several with commas between them: the
functions of this file that return its rows. Its head stays as it is. Reports of trainings are
shown seed by seed, studies as means over the seeds ± standard errors.
"""
import csv
import itertools
import math
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [ROOT / name for name in ("README.md", "tutorial.md", "tests/bench/README.md")]
TABLE = re.compile(r"(<!-- ([\w, ]+) -->\n(?:```text\n|\|.*\n\|[-|]+\n))((?:(?!```)[^\n]+\n)*)")
DRAW = dict(checkpoint="metric", step="race", steps="4", guidance="2.0", temperature="0.7",
            best_of="1", times="even")
PATHS = "metric", "uniform, linear", "marginal, linear", "mask, linear"
ORACLE = "metric", "metric, shuffled", "uniform", "marginal", "mask"
STEPS = {"released": "Euler as released", "increments": "Euler, increments",
         "euler": "Euler, mid-step", "race": "race (exact)", "renoise": "renoise"}
GIVEN = {"moving": "as noisy as the rest", "still": "clean"}
ABILITIES = "single", "two", "counting", "colours", "position", "attribution"
QUESTIONS = "colour", "count", "position", "presence"
PRESETS = {"adapted": "ar --backbone story-656K"}       # of reports that have another name
STARTS = {"pretrained": "pretrained", "lower": "the lower layer random",
          "layers": "both layers random",
          "random": "all random", "random@6e-3": "all random, learning rate .006",
          "frozen": "layers stay as they are", "stages": "words stay at first",
          "small": "the small trunk", "shallow": "the small trunk, two layers of width 128"}
WAYS = {"state": "as it is", "draft": "noise of t = {} added", "told": "told which"}


def rows(name):
    return list(csv.DictReader(open(ROOT / f"tests/bench/{name}.csv", encoding="utf-8")))


def mean(found, column):
    """Mean and standard error over the seeds."""
    values = [float(row[column]) for row in found]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def reports(name):
    """The trainings of a preset: their reports, one after the other in a CSV."""
    found, all_rows, preset = [], rows(name), PRESETS.get(name, name)
    for seed in sorted({row["seed"] for row in all_rows}):
        report = {row["what"].split(",")[0]: row for row in all_rows if row["seed"] == seed}
        pair = {what: f"{float(row['digit']):.3f} / {float(row['caption']):.3f}"
                for what, row in report.items() if row["caption"]}
        drawn, real = (float(report[what]["frechet"]) for what in ("drawing", "ceiling"))
        found.append(f"| `{preset}`, seed {seed} | {report['judge']['training_steps']} | "
                     f"{pair['drawing']} | {drawn:.1f} ({real:.1f}) | {pair['reading']} | "
                     f"{pair.get('answers', '')} | {pair['ceiling']} |"
                     .replace(" 0.", " .").replace("|  |", "| |"))
    return found


def speed():
    """The table of what noise, steps and training cost."""
    def cell(a, b, digits):
        return f"{float(a):.{digits}f} ({float(a) / float(b):.2f})" if b else ""
    return [f"| {r['what']} | {cell(r['seconds'], r['plain_s'], 3)} | "
            f"{cell(r['MB'], r['plain_MB'], 0)} |".replace("|  |", "| |").replace("0.", ".")
            for r in rows("speed") if r["plain_s"]]


def noises():
    """The table of paths for the words of a real language model: bits of a token."""
    found = []
    for start, name in {"uniform": "uniform", "marginal": "marginal", "½": "metric, ½",
                        "pretrained": "metric, 1", "2": "metric, 2", "4": "metric, 4"}.items():
        some = [r for r in rows("backbone") if (r["model"], r["text"], r["start"], r["step"]) == (
            "SmolLM2-135M", "tinystories_sample", start, "150")]
        found.append(f"| {name} | {', '.join(format(float(r['loss']), '.2f') for r in some)} | "
                     f"{', '.join(format(float(r['bits']), '.1f') for r in some)} |")
    return found


def pretraining():
    """The table of what the weights of a language model's body bring, by body.csv."""
    last = [row for row in rows("body") if row["model"] == "story-656K" and row["right"]]

    def cell(start, data, modality, column, digits):
        return ", ".join(f"{float(row[column]):.{digits}f}".removeprefix("0") for row in last if (
            row["start"], row["data"], row["modality"]) == (start, data, modality))
    columns = [("digits", "image", "right", 2), ("digits", "text", "right", 2),
               ("scenes", "image", "right", 2), ("scenes", "text", "right", 2),
               ("stories", "text", "loss", 2), ("stories", "text", "right", 1)]
    lines = [f"| {name} | " + " | ".join(cell(start, *column) for column in columns) + " |"
             for start, name in STARTS.items()]
    return [line.replace("|  ", "| ").replace("|  ", "| ") for line in lines]


def corpora():
    """The tutorial's rows of trainings on texts: their reports."""
    found = []
    for report in (rows("text"), rows("ar")):
        value = {row["what"]: float(row["value"]) for row in report}
        entropy = " / ".join(f"{value[f'held-out cross-entropy at t = {t}']:.2f}"
                             for t in ("0.05", "0.45", "0.95"))
        written, held_out = (f"{value[f'share of {what} words that the training text has']:.2f}"
                             for what in ("written", "held-out"))
        command = report[0]["command"].removeprefix("python train.py ")
        found.append(f"| `{command}` | {report[0]['training_steps']} | {entropy} | "
                     f"{written} ({held_out}) |".replace(" 0.", " .").replace("(0.", "(."))
    return found


def written(prefix=""):
    """The table of what a language model that became a flow writes, by options."""
    groups = {}
    for r in rows(f"{prefix}written"):
        how = f"{r['name']}, {r['step']}, {r['steps']} steps, T = {r['temperature']}" \
              + f", late {r['late']}" * (r["late"] not in ("", "1.0"))
        how = how if r["step"] else f"causal, T = {r['temperature']}"
        groups.setdefault("held-out text" if r["name"] == "held-out" else how, []).append(r)
    return [f"| {how} | {len(some)} | {mean(some, 'nats')[0]:.2f} | "
            f"{mean(some, 'different')[0]:.2f} |".replace("0.", ".")
            for how, some in groups.items()]


def sight(prefix=""):
    """The table of wrong words that such a model sees, by what they are."""
    groups = {}
    for r in rows(f"{prefix}seen"):
        groups.setdefault(r["name"], []).append(f"{float(r['seen']):.2f}".removeprefix("0"))
    return [f"| {name} | {' | '.join(shares)} |" for name, shares in groups.items()]


def texts():
    """Twenty of them, on one line each, by the default options, unselected."""
    return [" ".join(r["text"].split()) for r in rows("written") if (
        r["name"], r["step"], r["steps"], r["late"], r["temperature"]) == (
        "uniform", "race", "64", "1.0", "0.7")]


def stories():
    """Three of the twenty texts of the small language model, on one line each, by the default
    options; nats of a token and the share of different ones, of these and other texts; and the
    bits of a token, mean and standard error, along both velocities."""
    texts = [" ".join(r["text"].split()) for r in rows("story_written") if (
        r["name"], r["step"], r["steps"], r["temperature"]) == ("uniform", "race", "64", "0.7")]
    return texts[:3], [mean(rows("story_bits"), c) for c in ("bits", "bits_reversal")]


def scenes(which):
    """The trainings on scenes, by ability: with "patches" of 4; of the others by the "own" clock
    of the path, by noise by frequency or with rows that are given a part; and the "main" ones."""
    found, all_rows = [], rows("scenes")
    for command in dict.fromkeys(row["command"] for row in all_rows):
        own = r"--clock linear|--clean 0\.|--path marginal"
        kind = "own" if re.search(own, command) else "main"
        kind = "patches" if "--patch 4" in command else kind
        if kind != which:
            continue
        report = {row["what"]: row for row in all_rows if row["command"] == command}
        path = (re.search(r"--path (\w+)|$", command)[1] or "metric")
        path += ", linear" * ("--clock linear" in command)
        path += re.search(r"--clean 0(\.\d+)|$", command).expand(r", clean \1") \
            if "--clean 0." in command else ""

        def cells(column, *names):
            return " / ".join(f"{float(report[name][column]):.2f}" for name in names)
        mean, *_ = report.values()
        found.append(
            f"| {path}{', patches of 4' * ('--patch 4' in command)}"
            f"{', anywhere' * ('--anywhere' in command)}, seed {mean['seed']} | "
            f"{mean['training_steps']} | "
            f"{cells('seen', *(f'drawing, {a}' for a in ABILITIES))} | "
            + " | ".join(cells(c, "drawing, mean") for c in ("seen", "unseen", "best of 8"))
            + f" | {cells('seen', 'reading, captions that are true')} | "
            + cells("seen", *(f"answers, {kind}" for kind in QUESTIONS)) + " |")

    names = [row.partition(", seed")[0] for row in found]               # seeds stand together
    return [row.replace(" 0.", " .") for _, row in sorted(
        zip(names, found), key=lambda pair: names.index(pair[0]))]


def revised():
    """The table of scenes that contradict their caption: true pictures and, of them,
    tokens kept."""
    ways = [("state", "0.9"), ("corrector", "0.5"), ("draft", "0.3"), ("draft", "0.5"),
            ("place", "0.0")]
    found, known = [], {(r["checkpoint"], r["wrong"], r["guidance"], r["way"], r["t"]): r
                        for r in rows("revise")}
    for name, wrong, g in dict.fromkeys(key[:3] for key in known):
        cells = [" / ".join(f"{float(row[c]):.2f}" for c in ("true", "kept")) if row else " " * 11
                 for row in (known.get((name, wrong, g, *way)) for way in ways)]
        found.append(f"{name:17} {wrong:9} g = {float(g):g}  {'  '.join(cells)}"
                     .replace("nan", "   ").rstrip())
    return [" " * 36 + "as it is     corrector    t = .3       t = .5       its place", *found]


def trainings():
    """The table of the settings of training."""
    found, all_rows = [], rows("training")
    for name in dict.fromkeys(row["variant"] for row in all_rows):
        some = [row for row in all_rows if row["variant"] == name]
        cells = [f"{mean(some, c)[0]:.3f}" for c in (
            "digit", "caption", "reading_digit", "reading_caption", "answers", "loss_t0.05")]
        found.append(f"| {name} | {len(some)} | {cells[0]} / {cells[1]} | "
                     f"{mean(some, 'frechet')[0]:.1f} | {cells[2]} / {cells[3]} | "
                     f"{cells[4]} | {cells[5]} |".replace(" 0.", " ."))
    return found


def cell(**options):
    """The rows of sampling.csv with these options, and otherwise those of DRAW."""
    wanted = (DRAW | options).items()
    return [row for row in rows("sampling") if all(row[k] == v for k, v in wanted)]


def line(what, found):
    """A row of a table: digit, caption, Fréchet."""
    cells = [share(found, c) for c in ("digit", "caption")]
    cells.append("{:.1f} ± {:.1f}".format(*mean(found, "frechet")))
    return f"| {what} | " + " | ".join(cells) + " |"


def paths():
    """The table of the three paths by steps."""
    return [line(f"{name}, {n} step{'s' * (n != '1')}", found)
            for name in PATHS for n in "1 2 4 8 32".split()
            if (found := cell(checkpoint=name, steps=n))]


def options():
    """The table of all other options, of the metric path if it says nothing else."""
    found = [(f"{STEPS[step]}, {n} steps", dict(step=step, steps=n))
             for n in "2 4 8".split() for step in STEPS]
    found += [(f"guidance {g}, 4 steps", dict(guidance=g))
              for g in ("1.0", "1.5", "2.0", "2.5", "3.0")]
    found += [(f"temperature {T}, 4 steps", dict(temperature=T)) for T in ("0.5", "0.7", "1.0")]
    found += [(f"times by equal loss, {n} steps", dict(steps=n, times="loss"))
              for n in "2 4".split()]
    found += [(f"late times, {n} steps", dict(steps=n, times="late")) for n in "2 4 8".split()]
    found += [(f"best of {n}, 4 steps", dict(best_of=n)) for n in "1 4 16".split()]
    found += [(f"{name}, renoise, 8 steps", dict(checkpoint=name, steps="8", step="renoise"))
              for name in PATHS[1:]]
    return [line(what, some) for what, option in found if (some := cell(**option))]


def share(found, column):
    """.987 ± .003"""
    return "{:.3f} ± {:.3f}".format(*mean(found, column)).replace("0.", ".")


def parts():
    """The table of given parts: pictures of which a half is kept, captions with a gap."""
    found = []
    for name, given in itertools.product(PATHS, GIVEN):
        some = [row for row in rows("inpaint")
                if (row["given"], row["checkpoint"]) == (given, name)]
        words = [row for row in some if row["kept"] == "words"]
        halves = [[row for row in some if row["kept"] == kept] for kept in ("top", "left")]
        half = [{c: (float(a[c]) + float(b[c])) / 2 for c in "digit caption frechet seam".split()}
                for a, b in zip(*halves)]
        found.append(f"| {name}, {GIVEN[given]} | {share(half, 'digit')} | "
                     f"{share(half, 'caption')} | "
                     "{:.1f} ± {:.1f} | ".format(*mean(half, "frechet"))
                     + f"{share(half, 'seam')} | {share(words, 'caption')} |")
    return found


def clean():
    """The table of trainings in which some rows had a part that was clean."""
    found, all_rows = [], rows("given")
    for share, steps, seed in sorted({(r["clean"], r["steps"], r["seed"]) for r in all_rows}):
        some = {(r["what"], r["given"]): r for r in all_rows
                if (r["clean"], r["steps"], r["seed"]) == (share, steps, seed)}
        halves = [[some["top", way], some["left", way]] for way in GIVEN]
        cells = [f"{float(some['drawing', '']['digit']):.3f} / "
                 f"{float(some['drawing', '']['caption']):.3f}, "
                 f"{float(some['drawing', '']['frechet']):.1f}",
                 f"{float(some['reading', '']['caption']):.3f}",
                 *(f"{mean(half, 'caption')[0]:.3f}, {mean(half, 'frechet')[0]:.1f}, "
                   f"{mean(half, 'seam')[0]:.3f}" for half in halves),
                 " / ".join(f"{float(some['words', way]['caption']):.3f}" for way in GIVEN)]
        found.append(f"| {float(share):.2f}, seed {seed} | {' | '.join(cells)} |"
                     .replace(" 0.", " ."))
    return found


def repair(kind, damaged, way, t, name):
    """Means of repaired, spoiled, left."""
    key = kind, damaged, way, t, name
    found = [row for row in rows("repair") if key == tuple(
        row[k] for k in ("modality", "damaged", "way", "t", "checkpoint"))]
    return [mean(found, c)[0] for c in ("repaired", "spoiled", "left") if found[0][c]]


def repairs():
    """The table of repairs: repaired / spoiled / left, for each path."""
    found = []
    for kind, damaged in (("image", "0.2"), ("image, near", "0.2"), ("text", "0.33")):
        for way, t in (("state", "0.9"), ("draft", "0.3"), ("draft", "0.7"), ("told", "0.0")):
            cells = [" / ".join(f"{v:.2f}" for v in repair(kind, damaged, way, t, name))
                     for name in PATHS]
            found.append(f"| {kind} | {WAYS[way].format(t)} | " + " | ".join(cells) + " |")
    return [row.replace(" 0.", " .") for row in found]


def worth(name, what="drawing", column="caption", **options):
    """Mean and standard error over the seeds of a cell of paths.csv; options as of its columns."""
    found = [row for row in rows("paths") if row["name"] == name and row["what"] == what
             and all(row[k] == v for k, v in options.items()) and row[column]]
    return mean(found, column) if found else None


def chosen(name):
    """The guidance and temperature of a path's drawings: not 1 and 1, with which all are drawn."""
    return next(({k: row[k] for k in ("guidance", "temperature")} for row in rows("paths")
                 if row["name"] == name and row["what"] == "drawing" and row["guidance"] != "1.0"),
                {})


def bits(name):
    """Of every training with this name: the bound along the velocity that bounds best."""
    found = [row for row in rows("paths") if row["name"] == name and row["what"] == "bits"]
    return [min(float(row[c]) for c in ("image_bits", "image_bits_ko") if row[c])
            for row in found]


def levels():
    """The table of bits by clock and by how often noise levels are trained."""
    return [f"| {path} | " + " | ".join(
        ", ".join(f"{b:.0f}" for b in bits(f"codes/{path}{how}"))
        for how in (", linear", "", ", t^1")) + " |" for path in ("uniform", "marginal", "mask")]


def drawn(name, steps):
    """The drawings of every training with this name, by its best options."""
    options = (dict(steps=steps) | chosen(name)).items()
    return [row for row in rows("paths") if row["name"] == name and row["what"] == "drawing"
            and all(row[k] == v for k, v in options)]


def seen(name):
    """Scenes that are true of their caption, of every training of 20,000 steps with this path."""
    path = name.partition(", ")[0].replace("metric 1", "metric")
    wanted = "drawing, mean", "20000", path, "linear" in name
    return [float(row["seen"]) for row in rows("scenes")
            if "t^" not in name and "--clean" not in row["command"]
            and wanted == (row["what"], row["training_steps"],
                           re.search(r"--path (\w+)|$", row["command"])[1] or "metric",
                           "linear" in row["command"])]


def metrics(steps="8"):
    """The table of paths and kinds of tokens, from paths.csv."""
    found, kinds = [], ("uniform, linear", "uniform", "uniform, t^1", "marginal, linear",
                        "marginal", "marginal, t^1", "metric 0.5", "metric 1", "metric 2",
                        "metric 4", "student", "mask, linear", "mask", "mask, t^1")
    for name in (f"{tokens}/{path}" for tokens in ("codes", "tenth", "fine", "grey", "shuffled")
                 for path in kinds):
        if not worth(name, steps="32"):
            continue
        options = chosen(name)
        cells = [worth(name, column=c, steps=steps, **options)
                 for c in ("digit", "caption", "frechet", "minds")]
        far, near = (worth(name, f"repair {kind} state 0.9", "repaired")[0]
                     for kind in ("image", "image, near"))
        spoiled = worth(name, "repair image state 0.9", "spoiled")[0]
        found.append(
            f"| {name.replace('/', ', ').replace('metric', 'exponent')} | "
            f"{trainings_of(name)} | "
            f"{worth(name, 'bits', 'image_bits')[0]:.0f} / "
            f"{worth(name, 'bits', 'image_bits_ko')[0]:.0f} | "
            f"{cells[0][0]:.3f} / {cells[1][0]:.3f} | {cells[2][0]:.1f} | "
            f"{far:.2f} / {spoiled:.2f} | {near:.2f} | {cells[3][0]:.2f} |".replace(" 0.", " ."))
    return found


def verdict():
    """The table of chapter 9: paths on the toy's codes and in scenes, each by its better clock."""
    found = []
    for path, name in {"mask": "mask, linear", "uniform": "uniform, linear",
                       "marginal": "marginal, linear", "metric, exponent 1": "metric 1",
                       "metric, exponent 2": "metric 2", "metric, exponent 4": "metric 4"}.items():
        code, clocks = f"codes/{name}", (name, name.removesuffix(", linear"))
        caption, frechet = (worth(code, column=c, steps="8", **chosen(code))[0]
                            for c in ("caption", "frechet"))
        right = max(map(seen, clocks), key=lambda shares: sum(shares) / max(1, len(shares)))
        found.append(f"| {path} | {statistics.mean(bits(code)):.0f} | {caption:.3f} | "
                     f"{frechet:.1f} | {worth(code, 'repair image state 0.9', 'repaired')[0]:.2f} "
                     f"| {', '.join(f'{share:.2f}' for share in right)} |"
                     .replace(" 0.", " .").replace("|  |", "| |"))
    return found


def more_steps():
    """What 32 steps are worth against 8, over all trainings of paths.csv: differences and their
    standard errors, without guidance and at temperature 1, and with a path's best options."""
    found, drawn = [], [row for row in rows("paths") if row["what"] == "drawing"
                        and row["steps"] in ("8", "32") and "evidence" not in row["name"]
                        and "tempered" not in row["name"]]
    for plain, what in ((True, "temperature 1, no guidance"), (False, "best options for 8 steps")):
        pairs = {}
        for row in drawn:
            if (row["guidance"] == "1.0") == plain:
                pairs.setdefault((row["name"], row["seed"]), {})[row["steps"]] = row
        pairs = [pair for pair in pairs.values() if len(pair) == 2]
        cells = [mean([{c: float(pair["32"][c]) - float(pair["8"][c])} for pair in pairs], c)
                 for c in ("digit", "caption", "frechet")]
        found.append(f"{what:27} {len(pairs)} trainings: " + ", ".join(
            f"{word} {value:+.{n}f} ± {error:.{n}f}" for word, n, (value, error) in
            zip(("digits", "captions", "Fréchet"), (3, 3, 1), cells)))
    return found


def tempered():
    """The table of what temperature is worth with more steps, from paths.csv."""
    found, kinds = [], {"": "as usual", ", tempered": "prior tempered",
                        ", evidence": "evidence added",
                        ", evidence, tempered": "evidence added, prior tempered"}
    for path, (kind, what) in itertools.product(
            ("codes/mask, linear", "codes/marginal, linear", "codes/uniform, linear",
             "codes/metric 1", "grey/mask, linear", "grey/marginal, linear",
             "grey/uniform, linear"),
            kinds.items()):
        options = chosen(path + kind)
        if worth(path + kind, steps="32", **options):
            cells = [", ".join(f"{worth(path + kind, column=c, steps=n, **options)[0]:{form}}"
                               for c, form in (("caption", ".3f"), ("frechet", ".1f")))
                     for n in ("2", "8", "32")]
            name = path.replace("/", ", ").replace("metric", "exponent")
            found.append(f"| {name}, {what} | {trainings_of(path + kind)} | "
                         f"{' | '.join(cells)} |".replace(" 0.", " ."))
    return found


def true(path, clock, steps, late=1, temperature=1):
    """What exact posteriors reach, from oracle.csv: the mean of the four captions."""
    return statistics.mean(float(row["true"]) for row in rows("oracle") if (
        row["path"], row["clock"], *(float(row[c]) for c in ("late", "temperature", "steps"))) == (
        path, clock, late, temperature, steps))


def oracle():
    """Exact posteriors by path, clock, times, temperature and steps."""
    found, steps = [], (2, 4, 8, 16, 32)
    for path, (clock, late, temperature) in itertools.product(ORACLE, (
            ("linear", 1, 1), ("linear", 2, 1), ("calibrated", 1, 1), ("calibrated", 2, 1),
            ("calibrated", 1, 0.5))):
        cells = "  ".join(f"{true(path, clock, n, late, temperature):.2f}" for n in steps)
        found.append(f"{path:16}  {clock:10}  {late}     T = {temperature:<3g}  {cells}")
    head = "path              clock       late  steps" + "".join(f"{n:>6}" for n in steps)
    return [head, *found]


def late(steps, late, name="uniform"):
    """What late steps reach in scenes: share of true drawings, from late.csv."""
    return statistics.mean(float(row["true"]) for row in rows("late") if (
        row["checkpoint"], int(row["steps"]), float(row["late"])) == (name, steps, late))


def trainings_of(name):
    """How many seeds have been measured."""
    return len({row["seed"] for row in rows("paths") if row["name"] == name})


def characters():
    """README's bits per character of a text: the paths' bounds, the twin's likelihood."""
    found = {row["model"]: row for row in rows("bits")}
    return [f"{float(found[name]['bits']):.2f}"
            for name in ("uniform", "marginal", "mask", "twin")]


def filled(text):
    """A text with the rows of its tables as the CSVs have them now."""
    def table(found):
        calls = [call.split() for call in found[2].split(", ")]
        made = [row for name, *given in calls for row in globals()[name](*given)]
        return found[1] + "".join(f"{row}\n" for row in made)
    return TABLE.sub(table, text)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
