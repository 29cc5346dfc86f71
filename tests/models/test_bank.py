"""Many adapters on one base: a mixed batch is its single runs, and adapters come and go while it runs."""

import copy
import functools
import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import transformers
from torch import nn

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.deltas.adapt import attached
from deltalab.deltas.bank import MANY
from deltalab.deltas.base import shape_of
from deltalab.deltas.quantise import quantise
from deltalab.quant.linear import quantiser
from tests.deltas.perturb import perturbed, states_equal
from tests.families import inputs, model_of
from tests.helpers import assert_close_by_norm, byte_tokenizer, error_by_norm, tiny_llama, tokens

TARGETS = ["q,v", "attention", "mlp", "all-linear", ["q_proj", "lm_head"], ["embed_tokens", "k_proj"]]
SPECS = {
    "LoRA": lambda r, targets: dl.LoRA(r=r, alpha=2 * r, targets=targets),
    "rsLoRA": lambda r, targets: dl.LoRA(r=r, rank_stabilised=True, dropout=0.1, targets=targets),
    "PiSSA": lambda r, targets: dl.LoRA(r=min(r, 16), init="pissa", targets=targets),
    "DoRA": lambda r, targets: dl.DoRA(r=r, targets=targets),
    "AdaLoRA": lambda r, targets: dl.AdaLoRA(targets=targets),
    "IA3": lambda r, targets: dl.IA3(targets=targets),
    "VeRA": lambda r, targets: dl.VeRA(r=r, targets=targets),
    "QALoRA": lambda r, targets: dl.QALoRA(r=r, group_size=4, targets=targets),
    "LoRAExperts": lambda r, targets: dl.LoRAExperts(r=min(r, 8), targets=targets),
}
EMBEDS = {"LoRA", "rsLoRA", "DoRA"}


def adapted(base, seed, *specs):
    """A copy of a base with an adapter that does something; where seed % 8 is 6, one of its changes is masked."""
    model = perturbed(dl.adapt(copy.deepcopy(base), list(specs)), size=0.2, seed=seed)
    if seed % 8 == 6:
        path, delta = next(iter(attached(model).items()))
        mask = torch.rand(shape_of(model.get_submodule(path)), generator=torch.Generator().manual_seed(seed))
        delta.keep = mask < 0.5
    return model.eval()


@functools.cache
def many():
    """A base and 64 models on it: every method, ranks 1 … 64, targets from two linears to the embedding."""
    base, models = tiny_llama(), {}
    for i in range(64):
        method = list(SPECS)[i // 2 % len(SPECS)] if i % 2 else "LoRA"
        rng = random.Random(i)
        targets = rng.choice(TARGETS[: None if method in EMBEDS else 4])
        rank = rng.choice([1, 2, 3, 5, 8, 16, 33, 64])
        models[f"a{i}"] = adapted(base, i, SPECS[method](rank, targets))
    assert any(delta.keep is not None for model in models.values() for delta in attached(model).values())
    return base, models


@torch.no_grad()
def logits(model, ids, **more):
    return model(input_ids=ids, **more).logits


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
        (4, 1, 32 if i % 7 < 6 else 48) for i in range(14)
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


def test_blocks_nest_and_are_their_threads_own():
    base, models = many()
    bank = dl.AdapterBank(copy.deepcopy(base), {name: models[name] for name in ("a0", "a2")})
    ids, want = tokens(1), {name: logits(models[name], tokens(1)) for name in ("a0", "a2")}
    with bank.rows(["a0"]):
        with bank.rows(["a2"]):
            assert_close_by_norm(logits(bank.model, ids), want["a2"], 1e-5)
            with bank.rows([None]):
                assert torch.equal(logits(bank.model, ids), logits(base, ids))
        assert_close_by_norm(logits(bank.model, ids), want["a0"], 1e-5)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(logits, bank.model, ids).result(), logits(base, ids))
    with pytest.raises(ZeroDivisionError), bank.rows(["a0"]):
        raise ZeroDivisionError
    assert torch.equal(logits(bank.model, ids), logits(base, ids))


