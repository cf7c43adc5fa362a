"""Write the tables of docs/speed.md from the files in results/speed, which `bench.py --json` wrote.

  python extras/tables.py
"""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "results/speed"
PAGE = ROOT / "docs/speed.md"


def markdown(match):
    """The table of <!-- table: NAME -->, from NAME.json, below its command and machine."""
    name = match[1]
    result = json.loads((FOLDER / f"{name}.json").read_text())
    lines = [f"<!-- table: {name} -->", f"`{result['command']}`", f"({result['machine']}):"]
    for rows in result["tables"].values():
        heading = rows[0]["cells"]
        lines += ["", "| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
        for row in rows:
            lines.append("| " + " | ".join(map(str, row["cells"].values())) + " |")
    return "\n".join(lines) + "\n"


def fill_in(text):
    """A page with its tables as the files say; what stood below their marks goes."""
    old = r"<!-- table: (\S+) -->\n(`python.*\n.*\n(\n(\|.*\n)+)+)?"
    return re.sub(old, markdown, text)


if __name__ == "__main__":
    PAGE.write_text(fill_in(PAGE.read_text()))
