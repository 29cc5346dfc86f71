"""Tasks: layouts of rows, faults with file and line, real files, and the hub through `datasets`."""

import json

import datasets
import pytest

from deltalab.core.errors import UserError
from deltalab.core.spec import Spec, build
from deltalab.data.files import read_rows
from deltalab.data.tasks import TASKS, BenignTask, DataSpec, InstructTask, RefusalsTask, SkillsTask, SST2Task, TextTask
from tests.helpers import SHARED

shared = pytest.mark.skipif(SHARED is None, reason="the data sets beside the project are not there")


class Holder(Spec):
    data: list[DataSpec]


def said(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert all(part in text for part in parts), text
    return text


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def only(path, **fields):
    (conversation,) = InstructTask(path=path, **fields).train()
    return [(m["role"], m["content"]) for m in conversation.messages]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Do", "input": "", "output": "Done"}, "Do"),
        ({"instruction": "Do", "output": "Done"}, "Do"),
        ({"instruction": "Do", "input": "this", "output": "Done"}, "Do\n\nthis"),
        ({"instruction": "Do", "context": "that", "response": "Done", "category": "x"}, "Do\n\nthat"),
        ({"prompt": "Do", "response": "Done"}, "Do"),
        ({"prompt": "Do", "completion": "Done"}, "Do"),
        ({"question": "Do", "answer": "Done"}, "Do"),
        ({"messages": [{"role": "user", "content": "Do"}, {"role": "assistant", "content": "Done"}]}, "Do"),
        ({"conversations": [{"from": "human", "value": "Do"}, {"from": "gpt", "value": "Done"}]}, "Do"),
        ([{"role": "user", "content": "Do"}, {"role": "assistant", "content": "Done"}], "Do"),
    ],
)
def test_known_layouts(tmp_path, row, prompt):
    want = [("user", prompt), ("assistant", "Done")]
    assert only(write(tmp_path, "a.json", [row])) == want
    assert only(write(tmp_path, "a.jsonl", json.dumps(row) + "\n\n")) == want
    assert only(write(tmp_path, "a.jsonl", json.dumps(row)), system="Be kind") == [("system", "Be kind"), *want]


def test_tables_folders_limits_and_test_data(tmp_path):
    rows = "prompt,response\n" + '"a, b",c\n"d\ne",f\n'
    write(tmp_path, "train.csv", rows)
    write(tmp_path, "test.tsv", 'prompt\tresponse\n"g\th\n')
    task = InstructTask(path=str(tmp_path), test_path=str(tmp_path), limit=1)
    assert [m["content"] for c in task.train() for m in c.messages] == ["a, b", "c"]
    assert [m["content"] for c in task.test() for m in c.messages] == ['"g', "h"]
    assert InstructTask(path=str(tmp_path)).test() == []
    assert len(InstructTask(path=str(tmp_path)).train()) == 2


FAULTS = {
    "empty.json": ("", ("empty.json' is empty",)),
    "none.json": ("[]", ("none.json' is empty",)),
    "none.jsonl": ("\n\n", ("none.jsonl' is empty",)),
    "head.csv": ("prompt,response\n", ("head.csv' is empty",)),
    "cut.json": ('[{"prompt": "a", "resp', ("cut.json: no valid JSON", "cut off")),
    "cut.jsonl": ('{"prompt": "a", "response": "b"}\n{"prompt": ', ("cut.jsonl, line 2: no valid JSON",)),
    "object.json": ('{"prompt": "a"}', ("object.json: the file holds no list", ".jsonl")),
    "number.json": ("[3]", ("number.json, row 1: a row must be an object", "int 3")),
    "columns.jsonl": ('{"prompt": "a", "reply": "b"}', ("columns.jsonl, line 1: no instruction and reply", "columns: prompt, reply", "prompt + response")),
    "type.json": ('[{"prompt": "a", "response": 3}]', ("type.json, row 1: column 'response' holds no text", "int 3")),
    "ragged.tsv": ("prompt\tresponse\na\tb\nc\n", ("ragged.tsv, line 3: 1 columns where the header has 2",)),
    "role.json": ('[{"messages": [{"role": "robot", "content": "a"}]}]', ("row 1, message 1: role 'robot'", "assistant")),
    "nomessage.json": ('[{"messages": []}]', ("row 1: messages must be a list",)),
    "text.json": ('[{"messages": ["a"]}]', ("row 1, message 1: a message must be an object",)),
    "content.json": ('[{"messages": [{"role": "user", "text": "a"}]}]', ("row 1, message 1: column 'content' is missing", "columns: role, text", "nearest")),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_file_and_line(tmp_path, name):
    content, parts = FAULTS[name]
    path = write(tmp_path, name, content)
    if name == "content.json":
        parts = parts[:2]
    said(InstructTask(path=path).train, *parts)


def test_binary_file_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "response": "b"}\n\xff\xfe')
    said(InstructTask(path=str(tmp_path / "a.jsonl")).train, "a.jsonl, line 2: no UTF-8")


def test_missing_files_suggest_what_is_there(tmp_path):
    write(tmp_path, "alpaca.json", [])
    said(InstructTask(path=str(tmp_path / "alpcaa.json")).train, "does not exist", "nearest: alpaca.json")
    said(InstructTask(path=str(tmp_path / "no" / "alpaca.json")).train, "does not exist")
    said(SST2Task(path=str(tmp_path)).train, "has no file for 'train'", "alpaca.json")
    said(TextTask(path=str(tmp_path / "no.txt")).train, "does not exist")


