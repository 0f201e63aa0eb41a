"The data room where a notebook cell is the wrong place: faults, processes, giant stores, real songs."
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from deepdemix.audio import SOURCES
from deepdemix.data import (
    assign_splits,
    download_musdb7,
    find_musdb,
    is_musdb,
    open_data,
    prepare_musdb,
    prepare_stems,
    prepare_toy,
    validation_titles,
)
from deepdemix.foundations.encoding import write
from deepdemix.foundations.files import UserError
from deepdemix.foundations.store import STORE_FORMAT, Store
from deepdemix.foundations.store_preparing import DataNote, prepare
from deepdemix.foundations.store_songs import TrackSource
from deepdemix.foundations.toy_band import compose, toy_song

RATE = 8000
quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_song(
    folder, seconds=0.5, rate=RATE, channels=2, names=SOURCES, suffix=".wav", seed=0, subtype="float32", **odd
):
    "A folder of noise stems; `odd` replaces single stems."
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    stems = {n: torch.from_numpy(rng.uniform(-0.2, 0.2, (channels, int(seconds * rate))).astype(np.float32))
             for n in names}
    stems.update(odd)
    for name, x in stems.items():
        if suffix == ".wav":
            soundfile.write(
                folder / f"{name}.wav", x.T.numpy(), rate, subtype={"float32": "FLOAT"}.get(subtype, subtype)
            )
        else: write(folder / f"{name}{suffix}", x, rate)
    return stems


def prepared(folder, out, **kw): return prepare_stems(folder, out, sample_rate=RATE, progress=False, **kw)


def interruptible():
    "A process that was started in the background ignores SIGINT, and so do its children: undo that."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def script(code, *args, **kw):
    "Start Python on some lines that have the data room at hand."
    lines = ("import sys, torch\ntorch.set_num_threads(1)\nfrom deepdemix.data import *\nfrom"
             " deepdemix.foundations.store import *\nfrom deepdemix.foundations.toy_band import *\nfrom"
             " deepdemix.foundations.files import UserError\n" + code)
    return subprocess.Popen([sys.executable, "-c", lines, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, preexec_fn=interruptible, **kw)


# ---- what is stored is what was decoded

def test_stems_are_kept_to_the_last_bit(tmp_path):
    truth = make_song(tmp_path / "in" / "a")
    store = prepared(tmp_path / "in", tmp_path / "out")
    assert torch.equal(store.stems(0), torch.stack([truth[s] for s in SOURCES]))
    assert torch.equal(store.mixture(0), store.stems(0).sum(0))
    assert store.verify() == [] and store.songs[0].flags == () and store.songs[0].mixture == "sum"


@quick
@given(start=st.integers(0, 4000), frames=st.integers(0, 4000))
def test_any_excerpt_is_a_cut_of_the_whole(store, start, frames):
    if start + frames > 4000:
        with pytest.raises(ValueError, match="it has 4000"): store.stems(0, start, frames)
    else: assert torch.equal(store.stems(0, start, frames), store.stems(0)[..., start:start + frames])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    for k in range(6): make_song(root / "in" / f"song {k}", seed=k)
    return prepared(root / "in", root / "out")


def test_excerpts_are_copies(store):
    x = store.stems(0)
    x.zero_()
    assert store.stems(0).abs().max() > 0


def test_16_bit_sources_lose_nothing_at_half_the_size(tmp_path):
    make_song(tmp_path / "in" / "a", subtype="PCM_16")
    make_song(tmp_path / "in" / "b", seed=1)
    exact = prepared(tmp_path / "in", tmp_path / "exact")
    small = prepared(tmp_path / "in", tmp_path / "auto", dtype="auto")
    assert [s.dtype for s in small.songs] == ["int16", "float32"]
    for k in range(2): assert torch.equal(exact.stems(k), small.stems(k))
    size = lambda store, k: (store.path / "songs" / f"{store.songs[k].file}.npy").stat().st_size
    assert size(small, 0) < .52 * size(exact, 0)


def test_int16_does_not_clip_what_is_loud(tmp_path):
    loud = make_song(tmp_path / "in" / "a", drums=torch.linspace(-3, 3, 4000).repeat(2, 1))["drums"]
    store = prepared(tmp_path / "in", tmp_path / "out", dtype="int16")
    assert (store.stems(0)[0] - loud).abs().max() <= 3 / 2**16 + 1e-6
    assert store.verify() == []


def test_every_rate_and_format_meets_in_one_store(tmp_path):
    for suffix, rate, channels in ((".flac", 44100, 1), (".mp3", 48000, 2), (".ogg", 22050, 2)):
        t = torch.arange(rate) / rate
        tone = (.5 * torch.sin(2 * torch.pi * 440 * t)).repeat(channels, 1)
        make_song(tmp_path / "in" / suffix[1:], 1., rate, channels, suffix=suffix, vocals=tone)
    store = prepared(tmp_path / "in", tmp_path / "out")
    for k, song in enumerate(store.songs):
        spectrum = torch.fft.rfft(store.stems(k)[3, 0, :RATE]).abs()
        assert spectrum.argmax() * RATE / min(song.frames, RATE) == pytest.approx(440, abs=2)
        assert song.frames == pytest.approx(RATE, rel=.06) and any("resampled" in f for f in song.flags)
    assert [s.channels for s in store.songs] == [1, 2, 2]


def test_a_mono_stem_joins_stereo_ones_and_mono_can_be_asked_for(tmp_path):
    mono = torch.rand(1, 4000) - .5
    truth = make_song(tmp_path / "in" / "a", bass=mono)
    store = prepared(tmp_path / "in", tmp_path / "stereo")
    assert torch.equal(store.stems(0)[1], mono.repeat(2, 1)) and store.songs[0].flags == ("bass is mono",)
    one = prepared(tmp_path / "in", tmp_path / "mono", channels=1)
    assert torch.allclose(one.stems(0)[0], truth["drums"].mean(0, keepdim=True), atol=1e-7)


def test_a_mixture_that_is_not_the_sum_is_flagged_by_rule(tmp_path):
    for name, factor in (("true", 1.), ("close", .9), ("wrong", .5)):
        truth = make_song(tmp_path / "in" / name)
        write(tmp_path / "in" / name / "mixture.wav", factor * sum(truth.values()), RATE, subtype="float32")
    store = prepared(tmp_path / "in", tmp_path / "out")
    assert {s.title: s.flags for s in store.songs} == {"true": (), "close": (), "wrong": ("mixture differs",)}
    snr = {s.title: s.mixture_snr for s in store.songs}
    assert snr["close"] == pytest.approx(20 * np.log10(9), abs=0.01) and snr["wrong"] == pytest.approx(
        0, abs=0.01
    )
    wrong = [s.title for s in store.songs].index("wrong")
    assert torch.allclose(store.mixture(wrong, kind="stream"), .5 * store.mixture(wrong), atol=1e-6)
    assert store.verify() == []


def handed_over(title, stems):
    "A song whose stems are arrays that somebody hands over."
    class Given(TrackSource):
        def reader(self): return {n: len(x) for n, x in stems.items()}, lambda name: (stems[name], RATE)
        def fingerprint(self): return ["given"]
    return Given(title, "train", dict.fromkeys(stems))


def test_stems_from_a_program_may_be_any_arrays_of_floats_and_nothing_else(tmp_path):
    x = np.random.default_rng(0).uniform(-.2, .2, (2, 4000)).astype(np.float32)
    odd = dict(drums=x[:, ::-1], bass=x.astype(">f8"),
               other=np.frombuffer(x.tobytes(), np.float32).reshape(2, -1), vocals=x.tolist())
    for rate in (RATE, 2 * RATE):
        store = prepare([handed_over("a", odd)], tmp_path / f"out {rate}", sample_rate=rate, progress=False)
        assert store.songs[0].frames == 4000 * rate // RATE and torch.equal(
            store.stems(0)[1], store.stems(0)[3]
        )
        with pytest.raises(UserError, match="b: bass: a stem holds floats in .* not int16"):
            prepare([handed_over("b", dict(odd, bass=(x * 2**15).astype(np.int16)))],
                    tmp_path / f"ints {rate}", sample_rate=rate, progress=False)
    assert torch.equal(
        Store.open(tmp_path / f"out {RATE}").stems(0), torch.from_numpy(np.stack([x[:, ::-1], x, x, x]))
    )


