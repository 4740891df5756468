"""A picture of the first screen of a run's report, for a page such as the README. Needs chromium and selenium.

python docs/screenshot.py runs/demo/llava_med/run docs/report.webp
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver


def screenshot(page: Path, picture: Path, width: int = 1280, height: int = 900) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        window = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
        driver.get(page.resolve().as_uri())
        shown = Image.open(io.BytesIO(driver.get_screenshot_as_png()))
    shown.convert("RGB").save(picture, quality=80)


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]) / "report/report.html", Path(sys.argv[2]))
