"""`deltalab export`, as a user calls it."""

import json

import pytest
import transformers

import deltalab as dl
from deltalab.models.vllm_check import check_vllm
from tests.cli.test_verbs import main
from tests.deltas.perturb import perturbed
from tests.families import logits
from tests.helpers import assert_close_by_norm, byte_tokenizer, model_folder, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return model_folder(tiny_llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapted(base):
    return perturbed(dl.adapt(dl.load(base)[0], dl.LoRA(r=3, rank_stabilised=True, targets="attention")))


@pytest.fixture(scope="module")
def adapter(adapted, tmp_path_factory):
    return dl.save_adapter(adapted, tmp_path_factory.mktemp("adapter") / "fr")


def test_for_vllm(capsys, base, adapter, adapted, tmp_path):
    code, out, err = main(capsys, "export", str(base), str(adapter), str(tmp_path / "out"))
    assert (code, err) == (0, "")
    assert "8 linears of rank 8" in out
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules out={tmp_path / 'out'}" in out
    assert check_vllm(tmp_path / "out") == []
    assert_close_by_norm(logits(dl.load_adapter(dl.load(base)[0], tmp_path / "out")), logits(adapted), 1e-5)
    code, out, _ = main(capsys, "export", "--check", str(tmp_path / "out"))
    assert code == 0
    assert "--max-lora-rank 8" in out


def test_merged_and_gguf(capsys, base, adapter, adapted, tmp_path):
    for form in ("merged", "gguf"):
        code, out, _ = main(capsys, "export", str(base), str(adapter), str(tmp_path / form), "--for", form)
        assert code == 0
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / form).eval()
        assert_close_by_norm(logits(plain), logits(adapted), 1e-5)
    assert f"convert_hf_to_gguf.py {tmp_path / 'gguf'} --outfile {tmp_path / 'gguf'}.gguf" in out
    assert "llama-quantize" in out


def test_an_adapter_that_does_not_pass(capsys, base, adapter, tmp_path):
    code, out, err = main(capsys, "export", "--check", str(adapter))
    assert (code, out) == (2, "")
    assert "1 fault." in err
    assert "r is 3; vLLM has room for 1, 8, 16" in err
    assert f"deltalab export BASE {adapter} OUT --for vllm" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "BASE, ADAPTER, OUT are missing"),
        (["{base}", "{adapter}"], "OUT is missing"),
        (["{base}", "{adapter}", "{new}", "--for", "vlm"], "nearest: vllm"),
        (["{base}", "{adapter}", "{new}", "--dtype", "bf16"], "'bf16' is no dtype"),
        (["{base}", "{adapter}", "{base}"], "is not empty"),
        (["{base}", "{base}", "{new}"], "has no adapter_config.json"),
        (["{base}", "{adapter}x", "{new}"], "nearest: {adapter}"),
        (["{base}x", "{adapter}", "{new}"], "model folder '{base}x' does not exist"),
        (["{base}", "--check", "{adapter}"], "looks at one folder"),
        (["--check", "{new}"], "does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes(args, message, capsys, base, adapter, tmp_path):
    places = {"base": base, "adapter": adapter, "new": tmp_path / "new"}
    code, out, err = main(capsys, "export", *(arg.format(**places) for arg in args))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message.format(**places) in err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base(capsys, adapter, tmp_path):
    tiny_llama(hidden=48, heads=4).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    code, _, err = main(capsys, "export", str(tmp_path / "other"), str(adapter), str(tmp_path / "out"))
    assert code == 2
    assert "does not fit" in err
    assert not (tmp_path / "out").exists()


def test_a_method_that_vllm_has_no_form_of(capsys, base, tmp_path):
    model = perturbed(dl.adapt(dl.load(base)[0], dl.DoRA(r=2)))
    dl.save_adapter(model, tmp_path / "dora")
    assert json.loads((tmp_path / "dora" / "adapter_config.json").read_text())["use_dora"] is True
    code, _, err = main(capsys, "export", str(base), str(tmp_path / "dora"), str(tmp_path / "out"))
    assert code == 2
    assert "is not a pair A, B alone" in err
    assert "--for merged" in err
