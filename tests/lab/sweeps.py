"""Small sweeps on the bundled model, and what is compared of them."""

import json
from pathlib import Path
from typing import Any

import yaml

from deltalab.core.spec import build
from deltalab.lab.spec import SweepSpec

TIMES = ("seconds", "written", "git", "cost")


def plan(**fields: Any) -> dict[str, Any]:
    """Two ranks and two seeds, a few steps with dropout, an evaluation, and checkpoints on the way."""
    base = {
        "model": "organism", "adapt": [{"method": "lora", "targets": "q,v", "dropout": 0.1}],
        "data": [{"task": "skills", "n": 48, "n_test": 8, "families": ["opposite"]}],
        "optim": {"steps": 8, "batch": 4, "lr": 0.003}, "eval": {"every": 4}, "run": {"checkpoint_every": 2},
    }  # fmt: skip
    return {"base": base, "product": {"adapt.r": [2, 4]}, "seeds": [1, 2], **fields}


def spec(**fields: Any) -> SweepSpec:
    return build(SweepSpec, plan(**fields))


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(plan(**fields)))
    return path


def results(folder: Path) -> dict[str, Any]:
    """Every trial's record without its times, its curves and its adapter's bytes."""
    found = {}
    for record in sorted(folder.glob("trials/*/record.json")):
        values = json.loads(record.read_text())
        values["result"].pop("training_seconds")
        values["data"]["kernels"] = sorted(values["data"]["kernels"])  # how often each ran is of the last process alone
        place = record.parent
        found[place.name] = (
            {key: value for key, value in values.items() if key not in TIMES},
            (place / "curves/train.jsonl").read_text(), (place / "adapter/adapter_model.safetensors").read_bytes(),
        )  # fmt: skip
    return found
