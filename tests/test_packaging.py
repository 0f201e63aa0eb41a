"The archives that are published, and what a new version changes."
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUMP = str(ROOT / "nbs/_site/bump.py")


@pytest.fixture
def project(tmp_path):
    "What the archives are made of, and a room in a folder of its own."
    folder = tmp_path / "project"
    folder.mkdir()
    for path in (p for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".")):
        shutil.copy(path, folder)
    for name in ("deepdemix", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "deepdemix/wing").mkdir()
    for name in ("__init__.py", "room.py"): (folder / "deepdemix/wing" / name).touch()
    return folder


def test_archives(project):
    """The source archive holds what a wheel is built of, the wheel holds rooms and weights, and no tool
    complains."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    made = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", project], env=env, capture_output=True, text=True
    )
    told = made.stdout + made.stderr
    assert made.returncode == 0, told[-2000:]
    assert not [
        line for line in told.splitlines() if "warning" in line.lower() or "deprecat" in line.lower()
    ], told
    archive, wheel = next((project / "dist").glob("*.tar.gz")), next((project / "dist").glob("*.whl"))
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    assert {
        "settings.ini", "setup.py", "LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "CITATION.cff",
    } <= names
    assert not [name for name in names if name.startswith("tests/")]
    package = {p.relative_to(project).as_posix() for p in (project / "deepdemix").rglob("*") if p.is_file()}
    assert "deepdemix/wing/room.py" in package and "deepdemix/weights/default/model.safetensors" in package
    assert package <= names and package <= set(zipfile.ZipFile(wheel).namelist())
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", archive, wheel], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_the_wheel_separates_a_song(fresh, tmp_path):
    "In an environment that holds nothing but the package, away from the repository."
    from deepdemix.audio import SOURCES
    from deepdemix.foundations.codecs import read
    from deepdemix.foundations.encoding import write
    from deepdemix.foundations.toy_band import toy_song
    write(tmp_path / "song.wav", toy_song(0, duration=3.).sum(0), 44100)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MUSDB_PATH", "VIRTUAL_ENV")} | {
        "HOME": str(tmp_path)
    }
    done = subprocess.run([fresh.parent / "deepdemix", "separate", "song.wav", "--out", "stems"],
                          cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in SOURCES: assert read(tmp_path / f"stems/song/{name}.wav")[0].shape == (2, 3 * 44100)


@pytest.mark.parametrize("part,version", [("patch", "1.4.3"), ("minor", "1.5.0"), ("major", "2.0.0")])
def test_a_new_version_changes_nothing_else(tmp_path, part, version):
    bump, lines = runpy.run_path(BUMP)["bump"], {}
    for name, line in (("settings.ini", "version = "), ("CITATION.cff", "version: ")):
        text = (ROOT / name).read_text(encoding="utf-8").splitlines()
        lines[name] = [line + "1.4.2" if row.startswith(line) else row for row in text]
        (tmp_path / name).write_text("\n".join(lines[name]) + "\n", encoding="utf-8")
    assert any(row.startswith("#") for row in lines["settings.ini"]), "no comments to lose"
    assert bump(tmp_path, part) == version
    for name, before in lines.items():
        after = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert len(after) == len(before) and [(a, b) for a, b in zip(before, after) if a != b] == [
            (a, a.replace("1.4.2", version)) for a in before if a.startswith("version")
        ]


def test_versions_that_differ_are_not_guessed(tmp_path):
    bump = runpy.run_path(BUMP)["bump"]
    (tmp_path / "settings.ini").write_text("version = 1.0.0\n")
    (tmp_path / "CITATION.cff").write_text("version: 1.0.1\n")
    with pytest.raises(ValueError, match="different versions"): bump(tmp_path, "patch")
    assert (tmp_path / "settings.ini").read_text() == "version = 1.0.0\n"


def test_the_package_names_its_version():
    "Settings, citation and package name one version."
    from configparser import ConfigParser

    import yaml

    import deepdemix
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert (settings["DEFAULT"]["version"] == deepdemix.__version__
            == yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"])
