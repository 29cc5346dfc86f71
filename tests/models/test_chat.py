"""A conversation: each voice's replies are what generate gives it for its own turns."""

import json

import pytest
import torch

import deltalab as dl
from deltalab.models.chat import Answer, Session, Settings, Stop
from deltalab.models.generate import generate
from deltalab.models.named import BASE, named, put_on, speaking
from tests.deltas.perturb import perturbed
from tests.helpers import byte_tokenizer, tiny_llama, tokens

SHORT = Settings(max_new_tokens=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters that say different things; the second trains own weights too."""
    at = tmp_path_factory.mktemp("adapters")
    for seed, (name, spec) in enumerate({"fr": dl.LoRA(r=2, targets="all-linear"), "sql": [dl.LoRA(r=3), dl.Train("norms")]}.items()):  # fmt: skip
        dl.save_adapter(perturbed(dl.adapt(tiny_llama(context=512), spec), 0.3, seed), at / name)
    return {name: at / name for name in ("fr", "sql")}


@pytest.fixture
def session(folders):
    return Session(tiny_llama(context=512), byte_tokenizer(), folders, settings=SHORT)


def alone(folder, messages, **options):
    """What a model that has this adapter alone replies."""
    model = tiny_llama(context=512)
    if folder is not None:
        dl.load_adapter(model, folder)
    return generate(model, byte_tokenizer(), [messages], max_new_tokens=6, **options)[0].text


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_every_voice_replies_as_it_does_alone(session, folders):
    assert session.active == ["fr"]
    first = session.ask("hi").replies["fr"]
    assert first == alone(folders["fr"], [user("hi")])
    session.use("sql")
    turns = [user("hi"), assistant(first), user("and?")]
    second = session.ask("and?").replies["sql"]
    assert second == alone(folders["sql"], turns)
    session.use(BASE)
    turns += [assistant(second), user("so")]
    assert session.ask("so").replies[BASE] == alone(None, turns)
    assert len({alone(folder, [user("hi")]) for folder in (*folders.values(), None)}) == 3


def test_voices_beside_each_other_keep_their_own_turns(session, folders):
    shared = session.ask("hi").replies["fr"]
    session.use(BASE, "fr")
    before = [user("hi"), assistant(shared)]
    answer = session.ask("one")
    assert list(answer.replies) == [BASE, "fr"]
    again = session.ask("two")
    for name, folder in ((BASE, None), ("fr", folders["fr"])):
        one = alone(folder, [*before, user("one")])
        assert answer.replies[name] == one
        turns = [*before, user("one"), assistant(one), user("two")]
        assert again.replies[name] == alone(folder, turns)
        assert session.messages(name) == [*turns, assistant(again.replies[name])]
    assert session.undo() == "two"
    session.use("fr")
    assert session.messages("fr") == [*before, user("one"), assistant(answer.replies["fr"])]


def test_the_pieces_are_the_reply_and_the_system_prompt_is_read(session, folders):
    heard = []
    session.system = "be brief"
    answer = session.ask("hi", lambda name, piece: heard.append((name, piece)))
    assert "".join(piece for _, piece in heard) == answer.replies["fr"]
    assert answer.replies["fr"] == alone(folders["fr"], [{"role": "system", "content": "be brief"}, user("hi")])
    assert {name for name, _ in heard} == {"fr"}
    assert answer.long == ["fr"]
    session.system = None
    assert session.messages("fr") == [user("hi"), assistant(answer.replies["fr"])]


def test_a_stopped_reply(session):
    heard = []

    def hear(name, piece):
        heard.append(piece)
        if name == "fr" and len(heard) >= 3:
            raise Stop

    answer = session.ask("hi", hear)
    assert answer == Answer({"fr": "".join(heard)}, [], True)
    assert session.messages("fr") == [user("hi"), assistant("".join(heard))]
    session.use(BASE, "fr")
    before = session.messages("fr")
    assert session.ask("more", hear).stopped
    assert session.messages("fr") == session.messages(BASE) == before, "of several, none keeps the question"


def test_a_question_that_fails_leaves_no_trace(session):
    session.ask("hi")
    before = session.messages("fr")
    with pytest.raises(dl.UserError, match="leave no room"):
        session.ask("x" * 600)
    with pytest.raises(ZeroDivisionError):
        session.ask("more", lambda name, piece: 1 / 0)
    assert session.messages("fr") == before
    for mistake in (lambda: session.use("frr"), lambda: session.use("fr", "nobody"), lambda: session.use("fr", "fr")):
        with pytest.raises(dl.UserError):
            mistake()
    assert session.active == ["fr"]
    assert session.messages("fr") == before


def test_samples_differ_from_turn_to_turn_and_come_again(folders):
    def talk(seed):
        settings = Settings(max_new_tokens=8, temperature=1.0, seed=seed)
        session = Session(tiny_llama(context=512), byte_tokenizer(), folders, settings=settings)
        said = session.ask("hi").replies["fr"]
        session.undo()
        return said, session.ask("hi").replies["fr"]

    first = talk(0)
    assert first[0] != first[1]
    assert talk(0) == first
    assert talk(1) != first


def test_settings():
    settings = Settings().changed("temperature", "0.7").changed("top-p", "0.9").changed("max_new_tokens", "5")
    assert settings.changed("seed", "-3") == Settings(5, 0.7, 0.9, -3)
    for name, text, message in (
        ("temprature", "1", "nearest: temperature"),
        ("temperature", "hot", "is a number"),
        ("temperature", "-1", "temperature=-1"),
        ("temperature", "nan", "temperature=nan"),
        ("top_p", "0", "top_p=0"),
        ("max_new_tokens", "1.5", "is a number"),
        ("max_new_tokens", "0", "max_new_tokens=0"),
    ):
        with pytest.raises(dl.UserError, match=message):
            settings.changed(name, text)


def test_loading_more_saving_and_emptying(session, folders, tmp_path):
    session.load("second", folders["fr"])
    assert session.active == ["fr"]
    session.use("second")
    reply = session.ask("hi").replies["second"]
    assert reply == alone(folders["fr"], [user("hi")])
    for name, folder, message in (("fr", folders["fr"], "is taken"), (BASE, folders["fr"], "is taken"), ("x", tmp_path / "no", "does not exist")):  # fmt: skip
        with pytest.raises(dl.UserError, match=message):
            session.load(name, folder)
    assert session.ask("hi").replies["second"], "the model is as it was"
    session.undo()
    path = session.save(tmp_path / "talk.jsonl")
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["adapter"] == "second"
    assert row["messages"] == [user("hi"), assistant(reply)]
    with pytest.raises(dl.UserError, match="there already"):
        session.save(path)
    session.reset()
    assert session.messages("second") == []
    for empty in (session.undo, lambda: session.save(tmp_path / "other")):
        with pytest.raises(dl.UserError, match="empty"):
            empty()


def test_speaking_is_the_adapter_or_the_base_to_the_bit(folders):
    model, ids = tiny_llama(context=512), tokens()
    want = {BASE: model(ids).logits} | {name: dl.load_adapter(tiny_llama(context=512), f)(ids).logits for name, f in folders.items()}  # fmt: skip
    put_on(model, folders)
    for name in ("fr", BASE, "sql", BASE, "fr", "sql"):
        with speaking(model, name):
            assert torch.equal(model(ids).logits, want[name]), name
    with pytest.raises(dl.UserError, match="no adapter 'french'"), speaking(model, "french"):
        pass


def test_names(tmp_path):
    for folder in ("fr", "runs/first/adapter", "a=b"):
        (tmp_path / folder).mkdir(parents=True)
    at = str(tmp_path)
    assert named([f"x={at}/fr", f"{at}/fr", BASE]) == {"x": tmp_path / "fr", "fr": tmp_path / "fr", BASE: None}
    assert named([f"{at}/runs/first/adapter", f"{at}/a=b"]) == {"first": tmp_path / "runs/first/adapter", "a=b": tmp_path / "a=b"}  # fmt: skip
    assert named([]) == {}
    for entries, message in (([f"={at}"], "names no adapter"), (["fr="], "names no adapter"), ([f"{at}/fr", f"fr={at}/fr"], "are called 'fr'"),
                             ([f"base={at}/fr"], "without an adapter")):  # fmt: skip
        with pytest.raises(dl.UserError, match=message):
            named(entries)
