"""Encoders on choices: the head, the encoding, the loss and the classes equal transformers' own."""

import json
import shutil

import pytest
import torch
import transformers
from torch.nn import functional as F

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.core.records import read_record
from deltalab.data.chat import IGNORED, Conversation
from deltalab.data.choices import encode_choices
from deltalab.data.collate import collate
from deltalab.data.tasks import MRPCTask, OwnTask, SkillsTask
from deltalab.train import EvalSpec, OptimSpec, RunSpec, TrainSpec, run_spec, train
from deltalab.train.evaluate import classes, evaluate
from deltalab.train.loss import count, nll_sum
from tests.helpers import assert_close_by_norm
from tests.train.runs import At, interrupt

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a BERT without a head, as sentence encoders come."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    config = transformers.BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=24, max_position_embeddings=24)  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pairs(tmp_path):
    """Pairs that say the same where their letters are the same."""
    rows = [("a b", "a b"), ("c", "d e f"), ("g h a", "g h a"), ("b", "c")] * 4
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"sentence1": a, "sentence2": b, "label": int(a == b)}) + "\n" for a, b in rows))
    return str(path)


def loaded(encoder, **options):
    return dl.load(encoder, head="SequenceClassification", labels=2, **options)


def spec(encoder, pairs, folder, **fields):
    return TrainSpec(**{
        "model": encoder, "adapt": [{"method": "lora", "r": 2, "targets": "q,v"}], "eval": EvalSpec(fraction=0.25, every=5),
        "data": [MRPCTask(path=pairs, test_path=pairs)], "optim": OptimSpec(steps=10, batch=4, lr=1e-2), "output": str(folder), **fields,
    })  # fmt: skip


