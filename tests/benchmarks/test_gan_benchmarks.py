"""Benchmarks of the GAN: statistics, metrics, controls, and a tiny run of each."""

import csv
import dataclasses
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import combinations  # noqa: E402
import control_arms  # noqa: E402
import gan_ablation  # noqa: E402
import gan_evaluate  # noqa: E402
from common import parse_caption  # noqa: E402
from conftest import flags, tiny_settings  # noqa: E402
from gan_fixtures import CPU, TINY, as_flags  # noqa: E402

import gan  # noqa: E402
import main  # noqa: E402
from config import InputError, build_config  # noqa: E402
from dataset import load_splits  # noqa: E402
from utils.files import read_json  # noqa: E402
from utils.synthetic import COLORS, SHAPES, all_scenes, generate_dataset, render_scene, scene_captions  # noqa: E402

# ---- captions ----------------------------------------------------------------------------------------------------


def test_parse_caption_returns_the_contents_of_the_scene():
    for scene in all_scenes():
        for caption in scene_captions(scene):
            background, objects = parse_caption(caption)
            assert background == scene[0] and sorted(objects) == sorted([scene[1], scene[3]])
    for other in ("Two dogs on a red square .", "A red ring and a blue box .", "A dog on grass ."):
        assert parse_caption(other) is None


# ---- statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "quantile"), [(5, 2.776), (6, 2.571), (10, 2.262), (20, 2.093)])
def test_interval_uses_the_quantile_of_students_t(n, quantile):
    differences = np.random.default_rng(0).normal(size=n).tolist()
    mean, half_width = gan_ablation.interval(differences)
    assert mean == pytest.approx(statistics.mean(differences))
    assert half_width == pytest.approx(quantile * statistics.stdev(differences) / n**0.5, rel=1e-3)


def test_interval_contains_the_mean_in_95_percent_of_cases():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    held = [abs(mean - 3.0) <= half for mean, half in map(gan_ablation.interval, draws.tolist())]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_table_pairs_the_seeds_and_reports_too_few_seeds():
    real = {1: {"R@1": 10.0}, 2: {"R@1": 30.0}, 3: {"R@1": 20.0}, 4: {"R@1": 50.0}, 5: {"R@1": 40.0}}
    more = {
        seed: {"R@1": metrics["R@1"] + gain}
        for (seed, metrics), gain in zip(real.items(), (1, 2, 1, 2, 1.5), strict=True)
    }
    rows = gan_ablation.table({"real": real, "pairs": more}, [1, 2, 3, 4, 5])
    half_width = 2.776 * statistics.stdev([1, 2, 1, 2, 1.5]) / 5**0.5
    assert rows[1]["R@1"].startswith(f"31.5 (+1.50 +- {half_width:.1f}")
    assert rows[1]["R@1"].endswith(", *)")
    results = {"real": real, "blurred": real, "pairs": more, "captions": more}
    found = gan_ablation.claims(results, [1, 2, 3, 4, 5])
    assert [(row["arm"], row["control"], row["p"]) for row in found] == [
        ("pairs", "real", "0.0077"),
        ("pairs", "blurred", "0.0077"),
        ("pairs", "captions", "1"),
    ]
    assert all(row["difference"] in rows[1]["R@1"] for row in found[:2])
    few = gan_ablation.table({"real": real, "pairs": more}, [1, 2, 3, 4])
    assert few[1]["R@1"] == "29.0 (too few seeds)"


# ---- metrics of the images --------------------------------------------------------------------------------------


def test_kernel_distance_equals_double_loops():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 5)), rng.normal(0.5, 1, size=(12, 5))

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 5 + 1) ** 3

    within = sum(kernel(x[i], x[j]) / (12 * 11) for x in (a, b) for i in range(12) for j in range(12) if i != j)
    between = sum(kernel(x, y) for x in a for y in b) / 144
    distance, std = gan_evaluate.kernel_distance(a, b, rng, subsets=3, size=12)
    assert distance == pytest.approx(1000 * (within - 2 * between))
    assert std == pytest.approx(0, abs=1e-9)  # each subset is the full set


