"""The table of methods: what a spec file may hold in its `adapt` list."""

import pydantic
import pytest
import torch

import deltalab as dl
from deltalab import deltas
from deltalab.core.spec import Spec, build
from deltalab.deltas.base import WeightDelta, weight_of
from deltalab.deltas.spec import DeltaSpec
from deltalab.train.spec import TrainSpec
from tests.helpers import tiny_gpt2


class Holder(Spec):
    adapt: list[deltas.AnySpec]


def test_entries_are_told_apart_by_their_method():
    values = {"adapt": [{"method": "lora", "r": 2, "targets": ["q_proj"]}, {"method": "train", "what": "norms"}]}
    spec = build(Holder, values)
    assert spec.adapt == [dl.LoRA(r=2, targets=["q_proj"]), dl.Train("norms")]
    assert build(Holder, spec.plain()) == spec
    with pytest.raises(dl.UserError, match="lora"):
        build(Holder, {"adapt": [{"method": "lorra"}]})
    with pytest.raises(dl.UserError, match="rank: unknown key"):
        build(Holder, {"adapt": [{"method": "lora", "rank": 2}]})


def test_specs_are_values():
    assert dl.LoRA(r=2) == dl.LoRA(r=2)
    assert dl.LoRA(r=2).digest() != dl.LoRA(r=3).digest()
    with pytest.raises(pydantic.ValidationError):
        dl.LoRA().r = 3
    assert dl.Train() == dl.Train("full")


def test_a_spec_made_in_python_names_its_faults_too():
    with pytest.raises(
        dl.UserError, match=r"LoRA has 2 faults:\n  init: should be .*did you mean pissa\?\n  rnk: .*did you mean r\?"
    ):
        dl.LoRA(rnk=4, init="pisa")
    with pytest.raises(dl.UserError, match="AdaLoRA has 1 fault:\n.*ranks only fall"):
        dl.AdaLoRA(init_r=4)
    with pytest.raises(dl.UserError, match="Train has 1 fault:\n  waht: unknown key; did you mean what"):
        dl.Train(waht="norms")


def test_a_part_s_faults_are_said_with_the_others_of_the_whole():
    values = {"model": "m", "data": [], "adapt": [{"method": "lora", "r": 0}, {"method": "train", "waht": "norms"}]}
    with pytest.raises(dl.UserError) as caught:
        build(TrainSpec, values)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "adapt.0.r",
        "adapt.1.waht",
        "data",
    ]


def test_names_that_are_not_there():
    with pytest.raises(AttributeError):
        deltas.LoRa  # noqa: B018


def test_the_least_that_a_method_says_is_enough():
    """A weight delta that gives its change alone: adapted weight, entries and forward under a mask follow."""

    class Scale(WeightDelta):
        def __init__(self):
            super().__init__()
            self.l = torch.nn.Parameter(torch.ones(96, 1))

        def init(self, generator):
            torch.nn.init.ones_(self.l)

        def change(self, W):
            return self.kept((self.l - 1) * W)

        def forward(self, x, base):
            return base(x) * self.l.T

    class ScaleSpec(DeltaSpec):
        method: str = "scale"
        targets: str | list[str] = ["c_attn"]

        def build(self, site):
            return Scale()

    model = dl.adapt(tiny_gpt2(), ScaleSpec())
    path = "transformer.h.0.attn.c_attn"
    linear = model.get_submodule(path)
    torch.nn.init.normal_(linear.delta.l)
    W = weight_of(linear).detach()
    index = torch.tensor([0, 33, 95 * 32])
    torch.testing.assert_close(linear.delta.entries(index, W), dl.delta_weight(model, path).flatten()[index])
    torch.testing.assert_close(dl.delta_weight(model, path), (linear.delta.l - 1).detach() * W)
    with pytest.raises(NotImplementedError):
        ScaleSpec().to_peft()
    with pytest.raises(NotImplementedError):
        ScaleSpec.from_peft({}, [path])
    with pytest.raises(NotImplementedError):
        linear.delta.to_peft()
