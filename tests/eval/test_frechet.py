"""Frechet distance against scipy and closed forms, and the feature extractors."""

import hashlib
import json
import math
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch.nn import functional as F

from diptych.errors import UserError
from diptych.eval.frechet import (
    FID_WEIGHTS,
    FeatureStatistics,
    HubExtractor,
    RandomFeatures,
    TorchScriptExtractor,
    feature_statistics,
    frechet_distance,
    metric_name,
    open_extractor,
)

# The distance


def draw(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + seed


def of(features: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(features.shape[1]).add(features)


def test_statistics_equal_numpy():
    features = draw(50, 7, 1)
    statistics = of(features)
    np.testing.assert_allclose(statistics.mean_D, features.numpy().mean(0), atol=1e-12)
    np.testing.assert_allclose(statistics.covariance_DD, np.cov(features.numpy().T), atol=1e-12)


def test_streaming_and_merging_change_nothing():
    features = draw(101, 5, 2)
    whole = of(features)
    batched = FeatureStatistics(5)
    for batch in features.split(13):
        batched.add(batch)
    merged = of(features[:3]).merge(FeatureStatistics(5)).merge(of(features[3:]))
    for other in (batched, merged):
        assert other.count == whole.count == 101
        torch.testing.assert_close(other.mean_D, whole.mean_D)
        torch.testing.assert_close(other.covariance_DD, whole.covariance_DD)


def test_a_far_away_mean_costs_no_digits():
    """E[x^2] - E[x]^2 would lose everything here."""
    features = draw(60, 3, 3)
    near, far = of(features), of(features + 1e7)
    torch.testing.assert_close(far.covariance_DD, near.covariance_DD, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [1, 4, 40])
def test_equals_scipy(width):
    a, b = draw(300, width, 4), draw(200, width, 5)
    covariance_a, covariance_b = (np.cov(x.numpy().T).reshape(width, width) for x in (a, b))
    root = sqrtm(covariance_a @ covariance_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(covariance_a + covariance_b - 2 * root)
    distance = frechet_distance(of(a), of(b))
    assert float(distance) == pytest.approx(expected, rel=1e-9)
    assert distance.mean_term + distance.covariance_term == distance.value
    assert float(frechet_distance(of(b), of(a))) == pytest.approx(expected, rel=1e-9)


def test_closed_form_of_diagonal_gaussians():
    """Covariances that commute: sum of squared differences of the deviations."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    a, b = corners * torch.tensor([1.0, 2.0]), corners * torch.tensor([4.0, 3.0]) + torch.tensor([0.0, 5.0])
    unit = math.sqrt(4 / 3)  # the unbiased deviation of (1, 1, -1, -1)
    distance = frechet_distance(of(a), of(b))
    assert distance.mean_term == pytest.approx(25)
    assert distance.covariance_term == pytest.approx((3 * unit) ** 2 + (1 * unit) ** 2)


def test_identical_sets_with_singular_covariance_are_at_zero():
    """Fewer images than features. The usual route through sqrtm of the product is off by 1e-6 or complex here."""
    features = draw(10, 50, 6)
    distance = frechet_distance(of(features), of(features.flip(0)))
    assert float(distance) == pytest.approx(0, abs=1e-9)
    assert "only 10 images for 50 features" in distance.warning


def test_enough_images_need_no_warning():
    assert frechet_distance(of(draw(9, 8, 7)), of(draw(9, 8, 8))).warning is None


def test_misuse_is_explained():
    good, one = of(draw(9, 3, 9)), of(draw(1, 3, 9))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        frechet_distance(good, one)
    with pytest.raises(UserError, match="at least 2 images, got 0"):
        frechet_distance(good, FeatureStatistics(3))
    with pytest.raises(UserError, match="widths 3 and 4"):
        frechet_distance(good, of(draw(9, 4, 9)))
    with pytest.raises(UserError, match="width 4"):
        good.merge(FeatureStatistics(4))
    with pytest.raises(UserError, match="width 4"):
        good.add(torch.zeros(2, 4))
    with pytest.raises(UserError, match="NaN"):
        good.add(torch.full((2, 3), torch.nan))


# Feature extractors


def images(count: int = 64, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Coloured blobs with an edge and some texture: smooth noise, cut, with a little fine noise."""
    generator = torch.Generator().manual_seed(seed)
    blobs = F.interpolate(torch.randn(count, 3, 4, 4, generator=generator), (size, size), mode="bicubic")
    edges = torch.sign(blobs[:, :1]) * 0.4
    fine = torch.randn(count, 3, size, size, generator=generator) * 0.1
    return (110 + 45 * (blobs + edges + fine)).clamp(0, 255).to(torch.uint8)


def blur(pixels, strength):
    weight = torch.exp(-(torch.arange(-4, 5) ** 2) / (2 * strength**2))
    weight = torch.outer(weight, weight) / weight.sum() ** 2
    padded = F.pad(pixels.float(), (4, 4, 4, 4), mode="reflect")
    return F.conv2d(padded, weight.expand(3, 1, 9, 9), groups=3).round().to(torch.uint8)


def noise(pixels, strength):
    rng = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
    return (pixels + strength * rng).round().clamp(0, 255).to(torch.uint8)


def shift_colour(pixels, strength):
    return (pixels + strength * torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)).clamp(0, 255).to(torch.uint8)


def collapse(pixels, kept):
    return pixels[torch.arange(len(pixels)) % kept]


def test_feature_statistics_walks_through_all_images():
    class Means:
        name = "means"

        def __call__(self, pixels_BCHW):
            return pixels_BCHW.float().mean((2, 3))

    pixels = torch.randint(0, 256, (10, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    statistics = feature_statistics(Means(), pixels, batch_size=3)
    assert statistics.count == 10
    torch.testing.assert_close(statistics.mean_D, pixels.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="No images"):
        feature_statistics(Means(), pixels[:0])


@pytest.mark.parametrize(
    ("corrupt", "strengths"),
    [(blur, (0.5, 1, 2)), (noise, (5, 15, 40)), (shift_colour, (5, 20, 60)), (collapse, (48, 16, 4))],
)
def test_distance_rises_with_the_corruption(corrupt, strengths):
    extractor, pixels = RandomFeatures(), images()
    real = feature_statistics(extractor, pixels)
    distances = [float(frechet_distance(real, feature_statistics(extractor, corrupt(pixels, s)))) for s in strengths]
    same = float(frechet_distance(real, feature_statistics(extractor, pixels.flip(0))))
    assert same == pytest.approx(0, abs=1e-8)
    assert distances == sorted(distances)
    assert distances[0] > 0.001
    assert distances[-1] > 2 * distances[0]


def test_random_features_are_fixed_by_the_seed_and_leave_the_global_generator_alone():
    pixels = images(4)
    state = torch.get_rng_state()
    first, second, other = RandomFeatures(), RandomFeatures(), RandomFeatures(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(pixels), second(pixels))
    assert not torch.equal(first(pixels), other(pixels))
    assert first(pixels).shape == (4, 304)
    assert first.name != other.name


def test_random_features_of_one_image_do_not_depend_on_the_batch():
    extractor, pixels = RandomFeatures(), images(6, size=50)
    torch.testing.assert_close(extractor(pixels)[2:3], extractor(pixels[2:3]), rtol=1e-4, atol=1e-4)


@pytest.fixture
def vit_folder(tmp_path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    settings |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_hub_extractor_equals_the_model_on_normalised_pixels(vit_folder, monkeypatch):
    from transformers import ViTModel

    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    pixels = images(3, size=8)
    features = HubExtractor(vit_folder)(pixels)
    inputs = (pixels / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1)
    expected = ViTModel.from_pretrained(vit_folder).eval()(pixel_values=inputs).pooler_output
    torch.testing.assert_close(features, expected.detach(), rtol=1e-4, atol=1e-5)
    assert HubExtractor(vit_folder)(images(2, size=20)).shape == (2, 16)  # resized to the model's 8 pixels


def test_hub_extractor_explains_what_is_missing(vit_folder, tmp_path):
    (vit_folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no input size"):
        HubExtractor(vit_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded as a vision model"):
        HubExtractor(tmp_path / "empty")


class Means(torch.nn.Module):
    def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = pixels.float().mean((2, 3))
        return means if return_features else means[:, :1]


def test_torchscript_extractor(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # writing such files is discouraged; reading them is the point
        torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    pixels = images(3)
    torch.testing.assert_close(TorchScriptExtractor(tmp_path / "means.pt")(pixels), pixels.float().mean((2, 3)))
    (tmp_path / "broken.pt").write_bytes(b"not a model")
    with pytest.raises(UserError, match="is not a TorchScript file"):
        TorchScriptExtractor(tmp_path / "broken.pt")
    with pytest.raises(UserError, match="is not a file"):
        TorchScriptExtractor(tmp_path / "absent.pt")


# FID


def test_the_distance_is_that_of_pytorch_fid_and_clean_fid():
    """Both compute |m - m|^2 + tr(S) + tr(S) - 2 tr(sqrtm(S S)) with numpy's covariance, on 32-bit features."""
    a, b = (draw(300, 40, seed).float() for seed in (1, 2))
    means, covariances = [x.double().numpy().mean(0) for x in (a, b)], [np.cov(x.double().numpy().T) for x in (a, b)]
    difference = means[0] - means[1]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(of(a), of(b)).value == pytest.approx(expected, abs=1e-3)


def scripted(path) -> str:
    class Means(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Means()).save(str(path))
    return str(path)


def test_only_the_weights_of_fids_inception_are_called_fid(tmp_path, monkeypatch):
    path = scripted(tmp_path / "inception-2015-12-05.pt")
    assert metric_name(open_extractor(path)) == "frechet/inception-2015-12-05.pt"
    assert metric_name(RandomFeatures()) == "frechet/random-conv-0"
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    monkeypatch.setitem(FID_WEIGHTS, digest, "this file")
    assert metric_name(open_extractor(path)) == "fid"


@pytest.fixture
def pytorch_fid(monkeypatch):
    """A package with the names that are used of pytorch_fid; fetching weights fails the test."""
    inception = types.ModuleType("pytorch_fid.inception")

    def fetch(*_, **__):
        raise AssertionError("weights were fetched")

    class InceptionV3(torch.nn.Module):
        DEFAULT_BLOCK_INDEX = 3

        def __init__(self, blocks):
            super().__init__()
            assert blocks == [3]
            self.scale = torch.nn.Linear(1, 1, bias=False)
            self.scale.load_state_dict(inception.load_state_dict_from_url("https://weights", progress=True))

        def forward(self, x):
            return [self.scale(x.mean((2, 3))[..., None])[..., None]]

    inception.InceptionV3, inception.load_state_dict_from_url = InceptionV3, fetch
    package = types.ModuleType("pytorch_fid")
    package.inception = inception
    monkeypatch.setitem(sys.modules, "pytorch_fid", package)
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", inception)
    return inception


def test_weights_of_pytorch_fid_are_read_from_the_file_and_never_fetched(tmp_path, pytorch_fid):
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.tensor([[2.0]])}, path)
    fetch = pytorch_fid.load_state_dict_from_url
    extractor = open_extractor(str(path))
    assert pytorch_fid.load_state_dict_from_url is fetch
    features = extractor(torch.full((2, 3, 8, 8), 51, dtype=torch.uint8))
    torch.testing.assert_close(features, torch.full((2, 3), 0.4))
    assert metric_name(extractor) == "frechet/weights.pth"
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"weights\.pth: not the weights of pytorch-fid's Inception"):
        open_extractor(str(path))


def test_weights_of_pytorch_fid_without_the_package_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'diptych\[fid\]'"):
        open_extractor(str(tmp_path / "weights.pth"))
