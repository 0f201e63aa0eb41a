"Audio: what must hold for any length and any file, and what happens when a file is not what it should be."
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from hypothesis import example, given, settings, strategies as st

from deepdemix import audio
from deepdemix.audio import STFT, OverlapAdd, amplitude_to_db, overlap_add, overlap_add_blocks
from deepdemix.foundations.codecs import read, read_blocks, read_streams
from deepdemix.foundations.decoding import probe
from deepdemix.foundations.encoding import Writer, write
from deepdemix.foundations.files import (
    ChangedAudio,
    DamagedAudio,
    UserError,
    abandoned,
    atomic_path,
    hidden_name,
)
from deepdemix.foundations.waveforms import as_waveform, resample, resample_blocks, to_channels

quick = settings(max_examples=40, deadline=None, derandomize=True)
RATE = 44100


def noise(channels, time, seed=0):
    return torch.rand(channels, time, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


def melody(seconds=5.0, rate=RATE):
    "A sliding tone in stereo: every moment differs from every other, and codecs keep it well."
    t = torch.arange(round(seconds * rate)).double() / rate
    return torch.stack(
        [0.4 * torch.sin(6.28 * (300 + 40 * t) * t), 0.3 * torch.sin(6.28 * (500 - 20 * t) * t)]
    ).float()


def snr(x, y): return 10 * torch.log10(x.square().sum() / (x - y).square().sum())


def encode(path, streams, codec, rate=RATE, video=False, options=None, **format_options):
    "Write float streams (channels, time) with one of PyAV's encoders, or soundfile's for Ogg."
    if path.suffix == ".ogg":
        write(path, streams[0], rate)
        return path
    with av.open(str(path), "w", options={k: str(v) for k, v in format_options.items()}) as out:
        picture = out.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p") if video else None
        tracks = [out.add_stream(codec, rate=rate, layout="stereo", options=options or {}) for _ in streams]
        for track, x in zip(tracks, streams):
            track.codec_context.bit_rate = 192_000
            resampler = av.AudioResampler(
                format=track.codec.audio_formats[0].name, layout="stereo", rate=rate
            )
            for i in range(0, x.shape[1], 1024):
                frame = av.AudioFrame.from_ndarray(
                    x[:, i : i + 1024].contiguous().numpy(), format="fltp", layout="stereo"
                )
                frame.sample_rate, frame.pts = rate, i
                for f in resampler.resample(frame): out.mux(track.encode(f))
            out.mux(track.encode(None))
        if video:
            for i in range(10 * (streams[0].shape[1] // rate + 2)):
                f = av.VideoFrame.from_ndarray(np.full((32, 32, 3), i % 256, np.uint8), format="rgb24")
                f.pts = i
                out.mux(picture.encode(f))
            out.mux(picture.encode(None))
    return path


# ---- STFT

@quick
@given(st.integers(1, 6000), st.sampled_from([(512, 128), (512, 256), (511, 100), (64, 48), (4096, 1024)]),
       st.sampled_from(["hann", "sqrt_hann"]), st.integers(1, 3))
def test_stft_is_undone_exactly(length, sizes, window, channels):
    stft, x = STFT(*sizes, window), noise(channels, length)
    spectrogram = stft(x)
    assert spectrogram.shape == (stft.frames(length), stft.n_f, channels)
    assert (stft.inverse(spectrogram, length) - x).abs().max() < 2e-6
    assert stft.inverse(spectrogram).shape[-1] >= length


@quick
@given(st.integers(4096, 12000), st.sampled_from([(512, 128), (511, 100), (2048, 441), (4096, 1024)]),
       st.sampled_from(["hann", "sqrt_hann", "blackmanharris"]))
def test_stft_is_scipys(length, sizes, window):
    x, (size, hop) = noise(1, length), sizes
    w = scipy.signal.get_window(window.removeprefix("sqrt_"), size)
    w = np.sqrt(w) if window.startswith("sqrt_") else w
    theirs = scipy.signal.stft(x.double().numpy(), window=w, nperseg=size, noverlap=size - hop)[2].transpose(
        2, 1, 0
    )
    ours = STFT(size, hop, window)(x).numpy()
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).max() < 1e-6 * abs(theirs).max()


def test_stft_is_nussls(nussl):
    x = noise(2, 5 * RATE)
    signal = nussl.AudioSignal(
        audio_data_array=x.numpy(), sample_rate=RATE, stft_params=nussl.STFTParams(512, 128, "sqrt_hann")
    )
    theirs = signal.stft().transpose(1, 0, 2)
    stft = STFT()
    ours = stft(x)
    assert ours.shape == theirs.shape == (1724, 257, 2)
    assert abs(ours.numpy() - theirs).max() < 1e-6 * abs(theirs).max()
    assert abs(stft.inverse(ours, x.shape[1]).numpy() - signal.istft()).max() < 1e-5
    theirs_db = nussl.ml.networks.modules.AmplitudeToDB()(ours.abs())
    assert (amplitude_to_db(ours.abs()) - theirs_db).abs().max() < 1e-4


def test_stft_gradients_in_double_precision():
    stft = STFT(16, 4)
    x = noise(1, 37).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: torch.view_as_real(stft(x)), x)
    spectrogram = stft(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: stft.inverse(s, 37), spectrogram)


def test_stft_adds_nothing_to_a_state_dict_and_survives_half_precision():
    stft, x = STFT(), noise(1, 4000)
    expected = stft(x)
    assert not stft.state_dict()
    assert torch.equal(stft.half()(x), expected)
    assert (stft(x.bfloat16()) - expected).abs().max() < 1e-3


def test_stft_axes_of_stems():
    stft, stems = STFT(64, 16), noise(2 * 4 * 2, 500).view(2, 4, 2, 500)
    spectrogram = stft.stems(stems)
    assert spectrogram.shape == (2, stft.frames(500), 33, 2, 4)
    assert torch.equal(spectrogram[1, :, :, 0, 3], stft(stems[1, 3])[:, :, 0])
    assert (stft.inverse_stems(spectrogram, 500) - stems).abs().max() < 2e-6


@pytest.mark.cuda
def test_stft_on_a_gpu():
    stft, x = STFT(), noise(2, 3 * RATE)
    there = STFT().cuda()
    spectrogram = there(x.cuda())
    assert (spectrogram.cpu() - stft(x)).abs().max() < 1e-6
    assert (there.inverse(spectrogram, x.shape[1]).cpu() - x).abs().max() < 2e-6
    parts = overlap_add(lambda b: b[:, None], x, 9999, batch_size=4, device="cuda")
    assert parts.device.type == "cpu" and (parts[0] - x).abs().max() < 1e-6


# ---- overlap-add

layouts = st.tuples(st.integers(1, 4000), st.integers(20, 1500), st.floats(0, 0.8),
                    st.sampled_from([None, 0, 3]), st.sampled_from([1, 7]),
                    st.sampled_from(["linear", "cosine"]), st.integers(1, 4))


@quick
@given(layouts, st.integers(1, 999))
def test_overlap_add_gives_a_copy_back_and_streams_the_same(layout, block):
    length, chunk, overlap, context, align, fade, batch = layout
    sizes, x = set(), noise(2, length)

    def copy(b):
        sizes.add(b.shape[-1])
        return torch.stack([b, -2 * b], 1)

    options = dict(overlap=overlap, context=context, align=align, fade=fade, batch_size=batch)
    whole = overlap_add(copy, x, chunk, **options)
    assert sizes == {chunk}
    assert whole.shape == (2, 2, length)
    assert (whole[0] - x).abs().max() < 1e-6 and (whole[1] + 2 * x).abs().max() < 2e-6
    assert torch.equal(
        torch.cat(list(overlap_add_blocks(copy, x.split(block, -1), chunk, **options)), -1), whole
    )


def test_overlap_add_holds_no_more_than_its_chunks():
    adder, longest, given_out = OverlapAdd(lambda b: b[:, None], 1000, batch_size=2), 0, 0
    for block in noise(1, 100_000).split(300, -1):
        given_out += sum(x.shape[-1] for x in adder.push(block))
        longest = max(longest, adder.held.shape[-1] + sum(q[1].shape[-1] for q in adder.queue))
        assert adder.held.untyped_storage().nbytes() == 4 * adder.held.numel()
    given_out += sum(x.shape[-1] for x in adder.finish())
    assert given_out == 100_000
    assert longest <= 2 * 1000 + 1000 + 300


def test_overlap_add_throws_context_away():
    "A function that is wrong at the edges of its chunk is right everywhere but at the ends of the song."
    def rotten(b):
        y = b.clone()
        y[..., :50] = y[..., -50:] = 9.0
        return y[:, None]

    x = noise(1, 7777)
    y = overlap_add(rotten, x, 1000, context=50)[0]
    assert (y - x)[:, 50:-50].abs().max() < 1e-6
    assert (y[:, :50] == 9).all() and (y[:, -50:] == 9).all()


def test_overlap_add_of_a_network_of_finite_reach_is_that_of_the_whole():
    torch.manual_seed(0)
    filters = torch.nn.Conv1d(1, 2, 101, padding=50, bias=False)
    fn = lambda b: filters(b)[:, :, None]
    x = noise(1, 12345)
    whole = fn(x[None])[0]
    y = overlap_add(fn, x, 2000, context=50)
    assert 20 * torch.log10((y - whole).norm() / whole.norm()) < -120


def test_overlap_add_on_songs_shorter_than_a_chunk():
    seen = []
    fn = lambda b: (seen.append(b.shape[-1]), b[:, None])[1]
    x = noise(1, 300)
    assert torch.equal(overlap_add(fn, x, 1000)[0], x) and torch.equal(
        overlap_add(fn, x, 1000, pad=False)[0], x
    )
    assert seen == [1000, 300]


def test_overlap_add_says_what_is_wrong():
    with pytest.raises(UserError, match="empty"): overlap_add(lambda b: b[:, None], torch.zeros(1, 0), 100)
    with pytest.raises(UserError, match="longer chunks"):
        overlap_add(lambda b: b[:, None], noise(1, 500), 100, overlap=1.0)
    with pytest.raises(ValueError, match="fn must turn"): overlap_add(lambda b: b, noise(1, 500), 100)
    assert list(overlap_add_blocks(lambda b: b[:, None], iter([]), 100)) == []


# ---- resampling

@quick
@example(1, 44100, 16000, 1) # no sample is left
@given(st.integers(1, 5000), st.sampled_from([8000, 11025, 22050, 44100, 48000, 96000]),
       st.sampled_from([16000, 44100, 48000]), st.integers(1, 700))
def test_resampling_a_stream_is_resampling_the_whole(length, orig, new, block):
    x = noise(2, length)
    whole = resample(x, orig, new)
    assert abs(whole.shape[1] - length * new / orig) <= 0.5 + 1e-9
    if orig != new:
        blocks = list(resample_blocks(x.split(block, -1), orig, new))
        assert torch.equal(torch.cat([x[:, :0], *blocks], -1), whole)


def test_resampling_keeps_axes_and_delay():
    x = melody(1.0)
    stems = torch.stack([x, -x])[None]
    y = resample(stems, 44100, 48000)
    assert y.shape == (1, 2, 2, 48000) and torch.equal(y[0, 0], resample(x, 44100, 48000))
    back = resample(y[0, 0], 48000, 44100)
    assert (back - x)[:, 2000:-2000].abs().max() < 1e-4
    assert resample(torch.zeros(2, 0), 44100, 16000).shape == (2, 0)


# ---- reading and writing

@pytest.mark.parametrize(
    "name,subtype,channels",
    [("a.wav", "PCM_U8", 1), ("a.wav", "PCM_16", 2), ("a.wav", "PCM_24", 2), ("a.wav", "PCM_32", 1),
     ("a.wav", "FLOAT", 2), ("a.wav", "DOUBLE", 2), ("a.wav", "PCM_16", 8), ("a.flac", "PCM_16", 2),
     ("a.flac", "PCM_24", 6), ("a.aiff", "PCM_24", 2), ("a.ogg", "VORBIS", 2)],
)
def test_samples_are_soundfiles(tmp_path, name, subtype, channels):
    soundfile.write(tmp_path/name, noise(channels, 10007).numpy().T, 32000, subtype=subtype)
    expected, _ = soundfile.read(tmp_path/name, dtype="float32", always_2d=True)
    x, rate = read(tmp_path/name)
    assert rate == 32000 and x.shape == (channels, 10007) and x.dtype == torch.float32
    assert abs(x.numpy() - expected.T).max() <= (1e-5 if subtype == "VORBIS" else 0)
    assert probe(tmp_path/name).frames_estimate == 10007


@pytest.mark.parametrize(
    "name,codec",
    [("a.m4a", "aac"), ("a.m4a", "alac"), ("a.mkv", "flac"), ("a.mp4", "aac"), ("a.mp3", "libmp3lame")],
)
def test_music_keeps_its_place_in_every_container(tmp_path, name, codec):
    x = melody(2.0)
    try: encode(tmp_path/name, [x], codec, video=name in ("a.mkv", "a.mp4"))
    except av.FFmpegError as e: pytest.skip(f"this PyAV cannot write {codec}: {e}")
    y, rate = read(tmp_path/name)
    assert rate == RATE and abs(y.shape[1] - x.shape[1]) <= 4096
    n = min(x.shape[1], y.shape[1]) - 4096
    assert snr(x[:, 2048:n], y[:, 2048:n]) > 20
    assert torch.equal(torch.cat(list(read_blocks(tmp_path/name, 777)), -1), y)


@pytest.mark.parametrize(
    "codec,suffix",
    [("aac", "m4a"), ("flac", "flac"), ("pcm_s16le", "wav"), ("pcm_s24le", "wav"), ("libmp3lame", "mp3")],
)
def test_a_part_of_a_file_is_that_part(tmp_path, codec, suffix):
    path = encode(tmp_path/f"a.{suffix}", [melody(12.0)], codec)
    whole, _ = read(path)
    for start, duration in ((0, 1.0), (0.5, None), (5.25, 0.5), (10.7, 0.01), (11.9, 9.0)):
        first = round(start * RATE)
        last = None if duration is None else first + round(duration * RATE)
        assert torch.equal(read(path, start=start, duration=duration)[0], whole[:, first:last])
    with pytest.raises(UserError, match="nothing after 12.50 s"): read(path, start=12.5)


def test_channels_on_request(tmp_path):
    write(tmp_path/"a.wav", melody(0.5), RATE, "float32")
    assert torch.equal(read(tmp_path/"a.wav", channels=1)[0], melody(0.5).mean(0, keepdim=True))
    write(tmp_path/"m.wav", melody(0.5)[:1], RATE, "float32")
    assert torch.equal(read(tmp_path/"m.wav", channels=2)[0], melody(0.5)[[0, 0]])


def test_five_streams_in_one_pass(tmp_path):
    stems = [melody(1.0) * g for g in (1.0, 0.5, 0.25, -0.5, 0.1)]
    path = encode(tmp_path/"a.stem.mp4", stems, "aac")
    streams, rate = read_streams(path)
    assert rate == RATE and probe(path).streams == 5
    assert {s.shape for s in streams} == {streams[0].shape} and 0 <= streams[0].shape[1] - RATE < 1024
    for i, x in enumerate(streams):
        assert torch.equal(x, read(path, stream=i)[0])
        assert snr(stems[i][:, 2048:-2048], x[:, 2048:RATE - 2048]) > 20
    with pytest.raises(UserError, match="there is no stream 5"): read(path, stream=5)


@pytest.mark.parametrize(
    "name", ["A: song %03d #1?.wav", "señal ünïcode 音.wav", "-x.wav", "a b'c\"d.WAV", "file:x.wav"]
)
def test_odd_names(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(name, noise(1, 100), 8000)
    assert read(name)[0].shape == (1, 100) and os.listdir() == [name]


# ---- files that are not what they should be

def problem(path, **kwargs):
    with pytest.raises(UserError) as e: read(path, **kwargs)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError): list(read_blocks(path))
    return str(e.value)


def test_what_is_no_audio_file(tmp_path):
    assert "no such file" in problem(tmp_path/"missing.wav")
    assert "is a folder" in problem(tmp_path)
    (tmp_path/"empty.wav").touch()
    assert "empty (0 bytes)" in problem(tmp_path/"empty.wav")
    (tmp_path/"text.mp3").write_text("not music at all, " * 500)
    assert "not an audio file" in problem(tmp_path/"text.mp3")
    (tmp_path/"noise.wav").write_bytes(np.random.default_rng(0).bytes(20000))
    problem(tmp_path/"noise.wav")
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    problem(tmp_path/"list.m3u8")
    soundfile.write(tmp_path/"zero.wav", np.zeros((0, 2)), RATE)
    assert "no sound in it" in problem(tmp_path/"zero.wav")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path/"pipe.wav")
        assert "regular file" in problem(tmp_path/"pipe.wav")


