"""The processes and the device of this run, as Accelerate's launcher set them up."""

import os

import accelerate
import torch


def cpu_only() -> bool:
    """Whether to compute on the CPU: there is nothing else, or it was asked for. Several processes need it said."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    return asked or not torch.accelerator.is_available()


def processes() -> accelerate.PartialState:
    """Rank, number of processes and device; the first call joins the processes."""
    return accelerate.PartialState(cpu=cpu_only())
