"""The house stands: every module has a floor, imports point downward, few rooms touch torch, disks or terminals.

Only the syntax is read, so an import inside a function, under ``TYPE_CHECKING`` or by a constant name in
``importlib.import_module`` counts like any other. A file that the tables do not name fails, so that whoever adds one
says where it belongs.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PACKAGE = "shardtool"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# fmt: off
# A floor, what stands on it, and the floors that it may import besides itself. The names are fnmatch patterns of
# modules below shardtool; "." is shardtool/__init__.py. A module belongs to the first line that names it.
FLOORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "L0 words":      (("errors", "dtypes", "window", "units", "parallel",
                       "calm", "turns"),                                       ()),
    "L1 nouns":      (("plan", "mosaic", "schedule", "header", "digest",
                       "recipe", "recipe_json", "fold", "inventory",
                       "manifest", "pattern", "unpickle", "torchfile"),        ("L0 words",)),
    "L2a layouts":   (("layouts", "layouts.*"),                                ("L0 words", "L1 nouns")),
    "L2b stores":    (("stores", "stores.*"),                                  ("L0 words", "L1 nouns")),
    "L3 engine":     (("container", "budget", "cast", "sinks", "sinks.*",
                       "engine", "checkpoint", "torchread", "computed",
                       "segments", "messages", "exchange",
                       "checked"),                    ("L0 words", "L1 nouns", "L2a layouts",
                                                                                "L2b stores")),
    "L3 tracing":    (("tracing", "tracing.*"),                                ("L0 words", "L1 nouns", "L2a layouts",
                                                                                "L3 engine")),
    "L4 operations": (("ops", "ops.*"),                                        ("L0 words", "L1 nouns", "L2a layouts",
                                                                                "L2b stores", "L3 engine",
                                                                                "L3 tracing")),
    "L5 faces":      (("cli", "cli.*", "display", "settings",
                       "integrations", "integrations.*"),                      ("L0 words", "L1 nouns", "L2a layouts",
                                                                                "L2b stores", "L3 engine",
                                                                                "L3 tracing", "L4 operations")),
    "plug-in tests": (("testing", "testing.*"),                                ("L0 words", "L2b stores")),
    "the front":     ((".", "__main__"),                                       ("L0 words", "L1 nouns", "L2a layouts",
                                                                                "L2b stores", "L3 engine",
                                                                                "L3 tracing", "L4 operations",
                                                                                "L5 faces")),
}

# Whose import is a privilege: the package, and the modules or floors that may import it.
PRIVILEGES: dict[str, tuple[str, ...]] = {
    "torch":    ("sinks.tensor", "sinks.segment", "sinks.device", "messages", "exchange", "cast", "dtypes", "computed",
                 "ops.load", "ops.measure", "ops.stream", "ops.borrow", "ops.slices", "ops.bring", "ops.together",
                 "ops.safe", "ops.model", "ops.tp_plan", "L3 tracing", "integrations.*"),
    "boto3":    ("stores.*",),
    "botocore": ("stores.*",),
    "click":    ("L5 faces", "the front"),
    "rich":     ("L5 faces", "the front"),
    "tqdm":     ("L5 faces", "the front"),
}
LAZY_TORCH = ("dtypes", "computed", "ops.tp_plan")  # these import it in functions or for type checkers only

PURE = ("L1 nouns", "L2a layouts")            # floors that neither read nor write anything
IMPURE = ("os", "io", "pathlib", "shutil", "tempfile", "glob", "mmap", "socket", "ssl", "http", "urllib", "subprocess")
PURE_PATHS = ("PurePath", "PurePosixPath")    # the part of pathlib that is only about names

QUIET_UP_TO = "L4 operations"                 # this floor and those before it never print
# The only one that reads environment variables; an engine that is traced is set up by variables in its own process.
# What a launcher says of the node is no configuration.
ENVIRONMENT = ("settings", "stores.accounts", "container", "tracing.vllm", "tracing.sglang")
MOST_LINES = 500
# fmt: on


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module: its dotted name, the names taken from it, its line, and whether importing us skips it."""

    module: str
    names: tuple[str, ...]
    line: int
    lazy: bool


