"""Ranks and alphas by pattern: in specs, in peft's files, in the own format."""

import copy
import json

import peft
import pytest
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import adaptation, attached
from tests.deltas.perturb import perturbed
from tests.helpers import assert_close_by_norm, tiny_llama, tokens


def test_patterns_give_ranks_and_alphas(tmp_path):
    spec = dl.LoRA(
        r=4,
        alpha=8,
        targets="q,v",
        rank_pattern={"model.layers.0.*": 2, "v_proj": 3},
        alpha_pattern={"re:.*1.*v_proj": 5},
    )
    model = perturbed(dl.adapt(tiny_llama(), spec))
    said = {path.removeprefix("model.layers."): (len(d.A), d.s) for path, d in attached(model).items()}
    assert said == {"0.self_attn.q_proj": (2, 4.0), "0.self_attn.v_proj": (2, 4.0), "1.self_attn.q_proj": (4, 2.0), "1.self_attn.v_proj": (3, 5 / 3)}  # fmt: skip
    dl.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert_close_by_norm(theirs(tokens()).logits, model(tokens()).logits, 1e-5)
    again = dl.load_adapter(tiny_llama(), tmp_path)
    assert {path.removeprefix("model.layers."): (len(d.A), d.s) for path, d in attached(again).items()} == said
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(dl.UserError, match=r"'o_proj' of LoRA matches none"):
            dl.adapt(tiny_llama(), dl.LoRA(targets="q,v", **{field: {"o_proj": 2}}))


def test_the_first_pattern_counts_after_loading_too(tmp_path):
    """Also from a file of the own format, as frozen entries make it."""
    spec = dl.LoRA(targets="q,v", alpha_pattern={"v_proj": 5, "model.layers.0.*": 2})
    model = perturbed(dl.adapt(tiny_llama(), spec))
    for delta in attached(model).values():
        delta.keep = torch.rand(delta.B.shape[0], delta.A.shape[1]) > 0.5
    dl.save_adapter(model, tmp_path)
    again = dl.load_adapter(tiny_llama(), tmp_path)
    assert {path: d.s for path, d in attached(again).items()} == {path: d.s for path, d in attached(model).items()}
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


class Nested(nn.Module):
    """Two linears of which one path ends like the other: `layers.0.q` and `vision.layers.0.q`, in either order."""

    def __init__(self, order=("layers", "vision")):
        super().__init__()
        for name in order:
            linear = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)})])
            self.add_module(name, linear if name == "layers" else Nested(("layers",)))

    def forward(self, x):
        x = self.layers[0]["q"](x)
        return self.vision(x) if hasattr(self, "vision") else x


@pytest.mark.parametrize("field", ["r", "alpha"])
@pytest.mark.parametrize("order", [("layers", "vision"), ("vision", "layers")])
def test_a_path_that_ends_like_another(field, order, tmp_path):
    """Nothing of the one's is taken for the other's: in specs, and in files both ways."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    base = Nested(order)
    pattern = "rank_pattern" if field == "r" else "alpha_pattern"
    spec = dl.LoRA(r=4, alpha=4, targets=["q"], **{pattern: {"layers.0.q": 2}})
    model = perturbed(dl.adapt(copy.deepcopy(base), spec))
    assert {path: getattr(one, field) for path, one in adaptation(model).plan.items()} == {"layers.0.q": 2, "vision.layers.0.q": 4}  # fmt: skip
    dl.save_adapter(model, tmp_path / "ours")
    assert torch.equal(dl.load_adapter(copy.deepcopy(base), tmp_path / "ours")(x), model(x))
    if order[0] == "layers":  # its r or alpha is the config's, and the pattern is the longer path
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
        assert_close_by_norm(theirs(x), model(x), 1e-6)
    else:
        assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "DELTALAB"

    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q"], init_lora_weights=False, **{pattern: {"^layers.0.q": 2}})  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close_by_norm(dl.load_adapter(copy.deepcopy(base), tmp_path / "theirs")(x), theirs(x), 1e-6)
