"""Modules that an engine's model files import and that loading weights does not need, where they are not installed.

torchvision has no build for every torch. Vision models import names from it; here each of them is a class that does
nothing, enough to build the model and to load its weights.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Name(type):
    """A class whose every attribute is another one that does nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class Nothing(metaclass=_Name):
    """Takes anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Itself."""
        return self


class _Module(ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - a package without a place
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Nothing,), {})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname == self._package or fullname.startswith(self._package + "."):
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install(*packages: str) -> None:
    """Stand in for the packages among these that are not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            sys.meta_path.append(_Finder(package))
