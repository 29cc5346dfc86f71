"""A process that computes in bfloat16 on batches of many lengths does not grow by kernels that it keeps for each."""

import subprocess
import sys

import pytest

from deltalab.models.precision import cpu_multiplies_bfloat16

STEPS = """
import torch
from deltalab.core.memory import give_back
from deltalab.models.load import load

torch.set_num_threads(1)
model, _ = load("organism", dtype="bfloat16")

def step(length):
    model(input_ids=torch.ones(4, length, dtype=torch.long)).logits.float().sum().backward()
    model.zero_grad(set_to_none=True)

def resident():
    give_back()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:"))

step(70)
before = resident()
for length in range(40, 70):
    step(length)
print((resident() - before) // 1024)
"""


@pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="the system blocks this CPU's bfloat16 instructions")
def test_thirty_lengths_in_bfloat16():
    told = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 100  # MiB: 27 here, 300 with oneDNN's own bound
