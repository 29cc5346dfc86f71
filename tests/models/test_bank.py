"""Many adapters on one base: a mixed batch is its single runs, whatever the methods, ranks, models and bases."""

import copy
import random

import peft
import pytest
import torch
import transformers
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.bank import MANY
from deltalab.deltas.quantise import quantise
from deltalab.quant.linear import quantiser
from tests.deltas.perturb import states_equal
from tests.families import inputs, model_of
from tests.helpers import assert_close_by_norm, byte_tokenizer, error_by_norm, tiny_llama, tokens
from tests.models.banks import adapted, logits, many


@pytest.mark.parametrize(("length", "order"), [(1, "in order"), (1, "mixed"), (12, "unbalanced"), (MANY + 1, "mixed")])
def test_a_mixed_batch_of_64_adapters_is_64_single_runs(length, order):
    base, models = many()
    bank = dl.AdapterBank(copy.deepcopy(base), models)
    names = [*models, None, *(["a3"] * 5 if order == "unbalanced" else [])]
    if order != "in order":
        random.Random(0).shuffle(names)
    ids = tokens(len(names), length)
    with bank.rows(names):
        got = logits(bank.model, ids)
    alone = logits(base, ids)
    for i, name in enumerate(names):
        if name is None:
            assert torch.equal(got[i], alone[i])
        else:
            assert_close_by_norm(got[i], logits(models[name], ids[i : i + 1])[0], 1e-5)
            assert error_by_norm(got[i], alone[i]) > 1e-3
    assert torch.equal(logits(bank.model, ids), alone)


def test_the_products_are_pooled_and_no_base_weight_is_copied(monkeypatch):
    base = tiny_llama()
    models = {f"r{r}": adapted(base, 0, dl.LoRA(r=r, targets="all-linear")) for r in (5, 6, 7, 8)}
    before = {name: p.data_ptr() for name, p in base.named_parameters()}
    bank = dl.AdapterBank(base, models)
    calls, linears, bmm, linear = [], [], torch.bmm, nn.functional.linear
    monkeypatch.setattr(torch, "bmm", lambda a, b: calls.append(a.shape) or bmm(a, b))
    monkeypatch.setattr(nn.functional, "linear", lambda x, W, b=None: linears.append(W.data_ptr()) or linear(x, W, b))
    with bank.rows(["r5", "r6", "r7", "r8"]):
        logits(base, tokens(4, 1))
    assert calls == [
        (4, 8, 32 if i % 7 < 6 else 48) for i in range(14)
    ]  # one for A of four adapters; that of B adds to y
    assert linears
    assert set(linears) <= set(before.values())
    assert {name: p.data_ptr() for name, p in base.named_parameters()} == before
    for name, p in bank._base.named_parameters():
        assert p.data_ptr() == before[name]
    want = sum(4 * p.numel() for model in models.values() for d in attached(model).values() for p in d.parameters())
    assert bank.nbytes == want


@pytest.mark.parametrize("length", [1, MANY])
def test_like_ranks_and_like_numbers_of_rows_are_padded_to_one_stack(length):
    base = tiny_llama()
    models = {f"r{r}": adapted(base, 0, dl.LoRA(r=r, targets="all-linear")) for r in (3, 4, 17, 30)}
    bank = dl.AdapterBank(copy.deepcopy(base), models)
    names = ["r3"] * 3 + ["r4"] * 4 + ["r17"] * 5 + ["r30"] * 8 + [None] * 2
    for _ in range(2):
        ids = tokens(len(names), length)
        with bank.rows(names):
            got = logits(bank.model, ids)
        for one, name, row in zip(got, names, ids, strict=True):
            assert_close_by_norm(one, logits(models.get(name, base), row[None])[0], 1e-5)
        random.Random(1).shuffle(names)


def test_low_rank_adapters_in_peft_give_the_same_mixed_batch(tmp_path):
    base, names = tiny_llama(), {}
    for i, (r, targets) in enumerate([(1, "q,v"), (8, "all-linear"), (64, "attention"), (3, "mlp")]):
        names[f"n{i}"] = tmp_path / f"n{i}"
        dl.save_adapter(adapted(base, i, dl.LoRA(r=r, alpha=5, targets=targets)), names[f"n{i}"])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), names["n0"], adapter_name="n0")
    for name in list(names)[1:]:
        theirs.load_adapter(names[name], adapter_name=name)
    theirs.eval()
    bank = dl.AdapterBank(base, names)
    for length in (1, 10, MANY):
        rows = ["n2", None, "n0", "n3", "n1", "n2", None]
        ids = tokens(len(rows), length)
        with bank.rows(rows):
            got = logits(base, ids)
        want = logits(theirs, ids, adapter_names=[name or "__base__" for name in rows])
        for mine, other in zip(got, want, strict=True):
            assert_close_by_norm(mine, other, 1e-5)


