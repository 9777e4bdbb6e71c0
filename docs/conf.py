"""Sphinx configuration."""

project = "model-surgery"
author = "the model-surgery authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "code"  # of docstrings: `surgery.fit`
html_theme = "furo"
html_title = "model-surgery"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_default_options = {"member-order": "bysource"}
