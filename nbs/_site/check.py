"""Nothing may change when the notebooks are exported, cleaned and turned into stubs and the README:
`python nbs/_site/check.py`

Exit status 1, with the list of files, where something does.
"""
import hashlib
import subprocess
import sys

from listing import below, modules, notebooks, root

scripts = [[sys.executable, str(root / f"nbs/_site/{name}.py")] for name in ("stubs", "readme")]
steps = [["nbdev_export"], ["nbdev_clean"], *scripts]


def digests() -> dict[str, str]:
    "The digest of every file that a step may write."
    files = [*notebooks(), *modules(), *below(root / "deepdemix", ".pyi"), root / "README.md"]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.exists()}


def main() -> int:
    before = digests()
    for step in steps: subprocess.run(step, cwd=root, check=True)
    after = digests()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in changed: print(f"not up to date: {name}", file=sys.stderr)
    if not changed: print("export, clean, stubs and README change nothing")
    return int(bool(changed))


if __name__ == "__main__": sys.exit(main())
