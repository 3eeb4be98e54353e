import kornia
import pytest
import torch

from diptych.data.augment import ViewConfig, _turn_hue, draw_view, make_view, weak_view
from diptych.rng import StepRNG

PLAIN = ViewConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(256, (64, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def view(pixels, config, *, size=24, seed=0) -> torch.Tensor:
    return make_view(pixels, draw_view(StepRNG(seed, 0), "view", len(pixels)), config, size=size)


def with_(**changes) -> ViewConfig:
    """The plain view and one change."""
    fields = {name: getattr(PLAIN, name) for name in ViewConfig.__slots__}
    return ViewConfig(**fields | changes)


def test_without_changes_a_view_is_the_image(pixels):
    torch.testing.assert_close(view(pixels, PLAIN), pixels.float() / 255)


def test_a_smaller_view_is_filtered(pixels):
    wanted = torch.nn.functional.interpolate(pixels.float() / 255, size=12, mode="bilinear", antialias=True)
    torch.testing.assert_close(view(pixels, PLAIN, size=12), wanted)


def test_crops_keep_the_share_they_are_told_and_lie_anywhere():
    """Seen on an image whose value is its column (red) and its row (green)."""
    ramp = torch.arange(200, dtype=torch.uint8)
    image = torch.stack([ramp.expand(200, 200), ramp[:, None].expand(200, 200), torch.zeros(200, 200).byte()])
    made = view(image.expand(256, 3, 200, 200), with_(scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)), size=20) * 255
    width, height = (made[:, c].amax((1, 2)) - made[:, c].amin((1, 2)) for c in (0, 1))
    area = (width * 20 / 19) * (height * 20 / 19) / 200**2
    assert 0.4 < area.min() < 0.55
    assert 0.9 < area.max() < 1.01
    assert (width / height).max() == pytest.approx(4 / 3, abs=0.08)
    assert made[:, 0].amin((1, 2)).max() > 40


def test_about_half_are_mirrored(pixels):
    made, plain = view(pixels, with_(flip=0.5)), view(pixels, PLAIN)
    mirrored = (made - plain.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    assert 20 < mirrored.sum() < 44
    torch.testing.assert_close(made[~mirrored], plain[~mirrored])


def test_grey_and_blur_touch_their_share(pixels):
    plain = view(pixels, PLAIN)
    grey = view(pixels, with_(grey=0.2))
    without_colour = (grey - grey.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert 5 < without_colour.sum() < 24
    torch.testing.assert_close(grey[~without_colour], plain[~without_colour])
    blurred = view(pixels, with_(blur=0.5, blur_sigma=(9.0, 10.0)))
    smoother = blurred.std((2, 3)).mean(1) < 0.8 * plain.std((2, 3)).mean(1)
    assert 20 < smoother.sum() < 44
    torch.testing.assert_close(blurred[~smoother], plain[~smoother])


def test_hue_turns_as_kornias():
    image, turn = torch.rand(8, 3, 6, 6), torch.linspace(-0.5, 0.5, 8)
    wanted = kornia.enhance.adjust_hue(image, turn * 2 * torch.pi)
    torch.testing.assert_close(_turn_hue(image, turn), wanted, rtol=0, atol=1e-5)


def test_every_strength_of_the_jitter_matters_and_values_stay_in_range(pixels):
    off = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    plain = view(pixels, PLAIN)
    torch.testing.assert_close(view(pixels, with_(jitter=1.0, **off)), plain, rtol=0, atol=1e-5)
    for name in off:
        made = view(pixels, with_(jitter=1.0, **off | {name: 0.4}))
        assert (made - plain).abs().mean() > 0.01, name
    made = view(pixels, ViewConfig())
    assert made.min() >= -1e-5
    assert made.max() <= 1 + 1e-5


def test_a_row_has_its_view_whatever_rows_are_beside_it(pixels):
    """Split over processes and cut into chunks, the same views."""
    whole = view(pixels, ViewConfig())
    for rank in (0, 1):
        half = pixels[rank * 32 : (rank + 1) * 32]
        drawn = draw_view(StepRNG(0, 0, rank, 2), "view", 32)
        parts = [make_view(half[rows], drawn[rows], ViewConfig(), size=24) for rows in (slice(0, 20), slice(20, 32))]
        torch.testing.assert_close(torch.cat(parts), whole[rank * 32 : (rank + 1) * 32], rtol=0, atol=1e-5)


def test_views_differ_by_name_and_step(pixels):
    one, other = draw_view(StepRNG(0, 0), "view0", 4), draw_view(StepRNG(0, 0), "view1", 4)
    assert not torch.equal(one, other)
    assert not torch.equal(one, draw_view(StepRNG(0, 1), "view0", 4))


def test_the_weak_view_changes_no_colour(pixels):
    flat = torch.full((8, 3, 24, 24), 77, dtype=torch.uint8)
    torch.testing.assert_close(view(flat, weak_view()), torch.full((8, 3, 24, 24), 77 / 255))
    assert not torch.allclose(view(pixels, weak_view()), pixels.float() / 255, atol=0.1)