def test_a_video_without_sound(tmp_path):
    with av.open(str(tmp_path/"a.mp4"), "w") as out:
        track = out.add_stream("mpeg4", rate=10, width=32, height=32, pix_fmt="yuv420p")
        for _ in range(5):
            out.mux(track.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        out.mux(track.encode(None))
    assert "no audio in it" in problem(tmp_path/"a.mp4")


def lenient(path):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        x, _ = read(path, strict=False)
    assert [w.category for w in heard] == [DamagedAudio] and str(path) in str(heard[0].message)
    return x


CUT = [("a.wav", "pcm_s16le", {}), ("a.flac", "flac", {}), ("a.mp3", "libmp3lame", {}),
       ("a.ogg", "vorbis", {}), ("a.m4a", "aac", {"movflags": "faststart"}), ("a.mka", "flac", {})]


@pytest.mark.parametrize("name,codec,options", CUT)
@pytest.mark.parametrize("part", [0.5, 0.97])
def test_a_file_that_was_cut_off(tmp_path, name, codec, options, part):
    path = encode(tmp_path/name, [melody()], codec, **options)
    whole, _ = read(path)
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * part)])
    assert "damaged or cut off" in problem(path)
    rest = lenient(path)
    assert 0.3 * part * whole.shape[1] < rest.shape[1] < whole.shape[1]
    assert (rest - whole[:, :rest.shape[1]])[:, :-4096].abs().max() < 1e-6


