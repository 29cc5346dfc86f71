"""A task's answers by likelihood and by generation, and its measures in a run's record."""

import json
import math

import pytest
import torch

from deltalab.core.records import read_record
from deltalab.data.chat import encode_all
from deltalab.data.likelihood import choose
from deltalab.data.metrics import Measure
from deltalab.data.tasks import InstructTask, OwnTask, SkillsTask, SST2Task, TextTask
from deltalab.models.generate import generate
from deltalab.train.evaluate import evaluate, summary
from tests.helpers import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer()
ROWS = [{"english": f"word {i}", "french": "mot" if i % 3 else "rien"} for i in range(6)]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def own(path, **fields):
    return OwnTask(path=path, test_path=path, prompt="say {english}", reply="{french}", **fields)


def test_choices_by_likelihood(rows):
    model, task = tiny_llama(), own(rows, answers=("mot", "rien"))
    found = evaluate(task, model, TOKENIZER, 128)
    chosen = choose(model, TOKENIZER, task.test(), ("mot", "rien"), context=128).tolist()
    right = [float(pick == (i % 3 == 0)) for i, pick in enumerate(chosen)]
    assert found["accuracy"] == (sum(right) / 6, right)
    assert set(found) == {"accuracy", "precision", "recall", "f1"}


def test_replies_are_generated(rows):
    model, task = tiny_llama(), own(rows, metrics=("exact", "rouge-l"), new_tokens=5)
    found = evaluate(task, model, TOKENIZER, 128)
    said = [g.text.strip() for g in generate(model, TOKENIZER, [f"say word {i}" for i in range(6)], max_new_tokens=5)]
    want = task.score(said, task.test())
    assert found == want
    assert set(found) == {"exact", "rouge_l"}


def test_a_model_that_is_right_scores_one(rows, monkeypatch):
    """The replies are what the score sees, and each is that of its own question."""
    task = own(rows, metrics=("exact",), new_tokens=5)

    def right(model, tokenizer, prompts, **_):
        replies = {f"say {row['english']}": row["french"] for row in ROWS}
        return [type("G", (), {"text": f" {replies[p[-1]['content']]} "})() for p in prompts]

    monkeypatch.setattr("deltalab.train.evaluate.generate", right)
    assert evaluate(task, tiny_llama(), TOKENIZER, 128)["exact"] == (1.0, [1.0] * 6)


@pytest.mark.parametrize("kind", [InstructTask, TextTask])
def test_the_loss_and_the_perplexity(kind, tmp_path):
    (tmp_path / "test.json").write_text(
        json.dumps([{"prompt": "a", "response": "bcd"}, {"prompt": "ef", "response": "g"}])
    )
    (tmp_path / "test.txt").write_text("abc\n\ndefgh\n\ni")
    path = str(tmp_path / ("test.json" if kind is InstructTask else "test.txt"))
    model, task = tiny_llama().train(), kind(path=path, test_path=path)
    found = evaluate(task, model, TOKENIZER, 128)
    total = count = 0.0
    model.eval()
    for sample in encode_all(TOKENIZER, task.test(), 128):
        with torch.no_grad():
            logp = model(torch.tensor([sample.input_ids])).logits[0].double().log_softmax(-1)
        for i, label in enumerate(sample.labels[1:]):
            if label >= 0:
                total, count = total - float(logp[i, label]), count + 1
    assert found["loss"].value == pytest.approx(total / count, rel=1e-5)
    assert ("perplexity" in found) is (kind is TextTask)
    if kind is TextTask:
        assert found["perplexity"].value == pytest.approx(math.exp(total / count), rel=1e-4)


def test_the_mode_of_the_model_is_kept(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    model = tiny_llama().train()
    evaluate(TextTask(path=str(tmp_path / "a.txt"), test_path=str(tmp_path / "a.txt")), model, TOKENIZER, 64)
    assert model.training


def test_a_task_without_test_data_or_measures_has_none(rows):
    model = tiny_llama()
    assert evaluate(SkillsTask(n=4, n_test=4), model, TOKENIZER, 128) == {}
    assert evaluate(OwnTask(path=rows, prompt="{english}", reply="{french}", metrics=("exact",)), model, TOKENIZER, 128) == {}  # fmt: skip
    assert summary({}) is None


def test_what_a_record_says():
    found = summary({"accuracy": Measure(0.75, [1.0, 1.0, 1.0, 0.0]), "f1": Measure(0.8)})
    assert found["accuracy"] == 0.75
    assert found["f1"] == 0.8
    assert found["n"] == 4
    assert found["low"] < 0.75 < found["high"]
    assert summary({"loss": Measure(1.5)}) == {"loss": 1.5}
    assert summary({"f1": Measure(0.25, [0.5, 0.0])}) == {"f1": 0.25, "n": 2}


def test_a_run_keeps_the_scores_of_examples(tmp_path, rows):
    from deltalab.train import EvalSpec, OptimSpec, TrainSpec, run_spec

    spec = TrainSpec(
        model="organism", adapt=[{"method": "lora", "targets": "q,v", "r": 2}], eval=EvalSpec(fraction=0),
        data=[own(rows, answers=("mot", "rien")), SST2Task(path=sst2(tmp_path), test_share=0.5)],
        optim=OptimSpec(steps=1, batch=2), output=str(tmp_path / "run"),
    )  # fmt: skip
    record = read_record(run_spec(spec, progress=False))
    kept = json.loads((tmp_path / "run" / "examples.json").read_text())
    for when in ("before", "after"):
        for tag in ("rows", "sst2"):
            items, said = kept[when][tag]["accuracy"], record["scores"][when][tag]
            assert said["accuracy"] == pytest.approx(sum(items) / len(items))
            assert said["n"] == len(items)
    assert record["scores"]["after"]["sst2"]["n"] == 4


def sst2(folder):
    path = folder / "sst2.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"film {i}\t{i % 2}\n" for i in range(8)))
    return str(path)


def test_a_run_says_every_measure(tmp_path, rows):
    from deltalab.cli.train import summary as said
    from deltalab.train import EvalSpec, OptimSpec, TrainSpec, run_spec

    (tmp_path / "t.txt").write_text("abc\n\nde")
    data = [own(rows, metrics=("exact", "rouge-l"), new_tokens=2),
            TextTask(path=str(tmp_path / "t.txt"), test_path=str(tmp_path / "t.txt")), own(rows, answers=("mot", "rien"))]  # fmt: skip
    spec = TrainSpec(model="organism", adapt=[{"method": "lora", "targets": "q,v", "r": 2}], eval=EvalSpec(fraction=0),
                     data=data, optim=OptimSpec(steps=1, batch=2), output=str(tmp_path / "run"))  # fmt: skip
    text = said(read_record(run_spec(spec, progress=False)), tmp_path / "run")
    assert "rows       exact 0.000 → 0.000 [0.000, 0.390], rouge_l" in text
    assert "text       loss " in text
    assert ", perplexity " in text
    assert "rows.2     accuracy " in text
    assert text.count("n = 6") == 2