@dataclass(frozen=True)
class House:
    """A package as source texts by module name; each law yields one sentence for each breach."""

    sources: Mapping[str, str]
    packages: frozenset[str] = frozenset()

    @classmethod
    def at(cls, root: Path) -> House:
        """Read the package that lies in a directory."""
        sources, packages = {}, set()
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
                packages.add(".".join(parts) or ".")
            sources[".".join(parts) or "."] = path.read_text(encoding="utf-8")
        return cls(sources, frozenset(packages))

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """Each module's syntax tree."""
        return {module: ast.parse(source, filename=module) for module, source in self.sources.items()}

    def imports(self, module: str) -> Iterator[Import]:
        """Every import in a module, wherever it stands."""

        def walk(node: ast.AST, *, lazy: bool) -> Iterator[Import]:
            match node:
                case ast.Import():
                    yield from (Import(alias.name, (), node.lineno, lazy) for alias in node.names)
                case ast.ImportFrom():
                    yield Import(
                        self._absolute(module, node), tuple(alias.name for alias in node.names), node.lineno, lazy
                    )
                case ast.Call(
                    func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                    args=[ast.Constant(value=str(name)), *_],
                ):
                    yield Import(name, (), node.lineno, lazy)
            lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            lazy = lazy or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
            for child in ast.iter_child_nodes(node):
                yield from walk(child, lazy=lazy)

        yield from walk(self.trees[module], lazy=False)

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        here = [PACKAGE] if module == "." else [PACKAGE, *module.split(".")]
        base = here[: len(here) - node.level + (module in self.packages)]
        return ".".join([*base, *([node.module] if node.module else [])])

    def ours(self, module: str) -> Iterator[tuple[str, int]]:
        """The modules of this package that a module imports, with the line. ``__version__`` is anyone's to read."""
        for found in self.imports(module):
            if found.module.split(".")[0] != PACKAGE:
                continue
            target = found.module.removeprefix(PACKAGE).lstrip(".") or "."
            submodules = {name: name if target == "." else f"{target}.{name}" for name in found.names}
            inner = {name: path for name, path in submodules.items() if path in self.sources}
            yield from ((path, found.line) for path in inner.values())
            rest = set(found.names) - set(inner) - ({"__version__"} if target == "." else set())
            if rest or not found.names:
                yield target, found.line

    # The laws.

    def strangers(self) -> Iterator[str]:
        """Every module stands on a floor."""
        for module in self.sources:
            if floor_of(module) is None:
                yield f"{where(module)} stands on no floor; add it to FLOORS in tests/test_layers.py."

    def upward(self) -> Iterator[str]:
        """A module imports its own floor and those that FLOORS lists for it."""
        for module in self.sources:
            if (floor := floor_of(module)) is None:
                continue
            for target, line in self.ours(module):
                other = floor_of(target)
                if other != floor and other not in FLOORS[floor][1]:
                    yield f"{where(module, line)} ({floor}) imports {target} ({other or 'on no floor'})."

    def circles(self) -> Iterator[str]:
        """No module needs itself, however long the way."""
        graph = {module: {target for target, _ in self.ours(module)} for module in self.sources}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            yield f"Modules import each other in a circle: {' <- '.join(error.args[1])}."

    def privileges(self) -> Iterator[str]:
        """Only the modules in PRIVILEGES import what stands there."""
        for module in self.sources:
            for found in self.imports(module):
                package = found.module.split(".")[0]
                allowed = PRIVILEGES.get(package)
                if allowed is None:
                    continue
                if floor_of(module) not in allowed and not any(fnmatchcase(module, name) for name in allowed):
                    yield f"{where(module, found.line)} imports {package}, which only {', '.join(allowed)} may."
                elif package == "torch" and module in LAZY_TORCH and not found.lazy:
                    yield f"{where(module, found.line)} imports torch when it is imported itself; do so in a function."

    def impurities(self) -> Iterator[str]:
        """The pure floors touch no files, processes or networks."""
        for module in self.sources:
            if floor_of(module) not in PURE:
                continue
            for found in self.imports(module):
                names_only = found.module == "pathlib" and found.names and set(found.names) <= set(PURE_PATHS)
                if found.module.split(".")[0] in IMPURE and not names_only:
                    yield f"{where(module, found.line)} ({floor_of(module)}) imports {found.module}."
            for line in self._calls(module, "open"):
                yield f"{where(module, line)} ({floor_of(module)}) calls open()."

    def prints(self) -> Iterator[str]:
        """Only the faces speak to a terminal."""
        floors = list(FLOORS)
        quiet = floors[: floors.index(QUIET_UP_TO) + 1]
        for module in self.sources:
            for line in self._calls(module, "print") if floor_of(module) in quiet else ():
                yield f"{where(module, line)} ({floor_of(module)}) prints; return the value and let a face show it."

    def environment(self) -> Iterator[str]:
        """Only settings.py reads environment variables."""
        readers = {"environ", "environb", "getenv", "getenvb"}
        for module, tree in self.trees.items():
            if module in ENVIRONMENT:
                continue
            for node in ast.walk(tree):
                match node:
                    case ast.Attribute(value=ast.Name(id="os"), attr=name) if name in readers:
                        yield f"{where(module, node.lineno)} mentions os.{name}, which only settings.py may."
                    case ast.ImportFrom(module="os", names=names) if readers & {alias.name for alias in names}:
                        yield f"{where(module, node.lineno)} imports the environment, which only settings.py may."

    def long_files(self) -> Iterator[str]:
        """A file is short enough to be read in one sitting."""
        for module, source in self.sources.items():
            if (lines := source.count("\n")) > MOST_LINES:
                yield f"{where(module)} has {lines} lines, more than {MOST_LINES}: time to talk about a split."

    def _calls(self, module: str, name: str) -> Iterator[int]:
        for node in ast.walk(self.trees[module]):
            match node:
                case ast.Call(func=ast.Name(id=found)) if found == name:
                    yield node.lineno


