"""Training on several processes: the same as on one, stopped and killed together, resumed exactly, one line
for what goes wrong."""
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest
import torch
from test_training import STORE, WHOLE, recipe, same_runs, stopping_after
from torch import nn

from deepdemix.audio import SOURCES, STFT
from deepdemix.data import prepare_toy
from deepdemix.foundations import distributed, precision
from deepdemix.foundations.cores import available_cores
from deepdemix.foundations.distributed import is_first, launched_world, processes_worth, resolve_devices
from deepdemix.foundations.fabric import _strategy
from deepdemix.foundations.files import UserError
from deepdemix.foundations.randomness import seeded
from deepdemix.foundations.recipe import Recipe, read_record
from deepdemix.foundations.registry import register_network
from deepdemix.foundations.run_metrics import read_metrics
from deepdemix.foundations.state import read_state
from deepdemix.foundations.weights import read_weights, write_weights
from deepdemix.tasks import SeparationTask, build_task
from deepdemix.training import Interrupted, fit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="these tests fork")


@register_network("no_statistics")
class Plain(nn.Module):
    "One frame at a time: no batch statistics, no dropout; one layer that nothing reaches."
    def __init__(self, hidden=6):
        super().__init__()
        self.args, self.sources, self.sample_rate, self.channels = dict(hidden=hidden), SOURCES, 8000, 1
        self.stft = STFT(64, 32)
        self.encoder = nn.Sequential(nn.Linear(33, hidden), nn.ReLU())
        self.decoder = nn.Linear(hidden, 132)
        self.idle = nn.Linear(2, 2)

    def mask(self, magnitude):
        return (self.decoder(self.encoder(magnitude.transpose(2, 3))) .sigmoid() .unflatten(-1, (33, 4))
                .transpose(2, 3))

    def forward(self, waveform):
        x = self.stft(waveform)
        return self.stft.inverse_stems(self.mask(x.abs()) * x[..., None], waveform.shape[-1])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def _work(act, rank, world, env, folder):
    "One forked process, with the environment that torchrun would give it."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0", MASTER_ADDR="127.0.0.1",
                      TORCHELASTIC_RUN_ID="test", **env)
    told = os.open(folder/f"told {rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(told, 1)
    os.dup2(told, 2)
    torch.set_num_threads(1)
    status = 0
    try: act(rank)
    except UserError as e:
        status = 130 if isinstance(e, Interrupted) else 2
        if not getattr(e, "quiet", False): os.write(2, f"deepdemix: {e}\n".encode())
    except BaseException:
        status = 1
        os.write(2, traceback.format_exc().encode())
    finally: os._exit(status)

def together(folder, act, world=2, timeout=60, **env):
    """Run `act(rank)` in forked processes that form a group: their exit statuses and what they told. A
    process that hangs fails the test."""
    folder.mkdir(exist_ok=True)
    env = {"MASTER_PORT": str(free_port()), **env}
    processes = [multiprocessing.get_context("fork").Process(target=_work, args=(act, r, world, env, folder))
                 for r in range(world)]
    for p in processes: p.start()
    for p in processes: p.join(timeout)
    hanging = [p for p in processes if p.is_alive()]
    for p in hanging:
        p.kill()
        p.join()
    told = [(folder/f"told {r}").read_text() for r in range(world)]
    assert not hanging, f"{len(hanging)} processes hang; told: {told}"
    return [p.exitcode for p in processes], told

def plain(**fields): return recipe(**{**dict(network="no_statistics", epochs=1, lr=1e-3), **fields})

def save_gradients(task, folder):
    folder.mkdir(exist_ok=True)
    write_weights(folder / "gradients.safetensors",
                  {k: p.grad for k, p in task.network.named_parameters() if p.grad is not None})

def train(out, r, store=STORE, **args):
    "Train, and keep the last step's gradients."
    with seeded(r.seed): task = build_task(r, store)
    fit(r, store, out, progress=False, task=task, **args)
    if is_first(): save_gradients(task, out)

def close(a, b):
    """Whether two runs hold the same gradients, weights and figures, up to rounding. Where a gradient is
    rounding itself, Adam makes whole steps of it: those weights are left out."""
    grads, others = (read_weights(f/"gradients.safetensors") for f in (a, b))
    x, y = (read_weights(f/"model.safetensors") for f in (a, b))
    assert grads.keys() == others.keys() and x.keys() == y.keys()
    norm = lambda tensors: sum(float(t.double().square().sum()) for t in tensors) ** 0.5
    assert 0 < norm(grads.values()) and norm(grads[k] - others[k] for k in grads) < 1e-3 * norm(
        grads.values()
    ), "gradients differ"
    for k in grads:
        torch.testing.assert_close(
            grads[k], others[k], atol=1e-5, rtol=1e-4, msg=lambda m: f"gradients of {k}: {m}"
        )
    for k in x:
        clear = grads[k].abs() > 1e-6 if k in grads else ...
        torch.testing.assert_close(
            x[k][clear], y[k][clear], atol=1e-5, rtol=1e-4, msg=lambda m: f"weights {k}: {m}"
        )
    x, y = (read_metrics(f).drop(columns="seconds") for f in (a, b))
    assert list(x.columns) == list(y.columns)
    torch.testing.assert_close(
        torch.tensor(x.to_numpy()), torch.tensor(y.to_numpy()), atol=1e-4, rtol=1e-4, equal_nan=True
    )
    return True


@pytest.mark.parametrize(
    "fields",
    [pytest.param(dict(), marks=pytest.mark.slow), dict(accumulate=2, grad_clip=0.01, ema=0.9, num_workers=1),
     dict(freeze_encoder=1, epochs=2)],
    ids=["plain", "accumulated", "num_trainable_layers"],
)
def test_two_processes_are_one_for_separation(tmp_path, fields):
    r = plain(**fields)
    train(tmp_path/"one", r)
    assert together(tmp_path, lambda rank: train(tmp_path/f"two {rank}", r))[0] == [0, 0]
    assert close(tmp_path/"one", tmp_path/"two 0")
    assert not (tmp_path/"two 1").exists(), "only the first process writes"
    assert [read_record(tmp_path/n)["processes"] for n in ("one", "two 0")] == [1, 2]

@pytest.mark.slow
def test_four_processes_of_one_example_each(tmp_path):
    r = plain(examples_per_epoch=8)
    train(tmp_path/"one", r)
    assert (
        together(tmp_path, lambda rank: train(tmp_path / "four", r, devices="auto", strategy="ddp"), world=4)[
            0
        ]
        == [0] * 4
    )
    assert close(tmp_path/"one", tmp_path/"four")


ENCODER = dict(duration=0.25, window_length=1024, hop_length=512, conv_channels=(2, 2, 4, 4),
               kernels=((3, 4), (3, 4), (2, 3), (2, 3)), pools=((4, 8), (4, 4)), linears=(16, 8), latent=6,
               dropout=0.0)
CONTRAST = dict(kind="pretraining", network="encoder", network_args=ENCODER, batch_size=4,
                examples_per_epoch=12, epochs=1, valid_examples=4, mixer=dict(duration=0.25), device="cpu",
                lr=1e-3)

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return prepare_toy(
        8, tmp_path_factory.mktemp("toy") / "store", duration=2.0, valid=0.25, test=0.25, progress=False
    )

slowly = lambda name, **settings: pytest.param(settings, id=name, marks=pytest.mark.slow)

@pytest.mark.parametrize(
    "settings",
    [pytest.param(dict(loss="supcon"), id="supcon"), slowly("instance", loss="supcon", instance=0.5),
     slowly("memory", loss="supcon", memory=24, head=4), slowly("triplets", loss="triplet"),
     slowly("miner", loss="triplet", miner="batch_hard")],
)
def test_two_processes_are_one_for_contrast(tmp_path, toy, settings):
    r = Recipe(**CONTRAST, loss=settings["loss"],
               task_args=dict(places=2, **{k: v for k, v in settings.items() if k != "loss"}))
    train(tmp_path/"one", r, toy)
    assert together(tmp_path, lambda rank: train(tmp_path/"two", r, toy))[0] == [0, 0]
    assert close(tmp_path/"one", tmp_path/"two")

@pytest.mark.slow
def test_a_loss_that_sees_only_its_own_embeddings_is_another(tmp_path, toy, monkeypatch):
    "The test above can fail: without the exchange the gradients differ."
    monkeypatch.setattr("deepdemix.contrast.losses.gather_all", lambda part, world=1: part)
    r = Recipe(**CONTRAST, loss="supcon", task_args=dict(places=2))
    train(tmp_path/"one", r, toy)
    assert together(tmp_path, lambda rank: train(tmp_path/"two", r, toy))[0] == [0, 0]
    with pytest.raises(AssertionError, match="gradients"): close(tmp_path/"one", tmp_path/"two")

@pytest.mark.slow
def test_cells_are_compared_within_each_process(tmp_path, toy):
    "Dense contrast: both processes hold the same weights, and not those of one process."
    network = dict(window_length=1024, hop_length=512, octave=16, band=8, bandwidth=16000.0, width=16,
                   hidden=16, layers=1)
    r = Recipe(**{**CONTRAST, "kind": "dense", "network": "compact", "network_args": network,
                  "mixer": dict(duration=0.5, coherent=0.3, pitch=None, stretch=None)}, loss="supcon")
    train(tmp_path/"one", r, toy)

    def act(rank):
        with seeded(r.seed): task = build_task(r, toy)
        fit(r, toy, tmp_path/"two", progress=False, task=task)
        write_weights(tmp_path / f"{rank}.safetensors", task.network.state_dict())

    assert together(tmp_path, act)[0] == [0, 0]
    first, second, one = map(read_weights, [*(tmp_path / f"{rank}.safetensors" for rank in (0, 1)),
                                            tmp_path/"one/model.safetensors"])
    # each keeps the statistics of its own rows
    learnt = [k for k in first if "running" not in k and "batches" not in k]
    assert len(learnt) > 20 and [k for k in learnt if not torch.equal(first[k], second[k])] == []
    assert any(not torch.allclose(one[k], first[k], atol=1e-5) for k in learnt)

@pytest.mark.slow
def test_a_term_beside_separation(tmp_path, toy):
    r = Recipe(**{**CONTRAST, "kind": "separation", "network": "ddm", "network_args": ENCODER,
                  "loss": "l1_magnitude", "mixer": dict(duration=0.25, pitch=None, stretch=None),
                  "task_args": dict(contrast=dict(weight=0.1, per_class=2))})
    train(tmp_path/"one", r, toy)
    assert together(tmp_path, lambda rank: train(tmp_path/"two", r, toy))[0] == [0, 0]
    assert close(tmp_path/"one", tmp_path/"two")


def test_open_unmix_hears_the_whole_batch_and_nobody_waits_for_a_process_alone(tmp_path):
    from deepdemix.networks.open_unmix import Standardise
    x = torch.rand(6, 30, 2, 9, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 9)
    def apart(rank):
        torch.distributed.init_process_group("gloo")
        for shares in ((x[:2], x[2:]), (0 * x, x)):
            layer, whole = Standardise(9), Standardise(9)
            if rank == 0: assert torch.equal(layer(x), x) and not layer.measured
            step = nn.parallel.DistributedDataParallel(layer)
            assert torch.equal(step(0 * x), 0 * x) and not layer.measured
            step(shares[rank])
            whole.measure(torch.cat(shares)) # on both, so the sums are twice as large and the means the same
            assert layer.measured and whole.measured
            torch.testing.assert_close(torch.stack([layer.mean, layer.scale]),
                                       torch.stack([whole.mean, whole.scale]), rtol=1e-4, atol=1e-4)
    status, told = together(tmp_path, apart)
    assert status == [0, 0], told

def test_open_unmix_begins_alike_whatever_the_first_process_looks_at(tmp_path):
    class Curious(SeparationTask):
        def local_batch(self, step):
            if is_first() and step == 0 and self.world_size > 1: self.network(torch.rand(1, 1, 4000))
            return super().local_batch(step)
    r = recipe(
        network="open_unmix",
        network_args=dict(sample_rate=8000, window_length=256, hop_length=64, hidden=8, layers=1,
                          bandwidth=3000.0, shared=True, channels=1, dropout=0.0),
        epochs=1, lr=1e-12,
    )
    fit(r, STORE, tmp_path/"one", progress=False)
    status, told = together(
        tmp_path, lambda rank: fit(r, STORE, tmp_path / "two", progress=False, task=Curious)
    )
    assert status == [0, 0], told
    one, two = (read_weights(tmp_path/n/"model.safetensors") for n in ("one", "two"))
    for k in ("mean", "scale", "measured"):
        torch.testing.assert_close(
            *(x[f"encoder.0.standardise.{k}"] for x in (one, two)), rtol=1e-4, atol=1e-5
        )
    assert one["encoder.0.standardise.measured"] and (one["encoder.0.standardise.mean"] < 0).all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Nine steps of two processes, with dropout, averaged weights and accumulation."
    folder = tmp_path_factory.mktemp("whole")
    assert together(folder, lambda rank: fit(recipe(**WHOLE), STORE, folder / "run", progress=False))[0] == [
        0, 0,
    ]
    return folder/"run"

def act_at(n, rank, action):
    "A task with which one of the processes does something while it computes its n-th loss."
    return lambda here: stopping_after(n if here == rank else 0, action)

def test_each_process_has_its_own_dropout(whole):
    state = read_state(whole/"resume.safetensors")
    assert len(state["others"]) == 1 and not torch.equal(
        state["random"]["torch"], state["others"][0]["torch"]
    )

@pytest.mark.parametrize(
    "rank,loss,number", [(1, 5, signal.SIGTERM), pytest.param(0, 6, signal.SIGINT, marks=pytest.mark.slow)]
)
def test_one_is_asked_to_stop_and_all_stop_and_resume_exactly(tmp_path, whole, rank, loss, number):
    task = act_at(loss, rank, lambda: os.kill(os.getpid(), number))
    status, told = together(
        tmp_path, lambda r: fit(recipe(**WHOLE), STORE, tmp_path / "run", progress=False, task=task(r))
    )
    assert (status == [130, 130] and told[0].count("deepdemix:") == 1
            and f"stopped by {number.name} at step {(loss + 1) // 2} of 9" in told[0]
            and "deepdemix" not in told[1])
    assert read_record(tmp_path/"run")["status"] == "interrupted"
    assert together(
        tmp_path, lambda r: fit(recipe(**WHOLE), STORE, tmp_path / "run", resume=True, progress=False)
    )[0] == [0, 0]
    assert same_runs(whole, tmp_path/"run")
    assert together(
        tmp_path, lambda r: fit(recipe(**WHOLE), STORE, tmp_path / "run", resume=True, progress=False)
    )[0] == [0, 0], "a finished run has nothing to do"
    assert same_runs(whole, tmp_path/"run")

@pytest.mark.slow
def test_stopped_by_time_and_resumed_is_the_same(tmp_path, whole):
    for start in range(3):
        together(
            tmp_path,
            lambda r: fit(recipe(**WHOLE, max_minutes=1e-9 if start < 2 else 0), STORE, tmp_path / "run",
                          resume=True, progress=False),
        )
    assert same_runs(whole, tmp_path/"run")

@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_all_with_a_line_and_resumes_exactly(tmp_path, whole, rank):
    task = act_at(9, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))
    status, told = together(
        tmp_path,
        lambda r: fit(recipe(**WHOLE, save_minutes=0), STORE, tmp_path / "run", progress=False, task=task(r)),
    )
    assert status[rank] == -signal.SIGKILL and status[1 - rank] == 2
    assert (
        "deepdemix: another process of this training has ended or can't be reached; what" in told[1 - rank]
        and "Traceback" not in told[1 - rank]
    )
    assert read_state(tmp_path/"run"/"resume.safetensors")["step"] == 4
    assert together(
        tmp_path, lambda r: fit(recipe(**WHOLE), STORE, tmp_path / "run", resume=True, progress=False)
    )[0] == [0, 0]
    assert same_runs(whole, tmp_path/"run")

