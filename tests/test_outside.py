"""Networks from outside the package: a file, a module, an installed package; and what a run says when one is
missing."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from deepdemix.data import prepare_toy
from deepdemix.foundations.encoding import write
from deepdemix.foundations.toy_band import toy_song

ROOT = Path(__file__).parent.parent
NET = '''
import torch
from torch import nn
from deepdemix.foundations.registry import register_network


@register_network("shares")
class Shares(nn.Module):
    "Every source gets a share that is learnt."
    sources, sample_rate, channels, hop = ("drums", "bass", "other", "vocals"), 44100, 2, 1
    def __init__(self, start=0.3):
        super().__init__()
        self.args, self.share = dict(start=start), nn.Parameter(torch.full((4,), start))

    def forward(self, x): return x[:, None] * self.share[:, None, None]
'''
TRAIN = (
    "--profile demo --data toy --device cpu --set epochs=1 --set examples_per_epoch=8 --set valid_examples=4"
    " --set loss=l1_waveform"
)


def shell(folder, *lines, **env):
    """Commands one after the other in a fresh process in `folder`: their statuses, what is printed, and the
    lines of standard error."""
    code = "import sys\nfrom deepdemix.cli import main\nprint(*[main(line.split()) for line in sys.argv[1:]])"
    path = os.pathsep.join(filter(None, [str(ROOT), env.pop("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, "-c", code, *lines], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path} | env)
    assert done.returncode == 0, done.stderr
    return [int(x) for x in done.stdout.splitlines()[-1].split()], done.stdout, done.stderr.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder with a network, a song, and what its commands have made."
    folder = tmp_path_factory.mktemp("outside")
    (folder / "mynet.py").write_text(NET)
    write(folder / "song.wav", toy_song(0, 2.).sum(0), 44100)
    prepare_toy(4, folder / "toy", duration=2., progress=False)
    statuses, _, said = shell(folder, f"train --import mynet.py --model shares --out run {TRAIN}",
                              "separate --model run song.wav",
                              "evaluate --model run --data toy --out scores.json")
    assert statuses == [0, 0, 0], said
    return folder


def test_an_outside_network_is_trained_separated_and_evaluated_by_commands(folder):
    assert sorted(x.stem for x in (folder / "separated/song").iterdir()) == [
        "bass", "drums", "other", "vocals",
    ]
    assert "run" in {x["model"] for x in json.loads((folder / "scores.json").read_text())["songs"]}
    [found] = json.loads((folder / "run/recipe.json").read_text())["imports"]
    assert found["name"] == "mynet.py" and len(found["digest"]) == 64
    assert not [x for x in (folder / "run").rglob("*") if x.suffix == ".py"]


def test_without_the_file_a_run_asks_for_it_by_name_and_nothing_is_imported(folder):
    (folder / "run/mynet.py").write_text("raise SystemExit('imported from a run folder')")
    commands = ("separate --model run song.wav --out again",
                "evaluate --model run --data toy --out again.json",
                "export --model run --out again.onnx")
    statuses, _, said = shell(folder, *commands, f"train --model shares --out other {TRAIN}",
                              "separate --import mynet.py --model run song.wav --out now")
    assert statuses == [2, 2, 2, 2, 0] and not list(folder.glob("again*"))
    assert said[:3] == ["deepdemix: run needs mynet.py: add --import mynet.py"] * 3
    assert "no network is called 'shares'" in said[3] and "--import FILE.py" in said[3]


def test_modules_the_environment_and_packages_bring_networks_too(folder, tmp_path):
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[deepdemix.networks]\ntheir_net = theirs:Shares\ngone = theirs:no_such_name\n"
    )
    (tmp_path / "theirs.py").write_text(NET.replace('@register_network("shares")\n', ""))
    (tmp_path / "a_module.py").write_text(NET.replace('"shares"', '"of_a_module"'))
    (folder / "broken.py").write_text("import torch\nnet = torch.no_such_layer()\n")
    train = f"train --model their_net --out packaged {TRAIN}"
    failing = [f"models --import {name}" for name in ("broken.py", "nowhere.py", "no_such_module")]
    statuses, printed, said = shell(folder, "models --import a_module", train,
                                    "separate --model packaged song.wav --out theirs", *failing,
                                    PYTHONPATH=str(tmp_path), DEEPDEMIX_IMPORT="mynet.py")
    assert statuses == [0, 0, 0, 2, 2, 2], said
    networks = printed.split("networks, for train:")[1].split()
    assert {"shares", "of_a_module", "their_net"} <= set(networks)
    assert sum("'gone'" in line for line in said) == 1
    assert [line for line in said if "--import" in line] == said[-3:]
    assert ("broken.py: line 2: AttributeError" in said[-3] and "no such file" in said[-2]
            and "ModuleNotFoundError" in said[-1])


@pytest.mark.slow
def test_the_page_on_networks_holds_from_an_empty_folder(tmp_path):
    cells = nbformat.read(ROOT / "nbs/pages/add_network.ipynb", 4).cells
    code = [c.source for c in cells
            if c.cell_type == "code" and ("class Neighbour" in c.source or c.source.startswith("import "))]
    assert len(code) == 3
    (tmp_path / "mynet.py").write_text("\n\n".join(code))
    write(tmp_path / "song.wav", toy_song(0, 3.).sum(0), 44100)
    text = next(c.source for c in cells if c.source.startswith("## Where it lives"))
    commands = [x.removeprefix("deepdemix ") for x in text.split("```")[1].strip().splitlines()]
    assert len(commands) == 5
    assert shell(tmp_path, *commands)[0] == [0] * 5
    assert (tmp_path / "separated/song/vocals.wav").is_file() and (tmp_path / "scores.json").is_file()
