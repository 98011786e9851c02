"""The design's dependency directions, held by walking every import of the repository."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest

from tests.conftest import ROOT

FOLDERS = ("engine", "utils", "tools", "models", "benchmarks", "tests")
SCRIPTS = tuple(sorted(path.name for path in ROOT.glob("*.py") if path.name != "weight.py"))
SOURCES = tuple(
    sorted(
        path.relative_to(ROOT).as_posix()
        for path in (*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.py")))
    )
)
PRODUCT = tuple(name for name in SOURCES if not name.startswith("tests/"))

# Library → path prefixes that may import it; tests may import everything.
OWNERS = {
    "argparse": (*SCRIPTS, "utils/cli.py", "tools/", "models/tiny-yi/", "benchmarks/"),
    "transformers": (*SCRIPTS, "utils/", "tools/", "models/", "benchmarks/"),
    "datasets": (*SCRIPTS, "utils/", "tools/", "models/", "benchmarks/"),
    "evaluate": (*SCRIPTS, "utils/", "tools/", "models/", "benchmarks/"),
    "mpi4py": ("engine/comm.py",),
    "torch.distributed": ("engine/comm.py", "engine/nccl.py"),
    "modelopt": ("utils/quantisation/",),
    "triton": ("engine/kernels/triton/",),
    "tensorrt": ("engine/backends/trtllm.py",),
    "tensorrt_llm": ("engine/backends/trtllm.py",),
}

# The engine's storeys, lowest first: a module may import from lower ones and from its own cell.
STOREYS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("errors",), ("plugins",), ("transfer",)),
    (("env",), ("config",), ("quant",), ("limits",), ("engine_file",)),
    (("mapping",), ("comm", "nccl"), ("threads",), ("cache",), ("loading",)),
    (("record",), ("unified",), ("weights.types", "weights.deferred"), ("kernels",)),
    (("checkpoint",), ("layers",), ("sampling", "penalties", "beam", "decoding")),
    (("weights",), ("models",)),
    (("graph", "batch", "static_batch", "graphed_batch"), ("tactics",)),
    (("session",),),
    (("backends",),),
)
# Parts that must not know all that lies below them: what they may import of the engine.
ONLY = {
    "kernels": ("kernels", "cache", "env", "errors", "quant"),
    "layers": ("layers", "kernels", "cache", "comm", "mapping", "quant", "config", "errors"),
    "models": ("models", "layers", "kernels", "cache", "comm", "mapping", "quant", "config"),
    "checkpoint": (
        "checkpoint",
        "weights.types",
        "weights.deferred",
        "mapping",
        "config",
        "quant",
        "unified",
        "env",
        "errors",
    ),
    "weights": (
        "weights",
        "checkpoint.base",
        "mapping",
        "config",
        "quant",
        "unified",
        "errors",
    ),
}
# Lines of code: neither blank nor a comment.
MAX_LINES = {"product": 330, "tests": 430}


class Imports(ast.NodeVisitor):
    """Names of all modules that a file imports, those for type checkers only left out."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute"
        assert node.module is not None
        self.names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if ast.unparse(node) == "torch.distributed":
            self.names.add("torch.distributed")
        self.generic_visit(node)


@cache
def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text())


@cache
def imports(name: str) -> frozenset[str]:
    visitor = Imports()
    visitor.visit(parse(name))
    return frozenset(visitor.names)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def cells() -> Iterator[tuple[int, tuple[str, ...]]]:
    return ((storey, cell) for storey, row in enumerate(STOREYS) for cell in row)


def place(module: str) -> tuple[int, tuple[str, ...]] | None:
    """Storey and cell of 'engine.x.y'; the longest prefix named in STOREYS counts."""
    inner = module.removeprefix("engine.")
    found = [
        (len(name), storey, cell)
        for storey, cell in cells()
        for name in cell
        if is_in(inner, name)
    ]  # fmt: skip
    return max(found)[1:] if found else None


def test_the_walk_sees_the_repository():
    assert "build.py" in SOURCES
    assert "engine/models/yi.py" in SOURCES
    assert "engine.config" in imports("engine/mapping.py")
    assert "torch" in imports("engine/engine_file.py")


@pytest.mark.parametrize("library", OWNERS)
def test_libraries_are_imported_by_their_owners_only(library):
    offenders = [
        name
        for name in PRODUCT
        if not name.startswith(OWNERS[library])
        and any(is_in(module, library) for module in imports(name))
    ]
    assert offenders == []


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) in ("os.environ", "os.environb", "os.getenv", "os.putenv")
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        return any(alias.name in ("environ", "environb", "getenv") for alias in node.names)
    return False


def test_the_environment_is_read_in_one_file():
    readers = [name for name in PRODUCT if any(map(reads_environment, ast.walk(parse(name))))]
    assert set(readers) <= {"engine/env.py"}


def test_the_engine_imports_nothing_of_the_scripts():
    outside = ("utils", "weight", "tests", "tools", *(name[:-3] for name in SCRIPTS))
    offenders = [
        (name, module)
        for name in PRODUCT
        if name.startswith("engine/")
        for module in imports(name)
        if any(is_in(module, package) for package in outside)
    ]
    assert offenders == []


def test_utils_import_no_script():
    scripts = tuple(name[:-3] for name in SCRIPTS)
    offenders = [
        (name, module)
        for name in (*(n for n in PRODUCT if n.startswith("utils/")), "weight.py")
        for module in imports(name)
        if any(is_in(module, script) for script in (*scripts, "tests", "tools"))
    ]
    assert offenders == []


ENGINE = tuple(
    name for name in PRODUCT if name.startswith("engine/") and name != "engine/__init__.py"
)


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("name", ENGINE)
def test_arrows_point_down(name):
    own = place(module_name(name))
    assert own is not None, f"{name} has no place in STOREYS; choose one"
    storey, cell = own
    for module in sorted(imports(name)):
        target = place(module) if is_in(module, "engine") and module != "engine" else None
        if target is None:
            continue
        assert target[0] < storey or target[1] == cell, f"{name} imports {module} from above"


@pytest.mark.parametrize("part", ONLY)
def test_narrow_parts_know_little(part):
    allowed = tuple(f"engine.{name}" for name in ONLY[part])
    offenders = [
        (name, module)
        for name in ENGINE
        if is_in(module_name(name), f"engine.{part}")
        for module in imports(name)
        if place(module) is not None
        and not any(is_in(module, other) for other in allowed)
        and not any(is_in(other, module) for other in allowed)
    ]
    assert offenders == []


def test_every_storey_is_inhabited():
    """A name in the table that no module has would check nothing."""
    modules = {module_name(name).removeprefix("engine.") for name in ENGINE}
    names = {name for _, cell in cells() for name in cell}
    empty = {name for name in names if not any(is_in(module, name) for module in modules)}
    assert empty <= {"comm", "env"}


@pytest.mark.parametrize(
    "script",
    ["build.py", "run.py", "summarize.py", "hf_yi_convert.py", "quantize.py", "benchmark.py"],
)
def test_help_is_quick(script):
    """--help imports neither torch nor transformers, which take seconds."""
    command = [sys.executable, "-X", "importtime", script, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith(f"usage: {script}")
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported
    assert imported & {"torch", "transformers", "numpy", "triton", "mpi4py"} == set()


@pytest.mark.parametrize("name", SOURCES)
def test_files_stay_short(name):
    limit = MAX_LINES["tests" if name.startswith("tests/") else "product"]
    lines = (line.strip() for line in (ROOT / name).read_text().splitlines())
    assert sum(bool(line) and not line.startswith("#") for line in lines) <= limit
