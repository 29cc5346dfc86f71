"""A method is one file and one line: a diagonal scale and an adapter, written here into a package of their own, pass the
suite as it is.

The suite runs in a process of its own, with a plugin that adds the line before the tests are collected. Beside each method
stand variants of it with one fault each: the suite has to see every fault.
"""

import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

import pytest

from tests.helpers import ROOT

FILES = ("test_methods.py", "test_weights.py", "test_kinds.py", "test_experts.py")
SUITE = [ROOT / "tests" / "conformance" / name for name in FILES]

METHOD = '''
"""Scale: every output of a linear map times a number of its own.

    y = diag(1 + s) W x      (a diagonal, for the tests)

s starts at zero, so the adapted model starts as the base.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deltalab.deltas.base import Base, WeightDelta
from deltalab.deltas.site import Kind, Site
from deltalab.deltas.spec import DeltaSpec


class Scale(DeltaSpec):
    """A trained scale of each output. dropout has no place here."""

    method: Literal["scale"] = "scale"
    sits_on: ClassVar[frozenset[Kind]] = frozenset({"linear", "experts"})

    def build(self, site: Site) -> "ScaleDelta":
        return ScaleDelta(site)


class ScaleDelta(WeightDelta):
    """W' = W + s ⊙ W, s (out,)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.empty(*site.shape[:-1], dtype=site.dtype, device=site.device))

    def init(self, generator: torch.Generator) -> None:
        nn.init.zeros_(self.s)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        scaled = y if base.bias is None else y - base.bias
        return y + (self.s * scaled).to(y.dtype)

    def change(self, W: Tensor) -> Tensor:
        return self.kept(self.s.unsqueeze(-1) * W)
'''

ADAPTER = '''
"""Nudge: a step along the hidden states' own directions after a whole sub-layer.

    y = h + g ⊙ tanh(d ⊙ h)      (an adapter, for the tests)

d is drawn, g starts at zero, so the adapted model starts as the base.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deltalab.deltas.base import Base, Delta
from deltalab.deltas.site import Kind, Site
from deltalab.deltas.spec import DeltaSpec
from deltalab.deltas.sublayers import select_sublayers


class Nudge(DeltaSpec):
    """A trained step of each entry of the hidden states."""

    method: Literal["nudge"] = "nudge"
    targets: str | list[str] = "attention,mlp"
    sits_on: ClassVar[frozenset[Kind]] = frozenset({"attention", "mlp", "linear"})

    def chosen(self, model: nn.Module) -> list[str]:
        return select_sublayers(model, self.targets, self.layers)

    def build(self, site: Site) -> "NudgeDelta":
        return NudgeDelta(site)


class NudgeDelta(Delta):
    """d, g (hidden,)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.empty(site.shape[0], dtype=site.dtype, device=site.device))
        self.g = nn.Parameter(torch.empty(site.shape[0], dtype=site.dtype, device=site.device))

    def init(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.d.copy_(torch.randn(self.d.shape, generator=generator))
        nn.init.zeros_(self.g)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        h = base(x)
        return h + (self.g * torch.tanh(self.d * h)).to(h.dtype)
'''

FAULTS = {
    "Forward": ("self.s * scaled", "1.01 * self.s * scaled", "adapted_weight_computes_what_the_forward_does"),
    "Bias": ("y if base.bias is None else y - base.bias", "y", "adapted_weight_computes_what_the_forward_does"),
    "Start": ("nn.init.zeros_(self.s)", "nn.init.constant_(self.s, 0.1)", "the_start_is_the_base"),
    "Seed": ("nn.init.zeros_(self.s)", "nn.init.normal_(self.s)", "the_start_depends_on_seed_and_path_alone"),
    "Mask": ("self.kept(self.s.unsqueeze(-1) * W)", "self.s.unsqueeze(-1) * W", "entries_and_masks_agree_with_the_dense_change"),
    "Writes": ("y = base(x)", "base.W.data.mul_(1.0001); y = base(x)", "only_the_delta_trains"),
    "Gradient": ("(self.s * scaled)", "(self.s.detach() * scaled + self.s - self.s.detach())", "gradients_against_finite_differences"),
}  # fmt: skip
"""Name of the variant -> (what is replaced, with what, the test that has to fail)."""

ADAPTER_FAULTS = {
    "Far": ("nn.init.zeros_(self.g)", "nn.init.constant_(self.g, 0.1)", "the_start_is_the_base"),
    "Bare": ("h = base(x)", "h = type(base.linear).adapts.forward(base.linear, x)", "the_start_is_the_base"),
    "Loose": ("randn(self.d.shape, generator=generator)", "randn(self.d.shape)", "the_start_depends_on_seed_and_path_alone"),
    "Scribe": ("h = base(x)", "next(base.linear.parameters()).data.mul_(1.0001); h = base(x)", "only_the_delta_trains"),
    "Deaf": ("self.d * h)", "self.d.detach() * h)", "gradients_against_finite_differences"),
    "Cut": ("self.d * h)", "self.d * h.detach())", "gradients_against_finite_differences"),
    "Noisy": ("self.d * h)", "self.d * nn.functional.dropout(h))", "trained_state_is_bitwise"),
    "Empty": ("    def forward", "    def measures(self):\n        return {'g': float('nan')}\n\n    def forward", "measures_are_numbers_of_the_modules"),
}  # fmt: skip
"""The same of the adapter; `Bare` forgets what a sub-layer is given beside the hidden states."""

