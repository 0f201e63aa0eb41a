"""Scoring: speed and parity against museval, on songs of MUSDB18-7 (`MUSDB_PATH`); `make bench` runs it."""
import resource

import numpy as np
import torch
from report import absent, report, row, seconds

from deepdemix.data import open_data
from deepdemix.evaluation import evaluate
from deepdemix.metrics import framewise_sdr, isr_sir_sar, scores


def song(duration):
    "Noise that looks like four stems of a stereo song and estimates of them."
    rng = torch.Generator().manual_seed(0)
    stems = 0.1 * torch.randn(4, 2, int(duration * 44100), generator=rng)
    return stems, stems + 0.05 * torch.randn(stems.shape, generator=rng)


def against_museval(store, songs=3, long=60):
    "SDR and all four of BSSEval v4, on previews and on a longer song."
    import museval
    apart, ours, theirs = [0.0, 0.0], [], []
    for i in range(songs):
        stems = store.stems(i)
        estimates = stems.roll(1, -1) * 0.8 + 0.05 * stems.sum(0)
        found = []
        theirs.append(
            seconds(
                lambda: found.append(
                    museval.evaluate(
                        stems.transpose(1, 2).numpy(), estimates.transpose(1, 2).numpy(), win=44100, hop=44100
                    )
                )
            )
        )
        ours.append((seconds(lambda: framewise_sdr(stems, estimates, 44100), 5),
                     seconds(lambda: isr_sir_sar(stems, estimates, 44100))))
        apart[0] = max(
            apart[0], np.nanmax(np.abs(framewise_sdr(stems, estimates, 44100).numpy() - found[0][0]))
        )
        for a, b in zip(isr_sir_sar(stems, estimates, 44100), found[0][1:]):
            apart[1] = max(apart[1], np.nanmax(np.abs(a.numpy() - b)))
    yield row("SDR of a test preview, median", float(np.median([a for a, _ in ours])), "s",
              "museval, all four", float(np.median(theirs)))
    yield row("ISR, SIR and SAR of a test preview, median", float(np.median([b for _, b in ours])), "s",
              "museval, all four", float(np.median(theirs)))
    yield row("largest difference to museval, SDR", float(apart[0]), "dB")
    yield row("largest difference to museval, ISR, SIR and SAR", float(apart[1]), "dB")
    stems, estimates = song(long)
    once = seconds(
        lambda: museval.evaluate(
            stems.transpose(1, 2).numpy(), estimates.transpose(1, 2).numpy(), win=44100, hop=44100
        )
    )
    yield row(f"SDR of a song of {long} s", seconds(lambda: framewise_sdr(stems, estimates, 44100), 5), "s",
              "museval, all four", once)


def long_songs():
    "Songs of four minutes and of an hour."
    stems, estimates = song(240)
    yield row("SDR of a song of 4 minutes", seconds(lambda: framewise_sdr(stems, estimates, 44100), 5), "s")
    yield row("every measure of a song of 4 minutes", seconds(lambda: scores(stems, estimates), 3), "s")
    stems, estimates = (torch.tensor([x]).expand(4, 2, 3600 * 44100) for x in (0.1, 0.2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield row("every measure of a song of an hour", seconds(lambda: scores(stems, estimates)), "s")
    yield row("memory that it added, at most",
              (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "MiB")


def everything(store):
    "All rows."
    quarter = lambda mixture: mixture.expand(4, *mixture.shape) / 4
    yield row(f"{len(store)} test previews, every measure",
              seconds(lambda: evaluate(quarter, store, "stereo")), "s",
              note="with the reference rows that need no masks")
    yield from long_songs()
    try: yield from against_museval(store)
    except (ImportError, RuntimeError) as error: yield absent("SDR", "museval", error)


if __name__ == "__main__": report("evaluation", everything(open_data(progress=False).split("test")))
