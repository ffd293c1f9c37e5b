"""The map of the code: rooms, what each file is for, and who imports whom.

Two ways to call it:

    python -m tests.project.architecture           writes the map into docs/architecture.md, between its two marks
    python -m tests.project.architecture FOLDER    counts modules, floors and arrows of another checkout, of any age
"""

import ast
import functools
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
MARKS = ("<!-- map -->", "<!-- /map -->")
# Rooms from the ground up. Those of one floor do not import from each other.
FLOORS = (
    ("base",),
    ("kernels",),
    ("layers",),
    ("checkpoint",),
    ("calibration",),
    ("quantization",),
    ("decoding",),
    ("evaluation", "serving", "vllm_plugin"),
    ("cli",),
    ("commands",),
    ("bench", "examples"),
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = ("generate", "calibrate", "quantize", "serve", "evaluate", "commands")
TOP = {"teal_layers": "layers", "hardware": "layers", "transformers": "checkpoint"}  # at the top of teal/; else base
COUNTED_AS_ONE = ("kernels", "bench", "examples")  # where modules are counted


@dataclass(frozen=True, slots=True)
class Module:
    """A file of the code.

    name: as it is imported. path: where it really is, from the root. imports: names of others.
    """

    name: str
    path: Path
    summary: str
    imports: frozenset[str]


def room_of(module: str) -> str:
    """The room of a module or package by its dotted name: "teal.kernels.gemv.launch" is in kernels."""
    package, *rest = module.split(".")
    if package != "teal":
        return "commands" if package in COMMANDS else package
    if rest[0] == "cli" and rest[-1] in COMMANDS:
        return "commands"
    return rest[0] if rest[0] in FLOOR else TOP.get(rest[0], "base")


def files(root: Path) -> dict[str, Path]:
    """The code's files by module name, tests left out. Packages, whose pages only describe them, are left out too.

    Where there is a package teal, what a link in it leads to is known by its name in teal.
    """
    has_package = (root / "teal").is_dir()
    found: dict[str, Path] = {}
    for folder in (root / "teal", root / "examples") if has_package else (root,):
        for parent, folders, names in os.walk(folder, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".") and name not in ("tests", "__pycache__")]
            for name in names:
                path = Path(parent, name)
                if path.suffix == ".py" and name != "__init__.py":
                    found[".".join(path.relative_to(root).with_suffix("").parts)] = path
    reached = {path.resolve() for path in found.values()}
    found |= {path.stem: path for path in root.glob("*.py") if path.resolve() not in reached}
    return dict(sorted(found.items()))


def imported_names(tree: ast.Module) -> set[str]:
    """All dotted names that a file imports anywhere in it; of `from a import b` both a.b and a."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@functools.cache
def modules(root: Path = ROOT) -> dict[str, Module]:
    """All modules of a checkout by name."""
    known = files(root)
    result = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        summary = (ast.get_docstring(tree) or "").split("\n")[0]
        imports = frozenset(imported_names(tree) & set(known) - {name})
        result[name] = Module(name, path.resolve().relative_to(root.resolve()), summary, imports)
    return result


def arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """For each module those it imports; a folder of COUNTED_AS_ONE is one module."""

    def unit(name: str) -> str:
        return next((part for part in name.split(".") if part in COUNTED_AS_ONE), name)

    found: dict[str, set[str]] = {}
    for name, module in modules(root).items():
        found.setdefault(unit(name), set()).update({unit(other) for other in module.imports} - {unit(name)})
    return found


def room_arrows() -> dict[str, set[str]]:
    """For each room the others that it imports from."""
    found: dict[str, set[str]] = {room: set() for room in FLOOR}
    for name, module in modules().items():
        found[room_of(name)] |= {room_of(other) for other in module.imports} - {room_of(name)}
    return found


def height(graph: dict[str, set[str]]) -> int:
    """How many floors a graph without cycles needs. Raises ValueError, naming what is left, if there is a cycle."""
    graph, floors = dict(graph), 0
    while graph:
        lowest = {name for name, needs in graph.items() if not needs & set(graph)}
        if not lowest:
            raise ValueError(f"a cycle among {sorted(graph)}")
        graph = {name: needs for name, needs in graph.items() if name not in lowest}
        floors += 1
    return floors


def size(graph: dict[str, set[str]]) -> str:
    """How many nodes, floors and arrows a graph has, as in "13, on 9 floors, with 49 arrows"."""
    return f"{len(graph)}, on {height(graph)} floors, with {sum(map(len, graph.values()))} arrows"


def draw() -> str:
    """The map as Markdown: each room with what it imports from and its files, from the ground up."""
    rooms = room_arrows()
    lines = [
        f"Rooms: {size(rooms)}. Modules: {size(arrows())}.",
        "An arrow is a pair of which one imports from the other, anywhere in its files.",
        "`kernels`, `bench` and `examples` count as one module each.",
        "`python -m tests.project.architecture` writes this list anew.",
    ]
    for room in FLOOR:
        below = ", ".join(sorted(rooms[room], key=list(FLOOR).index))
        lines += ["", f"**{room}**" + (f", on {below}" if below else ""), "", "| file | |", "|---|---|"]
        inside = [module for name, module in modules().items() if room_of(name) == room]
        for module in sorted(inside, key=lambda module: module.path):
            lines.append(f"| `{module.path.as_posix()}` | {escaped(module.summary)} |")
    return "\n".join(lines)


def escaped(summary: str) -> str:
    """A docstring's first line within a table: without its last full stop, and with bars and angles as text."""
    return re.sub(r"([|<>*_])", r"\\\1", summary.rstrip("."))


def with_map(text: str) -> str:
    """A page with the map between its marks."""
    begin, end = MARKS
    return text.split(begin)[0] + f"{begin}\n{draw()}\n{end}" + text.split(end)[1]


if __name__ == "__main__":
    if sys.argv[1:]:
        print(size(arrows(Path(sys.argv[1]).resolve())))
    else:
        PAGE.write_text(with_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
