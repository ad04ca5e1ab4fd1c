"""What may import what, how long things may be, and what must not appear, read from the source with ast.

Each rule is one test, whose failure lists every place that breaks it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.import_graph import Arrow, Import, arrows, circles, imports_of, tree_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "colossal_llama2"
# The only folder that may import ColossalAI.
ENGINE = PACKAGE / "engine"
# Defines flags in functions of any length that hold nothing but `group.add_argument(...)`.
FLAG_TABLES = tuple((PACKAGE / "cli").glob("*_flags.py"))
# May not import TRAIN.
LOWER_FOLDERS = ("storage", "encoding", "corpus", "charts", "dataset", "tokenizer", "model", "inference", "engine")
TRAIN = "colossal_llama2.train"
UNPICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.load")
MAX_SCRIPT_LINES = 40
MAX_FUNCTION_LINES = 60

SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*SCRIPTS, *MODULES]


def is_or_is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offences(path: Path, package: str, *, only_top_level: bool = False) -> list[str]:
    return [
        f"{place(path, found.line)} imports {found.name}"
        for found in imports_of(path, ROOT)
        if is_or_is_in(found.name, package) and not (only_top_level and found.in_function)
    ]


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_the_folders_of_the_rules_exist():
    """After a move, a rule about a folder that no longer exists would check nothing."""
    folders = [ENGINE, *(PACKAGE / name for name in LOWER_FOLDERS), ROOT.joinpath(*TRAIN.split("."))]
    assert [path for path in folders if not path.is_dir()] == []
    assert [path for path in FLAG_TABLES if not path.is_file()] == []


def test_colossalai_is_imported_only_by_the_engine_and_late():
    found = [line for path in SOURCES for line in offences(path, "colossalai", only_top_level=ENGINE in path.parents)]
    assert found == []


def test_flash_attn_is_imported_late():
    assert [line for path in SOURCES for line in offences(path, "flash_attn", only_top_level=True)] == []


def test_the_lower_folders_never_import_train():
    paths = [path for name in LOWER_FOLDERS for path in sorted((PACKAGE / name).rglob("*.py"))]
    assert [line for path in paths for line in offences(path, TRAIN)] == []


def test_no_file_imports_a_file_that_imports_it():
    found = circles(arrows(PACKAGE))
    assert not found, "\n".join(found)


def test_no_folder_imports_a_folder_that_imports_it():
    found = circles(arrows(PACKAGE), of_folders=True)
    assert not found, "\n".join(found)


def test_nothing_unpickles_or_runs_remote_code():
    found = [line for path in SOURCES for package in UNPICKLERS for line in offences(path, package)]
    found += [line for path in SOURCES for line in _code_from_elsewhere(path)]
    assert found == []


def _code_from_elsewhere(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) == ("torch", "load"):
                yield f"{place(path, node.lineno)} torch.load"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"{place(path, node.value.lineno)} trust_remote_code"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            yield f"{place(path, node.lineno)} {node.func.id}"


def test_functions_fit_on_a_screen():
    found = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_flag_table(path, node):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found.append(f"{place(path, node.lineno)} {node.name} has {lines} lines")
    assert found == []


def is_flag_table(path: Path, function: ast.FunctionDef) -> bool:
    """Whether a function is a table of flags: `group.add_argument(...)` one after the other."""
    plain = (ast.Expr, ast.Assign, ast.Return)
    return path in FLAG_TABLES and all(isinstance(statement, plain) for statement in function.body)


def test_every_module_has_a_docstring():
    def is_empty_package(path: Path) -> bool:
        return path.name == "__init__.py" and not tree_of(path).body

    found = [path for path in SOURCES if not ast.get_docstring(tree_of(path)) and not is_empty_package(path)]
    assert [str(path.relative_to(ROOT)) for path in found] == []


def test_public_functions_and_classes_have_docstrings():
    found = []
    for path in MODULES:
        for node in tree_of(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    found.append(f"{place(path, node.lineno)} {node.name}")
    assert found == []


def test_root_scripts_stay_thin():
    found = []
    for path in SCRIPTS:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_SCRIPT_LINES:
            found.append(f"{path.name} has {lines} lines")
        docstring = ast.get_docstring(tree_of(path))
        if f"python {path.name}" not in docstring and f" {path.name} " not in docstring:
            found.append(f"{path.name} does not show its command")
        for imported in imports_of(path, ROOT):
            if not imported.in_function and not is_or_is_in(imported.name, "colossal_llama2"):
                found.append(f"{place(path, imported.line)} imports {imported.name} at the top")
    assert found == []


def write_package(folder: Path, files: dict[str, str]) -> Path:
    """A package of these sources; returns its folder."""
    for name, source in files.items():
        path = folder / "colossal_llama2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder / "colossal_llama2"


def test_the_import_reader_finds_every_kind_of_import(tmp_path):
    """Tests the tests: every way of importing is found, with its full name and depth."""
    source = (
        "import colossalai.booster as b\n"
        "from ..train import run\n"
        "from . import loader\n"
        "if True:\n    import pickle\n"
        "def f():\n    from flash_attn import g\n    importlib.import_module('torch.load')\n"
    )
    package = write_package(tmp_path, {"dataset/sample.py": source})
    assert imports_of(package / "dataset" / "sample.py", tmp_path) == (
        Import("colossalai.booster", 1, False),
        Import("colossal_llama2.train.run", 2, False),
        Import("colossal_llama2.dataset.loader", 3, False),
        Import("pickle", 5, False),
        Import("flash_attn.g", 7, True),
        Import("torch.load", 8, True),
    )


def test_circles_of_files_and_folders_are_named(tmp_path):
    files = {
        "top.py": "from .low import a\n",
        "low/a.py": "if TYPE_CHECKING:\n    from .b import B\n",
        "low/b.py": "def f():\n    from . import c\n",
        "low/c.py": "from .a import A\n",
        "low/deep/d.py": "from ..e import E\n",
        "low/e.py": "import json\n",
        "low/f.py": "from colossal_llama2.low.deep.d import D\n",
        "low/__init__.py": "",
        "up.py": "import colossal_llama2.low.a\n",
    }
    found = arrows(write_package(tmp_path, files))
    assert Arrow(Path("colossal_llama2/low/b.py"), Path("colossal_llama2/low/c.py"), 2) in found
    (of_files,) = circles(found)
    first, *lines = of_files.splitlines()
    names = [f"colossal_llama2/low/{name}.py" for name in "abc"]
    assert first == f"circle of 3: {', '.join(names)}"
    assert lines[0].strip() == f"{names[0]}:2 imports {names[1]}" and len(lines) == 3
    # No file in either folder imports one that imports it, but the folders do.
    (of_folders,) = circles(found, of_folders=True)
    assert of_folders.splitlines()[0] == "circle of 2: colossal_llama2/low, colossal_llama2/low/deep"
    assert circles([arrow for arrow in found if "deep" not in str(arrow)], of_folders=True) == []