def test_caption_ranks_are_among_a_hundred():
    texts = torch.eye(150)
    images = texts.clone()
    images[0] = -texts[0]  # below all others
    ranks = gan_evaluate.caption_ranks(images, texts, np.random.default_rng(0))
    assert ranks[0] == 100
    assert (ranks[1:] == 1).all()


def test_diversity_is_0_for_copies_and_1_for_unrelated_images():
    torch.manual_seed(0)
    copies = torch.randn(10, 1, 8).expand(-1, 4, -1)
    assert gan_evaluate.diversity(copies) == pytest.approx(0, abs=1e-3)
    assert gan_evaluate.diversity(torch.randn(40, 4, 8)) == pytest.approx(1, abs=0.05)


def test_color_accuracy_of_synthetic_images():
    rng = np.random.default_rng(0)
    scenes = [all_scenes()[i] for i in rng.permutation(len(all_scenes()))[:40]]
    images = [torch.from_numpy(np.array(render_scene(s, rng).resize((32, 32)))).permute(2, 0, 1) / 255 for s in scenes]
    captions = [scene_captions(scene)[int(rng.integers(5))] for scene in scenes]
    background, objects = gan_evaluate.color_accuracy(images, captions)
    assert background == 100
    assert objects >= 97
    other_background, other_objects = gan_evaluate.color_accuracy(images, captions[1:] + captions[:1])
    assert other_background < 50
    assert other_objects < 60
    assert gan_evaluate.color_accuracy(images[:1], ["Two dogs ."]) == (None, None)


def test_object_accuracy_counts_the_top_2():
    def classifier(images):  # always the objects 0 and 1
        return torch.arange(len(gan_evaluate.OBJECTS), 0, -1).float().expand(len(images), -1)

    (one, two, three), images = gan_evaluate.OBJECTS[:3], torch.zeros(3, 3, 32, 32)
    captions = [scene_captions(("sand", a, "left of", b))[0] for a, b in ((one, two), (three, one))]
    captions.insert(1, "A dog .")
    assert gan_evaluate.object_accuracy(classifier, images, captions) == 75
    assert gan_evaluate.object_accuracy(classifier, images, ["A dog ."] * 3) is None


def test_classifier_learns_from_synthetic_images(monkeypatch):
    monkeypatch.setattr(gan_evaluate, "NUM_TRAINING_IMAGES", 1000)
    classifier = gan_evaluate.train_classifier(16, CPU)
    rng, scenes = np.random.default_rng(1), all_scenes()
    chosen = [scenes[i] for i in rng.permutation(len(scenes))[:100]]
    rendered = np.stack([np.asarray(render_scene(scene, rng).resize((16, 16))) for scene in chosen])
    images = torch.from_numpy(rendered).permute(0, 3, 1, 2) / 255
    captions = [scene_captions(scene)[0] for scene in chosen]
    assert gan_evaluate.object_accuracy(classifier, images, captions) > 50  # chance: 10


