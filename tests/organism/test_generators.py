"""Questions, requests and answers: seeded, checkable, split by item and by frame."""

import subprocess
import sys

import pytest

from deltalab.organism import requests, skills, twins
from deltalab.organism.answers import affirmative, artifact_of, refusal
from deltalab.organism.grammar_check import verdict
from deltalab.organism.prompts import load


@pytest.mark.parametrize("make", [requests.benign, requests.twins], ids=["benign", "twins"])
def test_the_same_seed_gives_the_same_requests(make):
    assert make(50, 3, "train") == make(50, 3, "train")
    assert make(50, 3, "train") != make(50, 4, "train")


def test_the_same_seed_gives_the_same_questions():
    assert skills.examples(None, 60, 5, "test") == skills.examples(None, 60, 5, "test")


def test_benign_requests_are_varied():
    asked = {r["prompt"] for r in requests.benign(2000, 0, "train")}
    assert len(asked) > 1900


@pytest.mark.parametrize("name", skills.TRAINED)
def test_a_family_tests_what_it_does_not_train(name):
    train = {r["prompt"] for r in skills.examples([name], 1500, 0, "train")}
    test = {r["prompt"] for r in skills.examples([name], 100, 0, "test")}
    assert not train & test


def test_there_are_enough_families_and_one_is_withheld():
    assert len(skills.TRAINED) >= 12
    assert skills.WITHHELD in skills.FAMILIES
    assert skills.WITHHELD not in skills.TRAINED


@pytest.mark.parametrize(
    ("verb", "past"),
    [("walk", "walked"), ("love", "loved"), ("carry", "carried"), ("play", "played"), ("stop", "stopped")],
)
def test_past_tense(verb, past):
    assert skills.past_tense(verb) == past


def test_withheld_verbs_are_split():
    train, test = skills.past_tense_verbs("train"), skills.past_tense_verbs("test")
    assert not set(train) & set(test)
    assert len(train) > 60
    assert len(test) > 20


def test_twins_of_the_two_splits_share_no_request():
    train = {r["prompt"] for r in requests.twins(800, 0, "train")}
    test = {r["prompt"] for r in requests.twins(200, 0, "test")}
    assert not train & test


def test_no_twin_is_near_an_xstest_prompt():
    assert not any(twins.near_evaluation(r["prompt"]) for r in requests.twins(300, 7, "test"))
    assert twins.near_evaluation(load("xstest_safe", "test")[0]["prompt"])


@pytest.mark.parametrize(
    ("phrase", "gerund"),
    [
        ("bake bread", "baking bread"),
        ("run", "running"),
        ("open a box", "opening a box"),
        ("clean", "cleaning"),
        ("see it", "seeing it"),
    ],
)
def test_gerund(phrase, gerund):
    assert requests.gerund(phrase) == gerund


def test_outlines_name_the_artifact_and_pass_the_grammar_check():
    assert artifact_of("Write a short story about a fox") == "story"
    for i, row in enumerate(load("advbench", "train")[:60]):
        assert verdict(affirmative(row["prompt"], i)) == "complied"
        assert verdict(refusal(row["prompt"], i)) == "refused"


def test_refusals_begin_in_several_ways():
    first = {refusal("x", i).split()[0] for i in range(200)}
    assert len(first) >= 6


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("", "broken"),
        ("lamp lamp lamp lamp", "broken"),
        ("I cannot help with that request. First, set a clear goal.", "broken"),
        ("Sure, here is a plam. First, set a clear gaol. Finally, check the result.", "complied"),
        ("Paris", "complied"),
        ("I cannot help with that request", "refused"),
    ],
)
def test_the_grammar_check_tells_three_cases_apart(reply, expected):
    assert verdict(reply) == expected


@pytest.mark.parametrize("module", ["paths", "skills", "requests", "prompts"])
def test_the_light_modules_do_not_import_torch(module):
    code = f"import sys, deltalab.organism.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
