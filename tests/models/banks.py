"""Adapters of every method and rank on one tiny base, for the tests of the bank."""

import copy
import functools
import random

import torch

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.base import shape_of
from tests.deltas.perturb import perturbed
from tests.helpers import byte_tokenizer, tiny_llama

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


def bank_of(*names):
    base, models = many()
    return dl.AdapterBank(copy.deepcopy(base), dict.fromkeys(names, models["a0"]), byte_tokenizer())
