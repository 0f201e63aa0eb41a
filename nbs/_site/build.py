"""Build the documentation site from the notebooks: `python nbs/_site/build.py [FOLDER]`

nbdev's processors turn the notebooks into pages; Sphinx, with myst-nb and sphinx-book-theme, turns the pages
into a site.
Title, order and sections come from `_quarto.yml`, addresses from settings.ini. Notebooks are shown as they
were saved; only the pages
in `FRESH` are run, because their numbers come from `results/`. Nothing that a page needs lies outside the
folder.
"""
import ast
import html
import io
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import live
import nbformat
import yaml
from docutils.nodes import make_id
from execnb.shell import CaptureShell
from execute import Client
from listing import root
from nbdev.config import get_config
from nbdev.doclinks import _get_exps, _nbpath2html
from nbdev.processors import FilterDefaults, _default_exp, exec_show_docs, rm_export
from nbdev.serve_drv import exec_nb

from deepdemix.pages import fill_cell, page_addresses

site = root / "nbs/_site"
source = site / "build/source"
FRESH = ("pretraining_helps", "contrast_pays", "comparison")
NEEDS = re.compile(r"^- needs: ", re.M) # below a notebook's title, as nbdev's front matter is written


@cache
def quarto() -> dict:
    "What `_quarto.yml` says of the website."
    return yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]


def menu() -> list[tuple[str, list[str]]]:
    "Sections and their pages, in order; pages outside a section stand under an empty name."
    sections = []
    for entry in quarto()["sidebar"]["contents"]:
        if isinstance(entry, str): sections.append(("", [entry]))
        else: sections.append((entry["section"], entry["contents"]))
    return sections


def pages() -> list[str]:
    "All pages, as paths under nbs/."
    return [page for _, group in menu() for page in group]


@cache
def name_of(page: str) -> str:
    "A page's path on the site, without its suffix, as nbdev has it: 01_data.ipynb is data."
    return _nbpath2html(Path(page)).with_suffix("").as_posix()


def relink(text: str, page: str) -> str:
    """Links to notebooks by their names on the site, and links to documented objects relative to the page;
    in headings and code these are names alone."""
    names = {p: name_of(p) for p in pages()}
    up = "../" * page.count("/")
    docs = re.escape(page_addresses()["{docs_url}"])
    link = rf"\[`([^`\]]+)`\]\({docs}/([^)#]+\.html)#([^)]+)\)"

    def notebook(found):
        target = os.path.normpath(os.path.join(os.path.dirname(page), found[1]))
        return f"]({up}{names[target]}{Path(target).suffix}{found[2] or ''})" if target in names else found[0]

    def documented(found):
        return (f'<a href="{up}{found[2]}#{make_id(found[3])}"><code class="docutils'
                f' literal">{html.escape(found[1])}</code></a>')

    text = re.sub(
        r"^#[^\n]*$|^```.*?^```", lambda part: re.sub(link, r"`\1`", part[0]), text, flags=re.M | re.S
    )
    text = re.sub(link, documented, text)
    return re.sub(r"\]\((?!https?:|#|mailto:)([^)#\s]+\.(?:ipynb|md))(#[^)\s]+)?\)", notebook, text)


def callouts(text: str) -> str:
    "Quarto's callouts as MyST's admonitions."
    def opened(found):
        title = re.search(r'title="([^"]*)"', found[3])
        return (f"{found[1]}{{admonition}} {title[1]}\n:class: {found[2]}" if title
                else f"{found[1]}{{{found[2]}}}")
    return re.sub(
        r"^(:{3,})\s*\{\.callout-(note|tip|warning|caution|important)([^}]*)\}", opened, text, flags=re.M
    )


