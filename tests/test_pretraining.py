"""Pretraining: the paper's encoder, losses against torch and against hand-worked values, tasks, resume, real
songs."""
import csv
import io
import math
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from deepdemix.audio import SOURCES
from deepdemix.baseline import count_parameters
from deepdemix.contrast.embedding_explorer import explore
from deepdemix.contrast.embedding_pictures import confusion, show_maps
from deepdemix.contrast.losses import Contrast, collapse_value, metric_loss, triplet_indices
from deepdemix.contrast.positives import check_classes, random_view
from deepdemix.contrast.probing import (
    draw_excerpts,
    embedding_geometry,
    neighbour_accuracy,
    probe_embedding,
    random_twin,
    retrieval,
)
from deepdemix.contrast.stores import WeightedBatches, WeightedTriplets, join_stores, open_stores
from deepdemix.data import prepare_stems, prepare_toy
from deepdemix.foundations.encoding import write
from deepdemix.foundations.files import UserError
from deepdemix.foundations.recipe import Recipe, read_record
from deepdemix.foundations.registry import build_network, register_network
from deepdemix.foundations.run_metrics import read_metrics
from deepdemix.foundations.runs import load_encoder, load_network
from deepdemix.foundations.song_files import plain_title
from deepdemix.foundations.state import read_state
from deepdemix.foundations.weights import read_weights
from deepdemix.pretraining import DeepDeMixEncoder, EncoderNetwork, PretrainingTask, pretrain
from deepdemix.tasks import build_task
from deepdemix.training import fit

