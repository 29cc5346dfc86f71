"""Selections: presets by structure, names and patterns; what matches nothing is an error that names the way out."""

from collections import Counter

import pytest
import torch
import transformers
from torch import nn

import deltalab as dl
from deltalab.deltas.select import decoder_blocks, layers_of, scored_linears
from deltalab.deltas.sites import linears
from tests.families import model_of
from tests.helpers import tiny_gpt2, tiny_llama

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def leaves(selection):
    return sorted({name.rsplit(".", 1)[1] for name in selection.names})


@pytest.mark.parametrize(
    ("targets", "want", "count"),
    [
        ("q,v", ["q_proj", "v_proj"], 6),
        ("attention", ATTENTION, 12),
        ("mlp", MLP, 9),
        ("all-linear", ATTENTION + MLP, 21),
        ("q_proj", ["q_proj"], 3),
        ("q_proj, down_proj", ["q_proj", "down_proj"], 6),
        (["self_attn.q_proj"], ["q_proj"], 3),
        (["mlp", "q_proj"], [*MLP, "q_proj"], 12),
        ("layers.1.*", ATTENTION + MLP, 7),
        ("*_proj", ATTENTION + MLP, 21),
        (r"re:model\.layers\.[02]\..*\.(q|k)_proj", ["q_proj", "k_proj"], 4),
        ("lm_head", ["lm_head"], 1),
    ],
)
def test_targets_of_a_llama(targets, want, count):
    model = tiny_llama(layers=3)
    selection = dl.select(model, targets)
    assert sorted({name.rsplit(".", 1)[-1] for name in selection.names}) == sorted(want)
    assert len(selection) == len(selection.names) == count
    order = list(linears(model))
    assert selection.names == sorted(selection.names, key=order.index)


def test_layers_from_both_ends():
    model = tiny_llama(layers=3)
    assert set(layers_of(model, dl.select(model, "attention", [0, -1])).values()) == {0, 2}
    with pytest.raises(dl.UserError, match=r"layers \[3\].*\n.*3 layers"):
        dl.select(model, "attention", [3])
    with pytest.raises(dl.UserError):
        dl.select(model, "attention", [])
    with pytest.raises(dl.UserError, match="matches no linear in layers"):
        dl.select(model, "lm_head", [0])


def test_a_selection_prints():
    assert (
        str(dl.select(tiny_llama(), "q,v")) == "4 of 15 linears of LlamaForCausalLM\n     2 × q_proj\n     2 × v_proj"
    )


def test_no_match_names_the_nearest_the_presets_and_the_command():
    with pytest.raises(dl.UserError) as error:
        dl.select(tiny_llama(), ["v_proj", "q_prj"])  # one of several is enough
    text = str(error.value)
    assert "target 'q_prj' matches no module of LlamaForCausalLM (2 layers, 15 linears)" in text
    assert "q_proj (2)" in text
    assert all(preset in text for preset in ("q,v", "attention", "mlp", "all-linear"))
    assert "deltalab targets LlamaForCausalLM" in text


@pytest.mark.parametrize("targets", ["norm", "self_attn", "model.layers.0"])
def test_what_is_no_linear_is_named(targets):
    with pytest.raises(dl.UserError, match="it matches"):
        dl.select(tiny_llama(), targets)


@pytest.mark.parametrize("targets", [[], "", " , "])
def test_no_targets(targets):
    with pytest.raises(dl.UserError):
        dl.select(tiny_llama(), targets)


def test_a_faulty_expression():
    with pytest.raises(dl.UserError, match="no regular expression"):
        dl.select(tiny_llama(), "re:(")


@pytest.mark.parametrize("model", [tiny_llama(tied=True), tiny_gpt2()], ids=["llama", "gpt2"])
def test_a_tied_output_layer_is_refused_by_name(model):
    with pytest.raises(dl.UserError, match="lm_head.*shares its weight"):
        dl.select(model, "lm_head")
    assert "lm_head" not in dl.select(model, "all-linear").names


def test_fused_and_transposed_linears_are_named_not_skipped():
    model = tiny_gpt2()
    with pytest.raises(dl.UserError, match="c_attn"):
        dl.select(model, "q,v")
    assert leaves(dl.select(model, "attention")) == ["c_attn", "c_proj"]
    assert leaves(dl.select(model, "mlp")) == ["c_fc", "c_proj"]
    assert len(dl.select(model, "all-linear")) == 8
    assert list(scored_linears(model)) == dl.select(model, "all-linear").names


