"""A headless Chromium, driven by Selenium, that can connect to loopback addresses only."""

from collections.abc import Iterator
from contextlib import contextmanager

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --window-size=1440,900"
).split()


@contextmanager
def chromium(*switches: str) -> Iterator[Chrome]:
    """Yield a browser with a new profile that accepts the certificate of the tests."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    options.accept_insecure_certs = True
    for switch in (*SWITCHES, *switches):
        options.add_argument(switch)
    driver = Chrome(options, Service("/usr/bin/chromedriver"))
    try:
        driver.set_page_load_timeout(60)
        yield driver
    finally:
        driver.quit()
