"""The stages of the drift study, each a function of what the earlier ones left on disk."""

import itertools
from collections.abc import Callable, Mapping

from deltalab.core.files import remove
from deltalab.core.records import write_record
from deltalab.core.spec import digest
from deltalab.measure.drift import DriftProbe
from deltalab.safety.bins import Bins, bins_of
from deltalab.safety.group import Group
from deltalab.safety.groups import complement, difference, top
from deltalab.safety.interventions import zeroed
from deltalab.safety.nulls import Nulls
from deltalab.safety.overlap import overlap
from deltalab.safety.score_files import Scores
from deltalab.safety.scores import base_model, score
from deltalab.safety.units import Units, units_of
from deltalab.studies import behaviour, conclusions
from deltalab.studies.arms import arms_of
from deltalab.studies.drift import DriftStudySpec
from deltalab.studies.materials import Materials, weights_of
from deltalab.studies.parts import Run, runs_of
from deltalab.studies.reduce import curve, described, distributions, final, halved, one_like, overlapping
from deltalab.studies.stages import Context, Result, Stage, finished
from deltalab.studies.tuning import evaluate, tune

SCORED = ("safety", "utility")
FEW = 99
"""Random groups of each kind that are followed through a training; all are drawn at its end."""


def stages(spec: DriftStudySpec) -> list[Stage]:
    """The study's stages, in order."""
    s = Steps(spec)
    out = [
        Stage("scores", s.scores, inputs=s.m.scored_on),
        Stage("groups", s.groups, needs=("scores",), inputs=s.m.of_model, tidy=s.discard_scores),
        Stage("evaluate:before", lambda ctx: evaluate(s.m, ctx, None), inputs=s.m.asked),
    ]
    if spec.ablate:
        out.append(Stage("ablate", s.ablate, needs=("groups", "evaluate:before"), inputs=s.m.asked))
    ready = ("groups", "evaluate:before")
    for run in s.runs:
        tuned, asked = f"tune:{run.name}", f"evaluate:{run.name}"
        out.append(Stage(tuned, s.tuning(run), ready, s.m.tuned_on, tidy=s.discard_checkpoints(run), lane=run.name))
        out.append(Stage(asked, s.evaluation(run), (*ready, tuned), s.m.asked, lane=run.name))
    measured = tuple(stage.name for stage in out)
    out.append(Stage("verdict", s.verdict, needs=measured[1:]))
    out.append(Stage("report", s.report, needs=(*measured, "verdict")))
    return out


