"""One adapter said in our words and in peft's, and what has to hold between the two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import nn

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.peft_format import write_adapter
from deltalab.deltas.sites import place
from tests.deltas.perturb import perturbed
from tests.families import model_of
from tests.helpers import assert_close_by_norm, error_by_norm, tokens


class Case(NamedTuple):
    """ours and theirs mean the same on `family`; prepare changes the base model first."""

    family: str
    ours: Any
    theirs: Callable[[], peft.PeftConfig]
    prepare: Callable[[nn.Module], Any] = lambda model: None

    def base(self) -> nn.Module:
        model = model_of(self.family)
        self.prepare(model)
        return model.eval()


def moved(model: nn.Module, size: float) -> nn.Module:
    """A peft model whose every trained tensor does something, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Without labels: peft's AdaLoRA adds its penalty to a loss, and fails to on a loaded adapter."""
    ids = tokens()
    return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


def bound(case: Case) -> float:
    return 2e-2 if case.family == "llama-bf16" else 1e-5  # the two round elsewhere


def size(case: Case) -> float:
    return 0.3 if case.family == "llama-bf16" else 0.1


def wrapped_by_peft(model: nn.Module) -> set[str]:
    """Paths of the linears and embeddings that have a delta of peft."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    return {name.removeprefix("base_model.model.") for name, m in layers if not hasattr(m, "parameter_name")}


def trained(model: nn.Module) -> dict[str, torch.Size]:
    """Name -> shape of all that trains."""
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def check_that_peft_loads_what_we_save(case: Case, folder: Path) -> None:
    ours = perturbed(dl.adapt(case.base(), case.ours), size(case))
    write_adapter(ours, folder)
    theirs = peft.PeftModel.from_pretrained(case.base(), folder).eval()
    assert error_by_norm(logits(ours), logits(case.base())) > max(1e-3, 2 * bound(case))
    assert_close_by_norm(logits(theirs), logits(ours), bound(case))
    again = dl.load_adapter(case.base(), folder)
    assert torch.equal(logits(again), logits(ours))
    assert trained(again) == trained(ours)


def check_that_we_load_what_peft_saves(case: Case, folder: Path) -> None:
    moved(peft.get_peft_model(case.base(), case.theirs()), size(case)).save_pretrained(folder / "theirs")
    theirs = peft.PeftModel.from_pretrained(case.base(), folder / "theirs").eval()
    ours = dl.load_adapter(case.base(), folder / "theirs")
    assert error_by_norm(logits(theirs), logits(case.base())) > max(1e-3, 2 * bound(case))
    assert_close_by_norm(logits(ours), logits(theirs), bound(case))
    assert trained(ours) == trained(dl.adapt(case.base(), case.ours))
    dl.save_adapter(ours, folder / "ours")
    back = peft.PeftModel.from_pretrained(case.base(), folder / "ours").eval()
    assert_close_by_norm(logits(back), logits(theirs), bound(case))


def check_that_a_config_of_peft_is_taken_for_a_spec(case: Case) -> None:
    ours = dl.adapt(case.base(), case.theirs())
    theirs = peft.get_peft_model(case.base(), case.theirs())
    assert trained(ours) == trained(dl.adapt(case.base(), case.ours))
    assert {path for path in attached(ours) if place(ours, path).kind != "experts"} == wrapped_by_peft(theirs)
    there = {id(p): p.numel() for n, p in theirs.named_parameters() if p.requires_grad and "ranknum" not in n}
    assert dl.trainable(ours).count == sum(there.values())  # under a 16-bit model AdaLoRA's count of ranks "trains"