CASES = {
    "gpt2": dl.LoRA(r=4, targets="all-linear"),
    "phi3": dl.LoRA(r=4, targets="all-linear"),
    "gpt_neox": dl.DoRA(r=4, targets="all-linear"),
    "llama-bias": dl.IA3(targets="all-linear"),
    "bert": dl.LoRA(r=4, targets="all-linear"),
    "bert-classifier": dl.LoRA(r=4, targets=["all-linear", "bert.embeddings.word_embeddings"]),
    "t5": dl.LoRA(r=4, targets="all-linear"),
    "mixtral": dl.LoRA(r=4, targets="attention"),
    "gpt_oss": dl.LoRA(r=4, targets="attention"),
    "llama-bf16": dl.LoRA(r=4, targets="all-linear"),
}


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_every_kind_of_model(family):
    base = model_of(family)
    models = {name: adapted(base, i, CASES[family]) for i, name in enumerate("ab")}
    bank = dl.AdapterBank(copy.deepcopy(base), models)
    given, rows = {}, ["a", None, "b", "a"]
    for key, value in inputs(base).items():
        if key != "labels" or base.config.is_encoder_decoder:
            given[key] = value[[0, 1, 1, 0]].clone()
    with bank.rows(rows):
        got = bank.model(**given).logits
    assert torch.equal(bank.model(**given).logits, base(**given).logits)
    bound = 3e-2 if family == "llama-bf16" else 1e-5
    for i, name in enumerate(rows):
        want = (base if name is None else models[name])(**given).logits[i]
        assert_close_by_norm(got[i], want, bound)
        assert name is None or error_by_norm(want, base(**given).logits[i]) > 1e-3
    assert torch.equal(got[1], base(**given).logits[1])
    bank.close()
    assert states_equal(bank.model, base)


@pytest.mark.parametrize("how", ["int8", "int4-group", "nf4", "bitsandbytes"])
def test_a_quantised_base(how):
    base = model_of("llama-bnb4") if how == "bitsandbytes" else quantise(tiny_llama(), quantiser(how))
    models = {"a": adapted(base, 1, dl.LoRA(r=4, targets="all-linear")), "b": adapted(base, 2, dl.DoRA(r=2))}
    bank = dl.AdapterBank(copy.deepcopy(base), models)
    ids = tokens(3)
    with bank.rows(["b", None, "a"]):
        got = logits(bank.model, ids)
    for i, model in enumerate([models["b"], base, models["a"]]):
        assert_close_by_norm(got[i], logits(model, ids)[i], 1e-5)
    assert torch.equal(got[1], logits(base, ids)[1])


PROMPTS = ["hello", "a much longer prompt than the others", "x", "hello", "two words"]


def test_generation_gives_each_prompt_what_its_adapter_alone_would(tmp_path):
    base, tokenizer = tiny_llama(), byte_tokenizer()
    models = {f"a{i}": adapted(base, i, dl.LoRA(r=2**i, targets="all-linear")) for i in range(4)}
    models["d"] = adapted(base, 9, dl.DoRA(r=3))
    bank = dl.AdapterBank(base, models, tokenizer)
    adapters = ["a3", "d", None, "a0", "a1"]
    done = []
    for batch in (5, 2):
        got = bank.generate(
            PROMPTS, adapters, max_new_tokens=12, batch_size=batch, on_progress=lambda *n: done.append(n)
        )
        for reply, prompt, name in zip(got, PROMPTS, adapters, strict=True):
            model = base if name is None else models[name]
            assert reply == dl.generate(model, tokenizer, [prompt], max_new_tokens=12)[0]
    assert len({reply.text for reply in got}) > 3
    assert done == [(5, 5), (2, 5), (4, 5), (5, 5)]
    assert bank.generate([], []) == []


def test_the_tokenizer_is_that_of_the_models_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = dl.load(tmp_path)
    want = dl.generate(model, tokenizer, ["hi"], max_new_tokens=4)
    assert dl.AdapterBank(model).generate(["hi"], [None], max_new_tokens=4) == want


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_beams_are_rows_side_by_side(family):
    base = model_of(family)
    models = {name: adapted(base, i, dl.LoRA(r=4, targets="all-linear")) for i, name in enumerate("ab")}
    bank = dl.AdapterBank(copy.deepcopy(base), models)
    ids = tokens(3, 6)
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with bank.rows(["b", None, "a"], repeat=3):
        got = bank.model.generate(ids, **options, min_new_tokens=8)
    for i, model in enumerate([models["b"], base, models["a"]]):
        assert torch.equal(got[i], model.generate(ids, **options, min_new_tokens=8)[i])


def test_a_bank_prints_and_counts():
    base, models = many()
    bank = dl.AdapterBank(copy.deepcopy(base), {"fr": models["a0"]})
    bank.add("sql", models["a2"])
    assert (bank.names, list(bank), len(bank)) == (["fr", "sql"], ["fr", "sql"], 2)
    assert "fr" in bank
    assert None not in bank
    head, first, second = str(bank).splitlines()
    assert head.split() == ["adapter", "delta", "rank", "modules", "bytes"]
    assert first.split()[:2] == ["fr", "LoRA"]
    assert second.split()[0] == "sql"


def test_the_bank_is_a_pass_through_for_transformers(tmp_path):
    base, models = many()
    bank = dl.AdapterBank(copy.deepcopy(base), models)
    bank.model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval(), tokens(2)), logits(base, tokens(2)))
