"""The report from a record: every number comes from it, the page is one file, a change of the record shows."""

import copy
import html.parser
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from deltalab.core.errors import UserError
from deltalab.report import build_report, contents, figures, panels, plots, values
from deltalab.report.page import page
from deltalab.report.text import table, text
from tests.report.fixture import GROUPS, KINDS, SETS, STEPS, drift_record


@pytest.fixture(scope="module")
def record():
    return drift_record()


@pytest.fixture(scope="module")
def built(tmp_path_factory, record):
    folder = tmp_path_factory.mktemp("study")
    (folder / "record.json").write_text(json.dumps(record))
    return build_report(folder)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages and files without their pictures, where these are not what is tested: drawing takes seconds."""
    monkeypatch.setattr("deltalab.report.page.inline", lambda panel, number: f'<svg aria-label="{number}"></svg>')
    monkeypatch.setattr("deltalab.report.figures.save", lambda plot, folder: [])


class Page(html.parser.HTMLParser):
    """Tags with their attributes, ids, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def parsed(built):
    return Page(built.page.read_text())


def numbers(value) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_everything_is_written(built):
    assert built.page.stat().st_size < 1.5e6
    names = {p.name for p in built.figures}
    assert {
        "outcomes.png",
        "outcomes.svg",
        "drift-free.png",
        "distributions.svg",
        "groups.png",
        "losses.svg",
        "times.svg",
    } <= names
    for path in built.figures:
        head = path.read_bytes()[:400]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in head or b"<?xml" in head
        if path.suffix == ".svg":
            ET.parse(path)


def test_the_page_asks_nothing_of_a_network(built, parsed):
    source = built.page.read_text()
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                assert value.startswith("#"), (tag, name, value)
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)
    outside = set(re.findall(r"https?://[^\s\"'<>]+", source)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert outside == set()


def test_ids_are_unique_and_references_resolve(built, parsed):
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    source = built.page.read_text()
    used = (
        set(re.findall(r'href="#([^"]+)"', source))
        | set(re.findall(r"url\(#([^)]+)\)", source))
        | set(re.findall(r'aria-labelledby="([^"]+)"', source))
    )
    assert used <= set(ids)


def test_the_page_is_readable_by_a_screen_reader(parsed):
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert ("html", {"lang": "en"}) in parsed.tags
    svgs = [a for tag, a in parsed.tags if tag == "svg"]
    assert len(svgs) >= 15
    assert all(a.get("role") == "img" and len(a["aria-label"]) > 40 for a in svgs)
    heads = [a for tag, a in parsed.tags if tag == "th"]
    assert all(a.get("scope") in ("row", "col") for a in heads)
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in parsed.tags)


def test_the_verdict_stands_first_and_the_spec_can_be_copied(built, parsed, record):
    import yaml

    words = "".join(parsed.words)
    places = [words.index(v["sentence"].replace(" %", "\u00a0%")) for v in record["verdicts"]]
    assert places == sorted(places)
    assert places[-1] < words.index("share") if "share" in words else True
    spec = re.search(r"<h3>Spec</h3>\s*<pre><code>(.*?)</code>", built.page.read_text(), re.S)
    assert yaml.safe_load(html.unescape(spec[1])) == record["spec"]


def contrast(a: str, b: str) -> float:
    """WCAG's ratio of two hex colours."""
    light = []
    for colour in (a, b):
        colour = colour.lstrip("#")
        colour = "".join(c * 2 for c in colour) if len(colour) == 3 else colour
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, bl = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        light.append(0.2126 * r + 0.7152 * g + 0.0722 * bl)
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_colours_have_contrast_by_day_and_night():
    from importlib.resources import files

    css = files("deltalab.report").joinpath("style.css").read_text()
    schemes = [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(schemes) == 3
    for scheme in schemes:
        for name in ("ink", "soft", *figures.COLOURS):
            for ground in ("paper", "sheet"):
                assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground, scheme[name])
        for name in figures.COLOURS:
            assert contrast(scheme[name], scheme["on"]) >= 4.5, name
    assert schemes[0]["orange"] == figures.COLOURS["orange"]


def test_figures_hold_the_records_numbers(record):
    by_name = {plot.name: plot for plot in plots.plots(record)}
    rates = {p.name: p for p in by_name["outcomes"].panels}
    for name in SETS:
        for row, arm in zip(rates[f"refusal-{name}"].rows, record["arms"].values(), strict=True):
            rate = arm["safety"][name]["refusal"]
            assert (row.label, row.value, row.low, row.high) == (arm["label"], rate["value"], rate["low"], rate["high"])
            assert row.n == SETS[name]
    assert [row.hollow for row in rates["skills"].rows] == [True, False, False, False]
    replies = rates["replies-advbench"]
    assert replies.rows[1][1] == [record["arms"]["free"]["safety"]["advbench"][part] for part in replies.parts]
    panel = by_name["drift-free"].panels[0]
    assert list(panel.x) == list(STEPS)
    for line in panel.lines:
        assert line.values == [
            row["groups"][line.label.removesuffix(" (frozen)")]["l2_per_sqrt"]
            for row in record["arms"]["free"]["curves"]
        ]
    low = [row["nulls"]["safety-only"]["band"]["l2_per_sqrt"]["low"] for row in record["arms"]["free"]["curves"]]
    assert panel.band[0] == low
    spreads = by_name["distributions"].panels
    assert [row.zeros for row in spreads[1].rows] == [0, 0, 900, 0]
    assert spreads[0].rows[0].quantiles[1] == record["arms"]["free"]["distributions"]["safety"]["quantiles"]["0.5"]
    assert spreads[0].limits == spreads[1].limits
    grid = by_name["groups"].panels[0]
    assert (list(grid.rows), len(grid.columns)) == (list(GROUPS), len(KINDS))
    assert by_name["times"].panels[0].rows == list(record["stages"].items())


