"""What the Wiener filter changes for the default model, on the validation songs of MUSDB18-7 (`MUSDB_PATH`);
`make bench BENCH=refine` runs it."""
import time

import torch
from report import report, row

from deepdemix.data import open_data
from deepdemix.metrics import sdr
from deepdemix.networks.wiener import wiener_filter
from deepdemix.separation import Separator

EXPONENTS, SHARES = (0.5, 0.6, 0.7, 0.8, 1., 2.), (0.25, 0.5, 0.75, 1.)
EXPONENT, SHARE = 0.7, 0.75


def estimates(network, mixture):
    "Stems by (exponent, share): without the filter, at every exponent, and with every share."
    x, network.refine = network.spectrum(mixture[None]), 0.
    y = network.estimate(x)
    settings = {(e, SHARE) for e in EXPONENTS} | {(EXPONENT, s) for s in SHARES}
    found = {(0., 0.): y} | {(e, s): torch.lerp(y, wiener_filter(y, x, e), s) for e, s in settings}
    return {k: network.stft.inverse(stems.movedim(2, -1), mixture.shape[-1])[0] for k, stems in found.items()}


@torch.inference_mode()
def everything():
    "Rows for each exponent at three quarters of the filter, for each share of it, and for what it costs."
    store = open_data(progress=False).split("valid")
    separator = Separator.from_pretrained("default", device="cpu")
    scores = {}
    network, spent = separator.network, {0.: 0., SHARE: 0.}
    for i in range(len(store)):
        mixture, stems = store.mixture(i), store.stems(i)
        for k, y in estimates(network, mixture).items(): scores.setdefault(k, []).append(sdr(stems, y))
        for network.refine in spent:
            began = time.process_time()
            separator(mixture)
            spent[network.refine] += time.process_time() - began
    overall = {k: float(torch.stack(s).nanquantile(0.5, 0).mean()) for k, s in scores.items()}
    cases = {f"exponent {e:g}": (e, SHARE) for e in EXPONENTS} | {
        f"share {s:g}": (EXPONENT, s) for s in SHARES
    }
    for words, k in cases.items():
        yield row(f"cSDR with the filter, {words}", overall[k], "dB", "none", overall[0., 0.], True)
    yield row("processor time of a separation with the filter", spent[SHARE], "s", "none", spent[0.], False)


if __name__ == "__main__": report("refine", everything())
