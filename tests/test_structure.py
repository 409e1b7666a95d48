"""Tests how the source is cut: who may import whom, and how long files and functions may be.

The tables are docs/design.md's: a module that is in none, or that looks upwards, fails here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DESIGN = ROOT / "docs" / "design.md"
MAX_FILE, MAX_FUNCTION = 500, 80  # lines

# Files and functions that may be longer, each with its reason.
LONGER: dict[str, str] = {}


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table below ``heading``, without its first two lines."""
    lines = text.split(f"{heading}\n", 1)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def quoted(cell: str) -> list[str]:
    """Return what stands in backquotes."""
    return re.findall(r"`([^`]+)`", cell)


# ---- Python --------------------------------------------------------------------------------------

# What a module may take from the package itself, whose other names lead up to the engine.
ROOT_NAMES = {"_C", "__version__"}


def modules(package: Path) -> dict[str, Path]:
    """Return the files of a package by the names of its modules, without the package's own."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """Return, for each module of a package, the modules of the package that it imports anywhere in
    its text. ``from .x import y`` is of ``x.y`` where that is a module, else of ``x``; what a
    module takes from the package itself, such as ``from . import y``, is named ``""`` where ``y``
    is neither a module nor one of ROOT_NAMES."""
    known = modules(package)
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [n.name for n in node.names if n.name.split(".")[0] == package.name]
                wanted = [n.partition(".")[2] for n in names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module.split(".") if node.module else []
                if node.level:
                    base = here[: len(here) - node.level + 1] + base
                elif base[:1] == [package.name]:
                    base = base[1:]
                else:
                    continue
                names = [alias.name for alias in node.names if base or alias.name not in ROOT_NAMES]
                full = [".".join([*base, n]) for n in names]
                wanted = [n if n in known else ".".join(base) for n in full]
            else:
                continue
            found[name].update(n for n in wanted if n in ("", *known) and n != name)
    return found


def floors(text: str) -> dict[str, int]:
    """Return the floor of each module or package of design.md, counted from the ground."""
    found: dict[str, int] = {}
    for floor, cells in enumerate(rows(text, "### Inside the package")):
        for name in quoted(cells[1]):
            assert name not in found, f"{name} is in two rows"
            found[name.rstrip("/")] = floor
    return found


def upward(graph: dict[str, set[str]], floor_of: dict[str, int]) -> list[str]:
    """Return the imports that go to a higher floor."""
    return [
        f"{name} ({floor_of[name.split('.')[0]]}) imports {other} ({floor_of[other.split('.')[0]]})"
        for name, others in graph.items()
        for other in sorted(others - {""})
        if floor_of[name.split(".")[0]] < floor_of[other.split(".")[0]]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, the first one again at the end; [] if none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := search(name, []))), [])


class TestImports:
    def test_nothing_looks_upwards(self):
        floor_of, graph = floors(DESIGN.read_text(encoding="utf-8")), imports(ROOT / "specextend")
        tops = {name.split(".")[0] for name in graph}
        assert tops - set(floor_of) == set(), "modules that are in no row"
        assert set(floor_of) - tops == set(), "rows with modules that are not there"
        assert upward(graph, floor_of) == []

    def test_nothing_comes_from_the_package_itself(self):
        graph = imports(ROOT / "specextend")
        assert [name for name, others in graph.items() if "" in others] == []

    def test_no_circle(self):
        assert circle(imports(ROOT / "specextend")) == []

    def test_both_are_found(self, tmp_path):
        """Also where an import stands in a function, or serves types alone."""
        package = tmp_path / "house"
        (package / "attic").mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "cellar.py").write_text("def f():\n    from .attic import box\n")
        (package / "hall.py").write_text("from . import cellar\nfrom .attic.box import lid\n")
        (package / "attic" / "__init__.py").write_text(
            "import house.hall, xml.attic\nfrom .. import _C, roof\nfrom house.attic import box\n"
        )
        (package / "attic" / "box.py").write_text(
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..hall import x\n"
        )
        graph = imports(package)
        assert graph["cellar"] == {"attic.box"} and graph["hall"] == {"cellar", "attic.box"}
        assert graph["attic"] == {"", "attic.box", "hall"} and graph["attic.box"] == {"hall"}
        assert circle(graph) == ["attic.box", "hall", "attic.box"]
        assert upward(graph, {"cellar": 0, "hall": 1, "attic": 2}) == [
            "cellar (0) imports attic.box (2)", "hall (1) imports attic.box (2)",
        ]  # fmt: skip
        table = "### Inside the package\n\n| a | b |\n|---|---|\n| x | `cellar`, `attic/` |\n"
        assert floors(table) == {"cellar": 0, "attic": 0}


# ---- C++ and CUDA --------------------------------------------------------------------------------

SUFFIXES = {".h", ".cpp", ".cuh", ".cu"}
CONTAINERS = {
    "array", "deque", "functional", "list", "map", "memory", "optional", "set", "string", "tuple",
    "unordered_map", "unordered_set", "vector",
}  # fmt: skip


def sources(folder: Path) -> list[Path]:
    """Return the C++ and CUDA files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)


