"""The attention function under our names in transformers' registries: when it acts, what it hands on, how it comes and goes."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import deltalab as dl
from deltalab.kernels import attention as ours
from deltalab.kernels.attention import install, installed, remove
from deltalab.kernels.attention_masks import Unmade
from tests.families import DECODER, MLP, SIZE, model_of
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_gpt2, tiny_llama, tokens

LENGTHS = [5, 17, 1, 9]


def mistral(window: int | None = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.MistralConfig(**DECODER, intermediate_size=MLP, sliding_window=window)
    return transformers.MistralForCausalLM(config).to(dtype)


def qwen3(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.Qwen3Config(**DECODER, intermediate_size=MLP, head_dim=8)
    return transformers.Qwen3ForCausalLM(config).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.to(dtype)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "llama": tiny_llama, "mistral": mistral, "qwen3": qwen3, "gpt2": gpt2,
}  # fmt: skip


def packed(seed: int = 0) -> dict[str, Any]:
    """Samples of LENGTHS tokens in one row, as a packed batch is handed to a model."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {
        "input_ids": tokens(1, sum(LENGTHS), seed=seed),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS),
        "use_cache": False,
    }  # fmt: skip


def padded() -> dict[str, Any]:
    """Two rows, the second one padded on the right."""
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Logits and every parameter's gradient."""
    model.zero_grad()
    logits = model(**batch).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if "attention_mask" in batch and batch["attention_mask"].ndim == 2:
        weights *= batch["attention_mask"][..., None]
    (logits * weights.to(logits.dtype)).sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = 0.0) -> None:
    assert got.keys() == want.keys()
    for name, t in got.items():
        assert torch.equal(t, want[name]) if not bound else error_by_norm(t, want[name]) <= bound, name


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
    monkeypatch.setattr(ours, "LONGEST", 8)
    model = tiny_llama(dtype=torch.bfloat16).train()
    before = model(tokens(2, 9)).logits
    install(model)
    assert torch.equal(model(tokens(2, 9)).logits, before)
    assert calls == []
    model(tokens(2, 8))
    assert calls == ["attend"] * 2


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


def test_which_models_are_switched() -> None:
    assert installed(tiny_llama()) is False
    for kind in MODELS.values():
        assert install(kind())
    t5, falcon = model_of("t5"), transformers.FalconForCausalLM(transformers.FalconConfig(**SIZE, num_kv_heads=2))
    eager_gpt2, flash = tiny_gpt2(), tiny_llama()
    eager_gpt2.set_attn_implementation("eager")
    flash.config._attn_implementation_internal = "flash_attention_2"
    for model in (eager_gpt2, flash, falcon):
        name = model.config._attn_implementation
        assert not install(model)
        assert not installed(model)
        assert model.config._attn_implementation == name
    install(t5)  # whichever way
    assert not install(nn.Linear(2, 2))


def test_remove_puts_back_what_was_there(tmp_path: Path) -> None:
    for implementation in ("sdpa", "eager"):
        model = tiny_llama()
        model.set_attn_implementation(implementation)
        model.save_pretrained(tmp_path / "before")
        config = copy.deepcopy(vars(model.config))
        state = [name for name, _ in model.named_modules()], list(model.state_dict())
        install(model)
        install(model)
        assert installed(model)
        model.save_pretrained(tmp_path / "after")
        files = [(tmp_path / name / "config.json").read_text() for name in ("before", "after")]
        assert files[0] == files[1]
        assert "deltalab" not in files[1]
        remove(copy.deepcopy(model))
        assert installed(model)
        remove(model)
        assert vars(model.config) == config
        assert type(model.config._attn_implementation) is str
        assert state == ([name for name, _ in model.named_modules()], list(model.state_dict()))


def test_configs_within_a_config() -> None:
    """Vision and text have a config each."""
    text = {**DECODER, "intermediate_size": MLP, "head_dim": 8}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    names = model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation
    model.train()
    before = model(input_ids=tokens(2, 12)).logits
    assert install(model)
    assert model.config.text_config._attn_implementation == "deltalab_sdpa"
    assert torch.equal(model(input_ids=tokens(2, 12)).logits, before)
    remove(model)
    assert names == (
        model.config.text_config._attn_implementation,
        model.config.vision_config._attn_implementation,
    )


def test_copies_work() -> None:
    """A deep copy and a pickled one."""
    model = tiny_llama().train()
    install(model)
    want = model(**packed()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert installed(twin)
        assert torch.equal(twin(**packed()).logits, want)


@pytest.mark.slow
def test_another_process_unpickles_a_model(tmp_path: Path) -> None:
    model = tiny_llama().train()
    install(model)
    want = model(**packed()).logits.detach()
    torch.save({"model": model, "batch": packed(), "want": want}, tmp_path / "model.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); d = torch.load(sys.argv[1], weights_only=False);"
        "sys.exit(not torch.equal(d['model'](**d['batch']).logits, d['want']))"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], timeout=300).returncode == 0


def test_beside_deltas_and_zero_init_prompts() -> None:
    """A prompt's term is added to heads that ours computed; merged copies and unloading go on."""
    model = tiny_llama().train()
    adapted = dl.adapt(model, dl.ZeroInitPrefix(length=3))
    for name, parameter in adapted.named_parameters():
        if "delta" in name:
            nn.init.normal_(parameter, std=0.3)
    want = with_gradients(adapted, packed())
    install(adapted)
    assert_same(with_gradients(adapted.train(), packed()), want, 2e-6)
    adapted.eval()
    with torch.no_grad():
        eval_logits = adapted(**packed()).logits
        remove(adapted)
        assert torch.equal(adapted(**packed()).logits, eval_logits)