# ---- splits and views

@quick
@given(n=st.integers(3, 60), seed=st.integers(0, 99))
def test_splits_are_a_partition_and_do_not_depend_on_order(n, seed):
    titles = [f"s{k}" for k in range(n)]
    drawn = assign_splits(titles, seed=seed)
    assert set(drawn) == set(titles) and set(drawn.values()) == {"train", "valid", "test"}
    assert drawn == assign_splits(titles[::-1], seed=seed)


def test_split_folders_are_obeyed_and_a_missing_valid_is_drawn_from_train(tmp_path):
    for k in range(5): make_song(tmp_path / "in" / "train" / f"t{k}", .1)
    make_song(tmp_path / "in" / "test" / "e", .1)
    store = prepared(tmp_path / "in", tmp_path / "out")
    assert store.splits == {"train": 4, "valid": 1, "test": 1} and store.split("test").songs[0].title == "e"
    make_song(tmp_path / "in" / "dev" / "v", .1)
    assert prepared(tmp_path / "in", tmp_path / "out").splits == {"train": 5, "valid": 1, "test": 1}


def test_views(store):
    train = store.split("train")
    assert len(train) + len(store.split("valid")) + len(store.split("test")) == len(store)
    two = store.select(["song 3", 0])
    assert [s.title for s in two.songs] == ["song 3", store.songs[0].title] and two.maps is store.maps
    assert torch.equal(two.stems(0), store.stems([s.title for s in store.songs].index("song 3")))
    assert store.select(range(len(store) - 1, -1, -1)).digest == store.digest != train.digest
    with pytest.raises(UserError, match="no song called 'nobody'"): store.select(["nobody"])
    with pytest.raises(UserError, match="it has 4 train, 1 valid, 1 test"): store.split("dev")


class Excerpts(torch.utils.data.Dataset):
    def __init__(self, store): self.store = store
    def __len__(self): return 4 * len(self.store)
    def __getitem__(self, k): return self.store.stems(k % len(self.store), 10 * k, 500)


def test_workers_get_views_without_the_audio(store):
    assert len(pickle.dumps(store)) < 20_000
    store.stems(0)
    assert not pickle.loads(pickle.dumps(store)).maps.open
    dataset = Excerpts(store)
    for workers in (1, 2):
        batches = list(torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=workers))
        assert torch.equal(torch.cat(batches), torch.stack([dataset[k] for k in range(len(dataset))]))


