"""The page in a real Chromium. Run by ``make test-serve``, whose environment has gradio and playwright; skipped where they are not."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from multicrafter.demo.serve import desk as desks
from multicrafter.demo.serve.desk import Desk
from multicrafter.demo.serve.drawing import Limits
from multicrafter.demo.serve.server import application, listening, uploads
from multicrafter.models.finding import IdentityFinder
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.world import judges, shipped_adapter
from multicrafter.world.judges.people import PeopleBackend
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio, which the environment of `make test-serve` has")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright, which drives the browser; see `make test-serve`"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
PATIENCE = int(os.environ.get("PATIENCE", 60_000))  # milliseconds; machines may be loaded


class Served(NamedTuple):
    url: str
    desk: Desk
    folder: Path


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    import uvicorn

    finder = IdentityFinder(backend=PeopleBackend.from_pretrained(judges.shipped()))
    pipeline = MultiCrafterPipeline.from_pretrained(adapter=shipped_adapter(), finder=finder)
    desk = Desk(pipeline, Limits(max_size=128, max_bytes=200_000, max_steps=200), tiny=True)
    bound = listening("127.0.0.1", 0)
    with uploads() as folder:
        server = uvicorn.Server(uvicorn.Config(application(desk), log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield Served(f"http://127.0.0.1:{bound.getsockname()[1]}", desk, folder)
        server.should_exit = True
        thread.join(10)
    desk.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield made
        made.close()


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Callable[..., Any]]:
    """Opens the page as another visitor."""
    contexts = []

    def opened(**options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.problems, page.asked = [], []
        page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: page.problems.append(str(e)))
        page.on("request", lambda r: page.asked.append(r.url))
        page.goto(served.url)
        page.wait_for_selector("#mc-draw")
        return page

    yield opened
    for context in contexts:
        context.close()


def until(true: Callable[[], object], seconds: float = PATIENCE / 1000) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def status_is(page: Any, part: str) -> None:
    page.wait_for_function("part => document.querySelector('#mc-status')?.innerText.includes(part)", arg=part)


def take_people(page: Any) -> None:
    before = page.locator("#mc-references img").count()
    page.click("#mc-people")
    page.wait_for_function("document.querySelectorAll('#mc-references img').length == 2")
    assert before in (0, 2)


def settings(page: Any, **values: float) -> None:
    if not page.locator("#mc-steps").is_visible():
        page.get_by_text("Settings", exact=True).click()
    for name, value in values.items():
        field = page.locator(f"#mc-{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")


def drawn(page: Any, seed: int) -> None:
    """Draws and waits for the result of this seed."""
    page.click("#mc-draw")
    page.wait_for_function("text => document.querySelector('#mc-result').innerText.includes(text)", arg=f"Seed {seed},")


def picture(side: int = 60, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def file(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": content}


def test_the_first_picture_stands_beside_the_one_without(visit: Any, served: Served) -> None:
    page = visit()
    assert "With the method" not in page.inner_text("#mc-result")
    take_people(page)
    assert "people" in page.input_value("#mc-prompt textarea")
    settings(page, steps=4, seed=1)
    drawn(page, 1)
    assert page.locator("#mc-result figure").count() == 2
    titles = page.locator("#mc-result figcaption b").all_inner_texts()
    assert titles == ["With the method", "Without the method"]
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")
    assert page.evaluate("[...document.images].length") == 2 + 2 + 4
    assert page.locator("#mc-result td").count() == 2 * 4, "both references, in the draft, with and without"
    assert page.locator("#mc-result svg rect").count() >= 1
    assert [url for url in page.asked if not url.startswith((served.url, "data:", "blob:"))] == []
    assert page.problems == []


def test_what_is_downloaded_is_what_is_shown(visit: Any) -> None:
    page = visit()
    take_people(page)
    settings(page, steps=2, seed=7)
    drawn(page, 7)
    with page.expect_download() as started:
        page.locator("a.mc-download").first.click()
    got = started.value
    assert got.suggested_filename == "multicrafter_with_seed7.png"
    assert Image.open(got.path()).size == (64, 64)


def test_sliders_show_another_step_and_another_block(visit: Any) -> None:
    page = visit()
    take_people(page)
    settings(page, steps=5, seed=2)
    drawn(page, 2)
    page.wait_for_function(
        "document.querySelector('#mc-step input[type=range]').value == 3"
    )  # the middle, after the result
    seen = {page.locator("#mc-maps img").first.get_attribute("src")}
    for slider, key, part in (
        ("#mc-step", "ArrowRight", "step 4"),
        ("#mc-block", "ArrowRight", "transformer blocks 0"),
    ):
        page.locator(f"{slider} input[type=range]").press(key)
        page.wait_for_function("part => document.querySelector('#mc-maps').innerText.includes(part)", arg=part)
        seen.add(page.locator("#mc-maps img").first.get_attribute("src"))
    assert len(seen) == 3


def test_uploads_are_shown_removed_and_never_kept_on_the_disk(visit: Any, served: Served) -> None:
    page = visit()
    drop = page.locator("#mc-upload input[type=file]")
    drop.set_input_files([file("a.png", picture()), file("b.png", picture(colour="blue"))])
    page.wait_for_function("document.querySelectorAll('#mc-references img').length == 2")
    page.fill("#mc-prompt textarea", "two people")
    settings(page, steps=2, seed=3)
    drawn(page, 3)
    blue = page.locator("#mc-references img").nth(1).get_attribute("src")
    page.click("#mc-remove-0")
    page.wait_for_function("document.querySelectorAll('#mc-references img').length == 1")
    assert page.locator("#mc-references img").get_attribute("src") == blue
    assert list(served.folder.iterdir()) == []


def test_bad_files_are_one_clear_sentence(visit: Any, served: Served) -> None:
    page = visit()
    drop = page.locator("#mc-upload input[type=file]")
    drop.set_input_files([file("notes.png", b"these are no pixels")])
    status_is(page, "notes.png cannot be read as a picture: send a PNG, JPEG or WebP file.")
    drop.set_input_files([file("huge.png", os.urandom(300_000))])
    page.get_by_text("exceed the maximum allowed size").first.wait_for()
    drop.set_input_files([file(f"{i}.png", picture()) for i in range(5)])
    status_is(page, "There is room for 4 pictures: remove one first.")
    assert page.locator("#mc-references img").count() == 4
    page.click("#mc-draw")
    status_is(page, "Write what the picture should show")
    assert list(served.folder.iterdir()) == [] and served.url in page.url


def test_numbers_and_words_are_taken_as_they_are_or_refused(visit: Any) -> None:
    """Nothing is cut, rounded or refused by the field itself: somebody would get another picture than the one they asked for."""
    page = visit()
    take_people(page)
    right = page.input_value("#mc-prompt textarea")
    page.fill("#mc-prompt textarea", "people " * 1500)
    page.click("#mc-draw")
    status_is(page, "This page draws with at most 1000 characters in the prompt, got 10500.")
    page.fill("#mc-prompt textarea", right)
    for seed, said in (
        (-1, "from 0 to 9007199254740991, got -1."), (10**23, "from 0 to 9007199254740991, got 1e+23."),
        (1.5, "The seed must be a whole number."), (2**53, "from 0 to"),
    ):  # fmt: skip
        settings(page, seed=seed)
        page.click("#mc-draw")
        status_is(page, said)
    settings(page, steps=1, seed=2**53 - 1)
    drawn(page, 2**53 - 1)
    assert page.problems == []


def test_one_picture_of_an_animation_and_one_picture_twice_are_told(visit: Any) -> None:
    page, moving = visit(), io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(
        moving, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 40), "blue")]
    )
    drop = page.locator("#mc-upload input[type=file]")
    drop.set_input_files([file("a.gif", moving.getvalue())])
    status_is(page, "a.gif holds several pictures, and the first was taken. Now write what the picture shows.")
    drop.set_input_files([file("b.gif", moving.getvalue())])
    page.wait_for_function("document.querySelectorAll('#mc-references img').length == 2")
    page.fill("#mc-prompt textarea", "two people")
    settings(page, steps=1)
    drawn(page, 0)
    assert "A and B have the same picture" in page.inner_text("#mc-result")


FAINT = """() => {
  const numbers = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = c => { const [r, g, b] = c.map(v => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b };
  const above = e => e ? [...above(e.parentElement), e] : [];
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (words.nextNode()) {
    const e = words.currentNode.parentElement, text = words.currentNode.textContent.trim(), box = e.getBoundingClientRect();
    if (!text || box.width < 2 || box.height < 2 || e.closest('svg, script, style, button[disabled]')) continue;
    let ground = [255, 255, 255], shade = numbers(getComputedStyle(e).color);
    for (const each of above(e)) {
      const style = getComputedStyle(each);
      ground = over(numbers(style.backgroundColor), ground); shade[3] *= +style.opacity }
    const [x, y] = [light(over(shade, ground)), light(ground)].sort((a, b) => b - a);
    if ((x + .05) / (y + .05) < 4.5) found.push(text) }
  return found }"""
"""Texts whose colour stands out less than 4.5 to 1 from what is behind them, the bound of WCAG 2.2 for small letters (AA)."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_can_be_read_in_light_and_dark(visit: Any, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    drop = page.locator("#mc-upload input[type=file]")
    assert page.evaluate(FAINT) == []
    drop.set_input_files([file(f"{i}.png", picture(colour=c)) for i, c in enumerate(("red", "blue", "green", "white"))])
    page.wait_for_function("document.querySelectorAll('#mc-references img').length == 4")
    page.click("#mc-draw")
    status_is(page, "Write what")
    assert page.evaluate(FAINT) == []
    page.fill("#mc-prompt textarea", "two people")
    settings(page, steps=1)
    drawn(page, 0)
    page.wait_for_function("document.querySelectorAll('#mc-maps img').length == 8")
    page.mouse.move(0, 0)  # nothing is lit up
    page.wait_for_timeout(300)
    assert page.evaluate(FAINT) == []
    page.evaluate("document.querySelector('#mc-result h3').style.opacity = .35")
    assert page.evaluate(FAINT) == ["Who was matched to whom"], "the measure sees what is faint"


def test_two_at_once_wait_in_line_and_each_gets_its_own(visit: Any) -> None:
    ann, bob = visit(), visit()
    for page, seed in ((ann, 11), (bob, 12)):
        take_people(page)
        settings(page, steps=2, seed=seed)
    bob.click("#mc-people")
    bob.wait_for_function("document.querySelectorAll('#mc-references img').length == 2")
    settings(ann, steps=120)
    ann.click("#mc-draw")
    status_is(ann, "step")
    bob.click("#mc-draw")
    status_is(bob, "1 request is ahead of yours")
    bob.wait_for_function("document.querySelector('#mc-result').innerText.includes('Seed 12,')")
    assert "Seed 11," in ann.inner_text("#mc-result") and "Seed 12," not in ann.inner_text("#mc-result")


def test_cancelling_ends_it_and_the_next_one_is_drawn(visit: Any, served: Served) -> None:
    page = visit()
    take_people(page)
    settings(page, steps=200, seed=4)
    page.click("#mc-draw")
    status_is(page, "step")
    page.click("#mc-cancel")
    status_is(page, "Cancelled.")
    assert "Seed" not in page.inner_text("#mc-result")
    settings(page, steps=2)
    drawn(page, 4)


def test_who_closes_the_page_is_forgotten(visit: Any, served: Served) -> None:
    page = visit()
    take_people(page)
    settings(page, steps=200)
    page.click("#mc-draw")
    status_is(page, "step")
    (key,) = [k for k, v in served.desk._visitors.items() if v.job is not None and not v.job.over.is_set()]
    job = served.desk.visitor(key).job
    page.close()
    until(lambda: key not in served.desk._visitors)
    assert job is not None
    until(job.over.is_set)
    assert job.state == "cancelled"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(visit: Any, scheme: str) -> None:
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    take_people(page)
    settings(page, steps=2, seed=5)
    drawn(page, 5)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#mc-status a")
    page.wait_for_function("Math.abs(document.querySelector('#mc-result').getBoundingClientRect().top) < 200")
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (max(shade) < 60) if scheme == "dark" else (min(shade) > 200)


def test_no_file_of_the_machine_can_be_had(served: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    for path in (
        f"/gradio_api/file={secret}",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../etc/passwd",
        f"/file={secret}",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(served.url + path)
        assert refused.value.code == 404
    config = json.loads(urllib.request.urlopen(served.url + "/config").read())
    text = json.dumps(config)
    assert (
        str(served.folder) not in text and str(Path.home()) not in text and str(Path(desks.__file__).parent) not in text
    )
    (uploads_to,) = [d for d in config["dependencies"] if any(t[1] == "upload" for t in d["targets"])]
    forged = {
        "fn_index": uploads_to["id"], "session_hash": "mallory",
        "data": [[{"path": str(secret), "orig_name": "secret.png", "meta": {"_type": "gradio.FileData"}}]],
    }  # fmt: skip
    asked = urllib.request.Request(
        f"{served.url}/gradio_api/queue/join", json.dumps(forged).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(asked).read()
    answer = (
        urllib.request.urlopen(f"{served.url}/gradio_api/queue/data?session_hash=mallory", timeout=60).read().decode()
    )
    assert '"success":false' in answer.replace(" ", "") and str(Path.home()) not in answer
    assert secret.exists() and served.desk.visitor("mallory").references == []


@pytest.mark.slow
def test_two_hundred_requests_leave_memory_flat(visit: Any) -> None:
    """After fifty that fill every cache, a hundred and fifty more may add 20 MB, the size of three of the model's weights."""
    page = visit()
    take_people(page)
    settings(page, steps=1)
    process, used = psutil.Process(), []
    for seed in range(200):
        settings(page, seed=seed)
        drawn(page, seed)
        used.append(process.memory_info().rss / 1e6)
    print(f"resident MB after 50, 100, 150, 200 requests: {[round(used[i - 1]) for i in (50, 100, 150, 200)]}")
    assert max(used[190:]) - max(used[40:50]) < 20
