"""Separation: stages of the default model and Hybrid Transformer Demucs on one file, and an hour in flat
memory; `make bench` runs it."""
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
from report import absent, report, row, seconds

from deepdemix.foundations.codecs import read
from deepdemix.foundations.cores import available_cores
from deepdemix.foundations.encoding import write
from deepdemix.foundations.toy_band import toy_song
from deepdemix.metrics import sdr
from deepdemix.separation import Separator
from deepdemix.serving.export import load_separator


def htdemucs(path, out):
    "The published size with random weights: reads, separates as its own command does, writes."
    from demucs.apply import apply_model
    from demucs.htdemucs import HTDemucs
    model = HTDemucs(sources=["drums", "bass", "other", "vocals"]).eval()
    song, rate = read(path)
    with torch.inference_mode(): stems = apply_model(model, song[None], shifts=0, split=True, overlap=0.25)[0]
    for name, stem in zip(model.sources, stems): write(f"{out}/{name}.wav", stem / stem.abs().max(), rate)


def stages(path, out, duration):
    "Where the time goes, and the whole against HTDemucs in the same run."
    separator = Separator.from_pretrained("default")
    song, rate = read(path)
    stems = separator.separate(song, rate)
    def encode(format):
        for name, stem in stems.items(): write(f"{out}/{name}.{format}", stem, rate)
    parts = {
        "decode": lambda: read(path), "network, chunks and overlap": lambda: separator.separate(song, rate),
    } | {f"write four stems as {f}": lambda f=f: encode(f) for f in ("wav", "flac", "mp3")}
    for what, call in parts.items(): yield row(what, seconds(call, 3) / duration, "of real time")
    whole = seconds(lambda: separator.separate_file(path, out, overwrite=True), 3) / duration
    try:
        yield row("end to end, wav out", whole, "of real time", "HTDemucs, random weights",
                  seconds(lambda: htdemucs(path, out)) / duration)
    except ImportError as error:
        yield row("end to end, wav out", whole, "of real time")
        yield absent("end to end", "demucs", error)


def runtimes(song, repeats=5):
    "The default on 20 seconds with one thread: onnxruntime beside PyTorch, in turns; the medians."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {name: load_separator("default", name, device="cpu", threads=1) for name in ("torch", "onnx")}
        times = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                times[name].append(seconds(lambda: run(song[:, :20 * 44100]), 1) / 20)
    finally: torch.set_num_threads(before)
    yield row(
        "onnxruntime, one thread", median(times["onnx"]), "of real time", "PyTorch", median(times["torch"])
    )


@contextlib.contextmanager
def busy(processes):
    "A block beside so many processes that never rest."
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try: yield
    finally:
        for other in others: other.kill()
        for other in others: other.wait()


def cost(separator, song):
    "Seconds on the clock and of processor time, of the process and all its threads, for one separation."
    clock, before = time.perf_counter(), os.times()
    separator(song)
    after = os.times()
    return time.perf_counter() - clock, after.user + after.system - before.user - before.system


def machines(song, rate, seconds=60, others=4):
    "A minute on one core and on all that may be used, alone and beside busy processes; in turns."
    cores, song = max(2, available_cores()), song[:, :seconds * rate]
    runs = {n: Separator.from_pretrained("default", device="cpu", threads=n) for n in (1, cores)}
    runs[1](song[:, :5 * rate])
    quiet = {n: cost(run, song) for n, run in runs.items()}
    with busy(others): beside = {n: cost(run, song) for n, run in runs.items()}
    name = lambda n: f"{n} thread{'s' * (n > 1)}"
    for n in runs:
        yield row(f"processor time, {name(n)}", quiet[n][1] / seconds, "of real time")
        yield row(f"processor time beside {others} busy processes, {name(n)}", beside[n][1] / seconds,
                  "of real time", "alone", quiet[n][1] / seconds)
        yield row(f"clock beside {others} busy processes, {name(n)}", beside[n][0] / seconds, "of real time",
                  "alone", quiet[n][0] / seconds)
    yield row(f"efficiency from 1 thread to {cores}", quiet[1][0] / quiet[cores][0] / cores, "of all cores")


def chunking(stems):
    "What separating in chunks changes, against the whole song at once; `stems` are the true ones."
    separator, song = Separator.from_pretrained("default"), stems.sum(0)
    with torch.inference_mode(): whole = separator.network(song[None])[0]
    pieces = separator(song)
    yield row("chunks against the whole at once",
              float(10 * torch.log10(whole.square().sum() / (pieces - whole).square().sum())), "dB")
    yield row("what chunks cost in SDR, mean over the stems",
              float((sdr(stems, whole) - sdr(stems, pieces)).mean()), "dB")


HOUR = """
import re, sys, time
from pathlib import Path
from deepdemix.separation import Separator
began = time.perf_counter()
Separator.from_pretrained("default", threads=int(sys.argv[3])).separate_file(*sys.argv[1:3])
print(time.perf_counter() - began, re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def hour(song, rate, folder):
    "An hour of stereo in a process of its own: time and peak memory, as Linux counts it."
    from deepdemix.foundations.encoding import Writer
    path, length = f"{folder}/hour.wav", 3600 * rate
    with Writer(path, rate, 2) as out:
        for start in range(0, length, song.shape[-1]): out.write(song[:, :length - start])
    peaks = {}
    for threads in (1, 2):
        words = [sys.executable, "-c", HOUR, path, f"{folder}/hour{threads}", str(threads)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        taken, peak = map(float, done.stdout.split())
        peaks[threads] = peak / 2**20
        yield row(f"an hour of stereo, {threads} thread(s)", taken / 3600, "of real time")
        yield row(f"an hour of stereo, {threads} thread(s), peak memory", peaks[threads], "GiB")
    yield row("an hour of stereo, memory for each further thread", peaks[2] - peaks[1], "GiB")


def everything(folder, duration=120, rate=44100):
    "All rows."
    stems = toy_song(0, duration=duration)
    song = stems.sum(0)
    write(f"{folder}/song.wav", song, rate)
    yield from stages(f"{folder}/song.wav", folder, duration)
    yield from machines(song, rate)
    yield from runtimes(song)
    yield from chunking(stems)
    yield from hour(song, rate, folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder: report("separation", everything(folder))