def test_an_mp4_without_its_table_cannot_be_read(tmp_path):
    path = encode(tmp_path/"a.m4a", [melody(1.0)], "aac")
    path.write_bytes(path.read_bytes()[:-2000])
    assert "cut off" in problem(path)


@pytest.mark.parametrize("name,codec,options", [c for c in CUT if c[0] in ("a.flac", "a.m4a")])
def test_bytes_overwritten_in_the_middle_leave_the_rest_in_time(tmp_path, name, codec, options):
    path = encode(tmp_path/name, [melody()], codec, **options)
    whole, _ = read(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle:middle + 1500] = np.random.default_rng(1).bytes(1500)
    path.write_bytes(data)
    assert "damaged or cut off" in problem(path)
    rest = lenient(path)
    assert rest.shape == whole.shape
    assert torch.equal(rest[:, :RATE], whole[:, :RATE]) and (rest - whole)[:, -RATE:].abs().max() < 1e-4


FUZZ = """
import sys, warnings
import numpy as np
from pathlib import Path
from deepdemix.foundations.files import UserError
from deepdemix.foundations.decoding import probe
from deepdemix.foundations.codecs import read
warnings.simplefilter("ignore")
rng, count = np.random.default_rng(0), 0
for path in map(Path, sys.argv[1:]):
    whole = path.read_bytes()
    for k in range(12):
        data, at = bytearray(whole), int(rng.integers(len(whole)))
        if k % 4 == 0: del data[at:]
        elif k % 4 == 1: data[at:at + 300] = rng.bytes(300)
        elif k % 4 == 2: data[at:at] = rng.bytes(2000)
        else:
            for place in rng.integers(min(len(data), 300), size=10): data[place] = rng.integers(256)
        path.write_bytes(data)
        for strict in (True, False):
            try:
                x, rate = read(path, strict=strict)
                info = probe(path)
                assert (info.sample_rate, info.channels) == (rate, len(x)), (path, k, info)
            except UserError as e: assert "\\n" not in str(e)
            count += 1
print(count)
"""