def included(path: Path, base: Path) -> tuple[set[Path], set[str]]:
    """Return the files of ours that a file includes, and the names of all others."""
    ours, others = set(), set()
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.M):
        found = [f for f in (path.parent / name, base / name) if f.is_file()]
        if found:
            ours.add(found[0].resolve())
        else:
            others.add(name)
    return ours, others


def closure(path: Path, base: Path) -> set[str]:
    """Return the names of all that a file includes through files of ours and that is not ours."""
    seen, names, left = set(), set(), [path.resolve()]
    while left:
        file = left.pop()
        if file not in seen:
            seen.add(file)
            ours, others = included(file, base)
            names |= others
            left += ours
    return names


def folder_of(path: Path, base: Path, folders: list[str]) -> str:
    """Return the row of design.md's table that a file belongs to: the longest that fits."""
    name = f"{base.name}/{path.resolve().relative_to(base.resolve()).as_posix()}"
    return max((f for f in folders if name.startswith(f)), key=len)


def wrong_includes(base: Path, table: dict[str, list[str]]) -> list[str]:
    """Return what goes against the table: folders of ours that a file may not include, torch or
    containers of the standard library behind what may have none.

    Args:
        table: by folder, what stands in the column "may include": folders and files of ours, and
            "torch" and "std" for what is not.
    """
    wrong = []
    for path in sources(base):
        here = folder_of(path, base, list(table))
        allowed = [here, *table[here]]
        name = path.relative_to(base).as_posix()
        for other in sorted(included(path, base)[0]):
            there = f"{base.name}/{other.relative_to(base.resolve()).as_posix()}"
            home = folder_of(other, base, list(table))
            if home not in allowed and there not in allowed:
                wrong.append(f"{name} includes {there}")
        behind = closure(path, base)
        if "torch" not in allowed and (found := [n for n in behind if n.startswith("torch/")]):
            wrong.append(f"{name} includes {min(found)}")
        if "std" not in allowed and (found := sorted(behind & CONTAINERS)):
            wrong.append(f"{name} includes <{found[0]}>")
    return wrong


class TestIncludes:
    def test_along_the_table(self):
        table = {
            quoted(cells[0])[0]: quoted(cells[2])
            for cells in rows(DESIGN.read_text(encoding="utf-8"), "## Layers")
            if "csrc/" in cells[0]
        }
        assert wrong_includes(ROOT / "csrc", table) == []

    def test_wrong_ones_are_found(self, tmp_path):
        base = tmp_path / "csrc"
        for folder in ("kernels", "ops"):
            (base / folder).mkdir(parents=True)
        (base / "shape.h").write_text("#include <vector>\n")
        (base / "kernels" / "k.cuh").write_text('#include "../shape.h"\n#include "ops/o.h"\n')
        (base / "ops" / "o.h").write_text("#include <torch/x.h>\n")
        table = {
            "csrc/": ["std"], "csrc/kernels/": ["csrc/"], "csrc/ops/": ["csrc/", "torch", "std"],
        }  # fmt: skip
        assert wrong_includes(base, table) == [
            "kernels/k.cuh includes csrc/ops/o.h",
            "kernels/k.cuh includes torch/x.h",
            "kernels/k.cuh includes <vector>",
        ]


