"""The stages of the study of score dynamics, each a function of what the earlier ones left on disk."""

from collections.abc import Callable
from typing import Any

from torch import nn

from deltalab.core.files import remove
from deltalab.core.records import write_record
from deltalab.deltas.merge import merged
from deltalab.deltas.peft_format import load_adapter
from deltalab.safety.bins import bins_of
from deltalab.safety.dynamics import summary
from deltalab.safety.group import Group
from deltalab.safety.groups import complement, top
from deltalab.safety.nulls import Nulls
from deltalab.safety.score_files import Scores
from deltalab.safety.scores import score
from deltalab.safety.units import units_of
from deltalab.studies import conclusions
from deltalab.studies.arms import arms_of
from deltalab.studies.materials import Materials, weights_of
from deltalab.studies.parts import Run, runs_of
from deltalab.studies.reduce import described, one_like
from deltalab.studies.score_dynamics import ScoreDynamicsSpec
from deltalab.studies.stages import Context, Result, Stage, finished
from deltalab.studies.tuning import evaluate, tune

MEASURED = ("base", "merged")
"""The two scores after tuning: of the base weights under the tuned activations, and of the merged weights."""


def stages(spec: ScoreDynamicsSpec) -> list[Stage]:
    """The study's stages, in order."""
    s = Steps(spec)
    out = [
        Stage("select", s.select, inputs=s.m.scored_on),
        Stage("before", s.before, needs=("select",), inputs=s.m.scored_on),
        Stage("evaluate:before", lambda ctx: evaluate(s.m, ctx, None), inputs=s.m.asked),
    ]
    ready = tuple(stage.name for stage in out)
    for run in s.runs:
        tuned, after, asked = (f"{kind}:{run.name}" for kind in ("tune", "after", "evaluate"))
        out += [
            Stage(tuned, s.tuning(run), ready, s.m.tuned_on, tidy=s.discard_checkpoints(run), lane=run.name),
            Stage(after, s.after(run), (*ready, tuned), s.m.scored_on, lane=run.name),
            Stage(asked, s.evaluation(run), (*ready, tuned), s.m.asked, lane=run.name),
        ]
    measured = tuple(stage.name for stage in out)
    out.append(Stage("verdict", s.verdict, needs=measured))
    out.append(Stage("report", s.report, needs=(*measured, "verdict")))
    return out