@pytest.mark.parametrize("first,then", [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, first, then):
    r, half = plain(epochs=2), stopping_after(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(tmp_path/"whole", r)
    def start(world, act):
        if world > 1: return together(tmp_path, act)[0]
        try: act(0)
        except Interrupted: pass
    start(first, lambda rank: fit(r, STORE, tmp_path/"run", progress=False, task=half))
    assert read_record(tmp_path/"run")["step"] == 8
    start(then, lambda rank: train(tmp_path/"run", r, resume=True))
    assert read_record(tmp_path/"run")["finished"] and close(tmp_path/"whole", tmp_path/"run")

def test_patience_ends_all_at_the_same_epoch(tmp_path):
    class Worse(SeparationTask):
        def validate(self):
            self.n = getattr(self, "n", 0) + 1
            return dict(valid_loss=float(self.n))
    assert together(
        tmp_path,
        lambda rank: fit(plain(epochs=9, patience=2), STORE, tmp_path / "run", progress=False, task=Worse),
    )[0] == [0, 0]
    assert read_record(tmp_path / "run")["epoch"] == 3 and read_metrics(
        tmp_path / "run"
    ).valid_loss.tolist() == [1.0, 2.0, 3.0]


def told_once(status, told, text):
    lines = [line for t in told for line in t.splitlines() if line.startswith("deepdemix:")]
    assert 2 in status and text in lines[0] and not any("Traceback" in t for t in told), (status, told)
    return len(lines)

def test_processes_that_differ_do_not_begin(tmp_path):
    def versions(rank):
        if rank: distributed.library_versions = lambda: {"torch": "1.0"}
        fit(plain(), STORE, tmp_path/"run", progress=False)
    assert told_once(*together(tmp_path, versions), "differ in their versions: torch is 2") == 1
    class Other(type(STORE)): digest = "other songs"
    assert (
        told_once(
            *together(
                tmp_path,
                lambda rank: fit(plain(), Other() if rank else STORE, tmp_path / "run", progress=False),
            ),
            "differ in their data: digest is four songs"
        )
        == 1
    )
    assert (
        told_once(
            *together(
                tmp_path, lambda rank: fit(plain(lr=0.1 + rank), STORE, tmp_path / "run", progress=False)
            ),
            "differ in their recipe: lr is 0.1 for process 0"
        )
        == 1
    )
    assert not (tmp_path/"run"/"recipe.json").exists()

def test_an_error_of_the_first_process_is_told_once(tmp_path):
    class Failing(SeparationTask):
        def validate(self): raise UserError("nothing to validate on")
    assert (
        told_once(
            *together(
                tmp_path, lambda rank: fit(plain(), STORE, tmp_path / "run", progress=False, task=Failing)
            ),
            "nothing to validate on"
        )
        == 1
    )
    assert read_record(tmp_path/"run")["status"] == "failed"

def test_numbers_that_are_not_finite_end_all(tmp_path):
    def exploding(rank):
        class Exploding(SeparationTask):
            count = 0
            def training_loss(self, batch):
                self.count += 1
                loss, logs = super().training_loss(batch)
                return loss * (float("nan") if rank and self.count == 3 else 1), logs
        return Exploding
    assert (
        told_once(
            *together(
                tmp_path,
                lambda rank: fit(
                    plain(save_minutes=0), STORE, tmp_path / "run", progress=False, task=exploding(rank)
                ),
            ),
            "no longer finite after step 3"
        )
        == 1
    )
    assert read_state(tmp_path/"run"/"resume.safetensors")["step"] == 2

def test_a_batch_that_cannot_be_split(tmp_path):
    told_once(
        *together(tmp_path, lambda rank: fit(plain(batch_size=3), STORE, tmp_path / "run", progress=False)),
        "a batch of 3 can't be split evenly over 2 processes"
    )

def test_what_torchrun_started_holds(tmp_path):
    told_once(*together(tmp_path, lambda rank: fit(plain(), STORE, tmp_path / "run", devices=4)),
              "devices is 4, but 2 were started")
    told_once(*together(tmp_path, lambda rank: fit(plain(), STORE, tmp_path / "run", nodes=2)),
              "nodes is 2, but 1 were started")

def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        def act(rank):
            if rank == 0: fit(plain(), STORE, tmp_path/"run", progress=False)
        status, told = together(tmp_path, act, MASTER_PORT=str(s.getsockname()[1]))
        assert f"port {s.getsockname()[1]} is taken: set MASTER_PORT" in told[0] and status[0] == 2

def test_slurm_is_understood(monkeypatch):
    for k, v in dict(SLURM_NTASKS="8", SLURM_NNODES="2", SLURM_NTASKS_PER_NODE="4", SLURM_JOB_NAME="train",
                     SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0").items():
        monkeypatch.setenv(k, v)
    assert launched_world() == (4, 2) and resolve_devices("cpu", None, None) == (4, 2)
    with pytest.raises(UserError, match="devices is 3, but 4 were started"): resolve_devices("cpu", 3, None)
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert launched_world() is None

def test_what_is_not_there(monkeypatch):
    for args, text in (
        (("cuda", torch.cuda.device_count() + 1, None), "devices are wanted, this machine has"),
        (("cpu", None, 2), "nothing says where the other machines are"), (("cpu", -1, None), "1 or more"),
        (("cpu", 1, 0), "1 or more"),
    ):
        with pytest.raises(UserError, match=text): resolve_devices(*args)
    with pytest.raises(UserError, match="no strategy is called 'fsdp'"): _strategy("fsdp", 2)
    monkeypatch.setattr(sys, "ps1", ">>>", raising=False)
    with pytest.raises(UserError, match="a notebook trains with one process"): resolve_devices("cpu", 2, None)


def test_auto_on_a_processor_is_what_divides_a_batch(monkeypatch):
    r, line = recipe(batch_size=6, mixer=dict(duration=0.5, memory=1.0)), nn.Linear(1, 1)
    monkeypatch.delattr(sys, "ps1", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for cores, memory, number in ((4, 99, 3), (2, 99, 2), (5, 99, 3), (4, 5, 2), (4, 0.1, 1), (1, 99, 1)):
        monkeypatch.setattr(distributed, "available_cores", lambda: cores)
        monkeypatch.setattr(distributed, "available_memory", lambda: memory * 2**30)
        assert processes_worth(r, line) == number
        assert processes_worth(r, nn.Sequential(line, nn.BatchNorm1d(1))) == 1 # six are not twice four
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert processes_worth(r, line) == 6
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(sys, "ps1", ">>>", raising=False)
    assert processes_worth(r, line) == 1


def test_the_first_process_chooses_the_precision_for_all(tmp_path):
    "There bfloat16 is slow, on the other one it is not; both train in single precision."
    def slow_on(rank):
        def passed(output, inputs, kind): return 9. if kind != "32" and rank == 0 else 1.
        precision.pass_seconds = passed
        train(tmp_path/"asked", plain(precision="bf16-mixed"))
    for name, act in dict(asked=slow_on, single=lambda rank: train(tmp_path/"single", plain())).items():
        status, told = together(tmp_path/f"{name} processes", act)
        assert status == [0, 0], told
    assert read_record(tmp_path/"asked")["precision"] == "32"
    assert close(tmp_path/"asked", tmp_path/"single")


def command(tmp_path, *words, before=(), timeout=240, **env):
    "The installed command in its own processes: exit status and what it wrote to stdout and stderr."
    script = Path(sys.executable).parent/"deepdemix"
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        [*before, str(script), "train", "--model", "baseline", "--profile", "demo", "--device", "cpu",
         *words],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr

@pytest.mark.slow
def test_the_command_starts_its_processes(tmp_path, toy):
    "By Lightning and by torchrun: the same weights; the folder is named once, and nothing else is said."
    few = ["--data", str(toy.path), "--set", "epochs=1", "--set", "examples_per_epoch=8", "--set",
           "valid_examples=4", "--set", "mixer.pitch=null", "--set", "mixer.stretch=null"]
    assert command(tmp_path, *few, "--out", "a", "--devices", "2")[:2] == (0, "a\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                str(free_port())]
    assert command(tmp_path, *few, "--out", "b", before=torchrun)[:2] == (0, "b\n")
    few += ["--set", "mixer.memory=0.1"]
    auto = command(tmp_path, "--model", "compact", *few, "--out", "auto", "--devices", "auto")
    assert auto[:2] == (0, "auto\n")
    assert read_record(tmp_path/"auto")["processes"] > 1 or available_cores() == 1
    a, b = (read_weights(tmp_path/n/"model.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a) and read_record(tmp_path/"a")["processes"] == 2
    for wrong, text in ((["--devices", "3"], "a batch of 4 can't be split evenly over 3 processes"),
                        (["--nodes", "2"], "nothing says where the other machines are")):
        status, out, err = command(tmp_path, *few, "--out", "c", *wrong)
        assert (status, out) == (2, "") and err.count("\n") == 1 and text in err

@pytest.mark.slow
@pytest.mark.parametrize("who", ["child", "main"])
def test_the_command_ends_when_one_of_its_processes_is_killed(tmp_path, toy, who):
    words = ["--data", str(toy.path), "--out", "run", "--devices", "2", "--model", "baseline", "--profile",
             "demo", "--device", "cpu", "--set", "epochs=500", "--set", "save_minutes=0", "--set",
             "valid_examples=4"]
    with open(tmp_path/"told", "w") as told:
        main = psutil.Popen([str(Path(sys.executable).parent / "deepdemix"), "train", *words], cwd=tmp_path,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=told, stderr=told)
        while not (tmp_path/"run"/"resume.safetensors").exists():
            assert main.poll() is None, (tmp_path/"told").read_text()
            time.sleep(0.2)
        child, = main.children()
        {"child": child, "main": main}[who].kill()
        assert main.wait(60) == (2 if who == "child" else -signal.SIGKILL)
        child.wait(60)
    told = (tmp_path/"told").read_text()
    first, last = (line for line in told.splitlines() if line.startswith("deepdemix:"))
    assert "training on" in first and "another process of this training has ended" in last
    assert "Traceback" not in told
