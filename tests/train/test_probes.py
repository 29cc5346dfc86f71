"""What the probes write, against dense algebra and the hidden states themselves; and that a run is the same with and without them."""

import json

import pytest
import torch

import deltalab as dl
from deltalab.core.spec import build
from deltalab.data.chat import encode_all
from deltalab.deltas.weights import attached
from deltalab.measure.similarity import linear_cka, mean_cosine
from deltalab.train import EvalSpec, LoopSpec, OptimSpec, RunSpec, TrainSpec, run_spec, train
from deltalab.train.probes import TOKENS, DeltaProbe, RepresentationProbe, probes_of
from deltalab.train.spec import ProbeSpec
from tests.deltas.perturb import perturbed
from tests.helpers import byte_tokenizer, tiny_llama
from tests.train.runs import At, conversations, interrupt

TOKENIZER = byte_tokenizer()
SAMPLES = list(encode_all(TOKENIZER, conversations(), 128))


@pytest.mark.parametrize("method", [dl.LoRA(r=3), dl.DoRA(r=3), dl.IA3()], ids=lambda m: m.method)
def test_weights_of_a_delta(method):
    model = perturbed(dl.adapt(tiny_llama(), method))
    row = DeltaProbe(1).measure(model, 0)
    json.dumps(row, allow_nan=False)
    assert list(row["weights"]) == list(attached(model))
    for path, values in row["weights"].items():
        change = dl.delta_weight(model, path).double()
        S = torch.linalg.svdvals(change)[: len(values["singular"])]
        assert values["singular"] == pytest.approx(S.tolist(), rel=1e-5, abs=1e-7)
        assert values["norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert values["mean"] == pytest.approx(float(change.mean()), rel=1e-4, abs=1e-9)
        assert values["deviation"] == pytest.approx(float(change.std(correction=0)), rel=1e-5)
        assert values["rank"] == (3 if method.method == "lora" else None)
        assert row["methods"][path] == method.method
        assert values["relative"] == pytest.approx(
            float(change.norm() / model.get_submodule(path).weight.detach().double().norm()), rel=1e-5
        )
    if method.method == "lora":
        delta = attached(model)[path]
        assert values["A"]["mean"] == pytest.approx(float(delta.A.detach().mean()), rel=1e-5)
        assert values["B"]["deviation"] == pytest.approx(float(delta.B.detach().std(correction=0)), rel=1e-5)


def test_what_a_delta_tells_of_itself_is_there():
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRAExperts(experts=2, r=2)))
    probe = RepresentationProbe(1, 0, SAMPLES[:3])
    probe.measure(model.eval(), 0)
    told = DeltaProbe(1).measure(model, 0)["told"]
    assert told
    assert any("expert" in name or "share" in name for values in told.values() for name in values)


def test_representations_against_the_base():
    model = dl.adapt(tiny_llama(), dl.LoRA(r=2)).eval()
    probe = RepresentationProbe(1, 0, SAMPLES[:4])
    start = probe.measure(model, 0)
    assert start["cka"] == pytest.approx([1.0] * 3)
    assert start["cosine"] == pytest.approx([1.0] * 3)
    perturbed(model)
    row = probe.measure(model, 5)
    with torch.no_grad():
        for layer in range(3):
            now, base = [], []
            for sample in SAMPLES[:4]:
                ids = torch.tensor([sample.input_ids])
                now.append(model(ids, output_hidden_states=True).hidden_states[layer][0])
                with dl.disabled(model):
                    base.append(model(ids, output_hidden_states=True).hidden_states[layer][0])
            assert row["cka"][layer] == pytest.approx(linear_cka(torch.cat(now), torch.cat(base)), rel=1e-4)
            assert row["cosine"][layer] == pytest.approx(mean_cosine(torch.cat(now), torch.cat(base)), rel=1e-4)
    assert row["cka"][0] == pytest.approx(1)
    assert row["cka"][2] < 0.999


def test_which_probes_there_are():
    adapted = dl.adapt(tiny_llama(), dl.LoRA(r=2))
    assert probes_of(None, adapted, 0, SAMPLES) == []
    assert probes_of(ProbeSpec(), tiny_llama(), 0, SAMPLES) == []
    assert [type(p) for p in probes_of(ProbeSpec(), adapted, 0, [])] == [DeltaProbe]
    long = SAMPLES * 200
    (_, probe) = probes_of(ProbeSpec(samples=10_000), adapted, 0, long)
    assert 0 < sum(len(s.input_ids) for s in probe.samples) <= TOKENS


def spec(**fields):
    return LoopSpec(optim=OptimSpec(lr=5e-3, steps=8, batch=4), run=RunSpec(checkpoint_every=2), eval=EvalSpec(every=4, fraction=0.2), seed=7, **fields)  # fmt: skip


def adapted():
    return dl.adapt(tiny_llama(hidden=16, layers=1, mlp=24), dl.LoRA(r=2, dropout=0.1), seed=1)


def test_a_run_is_the_same_with_probes_and_goes_on_with_them(tmp_path):
    plain = train(adapted(), TOKENIZER, SAMPLES, spec(), progress=False)
    seen = train(
        adapted(), TOKENIZER, SAMPLES, spec(probe=ProbeSpec(every=3, samples=4)), folder=tmp_path / "a", progress=False
    )
    assert seen.losses == plain.losses
    assert [row["step"] for row in seen.curves["deltas"]] == [0, 3, 6, 8]
    assert [row["step"] for row in seen.curves["representations"]] == [0, 3, 6, 8]
    with pytest.raises(KeyboardInterrupt):
        train(adapted(), TOKENIZER, SAMPLES, spec(probe=ProbeSpec(every=3, samples=4)), folder=tmp_path / "b", probes=[At(5, interrupt)], progress=False)  # fmt: skip
    again = train(
        adapted(), TOKENIZER, SAMPLES, spec(probe=ProbeSpec(every=3, samples=4)), folder=tmp_path / "b", progress=False
    )
    assert again.curves["deltas"] == seen.curves["deltas"]
    assert again.curves["representations"] == seen.curves["representations"]


def test_from_a_spec(tmp_path):
    plan = build(TrainSpec, {
        "model": "organism", "adapt": [{"method": "lora", "r": 2}], "data": [{"task": "skills", "n": 16, "n_test": 4}],
        "optim": {"steps": 4, "batch": 4}, "probe": {"every": 2, "samples": 3}, "output": str(tmp_path / "run"),
    })  # fmt: skip
    run_spec(plan, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run/curves/representations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert len(rows[0]["cka"]) == 5
