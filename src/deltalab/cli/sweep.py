"""`deltalab sweep SPEC`: many runs side by side, and one table over them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltalab.cli.sweep_table import table, watched

if TYPE_CHECKING:
    from deltalab.lab.on_ray import Resources
    from deltalab.lab.spec import SweepSpec, Trial
    from deltalab.lab.trials import Sweep

EXECUTORS = ("local", "ray")


def command(
    spec: Annotated[
        Path, typer.Argument(help="spec of the sweep (YAML), the name of a preset, or with --status its folder")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="changes to the spec: base.optim.steps=100 seeds=[42]")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="the sweep's folder; runs/<spec's name> if not given")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="trials side by side; as many as fit if not given")] = None,
    executor: Annotated[str, typer.Option(help="local: processes of this machine; ray: tasks of Ray")] = "local",
    address: Annotated[str | None, typer.Option(help="of a Ray cluster; auto: the one that runs here")] = None,
    shard: Annotated[str | None, typer.Option(help="this machine's part of the trials: 1/4 … 4/4")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="run failed trials again")] = False,
    status: Annotated[bool, typer.Option("--status", help="how far a sweep is, from any terminal")] = False,
    report: Annotated[bool, typer.Option(help="build the page, text, JSON and figures of what is finished")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the trials, and run none")] = False,
    show: Annotated[bool, typer.Option("--show", help="print the spec, a preset's say, and run nothing")] = False,
) -> None:
    """Run every trial of a sweep. The same command goes on where it was stopped; what is finished never runs again.

    Presets: alpha-ablation, code-review, lora-vs-full, memory-quality, method-comparison, prefix-ablation, rank-ablation,
    target-ablation.
    """
    from deltalab.core.errors import UserError
    from deltalab.core.spec import load_spec, override, read_yaml
    from deltalab.lab.presets import find as find_preset
    from deltalab.lab.spec import SweepSpec
    from deltalab.lab.trials import create, find, forget_failures, share

    if status:
        print(table(find(spec)))
        return
    file = find_preset(spec)
    if show:
        import yaml

        values = override(read_yaml(file), overrides or [])
        told = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
        print(told if overrides else file.read_text(encoding="utf-8"), end="")
        return
    read = load_spec(SweepSpec, file, overrides or [])
    if dry_run:
        print(plan(read))
        return
    if executor not in EXECUTORS:
        raise UserError(f"there is no executor '{executor}'.", nearest=list(EXECUTORS))
    if executor == "ray" and jobs is not None:
        raise UserError(
            "--jobs is for processes of this machine.", next="Ray places trials by what each asks for: leave --jobs out"
        )
    if read.search is not None and shard is not None:
        raise UserError("a search is one for all who work on it.",
                        next="the same command, without --shard, on each machine that shares the folder")  # fmt: skip
    sweep = create(read, output or Path(read.output or Path("runs") / spec.stem))
    if retry:
        forget_failures(sweep)
    if sweep.spec.search is not None:
        sweep = search(sweep, jobs, executor, address)
    else:
        run(sweep, share(sweep, shard), shard, jobs, executor, address)
        if sweep.tuning:  # what is best is known now
            sweep = find(sweep.folder)
            run(sweep, share(sweep, shard), shard, jobs, executor, address)
    print(table(sweep))
    if report:
        page(sweep)


def run(
    sweep: "Sweep", mine: "list[Trial]", shard: str | None, jobs: int | None, executor: str = "local", address: str | None = None
) -> None:  # fmt: skip
    """Run what is left, and write the table."""
    from deltalab.lab.local import Crew
    from deltalab.lab.table import TABLE, write
    from deltalab.lab.trials import ENDED

    left = [trial for trial in mine if sweep.state(trial) not in ENDED]
    if left:
        size, threads, at_once, each = room(left, len(left), jobs)
        if executor == "ray":
            from deltalab.lab.on_ray import run_on_ray

            print(f"{len(left)} of {len(mine)} trials to run on Ray, {each}")
            with watched(sweep, at_once) as say:
                run_on_ray(sweep, left, asks(threads, size), address=address, say=say)
        else:
            print(f"{len(left)} of {len(mine)} trials to run, {at_once} side by side, {each}")
            with watched(sweep, at_once) as say:
                Crew(sweep, shard, at_once, threads, say).run()
    if any(sweep.state(trial) == "finished" for trial in sweep.trials):
        print(f"table: {write(sweep)} ({TABLE} of all finished trials)")


def page(sweep: "Sweep") -> None:
    """Build the report of what is finished, if anything is; what it found, and where it is."""
    from deltalab.report import build_report

    if any(sweep.state(trial) == "finished" for trial in sweep.trials):
        built = build_report(sweep.folder)
        print(f"\n{built.verdict}\n\nreport: {built.page}")


def room(trials: "list[Trial]", left: int, jobs: int | None) -> tuple[int, int, int, str]:
    """(bytes of the largest model, threads a trial, trials side by side of `left`, the threads in words)."""
    from deltalab.core.machine import SMALL, cores, jobs_for
    from deltalab.models.load import weight_bytes

    size = max(weight_bytes(trial.spec.model) for trial in trials)
    threads = 1 if size < 4 * SMALL else cores()
    at_once = min(jobs or jobs_for(threads, 4.0 * size, left), left)
    return size, threads, at_once, f"{threads} thread{'s' * (threads > 1)} each"


def asks(threads: int, size: int) -> "Resources":
    """What a trial asks of Ray. size: bytes of the model's weights."""
    import torch

    from deltalab.lab.on_ray import Resources

    return Resources(threads, float(torch.cuda.is_available()), int(4.0 * size))


