"""What goes wrong: broken songs, full disks, hostile model files. One clear line, and nothing is lost or
left half-done."""
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deepdemix.baseline import Baseline
from deepdemix.foundations.codecs import read
from deepdemix.foundations.encoding import write
from deepdemix.foundations.files import DamagedAudio, UserError
from deepdemix.foundations.model_names import find_model, pretrained_names
from deepdemix.foundations.recipe import Recipe
from deepdemix.foundations.runs import save_network
from deepdemix.separation import Separator

RATE = 8000


def noise(channels, frames, seed=0):
    return torch.randn(channels, frames, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) / 8


def files_in(folder):
    return sorted(str(x.relative_to(folder)) for x in Path(folder).rglob("*") if x.is_file())


def one_line(error): return "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.fixture(scope="module")
def separator():
    torch.manual_seed(0)
    return Separator(Baseline(hidden_size=4, sample_rate=RATE, window_length=256, hop_length=64), chunk=1.0)


@pytest.fixture
def good(tmp_path):
    "A folder with two good songs, first and last in order."
    for name in ("a.wav", "z.flac"): write(tmp_path / "songs" / name, noise(2, RATE), RATE)
    return tmp_path / "songs"


def separated(summary): return sorted(Path(x["input"]).name for x in summary["songs"] if not x.get("error"))


# Sound that is unusual, and fine

@pytest.mark.parametrize(
    "name,x",
    [("silence", torch.zeros(2, RATE)), ("dc", torch.full((2, RATE), 0.9)),
     ("full scale", noise(2, RATE).sign()),
     ("one channel silent", torch.stack([noise(1, RATE)[0], torch.zeros(RATE)])),
     ("one sample", torch.ones(1, 1)), ("far too loud", noise(2, RATE) * 1e4),
     ("denormal", noise(2, RATE) * 1e-38)],
)
def test_unusual_sound(separator, tmp_path, name, x):
    write(tmp_path / "song.wav", x, RATE, "FLOAT")
    stems = separator.separate(x, RATE)
    assert all(s.shape == x.shape and torch.isfinite(s).all() for s in stems.values())
    if name == "silence": assert all(s.abs().max() == 0 for s in stems.values())
    for kind in ("wav", "flac", "ogg"):
        outputs = separator.separate_file(tmp_path / "song.wav", tmp_path / "out", format=kind)["outputs"]
        assert len(outputs) == 4 and all(
            read(path)[0].abs().max() <= 1.0001 for path in outputs.values() if kind != "ogg"
        )


def test_empty_waveform(separator):
    assert {s.shape for s in separator.separate(torch.zeros(2, 0), RATE).values()} == {(2, 0)}


# Sound that is broken

def nan_song(path):
    x = noise(2, 3 * RATE)
    x[1, -5] = float("nan")
    import soundfile
    soundfile.write(path, x.T.numpy(), RATE, "FLOAT")


def empty_wav(path):
    write(path, noise(2, 1), RATE)
    data = bytearray(path.read_bytes())
    at = data.index(b"data")
    data[at + 4:at + 8] = struct.pack("<I", 0)
    path.write_bytes(data[:at + 8])


def video_only(path):
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        frame = av.VideoFrame(16, 16, "yuv420p")
        for packet in [*stream.encode(frame), *stream.encode(None)]: container.mux(packet)


