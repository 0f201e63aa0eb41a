"""What every network owes the package: one interface, an encoder that ends where it says, and the same
commands for pretraining, transfer and an auxiliary term."""
import copy
import json
import math
import sys
import types

import pytest
import torch

from deepdemix.audio import SOURCES
from deepdemix.baseline import count_parameters
from deepdemix.contrast.probing import probe_embedding, random_twin
from deepdemix.data import prepare_toy
from deepdemix.foundations.files import UserError
from deepdemix.foundations.profiles import recipe_for
from deepdemix.foundations.recipe import Recipe, read_record
from deepdemix.foundations.registry import NETWORKS, build_network, known_networks
from deepdemix.foundations.run_metrics import read_metrics
from deepdemix.foundations.runs import load_encoder, load_network, save_network
from deepdemix.foundations.separation_losses import LOSSES
from deepdemix.foundations.toy_band import toy_song
from deepdemix.foundations.weights import read_weights
from deepdemix.pretraining import embedding_size
from deepdemix.separation import Separator
from deepdemix.training import fit

RATE = 8000
PAPER = dict(duration=0.25, window_length=64, hop_length=32, conv_channels=[2, 2, 3, 3], kernels=[[3, 3]] * 4,
             pools=[[4, 2], [2, 2]], linears=[12, 8], latent=6, dropout=0.0, grid=[2, 4, 4])
BAND = dict(first=4, growth=3, layers=[1] * 3, units=[0, 8, 0])
COMPACT = dict(
    window_length=256, hop_length=128, octave=8, band=4, bandwidth=3000.0, width=8, hidden=8, layers=1
)
MEMBER = dict(window_length=256, hop_length=64, single=8, hidden=8, layers=1, dropout=0., sample_rate=RATE)
TWINS = {
    "baseline": ("baseline", dict(window_length=256, hop_length=64, hidden_size=8), "l1_magnitude"),
    "baseline_stereo": ("baseline", dict(window_length=256, hop_length=64, hidden_size=8, channels=2),
                        "l1_magnitude"),
    "ddm": ("ddm", PAPER, "l1_magnitude"), "ddm_skip": ("ddm_skip", PAPER, "l1_magnitude"),
    "mm_dense_lstm": (
        "mm_dense_lstm",
        dict(bands=[dict(BAND, to=1500.0), dict(BAND, to=3000.0)], full=BAND, final=dict(growth=4, layers=1),
             window_length=256, hop_length=64),
        "l1_magnitude",
    ),
    "compact": ("compact", COMPACT, "l1_cells"),
    "compact_attention": ("compact", COMPACT | dict(attention=2, stack=3), "l1_cells"),
    "ensemble": ("ensemble", dict(members=[["recurrent", MEMBER], ["recurrent", MEMBER]]), "l1_waveform"),
    "recurrent": ("recurrent",
                  dict(window_length=256, hop_length=64, single=8, hidden=8, layers=1, dropout=0.0),
                  "l1_phase_sensitive"),
    "open_unmix": ("open_unmix", dict(window_length=256, hop_length=64, hidden=8, layers=1, bandwidth=3000.0),
                   "mse_magnitude"),
    "open_unmix_shared": (
        "open_unmix",
        dict(window_length=256, hop_length=64, hidden=8, layers=2, bandwidth=3000.0, shared=True),
        "l1_magnitude",
    ),
    "open_unmix_causal_mono": (
        "open_unmix",
        dict(window_length=256, hop_length=64, hidden=8, layers=1, channels=1, bidirectional=False),
        "l1_waveform",
    ),
    "conv_tasnet": ("conv_tasnet", dict(filters=16, length=16, bottleneck=8, hidden=16, blocks=2, repeats=1),
                    "l1_waveform"),
    "tfc_tdf": ("tfc_tdf",
                dict(depth=2, growth=4, layers=1, squeeze=4, bins=64, window_length=256, hop_length=64),
                "l1_waveform"),
    "hybrid_demucs": ("hybrid_demucs", dict(window_length=64, width=4, depth=4), "l1_waveform"),
    "hybrid_demucs_mono": ("hybrid_demucs", dict(window_length=256, width=8, depth=3, channels=1),
                           "l1_waveform"),
}
WITHOUT_ENCODER = {"baseline", "ensemble"} # by name; their twins have no `embed`
NO_SEPARATOR = {"encoder"}
WITH_ENCODER = [t for t in TWINS if TWINS[t][0] not in WITHOUT_ENCODER]
EVERY = pytest.mark.parametrize("twin", TWINS)
ENCODERS = pytest.mark.parametrize("twin", WITH_ENCODER)
STEREO = pytest.mark.parametrize(
    "twin", [t for t in WITH_ENCODER if "mono" not in t and "attention" not in t]
)


