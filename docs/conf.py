"""Settings of Sphinx: ``sphinx-build -W -b html docs BUILD`` makes the site."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pulsar_api import __version__  # noqa: E402

project = "pulsar-api"
author = "the authors of pulsar-api"
release = version = __version__
extensions = ["docs.directives"]
html_theme = "furo"
html_title = f"pulsar-api {__version__}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
exclude_patterns = ["_build"]
nitpicky = True
highlight_language = "text"
pygments_style = "friendly"
pygments_dark_style = "monokai"
