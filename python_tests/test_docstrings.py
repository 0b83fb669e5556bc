"""Whatever is public says what it is, in its own words."""

import ast
from pathlib import Path

import pytest

import vista_ext

ROOT = Path(vista_ext.__file__).parent
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def undocumented(node, where):
    """The public definitions below a node without a docstring. Dunders say what they do by their names."""
    for child in node.body:
        if isinstance(child, DEFINITIONS) and not child.name.startswith("_"):
            if ast.get_docstring(child) is None:
                yield f"{where}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{where}.{child.name}")


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_public_names_are_documented(file):
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), "the module says nothing"
    assert not list(undocumented(tree, file.stem))
