"""Generation: what a prompt gets is its own, whatever stands beside it in the batch."""

import pytest
import scipy.stats
import torch
import transformers

import deltalab as dl
from deltalab.deltas.adapt import attached
from deltalab.models.generate import (
    Generation,
    _Sample,
    _Stream,
    first_token_logprobs,
    generate,
    in_nucleus,
    stop_tokens,
)
from tests.deltas.perturb import perturbed
from tests.helpers import assert_close_by_norm, byte_tokenizer, tiny_gpt2, tiny_llama

PROMPTS = ["hi", "a much longer prompt than the others", "what?", "x" * 30, "hi", "why is the sky blue"]


def rendered(prompt):
    return byte_tokenizer()(f"<|user|>{prompt}<|assistant|>", return_tensors="pt")["input_ids"]


def by_hand(model, prompt, count, tokens=False):
    """Greedy decoding, one prompt at a time, the full forward for each token. tokens: their ids too."""
    tokenizer, ids, new = byte_tokenizer(), rendered(prompt), []
    for _ in range(count):
        token = int(model(ids).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return Generation(prompt, tokenizer.decode(new, skip_special_tokens=True), len(new) + 1, True)
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    reply = Generation(prompt, tokenizer.decode(new, skip_special_tokens=True), len(new), False)
    return (reply, new) if tokens else reply


@pytest.fixture(
    params=[tiny_llama, tiny_gpt2, lambda: perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=2)))],
    ids=["llama", "gpt2", "adapted"],
)
def model(request):
    return request.param()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_greedy_is_the_full_forward_by_hand_in_any_batch(model, batch_size):
    want = [by_hand(model, prompt, 10) for prompt in PROMPTS]
    assert generate(model, byte_tokenizer(), PROMPTS, max_new_tokens=10, batch_size=batch_size) == want


def test_samples_do_not_depend_on_the_batch():
    model, tokenizer = tiny_llama(), byte_tokenizer()

    def sample(prompts, **options):
        return [g.text for g in generate(model, tokenizer, prompts, max_new_tokens=8, temperature=1.0, **options)]

    want = sample(PROMPTS, seed=3)
    assert sample(PROMPTS, seed=3, batch_size=1) == sample(PROMPTS, seed=3, batch_size=4) == want
    assert sample([PROMPTS[1], PROMPTS[5]], seed=3) == [want[1], want[5]]
    assert want[0] != want[4], "the same prompt twice gets two samples"
    assert sample(PROMPTS, seed=4) != want


def test_samples_follow_the_distribution():
    """20,000 draws of one token against its probabilities, chi-square over the whole vocabulary."""
    logits, count, temperature = torch.linspace(-2, 2, 12), 20_000, 0.7
    sampler = _Sample(range(count), temperature)
    drawn = sampler(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1)).argmax(-1)
    want = (logits.double() / temperature).softmax(-1) * count
    assert scipy.stats.chisquare(drawn.bincount(minlength=12), want).pvalue > 1e-3


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 0.999])
def test_the_nucleus_is_that_of_transformers(top_p):
    scores = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)) * 2
    theirs = transformers.TopPLogitsWarper(top_p)(torch.zeros(50, 1, dtype=torch.long), scores).isfinite()
    assert torch.equal(in_nucleus(scores, top_p), theirs)


def test_samples_of_a_nucleus_follow_its_distribution():
    logits, count, top_p = torch.linspace(-2, 2, 12), 20_000, 0.6
    probabilities = logits.double().softmax(-1)
    inside = (probabilities.flip(0).cumsum(0) - probabilities.flip(0) < top_p).flip(0)  # they are sorted already
    drawn = _Sample(range(count), 1.0, top_p)(torch.zeros(count, 1, dtype=torch.long), logits.expand(count, -1))
    counts = drawn.argmax(-1).bincount(minlength=12)
    assert 1 < int(inside.sum()) < 12
    assert int(counts[~inside].sum()) == 0
    want = probabilities[inside] / probabilities[inside].sum() * count
    assert scipy.stats.chisquare(counts[inside], want).pvalue > 1e-3


def test_a_reply_is_told_as_it_comes():
    model, tokenizer, pieces = tiny_llama(), byte_tokenizer(), []
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        pieces.clear()
        (reply,) = generate(model, tokenizer, ["hi"], max_new_tokens=30, on_text=pieces.append, **options)
        assert [reply] == generate(model, tokenizer, ["hi"], max_new_tokens=30, **options)
        assert "".join(pieces) == reply.text
        assert len(pieces) > 5
    with pytest.raises(dl.UserError, match="one prompt"):
        generate(model, tokenizer, ["hi", "ho"], on_text=pieces.append)


