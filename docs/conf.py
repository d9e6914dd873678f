"""How Sphinx builds the site: `sphinx-build -W docs docs/_build`.

Pages are Markdown. The pages of `reference/api` and the page of commands are written from the code before each build
(`generated.py`), so a new module, command or option is on the site without anybody's doing.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from generated import as_rst, write_api_pages, write_command_page  # noqa: E402

import fxquant  # noqa: E402

project = "fxquant"
author = "the fxquant authors"
project_copyright = "the fxquant authors, Apache-2.0"
version = release = fxquant.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"fxquant {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "ignore-module-all": True}
python_maximum_signature_line_length = 100
python_display_short_literal_types = True
# Annotations name classes by their short names, and several rooms may have a class of the same name.
suppress_warnings = ["ref.python"]


def setup(app: Sphinx) -> None:
    """Write the generated pages, and let docstrings be the plain text that they are."""
    write_api_pages(FOLDER.parent, FOLDER / "reference" / "api")
    write_command_page(FOLDER / "reference" / "commands.md")
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon, at 500
