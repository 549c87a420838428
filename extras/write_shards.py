"""Write a data set as WebDataset tar shards: `python -m extras.write_shards --image_path ... --to DIR`.

DIR gets train-00000.tar, ..., validation-00000.tar and test-00000.tar. Each sample is the image file as it is, a .txt
with its first caption, and a .json with all captions and the image's name.
"""

import io
import json
import tarfile
from pathlib import Path

from config import InputError, build_config
from utils.cli import exit_on_input_error, progress_bar, sigterm_as_interrupt
from utils.files import atomic_write
from utils.flags import OneLineParser
from utils.shards import IMAGE_SUFFIXES


def parse_arguments(argv=None):
    """The checked command line; raises InputError."""
    parser = OneLineParser(
        prog="python -m extras.write_shards",
        description="Write a data set as WebDataset tar shards.",
        allow_abbrev=False,
    )
    parser.add_argument("--image_path", required=True, metavar="FOLDER", help="images")
    parser.add_argument("--captions_path", required=True, metavar="FILE", help="captions file, or its folder")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="new folder")
    parser.add_argument("--per_shard", type=int, default=1000, help="images per shard (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the random split, where there are no split files")
    arguments = parser.parse_args(argv)
    if arguments.per_shard < 1:
        raise InputError(f"per_shard is {arguments.per_shard}: use at least 1")
    return arguments


if __name__ == "__main__":
    exit_on_input_error(parse_arguments)()  # before the heavy imports, so that --help and flag errors return at once

from dataset import load_splits


def write_shards(splits, folder, per_shard):
    """Write the splits, {split: Pairs}, to a folder without shards; returns their paths. Raises InputError."""
    folder, written = Path(folder), []
    if any(folder.glob("*.tar")):
        raise InputError(f"to is {folder}, which contains shards: pass a new folder")
    with progress_bar(total=sum(len(pairs.files) for pairs in splits.values()), desc="writing", unit="image") as bar:
        for split, pairs in splits.items():
            for number, start in enumerate(range(0, len(pairs.files), per_shard)):
                written.append(folder / f"{split}-{number:05d}.tar")
                with atomic_write(written[-1]) as temporary, tarfile.open(temporary, "w") as tar:
                    for image in range(start, min(start + per_shard, len(pairs.files))):
                        write_sample(tar, pairs, image)
                        bar.update()
    return written


def write_sample(tar, pairs, image):
    """Add an image with its captions; raises InputError if the file cannot be read."""
    captions = [pairs.captions[j] for j in pairs.captions_of(image)]
    try:
        content = Path(pairs.files[image]).read_bytes()
    except OSError as error:
        raise InputError(f"image {pairs.files[image]} cannot be read ({error.strerror})") from None
    description = json.dumps({"name": pairs.names[image], "captions": captions}, ensure_ascii=False)
    suffix = Path(pairs.files[image]).suffix.lower()
    if suffix[1:] not in IMAGE_SUFFIXES:
        raise InputError(f"image {pairs.files[image]} cannot be in a shard: use one of {', '.join(IMAGE_SUFFIXES)}")
    parts = {suffix: content, ".txt": captions[0].encode(), ".json": description.encode()}
    for suffix, data in parts.items():
        member = tarfile.TarInfo(f"{image:09d}{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


@exit_on_input_error
def main(argv=None):
    arguments = parse_arguments(argv)
    paths = {"image_path": arguments.image_path, "captions_path": arguments.captions_path, "seed": arguments.seed}
    with sigterm_as_interrupt():
        try:
            written = write_shards(load_splits(build_config(paths)), arguments.to, arguments.per_shard)
        except KeyboardInterrupt:
            print("\nstopped; the shard in progress was not written")
            raise SystemExit(130) from None
    print(f"{len(written)} shards written to {arguments.to}; to train: python main.py --image_path {arguments.to}")


if __name__ == "__main__":
    main()
