"""The sub-layers of models of many families: which there are, where they lie, and adapters on them."""

import copy

import pytest
import torch
import transformers

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.sites import place, sublayers
from deltalab.deltas.sublayers import select_sublayers
from tests.deltas.perturb import perturbed, states_equal
from tests.families import DECODER, FAMILIES, MLP, SIZE, gpt_oss, model_of
from tests.helpers import tokens


def bloom():
    return transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=270))


def opt():
    config = transformers.OPTConfig(**SIZE, ffn_dim=MLP, word_embed_proj_dim=32, max_position_embeddings=64)
    return transformers.OPTForCausalLM(config)


def bart():
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=MLP, decoder_ffn_dim=MLP, vocab_size=270, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def falcon():
    config = transformers.FalconConfig(**SIZE, new_decoder_architecture=False, parallel_attn=True)
    return transformers.FalconForCausalLM(config)


def gemma3():
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**DECODER, intermediate_size=MLP, head_dim=8, sliding_window=16)
    )


def gpt_neo():
    config = transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=270, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config)


def mpt():
    return transformers.MptForCausalLM(transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=270))


def distilbert():
    config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=MLP, vocab_size=270)
    return transformers.DistilBertForMaskedLM(config)


def albert():
    config = transformers.AlbertConfig(
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=MLP,
        vocab_size=270,
    )
    return transformers.AlbertForMaskedLM(config)


WHERE = {
    bloom: ["h.0.self_attention.dense", "h.0.mlp.dense_4h_to_h"],
    opt: ["layers.0.self_attn", "layers.0.fc2"],
    bart: ["encoder.layers.0.self_attn", "encoder.layers.0.fc2", "decoder.layers.0.self_attn",
           "decoder.layers.0.encoder_attn", "decoder.layers.0.fc2"],
    falcon: ["h.0.self_attention", "h.0.mlp"],
    gemma3: ["layers.0.self_attn", "layers.0.mlp"],
    gpt_neo: ["h.0.attn", "h.0.mlp"],
    mpt: ["blocks.0.attn", "blocks.0.ffn.down_proj"],
    distilbert: ["layer.0.attention", "layer.0.ffn"],
    albert: ["albert_layers.0.attention.dense", "albert_layers.0.ffn_output"],
    gpt_oss: ["layers.0.self_attn", "layers.0.mlp"],
}  # fmt: skip


@pytest.mark.parametrize("make", WHERE, ids=lambda make: make.__name__)
def test_where_it_goes_in_other_families(make):
    """The places of the first block; the start is the base, and after a step it is not; caches do not change what is said."""
    torch.manual_seed(0)
    model = make().eval()
    base = copy.deepcopy(model)
    want = base(input_ids=tokens(), labels=tokens()).logits
    dl.adapt(model, dl.Bottleneck(size=4))
    paths = list(attached(model))
    first = [path for path in paths if ".0." in path]
    assert sorted(first) == sorted(p for p in paths for end in WHERE[make] if p.endswith(end))
    assert len(first) == len(WHERE[make])
    assert torch.equal(model(input_ids=tokens()).logits, want)
    perturbed(model)
    out = model(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    assert not torch.equal(out.logits, want)
    if hasattr(model, "generate") and model.can_generate():
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        cached = model.generate(tokens(), **options, use_cache=True)
        assert torch.equal(cached, model.generate(tokens(), **options, use_cache=False))
    assert states_equal(dl.unload(model), base)


def test_targets_and_layers():
    model = model_of("llama")
    attention = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for targets in ("attention", "self_attn", ["*.self_attn"], r"re:.*self_attn"):
        assert select_sublayers(model, targets) == attention
    assert select_sublayers(model, "attention,mlp", [-1]) == ["model.layers.1.self_attn", "model.layers.1.mlp"]
    assert select_sublayers(model, ["layers.0.*"]) == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    assert select_sublayers(model, ["down_proj"], [0]) == ["model.layers.0.mlp.down_proj"]
    assert select_sublayers(model, "self_attn,down_proj", [0]) == [
        "model.layers.0.self_attn",
        "model.layers.0.mlp.down_proj",
    ]
    t5 = model_of("t5")
    assert len(select_sublayers(t5, "attention")) == 6
    assert select_sublayers(t5, "EncDecAttention") == [f"decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_place_is_what_the_list_of_sublayers_says(family):
    model = model_of(family)
    there = sublayers(model)
    assert {path: place(model, path) for path in there} == there
    for path, held in there.items():
        assert held.width == (width := model.config.hidden_size)
        site = held.site(path)
        assert site.module is model.get_submodule(path)
        assert site.shape == (width, width)
    for path, module in model.named_modules():
        if path and path not in there and not list(module.children()) and not hasattr(module, "weight"):
            with pytest.raises(dl.UserError, match="no place"):
                place(model, path)


def test_a_sublayer_inside_another_is_none():
    model = gpt_neo()
    assert "transformer.h.0.attn.attention" in dict(model.named_modules())
    with pytest.raises(dl.UserError, match="no place"):
        place(model, "transformer.h.0.attn.attention")


def test_the_hidden_size_is_that_of_the_nearest_config():
    """A tower of another width beside the language model."""
    text = transformers.LlamaConfig(**DECODER, intermediate_size=MLP)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
    widths = {path.split(".")[1]: held.width for path, held in sublayers(model).items()}
    assert widths == {"vision_tower": 16, "language_model": 32}
    assert all("language_model" in path for path in select_sublayers(model, "attention,mlp"))
