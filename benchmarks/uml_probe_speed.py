"""Epochs per second of the linear probe: on cached features, and decoding and encoding every image in every epoch.

    python benchmarks/uml_probe_speed.py --data images/ [--encoder E] [--json FILE]

Both train the same classifier by the same update in one process. Without `--encoder` the images are encoded by a small
ViT with random weights, which is as fast as a trained one. It fails when caching is less than five times as fast.
"""

import json as json_format
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import tyro

from diptych.data.pixels import SkippedItems
from diptych.data.sources import open_source
from diptych.data.splits import Labelled
from diptych.data.streams import BatchSampler, Stream
from diptych.encoders import ScratchConfig, open_image_encoder, scratch_encoder
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import Devices
from diptych.train.step import TrainStep
from diptych.uml.data import IMAGE, TEXT, LabelledFeatures, LabelledImages, labelled_image_features
from diptych.uml.objective import SharedHeadConfig, UmlConfig, UmlObjective
from diptych.uml.training import start_head

ROWS, TEXTS, WIDTH = 32, 30, 256


def seconds_a_step(objective: UmlObjective, streams: dict[str, Stream], *, steps: int) -> float:
    train = TrainConfig(steps=10 * steps, batch_size=ROWS, device="cpu", precision="fp32")
    batches = BatchSampler(streams, multiples=objective.streams, batch_size=ROWS, seed=0)
    update = TrainStep(
        objective, train=train, optim=OptimConfig(max_grad_norm=None), devices=Devices(device="cpu", precision="fp32")
    )
    for step in range(3):
        update(step, batches(step))
    began = time.perf_counter()
    for step in range(3, 3 + steps):
        update(step, batches(step))
    return (time.perf_counter() - began) / steps


def main(*, data: str, encoder: str | None = None, json: Path | None = None, images: int = 1000) -> None:
    """Args:
    data: Source of labelled images.
    encoder: Image encoder: a folder, hub name or run.
    json: File for the numbers.
    images: Number of images to train on.
    """
    labelled = Labelled.of(open_source(data))
    items = np.random.Generator(np.random.PCG64(0)).permutation(len(labelled.labels_N))[:images]
    network = open_image_encoder(encoder) if encoder else scratch_encoder(ScratchConfig(), seed=0)
    network.requires_grad_(False)
    skipped, classes = SkippedItems(), len(labelled.classes)
    vectors = torch.randn(TEXTS * classes, WIDTH, generator=torch.Generator().manual_seed(0)).numpy()
    texts = LabelledFeatures(vectors_ND=vectors, labels_N=np.arange(TEXTS * classes) % classes)
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        cached = labelled_image_features(network, labelled, items, cache=Path(cache), skipped=skipped, workers=2)
        once = time.perf_counter() - began
        pixels = LabelledImages(labelled, items, size=network.image_size, skipped=skipped, cache_mb=0)
        config = SharedHeadConfig(widths={IMAGE: network.width, TEXT: WIDTH}, classes=classes, features="unit")
        found = {}
        for name, examples, encoding, steps in (("uncached", pixels, network, 12), ("cached", cached, None, 300)):
            head = start_head(config, None, texts.tensors(), init="random", seed=0)
            objective = UmlObjective(head, UmlConfig(), target=IMAGE, encoder=encoding)
            step = seconds_a_step(objective, {IMAGE: examples.stream(), TEXT: texts.stream()}, steps=steps)
            found[name] = ROWS / (step * len(items))
    gain = found["cached"] / found["uncached"]
    for name, speed in found.items():
        print(f"{name:>9}: {speed:.3g} epochs of {len(items):,} images a second")
    print(f"encoding once took {once:.1f} s, as long as {once * found['uncached']:.1f} uncached epochs")
    if json:
        json.write_text(json_format.dumps({"epochs_per_second": found, "gain": gain, "encoding_once": once}, indent=1))
    print(f"verdict: caching makes the probe {gain:.0f} times as fast{'' if gain >= 5 else ', less than fivefold'}")
    sys.exit(gain < 5)


if __name__ == "__main__":
    tyro.cli(main)
