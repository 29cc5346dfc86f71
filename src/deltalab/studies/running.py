"""Running a study: threads by a fixed rule, tunings side by side where they fit, estimates for a dry run."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from deltalab.core.machine import jobs_for
from deltalab.core.spec import Spec
from deltalab.studies import lanes
from deltalab.studies.estimates import estimated
from deltalab.studies.stages import Context, Crew, Stage, plan, run


def run_or_plan(
    kind: str, spec: Any, folder: str | Path, make: Callable[[Any], list[Stage]], *, only: str | None, until: str | None,
    dry_run: bool, jobs: int | None, say: Callable[[str], None], resume_with: str,
) -> Context | str:  # fmt: skip
    """`run_study` of any study. make: its stages from its spec."""
    spec = spec.but(output=None)  # where a study lies does not make it another one
    steps = make(spec)
    with _threads():
        if dry_run:
            return plan(estimated(spec, steps), folder, spec, only=only, until=until)
        return run(
            steps, folder, spec, only=only, until=until, say=say, resume_with=resume_with,
            crew=lambda ctx, count: crew(kind, ctx, spec, steps, count, jobs),
        )  # fmt: skip


def crew(kind: str, ctx: Context, spec: Spec, steps: list[Stage], count: int, jobs: int | None) -> Crew | None:
    """Workers for so many lanes, or None where one after the other is all that fits (or all that there is)."""
    threads = torch.get_num_threads()
    if jobs is None:
        if count < 2 or torch.accelerator.is_available():
            return None  # one device: tunings side by side would only share it
        memory = max((s.estimate.memory or 0 for s in estimated(spec, steps) if s.lane), default=0)
        jobs = jobs_for(threads, memory, count)
    if jobs < 2:
        return None
    ctx.say(f"{min(jobs, count)} tunings side by side, {threads} thread{'s' * (threads > 1)} each")
    return lanes.Workers(kind, ctx.folder, jobs, threads, ctx.say)


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Leave the number of threads as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
