"""The trackers by name: how each is started through Accelerate's class for it, and how a stopped run goes on there.

W&B goes on by the run's id, Trackio by its name, MLflow by its run id, TensorBoard in the same folder. What is needed to find a run
again lies in the run's folder, `trackers.json`.
"""

import abc
import contextlib
import fcntl
import importlib.util
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import accelerate.tracking
from accelerate.tracking import GeneralTracker

from deltalab.core.errors import UserError
from deltalab.core.files import remove
from deltalab.core.spec import digest
from deltalab.train.spec import TrackSpec

Kept = dict[str, Any]
"""What is needed to find a tracker's run again."""


class Tool(abc.ABC):
    """One tracker, of one run in `folder`; without a folder nothing is kept and the run never goes on."""

    name: ClassVar[str]
    sends: ClassVar[tuple[str, ...]] = ()
    """Variables of the environment that have a local tracker send its data over a network; options have the same names."""

    def __init__(self, spec: TrackSpec, folder: Path | None) -> None:
        self.spec, self.folder = spec, folder
        self.title = spec.name or (folder.resolve().name if folder else "run")

    def check(self) -> None:
        """Whether it can be started.

        Raises: UserError if it is not installed, has no login, or is to be offline and is not.
        """
        found = importlib.util.find_spec(self.name)
        if found is None or found.origin is None:  # a folder of that name is a package to Python
            raise UserError(f"the run is to be tracked by {self.name}, which is not installed.",
                            next=f"pip install 'deltalab[{self.name}]', or leave it out of track")  # fmt: skip
        if self.name not in accelerate.tracking.LOGGER_TYPE_TO_CLASS:
            raise UserError(f"the run is to be tracked by {self.name}, which accelerate {accelerate.__version__} does not know.",
                            next=f"pip install --upgrade 'deltalab[{self.name}]'")  # fmt: skip
        remote = self.remote() if self.spec.offline else None
        if remote:
            raise UserError(
                f"{self.name} is to be offline, and {remote} sends its data over a network.",
                next="take that away, or offline: false",
            )

    def remote(self) -> str | None:
        """What would make it use a network, if something does."""
        set_here = [f"option {key}" for key in self.spec.options if f"{self.name}_{key}".upper() in self.sends]
        return next(iter([*set_here, *(name for name in self.sends if os.environ.get(name))]), None)

    def start(self, kept: Kept | None, step: int) -> GeneralTracker:
        """The tracker, started: anew, or on the run that `kept` names. step: the first that it will be given."""
        made: GeneralTracker = accelerate.tracking.LOGGER_TYPE_TO_CLASS[self.name](**self.arguments(kept, step))
        made.start()
        return made

    @abc.abstractmethod
    def arguments(self, kept: Kept | None, step: int) -> dict[str, Any]:
        """What accelerate's class takes."""

    def keep(self, tracker: GeneralTracker) -> Kept:
        """What finds a started run again."""
        return {}

    @abc.abstractmethod
    def has(self, tracker: GeneralTracker, step: int) -> int:
        """The last step that a run which goes on has; −1 for none. step: as in `start`."""

    def end(self, tracker: GeneralTracker, failed: bool) -> None:
        """Close it, and say there how the run ended."""
        tracker.finish()

    def hint(self, tracker: GeneralTracker) -> str:
        """Where to look."""
        return ""


class TensorBoard(Tool):
    """Event files in `<folder>/tensorboard`. On a resume, readers drop what lies at the step it begins with or later."""

    name = "tensorboard"

    def check(self) -> None:
        super().check()
        if self.folder is None:
            raise UserError("tensorboard writes files, and this run has no folder.", next="folder=")

    def arguments(self, kept: Kept | None, step: int) -> dict[str, Any]:
        return {"run_name": self.name, "logging_dir": str(self.folder), "purge_step": step, **self.spec.options}

    def has(self, tracker: GeneralTracker, step: int) -> int:
        return step - 1

    def hint(self, tracker: GeneralTracker) -> str:
        return f"tensorboard --logdir {self.folder}"


