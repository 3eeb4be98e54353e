"""The few-shot grid: supervised UML beside its controls, for several numbers of labelled images and several seeds.

    few_shot                       train the grid; settings are chosen on validation images, never on test images
    regression                     logistic regression on the same features, a further control
    gain, spread, table            what the results say: gains with standard errors, means over seeds
    show, accuracy_figure, as_json print it, plot it, store it

The published tables compare UML with a baseline of fewer parameters, and an independent reproduction found no gain over
lambda = 0. Every result here is therefore shown beside all ``CONTROLS``, whose classifiers have the same parameters.
Controls with texts try several values of lambda, those without have none to try; so the controls with unrelated texts
tell how much the additional tries alone bring.

Shapes: N images, T texts.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from diptych.data.class_texts import Shots, choose_texts, permuted
from diptych.data.splits import Episode
from diptych.eval.probe import fit_linear, select_linear
from diptych.experiments.classifier_bank import BankMember, ClassifierBank, TrainedMember
from diptych.report.figures import Panel, curves
from diptych.train.config import OptimConfig, TrainConfig
from diptych.uml.data import IMAGE, TEXT, LabelledFeatures
from diptych.uml.objective import Init, SharedHeadConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A way to train the classifier."""

    texts: Literal["none", "own", "permuted"]
    """Texts to learn from: none sets lambda to 0; permuted gives every class the texts of another class."""
    init: Init


CONTROLS: dict[str, Control] = {
    "image only": Control(texts="none", init="random"),
    "init only": Control(texts="none", init="anchor"),
    "unrelated text": Control(texts="permuted", init="random"),
    "unrelated init": Control(texts="permuted", init="anchor"),
    "UML": Control(texts="own", init="random"),
    "UML init": Control(texts="own", init="anchor"),
}
REGRESSION = "logistic regression"
"""The control of :func:`regression`, which no classifier of the grid should be below."""
COMPARISONS = (
    ("UML", "image only"),
    ("UML init", "image only"),
    ("UML", "unrelated text"),
    ("UML init", "unrelated init"),
    ("UML init", "init only"),
    ("unrelated text", "image only"),
    ("unrelated init", "image only"),
    ("image only", REGRESSION),
    ("UML", REGRESSION),
    ("UML init", REGRESSION),
)
"""The pairs of controls to report the gain of, the first over the second."""


