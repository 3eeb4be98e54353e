import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diptych.data.augment import ViewConfig
from diptych.data.batch import Batch, LabelledImageExamples, LabelledVectorExamples
from diptych.encoders import ImageEncoder
from diptych.errors import UserError
from diptych.io import load_network
from diptych.nn.inference import eval_mode
from diptych.rng import StepRNG
from diptych.train.objective import Objective
from diptych.uml.objective import SharedHead, SharedHeadConfig, UmlConfig, UmlObjective, uml_loss

CONFIG = SharedHeadConfig(
    widths={"image": 6, "text": 4, "audio": 5}, classes=3, features="raw", projection="random", logit_scale=2.0
)


def head(**changes) -> SharedHead:
    torch.manual_seed(0)
    return SharedHead(replace(CONFIG, **changes))


def test_one_classifier_serves_all_modalities():
    one = head()
    image, text = torch.randn(2, 6), torch.randn(2, 4)
    torch.testing.assert_close(one(text, "text"), 2 * text @ one.head.weight.T)
    projected = image @ one.projections["image"].weight.T
    torch.testing.assert_close(one(image, "image"), 2 * projected @ one.head.weight.T)
    assert set(one.projections) == {"image", "audio"}  # the anchor needs none
    assert [name for name, _ in one.named_parameters() if "bias" in name] == []


def test_the_logit_scale_of_each_modality_is_learned_if_wanted():
    one, text = head(learn_scale=True), torch.randn(2, 4)
    assert set(one.log_scales) == {"image", "text", "audio"}
    torch.testing.assert_close(one(text, "text"), head()(text, "text"))
    one.log_scales["text"].data += math.log(3)
    torch.testing.assert_close(one(text, "text"), 3 * head()(text, "text"))


@pytest.mark.parametrize("features", ["raw", "unit", "centred", "standard"])
def test_features_are_prepared_as_asked(features):
    one, text = head(features=features), torch.randn(8, 4) + 3
    one.fit_statistics(text, "text")
    away, spread = text - text.mean(0), text.std(0, correction=0)
    expected = {"raw": text, "unit": F.normalize(text, dim=1), "centred": F.normalize(away, dim=1)}
    expected["standard"] = F.normalize(away / spread, dim=1)
    torch.testing.assert_close(one.prepared(text, "text"), expected[features])


def test_a_constant_feature_does_not_blow_up():
    one = head(features="standard")
    one.fit_statistics(torch.cat([torch.randn(8, 3), torch.full((8, 1), 5.0)], 1), "text")
    assert one.prepared(torch.tensor([[0.0, 0.0, 0.0, 5.1]]), "text").abs().max() <= 1
    assert one.spread_text[3] == 1


def means_of(texts, labels):
    return F.normalize(torch.stack([F.normalize(texts, dim=1)[labels == label].mean(0) for label in range(3)]), dim=1)


def test_the_text_start_is_the_mean_text_at_length_one_in_a_shared_space():
    one = head(widths={"image": 4, "text": 4}, features="unit", projection="identity")
    texts, labels = torch.randn(7, 4), torch.tensor([0, 0, 1, 1, 1, 2, 2])
    one.init_from_anchor(texts, labels)
    torch.testing.assert_close(one.head.weight.detach(), means_of(texts, labels))


def test_the_text_start_keeps_likeness_and_evens_out_the_rates():
    """Two classes at 18 degrees, with eigenvalues 1.95 and 0.05 of W W^T: afterwards 1.73 : 0.27 at lengths of one."""
    one = head(features="unit", classes=2)
    texts = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.95, 0.3122499, 0.0, 0.0]])
    one.init_from_anchor(texts, torch.arange(2))
    found = one.head.weight.detach() @ one.head.weight.detach().T
    roots = torch.tensor([1.95, 0.05]).sqrt()
    cosine = (roots[0] - roots[1]) / roots.sum()
    torch.testing.assert_close(found, torch.tensor([[1.0, cosine], [cosine, 1.0]]))


def test_with_towers_of_one_space_it_begins_as_a_zero_shot_classifier():
    one = head(widths={"image": 4, "text": 4}, features="unit", projection="identity", logit_scale=1.0)
    texts, images = torch.randn(3, 4), torch.randn(5, 4)
    one.init_from_anchor(texts, torch.arange(3))
    torch.testing.assert_close(one(images, "image"), F.cosine_similarity(images[:, None], texts[None], dim=-1))


def test_random_rows_are_orthogonal_and_as_long_as_text_rows():
    wide = SharedHead(SharedHeadConfig(widths={"image": 256, "text": 256}, classes=200, projection="random"))
    weight_CW = wide.head.weight.detach()
    torch.testing.assert_close(weight_CW @ weight_CW.T, torch.eye(200), atol=1e-5, rtol=0)
    unit = F.normalize(torch.randn(200, 256), dim=1)
    assert wide.project(unit, "image").norm(dim=1).mean().item() == pytest.approx(1, abs=0.05)


def test_more_classes_than_the_width_have_orthogonal_columns():
    weight_CW = SharedHead(SharedHeadConfig(widths={"text": 16}, classes=40)).head.weight.detach()
    torch.testing.assert_close(weight_CW.T @ weight_CW, 40 / 16 * torch.eye(16), atol=1e-5, rtol=0)
    assert weight_CW.norm(dim=1).square().mean().item() == pytest.approx(1)


def test_a_projection_that_begins_at_zero_adds_no_noise_and_learns():
    one, image = head(projection="zero"), torch.randn(2, 6)
    logits = one(image, "image")
    assert not logits.any()
    logits[:, 0].sum().backward()
    assert one.projections["image"].weight.grad.norm() > 0


def test_it_comes_back_from_its_folder(tmp_path):
    one = head(features="centred", learn_scale=True)
    one.fit_statistics(torch.randn(4, 6), "image")
    one.save_pretrained(tmp_path)
    again, image = load_network(SharedHead, tmp_path), torch.randn(2, 6)
    assert again.config == one.config
    assert torch.equal(again(image, "image"), one(image, "image"))
    assert (tmp_path / "model.safetensors").is_file()


def test_mistakes_are_told():
    with pytest.raises(UserError, match="image features are 6 wide, the anchor's 4"):
        head(projection="identity")
    with pytest.raises(UserError, match="'smell', which is none of the modalities image, text, audio"):
        head(anchor="smell")


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
