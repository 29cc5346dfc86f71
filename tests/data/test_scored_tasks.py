"""Tasks with measures of their own: their files' layouts, what is learnt, what is scored, and the files beside the project."""

import json

import datasets
import pytest

from deltalab.core.errors import UserError
from deltalab.data.tasks import (
    CodeRefinementTask,
    GSM8KTask,
    InstructTask,
    MRPCTask,
    OwnTask,
    ReviewCommentTask,
    ReviewNecessityTask,
    RTETask,
    SQuADTask,
    SST2Task,
)
from tests.data.test_tasks import said, write
from tests.helpers import SHARED

shared = pytest.mark.skipif(SHARED is None, reason="the data sets beside the project are not there")


def turns(conversation):
    return tuple(m["content"] for m in conversation.messages)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


SQUAD = {
    "version": "v2.0",
    "data": [
        {"title": "t", "paragraphs": [{"context": "Paris is in France. ", "qas": [
            {"id": "1", "question": "Where is Paris?", "answers": [{"text": "in France", "answer_start": 9}, {"text": "France", "answer_start": 12}], "is_impossible": False},
            {"id": "2", "question": "Where is Rome?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "France", "answer_start": 12}]},
        ]}]},
    ],
}  # fmt: skip


def test_pairs_of_sentences(tmp_path):
    rte = RTETask(path=write(tmp_path, "rte.tsv", "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n1\tA\tB\t1\n"))  # fmt: skip
    assert [turns(c) for c in rte.train()] == [("It rains.\nDoes it follow that: It is wet.", "yes"), ("A\nDoes it follow that: B", "no")]  # fmt: skip
    mrpc = MRPCTask(path=write(tmp_path, "mrpc.tsv", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tA \"quote.\tB\n"))  # fmt: skip
    (one,) = mrpc.train()
    assert turns(one) == ('Do these sentences say the same? A "quote.\nB', "yes")
    assert one.meta == {"label": 1, "texts": ('A "quote.', "B")}
    assert MRPCTask(path=write(tmp_path, "hub.jsonl", lines({"sentence1": "A", "sentence2": "B", "label": 0}))).train()[0].meta["label"] == 0  # fmt: skip
    said(RTETask(path=write(tmp_path, "b.tsv", "sentence1\tsentence2\tlabel\na\tb\tmaybe\n")).train, "line 2: label maybe is not 0 or 1 or entailment or not_entailment")  # fmt: skip


def test_the_positive_class_is_scored(tmp_path):
    path = write(tmp_path, "a.jsonl", lines(*({"sentence1": "A", "sentence2": "B", "label": y} for y in (1, 1, 0, 0))))
    asked = MRPCTask(path=path).train()
    found = MRPCTask(path=path).score([1, 0, 1, 0], asked)
    assert {name: m.value for name, m in found.items()} == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert set(SST2Task(path=path).score([1, 0, 1, 0], asked)) == {"accuracy"}


def test_squad(tmp_path):
    task = SQuADTask(path=write(tmp_path, "squad.json", SQUAD), prompt="{context} | {question}")
    with_answer, without = task.train()
    assert turns(with_answer) == ("Paris is in France. | Where is Paris?", "in France")
    assert turns(without) == ("Paris is in France. | Where is Rome?", "unanswerable")
    found = task.score(["France", "Unanswerable."], [with_answer, without])
    assert found["exact"].items == [1, 1]
    assert found["no_answer_exact"].value == 1
    assert task.score(["unanswerable", "France"], [with_answer, without])["f1"].items == [0, 0]
    rows = lines({"context": "C", "question": "Q", "answers": {"text": ["a"], "answer_start": [0]}}, {"context": "C", "question": "Q", "answers": {"text": [], "answer_start": []}})  # fmt: skip
    assert [c.meta["answers"] for c in SQuADTask(path=write(tmp_path, "a.jsonl", rows)).train()] == [["a"], []]
    said(SQuADTask(path=write(tmp_path, "b.json", {"data": [{"paragraphs": [{"qas": [{}]}]}]})).train, "not as SQuAD's files are")  # fmt: skip
    said(SQuADTask(path=write(tmp_path, "c.jsonl", lines({"context": "C", "question": "Q", "answers": "a"}))).train, "holds no texts")  # fmt: skip


def test_gsm8k(tmp_path):
    path = write(tmp_path, "a.jsonl", lines({"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}))
    asked = GSM8KTask(path=path).train()
    assert turns(asked[0]) == ("2 + 3?", "2 + 3 = 5\n#### 5")
    assert GSM8KTask(path=path).score(["it is 5."], asked)["exact"].value == 1


def test_one_file_of_several_review_tasks(tmp_path):
    path = write(tmp_path, "a.jsonl", lines(
        {"task": "cls", "patch": "@@ a", "y": 0, "msg": ""}, {"task": "cls", "patch": "@@ b", "y": 1, "msg": ""},
        {"task": "msg", "patch": "@@ c", "y": "1", "msg": " Fix this. "}, {"patch": "@@ d", "y": 1, "msg": "Why?"},
    ))  # fmt: skip
    needed = ReviewNecessityTask(path=path).train()
    assert [c.meta["label"] for c in needed] == [0, 1, 1]
    assert turns(needed[0]) == ("Does this change need a review comment?\n@@ a", "no")
    comments = ReviewCommentTask(path=path).train()
    assert [turns(c) for c in comments] == [("Review this change:\n@@ c", "Fix this."), ("Review this change:\n@@ d", "Why?")]  # fmt: skip
    found = ReviewCommentTask(path=path).score(["fix this .", "no"], comments)
    assert found["bleu4"].items[0] == 1
    assert set(found) == {"bleu4", "rouge_l"}


def test_code_with_its_partner(tmp_path):
    write(tmp_path, "train.fixed.txt", "a ( ) ;\nb\n")
    task = CodeRefinementTask(path=write(tmp_path, "train.buggy.txt", "a ;\nb\n"))
    asked = task.train()
    assert [turns(c) for c in asked] == [("Refine this code:\na ;", "a ( ) ;"), ("Refine this code:\nb", "b")]
    found = task.score(["a ( ) ;", "c"], asked)
    assert found["exact"].items == [1, 0]
    assert set(found) == {"bleu4", "exact", "unchanged_bleu4"}
    rows = write(tmp_path, "r.jsonl", lines({"old": "x", "new": "y", "comment": "Rename."}))
    (one,) = CodeRefinementTask(path=rows, prompt="{comment} {code}").train()
    assert turns(one) == ("Rename. x", "y")
    write(tmp_path, "short.fixed.txt", "a\n")
    said(CodeRefinementTask(path=write(tmp_path, "short.buggy.txt", "a\nb\n")).train, "has 2 lines, and its partner 1")
    said(CodeRefinementTask(path=write(tmp_path, "code.txt", "a\n")).train, "has no partner")
    said(CodeRefinementTask(path=write(tmp_path, "alone.buggy.txt", "a\n")).train, "does not exist")


def test_a_task_in_a_few_lines(tmp_path):
    path = write(tmp_path, "a.jsonl", lines({"en": "dog", "fr": "chien", "n": 3}, {"en": "cat", "fr": "chat", "n": 4}))
    task = OwnTask(path=path, prompt="{n} × {en}?", reply="{fr}", metrics=("exact", "smoothed-bleu"))
    assert [turns(c) for c in task.train()] == [("3 × dog?", "chien"), ("4 × cat?", "chat")]
    assert set(task.score(["chien", "x"], task.train())) == {"exact", "bleu4"}
    chosen = OwnTask(path=path, prompt="{en}", reply="{fr}", answers=("chien", "chat"))
    assert [c.meta["label"] for c in chosen.train()] == [0, 1]
    said(
        OwnTask(path=path, prompt="{english}", reply="{fr}").train, "column 'english' is missing", "columns: en, fr, n"
    )
    said(OwnTask(path=path, prompt="{en}", reply="{fr}", answers=("chien", "chats")).train, "line 2: the reply 'chat' is none", "chats")  # fmt: skip
    said(lambda: OwnTask(path=path, prompt="{en}", reply="{fr}", answers=("a", "b"), metrics=("exact",)), "answers or metrics")  # fmt: skip
    said(lambda: OwnTask(path=path, prompt="{en}", reply="{fr}", answers=("a",)), "at least two answers")


def test_a_part_of_one_file_is_for_testing(tmp_path):
    path = write(tmp_path, "a.tsv", "sentence\tlabel\n" + "".join(f"s{i}\t{i % 2}\n" for i in range(20)))
    task = SST2Task(path=path, test_share=0.25)
    trained, tested = ({turns(c)[0] for c in part} for part in (task.train(), task.test()))
    assert (len(trained), len(tested)) == (15, 5)
    assert not trained & tested
    assert task.test() == SST2Task(path=path, test_share=0.25, limit=1).test()
    assert len(SST2Task(path=path, test_share=0.25, test_limit=2).test()) == 2
    other = write(tmp_path, "b.tsv", "sentence\tlabel\nt\t1\n")
    both = SST2Task(path=path, test_path=other, test_share=0.25)
    assert (len(both.train()), len(both.test())) == (20, 1)  # nothing is held out where there is something to test on


def test_braces_in_a_text_stay_what_they_are(tmp_path):
    """Code has them, and a name among them is no place of the prompt."""
    row = {"context": "a {question} b", "question": "Q {context}", "answers": []}
    (one,) = SQuADTask(path=write(tmp_path, "s.jsonl", lines(row)), prompt="{context} | {question} {else}").train()
    assert turns(one)[0] == "a {question} b | Q {context} {else}"
    pair = write(tmp_path, "r.jsonl", lines({"sentence1": "{sentence2}", "sentence2": "B", "label": 0}))
    assert turns(RTETask(path=pair, prompt="{sentence1}/{sentence2}").train()[0])[0] == "{sentence2}/B"
    code = write(tmp_path, "c.jsonl", lines({"old": "f(){code}", "new": "y", "comment": "in {code}"}))
    (one,) = CodeRefinementTask(path=code, prompt="{comment}: {code}").train()
    assert turns(one)[0] == "in {code}: f(){code}"


def test_the_hubs_names(monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for task in (RTETask(), MRPCTask(), SQuADTask(), GSM8KTask()):
        for part in (task.train, task.test):
            with pytest.raises(UserError, match="the hub did not give"):
                part()
    assert asked == [
        ("nyu-mll/glue", "rte", "train"), ("nyu-mll/glue", "rte", "validation"),
        ("nyu-mll/glue", "mrpc", "train"), ("nyu-mll/glue", "mrpc", "validation"),
        ("rajpurkar/squad_v2", None, "train"), ("rajpurkar/squad_v2", None, "validation"),
        ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test"),
    ]  # fmt: skip


def test_instructions_have_a_rouge(tmp_path):
    path = write(tmp_path, "a.json", [{"prompt": "a", "response": "the cat sat"}])
    task = InstructTask(path=path, test_path=path, new_tokens=8)
    assert task.score(["the cat ran"], task.test())["rouge_l"].value == pytest.approx(2 / 3)


@pytest.mark.shared
@shared
def test_real_files():
    """As many rows as their sources say, and the shares that are known of them."""
    data = SHARED / "data"
    rte = RTETask(path=str(data / "glue_rte"))
    assert (len(rte.train()), len(rte.test())) == (2490, 277)
    mrpc = MRPCTask(path=str(data / "nc/glue_mrpc"), test_path=str(data / "nc/glue_mrpc/dev.tsv"))
    assert (len(mrpc.train()), len(mrpc.test())) == (3668, 408)
    always = mrpc.score([1] * 408, mrpc.test())
    assert always["accuracy"].value == pytest.approx(0.684, abs=5e-4)  # the majority, as GLUE's papers report it
    assert always["f1"].value == pytest.approx(0.812, abs=5e-4)
    squad = SQuADTask(path=str(data / "squad_v2_dev/dev-v2.0.reconstructed.json"))
    asked = squad.train()
    assert len(asked) == 11873
    never = squad.score([""] * len(asked), asked)
    assert never["exact"].value == pytest.approx(0.5007, abs=5e-4)  # what abstaining always gets on the dev set
    assert squad.score([turns(c)[1] for c in asked], asked)["exact"].value == 1
    assert len(SQuADTask(path=str(data / "squad_v1_train/train-v1.1.subset.json")).train()) == 7687
    gsm8k = GSM8KTask(path=str(data / "gsm8k"))
    assert (len(gsm8k.train()), len(gsm8k.test())) == (7473, 1319)
    assert gsm8k.score([turns(c)[1] for c in gsm8k.test()], gsm8k.test())["exact"].value == 1
    review = str(data / "codereviewer_sample/codereviewer_sample.jsonl")
    assert [len(task(path=review).train()) for task in (ReviewNecessityTask, ReviewCommentTask)] == [297, 100]
    code = CodeRefinementTask(path=str(data / "codexglue_code_refinement_small/valid.buggy.txt"),
                              test_path=str(data / "codexglue_code_refinement_small/test.buggy.txt"))  # fmt: skip
    assert (len(code.train()), len(code.test())) == (5835, 5835)
    found = code.score([c.meta["code"] for c in code.test()], code.test())
    assert found["exact"].value == 0
    assert found["bleu4"].value == pytest.approx(0.7806, abs=5e-3)  # the naive copy of CodeXGLUE's table: BLEU 78.06
    pairs = CodeRefinementTask(path=str(data / "dact_code_review_refinement/google_test_initial_ver.txt")).train()
    assert len(pairs) > 1200
