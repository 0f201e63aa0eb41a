"The documentation site: the steps that turn notebooks into pages, and the built pages in a real browser."
import ast
import configparser
import contextlib
import functools
import http.server
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SITE = ROOT / "nbs/_site"
LISTING = runpy.run_path(str(SITE / "listing.py"))
# by their names, wherever they lie
PAGES = {
    re.sub(r"^\d+[a-z]*_", "", p.stem): p.relative_to(ROOT / "nbs").as_posix() for p in LISTING["notebooks"]()
}
HTML = {
    name: re.sub(r"(^|/)\d+[a-z]*_", r"\1", page).rsplit(".", 1)[0] + ".html" for name, page in PAGES.items()
}
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
         " --disable-component-update --disable-sync".split())
PHONE = dict(width=390, height=844)
DESKTOP = dict(width=1280, height=900)
WIDE = dict(width=1920, height=1080)


@pytest.fixture(scope="session")
def site():
    "The builder as a module."
    for name in ("docutils", "yaml", "nbdev"):
        pytest.importorskip(name, reason=f"{name} is not installed: make docs brings it")
    sys.path.insert(0, str(SITE))
    try:
        spec = importlib.util.spec_from_file_location("site_build", SITE / "build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally: sys.path.remove(str(SITE))
    return module


def cell(source, kind="code", outputs=()):
    import nbformat
    if kind == "markdown": return nbformat.v4.new_markdown_cell(source)
    return nbformat.v4.new_code_cell(
        source, outputs=[nbformat.v4.new_output("display_data", data=data) for data in outputs]
    )


def test_every_page_is_there_and_every_notebook_is_a_page(site):
    listed = site.pages()
    assert len(listed) == len(set(listed)) and all((ROOT / "nbs" / page).is_file() for page in listed)
    assert {p.relative_to(ROOT / "nbs").as_posix() for p in LISTING["notebooks"]()} == set(listed)
    assert {*site.FRESH} <= {Path(page).stem for page in listed}


def test_rooms_in_folders_are_found(tmp_path):
    "At any depth, and nothing in folders that nbdev passes over."
    names = [
        "a.ipynb", "wing/b.ipynb", "wing/deeper/c.md", "_proc/d.ipynb", "wing/.ipynb_checkpoints/e.ipynb",
        "wing/f.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in LISTING["below"](tmp_path, ".ipynb", ".md")] == names[
        :3
    ]


def test_every_bundled_model_has_its_card():
    text = (ROOT / "nbs" / PAGES["models"]).read_text(encoding="utf-8")
    cards = sorted((ROOT / "deepdemix/weights").glob("*/README.md"))
    assert cards and all(f"include ../../{card.relative_to(ROOT).as_posix()} " in text for card in cards)


def test_names_on_the_site(site):
    assert [
        site.name_of(p) for p in ("index.ipynb", "01_data.ipynb", "02a_metrics.ipynb", "pages/add_loss.ipynb")
    ] == ["index", "data", "metrics", "pages/add_loss"]


def test_links_between_notebooks(site):
    page, name = PAGES["evaluation"], site.name_of(PAGES["evaluation"])
    assert name.endswith("evaluation") and "07" not in name
    assert (site.relink(f"[a]({page}), [b]({page}#scores)", "index.ipynb")
            == f"[a]({name}.ipynb), [b]({name}.ipynb#scores)")
    assert (site.relink(f"[a](../{page}) and [b](cost.ipynb)", PAGES["quickstart"])
            == f"[a](../{name}.ipynb) and [b](../pages/cost.ipynb)")
    for untouched in ("[a](https://example.org/01_data.ipynb)", "[a](nowhere.ipynb)", "[a](#here)"):
        assert site.relink(untouched, "index.ipynb") == untouched


def test_links_to_documented_objects(site):
    docs = site.page_addresses()["{docs_url}"]
    assert 'href="data.html#store-open"' in site.relink(
        f"[`Store.open`]({docs}/data.html#store.open)", "index.ipynb"
    )
    assert (site.relink(f"## [`toy_song`]({docs}/data.html#toy_song), played", "index.ipynb")
            == "## `toy_song`, played")
    fenced = f"```python\nx, # as [`toy_song`]({docs}/data.html#toy_song) has it\n```"
    assert site.relink(fenced, "index.ipynb") == "```python\nx, # as `toy_song` has it\n```"
    assert 'href="../data.html#toy-song"' in site.relink(
        f"[`toy_song`]({docs}/data.html#toy_song)", PAGES["quickstart"]
    )


def test_callouts(site):
    assert site.callouts("::: {.callout-note}\nhello\n:::") == ":::{note}\nhello\n:::"
    assert (site.callouts(':::{.callout-tip title="Try it" collapse="true"}\nhello\n:::')
            == ":::{admonition} Try it\n:class: tip\nhello\n:::")
    assert site.callouts(":::{.other}\nhello\n:::") == ":::{.other}\nhello\n:::"


def test_badges_are_left_out(site):
    assert (
        site.without_badges(
            "a [![test](https://host/badge.svg)](https://host/x) b ![y](https://host/y.png) c"
        )
        == "a  b  c"
    )
    for kept in ("![ours](figure.png)", "[link](https://host)"): assert site.without_badges(kept) == kept


def test_documentation_becomes_markdown(site):
    shown = ('---\n\n[source](https://host/x.py#L3){target="_blank" style="float:right"}\n\n###'
             ' fit\n\n```python\ndef fit(x)\n```\n\n*Fit.*')
    text = site.documentation(
        cell("#| echo: false\n#| output: asis\nshow_doc(fit)", outputs=[{"text/markdown": shown}])
    )
    assert (text.startswith("### fit\n") and '<a href="https://host/x.py">source</a>' in text
            and text.endswith("*Fit.*") and "---" not in text)
    assert site.documentation(
        cell("#| output: asis", outputs=[{"text/markdown": shown.replace("### fit", "### A.__iter__")}])
    ).startswith(r"### A.\_\_iter\_\_")
    assert site.documentation(cell("Markdown('a')", outputs=[{"text/markdown": "a"}])) == ""


def test_tables_of_cards(site):
    card = """## Scores

```
test songs
          ------------ SDR (dB) ------------  ------ uSDR (dB) ------
                     overall  drums                overall  drums
---------------------------------------------------------------
mine       3.06 [2.53, 3.60]   3.44   3.10 [2.59, 3.64]   3.96
---------------------------------------------------------------
mixture / 4             1.04      –                0.80   0.49
50 test songs; stereo.
```

```sh
deepdemix models
```
"""
    text = site.tabled(card)
    assert ("**SDR (dB), test songs**\n\n| | overall | drums |\n|---|---:|---:|\n| mine | 3.06 [2.53, 3.60] |"
            " 3.44 |\n| mixture / 4 | 1.04 | – |" in text)
    assert ("**uSDR (dB), test songs**" in text
            and "| mine | 3.10 [2.59, 3.64] | 3.96 |\n| mixture / 4 | 0.80 | 0.49 |\n\n50 test songs; stereo."
            in text)
    assert (text.endswith("```sh\ndeepdemix models\n```\n")
            and site.tabled("```\nplain\n```") == "```\nplain\n```")


def test_private_code_is_folded(site):
    "What is exported without a public name would not be on the page, though the words around it speak of it."
    for code in ("def _f(): pass", "LIMIT = 3", "import io\n\nclass _A: pass"): assert site.private(code)
    for code in ("import io", "def f(): pass\n\ndef _g(): pass", "def __iter__(self): pass", "class A: pass"):
        assert not site.private(code)
    folded = cell("def _f(): pass")
    folded.metadata["private"] = True
    site.shown(folded)
    assert folded.metadata["tags"] == ["hide-input"] and "private" not in folded.metadata
    kept = [c for c in site.processed(PAGES["toy_band"]).cells if c.metadata.get("private")]
    assert (len(kept) > 15 and not any("_room" in c.source and "def toy_song" in c.source for c in kept)
            and any("def _room(" in c.source for c in kept))


def test_tests_are_folded(site):
    """A cell that ends in a check is folded under a line that says so; what draws, plays or shows a value
    stays open."""
    for code in (
        "test_eq(1, 1)", "x = 1\nassert x", "for x in (1, 2):\n    test_close(x, x)",
        "with open(p) as f: test_eq(f.read(), 'x')", "assert_ = 1\nfc.test_fail(f)",
    ):
        folded = cell(code, outputs=[])
        site.shown(folded)
        assert (folded.metadata["tags"] == ["hide-input"]
                and folded.metadata["mystnb"]["code_prompt_show"] == "Show the tests"), code
    for code in ("x = 1\nx", "test_eq(1, 1)\nx", "%time test_eq(1, 1)", "testing(1)"):
        opened = cell(code, outputs=[])
        site.shown(opened)
        assert "tags" not in opened.metadata, code
    drawn = cell("test_eq(1, 1)", outputs=[{"image/png": "x"}])
    site.shown(drawn)
    assert "tags" not in drawn.metadata
    silent = cell("#| echo: false\ntest_eq(1, 1)", outputs=[])
    site.shown(silent)
    assert silent.metadata["tags"] == ["remove-input"]


def test_imports_are_folded(site):
    "A cell of imports alone is folded; one that does more stays open."
    alone = cell("import torch\nfrom pathlib import Path", outputs=[])
    more = cell("import torch\ntorch.ones(1)", outputs=[])
    site.shown(alone)
    site.shown(more)
    assert alone.metadata["tags"] == ["hide-input"] and "tags" not in more.metadata
    assert alone.metadata["mystnb"]["code_prompt_show"] == "Show the imports"


def test_solutions_are_folded(site):
    "Under a line of their own, also if they end in a check."
    solution = cell("#| code-fold: true\nx = 1\ntest_eq(x, 1)", outputs=[])
    site.shown(solution)
    assert (solution.metadata["tags"] == ["hide-input"]
            and solution.metadata["mystnb"]["code_prompt_show"] == "Show the solution")
    assert solution.source == "x = 1\ntest_eq(x, 1)"


def test_a_class_stands_before_its_methods(site):
    def shown(name):
        return cell(
            f"#| output: asis\nshow_doc({name})", outputs=[{"text/markdown": f"### {name}\n\n*Words.*"}]
        )
    cells = [cell("# before", "markdown"), shown("measure"), shown("Standardise.reset_parameters"),
             shown("Standardise"), cell("x = 1"), shown("MaskDecoder")]
    ordered = site.in_order(cells, PAGES["open_unmix"])
    assert [site.documented(c) for c in ordered] == [
        "", "Standardise", "Standardise.measure", "Standardise.reset_parameters", "", "MaskDecoder",
    ]
    assert site.documentation(ordered[2]).startswith("### Standardise.measure\n")


def test_a_table_that_says_the_same_is_the_same_text(site):
    import pandas as pd
    from execute import settled
    tables = [pd.DataFrame({"a": [1]}).style.format("{:.0f}").to_html() for _ in range(2)]
    assert tables[0] != tables[1] and settled(tables[0], "here_0") == settled(tables[1], "here_0")
    assert 'id="T_here_0"' in settled(tables[0], "here_0")
    assert ">1</td>" in settled(tables[0], "here_0")
    assert settled("<p>\n  plain</p>", "here_0") == "<p>\n  plain</p>"


def test_pictures_are_light(site):
    "256 colours are all that a plot needs, and fewer often do; what is small already stays."
    import base64
    import io

    from execute import lighter
    from PIL import Image
    wide = Image.radial_gradient("L").convert("RGB")
    packed = lambda **how: (out := io.BytesIO(), wide.save(out, "png", **how),
                            base64.b64encode(out.getvalue()).decode())[2]
    less = lighter(packed(compress_level=0))
    assert len(less) < len(packed()) and lighter(less) == less
    again = Image.open(io.BytesIO(base64.b64decode(less)))
    assert (
        again.size == wide.size
        and max(abs(a - b) for a, b in zip(again.convert("L").tobytes(), wide.convert("L").tobytes())) <= 16
    )


def test_light_surfaces_keep_their_colours(site):
    "Boxes in pale colours, beside a picture that holds all the others."
    import base64
    import io

    from execute import lighter
    from PIL import Image, ImageDraw
    whole = Image.merge(
        "RGB",
        [Image.radial_gradient("L").rotate(angle).resize((512, 340)).quantize(12).convert("L")
         for angle in (0, 90, 180)],
    )
    whole.paste(
        Image.merge(
            "RGB",
            [Image.linear_gradient("L").rotate(angle).quantize(12).convert("L") for angle in (0, 90, 180)],
        ),
        (0, 0),
    )
    fills = [(238, 238, 238), (245, 226, 237), (251, 236, 204), (204, 236, 227), (221, 240, 251),
             (247, 243, 216)]
    for k, fill in enumerate(fills): ImageDraw.Draw(whole).rectangle((80 * k, 280, 80 * k + 60, 320), fill)
    out = io.BytesIO()
    whole.save(out, "png")
    less = Image.open(
        io.BytesIO(base64.b64decode(lighter(base64.b64encode(out.getvalue()).decode())))
    ).convert("RGB")
    for k, fill in enumerate(fills):
        assert max(abs(a - b) for a, b in zip(less.getpixel((80 * k + 30, 300)), fill)) <= 16


def test_words_for_pictures(site):
    assert (site.said("## A title\n\nThe band plays. Its **four** stems, as [`show`](x.html) draws them:")
            == "Its four stems, as show draws them")
    picture = cell("plot()", outputs=[{"image/png": "x"}])
    site.describe(picture, "Its four stems")
    assert picture.metadata["mystnb"]["image"]["alt"] == "Its four stems"
    own = cell("#| fig-alt: A line that falls\nplot()", outputs=[{"image/png": "x"}])
    site.describe(own, "something else")
    assert own.metadata["mystnb"]["image"]["alt"] == "A line that falls"
    player = cell("play()", outputs=[{"text/html": "<audio controls></audio>"}])
    site.describe(player, 'a "loud" tone')
    assert (player.outputs[0]["data"]["text/html"]
            == '<audio aria-label="a &quot;loud&quot; tone" controls></audio>')


def test_directives_are_not_shown(site):
    hidden = cell("#| echo: false\nx = 1")
    site.shown(hidden)
    assert hidden.source == "x = 1" and hidden.metadata["tags"] == ["remove-input"]
    slow = cell("#| slow\ny = 2")
    site.shown(slow)
    assert slow.source == "y = 2" and "tags" not in slow.metadata


def test_colab_only_where_it_can_run(site):
    """The page offers Colab for what needs no file of the repository, and says what to install; the first
    page offers the same notebooks."""
    at = site.page_addresses()
    alone = {page for page in offered() if site.runs_alone(page)}
    assert PAGES["metrics"] in alone and not {Path(page).stem for page in alone} & {"cluster", *site.FRESH}
    for page in alone:
        assert (f"https://colab.research.google.com/github/{at['{slug}']}/blob/{at['{branch}']}/nbs/{page}"
                in site.links(page) and "pip install git+" + at["{git_url}"] in site.links(page))
    assert "colab" not in site.links(PAGES["pretraining_helps"])
    rows = re.findall(r"^\| \[[^]]+\]\(nbs/([^)]+)\) \|.*\| (.*) \|$",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 12
    for page, offer in rows: assert offer.endswith(f"/nbs/{page})") if page in alone else not offer, page


RUN = """import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
notebook.cells = [c for c in notebook.cells if c.cell_type != "code" or not {f"#| {flag}" for flag in sys.argv[2:]} & {line.strip() for line in c.source.splitlines()}]
NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
where = NotebookClient(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import deepdemix; print(deepdemix.__file__)")]), kernel_name="python3").execute()
assert "site-packages" in where.cells[0].outputs[0].text
"""


def offered():
    "The notebooks of the repository except the first page."
    return [p.relative_to(ROOT / "nbs").as_posix() for p in LISTING["notebooks"]() if p.name != "index.ipynb"]


def packages(key):
    "The packages that a line of settings.ini asks for."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return {re.match(r"[\w-]+", word)[0] for word in config["DEFAULT"][f"{key}requirements"].split()}


@pytest.mark.parametrize("page", offered())
def test_what_a_notebook_needs_stands_below_its_title(site, page):
    """No cell of a notebook that runs alone imports a package that only an extra brings (but nussl's, which
    does without); which files it reads, the slow test finds out."""
    extras = ("dev_", "bench_", "docs_", "browser_", "export_", "peers_", "loggers_", "ray_")
    extra = set().union(*map(packages, extras)) - packages("") - {"fsspec"} # torch brings that
    assert {"demucs", "onnx", "onnxruntime", "ray"} <= extra and "torch" not in extra
    if not site.runs_alone(page): return
    for cell in json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or code.startswith("%"): continue
        imported = {name.split(".")[0] for node in ast.walk(ast.parse(code)) for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom) and node.module else [])}
        assert not imported & extra, imported & extra


