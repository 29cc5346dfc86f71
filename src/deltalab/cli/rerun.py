"""`deltalab rerun RECORD`: a run or study again, from the spec that its record keeps, and whether it comes to the same."""

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    record: Annotated[Path, typer.Argument(help="the folder of a finished run or study, or its record.json")],
    output: Annotated[Path | None, typer.Option(help="a new folder; the record's own with -again if not given")] = None,
) -> None:
    """Run what a record says once more, in another folder; of a training run, say what came out otherwise."""
    from deltalab.core.errors import UserError
    from deltalab.core.records import read_record
    from deltalab.core.spec import build
    from deltalab.studies import STUDIES, module_of
    from deltalab.train import TrainSpec, run_spec

    before = read_record(record)
    home = record.parent if record.suffix == ".json" else record
    place = output or home.with_name(home.name + "-again")
    if place.resolve() == home.resolve():
        raise UserError(f"'{place}' holds the record itself.", next="another folder: --output")
    kind = before["kind"]
    if kind == "train":
        spec = build(TrainSpec, {**before["spec"], "output": None, "track": []}, str(record))
        after = read_record(run_spec(spec, place))
        print("\n".join([f"written: {place}", *differences(before, after, home, place)]))
    elif kind in STUDIES:
        from deltalab.cli.study import show

        module = module_of(kind)
        show(module, build(module.SPEC, before["spec"], str(record)), place, again=f"deltalab rerun {record} --output {place}")  # fmt: skip
    else:
        raise UserError(f"a record of kind '{kind}' is not run again.", found=f"train, {', '.join(STUDIES)}")


def differences(before: dict[str, Any], after: dict[str, Any], home: Path, place: Path) -> list[str]:
    """What two training runs of one spec have otherwise: machine and versions, data and model, losses, scores, the adapter's bytes."""
    from deltalab.core.files import file_digest

    said = [f"  {key}: {before[key]} there, {after[key]} here" for key in ("versions", "git", "machine", "threads", "device", "base")
            if before.get(key) != after.get(key)]  # fmt: skip
    same = [("data", before["data"]["digest"], after["data"]["digest"]), ("losses", before["result"]["loss"], after["result"]["loss"]),
            ("held-out losses", before["result"]["held_out"], after["result"]["held_out"]), ("scores", before["scores"], after["scores"])]  # fmt: skip
    said += [f"  {name}: {was} there, {now} here" for name, was, now in same if was != now]
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (home, place)]
    if all(file.is_file() for file in files):
        equal = file_digest(files[0]) == file_digest(files[1])
        said.append(f"  the adapter: {'the same to the bit' if equal else 'other bytes'}")
    return said
