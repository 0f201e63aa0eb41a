"""Decoding, mixing and loading: how fast songs become batches. Needs MUSDB18-7 (`MUSDB_PATH`); `make bench`
runs it."""
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from report import absent, report, row, seconds

from deepdemix.augmentation import Mixer
from deepdemix.data import find_musdb, prepare_musdb
from deepdemix.foundations.augmentation_cache import AugmentationCache
from deepdemix.foundations.codecs import read_streams
from deepdemix.foundations.store import Store


def decode(folder, out):
    "The whole data set against stempeg, per stem file."
    theirs = None
    files = sorted(Path(folder).rglob("*.stem.mp4"))
    ours = seconds(lambda: prepare_musdb(folder, out, progress=False))
    yield row("decode the whole data set", ours, "s", note=f"{len(files)} files")
    try:
        import stempeg
        theirs = seconds(lambda: [stempeg.read_stems(str(f)) for f in files[:8]]) / 8
        yield row("decode one stem file", ours / len(files), "s", "stempeg", theirs)
    except (ImportError, RuntimeError) as error: yield absent("decode one stem file", "stempeg", error)
    yield row("decode five streams of one file, one core", seconds(lambda: read_streams(files[0]), 8), "s",
              "stempeg", theirs)
    yield row("open the store", seconds(lambda: Store.open(out), 20) * 1000, "ms")


def scaper_rate(store, folder, count=12):
    """Coherent 5 s mixes of four stems per second that Scaper makes with pitch and tempo, as in the tutorial
    that the paper builds on."""
    np.Inf = np.inf
    import scaper
    import soundfile
    for i in range(4):
        for name, stem in zip(store.sources, store.stems(i)):
            path = Path(folder) / "foreground" / name / f"song{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, stem.mean(0).numpy(), store.sample_rate)
    (Path(folder) / "background").mkdir()
    def once(i):
        rng = np.random.default_rng(i)
        sc = scaper.Scaper(5.0, f"{folder}/foreground", f"{folder}/background", random_state=i)
        sc.ref_db, sc.sr, sc.n_channels = -20, store.sample_rate, 1
        start, pitch, tempo = rng.uniform(0, 1.8), rng.uniform(-2, 2), rng.uniform(0.8, 1.2)
        for name in store.sources:
            sc.add_event(label=("const", name),
                         source_file=("const", f"{folder}/foreground/{name}/song{i % 4}.wav"),
                         source_time=("const", start), event_time=("const", 0), event_duration=("const", 5.0),
                         snr=("uniform", -5, 5), pitch_shift=("const", pitch), time_stretch=("const", tempo))
        sc.generate(fix_clipping=True)
    once(count)
    return count / seconds(lambda: [once(i) for i in range(count)])


def rate(mixer, batch, count, start=0):
    "Mixes per second in batches of some size."
    def make():
        for k in range(start, start + count, batch): mixer.batch(batch, start=k)
    mixer.batch(batch, start=start)
    return count / seconds(make)


def epoch_rate(mixer, epoch=6000):
    "Mixes per second in the second epoch of a training, in which every copy of the bank is replaced once."
    if mixer.bank.shift:
        for song in range(len(mixer.store)): mixer.bank.get(song, 0, epoch)
    return rate(mixer, 16, epoch, epoch)


def mixing(store, theirs):
    "Mixes per second, against Scaper on the same machine."
    peer, mono = "Scaper", dict(channels=1, seed=0)
    for name, more in (("bank", {}), ("tape speeds", dict(shift="tied")),
                       ("no shift", dict(pitch=None, stretch=None))):
        yield row(f"mono mixes of 5 s on one core, an epoch with its {name}",
                  epoch_rate(Mixer(store, **mono, **more)), "1/s", peer, theirs, True)
    yield row("mono mixes of 5 s on one core, every draw shifted afresh",
              rate(Mixer(store, **mono, shift="exact"), 16, 48), "1/s", peer, theirs, True)
    ready = Mixer(store, **mono, refresh=10**9)
    for song in range(len(store)): ready.bank.get(song, 0, 0)
    for b in (1, 4, 16, 64, 128):
        yield row(f"the same, bank ready, batches of {b}", rate(ready, b, max(480, 8 * b)), "1/s")
    every = dict(coherent=0.5, swap=0.5, flip=0.5, gate=-50, mixup=0.2)
    yield row("an epoch with its bank, remixed, gated, swapped, flipped, mixed up",
              epoch_rate(Mixer(store, **mono, **every)), "1/s")
    yield row("bank ready, with shelves on every stem",
              rate(Mixer(store, **mono, pitch=None, stretch=None, eq=(-6, 6)), 16, 160), "1/s")


