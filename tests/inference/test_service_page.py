"""The page of the service in a real browser, which can reach no other host: on a phone's screen and on a wide one."""

from __future__ import annotations

import base64
import io
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from giffy_ray.inference.interpolator import Interpolator
from tests.browser import needs_chromium, read_requests, start_browser
from tests.inference.service_client import encode_image, run_process, scene

pytestmark = needs_chromium
TIMEOUT_S = 60
TOKEN = "s3cret"
FRAMES, SAMPLES = 7, 2
WIDE, PHONE = (1400, 1000), (360, 780)
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder that keeps pictures of the page
READ_CANVASES = "return [...document.querySelectorAll('canvas')].map((canvas) => canvas.toDataURL('image/png'))"
ACCESSIBLE_NAMES = """
return [...document.querySelectorAll("button, input, select, summary, canvas, progress, a")].map((element) => {
  const labels = [...(element.labels ?? [])].map((label) => label.textContent);
  return [element.id || element.tagName, element.getAttribute("aria-label") || labels.join() || element.textContent];
});
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real files: two pictures of different formats and shapes, and a text that is called a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "start.png").write_bytes(encode_image(scene(1, 144, 192)))
    (folder / "end.jpg").write_bytes(encode_image(scene(2, 160, 200), "JPEG", quality=95))
    (folder / "text.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with (
        tempfile.TemporaryDirectory(prefix="g-", dir="/tmp") as temporary,
        run_process("between", Path(temporary), signal.SIGINT, token=TOKEN) as (address, _),
    ):
        yield address


@pytest.fixture(scope="module")
def browser(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    # With motion, a clip would play when it is complete.
    chrome = start_browser(tmp_path_factory.mktemp("browser"), "--force-prefers-reduced-motion")
    chrome.execute_cdp_cmd(
        "Browser.setDownloadBehavior",
        {"behavior": "allow", "downloadPath": str(tmp_path_factory.mktemp("downloads"))},
    )
    yield chrome
    urls = read_requests(chrome)
    errors = [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"]
    errors = [entry for entry in errors if "status of 4" not in entry["message"]]
    chrome.quit()
    assert any(url == f"{address}/interpolate" for url in urls)
    assert not [url for url in urls if not url.startswith((address, "blob:", "data:", "chrome:"))]
    assert not errors  # such as what the content security policy blocks


def open_page(browser: Chrome, address: str, size: tuple[int, int] = WIDE, scheme: str = "light") -> Chrome:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(f"{address}/")
    browser.execute_script("sessionStorage.clear()")
    browser.get(f"{address}/")
    wait_for(browser, lambda: find(browser, "model").text.startswith("Model between"))
    return browser


def find(page: Chrome, name: str) -> WebElement:
    return page.find_element(By.ID, name)


def wait_for(page: Chrome, condition: Callable[[], object]) -> None:
    WebDriverWait(page, TIMEOUT_S, 0.1, [WebDriverException]).until(lambda _: condition())


def set_range(page: Chrome, name: str, value: float) -> None:
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    page.execute_script(script, find(page, name), value)


def generate(page: Chrome, folder: Path, frames: int = FRAMES, samples: int = SAMPLES) -> None:
    find(page, "start").send_keys(str(folder / "start.png"))
    find(page, "end").send_keys(str(folder / "end.jpg"))
    find(page, "token").send_keys(TOKEN)
    set_range(page, "frames", frames)
    set_range(page, "samples", samples)
    find(page, "generate").click()
    wait_for(page, lambda: find(page, "status").text == "Done.")


def read_canvases(page: Chrome) -> list[np.ndarray]:
    """Returns what each canvas shows: uint8 [height, width, 3]."""
    urls = page.execute_script(READ_CANVASES)
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    return [np.asarray(picture.convert("RGB")) for picture in pictures]


def distance(image: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(image.astype(float) - other).mean())


def expected_clips(folder: Path) -> np.ndarray:
    """uint8 [samples, frames, height, width, 3] of the same pictures, from the library."""
    interpolator = Interpolator.from_pretrained("between", "cpu")
    clips = interpolator(folder / "start.png", folder / "end.jpg", FRAMES, SAMPLES)
    return np.stack([np.asarray(clip) for clip in clips])


def capture(page: Chrome, name: str) -> None:
    if SCREENSHOTS:
        Path(SCREENSHOTS, f"{name}.png").write_bytes(page.get_screenshot_as_png())


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_two_pictures_become_clips_that_can_be_scrubbed(
    browser: Chrome, address: str, folder: Path, size: tuple[int, int]
):
    page = open_page(browser, address, size)
    capture(page, f"empty-{size[0]}")
    generate(page, folder)
    expected = expected_clips(folder)
    assert len(page.find_elements(By.TAG_NAME, "canvas")) == SAMPLES
    for frame in (0, 3, FRAMES - 1, 1):
        set_range(page, "scrub", frame)
        assert find(page, "time").text.startswith(f"{frame + 1} of {FRAMES}, ")
        for shown, clip in zip(read_canvases(page), expected, strict=True):
            errors = [distance(shown, clip_frame) for clip_frame in clip]
            assert np.argmin(errors) == frame and errors[frame] < 4
    compare_with_cross_fade(page, expected[0])
    width = page.execute_script("return document.documentElement.scrollWidth")
    assert width <= size[0]  # nothing to scroll sideways
    for element in page.find_elements(By.CSS_SELECTOR, "button, select, canvas, input:not([type=file]), output"):
        if element.is_displayed():
            assert element.rect["x"] >= 0 and element.rect["x"] + element.rect["width"] <= size[0]
    capture(page, f"clips-{size[0]}")


def compare_with_cross_fade(page: Chrome, expected: np.ndarray) -> None:
    """Right of the line, the canvas shows the blend of the first and the last frame."""
    frame = 2
    set_range(page, "scrub", frame)
    set_range(page, "compare", 50)
    shown = read_canvases(page)[0]
    middle = shown.shape[1] // 2
    fade = expected[0] + (expected[-1].astype(float) - expected[0]) * frame / (FRAMES - 1)
    assert distance(shown[:, middle + 2 :], fade[:, middle + 2 :]) < 4
    assert distance(shown[:, : middle - 2], expected[frame][:, : middle - 2]) < 4
    set_range(page, "compare", 100)
    assert distance(read_canvases(page)[0][:, 2:], fade[:, 2:]) < 4
    set_range(page, "compare", 0)
    assert distance(read_canvases(page)[0], expected[frame]) < 4


def test_clips_are_downloaded(browser: Chrome, address: str, folder: Path, tmp_path: Path):
    page = open_page(browser, address)
    generate(page, folder)
    behavior = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    expected = expected_clips(folder)
    for name in ("Download Sample 2 as mp4", "Download Sample 2 as GIF"):
        page.find_element(By.CSS_SELECTOR, f"[aria-label='{name}']").click()
    mp4, gif = tmp_path / "giffy-sample-2.mp4", tmp_path / "giffy-sample-2.gif"
    wait_for(page, lambda: mp4.exists() and gif.exists())
    with av.open(str(mp4)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert frames.shape == expected[1].shape and distance(frames, expected[1]) < 6
    with Image.open(gif) as image:
        assert image.n_frames == FRAMES
        image.seek(3)
        assert distance(np.asarray(image.convert("RGB")), expected[1, 3]) < 12


def test_everything_works_by_keyboard(browser: Chrome, address: str, folder: Path):
    page = open_page(browser, address)
    typed = {"token": TOKEN, "frames": Keys.LEFT * 25, "samples": Keys.HOME}
    typed |= {"start": str(folder / "start.png"), "end": str(folder / "end.jpg")}
    visited = tab_to(page, "generate", typed)
    fields = ["start", "swap", "end", "frames", "fps", "samples", "size", "SUMMARY", "token", "generate"]
    assert visited == fields
    press(page, Keys.ENTER)
    wait_for(page, lambda: find(page, "status").text == "Done.")
    assert find(page, "time").text.startswith("1 of 5, ")
    assert page.execute_script("return document.activeElement.id") == "play"  # no longer on Cancel, which is hidden
    assert tab_to(page, "compare") == ["scrub", "compare"]
    press(page, Keys.END)
    assert find(page, "compare_value").text == "100 %"
    press(page, Keys.SPACE)
    assert find(page, "play_text").get_attribute("textContent") == "Pause"
    wait_for(page, lambda: not find(page, "time").text.startswith("1 of 5"))
    press(page, Keys.SPACE)
    assert find(page, "play_text").get_attribute("textContent") == "Play"
    page.execute_script("document.activeElement.blur()")
    press(page, Keys.HOME)
    press(page, Keys.RIGHT * 3)
    assert find(page, "time").text.startswith("4 of 5, ")
    press(page, Keys.LEFT)
    assert find(page, "time").text.startswith("3 of 5, ")
    press(page, Keys.END)
    assert find(page, "time").text.startswith("5 of 5, ")


def press(page: Chrome, keys: str) -> None:
    ActionChains(page).send_keys(keys).perform()


def tab_to(page: Chrome, name: str, typed: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Presses Tab until the named element has the focus, and types on the way. Returns what had the focus."""
    visited: list[str] = []
    while name not in visited:
        press(page, Keys.TAB)
        visited.append(page.execute_script("return document.activeElement.id || document.activeElement.tagName"))
        assert len(visited) < 30
        outline = "return getComputedStyle(document.activeElement).outlineStyle"
        is_file = visited[-1] in ("start", "end")  # whose label shows the focus
        assert is_file or page.execute_script(outline) != "none"
        if is_file:  # the dialog is the browser's own
            find(page, visited[-1]).send_keys(typed[visited[-1]])
        elif visited[-1] in typed:
            press(page, typed[visited[-1]])
    return visited


