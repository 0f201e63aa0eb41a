"""Stores of pseudo-stems: from songs in any format, by any teacher, resumable; trained on beside true stems,
and counted."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepdemix.audio import SOURCES
from deepdemix.cli import main
from deepdemix.data import prepare_toy
from deepdemix.foundations.encoding import write
from deepdemix.foundations.files import UserError
from deepdemix.foundations.model_names import WEIGHTS
from deepdemix.foundations.runs import file_digest
from deepdemix.foundations.store import Store
from deepdemix.foundations.toy_band import toy_song
from deepdemix.separation import Separator
from deepdemix.serving.labelling import Teacher, label_songs

pytestmark = pytest.mark.filterwarnings("ignore::deepdemix.foundations.store_preparing.DataNote")


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    "Two songs in two formats, one of them in a folder of its artist; a text, and a file that is no music."
    folder = tmp_path_factory.mktemp("songs")
    write(folder / "one.mp3", toy_song(40, 3.).sum(0), 44100)
    write(folder / "Band/two.flac", toy_song(41, 2., 48000).sum(0), 48000)
    (folder / "bad.wav").write_bytes(b"no music at all")
    (folder / "notes.txt").write_text("a text")
    return folder


@pytest.fixture(scope="module")
def labelled(songs, tmp_path_factory):
    "The store that the default has made of them, by the command."
    out = tmp_path_factory.mktemp("labelled") / "store"
    assert main(["label", str(songs), "--out", str(out), "--device", "cpu", "--threads", "1"]) == 1
    return out


def files(out): return {p.name: p.stat().st_mtime_ns for p in (Path(out) / "songs").iterdir()}


def test_the_store_has_the_teachers_stems_and_says_so(songs, labelled):
    store, teacher = Store.open(labelled), Separator.from_pretrained("default", device="cpu")
    assert [(s.title, s.split, s.teacher) for s in store.songs] == [
        ("Band - two", "train", "default"), ("one", "train", "default"),
    ]
    inside = teacher.separate(songs / "one.mp3")
    for k, name in enumerate(SOURCES):
        if name in store.songs[1].present: assert torch.allclose(store.stems(1)[k], inside[name], atol=1e-5)
        else: assert not store.stems(1)[k].any()
    index = json.loads((labelled / "store.json").read_text())
    assert index["teacher"]["name"] == "default" and index["teacher"]["digest"] == file_digest(
        WEIGHTS / "default/model.safetensors"
    )
    assert index["teacher"]["seconds"] == pytest.approx(store.duration, abs=.001) == pytest.approx(5, abs=.1)
    assert store.minutes == dict(true=0., pseudo=pytest.approx(5 / 60, abs=.002), teachers=["default"])
    assert store.songs[0].sample_rate == 44100 and "drums resampled from 48000 Hz" in store.songs[0].flags


def test_bad_songs_cost_only_themselves(songs, labelled, tmp_path, capsys):
    index = json.loads((labelled / "store.json").read_text())
    assert [x["title"] for x in index["skipped"]] == ["bad"] and "bad.wav" in index["skipped"][0]["problem"]
    assert not any(p.name.startswith((".", "bad")) for p in (labelled / "songs").iterdir())
    assert main(["label", str(songs / "bad.wav"), "--out", str(tmp_path / "none")]) == 2
    assert "bad.wav" in capsys.readouterr().err and not (tmp_path / "none/store.json").exists()
    write(tmp_path / "silence.wav", torch.zeros(2, 44100), 44100)
    assert (
        main(
            ["label", str(tmp_path / "silence.wav"), str(songs / "one.mp3"), "--out", str(tmp_path / "some")]
        )
        == 1
    )
    assert [s.title for s in Store.open(tmp_path / "some").songs] == ["one"]


def test_it_goes_on_where_it_stopped(songs, tmp_path, monkeypatch):
    teacher, asked = Teacher("default", "cpu", 1), []
    label = Teacher.label
    def stops(self, path, folder):
        asked.append(Path(path).name)
        if len(asked) == 2: raise KeyboardInterrupt
        return label(self, path, folder)
    monkeypatch.setattr(Teacher, "label", stops)
    both = [songs / "one.mp3", songs / "Band/two.flac"]
    with pytest.raises(KeyboardInterrupt): label_songs(both, tmp_path / "store", teacher, progress=False)
    assert not (tmp_path / "store/store.json").exists() and asked == ["one.mp3", "two.flac"]
    kept = files(tmp_path / "store")
    assert sorted(Path(x).suffix for x in kept) == [".json", ".npy"]
    store = label_songs(both, tmp_path / "store", teacher, progress=False)
    assert asked[2:] == ["two.flac"] and len(store) == 2 and kept.items() <= files(tmp_path / "store").items()
    assert (label_songs(both, tmp_path / "store", teacher, progress=False).digest == store.digest
            and len(asked) == 3)
    teacher.digest = "another"
    label_songs(both, tmp_path / "store", teacher, progress=False)
    assert asked[3:] == ["one.mp3", "two.flac"]


def test_a_run_that_is_killed_leaves_no_half_song(songs, tmp_path):
    code = f"""