class Steps:
    """What the stages do. Holds the spec and its materials; everything else is in the context."""

    def __init__(self, spec: DriftStudySpec) -> None:
        self.spec = spec
        self.m = Materials(spec)
        self.runs = runs_of(spec.all_arms, spec.seeds)

    # ---- the stages -------------------------------------------------------------------------------------------------

    def scores(self, ctx: Context) -> Result:
        model, tokenizer = self.m.base(ctx)
        out: Result = {}
        for name in SCORED:
            scores = score(
                model, self.m.data(ctx, name), self.spec.score, folder=self.m.scores_folder(ctx, name), halves=True,
                seed=self.spec.seeds[0], template=tokenizer.chat_template,
            )  # fmt: skip
            out[name] = {key: value for key, value in scores.manifest.items() if key not in ("shapes", "weights")}
        return out

    def groups(self, ctx: Context) -> Result:
        model, _ = self.m.base(ctx)
        g, seed = self.spec.groups, self.spec.seeds[0]
        units, other = self._units(ctx), base_model(model, self.spec.score)
        safety, utility = (Scores.load(self.m.scores_folder(ctx, name), model, other) for name in SCORED)
        made = {
            "safety": top(safety, g.q, g.per, "safety", units),
            "utility": top(utility, g.q, g.per, "utility", units),
            "safety-only": difference(safety, utility, g.p, g.q, g.per, "safety-only", units),
        }
        focus, weights = made[g.focus], weights_of(model)
        made["random"] = one_like(focus, "random", seed, None, units)
        made["matched"] = one_like(focus, "matched", seed, bins_of(weights, units=units), units)
        made["complement"] = complement(focus, "complement")
        for name, group in made.items():
            group.save(ctx.path("groups") / name)
        bins_of(utility, units=units, of="the utility score").save(ctx.path("groups") / "utility-bins.safetensors")
        ctx.shared["groups"] = made
        halves = {name: halved(scores, g, units) for name, scores in (("safety", safety), ("utility", utility))}
        shown = [name for name in made if name != "complement"]
        pairs = [overlap(made[a], made[b], halves.get(a), halves.get(b)) for a, b in itertools.combinations(shown, 2)]
        return {
            "groups": {name: described(group, g.labels()[name]) for name, group in made.items()},
            "overlaps": [overlapping(pair) for pair in pairs],
            "bytes": sum(group.nbytes for group in made.values()),
        }

    def ablate(self, ctx: Context) -> Result:
        """The replies with the focus at zero, and with each of several matched random groups at zero."""
        model, tokenizer = self.m.base(ctx)
        tokens, folder = ctx.results["evaluate:before"]["refusal_tokens"], ctx.path("ablate")
        draws = Nulls(
            self._focus(ctx), self.spec.ablate, self.spec.seeds[0] + 1, self._bins(ctx)["magnitude"], self._units(ctx)
        )
        out: dict[str, Result] = {}
        for number in range(-1, len(draws)):
            group = self._focus(ctx) if number < 0 else draws.draw(number)
            name = self.spec.groups.focus if number < 0 else f"random-{number}"
            with zeroed(model, group):
                asked = behaviour.evaluate(
                    model, tokenizer, self.m.questions(ctx), self.spec.evaluate, folder / name, tokens
                )
            out[name] = asked
        return {"replies": out, "fraction": self._focus(ctx).fraction}

    def tuning(self, run: Run) -> Callable[[Context], Result]:
        def work(ctx: Context) -> Result:
            groups = self._groups(ctx)
            hidden = {"complement", "matched"} - {run.arm.group}  # of interest where they are what is frozen
            watched = {name: group for name, group in groups.items() if name not in hidden}
            probe = DriftProbe(watched, self._nulls(ctx), every=self.spec.tune.drift_every, few=FEW)
            model, result, out = tune(self.m, ctx, run, groups, [probe])
            last = probe.measure(model, result.steps, probe.most)
            return out | {
                "curves": [curve(row) for row in result.curves[probe.name]],
                "final": final({"step": result.steps, **last}, self.spec.groups.focus),
                "distributions": distributions(probe, model),
            }

        return work

    def evaluation(self, run: Run) -> Callable[[Context], Result]:
        return lambda ctx: evaluate(self.m, ctx, run)

    def verdict(self, ctx: Context) -> Result:
        return {"verdicts": conclusions.of_drift(self.spec, ctx.results)}

    def report(self, ctx: Context) -> Result:
        from deltalab.report import build_report

        spec, loaded = self.spec, self.m.loaded(ctx)
        body = {
            "seeds": spec.seeds, "model": {"name": spec.model, **loaded.facts, "digest": loaded.digest},
            "stages": {stage.name: done["seconds"] for stage in stages(spec) if (done := finished(ctx, stage))},
            "groups": ctx.results["groups"]["groups"], "overlaps": ctx.results["groups"]["overlaps"], "focus": spec.groups.focus,
            "arms": arms_of(spec.all_arms, spec.seeds, ctx.results), "verdicts": ctx.results["verdict"]["verdicts"],
            "scores": ctx.results["scores"], "data": self._data_facts(ctx), "sizes": self._sizes(ctx),
        }  # fmt: skip
        if spec.ablate:
            body["ablation"] = {n: behaviour.harmful_shares(one) for n, one in ctx.results["ablate"]["replies"].items()}
        write_record(ctx.folder, "drift", spec, body)
        report = build_report(ctx.folder)
        return {"page": report.page.name, "verdict": report.verdict}

    # ---- what is given back, and what they share ----------------------------------------------------------------------

    def discard_scores(self, ctx: Context) -> None:
        """Scores take as much space as the weights, twice; the groups are what is needed from here on."""
        if not self.spec.score.keep:
            for name in SCORED:
                remove(self.m.scores_folder(ctx, name))

    def discard_checkpoints(self, run: Run) -> Callable[[Context], None]:
        """What a killed training goes on from; a finished one is its adapter and its curves."""
        return lambda ctx: remove(ctx.path(f"tune:{run.name}") / "run" / "checkpoints")

    def _groups(self, ctx: Context) -> dict[str, Group]:
        return self.m.groups(ctx, ctx.path("groups"), list(ctx.results["groups"]["groups"]))

    def _focus(self, ctx: Context) -> Group:
        return self._groups(ctx)[self.spec.groups.focus]

    def _units(self, ctx: Context) -> Units | None:
        kind = self.spec.groups.unit
        return None if kind == "entry" else units_of(self.m.loaded(ctx).model, kind)

    def _bins(self, ctx: Context) -> Mapping[str, Bins]:
        """Kind of null → what its draws are matched on."""
        if "bins" not in ctx.shared:
            ctx.shared["bins"] = {
                "magnitude": bins_of(weights_of(self.m.loaded(ctx).model), units=self._units(ctx)),
                "utility": Bins.load(ctx.path("groups") / "utility-bins.safetensors"),
            }
        bins: Mapping[str, Bins] = ctx.shared["bins"]
        return bins

    def _nulls(self, ctx: Context) -> dict[str, Nulls]:
        """Random groups of both kinds, kept as their seeds."""
        n, seed = self.spec.groups.nulls, self.spec.seeds[0] + 1
        return {
            kind: Nulls(self._focus(ctx), n, seed, bins, self._units(ctx)) for kind, bins in self._bins(ctx).items()
        }

    def _data_facts(self, ctx: Context) -> Result:
        sets = {name: self.m.data(ctx, name) for name in (*SCORED, "tune")}
        facts = {n: {"n": len(data), "tokens": data.tokens, "digest": data.digest()} for n, data in sets.items()}
        asked = self.m.questions(ctx).prompts.items()
        return facts | {name: {"n": len(prompts), "digest": digest(prompts)} for name, prompts in asked}

    def _sizes(self, ctx: Context) -> Result:
        adapters = {f"adapter {run.name}": ctx.results[f"tune:{run.name}"]["adapter"]["bytes"] for run in self.runs}
        return {"groups": ctx.results["groups"]["bytes"], **adapters}
