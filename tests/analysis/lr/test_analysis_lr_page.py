"""The page of a study in a real headless browser: it complains of nothing, asks for nothing, and the curves are there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import debian
import pytest
from lr_studies import facts, study

from megagate.analysis.lr.page import page_of
from megagate.analysis.lr.report import report_of

HOSTILE = "<img src=x onerror=alert(1)>"
VARIANTS = ("baseline", "headwise", HOSTILE, "half")


def _report() -> dict[str, Any]:
    of = facts(name="</script><script>alert(2)</script>", variants=VARIANTS)
    runs = study(of, lambda variant, rung: -0.1 * rung if variant == "headwise" else 0.0, noise=0.03)
    runs[-1].update(status="diverged", val_loss=None)
    return report_of(of, runs)


@pytest.fixture(scope="module")
def program() -> str:
    if browser.find() is None:
        debian.require({"chromium": "chromium"})
    found = browser.find()
    assert found
    return found


@pytest.fixture(scope="module")
def page(program: str, tmp_path_factory) -> Iterator[browser.Browser]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "page.html").write_text(page_of(_report()))
    with browser.Browser(program, folder / "profile") as opened:
        opened.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
        opened.open((folder / "page.html").as_uri())
        yield opened
        assert opened.complaints() == []
        assert [address for address in opened.requests() if not address.endswith("/page.html")] == []


def _count(page: browser.Browser, selector: str) -> int:
    return page.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")


def test_the_console_is_quiet_and_nothing_is_fetched(page: browser.Browser) -> None:
    assert page.complaints() == []
    assert len(page.requests()) == 1
    page.evaluate("console.log('heard')")
    assert "heard" in page.complaints()[0]  # that silence means something
    page.events[:] = [event for event in page.events if event.get("method") != "Runtime.consoleAPICalled"]


def test_the_curves_are_there(page: browser.Browser) -> None:
    assert _count(page, "path[data-curve]") == 4 + 3 + 2 + 4  # losses, gaps to two references, activations
    # A curve goes through five rungs, inside its picture, and is as high as its numbers say.
    report = _report()
    for index, variant in enumerate(VARIANTS):
        path = page.evaluate(f"document.querySelectorAll('section')[0].querySelectorAll('path[data-curve]')[{index}].getAttribute('d')")
        points = [tuple(map(float, point.split(","))) for point in path[1:].split("L")]
        assert len(points) == 5
        assert all(64 <= x <= 1060 and 0 <= y <= 360 for x, y in points)
        assert [x for x, _ in points] == sorted(x for x, _ in points)
        means = [rung["levels"]["val_loss"] for rung in report["statistics"]["rows"][index]["rungs"]]
        for one, other in ((0, 1), (1, 4), (0, 3)):
            assert (points[one][1] > points[other][1]) == (means[one] < means[other]), f"{variant}: up is not up"
    # A dot for each finished run.
    assert page.evaluate("document.querySelectorAll('section')[0].querySelectorAll('circle').length") == 4 * 5 * 5 - 1
    assert _count(page, "text[data-diverged=half]") == 1


def test_on_a_narrow_screen_words_keep_their_size_and_curves_stay_inside(program: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page_of(_report()))
    with browser.Browser(program, tmp_path / "profile") as opened:
        opened.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=True)
        opened.open((tmp_path / "page.html").as_uri())
        for width in (400, 900):  # also where a window changes its width
            opened.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
            opened.evaluate("void dispatchEvent(new Event('resize'))")
            inner = opened.evaluate("document.querySelector('section').clientWidth")
            assert opened.evaluate("document.querySelector('section svg').viewBox.baseVal.width") == inner < width
            assert opened.evaluate("document.documentElement.scrollWidth") == width
            spots = opened.evaluate("[...document.querySelectorAll('circle')].map(one => Number(one.getAttribute('cx')))")
            assert 56 <= min(spots) and max(spots) <= inner


def test_a_bar_far_above_does_not_press_curves_flat(program: str, tmp_path: Path) -> None:
    drawn = {}
    for bar in (2.9, 9.0):
        (tmp_path / "page.html").write_text(page_of(report_of(facts(collapsed_above=bar), study(facts(), lambda variant, rung: 0.0))))
        with browser.Browser(program, tmp_path / f"profile-{bar}") as opened:
            opened.open((tmp_path / "page.html").as_uri())
            heights = opened.evaluate("[...document.querySelector('section').querySelectorAll('circle')].map(e => +e.getAttribute('cy'))")
            drawn[bar] = (max(heights) - min(heights), _count(opened, ".bar"))
            assert f"above {bar:g} a finished run is collapsed" in opened.evaluate("document.body.innerText")
    assert drawn[9.0][0] > 200 and drawn[9.0][1] == 0 and drawn[2.9][1] == 1


def test_hovering_tells_values(page: browser.Browser) -> None:
    x, y = page.middle("section circle[data-dot=headwise]")
    page.mouse("mouseMoved", x, y)
    loss = _report()["statistics"]["rows"][1]["rungs"][0]["losses"][0]
    assert page.evaluate("document.getElementById('tip').hidden") is False
    assert page.evaluate("document.getElementById('tip').textContent") == f"headwise at 0.004\nseed 0: {loss:.3f}"
    x, y = page.middle("h1")
    page.mouse("mouseMoved", x, y)
    assert page.evaluate("document.getElementById('tip').hidden") is True


def test_variants_can_be_left_out_and_come_back(page: browser.Browser) -> None:
    before = _count(page, "path[data-curve=headwise]")
    assert before == 4
    page.click("button[data-variant=headwise]")
    assert _count(page, "[data-curve=headwise], [data-dot=headwise]") == 0
    assert page.evaluate("document.querySelector('button[data-variant=headwise]').getAttribute('aria-pressed')") == "false"
    assert _count(page, "path[data-curve]") == 9
    page.click("button[data-variant=headwise]")
    assert _count(page, "path[data-curve=headwise]") == before
    for index in range(4):
        page.click(f"nav button:nth-child({index + 1})")
    assert page.evaluate("document.querySelector('section').textContent").endswith("Nothing to show.")
    for index in range(4):
        page.click(f"nav button:nth-child({index + 1})")


def test_light_and_dark(page: browser.Browser) -> None:
    colours = set()
    for _ in range(2):
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.click("#theme")
    assert colours == {"rgb(255, 255, 255)", "rgb(22, 24, 28)"}


def test_names_are_text(page: browser.Browser) -> None:
    assert _count(page, "img") == 0
    assert page.evaluate("document.querySelector('h1').textContent") == "Learning-rate stability: </script><script>alert(2)</script>"
    assert page.evaluate("document.querySelectorAll('nav button')[2].textContent") == HOSTILE


def test_the_verdicts_are_there(page: browser.Browser) -> None:
    text = page.evaluate("document.body.innerText")
    for one in _report()["verdicts"]:
        assert one["line"] in text


def test_a_study_that_has_not_begun_opens(program: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page_of(report_of(facts(), [])))
    with browser.Browser(program, tmp_path / "profile") as opened:
        opened.open((tmp_path / "page.html").as_uri())
        assert opened.complaints() == []
        assert "Nothing to show." in opened.evaluate("document.body.innerText")
