"""Separate a wav file with NumPy and onnxruntime alone: `python separate.py model.onnx song.wav OUT`

`deepdemix export --out model.onnx` writes the model. What a file says of itself stands in its metadata:
sources, sample
rate, channels, and how a song is best cut into chunks. The stems are those of `deepdemix separate`, to 16
bits.
"""
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime


def read(path):
    "Waveform (channels, time) as floats in [-1, 1], and the sample rate, of a wav file of 16, 24 or 32 bits."
    with wave.open(str(path)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        data = np.frombuffer(file.readframes(file.getnframes()), np.uint8).reshape(-1, width)
    wide = np.zeros((len(data), 4), np.uint8)
    wide[:, 4 - width:] = data
    return (wide.view("<i4").reshape(-1, channels).T / 2**31).astype(np.float32), rate


def write(path, x, rate):
    "Write a waveform (channels, time) as a wav file of 16 bits."
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(x)), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes(np.clip(np.round(x.T * 2**15), -2**15, 2**15 - 1).astype("<i2").tobytes())


def plan(about):
    "Samples of a chunk, of a step to the next one, and of what is seen on each side and not used."
    chunk, context, hop = (int(about[k]) for k in ("chunk", "context", "hop"))
    shared = max(round(chunk * float(about["overlap"])), 2 * context)
    return chunk, (chunk - shared) // hop * hop, context, hop


def starts(samples, chunk, step, hop):
    "Where chunks begin; the last one ends with the song or a little behind it."
    at = 0
    while samples > at + chunk:
        yield at
        at += step
    yield max(0, -(-(samples - chunk) // hop) * hop)


def weights(chunk, step, context, first, last):
    """The weight of each sample of a chunk: none in the context, up and down over the cross-fade, flat at
    the song's ends."""
    width = chunk - step - 2 * context
    fade = np.arange(1, width + 1) / (width + 1)
    side = np.concatenate([np.zeros(context), fade, np.ones(chunk - context - width)])
    return (np.ones(chunk) if first else side) * (np.ones(chunk) if last else side[::-1])


def separate(session, song, progress=lambda part: None):
    "Stems (sources, channels, time) of a song (channels, time) at the model's rate."
    about = session.get_modelmeta().custom_metadata_map
    chunk, step, context, hop = plan(about)
    samples, places = song.shape[1], list(starts(song.shape[1], chunk, step, hop))
    stems = np.zeros((len(about["sources"].split(",")), *song.shape), np.float32)
    total = np.zeros(samples, np.float32)
    for i, at in enumerate(places):
        x, last = song[:, at:at + chunk], i == len(places) - 1
        weight = weights(chunk, step, context, i == 0, last)
        if at or about.get("segment"): x = np.pad(x, ((0, 0), (0, chunk - x.shape[1])))
        end = min(chunk, samples - at)
        y = session.run(["stems"], {"mixture": np.ascontiguousarray(x[None])})[0][0]
        stems[..., at:at + end] += (y * weight[:x.shape[1]].astype(np.float32))[..., :end]
        total[at:at + end] += weight[:end]
        progress((i + 1) / len(places))
    return stems / total


def main(model, song, out):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about, (x, rate) = session.get_modelmeta().custom_metadata_map, read(song)
    channels = int(about["channels"])
    if rate != int(about["sample_rate"]):
        sys.exit(f"{song}: {rate} Hz; this model takes {about['sample_rate']} Hz: resample it first")
    if len(x) not in (1, channels): sys.exit(f"{song}: {len(x)} channels; this model takes {channels}, or 1")
    report = lambda part: print(f"\r{part:4.0%}", end="", file=sys.stderr)
    stems = separate(session, np.broadcast_to(x, (channels, x.shape[1])), report)
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, stem in zip(about["sources"].split(","), stems):
        write(Path(out) / f"{name}.wav", stem if len(x) > 1 else stem.mean(0, keepdims=True), rate)
    print(f"\r{song}: {len(stems)} stems in {out}")


if __name__ == "__main__": main(*sys.argv[1:]) if len(sys.argv) == 4 else sys.exit(__doc__)
