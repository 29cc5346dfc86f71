"""From a training run's record to plain values: losses, tokens, sizes."""

from deltalab.report.figures import Line, Lines, Plot
from deltalab.report.values import Record, Table, Tile, number


def tiles(record: Record) -> list[Tile]:
    """The few numbers that stand at the top."""
    return []


def tables(record: Record) -> list[Table]:
    """Every single number of the record's body, by name."""
    skip = {"format", "kind", "written", "digest", "spec", "versions", "git", "machine"}
    rows = [(name, number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value))
            for name, value in record.items() if name not in skip and isinstance(value, (int, float, str))]  # fmt: skip
    return [Table("training", "Training", ("", "value"), rows)] if rows else []


def plots(record: Record) -> list[Plot]:
    """The loss over steps."""
    losses = record.get("losses") or []
    if not losses:
        return []
    pairs = losses if isinstance(losses[0], list) else list(enumerate(losses, 1))
    line = Line("loss", [value for _, value in pairs], "orange")
    panel = Lines("loss", "Training loss", [step for step, _ in pairs], "optimizer step", "loss, nats per token", [line])
    return [Plot("losses", "Training loss", "Mean loss per reply token.", [panel], 1)]
