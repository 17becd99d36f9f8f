"""figures/play.html has fudoki.py's numbers, and works in a browser: light, dark, on a phone."""
import base64
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fudoki

PAGE = Path(__file__).parent.parent / "figures/play.html"
CASES = [dict(name=name, where=where, x1=x1, t=t, exponent=exponent, kind=kind)
         for (name, exponent), (where, x1), kind, t in itertools.product(
             [("metric", 1), ("metric", 4), ("uniform", 1), ("marginal", 1), ("mask", 1)],
             [("line", 5), ("plane", 0)], ["calibrated", "linear"], [0.05, 0.5, 0.9])]


def test_the_page_has_the_numbers_of_the_project():
    """p_t and the flux j(z, x) = p_t(z) u_t(x, z), of all paths, worlds and clocks."""
    if not shutil.which("node"):
        pytest.skip("node runs the page's formulas, and is not here")
    maths = re.search(r'<script id="maths">\n(.*?)</script>', PAGE.read_text("utf-8"), re.S)[1]
    asked = f"""const found = {json.dumps(CASES)}.map(how => ({{
        world: WORLDS[how.where], p: softmax(logits(how)), flux: flux(how) }}));
        console.log(JSON.stringify(found));"""
    done = subprocess.run(["node", "-"], input=maths + asked, capture_output=True,
                          encoding="utf-8")
    assert done.returncode == 0, done.stderr

    for case, its in zip(CASES, json.loads(done.stdout)):
        options = dict(exponent=case["exponent"]) if case["name"] == "metric" else {}
        path = fudoki.PATHS[case["name"]](
            torch.tensor(its["world"]["points"]).float(),
            torch.tensor(its["world"]["frequency"]), **options).on(case["kind"])
        states = torch.arange(len(path.embedding))
        at = states, torch.full_like(states, case["x1"]), torch.full((len(states), 1), case["t"])
        p_t = path(*at[1:]).softmax(-1)[0]
        flux = p_t[:, None] * fudoki.kinetic_optimal(path, *at)
        assert (torch.tensor(its["p"]) - p_t).abs().max() < 0.01, case
        assert (torch.tensor(its["flux"]) - flux).abs().max() < 0.02 + 0.05 * flux.max(), case


def test_generations_are_recorded_whole():
    shows = json.loads(re.search(r'type="application/json">(.*?)</script>',
                                 PAGE.read_text("utf-8"), re.S)[1])
    assert shows
    for show in shows:
        patches = len(base64.b64decode(show["codes"])) // (show["patch"] ** 2 * show["channels"])
        assert set(show["paths"]) >= {"metric", "uniform", "mask"}
        for name, run in show["paths"].items():
            n, N = len(run["predictions"]), show["side"] ** 2
            assert len(run["states"]) == len(run["times"]) == n + 1
            assert all(len(state) == N for state in run["states"] + run["predictions"])
            known = {*sum(run["states"], []), *(i for prediction in run["predictions"]
                                                for place in prediction for i, _ in place)}
            assert max(known) < patches - (name != "mask")      # the last one is [MASK]
        assert {*show["paths"]["mask"]["states"][0]} == {patches - 1}


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright looks at the page")
    where = shutil.which("chromium") or shutil.which("google-chrome")
    if not where:
        pytest.skip("there is no browser here")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width, scheme", [(1000, "light"), (1000, "dark"), (380, "light")])
def test_the_page_works_in_a_browser(browser, width, scheme):
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(PAGE.as_uri())

    def clean_bar():
        return float(page.get_attribute("#metric rect[fill='var(--clean)']", "height"))

    def move(control, value):
        page.eval_on_selector(f"#{control}", "(e, v) => { e.value = v; e.dispatchEvent("
                              "new Event('input', { bubbles: true })); }", value)
    for t, height in ((0, 105 / 8), (1, 105)):                      # p_t(x₁) is 1/8, then 1
        move("t", t)
        assert abs(clean_bar() - height) < 0.1
        assert page.locator(".ring").count() == 4                   # one token on each path
    for control, value in (("world", "plane"), ("clock", "linear"), ("exponent", 4), ("x", 11),
                           ("t", 0.3)):
        move(control, value)
    page.click("#mask")
    assert "on the mask path" in page.text_content("#race-title")
    page.click("#again")
    page.click("#play")
    page.wait_for_function("document.getElementById('t').value > 0.02")

    for k in range(9):
        move("k", k)
        page.hover("#draws-metric")
    assert "This is the end." in page.text_content("#place")
    move("k", 3)
    assert "Likeliest:" in page.text_content("#place")

    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light") and not said
    assert page.evaluate("document.documentElement.scrollWidth") <= width
