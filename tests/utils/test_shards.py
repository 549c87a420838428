"""Data sets in tar shards: the same as in files, and what other programs write."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import draw_image, flags, run_python

import inference
import main
from dataset import load_splits
from extras import write_shards
from utils.image_cache import decode_image, file_digest
from utils.shards import find_shards, locate, open_image


@pytest.fixture
def shards(sample, tmp_path):
    """The folder of the synthetic data set in shards of ten images."""
    paths = [word for name, path in sample.items() for word in (f"--{name}", path)]
    write_shards.main([*paths, "--to", str(tmp_path / "shards"), "--per_shard", "10"])
    return tmp_path / "shards"


def write_tar(path, members):
    """members: {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def jpeg(tmp_path):
    def make(seed):
        draw_image(tmp_path / "x" / f"{seed}.jpg", seed=seed)
        return (tmp_path / "x" / f"{seed}.jpg").read_bytes()

    return make


def test_shards_hold_the_same_data(shards, sample, tiny_config):
    names = [path.name for path in find_shards(shards)]
    assert names == ["test-00000.tar", *[f"train-0000{k}.tar" for k in range(3)], "validation-00000.tar"]
    found, expected = load_splits(tiny_config(image_path=str(shards))), load_splits(tiny_config())
    for split, pairs in expected.items():
        assert found[split].captions == pairs.captions
        assert found[split].image_index.tolist() == pairs.image_index.tolist()
        for image, file in zip(found[split].files, pairs.files, strict=True):
            assert open_image(image).read() == file.read_bytes()
            assert (decode_image(image, 32) == decode_image(file, 32)).all()


def test_training_and_search_equal_those_with_files(shards, tiny_config, no_plots, capsys):
    for name, path in (("files", tiny_config().image_path), ("sharded", str(shards))):
        main.main(flags(tiny_config(image_path=path, run=name, epochs=2)))
    first, second = (torch.load(Path(name) / "last.pt", weights_only=True)["model"] for name in ("files", "sharded"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert "names of the shards\ncaptions: shards, WebDataset shards" in capsys.readouterr().out
    main.main(["--resume", "--run", "sharded", "--epochs", "3"])
    results = {}
    for name in ("files", "sharded"):
        inference.main(["a red circle", "--run", name, "--output", "none"])
        results[name] = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert len(results["files"]) == len(results["sharded"]) > 0


@pytest.mark.parametrize("cached", [True, False])
def test_training_from_shards_with_loader_processes(shards, tiny_config, cached, no_plots):
    main.main(flags(tiny_config(image_path=str(shards), num_workers=2, cache_images=cached)))


def test_shards_of_other_programs(tmp_path, tiny_config, jpeg):
    members = {}
    for k in range(6):
        members[f"{k:05d}.jpg"] = jpeg(k)
        members[f"{k:05d}.txt"] = f"A dog {k} .\n".encode()
        members[f"{k:05d}.json"] = json.dumps({"url": "x", "width": 60, "sha256": "0"}).encode()  # of img2dataset
    write_tar(tmp_path / "in" / "00000.tar", members)
    members = {f"sub/{k}.b.JPG": jpeg(10 + k) for k in range(4)} | {
        f"sub/{k}.json": json.dumps({"caption": f"A cat {k}", "text": 3}).encode() for k in range(4)
    }
    members |= {"sub/9.json": b'{"caption": "no image"}', "sub/8.jpg": jpeg(20), "__info__": b"", "sub/7.json": b"[1]"}
    write_tar(tmp_path / "in" / "00001.tar", members)
    splits = load_splits(tiny_config(image_path=str(tmp_path / "in")))
    captions = {caption for pairs in splits.values() for caption in pairs.captions}
    assert captions == {f"A dog {k} ." for k in range(6)}  # `0.b.JPG` has the suffix `b.jpg`, as in WebDataset
    assert any("7 samples without an image or a caption" in line for line in splits["train"].source)


def test_damaged_shard_and_shards_without_pairs_are_refused(shards, tiny_config, refused, tmp_path, jpeg):
    path = find_shards(shards)[1]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    printed = refused(main.main, flags(tiny_config(image_path=str(shards))))
    assert f"shard {path} is damaged" in printed
    write_tar(tmp_path / "empty" / "0.tar", {"0.jpg": jpeg(0)})
    assert "contain no image with a caption" in refused(
        main.main, flags(tiny_config(image_path=str(tmp_path / "empty")))
    )


def test_broken_image_is_named(shards, tiny_config, refused):
    image = load_splits(tiny_config(image_path=str(shards)))["train"].files[3]
    shard, offset, size = locate(image)
    with open(shard, "rb+") as file:
        file.seek(offset)
        file.write(bytes(size))
    printed = refused(main.main, flags(tiny_config(image_path=str(shards))))
    assert f"{os.fspath(image)} cannot be read" in printed


def test_changed_shard_is_decoded_again(shards, tiny_config):
    image = load_splits(tiny_config(image_path=str(shards)))["train"].files[0]
    before = file_digest(image)
    assert before != file_digest(load_splits(tiny_config(image_path=str(shards)))["train"].files[1])
    os.utime(image.parent, (1, 1))
    assert file_digest(image) != before


def test_existing_shards_and_bad_numbers_are_refused(shards, sample, refused):
    paths = [word for name, path in sample.items() for word in (f"--{name}", path)]
    assert "contains shards" in refused(write_shards.main, [*paths, "--to", str(shards)])
    assert "per_shard is 0" in refused(write_shards.main, [*paths, "--to", "new", "--per_shard", "0"])


def test_help_and_bad_flags_import_nothing_heavy():
    for argv, status in ((["--help"], 0), (["--too", "x"], 2)):
        finished = run_python("-X", "importtime", "-m", "extras.write_shards", *argv)
        assert finished.returncode == status
        loaded = {line.split("|")[-1].strip() for line in finished.stderr.splitlines()}
        assert not {"torch", "PIL", "cv2", "dataset"} & loaded


def test_archive_beside_images_or_captions_is_no_shard(sample, tmp_path, tiny_config, jpeg):
    data = tmp_path / "data"
    shutil.copytree(Path(sample["captions_path"]).parent, data)
    for folder in (data / "Images", data):
        write_tar(folder / "flickr8k.tar", {"0.jpg": jpeg(0), "0.txt": b"A dog ."})
    splits = load_splits(tiny_config(image_path=str(data / "Images"), captions_path=str(data)))
    assert len(splits["train"].files) == 24 and "captions.txt" in splits["train"].source[1]


def test_image_whose_format_is_not_read_from_shards_is_refused(data_set, tmp_path, refused):
    paths = data_set({f"{k}.jpg": ["A dog ."] for k in range(10)})
    (tmp_path / "data" / "Images" / "3.jpg").rename(tmp_path / "data" / "Images" / "3.ppm")
    captions = Path(paths["captions_path"])
    captions.write_text(captions.read_text().replace("3.jpg", "3.ppm"))
    flags_of = [word for name, path in paths.items() for word in (f"--{name}", path)]
    assert "3.ppm cannot be in a shard" in refused(write_shards.main, [*flags_of, "--to", str(tmp_path / "new")])
    assert not list((tmp_path / "new").glob("train*"))