LAWS = ("strangers", "upward", "circles", "privileges", "impurities", "prints", "environment", "long_files")


def floor_of(module: str) -> str | None:
    """The floor that a module stands on."""
    for floor, (names, _) in FLOORS.items():
        if any(fnmatchcase(module, name) for name in names):
            return floor
    return None


def where(module: str, line: int | None = None) -> str:
    """A module for a message: its dotted name, and the line if there is one."""
    name = PACKAGE if module == "." else f"{PACKAGE}.{module}"
    return name if line is None else f"{name}, line {line}"


@pytest.fixture(scope="module")
def house() -> House:
    """The package as it is."""
    return House.at(ROOT)


@pytest.mark.parametrize("law", LAWS)
def test_the_package_keeps_the_law(house: House, law: str) -> None:
    breaches = list(getattr(house, law)())
    assert not breaches, "\n".join(["", *breaches])


def test_the_floors_list_only_floors_before_them() -> None:
    seen: list[str] = []
    for floor, (_, below) in FLOORS.items():
        assert set(below) <= set(seen), floor
        seen.append(floor)


def test_layouts_and_stores_do_not_know_each_other() -> None:
    assert "L2b stores" not in FLOORS["L2a layouts"][1]
    assert "L2a layouts" not in FLOORS["L2b stores"][1]


@pytest.mark.parametrize(
    ("law", "module", "source"),
    [
        ("strangers", "helpers", ""),
        ("strangers", "sink", ""),
        ("upward", "plan", "from shardtool import engine"),
        ("upward", "plan", "import shardtool.engine"),
        ("upward", "plan", "from .engine import execute"),
        ("upward", "plan", "def f():\n    from shardtool.engine import execute"),
        ("upward", "plan", "if TYPE_CHECKING:\n    from shardtool.engine import Job"),
        ("upward", "plan", "import importlib\nimportlib.import_module('shardtool.engine')"),
        ("upward", "plan", "from shardtool import save"),
        ("upward", "layouts.vllm", "from shardtool.stores import open_store"),
        ("upward", "stores.local", "from ..layouts import rules"),
        ("upward", "ops.load", "from shardtool.settings import Settings"),
        ("upward", "testing", "from shardtool.engine import execute"),
        ("circles", "engine", "import shardtool.budget"),
        ("privileges", "engine", "import torch"),
        ("privileges", "engine", "def f():\n    import torch.cuda"),
        ("privileges", "ops.convert", "from torch import Tensor"),
        ("privileges", "dtypes", "import torch"),
        ("privileges", "layouts.vllm", "import boto3"),
        ("privileges", "ops.convert", "from tqdm import tqdm"),
        ("impurities", "plan", "import os.path"),
        ("impurities", "plan", "from pathlib import Path"),
        ("impurities", "layouts.vllm", "def f():\n    return open('x').read()"),
        ("prints", "ops.convert", "print('done')"),
        ("environment", "engine", "import os\nos.environ['X']"),
        ("environment", "engine", "import os\nos.getenv('X')"),
        ("environment", "engine", "from os import environ"),
        ("long_files", "plan", "\n" * 501),
    ],
)
def test_a_breach_is_found(law: str, module: str, source: str) -> None:
    others = {"engine": "", "budget": "import shardtool.engine", "stores": "", "layouts": "", "layouts.rules": ""}
    house = House({**others, module: source}, packages=frozenset({".", "stores", "layouts"}))
    assert list(getattr(house, law)()), f"{law} did not notice {source!r} in {module}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("plan", "from shardtool.window import Window\nfrom .errors import PlanError"),
        ("plan", "from pathlib import PurePosixPath"),
        ("dtypes", "def to_torch():\n    import torch"),
        ("dtypes", "if TYPE_CHECKING:\n    import torch"),
        ("layouts", "from .rules import Rule"),
        ("layouts.vllm", "from . import rules"),
        ("sinks.tensor", "import torch"),
        ("cast", "import torch"),
        ("stores.s3", "def client():\n    import boto3"),
        ("checkpoint", "from shardtool import __version__"),
        ("engine", "import os\nos.cpu_count()"),
        ("settings", "import os\nos.environ.get('X')"),
        ("cli", "import click\nprint('done')"),
        ("testing", "from shardtool.stores import base"),
        (".", "def save():\n    from shardtool.ops import convert"),
        ("plan", "\n" * 500),
    ],
)
def test_what_is_allowed_is_not_a_breach(module: str, source: str) -> None:
    names = ("errors", "window", "layouts", "layouts.rules", "stores", "stores.base", "ops", "ops.convert")
    house = House({**dict.fromkeys(names, ""), module: source}, packages=frozenset({".", "layouts", "stores", "ops"}))
    assert [breach for law in LAWS for breach in getattr(house, law)()] == []
