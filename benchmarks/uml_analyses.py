"""What a gain from unpaired texts consists of: texts that replace an image, robustness, and how classes lie apart.

    python benchmarks/uml_analyses.py --data caltech101.tar --meta meta.json --encoder E --text-encoder T --json FILE

It has the options of uml_fewshot.py, in the same folder, and some of its own. The exchange rate is that of a plane
fitted to the test accuracies of UML with lambda 1 on a grid of image shots and text shots. At the largest number of
shots, every control is measured: margin and silhouette of the test images in the shared space, and accuracy on
corrupted test images. Learning rates are chosen on validation images. It fails when a number is not finite, and not for
a null result. It takes two minutes of one CPU core.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor
from uml_fewshot import Options as Setting
from uml_fewshot import drawn, published

from diptych.data.class_texts import choose_texts, permuted
from diptych.data.pixels import SkippedItems
from diptych.encoders import open_image_encoder, open_text_encoder
from diptych.experiments.analyses import accuracies, class_margin, corrupted, fit_exchange, silhouette
from diptych.experiments.classifier_bank import BankMember, ClassifierBank, TrainedMember
from diptych.experiments.few_shot import CONTROLS
from diptych.nn.inference import eval_mode
from diptych.rng import derive_seed
from diptych.run_folder import write_json
from diptych.train.config import OptimConfig, TrainConfig
from diptych.uml.data import IMAGE, TEXT, class_text_features, labelled_image_features
from diptych.uml.objective import SharedHead


@dataclass(kw_only=True)
class Options(Setting):
    text_counts: tuple[int, ...] = (1, 2, 4, 8, 16, 30)
    """Numbers of texts of each class, for the exchange rate."""
    severities: tuple[int, ...] = (1, 3, 5)
    """Severities of the corruptions, from 1 to 5."""
    shifted: int = 300
    """Number of test images that are corrupted."""


class Lab:
    """The features of a task, and classifiers trained on them."""

    def __init__(self, options: Options) -> None:
        self.options, self.task = options, published(options) if options.meta else drawn(options)
        self.encoder = open_image_encoder(options.encoder)
        every = np.arange(len(self.task.labelled.labels_N))
        skipped = SkippedItems(max_skipped_share=0.0)
        self.images = labelled_image_features(
            self.encoder, self.task.labelled, every, cache=options.cache, skipped=skipped, workers=2
        )
        encoder = open_text_encoder(options.text_encoder)
        self.texts = class_text_features(encoder, self.task.texts, shots="all", cache=options.cache, seed=0)
        self.classes = len(self.task.labelled.classes)

    def member(self, *, shots: int, seed: int, texts: int | None = None, control: str = "UML") -> BankMember:
        """A classifier of so many images and texts of each class; None is all texts."""
        labels_T, wanted = self.texts.labels_N, CONTROLS[control]
        rows = np.arange(len(labels_T)) if texts is None else choose_texts(labels_T, texts, seed=seed)
        other = permuted(self.classes, seed=seed)
        return BankMember(
            episode=self.task.episodes[shots, seed],
            text_rows=rows,
            text_labels=other[labels_T[rows]] if wanted.texts == "permuted" else labels_T[rows],
            aux_weight=0.0 if wanted.texts == "none" else 1.0,
            init=wanted.init,
            seed=seed,
        )

    def train(self, members: Sequence[BankMember]) -> list[tuple[TrainedMember, SharedHead]]:
        """Each with the learning rate that is best on its validation images."""
        grid, best = self.options.grid, []
        widths = {IMAGE: self.images.vectors_ND.shape[1], TEXT: self.texts.vectors_ND.shape[1]}
        head = replace(grid.head, widths=widths, classes=self.classes, anchor=TEXT)
        if self.options.encoder == self.options.text_encoder:  # two towers of one model: their spaces are one
            head = replace(head, projection="identity")
        train = TrainConfig(steps=grid.steps, batch_size=grid.batch_sizes[0], eval_every=grid.eval_every)
        for lr in grid.lrs:
            optim = OptimConfig(
                lr=lr,
                betas=(0.9, 0.999),
                weight_decay=grid.weight_decays[0],
                max_grad_norm=None,
                warmup_steps=50,
                final_lr=0.01,
            )
            bank = ClassifierBank(members, self.images, self.texts, head=head, train=train, optim=optim)
            found = [(one, bank.head(n)) for n, one in enumerate(bank.fit(self.task.test, patience=grid.patience))]
            best = [new if not best or new[0].score.beats(best[n][0].score) else best[n] for n, new in enumerate(found)]
        return best


def exchange(lab: Lab) -> dict[str, Any]:
    """The plane over image shots and text shots, in shots and in their logarithms."""
    grid = lab.options.grid
    places = list(product(grid.shots, lab.options.text_counts, grid.seeds))
    members = [lab.member(shots=shots, texts=texts, seed=seed) for shots, texts, seed in places]
    accuracy_P = np.array([trained.right_N.mean() for trained, _ in lab.train(members)])
    images_P, texts_P = (np.array([place[axis] for place in places], float) for axis in (0, 1))
    print("accuracy by image shots (down) and text shots (across), mean over seeds")
    print("      " + "".join(f"{count:>8}" for count in lab.options.text_counts))
    for shots in grid.shots:
        cells = [accuracy_P[(images_P == shots) & (texts_P == count)].mean() for count in lab.options.text_counts]
        print(f"{shots:6}" + "".join(f"{cell:8.1%}" for cell in cells))
    planes = {scale: fit_exchange(images_P, texts_P, accuracy_P, scale=scale) for scale in ("linear", "log2")}
    for scale, plane in planes.items():
        print(f"{scale} plane, R squared {plane.explained:.2f}: {plane}")
    words = np.mean([len(text.split()) for of_class in lab.task.texts for text in of_class])
    if math.isfinite(planes["linear"].high):
        print(f"a text has {words:.1f} words: {planes['linear'].ratio * words:.0f} words per image")
    return {scale: asdict(plane) for scale, plane in planes.items()} | {"words_per_text": float(words)}


def geometry(lab: Lab, heads: dict[str, list[SharedHead]]) -> dict[str, dict[str, list[float]]]:
    """Margin and silhouette of the test images, as the encoder sees them and as each classifier does."""
    x_ND, y_N = (part[lab.task.test] for part in lab.images.tensors())
    spaces: dict[str, list[Tensor]] = {"encoder": [x_ND]}
    with torch.no_grad():
        spaces |= {name: [h.project(h.prepared(x_ND, IMAGE), IMAGE) for h in of] for name, of in heads.items()}
    found = {}
    print(f"{'test images in the space of':30}{'margin':>18}{'silhouette':>18}")
    for name, features in spaces.items():
        found[name] = {
            "margin": [class_margin(each, y_N) for each in features],
            "silhouette": [silhouette(each, y_N) for each in features],
        }
        print(f"{name:30}" + "".join(f"{np.mean(v):10.3f} +- {np.std(v):.3f}" for v in found[name].values()))
    return found


def robustness(lab: Lab, heads: dict[str, list[SharedHead]]) -> dict[str, dict[str, list[float]]]:
    """Accuracy of every classifier on clean and on corrupted test images."""
    every = [head for of in heads.values() for head in of]
    rng = np.random.default_rng(derive_seed(0, "shifted"))
    items = rng.permutation(lab.task.test)[: lab.options.shifted]

    def classify(pixels_B3HW: Tensor) -> Tensor:
        with eval_mode(lab.encoder):
            features_BD = lab.encoder(pixels_B3HW)
            return torch.stack([head(features_BD, IMAGE).argmax(1) for head in every])

    tests = {"clean": lab.task.labelled} | corrupted(lab.task.labelled, severities=lab.options.severities)
    accuracy = accuracies(classify, tests, size=lab.encoder.image_size, items=items)
    seeds = len(lab.options.grid.seeds)
    split = {test: np.asarray(values).reshape(-1, seeds) for test, values in accuracy.items()}
    print(f"accuracy, mean over {seeds} seeds, on {len(items)} images" + "".join(f"{name:>17}" for name in heads))
    for test, values in split.items():
        print(f"{test:44}" + "".join(f"{mean:17.1%}" for mean in values.mean(1)))
    worse = np.mean([values for test, values in split.items() if test != "clean"], axis=0)
    print(f"{'mean over corruptions':44}" + "".join(f"{mean:17.1%}" for mean in worse.mean(1)))
    for name in ("UML", "UML init"):
        gains = worse[list(heads).index(name)] - worse[list(heads).index("image only")]
        error = gains.std(ddof=1) / seeds**0.5
        verdict = "beyond" if abs(gains.mean()) > 2 * error else "within"
        print(f"corrupted images, {name} against image only: {gains.mean():+.1%} +- {error:.1%}, {verdict} the noise")
    return {test: dict(zip(heads, values.tolist(), strict=True)) for test, values in split.items()}


def main(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    lab = Lab(options)
    found: dict[str, Any] = {"exchange": exchange(lab)}
    most, seeds = max(options.grid.shots), options.grid.seeds
    members = [lab.member(shots=most, seed=seed, control=name) for name in CONTROLS for seed in seeds]
    trained = [head for _, head in lab.train(members)]
    heads = {name: trained[n * len(seeds) : (n + 1) * len(seeds)] for n, name in enumerate(CONTROLS)}
    found |= {"geometry": geometry(lab, heads), "robustness": robustness(lab, heads)}
    write_json(options.json, found)
    good = all(math.isfinite(value) for value in numbers([found["geometry"], found["robustness"]]))
    print(f"verdict: {'every analysis has its numbers' if good else 'some numbers are not finite'}")
    sys.exit(not good)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in numbers(part)]
    return [value]


if __name__ == "__main__":
    main(tyro.cli(Options))