def tabled(text: str) -> str:
    """Tables of scores that stand as plain text in model cards, as Markdown: one table for each metric,
    since two side by side are wider than a page."""
    def tables(found):
        title, metrics, heads, *lines = found[1].splitlines()
        metrics, heads = re.findall(r"-+ (\S+ \(dB\)) -+", metrics), heads.split()
        rows = [re.split(r"\s{2,}", line.strip()) for line in lines[:-1] if line.strip("-")]
        wide = len(heads) // len(metrics)
        for k, metric in enumerate(metrics):
            part = slice(k * wide, (k + 1) * wide)
            yield f"**{metric}, {title}**"
            yield "\n".join(["| | " + " | ".join(heads[part]) + " |", "|---|" + "---:|" * wide,
                             *(f"| {row[0]} | " + " | ".join(row[1:][part]) + " |" for row in rows)])
        yield lines[-1]
    return re.sub(r"^```\n(\w+ songs\n *-+ \S+ \(dB\) .*?)^```$", lambda found: "\n\n".join(tables(found)),
                  text, flags=re.M | re.S)


def without_badges(text: str) -> str:
    "Markdown without pictures that would be fetched from elsewhere, such as badges."
    return re.sub(r"\[!\[[^\]]*\]\(https?:[^)]*\)\]\([^)]*\)|!\[[^\]]*\]\(https?:[^)]*\)", "", text)


def markdown(text: str, page: str) -> str:
    "The Markdown of a page as MyST reads it."
    return relink(tabled(without_badges(callouts(text))), page)


def directives(code: str) -> set[str]:
    "The `#|` lines of a cell, without spaces."
    return {re.sub(r"\s", "", line) for line in re.findall(r"^\s*#\|(.*)$", code, re.M)}


def at_line(address: str, name: str) -> str:
    "The address of a module's source with the line of an object, which nbdev leaves open."
    file = address.partition("#")[0]
    path = root / file.split("/blob/", 1)[-1].partition("/")[2]
    line = _get_exps(path.relative_to(root).as_posix()).get(name) if path.is_file() else None
    return f"{file}#L{line}" if line else file


def documented(cell) -> str:
    """The full name of what a cell shows the documentation of; a decorator can hide the class of a method
    from `show_doc`."""
    found = re.search(r"^show_doc\(([\w.]+)", cell.source, re.M) if cell.cell_type == "code" else None
    return found[1] if found else ""


def in_order(cells: list, page: str) -> list:
    """Documentation that follows on one another, in the order of the source (nbdev puts a class behind its
    methods), and with full names."""
    module = _default_exp(nbformat.read(root / "nbs" / page, as_version=4))
    path = get_config(path=root).lib_path / f"{(module or '').replace('.', '/')}.py"
    lines = _get_exps(path.relative_to(root).as_posix()) if module else {}
    for cell in cells:
        full = ([name for name in lines if name.endswith(f".{documented(cell)}")]
                if documented(cell) not in lines else [])
        if len(full) == 1:
            cell.source = cell.source.replace(f"show_doc({documented(cell)}", f"show_doc({full[0]}")
    out, run = [], []
    for cell in [*cells, None]:
        if cell is not None and documentation(cell):
            run.append(cell)
            continue
        out += (sorted(run, key=lambda c: lines.get(documented(c)) or 0)
                if all(lines.get(documented(c)) for c in run) else run)
        run = []
        if cell is not None: out.append(cell)
    return out


def documentation(cell) -> str:
    """What `show_doc` left in a cell, with the heading first and the link to the source beneath it; empty
    for other cells."""
    text = "".join("".join(o.get("data", {}).get("text/markdown", "")) for o in cell.get("outputs", []))
    if cell.cell_type != "code" or not text or "output:asis" not in directives(cell.source): return ""
    link = re.search(r"^\[source\]\(([^)]+)\)\{.*?\}\s*$", text, re.M)
    text = re.sub(r"^---\s*$|^\[source\]\(.*$", "", text, flags=re.M).strip()
    heading, _, body = text.partition("\n")
    name = documented(cell) or heading.strip("# ")
    heading, body = "### " + name.replace("__", r"\_\_"), body.replace(":NoneType=None", "=None")
    source = f'\n\n<p class="source"><a href="{at_line(link[1], name)}">source</a></p>' if link else ""
    return f"{heading}{source}\n{body}" if link or documented(cell) else text