import os, signal
from deepdemix.foundations import store_songs
from deepdemix.serving.labelling import label_songs
add = store_songs._Array.add
def killed(self, x): add(self, x); self.file.flush(); os.kill(os.getpid(), signal.SIGKILL)
store_songs._Array.add = killed
label_songs({str(songs / "one.mp3")!r}, {str(tmp_path / "store")!r}, progress=False)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert all(p.name.startswith(".") for p in (tmp_path / "store/songs").iterdir())
    assert (
        len(label_songs(songs / "one.mp3", tmp_path / "store", Teacher("default", "cpu", 1), progress=False))
        == 1
    )
    assert not any(p.name.startswith(".") for p in (tmp_path / "store/songs").iterdir())


def test_what_a_teacher_gives_faintly_is_not_there(songs, tmp_path):
    store = label_songs(
        songs / "one.mp3", tmp_path / "store", Teacher("default", "cpu", 1), gate=-6, progress=False
    )
    song = store.songs[0]
    assert 0 < len(song.present) < 4
    for k, name in enumerate(SOURCES):
        assert (bool(store.stems(0)[k].any()) == (name in song.present)
                == (f"{name} below the gate" not in song.flags))
    with pytest.raises(UserError, match="no stem passes the gate of -0.0001 dB"):
        label_songs(songs / "Band/two.flac", tmp_path / "none", Teacher("default", "cpu", 1), gate=-0.0001,
                    progress=False)


def test_songs_of_one_name_keep_apart(tmp_path):
    for name in ("a.wav", "a.flac", "x/a.wav"): write(tmp_path / "in" / name, toy_song(3, 1.).sum(0), 44100)
    store = label_songs(tmp_path / "in", tmp_path / "store", Teacher("default", "cpu", 1), progress=False)
    assert [s.title for s in store.songs] == ["a (flac)", "a (wav)", "x - a"]


def test_a_torchscript_teacher(songs, tmp_path, capsys):
    class Halves(torch.nn.Module):
        def forward(self, x): return torch.stack([x / 4, x / 4, x / 4, x / 4], 1)
    torch.jit.script(Halves()).save(str(tmp_path / "net.pt"))
    (tmp_path / "net.json").write_text(
        json.dumps(
            dict(sources=list(SOURCES), sample_rate=44100, channels=2, licence="mine", trained_on="two songs")
        )
    )
    assert (
        main(["label", str(songs / "one.mp3"), "--model", str(tmp_path / "net.pt"), "--out",
              str(tmp_path / "store"), "--dtype", "int16"])
        == 0
    )
    assert "licence: mine; trained on: two songs" in capsys.readouterr().err
    store = Store.open(tmp_path / "store")
    assert (store.index["teacher"]["digest"] == file_digest(tmp_path / "net.pt")
            and store.songs[0].dtype == "int16")
    assert store.index["teacher"]["notes"] == ["net.pt: licence: mine; trained on: two songs"]


def test_true_and_pseudo_stems_train_together_and_are_counted(labelled, tmp_path, capsys):
    prepare_toy(8, tmp_path / "toy", duration=3., progress=False)
    small = [
        "epochs=1", "examples_per_epoch=4", "batch_size=2", "valid_examples=2", "mixer.duration=1.0",
        "network_args.hidden=8", "network_args.layers=1",
    ]
    settings = [x for s in small for x in ("--set", s)]
    both = ["--data", f"{tmp_path / 'toy'}=3", "--data", f"{labelled}=1"]
    words = ["train", "--model", "recurrent", "--profile", "demo", "--device", "cpu", "--out",
             str(tmp_path / "run"), *settings]
    assert main([*words, *both]) == 0
    said = capsys.readouterr().err.splitlines()[0]
    assert said == "deepdemix: training on 0.2 minutes of true stems, 0.1 of pseudo-stems (default)"
    record = json.loads((tmp_path / "run/recipe.json").read_text())["data"]
    assert record["minutes"] == dict(true=pytest.approx(5 * 3 / 60, abs=0.01),
                                     pseudo=pytest.approx(5 / 60, abs=0.002), teachers=["default"])
    assert [(x["weight"], x["minutes"]["teachers"]) for x in record["stores"]] == [
        (3.0, []), (1.0, ["default"]),
    ]
    assert main([*words, "--resume", *both]) == 0
    assert (main([*words, "--resume", "--data", str(tmp_path / "toy")]) == 2
            and "other data" in capsys.readouterr().err)
    assert (
        main(["evaluate", "--model", str(tmp_path / "run"), "--data", str(tmp_path / "toy"), "--out",
              str(tmp_path / "scores.json")])
        == 0
    )
    assert ("run was trained on 0.2 minutes of true stems, 0.1 of pseudo-stems (default)."
            in capsys.readouterr().out)
    assert (
        main(
            [*words[: -len(settings) - 1], str(tmp_path / "true"), *settings, "--data", str(tmp_path / "toy")]
        )
        == 0
    )
    assert "training on 0.2 minutes of true stems\n" in capsys.readouterr().err


def test_pseudo_stems_as_references_are_named(labelled, tmp_path, capsys):
    assert (
        main(["evaluate", "--model", "default", "--data", str(labelled), "--split", "train", "--out",
              str(tmp_path / "scores.json")])
        == 0
    )
    assert "The references are pseudo-stems of default" in capsys.readouterr().out
