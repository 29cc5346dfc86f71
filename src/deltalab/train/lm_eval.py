"""Tasks of EleutherAI's lm-evaluation-harness on a model at hand, adapted or not: lm-eval does the work, here is what it gets and
what becomes of its results (Gao et al. 2021, doi:10.5281/zenodo.5371628).
"""

import contextlib
import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import NonNegativeInt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import owned, write_text
from deltalab.core.records import read_record, write_record
from deltalab.core.spec import Spec
from deltalab.core.stats import t_interval, wilson
from deltalab.data.metrics import Measure, Measures
from deltalab.data.tasks.lm_eval import LMEvalTask
from deltalab.deltas.peft_format import load_adapter
from deltalab.models.heads import require_writer
from deltalab.models.load import load, model_digest
from deltalab.quant.linear import Quantisation
from deltalab.train.rng import kept


def run_lm_eval(
    task: LMEvalTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, bootstrap: int = 0, progress: bool = False
) -> dict[str, Any]:  # fmt: skip
    """What `lm_eval.simple_evaluate` returns, samples included; nothing but `{}` in a process that is not the first of its machine.

    bootstrap: draws for lm-eval's own standard errors, which it has only then; 100,000 is its default, and takes long where a
    measure is no mean. progress: whether its bars are shown, on a terminal. Random states, the model's mode and its weights stay as they are.
    Raises: UserError if lm-eval is not installed, a task is unknown, cannot be loaded or asks for what the model has not.
    """
    _require_able(model, tokenizer, task)
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            "tasks of lm-eval need lm-eval.", found=str(error), next="pip install 'deltalab[eval]'"
        ) from None
    mode = model.training
    try:
        with kept(), _hushed(progress):
            manager, tasks = _loaded(task)
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=task.batch_size, max_length=task.max_length),
                tasks=tasks, num_fewshot=task.num_fewshot, limit=task.limit, bootstrap_iters=bootstrap,
                apply_chat_template=task.apply_chat_template, gen_kwargs=dict(task.gen_kwargs) or None, log_samples=True,
                task_manager=manager,
            )  # fmt: skip
    except AssertionError as error:  # lm-eval's word for lengths that do not fit
        if not str(error):
            raise
        raise UserError("lm-eval cannot ask this model what the tasks ask.", found=str(error),
                        next="fewer tokens of a reply: gen_kwargs max_gen_toks=64; or a larger max_length") from error  # fmt: skip
    finally:
        model.train(mode)
    return found or {}


class Asked(Spec):
    """An evaluation by itself: which model, with which adapter, is asked what. bootstrap: see `run_lm_eval`."""

    model: str
    adapter: str | None = None
    quantize: Quantisation | None = None
    dtype: str = "auto"
    bootstrap: NonNegativeInt = 0
    ask: LMEvalTask


class Judged(NamedTuple):
    """measures: task -> measure -> value and, of a mean, low and high of its 95 % and n. results: lm-eval's, as JSON, without samples."""

    measures: dict[str, dict[str, dict[str, Any]]]
    results: dict[str, Any]


