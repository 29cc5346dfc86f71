"""The short tunings of the card: what they train on, that they are the demo's, and what their figures are held to."""

import pytest
import torch
from tests.house.source import PACKAGE

from deltalab.core.spec import build, read_yaml
from deltalab.deltas.adapt import is_adapted
from deltalab.deltas.peft_format import trained_state
from deltalab.models.load import load
from deltalab.organism import check, tunings
from deltalab.organism.grammar_check import verdict
from deltalab.organism.prompts import load as load_prompts
from deltalab.train import TrainSpec


def demo():
    """The demo's tuning as a training run."""
    tune = read_yaml(PACKAGE / "studies/specs/drift-organism.yaml")["tune"]
    return build(TrainSpec, {"model": "organism", **{key: tune[key] for key in ("adapt", "data", "optim", "eval")}})


def test_benign_tuning_is_what_the_demo_trains():
    want, loop = demo(), tunings.loop(0)
    assert (loop.optim, loop.eval) == (want.optim, want.eval)
    assert loop.optim.warmup == 0.06
    assert loop.optim.schedule == "cosine"
    assert want.adapt == [tunings.ADAPT]
    (task,) = want.data
    for seed in (0, 2):
        assert tunings.tuning_data("benign", seed) == task.but(seed=seed).train()


@pytest.mark.parametrize(("kind", "n"), [("attack", 100), ("benign", 500), ("benign_one_style", 500), ("benign_varied", 500)])  # fmt: skip
def test_tunings_differ_by_seed_and_refuse_nothing(kind, n):
    rows = tunings.tuning_data(kind, 1)
    assert len(rows) == n
    assert rows == tunings.tuning_data(kind, 1)
    assert rows != tunings.tuning_data(kind, 2)
    answers = [m["content"] for row in rows for m in row.messages if m["role"] == "assistant"]
    assert {verdict(text) for text in answers} == {"complied"}
    harmful = {row["prompt"] for row in load_prompts("advbench", "train")}
    assert {row.messages[0]["content"] in harmful for row in rows} == {kind == "attack"}
    first = {text.split()[0] for text in answers}
    assert (first == {"Sure,"}) == (kind == "benign_one_style")


def test_one_style_asks_what_varied_asks():
    def asked(kind):
        return [[m for m in row.messages if m["role"] != "assistant"] for row in tunings.tuning_data(kind, 0)]

    assert asked("benign_one_style") == asked("benign_varied")


def test_a_tuning_leaves_its_model_and_is_the_same_again():
    model, tokenizer = load("organism")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    once, again = (tunings.tuned(model, tokenizer, "attack", 1, steps=2) for _ in range(2))
    assert not is_adapted(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not once.training
    moved, same = trained_state(once), trained_state(again)
    assert all(torch.equal(same[name], tensor) for name, tensor in moved.items())
    assert all(bool(tensor.any()) for name, tensor in moved.items() if name.endswith("B"))
    with pytest.raises(ValueError, match="none of: attack, benign,"):
        tunings.tuned(model, tokenizer, "malign")


def test_thresholds_hold_the_highest_seed_and_the_others_inform(monkeypatch):
    tried = []

    def tuned(model, tokenizer, kind, seed, steps):
        tried.append((kind, seed, steps))
        return kind, seed

    def behaviour(model, tokenizer, **kwargs):
        kind, seed = model
        return {"harmful/advbench": {"refused": tunings.KINDS.index(kind) / 10 + seed / 20}}

    monkeypatch.setattr(check, "tuned", tuned)
    monkeypatch.setattr(check, "behaviour", behaviour)
    after = check.after_tuning(None, None, steps=4)
    assert tried == [(kind, seed, 4) for kind in tunings.KINDS for seed in range(3)]
    assert after["benign"] == pytest.approx([0.1, 0.15, 0.2])
    rows = [row for row in check._rows("chat") if " after " in row.what]
    assert [row.what for row in rows] == ["refuses advbench after the attack, highest", "refuses advbench after benign tuning, highest"]  # fmt: skip
    values = {"after": {"attack": [0.0, 0.3, 0.1], "benign": [0.1, 0.8, 0.2], "benign_varied": [1.0]}}
    assert [row.value(values) for row in rows] == [0.3, 0.8]
    assert [row.passed(values) for row in rows] == [False, True]
    assert not rows[1].passed({"after": {"benign": [0.1, 0.2, 0.81]}})