def test_presets_of_other_families():
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "intermediate_size": 24,
    }
    phi = transformers.Phi3ForCausalLM(transformers.Phi3Config(**size, num_key_value_heads=2, pad_token_id=0))
    assert leaves(dl.select(phi, "attention")) == ["o_proj", "qkv_proj"]
    with pytest.raises(dl.UserError, match="qkv_proj"):
        dl.select(phi, "q,v")
    neox = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**size))
    assert leaves(dl.select(neox, "attention")) == ["dense", "query_key_value"]
    assert leaves(dl.select(neox, "mlp")) == ["dense_4h_to_h", "dense_h_to_4h"]
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            vocab_size=32,
            word_embed_proj_dim=16,
        )
    )
    assert leaves(dl.select(opt, "q,v")) == ["q_proj", "v_proj"]
    assert leaves(dl.select(opt, "mlp")) == ["fc1", "fc2"]


@pytest.mark.parametrize(("kind", "names"), [
    ("llama", {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}),
    ("bert-classifier", {"q": "query", "k": "key", "v": "value", "o": "dense"}),
    ("t5", {"q": "q", "k": "k", "v": "v", "o": "o"}),
])  # fmt: skip
def test_parts_of_an_attention_are_the_attention_together(kind, names):
    model = tiny_llama() if kind == "llama" else model_of(kind)
    for preset in ("q", "q,k", "q,v", "q,k,v", "q,k,v,o"):
        found = dl.select(model, preset)
        assert leaves(found) == sorted(names[part] for part in preset.split(","))
        assert set(found.names) <= set(dl.select(model, "attention").names)
    assert sorted(found.names) == sorted(dl.select(model, "attention").names)
    with pytest.raises(dl.UserError, match=r"preset 'q,k,v,o' matches nothing in .* one fused linear"):
        dl.select(tiny_gpt2(), "q,k,v,o")


def test_presets_of_an_encoder_take_no_pooler_and_no_head():
    model = model_of("bert-classifier")
    attention = dl.select(model, "attention").names
    assert leaves(dl.select(model, "q,v")) == ["query", "value"]
    assert [n.split("layer.0.")[1] for n in attention if "layer.0." in n] == [
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    ]  # fmt: skip
    mlp = dl.select(model, "mlp").names
    assert [n.split("layer.0.")[1] for n in mlp if "layer.0." in n] == ["intermediate.dense", "output.dense"]
    assert sorted(dl.select(model, "all-linear").names) == sorted(attention + mlp)
    assert not any("pooler" in name or "classifier" in name for name in attention + mlp)
    assert dl.select(model, "classifier").names == ["classifier"]
    assert dl.select(model_of("bert"), "all-linear").names == dl.select(model, "all-linear").names


def test_presets_of_an_encoder_decoder_take_both_stacks():
    model = model_of("t5")
    assert Counter(name.rsplit(".", 2)[1] for name in dl.select(model, "q,v")) == {
        "SelfAttention": 8,
        "EncDecAttention": 4,
    }
    assert leaves(dl.select(model, "attention")) == ["k", "o", "q", "v"]
    assert len(dl.select(model, "attention")) == 24
    assert leaves(dl.select(model, "mlp")) == ["wi", "wo"]
    assert len(dl.select(model, "mlp")) == 8
    assert len(dl.select(model, "all-linear")) == 32
    assert (
        dl.select(model, ["q,v", "relative_attention_bias"]).kinds[
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
        ]
        == "embedding"
    )


def test_experts_in_one_parameter_are_weights_like_others():
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=24,
            vocab_size=32,
            num_local_experts=2,
        )
    )
    experts = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    assert dl.select(model, "mlp").names == experts
    assert dl.select(model, "gate_up_proj").names == experts[:1]
    assert leaves(dl.select(model, "all-linear")) == sorted([*ATTENTION, "gate_up_proj", "down_proj"])
    assert leaves(dl.select(model, "attention")) == sorted(ATTENTION)
    assert str(dl.select(model, "mlp")).startswith("2 of 7 weights (linears, experts) of MixtralForCausalLM")
    for module in model.modules():
        module.__dict__.pop("is_transposed", None)  # an implementation that does not say which way round they are
    with pytest.raises(dl.UserError, match="3-D parameters"):
        dl.select(model, "mlp")
    with pytest.raises(dl.UserError, match="a parameter of shape"):
        dl.select(model, "gate_up_proj")


def test_scored_linears_are_those_of_the_blocks_adapted_or_not():
    model = tiny_llama()
    before = scored_linears(model)
    weights = {name: module.weight for name, module in before.items()}
    assert len(before) == 14
    assert not {"lm_head", "model.embed_tokens"} & before.keys()
    dl.adapt(model, dl.LoRA(targets="all-linear"))
    after = scored_linears(model)
    assert list(after) == list(weights)
    assert all(after[name].weight is weight for name, weight in weights.items())
    assert decoder_blocks(model)[0] == "model.layers"


def test_a_model_without_blocks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(dl.UserError, match="no list of decoder blocks"):
        dl.select(model, "attention")
    dl.adapt(model, dl.LoRA(r=2, targets=["0"]))
    assert model(torch.zeros(1, 4)).shape == (1, 2)
