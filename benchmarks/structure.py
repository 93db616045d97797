"""The import graph of bitlower in numbers: rooms, floors, arrows and circles of each top-level folder.

    python benchmarks/structure.py [--root CHECKOUT]

Each backend is measured like a top-level folder too. A room is a file of the folder, or a folder in it with all that it
holds; an arrow leads from a room to another that it imports, for types alone too; a circle is a set of rooms that reach
each other; floors are the levels of the rooms, each above all that it imports. ``modules`` and ``circles of modules``
are the same file by file. ``by place`` counts where an argument of a node is read by its number: ``.args[…]`` and
``operand(node, 1)``. ``closure`` is how many pass modules ``lower_integer.py`` pulls in, itself among them.
Of another checkout the numbers of folders are printed alone.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import networkx as nx
from _common import show_table, write_result

ROOT = Path(__file__).parents[1]
FOLDERS = ("ir", "passes", "frontends", "backends", "tools")
BACKENDS = tuple(f"backends/{name}" for name in ("onnx_qdq", "checkpoint", "tvm_kernels"))
ENTRY = "bitlower.passes.lowering.lower_integer"


def modules(folder: str, root: Path = ROOT) -> dict[str, Path]:
    """The modules of a top-level folder by name."""
    paths = sorted((root / folder).rglob("*.py"))
    return {
        "bitlower." + ".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in paths
    }


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ``known`` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known.keys() or {node.module} & known.keys()
    return found


def graph_of(folder: str, root: Path = ROOT) -> nx.DiGraph:
    """Modules of a folder and their imports of each other."""
    known, graph = modules(folder, root), nx.DiGraph()
    graph.add_nodes_from(known)
    graph.add_edges_from(
        (name, other) for name, path in known.items() for other in imports(path, known) if other != name
    )
    return graph


def room(name: str, folder: str) -> str:
    """The file or folder in a folder that a module belongs to."""
    return ".".join(name.split(".")[: folder.count("/") + 3])


def circles(graph: nx.DiGraph) -> list[list[str]]:
    """The sets of nodes that reach each other."""
    return [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]


def by_place(path: Path) -> int:
    """How often a file reads an argument of a node by its number."""
    count = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            count += node.value.attr == "args"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "operand" and len(node.args) > 1:
            count += isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, int)
    return count


def measure(folder: str, root: Path) -> dict[str, int]:
    """The numbers of one folder, its own ``__init__.py`` left out: it only names what is public."""
    files = graph_of(folder, root)
    files.remove_node(f"bitlower.{folder.replace('/', '.')}")
    rooms = nx.DiGraph()
    home = {name: room(name, folder) for name in files}
    rooms.add_nodes_from(home.values())
    rooms.add_edges_from((home[a], home[b]) for a, b in files.edges if home[a] != home[b])
    return {
        "modules": len(files), "circles of modules": len(circles(files)), "rooms": len(rooms),
        "floors": nx.dag_longest_path_length(nx.condensation(rooms)) + 1, "arrows": rooms.number_of_edges(),
        "circles": len(circles(rooms)), "by place": sum(map(by_place, modules(folder, root).values())),
    }  # fmt: skip


def closure(entry: str) -> int:
    """How many passes ``entry`` and what it imports hold: files without an underscore in the families of ``passes``."""
    reached = {entry} | nx.descendants(graph_of("passes"), entry)
    parts = [name.split(".")[2:] for name in reached]
    return sum(len(part) > 1 and not any(name.startswith("_") for name in part) for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout, whose numbers are printed alone")
    root = parser.parse_args().root.resolve()
    rows = [
        {"folder": folder, **measure(folder, root)} for folder in FOLDERS + (BACKENDS if root == ROOT.resolve() else ())
    ]
    show_table(list(rows[0]), [list(row.values()) for row in rows])
    if root != ROOT.resolve():
        return
    write_result("structure", "python benchmarks/structure.py", {"rows": rows, "closure": closure(ENTRY)})
    print(f"passes that {ENTRY} imports, itself among them: {closure(ENTRY)}")


if __name__ == "__main__":
    main()
