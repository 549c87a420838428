"""`--gan` without `--gan_run`: CLIP on real images, a GAN conditioned on it, and CLIP on real and generated images."""

import dataclasses
from pathlib import Path

import gan
from dataset import mentions
from utils.clip_filter import check_settings
from utils.files import read_json, write_json
from utils.runs import stage_1_folder
from utils.synthetic import generate_dataset


def train_stages(config, train):
    """Train all three stages with `train` (`main.train`); returns the results of the last one.

    Stages 1 and 2 are in stage1/ of the run folder. Finished stages are not repeated. Bad settings of later stages are
    rejected before anything is written.
    """
    check_settings(config, mentions)
    if config.sample_images:
        generate_dataset(config.image_path, config.captions_path, config.sample_images)
    gan.load_gan_splits(config, config.seed)
    stage_1 = dataclasses.replace(config, run=stage_1_folder(config.run).as_posix(), gan="none")
    write_json(Path(config.run) / "config.json", {**vars(config), "resume": False})  # so that it can be resumed
    print("\n==== stage 1 of 3: CLIP on real images ====", flush=True)
    if not (Path(stage_1.run) / "results.json").exists():
        train(stage_1)
    print("\n==== stage 2 of 3: GAN, conditioned on the caption embeddings of that CLIP ====", flush=True)
    gan.train_gan(stage_1)
    print("\n==== stage 3 of 3: CLIP on real and generated images ====", flush=True)
    results = train(config)
    if read_json(Path(stage_1.run) / "config.json")["epochs"] == config.epochs:
        baseline = read_json(Path(stage_1.run) / "results.json")
        print(f"\n{'':<20}{'real images only':>20}{'with generated':>20}")
        for name in ("text_to_image_R@1", "text_to_image_R@5", "image_to_text_R@1", "rsum"):
            print(f"{name.replace('_', ' '):<20}{baseline[name]:>20.1f}{results[name]:>20.1f}")
        print("(one seed each; benchmarks/gan_ablation.py compares over several seeds)", flush=True)
    return results