@pytest.mark.slow
@pytest.mark.parametrize("page", offered())
def test_notebook_alone_in_a_fresh_environment(site, fresh, tmp_path, page):
    """A notebook that Colab is offered for, alone in an empty folder, with the package from a wheel; cells
    that need a GPU are left out."""
    if not site.runs_alone(page): pytest.skip("reads files of the repository, and is not offered in Colab")
    shutil.copy(ROOT / "nbs" / page, tmp_path / "notebook.ipynb")
    home = tmp_path.parent / f"{tmp_path.name}-home"
    home.mkdir()
    env = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MUSDB_PATH", "VIRTUAL_ENV")
    } | dict(HOME=str(home), PATH=f"{fresh.parent}:/usr/bin:/bin")
    done = subprocess.run([fresh, "-c", RUN, "notebook.ipynb", "cuda", "notest"], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [x.name for x in tmp_path.iterdir()] == ["notebook.ipynb"]


def test_formulas_without_a_script(site):
    from docutils.utils.math.latex2mathml import tex2mathml
    formulas = [
        f for page in site.pages() if page.endswith(".ipynb") for f in formulas_of(ROOT / "nbs" / page)
    ]
    assert len(formulas) > 10
    for formula in formulas:
        text = tex2mathml(formula)
        assert text.startswith("<math") and "merror" not in text, formula


def formulas_of(path):
    "What stands between dollar signs in a notebook's prose."
    import nbformat
    for c in nbformat.read(path, as_version=4).cells:
        if c.cell_type == "markdown":
            yield from re.findall(
                r"(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", re.sub(r"`[^`]*`|```.*?```", "", c.source, flags=re.S)
            )


def test_source_at_its_line(site):
    lines = (ROOT / "deepdemix/foundations/store.py").read_text(encoding="utf-8").splitlines()
    for name, words in {
        "cache_folder": "def cache_folder(", "Store.open": "def open(cls: Store", "Store": "class Store",
    }.items():
        address = site.at_line("https://host/o/r/blob/main/deepdemix/foundations/store.py#LNone", name)
        assert address.startswith("https://host/o/r/blob/main/deepdemix/foundations/store.py#L") and lines[
            int(address.rsplit("#L")[1]) - 1
        ].startswith(words)
    assert (site.at_line("https://host/o/r/blob/main/deepdemix/foundations/store.py#LNone", "gone")
            == "https://host/o/r/blob/main/deepdemix/foundations/store.py")


@pytest.mark.slow
def test_quickstart_commands(tmp_path, monkeypatch):
    """Every command of the quickstart, on a toy song and six songs with stems; the browser of the desk stays
    closed."""
    from deepdemix.audio import SOURCES
    from deepdemix.cli import main
    from deepdemix.foundations.codecs import read
    from deepdemix.foundations.encoding import write
    from deepdemix.foundations.toy_band import toy_song
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPDEMIX_CACHE", str(tmp_path / "cache"))
    served = []
    monkeypatch.setattr("deepdemix.listening.serve", lambda songs, *options: served.append(songs))
    song = toy_song(0, duration=3.)
    for path in ("song.mp3", "album/one.wav", "album/two.flac"): write(tmp_path / path, song.sum(0), 44100)
    for number in range(6):
        for name, stem in zip(SOURCES, toy_song(number, duration=2.)):
            write(tmp_path / f"my-songs/song {number}/{name}.wav", stem, 44100)
    commands = quickstart("sh", "deepdemix ")
    assert len(commands) >= 7
    for command in commands:
        training = (" --set examples_per_epoch=16 --set epochs=1 --set valid_examples=4"
                    if " train " in command else "")
        assert main(shlex.split(command + training)[1:]) == 0, command
    assert served == [["song.mp3"]]
    assert {p.name for p in (tmp_path / "stems/song").iterdir()} >= {f"{name}.wav" for name in SOURCES}
    assert {p.name for p in (tmp_path / "stems").iterdir()} >= {"song", "one", "two"}
    karaoke = sum(read(tmp_path / f"karaoke/song/{name}.wav")[0] for name in ("vocals", "no_vocals"))
    assert (karaoke - read("song.mp3")[0]).abs().max() < 2 ** -14
    space = {}
    exec("\n".join(quickstart("python", "")), space)
    assert (
        sorted(space["stems"]) == sorted(SOURCES) and space["instrumental"].shape == space["waveform"].shape
    )


def quickstart(language, start):
    "The lines of the quickstart's code in one language that begin with some words."
    import nbformat
    text = "\n\n".join(
        c.source for c in nbformat.read(ROOT / "nbs" / PAGES["quickstart"], as_version=4).cells
    )
    lines = "\n".join(re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)).splitlines()
    return [line for line in lines if line.startswith(start)]