def untouched(twin, seed=0):
    "A twin as its class makes it."
    if twin.startswith("hybrid_demucs"): pytest.importorskip("demucs.hdemucs")
    name, args, _ = TWINS[twin]
    torch.manual_seed(seed)
    return build_network(name, **args | ({} if name == "ensemble" else dict(sample_rate=RATE)))


def build(twin, seed=0):
    "A twin whose attention, which begins as nothing, does something."
    network = untouched(twin, seed)
    for attention in network.encoder.attention if "attention" in TWINS[twin][1] else ():
        torch.nn.init.normal_(attention.out.weight, std=0.3)
    return network


def excerpt(network, x):
    "As much of a sound as the network can be trained on."
    return x[..., :getattr(network, "samples", None)]


def outputs(network, x):
    "The stems of a mixture, and its embedding where there is one."
    return [network(x)] + ([network.embed(x)] if hasattr(network, "embed") else [])


def loss_of(twin): return LOSSES[TWINS[twin][2]]


@pytest.fixture(scope="module")
def song(): return toy_song(0, duration=1., sample_rate=RATE)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepare_toy(9, tmp_path_factory.mktemp("toy") / "store", duration=1.0, valid=0.25, test=0.25,
                       sample_rate=RATE, progress=False)


def test_every_registered_network_has_a_twin_here():
    own = {name for name in known_networks() if NETWORKS[name].__module__.startswith("deepdemix.")}
    assert own - NO_SEPARATOR == {name for name, _, _ in TWINS.values()}


@EVERY
def test_it_offers_what_the_package_asks_for(twin):
    network = build(twin)
    assert json.loads(json.dumps(network.args)) == network.args
    assert tuple(network.sources) == SOURCES and network.sample_rate == RATE and network.channels in (1, 2)
    again = build_network(TWINS[twin][0], **network.args)
    assert again.args == network.args and count_parameters(again) == count_parameters(network)
    assert hasattr(network, "embed") == (twin in WITH_ENCODER)
    assert (loss_of(twin) is not None) and NETWORKS[TWINS[twin][0]].__doc__


