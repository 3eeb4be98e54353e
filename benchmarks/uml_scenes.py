"""Supervised UML where related text is known to carry information: the built-in scenes, with colour x shape as classes.

    python benchmarks/uml_scenes.py --out runs/uml_scenes [--json FILE] [--world 0]

Features of images are those of an untrained network; features of texts are those of captions of *other* scenes, by a
small T5 that is trained on captions. Captions can teach which classes share a colour or a shape. It takes two minutes
of one CPU core.

It fails unless UML with text start is better than the image alone and than unrelated texts, beyond the noise, and
unrelated texts are not better than the image alone.
"""

import json as json_format
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

from diptych.data.pixels import channels_first
from diptych.data.scenes import ScenesSource
from diptych.data.splits import draw_episode
from diptych.encoders import open_text_encoder
from diptych.eval.frechet import RandomFeatures
from diptych.experiments.few_shot import FewShotConfig, accuracy_figure, as_json, few_shot, gain, show
from diptych.tokenizers.recipes import encoder_tiny
from diptych.uml.data import LabelledFeatures
from diptych.uml.objective import SharedHeadConfig

IMAGES, TESTED, CAPTIONS = 3000, 1000, 600
SHOTS, SEEDS = (1, 2, 4, 8), (1, 2, 3, 4, 5)


def classes_of(world: ScenesSource) -> list[str]:
    things = [scene.things[0] for scene in world.scenes(range(len(world)))]
    return [f"{thing.colour} {thing.shape}" for thing in things]


def features_of_images(world: ScenesSource, names: list[str]) -> LabelledFeatures:
    network = RandomFeatures()
    parts = np.array_split(np.arange(len(world)), 16)
    vectors_ND = torch.cat([network(channels_first(world.images(part, 32))) for part in parts])
    return LabelledFeatures(vectors_ND=vectors_ND.numpy(), labels_N=labels(world, names))


def features_of_captions(world: ScenesSource, names: list[str], out: Path) -> LabelledFeatures:
    captions = [world.captions(item)[0] for item in range(len(world))]
    encoder_tiny().fit(captions, out / "stages" / "text_encoder").save_pretrained(out / "text_encoder")
    vectors_ND = open_text_encoder(out)(captions[:CAPTIONS]).numpy()
    return LabelledFeatures(vectors_ND=vectors_ND, labels_N=labels(world, names)[:CAPTIONS])


def labels(world: ScenesSource, names: list[str]) -> np.ndarray:
    return np.array([names.index(name) for name in classes_of(world)])


def main(*, out: Path, json: Path | None = None, steps: int = 200, world: int = 0) -> None:
    """Args:
    out: Folder for the text encoder and the figure.
    json: File for all numbers.
    steps: Number of optimizer updates of every classifier.
    world: Number of the set of scenes. Settings were chosen on set 0.
    """
    scenes, other = ScenesSource(count=IMAGES, seed=2 * world), ScenesSource(count=2000, seed=2 * world + 1)
    names = sorted(set(classes_of(scenes)))
    images, texts = features_of_images(scenes, names), features_of_captions(other, names, out)
    config = FewShotConfig(
        shots=SHOTS,
        seeds=SEEDS,
        steps=steps,
        eval_every=50,
        aux_weights=(0.3, 1.0, 3.0),
        head=SharedHeadConfig(features="standard", logit_scale=4.0),  # the scales of the network's layers differ a lot
    )
    known = images.labels_N[:-TESTED]
    episodes = {(shots, seed): draw_episode(known, shots, seed=seed) for shots in SHOTS for seed in SEEDS}
    test = np.arange(IMAGES - TESTED, IMAGES)
    results = few_shot(images, texts, episodes, test, config, say=lambda line: print(line, flush=True))
    show(results, title=f"scenes, {len(names)} classes")
    (out / "uml_scenes.svg").write_bytes(accuracy_figure(results, title="Scenes: 20 classes"))
    if json:
        json.write_text(dumps(as_json(results)))
    real = [gain(results, "UML init", worse) for worse in ("image only", "unrelated init")]
    unrelated = [gain(results, name, "image only") for name in ("unrelated text", "unrelated init")]
    good = all(g.is_real and g.mean > 0 for g in real) and not any(g.is_real and g.mean > 0 for g in unrelated)
    told = "related text helps and unrelated text does not" if good else "related text does not help as it should"
    print(f"verdict: {told}; {real[0]}")
    sys.exit(not good)


def dumps(value: object) -> str:
    return json_format.dumps(value, indent=1) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
