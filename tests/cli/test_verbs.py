"""The verbs report, targets, study and demo, as a user calls them."""

from pathlib import Path

import pytest

from deltalab import cli
from deltalab.studies import drift
from deltalab.studies.stages import Context
from tests.families import model_of
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


def rows(out):
    return [" ".join(line.split()) for line in out.splitlines()]


def test_targets_of_a_model(capsys, model):
    code, out, _ = main(capsys, "targets", str(model))
    assert code == 0
    lines = rows(out)
    assert (
        lines[0]
        == f"{model}: 15 linears, 1 embedding; {sum(p.numel() for p in tiny_llama().parameters()):,} parameters"
    )
    assert "q_proj 2 × 32 × 32" in lines
    assert "k_proj 2 × 16 × 32" in lines
    assert lines.index("embed_tokens 1 × 32 × 270") == lines.index("embeddings, taken by their names") + 1
    assert "q,v 4: q_proj, v_proj" in lines
    assert "mlp 6: gate_proj, up_proj, down_proj" in lines
    at = lines.index("sub-layers, taken whole by some methods")
    assert lines[at + 1 : at + 3] == ["self_attn 2 × attention, hidden size 32", "mlp 2 × mlp, hidden size 32"]
    code, out, _ = main(capsys, "targets", str(model), "--every")
    assert "model.layers.1.mlp.down_proj 32 × 48" in rows(out)
    assert "model.embed_tokens 32 × 270" in rows(out)
    assert len(out.splitlines()) == 16


def test_targets_of_experts_and_of_tied_weights(capsys, tmp_path):
    for name in ("gpt_oss", "llama-bias"):
        model_of(name).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    _, out, _ = main(capsys, "targets", str(tmp_path / "gpt_oss"))
    lines = rows(out)
    assert "4 stacks of experts" in lines[0]
    at = lines.index("experts, held as one parameter")
    assert lines[at + 1 : at + 3] == ["gate_up_proj 2 × 4 × 64 × 32", "down_proj 2 × 4 × 32 × 32"]  # kept transposed
    assert "mlp 4: gate_up_proj, down_proj" in lines
    _, out, _ = main(capsys, "targets", str(tmp_path / "llama-bias"))
    assert "lm_head 1 × 270 × 32 tied to model.embed_tokens: no delta goes there" in rows(out)
    assert "embed_tokens 1 × 32 × 270 tied to lm_head: no delta goes there" in rows(out)


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