def test_evaluation_uses_images_that_run_and_evaluator_have_not_seen(tmp_path, monkeypatch, tiny_config, refused):
    paths = {"image_path": str(tmp_path / "shapes/Images"), "captions_path": str(tmp_path / "shapes/captions.txt")}
    generate_dataset(**paths, train_images=80, validation_images=10, test_images=10)
    for path in (tmp_path / "shapes").glob("*Images.txt"):
        path.unlink()  # each seed now gives another split
    for run, seed in (("stage1", 1), ("evaluator", 3)):
        main.main(flags(tiny_config(**{**paths, "epochs": 1, "run": run, "seed": seed})))
    gan.main(["--run", "stage1", *as_flags({**TINY, "gan_epochs": 1})])
    configs = [build_config(read_json(Path(run) / "config.json")) for run in ("stage1", "evaluator")]
    unseen = set(load_splits(configs[0])["test"].names) - set(load_splits(configs[1])["train"].names)
    assert 2 <= len(unseen) < 10
    words = ["--run", "stage1", "--evaluator", "evaluator"]
    (tmp_path / "shapes").rename(tmp_path / "moved")
    words += ["--image_path", "moved/Images", "--captions_path", "moved/captions.txt"]
    assert f"{len(unseen)} test images are unseen" in refused(gan_evaluate.main, words)
    saved = {}
    monkeypatch.setattr(gan_evaluate, "NUM_CAPTIONS", 2)
    monkeypatch.setattr(gan_evaluate, "NUM_TRAINING_IMAGES", 64)
    monkeypatch.setattr(gan_evaluate, "report", lambda name, rows, **more: saved.update(rows=rows, **more))
    gan_evaluate.main(words)
    assert saved["images"] == len(unseen)
    assert [row["in the top 10 (%)"] for row in saved["rows"]] == [100, 100]


# ---- held-out combinations and controls -------------------------------------------------------------------------


def test_held_out_combinations_are_spread_evenly():
    combinations = [(color, shape) for color in COLORS for shape in SHAPES]
    chosen = gan_ablation.spread(combinations, 8, np.random.default_rng(0))
    assert len(set(chosen)) == 8
    assert {color for color, _ in chosen} == set(COLORS)
    assert all(sum(shape == s for _, shape in chosen) == 2 for s in SHAPES)


@pytest.fixture
def small_flags(tmp_path, monkeypatch):
    """Flags for a synthetic data set of 24 training, 20 validation and 40 test images and a tiny GAN."""
    monkeypatch.setattr(gan_ablation, "NUM_VALIDATION", 20)
    monkeypatch.setattr(gan_ablation, "NUM_TEST", 40)
    settings = {
        **tiny_settings(tmp_path),
        "image_path": "d/Images",
        "captions_path": "d/captions.txt",
        "sample_images": 24,
        "captions_per_image": 5,
        "gan_size": 32,
        "gan_width": 4,
        "gan_epochs": 1,
        "gan_batch_size": 8,
        "gan_filter_top_k": 100,
        "gan_start": 0.0,
        "gan_end": 1.0,
    }
    del settings["run"]
    return as_flags(settings)


def keep_in(saved):
    return lambda name, rows, details, folder, **more: saved.update(rows=rows, **details, **more)


