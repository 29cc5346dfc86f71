"""EVA: a start from activations, against peft and against a plain decomposition of the inputs."""

import numpy as np
import peft
import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA

import deltalab as dl
from deltalab.deltas import moments
from deltalab.deltas.adapt import attached
from tests.deltas.perturb import perturbed, states_equal
from tests.helpers import assert_close_by_norm, tiny_llama, tokens


def batches():
    """Three batches with padding, one of which has labels for a part."""
    found = [
        {"input_ids": tokens(4, 20, seed=i), "attention_mask": torch.ones(4, 20, dtype=torch.long)} for i in range(3)
    ]
    found[1]["attention_mask"][:2, 12:] = 0
    found[2]["labels"] = found[2]["input_ids"].masked_fill(torch.arange(20) < 7, -100)
    return found


def inputs_of(model, path, found):
    """The inputs of a linear at the tokens that count, by a hook of its own."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    for batch in found:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    counted = [b["attention_mask"].bool() & (b.get("labels", b["input_ids"]) != -100) for b in found]
    return torch.cat([x[mask] for x, mask in zip(seen, counted, strict=True)])


@pytest.mark.parametrize("room", [1 << 32, 1])
def test_eva_takes_the_directions_in_which_inputs_vary(room, monkeypatch):
    monkeypatch.setattr(moments, "AT_ONCE", room)
    spec = dl.LoRA(init="eva", r=4, targets=["q_proj", "down_proj"])
    model = dl.adapt(tiny_llama(), spec, calibration=batches())
    assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)
    for path, delta in attached(model).items():
        x = inputs_of(tiny_llama(), path, batches()).double()
        pca = IncrementalPCA(n_components=x.shape[1])
        for part in (x[:60], x[60:130], x[130:]):
            pca.partial_fit(part)
        for components in (np.linalg.svd((x - x.mean(0)).numpy())[2], pca.components_):
            alike = (delta.A * torch.as_tensor(components[:4])).sum(-1).abs()
            assert_close_by_norm(alike, torch.ones(4, dtype=torch.float64), 1e-5)
        assert not delta.B.any()


def test_eva_is_what_peft_finds():
    """On inputs whose variance falls off, so that peft's truncated decomposition of the streamed batches is close."""

    def falling():
        model = tiny_llama()
        model.model.embed_tokens.weight.data *= torch.logspace(0, -2, 32)
        return model

    found = batches()[1]
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], layers_to_transform=[0], init_lora_weights="eva", task_type="CAUSAL_LM",
        eva_config=peft.EvaConfig(rho=1.0, tau=0.9999),
    )  # fmt: skip
    model = peft.get_peft_model(falling(), config)
    peft.initialize_lora_eva_weights(model, [found], show_progress_bar=False)
    mine = dl.adapt(falling(), dl.LoRA(init="eva", r=4, targets=["q_proj"], layers=[0]), calibration=[found])
    their = peft.get_peft_model_state_dict(model)
    for path, delta in attached(mine).items():
        A, their_A = delta.A, their[f"base_model.model.{path}.lora_A.weight"]
        assert_close_by_norm(A.mT @ A, their_A.mT @ their_A, 1e-2)


@pytest.mark.parametrize("stabilised", [False, True])
def test_ranks_go_where_the_directions_say_most(stabilised, tmp_path):
    spec = dl.LoRA(init="eva", r=4, rho=2, targets="all-linear", rank_pattern={"o_proj": 3}, rank_stabilised=stabilised)
    model, plain = dl.adapt(tiny_llama(), spec, calibration=batches()), tiny_llama()
    before = spec.each(dl.select(plain, "all-linear").names)
    shares = []
    for path, own in before.items():
        x = inputs_of(plain, path, batches()).double()
        pca = IncrementalPCA(n_components=x.shape[1])
        pca.fit(x)
        shares += [(float(share), path) for share in pca.explained_variance_ratio_[: 2 * own.r]]
    best = [path for _, path in sorted(shares, reverse=True)[: sum(own.r for own in before.values())]]
    want = {path: best.count(path) for path in before if path in best}
    assert {path: len(delta.A) for path, delta in attached(model).items()} == want
    assert len(set(want.values())) > 2
    assert [delta.s for delta in attached(model).values()] == pytest.approx([before[path].scale for path in want])
    perturbed(model)
    dl.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert_close_by_norm(theirs(tokens()).logits, model(tokens()).logits, 1e-5)
    again = dl.load_adapter(tiny_llama(), tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_ranks_are_shared_out_as_in_peft(tmp_path):
    """peft's config for a config, and its file, whose ranks are final, read as they are."""
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="eva", task_type="CAUSAL_LM",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.999),
    )  # fmt: skip
    mine = dl.adapt(tiny_llama(), config, calibration=[batches()[1]])
    theirs = peft.get_peft_model(tiny_llama(), config)
    peft.initialize_lora_eva_weights(theirs, [batches()[1]], show_progress_bar=False)
    theirs.save_pretrained(tmp_path)
    read = dl.load_adapter(tiny_llama(), tmp_path)
    for model in (mine, read):
        assert sum(len(delta.A) for delta in attached(model).values()) == 12
        assert {delta.s for delta in attached(model).values()} == {4.0}
    state = peft.get_peft_model_state_dict(theirs)
    assert all(torch.equal(d.A, state[f"base_model.model.{path}.lora_A.weight"]) for path, d in attached(read).items())


def test_eva_says_what_it_lacks():
    with pytest.raises(dl.UserError, match="calibration=batches"):
        dl.adapt(tiny_llama(), dl.LoRA(init="eva"))
    with pytest.raises(dl.UserError, match="no 4 directions in 3 tokens"):
        dl.adapt(tiny_llama(), dl.LoRA(init="eva", r=4), calibration=[{"input_ids": tokens(1, 3)}])
    with pytest.raises(dl.UserError, match="embed_tokens' is none"):
        dl.adapt(tiny_llama(), dl.LoRA(init="eva", r=4, targets=["embed_tokens"]), calibration=batches())


def test_moments_in_pieces_are_those_of_the_whole():
    x = torch.randn(50, 6, dtype=torch.float64) + 100
    seen = moments.Moments()
    for part in x.split([1, 0, 20, 29]):
        seen.add(part)
    assert seen.count == 50
    assert_close_by_norm(seen.mean, x.mean(0), 1e-12)
    assert_close_by_norm(seen.scatter, 49 * torch.cov(x.T), 1e-10)


def test_loading_and_adapting_in_one_go(tmp_path):
    spec = dl.LoRA(init="eva", r=2, targets=["q_proj"])
    found = [{"input_ids": tokens(vocab=200)}]
    one, _ = dl.load("organism:base", adapt=spec, seed=3, calibration=found)
    two = dl.adapt(dl.load("organism:base")[0], spec, seed=3, calibration=found)
    assert states_equal(one, two)
