"""Zero-shot classification: prompts against a loop, accuracy against counting, the folder and CSV formats."""

import json
import math

import pytest
import torch
from conftest import draw_image

from clip import save_model
from config import InputError
from extras.zero_shot import evaluate_labels, label_embeddings, label_logits, parse_labels, read_labelled_images
from inference import embed_images, main
from utils.embed import embed_captions


def test_label_embeddings_are_the_mean_over_templates(tiny_model):
    model, templates = tiny_model(), ("a {} on grass", "the {}")
    found = label_embeddings(model, ["red", "blue"], templates)
    for label, vector in zip(("red", "blue"), found, strict=True):
        a, b = embed_captions(model, [f"a {label} on grass"])[0], embed_captions(model, [f"the {label}"])[0]
        torch.testing.assert_close(vector, (a + b) / (a + b).norm(), atol=1e-5, rtol=0)


def test_label_logits_are_scaled_cosines_averaged_over_models(tiny_model, tmp_path):
    draw_image(tmp_path / "a.jpg")
    models = [tiny_model()]
    torch.manual_seed(3)
    models.append(tiny_model(projection_dim=16))
    found = label_logits(models, [tmp_path / "a.jpg"], ["red", "blue"], ("{}",))
    expected = torch.zeros(2)
    for model in models:
        image = embed_images(model, [tmp_path / "a.jpg"])[0]
        cosines = torch.stack([embed_captions(model, [label])[0] @ image for label in ("red", "blue")])
        expected += cosines / 0.07 / 2
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)


def test_label_embeddings_refuses_a_template_without_braces(tiny_model):
    with pytest.raises(InputError, match="should contain {}"):
        label_embeddings(tiny_model(), ["a", "b"], ["a photo"])


def test_evaluate_labels_counts_predictions():
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 2], [2, 1, 0], [0, 3, 0]])
    found = evaluate_labels(logits, ["a", "a", "a", "b"], ["a", "b", "c"])
    assert found["confusion"] == [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert found["accuracy"] == 75
    assert found["mean_label_accuracy"] == pytest.approx(100 * (2 / 3 + 1) / 2)  # no image of c
    assert found["images"] == 4


def test_parse_labels_splits_at_commas():
    assert parse_labels(" dog, cat ,dog,a red bus,") == ["dog", "cat", "a red bus"]
    with pytest.raises(InputError, match="two or more"):
        parse_labels("dog")


def test_read_labelled_images_of_folders(tmp_path):
    for name in ("hot_dog/1.jpg", "hot_dog/more/2.jpg", "cat/3.png", "loose.jpg"):
        draw_image(tmp_path / "tree" / name)
    files, labels = read_labelled_images(tmp_path / "tree")
    found = {file.name: label for file, label in zip(files, labels, strict=True)}
    assert found == {"1.jpg": "hot dog", "2.jpg": "hot dog", "3.png": "cat"}


def test_read_labelled_images_of_a_csv(tmp_path):
    (tmp_path / "list.csv").write_text("label,image\ndog,a.jpg\ncat, sub/b.jpg\n")
    files, labels = read_labelled_images(tmp_path / "list.csv", tmp_path / "Images")
    assert files == [tmp_path / "Images/a.jpg", tmp_path / "Images/sub/b.jpg"] and labels == ["dog", "cat"]
    assert read_labelled_images(tmp_path / "list.csv")[0][0] == tmp_path / "a.jpg"
    (tmp_path / "list.csv").write_bytes("file name;class\na.jpg;Hündin\n".encode("cp1252"))
    assert read_labelled_images(tmp_path / "list.csv") == ([tmp_path / "a.jpg"], ["Hündin"])
    assert parse_labels("a,caf\udce9") == ["a", "caf\u00e9"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header"),
        ("a,b\n1,2\n", "header"),
        ("image,label\n", "header"),
        ("image,label\na.jpg\n", "row 2 lacks"),
        ("image,label\na.jpg,x\n,y\n", "row 3 lacks"),
        ("image,label\na.txt,x\n", "not the name of an image"),
    ],
)
def test_read_labelled_images_refuses(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_labelled_images(tmp_path / "list.csv")


def test_zero_shot_command(tmp_path, tiny_model, capsys, refused):
    torch.manual_seed(2)
    model = tiny_model()
    save_model(model, tmp_path / "run/best")
    for seed, name in enumerate(("red/a.jpg", "red/b.jpg", "blue/c.jpg")):
        draw_image(tmp_path / "tree" / name, seed=seed)
    words = ["--run", tmp_path / "run", "--zero_shot", tmp_path / "tree", "--output", tmp_path / "confusion.png"]
    main([str(word) for word in [*words, "--json", "--template", "a {}"]])
    found = json.loads(capsys.readouterr().out)
    right = 0
    for name in ("blue/c.jpg", "red/a.jpg", "red/b.jpg"):
        image = embed_images(model, [tmp_path / "tree" / name])[0]
        cosines = {label: float(embed_captions(model, [f"a {label}"])[0] @ image) for label in ("red", "blue")}
        right += max(cosines, key=cosines.get) == name.split("/")[0]
    assert found["accuracy"] == pytest.approx(100 * right / 3)
    assert found["labels"] == ["blue", "red"] and (tmp_path / "confusion.png").stat().st_size > 1000
    draw_image(tmp_path / "tree/red/damaged.jpg")
    (tmp_path / "tree/red/damaged.jpg").write_bytes(b"not an image")
    main([str(word) for word in [*words, "--json", "--template", "a {}"]])
    output = capsys.readouterr()
    assert json.loads(output.out) == found and "damaged.jpg cannot be read" in output.err
    assert "red" in refused(main, [*words, "--labels", "green,blue"])
    assert "two or more" in refused(main, [*words, "--labels", "green"])
    main([str(word) for word in [*words, "--template", "a {}"]])
    assert f"accuracy {found['accuracy']:.1f}% on 3 images" in capsys.readouterr().out
    assert "zero_shot" in refused(main, ["--run", tmp_path / "run", "--zero_shot", tmp_path / "nothing"])


def test_image_is_classified_by_its_labels(tmp_path, tiny_model, capsys):
    model = tiny_model()
    save_model(model, tmp_path / "run/best")
    draw_image(tmp_path / "photo.jpg", seed=1)
    words = ["--run", "run", "--image", "photo.jpg", "--labels", "red,blue,green", "--template", "{}"]
    main(words)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    image = embed_images(model, ["photo.jpg"])[0]
    powers = {c: math.exp(float(embed_captions(model, [c])[0] @ image) / 0.07) for c in ("red", "blue", "green")}
    expected = sorted(((p / sum(powers.values()), label) for label, p in powers.items()), reverse=True)
    assert [label for _, label in lines] == [label for _, label in expected]
    assert [float(p) for p, _ in lines] == pytest.approx([p for p, _ in expected], abs=1e-4)
    assert (tmp_path / "matches.png").exists()
    main([*words[:-3], ",".join("abcdefghijklmnopqrstuvwxyz"), "--template", "{}"])
    assert "(6 more did not fit)" in capsys.readouterr().err
