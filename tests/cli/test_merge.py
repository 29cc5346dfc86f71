"""`deltalab merge`: what it writes is read by others and is the adapted model; what is too far off is not written."""

import json

import pytest
import safetensors.torch
import torch
import transformers

import deltalab as dl
from deltalab.cli import merge
from deltalab.deltas.adapt import attached
from deltalab.measure.merging import merge_price
from deltalab.models.load import load
from deltalab.models.precision import cpu_multiplies_bfloat16
from tests.cli.test_verbs import main
from tests.deltas.perturb import perturbed
from tests.helpers import assert_close_by_norm, byte_tokenizer, model_folder, tiny_llama, tokens

GROUP = "--group-size=8"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return model_folder(tiny_llama(context=256), tmp_path_factory.mktemp("model"))


@pytest.fixture
def adapter(tmp_path):
    """Of any model like the base, quantised or not."""
    return saved(dl.LoRA(r=4, targets="all-linear"), tmp_path / "adapter")


def saved(spec, folder, model=None):
    dl.save_adapter(perturbed(dl.adapt(model or tiny_llama(context=256), spec), 0.1), folder)
    return folder


def nothing_left(folder, names):
    """The folder holds these, and nothing half-written beside them."""
    assert {p.name for p in folder.iterdir()} == set(names)


def test_a_plain_base_becomes_a_folder_of_transformers(capsys, tmp_path, base, adapter):
    out = tmp_path / "out"
    code, said, err = main(capsys, "merge", str(base), str(adapter), str(out), "--verify")
    assert (code, err) == (0, "")
    want = dl.load_adapter(load(base)[0], adapter)
    got = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert_close_by_norm(got(tokens()).logits, want(tokens()).logits, 1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out)("ab").input_ids == byte_tokenizer()("ab").input_ids
    record = json.loads((out / "merge.json").read_text())
    assert (record["kind"], record["base"], record["adapter"]) == ("merge", str(base), str(adapter))
    assert (record["into"], record["verify"], record["tol"], record["dtype"]) == ("dequantise", True, 1e-3, "float32")
    assert record["deltas"] == ["LoRA"]
    assert record["versions"]["torch"] == torch.__version__
    assert 0 < record["price"]["logits"]["error"] < 1e-5
    assert record["price"]["matrices"].keys() == attached(want).keys()
    assert f"relative error {record['price']['logits']['error']:.2e}" in said
    assert said.startswith(f"{base} + {adapter}, merged;")
    nothing_left(tmp_path, {"adapter", "out"})


@pytest.mark.parametrize("kind", ["nf4", "int4-group"])
def test_a_quantised_base_becomes_a_plain_model_with_every_linear(capsys, tmp_path, base, kind):
    group = [] if kind == "nf4" else [GROUP]
    want, _ = load(base, quantize=kind, group_size=None if kind == "nf4" else 8)
    few = saved(dl.DoRA(r=4, targets="q,v"), tmp_path / "dora", want)
    ask = ["merge", str(base), str(few), str(tmp_path / "out"), "--quantize", kind, *group]
    code, said, _ = main(capsys, *ask, "--verify")
    assert code == 0
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [type(m) for m in got.modules()] == [type(m) for m in tiny_llama().modules()]
    assert not hasattr(got.config, "quantization_config")
    assert_close_by_norm(got(tokens()).logits, want(tokens()).logits, 1e-5)
    assert ", dequantise;" in said


@pytest.mark.parametrize("kind", ["nf4", "int4-group"])
def test_codes_again_are_written_within_the_tolerance_and_not_beyond(capsys, tmp_path, base, adapter, kind):
    group, size = ([], None) if kind == "nf4" else ([GROUP], 8)
    out, ask = tmp_path / "out", ["merge", str(base), str(adapter), str(tmp_path / "out"), "--quantize", kind, *group]
    code, said, err = main(capsys, *ask, "--into", "requantise", "--verify")
    assert code == 2
    model = dl.load_adapter(load(base, quantize=kind, group_size=size)[0], adapter)
    plain = dl.merged(model, "requantise")
    assert "more than the 1.00e-03 that --tol allows" in err
    assert f"'{out}' was not made" in err
    assert "--into dequantise, which loses nothing" in err
    assert "logits     relative error" in said
    nothing_left(tmp_path, {"adapter"})
    enough = err.split("--tol ")[-1].strip()
    code, said, err = main(capsys, *ask, "--into", "requantise", "--verify", "--tol", enough)
    assert (code, err) == (0, "")
    again, _ = load(out)
    assert torch.equal(again(tokens()).logits, plain(tokens()).logits)
    record = json.loads((out / "merge.json").read_text())
    error = record["price"]["logits"]["error"]
    assert 1e-3 < error <= float(enough) < 10 * error
    batches = merge._batches(model, byte_tokenizer(), merge._conversations(None))
    assert error == pytest.approx(merge_price(model, plain, batches).logits.error, rel=1e-4)


def test_a_correction_is_written_beside_its_base(capsys, tmp_path, base, adapter):
    out = tmp_path / "out"
    ask = ["merge", str(base), str(adapter), str(out), "--quantize", "int4-group", GROUP, "--into", "correct"]
    code, said, _ = main(capsys, *ask, "--rank", "6", "--steps", "3", "--verify", "--tol", "0.5")
    assert code == 0
    assert "correct, an adapter of rank 6 stays;" in said
    want = dl.merged(dl.load_adapter(load(base, quantize="int4-group", group_size=8)[0], adapter), "correct", rank=6, steps=3)  # fmt: skip
    got = dl.load_adapter(load(out)[0], out / "adapter")
    assert_close_by_norm(got(tokens()).logits, want(tokens()).logits, 1e-6)
    record = json.loads((out / "merge.json").read_text())
    assert (record["into"], record["rank"], record["steps"], record["group_size"]) == ("correct", 6, 3, 8)
    assert f"deltalab.load_adapter(model, '{out / 'adapter'}')" in said


