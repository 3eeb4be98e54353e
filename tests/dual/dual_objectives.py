"""The objectives on pairs, small and in fp32, and a batch for them; also run by torchrun:

dual_objectives.py OUT: every process writes the losses and gradients that it has after averaging.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from diptych.data.augment import ViewConfig
from diptych.data.batch import Batch, CaptionedImageExamples
from diptych.dual.ito import FusionConfig, ItoConfig
from diptych.dual.model import DualEncoder, DualEncoderConfig, train_clip_tokenizer
from diptych.dual.objective import ClipConfig, PairsConfig, SlipConfig
from diptych.rng import StepRNG

ROWS = 8
CONFIG = DualEncoderConfig(
    image_size=16, patch=8, image_width=24, image_depth=2, max_text_len=12, text_width=16, text_depth=2, width=16
)
WORDS = ["red", "blue", "dog", "child", "grass", "runs", "over", "two"]


def encoder() -> DualEncoder:
    tokenizer = train_clip_tokenizer([" ".join(WORDS)] * 3, vocab_size=600, length=12)
    return DualEncoder.from_config(CONFIG, tokenizer, seed=0)


CONFIGS: dict[str, Callable[..., PairsConfig]] = {
    "clip": ClipConfig,
    "clip-views": partial(ClipConfig, views=3, captions=2, augment=ViewConfig()),
    "siglip": partial(ClipConfig, loss="sigmoid"),
    "slip": partial(SlipConfig, hidden=12, projected=6),
    "ito-0": partial(ItoConfig, fusion_weight=0.0),
    "ito": partial(ItoConfig, fusion=FusionConfig(head_width=4)),
    "ito-captions": partial(ItoConfig, views=3, captions=2, fusion=FusionConfig(head_width=4)),
}


def objective(name: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    return CONFIGS[name](**changes).build(encoder())


def batch(module: nn.Module, *, rows: slice = slice(None), rng: StepRNG | None = None, rows_all: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(3)
    captions = module.config.captions
    words = torch.randint(len(WORDS), (rows_all * captions, 5), generator=generator)
    lengths = torch.randint(1, 6, (rows_all * captions,), generator=generator)
    texts = [" ".join(WORDS[w] for w in row[:n]) for row, n in zip(words.tolist(), lengths.tolist(), strict=True)]
    ids, valid = (side.unflatten(0, (rows_all, captions)).flatten(1) for side in module.model.tokenize(texts))
    pixels = torch.randint(256, (rows_all, 3, 24, 24), dtype=torch.uint8, generator=generator)
    pairs = CaptionedImageExamples(pixels_B3HW=pixels, ids_BL=ids, valid_BL=valid)[rows]
    return Batch(rng=rng or StepRNG(0, 3), streams={"pairs": pairs})


def result(module: nn.Module, given: Batch, wrap: Callable[[nn.Module], nn.Module] = lambda module: module):
    """Loss, terms and the gradients of all parameters, by name."""
    wrapped = wrap(_Plain(module))
    total, terms = wrapped(given)
    total.backward()
    gradients = {
        f"gradient/{name}": p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in module.named_parameters()
    }
    return {"total": total.detach(), **{f"term/{k}": v.detach() for k, v in terms.items()}, **gradients}


class _Plain(nn.Module):
    """The objective with tensors as its outputs, which DistributedDataParallel can find."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, given: Batch):
        losses = self.module(given, 0)
        return losses.total, {name: term.detach() for name, term in losses.terms.items()}


def main(out: Path) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    share = ROWS // world
    found = {}
    for name in CONFIGS:
        for chunk in (None, 3):
            module = objective(name, chunk=chunk)
            given = batch(module, rows=slice(rank * share, (rank + 1) * share), rng=StepRNG(0, 3, rank, world))
            wrap = partial(DistributedDataParallel, find_unused_parameters=module.may_skip_parameters)
            found[name, chunk] = result(module, given, wrap)
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