def test_two_banks_on_two_models():
    base, models = many()
    banks = [dl.AdapterBank(copy.deepcopy(base), {"x": models[name]}) for name in ("a0", "a2")]
    with banks[0].rows(["x"]), banks[1].rows(["x"]):
        got = [logits(bank.model, tokens(1)) for bank in banks]
    for one, name in zip(got, ("a0", "a2"), strict=True):
        assert_close_by_norm(one, logits(models[name], tokens(1)), 1e-5)


def test_a_run_keeps_what_it_began_with_and_then_lets_go():
    base, models = many()
    bank = dl.AdapterBank(copy.deepcopy(base), {"x": models["a0"], "y": models["a2"]})
    gone = weakref.ref(bank._table["x"])
    ids = tokens(2)
    with bank.rows(["x", "y"]):
        want = logits(bank.model, ids)
        bank.remove("x")
        bank.add("x", models["a4"])
        assert torch.equal(logits(bank.model, ids), want)
        with pytest.raises(UserError, match="in use"):
            bank.close()
    gc.collect()
    assert gone() is None
    with bank.rows(["x", "y"]):
        now = logits(bank.model, ids)
    assert_close_by_norm(now[0], logits(models["a4"], ids)[0], 1e-5)
    assert_close_by_norm(now[1], want[1], 1e-6)


def hammer(bank, models, volatile, rounds, seconds):
    """Threads run random rows and check every one, while others add and remove. Returns (rows run, requests refused, changes)."""
    lengths = (1, 5, MANY)
    ids = {n: tokens(1, n, seed=n) for n in lengths}
    want = {name: {n: logits(model, ids[n])[0] for n in lengths} for name, model in models.items()}
    ran, refused, changes, faults, stop = [], [], [], [], threading.Event()

    def runs(seed):
        rng = random.Random(seed)
        for _ in range(rounds):
            names = rng.choices([*models], k=rng.choice([1, 3, 6]))
            n = rng.choice(lengths)
            try:
                with bank.rows([None if name == "base" else name for name in names]):
                    for _ in range(2):
                        got = logits(bank.model, ids[n].expand(len(names), -1))
                        for name, one in zip(names, got, strict=True):
                            assert_close_by_norm(one, want[name][n], 1e-5)
                ran.append(len(names))
            except UserError as error:
                assert "has no adapter" in str(error), error
                assert any(f"'{name}'" in str(error) for name in volatile)
                refused.append(1)

    def churns(seed):
        rng = random.Random(seed)
        own = [name for i, name in enumerate(volatile) if i % 2 == seed % 2]
        while not stop.is_set():
            name = rng.choice(own)
            if name in bank:
                bank.remove(name)
            else:
                bank.add(name, volatile[name])
            changes.append(1)

    def guarded(task, seed):
        try:
            task(seed)
        except BaseException as error:
            faults.append(error)

    workers = [threading.Thread(target=guarded, args=(runs, i)) for i in range(3)]
    churning = [threading.Thread(target=guarded, args=(churns, i)) for i in range(2)]
    for thread in [*workers, *churning]:
        thread.start()
    for thread in workers:
        thread.join(seconds)
    stop.set()
    for thread in churning:
        thread.join(seconds)
    assert not faults, faults
    assert not any(thread.is_alive() for thread in [*workers, *churning])
    assert len(ran) + len(refused) == 3 * rounds
    return sum(ran), len(refused), len(changes)


