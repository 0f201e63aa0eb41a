"Pretraining: the paper's encoder, losses against torch and against hand-worked values, tasks, resume, real songs."
import csv
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from deepdemix.audio import UserError
from deepdemix.data import Store, prepare_toy
from deepdemix.pretraining import (Contrast, DeepDeMixEncoder, EncoderNetwork, PretrainingTask, check_classes, cloud, collapse_value, count_parameters,
                                   draw_excerpts, embed_excerpts, metric_loss, mixtures_of, neighbour_accuracy, pretrain, probe, random_twin, random_view,
                                   retrieval, triplet_indices, views_of)
from deepdemix.training import Recipe, build_network, fit, load_encoder, load_network, read_weights

TINY = dict(duration=0.25, window_length=1024, hop_length=512, conv_channels=(2, 2, 4, 4), kernels=((3, 4), (3, 4), (2, 3), (2, 3)), pools=((4, 8), (4, 4)),
            linears=(16, 8), latent=6, dropout=0.2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare_toy(8, tmp_path_factory.mktemp("toy") / "store", duration=2.0, valid=0.25, test=0.25, progress=False)


def recipe(**changes):
    base = dict(kind="pretraining", network="encoder", network_args=TINY, loss="triplet", batch_size=4, examples_per_epoch=8, epochs=1, valid_examples=8,
                mixer=dict(duration=0.25), task_args=dict(places=2), lr=3e-3)
    return Recipe(**{**base, **changes})


def task(store, **changes):
    torch.manual_seed(0)
    return PretrainingTask(EncoderNetwork(**TINY), recipe(**changes), store)


def test_sizes_of_the_paper():
    encoder = DeepDeMixEncoder()
    assert count_parameters(encoder, norm=False) == 13_864_629
    assert count_parameters(encoder) == 14_750_765
    assert sum(p.numel() for p in encoder.norm.parameters()) == 886_136
    assert encoder.map_sizes == [(107, 64), (13, 16)]
    network = EncoderNetwork()
    assert (network.stft.frames(network.samples), network.stft.n_f) == (1724, 257)


@pytest.mark.slow
def test_the_paper_size_runs():
    torch.manual_seed(0)
    encoder = DeepDeMixEncoder().eval()
    with torch.no_grad(): latent, maps = encoder.features(torch.rand(1, 1724, 257, 1))
    assert latent.shape == (1, 125) and [m.shape for m in maps] == [(1, 32, 107, 64), (1, 128, 13, 16)]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_same_padding_is_torchs(kt, kf, channels, out):
    from deepdemix.pretraining import SameConv2d
    torch.manual_seed(kt * 10 + kf)
    conv, x = SameConv2d(channels, out, (kt, kf)), torch.randn(2, channels, 11, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = F.conv2d(x, conv.weight, conv.bias, padding="same")
    torch.testing.assert_close(conv(x), theirs, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 12), st.integers(1, 8), st.floats(0.1, 5.0), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_triplet_loss_is_torchs(n, dim, scale, seed):
    z = scale * torch.randn(3 * n, dim, generator=torch.Generator().manual_seed(seed))
    ours = metric_loss("triplet")(z, torch.zeros(3 * n), triplet_indices(n))
    theirs = torch.nn.TripletMarginLoss(margin=1, p=2)(z[0::3], z[1::3], z[2::3])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_satisfied_triplets_count_in_the_mean():
    z = torch.tensor([[0.0], [0.0], [9.0]] * 3 + [[0.0], [1.0], [1.0]])
    assert metric_loss("triplet")(z, torch.zeros(12), triplet_indices(4)).item() == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("name", ["supcon", "ntxent", "multi_similarity"])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 0, 0, 1, 1, 2, 2, 2, 2]])
@pytest.mark.parametrize("temperature", [0.05, 0.7])
def test_collapse_values(name, labels, temperature):
    labels = torch.tensor(labels)
    loss = metric_loss(name, temperature=temperature)(torch.full((len(labels), 7), 0.3), labels)
    assert loss.item() == pytest.approx(collapse_value(name, labels), abs=1e-4)


def test_collapse_value_of_triplets_is_the_margin():
    loss = metric_loss("triplet", margin=0.4)(torch.ones(9, 5), torch.zeros(9), triplet_indices(3))
    assert loss.item() == pytest.approx(collapse_value("triplet", [0, 0, 1], margin=0.4), abs=1e-5)


@pytest.mark.parametrize("settings_", [dict(loss="triplet", miner="semihard"), dict(loss="triplet", miner="batch_hard"), dict(loss="supcon"), dict(loss="ntxent"),
                                       dict(loss="multi_similarity"), dict(loss="supcon", memory=12), dict(loss="ntxent", head=3)])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 1]])
