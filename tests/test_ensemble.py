"Ensembles: what they are made of, what comes out, and what is refused."
import json

import pytest
import torch

from deepdemix.cli import main
from deepdemix.foundations.files import UserError
from deepdemix.foundations.recipe import Recipe, read_record
from deepdemix.foundations.registry import build_network
from deepdemix.foundations.runs import file_digest, load_network, save_network, trained_on
from deepdemix.foundations.toy_band import toy_song
from deepdemix.networks.ensemble import Ensemble, join_runs
from deepdemix.separation import Separator
from deepdemix.serving.export import export

COMPACT = dict(octave=16, band=8, bandwidth=16000., width=16, hidden=16, layers=1)
WIDE = dict(COMPACT, window_length=1024, hop_length=512)
NARROW = dict(COMPACT, window_length=512, hop_length=256)


def saved(path, name, args, seed=0, **facts):
    "A network with fresh weights, as the folder of a finished run."
    torch.manual_seed(seed)
    network = build_network(name, **args)
    save_network(network, Recipe(network=name, network_args=args), path)
    record = json.loads((path / "recipe.json").read_text()) | facts
    (path / "recipe.json").write_text(json.dumps(record))
    return path


@pytest.fixture
def pair(tmp_path):
    "Two networks of different windows, one of them with a filter of its own, as runs."
    return [saved(tmp_path / "wide", "compact", dict(WIDE, refine=0.5), 0, hours=1.5, examples=100),
            saved(tmp_path / "narrow", "compact", NARROW, 1, hours=0.5, examples=20)]


@pytest.mark.parametrize("samples", [1, 700, 44100, 70001])
def test_joined_runs_give_the_mean_of_what_they_gave(pair, tmp_path, samples):
    mixture = toy_song(0, duration=2.).sum(0)[None, :, :samples]
    ensemble = load_network(join_runs(pair, tmp_path / "both", window_length=1024, hop_length=512))
    members = [load_network(run) for run in pair]
    members[0].refine = 0.
    with torch.no_grad():
        torch.testing.assert_close(
            ensemble(mixture), (members[0](mixture) + members[1](mixture)) / 2, atol=1e-5, rtol=1e-4
        )


def test_a_joined_run_keeps_what_made_it(pair, tmp_path):
    record = read_record(join_runs(pair, tmp_path / "both", refine=0.75))
    assert (record["status"], record["hours"], record["examples"]) == ("finished", 2.0, 120)
    assert [r["recipe"]["network_args"]["window_length"] for r in record["members"]] == [1024, 512]
    assert record["network"][1]["members"][0][1]["refine"] == 0. and record["network"][1]["refine"] == 0.75
    assert record["parameters"] == sum(r["parameters"] for r in record["members"])


def test_a_joined_run_says_what_music_it_learned_from_where_all_members_agree(tmp_path):
    def run(name, digest, minutes):
        data = dict(digest=digest, songs=3, minutes=dict(true=minutes, pseudo=0., teachers=[]), start="x")
        return saved(tmp_path / name, "compact", NARROW, 1, hours=0.5, examples=20, data=data)
    one, same, other = run("one", "a", 9.), run("same", "a", 9.), run("other", "b", 4.)
    kept = read_record(join_runs([one, same], tmp_path / "both"))["data"]
    assert kept == dict(digest="a", songs=3, minutes=dict(true=9., pseudo=0., teachers=[]))
    assert trained_on(tmp_path / "both", "It") == ["It was trained on 9.0 minutes of true stems."]
    assert "minutes" not in read_record(join_runs([one, other], tmp_path / "mixed"))["data"]


def test_the_command_joins_and_the_separator_reads_it(pair, tmp_path, capsys):
    assert main(["join", *map(str, pair), "--refine", "0.75", "--out", str(tmp_path / "both")]) == 0
    mixture = toy_song(0, duration=1.).sum(0)
    stems = Separator.from_pretrained(tmp_path / "both", device="cpu").separate(mixture, 44100)
    assert list(stems) == ["drums", "bass", "other", "vocals"]
    torch.testing.assert_close(sum(stems.values()), mixture, atol=1e-4, rtol=0)
    assert (main(["join", *map(str, pair), "--out", str(tmp_path / "both")]) == 2
            and "not empty" in capsys.readouterr().err)
    assert (main(["join", str(pair[0]), "nobody", "--out", str(tmp_path / "none")]) == 2
            and not (tmp_path / "none").exists())


def test_networks_of_different_kinds_can_be_members(tmp_path):
    runs = [saved(tmp_path / "a", "compact", WIDE),
            saved(tmp_path / "b", "open_unmix", dict(hidden=16, shared=True))]
    mixture = toy_song(0, duration=1.).sum(0)[None]
    with torch.no_grad():
        assert load_network(join_runs(runs, tmp_path / "both"))(mixture).shape == (1, 4, 2, mixture.shape[-1])


def test_an_ensemble_can_be_exported(pair, tmp_path):
    "The exported network is compared with the original while it is written."
    alike = [pair[0], saved(tmp_path / "other", "compact", WIDE, 2)]
    run = join_runs(alike, tmp_path / "both", window_length=1024, hop_length=512, refine=0.75)
    assert export(load_network(run), tmp_path / "both.pt").stat().st_size > 10_000


@pytest.mark.parametrize(
    "other, words",
    [(dict(WIDE, channels=1), "agree"), (dict(WIDE, sample_rate=22050), "agree"),
     (dict(WIDE, sources=["vocals", "rest"]), "agree")],
)
def test_members_that_disagree_are_refused(pair, tmp_path, other, words):
    with pytest.raises(UserError, match=words):
        join_runs([pair[0], saved(tmp_path / "x", "compact", other)], tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    "settings, words",
    [(dict(refine=2.0), "0 to 1"), (dict(window_length=64, hop_length=65), "between 1 and"),
     (dict(members=[]), "at least one")],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(UserError, match=words): Ensemble(**{"members": [["compact", WIDE]], **settings})


def test_a_mono_ensemble_takes_stereo_by_channels(tmp_path):
    run = join_runs(
        [saved(tmp_path / "a", "compact", dict(WIDE, channels=1)),
         saved(tmp_path / "b", "compact", dict(NARROW, channels=1), 1)],
        tmp_path / "both", refine=0.5,
    )
    mixture = toy_song(0, duration=1.).sum(0)[None]
    network = load_network(run)
    with torch.no_grad():
        torch.testing.assert_close(network(mixture)[:, :, :1], network(mixture[:, :1]), atol=1e-5, rtol=1e-4)


def test_joining_copies_the_weights(pair, tmp_path):
    before = [file_digest(run / "model.safetensors") for run in pair]
    weights = load_network(join_runs(pair, tmp_path / "both")).state_dict()
    for k, run in enumerate(pair):
        for name, value in load_network(run).state_dict().items():
            assert torch.equal(weights[f"members.{k}.{name}"], value)
    assert [file_digest(run / "model.safetensors") for run in pair] == before