@pytest.mark.parametrize("rounds", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_adding_and_removing_under_load_loses_nothing(tmp_path, rounds):
    base, all_models = many()
    models = {name: all_models[name] for name in ("a0", "a2", "a3", "a5", "a6", "a7", "a8", "a9")}
    volatile = {}
    for name in ("a5", "a6", "a8", "a9"):
        volatile[name] = tmp_path / name if name != "a6" else models[name]
        if name != "a6":
            dl.deltas.peft_format.write_adapter(models[name], tmp_path / name)
    bank = dl.AdapterBank(copy.deepcopy(base), {name: model for name, model in models.items() if name not in volatile})
    rows, refused, changes = hammer(bank, {**models, "base": base}, volatile, rounds, 300)
    assert rows > rounds
    assert refused
    assert changes > 10
    for name in set(bank.names) & set(volatile):
        bank.remove(name)
    assert set(bank.names) == set(models) - set(volatile)
    bank.close()
    assert states_equal(bank.model, base)


def test_generation_while_adapters_come_and_go():
    base, models = many()
    tokenizer = byte_tokenizer()
    bank = dl.AdapterBank(copy.deepcopy(base), {"x": models["a0"], "y": models["a2"]}, tokenizer)
    want = [
        dl.generate(model, tokenizer, ["hello"], max_new_tokens=16)[0] for model in (models["a0"], base, models["a2"])
    ]
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(bank.generate, ["hello"] * 3, ["x", None, "y"], max_new_tokens=16) for _ in range(6)]
        for i in range(10):
            bank.add(f"new{i}", models[f"a{i}"])
            bank.remove(f"new{i}")
        assert all(reply.result() == want for reply in replies)


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


def bank_of(*names):
    base, models = many()
    return dl.AdapterBank(copy.deepcopy(base), dict.fromkeys(names, models["a0"]), byte_tokenizer())


