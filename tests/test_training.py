"The training loop under faults: stopped, killed, resumed, fed with nonsense."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from deepdemix.audio import SOURCES, STFT
from deepdemix.foundations import memory, precision
from deepdemix.foundations.files import UserError
from deepdemix.foundations.memory import _glibc, _resident, keep_memory
from deepdemix.foundations.optimisation import build_optimizer, lr_factor
from deepdemix.foundations.profiles import PROFILES, recipe_for
from deepdemix.foundations.recipe import Recipe, read_record
from deepdemix.foundations.registry import build_network, register_network
from deepdemix.foundations.run_metrics import read_metrics
from deepdemix.foundations.runs import (
    file_digest,
    load_encoder,
    load_network,
    load_start,
    recipe_from,
    save_network,
)
from deepdemix.foundations.state import read_state, write_state
from deepdemix.foundations.weights import read_weights, write_weights
from deepdemix.tasks import SeparationTask, build_task, check_monitor
from deepdemix.training import Interrupted, fit


@register_network("tiny_dropout")
class Tiny(nn.Module):
    "One frame at a time, with dropout."
    def __init__(self, hidden=6, dropout=0.5, rate=8000, sources=SOURCES):
        super().__init__()
        self.args = dict(hidden=hidden, dropout=dropout, rate=rate, sources=list(sources))
        self.sources, self.sample_rate, self.channels = tuple(sources), rate, 1
        self.stft = STFT(64, 32)
        self.encoder = nn.Sequential(nn.Linear(33, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.norm, self.decoder = nn.BatchNorm1d(hidden), nn.Linear(hidden, 132)

    def mask(self, magnitude):
        x = self.encoder(magnitude.transpose(2, 3))
        x = self.norm(x.flatten(0, 2)).view_as(x)
        return self.decoder(x).sigmoid().unflatten(-1, (33, 4)).transpose(2, 3)

    def forward(self, waveform):
        x = self.stft(waveform)
        return self.stft.inverse_stems(self.mask(x.abs()) * x[..., None], waveform.shape[-1])


class MemoryStore:
    "Four songs of three seconds, in memory."
    sources, sample_rate, digest, path = SOURCES, 8000, "four songs", "memory"
    def __init__(self, songs=4):
        generator, t = torch.Generator().manual_seed(0), torch.arange(24000) / 8000
        self.waves = [
            torch.stack([torch.sin(6.28 * 110 * (s + 1 + k / 7) * t) * 0.1 for s in range(4)])[:, None]
            + 0.01 * torch.randn(4, 1, 24000, generator=generator)
            for k in range(songs)
        ]
        self.songs = [
            SimpleNamespace(title=f"song {k}", split="train", frames=24000, duration=3.0, present=SOURCES,
                            flags=[], channels=1)
            for k in range(songs)
        ]
    def __len__(self): return len(self.songs)
    def split(self, name): return self
    def stems(self, i, start=0, frames=None):
        return self.waves[i][..., start:None if frames is None else start + frames].clone()


PLAIN = dict(duration=0.5, pitch=None, stretch=None, level=["gain", [-5, 5]])
STORE = MemoryStore()

def recipe(**fields):
    "Three epochs of six steps."
    base = dict(network="tiny_dropout", epochs=3, examples_per_epoch=24, batch_size=4, valid_examples=4,
                mixer=PLAIN, device="cpu", lr=0.01)
    return Recipe.from_dict(base | fields)

def stopping_after(n, action):
    "A task that does something while it computes its n-th loss."
    class Stopping(SeparationTask):
        count = 0
        def training_loss(self, batch):
            self.count += 1
            if self.count == n: action()
            return super().training_loss(batch)
    return Stopping

def same_runs(a, b):
    "Whether two runs hold the same weights, bit by bit, the same optimiser and the same figures."
    x, y = read_state(a/"resume.safetensors"), read_state(b/"resume.safetensors")
    for part in ("network", "average"):
        for p, q in zip(*(v[part].values() if isinstance(v[part], dict) else v[part] for v in (x, y))):
            assert torch.equal(p, q)
    for i in x["optimizer"]["state"]:
        for k, v in x["optimizer"]["state"][i].items(): assert torch.equal(v, y["optimizer"]["state"][i][k])
    for k, v in read_weights(a/"model.safetensors").items():
        assert torch.equal(v, read_weights(b/"model.safetensors")[k])
    assert read_metrics(a).drop(columns="seconds").equals(read_metrics(b).drop(columns="seconds"))
    return True


WHOLE = dict(ema=0.9, grad_clip=1.0, lr_schedule="warmup_cosine", accumulate=2)

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(recipe(**WHOLE), STORE, tmp_path_factory.mktemp("run")/"whole", progress=False)

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("loss", [3, 6, 9])
def test_stopped_by_a_signal_and_resumed_is_the_same(tmp_path, whole, number, loss):
    with pytest.raises(Interrupted, match=number.name):
        fit(recipe(**WHOLE), STORE, tmp_path / "run", progress=False,
            task=stopping_after(loss, lambda: os.kill(os.getpid(), number)))
    assert (read_record(tmp_path / "run")["status"] == "interrupted"
            and not read_record(tmp_path / "run")["finished"])
    fit(recipe(**WHOLE), STORE, tmp_path/"run", resume=True, progress=False)
    assert read_record(tmp_path/"run")["finished"]
    assert same_runs(whole, tmp_path/"run")

def test_stopped_by_time_again_and_again_is_the_same(tmp_path, whole):
    steps = []
    for i in range(1, 30):
        fit(recipe(**WHOLE, max_minutes=1e-9 * i), STORE, tmp_path/"run", resume=True, progress=False)
        steps.append(read_record(tmp_path/"run")["step"])
        load_network(tmp_path/"run")
        if steps[-1] == 9: break
    assert steps == list(range(1, 10)), "every start should do a single step"
    assert same_runs(whole, tmp_path/"run")

@pytest.mark.parametrize("clock", ["wall", "processor"])
def test_the_processors_clock_stands_still_while_it_sleeps(tmp_path, clock):
    worked = time.process_time()
    fit(recipe(epochs=1, examples_per_epoch=4, clock=clock), STORE, tmp_path / "run", progress=False,
        task=stopping_after(1, lambda: time.sleep(2)))
    worked, seconds = time.process_time() - worked, 3600 * read_record(tmp_path/"run")["hours"]
    assert seconds > 2 if clock == "wall" else seconds < worked + 0.05

@pytest.mark.skipif(not _glibc(), reason="memory is kept with glibc alone")
def test_every_batch_tidies_the_memory(tmp_path, monkeypatch):
    tidied = []
    monkeypatch.setattr(memory, "_tidier", lambda libc: lambda: tidied.append(libc))
    monkeypatch.setenv("DEEPDEMIX_KEEP_MEMORY", "1")
    fit(recipe(**WHOLE), STORE, tmp_path/"run", progress=False)
    assert len(tidied) == 18

def test_memory_is_kept_only_where_it_is_asked_for(monkeypatch):
    asked = []
    libc = SimpleNamespace(mallopt=lambda *words: asked.append(words), malloc_trim=asked.append)
    monkeypatch.setattr(memory, "_glibc", lambda: libc)
    monkeypatch.delenv("DEEPDEMIX_KEEP_MEMORY", raising=False)
    with keep_memory() as tidy: tidy()
    with keep_memory(False): pass
    assert not asked
    monkeypatch.setenv("DEEPDEMIX_KEEP_MEMORY", "1")
    with keep_memory(): assert asked

@pytest.mark.skipif(not _glibc(), reason="memory is kept with glibc alone")
def test_memory_is_kept_in_a_run_and_given_back_at_its_end():
    with keep_memory(True):
        del [torch.ones(2**24) for _ in range(12)][:]
        kept = _resident()
    assert kept - _resident() > 2**29

def test_killed_and_resumed_is_the_same(tmp_path, whole):
    "SIGKILL in the fifth step of nine; the state was saved after each of the four before."
    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "run")], capture_output=True, text=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_state(tmp_path/"run"/"resume.safetensors")["step"] == 4
    assert read_record(tmp_path/"run")["status"] == "running"
    fit(recipe(**WHOLE), STORE, tmp_path/"run", resume=True, progress=False)
    assert same_runs(whole, tmp_path/"run")
    assert not [p.name for p in (tmp_path / "run").iterdir()
                if p.name not in ("recipe.json", "model.safetensors", "metrics.csv", "resume.safetensors")]

