"""Match thresholds against an exhaustive search over the cosines, rates against counting."""

import json
import shutil

import numpy as np
import pytest
import torch

from dataset import load_splits, make_pairs
from extras.match_threshold import choose_threshold, load_match_rates
from extras.search_index import open_run
from inference import embed_images
from utils.embed import embed_captions
from utils.match_rates import GRID, fit_rates, matching_pairs, save_match_threshold


def test_matching_pairs_include_equal_captions_of_other_images():
    pairs = make_pairs({"x": ["A dog .", "a cat"], "y": ["a  DOG ."], "z": ["a bird"]}, "")
    assert matching_pairs(pairs, 4, 3).tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert matching_pairs(pairs, 3, 2).tolist() == [[1, 1], [1, 0], [1, 1]]


def test_fit_rates_counts_queries():
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.uniform(-1, 1, (12, 5)))
    matches = torch.zeros(12, 5, dtype=torch.bool)
    matches[torch.arange(12), torch.arange(12) % 5] = True
    found = fit_rates(scores, matches)
    for k in (0, 150, 200, 260, 400):
        positive = np.mean([scores[j, j % 5] >= GRID[k] for j in range(12)])
        negative = np.mean([max(scores[j, i] for i in range(5) if i != j % 5) >= GRID[k] for j in range(12)])
        assert found["text_to_image"]["true_positive_rate"][k] == pytest.approx(positive)
        assert found["text_to_image"]["false_positive_rate"][k] == pytest.approx(negative)
        positive = np.mean([max(scores[j, i] for j in range(12) if j % 5 == i) >= GRID[k] for i in range(5)])
        negative = np.mean([max(scores[j, i] for j in range(12) if j % 5 != i) >= GRID[k] for i in range(5)])
        assert found["image_to_text"]["true_positive_rate"][k] == pytest.approx(positive)
        assert found["image_to_text"]["false_positive_rate"][k] == pytest.approx(negative)
    assert found["text_to_image"]["num_candidates"] == 5 and found["image_to_text"]["num_candidates"] == 12


def random_rates(number=100):
    """Rates for matching scores around 0.6 and other scores around 0.3, and the scores themselves."""
    rng = np.random.default_rng(1)
    positive, negative = rng.normal(0.6, 0.1, 2000), rng.normal(0.3, 0.1, 2000)
    scores = {"true_positive_rate": positive, "false_positive_rate": negative}
    rates = {name: [float((values >= cosine).mean()) for cosine in GRID] for name, values in scores.items()}
    return {"text_to_image": {"num_candidates": number, **rates}}, positive, negative


def test_choose_threshold_minimises_the_errors_of_the_fitted_queries():
    rates, positive, negative = random_rates()
    found = choose_threshold(rates, "text_to_image", 100)
    errors = [(positive < g).mean() + (negative >= g).mean() for g in GRID]
    assert (positive < found).mean() + (negative >= found).mean() == pytest.approx(min(errors))


def test_choose_threshold_rises_with_the_number_of_candidates():
    rates, positive, negative = random_rates()
    thresholds = [choose_threshold(rates, "text_to_image", n) for n in (1, 10, 100, 1000, 10_000)]
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[2] < thresholds[4]
    # ten galleries together: another image reaches the threshold in at least one of them
    rng = np.random.default_rng(2)
    of_ten = rng.choice(negative, (5000, 10)).max(1)
    errors = [(positive < g).mean() + (of_ten >= g).mean() for g in GRID]
    found = thresholds[3]
    assert (positive < found).mean() + (of_ten >= found).mean() <= min(errors) + 0.01


def test_match_rates_are_saved_for_each_set_of_runs(trained_run, tmp_path, monkeypatch):
    for name in ("a", "b"):
        shutil.copytree(trained_run, tmp_path / name)
    (tmp_path / "b/best/config.json").write_text((tmp_path / "a/best/config.json").read_text() + " ")
    runs = [open_run(tmp_path / name) for name in ("a", "b")]
    assert runs[0].hash != runs[1].hash
    single, both = load_match_rates(runs[:1]), load_match_rates(runs)
    assert len(list((tmp_path / "a/index").glob("match_threshold-*.json"))) == 2
    assert single["text_to_image"]["num_candidates"] == 8
    for before, after in zip(*(rates["text_to_image"]["true_positive_rate"] for rates in (single, both)), strict=True):
        assert abs(before - after) <= 1 / 40 + 1e-9  # two runs with the same weights equal one
    monkeypatch.setattr("inference.embed_images", None)  # not computed again
    assert load_match_rates(runs) == both


