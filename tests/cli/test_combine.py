"""`deltalab combine`: from folders of adapters to one, with what it lost in print and in a record."""

import json

import pytest
import torch

import deltalab as dl
from deltalab.deltas.adapt import attached, delta_weight
from tests.cli.test_verbs import main
from tests.deltas.perturb import perturbed
from tests.helpers import assert_close_by_norm, byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with a model and two adapters, one of them in the folder of a run."""
    folder = tmp_path_factory.mktemp("there")
    tiny_llama().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for i, (path, spec) in enumerate({"fr": dl.LoRA(r=2), "sql/adapter": dl.LoRA(r=3, targets=["q_proj"])}.items()):
        dl.save_adapter(perturbed(dl.adapt(tiny_llama(), spec), seed=i), folder / path)
    return folder


def test_two_adapters_become_one(capsys, tmp_path, there):
    out = tmp_path / "both"
    ours = [str(there / name) for name in ("model", "fr", "sql/adapter")]
    code, text, err = main(
        capsys, "combine", *ours, "--how", "svd", "--r", "2", "--weights", "0.5,-2", "--out", str(out)
    )
    assert code == 0, err
    want = dl.combine(tiny_llama(), {"fr": ours[1], "sql": ours[2]}, [0.5, -2.0], how="svd", r=2)
    assert text == f"{want.report}\nwritten: {out} (combine.json beside it says what was lost where)\n"
    record = json.loads((out / "combine.json").read_text())
    assert record["adapters"] == {"fr": 0.5, "sql": -2.0}
    assert record["folders"] == {"fr": ours[1], "sql": ours[2]}
    assert record["error"] == pytest.approx(want.report.error)
    assert 0 < record["error"] < 1
    assert record["environment"]["versions"]["torch"] == torch.__version__
    model = dl.load_adapter(tiny_llama(), out)
    for path in attached(model):
        assert_close_by_norm(delta_weight(model, path), delta_weight(want.model, path), 1e-6)


def test_mistakes_are_told_before_anything_is_written(capsys, tmp_path, there):
    ours = [str(there / name) for name in ("model", "fr", "sql/adapter")]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for given, message in [
        ([*ours, "--how", "tiess", "--density", "0.2"], "nearest: ties"),
        ([*ours, "--how", "ties"], "needs a density"),
        ([*ours, "--weights", "0.5"], "2 adapters and the weights [0.5]"),
        ([*ours, "--weights", "a,b"], "are no numbers"),
        ([ours[0], ours[1], "base"], "adds nothing"),
        ([ours[0], ours[1], str(there / "nowhere")], "does not exist"),
        ([ours[0], ours[1], ours[1]], "two adapters are called 'fr'"),
    ]:
        code, _, err = main(capsys, "combine", *given, "--out", str(tmp_path / "new"))
        assert (code, message in err, "Traceback" in err) == (2, True, False), err
        assert not (tmp_path / "new").exists()
    code, _, err = main(capsys, "combine", *ours, "--out", str(tmp_path / "full"))
    assert code == 2
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["file"]