def test_workers_change_nothing(tmp_path, whole):
    fit(recipe(**WHOLE, num_workers=2), STORE, tmp_path/"run", progress=False)
    assert same_runs(whole, tmp_path/"run")

def test_seed_decides_and_the_callers_random_state_stays(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(recipe(seed=seed, epochs=1), STORE, tmp_path/name, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_runs(tmp_path/"a", tmp_path/"b")
    assert not torch.equal(read_weights(tmp_path / "a" / "model.safetensors")["decoder.weight"],
                           read_weights(tmp_path / "c" / "model.safetensors")["decoder.weight"])

def test_signals_are_handed_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(recipe(epochs=1), STORE, tmp_path/"run", progress=False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

def test_trains_outside_the_main_thread(tmp_path):
    thread = threading.Thread(target=lambda: fit(recipe(epochs=1), STORE, tmp_path/"run", progress=False))
    thread.start()
    thread.join()
    assert read_record(tmp_path/"run")["finished"]


def test_accumulated_batches_are_one_large_batch(tmp_path):
    "Without dropout and batch statistics; the mixes are the same ones."
    plain = dict(network_args=dict(dropout=0.), epochs=1, examples_per_epoch=32, lr=1e-3)
    class Frozen(SeparationTask):
        def training_loss(self, batch):
            self.network.norm.eval()
            return super().training_loss(batch)
    for name, sizes in (("a", dict(batch_size=8)), ("b", dict(batch_size=2, accumulate=4))):
        fit(recipe(**plain, **sizes), STORE, tmp_path/name, progress=False, task=Frozen)
    a, b = (load_network(tmp_path/n).state_dict() for n in "ab")
    for k in a: assert torch.allclose(a[k], b[k], atol=2e-5), k

def test_best_weights_are_those_of_the_best_epoch(tmp_path):
    "The figure worsens after the second epoch; the weights of the second are kept."
    class Worse(SeparationTask):
        kept, figures = [], iter([3., 1., 2., 5.])
        def validate(self):
            self.kept.append({k: v.clone() for k, v in self.network.state_dict().items()})
            return {"valid_loss": next(self.figures), "valid_extra": 7}
    fit(recipe(epochs=4), STORE, tmp_path/"run", progress=False, task=Worse)
    for k, v in read_weights(tmp_path/"run"/"model.safetensors").items():
        assert torch.equal(v, Worse.kept[1][k])
    assert read_record(tmp_path / "run")["best"] == {
        "epoch": 2, "step": 12, "valid_loss": 1.0, "valid_extra": 7.0,
    }
    assert list(read_metrics(tmp_path/"run").valid_extra) == [7] * 4

def test_patience_ends_a_run_and_higher_is_better_for_sdr(tmp_path):
    class Scored(SeparationTask):
        monitor, figures = "valid_sdr", iter([1., 3., 2., 2., 9.])
        def validate(self): return {"valid_sdr": next(self.figures)}
    fit(recipe(epochs=5, patience=2), STORE, tmp_path/"run", progress=False, task=Scored)
    record = read_record(tmp_path/"run")
    assert (record["epoch"], record["best"]["epoch"], record["finished"]) == (4, 2, True)

def test_a_figure_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no figure 'valid_sdr'.*valid_loss"):
        fit(recipe(monitor="valid_sdr"), STORE, tmp_path/"run", progress=False)

def test_frozen_encoder_stays_and_thaws(tmp_path):
    start = recipe(epochs=1)
    fit(start, STORE, tmp_path/"first", progress=False)
    before = read_weights(tmp_path/"first"/"model.safetensors")["encoder.0.weight"]
    after = {}
    for freeze in (True, 1, 2, False):
        fit(recipe(epochs=2, encoder=str(tmp_path / "first"), freeze_encoder=freeze), STORE,
            tmp_path / str(freeze), progress=False)
        after[str(freeze)] = read_state(tmp_path / str(freeze) / "resume.safetensors")["network"][
            "encoder.0.weight"
        ]
    assert torch.equal(after["True"], before) and torch.equal(after["2"], before)
    assert not torch.equal(after["1"], before) and not torch.equal(after["False"], before)
    assert read_record(tmp_path / "True")["data"]["encoder"] == file_digest(
        tmp_path / "first" / "model.safetensors"
    )

def test_a_run_goes_on_with_the_encoder_that_it_began_with(tmp_path):
    for k in range(2): fit(recipe(epochs=1, seed=k), STORE, tmp_path/str(k), progress=False)
    fit(recipe(epochs=1, encoder=str(tmp_path/"0")), STORE, tmp_path/"run", progress=False)
    for other in (str(tmp_path/"1"), None):
        with pytest.raises(UserError, match="with another encoder"):
            fit(recipe(epochs=2, encoder=other), STORE, tmp_path/"run", resume=True, progress=False)
    with pytest.raises(UserError, match="without an encoder"):
        fit(recipe(epochs=2, encoder=str(tmp_path/"1")), STORE, tmp_path/"0", resume=True, progress=False)
    (tmp_path/"0").rename(tmp_path/"moved")
    fit(recipe(epochs=2, encoder=str(tmp_path/"moved")), STORE, tmp_path/"run", resume=True, progress=False)
    assert read_record(tmp_path/"run")["data"]["encoder"] == file_digest(tmp_path/"moved"/"model.safetensors")

def test_a_network_is_trained_further(tmp_path):
    "With a step size of next to nothing it stays what it was; what comes from the run and what begins anew."
    first = fit(recipe(epochs=2, freeze_encoder=1), STORE, tmp_path/"first", progress=False)
    further = recipe_from(first, epochs=1, lr=1e-12, seed=3, ema=0.9)
    assert (further.network, further.mixer, further.freeze_encoder) == ("tiny_dropout", PLAIN, False)
    second = fit(further, STORE, tmp_path/"second", progress=False)
    before, after = read_weights(first/"model.safetensors"), read_weights(second/"model.safetensors")
    for k in ("encoder.0.weight", "norm.weight", "decoder.bias"):
        assert torch.allclose(before[k], after[k], atol=1e-8), k
    record = read_record(second)
    assert (record["step"], record["data"]["start"]) == (6, file_digest(first/"model.safetensors"))
    assert not torch.equal(
        read_weights(
            fit(recipe_from(second, lr=0.01), STORE, tmp_path / "third", progress=False) / "model.safetensors"
        )["decoder.bias"],
        after["decoder.bias"],
    )

def test_a_run_goes_on_with_the_start_that_it_began_with(tmp_path):
    a, b = (fit(recipe(epochs=1, seed=k), STORE, tmp_path/str(k), progress=False) for k in range(2))
    run = fit(recipe_from(a), STORE, tmp_path/"run", progress=False)
    with pytest.raises(UserError, match="with another start"):
        fit(recipe_from(b, epochs=2, seed=0), STORE, run, resume=True, progress=False)
    with pytest.raises(UserError, match="without a start"):
        fit(recipe(epochs=2, start=str(b)), STORE, a, resume=True, progress=False)
    fit(recipe_from(a, epochs=2), STORE, run, resume=True, progress=False)
    whole = fit(recipe_from(a, epochs=2), STORE, tmp_path/"whole", progress=False)
    for k, v in read_state(whole/"resume.safetensors")["network"].items():
        assert torch.equal(v, read_state(run/"resume.safetensors")["network"][k]), k

def test_what_a_network_can_not_start_from(tmp_path):
    first = fit(recipe(epochs=1), STORE, tmp_path/"first", progress=False)
    with pytest.raises(UserError, match="does not fit the network"):
        fit(recipe_from(first, network_args=dict(hidden=5)), STORE, tmp_path/"run", progress=False)
    with pytest.raises(UserError, match="exclude each other"): recipe_from(first, encoder=str(first))
    with pytest.raises(UserError, match="default has sample_rate 44100, the network to be trained 8000"):
        fit(recipe(start="default"), STORE, tmp_path/"run", progress=False)
    with pytest.raises(UserError, match="the encoder of .*weights/default does not fit"):
        fit(recipe(encoder="default"), STORE, tmp_path/"run", progress=False)
    with pytest.raises(UserError, match="nowhere"):
        fit(recipe(start="nowhere"), STORE, tmp_path/"run", progress=False)
    assert not (tmp_path/"run").exists()

def test_a_network_starts_from_a_smaller_one_and_not_from_a_larger_one(tmp_path, capsys):
    "Attention begins as nothing, so what the smaller one gives stays; what is learnt is never left out."
    small = dict(width=8, hidden=8, layers=1, octave=16, band=8, bandwidth=16000.0, window_length=512,
                 hop_length=256)
    for name, args in (("plain", small), ("heads", small | dict(attention=2))):
        network = build_network("compact", **args)
        save_network(network, Recipe(network="compact", network_args=network.args), tmp_path / name)
    plain, larger = load_network(tmp_path/"plain"), build_network("compact", **small, attention=2).eval()
    noise = torch.randn(1, 2, 8000)
    with torch.no_grad():
        assert not torch.allclose(larger(noise), plain(noise), atol=1e-5)
        load_start(larger, tmp_path/"plain")
        assert capsys.readouterr().err.count("lacks 6 tensors (encoder.attention.0.") == 1
        torch.testing.assert_close(larger(noise), plain(noise))
    with pytest.raises(UserError, match="attention.0.norm.weight is unknown"):
        load_start(build_network("compact", **small), tmp_path/"heads")
    with pytest.raises(UserError, match="does not fit the network"):
        load_start(build_network("open_unmix", channels=2), tmp_path/"plain")

@register_network("tiny_normal")
class TinyNormal(Tiny):
    "With a normalisation behind a layer that learns."
    def __init__(self, hidden=6, dropout=0.2):
        super().__init__(hidden, dropout)
        self.encoder = nn.Sequential(nn.Linear(33, hidden), Normal(hidden), nn.ReLU(), nn.Dropout(dropout))

class Normal(nn.BatchNorm1d):
    def forward(self, x): return super().forward(x.flatten(0, -2)).view_as(x)

NORMAL = dict(network="tiny_normal", ema=0.9, epochs=2)

def test_averaged_weights_are_kept_with_statistics_of_their_own(tmp_path):
    """What the normalisation would say of the last training batches; the training itself goes on as without
    an average."""
    for name, ema in (("plain", 0.), ("mean", 0.9)):
        fit(recipe(**NORMAL | dict(ema=ema)), STORE, tmp_path/name, progress=False)
    states = [read_state(tmp_path/name/"resume.safetensors") for name in ("plain", "mean")]
    assert all(torch.equal(v, states[1]["network"][k]) for k, v in states[0]["network"].items())
    kept, network = read_weights(tmp_path/"mean"/"model.safetensors"), TinyNormal()
    network.load_state_dict(kept)
    task = SeparationTask(network, recipe(**NORMAL), STORE)
    best = read_record(tmp_path/"mean")["best"]["step"]
    sums = [network.stft.magnitude(task.train_batch(k)[0]).transpose(2, 3) for k in range(best)]
    with torch.no_grad(): seen = [network.encoder[0](x).flatten(0, -2).mean(0) for x in sums]
    torch.testing.assert_close(
        kept["encoder.1.running_mean"], torch.stack(seen).mean(0), atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(
        kept["encoder.1.running_mean"], states[1]["network"]["encoder.1.running_mean"], atol=1e-3
    )

def test_a_stopped_run_with_statistics_is_the_same(tmp_path):
    fit(recipe(**NORMAL), STORE, tmp_path/"whole", progress=False)
    with pytest.raises(Interrupted):
        fit(recipe(**NORMAL), STORE, tmp_path / "run", progress=False,
            task=stopping_after(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    fit(recipe(**NORMAL), STORE, tmp_path/"run", resume=True, progress=False)
    assert same_runs(tmp_path/"whole", tmp_path/"run")

def test_a_frozen_normalisation_keeps_its_statistics(tmp_path):
    fit(recipe(**NORMAL), STORE, tmp_path/"first", progress=False)
    fit(recipe(**NORMAL, encoder=str(tmp_path / "first"), freeze_encoder=True), STORE, tmp_path / "run",
        progress=False)
    first, run = (read_weights(tmp_path/name/"model.safetensors") for name in ("first", "run"))
    assert all(torch.equal(first[k], run[k]) for k in first if k.startswith("encoder"))

def test_the_last_weights_can_be_loaded_too(tmp_path):
    fit(recipe(epochs=2), STORE, tmp_path/"run", progress=False)
    last = read_state(tmp_path/"run"/"resume.safetensors")["network"]
    assert all(
        torch.equal(v, last[k]) for k, v in load_network(tmp_path / "run", last=True).state_dict().items()
    )
    fit(recipe(epochs=1, ema=0.9), STORE, tmp_path/"mean", progress=False)
    with pytest.raises(UserError, match="averaged"): load_network(tmp_path/"mean", last=True)
    (tmp_path/"run"/"resume.safetensors").unlink()
    with pytest.raises(UserError, match="no resume.safetensors"): load_network(tmp_path/"run", last=True)

def test_encoder_learns_at_its_own_rate():
    task = SimpleNamespace(network=Tiny(), heads=None)
    groups = build_optimizer(task, recipe(encoder_lr_scale=0.1)).param_groups
    assert [round(g["lr"], 6) for g in groups] == [0.01, 0.001]
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        p.numel() for p in task.network.parameters()
    )

def test_heads_are_trained_resumed_and_left_out(tmp_path):
    class Headed(SeparationTask):
        stop = 0
        def __init__(self, *args):
            super().__init__(*args)
            self.heads = nn.Linear(1, 1)
        def training_loss(self, batch):
            self.stop += 1
            if (self.stop == 4 and not (tmp_path / "b" / "resume.safetensors").exists()
                and (tmp_path / "a").exists() and (tmp_path / "b").exists()):
                os.kill(os.getpid(), signal.SIGINT)
            loss, _ = super().training_loss(batch)
            return loss + self.heads(torch.ones(1)).square().mean(), {"head": self.heads.weight.sum()}
    fit(recipe(), STORE, tmp_path/"a", progress=False, task=Headed)
    with pytest.raises(Interrupted): fit(recipe(), STORE, tmp_path/"b", progress=False, task=Headed)
    fit(recipe(), STORE, tmp_path/"b", resume=True, progress=False, task=Headed)
    a, b = (read_state(tmp_path/n/"resume.safetensors") for n in "ab")
    assert torch.equal(a["heads"]["weight"], b["heads"]["weight"]) and same_runs(tmp_path/"a", tmp_path/"b")
    assert list(read_metrics(tmp_path/"a").columns).count("head") == 1
    load_network(tmp_path/"a")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    class Exploding(SeparationTask):
        count = 0
        def training_loss(self, batch):
            self.count += 1
            loss, logs = super().training_loss(batch)
            return loss * (float("nan") if self.count == 9 else 1), logs
    with pytest.raises(UserError, match="no longer finite after step 8"):
        fit(recipe(save_minutes=0), STORE, tmp_path/"run", progress=False, task=Exploding)
    assert read_record(tmp_path/"run")["status"] == "failed"
    state = read_state(tmp_path/"run"/"resume.safetensors")
    assert state["step"] == 8 and all(torch.isfinite(v).all() for v in state["network"].values())
    load_network(tmp_path/"run")

def test_spoilt_weights_are_never_saved(tmp_path):
    class Spoiling(SeparationTask):
        count = 0
        def training_loss(self, batch):
            self.count += 1
            loss, logs = super().training_loss(batch)
            return (loss + (0 * self.network.decoder.bias.sum()).sqrt() if self.count == 3 else loss), logs
    with pytest.raises(UserError, match="no longer finite"):
        fit(recipe(save_minutes=0), STORE, tmp_path/"run", progress=False, task=Spoiling)
    assert read_state(tmp_path/"run"/"resume.safetensors")["step"] == 2

def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path):
    fit(recipe(epochs=1), STORE, tmp_path/"run", progress=False)
    with pytest.raises(UserError, match="already holds a run"): fit(recipe(epochs=1), STORE, tmp_path/"run")
    with pytest.raises(
        UserError,
        match="lr was 0.01 and is 0.5.*seed was 0 and is 1|seed was 0 and is 1.*lr was 0.01 and is 0.5",
    ):
        fit(recipe(lr=0.5, seed=1), STORE, tmp_path/"run", resume=True)
    other = MemoryStore()
    other.digest = "other songs"
    with pytest.raises(UserError, match="other data"):
        fit(recipe(epochs=1), other, tmp_path/"run", resume=True)
    record = json.loads((tmp_path/"run"/"recipe.json").read_text())
    (tmp_path/"run"/"recipe.json").write_text(json.dumps(record | {"format": 99}))
    for call in (lambda: fit(recipe(epochs=1), STORE, tmp_path / "run", resume=True),
                 lambda: load_network(tmp_path / "run")):
        with pytest.raises(UserError, match="format 99"): call()

def test_a_finished_run_is_left_alone_and_can_be_prolonged(tmp_path):
    out = fit(recipe(epochs=1), STORE, tmp_path/"run", progress=False)
    stamp = (out/"model.safetensors").stat().st_mtime_ns, (out/"recipe.json").read_text()
    fit(recipe(epochs=1), STORE, out, resume=True, progress=False)
    assert stamp == ((out/"model.safetensors").stat().st_mtime_ns, (out/"recipe.json").read_text())
    fit(recipe(epochs=3), STORE, out, resume=True, progress=False)
    assert same_runs(out, fit(recipe(epochs=3), STORE, tmp_path/"at once", progress=False))

@pytest.mark.parametrize(
    "fields, message",
    [(dict(network="no such"), "known:"), (dict(network_args=dict(hiden=3)), "did you mean hidden"),
     (dict(mixer=dict(ptich=1)), "did you mean pitch"), (dict(loss="l2"), "loss"),
     (dict(device="cuda"), "no cuda device"), (dict(precision="16-mixed"), "needs a GPU"),
     (dict(kind="dreaming"), "kind of task"), (dict(encoder="nowhere"), "nowhere")],
)
def test_what_a_user_can_fix_is_said(tmp_path, fields, message):
    if fields.get("device") == "cuda" and torch.cuda.is_available(): pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match=message): fit(recipe(**fields), STORE, tmp_path/"run", progress=False)
    assert not (tmp_path/"run").exists()

def test_a_file_in_the_way_and_data_without_songs(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(UserError, match="is a file"): fit(recipe(), STORE, tmp_path/"file")
    with pytest.raises(UserError, match="no songs in its 'train' split"):
        fit(recipe(), MemoryStore(0), tmp_path/"run")

def test_tensorboard_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"deepdemix\[loggers\]"):
        fit(recipe(), STORE, tmp_path/"run", logger="tensorboard")

def test_lower_precision_trains(tmp_path):
    fit(recipe(epochs=1, precision="bf16-mixed"), STORE, tmp_path/"run", progress=False)
    assert load_network(tmp_path/"run").decoder.weight.dtype == torch.float32

@pytest.mark.parametrize("around", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)],
                         ids=["plain", "within autocast"])
def test_lower_precision_follows_single_precision(tmp_path, monkeypatch, around):
    "Rounded copies of weights must not outlive their step: a network that learns then falls behind."
    slow_or_missing(monkeypatch, 0.5)
    tables = []
    for p in ("32", "bf16-mixed"):
        asked = recipe(precision=p, lr=0.03, epochs=4, ema=0.5, network_args={"dropout": 0.})
        with around(): run = fit(asked, STORE, tmp_path/p, progress=False)
        assert read_record(run)["precision"] == p
        tables.append(read_metrics(run)[["train_loss", "valid_loss"]].to_numpy())
    single, half = tables
    assert single[-1, 0] < 0.8 * single[0, 0]
    assert np.abs(half / single - 1).max() < 0.02

AVX2_ONLY = """
import sys, torch
from deepdemix.data import prepare_toy
from deepdemix.foundations.registry import build_network, known_networks
from deepdemix.training import fit
from deepdemix.foundations.runs import load_network
from deepdemix.foundations.recipe import read_record
from deepdemix.foundations.profiles import recipe_for
torch.set_num_threads(1)
home = sys.argv[1]
store = prepare_toy(8, home + "/toy", duration=1., valid=0.25, test=0.25, progress=False)
short = {"precision": "bf16-mixed", "epochs": 1, "examples_per_epoch": 2, "batch_size": 2,
         "valid_examples": 1, "validation": "mixes", "device": "cpu", "mixer.pitch": None,
         "mixer.stretch": None}
for name in known_networks():
    if name == "ensemble": continue # it has the networks of others
    r = recipe_for("pretraining" if name == "encoder" else name, "demo", network=name).override(short)
    whole = hasattr(build_network(name, **r.network_args), "duration") # of excerpts of one length only
    if not whole: r = r.override({"mixer.duration": 0.2})
    network = load_network(fit(r, store, f"{home}/{name}"))
    x = torch.randn(1, network.channels, 44100 if whole else 8820, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = network(x)
        with torch.autocast("cpu", torch.bfloat16): around = network(x)
    assert (around.float() - plain).norm() < 0.05 * plain.norm(), name
    print(name, read_record(f"{home}/{name}")["precision"])
"""

def test_every_network_trains_and_separates_on_processors_with_avx2_only(tmp_path):
    env = os.environ | dict(ONEDNN_MAX_CPU_ISA="AVX2", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", AVX2_ONLY, str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    used = dict(line.split() for line in done.stdout.splitlines())
    assert {"compact", "ddm", "encoder", "recurrent"} <= set(used)
    assert done.stderr.count("so single precision is used") == list(used.values()).count("32")

def slow_or_missing(monkeypatch, seconds):
    "Have a pass in bfloat16 take so many times as long as one in single precision; None: fail."
    def passed(output, inputs, precision):
        if precision == "32": return 1.
        if seconds is None: raise RuntimeError("no such primitive")
        return seconds
    monkeypatch.setattr(precision, "pass_seconds", passed)

@pytest.mark.parametrize(
    "seconds,used,line",
    [(None, "32", "can't train with precision=bf16-mixed"), (3.5, "32", "takes 3.5 times as long as single"),
     (0.9, "bf16-mixed", ""), (1.1, "bf16-mixed", "")],
)
def test_a_precision_that_is_missing_or_no_gain_becomes_single_precision(
    tmp_path, monkeypatch, capsys, seconds, used, line
):
    slow_or_missing(monkeypatch, seconds)
    runs = [fit(recipe(epochs=1, precision=p), STORE, tmp_path / name)
            for name, p in (("asked", "bf16-mixed"), ("single", "32"))]
    said = [x for x in capsys.readouterr().err.splitlines() if "precision" in x]
    assert len(said) == bool(line) and line in "".join(said)
    assert (read_record(runs[0])["precision"], read_record(runs[0])["recipe"]["precision"]) == (
        used, "bf16-mixed",
    )
    first, second = (read_weights(r/"model.safetensors") for r in runs)
    assert all(torch.equal(first[k], second[k]) for k in first) == (used == "32")

def test_a_resumed_run_keeps_its_precision_while_the_processor_has_it(tmp_path, monkeypatch, capsys):
    slow_or_missing(monkeypatch, 0.5)
    stop = stopping_after(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    for name in ("same", "moved"):
        with pytest.raises(Interrupted): fit(recipe(precision="bf16-mixed"), STORE, tmp_path/name, task=stop)
    slow_or_missing(monkeypatch, 9.)
    assert (
        read_record(fit(recipe(precision="bf16-mixed"), STORE, tmp_path / "same", resume=True))["precision"]
        == "bf16-mixed"
    )
    assert "single precision" not in capsys.readouterr().err
    slow_or_missing(monkeypatch, None)
    assert (
        read_record(fit(recipe(precision="bf16-mixed"), STORE, tmp_path / "moved", resume=True))["precision"]
        == "32"
    )
    assert "so single precision is used" in capsys.readouterr().err

@pytest.mark.parametrize("around",
                         [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.no_grad],
                         ids=["autocast", "inference", "no_grad"])
def test_what_a_caller_has_set_changes_no_run(tmp_path, around):
    runs = [fit(recipe(epochs=1), STORE, tmp_path/"plain", progress=False)]
    with around(): runs.append(fit(recipe(epochs=1), STORE, tmp_path/"around", progress=False))
    first, second = (read_weights(r/"model.safetensors") for r in runs)
    assert all(first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first)

@pytest.mark.cuda
def test_trains_and_resumes_on_cuda(tmp_path):
    fields = dict(device="cuda", precision="16-mixed", ema=0.9)
    with pytest.raises(Interrupted):
        fit(recipe(**fields), STORE, tmp_path / "run", progress=False,
            task=stopping_after(9, lambda: os.kill(os.getpid(), signal.SIGINT)))
    fit(recipe(**fields), STORE, tmp_path/"run", resume=True, progress=False)
    assert (read_record(tmp_path / "run")["finished"]
            and read_metrics(tmp_path / "run").train_loss.is_monotonic_decreasing)


@pytest.fixture
def folder(tmp_path):
    save_network(Tiny(), recipe(), tmp_path/"model")
    return tmp_path/"model"

class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.ckpt", "pytorch_model.bin"])
@pytest.mark.parametrize("protocol", ["zip", "old"])
def test_pickles_are_refused_and_not_executed(tmp_path, folder, name, protocol):
    (folder/"model.safetensors").unlink()
    torch.save(Bomb(tmp_path/"executed"), folder/name, _use_new_zipfile_serialization=protocol == "zip")
    for path in (folder, folder/name):
        with pytest.raises(UserError, match="pickle"): load_network(path)
    with pytest.raises(UserError, match="pickle"): load_encoder(Tiny(), folder)
    assert not (tmp_path/"executed").exists()

@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-7], lambda b: b[:5], lambda b: b"", lambda b: (2**60).to_bytes(8, "little") + b[8:],
     lambda b: (len(b) + 1).to_bytes(8, "little") + b[8:], lambda b: b[:20] + b"\xff" + b[21:],
     lambda b: b + b"more"],
)
def test_damaged_weights_are_refused(folder, damage):
    whole = (folder/"model.safetensors").read_bytes()
    (folder/"model.safetensors").write_bytes(damage(whole))
    with pytest.raises(UserError, match="safetensors"): load_network(folder)

