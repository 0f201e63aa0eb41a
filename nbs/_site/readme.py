"""Make README.md from nbs/index.ipynb: `python nbs/_site/readme.py`

The notebook passes through nbdev's own processors, then through nbconvert; links are turned so that they work from the top folder,
and `{git_url}` and its kin become the addresses that settings.ini derives from the one setting of the repository.
"""
import re, tempfile
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import exec_nb

root = Path(__file__).resolve().parents[2]
images = root / "nbs/images"


def addresses() -> dict[str, str]:
    "What the notebooks may write in braces."
    cfg = get_config(root)
    return {"{git_url}": cfg.git_url, "{docs_url}": cfg.doc_host + cfg.doc_baseurl, "{slug}": f"{cfg.user}/{cfg.repo}", "{branch}": cfg.branch}


def from_top(markdown: str) -> str:
    "Links that are relative to nbs/, relative to the top folder instead."
    return re.sub(r"\]\((?!https?:|#|mailto:|nbs/)(?:\./)?(?!\.\./)([^)\s]+)", r"](nbs/\1", markdown).replace("](../", "](")


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        processed = Path(tmp) / "index.ipynb"
        exec_nb(root / "nbs/index.ipynb", processed, FilterDefaults)
        notebook = nbformat.read(processed, as_version=4)
    exporter = MarkdownExporter()
    text, resources = exporter.from_notebook_node(notebook, resources={"output_files_dir": "images", "unique_key": "index"})
    text = re.sub(r"^---\n.*?\n---\n", "", text, flags=re.S)
    for address, value in addresses().items(): text = text.replace(address, value)
    for name, data in resources.get("outputs", {}).items():
        images.mkdir(exist_ok=True)
        if not (root / "nbs" / name).exists() or (root / "nbs" / name).read_bytes() != data: (root / "nbs" / name).write_bytes(data)
    note = "<!-- made from nbs/index.ipynb by `make readme`: edit the notebook, not this file -->\n\n"
    text = note + from_top(re.sub(r"\n{3,}", "\n\n", text)).strip() + "\n"
    readme = root / "README.md"
    if not readme.exists() or readme.read_text() != text: readme.write_text(text)


if __name__ == "__main__": main()