@dataclass(kw_only=True, slots=True)
class FewShotConfig:
    """The grid. Its defaults are smaller than the paper's grid, which trains 60 settings for 12,800 steps each."""

    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of labelled images of each class to learn from."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the repetitions; each decides texts, initial weights and the order of batches."""
    text_shots: Shots = "all"
    """Texts of each class to learn from: a number of random ones, `all`, or `mean`, the mean of all their features,
    which the caller computes."""
    lrs: tuple[float, ...] = (1e-3,)
    """Learning rates to choose from."""
    weight_decays: tuple[float, ...] = (0.01,)
    """Weight decays to choose from."""
    batch_sizes: tuple[int, ...] = (32,)
    """Batch sizes to choose from, in examples of each modality."""
    aux_weights: tuple[float, ...] = (0.3, 1.0)
    """Weights of the texts' loss (lambda) to choose from, for the controls that learn from texts."""
    steps: int = 1000
    """Number of optimizer updates of every classifier."""
    eval_every: int = 50
    """Number of steps from one validation to the next."""
    patience: int = 10
    """Number of validations in a row without a better one after which no later weights are selected."""
    after_selection: Literal["keep", "refit"] = "keep"
    """What follows the selection on validation images: `refit` also trains each classifier anew, with the selected
    settings and number of steps, over which the learning rate falls, on the images to learn from and those to select on
    together."""
    head: SharedHeadConfig = field(default_factory=SharedHeadConfig)
    """Architecture of the classifier; widths and classes follow from the features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShotResult:
    """The classifier that validation chose for one control, number of shots and seed."""

    control: str
    shots: int
    seed: int
    accuracy: float
    """Share of the test images that are classified correctly."""
    valid_accuracy: float
    """Share of the validation images that are classified correctly."""
    chosen: dict[str, Any]
    """The chosen settings, and the selected step."""
    refit_accuracy: float | None = None
    """Share of the test images that are classified correctly after the refit, if one was asked for."""


def few_shot(
    images: LabelledFeatures,
    texts: LabelledFeatures,
    episodes: Mapping[tuple[int, int], Episode],
    test: np.ndarray,
    config: FewShotConfig,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> list[FewShotResult]:
    """Train every control for every number of shots and seed.

    Args:
        images: Features of all images.
        texts: Features of all texts about the classes.
        episodes: Which images to learn from and to select on, for each (shots, seed).
        test: Which images to test on; they decide nothing.
        config: The grid.
        say: Told a line of progress after each number of shots.
    """
    classes = int(images.labels_N.max()) + 1
    widths = {IMAGE: images.vectors_ND.shape[1], TEXT: texts.vectors_ND.shape[1]}
    head = replace(config.head, widths=widths, classes=classes, anchor=TEXT)
    results: list[FewShotResult] = []
    for shots in config.shots:
        tried: dict[tuple[str, int], list[tuple[dict[str, Any], TrainedMember]]] = {}
        for lr, decay, rows in product(config.lrs, config.weight_decays, config.batch_sizes):
            train, optim = _settings(config, lr=lr, weight_decay=decay, batch_size=rows)
            names, members = _members(config, shots, episodes, texts, classes=classes)
            bank = ClassifierBank(members, images, texts, head=head, train=train, optim=optim)
            trained = bank.fit(test, patience=config.patience)
            for (name, seed), member, found in zip(names, members, trained, strict=True):
                chosen = {"lr": lr, "weight_decay": decay, "batch_size": rows, "aux_weight": member.aux_weight}
                tried.setdefault((name, seed), []).append((chosen, found))
        selected = [_choose(name, shots, seed, found) for (name, seed), found in tried.items()]
        if config.after_selection == "refit":
            selected = _refit(selected, images, texts, episodes, test, config, head=head)
        results += selected
        say(f"{shots} shots: {sum(len(each) for each in tried.values())} classifiers trained")
    return results


def _settings(
    config: FewShotConfig, *, lr: float, weight_decay: float, batch_size: int
) -> tuple[TrainConfig, OptimConfig]:
    train = TrainConfig(steps=config.steps, batch_size=batch_size, eval_every=config.eval_every)
    warmup = min(50, config.steps // 10)
    optim = OptimConfig(
        lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay, max_grad_norm=None, warmup_steps=warmup, final_lr=0.01
    )
    return train, optim


def _members(
    config: FewShotConfig,
    shots: int,
    episodes: Mapping[tuple[int, int], Episode],
    texts: LabelledFeatures,
    *,
    classes: int,
) -> tuple[list[tuple[str, int]], list[BankMember]]:
    """A classifier to be trained for each control, seed and lambda; before them the (control, seed) of each."""
    names, members = [], []
    for seed in config.seeds:
        for name, control in CONTROLS.items():
            for weight in (0.0,) if control.texts == "none" else config.aux_weights:
                names.append((name, seed))
                episode = episodes[shots, seed]
                members.append(_member(config, name, seed, texts, classes=classes, episode=episode, aux_weight=weight))
    return names, members


def _member(
    config: FewShotConfig,
    name: str,
    seed: int,
    texts: LabelledFeatures,
    *,
    classes: int,
    episode: Episode,
    aux_weight: float,
) -> BankMember:
    """The classifier of one control."""
    count, control = config.text_shots, CONTROLS[name]
    every = np.arange(len(texts.labels_N))
    rows = choose_texts(texts.labels_N, count, seed=seed) if isinstance(count, int) else every
    own = texts.labels_N[rows]
    labels = permuted(classes, seed=seed)[own] if control.texts == "permuted" else own
    return BankMember(
        episode=episode,
        text_rows=rows,
        text_labels=labels,
        aux_weight=aux_weight,
        init=control.init,
        seed=seed,
    )


def _refit(
    results: Sequence[FewShotResult],
    images: LabelledFeatures,
    texts: LabelledFeatures,
    episodes: Mapping[tuple[int, int], Episode],
    test: np.ndarray,
    config: FewShotConfig,
    *,
    head: SharedHeadConfig,
) -> list[FewShotResult]:
    """The results with the accuracy of classifiers that also learned from the images to select on.

    The learning rate falls over the selected number of steps. On the schedule of all steps it would still be high where
    an early one was selected.
    """
    groups: dict[tuple[float, float, int, int], list[FewShotResult]] = {}
    for each in results:
        chosen = each.chosen
        same = chosen["lr"], chosen["weight_decay"], chosen["batch_size"], chosen["step"]
        groups.setdefault(same, []).append(each)
    found = []
    for (lr, decay, rows, steps), group in groups.items():
        train, optim = _settings(replace(config, steps=steps), lr=lr, weight_decay=decay, batch_size=rows)
        members = [
            _member(
                config,
                each.control,
                each.seed,
                texts,
                classes=head.classes,
                episode=_both(episodes[each.shots, each.seed]),
                aux_weight=each.chosen["aux_weight"],
            )
            for each in group
        ]
        bank = ClassifierBank(members, images, texts, head=head, train=train, optim=optim)
        rights = bank.fit_whole(test)
        found += [
            replace(each, refit_accuracy=float(right_N.mean())) for each, right_N in zip(group, rights, strict=True)
        ]
    return found


def _both(episode: Episode) -> Episode:
    """An episode that learns from all its images."""
    return Episode(train=np.sort(np.concatenate([episode.train, episode.valid])), valid=episode.valid)


def regression(
    images: LabelledFeatures, episodes: Mapping[tuple[int, int], Episode], test: np.ndarray, config: FewShotConfig
) -> list[FewShotResult]:
    """Multinomial logistic regression on the features of the images, as a further control of the grid.

    It learns from the images that the classifiers learn from. Its l2 penalty is chosen on the images that they are
    selected on; with a refit it is then fitted to both.
    """
    x_ND, labels_N = images.tensors()
    classes, found = int(labels_N.max()) + 1, []
    for shots in config.shots:
        for seed in config.seeds:
            train, valid, every = episodes[shots, seed].train, episodes[shots, seed].valid, _both(episodes[shots, seed])
            selected = select_linear(
                x_ND[train], labels_N[train], validation=(x_ND[valid], labels_N[valid]), classes=classes
            )
            refit = None
            if config.after_selection == "refit":
                both = fit_linear(x_ND[every.train], labels_N[every.train], classes=classes, l2=selected.l2)
                refit = both.accuracy(x_ND[test], labels_N[test])
            found.append(
                FewShotResult(
                    control=REGRESSION,
                    shots=shots,
                    seed=seed,
                    accuracy=selected.linear.accuracy(x_ND[test], labels_N[test]),
                    valid_accuracy=selected.validation_accuracy,
                    chosen={"l2": selected.l2},
                    refit_accuracy=refit,
                )
            )
    return found


def after_refit(results: Sequence[FewShotResult]) -> list[FewShotResult]:
    """The same results with the accuracy after the refit as their accuracy; none where nothing was refitted."""
    return [replace(each, accuracy=each.refit_accuracy) for each in results if each.refit_accuracy is not None]


def _choose(name: str, shots: int, seed: int, tried: Sequence[tuple[dict[str, Any], TrainedMember]]) -> FewShotResult:
    """The result with the settings of the best validation, the first of equals."""
    chosen, found = tried[0]
    for settings, other in tried[1:]:
        if other.score.beats(found.score):
            chosen, found = settings, other
    return FewShotResult(
        control=name,
        shots=shots,
        seed=seed,
        accuracy=float(found.right_N.mean()),
        valid_accuracy=found.score.value,
        chosen=chosen | {"step": found.score.step},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """The mean difference of two controls' accuracies, paired by seed and shots, and the mean's standard error."""

    better: str
    worse: str
    mean: float
    error: float
    pairs: int

    @property
    def is_real(self) -> bool:
        """Whether the mean is more than two standard errors from zero, to either side."""
        return abs(self.mean) > 2 * self.error

    def __str__(self) -> str:
        points, error = f"{100 * self.mean:+.2f}", f"{100 * self.error:.2f}"
        direction = "a gain" if self.mean > 0 else "a loss"
        verdict = f"{direction} beyond the noise" if self.is_real else "within the noise"
        return f"{self.better} against {self.worse}: {points} ± {error} points over {self.pairs} pairs, {verdict}"


def gain(results: Sequence[FewShotResult], better: str, worse: str, *, shots: int | None = None) -> Gain:
    """The gain of one control over another, for one number of shots or over all of them."""
    chosen = [each for each in results if shots is None or each.shots == shots]
    ours = {(each.shots, each.seed): each.accuracy for each in chosen if each.control == better}
    theirs = {(each.shots, each.seed): each.accuracy for each in chosen if each.control == worse}
    differences = [ours[key] - theirs[key] for key in sorted(ours.keys() & theirs.keys())]
    assert len(differences) > 1, "one pair has no standard error"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Gain(better=better, worse=worse, mean=statistics.mean(differences), error=error, pairs=len(differences))


def spread(results: Sequence[FewShotResult], control: str, shots: int) -> tuple[float, float]:
    """Mean and standard deviation of the accuracy over the seeds; NaN is the deviation of a single seed."""
    found = [each.accuracy for each in results if (each.control, each.shots) == (control, shots)]
    return statistics.mean(found), statistics.stdev(found) if len(found) > 1 else math.nan


def table(results: Sequence[FewShotResult]) -> list[list[str]]:
    """A row for each control: mean and standard deviation in per cent for each number of shots, then the mean."""
    every = sorted({each.shots for each in results})
    rows = [["", *(f"{shots} shot{'s' * (shots > 1)}" for shots in every), "mean"]]
    for control in controls_of(results):
        cells = [spread(results, control, shots) for shots in every]
        mean = statistics.mean(mean for mean, _ in cells)
        rows.append([control, *(f"{100 * m:.2f} ± {100 * sd:.2f}" for m, sd in cells), f"{100 * mean:.2f}"])
    return rows


def controls_of(results: Sequence[FewShotResult]) -> list[str]:
    """All controls of the grid, and logistic regression if it is among the results."""
    return [*CONTROLS, *({REGRESSION} & {each.control for each in results})]


def _comparisons(results: Sequence[FewShotResult]) -> list[tuple[str, str]]:
    return [(better, worse) for better, worse in COMPARISONS if worse in controls_of(results)]


def show(results: Sequence[FewShotResult], *, title: str) -> None:
    """Print the table of all controls, and a sentence for the gain of each comparison."""
    from rich.console import Console
    from rich.table import Table

    head, *rows = table(results)
    print(f"{title}: test accuracy, %, mean ± standard deviation over seeds")
    shown = Table(*head)
    for row in rows:
        shown.add_row(*row)
    Console(width=120).print(shown)
    for better, worse in _comparisons(results):
        print(gain(results, better, worse))


def accuracy_figure(results: Sequence[FewShotResult], *, title: str) -> bytes:
    """An SVG figure of the mean accuracy against the number of shots, with a line for each control."""
    every = sorted({each.shots for each in results})
    runs = {
        control: [{"shots": shots, "accuracy": 100 * spread(results, control, shots)[0]} for shots in every]
        for control in controls_of(results)
    }
    return curves(runs, panels=[Panel(title=title, keys=["accuracy"], label="test accuracy, %")], over="shots")[0]


def as_json(results: Sequence[FewShotResult]) -> dict[str, Any]:
    """All results, and all gains for each number of shots and over all of them, as JSON values."""
    every = sorted({each.shots for each in results})
    gains = []
    for better, worse in _comparisons(results):
        gains.append(asdict(gain(results, better, worse)) | {"shots": "all"})
        gains += [asdict(gain(results, better, worse, shots=shots)) | {"shots": shots} for shots in every]
    return {"outcomes": [asdict(each) for each in results], "gains": gains}
