"""The interactive page in a real browser, which `make browser` installs: slider, clicks, keys, mouse, no network."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from toast_peft import explain

from ..helpers import steered
from ..zoo import images, tiny_model
from .test_explain_pictures import Tokenizer
from .test_gate import gated, inputs_for

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs Chromium; `make browser` installs it"
)

# As root in a container, and without what Chromium does by itself in the network.
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync disable-dev-shm-usage window-size=1300,1600"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    makers = {
        "image": lambda: steered(tiny_model(tf.ViTForImageClassification)),
        "text": lambda: steered(tiny_model(tf.LlamaForCausalLM)),
        "map": lambda: steered(tiny_model(tf.ConvNextForImageClassification)),
        "windows": lambda: steered(tiny_model(tf.SwinForImageClassification)),
        "gated image": lambda: gated(tf.ViTForImageClassification),
        "gated patches": lambda: gated(tf.ViTForImageClassification, "token"),
        "gated text": lambda: gated(tf.LlamaForCausalLM, "token"),
    }
    for name, make in makers.items():
        torch.manual_seed(0)
        model = make()
        explain(model, inputs_for(model), Tokenizer()).save(folder / f"{name}.html")
    model, uneven = makers["image"](), images(10, 10) | {"interpolate_pos_encoding": True}
    explain(model, uneven).save(folder / "uneven.html")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def page(browser: Any, pages: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page, which has not complained or asked for anything when the test is over."""
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(pages[request.param].as_uri())
    yield browser
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)


def readout(page: Any) -> str:
    return page.find_element(By.ID, "readout").text


def pixels(page: Any, name: str) -> str:
    return page.execute_script("return document.getElementById(arguments[0]).toDataURL()", name)


def choose(page: Any, name: str, index: int) -> None:
    page.find_elements(By.CSS_SELECTOR, f"#{name} label")[index].click()


def chosen(page: Any, name: str) -> int:
    inputs = page.find_elements(By.CSS_SELECTOR, f"#{name} input")
    return [one.is_selected() for one in inputs].index(True)


def row(page: Any, index: int = 0) -> dict[str, Any]:
    return json.loads(page.find_element(By.ID, "data").get_attribute("textContent"))["rows"][index]


@pytest.mark.parametrize("page", ["image"], indirect=True)
def test_slider_goes_from_pass_1_to_pass_2_by_arrow_keys(page: Any) -> None:
    slider = page.find_element(By.ID, "slider")
    second = pixels(page, "attention")
    slider.send_keys(Keys.HOME)
    assert page.find_element(By.ID, "position").text == "without feedback"
    first = pixels(page, "attention")
    slider.send_keys(Keys.ARROW_RIGHT * 50)
    assert page.find_element(By.ID, "position").text == "50 % of the way"
    assert len({first, second, pixels(page, "attention")}) == 3
    slider.send_keys(Keys.END)
    assert pixels(page, "attention") == second


@pytest.mark.parametrize("page", ["image"], indirect=True)
def test_block_head_and_image_by_click_and_by_keys(page: Any) -> None:
    assert (chosen(page, "blockChoice"), chosen(page, "headChoice")) == (3, 0)
    seen = {pixels(page, "change")}
    for name, index in (("blockChoice", 2), ("headChoice", 3), ("rowChoice", 1)):
        choose(page, name, index)
        assert chosen(page, name) == index
        seen.add(pixels(page, "change"))
    assert len(seen) == 4
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert chosen(page, "rowChoice") == 0
    choose(page, "blockChoice", 4)  # the rollout, which has no heads
    assert not page.find_element(By.CSS_SELECTOR, "#headChoice input").is_enabled()
    choose(page, "sinksChoice", 1)
    assert chosen(page, "sinksChoice") == 1