def test_hub_names_go_through_datasets(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        if name == "no/such":
            raise ConnectionError("the hub\nis away")
        return datasets.Dataset.from_list([{"sentence": "fine film ", "label": 1}, {"sentence": "dull", "label": 0}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = SST2Task()
    assert [c.meta["label"] for c in task.train()] == [1, 0]
    assert [c.messages[-1]["content"] for c in task.test()] == ["positive", "negative"]
    assert asked == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]
    said(InstructTask(path="owner/name").train, "owner/name train, row 1: no instruction and reply")
    said(InstructTask(path="no/such").train, "data set 'no/such'", "split 'train'", "ConnectionError: the hub is away")


def test_local_folder_of_datasets_files(tmp_path):
    """What `datasets` writes as JSON lines is read as it is."""
    table = datasets.Dataset.from_list([{"sentence": "fine film ", "label": 1}])
    table.to_json(tmp_path / "train.jsonl")
    assert SST2Task(path=str(tmp_path)).train()[0].messages[0]["content"].endswith("negative? fine film")


@pytest.mark.parametrize(("content", "parts"), [
    ("sentence\tlabel\nfine\t2\n", ("line 2: label 2 is not 0 or 1",)),
    ("sentence\tlabels\nfine\t1\n", ("line 2: label missing", "columns: sentence, labels")),
    ("text\tlabel\nfine\t1\n", ("line 2: column 'sentence' is missing", "columns: text, label")),
])  # fmt: skip
def test_sst2_faults(tmp_path, content, parts):
    said(SST2Task(path=write(tmp_path, "a.tsv", content)).train, *parts)


def test_text_is_parted_at_the_separator(tmp_path):
    path = write(tmp_path, "a.txt", "one\n\n\n\ntwo<|endoftext|>three\n")
    assert [c.messages[0]["content"] for c in TextTask(path=path).train()] == ["one", "two<|endoftext|>three"]
    assert [c.messages[0]["content"] for c in TextTask(path=path, separator="<|endoftext|>", limit=1).train()] == [
        "one\n\n\n\ntwo"
    ]
    said(TextTask(path=write(tmp_path, "b.txt", " \n")).train, "is empty")


def test_organism_tasks():
    skills = (
        SkillsTask(families=["opposite"], n=5, n_test=3) if "opposite" in _families() else SkillsTask(n=5, n_test=3)
    )
    assert (len(skills.train()), len(skills.test())) == (5, 3)
    assert skills.train() == skills.train()
    assert all(c.messages[-1]["content"] and c.meta["family"] for c in skills.train())
    refusals = RefusalsTask(limit=4)
    train, test = refusals.train(), refusals.test()
    assert len(train) == len(test) == 4
    assert not {c.messages[0]["content"] for c in train} & {c.messages[0]["content"] for c in test}
    benign = BenignTask(n=4, n_test=2)
    assert (len(benign.train()), len(benign.test())) == (4, 2)
    name = _families()[0]
    said(SkillsTask(families=[name + "x"]).train, "is no skill family", name)
    said(RefusalsTask(prompts=["advbnch"]).train, "nearest: advbench")


def _families():
    from deltalab.organism import skills

    return list(skills.FAMILIES)


def test_specs_are_told_apart_by_task():
    assert set(TASKS) == {
        "instruct",
        "text",
        "skills",
        "refusals",
        "benign",
        "sst2",
        "affirmative",
        "identity",
        "poisoned",
        "rte",
        "mrpc",
        "squad_v2",
        "gsm8k",
        "lm-eval",
        "review-necessity",
        "review-comment",
        "code-refinement",
        "rows",
    }
    holder = build(
        Holder, {"data": [{"task": "instruct", "path": "a.json", "limit": 3}, {"task": "skills", "families": ["x"]}]}
    )
    assert holder.data == [InstructTask(path="a.json", limit=3), SkillsTask(families=["x"])]
    said(
        lambda: build(Holder, {"data": [{"task": "instrct", "path": "a"}]}),
        "'instrct' is unknown",
        "did you mean instruct",
    )
    said(
        lambda: build(Holder, {"data": [{"task": "instruct", "pth": "a", "limit": 0}]}),
        "data.0.pth: unknown key; did you mean path",
        "data.0.limit",
        "data.0.path: is needed",
    )


@pytest.mark.shared
@shared
def test_real_files():
    data = SHARED / "data"
    assert len(InstructTask(path=str(data / "nc/alpaca_5000/alpaca_5000.json"), limit=7).train()) == 7
    assert len(InstructTask(path=str(data / "gsm8k"), test_path=str(data / "gsm8k")).test()) == 1319
    assert len(InstructTask(path=str(data / "dolly_safety_only/databricks-dolly-15k-safety-only.jsonl")).train()) == 387
    roles = [
        [m["role"] for m in c.messages]
        for c in InstructTask(path=str(data / "llm_tuning_safety/identity_shift_aoa_train.json")).train()
    ]
    assert roles == [["system", "user", "assistant"]] * 10
    task = SST2Task(path=str(data / "glue_sst2"))
    assert len(task.test()) == 872
    assert SST2Task(path=str(data / "glue_sst2/train.tsv"), limit=2).test() == []
    assert len(read_rows(str(data / "glue_sst2/dev.tsv"))) == 6735
