"""Damaged captions files and images: each is read, or refused in one line, without a hang and without filling memory.

    python benchmarks/fuzz_captions.py --captions 12000 --images 300

Valid files of every format are cut, overwritten, repeated, and filled with what parsers find difficult. An exception
other than InputError, a message of several lines, and more than 5 s per MB are counted. Linux only.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from common import in_fork, report  # noqa: E402
from PIL import Image  # noqa: E402

from config import InputError  # noqa: E402
from utils.captions import read_pairs, text_ids  # noqa: E402
from utils.image_cache import decode_image  # noqa: E402
from utils.splits import split_column, split_images  # noqa: E402

SECONDS_PER_MB, MAX_MB = 5, 2000  # limits: of time per MB (at least one), and of memory
BATCH = 500  # files read in one process
TOKENS = [b'"', b"'", b",", b";", b"\t", b"|", b"\n", b"\r", b"\0", b"[", b"{", b"]", b"}", b"\\", b"\\ud800", b"\xff"]
TOKENS += [b"\xef\xbb\xbf", b"\xff\xfe", "\u2028".encode(), "\x85".encode(), b"1e999", b"NaN", b"null", b"../", b"#0\t"]
TOKENS += [b"a" * 130_000, b"[" * 5000, b'"' * 1001, b",\n" * 1000, b"image,caption\n", b"['x' 'y']", b"\x1a", b"#"]
SUFFIXES = ["png", "jpg", "gif", "webp", "tif", "bmp", "jp2", "avif", "ppm", "tga", "ico", "dds", "pcx", "sgi", "icns"]


# ---- captions ---------------------------------------------------------------------------------------------------


def valid_files():
    """The contents of valid captions files in all formats and encodings, a list of bytes."""
    names = [f"sub/{number}.jpg" for number in range(12)]
    rows = [(name, f'Ein Hund, „{name}“ — größer als "{j}" | Katzen; né') for name in names for j in range(3)]
    frame = pd.DataFrame(rows, columns=["image", "caption"]).assign(split="train")
    files = []
    for delimiter in ",;\t|":
        text = frame.to_csv(sep=delimiter, index=len(files) % 2 == 0)
        files += [text.encode(encoding) for encoding in ("utf-8", "utf-8-sig", "utf-16")]
        files.append(text.replace("—", "-").encode("cp1252"))
    records = frame.rename(columns={"image": "file_name", "caption": "text"})
    files += [records.to_json(orient="records", lines=lines).encode() for lines in (True, False)]
    files.append("".join(f"{name}#{j % 3}\t{text}\n" for j, (name, text) in enumerate(rows)).encode())
    results = "".join(f"{name}| {j % 3}| {text.replace('|', '')}\n" for j, (name, text) in enumerate(rows))
    files.append(f"image_name| comment_number| comment\n{results}".encode())
    sentences = [{"raw": text, "tokens": text.split()} for _, text in rows]
    images = [{"filename": name, "id": i, "file_name": name, "split": "val"} for i, name in enumerate(names)]
    lists = [{**image, "sentences": sentences[3 * i : 3 * i + 3]} for i, image in enumerate(images)]
    files.append(json.dumps({"images": lists}).encode())
    annotations = [{"image_id": j // 3, "caption": text} for j, (_, text) in enumerate(rows)]
    files.append(json.dumps({"images": images, "annotations": annotations}).encode())
    texts = frame.groupby("image")["caption"].agg(lambda cells: str(cells.tolist()))
    files.append(texts.reset_index().to_csv(index=False).encode())
    return files


def mutate(content, rng):
    """Bytes with one to forty random changes."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        start, length = rng.randrange(len(content) + 1), rng.choice((0, 0, 1, 3, 100, 2000))
        part = bytes(content[start : start + length])
        content[start : start + length] = rng.choice((b"", part * 2, part[::-1], rng.choice(TOKENS), rng.randbytes(2)))
    return bytes(content)


def read_data(path):
    """All that training does with a captions file before it opens an image."""
    frame = read_pairs(path, path.parent)
    names = list(dict.fromkeys(frame["image"]))
    split_images(names, path.parent / "none", 0, split_column(frame, path))
    text_ids(frame["caption"].tolist())


def try_to_read(read, path):
    """ "read", "refused", or what is wrong; and the seconds."""
    start = time.process_time()
    try:
        read(path)
        outcome = "read"
    except InputError as error:
        outcome = "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"message: {str(error)[:300]!r}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {str(error)[:300]}"
    seconds = time.process_time() - start
    limit = SECONDS_PER_MB * max(1, path.stat().st_size / 1e6)
    return (outcome if seconds < limit else f"{seconds:.0f} s for {path.stat().st_size} bytes"), seconds


# ---- images -----------------------------------------------------------------------------------------------------


def valid_images(folder):
    """{suffix: content} of an image in the formats that can be written here."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    exif, files = Image.Exif(), {}
    exif[0x0112], exif[0x010E] = 6, "a description"
    for suffix in SUFFIXES:
        path = folder / f"x.{suffix}"
        try:
            Image.fromarray(noise).resize((200, 160)).save(path, **({"exif": exif} if suffix in ("jpg", "png") else {}))
        except (OSError, KeyError, ValueError):
            continue
        files[suffix] = path.read_bytes()
    return files


# ---- the script -------------------------------------------------------------------------------------------------


def fuzz(kind, files, read, count, rng, folder):
    """A row of results, and the faults."""
    outcomes, longest, faults, peak = {"read": 0, "refused": 0}, 0.0, [], 0
    for start in range(0, count, BATCH):
        cases = [(suffix, mutate(content, rng)) for suffix, content in rng.choices(files, k=min(BATCH, count - start))]

        def run(cases=cases):
            for suffix, content in cases:
                path = folder / f"case.{suffix}"
                path.write_bytes(content)
                outcome, seconds = try_to_read(read, path)
                if outcome not in outcomes:
                    (folder / f"fault-{random.randrange(10**9)}.{suffix}").write_bytes(content)
                print(json.dumps([outcome, seconds]), flush=True)
            print(json.dumps(["peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000]), flush=True)

        status, output, _ = in_fork(run, folder, 600)
        lines = [json.loads(line) for line in output.splitlines() if line.startswith('["')]
        for outcome, value in lines:
            if outcome == "peak":
                peak = max(peak, value)
            elif outcome in outcomes:
                outcomes[outcome] += 1
            else:
                faults.append(outcome)
            longest = max(longest, value if outcome != "peak" else 0)
        if status or len(lines) <= len(cases):
            faults.append(f"the process ended with status {status}: {output[-300:]}")
    if peak > MAX_MB:
        faults.append(f"{peak:.0f} MB")
    row = {"files": kind, "number": count, **outcomes, "faults": len(faults), "longest, s": round(longest, 2)}
    return {**row, "peak memory, MB": round(peak)}, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=12_000)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", help="folder for fuzz_captions.json, in place of benchmarks/results")
    parser.add_argument("--keep", help="folder for the files with faults")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(arguments.keep or folder)
        folder.mkdir(exist_ok=True)
        captions = [("csv", content) for content in valid_files()]
        images = sorted(valid_images(folder).items())
        rows, faults = [], []
        for kind, files, read, count in (
            ("captions", captions, read_data, arguments.captions),
            (f"images ({len(images)} formats)", images, lambda path: decode_image(path, 64), arguments.images),
        ):
            row, found = fuzz(kind, files, read, count, rng, folder)
            rows.append(row)
            faults += found
    report("fuzz_captions", rows, folder=arguments.results, faults=faults[:20])
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
