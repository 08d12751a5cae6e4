"""Sphinx: the pages of this folder as a site, ``make docs``. Nothing of fmecompile is imported."""

project = "fmecompile"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fmecompile"
html_show_copyright = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_heading_anchors = 3
