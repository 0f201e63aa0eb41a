"""Learning from songs without stems: edge cases of the notebook `contrast/mixtures`."""
import math

import numpy as np
import pytest
import torch

from deepdemix.contrast.dense import Grid
from deepdemix.contrast.mixtures import (
    MixtureSettings,
    add_under,
    kept_cells,
    mixit_loss,
    mixture_settings,
    song_views,
    sort_stems,
)
from deepdemix.data import prepare_toy
from deepdemix.foundations.files import UserError
from deepdemix.foundations.recipe import Recipe
from deepdemix.foundations.run_metrics import read_metrics
from deepdemix.foundations.state import read_state
from deepdemix.networks.compact import Compact
from deepdemix.tasks import build_task
from deepdemix.training import fit

SMALL = dict(width=8, layers=1, hidden=8, window_length=1024, hop_length=512, dropout=0.0)


def recipe(kind, loss="supcon", **more):
    fields = dict(kind=kind, network="compact", network_args=SMALL, loss=loss, batch_size=4, epochs=2,
                  examples_per_epoch=16, valid_examples=8, lr=0.003, device="cpu",
                  mixer=dict(duration=1.0, pitch=None, stretch=None))
    return Recipe(**fields | more)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare_toy(12, tmp_path_factory.mktemp("toy") / "store", duration=2.0, progress=False)


def test_silence_stays_silence_and_puts_nothing_out_of_bounds():
    songs, others = torch.randn(3, 2, 100), torch.randn(3, 2, 100)
    songs[0], others[1] = 0, 0
    under = add_under(songs, others, torch.zeros(3))
    assert torch.isfinite(under).all() and not under[1].any()
    assert under[0].abs().max() < 1e-3


def brute_force(stems, pair):
    "The smallest squared error of all ways to give each stem to one of two songs."
    def error(way, m):
        given = sum((s for s, to in zip(stems, way) if to == m), torch.zeros_like(pair[m]))
        return float((pair[m] - given).square().sum())
    ways = [[(w >> k) & 1 for k in range(len(stems))] for w in range(2 ** len(stems))]
    return min(error(way, 0) + error(way, 1) for way in ways)


@pytest.mark.parametrize("sources", [1, 2, 4])
def test_the_best_way_is_the_best_of_all(sources):
    torch.manual_seed(sources)
    for _ in range(20):
        stems, pair = torch.randn(1, sources, 2, 30), torch.randn(1, 2, 2, 30)
        way = sort_stems(stems, pair)
        assert (way.sum(1) == 1).all()
        error = (torch.einsum("nms,nsct->nmct", way, stems) - pair).square().sum()
        assert math.isclose(float(error), brute_force(stems[0], pair[0]), rel_tol=1e-4)


def test_the_loss_has_the_gradient_of_the_best_way():
    stems, pair = torch.randn(2, 4, 1, 50, requires_grad=True), torch.randn(2, 2, 1, 50)
    mixit_loss(stems, pair).backward()
    step = 1e-3 * stems.grad / stems.grad.norm()
    with torch.no_grad(): change = mixit_loss(stems - step, pair) - mixit_loss(stems, pair)
    assert math.isclose(float(change), -1e-3 * float(stems.grad.norm()), rel_tol=0.05)


def test_a_silent_song_has_a_finite_loss():
    pair = torch.zeros(1, 2, 1, 50)
    assert math.isfinite(float(mixit_loss(torch.zeros(1, 4, 1, 50), pair)))


def test_no_cell_is_kept_where_the_other_song_is_louder():
    grid, rng = Grid(Compact(**SMALL)), np.random.default_rng(0)
    own, under = 0.1 * torch.randn(3, 2, 8000), torch.randn(3, 2, 8000)
    settings = MixtureSettings(share=0.7)
    assert len(kept_cells(grid, [(own, under)] * 2, rng, settings)) == 0
    kept = kept_cells(grid, [(under, own)] * 2, rng, settings)
    assert len(kept) == settings.cells and len(set(map(tuple, kept.tolist()))) == len(kept)


def test_views_are_a_function_of_the_generator():
    songs = torch.randn(3, 1, 2000)
    one, two, other = (song_views(songs, np.random.default_rng(k), MixtureSettings()) for k in (1, 1, 2))
    assert all(x.equal(y) for a, b in zip(one, two) for x, y in zip(a, b))
    assert not one[0][0].equal(other[0][0])


@pytest.mark.parametrize("wrong", [
    dict(cells=1), dict(share=1.0), dict(share=True), dict(head=0), dict(loudest=-9.0), dict(change=-1.0),
    dict(temperature="hot"), dict(nothing=1), dict(cells=2.5), dict(loudest=math.nan),
])
def test_settings_that_can_not_be(wrong):
    with pytest.raises(UserError): mixture_settings(wrong)


@pytest.mark.parametrize("kind, loss", [("invariance", "supcon"), ("mixit", "l1_waveform")])
def test_no_stem_is_looked_at(store, kind, loss, monkeypatch):
    torch.manual_seed(0)
    task = build_task(recipe(kind, loss), store)
    songs, number = task.train_batch(1)
    assert songs.shape == (4, 2, 44100) and int(number) == 1
    value = task.training_loss((songs, number))[0]
    monkeypatch.setattr(task.mixer, "batch", lambda *a, **k: pytest.fail("the loss read stems"))
    assert task.training_loss((songs, number))[0].equal(value)


@pytest.mark.parametrize("kind", ["invariance", "mixit"])
def test_a_resumed_run_is_the_same_run(store, tmp_path, kind):
    loss = "supcon" if kind == "invariance" else "l1_waveform"
    whole = fit(recipe(kind, loss), store, tmp_path / "whole", progress=False)
    part = fit(recipe(kind, loss, max_minutes=1e-9), store, tmp_path / "part", progress=False)
    assert read_state(part / "resume.safetensors")["step"] < 8
    fit(recipe(kind, loss), store, tmp_path / "part", resume=True, progress=False)
    states = [read_state(run / "resume.safetensors")["network"] for run in (whole, part)]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert read_metrics(whole).valid_loss.tolist() == read_metrics(part).valid_loss.tolist()


@pytest.mark.parametrize("kind, loss", [("invariance", "supcon"), ("mixit", "l1_waveform")])
def test_a_mixture_is_the_song_as_it_is(store, kind, loss):
    mixer = dict(duration=2.0, coherent=0.3, level=["gain", [-6, 6]], pitch=None, stretch=None, swap=0.5,
                 flip=0.5, gate=-60.0)
    task = build_task(recipe(kind, loss, mixer=mixer), store)
    songs = store.split("train")
    whole = torch.stack([songs.stems(k).sum(0) for k in range(len(songs))])
    for song in torch.cat([task.train_batch(step)[0] for step in range(4)]):
        away = (whole - song)[..., 4000:-4000] # from the ends, which are faded
        assert away.abs().amax((1, 2)).min() < 1e-5
