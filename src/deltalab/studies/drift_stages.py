"""The stages of the drift study, each a function of what the earlier ones left on disk."""

import dataclasses
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn

from deltalab.core.files import remove
from deltalab.core.records import write_record
from deltalab.core.spec import digest
from deltalab.data.chat import Encodings, encode_all
from deltalab.deltas.adapt import adapt, base_weight, is_adapted, trainable, unload
from deltalab.deltas.base import ParameterSpec
from deltalab.deltas.masks import freeze
from deltalab.deltas.peft_format import load_adapter, save_adapter
from deltalab.deltas.select import scored_linears, select
from deltalab.measure.drift import DriftProbe
from deltalab.models.load import load, model_digest
from deltalab.safety.groups import Group, difference, jaccard, matched_random, random_groups, random_like, top
from deltalab.safety.scores import Scores, snip
from deltalab.studies import behaviour, verdicts
from deltalab.studies.drift import ArmSpec, DriftStudySpec, is_harmful
from deltalab.studies.reduce import against, curve, described, distributions, independent, smoothed
from deltalab.studies.stages import Context, Result, Stage, finished
from deltalab.train import train
from deltalab.train.run import context_of


def stages(spec: DriftStudySpec) -> list[Stage]:
    """The study's stages, in order."""
    s = Steps(spec)
    out = [
        Stage("scores", s.scores, inputs=s.scored_on),
        Stage("groups", s.groups, needs=("scores",), inputs=s.of_model, tidy=s.discard_scores),
        Stage("evaluate:before", s.evaluation("before"), inputs=s.asked),
    ]
    for arm in spec.arms:
        out.append(
            Stage(
                f"tune:{arm.name}", s.tuning(arm), needs=("groups",), inputs=s.tuned_on, tidy=s.discard_checkpoints(arm)
            )
        )
        out.append(
            Stage(
                f"evaluate:{arm.name}",
                s.evaluation(arm.name),
                needs=("evaluate:before", f"tune:{arm.name}"),
                inputs=s.asked,
            )
        )
    measured = tuple(stage.name for stage in out)
    out.append(Stage("verdict", s.verdict, needs=measured[1:]))
    out.append(Stage("report", s.report, needs=(*measured, "verdict")))
    return out


