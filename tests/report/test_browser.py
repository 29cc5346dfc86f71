"""The page in a browser: it fits, wide and narrow, by day and by night, asks for nothing, and its pictures are drawn."""

import json
import shutil

import pytest

from deltalab.report import build_report
from tests.report.fixture import drift_record, score_record
from tests.report.made_up import sweep_of

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


RECORDS = {
    "drift": drift_record,
    "sweep": lambda: drift_record((0, 1, 2), sweep={"lr": [1e-4, 3e-4, 1e-3], "steps": [100, 200, 400]}, ablate=0),
    "score-dynamics": lambda: score_record((42, 43, 44)),
}


def many_groups(folder):
    """A sweep of 24 groups with long names, some trials failed, in a folder that is there."""
    plan = {"adapt.r": [1, 2, 4, 8], "adapt.alpha": [8, 16], "optim.lr": [0.0001, 0.0003, 0.001]}

    def right(trial):
        spec = trial.spec
        return "out of memory" if spec.seed == 3 else 30 + 4 * spec.adapt[0].r + round(3000 * spec.optim.lr) + spec.seed

    sweep_of(folder, right, 100, product=plan)


@pytest.fixture(scope="module", params=[*RECORDS, "many groups"])
def page_file(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("study")
    if request.param in RECORDS:
        (folder / "record.json").write_text(json.dumps(RECORDS[request.param]()))
    else:
        many_groups(folder)
    with pytest.MonkeyPatch.context() as patch:  # the page alone
        patch.setattr("deltalab.report.figures.save", lambda plot, folder: [])
        return build_report(folder).page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1400])
def test_the_page_fits_and_asks_for_nothing(browser, page_file, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(page_file.as_uri())
    assert asked == [page_file.as_uri()]
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width))"
    )
    assert smallest >= 280  # at 310 points of width, letters of 9 points stay above 8 pixels
    outside = page.evaluate(
        "[...document.querySelectorAll('svg')].filter(s => s.closest('details') === null)"
        ".flatMap(s => [...s.querySelectorAll('g[id*=\"text_\"]')].filter(t => {"
        "const a = t.getBoundingClientRect(), b = s.getBoundingClientRect();"
        "return a.width && (a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1)"
        "}).map(t => s.getAttribute('aria-label').slice(0, 60)))"
    )
    assert outside == []  # no clipped letters
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    ink = page.evaluate("getComputedStyle(document.querySelector('svg [style*=\"fill: var(--ink)\"]')).fill")
    assert ink == ("rgb(27, 31, 36)" if scheme == "light" else "rgb(231, 234, 238)")
    page.close()