@pytest.fixture(scope="session")
def built():
    "The folder of the built site."
    if not (ROOT / "_docs/index.html").exists(): pytest.skip("the site is not built: make docs")
    return ROOT / "_docs"


class Page(HTMLParser):
    "What a page links to, loads and can be linked to."
    def __init__(self, path):
        super().__init__()
        self.links = []
        self.loads = []
        self.ids = Counter()
        self.images = []
        self.players = 0
        self.canonical = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("id"): self.ids[found["id"]] += 1
        if tag == "a" and found.get("href"): self.links.append(found["href"])
        if tag in ("img", "script", "iframe", "source", "audio", "video") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") not in ("canonical", "index", "search", "next", "prev"):
            self.loads.append(found["href"])
        if tag == "img": self.images.append(found)
        if tag == "audio": self.players += 1

    handle_startendtag = handle_starttag


@pytest.fixture(scope="session")
def built_pages(built):
    return {p.relative_to(built).as_posix(): Page(p) for p in sorted(built.rglob("*.html"))
            if "_static" not in p.parts}


def outside(address): return bool(urlsplit(address).scheme or address.startswith("//"))


@pytest.mark.browser
def test_no_broken_link(built, built_pages):
    "Every link, anchor, picture, script and style that stays on the site leads somewhere."
    broken, count = [], 0
    for name, page in built_pages.items():
        for address in page.links + page.loads:
            if outside(address) or address in ("#", ""): continue
            path, anchor = urldefrag(address)
            target = (
                (built / name).parent / unquote(urlsplit(path).path) if urlsplit(path).path else built / name
            )
            target, count = Path(os.path.normpath(target)), count + 1
            inside = (built_pages.get(target.relative_to(built).as_posix()) if target.is_relative_to(built)
                      else None)
            if not target.exists() or anchor and inside and unquote(anchor) not in inside.ids:
                broken.append(f"{name}: {address}")
    assert count > 1000 and not broken, "\n".join(sorted(set(broken)))


