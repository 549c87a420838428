"""From files to batches: splits, training transform, tokens, the order of an epoch, collation."""

import itertools
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_settings

import dataset
from clip import CLIP
from config import Config, InputError
from dataset import (
    Batch,
    ImageStore,
    PairSampler,
    TokenStore,
    TrainingPairs,
    TrainTransform,
    captions_by_image,
    describe_splits,
    filter_pairs,
    load_splits,
    make_loader,
    make_pairs,
    mentions,
    pad_tokens,
    pair_targets,
    read_captions,
    resize_image,
    split_by_length,
    split_evenly,
    split_images,
    subset_pairs,
    train_tokenizer,
)
from utils.image_cache import build_image_cache, storage_resolution


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


# ---- splits -----------------------------------------------------------------------------------------------------

NAMES = [f"{number:02d}.jpg" for number in range(40)]
OFFICIAL = {"train": NAMES[:20], "dev": NAMES[20:26], "test": NAMES[26:31]}


def write_lists(folder, *kinds):
    for kind in kinds:
        write(folder / f"Flickr_8k.{kind}Images.txt", "".join(f"{name}\n" for name in OFFICIAL[kind]))


@pytest.mark.parametrize("kinds", [[], *([a] for a in OFFICIAL), ["train", "dev"], ["train", "test"], ["dev", "test"],
                                   ["train", "dev", "test"]])  # fmt: skip
def test_split_images_uses_the_official_files_that_exist(tmp_path, kinds):
    write_lists(tmp_path, *kinds)
    splits = split_images(NAMES, tmp_path, seed=1)
    assert list(splits) == ["train", "validation", "test"]
    all_names = [name for names in splits.values() for name in names]
    assert len(all_names) == len(set(all_names))  # no image is in two splits
    for kind, split in (("dev", "validation"), ("test", "test")):
        if kind in kinds:
            assert splits[split] == OFFICIAL[kind]
    listed = {name for kind in kinds for name in OFFICIAL[kind]}
    train = set(splits["train"])
    if not kinds:
        assert [len(names) for names in splits.values()] == [32, 4, 4]
        assert set(all_names) == set(NAMES)
    elif "train" in kinds:
        assert train | set(splits["validation"]) <= listed  # images in no list are not used
        assert len(splits["validation"]) == (6 if "dev" in kinds else 2)
        assert "dev" not in kinds or splits["train"] == OFFICIAL["train"]
    else:
        assert set(all_names) == set(NAMES)  # images in no list are training images
    if kinds and "test" not in kinds:
        assert splits["test"] == []


def test_random_split_depends_on_the_names_and_the_seed_alone(tmp_path):
    assert split_images(NAMES, tmp_path, 1) == split_images(NAMES[::-1], tmp_path, 1)
    assert split_images(NAMES, tmp_path, 1) != split_images(NAMES, tmp_path, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("00.jpg\nzz.jpg\nyy.jpg\n", "trainImages.txt lists zz.jpg and 1 more, not found in the captions file"),
        ("00.jpg\n20.jpg\n", "20.jpg is in two split files, Flickr_8k.trainImages.txt and Flickr_8k.devImages.txt"),
        (b"\xff\xfe\x00", "trainImages.txt line 1 cannot be read as UTF-16"),
    ],
)
def test_inconsistent_split_files_are_refused(tmp_path, text, message):
    write_lists(tmp_path, "dev")
    write(tmp_path / "Flickr_8k.trainImages.txt", text)
    with pytest.raises(InputError, match=message):
        split_images(NAMES, tmp_path, 1)


def test_split_files_may_contain_spaces_windows_line_ends_and_a_byte_order_mark(tmp_path):
    write(tmp_path / "Flickr_8k.devImages.txt", "\ufeffmy dog.jpg \r\n\r\n01.jpg\r\n01.jpg")
    write(tmp_path / "._Flickr_8k.devImages.txt", b"\xff\xfe")  # hidden, as macOS writes them
    assert split_images([*NAMES, "my dog.jpg"], tmp_path, 1)["validation"] == ["my dog.jpg", "01.jpg"]