TINY = dict(duration=0.25, window_length=1024, hop_length=512, conv_channels=(2, 2, 4, 4),
            kernels=((3, 4), (3, 4), (2, 3), (2, 3)), pools=((4, 8), (4, 4)), linears=(16, 8), latent=6,
            dropout=0.2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare_toy(
        8, tmp_path_factory.mktemp("toy") / "store", duration=2.0, valid=0.25, test=0.25, progress=False
    )


def recipe(**changes):
    base = dict(kind="pretraining", network="encoder", network_args=TINY, loss="triplet", batch_size=4,
                examples_per_epoch=8, epochs=1, valid_examples=8, mixer=dict(duration=0.25),
                task_args=dict(places=2), lr=3e-3)
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
    from deepdemix.contrast.folding import SameConv2d
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
    assert metric_loss("triplet")(z, torch.zeros(12), triplet_indices(4)).item() == pytest.approx(
        0.25, abs=1e-5
    )


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


@pytest.mark.parametrize(
    "settings_",
    [dict(loss="triplet", miner="semihard"), dict(loss="triplet", miner="batch_hard"), dict(loss="supcon"),
     dict(loss="ntxent"), dict(loss="multi_similarity"), dict(loss="supcon", memory=12),
     dict(loss="ntxent", head=3)],
)
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


@pytest.mark.parametrize("per_class", [1, 2])
def test_a_mixture_holds_its_own_stem_and_no_other(store, per_class):
    t = task(store, loss="supcon", task_args=dict(positives="mixture_stem", per_class=per_class, places=2))
    for number in range(3):
        waves, labels, _ = t.train_batch(number)
        n = 4 * per_class
        stems, mixtures = waves[:n, 0], waves[n:, 0]
        shares = (mixtures @ stems.T) / stems.square().sum(1)
        assert shares.diag().min() > 0.7 and shares[~torch.eye(n, dtype=torch.bool)].abs().mean() < 0.25
        rest = (mixtures - stems).square().mean(1)
        level = 10 * (stems.square().mean(1) / rest).log10()
        assert ((level > -5.01) & (level < 10.01)).all()
        assert labels.tolist() == [number * n + k for k in range(n)] * 2


def test_a_memory_never_takes_an_earlier_excerpt_for_the_same(store):
    t = task(store, loss="supcon", task_args=dict(positives="view", memory=64, places=2))
    labels = [set(t.train_batch(k)[1].tolist()) for k in range(3)]
    assert not (labels[0] & labels[1] or labels[1] & labels[2])


@pytest.mark.parametrize(
    "args",
    [dict(memory=-5), dict(head=-2), dict(head=2.5), dict(temperature="abc"), dict(temperature=float("nan")),
     dict(margin="x"), dict(margin=-1.0), dict(margin=float("nan")), dict(per_class=2.5), dict(per_class=-1),
     dict(places=-1), dict(places=0), dict(instance=-1.0), dict(instance=float("inf")), dict(miner=3),
     dict(memory=3), dict(shuffle_labels="no")],
)
def test_a_setting_that_can_not_be_is_refused_before_training(store, tmp_path, args):
    with pytest.raises(UserError, match=next(iter(args))):
        fit(recipe(loss="supcon", task_args=args), store, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("loss", ["triplet", "supcon", "ntxent", "multi_similarity"])
@pytest.mark.parametrize(
    "more", [{}, dict(miner="semihard"), dict(miner="batch_hard"), dict(instance=0.5), dict(head=3)]
)
def test_a_collapse_is_seen_whatever_surrounds_the_loss(store, loss, more):
    t = task(store, loss=loss, valid_examples=4, task_args=dict(places=2, per_class=2, **more))
    for p in t.network.encoder.linear[-1].parameters(): torch.nn.init.constant_(p, 0.5 * (p.dim() == 1))
    t.network.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="collapsed"):
        logs = [t.validate() for _ in range(2)][-1]
    assert logs["collapsed"] == 1 and logs["valid_loss"] == pytest.approx(logs["collapse_value"], abs=1e-3)


def test_the_norm_of_the_gradient_is_told_before_it_is_clipped(store, tmp_path):
    norms = [
        read_metrics(
            fit(recipe(grad_clip=clip, examples_per_epoch=4), store, tmp_path / str(clip), progress=False)
        ).grad_norm.iloc[0]
        for clip in (0.0, 1e-4)
    ]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1e-3


def test_a_frozen_encoder_is_not_pretrained(store, tmp_path):
    with pytest.raises(UserError, match="nothing to train"):
        fit(recipe(freeze_encoder=True), store, tmp_path / "run", progress=False)


def test_probe_and_confusion_go_by_the_names_of_instruments(store, tmp_path):
    for k, song in enumerate(store.songs[:2]):
        for name in ("vocals", "drums"):
            write(tmp_path / "songs" / song.title / f"{name}.wav", store.stems(k)[SOURCES.index(name)],
                  store.sample_rate)
    turned = prepare_stems(
        tmp_path / "songs", tmp_path / "store", sources=("vocals", "drums"), valid=0, test=0, progress=False
    )
    rest = store.select(list(range(2, len(store))))
    network = EncoderNetwork(**TINY).eval()
    table = probe_embedding(network, rest, turned, per_song=2, randoms=1)
    matrix = confusion(network, rest, turned, per_song=2)
    swapped = prepare_stems(
        tmp_path / "songs", tmp_path / "swapped", sources=("drums", "vocals"), valid=0, test=0, progress=False
    )
    again = probe_embedding(network, rest, swapped, per_song=2, randoms=1)
    pd.testing.assert_frame_equal(table, again, atol=1e-3)
    pd.testing.assert_frame_equal(matrix, confusion(network, rest, swapped, per_song=2), atol=1e-3)
    assert table.knn["mel statistics"] > 0.5
    assert list(matrix.columns) == list(SOURCES) and matrix.loc[["bass", "other"]].sum().sum() == 0


@pytest.mark.musdb
def test_what_the_excerpts_of_mdb_add(musdb_path):
    more = musdb_path.parent / "mdb-excerpts"
    if not more.is_dir(): pytest.skip("no mdb-excerpts beside MUSDB18-7")
    both = open_stores([str(musdb_path), str(more)])
    assert len(both.split("train")) == 80 + 8 and len(list(more.glob("MusicDelta_*"))) == 13


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


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(loss="supcon", task_args=dict(places=2, head=4, memory=32)),
     dict(task_args=dict(places=2, miner="semihard"))],
)
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
    with pytest.raises(UserError, match="linear"):
        load_encoder(build_network("encoder", **{**TINY, "latent": 7}), run)
    with open(run / "metrics.csv") as f: row = next(csv.DictReader(f))
    assert {
        "valid_loss", "valid_knn", "valid_effective_rank", "valid_spread", "valid_active", "collapse_value",
        "collapsed",
    } <= row.keys()


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
    with pytest.raises(UserError, match="train"):
        fit(recipe(), store.split("valid"), tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()
    for wrong, words in (
        (dict(loss="tripplet"), "multi_similarity"), (dict(task_args=dict(positives="same")), "mixture_stem"),
        (dict(task_args=dict(tau=1)), "temperature"), (dict(mixer=dict(duration=1.0)), "duration"),
        (dict(task_args=dict(temperature=0.0)), "above 0"),
    ):
        with pytest.raises(UserError, match=words): task(store, **wrong)


def test_excerpts_are_audible_and_in_place(store):
    excerpts = draw_excerpts(store.split("valid"), 0.5, per_song=2)
    assert excerpts.waveforms.square().mean((1, 2)).min() > 1e-6
    assert set(excerpts.songs) == {0, 1}
    song, label = int(excerpts.songs[0]), int(excerpts.labels[0])
    torch.testing.assert_close(
        excerpts.waveforms[0], store.split("valid").stems(song, 0, 22050)[label].mean(0, keepdim=True)
    )


def test_a_probe_knows_signal_from_noise(store):
    class Told(torch.nn.Module):
        duration = 0.5
        def embed(self, x): return x.flatten(1).std(1, keepdim=True) * 0
    constant = probe_embedding(Told(), store.split("train"), store.split("test"), per_song=2)
    assert constant.knn["encoder"] < 0.5 < constant.knn["mel statistics"]
    with pytest.raises(UserError, match="both sides"):
        probe_embedding(Told(), store.split("train"), store.split("train"))


def test_maps_show_every_network_in_a_row(store):
    import matplotlib.pyplot as plt
    networks = {"one": EncoderNetwork(**TINY).eval(), "two": EncoderNetwork(**TINY).eval()}
    figure = show_maps(networks, store, per_song=2)
    excerpts = draw_excerpts(store.split("valid"), TINY["duration"], 2)
    axes = np.array(figure.axes).reshape(2, 3)
    assert [a.get_ylabel() for a in axes[:, 0]] == ["one", "two"]
    assert all(
        sum(len(c.get_offsets()) for c in a.collections) == len(excerpts.labels) for a in axes[:, :2].flat
    )
    assert all(a.get_xlabel() == "said" for a in axes[:, 2])
    figure.canvas.draw()
    for a in axes[:, 2]:
        boxes = [label.get_window_extent() for label in a.get_xticklabels()]
        assert all(
            left.x1 < right.x0 for left, right in zip(boxes, boxes[1:])
        ), "names that run into each other"
    assert [t.get_text() for t in figure.legends[0].texts] == list(excerpts.instruments)
    plt.close(figure)


def test_one_excerpt_of_a_kind_is_enough_where_it_brings_its_positive(store):
    alone = task(store, loss="supcon", task_args=dict(places=2, per_class=1, positives="mixture_stem"))
    waves, labels, _ = alone.train_batch(0)
    assert len(waves) == 8 and labels.tolist() == [0, 1, 2, 3] * 2
    with pytest.raises(UserError, match="at least 2"):
        task(store, loss="supcon", task_args=dict(places=2, per_class=1))
    with pytest.raises(UserError, match="0 or more"):
        task(store, loss="supcon", task_args=dict(places=2, per_class=-1, positives="view"))


@pytest.mark.parametrize("loss", ["supcon", "ntxent", "multi_similarity", "triplet"])
def test_autocast_changes_no_loss(loss):
    torch.manual_seed(0)
    z, labels = torch.ones(12, 6) + 0.02 * torch.randn(12, 6), torch.arange(12) // 3
    contrast = Contrast(loss, 6)
    with torch.autocast("cpu", torch.bfloat16): halved = contrast(z, labels, triplets=loss == "triplet")
    assert halved.dtype == torch.float32 and torch.equal(
        halved, contrast(z, labels, triplets=loss == "triplet")
    )


def test_retrieval_agrees_with_neighbours():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 10)
    z = rng.normal(size=(40, 8)) + 3 * np.eye(4, 8)[labels]
    nearest = np.linalg.norm(z[:, None] - z, axis=-1) + 1e9 * np.eye(40)
    assert retrieval(z, labels)["precision@1"] == pytest.approx((labels[nearest.argmin(1)] == labels).mean())
    assert neighbour_accuracy(z, labels, np.arange(40), k=1) == pytest.approx(
        (labels[nearest.argmin(1)] == labels).mean()
    )


