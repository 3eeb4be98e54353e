import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diptych.data.augment import ViewConfig
from diptych.data.batch import Batch, LabelledImageExamples, LabelledVectorExamples
from diptych.encoders import ImageEncoder
from diptych.nn.inference import eval_mode
from diptych.rng import StepRNG
from diptych.train.objective import Objective
from diptych.uml.head import SharedHead, SharedHeadConfig
from diptych.uml.objective import UmlConfig, UmlObjective, uml_loss

WIDTHS = {"image": 6, "text": 4}


def objective(*, weight=0.5, widths=WIDTHS, encoder=None, view=None, **head):
    torch.manual_seed(0)
    made = SharedHead(SharedHeadConfig(widths=widths, classes=3, features="raw", projection="random", **head))
    return UmlObjective(made, UmlConfig(aux_weight=weight), target="image", encoder=encoder, view=view)


def vectors(rows, width):
    return LabelledVectorExamples(vectors_BD=torch.randn(rows, width), labels_B=torch.randint(3, (rows,)))


def batch(**streams) -> Batch:
    torch.manual_seed(1)
    if not streams:
        streams = {"image": vectors(5, 6), "text": vectors(8, 4)}
    return Batch(rng=StepRNG(0, 0), streams=streams)


def test_it_is_an_objective_with_a_stream_for_each_modality():
    assert isinstance(objective(), Objective)
    assert objective().streams == {"image": 1, "text": 1}


def test_it_equals_a_naive_loop():
    learner, rows = objective(), batch()
    losses = {"image": [], "text": []}
    for name, items in rows.streams.items():
        for vector, label in zip(items.vectors_BD, items.labels_B, strict=True):
            if name == "image":
                vector = learner.head.projections["image"].weight @ vector
            logits = 16.0 * (learner.head.head.weight @ vector)
            losses[name].append(torch.logsumexp(logits, 0) - logits[label])
    image, text = (torch.stack(losses[name]).mean() for name in ("image", "text"))
    found = learner(rows, 0)
    torch.testing.assert_close(found.total, image + 0.5 * text)
    torch.testing.assert_close(found.terms["text"], text)


def test_a_value_by_hand():
    logits = {"image": torch.tensor([[0.0, math.log(3)]]), "text": torch.zeros(1, 2)}
    labels = {"image": torch.tensor([1]), "text": torch.tensor([0])}
    total, terms = uml_loss(logits, labels, {"image": 1.0, "text": 2.0})
    assert terms["image"].item() == pytest.approx(math.log(4 / 3))
    assert total.item() == pytest.approx(math.log(4 / 3) + 2 * math.log(2))


def test_three_modalities_are_the_same_sum():
    learner = objective(widths={**WIDTHS, "audio": 5})
    streams = {"image": vectors(2, 6), "text": vectors(3, 4), "audio": vectors(4, 5)}
    found = learner(batch(**streams), 0)
    expected = found.terms["image"] + 0.5 * found.terms["text"] + 0.5 * found.terms["audio"]
    torch.testing.assert_close(found.total, expected)


def test_lambda_zero_is_the_image_alone_and_draws_no_text():
    rows = batch()
    both = objective(weight=0.0)
    assert both.streams == {"image": 1}
    alone = F.cross_entropy(both.head(rows.streams["image"].vectors_BD, "image"), rows.streams["image"].labels_B)
    torch.testing.assert_close(both(rows, 0).total, alone)


def test_the_shared_classifier_learns_from_both_and_the_projection_from_images():
    rows = batch()

    def gradients(weight, streams):
        learner = objective(weight=weight)
        learner(batch(**{name: rows.streams[name] for name in streams}), 0).total.backward()
        return learner.head.head.weight.grad, learner.head.projections["image"].weight.grad

    both, projected = gradients(0.5, ("image", "text"))
    image, alone = gradients(0.0, ("image",))
    assert (both - image).norm() > 1e-3  # from texts
    assert image.norm() > 1e-3  # from images
    torch.testing.assert_close(projected, alone)  # texts reach it not at all


class Encoder(ImageEncoder):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(12, 6)

    def forward(self, pixels):
        return self.linear(self.dropout(pixels.flatten(1).float() / 255))


def images(rows=4):
    pixels = torch.randint(0, 256, (rows, 3, 2, 2), dtype=torch.uint8)
    return LabelledImageExamples(pixels_B3HW=pixels, labels_B=torch.randint(3, (rows,)))


def test_the_encoder_learns_from_images_only():
    rows = {"image": images(), "text": vectors(4, 4)}
    found = {}
    for weight in (0.0, 5.0):
        torch.manual_seed(0)
        encoder = Encoder().eval()
        learner = objective(weight=weight, encoder=encoder)
        learner(batch(**rows), 0).total.backward()
        found[weight] = encoder.linear.weight.grad
    assert found[0.0].norm() > 0
    torch.testing.assert_close(found[0.0], found[5.0])


def test_validation_does_not_leave_evaluation_mode_behind():
    learner = objective(encoder=Encoder()).train()
    rows = batch(image=images(), text=vectors(4, 4))
    with eval_mode(learner):
        assert not learner.encoder.dropout.training
        assert learner(rows, 0).total == learner(rows, 0).total
    assert learner.encoder.dropout.training
    assert learner(rows, 0).total != learner(rows, 0).total


def test_views_of_the_images_follow_from_the_step():
    learner = objective(encoder=Encoder().eval(), view=ViewConfig(jitter=0.0, grey=0.0, blur=0.0))
    items = {"image": images(), "text": vectors(4, 4)}
    first, second = (Batch(rng=StepRNG(0, step), streams=items) for step in (0, 1))
    assert learner(first, 0).total == learner(first, 0).total
    assert learner(first, 0).total != learner(second, 1).total


def test_one_batch_can_be_over_fitted():
    learner, rows = objective(), batch(image=vectors(4, 6), text=vectors(3, 4))
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    for step in range(200):
        found = learner(rows, step)
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
    assert found.total < 0.05
    assert found.measures["image/accuracy"] == 1
