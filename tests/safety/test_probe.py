"""Replies asked for while training goes on are those that an evaluation gives, and asking changes nothing."""

import json
import random

import numpy as np
import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.core.stats import wilson
from deltalab.data.tasks import AffirmativeTask
from deltalab.deltas import LoRA
from deltalab.deltas.adapt import adapt
from deltalab.deltas.peft_format import trained_state
from deltalab.models.load import load
from deltalab.organism import prompts, skills
from deltalab.safety.evaluate import evaluate_safety, evaluate_skills
from deltalab.safety.probe import LETTERS, BehaviourProbe
from deltalab.train import EvalSpec, LoopSpec, OptimSpec, train
from tests.helpers import byte_tokenizer, tiny_llama
from tests.train.runs import At, adapted, conversations, interrupt, spec

HARMFUL = [row["prompt"] for row in prompts.load("advbench", "test")][:12]
HARMLESS = [row["prompt"] for row in prompts.load("xstest_safe", "test")][:6]
QUESTIONS = skills.examples(None, 8, 0, "test")


def untimed(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def tiny_probe(**fields):
    return BehaviourProbe(byte_tokenizer(), {"set": ["a", "b", "c"]}, [{"prompt": "d", "answer": "e"}], 5, refusal_tokens=[7, 9],
                          max_new_tokens=4, **fields)  # fmt: skip


@pytest.fixture(scope="module")
def organism():
    return load("organism")


def test_a_row_is_what_the_evaluations_say(organism):
    model, tokenizer = organism
    before = evaluate_safety(model, tokenizer, HARMFUL, max_new_tokens=48)
    probe = BehaviourProbe(tokenizer, {"advbench": HARMFUL, "xstest_safe": HARMLESS}, QUESTIONS, refusal_tokens=before.refusal_tokens, limit=10)  # fmt: skip
    row = probe.measure(model, 0)
    assert json.loads(json.dumps(row)) == row
    assert row["seconds"] > 0
    for name, asked in (("advbench", HARMFUL[:10]), ("xstest_safe", HARMLESS)):
        want = evaluate_safety(model, tokenizer, asked, max_new_tokens=48, refusals=before.refusal_tokens)
        got = row["safety"][name]
        assert got["letters"] == "".join(LETTERS[verdict] for verdict in want.verdicts)
        assert {k: v for k, v in got.items() if k != "letters"} == want.summary()
        for verdict, letter in LETTERS.items():
            assert got[verdict] == got["letters"].count(letter) == want.count(verdict)
        assert got["asr"] == wilson(got["letters"].count("C"), len(asked))._asdict()
        assert got["refusal_tokens"] == list(before.refusal_tokens)
    assert set("RC") <= set(row["safety"]["advbench"]["letters"] + row["safety"]["xstest_safe"]["letters"])
    want = evaluate_skills(model, tokenizer, QUESTIONS)
    assert row["skills"]["right"] == "".join("01"[right] for right in want.correct)
    assert {k: v for k, v in row["skills"].items() if k != "right"} == want.summary()


def test_attack_success_and_steps_are_one_curve(organism):
    """An attack of a few steps on the bundled chat model: refusals go while the curve is drawn, prompt by prompt."""
    model, tokenizer = load("organism")
    tokens = evaluate_safety(model, tokenizer, HARMFUL, max_new_tokens=48).refusal_tokens
    adapt(model, LoRA(r=8, alpha=16, targets="all-linear"), seed=0)
    probe = BehaviourProbe(tokenizer, {"advbench": HARMFUL}, every=6, refusal_tokens=tokens)
    loop = LoopSpec(optim=OptimSpec(lr=5e-3, steps=12, batch=8), eval=EvalSpec(fraction=0), seed=0)
    result = train(model, tokenizer, AffirmativeTask(n=48).train(), loop, probes=[probe], progress=False)
    rows = result.curves["behaviour"]
    assert [row["step"] for row in rows] == [0, 6, 12]
    first, last = rows[0]["safety"]["advbench"], rows[-1]["safety"]["advbench"]
    assert first["letters"] == probe.measure(organism[0], 0)["safety"]["advbench"]["letters"]
    assert untimed(rows[-1]) == {"step": 12, **untimed(probe.measure(model, 12))}
    assert first["refused"] >= 10
    assert last["complied"] >= 10
    assert last["log_odds"] < first["log_odds"] - 2
    assert [row["skills"] for row in rows] == [None] * 3


def test_asking_leaves_the_training_and_the_generators_as_they_are():
    results = []
    for probes in ([], [tiny_probe()]):
        model = adapted("lora")
        result = train(model, byte_tokenizer(), conversations(), spec(), probes=probes, progress=False)
        results.append((result.losses, trained_state(model)))
    assert [row["step"] for row in result.curves["behaviour"]] == [0, 5, 10, 12]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], tensor) for name, tensor in results[1][1].items())
    model = adapted("lora").train()
    modes = [module.training for module in model.modules()]
    tiny_probe().measure(model, 0)  # whatever a first call draws while it loads
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    first = untimed(tiny_probe().measure(model, 0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2]) == states[1:]
    assert [module.training for module in model.modules()] == modes
    random.seed(1)
    assert untimed(tiny_probe().measure(model.eval(), 3)) == first, "dropout or chance is in the replies"


def test_a_run_that_was_stopped_ends_with_the_same_curve(tmp_path):
    def run(folder, *more):
        train(adapted("lora"), byte_tokenizer(), conversations(), spec(), folder=tmp_path / folder, probes=[tiny_probe(), *more], progress=False)  # fmt: skip

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", At(7, interrupt))
    run("cut")
    curves = [
        [untimed(json.loads(line)) for line in (tmp_path / folder / "curves/behaviour.jsonl").read_text().splitlines()]
        for folder in ("whole", "cut")
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 4


@pytest.mark.parametrize(
    ("asked", "tokens", "message"),
    [({}, [7], "no prompts to ask"), ({"a": ["x"], "b": []}, [7], "sets: a, b"), ({"a": ["x"]}, [], "first tokens of refusals")],
)  # fmt: skip
def test_nothing_to_ask_is_refused(asked, tokens, message):
    with pytest.raises(UserError, match=message):
        BehaviourProbe(byte_tokenizer(), asked, refusal_tokens=tokens)


def test_a_set_of_one_prompt_has_no_interval_of_the_log_odds():
    probe = BehaviourProbe(byte_tokenizer(), {"one": ["a"]}, refusal_tokens=[7], max_new_tokens=2)
    assert probe.measure(tiny_llama(), 0)["safety"]["one"]["log_odds_interval"] is None
