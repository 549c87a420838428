"""Thresholds against a plain search over all cosines, shares against counting."""

import json
import shutil

import numpy as np
import pytest
import torch

from calibration import GRID, belonging, calibrate, calibration_of, threshold
from index import embed_captions, embed_images, open_run


def test_belonging_counts_equal_captions_as_right():
    captions = ["A dog .", "a cat", "a  DOG .", "a bird"]
    found = belonging(captions, [0, 0, 1, 2], 3)
    assert found.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_calibrate_counts_shares_of_queries():
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.uniform(-1, 1, (12, 5)))
    belongs = torch.zeros(12, 5, dtype=torch.bool)
    belongs[torch.arange(12), torch.arange(12) % 5] = True
    found = calibrate(scores, belongs)
    for k in (0, 150, 200, 260, 400):
        right = np.mean([scores[j, j % 5] >= GRID[k] for j in range(12)])
        wrong = np.mean([max(scores[j, i] for i in range(5) if i != j % 5) >= GRID[k] for j in range(12)])
        assert found["text_to_image"]["right"][k] == pytest.approx(right)
        assert found["text_to_image"]["wrong"][k] == pytest.approx(wrong)
        right = np.mean([max(scores[j, i] for j in range(12) if j % 5 == i) >= GRID[k] for i in range(5)])
        wrong = np.mean([max(scores[j, i] for j in range(12) if j % 5 != i) >= GRID[k] for i in range(5)])
        assert found["image_to_text"]["right"][k] == pytest.approx(right)
        assert found["image_to_text"]["wrong"][k] == pytest.approx(wrong)
    assert found["text_to_image"]["gallery"] == 5 and found["image_to_text"]["gallery"] == 12


def made_up(number=100):
    """A calibration whose right scores lie around 0.6 and whose wrong ones around 0.3."""
    rng = np.random.default_rng(1)
    right, wrong = rng.normal(0.6, 0.1, 2000), rng.normal(0.3, 0.1, 2000)
    shares = {kind: [float((v >= g).mean()) for g in GRID] for kind, v in (("right", right), ("wrong", wrong))}
    return {"text_to_image": {"gallery": number, **shares}}, right, wrong


def test_threshold_makes_fewest_errors_on_the_calibrating_queries():
    calibration, right, wrong = made_up()
    found = threshold(calibration, "text_to_image", 100)
    errors = [(right < g).mean() + (wrong >= g).mean() for g in GRID]
    assert (right < found).mean() + (wrong >= found).mean() == pytest.approx(min(errors))


def test_threshold_rises_with_the_gallery():
    calibration, right, wrong = made_up()
    thresholds = [threshold(calibration, "text_to_image", n) for n in (1, 10, 100, 1000, 10_000)]
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[2] < thresholds[4]
    # ten galleries side by side: a wrong picture passes in at least one of them
    rng = np.random.default_rng(2)
    of_ten = rng.choice(wrong, (5000, 10)).max(1)
    errors = [(right < g).mean() + (of_ten >= g).mean() for g in GRID]
    found = thresholds[3]
    assert (right < found).mean() + (of_ten >= found).mean() <= min(errors) + 0.01


def test_calibration_is_kept_for_each_set_of_runs(trained_run, tmp_path, monkeypatch, sample):
    for name in ("a", "b"):
        shutil.copytree(trained_run, tmp_path / name)
    (tmp_path / "b/best/config.json").write_text((tmp_path / "a/best/config.json").read_text() + " ")
    runs = [open_run(tmp_path / name) for name in ("a", "b")]
    assert runs[0].digest != runs[1].digest
    single, both = calibration_of(runs[:1]), calibration_of(runs)
    assert len(list((tmp_path / "a/index").glob("calibration-*.json"))) == 2
    assert single["text_to_image"]["gallery"] == 8
    for before, after in zip(single["text_to_image"]["right"], both["text_to_image"]["right"], strict=True):
        assert abs(before - after) <= 1 / 40 + 1e-9  # two runs of the same weights are as one
    monkeypatch.setattr("calibration.embed_images", None)  # not needed again
    assert calibration_of(runs) == both


def test_calibration_of_damaged_file_and_without_data(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    run = open_run(tmp_path / "run")
    good = calibration_of([run])
    (file,) = (tmp_path / "run/index").glob("calibration-*.json")
    whole = file.read_text()
    damages = [{"gallery": 0}, {"gallery": None}, {"right": ["x"]}, {"wrong": [0.5]}]
    changed = [{**good, "text_to_image": {**good["text_to_image"], **damage}} for damage in damages]
    for damage in ("{", "[]", '{"text_to_image": {}}', whole.replace("gallery", "galery"), *map(json.dumps, changed)):
        file.write_text(damage)
        assert calibration_of([run]) == good
    file.unlink()
    config = run.model.config
    run.model.config = type(config)(**{**vars(config), "image_path": str(tmp_path / "gone")})
    assert calibration_of([run]) is None


def test_calibration_uses_validation_pictures(trained_run, tmp_path):
    from dataset import load_splits

    shutil.copytree(trained_run, tmp_path / "run")
    run = open_run(tmp_path / "run")
    pairs = load_splits(run.model.config)["validation"]
    scores = embed_captions(run.model, pairs.captions) @ embed_images(run.model, pairs.files).T
    own = scores[torch.arange(40), torch.from_numpy(pairs.image_index)].numpy()
    found = calibration_of([run])["text_to_image"]
    k = int(np.searchsorted(GRID, np.median(own)))
    assert found["right"][k] == pytest.approx((own >= GRID[k]).mean(), abs=1 / 40 + 1e-9)


def test_threshold_is_none_where_verdicts_would_be_a_coins():
    calibration, *_ = made_up()
    known = calibration["text_to_image"]
    known["wrong"] = known["right"]  # a model whose wrong answers score as high as its right ones
    assert threshold(calibration, "text_to_image", 100) is None


def test_no_threshold_is_learned_from_a_handful_of_pictures():
    calibration, *_ = made_up()
    assert threshold(calibration, "text_to_image", 5) is not None
    calibration["image_to_text"] = dict(calibration["text_to_image"])
    calibration["text_to_image"]["gallery"] = 19
    assert threshold(calibration, "text_to_image", 5) is None
    assert threshold(calibration, "image_to_text", 5) is None  # of the same few pictures
