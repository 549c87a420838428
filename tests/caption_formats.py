"""The captions of ten images in every format of captions file that is read."""

import json

from conftest import draw_image

IMAGES = [f"{number}.jpg" for number in range(10)]
PAIRS = [(name, f"A {size} dog , running {name[0]} times .") for name in IMAGES for size in ("big", "small")]
SPLITS = {name: "train" if name < "8" else "val" if name < "9" else "test" for name in IMAGES}


def table(header, delimiter, rows, quote=""):
    lines = [header, *(delimiter.join((name, *more, f"{quote}{caption}{quote}")) for name, *more, caption in rows)]
    return "".join(f"{line}\n" for line in lines).encode()


def numbered():
    return [(name, str(number % 2), caption) for number, (name, caption) in enumerate(PAIRS)]


def tokens():
    return table("", "\t", [(f"{name}#{number}", caption) for name, number, caption in numbered()]).lstrip()


def karpathy():
    sentences = {
        name: [{"raw": text, "tokens": text.split()} for image, text in PAIRS if image == name] for name in IMAGES
    }
    images = [{"filename": name, "split": SPLITS[name], "sentences": sentences[name], "imgid": 1} for name in IMAGES]
    return json.dumps({"dataset": "flickr8k", "images": images}).encode()


def coco():
    images = [{"id": number, "file_name": name, "height": 40} for number, name in enumerate(IMAGES)]
    annotations = [{"id": 1, "image_id": IMAGES.index(name), "caption": caption} for name, caption in PAIRS]
    return json.dumps({"info": {}, "images": images, "annotations": annotations}).encode()


def json_lines(**columns):
    records = [
        {"file_name": name, "text": text} | {key: of[name] for key, of in columns.items()} for name, text in PAIRS
    ]
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


# {name: (file name, content)}
FORMATS = {
    "Kaggle": ("captions.txt", table("image,caption", ",", PAIRS, '"')),
    "Flickr8k tokens": ("Flickr8k.token.txt", tokens()),
    "Flickr30k tokens": ("results_20130124.token", tokens()),
    "Flickr30k": ("results.csv", table("image_name| comment_number| comment", "| ", numbered())),
    "Karpathy": ("dataset_flickr8k.json", karpathy()),
    "COCO": ("captions_val2014.json", coco()),
    "Hugging Face, CSV": ("metadata.csv", table("file_name,text", ",", PAIRS, '"')),
    "Hugging Face, JSON": ("metadata.jsonl", json_lines()),
    "Hugging Face, split": ("metadata.jsonl", json_lines(split=SPLITS)),
    "Excel": ("captions.csv", table("Bild;Beschreibung", ";", PAIRS).replace(b"dog", b"d\xf6g")),
    "UTF-16, tabs": ("captions.tsv", table("Image\tCaption", "\t", PAIRS).decode().encode("utf-16")),
    "split column": ("captions.csv", table("image,split,source,caption", ",",
                                           [(n, SPLITS[n], "web", c) for n, c in PAIRS], '"')),
}  # fmt: skip


def pairs_of(name):
    """The (image, caption) pairs of a format."""
    return [(image, caption.replace("dog", "dög")) if name == "Excel" else (image, caption) for image, caption in PAIRS]


def write_images(folder):
    for seed, name in enumerate(IMAGES):
        draw_image(folder / name, seed=seed)
