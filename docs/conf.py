"""Sphinx configuration: ``make doc`` builds docs/_build/html."""

from pathlib import Path

project = "sb3_qsm"
author = "sb3_qsm contributors"
copyright = "2026, sb3_qsm contributors"
release = version = (Path(__file__).parent.parent / "sb3_qsm" / "version.txt").read_text().strip()

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_copybutton"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"sb3_qsm {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]


def escape_bars(app, what, name, obj, options, lines):
    """Docstrings write absolute values as |x|, which reStructuredText would take for a substitution."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", escape_bars)