def test_weights_that_do_not_fit_name_their_layers(folder):
    state = read_weights(folder/"model.safetensors")
    write_weights(
        folder / "model.safetensors",
        {**{k: v for k, v in state.items() if k != "norm.bias"}, "decoder.bias": torch.zeros(131),
         "extra": torch.zeros(1)},
    )
    with pytest.raises(
        UserError,
        match=r"decoder.bias has shape \(131,\) instead of \(132,\); norm.bias is missing; extra is unknown",
    ):
        load_network(folder)
    write_weights(folder/"model.safetensors", state | {"norm.bias": torch.full((6,), torch.nan)})
    with pytest.raises(UserError, match="not finite"): load_network(folder)

@pytest.mark.parametrize(
    "change",
    [dict(network=["tiny_dropout", {"hidden": 10**8}]), dict(network=["tiny_dropout", {"hidden": "x"}]),
     dict(network=["no such", {}]), dict(network=[1]), dict(network=["tiny_dropout", {"hidden": -1}]),
     dict(format=None)],
)
def test_a_strangers_recipe_is_not_believed(folder, change):
    record = json.loads((folder/"recipe.json").read_text())
    (folder/"recipe.json").write_text(json.dumps(record | change))
    with pytest.raises(UserError): load_network(folder)

@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"recipe": 3, "format": 1}'])
def test_a_damaged_recipe_is_said(folder, text):
    (folder/"recipe.json").write_text(text)
    with pytest.raises(UserError, match="recipe.json"): load_network(folder)