def test_threads_share_a_store_whose_maps_come_and_go(store):
    tight = Store.open(store.path, mapped=1)
    truth, wrong = [store.stems(k) for k in range(len(store))], []
    def walk(seed):
        for k in np.random.default_rng(seed).integers(len(store), size=60):
            if not torch.equal(tight.stems(int(k)), truth[k]): wrong.append(k)
    threads = [threading.Thread(target=walk, args=(s,)) for s in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong and len(tight.maps.open) == 1


def sparse_store(path, songs, frames):
    "A store whose arrays have holes instead of samples: any size, no disk."
    (path / "songs").mkdir(parents=True)
    entries = []
    for k in range(songs):
        entry = dict(title=f"s{k}", split="train", frames=frames, channels=2, sample_rate=44100,
                     present=SOURCES, flags=[], mixture="sum", mixture_snr=None, rms=[0] * 4, peak=0,
                     digest="", mixture_digest=None, dtype="float32", scales=[1] * 5, file=f"s{k}")
        with open(path / "songs" / f"s{k}.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(
                f, dict(descr="<f4", fortran_order=False, shape=(4, 2, frames))
            )
            f.truncate(f.tell() + 32 * frames)
        entries.append(entry)
    (path / "store.json").write_text(
        json.dumps(
            dict(
                format=STORE_FORMAT, sample_rate=44100, sources=SOURCES, digest="", skipped=[], songs=entries
            )
        )
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_stays_flat_on_a_store_of_30_gb(tmp_path):
    sparse_store(tmp_path / "giant", 1000, 44100 * 22)
    assert sum(f.stat().st_size for f in (tmp_path / "giant" / "songs").iterdir()) > 29e9
    code = """
import random
store = Store.open(sys.argv[1], mapped=2**27)
used = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1]) / 1024
before, rng = used(), random.Random(0)
for _ in range(100): store.stems(rng.randrange(1000), rng.randrange(15 * 44100), 5 * 44100)
print(before, used())
"""
    out, err = script(code, tmp_path / "giant").communicate(timeout=180)
    before, after = map(float, out.split())
    assert after - before < 128 + 64, err


# ---- resuming

def test_finished_songs_are_not_decoded_again(tmp_path):
    for k in range(3): make_song(tmp_path / "in" / f"s{k}", seed=k)
    store = prepared(tmp_path / "in", tmp_path / "out")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "songs").iterdir()}
    make_song(tmp_path / "in" / "s1", seed=9)
    again = prepared(tmp_path / "in", tmp_path / "out")
    changed = {p.name.split(".")[0] for p in (tmp_path / "out" / "songs").iterdir()
               if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {s.file for s in again.songs if s.title == "s1"}
    assert again.digest != store.digest and again.verify() == []


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path, sig):
    out = tmp_path / "store"
    process = script("prepare_toy(12, sys.argv[1], duration=3., workers=1, progress=False)", out)
    while len(list(out.glob("songs/*.json"))) < 2 and process.poll() is None: time.sleep(.02)
    process.send_signal(sig)
    process.communicate(timeout=180)
    done = {p: p.stat().st_mtime_ns for p in out.glob("songs/*.json")}
    assert 2 <= len(done) < 12 and not (out / "store.json").exists()
    with pytest.raises(UserError, match="no store here"): Store.open(out)
    store = prepare_toy(12, out, duration=3., progress=False)
    assert (
        len(store) == 12 and store.verify() == [] and all(p.stat().st_mtime_ns == t for p, t in done.items())
    )
    assert not list(out.glob("songs/.*"))


def test_two_processes_that_prepare_the_same_folder_do_not_disturb_each_other(tmp_path):
    code = "print(prepare_toy(4, sys.argv[1], duration=1., workers=1, progress=False).digest)"
    both = [script(code, tmp_path / "store") for _ in range(2)]
    digests = {p.communicate(timeout=180)[0] for p in both}
    assert digests == {Store.open(tmp_path / "store").digest + "\n"}


def test_a_folder_with_other_songs_is_not_overwritten(tmp_path, store):
    make_song(tmp_path / "in" / "another", .1)
    with pytest.raises(UserError, match="store of other songs"): prepared(tmp_path / "in", store.path)
    assert store.verify() == []


def test_songs_that_left_the_data_set_leave_the_store(tmp_path):
    for k in range(2): make_song(tmp_path / "in" / f"s{k}", .1)
    prepared(tmp_path / "in", tmp_path / "out")
    shutil.rmtree(tmp_path / "in" / "s0")
    store = prepared(tmp_path / "in", tmp_path / "out")
    assert {p.name.split(".")[0] for p in (tmp_path / "out" / "songs").iterdir()} == {store.songs[0].file}


# ---- digests

def test_a_changed_byte_is_named_and_mended_only_when_asked(tmp_path):
    for k in range(3): make_song(tmp_path / "in" / f"s{k}", seed=k)
    store = prepared(tmp_path / "in", tmp_path / "out")
    path = store.path / "songs" / f"{store.songs[1].file}.npy"
    with open(path, "r+b") as f:
        f.seek(1000)
        f.write(b"\x55\x55")
    assert store.verify() == [store.songs[1].title]
    assert prepared(tmp_path / "in", tmp_path / "out").verify() == [store.songs[1].title]
    assert prepared(tmp_path / "in", tmp_path / "out", repair=True).verify() == []


def test_a_lost_or_cut_array_is_named(tmp_path):
    for k in range(2): make_song(tmp_path / "in" / f"s{k}", seed=k)
    store = prepared(tmp_path / "in", tmp_path / "out")
    first, second = (store.path / "songs" / f"{s.file}.npy" for s in store.songs)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    fresh = Store.open(store.path)
    assert fresh.verify() == [s.title for s in fresh.songs]
    for k in range(2):
        with pytest.raises(UserError, match="cannot be read"): fresh.stems(k)
    assert prepared(tmp_path / "in", tmp_path / "out").verify() == []


# ---- bad input

@pytest.mark.parametrize("odd, message", [
    (dict(vocals=torch.full((2, 4000), torch.nan)), "vocals.wav.*not numbers"),
    (dict(bass=torch.tensor([[0.] * 3999 + [torch.inf]] * 2)), "bass.wav.*not numbers"),
    (dict(bass=torch.zeros(2, 9000)), "bass lasts 1.12 s and the other stems 0.50 s"),
    (dict(drums=torch.zeros(5, 4000)), "bass has 2 channels and the song 5"),
])
def test_one_bad_song_is_named_and_the_others_are_kept(tmp_path, odd, message):
    for k in range(3): make_song(tmp_path / "in" / f"good {k}", seed=k)
    make_song(tmp_path / "in" / "bad", **odd)
    with pytest.raises(UserError, match=message) as e: prepared(tmp_path / "in", tmp_path / "out")
    assert ("1 of 4 songs" in str(e.value) and "\n" not in str(e.value)
            and not (tmp_path / "out" / "store.json").exists())
    kept = len(list((tmp_path / "out" / "songs").glob("*.npy")))
    assert kept == 3
    store, said = notes(prepared, tmp_path / "in", tmp_path / "out", skip_bad=True)
    assert (len(store) == 3 and store.index["skipped"][0]["title"] == "bad" and store.verify() == []
            and "1 song left out: " in said)
    shutil.rmtree(tmp_path / "in" / "bad")
    assert len(prepared(tmp_path / "in", tmp_path / "out")) == 3