def test_screen_readers_get_names_and_messages(browser: Chrome, address: str, folder: Path):
    page = open_page(browser, address)
    generate(page, folder, frames=3, samples=1)
    names = dict(page.execute_script(ACCESSIBLE_NAMES))
    assert not [element for element, name in names.items() if not name.strip()]
    assert "Start" in names["start"] and names["play"].strip() == "Play"
    assert find(page, "status").get_attribute("role") == "status"
    assert find(page, "scrub").get_attribute("aria-valuetext").startswith("frame 1 of 3, ")


@pytest.mark.parametrize(
    ("token", "file", "message"),
    [
        (TOKEN, "text.png", "end: "),
        ("wrong", "end.jpg", "the token is wrong"),
        ("", "end.jpg", "a token is needed"),
    ],
)
def test_errors_are_shown(browser: Chrome, address: str, folder: Path, token: str, file: str, message: str):
    page = open_page(browser, address)
    find(page, "start").send_keys(str(folder / "start.png"))
    find(page, "end").send_keys(str(folder / file))
    find(page, "token").send_keys(token)
    find(page, "generate").click()
    wait_for(page, lambda: find(page, "error").text.startswith(message))
    assert find(page, "error").get_attribute("role") == "alert"
    assert find(page, "generate").is_enabled()
    capture(page, f"error-{file}-{token}")


