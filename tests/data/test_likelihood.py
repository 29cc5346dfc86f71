"""Label likelihood against the chain rule, one token at a time."""

import pytest
import torch

from deltalab.core.errors import UserError
from deltalab.data.chat import Conversation
from deltalab.data.likelihood import choose, reply_logprobs
from tests.helpers import assert_close_by_norm, byte_tokenizer, tiny_llama

LABELS = ("negative", "positive")
PROMPTS = ["a fine film", "dull", "it is what it is, and more of it"]


def conversations():
    return [Conversation.of(p, "ignored", label=i % 2) for i, p in enumerate(PROMPTS)]


def by_hand(model, tokenizer, prompt, choice):
    ids = tokenizer.encode(f"<|user|>{prompt}<|assistant|>")
    total = 0.0
    for token in tokenizer.encode(choice):
        with torch.no_grad():
            total += float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
        ids.append(token)
    return total


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_equals_the_chain_rule(batch):
    model, tokenizer = tiny_llama(dtype=torch.float64), byte_tokenizer()
    choices = ("negative", "pos", "")[:2]
    got = reply_logprobs(model, tokenizer, conversations(), choices, context=128, batch=batch)
    want = torch.tensor([[by_hand(model, tokenizer, p, c) for c in choices] for p in PROMPTS], dtype=torch.float64)
    assert_close_by_norm(got, want, 1e-10)
    assert torch.equal(choose(model, tokenizer, conversations(), choices, context=128, batch=batch), want.argmax(-1))


def test_only_the_last_reply_counts_and_the_mode_is_kept():
    model, tokenizer = tiny_llama(dtype=torch.float64).train(), byte_tokenizer()
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    got = reply_logprobs(model, tokenizer, [Conversation(turns)], ["d"], context=64)
    want = by_hand(model, tokenizer, "a<|assistant|>b<|end|><|user|>c", "d")
    assert float(got) == pytest.approx(want, rel=1e-10)
    assert model.training


def test_a_prompt_without_room_is_refused():
    with pytest.raises(UserError, match="leaves no room for the reply 'negative'"):
        choose(tiny_llama(), byte_tokenizer(), conversations(), LABELS, context=12)
