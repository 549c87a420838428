"""From files to batches: captions, splits, pictures, the cache, tokens, the order of an epoch."""

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_picture, quarters, tiny_settings

import dataset
from config import Config, InputError
from dataset import (
    EvaluationImages,
    PairSampler,
    TokenStore,
    TrainingPairs,
    TrainTransform,
    captions_by_image,
    load_splits,
    make_loader,
    make_pairs,
    pad_tokens,
    pairs_of,
    plan_batches,
    read_captions,
    resize_image,
    split_images,
    train_tokenizer,
)
from images import ImageStore, build_image_cache, stored_side


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def rows(path):
    return list(read_captions(path).itertuples(index=False, name=None))


# ---- captions ---------------------------------------------------------------------------------------------------

DOGS = [("a.jpg", "A dog , running ."), ("a.jpg", 'The "dog" runs'), ("b.jpg", "NA")]
CSV = 'image,caption\na.jpg,"A dog , running ."\na.jpg,"The ""dog"" runs"\nb.jpg,NA\n'
TOKEN = 'a.jpg#0\tA dog , running .\na.jpg#1\tThe "dog" runs\nb.jpg#0\tNA\n'


@pytest.mark.parametrize("text", [CSV, TOKEN], ids=["csv", "token"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text.replace("\n", "\r\n") + "\r\n \r\n",
        lambda text: re.sub(r"(?<!\")\n", "  \n", text).replace(' ."', ' .  "'),
        lambda text: "\n" + text.replace("b.jpg", "\nb.jpg"),
        lambda text: text.rstrip("\n"),
    ],
    ids=["plain", "mark", "windows", "both", "blanks", "empty lines", "no last newline"],
)
def test_read_captions_whatever_wrote_the_file(tmp_path, text, change):
    assert rows(write(tmp_path / "x.dat", change(text))) == DOGS


def test_read_captions_of_a_csv_with_more_columns_in_another_order(tmp_path):
    text = 'number,Caption,Image\n0,"A dog , running .",a.jpg\n1,The ""dog"" runs,a.jpg\n'
    assert rows(write(tmp_path / "c.csv", text)) == [DOGS[0], ("a.jpg", 'The ""dog"" runs')]


@pytest.mark.parametrize("name", ["captions.txt", "captions.csv", "Flickr8k.token.txt"])
def test_read_captions_finds_the_file_in_a_folder(tmp_path, name):
    write(tmp_path / name, TOKEN)
    assert rows(tmp_path) == rows(tmp_path / name) == DOGS


def test_the_ghost_image_of_flickr8k_is_left_out(tmp_path):
    ghost = "".join(f"2258277193_586949ec62.jpg.1#{i}\tTwo people .\n" for i in range(5))
    assert rows(write(tmp_path / "Flickr8k.token.txt", ghost + TOKEN)) == DOGS


def test_a_blank_caption_beside_others_is_left_out(tmp_path):
    assert rows(write(tmp_path / "c.csv", CSV + 'a.jpg,\nb.jpg," "\n')) == DOGS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("image,caption\n", "holds no captions"),
        (b"image,caption\na.jpg,\xff\xfe\n", "cannot be read as UTF-8"),
        ("picture;text\na.jpg;dog\n", r"starts with \['picture;text'\].*`image` and `caption`"),
        ("x" * 200_000, "starts with"),
        ("image,caption\na.jpg,A dog, running\n", "line 2: 3 columns instead of 2.*quotes"),
        ("image,caption\na.jpg\n", "line 2: 1 columns instead of 2"),
        ('image,caption\na.jpg,"A dog\nb.jpg,A cat\n', "line 3 cannot be read as CSV"),
        ("a.jpg#0\tA dog\nb.jpg#0 A cat\n", "line 2: no tab"),
        ("image,caption\na.jpg,A dog\nb.jpg,\nc.jpg,\n", r"line 3: image 'b.jpg' has no caption \(1 more"),
        ("image,caption\na.jpg," + "word " * 10_000, "line 2: a caption of 10,000 words .at most 1,000"),
        ("image,caption\n,A dog\n", "line 2: the picture name ''"),
    ],
)
def test_read_captions_names_what_is_wrong(tmp_path, content, message):
    path = write(tmp_path / "captions.txt", content)
    with pytest.raises(InputError, match=message) as error:
        read_captions(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", r"..\x.jpg", r"C:\x.jpg", "C:x.jpg", r"\\s\x.jpg"]
)
def test_a_picture_name_outside_the_folder_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="does not lie inside the image folder"):
        read_captions(write(tmp_path / "captions.txt", f"image,caption\n{name},A dog\n"))


