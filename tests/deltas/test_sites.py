"""Where a delta sits: embeddings of every kind, experts, modules that others changed, and what is refused by name."""

import functools
import subprocess
import sys
from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.roformer.modeling_roformer import RoFormerSinusoidalPositionalEmbedding

import deltalab as dl
from deltalab.deltas.adapt import attached, trainable
from deltalab.deltas.sites import place, places, stacked_parameters
from tests.deltas.perturb import perturbed, states_equal
from tests.families import bert_classifier, gpt_oss, loss_of, model_of, phi3, t5
from tests.helpers import ROOT, assert_close_by_norm, tiny_llama, tokens

IDS = torch.tensor([[1, 5, 3, 1], [0, 2, 9, 9]])
EMBEDDINGS = {
    "plain": lambda: nn.Embedding(10, 8),
    "padding": lambda: nn.Embedding(10, 8, padding_idx=1),
    "scaled by a number": lambda: BartScaledWordEmbedding(10, 8, padding_idx=1, embed_scale=8**0.5),
    "scaled by a tensor": lambda: Gemma3TextScaledWordEmbedding(10, 8, padding_idx=1, embed_scale=8**0.5),
    "with an offset": lambda: BartLearnedPositionalEmbedding(10, 8),
}


def holder(embedding):
    return nn.ModuleDict({"emb": embedding}).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_of_any_class_computes_its_adapted_rows(name, dtype):
    model = holder(EMBEDDINGS[name]()).to(dtype)
    want = model.emb(IDS)
    dl.adapt(model, dl.LoRA(r=2, targets=["emb"]))
    assert torch.equal(model.emb(IDS), want), "the start is the base, bitwise"
    perturbed(model)
    assert not torch.equal(model.emb(IDS), want)
    plain = dl.merged(model)
    assert type(plain.emb) is type(EMBEDDINGS[name]())
    assert_close_by_norm(plain.emb(IDS), model.emb(IDS), 1e-10 if dtype is torch.float64 else 1e-2)
    moved = model.emb(IDS)
    with dl.disabled(model):
        assert torch.equal(model.emb(IDS), want)
    assert torch.equal(model.emb(IDS), moved)


def test_gemma3s_scaled_embeddings_in_the_model():
    config = transformers.Gemma3TextConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=270,
        intermediate_size=64, tie_word_embeddings=False, pad_token_id=0, sliding_window=16,
    )  # fmt: skip
    model = dl.adapt(transformers.Gemma3ForCausalLM(config).eval(), dl.LoRA(r=2, targets=["embed_tokens"]))
    with dl.disabled(model):
        base = model(tokens()).logits
    assert torch.equal(model(tokens()).logits, base)
    perturbed(model)
    assert_close_by_norm(dl.merged(model)(tokens()).logits, model(tokens()).logits, 1e-5)
    assert not torch.equal(model(tokens()).logits, base)


class OwnWay(nn.Embedding):
    def forward(self, ids):
        return self.weight[ids]


@pytest.mark.parametrize("embedding", [OwnWay, RoFormerSinusoidalPositionalEmbedding])
def test_an_embedding_that_looks_up_in_its_own_way_is_refused_by_name(embedding):
    model = holder(embedding(10, 8))
    with pytest.raises(dl.UserError, match=embedding.__name__):
        dl.adapt(model, dl.LoRA(r=2, targets=["emb"]))
    assert type(model.emb) is embedding
    assert not attached(model)


def test_a_module_with_a_forward_of_its_own_is_refused():
    model = tiny_llama()
    q = model.model.layers[1].self_attn.q_proj
    q.forward = functools.partial(type(q).forward, q)  # as tools do that move weights between devices
    before = [type(m) for m in model.modules()]
    with pytest.raises(dl.UserError, match="forward of a Linear was replaced"):
        dl.adapt(model, dl.LoRA())
    assert [type(m) for m in model.modules()] == before
    del q.forward
    assert states_equal(model, tiny_llama())


