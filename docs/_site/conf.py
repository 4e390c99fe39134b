"""Configure the site (`make docs`): Markdown and notebooks of the repository, docstrings, and flags of commands.

The source folder is the repository's root, so that links between docs, examples and CONTRIBUTING.md work as they do in
any viewer of Markdown. Nothing is loaded from the network, neither here nor by a page.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Notebooks and autodoc run on the CPU alike on every machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[2] / "build/docs/programs"))

from mambahome_jax import __version__

project, author, copyright = "Mamba-HoME in JAX", "the authors of mambahome-jax", "the authors of mambahome-jax"
release = version = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "flags", "docstrings"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "examples/*.ipynb",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "kernels/README.md",
]
exclude_patterns = ["docs/_site", "docs/**/results", "[!CSdek]*", "demo", "**/__pycache__"]

# Anchors of headings as GitHub makes them.
myst_heading_anchors = 4
highlight_language, smartquotes = "default", False

nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
# XLA says there that a machine is slow.
nb_output_stderr, nb_merge_streams = "remove", True

autodoc_default_options = {"members": True, "special-members": "__call__", "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
add_module_names = False
napoleon_numpy_docstring = False

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["root"]
html_show_sphinx = html_show_sourcelink = html_copy_source = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": [],
    "use_edit_page_button": False,
    "show_prev_next": False,
}
html_sidebars = {"docs/index": []}
