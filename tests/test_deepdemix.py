"""The decoder on the cells that differ, excerpts of fixed length under audio of any length, and encoders
that move between networks."""
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from deepdemix.baseline import count_parameters
from deepdemix.deepdemix import Decoder, DeepDeMix, SkipDecoder, SkipDeepDeMix, compact_rows
from deepdemix.foundations.files import UserError
from deepdemix.foundations.recipe import Recipe
from deepdemix.foundations.registry import build_network
from deepdemix.foundations.runs import load_encoder, load_network, save_network

TINY = dict(duration=0.25, window_length=64, hop_length=32, sample_rate=8000, conv_channels=[2, 2, 3, 3],
            kernels=[[3, 3]] * 4, pools=[[4, 2], [2, 2]], linears=[12, 8], latent=6)
BOTH = pytest.mark.parametrize("name", ["ddm", "ddm_skip"])


def tiny(name, seed=0, **args):
    torch.manual_seed(seed)
    return build_network(name, **TINY | dict(grid=[2, 4, 4]) | args).eval()


@settings(max_examples=60, deadline=None)
@given(cells=st.integers(1, 13), more=st.integers(0, 200), edge=st.integers(0, 4))
def test_compact_rows_are_torchs_nearest_upsampling(cells, more, edge):
    size = cells + more
    cell, where = compact_rows(cells, size, edge)
    assert torch.equal(
        cell[where].float(), F.interpolate(torch.arange(float(cells))[None, None], size=size)[0, 0]
    )
    assert len(cell) <= cells * (2 * edge + 1)
    assert torch.equal(where.unique(), torch.arange(len(cell)))


@settings(max_examples=40, deadline=None)
@given(grid=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
       more=st.tuples(st.integers(0, 60), st.integers(0, 60)),
       kernel=st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 3, 5])), n_ac=st.integers(1, 2),
       seed=st.integers(0, 99))
def test_the_fast_decoder_is_the_plain_one(grid, more, kernel, n_ac, seed):
    torch.manual_seed(seed)
    size = grid[1] + more[0], grid[2] + more[1]
    decoder = Decoder(5, 7, grid, (3, 2), kernel, size, n_ac, 3)
    for p in decoder.parameters(): torch.nn.init.normal_(p, 0.2, 0.6)
    latent = torch.randn(2, 5)
    with torch.no_grad(): fast, plain = decoder(latent), decoder.plain(latent)
    assert fast.shape == (2, *size, n_ac, 3)
    assert torch.allclose(fast, plain, atol=2e-6)


def test_both_ways_have_the_same_gradients():
    torch.manual_seed(0)
    decoder = Decoder(5, 7, (2, 4, 4), (3, 3), (3, 3), (61, 50))
    latent = torch.randn(2, 5)
    weight = torch.rand(2, 61, 50, 1, 4)
    def gradients(mask):
        decoder.zero_grad()
        (mask * weight).sum().backward()
        return [p.grad.clone() for p in decoder.parameters()]
    fast, plain = gradients(decoder(latent)), gradients(decoder.plain(latent))
    assert max(g.abs().max() for g in plain) > 1
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in zip(fast, plain))


def test_the_second_upsampling_changes_nothing():
    decoder, latent = Decoder(size=(100, 33)), torch.randn(1, 125)
    with torch.no_grad():
        without = decoder.to_mask(
            torch.nn.Sequential(*decoder.blocks[:5], *decoder.blocks[6:])(decoder.linear(latent))
        )
        assert torch.equal(decoder.plain(latent), without)


def test_the_papers_sizes():
    network = DeepDeMix()
    norm = count_parameters(network.encoder.norm)
    assert (network.frames, network.n_f, norm) == (1724, 257, 886_136)
    assert (count_parameters(network.encoder) == 14_750_765
            and count_parameters(network.encoder) - norm == 13_864_629)
    assert count_parameters(network.decoder.linear) == 101_664
    assert network.decoder.grid == (4, 12, 12)
    assert {k: v.shape for k, v in SkipDeepDeMix().encoder.state_dict().items()} == {
        k: v.shape for k, v in network.encoder.state_dict().items()
    }


@pytest.mark.slow
@BOTH
def test_five_seconds_at_the_papers_size(name):
    network = build_network(name).eval()
    with torch.no_grad(): stems = network(torch.randn(1, 1, 220_500) * 0.1)
    assert stems.shape == (1, 4, 1, 220_500) and stems.isfinite().all() and stems.abs().max() > 0.01


