"""Dense contrast: cells and their owners, the three networks, resuming, controls, and what a user can get
wrong."""
from dataclasses import replace

import pytest
import torch

from deepdemix.contrast.dense import DenseContrast, Grid, gradient_ratio, owners, weight_for
from deepdemix.data import prepare_toy
from deepdemix.foundations.files import UserError
from deepdemix.foundations.recipe import Recipe
from deepdemix.foundations.registry import build_network
from deepdemix.foundations.run_metrics import read_metrics
from deepdemix.foundations.runs import load_network
from deepdemix.foundations.weights import read_weights
from deepdemix.tasks import build_task
from deepdemix.training import fit

SMALL = dict(
    window_length=1024, hop_length=512, octave=16, band=8, bandwidth=16000.0, width=16, hidden=16, layers=1
)
NETWORKS = {
    "compact": (SMALL, "l1_cells"),
    "open_unmix": (dict(window_length=1024, hop_length=512, hidden=16, layers=1), "mse_magnitude"),
    "conv_tasnet": (dict(filters=32, length=64, bottleneck=16, hidden=24, blocks=4, repeats=2),
                    "l1_waveform"),
}
MIX = dict(duration=0.5, coherent=0.3, pitch=None, stretch=None)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare_toy(
        8, tmp_path_factory.mktemp("toy") / "store", duration=2.0, valid=0.25, test=0.25, progress=False
    )


def recipe(network="compact", kind="dense", **changes):
    args, loss = NETWORKS[network]
    base = dict(kind=kind, network=network, network_args=args, loss="supcon" if kind == "dense" else loss,
                batch_size=4, examples_per_epoch=8, epochs=1, valid_examples=4, lr=3e-3, mixer=MIX)
    return Recipe(**{**base, **changes})


def mixes(store, seconds=0.5):
    return build_task(recipe(), store).mixer.batch(4)


