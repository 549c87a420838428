"""Search against plain computations on the same vectors, and the errors for bad input."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, draw_image, run_python
from PIL import Image

from clip import retrieval_metrics, save_model
from config import InputError
from dataset import captions_by_image, load_splits, make_pairs, read_captions
from extras.evaluation import PROTOCOL
from extras.search_index import open_run
from inference import (
    Searcher,
    build_query,
    embed_images,
    find_matches,
    format_query,
    main,
    mean_scores,
    parse_arguments,
    rank,
)
from utils.embed import embed_captions
from utils.files import read_json


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy of the trained run, with its own index."""
    shutil.copytree(trained_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def gallery(tmp_path):
    for seed in range(6):
        draw_image(tmp_path / "gallery" / f"{seed}.jpg", seed=seed)
    return tmp_path / "gallery"


def search(capsys, *words):
    """The JSON answer of the command."""
    capsys.readouterr()
    main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def expected_scores(run, gallery, *parts):
    """{file: score} of a weighted sum of (weight, sentence or image), part by part."""
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


def test_find_matches_returns_the_best_in_order(tiny_model):
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


def test_rank_computes_z_scores_without_excluded_rows():
    found = rank(torch.tensor([0.1, 0.5, 0.3, 0.3, torch.nan]), 2, threshold=0.6)
    assert [r["row"] for r in found] == [1, 2]
    mean, std = 0.3, (2 * 0.2**2 / 4) ** 0.5  # of the four valid scores
    assert found[0]["z_score"] == pytest.approx((0.5 - mean) / std)
    assert found[0]["match"] is False
    assert [r["match"] for r in rank(torch.tensor([0.6, 0.7]), 2, threshold=0.65)] == [True, False]
    assert rank(torch.tensor([0.6]), 1) == [{"row": 0, "score": pytest.approx(0.6), "z_score": 0.0, "match": None}]
    assert rank(torch.full((3,), torch.nan), 2) == []


def test_mean_scores_of_runs_with_different_widths():
    vectors = [torch.randn(5, 4), torch.randn(5, 7)]
    queries = [torch.randn(2, 4), torch.randn(2, 7)]
    for q in range(2):
        found = mean_scores(vectors, [query[q] for query in queries])
        for i in range(5):
            expected = (float(vectors[0][i] @ queries[0][q]) + float(vectors[1][i] @ queries[1][q])) / 2
            assert float(found[i]) == pytest.approx(expected, abs=1e-5)


# ---- queries


def build_queries(*words):
    """The queries of a command line."""
    arguments = parse_arguments(list(words))
    return [build_query(sentence, arguments.plus, arguments.minus) for sentence in arguments.query]


def test_build_query_with_weights(tmp_path):
    draw_image(tmp_path / "dog.jpg")
    found = build_queries("a beach", "sea", "--plus", "2:dog.jpg", "--minus", "people", "--minus", "0.5:3:1 score")
    addends = [(2, Path("dog.jpg")), (-1, "people"), (-0.5, "3:1 score")]
    assert found == [[(1, "a beach"), *addends], [(1, "sea"), *addends]]
    suffix = " + 2 x dog.jpg - people - 0.5 x 3:1 score"
    assert [format_query(query) for query in found] == ["a beach" + suffix, "sea" + suffix]
    assert format_query(build_query(Path("photos/dog.jpg"))) == "dog.jpg"


def test_a_file_that_exists_is_never_a_sentence(tmp_path):
    (tmp_path / "dog").write_bytes(b"")
    with pytest.raises(InputError, match="the query is dog, a file: to search with an image, pass --image dog"):
        parse_arguments(["dog"])
    assert build_queries("a beach", "--plus", "dog", "--minus", "dogs") == [
        [(1, "a beach"), (1, Path("dog")), (-1, "dogs")]
    ]
    assert build_query("dog") == [(1, Path("dog"))]
    assert build_query("un caf\udce9") == [(1, "un caf\u00e9")]  # bytes of a command line in cp1252


def test_file_names_are_printed_in_one_line(run, tmp_path, capsys):
    draw_image(tmp_path / "gallery" / "a\nb\tc.png")
    main(["a dog", "--images", "gallery", "--run", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].endswith("\tgallery/a\\nb\\tc.png") and lines[0].count("\t") == 5


def test_parse_arguments_separates_sentences_from_runs(tmp_path):
    (tmp_path / "run").mkdir()
    found = parse_arguments(["--run", "run", "runs/typo", "a dog", "cat", "--n", "3"])
    assert found.run == ["run", "runs/typo"] and found.query == ["a dog", "cat"]
    found = parse_arguments(["--run", "typo", "a dog"])
    assert found.run == ["typo"] and found.query == ["a dog"]
    found = parse_arguments(["--run", "run", "typo", "--image", "dog.jpg"])
    assert found.run == ["run", "typo"] and found.query == []


@pytest.mark.parametrize("words", [[], [" "], ["a dog", ""], ["a dog", "--minus", "1: "], ["--plus", "a"]])
def test_empty_queries_are_refused(words):
    with pytest.raises(InputError, match="empty|without a sentence"):
        build_queries(*words)


# ---- searching


def test_sentence_searches_the_test_images(run, capsys, sample):
    pairs = load_splits(open_run(run).model.config)["test"]
    (found,) = search(capsys, "a red circle", "--run", run, "--n", 3)
    gallery = Path(sample["image_path"])
    expected = expected_scores(run, gallery, (1, "a red circle"))
    check(found["results"], {file.as_posix(): expected[file.as_posix()] for file in pairs.files}, 3)
    assert found["searched"] == 10 and found["kind"] == "images" and found["query"] == "a red circle"
    assert found["match"] is None  # no decision with an almost untrained model
    assert all(result["match"] is None for result in found["results"])


def test_several_sentences_print_a_line_per_result(run, gallery, capsys):
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


def test_query_without_a_match_is_reported(run, gallery, capsys, monkeypatch):
    monkeypatch.setattr("extras.match_threshold.choose_threshold", lambda *_: 1.1)
    main(["a dinosaur", "--run", str(run), "--images", str(gallery), "--n", "2"])
    printed = capsys.readouterr()
    assert "no good match for 'a dinosaur' among 6 images" in printed.err
    assert [line.split("\t")[2] for line in printed.out.splitlines()] == ["weak", "weak"]


def test_match_is_decided_by_the_threshold(run, gallery, capsys, monkeypatch):
    expected = sorted(expected_scores(run, gallery, (1, "a red circle")).values(), reverse=True)
    monkeypatch.setattr("extras.match_threshold.choose_threshold", lambda *_: (expected[1] + expected[2]) / 2)
    (found,) = search(capsys, "a red circle", "--run", run, "--images", gallery, "--n", 4)
    assert [result["match"] for result in found["results"]] == [True, True, False, False]


def test_combination_of_sentences_and_images(run, gallery, capsys):
    words = ["--plus", f"0.5:{gallery / '3.jpg'}", "--minus", "grass"]
    (found,) = search(capsys, "a red circle", *words, "--run", run, "--images", gallery, "--n", 4)
    expected = expected_scores(run, gallery, (1, "a red circle"), (0.5, gallery / "3.jpg"), (-1, "grass"))
    del expected[(gallery / "3.jpg").as_posix()]  # an image is not its own match
    check(found["results"], expected, 4)
    assert found["match"] is None  # no decision for combinations


def test_image_finds_captions_and_similar_images(run, gallery, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("image,caption\nx.jpg,a red circle\nx.jpg,a blue box\ny.jpg,A star .\n")
    words = ["--image", gallery / "2.jpg", "--captions_path", "captions.txt", "--output", "out.png"]
    described, similar = search(capsys, *words, "--run", run, "--images", gallery, "--n", 3)
    model = open_run(run).model
    image = embed_images(model, [gallery / "2.jpg"])[0]
    expected = {c: float(embed_captions(model, [c])[0] @ image) for c in ("a red circle", "a blue box", "A star .")}
    assert [r["caption"] for r in described["results"]] == sorted(expected, key=expected.get, reverse=True)
    assert [r["score"] for r in described["results"]] == pytest.approx(sorted(expected.values())[::-1], abs=1e-5)
    scores = expected_scores(run, gallery, (1, gallery / "2.jpg"))
    del scores[(gallery / "2.jpg").as_posix()]
    check(similar["results"], scores, 3)
    assert Path("out.png").exists() and Path("out_captions.png").exists()


def test_image_is_described_with_the_captions_of_the_run(run, gallery, capsys):
    described, _ = search(capsys, "--image", gallery / "2.jpg", "--run", run, "--n", 2)
    own = set(load_splits(open_run(run).model.config)["test"].captions)
    assert {result["caption"] for result in described["results"]} <= own
    assert described["searched"] == len(own)


def test_ensemble_averages_the_runs(run, tmp_path, gallery, capsys, tiny_model):
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


def test_searcher_equals_the_command(run, gallery, capsys):
    def check_same(found, expected):
        numbers = [{name: pytest.approx(each[name], abs=1e-4) for name in ("score", "z_score")} for each in expected]
        assert found == [{**each, **approx} for each, approx in zip(expected, numbers, strict=True)]

    searcher = Searcher(run, gallery)
    for query, words in (("a red circle", ["a red circle"]), (gallery / "2.jpg", ["--image", gallery / "2.jpg"])):
        (answer,) = search(capsys, *words, "--plus", "0.5:a box", "--run", run, "--images", gallery, "--n", 3)
        check_same(searcher.search(query, 3, plus=["0.5:a box"]), answer["results"])
    for answer in search(capsys, "--image", gallery / "2.jpg", "--run", run, "--images", gallery):
        assert len(answer["results"]) == {"images": 5, "captions": 9}[answer["kind"]]
        check_same(searcher.search(gallery / "2.jpg", kind=answer["kind"]), answer["results"])


def test_searcher_finds_captions_for_a_sentence(run, gallery):
    searcher = Searcher(run, gallery)
    (found,) = searcher.search("a red circle", n=1, kind="captions")
    captions = load_splits(open_run(run).model.config)["test"].captions
    model = searcher.runs[0].model
    scores = embed_captions(model, captions) @ embed_captions(model, ["a red circle"])[0]
    assert found["match"] is None and found["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    with pytest.raises(InputError, match="query is empty"):
        searcher.search(" ")
    for n, kind in ((0, "captions"), (0, "images"), (7, "images")):
        with pytest.raises(InputError, match=f"n is {n}, with .* {kind}"):
            searcher.search("a red circle", n, kind)
    with pytest.raises(ValueError, match="kind is 'image'"):
        searcher.search("a red circle", kind="image")


def test_searcher_averages_several_runs_and_reads_the_index_once(run, gallery, monkeypatch):
    searcher = Searcher([run, run], str(gallery))
    first = searcher.search("a red circle")
    monkeypatch.setattr("extras.search_index.update_index", None)  # not needed again
    assert searcher.search("a red circle") == first
    expected = expected_scores(run, gallery, (1, "a red circle"))
    check(first, expected, 6)


def test_evaluate_one_run_and_an_ensemble(run, sample, tmp_path, capsys, tiny_model):
    torch.manual_seed(5)
    save_model(tiny_model(projection_dim=16), tmp_path / "other/best")
    paths = ["--image_path", sample["image_path"], "--captions_path", sample["captions_path"]]
    found = search(capsys, "--evaluate", *paths, "--run", run)
    assert set(found.pop("ci95")) == {name for name in found if "R@" in name or name == "rsum"}
    both = search(capsys, "--evaluate", *paths, "--run", run, "other")
    pairs = make_pairs(captions_by_image(read_captions(sample["captions_path"])), sample["image_path"])
    models = [open_run(run).model, open_run("other").model]
    images, texts = (
        [f(m, v) for m in models] for f, v in ((embed_images, pairs.files), (embed_captions, pairs.captions))
    )
    expected = retrieval_metrics(images[0], texts[0], pairs.image_index)
    assert (found.pop("split"), found.pop("protocol")) == ("all", PROTOCOL)
    assert found == {"images": 42, "captions": 210, **{k: pytest.approx(v, abs=0.6) for k, v in expected.items()}}
    scores = sum(t.double() @ i.double().T for t, i in zip(texts, images, strict=True)) / 2  # (T, N)
    own_images = torch.from_numpy(pairs.image_index)
    ranks = (scores >= scores.gather(1, own_images[:, None])).sum(1)
    assert both["text_to_image_R@5"] == pytest.approx(100 * (ranks <= 5).double().mean().item(), abs=0.6)
    main(["--evaluate", *paths, "--run", str(run)])
    printed = capsys.readouterr().out
    assert printed.startswith("all images: 42 images, 210 captions; every caption is a query for its one image")
    assert f"rsum {found['rsum']:.1f}" in printed


def test_evaluate_repeats_the_results_of_the_run(trained_run, capsys):
    found, results = search(capsys, "--evaluate", "--run", trained_run), read_json(trained_run / "results.json")
    assert (found["split"], found["images"], found["captions"]) == ("test", 10, 50)
    assert found["rsum"] == pytest.approx(results["rsum"])
    counts = {}
    for split in ("train", "validation", "all"):
        counts[split] = search(capsys, "--evaluate", "--run", trained_run, "--split", split)["images"]
    assert counts == {"train": 24, "validation": 8, "all": 42}


def test_queries_from_standard_input_without_a_plot(run, gallery, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a dog\n\n a red circle \n"))
    main(["-", "--run", str(run), "--images", str(gallery), "--output", "none", "--json"])
    output = capsys.readouterr()
    assert [answer["query"] for answer in json.loads(output.out)] == ["a dog", "a red circle"]
    assert f"{Path(run).as_posix()}: 6 images in {gallery.as_posix()}" in output.err
    assert not Path("matches.png").exists() and not Path("none").exists()


# ---- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "query is empty"),
        ([""], "query is empty"),
        (["a dog", "--n", "0"], "n is 0"),
        (["a dog", "--n", "7"], "n is 7, with 6 images"),
        (["a dog", "--n", "x"], "--n"),
        (["a dog", "--images", "nowhere"], "nowhere, which is not a folder"),
        (["a dog", "--run", "gallery"], "gallery is not a trained run"),
        (["a dog", "--device", "tpu9"], "device 'tpu9' is not available"),
        (["a dog", "--plus", "gone.jpg"], "gone.jpg is missing"),
        (["--image", "gone.jpg"], "gone.jpg is missing"),
        (["--image", "broken.jpg"], "broken.jpg cannot be read"),
        (["a dog", "--image", "gallery/0.jpg"], "--plus IMAGE"),
        (["--labels", "a,b"], "--labels needs --image"),
        (["--image", "gallery/0.jpg", "--labels", "a"], "two or more"),
        (["--image", "gallery/0.jpg", "--labels", "a,b", "--template", "x"], "template"),
        (["--evaluate", "--images", "gallery"], "pass both --images and --captions_path"),
        (["--evaluate", "--n", "3"], "--n is not used by --evaluate: drop it"),
        (["a dog", "--captions_path", "x.txt"], "--captions_path is not used by a search for a sentence"),
        (["--image", "gallery/0.jpg", "--labels", "a,b", "--images", "gallery"], "--images is not used by --labels"),
        (["a dog", "--split", "all"], "--split is not used by a search"),
        (["photo.jpg"], "a file: to search with an image, pass --image photo.jpg"),
        (["a dog", "--images", ""], "images is empty"),
        (["a dog", "--zero_shot", "x"], "--zero_shot cannot be combined with a sentence"),
        (["--evaluate", "--zero_shot", "x"], "--zero_shot: not allowed with argument --evaluate"),
        (["--zero_shot", "x", "--image", "gallery/0.jpg"], "--image: not allowed with argument --zero_shot"),
        (["a dog", "--evaluate"], "--evaluate cannot be combined with a sentence"),
        (["a dog", "--outptu", "x.png"], "did you mean --output"),
        (["a dog", "--output", "figure"], "output is figure"),
        (["a dog", "--output", "nowhere/x.png"], "output is nowhere/x.png"),
    ],
)
def test_bad_input_gives_a_one_line_error(run, gallery, refused, words, message):
    Path("broken.jpg").write_bytes(b"not an image")
    Path("photo.jpg").write_bytes(b"an image")
    rest = [] if {"--images", "--labels", "--evaluate"} & {*words} else ["--images", "gallery"]
    rest += [] if "--run" in words else ["--run", "run"]
    assert message in refused(main, [*words, *rest])


def test_unreadable_image_in_the_gallery_is_skipped_with_a_warning(run, gallery, capsys, refused):
    (before,) = search(capsys, "a dog", "--run", run, "--images", gallery)
    (gallery / "b2.jpg").write_bytes(b"not an image")
    for _ in range(2):  # each search tries again
        main(["a dog", "--run", str(run), "--images", str(gallery), "--json"])
        output = capsys.readouterr()
        assert "b2.jpg cannot be read" in output.err and "skipped" in output.err
        (found,) = json.loads(output.out)
        assert found["searched"] == before["searched"] == 6
        assert [result["file"] for result in found["results"]] == [result["file"] for result in before["results"]]
        for name in ("score", "z_score"):
            expected = pytest.approx([result[name] for result in before["results"]], abs=1e-4)
            assert [result[name] for result in found["results"]] == expected
    for file in gallery.rglob("*.*"):
        file.write_bytes(b"not an image")
    assert "none of the images can be read" in refused(main, ["a dog", "--run", run, "--images", gallery])


def test_image_is_found_once_it_is_readable(run, gallery, capsys):
    whole = (gallery / "3.jpg").read_bytes()
    (gallery / "3.jpg").write_bytes(b"x" * len(whole))
    time = (gallery / "3.jpg").stat().st_mtime_ns
    assert search(capsys, "a dog", "--run", run, "--images", gallery)[0]["searched"] == 5
    (gallery / "3.jpg").write_bytes(whole)
    os.utime(gallery / "3.jpg", ns=(time, time))  # as after chmod: same size, same time
    assert search(capsys, "a dog", "--run", run, "--images", gallery)[0]["searched"] == 6


@pytest.mark.skipif(sys.platform != "linux", reason="such names are possible on Linux only")
def test_undecodable_names_and_links_to_themselves_are_handled(run, gallery, capsys):
    (gallery / "0.jpg").rename(gallery / os.fsdecode(b"bad\xff.jpg"))
    (gallery / "loop.jpg").symlink_to("loop.jpg")
    (found,) = search(capsys, "a dog", "--run", run, "--images", gallery)
    assert found["searched"] == 6


def test_help_and_bad_flags_do_not_import_torch():
    code = (
        "import runpy, sys\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'inference.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('torch' in sys.modules)\n"
    )
    for words, status in ((["--help"], 0), (["a dog", "--outptu", "x.png"], 2), ([], 2)):
        process = run_python("-c", code, *words)
        assert process.returncode == status and process.stdout.endswith("False\n"), process


def test_closed_pipe_still_saves_the_plot(run, gallery):
    command = [
        sys.executable,
        ROOT / "inference.py",
        "a dog",
        "--run",
        run,
        "--images",
        gallery,
        "--output",
        gallery / "m.png",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 0, errors
    assert "Broken" not in errors and "Traceback" not in errors
    assert (gallery / "m.png").exists()


def test_search_without_a_trained_run_is_refused(refused):
    assert "no trained run in runs/" in refused(main, ["a dog"])


def test_sentence_longer_than_any_file_name_is_accepted(trained_run, tmp_path, sample):
    long = "a red ring and " * 40
    main(["--run", str(trained_run), long, "--images", sample["image_path"], "--output", "m.png"])
    assert (tmp_path / "m.png").exists()
