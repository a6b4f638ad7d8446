"""The page in a real Chromium: from nothing to a download, with scripts and without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.support.carts import CartServer, FakeInterface, run_interface, until
from tests.unit.carts.conftest import FILES, start
from tests.unit.carts.test_cartd import content, entry

from statepool.carts.auth import add_token
from statepool.carts.database import Database

pytest.importorskip("selenium", reason="selenium is not installed: pip install statepool[test]")

from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

for program, package in (("chromium", "chromium"), ("chromedriver", "chromium-driver")):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian: {package})", allow_module_level=True)

POOLS = 'cache = "cache"\nsources = ["{pool}"]\n[serve]\n'


@contextmanager
def run_chromium(directory: Path, *, scripts: bool = True) -> Iterator[Chrome]:
    """A browser that saves what it downloads in this directory."""
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")  # which root cannot have
    options.add_argument("--disable-dev-shm-usage")
    options.add_argument("--window-size=1200,1000")
    options.add_argument(f"--user-data-dir={directory / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    preferences: dict[str, object] = {"download.default_directory": str(directory)}
    if not scripts:
        preferences["profile.managed_default_content_settings.javascript"] = 2
    options.add_experimental_option("prefs", preferences)
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def far() -> Iterator[FakeInterface]:
    with run_interface(FILES) as fake:
        yield fake


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, pool: Path, far: FakeInterface
) -> Iterator[CartServer]:
    archive = f'archives.far = {{ type = "interface", url = "{far.url}" }}\n'
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("server")
        yield start(stack, directory, settings=POOLS.format(pool=pool) + archive)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(downloads: Path) -> Iterator[Chrome]:
    with run_chromium(downloads) as driver:
        yield driver


@pytest.fixture
def watched(chromium: Chrome) -> Iterator[Chrome]:
    """What it asks for, and what it complains of, is looked at after the test."""
    chromium.get_log("browser")
    chromium.get_log("performance")
    yield chromium
    assert [line for line in chromium.get_log("browser") if line["level"] != "DEBUG"] == []
    messages = [json.loads(line["message"])["message"] for line in chromium.get_log("performance")]
    urls = [
        urlsplit(message["params"]["request"]["url"])
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    # Other schemes are of what the browser brings with it: a new tab is a page of its own.
    schemes = ("http", "https", "ws", "wss")
    assert {url.hostname for url in urls if url.scheme in schemes} == {"127.0.0.1"}


def text(driver: Chrome) -> str:
    return driver.find_element(By.TAG_NAME, "main").text


def once(do: Callable[[], object]) -> None:
    """Do something as soon as the page is there: it may be about to be loaded, or renewed."""

    def attempt() -> bool:
        try:
            return do() is not False
        except (NoSuchElementException, StaleElementReferenceException):
            return False

    until(attempt)


def shows(driver: Chrome, words: str) -> None:
    """Wait until the page says so."""
    once(lambda: words in text(driver))


def press(driver: Chrome, label: str) -> None:
    button = f"//button[starts-with(normalize-space(), '{label}')]"
    once(lambda: driver.find_element(By.XPATH, button).click())


def follow(driver: Chrome, name: str) -> None:
    """Click what has this id."""
    once(lambda: driver.find_element(By.ID, name).click())


def choose(driver: Chrome, name: str) -> None:
    once(lambda: driver.find_element(By.CSS_SELECTOR, f"input[value='{name}']").click())


def downloaded(directory: Path, name: str) -> dict[str, bytes]:
    """:returns: what is in a tar, once it is there: it has another name before"""
    place = directory / name
    until(place.exists)
    return content(place.read_bytes())


def test_from_nothing_to_a_download(
    server: CartServer, watched: Chrome, downloads: Path, pool: Path
) -> None:
    watched.get(server.url)
    shows(watched, "There are none. Choose states below")
    search = watched.find_element(By.NAME, "q")
    search.send_keys("debian", Keys.ENTER)
    shows(watched, "1 with")
    choose(watched, "vm1/disk/customize")
    watched.find_element(By.NAME, "uid").send_keys("mine")
    press(watched, "Put into a cart")
    shows(watched, "This cart is ready")
    follow(watched, "get-mine")
    there = (pool / "vm1/disk/customize.qcow2").read_bytes()
    found = downloaded(downloads, "mine.tar")
    assert found["mine/vm1/disk/customize.qcow2"] == there
    assert set(found) == {f"mine/vm1/disk/{name}.qcow2" for name in ("customize", "install")}
    watched.get(server.url)
    press(watched, "Delete")
    shows(watched, "There are none. Choose states below")


def test_progress_without_reloading(
    server: CartServer, watched: Chrome, far: FakeInterface
) -> None:
    far.gate.clear()
    try:
        server.post("slow", entry("data/bar.csv", "bar.csv", archive="far"))
        watched.get(f"{server.url}/page/cart/slow")
        shows(watched, "This cart is staging")
        focus = "document.getElementById('delete-slow').focus()"
        watched.execute_script(f"window.mark = 'still here'; {focus}")
        server.post("other", entry("data/bar.csv", "bar.csv", archive="far"))
        watched.switch_to.new_window("tab")
        watched.get(server.url)
        shows(watched, "Transfers under way")
    finally:
        far.gate.set()
    shows(watched, "ready")
    watched.close()
    watched.switch_to.window(watched.window_handles[0])
    shows(watched, "This cart is ready")
    assert watched.execute_script("return window.mark") == "still here"
    assert watched.execute_script("return document.activeElement.id") == "delete-slow"
    press(watched, "Delete")
    shows(watched, "other")
    assert "slow" not in text(watched)


def test_phones_keyboards_and_the_dark(server: CartServer, watched: Chrome) -> None:
    phone = {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    watched.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    watched.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        for path in ("", "/page/state/vm1/disk/customize", "/page/login"):
            watched.get(f"{server.url}{path}")
            width = "return document.documentElement.scrollWidth"
            assert watched.execute_script(width) <= 360
            colour = watched.find_element(By.TAG_NAME, "body").value_of_css_property(
                "background-color"
            )
            assert colour in ("rgba(15, 20, 25, 1)", "rgb(15, 20, 25)")
    finally:
        watched.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        watched.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    watched.get(server.url)
    reached = []
    for _ in range(60):
        watched.switch_to.active_element.send_keys(Keys.TAB)
        element = watched.switch_to.active_element
        reached.append(element.get_attribute("value") or element.text)
        if reached[-1] == "Put into a cart":
            break
        if reached[-1] == "vm1/disk/install":
            element.send_keys(Keys.SPACE)
    assert reached[0] == "Skip to the content"
    assert {"vm1/disk/install", "vm1/disk/customize", "Put into a cart"} <= set(reached)
    watched.switch_to.active_element.send_keys(Keys.ENTER)
    shows(watched, "This cart is ready")


def test_a_token_is_typed_once(
    tmp_path: Path, pool: Path, stack: ExitStack, watched: Chrome
) -> None:
    server = start(stack, tmp_path, "--address", "0.0.0.0", settings=POOLS.format(pool=pool))
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    token = add_token(
        Database(f"sqlite:///{tmp_path}/carts/carts.sqlite"), "anna", write=True, objects="*"
    )
    watched.get(f"{server.url}/page/login")
    watched.find_element(By.NAME, "token").send_keys(token, Keys.ENTER)
    shows(watched, "Your carts")
    assert token not in watched.execute_script("return document.cookie")
    choose(watched, "vm1/disk/install")
    press(watched, "Put into a cart")
    shows(watched, "This cart is ready")
    press(watched, "Sign out")
    shows(watched, "a token is needed")
    until(lambda: watched.get_log("browser"))  # it complains that it was refused


def test_without_scripts(server: CartServer, tmp_path: Path, far: FakeInterface) -> None:
    with run_chromium(tmp_path, scripts=False) as chromium:
        chromium.get(server.url)
        choose(chromium, "vm1/on")
        chromium.find_element(By.NAME, "uid").send_keys("plain")
        press(chromium, "Put into a cart")
        shows(chromium, "This cart is ready")
        chromium.get(server.url)
        follow(chromium, "get-plain")
        assert "plain/vm1/on/on.state" in downloaded(tmp_path, "plain.tar")
        far.gate.clear()
        server.post("later", entry("data/bar.csv", "bar.csv", archive="far"))
        chromium.get(f"{server.url}/page/cart/later")
        shows(chromium, "This cart is staging")
        far.gate.set()
        shows(chromium, "This cart is ready")  # it loads itself again
