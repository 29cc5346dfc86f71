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
from deltalab.report import build_report, contents, figures, panels, values
from deltalab.report.page import page
from deltalab.report.style import spread
from deltalab.report.text import table, text
from tests.report.fixture import drift_record, score_record
from tests.report.reading import panels_of, tables_of


@pytest.fixture(scope="module")
def built(tmp_path_factory, record):
    folder = tmp_path_factory.mktemp("study")
    (folder / "record.json").write_text(json.dumps(record))
    return build_report(folder)


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
    assert built.page.stat().st_size < 2.5e6
    names = {p.name for p in built.figures}
    assert {
        "outcomes.png",
        "outcomes.svg",
        "changes.png",
        "steps.png",
        "against.svg",
        "ablation.png",
        "freezing.svg",
        "drift-free.png",
        "distributions.svg",
        "groups.png",
        "losses.svg",
        "times.svg",
    } <= names
    for path in built.figures:
        head = path.read_bytes()[:400]
        start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[path.suffix]
        assert head.startswith(start), path.name
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
    places = [
        words.index(v["sentence"].partition(" Adjusted by")[0].replace(" %", "\u00a0%")) for v in record["verdicts"]
    ]
    assert places == sorted(places)
    assert places[-1] < words.index("share") if "share" in words else True
    spec = re.search(r"<h3>Spec</h3>\s*<pre><code>(.*?)</code>", built.page.read_text(), re.S)
    assert yaml.safe_load(html.unescape(spec[1])) == {
        key: value for key, value in record["spec"].items() if key != "output"
    }


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


def test_every_number_of_the_text_comes_from_the_record(built, record):
    """Each cell of the tables is a number of the record as `number`, `percent` or a count writes it."""
    known = set()
    for n in [abs(n) for n in numbers(record)]:
        known |= {values.number(n).replace("−", "-"), values.p_value(n), f"{n:,.0f}", f"{n:g}", f"{n / 1e6:.2f}"}
        known |= {f"{n:.{digits}f}" for digits in range(4)} | {f"{100 * n:.{digits}f}" for digits in range(3)}
    checked = 0
    for t in tables_of(record).values():
        if t.name == "ablation":
            continue  # medians of the random groups
        for row in t.rows:
            for cell in row[1:]:
                for found in re.findall(r"(?<![a-z])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", cell.replace("−", "-")):
                    assert found in known, (t.name, cell, found)
                    checked += 1
    assert checked > 300
    whole = built.text.read_text()
    for t in tables_of(record).values():
        assert table(t) in whole
    for one in record["verdicts"]:
        assert f"* {one['name']}: {one['outcome']}." in whole


def test_a_change_of_the_record_shows(record):
    changed = copy.deepcopy(record)
    changed["arms"]["frozen"]["freeze"] |= {"max_change": 0.0321, "held": False}
    changed["arms"]["free"]["safety"]["advbench"]["refusal"] = {"value": 0.111, "low": 0.06, "high": 0.19}
    said = text(contents.contents(changed))
    assert "0.0321" in said
    assert re.search(r"safety-only frozen .* NO$", said, re.M)
    assert "11 % [6, 19]" in said
    assert "11 % [6, 19]" not in text(contents.contents(record))


def test_the_json_twin_has_what_the_figures_draw(built, record):
    twin = json.loads(built.json.read_text())
    assert twin["spec"] == {key: value for key, value in record["spec"].items() if key != "output"}
    assert twin["verdicts"] == record["verdicts"]
    drawn = {f["name"]: f for s in twin["sections"] for f in s["figures"]}
    values_ = drawn["drift-free"]["panels"][0]["lines"][0]["values"]
    assert values_ == [row["groups"]["safety"]["l2_per_sqrt"] for row in record["arms"]["free"]["curves"]]
    assert [lines["name"] for lines in drawn["steps"]["panels"][0]["panels"]][2] == "steps-free-drift"
    assert built.verdict.startswith("* ablation:")
    assert built.verdict.count("* ") == len(record["verdicts"])


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
    placed = spread([0.5, 0.5, 0.51, 0.9], 0.1, 0, 1)
    assert sorted(placed) == pytest.approx([0.5, 0.6, 0.7, 0.9])
    crowded = spread([0.95, 0.96, 0.97], 0.1, 0, 1)
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
    for made in (record, score_record(), drift_record(sweep={"lr": [1e-4, 1e-3]}, ablate=0)):
        for name, panel in panels_of(made).items():
            assert re.search(r"\d", panels.describe(panel)), name
            assert "nan" not in panels.describe(panel), name


def test_long_labels_and_titles_stay_within_their_panel():
    label = "a group of weights with a name that is much too long for a single line"
    marks = [panels.Mark(label, 1.0, "blue", note="55 % → 66 %")]
    size = figures.size_of(panels.Effects("x", label, "points", marks, 0.0))
    assert size.left + size.right < 0.75 * figures.WIDTH
    assert size.height > figures.size_of(panels.Effects("x", "", "points", [marks[0]._replace(label="short")])).height
    figure = figures.draw([panels.Effects("x", label * 2, "points", marks, 0.0)], 1)
    figure.canvas.draw()
    box = figure.texts[0].get_window_extent()
    assert box.x1 < figure.bbox.x1
