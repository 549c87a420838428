"""Search in the browser: `python -m extras.app --run runs/x --images DIR` opens a local page.

A sentence or an image finds images; an image also finds captions, and is classified with labels typed in the page.
The page receives the images found as data URIs: no file is served from disk, and nothing is requested from a network.
"""

import functools
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from config import InputError
from utils.cli import exit_on_input_error, sigterm_as_interrupt
from utils.flags import OneLineParser
from utils.image_files import NOT_IMAGES, printable_name

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_RESULTS, MAX_TEXT, MAX_UPLOAD = 60, 1000, "100mb"  # images per search, characters, size of an image file
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "GRADIO_ALLOWED_PATHS": ""}
# The browser loads nothing from other hosts, whatever the page contains.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
STYLE = Path(__file__).with_suffix(".css")


def parse_arguments(argv=None):
    """The checked command line; raises InputError."""
    parser = OneLineParser(prog="python -m extras.app", description="Search images in the browser.", allow_abbrev=False)
    add = parser.add_argument
    add("--run", nargs="+", metavar="FOLDER", help="trained run (default: the newest in runs/); several: an ensemble")
    add("--images", "--image_path", metavar="FOLDER", help="image folder (default: the run's test images)")
    add("--captions_path", metavar="FILE", help="captions for an uploaded image (default: the run's)")
    add("--host", default="127.0.0.1", help="address; 0.0.0.0 is open to the network (default: %(default)s)")
    add("--port", type=int, default=7860, help="port, 1 to 65535 (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.port <= 65535:
        raise InputError(f"port is {arguments.port}: use 1 to 65535")
    return arguments


if __name__ == "__main__":
    exit_on_input_error(parse_arguments)()  # before the heavy imports, so that --help and flag errors return at once

from PIL import Image

from extras.result_html import RESOLUTION, answer_html, escape, image_source, labels_html
from extras.zero_shot import label_logits, parse_labels
from inference import Searcher
from utils.formats import clean_text
from utils.image_cache import load_image


def answer_or_message(method):
    """Decorate a method that returns HTML: one call at a time, and InputError becomes a message in the page."""

    @functools.wraps(method)
    def wrapped(self, *inputs):
        try:
            with self.lock:
                return method(self, *inputs)
        except (InputError, OSError) as error:
            return f'<p class="message">{escape(error)}</p>'

    return wrapped


class Page:
    """The functions of the page: they take what the user entered and return HTML."""

    def __init__(self, searcher):
        self.searcher, self.lock, self.kinds = searcher, threading.Lock(), ["images"]
        self.searcher.answer([(1.0, "image")], 1)  # embeds new images and fits the threshold, before the first query
        try:
            self.searcher.index("captions")
            self.kinds = ["captions", "images"]
        except InputError as error:
            print(f"no captions for uploaded images: {error}", file=sys.stderr)

    @answer_or_message
    def search_sentence(self, sentence, n):
        """Images for a sentence. It is never read as a file name, as it is on the command line."""
        sentence = check_text(sentence, "sentence")
        return answer_html(self.searcher.answer([(1.0, sentence)], min(int(n), MAX_RESULTS)))

    @answer_or_message
    def search_image(self, file, labels, n):
        """Label probabilities, captions and similar images for an uploaded file."""
        file = check_upload(file)
        parts = [f'<p><img class="query" src="{image_source(file)}" alt="query"></p>']
        if (labels or "").strip():
            labels = parse_labels(check_text(labels, "list of labels"))
            probabilities = label_logits([run.model for run in self.searcher.runs], [file], labels)[0].softmax(0)
            parts.append(labels_html(labels, probabilities.tolist()))
        for kind in self.kinds:
            count = 5 if kind == "captions" else min(int(n), MAX_RESULTS)
            parts.append(answer_html(self.searcher.answer([(1.0, file)], count, kind)))
        return "".join(parts)


def check_text(text, name):
    """Text from the page without surrounding space; raises InputError if it is empty or too long."""
    text = clean_text(text or "").strip()
    if not text:
        raise InputError(f"the {name} is empty")
    if len(text) > MAX_TEXT:
        raise InputError(f"the {name} has {len(text):,} characters: use at most {MAX_TEXT:,}")
    return text


def check_upload(file):
    """The `Path` of an uploaded file; InputError if it cannot be read as an image."""
    if not file:
        raise InputError("choose an image file first")
    file = Path(file)
    try:
        with Image.open(file) as image:
            if image.format in NOT_IMAGES:  # told by the content: decoding EPS starts another program
                raise InputError(f"the format is {image.format}")
        load_image(file, RESOLUTION)
    except Exception as error:  # decoders raise exceptions of almost any type
        reason = " ".join(str(error.__cause__ or error).split()).replace(str(file), file.name)
        raise InputError(f"{printable_name(file.name)} cannot be read as an image ({reason})") from None
    return file


class Guard:
    """ASGI middleware: refuses foreign host names (DNS rebinding) and requests for files, and sets `POLICY`."""

    def __init__(self, app, hosts):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send):
        from starlette.responses import PlainTextResponse

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        if scope["type"] == "http":
            host = urlsplit(f"//{dict(scope['headers']).get(b'host', b'').decode('latin-1')}").hostname
            foreign = self.hosts and host not in self.hosts
            if foreign or any(part in scope["path"] for part in ("/file=", "/file/", "/proxy=")):
                await PlainTextResponse("refused", status_code=403)(scope, receive, send)
                return
        await self.app(scope, receive, send_with_policy)


