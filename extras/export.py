"""Export a trained run: `python -m extras.export --run runs/x --to DIR`.

DIR gets both encoders with their projections as ONNX, the tokenizer, preprocessor_config.json, a model card (README.md)
and example.py, which searches a folder with onnxruntime, tokenizers, Pillow and numpy alone; for a run with CLIP's
architecture also transformers/, which `CLIPModel.from_pretrained` loads.
"""

import argparse
import contextlib
import io
import json
import logging
import shutil
import warnings
from pathlib import Path

from config import InputError
from utils.cli import exit_on_input_error
from utils.runs import model_folder, newest_run

PACKAGES = "pip install onnx onnxscript onnxruntime"
MAX_DIFFERENCE = 1e-4  # of a cosine similarity
FILES = Path(__file__).with_name("export_files")  # example.py and the template of the model card


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(prog="python -m extras.export", description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="run folder; default: the newest in runs/")
    parser.add_argument("--to", required=True, help="new folder")
    parser.add_argument("--license", default="other", help="licence of the exported model, for the model card")
    return parser.parse_args(argv)


def export(run, folder, license_name="other"):
    """Write the export of a run to a new folder; returns the largest difference of a cosine. Raises InputError."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"export needs the package {error.name}: {PACKAGES}") from None
    run, folder = Path(run), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"to is {folder}, which exists: pass a new folder")
    model, existed = load(run), folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        export_encoders(model, folder)
        difference = max(check_encoders(model, folder), export_transformers(model, folder) or 0)
        if not difference <= MAX_DIFFERENCE:
            raise InputError(f"cosines of the exported model differ by {difference:.1e}: it cannot be exported")
        model.tokenizer.save_pretrained(folder)
        write_preprocessor(model, folder)
        write_card(run, model, folder, license_name, difference)
        shutil.copy(FILES / "example.py", folder / "example.py")
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)  # nothing half-written
        raise
    return difference


def load(run):
    from clip import load_model

    return load_model(run)


def export_encoders(model, folder):
    """Write image_encoder.onnx and text_encoder.onnx: unit vectors (B, D), with dynamic batch size and length."""
    import torch

    class ImageEmbedding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):  # (B, 3, size, size) in [0, 1]
            return self.model.encode_image(pixel_values)

    class TextEmbedding(ImageEmbedding):
        def forward(self, input_ids, attention_mask):  # (B, L) int64, padded on the right
            return self.model.project_text(self.model.text_encoder.encode(input_ids, attention_mask))

    images, tokens = example_inputs(model, 2)
    batch = torch.export.Dim("batch", max=4096)
    text_shape = {0: batch, 1: torch.export.Dim("length", max=model.max_length)}
    image_names, text_names = ["pixel_values"], ["input_ids", "attention_mask"]
    for name, module, inputs, input_names, shapes in (
        ("image", ImageEmbedding(), (images,), image_names, {"pixel_values": {0: batch}}),
        ("text", TextEmbedding(), tokens, text_names, dict.fromkeys(text_names, text_shape)),
    ):
        path, names = folder / f"{name}_encoder.onnx", {"input_names": input_names, "output_names": [f"{name}_embeds"]}
        with quiet():
            torch.onnx.export(
                module.eval(), inputs, path, **names, dynamic_shapes=shapes, dynamo=True, external_data=False
            )


@contextlib.contextmanager
def quiet():
    """Without the exporter's progress messages and warnings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def example_inputs(model, count, seed=0):
    """Random images (B, 3, size, size) in [0, 1], and ids and mask (B, L) of random captions of different lengths."""
    import torch

    from dataset import pad_tokens

    random, size = torch.Generator().manual_seed(seed), model.config.size
    images = torch.rand(count, 3, size, size, generator=random)
    captions = [" ".join(["a dog runs on the green grass"] * (1 + row % 3)) for row in range(count)]
    ids = model.tokenizer(captions, truncation=True, max_length=model.max_length, return_tensors="np")["input_ids"]
    return images, pad_tokens(list(ids), model.tokenizer.pad_token_id)


def check_encoders(model, folder):
    """The largest difference between cosines of PyTorch's embeddings and onnxruntime's, for other batch sizes."""
    import onnxruntime
    import torch

    found, expected = [], []
    images, tokens = example_inputs(model, 5, seed=1)
    named = {"input_ids": tokens[0], "attention_mask": tokens[1]}
    for name, inputs in (("image", {"pixel_values": images}), ("text", named)):
        session = onnxruntime.InferenceSession(folder / f"{name}_encoder.onnx", providers=["CPUExecutionProvider"])
        (result,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        found.append(torch.from_numpy(result))
    with torch.no_grad():
        expected = [model.encode_image(images), model.encode_text(*tokens)]
    cosines = [x @ x.T for x in (torch.cat(found), torch.cat(expected))]
    return (cosines[0] - cosines[1]).abs().max().item()


def export_transformers(model, folder):
    """Write transformers/ if the run has CLIP's architecture; the largest difference of a cosine, or None."""
    from extras.export_clip import save_clip_model

    difference = save_clip_model(model, folder / "transformers", *example_inputs(model, 5, seed=2))
    if difference is not None:
        mean, std = (x.flatten().tolist() for x in (model.image_encoder.mean, model.image_encoder.std))
        write_preprocessor(model, folder / "transformers", do_normalize=True, image_mean=mean, image_std=std)
    return difference


def write_preprocessor(model, folder, **changes):
    """preprocessor_config.json in the layout of transformers; the ONNX model subtracts mean and std itself."""
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": model.config.size, "width": model.config.size},
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "max_length": model.max_length,
        "pad_token_id": model.tokenizer.pad_token_id,
        **changes,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_card(run, model, folder, license_name, difference):
    """README.md with the results, the data and the settings of the run, in the form of the Hugging Face Hub."""
    from clip import format_metrics
    from utils.files import read_json

    base = model_folder(run)
    results_file = next((path for path in (run / "results.json", base / "results.json") if path.exists()), None)
    results = read_json(results_file) if results_file else None
    measured = "The run has no results yet."
    if results:
        table = format_metrics(results)
        measured = f"{results['split'].capitalize()} split, {results['images']:,} images:\n```\n{table}\n```"
    settings = model.saved_config["settings"]
    names = ("image_path", "captions_path", "cache_path", "run", "gan_run", "gan_captions")  # of this machine
    changed = {name: value for name, value in settings.items() if name not in names}
    text = (FILES / "card.md").read_text(encoding="utf-8")
    values = {
        "LICENSE": license_name,
        "IMAGE_ENCODER": Path(settings["model_name"]).name,
        "TEXT_ENCODER": Path(settings["text_encoder_model"]).name,
        "RESULTS": measured,
        "DATA": Path(settings["captions_path"]).name,
        "SIZE": str(settings["size"]),
        "DIM": str(settings["projection_dim"]),
        "DIFFERENCE": f"{difference:.1e}",
        "SETTINGS": json.dumps(changed, indent=1),
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    (folder / "README.md").write_text(text, encoding="utf-8")


def main(argv=None):
    arguments = parse_arguments(argv)
    difference = export(arguments.run or newest_run(trained=True), arguments.to, arguments.license)
    print(
        f"written to {arguments.to}; largest difference of a cosine between PyTorch and onnxruntime: {difference:.1e}"
    )
    print(f'to search: cd {arguments.to}; python example.py "a sentence" FOLDER_OF_IMAGES')


if __name__ == "__main__":
    exit_on_input_error(main)()
