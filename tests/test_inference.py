"""The search command against plain computations on the same vectors, and its answers to bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import draw_picture
from PIL import Image

from clip import retrieval_metrics
from dataset import load_splits
from index import embed_captions, embed_images, open_run
from inference import InputError, average_scores, build_queries, find_matches, main, parse_arguments, rank


@pytest.fixture
def run(trained_run, tmp_path):
    """A run of its own to keep an index beside."""
    shutil.copytree(trained_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def gallery(tmp_path):
    for seed in range(6):
        draw_picture(tmp_path / "gallery" / f"{seed}.jpg", seed=seed)
    return tmp_path / "gallery"


def search(capsys, *words):
    """The JSON answer of the command."""
    capsys.readouterr()
    main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def expected_scores(run, gallery, *parts):
    """{file: score} of a weighted sum of (weight, sentence or picture), part by part."""
    model, files = open_run(run).model, sorted(gallery.glob("*.jpg"))
    images, total = embed_images(model, files), 0
    for weight, value in parts:
        vector = embed_images(model, [value]) if isinstance(value, Path) else embed_captions(model, [value])
        total = total + weight * (images @ vector[0])
    total = total / sum(abs(weight) for weight, _ in parts)
    return dict(zip([file.as_posix() for file in files], total.tolist(), strict=True))


def check(results, expected, n):
    """The n best of {file: score}, in order."""
    best = sorted(expected, key=expected.get, reverse=True)[:n]
    assert [result["file"] for result in results] == best
    assert [result["score"] for result in results] == pytest.approx([expected[file] for file in best], abs=1e-5)


# ---- find_matches, rank


def test_find_matches_are_the_best_in_order(tiny_model):
    model = tiny_model()
    images = torch.nn.functional.normalize(torch.randn(7, 32), dim=1)
    query = embed_captions(model, ["a red circle"])[0]
    cosines = {f"{i}.jpg": float(sum(a * b for a, b in zip(images[i], query, strict=True))) for i in range(7)}
    found = find_matches(model, images, "a red circle", list(cosines), n=4)
    assert [name for name, _ in found] == sorted(cosines, key=cosines.get, reverse=True)[:4]
    assert [score for _, score in found] == pytest.approx([cosines[name] for name, _ in found], abs=1e-5)


def test_find_matches_refuses(tiny_model):
    model, images = tiny_model(), torch.zeros(2, 32)
    with pytest.raises(InputError, match="query is empty"):
        find_matches(model, images, " ", ["a", "b"], 1)
    with pytest.raises(InputError, match="n is 3"):
        find_matches(model, images, "a dog", ["a", "b"], 3)
    with pytest.raises(ValueError, match="2 embeddings and 1"):
        find_matches(model, images, "a dog", ["a"], 1)


def test_rank_says_how_unusual_a_score_is():
    found = rank(torch.tensor([0.1, 0.5, 0.3, 0.3, 0.9]), 2, least=0.6, skip=[4])
    assert [r["row"] for r in found] == [1, 2]
    mean, deviation = 0.3, (2 * 0.2**2 / 4) ** 0.5  # of the four scores that are left
    assert found[0]["deviation"] == pytest.approx((0.5 - mean) / deviation)
    assert found[0]["match"] is False
    assert [r["match"] for r in rank(torch.tensor([0.6, 0.7]), 2, least=0.65)] == [True, False]
    assert rank(torch.tensor([0.6]), 1) == [{"row": 0, "score": pytest.approx(0.6), "deviation": 0.0, "match": None}]


def test_average_scores_of_runs_of_different_width():
    vectors = [torch.randn(5, 4), torch.randn(5, 7)]
    queries = [torch.randn(2, 4), torch.randn(2, 7)]
    found = average_scores(vectors, queries)
    for q in range(2):
        for i in range(5):
            expected = (float(vectors[0][i] @ queries[0][q]) + float(vectors[1][i] @ queries[1][q])) / 2
            assert float(found[q, i]) == pytest.approx(expected, abs=1e-5)


# ---- queries


def parts(*words):
    return [(query.text, query.parts) for query in build_queries(parse_arguments(list(words)))]


def test_queries_with_weights(tmp_path):
    draw_picture(tmp_path / "dog.jpg")
    found = parts("a beach", "sea", "--plus", "2:dog.jpg", "--minus", "people", "--minus", "0.5:3:1 score")
    extra = [(2, Path("dog.jpg")), (-1, "people"), (-0.5, "3:1 score")]
    suffix = " + 2 x dog.jpg - people - 0.5 x 3:1 score"
    assert found == [("a beach" + suffix, [(1, "a beach"), *extra]), ("sea" + suffix, [(1, "sea"), *extra])]


def test_sentence_may_follow_the_runs(tmp_path):
    (tmp_path / "run").mkdir()
    found = parse_arguments(["--run", "run", "runs/typo", "a dog", "cat", "--n", "3"])
    assert found.run == ["run", "runs/typo"] and found.query == ["a dog", "cat"]
    found = parse_arguments(["--run", "typo", "a dog"])
    assert found.run == ["typo"] and found.query == ["a dog"]
    found = parse_arguments(["--run", "run", "typo", "--image", "dog.jpg"])
    assert found.run == ["run", "typo"] and found.query == []


@pytest.mark.parametrize("words", [[], [" "], ["a dog", ""], ["a dog", "--minus", "1: "], ["--plus", "a"]])
def test_empty_queries_are_refused(words):
    with pytest.raises(InputError, match="empty|say what"):
        parts(*words)


# ---- searching


def test_sentence_searches_the_test_pictures(run, capsys, sample):
    pairs = load_splits(open_run(run).model.config)["test"]
    (found,) = search(capsys, "a red circle", "--run", run, "--n", 3)
    gallery = Path(sample["image_path"])
    expected = expected_scores(run, gallery, (1, "a red circle"))
    check(found["results"], {file.as_posix(): expected[file.as_posix()] for file in pairs.files}, 3)
    assert found["searched"] == 10 and found["kind"] == "images" and found["query"] == "a red circle"
    assert found["match"] is None  # of a model that has learned nothing no verdict is worth saying
    assert all(result["match"] is None for result in found["results"])


def test_several_sentences_and_the_lines_for_pipes(run, gallery, capsys):
    main(["a red circle", "two\tboxes", "--run", str(run), "--images", str(gallery), "--n", "2"])
    printed = capsys.readouterr()
    lines = [line.split("\t") for line in printed.out.splitlines()]
    assert [line[4] for line in lines] == ["a red circle"] * 2 + ["two boxes"] * 2
    for query in ("a red circle", "two\tboxes"):
        own = [line for line in lines if line[4] == " ".join(query.split())]
        scores = {line[5]: float(line[0]) for line in own}
        expected = expected_scores(run, gallery, (1, query))
        best = sorted(expected, key=expected.get, reverse=True)[:2]
        assert scores == {file: pytest.approx(expected[file], abs=1e-4) for file in best}
    assert {line[2] for line in lines} == {"-"} and {line[3] for line in lines} == {"images"}
    assert Image.open("matches.png").size[0] > 100


def test_query_that_fits_nothing_is_said_so(run, gallery, capsys, monkeypatch):
    monkeypatch.setattr("inference.threshold", lambda *_: 1.1)
    main(["a dinosaur", "--run", str(run), "--images", str(gallery), "--n", "2"])
    printed = capsys.readouterr()
    assert "no good match for 'a dinosaur' among 6 images" in printed.err
    assert [line.split("\t")[2] for line in printed.out.splitlines()] == ["weak", "weak"]


def test_match_is_decided_by_the_threshold(run, gallery, capsys, monkeypatch):
    expected = sorted(expected_scores(run, gallery, (1, "a red circle")).values(), reverse=True)
    monkeypatch.setattr("inference.threshold", lambda *_: (expected[1] + expected[2]) / 2)
    (found,) = search(capsys, "a red circle", "--run", run, "--images", gallery, "--n", 4)
    assert [result["match"] for result in found["results"]] == [True, True, False, False]


def test_combination_of_sentences_and_pictures(run, gallery, capsys):
    words = ["--plus", f"0.5:{gallery / '3.jpg'}", "--minus", "grass"]
    (found,) = search(capsys, "a red circle", *words, "--run", run, "--images", gallery, "--n", 4)
    expected = expected_scores(run, gallery, (1, "a red circle"), (0.5, gallery / "3.jpg"), (-1, "grass"))
    del expected[(gallery / "3.jpg").as_posix()]  # a picture is not its own match
    check(found["results"], expected, 4)
    assert found["match"] is None  # thresholds are known for sentences only


def test_picture_finds_captions_and_similar_pictures(run, gallery, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("image,caption\nx.jpg,a red circle\nx.jpg,a blue box\ny.jpg,A star .\n")
    words = ["--image", gallery / "2.jpg", "--captions_path", "captions.txt", "--output", "out.png"]
    described, similar = search(capsys, *words, "--run", run, "--images", gallery, "--n", 3)
    model = open_run(run).model
    picture = embed_images(model, [gallery / "2.jpg"])[0]
    expected = {c: float(embed_captions(model, [c])[0] @ picture) for c in ("a red circle", "a blue box", "A star .")}
    assert [r["caption"] for r in described["results"]] == sorted(expected, key=expected.get, reverse=True)
    assert [r["score"] for r in described["results"]] == pytest.approx(sorted(expected.values())[::-1], abs=1e-5)
    scores = expected_scores(run, gallery, (1, gallery / "2.jpg"))
    del scores[(gallery / "2.jpg").as_posix()]
    check(similar["results"], scores, 3)
    assert Path("out.png").exists() and Path("out_captions.png").exists()


def test_picture_is_described_with_the_runs_own_captions(run, gallery, capsys):
    described, _ = search(capsys, "--image", gallery / "2.jpg", "--run", run, "--n", 2)
    own = set(load_splits(open_run(run).model.config)["test"].captions)
    assert {result["caption"] for result in described["results"]} <= own
    assert described["searched"] == len(own)


def test_ensemble_averages_the_runs(run, tmp_path, gallery, capsys, tiny_model):
    from clip import save_model

    torch.manual_seed(5)
    save_model(tiny_model(projection_dim=16), tmp_path / "other/best")
    (found,) = search(capsys, "a red circle", "--run", run, "other", "--images", gallery, "--n", 6)
    first, second = (expected_scores(r, gallery, (1, "a red circle")) for r in (run, tmp_path / "other"))
    check(found["results"], {file: (first[file] + second[file]) / 2 for file in first}, 6)


def test_newest_run_is_the_default(run, gallery, capsys, tmp_path):
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs/a")
    (found,) = search(capsys, "a red circle", "--images", gallery, "--n", 1)
    check(found["results"], expected_scores(tmp_path / "runs/a", gallery, (1, "a red circle")), 1)


def test_evaluate_one_run_and_an_ensemble(run, sample, tmp_path, capsys, tiny_model):
    from clip import save_model

    torch.manual_seed(5)
    save_model(tiny_model(projection_dim=16), tmp_path / "other/best")
    paths = ["--image_path", sample["image_path"], "--captions_path", sample["captions_path"]]
    found = search(capsys, "--evaluate", *paths, "--run", run)
    both = search(capsys, "--evaluate", *paths, "--run", run, "other")
    from dataset import captions_by_image, make_pairs, read_captions

    pairs = make_pairs(captions_by_image(read_captions(sample["captions_path"])), sample["image_path"])
    models = [open_run(run).model, open_run("other").model]
    images, texts = (
        [f(m, v) for m in models] for f, v in ((embed_images, pairs.files), (embed_captions, pairs.captions))
    )
    expected = retrieval_metrics(images[0], texts[0], pairs.image_index)
    assert found == {"images": 42, "captions": 210, **{k: pytest.approx(v, abs=0.6) for k, v in expected.items()}}
    scores = sum(t.double() @ i.double().T for t, i in zip(texts, images, strict=True)) / 2  # (T, N)
    owner = torch.from_numpy(pairs.image_index)
    ranks = (scores >= scores.gather(1, owner[:, None])).sum(1)
    assert both["text_to_image_R@5"] == pytest.approx(100 * (ranks <= 5).double().mean().item(), abs=0.6)
    main(["--evaluate", *paths, "--run", str(run)])
    assert f"rsum {found['rsum']:.1f}" in capsys.readouterr().out


# ---- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "query is empty"),
        ([""], "query is empty"),
        (["a dog", "--n", "0"], "n is 0"),
        (["a dog", "--n", "7"], "n is 7, with 6 pictures"),
        (["a dog", "--n", "x"], "--n"),
        (["a dog", "--images", "nowhere"], "nowhere, which is not a folder"),
        (["a dog", "--run", "gallery"], "gallery is not a trained run"),
        (["a dog", "--device", "tpu9"], "device is 'tpu9'"),
        (["a dog", "--plus", "gone.jpg"], "gone.jpg is missing"),
        (["--image", "gone.jpg"], "gone.jpg is missing"),
        (["--image", "broken.jpg"], "broken.jpg cannot be read"),
        (["a dog", "--image", "gallery/0.jpg"], "--plus PICTURE"),
        (["--labels", "a,b"], "--labels needs --image"),
        (["--image", "gallery/0.jpg", "--labels", "a"], "two or more"),
        (["--image", "gallery/0.jpg", "--labels", "a,b", "--template", "x"], "template"),
        (["--evaluate"], "needs --image_path"),
        (["photo.jpg"], "a picture: give --image photo.jpg"),
        (["a dog", "--images", ""], "images is empty"),
        (["a dog", "--zero_shot", "x"], "--zero_shot does not go with a sentence"),
        (["--evaluate", "--zero_shot", "x"], "--evaluate does not go with --zero_shot"),
        (["a dog", "--outptu", "x.png"], "did you mean --output"),
        (["a dog", "--output", "picture"], "output is picture"),
        (["a dog", "--output", "nowhere/x.png"], "output is nowhere/x.png"),
    ],
)
def test_bad_input_is_one_line(run, gallery, refused, words, message):
    Path("broken.jpg").write_bytes(b"no picture")
    Path("photo.jpg").write_bytes(b"a picture")
    rest = [] if "--images" in words else ["--images", "gallery"]
    rest += [] if "--run" in words else ["--run", "run"]
    assert message in refused(main, [*words, *rest])


def test_unreadable_picture_in_the_gallery_is_named_and_left_out(run, gallery, capsys, refused):
    (before,) = search(capsys, "a dog", "--run", run, "--images", gallery)
    (gallery / "b2.jpg").write_bytes(b"no picture")
    for _ in range(2):  # it is tried again each time
        main(["a dog", "--run", str(run), "--images", str(gallery), "--json"])
        output = capsys.readouterr()
        assert "b2.jpg cannot be read" in output.err and "left out" in output.err
        (found,) = json.loads(output.out)
        assert found["searched"] == before["searched"] == 6
        assert [result["file"] for result in found["results"]] == [result["file"] for result in before["results"]]
        for name in ("score", "deviation"):
            expected = pytest.approx([result[name] for result in before["results"]], abs=1e-4)
            assert [result[name] for result in found["results"]] == expected
    for file in gallery.rglob("*.*"):
        file.write_bytes(b"no picture")
    assert "none of the pictures can be read" in refused(main, ["a dog", "--run", run, "--images", gallery])


def test_picture_can_be_found_once_it_can_be_read(run, gallery, capsys):
    whole = (gallery / "3.jpg").read_bytes()
    (gallery / "3.jpg").write_bytes(b"x" * len(whole))
    stamp = (gallery / "3.jpg").stat().st_mtime_ns
    assert search(capsys, "a dog", "--run", run, "--images", gallery)[0]["searched"] == 5
    (gallery / "3.jpg").write_bytes(whole)
    os.utime(gallery / "3.jpg", ns=(stamp, stamp))  # as after chmod: same size, same time
    assert search(capsys, "a dog", "--run", run, "--images", gallery)[0]["searched"] == 6


@pytest.mark.skipif(sys.platform != "linux", reason="such names are possible on Linux alone")
def test_names_that_are_no_text_and_links_to_themselves(run, gallery, capsys):
    (gallery / "0.jpg").rename(gallery / os.fsdecode(b"bad\xff.jpg"))
    (gallery / "loop.jpg").symlink_to("loop.jpg")
    (found,) = search(capsys, "a dog", "--run", run, "--images", gallery)
    assert found["searched"] == 6


def test_pipe_that_closes_early_still_leaves_the_picture(run, gallery):
    program = Path(__file__).parents[1] / "inference.py"
    command = [sys.executable, program, "a dog", "--run", run, "--images", gallery, "--output", gallery / "m.png"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 0, errors
    assert "Broken" not in errors and "Traceback" not in errors
    assert (gallery / "m.png").exists()


def test_no_run_at_all(refused):
    assert "no trained run in runs/" in refused(main, ["a dog"])


def test_a_sentence_longer_than_any_file_name_is_one(trained_run, tmp_path, sample):
    long = "a red ring and " * 40
    main(["--run", str(trained_run), long, "--images", sample["image_path"], "--output", "m.png"])
    assert (tmp_path / "m.png").exists()