class Batches(torch.utils.data.Dataset):
    "The batches of a mixer by number."
    def __init__(self, mixer, size=16): self.mixer, self.size = mixer, size
    def __len__(self): return 12000 // self.size
    def __getitem__(self, i): return self.mixer.batch(self.size, start=i * self.size)


def loading(store, peer_rate):
    "Mixes per second through a loader, in the second of two epochs of 6,000."
    def once(workers, ahead=0):
        batches = Batches(
            Mixer(store, channels=1, seed=1,
                  cache=tempfile.mkdtemp(dir=store.path.parent) if workers or ahead else None, workers=ahead)
        )
        loader = torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=workers, worker_init_fn=lambda _: torch.set_num_threads(1)
        )
        for i, _ in enumerate(loader):
            if i == len(batches) // 2: began = time.perf_counter()
        return 6000 / (time.perf_counter() - began)
    yield row("an epoch with its bank rendered ahead by another process", once(0, 1), "1/s", "Scaper",
              peer_rate, True)
    for n in (0, 1, 2):
        yield row(
            f"an epoch with its bank through a loader, {n} workers", once(n), "1/s", "Scaper", peer_rate, True
        )


def soak(store, minutes):
    "Draw mixes for some minutes and watch the memory of this process."
    import psutil
    mixer, began, made, seen = Mixer(store, channels=1, refresh=1000), time.monotonic(), 0, []
    while time.monotonic() - began < 60 * minutes:
        mixer.batch(16, start=made)
        made += 16
        if len(seen) < (time.monotonic() - began) / 10:
            seen.append(psutil.Process().memory_info().rss / 2**20)
    third = len(seen) // 3
    yield row(f"mixes in {minutes:g} minutes, bank replaced every 1,000", made, "")
    yield row("memory, median of the last third", float(np.median(seen[-third:])), "MiB", "second third",
              float(np.median(seen[third:-third])), False)
    yield row("memory, most", max(seen), "MiB", note=f"{len(seen)} readings, 10 s apart")


def large(folder, gigabytes=30):
    "A store of many full-length stereo songs (sparse files): the cost of opening it and of reading from it."
    import json

    import psutil

    from deepdemix.audio import SOURCES
    from deepdemix.foundations.store import STORE_FORMAT
    frames, songs = 4 * 60 * 44100, []
    (Path(folder) / "songs").mkdir(parents=True)
    for k in range(round(gigabytes * 2**30 / (frames * 2 * 4 * 4))):
        made = np.lib.format.open_memmap(
            Path(folder) / "songs" / f"s{k}.npy", "w+", np.float32, (4, 2, frames)
        )
        del made
        songs.append(
            dict(title=f"song {k}", split="train", frames=frames, channels=2, sample_rate=44100,
                 present=["drums", "bass", "other", "vocals"], flags=[], mixture="sum", mixture_snr=None,
                 rms=[-200.0] * 4, peak=0.0, digest="", mixture_digest=None, dtype="float32",
                 scales=[1.0] * 5, file=f"s{k}")
        )
    (Path(folder) / "store.json").write_text(
        json.dumps(
            dict(format=STORE_FORMAT, sample_rate=44100, sources=list(SOURCES), songs=songs)
        )
    )
    store, process, rng = Store.open(folder), psutil.Process(), np.random.default_rng(0)
    before, most, reads = process.memory_info().rss, 0, 2000
    def read():
        nonlocal most
        for _ in range(reads):
            store.stems(int(rng.integers(len(store))), int(rng.integers(frames - 220500)), 220500)
            most = max(most, process.memory_info().rss - before)
    taken = seconds(read)
    yield row(f"open a store of {gigabytes} GiB ({len(store)} songs)",
              seconds(lambda: Store.open(folder), 20) * 1000, "ms")
    yield row("read 5 s of four stereo stems from it", taken / reads * 1000, "ms")
    yield row("memory that 2,000 reads added, at most", most / 2**20, "MiB")
    yield row("stereo bank of that store, 15 s of each song", AugmentationCache(store).need(), "GiB",
              note="rendered anew every 6,000 mixes")


def everything(folder, minutes=0):
    "All rows; with `minutes` those of the soak alone."
    path = f"{folder}/store"
    if minutes:
        prepare_musdb(find_musdb(), path, progress=False)
        yield from soak(Store.open(path).split("train"), minutes)
        return
    yield from decode(find_musdb(), path)
    train = Store.open(path).split("train")
    try: theirs = scaper_rate(train, f"{folder}/scaper")
    except ImportError as error:
        theirs = None
        yield absent("mono mixes of 5 s", "Scaper", error)
    else: yield row("mono mixes of 5 s, Scaper", theirs, "1/s")
    yield from mixing(train, theirs)
    yield from loading(train, theirs)
    yield from large(f"{folder}/large")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 0
    with tempfile.TemporaryDirectory() as folder:
        report("soak" if minutes else "data", everything(folder, minutes))
