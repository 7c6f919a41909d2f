"""What MLflow's page shows of a search, seen and clicked in a real browser, which can reach nobody else."""

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from giffy_ray.cluster.local import free_port
from giffy_ray.tracking.server import mlflow_server
from giffy_ray.tracking.ui_view import OPENED

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="Chromium and its driver are not here: apt-get install chromium chromium-driver"
)
PATIENCE_S = 60
TRIALS = ("trial-0000", "trial-0001")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1600"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)


@pytest.fixture(scope="module")
def server(storage: Path, tuned: str) -> Iterator[str]:
    """The address of MLflow's server on the search's database, as `make ui` starts it."""
    with mlflow_server(f"sqlite:///{storage}/mlflow.db", free_port()) as server:
        yield server.address


@pytest.fixture(scope="module")
def browser(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chrome = Chrome(options, webdriver.ChromeService(DRIVER))
    chrome.get(f"{server}/health")  # no page: only so that what follows is kept under the server's name
    chrome.execute_script("localStorage['mlflow.assistant.fab.autoOpenedOnFirstLoad_v1'] = true")
    yield chrome
    asked = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    chrome.quit()
    sent = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(f"{server}/get-artifact") for url in sent)
    assert not [url for url in sent if not url.startswith((server, "data:", "blob:", "chrome:"))]


@pytest.fixture
def page(browser: Chrome, server: str, storage: Path) -> Chrome:
    """The view of curves and samples, with the search's trials shown below it."""
    found = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_experiment_by_name("giffy_ray")
    assert found
    browser.get("about:blank")  # else only what stands behind the # changes, and nothing is loaded
    browser.get(f"{server}/#/experiments/{found.experiment_id}/runs?{OPENED}")
    row_of(browser, "tiny-study").find_element(By.TAG_NAME, "button").click()
    for trial in TRIALS:
        row_of(browser, trial)
    return browser


def wait_for(page: Chrome, what: Callable[[], object]) -> None:
    """Elements come and go while the page draws: until then they count as not there yet."""
    WebDriverWait(page, PATIENCE_S, 0.2, [WebDriverException]).until(lambda _: what())


def row_of(page: Chrome, run: str) -> WebElement:
    where = (By.XPATH, f"//div[@role='row'][.//a[normalize-space()='{run}']]")
    wait_for(page, lambda: page.find_element(*where).is_displayed())
    return page.find_element(*where)


def samples(page: Chrome, step: int) -> list[WebElement]:
    """The pictures of the image grid, those of this step, when they are there."""
    wanted = f"//img[contains(@src, 'images%2Fvalidation%2Bstep%2B{step}%2B') and contains(@src, 'compressed.webp')]"
    wait_for(page, lambda: page.find_elements(By.XPATH, wanted))
    found = page.find_elements(By.XPATH, wanted)
    wait_for(page, lambda: all(page.execute_script("return arguments[0].naturalWidth", one) for one in found))
    return found


def seen(element: WebElement) -> np.ndarray:
    """float [height, width, 3]: what the screen shows there."""
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")).astype(float)


def plays(page: Chrome, picture: WebElement, within_s: float = 10) -> bool:
    """Whether the clips of a picture move while the words on its left stand still (once the page has settled)."""
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    before, end_s = seen(picture), time.monotonic() + within_s
    while time.monotonic() < end_s:
        after = seen(picture)
        if after.shape == before.shape:
            moved = np.abs(after - before).max(2) > 16
            words_px = round(moved.shape[1] * 0.08)
            if moved.mean() > 0.02 and not moved[:, :words_px].any():
                return True
        before = after
    return False


def test_two_trials_are_compared(page: Chrome):
    for trial in TRIALS:
        row_of(page, trial).find_element(By.CSS_SELECTOR, ".ag-selection-checkbox input").click()
    page.find_element(By.XPATH, "//button[normalize-space()='Compare']").click()
    wait_for(page, lambda: "Comparing 2 Runs" in page.find_element(By.TAG_NAME, "h2").text)
    body = page.find_element(By.TAG_NAME, "body")
    wait_for(page, lambda: page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .parcoords"))
    assert all(trial in body.text for trial in TRIALS)
    assert "clip.frames" in body.text
    page.find_element(By.XPATH, "//*[normalize-space()='Show diff only']/preceding::button[@role='switch'][1]").click()
    wait_for(page, lambda: "clip.frames" not in body.text)
    assert "optim.lr 0.0001" in body.text.replace("\n", " ")  # the report's value, which is tried first


def test_the_view_shows_curves_of_all_runs_and_samples_that_move(page: Chrome):
    wait_for(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer .trace")) >= 3)
    sections = page.find_element(By.TAG_NAME, "body").text
    assert sections.index("val/l2_paper") < sections.index("Samples") < sections.index("Training")
    for step in (0, 1):
        if step:
            slider = page.find_element(By.CSS_SELECTOR, "[role=slider][aria-label='Slider thumb']")
            slider.send_keys(Keys.ARROW_RIGHT)
        shown = samples(page, step)
        assert len(shown) == 3  # two trials and the best
        assert all(plays(page, picture) for picture in shown[:2])
