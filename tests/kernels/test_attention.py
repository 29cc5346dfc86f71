"""The attention function under our names in transformers' registries: when it acts, what it hands on, how it comes and goes."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from deltalab.kernels import attention as ours
from deltalab.kernels.attention import install
from deltalab.kernels.attention_masks import Unmade
from tests.families import DECODER, MLP, model_of
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_llama, tokens
from tests.kernels.attending import LENGTHS, MODELS, assert_same, gpt2, packed, padded, with_gradients


def assert_as_near(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor], batch: dict[str, Any]
) -> None:
    """The errors of logits and gradients, relative by norm, in sum; padding does not count."""
    mask = batch.get("attention_mask")
    for found in (ours, theirs, exact) if mask is not None else ():
        found["logits"] = found["logits"][mask.bool()]
    errors = [sum(error_by_norm(found[name], exact[name]) for name in exact) for found in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1], errors


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of our ways a call went, by name."""
    seen: list[str] = []
    for name in ("attend", "by_segment", "attend_on_gpu"):
        way = getattr(ours, name)
        monkeypatch.setattr(ours, name, lambda *args, _n=name, _w=way, **more: seen.append(_n) or _w(*args, **more))
    return seen


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch", [{"input_ids": tokens(2, 12)}, padded()], ids=["whole", "padded"])
def test_a_training_pass_in_bf16(kind: str, batch: dict[str, Any], calls: list[str]) -> None:
    """As near to fp64 as with torch's sdpa, logits and gradients."""
    model = MODELS[kind](dtype=torch.bfloat16).train()
    exact = with_gradients(copy.deepcopy(model).double(), batch)
    before = with_gradients(model, batch)
    assert install(model)
    after = with_gradients(model, batch)
    assert calls == ["attend"] * 2
    assert_as_near(after, before, exact, batch)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch", [{"input_ids": tokens(2, 12)}, padded()], ids=["whole", "padded"])