def evaluate_asked(
    spec: Asked, folder: Path | None = None, *, device_map: Any = None, progress: bool = False
) -> Judged:
    """Load, put the adapter on, have it judged; with a folder, write `samples/<task>.jsonl` and `record.json` there.

    Raises: UserError as `run_lm_eval`, as `deltalab.load`, or for a folder that holds the record of something else.
    """
    with contextlib.nullcontext() if folder is None else owned(folder, "eval"):
        if folder is not None and (folder / "record.json").is_file() and read_record(folder)["digest"] != spec.digest():
            raise UserError(
                f"'{folder}' already holds the record of another spec.", next="choose another output folder"
            )
        began = time.monotonic()
        model, tokenizer = load(spec.model, dtype=spec.dtype, quantize=spec.quantize, device_map=device_map)
        require_writer(model)
        if spec.adapter is not None:
            load_adapter(model, spec.adapter)
        raw = run_lm_eval(spec.ask, model, tokenizer, bootstrap=spec.bootstrap, progress=progress)
        every = measures(raw, all_of_groups=True)
        said = {name: {called: _said(one) for called, one in of.items()} for name, of in every.items()}
        samples = raw.pop("samples", {})
        found = Judged(said, _as_json(raw))
        if folder is not None:
            for name, rows in samples.items():
                lines = [json.dumps(_as_json(row), ensure_ascii=False) for row in rows]
                write_text(
                    folder / "samples" / f"{name.replace('/', '_')}.jsonl", "".join(f"{line}\n" for line in lines)
                )
            write_record(folder, "eval", spec, {"seconds": round(time.monotonic() - began, 1), "base": model_digest(model),
                                                "measures": found.measures, "results": found.results})  # fmt: skip
    return found


def _said(measure: Measure) -> dict[str, Any]:
    """The value; of a share Wilson's 95 %, of another mean Student's."""
    items = measure.items
    if items is None:
        return {"value": measure.value}
    if set(items) <= {0.0, 1.0}:
        wide = wilson(round(sum(items)), len(items))
    elif len(items) > 1:
        wide = t_interval(items)
    else:
        return {"value": measure.value, "n": len(items)}
    return {"value": measure.value, "low": wide.low, "high": wide.high, "n": len(items)}


def _as_json(value: Any) -> Any:
    """JSON types as lm-eval writes them; null for NaN and infinities."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(value, default=handle_non_serializable), parse_constant=lambda _: None)


def lm_eval_scores(task: LMEvalTask, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Measures]:
    """The measures of what was asked for, by the name of the task or group."""
    return measures(run_lm_eval(task, model, tokenizer))


def measures(results: Mapping[str, Any], *, all_of_groups: bool = False) -> dict[str, Measures]:
    """Of lm-eval's results the numbers and, where a number is the mean over its logged samples, their values.

    A measure is called as lm-eval calls it, with its filter behind a dot if there is one: `exact_match.strict-match`. Of a group
    that has a measure itself the tasks within are left out without `all_of_groups`; NaN and infinities always are.
    """
    inside = {name for group in results.get("groups") or () for name in _leaves(results, group, own=False)}
    found: dict[str, Measures] = {}
    for name, row in results.get("results", {}).items():
        if name in inside and not all_of_groups:
            continue
        found[name] = {}
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if comma and number and not metric.endswith("_stderr"):
                called = metric if kind == "none" else f"{metric}.{kind}"
                found[name][called] = Measure(float(value), _items(results, name, metric, kind, value))
    return {name: of for name, of in found.items() if of}


def _items(results: Mapping[str, Any], name: str, metric: str, kind: str, value: float) -> list[float] | None:
    """One value a sample, of a group those of its tasks, if their mean is `value`."""
    rows = [row for leaf in _leaves(results, name) for row in results.get("samples", {}).get(leaf, ())]
    items = [row[metric] for row in rows if row["filter"] == kind and metric in row]
    if not items or not all(isinstance(item, (int, float)) for item in items):
        return None
    mean = math.fsum(items) / len(items)
    return [float(item) for item in items] if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12) else None


def _leaves(results: Mapping[str, Any], name: str, own: bool = True) -> Iterator[str]:
    """The names under a group and, if `own`, its own."""
    if own:
        yield name
    for child in results.get("group_subtasks", {}).get(name, ()):
        yield from _leaves(results, child)


def _require_able(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: LMEvalTask) -> None:
    """Raises: UserError if the model writes no text, or the tokenizer lacks what lm-eval takes from it."""
    require_writer(model)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither a begin nor an end token: lm-eval puts one before a text.",
                        next="set eos_token in tokenizer_config.json")  # fmt: skip
    if task.apply_chat_template and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template.", next="leave apply_chat_template out")


def _loaded(task: LMEvalTask) -> tuple[Any, list[Any]]:
    """lm-eval's manager, and its objects for the names. Raises: UserError for one that is unknown, cannot be loaded, or is not run from here."""
    if task.include_path is not None and not Path(task.include_path).expanduser().is_dir():
        raise UserError(
            f"include_path '{task.include_path}' is no folder.", next="a folder with lm-eval's task files (YAML)"
        )
    found: list[Any] = []
    seen: dict[str, str] = {}
    manager, names = _named(task)
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:
            raise _unloadable(name, error) from error
        for leaf, one in loaded["tasks"].items():
            if leaf in seen:
                raise UserError(
                    f"lm-eval task '{leaf}' is asked for twice: by '{seen[leaf]}' and '{name}'.", next="leave one out"
                )
            if getattr(one, "UNSAFE_CODE", False) or getattr(one, "MULTIMODAL", False):
                what = (
                    "runs code that the model writes"
                    if getattr(one, "UNSAFE_CODE", False)
                    else "shows pictures or sounds"
                )
                raise UserError(f"lm-eval task '{leaf}' {what}, which is not done from here.",
                                next="deltalab merge, and lm-eval's own command on the merged model")  # fmt: skip
            seen[leaf] = name
        found += [next(iter(loaded["groups"].values()))] if loaded["groups"] else list(loaded["tasks"].values())
    return manager, found


