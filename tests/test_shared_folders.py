"Folders that several processes, several machines and several people write to."
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_data import make_song, prepared
from test_separation import RATE, Shares, noise

from deepdemix.foundations.encoding import write
from deepdemix.foundations.files import hidden_name
from deepdemix.foundations.stem_folders import sweep
from deepdemix.foundations.store import Store
from deepdemix.separation import Separator

HOLD = """
import fcntl, sys
from pathlib import Path
fcntl.flock = lambda *_: None
from deepdemix.foundations.stem_folders import hidden_folder
with hidden_folder(Path(sys.argv[1])) as hidden:
    (hidden / "drums.wav").touch()
    print(hidden.name, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def no_locks(monkeypatch):
    "A disk on which a lock holds for nobody else, as on many that machines share."
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


@pytest.fixture
def other(tmp_path):
    "Another process that is separating a song into `out`: the process and its hidden folder."
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    yield process, tmp_path / "out" / process.stdout.readline().strip()
    process.communicate("\n")


def test_a_song_in_progress_survives_the_sweep_of_another_process_without_locks(no_locks, other):
    process, hidden = other
    sweep(hidden.parent, age=0)
    assert (hidden / "drums.wav").exists()
    process.kill()
    process.wait()
    assert hidden.exists()
    sweep(hidden.parent, age=60)
    assert hidden.exists()
    sweep(hidden.parent, age=0)
    assert not hidden.exists()


def test_a_song_in_progress_survives_the_sweep_of_another_machine_without_locks(no_locks, other, monkeypatch):
    process, hidden = other
    process.kill()
    process.wait()
    monkeypatch.setattr("socket.gethostname", lambda: "another-machine")
    os.utime(hidden, (0, 0))
    sweep(hidden.parent)
    Separator(Shares()).separate_file(song(hidden.parent.parent), hidden.parent)
    assert (hidden / "drums.wav").exists()


def song(folder):
    write(folder / "song.wav", noise(2, RATE), RATE)
    return folder / "song.wav"


@pytest.mark.parametrize("mask", [0o077, 0o002, 0o022])
def test_folders_and_files_get_the_permissions_that_the_user_gives(tmp_path, mask):
    (tmp_path / "in").mkdir()
    before = os.umask(mask)
    try:
        made = Separator(Shares()).separate_file(song(tmp_path), tmp_path / "out")
        make_song(tmp_path / "in" / "a")
        store = prepared(tmp_path / "in", tmp_path / "store")
    finally: os.umask(before)
    for folder in (Path(made["folder"]), tmp_path / "out", store.path, store.path / "songs"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask, folder
    for file in (*Path(made["folder"]).iterdir(), store.path / "store.json",
                 *(store.path / "songs").iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file


# ---- a store that two prepare at once, where locks hold for nobody

def parts(folder): return {p.name for p in folder.glob("songs/.*")}


def test_preparing_a_store_leaves_what_others_are_writing(tmp_path, no_locks):
    for k in range(2): make_song(tmp_path / "in" / f"s{k}", seed=k)
    (tmp_path / "out" / "songs").mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = hidden_name(suffix=".part.npy")
    dead = mine.replace(f"-{os.getpid()}-", f"-{ended.pid}-")
    theirs = ".elsewhere-123456-1-0123456789ab.part.npy"
    for name in (mine, dead, theirs): (tmp_path / "out" / "songs" / name).touch()
    assert prepared(tmp_path / "in", tmp_path / "out").verify() == []
    assert parts(tmp_path / "out") == {mine, theirs}


PREPARE = """
import fcntl, sys
fcntl.flock = lambda *_: None
from deepdemix.data import prepare_toy
print(prepare_toy(5, sys.argv[1], duration=1., workers=1, progress=False).digest)
"""


def test_two_processes_without_locks_make_one_whole_store(tmp_path):
    both = [
        subprocess.Popen([sys.executable, "-c", PREPARE, str(tmp_path / "store")], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [p.communicate(timeout=180) for p in both]
    store = Store.open(tmp_path / "store")
    assert {out for out, _ in said} == {store.digest + "\n"}, said
    assert store.verify() == [] and not parts(tmp_path / "store")