def test_captions_stay_with_their_image(data_set, tmp_path):
    captions = {f"{i:02d}.jpg": [f"image {i} caption {j}" for j in range(1 + i % 4)] for i in range(20)}
    splits = load_splits(Config(**tiny_settings(tmp_path, **data_set(captions))))
    seen = []
    for pairs in splits.values():
        for image, name in enumerate(pairs.names):
            own = pairs.captions_of(image)
            assert own == range(pairs.caption_offsets[image], pairs.caption_offsets[image + 1])
            assert [pairs.captions[j] for j in own] == captions[name]
            assert pairs.image_index[own].tolist() == [image] * len(own)
        seen += pairs.captions
    assert sorted(seen) == sorted(text for texts in captions.values() for text in texts)


def test_rows_of_one_image_need_not_be_adjacent(tmp_path):
    text = "image,caption\na.jpg,one\nb.jpg,two\na.jpg,three\n"
    pairs = make_pairs(captions_by_image(read_captions(write(tmp_path / "c.txt", text))), "images")
    assert pairs.files == [Path("images/a.jpg"), Path("images/b.jpg")]
    assert pairs.captions == ["one", "three", "two"]
    assert (pairs.image_index.tolist(), pairs.caption_offsets.tolist()) == ([0, 0, 1], [0, 2, 3])


def test_names_are_those_of_the_captions_file(data_set, tiny_config):
    names = [f"{n}/img.png" for n in range(12)]
    splits = load_splits(tiny_config(**data_set({name: ["A dog ."] for name in names}, dev=names[:2])))
    assert sorted(splits["train"].names) == sorted(names[2:])
    train = splits["train"]
    chosen = subset_pairs(train, [3, 1])
    assert chosen.names == [train.names[3], train.names[1]]
    assert chosen.files == [train.files[3], train.files[1]]


def test_filter_pairs_keeps_images_whose_captions_mention_a_word():
    captions = {"a.jpg": ["A Dog .", "It runs ."], "b.jpg": ["Dogs and cats ."], "c.jpg": ["A cat , a ball ."]}
    pairs = make_pairs(captions, "images")
    found = filter_pairs(pairs, "dog, ball")
    assert found.names == ["a.jpg", "c.jpg"]
    assert found.captions == ["A Dog .", "It runs .", "A cat , a ball ."]
    assert found.files == [Path("images/a.jpg"), Path("images/c.jpg")]
    assert filter_pairs(pairs, "").names == pairs.names
    with pytest.raises(InputError, match="gan_subset is 'ball', which matches the captions of 1 images"):
        filter_pairs(pairs, "ball")
    assert [mentions("A dog runs", words) for words in ("dog", "cat", "", "cat,RUNS", "do")] == [1, 0, 1, 1, 0]


def test_missing_image_is_named_and_the_others_counted(data_set, tmp_path):
    paths = data_set({f"{i:02d}.jpg": ["A dog ."] for i in range(20)})
    for name in ("03.jpg", "04.jpg", "05.jpg"):
        (Path(paths["image_path"]) / name).unlink()
    with pytest.raises(InputError, match=r"image .*0[345]\.jpg is missing \(and 2 more\)"):
        load_splits(Config(**tiny_settings(tmp_path, **paths)))