def test_fp32_stays_what_it_is(kind: str, batch: dict[str, Any], calls: list[str]) -> None:
    model = MODELS[kind]().train()
    before = with_gradients(model, batch)
    install(model)
    assert_same(with_gradients(model, batch), before)
    assert calls == []


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_packed_batch_is_its_samples(
    kind: str, dtype: torch.dtype, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of each sample as alone, gradients as with a block mask; and no mask is made."""
    model = MODELS[kind](dtype=dtype).train()
    want = with_gradients(model, packed())
    parts = packed()["input_ids"].split(LENGTHS, 1)
    alone = torch.cat([model(input_ids=part).logits for part in parts], 1)
    install(model)
    with monkeypatch.context() as patch:
        patch.setattr(Unmade, "mask", property(lambda _: pytest.fail("a mask was made")))
        got = with_gradients(model, packed())
    bound = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    assert_close_by_norm(got["logits"], alone, bound)
    assert_same(got, want, 2 * bound)
    windowed = kind == "mistral"
    assert calls == ["attend" if dtype is torch.bfloat16 or windowed else "by_segment"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_of_a_packed_batch_do_not_see_each_other(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype).train()
    install(model)
    batch = packed()
    before = model(**batch).logits
    batch["input_ids"][0, 5:22] = tokens(1, 17, seed=3)[0]
    after = model(**batch).logits
    assert torch.equal(before[0, :5], after[0, :5])
    assert torch.equal(before[0, 22:], after[0, 22:])
    assert not torch.equal(before[0, 5:22], after[0, 5:22])


def test_positions_alone_and_lengths_alone_will_do() -> None:
    model = tiny_llama().train()
    want = model(**packed()).logits
    install(model)
    for only in (("position_ids",), ("cu_seq_lens_q", "position_ids")):
        batch = {name: value for name, value in packed().items() if name in ("input_ids", "use_cache", *only)}
        assert_close_by_norm(model(**batch).logits, want, 2e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [packed(), padded(), {"input_ids": tokens(2, 12)}], ids=["packed", "padded", "whole"])
def test_outside_of_training_nothing_changes(
    kind: str, dtype: torch.dtype, batch: dict[str, Any], calls: list[str]
) -> None:
    model = MODELS[kind](dtype=dtype).eval()
    before, without = with_gradients(model, batch), model.train()
    with torch.no_grad():
        also = without(**batch).logits
    install(model)
    assert_same(with_gradients(model.eval(), batch), before)
    with torch.no_grad():
        assert torch.equal(model.train()(**batch).logits, also)
    assert calls == []


def test_generation_is_the_same() -> None:
    model = tiny_llama(dtype=torch.bfloat16).eval()
    before = model.generate(**padded(), max_new_tokens=6, do_sample=False)
    install(model)
    for mode in (True, False):
        assert torch.equal(model.train(mode).generate(**padded(), max_new_tokens=6, do_sample=False), before)


EAGER = {"attn_implementation": "eager"}


@pytest.mark.parametrize("batch", [packed(), padded(), {"input_ids": tokens(2, 12)}], ids=["packed", "padded", "whole"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_eager_models(kind: str, batch: dict[str, Any], calls: list[str]) -> None:
    """In bf16 nearer to fp64 than eager is; in fp32 and in eval mode what it was."""
    model = MODELS[kind]()
    model.set_attn_implementation("eager")
    plain = copy.deepcopy(model).train()
    assert install(model)
    assert model.config._attn_implementation == "deltalab_eager"
    if "cu_seq_lens_q" not in batch:
        assert_same(with_gradients(model.train(), batch), with_gradients(plain, batch))
    assert_same(with_gradients(model.eval(), batch), with_gradients(copy.deepcopy(plain).eval(), batch))
    calls.clear()
    exactly = copy.deepcopy(plain).double()
    exactly.set_attn_implementation("sdpa")  # eager casts its lowest numbers to fp32: rows without a key would be NaN
    exact = with_gradients(exactly, batch)
    plain, model = plain.to(torch.bfloat16), model.train().to(torch.bfloat16)
    before, after = with_gradients(plain, batch), with_gradients(model, batch)
    assert calls == ["attend"] * 2
    assert_as_near(after, before, exact, batch)


def test_weights_that_are_asked_for_come_from_eager() -> None:
    model = tiny_llama(dtype=torch.bfloat16).train()
    model.set_attn_implementation("eager")
    want = model(tokens(), output_attentions=True).attentions
    install(model)
    got = model(tokens(), output_attentions=True).attentions
    assert len(got) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_dropout_on_the_weights_goes_to_what_was_there(calls: list[str]) -> None:
    model = gpt2(torch.bfloat16, dropout=0.3).train()
    torch.manual_seed(1)
    before = model(**packed()).logits
    install(model)
    torch.manual_seed(1)
    assert torch.equal(model(**packed()).logits, before)
    assert calls == []


@pytest.mark.parametrize("family", ["gpt_oss", "phi3", "gpt_neox", "bert", "t5", "mixtral", "qwen3_moe"])
def test_other_families_compute_what_they_did(family: str) -> None:
    """Sinks, biases, encoders, models that the registry does not serve: the same in fp32, near in bf16."""
    model = model_of(family).train()
    batch: dict[str, Any] = {"input_ids": tokens(2, 12)} | ({"labels": tokens(2, 12)} if family == "t5" else {})
    torch.manual_seed(1)
    before = model(**batch).logits
    install(model)
    torch.manual_seed(1)
    assert torch.equal(model(**batch).logits, before)


def test_soft_caps_go_to_what_was_there(calls: list[str]) -> None:
    config = transformers.Gemma2Config(**DECODER, intermediate_size=MLP, head_dim=8, attn_logit_softcapping=5.0)
    model = transformers.Gemma2ForCausalLM(config).to(torch.bfloat16).train()
    before = model(**packed()).logits
    install(model)
    assert torch.equal(model(**packed()).logits, before)
    assert calls == []


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("batch", [packed(), padded()], ids=["packed", "padded"])
def test_under_gradient_checkpointing(reentrant: bool, batch: dict[str, Any], calls: list[str]) -> None:
    model = tiny_llama(dtype=torch.bfloat16).train()
    install(model)
    want = with_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls.clear()
    assert_same(with_gradients(model, batch), want)
    assert calls == ["attend"] * 4


@pytest.mark.parametrize("batch", [packed(), padded()], ids=["packed", "padded"])
def test_under_autocast(batch: dict[str, Any], calls: list[str]) -> None:
    model = tiny_llama().train()
    exact = with_gradients(copy.deepcopy(model).double(), batch)

    def found() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return with_gradients(model, batch)

    before = found()
    install(model)
    after = found()
    assert calls == ["attend"] * 2
    assert_as_near(after, before, exact, batch)


def test_a_long_row_goes_to_what_was_there(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ours.FASTER, torch.bfloat16, (0, 8))
    model = tiny_llama(dtype=torch.bfloat16).train()
    before = model(tokens(2, 9)).logits
    install(model)
    assert torch.equal(model(tokens(2, 9)).logits, before)
    assert calls == []
    model(tokens(2, 8))
    assert calls == ["attend"] * 2


def test_in_fp32_rows_of_some_length_are_ours(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ours.FASTER, torch.float32, (12, 13))
    model = tiny_llama().train()
    batches = [tokens(2, length) for length in (11, 12, 14)]
    want = [model(batch).logits for batch in batches]
    install(model)
    for batch, logits, ran in zip(batches, want, (0, 2, 2), strict=True):
        assert_close_by_norm(model(batch).logits, logits, 1e-6)
        assert len(calls) == ran


def test_long_segments_go_to_torch_one_by_one(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ours.FASTER, torch.bfloat16, (0, 10))  # a token's segment has 12.4 in the mean
    model = tiny_llama(dtype=torch.bfloat16).train()
    want = model(**packed()).logits
    install(model)
    assert_close_by_norm(model(**packed()).logits, want, 2e-2)
    assert calls == ["by_segment"] * 2


def test_masks_of_four_dimensions(calls: list[str]) -> None:
    """A user's own mask, bool or added, goes to our function too; one that is trained does not."""
    model = tiny_llama(dtype=torch.bfloat16).train()
    sees = (torch.rand(2, 1, 12, 12) < 0.6) | torch.eye(12, dtype=torch.bool)
    masks = sees, torch.zeros(2, 1, 12, 12, dtype=torch.bfloat16).masked_fill(~sees, -10000.0)
    want = [model(tokens(), attention_mask=mask).logits for mask in masks]
    install(model)
    for mask, logits in zip(masks, want, strict=True):
        assert_close_by_norm(model(tokens(), attention_mask=mask).logits, logits, 2e-2)
    assert calls == ["attend"] * 4
    model(tokens(), attention_mask=masks[1].clone().requires_grad_())
    assert calls == ["attend"] * 4


@pytest.mark.parametrize("where", [slice(3, 5), slice(0, 4)], ids=["within", "at the start"])
def test_padding_within_a_row_and_at_its_start(where: slice, calls: list[str]) -> None:
    """At the start there are queries that see nothing."""
    model = tiny_llama(dtype=torch.bfloat16).train()
    batch = padded()
    batch["attention_mask"][0, where] = 0
    before = with_gradients(model, batch)
    exact = with_gradients(copy.deepcopy(model).double(), batch)
    install(model)
    assert_as_near(with_gradients(model, batch), before, exact, batch)
    assert calls == ["attend"] * 2


def test_padding_on_the_left_and_masks_that_are_looked_at(calls: list[str]) -> None:
    """What is no pattern of ours is a mask; an unmade mask is made for whatever touches it."""
    model = tiny_llama().train()
    batch = padded()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    want = with_gradients(model, batch)
    install(model)
    assert_same(with_gradients(model, batch), want)

    make = lambda: torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()  # noqa: E731
    mask = Unmade(make, ours.Pattern(), (1, 1, 3, 3), torch.bool, torch.device("cpu"))
    assert mask.shape == (1, 1, 3, 3)
    assert mask.dtype is torch.bool
    assert "Unmade" in repr(mask)
    for read in (mask[:, :, :2], torch.where(mask, 1.0, 0.0), ~mask, mask.float(), mask.clone()):
        assert type(read) is Tensor
    assert torch.equal(mask[..., 1:], make()[..., 1:])
    assert type(mask.detach()) is Unmade
    assert mask.detach().mask is mask.mask
