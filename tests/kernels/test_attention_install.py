"""Our names in a model's configs: which models get them, what copies and files have of them, how they go again."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import deltalab as dl
from deltalab.kernels.attention import install, installed, remove
from tests.families import DECODER, MLP, SIZE, model_of
from tests.helpers import tiny_gpt2, tiny_llama, tokens
from tests.kernels.attending import MODELS, assert_same, packed, with_gradients


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
