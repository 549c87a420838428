"""The page about a run: self-contained, escaped, and with the right examples."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_image

from clip import retrieval_metrics
from config import Config
from dataset import make_pairs
from utils.report_page import rank_images, write_page


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [value for name, value in attributes if name in ("src", "href", "action")]


def make_page(tmp_path, captions, noise=0.0, missing=()):
    pairs = make_pairs(captions, tmp_path)
    for number, file in enumerate(pairs.files):
        if file.name not in missing:
            draw_image(file, seed=number)
    random = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(len(pairs.files), 16, generator=random), dim=1)
    texts = images[pairs.image_index] + noise * torch.randn(len(pairs.captions), 16, generator=random)
    texts = F.normalize(texts, dim=1)
    results = {"split": "test", "images": len(images), **retrieval_metrics(images, texts, pairs.image_index, 10)}
    write_page(tmp_path, Config(run=str(tmp_path), seed=7), results, pairs, images, texts)
    return (tmp_path / "report.html").read_text(encoding="utf-8"), pairs, images, texts


def test_page_is_self_contained_and_escaped(tmp_path):
    captions = {f"{i:02d}&<i>.png": [f"<script>alert({i})</script> a & b"] for i in range(12)}
    page, *_ = make_page(tmp_path, captions, missing={"00&<i>.png"})
    links = Links()
    links.feed(page)
    assert "script" not in links.tags and "i" not in links.tags
    assert links.found and all(link == "" or link.startswith("data:image/") for link in links.found)
    assert "&lt;script&gt;alert(" in page
    assert "seed = 7" in page and "rsum 600.0" in page


def test_examples_show_the_own_image_and_its_rank(tmp_path):
    captions = {f"{i:02d}.png": [f"caption {i} one", f"caption {i} two with more words"] for i in range(40)}
    page, pairs, images, texts = make_page(tmp_path, captions, noise=1.0)
    scores = texts @ images.T
    ranks = (scores >= scores[torch.arange(80), torch.from_numpy(pairs.image_index)][:, None]).sum(1).tolist()
    shown = re.findall(
        r'<div class="search">(.*?) <small>\(rank of its own image: (\d+)\)</small>(.*?)</div></div>', page
    )
    assert len(shown) == 15
    for caption, rank, figures in shown:
        assert int(rank) == ranks[pairs.captions.index(caption)]
        (own,) = re.findall(r'<figure class="own">.*?<figcaption>(.*?)</figcaption>', figures)
        assert own == f"{int(caption.split()[1]):02d}.png"
    assert all(int(rank) == 1 for _, rank, _ in shown[:5]) and all(int(rank) > 10 for _, rank, _ in shown[5:10])
    inside = [rank for rank, caption in zip(ranks, pairs.captions, strict=True) if len(caption.split()) == 3]
    expected = f"<td>1 to 5</td><td>40</td><td>{100 * np.mean([rank == 1 for rank in inside]):.1f}</td>"
    assert expected in page


def test_rank_images_counts_ties_against_the_model():
    found = rank_images(torch.ones(3, 2), torch.ones(4, 2), np.array([0, 1, 2, 2]), np.arange(4))
    assert found["ranks"].tolist() == [3] * 4
    assert found["margins"] == pytest.approx(np.zeros(4))


def test_a_run_has_a_page(trained_run):
    assert "Recall by length of the caption" in (trained_run / "report.html").read_text(encoding="utf-8")
