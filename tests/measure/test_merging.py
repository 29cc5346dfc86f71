"""The price of merging against computation by hand, and what it says of the ways to merge."""

import json
import math

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import deltalab as dl
from deltalab.deltas.adapt import attached, delta_weight, merged_weight
from deltalab.deltas.quantise import quantise
from deltalab.measure.merging import Gap, logits_gap, mean_loss, model_bytes
from deltalab.quant.linear import GroupQuantiser
from tests.deltas.perturb import perturbed
from tests.families import model_of
from tests.helpers import tiny_llama, tokens


class Table(nn.Module):
    """A language model whose logits for token i are row i of a table."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows, dtype=torch.float64))

    def forward(self, input_ids, attention_mask=None, labels=None):
        return CausalLMOutput(logits=self.rows[input_ids])


def adapted(bits=4):
    base = quantise(tiny_llama(), GroupQuantiser(bits, 8))
    return perturbed(dl.adapt(base, dl.LoRA(r=4, targets="all-linear")), 0.1)


BATCHES = [{"input_ids": tokens(seed=seed), "labels": tokens(seed=seed)} for seed in (1, 2)]


def test_the_gap_by_hand():
    one, other = Table([[3.0, 4.0, 0.0], [0.0, 1.0, 2.0], [9.0, 9.0, 8.0]]), Table([[3.0, 4.0, 1.0], [0.0, 3.0, 2.0], [0.0, 0.0, 0.0]])  # fmt: skip
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": torch.tensor([[0, 1, 2], [0, 2, 2]]), "attention_mask": mask}  # row 2 is never seen
    gap = logits_gap(one, other, [batch])
    assert gap.tokens == 3
    first, second = 1 / 5, 2 / math.sqrt(5)
    assert gap.mean == pytest.approx((2 * first + second) / 3, rel=1e-12)
    assert gap.worst == pytest.approx(second, rel=1e-12)
    assert gap.error == pytest.approx(math.sqrt((1 + 1 + 4) / (25 + 25 + 5)), rel=1e-12)
    assert gap.agreement == pytest.approx(2 / 3)
    kl = 0.0
    for token in (0, 1, 0):
        p, q = ([math.exp(v) for v in m.rows[token].tolist()] for m in (one, other))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
    assert gap.kl == pytest.approx(kl, rel=1e-10)
    assert logits_gap(one, one, [batch]) == Gap(0, 0, 0, 0, 1, 3, 0)
    with pytest.raises(dl.UserError, match="no token to compare"):
        logits_gap(one, other, [])


def test_the_price_of_each_way():
    model = adapted()
    model.train()
    ways = {"dequantise": {}, "requantise": {}, "correct": {"rank": 8}}
    prices = {way: dl.merge_price(model, dl.merged(model, into=way, **options), BATCHES, mean_loss(BATCHES))
              for way, options in ways.items()}  # fmt: skip
    assert model.training
    assert [p.requires_grad for d in attached(model).values() for p in d.parameters()] == [True] * 28
    exact, codes, better = prices.values()
    assert exact.logits.error < 1e-5
    assert max(m.of_weight for m in exact.matrices.values()) == 0
    assert 0.01 < codes.logits.error < 1
    assert codes.logits.agreement < 1
    assert codes.logits.kl > 1e-4
    plain = dl.merged(model, into="requantise")
    for path, got in codes.matrices.items():
        W = merged_weight(model, path)
        lost = (plain.get_submodule(path).weight - W).norm()
        assert got.of_weight == pytest.approx(float(lost / W.norm()), rel=1e-5)
        assert got.of_change == pytest.approx(float(lost / delta_weight(model, path).norm()), rel=1e-5)
        left = torch.linalg.svdvals(W - plain.get_submodule(path).weight)[8:].norm()
        assert better.matrices[path].of_weight == pytest.approx(float(left / W.norm()), rel=1e-4)
    adapter = sum(p.numel() * 4 for delta in attached(model).values() for p in delta.parameters())
    assert codes.bytes == (model_bytes(plain) + adapter, model_bytes(plain))
    assert better.bytes[1] == model_bytes(plain) + 2 * adapter  # rank 8 in place of 4
    assert exact.bytes[1] == sum(p.numel() * 4 for p in tiny_llama().parameters()) + buffers(model)
    model.eval()
    labels = torch.cat([b["labels"] for b in BATCHES])
    loss = nn.functional.cross_entropy(model(labels).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert codes.metric[0] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert codes.metric[1] != codes.metric[0]


def buffers(model):
    kept = {"codes", "scale", "offset", "keep"}
    return sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name.rpartition(".")[2] not in kept)


def test_it_prints_and_is_json():
    model = adapted()
    price = dl.merge_price(model, dl.merged(model, into="requantise"), BATCHES, lambda _: 0.25)
    told = str(price)
    worst = max(price.matrices, key=lambda path: price.matrices[path].of_weight)
    assert f"relative error {price.logits.error:.2e}" in told
    assert f"14 merged, relative error {sum(m.of_weight for m in price.matrices.values()) / 14:.2e}" in told
    assert f"({worst})" in told
    assert "0.25 → 0.25" in told
    assert "48 tokens" in told
    assert json.loads(json.dumps(price.plain()))["matrices"][worst]["of_weight"] == price.matrices[worst].of_weight


def test_a_delta_that_changes_nothing_has_no_part_of_its_change():
    model = dl.adapt(quantise(tiny_llama(), GroupQuantiser(8, 8)), dl.LoRA())
    price = dl.merge_price(model, dl.merged(model, into="requantise"), BATCHES)
    assert {m.of_change for m in price.matrices.values()} == {None}
    assert price.logits.error < 1e-6
    assert price.metric is None
    assert "of their changes" not in str(price)
    assert "none was merged" in str(dl.merge_price(dl.adapt(tiny_llama(), dl.Train("norms")), tiny_llama(), BATCHES))
    with pytest.raises(dl.UserError, match="has no adapter"):
        dl.merge_price(tiny_llama(), tiny_llama(), BATCHES)


@pytest.mark.parametrize("family", ["t5", "bert-classifier", "mixtral"])
def test_models_of_other_kinds(family):
    model = perturbed(dl.adapt(model_of(family), dl.LoRA(targets="all-linear")))
    ids = tokens()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"decoder_input_ids": ids[:, :5]} if family == "t5" else {}
    price = dl.merge_price(model, dl.merged(model), [batch])
    assert price.logits.error < 1e-5
    assert price.logits.tokens == {"t5": 10, "bert-classifier": 2, "mixtral": 24}[family]
