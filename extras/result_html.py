"""HTML of search results for the page of `extras.app`, with images as data URIs."""

import html
import io

from config import InputError
from inference import DECISIONS, image_title
from utils.image_cache import load_image
from utils.image_files import printable_name
from utils.report_page import data_uri

RESOLUTION = 640  # pixels of the longer edge of an image in the page


def escape(text):
    """Text for the page, also inert in the templates of gr.HTML, `${...}` and `{{...}}`."""
    text = str(text).encode("utf-8", "replace").decode()
    return html.escape(text).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def image_source(file):
    """An image file as a JPEG data URI; empty if it can no longer be read."""
    try:
        image = load_image(file, RESOLUTION)
    except (InputError, OSError):
        return ""
    image.thumbnail((RESOLUTION, RESOLUTION))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return data_uri(buffer.getvalue(), "jpeg")


def answer_html(answer):
    """The results of `Searcher.answer`: captions as a table, images as a grid with coloured frames."""
    results, kind, cells = answer["results"], answer["kind"], []
    heading = f"{len(results)} of {answer['searched']:,} {kind}"
    heading += ": no good match, these are the most similar" if answer["match"] is False else ""
    for result in results:
        decision, color = DECISIONS[result["match"]]
        if kind == "captions":
            numbers = f"{result['score']:.3f}", f"z {result['z_score']:+.1f}", decision
            cells.append(table_row([*numbers, escape(printable_name(result["caption"]))], 2))
        else:
            name, source = escape(printable_name(result["file"])), image_source(result["file"])
            image = f'<img src="{source}" alt="cannot be read" style="border-color: {color or "transparent"}">'
            title = f"<figcaption>{escape(image_title(result))}</figcaption>"
            cells.append(f'<figure tabindex="0" title="{name}">{image}{title}</figure>')
    tag, style = ("table", "table") if kind == "captions" else ("div", "images")
    return f'<h3>{heading}</h3><{tag} class="{style}">{"".join(cells)}</{tag}>'


def labels_html(labels, probabilities):
    """A table of labels with bars, the most probable first."""
    rows = []
    for probability, label in sorted(zip(probabilities, labels, strict=True), reverse=True):
        bar = f'<div style="width: 16rem"><div class="bar" style="width: {100 * probability:.1f}%"></div></div>'
        rows.append(table_row([f"{100 * probability:.1f}%", escape(label), bar], 1))
    return f'<h3>Labels</h3><table class="table">{"".join(rows)}</table>'


def table_row(cells, num_numbers):
    """A row of a table, whose first cells are numbers."""
    kinds = [' class="number"'] * num_numbers + [""] * (len(cells) - num_numbers)
    return f"<tr>{''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds, cells, strict=True))}</tr>"
