"""What docs/adapters.md shows runs as it stands there."""

import re
import subprocess
import sys

import deltalab as dl
from tests.cli.test_verbs import main
from tests.helpers import ROOT

TEXT = (ROOT / "docs" / "adapters.md").read_text()


def test_the_document_on_adapters_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    ran = subprocess.run([sys.executable, "-c", "\n".join(blocks)], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "['fr', 'sql']" in ran.stdout
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^\$ deltalab (.*)$", TEXT, re.M)
    code, _, err = main(capsys, *command.replace("out/both", "out/again").split())
    assert code == 0, err
    model = dl.load_adapter(dl.load("organism")[0], tmp_path / "out" / "again")
    assert dl.trainable(model).count
