"""`save_pretrained` of a model with quantised linears, in a form that loads again.

config.json says how the linears are quantised (`quantization_config`), the weight files hold what they keep, see
`deltalab.quant.stored`. Which linears are quantised the files say themselves, so a model where some are plain again, as
merging may leave it, needs no other form. `deltalab.load` reads it.

NF4 is saved as bitsandbytes has it, and transformers reads it where that is installed, but for a model of which it would
leave some of these linears in fp32 (T5). What is saved otherwise transformers reads once `deltalab.models.quantised` is
imported; without that it refuses the shapes.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from deltalab.core.errors import UserError
from deltalab.core.files import disk_faults, replacing
from deltalab.deltas.select import model_name
from deltalab.deltas.sites import linears
from deltalab.quant.base import QuantisedLinear
from deltalab.quant.nf4_linear import NF4Linear
from deltalab.quant.stored import kind, stored

METHOD, BITSANDBYTES = "deltalab", "bitsandbytes"
"""The `quant_method` in config.json: our own, and that of NF4."""


def save_whole(
    model: nn.Module, save_directory: str | Path, is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None, **options: Any,
) -> None:  # fmt: skip
    """`save_pretrained` of the model's own class, of a quantised model in its saved form; of an adapted one the base alone.

    A quantised model is written beside its place first: a new folder appears whole. Into a folder that is there, which
    may hold a tokenizer, each file is moved whole, config.json last.
    Raises: UserError if linears are quantised in two ways, or the disk is full.
    """
    own: Any = type(model)
    held = {path: module for path, module in model.named_modules() if isinstance(module, QuantisedLinear)}
    if not held:
        own.save_pretrained(model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **options)
        return
    if not is_main_process:
        return
    form = saved_form(model, held)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for path, linear in held.items():
        for key in linear._buffers:
            state.pop(f"{path}.{key}", None)
        state |= {f"{path}.{key}": tensor for key, tensor in stored(linear).items()}
    # under the names that the model has now: what transformers fuses or parts on saving it would do to codes as well
    options |= {"save_original_format": False, "state_dict": state}
    config: Any = model.config
    config.quantization_config = form
    try:
        _write(own, model, Path(save_directory), options)
    finally:
        del config.quantization_config


def saved_form(model: nn.Module, held: Mapping[str, QuantisedLinear]) -> dict[str, Any]:
    """What config.json says of the quantised linears `held`. Raises: UserError if they are quantised in two ways."""
    kinds = {kind(linear): path for path, linear in held.items()}
    if len(kinds) > 1:
        raise UserError(
            f"the linears of {model_name(model)} are quantised in {len(kinds)} ways, and a saved model has one.",
            found=", ".join(f"'{path}': {name}" for name, path in kinds.items()),
        )
    one, plain = next(iter(held.values())), [path for path in linears(model) if path not in held]
    kept: Any = getattr(model, "_keep_in_fp32_modules", None) or []  # which bitsandbytes' loader leaves as they are
    if not isinstance(one, NF4Linear) or not all(should_convert_module(path, [*plain, *kept]) for path in held):
        return {"quant_method": METHOD, "quantize": kind(one)}
    return {
        "quant_method": BITSANDBYTES,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": one.double_quant,
        "bnb_4bit_compute_dtype": str(one.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": plain,
    }


def _write(own: Any, model: nn.Module, folder: Path, options: dict[str, Any]) -> None:
    if options.get("push_to_hub"):  # goes by the folder's name
        own.save_pretrained(model, folder, **options)
    elif not folder.exists():
        with replacing(folder) as tmp:
            own.save_pretrained(model, tmp, **options)
    else:
        with disk_faults(folder), tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as tmp:
            own.save_pretrained(model, tmp, **options)
            new = {file.name: file for file in Path(tmp).iterdir()}
            for name in sorted(new, key=lambda name: name == "config.json"):
                new[name].replace(folder / name)
            for file in (*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")):
                if file.name not in new:
                    file.unlink()  # of another model, and a loader would take it for this one's


class Saves:
    """`save_pretrained` of a model that was quantised. It is copied and pickled with its model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **options: Any) -> None:
        save_whole(self.model, *args, **options)
