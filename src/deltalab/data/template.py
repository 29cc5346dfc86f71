"""Where the replies stand in a rendered conversation, to the character and then to the token.

The text comes from the tokenizer's own chat template. Its `{% generation %}` blocks tell where a reply stands; a
template without them is rendered up to and with each reply, and the reply is what the longer text has more. Characters
first and tokens second: a token that merges a blank of the template with the reply's first word belongs to the reply.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from deltalab.core.errors import UserError

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ (' ' if loop.index0 else '') + m['content'] + (eos_token or '') }}{% endgeneration %}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% else %}{{ 'User: ' + m['content'] + '\nAssistant:' }}{% endif %}{% endfor %}"
)
"""For tokenizers without a template: `<s>User: …\\nAssistant: reply</s>`; a lone assistant turn is plain text."""

Messages = Sequence[Mapping[str, str]]


class ChatTemplate:
    """A tokenizer's chat template, or the plain one, with its way from messages to counted tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE
        self._marks = re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)

    def prompt(self, messages: Messages) -> str:
        """The text that a model continues with its reply to the last message."""
        return self._render(messages, prompt=True)[0]

    def tokens(self, messages: Messages, *, last: bool = False) -> tuple[list[int], list[bool]]:
        """Token ids of the conversation, and which of them are a reply's text or the end token behind it.

        last: of the last reply only.
        """
        text, spans = self.spans(messages)
        spans = spans[-1:] if last else spans
        if not self.tokenizer.is_fast:
            return self._in_pieces(text, spans)
        batch = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(batch["input_ids"]), batch["offset_mapping"]
        counted = [False] * len(ids)
        for start, stop, end in spans:
            inside = [i for i, offset in enumerate(offsets) if _overlaps(offset, start, stop)]
            for i in inside:
                counted[i] = True
            # an empty reply has no token: its end token is the first one at or behind its place
            behind = inside[-1] + 1 if inside else sum(offset[0] < start for offset in offsets)
            self._count_end(ids, counted, behind, sum(offset[0] < end for offset in offsets))
        return ids, counted

    def spans(self, messages: Messages) -> tuple[str, list[tuple[int, int, int]]]:
        """The rendered text, and per reply: its first character, its end, and the end of what the template adds."""
        text, marked = self._render(messages)
        replies = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if replies and len(marked) == len(replies):
            ends = [start for start, _ in marked[1:]] + [len(text)]
            return text, [(start, stop, end) for (start, stop), end in zip(marked, ends, strict=True)]
        spans = []
        for k in replies:
            before = self._render(messages[:k], prompt=True)[0] if k else ""
            after = text if k + 1 == len(messages) else self._render(messages[: k + 1])[0]
            low, high = _shared(before, text), _shared(after, text)
            for reply in (messages[k]["content"], messages[k]["content"].strip()):  # most templates strip
                start = text.find(reply, low, high)
                if start >= 0:
                    stop = start + len(reply)
                    # a blank behind the prompt is the model's to write; the name of a role is the template's
                    spans.append((start if text[low:start].strip() else low, stop, high))
                    break
            else:
                raise UserError(f"cannot tell where reply {len(spans) + 1} stands in the rendered conversation.",
                                found=f"the chat template changes its text, to {text[low:high][:80]!r}",
                                next="use a chat template with {% generation %} marks")  # fmt: skip
        return text, spans

    def _render(self, messages: Messages, *, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text and the template's own reply spans, none if it marks none."""
        marks = self._marks and not prompt
        special: dict[str, Any] = self.tokenizer.special_tokens_map
        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]], chat_template=self.source,
                add_generation_prompt=prompt, return_assistant_tokens_mask=marks, **special)  # fmt: skip
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages) or "no message"
            raise UserError(f"the tokenizer's chat template cannot render the roles: {roles}.", found=str(error),
                            next="change the data's roles, or set another tokenizer.chat_template") from None  # fmt: skip
        texts, spans = rendered
        return str(texts[0]), [(int(span[0]), int(span[1])) for span in spans[0]] if marks else []

    def _count_end(self, ids: list[int], counted: list[bool], at: int, limit: int) -> None:
        """Count the end token at `at` or behind blanks there, unless the reply's span held one already."""
        if at and counted[at - 1] and ids[at - 1] in self.special:
            return
        for last in range(at, limit):
            if ids[last] in self.special:
                counted[at : last + 1] = [True] * (last + 1 - at)
                return
            if str(self.tokenizer.decode([ids[last]])).strip():
                return

    def _in_pieces(self, text: str, spans: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[bool]]:
        """For tokenizers without character offsets: what is in and what is outside a reply is tokenized apart."""
        ids: list[int] = []
        counted: list[bool] = []

        def add(piece: str, flag: bool) -> None:
            new = self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            ids.extend(new)
            counted.extend([flag] * len(new))

        position = 0
        for start, stop, end in spans:
            add(text[position:start], False)
            add(text[start:stop], True)
            at = len(ids)
            add(text[stop:end], False)
            self._count_end(ids, counted, at, len(ids))
            position = end
        add(text[position:], False)
        return ids, counted


def _overlaps(offset: tuple[int, int], start: int, stop: int) -> bool:
    """Whether a token shares a character with [start, stop). A blank that the tokenizer trimmed stands before it."""
    first, end = offset
    return (first if first < end else end - 1) < stop and end > start


def _shared(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
