"""Training on one process and on two, each of one thread, and on one of two threads: the same batches of toy
songs; `make bench BENCH=scaling` runs it."""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS, ROUNDS, STEPS = ("recurrent", "compact"), 2, 8
ARMS = {"one process, one thread": (1, 1),
        "two processes, one thread each": (2, 1),
        "one process, two threads": (1, 2)}


def train(model, processes, threads, store, out):
    """Some steps of four examples; every process leaves the wall and processor seconds of each of its steps
    but the first."""
    import torch
    torch.set_num_threads(threads)
    from deepdemix.foundations.profiles import recipe_for
    from deepdemix.tasks import SeparationTask
    from deepdemix.training import fit
    marks = []
    class Timed(SeparationTask):
        def training_loss(self, batch):
            marks.append((time.monotonic(), time.process_time()))
            return super().training_loss(batch)
    recipe = recipe_for(model, "laptop", device="cpu", precision="32", epochs=1, batch_size=4,
                        examples_per_epoch=4 * (STEPS + 1), valid_examples=1)
    fit(recipe.override({"mixer.pitch": None, "mixer.stretch": None}), store, out, devices=processes,
        progress=False, task=Timed)
    Path(f"{out}-{os.environ.get('LOCAL_RANK', 0)}.json").write_text(
        json.dumps([[b - a for a, b in zip(x, y)] for x, y in zip(marks, marks[1:])])
    )


def run(model, arm, store, out):
    "[wall, processor] seconds of the steps of an arm; processor seconds are those of all its processes."
    processes, threads = ARMS[arm]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    subprocess.run([sys.executable, __file__, model, str(processes), str(threads), str(store), str(out)],
                   check=True, env=env, stdout=subprocess.DEVNULL)
    ranks = [json.loads(Path(f"{out}-{k}.json").read_text()) for k in range(processes)]
    return [[steps[0][0], sum(s[1] for s in steps)] for steps in zip(*ranks)]


def measure(folder):
    "Rows of each model: seconds a step, and what two processes gain; the arms take turns."
    from report import row

    from deepdemix.data import prepare_toy
    prepare_toy(8, folder / "store", duration=7.0, valid=0.25, test=0.25, progress=False)
    for model in MODELS:
        steps = {arm: [] for arm in ARMS}
        for n in range(ROUNDS):
            for k, arm in enumerate(ARMS):
                steps[arm] += run(model, arm, folder / "store", folder / f"{model}-{n}-{k}")
        wall, busy = ({arm: statistics.median(s[i] for s in steps[arm]) for arm in ARMS} for i in (0, 1))
        alone = "one process, one thread"
        for arm in ARMS:
            yield row(f"{model}: {arm}", wall[arm], "s a step",
                      *((alone, wall[alone], False) if arm != alone else ()),
                      note="4 examples a step" if arm == alone else "")
        two = "two processes, one thread each"
        yield row(
            f"{model}: efficiency of two processes", wall[alone] / wall[two] / 2, "", note="1: twice as fast"
        )
        yield row(f"{model}: processor time of two processes", busy[two] / busy[alone], "of one's",
                  note="above 1: waiting for each other and for memory")


if __name__ == "__main__":
    if len(sys.argv) > 1: train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
    else:
        from report import report
        with tempfile.TemporaryDirectory() as folder: report("scaling", measure(Path(folder)))
