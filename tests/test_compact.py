"The compact network on the sounds that break networks, its round trips, and what its recipe promises."
import pytest
import torch

from deepdemix.baseline import count_parameters
from deepdemix.foundations.files import UserError
from deepdemix.foundations.profiles import recipe_for
from deepdemix.foundations.recipe import Recipe
from deepdemix.foundations.registry import build_network
from deepdemix.foundations.runs import load_encoder, load_network, new_record, save_network
from deepdemix.foundations.separation_losses import LOSSES
from deepdemix.foundations.toy_band import toy_song
from deepdemix.metrics import si_sdr
from deepdemix.networks.compact import Attention, Compact, band_features, cell_errors, covariance, l1_cells
from deepdemix.networks.wiener import wiener_filter
from deepdemix.separation import Separator

TINY = dict(
    window_length=1024, hop_length=512, octave=16, band=8, bandwidth=16000.0, width=16, hidden=16, layers=1
)


def tiny(**kwargs):
    "A tiny twin in eval mode whose corrections are not zero."
    torch.manual_seed(0)
    network = Compact(**{**TINY, **kwargs}).eval()
    torch.nn.init.normal_(network.maskers.turn.weight, std=0.3)
    for attention in network.encoder.attention: torch.nn.init.normal_(attention.out.weight, std=0.3)
    return network


def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


SOUNDS = dict(silence=torch.zeros(1, 2, 9000), dc=torch.ones(1, 2, 9000),
              impulse=torch.eye(1, 9000).expand(1, 2, 9000),
              one_sided=noise(1, 2, 9000) * torch.tensor([[1.0], [0.0]]),
              antiphase=noise(1, 1, 9000) * torch.tensor([[1.0], [-1.0]]), faint=1e-9 * noise(1, 2, 9000),
              loud=1e4 * noise(1, 2, 9000))


OPTIONS = [dict(), dict(attention=2), dict(stack=3),
           dict(window_length=512, hop_length=128, octave=8, band=4, stack=4, attention=4)]


@pytest.mark.parametrize("refine", [0, .75])
@pytest.mark.parametrize("sound", SOUNDS)
def test_every_sound_is_shared_out_exactly(sound, refine):
    x = SOUNDS[sound]
    with torch.no_grad(): stems, z = tiny(refine=refine)(x), tiny().embed(x)
    assert stems.isfinite().all() and z.isfinite().all()
    assert (stems.sum(1) - x).abs().max() <= 1e-5 * x.abs().max()


@pytest.mark.parametrize("sound", SOUNDS)
def test_loss_and_gradient_are_finite(sound):
    network, x = tiny().train(), SOUNDS[sound].expand(2, -1, -1)
    loss = l1_cells(network, x, torch.stack([x, 0 * x, 0 * x, 0 * x], 1))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("options", OPTIONS[1:])
@pytest.mark.parametrize("sound", SOUNDS)
def test_with_attention_and_stacked_frames_too(sound, options):
    network, x = tiny(**options), SOUNDS[sound]
    with torch.no_grad(): stems = network(x)
    assert stems.isfinite().all() and (stems.sum(1) - x).abs().max() <= 1e-5 * x.abs().max()
    loss = l1_cells(network.train(), x, torch.stack([x, 0 * x, 0 * x, 0 * x], 1))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("options", OPTIONS[1:])
@pytest.mark.parametrize("samples", [1, 257, 5001])
def test_any_number_of_frames_is_stacked(samples, options):
    x, network = noise(2, 2, samples), tiny(**options)
    with torch.no_grad(): stems, z = network(x), network.embed(x)
    assert stems.shape == (2, 4, 2, samples) and torch.allclose(stems.sum(1), x, atol=1e-5)
    assert z.shape == (2, network.cells.n_bands * 16)