BROKEN = {
    "nan.wav": nan_song, "zero bytes.mp3": lambda p: p.write_bytes(b""), "no samples.wav": empty_wav,
    "text.wav": lambda p: p.write_text("la la la"),
    "random.flac": lambda p: p.write_bytes(random.Random(0).randbytes(5000)),
    "only a header.ogg": lambda p: p.write_bytes(b"OggS" + bytes(200)), "picture only.mp4": video_only,
    "page.mp3": lambda p: p.write_text("<html><body>404</body></html>"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_song(separator, good, name):
    BROKEN[name](good / name)
    with pytest.raises(UserError) as error: separator.separate_file(good / name, good.parent / "one")
    assert name in str(error.value) and one_line(error)
    assert files_in(good.parent / "one") == [] if (good.parent / "one").exists() else True
    summary = separator.separate_files([good], good.parent / "out")
    assert separated(summary) == ["a.wav", "z.flac"]
    assert len(summary["failed"]) == 1 and name in summary["failed"][0]
    assert len(files_in(good.parent / "out")) == 8 and not list((good.parent / "out").glob(".*"))


def test_missing_and_empty(separator, good):
    summary = separator.separate_files(
        [good / "a.wav", good / "nothing.wav", good / "z.flac"], good.parent / "out"
    )
    assert separated(summary) == ["a.wav", "z.flac"] and "no such file" in summary["failed"][0]
    (good.parent / "empty").mkdir()
    with pytest.raises(UserError, match="no audio"):
        separator.separate_files([good.parent / "empty"], good.parent / "out")
    with pytest.raises(UserError, match="nothing to"): separator.separate_files([], good.parent / "out")


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_cut_off(separator, good, suffix):
    "What decodes is separated; the summary says what did not."
    write(good / f"cut.{suffix}", noise(2, 6 * RATE), RATE)
    data = (good / f"cut.{suffix}").read_bytes()
    (good / f"cut.{suffix}").write_bytes(data[:len(data) // 2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alone = separator.separate_file(good / f"cut.{suffix}", good.parent / "one")
    assert 2 < alone["duration"] < 4
    assert {read(p)[0].shape[1] for p in alone["outputs"].values()} == {alone["frames"]}
    told = [w for w in caught if issubclass(w.category, DamagedAudio)]
    if suffix == "mp3" and not told: pytest.skip("an mp3 without a length says nothing of what is missing")
    assert len(told) == 1 and f"cut.{suffix}" in alone["damage"]
    summary = separator.separate_files([good], good.parent / "out")
    assert separated(summary) == ["a.wav", "z.flac"] and "cut off" in summary["failed"][0]
    assert len(summary["songs"][1]["outputs"]) == 4


def test_corrupt_in_the_middle(separator, good):
    data = bytearray((good / "z.flac").read_bytes())
    data[len(data) // 2:len(data) // 2 + 400] = random.Random(1).randbytes(400)
    (good / "m.flac").write_bytes(data)
    summary = separator.separate_files([good], good.parent / "out")
    assert separated(summary) == ["a.wav", "z.flac"] and "m.flac" in summary["failed"][0]


def test_error_inside_one_song(separator, good, monkeypatch):
    "Even a fault of our own costs no other song."
    whole = Separator.separate_file
    def faulty(self, path, *args, **kwargs):
        if Path(path).name == "a.wav": raise MemoryError("no more")
        return whole(self, path, *args, **kwargs)
    monkeypatch.setattr(Separator, "separate_file", faulty)
    summary = separator.separate_files([good], good.parent / "out")
    assert (separated(summary) == ["z.flac"] and "a.wav" in summary["failed"][0]
            and "no more" in summary["failed"][0])


# Disks

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch
torch.set_num_threads(1)
from deepdemix.foundations.files import UserError
from deepdemix.baseline import Baseline
from deepdemix.separation import Separator
separator = Separator(Baseline(hidden_size=4, sample_rate=8000, window_length=256, hop_length=64), chunk=1.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
for clip in ("rescale", "clamp"):
    for kind in ("wav", "flac", "mp3", "ogg"):
        try: separator.separate_file(sys.argv[1], sys.argv[2], clip=clip, format=kind); print(clip, kind, "written")
        except UserError as e: print(clip, kind, "refused:", e)
"""


def test_full_disk(tmp_path):
    """No file may pass 20,000 bytes: as on a full disk, writing fails half-way, and nothing may be left
    under a final name."""
    write(tmp_path / "song.wav", noise(2, 12 * RATE), RATE)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "song.wav"), str(tmp_path / "out"), "20000"],
        capture_output=True, text=True,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 8 and all(
        "refused" in line and "out" in line and ".separating" not in line for line in lines
    ), lines
    assert files_in(tmp_path / "out") == []


def test_targets_that_cannot_be_written(separator, good):
    (good.parent / "file").write_text("here first")
    for out in (good.parent / "file", good.parent / "file" / "inside"):
        with pytest.raises(UserError) as error: separator.separate_file(good / "a.wav", out)
        assert "file" in str(error.value) and one_line(error)
    assert (good.parent / "file").read_text() == "here first"


def test_read_only_target(separator, good):
    out = good.parent / "locked"
    out.mkdir()
    out.chmod(0o500)
    if os.access(out, os.W_OK): pytest.skip("this user may write anywhere")
    with pytest.raises(UserError, match="ermission"): separator.separate_file(good / "a.wav", out)
    assert files_in(out) == []


def test_nothing_is_overwritten_by_a_failure(separator, good):
    out = good.parent / "out"
    before = {
        p: Path(p).read_bytes() for p in separator.separate_file(good / "a.wav", out)["outputs"].values()
    }
    nan_song(good / "a.wav")
    with pytest.raises(UserError, match="not numbers"):
        separator.separate_file(good / "a.wav", out, overwrite=True)
    assert {p: Path(p).read_bytes() for p in before} == before and len(files_in(out)) == 4


# Models

class Bomb:
    "Creates a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (self.path,))


@pytest.fixture
def run(tmp_path):
    network = Baseline(hidden_size=3, window_length=256, hop_length=64)
    save_network(network, Recipe(network="baseline", network_args=network.args), tmp_path / "run")
    return tmp_path / "run"


def header(content, length=None):
    data = json.dumps(content).encode() if not isinstance(content, bytes) else content
    return struct.pack("<Q", len(data) if length is None else length) + data


def tensor(shape, at, dtype="F32"): return {"dtype": dtype, "shape": shape, "data_offsets": at}


HOSTILE = {
    "empty": b"", "short": b"\x08\0\0", "no header": bytes(64), "huge header": header({}, 2**63),
    "header past the end": header({"a": 1}, 10**6), "not json": header(b"{" + b"\xff" * 40),
    "offsets past the end": header({"a": tensor([4], [0, 2**40])}),
    "negative": header({"a": tensor([-4], [0, 16])}) + bytes(16),
    "shape too large": header({"a": tensor([2**31, 2**31], [0, 16])}) + bytes(16),
    "overlap": header({"a": tensor([4], [0, 16]), "b": tensor([4], [0, 16])}) + bytes(16),
    "odd type": header({"a": tensor([4], [0, 16], "OBJ")}) + bytes(16),
    "deep": header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "other layers": header({"../../etc/passwd": tensor([4], [0, 16])}) + bytes(16),
    "html": b"<html>not found</html>" * 10,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weights(run, name):
    (run / "model.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(UserError) as error: Separator.from_pretrained(run)
    assert one_line(error)


@pytest.mark.parametrize("how", ["pickle", "torch", "torch, old", "model.pt only"])
def test_pickles_are_never_opened(run, tmp_path, how):
    target, weights = tmp_path / "executed", run / "model.safetensors"
    if how == "pickle": weights.write_bytes(pickle.dumps(Bomb(target)))
    else:
        weights.unlink()
        path = run / "model.pt" if how == "model.pt only" else weights
        torch.save({"a": Bomb(target)}, path, _use_new_zipfile_serialization=how != "torch, old")
    with pytest.raises(UserError) as error: Separator.from_pretrained(run)
    assert ("pickle" in str(error.value) or "safetensors" in str(error.value)) and one_line(error)
    with pytest.raises(UserError): Separator.from_pretrained(run / "model.pt")
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb of this test must be a real one"


def change(run, **fields):
    record = json.loads((run / "recipe.json").read_text())
    for key in [k for k in record if k == "network" and not isinstance(record[k], str)] + ["recipe"]:
        part = record[key]
        if isinstance(part, dict): part.update(fields)
        if isinstance(part, list):
            record[key] = [fields.get("network", part[0]), fields.get("network_args", part[1])]
    (run / "recipe.json").write_text(json.dumps(record))


RECIPES = {
    "unknown network": dict(network="skynet"), "path as network": dict(network="../../../etc/passwd"),
    "module as network": dict(network="os.system"), "unknown setting": dict(network_args={"hidden": 3}),
    "absurd size": dict(network_args={"hidden_size": 10**9}),
    "large size": dict(network_args={"hidden_size": 10**5}),
    "negative size": dict(network_args={"hidden_size": -5}),
    "text as size": dict(network_args={"hidden_size": "__import__('os').system('x')"}),
    "other size": dict(network_args={"hidden_size": 5, "window_length": 256, "hop_length": 64}),
    "huge window": dict(network_args={"window_length": 10**12, "hidden_size": 3}),
    "no window": dict(network_args={"window_length": 0, "hidden_size": 3}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipes(run, name):
    change(run, **RECIPES[name])
    with pytest.raises(UserError) as error: Separator.from_pretrained(run)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"format": 1}', '{"format": 99999, "recipe": {}}', "\0" * 100, "[" * 100000,
        '{"recipe": {"network": "baseline", "network_args": []}}',
    ],
)
def test_hostile_recipe_files(run, text):
    (run / "recipe.json").write_text(text)
    with pytest.raises(UserError): Separator.from_pretrained(run)


def test_weights_that_are_not_numbers(run):
    network = Baseline(hidden_size=3, window_length=256, hop_length=64)
    state = {k: torch.full_like(v, float("nan")) if v.is_floating_point() else v
             for k, v in network.state_dict().items()}
    save_file(state, run / "model.safetensors")
    with pytest.raises(UserError): Separator.from_pretrained(run).separate(noise(1, 44100))


def test_a_network_that_gives_nan():
    class Bad(nn.Module):
        sources, channels, sample_rate = ("a", "b"), 1, RATE
        def forward(self, x): return torch.stack([x, x / 0], 1)
    with pytest.raises(UserError, match="NaN"): Separator(Bad(), "bad").separate(torch.zeros(1, 100))


def test_names():
    for name in ("nobody", "../weights/default", "/etc", "/etc/passwd", "", ".", "hf:", "hf:../../etc",
                 "default/../default", "a\0b", "x" * 5000, pretrained_names):
        with pytest.raises(UserError) as error: Separator.from_pretrained(name)
        assert str(error.value)
    with pytest.raises(UserError, match="run folder"): find_model("nobody")
    for known in pretrained_names(): assert Separator.from_pretrained(known).sources


def test_missing_device(run):
    for device in ("cuda:99", "abacus") if not torch.cuda.is_available() else ("cuda:99",):
        with pytest.raises(UserError, match="auto"): Separator.from_pretrained(run, device=device)


# Fuzz

def damaged(data, rng):
    """One file's bytes with a few of them changed, cut, doubled or overwritten; headers more often than the
    rest."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(min(len(data), 100 if rng.random() < 0.6 else len(data)))
        kind = rng.randrange(5)
        if kind == 0: data[at] = rng.randrange(256)
        if kind == 1: data[at:at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
        if kind == 2: data = data[:max(at, 1)]
        if kind == 3: data[at:at] = data[at:at + rng.randrange(64)]
        if kind == 4: data[at:at + 8] = rng.randbytes(8)
    return bytes(data)


def test_a_header_without_a_sample_rate(separator, tmp_path):
    write(tmp_path / "x.flac", noise(2, 4000), RATE)
    data = bytearray((tmp_path / "x.flac").read_bytes())
    data[18:22] = b"\0\0\0\x80" # 0 Hz, one channel, 9 bits
    (tmp_path / "x.flac").write_bytes(data)
    with pytest.raises(UserError, match="x.flac is damaged: its header gives no sample rate"):
        separator.separate_file(tmp_path / "x.flac", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fuzzed_songs(separator, tmp_path):
    """For a few seconds: damaged containers are separated or refused in one line, and only whole songs are
    left."""
    rng, seen = random.Random(7), {"separated": 0, "refused": 0}
    originals = {}
    for suffix in ("wav", "flac", "mp3", "ogg"):
        write(tmp_path / f"x.{suffix}", noise(2, 4000), RATE)
        originals[suffix] = (tmp_path / f"x.{suffix}").read_bytes()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        suffix = rng.choice(list(originals))
        (tmp_path / f"y.{suffix}").write_bytes(damaged(originals[suffix], rng))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DamagedAudio)
                summary = separator.separate_file(
                    tmp_path / f"y.{suffix}", tmp_path / "out", overwrite=True, stems="bass"
                )
            assert read(summary["outputs"]["bass"])[0].shape == (summary["channels"], summary["frames"])
            seen["separated"] += 1
        except UserError as e:
            assert "\n" not in str(e)
            seen["refused"] += 1
        assert not list((tmp_path / "out").glob(".*")) if (tmp_path / "out").exists() else True
    assert min(seen.values()) > 0, seen


def test_fuzzed_models(run):
    "For a few seconds: damaged model files load or are refused in one line."
    rng, whole, seen = random.Random(9), (run / "model.safetensors").read_bytes(), {"loaded": 0, "refused": 0}
    recipe = (run / "recipe.json").read_bytes()
    until = time.monotonic() + 3
    while time.monotonic() < until:
        (run / "model.safetensors").write_bytes(damaged(whole, rng) if rng.random() < 0.7 else whole)
        (run / "recipe.json").write_bytes(damaged(recipe, rng) if rng.random() < 0.3 else recipe)
        try:
            Separator.from_pretrained(run)
            seen["loaded"] += 1
        except UserError as e:
            seen["refused"] += 1
            assert str(e)
    assert min(seen.values()) > 0, seen


# -- nobody listens -----------------------------------------------------------

COMMANDS = """
import sys
import torch
from deepdemix.cli import main
torch.set_num_threads(1)
home, odd = sys.argv[1:]
small = ["--set", "epochs=1", "--set", "examples_per_epoch=4", "--set", "valid_examples=2", "--set", "mixer.pitch=null", "--set", "mixer.stretch=null"]
statuses = [main(words) for words in (
    ["prepare", "--toy", "6", "--out", f"{home}/store"],
    ["train", "--model", "baseline", "--profile", "demo", "--data", f"{home}/store", "--out", f"{home}/run", *small],
    ["evaluate", "--model", f"{home}/run", "--data", f"{home}/store", "--split", "valid", "--out", f"{home}/scores.json"],
    ["separate", odd, "--model", f"{home}/run", "--out", f"{home}/stems"])]
open(f"{home}/statuses", "w").write(str(statuses))
"""


def test_commands_without_standard_error_and_with_a_plain_standard_output(tmp_path):
    """As under `2>&-`, in a service, or with an old code page; the name of the song has characters that no
    code page has."""
    odd = tmp_path / "Déjà – 🎵.wav"
    write(odd, noise(1, 44100), 44100)
    command = 'exec "$0" -c "$1" "$2" "$3" 2>&-'
    env = os.environ | dict(PYTHONIOENCODING="ascii")
    done = subprocess.run(["sh", "-c", command, sys.executable, COMMANDS, str(tmp_path), str(odd)], env=env,
                          stdout=subprocess.PIPE)
    assert (tmp_path / "statuses").read_text() == "[0, 0, 0, 0]", done.stdout.decode()
    shown = done.stdout.decode("ascii")
    assert next(line for line in shown.splitlines() if line.startswith("silence")).split()[1] == "-"
    assert "4 stems in" in shown and "\\U0001f3b5" in shown


def test_progress_is_shown_where_somebody_sees_it(tmp_path, monkeypatch):
    "From Python, too, a missing or closed standard error costs no result."
    from deepdemix.data import prepare_toy
    from deepdemix.evaluation import evaluate
    from deepdemix.foundations.profiles import recipe_for
    from deepdemix.foundations.runs import load_network
    from deepdemix.training import fit
    closed = open(os.devnull, "w")
    closed.close()
    for name, stream in dict(none=None, closed=closed).items():
        monkeypatch.setattr(sys, "stderr", stream)
        store = prepare_toy(6, tmp_path / name / "store", duration=1.0, progress=True)
        recipe = recipe_for("baseline", "demo", epochs=1, examples_per_epoch=4, valid_examples=2,
                            mixer=dict(duration=0.5, pitch=None, stretch=None))
        run = fit(recipe, store, tmp_path / name / "run", progress=True)
        assert evaluate(Separator(load_network(run)), store.split("valid"), progress=True).rows.size


# -- a stranger's recipe and the memory ---------------------------------------

GREEDY = """
import re
import torch
from pathlib import Path
from torch import nn
from deepdemix.foundations.files import UserError
from deepdemix.foundations.runs import _stored_network
from deepdemix.foundations.registry import build_network, known_networks, register_network
from deepdemix.foundations.profiles import recipe_for

@register_network("random_table")
class RandomTable(nn.Module):
    def __init__(self, rows=3, doublings=0, layers=1):
        super().__init__()
        table = torch.randn(rows, 1000)
        for _ in range(doublings): table = torch.cat([table, table])
        self.table = nn.Parameter(table)
        self.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(layers))

def peak(): return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**10

assert _stored_network(dict(network=["random_table", dict(rows=4)]), "run", 4002).table.shape == (4, 1000)
requests = [("random_table", {name: n}, 3002) for name, n in dict(rows=10**6, doublings=30, layers=10**7).items()]
for name in known_networks():
    if name in ("ensemble", "random_table"): continue
    args = dict(build_network(name, **recipe_for("pretraining" if name == "encoder" else name, "demo").network_args).args)
    weights = sum(v.numel() for v in build_network(name, **args).state_dict().values())
    _stored_network(dict(network=[name, args]), "run", weights)
    if {"window_length", "hop_length"} <= args.keys(): requests.append((name, args | dict(window_length=65536, hop_length=2), weights))
before = peak()
for name, args, weights in requests:
    try: _stored_network(dict(network=[name, args]), "run", weights)
    except UserError as e: assert "describes a larger network" in str(e), e
    else: assert name != "random_table"
    assert peak() - before < 300, (name, args, peak() - before)
print(len(requests))
"""


def test_a_recipe_that_asks_for_gigabytes_is_refused_before_it_gets_them():
    done = subprocess.run([sys.executable, "-c", GREEDY], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 6, done.stderr[-2000:]


def test_models_are_loaded_in_threads(tmp_path):
    "Each has the weights of its own file, and nobody's random state is disturbed."
    from concurrent.futures import ThreadPoolExecutor

    from deepdemix.foundations.runs import load_network
    sizes = (2, 40, 3, 60)
    for size in sizes:
        save_network(Baseline(hidden_size=size, sample_rate=RATE, window_length=256, hop_length=64),
                     Recipe(network="baseline"), tmp_path / str(size))
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load_network, [tmp_path / str(size) for size in sizes] * 15))
    assert [x.args["hidden_size"] for x in loaded] == list(sizes) * 15
    assert torch.equal(torch.get_rng_state(), before)
