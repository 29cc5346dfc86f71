"""Where a model is put to be talked to."""

import torch


def nearby() -> dict[str, str] | None:
    """`device_map` for the whole model on this machine's accelerator; None where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else {"": str(found)}
