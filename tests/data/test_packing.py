"""Packed rows: what stands in them, which samples go together, and that none sees another."""

import itertools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import deltalab as dl
from deltalab.data.chat import IGNORED, Encoded
from deltalab.data.packing import PackedCollator, cut, pack
from tests.deltas.perturb import perturbed
from tests.families import DECODER, MLP, model_of
from tests.helpers import assert_close_by_norm, error_by_norm, tokens

LENGTHS = (5, 1, 9, 3, 1)


def samples(lengths=LENGTHS, seed=0):
    """Random tokens; every third label is not counted."""
    rows = [tokens(1, n, seed=seed + n * 7 + k)[0].tolist() for k, n in enumerate(lengths)]
    return [Encoded(row, [IGNORED if i % 3 == 2 else t for i, t in enumerate(row)]) for row in rows]


def other(name, **options):
    """A decoder that the families do not have."""
    kind = getattr(transformers, f"{name}Config")
    return transformers.AutoModelForCausalLM.from_config(kind(**DECODER, intermediate_size=MLP, **options)).eval()


MODELS = {
    **{
        name: lambda name=name: model_of(name) for name in ("llama", "gpt2", "mixtral", "qwen3_moe", "phi3", "gpt_neox")
    },
    "qwen2": lambda: other("Qwen2"),
    "qwen3": lambda: other("Qwen3", head_dim=8),
    "gemma": lambda: other("Gemma", head_dim=8),
    "gemma3": lambda: other("Gemma3Text", head_dim=8, sliding_window=4),
    "mistral, window of 4": lambda: other("Mistral", sliding_window=4),
    "llama-nf4": lambda: model_of("llama-nf4"),
    "llama-int8": lambda: model_of("llama-int8"),
    "zero-init prefix": lambda: perturbed(dl.adapt(model_of("llama"), dl.ZeroInitPrefix(length=3))),
    "zero-init prefix on gpt2": lambda: perturbed(dl.adapt(model_of("gpt2"), dl.ZeroInitPrefix(length=3))),
    "mixture of LoRA": lambda: perturbed(dl.adapt(model_of("llama"), dl.LoRAExperts(r=2, targets="all-linear"))),
}


def logits(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def test_what_stands_in_a_packed_row():
    some = samples()
    row = pack([*some[:2], Encoded([], []), *some[2:]])
    assert row["input_ids"].tolist() == [[token for s in some for token in s.input_ids]]
    assert row["position_ids"].tolist() == [[i for n in LENGTHS for i in range(n)]]
    assert row["labels"].tolist() == [[label for s in some for label in [IGNORED, *s.labels[1:]]]]
    assert row["cu_seq_lens_q"].tolist() == row["cu_seq_lens_k"].tolist() == [0, 5, 6, 15, 18, 19]
    assert row["cu_seq_lens_q"].dtype == torch.int32
    assert (row["max_length_q"], row["max_length_k"]) == (9, 9)
    assert "attention_mask" not in row
    assert some[0].labels[0] != IGNORED, "the sample itself is left as it was"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_a_packed_sample_are_those_alone(name, attention):
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    some = samples()
    together = logits(model, pack(some))[0].split(LENGTHS)
    for sample, got in zip(some, together, strict=True):
        assert_close_by_norm(got, logits(model, {"input_ids": torch.tensor([sample.input_ids])})[0], 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_planted_leak_is_seen(name):
    """A mask of ones: transformers then no longer looks at the positions, and says nothing."""
    model, some = MODELS[name](), samples()
    row = pack(some)
    leaking = logits(model, {**row, "attention_mask": torch.ones_like(row["input_ids"])})[0].split(LENGTHS)
    errors = [error_by_norm(a, b) for a, b in zip(leaking, logits(model, row)[0].split(LENGTHS), strict=True)]
    assert errors[0] < 1e-5
    assert min(errors[1:]) > 3e-3


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(sizes, st.booleans(), st.none() | st.integers(1, 150), st.integers(1, 6), st.integers(1, 4))
def test_no_sample_is_lost_doubled_or_over_the_budget(lengths, packed, budget, pieces, processes):
    ranks = cut(lengths, packed=packed, budget=budget, pieces=pieces, processes=processes)
    assert len(ranks) == processes
    assert len({len(rank) for rank in ranks}) == 1, "every process runs as many passes as the others"
    assert sorted(i for rank in ranks for piece in rank for i in piece) == list(range(len(lengths)))
    assert len(ranks[0]) >= min(pieces, -(-len(lengths) // processes))
    for rank in ranks:
        assert [bool(piece) for piece in rank] == sorted(bool(piece) for piece in rank), "empty ones come first"
        for piece in rank:
            inside = [lengths[i] for i in piece]
            seen = sum(inside) if packed else len(inside) * max(inside, default=0)
            assert budget is None or seen <= budget or len(piece) == 1
    assert ranks == cut(lengths, packed=packed, budget=budget, pieces=pieces, processes=processes)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(10, 60))
def test_there_are_few_pieces(lengths, budget):
    """Beside the fewest, by trying all: of packed rows at most one more, of rectangles none."""
    fewest = {True: len(lengths), False: len(lengths)}
    for places in itertools.product(range(min(3, len(lengths))), repeat=len(lengths)):
        parts = [[n for n, at in zip(lengths, places, strict=True) if at == k] for k in set(places)]
        for packed in fewest:
            cost = [sum(part) if packed else len(part) * max(part) for part in parts]
            if all(c <= budget or len(part) == 1 for c, part in zip(cost, parts, strict=True)):
                fewest[packed] = min(fewest[packed], len(parts))
    for packed, least in fewest.items():
        if least <= 3:
            ((found),) = cut(lengths, packed=packed, budget=budget)
            assert least <= len(found) <= least + packed


def test_packed_rows_are_even():
    assert [len(row) for row in cut([6, 6, 6], packed=True, budget=9)[0]] == [1, 1, 1], (
        "18 tokens, but two rows do not fit"
    )
    ((*rows,),) = cut([50, 40, 30, 20, 20, 20, 10, 10], packed=True, budget=120)
    assert sorted(sum([50, 40, 30, 20, 20, 20, 10, 10][i] for i in row) for row in rows) == [100, 100]
    ((*rows,),) = cut([9, 8, 2, 2, 2, 1], packed=True, pieces=2)
    assert sorted(sum([9, 8, 2, 2, 2, 1][i] for i in row) for row in rows) == [12, 12]
    ((*rows,),) = cut([7, 3, 3, 3], packed=False, budget=9)
    assert rows == [[0], [1, 2, 3]]


def test_the_collator_of_other_loops():
    some = samples()
    rows = [{"input_ids": s.input_ids, "labels": torch.tensor(s.labels), "attention_mask": [1]} for s in some]
    got, want = PackedCollator()(rows), pack(some)
    assert got.keys() == want.keys()
    assert all(torch.equal(torch.as_tensor(got[key]), torch.as_tensor(want[key])) for key in want)
    bare = PackedCollator()([{"input_ids": torch.tensor([4, 5, 6])}, {"input_ids": [7, 8], "labels": None}])
    assert bare["labels"].tolist() == [[IGNORED, 5, 6, IGNORED, 8]]
    with pytest.raises(ValueError, match="a row has 2 tokens and 1 labels"):
        PackedCollator()([{"input_ids": [1, 2], "labels": [1]}])
