"""Makes the bundled prompt lists and question lists from the public sets' own files.

python -m deltalab.organism lists FOLDER      # FOLDER holds harmful_prompts, xstest, squad_v1_train, gsm8k
"""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from pathlib import Path

from .paths import HERE, data_file
from .prompts import THRESHOLD, jaccard, word_set

SEED = 1
TEST = {"advbench": 120, "strongreject": 90, "harmbench": 80}
VAL = {"advbench": 60, "strongreject": 30, "harmbench": 30}


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_sets(folder: Path) -> list[dict]:
    """Every prompt as {"set", "prompt", "source"}; HarmBench without its copyright behaviours."""
    harmful = folder / "harmful_prompts"
    rows = [("advbench", r["goal"], "AdvBench") for r in _csv(harmful / "advbench.csv")]
    rows += [
        ("jailbreakbench", r["Goal"], "JailbreakBench/" + r["Source"]) for r in _csv(harmful / "jailbreakbench.csv")
    ]
    rows += [
        ("strongreject", r["forbidden_prompt"], "StrongREJECT/" + r["source"])
        for r in _csv(harmful / "strongreject.csv")
    ]
    for r in _csv(harmful / "harmbench_behaviors_text_all.csv"):
        if r["FunctionalCategory"] != "copyright":
            rows.append(("harmbench", r["Behavior"], "HarmBench/" + r["FunctionalCategory"]))
    malicious = harmful / "malicious_instruct.txt"
    if malicious.exists():
        rows += [
            ("malicious_instruct", line, "MaliciousInstruct") for line in malicious.read_text().splitlines() if line
        ]
    for r in _csv(folder / "xstest" / "xstest_prompts.csv"):
        rows.append((f"xstest_{r['label']}", r["prompt"], "XSTest/" + r["type"]))
    return [{"set": s, "prompt": p.strip(), "source": source} for s, p, source in rows]


def clusters(prompts: list[str]) -> list[int]:
    """Connected groups of prompts at word Jaccard ≥ THRESHOLD, each named by its first member's index."""
    sets = [word_set(p) for p in prompts]
    parent = list(range(len(prompts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i in range(len(sets)):
        for j in range(i):
            if jaccard(sets[i], sets[j]) >= THRESHOLD:
                a, b = sorted((root(i), root(j)))
                parent[b] = a
    return [root(i) for i in range(len(prompts))]


def assign_splits(rows: list[dict]) -> None:
    """Writes "cluster" and "split" into the rows: whole clusters, those of JailbreakBench and XSTest to test."""
    for row, cluster in zip(rows, clusters([r["prompt"] for r in rows]), strict=True):
        row["cluster"] = cluster
    members = defaultdict(list)
    for row in rows:
        members[row["cluster"]].append(row)
    evaluation = ("jailbreakbench", "xstest_safe", "xstest_unsafe")
    split = {c: "test" for c, group in members.items() if any(r["set"] in evaluation for r in group)}
    order = [c for c in members if c not in split]
    random.Random(SEED).shuffle(order)
    for name, quota in (("test", TEST), ("val", VAL)):
        have = {s: sum(r["set"] == s and split.get(r["cluster"]) == name for r in rows) for s in quota}
        for c in order:
            sets = {r["set"] for r in members[c]} & set(quota)
            if c not in split and sets and all(have[s] < quota[s] for s in sets):
                split[c] = name
                for r in members[c]:
                    have[r["set"]] += 1
    for row in rows:
        row["split"] = split.get(row["cluster"], "train")


def write_prompts(folder: Path) -> None:
    """Write the bundled lists, one file a set, each prompt with its cluster and split; folder: the sets' own files."""
    rows = read_sets(folder)
    assign_splits(rows)
    for name in dict.fromkeys(r["set"] for r in rows):
        kept = [{k: r[k] for k in ("prompt", "source", "cluster", "split")} for r in rows if r["set"] == name]
        text = "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in kept) + "\n]\n"
        (HERE / "prompts" / f"{name}.json").write_text(text, encoding="utf-8")


def write_questions(folder: Path) -> None:
    """Up to 3000 short SQuAD questions and 1500 short GSM8K problems."""
    rng = random.Random(SEED)
    articles = json.loads((folder / "squad_v1_train" / "train-v1.1.subset.json").read_text(encoding="utf-8"))["data"]
    asked = [q["question"].strip() for a in articles for p in a["paragraphs"] for q in p["qas"]]
    asked = [q for q in dict.fromkeys(asked) if q.endswith("?") and 4 <= len(q.split()) <= 16]
    problems = [
        json.loads(x)["question"] for x in (folder / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    problems = [" ".join(p.split()) for p in problems]
    problems = [p for p in dict.fromkeys(problems) if len(p.split()) <= 32]
    for name, lines, n in (("squad", asked, 3000), ("gsm8k", problems, 1500)):
        kept = rng.sample(lines, min(n, len(lines)))
        data_file(f"questions_{name}.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