def test_picture_names_may_hold_folders_dots_and_blanks(tmp_path):
    text = "image,caption\nsub/my dog..jpg,A dog\n"
    assert rows(write(tmp_path / "captions.txt", text)) == [("sub/my dog..jpg", "A dog")]


def test_names_are_those_of_the_captions_file(data_set, tiny_config):
    names = [f"{n}/img.png" for n in range(12)]
    splits = load_splits(tiny_config(**data_set({name: ["A dog ."] for name in names}, dev=names[:2])))
    assert sorted(splits["train"].names) == sorted(names[2:])
    assert pairs_of(splits["train"], [3, 1]).names == [splits["train"].names[3], splits["train"].names[1]]


def test_token_file_with_a_blank_in_a_name(tmp_path):
    assert rows(write(tmp_path / "c.txt", "my photo.jpg#0\ta dog\n")) == [("my photo.jpg", "a dog")]


# ---- splits -----------------------------------------------------------------------------------------------------

NAMES = [f"{number:02d}.jpg" for number in range(40)]
OFFICIAL = {"train": NAMES[:20], "dev": NAMES[20:26], "test": NAMES[26:31]}


def write_lists(folder, *kinds):
    for kind in kinds:
        write(folder / f"Flickr_8k.{kind}Images.txt", "".join(f"{name}\n" for name in OFFICIAL[kind]))


@pytest.mark.parametrize("kinds", [[], *([a] for a in OFFICIAL), ["train", "dev"], ["train", "test"], ["dev", "test"],
                                   ["train", "dev", "test"]])  # fmt: skip
def test_split_files_are_honoured_whichever_are_there(tmp_path, kinds):
    write_lists(tmp_path, *kinds)
    splits = split_images(NAMES, tmp_path, seed=1)
    assert list(splits) == ["train", "validation", "test"]
    every = [name for names in splits.values() for name in names]
    assert len(every) == len(set(every))  # no image in two splits
    for kind, split in (("dev", "validation"), ("test", "test")):
        if kind in kinds:
            assert splits[split] == OFFICIAL[kind]
    listed = {name for kind in kinds for name in OFFICIAL[kind]}
    train = set(splits["train"])
    if not kinds:
        assert [len(names) for names in splits.values()] == [32, 4, 4]
        assert set(every) == set(NAMES)
    elif "train" in kinds:
        assert train | set(splits["validation"]) <= listed  # unlisted images are left out
        assert len(splits["validation"]) == (6 if "dev" in kinds else 2)
        assert "dev" not in kinds or splits["train"] == OFFICIAL["train"]
    else:
        assert set(every) == set(NAMES)  # unlisted images train
    if kinds and "test" not in kinds:
        assert splits["test"] == []


def test_the_seeded_split_depends_on_the_names_and_the_seed_alone(tmp_path):
    assert split_images(NAMES, tmp_path, 1) == split_images(NAMES[::-1], tmp_path, 1)
    assert split_images(NAMES, tmp_path, 1) != split_images(NAMES, tmp_path, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("00.jpg\nzz.jpg\nyy.jpg\n", "trainImages.txt names zz.jpg and 1 more, without a caption"),
        ("00.jpg\n20.jpg\n", "20.jpg is in two split files, Flickr_8k.trainImages.txt and Flickr_8k.devImages.txt"),
        (b"\xff\xfe\x00", "trainImages.txt cannot be read as UTF-8"),
    ],
)
def test_impossible_split_files_are_refused(tmp_path, text, message):
    write_lists(tmp_path, "dev")
    write(tmp_path / "Flickr_8k.trainImages.txt", text)
    with pytest.raises(InputError, match=message):
        split_images(NAMES, tmp_path, 1)


def test_split_files_may_hold_blanks_windows_ends_and_a_mark(tmp_path):
    write(tmp_path / "Flickr_8k.devImages.txt", "\ufeffmy dog.jpg \r\n\r\n01.jpg\r\n01.jpg")
    assert split_images([*NAMES, "my dog.jpg"], tmp_path, 1)["validation"] == ["my dog.jpg", "01.jpg"]


