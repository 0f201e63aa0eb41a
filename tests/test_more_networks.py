"Conv-TasNet, MMDenseLSTM and the TFC-TDF U-net: the interface of every separator, and pretraining of each by name."
import pytest
import torch
from torch import nn

from deepdemix.networks import conv_tasnet, mm_dense_lstm, tfc_tdf
from deepdemix.audio import SOURCES
from deepdemix.foundations.files import UserError
from deepdemix.networks.protocol import MaskNetwork
from deepdemix.baseline import count_parameters
from deepdemix.networks.conv_tasnet import ConvTasNet
from deepdemix.data import prepare_toy
from deepdemix.foundations.toy_band import toy_song
from deepdemix.networks.mm_dense_lstm import MMDenseLSTM
from deepdemix.separation import Separator
from deepdemix.networks.tfc_tdf import PUBLISHED, TFCTDFNet
from deepdemix.foundations.separation_losses import LOSSES
from deepdemix.foundations.registry import build_network, known_networks
from deepdemix.training import fit
from deepdemix.foundations.runs import load_encoder, load_network, save_network
from deepdemix.foundations.run_metrics import read_metrics
from deepdemix.foundations.profiles import recipe_for

ROOMS = dict(conv_tasnet=conv_tasnet, mm_dense_lstm=mm_dense_lstm, tfc_tdf=tfc_tdf)
NAMES = tuple(ROOMS)
everywhere = pytest.mark.parametrize("name", NAMES)


def tiny(name, seed=0, **more):
    torch.manual_seed(seed)
    return build_network(name, **ROOMS[name].TINY | more)


def loss_of(name): return LOSSES[recipe_for(name, "demo").loss]


@pytest.fixture(scope="module")
def store(tmp_path_factory): return prepare_toy(7, tmp_path_factory.mktemp("toy")/"store", duration=2., valid=0.3)


@everywhere
def test_it_is_known_by_name(name): assert name in known_networks()


@everywhere
@pytest.mark.parametrize("length", [1, 31, 500, 1024, 7777, 44100])
def test_any_length_comes_back(name, length):
    with torch.no_grad(): stems = tiny(name).eval()(torch.randn(2, 2, length) * 0.1)
    assert stems.shape == (2, 4, 2, length) and torch.isfinite(stems).all()


@everywhere
def test_channels_are_folded(name):
    stereo, mono, x = tiny(name).eval(), tiny(name, channels=1).eval(), torch.randn(2, 2, 5000) * 0.1
    with torch.no_grad():
        both = stereo(x[:, :1].repeat(1, 2, 1))
        assert torch.allclose(stereo(x[:, :1]), both.mean(2, keepdim=True), atol=1e-6)
        apart = torch.cat([mono(x[:, :1]), mono(x[:, 1:])], 2)
        assert torch.allclose(mono(x), apart, atol=1e-5)
        assert stereo.embed(x[:, :1]).shape == stereo.embed(x).shape
    with pytest.raises(UserError, match="channels"): stereo(torch.zeros(1, 3, 500))


