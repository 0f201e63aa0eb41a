"""What runs reach alone and as ensembles, on the validation songs of MUSDB18-7 (`MUSDB_PATH`).

`python bench/members.py RUN RUN …` takes run folders or names of bundled models; the kept figures are of the
default model after its first 40,000 examples and the runs of `results/ensemble`.
"""
import itertools
import sys
import tempfile
import time

import torch
from report import report, row

from deepdemix.data import open_data
from deepdemix.foundations.model_names import find_model
from deepdemix.foundations.runs import load_network
from deepdemix.metrics import sdr
from deepdemix.networks.ensemble import join_runs
from deepdemix.networks.wiener import wiener_filter

SHARE = 0.75


def alone(network, mixture):
    """The spectrogram of the mixture and, from each member, those of the stems, with the seconds of
    processor time that they took."""
    x, members, found, taken = network.spectrum(mixture[None]), network.members, [], []
    for k in range(len(members)):
        network.members, began = members[k:k + 1], time.process_time()
        found.append(network.estimate(x, mixture.shape[-1]))
        taken.append(time.process_time() - began)
    network.members = members
    return x, found, taken


@torch.inference_mode()
def everything(runs, folder):
    """Rows for each run and each set of runs: SDR without and with the filter of an ensemble, and what a run
    costs."""
    store = open_data(progress=False).split("valid")
    network = load_network(join_runs([find_model(run) for run in runs], folder)).eval()
    spent, music, scores = 0., 0., {}
    sets = [s for n in range(1, len(network.members) + 1)
            for s in itertools.combinations(range(len(network.members)), n)]
    for i in range(len(store)):
        mixture, stems = store.mixture(i), store.stems(i)
        x, found, taken = alone(network, mixture)
        spent, music = spent + torch.tensor(taken), music + mixture.shape[-1] / 44100
        for s in sets:
            y = sum(found[k] for k in s) / len(s)
            for refine in (0., SHARE):
                z = torch.lerp(y, wiener_filter(y, x), refine) if refine else y
                scores.setdefault((s, refine), []).append(
                    sdr(stems, network.stft.inverse(z.movedim(2, -1), mixture.shape[-1])[0])
                )
    overall = {k: float(torch.stack(v).nanquantile(0.5, 0).mean()) for k, v in scores.items()}
    words = {s: f"member{'s' * (len(s) > 1)} {', '.join(str(k + 1) for k in s)}" for s in sets}
    for s in sets:
        yield row(f"cSDR of {words[s]}, filtered", overall[s, SHARE], "dB", "no filter", overall[s, 0.], True)
    for k, seconds in enumerate(spent.tolist()):
        yield row(f"processor time of member {k + 1}", seconds / music, "of real time")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder: report("members", everything(sys.argv[1:], folder))