def test_pictures_can_be_dropped_and_swapped(browser: Chrome, address: str):
    page = open_page(browser, address)
    page.execute_script(
        """
        const transfer = new DataTransfer();
        for (const name of ["a.png", "b.png"]) transfer.items.add(new File(["x"], name, {type: "image/png"}));
        const slot = document.getElementById("end").parentElement;
        slot.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
        """
    )

    def hints() -> list[str]:
        return [element.text for element in page.find_elements(By.CLASS_NAME, "hint")]

    wait_for(page, lambda: hints() == ["a.png", "b.png"])
    find(page, "swap").click()
    wait_for(page, lambda: hints() == ["b.png", "a.png"])


def test_motion_plays_in_step_unless_it_is_to_be_reduced(browser: Chrome, address: str, folder: Path):
    page = open_page(browser, address)
    generate(page, folder)
    assert find(page, "play_text").get_attribute("textContent") == "Play"  # the browser asks for reduced motion
    find(page, "play").click()
    expected = expected_clips(folder)
    seen: set[int] = set()

    def collect() -> bool:
        frames = [
            int(np.argmin([distance(shown, frame) for frame in clip]))
            for shown, clip in zip(read_canvases(page), expected, strict=True)
        ]
        assert frames[0] == frames[1]
        seen.add(frames[0])
        return len(seen) >= 4

    wait_for(page, collect)


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_dark_scheme(browser: Chrome, address: str, folder: Path, size: tuple[int, int]):
    page = open_page(browser, address, size, scheme="dark")
    generate(page, folder, frames=5)
    set_range(page, "scrub", 2)
    set_range(page, "compare", 40)
    assert mean_brightness(page) < 100
    capture(page, f"dark-{size[0]}")


def mean_brightness(page: Chrome) -> Any:
    return np.asarray(Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("L")).mean()