@pytest.mark.browser
def test_nothing_is_loaded_from_outside(built, built_pages):
    for name, page in built_pages.items():
        assert not [x for x in page.loads if outside(x) and not x.startswith("data:")], name
    for style in built.rglob("*.css"):
        assert not re.findall(
            r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]*", style.read_text(encoding="utf-8")
        ), style


@pytest.mark.browser
def test_source_and_other_pages_link_to_one_repository(site, built_pages):
    url = site.page_addresses()["{git_url}"]
    sources = [x for page in built_pages.values() for x in page.links
               if "/blob/" in x and x.endswith(tuple("0123456789")) and "#L" in x and x.startswith(url)]
    assert len(sources) > 200
    assert all(
        (ROOT / urlsplit(x).path.split("/blob/", 1)[1].split("/", 1)[1]).is_file() for x in set(sources)
    )
    assert not [x for page in built_pages.values() for x in page.links if "{" in x]


@pytest.mark.browser
def test_every_figure_has_words(built_pages):
    figures = [(name, image) for name, page in built_pages.items() for image in page.images
               if "_images" in image.get("src", "")]
    assert len(figures) > 25
    for name, image in figures:
        assert len(image.get("alt", "")) > 15 and not re.search(r"\.(png|jpe?g|svg)$", image["alt"]), (
            name, image,
        )


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="session")
def address(built):
    "The site, served on this machine alone."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium: pytest.skip("no Chromium")
    with playwright.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(tmp_path_factory.mktemp("profile"),
                                                       executable_path=chromium, headless=True, args=FLAGS,
                                                       viewport=DESKTOP)
        yield context
        context.close()