@BOTH
@settings(max_examples=8, deadline=None)
@given(time=st.integers(1, 6000), channels=st.integers(1, 2))
def test_any_length_gives_stems_of_that_length(name, time, channels):
    network, song = tiny(name), torch.randn(2, channels, time, generator=torch.Generator().manual_seed(time))
    with torch.no_grad(): stems = network(song)
    assert stems.shape == (2, 4, channels, time) and stems.isfinite().all()
    assert (stems.abs().amax((0, 1, 2, 3)) > 0)


@BOTH
def test_a_long_song_is_masked_excerpt_by_excerpt(name):
    network = tiny(name)
    magnitude = torch.rand(1, 3 * network.frames, 33, 1)
    with torch.no_grad(): whole, first = network.mask(magnitude), network.mask(magnitude[:, :network.frames])
    flat = network.frames - network.frames // 4 - 1
    assert torch.allclose(whole[:, :flat], first[:, :flat], atol=1e-6)
    assert not torch.allclose(whole[:, flat:network.frames], first[:, flat:], atol=1e-6)
    assert 0 < whole.min() and whole.max() < 1


def test_ddm_draws_blocks_and_ddm_skip_does_not():
    inner = {}
    for name in ("ddm", "ddm_skip"):
        network = tiny(name)
        with torch.no_grad(): mask = network.mask(torch.rand(1, network.frames, 33, 1))[0, :, :, 0]
        cell = [F.interpolate(torch.arange(4.)[None, None], size=n)[0, 0] for n in mask.shape[:2]]
        inner[name] = mask[cell[0] == 1][3:-3][:, cell[1] == 2][:, 3:-3]
        assert inner[name].shape[:2] == (10, 2)
    assert (inner["ddm"] == inner["ddm"][:1, :1]).all()
    assert (inner["ddm_skip"] - inner["ddm_skip"][:1, :1]).abs().max() > 1e-4


@BOTH
def test_settings_survive_json_and_a_save(name, tmp_path):
    network = tiny(name, sources=["left", "right"], channels=2)
    assert json.loads(json.dumps(network.args)) == network.args
    save_network(network, Recipe(network=name, network_args=network.args), tmp_path / "run")
    song = torch.randn(1, 2, 3000)
    with torch.no_grad(): assert torch.equal(load_network(tmp_path / "run")(song), network(song))


@BOTH
def test_a_pretrained_encoder_moves_in(name, tmp_path):
    pretrained = build_network("encoder", **TINY)
    save_network(pretrained,
                 Recipe(kind="pretraining", network="encoder", network_args=pretrained.args, loss="triplet"),
                 tmp_path / "run")
    network = tiny(name, seed=1)
    before = network.encoder.state_dict()["linear.1.weight"].clone()
    load_encoder(network, tmp_path / "run")
    assert not torch.equal(network.encoder.state_dict()["linear.1.weight"], before)
    song = torch.randn(2, 1, network.samples)
    with torch.no_grad(): assert torch.allclose(network.embed(song), pretrained.eval().embed(song), atol=1e-5)
    with pytest.raises(UserError, match="linear.1"):
        load_encoder(tiny(name, linears=[13, 8]), tmp_path / "run")


@BOTH
def test_every_weight_learns(name):
    network = tiny(name, dropout=0., linears=[40, 30], latent=20, decoder_kernel=[3, 3])
    X = torch.rand(4, network.frames, 33, 1)
    (network.mask(X) * torch.rand(4, network.frames, 33, 1, 4)).sum().backward()
    assert [k for k, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@BOTH
def test_half_precision_arithmetic_gives_nearly_the_same_masks(name):
    network = tiny(name)
    song = torch.randn(2, 1, network.samples)
    with torch.no_grad():
        full = network(song)
        with torch.autocast("cpu", torch.bfloat16): half = network(song)
    assert half.dtype == torch.float32 and (half - full).abs().max() < 0.02 * full.abs().max()


def test_embed_is_the_mean_over_excerpts():
    network = tiny("ddm")
    magnitude = torch.rand(2, 2 * network.frames, 33, 1)
    network.magnitudes = lambda waveform: magnitude
    with torch.no_grad():
        halves = [network.encoder(x) for x in magnitude.split(network.frames, 1)]
        assert torch.allclose(network.embed(torch.zeros(2, 1, 10)), (halves[0] + halves[1]) / 2, atol=1e-6)


def test_sizes_that_cannot_be_are_explained():
    with pytest.raises(UserError, match="odd"): tiny("ddm", decoder_kernel=[2, 3])
    with pytest.raises(UserError, match="does not fit"): tiny("ddm", grid=[2, 100, 4])
    with pytest.raises(UserError, match="pooled maps"): SkipDecoder(6, (2, 3), channels=(4, 4, 4))
    with pytest.raises(UserError, match="decoder_channels"): build_network("ddm", decoder_chanels=[2, 2])