def test_without_options_it_is_the_network_of_the_bundled_weights():
    "Step by step from the same weights, bit for bit."
    network, x = tiny(layers=2), noise(2, 2, 6000)
    encoder, maskers, cells = network.encoder, network.maskers, network.cells
    assert {n.split(".")[1] for n, _ in network.named_parameters() if n.startswith("encoder")} == {
        "scale", "split", "time", "band",
    }
    with torch.no_grad():
        spectrum = network.spectrum(x)
        f = band_features(covariance(spectrum, spectrum, cells), cells)
        b, n, k, _ = f.shape
        v = encoder.split(encoder.scale(f.flatten(0, 1).flatten(1)).view(f.shape))
        for time, band in zip(encoder.time, encoder.band):
            v = time(v.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, k)).transpose(1, 2)
            v = band(v.flatten(0, 1)).unflatten(0, (b, n))
        h = (torch.nn.functional.glu(maskers.listen(maskers.norm(v)).unflatten(-1, (4, -1)), dim=-1)
             .transpose(2, 3) .flatten(2, 3))
        share = (maskers.share(h) .unflatten(2, (4, k)) .unflatten(-1, (2, cells.band))
                 .permute(0, 2, 4, 1, 3, 5) .flatten(-2) .softmax(1))
        turn = (maskers.turn(h) .unflatten(2, (4, k)) .unflatten(-1, (2, 2, 2, cells.band))
                .permute(0, 2, 4, 5, 6, 1, 3, 7) .flatten(-2))
        turn = turn - turn.mean(1, keepdim=True)
        for c in range(2): turn[:, :, 0, c, c] += share[:, :, c]
        matrices = cells.spread(torch.complex(turn[:, :, 0], turn[:, :, 1]))
        assert torch.equal(network.matrices(spectrum), matrices)


def test_attention_begins_as_nothing_and_then_reaches_every_frame():
    torch.manual_seed(0)
    attention, x = Attention(8, 2, dropout=0.), torch.randn(1, 20, 3, 8)
    with torch.no_grad():
        assert torch.equal(attention(x), x)
        torch.nn.init.normal_(attention.out.weight)
        other = x.clone()
        other[:, 0, 1, 0] += 1
        changed = (attention(other) - attention(x))[0].abs().amax(-1)
    assert (changed[1:, 1] > 1e-6).all()


