"""A bank in use: runs are values of their threads, and adapters come and go under them."""

import copy
import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.deltas.bank import MANY
from tests.deltas.perturb import states_equal
from tests.helpers import assert_close_by_norm, byte_tokenizer, tokens
from tests.models.banks import logits, many


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
