"""Models whose linears become codes as they are read, and the saved form of such models, as transformers loads them.

transformers reads a file tensor by tensor, in model order. What it hands over of a linear of the blocks (the weight, or
what a saved form keeps in its place) becomes a quantised linear on the spot and takes the place of the plain one, which
never had memory: the most that is there at a time is the quantised model, its embeddings and one matrix.

Importing this module makes the saved form known to transformers, so that `from_pretrained` reads it.
"""

import abc
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from deltalab.core.errors import UserError
from deltalab.core.memory import give_back
from deltalab.deltas.adapt import planned
from deltalab.deltas.base import shape_of, weight_of
from deltalab.deltas.quantise import require_finite, require_fit, require_left
from deltalab.deltas.save import BITSANDBYTES, METHOD, Saves
from deltalab.deltas.select import block_linears
from deltalab.quant.base import QuantisedLinear, Quantiser, Quantising
from deltalab.quant.stored import KEYS, restored


@register_quantization_config(METHOD)
class CodesConfig(QuantizationConfigMixin):
    """How the linears of a model are quantised, or, with a quantiser, will be while they are read.

    quantize: the name of the way, see `deltalab.quant.linear.quantiser`. quantiser: what makes the linears. adapt: what
    will be put on the model at once, see `deltalab.adapt`.
    """

    def __init__(self, quantize: str, quantiser: Quantiser | None = None, adapt: Any = None, **rest: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.quantize, self.quantiser, self.adapt = quantize, quantiser, adapt

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "quantize": self.quantize}