def said(text: str, limit: int = 220) -> str:
    "The last sentence of some Markdown as plain words."
    paragraphs = [p for p in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", text, flags=re.S).strip())
                  if not p.lstrip().startswith((":::", "|", "<"))]
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1",
                   re.sub(r"[*`$\\]|^[#>]+ ?", "", paragraphs[-1] if paragraphs else "", flags=re.M))
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(plain.split()).rstrip(":. "))
    return sentences[-1][:limit]


def describe(cell, words: str) -> None:
    "Words for those who don't see a cell's pictures or players: its fig-alt, or the sentence above it."
    own = re.search(r"^#\|\s*fig-alt:\s*(.+)$", cell.source, re.M)
    words = own[1].strip("\"' ") if own else words
    if pictures := [
        (o, kind) for o in cell.outputs for kind in o.get("data", {}) if kind.startswith("image/")
    ]:
        about = {k: v for o, kind in pictures for k, v in o.get("metadata", {}).get(kind, {}).items()}
        cell.metadata["mystnb"] = {
            "image": (
                {"alt": words}
                | ({"width": f"{about['width']}px", "classes": f"letters-{10 * about['letters']:.0f}"}
                   if "letters" in about else {})
            )
        }
    for output in cell.outputs:
        found = output.get("data", {}).get("text/html")
        if found:
            output["data"]["text/html"] = re.sub(
                r"<audio(?![^>]*aria-label)", f'<audio aria-label="{html.escape(words)}"', "".join(found)
            )


def is_test(node: ast.stmt) -> bool:
    """Whether a statement checks something: an assert, or a call of `test_eq` and its like; a loop or a
    block does if its last statement does."""
    if isinstance(node, (ast.For, ast.With, ast.If)): return is_test(node.body[-1])
    call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    name = getattr(call.func, "id", getattr(call.func, "attr", "")) if call else ""
    return isinstance(node, ast.Assert) or name.startswith("test_")


def tests(cell) -> bool:
    "Whether a cell is a test: its last statement checks something, and it draws and plays nothing."
    rich = any(kind.startswith("image/") or kind == "text/html" for o in cell.get("outputs", [])
               for kind in o.get("data", {}))
    try: body = ast.parse(cell.source).body
    except SyntaxError: return False # a magic command
    return bool(body) and not rich and is_test(body[-1])


def imports(cell) -> bool:
    "Whether a cell only imports."
    try: body = ast.parse(cell.source).body
    except SyntaxError: return False # a magic command
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def fold(cell, show: str, hide: str) -> None:
    "Fold the code of a cell under a line of its own; what it printed stays in sight."
    cell.metadata["tags"] = ["hide-input"]
    cell.metadata.setdefault("mystnb", {}).update(code_prompt_show=show, code_prompt_hide=hide)


def shown(cell) -> None:
    """A code cell as readers see it: without directives, without its code if it says `echo: false`, and
    folded if it is private or a test."""
    wanted = directives(cell.source)
    private = cell.metadata.pop("private", False)
    cell.source = re.sub(r"^\s*#\|.*\n?", "", cell.source, flags=re.M).strip()
    if "echo:false" in wanted: cell.metadata["tags"] = ["remove-input"]
    elif private: cell.metadata["tags"] = ["hide-input"]
    elif "code-fold:true" in wanted: fold(cell, "Show the solution", "Hide the solution")
    elif imports(cell): fold(cell, "Show the imports", "Hide the imports")
    elif tests(cell): fold(cell, "Show the tests", "Hide the tests")


def runs_alone(page: str) -> bool:
    """Whether a notebook needs no file of the repository and no other package: what it needs it says below
    its title; a test runs each of the others alone in an empty folder."""
    cells = nbformat.read(root / "nbs" / page, as_version=4).cells
    return any(c.cell_type == "code" for c in cells) and not NEEDS.search(cells[0].source)


