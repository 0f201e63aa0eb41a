"""The rooms stand in order: no circle, no room that leans on one behind it, and none that grows without
notice."""
import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deepdemix"
STORY = """foundations networks.protocol networks.layers data augmentation metrics tasks training baseline
    contrast pretraining deepdemix networks foundations.model_names
    scoring evaluation scoring.pictures separation experiment studies serving listening cli""".split()
# foundations that audio stands on
BELOW_AUDIO = "files console waveforms encoding containers decoding codecs".split()
LIMIT = 500 # lines a module
# rooms that outgrew it when their lines were broken, and wait to be split
LONG = {}


def name_of(path): return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


ROOMS = {name_of(p): p for p in sorted(PACKAGE.rglob("*.py"))
         if p.name not in ("_modidx.py", "__init__.py", "__main__.py")}


def leans_on(room):
    "Rooms that a room imports from, anywhere in its code."
    for node in ast.walk(ast.parse(ROOMS[room].read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level: continue
        base = room.split(".")[:-node.level] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            found = [x for x in (".".join(base + [alias.name]), ".".join(base)) if x in ROOMS]
            if found: yield found[0]


def place(room):
    "Where a room stands in the story: by its own name, or by its wing's."
    known = room if room in STORY else room.split(".")[0]
    return STORY.index(known) if known in STORY else None


@pytest.mark.parametrize("room", [r for r in ROOMS if place(r) is not None])
def test_a_room_leans_on_none_behind_it(room):
    behind = {other for other in leans_on(room) if place(other) is not None and place(other) > place(room)}
    assert not behind, f"{room} imports from {sorted(behind)}"


def test_audio_stands_on_few_foundations():
    assert {x.split(".")[1] for x in leans_on("audio") if x.startswith("foundations.")} <= set(BELOW_AUDIO)
    for room in BELOW_AUDIO: assert "audio" not in leans_on(f"foundations.{room}") or room == "console"


def test_every_room_has_its_place():
    assert {r for r in ROOMS if place(r) is None} <= {"audio", "pages"}


def test_no_circle():
    done, open_ = set(), []
    def visit(room):
        assert room not in open_, " -> ".join(open_[open_.index(room):] + [room])
        if room in done: return
        open_.append(room)
        for other in set(leans_on(room)): visit(other)
        open_.pop()
        done.add(room)
    for room in ROOMS: visit(room)


@pytest.mark.parametrize("room", ROOMS)
def test_size(room):
    lines = len(ROOMS[room].read_text(encoding="utf-8").splitlines())
    assert lines <= LONG.get(room, LIMIT), f"{room} has {lines} lines"


# they import what other people wrote
BY_NAME = {"foundations.outside", "networks.peers"}


@pytest.mark.parametrize("room", [r for r in ROOMS if r not in BY_NAME])
def test_no_room_is_imported_by_its_name(room):
    tree = ast.parse(ROOMS[room].read_text(encoding="utf-8"))
    called = {
        getattr(n.func, "attr", getattr(n.func, "id", "")) for n in ast.walk(tree) if isinstance(n, ast.Call)
    }
    assert not called & {"import_module", "__import__"}


def test_importing_the_networks_leaves_the_profiles_as_they_are():
    code = (
        "import json; from deepdemix.foundations import profiles, registry; before ="
        " json.dumps(profiles.PROFILES); registry.known_networks(); assert json.dumps(profiles.PROFILES) =="
        " before"
    )
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def patches(room):
    "(class, method) of every method that a room adds to a class which it does not define."
    body = ast.parse(ROOMS[room].read_text(encoding="utf-8")).body
    own = {n.name for n in body if isinstance(n, ast.ClassDef)}
    for n in body:
        if not isinstance(n, ast.FunctionDef) or not any("patch" in ast.unparse(d) for d in n.decorator_list):
            continue
        kind = n.args.args[0].annotation
        for name in ([kind] if isinstance(kind, ast.Name) else getattr(kind, "elts", [])):
            if name.id not in own: yield name.id, n.name


@pytest.mark.parametrize("room", ROOMS)
def test_a_class_grows_in_its_own_room(room): assert not list(patches(room))


def unannotated(room):
    "Parameters and results of a room's public functions and methods whose type nobody says."
    public = lambda name: not name.startswith("_") or name.startswith("__")
    for top in ast.parse(ROOMS[room].read_text(encoding="utf-8")).body:
        if not isinstance(top, (ast.FunctionDef, ast.ClassDef)) or not public(top.name): continue
        for f in (top.body if isinstance(top, ast.ClassDef) else [top]):
            if not isinstance(f, ast.FunctionDef) or not public(f.name): continue
            given = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
            bare = [a.arg for a in given if not a.annotation and a.arg not in ("self", "cls")]
            yield from (f"{f.name}({name})" for name in bare)
            if f.returns is None and f.name != "__init__": yield f"{f.name} ->"


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_say_their_types(room): assert list(unannotated(room)) == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_function_says_a_type_in_quotes(room):
    "nbdev looks such a type up while it writes a page, where a class further down is unknown, and stops."
    tree = ast.parse(ROOMS[room].read_text(encoding="utf-8"))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    types = [(f.name, t) for f in functions for t in (f.returns, *(a.annotation for a in ast.walk(f.args)
                                                                    if isinstance(a, ast.arg)))]
    assert [name for name, t in types if isinstance(t, ast.Constant) and isinstance(t.value, str)] == []


QUESTIONS = {"What", "Whether", "How", "Why", "Where", "Which", "When"}

@pytest.mark.parametrize("room", ROOMS)
def test_public_docstrings_begin_with_a_verb_or_a_noun(room):
    asked = [node.name for node in ast.walk(ast.parse(ROOMS[room].read_text(encoding="utf-8")))
             if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
             and (ast.get_docstring(node) or " - ").split()[0] in QUESTIONS]
    assert asked == []


def public_names(room):
    "The functions and classes at the top of a room that others may import; methods do not count."
    for node in ast.parse(ROOMS[room].read_text(encoding="utf-8")).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
        if not any("patch" in ast.unparse(d) for d in node.decorator_list): yield node.name


def test_one_name_means_one_thing():
    found = {}
    for room in ROOMS:
        for name in public_names(room): found.setdefault(name, []).append(room)
    twice = {name: rooms for name, rooms in found.items() if len(rooms) > 1}
    # two commands: deepdemix, and python -m deepdemix.studies.planned
    assert set(twice) == {"main", "make_parser"}, twice


@pytest.mark.parametrize("room", ROOMS)
def test_private_names_stay_in_their_room(room):
    tree = ast.parse(ROOMS[room].read_text(encoding="utf-8"))
    ours = [n for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and (n.level or "deepdemix" in n.module)]
    taken = [a.name for n in ours for a in n.names if a.name.startswith("_") and not a.name.startswith("__")]
    assert taken == []


def test_what_tests_replace_is_there():
    "A slow test that puts something in place of a name would learn late that the name is another now."
    tests = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    found = {name for text in tests for name in re.findall(r'setattr\(\s*"(deepdemix\.[\w.]+)"', text)}
    assert found
    for name in sorted(found): pkgutil.resolve_name(name)