def test_what_is_told_is_whole_characters_and_ends_before_the_stop():
    """The bytes of 'é', of '漢' and a stop, in tokens of one byte each."""
    tokenizer, told = byte_tokenizer(), []
    stream = _Stream(tokenizer, [3], told.append)
    stream.put(torch.tensor([[7, 8, 9]]))  # the prompt
    for token in tokenizer("aé漢")["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.put(torch.tensor([3]))
    stream.put(torch.tensor(tokenizer("x")["input_ids"]))
    stream.end()
    assert [piece for piece in told if piece] == ["a", "é", "漢"]
    assert len(told) == 8, "one for each token up to the stop, and the end"


def test_several_end_tokens():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    _, ids = by_hand(model, "hi", 6, tokens=True)
    assert stop_tokens(model, tokenizer) == [3]
    model.generation_config.eos_token_id = [ids[2], 7]
    assert stop_tokens(model, tokenizer) == sorted([3, 7, ids[2]])
    (stopped,) = generate(model, tokenizer, ["hi"], max_new_tokens=6)
    end = ids.index(ids[2])
    assert stopped == Generation("hi", tokenizer.decode(ids[:end], skip_special_tokens=True), end + 1, True)


def test_messages_system_and_plain_text():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert generate(model, tokenizer, [messages], max_new_tokens=5) == generate(
        model, tokenizer, ["hi"], system="be brief", max_new_tokens=5
    )
    plain = generate(model, tokenizer, ["<|user|>hi<|assistant|>"], template=False, max_new_tokens=5)
    assert plain[0].text == generate(model, tokenizer, ["hi"], max_new_tokens=5)[0].text
    for options in ({"prompts": [messages]}, {"prompts": ["hi"], "system": "be brief"}):
        with pytest.raises(dl.UserError, match="plain text"):
            generate(model, tokenizer, template=False, **options)
    with pytest.raises(dl.UserError, match="prompt 1 is empty"):
        generate(model, tokenizer, ["hi", ""], template=False)


def test_a_tokenizer_without_a_template_gets_the_plain_one():
    reply = generate(tiny_llama(), byte_tokenizer(template=None), ["hi"], max_new_tokens=5)
    with_text = generate(tiny_llama(), byte_tokenizer(), ["User: hi\nAssistant:"], template=False, max_new_tokens=5)
    assert reply[0].text == with_text[0].text


def test_prompts_that_fill_the_context():
    model, tokenizer = tiny_llama(context=32), byte_tokenizer()
    room = 32 - len("x" * 26) - 2
    texts = ["x" * 26, "hi", "x" * 27]
    got = generate(model, tokenizer, texts, max_new_tokens=10)
    assert [g.tokens for g in got] == [
        g.tokens for g in (by_hand(model, "x" * 26, room), by_hand(model, "hi", 10), by_hand(model, "x" * 27, room - 1))
    ]
    with pytest.raises(dl.UserError, match=r"1 of 2 prompts .* prompt 1 has 42 tokens, the context is 32"):
        generate(model, tokenizer, ["hi", "y" * 40])
    short, cut = generate(model, tokenizer, ["hi", "y" * 40], max_new_tokens=10, too_long="cut")
    assert (short.cut, cut.cut) == (False, True)
    assert cut.tokens <= 10
    with pytest.raises(dl.UserError, match="context"):
        first_token_logprobs(model, tokenizer, ["y" * 40])


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_arguments_out_of_range(options):
    with pytest.raises(dl.UserError, match="cannot generate"):
        generate(tiny_llama(), byte_tokenizer(), ["hi"], **options)


def test_first_token_logprobs_in_any_batch(model):
    want = torch.stack([model(rendered(prompt)).logits[0, -1].log_softmax(-1) for prompt in PROMPTS])
    for batch_size in (1, 4, 32):
        assert_close_by_norm(first_token_logprobs(model, byte_tokenizer(), PROMPTS, batch_size=batch_size), want, 1e-5)
    assert first_token_logprobs(model, byte_tokenizer(), []).shape == (0, 270)


def test_progress_and_nothing_to_do():
    seen = []
    generate(
        tiny_llama(),
        byte_tokenizer(),
        PROMPTS,
        max_new_tokens=2,
        batch_size=4,
        on_progress=lambda *done: seen.append(done),
    )
    assert seen == [(4, 6), (6, 6)]
    seen.clear()
    first_token_logprobs(
        tiny_llama(), byte_tokenizer(), PROMPTS, batch_size=4, on_progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (6, 6)
    assert generate(tiny_llama(), byte_tokenizer(), []) == []


def test_the_model_comes_back_as_it_was():
    model = perturbed(dl.adapt(tiny_llama(), dl.LoRA(r=2, dropout=0.5, targets="attention"))).train()
    model.model.norm.eval()
    modes = [m.training for m in model.modules()]
    first, second = (generate(model, byte_tokenizer(), PROMPTS, max_new_tokens=5) for _ in range(2))
    assert first == second, "dropout is off"
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for d in attached(model).values() for p in d.parameters())
    model(input_ids=rendered("hi"), labels=rendered("hi")).loss.backward()