def test_small_differences_in_length_are_padded_and_said(tmp_path):
    longer = torch.rand(2, 4300) - .5
    truth = make_song(tmp_path / "in" / "a", vocals=longer)
    store = prepared(tmp_path / "in", tmp_path / "out")
    assert store.songs[0].frames == 4300 and "drums padded by 300 samples" in store.songs[0].flags
    assert torch.equal(store.stems(0)[3], longer) and torch.equal(store.stems(0)[0, :, :4000], truth["drums"])
    assert not store.stems(0)[0, :, 4000:].any()


def test_a_missing_stem_needs_permission(tmp_path):
    make_song(tmp_path / "in" / "a", names=SOURCES[:3])
    with pytest.raises(UserError, match="a: no vocals"): prepared(tmp_path / "in", tmp_path / "out")
    song = prepared(tmp_path / "in", tmp_path / "out", allow_missing=True).songs[0]
    assert song.present == SOURCES[:3] and song.flags == ("vocals missing",)


def test_a_silent_stem_is_allowed_and_flagged(tmp_path):
    make_song(tmp_path / "in" / "a", bass=torch.zeros(2, 4000))
    song = prepared(tmp_path / "in", tmp_path / "out").songs[0]
    assert song.present == SOURCES and song.flags == ("bass silent",) and song.rms[1] == -200