def test_mistakes_are_told_in_words(tmp_path):
    bank = bank_of("french", "sql")
    with pytest.raises(UserError, match=r"no adapter 'frensh'(.|\n)*nearest: french"), bank.rows(["frensh"]):
        pass
    with pytest.raises(UserError, match=r"no adapter 'frensh'(.|\n)*nearest: french"):
        bank.remove("frensh")
    with pytest.raises(UserError, match="no adapter 'frensh'"):
        bank.generate(["hi", "ho"], ["sql", "frensh"])
    with pytest.raises(UserError, match="2 prompts and 1 adapters"):
        bank.generate(["hi", "ho"], ["sql"])
    for names in ("sql", []):
        with pytest.raises(UserError, match="takes a list of names"), bank.rows(names):
            pass
    for rows, repeat in ((3, 1), (4, 1), (4, 3)):
        with (
            pytest.raises(UserError, match=rf"told of 2 rows, and '.*' gets {rows}"),
            bank.rows(["sql", None], repeat=repeat),
        ):
            logits(bank.model, tokens(rows))
    with pytest.raises(UserError, match="has an adapter 'sql' already"):
        bank.add("sql", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        bank.add("new", tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no adapter"):
        bank.add("new", tiny_llama())
    with pytest.raises(UserError, match="does not fit 'model.layers.0"):
        bank.add("new", adapted(tiny_llama(hidden=64), 0, dl.LoRA()))
    with pytest.raises(UserError, match=r"adapts 'model.layers.2"):
        bank.add("new", adapted(tiny_llama(layers=3), 0, dl.LoRA()))
    assert bank.names == ["french", "sql"]
    bank.close()
    bank.close()
    for ask in (
        lambda: bank.add("x", tmp_path),
        lambda: bank.generate(["hi"], [None]),
        lambda: bank.rows([None]).__enter__(),
    ):
        with pytest.raises(UserError, match="closed"):
            ask()


@pytest.mark.parametrize("own", [dl.Train("norms"), dl.Train(["lm_head"])])
def test_an_adapter_that_trains_the_shared_base_is_refused_and_the_base_untouched(tmp_path, own):
    bank = bank_of("sql")
    before = copy.deepcopy(bank.model.state_dict())
    model = adapted(tiny_llama(), 0, dl.LoRA(), own)
    dl.save_adapter(model, tmp_path)
    for source in (tmp_path, model):
        with pytest.raises(UserError, match="the base is shared"):
            bank.add("new", source)
    assert all(torch.equal(value, before[key]) for key, value in bank.model.state_dict().items())
    assert bank.names == ["sql"]


@pytest.mark.parametrize("spec", [dl.Bottleneck(), dl.ZeroInitPrefix()], ids=["Bottleneck", "ZeroInitPrefix"])
def test_a_whole_sublayer_is_refused_by_name(spec):
    bank = bank_of("sql")
    with pytest.raises(UserError, match=rf"acts on 'model.layers.*rows of a batch(.|\n)*{type(spec).__name__}"):
        bank.add("new", adapted(tiny_llama(), 0, spec))
    assert bank.names == ["sql"]


def test_what_has_no_rows_is_refused_by_name():
    bank = dl.AdapterBank(model_of("mixtral"))
    model = adapted(model_of("mixtral"), 0, dl.LoRA(targets="all-linear"))
    with pytest.raises(UserError, match=r"acts on 'model.layers.0.mlp.experts.*rows of a batch"):
        bank.add("experts", model)
    assert len(bank) == 0


def test_a_model_in_use_takes_no_other_adapter():
    bank = bank_of("sql")
    with pytest.raises(UserError, match=r"in use(.|\n)*bank.close"):
        dl.adapt(bank.model, dl.LoRA())
    with pytest.raises(UserError, match="adapted"):
        dl.AdapterBank(bank.model)
    with bank.rows(["sql"]):
        logits(bank.model, tokens(1))
    with pytest.raises(UserError, match="adapted"):
        dl.AdapterBank(dl.adapt(tiny_llama(), dl.LoRA()))
    with pytest.raises(UserError, match="input"):
        dl.merged(bank.model)
    bank.close()
    assert attached(dl.adapt(bank.model, dl.LoRA()))


def test_a_bank_that_cannot_begin_leaves_the_model_as_it_was(tmp_path):
    model = tiny_llama().train()
    with pytest.raises(UserError, match="does not exist"):
        dl.AdapterBank(model, {"x": tmp_path / "nowhere"})
    assert states_equal(model, tiny_llama().train())
    assert all(module.training for module in model.modules())
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(UserError, match="forward"):
        dl.AdapterBank(model)
    del model.lm_head.forward
    assert states_equal(model, tiny_llama().train())


def test_gradients_reach_the_input_past_a_bank():
    base, models = many()
    names = ["a0", None, "a5", "a3"]
    bank = dl.AdapterBank(copy.deepcopy(base), models)
    x = torch.randn(4, 6, 32, requires_grad=True)
    with bank.rows(names):
        bank.model(inputs_embeds=x).logits.square().sum().backward()
    for i, name in enumerate(names):
        alone = x.detach()[i : i + 1].requires_grad_()
        (base if name is None else models[name])(inputs_embeds=alone).logits.square().sum().backward()
        assert_close_by_norm(x.grad[i], alone.grad[0], 1e-4)


def test_runs_within_inference_mode_do_not_spoil_later_ones():
    base, models = many()
    bank = dl.AdapterBank(copy.deepcopy(base), {"a0": models["a0"], "a2": models["a2"]})
    ids = tokens(2)
    with torch.inference_mode(), bank.rows(["a0", "a2"]):
        want = bank.model(input_ids=ids).logits
    x = base.model.embed_tokens(ids).detach().requires_grad_()
    with bank.rows(["a0", "a2"]):
        got = bank.model(inputs_embeds=x).logits
    got.sum().backward()
    assert_close_by_norm(got, want, 1e-6)


def test_the_bank_is_a_pass_through_for_transformers(tmp_path):
    base, models = many()
    bank = dl.AdapterBank(copy.deepcopy(base), models)
    bank.model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval(), tokens(2)), logits(base, tokens(2)))
