"""Makes the bundled code review sample from the files of D-ACT (Pornprasit et al. 2023, github.com/awsm-research/D-ACT-Replication-Package).

    python tools/code_review_sample.py FOLDER

FOLDER: the four files google_{eval,test}_{initial,approved}_ver.txt. Kept are the pairs of at most 115 tokens of the
bundled model, package names left out; the eval part becomes train.jsonl, the test part test.jsonl.
"""

import json
import re
import sys
from pathlib import Path

from deltalab.core.files import write_text
from deltalab.models.load import load_tokenizer

OUT = Path(__file__).parents[1] / "src/deltalab/data/bundled"
LONGEST = 115


def main(folder: Path) -> None:
    """Write refinement and necessity, each with a training and a test file."""
    tokenizer = load_tokenizer("organism")[1]
    for part, split in (("eval", "train"), ("test", "test")):
        sides = [
            (folder / f"google_{part}_{side}_ver.txt").read_text().splitlines() for side in ("initial", "approved")
        ]
        pairs = dict.fromkeys((bare(a), bare(b)) for a, b in zip(*sides, strict=True))
        kept = [p for p in pairs if p[0] != p[1] and max(len(tokenizer(code)["input_ids"]) for code in p) <= LONGEST]
        write(OUT / "code-review" / f"{split}.jsonl", [{"initial": a, "approved": b} for a, b in kept])
        versions = [{"patch": code, "y": y} for a, b in kept for code, y in ((a, 1), (b, 0))]
        write(OUT / "review-necessity" / f"{split}.jsonl", versions)


def bare(code: str) -> str:
    """Java without the packages of its class names."""
    return re.sub(r"\b(?:[a-z]\w*\.)+(?=[A-Z])", "", code)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """One row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
