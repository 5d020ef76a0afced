"""Pictures of stagewise's pages, as a browser shows them: docs/pictures/*.png.

    python -m benchmarks.screenshots

Plans the demo's model for three workers, and trains it with two for a few steps; opens the pages of
both in headless Chromium, and writes one picture per theme and width.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISSING = (
    "needs Chromium with its driver, and selenium; install them with: "
    "apt-get install chromium chromium-driver; pip install selenium"
)
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
DESKTOP, PHONE = (1000, 760), (390, 760)
TALL = 800  # shows the predicted and the measured step
DEMO = "examples/shakespeare.py"
PLAN = ["plan", DEMO, "--stages", "3", "--microbatches", "6"]
TRAIN = ["train", DEMO, "--stages", "2", "--steps", "14", "--validate-every", "7"]

Driver = Any  # selenium's, which may be missing


def browser_is_here() -> bool:
    """Return whether pages can be opened here."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return False
    return bool(_chromium() and shutil.which("chromedriver"))


@contextmanager
def opened(
    url: str, size: tuple[int, int] = DESKTOP, *, dark: bool = False, scripts: bool = True
) -> Iterator[Driver]:
    """Open `url` in headless Chromium; a narrow window is a phone's."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = _chromium()
    for switch in ("headless=new", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{switch}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to run as root otherwise
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        width, height = size
        phone = width < 600
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        if not scripts:
            driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        driver.get(url)
        yield driver
    finally:
        driver.quit()


def _chromium() -> str:
    return shutil.which("chromium") or shutil.which("chromium-browser") or ""


def _take(page: Path, name: str, height: int) -> None:
    for theme, (width, _) in (("light", DESKTOP), ("dark", DESKTOP), ("phone", PHONE)):
        with opened(page.as_uri(), (width, height), dark=theme == "dark") as driver:
            target = PICTURES / f"{name}-{theme}.png"
            driver.save_screenshot(str(target))
            print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")


def _stagewise(*words: str) -> None:
    command = [sys.executable, "-m", "stagewise", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Write the pictures, or say what to install."""
    if not browser_is_here():
        print(f"skipped: {MISSING}")
        return
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plan, report, run = (Path(folder, name) for name in ("plan.html", "report.html", "demo"))
        _stagewise(*PLAN, "--html", str(plan))
        _take(plan, "plan", DESKTOP[1])
        _stagewise(*TRAIN, "--out", str(run))
        _stagewise("report", str(run), "--html", str(report))
        _take(report, "report", TALL)


if __name__ == "__main__":
    main()
