"""How large the rooms are: `python tests/sizes.py` prints it beside what is kept; `--keep` keeps what got
smaller.

`tests/test_sizes.py` compares the two, so that a room can only grow where somebody writes down that it may.
"""
import ast
import json
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
KEPT = Path(__file__).with_suffix(".json")
COLUMNS = 110


def modules():
    "All modules that are exported from notebooks."
    skip = ("_modidx.py", "__init__.py", "__main__.py")
    return sorted(p for p in (ROOT / "deepdemix").rglob("*.py") if p.name not in skip)


def notebooks():
    "All notebooks."
    inside = {p: p.relative_to(ROOT).parts for p in (ROOT / "nbs").rglob("*.ipynb")}
    return sorted(p for p, parts in inside.items() if not any(part.startswith((".", "_")) for part in parts))


def code_cells(path):
    "The sources of the code cells of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def exported_cells(path):
    "The lines of each exported cell of a notebook that defines something."
    for source in code_cells(path):
        lines = [line for line in source.splitlines() if line.strip()]
        if (lines and lines[0].replace(" ", "").startswith("#|export")
            and ("def " in source or "class " in source)):
            yield len(lines) - 1


def definitions(path):
    "The names of the functions and classes that a module defines at its top."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)]


def measure():
    "Every figure that is kept."
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in modules()}
    columns = [len(line) for p in notebooks() for source in code_cells(p) for line in source.splitlines()]
    names = [name for p in modules() for name in definitions(p)]
    private = [name for name in names if name.startswith("_") and not name.startswith("__")]
    cells = {p: list(exported_cells(p)) for p in notebooks()}
    everything = [n for counts in cells.values() for n in counts]
    return {
        "lines of the longest module": max(lines.values()),
        "cells of the longest notebook": max(len(code_cells(p)) for p in notebooks()),
        f"lines of code over {COLUMNS} columns": sum(n > COLUMNS for n in columns),
        "columns that 90 % of lines stay below": sorted(columns)[int(0.9 * len(columns))],
        "private definitions, percent": round(100 * len(private) / len(names)),
        "median lines of an exported cell": median(everything),
        "lines of the longest exported cell": max(everything),
        "exported cells over 40 lines": sum(n > 40 for n in everything),
    }


def main():
    kept, now = json.loads(KEPT.read_text()) if KEPT.exists() else {}, measure()
    for name, value in now.items():
        print(f"{name:42} {value:8g}   kept: {kept.get(name, '-')}")
    if "--keep" in sys.argv:
        KEPT.write_text(json.dumps({k: min(v, kept.get(k, v)) for k, v in now.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
