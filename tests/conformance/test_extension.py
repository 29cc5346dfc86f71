"""A method is one file and one line: a diagonal scale, written here into a package of its own, passes the suite as it is.

The suite runs in a process of its own, with a plugin that adds the line before the tests are collected. Beside the scale
stand variants of it with one fault each: the suite has to see every fault.
"""

import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

import pytest

from tests.helpers import ROOT

SUITE = [ROOT / "tests" / "conformance" / name for name in ("test_methods.py", "test_experts.py")]

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


def wrong(name):
    """The source of a variant with one fault."""
    before, after, _ = FAULTS[name]
    assert METHOD.count(before) == 1
    return METHOD.replace(before, after).replace("Scale", name).replace('"scale"', f'"{name.lower()}"')


def functions():
    """Names of the tests of the suite."""
    lines = [line for path in SUITE for line in path.read_text().splitlines()]
    return {line[9:].partition("(")[0] for line in lines if line.startswith("def test_")}


def test_a_method_is_one_file_and_one_line(tmp_path):
    """Each test of the suite passes on the scale, with a model that has biases; and fails on its fault."""
    faulty = " or ".join(f"({name}- and test_{test})" for name, (_, _, test) in FAULTS.items())
    sources = {"Scale": METHOD} | {name: wrong(name) for name in FAULTS}
    with_biases, experts = f"(Scale- or {faulty}) and (llama-bias or linear)", "Scale-mixtral and test_experts"
    cases, output = run_suite(tmp_path, sources, "-k", f"({with_biases}) or ({experts})")
    ours = [case for case in cases if case.method == "Scale"]
    assert all(case.passed for case in ours), output
    assert {case.test for case in ours} == functions()
    for name, (_, _, test) in FAULTS.items():
        seen = [case for case in cases if case.method == name]
        assert [case.test for case in seen] == [test], f"{name} was not tested: {output}"
        assert not seen[0].passed, f"the suite did not see the fault of {name}"


@pytest.mark.slow
def test_the_whole_suite_passes_on_it(tmp_path):
    """Every family of models."""
    from tests.families import FAMILIES

    cases, output = run_suite(tmp_path, {"Scale": METHOD}, "-k", "Scale-")
    assert all(case.passed for case in cases), output
    assert {case.test for case in cases} == functions()
    met = {family for case in cases for family in FAMILIES if family in case.rest}
    assert met == set(FAMILIES)
    assert len(cases) > 10 * len(FAMILIES)