def _named(task: LMEvalTask) -> tuple[Any, list[str]]:
    """A manager that knows the names, and the names with patterns filled in. Raises: UserError for an unknown one."""
    own = _manager(task.include_path, False) if task.include_path is not None else None
    # lm-eval's own index of 15,000 files takes seconds, and is not read if all that is asked for stands in the folder
    if own is not None and set(task.tasks) <= set(own.all_subtasks):
        return own, list(task.tasks)
    manager = _manager(task.include_path, True)
    names: list[str] = []
    for name in task.tasks:
        matched = [name] if Path(name).is_file() else manager.match_tasks([name])
        if not matched:
            raise UserError(f"lm-eval has no task '{name}'.", found=f"{len(manager.all_tasks):,} tasks, groups and tags",
                            nearest=nearest(name, manager.all_tasks), next="include_path for tasks of your own; every name: lm-eval ls tasks")  # fmt: skip
        names += matched
    return manager, list(dict.fromkeys(names))


@functools.cache
def _manager(folder: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder and str(Path(folder).expanduser()), include_defaults=defaults)


def _unloadable(name: str, error: Exception) -> UserError:
    """The data set of a task cannot be had, or its file says something that cannot be done."""
    data = isinstance(error, OSError)  # the hub's faults and missing files are OSErrors
    return UserError(
        f"the data of lm-eval task '{name}' cannot be read." if data else f"lm-eval cannot make task '{name}' of its file.",
        found=f"{type(error).__name__}: {error}",
        next="fetch the data set once where the hub can be reached, and bring HF_HOME here; or a task file of your own with "
             "dataset_path: json and dataset_kwargs: {data_files: …}, in include_path" if data
        else "correct the task's YAML file; --debug shows where lm-eval stopped",
    )  # fmt: skip


@contextlib.contextmanager
def _hushed(progress: bool) -> Iterator[None]:
    """Without lm-eval's warnings and what its helpers (git) say; with its bars on a terminal if `progress`."""
    logger = logging.getLogger("lm_eval")
    level, real = logger.level, os.dup(2)
    sys.stderr.flush()
    try:
        logger.setLevel(logging.ERROR)
        with open(os.devnull, "w") as nowhere, os.fdopen(os.dup(real), "w", buffering=1) as screen:
            os.dup2(nowhere.fileno(), 2)
            with contextlib.redirect_stderr(screen if progress and screen.isatty() else nowhere):
                yield
    finally:
        os.dup2(real, 2)
        os.close(real)
        logger.setLevel(level)
