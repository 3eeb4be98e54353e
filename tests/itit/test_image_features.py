import pytest
import torch

from diptych.itit.image_features import ImageFeatures, mean_of_text
from diptych.rng import StepRNG

WIDTH, FEATURES, TEXT = 6, 5, 3


def of(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(name)))


@pytest.fixture
def related():
    """Image features that follow from their texts by a matrix and a constant, and a little noise."""
    text_XF, matrix_FG = of("text", 240, TEXT), of("matrix", TEXT, FEATURES)
    return text_XF @ matrix_FG + 2.0 + 0.05 * of("noise!", 240, FEATURES), text_XF


@pytest.fixture
def features(related) -> ImageFeatures:
    torch.manual_seed(0)
    made = ImageFeatures(width=WIDTH, features=FEATURES, text_features=TEXT)
    made.fit(*related)
    return made


def guess(features: ImageFeatures, text_XF: torch.Tensor, *, noise: float, step: int = 0) -> torch.Tensor:
    valid_BL = torch.ones(len(text_XF), 1, dtype=torch.bool)
    return features.of_texts(text_XF[:, None], valid_BL, noise=noise, rng=StepRNG(0, step))


def test_a_text_gives_the_features_of_its_image(features, related):
    image_XG, text_XF = related
    error = (guess(features, text_XF, noise=0.0) - image_XG).square().mean()
    assert error < 0.02 * image_XG.var()


def test_noise_adds_the_residuals_of_other_pairs(features, related):
    text_XF = related[1]
    plain, noisy = guess(features, text_XF, noise=0.0), guess(features, text_XF, noise=1.0)
    assert torch.equal(guess(features, text_XF, noise=1.0), noisy)
    assert not torch.equal(guess(features, text_XF, noise=1.0, step=1), noisy)
    residuals_XG = related[0] - plain
    assert (noisy - plain).std().item() == pytest.approx(residuals_XG.std().item(), rel=0.2)


def test_unrelated_texts_are_given_the_mean_image(related):
    """The penalty is chosen on pairs held out, so what the fitted pairs have by chance is not learned."""
    made = ImageFeatures(width=WIDTH, features=FEATURES, text_features=TEXT)
    other_XF = of("another text", 240, TEXT)
    made.fit(related[0], other_XF)
    spread = guess(made, other_XF, noise=0.0).std(0).mean()
    assert spread < 0.2 * related[0].std(0).mean()


def test_the_decoder_reads_features_of_one_scale(features, related):
    image_XG = related[0]
    scaled = ImageFeatures(width=WIDTH, features=FEATURES, text_features=TEXT)
    scaled.projection.load_state_dict(features.projection.state_dict())
    scaled.fit(1000 * image_XG, related[1])
    assert features(image_XG).shape == (240, 1, WIDTH)
    torch.testing.assert_close(scaled(1000 * image_XG), features(image_XG), rtol=1e-4, atol=1e-4)


def test_a_feature_that_never_varies_does_no_harm(related):
    image_XG, text_XF = related
    constant_XG = torch.cat([image_XG[:, :-1], torch.full((240, 1), 3.0)], dim=1)
    made = ImageFeatures(width=WIDTH, features=FEATURES, text_features=TEXT)
    made.fit(constant_XG, text_XF)
    assert made(constant_XG).isfinite().all()


def test_one_pair_is_enough_to_be_fitted():
    made = ImageFeatures(width=WIDTH, features=FEATURES, text_features=TEXT)
    made.fit(of("image", 1, FEATURES), of("text", 1, TEXT))
    assert made(of("image", 1, FEATURES)).isfinite().all()


def test_the_mean_of_a_text_leaves_padding_out():
    text_BLF = torch.tensor([[[1.0], [3.0], [0.0]], [[5.0], [0.0], [0.0]]])
    valid_BL = text_BLF[..., 0] > 0
    assert mean_of_text(text_BLF, valid_BL).flatten().tolist() == [2.0, 5.0]


def test_a_caption_agrees_with_its_own_image(features, related):
    image_XG, text_XF = related[0][:20], related[1][:20]
    valid_XL = torch.ones(20, 1, dtype=torch.bool)
    own = features.agreement(image_XG, text_XF[:, None], valid_XL)
    others = features.agreement(image_XG.roll(1, 0), text_XF[:, None], valid_XL)
    assert own.min() > 0.9
    assert own.mean() > others.mean() + 0.5
