"""Conv-TasNet, MMDenseLSTM and the TFC-TDF U-net: what each of them promises beside what `test_networks`
asks of all."""
import pytest
import torch
from torch import nn

from deepdemix.audio import SOURCES
from deepdemix.baseline import count_parameters
from deepdemix.foundations.files import UserError
from deepdemix.foundations.profiles import recipe_for
from deepdemix.foundations.registry import build_network
from deepdemix.foundations.separation_losses import LOSSES
from deepdemix.foundations.toy_band import toy_song
from deepdemix.networks import conv_tasnet, mm_dense_lstm, tfc_tdf
from deepdemix.networks.conv_tasnet import ConvTasNet
from deepdemix.networks.mm_dense_lstm import MMDenseLSTM
from deepdemix.networks.protocol import MaskNetwork
from deepdemix.networks.tfc_tdf import PUBLISHED, TFCTDFNet
from deepdemix.separation import Separator

ROOMS = dict(conv_tasnet=conv_tasnet, mm_dense_lstm=mm_dense_lstm, tfc_tdf=tfc_tdf)
NAMES = tuple(ROOMS)
everywhere = pytest.mark.parametrize("name", NAMES)


def tiny(name, seed=0, **more):
    torch.manual_seed(seed)
    return build_network(name, **ROOMS[name].TINY | more)


def loss_of(name): return LOSSES[recipe_for(name, "demo").loss]


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
def test_the_profiles_have_sizes_for_it(name):
    assert recipe_for(name, "demo").network_args == ROOMS[name].TINY
    assert (recipe_for(name, "laptop").network_args == ROOMS[name].SMALL
            and recipe_for(name, "paper").network_args == {})
    assert count_parameters(build_network(name, **ROOMS[name].SMALL)) < 5e6


def test_published_parameter_counts():
    with torch.device("meta"):
        speech = ConvTasNet(
            512, 16, 128, 512, 128, 3, 8, 3, mask="sigmoid", sources=["a", "b"], sample_rate=8000, channels=1
        )
    assert round((count_parameters(speech) + 512 * 128 + 128) / 1e6, 1) == 5.1
    assert count_parameters(TFCTDFNet(**PUBLISHED["vocals"], sources=["vocals"])) == 7_423_236
    assert 1 < count_parameters(MMDenseLSTM(sources=["vocals"], joint=False)) / 1.22e6 < 1.15


def test_a_frame_of_conv_tasnet_hears_its_receptive_field():
    network = ConvTasNet(
        filters=4, length=8, bottleneck=3, hidden=5, kernel=3, blocks=3, repeats=2, channels=1
    )
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


@pytest.mark.parametrize(
    "name, args, words",
    [("conv_tasnet", dict(length=7), "even"), ("conv_tasnet", dict(kernel=2), "odd"),
     ("conv_tasnet", dict(mask="tanh"), "relu or sigmoid"),
     ("mm_dense_lstm", dict(bands=[dict(mm_dense_lstm.BANDS[0], to=1.0)]), "at least one bin"),
     ("mm_dense_lstm", dict(full=dict(first=4, growth=3, layers=[1, 1], units=[0, 0])), "way down"),
     ("tfc_tdf", dict(bins=100), "multiple of"), ("tfc_tdf", dict(bins=4096), "at most 3073"),
     ("tfc_tdf", dict(output="both"), "direct or mask")],
)
def test_sizes_that_cannot_be_are_refused(name, args, words):
    with pytest.raises(UserError, match=words): build_network(name, **args)


def test_chunks_of_conv_tasnet_begin_on_its_frames():
    from deepdemix.evaluation import windowed
    from deepdemix.foundations.inference import plan_chunks
    network = build_network("conv_tasnet", **conv_tasnet.TINY)
    assert (network.hop == conv_tasnet.TINY["length"] // 2 == plan_chunks(network)["align"]
            == windowed(network).align)
