"""Separating songs of any length, rate, format and number of channels: what a notebook cell is the wrong
place for."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from deepdemix.audio import OverlapAdd
from deepdemix.baseline import Baseline
from deepdemix.deepdemix import DeepDeMix
from deepdemix.foundations.codecs import read, read_streams
from deepdemix.foundations.decoding import probe
from deepdemix.foundations.encoding import Writer, write
from deepdemix.foundations.files import DamagedAudio, UserError
from deepdemix.foundations.inference import by_groups, segment_of
from deepdemix.foundations.model_names import describe_pretrained, pretrained_names, push_to_hub
from deepdemix.foundations.profiles import recipe_for
from deepdemix.foundations.recipe import Recipe
from deepdemix.foundations.registry import NETWORKS, build_network, known_networks
from deepdemix.foundations.runs import save_network
from deepdemix.foundations.song_files import find_songs
from deepdemix.foundations.toy_band import toy_song
from deepdemix.metrics import framewise_sdr
from deepdemix.networks.compact import Compact
from deepdemix.networks.protocol import MaskNetwork
from deepdemix.networks.recurrent import Recurrent
from deepdemix.separation import Cancelled, Separator
from deepdemix.serving.export import export

RATE = 8000


class Convolutions(MaskNetwork):
    "Masks from three convolutions over time: a reach of 9 frames on each side, and none in loudness."
    def __init__(self, channels=2):
        super().__init__(channels=channels, sample_rate=RATE, window_length=256, hop_length=64)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = lambda n, m: nn.Conv2d(n, m, (7, 3), padding=(3, 1))
            self.layers = nn.Sequential(
                layer(channels, 6), nn.ReLU(), layer(6, 6), nn.ReLU(), layer(6, 4 * channels)
            )

    def predict(self, magnitude):
        x = self.layers(magnitude.permute(0, 3, 1, 2) * 20)
        return (x.unflatten(1, (4, -1)).permute(0, 3, 4, 2, 1) * 30).softmax(-1)


class Shares(nn.Module):
    "Fixed shares of the mixture, sample by sample: what comes out is known for every input."
    shares = (0.4, 0.3, 0.2, 0.1)
    def __init__(self, channels=2, sample_rate=RATE, gain=1.0):
        super().__init__()
        self.sources = ("drums", "bass", "other", "vocals")
        self.channels = channels
        self.sample_rate = sample_rate
        self.gain = gain
        self.seen = []

    def forward(self, x):
        assert x.shape[1] == self.channels
        self.seen.append(tuple(x.shape))
        return x.unsqueeze(1) * torch.tensor(self.shares)[:, None, None] * self.gain


def noise(channels, frames, seed=0):
    return torch.randn(channels, frames, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) / 8


def chord(channels, frames, rate):
    "Tones below 3 kHz, a different one in each channel, faded in and out."
    t, fade = torch.arange(frames) / rate, torch.hann_window(frames, periodic=False)
    return torch.stack([torch.sin(2 * torch.pi * (440 + 310 * c) * t) for c in range(channels)]) * fade / 3


def db(error, reference): return 20 * torch.log10(error.norm() / reference.norm() + 1e-12)


def files_in(folder):
    return sorted(str(x.relative_to(folder)) for x in Path(folder).rglob("*") if x.is_file())


@pytest.fixture(scope="module")
def convolutions(): return Convolutions().eval()


@pytest.fixture
def shares(): return Separator(Shares(), "shares", chunk=1.0)


@pytest.fixture
def song(tmp_path):
    write(tmp_path / "song.wav", noise(2, 3 * RATE), RATE)
    return tmp_path / "song.wav"


# Chunks

def test_chunked_equals_unchunked(convolutions):
    x = noise(2, 10 * RATE + 17)
    with torch.no_grad(): whole = convolutions(x[None])[0]
    for batch_size in (1, 3):
        chunked = Separator(convolutions, chunk=1.5, overlap=0.25, batch_size=batch_size)(x)
        assert db(chunked - whole, whole) < -60
    bare = Separator(convolutions, chunk=1.5, overlap=0, context=0)(x)
    assert db(bare - whole, whole) > -60


@pytest.mark.parametrize("steps", [1, 2])
def test_shift_by_chunk_steps(convolutions, steps):
    separator = Separator(convolutions, chunk=1.5, overlap=0.25)
    x, plan = noise(2, 8 * RATE), separator.plan
    shift = (
        steps * OverlapAdd(None, plan["chunk"], plan["overlap"], plan["context"], align=plan["align"]).step
    )
    stems, shifted = separator(x), separator(torch.cat([torch.zeros(2, shift), x], 1))
    inside = slice(2000, -12000)
    assert db((shifted[..., shift:] - stems)[..., inside], stems[..., inside]) < -50


def test_no_steps_at_seams():
    """A network that sees all of its chunk may change its mind from chunk to chunk; no seam may be louder or
    rougher than the rest."""
    torch.manual_seed(0)
    network = Baseline(hidden_size=8, sample_rate=RATE, window_length=256, hop_length=64)
    separator = Separator(network, chunk=1.0, overlap=0.25)
    stems = separator(torch.sin(torch.arange(20 * RATE) * 0.05)[None])[:, 0]
    step = separator.plan["chunk"] - separator.plan["chunk"] // 4
    jumps = stems.diff(n=2).abs()
    near = torch.zeros(jumps.shape[-1], dtype=torch.bool)
    for seam in range(step, 20 * RATE, step): near[seam:seam + 2000] = True
    inside = slice(RATE, -RATE)
    assert jumps[:, inside][:, near[inside]].max() < 1.1 * jumps[:, inside][:, ~near[inside]].max()
    energy = stems.unfold(-1, 126, 126).square().mean(-1)[:, 80:-80]
    assert (10 * (energy[:, 1:] / energy[:, :-1]).log10()).abs().max() < 1.5


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(0, 3 * RATE), channels=st.integers(1, 7), chunk=st.floats(0.1, 2),
       overlap=st.floats(0, 0.8), batch=st.integers(1, 4))
def test_any_length_and_channels(frames, channels, chunk, overlap, batch):
    x = noise(channels, frames)
    separator = Separator(Shares(), chunk=chunk, overlap=overlap, batch_size=batch)
    stems = separator.separate(x)
    for share, stem in zip(Shares.shares, stems.values()):
        assert stem.shape == x.shape and torch.allclose(stem, x * share, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 255, 256, 257, 7999, 8000, 8001, 16000])
def test_lengths_around_frames_and_chunks(convolutions, length):
    x = noise(2, length) if length > 2 else noise(1, length)
    stems = Separator(convolutions, chunk=1.0)(x)
    assert stems.shape == (4, *x.shape)
    assert db(stems.sum(0) - x, x) < -60


@settings(max_examples=25, deadline=None)
@given(rate=st.sampled_from([8000, 11025, 16000, 22050, 32000, 44100, 48000, 88200, 96000, 192000]),
       channels=st.integers(1, 3), extra=st.integers(0, 999), model=st.sampled_from([8000, 44100]))
def test_any_rate(rate, channels, extra, model):
    x = chord(channels, rate // 2 + extra, rate)
    stems = Separator(Shares(sample_rate=model), chunk=0.2).separate(x, rate)
    for share, stem in zip(Shares.shares, stems.values()):
        assert stem.shape == x.shape
        assert db(stem - share * x, x) < -60


def test_channels_go_in_pairs():
    network = Shares(channels=2)
    Separator(network, chunk=1.0)(noise(5, 100))
    assert network.seen == [(2, 2, 100), (1, 2, 100)]
    network = Shares(channels=1)
    Separator(network, chunk=1.0)(noise(5, 100))
    assert network.seen == [(2, 1, 100), (2, 1, 100), (1, 1, 100)]


# Kinds of input and output

def test_kinds_in_memory(shares, song):
    x, rate = read(song)
    from_file = shares.separate(song)["vocals"]
    assert torch.equal(from_file, shares.separate(x, rate)["vocals"])
    as_array = shares.separate(x.numpy().astype(np.float64), rate)["vocals"]
    assert as_array.dtype == np.float64 and np.allclose(as_array, from_file.numpy())
    assert shares.separate(x[0].half(), rate)["vocals"].dtype == torch.float16
    summary = shares.separate_file(song, song.parent / "out", subtype="float")
    assert torch.equal(read(summary["outputs"]["vocals"])[0], from_file)


def encode(path, x, rate, codec, layout=None):
    "Write what soundfile can't, through PyAV."
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout or {1: "mono", 2: "stereo", 6: "5.1"}[len(x)]
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(x.numpy()), format="fltp", layout=stream.layout.name
        )
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]: container.mux(packet)


INPUTS = [("u8.wav", 44100, 2, "PCM_U8"), ("s16.wav", 48000, 1, "PCM_16"), ("s24.wav", 96000, 2, "PCM_24"),
          ("s32.wav", 22050, 6, "PCM_32"), ("f32.wav", 192000, 2, "FLOAT"), ("f64.wav", 8000, 3, "DOUBLE"),
          ("a.flac", 44100, 2, "PCM_24"), ("a.ogg", 32000, 2, None), ("a.mp3", 44100, 1, None),
          ("b.mp3", 48000, 2, None), ("a.opus", 48000, 2, None), ("a.m4a", 44100, 2, "aac"),
          ("surround.m4a", 48000, 6, "aac"), ("a.mkv", 44100, 2, "ac3"), ("a.mov", 48000, 1, "alac")]


@pytest.mark.parametrize("name,rate,channels,subtype", INPUTS, ids=[x[0] for x in INPUTS])
def test_formats_in(shares, tmp_path, name, rate, channels, subtype):
    x, path = chord(channels, rate + 123, rate), tmp_path / name
    if path.suffix in (".m4a", ".mkv", ".mov"):
        try: encode(path, x, rate, subtype)
        except Exception as e: pytest.skip(f"this build of PyAV cannot make the file: {e}")
    else: write(path, x, rate, subtype)
    decoded, _ = read(path)
    for kind in ("wav", "flac"):
        summary = shares.separate_file(path, tmp_path / "out", format=kind)
        assert summary["damage"] is None
        stems = [read(file) for file in summary["outputs"].values()]
        assert [(s.shape, r) for s, r in stems] == [(decoded.shape, rate)] * 4
        assert db(sum(s for s, _ in stems) - decoded, decoded) < (-30 if subtype == "PCM_U8" else -45)


def test_formats_out(shares, song):
    x, rate = read(song)
    for kind in ("mp3", "ogg", "opus"):
        summary = shares.separate_file(song, song.parent / kind, format=kind)
        vocals, kept = read(summary["outputs"]["vocals"])
        assert abs(vocals.shape[1] / kept - x.shape[1] / rate) < 0.2
    assert {probe(shares.separate_file(song, song.parent / "b", subtype=bits)["outputs"]["bass"]).codec
            for bits in (16, 24, 32)} == {"pcm_s16le", "pcm_s24le", "pcm_f32le"}


@pytest.mark.parametrize("rate,channels", [(96000, 2), (48000, 6)])
def test_mp3_says_what_it_cannot_hold(shares, tmp_path, rate, channels):
    write(tmp_path / "song.wav", noise(channels, 1000), rate)
    with pytest.raises(UserError, match="wav"):
        shares.separate_file(tmp_path / "song.wav", tmp_path / "out", format="mp3")
    assert files_in(tmp_path) == ["song.wav"]


# Options

def test_stems_sum_to_the_mixture(convolutions, tmp_path):
    separator, x = Separator(Shares(gain=0.7), chunk=1.0), noise(2, 2 * 44100)
    write(tmp_path / "song.wav", x, 44100, "FLOAT")
    for options in dict(two_stems="vocals"), dict(residual_to="other"), dict(residual_to="bass"):
        outputs = separator.separate_file(
            tmp_path / "song.wav", tmp_path / "out", subtype="float", **options
        )["outputs"]
        assert (sum(read(file)[0] for file in outputs.values()) - x).abs().max() < 1e-6
    outputs = separator.separate_file(tmp_path / "song.wav", tmp_path / "out", two_stems="drums")["outputs"]
    assert list(outputs) == ["drums", "no_drums"]
    assert (sum(read(file)[0] for file in outputs.values()) - x).abs().max() < 2.1 / 2**15


def test_only_some_stems(shares, song):
    outputs = shares.separate_file(song, song.parent / "out", stems=["bass", "vocals"])["outputs"]
    assert list(outputs) == ["bass", "vocals"] and files_in(song.parent / "out") == [
        "song/bass.wav", "song/vocals.wav",
    ]
    assert torch.equal(shares.separate(song, stems="bass")["bass"], shares.separate(song)["bass"])
    for options in (dict(stems=["piano"]), dict(two_stems="piano"), dict(residual_to="piano"),
                    dict(two_stems="vocals", stems=["bass"]), dict(format="doc"), dict(clip="maybe"),
                    dict(subtype="99")):
        with pytest.raises(UserError): shares.separate_file(song, song.parent / "no", **options)
        assert files_in(song.parent / "no") == []


def test_clipping(song):
    "Eight times too loud: rescaled by one factor for all stems, clamped, or kept in floats."
    separator, x = Separator(Shares(gain=8.0), chunk=1.0), read(song)[0]
    loudest, out = float(x.abs().max()) * 8 * 0.4, song.parent / "out"
    summary = separator.separate_file(song, out, clip="rescale")
    assert summary["gain"] == pytest.approx(1 / loudest, rel=1e-4)
    stems = [read(file)[0] for file in summary["outputs"].values()]
    assert torch.allclose(stems[1] * 2, stems[2] * 3, atol=1e-3) and stems[0].abs().max() > 0.999
    clamped = read(separator.separate_file(song, out, clip="clamp")["outputs"]["drums"])[0]
    assert torch.allclose(clamped, (x * 3.2).clamp(-1, 1), atol=1e-4)
    kept = separator.separate_file(song, out, subtype="float")
    assert kept["gain"] == 1.0 and torch.allclose(read(kept["outputs"]["drums"])[0], x * 3.2, atol=1e-5)


def test_collisions_are_numbered(shares, song):
    out = song.parent / "out"
    folders = [Path(shares.separate_file(song, out, stems=["bass"])["folder"]).name for _ in range(3)]
    assert folders == ["song", "song-2", "song-3"]
    (out / "song" / "mine.txt").write_text("keep")
    again = shares.separate_file(song, out, overwrite=True)
    assert Path(again["folder"]).name == "song"
    assert files_in(out / "song") == ["bass.wav", "drums.wav", "mine.txt", "other.wav", "vocals.wav"]


def test_songs_of_one_name(shares, tmp_path):
    for i, name in enumerate(("a/song.wav", "b/song.wav", "b/song.flac")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, noise(1, 1000 + i), RATE)
    for _ in range(2):
        summary = shares.separate_files(
            [tmp_path / "a", tmp_path / "b"], tmp_path / "out", overwrite=True, stems="bass"
        )
        assert sorted(read(x["outputs"]["bass"])[0].shape[1] for x in summary["songs"]) == [1000, 1001, 1002]
    json.dumps(summary)


def test_tags_are_copied(shares, tmp_path):
    import mutagen.flac
    write(tmp_path / "song.flac", noise(2, RATE), RATE)
    file = mutagen.flac.FLAC(tmp_path / "song.flac")
    file.update({
        "title": "Für Élise", "artist": "Ludwig", "albumartist": "Various", "tracknumber": "7",
        "date": "1810",
    })
    file.save()
    for kind in ("wav", "flac", "mp3", "ogg", "opus"):
        summary = shares.separate_file(tmp_path / "song.flac", tmp_path / kind, format=kind, stems="bass")
        tags = probe(summary["outputs"]["bass"]).tags
        assert (tags["title"], tags["artist"]) == ("Für Élise", "Ludwig") and tags["date"].startswith(
            "1810"
        ), kind
        assert summary["notes"] == []
    bare = shares.separate_file(
        tmp_path / "song.flac", tmp_path / "bare", format="flac", stems="bass", tags=False
    )
    assert "title" not in probe(bare["outputs"]["bass"]).tags


def test_same_bytes_twice(convolutions, song):
    separator, out = Separator(convolutions, chunk=1.0), song.parent / "out"
    kinds = [("wav", None), ("wav", "float"), ("flac", 24), ("mp3", None), ("ogg", None), ("opus", None)]
    def run(i):
        return {
            kind: separator.separate_file(
                song, out / str(i), format=kind[0], subtype=kind[1], overwrite=False
            )["outputs"]
            for kind in kinds
        }
    first = run(0)
    time.sleep(1.1)
    second = run(1)
    for kind in kinds:
        for stem, path in first[kind].items():
            assert Path(path).read_bytes() == Path(second[kind][stem]).read_bytes(), (kind, stem)


# Progress

def test_progress_and_cancelling(shares, song, capsys):
    seen = []
    shares.separate_file(song, song.parent / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (3.0, 3.0)
    with pytest.raises(Cancelled):
        shares.separate_file(song, song.parent / "no", progress=lambda done, total: done < 1)
    assert files_in(song.parent / "no") == []
    with pytest.raises(Cancelled):
        shares.separate_files([song], song.parent / "no", progress=lambda done, total: False)
    shares.separate_file(song, song.parent / "out", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert (1 <= len(lines) <= 10 and all("song.wav" in line and "%" in line for line in lines)
            and "100%" in lines[-1])


def test_threads_are_put_back(song):
    """Each chunk takes one core, whatever the caller works with, and leaves the caller's setting and that of
    new threads alone."""
    before, seen, new = torch.get_num_threads(), [], []
    network = Shares()
    network.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        for own, threads in (3, 1), (3, 2), (1, 2), (2, None):
            torch.set_num_threads(own)
            Separator(network, threads=threads).separate(song)
            assert torch.get_num_threads() == own
            thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert new[-1] == own
        assert set(seen) == {1}
    finally: torch.set_num_threads(before)
    with pytest.raises(UserError): Separator(network, threads=0)


# Several chunks at once

class Together(Shares):
    "Counts the chunks that are in work together; of the first ones, each waits for another to come."
    def __init__(self, meet=0):
        super().__init__()
        self.now = 0
        self.most = 0
        self.calls = 0
        self.lock = threading.Lock()
        self.meet = threading.Barrier(meet) if meet else None

    def forward(self, x):
        with self.lock:
            self.calls, self.now = self.calls + 1, self.now + 1
            self.most, waits = max(self.most, self.now), self.meet and 0 < self.calls <= self.meet.parties
        if waits: self.meet.wait(60)
        time.sleep(0.01 * (self.calls % 3))
        with self.lock: self.now -= 1
        return super().forward(x)


@pytest.mark.parametrize("threads", [2, 3])
def test_as_many_chunks_at_once_as_threads(threads):
    network = Together(meet=threads)
    x = noise(2, 12 * RATE)
    assert torch.equal(
        Separator(network, chunk=1.0, threads=threads)(x), Separator(Shares(), chunk=1.0, threads=1)(x)
    )
    assert network.most == threads


@pytest.mark.parametrize("options", [dict(), dict(batch_size=3), dict(overlap=0.6)])
def test_the_number_of_threads_changes_no_bit(convolutions, options):
    "Not even where a rate is changed, or where later chunks are ready first."
    class Late(nn.Module):
        sources, sample_rate, channels, calls = convolutions.sources, RATE, 2, 0
        def forward(self, x):
            self.calls += 1
            time.sleep(0.02 * (self.calls % 2))
            return convolutions(x)
    x, found = noise(2, 9 * RATE + 123), []
    for threads in 1, 2, 4:
        separator = Separator(Late(), chunk=1., threads=threads, **options)
        found.append([separator(x), *separator.separate(x[:, :2 * RATE], 32000).values()])
    for more in found[1:]: assert all(torch.equal(a, b) for a, b in zip(found[0], more, strict=True))


def test_where_memory_is_short_fewer_go_together(monkeypatch):
    from deepdemix.foundations import inference
    monkeypatch.setattr(inference, "available_memory", lambda: 4e6)
    monkeypatch.setattr(inference, "resident_memory", iter(range(0, 10**12, 10**7)).__next__)
    network = Together()
    Separator(network, chunk=1., threads=4)(noise(2, 9 * RATE))
    assert network.most == 1
    monkeypatch.setattr(inference, "resident_memory", lambda: 10**9)
    network = Together(meet=4)
    network.calls = -1
    Separator(network, chunk=1., threads=4)(noise(2, 9 * RATE))
    assert network.most == 4


def test_the_next_chunks_wait_for_whoever_takes_the_stems():
    "However long the song, the chunks in work and the stems that nobody has taken are few."
    network = Together()
    pieces = Separator(network, chunk=1.0, threads=2).separate_blocks(
        iter(noise(2, 60 * RATE).split(RATE, -1)), RATE
    )
    next(pieces)
    time.sleep(0.3)
    assert network.calls <= 5
    pieces.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("deepdemix")]


def test_an_error_in_one_of_many_chunks_is_the_song_s():
    class Fails(Together):
        def forward(self, x):
            if self.calls == 4: raise UserError("the fifth chunk")
            return super().forward(x)
    with pytest.raises(UserError, match="fifth"): Separator(Fails(), chunk=1., threads=3)(noise(2, 20 * RATE))
    assert not [t for t in threading.enumerate() if t.name.startswith("deepdemix")]


# Killed, and long

SCRIPT = """
import re, resource, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from deepdemix.networks.recurrent import Recurrent
from deepdemix.separation import Separator
path, out, seconds, kind = sys.argv[1:5]
class Quarter(torch.nn.Module):
    sources, channels, sample_rate = ("drums", "bass", "other", "vocals"), 2, 44100
    def forward(self, x):
        time.sleep(float(seconds))
        return torch.stack([x / 4] * 4, 1)
