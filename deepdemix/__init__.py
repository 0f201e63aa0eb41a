"""Music source separation with contrastive pretraining.

`Separator`, `separate`, `read`, `Store`, `Mixer`, `Recipe`, `fit`, `evaluate` and `listen` are here as well as in their rooms; each is imported
when it is first used, so that `import deepdemix` costs next to nothing.
"""
from os import PathLike

__version__ = "0.1.0"
__all__ = ["Mixer", "Recipe", "Separator", "Store", "evaluate", "fit", "listen", "read", "separate"]

_ROOMS = {
    "Mixer": "augmentation",
    "Recipe": "foundations.recipe",
    "Separator": "separation",
    "Store": "foundations.store",
    "evaluate": "evaluation",
    "fit": "training",
    "listen": "listening",
    "read": "foundations.codecs",
}


def separate(
    path:str|PathLike, # a song: any audio or video file
    out:str|PathLike="separated", # the folder in which the song gets a folder of its own
    model:str|PathLike="default", # a bundled model, a run folder, or "hf:owner/name"
    **options, # of `Separator.separate_file`
) -> dict: # what was written: "folder", "outputs" by stem, and more
    "Separate one song into files."
    from deepdemix.separation import Separator
    return Separator.from_pretrained(model).separate_file(path, out, **options)


def __getattr__(name:str) -> object:
    if name not in _ROOMS: raise AttributeError(f"module 'deepdemix' has no attribute '{name}'")
    from importlib import import_module
    globals()[name] = getattr(import_module(f"deepdemix.{_ROOMS[name]}"), name)
    return globals()[name]


def __dir__() -> list: return sorted({*globals(), *__all__})
