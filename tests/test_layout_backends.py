"""The order of the parts of each backend, and what imports TVM."""

import ast
import runpy
from pathlib import Path

import networkx
import pytest

_LAYOUT = runpy.run_path(str(Path(__file__).with_name("test_layout.py")))
ROOT, SOURCES = _LAYOUT["ROOT"], _LAYOUT["SOURCES"]
_modules, _imports, _imported = (_LAYOUT[name] for name in ("_modules", "_imports", "_imported"))

ORDER = {
    "artifact": (),
    "checkpoint": (
        "experts",
        "skeleton",
        "contents",
        "container",
        "safetensors",
        "format",
        "formats",
        "sizes",
        "verify",
        "backend",
    ),
    "onnx_qdq": (
        *("graph", "encoding", "write", "translate", "runtime", "rewrite"),
        *("sizes", "model", "verify", "backend"),
    ),
    "tvm_kernels": (
        *("pins", "spec", "internals", "target", "tir", "schedules", "kernel", "relax", "library", "inspect", "verify"),
        "backend",
    ),
}
"""The parts of each folder of ``backends/`` as they are read: each imports itself and those before it."""


@pytest.mark.parametrize("folder", [folder for folder, parts in ORDER.items() if parts])
def test_the_parts_of_a_backend_import_in_the_order_in_which_they_are_read(folder):
    known = _modules("backends")
    package, parts = f"bitlower.backends.{folder}", ORDER[folder]
    for name, path in known.items():
        if not name.startswith(f"{package}."):
            continue
        own = name.removeprefix(f"{package}.").split(".")[0]
        for other in _imports(path, known):
            if other.startswith(f"{package}."):
                part = other.removeprefix(f"{package}.").split(".")[0]
                assert parts.index(part) <= parts.index(own), f"{path} imports {other}"


def test_backends_import_what_is_shared_and_no_other_backend():
    known = _modules("backends")
    for path in known.values():
        folder = path.parts[1] if len(path.parts) > 2 else ""
        for name in _imports(path, known):
            other = known[name].parts[1] if len(known[name].parts) > 2 else ""
            assert other in {"", "artifact", folder}, f"{path} imports {name}"


def _needs_tvm(known):
    """The modules that import TVM when they are imported, by themselves or by what they import."""
    graph, direct = networkx.DiGraph(), set()
    for name, path in known.items():
        graph.add_node(name)
        for node in ast.parse((ROOT / path).read_text()).body:
            module = getattr(node, "module", "") or ""
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module]
            if any(
                one.split(".")[0] in ("tvm", "tvm_ffi")
                for one in names
                if isinstance(node, ast.Import | ast.ImportFrom)
            ):
                direct.add(name)
            if isinstance(node, ast.ImportFrom):
                graph.add_edges_from(
                    (name, other) for one in node.names for other in {f"{module}.{one.name}", module} & known.keys()
                )
    return direct.union(*(networkx.ancestors(graph, name) for name in direct))


def test_what_needs_tvm_is_imported_when_it_is_asked_for_and_nothing_else_is():
    """TVM is an extra: specs are read without it, and functions import only what needs it."""
    known = _modules("backends")
    needing = _needs_tvm(known)
    assert not [name for name in needing if ".tvm_kernels." not in name or ".tvm_kernels.spec." in name]
    for path in known.values():
        tree = ast.parse((ROOT / path).read_text())
        at_once = {node for part in tree.body for node in ([part] if not isinstance(part, ast.If) else ast.walk(part))}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node not in at_once and (node.module or "").startswith("bitlower."):
                for one in node.names:
                    assert {f"{node.module}.{one.name}", node.module} & needing, (
                        f"{path}:{node.lineno}: import it above"
                    )


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] not in ("backends", "ir")], ids=str)
def test_the_parts_of_a_backend_are_its_own(path):
    """Others import the package of a backend, or the modules that lie beside them all."""
    for module in _imported(path):
        if module.startswith("bitlower.backends."):
            assert module.count(".") == 2, f"{path} imports {module}, which is a part of a backend"