@pytest.mark.parametrize("name", NETWORKS)
def test_vectors_cover_the_cells_of_the_grid(name, store):
    torch.manual_seed(0)
    network = build_network(name, **NETWORKS[name][0]).eval()
    grid, (mixture, sources) = Grid(network), mixes(store)
    with torch.no_grad(): z = network.dense_embed(mixture)
    energy = grid(sources)
    assert energy.shape == (4, 4, *z.shape[1:3])
    spectrum = grid.stft(sources).abs().square().sum(-1) / grid.stft.scale**2
    inside = spectrum[..., grid.edges[0]:grid.edges[-1]].sum(-1)
    torch.testing.assert_close(energy.sum(-1), inside, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_click_is_heard_in_its_own_frames(name):
    torch.manual_seed(0)
    network = build_network(name, **NETWORKS[name][0]).eval()
    grid, sound = Grid(network), torch.zeros(1, 1, network.channels, 22050)
    sound[..., 11000] = 1.
    frames = grid(sound)[0, 0].sum(-1).nonzero().flatten()
    hop, half = grid.stft.hop_length, grid.stft.window_length / 2
    assert len(frames) and all(abs(f * hop - 11000) <= half for f in frames.tolist())


def test_an_owner_holds_most_of_the_energy(store):
    _, sources = mixes(store)
    energy = Grid(build_network("compact", **SMALL))(sources)
    owned = owners(energy, 0.7)
    share = energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
    assert (share.amax(1)[owned >= 0] > 0.7).all() and (owned == -1).any()
    assert (owners(energy, 0.9) >= 0).sum() < (owned >= 0).sum()


def test_positives_come_from_other_mixes(store):
    task = build_task(recipe(), store)
    places, stems = task.pick(task.train_batch(0)[1], 0)
    for s in range(4): assert len(places[stems == s, 0].unique()) > 1
    assert stems.bincount().max() == task.settings.per_stem


def test_shuffled_labels_are_the_same_cells(store):
    plain, shuffled = (build_task(recipe(task_args=dict(shuffle_labels=s)), store) for s in (False, True))
    shuffled.network.load_state_dict(plain.network.state_dict())
    shuffled.heads.load_state_dict(plain.heads.state_dict())
    batch = plain.train_batch(0)
    for a, b in zip(plain.pick(batch[1], 0), shuffled.pick(batch[1], 0)): assert torch.equal(a, b)
    plain.network.eval(), shuffled.network.eval()
    assert plain.training_loss(batch)[0] != shuffled.training_loss(batch)[0]
    assert shuffled.training_loss(batch)[0] == shuffled.training_loss(batch)[0]


@pytest.mark.parametrize("loss", ["supcon", "cross_entropy"])
def test_resumed_pretraining_is_the_same(loss, store, tmp_path):
    whole = fit(recipe(loss=loss, epochs=2), store, tmp_path / "whole", progress=False)
    fit(recipe(loss=loss), store, tmp_path / "parts", progress=False)
    parts = fit(recipe(loss=loss, epochs=2), store, tmp_path / "parts", resume=True, progress=False)
    for a, b in zip(load_network(whole, last=True).parameters(), load_network(parts, last=True).parameters()):
        assert torch.equal(a, b)
    assert read_metrics(whole).valid_loss.equals(read_metrics(parts).valid_loss)


def test_resumed_term_is_the_same(store, tmp_path):
    term = dict(kind="separation", task_args={"dense": {"weight": 0.1}})
    whole = fit(recipe(epochs=2, **term), store, tmp_path / "whole", progress=False)
    fit(recipe(**term), store, tmp_path / "parts", progress=False)
    parts = fit(recipe(epochs=2, **term), store, tmp_path / "parts", resume=True, progress=False)
    for a, b in zip(load_network(whole, last=True).parameters(), load_network(parts, last=True).parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_term_reaches_the_encoder_and_no_mask(name, store):
    task = build_task(recipe(name, "separation", task_args={"dense": {"weight": 1.}}), store)
    mixture, sources, more = task.train_batch(0)
    task.loss(task.network, mixture, sources)
    value, figures = task.terms["dense"][1].beside(more["dense"], mixture, sources)
    value.backward()
    moved = {
        n.split(".")[0] for n, p in task.network.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert moved == {"encoder"} and figures["cells"] > 0


def test_the_head_is_thrown_away(store, tmp_path):
    run = fit(recipe(), store, tmp_path / "dense", progress=False)
    names = set(read_weights(run / "model.safetensors"))
    assert names == set(build_network("compact", **SMALL).state_dict())
    start = fit(recipe(kind="separation", encoder=str(run)), store, tmp_path / "separator", progress=False)
    assert (start / "model.safetensors").exists()


def test_the_weight_gives_the_share(store):
    base = recipe(kind="separation", task_args={"dense": {"weight": 1.}})
    weight = weight_for(base, store, share=0.2, batches=2)
    torch.manual_seed(base.seed)
    task = build_task(base, store)
    assert 0.1 < weight * gradient_ratio(task, batches=2) < 0.4
    assert weight_for(base, store, share=0.1, batches=2) == pytest.approx(weight / 2, rel=0.01)


def test_what_does_not_fit_is_said(store):
    network = build_network("compact", **SMALL)
    with pytest.raises(UserError, match="no setting 'per_stm'"):
        DenseContrast(network, recipe(task_args=dict(per_stm=3)), store)
    with pytest.raises(UserError, match="can't be 1.5"):
        DenseContrast(network, recipe(task_args=dict(share=1.5)), store)
    with pytest.raises(UserError, match="no contrastive loss is called 'supkon'"):
        DenseContrast(network, recipe(loss="supkon"), store)
    with pytest.raises(UserError, match="no dense_embed"):
        build_task(replace(recipe(), network="baseline", network_args={}), store)
    with pytest.raises(UserError, match="nothing to train"): build_task(recipe(freeze_encoder=True), store)
    with pytest.raises(UserError, match="leave one of them out"):
        build_task(recipe(kind="separation", freeze_encoder=True, task_args={"dense": 1.}), store)
    mono = build_task(
        recipe("conv_tasnet", network_args={**NETWORKS["conv_tasnet"][0], "channels": 1},
               mixer={**MIX, "channels": 2}),
        store,
    )
    with pytest.raises(UserError, match="leave mixer.channels out"): mono.training_loss(mono.train_batch(0))


def test_silence_teaches_nothing(store):
    task = build_task(recipe(), store)
    mixture, sources, number = task.train_batch(0)
    loss, figures = task.training_loss((0 * mixture, 0 * sources, number))
    assert float(loss.detach()) == 0 and figures["cells"] == 0
