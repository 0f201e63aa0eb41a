"""A user's program, which a type checker reads and nobody runs: `make lint` holds our types to it."""
from collections.abc import Callable
from pathlib import Path
from typing import assert_type

import torch

import deepdemix
from deepdemix.audio import STFT
from deepdemix.augmentation import Mixer
from deepdemix.foundations.recipe import Recipe
from deepdemix.foundations.store import Store
from deepdemix.metrics import sdr
from deepdemix.networks.compact import Compact
from deepdemix.separation import Separator


def listen_to(song: Path, heard: Callable[[float, float], bool]) -> dict:
    separator = deepdemix.Separator.from_pretrained("default", threads=2)
    assert_type(separator, Separator)
    assert_type(separator.separate(song, stems=["drums"], progress=heard), dict)
    separator.separat(song) # type: ignore[attr-defined]
    separator.separate(song, stem="drums") # type: ignore[call-arg]
    return separator.separate_file(song, "stems", format="flac", overwrite=True)


def look_at(song: torch.Tensor) -> torch.Tensor:
    stft = STFT(4096, 1024)
    assert_type(stft.inverse(stft(song), song.shape[-1]), torch.Tensor)
    network = Compact(width=32, layers=2)
    assert_type(network.embed(song[None]), torch.Tensor)
    return network.spectrum(song)


def teach(songs: str, out: Path) -> Path:
    store = deepdemix.Store.open(songs)
    assert_type(store, Store)
    assert_type(store.stems(0), torch.Tensor)
    mixer = deepdemix.Mixer(store, duration=3.0)
    assert_type(mixer, Mixer)
    recipe = deepdemix.Recipe(network="compact", epochs=3)
    assert_type(recipe, Recipe)
    deepdemix.Recipe(epochz=3) # type: ignore[call-arg]
    return deepdemix.fit(recipe, store, out)


def score(estimate: torch.Tensor, truth: torch.Tensor) -> None:
    deepdemix.misspelt # type: ignore[attr-defined]
    sdr(estimate, truth)
