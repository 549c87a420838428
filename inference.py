"""Search with a trained run: `python inference.py "two dogs on the grass"`; `--help` lists the options.

Embeddings are computed once and cached in the run's index/ folder. From Python:
`inference.Searcher("runs/demo").search("a red ring on grass", n=3)`.
"""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import InputError
from utils.cli import exit_on_input_error
from utils.flags import OneLineParser
from utils.image_files import is_image_name, printable_name

FLAGS = {  # those that each job uses, besides --run, --device and --json
    "a search for a sentence": {"images", "plus", "minus", "n", "output"},
    "--image": {"images", "captions_path", "plus", "minus", "n", "output"},
    "--labels": {"image", "template", "output"},
    "--evaluate": {"images", "captions_path", "split"},
    "--zero_shot": {"images", "labels", "template", "output"},
}
PLOT_SUFFIXES = (".png", ".jpg", ".webp", ".pdf", ".svg")


def parse_arguments(argv=None):
    """The checked command line; raises InputError."""
    parser = OneLineParser(prog="inference.py", description="Search images with a trained run.", allow_abbrev=False)
    add = parser.add_argument
    add("query", nargs="*", help="what the image should show; each sentence is a separate query; -: lines of the input")
    add("--run", nargs="+", metavar="FOLDER", help="trained run (default: the newest in runs/); several: an ensemble")
    add("--images", "--image_path", metavar="FOLDER", help="image folder (default: the run's test images)")
    addend = {"action": "append", "default": [], "metavar": "X"}
    add("--plus", **addend, help="add a sentence or an image file to the query; 0.5:X weights it")
    add("--minus", **addend, help="subtract a sentence or an image file from the query; 0.5:X weights it")
    add_one_of = parser.add_mutually_exclusive_group().add_argument
    add_one_of("--image", metavar="FILE", help="find the best captions for an image, and similar images")
    add_one_of("--evaluate", action="store_true", help="retrieval metrics of a split")
    add(
        "--split",
        choices=("train", "validation", "test", "all"),
        help="split for --evaluate (default: the run's test images; all images of another data set)",
    )
    add_one_of("--zero_shot", metavar="PATH", help="accuracy on a folder of labelled subfolders, or an image,label CSV")
    add("--labels", metavar="A,B,...", help="with --image: classify it; with --zero_shot: the candidate labels")
    add("--template", action="append", help='prompt for a label, e.g. "a photo of a {}"; repeatable (default: four)')
    add("--captions_path", metavar="FILE", help="captions for --evaluate or --image (default: the run's)")
    add("--n", type=int, help="number of results, 1 or more (default: 9, or all if there are fewer)")
    add(
        "--output", default="matches.png", help=f"plot file, {', '.join(PLOT_SUFFIXES)}, or none (default: %(default)s)"
    )
    add("--json", action="store_true", help="print JSON")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    a = parser.parse_args(argv)
    other_mode = "--evaluate" if a.evaluate else "--zero_shot" if a.zero_shot else ""
    no_mode = not (other_mode or a.image)
    if a.run and no_mode and not a.query:  # --run runs/x "a dog": argparse reads the sentence as another run
        folders = [word for word in a.run[1:] if os.path.isdir(word) or "/" in word or "\\" in word]
        a.query = [word for word in a.run[1:] if word not in folders]
        a.run = [a.run[0], *folders]
    if a.query == ["-"]:
        a.query = [line.strip() for line in sys.stdin if line.strip()]
    output, suffixes = Path(a.output), ", ".join(PLOT_SUFFIXES)
    no_query = not a.query or not all(sentence.strip() for sentence in a.query)
    taken = f" ({a.run[-1]!r} was read as a run)" if a.run and len(a.run) > 1 else ""
    file = next((name for name in a.query if os.path.isfile(name)), None)
    plot_file = output.suffix.lower() in PLOT_SUFFIXES and output.parent.is_dir() and not output.is_dir()
    for refused, message in (
        (a.output != "none" and not plot_file, f"output is {a.output}: use a {suffixes} file in an existing folder"),
        (a.n is not None and a.n < 1, f"n is {a.n}: use 1 or more"),
        (a.images == "", "images is empty: use a folder of images, or drop --images"),
        (a.query and other_mode, f"{other_mode} cannot be combined with a sentence"),
        (a.query and a.image, "pass a sentence or --image; to combine them: a sentence and --plus IMAGE"),
        (a.evaluate and (a.images is None) != (a.captions_path is None), "pass both --images and --captions_path"),
        (no_mode and a.labels is not None, "--labels needs --image or --zero_shot"),
        (no_mode and no_query, f'the query is empty{taken}: python inference.py "two dogs on the grass"'),
        (file, f"the query is {file}, a file: to search with an image, pass --image {file}"),
    ):
        if refused:
            raise InputError(message)
    job = other_mode or ("--labels" if a.labels is not None else "--image" if a.image else "a search for a sentence")
    for name in sorted(vars(a).keys() - FLAGS[job] - {"query", "run", "device", "json", job.removeprefix("--")}):
        if getattr(a, name) != parser.get_default(name):
            raise InputError(f"--{name} is not used by {job}: drop it")
    return a