def test_captions_stay_with_their_image(data_set, tmp_path):
    captions = {f"{i:02d}.jpg": [f"picture {i} caption {j}" for j in range(1 + i % 4)] for i in range(20)}
    splits = load_splits(Config(**tiny_settings(tmp_path, **data_set(captions))))
    seen = []
    for pairs in splits.values():
        for image, name in enumerate(pairs.names):
            own = pairs.captions[pairs.first[image] : pairs.first[image + 1]]
            assert own == captions[name]
            assert pairs.image_index[pairs.first[image] : pairs.first[image + 1]].tolist() == [image] * len(own)
        seen += pairs.captions
    assert sorted(seen) == sorted(text for texts in captions.values() for text in texts)


def test_rows_of_one_image_need_not_be_neighbours(tmp_path):
    text = "image,caption\na.jpg,one\nb.jpg,two\na.jpg,three\n"
    pairs = make_pairs(captions_by_image(read_captions(write(tmp_path / "c.txt", text))), "pictures")
    assert pairs.files == [Path("pictures/a.jpg"), Path("pictures/b.jpg")]
    assert pairs.captions == ["one", "three", "two"]
    assert (pairs.image_index.tolist(), pairs.first.tolist()) == ([0, 0, 1], [0, 2, 3])


def test_a_missing_picture_is_named_and_the_others_counted(data_set, tmp_path):
    paths = data_set({f"{i:02d}.jpg": ["A dog ."] for i in range(20)})
    for name in ("03.jpg", "04.jpg", "05.jpg"):
        (Path(paths["image_path"]) / name).unlink()
    with pytest.raises(InputError, match=r"picture .*0[345]\.jpg is missing \(and 2 more\)"):
        load_splits(Config(**tiny_settings(tmp_path, **paths)))


def test_a_picture_name_no_system_allows_is_missing(tmp_path):
    with pytest.raises(InputError, match="is missing"):
        dataset.check_files([tmp_path / ("x" * 5000)])


# ---- transforms -----------------------------------------------------------------------------------------------