def test_bytes_at_random_give_sound_or_one_line(tmp_path):
    paths = [tmp_path/f"a.{suffix}" for suffix in ("wav", "flac", "ogg", "mp3", "aiff", "w64", "m4a", "mat")]
    for path in paths[:4]: write(path, melody(0.5), RATE)
    for path in paths[4:6]: soundfile.write(path, melody(0.5).numpy().T, RATE)
    encode(paths[6], [melody(0.5)], "aac")
    soundfile.write(paths[7], melody(0.5).numpy().T, RATE, format="MAT5", subtype="FLOAT")
    out = subprocess.run([sys.executable, "-c", FUZZ, *map(str, paths)], capture_output=True, text=True)
    assert out.stdout.strip() == str(24 * len(paths)) and not out.stderr.strip(), (
        out.returncode, out.stderr[-2000:],
    )


def test_tags_after_the_music_are_no_damage(tmp_path):
    path = encode(tmp_path/"a.mp3", [melody(1.0)], "libmp3lame")
    (whole, _), music = read(path), path.read_bytes()
    for extra in (1000, 3000, 50_000):
        path.write_bytes(music + b"APETAGEX" + bytes(extra) + b"TAG" + bytes(125))
        x, _ = read(path)
        assert torch.equal(x[:, :RATE - 2048], whole[:, :RATE - 2048])


