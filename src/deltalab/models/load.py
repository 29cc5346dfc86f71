"""Load a model and its tokenizer: from the hub, a folder, or the package itself (`organism`).

A folder is checked before it is loaded: a message names what is missing or cut off, instead of a traceback from within
a weight file. Weights are safetensors only, code that comes with a model runs only if asked for by name.
"""

import contextlib
import hashlib
import importlib.resources
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import read_json
from deltalab.core.memory import keep_few_kernels
from deltalab.deltas import adapt as deltas
from deltalab.deltas.masks import Train
from deltalab.deltas.quantise import quantise
from deltalab.models.heads import auto_class, new_head
from deltalab.models.precision import require_bfloat16
from deltalab.models.quantised import forget_reading, reading
from deltalab.quant import foreign
from deltalab.quant.base import QuantisedLinear
from deltalab.quant.linear import quantiser

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
BUNDLED = "organism"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)


def load(
    name: str | Path, *, dtype: str | torch.dtype | None = None, device_map: Any = None, revision: str | None = None,
    trust_remote_code: bool = False, head: str | None = None, labels: int | None = None, quantize: str | None = None,
    group_size: int | None = None, adapt: Any = None, seed: int = 0, calibration: deltas.Batches | None = None,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:  # fmt: skip
    """A model in eval mode, and its tokenizer with a pad token.

    name: a folder, a hub name, or the bundled `organism` (the same as `organism:chat`) and `organism:base`.
    dtype: None is float32, in which measures are defined; "auto" is the file's own.
    head: what sits on the model's body, see `deltalab.models.heads`: CausalLM, SequenceClassification, …; None is what its
    config says. labels: of a head of classes, how many. A head that the files do not have is new: drawn from `seed`, and
    trained beside what `adapt` says.
    quantize: `nf4`, `int8` or `int4-group`: the linears of the blocks become codes, in groups of `group_size` inputs (nf4:
    blocks of `group_size` weights), see `deltalab.quant`; None for the usual size. Each is quantised as it is read, so there
    is no full-precision copy of the model. A model that is quantised already, by bitsandbytes or saved from here, is
    loaded as it is.
    adapt: what to put on it at once, see `deltalab.adapt`, with its seed and calibration. A start that looks at the
    weights before they are quantised (PiSSA, OLoRA, LoftQ, EVA) has the model loaded whole first.
    Raises: UserError if a file is missing, cut off or pickled, if the file's tensors are not the model's, the hub
    cannot be reached, the model is bfloat16 where nothing here computes in it, it cannot be quantised so or is quantised in
    a way that is not read, or as `deltalab.adapt`.
    """
    keep_few_kernels()
    name = str(name)
    wanted, how = _dtype(dtype), None if quantize is None else quantiser(quantize, group_size)
    if how is None and group_size is not None:
        raise UserError(
            "group_size says how to quantise, and nothing is quantised.", next="quantize='nf4', 'int8' or 'int4-group'"
        )
    source = _source(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _told(name), _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        config = transformers.AutoConfig.from_pretrained(source, **options)
        sized = {} if labels is None else {"num_labels": labels}
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # what a new head starts with
            model, info = auto_class(config, head).from_pretrained(
                source,
                dtype=wanted,
                device_map=device_map,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # another shape is told below, by name
                **options,
                **sized,
                **reading(name, config, quantize, how, adapt),
            )
    new = [] if head is None else new_head(model, info["missing_keys"])
    _require_whole(name, model, info, new)
    if new and adapt is not None:
        adapt = [*(adapt if isinstance(adapt, (list, tuple)) else [adapt]), Train(new)]
    forget_reading(model)
    foreign.hold(model)
    _pad(model, tokenizer)
    if model.dtype is torch.bfloat16 and not torch.accelerator.is_available():
        require_bfloat16(model.device, "dtype='float32'")
    if _is_bundled(name):
        model.config._name_or_path = name  # the folder depends on the machine
    model.eval()
    if how is not None:
        streamed = [path for path, module in model.named_modules() if isinstance(module, QuantisedLinear)]
        quantise(model, how, adapt, seed=seed, calibration=calibration, streamed=streamed)
    elif adapt is not None:
        deltas.adapt(model, adapt, seed=seed, calibration=calibration)
    return model, tokenizer


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[transformers.PretrainedConfig, transformers.PreTrainedTokenizerBase]:
    """The config of a model and its tokenizer with a pad token, as `load` gives them, without the weights.

    Raises: UserError as `load`; of the weights it is looked at only whether their files are there and whole.
    """
    name = str(name)
    source = _source(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _told(name), _quiet():
        config = transformers.AutoConfig.from_pretrained(source, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    _pad_token(tokenizer)
    return config, tokenizer


def weight_bytes(name: str | Path) -> int:
    """Bytes of a model's weight files, if it is bundled or a folder; 0 for a name of the hub."""
    folder = Path(_bundled(str(name)) if _is_bundled(str(name)) else name).expanduser()
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def model_digest(model: nn.Module) -> str:
    """Twelve hex digits of the SHA-256 of the base weights, names and dtypes included; the same adapted or not."""
    digest = hashlib.sha256()
    for name, tensor in sorted(deltas.base_state(model)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _require_whole(name: str, model: nn.Module, info: dict[str, Any], new: Collection[str] = ()) -> None:
    """Raises: UserError if tensors of the model were not in the file, or in another shape. new: that need not be there."""
    missing = sorted(set(info["missing_keys"]) - set(new))
    if missing or info["mismatched_keys"]:
        what = (
            f"lacks {len(missing)} tensors, the first is {missing[0]}"
            if missing
            else f"has another shape for {next(iter(info['mismatched_keys']))[0]}"
        )
        raise UserError(f"the weights of '{name}' are not those of a {type(model).__name__}: the file {what}.",
                        found=f"{len(info['unexpected_keys'])} tensors not expected", next="check config.json, or load the model that the weights belong to")  # fmt: skip


def check_folder(folder: Path) -> None:
    """Raises: UserError unless `folder` holds a config, whole safetensors files and a tokenizer."""
    if not folder.is_dir():
        near = (
            nearest(folder.name, [p.name for p in folder.parent.iterdir() if p.is_dir()])
            if folder.parent.is_dir()
            else []
        )
        raise UserError(f"model folder '{folder}' does not exist." if not folder.exists() else f"'{folder}' is a file, a model is a folder.",
                        nearest=[str(folder.parent / n) for n in near], next="give a folder, a hub name, or 'organism'")  # fmt: skip
    there = sorted(p.name for p in folder.iterdir())
    found = ", ".join(there[:12]) or "an empty folder"
    if "config.json" not in there:
        adapter = "adapter_config.json" in there
        raise UserError(f"model folder '{folder}' has no config.json.", found=found,
                        next=f"this is an adapter: load its base model, then deltalab.load_adapter(model, '{folder}')" if adapter
                        else "point to the folder that save_pretrained wrote")  # fmt: skip
    config = read_json(folder / "config.json", "model config")
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"'{folder / 'config.json'}' names no model_type.", next="copy the config of the model again")
    for file in _weight_files(folder, there, found):
        try:
            with safetensors.safe_open(file, framework="pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"weight file '{file}' is damaged or cut off.", found=f"{file.stat().st_size:,} bytes; {error}",
                            next="copy or download it again") from None  # fmt: skip
    if not set(there) & set(TOKENIZER_FILES):
        raise UserError(
            f"model folder '{folder}' has no tokenizer.",
            found=found,
            next="copy tokenizer.json and tokenizer_config.json there",
        )


def _weight_files(folder: Path, there: list[str], found: str) -> list[Path]:
    if "model.safetensors" in there:
        return [folder / "model.safetensors"]
    index = "model.safetensors.index.json"
    if index not in there:
        pickled = [name for name in there if name.endswith((".bin", ".pt", ".pth"))]
        raise UserError(f"model folder '{folder}' has no model.safetensors.", found=found,
                        next=f"{pickled[0]} is pickled and not read: convert it with save_pretrained" if pickled else "copy the weights there")  # fmt: skip
    shards = sorted(set(read_json(folder / index, "weight index").get("weight_map", {}).values()))
    missing = [name for name in shards if name not in there]
    if missing or not shards:
        raise UserError(f"model folder '{folder}' lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing[:3])}.", found=found,
                        next="copy or download them again")  # fmt: skip
    return [folder / name for name in shards]


def _is_bundled(name: str) -> bool:
    return name.split(":")[0] == BUNDLED


def _source(name: str) -> str:
    """Where transformers finds the model: a folder that was checked, or a name of the hub."""
    source = _bundled(name) if _is_bundled(name) else name
    if _is_bundled(name) or Path(source).exists() or source.startswith((".", "/", "~")):
        source = str(Path(source).expanduser())
        check_folder(Path(source))
    return source


def _bundled(name: str) -> str:
    """The folder of a bundled model: `organism/weights/<name>` in the package."""
    which = name.partition(":")[2] or "chat"
    weights = Path(str(importlib.resources.files("deltalab"))) / BUNDLED / "weights"
    there = sorted(p.name for p in weights.iterdir() if (p / "config.json").is_file()) if weights.is_dir() else []
    if which not in there:
        raise UserError(f"the bundled model '{name}' is not there.", found=f"{', '.join(f'{BUNDLED}:{n}' for n in there) or 'no bundled models'}",
                        nearest=nearest(name, [f"{BUNDLED}:{n}" for n in there]), next="python -m deltalab.organism build")  # fmt: skip
    return str(weights / which)


def _dtype(dtype: str | torch.dtype | None) -> Any:
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise UserError(
            f"'{dtype}' is no dtype for a model.", nearest=nearest(dtype, [*DTYPES, "auto"]) or [*DTYPES, "auto"]
        )
    return DTYPES[dtype]


def _pad(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """A pad token for batches, known to the model too."""
    _pad_token(tokenizer)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


def _pad_token(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """The end token where the tokenizer has no pad token."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """What transformers raises while it loads, as a user's error."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    here = sorted(str(p.parent) for p in Path().glob("*/config.json"))
    if isinstance(error, OSError) and not Path(name).exists():
        return UserError(f"model '{name}' is no folder, and the hub does not give it.", found=text[:300], nearest=[*nearest(name, here), BUNDLED],
                         next="check the name and the network, or give a folder")  # fmt: skip
    hint = (
        "pass trust_remote_code=True if you trust its code"
        if "trust_remote_code" in text
        else "check that its files are whole, and that transformers knows this kind of model"
    )
    return UserError(f"model '{name}' cannot be loaded.", found=text[:300], next=hint)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no report of transformers while a model loads: what is missing is told by `_require_whole`."""
    logging = transformers.utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