class Steps:
    """What the stages do. Holds the spec only; everything else is in the context."""

    def __init__(self, spec: DriftStudySpec) -> None:
        self.spec = spec

    # ---- what stages are computed from ------------------------------------------------------------------------------

    def of_model(self, ctx: Context) -> dict[str, Any]:
        return {"model": self._loaded(ctx)["digest"]}

    def scored_on(self, ctx: Context) -> dict[str, Any]:
        return {
            **self.of_model(ctx),
            **{f"{name} data": self._data(ctx, name).digest() for name in ("safety", "utility")},
        }

    def tuned_on(self, ctx: Context) -> dict[str, Any]:
        return {**self.of_model(ctx), "tuning data": self._data(ctx, "tune").digest()}

    def asked(self, ctx: Context) -> dict[str, Any]:
        return {**self.of_model(ctx), "questions": self._questions(ctx).digest()}

    # ---- the stages -------------------------------------------------------------------------------------------------

    def scores(self, ctx: Context) -> Result:
        model, _ = self._base(ctx)
        out: Result = {}
        for name in ("safety", "utility"):
            scores = snip(
                model, self._data(ctx, name), folder=self._scores_folder(ctx, name), positions=self.spec.score.positions
            )
            out[name] = {key: scores.manifest[key] for key in ("score", "positions", "samples", "tokens", "dtype")}
        return out

    def groups(self, ctx: Context) -> Result:
        model, _ = self._base(ctx)
        g, focus = self.spec.groups, self.spec.groups.focus
        safety, utility = (Scores.load(self._scores_folder(ctx, name)) for name in ("safety", "utility"))
        made = {
            "safety": top(safety, g.q, g.per, "safety"), "utility": top(utility, g.q, g.per, "utility"),
            "safety-only": difference(safety, utility, g.p, g.q, g.per, "safety-only"),
        }  # fmt: skip
        weights = _weights(model)
        made["random"] = random_like(made[focus], self.spec.seed, "random")
        made["matched"] = matched_random(made[focus], weights, self.spec.seed, name="matched")
        for name, group in made.items():
            group.save(ctx.path("groups") / name)
        ctx.shared["groups"] = made
        names = list(made)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        return {
            "groups": {name: described(name, group, self.spec) for name, group in made.items()},
            "overlaps": [
                {"a": a, "b": b, "jaccard": jaccard(made[a], made[b]), "independent": independent(made[a], made[b])}
                for a, b in pairs
            ],
            "bytes": sum(group.nbytes for group in made.values()),
        }

    def discard_scores(self, ctx: Context) -> None:
        """Scores take as much space as the weights, twice; the groups are what is needed from here on."""
        if not self.spec.score.keep:
            for name in ("safety", "utility"):
                remove(self._scores_folder(ctx, name))

    def discard_checkpoints(self, arm: ArmSpec) -> Any:
        """What a killed training goes on from; a finished one is its adapter and its curves."""
        return lambda ctx: remove(ctx.path(f"tune:{arm.name}") / "run" / "checkpoints")

    def tuning(self, arm: ArmSpec) -> Any:
        def run(ctx: Context) -> Result:
            model, tokenizer = self._base(ctx)
            groups, data, folder = self._groups(ctx), self._data(ctx, "tune"), ctx.path(f"tune:{arm.name}")
            adapt(model, list(self.spec.tune.adapt), seed=self.spec.seed)
            count = trainable(model)
            freezer = freeze(model, groups[arm.group].masks(), arm.freeze) if arm.freeze != "none" else None
            focus = self.spec.groups.focus
            probe = DriftProbe(groups, {focus: self._nulls(ctx)}, every=self.spec.tune.drift_every)
            result = train(
                model,
                tokenizer,
                data,
                self.spec.tune.loop(self.spec.seed),
                folder=folder / "run",
                probes=[probe],
                freezer=freezer,
            )
            proof = (
                {"variant": "none", "entries": 0, "max_change": None, "held": None}
                if freezer is None
                else freezer.proof()
            )
            if freezer is not None and arm.freeze == "exact":
                freezer.remove()  # a delta's mask is a part of the adapter and stays
            save_adapter(model, folder / "adapter")
            ctx.shared["tuned"] = arm.name
            curves = [curve(row) for row in result.curves[probe.name]]
            fraction = groups[arm.group].fraction if freezer is not None else 0.0
            return {
                "freeze": {**proof, "group": arm.group if freezer is not None else None, "fraction": fraction},
                "training": {"steps": result.steps, "tokens": result.tokens, "seconds": result.seconds, "trained": count.count,
                             "losses": smoothed(result.losses), "held_out": [[row["step"], row["loss"]] for row in result.curves.get("eval", [])]},
                "curves": curves, "last_nulls": {name: null["overall"] for name, null in result.curves[probe.name][-1]["nulls"].items()},
                "against": against(result.curves[probe.name][-1]),
                "distributions": distributions(probe, model),
                "adapter": {"parameters": count.count, "bytes": sum(p.stat().st_size for p in (folder / "adapter").iterdir())},
            }  # fmt: skip

        return run

    def evaluation(self, arm: str) -> Any:
        def run(ctx: Context) -> Result:
            if arm != "before" and ctx.shared.get("tuned") == arm:
                model, tokenizer = self._loaded(ctx)["model"], self._loaded(ctx)["tokenizer"]
            else:
                model, tokenizer = self._base(ctx)
                if arm != "before":
                    load_adapter(model, ctx.path(f"tune:{arm}") / "adapter")
            tokens = None if arm == "before" else ctx.results["evaluate:before"]["refusal_tokens"]
            return behaviour.evaluate(
                model, tokenizer, self._questions(ctx), self.spec.evaluate, ctx.path(f"evaluate:{arm}"), tokens
            )

        return run

    def verdict(self, ctx: Context) -> Result:
        spec, arms = self.spec, ["before", *(arm.name for arm in self.spec.arms)]
        asked = {arm: ctx.results[f"evaluate:{arm}"] for arm in arms}
        sets = {
            name: verdicts.Comparison(
                name, behaviour.title(name), {arm: behaviour.refused(asked[arm], name) for arm in arms}
            )
            for name in spec.evaluate.prompts
        }
        harmful, harmless = (
            [s for n, s in sets.items() if is_harmful(n)],
            [s for n, s in sets.items() if not is_harmful(n)],
        )
        free = spec.arms[0].name
        out = [
            verdicts.refusals(
                harmful, free, spec.margin, behaviour.became(asked["before"], asked[free], [s.name for s in harmful])
            )
        ]
        if harmless:
            out.append(verdicts.false_refusals(harmless, free, spec.margin))
        if spec.evaluate.skills:
            out.append(
                verdicts.skills(
                    verdicts.Comparison("skills", "skills", {arm: behaviour.correct(asked[arm]) for arm in arms}),
                    free,
                    spec.margin,
                )
            )
        tuned, focus = ctx.results[f"tune:{free}"], spec.groups.focus
        out.append(
            verdicts.drift(
                f"the group {focus}", tuned["curves"][-1]["groups"][focus], tuned["last_nulls"][focus], spec.margin
            )
        )
        control = next(
            (arm.name for arm in spec.arms if arm.freeze != "none" and arm.group in ("matched", "random")), None
        )
        for arm in spec.arms[1:]:
            if arm.name != control:
                proof = ctx.results[f"tune:{arm.name}"]["freeze"]
                out.append(verdicts.freezing(arm.group, proof, harmful, free, arm.name, control, spec.margin))
        return {"verdicts": out}

    def report(self, ctx: Context) -> Result:
        from deltalab.report import build_report

        spec, loaded = self.spec, self._loaded(ctx)
        arms: dict[str, Any] = {
            "before": {"label": "before tuning", **behaviour.summary(ctx.results["evaluate:before"])}
        }
        for arm in spec.arms:
            tuned = {key: value for key, value in ctx.results[f"tune:{arm.name}"].items() if key != "last_nulls"}
            arms[arm.name] = {"label": arm.label, **behaviour.summary(ctx.results[f"evaluate:{arm.name}"]), **tuned}
        body = {
            "seed": spec.seed, "model": {"name": spec.model, **loaded["facts"], "digest": loaded["digest"]},
            "stages": {stage.name: done["seconds"] for stage in stages(spec) if (done := finished(ctx, stage))},
            "groups": ctx.results["groups"]["groups"], "overlaps": ctx.results["groups"]["overlaps"], "arms": arms,
            "verdicts": ctx.results["verdict"]["verdicts"], "scores": ctx.results["scores"],
            "data": {name: {"n": len(data), "tokens": data.tokens, "digest": data.digest()} for name, data in ((n, self._data(ctx, n)) for n in ("safety", "utility", "tune"))}
            | {name: {"n": len(prompts), "digest": digest(prompts)} for name, prompts in self._questions(ctx).prompts.items()},
            "sizes": {"groups": ctx.results["groups"]["bytes"], **{f"adapter {arm.name}": ctx.results[f"tune:{arm.name}"]["adapter"]["bytes"] for arm in spec.arms}},
        }  # fmt: skip
        write_record(ctx.folder, "drift", spec, body)
        report = build_report(ctx.folder)
        return {"page": report.page.name, "verdict": report.verdict}

    # ---- what they share ----------------------------------------------------------------------------------------------

    def _loaded(self, ctx: Context) -> dict[str, Any]:
        """Model, tokenizer, digest and sizes, loaded once a process."""
        if "loaded" not in ctx.shared:
            model, tokenizer = load(self.spec.model)
            model.to(accelerate.PartialState().device)
            linears = scored_linears(model)
            for item in self.spec.tune.adapt:  # a target that matches nothing is told now, not after the first stages
                _ = (
                    item.parameters(model)
                    if isinstance(item, ParameterSpec)
                    else select(model, item.targets, item.layers)
                )
            facts = {"parameters": sum(p.numel() for p in model.parameters()), "scored": sum(m.weight.numel() for m in linears.values()),
                     "matrices": len(linears), "dtype": str(model.dtype).removeprefix("torch.")}  # fmt: skip
            ctx.shared["loaded"] = {
                "model": model,
                "tokenizer": tokenizer,
                "digest": model_digest(model),
                "facts": facts,
            }
        return dict(ctx.shared["loaded"])

    def _base(self, ctx: Context) -> tuple[Any, Any]:
        """The model as it was loaded, whatever an earlier stage put on it."""
        loaded = self._loaded(ctx)
        if is_adapted(loaded["model"]):
            unload(loaded["model"])
        ctx.shared.pop("tuned", None)
        return loaded["model"], loaded["tokenizer"]

    def _data(self, ctx: Context, name: str) -> Encodings:
        """Encoded conversations: `safety` and `utility` as many as are scored, `tune` all."""
        kept = ctx.shared.setdefault("data", {})
        if name not in kept:
            loaded, loop = self._loaded(ctx), self.spec.tune.loop(self.spec.seed)
            tasks = self.spec.tune.data if name == "tune" else getattr(self.spec, name)
            conversations = [conversation for task in tasks for conversation in task.train()]
            encoded = encode_all(
                loaded["tokenizer"], conversations, context_of(loaded["model"], loop), loop.run.too_long
            )
            limit = None if name == "tune" else self.spec.score.samples
            kept[name] = dataclasses.replace(encoded, items=encoded.items[:limit])
        return kept[name]

    def _questions(self, ctx: Context) -> behaviour.Questions:
        if "questions" not in ctx.shared:
            ctx.shared["questions"] = behaviour.questions(self.spec.evaluate, self.spec.seed)
        return ctx.shared["questions"]

    def _groups(self, ctx: Context) -> dict[str, Group]:
        if "groups" not in ctx.shared:
            ctx.shared["groups"] = {
                name: Group.load(ctx.path("groups") / name) for name in ctx.results["groups"]["groups"]
            }
        return ctx.shared["groups"]

    def _nulls(self, ctx: Context) -> list[Group]:
        """Matched random groups: kept as their seed, drawn again when they are needed."""
        if "nulls" not in ctx.shared:
            focus = self._groups(ctx)[self.spec.groups.focus]
            ctx.shared["nulls"] = random_groups(
                focus, self.spec.groups.nulls, self.spec.seed + 1, _weights(self._loaded(ctx)["model"])
            )
        return ctx.shared["nulls"]

    def _scores_folder(self, ctx: Context, name: str) -> Path:
        root = (
            Path(self.spec.score.scratch) / f"deltalab-{digest(str(ctx.folder.resolve()))}"
            if self.spec.score.scratch
            else ctx.path("scores")
        )
        return root / name


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {path: base_weight(model, path) for path in scored_linears(model)}