def links(page: str) -> str:
    "Where a notebook can be read and run; in Colab only what needs no file of the repository."
    at = page_addresses()
    parts = [f"[Notebook]({at['{git_url}']}/blob/{at['{branch}']}/nbs/{page})"]
    if runs_alone(page):
        colab = f"https://colab.research.google.com/github/{at['{slug}']}/blob/{at['{branch}']}/nbs/{page}"
        parts.append(f'<a class="colab" href="{colab}">Open in Colab</a> and begin with `!pip install'
                     f' git+{at["{git_url}"]}`')
    return f'<div class="links">\n\n{" · ".join(parts)}\n\n</div>'


class show_docs_of_module(exec_show_docs):
    "Run `show_doc` on the objects of the module that a notebook exports, and nothing else of the notebook."
    def begin(self):
        self.k, module = CaptureShell(), _default_exp(self.nb)
        self.k.run_cell("from nbdev.showdoc import show_doc")
        if module:
            self.k.run_cell(f"import {get_config(path=root).lib_path.name}.{module} as module;"
                            " globals().update(vars(module))")

    def __call__(self, cell):
        if cell.cell_type == "code" and cell.source and re.search(r"^show_doc\(", cell.source, re.M):
            self.k.cell(cell)
        if self.k.exc: raise RuntimeError(f"show_doc fails: {cell.source}") from self.k.exc