def import_gradio(cache):
    """The package gradio, without telemetry, with the folder `cache` for uploads; raises InputError."""
    os.environ.update(ENVIRONMENT, GRADIO_TEMP_DIR=str(cache))  # read at import
    os.environ.setdefault("NO_PROXY", ",".join(LOOPBACK))  # gradio asks its own server whether it runs
    try:
        import gradio
    except ImportError as error:
        raise InputError(f"the page needs the package {error.name}: pip install gradio") from None
    return gradio


def build_page(gradio, page):
    """The `gradio.Blocks` of a `Page`."""
    maximum = min(len(page.searcher.gallery.names), MAX_RESULTS)
    with gradio.Blocks(title="Image search", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        with gradio.Tab("Sentence"), gradio.Row(equal_height=True):
            sentence = gradio.Textbox(label="What should the image show?", max_length=MAX_TEXT, autofocus=True, scale=5)
            find = gradio.Button("Search", variant="primary", scale=0, min_width=140)
        with gradio.Tab("Image"), gradio.Row(equal_height=True):
            file = gradio.File(label="Image file", height=130, scale=2)
            labels = gradio.Textbox(label="Labels, separated by commas (optional)", max_length=MAX_TEXT, scale=3)
            describe = gradio.Button("Search", variant="primary", scale=0, min_width=140)
        count = gradio.Slider(1, maximum, min(maximum, 9), step=1, label="Number of images")
        found = gradio.HTML()
        gradio.on([sentence.submit, find.click], page.search_sentence, [sentence, count], found)
        gradio.on([file.upload, labels.submit, describe.click], page.search_image, [file, labels, count], found)
    return blocks


@exit_on_input_error
def main(argv=None):
    """Open the page and serve it until Ctrl-C."""
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="uploads", ignore_cleanup_errors=True) as cache, sigterm_as_interrupt():
        gradio = import_gradio(cache)
        searcher = Searcher(arguments.run, arguments.images, arguments.captions_path, arguments.device)
        blocks = build_page(gradio, Page(searcher))
        serve(gradio, blocks, arguments.host, arguments.port)
        print(f"{len(searcher.gallery.names):,} images; open {blocks.local_url} (Ctrl-C ends the server)", flush=True)
        try:
            while True:
                time.sleep(1)
        finally:
            blocks.close(verbose=False)


def serve(gradio, blocks, host, port):
    """Start the server in the background; raises InputError."""
    from starlette.middleware import Middleware

    guard = Middleware(Guard, hosts=LOOPBACK if host in LOOPBACK else ())
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    off = dict.fromkeys(("share", "ssr_mode", "mcp_server", "pwa", "enable_monitoring", "inbrowser"), False)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=MAX_UPLOAD,
            app_kwargs={"middleware": [guard]},
            theme=theme,
            css=STYLE.read_text(encoding="utf-8"),
            **off,
        )
    except OSError:
        raise InputError(f"{host}:{port} cannot be opened: is another program using it? Pass another --port") from None


if __name__ == "__main__":
    main()