@pytest.mark.parametrize(
    ("family", "target", "others"),
    [
        ("t5", "shared", "encoder.embed_tokens, decoder.embed_tokens, lm_head"),
        ("t5", "lm_head", "shared"),
        ("t5", "encoder.embed_tokens", "shared"),
        ("bert", "word_embeddings", "cls.predictions.decoder"),
        ("bert", "decoder", "bert.embeddings.word_embeddings"),
        ("llama-bias", "embed_tokens", "lm_head"),
        ("gpt2", "wte", "lm_head"),
    ],
)
def test_tied_weights_are_refused_by_name(family, target, others):
    model = model_of(family)
    with pytest.raises(dl.UserError, match=rf"{target}' shares its weight with {others}"):
        dl.adapt(model, dl.LoRA(targets=[target]))
    assert states_equal(model, model_of(family))


def test_the_classifier_and_the_pooler_by_name():
    model = perturbed(dl.adapt(bert_classifier().eval(), dl.LoRA(r=2, targets=["classifier", "pooler.dense"])))
    assert list(attached(model)) == ["bert.pooler.dense", "classifier"]
    ids = tokens()
    assert_close_by_norm(dl.merged(model)(ids).logits, model(ids).logits, 1e-5)


def test_experts_in_both_orientations():
    model, names = gpt_oss(), ["gate_up_proj", "down_proj"]
    dl.adapt(model, dl.LoRA(r=2, targets=names))
    experts = model.model.layers[0].mlp.experts
    for name, shape in (("gate_up_proj", (4, 64, 32)), ("down_proj", (4, 32, 32))):
        held = place(model, f"model.layers.0.mlp.experts.{name}")
        assert held.transposed
        assert held.W.shape == shape
        assert torch.equal(held.W, experts._parameters[name].mT)
        delta = attached(model)[f"model.layers.0.mlp.experts.{name}"]
        assert (delta.A.shape, delta.B.shape) == ((4, 2, shape[2]), (4, shape[1], 2))
    perturbed(model)
    want = experts._parameters["down_proj"] + delta.change(held.W).mT
    assert_close_by_norm(dl.merged(model).model.layers[0].mlp.experts.down_proj, want, 1e-6)


def test_experts_count_and_train_by_their_name():
    model = dl.adapt(model_of("mixtral"), dl.LoRA(r=2, targets=["down_proj"]))
    report = trainable(model)
    assert report.rows == (("LoRA", "down_proj", 2, 2 * 4 * 2 * (64 + 32)),)
    assert report.total == sum(p.numel() for p in model_of("mixtral").parameters())
    dl.unload(model)
    dl.adapt(model, dl.Train(["experts"]))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if ".experts." in n}
    assert trainable(model).rows[0][:3] == ("own", "experts", 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss_of(model).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0 if p.grad is None else p.grad
    moved = dl.delta_weight(model, "model.layers.0.mlp.experts.down_proj")
    now = dict(model.named_parameters())["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(moved, now - before["model.layers.0.mlp.experts.down_proj"])
    assert moved.any()


def test_one_of_two_weights_of_experts_alone():
    model = perturbed(dl.adapt(model_of("mixtral"), [dl.LoRA(r=2, targets=["down_proj"]), dl.Train(["gate_up_proj"])]))
    assert {path.rsplit(".", 1)[1] for path in attached(model)} == {"down_proj"}
    assert_close_by_norm(dl.merged(model)(tokens()).logits, model(tokens()).logits, 1e-5)
    assert states_equal(dl.unload(model), model_of("mixtral"))


class Mixer(nn.Module):
    """What some state-space and recurrent blocks hold beside their linears."""

    def __init__(self, wide):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, groups=8)
        self.conv_weight = nn.Parameter(torch.randn(8, 1, 3))
        self.time_mix = nn.Parameter(torch.randn(1, 1, 8))
        if wide:
            self.stacked = nn.Parameter(torch.randn(2, 8, 8))


def test_kernels_and_vectors_in_3d_are_no_experts():
    model = nn.ModuleDict({"layers": nn.ModuleList([Mixer(False), Mixer(False)])})
    assert stacked_parameters(model) == {}
    assert dl.select(model, "all-linear").names == ["layers.0.proj", "layers.1.proj"]
    assert {p.kind for p in places(model).values()} == {"linear"}
    model = nn.ModuleDict({"layers": nn.ModuleList([Mixer(True)])})
    assert not [p for p in places(model).values() if p.kind == "experts"], "nobody says which way round it is"
    with pytest.raises(dl.UserError, match="layers.0.stacked"):
        dl.select(model, "all-linear")


def test_hooks_of_an_adapted_module_fire():
    model, calls = tiny_llama(), Counter()
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        model.model.layers[0].get_submodule(path).register_forward_hook(lambda *_, path=path: calls.update([path]))
    dl.adapt(model, dl.LoRA(targets=["q_proj"]))
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.update(["later"]))
    model(tokens())
    assert calls == {"self_attn.q_proj": 1, "mlp.down_proj": 1, "later": 1}
    dl.unload(model)(tokens())
    assert calls == {"self_attn.q_proj": 2, "mlp.down_proj": 2, "later": 2}


