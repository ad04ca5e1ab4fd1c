"""Which file of the package imports which, read from the source with ast, and the circles among them.

Every import counts, wherever it is: at the top, inside a function, and below `if TYPE_CHECKING`.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# How many imports of one folder by another are shown.
SHOWN_ARROWS = 5


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        name: full dotted name, such as colossal_llama2.dataset.loader.Collator.
        line: the line of the import.
        in_function: whether it runs only when a function is called.
    """

    name: str
    line: int
    in_function: bool


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file, which is parsed once per test run."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path, root: Path) -> tuple[Import, ...]:
    """Every import in a file of the repository at `root`, in the order of its lines."""
    package = path.relative_to(root).parent.parts
    return tuple(_imports_below(tree_of(path), package=package, in_function=False))


def _imports_below(node: ast.AST, *, package: tuple[str, ...], in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for name in _imported_names(child, package):
            yield Import(name, child.lineno, in_function)
        deeper = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _imports_below(child, package=package, in_function=deeper)


def _imported_names(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = list(package[: len(package) - node.level + 1]) if node.level else []
        base += node.module.split(".") if node.module else []
        return [".".join([*base, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call):
        return _dynamic_import(node)
    return []


def _dynamic_import(call: ast.Call) -> list[str]:
    """The module of `importlib.import_module("...")` or `__import__("...")`, nothing for any other call."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    is_literal = call.args and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    return [call.args[0].value] if name in ("import_module", "__import__") and is_literal else []


@dataclass(frozen=True)
class Arrow:
    """`source` imports `target` at `line`; paths are relative to the repository's root."""

    source: Path
    target: Path
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def arrows(package: Path) -> list[Arrow]:
    """Every import of one file of a package by another. `package` lies in the repository's root."""
    root = package.parent
    modules = {_module_name(path.relative_to(root)): path.relative_to(root) for path in package.rglob("*.py")}
    found = []
    for source in sorted(modules.values()):
        for imported in imports_of(root / source, root):
            target = _module_of(imported.name, modules)
            if target is not None and target != source:
                found.append(Arrow(source, target, imported.line))
    # Several names of one file can be imported in one line.
    return list(dict.fromkeys(found))


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_of(name: str, modules: Mapping[str, Path]) -> Path | None:
    """The file that defines a dotted name: that of the longest prefix which is a module."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return modules.get(name)


def circles(arrows: list[Arrow], *, of_folders: bool = False) -> list[str]:
    """Describe each group of files, or of folders, that import each other directly or indirectly.

    A folder imports another if one of its own files does; a folder and the folder that holds it are two. The imports
    that make the circle follow, one line for each pair, the pairs with the fewest imports first.
    """
    inner: dict[tuple[Path, Path], list[Arrow]] = defaultdict(list)
    for arrow in arrows:
        ends = (arrow.source.parent, arrow.target.parent) if of_folders else (arrow.source, arrow.target)
        if ends[0] != ends[1]:
            inner[ends].append(arrow)
    reached = {node: _reachable(node, inner) for edge in inner for node in edge}
    groups = {frozenset(n for n in reached[node] if node in reached[n]) for node in reached if node in reached[node]}
    described = []
    for group in sorted(groups, key=lambda group: sorted(map(str, group))):
        edges = sorted((arrows for ends, arrows in inner.items() if group.issuperset(ends)), key=len)
        names = ", ".join(sorted(map(str, group)))
        described.append("\n    ".join([f"circle of {len(group)}: {names}", *map(_edge_line, edges)]))
    return described


def _edge_line(arrows: list[Arrow]) -> str:
    """The arrows from one node to another; a circle is easiest to break where there are few."""
    shown = "; ".join(map(str, arrows[:SHOWN_ARROWS]))
    return f"{shown}; and {len(arrows) - SHOWN_ARROWS} more" if len(arrows) > SHOWN_ARROWS else shown


def _reachable(start: Path, edges: Mapping[tuple[Path, Path], list[Arrow]]) -> set[Path]:
    """The nodes that can be reached by one arrow or more, including `start` only if there is a circle."""
    targets = defaultdict(set)
    for source, target in edges:
        targets[source].add(target)
    found: set[Path] = set()
    waiting = [start]
    while waiting:
        new = targets[waiting.pop()] - found
        found |= new
        waiting += new
    return found
