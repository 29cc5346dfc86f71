"""Labels cover the replies and their end tokens, to the token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltalab.core.errors import UserError
from deltalab.data.chat import IGNORED, Conversation, Encoded, Encodings, encode, encode_all
from deltalab.data.template import PLAIN_TEMPLATE, ChatTemplate
from tests.helpers import SHARED, TEMPLATE, byte_tokenizer

UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_PROMPT = CHATML.split("{% if add")[0]
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' <|end|>' }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "marked": TEMPLATE,
    "unmarked": UNMARKED,
    "chatml": CHATML,
    "no prompt": NO_PROMPT,
    "inst": INST,
    "plain": PLAIN_TEMPLATE,
    "none": None,
}
TURNS = Conversation((
    {"role": "user", "content": "yes?"}, {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "no"}, {"role": "assistant", "content": "no, é"},
))  # fmt: skip


def runs(sample):
    """The counted token ids, one list a run."""
    found, inside = [], False
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            if not inside:
                found.append([])
            found[-1].append(token)
        inside = label != IGNORED
    return found


def test_hand_worked():
    tokenizer = byte_tokenizer()
    sample = encode(tokenizer, Conversation.of("hi", "ok"), context=64)
    pieces = ["<|user|>", "h", "i", "<|assistant|>", "o", "k", "<|end|>"]
    ids = tokenizer.convert_tokens_to_ids(pieces)
    assert sample == Encoded(ids, [IGNORED] * 4 + ids[4:])
    assert sample.counted == 3


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_reply_with_its_end_and_nothing_else(name):
    tokenizer = byte_tokenizer(TEMPLATES[name])
    got = [tokenizer.decode(run) for run in runs(encode(tokenizer, TURNS, context=200))]
    blank = {"inst": " ", "plain": " ", "none": " "}.get(name, "")
    gap = " " if name == "inst" else ""
    assert got == [f"{blank}yes{gap}<|end|>", f"{blank}no, é{gap}<|end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokenizers_without_offsets_give_the_same(name, monkeypatch):
    tokenizer = byte_tokenizer(TEMPLATES[name])
    want = encode(tokenizer, TURNS, context=200)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert encode(tokenizer, TURNS, context=200) == want


def test_the_ids_and_the_mask_are_transformers_own():
    tokenizer = byte_tokenizer()
    own = tokenizer.apply_chat_template(list(TURNS.messages), return_dict=True, return_assistant_tokens_mask=True)
    sample = encode(tokenizer, TURNS, context=200)
    assert sample.input_ids == own["input_ids"]
    assert [label != IGNORED for label in sample.labels] == [bool(m) for m in own["assistant_masks"]]


text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)


@settings(max_examples=60, deadline=None)
@given(text, text, text, st.sampled_from([TEMPLATE, UNMARKED]))
def test_labels_decode_to_the_reply(prompt, first, second, template):
    if template != TEMPLATE:
        first, second = first.strip(), second.strip()
    tokenizer = byte_tokenizer(template)
    turns = [("user", prompt), ("assistant", first), ("user", prompt + first), ("assistant", second)]
    sample = encode(tokenizer, Conversation(tuple({"role": r, "content": c} for r, c in turns)), context=500)
    assert [tokenizer.decode(run) for run in runs(sample)] == [first + "<|end|>", second + "<|end|>"]


def test_empty_reply_is_its_end_token():
    for template in (TEMPLATE, UNMARKED, CHATML):
        tokenizer = byte_tokenizer(template)
        assert [tokenizer.decode(r) for r in runs(encode(tokenizer, Conversation.of("hi", ""), context=64))] == [
            "<|end|>"
        ]


def test_a_lone_reply_is_text_and_its_first_token_never_counts():
    tokenizer = byte_tokenizer(None)
    sample = encode(tokenizer, Conversation(({"role": "assistant", "content": "abc"},)), context=64)
    assert tokenizer.decode(sample.input_ids) == "abc<|end|>"
    assert sample.labels == [IGNORED, *sample.input_ids[1:]]


def test_system_message_is_read_not_learnt():
    tokenizer = byte_tokenizer()
    sample = encode(tokenizer, Conversation.of("hi", "ok", system="be kind"), context=64)
    assert tokenizer.decode(sample.input_ids).startswith("<|system|>be kind<|user|>hi")
    assert [tokenizer.decode(run) for run in runs(sample)] == ["ok<|end|>"]


def test_prompt_is_what_stands_before_the_reply():
    for template in TEMPLATES.values():
        if template == NO_PROMPT:
            continue
        chat = ChatTemplate(byte_tokenizer(template))
        assert chat.spans([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])[0].startswith(
            chat.prompt([{"role": "user", "content": "q"}])
        )


def test_too_long_is_cut_or_skipped_and_counted():
    tokenizer = byte_tokenizer()
    rows = [
        Conversation.of("hi", "ok"),
        Conversation.of("hi", "a longer reply"),
        Conversation.of("a longer prompt than fits", "ok"),
        Conversation.of("hi"),
    ]
    assert encode(tokenizer, rows[1], context=8) is None
    cut = encode(tokenizer, rows[1], context=8, too_long="cut")
    assert cut.cut
    assert tokenizer.decode(cut.input_ids) == "<|user|>hi<|assistant|>a lo"
    skipped = encode_all(tokenizer, rows, 8, "skip")
    assert (len(skipped), skipped.cut, skipped.skipped, skipped.unlabelled) == (1, 0, 2, 1)
    cut_all = encode_all(tokenizer, rows, 8, "cut")
    assert (len(cut_all), cut_all.cut, cut_all.skipped, cut_all.unlabelled) == (2, 1, 0, 2)
    assert (cut_all.tokens, cut_all.counted) == (15, 7)
    assert str(cut_all) == "2 samples, 15 tokens, 7 counted (1 cut, 2 left out without a label)"
    assert str(skipped) == "1 samples, 7 tokens, 3 counted (2 skipped as too long, 1 left out without a label)"


def test_digest_sees_every_token_and_label():
    a = Encodings((Encoded([1, 2], [IGNORED, 2]),))
    assert a.digest() != Encodings((Encoded([1, 2], [IGNORED, IGNORED]),)).digest()
    assert a.digest() == Encodings((Encoded([1, 2], [IGNORED, 2]),)).digest()
    assert a[0:1] == a.items


@pytest.mark.parametrize(
    ("rows", "context", "said"),
    [
        ([], 64, ("the data set is empty",)),
        (
            [Conversation.of("hi")],
            64,
            ("no sample of 1 has a token", "1 whose labels are all masked", "assistant turns"),
        ),
        (
            [Conversation.of("hi", "ok")],
            5,
            ("no sample of 1 has a token", "1 longer than the context of 5", "raise run.context"),
        ),
    ],
)
def test_nothing_left_is_refused(rows, context, said):
    with pytest.raises(UserError) as error:
        encode_all(byte_tokenizer(), rows, context)
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_template_that_refuses_a_role_says_which():
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="system, user, assistant") as error:
        encode(byte_tokenizer(template), Conversation.of("a", "b", system="s"), context=64)
    assert "no system here" in str(error.value)


def test_a_template_that_rewrites_replies_is_refused():
    with pytest.raises(UserError, match="where reply 1 stands"):
        encode(
            byte_tokenizer("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"),
            Conversation.of("a", "bc"),
            context=64,
        )


@pytest.mark.shared
@pytest.mark.skipif(SHARED is None, reason="the models beside the project are not there")
@pytest.mark.parametrize(
    ("name", "prompt"),
    [("tok361_hf", "<s> User: What is it? Assistant:"), ("stories260K_hf", "<s> User: What is it?\nAssistant:")],
)
def test_text_models_without_a_template(name, prompt):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "models" / name)
    sample = encode(tokenizer, Conversation.of("What is it?", "A cat, I think."), context=128)
    assert tokenizer.decode(sample.input_ids) == f"{prompt} A cat, I think.</s>"
    (reply,) = runs(sample)
    assert tokenizer.decode(reply).strip() == "A cat, I think.</s>"
    assert (
        sample.input_ids[: -len(reply)]
        == tokenizer(
            ChatTemplate(tokenizer).prompt([{"role": "user", "content": "What is it?"}]), add_special_tokens=False
        )["input_ids"]
    )
