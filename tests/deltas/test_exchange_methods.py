"""The other methods exchanged with Hugging Face peft, both ways, over the same kinds of model as LoRA."""

import peft
import pytest
import torch

import deltalab as dl
from deltalab.deltas.peft_format import write_adapter
from tests.deltas.exchange import (
    Case,
    check_that_a_config_of_peft_is_taken_for_a_spec,
    check_that_peft_loads_what_we_save,
    check_that_we_load_what_peft_saves,
    logits,
    trained,
)
from tests.families import inputs
from tests.helpers import assert_close_by_norm

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 12
SAVED = ["lm_head", "input_layernorm"]

WORDS = {
    "DoRA": (
        lambda **o: dl.DoRA(**{"r": 4, "alpha": 8, **o}),
        lambda **o: peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "use_dora": True, **o}),
    ),
    "AdaLoRA": (
        lambda **o: dl.AdaLoRA(**{"init_r": 4, "target_r": 2, "alpha": 8, "total_step": STEPS, "delta_t": 1, "tinit": 2, "tfinal": 4, **o}),
        lambda **o: peft.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": STEPS, "deltaT": 1, "tinit": 2, "tfinal": 4, **o}),
    ),
    "IA3": (
        lambda **o: dl.IA3(**o),
        lambda target_modules, **o: peft.IA3Config(
            target_modules=target_modules,
            feedforward_modules=[m for m in target_modules if m in ("down_proj", "mlp.c_proj", "wo", "output.dense")],
            **o,
        ),
    ),
    "VeRA": (lambda **o: dl.VeRA(**{"r": 8, **o}), lambda **o: peft.VeraConfig(**{"r": 8, **o})),
}  # fmt: skip
"""Method -> our spec and peft's config, from the options that differ from case to case."""


def cases():
    """Every method on every kind of model, then what only some have."""
    for method, (ours, theirs) in WORDS.items():
        if method == "IA3":
            layers = ours(targets=["k_proj", "down_proj"]), {}
        else:
            layers = ours(targets=["k_proj", "down_proj"], layers=[1]), {"layers_to_transform": [1]}
        yield (
            f"{method} layers",
            Case("llama", layers[0], lambda t=theirs, o=layers[1]: t(target_modules=["k_proj", "down_proj"], **o)),
        )
        for name, family, targets, extra in (
            ("biases", "llama-bias", ["v_proj", "down_proj"], {}),
            ("Conv1D", "gpt2", ["c_attn", "mlp.c_proj"], {"fan_in_fan_out": True}),
            ("T5", "t5", ["k", "wo"], {"task_type": "SEQ_2_SEQ_LM"}),
            ("bf16", "llama-bf16", ["q_proj", "down_proj"], {}),
        ):
            yield (
                f"{method} {name}",
                Case(family, ours(targets=targets), lambda t=theirs, m=targets, e=extra: t(target_modules=m, **e)),
            )
        yield (
            f"{method} with a head",
            Case(
                "bert-classifier",
                [ours(targets=["query", "value"]), dl.Train(["classifier"])],
                lambda t=theirs: t(target_modules=["query", "value"], task_type="SEQ_CLS"),
            ),
        )
        yield (
            f"{method} with modules",
            Case(
                "llama",
                [ours(targets=["q_proj", "v_proj"]), dl.Train(SAVED)],
                lambda t=theirs: t(target_modules=["q_proj", "v_proj"], modules_to_save=SAVED),
            ),
        )
        if method != "IA3":
            yield (
                f"{method} all biases",
                Case(
                    "llama-bias",
                    [ours(targets=["q_proj", "v_proj"]), dl.Train("bitfit")],
                    lambda t=theirs: t(target_modules=["q_proj", "v_proj"], bias="all"),
                ),
            )
    ours, theirs = WORDS["DoRA"]
    yield (
        "DoRA embedding",
        Case(
            "llama", ours(targets=["embed_tokens", "q_proj"]), lambda: theirs(target_modules=["embed_tokens", "q_proj"])
        ),
    )


CASES = dict(cases())
case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@case
def test_peft_loads_what_we_save(case, tmp_path):
    check_that_peft_loads_what_we_save(case, tmp_path)


@case
def test_we_load_what_peft_saves(case, tmp_path):
    check_that_we_load_what_peft_saves(case, tmp_path)


@case
def test_a_config_of_peft_is_taken_for_a_spec(case):
    check_that_a_config_of_peft_is_taken_for_a_spec(case)


@pytest.mark.parametrize("steps", [STEPS, 5], ids=["pruned", "before"])
def test_adalora_in_training_with_modules(steps, tmp_path):
    """Both ways, before the last pruning and after it, with norms that train beside it."""
    case = CASES["AdaLoRA with modules"]
    model = dl.adapt(case.base(), case.ours)
    theirs = peft.get_peft_model(case.base(), case.theirs())
    for one, step in ((model, lambda t: dl.step(model)), (theirs, lambda t: theirs.base_model.update_and_allocate(t))):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        for t in range(1, steps + 1):
            one(**inputs(case.base(), seed=t)).loss.backward()
            optimizer.step()
            step(t)
            optimizer.zero_grad()
    write_adapter(model, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    there = peft.PeftModel.from_pretrained(case.base(), tmp_path / "ours").eval()
    assert_close_by_norm(logits(there), logits(model), 1e-5)
    ranks = {p.shape[0] for name, p in there.named_parameters() if "lora_E" in name}
    assert (ranks == {4}) == (steps < STEPS)
    here = dl.load_adapter(case.base(), tmp_path / "theirs")
    assert_close_by_norm(logits(here), logits(theirs.eval()), 1e-5)
    assert trained(here).keys() == trained(model).keys()