def peak():
    status = Path("/proc/self/status")
    if status.exists(): return int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
def tell(done, total): print(done, peak(), flush=True)
network = Recurrent() if kind == "recurrent" else Quarter()
print(Separator(network, device="cpu", chunk=None if kind == "recurrent" else 5).separate_file(path, out, progress=tell)["frames"], flush=True)
"""


def interruptible():
    "A process that was started in the background ignores SIGINT, and so do its children: undo that."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(tmp_path, path, seconds=0.0, kind="quarter"):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(path), str(tmp_path / "out"), str(seconds), kind],
        stdout=subprocess.PIPE, text=True, preexec_fn=interruptible,
    )


def long_file(path, seconds):
    "A stereo song of many seconds, written in blocks."
    block = noise(2, 10 * 44100)
    with Writer(path, 44100, 2) as writer:
        for _ in range(seconds // 10): writer.write(block)
    return path


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_killed_half_way(tmp_path, how):
    process = start(tmp_path, long_file(tmp_path / "song.wav", 60), seconds=0.5)
    assert process.stdout.readline()
    os.kill(process.pid, getattr(signal, how))
    process.communicate()
    assert process.returncode != 0
    assert [x for x in files_in(tmp_path / "out") if not x.startswith(".")] == []
    left = list((tmp_path / "out").glob(".separating-*"))
    assert len(left) == (how == "SIGKILL")
    for folder in left: os.utime(folder, (0, 0))
    process = start(tmp_path, tmp_path / "song.wav")
    process.communicate()
    assert (process.returncode == 0 and not list((tmp_path / "out").glob(".*"))
            and len(files_in(tmp_path / "out")) == 4)


def test_terminated_half_way(tmp_path):
    "A polite kill: status 143, one line, nothing left."
    path = long_file(tmp_path / "song.wav", 300)
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from deepdemix.cli import main; sys.exit(main())", "separate",
         str(path), "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    while not list((tmp_path / "out").glob(".separating-*/*")): assert process.poll() is None
    process.terminate()
    error = process.communicate()[1]
    assert process.returncode == 143 and "stopped" in error and "Traceback" not in error
    assert [x.name for x in tmp_path.iterdir()] == ["song.wav"]


def memory(tmp_path, seconds, kind):
    "Pairs of seconds done and the most memory that was used until then, in GiB."
    process = start(tmp_path, long_file(tmp_path / "song.wav", seconds), kind=kind)
    *lines, frames = process.communicate()[0].splitlines()
    assert process.returncode == 0 and int(frames) == seconds * 44100
    assert sorted(x.name for x in (tmp_path / "out").rglob("*.wav")) == [
        "bass.wav", "drums.wav", "other.wav", "vocals.wav",
    ]
    for path in (tmp_path / "out").rglob("*.wav"): path.unlink()
    return [tuple(map(float, line.split())) for line in lines]


def test_memory_over_five_minutes(tmp_path):
    seen = memory(tmp_path, 300, "quarter")
    early = next(peak for done, peak in seen if done > 60)
    assert seen[-1][0] == 300 and seen[-1][1] < min(0.6, early + 0.06)


@pytest.mark.slow
def test_memory_over_an_hour(tmp_path):
    seen = memory(tmp_path, 3600, "recurrent")
    print(f"an hour of stereo: {seen[-1][1]:.2f} GiB")
    assert seen[-1][1] < 1.5


# Real songs

@pytest.mark.musdb
def test_a_real_song(musdb_path, tmp_path):
    path = sorted((musdb_path / "test").glob("*.stem.mp4"))[0]
    separator = Separator(Convolutions().eval(), chunk=2.0)
    summary = separator.separate_file(path, tmp_path, residual_to="other", subtype="float")
    mixture = read_streams(path)[0][0]
    stems = [read(file)[0] for file in summary["outputs"].values()]
    assert [s.shape for s in stems] == [mixture.shape] * 4
    assert (sum(stems) - mixture).abs().max() < 1e-5


# The Hub

def test_hub(tmp_path, monkeypatch, song):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    network = Baseline(hidden_size=3, window_length=256, hop_length=64)
    save_network(network, Recipe(network="baseline", network_args=network.args), tmp_path / "run")
    (tmp_path / "run" / "resume.ckpt").write_bytes(b"not to be sent")
    (tmp_path / "hub" / "someone").mkdir(parents=True)
    class Api:
        def create_repo(self, repo, private, exist_ok): (tmp_path / "hub" / repo).mkdir(exist_ok=exist_ok)
        def upload_folder(self, repo_id, folder_path, allow_patterns):
            for name in allow_patterns:
                if (Path(folder_path) / name).exists():
                    (tmp_path / "hub" / repo_id / name).write_bytes((Path(folder_path) / name).read_bytes())
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda repo, revision, allow_patterns: str(tmp_path / "hub" / repo))
    assert push_to_hub(tmp_path / "run", "someone/model") == "hf:someone/model"
    assert files_in(tmp_path / "hub") == ["someone/model/model.safetensors", "someone/model/recipe.json"]
    there, here = (
        Separator.from_pretrained(x).separate(song)["bass"] for x in ("hf:someone/model", tmp_path / "run")
    )
    assert torch.equal(there, here)
    def offline(*_, **__): raise ConnectionError("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="no network"): Separator.from_pretrained("hf:someone/model")


# Export

TWINS = {
    "baseline": lambda: Baseline(hidden_size=4, window_length=256, hop_length=64),
    "recurrent": lambda: Recurrent(hidden=8, layers=2, single=20, window_length=256, hop_length=64),
    "ddm": lambda: DeepDeMix(duration=0.5, sample_rate=RATE, window_length=128, hop_length=64,
                             conv_channels=(2, 3, 4, 5), linears=(8, 8), latent=6, pools=((4, 4), (2, 2)),
                             grid=(2, 4, 4), hidden=5),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("kind", ["pt", "onnx"])
def test_export(tmp_path, name, kind):
    if kind == "onnx": onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(1)
    network = TWINS[name]().eval()
    path = export(network, tmp_path / f"network.{kind}")
    frames = network.frames if name == "ddm" else 71
    x = torch.rand(2, frames, network.n_f, network.channels)
    if kind == "onnx": x = torch.randn(2, network.channels, (frames - 1) * network.stft.hop_length) / 8
    with torch.no_grad(): expected = network.mask(x) if kind == "pt" else network(x)
    if kind == "pt": exported = torch.jit.load(str(path))(x)
    else:
        exported = torch.from_numpy(
            onnxruntime.InferenceSession(str(path)).run(None, {"mixture": x.numpy()})[0]
        )
    assert exported.shape == expected.shape and (exported - expected).abs().max() < 1e-4
    assert files_in(tmp_path) == [f"network.{kind}"]


def test_export_refuses(tmp_path):
    with pytest.raises(UserError, match="onnx"): export(TWINS["baseline"](), tmp_path / "x.tflite")
    with pytest.raises(UserError, match="mask"): export(Shares(), tmp_path / "x.pt")
    with pytest.raises(UserError, match="complex numbers.*[.]pt"): export(Shares(), tmp_path / "x.onnx")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("refine", [0., 0.75])
def test_export_of_a_network_that_works_on_phases(tmp_path, refine):
    "Any batch and any number of frames, the Wiener filter included."
    torch.manual_seed(1)
    network = Compact(
        window_length=256, hop_length=64, octave=8, band=4, width=8, hidden=8, layers=1, refine=refine
    ).eval()
    exported = torch.jit.load(str(export(network, tmp_path / "x.pt")))
    for batch, frames in (1, 9), (4, 71):
        spectrum = torch.randn(batch, 2, frames, network.stft.n_f, dtype=torch.cfloat)
        with torch.no_grad():
            torch.testing.assert_close(exported(spectrum), network.estimate(spectrum), atol=1e-4, rtol=0)


# The models that came with the package

@pytest.mark.parametrize("name", pretrained_names() or [None])
def test_bundled_model(name):
    if name is None: pytest.skip("no model is bundled yet")
    assert describe_pretrained()[name]
    separator = Separator.from_pretrained(name, device="cpu")
    x = chord(2, 44100, 44100)
    stems = separator.separate(x, 44100)
    assert all(torch.isfinite(s).all() and s.shape == x.shape for s in stems.values())
    assert all(torch.equal(a, b) for a, b in zip(stems.values(), separator.separate(x, 44100).values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", pretrained_names() or [None])
def test_what_chunking_costs(name):
    "The SDR of a minute of the toy band in chunks, and in one go: at most 0.1 dB apart."
    if name is None: pytest.skip("no model is bundled yet")
    separator = Separator.from_pretrained(name, device="cpu")
    song = toy_song(seed=5, duration=60.0, sample_rate=separator.sample_rate)
    with torch.no_grad(): whole = by_groups(separator.network, song.sum(0)[None], separator.channels)[0]
    sdr = [torch.as_tensor(framewise_sdr(song, x, separator.sample_rate)).nanmedian(-1).values
           for x in (whole, separator(song.sum(0)))]
    print(f"{name}: chunking costs {float((sdr[0] - sdr[1]).mean()):.3f} dB of SDR")
    assert float((sdr[0] - sdr[1]).mean()) < 0.1


@pytest.mark.cuda
def test_cuda_agrees_with_the_processor(convolutions):
    x = noise(2, 5 * RATE)
    here = Separator(convolutions, device="cpu", chunk=1.0)(x)
    there = Separator(Convolutions().eval(), device="cuda", chunk=1.0, batch_size=4)(x)
    assert there.device.type == "cpu" and db(there - here, here) < -50


@pytest.mark.parametrize("name", pretrained_names() or [None])
def test_a_bundled_model_exported_is_the_same_on_music(name, tmp_path):
    """Bands that hardly vary in training have large factors in a batch norm: an export that folds them loses
    four digits."""
    if name is None: pytest.skip("no model is bundled yet")
    network = Separator.from_pretrained(name, device="cpu").network
    song = toy_song(3, duration=6.0).sum(0)[None]
    if hasattr(network, "estimate"):
        exported = torch.jit.load(str(export(network, tmp_path / "network.pt")))
        spectrum = network.spectrum(song)
        with torch.no_grad():
            back = network.stft.inverse(exported(spectrum).movedim(2, -1), song.shape[-1])
            torch.testing.assert_close(back, network(song), atol=1e-4, rtol=0)
        return
    onnxruntime = pytest.importorskip("onnxruntime")
    path, song = (export(network, tmp_path / "network.onnx"),
                  song[:, : network.channels, : segment_of(network) or song.shape[-1]])
    exported = torch.from_numpy(
        onnxruntime.InferenceSession(str(path)).run(None, {"mixture": song.numpy()})[0]
    )
    with torch.no_grad(): assert (exported - network(song)).abs().max() < 1e-4


def test_a_song_far_beyond_full_scale_is_named(tmp_path):
    import soundfile
    soundfile.write(tmp_path / "huge.wav", np.full((44100, 2), 1e30, np.float32), 44100, subtype="FLOAT")
    done = Separator.from_pretrained("default", device="cpu").separate_files(
        tmp_path / "huge.wav", tmp_path / "out"
    )
    assert (
        "huge.wav" in done["failed"][0] and "1e+30" in done["failed"][0] and files_in(tmp_path / "out") == []
    )


@pytest.mark.parametrize("options", [dict(threads=0), dict(threads=100_000), dict(batch_size=0)])
def test_counts_out_of_range(options):
    with pytest.raises(UserError, match="use 1"):
        Separator.from_pretrained("default", device="cpu", **options)


def test_every_piece_of_a_song_tidies_the_memory(monkeypatch):
    "An hour that is separated piece by piece keeps no more than a piece takes."
    import contextlib

    from deepdemix import separation
    tidied = []
    monkeypatch.setattr(separation, "keep_memory", lambda: contextlib.nullcontext(lambda: tidied.append(1)))
    separator = Separator.from_pretrained("default", device="cpu", chunk=1.)
    pieces = list(separator.separate_blocks(iter(torch.randn(2, 4 * 44100).split(44100, -1)), 44100))
    assert len(tidied) >= 4 and sum(m.shape[-1] for m, _ in pieces) == 4 * 44100


# What belongs to the whole process

class Gate(Shares):
    "Waits before its first chunk until it may go on."
    def __init__(self):
        super().__init__()
        self.here, self.go = threading.Event(), threading.Event()

    def forward(self, x):
        self.here.set()
        assert self.go.wait(60)
        return super().forward(x)


def test_damage_is_reported_for_its_own_song(song):
    "Two songs in two threads, one of them cut off: its end is read while the other, whole one is in work."
    write(song.parent / "cut.wav", noise(2, 30 * RATE), RATE)
    (song.parent / "cut.wav").write_bytes((song.parent / "cut.wav").read_bytes()[:25 * RATE * 4])
    summaries, gates = {}, {name: Gate() for name in ("cut.wav", "song.wav")}
    def separate(name):
        summaries[name] = Separator(gates[name], chunk=1.0).separate_file(
            song.parent / name, song.parent / "out"
        )
    threads = {name: threading.Thread(target=separate, args=[name]) for name in gates}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in gates:
            threads[name].start()
            assert gates[name].here.wait(60)
        for name in gates:
            gates[name].go.set()
            threads[name].join()
    assert "cut.wav" in summaries["cut.wav"]["damage"] and summaries["song.wav"]["damage"] is None
    assert [str(w.message) for w in caught if w.category is DamagedAudio] == [summaries["cut.wav"]["damage"]]


def test_many_songs_leave_the_filters_of_warnings_alone(shares, song, recwarn):
    "A song that fails in the middle of another's work would put filters back that are not its own."
    seen, gate = [], Gate()
    filters = list(warnings.filters)
    gate.register_forward_hook(lambda *_: seen.append(list(warnings.filters) == filters))
    gate.go.set()
    Separator(gate, chunk=1.0).separate_files([song], song.parent / "out")
    assert seen and all(seen)


def test_between_two_pieces_nothing_is_held(song):
    "Whoever takes one piece and then trains, or never comes back, finds all as it was."
    before = torch.get_num_threads()
    pieces = Separator(Shares(), chunk=1.0, threads=before + 1).separate_blocks(
        iter(noise(2, 5 * RATE).split(RATE, -1)), RATE
    )
    next(pieces)
    assert (torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            and torch.get_num_threads() == before)
    weight = torch.ones(3, requires_grad=True)
    (nn.functional.relu(weight) * 2).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.))


def test_the_caller_s_own_modes_are_not_ended():
    separator, x = Separator(Shares(), chunk=1.0), noise(2, 3 * RATE)
    with torch.no_grad():
        pieces = separator.separate_blocks(iter(x.split(RATE, -1)), RATE)
        next(pieces)
    list(pieces)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        list(separator.separate_blocks(iter(x.split(RATE, -1)), RATE))
        assert not torch.is_grad_enabled()


def test_stems_are_ordinary_tensors(convolutions):
    "They can be a target, or go into a network that learns."
    separator, weight = Separator(convolutions, chunk=1.0), torch.ones(1, requires_grad=True)
    x = noise(2, 2 * RATE).requires_grad_()
    pieces = [y for pair in separator.separate_blocks(iter(x.split(RATE, -1)), RATE) for y in pair]
    for y in [separator(x), *separator.separate(x, RATE).values(), *separator.separate(x, 2 * RATE).values(),
              *pieces]:
        assert not y.is_inference() and not y.requires_grad
        weight.grad = None
        (y * weight).square().sum().backward()
        assert weight.grad.item() > 0


def test_threads_of_other_threads_stay():
    "A separator without a number of threads sets none."
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda n: calls.append(n))
        Separator(Shares(), chunk=1.0)(noise(2, RATE))
    assert calls == []


SEPARATING = [
    x for x in known_networks()
    # none of a test's own
    if x not in ("encoder", "ensemble") and NETWORKS[x].__module__.startswith("deepdemix.")
]

@pytest.mark.parametrize("name", SEPARATING)
def test_a_network_that_separates_can_go_on_training(name):
    "Nothing that it has kept from separating stands in the way of a gradient."
    torch.manual_seed(0)
    try: network = build_network(name, **recipe_for(name, "demo").network_args)
    except UserError as e: pytest.skip(str(e))
    x = noise(network.channels or 1, segment_of(network) or 22_050)
    Separator(network, device="cpu")(x)
    network.train()(x[None]).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.fixture
def doubles():
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(torch.float64)
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", SEPARATING)
def test_under_a_default_of_double_precision(name, tmp_path, doubles):
    "A program that has made float64 its default hears what all others hear."
    recipe = recipe_for(name, "demo")
    torch.manual_seed(0)
    try: network = build_network(name, **recipe.network_args)
    except UserError as e: pytest.skip(str(e))
    save_network(network, recipe, tmp_path / "run")
    x = noise(2, 50_000)
    write(tmp_path / "song.wav", x, 48_000)
    single = Separator.from_pretrained(tmp_path / "run", device="cpu", chunk=None)
    expected = single.separate(x)
    of_file = single.separate_file(tmp_path / "song.wav", tmp_path / "single", subtype="float")
    doubles()
    double = Separator.from_pretrained(tmp_path / "run", device="cpu")
    for stem, y in double.separate(x).items():
        assert y.dtype == torch.float32 and (y - expected[stem]).abs().max() < 1e-4
    outputs = double.separate_file(tmp_path / "song.wav", tmp_path / "double", subtype="float")["outputs"]
    for stem, path in outputs.items():
        assert (read(path)[0] - read(of_file["outputs"][stem])[0]).abs().max() < 1e-4
    assert double(x).dtype == torch.float32 and double(x[:, :0]).dtype == torch.float32


# Names from outside

@pytest.mark.parametrize("name", ["...wav", "..wav", ".. .wav", "....wav"])
def test_a_name_of_dots_stays_inside(shares, song, name):
    out = song.parent / "deep" / "out"
    (song.parent / "deep" / "drums.wav").parent.mkdir()
    (song.parent / "deep" / "drums.wav").write_text("mine")
    dots = song.rename(song.parent / name)
    for overwrite in (False, True):
        folder = Path(shares.separate_file(dots, out, overwrite=overwrite)["folder"])
        assert folder.parent == out and folder.resolve().parent == out.resolve() and folder.name.strip(". ")
    assert files_in(song.parent / "deep") == [
        "drums.wav", *(f"out/{folder.name}/{stem}.wav" for stem in ("bass", "drums", "other", "vocals")),
    ]
    assert (song.parent / "deep" / "drums.wav").read_text() == "mine"


@pytest.mark.parametrize("name", ["../drums", "/tmp/drums", "a/b", "..", "", "drums\0", "a\\b", "x" * 300])
def test_a_model_cannot_name_files_elsewhere(name):
    network = Shares()
    network.sources = ("bass", name)
    with pytest.raises(UserError, match="no name for a file"): Separator(network)


# No standard error

def test_progress_without_standard_error(shares, song, monkeypatch, capsys):
    "As in services and programs without a window; and nothing of it goes to standard output instead."
    class Closed:
        def isatty(self): raise ValueError("I/O operation on closed file")
    class Broken:
        def isatty(self): return False
        def write(self, text): raise BrokenPipeError
        def flush(self): raise BrokenPipeError
    for stream in (None, Closed(), Broken(), object()):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            summary = shares.separate_files([song], song.parent / "out", progress=True)
        assert not summary["failed"]
    assert capsys.readouterr().out == ""


# Arrays and rates

def test_arrays_as_programs_hand_them_over(shares):
    x = noise(2, RATE).numpy()
    expected = shares.separate(x, RATE)["vocals"]
    frozen = x.copy()
    frozen.flags.writeable = False
    for other in (x[:, ::-1][:, ::-1], x[::-1, ::-1][::-1, ::-1], np.asfortranarray(x), x.astype(">f4"),
                  frozen, x.tolist()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(shares.separate(other, RATE)["vocals"], expected)
    assert np.allclose(shares.separate(x[::-1, ::-1], RATE)["vocals"], expected[::-1, ::-1], atol=1e-6)
    assert np.allclose(shares.separate(x.astype(np.longdouble), RATE)["vocals"], expected)


@pytest.mark.parametrize("shape", [(2, 1), (1, 1), (6, 2), (1,)])
def test_a_song_of_a_sample_or_two(shares, shape):
    x = torch.rand(shape)
    assert {y.shape for y in shares.separate(x, RATE).values()} == {x.shape}


@pytest.mark.parametrize("rate", [0, -1, "44100", "", float("nan"), float("inf"), True, 1j])
def test_what_is_no_rate(shares, song, rate):
    x = noise(2, RATE)
    for call in (lambda: shares.separate(x, rate), lambda: shares.separate(song, rate),
                 lambda: list(shares.separate_blocks(iter([x]), rate))):
        with pytest.raises(UserError, match="44100"): call()
    network = Shares()
    network.sample_rate = rate
    with pytest.raises(UserError, match="44100"): Separator(network)
    assert (shares.separate(x, np.int64(RATE))["bass"].shape == x.shape
            == shares.separate(x, float(RATE))["bass"].shape)


@pytest.mark.parametrize(
    "x",
    [np.ones(9, int), np.ones(9, bool), np.ones((2, 9), complex), [[1.0], [1.0, 2.0]], np.ones((1, 2, 3)),
     None, "no such file.wav"],
)
def test_what_is_no_waveform(shares, x):
    with pytest.raises(UserError): shares.separate(x, RATE)


def test_a_changing_stream_is_mentioned(shares, song):
    "A song that turns mono on the way is whole, and no process-wide warning says so."
    first, second = (song.parent / f"{n}.mp3" for n in ("stereo", "mono"))
    write(first, noise(2, 30_000), 44_100), write(second, noise(1, 30_000), 44_100)
    joined = song.parent / "joined.mp3"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = shares.separate_files([joined], song.parent / "out", format="wav")
    assert done["failed"] == [] and any("channel" in note for note in done["songs"][0]["notes"])


# Sound tracks

def test_the_second_sound_track(shares, tmp_path):
    import av
    path, tracks = tmp_path / "film.mkv", [chord(2, 16000, 48000), chord(1, 16000, 48000) / 2]
    with av.open(str(path), "w") as container:
        streams = [
            container.add_stream("pcm_s16le", rate=48000, layout=layout) for layout in ("stereo", "mono")
        ]
        for stream, x in zip(streams, tracks):
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray((x.T * 32767).short().numpy().reshape(1, -1)), format="s16",
                layout=stream.layout.name,
            )
            frame.sample_rate = 48000
            for packet in [*stream.encode(frame), *stream.encode(None)]: container.mux(packet)
    for track, x in enumerate(tracks, 1):
        stems = shares.separate(path, track=track)
        assert (sum(stems.values()) - x).abs().max() < 1e-3
        summary = shares.separate_file(path, tmp_path / "out", track=track, subtype="float")
        assert summary["channels"] == len(x) and torch.allclose(
            read(summary["outputs"]["bass"])[0], stems["bass"]
        )
    for track in (0, 3, -1):
        with pytest.raises(UserError, match="has 2 sound track"):
            shares.separate_file(path, tmp_path / "no", track=track)
    assert not (tmp_path / "no").exists()


# Folders of songs

def test_stems_of_an_earlier_run_are_no_songs(shares, tmp_path):
    "The output may be the album's own folder, or lie in it."
    album = tmp_path / "album"
    for name in ("a.wav", "cd 2/b.wav", "cd 2/drums.wav"): write(album / name, noise(1, 1000), RATE)
    for out in (album, album / "stems", tmp_path / "elsewhere"):
        for options in {}, dict(two_stems="vocals"):
            done = shares.separate_files([album], out, overwrite=True, **options)
            assert sorted(Path(x["input"]).relative_to(album).as_posix() for x in done["songs"]) == [
                "a.wav", "cd 2/b.wav", "cd 2/drums.wav",
            ], out
    assert "stems of an earlier run" in done["passed_over"][0]
    named = shares.separate_files([album / "a" / "bass.wav"], tmp_path / "named")
    assert named["failed"] == [] and len(named["songs"]) == 1


@pytest.mark.parametrize("suffix", "m4b wmv flv 3gp mpg mpeg mts m2ts vob ogv 3g2 asf spx MP3 Wav".split())
def test_endings_of_sound(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(b"x")
    assert [x.name for x in find_songs([tmp_path], tmp_path / "out")] == [f"a.{suffix}"]


def test_what_is_passed_over_is_counted(shares, tmp_path):
    for name in ("a.wav", "@eaDir/a.wav", "__MACOSX/._a.wav", ".hidden/b.wav", ".c.wav"):
        write(tmp_path / "in" / name, noise(1, 100), RATE)
    for name in ("cover.jpg", "back.JPG", "notes"): (tmp_path / "in" / name).write_text("")
    done = shares.separate_files([tmp_path / "in"], tmp_path / "out")
    assert len(done["songs"]) == 1 and done["passed_over"] == [
        f"{tmp_path / 'in'}: not taken: 2 .jpg, 1 without an ending"
    ]


def test_skip_existing(shares, tmp_path):
    for i, name in enumerate(("a/song.wav", "b/song.wav", "b/other.wav")):
        write(tmp_path / name, noise(1, 8000 * (i + 1)), RATE)
    folders, seen = [tmp_path / "a", tmp_path / "b"], shares.network.seen
    first = shares.separate_files(folders, tmp_path / "out", skip_existing=True)
    before = {x: (tmp_path / "out" / x).stat().st_mtime_ns for x in files_in(tmp_path / "out")}
    seen.clear()
    again = shares.separate_files(folders, tmp_path / "out", skip_existing=True)
    assert (seen == [] and [x["folder"] for x in again["songs"]] == [x["folder"] for x in first["songs"]]
            and all(x["skipped"] for x in again["songs"]))
    assert {x: (tmp_path / "out" / x).stat().st_mtime_ns for x in files_in(tmp_path / "out")} == before
    (tmp_path / "out" / "other" / "bass.wav").unlink()
    third = shares.separate_files(folders, tmp_path / "out", skip_existing=True)
    assert [x.get("skipped", False) for x in third["songs"]] == [True, False, True]
    write(tmp_path / "aa" / "song.wav", noise(1, 40000), RATE)
    new = shares.separate_files([tmp_path / "aa"], tmp_path / "out", skip_existing=True)
    assert Path(new["songs"][0]["folder"]).name == "song-3", "a longer song of the same name is another"
    assert (
        shares.separate_files([tmp_path / "a"], tmp_path / "out", skip_existing=True, format="flac")["songs"][
            0
        ].get("skipped")
        is None
    )
    with pytest.raises(UserError, match="choose one"):
        shares.separate_files(folders, tmp_path / "out", skip_existing=True, overwrite=True)


# Before the work, and after it

@pytest.mark.parametrize(
    "options",
    [dict(subtype="99bit"), dict(subtype="ADPCM"), dict(subtype="IMA_ADPCM"),
     dict(format="flac", subtype="float"), dict(format="mp3", subtype="24"), dict(format="opus")],
)
def test_what_cannot_be_written_leaves_no_folder(shares, tmp_path, options):
    write(tmp_path / "song.wav", noise(2, 1000), 44100)
    with pytest.raises(UserError) as error:
        shares.separate_file(tmp_path / "song.wav", tmp_path / "new" / "out", **options)
    assert "ADPCM," not in str(error.value) and [x.name for x in tmp_path.iterdir()] == ["song.wav"]


def test_depths_by_any_name(shares, song):
    for subtype, codec in (("24bit", "pcm_s24le"), ("24-bit", "pcm_s24le"), ("PCM_24", "pcm_s24le"),
                           ("16 bits", "pcm_s16le"), ("FLOAT", "pcm_f32le"), (64, "pcm_f64le")):
        assert (
            probe(
                shares.separate_file(song, song.parent / "out", subtype=subtype, stems="bass")["outputs"][
                    "bass"
                ]
            ).codec
            == codec
        )


def test_an_output_that_is_a_file_is_refused_once(shares, song):
    with pytest.raises(UserError, match="is a file"): shares.separate_files([song], song)


# Models

def test_a_model_by_one_of_its_files(tmp_path, song):
    network = Baseline(hidden_size=3, window_length=256, hop_length=64)
    save_network(network, Recipe(network="baseline", network_args=network.args), tmp_path / "run")
    whole = Separator.from_pretrained(tmp_path / "run")
    for name in ("model.safetensors", "recipe.json"):
        separator = Separator.from_pretrained(tmp_path / "run" / name)
        assert separator.name == "run" and torch.equal(
            separator.separate(song)["bass"], whole.separate(song)["bass"]
        )
