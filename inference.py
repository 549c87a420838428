"""Search photographs by a sentence: `python inference.py "two dogs on the grass"`."""

import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from clip import autocast, load_model, retrieval_metrics, setup_device
from config import InputError, OneLineParser, exit_on_input_error
from dataset import (
    EvaluationImages,
    ImageStore,
    TokenStore,
    check_files,
    load_splits,
    make_loader,
    make_pairs,
    pad_tokens,
    read_captions,
    stored_side,
)

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


# ---- embedding --------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_encoder(function, dataset, device, dtype=None, batch_size=64, num_workers=0, description=None, collate=None):
    """`function` of every batch of a dataset, concatenated, on the device; a progress bar if described."""
    loader = make_loader(dataset, num_workers, batch_size=batch_size, collate_fn=collate)
    results = []
    hidden = description is None or not sys.stderr.isatty()  # short work: in a log file its bar is only noise
    with tqdm(total=len(dataset), desc=description, disable=hidden, leave=False) as bar:
        for batch in loader:
            parts = batch if isinstance(batch, tuple) else (batch,)
            with autocast(device, dtype):
                results.append(function(*[part.to(device, non_blocking=True) for part in parts]).float())
            bar.update(len(parts[0]))
    return torch.cat(results)


class Captions(Dataset):
    """Tokenised captions for an encoder, in batches padded to their longest."""

    def __init__(self, tokenizer, captions, max_length):
        self.tokens, self.pad_id = TokenStore(tokenizer, captions, max_length), tokenizer.pad_token_id

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, caption):
        return self.tokens[caption]

    def collate(self, token_lists):
        return pad_tokens(token_lists, self.pad_id)


def embed_images(model, image_files, batch_size=64, num_workers=0, dtype=None, description="embedding images"):
    """(N, D) unit vectors of N picture files, float32, on the model's device; raises InputError."""
    store = ImageStore([Path(file) for file in image_files], stored_side(model.config.size))
    images = EvaluationImages(store, range(len(store)), model.config.size)
    return run_encoder(model.encode_image, images, model.device, dtype, batch_size, num_workers, description)


def embed_captions(model, captions, batch_size=256, dtype=None, description=None):
    """(T, D) unit vectors of T captions, float32, on the model's device."""
    dataset = Captions(model.tokenizer, list(captions), model.max_length)
    return run_encoder(
        model.encode_text, dataset, model.device, dtype, batch_size, description=description, collate=dataset.collate
    )


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


# ---- pictures ---------------------------------------------------------------------------------------------------