PLUGIN = """
def pytest_configure():
    from deltalab.deltas import METHODS

    METHODS |= {methods}
"""


class Case(NamedTuple):
    """One test that ran: function, method and the rest of its id, whether it passed."""

    test: str
    method: str
    rest: str
    passed: bool


def run_suite(folder, sources, *options):
    """What the suite, as it is, says with these methods (name -> source) in the table: its cases, and its output."""
    package = folder / "temp_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name, source in sources.items():
        (package / f"{name.lower()}.py").write_text(source)
    table = {name: f"temp_pkg.{name.lower()}" for name in sources}
    (folder / "temp_plugin.py").write_text(textwrap.dedent(PLUGIN.format(methods=table)))
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "temp_plugin", *map(str, SUITE), f"--junitxml={report}", *options]
    code = f"import sys, pytest; sys.path.insert(0, {str(folder)!r}); raise SystemExit(pytest.main({command[3:]!r}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr  # passed or failed, and nothing worse
    cases = []
    for case in ElementTree.parse(report).iter("testcase"):
        function, _, identity = case.attrib["name"].rstrip("]").partition("[")
        named = next((name for name in sources if name in identity.split("-")), "")
        cases.append(Case(function.removeprefix("test_"), named, identity, not list(case)))
    return cases, ran.stdout


def variants(name, source, faults):
    """Name -> source: the method, and one variant for each fault."""
    sources = {name: source}
    for variant, (before, after, _) in faults.items():
        assert source.count(before) == 1
        tag = f'method: Literal["{name.lower()}"] = "{name.lower()}"'
        assert tag in source
        changed = source.replace(before, after).replace(tag, tag.replace(name.lower(), variant.lower()))
        sources[variant] = changed.replace(f"class {name}", f"class {variant}").replace(
            f"{name}Delta", f"{variant}Delta"
        )
    return sources


def functions(without):
    """Names of the tests of the suite that a method is given to, but for those with one of these marks."""
    text = "\n\n".join(path.read_text() for path in SUITE)
    found = re.findall(r"((?:^@.*\n)*)^def test_(\w+)\(method", text, re.M)
    return {name for marks, name in found if not set(re.findall(r"@(\w+)", marks)) & set(without)}


@pytest.mark.parametrize(
    ("name", "source", "faults", "places", "not_for_it"),
    [
        ("Scale", METHOD, FAULTS, ["linear"], ["not_merging"]),
        ("Nudge", ADAPTER, ADAPTER_FAULTS, ["linear", "attention", "mlp"], ["merging", "with_experts"]),
    ],
    ids=["a change of the weight", "an adapter"],
)
def test_a_method_is_one_file_and_one_line(tmp_path, name, source, faults, places, not_for_it):
    """Each test of the suite that is for such a method passes on it, with a model that has biases; and fails on its fault."""
    faulty = " or ".join(f"({variant}- and test_{test})" for variant, (_, _, test) in faults.items())
    with_biases = f"({name}- or {faulty}) and (llama-bias or {' or '.join(f'-{kind}]' for kind in places)})"
    sources = variants(name, source, faults)
    cases, output = run_suite(tmp_path, sources, "-k", f"({with_biases}) or ({name}-mixtral and test_experts)")
    ours = [case for case in cases if case.method == name]
    assert all(case.passed for case in ours), output
    assert {case.test for case in ours} == functions(without=not_for_it)
    for variant, (_, _, test) in faults.items():
        seen = [case for case in cases if case.method == variant]
        assert {case.test for case in seen} == {test}, f"{variant} was not tested: {output}"
        assert not any(case.passed for case in seen), f"the suite did not see the fault of {variant}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "not_for_it"),
    [("Scale", METHOD, ["not_merging"]), ("Nudge", ADAPTER, ["merging", "with_experts"])],
    ids=["a change of the weight", "an adapter"],
)
def test_the_whole_suite_passes_on_it(tmp_path, name, source, not_for_it):
    """Every family of models."""
    from tests.families import FAMILIES

    cases, output = run_suite(tmp_path, {name: source}, "-k", f"{name}-")
    assert all(case.passed for case in cases), output
    assert {case.test for case in cases} == functions(without=not_for_it)
    met = {family for case in cases for family in FAMILIES if family in case.rest}
    assert met == set(FAMILIES)
    assert len(cases) > 10 * len(FAMILIES)
