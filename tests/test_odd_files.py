"Odd files on their way through the package, from the file to the stems."
import warnings

import pytest
import soundfile
import torch
from test_separation import Shares, noise

from deepdemix.audio import SOURCES
from deepdemix.data import prepare_stems
from deepdemix.foundations.codecs import read
from deepdemix.foundations.encoding import write
from deepdemix.foundations.files import ChangedAudio
from deepdemix.separation import Separator

RATE = 44100


def latin_1(folder):
    "A wav whose title is no UTF-8."
    path = folder / "latin.wav"
    with soundfile.SoundFile(path, "w", RATE, 2) as f:
        f.title = "Café Solo"
        f.write(noise(2, RATE).numpy().T)
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9 "))
    return path


def eight_too_many(folder):
    "A whole wav whose header counts eight bytes too many."
    path = folder / "eight.wav"
    write(path, noise(2, RATE), RATE)
    data = path.read_bytes()
    path.write_bytes(data[:4] + len(data).to_bytes(4, "little") + data[8:])
    return path


def matlab(folder):
    "A file that only libsndfile reads."
    path = folder / "song.mat"
    soundfile.write(path, noise(2, RATE).numpy().T, RATE, subtype="FLOAT", format="MAT5")
    return path


def joined(folder):
    "Two mp3s in one, of other rates and channels."
    for k, (channels, rate) in enumerate(((2, 44100), (1, 48000))):
        write(folder / f"{k}.mp3", noise(channels, rate // 2), rate)
    path = folder / "joined.mp3"
    path.write_bytes(b"".join((folder / f"{k}.mp3").read_bytes() for k in range(2)))
    for k in range(2): (folder / f"{k}.mp3").unlink()
    return path


MADE = [latin_1, eight_too_many, matlab, joined]


@pytest.mark.parametrize("make", MADE)
def test_odd_files_are_separated_whole(tmp_path, make):
    path = make(tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        made = Separator(Shares(sample_rate=RATE)).separate_file(path, tmp_path / "out", subtype="float32")
        mixture, rate = read(path)
    assert (made["damage"] is None and made["frames"] == mixture.shape[1]
            and made["sample_rate"] == rate == RATE and made["channels"] == 2)
    assert abs(made["duration"] - 1) < 0.1 and {w.category for w in heard} == (
        {ChangedAudio} if make is joined else set()
    )
    stems = {name: read(file)[0] for name, file in made["outputs"].items()}
    assert torch.allclose(sum(stems.values()), mixture, atol=1e-4)


@pytest.mark.parametrize("make", MADE)
def test_odd_files_are_prepared_whole(tmp_path, make):
    (tmp_path / "in" / "song").mkdir(parents=True)
    path = make(tmp_path)
    for name in SOURCES: (tmp_path / "in" / "song" / f"{name}{path.suffix}").write_bytes(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store, (expected, _) = prepare_stems(tmp_path / "in", tmp_path / "out", progress=False), read(path)
    assert torch.equal(store.stems(0), expected.expand(4, -1, -1))
    assert len(store.songs[0].flags) == (4 if make is joined else 0)