def test_a_wav_whose_writer_could_not_know_its_size(tmp_path):
    write(tmp_path/"a.wav", melody(1.0), RATE)
    whole, data = read(tmp_path/"a.wav")[0], bytearray((tmp_path/"a.wav").read_bytes())
    for size in (b"\xff\xff\xff\xff", bytes(4)):
        data[4:8] = data[40:44] = size
        (tmp_path/"a.wav").write_bytes(data)
        assert torch.equal(read(tmp_path/"a.wav")[0], whole)


# ---- files as people have them

def quietly(path, category=ChangedAudio, **kwargs):
    "What a strict reader makes of a file, and its one warning."
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        x, rate = read(path, **kwargs)
    assert [w.category for w in heard] == [category] and str(path) in str(heard[0].message)
    return x, rate, str(heard[0].message)


@pytest.mark.parametrize("name", ["a.mp3", "a.wav", "a.mp4", "a.mka"])
def test_tags_that_are_not_utf_8_are_no_damage(tmp_path, name):
    path, x = tmp_path/name, melody(1.0)
    if name == "a.wav":
        with soundfile.SoundFile(path, "w", RATE, 2) as f:
            f.title = "Caf\u00e9 Solo"
            f.write(x.numpy().T)
    elif name == "a.mp3": write(path, x, RATE)
    else: encode(path, [x], {"a.mp4": "aac", "a.mka": "flac"}[name])
    if name == "a.mp3":
        path.write_bytes(path.read_bytes() + b"TAG" + b"Caf\xe9 Solo".ljust(30, b"\0") + bytes(94) + b"\xff")
    elif name in ("a.mp4", "a.mka"):
        with av.open(str(tmp_path/f"tagged{path.suffix}"), "w") as out, av.open(str(path)) as plain:
            out.metadata["title"] = "Caf\u00e9 Solo"
            track = out.add_stream_from_template(plain.streams.audio[0])
            for packet in plain.demux(audio=0):
                if packet.dts is not None:
                    packet.stream = track
                    out.mux(packet)
        path = tmp_path/f"tagged{path.suffix}"
    data = path.read_bytes()
    path.write_bytes(data.replace("Caf\u00e9 Solo".encode(), b"Caf\xe9 Sol\xf3 "))
    assert b"Caf\xe9" in path.read_bytes()
    assert probe(path).tags["title"].startswith("Caf\u00e9 Sol")
    y, rate = read(path)
    assert rate == RATE and snr(x[:, 2048:RATE - 4096], y[:, 2048:RATE - 4096]) > 20
    assert torch.equal(read_streams(path)[0][0], y)


@pytest.mark.parametrize(
    "name,subtype,rf64",
    [("a.wav", "PCM_16", False), ("a.wav", "FLOAT", False), ("a.wav", "IMA_ADPCM", False),
     ("a.wav", "PCM_24", True)],
)
def test_a_whole_wav_is_whole_whatever_its_riff_size(tmp_path, name, subtype, rf64):
    path = tmp_path/name
    soundfile.write(path, melody(1.0).numpy().T, RATE, subtype=subtype, format="RF64" if rf64 else "WAV")
    whole, data = read(path)[0], path.read_bytes()
    at, wide = (20, 8) if rf64 else (4, 4)
    size = int.from_bytes(data[at:at + wide], "little")
    for said in (size + 8, size + 1000, size - 8, size - 40, 0):
        path.write_bytes(data[:at] + said.to_bytes(wide, "little") + data[at + wide:])
        assert torch.equal(read(path)[0], whole), said
    path.write_bytes(data[:len(data) * 3 // 4])
    assert "bytes are missing" in problem(path)


@pytest.mark.parametrize("name", ["a.wav", "a.w64", "a.aiff"])
def test_what_is_cut_is_cut_whatever_its_riff_size(tmp_path, name):
    path = tmp_path/name
    soundfile.write(path, melody(1.0).numpy().T, RATE)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-400])
    assert "400 bytes are missing" in problem(path)
    if name != "a.wav": return
    data[4:8] = (len(data) - 2000).to_bytes(4, "little")
    path.write_bytes(data[:-400])
    assert "400 bytes are missing" in problem(path)
    path.write_bytes(data[:20])
    problem(path)


def test_a_wav_as_long_as_its_header_says_is_whole_whatever_its_data_size(tmp_path):
    write(tmp_path/"a.wav", melody(1.0), RATE)
    whole, data = read(tmp_path/"a.wav")[0], bytearray((tmp_path/"a.wav").read_bytes())
    for extra in (8, 36, 4000):
        data[40:44] = (len(data) - 44 + extra).to_bytes(4, "little")
        (tmp_path/"a.wav").write_bytes(data)
        assert torch.equal(read(tmp_path/"a.wav")[0], whole)


def tone(rate, channels, seconds=2.0):
    "A tone of 441 Hz, a whole number of periods."
    t = torch.arange(round(seconds * rate)).double() / rate
    return (0.4 * torch.sin(2 * torch.pi * 441 * t)).float().repeat(channels, 1)


def pitch(x, rate):
    "Where the spectrum of a mono excerpt is highest, in Hz."
    return int(torch.fft.rfft(x * torch.hann_window(len(x))).abs().argmax()) * rate / len(x)


