"""Our numbers beside those of the field's packages, where these are installed: `make compare`."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

__all__ = ["module"]


class _Bare:
    """Finds a package's folders as packages with nothing in them: their ``__init__`` is not run."""

    def __init__(self, top, folder):
        self.top, self.folder = top, folder

    def find_spec(self, name, path=None, target=None):
        top, *parts = name.split(".")
        place = self.folder.joinpath(*parts)
        if top != self.top or not place.is_dir():
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(place)]
        return spec


class _Hollow:
    """Stands for a package that is not there, so that what only names it can be imported."""

    def __init__(self, top):
        self.top = top

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == self.top else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute


def module(name):
    """A module of a package without what the package imports beside it: torchvision has no build for a bare CPU."""
    top = name.partition(".")[0]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(top)
    if spec is None:
        pytest.skip(f"{top} is not installed: make compare")
    if not any(isinstance(finder, _Bare) and finder.top == top for finder in sys.meta_path):
        folders = spec.submodule_search_locations
        sys.meta_path.insert(0, _Bare(top, Path(next(iter(folders)))))
        sys.meta_path.extend(
            _Hollow(lost) for lost in ("torchvision", "timm") if importlib.util.find_spec(lost) is None
        )
    return importlib.import_module(name)
