"""What kept memory and large pages change on a processor: training steps of the networks of the contest with
both and without, in turn; `make bench BENCH=memory` runs it."""
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS, FIRST, STEPS = 2, 3, 5


def steps(name, args, loss, keep):
    """Processor seconds of some steps on eight examples of three seconds, after the `FIRST` ones, and the
    highest memory in GiB."""
    import torch

    from deepdemix.foundations.memory import keep_memory
    from deepdemix.foundations.registry import build_network
    from deepdemix.foundations.separation_losses import LOSSES
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, sources, taken = build_network(name, **args), 0.1 * torch.randn(8, 4, 2, 3 * 44100), []
    optimizer = torch.optim.Adam(network.parameters())
    with keep_memory(True) if keep else contextlib.nullcontext(lambda: None) as tidy:
        for _ in range(FIRST + STEPS):
            began = time.process_time()
            with torch.autocast("cpu", torch.bfloat16): error = LOSSES[loss](network, sources.sum(1), sources)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            tidy()
            taken.append(time.process_time() - began)
    return taken[FIRST:], int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def run(*case):
    "`steps` in a process of its own."
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(case)], check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "THP_MEM_ALLOC_ENABLE": str(int(case[-1]))},
    )
    return json.loads(done.stdout)


def measure():
    "Two rows a network: the time of a step, and the memory."
    from report import row

    from deepdemix.studies.contest import ENTRIES
    for e in ENTRIES:
        found = {keep: [] for keep in (True, False)}
        for _ in range(ROUNDS):
            for keep in found: found[keep].append(run(e.network, e.args, e.settings["loss"], keep))
        time_, most = (
            {keep: pick(results) for keep, results in found.items()}
            for pick in (lambda rs: statistics.median(t for r in rs for t in r[0]),
                         lambda rs: max(r[1] for r in rs))
        )
        yield row(f"{e.name}: a step, kept, large pages", time_[True], "s", "given back, small pages",
                  time_[False], False)
        yield row(f"{e.name}: highest memory, kept, large pages", most[True], "GiB",
                  "given back, small pages", most[False], False)


if __name__ == "__main__":
    if len(sys.argv) > 1: print(json.dumps(steps(*json.loads(sys.argv[1]))))
    else:
        from report import report
        report("memory", measure())
