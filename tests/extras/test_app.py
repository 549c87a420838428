"""Search in the browser: same results as the command, one message for bad input, nothing served but images found."""

import html
import json
import re
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import draw_image, run_python, start_python
from PIL import Image

from extras import app
from extras.result_html import escape
from inference import Searcher
from utils.captions import read_captions

QUERIES = ("a red circle", "a blue square on grass", "two rings")


@pytest.fixture(scope="module")
def page(trained_run, sample):
    return app.Page(Searcher(trained_run, sample["image_path"], sample["captions_path"], "cpu"))


@pytest.fixture
def photo(tmp_path):
    draw_image(tmp_path / "photo.png", seed=3)
    return tmp_path / "photo.png"


def found(page_html):
    """The names and scores of the images in the page."""
    lines = [html.unescape(text).split("\n") for text in re.findall(r"<figcaption>(.*?)</figcaption>", page_html, re.S)]
    return [(name, float(numbers.split()[0])) for name, numbers in lines]


def expected(results):
    return [(Path(result["file"]).name, pytest.approx(result["score"], abs=6e-4)) for result in results]


# ---- functions of the page --------------------------------------------------------------------------------------


def test_sentence_finds_what_the_searcher_finds(page):
    for query in QUERIES:
        answer = page.search_sentence(f" {query} ", 4)
        results = page.searcher.search(query, 4)
        assert found(answer) == expected(results)
        assert answer.count("data:image/jpeg;base64,") == 4
        assert all(f"z {result['z_score']:+.1f}" in answer for result in results)
        frames = re.findall('border-color: (.*?)"', answer)
        assert frames == [{True: "limegreen", False: "lightgrey", None: "transparent"}[r["match"]] for r in results]


def test_sentence_that_is_a_file_name_is_a_sentence(page, photo):
    assert page.searcher.search(photo, 5) != page.searcher.answer([(1.0, str(photo))], 5)["results"]
    for file in (photo, "/etc/passwd"):
        assert found(page.search_sentence(str(file), 5)) == expected(
            page.searcher.answer([(1.0, str(file))], 5)["results"]
        )


def test_image_finds_captions_and_images_and_is_classified(page, sample, photo):
    answer = page.search_image(str(photo), "red, blue ,green", 6)
    assert found(answer) == expected(page.searcher.search(photo, 6))
    captions = [result["caption"] for result in page.searcher.search(photo, 5, kind="captions")]
    assert set(captions) <= set(read_captions(sample["captions_path"])["caption"])
    assert all(f"<td>{html.escape(caption)}</td>" in answer for caption in captions)
    labels = re.findall(r"([\d.]+)%</td><td>(\w+)</td>", answer)
    assert {label for _, label in labels} == {"red", "blue", "green"}
    assert sum(float(percent) for percent, _ in labels) == pytest.approx(100, abs=0.2)
    assert "<h3>Labels" not in page.search_image(str(photo), "", 1)


def test_image_without_captions_finds_images(trained_run, tmp_path, photo, capsys):
    (tmp_path / "captions.csv").write_text("no captions")
    page = app.Page(Searcher(trained_run, tmp_path, tmp_path / "captions.csv", "cpu"))
    assert "no captions for uploaded images" in capsys.readouterr().err
    assert "1 images" in page.search_image(str(photo), "", 1)


def test_uploaded_image_is_rotated_by_its_orientation(page, tmp_path, photo):
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise
    with Image.open(photo) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert (
        page.search_image(str(tmp_path / "turned.png"), "", 9).split("</p>")[1]
        == page.search_image(str(photo), "", 9).split("</p>")[1]
    )


