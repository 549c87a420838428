"""Search with a trained run, in every direction: `python inference.py "two dogs on the grass"`, `--help` for the rest.

Sentences find pictures, a picture finds captions and pictures like it, labels are told apart, and all of it is
evaluated. Pictures and captions are embedded once and kept in an index beside the run.
"""

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from calibration import calibration_of, threshold
from clip import read_saved, retrieval_metrics, setup_device
from config import InputError, OneLineParser, build_config, exit_on_input_error
from dataset import captions_by_image, check_files, load_splits, make_pairs, read_captions
from index import (
    PICTURES,
    embed_captions,
    embed_images,
    index_captions,
    index_pictures,
    open_run,
    scan_pictures,
    stamp_array,
    stamp_of,
)
from pictures import MATCH, WEAK, draw_bars, draw_confusion, draw_grid
from zero_shot import TEMPLATES, evaluate_labels, label_logits, parse_labels, read_labelled

FORMATS = (".png", ".jpg", ".webp", ".pdf", ".svg")  # of the picture written
MOST_ROWS = 60  # of a grid: beyond, the picture would be larger than matplotlib can draw
MOST_BARS = 20  # of a chart


def find_matches(model, image_embeddings, query, image_filenames, n=9):
    """The n best matching images as (filename, cosine similarity) pairs, the best first; raises InputError."""
    if not query.strip():
        raise InputError("the query is empty: say what the picture should show")
    if len(image_embeddings) != len(image_filenames):
        raise ValueError(f"{len(image_embeddings)} embeddings and {len(image_filenames)} filenames")
    if not 1 <= n <= len(image_filenames):
        raise InputError(f"n is {n}, with {len(image_filenames)} pictures to search: give --n from 1 to that many")
    scores = image_embeddings @ embed_captions(model, [query])[0].to(image_embeddings.device)
    best = scores.topk(n)
    return [(image_filenames[i], s) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


# ---- queries ----------------------------------------------------------------------------------------------------


@dataclass
class Query:
    """A weighted sum of sentences and pictures: parts of (weight, sentence or Path); `text` is how it is shown."""

    text: str
    parts: list

    @property
    def is_sentence(self):
        return len(self.parts) == 1 and isinstance(self.parts[0][1], str)

    @property
    def pictures(self):
        return [value for _, value in self.parts if isinstance(value, Path)]


def build_queries(arguments):
    """The queries of a command line: each sentence, or else the picture, with what --plus and --minus add to it."""
    extra = [parse_part(text, 1) for text in arguments.plus] + [parse_part(text, -1) for text in arguments.minus]
    starts = list(arguments.query) or ([Path(arguments.image)] if arguments.image else [])
    if not starts or any(not str(start).strip() for start in starts):
        taken = f" ({arguments.run[-1]!r} was taken for a run)" if arguments.run and len(arguments.run) > 1 else ""
        raise InputError(f'the query is empty{taken}: python inference.py "two dogs on the grass"')
    for start in arguments.query:
        if Path(start).suffix.lower() in PICTURES and os.path.isfile(start):
            raise InputError(f"the query is {start}, a picture: give --image {start}")
    suffix = "".join(f" {'+' if w > 0 else '-'} {shown(value, abs(w))}" for w, value in extra)
    return [Query(shown(start, 1) + suffix, [(1.0, start), *extra]) for start in starts]


def parse_part(text, sign):
    """(weight, sentence or Path) of an addend: `people`, `0.5:people`, `photo.jpg`, `0.5:photo.jpg`."""
    weighted = re.fullmatch(r"(\d+\.?\d*|\.\d+):(.*)", text, re.DOTALL)
    weight, value = (float(weighted[1]), weighted[2]) if weighted else (1.0, text)
    if not value.strip():
        raise InputError(f"--{'plus' if sign > 0 else 'minus'} is {text!r}: say what to add or take away")
    if Path(value).suffix.lower() in PICTURES:
        check_files([Path(value)], f"--{'plus' if sign > 0 else 'minus'}")
        return sign * weight, Path(value)
    return sign * weight, value


def shown(value, weight):
    name = value.name if isinstance(value, Path) else value
    return name if weight == 1 else f"{weight:g} x {name}"


def query_vectors(run, queries):
    """(Q, D): of each query the weighted sum of its parts' unit vectors, divided by the sum of the weights' sizes."""
    values = list(dict.fromkeys(value for query in queries for _, value in query.parts))
    sentences = [value for value in values if isinstance(value, str)]
    files = [value for value in values if isinstance(value, Path)]
    vectors = {}
    if sentences:
        vectors |= dict(zip(sentences, embed_captions(run.model, sentences).cpu(), strict=True))
    if files:
        vectors |= dict(zip(files, embed_images(run.model, files, description=None).cpu(), strict=True))
    sums = [sum(weight * vectors[value] for weight, value in query.parts) for query in queries]
    sizes = [max(sum(abs(weight) for weight, _ in query.parts), 1e-9) for query in queries]
    return torch.stack([total / size for total, size in zip(sums, sizes, strict=True)])


def average_scores(vectors, queries):
    """(Q, N) scores, the mean over several runs: vectors (N, D) and queries (Q, D) of each run, D may differ."""
    # One query at a time: over a million vectors a product with one vector is faster than with a matrix of few rows.
    scores = [torch.stack([v @ query for query in q]) for v, q in zip(vectors, queries, strict=True)]
    return torch.stack(scores).mean(0) if len(scores) > 1 else scores[0]


def rank(scores, n, least=None, skip=()):
    """The n best rows as dicts of row, score, deviation and match; the rows in `skip` are left out.

    The deviation says how unusual a score is for its query: standard deviations above the mean of all its scores.
    A result is a match if its score is `least` or more; without `least` nobody can tell (None).
    """
    number, others = len(scores), scores
    if skip:
        kept = torch.ones(number, dtype=torch.bool)
        kept[list(skip)] = False
        number, others, scores = int(kept.sum()), scores[kept], scores.masked_fill(~kept, -torch.inf)
    if not number:
        return []
    mean, deviation = others.mean().item(), others.std(correction=0).item()
    best = scores.topk(min(n, number))
    return [
        {
            "row": row,
            "score": score,
            "deviation": (score - mean) / deviation if deviation > 1e-7 else 0.0,
            "match": None if least is None else score >= least,
        }
        for row, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


# ---- what is searched -------------------------------------------------------------------------------------------


@dataclass
class Gallery:
    """N pictures below a folder, with their sizes and times (N, 2); `label` begins the name of their index."""

    root: Path
    names: list
    stamps: np.ndarray
    label: str


def newest_run(folder="runs"):
    """The run trained last."""
    runs = sorted(Path(folder).glob("*/best/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"no trained run in {folder}/: give --run FOLDER, or train one: python main.py --preset demo")
    return runs[-1].parent.parent


def own_split(config):
    """The name and the `Pairs` that a run is searched on when nothing else is named: test, else validation."""
    splits = load_splits(config)
    split = "test" if splits["test"].files else "validation"
    return split, splits[split]


def list_gallery(images, run):
    """The pictures of the folder `images`, or else those of the run itself; raises InputError."""
    if images:
        return Gallery(Path(images), *scan_pictures(images), "pictures")
    config = build_config(read_saved(run)[1]["settings"])
    split, pairs = own_split(config)
    root = Path(config.image_path)
    names = [file.relative_to(root).as_posix() for file in pairs.files]
    return Gallery(root, names, stamp_array([stamp_of(file) for file in pairs.files]), split)


def own_captions(config, path):
    """The different captions to describe a picture with, the file they come from and the name of their index."""
    if path:
        return list(dict.fromkeys(read_captions(path)["caption"])), path, "captions"
    try:
        split, pairs = own_split(config)
    except InputError as error:
        raise InputError(f"the run's own captions cannot be had ({error}): give --captions_path") from None
    return list(dict.fromkeys(pairs.captions)), config.captions_path, f"captions-{split}"


# ---- the command ------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = OneLineParser(prog="inference.py", description="Search pictures with a trained run.", allow_abbrev=False)
    add = parser.add_argument
    add("query", nargs="*", help="what the picture should show; each sentence is a query of its own")
    add("--run", nargs="+", help="a trained run's folder (default: the newest in runs/); several: their average")
    add("--images", help="search any folder of pictures, with its subfolders (default: the run's own)")
    add("--image", help="a picture: the captions that describe it best and the pictures most like it")
    add("--plus", action="append", default=[], help="add a sentence or a picture to the query; 0.5:TEXT weighs it")
    add("--minus", action="append", default=[], help="take a sentence or a picture away from the query; likewise")
    add("--labels", help='with --image: which of these fits, "dog,cat,horse"; with --zero_shot: these labels')
    add("--template", action="append", help='sentence around a label, "a photo of a {}"; may be given several times')
    add("--n", type=int, help="how many results (default: 9, or all where there are fewer)")
    add("--output", default="matches.png", help="the picture to write (default: matches.png)")
    add("--json", action="store_true", help="print JSON")
    add("--evaluate", action="store_true", help="retrieval metrics on a captions file")
    add("--zero_shot", help="accuracy on a folder with one folder per label, or a CSV with the columns image,label")
    add("--image_path", help="the image folder, with --evaluate or the CSV of --zero_shot")
    add("--captions_path", help="the captions file, with --evaluate or --image (default: the run's own)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    arguments = parser.parse_args(argv)
    asked = arguments.query or arguments.image or arguments.evaluate or arguments.zero_shot
    if arguments.run and not asked:  # --run runs/x "a dog": to the parser the sentence is one more run
        first, *others = arguments.run
        named = [word for word in others if os.path.isdir(word) or "/" in word or "\\" in word]
        arguments.query = [word for word in others if word not in named]
        arguments.run = [first, *named]
    return arguments


@exit_on_input_error
def main(argv=None):
    """Search, classify or evaluate, with a trained run or the average of several."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    job = choose_job(arguments)
    device, _ = setup_device(arguments.device)
    folders = arguments.run or [newest_run()]
    if job in (search, describe):
        job(*open_runs_and_gallery(folders, device, arguments.images), arguments)
    else:
        job([open_run(folder, device) for folder in folders], arguments)


def open_runs_and_gallery(folders, device, images):
    """The runs and the `Gallery`: its files are listed while the weights are read, so that nobody waits for both."""
    with ThreadPoolExecutor(1) as background:
        gallery = background.submit(list_gallery, images, folders[0])
        runs = [open_run(folder, device) for folder in folders]
        return runs, gallery.result()


def choose_job(arguments):
    """The function that does what the command line asks for; raises InputError for what does not go together."""
    a = arguments
    output = Path(a.output)
    if output.suffix.lower() not in FORMATS or not output.parent.is_dir() or output.is_dir():
        raise InputError(f"output is {a.output}: give a {', '.join(FORMATS)} file in a folder that exists")
    jobs = [name for name, given in (("--evaluate", a.evaluate), ("--zero_shot", a.zero_shot)) if given]
    if len(jobs) == 2 or (jobs and (a.query or a.image)):
        other = jobs[1] if jobs[1:] else "--image" if a.image else "a sentence"
        raise InputError(f"{jobs[0]} does not go with {other}: give one of them")
    if a.images == "":
        raise InputError("images is empty: name a folder of pictures, or drop --images")
    if a.evaluate:
        if not a.image_path or not a.captions_path:
            raise InputError("--evaluate needs --image_path and --captions_path")
        return evaluate
    if a.zero_shot:
        return evaluate_zero_shot
    if a.image:
        check_files([Path(a.image)], "--image")
        if a.query:
            raise InputError("give a sentence or --image; to combine them: a sentence and --plus PICTURE")
    if a.labels is not None:
        if not a.image:
            raise InputError("--labels needs --image: which picture is to be told apart?")
        return classify
    build_queries(a)
    return describe if a.image and not a.plus and not a.minus else search


def search(runs, gallery, arguments):
    """Pictures for each query: one line per result, and a grid."""
    print_answers(search_pictures(runs, gallery, build_queries(arguments), arguments.n), arguments)


def search_pictures(runs, gallery, queries, n=None):
    """The answer to each query: the n best pictures of the gallery (9, or all where there are fewer)."""
    number, names = len(gallery.names), gallery.names
    n = min(9, number) if n is None else n
    if not 1 <= n <= number:
        raise InputError(f"n is {n}, with {number} pictures to search: give --n 1 to {number}")
    vectors = [index_pictures(run, gallery.root, names, gallery.stamps, gallery.label).vectors for run in runs]
    unreadable = vectors[0][:, 0].isnan().nonzero()[:, 0].tolist()
    number -= len(unreadable)
    scores = average_scores(vectors, [query_vectors(run, queries) for run in runs])
    calibration = calibration_of(runs) if any(query.is_sentence for query in queries) else None
    least = threshold(calibration, "text_to_image", number) if calibration else None
    resolved = {}
    if any(query.pictures for query in queries):  # a picture is not its own match
        resolved = {(gallery.root / name).resolve(): row for row, name in enumerate(names)}
    answers = []
    for query, own in zip(queries, scores, strict=True):
        skip = [resolved[file.resolve()] for file in query.pictures if file.resolve() in resolved] + unreadable
        results = rank(own, n, least if query.is_sentence else None, skip)
        for result in results:
            result["file"] = (gallery.root / names[result.pop("row")]).as_posix()
        answers.append(answer(query.text, "images", number, results))
    return answers


def describe(runs, gallery, arguments):
    """The captions that describe a picture best, and the pictures most like it."""
    query = Query(Path(arguments.image).name, [(1.0, Path(arguments.image))])
    captions, source, label = own_captions(runs[0].model.config, arguments.captions_path)
    n = 9 if arguments.n is None else arguments.n
    if n < 1:
        raise InputError(f"n is {n}: give at least 1")
    vectors = [index_captions(run, captions, source, label).vectors for run in runs]
    scores = average_scores(vectors, [query_vectors(run, [query]) for run in runs])[0]
    calibration = calibration_of(runs)
    least = threshold(calibration, "image_to_text", len(captions)) if calibration else None
    results = rank(scores, n, least)
    for result in results:
        result["caption"] = captions[result.pop("row")]
    described = answer(query.text, "captions", len(captions), results)
    similar = search_pictures(runs, gallery, [query], min(n, len(gallery.names)))
    print_answers([described, *similar], arguments)


def answer(query, kind, searched, results):
    verdicts = [result["match"] for result in results]
    match = None if None in verdicts or not verdicts else any(verdicts)
    return {"query": query, "kind": kind, "searched": searched, "match": match, "results": results}


def classify(runs, arguments):
    """Which of several labels fits a picture, with probabilities."""
    labels = parse_labels(arguments.labels)
    logits = label_logits([run.model for run in runs], [arguments.image], labels, arguments.template or TEMPLATES)[0]
    order = logits.argsort(descending=True).tolist()
    results = [{"label": labels[i], "probability": logits.softmax(0)[i].item()} for i in order]
    if arguments.json:
        print(json.dumps({"image": Path(arguments.image).as_posix(), "labels": results}))
    else:
        for result in results:
            print(f"{result['probability']:.4f}\t{result['label']}")
    drawn = results[:MOST_BARS]
    names, values = [r["label"] for r in drawn], [r["probability"] for r in drawn]
    colours = [MATCH] + [WEAK] * (len(names) - 1)
    draw_bars(arguments.image, Path(arguments.image).name, names, values, colours, arguments.output)
    print(f"the picture is in {arguments.output}{left_over(len(results) - len(drawn))}", file=sys.stderr)


def print_answers(answers, arguments):
    """One line per result for pipes, or JSON; then the pictures."""
    try:
        print_results(answers, arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for each in answers:
        if each["match"] is False:
            print(f"no good match for {each['query']!r} among {each['searched']:,} {each['kind']}", file=sys.stderr)
    draw_answers(answers, arguments)


def print_results(answers, arguments):
    if arguments.json:
        print(json.dumps(answers))
    for each in answers:
        for result in [] if arguments.json else each["results"]:
            found = result.get("file") or result["caption"]
            verdict = {True: "match", False: "weak", None: "-"}[result["match"]]
            words = [
                f"{result['score']:.4f}",
                f"{result['deviation']:+.1f}",
                verdict,
                each["kind"],
                each["query"],
                found,
            ]
            print("\t".join(" ".join(word.split()) if word is not found else word for word in words))


def draw_answers(answers, arguments):
    panels, rows, output = [], 0, Path(arguments.output)
    for each in answers:
        heading = each["query"] + ("\nno good match; the nearest:" if each["match"] is False else "")
        results = each["results"]
        colours = [{True: MATCH, False: WEAK, None: None}[result["match"]] for result in results]
        if each["kind"] == "captions":
            place = output.with_stem(f"{output.stem}_captions")
            names, values = [r["caption"] for r in results[:MOST_BARS]], [r["score"] for r in results[:MOST_BARS]]
            draw_bars(arguments.image, heading, names, values, [c or WEAK for c in colours[:MOST_BARS]], place)
            print(f"the captions are in {place}{left_over(len(results) - len(names))}", file=sys.stderr)
            continue
        room = min(3 * (MOST_ROWS - rows), len(results))
        if room:
            titles = [picture_title(result) for result in results[:room]]
            panels.append((heading, [r["file"] for r in results[:room]], titles, colours[:room]))
            rows += -(-room // 3)
    if not panels:
        print("there is no picture to show", file=sys.stderr)
        return
    draw_grid(panels, output)
    found = sum(len(each["results"]) for each in answers if each["kind"] == "images")
    left = found - sum(len(files) for _, files, _, _ in panels)
    print(f"the pictures are in {output}{left_over(left)}", file=sys.stderr)


def left_over(number):
    """What is said of results that a picture has no room for."""
    return f" ({number} more did not fit on it)" if number else ""


def picture_title(result):
    name = Path(result["file"]).name
    verdict = {True: "   match", False: "   weak", None: ""}[result["match"]]
    name = name if len(name) < 32 else f"{name[:18]}...{name[-10:]}"
    return f"{name}\n{result['score']:.3f}   {result['deviation']:+.1f} sd{verdict}"


# ---- evaluation -------------------------------------------------------------------------------------------------


def evaluate(runs, arguments):
    """Retrieval metrics on all images of a captions file."""
    pairs = make_pairs(captions_by_image(read_captions(arguments.captions_path)), arguments.image_path)
    check_files(pairs.files)
    # Vectors side by side, divided by sqrt(runs): their products are the mean of the runs' products.
    images = torch.cat([embed_images(run.model, pairs.files) for run in runs], 1) / len(runs) ** 0.5
    texts = torch.cat([embed_captions(run.model, pairs.captions) for run in runs], 1) / len(runs) ** 0.5
    metrics = retrieval_metrics(images, texts, pairs.image_index)
    counts = {"images": len(pairs.files), "captions": len(pairs.captions)}
    print(json.dumps({**counts, **metrics}) if arguments.json else format_metrics(metrics))


def evaluate_zero_shot(runs, arguments):
    """Accuracy of the labels on a folder-per-label tree or a CSV; the confusion matrix as a picture."""
    files, truth = read_labelled(arguments.zero_shot, arguments.image_path)
    check_files(files)
    labels = parse_labels(arguments.labels) if arguments.labels else sorted(set(truth))
    unknown = sorted(set(truth) - set(labels))
    if unknown or len(labels) < 2:
        problem = f"lack {', '.join(unknown)}, which pictures have" if unknown else "are one: give two or more"
        raise InputError(f"labels {', '.join(labels)} {problem}")
    logits = label_logits([run.model for run in runs], files, labels, arguments.template or TEMPLATES)
    readable = ~logits[:, 0].isnan()
    truth = [label for label, kept in zip(truth, readable.tolist(), strict=True) if kept]
    results = evaluate_labels(logits[readable], truth, labels)
    if arguments.json:
        print(json.dumps(results))
    else:
        print(f"{results['accuracy']:.1f}% of {len(truth)} pictures right, {len(labels)} labels", end="")
        print(f" (mean over the labels {results['mean_label_accuracy']:.1f}%)")
    heading = f"{results['accuracy']:.1f}% of {len(truth)} pictures right"
    draw_confusion(results["confusion"], labels, arguments.output, heading)
    print(f"the confusion matrix is in {arguments.output}", file=sys.stderr)


def format_metrics(metrics):
    """The retrieval metrics as a small table."""
    lines = [f"{'':<15}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median rank':>13}"]
    for name in ("image_to_text", "text_to_image"):
        values = "".join(f"{metrics[f'{name}_R@{k}']:7.1f}" for k in (1, 5, 10))
        lines.append(f"{name.replace('_', ' '):<15}{values}{metrics[f'{name}_median_rank']:13.0f}")
    return "\n".join([*lines, f"rsum {metrics['rsum']:.1f}"])


if __name__ == "__main__":
    main()