def test_match_rates_of_a_damaged_file_and_without_data(trained_run, tmp_path, capsys):
    shutil.copytree(trained_run, tmp_path / "run")
    run = open_run(tmp_path / "run")
    good = load_match_rates([run])
    (file,) = (tmp_path / "run/index").glob("match_threshold-*.json")
    whole = file.read_text()
    damages = [{"num_candidates": n} for n in (0, None, 2.5, True, float("inf"), 10**400)]
    damages += [{"true_positive_rate": values} for values in (["x"], [[0.5]] * 401, [1.5] * 401, [float("nan")] * 401)]
    damages += [{"false_positive_rate": [0.5]}]
    changed = [{**good, "text_to_image": {**good["text_to_image"], **damage}} for damage in damages]
    for damage in (
        "{",
        "[]",
        '{"text_to_image": {}}',
        whole.replace("num_candidates", "number"),
        *map(json.dumps, changed),
    ):
        file.write_text(damage)
        capsys.readouterr()
        assert load_match_rates([run]) == good
        assert f"match threshold {file} is damaged" in capsys.readouterr().err
    file.unlink()
    config = run.model.config
    run.model.config = type(config)(**{**vars(config), "image_path": str(tmp_path / "gone")})
    assert load_match_rates([run]) is None


def test_match_rates_use_the_validation_split(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    run = open_run(tmp_path / "run")
    pairs = load_splits(run.model.config)["validation"]
    scores = embed_captions(run.model, pairs.captions) @ embed_images(run.model, pairs.files).T
    own = scores[torch.arange(40), torch.from_numpy(pairs.image_index)].numpy()
    found = load_match_rates([run])["text_to_image"]
    k = int(np.searchsorted(GRID, np.median(own)))
    assert found["true_positive_rate"][k] == pytest.approx((own >= GRID[k]).mean(), abs=1 / 40 + 1e-9)


def test_save_match_threshold_equals_the_rates_computed_by_a_search(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/index", ignore_errors=True)
    run = open_run(tmp_path / "run")
    pairs = load_splits(run.model.config)["validation"]
    expected = load_match_rates([run])
    (file,) = (tmp_path / "run/index").glob("match_threshold-*.json")
    saved = json.loads(file.read_text())
    file.unlink()
    save_match_threshold(
        tmp_path / "run", pairs, embed_images(run.model, pairs.files), embed_captions(run.model, pairs.captions)
    )
    assert json.loads(file.read_text()) == saved == expected


def test_match_rates_of_earlier_versions_are_read(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    run = open_run(tmp_path / "run")
    rates = load_match_rates([run])
    (file,) = (tmp_path / "run/index").glob("match_threshold-*.json")
    names = {"num_candidates": "gallery", "true_positive_rate": "right", "false_positive_rate": "wrong"}
    content = {d: {names[name]: value for name, value in each.items()} for d, each in rates.items()}
    content["text_to_image"]["right"][0] = 0.25
    file.with_name(file.name.replace("match_threshold", "calibration")).write_text(json.dumps(content))
    file.unlink()
    assert load_match_rates([run])["text_to_image"]["true_positive_rate"] == content["text_to_image"]["right"]


def test_choose_threshold_is_none_below_the_minimum_balanced_accuracy():
    rates, *_ = random_rates()
    known = rates["text_to_image"]
    known["false_positive_rate"] = known["true_positive_rate"]  # other candidates score as high as matching ones
    assert choose_threshold(rates, "text_to_image", 100) is None


def test_choose_threshold_is_none_for_few_validation_images():
    rates, *_ = random_rates()
    assert choose_threshold(rates, "text_to_image", 5) is not None
    rates["image_to_text"] = dict(rates["text_to_image"])
    rates["text_to_image"]["num_candidates"] = 19
    assert choose_threshold(rates, "text_to_image", 5) is None
    assert choose_threshold(rates, "image_to_text", 5) is None  # the same few images