def save_bad_files(folder):
    """Files that are no readable images, {name: what the message says}."""
    draw_image(folder / "whole.jpg", (400, 400))
    (folder / "truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-3000])
    (folder / "text.jpg").write_text("<script>alert(1)</script>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "drawing.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    Image.new("1", (20000, 10000)).save(folder / "huge.png")
    return {
        "truncated.jpg": "truncated",
        "text.jpg": "cannot identify",
        "empty.png": "cannot identify",
        "drawing.jpg": "the format is EPS",
        "huge.png": "20000 x 10000 pixels, more than 180 megapixels",
        "missing.png": "No such file",
    }


def test_unreadable_upload_gives_one_message(page, tmp_path):
    for name, reason in save_bad_files(tmp_path).items():
        answer = page.search_image(str(tmp_path / name), "", 3)
        assert re.fullmatch('<p class="message">[^<]*</p>', answer), answer
        assert f"{name} cannot be read as an image (" in answer and reason in answer
        assert str(tmp_path) not in answer
    assert len(found(page.search_sentence("a red circle", 3))) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda page, photo: page.search_sentence(" \n", 3), "the sentence is empty"),
        (lambda page, photo: page.search_sentence(None, 3), "the sentence is empty"),
        (lambda page, photo: page.search_sentence("a " * 600, 3), "1,199 characters: use at most 1,000"),
        (lambda page, photo: page.search_sentence("a dog", 0), "n is 0"),
        (lambda page, photo: page.search_image(None, "", 3), "choose an image file first"),
        (lambda page, photo: page.search_image(str(photo), "<b>", 3), "use two or more"),
    ],
)
def test_bad_input_gives_one_message(page, photo, call, message):
    answer = call(page, photo)
    assert re.fullmatch('<p class="message">[^<]*</p>', answer), answer
    assert message in answer


def test_text_is_escaped(page, photo, tmp_path):
    text = "<img src=x onerror='1'> & ${1 + 1} {{this}} \udcff"
    assert not set(escape(text)) & set("<>\"'${}\udcff")
    assert html.unescape(escape(text)) == text.replace("\udcff", "?")
    assert "<i>red" not in page.search_image(str(photo), "<i>red</i>,blue", 1)


def test_concurrent_queries_do_not_mix(page, photo):
    queries = [*QUERIES, photo] * 6

    def ask(query):
        return page.search_image(str(query), "red,blue", 5) if query is photo else page.search_sentence(query, 5)

    alone = [ask(query) for query in queries[:4]] * 6
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, queries)) == alone


# ---- command ----------------------------------------------------------------------------------------------------


