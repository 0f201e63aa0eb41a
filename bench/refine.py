"What the Wiener filter changes for the default model, on the validation songs of MUSDB18-7 (`MUSDB_PATH`); `make bench BENCH=refine` runs it."
import time

import torch
from deepdemix.compact import wiener_filter
from deepdemix.data import open_data
from deepdemix.metrics import sdr
from deepdemix.separation import Separator
from report import report, row

EXPONENTS, SHARE = (0.5, 0.6, 0.7, 0.8, 1., 2.), 0.75


def estimates(network, mixture):
    "Stems without the filter, and with three quarters of it at every exponent."
    x = network.spectrum(mixture[None])
    y = (network.matrices(x) * x[:, None, None]).sum(3)
    back = lambda stems: network.stft.inverse(stems.movedim(2, -1), mixture.shape[-1])[0]
    return {0.: back(y)} | {e: back(torch.lerp(y, wiener_filter(y, x, e), SHARE)) for e in EXPONENTS}


@torch.inference_mode()
def everything():
    "Rows for each exponent, and for what the filter costs."
    store, separator, scores = open_data(progress=False).split("valid"), Separator.from_pretrained("default", device="cpu"), {}
    network, spent = separator.network, {0.: 0., SHARE: 0.}
    for i in range(len(store)):
        mixture, stems = store.mixture(i), store.stems(i)
        for exponent, y in estimates(network, mixture).items(): scores.setdefault(exponent, []).append(sdr(stems, y))
        for network.refine in spent:
            began = time.process_time()
            separator(mixture)
            spent[network.refine] += time.process_time() - began
    overall = {e: float(torch.stack(s).nanquantile(0.5, 0).mean()) for e, s in scores.items()}
    for e in EXPONENTS: yield row(f"cSDR with the filter, exponent {e:g}", overall[e], "dB", "none", overall[0.], True)
    yield row("processor time of a separation with the filter", spent[SHARE], "s", "none", spent[0.], False)


if __name__ == "__main__": report("refine", everything())