# ---- lengths -------------------------------------------------------------------------------------


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """Yield name and lines of every function, its docstring not counted."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None:
                lines -= first.end_lineno - first.lineno + 1
            yield node.name, lines


def without_comments(text: str) -> str:
    """Blank out comments, directives, strings and characters of C++, keeping lines."""
    pattern = r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"'
    pattern += r"|(?<![\da-fA-F])'(?:\\.|[^'\\\n])*'"  # in 65'536 a quote is no character's
    pattern += r"|^[ \t]*#(?:\\\n|[^\n])*"
    return re.sub(pattern, lambda m: "\n" * m[0].count("\n"), text, flags=re.S | re.M)


def without_values(text: str) -> str:
    """Blank out lists of values, ``x{1}``, ``= {}`` and ``f({y})``, as clang-format writes them."""
    before = None
    while text != before:
        before = text
        text = re.sub(
            r"([\w>({,]|[=(,]\s+)\{([^{};]*)\}", lambda m: m[1] + "\n" * m[2].count("\n"), text
        )
    return text


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """Yield name and lines of every function of C++, what is in a function belonging to it.

    A block is a function's if what stands before its brace ends a list of parameters and does not
    begin with a word that opens a scope.
    """
    text = without_values(without_comments(text))
    depth, inside, begin, name = 0, None, 0, ""
    statement = 0  # where the text that belongs to the next brace begins
    for match in re.finditer(r"[{};]", text):
        at, sign = match.start(), match[0]
        if sign == "{":
            head = text[statement:at].strip()
            head = re.sub(r"^(public|private|protected)\s*:", "", head).strip()
            scope = re.match(
                r"(extern\s*$|namespace|struct|class|union|enum)\b", _untemplated(head)
            )
            if inside is None and not scope and re.search(r"\)([\w\s:<>,&*()\[\]]|->)*$", head):
                inside, begin = depth, text.count("\n", 0, at - len(text[statement:at].lstrip()))
                names = re.findall(r"(operator\W+?|[~\w]+)\s*\(", head)
                names = [n for n in names if n[:2] != "__"]
                name = names[0] if names else "?"
            depth += 1
        elif sign == "}":
            depth -= 1
            if inside == depth:
                yield name, text.count("\n", 0, at) - begin + 1
                inside = None
        statement = at + 1
    assert depth == 0, f"{text.count('{')} braces open, {text.count('}')} close"


def _untemplated(head: str) -> str:
    """Drop the lists of template parameters at the beginning of a declaration."""
    while match := re.match(r"template\s*<", head):
        depth, end = 1, match.end()
        while depth and end < len(head):
            depth += {"<": 1, ">": -1}.get(head[end], 0)
            end += 1
        head = head[end:].strip()
    return head


def too_long(root: Path) -> dict[str, int]:
    """Return the files of ``specextend/`` and ``csrc/`` and their functions that are too long."""
    found = {}
    scripts = [path for folder in ("specextend", "csrc") for path in (root / folder).rglob("*.py")]
    for path in [*sorted(scripts), *sources(root / "csrc")]:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        if (lines := len(text.splitlines())) > MAX_FILE:
            found[name] = lines
        functions = python_functions if path.suffix == ".py" else cpp_functions
        for function, lines in functions(text):
            if lines > MAX_FUNCTION:
                found[f"{name}: {function}"] = lines
    return found


class TestLengths:
    def test_files_and_functions(self):
        found = too_long(ROOT)
        assert {name: n for name, n in found.items() if name not in LONGER} == {}
        assert set(LONGER) - set(found) == set(), "exceptions that nothing needs any more"

    def test_long_ones_are_found(self, tmp_path):
        body = "    x += 1\n" * 80
        (tmp_path / "specextend").mkdir()
        (tmp_path / "csrc").mkdir()
        (tmp_path / "specextend" / "a.py").write_text(
            f'def short(x):\n    """\n{body}    """\n    return x\n\n\ndef long(x):\n{body}'
        )
        (tmp_path / "csrc" / "a.cpp").write_text("int x;\n" * 501)
        (tmp_path / "csrc" / "write.py").write_text(f"class A:\n  def long(x):\n{body}")
        body = "    ++x;\n" * 80
        (tmp_path / "csrc" / "b.cuh").write_text(
            "namespace a {\nstruct S {\n  int x = 0;  // {\n"
            f"  S(int y) : x(y) {{\n{body}  }}\n"
            "  int f() const { return x; }\n};\n"
            "template <typename T, int N = (1 > 0)>\n__global__ void __launch_bounds__(N)\n"
            f"    kernel(T t) {{\n  auto g = [&](int x) {{\n{body}  }};\n}}\n"
            f"void short_one(int x) {{\n{body[:-10]}}}\n}}  // namespace a\n"
        )
        assert too_long(tmp_path) == {
            "specextend/a.py: long": 81, "csrc/write.py: long": 81, "csrc/a.cpp": 501,
            "csrc/b.cuh: S": 82, "csrc/b.cuh: kernel": 86,
        }  # fmt: skip

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("int f(int x) {\n  if (x) {\n  }\n}\n", [("f", 4)]),
            ("int g() { return 1; }\n", [("g", 1)]),
            ("#if X\nvoid h(int a,\n       int b) {\n}\n#endif\n", [("h", 3)]),
            ("struct S {\n  void m() {\n  }\n};\n", [("m", 2)]),
            ("auto f(int x) -> int {\n  if (x) {\n  }\n}\n", [("f", 4)]),
            ('extern "C" int f(int x) {\n  if (x) {\n  }\n}\n', [("f", 4)]),
            ('int a[] = {1, 2};\nenum E { A };\nextern "C" {\nint f() {\n}\n}\n', [("f", 2)]),
            ("S::S(int y) : x{y}, z{{1}, {2}} {\n  g();\n}\n", [("S", 3)]),
            ("auto f(V x = {}) -> int {\n  return 1'000 + sum({1, 2});\n}\n", [("f", 3)]),
            ("bool operator<(A a) const {\n}\n", [("operator<", 2)]),
            ('void f() {\n  s = R"(\n{ ")";\n}\nvoid g() {\n}\n', [("f", 4), ("g", 2)]),
        ],
    )
    def test_functions_of_cpp(self, text, expected):
        assert list(cpp_functions(text)) == expected

    def test_braces_that_cannot_be_read(self):
        """Branches of the preprocessor that open a brace each would hide what follows them."""
        text = "#if X\nvoid f() {\n#else\nvoid f(int x) {\n#endif\n}\n"
        with pytest.raises(AssertionError, match="2 braces open, 1 close"):
            list(cpp_functions(text))


# ---- documentation of the source -----------------------------------------------------------------


def undocumented(package: Path) -> list[str]:
    """Return the public modules, classes, functions and methods of a package without a docstring.

    Methods of a class that has a base may do without: they may take the place of the base's.
    """
    missing = []

    def look(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                missing.append(f"{prefix}{node.name}")
            if isinstance(node, ast.ClassDef) and not node.bases:
                look(node.body, f"{prefix}{node.name}.")

    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if ast.get_docstring(tree) is None:
            missing.append(name)
        look(tree.body, f"{name}: ")
    return missing


def test_what_is_public_is_documented():
    assert undocumented(ROOT / "specextend") == []


def test_what_is_not_documented_is_found(tmp_path):
    (tmp_path / "a.py").write_text('"""A."""\ndef f():\n    pass\ndef _g():\n    pass\n')
    method = '    """."""\n    def m(self):\n        pass\n    def _n(self):\n        pass\n'
    (tmp_path / "b.py").write_text(f"class C:\n    pass\nclass D:\n{method}class E(D):\n{method}")
    assert undocumented(tmp_path) == ["a.py: f", "b.py", "b.py: C", "b.py: D.m"]
