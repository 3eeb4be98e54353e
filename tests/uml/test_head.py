import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from diptych.errors import UserError
from diptych.io import load_network
from diptych.uml.head import SharedHead, SharedHeadConfig

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
