"""Nothing in the package unpickles or evaluates what it reads: a file or a message is data, never a program."""

import ast
from pathlib import Path

import pytest

import vista_ext

FILES = sorted(Path(vista_ext.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# What loads pickles, or runs text, under names that are easily written by habit.
CALLS = {"torch.load", "torch.jit.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call) and dotted(node.func) in CALLS:
            found.append(dotted(node.func))
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("require", "import_module"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            found += [name for name in names if isinstance(name, str) and name.split(".")[0] in MODULES]
    return found


@pytest.mark.parametrize("source", ["import pickle", "from joblib import load", "torch.load(f)", "require('dill')"])
def test_it_would_be_found(source):
    assert offences(source)


def test_no_pickle():
    assert len(FILES) > 100
    assert {str(file): found for file in FILES if (found := offences(file.read_text()))} == {}
