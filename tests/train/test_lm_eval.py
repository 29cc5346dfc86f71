"""Tasks of lm-evaluation-harness: its own results on models loaded by itself, and brute force, are the reference."""

import json
import math
import sys

import pytest
import torch
import yaml

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.core.records import read_record
from deltalab.data.tasks import LMEvalTask
from tests.deltas.perturb import perturbed
from tests.helpers import byte_tokenizer, model_folder, tiny_gpt2, tiny_llama

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'deltalab[eval]'")

from deltalab.train import lm_eval as ours  # noqa: E402

TOKENIZER = byte_tokenizer()
LABELS = ["no", "maybe", "yes, of course"]
ROWS = [
    {"question": f"is {i} more than {7 - i}", "label": i % 3, "text": f"{i} apples and " * (2 + 3 * i)}
    for i in range(9)
]
CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}?", "doc_to_target": "label", "doc_to_choice": LABELS,
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "mcc"}],
}  # fmt: skip
TASKS = {
    "choice": CHOICE,
    "choice_too": {**CHOICE, "doc_to_text": "Q: {{question}}?"},
    "shots": {**CHOICE, "fewshot_split": "test", "num_fewshot": 2},
    "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
             "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
    "reply": {"output_type": "generate_until", "doc_to_text": "{{question}}?", "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}],
              "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 6},
              "filter_list": [{"name": "bare", "filter": [{"function": "take_first"}]}]},
    "long": {"output_type": "generate_until", "doc_to_text": "{{question}}?", "doc_to_target": "x", "metric_list": [{"metric": "exact_match"}]},
    "coded": {**CHOICE, "unsafe_code": True},
    "far": {**CHOICE, "dataset_path": "owner/far_away", "dataset_kwargs": None},
    "wrong": {**CHOICE, "output_type": "multiple_chance"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files of each kind, and a group."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "rows.jsonl")}},
        "test_split": "test",
    }
    for name, body in TASKS.items():
        (place / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, **data, **body, "metadata": {"version": 1.0}})
        )
    group = {
        "group": "both",
        "task": ["choice", "choice_too"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (place / "both.yaml").write_text(yaml.safe_dump(group))
    return str(place)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Only the test's own files, and no list of installed packages: lm-eval's take ten seconds, and two."""
    made = ours._manager
    monkeypatch.setattr(ours, "_manager", lambda folder, defaults: made(folder, False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def adapted():
    return perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=4, targets="all-linear"), seed=1))


def ask(folder, *tasks, **fields):
    return LMEvalTask(tasks=list(tasks), include_path=folder, **fields)


def log_probabilities(model, tokens):
    """Of each token behind the first, in one pass, (n - 1,)."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.mark.parametrize("make", [tiny_llama, adapted, tiny_gpt2])
def test_choices_are_those_of_brute_force(make, folder):
    model = make()
    found = ours.lm_eval_scores(ask(folder, "choice"), model, TOKENIZER)["choice"]
    plain, normed = [], []
    for row in ROWS:
        prompt = TOKENIZER.encode(f"{row['question']}?")
        each = [
            float(log_probabilities(model, prompt + (tail := TOKENIZER.encode(f" {label}")))[-len(tail) :].sum())
            for label in LABELS
        ]
        by_length = [one / len(label) for one, label in zip(each, LABELS, strict=True)]
        plain.append(float(each.index(max(each)) == row["label"]))
        normed.append(float(by_length.index(max(by_length)) == row["label"]))
    assert found["acc"] == (pytest.approx(sum(plain) / 9), plain)
    assert found["acc_norm"] == (pytest.approx(sum(normed) / 9), normed)
    assert found["mcc"].items is None


@pytest.mark.parametrize("make", [tiny_llama, adapted])
def test_the_perplexity_is_that_of_brute_force(make, folder):
    """Texts longer than the context go in windows; a window's input reaches back as far as the context does."""
    model, total, words, size = make(), 0.0, 0, 0
    for row in ROWS:
        tokens = [TOKENIZER.eos_token_id, *TOKENIZER.encode(row["text"])]
        for start in range(1, len(tokens), 128):
            end = min(start + 128, len(tokens))
            total += float(log_probabilities(model, tokens[max(0, end - 129) : end])[start - end :].sum())
        words, size = (
            words + len(row["text"].split(" ")),
            size + len(row["text"].encode()),
        )  # lm-eval's words: at white space
    assert max(len(TOKENIZER.encode(row["text"])) for row in ROWS) > 256
    found = ours.lm_eval_scores(ask(folder, "text"), model, TOKENIZER)["text"]
    assert found["word_perplexity"].value == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert found["bits_per_byte"].value == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert found["bits_per_byte"].items is None


def test_replies_are_the_greedy_ones(folder):
    model = adapted()
    results = ours.run_lm_eval(ask(folder, "reply"), model, TOKENIZER)
    for row, sample in zip(ROWS, results["samples"]["reply"], strict=True):
        tokens = TOKENIZER.encode(f"{row['question']}?")
        start = len(tokens)
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == TOKENIZER.eos_token_id:
                break
        said = TOKENIZER.decode(tokens[start:], skip_special_tokens=True).split("\n")[0]
        assert sample["resps"] == [[said]]
    assert ours.measures(results)["reply"]["exact_match.bare"] == (0.0, [0.0] * 9)


def test_results_are_those_of_lm_eval_on_the_folder(folder, tmp_path):
    """Every value of every sample; the model is loaded by lm-eval there, and the command reads as its own does."""
    from lm_eval.tasks import TaskManager

    place = model_folder(tiny_llama(), tmp_path / "model")
    names = ["choice", "shots", "text", "reply"]
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(place), "dtype": "float32"}, device="cpu", batch_size=4, tasks=names, limit=5,
        task_manager=TaskManager(include_path=folder, include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    spec = ours.Asked(model=str(place), ask=ask(folder, *names, limit=5, batch_size=4))
    found = ours.evaluate_asked(spec, tmp_path / "out")
    assert found.results["results"] == ours._as_json(theirs["results"])
    assert found.results["n-shot"]["shots"] == 2
    for name in names:
        kept = [json.loads(line) for line in (tmp_path / "out" / "samples" / f"{name}.jsonl").read_text().splitlines()]
        assert kept == ours._as_json(theirs["samples"][name])
    record = read_record(tmp_path / "out")
    assert (record["kind"], record["measures"]) == ("eval", found.measures)
    with pytest.raises(UserError, match="another spec"):
        ours.evaluate_asked(spec.but(dtype="float32"), tmp_path / "out")


def test_a_group_stands_for_its_tasks(folder):
    results = ours.run_lm_eval(ask(folder, "both"), tiny_llama(), TOKENIZER)
    alone = ours.measures(results, all_of_groups=True)
    assert set(alone) == {"both", "choice", "choice_too"}
    found = ours.measures(results)
    assert set(found) == {"both"}
    assert found["both"]["acc"].items == alone["choice"]["acc"].items + alone["choice_too"]["acc"].items
    del results["groups"], results["results"]["both"]["acc,none"]  # one without a measure of its own
    assert set(ours.measures(results)) == {"choice", "choice_too"}


def test_numbers_that_are_none_are_left_out():
    samples = {"a": [{"filter": "none", "acc": 1, "f1": 0.0}, {"filter": "none", "acc": False, "f1": 1.0}]}
    row = {
        "alias": "a",
        "sample_len": 2,
        "acc,none": 0.5,
        "acc_stderr,none": 0.5,
        "f1,none": 0.9,
        "nan,none": float("nan"),
        "inf,none": float("inf"),
    }
    assert ours.measures({"results": {"a": row}, "samples": samples}) == {
        "a": {"acc": (0.5, [1.0, 0.0]), "f1": (0.9, None)}
    }


def test_model_and_random_states_stay(folder):
    model = adapted().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    ours.lm_eval_scores(ask(folder, "choice"), model, TOKENIZER)
    got = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(got, torch.rand(3))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_is_scored_before_and_after_and_trains_as_without(folder, tmp_path):
    from deltalab.data.tasks import SkillsTask
    from deltalab.lab.compare import compare, runs_of
    from deltalab.train import EvalSpec, OptimSpec, TrainSpec, run_spec

    base = TrainSpec(model="organism", adapt=[{"method": "lora", "targets": "q,v", "r": 2, "dropout": 0.1}], data=[SkillsTask(n=16, n_test=4)],
                     optim=OptimSpec(steps=2, batch=4, lr=1e-2), eval=EvalSpec(fraction=0))  # fmt: skip
    asked = base.but(data=[SkillsTask(n=16, n_test=4).plain(), ask(folder, "choice", "text", limit=4).plain()])
    run_spec(base, tmp_path / "without", progress=False)
    record = read_record(run_spec(asked, tmp_path / "with", progress=False))
    weights = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("without", "with")]
    assert weights[0] == weights[1]
    kept = json.loads((tmp_path / "with" / "examples.json").read_text())
    for when in ("before", "after"):
        said = record["scores"][when]
        assert said["choice"]["acc"] == pytest.approx(sum(kept[when]["choice"]["acc"]) / 4)
        assert said["choice"]["low"] <= said["choice"]["acc"] <= said["choice"]["high"]
        assert said["choice"]["n"] == 4
        assert set(said["text"]) == {"word_perplexity", "bits_per_byte"}
    assert record["scores"]["before"]["text"] != record["scores"]["after"]["text"]
    lines = compare(runs_of([tmp_path / "with"]), ["score.choice.acc", "score.text.bits_per_byte"])
    assert lines[0].mean == record["scores"]["after"]["choice"]["acc"]
    assert [line.rises for line in lines] == [True, False]


def refused(task, *parts, model=None, tokenizer=TOKENIZER):
    with pytest.raises(UserError) as caught:
        ours.lm_eval_scores(task, model or tiny_llama(), tokenizer)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_mistakes_are_told(folder, monkeypatch):
    refused(ask(folder, "choise"), "lm-eval has no task 'choise'", "nearest: choice")
    refused(ask(folder + "x", "choice"), "is no folder")
    refused(ask(folder, "far"), "the data of lm-eval task 'far' cannot be read", "owner/far_away", "HF_HOME")
    refused(ask(folder, "wrong"), "cannot make task 'wrong'")
    refused(ask(folder, "both", "choice"), "'choice' is asked for twice: by 'both' and 'choice'")
    refused(ask(folder, "coded"), "'coded' runs code that the model writes")
    refused(ask(folder, "long"), "requested max tokens to generate (256)", "max_gen_toks")
    refused(ask(folder, "choice", apply_chat_template=True), "no chat template", tokenizer=byte_tokenizer(None))
    bare = byte_tokenizer()
    bare.eos_token = None
    refused(ask(folder, "choice"), "neither a begin nor an end token", tokenizer=bare)
    ours.lm_eval_scores(ask(folder, "long", gen_kwargs={"max_gen_toks": 3}, limit=2), tiny_llama(), TOKENIZER)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(ask(folder, "choice"), "pip install 'deltalab[eval]'")


def test_patterns_and_files_are_names_too(folder):
    found = ours.lm_eval_scores(ask(folder, "choi*", limit=2), tiny_llama(), TOKENIZER)
    assert set(found) == {"choice", "choice_too"}
    assert set(ours.lm_eval_scores(ask(None, f"{folder}/choice.yaml", limit=2), tiny_llama(), TOKENIZER)) == {"choice"}


def test_the_chat_template_goes_round_the_prompt(folder):
    results = ours.run_lm_eval(ask(folder, "choice", apply_chat_template=True, limit=1), tiny_llama(), TOKENIZER)
    prompt = results["samples"]["choice"][0]["arguments"][0][0]
    assert prompt == f"<|user|>{ROWS[0]['question']}?<|assistant|>"


def test_an_encoder_is_refused(folder):
    from tests.families import model_of

    refused(ask(folder, "choice"), "writes none", model=model_of("bert-classifier"))


def test_the_command_prints_a_table(folder, tmp_path, capsys):
    from deltalab.cli.eval import command

    command("organism", tasks="choice,text,reply", include_path=folder, limit=4, gen_kwargs="max_gen_toks=2", json=tmp_path / "r.json")  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    (acc,) = [line for line in lines if " acc " in line]
    kept = json.loads((tmp_path / "r.json").read_text())
    one = kept["measures"]["choice"]["acc"]
    assert acc.split() == [
        "choice",
        "0",
        "acc",
        f"{one['value']:.4g}",
        f"[{one['low']:.4g},",
        f"{one['high']:.4g}]",
        "4",
    ]
    assert kept["results"]["choice"]["acc,none"] == one["value"]
    assert kept["configs"]["reply"]["generation_kwargs"]["max_gen_toks"] == 2
