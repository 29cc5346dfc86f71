"""Writes what a demo printed, and its picture, into the README: `.venv/bin/python tools/readme.py DEMO_FOLDER [FIGURE]`.

Everything between the two markers of README.md is replaced; nothing in it is typed by hand.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- demo:[^\n]*-->\n).*?(<!-- end -->)", re.S)


def main(folder: str, figure: str | None = None) -> None:
    """Copy the figure to docs/images/demo.png, and what `deltalab report` prints of `folder` into the README."""
    figures = sorted((Path(folder) / "figures").glob("*.png"))
    names = [path.stem for path in figures]
    if figure not in names:
        sys.exit(f"name one of the figures: {', '.join(names) or 'none there'}")
    (ROOT / "docs" / "images").mkdir(parents=True, exist_ok=True)
    shutil.copy(figures[names.index(str(figure))], ROOT / "docs" / "images" / "demo.png")
    printed = subprocess.run(
        [sys.executable, "-m", "deltalab", "report", folder], capture_output=True, text=True, check=True
    ).stdout
    printed = printed.replace(f"{Path.cwd()}/", "").strip()
    block = (
        f"```text\n{printed}\n```\n\n![What tuning on benign data did to refusals and skills](docs/images/demo.png)\n"
    )
    readme = ROOT / "README.md"
    text, found = BLOCK.subn(lambda match: match[1] + block + match[2], readme.read_text())
    if found != 1:
        sys.exit("README.md has no place for it: the two markers are gone")
    readme.write_text(text)
    print(f"README.md and docs/images/demo.png are of {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 1 else sys.exit(__doc__)
