"""The service's page in Chromium: by keyboard alone, at 320 pixels, dark and light; what it says when something is wrong."""
import contextlib
import csv
import io
import os
import re
import shutil
import threading

import pytest
import torch
import toy
from conftest import CONTEXT, adapted, fast_classifier, toy_net, write_tokenizer

from adapters.peft_layout import read_adapter, save_adapter
from data.segments import read_pairs
from experiments.serve import listen
from layers import RNNConfig
from model import DistilRNN
from serving.bank import AdapterBank
from serving.connections import ConnectionLimits, Server
from serving.guard import Limits
from serving.service import create_app
from serving.texts import Reading
from serving.worker import Student, Worker

pytestmark = pytest.mark.filterwarnings("ignore:.*were truncated")
READING = Reading(("no", "yes"), CONTEXT)
LONG = "the cat sat on the mat " * 20  # more tokens than CONTEXT
KEY = "Control+Enter"


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> Worker:
    """Two adapters with random weights on a toy base, the first with a student, and a student that reads pairs."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = write_tokenizer(folder)
    bank = AdapterBank(fast_classifier(toy_net("gpt2", vocab_size=len(tokenizer))), tokenizer, "toy")
    save_adapter(adapted("gpt2"), folder, "toy")
    for name in ("cola", "other"):
        bank.add(name, read_adapter(bank.net, folder), READING, folder / "adapter_model.safetensors")
    torch.manual_seed(0)
    student = DistilRNN(RNNConfig(vocab_size=len(tokenizer), embedding_size=8, hidden_size=8)).eval()
    teacher = frozenset({bank.entries["cola"].sha256})
    student.requires_grad_(False)
    (folder / "pairs").mkdir()
    read_pairs(of_pairs := write_tokenizer(folder / "pairs"))
    return Worker(bank, {"small": Student(student, tokenizer, READING, "cola", teacher),
                         "alike": Student(student, of_pairs, READING, "csv", frozenset())})


@pytest.fixture(scope="module")
def address(worker):
    """The address of a running service."""
    bound = listen("127.0.0.1", 0)
    server = Server(create_app(worker, Limits(characters=1000)), ConnectionLimits())
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        toy.until(lambda: server.started or not thread.is_alive(), 30)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; .ci/run installs it and sets NEEDS_BROWSER, so that nothing is skipped there."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None and not os.environ.get("NEEDS_BROWSER"):
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, address: str, **options):
    """The page with its list of tasks; its errors and requests in `trouble` and `asked`."""
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.asked, page.trouble = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda said: page.trouble.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.trouble.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#task option:nth-child(2)", state="attached")
        yield page


@pytest.fixture
def page(browser, address):
    with opened(browser, address, viewport={"width": 1000, "height": 900}) as page:
        yield page


def has_focus(page) -> str:
    return page.evaluate("document.activeElement.id")


def ask(page, text: str, kind: str = "student") -> None:
    """Types a text, sends it by keyboard, and waits for the answer."""
    page.fill("#text", text)
    page.press("#text", KEY)
    page.wait_for_selector("#ask:not([aria-busy])")
    page.locator(f"#{kind} .verdict").wait_for()


def test_the_page_loads_nothing_from_elsewhere(page, address):
    ask(page, "the cat")
    assert {url.removeprefix(address) for url in page.asked} >= {"", "page.js", "style.css", "v1/adapters", "v1/classify"}
    assert all(url.startswith(address) for url in page.asked) and page.trouble == []
    icon = page.request.get(address + page.get_attribute("link[rel=icon]", "href").lstrip("/"))
    assert icon.headers["content-type"] == "image/svg+xml" and icon.body().startswith(b"<svg")
    assert page.evaluate("async () => { const icon = new Image(); icon.src = '/favicon.svg'; await icon.decode(); return "
                         "icon.width > 0; }")  # the content security policy lets it in


def test_teacher_and_student_answer_as_they_do_alone(page, worker):
    text = "<img src=x onerror=alert(1)> the cat"
    ask(page, text)
    alone = {"teacher": worker.bank.classify([("cola", text)])[0], "student": worker.students["small"].classify([text])[0]}
    for kind, name in (("teacher", "cola"), ("student", "small")):
        assert page.inner_text(f"#{kind} .verdict") == alone[kind]["label"]
        percent = f"{100 * alone[kind]['probability']:.1f} %"
        assert re.fullmatch(rf"{percent} in \d+\.\d ms \({name}\)", page.inner_text(f"#{kind} .time"))
        bars = page.eval_on_selector_all(f"#{kind} meter", "meters => meters.map(meter => meter.value)")
        assert bars == pytest.approx(list(alone[kind]["probabilities"].values()), abs=1e-5)
    assert page.inner_text("#asked") == text and page.query_selector("img") is None and page.trouble == []


def test_a_session_by_keyboard_alone(page):
    stops = []
    for _ in range(4):
        page.keyboard.press("Tab")
        stops.append(has_focus(page))
    assert stops == ["task", "text", "lines", "ask"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("the cat\nsat")  # a plain Enter is a line break
    assert page.is_hidden("#answers")
    page.keyboard.press(KEY)
    page.locator("#student .verdict").wait_for()
    assert has_focus(page) == "text" and page.input_value("#text") == "the cat\nsat"
    # Space ticks the box, Enter on the button sends; the focus stays on the button.
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("tbody tr:nth-child(2)").wait_for()
    assert has_focus(page) == "ask" and page.is_hidden("#answers")
    page.keyboard.press("Tab")
    assert has_focus(page) == "scroll"
    page.keyboard.press("Tab")
    assert has_focus(page) == "download"
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "answers.csv" and page.trouble == []


def test_no_old_answer_stands_under_an_error_or_another_task(page):
    ask(page, "the cat")
    page.fill("#text", " \n ")
    page.press("#text", KEY)
    assert page.inner_text("#error") == "The text is empty." and page.is_hidden("#answers")
    assert page.get_attribute("#text", "aria-invalid") == "true" and has_focus(page) == "text"
    ask(page, "the cat")
    assert page.inner_text("#error") == "" and page.get_attribute("#text", "aria-invalid") is None
    page.select_option("#task", "other")
    assert page.is_hidden("#answers") and page.inner_text("#status") == ""
    ask(page, "the cat", "teacher")
    assert page.is_hidden("#student")  # the task has none
    page.check("#lines")
    assert page.is_hidden("#answers")
    page.press("#text", KEY)
    page.locator("tbody tr").wait_for()
    page.uncheck("#lines")
    assert page.is_hidden("#batch") and page.trouble == []


def test_an_answer_that_comes_after_the_task_has_changed_is_dropped(page):
    held = []
    page.route("**/v1/classify", lambda route: held.append(route))
    page.fill("#text", "the cat")
    page.press("#text", KEY)
    page.wait_for_selector("#ask[aria-busy]")
    toy.until(lambda: held or page.wait_for_timeout(10), 10)
    page.select_option("#task", "other")
    assert page.get_attribute("#ask", "aria-busy") is None
    with contextlib.suppress(Exception):  # the page has given the request up
        held[0].fulfill(json={"results": [{"label": "old", "probability": 1, "probabilities": {"old": 1}}]})
    page.unroute("**/v1/classify")
    ask(page, "the cat", "teacher")
    assert "(other)" in page.inner_text("#teacher .time") and page.is_hidden("#student")


@pytest.mark.parametrize("answer, says", [
    (None, "The server does not answer."),
    ({"status": 502, "content_type": "text/html", "body": "<h1>No</h1>"}, "The server answers with an error (502)."),
    ({"status": 429, "json": {"error": "9 texts wait already; try again"}}, "9 texts wait already; try again."),
    ({"status": 422, "json": {"error": "texts.0: the text is no good"}}, "The text is no good.")])
def test_errors_are_words(page, answer, says):
    ask(page, "the cat")
    page.route("**/v1/classify", lambda route: route.abort() if answer is None else route.fulfill(**answer))
    page.press("#text", KEY)
    page.wait_for_selector("#error:not(:empty)")
    assert page.inner_text("#error") == says and page.is_hidden("#answers") and has_focus(page) == "text"


def test_a_page_that_was_opened_while_the_server_was_down_asks_again(browser, address):
    with browser.new_context() as context:
        page = context.new_page()
        page.route("**/v1/adapters", lambda route: route.abort())
        page.goto(address)
        page.wait_for_selector("#error:not(:empty)")
        assert page.inner_text("#error") == "The server does not answer."
        page.unroute("**/v1/adapters")
        ask(page, "the cat")
        assert page.inner_text("#error") == ""


def test_a_cut_text_and_unknown_words_are_marked(page):
    ask(page, LONG)
    assert page.inner_text("#teacher .mark") == "Too long: only a part of the text was read."
    result = {"label": "1", "name": "fine", "probability": 1, "probabilities": {"1": 1}, "unknown_words": ["cat", "mat"]}
    page.route("**/v1/classify", lambda route: route.fulfill(json={"results": [result]}))
    ask(page, "the cat")
    assert page.inner_text("#teacher .mark") == "The model never saw: cat, mat."
    assert page.inner_text("#teacher .verdict") == "fine"


def test_an_answer_without_probabilities_is_shown_as_it_is(page):
    """A regression's answer is a number."""
    result = {"label": "3.2500", "score": 3.25}
    page.route("**/v1/classify", lambda route: route.fulfill(json={"results": [result]}))
    ask(page, "the cat")
    assert page.inner_text("#teacher .verdict") == "3.2500"
    assert re.fullmatch(r"in \d+\.\d ms \(cola\)", page.inner_text("#teacher .time"))
    page.check("#lines")
    page.press("#text", KEY)
    page.locator("tbody tr").wait_for()
    assert page.locator("tbody td").all_inner_texts() == ["1", "the cat", "3.2500", "", "3.2500", ""]


