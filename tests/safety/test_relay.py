"""A streamed score in a relay through groups of blocks: bitwise what whole passes give, and refused where it does not hold."""

import pytest
import torch
import transformers

from deltalab.deltas import LoRA
from deltalab.deltas.adapt import adapt
from deltalab.deltas.select import decoder_blocks, scored_linears
from deltalab.safety import relay as module
from deltalab.safety import snip as scores
from deltalab.safety.calibration import Calibration
from deltalab.safety.relay import Relay, relay_of
from deltalab.safety.snip import groups, snip, summed_loss
from tests.deltas.perturb import perturbed
from tests.helpers import tiny_gpt2, tiny_llama
from tests.safety.reference import brute_snip, largest, ragged, samples


def tiny_neox():
    """Attention and MLP side by side: a block uses its states three times."""
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(vocab_size=270, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                        intermediate_size=48, max_position_embeddings=64)  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config).eval()


MODELS = {
    "llama": lambda: tiny_llama(layers=5),
    "bf16": lambda: tiny_llama(layers=5, dtype=torch.bfloat16),
    "gpt2": tiny_gpt2,
    "neox": tiny_neox,
    "adapted": lambda: perturbed(adapt(tiny_llama(layers=3), LoRA(targets="all-linear"))),
}


@pytest.fixture
def runs(monkeypatch):
    """How often each way through the model was taken: the trial, forwards that fill, whole losses."""
    seen = {"trial": [], "fill": 0, "loss": 0}
    holds, fill, loss = Relay.holds, Relay.fill, Relay.loss

    def tried(self, batch):
        before = seen["fill"], seen["loss"]
        seen["trial"].append(holds(self, batch))
        seen["fill"], seen["loss"] = before
        return seen["trial"][-1]

    def counting(name, of):
        def call(self, *args, **kwargs):
            seen[name] += 1
            return of(self, *args, **kwargs)

        return call

    monkeypatch.setattr(Relay, "holds", tried)
    monkeypatch.setattr(Relay, "fill", counting("fill", fill))
    monkeypatch.setattr(Relay, "loss", counting("loss", loss))
    return seen


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_relay_is_bitwise_the_whole_pass(runs, name, halves):
    model, data = MODELS[name](), ragged()
    want, blocks = snip(model, data, batch=3, halves=halves), len(decoder_blocks(model)[1])
    before = [(dict(block.__dict__), len(block._forward_pre_hooks)) for block in decoder_blocks(model)[1]]
    for each in (1, 2):
        runs.update(trial=[], fill=0, loss=0)
        got, passes = snip(model, data, batch=3, mode="streamed", blocks=each, halves=halves), -(-blocks // each)
        assert all(torch.equal(got[path], want[path]) for path in want)
        assert runs["trial"] == [True] * (passes > 1)
        assert (runs["fill"], runs["loss"]) == ((2, 2 * passes) if passes > 1 else (0, 0))
    assert [(dict(block.__dict__), len(block._forward_pre_hooks)) for block in decoder_blocks(model)[1]] == before


def test_only_the_groups_that_are_missing(runs, tmp_path):
    """The first two of five blocks and the last are there: the relay ends at the third, and its last leg is two blocks."""
    model, data = tiny_llama(layers=5), ragged()
    want = snip(model, data, batch=3, folder=tmp_path / "s")
    for path in want:
        if path.split(".")[2] in "23":
            (tmp_path / "s" / f"{path}.safetensors").unlink()
    (tmp_path / "s/scores.json").rename(tmp_path / "s/scores.partial.json")
    whole, got = (
        snip(model, data, batch=3),
        snip(model, data, batch=3, folder=tmp_path / "s", mode="streamed", blocks=1),
    )
    assert all(torch.equal(got[path], whole[path]) for path in whole)
    assert (runs["trial"], runs["fill"], runs["loss"]) == ([True], 2, 4)


class Aside(torch.nn.Module):
    """A block that hands something on besides its hidden states: to the block that comes two after it."""

    def __init__(self, block, shelf, put):
        super().__init__()
        self.block, self.shelf, self.put = block, shelf, put

    def forward(self, hidden_states, *args, **kwargs):
        if not self.put:
            hidden_states = hidden_states + self.shelf[0]
        elif len(self.shelf):
            self.shelf[0] = hidden_states
        else:
            self.shelf.append(hidden_states)
        return self.block(hidden_states, *args, **kwargs)


def test_blocks_that_pass_something_else_on_are_run_whole(runs):
    model, data, shelf = tiny_llama(layers=3, dtype=torch.float64), ragged(), []
    model.model.layers[0] = Aside(model.model.layers[0], shelf, True)
    model.model.layers[2] = Aside(model.model.layers[2], shelf, False)
    got = snip(model, data, batch=3, mode="streamed", blocks=1)
    assert runs["trial"] == [False]
    assert largest(got, brute_snip(model, data)) < 1e-10


def test_a_fault_in_the_trial_is_no_fault_of_the_score(runs, monkeypatch):
    def broken(_block):
        raise TypeError("called in parts")

    monkeypatch.setattr(module, "_passing", broken)
    model, data = tiny_llama(layers=3), ragged()
    want, got = snip(model, data, batch=3), snip(model, data, batch=3, mode="streamed", blocks=1)
    assert runs["trial"] == [False]
    assert all(torch.equal(got[path], want[path]) for path in want)


def test_states_that_take_more_than_the_sums_are_not_kept(runs, monkeypatch):
    model, data = tiny_llama(layers=2), ragged()
    want = snip(model, data, batch=3)
    monkeypatch.setattr(scores, "STATES", 0)
    monkeypatch.setattr(Calibration, "padded", lambda self, size: 10**6)
    got = snip(model, data, batch=3, mode="streamed", blocks=1)
    assert (runs["trial"], runs["fill"], runs["loss"]) == ([True], 0, 0)
    assert all(torch.equal(got[path], want[path]) for path in want)


def test_what_is_kept_is_what_was_announced_and_is_given_back():
    model, data = tiny_llama(layers=5).requires_grad_(False), Calibration(ragged(), "predicting", "loss")
    paths = groups(model, list(scored_linears(model)), "streamed", 2)
    relay = relay_of(model, paths, lambda batch: summed_loss(model, batch))
    assert relay.starts == [0, 2, 4]
    assert relay.holds(data.shortest(model))
    assert relay.states == relay.gradients == {}
    for number, part in enumerate(data.batches(3, model)):
        relay.fill(number, part)
    most = relay.per_token * data.padded(3)
    assert sum(h.nbytes for h in relay.states.values()) == most * 3 / 4  # three states, and one gradient to come
    for start in reversed(relay.starts):
        for number, part in enumerate(data.batches(3, model)):
            loss = relay.loss(start, number, part)
            if loss.requires_grad:
                loss.backward()
            relay.done()
    assert relay.states == relay.gradients == {}


def test_no_relay_of_one_group_or_outside_the_blocks():
    model = tiny_llama(layers=2)
    paths = list(scored_linears(model))
    whole = lambda batch: summed_loss(model, batch)  # noqa: E731
    assert relay_of(model, [paths], whole) is None
    assert relay_of(model, [["lm_head"], paths], whole) is None
    assert relay_of(model, groups(model, paths, "streamed", 1)[::-1], whole) is None
    modules = {"head": model.lm_head, **scored_linears(model)}
    got = snip(model, samples(2), modules=modules, mode="streamed", blocks=1)
    want = snip(model, samples(2), modules=modules)
    assert all(torch.equal(got[path], want[path]) for path in want)
