"""`deltalab score`: from a model or a spec to a folder, gone on with, and refused where it holds something else."""

import json

import pytest
import torch

from deltalab.data.chat import encode_all
from deltalab.data.tasks import BenignTask
from deltalab.models.load import load
from deltalab.safety.scores import Scores, snip
from tests.cli.test_verbs import main
from tests.helpers import byte_tokenizer, tiny_llama

SPEC = "{model: '%s', data: [{task: benign, n: 6}], score: {samples: 4, batch: 2}, seed: 3}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(context=512).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def spec(tmp_path, model):
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC % model)
    return path


def test_scores_from_a_spec(capsys, tmp_path, spec, model):
    code, out, err = main(capsys, "score", str(spec), "--output", str(tmp_path / "out"))
    assert code == 0, err
    assert "4 of 6 samples" in err
    assert "  4 of 4 samples" in err
    lines = out.splitlines()
    assert lines[0].startswith("snip of 14 matrices over 4 samples (predicting positions, ")
    loaded, tokenizer = load(str(model))
    data = encode_all(tokenizer, BenignTask(n=6).train(), 512)
    want = snip(loaded, data[:4], batch=2)
    got = Scores.load(tmp_path / "out")
    assert all(torch.equal(got[p], want[p]) for p in want)
    q = torch.stack([want[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1)])
    row = next(line.split() for line in lines if line.split()[0] == "q_proj")
    assert row[1:3] == ["2", "2,048"]
    assert float(row[3]) == pytest.approx(float(q.mean()), rel=5e-3)
    assert float(row[5]) == pytest.approx(float(q.max()), rel=5e-3)
    assert lines[-1] == f"written: {tmp_path / 'out'}"
    code, again, err = main(capsys, "score", str(spec), "--output", str(tmp_path / "out"), "--quiet")
    assert (code, again, err) == (0, out, "")
    code, _, err = main(
        capsys, "score", str(spec), "score.positions=response", "--output", str(tmp_path / "out"), "--quiet"
    )
    assert code == 2
    assert "holds scores of something else" in err
    assert "positions: 'predicting' there, 'response' here" in err


@pytest.mark.parametrize("kind", ["wanda", "magnitude", "random"])
def test_a_model_and_overrides_are_enough(capsys, tmp_path, model, kind):
    code, out, err = main(
        capsys, "score", str(model), f"score.score={kind}", "score.samples=3", "data=[{task: benign, n: 6}]", "halves=true",
        "seed=5", f"output={tmp_path / 'out'}", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.startswith(f"{kind} of 14 matrices")
    manifest = json.loads((tmp_path / "out/scores.json").read_text())
    assert manifest["seed"] == (5 if kind == "random" else None)
    assert (manifest["template"] is not None) == (kind == "wanda")
    assert len(Scores.load(tmp_path / "out", load(str(model))[0]).halves) == (2 if kind == "wanda" else 0)


def test_mistakes_are_told_in_words(capsys, tmp_path, model):
    code, _, err = main(
        capsys, "score", str(model), "score.positions=last-3", "score.sampels=3", "--output", str(tmp_path / "o")
    )
    assert code == 2
    assert "positions are predicting, response, or first-K" in err
    assert "samples" in err
    code, _, err = main(capsys, "score", str(model))
    assert code == 2
    assert "no output folder" in err
    code, _, err = main(capsys, "score", str(model), "context=4096", "--output", str(tmp_path / "o"))
    assert "the model has 512 positions" in err