@pytest.mark.parametrize(
    "spoil", [lambda b: b[: len(b) // 2], lambda b: b"RIFF" + os.urandom(2000), lambda b: b""]
)
def test_cut_off_and_corrupt_files_are_named(tmp_path, spoil):
    make_song(tmp_path / "in" / "a")
    path = tmp_path / "in" / "a" / "other.wav"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="other.wav") as e: prepared(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(e.value)


def test_folders_that_are_no_data(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for prepare_folder in (prepare_stems, prepare_musdb):
        with pytest.raises(UserError, match="no such folder"):
            prepare_folder(tmp_path / "nowhere", tmp_path / "out")
        with pytest.raises(UserError, match="is a file"): prepare_folder(tmp_path / "file", tmp_path / "out")
    with pytest.raises(UserError, match="no songs here"): prepare_stems(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="no MUSDB18 here"):
        prepare_musdb(tmp_path / "empty", tmp_path / "out")
    make_song(tmp_path / "song", .1)
    with pytest.raises(UserError, match="stems of one song"):
        prepare_stems(tmp_path / "song", tmp_path / "out")
    shutil.copy(tmp_path / "song" / "bass.wav", tmp_path / "song" / "bass.aiff")
    (tmp_path / "in").mkdir()
    shutil.move(tmp_path / "song", tmp_path / "in" / "a")
    with pytest.raises(UserError, match="bass is there twice"): prepared(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "store.json").exists()


def test_places_that_cannot_be_written(tmp_path):
    make_song(tmp_path / "in" / "a", .1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot make this folder"):
        prepared(tmp_path / "in", tmp_path / "file" / "out")


def test_a_full_disk_stops_with_one_line_and_keeps_what_is_whole(tmp_path):
    for k in range(3): make_song(tmp_path / "in" / f"{k}", seconds=.2 if k < 2 else 2.)
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: prepare_stems(sys.argv[1], sys.argv[2], sample_rate=8000, progress=False, workers=1)
except UserError as e: print(e)
"""
    out, err = script(code, tmp_path / "in", tmp_path / "out").communicate(timeout=180)
    assert "cannot write" in out and out.count("\n") == 1, err
    left = sorted(p.suffix for p in (tmp_path / "out" / "songs").iterdir())
    assert left == [".json", ".json", ".npy", ".npy"] and not (tmp_path / "out" / "store.json").exists()
    assert prepared(tmp_path / "in", tmp_path / "out").verify() == []


def test_a_store_of_another_version_or_broken_index(tmp_path, store):
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    index = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps(dict(index, format=99)))
    with pytest.raises(UserError, match="format 99 and this version reads format"): Store.open(copy)
    (copy / "store.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"): Store.open(copy)


# ---- open_data

def test_open_data_decodes_once_and_sees_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPDEMIX_CACHE", str(tmp_path / "cache"))
    for k in range(3): make_song(tmp_path / "in" / f"s{k}", .1, rate=44100, seed=k)
    first = open_data(tmp_path / "in", progress=False)
    assert (
        first.path.parent == (tmp_path / "cache").resolve() and open_data(first.path).digest == first.digest
    )
    stamp = (first.path / "store.json").stat().st_mtime_ns
    assert (open_data(tmp_path / "in", progress=False).path == first.path
            and (first.path / "store.json").stat().st_mtime_ns == stamp)
    make_song(tmp_path / "in" / "s3", .1, rate=44100)
    assert len(open_data(tmp_path / "in", progress=False)) == 4 and len(Store.open(first.path)) == 3


def test_where_musdb_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MUSDB_PATH", raising=False)
    with pytest.raises(UserError, match="MUSDB_PATH is not set"): find_musdb()
    with pytest.raises(UserError, match="MUSDB_PATH is not set"): open_data()
    monkeypatch.setenv("MUSDB_PATH", str(tmp_path))
    assert find_musdb() == tmp_path


def test_the_download_says_when_ffmpeg_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install ffmpeg"): download_musdb7(tmp_path / "musdb")
    assert not (tmp_path / "musdb").exists()


def test_another_process_reads_the_validation_list_without_musdb_and_plays_the_same_toy_song():
    out, err = script(
        "print(len(validation_titles()), 'musdb' in sys.modules, toy_song(11, 2., 16000).double().sum((1,"
        " 2)).tolist())"
    ).communicate(timeout=180)
    titles, imported, song = out.split(maxsplit=2)
    assert (titles, imported) == ("14", "False"), err
    assert json.loads(song) == toy_song(11, 2., 16000).double().sum((1, 2)).tolist()


def test_musdb_hq_is_recognised_and_split_by_its_list(tmp_path):
    titles = ["Somebody - Something", validation_titles()[0]]
    for split, title in (("train", titles[0]), ("train", titles[1]), ("test", "Else - Where")):
        truth = make_song(tmp_path / "hq" / split / title, .2, subtype="PCM_16")
        write(tmp_path / "hq" / split / title / "mixture.wav", sum(truth.values()), RATE, subtype="PCM_16")
    assert is_musdb(tmp_path / "hq")
    store = prepare_musdb(tmp_path / "hq", tmp_path / "out", sample_rate=RATE, dtype="auto", progress=False)
    assert {s.title: s.split for s in store.songs} == {titles[0]: "train", titles[1]: "valid",
                                                       "Else - Where": "test"}
    assert {(s.mixture, s.dtype) for s in store.songs} == {("stream", "int16")} and all(
        s.mixture_snr > 60 for s in store.songs
    )


# ---- folders as people have them

def notes(prepare, *args, **kw):
    "A store, and the notes that its making gave."
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        store = prepare(*args, **kw)
    return store, " | ".join(str(w.message) for w in heard if issubclass(w.category, DataNote))


def splits_of(store): return {s.title: s.split for s in store.songs}


def test_songs_beside_a_folder_of_a_split_are_songs_too(tmp_path):
    for name in ("test/e", "test/f", "a", "b", "c", "d"): make_song(tmp_path / "in" / name, .1)
    (tmp_path / "in" / "artwork" / "old").mkdir(parents=True)
    (tmp_path / "in" / "artwork" / "cover.png").write_bytes(b"x")
    store, said = notes(prepared, tmp_path / "in", tmp_path / "out")
    assert store.splits == {"train": 3, "valid": 1, "test": 2} and {
        t for t, s in splits_of(store).items() if s == "test"
    } == {"e", "f"}
    assert ("4 songs beside the folders test taken for training: a, b, c, d" in said
            and "1 folder not taken: artwork (no drums, bass, other, vocals in it)" in said)


@pytest.mark.parametrize("name", ["test", "Train", "dev", "valid"])
def test_a_folder_that_holds_stems_is_a_song_whatever_its_name(tmp_path, name):
    for song in (name, "a", "b"): make_song(tmp_path / "in" / song, .1)
    store, said = notes(prepared, tmp_path / "in", tmp_path / "out")
    assert set(splits_of(store)) == {name, "a", "b"} and not said


def test_an_empty_folder_of_a_split_is_none(tmp_path):
    for k in range(4): make_song(tmp_path / "in" / f"s{k}", .1)
    (tmp_path / "in" / "test").mkdir()
    store, said = notes(prepared, tmp_path / "in", tmp_path / "out")
    assert store.splits == {"train": 2, "valid": 1, "test": 1} and "1 folder not taken: test" in said


@pytest.mark.parametrize(
    "clutter",
    ["@eaDir", "__MACOSX", "lost+found", "#recycle", "$RECYCLE.BIN", "System Volume Information", ".Trashes"],
)
@pytest.mark.parametrize("split", [False, True])
def test_what_systems_put_among_songs_is_passed_over(tmp_path, clutter, split):
    for k in range(3): make_song(tmp_path / "in" / ("train" if split else "") / f"s{k}", .1)
    for place in ("", "train" if split else "s0", "train/s0" if split else "s1"):
        make_song(tmp_path / "in" / place / clutter / "drums.wav", .1)
    (tmp_path / "in" / ("train" if split else "") / "s0" / "._drums.wav").write_bytes(b"AppleDouble")
    store, said = notes(prepared, tmp_path / "in", tmp_path / "out")
    assert set(splits_of(store)) == {"s0", "s1", "s2"} and not said and not any(s.flags for s in store.songs)


def test_a_folder_that_may_not_be_read_is_left_with_the_reason(tmp_path, monkeypatch):
    for k in range(3): make_song(tmp_path / "in" / f"s{k}", .1)
    (tmp_path / "in" / "private").mkdir()
    names = Path.iterdir
    def refuse(path):
        if path.name == "private": raise PermissionError(13, "Permission denied")
        return names(path)
    monkeypatch.setattr(Path, "iterdir", refuse)
    store, said = notes(prepared, tmp_path / "in", tmp_path / "out")
    assert len(store) == 3 and "private (permission denied)" in said
    with pytest.raises(UserError, match="private: cannot be read"):
        prepared(tmp_path / "in" / "private", tmp_path / "out2")


def test_a_ds_store_that_comes_later_decodes_nothing_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPDEMIX_CACHE", str(tmp_path / "cache"))
    for k in range(3): make_song(tmp_path / "in" / f"s{k}", .1, rate=44100, seed=k)
    first = open_data(tmp_path / "in", progress=False)
    for name in (".DS_Store", "s0/.DS_Store", "s1/Thumbs.db", "s2/notes.txt", "list.csv", "@eaDir/s0/x.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    assert open_data(tmp_path / "in", progress=False).path == first.path
    os.utime(tmp_path / "in" / "s0" / "bass.wav", (1, 1))
    assert open_data(tmp_path / "in", progress=False).path != first.path


def hq(root, train="train", test="test"):
    "MUSDB18-HQ in small, under other names."
    for split, title in ((train, "A - B"), (train, validation_titles()[0]), (test, "C - D")):
        make_song(root / split / title, .1)
    return {"A - B": "train", validation_titles()[0]: "valid", "C - D": "test"}


@pytest.mark.parametrize(
    "where, names",
    [("", ("Train", "Test")), ("musdb18", ("train", "test")), ("MUSDB18/musdb18hq", ("TRAIN", "TEST"))],
)
def test_musdb_nested_or_spelt_otherwise_is_musdb(tmp_path, monkeypatch, where, names):
    monkeypatch.setenv("DEEPDEMIX_CACHE", str(tmp_path / "cache"))
    truth = hq(tmp_path / "in" / where, *names)
    (tmp_path / "in" / "__MACOSX").mkdir()
    (tmp_path / "in" / "README.txt").touch()
    if where.count("/"): assert not is_musdb(tmp_path / "in")
    root = tmp_path / "in" / where.rpartition("/")[0]
    assert (is_musdb(root)
            and splits_of(prepare_musdb(root, tmp_path / "out", sample_rate=RATE, progress=False)) == truth)
    assert splits_of(open_data(root, progress=False)) == truth


def test_musdb_says_what_it_leaves_out(tmp_path):
    truth = hq(tmp_path / "in")
    (tmp_path / "in" / "train" / "lyrics").mkdir()
    make_song(tmp_path / "in" / "separated" / "C - D", .1)
    store, said = notes(prepare_musdb, tmp_path / "in", tmp_path / "out", sample_rate=RATE, progress=False)
    assert splits_of(store) == truth and "2 folders not taken" in said
    assert ("train/lyrics (no drums" in said
            and "separated (its songs lie a level deeper than the others)" in said)


def test_folders_of_artists(tmp_path):
    for name in ("Ann/Intro", "Ann/Song", "Bob/Intro", "Bob/extras/demo"):
        make_song(tmp_path / "in" / name, .1)
    store, said = notes(prepared, tmp_path / "in", tmp_path / "out")
    assert (set(splits_of(store)) == {"Ann - Intro", "Ann - Song", "Bob - Intro"}
            and "Bob/extras (its songs lie a level deeper" in said)
    for name in ("train/Ann/Song", "test/Bob/Song"): make_song(tmp_path / "split" / name, .1)
    assert splits_of(prepared(tmp_path / "split", tmp_path / "out2")) == {
        "Ann - Song": "train", "Bob - Song": "test",
    }


def test_stems_that_are_called_otherwise_are_an_error_that_names_the_folder(tmp_path):
    for k in range(3): make_song(tmp_path / "in" / f"s{k}", .1)
    make_song(tmp_path / "in" / "odd", .1, names=("Schlagzeug", "Stimme"))
    with pytest.raises(
        UserError, match="1 of 4 songs cannot be prepared: odd: none of drums, bass, other, vocals"
    ):
        prepared(tmp_path / "in", tmp_path / "out")


def test_a_stem_that_is_shorter_can_be_trimmed_to(tmp_path):
    short = dict(bass=torch.rand(2, 2400) - .5)
    truth = make_song(tmp_path / "in" / "a", **short)
    write(tmp_path / "in" / "a" / "mixture.wav", sum(x[:, :2400] for x in truth.values()), RATE,
          subtype="float32")
    for k in range(2): make_song(tmp_path / "in" / f"s{k}", seed=k)
    with pytest.raises(UserError, match=r"bass lasts 0.30 s .*trim=True, or --trim"):
        prepared(tmp_path / "in", tmp_path / "out")
    receipts = {p: p.read_text() for p in (tmp_path / "out" / "songs").glob("s*.json")}
    store = prepared(tmp_path / "in", tmp_path / "out", trim=True)
    song = store.songs[0]
    assert song.frames == 2400 and {f"{n} cut by 1600 samples" for n in ("drums", "other", "vocals")} == set(
        song.flags
    )
    assert (torch.equal(store.stems(0), torch.stack([truth[n][:, :2400] for n in SOURCES]))
            and song.mixture_snr > 100 and store.verify() == [])
    assert [s.flags for s in store.songs[1:]] == [(), ()] and len(receipts) == 2
    prepared(tmp_path / "in", tmp_path / "fresh", skip_bad=True)
    assert all("trim" not in json.loads(p.read_text())["settings"]
               for p in (tmp_path / "fresh" / "songs").glob("*.json"))


def test_sound_that_is_no_stem_is_said(tmp_path):
    for k in range(3):
        make_song(tmp_path / "in" / f"s{k}", .1, names=(*SOURCES, "guitar") if k < 2 else SOURCES)
    (tmp_path / "in" / "s0" / "drums.reapeaks").write_bytes(b"x")
    store, said = notes(prepared, tmp_path / "in", tmp_path / "out")
    assert ("sound files not used, for they are not called drums, bass, other, vocals: guitar.wav in 2 songs"
            in said)
    assert [s.flags for s in store.songs] == [("guitar.wav not used",)] * 2 + [()]
    five, said = notes(
        prepared, tmp_path / "in", tmp_path / "five", sources=(*SOURCES, "guitar"), allow_missing=True
    )
    assert not said and five.sources == (*SOURCES, "guitar") and five.songs[0].present == five.sources


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_songs_say_how_to_split_them(tmp_path, count):
    for k in range(count): make_song(tmp_path / "in" / f"s{k}", .1)
    store, said = notes(prepared, tmp_path / "in", tmp_path / "out")
    assert (store.splits == {"train": count} and "cannot be split" in said
            and "folders train, valid and test" in said)
    for split in ("valid", "test"):
        with pytest.raises(
            UserError,
            match=(
                f"no songs in the split '{split}'; it has {count} train. Put songs into folders train, valid"
                " and test"
            ),
        ):
            store.split(split)
    make_song(tmp_path / "in" / "s2", .1)
    assert (notes(prepared, tmp_path / "in", tmp_path / "out2", valid=0)[1] == ""
            and len(splits_of(prepared(tmp_path / "in", tmp_path / "out3"))) == count + 1)


def test_a_store_inside_its_own_data_folder_is_no_song(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPDEMIX_CACHE", str(tmp_path / "in" / "cache"))
    for k in range(3): make_song(tmp_path / "in" / f"s{k}", .1, rate=44100, seed=k)
    stores = [
        notes(prepare_stems, tmp_path / "in", tmp_path / "in" / "store", progress=False) for _ in range(2)
    ]
    assert {s.digest for s, _ in stores} == {stores[0][0].digest} and {said for _, said in stores} == {""}
    (tmp_path / "in" / "stopped" / "songs").mkdir(parents=True)
    (tmp_path / "in" / "stopped" / ".lock").touch()
    assert {len(open_data(tmp_path / "in", progress=False)) for _ in range(2)} == {3}
    with pytest.raises(UserError, match="this is a store; there is nothing to prepare"):
        prepared(tmp_path / "in" / "store", tmp_path / "out")


def test_a_stem_that_changes_on_the_way_is_flagged(tmp_path):
    make_song(tmp_path / "in" / "a", 2., 44100, suffix=".mp3")
    other = tmp_path / "in" / "a" / "other.mp3"
    for name, rate, seconds in (("x", 44100, 1.), ("y", 48000, .98)):
        write(tmp_path / f"{name}.mp3", torch.rand(2, int(seconds * rate)) - .5, rate)
    other.write_bytes((tmp_path / "x.mp3").read_bytes() + (tmp_path / "y.mp3").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = prepare_stems(tmp_path / "in", tmp_path / "out", progress=False)
    assert len(store.songs[0].flags) >= 1 and any(
        f.startswith("other changes at 1.") for f in store.songs[0].flags
    ), store.songs[0].flags


@pytest.mark.parametrize(
    "settings",
    [dict(sample_rate=0), dict(sample_rate="44100"), dict(sample_rate=-8000), dict(valid=-0.1), dict(test=2),
     dict(valid=0.6, test=0.6)],
)
def test_settings_that_mean_nothing_are_refused_before_anything_is_made(tmp_path, settings):
    make_song(tmp_path / "in" / "a", .1)
    with pytest.raises(UserError, match="whole number of Hz|shares of the songs"):
        prepare_stems(tmp_path / "in", tmp_path / "out", progress=False, **settings)
    assert not (tmp_path / "out").exists()


def test_the_command_says_in_single_lines_what_it_leaves_out(tmp_path):
    for name in ("test/e", "a", "b", "c"): make_song(tmp_path / "in" / name, .1, 44100)
    (tmp_path / "in" / "artwork").mkdir()
    make_song(tmp_path / "in" / "a", .5, 44100, bass=torch.zeros(2, 13230))
    code = "from deepdemix.cli import main; sys.exit(main())"
    process = script(code, "prepare", "--stems", tmp_path / "in", "--out", tmp_path / "out", "--trim")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    lines = [line for line in err.replace("\r", "\n").splitlines()
             if line.strip() and not line.startswith("preparing")]
    assert (out.strip().endswith("4 songs")
            and all(line.startswith(f"deepdemix: {tmp_path / 'in'}: ") for line in lines) and len(lines) == 2)
    assert ("1 folder not taken: artwork" in err
            and "3 songs beside the folders test taken for training: a, b, c" in err)


def test_the_command_can_hold_out_nothing(tmp_path, capsys):
    from deepdemix.cli import main
    for name in "abcd": make_song(tmp_path / "in" / name, .1, 44100)
    folder, all_train = ["prepare", "--stems", str(tmp_path / "in"), "--out"], "--train-only"
    assert main([*folder, str(tmp_path / "some")]) == 0
    assert main([*folder, str(tmp_path / "all"), all_train]) == 0
    assert Store.open(tmp_path / "some").splits == {"train": 2, "valid": 1, "test": 1}
    assert Store.open(tmp_path / "all").splits == {"train": 4}
    assert main(["prepare", "--toy", "3", "--out", str(tmp_path / "toy"), all_train]) == 0
    assert Store.open(tmp_path / "toy").splits == {"train": 3}
    assert main(["prepare", "--musdb", str(tmp_path), "--out", str(tmp_path / "x"), all_train]) == 2
    assert "MUSDB18 says itself which songs are held out" in capsys.readouterr().err


# ---- stores of strangers

def told(path, change):
    "A copy of an index with something changed."
    index = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps(change(index)))


def song_with(**fields): return lambda index: dict(index, songs=[dict(s, **fields) for s in index["songs"]])


@pytest.mark.parametrize(
    "change",
    [song_with(file="../../x"), song_with(file="/etc/x"), song_with(part=".."),
     song_with(part="../../elsewhere"), song_with(file=".."), song_with(file=""), song_with(file="a/b"),
     song_with(file="a\\b"), song_with(file=7), lambda index: [index], lambda index: {"format": STORE_FORMAT},
     lambda index: dict(index, songs=[{"title": "x"}]), lambda index: dict(index, songs=7),
     lambda index: dict(index, sources=None)],
)
def test_an_index_that_leads_out_of_its_store_or_is_none_is_refused(tmp_path, store, change, monkeypatch):
    monkeypatch.setenv("DEEPDEMIX_CACHE", str(tmp_path / "cache"))
    fsspec = pytest.importorskip("fsspec")
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    told(copy, change)
    fsspec.filesystem("memory").put(str(copy), f"/strange/{tmp_path.name}", recursive=True)
    for place in (copy, f"memory://strange/{tmp_path.name}"):
        with pytest.raises(UserError, match="is no index of a store") as e: Store.open(place)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("arrives", [b"", b"not an array", "other", "scalar", "pickle"])
def test_what_arrives_must_have_the_digest_of_the_index(tmp_path, store, monkeypatch, arrives):
    import io
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("DEEPDEMIX_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    arrays = dict(
        other=np.zeros((4, 2, 4000), np.float32), scalar=np.float32(1), pickle=np.array([{}], object)
    )
    if arrives in arrays: np.save(buffer, arrays[arrives], allow_pickle=True)
    url = f"memory://fetched/{tmp_path.name}"
    fs = fsspec.filesystem("memory")
    fs.put(str(store.path), f"/fetched/{tmp_path.name}", recursive=True)
    fs.pipe(f"/fetched/{tmp_path.name}/songs/{store.songs[0].file}.npy", buffer.getvalue() or arrives)
    far = Store.open(url)
    with pytest.raises(UserError, match="is not what the index of the store says"): far.stems(0)
    assert not list(far.path.rglob("*.npy")) and torch.equal(far.stems(1), store.stems(1))
    fs.put(str(store.path / "songs" / f"{store.songs[0].file}.npy"),
           f"/fetched/{tmp_path.name}/songs/{store.songs[0].file}.npy")
    assert torch.equal(far.stems(0), store.stems(0)) and far.select([0, 1]).verify() == []


# ---- the toy band

@quick
@given(seed=st.integers(0, 10**6), duration=st.floats(.5, 3.))
def test_any_seed_is_a_song(seed, duration):
    x = toy_song(seed, duration, 8000)
    assert x.shape == (4, 2, round(duration * 8000)) and x.dtype == torch.float32 and torch.isfinite(x).all()
    assert .499 <= x.sum(0).abs().max() <= .951


def test_toy_instruments_are_told_apart_by_simple_features_across_songs():
    features, labels = [], []
    for seed in range(24):
        spectrum = torch.fft.rfft(toy_song(seed, 4., 16000).mean(1)).abs().square()
        bands = torch.stack(
            [b.sum(-1) for b in spectrum[:, 160:].tensor_split(24, -1)] + [spectrum[:, :800].sum(-1)], 1
        )
        features.append((bands / bands.sum(1, keepdim=True) + 1e-9).log())
        labels += [0, 1, 2, 3]
    x, y = torch.cat(features), torch.tensor(labels)
    song = torch.arange(len(y)) // 4
    distance = torch.cdist(x, x) + 1e9 * (song[:, None] == song[None])
    accuracy = (y[distance.argmin(1)] == y).float().mean()
    assert accuracy > .7


def test_toy_songs_of_one_class_differ_by_more_than_3_db_a_band():
    songs = [toy_song(s, 3., 16000) for s in range(8)]
    for k in range(4):
        bands = torch.stack([
            torch.fft.rfft(x[k].mean(0)).abs()[:24000].reshape(-1, 100).square().mean(1).log10() * 10
            for x in songs
        ])
        assert (bands - bands.mean(0)).square().mean().sqrt() > 3


def test_a_long_toy_song_has_a_form():
    score = compose(2, 120.)
    x = toy_song(2, 120., 8000)
    level = (
        lambda section, k: torch.cat(
            [x[k, :, int(b * score.bar * 8000) : int((b + 1) * score.bar * 8000)]
             for b, s in enumerate(score.sections) if s == section],
            1,
        )
        .square()
        .mean()
    )
    assert level("intro", 3) < 1e-3 * level("verse", 3) and level("chorus", 3) > 0


# ---- real songs

@pytest.mark.musdb
def test_real_stem_files_are_whole_and_like_musdb_s(tmp_path, musdb_path):
    titles = ["PR - Oh No", "Al James - Schoolboy Facination"]
    for split, names in (
        (
            "train",
            [
                validation_titles()[0],
                sorted(p.name for p in (musdb_path / "train").glob("*.stem.mp4"))[0].removesuffix(
                    ".stem.mp4"
                ),
            ],
        ),
        ("test", titles),
    ):
        (tmp_path / "in" / split).mkdir(parents=True)
        for name in names:
            os.symlink((musdb_path / split / f"{name}.stem.mp4").resolve(),
                       tmp_path / "in" / split / f"{name}.stem.mp4")
    store = prepare_musdb(tmp_path / "in", tmp_path / "out", progress=False)
    assert store.splits == {"train": 1, "valid": 1, "test": 2} and {s.mixture for s in store.songs} == {
        "stream"
    }
    assert [s.title for s in store.songs if "mixture differs" in s.flags] == ["PR - Oh No"]
    seven = all(s.duration < 8 for s in store.songs)
    assert not seven or {s.frames for s in store.songs} == {300032}
    again = prepare_musdb(tmp_path / "in", tmp_path / "again", progress=False, workers=1)
    assert store.digest == again.digest


@pytest.mark.musdb
def test_the_samples_are_musdb_s_own(tmp_path, musdb_path):
    musdb = pytest.importorskip("musdb")
    name = sorted((musdb_path / "test").glob("*.stem.mp4"))[0].name
    (tmp_path / "in" / "test").mkdir(parents=True)
    os.symlink((musdb_path / "test" / name).resolve(), tmp_path / "in" / "test" / name)
    store = prepare_musdb(tmp_path / "in", tmp_path / "out", progress=False)
    track = next(t for t in musdb.DB(root=musdb_path, subsets="test") if t.name == store.songs[0].title)
    truth = torch.from_numpy(track.stems).transpose(1, 2).float()
    ours = torch.cat([store.mixture(0, kind="stream")[None], store.stems(0)])
    assert ours.shape == truth.shape and (ours - truth).abs().max() <= 1.5 * 2**-15


@pytest.mark.musdb
@pytest.mark.slow
def test_the_whole_of_musdb(tmp_path, musdb_path):
    store = prepare_musdb(musdb_path, tmp_path / "out", progress=False)
    assert store.splits == {"train": 80, "valid": 14, "test": 50}
    assert [s.title for s in store.songs if s.flags] == ["PR - Oh No"] and store.verify() == []
