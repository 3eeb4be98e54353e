"""The few-shot protocol: every control, number of shots and seed, its settings chosen on validation images.

Shapes: N images, T texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from diptych.data.class_texts import Shots, choose_texts, permuted
from diptych.data.labelled import Episode
from diptych.eval.controls import CONTROLS, Outcome
from diptych.models.shared_head import SharedHeadConfig
from diptych.recipes.uml import IMAGE, TEXT
from diptych.recipes.uml_bank import Bank, Member, Trained
from diptych.recipes.uml_sides import Features
from diptych.train.config import OptimConfig, TrainConfig


@dataclass(kw_only=True, slots=True)
class FewShotConfig:
    """The grid. Its defaults are smaller than the paper's, which wants 12,800 steps of each of 60 settings."""

    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Labelled images of each class."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Draws of images, texts and weights."""
    text_shots: Shots = "all"
    """Texts of each class: a number of random ones, all, or one that is the mean of all."""
    lrs: tuple[float, ...] = (1e-2, 1e-3)
    """Learning rates to choose from."""
    weight_decays: tuple[float, ...] = (0.01,)
    """Weight decays to choose from."""
    batch_sizes: tuple[int, ...] = (32,)
    """Batch sizes to choose from."""
    others_weights: tuple[float, ...] = (0.3, 1.0)
    """Lambdas to choose from, wherever texts are learnt from."""
    steps: int = 1000
    """Updates of every classifier."""
    eval_every: int = 50
    """Steps between validations."""
    patience: int = 10
    """Validations without a better one after which later weights are not taken."""
    head: SharedHeadConfig = field(default_factory=SharedHeadConfig)
    """The classifier."""


def few_shot(
    images: Features,
    texts: Features,
    episodes: Mapping[tuple[int, int], Episode],
    test: np.ndarray,
    config: FewShotConfig,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """All controls on all episodes, keyed by (shots, seed). ``test`` never decides anything."""
    classes = int(images.labels_N.max()) + 1
    widths = {IMAGE: images.vectors_ND.shape[1], TEXT: texts.vectors_ND.shape[1]}
    head = replace(config.head, widths=widths, classes=classes, anchor=TEXT)
    outcomes = []
    for shots in config.shots:
        tried: dict[tuple[str, int], list[tuple[dict, Trained]]] = {}
        for lr, decay, rows in product(config.lrs, config.weight_decays, config.batch_sizes):
            train, optim = _settings(config, lr=lr, weight_decay=decay, batch_size=rows)
            names, members = _members(config, shots, episodes, texts, classes=classes)
            bank = Bank(members, images, texts, head=head, train=train, optim=optim)
            for (name, seed), member, found in zip(
                names, members, bank.fit(test, patience=config.patience), strict=True
            ):
                chosen = {"lr": lr, "weight_decay": decay, "batch_size": rows, "others_weight": member.others_weight}
                tried.setdefault((name, seed), []).append((chosen, found))
        outcomes += [_choose(name, shots, seed, found) for (name, seed), found in tried.items()]
        say(f"{shots} shots: {sum(len(each) for each in tried.values())} classifiers trained")
    return outcomes


def _settings(config: FewShotConfig, *, lr: float, weight_decay: float, batch_size: int):
    train = TrainConfig(steps=config.steps, batch_size=batch_size, eval_every=config.eval_every)
    warmup = min(50, config.steps // 10)
    optim = OptimConfig(
        lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay, clip=None, warmup_steps=warmup, final_lr=0.01
    )  # fmt: skip
    return train, optim


def _members(
    config: FewShotConfig, shots: int, episodes: Mapping[tuple[int, int], Episode], texts: Features, *, classes: int
) -> tuple[list[tuple[str, int]], list[Member]]:
    """A classifier for each control, seed and lambda, and the (control, seed) of each."""
    names, members = [], []
    for seed in config.seeds:
        count = config.text_shots
        rows = (
            choose_texts(texts.labels_N, count, seed=seed) if isinstance(count, int) else np.arange(len(texts.labels_N))
        )
        own = texts.labels_N[rows]
        labels = {"none": own, "own": own, "permuted": permuted(classes, seed=seed)[own]}
        for name, control in CONTROLS.items():
            for weight in (0.0,) if control.texts == "none" else config.others_weights:
                names.append((name, seed))
                members.append(Member(
                    episode=episodes[shots, seed], text_rows=rows, text_labels=labels[control.texts],
                    others_weight=weight, init=control.init, seed=seed,
                ))  # fmt: skip
    return names, members


def _choose(name: str, shots: int, seed: int, tried: Sequence[tuple[dict, Trained]]) -> Outcome:
    """The settings of the best validation; of equals the first."""
    chosen, found = tried[0]
    for settings, other in tried[1:]:
        if other.score.beats(found.score):
            chosen, found = settings, other
    return Outcome(
        control=name, shots=shots, seed=seed, accuracy=float(found.right_N.mean()),
        valid_accuracy=found.score.accuracy, chosen=chosen | {"step": found.score.step},
    )  # fmt: skip
