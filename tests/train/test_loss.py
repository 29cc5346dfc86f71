"""The loss through the output layer's input is that of the model's own logits, on every kind of model; else it is the latter."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deltalab as dl
from deltalab.data.chat import IGNORED, Encoded
from deltalab.data.collate import collate
from deltalab.data.packing import pack
from deltalab.train.loss import nll_of_logits, nll_sum, told
from tests.families import DECODER, FAMILIES, MLP, model_of
from tests.helpers import assert_close_by_norm, tiny_llama

LENGTHS = (9, 5, 12)


def samples(*, masked=0.6, vocab=270, lengths=LENGTHS):
    g = torch.Generator().manual_seed(0)
    found = []
    for n in lengths:
        ids = torch.randint(5, vocab, (n,), generator=g)
        labels = ids.where(torch.rand(n, generator=g) >= masked, torch.tensor(IGNORED))
        labels[-1] = ids[-1]
        found.append(Encoded(ids.tolist(), labels.tolist()))
    return found


def cohere():
    return transformers.CohereForCausalLM(
        transformers.CohereConfig(**DECODER, intermediate_size=MLP, logit_scale=0.0625)
    )


def granite():
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**DECODER, intermediate_size=MLP, logits_scaling=8.0)
    )


def gemma2():
    config = transformers.Gemma2Config(
        **DECODER, intermediate_size=MLP, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=50.0, query_pre_attn_scalar=8
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def phi():
    return transformers.PhiForCausalLM(transformers.PhiConfig(**DECODER, intermediate_size=MLP))


def opt():
    """Hidden states wider than the embeddings, projected before the output layer."""
    config = transformers.OPTConfig(
        hidden_size=WIDE, word_embed_proj_dim=16, ffn_dim=MLP, num_hidden_layers=2, num_attention_heads=4, vocab_size=270,
        dropout=0.0, pad_token_id=1, do_layer_norm_before=False,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def bart():
    config = transformers.BartConfig(
        d_model=WIDE, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=MLP, decoder_ffn_dim=MLP, vocab_size=270, dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def mamba():
    config = transformers.MambaConfig(hidden_size=WIDE, num_hidden_layers=2, vocab_size=270, state_size=4)
    return transformers.MambaForCausalLM(config)


WIDE = 32
MORE = {"cohere": cohere, "granite": granite, "gemma2": gemma2, "phi": phi, "opt": opt, "bart": bart, "mamba": mamba}
AFTER = {"cohere": ", times 0.0625", "granite": ", times 0.125", "gemma2": ", capped at 3"}
NAMES = {"bert": "cls.predictions.decoder"}
ALL = [name for name in FAMILIES if name != "bert-classifier"] + list(MORE)


def made(name):
    if name in FAMILIES:
        return model_of(name)
    torch.manual_seed(0)
    model = MORE[name]()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif key.endswith(("lm_head.weight", "embed_tokens.weight")):
            nn.init.normal_(parameter, std=0.5)  # logits of a few units: a cap would else not be seen
    return model


def batches(name, model):
    padded = collate(samples(), 0)
    if model.config.is_encoder_decoder:
        return [padded | {"decoder_input_ids": padded["input_ids"]}]
    return [padded, pack(samples())] if name not in ("bert", "opt", "mamba") else [padded]


def gradients(model, function, batch):
    """The loss, and the gradients of a share of it. Dropout is the same each time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = function(model, batch)
    (loss / 7).backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch, bound=1e-5):
    want, wants = gradients(model, nll_of_logits, batch)
    got, gots = gradients(model, nll_sum, batch)
    assert_close_by_norm(got, want, bound)
    assert gots.keys() == wants.keys()
    whole = max(gradient.norm() for gradient in wants.values())
    for name, gradient in wants.items():
        # a bias of keys has the gradient zero, and what is there is rounding
        assert (gots[name] - gradient).norm() <= 3 * bound * gradient.norm() + 1e-3 * bound * whole, name


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients_are_those_of_the_models_logits(name):
    """All parameters train: the output layer, tied or not, its bias, and what is below."""
    model = made(name)
    model.requires_grad_(True) if not getattr(FAMILIES.get(name), "codes", False) else None
    bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    for batch in batches(name, model):
        assert_same(model, batch, 1e-2 if bf16 else 1e-5)
        assert told(model) == f"cross-entropy over {NAMES.get(name, 'lm_head')} in chunks of the counted rows{AFTER.get(name, '')}"  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_adapted(name):
    model = dl.adapt(made(name), dl.LoRA(r=4, targets="all-linear")).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for batch in batches(name, model):
        assert_same(model, batch)
    assert told(model).startswith("cross-entropy over")


class Sizes(TorchDispatchMode):
    """The most rows of a product that are of the vocabulary's width."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.most = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and out.shape[-1] == self.vocab:
            self.most = max(self.most, len(out))
        return out


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_only_counted_rows_reach_the_output_layer(packed, training):
    model, data = tiny_llama().train(training), samples()
    batch = pack(data) if packed else collate(data, 0)
    counted = sum(label != IGNORED for sample in data for label in sample.labels[1:])
    nll_sum(model, batch)  # the first call tries
    with torch.set_grad_enabled(training), Sizes(270) as seen:
        nll_sum(model, batch)
    assert seen.most == counted
    with Sizes(270) as seen:
        nll_of_logits(model, batch)
    assert seen.most == (counted if packed else 36)