def test_a_batch_of_lines_is_a_table_and_a_file(page, worker):
    lines = ['she said "the cat", twice', "", "  ", "the mat, red", LONG.strip(), *(f"the cat {n}" for n in range(150))]
    page.check("#lines")
    page.fill("#text", "\n".join(lines))
    page.press("#text", KEY)
    page.locator("tbody tr:nth-child(153)").wait_for()
    assert sum(url.endswith("classify") for url in page.asked) == 6  # three requests for each of the two
    with page.expect_download() as download:
        page.click("#download")
    content = open(download.value.path(), encoding="utf-8", newline="").read()
    header, *rows = csv.reader(io.StringIO(content))
    assert header == ["line", "text", "teacher", "teacher's probability", "student", "student's probability", "note"]
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert [(int(row[0]), row[1]) for row in rows] == kept and content.count('"she said ""the cat"", twice"') == 1
    alone = worker.bank.classify([("cola", line) for _, line in kept])
    assert [row[2] for row in rows] == [answer["label"] for answer in alone]
    assert [float(row[3]) for row in rows] == pytest.approx([answer["probability"] for answer in alone], abs=1e-4)
    assert [bool(row[6]) for row in rows] == [line == LONG.strip() for _, line in kept]
    # The table has the same cells, and each note under its text.
    cells = "rows => rows.map(row => [...row.cells].map(cell => cell.firstChild.data))"
    assert page.eval_on_selector_all("tbody tr", cells) == [row[:-1] for row in rows]
    assert page.locator("tbody .mark").all_inner_texts() == [row[6] for row in rows if row[6]]


