"""What a bank stacks, and when it keeps it: the second time that the same adapters are asked for, in whatever order."""

import copy
import random

import pytest
import torch

import deltalab as dl
from deltalab.models.bank import KEPT
from tests.helpers import assert_close_by_norm, error_by_norm, tiny_llama, tokens
from tests.models.banks import adapted, logits

RANKS = {f"a{i}": r for i, r in enumerate((5, 6, 7, 8, 8, 8))}


def models_on(base, ranks=RANKS):
    return {name: adapted(base, i, dl.LoRA(r=r, targets="all-linear")) for i, (name, r) in enumerate(ranks.items())}


@pytest.fixture
def bank():
    base = tiny_llama()
    return dl.AdapterBank(copy.deepcopy(base), models_on(base))


def run(bank, names, length=1):
    with bank.rows(names):
        return logits(bank.model, tokens(len(names), length))


def kept(bank):
    """Bytes of the stacks that are kept for sets of adapters, and for single assignments of rows."""
    for_sets = [pair for stacks in bank._sets.values() for pair in stacks._kept.values()]
    for_runs = [pair for run in bank._runs.values() for pair in run.own._kept.values()]
    return tuple(sum(t.numel() * t.element_size() for pair in pairs for t in pair) for pairs in (for_sets, for_runs))


def test_another_order_of_the_same_adapters_stacks_nothing(bank, monkeypatch):
    names = [*RANKS]
    want = dict(zip(names, run(bank, names), strict=True))
    assert kept(bank) == (0, 0)
    stacked, cat = [], torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda parts, *args, **more: stacked.append(len(parts)) or cat(parts, *args, **more)
    )
    rng = random.Random(0)
    for turn in range(4):
        order = rng.sample(names, len(names))
        ids = tokens(len(names), 1)
        stacked.clear()
        with bank.rows(order):
            got = logits(bank.model, torch.stack([ids[names.index(name)] for name in order]))
        for name, one in zip(order, got, strict=True):
            assert_close_by_norm(one, want[name], 1e-6)
        assert (max(stacked, default=0) >= len(names)) == (turn == 0)
    size = 4 * sum(p.shape[0] + p.shape[1] for n, p in bank.model.named_parameters() if "layers" in n and p.ndim == 2)
    assert kept(bank) == (len(names) * 8 * size, 0)  # all filled up to rank 8


def test_only_the_latest_sets_are_kept_and_none_of_one_that_is_gone(bank):
    sets = [["a0", "a1"], ["a1", "a2"], ["a2", "a3"], ["a3", "a4"], ["a4", "a5"], ["a0", "a5"]]
    sizes = []
    for names in sets:
        for order in (names, names[::-1]):
            run(bank, order)
        sizes.append(kept(bank)[0])
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3]
    assert len(bank._sets) == len(bank._runs) == KEPT
    one_less = kept(bank)[0]
    bank.remove("a5")
    assert 0 < kept(bank)[0] < one_less
    assert all("a5" not in {a.name for a in them} for them in bank._sets)
    bank.close()
    assert not bank._sets


def test_adapters_that_change_in_each_step_are_never_kept(bank):
    rng, names = random.Random(1), [*RANKS]
    seen = set()
    for _ in range(40):
        drawn = tuple(rng.sample(names, 3))
        if frozenset(drawn) not in seen:
            seen.add(frozenset(drawn))
            run(bank, drawn)
    assert len(seen) > KEPT
    assert kept(bank) == (0, 0)


def test_uneven_rows_belong_to_their_assignment(bank):
    """Padding all adapters to the most rows would be more than twice the rows that there are."""
    names = ["a0"] * 9 + ["a1", "a2", "a3"]
    base = tiny_llama()
    models = models_on(base)
    for length in (1, 3):
        ids = tokens(len(names), length)
        for _ in range(2):
            got = run(bank, names, length)
        for name, one, row in zip(names, got, ids, strict=True):
            assert_close_by_norm(one, logits(models[name], row[None])[0], 1e-5)
    for_sets, for_runs = kept(bank)
    assert for_sets == 0
    assert for_runs > 0


@pytest.mark.parametrize("length", [1, 4, 40])
def test_in_bf16_it_is_no_further_away_than_each_adapter_alone(length):
    """One row an adapter is computed in fp32 on a CPU."""
    base = tiny_llama(dtype=torch.bfloat16)
    models, rows = models_on(base), ["a3", "a2", "a0", None, "a5", "a1"]
    ids = tokens(len(rows), length)
    alone = torch.cat([logits(models.get(name, base), row[None]) for name, row in zip(rows, ids, strict=True)])
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        bank = dl.AdapterBank(copy.deepcopy(base).to(dtype), models)
        found.append(run(bank, rows, length))
        assert torch.equal(found[-1][3], logits(bank.model, ids)[3])
    got, want = found
    assert got.dtype is torch.bfloat16
    assert error_by_norm(got, want) < 1.1 * error_by_norm(alone, want)
