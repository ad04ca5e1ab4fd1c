"""What may import what, how long things may be, and what must not appear, read from the source with ast."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "colossal_llama2"
SCRIPTS = sorted(ROOT.glob("*.py"))
SOURCES = SCRIPTS + sorted(PACKAGE.rglob("*.py"))
LOWER_FOLDERS = ("storage", "encoding", "corpus", "charts", "dataset", "tokenizer", "model", "inference", "engine")
MAX_SCRIPT_LINES = 40
MAX_FUNCTION_LINES = 60

EVERY_SOURCE = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Every import in a file: (full dotted name, line, whether it is inside a function)."""
    yield from _imports_below(tree_of(path), package=path.relative_to(ROOT).parent.parts, in_function=False)


def _imports_below(node: ast.AST, *, package: tuple, in_function: bool) -> Iterator[tuple[str, int, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno, in_function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = list(package[: len(package) - child.level + 1]) if child.level else []
            base += child.module.split(".") if child.module else []
            yield from ((".".join([*base, alias.name]), child.lineno, in_function) for alias in child.names)
        elif isinstance(child, ast.Call) and _dynamic_import(child):
            yield _dynamic_import(child), child.lineno, in_function
        deeper = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _imports_below(child, package=package, in_function=deeper)


def _dynamic_import(call: ast.Call) -> str:
    """The module of `importlib.import_module("...")` or `__import__("...")`, "" for any other call."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    literal = call.args and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    return call.args[0].value if name in ("import_module", "__import__") and literal else ""


def is_or_is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offences(path: Path, package: str, *, only_top_level: bool = False) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for name, line, in_function in imports(path)
        if is_or_is_in(name, package) and not (only_top_level and in_function)
    ]


@EVERY_SOURCE
def test_colossalai_is_imported_by_the_engine_alone_and_late(path):
    inside = PACKAGE / "engine" in path.parents
    assert not offences(path, "colossalai", only_top_level=inside)


@EVERY_SOURCE
def test_flash_attn_is_imported_late(path):
    assert not offences(path, "flash_attn", only_top_level=True)


@pytest.mark.parametrize("folder", LOWER_FOLDERS)
def test_the_lower_folders_never_import_train(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not offences(path, "colossal_llama2.train")


@EVERY_SOURCE
def test_nothing_unpickles_or_runs_remote_code(path):
    for package in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
        assert not offences(path, package)
    assert not offences(path, "torch.load")
    for node in ast.walk(tree_of(path)):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), where
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, where
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), where


@EVERY_SOURCE
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_flag_table(path, node):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def is_flag_table(path: Path, function: ast.FunctionDef) -> bool:
    """cli/*_flags.py hold tables of flags in the form of functions: one `group.add_argument(...)` after the other."""
    plain = (ast.Expr, ast.Assign, ast.Return)
    return path.parent == PACKAGE / "cli" and all(isinstance(statement, plain) for statement in function.body)


@EVERY_SOURCE
def test_every_module_says_what_it_is_for(path):
    text = path.read_text(encoding="utf-8")
    # An __init__.py may be empty: it only marks a package.
    assert ast.get_docstring(ast.parse(text)) or (path.name == "__init__.py" and not text.strip())


@EVERY_SOURCE
def test_public_functions_and_classes_have_docstrings(path):
    if path in SCRIPTS:
        return
    for node in tree_of(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.relative_to(ROOT)}: {node.name}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_root_scripts_stay_thin(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_SCRIPT_LINES
    assert f"python {path.name}" in ast.get_docstring(tree_of(path)) or f" {path.name} " in ast.get_docstring(
        tree_of(path)
    )
    top_level = [name for name, _, in_function in imports(path) if not in_function]
    assert all(is_or_is_in(name, "colossal_llama2") for name in top_level)


def test_the_import_reader_sees_what_it_must(tmp_path, monkeypatch):
    """A guard for the guard: every way of importing is found, with its full name and depth."""
    monkeypatch.setattr("tests.test_import_rules.ROOT", tmp_path)
    folder = tmp_path / "colossal_llama2" / "dataset"
    folder.mkdir(parents=True)
    source = folder / "sample.py"
    source.write_text(
        "import colossalai.booster as b\n"
        "from ..train import run\n"
        "from . import loader\n"
        "if True:\n    import pickle\n"
        "def f():\n    from flash_attn import g\n    importlib.import_module('torch.load')\n"
    )
    assert list(imports(source)) == [
        ("colossalai.booster", 1, False),
        ("colossal_llama2.train.run", 2, False),
        ("colossal_llama2.dataset.loader", 3, False),
        ("pickle", 5, False),
        ("flash_attn.g", 7, True),
        ("torch.load", 8, True),
    ]