def test_a_random_twin_is_a_function_of_its_seed():
    network = EncoderNetwork(**TINY)
    before = [p.clone() for p in network.parameters()]
    a, b, c = random_twin(network, 1), random_twin(network, 1), random_twin(network, 2)
    same = lambda x, y: all(torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters()))
    assert (
        same(a, b) and not same(a, c) and all(torch.equal(p, q) for p, q in zip(before, network.parameters()))
    )


def test_effective_rank_counts_directions():
    z = torch.zeros(200, 6)
    z[:, :3] = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assert embedding_geometry(z, np.arange(200) % 4)["effective_rank"] == pytest.approx(3, abs=0.1)
    assert math.isfinite(embedding_geometry(torch.ones(4, 3), [0, 0, 1, 1])["effective_rank"])


@register_network("faders")
class Faders(EncoderNetwork):
    "A separator whose mask is one number for each source; it has the encoder of `EncoderNetwork`."
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.levels = torch.nn.Linear(self.latent, 4)
    def mask(self, magnitude):
        return (
            self.levels(self.encoder(magnitude)).sigmoid()[:, None, None, None].expand(*magnitude.shape, -1)
        )


@register_network("bare")
class Bare(torch.nn.Module):
    """All that the contrastive term may ask of a separator: `embed`, and what every network has. It does not
    say its latent or its duration."""
    def __init__(self):
        super().__init__()
        self.args, self.sources, self.sample_rate, self.channels = {}, SOURCES, 44100, 2
        self.linear, self.levels = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
        self.stft = EncoderNetwork(**TINY).stft
    def embed(self, waveform): return self.linear(waveform.square().mean(-1).clamp(min=1e-8).log10())
    def mask(self, magnitude):
        return (self.levels(self.linear(magnitude.mean((1, 2)))) .sigmoid()[:, None, None, None]
                .expand(*magnitude.shape, -1))


