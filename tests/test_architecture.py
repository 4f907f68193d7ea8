"""Imports point one way, so that each file can be read, and replaced, on its own."""

import ast
import sys
from pathlib import Path

import pytest

import sb3_qsm

ROOT = Path(sb3_qsm.__file__).parent
# What each module may import of the package
ALLOWED = {
    "schedules": set(),
    "losses": set(),
    "networks": set(),
    "temperature": set(),
    "samplers": set(),
    "normalization": set(),
    "representation": {"networks"},
    "policies": {"schedules", "samplers", "networks", "representation"},
    "buffers": set(),
    "qsm": {"buffers", "losses", "normalization", "policies", "representation", "temperature"},
    "published": {"policies", "qsm", "samplers"},
    "export": {"policies", "qsm"},
    "pretrained": {"export", "qsm"},
    "__init__": {"policies", "published", "qsm"},
    "zoo": {"", "resume", "schedules"},
    "cli": {"", "export", "pretrained", "zoo"},
    "__main__": {"cli"},
    # Knows SB3, and nothing of QSM
    "resume/_storage": set(),
    "resume/_state": {"resume._storage"},
    "resume/callback": {"resume._state", "resume._storage"},
    "resume/__init__": {"resume._storage", "resume.callback"},
}


def imports(module):
    """Full names of the modules that a file imports, wherever in it they stand."""
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield node.module


def test_every_module_is_listed():
    assert {path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py")} == set(ALLOWED)


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_point_one_way(module):
    own = {name.partition(".")[2] for name in imports(module) if name.partition(".")[0] == "sb3_qsm"}
    assert own <= ALLOWED[module]


@pytest.mark.parametrize("module", ["schedules", "samplers", "losses", "networks", "normalization", "temperature"])
def test_equations_need_torch_only(module):
    foreign = {name.partition(".")[0] for name in imports(module)} - set(sys.stdlib_module_names) - {"sb3_qsm"}
    assert foreign == {"torch"}


@pytest.mark.parametrize("module", ["resume/_storage", "resume/_state", "resume/callback", "export"])
def test_nothing_that_is_handed_over_is_pickled(module):
    assert not set(imports(module)) & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert "torch.load" not in (source := (ROOT / f"{module}.py").read_text()) and "th.load" not in source


def test_public_names():
    assert set(sb3_qsm.__all__) == {
        "QSM",
        "PublishedQSM",
        "MlpPolicy",
        "CnnPolicy",
        "MultiInputPolicy",
        "DiffusionPolicy",
        "__version__",
    }
    assert all(hasattr(sb3_qsm, name) for name in sb3_qsm.__all__)