def test_bands_keep_their_edges_when_the_window_shrinks():
    edges = lambda n: n.cells.widths.view(-1, n.args["band"]).sum(1).cumsum(0) / n.args["window_length"]
    for part in (2, 4):
        assert torch.allclose(
            edges(
                Compact(window_length=4096 // part, hop_length=1024 // part, octave=48 // part,
                        band=12 // part, layers=1)
            ),
            edges(Compact(layers=1)),
        )


def test_stacked_frames_cost_the_encoder_fewer_steps():
    network, x = tiny(stack=3), noise(1, 2, 6000)
    seen = []
    network.encoder.time[0].register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    network(x)
    assert seen == [-(-network.stft.frames(6000) // 3)]


@pytest.mark.parametrize("samples", [1, 2, 255, 256, 257, 1023, 5001])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("seen", [1, 2])
def test_any_length_mono_and_stereo(samples, channels, seen):
    x = noise(2, channels, samples)
    with torch.no_grad(): stems = tiny(channels=seen, refine=.75)(x)
    assert stems.shape == (2, 4, channels, samples)
    assert torch.allclose(stems.sum(1), x, atol=1e-5)


def test_the_filter_is_the_textbook_s():
    "Against the formula with torch's own inverse, bin by bin, for the textbook's exponent."
    torch.manual_seed(0)
    y = torch.randn(2, 3, 2, 20, 300, dtype=torch.cdouble)
    x = y.sum(1)
    v = y.abs().square().mean(2)
    r = torch.einsum("bsitf,bsjtf->bsfij", y, y.conj())
    c = v[..., None, None] * (r / r.diagonal(dim1=-2, dim2=-1).sum(-1).real[..., None, None])[:, :, None]
    expected = torch.einsum(
        "bstfij,btfj->bsitf", c @ torch.linalg.inv(c.sum(1, keepdim=True)), x.permute(0, 2, 3, 1)
    )
    assert torch.allclose(wiener_filter(y, x, exponent=2, load=0.), expected)


def test_the_filter_is_as_loud_as_its_input_and_waits_for_separation():
    network, x = tiny(refine=.75), noise(1, 2, 9000)
    with torch.no_grad():
        stems, louder, plain = network(x), network(100 * x), tiny()(x)
        assert (
            torch.allclose(louder, 100 * stems, rtol=1e-3, atol=1e-4) and (stems - plain).abs().max() > 1e-3
        )
        network.refine = 1.
        whole = network(x)
    assert torch.allclose(stems, .25 * plain + .75 * whole, atol=1e-6)
    assert torch.equal(tiny(refine=.75, dropout=0.).train()(x), tiny(dropout=0.).train()(x))


@pytest.mark.parametrize(
    "settings", [dict(refine=-0.1), dict(refine=1.1), dict(refine=float("nan")), dict(refine=0.5, channels=3)]
)
def test_a_share_that_makes_no_sense_is_refused(settings):
    with pytest.raises(UserError, match="refine"): Compact(**TINY | settings)


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="sees 2 channels"): tiny()(noise(1, 3, 3000))


def test_a_mono_network_takes_stereo_and_its_loss_does_too():
    network, sources = tiny(channels=1), noise(2, 4, 2, 5000)
    with torch.no_grad():
        stems = network(sources.sum(1))
        alone = network(sources.sum(1)[:, 1:])
        loss = l1_cells(network, sources.sum(1), sources)
    assert stems.shape == (2, 4, 2, 5000) and torch.allclose(stems[:, :, 1:], alone, atol=1e-5)
    assert loss.isfinite() and loss > 0


def test_examples_of_a_batch_do_not_meet():
    x = noise(3, 2, 6000) * torch.tensor([1., 0.01, 10.])[:, None, None]
    network = tiny()
    with torch.no_grad(): together, alone = network(x), torch.cat([network(y[None]) for y in x])
    assert ((together - alone).abs().amax((1, 2, 3)) <= 1e-4 * x.abs().amax((1, 2))).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_cell_errors_are_those_of_the_bins(options):
    network, sources = tiny(**options), noise(2, 4, 2, 6000)
    mixture = sources.sum(1)
    with torch.no_grad():
        x = network.spectrum(mixture)
        wrong = (network.matrices(x) * x[:, None, None]).sum(3) - network.spectrum(sources)
        direct = network.cells(wrong.abs().square()[..., :network.cells.heard])
        power, error = cell_errors(network, mixture, sources)
    assert torch.allclose(error / direct.mean(), direct / direct.mean(), atol=1e-3)
    assert torch.allclose(power, network.cells(x.abs().square()[..., :network.cells.heard]), rtol=1e-4)


def test_a_perfect_matrix_has_no_loss_and_a_wrong_one_has():
    network, x = tiny(), noise(1, 2, 6000)
    quarters, first = (x / 4)[:, None].expand(-1, 4, -1, -1), torch.stack([x, 0 * x, 0 * x, 0 * x], 1)
    for p in network.maskers.share.parameters(): torch.nn.init.zeros_(p)
    for p in network.maskers.turn.parameters(): torch.nn.init.zeros_(p)
    with torch.no_grad(): right, wrong = l1_cells(network, x, quarters), l1_cells(network, x, first)
    assert right < 2e-3
    assert abs(wrong - (0.75 + 3 * 0.25) / 4) < 2e-3


def test_the_mask_can_do_what_single_channel_masks_cannot():
    "A centre is cancelled by the difference of the channels: exactly one matrix does it."
    network, centre, wide = tiny(), noise(1, 1, 6000, seed=1), noise(1, 1, 6000, seed=2)
    x = network.spectrum(torch.cat([centre + wide, centre - wide], 1))
    m = torch.tensor([[.5, -.5], [-.5, .5]], dtype=torch.cfloat)
    assert torch.allclose(
        torch.einsum("cd,bdtf->bctf", m, x), network.spectrum(torch.cat([wide, -wide], 1)), atol=1e-6
    )


def test_above_its_bandwidth_the_network_does_not_listen():
    network, x = tiny(), None
    x = network.spectrum(noise(1, 2, 6000))
    loud = x.clone()
    loud[..., network.cells.heard:] *= 100
    with torch.no_grad(): assert torch.equal(network.matrices(x), network.matrices(loud))


@pytest.mark.parametrize(
    "front",
    [dict(window_length=2048, hop_length=512), dict(window_length=4096, hop_length=1024),
     dict(window_length=512, hop_length=128, octave=8, band=4), dict(sample_rate=22050, bandwidth=11025.0)],
)
def test_cells_cover_what_is_heard_once(front):
    network = Compact(**{**TINY, **front})
    cells = network.cells
    assert (
        cells.widths.sum()
        == cells.heard
        <= min(
            network.stft.n_f, network.args["bandwidth"] * network.args["window_length"] / network.sample_rate
        )
    )
    assert len(cells.widths) == cells.n_bands * cells.band
    assert torch.equal(cells(torch.ones(cells.n_f)), cells.widths)
    assert torch.equal(cells.spread(cells(torch.ones(cells.n_f)) / cells.widths), torch.ones(cells.n_f))


@pytest.mark.parametrize(
    "wrong",
    [dict(octave=16, band=5), dict(bandwidth=100.0), dict(attention=-1), dict(attention=3), dict(stack=0)],
)
def test_settings_without_a_band_are_refused(wrong):
    with pytest.raises(UserError): Compact(**{**TINY, **wrong})


@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradient_reaches_every_parameter(options):
    network, sources = tiny(**options).train(), noise(2, 4, 2, 6000)
    l1_cells(network, sources.sum(1), sources).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("options", OPTIONS)
def test_saved_and_loaded_it_says_the_same(tmp_path, options):
    network, x = tiny(**options), noise(1, 2, 6000)
    save_network(network, Recipe(network="compact", network_args=TINY | options), tmp_path/"run")
    with torch.no_grad(): assert torch.equal(load_network(tmp_path/"run")(x), network(x))
    other = load_encoder(Compact(**TINY | options), tmp_path/"run").eval()
    with torch.no_grad(): assert torch.equal(other.embed(x), network.embed(x))


def test_half_precision_weights_stay_close(tmp_path):
    network, x = tiny(), noise(1, 2, 6000)
    save_network(network, Recipe(network="compact", network_args=TINY), tmp_path/"run", half=True)
    with torch.no_grad(): a, b = load_network(tmp_path/"run")(x), network(x)
    assert (a - b).abs().max() < 0.01 * b.abs().max()


def test_a_long_signal_goes_through_the_separator():
    network = tiny()
    x = noise(2, 44100 * 9)
    stems = Separator(network, chunk=2.)(x)
    assert stems.shape == (4, 2, x.shape[-1]) and torch.allclose(stems.sum(0), x, atol=1e-4)


def test_the_default_sizes_keep_their_promise():
    network = build_network("compact")
    assert count_parameters(network) <= 5e6 and 2048 <= network.stft.window_length <= 4096
    assert new_record(Recipe(network="compact"), network)["network"][1] == network.args
    recipe = recipe_for("compact", "laptop")
    assert recipe.loss in LOSSES and recipe.validation == "songs" and recipe.mixer["duration"] == 5.0


def test_contrast_reaches_the_encoder():
    network = tiny().train()
    network.embed(noise(4, 2, 6000)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.encoder.parameters())
    assert all(p.grad is None for p in network.maskers.parameters())


@pytest.mark.slow
def test_a_tiny_twin_overfits_one_mix():
    torch.manual_seed(0)
    song, network = toy_song(0, duration=2.), Compact(**TINY, dropout=0.)
    optimizer, x = torch.optim.Adam(network.parameters(), lr=1e-2), song.sum(0)
    for _ in range(300):
        loss = l1_cells(network, x[None], song[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad(): gain = si_sdr(song, network.eval()(x[None])[0]) - si_sdr(song, x.expand_as(song))
    assert (gain > 6).all()


def test_separation_holds_a_few_frequencies_at_a_time():
    """The matrices of all bins at once would be the largest thing in memory; no tensor is larger than the
    stems."""
    from torch.utils._python_dispatch import TorchDispatchMode
    class Sizes(TorchDispatchMode):
        most = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and not found._is_view():
                self.most = max(self.most, found.numel() * found.element_size())
            return found
    network, x = tiny(refine=.75, window_length=4096, hop_length=1024), noise(1, 2, 10 * 44100)
    with torch.no_grad():
        spectrum = network.spectrum(x)
        with Sizes() as sizes: stems = network.estimate(spectrum)
    assert stems.numel() * stems.element_size() <= sizes.most < 1.2 * stems.numel() * stems.element_size()


def test_both_ways_to_a_stem_agree():
    """Training takes the matrices of all bins, separation some bins at a time; without the filter both are
    the same."""
    network, x = tiny(), noise(2, 2, 9000)
    with torch.no_grad():
        spectrum = network.spectrum(x)
        assert torch.allclose((network.matrices(spectrum) * spectrum[:, None, None]).sum(3),
                              network.estimate(spectrum), atol=1e-6)
