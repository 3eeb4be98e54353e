"""Supervised UML where related text provably carries information: the built-in scenes, classes = colour x shape.

    python benchmarks/uml_scenes.py --out runs/uml_scenes [--json FILE] [--world 0]

Images are features of a random, never trained network; texts are captions of *other* scenes, by a small T5 trained on
captions. What captions can teach is which classes share a colour or a shape. Two CPU minutes.

Fails unless UML with text start beats the image alone and unrelated texts beyond the noise, and unrelated texts do not
beat the image alone.
"""

import json as json_format
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

from diptych.data.pixels import channels_first
from diptych.data.scenes.source import ScenesSource
from diptych.data.splits import draw_episode
from diptych.encoders import open_text_encoder
from diptych.eval.frechet import RandomFeatures
from diptych.experiments.few_shot import FewShotConfig, accuracy_figure, as_json, few_shot, gain, show
from diptych.tokenizers.recipes import encoder_tiny
from diptych.uml.data import LabelledFeatures
from diptych.uml.head import SharedHeadConfig

PICTURES, TESTED, CAPTIONS = 3000, 1000, 600
SHOTS, SEEDS = (1, 2, 4, 8), (1, 2, 3, 4, 5)


def classes_of(world: ScenesSource) -> list[str]:
    things = [scene.things[0] for scene in world.scenes(range(len(world)))]
    return [f"{thing.colour} {thing.shape}" for thing in things]


def features_of_pictures(world: ScenesSource, names: list[str]) -> LabelledFeatures:
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
    steps: Updates of every classifier.
    world: Other scenes. Settings were made on those of 0.
    """
    scenes, other = ScenesSource(count=PICTURES, seed=2 * world), ScenesSource(count=2000, seed=2 * world + 1)
    names = sorted(set(classes_of(scenes)))
    images, texts = features_of_pictures(scenes, names), features_of_captions(other, names, out)
    config = FewShotConfig(
        shots=SHOTS, seeds=SEEDS, steps=steps, eval_every=50, aux_weights=(0.3, 1.0, 3.0),
        head=SharedHeadConfig(features="standard", logit_scale=4.0),  # layers of the network differ in scale by far
    )  # fmt: skip
    known = images.labels_N[:-TESTED]
    episodes = {(shots, seed): draw_episode(known, shots, seed=seed) for shots in SHOTS for seed in SEEDS}
    test = np.arange(PICTURES - TESTED, PICTURES)
    outcomes = few_shot(images, texts, episodes, test, config, say=lambda line: print(line, flush=True))
    show(outcomes, title=f"scenes, {len(names)} classes")
    (out / "uml_scenes.svg").write_bytes(accuracy_figure(outcomes, title="Scenes: 20 classes"))
    if json:
        json.write_text(dumps(as_json(outcomes)))
    real = [gain(outcomes, "UML init", worse) for worse in ("image only", "unrelated init")]
    unrelated = [gain(outcomes, name, "image only") for name in ("unrelated text", "unrelated init")]
    good = all(g.is_real and g.mean > 0 for g in real) and not any(g.is_real and g.mean > 0 for g in unrelated)
    told = "related text helps and unrelated text does not" if good else "related text does not help as it should"
    print(f"verdict: {told}; {real[0]}")
    sys.exit(not good)


def dumps(value: object) -> str:
    return json_format.dumps(value, indent=1) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