if __name__ == "__main__":
    exit_on_input_error(parse_arguments)()  # before the heavy imports, so that --help and flag errors return at once

import torch

from clip import load_model
from dataset import EvaluationImages, ImageStore, check_files
from utils.device import setup_device
from utils.embed import embed_captions, encode_dataset, fast_image_encoder, image_batch_size
from utils.formats import clean_text
from utils.image_cache import storage_resolution
from utils.plotting import MATCH, WEAK, plot_bars, plot_grid, report_plot
from utils.runs import newest_run

DECISIONS = {True: ("match", MATCH), False: ("weak", WEAK), None: ("", None)}  # name, and colour in plots


def embed_images(model, image_files, batch_size=64, amp_dtype=None, desc="embedding images", failed=None):
    """(N, D) unit vectors of N image files, float32, on the model's device; raises InputError.

    With a dict `failed`, unreadable images are recorded there instead, {position: reason}.
    """
    size = model.config.size
    store = ImageStore([Path(file) for file in image_files], storage_resolution(size))
    images = EvaluationImages(store, range(len(store)), size, failed)
    batch_size, encoder = image_batch_size(model.device, batch_size), fast_image_encoder(model, len(store), amp_dtype)
    return encode_dataset(
        lambda batch: model.project_image(encoder(batch)), images, model.device, amp_dtype, batch_size, desc=desc
    )


def find_matches(model, image_embeddings, query, image_filenames, n=9):
    """The n best matching images of N unit vectors (N, D) as (filename, cosine similarity) pairs; raises InputError."""
    if not query.strip():
        raise InputError("the query is empty: describe what the image should show")
    if len(image_embeddings) != len(image_filenames):
        raise ValueError(f"{len(image_embeddings)} embeddings and {len(image_filenames)} filenames")
    if not 1 <= n <= len(image_filenames):
        raise InputError(f"n is {n}, with {len(image_filenames)} images to search: use 1 to {len(image_filenames)}")
    scores = image_embeddings @ embed_captions(model, [query])[0].to(image_embeddings.device)
    return [(image_filenames[i], scores[i].item()) for i in scores.topk(n).indices.tolist()]


