"""Specs: what is refused, and whether the message names the place and the nearest key."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.core.errors import UserError
from deltalab.core.spec import Spec, build, load_spec, override, read_yaml
from deltalab.core.yaml_text import YAMLError, parse


class Low(Spec):
    """A delta of low rank."""

    method: Literal["low"] = "low"
    rank: int = 8
    alpha: float = 16.0
    targets: str | list[str] = "attention"


class Wide(Spec):
    """A delta of another kind."""

    method: Literal["wide"] = "wide"
    width: pydantic.PositiveInt = 4
    inner: Low | None = None


Delta = Annotated[Low | Wide, pydantic.Field(discriminator="method")]


class Optim(Spec):
    """How to step."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "linear"] = "cosine"


class Whole(Spec):
    """A spec with a tagged union in a list and in a mapping."""

    model: str
    adapt: list[Delta] = [Low()]
    named: dict[str, Delta] = {}
    either: Low | Wide = Low()
    optim: Optim = Optim()
    out: Path | None = None

    @pydantic.field_validator("model")
    @classmethod
    def _named(cls, model: str) -> str:
        if model == "bad":
            raise ValueError("'bad' is no model; LoRA keeps its case")
        return model


def fault(values: object) -> str:
    """The message of the error that `values` give."""
    with pytest.raises(UserError) as caught:
        build(Whole, values)
    return str(caught.value)


def test_values_arrive_whole() -> None:
    spec = build(
        Whole,
        {
            "model": "m",
            "adapt": [{"method": "wide", "inner": {"rank": 2}}],
            "optim": {"betas": [0.5, 1]},
            "out": Path("a"),
        },
    )
    assert spec == Whole(model="m", adapt=[Wide(inner=Low(rank=2))], optim=Optim(betas=(0.5, 1.0)), out=Path("a"))
    assert build(Whole, spec.plain()) == spec
    assert build(Whole, {"model": "m", "adapt": [Low(rank=3)]}).adapt == [Low(rank=3)]


def test_all_faults_are_reported_at_once_with_suggestions() -> None:
    message = fault({
        "modl": "m", "adapt": [{"rnk": 4}, {"method": "low", "rnk": 4}, {"method": "wide", "inner": {"alfa": 1.0}}, {"method": "lwo"}],
        "optim": {"lr": "fast", "schedule": "cosin", "betas": [1]}, "out": 3,
    })  # fmt: skip
    lines = message.splitlines()
    assert lines[0] == "spec has 10 faults:"
    assert sorted(lines[1:]) == sorted([
        "  model: is needed and not there",
        "  modl: unknown key; did you mean model?",
        "  adapt.0: needs the key 'method', one of: low, wide",
        "  adapt.1.rnk: unknown key; did you mean rank?",
        "  adapt.2.inner.alfa: unknown key; did you mean alpha?",
        "  adapt.3: 'method' 'lwo' is unknown; did you mean low?",
        "  optim.lr: should be a valid number (got 'fast')",
        "  optim.schedule: should be 'cosine' or 'linear' (got 'cosin'); did you mean cosine?",
        "  optim.betas.1: is needed and not there",
        "  out: should be a valid string (got 3)",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"named": {"a": {"method": "low", "rnk": 1}}}, "  named.a.rnk: unknown key; did you mean rank?"),
        ({"either": {"width": 0}}, "  either.width: "),
        ({"optim": {"zzz": 1}}, "  optim.zzz: unknown key; known keys: betas, lr, schedule"),
        (
            {"adapt": [{"method": "low", "targets": 3}]},
            "  adapt.0.targets: should be a valid string, or should be a list (got 3)",
        ),
        (
            {"adapt": [{"method": "low", "targets": ["q", 3]}]},
            "1 fault:\n  adapt.0.targets.1: should be a valid string (got 3)",
        ),
        ({"adapt": [{"method": "low", "rank": "8"}]}, "  adapt.0.rank: should be a valid integer (got '8')"),
        ({"adapt": [{"method": "low", "rank": True}]}, "  adapt.0.rank: should be a valid integer (got True)"),
        ({"adapt": {"method": "low"}}, "  adapt: should be a list (got {'method': 'low'})"),
        ({"model": "bad"}, "  model: 'bad' is no model; LoRA keeps its case (got 'bad')"),
        ({"optim": None}, "  optim: should be a mapping (got None)"),
        ({"model": "x" * 200}, ""),
    ],
)
def test_a_fault_is_placed_where_the_user_wrote_it(values: dict[str, object], line: str) -> None:
    if not line:
        assert build(Whole, {"model": "m", **values})
        return
    assert line in fault({"model": "m", **values})


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(max(fault({"model": ["x"] * 500}).splitlines(), key=len)) < 160


@pytest.mark.parametrize("values", [None, [1], "text", 3])
def test_something_else_than_a_mapping_is_refused(values: object) -> None:
    assert "start from: model, adapt" in fault(values)


