"""The page in a real browser: click, read the override, compile with it; small screens, dark mode, keyboard, contrast.

Needs selenium and Chromium with its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import ast
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from allocators.greedy import Greedy
from fxquant.commands.texts import parse_overrides
from fxquant.session.session import Session
from passes.allocate.allocate_bits import COST_TABLE
from tests.models import images, vit
from tests.report.small_pages import small_compiled

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs a browser: apt-get install chromium chromium-driver"
)

LAYER = "blocks.1.mlp.fc1"
CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const parse = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data]; };
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (node) => { for (; node; node = node.parentElement) {
  const found = parse(getComputedStyle(node).backgroundColor); if (found[3] === 255) return found; }
  return [255, 255, 255, 255]; };
const low = [];
for (const node of document.querySelectorAll('body *')) {
  const text = [...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join('');
  if (!text || !node.checkVisibility() || node.closest('script, .visually-hidden, .skip')) continue;
  if (node.parentElement.querySelector(':scope > input:disabled')) continue;
  const style = getComputedStyle(node);
  const ink = light(parse(node instanceof SVGElement ? style.fill : style.color)), paper = light(behind(node));
  const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  if (ratio < 4.5) low.push(`${text.slice(0, 30)} (${node.className}): ${ratio.toFixed(2)}`);
}
return [...new Set(low)];
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield found
    found.quit()


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Any:
    path = tmp_path / "report.html"
    path.write_text(small_compiled().report().to_html())
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None


def by_css(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def choose(page: Any, side: int, bits: int) -> None:
    page.execute_script(f"document.querySelector('input[name=bits-{side}][value=\"{bits}\"]').click()")


def shown(page: Any, quantity: str) -> float:
    return float(by_css(page, f'[data-usage="{quantity}"]').get_attribute("data-value"))


def test_what_is_chosen_is_added_up_and_compiles(page: Any) -> None:
    table = COST_TABLE.of(small_compiled().graph_module)
    columns = small_compiled().allocation.assignment(table)  # type: ignore[union-attr]
    assert shown(page, "loss") == pytest.approx(table.objective(columns), rel=1e-4)
    by_css(page, f'.cell[data-layer="{LAYER}"]').click()
    choose(page, 0, 7)
    by_css(page, '.cell[data-layer="blocks.0.attn.qk"]').click()
    choose(page, 1, 3)

    columns[0, table.layers.index(LAYER)] = table.bits.index(7)
    columns[1, table.layers.index("blocks.0.attn.qk")] = table.bits.index(3)
    for quantity, value in table.usage(columns).items():
        assert shown(page, quantity) == pytest.approx(value, rel=1e-9)
    assert shown(page, "loss") == pytest.approx(table.objective(columns), rel=1e-4)
    assert "over the budget" in by_css(page, "#usage").text

    python, command = (by_css(page, f"#override-{kind}").text for kind in ("python", "command"))
    overrides = ast.literal_eval(python.removeprefix("overrides="))
    words = shlex.split(command)
    assert words[::2] == ["--override"] * (len(words) // 2)
    assert parse_overrides(words[1::2]) == overrides
    again = Session(vit(), images(2), recipe="naive_min_max", overrides=overrides).compile("W4A4", Greedy())
    rows = {row.layer: row for row in again.layers}
    assert rows[LAYER].weight_bits == 7
    assert rows["blocks.0.attn.qk"].input_bits == (3, 3)

    page.execute_script("document.getElementById('reset').click()")
    assert not by_css(page, "#overrides").is_displayed()
    assert "changed" not in by_css(page, '.cell[data-layer="blocks.0.attn.qk"]').get_attribute("class")


def test_the_keyboard_does_all(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    by_css(page, f'.cell[data-layer="{LAYER}"]').send_keys(Keys.ENTER)
    assert by_css(page, "#editor-name").text == LAYER
    chosen = by_css(page, "input[name=bits-0]:checked")
    before = int(chosen.get_attribute("value"))
    chosen.send_keys(Keys.ARROW_RIGHT)
    assert int(by_css(page, "input[name=bits-0]:checked").get_attribute("value")) == before + 1
    assert f"{LAYER}" in by_css(page, "#override-python").text
    assert "at" in by_css(page, "#said").get_attribute("textContent"), "screen readers hear of it"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_readable_everywhere(page: Any, scheme: str, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    try:
        page.execute_script(f"document.querySelector('.cell[data-layer=\"{LAYER}\"]').click()")
        choose(page, 0, 8)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.execute_script(CONTRAST) == []
        paper = by_css(page, "body").value_of_css_property("background-color")
        assert (int(paper.partition("(")[2].partition(",")[0]) < 128) == (scheme == "dark")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