def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path):
    net = Tiny(hidden=200).eval()
    for half in (False, True):
        save_network(net, recipe(network_args=dict(hidden=200)), tmp_path/str(half), half=half)
    sizes = [(tmp_path/n/"model.safetensors").stat().st_size for n in ("True", "False")]
    assert sizes[0] < 0.55 * sizes[1]
    x = torch.randn(1, 2, 4000)
    assert load_network(tmp_path/"True").decoder.weight.dtype == torch.float32
    x = torch.randn(2, 1, 4000)
    assert (load_network(tmp_path/"True")(x) - net(x)).abs().max() < 1e-3 * net(x).abs().max()

def test_an_encoder_that_does_not_fit_names_its_layers(folder):
    with pytest.raises(UserError, match=r"0.weight has shape \(6, 33\) instead of \(5, 33\)"):
        load_encoder(Tiny(hidden=5), folder)
    with pytest.raises(UserError, match="no encoder"): load_encoder(nn.Linear(1, 1), folder)
    assert torch.equal(load_encoder(Tiny(), folder).encoder[0].weight, load_network(folder).encoder[0].weight)


LEAVES = (st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text()
          | st.lists(st.floats(width=32), max_size=4).map(torch.tensor))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=12,
)

def same_tree(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict): return list(a) == list(b) and all(same_tree(a[k], b[k]) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(map(same_tree, a, b))
    return a == b or (a != a and b != b)

@settings(max_examples=60, deadline=None)
@given(tree=TREES)
def test_any_state_survives_the_file(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("state")/"state.safetensors"
    write_state(path, tree)
    assert same_tree(tree, read_state(path))

NAMES = st.sampled_from([
    "lr", "betas", "mixer.pitch", "network", "freeze_encoder", "epochs", "ema", "task_args.margin", "encoder",
])
@settings(max_examples=200, deadline=None)
@given(name=NAMES, value=st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5)
       | st.lists(st.floats(0, 1), max_size=3))
def test_override_accepts_or_says_which_field(name, value):
    try: new = Recipe().override({name: value})
    except UserError as e: assert name.split(".")[0] in str(e)
    else: assert Recipe.from_dict(json.loads(json.dumps(new.to_dict()))) == new

@settings(max_examples=60, deadline=None)
@given(schedule=st.sampled_from(["none", "cosine", "warmup_cosine", "plateau"]), epochs=st.integers(1, 20),
       share=st.floats(0, 1))
def test_learning_rates_stay_between_nothing_and_lr(schedule, epochs, share):
    r = Recipe(lr_schedule=schedule, epochs=epochs, examples_per_epoch=64)
    assert 0 <= lr_factor(r, int(share * r.steps), [1.0] * int(share * epochs)) <= 1

@pytest.mark.parametrize("profile", list(PROFILES))
@pytest.mark.parametrize("name", ["baseline", "ddm", "ddm_skip", "recurrent", "pretraining"])
def test_every_model_has_a_recipe_in_every_profile_that_builds(profile, name):
    if profile in ("author", "paper") and name in ("ddm", "ddm_skip", "pretraining"):
        pytest.skip("the paper's sizes: their own rooms build them")
    r = recipe_for(name, profile, seed=3)
    assert (r.seed, r.batch_size <= 16, Recipe.from_dict(r.to_dict())) == (3, True, r)
    build_network(r.network, **r.network_args)

@pytest.mark.musdb
def test_the_baseline_learns_and_resumes_on_real_songs(tmp_path, musdb_path):
    "Two training songs and one validation song of MUSDB18; the paper's baseline, its mixer, a few steps."
    from deepdemix import data
    held_out = set(data.validation_titles())
    files = sorted((musdb_path/"train").glob("*.stem.mp4"))
    valid = [f for f in files if f.name.removesuffix(".stem.mp4") in held_out][:1]
    (tmp_path/"musdb"/"train").mkdir(parents=True)
    (tmp_path/"musdb"/"test").mkdir()
    for f in [f for f in files if f not in valid][:2] + valid:
        (tmp_path/"musdb"/"train"/f.name).symlink_to(f.resolve())
    store = data.prepare_musdb(tmp_path/"musdb", tmp_path/"store", progress=False)
    assert [len(store.split(s)) for s in ("train", "valid")] == [2, 1]
    r = recipe_for("baseline", "paper", epochs=2, examples_per_epoch=8, batch_size=2, valid_examples=2,
                   validation="songs", device="cpu", lr=0.01)
    with pytest.raises(Interrupted):
        fit(r, store, tmp_path / "run", progress=False,
            task=stopping_after(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    table = read_metrics(fit(r, store, tmp_path/"run", resume=True, progress=False))
    assert table.valid_loss.iloc[-1] < table.valid_loss.iloc[0]
    assert table[[f"valid_sdr_{s}" for s in SOURCES]].notna().to_numpy().all()
    assert read_record(tmp_path/"run")["parameters"] == 227_942


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(recipe(**WHOLE, save_minutes=0), STORE, Path(sys.argv[1]), progress=False,
        task=stopping_after(9, lambda: os.kill(os.getpid(), signal.SIGKILL)))

# -- what is checked beforehand, and what a start leaves ---------------------------

@register_network("one_length")
class OneLength(Tiny):
    "Takes half a second."
    duration = 0.5

@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(network="one_length", mixer=PLAIN | dict(duration=2)),
         "mixer.duration is 2 s, the network 'one_length' takes 0.5 s"),
        (dict(network_args=dict(rate=16000)),
         "the data has sample_rate 8000, the network 'tiny_dropout' 16000"),
        (dict(network_args=dict(sources=list(SOURCES[::-1]))), "the data has sources"),
        (dict(monitor="valid_sdr"),
         "no figure 'valid_sdr' to monitor, but train_loss, valid_loss; validation=songs gives valid_sdr"),
        (dict(monitor="valid_los"), "no figure 'valid_los'"),
        (dict(validation="songs", monitor="valid_sdr_guitar"), "valid_sdr_vocals"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(tmp_path, fields, message):
    task = stopping_after(1, lambda: pytest.fail("it began"))
    with pytest.raises(UserError, match=message) as error:
        fit(recipe(**fields), STORE, tmp_path/"run", progress=False, task=task)
    assert "\n" not in str(error.value) and not (tmp_path/"run").exists()

@pytest.mark.parametrize("fields", [dict(), dict(validation="songs")])
def test_every_figure_of_separation_can_be_monitored(tmp_path, fields):
    r = recipe(epochs=1, **fields)
    run = fit(r, STORE, tmp_path/"run", progress=False)
    figures = set(read_metrics(run).columns) - {"epoch", "step", "examples", "lr", "seconds"}
    assert figures == set(build_task(r, STORE).figures)
    for name in figures: check_monitor(build_task(r, STORE), name)

def test_a_task_that_validates_in_its_own_way_may_monitor_anything(tmp_path):
    class Own(SeparationTask):
        def validate(self): return dict(valid_loss=1., valid_own=2.)
    assert (
        read_record(
            fit(recipe(epochs=1, monitor="valid_own"), STORE, tmp_path / "run", progress=False, task=Own)
        )["best"]["valid_own"]
        == 2
    )

def test_a_run_is_in_single_precision_whatever_torchs_default(tmp_path):
    torch.set_default_dtype(torch.float64)
    try: run = fit(recipe(epochs=1), STORE, tmp_path/"run", progress=False)
    finally: torch.set_default_dtype(torch.float32)
    assert {v.dtype for v in read_weights(run/"model.safetensors").values()} <= {torch.float32, torch.int64}

def test_a_loss_for_other_networks_is_said(tmp_path):
    with pytest.raises(UserError, match="'l1_cells' needs cells, which the network 'tiny_dropout' has not"):
        fit(recipe(loss="l1_cells"), STORE, tmp_path/"run", progress=False)
    assert not (tmp_path/"run").exists()

def test_a_loss_without_weights_is_said(tmp_path):
    class Loose(SeparationTask):
        def training_loss(self, batch): return super().training_loss(batch)[0].detach(), {}
    with pytest.raises(UserError, match="no weight has a part in the loss"):
        fit(recipe(), STORE, tmp_path/"run", progress=False, task=Loose)
    assert not (tmp_path/"run").exists()

def test_a_start_without_a_step_bars_nothing(tmp_path):
    "Neither one that failed nor one that was killed; not even in a folder with other files."
    class Broken(SeparationTask):
        def training_loss(self, batch): raise OSError("the disk is gone")
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"notes.txt").write_text("mine")
    with pytest.raises(OSError, match="the disk is gone"):
        fit(recipe(), STORE, tmp_path/"run", progress=False, task=Broken)
    assert [p.name for p in (tmp_path/"run").iterdir()] == ["notes.txt"]
    killed = os.fork()
    if not killed:
        try:
            fit(recipe(), STORE, tmp_path / "run", progress=False,
                task=stopping_after(1, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        finally: os._exit(1)
    os.waitpid(killed, 0)
    assert read_record(tmp_path/"run")["status"] == "running"
    fit(recipe(epochs=1, lr=0.02), STORE, tmp_path/"run", progress=False)
    assert read_record(tmp_path/"run")["finished"]

def test_settings_that_lie_in_the_folder_are_not_taken_away(tmp_path):
    (tmp_path/"run").mkdir()
    recipe().save(tmp_path/"run"/"recipe.json")
    with pytest.raises(UserError, match="already holds a run"):
        fit(recipe(), STORE, tmp_path/"run", progress=False)
    assert Recipe.load(tmp_path/"run"/"recipe.json") == recipe()

def test_one_training_a_folder(tmp_path, whole):
    "The second one is refused, in another thread as in another process, and the first one is none the worse."
    refused = []
    def second():
        for resume in (False, True):
            try: fit(recipe(**WHOLE), STORE, tmp_path/"run", resume=resume, progress=False)
            except UserError as e: refused.append(str(e))
        words = ["train", "--model", "recurrent", "--profile", "demo", "--data", str(tmp_path / "store"),
                 "--out", str(tmp_path / "run")]
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from deepdemix.cli import main; sys.exit(main())", *words],
            capture_output=True, text=True,
        )
        refused.append(done.stderr)
        assert done.returncode == 2
    from deepdemix.data import prepare_toy
    prepare_toy(6, tmp_path/"store", duration=1.0, progress=False)
    task = stopping_after(3, lambda: [t.start() or t.join() for t in [threading.Thread(target=second)]])
    fit(recipe(**WHOLE), STORE, tmp_path/"run", progress=False, task=task)
    assert len(refused) == 3 and all(
        "another process is training in" in line and line.count("\n") <= 1 for line in refused
    )
    assert same_runs(tmp_path/"run", whole)
    assert sorted(p.name for p in (tmp_path/"run").iterdir()) == sorted(p.name for p in whole.iterdir())