def test_panels_of_arms_share_their_axes(record):
    tops = {}
    for plot in plots.plots(record):
        if plot.name.startswith("drift-"):
            for panel in plot.panels:
                tops.setdefault(panel.title, set()).add(panel.top)
    assert all(len(t) == 1 for t in tops.values())
    assert len(tops) == 3


def test_every_number_of_the_text_comes_from_the_record(built, record):
    """Each cell of the tables is a number of the record as `number`, `percent` or a count writes it."""
    known = set()
    for n in [abs(n) for n in numbers(record)]:
        known |= {
            values.number(n).replace("−", "-"),
            f"{n:,.0f}",
            f"{100 * n:.0f}",
            f"{100 * n:.1f}",
            f"{100 * n:.2f}",
            f"{n:.0f}",
            f"{n:.3f}",
            f"{n / 1e6:.2f}",
            f"{n:g}",
        }
    checked = 0
    for t in values.tables(record):
        for row in t.rows:
            for cell in row[1:]:
                for found in re.findall(r"(?<![a-z])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", cell.replace("−", "-")):
                    if "%" in cell and "minus" in cell:
                        continue  # a group's label, which the record holds as words
                    assert found in known, (t.name, cell, found)
                    checked += 1
    assert checked > 150
    whole = built.text.read_text()
    for t in values.tables(record):
        assert table(t) in whole
    for verdict in record["verdicts"]:
        assert f"* {verdict['name']}: {verdict['outcome']}." in whole


def test_a_change_of_the_record_shows(record):
    changed = copy.deepcopy(record)
    changed["arms"]["frozen"]["freeze"] |= {"max_change": 0.0123, "held": False}
    changed["arms"]["free"]["safety"]["advbench"]["refusal"] = {"value": 0.111, "low": 0.06, "high": 0.19}
    said = text(contents.contents(changed))
    assert "0.0123" in said
    assert re.search(r"safety-only frozen .* NO$", said, re.M)
    assert "11 % [6, 19]" in said
    assert "11 % [6, 19]" not in text(contents.contents(record))


def test_the_json_twin_has_what_the_figures_draw(built, record):
    twin = json.loads(built.json.read_text())
    assert twin["spec"] == record["spec"]
    assert twin["verdicts"] == record["verdicts"]
    drawn = {f["name"]: f for s in twin["sections"] for f in s["figures"]}
    values_ = drawn["drift-free"]["panels"][0]["lines"][0]["values"]
    assert values_ == [row["groups"]["safety"]["l2_per_sqrt"] for row in record["arms"]["free"]["curves"]]
    assert built.verdict.startswith("* refusals: fell.")


def test_a_study_without_skills_or_without_harmless_prompts(record, undrawn):
    lean = copy.deepcopy(record)
    for arm in lean["arms"].values():
        del arm["skills"], arm["safety"]["xstest_safe"]
    found = contents.contents(lean)
    assert "skills" not in {p.name for plot in found.plots() for p in plot.panels}
    assert page(found, "0")
    assert text(found)


def test_undefined_measures_are_dashes(record):
    lean = copy.deepcopy(record)
    for row in lean["arms"]["free"]["curves"]:
        for group in row["groups"].values():
            group["cosine_distance"] = None
    found = contents.contents(lean)
    panel = next(p for plot in found.plots() for p in plot.panels if p.name == "drift-free-cosine_distance")
    assert figures.inline(panel, 0).startswith("<svg")
    drift = next(t for s in found.sections for t in s.tables if t.name == "drift")
    assert drift.rows[0][6] == "—"


def test_labels_of_users_are_escaped(record, undrawn):
    wild = copy.deepcopy(record)
    wild["arms"]["free"]["label"] = '<script>alert("x")</script>'
    tags = Page(page(contents.contents(wild), "0")).tags
    assert "script" not in {tag for tag, _ in tags}


def test_records_that_have_no_report_are_refused(record, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({**record, "kind": "poem"}))
    with pytest.raises(UserError, match="no report for a record of kind 'poem'"):
        build_report(tmp_path)
    broken = {key: value for key, value in record.items() if key != "arms"}
    (tmp_path / "record.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match="incomplete") as caught:
        build_report(tmp_path)
    assert "arms" in caught.value.found


def test_output_may_lie_elsewhere(record, tmp_path, undrawn):
    (tmp_path / "record.json").write_text(
        json.dumps({**record, "arms": {k: record["arms"][k] for k in ("before", "free")}})
    )
    report = build_report(tmp_path / "record.json", tmp_path / "there")
    assert report.page == tmp_path / "there/report.html"
    assert not (tmp_path / "report.html").exists()


def test_labels_at_line_ends_do_not_overlap():
    placed = figures.spread([0.5, 0.5, 0.51, 0.9], 0.1, 0, 1)
    assert sorted(placed) == pytest.approx([0.5, 0.6, 0.7, 0.9])
    crowded = figures.spread([0.95, 0.96, 0.97], 0.1, 0, 1)
    assert max(crowded) <= 1 + 1e-9
    assert min(b - a for a, b in zip(sorted(crowded), sorted(crowded)[1:], strict=False)) >= 0.1 - 1e-9


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (None, "—"),
        (math.nan, "—"),
        (1234567.0, "1,234,567"),
        (0.012345, "0.0123"),
        (1e-7, "1e−07"),
        (-1.5, "−1.5"),
    ],
)
def test_numbers_in_words(value, shown):
    assert values.number(value) == shown


def test_a_panel_is_described_by_its_numbers(record):
    for plot in plots.plots(record):
        for panel in plot.panels:
            assert re.search(r"\d", panels.describe(panel)), panel.name