def test_no_batch_gives_nan(settings_, labels):
    for z in (torch.randn(4, 5), torch.ones(4, 5), torch.zeros(4, 5)):
        z.requires_grad_()
        loss = Contrast(dim=5, **settings_)(z, torch.tensor(labels))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


def test_semihard_negatives_lie_beyond_the_positive():
    z = torch.tensor([[0.0], [1.0], [0.5], [1.5], [9.0]])
    a, p, n = Contrast(dim=1, miner="semihard").miner(z, torch.tensor([0, 0, 1, 1, 1]))
    d = lambda i, j: (z[i] - z[j]).abs()[:, 0]
    assert len(a) > 0 and (d(a, n) > d(a, p)).all() and (d(a, n) <= d(a, p) + 1).all()


def test_views_change_tone_but_not_time():
    x = torch.randn(4, 1, 8000)
    y = random_view(x, np.random.default_rng(0))
    assert y.shape == x.shape and not torch.allclose(x, y, atol=0.1)
    correlation = torch.fft.irfft(torch.fft.rfft(x).conj() * torch.fft.rfft(y)).abs().squeeze(1)
    assert ((correlation.argmax(1) + 4) % 8000 <= 8).all()


def test_mixtures_hold_what_they_should():
    x = torch.eye(6)[:, None]
    y = mixtures_of(x, torch.tensor([0, 0, 1, 1, 2, 2]), np.random.default_rng(0), snr=(0, 0))
    for i in range(6):
        assert y[i, 0, i].item() == pytest.approx(1.0)
        assert (y[i, 0].view(3, 2) > 0).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("positives", ["other_song", "anywhere", "view", "mixture_stem"])
@pytest.mark.parametrize("loss", ["triplet", "supcon"])
def test_batches_are_functions_of_their_number(store, positives, loss):
    t = task(store, loss=loss, task_args=dict(positives=positives))
    first, again, other = t.train_batch(3), t.train_batch(3), t.train_batch(4)
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert not torch.equal(first[0], other[0])
    waves, labels, _ = first
    assert len(waves) == len(labels) and all((labels == k).sum() >= 2 for k in labels)


def test_paper_triplets_reach_the_loss(store):
    t = task(store)
    waves, labels, excerpts = t.train_batch(0)
    t.network.eval()
    z = t.network.embed(waves)
    loss, logs = t.training_loss((waves, labels, excerpts))
    torch.testing.assert_close(loss, F.triplet_margin_loss(z[0::3], z[1::3], z[2::3]), atol=1e-5, rtol=1e-5)
    assert 0 <= logs["active"] <= 1


def test_an_instance_term_adds(store):
    args = dict(loss="supcon", task_args=dict(places=2))
    plain, more = task(store, **args), task(store, **{**args, "task_args": dict(places=2, instance=0.5)})
    z, labels, excerpts = torch.randn(8, 6), torch.tensor([0, 0, 1, 1] * 2), torch.arange(4).repeat(2)
    extra = more.loss(z, labels, excerpts) - plain.loss(z, labels, excerpts)
    assert extra.item() == pytest.approx(0.5 * metric_loss("ntxent")(z, excerpts).item(), abs=1e-5)


