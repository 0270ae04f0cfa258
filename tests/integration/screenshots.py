"""Take pictures of each view: ``python -m tests.integration.screenshots FOLDER``."""

import argparse
import tempfile
from pathlib import Path

from tests.integration.stage import VIEWS, stage

PICTURES = "list running failed huge run review kill sign-in".split()
WIDTHS = (390, 1440)


def main() -> None:
    """Take a picture of each view for a phone and a desktop, light and dark."""
    parser = argparse.ArgumentParser(
        "python -m tests.integration.screenshots", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="where NAME-WIDTH-light.png go")
    parser.add_argument("names", nargs="*", default=PICTURES, help="which [the main ones]")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, stage(Path(folder)) as shown:
        for width in WIDTHS:
            for name in given.names:
                shown.look(width, still=True)
                VIEWS[name](shown)
                for dark in (False, True):
                    shown.look(width, dark=dark, still=True)
                    file = f"{name}-{width}-{'dark' if dark else 'light'}.png"
                    shown.driver.save_screenshot(str(given.folder / file))


if __name__ == "__main__":
    main()
