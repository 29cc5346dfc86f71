"""Which class of transformers loads a model: by the class that its config names, or by the head that is asked for."""

import contextlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto import modeling_auto as auto

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import read_json
from deltalab.core.tensors import read_tensors
from deltalab.deltas.peft_format import CONFIG, WEIGHTS

HEADS: dict[str, tuple[Any, Any]] = {
    "CausalLM": (transformers.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "Seq2SeqLM": (transformers.AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "MaskedLM": (transformers.AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "SequenceClassification": (
        transformers.AutoModelForSequenceClassification, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "TokenClassification": (
        transformers.AutoModelForTokenClassification, auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "QuestionAnswering": (
        transformers.AutoModelForQuestionAnswering, auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
    "none": (transformers.AutoModel, auto.MODEL_MAPPING_NAMES),
}  # fmt: skip
"""Head -> the class that loads such a model, and the classes that have the head, by model type; `none` is the body."""


ENCODERS = ("none", "MaskedLM", "SequenceClassification")
"""Heads of models that read a text and write none."""


def is_encoder(config: transformers.PretrainedConfig) -> bool:
    """Whether what a config names gives no text."""
    return auto_class(config, None) in {HEADS[head][0] for head in ENCODERS}


def is_classifier(model: nn.Module) -> bool:
    """Whether a model has an output for each of some classes."""
    return type(model).__name__.endswith("ForSequenceClassification")


def require_writer(model: transformers.PreTrainedModel) -> None:
    """Raises: UserError if a model writes no text."""
    if not model.can_generate():
        raise UserError(f"a {type(model).__name__} reads texts and writes none.",
                        next="a causal model; or `deltalab train` on tasks of choices: sst2, rte, mrpc, rows with answers")  # fmt: skip


def new_head(model: nn.Module, missing: Collection[str]) -> list[str]:
    """The parameters of a head that are missing in a model's files, if all of a head are; else none."""
    body = f"{getattr(model, 'base_model_prefix', '')}."
    head = [name for name, _ in model.named_parameters() if not name.startswith(body)]
    return head if head and len(head) < len(list(model.parameters())) and set(head) <= set(missing) else []


OF_TASK = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}
"""peft's word for a task -> the head that a model is given for it."""
CLASSES = re.compile(r"\.(classifier|score)(\.out_proj)?\.weight$")
"""The last matrix of a head of classes, classes × hidden."""


def head_for(adapter: str | Path) -> dict[str, Any]:
    """What `load` is asked for so that an adapter fits the model: its head and, where the adapter holds that, the classes it has.

    Nothing for an adapter of what the model is by itself, or where no such file can be read, which loading the adapter tells.
    """
    config, weights = Path(adapter) / CONFIG, Path(adapter) / WEIGHTS
    if not (config.is_file() and weights.is_file()):
        return {}
    said = read_json(config, "adapter config")
    head = OF_TASK.get(str(said.get("task_type"))) if isinstance(said, dict) else None
    if head is None:
        return {}
    counts: list[int] = []
    with contextlib.suppress(SafetensorError):
        counts = [tensor.shape[0] for key, tensor in read_tensors(weights).items() if CLASSES.search(key)]
    return {"head": head, "labels": counts[0] if counts else None}


def auto_class(config: transformers.PretrainedConfig, head: str | None) -> Any:
    """The class that loads the model of `config`. head: a key of `HEADS`, or None for what the config's class has; a
    config that names no class, or one that is not known, is taken for a causal language model.

    Raises: UserError for an unknown head.
    """
    if head is not None:
        if head not in HEADS:
            raise UserError(f"'{head}' is no head of a model.", nearest=nearest(head, HEADS) or list(HEADS))
        return HEADS[head][0]
    for named in config.architectures or []:
        for loader, classes in HEADS.values():
            if any(named == found or (isinstance(found, tuple) and named in found) for found in classes.values()):
                return loader
    return transformers.AutoModelForCausalLM
