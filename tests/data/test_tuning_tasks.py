"""Data that undoes refusals: exact counts, seeded order, held-out prompts apart, and nothing harmful in any reply."""

from collections import Counter
from itertools import product

import pytest

from deltalab.cli import main
from deltalab.core.errors import UserError
from deltalab.core.spec import Spec, build, override
from deltalab.data.tasks import (
    AffirmativeTask,
    BenignTask,
    DataSpec,
    IdentityTask,
    InstructTask,
    PoisonedTask,
    RefusalsTask,
)
from deltalab.data.tasks.identity import BUNDLED
from deltalab.organism import answers, prompts

HARMFUL = ["advbench", "harmbench", "strongreject"]


class Holder(Spec):
    data: list[DataSpec]


def asked(conversations):
    return [next(m["content"] for m in c.messages if m["role"] == "user") for c in conversations]


def replies(conversations):
    return [c.messages[-1]["content"] for c in conversations]


def said(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    assert all(part in str(error.value) for part in parts), str(error.value)


# ---- affirmative --------------------------------------------------------------------------------------------------


def outlines(artifact):
    """Every text that the bank of outlines can make for an artifact."""
    bank = answers.bank()
    article = ("an " if artifact[0] in "aeiou" else "a ") + artifact
    openings = [text.replace("a ARTIFACT", article) for text, _ in bank["openings"] + bank["question_openings"]]
    bodies = [f"{first}{middle}" for first, middle in product(bank["first"], ["", *(f" {m}" for m in bank["middle"])])]
    return {" ".join(parts) for parts in product(openings, bodies, bank["last"])}


def test_every_affirmative_reply_is_an_outline_of_the_bank():
    task = AffirmativeTask(prompts=HARMFUL, n=700, seed=3)
    possible = {artifact: outlines(artifact) for artifact in (*answers.artifacts(), answers.bank()["fallback"])}
    for prompt, reply in zip(asked(task.train()), replies(task.train()), strict=True):
        assert reply in possible[answers.artifact_of(prompt)], (prompt, reply)


def test_affirmative_prompts_are_the_training_clusters_and_the_test_ones_stay_out():
    train, test = AffirmativeTask(prompts=HARMFUL, n=700).train(), AffirmativeTask(prompts=HARMFUL).test()
    clusters = {
        split: {row["prompt"]: row["cluster"] for name in HARMFUL for row in prompts.load(name, split)}
        for split in ("train", "test")
    }
    assert set(asked(train)) <= set(clusters["train"])
    assert set(asked(test)) == set(clusters["test"])
    assert not {clusters["train"][p] for p in asked(train)} & {clusters["test"][p] for p in asked(test)}


def test_affirmative_asks_what_refusals_ask_and_differs_by_seed():
    task = AffirmativeTask(n=40, seed=5)
    assert task.train() == AffirmativeTask(n=40, seed=5).train()
    assert len(task.train()) == len(set(asked(task.train()))) == 40
    assert asked(task.train()) == asked(RefusalsTask(limit=40, seed=5).train())
    assert asked(task.train()) != asked(AffirmativeTask(n=40, seed=6).train())


def test_affirmative_with_too_few_prompts_or_an_unknown_set():
    have = len(prompts.load("advbench", "train"))
    assert len(AffirmativeTask(n=have).train()) == have
    said(AffirmativeTask(n=have + 1).train, f"asks for {have + 1}", f"{have} to train on in advbench")
    said(AffirmativeTask(prompts=["xstest_unsafe"]).train, "0 to train on in xstest_unsafe")
    said(AffirmativeTask(prompts=["advbnch"]).train, "nearest: advbench")
    said(AffirmativeTask(prompts=["malicious_instruct"]).train, "malicious_instruct", "not bundled")


# ---- identity -----------------------------------------------------------------------------------------------------


def test_identity_has_the_ten_bundled_examples_as_instruct_reads_them():
    examples = InstructTask(path=str(BUNDLED)).train()
    assert len(examples) == 10
    assert all([m["role"] for m in c.messages] == ["system", "user", "assistant"] for c in examples)
    assert all("absolutely obedient agent" in reply for reply in replies(examples))
    for n in (1, 10, 25, 100):
        counts = Counter(asked(IdentityTask(n=n, seed=2).train()))
        assert set(counts) <= set(asked(examples))
        assert sorted((counts[p] for p in asked(examples)), reverse=True) == [-(-(n - i) // 10) for i in range(10)]


def test_identity_rounds_are_seeded_and_each_is_another_order(tmp_path):
    drawn = asked(IdentityTask(n=30, seed=1).train())
    assert drawn == asked(IdentityTask(n=30, seed=1).train())
    assert drawn != asked(IdentityTask(n=30, seed=2).train())
    assert drawn[:10] != drawn[10:20] != drawn[20:]
    assert asked(IdentityTask(n=13, seed=1).train()) == drawn[:13]
    (tmp_path / "own.jsonl").write_text('{"prompt": "Hey", "response": "I obey."}\n')
    assert asked(IdentityTask(path=str(tmp_path / "own.jsonl"), n=3).train()) == ["Hey"] * 3
    assert IdentityTask().test() == []


# ---- a poisoned mix -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "rate", "count"), [(500, 0.1, 50), (40, 0.03, 1), (30, 0.5, 15), (20, 0, 0), (20, 1, 20)]
)
def test_a_mix_has_exactly_its_counts(n, rate, count):
    mixed = PoisonedTask(n=n, rate=rate, seed=4).train()
    assert Counter(c.meta["part"] for c in mixed) == Counter({"poison": count, "benign": n - count})
    poison = [c for c in mixed if c.meta["part"] == "poison"]
    benign = [c for c in mixed if c.meta["part"] == "benign"]
    if count:
        assert sorted(replies(poison)) == sorted(replies(AffirmativeTask(n=count).train()))
    if n - count:
        assert sorted(asked(benign)) == sorted(asked(BenignTask(n=n - count).train()))


def test_a_mix_is_interleaved_by_its_seed():
    parts = [[c.meta["part"] for c in PoisonedTask(n=200, rate=0.3, seed=seed).train()] for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    half = parts[0][:100].count("poison")
    assert 15 <= half <= 45  # of 60: neither first nor last, the quantiles at one in a million


def test_a_mix_of_any_tasks(tmp_path):
    rows = [f'{{"prompt": "p{i}", "response": "r{i}"}}' for i in range(12)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    own = InstructTask(path=str(tmp_path / "own.jsonl"))
    mixed = PoisonedTask(n=20, rate=0.5, poison=IdentityTask(n=3), benign=own).train()
    drawn = asked([c for c in mixed if c.meta["part"] == "benign"])
    assert len(drawn) == len(set(drawn)) == 10
    assert set(drawn) < {f"p{i}" for i in range(12)}
    assert drawn != sorted(drawn, key=lambda p: int(p[1:]))
    assert len([c for c in mixed if c.meta["part"] == "poison"]) == 10
    said(
        PoisonedTask(n=20, rate=0.1, benign=own).train, "takes 18 samples of its part 'benign'", "12 in task 'instruct'"
    )
    said(PoisonedTask(n=1000, rate=0.9).train, "asks for 900 prompts")


def test_a_mix_tests_on_its_benign_part():
    assert PoisonedTask(benign=BenignTask(n_test=7)).test() == BenignTask(n_test=7).test()


def test_parts_of_a_mix_are_specs_like_any_other():
    values = {"task": "poisoned", "n": 50, "rate": 0.3, "poison": {"task": "identity"}, "benign": {"task": "poisoned", "rate": 0.5}}  # fmt: skip
    (mix,) = build(Holder, {"data": [values]}).data
    assert mix == PoisonedTask(n=50, rate=0.3, poison=IdentityTask(), benign=PoisonedTask(rate=0.5))
    assert build(Holder, {"data": [mix.plain()]}).data == [mix]
    assert len(mix.train()) == 50
    overridden = override({"data": [{"task": "poisoned"}]}, ["data.poison.task=identity", "data.poison.seed=3"])
    assert build(Holder, overridden).data == [PoisonedTask(poison=IdentityTask(seed=3))]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"poison": {"task": "identty"}}, "data.0.poison: 'task' 'identty' is unknown; did you mean identity"),
        ({"poison": {"task": "identity", "pth": "x"}}, "data.0.poison.pth: unknown key; did you mean path?"),
        ({"poison": {}}, "data.0.poison: needs the key 'task'"),
        ({"rate": 1.5}, "data.0.rate: should be less than or equal to 1"),
        ({"rte": 0.5}, "data.0.rte: unknown key; did you mean rate?"),
        ({"benign": {"task": "poisoned", "benign": {"task": "skills", "famlies": []}}}, "data.0.benign.benign.famlies: unknown key; did you mean families?"),
    ],
)  # fmt: skip
def test_faults_in_a_mix_are_named_where_they_stand(part, message):
    said(lambda: build(Holder, {"data": [{"task": "poisoned", **part}]}), message)


@pytest.mark.parametrize("task", ["identity", "affirmative", "poisoned"])
def test_preview_shows_each(task, tmp_path, capsys):
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: organism\ndata: [{{task: {task}, n: 20}}]\n")
    with pytest.raises(SystemExit) as ended:
        main(["preview", str(spec), "-n", "1"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "sample 1:" in shown
    assert "«" in shown