def test_evaluation_shows_the_whole_picture(tmp_path):
    image = quarters(32)
    assert np.array_equal(resize_image(image, 16), quarters(16))
    draw_picture(tmp_path / "a.png", (64, 64))
    store = ImageStore([tmp_path / "a.png"], 36)
    item = EvaluationImages(store, [0], 32)[0]
    assert (item.shape, item.dtype) == ((3, 32, 32), torch.uint8)
    corners = store[0][[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)
    assert np.abs(item.permute(1, 2, 0).numpy()[[2, 2, -3, -3], [2, -3, 2, -3]] - corners).max() < 12


def test_training_transform_is_drawn_from_its_seed_alone():
    transform, again = TrainTransform(32, 0.5, 0.2), TrainTransform(32, 0.5, 0.2)
    image = np.random.default_rng(0).integers(0, 256, (37, 37, 3), dtype=np.uint8)
    first = [transform(image, [42, 0, i], True) for i in range(8)]
    second = [again(image, [42, 0, i], True) for i in reversed(range(8))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({picture.tobytes() for picture in first}) == 8
    assert {picture.shape for picture in first} == {(32, 32, 3)}
    assert not np.array_equal(first[0], transform(image, [42, 1, 0], True))


def test_training_transform_mirrors_half_of_the_pictures_it_may():
    transform = TrainTransform(32, 1.0, 0.0)  # nothing but the flip
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    kinds = Counter()
    for seed in range(200):
        assert np.array_equal(transform(image, [seed], False), image)
        flipped = transform(image, [seed], True)
        kinds["same" if np.array_equal(flipped, image) else "mirrored"] += 1
        assert np.array_equal(flipped, image) or np.array_equal(flipped, image[:, ::-1])
    assert 70 < kinds["mirrored"] < 130


def test_captions_that_say_left_or_right_are_never_mirrored(data_set, tmp_path):
    captions = {f"{i:02d}.png": ["A dog on the LEFT ."] if i % 2 else ["A dog leftover , bright ."] for i in range(20)}
    config = Config(**tiny_settings(tmp_path, **data_set(captions), crop_scale=1.0, color_jitter=0.0, size=32))
    pairs = load_splits(config)["train"]
    store = ImageStore(pairs.files, stored_side(32))
    items = TrainingPairs(pairs, store, None, 0, config)
    mirrored = Counter()
    for image in range(len(pairs.files)):
        plain = resize_image(store[image], 32)
        sided = "LEFT" in pairs.captions[image]
        for epoch in range(20):
            pixels, _ = items[epoch, image, (int(pairs.first[image]),)]
            same = np.array_equal(pixels.permute(1, 2, 0).numpy(), plain)
            mirrored[sided] += not same
    assert mirrored[True] == 0
    assert mirrored[False] > 20


# ---- text -------------------------------------------------------------------------------------------------------

TEXTS = ["A dog runs .", "the Dog , and the cat !", "zebras", "a  dog"]


def test_tokenizer_is_the_same_for_the_same_captions():
    first, second = train_tokenizer(TEXTS), train_tokenizer(TEXTS)
    assert first.get_vocab() == second.get_vocab()
    assert first(TEXTS)["input_ids"] == second(TEXTS)["input_ids"]
    assert first.convert_ids_to_tokens(first("The DOG")["input_ids"]) == ["[CLS]", "the", "dog", "[SEP]"]


def test_tokenizer_spells_rare_words_and_knows_what_it_does_not_know():
    tokenizer = train_tokenizer(TEXTS)
    spelt = ["[CLS]", "z", "##e", "##b", "##r", "##a", "##s", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("zebras")["input_ids"]) == spelt
    assert tokenizer.convert_ids_to_tokens(tokenizer("ж dog")["input_ids"]) == ["[CLS]", "[UNK]", "dog", "[SEP]"]
    assert tokenizer.pad_token_id == 0


def test_token_store_holds_what_the_tokenizer_gives():
    tokenizer = train_tokenizer(TEXTS)
    store = TokenStore(tokenizer, TEXTS, 5)
    assert len(store) == 4
    assert [store[i].tolist() for i in range(4)] == tokenizer(TEXTS, truncation=True, max_length=5)["input_ids"]
    assert max(len(store[i]) for i in range(4)) == 5


def test_pad_tokens_pads_to_the_longest():
    input_ids, attention_mask = pad_tokens([np.array([5, 6, 7]), np.array([8])], 9)
    assert input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert input_ids.dtype == attention_mask.dtype == torch.int64


# ---- the order of an epoch --------------------------------------------------------------------------------------


def ragged(seed):
    """Random caption counts, some far larger than the others, and a batch size."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, rng.integers(2, 9), rng.integers(2, 40))
    if seed % 3 == 0:
        counts[rng.integers(len(counts))] = 30
    return counts, int(rng.integers(2, 20))


@pytest.mark.parametrize("seed", range(60))
def test_plan_batches_shows_each_group_once_and_no_image_twice_in_a_batch(seed):
    counts, batch_size = ragged(seed)
    batches = list(plan_batches(counts, batch_size, np.random.default_rng(seed)))
    assert all(len(set(batch.tolist())) == len(batch) for batch in batches)
    assert np.array_equal(np.bincount(np.concatenate(batches), minlength=len(counts)), counts)
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == max(-(-counts.sum() // batch_size), counts.max())


def test_plan_batches_with_equal_counts_goes_round_by_round_in_new_orders():
    batches = np.concatenate(list(plan_batches(np.full(12, 3), 4, np.random.default_rng(0)))).reshape(3, 12)
    assert all(sorted(order) == list(range(12)) for order in batches.tolist())
    assert len({tuple(order) for order in batches.tolist()}) == 3


def pairs_with(counts):
    return SimpleNamespace(first=np.concatenate([[0], np.cumsum(counts)]))


def sampler_settings(batch_size, k, micro=0):
    return Config(batch_size=batch_size, captions_per_image=k, micro_batch_size=micro, seed=3)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("k", [1, 2, 5])
def test_an_epoch_shows_every_pair_once(seed, k):
    counts, batch_size = ragged(seed)
    pairs = pairs_with(counts)
    sampler = PairSampler(pairs, sampler_settings(batch_size, k))
    plan = list(sampler.plan())
    assert len(plan) == sampler.batches
    keys = [key for batch in plan for micro_batch in batch for key in micro_batch]
    assert sorted(j for _, _, group in keys for j in group) == list(range(counts.sum()))
    for _, image, group in keys:
        assert 1 <= len(group) <= k
        assert all(pairs.first[image] <= j < pairs.first[image + 1] for j in group)
    for batch in plan:
        images = [image for micro_batch in batch for _, image, _ in micro_batch]
        assert len(images) == len(set(images)) <= batch_size


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_any_number_of_processes_share_each_batch(processes):
    pairs, config = pairs_with([5] * 37), sampler_settings(16, 2, micro=3)
    whole = [sorted(key for part in batch for key in part) for batch in PairSampler(pairs, config).plan()]
    samplers = [PairSampler(pairs, config, rank, processes) for rank in range(processes)]
    plans = [list(sampler.plan()) for sampler in samplers]
    for number, batch in enumerate(whole):
        shares = [[key for part in plan[number] for key in part] for plan in plans]
        assert sorted(key for share in shares for key in share) == batch
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for sampler, plan in zip(samplers, plans, strict=True):
        assert sampler.micro_batch_counts() == [len(batch) for batch in plan]
        assert max(len(part) for batch in plan for part in batch) <= 3


def test_start_enters_the_same_epoch_at_a_later_batch():
    pairs, config = pairs_with([1, 5, 3, 2, 4, 5, 5, 1]), sampler_settings(4, 1, micro=3)
    sampler, other = PairSampler(pairs, config), PairSampler(pairs, config)
    sampler.epoch = other.epoch = 4
    whole = list(sampler.plan())
    for start in range(sampler.batches + 1):
        other.start = start
        assert list(other) == [part for batch in whole[start:] for part in batch]
        assert other.micro_batch_counts() == [len(batch) for batch in whole[start:]]


def test_epochs_and_seeds_have_orders_of_their_own():
    pairs, config = pairs_with([5] * 10), sampler_settings(4, 1)
    sampler = PairSampler(pairs, config)
    first = [[key[1:] for key in part] for part in sampler]
    assert [[key[1:] for key in part] for part in PairSampler(pairs, config)] == first
    sampler.epoch = 1
    assert [[key[1:] for key in part] for part in sampler] != first
    other = PairSampler(pairs, Config(batch_size=4, seed=4))
    assert [[key[1:] for key in part] for part in other] != first


def test_loader_processes_give_the_same_batches_as_none(tiny_config):
    config = tiny_config(captions_per_image=2, micro_batch_size=5)
    pairs = load_splits(config)["train"]
    tokens = TokenStore(train_tokenizer(pairs.captions), pairs.captions, config.max_length)
    store = ImageStore(pairs.files, stored_side(32), build_image_cache(pairs.files, stored_side(32), "cache", 0, False))
    items = TrainingPairs(pairs, store, tokens, 0, config)

    def epoch(workers, **options):
        sampler = PairSampler(pairs, config)
        return list(make_loader(items, workers, batch_sampler=sampler, collate_fn=items.collate, **options)), sampler

    alone, sampler = epoch(0)
    spawned, _ = epoch(1, multiprocessing_context="spawn")  # as on Windows and macOS
    assert len(alone) == len(spawned) == sum(sampler.micro_batch_counts())
    for a, b in zip(alone, spawned, strict=True):
        assert a.keys() == b.keys() == {"images", "image_ids", "input_ids", "attention_mask", "image_index"}
        assert all(torch.equal(a[name], b[name]) for name in a)
    # And a batch holds what its keys say.
    keys, batch = next(iter(sampler)), alone[0]
    owners = [row for row, (_, _, group) in enumerate(keys) for _ in group]
    assert batch["image_index"].tolist() == owners
    captions = [j for _, _, group in keys for j in group]
    for ids, mask, j in zip(batch["input_ids"], batch["attention_mask"], captions, strict=True):
        assert ids[mask.bool()].tolist() == tokens[j].tolist()
    assert batch["images"].shape == (len(keys), 3, 32, 32) and len(keys) <= 5
    assert batch["images"].dtype == torch.uint8


# ---- the real photographs ---------------------------------------------------------------------------------------


def test_flickr8k_is_read_whole(flickr8k, tmp_path):
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
    items = TrainingPairs(pairs, ImageStore(pairs.files, stored_side(96)), tokens, 0, config)
    batch = next(iter(make_loader(items, 0, batch_sampler=PairSampler(pairs, config), collate_fn=items.collate)))
    assert batch["images"].shape == (8, 3, 96, 96)
    assert batch["image_index"].tolist() == [row for row in range(8) for _ in range(5)]
    assert batch["images"].float().std() > 20