@EVERY
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("samples", [1, 63, 3001])
@torch.no_grad()
def test_stems_have_the_form_of_the_mixture_and_are_finite(twin, channels, samples):
    network = build(twin).eval()
    silence, constant = torch.zeros(2, channels, samples), torch.full((2, channels, samples), 0.5)
    impulse = silence.clone()
    impulse[..., samples // 2] = 1
    for x in (silence, constant, impulse, torch.rand(2, channels, samples)):
        stems = network(x)
        assert stems.shape == (2, len(network.sources), channels, samples) and stems.isfinite().all()
        assert all(y.isfinite().all() for y in outputs(network, x))


@EVERY
@torch.no_grad()
def test_channels_are_folded(twin):
    network, x = build(twin).eval(), 0.1 * torch.randn(2, 2, 3000)
    if network.channels == 1:
        torch.testing.assert_close(
            network(x), torch.cat([network(x[:, :1]), network(x[:, 1:])], 2), atol=1e-5, rtol=1e-4
        )
    else:
        torch.testing.assert_close(
            network(x[:, :1]), network(x[:, :1].repeat(1, 2, 1)).mean(2, keepdim=True), atol=1e-5, rtol=1e-4
        )
    if network.channels == 2:
        with pytest.raises(UserError, match="channels"): network(torch.zeros(1, 3, 500))


SOUNDS = dict(dc=torch.full((2, 2, 4000), 0.7),
              square=torch.where(torch.arange(4000) // 50 % 2 == 0, 1.0, -1.0).expand(2, 2, -1),
              click=torch.eye(1, 4000).expand(2, 2, -1), faint=1e-7 * torch.ones(2, 2, 4000).cumsum(-1).sin(),
              one_sided=torch.tensor([[0.5], [0.0]]) * torch.ones(2, 1, 4000))


@EVERY
@pytest.mark.parametrize("sound", SOUNDS)
def test_odd_sounds_give_finite_stems_and_gradients(twin, sound):
    network, x = build(twin), SOUNDS[sound].clone()
    for training in (True, False): assert all(y.isfinite().all() for y in outputs(network.train(training), x))
    x = excerpt(network, x)
    loss_of(twin)(network.train(), x, x[:, None].repeat(1, 4, 1, 1) / 4).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@EVERY
@torch.no_grad()
def test_training_on_silence_leaves_finite_weights(twin):
    network, x = build(twin).train(), torch.zeros(2, 2, 2000)
    x = excerpt(network, x)
    with torch.enable_grad(): loss_of(twin)(network, x, x[:, None].expand(-1, 4, -1, -1)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert all(v.isfinite().all() for v in network.state_dict().values())


@EVERY
@torch.no_grad()
def test_stems_do_not_depend_on_the_rest_of_the_batch(twin, song):
    network = build(twin).eval()
    x = torch.stack([song[0], song.sum(0), 0 * song[0]])
    alone = [torch.cat(parts) for parts in zip(*(outputs(network, one[None]) for one in x))]
    for one, together in zip(alone, outputs(network, x)):
        torch.testing.assert_close(one, together, atol=1e-5, rtol=1e-4)


@EVERY
def test_the_gradient_reaches_every_parameter(twin, song, out_of_reach):
    network = build(twin).train()
    song = excerpt(network, song)
    loss_of(twin)(network, song.sum(0)[None], song[None]).backward()
    assert out_of_reach(network) == []


@ENCODERS
def test_the_encoder_is_all_that_embed_uses(twin, song):
    network = build(twin).train()
    z = network.embed(torch.stack([song[0], song[1]]))
    assert z.shape == (2, embedding_size(network, 1.))
    (z * torch.randn(z.shape)).sum().backward()
    used = {name for name, p in network.named_parameters() if p.grad is not None}
    assert used == {"encoder." + name for name, _ in network.encoder.named_parameters()}


@EVERY
@torch.no_grad()
def test_each_tensor_is_saved_once_and_loaded_again(twin, song, tmp_path):
    network = build(twin).train()
    network(song.sum(0)[None])
    network.eval()
    name, args, loss = TWINS[twin]
    save_network(network, Recipe(network=name, network_args=args, loss=loss), tmp_path)
    weights = read_weights(tmp_path / "model.safetensors")
    assert sum(weights[k].numel() for k, _ in network.named_parameters()) == count_parameters(network)
    assert len({v.data_ptr() for v in network.state_dict().values()}) == len(weights)
    again = load_network(tmp_path)
    assert read_record(tmp_path)["network"] == [name, network.args] and again.args == network.args
    for a, b in zip(outputs(again, song.sum(0)[None]), outputs(network, song.sum(0)[None])):
        assert torch.equal(a, b)


@EVERY
@torch.no_grad()
def test_copies_and_random_twins_are_whole(twin, song):
    network, x = build(twin).eval(), song.sum(0)[None]
    before = outputs(network, x)
    for p in (twin_ := copy.deepcopy(network)).parameters(): p.zero_()
    assert torch.equal(network(x), before[0]) and not torch.equal(twin_(x), before[0])
    fresh = random_twin(network, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(outputs(network, x), before)) and not torch.equal(
        outputs(fresh, x)[-1], before[-1]
    )
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), untouched(twin, seed=1).parameters()))


@EVERY
def test_a_long_song_goes_through_in_chunks(twin):
    separator = Separator(build(twin), device="cpu", chunk=1.)
    stems = separator(toy_song(1, duration=3.3, sample_rate=RATE).sum(0))
    assert stems.shape == (4, 2, round(3.3 * RATE)) and stems.isfinite().all()