@everywhere
@pytest.mark.parametrize("sound", ["silence", "dc", "full scale", "one click", "faint"])
def test_odd_sounds_give_finite_stems_and_gradients(name, sound):
    x = torch.zeros(2, 2, 9000)
    if sound == "dc": x += 0.7
    if sound == "full scale": x = torch.where(torch.arange(9000) // 50 % 2 == 0, 1., -1.).expand(2, 2, -1).clone()
    if sound == "one click": x[..., 4000] = 1
    if sound == "faint": x = torch.randn(2, 2, 9000) * 1e-7
    network = tiny(name)
    for training in (True, False):
        network.train(training)
        stems = network(x)
        assert torch.isfinite(stems).all() and torch.isfinite(network.embed(x)).all()
    sources = x[:, None].repeat(1, 4, 1, 1) / 4
    loss_of(name)(network.train(), x, sources).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@everywhere
def test_examples_of_a_batch_know_nothing_of_each_other(name):
    network, x = tiny(name).eval(), torch.randn(3, 2, 6000) * torch.tensor([0.01, 0.1, 0.5])[:, None, None]
    with torch.no_grad():
        alone, z = torch.cat([network(v[None]) for v in x]), torch.cat([network.embed(v[None]) for v in x])
        assert torch.allclose(network(x), alone, atol=1e-5) and torch.allclose(network.embed(x), z, atol=1e-4)


@everywhere
def test_gradient_reaches_every_parameter(name, out_of_reach):
    network = tiny(name)
    sources = torch.stack([toy_song(k, duration=1.) for k in range(2)])
    loss_of(name)(network, sources.sum(1), sources).backward()
    assert out_of_reach(network) == []


@everywhere
def test_the_embedding_trains_the_encoder_and_it_alone(name):
    network = tiny(name)
    network.embed(torch.randn(3, 2, 9000) * 0.1).square().mean().backward()
    inside = {n for n, p in network.named_parameters() if p.grad is not None}
    assert inside and all(n.startswith("encoder.") for n in inside)
    assert isinstance(network.encoder, nn.Module)
    missing = {n for n, _ in network.named_parameters() if n.startswith("encoder.")} - inside
    assert missing == set()


@everywhere
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    network, x = tiny(name).train(), torch.randn(2, 2, 8000) * 0.1
    network(x)
    save_network(network.eval(), recipe_for(name, "demo"), tmp_path)
    again = load_network(tmp_path)
    assert again.args == network.args and type(again) is type(network)
    with torch.no_grad(): assert torch.equal(again(x), network(x)) and torch.equal(again.embed(x), network.embed(x))


@everywhere
def test_a_long_song_in_pieces(name):
    network, song = tiny(name), toy_song(1, duration=6.)[..., :2**18]
    separator = Separator(network, chunk=2**16 / 44100, threads=1)
    stems = separator(song.sum(0))
    assert stems.shape == song.shape and torch.isfinite(stems).all()
    with torch.no_grad(): whole = network.eval()(song.sum(0)[None])[0]
    assert (stems - whole).square().mean() < 0.02 * whole.square().mean()
    named = separator.separate(song.sum(0), 44100)
    assert list(named) == list(SOURCES) and torch.allclose(named["bass"], stems[1], atol=1e-6)


@everywhere
def test_one_song_is_learnt_by_heart(name):
    torch.manual_seed(0)
    network, song = tiny(name), toy_song(0, duration=1.)
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=1e-2), []
    for _ in range(50):
        loss = loss_of(name)(network, song.sum(0)[None], song[None])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.65 * losses[0]


@everywhere
@pytest.mark.parametrize("loss", ["triplet", "supcon"])
def test_pretrained_by_name_loaded_and_trained(name, loss, store, tmp_path):
    small = dict(network_args=ROOMS[name].TINY, epochs=1, examples_per_epoch=8, batch_size=4, valid_examples=4)
    fit(recipe_for("pretraining", "demo", network=name, loss=loss, mixer=dict(duration=0.5), **small), store, tmp_path/"pretrained", progress=False)
    assert len(read_metrics(tmp_path/"pretrained")) == 1
    taken, trained = load_encoder(tiny(name, seed=5), tmp_path/"pretrained"), load_network(tmp_path/"pretrained")
    for a, b in zip(taken.encoder.parameters(), trained.encoder.parameters()): assert torch.equal(a, b)
    mixer = dict(coherent=0.5, level=["gain", [-6, 6]], swap=0.5, duration=0.5)
    fit(recipe_for(name, "demo", encoder=str(tmp_path/"pretrained"), validation="mixes", mixer=mixer, freeze_encoder=loss == "supcon", **small), store, tmp_path/"run", progress=False)
    network, moved = load_network(tmp_path/"run"), []
    for a, b in zip(network.encoder.parameters(), trained.encoder.parameters()): moved.append(not torch.equal(a, b))
    assert any(moved) if loss == "triplet" else not any(moved)


@everywhere
def test_the_contrastive_term_beside_separation(name, store, tmp_path):
    recipe = recipe_for(name, "demo", network_args=ROOMS[name].TINY, epochs=1, examples_per_epoch=4, batch_size=2, valid_examples=2, validation="mixes",
                        mixer=dict(coherent=1.0, level=["gain", [0, 0]], duration=0.5), task_args=dict(contrast=0.1))
    fit(recipe, store, tmp_path/"run", progress=False)
    assert {"separation", "contrast"} <= set(read_metrics(tmp_path/"run").columns)


@everywhere
def test_the_profiles_have_sizes_for_it(name):
    assert recipe_for(name, "demo").network_args == ROOMS[name].TINY
    assert recipe_for(name, "laptop").network_args == ROOMS[name].SMALL and recipe_for(name, "paper").network_args == {}
    assert count_parameters(build_network(name, **ROOMS[name].SMALL)) < 5e6