def test_a_task_of_pairs_has_a_field_for_each_text(page, worker):
    assert page.is_hidden("#second")
    page.select_option("#task", "alike")
    page.focus("#text")
    page.keyboard.type("the cat")
    page.keyboard.press("Tab")
    assert has_focus(page) == "second"
    # Half of a pair is an error, and its field is marked.
    page.keyboard.press(KEY)
    assert page.inner_text("#error") == "The second text is empty."
    assert page.get_attribute("#second", "aria-invalid") == "true" and page.is_hidden("#answers")
    page.keyboard.type("sat")
    page.keyboard.press(KEY)
    page.locator("#student .verdict").wait_for()
    alone = worker.students["alike"].classify(["the cat\tsat"])[0]
    shown = page.eval_on_selector_all("#student meter", "meters => meters.map(meter => meter.value)")
    assert shown == pytest.approx(list(alone["probabilities"].values()), abs=1e-5)
    assert page.inner_text("#asked") == "the cat\nsat" and page.inner_text("label[for=text]") == "First text"

    # Line by line, with a column for each text; a tab within the first text does not end it.
    page.check("#lines")
    page.fill("#text", "the cat\n\nthe\tmat")
    page.fill("#second", "sat\n\nred")
    page.press("#second", KEY)
    page.locator("tbody tr:nth-child(2)").wait_for()
    header, *rows = page.eval_on_selector_all("tr", "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))")
    assert header == ["line", "text", "second text", "student", "student's probability"]
    alone = worker.students["alike"].classify(["the cat\tsat", "the mat\tred"])
    assert [row[:4] for row in rows] == [["1", "the cat", "sat", alone[0]["label"]],
                                         ["3", "the mat", "red", alone[1]["label"]]]
    page.fill("#second", "sat\nred")
    page.press("#second", KEY)
    page.wait_for_selector("#error:not(:empty)")
    assert page.inner_text("#error") == "Line 2: the text is empty."
    page.select_option("#task", "cola")
    assert page.is_hidden("#second") and page.inner_text("label[for=text]") == "Text" and page.trouble == []