class Searcher:
    """Finds images for sentences and images, and captions for images; raises InputError.

    Args:
        runs: folder of a trained run (default: the newest in runs/), or several, whose similarities are averaged.
        images: folder of images to search (default: the test images of the first run's data set).
        captions_path: captions file to search (default: the captions of those test images).
    """

    def __init__(self, runs=None, images=None, captions_path=None, device="auto"):
        from extras.search_index import list_gallery, open_run

        self.captions_path, self.loaded = captions_path, {}
        device, folders = setup_device(device)[0], as_folders(runs)
        with ThreadPoolExecutor(1) as background:  # image files are listed while the weights are loaded
            gallery = background.submit(list_gallery, images, folders[0])
            self.runs = [open_run(folder, device) for folder in folders]
            self.gallery = gallery.result()

    def search(self, query, n=None, kind="images", plus=(), minus=()):
        """The n best results (default: 9) for a sentence or the `Path` of an image, a list of dicts, best first.

        Each has the keys file (or caption, if `kind` is "captions"), score (cosine similarity), z_score and match (see
        `rank`). `plus` and `minus` are as on the command line, e.g. plus=["0.5:sunset"], minus=["people", "photo.jpg"].
        """
        return self.answer(build_query(query, plus, minus), n, kind)["results"]

    def answer(self, query, n=None, kind="images"):
        """Answer a query from `build_query`: a dict of query, kind, searched (number of candidates), match, results."""
        names, vectors = self.index(kind)
        n = min(9, len(names)) if n is None else n
        if n < 1 or (n > len(names) and kind == "images"):
            raise InputError(f"n is {n}, with {len(names)} {kind} to search: use 1 to {len(names)}")
        searched = len(names) - int(vectors[0][:, 0].isnan().sum())
        scores = mean_scores(vectors, [query_vector(run.model, query) for run in self.runs])
        for _, value in query:
            if kind == "images" and isinstance(value, Path):
                scores[self.gallery.rows_of(value)] = torch.nan  # an image is not its own match
        results = rank(scores, n, self.threshold(query, kind, searched))
        for result in results:
            name = names[result.pop("row")]
            result |= {"caption": name} if kind == "captions" else {"file": (self.gallery.root / name).as_posix()}
        decisions = {result["match"] for result in results}
        match = None if None in decisions or not decisions else True in decisions
        return {"query": format_query(query), "kind": kind, "searched": searched, "match": match, "results": results}

    def index(self, kind):
        """N image names or captions, and for each run their vectors (N, D); NaN for unreadable images."""
        from extras.search_index import index_captions, index_images, list_captions

        if kind not in ("images", "captions"):
            raise ValueError(f"kind is {kind!r}: use 'images' or 'captions'")
        if kind not in self.loaded and kind == "images":
            self.loaded[kind] = self.gallery.names, [index_images(run, self.gallery).vectors for run in self.runs]
        elif kind not in self.loaded:
            captions, *source = list_captions(self.runs[0].model.config, self.captions_path)
            self.loaded[kind] = captions, [index_captions(run, captions, *source).vectors for run in self.runs]
        return self.loaded[kind]

    def threshold(self, query, kind, num_searched):
        """The minimum score of a match; None for combined queries and for image-to-image search."""
        from extras.match_threshold import choose_threshold, load_match_rates

        if len(query) > 1 or isinstance(query[0][1], str) != (kind == "images"):
            return None
        if "rates" not in self.loaded:
            self.loaded["rates"] = load_match_rates(self.runs)
        direction = "text_to_image" if kind == "images" else "image_to_text"
        return self.loaded["rates"] and choose_threshold(self.loaded["rates"], direction, num_searched)


def as_folders(runs):
    """A list of run folders from one folder, several, or None (the newest trained run)."""
    return [runs] if isinstance(runs, str | Path) else list(runs or [newest_run(trained=True)])


def build_query(start, plus=(), minus=()):
    """A query as a weighted sum, [(weight, sentence or Path), ...]; raises InputError."""
    if not str(start).strip():
        raise InputError("the query is empty: describe what the image should show")
    query = [(1.0, query_part(start))]
    for flag, sign, text in [("--plus", 1, text) for text in plus] + [("--minus", -1, text) for text in minus]:
        weight, value = re.fullmatch(r"(?:(\d+\.?\d*|\.\d+):)?(.*)", text, re.DOTALL).groups()
        if not value.strip():
            raise InputError(f"{flag} is {text!r}, without a sentence or an image file")
        query.append((sign * float(weight or 1), query_part(value, flag)))
    return query


def query_part(value, flag=""):
    """A `Path` for the name of an image or any file that exists, else a sentence; raises InputError."""
    if isinstance(value, str) and not os.path.isfile(value) and not (flag and is_image_name(value)):
        return clean_text(value)
    if flag:
        check_files([Path(value)], flag)
    return Path(value)


def format_query(query):
    """A query as text, e.g. `a beach - people + 0.5 x sunset`."""
    text = ""
    for weight, value in query:
        name = value.name if isinstance(value, Path) else value
        sign = f" {'+' if weight > 0 else '-'} " if text else ""
        text += sign + (name if abs(weight) == 1 else f"{abs(weight):g} x {name}")
    return text


def query_vector(model, query):
    """(D,): the weighted sum of the unit vectors of a query's parts, divided by the sum of the absolute weights."""
    total = 0
    for weight, value in query:
        vectors = embed_images(model, [value], desc=None) if isinstance(value, Path) else embed_captions(model, [value])
        total = total + weight * vectors[0].cpu()
    return total / max(sum(abs(weight) for weight, _ in query), 1e-9)


def mean_scores(vectors, query_vectors):
    """(N,) scores, the mean over the runs, from each run's vectors (N, D) and query (D,); D may differ."""
    return sum(v @ query for v, query in zip(vectors, query_vectors, strict=True)) / len(vectors)


