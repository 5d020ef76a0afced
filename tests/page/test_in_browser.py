"""The page in headless Chromium: it opens without errors, hover, zoom and keys work, and its
numbers are those of the JSON. `make test-page` runs this where Chromium is installed.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from benchmarks import screenshots
from benchmarks.screenshots import DESKTOP, PHONE, Driver, opened
from stagewise.costs import CellCost
from stagewise.page.dashboard import PageServer
from stagewise.page.document import write_html
from stagewise.page.plan_page import plan_page
from stagewise.page.run_page import run_page
from stagewise.planning.plan import plan_from_costs
from stagewise.recording import LOG_FILE
from stagewise.timeline import Timeline
from tests.page.test_run_page import RUN

if not screenshots.browser_is_here():
    pytest.skip(f"this {screenshots.MISSING}", allow_module_level=True)
pytest.importorskip("plotly")

EVIL = "<img src=x onerror=\"document.title='run'\"><b>"
CELLS = [
    CellCost(name=f"{n}{EVIL}", forward_seconds=1e-3, backward_seconds=2e-3, activation_bytes=9999)
    for n in range(4)
]
PLAN = plan_from_costs(CELLS, num_devices=2, num_microbatches=4)
SPANS = {(str(s.instruction), s.start_seconds, s.end_seconds) for s in PLAN.timeline.spans}
TIMELINE = "document.querySelectorAll('[data-plot=timeline]')"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    record = json.loads(PLAN.to_json())
    write_html(plan_page(PLAN, record, title=EVIL, environment={"recipe": EVIL}), path)
    return path


@pytest.fixture(scope="module")
def desktop(page: Path) -> Iterator[Driver]:
    with opened(page.as_uri()) as driver:
        yield driver


def drawn(driver: Driver) -> None:
    """Wait until plotly has drawn, by its own promise."""
    driver.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
    )


def ranges(driver: Driver) -> list[list[float]]:
    return list(
        driver.execute_script(
            "return [...document.querySelectorAll('[data-plot=timeline], [data-plot=memory]')]"
            ".map(node => node.layout.xaxis.range)"
        )
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_opens_without_errors_and_fits(page: Path, size: tuple[int, int], dark: bool) -> None:
    with opened(page.as_uri(), size, dark=dark) as driver:
        drawn(driver)
        assert driver.get_log("browser") == []
        assert driver.execute_script("return document.documentElement.scrollWidth") == size[0]
        assert driver.title == EVIL.strip()
        paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        plots = driver.execute_script("return document.querySelectorAll('.plot .main-svg').length")
        assert plots >= 4
        driver.find_element("id", "theme").click()
        assert driver.execute_script("return document.documentElement.dataset.theme") == (
            "light" if dark else "dark"
        )


def test_numbers_equal_the_json_and_what_is_drawn(desktop: Driver) -> None:
    numbers = json.loads(
        desktop.execute_script("return document.getElementById('numbers').textContent")
    )
    step = numbers["steps"][0]
    assert Timeline.from_records(step["num_devices"], step["spans"]) == PLAN.timeline
    assert {k: v for k, v in numbers.items() if k != "steps"} == json.loads(PLAN.to_json())
    bars = desktop.execute_script(
        f"return {TIMELINE}[0].data.filter(trace => trace.name !== 'idle').flatMap(trace =>"
        " trace.text.map((name, i) => [name, trace.base[i], trace.base[i] + trace.x[i]]))"
    )
    assert len(bars) == len(SPANS)
    for name, start, end in SPANS:
        assert [name, pytest.approx(start), pytest.approx(end)] in bars


def test_hover_tells_who_waited_for_whom(desktop: Driver) -> None:
    from selenium.webdriver import ActionChains

    bar = desktop.execute_script(
        f"return [...{TIMELINE}[0].querySelectorAll('.bartext')]"
        ".find(text => text.textContent === '0B0')"
    )
    ActionChains(desktop).move_to_element(bar).perform()
    drawn(desktop)
    said = desktop.execute_script(f"return {TIMELINE}[0].querySelector('.hoverlayer').textContent")
    for expected in ("0B0 backward", "microbatch 0", "0B0 waited for 1B0 on device 1"):
        assert expected in said


def test_zoom_moves_all_time_axes(desktop: Driver) -> None:
    from selenium.webdriver import ActionChains

    def press(name: str) -> list[float]:
        desktop.find_element("css selector", f"[data-zoom={name}]").click()
        drawn(desktop)
        first, *others = ranges(desktop)
        assert all(other == pytest.approx(first) for other in others)
        return first

    whole = press("all")
    assert whole[0] == 0 and whole[1] >= PLAN.timeline.duration_seconds
    near = press("in")
    assert near[1] - near[0] == pytest.approx(whole[1] / 2)
    assert press("left")[0] < near[0]
    assert press("out")[1] > near[1]
    assert press("all") == pytest.approx(whole)
    plot = desktop.execute_script(f"return {TIMELINE}[0].querySelector('.nsewdrag')")
    drag = ActionChains(desktop).move_to_element_with_offset(plot, -100, 0).click_and_hold()
    drag.move_by_offset(150, 0).move_by_offset(50, 0).release().perform()
    drawn(desktop)
    first, *others = ranges(desktop)
    assert 0 < first[0] < first[1] < whole[1]
    assert all(other == pytest.approx(first) for other in others)
    press("all")


def test_everything_is_reached_by_keyboard(page: Path) -> None:
    with opened(page.as_uri()) as driver:
        walk_by_keyboard(driver)


def walk_by_keyboard(desktop: Driver) -> None:
    from selenium.webdriver import Keys

    reached = []
    for _ in range(12):
        desktop.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(
            desktop.execute_script("return document.activeElement.dataset.plot")
            or desktop.switch_to.active_element.tag_name
        )
        if reached[-1] == "timeline":
            break
    assert reached == ["button"] * 6 + ["select", "timeline"]
    plot = desktop.switch_to.active_element
    said = desktop.find_element("id", "said")
    plot.send_keys(Keys.ARROW_RIGHT)
    assert said.text.startswith("device 0: 0F0 forward; stage 0, microbatch 0; 0 s to 2 ms")
    plot.send_keys(Keys.ARROW_DOWN)
    assert said.text.startswith("device 1: idle")
    plot.send_keys(Keys.ARROW_RIGHT)
    assert said.text.startswith("device 1: 1F0 forward") and "waited for 0F0" in said.text
    before = ranges(desktop)[0]
    plot.send_keys("+")
    drawn(desktop)
    after = ranges(desktop)[0]
    assert after[1] - after[0] == pytest.approx((before[1] - before[0]) / 2)
    plot.send_keys("0")


def test_another_schedule_is_chosen(desktop: Driver) -> None:
    from selenium.webdriver.support.select import Select

    select = Select(desktop.find_element("css selector", "select[data-pane='1']"))
    select.select_by_visible_text("zb_h1, 4 microbatches")
    drawn(desktop)
    names = desktop.execute_script(f"return {TIMELINE}[1].data.map(trace => trace.name)")
    assert names == ["forward", "backward for inputs", "backward for weights", "idle"]


def test_without_scripts_the_tables_are_there(page: Path) -> None:
    with opened(page.as_uri(), scripts=False) as driver:
        text = driver.find_element("css selector", "main").text
        assert "the tables hold the same numbers" in text
        assert "Where the time goes" in text and "zb_h1, 4 microbatches" in text
        assert not driver.find_element("id", "theme").is_displayed()


def test_a_live_page_follows_its_run(tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    run = tmp_path / "run"
    run.mkdir()
    with PageServer(run) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with opened(f"http://{server.authority}/") as driver:
            wait = WebDriverWait(driver, 60, poll_frequency=0.1)

            def shows(text: str) -> None:
                wait.until(lambda _: text in driver.find_element("tag name", "main").text)

            shows("the run has written nothing yet")
            (run / LOG_FILE).write_text('{"step": 1, "loss": 2.5}\n')
            shows("2.5000")
            driver.execute_script("window.same = true")
            (run / LOG_FILE).write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.25}\n')
            shows("1.2500")
            assert driver.execute_script("return window.same")  # it was not loaded anew
            drawn = "return document.querySelector('[data-plot=losses]').data[0].y"
            assert driver.execute_script(drawn) == [2.5, 1.25]
            server.shutdown()
            server.server_close()
            shows("The run has ended; this page shows its last state.")
            assert driver.execute_script(drawn) == [2.5, 1.25]


def test_a_report_shows_predicted_above_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report = run_page([RUN, replace(RUN, path=Path("runs/b"))])
    write_html(report, path)
    with opened(path.as_uri(), PHONE, dark=True) as driver:
        drawn(driver)
        assert driver.get_log("browser") == []
        assert driver.execute_script("return document.documentElement.scrollWidth") == PHONE[0]
        numbers = json.loads(
            driver.execute_script("return document.getElementById('numbers').textContent")
        )
        assert numbers["runs"] == json.loads(json.dumps(report.record["runs"]))
        shown = driver.execute_script(
            "return [...document.querySelectorAll('select')].map(s => s.selectedOptions[0].text)"
        )
        assert [each.partition(":")[0] for each in shown] == ["predicted", "measured"]
        names = driver.execute_script(f"return {TIMELINE}[1].data.map(trace => trace.name)")
        assert names == ["forward", "backward", "idle", "optimizer"]
        end = report.steps[1].around[0].end_seconds
        assert ranges(driver)[0] == ranges(driver)[1] == [0, pytest.approx(end)]
        losses = "return document.querySelector('[data-plot=losses]').data.map(trace => trace.name)"
        assert driver.execute_script(losses) == ["a", "a, validation", "b", "b, validation"]
