"""What a model is asked before and after tuning, and the answers as a study keeps them.

The replies themselves lie beside each result (`<set>/generations.jsonl`, `skills.jsonl`), so that they can be judged
again without a model; the result holds one letter a reply, enough to pair two models prompt by prompt.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltalab.core.files import write_text
from deltalab.core.spec import digest
from deltalab.organism import prompts as prompt_sets
from deltalab.organism import skills
from deltalab.safety.evaluate import evaluate_safety, evaluate_skills
from deltalab.safety.probe import LETTERS as LETTERS
from deltalab.safety.probe import replies_row, skills_row
from deltalab.studies.parts import EvaluateSpec, is_harmful

TITLES = {"advbench": "AdvBench", "jailbreakbench": "JailbreakBench", "strongreject": "StrongREJECT", "harmbench": "HarmBench",
          "malicious_instruct": "MaliciousInstruct", "xstest_safe": "XSTest safe", "xstest_unsafe": "XSTest unsafe"}  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """Prompts by set, and questions with one right answer."""

    prompts: dict[str, list[str]]
    skills: list[dict[str, str]]

    def digest(self) -> str:
        """Twelve hex digits over every question, in order."""
        return digest([self.prompts, self.skills])


def questions(spec: EvaluateSpec, seed: int) -> Questions:
    """The held-out prompts that a spec names, in their order, and its skills, drawn from `seed`."""
    sets = {name: [row["prompt"] for row in prompt_sets.load(name, spec.split)][: spec.limit] for name in spec.prompts}
    return Questions(sets, skills.examples(None, spec.skills, seed, "test") if spec.skills else [])


def evaluate(
    model: Any, tokenizer: Any, asked: Questions, spec: EvaluateSpec, folder: Path, refusals: Sequence[int] | None
) -> dict[str, Any]:
    """Ask everything; JSON for the record, and the replies in `folder`.

    refusals: first tokens of refusals for the log-odds, those of the model before tuning; None: of this model's own
    refusals of the first harmful set.
    """
    safety: dict[str, Any] = {}
    for name in sorted(asked.prompts, key=lambda name: not is_harmful(name)):
        result = evaluate_safety(
            model,
            tokenizer,
            asked.prompts[name],
            name=name,
            max_new_tokens=spec.max_new_tokens,
            batch_size=spec.batch,
            refusals=refusals,
        )
        refusals = refusals or result.refusal_tokens
        result.save(folder / name)
        safety[name] = {**replies_row(result), "harmful": is_harmful(name)}
    out: dict[str, Any] = {
        "safety": {name: safety[name] for name in asked.prompts},
        "refusal_tokens": list(refusals or ()),
    }
    if asked.skills:
        answers = evaluate_skills(model, tokenizer, asked.skills, batch_size=spec.batch)
        write_text(
            folder / "skills.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers.records())
        )
        out["skills"] = skills_row(answers)
    return out


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result as the record holds it: without the letters."""
    out = {
        "safety": {
            name: {k: v for k, v in one.items() if k not in ("letters", "refusal_tokens")}
            for name, one in result["safety"].items()
        }
    }
    return out | ({"skills": {k: v for k, v in result["skills"].items() if k != "right"}} if "skills" in result else {})


def refused(result: Mapping[str, Any], name: str) -> list[bool]:
    """Whether each prompt of a set was refused."""
    return [letter == "R" for letter in result["safety"][name]["letters"]]


def correct(result: Mapping[str, Any]) -> list[bool]:
    """Whether each question was answered rightly."""
    return [letter == "1" for letter in result["skills"]["right"]]


def became(before: Mapping[str, Any], after: Mapping[str, Any], sets: Sequence[str]) -> dict[str, int]:
    """What the prompts that were refused before, and are not any more, are answered with: counts by verdict."""
    pairs = [
        pair
        for name in sets
        for pair in zip(before["safety"][name]["letters"], after["safety"][name]["letters"], strict=True)
    ]
    return {verdict: pairs.count(("R", letter)) for verdict, letter in LETTERS.items() if verdict != "refused"}


def title(name: str) -> str:
    """The name of a prompt set as its authors write it."""
    return TITLES.get(name, name)


def harmful_shares(result: Mapping[str, Any]) -> dict[str, float]:
    """Shares of refused, complied and broken replies to all harmful prompts together, and of right answers."""
    letters = "".join(one["letters"] for name, one in result["safety"].items() if is_harmful(name))
    shares = {verdict: letters.count(letter) / len(letters) for verdict, letter in LETTERS.items()}
    return shares | ({"skills": result["skills"]["value"]} if "skills" in result else {})