def rank(scores, n, threshold=None):
    """The n best rows of (N,) scores, best first: dicts of row, score, z_score and match; NaN scores are excluded.

    The z-score is the distance from the mean score in standard deviations. `match` tells whether the score is at least
    `threshold`; it is None without a threshold (no decision).
    """
    valid = scores[~scores.isnan()]
    if not len(valid):
        return []
    mean, std = valid.mean().item(), valid.std(correction=0).item()
    best = scores.nan_to_num(-torch.inf).topk(min(n, len(valid)))
    results = []
    for row, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        z_score = (score - mean) / std if std > 1e-7 else 0.0
        match = None if threshold is None else score >= threshold
        results.append({"row": row, "score": score, "z_score": z_score, "match": match})
    return results


@exit_on_input_error
def main(argv=None):
    """Search images, classify an image, or evaluate, with a trained run or an ensemble of runs."""
    arguments = parse_arguments(argv)
    if arguments.image:
        check_files([Path(arguments.image)], "--image")
    if arguments.evaluate or arguments.zero_shot or arguments.labels is not None:
        from extras.evaluation import evaluate
        from extras.zero_shot import classify, evaluate_zero_shot

        job = evaluate if arguments.evaluate else evaluate_zero_shot if arguments.zero_shot else classify
        device, _ = setup_device(arguments.device)
        job([load_model(folder, device) for folder in as_folders(arguments.run)], arguments)
        return
    starts = [Path(arguments.image)] if arguments.image else arguments.query
    queries = [build_query(start, arguments.plus, arguments.minus) for start in starts]
    searcher = Searcher(arguments.run, arguments.images, arguments.captions_path, arguments.device)
    runs = ", ".join(run.folder.parent.as_posix() for run in searcher.runs)
    print(f"{runs}: {len(searcher.gallery.names):,} images in {searcher.gallery.root}", file=sys.stderr)
    n, answers = arguments.n, []
    if arguments.image and len(queries[0]) == 1:
        answers = [searcher.answer(queries[0], n, "captions")]
        n = n and min(n, len(searcher.gallery.names))
    answers += [searcher.answer(query, n) for query in queries]
    print_answers(answers, arguments.json)
    if arguments.output != "none":
        plot_answers(answers, arguments)


def print_answers(answers, as_json):
    """Print JSON, or lines of score, z-score, match decision, kind, query and file or caption, separated by tabs."""
    lines = [json.dumps(answers)] if as_json else []
    for each, r in [] if as_json else [(answer, r) for answer in answers for r in answer["results"]]:
        decision, query = DECISIONS[r["match"]][0] or "-", " ".join(each["query"].split())
        cells = [f"{r['score']:.4f}", f"{r['z_score']:+.1f}", decision, each["kind"], query]
        lines.append("\t".join([*cells, printable_name(r.get("file") or r["caption"])]))
    try:
        print("".join(f"{line}\n" for line in lines), end="", flush=True)
    except BrokenPipeError:  # closed by `| head`; Python would raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for each in answers:
        if each["match"] is False:
            print(f"no good match for {each['query']!r} among {each['searched']:,} {each['kind']}", file=sys.stderr)


def plot_answers(answers, arguments):
    """Save the images found as a grid, and captions as bars in a second plot."""
    panels, output = [], Path(arguments.output)
    for answer in answers:
        results, heading = answer["results"], answer["query"]
        heading += "\nno good match; the most similar images:" if answer["match"] is False else ""
        colors = [DECISIONS[r["match"]][1] for r in results]
        if answer["kind"] == "captions":
            path = output.with_stem(f"{output.stem}_captions")
            captions, scores = [r["caption"] for r in results], [r["score"] for r in results]
            report_plot("captions", path, plot_bars(arguments.image, heading, captions, scores, colors, path))
        elif results:
            panels.append((heading, [r["file"] for r in results], [image_title(r) for r in results], colors))
    if panels:
        report_plot("images", output, plot_grid(panels, output))
    else:
        print("no images to show", file=sys.stderr)


def image_title(result):
    name = printable_name(Path(result["file"]).name)
    name = name if len(name) < 32 else f"{name[:18]}...{name[-10:]}"
    return f"{name}\n{result['score']:.3f}   z {result['z_score']:+.1f}   {DECISIONS[result['match']][0]}".rstrip()


if __name__ == "__main__":
    main()