class WandB(Tool):
    """A run of W&B. Offline its files lie in `<folder>/wandb`, for `wandb sync`.

    A killed offline run leaves a file without its last steps, so one that goes on writes all steps once more, under the same id, and
    that file goes.
    """

    name = "wandb"

    @property
    def offline(self) -> bool:
        """Whether nothing is sent, by the spec or by W&B's own variable."""
        return self.spec.offline or os.environ.get("WANDB_MODE", "online") not in ("online", "run", "shared")

    def check(self) -> None:
        super().check()
        if self.offline:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else its own faults are sent in offline runs too
            return
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError("the run is to be tracked by wandb, which has no login here.",
                            next="wandb login, or WANDB_API_KEY, or offline: track=[{to: wandb, offline: true}]")  # fmt: skip

    def arguments(self, kept: Kept | None, step: int) -> dict[str, Any]:
        again = {"id": kept["id"], "resume": "allow"} if kept else {}
        mode = {"mode": "offline"} if self.spec.offline else {}
        place = {"dir": str(self.folder)} if self.folder else {}
        return {
            "run_name": self.spec.project, "name": self.title, "group": self.spec.group, "settings": {"silent": True},
            **place, **mode, **again, **self.spec.options,
        }  # fmt: skip

    def keep(self, tracker: GeneralTracker) -> Kept:
        return {"id": tracker.tracker.id}

    def has(self, tracker: GeneralTracker, step: int) -> int:
        run = tracker.tracker
        if not self.offline:
            return int(run.step) - 1
        here = Path(run.dir).parent.resolve()
        for old in here.parent.glob(f"offline-run-*-{run.id}"):
            if old.resolve() != here:
                remove(old)
        return -1

    def end(self, tracker: GeneralTracker, failed: bool) -> None:
        tracker.tracker.finish(exit_code=int(failed))

    def hint(self, tracker: GeneralTracker) -> str:
        folder = Path(tracker.tracker.dir).parent
        return f"offline; to send it: wandb sync {folder}" if self.offline else str(tracker.tracker.url)


class Trackio(Tool):
    """A run of Trackio, in its own folder (TRACKIO_DIR). Its name gets an ending of its own: it is what a run goes on by."""

    name = "trackio"
    sends = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")

    def start(self, kept: Kept | None, step: int) -> GeneralTracker:
        # a token of the Hub on this machine would have it ask who that is
        with hub_offline() if self.spec.offline else contextlib.nullcontext():
            return super().start(kept, step)

    def arguments(self, kept: Kept | None, step: int) -> dict[str, Any]:
        name = kept["name"] if kept else f"{self.title}-{secrets.token_hex(3)}"
        return {
            "run_name": self.spec.project, "name": name, "group": self.spec.group, "embed": False,
            "resume": "allow" if kept else "never", **self.spec.options,
        }  # fmt: skip

    def keep(self, tracker: GeneralTracker) -> Kept:
        return {"name": tracker.tracker.name}

    def has(self, tracker: GeneralTracker, step: int) -> int:
        return int(tracker.tracker._next_step) - 1  # it writes twice a second, so a killed run may lack its last steps

    def end(self, tracker: GeneralTracker, failed: bool) -> None:
        import trackio

        trackio.finish()  # the run's own finish leaves it current, to be finished once more at exit

    def hint(self, tracker: GeneralTracker) -> str:
        return f"trackio show --project {self.spec.project}"


class MLflow(Tool):
    """A run of MLflow, at its tracking URI."""

    name = "mlflow"

    def check(self) -> None:
        if self.spec.offline:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        super().check()

    def remote(self) -> str | None:
        import mlflow

        uri = str(mlflow.get_tracking_uri())
        local = urlsplit(uri).scheme in ("", "file", "sqlite") and not uri.startswith("databricks")
        return None if local else f"the tracking URI {uri}"

    def start(self, kept: Kept | None, step: int) -> GeneralTracker:
        import mlflow

        # two that make the tables of a new database, or an experiment, at one time break it
        with one_at_a_time(f"mlflow {mlflow.get_tracking_uri()}"):
            return super().start(kept, step)

    def arguments(self, kept: Kept | None, step: int) -> dict[str, Any]:
        return {
            "experiment_name": self.spec.project, "run_name": self.title, "run_id": kept and kept["id"],
            **self.spec.options,
        }  # fmt: skip

    def keep(self, tracker: GeneralTracker) -> Kept:
        import mlflow

        if self.spec.group:
            mlflow.set_tag("group", self.spec.group)
        return {"id": tracker.tracker.info.run_id}

    def has(self, tracker: GeneralTracker, step: int) -> int:
        import mlflow

        rows = mlflow.MlflowClient().get_metric_history(tracker.tracker.info.run_id, "train/loss")
        return max((row.step for row in rows), default=-1)

    def end(self, tracker: GeneralTracker, failed: bool) -> None:
        import mlflow

        mlflow.end_run("FAILED" if failed else "FINISHED")

    def hint(self, tracker: GeneralTracker) -> str:
        import mlflow

        return f"experiment {self.spec.project} at {mlflow.get_tracking_uri()}"


TOOLS: dict[str, type[Tool]] = {tool.name: tool for tool in (WandB, Trackio, TensorBoard, MLflow)}


@contextlib.contextmanager
def hub_offline() -> Iterator[None]:
    """No request to the Hugging Face Hub within."""
    from huggingface_hub import constants

    was = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was


@contextlib.contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """No other process of this user on this machine is within, for the same `what`."""
    path = Path(tempfile.gettempdir()) / f"deltalab-{os.getuid()}-{digest(what)}.lock"
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