def test_a_new_head_is_drawn_from_the_seed_and_trains(encoder):
    a, b, c = (loaded(encoder, seed=seed, adapt=dl.LoRA(r=2, targets="q,v"))[0] for seed in (1, 1, 2))
    assert torch.equal(a.classifier.weight, b.classifier.weight)
    assert not torch.equal(a.classifier.weight, c.classifier.weight)
    assert a.classifier.weight.shape == (2, 16)
    assert a.classifier.weight.requires_grad
    assert a.classifier.bias.requires_grad
    assert not a.bert.pooler.dense.weight.requires_grad
    state = torch.random.get_rng_state()
    loaded(encoder, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_else_is_missing_is_told(encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{encoder}/{file}", tmp_path)
    tensors = load_file(f"{encoder}/model.safetensors")
    save_file({k: t for k, t in tensors.items() if "layer.1.attention.self.query" not in k}, tmp_path / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match="lacks 2 tensors"):
        loaded(str(tmp_path))


def test_texts_as_the_tokenizer_puts_them_together(encoder, pairs):
    _, tokenizer = loaded(encoder)
    samples = encode_choices(tokenizer, MRPCTask(path=pairs).train(), 24)
    want = tokenizer("c", "d e f")
    assert (samples[1].input_ids, samples[1].types, samples[1].choice) == (want["input_ids"], want["token_type_ids"], 0)
    assert samples[1].labels == [0] + [IGNORED] * 6
    assert [count(sample) for sample in samples] == [1] * 16
    alone = encode_choices(tokenizer, [Conversation.of("a b", label=1)], 24)
    assert alone[0].input_ids == tokenizer("a b")["input_ids"]


def test_long_texts_are_skipped_or_cut(encoder):
    _, tokenizer = loaded(encoder)
    two = [Conversation.of("", label=0, texts=("a", "b c d e f g h a b c d")), Conversation.of("", label=1, texts=("a", "b"))]  # fmt: skip
    assert [(len(e), e.skipped, e.cut) for e in (encode_choices(tokenizer, two, 8, how) for how in ("skip", "cut"))] == [(1, 1, 0), (2, 0, 1)]  # fmt: skip
    ids = encode_choices(tokenizer, two, 8, "cut")[0].input_ids
    assert len(ids) == 8
    assert tokenizer.decode(ids).startswith("[CLS] a [SEP] b c d")  # the longer text loses its end
    with pytest.raises(UserError, match="every one of 1 questions is longer"):
        encode_choices(tokenizer, two[:1], 8)
    with pytest.raises(UserError, match="has no class"):
        encode_choices(tokenizer, [Conversation.of("a", "b")], 8)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_the_loss_is_transformers_own(encoder, pairs, kernels):
    model, tokenizer = loaded(encoder)
    dl.adapt(model, [dl.LoRA(r=2, targets="q,v"), dl.Train(["classifier"])], kernels=kernels)
    batch = collate(encode_choices(tokenizer, MRPCTask(path=pairs).train()[:6], 24), tokenizer.pad_token_id)
    got = nll_sum(model.eval(), batch)
    (grad,) = torch.autograd.grad(got, model.classifier.weight)
    want = 6 * model(**batch).loss
    assert_close_by_norm(got, want, 1e-6)
    assert_close_by_norm(grad, torch.autograd.grad(want, model.classifier.weight)[0], 1e-6)
    batch["labels"][2] = IGNORED
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert_close_by_norm(nll_sum(model, batch), F.cross_entropy(logits, batch["labels"], reduction="sum"), 1e-6)


def test_classes_are_the_likeliest(encoder, pairs, monkeypatch):
    model, tokenizer = loaded(encoder)
    asked = MRPCTask(path=pairs).train()
    monkeypatch.setattr("deltalab.train.evaluate.BATCH", 3)
    model.train()
    got = classes(model, tokenizer, asked, 24)
    assert model.training
    model.eval()
    want = [int(model(**tokenizer(*c.meta["texts"], return_tensors="pt")).logits.argmax()) for c in asked]
    assert got == want
    assert evaluate(MRPCTask(path=pairs, test_path=pairs), model, tokenizer, 24)["accuracy"].items == [
        float(p == c.meta["label"]) for p, c in zip(want, asked, strict=True)
    ]


def test_a_run_from_a_spec(encoder, pairs, tmp_path):
    record = read_record(run_spec(spec(encoder, pairs, tmp_path / "run"), progress=False))
    assert record["data"]["packed"] is False
    assert record["data"]["packing"].startswith("a classifier")
    assert record["scores"]["after"]["mrpc"]["n"] == 16
    assert record["scores"]["after"]["mrpc"].keys() >= {"accuracy", "f1", "precision", "recall"}
    assert record["result"]["loss"][1] < record["result"]["loss"][0]
    # the adapter holds the head, so it does the same on a head that was drawn otherwise
    model, tokenizer = loaded(encoder, seed=99)
    dl.load_adapter(model, tmp_path / "run" / "adapter")
    again = evaluate(MRPCTask(path=pairs, test_path=pairs), model, tokenizer, 24)
    kept = json.loads((tmp_path / "run" / "examples.json").read_text())
    assert again["accuracy"].items == kept["after"]["mrpc"]["accuracy"]


def test_it_goes_on_where_it_was_stopped(encoder, pairs, tmp_path):
    model, tokenizer = loaded(encoder, seed=5, adapt=dl.LoRA(r=2, targets="q,v"))
    data = MRPCTask(path=pairs).train()
    loop = spec(encoder, pairs, tmp_path, run=RunSpec(checkpoint_every=2))
    straight = train(model, tokenizer, data, loop, folder=tmp_path / "straight", progress=False)
    other = loaded(encoder, seed=5, adapt=dl.LoRA(r=2, targets="q,v"))[0]
    with pytest.raises(KeyboardInterrupt):
        train(other, tokenizer, data, loop, folder=tmp_path / "stopped", probes=[At(5, interrupt)], progress=False)
    fresh = loaded(encoder, seed=5, adapt=dl.LoRA(r=2, targets="q,v"))[0]
    resumed = train(fresh, tokenizer, data, loop, folder=tmp_path / "stopped", progress=False)
    assert resumed.curves["train"] == straight.curves["train"]
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)


def test_accumulation_does_not_change_the_step(encoder, pairs):
    data, ends = MRPCTask(path=pairs).train(), []
    for pieces in (1, 3):
        model, tokenizer = loaded(encoder, seed=5, adapt=dl.LoRA(r=2, targets="q,v"))
        model.config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        optim = OptimSpec(steps=4, batch=4, lr=1e-2, accumulate=pieces)
        train(model, tokenizer, data, spec(encoder, pairs, "x", optim=optim, eval=EvalSpec(fraction=0)), progress=False)
        ends.append(model.classifier.weight.detach())
    assert_close_by_norm(ends[1], ends[0], 1e-5)


def test_what_an_encoder_cannot_do(encoder, pairs, tmp_path):
    with pytest.raises(UserError, match="skills: no choices"):
        run_spec(spec(encoder, pairs, tmp_path / "a", data=[SkillsTask(n=8)]), progress=False)
    three = OwnTask(path=pairs, prompt="{sentence1}", reply="{label}", answers=("0", "1", "2"))
    with pytest.raises(UserError, match="not choices among one number"):
        run_spec(spec(encoder, pairs, tmp_path / "b", data=[three, MRPCTask(path=pairs)]), progress=False)
    with pytest.raises(UserError, match="cannot be trained on packed samples"):
        run_spec(spec(encoder, pairs, tmp_path / "c", run=RunSpec(pack=True)), progress=False)
    assert not list(tmp_path.glob("[abc]/*.json"))


def test_a_decoder_with_a_head_of_classes(pairs, tmp_path):
    record = read_record(
        run_spec(spec("organism", pairs, tmp_path / "run", head="SequenceClassification"), progress=False)
    )
    assert record["scores"]["after"]["mrpc"]["n"] == 16
    assert record["sizes"]["trained"] < 0.1 * record["sizes"]["base"]
