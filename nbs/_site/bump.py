"""The next version in settings.ini and CITATION.cff, everything else in them as it was: `python
nbs/_site/bump.py [major|minor|patch]`"""
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]

PARTS = ("major", "minor", "patch")
PLACES = {"settings.ini": r"^(version\s*=\s*)(\d+)\.(\d+)\.(\d+)$",
          "CITATION.cff": r"^(version:\s*)(\d+)\.(\d+)\.(\d+)$"}


def following(version: tuple[int, ...], part: str) -> tuple[int, ...]:
    "The next version: one more of a part, and nothing of the parts behind it."
    k = PARTS.index(part)
    return *version[:k], version[k] + 1, *(0 for _ in version[k + 1:])


def bump(folder: Path, part: str) -> str:
    """Write the next version into the files of a folder and return it. Raises `ValueError` if they don't
    name one and the same version."""
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in PLACES}
    found = {name: [tuple(map(int, x.groups()[1:])) for x in re.finditer(PLACES[name], texts[name], re.M)]
             for name in PLACES}
    versions = sum(found.values(), [])
    if any(len(v) != 1 for v in found.values()) or len(set(versions)) != 1:
        raise ValueError(f"{' and '.join(PLACES)} name different versions, or none")
    new = ".".join(map(str, following(versions[0], part)))
    for name, text in texts.items():
        (folder / name).write_text(re.sub(PLACES[name], rf"\g<1>{new}", text, flags=re.M), encoding="utf-8")
    return new


def main(part: str = "patch") -> str:
    if part not in PARTS: return f"a version has the parts {', '.join(PARTS)}, and {part!r} is none of them"
    try: print(bump(root, part))
    except ValueError as e: return str(e)


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