def write_stems(folder, songs):
    "A folder of stems: {title: {name: waveform}}."
    for title, stems in songs.items():
        (folder / title).mkdir(parents=True)
        for name, wave in stems.items(): write(folder / title / f"{name}.wav", wave, 44100)
    return folder


def tones(*hertz, seconds=1.0):
    t = torch.arange(round(seconds * 44100)) / 44100
    return [0.1 * torch.sin(2 * math.pi * f * t)[None] for f in hertz]


@pytest.fixture(scope="module")
def duo(store, tmp_path_factory):
    """Four songs of drums and vocals: one that `store` trains on and one that it holds out, both in another
    spelling, and two new ones."""
    train, held = (next(s.title for s in store.songs if s.split == split) for split in ("train", "valid"))
    titles = [train.upper().replace(" ", "_"), held.replace(" ", " - "), "One more", "Another"]
    waves = {title: dict(zip(("drums", "vocals"), tones(200 + 50 * k, 900 + 70 * k)))
             for k, title in enumerate(titles)}
    folder = tmp_path_factory.mktemp("duo")
    return prepare_stems(write_stems(folder / "songs", waves), folder / "store", sources=("vocals", "drums"),
                         valid=0, test=0, progress=False)


def test_a_song_of_two_stores_is_one_song_and_held_out_songs_stay_out(store, duo):
    both = join_stores([store, duo])
    assert [s.title for s in both.songs[len(store):]] == sorted(["One more", "Another"])
    train = both.split("train")
    titles = [plain_title(s.title) for s in train.songs]
    assert len(set(titles)) == len(titles) == store.splits["train"] + 2
    assert not set(titles) & {plain_title(s.title) for s in store.songs if s.split != "train"}
    assert [s.title for s in both.split("valid").songs] == [s.title for s in store.split("valid").songs]
    stream = WeightedTriplets(train, duration=0.25)
    for k in range(100):
        info = stream.info(k)
        assert info["songs"][0] != info["songs"][1]
        assert all(i in ("drums", "vocals") for s, i in zip(info["songs"], info["instruments"])
                   if s in ("One more", "Another"))