def test_overlong_image_name_is_reported_as_missing(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        dataset.check_files([tmp_path / ("x" * 5000)])


def test_describe_splits_counts_images_and_names_the_split(data_set, tiny_config):
    captions = {f"{i:02d}.jpg": [f"A dog {i} .", f"It runs {i} ."] for i in range(20)}
    config = tiny_config(**data_set(captions))
    line = describe_splits(config, load_splits(config))
    assert line.splitlines()[0] == "data: train 16 / validation 2 / test 2 images, 40 captions, random split (seed 42)"
    config = tiny_config(**data_set(captions, dev=["00.jpg", "01.jpg", "02.jpg"]))
    line = describe_splits(config, load_splits(config))
    assert line.startswith("data: train 17 / validation 3 / test 0 images, 40 captions, Flickr_8k.devImages.txt\n")


# ---- transforms -------------------------------------------------------------------------------------------------


def test_training_transform_depends_on_its_seed_alone():
    transform, again = TrainTransform(32, 0.5, 0.2), TrainTransform(32, 0.5, 0.2)
    image = np.random.default_rng(0).integers(0, 256, (37, 37, 3), dtype=np.uint8)
    first = [transform(image, [42, 0, i], True) for i in range(8)]
    second = [again(image, [42, 0, i], True) for i in reversed(range(8))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({result.tobytes() for result in first}) == 8
    assert {result.shape for result in first} == {(32, 32, 3)}
    assert not np.array_equal(first[0], transform(image, [42, 1, 0], True))


def test_training_transform_flips_half_of_the_images_it_may_flip():
    transform = TrainTransform(32, 1.0, 0.0)  # nothing but the flip
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    counts = Counter()
    for seed in range(200):
        assert np.array_equal(transform(image, [seed], False), image)
        flipped = transform(image, [seed], True)
        counts["same" if np.array_equal(flipped, image) else "flipped"] += 1
        assert np.array_equal(flipped, image) or np.array_equal(flipped, image[:, ::-1])
    assert 70 < counts["flipped"] < 130


def test_images_whose_captions_mention_left_or_right_are_never_flipped(data_set, tmp_path):
    captions = {f"{i:02d}.png": ["A dog on the LEFT ."] if i % 2 else ["A dog leftover , bright ."] for i in range(20)}
    config = Config(**tiny_settings(tmp_path, **data_set(captions), crop_scale=1.0, color_jitter=0.0, size=32))
    pairs = load_splits(config)["train"]
    store = ImageStore(pairs.files, storage_resolution(32))
    items = TrainingPairs(pairs, store, None, 0, config)
    flipped = Counter()
    for image in range(len(pairs.files)):
        plain = resize_image(store[image], 32)
        caption = int(pairs.caption_offsets[image])
        for epoch in range(20):
            _, _, pixels = items[epoch, image, (caption,)]
            flipped["LEFT" in pairs.captions[caption]] += not np.array_equal(pixels, plain)
    assert flipped[True] == 0
    assert flipped[False] > 20


def test_flip_false_flips_no_image(data_set, tmp_path):
    paths = data_set({f"{i:02d}.png": ["A dog ."] for i in range(20)})
    settings = {"crop_scale": 1.0, "color_jitter": 0.0, "size": 32}
    for flip in (True, False):
        config = Config(**tiny_settings(tmp_path, **paths, **settings, flip=flip))
        pairs = load_splits(config)["train"]
        store = ImageStore(pairs.files, storage_resolution(32))
        for on_device in (False, True):
            items = TrainingPairs(pairs, store, None, 0, config, on_device=on_device)
            results = [items[epoch, 0, (0,)][2] for epoch in range(20)]
            plain = resize_image(store[0], 32)
            changed = [
                drawn[4] < 0 if on_device else not np.array_equal(result, plain)
                for result in results
                for drawn in [result[1]]
            ]
            assert any(changed) == flip


SIDES = ["on the left", "RIGHT!", "leftmost", "das linke Bild", "steht rechts", "à gauche", "la main droite"]
SIDES += ["a la izquierda", "mano derecha", "à esquerda", "a sinistra", "till vänster", "til høyre", "lewa strona"]
SIDES += ["слева", "左の犬", "在右边"]


@pytest.mark.parametrize("caption", SIDES)
def test_words_for_left_and_right_in_other_languages(caption):
    assert dataset.SIDED.search(caption)


def test_other_words_are_not_sided():
    for caption in (
        "A leftover bright dog fights",
        "copyright",
        "prawns",
        "Lewis",
        "ein Gelenk",
        "links2",
        "destroyed",
    ):
        assert not dataset.SIDED.search(caption), caption


# ---- text -------------------------------------------------------------------------------------------------------

TEXTS = ["A dog runs .", "the Dog , and the cat !", "zebras", "a  dog"]


def test_token_store_holds_the_ids_of_the_tokenizer():
    tokenizer = train_tokenizer(TEXTS)
    store = TokenStore(tokenizer, TEXTS, 5)
    assert len(store) == 4
    assert [store[i].tolist() for i in range(4)] == tokenizer(TEXTS, truncation=True, max_length=5)["input_ids"]
    assert max(len(store[i]) for i in range(4)) == 5


def test_pad_tokens_pads_to_the_longest_as_the_tokenizer_does():
    input_ids, attention_mask = pad_tokens([np.array([5, 6, 7]), np.array([8])], 9)
    assert input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert input_ids.dtype == attention_mask.dtype == torch.int64
    tokenizer = train_tokenizer(TEXTS)
    expected = tokenizer(TEXTS, padding=True, return_tensors="pt")
    found = pad_tokens([TokenStore(tokenizer, TEXTS, 50)[j] for j in range(4)], tokenizer.pad_token_id)
    assert torch.equal(found[0], expected["input_ids"]) and torch.equal(found[1], expected["attention_mask"])


# ---- the order of an epoch --------------------------------------------------------------------------------------


def ragged(seed):
    """Random caption counts, in some cases with one far larger than the others, and a batch size."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, rng.integers(2, 9), rng.integers(2, 40))
    if seed % 3 == 0:
        counts[rng.integers(len(counts))] = 30
    return counts, int(rng.integers(2, 20))


def pairs_with(counts):
    return SimpleNamespace(caption_offsets=np.concatenate([[0], np.cumsum(counts)]))


def sampler_settings(batch_size, k, micro=0, seed=3):
    return Config(batch_size=batch_size, captions_per_image=k, micro_batch_size=micro, seed=seed)


def batches_of(sampler):
    """The batches of an epoch, each a flat list of keys."""
    return [[key for part in batch for key in part] for batch in sampler.batches()]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pair_sampler_shows_every_pair_once(seed, k):
    counts, batch_size = ragged(seed)
    pairs = pairs_with(counts)
    sampler = PairSampler(pairs, sampler_settings(batch_size, k))
    batches = batches_of(sampler)
    keys = [key for batch in batches for key in batch]
    assert sorted(j for _, _, group in keys for j in group) == list(range(counts.sum()))
    for epoch, image, group in keys:
        assert epoch == 0
        assert 1 <= len(group) <= k
        assert all(pairs.caption_offsets[image] <= j < pairs.caption_offsets[image + 1] for j in group)
    # As few groups as possible: an image with c captions comes ceil(c / k) times.
    assert Counter(image for _, image, _ in keys) == {image: -(-count // k) for image, count in enumerate(counts)}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("k", [1, 3])
def test_pair_sampler_equals_one_that_shuffles_image_by_image(seed, k):
    counts, batch_size = ragged(seed)
    pairs, config = pairs_with(counts), sampler_settings(batch_size, k)
    sampler, rng = PairSampler(pairs, config), np.random.default_rng([config.seed, 0])
    captions = [
        rng.permuted(np.arange(*pairs.caption_offsets[image : image + 2])).tolist() for image in range(len(counts))
    ]
    expected = []
    for image in sampler.image_order(rng).tolist():
        expected.append((0, image, tuple(captions[image][:k])))
        captions[image] = captions[image][k:]
    assert [key for batch in batches_of(sampler) for key in batch] == expected


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("micro", [0, 1, 2, 5])
def test_pair_sampler_batches_and_micro_batches_have_even_sizes(seed, micro):
    """Sizes differ by one at most, and no batch or micro-batch has a single row, on which BatchNorm fails."""
    counts, batch_size = ragged(seed)
    sampler = PairSampler(pairs_with(counts), sampler_settings(batch_size, 1, min(micro, batch_size)))
    batches = list(sampler.batches())
    sizes = [sum(map(len, batch)) for batch in batches]
    assert len(batches) == sampler.num_batches == len(sampler.micro_batch_counts())
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    assert max(sizes) <= batch_size or (max(sizes) == 3 and batch_size == 2)  # an odd number of pairs
    for batch, count in zip(batches, sampler.micro_batch_counts(), strict=True):
        parts = [len(part) for part in batch]
        assert len(parts) == count
        assert max(parts) - min(parts) <= 1
        assert min(parts) >= 2
        assert max(parts) <= max(micro or batch_size, 3)


@pytest.mark.parametrize("counts", [[1, 1], [2, 1], [1, 1, 1], [5, 1]])
def test_pair_sampler_of_a_minimal_data_set_has_no_batch_of_a_single_row(counts):
    for world_size in (1, 2):
        for rank in range(world_size):
            sampler = PairSampler(pairs_with(counts), sampler_settings(2 * world_size, 1), rank, world_size)
            batches = batches_of(sampler)
            assert len(batches) == max(1, sum(counts) // (2 * world_size))
            assert sum(counts) < 2 * world_size or min(map(len, batches)) >= 2


def test_pair_sampler_with_equal_counts_goes_round_by_round_in_new_orders():
    sampler = PairSampler(pairs_with([3] * 12), sampler_settings(4, 1))
    images = [image for batch in batches_of(sampler) for _, image, _ in batch]
    rounds = np.array(images).reshape(3, 12).tolist()
    assert all(sorted(order) == list(range(12)) for order in rounds)
    assert len({tuple(order) for order in rounds}) == 3
    for batch in batches_of(sampler):  # the batch size divides a round
        assert len({image for _, image, _ in batch}) == 4


@pytest.mark.parametrize("seed", range(10))
def test_pair_sampler_spreads_the_groups_of_an_image_over_the_epoch(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, 50)
    counts[7] = 40
    sampler = PairSampler(pairs_with(counts), sampler_settings(8, 1, seed=seed))
    order = [image for batch in batches_of(sampler) for _, image, _ in batch]
    for image, count in enumerate(counts):
        positions = np.flatnonzero(np.array(order) == image) / len(order)  # in [0, 1)
        thirds = np.histogram(positions, 3, (0, 1))[0]
        assert np.abs(thirds - count / 3).max() <= 2, (image, thirds)
    gaps = np.diff(np.flatnonzero(np.array(order) == 7))
    assert gaps.max() <= 3 * len(order) / 40


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_pair_sampler_shares_each_batch_among_processes(processes):
    pairs, config = pairs_with([5] * 37), sampler_settings(16, 2, micro=3)
    whole = [sorted(batch) for batch in batches_of(PairSampler(pairs, config))]
    samplers = [PairSampler(pairs, config, rank, processes) for rank in range(processes)]
    plans = [list(sampler.batches()) for sampler in samplers]
    for number, batch in enumerate(whole):
        shares = [[key for part in plan[number] for key in part] for plan in plans]
        assert sorted(key for share in shares for key in share) == batch
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert min(map(len, shares)) >= 2
    for sampler, plan in zip(samplers, plans, strict=True):
        assert sampler.micro_batch_counts() == [len(batch) for batch in plan]
        assert max(len(part) for batch in plan for part in batch) <= 3


def test_pair_sampler_resumes_at_any_batch():
    pairs, config = pairs_with([1, 5, 3, 2, 4, 5, 5, 1]), sampler_settings(4, 1, micro=3)
    sampler, other = PairSampler(pairs, config), PairSampler(pairs, config)
    sampler.epoch = other.epoch = 4
    whole = list(sampler.batches())
    for start in range(sampler.num_batches + 1):
        other.start = start
        assert list(other) == [part for batch in whole[start:] for part in batch]
        assert other.micro_batch_counts() == [len(batch) for batch in whole[start:]]


def test_pair_sampler_order_depends_on_seed_and_epoch():
    pairs, config = pairs_with([5] * 10), sampler_settings(4, 1)
    sampler = PairSampler(pairs, config)
    first = [[key[1:] for key in part] for part in sampler]
    assert [[key[1:] for key in part] for part in PairSampler(pairs, config)] == first
    sampler.epoch = 1
    assert {key[0] for part in sampler for key in part} == {1}
    assert [[key[1:] for key in part] for part in sampler] != first
    other = PairSampler(pairs, sampler_settings(4, 1, seed=4))
    assert [[key[1:] for key in part] for part in other] != first


def test_split_evenly_gives_consecutive_parts():
    for length, parts in itertools.product(range(12), range(1, 6)):
        found = split_evenly(list(range(length)), parts)
        assert len(found) == parts
        assert list(itertools.chain(*found)) == list(range(length))
        assert max(map(len, found)) - min(map(len, found)) <= 1


# ---- batches ----------------------------------------------------------------------------------------------------


def make_batch(rows, ids, **inputs):
    return Batch(torch.tensor(rows), torch.tensor(ids), **inputs)


def test_pair_targets_of_concatenated_batches():
    first = make_batch([0, 0, 1], [7, 8], images=torch.zeros(2, 3, 4, 4))
    second = make_batch([0, 1, 1, 2], [8, 5, -1])
    assert (len(first), len(second)) == (2, 3)
    targets = pair_targets([first, second])
    assert targets["image_index"].tolist() == [0, 0, 1, 2, 3, 3, 4]
    assert targets["image_ids"].tolist() == [7, 8, 8, 5, -1]
    assert targets["weights"].tolist() == [1] * 5
    second.weights = torch.tensor([0.5, 0.25, 0.5])
    assert pair_targets([first, second])["weights"].tolist() == [1, 1, 0.5, 0.25, 0.5]
    alone = pair_targets([first])
    assert (alone["image_index"].tolist(), alone["image_ids"].tolist()) == ([0, 0, 1], [7, 8])
    assert alone["weights"] is None  # all 1


def test_batch_to_moves_every_tensor_and_keeps_none():
    batch = make_batch([0, 1], [3, 4], images=torch.zeros(2, 3, 4, 4), weights=torch.ones(2))
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        other = getattr(moved, name)
        assert (other is None) == (value is None), name
        assert value is None or (other.device.type == "meta" and other.shape == value.shape)


def test_loader_processes_give_the_same_batches_as_none(tiny_config):
    config = tiny_config(captions_per_image=2, micro_batch_size=5)
    pairs = load_splits(config)["train"]
    tokens = TokenStore(train_tokenizer(pairs.captions), pairs.captions, config.max_length)
    resolution = storage_resolution(32)
    store = ImageStore(pairs.files, resolution, build_image_cache(pairs.files, resolution, "cache", 0, False))
    items = TrainingPairs(pairs, store, tokens, 0, config)

    def epoch(workers, **options):
        sampler = PairSampler(pairs, config)
        return list(make_loader(items, workers, batch_sampler=sampler, collate_fn=items.collate, **options)), sampler

    state = torch.get_rng_state()
    alone, sampler = epoch(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global random state is left alone
    spawned, _ = epoch(1, multiprocessing_context="spawn")  # as on Windows and macOS
    assert len(alone) == len(spawned) == sum(sampler.micro_batch_counts())
    names = {"images", "image_ids", "input_ids", "attention_mask", "image_index"}
    for a, b in zip(alone, spawned, strict=True):
        assert {name for name, value in vars(a).items() if value is not None} == names
        assert {name for name, value in vars(b).items() if value is not None} == names
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)
    # And a batch holds what its keys say.
    keys, batch = next(iter(sampler)), alone[0]
    assert batch.image_ids.tolist() == [image for _, image, _ in keys]
    assert batch.image_index.tolist() == [row for row, (_, _, group) in enumerate(keys) for _ in group]
    captions = [j for _, _, group in keys for j in group]
    for ids, mask, j in zip(batch.input_ids, batch.attention_mask, captions, strict=True):
        assert ids[mask.bool()].tolist() == tokens[j].tolist()
    assert batch.images.shape == (len(keys), 3, 32, 32) and len(keys) <= 5
    assert batch.images.dtype == torch.uint8


@pytest.mark.parametrize("on_device", [False, True])
def test_batches_hold_the_ids_of_equal_captions(data_set, tiny_config, on_device):
    """They reach the loss also with micro-batches; without equal captions of two images there are none."""
    captions = {f"{n}.png": [f"A dog {n} ." * (1 + n % 3), "Two Dogs !" if n % 2 else f"cat {n}"] for n in range(20)}
    config = tiny_config(**data_set(captions, dev=["0.png"]), captions_per_image=2)
    pairs = load_splits(config)["train"]
    tokens = TokenStore(train_tokenizer(pairs.captions), pairs.captions, config.max_length)
    store = ImageStore(pairs.files, storage_resolution(32))
    items = TrainingPairs(pairs, store, tokens, 0, config, on_device=on_device)
    batches = [items.collate([items[0, i, tuple(pairs.captions_of(i))] for i in part]) for part in ((1, 2, 5), (0, 3))]
    targets = pair_targets(batches)
    texts = {tuple(tokens[j].tolist()): pairs.text_ids[j] for j in range(len(pairs.captions))}
    found = [
        texts[tuple(row[:n].tolist())]
        for batch in batches
        for row, n in zip(batch.input_ids, batch.attention_mask.sum(1).tolist(), strict=True)
    ]
    assert targets["text_ids"].tolist() == found and len({*found}) < len(found)
    assert pair_targets(batches[:1])["text_ids"].tolist() == found[:6]
    other = load_splits(tiny_config(**data_set({f"{n}.png": [f"A {n}", f"A {n}."] for n in range(20)})))["train"]
    assert other.text_ids is None  # equal captions of one image are none of two
    items = TrainingPairs(other, store, tokens, 0, config, on_device=on_device)
    assert items.collate([items[0, 1, (2, 3)], items[0, 0, (0, 1)]]).text_ids is None


def test_collate_uses_precomputed_features_of_frozen_encoders(tiny_config):
    config = tiny_config(captions_per_image=2)
    pairs = load_splits(config)["train"]
    tokens = TokenStore(train_tokenizer(pairs.captions), pairs.captions, config.max_length)
    store = ImageStore(pairs.files, storage_resolution(32))
    image_features, text_features = torch.randn(len(pairs.files), 7), torch.randn(len(pairs.captions), 5)
    keys = [(0, 3, (15, 17)), (0, 1, (6, 5))]
    items = TrainingPairs(pairs, store, tokens, 0, config, image_features)
    batch = items.collate([items[key] for key in keys])
    assert torch.equal(batch.image_features, image_features[[3, 1]]) and batch.images is None
    assert batch.input_ids.shape == batch.attention_mask.shape and len(batch.input_ids) == 4
    items = TrainingPairs(pairs, store, tokens, 0, config, None, text_features)
    batch = items.collate([items[key] for key in keys])
    assert torch.equal(batch.text_features, text_features[[15, 17, 6, 5]]) and batch.input_ids is None
    assert batch.images.shape == (2, 3, 32, 32)


def test_batch_for_a_gpu_has_stored_images_and_captions_in_parts_of_similar_length(tiny_config):
    """Captions are sorted by length and keep their images; the features are those of the same captions elsewhere."""
    config = tiny_config(captions_per_image=5)
    pairs = load_splits(config)["train"]
    model = CLIP(config, train_tokenizer(pairs.captions)).eval()
    tokens = TokenStore(model.tokenizer, pairs.captions, config.max_length)
    store = ImageStore(pairs.files, storage_resolution(32))
    keys = [(0, image, tuple(pairs.captions_of(image))) for image in range(20)]
    plain, for_gpu = (
        TrainingPairs(pairs, store, tokens, model.tokenizer.pad_token_id, config, on_device=on_device)
        for on_device in (False, True)
    )
    expected, found = (items.collate([items[key] for key in keys]) for items in (plain, for_gpu))
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), [store[image] for image in range(20)])
    assert found.images.is_contiguous(memory_format=torch.channels_last)
    assert found.augmentation.shape == (20, 8)
    lengths = found.attention_mask.sum(1).tolist()
    assert lengths == sorted(lengths) and len(found.text_parts) == 3
    assert sum(rows for rows, _ in found.text_parts) == 100
    captions = [(row, *ids) for row, ids in zip(found.image_index.tolist(), found.input_ids.tolist(), strict=True)]
    others = [(row, *ids) for row, ids in zip(expected.image_index.tolist(), expected.input_ids.tolist(), strict=True)]
    assert sorted(captions) == sorted(others)
    with torch.no_grad():
        in_parts = model.text_encoder(found.input_ids, found.attention_mask, found.text_parts)
        assert torch.allclose(in_parts, model.text_encoder(found.input_ids, found.attention_mask), atol=1e-5)


def test_parts_are_padded_to_a_multiple_of_eight():
    assert split_by_length([3] * 40 + [9] * 24 + [21]) == ((32, 8), (33, 21))
    assert split_by_length([5, 9]) == ((2, 9),)
    assert split_by_length([7] * 200 + [30]) == ((50, 8), (50, 8), (50, 8), (51, 30))


# ---- Flickr8k ---------------------------------------------------------------------------------------------------


def test_flickr8k_is_read_completely(flickr8k, tmp_path):
    paths = {"image_path": str(flickr8k / "Images"), "captions_path": str(flickr8k)}
    config = Config(**tiny_settings(tmp_path, **paths, size=96, cache_images=False, captions_per_image=5))
    frame = read_captions(flickr8k)
    assert (frame.groupby("image").size() == 5).all()
    assert not frame["caption"].str.contains(re.compile(r"^\s|\s$|^$")).any()
    splits = load_splits(config)
    for split, number in (("train", 6000), ("validation", 1000)):
        assert len(splits[split].files) == number
        assert len(splits[split].captions) == 5 * number
    assert not set(splits["train"].names) & set(splits["validation"].names)
    pairs = splits["train"]
    tokens = TokenStore(train_tokenizer(pairs.captions), pairs.captions, 32)
    items = TrainingPairs(pairs, ImageStore(pairs.files, storage_resolution(96)), tokens, 0, config)
    batch = next(iter(make_loader(items, 0, batch_sampler=PairSampler(pairs, config), collate_fn=items.collate)))
    assert batch.images.shape == (8, 3, 96, 96)
    assert batch.image_index.tolist() == [row for row in range(8) for _ in range(5)]
    assert batch.images.float().std() > 20