def search(sweep: "Sweep", jobs: int | None, executor: str = "local", address: str | None = None) -> "Sweep":
    """Search in each group, run the best of each, and write the table; the sweep as it is then."""
    from deltalab.lab.local import Crew
    from deltalab.lab.search import groups, studies
    from deltalab.lab.table import TABLE, write
    from deltalab.lab.trials import find

    left = sum(study.left() for study in studies(sweep))
    if left:
        size, threads, at_once, each = room(groups(sweep.spec), left, jobs)
        where = "on Ray" if executor == "ray" else f"{at_once} side by side"
        print(f"at most {left} trials to run, {where}, {each}")
        with watched(sweep, at_once) as say:
            if executor == "ray":
                from deltalab.lab.on_ray import search_on_ray

                search_on_ray(sweep, asks(threads, size), address=address, say=say)
            else:
                Crew(sweep, None, at_once, threads, say).run()
    sweep = find(sweep.folder)
    if any(sweep.state(trial) == "finished" for trial in sweep.trials or sweep.tuning):
        print(f"table: {write(sweep)} ({TABLE} of all finished trials)")
    return sweep


def plan(spec: "SweepSpec") -> str:
    """The trials, or what a search is going to do."""
    from deltalab.lab.spec import trials, tuning_trials

    if spec.search is None:
        listed = tuning_trials(spec) or trials(spec)
        more = f", and {len(spec.seeds)} more of each group with the best" if spec.tune else ""
        return "\n".join([f"{len(listed)} trials{more}", *(f"  {trial.id}  {trial.label}" for trial in listed)])
    from deltalab.lab.search import groups

    found = groups(spec)
    where = f" in each of {', '.join(group.group for group in found)}" if len(found) > 1 else ""
    lines = [f"a search of {spec.search.trials} trials{where}, sampler {spec.search.sampler}, pruner {spec.search.pruner}"]  # fmt: skip
    lines += [f"  {key}: {values}" for key, values in spec.search.space.items()]
    if spec.search.then:
        lines.append(f"then the best{' of each' if where else ''} with {len(spec.seeds)} seed{'s' * (len(spec.seeds) > 1)}")  # fmt: skip
    return "\n".join(lines)