@pytest.mark.parametrize(
    "suffix,parts",
    [("flac", ((44100, 2), (48000, 2))), ("mp3", ((44100, 2), (48000, 2))), ("mp3", ((44100, 2), (44100, 1))),
     ("mp3", ((44100, 1), (44100, 2))), ("mp3", ((48000, 1), (32000, 2), (48000, 1)))],
)
def test_a_stream_that_changes_goes_on_at_the_rate_and_channels_of_its_first_frame(tmp_path, suffix, parts):
    data = b""
    for k, (rate, channels) in enumerate(parts):
        write(tmp_path/f"{k}.{suffix}", tone(rate, channels), rate)
        data += (tmp_path/f"{k}.{suffix}").read_bytes()
    path = tmp_path/f"joined.{suffix}"
    path.write_bytes(data)
    x, rate, said = quietly(path)
    assert (rate, len(x)) == parts[0] and abs(x.shape[1] / rate - 2 * len(parts)) < 0.15 * len(parts)
    assert (probe(path).sample_rate, probe(path).channels) == parts[0]
    assert (f"from {parts[0][0]} Hz, {parts[0][1]} channel" in said
            and f"to {parts[1][0]} Hz, {parts[1][1]} channel" in said)
    for k in range(len(parts)):
        middle = x[:, round((2 * k + 0.6) * rate):round((2 * k + 1.6) * rate)]
        for row in middle: assert abs(pitch(row, rate) - 441) < 1 and 0.39 < row.abs().max() < 0.42
    blocks = torch.cat(list(read_blocks(path, 5000)), 1)
    assert torch.equal(blocks, x)
    assert quietly(path, sample_rate=16000, channels=1)[0].shape == (1, round(x.shape[1] * 16000 / rate))

def test_a_stream_that_changes_again_and_again_is_said_once(tmp_path):
    for channels in (1, 2): write(tmp_path/f"{channels}.mp3", tone(44100, channels, 0.3), 44100)
    path = tmp_path/"a.mp3"
    path.write_bytes(b"".join((tmp_path/f"{1 + k % 2}.mp3").read_bytes() for k in range(7)))
    x, rate, said = quietly(path)
    assert (len(x) == 1 and x.shape[1] > 7 * 0.3 * rate
            and "5 more times later; all of it is read as 44100 Hz, 1 channel" in said)


@pytest.mark.parametrize("tag", ["title", "cover", "APE", "ID3v1", "all"])
def test_tags_between_joined_mp3s_are_no_damage(tmp_path, tag):
    syncsafe = lambda n: bytes(n >> s & 127 for s in (21, 14, 7, 0))
    id3 = (lambda name, body: b"ID3\x04\x00\x00" + syncsafe(10 + len(body)) + name + syncsafe(len(body))
           + bytes(2) + body)
    item = (8).to_bytes(4, "little") + bytes(4) + b"Title\0Songtext"
    ape = [
        b"APETAGEX" + b"".join(x.to_bytes(4, "little") for x in (2000, 32 + len(item), 1, flags)) + bytes(8)
        for flags in (0xA0000000, 0x80000000)
    ]
    tags = dict(title=id3(b"TIT2", b"\x03hello"), cover=id3(b"APIC", np.random.default_rng(0).bytes(100_000)),
                APE=ape[0] + item + ape[1], ID3v1=b"TAG" + bytes(125))
    tags["all"] = tags["APE"] + tags["ID3v1"] + tags["cover"]
    write(tmp_path/"a.mp3", tone(44100, 2), 44100)
    data = (tmp_path/"a.mp3").read_bytes()
    (tmp_path/"joined.mp3").write_bytes(tags["title"] + data + tags[tag] + data)
    x, rate = read(tmp_path/"joined.mp3")
    assert rate == 44100 and abs(x.shape[1] - 4 * rate) < 2 * 3 * 1152 and x.abs().max() < 0.45
    for k in (0.5, 2.6): assert abs(pitch(x[0, round(k * rate):round((k + 1) * rate)], rate) - 441) < 1


def test_what_libsndfile_alone_can_read(tmp_path):
    x = melody(1.0)
    for name, subtype in (("a.mat", "FLOAT"), ("a.sd2", "PCM_24"), ("a.paf", "PCM_24")):
        try:
            soundfile.write(
                tmp_path / name, x.numpy().T, RATE, subtype=subtype, format={"a.mat": "MAT5"}.get(name)
            )
        except soundfile.SoundFileError as e: pytest.skip(f"this libsndfile cannot write {name}: {e}")
        y, rate = read(tmp_path/name)
        assert rate == RATE and y.shape == x.shape and (y - x).abs().max() < 2**-18
        assert torch.equal(torch.cat(list(read_blocks(tmp_path / name, 999)), 1), y) and torch.equal(
            read_streams(tmp_path / name)[0][0], y
        )
        assert torch.equal(read(tmp_path/name, start=0.5, duration=0.25)[0], y[:, 22050:33075])
        assert (probe(tmp_path/name).frames_estimate, probe(tmp_path/name).channels) == (RATE, 2)
        with pytest.raises(UserError, match="not an audio file|no audio in it|there is no stream 1"):
            read(tmp_path/name, stream=1)


# ---- arrays and rates as people have them

