"""Many small classifiers trained at once, for a few-shot grid.

Every weight gets a leading axis for the classifiers, and one step of the optimizer updates all of them. Each classifier
equals the one that `diptych fit uml-probe` trains with the same settings; tests/experiments/test_classifier_bank.py
checks it.

Shapes: M classifiers, B rows of a batch, N images, T texts, D width of the features, C classes.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from diptych.data.splits import Episode
from diptych.data.streams import shuffled
from diptych.rng import derive_seed
from diptych.train.checkpoint import Score, patience_is_over, select_best
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.optim import learning_rate, make_optimizer
from diptych.uml.data import IMAGE, TEXT, LabelledFeatures
from diptych.uml.objective import Init, SharedHead, SharedHeadConfig, uml_loss
from diptych.uml.training import start_head


@dataclass(frozen=True, slots=True, kw_only=True)
class BankMember:
    """One classifier to be trained."""

    episode: Episode
    """Images to learn from, and images to select the weights on."""
    text_rows: np.ndarray
    """Indices of the texts to learn from."""
    text_labels: np.ndarray
    """Class of each of those texts; for the control with unrelated texts another one than its own."""
    aux_weight: float
    """Weight of the texts' loss (lambda)."""
    init: Init
    seed: int
    """Decides the initial weights and the order of the batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedMember:
    """The result of one classifier of the bank."""

    score: Score
    """The validation at the selected step."""
    right_N: np.ndarray
    """Whether each test image is classified correctly with the selected weights."""


class ClassifierBank:
    """Classifiers that differ in data, seed, lambda and start, and share batch size, schedule and optimizer."""

    def __init__(
        self,
        members: Sequence[BankMember],
        images: LabelledFeatures,
        texts: LabelledFeatures,
        *,
        head: SharedHeadConfig,
        train: TrainConfig,
        optim: OptimConfig,
    ) -> None:
        assert optim.max_grad_norm is None, "the norm of a gradient would be that of all classifiers together"
        self.members, self.train, self.optim = members, train, optim
        self.images_ND, self.image_labels_N = images.tensors()
        self.texts_TD, _ = texts.tensors()
        heads = [self._start(member, head) for member in members]
        self.template = heads[0]
        stacked, self.buffers = stack_module_state(heads)
        self.weights = {name: nn.Parameter(weight.detach()) for name, weight in stacked.items()}
        self.aux_weight_M = torch.tensor([member.aux_weight for member in members])
        # The weights that decay are those of `Objective.parameter_groups`: W and the projections, [M C W] and [M W D]
        # here. The only others are the learned logit scales. They are scalars in one classifier and [M] here, so the
        # test for two axes or more separates both kinds in spite of the leading axis.
        decaying = [weight for weight in self.weights.values() if weight.ndim >= 2]
        scales = [weight for weight in self.weights.values() if weight.ndim < 2]
        groups = [{"params": decaying, "weight_decay": optim.weight_decay}, {"params": scales, "weight_decay": 0.0}]
        self.optimizer = make_optimizer([group for group in groups if group["params"]], optim)

    def _start(self, member: BankMember, head: SharedHeadConfig) -> SharedHead:
        texts = self.texts_TD[member.text_rows], torch.from_numpy(member.text_labels)
        return start_head(head, self.images_ND[member.episode.train], texts, init=member.init, seed=member.seed)

    def fit(self, test: np.ndarray, *, patience: int) -> list[TrainedMember]:
        """Train all classifiers and classify the images ``test`` with the selected weights of each.

        A classifier's selected weights are those of its best validation up to where ``patience`` in a row were no
        better. Training ends when that is so for all classifiers.
        """
        scores: list[list[Score]] = [[] for _ in self.members]
        kept = {name: weight.detach().clone() for name, weight in self.weights.items()}
        every = self.train.eval_every
        for begin in range(0, self.train.steps, every):
            end = min(begin + every, self.train.steps)
            self._steps(begin, end)
            for number, member in enumerate(self.members):
                score = self._validate(number, member, step=end)
                scores[number].append(score)
                if select_best(scores[number], patience=patience) == score:
                    for name, weight in self.weights.items():
                        kept[name][number] = weight.detach()[number]
            if all(patience_is_over(each, patience=patience) for each in scores):
                break
        self.kept = kept
        return [self._try(number, kept, scores[number], test, patience) for number in range(len(self.members))]

    def fit_whole(self, test: np.ndarray) -> list[np.ndarray]:
        """Train all classifiers for all steps; nothing is selected.

        Returns whether each of the images ``test`` is classified correctly, [N] for each classifier.
        """
        self._steps(0, self.train.steps)
        logits = [self._logits(number, self.weights, test) for number in range(len(self.members))]
        return [(logits_NC.argmax(1) == self.image_labels_N[test]).numpy() for logits_NC in logits]

    def head(self, number: int) -> SharedHead:
        """The selected classifier of a member, after :meth:`fit`."""
        head = copy.deepcopy(self.template)
        head.load_state_dict({name: value[number].detach() for name, value in {**self.kept, **self.buffers}.items()})
        return head

    def _steps(self, begin: int, end: int) -> None:
        """Do the updates from ``begin`` to ``end``. Each classifier gets the batches of its own data and seed."""
        image_rows, text_rows, text_labels = self._rows(begin, end)
        for step in range(begin, end):
            at = step - begin
            x_MBD, y_MB = self.images_ND[image_rows[at]], self.image_labels_N[image_rows[at]]
            t_MBD, c_MB = self.texts_TD[text_rows[at]], text_labels[at]
            losses_M = vmap(self._loss)(self.weights, self.buffers, self.aux_weight_M, x_MBD, y_MB, t_MBD, c_MB)
            losses_M.sum().backward()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, self.optim, steps=self.train.steps)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _rows(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of images and of texts, and the labels of the texts, each [steps, M, B].

        They are those that the streams of a run with the member's seed would give.
        """
        shape = (end - begin, self.train.batch_size)
        position = np.arange(begin * self.train.batch_size, end * self.train.batch_size, dtype=np.int64)
        images, texts, labels = [], [], []
        for member in self.members:
            item, _ = shuffled(position, len(member.episode.train), derive_seed(member.seed, IMAGE))
            images.append(member.episode.train[item].reshape(shape))
            item, _ = shuffled(position, len(member.text_rows), derive_seed(member.seed, TEXT))
            texts.append(member.text_rows[item].reshape(shape))
            labels.append(member.text_labels[item].reshape(shape))
        stacked = (torch.from_numpy(np.stack(each, axis=1)) for each in (images, texts, labels))
        return tuple(stacked)  # type: ignore[return-value]

    def _loss(self, weights, buffers, aux_weight, x_BD, y_B, t_BD, c_B) -> Tensor:
        """The loss of one classifier on images x of the classes y and texts t of the classes c."""

        def logits(features_BD: Tensor, modality: str) -> Tensor:
            return functional_call(self.template, (weights, buffers), (features_BD, modality))

        of_both = {IMAGE: logits(x_BD, IMAGE), TEXT: logits(t_BD, TEXT)}
        return uml_loss(of_both, {IMAGE: y_B, TEXT: c_B}, {IMAGE: 1.0, TEXT: aux_weight})[0]

    @torch.no_grad()
    def _logits(self, number: int, weights: Mapping[str, Tensor], rows: np.ndarray) -> Tensor:
        one = {name: value[number] for name, value in {**weights, **self.buffers}.items()}
        return functional_call(self.template, one, (self.images_ND[rows], IMAGE))

    def _validate(self, number: int, member: BankMember, *, step: int) -> Score:
        logits_NC, labels_N = self._logits(number, self.weights, member.episode.valid), self.image_labels_N
        wanted = labels_N[member.episode.valid]
        accuracy = float((logits_NC.argmax(1) == wanted).float().mean())
        return Score(step=step, value=accuracy, tie_break=-float(F.cross_entropy(logits_NC, wanted)))

    def _try(
        self, number: int, kept: Mapping[str, Tensor], scores: list[Score], test: np.ndarray, patience: int
    ) -> TrainedMember:
        score = select_best(scores, patience=patience)
        assert score is not None
        right = self._logits(number, kept, test).argmax(1) == self.image_labels_N[test]
        return TrainedMember(score=score, right_N=right.numpy())