def test_work_grows_with_the_model_and_no_faster(monkeypatch):
    """The number of walks through all modules does not depend on how many there are."""
    walks = Counter()
    walk = nn.Module.named_modules

    def counted(self, memo=None, prefix="", remove_duplicate=True):
        walks["now"] += prefix == "" and isinstance(self, transformers.LlamaForCausalLM)
        return walk(self, memo, prefix, remove_duplicate)

    monkeypatch.setattr(nn.Module, "named_modules", counted)

    def count(layers):
        model, found = tiny_llama(layers=layers, hidden=8, mlp=8), {}
        steps = {
            "adapt": lambda: dl.adapt(model, [dl.LoRA(r=1, targets="all-linear", layers=[*range(layers)]), dl.Train("norms")]),
            "trainable": lambda: str(trainable(model)),
            "merged": lambda: dl.merged(model),
            "changes": lambda: [dl.delta_weight(model, path) for path in attached(model)],
            "unload": lambda: dl.unload(model),
        }  # fmt: skip
        for name, step in steps.items():
            walks.clear()
            step()
            found[name] = walks["now"]
        return found

    few = count(2)
    assert few["adapt"] > 0
    assert count(6) == few


COMPILED = """
import sys, torch, deltalab as dl
from tests.deltas.perturb import perturbed
from tests.families import FAMILIES, inputs, model_of
from tests.helpers import error_by_norm
family = sys.argv[1]
targets = ["all-linear", *filter(None, [FAMILIES[family].embedding])]
model = perturbed(dl.adapt(model_of(family), dl.LoRA(r=2, targets=targets)))
found = []
for run in (model, torch.compile(model, backend="aot_eager")):
    model.zero_grad()
    out = run(**inputs(model))
    out.loss.backward()
    found.append([out.logits, *[p.grad for p in model.parameters() if p.grad is not None]])
assert len(found[0]) == len(found[1]) > 10
print(max(error_by_norm(got, want) for want, got in zip(*found, strict=True)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_an_adapted_model_compiles(family):
    """Traced and differentiated as a whole; in a process without the checks of shapes, which cannot be traced."""
    ran = subprocess.run([sys.executable, "-c", COMPILED, family], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.split()[-1]) < 1e-4


def test_fused_linears_are_taken_whole():
    model = perturbed(dl.adapt(phi3().eval(), dl.LoRA(r=2, targets="all-linear")))
    assert {path.rsplit(".", 1)[1] for path in attached(model)} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert_close_by_norm(dl.merged(model)(tokens()).logits, model(tokens()).logits, 1e-5)


def test_layers_of_two_stacks():
    model = t5()
    names = dl.select(model, "q,v", [1]).names
    assert names == [
        "encoder.block.1.layer.0.SelfAttention.q", "encoder.block.1.layer.0.SelfAttention.v",
        "decoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.v",
        "decoder.block.1.layer.1.EncDecAttention.q", "decoder.block.1.layer.1.EncDecAttention.v",
    ]  # fmt: skip
    assert dl.select(model, "q,v", [-1]).names == names
    uneven = t5(layers=1, decoder_layers=3)
    assert {name.split(".block.")[0] for name in dl.select(uneven, "mlp", [0])} == {"encoder", "decoder"}
    assert {name.split(".block.")[0] for name in dl.select(uneven, "mlp", [2])} == {"decoder"}
    with pytest.raises(dl.UserError, match="from the end mean two things"):
        dl.select(uneven, "mlp", [-1])
