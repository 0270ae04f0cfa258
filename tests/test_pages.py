"""Which files of a folder a page may load, and as what."""

import gzip
from pathlib import Path

from pulsar_api.web.pages import Asset


def test_scripts_styles_and_pictures_are_read_and_nothing_else(tmp_path: Path) -> None:
    """Each with its type; what is in a folder below is not for the page."""
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


def test_an_etag_is_of_the_content(tmp_path: Path) -> None:
    """Another content has another one, the same has the same."""
    for name, text in (("a.js", "one"), ("b.js", "one"), ("c.js", "two")):
        (tmp_path / name).write_text(text)
    found = {name: asset.etag for name, asset in Asset.all_in(tmp_path).items()}
    assert found["a.js"] == found["b.js"] != found["c.js"]


def test_what_is_packed_is_the_same_by_another_name(tmp_path: Path) -> None:
    """A cache must not take one for the other."""
    (tmp_path / "a.js").write_bytes(b"one " * 100)
    asset = Asset.all_in(tmp_path)["a.js"]
    packed = asset.packed()
    assert gzip.decompress(packed.data) == asset.data
    assert (packed.kind, packed.etag != asset.etag) == (asset.kind, True)
    assert len(packed.data) < 50