@pytest.mark.parametrize("page", ["image"], indirect=True)
def test_values_under_the_mouse_and_under_the_keys(page: Any) -> None:
    canvas = page.find_element(By.ID, "mask")
    width, height = canvas.size["width"], canvas.size["height"]
    ActionChains(page).move_to_element_with_offset(canvas, width // 4, -height // 4).perform()
    data = row(page)
    first, second = (data["attention"][index][3][0][0][1] / 1e4 for index in range(2))
    text = readout(page)
    assert text.startswith(f"Patch in row 0, column 1: mask {data['mask']['values'][1] / 1e4:.3g}")
    assert f"pass 1 {first:.3g}" in text and f"pass 2 {second:.3g}" in text
    page.execute_script("arguments[0].focus()", canvas)
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert readout(page).startswith("Patch in row 1, column 0: mask")
    assert page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", canvas) == "solid"


@pytest.mark.parametrize("page", ["uneven"], indirect=True)
def test_patch_under_the_mouse_where_the_last_pixels_are_of_none(page: Any) -> None:
    """Two patches of four pixels in ten: the second one begins at 40 %, and behind 80 % there is the image alone."""
    canvas = page.find_element(By.ID, "mask")
    width = canvas.size["width"]
    for part, column in ((0.35, 0), (0.45, 1), (0.95, 1)):
        ActionChains(page).move_to_element_with_offset(canvas, round((part - 0.5) * width), 0).perform()
        assert readout(page).startswith(f"Patch in row 1, column {column}: ")
    script = "return [...arguments[0].getContext('2d').getImageData(0, 5, 480, 1).data]"
    line = np.array(page.execute_script(script, canvas)).reshape(480, 4)
    is_grey = line[:, :3].max(1) == line[:, :3].min(1)  # where nothing is drawn on the image
    np.testing.assert_array_equal(is_grey, np.arange(480) >= 0.8 * 480)


@pytest.mark.parametrize("page", ["text"], indirect=True)
def test_token_is_chosen_by_click_and_by_keys(page: Any) -> None:
    def headings() -> list[str]:
        return [heading.text for heading in page.find_elements(By.TAG_NAME, "h2")]

    tokens = row(page)["tokens"]
    assert "Attention of all tokens, mean" in headings()
    page.find_elements(By.CSS_SELECTOR, "#mask button")[4].click()
    shown = tokens[4].replace("\n", "\\n").strip()
    assert any(shown in heading and heading.startswith("Attention of") for heading in headings())
    assert any(shown in heading and heading.startswith("Prediction after") for heading in headings())
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert readout(page).startswith("Token 5 ")
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.find_element(By.CSS_SELECTOR, "#mask .query").text == tokens[5].replace("\n", "\\n").strip()
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert "Attention of all tokens, mean" in headings()
    assert [button.get_attribute("textContent") for button in page.find_elements(By.CSS_SELECTOR, "#mask button")] == [
        token.replace("\n", "\\n") for token in tokens
    ]
    ActionChains(page).move_to_element(page.find_element(By.ID, "matrix")).perform()
    assert " to " in readout(page) and "change" in readout(page)


def number(value: float) -> str:
    """A value from 0 to 1, as the page writes it."""
    return "0" if value == 0 else f"{value:.4f}" if value < 0.01 else f"{value:#.3g}"


@pytest.mark.parametrize("page", ["gated text"], indirect=True)
def test_gate_of_each_token_beside_its_mask(page: Any) -> None:
    gate, mask = ([value / 1e4 for value in row(page)[name]["values"]] for name in ("gate", "mask"))
    assert min(gate) == 0 < max(gate)
    buttons = page.find_elements(By.CSS_SELECTOR, "#gate button")
    ActionChains(page).move_to_element(buttons[3]).perform()
    assert f": gate {number(gate[3])} · mask {number(mask[3])} · attention" in readout(page)
    buttons[3].click()
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert readout(page).startswith("Token 4 ") and f": gate {number(gate[4])} · mask" in readout(page)
    assert page.execute_script("return document.activeElement.parentElement.id") == "gate"


@pytest.mark.parametrize("page", ["gated patches"], indirect=True)
def test_gate_of_each_patch_is_a_map(page: Any) -> None:
    gate = [value / 1e4 for value in row(page)["gate"]["values"]]
    assert len(set(gate)) > 1
    canvas = page.find_element(By.CSS_SELECTOR, "canvas#gate")
    ActionChains(page).move_to_element_with_offset(
        canvas, canvas.size["width"] // 4, -canvas.size["height"] // 4
    ).perform()
    assert readout(page).startswith(f"Patch in row 0, column 1: gate {number(gate[1])} · mask ")
    page.execute_script("arguments[0].focus()", canvas)
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert readout(page).startswith(f"Patch in row 1, column 1: gate {number(gate[3])} · mask ")


@pytest.mark.parametrize("page", ["gated image"], indirect=True)
def test_gate_of_an_image_is_one_value(page: Any) -> None:
    shown = []
    for index in range(2):
        choose(page, "rowChoice", index)
        [value] = set(row(page, index)["gate"]["values"])
        shown.append(page.find_element(By.ID, "gate").text.split())
        assert shown[-1] == ["Gate", f"{value / 100:.1f}", "%", "open"]
        ActionChains(page).move_to_element(page.find_element(By.ID, "mask")).perform()
        assert f": gate {number(value / 1e4)} · mask" in readout(page)
    assert shown[0] != shown[1]


@pytest.mark.parametrize("page", ["text", "image", "map"], indirect=True)
def test_no_gate_is_shown_where_there_is_none(page: Any) -> None:
    assert not page.find_elements(By.ID, "gate")


@pytest.mark.parametrize("page", ["map"], indirect=True)
def test_stages_of_a_convnet_by_click(page: Any) -> None:
    assert not page.find_element(By.ID, "sliderBox").is_displayed()
    before = pixels(page, "norm")
    choose(page, "blockChoice", 0)
    assert pixels(page, "norm") != before


@pytest.mark.parametrize("page", ["windows"], indirect=True)
def test_blocks_of_stages_have_their_own_maps_and_heads(page: Any) -> None:
    def heads() -> list[str]:
        labels = page.find_elements(By.CSS_SELECTOR, "#headChoice label")
        return [label.text for label in labels if label.is_displayed()]

    assert [label.text for label in page.find_elements(By.CSS_SELECTOR, "#blockChoice label")] == ["0", "1", "2", "3"]
    assert heads() == ["mean", "0", "1", "2", "3"]
    choose(page, "headChoice", 4)
    choose(page, "blockChoice", 1)
    assert heads() == ["mean", "0", "1"] and chosen(page, "headChoice") == 0
    choose(page, "headChoice", 2)
    canvas = page.find_element(By.ID, "attention")
    page.execute_script("arguments[0].focus()", canvas)
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN * 20, Keys.ARROW_RIGHT * 20)
    first, second = (row(page)["attention"][index][1][2][0][-1] / 1e4 for index in range(2))
    assert readout(page).startswith(
        f"Patch in row 15, column 15: attention in pass 1 {number(first)} · in pass 2 {number(second)} · change "
    )
    page.execute_script("arguments[0].focus()", page.find_element(By.ID, "mask"))
    assert readout(page) == f"Patch in row 0, column 0: mask {number(row(page)['mask']['values'][0] / 1e4)}"