def test_stems_of_a_store_with_fewer_classes_stand_where_they_belong(store, duo):
    both = join_stores([store, duo])
    assert both.sources == SOURCES
    new = len(store)
    own = next(i for i, s in enumerate(duo.songs) if s.title == both.songs[new].title)
    x, y = both.stems(new, 100, 500), duo.stems(own, 100, 500)
    assert torch.equal(x[3], y[0]) and torch.equal(x[0], y[1]) and x[1:3].abs().sum() == 0
    assert torch.equal(both.stems(1, 7, 90), store.stems(1, 7, 90))
    swapped = join_stores([duo, store])
    assert swapped.sources == ("vocals", "drums", "bass", "other")
    assert torch.equal(
        swapped.stems(len(duo))[[1, 2, 3, 0]], store.stems(store.songs.index(swapped.songs[len(duo)]))
    )


@pytest.mark.parametrize("weight", [0.5, 1.0, 6.0])
def test_weights_are_shares(store, duo, weight):
    train = join_stores([store, duo], [1, weight]).split("train")
    old = store.splits["train"]
    stream = WeightedTriplets(train, duration=0.25, seed=3)
    anchors = [(p[0].song >= old) for p, labels in map(stream.draw, range(600)) if labels[0] in (0, 3)]
    share = 2 * weight / (2 * weight + old)
    assert np.mean(anchors) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(anchors)))


def test_batches_of_several_stores_are_functions_of_seed_and_number_in_any_process(store, duo):
    train = join_stores([store, duo], [1, 2]).split("train")
    for cls, settings_ in ((WeightedTriplets, {}), (WeightedBatches, dict(per_class=2))):
        stream = cls(train, duration=0.25, seed=5, **settings_)
        draw = (lambda s, k: s.batch(2, 2 * k)) if cls is WeightedTriplets else (lambda s, k: s.batch(k))
        first, copy = draw(stream, 3), pickle.loads(pickle.dumps(stream))
        draw(copy, 9)
        assert all(torch.equal(x, y) for x, y in zip(first, draw(copy, 3)))
        assert not torch.equal(first[0], draw(cls(train, duration=0.25, seed=6, **settings_), 3)[0])


def test_a_run_of_several_stores_resumes_with_the_same_ones_only(store, duo, tmp_path):
    args = dict(profile="demo", network_args=TINY, batch_size=4, examples_per_epoch=8, valid_examples=8,
                places=1, progress=False)
    whole = pretrain([store, (duo, 2)], tmp_path / "whole", epochs=2, **args)
    pretrain([store, (duo, 2)], tmp_path / "parts", epochs=1, **args)
    parts = pretrain([str(store.path), f"{duo.path}=2"], tmp_path / "parts", epochs=2, resume=True, **args)
    a, b = (read_state(r / "resume.safetensors")["network"] for r in (whole, parts))
    assert all(torch.equal(a[k], b[k]) for k in a)
    data = read_record(parts)["data"]
    assert [(s["songs"], s["weight"], len(s["digest"])) for s in data["stores"]] == [(8, 1, 64), (2, 2, 64)]
    for other in ([store, duo], store, [store, (duo.select(["One more"]), 2)]):
        with pytest.raises(UserError, match="other data"):
            pretrain(other, tmp_path / "parts", epochs=3, resume=True, **args)