def private(code: str) -> bool:
    """Whether an exported cell defines something and nothing of it public, so that the page would not show
    it at all."""
    made = [node for node in ast.parse(code).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    return bool(made) and not any(
        isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not re.match("_(?!_)", node.name)
        for node in made
    )


def keep_private(cell):
    """nbdev's `rm_export`, except for cells that the page would not show at all: the text around them speaks
    of them."""
    if (cell.cell_type == "code" and cell.directives_ and "export" in cell.directives_
        and "hide" not in cell.directives_ and private(cell.source)):
        cell.metadata["private"] = True
    else: rm_export(cell)


class Processors(FilterDefaults):
    "nbdev's processors, of which none runs a notebook."
    def base_procs(self):
        return [{exec_show_docs: show_docs_of_module, rm_export: keep_private}.get(p, p)
                for p in super().base_procs()]


def executed(path: Path):
    "A notebook with the outputs of this moment, without its hidden cells."
    notebook = nbformat.read(path, as_version=4)
    Client(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    notebook.cells = [
        c for c in notebook.cells if c.cell_type != "code" or not directives(c.source) & {"hide"}
    ]
    for cell in notebook.cells: fill_cell(cell, path.parent)
    return notebook


def processed(page: str):
    "A notebook as nbdev's processors leave it, with its opening cell back in its place."
    with tempfile.TemporaryDirectory() as folder:
        exec_nb(Path("nbs") / page, Path(folder) / "page.ipynb", Processors)
        notebook = nbformat.read(Path(folder) / "page.ipynb", as_version=4)
    opening = nbformat.read(root / "nbs" / page, as_version=4).cells[0]
    notebook.cells = [
        opening, *(c for c in notebook.cells if c.cell_type != "raw" and "AUTOGENERATED!" not in c.source),
    ]
    return notebook


def notebook_page(page: str):
    "A notebook as myst-nb reads it."
    notebook, words = executed(root / "nbs" / page) if Path(page).stem in FRESH else processed(page), ""
    notebook.cells = in_order(notebook.cells, page)
    notebook.metadata = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    for cell in notebook.cells:
        if text := documentation(cell): cell.cell_type, cell.source = "markdown", text
        if cell.cell_type == "markdown":
            words = said(cell.source) or words
            cell.source = markdown(cell.source, page)
            for key in ("outputs", "execution_count"): cell.pop(key, None)
        else:
            describe(cell, words)
            shown(cell)
    if page != "index.ipynb": notebook.cells.insert(1, nbformat.v4.new_markdown_cell(links(page)))
    return notebook


def contents() -> str:
    "The tables of contents of the sidebar."
    trees = [(section, [name_of(p) for p in group if p != "index.ipynb"]) for section, group in menu()]
    return "\n\n".join("```{toctree}\n:hidden:\n:caption: " + section + "\n\n" + "\n".join(names) + "\n```"
                       for section, names in trees if names)


def write_page(page: str) -> None:
    "Write one page into the folder that Sphinx reads."
    os.chdir(root)
    path = source / (name_of(page) + Path(page).suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = notebook_page(page)
    if page == "index.ipynb": notebook.cells.append(nbformat.v4.new_markdown_cell(contents()))
    path.write_text(nbformat.writes(notebook), encoding="utf-8")


def write_sources() -> None:
    "Write every page, several at a time; those that are run come first, because they take longest."
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(root / "nbs/images", source / "images")
    listed = sorted(pages(), key=lambda page: Path(page).stem not in FRESH)
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool: list(pool.map(write_page, listed))


def configuration() -> dict:
    "What would otherwise stand in Sphinx's conf.py."
    cfg = get_config(path=root)
    title = cfg.title
    theme = dict(
        repository_url=cfg.git_url, repository_branch=cfg.branch, use_repository_button=True,
        use_download_button=False, use_fullscreen_button=False, navbar_persistent=[], show_toc_level=2,
        search_bar_text="Search",
        logo=dict(text=title, image_light=str(site / "_static/mark.svg"),
                  image_dark=str(site / "_static/mark.svg"), alt_text=""),
    )
    myst = dict(myst_enable_extensions=["colon_fence", "dollarmath", "attrs_inline"], myst_heading_anchors=4,
                myst_heading_slug_func="docutils.nodes.make_id", myst_links_external_new_tab=False)
    notebooks = dict(nb_execution_mode="off", nb_ipywidgets_js={}, nb_merge_streams=True,
                     nb_render_markdown_format="myst", nb_code_prompt_show="Show the code",
                     nb_code_prompt_hide="Hide the code")
    look = dict(html_theme="sphinx_book_theme", html_context={"default_mode": "auto"},
                html_theme_options=theme, html_title=title, html_static_path=[str(site / "_static")],
                html_css_files=["site.css"], html_js_files=["site.js"],
                html_favicon=str(site / "_static/mark.svg"), html_copy_source=False, html_show_sphinx=False,
                html_math_renderer="mathml", html_baseurl=page_addresses()["{docs_url}"] + "/")
    about = dict(project=title, author=cfg.author, copyright=cfg.copyright, language="en",
                 extensions=["myst_nb", "mathml"], root_doc="index", suppress_warnings=["myst.header"])
    return about | myst | notebooks | look


def build(out: Path) -> list[str]:
    "Build the site into a folder; returns the warnings."
    from sphinx.application import Sphinx
    write_sources()
    warnings, made = io.StringIO(), site / "build/html"
    shutil.rmtree(made, ignore_errors=True)
    Sphinx(source, None, made, site / "build/doctrees", "html", configuration(), status=None,
           warning=warnings, freshenv=True).build()
    shutil.copytree(root / "nbs/sounds", made / "sounds")
    if missing := live.make(made / "_static/live"):
        print(f"the page \"Try it\" is not live: {missing}", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(made, out, ignore=shutil.ignore_patterns(".buildinfo"))
    return [line for line in warnings.getvalue().splitlines() if line.strip()]


def main() -> int:
    out = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else root / "_docs"
    problems = build(out)
    for line in problems: print(line, file=sys.stderr)
    print(f"the site, {len(pages())} pages: {out / 'index.html'}")
    return int(bool(problems))


if __name__ == "__main__":
    import build as this  # by name: the shell that runs a page takes the place of `__main__`
    sys.exit(this.main())