def draw_grid(files, titles, path, heading="", frames=None, columns=3):
    """Save pictures in rows of `columns`, each in its own proportions, with a title under the heading's query."""
    rows = -(-len(files) // columns)
    lines = textwrap.wrap(heading, 30 * columns, max_lines=4, placeholder=" ...")
    width, height = 3.2 * columns, 3.5 * rows + 0.35 * len(lines) + 0.1
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle("\n".join(lines), fontsize=15)
    for position, (file, title) in enumerate(zip(files, titles, strict=True)):
        axis = figure.add_subplot(rows, columns, position + 1)
        axis.imshow(open_picture(file))
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(visible=bool(frames and frames[position]), color="limegreen", linewidth=5)
    figure.savefig(path, dpi=80)


def open_picture(file, longest=320):
    """A picture upright and in its own proportions, no larger than it will be shown, as a PIL image."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            image.thumbnail((longest, longest))
            return image
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"picture {file} cannot be read ({error})") from None


@torch.no_grad()
def draw_queries(model, pairs, store, path, rows=4, columns=5):
    """For a few captions of a split, the best matching pictures; the caption's own has a green frame."""
    images = EvaluationImages(store, range(len(store)), model.config.size)
    image_embeddings = run_encoder(model.encode_image, images, model.device)
    chosen = np.random.default_rng(0).permutation(len(pairs.captions))[:rows]
    columns = min(columns, len(pairs.files))
    scores = embed_captions(model, [pairs.captions[j] for j in chosen]) @ image_embeddings.T
    best = scores.topk(columns)
    figure = Figure(figsize=(2.3 * columns, 2.75 * len(chosen)), layout="constrained")
    for row, part in enumerate(np.atleast_1d(figure.subfigures(len(chosen), 1))):
        caption = pairs.captions[chosen[row]]
        rank = int((scores[row] >= scores[row, pairs.image_index[chosen[row]]]).sum())
        part.suptitle(f"{textwrap.shorten(caption, 100)}   (its own picture: place {rank})", fontsize=11)
        for column, axis in enumerate(np.atleast_1d(part.subplots(1, columns))):
            image = int(best.indices[row, column])
            axis.imshow(open_picture(pairs.files[image]))
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{best.values[row, column]:.2f}", fontsize=9)
            for spine in axis.spines.values():
                spine.set(visible=image == pairs.image_index[chosen[row]], color="limegreen", linewidth=5)
    figure.savefig(path, dpi=80)


def format_metrics(metrics):
    """The retrieval metrics as a small table."""
    lines = [f"{'':<15}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median rank':>13}"]
    for name in ("image_to_text", "text_to_image"):
        values = "".join(f"{metrics[f'{name}_R@{k}']:7.1f}" for k in (1, 5, 10))
        lines.append(f"{name.replace('_', ' '):<15}{values}{metrics[f'{name}_median_rank']:13.0f}")
    return "\n".join([*lines, f"rsum {metrics['rsum']:.1f}"])


# ---- the command ------------------------------------------------------------------------------------------------


def newest_model(folder="runs"):
    """The run trained last."""
    runs = sorted(Path(folder).glob("*/best/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"no trained run in {folder}/: give --run FOLDER, or train one: python main.py --preset demo")
    return runs[-1].parent.parent


def gallery_of_run(config):
    """The picture files to search when no folder is given: the run's test images, else its validation images."""
    splits = load_splits(config)
    return (splits["test"].files or splits["validation"].files) if splits else []


def gallery_of_folder(folder):
    """All picture files below a folder, in the order of their names; raises InputError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"images is {folder}, which is not a folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise InputError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    return files


def parse_arguments(argv):
    parser = OneLineParser(prog="inference.py", description="Find the pictures that match a sentence.")
    parser.add_argument("query", nargs="?", help="what the picture should show")
    parser.add_argument("--run", help="a trained run's folder (default: the newest in runs/)")
    parser.add_argument("--images", help="search any folder of pictures (default: the run's test or validation images)")
    parser.add_argument("--n", type=int, default=9, help="how many pictures to show (default: 9)")
    parser.add_argument("--output", default="matches.png", help="the picture to write (default: matches.png)")
    parser.add_argument("--evaluate", action="store_true", help="retrieval metrics on a captions file")
    parser.add_argument("--image_path", help="with --evaluate: the image folder")
    parser.add_argument("--captions_path", help="with --evaluate: the captions file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser.parse_args(argv)


@exit_on_input_error
def main(argv=None):
    """Search, or evaluate, with a trained run."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    if not arguments.evaluate and not (arguments.query or "").strip():
        raise InputError('the query is empty: python inference.py "two dogs on the grass"')
    device, _ = setup_device(arguments.device)
    model = load_model(arguments.run or newest_model(), device)
    if arguments.evaluate:
        evaluate(model, arguments)
    else:
        search(model, arguments)


def evaluate(model, arguments):
    """Retrieval metrics of a saved run on all images of a captions file."""
    if not arguments.image_path or not arguments.captions_path:
        raise InputError("--evaluate needs --image_path and --captions_path")
    frame = read_captions(arguments.captions_path)
    pairs = make_pairs(frame, arguments.image_path)
    check_files(pairs.files)
    images, texts = embed_images(model, pairs.files), embed_captions(model, pairs.captions)
    metrics = retrieval_metrics(images, texts, pairs.image_index)
    counts = {"images": len(pairs.files), "captions": len(pairs.captions)}
    print(json.dumps({**counts, **metrics}) if arguments.json else format_metrics(metrics))


def search(model, arguments):
    """Print one line per match and save the grid of pictures."""
    files = gallery_of_folder(arguments.images) if arguments.images else gallery_of_run(model.config)
    if not 1 <= arguments.n <= len(files):
        raise InputError(f"n is {arguments.n}, with {len(files)} pictures to search: give --n 1 to {len(files)}")
    matches = find_matches(model, embed_images(model, files), arguments.query, files, arguments.n)
    if arguments.json:
        print(json.dumps([{"file": str(file), "score": score} for file, score in matches]))
    else:
        for file, score in matches:
            print(f"{score:.4f}\t{file}")
    draw_grid(
        [file for file, _ in matches],
        [f"{file.name if len(file.name) < 32 else file.name[:29] + '...'}\n{score:.3f}" for file, score in matches],
        arguments.output,
        arguments.query,
    )
    print(f"the pictures are in {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
