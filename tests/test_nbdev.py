"nbdev's own commands on the whole project, with a program in Quarto's place that does what they ask of it."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORDS = re.compile(r"\{(?:git_url|docs_url|slug|branch)\}|\{\{<")
QUARTO = '''#!{python}
"Writes what Quarto would write, and where; fails as Quarto does on a file that is not there."
import pathlib, sys
with open({log!r}, "a") as log: print(*sys.argv[1:], file=log)
out = pathlib.Path("_docs")
if "-o" in sys.argv:
    if not pathlib.Path(sys.argv[2]).is_file(): sys.exit(f"ERROR: {{sys.argv[2]}} not found")
    (out / "index_files").mkdir(parents=True, exist_ok=True)
    for name in ("README.md", "index_files/figure.png"): (out / name).write_text("made by Quarto")
else:
    out.mkdir(exist_ok=True)
    (out / "index.html").write_text("made by Quarto")
'''


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def without_links(text): return re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", text)
def without_code(text): return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def markdown(path):
    "The Markdown of a notebook: its cells, and what its code put out as Markdown."
    for cell in cells(path):
        if cell["cell_type"] == "markdown": yield source(cell)
        for output in cell.get("outputs", []): yield "".join(output.get("data", {}).get("text/markdown", ""))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the project whose README is older than its notebook, so that nbdev would make it anew."
    folder = tmp_path_factory.mktemp("nbdev") / "project"
    folder.mkdir()
    for name in ("settings.ini", "setup.py", "README.md", "_quarto.yml"): shutil.copy(ROOT / name, folder)
    for name in ("nbs", "deepdemix"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__", "build", "_proc", ".ipynb_checkpoints"))
    os.utime(folder / "README.md", (0, 0))
    (folder / "bin").mkdir()
    (folder / "bin/quarto").write_text(QUARTO.format(python=sys.executable, log=str(folder / "asked")))
    (folder / "bin/quarto").chmod(0o755)
    return folder


def nbdev(project, command, *options):
    env = os.environ | {"PATH": f"{project / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                        "PYTHONPATH": str(project),
                        "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    return subprocess.run([Path(sys.executable).parent / command, *options], cwd=project, env=env,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def docs(project):
    "The project after `nbdev_docs`."
    done = nbdev(project, "nbdev_docs", "--n_workers", "2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "imports and other code" not in done.stderr, done.stderr
    return project


@pytest.fixture(scope="module")
def pages(docs):
    "(notebook, what Quarto gets of it) for every notebook."
    found = {p: docs / "_proc" / p.relative_to(docs / "nbs") for p in sorted((docs / "nbs").rglob("*.ipynb"))
             if "_site" not in p.parts}
    assert len(found) > 30 and all(made.is_file() for made in found.values())
    return found


def test_the_whole_site_is_made(docs):
    assert (docs / "_docs/index.html").is_file()
    assert (docs / "asked").read_text().splitlines()[-1] == "render --no-cache"


def test_the_preview_is_made(docs):
    done = nbdev(docs, "nbdev_preview", "--no_browser")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (docs / "asked").read_text().splitlines()[-1] == "preview --no-browser"


def test_the_readme_is_left_alone(docs):
    """Neither nbdev_docs, nbdev_prepare nor nbdev_readme writes another README or a folder of pictures
    beside it."""
    nbdev(docs, "nbdev_readme")
    assert (docs / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    assert not (docs / "index_files").exists()


def test_title_and_promise_reach_the_page(pages):
    for notebook, made in pages.items():
        front = next(
            yaml.safe_load(source(c).strip().strip("-")) for c in cells(made) if c["cell_type"] == "raw"
        )
        title, promise, needs = re.fullmatch(
            r"# (.+)\n\n> (.+?)(?:\n\n- needs: (.+))?", source(cells(notebook)[0])
        ).groups()
        assert (front["title"], front["description"], front.get("needs")) == (title, promise, needs)
        assert title[0].isupper() or notebook.name == "index.ipynb", title


def test_every_word_reaches_the_page(pages):
    "All Markdown behind the first cell, with addresses and files filled in and links to what is documented."
    from deepdemix.pages import fill_addresses, include_files
    for notebook, made in pages.items():
        there = {without_links(source(c)).strip() for c in cells(made) if c["cell_type"] == "markdown"}
        for cell in (c for c in cells(notebook)[1:] if c["cell_type"] == "markdown"):
            wanted = without_links(
                fill_addresses(
                    include_files(
                        source(cell), ROOT / "nbs" / notebook.relative_to(pages_root(notebook)).parent
                    )
                )
            ).strip()
            assert wanted in there, (notebook.name, wanted[:200])


def pages_root(notebook): return next(p for p in notebook.parents if p.name == "nbs")


def test_no_word_in_braces_is_left(pages):
    for made in pages.values():
        for text in markdown(made): assert not WORDS.search(text), (made.name, text[:300])


def test_one_title_a_page(pages):
    "The title is in the page's head, so no cell and no included file may bring another."
    for made in pages.values():
        for text in markdown(made):
            assert not re.search(r"^# ", without_code(text), re.M), (made.name, text[:300])


def test_what_quarto_reads(docs):
    "Its settings take in nbdev's, and every page of the contents is there."
    settings = yaml.safe_load((docs / "_proc/_quarto.yml").read_text(encoding="utf-8"))
    assert settings["metadata-files"] == ["nbdev.yml"]
    own = yaml.safe_load((docs / "_proc/nbdev.yml").read_text(encoding="utf-8"))
    assert own["project"]["output-dir"] == "_docs" and own["website"]["title"] == "deepdemix"
    for entry in settings["website"]["sidebar"]["contents"]:
        for page in [entry] if isinstance(entry, str) else entry["contents"]:
            assert (docs / "_proc" / page).is_file(), page


def test_what_nbdev_writes_is_ignored():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {
        ".gitattributes", ".gitconfig", ".last_checked", "nbs/nbdev.yml", "index_files/", "_proc/", "_docs/",
    } <= set(ignored)
