"""The organism's own training: a stopped run is taken up again, bit for bit, and nothing is pickled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from deltalab.core.errors import UserError
from deltalab.organism.paths import organism_path
from deltalab.organism.recipe import BASE_MIX, CHAT_MIX
from deltalab.organism.training import TrainSpec, new_model, train

SPECS = [
    TrainSpec("base", seed=3, steps=3, examples=6, lr=1e-3, mix=BASE_MIX, warmup=1),
    TrainSpec("chat", seed=3, steps=3, examples=6, lr=1e-3, mix=CHAT_MIX, warmup=1, muon=False),
]


class StoppedError(Exception):
    pass


def run(spec: TrainSpec, folder: Path, stop_after: int | None = None) -> dict[str, torch.Tensor]:
    tok = Tokenizer.from_file(str(organism_path("base") / "tokenizer.json"))

    def report(model: object, step: int) -> str:
        if stop_after is not None and step + 1 >= stop_after:
            raise StoppedError
        return ""

    model = train(new_model(tok.get_vocab_size(), spec.seed), tok, spec, folder, report, every=1, save_every=1)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_a_stopped_run_ends_bitwise_like_an_undisturbed_one(spec, tmp_path):
    whole = run(spec, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(spec, tmp_path / "cut", stop_after=2)
    assert [p.suffix for p in (tmp_path / "cut").glob(f"{spec.name}.*")].count(".safetensors") == 1
    resumed = run(spec, tmp_path / "cut")
    start = dict(new_model(whole["model.embed_tokens.weight"].shape[0], spec.seed).named_parameters())
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
        assert not torch.equal(start[name], tensor), f"{name} did not train"


def test_a_checkpoint_of_another_spec_is_refused(tmp_path):
    run(SPECS[0], tmp_path)
    with pytest.raises(UserError, match="another spec"):
        run(replace(SPECS[0], lr=2e-3), tmp_path)