@contextlib.contextmanager
def opened(browser, address, page):
    "A tab that fails on errors of a script, on files that are missing, and on requests to anywhere else."
    tab, wrong = browser.new_page(), []
    tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    tab.on(
        "request",
        lambda r: (
            wrong.append(r.url) if not r.url.startswith((address + "/", "data:", "blob:", "about:")) else None
        ),
    )
    tab.goto(f"{address}/{page}")
    try:
        yield tab
        assert not wrong, wrong
    finally: tab.close()


@pytest.mark.browser
@pytest.mark.parametrize("page", HTML.values())
def test_page(browser, address, page):
    "Figures and players are there, one search box, and no scrolling sideways on a phone."
    with opened(browser, address, page) as tab:
        tab.set_viewport_size(DESKTOP)
        tab.wait_for_load_state("load")
        for image in tab.locator("article img").all():
            image.scroll_into_view_if_needed()
            assert (
                image.evaluate("async i => { await i.decode(); return i.naturalWidth * i.width * i.height; }")
                > 1000
            )
        for player in tab.locator("article audio").all():
            assert (
                player.evaluate(
                    "a => a.readyState ? a.duration : new Promise((yes, no) => { a.onloadedmetadata = () =>"
                    " yes(a.duration); a.onerror = () => no('no sound'); a.load(); })"
                )
                > 0.1
            )
            assert player.is_visible() and player.get_attribute("aria-label")
        assert tab.locator("math").count() == 0 or tab.locator("math").first.bounding_box()["width"] > 4
        assert tab.locator("article h1").count() == 1
        assert one_search(tab)
        for size in (WIDE, DESKTOP):
            tab.set_viewport_size(size)
            assert tab.evaluate(CUT) == []
        tab.set_viewport_size(PHONE)
        tab.wait_for_timeout(100)
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for alt, width, column, own, letters in tab.evaluate(FIGURES):
            assert width <= column and alt, alt
            assert own and letters * width / own >= 9, (alt, width, own, letters)
        assert tab.evaluate("[...document.querySelectorAll('article p, article li')].every(p =>"
                            " parseFloat(getComputedStyle(p).fontSize) >= 12)")


