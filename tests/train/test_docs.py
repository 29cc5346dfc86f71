"""The snippets of the document on training do what they say."""

import os
import re
import subprocess
import sys

import pytest

import deltalab as dl
from tests.helpers import ROOT

SECTION = (ROOT / "docs" / "training.md").read_text().split("## In other people's loops")[1].split("\n## ")[0]
START, *LOOPS = re.findall(r"^```python\n(.*?)^```", SECTION, re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS, ids=["Trainer", "SFTTrainer", "PyTorch"])
def test_other_peoples_loops(loop, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    code = f"{START}\n{loop}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    (folder,) = (tmp_path / "adapters").iterdir()
    model, _ = dl.load("organism")
    dl.load_adapter(model, folder)
    assert dl.trainable(model).count > 0
