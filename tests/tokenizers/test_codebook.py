import pytest
import torch

from diptych.errors import UserError
from diptych.rng import StepRNG
from diptych.tokenizers.codebook import Codebook, CodebookConfig, k_means, sample_rows
from diptych.tokenizers.image_tokenizer import nearest_codes

K, E = 8, 2


def latents(seed: int = 0, rows: int = 4) -> torch.Tensor:
    """[rows, E, 4, 4]: four clear heaps."""
    generator = torch.Generator().manual_seed(seed)
    heaps = torch.tensor([[-3.0, -3], [-3, 3], [3, -3], [3, 3]])
    points = heaps[torch.randint(4, (rows * 16,), generator=generator)] + 0.1 * torch.randn(
        rows * 16, 2, generator=generator
    )
    return points.view(rows, 4, 4, 2).permute(0, 3, 1, 2)


def run(codebook: Codebook, codes: torch.Tensor, step: int, seed: int = 0, world: torch.Tensor | None = None):
    return codebook(latents(step) if world is None else world, codes, rng=StepRNG(seed, step), step=step)


def test_before_the_start_latents_pass_and_codes_rest():
    codes = torch.nn.Parameter(torch.zeros(K, E))
    quantised = run(Codebook(CodebookConfig(start=0.5), codebook_size=K, steps=10), codes, step=4)
    assert torch.equal(quantised.latents_BEhw, latents(4))
    assert quantised.codebook == quantised.commitment == 0
    assert not codes.any()


def test_the_start_seeds_the_codes_from_the_latents():
    codes = torch.nn.Parameter(torch.zeros(K, E))
    quantised = run(Codebook(CodebookConfig(start=0.5), codebook_size=K, steps=10), codes, step=5)
    assert quantised.commitment < 0.05
    assert quantised.perplexity > 3.5
    kept = torch.nn.Parameter(torch.ones(K, E))
    run(Codebook(CodebookConfig(start=-1), codebook_size=K, steps=10), kept, step=0)
    assert (kept == 1).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 60, 2000])
def test_a_training_of_any_length_quantizes(steps):
    """A fixed step would lie beyond the end of one that was shortened by hand."""
    codebook = Codebook(CodebookConfig(start=0.175, reset_until=0.7), codebook_size=K, steps=steps)
    assert codebook.start < steps
    assert codebook.start == min(round(0.175 * steps), steps - 1)


@pytest.mark.parametrize("given", [{"start": 350}, {"reset_until": 1400}, {"start": -0.5}])
def test_a_number_of_steps_is_no_share(given):
    with pytest.raises(UserError, match=r"is a share of the steps, from 0 to 1"):
        Codebook(CodebookConfig(**given), codebook_size=K, steps=2000)


def test_output_is_the_nearest_code_and_the_gradient_goes_straight_through():
    codes = torch.nn.Parameter(torch.randn(K, E, generator=torch.Generator().manual_seed(1)))
    z = latents().requires_grad_()
    quantised = run(Codebook(CodebookConfig(start=-1), codebook_size=K, steps=10), codes, step=0, world=z)
    flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
    expected = codes[nearest_codes(flat, codes.detach())].view(4, 4, 4, E).permute(0, 3, 1, 2)
    torch.testing.assert_close(quantised.latents_BEhw, expected, atol=1e-6, rtol=0)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (quantised.latents_BEhw * weights).sum().backward()
    assert torch.equal(z.grad, weights)
    assert codes.grad is None


def test_each_of_the_two_losses_moves_one_side():
    codes = torch.nn.Parameter(torch.randn(K, E, generator=torch.Generator().manual_seed(1)))
    z = latents().requires_grad_()
    quantised = run(Codebook(CodebookConfig(start=-1), codebook_size=K, steps=10), codes, step=0, world=z)
    assert torch.autograd.grad(quantised.codebook, (z, codes), allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(quantised.commitment, (z, codes), allow_unused=True)[1] is None
    torch.testing.assert_close(quantised.codebook, quantised.commitment)


def test_dead_codes_are_reseeded_and_live_ones_are_not():
    config = CodebookConfig(start=-1, reset_every=4, usage_decay=0.3)
    codebook = Codebook(config, codebook_size=K, steps=10)
    codes = torch.nn.Parameter(torch.full((K, E), 100.0))
    with torch.no_grad():
        codes[:2] = torch.tensor([[-3.0, 0], [3, 0]])  # these two share everything
    for step in range(5):
        assert torch.equal(codes[2:], torch.full((K - 2, E), 100.0))
        run(codebook, codes, step)
    assert codes[2:].abs().max() < 4  # the six that lay far from everything have moved among the latents
    assert torch.equal(codes[:2], torch.tensor([[-3.0, 0], [3, 0]]))
    assert run(codebook, codes, 5).perplexity > 2


def test_resets_end_and_evaluation_changes_nothing():
    codes = torch.nn.Parameter(torch.full((K, E), 100.0))
    codebook = Codebook(
        CodebookConfig(start=-1, reset_every=1, reset_until=0.3, usage_decay=0.0), codebook_size=K, steps=10
    )
    usage = codebook.usage_K.clone()
    codebook.eval()
    run(codebook, codes, 2)
    assert torch.equal(codebook.usage_K, usage)
    codebook.train()
    for step in range(3, 9):
        run(codebook, codes, step)
    assert (codes == 100).all()
    assert not torch.equal(codebook.usage_K, usage)


def test_resets_depend_on_the_draws_only_and_resume_exactly():
    def trained(steps: range, codebook: Codebook, codes: torch.nn.Parameter, seed: int = 0) -> torch.Tensor:
        for step in steps:
            run(codebook, codes, step, seed)
        return codes.detach().clone()

    config = CodebookConfig(start=0, reset_every=2, usage_decay=0.5)
    whole = trained(range(9), Codebook(config, codebook_size=K, steps=10), torch.nn.Parameter(torch.zeros(K, E)))
    first = Codebook(config, codebook_size=K, steps=10)
    half = trained(range(5), first, torch.nn.Parameter(torch.zeros(K, E)))
    second = Codebook(config, codebook_size=K, steps=10)
    second.load_state_dict(first.state_dict())
    torch.rand(3)  # the global generator has no say
    assert torch.equal(trained(range(5, 9), second, torch.nn.Parameter(half)), whole)
    other = trained(
        range(9), Codebook(config, codebook_size=K, steps=10), torch.nn.Parameter(torch.zeros(K, E)), seed=1
    )
    assert not torch.equal(other, whole)


def test_k_means_finds_heaps_and_samples_do_not_repeat_needlessly():
    points = latents(rows=8).permute(0, 2, 3, 1).flatten(0, 2)
    centres = k_means(points, 16, 10, torch.Generator().manual_seed(0))
    distance = torch.cdist(points, centres).amin(1)
    assert distance.mean() < 0.1
    assert centres.isfinite().all()
    rows = torch.arange(6.0)[:, None]
    drawn = sample_rows(rows, 6, torch.Generator().manual_seed(0)).flatten()
    assert sorted(drawn.tolist()) == [0, 1, 2, 3, 4, 5]
    assert len(sample_rows(rows, 15, torch.Generator().manual_seed(0))) == 15
