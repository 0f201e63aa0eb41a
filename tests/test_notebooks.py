"What a saved notebook must and must not hold."
import ast
import base64
import io
import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = runpy.run_path(str(ROOT / "nbs/_site/listing.py"))["notebooks"]()
LIMIT = 300_000
SOUNDS = re.compile(r'src="(?:\.\./)*sounds/([^"]+)"')
AUDIO = re.compile(r"data:audio/[\w.+-]+;base64,([A-Za-z0-9+/=\s]+)")
MACHINE = re.compile(r"(?<![\w.])/(?:root|home|work|tmp|Users|private|var/folders)/|[A-Z]:\\Users")
FROM_MUSDB = re.compile(r"musdb|stem\.mp4|stempeg|mdb-excerpts", re.I)
# synthesised, or the CC0 song of the package
TOY = re.compile(r"toy|sine|tone|click|noise|chirp|sample_song", re.I)


def read(path): return json.loads(path.read_text(encoding="utf-8"))


def text_of(output):
    "All text of a saved output, without pictures."
    parts = [output.get("text", ""), output.get("traceback", "")] + [
        v for k, v in output.get("data", {}).items() if not k.startswith("image/png")
    ]
    return "".join(
        "".join(p) if isinstance(p, list) else json.dumps(p) if isinstance(p, dict) else p for p in parts
    )


def players(notebook):
    "(source, bytes) of every saved sound, with the source of the cell that made it."
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        for output in cell.get("outputs", []):
            for kind, data in output.get("data", {}).items():
                if kind.startswith("audio/"): yield source, base64.b64decode("".join(data))
            for found in AUDIO.findall(text_of(output)): yield source, base64.b64decode(found)
            for name in SOUNDS.findall(text_of(output)):
                yield source, (ROOT / "nbs/sounds" / name).read_bytes()


def check_audio(notebook):
    """Sound only if it is short, and only from a cell and notebook that play synthesised songs, or the CC0
    song."""
    code = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    for source, sound in players(notebook):
        assert not FROM_MUSDB.search(source), "a player in a cell that touches real songs"
        assert TOY.search(code), "a player in a notebook that synthesises nothing"
        assert (
            seconds(sound) <= 4.05 and len(sound) <= 150_000
        ), f"a player of {seconds(sound):.1f} s, {len(sound)} bytes"


def seconds(sound):
    "Length of a wav."
    import soundfile
    return soundfile.info(io.BytesIO(sound)).duration


def missing_files(cells, folder):
    """Files and folders of the project that a cell names and that are not there, seen from the notebook's
    folder."""
    names = [name for source in cells
             for name in re.findall(r"""["']((?:\.\./)+(?:results|bench|tests)/[^"'{}]+)["']""", source)]
    return [name for name in names if not (folder / name).exists()]


