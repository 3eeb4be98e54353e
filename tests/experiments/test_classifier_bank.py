from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.data.splits import draw_episode
from diptych.data.streams import BatchSampler
from diptych.experiments.classifier_bank import BankMember, ClassifierBank
from diptych.nn.inference import eval_mode
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.loop import train
from diptych.uml.data import LabelledFeatures
from diptych.uml.objective import SharedHeadConfig, UmlConfig, UmlObjective
from diptych.uml.training import IMAGE, TEXT, start_head

CLASSES = 3
HEAD = SharedHeadConfig(widths={IMAGE: 6, TEXT: 4}, classes=CLASSES)
TRAIN = TrainConfig(
    steps=25,
    batch_size=8,
    eval_every=5,
    checkpoint_every=25,
    workers=0,
    precision="fp32",
    quiet=True,
    device="cpu",
    tensorboard=False,
)
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=None, warmup_steps=3)


def clusters(rows: int, width: int, seed: int) -> LabelledFeatures:
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % CLASSES
    centres = generator.normal(size=(CLASSES, width))
    return LabelledFeatures(
        vectors_ND=(centres[labels] + 0.7 * generator.normal(size=(rows, width))).astype(np.float32), labels_N=labels
    )


@pytest.fixture
def images():
    return clusters(60, 6, seed=0)


@pytest.fixture
def texts():
    return clusters(12, 4, seed=1)


def member(images, texts, **changes):
    settings = {
        "episode": draw_episode(images.labels_N, 2, seed=1),
        "text_rows": np.arange(12),
        "text_labels": texts.labels_N,
        "aux_weight": 0.7,
        "init": "random",
        "seed": 3,
        **changes,
    }
    return BankMember(**settings)


def by_the_loop(one, images, texts, tmp_path, *, learn_scale):
    """The same classifier trained by `train`."""
    config = SharedHeadConfig(widths=HEAD.widths, classes=CLASSES, learn_scale=learn_scale)
    of_images = LabelledFeatures(
        vectors_ND=images.vectors_ND[one.episode.train], labels_N=images.labels_N[one.episode.train]
    )
    of_texts = LabelledFeatures(vectors_ND=texts.vectors_ND[one.text_rows], labels_N=one.text_labels)
    head = start_head(config, of_images.tensors()[0], of_texts.tensors(), init=one.init, seed=one.seed)
    objective = UmlObjective(head, UmlConfig(aux_weight=one.aux_weight), target=IMAGE)
    streams = {IMAGE: of_images.stream(), TEXT: of_texts.stream()}
    batches = BatchSampler(streams, multiples=objective.streams, batch_size=8, seed=one.seed)
    train(objective, batches, out=tmp_path, train=TRAIN, optim=OPTIM)
    return objective


@pytest.mark.parametrize("learn_scale", [False, True])
def test_each_classifier_is_the_one_of_the_plain_loop(images, texts, tmp_path, learn_scale):
    members = [
        member(images, texts),
        member(images, texts, seed=4, init="anchor", text_rows=np.arange(6), text_labels=texts.labels_N[:6]),
        member(images, texts, seed=5, aux_weight=0.0, episode=draw_episode(images.labels_N, 1, seed=2)),
    ]
    config = SharedHeadConfig(widths=HEAD.widths, classes=CLASSES, learn_scale=learn_scale)
    bank = ClassifierBank(members, images, texts, head=config, train=TRAIN, optim=OPTIM)
    test = np.arange(40, 60)
    bank.fit(test, patience=10)
    for number, one in enumerate(members):
        objective = by_the_loop(one, images, texts, tmp_path / str(number), learn_scale=learn_scale)
        for name, weight in objective.head.named_parameters():
            found = bank.weights[name][number].detach()
            torch.testing.assert_close(found, weight.detach(), rtol=1e-4, atol=1e-5, msg=f"{number} {name}")


def test_what_is_tried_are_the_selected_weights(images, texts):
    wild = replace(OPTIM, lr=1.0)  # too large to converge, so the last weights are not the best
    test = np.arange(40, 60)
    bank = ClassifierBank([member(images, texts)], images, texts, head=HEAD, train=TRAIN, optim=wild)
    (found,) = bank.fit(test, patience=10)
    assert found.score.step < TRAIN.steps
    again = ClassifierBank([member(images, texts)], images, texts, head=HEAD, train=TRAIN, optim=wild)
    again._steps(0, found.score.step)
    logits = again._logits(0, again.weights, test)
    assert np.array_equal(found.right_N, (logits.argmax(1) == torch.from_numpy(images.labels_N[test])).numpy())
    torch.testing.assert_close(bank.head(0)(images.tensors()[0][test], "image"), logits)


def test_with_lambda_zero_texts_change_nothing(images, texts):
    other = LabelledFeatures(vectors_ND=texts.vectors_ND * -3 + 1, labels_N=texts.labels_N)
    found = []
    for side in (texts, other):
        bank = ClassifierBank([member(images, side, aux_weight=0.0)], images, side, head=HEAD, train=TRAIN, optim=OPTIM)
        bank.fit(np.arange(40, 60), patience=10)
        found.append(bank.weights["head.weight"].detach())
    assert torch.equal(*found)


def test_a_clip_over_all_classifiers_is_refused(images, texts):
    with pytest.raises(AssertionError, match="all classifiers together"):
        ClassifierBank([member(images, texts)], images, texts, head=HEAD, train=TRAIN, optim=OptimConfig())


def test_validation_does_not_move_the_weights(images, texts):
    bank = ClassifierBank([member(images, texts)], images, texts, head=HEAD, train=TRAIN, optim=OPTIM)
    before = bank.weights["head.weight"].detach().clone()
    with eval_mode(bank.template):
        bank._validate(0, bank.members[0], step=1)
    assert torch.equal(before, bank.weights["head.weight"].detach())
