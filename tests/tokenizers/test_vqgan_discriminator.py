import torch

from diptych.tokenizers.vqgan import PatchDiscriminator


def pictures(rows: int = 2) -> torch.Tensor:
    return torch.rand(rows, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_field_of_view_is_what_the_docstring_says():
    for layers, sees in ((1, 16), (2, 34)):
        discriminator = PatchDiscriminator(width=4, layers=layers).double()
        for module in discriminator.modules():
            if isinstance(module, torch.nn.GroupNorm):  # sees everything, on purpose; not a patch's business
                module.forward = lambda x: x
        picture = torch.rand(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
        verdicts = discriminator(picture)
        middle = verdicts.shape[-1] // 2
        verdicts[0, 0, middle, middle].backward()
        touched = picture.grad[0].abs().sum(0).amax(1).nonzero()
        assert touched.max() - touched.min() + 1 == sees


def test_a_verdict_does_not_depend_on_the_other_pictures():
    discriminator = PatchDiscriminator(width=8, layers=2)
    together, alone = discriminator(pictures()), discriminator(pictures()[:1])
    assert together.shape == (2, 1, 6, 6)
    torch.testing.assert_close(together[:1], alone)


def test_no_weight_is_left_uninitialised_and_no_buffers():
    discriminator = PatchDiscriminator(width=8, layers=2)
    assert not list(discriminator.buffers())
    for name, weight in discriminator.named_parameters():
        if weight.ndim == 4:
            assert 0.01 < weight.std() < 0.03, name
        else:
            assert set(weight.unique().tolist()) <= {0.0, 1.0}, name
