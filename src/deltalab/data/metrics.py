"""How well predictions fit what was wanted, on plain values.

Every function gives measures by name, each a number and, where the number is a mean over examples, their values, so that two
models can be paired example by example. Shares are in [0, 1], BLEU and ROUGE too.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Measure(NamedTuple):
    """A number; items: one value an example, whose mean it is, or None where it is no mean."""

    value: float
    items: list[float] | None = None


Measures = dict[str, Measure]


def mean(items: Sequence[float]) -> Measure:
    """The mean of the examples' values; NaN of none."""
    values = [float(item) for item in items]
    return Measure(math.fsum(values) / len(values) if values else math.nan, values)


def classification(predictions: Sequence[int], labels: Sequence[int], positive: int | None = None) -> Measures:
    """accuracy; with a positive class also its precision, recall and f1, each 0 where it divides by nothing."""
    from sklearn.metrics import precision_recall_fscore_support

    found = {"accuracy": mean([p == y for p, y in zip(predictions, labels, strict=True)])}
    if positive is not None:
        truth, said = [y == positive for y in labels], [p == positive for p in predictions]
        values = precision_recall_fscore_support(truth, said, average="binary", zero_division=0)
        found |= {name: Measure(float(v)) for name, v in zip(("precision", "recall", "f1"), values[:3], strict=True)}
    return found


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> Measures:
    """exact: the share of predictions that are the reference, white space aside."""
    return {"exact": mean([p.split() == r.split() for p, r in zip(predictions, references, strict=True)])}


# SQuAD 2.0 (Rajpurkar et al. 2018, arXiv:1806.03822), as its official evaluation defines it


def normalised(answer: str) -> str:
    """Lower case, without punctuation and the articles a, an, the; single spaces."""
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def overlap(prediction: str, answer: str) -> float:
    """F1 of the tokens that two answers share, repeated ones as often as in both; of an empty one: whether both are."""
    said, wanted = normalised(prediction).split(), normalised(answer).split()
    if not said or not wanted:
        return float(said == wanted)
    same = sum((Counter(said) & Counter(wanted)).values())
    return 2 * same / (len(said) + len(wanted))


def squad(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Measures:
    """exact and f1, of the best of each question's answers; the same of the questions with and without an answer.

    answers: none where a question has no answer; then the prediction should be empty.
    """
    exact, f1, there = [], [], []
    for said, given in zip(predictions, answers, strict=True):
        wanted = [answer for answer in given if normalised(answer)]
        there.append(bool(wanted))
        exact.append(max(float(normalised(said) == normalised(answer)) for answer in wanted or [""]))
        f1.append(max(overlap(said, answer) for answer in wanted or [""]))
    found = {"exact": mean(exact), "f1": mean(f1)}
    for name, kind in (("has_answer", True), ("no_answer", False)):
        for measure, items in (("exact", exact), ("f1", f1)):
            chosen = [value for value, has in zip(items, there, strict=True) if has is kind]
            if chosen:
                found[f"{name}_{measure}"] = Measure(mean(chosen).value)
    return found


# GSM8K (Cobbe et al. 2021, arXiv:2110.14168)

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def final_number(text: str) -> str | None:
    """The number behind the last `####`, or else the last number in a text, without thousands' commas; None if there is none."""
    _, mark, end = text.rpartition("####")
    found = NUMBER.findall(end if mark else text)
    if not found:
        return None
    number = (found[0] if mark else found[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def numbers(predictions: Sequence[str], references: Sequence[str]) -> Measures:
    """exact: the share of predictions whose final number is the reference's."""
    pairs = [(final_number(p), final_number(r)) for p, r in zip(predictions, references, strict=True)]
    return {"exact": mean([said is not None and said == wanted for said, wanted in pairs])}


# Generated text


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> Measures:
    """rouge_l: F of the longest common subsequence (Lin 2004), the mean over examples, words stemmed."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return {
        "rouge_l": mean([scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)])
    }


def smoothed_bleu(predictions: Sequence[str], references: Sequence[str]) -> Measures:
    """bleu4: as CodeReviewer computes it (Li et al. 2022, arXiv:2203.09095), the mean over examples.

    Each is lower case and in tokens of letters and digits, or single marks. Counts of 2- to 4-grams are one higher, those that
    match and those that are there (Lin & Och 2004); the brevity penalty is exp(min(0, 1 − (reference + 1) / (prediction + 1))).
    """
    return {
        "bleu4": mean([_bleu(_code_words(p), _code_words(r)) for p, r in zip(predictions, references, strict=True)])
    }


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> Measures:
    """bleu4: BLEU of the whole corpus by sacrebleu, tokens apart by white space, no smoothing (Papineni et al. 2002)."""
    from sacrebleu.metrics.bleu import BLEU

    score = BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(list(predictions), [list(references)])
    return {"bleu4": Measure(score.score / 100)}


def _code_words(text: str) -> list[str]:
    """Runs of letters and digits, and single marks; `_` is a mark."""
    return re.findall(r"[^\W_]+|[^\s\w]|_", text.lower())


def _bleu(said: Sequence[str], wanted: Sequence[str]) -> float:
    logs = 0.0
    for n in range(1, 5):
        match, there = sum((_grams(said, n) & _grams(wanted, n)).values()), max(len(said) - n + 1, 0)
        more = int(n > 1)
        if there and not match + more:
            return 0.0
        logs += math.log((match + more) / (there + more)) if there else 0.0
    return math.exp(logs / 4 + min(0.0, 1 - (len(wanted) + 1) / (len(said) + 1)))


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