@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 50), np.int16), torch.zeros(2, 50, dtype=torch.int32), np.zeros((2, 50), bool),
     np.zeros((2, 50), complex), [[1, 2], [3, 4]], np.zeros((2, 3, 4)), [[0.5], [0.5, 0.5]], 0.5, "song"],
)
def test_what_is_no_waveform_is_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="a waveform (holds floats|has the shape)") as e:
        write(tmp_path/"a.wav", wrong, 8000)
    assert str(tmp_path/"a.wav") in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError), Writer(tmp_path/"b.wav", 8000, 2) as w: w.write(wrong)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:, ::-1], lambda x: x[::-1], lambda x: x.astype(">f4"), lambda x: x.astype(np.float16),
     lambda x: x.astype(">f8")[:, ::2], lambda x: np.asfortranarray(x), lambda x: x.tolist(),
     lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape), lambda x: x[:, :1], lambda x: x[0]],
)
def test_any_array_of_floats_is_a_waveform(tmp_path, change):
    x = change(np.ascontiguousarray(noise(2, 1000).numpy()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path/"a.wav", x, 8000, "float32")
    expected = np.atleast_2d(np.asarray(x, np.float32))
    assert np.array_equal(read(tmp_path / "a.wav")[0].numpy(), expected) and np.array_equal(
        as_waveform(x).float().numpy(), expected
    )


@pytest.mark.parametrize("rate", [0, -1, "44100", 44100.5, float("nan"), float("inf"), True])
def test_what_is_no_sample_rate_is_refused_everywhere(tmp_path, rate):
    x = noise(1, 100)
    write(tmp_path/"a.wav", x, 8000)
    for call in (lambda: write(tmp_path / "b.wav", x, rate), lambda: resample(x, rate, 8000),
                 lambda: resample(x, 8000, rate), lambda: next(resample_blocks([x], 8000, rate)),
                 lambda: read(tmp_path / "a.wav", sample_rate=rate),
                 lambda: next(read_blocks(tmp_path / "a.wav", sample_rate=rate))):
        with pytest.raises(UserError, match="whole number of Hz"): call()
    assert os.listdir(tmp_path) == ["a.wav"]
    write(tmp_path/"c.wav", x, np.int64(8000))
    assert read(tmp_path/"c.wav", sample_rate=8000.0)[1] == 8000


def test_numbers_that_mean_nothing_are_refused(tmp_path):
    write(tmp_path/"a.wav", noise(1, 100), 8000)
    for start, duration in ((-1, None), (0, -1), (float("nan"), None), (0, float("inf"))):
        with pytest.raises(UserError, match="is in seconds from 0 on"):
            read(tmp_path/"a.wav", start=start, duration=duration)
    with pytest.raises(UserError, match="at least one sample"): next(read_blocks(tmp_path/"a.wav", block=0))
    for channels in (0, -1):
        with pytest.raises(UserError, match="at least one channel"): to_channels(noise(1, 10), channels)
    with pytest.raises(UserError, match="divide by full scale"):
        resample(torch.zeros(1, 100, dtype=torch.int16), 8000, 16000)


# ---- hidden files of several machines

def test_hidden_names_tell_whose_they_are(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = hidden_name("separating")
    theirs = mine.replace(f"-{os.getpid()}-", f"-{ended.pid}-")
    assert (not abandoned(tmp_path / mine) and abandoned(tmp_path / theirs)
            and not abandoned(tmp_path / ".separating-x1y2z3"))
    assert abandoned(tmp_path/f"{theirs}.part.wav") and hidden_name() != hidden_name()
    monkeypatch.setattr("socket.gethostname", lambda: "another machine")
    assert not abandoned(tmp_path/theirs)
    with atomic_path(tmp_path/"a.wav") as part:
        part.touch()
        assert "another-machine" in part.name and f"-{os.getpid()}-" in part.name


# ---- writing

def test_nothing_is_left_of_a_file_that_failed(tmp_path):
    write(tmp_path/"a.wav", noise(1, 100), 8000)
    before = (tmp_path/"a.wav").read_bytes()
    with pytest.raises(RuntimeError):
        with Writer(tmp_path/"a.wav", 8000, 1) as w:
            w.write(noise(1, 50))
            raise RuntimeError
    with pytest.raises(UserError, match="not numbers"):
        write(tmp_path/"a.wav", torch.full((1, 5), torch.nan), 8000)
    with pytest.raises(UserError, match="cannot write 44,100 Hz"):
        write(tmp_path/"b.opus", noise(1, 100), 44100)
    with pytest.raises(UserError, match="is a folder"):
        (write(tmp_path, noise(1, 100), 8000) if tmp_path.suffix == ".wav"
         else atomic_path(tmp_path).__enter__())
    assert os.listdir(tmp_path) == ["a.wav"] and (tmp_path/"a.wav").read_bytes() == before


@pytest.mark.parametrize(
    "name,rate,channels",
    [("a.wav", 8000, 1), ("a.wav", 192000, 2), ("a.flac", 96000, 2), ("a.ogg", 44100, 2), ("a.mp3", 48000, 1),
     ("a.mp3", 44100, 2), ("a.opus", 48000, 2)],
)
def test_what_is_written_is_as_long_when_read(tmp_path, name, rate, channels):
    x = melody(1.37, rate)[:channels]
    write(tmp_path/name, x, rate)
    y, r = read(tmp_path/name)
    assert r == rate and y.shape == x.shape
    assert snr(x, y) > 20


def test_mp3_names_wav_where_it_cannot(tmp_path):
    for rate, channels in ((96000, 2), (44100, 6)):
        with pytest.raises(UserError, match="write wav instead"):
            write(tmp_path/"a.mp3", noise(channels, 1000), rate)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_past_its_limit_a_wav_goes_on_as_rf64(tmp_path, subtype, monkeypatch):
    x = noise(2, 300_000)
    write(tmp_path/"small.wav", x, RATE, subtype)
    monkeypatch.setattr(Writer, "limit", 700_000)
    write(tmp_path/"large.wav", x, RATE, subtype)
    assert (soundfile.info(tmp_path / "small.wav").format == "WAV"
            and soundfile.info(tmp_path / "large.wav").format == "RF64")
    assert torch.equal(read(tmp_path/"large.wav")[0], read(tmp_path/"small.wav")[0])
    assert sorted(os.listdir(tmp_path)) == ["large.wav", "small.wav"]


def test_the_same_sound_makes_the_same_bytes(tmp_path, monkeypatch):
    for name, clock in (("a.wav", "1"), ("b.wav", "2")): write(tmp_path/name, noise(2, 5000), RATE, "FLOAT")
    data = (tmp_path/"a.wav").read_bytes()
    assert data == (tmp_path/"b.wav").read_bytes() and b"PEAK" not in data[:200]


FULL = """
import resource, signal, sys, torch
from deepdemix.foundations.encoding import write
from deepdemix.foundations.files import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for path in sys.argv[1:]:
    try: write(path, torch.rand(2, 200_000) - 0.5, 44100)
    except UserError as e: print("USER", e)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_said_in_one_line(tmp_path):
    paths = [str(tmp_path/f"a.{suffix}") for suffix in ("wav", "flac", "ogg", "mp3")]
    out = subprocess.run([sys.executable, "-c", FULL, *paths], capture_output=True, text=True)
    lines = out.stdout.splitlines()
    assert len(lines) == 4, out.stderr[-500:]
    for path, line in zip(paths, lines): assert line.startswith(f"USER {path}: cannot")
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_takes_no_files(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="permission denied"): write(tmp_path/"a.wav", noise(1, 10), 8000)


# ---- the rest

def test_importing_audio_loads_nothing_heavy():
    code = ("import sys, deepdemix.audio; print(sorted({'av', 'soundfile', 'soxr', 'matplotlib', 'scipy',"
            " 'IPython', 'lightning'} & set(sys.modules)))")
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_pictures_of_odd_sounds():
    import matplotlib
    matplotlib.use("Agg")
    audio.show_waveform(noise(1, 3))
    audio.show_spectrogram(torch.zeros(1, 100))
    assert len(audio.show_stems(noise(4, 500)[:, None]).axes) == 4
    assert len(audio.player(noise(2, 8000), 8000, rate=4000, seconds=0.5, mono=True).data) == 44 + 2 * 2000
    matplotlib.pyplot.close("all")


def stempeg_song():
    stempeg = pytest.importorskip("stempeg")
    if not shutil.which("ffmpeg"): pytest.skip("stempeg needs the ffmpeg program")
    return stempeg, next((Path(stempeg.__file__).parent/"data").glob("*.stem.mp4"))


def test_stems_are_stempegs():
    stempeg, path = stempeg_song()
    theirs, rate = stempeg.read_stems(str(path))
    streams, ours = read_streams(path)
    assert ours == rate and len(streams) == 5
    for x, y in zip(streams, theirs):
        assert x.shape == y.T.shape and abs(x.numpy() - y.T).max() < 1e-6


@pytest.mark.musdb
def test_musdb_songs_are_stempegs(musdb_path):
    stempeg, _ = stempeg_song()
    path = sorted(musdb_path.glob("train/*.stem.mp4"))[0]
    theirs, _ = stempeg.read_stems(str(path))
    streams, _ = read_streams(path)
    assert torch.stack(streams).shape == (5, 2, theirs.shape[1])
    assert abs(torch.stack(streams).numpy() - theirs.transpose(0, 2, 1)).max() < 1e-6


@pytest.mark.musdb
def test_musdb_previews_are_whole(musdb_path):
    files = sorted(musdb_path.glob("train/*.stem.mp4"))[:3] + sorted(musdb_path.glob("test/*.stem.mp4"))[:2]
    for path in files:
        info = probe(path)
        streams, rate = read_streams(path)
        assert (rate, info.streams) == (RATE, 5)
        assert {s.shape for s in streams} == {streams[0].shape} and 0 <= streams[0].shape[
            1
        ] - info.frames_estimate < 1024
        assert torch.equal(torch.cat(list(read_blocks(path, 50_000, stream=3)), -1), streams[3])
        mixture, total = streams[0], sum(streams[1:])
        assert snr(mixture, total) > 5


MEMORY = """
import sys, resource, torch
from deepdemix.foundations.codecs import read_blocks
from deepdemix.foundations.encoding import Writer
from deepdemix.audio import overlap_add_blocks
torch.set_num_threads(1)
fn = lambda b: torch.stack([b] * 4, 1)
def through(seconds):
    with Writer(sys.argv[1], 44100, 2) as w:
        for _ in range(seconds): w.write(torch.rand(2, 44100) - 0.5)
    with Writer(sys.argv[2], 44100, 8) as w:
        for x in overlap_add_blocks(fn, read_blocks(sys.argv[1]), 5 * 44100): w.write(x.flatten(0, 1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(through(120), through(900))
"""


@pytest.mark.slow
def test_an_hours_song_takes_the_memory_of_a_short_one(tmp_path):
    out = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "a.wav"), str(tmp_path / "b.wav")],
                         capture_output=True, text=True, check=True)
    short, long = map(int, out.stdout.split())
    assert long - short < 40_000