@register_quantizer(METHOD)
class CodesQuantizer(HfQuantizer):
    """Quantises the linears of the blocks as their weights are read, or reads them from the saved form."""

    quantization_config: CodesConfig
    serialized_names = {"weight": list(KEYS)}
    is_trainable = True

    def validate_environment(self, *args: Any, device_map: Any = None, **given: Any) -> None:
        """Raises: UserError for several devices, where the linears would be moved about as they compute."""
        if isinstance(device_map, Mapping):
            require_one_device(device_map)

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, dtype: Any = None, **given: Any) -> None:
        """Decide on the linears. The model holds no weights yet, and its class has not tied any."""
        self.linears: dict[str, nn.Module] = {}
        self.faults: list[UserError] = []
        quantiser = self.quantization_config.quantiser
        if self.pre_quantized or quantiser is None:
            return
        about = Quantising(quantiser, block_linears(model, "quantising"))
        require_fit(about)
        plan = None if self.quantization_config.adapt is None else planned(model, self.quantization_config.adapt)
        if plan is not None:
            require_left(about, plan)
        if plan is None or not any(group.spec.looks for group in plan.groups):
            tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
            self.linears = {path: m for path, m in about.linears.items() if f"{path}.weight" not in tied}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **given: Any) -> bool:
        return param_name.removesuffix(".weight") in self.linears

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes an entry, by which transformers plans where the model fits."""
        quantiser = self.quantization_config.quantiser
        if quantiser is None or not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        W = weight_of(self.linears[param_name.removesuffix(".weight")])
        return sum(kept.nbytes for kept in quantiser.linear(W, None, W.dtype).buffers()) / W.numel()

    def get_quantize_ops(self) -> "Quantise":
        return Quantise(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": Restore}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Of the saved form: a tensor by itself is the model's; one that comes after a linear's codes is kept as it is."""
        is_float = param.get_dtype().startswith(("F", "BF"))
        return dtype if is_float and not converter.collected_tensors else None

    def postprocess_model(self, model: PreTrainedModel, **given: Any) -> PreTrainedModel:
        """Leave a model of quantised linears and no trace of how it was read: it moves and trains as any.

        Raises: UserError, the first of the mistakes that were found in the tensors; or for several devices.
        """
        if self.faults:
            raise self.faults[0]
        require_one_device(getattr(model, "hf_device_map", None) or {})
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(name, None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        forget_reading(model)
        for module in model.modules():
            if isinstance(module, QuantisedLinear):
                module.__dict__.pop("_is_hf_initialized", None)
                model.save_pretrained = Saves(model)  # type: ignore[method-assign]
        return model


class Operation(ConversionOps):
    """Takes what was read of a linear and puts a quantised one in its place."""

    def __init__(self, hf_quantizer: CodesQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "Operation":
        """transformers copies an operation for every tensor; what it finds goes to the one quantizer."""
        return self

    def convert(self, input_dict: dict[str, Any], *patterns: list[str], **given: Any) -> dict[str, Any]:
        """What is left for transformers to put in place."""
        model, missing = given["model"], given["missing_keys"]
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        try:
            made = self.made(model, given["full_layer_name"].removesuffix(".weight"), tensors)
        except UserError as error:  # of what is raised here transformers makes a text: `postprocess_model` raises it
            self.hf_quantizer.faults.append(error)
            missing -= {given["full_layer_name"], *input_dict}
            return {}
        for path, linear in made.items():
            linear._is_hf_initialized = True  # type: ignore[assignment]  # there is nothing to draw
            model.set_submodule(path, linear)
            missing.discard(f"{path}.weight")
        return tensors

    @abc.abstractmethod
    def made(self, model: nn.Module, path: str, tensors: dict[str, Tensor]) -> dict[str, QuantisedLinear]:
        """The linears, by path, that are made of `tensors`, which are taken out there. path: of the first."""


class Quantise(Operation):
    """The weights of linears, by their names, in the model's dtype, to codes."""

    def made(self, model: nn.Module, path: str, tensors: dict[str, Tensor]) -> dict[str, QuantisedLinear]:
        linears, made = self.hf_quantizer.linears, {}
        quantiser = self.hf_quantizer.quantization_config.quantiser
        assert quantiser is not None
        for name in list(tensors):
            path = name.removesuffix(".weight")
            linear = linears.get(path)
            if linear is None or tensors[name].shape != linear.weight.shape:  # type: ignore[union-attr]
                linears.pop(path, None)  # another shape is told of as that of any other tensor
                continue
            W = tensors.pop(name)
            require_finite(path, W)
            W = W.mT if isinstance(linear, Conv1D) else W
            made[path] = quantiser.linear(W, linear.bias, W.dtype)  # type: ignore[arg-type]
            give_back()
        return made


class Restore(Operation):
    """What a saved form keeps of a linear to the linear."""

    def made(self, model: nn.Module, path: str, tensors: dict[str, Tensor]) -> dict[str, QuantisedLinear]:
        if len(tensors) == 1:  # a weight as it is
            return {}
        plain: Any = model.get_submodule(path)
        name = self.hf_quantizer.quantization_config.quantize
        try:
            made = restored(name, tensors, shape_of(plain), plain.bias, plain.weight.dtype)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"'{path}': {error.asked}", found=error.found, next=error.next) from None
        tensors.clear()
        return {path: made}


def reading(
    name: str, config: PretrainedConfig, quantize: str | None, quantiser: Quantiser | None, adapt: Any
) -> dict[str, Any]:
    """Arguments for `from_pretrained`, by what a model's config says of how it is quantised and what is asked for.

    Raises: UserError if it is quantised already and should be again, or in a way that is not read here.
    """
    holder = next((c for c in (config, config.get_text_config()) if getattr(c, "quantization_config", None)), None)
    if holder is None:
        return {} if quantize is None else {"quantization_config": CodesConfig(quantize, quantiser, adapt)}
    said = dict(holder.quantization_config)
    method, way = _way(said)
    if quantize is not None:
        raise UserError(
            f"'{name}' is quantised already, so it is not quantised to '{quantize}'.",
            found=f"{method}, {way}",
            next="leave quantize out, or load the model that it was made from",
        )
    if method == METHOD:
        return {}
    if method != BITSANDBYTES:
        raise UserError(
            f"'{name}' is quantised by {method}, whose weights are not read here.",
            found=f"read are: {METHOD}, {BITSANDBYTES}",
            next="load the model that it was made from, with quantize='nf4' if it should be small",
        )
    if way == "nf4" and said.get("bnb_4bit_quant_storage", "uint8") == "uint8":
        holder.quantization_config = CodesConfig("nf4").to_dict()
        return {"config": config}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"'{name}' is quantised by bitsandbytes ({way}), which is not installed.",
            next="pip install 'deltalab[quant]'",
        )
    return {}


def _way(said: Mapping[str, Any]) -> tuple[str, str]:
    """(what quantised a model, how)."""
    if said.get("load_in_8bit"):
        return BITSANDBYTES, "int8"
    if said.get("load_in_4bit"):
        return BITSANDBYTES, str(said.get("bnb_4bit_quant_type", "fp4"))
    method = said.get("quant_method")
    return str(getattr(method, "value", method)), str(said.get("quantize", said.get("bits", "")))


def require_one_device(device_map: Mapping[str, Any]) -> None:
    """Raises: UserError if a model is spread over several devices."""
    devices = sorted({str(device) for device in device_map.values()})
    if len(devices) > 1:
        raise UserError(
            f"a model that is quantised here stays on one device, and device_map spreads it over {len(devices)}.",
            found=", ".join(devices),
            next="device_map={'': 'cuda:0'}, or load without quantize",
        )


def forget_reading(model: nn.Module) -> None:
    """transformers undoes on saving what it did on reading, and cannot for what a quantizer did."""
    done: list[Any] = getattr(model, "_weight_conversions", None) or []
    left = [c for c in done if not any(hasattr(op, "hf_quantizer") for op in getattr(c, "operations", ()))]
    model._weight_conversions = left  # type: ignore[assignment]
