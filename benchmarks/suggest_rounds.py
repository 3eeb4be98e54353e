"""Which images to caption next: does `diptych suggest` choose better than uncertainty, diversity, or chance alone?

    python benchmarks/suggest_rounds.py --out DIR --data scenes: [--pool 2000] [--rounds 5] [--seeds 0 1 2]
    python benchmarks/suggest_rounds.py --out DIR --data flickr8k_96.tar [--pool 2000]

A learner begins with 50 captioned images of a pool. In each round 50 more are captioned, chosen by one of four rules,
and the learner learns from all of them anew. All rules have the same first images and equally many captions.

    scenes      logistic regression on pixels, a classifier for each quarter and attribute; score: captions exact on
                held-out combinations; uncertainty: minus the log-probability of its own caption; what is alike is said
                by colour and gradient histograms
    photos      heads as those of clip-frozen on EfficientNet-Lite0 and MiniLM; score: mean R@10 of both directions
                among the test split; uncertainty: entropy over the captions there are; alike by the image tower

The score of a curve is its mean after the first round. The check: suggest's mean over the seeds is above that of random
by more than the larger standard deviation of the two on scenes, and not below it on photos. Finished curves stay in
DIR/rounds.json, and a repeat of the command computes what is missing. DIR/curves.svg shows their means.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.data.scenes import COLOURS, PLACES, SHAPES, ScenesSource
from diptych.data.sources import Source, open_source
from diptych.data.splits import Subset
from diptych.data.suggest import AssessedImages, suggest
from diptych.dual.metrics import retrieval
from diptych.dual.objective import info_nce
from diptych.encoders import open_image_encoder, open_text_encoder
from diptych.eval.baselines import encoded, histograms
from diptych.eval.probe import fit_linear
from diptych.io import write_bytes
from diptych.report.figures import Panel, curves
from diptych.run_folder import write_json

FIRST, MORE = 50, 50
L2 = 0.1
STEPS, RATE, WIDTH, DROPOUT = 200, 2e-3, 256, 0.3
IMAGES, TEXTS = "package:efficientnet-lite0", "package:minilm-l6"
NAMES = {"shape": ["", *SHAPES], "colour": ["", *COLOURS]}


@dataclass(frozen=True, kw_only=True)
class World:
    """A pool of images, and a learner."""

    source: Source
    features: np.ndarray
    """What says which images are alike."""
    learn: Callable[[np.ndarray, int], tuple[float, np.ndarray]]
    """From the captioned images and a seed: the score, and how uncertain the learner is of each image of the pool."""


def scenes(pool: int, seed: int) -> World:
    source, test = (
        ScenesSource(level=3, count=pool, seed=1000 + seed),
        ScenesSource(level=3, split="test", count=500, seed=2000 + seed),
    )
    pixels = source.images(np.arange(pool))
    x_NP = torch.from_numpy(pixels).flatten(1).float() / 255
    test_BP = torch.from_numpy(test.images(np.arange(500))).flatten(1).float() / 255
    known, asked = attributes(source), attributes(test)

    def learn(have: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
        fits = {
            key: fit_linear(x_NP[have], labels[have], classes=len(NAMES[key[1]]), l2=L2)
            for key, labels in known.items()
        }
        said, _ = read({key: fit(test_BP).log_softmax(1) for key, fit in fits.items()})
        right_B = torch.stack([said[key] == asked[key] for key in said]).all(0)
        return float(right_B.float().mean()), read({k: f(x_NP).log_softmax(1) for k, f in fits.items()})[1].numpy()

    return World(source=source, features=histograms(pixels), learn=learn)


def attributes(source: ScenesSource) -> dict[tuple[str, str], Tensor]:
    """For each quarter and attribute the number of what is there; 0 for nothing."""
    found = {(place, kind): torch.zeros(len(source), dtype=torch.long) for place in PLACES for kind in NAMES}
    for row, scene in enumerate(source.scenes(np.arange(len(source)))):
        for place, thing in zip(scene.places, scene.things, strict=True):
            for kind, names in NAMES.items():
                found[place, kind][row] = names.index(getattr(thing, kind))
    return found


def read(logs: dict[tuple[str, str], Tensor]) -> tuple[dict[tuple[str, str], Tensor], Tensor]:
    """What is said of each quarter, the emptiest one left out; and minus the log-probability of it."""
    empty_B = torch.stack([sum(logs[place, kind][:, 0] for kind in NAMES) for place in PLACES]).argmax(0)  # type: ignore[misc]
    said, nats_B = {}, torch.zeros(len(empty_B))
    for place, kind in logs:
        best_B = 1 + logs[place, kind][:, 1:].argmax(1)
        said[place, kind] = torch.where(empty_B == list(PLACES).index(place), 0, best_B)
        nats_B -= logs[place, kind].gather(1, said[place, kind][:, None])[:, 0]
    return said, nats_B


def photos(data: str, out: Path, pool: int) -> World:
    source, test = open_source(f"{data}?split=train"), open_source(f"{data}?split=test")
    chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:pool])
    x_ND, texts_N5D = features(source, chosen, out / f"train-{pool}.npz")
    test_ID, test_I5D = features(test, np.arange(len(test)), out / "test.npz")
    every_TD = test_I5D.flatten(0, 1)
    of_T = torch.arange(len(test_ID)).repeat_interleave(test_I5D.shape[1])

    def learn(have: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
        image, text, scale = heads(x_ND[have], texts_N5D[have], seed)
        table = retrieval(image(test_ID), text(every_TD), image_of_T=of_T).table()
        logs_NT = (scale * image(x_ND) @ text(texts_N5D[have].flatten(0, 1)).T).log_softmax(1)
        score = (table["image_to_text/r10"] + table["text_to_image/r10"]) / 2
        return score, -(logs_NT.exp() * logs_NT).sum(1).numpy()

    return World(source=open_source(f"{data}?split=train"), features=x_ND.numpy(), learn=learn)


def features(source: Source, items: np.ndarray, file: Path, *, captions: int = 5) -> tuple[Tensor, Tensor]:
    """Of images [N D] and of their first captions [N C D], computed once."""
    if not file.is_file():
        _, images = encoded(open_image_encoder(IMAGES), Subset(source, items))
        texts = [text for item in items for text in source.captions(int(item))[:captions]]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        encoder, found = open_text_encoder(TEXTS), {}
        with torch.inference_mode():
            for start in range(0, len(order), 64):
                rows = order[start : start + 64]
                found |= dict(zip(rows, encoder([texts[i] for i in rows]).numpy(), strict=True))
        of_texts = np.stack([found[i] for i in range(len(texts))]).reshape(len(items), -1, encoder.width)
        np.savez(file, images=images, texts=of_texts)
    stored = np.load(file)
    return torch.from_numpy(stored["images"]), torch.from_numpy(stored["texts"])


def heads(x_ND: Tensor, texts_NCD: Tensor, seed: int) -> tuple[Callable, Callable, float]:
    """Two linear heads by CLIP's loss, with the settings of clip-frozen, as functions; and the scale of cosines."""
    torch.manual_seed(seed)
    image, text = (torch.nn.Linear(each.shape[-1], WIDTH, bias=False) for each in (x_ND, texts_NCD))
    log_scale = torch.nn.Parameter(torch.tensor(float(np.log(1 / 0.07))))
    groups = [{"params": [image.weight, text.weight]}, {"params": [log_scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 25) * (1 + np.cos(np.pi * step / STEPS)) / 2
        rows = torch.randperm(len(x_ND))[:256]
        captions = texts_NCD[rows, torch.randint(texts_NCD.shape[1], (len(rows),))]
        embedded = [
            F.normalize(head(F.dropout(some, DROPOUT)), dim=-1)
            for head, some in ((image, x_ND[rows]), (text, captions))
        ]
        loss = info_nce(*embedded, log_scale.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = [head.weight.detach() for head in (image, text)]
    embed = [lambda x, weight=weight: F.normalize(x @ weight.T, dim=-1) for weight in weights]
    return embed[0], embed[1], float(log_scale.detach().exp().clamp(max=100))


def choose(rule: str, world: World, have: np.ndarray, uncertainty: np.ndarray, generator: Any) -> np.ndarray:
    rest = np.setdiff1d(np.arange(len(world.features)), have)
    if rule == "random":
        return generator.permutation(rest)[:MORE]
    if rule == "uncertainty":
        return rest[np.argsort(-uncertainty[rest], kind="stable")[:MORE]]
    images = AssessedImages(items_N=rest, features_NF=world.features[rest], uncertainty_N=uncertainty[rest])
    if rule == "diversity":
        images = replace(images, uncertainty_N=None)
    return np.array([each.item for each in suggest(world.source, images, world.features[have], count=MORE)])


def curve(rule: str, world: World, *, rounds: int, seed: int) -> list[float]:
    """The score after each round, first that of the first images."""
    have = np.random.default_rng(seed).permutation(len(world.features))[:FIRST]
    generator, scores = np.random.default_rng([seed, 1]), []
    for turn in range(rounds + 1):
        score, uncertainty = world.learn(have, seed)
        scores.append(score)
        if turn < rounds:
            have = np.concatenate([have, choose(rule, world, have, uncertainty, generator)])
    return scores


RULES = ("suggest", "uncertainty", "diversity", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes:")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pool", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file, simple = given.out / "rounds.json", given.data == "scenes:"
    settings = {"data": Path(given.data).name, "pool": given.pool, "rounds": given.rounds, "curves": {}}
    found = json.loads(file.read_text()) if file.is_file() else settings
    if {**found, "curves": {}} != settings:
        sys.exit(f"{file}: of other settings; give another --out")
    for seed in given.seeds:
        world = None
        for rule in RULES:
            if f"{rule}/{seed}" in found["curves"]:
                continue
            world = world or (scenes(given.pool, seed) if simple else photos(given.data, given.out, given.pool))
            found["curves"][f"{rule}/{seed}"] = curve(rule, world, rounds=given.rounds, seed=seed)
            write_json(file, found)
            print(f"seed {seed} {rule}: {[round(s, 3) for s in found['curves'][f'{rule}/{seed}']]}", flush=True)
    by_rule = {rule: np.array([found["curves"][f"{rule}/{seed}"] for seed in given.seeds]) for rule in RULES}
    records = {
        rule: [{"captioned images": FIRST + MORE * turn, "score": float(y)} for turn, y in enumerate(each.mean(0))]
        for rule, each in by_rule.items()
    }
    title = "captions exact" if simple else "mean R@10"
    [figure] = curves(records, panels=[Panel(title=title, keys=["score"])], over="captioned images")
    write_bytes(given.out / "curves.svg", figure)
    means = {rule: each[:, 1:].mean(1) for rule, each in by_rule.items()}
    several = int(len(given.seeds) > 1)
    for rule, each in means.items():
        print(f"{rule:<12} {each.mean():.4f} +- {each.std(ddof=several):.4f}   last {by_rule[rule][:, -1].mean():.4f}")
    ahead = means["suggest"].mean() - means["random"].mean()
    spread = max(means[rule].std(ddof=several) for rule in ("suggest", "random")) if simple else 0.0
    passed = bool(ahead > spread if simple else ahead >= 0)
    print(f"{'passed' if passed else 'FAILED'}: suggest is {ahead:+.4f} ahead of random, to exceed {spread:.4f}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
