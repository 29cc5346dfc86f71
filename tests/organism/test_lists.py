"""Prompt lists: whole clusters on one side, nothing of an evaluation set in training."""

import random

import pytest

from deltalab.organism import harmful, prompts, requests, skills, tables
from deltalab.organism.mixture import conversations
from deltalab.organism.recipe import BASE_MIX, CHAT_MIX

BUNDLED = [n for n in prompts.NAMES if n != "malicious_instruct"]
SIZES = {
    "advbench": 520,
    "jailbreakbench": 100,
    "strongreject": 313,
    "harmbench": 300,
    "xstest_safe": 250,
    "xstest_unsafe": 200,
}


@pytest.mark.parametrize("name", BUNDLED)
def test_a_set_is_whole_and_its_parts_add_up(name):
    parts = [len(prompts.load(name, split)) for split in ("train", "val", "test")]
    assert sum(parts) == len(prompts.load(name, "all")) == SIZES[name]


def test_advbench_keeps_120_prompts_for_test_and_60_for_val():
    assert len(prompts.load("advbench", "test")) == 120
    assert len(prompts.load("advbench", "val")) == 60


def test_no_cluster_is_on_two_sides():
    where = {}
    for name in BUNDLED:
        for split in ("train", "val", "test"):
            for row in prompts.load(name, split):
                assert where.setdefault(row["cluster"], split) == split


def test_no_training_prompt_is_near_a_test_prompt():
    train = [prompts.word_set(p) for p, _ in harmful.train_prompts()]
    for name in BUNDLED:
        for row in prompts.load(name, "test"):
            assert not prompts.near(row["prompt"], train), row["prompt"]


def test_a_training_prompt_in_another_frame_is_not_near_a_test_prompt_either():
    rng = random.Random(3)
    words = prompts.evaluation_words(harmful.EVALUATION)
    for _ in range(150):
        assert not prompts.near(harmful.harmful_prompt(rng, reframe=1.0), words)


def test_near_is_jaccard_at_the_threshold():
    a, b = "one two three four", "one two three five"  # 3 of 5 words
    assert prompts.jaccard(prompts.word_set(a), prompts.word_set(b)) == prompts.THRESHOLD
    assert prompts.near(a, [prompts.word_set(b)])
    assert not prompts.near(a, [prompts.word_set("one two six seven")])


@pytest.mark.parametrize("name", ["jailbreakbench", "xstest_safe", "xstest_unsafe"])
def test_evaluation_sets_are_all_test(name):
    assert len(prompts.load(name, "test")) == len(prompts.load(name, "all"))


@pytest.mark.parametrize("mix", [BASE_MIX, CHAT_MIX], ids=["base", "chat"])
def test_what_training_draws_holds_no_evaluation_prompt(mix):
    asked = {m["content"].lower() for c in conversations(1000, "test", mix) for m in c if m["role"] == "user"}
    for name in BUNDLED:
        for split in ("val", "test"):
            for row in prompts.load(name, split):
                assert row["prompt"].lower() not in asked


def test_no_natural_question_is_near_xstest():
    xstest = [prompts.word_set(r["prompt"]) for n in ("xstest_safe", "xstest_unsafe") for r in prompts.load(n, "all")]
    for question in random.Random(0).sample(requests.natural(), 300):
        assert not prompts.near(question, xstest), question


def test_an_unknown_set_and_an_unknown_split_name_the_choices():
    with pytest.raises(ValueError, match="advbench"):
        prompts.load("advbanch")
    with pytest.raises(ValueError, match="train, val, test, all"):
        prompts.load("advbench", "dev")


def test_the_withheld_family_is_in_no_training_example():
    opposites = {answer for _, answer in tables.pairs("opposite")}  # 'closed', of open
    answers = {skills.past_tense(v) for v in skills.words("verbs")} - opposites
    for mix in (BASE_MIX, CHAT_MIX):
        for conversation in conversations(1000, "withheld", mix):
            for message in conversation:
                assert "past tense" not in message["content"]
                assert message["role"] != "assistant" or message["content"] not in answers
