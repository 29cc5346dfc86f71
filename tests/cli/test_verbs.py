"""The verbs report, targets, study and demo, as a user calls them."""

from pathlib import Path

import pytest

from deltalab import cli
from deltalab.studies import drift
from deltalab.studies.stages import Context
from tests.helpers import byte_tokenizer, tiny_llama


def main(capsys, *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_targets_of_a_model(capsys, model):
    code, out, _ = main(capsys, "targets", str(model))
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "q_proj 2 × 32 × 32" in lines
    assert "k_proj 2 × 16 × 32" in lines
    assert "q,v 4: q_proj, v_proj" in lines
    assert "mlp 6: gate_proj, up_proj, down_proj" in lines
    code, out, _ = main(capsys, "targets", str(model), "--every")
    assert "model.layers.1.mlp.down_proj" in out
    assert len(out.splitlines()) == 15


def test_targets_of_no_model(capsys, tmp_path):
    code, _, err = main(capsys, "targets", str(tmp_path / "nothing"))
    assert code == 2
    assert err.startswith("error: model folder")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What a study was asked to do, without doing it."""
    calls = []

    def run_study(spec, folder=None, **options):
        calls.append((spec, folder, options))
        if options["dry_run"]:
            return "the plan"
        done = Context(Path(folder or "runs/drift"))
        if not options["until"]:
            done.results["report"] = {"verdict": "* refusals: fell.", "page": "report.html"}
        return done

    monkeypatch.setattr(drift, "run_study", run_study)
    return calls


def test_study_takes_overrides_and_ends_with_verdict_and_path(capsys, asked, tmp_path):
    (tmp_path / "s.yaml").write_text("tune: {data: [{task: benign, n: 5}]}\n")
    code, out, _ = main(
        capsys,
        "study",
        "drift",
        str(tmp_path / "s.yaml"),
        "tune.optim.lr=0.01",
        "seeds=[3]",
        "--output",
        str(tmp_path / "o"),
    )
    spec, folder, options = asked[0]
    assert (code, spec.tune.optim.lr, spec.seeds, folder) == (0, 0.01, [3], tmp_path / "o")
    assert options["resume_with"] == f"deltalab study drift {tmp_path / 's.yaml'}"
    assert out.rstrip().endswith(f"report: {tmp_path / 'o' / 'report.html'}")
    assert "* refusals: fell." in out
    _, out, _ = main(capsys, "study", "drift", str(tmp_path / "s.yaml"), "--until", "groups")
    assert "not all stages are done; go on with: deltalab study drift" in out
    assert main(capsys, "study", "drift", str(tmp_path / "s.yaml"), "--dry-run")[1] == "the plan\n"


def test_a_study_that_is_none_and_a_spec_that_is_not_there(capsys, tmp_path):
    code, _, err = main(capsys, "study", "drfit", "s.yaml")
    assert code == 2
    assert "nearest: drift" in err
    code, _, err = main(capsys, "study", "drift", str(tmp_path / "s.yaml"))
    assert code == 2
    assert "does not exist" in err


def test_demo_runs_the_bundled_spec_and_shows_where_it_lies(capsys, asked):
    code, out, _ = main(capsys, "demo", "tune.optim.steps=5")
    spec, folder, _ = asked[0]
    assert (code, spec.model, spec.tune.optim.steps, folder) == (0, "organism", 5, Path("deltalab-demo"))
    path = Path(out.splitlines()[0].removeprefix("the spec, to copy and change: "))
    assert path.name == "drift-organism.yaml"
    assert path.is_file()
    assert out.rstrip().endswith("report: deltalab-demo/report.html")
