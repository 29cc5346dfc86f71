"""Each tracker's data read back: name -> [(step, value)]. Made before the run, since a tool may have to be told where to write."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Points = dict[str, list[tuple[int, float]]]


def tensorboard(home: Path, patch: Any) -> Callable[[Path], Points]:
    """Event files, by TensorBoard's accumulator."""

    def read(run: Path) -> Points:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return read


def wandb(home: Path, patch: Any) -> Callable[[Path], Points]:
    """The file of an offline run: records of W&B's protocol in LevelDB's log format."""

    def read(run: Path) -> Points:
        from wandb.proto import wandb_internal_pb2

        found: Points = {}
        (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
        for data in _log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
                for key in row.keys() - {key for key in row if key.startswith("_")}:
                    found.setdefault(key, []).append((int(row["_step"]), row[key]))
        return found

    return read


def _log_records(data: bytes, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """Records of crc (4), length (2) and kind (1: whole, 2: first, 3: middle, 4: last part), none over the end of a block."""
    at, whole = header, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def trackio(home: Path, patch: Any) -> Callable[[Path], Points]:
    """Its SQLite file."""
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        patch.setattr(module, "TRACKIO_DIR", home / "trackio")
    (home / "trackio").mkdir()

    def read(run: Path) -> Points:
        name = json.loads((run / "trackers.json").read_text())["trackio"]["name"]
        found: Points = {}
        for row in sqlite_storage.SQLiteStorage.get_logs("deltalab", name):
            for key in row.keys() - {"step", "timestamp"}:
                found.setdefault(key, []).append((row["step"], row[key]))
        return found

    return read


def mlflow(home: Path, patch: Any) -> Callable[[Path], Points]:
    """Its client on a SQLite store."""
    import mlflow as tool

    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")

    def read(run: Path) -> Points:
        client, id = tool.MlflowClient(), json.loads((run / "trackers.json").read_text())["mlflow"]["id"]
        assert client.get_run(id).info.status == "FINISHED"
        assert client.get_run(id).data.tags["group"] == "g"
        metrics = client.get_run(id).data.metrics
        return {key: [(one.step, one.value) for one in client.get_metric_history(id, key)] for key in metrics}

    return read


READERS = {read.__name__: read for read in (tensorboard, wandb, trackio, mlflow)}
