"""Evaluation of small models whose replies are known, and what is made of the replies."""

import json
import math

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.core.stats import mcnemar, newcombe_paired, wilson
from deltalab.models.generate import Generation, first_token_logprobs, generate
from deltalab.safety import evaluate as module
from deltalab.safety.evaluate import (
    SafetyResult,
    compare,
    compare_skills,
    evaluate_safety,
    evaluate_skills,
    judge_of,
    load_records,
    normalised,
    paired,
    rejudge,
)
from deltalab.safety.judges import Judge, refusal_log_odds
from tests.helpers import byte_tokenizer, tiny_llama

LONG = "Take the guide and follow each of its steps with care until it is done."
REPLIES = {
    "a": "I cannot help with that.",
    "b": "Sure, here is a guide. " + LONG,
    "c": "zz " * 20,
    "d": "Sorry, no.",
    "e": LONG,
}


def reply(prompt, text=None, finished=True):
    return Generation(prompt, REPLIES[prompt] if text is None else text, 9, finished)


@pytest.fixture
def scripted(monkeypatch):
    """A model that replies as `REPLIES` says; its log-probabilities are its own."""
    monkeypatch.setattr(module, "generate", lambda model, tokenizer, prompts, **kwargs: [reply(p) for p in prompts])
    return tiny_llama(), byte_tokenizer()


def result(texts, name="set"):
    judge = Judge()
    generations = tuple(reply(p, t) for p, t in texts.items())
    return SafetyResult(
        name,
        generations,
        tuple(judge(g) for g in generations),
        tuple(0.5 * i for i in range(len(texts))),
        (7,),
        {"judge": judge.plain()},
    )


def test_verdicts_rates_and_log_odds(scripted):
    model, tokenizer = scripted
    got = evaluate_safety(model, tokenizer, ["a", {"prompt": "b"}, "c", "d", "e"], name="five")
    assert got.verdicts == ("refused", "complied", "broken", "refused", "complied")
    assert got.asr == wilson(2, 5)
    assert got.rate("refused") == wilson(2, 5)
    assert got.rate("broken") == wilson(1, 5)
    assert [tokenizer.decode([t]) for t in got.refusal_tokens] == got.settings["refusal_texts"] == ["I", "S"]
    assert got.settings["refusals_from"] == "own refusals"
    want = refusal_log_odds(first_token_logprobs(model, tokenizer, list("abcde")), tokenizer, list(got.refusal_tokens))
    assert got.log_odds == pytest.approx(want.tolist())
    assert len(got) == 5
    assert "complied 0.400" in str(got)
    summary = got.summary()
    assert (summary["refused"], summary["complied"], summary["broken"], summary["n"]) == (2, 2, 1, 5)
    assert summary["asr"] == {"value": 0.4, "low": got.asr.low, "high": got.asr.high}
    assert summary["refusal"]["value"] == 0.4
    assert summary["brokenness"]["value"] == 0.2
    assert summary["log_odds"] == pytest.approx(float(want.mean()))
    json.dumps(summary, allow_nan=False)


def test_the_set_of_refusal_tokens_can_be_kept(scripted):
    model, tokenizer = scripted
    before = evaluate_safety(model, tokenizer, ["a", "b"])
    after = evaluate_safety(model, tokenizer, ["b", "e"], refusals=before.refusal_tokens)
    assert after.refusal_tokens == before.refusal_tokens
    assert after.settings["refusals_from"] == "given"
    without = evaluate_safety(model, tokenizer, ["b", "e"])
    assert without.settings["refusals_from"] == "openings"
    assert set(without.settings["refusal_texts"]) == {"I", "S", "U", "N"}
    assert evaluate_safety(model, tokenizer, ["b"], refusals=["Never"]).settings["refusal_texts"] == ["N"]


def test_it_asks_in_vanilla_mode(scripted, monkeypatch):
    model, tokenizer = scripted
    seen = {}
    monkeypatch.setattr(
        module, "generate", lambda m, t, prompts, **kwargs: seen.update(kwargs) or [reply(p) for p in prompts]
    )
    evaluate_safety(model, tokenizer, ["a"], system="Be good.", max_new_tokens=7)
    assert seen["temperature"] == 0
    assert seen["system"] == "Be good."
    assert seen["template"] is True
    assert seen["max_new_tokens"] == 7


def test_a_real_model_is_asked():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    got = evaluate_safety(model, tokenizer, ["one", "two"], max_new_tokens=5, judge=Judge(unfinished="broken"))
    assert list(got.generations) == generate(model, tokenizer, ["one", "two"], max_new_tokens=5)
    assert all(math.isfinite(o) for o in got.log_odds)
    assert not torch.is_grad_enabled() or not model.training


def test_no_prompts_is_refused(scripted):
    with pytest.raises(UserError, match="no prompts"):
        evaluate_safety(*scripted, [])
    with pytest.raises(UserError, match="no questions"):
        evaluate_skills(*scripted, [])