def test_an_error_of_a_batch_names_its_line(page):
    page.check("#lines")
    page.fill("#text", f"the cat\n\n{'the cat ' * 200}")
    page.press("#text", KEY)
    page.wait_for_selector("#error:not(:empty)")
    assert page.inner_text("#error") == "Line 3: 1,600 characters; expected at most 1,000." and page.is_hidden("#batch")


# WCAG 2.2, relative luminance and contrast ratio: of each text's colour and the first opaque background behind it.
CONTRASTS = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => channels(colour).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
  };
  const shown = [...document.querySelectorAll("main *")].filter(node => node.checkVisibility() &&
    (node.matches("select, textarea") || [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())));
  return shown.map(node => {
    const both = [luminance(getComputedStyle(node).color), luminance(behind(node))].sort((a, b) => b - a);
    return [node.tagName + "." + node.className, (both[0] + 0.05) / (both[1] + 0.05)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_and_the_page_fits_320_pixels(browser, address, scheme):
    with opened(browser, address, viewport={"width": 320, "height": 640}, color_scheme=scheme) as page:
        def check(*needed: str) -> None:
            found = page.evaluate(CONTRASTS)
            assert set(needed) <= {name for name, _ in found}
            assert [(name, ratio) for name, ratio in found if ratio < 4.5] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= 320

        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        ask(page, LONG + "w" * 300)
        check("H1.", "SELECT.", "TEXTAREA.", "BUTTON.", "P.verdict", "P.time", "P.mark", "DT.")
        page.check("#lines")
        page.fill("#text", LONG + "\n" + "w" * 300)
        page.press("#text", KEY)
        page.locator("tbody tr:nth-child(2)").wait_for()
        check("TH.number", "TD.text", "DIV.mark", "A.")
        page.fill("#text", "")
        page.press("#text", KEY)
        page.wait_for_selector("#error:not(:empty)")
        check("P.")