def test_files_of_the_project_are_where_notebooks_look_for_them():
    assert missing_files(['Path("../results/none.json")', "f'../tests/conftest.py'"], ROOT / "nbs") == [
        "../results/none.json"
    ]
    for path in NOTEBOOKS:
        cells = ["".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "code"]
        assert not missing_files(cells, path.parent), path.stem


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_sound_of_real_songs(path): check_audio(read(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_run_all_runs_what_the_tests_run(path):
    "Jupyter knows no `eval: false`: a cell that stops a kernel stops a reader."
    for cell in read(path)["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code": continue
        assert not re.search(r"^#\|\s*eval:\s*false", code, re.M)
        assert "__main__" not in code or "in_ipython()" in code or "sys.exit" not in code, code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_small_and_whole(path):
    assert path.stat().st_size < LIMIT
    cells = read(path)["cells"]
    for cell, pattern in zip(cells, (r"# [^\n]+\n\n> [^\n]+(\n\n- needs: [^\n]+)?", r"(?!#)[^ ].+")):
        assert cell["cell_type"] == "markdown" and re.fullmatch(
            pattern, "".join(cell["source"]), re.S
        ), "title and promise (and needs), then a cell with the introduction"
    titles = [line for c in cells if c["cell_type"] == "markdown"
              for line in re.sub(r"```.*?```", "", "".join(c["source"]), flags=re.S).splitlines()
              if line.startswith("# ")]
    assert len(titles) == 1, titles


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_opens_in_jupyter(path):
    """One kernel for all, named as `nbdev_clean` leaves it, and nothing beside it that another program put
    there."""
    notebook = read(path)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
    }
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        folded = cell["cell_type"] == "code" and bool(
            re.search(r"^#\| code-fold: true$", "".join(cell["source"]), re.M)
        )
        assert cell["metadata"] == ({"jupyter": {"source_hidden": True}} if folded else {}), cell["id"]


# notebooks that end in exercises
COURSE = [
    "01_data", "02_augmentation", "03_training", "04_baseline", "05_pretraining", "06_deepdemix",
    "07_evaluation", "08_separation", "09_experiment",
]


@pytest.mark.parametrize("name", COURSE)
def test_exercises_have_solutions(name):
    """Two or three questions under one heading, each with a solution below it that checks itself and is
    folded."""
    cells = read(ROOT / f"nbs/{name}.ipynb")["cells"]
    start = next(k for k, c in enumerate(cells)
                 if c["cell_type"] == "markdown" and re.search(r"^## Exercises$", "".join(c["source"]), re.M))
    rest = [(c["cell_type"], "".join(c["source"])) for c in cells[start:]]
    asked = [text for kind, text in rest if kind == "markdown" for _ in re.findall(r"^\*\*\d\.", text, re.M)]
    solved = [
        text for kind, text in rest if kind == "code" and re.search(r"^#\| code-fold: true$", text, re.M)
    ]
    assert len(asked) == len(solved) and len(asked) in (2, 3)
    for text in solved: assert re.search(r"^(test_\w+\(|assert )", text, re.M), text


@pytest.mark.parametrize("name", COURSE)
def test_a_course_can_be_heard(name): assert list(players(read(ROOT / f"nbs/{name}.ipynb")))


def code_of(path):
    "(directives, code) of every code cell."
    for cell in read(path)["cells"]:
        if cell["cell_type"] != "code": continue
        lines = "".join(cell["source"]).splitlines()
        yield [line[2:].strip() for line in lines if line.startswith("#|")], "\n".join(
            line for line in lines if not line.startswith("#|")
        )


def check_directives(directives):
    "What Quarto reads as YAML is YAML: each line by itself, and the options of a cell together."
    for line in directives: assert isinstance(yaml.safe_load(line), dict) == (": " in line), line
    options = "\n".join(line for line in directives if ": " in line)
    assert len(yaml.safe_load(options) or {}) == len(options.splitlines()), options


def check_imports(directives, code):
    "nbdev runs each cell that imports while it makes the docs: it computes nothing, unless it is exported."
    if any(line.split()[0].startswith("export") for line in directives): return
    tree = ast.parse(code)
    imports = lambda node: isinstance(node, (ast.Import, ast.ImportFrom))
    assert not any(map(imports, ast.walk(tree))) or all(map(imports, tree.body)), code


def check_device(directives, code):
    "A cell for a GPU asks whether there is one, so that Run All goes on without."
    if "cuda" not in directives: return
    for node in ast.parse(code).body:
        assert isinstance(node, ast.If) and ast.unparse(node.test) == "torch.cuda.is_available()", code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_for_nbdev_quarto_and_run_all(path):
    for directives, code in code_of(path):
        check_directives(directives)
        check_imports(directives, code)
        check_device(directives, code)


def test_cells_that_would_stop_a_program_are_found():
    for wrong in (["fig-alt: Two maps: before, and after"], ["echo: false", "echo: true"]):
        with pytest.raises((AssertionError, yaml.YAMLError)): check_directives(wrong)
    check_directives(["echo: false", 'fig-alt: "Two maps: before, and after"', "export"])
    for wrong in (
        "import io\nx = io.StringIO()", "def f():\n    import io", "if True:\n    from io import StringIO",
    ):
        with pytest.raises(AssertionError): check_imports([], wrong)
    for right in ((["export"], "def f():\n    import io"), ([], "import io\nfrom io import StringIO"),
                  ([], "x = 1")):
        check_imports(*right)
    for wrong in ("x.cuda()", "if torch.cuda.is_available():\n    x.cuda()\nx.cpu()"):
        with pytest.raises(AssertionError): check_device(["cuda"], wrong)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_name_no_machine_and_no_error(path):
    for cell in read(path)["cells"]:
        for output in cell.get("outputs", []):
            text = AUDIO.sub("", text_of(output))
            assert not MACHINE.search(text), text[:300]
            assert output["output_type"] != "error", text[-300:]
            assert output.get("name") != "stderr", text[:300]
            assert "application/vnd.jupyter.widget-view+json" not in output.get(
                "data", {}
            ) or path.stem.startswith("10_"), "a widget, such as a progress bar"


COLUMN = 358 # pixels of a page on a phone


def pictures(notebook):
    "(source of the cell, kind, data, what is noted about it) of every saved picture."
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            for kind in (k for k in output.get("data", {}) if k.startswith("image/")):
                yield ("".join(cell["source"]), kind, "".join(output["data"][kind]),
                       output["metadata"].get(kind, {}))


def check_picture(source, kind, data, about):
    """A picture says how wide it is and how small its letters are; shrunk to a phone's column they are 9
    pixels high, and the picture has twice the points of a screen."""
    from PIL import Image
    assert "width" in about, f"saved without `make notebooks`: {source[:200]}"
    if "letters" in about:
        assert (
            about["letters"] * min(1, COLUMN / about["width"]) >= 9
        ), f"letters of {about['letters']} pixels in a picture of {about['width']}: {source[:200]}"
    if "picture_pieces" not in source:
        assert Image.open(io.BytesIO(base64.b64decode(data))).width >= 2 * about["width"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_figures_can_be_read_on_a_phone(path):
    for picture in pictures(read(path)): check_picture(*picture)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_was_saved(path):
    """A cell that describes its figure, or ends in drawing one, has it: a kernel whose plots go elsewhere
    saves none, and nobody notices."""
    for cell in read(path)["cells"]:
        source = "".join(cell["source"])
        draws = source.rstrip().endswith(";") and re.search(
            r"\b(plt|ax|axes|fig|show_\w+|plot_\w+)\b", source
        )
        skipped = re.search(r"^#\|\s*(export|slow|cuda|notest|hide|eval: false)", source, re.M)
        if (cell["cell_type"] != "code" or skipped
            or not (draws or re.search(r"^#\|\s*fig-alt:", source, re.M))):
            continue
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        assert any(k.startswith("image/") for k in kinds) or "text/html" in kinds, source[:200]


def test_small_letters_are_found():
    "As the running kernel notes them, of what is drawn and nothing else."
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    picture = runpy.run_path(str(ROOT / "nbs/_site/figures.py"))["picture"]
    for size, width, fits in ((9, 4.9, True), (8, 4.9, False), (9, 7, False), (14, 7, True)):
        fig, ax = plt.subplots(figsize=(width, 2), layout="constrained")
        ax.text(.5, .5, "here", fontsize=size)
        ax.text(.5, .2, "hidden", fontsize=3, visible=False)
        ax.tick_params(labelsize=14)
        data, about = picture(fig, base64=True)
        plt.close(fig)
        assert about["letters"] == round(size * 96 / 72, 1)
        if fits:
            check_picture("", "image/png", data, about)
            continue
        with pytest.raises(AssertionError): check_picture("", "image/png", data, about)


def player_cell(source, seconds=1., rate=16000):
    "A code cell that saved a player."
    import numpy as np
    from IPython.display import Audio
    html = Audio(np.sin(np.arange(int(seconds * rate)) / 9), rate=rate)._repr_html_()
    return {"cell_type": "code",
            "source": source,
            "outputs": [{"output_type": "display_data", "data": {"text/html": [html]}, "metadata": {}}]}


def test_saved_sound_of_a_real_song_fails():
    toy = {"cell_type": "code", "source": "song = toy_song(0)", "outputs": []}
    check_audio({"cells": [toy, player_cell("player(song, 44100)")]})
    for cells in ([toy, player_cell("player(read(os.environ['MUSDB_PATH'] + '/test/x.stem.mp4')[0])")],
                  [player_cell("player(song, 44100)")], [toy, player_cell("player(song)", 5.0)]):
        with pytest.raises(AssertionError): check_audio({"cells": cells})
    stored = player_cell("player(song)")
    stored["outputs"][0]["data"] = {"audio/wav": base64.b64encode(b"RIFF").decode()}
    stored["source"] = "player(musdb_song)"
    with pytest.raises(AssertionError): check_audio({"cells": [toy, stored]})


def test_every_sound_beside_the_pages_is_played():
    "Each file in nbs/sounds has its player, and none is missing."
    played = {name for path in NOTEBOOKS for cell in read(path)["cells"] for output in cell.get("outputs", [])
              for name in SOUNDS.findall(text_of(output))}
    assert played == {p.name for p in (ROOT / "nbs/sounds").iterdir()} and len(played) > 20


def test_machine_paths_are_found():
    for text in ("/root/x", "saved: /tmp/abc/y", "'/work/z'", "/home/me/a"): assert MACHINE.search(text), text
    for text in ("https://host/home/x", "a/tmp/b", "nbs/work/x"): assert not MACHINE.search(text), text


def mono(x, rate, new=4000):
    "A waveform (channels, time) as one channel at a low rate, of unit energy."
    from deepdemix.foundations.waveforms import resample
    x = resample(x.mean(0, keepdim=True), rate, new)[0]
    return x / x.norm().clamp_min(1e-9)


def likeness(part, whole):
    "The largest normalised correlation of `part` with any stretch of `whole`, both mono at one rate."
    import torch
    n = 1 << (len(part) + len(whole)).bit_length()
    cross = torch.fft.irfft(torch.fft.rfft(whole, n) * torch.fft.rfft(part, n).conj(), n)[
        : max(1, len(whole) - len(part) + 1)
    ]
    energy = torch.nn.functional.pad(whole.double().square().cumsum(0), (1, 0))
    energy = ((energy[len(part) :] - energy[: len(energy) - len(part)])[: len(cross)]
              if len(whole) > len(part) else energy[-1:])
    return float((cross.abs() / energy.clamp_min(1e-9).sqrt()).max())


@pytest.mark.musdb
@pytest.mark.slow
def test_no_saved_sound_is_in_musdb(musdb_path):
    import soundfile
    import torch

    from deepdemix.foundations.codecs import read_streams
    sounds = []
    for path in NOTEBOOKS:
        for _, sound in players(read(path)):
            x, rate = soundfile.read(io.BytesIO(sound), dtype="float32", always_2d=True)
            sounds.append((path.stem, mono(torch.from_numpy(x.T[:, :2 * rate]), rate)))
    planted = None
    for song in sorted(musdb_path.glob("t*/*.stem.mp4")):
        streams, rate = read_streams(song)
        stretches = [mono(s[:, :8 * rate], rate) for s in streams]
        if planted is None: planted = likeness(mono(streams[0][:, 2 * rate:4 * rate], rate), stretches[0])
        for notebook, sound in sounds:
            assert max(likeness(sound, s) for s in stretches) < .8, f"{notebook} plays {song.name}"
    assert planted > .9, "the check does not find an excerpt of a song"