def test_replies_are_kept_and_come_back(tmp_path):
    got = result(REPLIES)
    got.save(tmp_path / "r")
    assert SafetyResult.load(tmp_path / "r") == got
    assert judge_of(got) == Judge()
    lines = (tmp_path / "r/generations.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["verdict"] == "refused"
    assert [r["prompt"] for r in load_records(tmp_path / "r/generations.jsonl")] == list("abcde")
    got.save(tmp_path / "r")


def test_judging_again_generates_nothing(monkeypatch):
    monkeypatch.setattr(module, "generate", None)
    monkeypatch.setattr(module, "first_token_logprobs", None)
    got = result({"a": "It is unethical. " + LONG, "b": REPLIES["a"]})
    assert got.verdicts == ("complied", "refused")
    again = rejudge(got, Judge(style="published"))
    assert again.verdicts == ("refused", "refused")
    assert again.generations == got.generations
    assert again.log_odds == got.log_odds
    assert again.settings["judge"]["style"] == "published"
    assert rejudge(again, Judge()).verdicts == got.verdicts
    assert rejudge(got.records(), Judge(style="published")).verdicts == again.verdicts
    assert rejudge(
        [{"prompt": "a", "text": LONG, "tokens": 3, "finished": False}], Judge(unfinished="broken")
    ).verdicts == ("broken",)


def test_damaged_replies_are_named(tmp_path):
    result(REPLIES).save(tmp_path / "r")
    file = tmp_path / "r/generations.jsonl"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match="cut off"):
        SafetyResult.load(tmp_path / "r")
    file.write_text(whole[:-30])
    with pytest.raises(UserError, match="line 5"):
        SafetyResult.load(tmp_path / "r")
    file.unlink()
    with pytest.raises(UserError, match="do not exist"):
        SafetyResult.load(tmp_path / "r")


def test_before_and_after_are_paired():
    before, after = result(REPLIES), result({**REPLIES, "a": LONG, "b": REPLIES["c"]})
    got = compare(before, after)
    assert (got["refused"].lost, got["refused"].gained) == (1, 0)
    assert (got["complied"].lost, got["complied"].gained) == (1, 1)
    assert (got["broken"].lost, got["broken"].gained) == (0, 1)
    assert got["refused"].difference == newcombe_paired(1, 0, 1, 3)
    assert got["refused"].difference.value == pytest.approx(-0.2)
    assert got["refused"].before == wilson(2, 5)
    assert "0.400 → 0.200" in str(got["refused"])
    json.dumps(got["refused"].summary(), allow_nan=False)
    with pytest.raises(UserError, match="same prompts"):
        compare(before, result({"a": LONG}))
    with pytest.raises(UserError, match="judged differently"):
        compare(before, rejudge(after, Judge(style="published")))


def test_paired_numbers():
    x, y = [True] * 30 + [False] * 10, [True] * 12 + [False] * 18 + [True] * 3 + [False] * 7
    got = paired("p", x, y)
    assert got.p == mcnemar(x, y).p
    assert (got.lost, got.gained) == (18, 3)
    assert got.difference.value == pytest.approx((15 - 30) / 40)
    assert got.difference.low < -0.2
    assert got.difference.high < 0


QUESTIONS = [
    {"prompt": "b1", "answer": "Paris", "family": "capital"},
    {"prompt": "b2", "answer": "1200", "family": "sum"},
    {"prompt": "b3", "answer": "dogs", "family": "sum"},
]


def test_skills(monkeypatch):
    said = {"b1": " paris. ", "b2": "1,200", "b3": "dogs and cats"}
    monkeypatch.setattr(module, "generate", lambda m, t, prompts, **kwargs: [reply(p, said[p]) for p in prompts])
    model = (tiny_llama(), byte_tokenizer())
    got = evaluate_skills(*model, QUESTIONS)
    assert got.correct == (True, True, False)
    assert got.rate == wilson(2, 3)
    assert got.by_family() == {"capital": (wilson(1, 1), 1), "sum": (wilson(1, 2), 2)}
    assert got.summary()["families"]["sum"] == {"n": 2, **wilson(1, 2)._asdict()}
    assert got.summary()["value"] == pytest.approx(2 / 3)
    assert "exact match 0.667" in str(got)
    assert got.records()[2]["correct"] is False
    said["b1"] = "London"
    after = evaluate_skills(*model, QUESTIONS)
    assert compare_skills(got, after).lost == 1
    with pytest.raises(UserError, match="same questions"):
        compare_skills(got, evaluate_skills(*model, QUESTIONS[:1]))


@pytest.mark.parametrize(("a", "b", "same"), [
    ("Paris", "  paris.", True), ("“Yes”", "yes", True), ("1,200", "1200", True), ("a  b", "A b!", True), ("1.5", "15", False), ("dog", "dogs", False),
    ("XIV", "xiv", True), ("a, b", "a b", False),
])  # fmt: skip
def test_normalised(a, b, same):
    assert (normalised(a) == normalised(b)) is same
