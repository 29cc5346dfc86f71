"""An adapter's files say which head its base is to be loaded with."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.models.heads import head_for
from tests.cli.test_verbs import main
from tests.deltas.perturb import perturbed
from tests.helpers import assert_close_by_norm, model_folder, tiny_llama, tokens

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
BODIES = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES, pad_token_id=0)),
    "distilbert": lambda: transformers.DistilBertModel(transformers.DistilBertConfig(vocab_size=300, dim=16, n_layers=2, n_heads=2, hidden_dim=24)),
    "llama": tiny_llama,
}  # fmt: skip
ADAPT = {"lora": dl.LoRA(r=2, targets="attention"), "bottleneck": dl.Bottleneck(), "full": dl.Train("full")}


def trained(folder: Path, body: str, adapt: str, labels: int = 3) -> torch.nn.Module:
    """A classifier on a body without a head, adapted and changed; the base lies in folder/base, the adapter in folder/adapter."""
    torch.manual_seed(0)
    base = model_folder(BODIES[body](), folder / "base")
    model = perturbed(dl.load(base, head="SequenceClassification", labels=labels, adapt=ADAPT[adapt], seed=7)[0])
    dl.save_adapter(model, folder / "adapter")
    return model.eval()


@pytest.mark.parametrize("adapt", ADAPT)
@pytest.mark.parametrize("body", BODIES)
def test_of_a_classifier(body, adapt, tmp_path):
    model = trained(tmp_path, body, adapt)
    assert head_for(tmp_path / "adapter") == {"head": "SequenceClassification", "labels": 3}
    again = dl.load_adapter(
        dl.load(tmp_path / "base", **head_for(tmp_path / "adapter"))[0], tmp_path / "adapter"
    ).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_of_a_language_model_and_of_no_adapter(tmp_path):
    dl.save_adapter(dl.adapt(tiny_llama(), dl.LoRA(r=2)), tmp_path / "adapter")
    assert head_for(tmp_path / "adapter") == {}
    assert head_for(tmp_path) == head_for(tmp_path / "none") == {}
    (tmp_path / "adapter/adapter_config.json").write_text("[]")
    assert head_for(tmp_path / "adapter") == {}
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"cut")
    (tmp_path / "adapter/adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    assert head_for(tmp_path / "adapter") == {"head": "SequenceClassification", "labels": None}  # loading it tells


def test_merging_makes_a_classifier(tmp_path, capsys):
    model = trained(tmp_path, "bert", "lora")
    capsys.readouterr()
    code, _, err = main(capsys, "merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out"), "--verify")  # fmt: skip
    assert (code, err) == (0, "")
    got = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_close_by_norm(got(tokens()).logits, model(tokens()).logits, 1e-5)


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_classifier_writes_no_text(verb, tmp_path, capsys):
    trained(tmp_path, "bert", "lora")
    capsys.readouterr()
    ask = ["--prompt", "hello"] if verb == "generate" else []
    code, _, err = main(capsys, verb, str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), *ask)
    assert code == 2
    assert "BertModel reads texts and writes none" in err


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_a_look_inside(adapt, tmp_path, capsys):
    """What is new, the head, is passed over; of full tuning each linear's change is what it is to the base."""
    model = trained(tmp_path, "bert", adapt)
    base = dict(dl.load(tmp_path / "base", head="SequenceClassification", labels=3)[0].named_parameters())
    changes = (
        {path: dl.delta_weight(model, path) for path in attached(model)} if adapt == "lora"
        else {name[:-7]: p - base[name] for name, p in model.named_parameters() if name.endswith((".dense.weight", "query.weight", "key.weight", "value.weight"))}
    )  # fmt: skip
    other = tmp_path / "other"
    trained(other, "bert", adapt, labels=2)
    code, out, err = main(capsys, "inspect", str(tmp_path / "adapter"), str(other / "adapter"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out"))  # fmt: skip
    assert (code, err) == (0, "")
    assert "shared directions" in out
    lines = json.loads((tmp_path / "out/inspect.json").read_text())["changes"][str(tmp_path / "adapter")]
    assert {line["path"] for line in lines} == set(changes)
    for line in lines:
        want = torch.linalg.svdvals(changes[line["path"]].detach().double())[: len(line["S"])]
        assert_close_by_norm(torch.tensor(line["S"], dtype=torch.float64), want, 1e-5)
    kinds = {line["module"] for line in lines}
    assert kinds >= {"query", "attention.output.dense"}
    assert ({"layer.output.dense", "intermediate.dense", "pooler.dense"} <= kinds) is (adapt == "full")