FIGURES = """() => [...document.querySelectorAll('article .cell_output img')].map(i => [i.alt, i.getBoundingClientRect().width, i.closest('.cell_output').getBoundingClientRect().width + 1,
  parseFloat(i.getAttribute('width')), (i.className.match(/letters-(\\d+)/) || [0, 1000])[1] / 10])"""
CUT = """() => { const box = document.querySelector('.bd-sidebar-secondary'); if (!box || !box.offsetWidth) return [];
  const end = box.getBoundingClientRect().right; return [...box.querySelectorAll('a')].filter(a => a.offsetWidth && (a.getBoundingClientRect().right > end || a.scrollWidth > a.clientWidth + 1)).map(a => a.textContent); }"""


def one_search(tab):
    "Whether the page offers one way to search: one visible button that opens the one search field."
    buttons = tab.locator(".search-button, .search-button-field").filter(visible=True)
    return buttons.count() == 1 and tab.locator("input[type=search]").count() == 1


@pytest.mark.browser
@pytest.mark.parametrize("page", [HTML["listening"], HTML["exploring"]])
def test_the_desk_on_the_page_plays(browser, address, page):
    """The toy band's stems sound, and fall silent when all are muted, and one of them sounds again by
    itself; another set can be heard in its place."""
    with opened(browser, address, page) as tab:
        tab.locator("article iframe").first.scroll_into_view_if_needed()
        desk = tab.locator("article iframe").first.element_handle().content_frame()
        desk.wait_for_selector("#play:enabled")
        desk.evaluate("desk.region(0.5, 1.5)")
        desk.click("#play")
        level = lambda: (tab.wait_for_timeout(350), desk.evaluate("desk.level()"))[1]
        assert level() > -40 and desk.evaluate("desk.state.playing")
        for stem in ("drums", "bass", "other", "vocals"): desk.click(f"[aria-label='Mute {stem}']")
        assert level() < -100
        desk.click("[aria-label='Solo vocals']")
        assert level() > -60
        first = desk.inner_text("#status")
        desk.press("body", "s")
        assert level() > -60 and desk.inner_text("#status") != first
        desk.click("#play")
        assert not desk.evaluate("desk.state.playing")


