"""MLflow's page of a search, in a real browser with a new profile, which can reach no other host."""

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from giffy_ray.cluster.local import free_port
from giffy_ray.tracking.server import mlflow_server
from giffy_ray.tracking.ui_view import VIEW_QUERY
from tests.browser import needs_chromium, read_requests, start_browser

pytestmark = needs_chromium
TIMEOUT_S = 60
STUDY = "tiny-study"
TRIALS = ("trial-0000", "trial-0001")
WINDOW_SIZE = "--window-size=2000,1600"  # wide enough for the assistant, which MLflow opens in a new profile


@pytest.fixture(scope="module")
def server(storage: Path, tune_output: str) -> Iterator[str]:
    """The address of MLflow's server on the search's database, as `make ui` starts it."""
    with mlflow_server(f"sqlite:///{storage}/mlflow.db", free_port()) as server:
        yield server.address


@pytest.fixture(scope="module")
def browser(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chrome = start_browser(tmp_path_factory.mktemp("browser"), WINDOW_SIZE)
    yield chrome
    urls = read_requests(chrome)
    chrome.quit()
    assert any(url.startswith(f"{server}/get-artifact") for url in urls)
    assert not [url for url in urls if not url.startswith((server, "data:", "blob:", "chrome:"))]


@pytest.fixture
def page(browser: Chrome, server: str, storage: Path) -> Chrome:
    """The page at the address that `make ui` prints."""
    experiment = MlflowClient(f"sqlite:///{storage}/mlflow.db").get_experiment_by_name("giffy_ray")
    assert experiment
    browser.get("about:blank")  # otherwise only the fragment of the address changes, and nothing is loaded
    browser.get(f"{server}/#/experiments/{experiment.experiment_id}/runs?{VIEW_QUERY}")
    for run in (STUDY, *TRIALS):
        find_row(browser, run)
    return browser


def wait_for(page: Chrome, condition: Callable[[], object]) -> None:
    """Waits for a condition. An element that the page replaces meanwhile counts as missing."""
    WebDriverWait(page, TIMEOUT_S, 0.2, [WebDriverException]).until(lambda _: condition())


def find_row(page: Chrome, run: str) -> WebElement:
    locator = (By.XPATH, f"//div[@role='row'][.//a[normalize-space()='{run}']]")
    wait_for(page, lambda: page.find_element(*locator).is_displayed())
    return page.find_element(*locator)


def find_clips(page: Chrome, step: int, at_least: int) -> list[WebElement]:
    """Returns the images of a step in the image grid, once enough of them are loaded."""
    xpath = f"//img[contains(@src, 'images%2Fvalidation%2Bstep%2B{step}%2B') and contains(@src, 'compressed.webp')]"
    wait_for(page, lambda: len(page.find_elements(By.XPATH, xpath)) >= at_least)
    images = page.find_elements(By.XPATH, xpath)
    wait_for(page, lambda: all(page.execute_script("return arguments[0].naturalWidth", image) for image in images))
    return images


def capture(element: WebElement) -> np.ndarray:
    """Returns what the screen shows of an element: float [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")).astype(float)


def is_playing(page: Chrome, image: WebElement, within_s: float = 40) -> bool:
    """Returns whether the clips of an image move while its labels on the left stand still (once the page settles)."""
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
    before, end_s = capture(image), time.monotonic() + within_s
    while time.monotonic() < end_s:
        after = capture(image)
        if after.shape == before.shape:
            moved = np.abs(after - before).max(2) > 16
            label_px = round(moved.shape[1] * 0.08)
            if moved.mean() > 0.02 and not moved[:, :label_px].any():
                return True
        before = after
    return False


def test_a_new_profile_opens_on_curves_and_moving_clips(page: Chrome):
    wait_for(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer .trace")) >= 4)
    text = page.find_element(By.TAG_NAME, "body").text
    assert text.index("best/val/l2_paper") < text.index("Samples") < text.index("Training")
    clips = find_clips(page, 0, at_least=4)  # of the search, its two trials, and the training of the best one
    assert any(is_playing(page, clip) for clip in clips)


def test_the_slider_selects_the_clips_of_a_step(page: Chrome):
    slider = page.find_element(By.CSS_SELECTOR, "[role=slider][aria-label='Slider thumb']")
    for step in (0, 1):
        if step:
            slider.send_keys(Keys.ARROW_RIGHT)
        clips = find_clips(page, step, at_least=4)
        assert all(is_playing(page, clip) for clip in clips[:2])


def test_the_newest_search_leads_the_list(page: Chrome):
    order = sorted((STUDY, *TRIALS), key=lambda run: find_row(page, run).location["y"])
    assert order[0] == STUDY
    assert set(order[1:]) == set(TRIALS)  # which of them started first is not defined


def test_two_trials_are_compared(page: Chrome):
    for trial in TRIALS:
        find_row(page, trial).find_element(By.CSS_SELECTOR, ".ag-selection-checkbox input").click()
    page.find_element(By.XPATH, "//button[normalize-space()='Compare']").click()
    wait_for(page, lambda: "Comparing 2 Runs" in page.find_element(By.TAG_NAME, "h2").text)
    body = page.find_element(By.TAG_NAME, "body")
    wait_for(page, lambda: page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .parcoords"))
    assert all(trial in body.text for trial in TRIALS)
    assert "clip.frames" in body.text
    page.find_element(By.XPATH, "//*[normalize-space()='Show diff only']/preceding::button[@role='switch'][1]").click()
    wait_for(page, lambda: "clip.frames" not in body.text)
    assert "optim.lr 0.0001" in body.text.replace("\n", " ")  # the paper's value, which is tried first
