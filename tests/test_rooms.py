"""The rooms of the package: no circles, and imports that point down only."""

import ast
from pathlib import Path

import llamagen

PACKAGE = Path(llamagen.__file__).parent

ORDER = (
    "cli",
    ("serving", "training"),
    "evaluation",
    "pipeline",
    "vllm_plugin",
    "text",
    "data",
    ("checkpoints", "generation"),
    "backends",
    "models",
    "config",
    "support",
)
"""From top to bottom: a room imports those on the lines below its own only."""

FLOOR = {
    room: len(ORDER) - index
    for index, rooms in enumerate(ORDER)
    for room in ((rooms,) if isinstance(rooms, str) else rooms)
}


def imports_of(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llamagen"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("llamagen")}
    return found


def all_modules() -> dict[str, Path]:
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ["llamagen", *path.relative_to(PACKAGE).with_suffix("").parts]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_no_loose_modules() -> None:
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "__main__.py", "config.py"}


def test_every_room_has_a_place() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(FLOOR) - {"config"}


def test_imports_point_down() -> None:
    modules = all_modules()
    upward = []
    for module, path in modules.items():
        room = room_of(module)
        if room in ("", "__main__"):
            continue
        for imported in imports_of(path, modules):
            other = room_of(imported)
            if other != room and (not other or FLOOR[other] >= FLOOR[room]):
                upward.append(f"{module} imports {imported}")
    assert not upward, "\n".join(sorted(upward))


def test_no_circles() -> None:
    modules = all_modules()
    graph = {
        module: {name for name in imports_of(path, modules) if name in modules} - {module}
        for module, path in modules.items()
    }
    # Take away the modules that import none of the others, and those that none imports, until there
    # are no more: only circles, and what lies between two of them, remain.
    while True:
        imported = set().union(*graph.values())
        ends = {name for name, names in graph.items() if not names & graph.keys()}
        ends |= graph.keys() - imported
        if not ends:
            break
        graph = {name: names - ends for name, names in graph.items() if name not in ends}
    assert not graph, f"import circles among {sorted(graph)}"