@EVERY
def test_a_tiny_twin_learns_one_mix(twin, song):
    network = build(twin).train()
    song = excerpt(network, song[..., :4000])
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=1e-2), []
    for _ in range(25):
        loss = loss_of(twin)(network, song.sum(0)[None], song[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.85 * losses[0]


def run(twin, store, out, **settings):
    build(twin)
    name, args, loss = TWINS[twin]
    recipe = dict(network=name, network_args=args | dict(sample_rate=RATE), loss=loss, epochs=1,
                  examples_per_epoch=8, valid_examples=4, batch_size=4,
                  mixer=dict(duration=seconds(twin), level=None, pitch=None, stretch=None), device="cpu")
    return fit(Recipe.from_dict(recipe | settings), store, out, progress=False)


def seconds(twin): return TWINS[twin][1].get("duration", 0.5)


@STEREO
@pytest.mark.parametrize("loss", ["triplet", "supcon"])
def test_pretraining_probe_and_transfer(twin, loss, store, tmp_path):
    # every triplet counts
    first = run(twin, store, tmp_path / "pt", kind="pretraining", loss=loss,
                mixer=dict(duration=seconds(twin)), task_args=dict(margin=2.0))
    assert {"valid_loss", "valid_knn", "collapsed"} <= set(read_metrics(first).columns)
    trained, untrained = load_network(first), build(twin, seed=0)
    moved = {
        k: not torch.equal(v, dict(untrained.named_parameters())[k]) for k, v in trained.named_parameters()
    }
    wrong = {k for k in moved if moved[k] != k.startswith("encoder.")}
    assert all(
        k.startswith("encoder.") and k.endswith(".bias") for k in wrong
    ), "a norm or a softmax may make a bias as good as idle; weights must move"
    fresh = load_encoder(build(twin, seed=1), first)
    assert all(torch.equal(v, trained.encoder.state_dict()[k]) for k, v in fresh.encoder.state_dict().items())
    trained.duration = seconds(twin)
    table = probe_embedding(trained, store.split("train"), store.split("test"), per_song=2, k=1, randoms=1)
    assert list(table.index) == ["encoder", "random encoder", "mel statistics"] and table.notna().all(
        axis=None
    )
    second = run(twin, store, tmp_path / "frozen", encoder=str(first), freeze_encoder=True)
    assert all(torch.equal(v, dict(trained.named_parameters())[k])
               for k, v in load_network(second).named_parameters() if k.startswith("encoder."))
    assert read_record(second)["data"]["encoder"]


@STEREO
def test_an_auxiliary_contrast_trains_along(twin, store, tmp_path):
    out = run(twin, store, tmp_path / "aux", task_args=dict(contrast=dict(weight=0.1, per_class=2)))
    row = read_metrics(out).iloc[-1]
    assert row.train_loss == pytest.approx(row.separation + 0.1 * row.contrast, rel=1e-4) and row.contrast > 0


@STEREO
def test_runs_are_scored_beside_the_reference_rows(twin, store, tmp_path):
    from deepdemix.studies.score_model import score_model
    network = build(twin)
    save_network(network, Recipe(network=TWINS[twin][0], network_args=network.args), tmp_path / "run")
    scores = score_model(str(tmp_path / "run"), store.split("test"), device="cpu")
    assert (not scores.failed and math.isfinite(scores.overall("SDR", "run"))
            and "mixture / 4" in str(scores.table()))


@pytest.mark.parametrize("name", ["open_unmix", "hybrid_demucs"])
def test_recipes_of_all_profiles_build_their_network(name):
    if name == "hybrid_demucs": pytest.importorskip("demucs.hdemucs")
    for profile in ("demo", "laptop"):
        recipe = recipe_for(name, profile)
        assert recipe.network == name and recipe.loss == (
            "mse_magnitude" if name == "open_unmix" else "l1_waveform"
        )
        assert count_parameters(build_network(name, **recipe.network_args)) < 5e6
    assert recipe_for(name, "paper").network_args == {}


def test_the_command_line_pretrains_any_network(store, tmp_path, capsys):
    from deepdemix.cli import main
    args = TWINS["open_unmix_shared"][1] | dict(sample_rate=RATE)
    small = [
        "--set", "examples_per_epoch=4", "--set", "epochs=1", "--set", "valid_examples=4", "--set",
        "batch_size=4", "--set", "device=cpu", "--set", f"network_args={json.dumps(args)}",
    ]
    common = ["--data", str(store.path), "--profile", "demo", *small]
    assert main(["pretrain", "--out", str(tmp_path / "pt"), "--loss", "supcon", "--set", "network=open_unmix",
                 *common]) in (0, None)
    assert main(["train", "--model", "open_unmix", "--encoder", str(tmp_path / "pt"), "--out",
                 str(tmp_path / "run"), *common]) in (0, None)
    assert (read_record(tmp_path / "run")["status"] == "finished"
            and read_record(tmp_path / "pt")["recipe"]["network"] == "open_unmix")
    assert Separator.from_pretrained(tmp_path / "run", device="cpu")(torch.randn(2, 5000)).shape == (
        4, 2, 5000,
    )


def test_the_scale_of_the_bins_is_measured_once_and_travels_with_the_encoder(song):
    network = build("open_unmix_shared").train()
    layer = network.encoder[0].standardise
    network(torch.zeros(1, 2, 2000))
    assert not layer.measured
    network.embed(song.sum(0)[None])
    mean, scale = layer.mean.detach().clone(), layer.scale.detach().clone()
    assert layer.measured and (mean < 0).all() and (scale > 0).all()
    network(torch.rand(1, 2, 4000))
    assert torch.equal(layer.mean, mean) and torch.equal(layer.scale, scale)
    other = build("open_unmix_shared", seed=5)
    other.encoder.load_state_dict(network.encoder.state_dict())
    other.train()(torch.rand(1, 2, 4000))
    assert torch.equal(other.encoder[0].standardise.scale, scale)


@pytest.mark.slow
def test_the_published_open_unmix_has_its_published_size():
    assert count_parameters(build_network("open_unmix")) == 4 * 8_893_348


def test_open_unmix_is_the_original(monkeypatch):
    """Same weights, same masks, where the package openunmix is at hand (its import needs torchaudio, of
    which nothing is used here)."""
    if "torchaudio" not in sys.modules:
        monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    model = pytest.importorskip("openunmix.model", exc_type=ImportError)
    ours = build("open_unmix").eval()
    theirs = [
        model.OpenUnmix(
            nb_bins=ours.n_f, nb_channels=2, hidden_size=8, nb_layers=1, max_bin=ours.n_input_bins
        ).eval()
        for _ in ours.sources
    ]
    names = {
        "standardise.mean": "input_mean", "standardise.scale": "input_scale", "recurrent.rnn": "lstm",
        "scale": "output_scale", "mean": "output_mean",
    }
    def renamed(state):
        return {next((new + k.removeprefix(old) for old, new in names.items() if k.startswith(old)), k): v
                for k, v in state.items() if k != "standardise.measured"}
    for net, listener, painter in zip(theirs, ours.encoder, ours.painters):
        for p in [*listener.parameters(), *painter.parameters()]: torch.nn.init.normal_(p, 0.1, 0.3)
        net.load_state_dict(renamed(listener.state_dict()) | renamed(painter.state_dict()))
    x = torch.rand(2, 20, ours.n_f, 2)
    with torch.no_grad():
        expected = torch.stack(
            [net((x / ours.stft.scale).permute(0, 3, 2, 1)).permute(0, 3, 2, 1) for net in theirs], -1
        )
        found = ours.mask(x) * x[..., None] / ours.stft.scale
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_hybrid_demucs_says_what_does_not_fit():
    pytest.importorskip("demucs.hdemucs")
    for args, words in ((dict(window_length=2048), "not 2048"), (dict(depth=4), "at least 5"),
                        (dict(width=3, depth=4, window_length=64), "multiple of 16"),
                        (dict(window_length=0), "not 0")):
        with pytest.raises(UserError, match=words): build_network("hybrid_demucs", **args)
    with pytest.raises(UserError, match="does not fit"): load_encoder_of_other_size()


def load_encoder_of_other_size():
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        small = build("hybrid_demucs")
        save_network(small, Recipe(network="hybrid_demucs", network_args=small.args), folder)
        load_encoder(
            build_network("hybrid_demucs", window_length=64, width=8, depth=4, sample_rate=RATE), folder
        )


def test_without_demucs_the_other_networks_are_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "demucs.hdemucs", None)
    assert {"hybrid_demucs", "open_unmix", "baseline"} <= set(known_networks())
    with pytest.raises(UserError, match="pip install 'demucs"): build_network("hybrid_demucs")