def test_a_spec_is_a_value() -> None:
    a, b = Whole(model="m"), Whole(model="m", optim=Optim())
    assert a == b
    assert hash(a) == hash(b)
    assert a.digest() == b.digest()
    assert {a: 1}[b] == 1
    assert a.digest() != a.but(model="n").digest()
    with pytest.raises(pydantic.ValidationError):
        a.model = "n"
    with pytest.raises(UserError, match=r"optim\.lr"):
        a.but(optim={"lr": "high"})


def test_yaml_reads_exponents_as_numbers_and_refuses_double_keys() -> None:
    assert parse("[1e-4, 1.e5, -2E+3, .5e1, 1e4x, 12, 1.5]") == [1e-4, 1e5, -2e3, 5.0, "1e4x", 12, 1.5]
    assert parse("a: &x {b: 1}\nc:\n  <<: *x\n  d: 2") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}
    with pytest.raises(YAMLError, match="key 'a' stands twice"):
        parse("a: 1\nb: 2\na: 3")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "no valid YAML"),
        ("- 1", "holds no mapping"),
        ("a: 1\na: 2", "stands twice"),
        ("!!python/object:os.system {}", "no valid YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "train.yaml")
    with pytest.raises(UserError, match="is a folder"):
        read_yaml(tmp_path)
    with pytest.raises(UserError, match="nearest: train.yaml"):
        read_yaml(tmp_path / "trian.yaml")
    with pytest.raises(UserError, match="does not exist"):
        read_yaml(tmp_path / "none" / "x.yaml")


def test_a_spec_from_a_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("model: m\nadapt:\n  - method: low\n    rank: 2\n")
    spec = load_spec(
        Whole, path, ["adapt.0.rank=16", "adapt.alpha=1e1", "optim.lr=3e-4", "adapt.targets=[q, v]", "out=runs/a"]
    )
    assert spec.adapt == [Low(rank=16, alpha=10.0, targets=["q", "v"])]
    assert (spec.optim.lr, spec.out) == (3e-4, Path("runs/a"))
    with pytest.raises(UserError, match=r"adapt\.0\.rnk: unknown key; did you mean rank"):
        load_spec(Whole, path, ["adapt.rnk=1"])
    path.write_text("")
    assert load_spec(Whole, path, ["model=x"]) == Whole(model="x")


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("lr", "no key=value"), ("=3", "no key=value"), ("a..b=3", "no key=value"), ("model.x=1", "has no key 'x'"),
        ("adapt.7.r=1", "no index of a list of 2"), ("adapt.r=1", "no index of a list of 2"), ("lr=[1", "no YAML"), ("empty.0=1", "give the whole list"),
    ],
)  # fmt: skip
def test_an_override_that_fits_nowhere_is_named(item: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        override({"model": "m", "adapt": [{}, {}], "empty": []}, [item])
    assert item in str(caught.value)


def test_overrides_leave_their_source_alone() -> None:
    source: dict[str, object] = {"a": {"b": [1, {"c": 2}]}}
    assert override(source, ["a.b.1.c=3", "a.b.-2=0", "d.e.f=null"]) == {
        "a": {"b": [0, {"c": 3}]},
        "d": {"e": {"f": None}},
    }
    assert source == {"a": {"b": [1, {"c": 2}]}}


KEYS = st.from_regex(r"[a-z][a-z_]{0,5}", fullmatch=True).filter(lambda key: yaml.safe_load(key) == key)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=4), VALUES)
def test_an_override_sets_exactly_its_place(path: list[str], value: object) -> None:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    got = override({"other": 1}, [f"{'.'.join(path)}={text}"] if path[0] != "other" else [])
    if path[0] == "other":
        return
    assert got.pop("other") == 1
    for part in path:
        assert list(got) == [part]
        got = got[part]
    assert got == value


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_any_values_give_a_spec_or_a_user_error(value: object) -> None:
    for values in (
        value,
        {"model": value},
        {"model": "m", "adapt": value},
        {"model": "m", "adapt": [value]},
        {"model": "m", "optim": value},
    ):
        try:
            build(Whole, values)
        except UserError as error:
            assert "Traceback" not in str(error)


def test_what_a_spec_tells_is_what_differs_from_the_defaults_and_its_tags():
    from deltalab.train import TrainSpec

    values = {
        "model": "m",
        "adapt": [{"method": "dora", "r": 8}],
        "data": [{"task": "skills", "n": 5}],
        "optim": {"lr": 1e-3},
    }
    spec = build(TrainSpec, values)
    told = {"model": "m", "adapt": [{"method": "dora"}], "data": [{"task": "skills", "n": 5}], "optim": {"lr": 1e-3}}
    assert spec.told() == told
    assert build(TrainSpec, told) == spec
    other = build(TrainSpec, {**values, "adapt": [{"method": "lora"}]})
    assert other.told()["adapt"] == [{"method": "lora"}]
