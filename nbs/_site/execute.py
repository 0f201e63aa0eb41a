"""Run notebooks top to bottom in a fresh kernel and save their outputs: `python nbs/_site/execute.py
NOTEBOOK_OR_FOLDER…`

Cells that carry one of the flags in `tst_flags` of settings.ini, or `eval: false`, are left as they are, just
as `nbdev_test` leaves them.
"""
import base64
import io
import os
import re
import sys
from configparser import ConfigParser
from itertools import product
from pathlib import Path

import nbformat
import numpy as np
from listing import below, root
from nbclient import NotebookClient
from PIL import Image


def flags() -> list[str]:
    "The cell flags that are not run by default."
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]["tst_flags"].split()


class Client(NotebookClient):
    "A notebook client that passes over the cells that are not run by default, and whose figures are sharp."
    before = (
        f"import sys; sys.path.append({str(root / 'nbs/_site')!r}); __import__('figures').install(); del"
        " sys.path[-1], sys"
    )

    def __init__(self, notebook, **settings):
        super().__init__(notebook,
                         extra_arguments=[f"--IPKernelApp.exec_lines={self.before}", "--log-level=40"],
                         **settings)

    def passed_over(self, source: str) -> bool:
        directives = re.findall(r"^#\|\s*(.+?)\s*$", source, re.M)
        return any(d in flags() or re.match(r"eval:\s*false", d) for d in directives)

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code" and self.passed_over(cell.source): return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def shift(a: Image.Image, b: Image.Image, side: int = 8) -> float:
    """The largest difference of colour (0 to 255) between two pictures, over squares: what a fill has
    become, rather than grain and the edges of letters."""
    small = [np.asarray(x.convert("RGB").reduce(side), dtype=float) for x in (a, b)]
    return float(np.abs(small[0] - small[1]).max())


def lighter(picture: str, tolerance: float = 16) -> str:
    """A PNG in base64 with as few colours as do (256, 64, 32 or 24, chosen in three ways) without a surface
    looking different; as it was, if that is smallest."""
    whole, found = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), [picture]
    for colours, method in product(
        (256, 64, 32, 24), (Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE, Image.Quantize.FASTOCTREE)
    ):
        out, less = io.BytesIO(), whole.quantize(colours, method=method, dither=Image.Dither.NONE)
        less.save(out, "png", optimize=True)
        if shift(whole, less) <= tolerance: found.append(base64.b64encode(out.getvalue()).decode())
    return min(found, key=len)


def settled(html: str, name: str) -> str:
    """A styled table with a name in place of the random one, so that the same table is the same text, and
    without its indentation."""
    named, count = re.subn(r"\bT_[0-9a-f]{5}(?![0-9a-f])", f"T_{name}", html)
    return re.sub(r"^ +", "", named, flags=re.M) if count else html


def execute(path: Path, timeout: int = 600) -> None:
    "Run the notebook at `path` from the notebooks' folder and save it in place."
    notebook = nbformat.read(path, as_version=4)
    Client(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell, k, data in ((cell, k, output.get("data", {})) for cell in notebook.cells
                          for k, output in enumerate(cell.get("outputs", []))):
        if "image/png" in data: data["image/png"] = lighter(data["image/png"])
        if "text/html" in data: data["text/html"] = settled(data["text/html"], f"{cell.id[:4]}{k}")
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None) # another back end than the notebook's would save no figures
    for path in (Path(name).resolve() for name in sys.argv[1:]):
        for notebook in below(path, ".ipynb") if path.is_dir() else [path]: execute(notebook)
