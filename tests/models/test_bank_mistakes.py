"""What a bank refuses, by name, and leaves as it was."""

import copy

import pytest
import torch

import deltalab as dl
from deltalab.core.errors import UserError
from deltalab.deltas.adapt import attached
from tests.deltas.perturb import states_equal
from tests.families import model_of
from tests.helpers import tiny_llama, tokens
from tests.models.banks import adapted, bank_of, logits


def test_mistakes_are_told_in_words(tmp_path):
    bank = bank_of("french", "sql")
    with pytest.raises(UserError, match=r"no adapter 'frensh'(.|\n)*nearest: french"), bank.rows(["frensh"]):
        pass
    with pytest.raises(UserError, match=r"no adapter 'frensh'(.|\n)*nearest: french"):
        bank.remove("frensh")
    with pytest.raises(UserError, match="no adapter 'frensh'"):
        bank.generate(["hi", "ho"], ["sql", "frensh"])
    with pytest.raises(UserError, match="2 prompts and 1 adapters"):
        bank.generate(["hi", "ho"], ["sql"])
    for names in ("sql", []):
        with pytest.raises(UserError, match="takes a list of names"), bank.rows(names):
            pass
    for rows, repeat in ((3, 1), (4, 1), (4, 3)):
        with (
            pytest.raises(UserError, match=rf"told of 2 rows, and '.*' gets {rows}"),
            bank.rows(["sql", None], repeat=repeat),
        ):
            logits(bank.model, tokens(rows))
    with pytest.raises(UserError, match="has an adapter 'sql' already"):
        bank.add("sql", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        bank.add("new", tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no adapter"):
        bank.add("new", tiny_llama())
    with pytest.raises(UserError, match="does not fit 'model.layers.0"):
        bank.add("new", adapted(tiny_llama(hidden=64), 0, dl.LoRA()))
    with pytest.raises(UserError, match=r"adapts 'model.layers.2"):
        bank.add("new", adapted(tiny_llama(layers=3), 0, dl.LoRA()))
    assert bank.names == ["french", "sql"]
    bank.close()
    bank.close()
    for ask in (
        lambda: bank.add("x", tmp_path),
        lambda: bank.generate(["hi"], [None]),
        lambda: bank.rows([None]).__enter__(),
    ):
        with pytest.raises(UserError, match="closed"):
            ask()


@pytest.mark.parametrize("own", [dl.Train("norms"), dl.Train(["lm_head"])])
def test_an_adapter_that_trains_the_shared_base_is_refused_and_the_base_untouched(tmp_path, own):
    bank = bank_of("sql")
    before = copy.deepcopy(bank.model.state_dict())
    model = adapted(tiny_llama(), 0, dl.LoRA(), own)
    dl.save_adapter(model, tmp_path)
    for source in (tmp_path, model):
        with pytest.raises(UserError, match="the base is shared"):
            bank.add("new", source)
    assert all(torch.equal(value, before[key]) for key, value in bank.model.state_dict().items())
    assert bank.names == ["sql"]


@pytest.mark.parametrize("spec", [dl.Bottleneck(), dl.ZeroInitPrefix()], ids=["Bottleneck", "ZeroInitPrefix"])
def test_a_whole_sublayer_is_refused_by_name(spec):
    bank = bank_of("sql")
    with pytest.raises(UserError, match=rf"acts on 'model.layers.*rows of a batch(.|\n)*{type(spec).__name__}"):
        bank.add("new", adapted(tiny_llama(), 0, spec))
    assert bank.names == ["sql"]


def test_what_has_no_rows_is_refused_by_name():
    bank = dl.AdapterBank(model_of("mixtral"))
    model = adapted(model_of("mixtral"), 0, dl.LoRA(targets="all-linear"))
    with pytest.raises(UserError, match=r"acts on 'model.layers.0.mlp.experts.*rows of a batch"):
        bank.add("experts", model)
    assert len(bank) == 0


def test_a_model_in_use_takes_no_other_adapter():
    bank = bank_of("sql")
    with pytest.raises(UserError, match=r"in use(.|\n)*bank.close"):
        dl.adapt(bank.model, dl.LoRA())
    with pytest.raises(UserError, match="adapted"):
        dl.AdapterBank(bank.model)
    with bank.rows(["sql"]):
        logits(bank.model, tokens(1))
    with pytest.raises(UserError, match="adapted"):
        dl.AdapterBank(dl.adapt(tiny_llama(), dl.LoRA()))
    with pytest.raises(UserError, match="input"):
        dl.merged(bank.model)
    bank.close()
    assert attached(dl.adapt(bank.model, dl.LoRA()))


def test_a_bank_that_cannot_begin_leaves_the_model_as_it_was(tmp_path):
    model = tiny_llama().train()
    with pytest.raises(UserError, match="does not exist"):
        dl.AdapterBank(model, {"x": tmp_path / "nowhere"})
    assert states_equal(model, tiny_llama().train())
    assert all(module.training for module in model.modules())
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(UserError, match="forward"):
        dl.AdapterBank(model)
    del model.lm_head.forward
    assert states_equal(model, tiny_llama().train())
