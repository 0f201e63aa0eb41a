"The files of the repository that notebooks are, and that are made of them."
from pathlib import Path

root = Path(__file__).resolve().parents[2]


def below(folder: Path, *kinds: str) -> list[Path]:
    """All files of some kinds (`.ipynb`, `.md`, …) in a folder and the folders in it, sorted; what begins
    with a dot or an underscore is passed over, as nbdev does."""
    hidden = lambda path: any(part.startswith((".", "_")) for part in path.relative_to(folder).parts[:-1])
    return sorted(p for p in folder.rglob("*") if p.suffix in kinds and p.is_file() and not hidden(p))


def notebooks() -> list[Path]:
    "All notebooks."
    return below(root / "nbs", ".ipynb")


def modules() -> list[Path]:
    "All modules of the package, in its sub-packages too."
    return below(root / "deepdemix", ".py")
