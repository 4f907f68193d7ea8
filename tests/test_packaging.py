"""What is built from the repository."""

import configparser
from pathlib import Path

import pytest

import sb3_qsm

ROOT = Path(sb3_qsm.__file__).parents[1]


def test_conda_recipe_is_the_package():
    """Version, requirements, licence and command are those of setup.cfg, under conda's names."""
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"].replace("_", "-").replace("torch", "pytorch").split()
    wanted.append(f"python{setup['options']['python_requires']}")
    assert sorted(it.replace(" ", "") for it in recipe["requirements"]["run"]) == sorted(wanted)
    assert recipe["context"]["version"] == sb3_qsm.__version__
    assert recipe["about"]["license"] == setup["metadata"]["license"]
    assert recipe["build"]["python"]["entry_points"] == setup["options.entry_points"]["console_scripts"].strip().splitlines()
