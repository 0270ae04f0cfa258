"""Tests of the assets that a page may load."""

import gzip
from pathlib import Path

from pulsar_api.web.pages import Asset


def test_only_scripts_styles_and_pictures_are_assets(tmp_path: Path) -> None:
    """Each has its media type. Files in subfolders are left out."""
    names = ("app.js", "a.css", "b.svg", "index.html", "x.py", "js", "c.js.map")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "d.js").write_bytes(b"d")
    found = Asset.all_in(tmp_path)
    assert {name: (asset.kind, asset.data) for name, asset in found.items()} == {
        "app.js": ("text/javascript; charset=utf-8", b"app.js"),
        "a.css": ("text/css; charset=utf-8", b"a.css"),
        "b.svg": ("image/svg+xml", b"b.svg"),
    }


def test_an_etag_depends_on_the_content(tmp_path: Path) -> None:
    """Equal contents have equal tags."""
    for name, text in (("a.js", "one"), ("b.js", "one"), ("c.js", "two")):
        (tmp_path / name).write_text(text)
    found = {name: asset.etag for name, asset in Asset.all_in(tmp_path).items()}
    assert found["a.js"] == found["b.js"] != found["c.js"]


def test_a_compressed_asset_has_another_etag(tmp_path: Path) -> None:
    """A cache must not confuse it with the original."""
    (tmp_path / "a.js").write_bytes(b"one " * 100)
    asset = Asset.all_in(tmp_path)["a.js"]
    packed = asset.packed()
    assert gzip.decompress(packed.data) == asset.data
    assert (packed.kind, packed.etag != asset.etag) == (asset.kind, True)
    assert len(packed.data) < 50
