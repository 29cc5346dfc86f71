"""Methods that sit on experts, whichever way these compute."""

import torch

from deltalab.deltas.sites import places
from tests.conformance.kit import adapted, gradients, merging, of, with_experts
from tests.families import FAMILIES, inputs, logits
from tests.helpers import assert_close_by_norm


@with_experts
@of(lambda family: family.experts)
def test_experts_compute_the_same_by_every_implementation(method, family):
    model = adapted(method, family)
    batch = inputs(model)
    found = {}
    for way in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(way)
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        found[way] = out.logits.detach(), gradients(model)
    want, grads = found.pop("eager")
    bound = FAMILIES[family].merged
    for got, others in found.values():
        assert_close_by_norm(got, want, bound)
        assert others.keys() == grads.keys()
        for name in grads:
            assert_close_by_norm(others[name], grads[name], max(10 * bound, 1e-4))


@merging
@with_experts
@of(lambda family: family.experts)
def test_experts_hold_an_adapted_copy_only_while_they_compute(method, family):
    model = adapted(method, family)
    seen = []
    for module in {id(p.module): p.module for p in places(model).values() if p.kind == "experts"}.values():
        W = module._parameters["down_proj"]
        original = module._apply_gate

        def gate(*args, module=module, W=W, original=original):
            seen.append((module.down_proj is not W, not torch.equal(module.down_proj, W)))
            return original(*args)

        module._apply_gate = gate
        assert module.down_proj is W
    logits(model)
    assert seen
    assert all(copied and other for copied, other in seen)
    for held in places(model).values():
        if held.kind == "experts":
            assert getattr(held.module, held.name) is held.module._parameters[held.name]
            assert "_shown" not in held.module.__dict__