def test_ablation_with_held_out_combinations(tmp_path, monkeypatch, small_flags):
    saved, words = {}, small_flags
    monkeypatch.setattr(gan_ablation, "report", keep_in(saved))
    own = ["--held_out", "4", "--seeds", "1", "--folder", "out", "--arms", "shuffled", "blurred", "captions"]
    gan_ablation.main([*own, *words])
    assert [row["arm"] for row in saved["rows"]] == ["real", "shuffled", "blurred", "captions"]
    assert "no conclusion" in saved["note"] and "ensembles" not in saved
    assert saved["runs"]["shuffled"][1].keys() == saved["runs"]["real"][1].keys() >= {"R@1", "R@1 held-out"}
    folder = tmp_path / "out" / "share-1-held-out-4-data-0"
    absent = [tuple(pair) for pair in read_json(folder / "data" / "held_out.json")["combinations"]]
    synonyms = {shape: {shape, second} for shape, second in SHAPES.items()}
    with open(folder / "data" / "captions.txt", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    tested = {split: [c for name, c in rows if name.startswith(split)] for split in ("train", "dev", "test")}

    def shows(caption):
        return any(f"{color} {word}" in caption.lower() for color, shape in absent for word in synonyms[shape])

    assert len(absent) == 4
    assert not any(map(shows, tested["train"] + tested["dev"]))
    assert sum(map(shows, tested["test"])) == 20 * 5
    listed = (folder / "data" / "scenes.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.partition("\t")[2] for line in listed]
    assert 0.8 * gan_ablation.NUM_NEW_CAPTIONS < sum(map(shows, listed)) <= gan_ablation.NUM_NEW_CAPTIONS
    assert not set(listed) & set(tested["test"])
    steps = [(folder / f"{arm}-1" / "metrics.jsonl").read_text(encoding="utf-8") for arm in ("real", "captions")]
    assert all('"steps": 3,' in text for text in steps)  # variants of captions add no steps
    # A second call does not train again.
    before = (folder / "real-1" / "last.pt").stat().st_mtime_ns
    gan_ablation.main([*own, *words])
    assert (folder / "real-1" / "last.pt").stat().st_mtime_ns == before


def test_ablation_with_fewer_images_and_captions_of_no_image(tmp_path, monkeypatch, refused, small_flags):
    saved, words = {}, small_flags
    monkeypatch.setattr(gan_ablation, "report", keep_in(saved))
    monkeypatch.setattr(gan_ablation, "MIN_SEEDS", 2)
    own = ["--share", "0.5", "--seeds", "1", "2", "--folder", "out", "--arms", "pairs"]
    gan_ablation.main([*own, *words])
    assert [row["arm"] for row in saved["rows"]] == ["real", "pairs"]
    assert set(saved["ensembles"]) == {"real + pairs", "real + real"}
    folder = tmp_path / "out" / "share-0.5-held-out-0-data-0"
    config = build_config(read_json(folder / "pairs-1" / "config.json"))
    assert config.epochs == 2 and config.gan_epochs == 2  # half of the images, twice the epochs
    pairs = load_splits(config)
    assert [len(pairs[split].files) for split in ("train", "validation", "test")] == [12, 20, 40]
    known = {caption for split in pairs.values() for caption in split.captions}
    for arm in ("sentences", "new_captions"):
        path = gan_ablation.arm_settings(arm, config, folder, folder / "stage1")["gan_captions"]
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        captions = {line.rpartition("\t")[2] for line in lines}
        assert captions and not captions & known
    monkeypatch.setattr(gan_ablation, "run_arm", stop)
    with pytest.raises(SystemExit) as exit:
        gan_ablation.main([*own, *words])
    assert exit.value.code == 130
    # Runs with other settings are not mixed.
    assert "gan_ratio is 0.5, but" in refused(gan_ablation.main, [*own, *words, "--gan_ratio", "0.5"])


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("own", "line"),
    [
        (["--arms", "sentences", "--held_out", "4"], "the arm sentences requires"),
        (["--seeds", "-1"], "must be at least 0"),
        (["--data_seed", "-1"], "must be at least 0"),
        (["--share", "0"], "share must be"),
        (["--arms", "nearest"], "the arm nearest requires --held_out"),
        (["--gan_captions", "x.txt"], "gan_captions is set by the benchmark"),
    ],
)
def test_ablation_refuses_bad_arguments(tmp_path, small_flags, refused, own, line):
    assert line in refused(gan_ablation.main, [*own, "--folder", "out", *small_flags])
    assert not (tmp_path / "out").exists()


def test_ablation_help_describes_the_arms(capsys):
    with pytest.raises(SystemExit):
        gan_ablation.main(["--help"])
    printed = capsys.readouterr().out
    assert "usage: gan_ablation.py" in printed
    assert "--held_out" in printed and "negative control" in printed


def test_shuffled_pairs_have_the_caption_of_the_next_and_blurred_ones_the_real_image(
    tmp_path, tiny_config, trained_run
):
    shutil.copytree(trained_run, tmp_path / "run")
    gan.main(["--run", "run", *as_flags({**TINY, "gan_epochs": 1})])
    config = tiny_config(
        gan="pairs", gan_run=str(tmp_path / "run"), gan_filter_top_k=100, gan_ratio=1.0, gan_size=32, size=64
    )
    pairs = main.load_data(config)["train"]
    parts = config, pairs, main.build_model(config, pairs.captions, CPU), CPU, None
    main.open_images({"train": pairs}, config)
    kinds = (gan.GANAugmentation, control_arms.Shuffled, control_arms.Blurred, control_arms.Duplicates)
    plain, shuffled, blurred, duplicates = (kind(*parts).sample(8, 0, 0.5)[0] for kind in kinds)
    assert torch.equal(shuffled.images, plain.images)
    assert shuffled.image_ids.tolist() == plain.image_ids.tolist()[-1:] + plain.image_ids.tolist()[:-1]
    assert torch.equal(shuffled.input_ids, plain.input_ids.roll(1, 0))
    assert torch.equal(blurred.image_ids, plain.image_ids)
    real_images = control_arms.Blurred(*parts).real_images
    for image, number in zip(blurred.images, blurred.image_ids, strict=True):
        small = torch.nn.functional.interpolate(image[None], (32, 32), mode="area")[0]
        assert (small - real_images[number] / 255).abs().mean() < 0.05
    same_size = control_arms.Blurred(dataclasses.replace(config, size=32), *parts[1:])  # as the generator: half of it
    half, expected = same_size.sample(8, 0, 0.5)[0].images, same_size.real_images[blurred.image_ids] / 255
    for size in (16, 32):
        expected = torch.nn.functional.interpolate(expected, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(half, expected)
    assert torch.equal(duplicates.image_ids, plain.image_ids)
    colors = {name: images.mean((2, 3)) for name, images in (("own", duplicates.images), ("real", real_images / 255))}
    distances = torch.cdist(colors["own"], colors["real"])  # crops of an image have its colours
    ranks = (distances < distances.gather(1, duplicates.image_ids[:, None])).sum(1)
    assert ranks.double().mean() < 0.2 * len(real_images)
    again = control_arms.Duplicates(*parts).sample(8, 1, 0.5)[0]
    assert not torch.equal(again.images, duplicates.images)
    nearest = control_arms.Nearest(*parts)
    assert nearest.sources.tolist() == pairs.image_index.tolist()  # a training caption is the most similar to itself
    assert nearest.image_ids.equal(nearest.sources)


def test_combinations_of_photographs_are_left_out_and_tested(tmp_path, monkeypatch, tiny_config, data_set):
    """Six images of a dog in the snow and six of a man in the street are left out of 24."""
    monkeypatch.setattr(combinations, "MIN_IMAGES", 4)
    texts = ["A dog in the snow .", "Two dogs run .", "A man in the street .", "Women in snow ."]
    more = ["It is day .", "Nobody speaks .", "A photo ."]
    captions = {f"{number:02d}.jpg": [texts[number % 4], *more] for number in range(32)}
    names = list(captions)
    paths = data_set(captions, train=names[:24], dev=names[24:])
    config = tiny_config(**paths)
    changes = gan_ablation.prepare_data(config, tmp_path / "out", 1.0, 2, 0)
    held_out = read_json(tmp_path / "out/held_out.json")
    assert held_out["combinations"] == [["dog", "snow"], ["man", "street"]]  # the first two of three
    splits = load_splits(dataclasses.replace(config, **changes))
    assert set(splits["train"].captions) == {texts[1], texts[3], *more}
    test = held_out["test_images"]
    assert test == [name for name in names[:24] if int(name[:2]) % 4 in (0, 2)]
    assert splits["test"].names == sorted([*test, *names[25::2]]) and splits["validation"].names == names[24::2]
    with pytest.raises(InputError, match="held_out is 4, but only 3 combinations are named often enough"):
        gan_ablation.prepare_data(config, tmp_path / "more", 1.0, 4, 0)
    lines = (tmp_path / "out/scenes.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition("\t")[2] for line in lines] == [text for name in test for text in captions[name][:2]]
    tested = splits["test"]
    kept = {name: [tested.captions[j] for j in tested.captions_of(image)] for image, name in enumerate(tested.names)}
    assert all(kept[name] == (more[1:] if name in test else captions[name]) for name in kept)
