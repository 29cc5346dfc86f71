"""A study as stages, each with its result on disk, so that the same command continues after a kill.

`FOLDER/study.json` holds the spec; `FOLDER/<stage>/result.json` what a stage found, with the digests of all that it
was computed from. A result is written once, atomically, after everything else of its stage; so a stage is finished or
it is not, whatever stopped it. A stage whose inputs have changed since is refused by name, never silently mixed in.
"""

import datetime
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deltalab.core.errors import UserError, nearest
from deltalab.core.files import owned, read_json, write_json
from deltalab.core.spec import Spec, digest

Result = dict[str, Any]


@dataclass
class Context:
    """What a stage may use.

    folder: the study's. results: those of the finished stages, by name. shared: what stages of one process hand to each
    other in memory (a loaded model); whoever takes from it must be able to make it again. say: prints a line.
    """

    folder: Path
    results: dict[str, Result] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = print

    def path(self, stage: str) -> Path:
        """The folder of a stage; a colon in its name becomes a dash."""
        return self.folder / stage.replace(":", "-")


@dataclass(frozen=True)
class Estimate:
    """What a stage will need, where it is known: seconds, bytes of memory, bytes of disk."""

    seconds: float | None = None
    memory: float | None = None
    disk: float | None = None


@dataclass(frozen=True)
class Stage:
    """One step of a study.

    run: does it and returns a JSON result. needs: the stages whose results it reads. inputs: name → a JSON value or
    digest of everything else that it depends on (model weights, data). tidy: removes what nobody needs once the result
    is on disk; it may be called again. lane: stages of one lane follow each other; those of different lanes may be done
    side by side, once every stage without a lane before them is done.
    """

    name: str
    run: Callable[[Context], Result]
    needs: tuple[str, ...] = ()
    inputs: Callable[[Context], Mapping[str, Any]] = lambda ctx: {}
    estimate: Estimate = Estimate()
    tidy: Callable[[Context], None] = lambda ctx: None
    lane: str | None = None


class Crew(Protocol):
    """Does lanes side by side (`lanes.py`)."""

    def run(self, lanes: Mapping[str, Sequence[str]]) -> None:
        """Do the stages of each lane, in order; their results lie on disk afterwards."""
        ...


def run(
    stages: Sequence[Stage], folder: str | Path, spec: Spec, *, only: str | None = None, until: str | None = None,
    say: Callable[[str], None] = print, resume_with: str = "deltalab study",
    crew: Callable[[Context, int], Crew | None] = lambda ctx, lanes: None,
) -> Context:  # fmt: skip
    """Run the stages that are not finished, in order.

    only: a stage, or a beginning of its name up to a colon (`tune` is every `tune:…`). until: the last stage to run.
    resume_with: the command that errors name. crew: who does so many lanes side by side; None: they are done here.
    Raises: UserError if the folder is in use or of another spec, a stage is unknown, what it needs is not there, or what
    a finished stage was computed from has changed.
    """
    chosen = choose(stages, only, until)
    with owned(folder, "run"):
        ctx = Context(Path(folder), say=say)
        claim(ctx.folder, spec)
        wanted = {stage.name for stage in chosen}
        fresh: set[str] = set()
        for number, stage in enumerate(stages, 1):
            done = finished(ctx, stage)
            if done is None and stage.name not in wanted:
                continue
            if done is None and stage.lane is not None and not fresh:
                lanes = _lanes(ctx, stages, wanted, resume_with)
                workers = crew(ctx, len(lanes))
                if workers is not None:
                    fresh = {name for names in lanes.values() for name in names}
                    workers.run(lanes)
                    done = finished(ctx, stage)
            _require(ctx, stage, resume_with)
            inputs = _inputs(ctx, stage)
            if done is not None:
                _same(ctx, stage, done["inputs"], inputs)
                ctx.results[stage.name] = done["result"]
                stage.tidy(ctx)
                if stage.name in wanted - fresh:
                    say(f"[{number}/{len(stages)}] {stage.name}: done before ({done['seconds']:.1f} s)")
                continue
            say(f"[{number}/{len(stages)}] {stage.name} …")
            ctx.results[stage.name] = _do(ctx, stage, inputs)
            stage.tidy(ctx)
        return ctx


def done_or_do(ctx: Context, stages: Sequence[Stage], lane: str) -> None:
    """Do what is not finished of one lane, everything that it needs being on disk: a worker's part of `run`."""
    ctx.results |= {stage.name: done["result"] for stage in stages if (done := finished(ctx, stage)) is not None}
    for number, stage in enumerate(stages, 1):
        if stage.lane == lane and stage.name not in ctx.results:
            _require(ctx, stage, "deltalab study")
            ctx.say(f"[{number}/{len(stages)}] {stage.name} …")
            ctx.results[stage.name] = _do(ctx, stage, _inputs(ctx, stage))
            stage.tidy(ctx)


def _lanes(ctx: Context, stages: Sequence[Stage], wanted: Collection[str], resume_with: str) -> dict[str, list[str]]:
    """Lane → its wanted stages that are not finished; results of those that are, checked and taken up.

    Raises: UserError if something that one needs is not done, or was computed from something else.
    """
    lanes: dict[str, list[str]] = {}
    for stage in stages:
        if stage.lane is None:
            continue
        if done := finished(ctx, stage):
            _require(ctx, stage, resume_with)
            _same(ctx, stage, done["inputs"], _inputs(ctx, stage))
            ctx.results[stage.name] = done["result"]
        elif stage.name in wanted:
            _require(ctx, stage, resume_with, coming=lanes.get(stage.lane, ()))
            lanes.setdefault(stage.lane, []).append(stage.name)
    return lanes