def test_it_is_the_disk_that_is_compared(capsys, monkeypatch, tmp_path, base, adapter):
    read = merge._read

    def damaged(folder, like):
        file = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"][0] *= 1.5
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
        return read(folder, like)

    monkeypatch.setattr(merge, "_read", damaged)
    code, _, err = main(capsys, "merge", str(base), str(adapter), str(tmp_path / "out"), "--verify")
    assert code == 2
    assert "the merged model is off by" in err
    nothing_left(tmp_path, {"adapter"})
    assert main(capsys, "merge", str(base), str(adapter), str(tmp_path / "out"))[0] == 0, "unverified it is kept"
    assert json.loads((tmp_path / "out/merge.json").read_text())["tol"] is None


def test_interrupted_it_leaves_nothing(capsys, monkeypatch, tmp_path, base, adapter):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "_price", stop)
    code, _, _ = main(capsys, "merge", str(base), str(adapter), str(tmp_path / "out"))
    assert code == 130
    nothing_left(tmp_path, {"adapter"})


def test_own_data_and_the_loss_on_it(capsys, tmp_path, base, adapter):
    rows = [{"prompt": f"Say {word}.", "response": word} for word in ("yes", "no", "perhaps")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data.txt").write_text("One text.\n\nAnother text.\n")
    for name, n in (("data.jsonl", 3), ("data.txt", 2)):
        out = tmp_path / name.replace(".", "-")
        code, said, _ = main(capsys, "merge", str(base), str(adapter), str(out), "--data", str(tmp_path / name))
        assert code == 0
        price = json.loads((out / "merge.json").read_text())["price"]
        model = dl.load_adapter(load(base)[0], adapter)
        (batch,) = merge._batches(model, byte_tokenizer(), merge._conversations(tmp_path / name))
        assert price["logits"]["tokens"] == int(batch["attention_mask"].sum())
        assert len(batch["input_ids"]) == n
        assert price["metric"][0] == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)
        assert price["metric"][1] == pytest.approx(price["metric"][0], rel=1e-4)
        assert "  metric " in said


@pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="no bfloat16 on this CPU")
def test_rounding_to_16_bits_is_told_of(capsys, tmp_path, base, adapter):
    ask = ["merge", str(base), str(adapter), str(tmp_path / "out"), "--dtype", "bfloat16", "--verify"]
    code, _, err = main(capsys, *ask)
    assert code == 2
    assert "--dtype float32: bfloat16 rounds the merged weights" in err
    code, _, _ = main(capsys, *ask, "--tol", "0.1")
    assert code == 0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype is torch.bfloat16


def test_the_bundled_model_whole(capsys, tmp_path):
    model, _ = load("organism", quantize="nf4")
    saved(dl.LoRA(r=2), tmp_path / "adapter", model)
    code, said, _ = main(capsys, "merge", "organism", str(tmp_path / "adapter"), str(tmp_path / "out"), "--quantize=nf4", "--verify")  # fmt: skip
    assert code == 0
    before, after = json.loads((tmp_path / "out" / "merge.json").read_text())["price"]["bytes"]
    assert 3 * before < after < 14 * 2**20
    assert f"{before / 2**20:.1f} → {after / 2**20:.1f} MiB" in said
    assert_close_by_norm(load(tmp_path / "out")[0](tokens()).logits, model(tokens()).logits, 1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--into", "requantize"], "'requantize' is no way to merge"),
        (["--into", "requantise"], "is for quantised linears"),
        (["--rank", "4"], "rank=4 is of a correction"),
        (["--tol", "0.1"], "--tol 0.1 holds nothing to anything"),
        (["--verify", "--tol", "nan"], "--tol nan holds nothing"),
        (["--quantize", "nf3"], "'nf3' is no quantisation"),
        (["--dtype", "float31"], "'float31' is no dtype"),
        (["--data", "nowhere.jsonl"], "data file 'nowhere.jsonl' does not exist"),
        (["--data", "nowhere.txt"], "text file 'nowhere.txt' does not exist"),
    ],
)
def test_options_that_mean_nothing(capsys, tmp_path, base, adapter, options, match):
    code, out, err = main(capsys, "merge", str(base), str(adapter), str(tmp_path / "out"), *options)
    assert (code, out) == (2, "")
    assert match in err
    assert "Traceback" not in err
    nothing_left(tmp_path, {"adapter"})


def test_folders_that_do_not_fit(capsys, tmp_path, base, adapter):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    other = saved(dl.LoRA(r=4), tmp_path / "other", tiny_llama(hidden=64))
    beside = saved(dl.Bottleneck(), tmp_path / "beside")
    for folder, out, match in (
        (adapter, tmp_path / "full", "is not empty"),
        (adapter, tmp_path / "full" / "notes.txt", "is a file"),
        (tmp_path / "none", tmp_path / "out", "does not exist"),
        (other, tmp_path / "out", "does not fit"),
        (beside, tmp_path / "out", "depends on the input, so it has no merged weight"),
    ):
        code, _, err = main(capsys, "merge", str(base), str(folder), str(out))
        assert code == 2, folder
        assert match in err
        nothing_left(tmp_path, {"full", "adapter", "other", "beside"})
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert main(capsys, "merge", str(base), str(adapter), str(tmp_path / "empty"))[0] == 0