@pytest.mark.browser
def test_formulas_and_callouts_are_drawn(browser, address, built):
    "Every formula takes up room, and what Quarto calls a callout is a box with a title."
    formulas = 0
    for path in sorted(built.rglob("*.html")):
        if "<math" not in path.read_text(encoding="utf-8"): continue
        with opened(browser, address, path.relative_to(built).as_posix()) as tab:
            boxes = tab.evaluate(
                "[...document.querySelectorAll('article math')].map(m => [m.getBoundingClientRect().width,"
                " m.getBoundingClientRect().height, m.querySelectorAll('merror').length])"
            )
            formulas += len(boxes)
            assert all(width > 4 and height > 6 and not wrong for width, height, wrong in boxes), path
    assert formulas > 20
    for page, title in ((HTML["models"], "Important"), (HTML["quickstart"], "Note")):
        with opened(browser, address, page) as tab:
            assert tab.locator("article .admonition > .admonition-title").first.inner_text() == title


@pytest.mark.browser
def test_private_code_opens(browser, address):
    "Code without a public name is folded; its line opens by the keyboard."
    with opened(browser, address, HTML["toy_band"]) as tab:
        folds = tab.locator("article details.hide", has_text="Show the code")
        assert folds.count() > 15 and not folds.first.locator("pre").is_visible()
        folds.first.locator("summary").press("Enter")
        assert folds.first.locator("pre").is_visible() and "_SCALES" in folds.first.locator("pre").inner_text()


@pytest.mark.browser
def test_what_is_cut_off_says_so(browser, address):
    """A box with more than is seen has a shadow at that end and can be scrolled by the keyboard; at its end
    it has none. Numbers in tables stand right."""
    with opened(browser, address, HTML["cost"]) as tab:
        tab.set_viewport_size(PHONE)
        tab.wait_for_selector("div.highlight pre.more")
        wide = tab.locator("div.highlight pre.more").first.element_handle()
        assert wide.get_attribute("tabindex") == "0"
        wide.evaluate("e => { e.scrollLeft = e.scrollWidth; }")
        tab.wait_for_function("e => !e.classList.contains('more')", arg=wide)
        table = tab.locator("table.dataframe").first
        assert table.locator("tbody td").first.evaluate("e => getComputedStyle(e).textAlign") == "right"
        assert (
            table.locator("tbody tr").first.locator("td").last.evaluate("e => getComputedStyle(e).textAlign")
            == "left"
        )