def test_a_further_folder_gives_all_its_songs_whatever_they_lack(store, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPDEMIX_CACHE", str(tmp_path / "cache"))
    low, high, other, voice = tones(100, 1000, 300, 500)
    folder = write_stems(
        tmp_path / "more",
        {"a": dict(drums=low, bass=high), "b": dict(drums=other), "c": dict(vocals=voice, other=low)},
    )
    both = open_stores([store, f"{folder}=2"])
    assert [s.title for s in both.split("train").songs[-3:]] == ["a", "b", "c"]
    assert [set(s.present) for s in both.songs[-3:]] == [{"drums", "bass"}, {"drums"}, {"vocals", "other"}]
    stream = WeightedTriplets(both.split("train"), duration=0.25)
    drawn = {pair for k in range(200) for pair in zip(stream.info(k)["songs"], stream.info(k)["instruments"])
             if pair[0] in "abc"}
    assert drawn == {("a", "drums"), ("a", "bass"), ("b", "drums"), ("c", "vocals"), ("c", "other")}


def test_one_store_is_what_it_always_was(store, tmp_path):
    assert open_stores(store) is store and open_stores([store]) is store
    assert open_stores(f"{store.path}").digest == open_stores([f"{store.path}=3"]).digest == store.digest
    assert (
        "stores"
        not in read_record(
            pretrain(store, tmp_path / "run", profile="demo", network_args=TINY, examples_per_epoch=4,
                     batch_size=4, valid_examples=4, places=1, epochs=1, progress=False)
        )["data"]
    )


def test_stores_that_cannot_be_joined_are_refused(store, duo, tmp_path):
    slow = prepare_toy(3, tmp_path / "slow", duration=1.0, sample_rate=22050, progress=False)
    for stores, weights, words in (
        ([store, store], None, "adds nothing"), ([store, slow], None, "22050 Hz and .* 44100 Hz"),
        ([store, duo], [1, 0], "above 0"), ([store, duo], [1, float("nan")], "above 0"),
        ([store, duo.split("train").select(["One more"]), duo.select(["One more"])], None, "adds nothing"),
    ):
        with pytest.raises(UserError, match=words): join_stores(stores, weights)
    with pytest.raises(UserError, match="nowhere"): open_stores([store, str(tmp_path / "nowhere") + "=2"])


def bad_folders():
    low, high, other, voice = tones(100, 1000, 300, 500)
    yield "hold 1 instrument:", {f"song {k}": dict(drums=low) for k in range(4)}
    yield "only 1 train song has bass", {
        "a": dict(drums=low, bass=high), "b": dict(drums=other), "c": dict(drums=voice),
    }
    yield "only 1 train song has bass", {
        "a": dict(drums=low, bass=high), "b": dict(drums=other, bass=0 * low), "c": dict(drums=voice),
    }


@pytest.mark.parametrize(
    "words, songs", list(bad_folders()), ids=["one instrument", "a class of one song", "a silent second song"]
)
def test_bad_songs_are_refused_before_a_run_begins(words, songs, tmp_path):
    bad = prepare_stems(write_stems(tmp_path / "songs", songs), tmp_path / "store", sources=("drums", "bass"),
                        valid=0, test=0, allow_missing=True, progress=False)
    for loss in ("triplet", "supcon"):
        with pytest.raises(UserError, match=words):
            pretrain(bad, tmp_path / "run", loss=loss, profile="demo", progress=False)
        assert not (tmp_path / "run").exists()


def test_per_class_decides_the_size_of_a_batch(store):
    for loss, size in (("supcon", 12), ("triplet", 12)):
        waves, labels, _ = task(store, loss=loss, task_args=dict(per_class=3)).train_batch(0)
        assert len(waves) == size
        if loss == "supcon": assert labels.bincount().tolist() == [3, 3, 3, 3]


def separation(contrast=None, **changes):
    base = dict(network="faders", network_args=TINY, batch_size=2, examples_per_epoch=4, epochs=1,
                valid_examples=2, lr=1e-2, device="cpu", mixer=dict(duration=0.25, pitch=None, stretch=None),
                task_args={} if contrast is None else dict(contrast=contrast))
    return Recipe(**{**base, **changes})


def trained_weights(run): return read_state(run / "resume.safetensors")["network"]


def test_a_term_without_weight_changes_nothing_and_one_with_weight_does(store, tmp_path):
    runs = {name: fit(separation(c), store, tmp_path / name, progress=False)
            for name, c in dict(without=None, zero=dict(weight=0), some=dict(weight=0.5, head=3)).items()}
    without, zero, some = (trained_weights(r) for r in runs.values())
    assert all(torch.equal(without[k], zero[k]) for k in without)
    assert any(not torch.equal(without[k], some[k]) for k in without) and without.keys() == some.keys()
    assert "contrast" not in read_metrics(runs["zero"])
    row = read_metrics(runs["some"]).iloc[0]
    assert row.train_loss == pytest.approx(row.separation + 0.5 * row.contrast, rel=1e-5)
    assert row.contrast > 0.1 and row.valid_loss < 0.1
    load_network(runs["some"])


def test_a_term_resumes_exactly_with_its_head_and_memory(store, tmp_path):
    term = dict(weight=0.1, head=3, memory=32, per_class=2)
    whole = fit(separation(term, epochs=2), store, tmp_path / "whole", progress=False)
    fit(separation(term), store, tmp_path / "parts", progress=False)
    parts = fit(separation(term, epochs=2), store, tmp_path / "parts", resume=True, progress=False)
    for part in ("network", "heads"):
        a, b = (read_state(r / "resume.safetensors")[part] for r in (whole, parts))
        assert a and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("loss", ["supcon", "triplet", "ntxent", "multi_similarity"])
def test_the_term_is_the_loss_of_embed_for_any_network(store, loss):
    torch.manual_seed(0)
    t = build_task(separation(dict(weight=2, loss=loss, per_class=2), network="bare", network_args={}), store)
    batch = t.train_batch(0)
    waves, labels, _ = batch[2]["contrast"]
    assert waves.shape[1:] == (2, 11025)
    value, logs = t.training_loss(batch)
    z = t.network.embed(waves)
    want = (F.triplet_margin_loss(z[0::3], z[1::3], z[2::3]) if loss == "triplet"
            else metric_loss(loss)(z, labels))
    torch.testing.assert_close(logs["contrast"], want.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(value, logs["separation"] + 2 * want, atol=1e-5, rtol=1e-5)


def test_terms_that_make_no_sense_are_refused(store, tmp_path):
    for term, words in ((dict(weight=-1), "0 or more"), (dict(weight="much"), "0 or more"),
                        (dict(weight=1, loss="tripplet"), "multi_similarity"),
                        (dict(weight=1, tau=1), "temperature")):
        with pytest.raises(UserError, match=words):
            fit(separation(term), store, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="did you mean contrast"):
        fit(separation(task_args=dict(contrasts=1)), store, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="no embed"):
        fit(separation(1.0, network="baseline", network_args={}), store, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_an_encoder_thaws_layer_by_layer_and_resumes_exactly_across_it(store, tmp_path):
    start = fit(recipe(), store, tmp_path / "start", progress=False)
    thawing = dict(encoder=str(start), freeze_encoder=1, unfreeze_every=1)
    moved = {}
    before = trained_weights(fit(separation(epochs=1, **thawing), store, tmp_path / "1", progress=False))
    for epochs in (2, 3):
        state = trained_weights(
            fit(separation(epochs=epochs, **thawing), store, tmp_path / str(epochs), progress=False)
        )
        moved[epochs] = {k.removeprefix("encoder.").rsplit(".", 1)[0] for k in state
                         if k.startswith("encoder.") and not torch.equal(state[k], before[k])}
    first = read_weights(start / "model.safetensors")
    assert all(torch.equal(before[k], first[k]) for k in first)
    assert moved == {2: {"linear.7"}, 3: {"linear.7", "linear.4"}}
    fit(separation(epochs=1, **thawing), store, tmp_path / "parts", progress=False)
    parts = fit(separation(epochs=3, **thawing), store, tmp_path / "parts", resume=True, progress=False)
    a, b = trained_weights(tmp_path / "3"), trained_weights(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(UserError, match="unfreeze_every was 1 and is 2"):
        fit(separation(epochs=3, **{**thawing, "unfreeze_every": 2}), store, parts, resume=True,
            progress=False)
    with pytest.raises(UserError, match="no encoder to freeze"):
        fit(separation(network="bare", network_args={}, unfreeze_every=1), store, tmp_path / "bare",
            progress=False)


def test_the_explorer_shows_and_plays_what_is_chosen(store):
    import soundfile
    from matplotlib.backend_bases import MouseEvent
    torch.manual_seed(0)
    desk = explore(EncoderNetwork(**TINY), store.split("test"), per_song=1)
    empty = desk.picture.value
    for i in (3, 1):
        desk.point.value = i
        e = desk.excerpts
        assert e.instruments[e.labels[i]] in desk.text.value and e.titles[e.songs[i]] in desk.text.value
        sound, rate = soundfile.read(io.BytesIO(desk.sound.value), dtype="float32")
        assert rate == 44100 and np.abs(sound - e.waveforms[i, 0].numpy()).max() < 1e-4
    assert desk.picture.value != empty and desk.picture.value[1:4] == b"PNG"
    canvas = desk.ax.figure.canvas
    x, y = desk.ax.transData.transform(desk.points[2])
    canvas.callbacks.process("button_press_event", MouseEvent("button_press_event", canvas, x, y, button=1))
    assert desk.point.value == 2
    instruments, desk.by.value = desk.picture.value, "song"
    assert desk.picture.value != instruments


@pytest.fixture(scope="module")
def previews(musdb_path, tmp_path_factory):
    "Three training and three validation songs of the real data, as a store."
    from deepdemix.data import prepare_musdb, validation_titles
    root, held = tmp_path_factory.mktemp("musdb"), set(validation_titles())
    files = sorted((musdb_path / "train").glob("*.stem.mp4"))
    (root / "test").mkdir()
    (root / "train").mkdir()
    for part in (True, False):
        for file in [f for f in files if (f.name.removesuffix(".stem.mp4") in held) is part][:3]:
            (root / "train" / file.name).symlink_to(file)
    (root / "test" / (one := min((musdb_path / "test").glob("*.stem.mp4"))).name).symlink_to(one)
    return prepare_musdb(root, root / "store", progress=False)


@pytest.mark.musdb
def test_real_songs_train_an_encoder(previews, tmp_path):
    if previews.songs[0].duration > 10: pytest.skip("sized for the 7-second previews")
    assert previews.splits["valid"] == 3 and previews.splits["train"] == 3
    run = pretrain(previews, tmp_path / "run", network_args=TINY, batch_size=4, examples_per_epoch=32,
                   epochs=2, valid_examples=8, places=2, lr=3e-3, progress=False)
    songs = previews.split("train"), previews.split("valid")
    table = probe_embedding(load_network(run), *songs, per_song=3, randoms=2)
    assert {"encoder", "random encoder", "mel statistics"} == set(table.index)
    assert np.isfinite(table.values).all() and table.knn["mel statistics"] > 0.4


@pytest.mark.parametrize("loss", ["triplet", "supcon"])
def test_every_figure_can_be_monitored(store, tmp_path, loss):
    run = fit(recipe(loss=loss), store, tmp_path / "run", progress=False)
    figures = set(read_metrics(run).columns) - {"epoch", "step", "examples", "lr", "seconds"}
    assert figures == set(task(store, loss=loss).figures)
    with pytest.raises(UserError, match="no figure 'valid_sdr'"):
        fit(recipe(loss=loss, monitor="valid_sdr"), store, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()