def test_missing_package_is_one_line(trained_run, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = refused(app.main, ["--run", trained_run])
    assert line == "the page needs the package gradio: pip install gradio"


@pytest.mark.parametrize("port", [0, 65536])
def test_port_is_checked(port, refused):
    assert f"port is {port}: use 1 to 65535" in refused(app.main, ["--port", port])


def test_import_needs_neither_training_nor_gradio():
    code = "import sys, extras.app; assert not {'main', 'gan', 'gradio'} & set(sys.modules)"
    finished = run_python("-c", code)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A folder with two images, one with a name that is markup, and a file that is no image of the index."""
    folder = tmp_path_factory.mktemp("gallery")
    names = ["plain.png", "<b>${7 * 7} {{this}}.png" if sys.platform != "win32" else "${7 * 7} {{this}}.png"]
    for seed, name in enumerate(names):
        draw_image(folder / name, seed=seed)
    draw_image(folder / "secret.png", seed=5)
    (folder / "secret.png").rename(folder / ".secret.png")  # hidden files are not searched
    return folder


@pytest.fixture(scope="module")
def server(trained_run, gallery, tmp_path_factory):
    """The address of a running page; Ctrl-C must end it with status 130."""
    pytest.importorskip("gradio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = tmp_path_factory.mktemp("server") / "output.txt"
    words = ["-m", "extras.app", "--run", trained_run, "--images", gallery, "--port", port, "--device", "cpu"]
    process = start_python(*words, output=output)
    try:
        started = time.monotonic()
        while "(Ctrl-C ends the server)" not in output.read_text():
            assert process.poll() is None and time.monotonic() < started + 120, output.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        if sys.platform != "win32":
            before = len(output.read_text())  # gradio logs what the hostile requests of the tests raised
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert output.read_text()[before:] == "\nstopped\n"
    finally:
        process.kill()
        process.wait()


def request(address, data=None, **headers):
    """The status and the text of a response."""
    content = None if data is None else json.dumps(data).encode()
    headers = {"Content-Type": "application/json", **headers}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(address, content, headers), timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def call(server, function, *data):
    """The result of a function of the page, called as a program does; None after an error."""
    _, event = request(f"{server}/gradio_api/call/{function}", {"data": data})
    _, events = request(f"{server}/gradio_api/call/{function}/{json.loads(event)['event_id']}")
    lines = dict(zip(re.findall("event: (.*)", events), re.findall("data: (.*)", events), strict=True))
    return json.loads(lines["complete"])[0] if "complete" in lines else None


def test_server_serves_no_files(server, gallery):
    assert request(server)[0] == 200
    files = ["/etc/passwd", gallery / "plain.png", gallery / ".secret.png", Path(app.__file__)]
    for file in files:
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/%66ile=", "/gradio_api/proxy="):
            status, content = request(f"{server}{route}{file}")
            assert status in (403, 404) and "root:" not in content
    assert request(f"{server}/gradio_api/file=http://127.0.0.1:1/x")[0] == 403
    assert request(f"{server}/static/../../../../../../etc/passwd")[0] in (403, 404)
    assert request(server, Host="example.com")[0] == 403  # a foreign name that was bound to this address


def test_server_answers_with_indexed_images_only(server, gallery):
    answer = call(server, "search_sentence", "a red circle", 2)
    assert {name for name, _ in found(answer)} == {path.name for path in gallery.glob("[!.]*")}
    assert "the sentence is empty" in call(server, "search_sentence", "", 2)
    for file in (gallery / "plain.png", gallery / ".secret.png", "/etc/passwd"):  # of the server, not uploaded
        upload = {"path": str(file), "meta": {"_type": "gradio.FileData"}}
        assert call(server, "search_image", upload, "", 1) is None
    assert found(call(server, "search_sentence", "a red circle", 1))


def test_taken_port_is_one_line(server, trained_run, gallery):
    port = server.rsplit(":", 1)[1]
    finished = run_python("-m", "extras.app", "--run", trained_run, "--images", gallery, "--port", port)
    assert finished.returncode == 2 and "Traceback" not in finished.stderr
    assert f"127.0.0.1:{port} cannot be opened" in finished.stderr.splitlines()[-1]


@pytest.fixture
def tab(server):
    """A tab of a headless browser with the page, and the hosts that it has asked."""
    playwright = pytest.importorskip("playwright.sync_api")
    programs = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    if not any(programs):
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=next(filter(None, programs)), args=["--no-sandbox"])
        tab = browser.new_page()
        tab.hosts = set()
        tab.on("request", lambda request: tab.hosts.add(re.match("data:|blob:|https?://[^/]*", request.url)[0]))
        tab.goto(server)
        yield tab
        browser.close()


def test_browser_shows_the_images_of_a_sentence_and_of_an_upload(tab, server, gallery, tmp_path):
    sentence = tab.get_by_label("What should the image show?")
    sentence.fill("a red circle")
    sentence.press("Enter")
    tab.wait_for_function("[...document.querySelectorAll('.images img')].filter(x => x.naturalWidth > 0).length == 2")
    names = {text.split("\n")[0] for text in tab.locator("figcaption").all_inner_texts()}
    assert names == {path.name for path in gallery.glob("[!.]*")}  # as text: neither markup nor a template
    assert tab.locator("figcaption b").count() == 0
    tab.get_by_role("tab", name="Image").click()
    tab.get_by_label("Labels").fill("red,blue")
    tab.locator("input[type=file]").set_input_files(gallery / "plain.png")
    tab.wait_for_selector(".bar")
    assert tab.locator(".table").count() == 2 and "1.000" in tab.locator("figcaption").first.inner_text()
    (tmp_path / "text.png").write_text("not an image")
    tab.get_by_label("Remove").or_(tab.get_by_label("Clear")).first.click()
    tab.locator("input[type=file]").set_input_files(tmp_path / "text.png")
    assert "cannot be read as an image" in tab.wait_for_selector(".message").inner_text()
    assert tab.hosts <= {server, "data:", "blob:"}