def test_published_parameter_counts():
    with torch.device("meta"):
        speech = ConvTasNet(512, 16, 128, 512, 128, 3, 8, 3, mask="sigmoid", sources=["a", "b"], sample_rate=8000, channels=1)
    assert round((count_parameters(speech) + 512 * 128 + 128) / 1e6, 1) == 5.1
    assert count_parameters(TFCTDFNet(**PUBLISHED["vocals"], sources=["vocals"])) == 7_423_236
    assert 1 < count_parameters(MMDenseLSTM(sources=["vocals"], joint=False)) / 1.22e6 < 1.15


def test_a_frame_of_conv_tasnet_hears_its_receptive_field():
    network = ConvTasNet(filters=4, length=8, bottleneck=3, hidden=5, kernel=3, blocks=3, repeats=2, channels=1)
    for block in network.encoder.blocks: block.inner[2] = block.inner[5] = nn.Identity()
    network.encoder.squeeze[0] = nn.Identity()
    x = torch.randn(1, 1, 400, requires_grad=True)
    features = network.encoder(x)[1]
    features[0, :, features.shape[-1] // 2].sum().backward()
    heard = x.grad[0, 0].nonzero()[:, 0]
    assert heard.max() - heard.min() + 1 == network.receptive_field == 8 + 28 * 4


@pytest.mark.parametrize("skip", [0, 6])
def test_conv_tasnet_forgets_loudness_with_and_without_a_skip_path(skip):
    network, x = tiny("conv_tasnet", skip=skip).eval(), toy_song(3, duration=1.).sum(0)[None]
    assert network.embed(x).shape == (1, skip or 16)
    with torch.no_grad():
        loud, quiet = network(x), 8 * network(x / 8)
        assert (loud - quiet).abs().max() < 1e-3 * loud.abs().max()
        assert torch.allclose(network.embed(x / 8), network.embed(x), atol=1e-3)
    sources = toy_song(3, duration=1.)[None]
    loss_of("conv_tasnet")(network.train(), x, sources).backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("name", ["mm_dense_lstm", "tfc_tdf"])
def test_a_network_for_each_source(name):
    joint, apart, x = tiny(name).eval(), tiny(name, joint=False).eval(), torch.randn(1, 2, 6000) * 0.1
    assert len(apart.encoder) == 4 and apart.embed(x).shape[-1] == 4 * joint.embed(x).shape[-1]
    with torch.no_grad():
        before = apart(x)
        for p in apart.decoder[2].parameters(): p.add_(0.1)
        changed = [not torch.equal(a, b) for a, b in zip(before[0], apart(x)[0])]
    assert changed == [False, False, True, False]
    save = sum(p.numel() for p in joint.encoder.parameters())
    assert sum(p.numel() for p in apart.encoder.parameters()) == 4 * save


def test_masks_of_mm_dense_lstm_share_the_mixture_out():
    network = tiny("mm_dense_lstm").eval()
    assert isinstance(network, MaskNetwork)
    with torch.no_grad(): masks = network.mask(network.magnitudes(torch.randn(2, 2, 9000)))
    assert torch.allclose(masks.sum(-1), torch.ones(masks.shape[:-1]), atol=1e-5)
    assert torch.equal(masks[:, :, -1], masks[:, :, network.heard - 1])


@pytest.mark.parametrize("name, args, words", [
    ("conv_tasnet", dict(length=7), "even"), ("conv_tasnet", dict(kernel=2), "odd"), ("conv_tasnet", dict(mask="tanh"), "relu or sigmoid"),
    ("mm_dense_lstm", dict(bands=[dict(mm_dense_lstm.BANDS[0], to=1.)]), "at least one bin"),
    ("mm_dense_lstm", dict(full=dict(first=4, growth=3, layers=[1, 1], units=[0, 0])), "way down"),
    ("tfc_tdf", dict(bins=100), "multiple of"), ("tfc_tdf", dict(bins=4096), "at most 3073"), ("tfc_tdf", dict(output="both"), "direct or mask")])
def test_sizes_that_cannot_be_are_refused(name, args, words):
    with pytest.raises(UserError, match=words): build_network(name, **args)


def test_chunks_of_conv_tasnet_begin_on_its_frames():
    from deepdemix.evaluation import windowed
    from deepdemix.foundations.inference import plan_chunks
    network = build_network("conv_tasnet", **conv_tasnet.TINY)
    assert network.hop == conv_tasnet.TINY["length"] // 2 == plan_chunks(network)["align"] == windowed(network).align