@pytest.mark.browser
@pytest.mark.parametrize(
    "words,page",
    [("contrastive", HTML["pretraining"]), ("mixture overlap chunk", HTML["audio"]),
     ("karaoke", HTML["quickstart"])],
)
def test_search_finds(browser, address, words, page):
    with opened(browser, address, HTML["index"]) as tab:
        tab.set_viewport_size(DESKTOP)
        tab.locator(".search-button-field, .search-button").filter(visible=True).first.click()
        field = tab.locator("input[type=search]").filter(visible=True)
        field.fill(words)
        field.press("Enter")
        tab.wait_for_selector("#search-results li a")
        tab.wait_for_function(
            "document.querySelector('#search-results .search-summary')?.textContent.match(/found/i)"
        )
        links = [a.get_attribute("href") for a in tab.locator("#search-results li a").all()]
        assert any(page in link for link in links), links
        assert tab.locator("input[type=search]").filter(visible=True).count() == 1


@pytest.mark.browser
@pytest.mark.parametrize("page", [HTML["metrics"], HTML["index"], HTML["exploring"]])
def test_light_and_dark(browser, address, page):
    "Both can be chosen; in each, text stands out from its ground by 4.5 to 1 at least."
    with opened(browser, address, page) as tab:
        tab.set_viewport_size(DESKTOP)
        seen = {}
        for theme in ("dark", "light"):
            tab.locator(".theme-switch-button").filter(visible=True).click()
            tab.locator(f".theme-change-button[data-mode={theme}]").filter(visible=True).click()
            tab.wait_for_timeout(600)
            assert tab.evaluate("document.documentElement.dataset.theme") == theme
            seen[theme] = tab.evaluate(CONTRAST)
            assert tab.evaluate("[...document.querySelectorAll('article .output.text_html')].every(e =>"
                                " getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)')")
        for theme, (ground, worst) in seen.items(): assert worst >= 4.5, (theme, worst)
        assert seen["light"][0] > .8 and seen["dark"][0] < .1


CONTRAST = """() => {
  const linear = c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const parse = s => (s.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > .9) return light(c); } return 1; };
  const ratio = e => { const [a, b] = [light(parse(getComputedStyle(e).color)), ground(e)].sort((x, y) => y - x); return (a + .05) / (b + .05); };
  const all = [...document.querySelectorAll('article p, article a, article li, article td, article pre span, article h1, article h2, nav a')].filter(e => e.offsetWidth && e.textContent.trim());
  return [ground(document.body), Math.min(...all.map(ratio))];
}"""


@pytest.mark.browser
def test_opens_from_a_folder(browser, built):
    "Without a server, as a file: the page, its styles and its figures."
    tab = browser.new_page()
    try:
        tab.goto((built / HTML["audio"]).as_uri())
        assert (
            tab.locator("article img").first.evaluate(
                "async i => { await i.decode(); return i.naturalWidth; }"
            )
            > 100
        )
        assert tab.evaluate("getComputedStyle(document.body).fontFamily") != "Times New Roman"
    finally: tab.close()


@pytest.mark.browser
def test_check_finds_a_broken_link(tmp_path):
    "The parser behind the link check sees links, anchors and pictures."
    (tmp_path / "a.html").write_text(
        '<h1 id="here">x</h1><a href="b.html#gone">b</a><img src="c.png" alt="">', encoding="utf-8"
    )
    page = Page(tmp_path / "a.html")
    assert page.links == ["b.html#gone"] and page.loads == ["c.png"] and page.ids["here"] == 1


@pytest.mark.browser
def test_a_formula_that_cannot_be_read_is_a_warning(monkeypatch):
    "It stands on its page as it was written; one that can be read is MathML, without a word."
    from docutils import nodes
    monkeypatch.syspath_prepend(str(SITE))
    mathml, told = importlib.import_module("mathml"), []
    monkeypatch.setattr(mathml.log, "warning", lambda *words, **_: told.append(words[0] % words[1:]))
    assert mathml.mathml(nodes.math("", "x<y")).startswith("<math") and not told
    assert mathml.mathml(nodes.math("", r"\Big(x<y")) == r"<code>\Big(x&lt;y</code>"
    assert len(told) == 1 and r"\Big" in told[0]
