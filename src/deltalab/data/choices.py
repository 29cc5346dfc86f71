"""Questions with a few answers, for a model that reads them and has an output for each answer: an encoder with a head."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from deltalab.core.errors import UserError
from deltalab.data.chat import IGNORED, Conversation, Encoded, Encodings, TooLong


def encode_choices(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], context: int, too_long: TooLong = "skip"
) -> Encodings:
    """Each conversation's texts as the tokenizer puts one or two of them together; the class is its `meta["label"]`.

    The texts are `meta["texts"]`, or else the first message. One that is longer than `context` tokens is skipped, or cut: of two
    texts the longer one.
    Raises: UserError if there is no conversation, none is left, or one has no label.
    """
    samples = [_encoded(tokenizer, conversation, context) for conversation in conversations]
    if not samples:
        raise UserError("the data set is empty.", found="0 questions", next="check `limit` and the data's path")
    kept = tuple(sample for sample in samples if too_long == "cut" or not sample.cut)
    if not kept:
        raise UserError(f"every one of {len(samples)} questions is longer than the context of {context} tokens.",
                        next="raise run.context, or run.too_long=cut")  # fmt: skip
    return Encodings(kept, sum(s.cut for s in kept), len(samples) - len(kept))


def _encoded(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, context: int) -> Encoded:
    label = conversation.meta.get("label")
    if not isinstance(label, int):
        raise UserError("a question has no class, which a classifier learns.",
                        found=conversation.messages[0]["content"][:80], next="data with `task: sst2`, `rte`, `mrpc`, … or `rows` with answers")  # fmt: skip
    first, *second = conversation.meta.get("texts") or (conversation.messages[0]["content"],)
    if len(second) > 1:
        first, second = "\n".join((first, *second[:-1])), second[-1:]
    whole = tokenizer(first, *second)["input_ids"]
    made = tokenizer(first, *second, truncation="longest_first", max_length=context)
    ids = list(made["input_ids"])
    types = list(made["token_type_ids"]) if "token_type_ids" in made else None
    return Encoded(ids, [label, *[IGNORED] * (len(ids) - 1)], len(whole) > context, label, types)