class Steps:
    """What the stages do. Holds the spec and its materials; everything else is in the context."""

    def __init__(self, spec: ScoreDynamicsSpec) -> None:
        self.spec = spec
        self.m = Materials(spec)
        self.runs = runs_of(spec.arms, spec.seeds)

    # ---- the stages -------------------------------------------------------------------------------------------------

    def select(self, ctx: Context) -> Result:
        model, _ = self.m.base(ctx)
        g, seed = self.spec.group, self.spec.seeds[0]
        units = self._units(ctx)
        scores = self._score(ctx, model, "select")
        safety = top(scores, g.q, g.per, "safety", units=units)
        made = {
            "safety": safety,
            "random": one_like(safety, "random", seed, None, units),
            "matched": one_like(safety, "matched", seed, bins_of(weights_of(model), units=units), units),
            "complement": complement(safety, "complement"),
        }
        for name, group in made.items():
            group.save(ctx.path("select") / name)
        ctx.shared["groups"] = made
        seen = summary(scores, {"safety": safety}, {})
        self._discard(ctx, "select")
        of = "" if g.unit == "entry" else f" {g.unit}s"
        labels = {
            "safety": f"safety (top {100 * g.q:g} %{of})",
            "matched": "matched random",
            "complement": "all but safety",
        }
        return {
            "groups": {name: described(group, labels.get(name, name)) for name, group in made.items()},
            "manifest": {key: value for key, value in scores.manifest.items() if key not in ("shapes", "weights")},
            "on selection": {name: seen[name] for name in ("groups", "all")},
        }

    def before(self, ctx: Context) -> Result:
        model, _ = self.m.base(ctx)
        scores = self._score(ctx, model, "measure")
        found = self._summary(ctx, scores, None)
        manifest = {key: value for key, value in scores.manifest.items() if key not in ("shapes", "weights")}
        self._discard(ctx, "measure")
        return {**found, "manifest": manifest}

    def tuning(self, run: Run) -> Callable[[Context], Result]:
        return lambda ctx: tune(self.m, ctx, run, self._groups(ctx))[2]

    def after(self, run: Run) -> Callable[[Context], Result]:
        def work(ctx: Context) -> Result:
            model = self.m.loaded(ctx).model
            if ctx.shared.get("tuned") != run.name:
                model, _ = self.m.base(ctx)
                load_adapter(model, ctx.path(f"tune:{run.name}") / "adapter")
                ctx.shared["tuned"] = run.name
            edges = ctx.results["before"]["edges"]
            out = {}
            for what in MEASURED:
                scored = model if what == "base" else merged(model)
                out[what] = self._summary(ctx, self._score(ctx, scored, f"{what}-{run.name}", "measure"), edges)
                self._discard(ctx, f"{what}-{run.name}")
            return out

        return work

    def evaluation(self, run: Run) -> Callable[[Context], Result]:
        return lambda ctx: evaluate(self.m, ctx, run)

    def verdict(self, ctx: Context) -> Result:
        return {"verdicts": conclusions.of_score_dynamics(self.spec, ctx.results)}

    def report(self, ctx: Context) -> Result:
        from deltalab.report import build_report

        spec, loaded = self.spec, self.m.loaded(ctx)
        select = ctx.results["select"]
        arms = arms_of(spec.arms, spec.seeds, ctx.results)
        arms["before"]["scores"] = ctx.results["before"]
        for arm in spec.arms:
            arms[arm.name]["scores"] = [ctx.results[f"after:{run.name}"] for run in runs_of([arm], spec.seeds)]
        sets = {name: self.m.data(ctx, name) for name in ("select", "measure", "tune")}
        adapters = {f"adapter {run.name}": ctx.results[f"tune:{run.name}"]["adapter"]["bytes"] for run in self.runs}
        body = {
            "seeds": spec.seeds, "model": {"name": spec.model, **loaded.facts, "digest": loaded.digest},
            "stages": {stage.name: done["seconds"] for stage in stages(spec) if (done := finished(ctx, stage))},
            "groups": select["groups"], "overlaps": [], "focus": "safety", "arms": arms,
            "scores": {"select": select["manifest"], "measure": ctx.results["before"]["manifest"]},
            "selection": select["on selection"], "verdicts": ctx.results["verdict"]["verdicts"],
            "data": {n: {"n": len(data), "tokens": data.tokens, "digest": data.digest()} for n, data in sets.items()},
            "sizes": adapters,
        }  # fmt: skip
        write_record(ctx.folder, "score-dynamics", spec, body)
        report = build_report(ctx.folder)
        return {"page": report.page.name, "verdict": report.verdict}

    # ---- what they share --------------------------------------------------------------------------------------------

    def _score(self, ctx: Context, model: nn.Module, name: str, data: str | None = None) -> Scores:
        """Scores of `model` on a half of the samples, in the scratch folder."""
        tokenizer = self.m.loaded(ctx).tokenizer
        return score(
            model, self.m.data(ctx, data or name), self.spec.score, folder=self.m.scores_folder(ctx, name),
            seed=self.spec.seeds[0], template=tokenizer.chat_template,
        )  # fmt: skip

    def _summary(self, ctx: Context, scores: Scores, edges: Any) -> Result:
        groups = self._groups(ctx)
        shown = {name: groups[name] for name in ("safety", "matched")}
        if "bins" not in ctx.shared:  # of W₀, which is the same before and after
            ctx.shared["bins"] = bins_of(weights_of(self.m.loaded(ctx).model), units=self._units(ctx))
        magnitudes = ctx.shared["bins"]
        nulls = Nulls(groups["safety"], self.spec.group.nulls, self.spec.seeds[0] + 1, magnitudes, self._units(ctx))
        return summary(scores, shown, {"magnitude": nulls}, edges)

    def _units(self, ctx: Context) -> Any:
        kind = self.spec.group.unit
        return None if kind == "entry" else units_of(self.m.loaded(ctx).model, kind)

    def _groups(self, ctx: Context) -> dict[str, Group]:
        return self.m.groups(ctx, ctx.path("select"), list(ctx.results["select"]["groups"]))

    def _discard(self, ctx: Context, name: str) -> None:
        if not self.spec.score.keep:
            remove(self.m.scores_folder(ctx, name))

    def discard_checkpoints(self, run: Run) -> Callable[[Context], None]:
        """What a killed training goes on from; a finished one is its adapter and its curves."""
        return lambda ctx: remove(ctx.path(f"tune:{run.name}") / "run" / "checkpoints")