@pytest.mark.parametrize("changes", [dict(), dict(loss="supcon", task_args=dict(places=2, head=4, memory=32)), dict(task_args=dict(places=2, miner="semihard"))])
def test_a_resumed_run_is_the_same_run(store, tmp_path, changes):
    whole = fit(recipe(epochs=3, **changes), store, tmp_path / "whole", progress=False)
    fit(recipe(epochs=1, **changes), store, tmp_path / "parts", progress=False)
    parts = fit(recipe(epochs=3, **changes), store, tmp_path / "parts", resume=True, progress=False)
    a, b = read_weights(whole / "model.safetensors"), read_weights(parts / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(k.startswith("encoder.") for k in a)


def test_an_encoder_moves_into_its_shape_only(store, tmp_path):
    run = fit(recipe(), store, tmp_path / "run", progress=False)
    trained, fresh = load_network(run), build_network("encoder", **TINY)
    load_encoder(fresh, run)
    x = torch.randn(2, 1, 11025)
    torch.testing.assert_close(fresh.eval().embed(x), trained.embed(x))
    with pytest.raises(UserError, match="linear"): load_encoder(build_network("encoder", **{**TINY, "latent": 7}), run)
    with open(run / "metrics.csv") as f: row = next(csv.DictReader(f))
    assert {"valid_loss", "valid_knn", "valid_effective_rank", "valid_spread", "valid_active", "collapse_value", "collapsed"} <= row.keys()


def test_collapse_is_noticed(store):
    t = task(store)
    for p in t.network.encoder.linear[-1].parameters(): p.data.zero_()
    t.network.eval()
    with torch.no_grad():
        t.validate()
        with pytest.warns(UserWarning, match="collapsed"): logs = t.validate()
    assert logs["collapsed"] == 1 and logs["valid_loss"] == pytest.approx(logs["collapse_value"], abs=1e-5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        t.validate()


def test_what_cannot_be_contrasted_is_refused(store, tmp_path):
    one = store.split("train").select([0])
    with pytest.raises(UserError, match="needs two"): check_classes(one)
    with pytest.raises(UserError, match="train"): fit(recipe(), store.split("valid"), tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()
    for wrong, words in ((dict(loss="tripplet"), "multi_similarity"), (dict(task_args=dict(positives="same")), "mixture_stem"), (dict(task_args=dict(tau=1)), "temperature"),
                         (dict(mixer=dict(duration=1.0)), "duration"), (dict(task_args=dict(temperature=0.0)), "above 0")):
        with pytest.raises(UserError, match=words): task(store, **wrong)


def test_excerpts_are_audible_and_in_place(store):
    excerpts = draw_excerpts(store.split("valid"), 0.5, per_song=2)
    assert excerpts.waveforms.square().mean((1, 2)).min() > 1e-6
    assert set(excerpts.songs) == {0, 1}
    song, label = int(excerpts.songs[0]), int(excerpts.labels[0])
    torch.testing.assert_close(excerpts.waveforms[0], store.split("valid").stems(song, 0, 22050)[label].mean(0, keepdim=True))


def test_a_probe_knows_signal_from_noise(store):
    class Told(torch.nn.Module):
        duration = 0.5
        def embed(self, x): return x.flatten(1).std(1, keepdim=True) * 0
    constant = probe(Told(), store.split("train"), store.split("test"), per_song=2)
    assert constant.knn["encoder"] < 0.5 < constant.knn["mel statistics"]
    with pytest.raises(UserError, match="both sides"): probe(Told(), store.split("train"), store.split("train"))


def test_retrieval_agrees_with_neighbours():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 10)
    z = rng.normal(size=(40, 8)) + 3 * np.eye(4, 8)[labels]
    nearest = np.linalg.norm(z[:, None] - z, axis=-1) + 1e9 * np.eye(40)
    assert retrieval(z, labels)["precision@1"] == pytest.approx((labels[nearest.argmin(1)] == labels).mean())
    assert neighbour_accuracy(z, labels, np.arange(40), k=1) == pytest.approx((labels[nearest.argmin(1)] == labels).mean())


def test_a_random_twin_is_a_function_of_its_seed():
    network = EncoderNetwork(**TINY)
    before = [p.clone() for p in network.parameters()]
    a, b, c = random_twin(network, 1), random_twin(network, 1), random_twin(network, 2)
    same = lambda x, y: all(torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters()))
    assert same(a, b) and not same(a, c) and all(torch.equal(p, q) for p, q in zip(before, network.parameters()))


def test_effective_rank_counts_directions():
    z = torch.zeros(200, 6)
    z[:, :3] = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assert cloud(z, np.arange(200) % 4)["effective_rank"] == pytest.approx(3, abs=0.1)
    assert math.isfinite(cloud(torch.ones(4, 3), [0, 0, 1, 1])["effective_rank"])


@pytest.fixture(scope="module")
def previews(musdb_path, tmp_path_factory):
    "Three training and three validation songs of the real data, as a store."
    from deepdemix.data import prepare_musdb, validation_titles
    root, held = tmp_path_factory.mktemp("musdb"), set(validation_titles())
    files = sorted((musdb_path / "train").glob("*.stem.mp4"))
    (root / "test").mkdir()
    (root / "train").mkdir()
    for part in (True, False):
        for file in [f for f in files if (f.name.removesuffix(".stem.mp4") in held) is part][:3]: (root / "train" / file.name).symlink_to(file)
    (root / "test" / (one := min((musdb_path / "test").glob("*.stem.mp4"))).name).symlink_to(one)
    return prepare_musdb(root, root / "store", progress=False)


@pytest.mark.musdb
def test_real_songs_train_an_encoder(previews, tmp_path):
    if previews.songs[0].duration > 10: pytest.skip("sized for the 7-second previews")
    assert previews.splits["valid"] == 3 and previews.splits["train"] == 3
    run = pretrain(previews, tmp_path / "run", network_args=TINY, batch_size=4, examples_per_epoch=32, epochs=2, valid_examples=8, places=2, lr=3e-3, progress=False)
    table = probe(load_network(run), previews.split("train"), previews.split("valid"), per_song=3, randoms=2)
    assert {"encoder", "random encoder", "mel statistics"} == set(table.index)
    assert np.isfinite(table.values).all() and table.knn["mel statistics"] > 0.4
