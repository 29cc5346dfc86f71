"""One tuning of a study: an arm with a seed, trained in its folder, measured on the way, its adapter kept."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deltalab.deltas.adapt import trainable
from deltalab.deltas.freeze import Freezer, freeze
from deltalab.deltas.peft_format import load_adapter, save_adapter
from deltalab.safety.groups import Group
from deltalab.safety.probe import BehaviourProbe
from deltalab.studies import behaviour
from deltalab.studies.materials import Materials
from deltalab.studies.parts import Run, loop_of
from deltalab.studies.reduce import smoothed
from deltalab.studies.stages import Context, Result
from deltalab.train import Probe, TrainResult, train

ASKED = 40
"""Prompts of each set, and questions, that are asked while training goes on."""

UNFROZEN = {"variant": "none", "entries": 0, "max_change": None, "held": None, "group": None, "fraction": 0.0}


def tune(
    m: Materials, ctx: Context, run: Run, groups: Mapping[str, Group], probes: Sequence[Probe] = ()
) -> tuple[Any, TrainResult, Result]:
    """Train one run of a study; returns the tuned model, what the training was, and the JSON of what became of it.

    probes: what is measured on the way, beside the replies if the spec asks for them.
    """
    data, folder = m.data(ctx, "tune"), ctx.path(f"tune:{run.name}")
    if run.arm.n is not None:
        data = dataclasses.replace(data, items=data.items[: run.arm.n])
    model, tokenizer = m.adapted(ctx, data, run.seed), m.loaded(ctx).tokenizer
    count = trainable(model)
    frozen = groups[run.arm.group] if run.arm.freeze != "none" else None
    freezer = freeze(model, frozen.masks(), run.arm.freeze) if frozen is not None else None
    asking = behaviour_probe(m, ctx, tokenizer)
    result = train(
        model, tokenizer, data, loop_of(m.spec.tune, run.arm, run.seed), folder=folder / "run",
        probes=[*probes, *asking], freezer=freezer,
    )  # fmt: skip
    proof = UNFROZEN if freezer is None or frozen is None else _proof(freezer, frozen)
    save_adapter(model, folder / "adapter")
    ctx.shared["tuned"] = run.name
    held_out = [[row["step"], row["loss"]] for row in result.curves.get("eval", [])]
    return model, result, {
        "seed": run.seed,
        "freeze": proof,
        "training": {
            "steps": result.steps, "tokens": result.tokens, "seconds": result.seconds, "trained": count.count,
            "samples": len(data), "losses": smoothed(result.losses), "held_out": held_out,
        },
        "asked": [row for probe in asking for row in result.curves[probe.name]],
        "adapter": {"parameters": count.count, "bytes": sum(p.stat().st_size for p in (folder / "adapter").iterdir())},
    }  # fmt: skip


def behaviour_probe(m: Materials, ctx: Context, tokenizer: Any) -> list[BehaviourProbe]:
    """The probe that asks while training goes on, if the spec wants it."""
    every = m.spec.tune.ask_every
    if every is None:
        return []
    asked, spec = m.questions(ctx), m.spec.evaluate
    tokens = ctx.results["evaluate:before"]["refusal_tokens"]
    return [
        BehaviourProbe(
            tokenizer, asked.prompts, asked.skills, every, limit=ASKED,
            refusal_tokens=tokens, max_new_tokens=spec.max_new_tokens, batch_size=spec.batch,
        )
    ]  # fmt: skip


def evaluate(m: Materials, ctx: Context, run: Run | None) -> Result:
    """Ask everything: of the model before tuning (None), or of a run's tuned model, read back where it is not at hand."""
    name = "before" if run is None else run.name
    model, tokenizer = m.loaded(ctx).model, m.loaded(ctx).tokenizer
    if run is None or ctx.shared.get("tuned") != run.name:
        model, tokenizer = m.base(ctx)
        if run is not None:
            load_adapter(model, ctx.path(f"tune:{run.name}") / "adapter")
    tokens = None if run is None else ctx.results["evaluate:before"]["refusal_tokens"]
    folder = ctx.path(f"evaluate:{name}")
    return behaviour.evaluate(model, tokenizer, m.questions(ctx), m.spec.evaluate, folder, tokens)


def _proof(freezer: Freezer, frozen: Group) -> Result:
    """How far the frozen entries moved. What held the own weights lets go; a delta's mask is a part of the adapter and stays."""
    proof = freezer.proof()
    if freezer.variant in ("exact", "grad_mask"):
        freezer.remove()
    return {**proof, "group": frozen.name, "fraction": frozen.fraction}
