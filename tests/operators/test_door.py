"""``from operators import ...``: what the package's page says there is, is there."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import operators
from operators.core import errors
from operators.core.header import OperatorHeader

SOURCE = ast.parse(Path(operators.__file__).read_text(encoding="utf-8"))
NAMES = [name for name in operators.__all__ if name != "__version__"]


def _typed():
    """Name -> module, of the imports for type checkers."""
    [block] = [node for node in SOURCE.body if isinstance(node, ast.If)]
    return {alias.name: node.module for node in block.body for alias in node.names}


def example():
    """The code in the docstring of the package."""
    lines = inspect.getdoc(operators).split("\n\nA model\n")[0].splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    ") or not line)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_its_module_has_and_says_what_it_is(name):
    value = getattr(operators, name)
    assert value is getattr(sys.modules[operators._MODULE_OF[name]], name)
    assert inspect.getdoc(value)
    # Not the docstring of a dataclass that has none: the signature.
    assert not (inspect.getdoc(value) or "").startswith(f"{name}(")


def test_type_checkers_see_the_same_names_in_the_same_modules():
    assert _typed() == operators._MODULE_OF
    assert sorted(NAMES) == sorted(operators._MODULE_OF)
    assert len(set(operators.__all__)) == len(operators.__all__)


def test_the_page_names_everything_but_each_error():
    named = set(re.findall(r":(?:func|class):`(\w+)`", operators.__doc__))
    assert named == {name for name in NAMES if not name.endswith("Error")} | {"OperatorError"}


def test_every_error_of_the_tree_is_there():
    tree = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert tree == {name for name in NAMES if name.endswith("Error")}


def test_dir_lists_the_names_and_another_name_is_an_attribute_error():
    assert set(operators.__all__) <= set(dir(operators))
    with pytest.raises(AttributeError, match="module 'operators' has no attribute 'Jacobian'"):
        _ = operators.Jacobian


def test_names_are_imported_when_they_are_used():
    program = (
        "import sys, operators\nbefore = 'torch' in sys.modules\noperators.Store\nstore = 'torch' in sys.modules\n"
        "from operators import Setting\nprint(before, store, 'torch' in sys.modules, operators.Setting is Setting)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False False True True\n"


def test_no_room_imports_the_door():
    graph = grimp.build_graph("operators", exclude_type_checking_imports=False, cache_dir=None)
    assert graph.find_modules_that_directly_import("operators") == set()


def test_numeric_functions_say_what_they_raise_or_return():
    for name in ("build_operator", "verify_operator", "combine", "calibrate", "read_artifact", "sketch", "steered"):
        assert "Raises" in getattr(operators, name).__doc__, name


def test_the_example_is_at_most_twelve_lines():
    assert len([line for line in example().splitlines() if line.strip()]) <= 12


@pytest.mark.model
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "operators", "exec"), found := {})
    error, text = capsys.readouterr().out.split("\n", 1)
    assert float(error) < 5e-5
    assert text.startswith("My favourite place is")
    assert isinstance(found["store"].load("golden-gate").header, OperatorHeader)
