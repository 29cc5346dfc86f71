"""`dl.step` and `dl.penalty` in any loop, and a schedule that did not run: AdaLoRA, which has both."""

import copy
import json

import pytest
import torch

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.deltas.budget import Schedule, ended
from deltalab.deltas.peft_format import load_trained_state, trained_state, write_adapter
from deltalab.deltas.schedule import is_ready
from tests.deltas.test_adalora import STEPS, one_step, optimizer_of, ours, spec, trained, without_schedule
from tests.helpers import tiny_llama, tokens


def test_it_goes_on_where_it_stopped():
    """The count of steps too: `dl.step` is not told it here."""
    whole, first = trained(ours()), ours()
    optimizer = optimizer_of(first)
    for t in range(1, 21):
        one_step(first, optimizer, t)
    second = ours()
    load_trained_state(second, {key: value.clone() for key, value in trained_state(first).items()})
    for model in (second, copy.deepcopy(first)):
        resumed = optimizer_of(model)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for t in range(21, STEPS + 1):
            one_step(model, resumed, t)
        state, want = trained_state(model), trained_state(whole)
        assert state.keys() == want.keys()
        assert all(torch.equal(state[key], want[key]) for key in want)


def refused_to_save(model, tmp_path, found):
    with pytest.raises(dl.UserError) as error:
        dl.save_adapter(model, tmp_path / "adapter")
    assert found in str(error.value)
    assert "deltalab.step" in str(error.value)
    assert "TrainerCallback" in str(error.value)
    assert not (tmp_path / "adapter").exists()


def test_a_schedule_that_did_not_run_is_not_saved(tmp_path):
    dl.save_adapter(ours(), tmp_path / "fresh")  # nothing trained yet: nothing missed
    refused_to_save(without_schedule(ours()), tmp_path, "never began")
    refused_to_save(trained(ours(), STEPS - 9), tmp_path, "stopped at step 31 of 32")
    model = trained(ours(), STEPS - 8)
    dl.save_adapter(model, tmp_path / "enough")
    refused_to_save(without_schedule(model), tmp_path, "went on without it")  # what was pruned has grown again


def test_a_loaded_adapter_that_trains_on_needs_its_schedule(tmp_path):
    write_adapter(trained(ours(), 7), tmp_path / "halfway")
    model = dl.load_adapter(tiny_llama(), tmp_path / "halfway")
    dl.save_adapter(model, tmp_path / "as it was")
    refused_to_save(without_schedule(model), tmp_path, "never began")
    dl.save_adapter(trained(model), tmp_path / "whole")


@pytest.mark.parametrize(("fields", "told", "said"), [
    ({"total_step": None}, {}, r"needs the number of optimizer steps(.|\n)*total=1000"),
    ({"total_step": 50}, {"total": 40}, "50 steps long, and this training has 40"),
    ({"total_step": None}, {"total": 13}, "no step to prune in: tinit 5, tfinal 8, 13 steps"),
])  # fmt: skip
def test_steps_that_do_not_fit(fields, told, said):
    model = ours(**fields)
    with pytest.raises(dl.UserError, match=said):
        one_step(model, optimizer_of(model), 1, **told)


def test_gradients_that_are_gone():
    with pytest.raises(dl.UserError, match=r"before optimizer.zero_grad\(\)"):
        dl.step(ours())


def test_the_length_of_the_run_may_come_from_the_loop(tmp_path):
    """Fractions of it too; the file has what they came to."""
    model = ours(total_step=None, tinit=0.25, tfinal=0.5)
    optimizer = optimizer_of(model)
    one_step(model, optimizer, 1, total=20)
    for t in range(2, 11):
        assert not ended(next(iter(attached(model).values())))
        one_step(model, optimizer, t)  # said once, it is known
    dl.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [config[key] for key in ("tinit", "tfinal", "total_step")] == [5, 10, 20]


def test_a_step_that_was_left_out_does_not_stop_the_schedule():
    model = ours()
    optimizer = optimizer_of(model)
    for t in [*range(1, 31), 34]:
        one_step(model, optimizer, t, t=t)
    assert is_ready(model)
    assert sum(int((delta.E != 0).sum()) for delta in attached(model).values()) == 2 * len(attached(model))


def test_two_groups_have_their_own_budgets():
    model = dl.adapt(tiny_llama(), [spec(targets="q,v"), spec(targets=["*down_proj"], target_r=1, init_r=3)])
    trained(model)
    left = {path: int((delta.E != 0).sum()) for path, delta in attached(model).items()}
    assert sum(n for path, n in left.items() if "down" in path) == 2
    assert sum(n for path, n in left.items() if "down" not in path) == 8


def test_steps_and_penalties_are_nothing_to_other_methods():
    model = dl.adapt(tiny_llama(), [dl.LoRA(targets="q,v"), dl.Train("norms")])
    before = {key: value.clone() for key, value in trained_state(model).items()}
    dl.step(model)
    assert dl.penalty(model) is None
    assert all(torch.equal(before[key], value) for key, value in trained_state(model).items())


def test_a_wrapped_model_is_looked_into_and_a_plain_one_refused():
    model, ids = ours(), tokens()
    wrapped = torch.nn.DataParallel(model)
    assert torch.equal(dl.penalty(wrapped), dl.penalty(model))
    model(input_ids=ids, labels=ids).loss.backward()
    dl.step(wrapped)
    assert next(iter(attached(model).values())).clock.tolist() == [1, 32, 40]
    for call in (dl.step, dl.penalty):
        with pytest.raises(dl.UserError, match="has no adapter"):
            call(tiny_llama())


def test_the_schedule_in_numbers():
    schedule = Schedule.of(0.1, 0.3, 100)
    assert schedule == (10, 70, 100)
    assert [round(schedule.left(t), 3) for t in (10, 40, 69, 70, 99)] == [1.0, 0.125, 0.0, 0.0, 0.0]
    assert Schedule.of(3, 7, 10) is None