def _require(ctx: Context, stage: Stage, resume_with: str, coming: Collection[str] = ()) -> None:
    if missing := [name for name in stage.needs if name not in ctx.results and name not in coming]:
        raise UserError(
            f"stage '{stage.name}' needs {', '.join(missing)}, which is not done in '{ctx.folder}'.",
            found=f"done: {', '.join(ctx.results) or 'nothing'}",
            next=f"{resume_with} --until {stage.name}",
        )


def choose(stages: Sequence[Stage], only: str | None, until: str | None) -> list[Stage]:
    """The stages that `only` and `until` name.

    Raises: UserError for a name that is no stage, or both at once.
    """
    if only and until:
        raise UserError("--only and --until exclude each other.", next="give one of them")
    name = only or until
    if name is None:
        return list(stages)
    hits = [i for i, stage in enumerate(stages) if f"{stage.name}:".startswith(f"{name}:")]
    if not hits:
        names = [stage.name for stage in stages]
        raise UserError(
            f"'{name}' is no stage of this study.", found=f"stages: {', '.join(names)}", nearest=nearest(name, names)
        )
    return [stages[i] for i in hits] if only else list(stages[: hits[-1] + 1])


def plan(
    stages: Sequence[Stage], folder: str | Path, spec: Spec, *, only: str | None = None, until: str | None = None
) -> str:
    """What `run` would do, as text: the stages, what is done already, and what the rest needs where it is known."""
    ctx = Context(Path(folder))
    if _begun(ctx.folder):
        check_claim(ctx.folder, spec)
    wanted = {stage.name for stage in choose(stages, only, until)}
    width = max(len(stage.name) for stage in stages)
    lines = [f"{'stage':<{width}}  {'state':<16}  {'time':>8}  {'memory':>9}  {'disk':>9}"]
    for stage in stages:
        done = finished(ctx, stage)
        state = "done" if done else "to do" if stage.name in wanted else "left out"
        seconds = done["seconds"] if done else stage.estimate.seconds
        about = "" if done or seconds is None else "~"
        lines.append(f"{stage.name:<{width}}  {state:<16}  {about + _seconds(seconds):>8}  {_bytes(None if done else stage.estimate.memory):>9}  "
                     f"{_bytes(None if done else stage.estimate.disk):>9}")  # fmt: skip
    return "\n".join(lines)


def claim(folder: Path, spec: Spec) -> None:
    """Mark `folder` as this spec's, or check that it is.

    Raises: UserError if it holds another study, or something that is none.
    """
    path = folder / "study.json"
    if _begun(folder):
        return check_claim(folder, spec)
    if strangers := sorted({p.name for p in folder.iterdir() if not p.name.startswith(".")} - {path.name}):
        raise UserError(f"output folder '{folder}' is not empty and holds no study.", found=", ".join(strangers[:5]),
                        next="choose another with --output, or empty it")  # fmt: skip
    write_json(path, {"digest": spec.digest(), "spec": spec.plain()})


def _begun(folder: Path) -> bool:
    """Whether `folder` holds a study that has come to a stage; before that nothing is there that a spec could belie."""
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    return "study.json" in there and len(there) > 1


def check_claim(folder: Path, spec: Spec) -> None:
    """Refuse a folder that was begun with another spec, and name what differs."""
    begun = read_json(folder / "study.json", "study")
    if begun["digest"] != spec.digest():
        differences = changes(begun["spec"], spec.plain())
        raise UserError(f"'{folder}' was begun with another spec.", found="; ".join(differences[:6]) or "other defaults",
                        next="put the spec back, choose another folder with --output, or delete this one")  # fmt: skip


def changes(old: Any, new: Any, where: str = "") -> list[str]:
    """Each leaf in which two JSON values differ, as `path: old → new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in changes(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in changes(a, b, f"{where}.{i}")]
    return [] if old == new else [f"{where}: {old!r} → {new!r}"]


def finished(ctx: Context, stage: Stage) -> Result | None:
    """The stage's `result.json`, or None if it is not finished."""
    path = ctx.path(stage.name) / "result.json"
    return read_json(path, f"result of stage '{stage.name}'") if path.exists() else None


def _do(ctx: Context, stage: Stage, inputs: Mapping[str, Any]) -> Result:
    began = time.perf_counter()
    result = stage.run(ctx)
    seconds = time.perf_counter() - began
    write_json(ctx.path(stage.name) / "result.json", {
        "stage": stage.name, "inputs": dict(inputs), "seconds": round(seconds, 3),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "result": result,
    })  # fmt: skip
    stored = read_json(ctx.path(stage.name) / "result.json")[
        "result"
    ]  # what a later process would see: tuples are lists
    ctx.say(f"    {stage.name}: {seconds:.1f} s")
    return stored


def _inputs(ctx: Context, stage: Stage) -> dict[str, Any]:
    """Everything the stage depends on: its own inputs, and the digests of the results it reads."""
    return {**stage.inputs(ctx), **{f"stage {name}": digest(ctx.results[name]) for name in stage.needs}}


def _same(ctx: Context, stage: Stage, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = changes(dict(then), dict(now))
    if different:
        raise UserError(f"stage '{stage.name}' in '{ctx.folder}' was computed from something else.", found="; ".join(different[:6]),
                        next=f"choose another folder with --output, or delete '{ctx.path(stage.name)}' to do it again")  # fmt: skip


def _seconds(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _bytes(value: float | None) -> str:
    if value is None:
        return "—"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