@pytest.mark.parametrize("page", ["image"], indirect=True)
def test_all_controls_have_names_and_can_be_reached_by_tab(page: Any) -> None:
    unnamed = page.execute_script(
        "return [...document.querySelectorAll('input, canvas, button')].filter("
        "e => !(e.labels?.length || e.ariaLabel || e.textContent)).map(e => e.outerHTML)"
    )
    assert unnamed == []
    reached = set()
    for _ in range(14):
        page.switch_to.active_element.send_keys(Keys.TAB)
        focused = page.switch_to.active_element
        reached.add(focused.get_attribute("name") or focused.get_attribute("id"))
    expected = {
        "slider",
        "rowChoice",
        "blockChoice",
        "headChoice",
        "sinksChoice",
        "mask",
        "attention",
        "change",
        "norm",
    }
    assert expected <= reached


@pytest.mark.parametrize("page", ["gated text"], indirect=True)
def test_dark_and_light(page: Any) -> None:
    gate = row(page)["gate"]["values"]
    backgrounds = []
    for scheme, colour in (("dark", "240, 130, 30"), ("light", "226, 108, 10")):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        backgrounds.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
        colours = page.execute_script(
            "draw(); return [...document.querySelectorAll('#gate button')].map(e => e.style.background)"
        )
        assert [one.startswith(f"rgba({colour}, ") for one in colours] == [True] * len(gate)
        assert [one.endswith(", 0)") for one in colours] == [value == 0 for value in gate]
    assert backgrounds == ["rgb(18, 22, 28)", "rgb(255, 255, 255)"]
