"What `import deepdemix` offers, and what it leaves unread until it is asked for."
import ast
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from types import FunctionType

import pytest

import deepdemix

PACKAGE = Path(deepdemix.__file__).parent


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)


def test_the_import_reads_no_heavy_package():
    code = (
        "import sys, deepdemix; print([m for m in ('torch', 'numpy', 'lightning', 'av') if m in sys.modules],"
        " deepdemix.__version__)"
    )
    assert run("-c", code).stdout == f"[] {deepdemix.__version__}\n"


@pytest.mark.parametrize("name", deepdemix.__all__)
def test_a_name_is_that_of_its_room(name):
    assert name in dir(deepdemix) and callable(getattr(deepdemix, name))
    if name in deepdemix._ROOMS:
        assert getattr(deepdemix, name) is getattr(import_module(f"deepdemix.{deepdemix._ROOMS[name]}"), name)


MEANING = {
    "Separator": "device: auto, cpu, cuda or mps",
    "Separator.separate": "two_stems: only this source, and the mixture without it",
    "Mixer": "duration: ",
    "fit": "resume: go on with the run in `out`",
    "separate": "out: the folder in which",
}


def test_help_says_what_each_parameter_means():
    code = "; ".join(["import deepdemix", *(f"help(deepdemix.{what}); print('=' * 9)" for what in MEANING)])
    *helps, end = run("-c", code).stdout.split("=" * 9 + "\n")
    assert not end and len(helps) == len(MEANING)
    for printed, (what, meaning) in zip(helps, MEANING.items()): assert meaning in printed, what


def test_editors_see_every_method():
    "What a notebook adds to a class stands in the class's stub."
    for path in PACKAGE.rglob("*.pyi"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        room, tree = import_module(name), ast.parse(path.read_text(encoding="utf-8"))
        for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            seen = {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}
            own = {k for k, f in vars(getattr(room, cls.name)).items()
                   if not k.startswith("_") and isinstance(f, (FunctionType, classmethod, property))}
            assert own <= seen, f"{name}.{cls.name}: {own - seen}"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'Seperator'"): deepdemix.Seperator


def test_a_song_is_separated_in_one_line(tmp_path):
    from deepdemix.audio import write
    from deepdemix.foundations.toy_band import toy_song
    write(tmp_path / "song.wav", toy_song(1, duration=1.).sum(0), 44100)
    made = deepdemix.separate(tmp_path / "song.wav", tmp_path / "stems", stems=["vocals"])
    assert [Path(x).name for x in made["outputs"].values()] == ["vocals.wav"] and Path(
        made["outputs"]["vocals"]
    ).is_file()


def test_the_module_is_the_command():
    done = run("-m", "deepdemix", "--version")
    assert done.returncode == 0 and deepdemix.__version__ in done.stdout


def test_every_extra_that_a_message_names_is_declared():
    named = {x for p in PACKAGE.rglob("*.py")
             for x in re.findall(r"deepdemix\[(\w+)\]", p.read_text(encoding="utf-8"))}
    assert "peers" in named and named <= set(metadata("deepdemix").get_all("Provides-Extra"))


CONTRACT = {
    "audio": "read write resample probe to_mono STFT",
    "data": "Store prepare prepare_musdb prepare_stems prepare_toy toy_song",
    "augmentation": "Mixer",
    "metrics": "framewise_sdr si_sdr",
    "training": "fit",
    "baseline": "Baseline",
    "pretraining": "DeepDeMixEncoder",
    "deepdemix": "DeepDeMix",
    "evaluation": "evaluate",
    "separation": "Separator",
    "experiment": "run_experiment",
    "listening": "listen",
    "cli": "main",
}


@pytest.mark.parametrize("room", CONTRACT)
def test_the_story_offers_what_scripts_import(room):
    "Names that moved to a foundation can still be imported from the room that tells of them."
    for name in CONTRACT[room].split(): assert callable(getattr(import_module(f"deepdemix.{room}"), name))
