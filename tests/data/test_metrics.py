"""Measures equal scikit-learn's, sacrebleu's, rouge-score's, and the official definitions on cases worked out by hand."""

import math
import random

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics as sk

from deltalab.data import metrics

RNG = random.Random(0)


@pytest.mark.parametrize("positive", [0, 1])
def test_classification_is_scikit_learns(positive: int) -> None:
    labels = [RNG.randrange(2) for _ in range(200)]
    said = [y if RNG.random() < 0.7 else 1 - y for y in labels]
    found = metrics.classification(said, labels, positive)
    assert found["accuracy"].value == pytest.approx(sk.accuracy_score(labels, said))
    for name, reference in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        assert found[name].value == pytest.approx(reference(labels, said, pos_label=positive))
    assert found["accuracy"].items == [float(a == b) for a, b in zip(said, labels, strict=True)]
    assert found["f1"].items is None


def test_a_class_that_is_never_said_has_no_precision() -> None:
    found = metrics.classification([0, 0], [0, 1], positive=1)
    assert (found["precision"].value, found["recall"].value, found["f1"].value) == (0, 0, 0)


@pytest.mark.parametrize(
    ("said", "answers", "exact", "f1"),
    [
        ("The Eiffel-Tower!", ["eiffel tower"], 0, 0),  # a hyphen goes, and two words become one
        ("the Eiffel Tower.", ["Eiffel tower"], 1, 1),
        ("in Paris, France", ["Paris"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("a b b c", ["b b d"], 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # "a" is an article; b counts twice
        ("1987", ["1988", "in 1987"], 0, 2 * 1 * 0.5 / 1.5),  # the best of the answers
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("the", [], 1, 1),  # nothing is left of an article
        ("Paris", ["...", "paris"], 1, 1),  # an answer of marks alone is none
    ],
)
def test_squad_by_hand(said: str, answers: list[str], exact: float, f1: float) -> None:
    found = metrics.squad([said], [answers])
    assert found["exact"].value == exact
    assert found["f1"].value == pytest.approx(f1)


def test_squad_apart_by_whether_there_is_an_answer() -> None:
    found = metrics.squad(["Paris", "", "x", "Rome"], [["Paris"], [], [], ["Rome now"]])
    assert found["exact"] == (0.5, [1, 1, 0, 0])
    assert found["has_answer_exact"].value == 0.5
    assert found["has_answer_f1"].value == pytest.approx((1 + 2 / 3) / 2)
    assert found["no_answer_exact"].value == found["no_answer_f1"].value == 0.5
    assert "no_answer_f1" not in metrics.squad(["Paris"], [["Paris"]])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 48 / 2 = <<48/2=24>>24 clips.\n#### 72", "72"), ("#### 1,234", "1234"), ("the answer is -3.50 dollars", "-3.5"),
        ("$1,000.00", "1000"), ("3 apples and 4 pears", "4"), ("none", None), ("#### 5\nand then 6", "5"), ("#### none, of 7", "7"),
        ("0.0", "0"), ("#### nothing", None), ("", None), ("100", "100"), ("10.", "10"),
    ],
)  # fmt: skip
def test_final_numbers(text: str, number: str | None) -> None:
    assert metrics.final_number(text) == number


def test_numbers_without_an_answer_are_wrong() -> None:
    assert metrics.numbers(["It is 72.", "none", "71"], ["#### 72", "#### 72", "#### 72"])["exact"].items == [1, 0, 0]


def texts(n: int = 40) -> tuple[list[str], list[str]]:
    words = "if ( x == null ) return foo_bar . baz ( ) ; else throw new Error".split()
    references = [" ".join(RNG.choices(words, k=RNG.randrange(1, 25))) for _ in range(n)]
    said = [" ".join(w for w in r.split() if RNG.random() < 0.8) for r in references]
    return said, references


def test_rouge_l_is_rouge_scores() -> None:
    said, references = texts()
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    want = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(said, references, strict=True)]
    assert metrics.rouge_l(said, references)["rouge_l"].items == pytest.approx(want)


def test_corpus_bleu_is_sacrebleus() -> None:
    said, references = texts()
    want = sacrebleu.corpus_bleu(said, [references], tokenize="none", smooth_method="none", force=True).score
    assert metrics.corpus_bleu(said, references)["bleu4"].value == pytest.approx(want / 100)


def test_smoothed_bleu_is_sacrebleus_but_for_the_brevity_penalty() -> None:
    """The precisions of sacrebleu's add-one smoothing, over tokens apart by spaces."""
    for said, reference in zip(*texts(), strict=True):
        ours = [" ".join(metrics._code_words(text)) for text in (said, reference)]
        found = sacrebleu.sentence_bleu(ours[0], [ours[1]], tokenize="none", smooth_method="add-k", smooth_value=1, use_effective_order=False)  # fmt: skip
        lengths = [len(text.split()) for text in ours]
        if lengths[0] < 4 or not found.precisions[0]:
            continue
        penalty = math.exp(min(0.0, 1 - (lengths[1] + 1) / (lengths[0] + 1)))
        want = penalty * math.exp(sum(math.log(p / 100) for p in found.precisions) / 4)
        assert metrics.smoothed_bleu([said], [reference])["bleu4"].value == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("said", "wanted", "bleu"),
    [
        ("fix this", "fix this", 1.0),
        ("Fix foo_bar!", "fix foo _ bar !", 1.0),
        ("", "a b", math.exp(-2)),  # nothing said: the penalty alone, as there
        ("x", "a b", 0.0),
        ("a b c d", "a b c d e f", math.exp(1 - 7 / 5)),
        ("a x c d", "a b c d", ((3 / 4) * (2 / 4) * (1 / 3) * (1 / 2)) ** 0.25),
    ],
)
def test_smoothed_bleu_by_hand(said: str, wanted: str, bleu: float) -> None:
    assert metrics.smoothed_bleu([said], [wanted])["bleu4"].value == pytest.approx(bleu)


def test_exact_match_looks_past_white_space() -> None:
    assert metrics.exact_match(["a  b\n", "a b"], ["a b", "ab"])["exact"].items == [1, 0]


def test_no_example_has_no_mean() -> None:
    assert math.isnan(metrics.mean([]).value)
