"""Speed beside others: ITIT against networks of its kind that do the same work, and against itself without a saving.

    python benchmarks/peers.py [--only generate caption ...] [--scale base] [--batches 1 4 16] [--precision bf16]
                               [--device cuda --compile] [--json FILE]

| part | ours | peer |
|---|---|---|
| generate | guided parallel decoding of 256 tokens | `diffusers.UVit2DModel` with as many parameters, its scheduler |
| caption | 20 tokens from image tokens, greedily and with 4 beams | GIT's `generate` from pixels (`transformers`) |
| int8 | drawing and captions with weights of 8 bits (`--precision int8` of the commands) | the same network as it is |
| step | gradient of the losses on pairs | the same network, all image tokens in the encoder |
| cycle | gradient with cycles, T2I2T and I2T2I apart and together | no cycles: takes `ratio` of the time |
| encode | VQGAN: pixels to tokens | `diffusers.VQModel` with the same weights |
| clip | gradient of CLIP's loss, ViT-B/16 | `open_clip`'s own, where it is installed |
| streams | making a batch, from a store or from `--data` | computing its gradient: above 5 the loop never waits |
| start | `--help`, the imports for captions, a caption by a command of its own | `transformers`: the same with GIT |
| attention | `diptych.nn.transformer.attention` in bf16 on a CPU, forward and backward | torch's fused kernel |

Weights are random, inputs too; both sides run in one process and take turns. A number is the median over the turns of
the ratio of the two times in one turn: above 1 ours is faster. Beside it stand the operations of either side, counted
by torch (a product and a sum are two; attention whole, with what a mask hides), and the share of the peak that it
reaches. The peak is that of the products of matrices that make up nine tenths of its operations, each timed alone at
its own shape. `--scale base` is ITIT-B (218M) and GIT-base, `small` is ITIT of 5M. Everything is computed in
`--precision`; under bf16 the peers have bf16 weights, and ours as the product: fp32 in training, rounded once in
generation. With one CPU thread (OMP_NUM_THREADS=1) times are those that the process and its children computed, whatever
else runs; on CUDA they are those of events, and the peak of the memory is shown.

At scale base the last line says which bars are met (`BARS`), and the exit status is 1 if one is missed.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ito_cost import build
from PIL import Image
from stream_scale import make as make_store
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diptych.data.batch import Batch, CaptionedImageExamples, ImageTokenExamples, PairExamples, TextExamples
from diptych.data.pixels import SkippedItems
from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source
from diptych.data.store import Store
from diptych.data.streams import BatchSampler
from diptych.dual.data import CaptionIds, pair_stream
from diptych.itit.generation import ImageGenerationConfig, TextGenerationConfig, generate_image_tokens, generate_text
from diptych.itit.model import ITIT, SIZES, Masking
from diptych.itit.objective import ItitObjective, ItitObjectiveConfig
from diptych.nn.inference import autocast
from diptych.nn.transformer import attention
from diptych.rng import StepRNG
from diptych.tokenizers.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from diptych.tokenizers.span_corruption import SpanCorruption, TextEncoderConfig
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.text_tokenizer import EOS, train_tokenizer

BARS = {
    "generate": 1.6,
    "caption, 4 beams": 4.0,
    "caption, greedy": 1.5,
    "step": 1.6,
    "cycle, full": 1 / 2.3,
    "streams": 5.0,
}
"""Smallest ratios that are asked for; a key is the beginning of a name."""
CAPTION_LENGTH, TEXT_LENGTH = 20, 16
Run = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two pieces of work, to be timed in turns."""

    name: str
    ours: Run
    peer: Run


@dataclass(frozen=True, slots=True)
class Finding:
    """Median times, and the median, lowest and highest ratio of a turn."""

    name: str
    ours_s: float
    peer_s: float
    ratio: float
    lowest: float
    highest: float
    ours_gflop: float
    peer_gflop: float
    ours_share: float
    """Of the peak of its own matrix products, see :func:`products_peak`."""
    peer_share: float
    ours_mb: float | None = None
    """Peak of the memory on the GPU."""
    peer_mb: float | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """The shape of a product of matrices, or of several such products in one call."""

    matrices: int
    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> float:
        return 2.0 * self.matrices * self.rows * self.inner * self.columns


class Bench:
    """The options of a run, and what all parts build with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.base = options.scale == "base"
        self.rates: dict[Product, float] = {}
        """Operations a second of products that were timed."""
        torch.manual_seed(0)

    def ours(self, module: torch.nn.Module) -> Any:
        module.to(self.device)
        if self.options.compile:
            for block in module.modules():
                if type(block).__name__ == "Block":
                    block.compile(dynamic=True)
        return module

    def peer(self, module: torch.nn.Module) -> Any:
        module.to(self.device, torch.bfloat16 if self.options.precision == "bf16" else torch.float32)
        if self.options.compile:
            module.compile(dynamic=True)
        return module.eval()

    def policy(self) -> Any:
        return autocast(self.device, self.options.precision)

    def network(self, text_encoder: TextEncoder | None = None) -> ITIT:
        width, rows = (text_encoder.width, text_encoder.vocab_rows) if text_encoder else (768, 32128)
        sizes = {"max_text_len": CAPTION_LENGTH, "text_features": width, "vocab_size": rows}
        return self.ours(ITIT(replace(SIZES["base" if self.base else "small"], dropout=0.0, **sizes)))

    def tokens(self, rows: int) -> Tensor:
        return torch.randint(8192, (rows, 256), device=self.device)

    def seconds(self, run: Run) -> tuple[float, float | None]:
        """Time, and on CUDA the peak of the memory in MB."""
        if self.device.type != "cuda":
            clock = processor_time if torch.get_num_threads() == 1 else time.perf_counter
            began = clock()
            run()
            return clock() - began, None
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() / 2**20

    def measure(self, pair: Comparison) -> Finding:
        for _ in range(self.options.warmup):
            self.seconds(pair.ours), self.seconds(pair.peer)
        counts = [counted(run) for run in (pair.ours, pair.peer)]  # warm, as ours keeps what a model always computes
        turns = [(self.seconds(pair.ours), self.seconds(pair.peer)) for _ in range(self.options.repeats)]
        ours, peer = ([turn[side][0] for turn in turns] for side in (0, 1))
        ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
        medians = [statistics.median(values) for values in (ours, peer, ratios)]
        gflops = [sum(count.values()) / 1e9 for count in counts]
        peaks = [self.products_peak(count) for count in counts]
        shares = [1e9 * gflop / took / peak for gflop, took, peak in zip(gflops, medians, peaks, strict=False)]
        memory = turns[-1][0][1], turns[-1][1][1]
        return Finding(pair.name, *medians, min(ratios), max(ratios), *gflops, *shares, *memory)

    def products_peak(self, products: Mapping[Product, float]) -> float:
        """Operations a second of the ``products``, the largest that have nine tenths of all operations, each alone."""
        total, chosen, spent = sum(products.values()), 0.0, 0.0
        for product, operations in sorted(products.items(), key=lambda item: -item[1]):
            if chosen >= 0.9 * total:
                break
            if product not in self.rates:
                self.rates[product] = self.rate(product)
            chosen += operations
            spent += operations / self.rates[product]
        return chosen / spent if spent else math.inf

    def rate(self, product: Product) -> float:
        """Operations a second of a product of matrices alone: the median of seven, a twentieth of a second each."""
        dtype = torch.bfloat16 if self.options.precision == "bf16" else torch.float32
        left = torch.randn(product.matrices, product.rows, product.inner, device=self.device, dtype=dtype)
        right = torch.randn(product.matrices, product.columns, product.inner, device=self.device, dtype=dtype).mT
        left, right = (left[0], right[0]) if product.matrices == 1 else (left, right)
        with torch.inference_mode():
            self.seconds(lambda: left @ right)
            once = self.seconds(lambda: left @ right)[0]
            uses = max(1, int(0.05 / max(once, 1e-6)))
            times = [self.seconds(lambda: [left @ right for _ in range(uses)])[0] for _ in range(7)]
        return product.operations * uses / statistics.median(times)


def processor_time() -> float:
    """Seconds that this process and its children have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def counted(run: Run) -> dict[Product, float]:
    """Operations of ``run`` by the product of matrices that they belong to; convolutions and attention as products."""
    found: dict[Product, float] = {}

    def note(matrices: int, rows: int, inner: int, columns: int, times: float = 1.0) -> int:
        product = Product(matrices, rows, inner, columns)
        found[product] = found.get(product, 0.0) + times * product.operations
        return int(times * product.operations)

    def mm(left: Any, right: Any, *_: Any, out_shape: Any = None, **named: Any) -> int:
        return note(1, *left, right[1])

    def addmm(_: Any, left: Any, right: Any, *__: Any, out_shape: Any = None, **named: Any) -> int:
        return note(1, *left, right[1])

    def bmm(left: Any, right: Any, *_: Any, out_shape: Any = None, **named: Any) -> int:
        return note(left[0], *left[1:], right[2])

    def baddbmm(_: Any, left: Any, right: Any, *__: Any, out_shape: Any = None, **named: Any) -> int:
        return bmm(left, right)

    def packed(x: Any, _: Any, weight: Any, *__: Any, out_shape: Any = None, **named: Any) -> int:
        return note(1, math.prod(x[:-1]), weight[1], weight[0])

    def convolution(x: Any, weight: Any, *_: Any, out_shape: Any = None, **named: Any) -> int:
        return note(1, out_shape[0] * math.prod(out_shape[2:]), math.prod(weight[1:]), weight[0])

    def convolution_backward(
        gradient: Any, _: Any, weight: Any, *more: Any, out_shape: Any = None, **named: Any
    ) -> int:
        of_input, of_weight, _ = more[-1]
        places, inner = gradient[0] * math.prod(gradient[2:]), math.prod(weight[1:])
        found = note(1, places, weight[0], inner) if of_input else 0
        return found + (note(1, weight[0], places, inner) if of_weight else 0)

    def attend(query: Any, key: Any, *_: Any, out_shape: Any = None, **named: Any) -> int:
        return note(math.prod(query[:-2]), query[-2], query[-1], key[-2], 2.0)

    def attend_backward(_: Any, query: Any, key: Any, *__: Any, out_shape: Any = None, **named: Any) -> int:
        return note(math.prod(query[:-2]), query[-2], query[-1], key[-2], 5.0)  # the scores once more, four gradients

    aten = torch.ops.aten
    formulas: dict[Any, Any] = {
        aten.mm: mm, aten.addmm: addmm, aten.bmm: bmm, aten.baddbmm: baddbmm, aten.convolution: convolution,
        aten._convolution: convolution,
        aten.convolution_backward: convolution_backward,
        aten._scaled_dot_product_flash_attention: attend,
        aten._scaled_dot_product_efficient_attention: attend,
        aten._scaled_dot_product_cudnn_attention: attend,
        aten._scaled_dot_product_flash_attention_for_cpu: attend,
        aten._scaled_dot_product_flash_attention_backward: attend_backward,
        aten._scaled_dot_product_efficient_attention_backward: attend_backward,
        aten._scaled_dot_product_cudnn_attention_backward: attend_backward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attend_backward,
    }  # fmt: skip
    if torch.backends.mkl.is_available():
        formulas[torch.ops.mkl._mkl_linear] = packed
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    assert sum(found.values()) == counter.get_total_flops(), "an operation is counted that has no product here"
    return found


# Generation


def generate(bench: Bench) -> Iterator[Comparison]:
    """Guidance 2 of ours is what diffusers calls 3; the peer takes both branches in one batch, as its pipeline does."""
    from diffusers import AmusedScheduler

    model = bench.network().eval()
    width = 768 if bench.base else 192
    unet = bench.peer(uvit(width, parameters=sum(p.numel() for p in model.parameters())))
    config = ImageGenerationConfig(steps=bench.options.rounds, guidance=2.0)
    scheduler = AmusedScheduler(mask_token_id=8255)

    def peer(features: Tensor, pooled: Tensor) -> Tensor:
        rows = len(features) // 2
        with torch.inference_mode():
            scheduler.set_timesteps(config.steps, (2, 0), bench.device)
            latents = torch.full((rows, 16, 16), 8255, device=bench.device)
            sizes = torch.tensor([[256, 256, 0, 0, 6]] * 2 * rows, device=bench.device)
            for moment in scheduler.timesteps:
                logits = unet(torch.cat([latents] * 2), features, pooled, sizes)
                null, text = logits.chunk(2)
                latents = scheduler.step(null + 3 * (text - null), moment, latents).prev_sample
            return latents

    for rows in bench.options.batches:
        features = torch.randn(rows, TEXT_LENGTH, 768, device=bench.device)
        valid = torch.ones(rows, TEXT_LENGTH, dtype=torch.bool, device=bench.device)
        both = torch.randn(2 * rows, TEXT_LENGTH, 768, device=bench.device, dtype=unet.dtype)
        yield Comparison(
            f"generate, batch {rows}",
            lambda f=features, v=valid: drawn(bench, model, f, v),
            lambda b=both: peer(b, b[:, 0]),
        )


def drawn(bench: Bench, model: ITIT, features: Tensor, valid: Tensor) -> Tensor:
    """Tokens of images for these text features, guided."""
    config = ImageGenerationConfig(steps=bench.options.rounds, guidance=2.0)
    with torch.inference_mode(), bench.policy():
        return generate_image_tokens(model.rounded(), features, valid, config, rng=StepRNG(0, 0))


def uvit(width: int, *, parameters: int) -> Any:
    """aMUSEd's network for 16 x 16 tokens at this width, as deep as it takes to come nearest to ``parameters``."""
    from diffusers import UVit2DModel

    def build(layers: int) -> Any:
        return UVit2DModel(
            hidden_size=width, in_channels=width, block_out_channels=width, intermediate_size=width * 11 // 4,
            num_hidden_layers=layers, num_attention_heads=width // 64, block_num_heads=width // 64,
        )  # fmt: skip

    with torch.device("meta"):
        counts = {layers: sum(p.numel() for p in build(layers).parameters()) for layers in range(1, 25)}
    layers = min(counts, key=lambda layers: abs(counts[layers] - parameters))
    print(f"generate: {parameters / 1e6:.1f}M parameters, UVit2DModel {counts[layers] / 1e6:.1f}M ({layers} layers)")
    return build(layers)


def caption(bench: Bench) -> Iterator[Comparison]:
    """No text may end before its last token. GIT begins with pixels; ours with tokens, so see `encode` too."""
    from transformers import GitConfig, GitForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = bench.network().eval()
    side = bench.options.git_pixels
    small: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
    vision = {"image_size": side} | ({} if bench.base else small | {"num_hidden_layers": 4})
    text = {} if bench.base else small | {"num_hidden_layers": 2}
    git = bench.peer(GitForCausalLM(GitConfig(vision_config=vision, **text)))
    count = sum(p.numel() for p in git.parameters()) / 1e6
    print(f"caption: ITIT has {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, GIT {count:.1f}M")

    def peer(pixels: Tensor, beams: int) -> Any:
        length = {"max_new_tokens": CAPTION_LENGTH, "min_new_tokens": CAPTION_LENGTH}
        with torch.inference_mode():
            return git.generate(pixel_values=pixels, num_beams=beams, do_sample=False, **length)

    for beams, kind in ((1, "greedy"), (4, "4 beams")):
        for rows in bench.options.batches:
            tokens = bench.tokens(rows)
            pixels = torch.randn(rows, 3, side, side, device=bench.device, dtype=git.dtype)
            for visible in bench.options.visible:
                read = "" if visible == 1 else f"{visible:g} visible, "
                yield Comparison(
                    f"caption, {kind}, {read}batch {rows}",
                    lambda t=tokens, b=beams, v=visible: captioned(bench, model, t, b, v),
                    lambda p=pixels, b=beams: peer(p, b),
                )


def captioned(bench: Bench, model: ITIT, tokens: Tensor, beams: int, visible: float = 1.0) -> Any:
    """Captions of `CAPTION_LENGTH` tokens, none of which ends before."""
    banned = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=bench.device)
    banned[EOS] = True
    images, config = ImageTokenExamples(tokens_BN=tokens), TextGenerationConfig(beams=beams, visible=visible)
    with torch.inference_mode(), bench.policy():
        return generate_text(model.rounded(), images, config, banned_V=banned, length=CAPTION_LENGTH)


def int8(bench: Bench) -> Iterator[Comparison]:
    """Ours in 8 bits against ours in `--precision`. The operations in 8 bits are not counted."""
    if bench.device.type != "cpu":
        return
    plain = bench.network().eval()
    rounded = plain.in_int8()
    for rows in bench.options.batches:
        features = torch.randn(rows, TEXT_LENGTH, 768)
        valid = torch.ones(rows, TEXT_LENGTH, dtype=torch.bool)
        yield Comparison(
            f"int8, generate, batch {rows}",
            lambda f=features, v=valid: drawn(bench, rounded, f, v),
            lambda f=features, v=valid: drawn(bench, plain, f, v),
        )
        for beams, kind in ((1, "greedy"), (4, "4 beams")):
            tokens = bench.tokens(rows)
            yield Comparison(
                f"int8, caption, {kind}, batch {rows}",
                lambda t=tokens, b=beams: captioned(bench, rounded, t, b),
                lambda t=tokens, b=beams: captioned(bench, plain, t, b),
            )


# Training


class Undropped(ItitObjective):
    """As many tokens are hidden, but all enter the encoder."""

    def _sample_masking(self, *args: Any, **options: Any) -> Masking:
        masking = super()._sample_masking(*args, **options)
        return Masking(masking.hidden_BN, masking.hidden_BN.long().argsort(dim=1, stable=True))


def encoder_of_texts(bench: Bench) -> TextEncoder:
    """T5 as large as the encoder of T5-base, or a small one; with random weights and 32,128 ids."""
    texts = [ScenesSource(count=200).captions(item)[0] for item in range(200)]
    config = TextEncoderConfig(width=768, layers=12, heads=12, feed_forward=2048)
    config = config if bench.base else TextEncoderConfig()
    tokenizer = train_tokenizer(texts, vocab_size=512, sentinels=100)
    encoder = SpanCorruption(tokenizer, config=config, seed=0).text_encoder()
    encoder.t5.resize_token_embeddings(32128)
    encoder = TextEncoder(encoder.t5, tokenizer)
    encoder.banned_V.zero_()[EOS] = True  # generated captions have their full length
    return encoder


def gradient(bench: Bench, objective: ItitObjective, rows: int) -> Run:
    """Forward and backward pass, with cached text features, without the optimizer."""
    width, device = objective.text_encoder.width, bench.device

    def texts(rows: int) -> dict[str, Tensor]:
        ids = torch.randint(2, 400, (rows, TEXT_LENGTH), device=device)
        features = torch.randn(rows, TEXT_LENGTH, width, device=device)
        return {"ids_BL": ids, "valid_BL": ids > 0, "features_BLF": features}

    streams = {
        "pairs": PairExamples(tokens_BN=bench.tokens(2 * rows), **texts(2 * rows)),
        "images": ImageTokenExamples(tokens_BN=bench.tokens(rows)),
        "texts": TextExamples(**texts(rows)),
    }
    batch = Batch(rng=StepRNG(0, 0), streams=streams)

    def run() -> None:
        with bench.policy():
            total = objective(batch, 0).total
        total.backward()
        objective.zero_grad()

    return run


def step(bench: Bench) -> Iterator[Comparison]:
    text_encoder = encoder_of_texts(bench)
    model = bench.network(text_encoder).train()
    whole = ItitObjectiveConfig(texts="off", images="off")
    peer = Undropped(model, text_encoder, whole).to(bench.device)
    for rows in bench.options.batches:
        for share in bench.options.decode:
            image, text = (replace(each, decode=share) for each in (whole.image_masking, whole.text_masking))
            config = replace(whole, image_masking=image, text_masking=text)
            ours = ItitObjective(model, text_encoder, config).to(bench.device)
            some = "" if share == 1 else f"{share:g} of the dropped decoded, "
            yield Comparison(f"step, {some}batch {rows}", gradient(bench, ours, rows), gradient(bench, peer, rows))


def cycle(bench: Bench) -> Iterator[Comparison]:
    """The paper's proportions: two pairs, an unpaired image and an unpaired text a row of the batch."""
    text_encoder = encoder_of_texts(bench)
    model = bench.network(text_encoder).train()
    rows = bench.options.batches[-1]

    def run(texts: Any, images: Any, rounds: int, share: float = 1.0) -> Run:
        generation = replace(ItitObjectiveConfig().image_generation, steps=rounds)
        cycles: dict[str, Any] = {"texts": texts, "images": images, "cycle_start_step": 0, "cycle_share": share}
        config = ItitObjectiveConfig(**cycles, image_generation=generation)
        return gradient(bench, ItitObjective(model, text_encoder, config).to(bench.device), rows)

    without = run("off", "off", 1)
    for rounds in bench.options.synthesis:
        for texts, images in (("half", "off"), ("full", "off"), ("half", "half"), ("full", "full")):
            name = texts if images != "off" else f"{texts} T2I2T alone"
            yield Comparison(f"cycle, {name}, {rounds} rounds", run(texts, images, rounds), without)
        for share in bench.options.cycle_shares:
            name = f"cycle, full, {rounds} rounds, {share:g} of the rows"
            yield Comparison(name, run("full", "full", rounds, share), without)
    for images in ("half", "full"):
        yield Comparison(f"cycle, {images} I2T2I alone", run("off", images, 1), without)


# Parts


def encode(bench: Bench) -> Iterator[Comparison]:
    from diffusers import VQModel

    config = ImageTokenizerConfig() if bench.base else ImageTokenizerConfig(image_size=64, widths=(64, 128, 128))
    tokenizer = bench.ours(ImageTokenizer.from_config(config, seed=0).eval())
    network = VQModel.from_config(tokenizer.network.config)
    network.load_state_dict(tokenizer.network.state_dict())
    network.to(bench.device).eval()

    def peer(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            latents = network.encode(pixels / 255).latents
            return network.quantize(latents)[2][2]

    for rows in bench.options.batches:
        size = tokenizer.image_size
        pixels = torch.randint(256, (rows, 3, size, size), device=bench.device, dtype=torch.uint8)
        yield Comparison(f"encode, batch {rows}", lambda p=pixels: tokenizer.encode(p), lambda p=pixels: peer(p))


def attention_bf16(bench: Bench) -> Iterator[Comparison]:
    for shape in ((64, 4, 20, 32), (32, 4, 76, 32), (32, 6, 104, 64), (32, 6, 170, 64)):
        inputs = [torch.randn(shape, dtype=torch.bfloat16, device=bench.device, requires_grad=True) for _ in range(3)]

        def run(function: Callable[..., Tensor], inputs: list[Tensor] = inputs) -> None:
            function(*inputs).sum().backward()

        name = f"attention, {'x'.join(map(str, shape))} (rows, heads, positions, width of a head)"
        yield Comparison(name, lambda r=run: r(attention), lambda r=run: r(F.scaled_dot_product_attention))


def clip(bench: Bench) -> Iterator[Comparison]:
    """Equal towers and texts of 77 tokens; ours begins with bytes of pixels, the peer with their floats."""
    try:
        # Where the compiled part of torchvision does not fit torch, its import looks for these two and fails.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes) -> Tensor")
    except RuntimeError:
        pass
    try:
        import open_clip
        from open_clip.loss import ClipLoss
    except (ImportError, RuntimeError) as error:
        print(f"clip: left out, open_clip cannot be imported ({error})")
        return
    size, theirs = ("vit_b_16", "ViT-B-16") if bench.base else ("vit_s_16", "ViT-S-16")
    objective = build("clip", size, bench.options.device)
    network = bench.peer(open_clip.create_model(theirs)).train()
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (objective, network)]
    print(f"clip: {counts[0]:.1f}M parameters, open_clip {counts[1]:.1f}M")
    side, loss = objective.model.image_size, ClipLoss()
    for rows in bench.options.batches[-1:]:
        pixels = torch.randint(256, (rows, 3, side, side), dtype=torch.uint8, device=bench.device)
        ids = torch.randint(1, 500, (rows, 77), device=bench.device)
        ids[:, -1] = 49_407  # CLIP reads a text at its highest id
        pairs = CaptionedImageExamples(pixels_B3HW=pixels, ids_BL=ids, valid_BL=ids > 0)
        batch = Batch(rng=StepRNG(0, 0), streams={"pairs": pairs})

        def ours(batch: Batch = batch) -> None:
            with bench.policy():
                total = objective(batch, 0).total
            total.backward()
            objective.zero_grad()

        def peer(pixels: Tensor = pixels, ids: Tensor = ids) -> None:
            images = (pixels / 255).sub_(0.45).div_(0.27).to(network.logit_scale.dtype)
            loss(*network(images, ids)).backward()
            network.zero_grad()

        yield Comparison(f"clip, batch {rows}", ours, peer)


def streams(bench: Bench) -> Iterator[Comparison]:
    """A batch of ITIT from a store of 100,000 items, and one of CLIP from each of `--data`, beside their gradients."""
    rows = bench.options.batches[-1]
    text_encoder = encoder_of_texts(bench)
    config = ItitObjectiveConfig(texts="off", images="off")
    objective = ItitObjective(bench.network(text_encoder).train(), text_encoder, config).to(bench.device)
    with tempfile.TemporaryDirectory() as scratch:
        make_store(Path(scratch) / "store", 100_000)
        store = Store.open(Path(scratch) / "store")
        every = range(len(store))
        parts = {"pairs": store.pairs(every, seed=0), "images": store.images(every), "texts": store.texts(every)}
        sampler = BatchSampler(parts, multiples={"pairs": 2, "images": 1, "texts": 1}, batch_size=rows, seed=0)
        steps = count()
        yield Comparison(
            f"streams, store, batch {rows}", lambda: sampler(next(steps)), gradient(bench, objective, rows)
        )
    dual = build("clip", "vit_b_16" if bench.base else "small", bench.options.device)
    for spec in bench.options.data:
        source = open_source(spec)
        captions = CaptionIds.read(source, np.arange(min(len(source), 2000)), dual.model.ids)
        size = dual.model.image_size
        options: dict[str, Any] = {"per_image": 1, "pad": 0, "cache_mb": 0, "seed": 0}
        pairs = pair_stream(source, captions, size=size, skipped=SkippedItems(max_skipped_share=0.01), **options)
        reader = BatchSampler({"pairs": pairs}, multiples={"pairs": 1}, batch_size=rows, seed=0)

        first = reader(0).to(bench.device)

        def learn(batch: Batch = first) -> None:
            with bench.policy():
                total = dual(batch, 0).total
            total.backward()
            dual.zero_grad()

        steps = count()
        name = f"streams, {Path(spec.partition('?')[0]).name}, batch {rows}"
        yield Comparison(name, lambda read=reader, steps=steps: read(next(steps)), learn)


def start(bench: Bench) -> Iterator[Comparison]:
    """Commands of their own, from the start of Python to its end. The networks are small ones with random weights."""
    from transformers import GitConfig, GitForCausalLM

    def command(*words: object) -> Run:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        return lambda: subprocess.run([str(word) for word in words], check=True, capture_output=True, env=environment)

    def python(code: str) -> Run:
        return command(sys.executable, "-c", code)

    theirs = Path(sys.executable).with_name("transformers")
    yield Comparison("start, --help", command(sys.executable, "-m", "diptych", "--help"), command(theirs, "--help"))
    yield Comparison(
        "start, imports for captions",
        python("from diptych.itit.pipeline import Diptych"),
        python("from transformers import AutoTokenizer, GitForCausalLM"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, photo = Path(scratch), Path(scratch) / "photo.png"
        Image.new("RGB", (256, 256), (90, 160, 60)).save(photo)
        tokenizer = ImageTokenizer.from_config(ImageTokenizerConfig(image_size=64, widths=(64, 128, 128)), seed=0)
        text_encoder = encoder_of_texts(Bench(argparse.Namespace(**vars(bench.options) | {"scale": "small"})))
        network = SIZES["small"].build(tokenizer, text_encoder)
        for name, part in (("tokenizer", tokenizer), ("text_encoder", text_encoder), ("model", network)):
            part.save_pretrained(folder / "run" / name)
        small = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3}
        layers = {"vision_config": small | {"num_hidden_layers": 4}, "num_hidden_layers": 2}
        GitForCausalLM(GitConfig(**small, **layers)).save_pretrained(folder / "git")
        yield Comparison(
            "start, a caption",
            command(sys.executable, "-m", "diptych", "caption", folder / "run", photo, "--device", "cpu"),
            python(_CAPTION.format(folder=folder)),
        )


_CAPTION = """
import numpy, torch
from PIL import Image
from transformers import GitForCausalLM
git = GitForCausalLM.from_pretrained("{folder}/git").eval()
image = numpy.array(Image.open("{folder}/photo.png").resize((224, 224)), dtype="float32")
pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
with torch.inference_mode():
    git.generate(pixel_values=pixels, num_beams=4, max_new_tokens=20)
"""

PARTS = {
    "generate": generate,
    "caption": caption,
    "int8": int8,
    "step": step,
    "cycle": cycle,
    "encode": encode,
    "attention": attention_bf16,
    "clip": clip,
    "streams": streams,
    "start": start,
}


def verdict(findings: list[Finding]) -> bool:
    missed = [
        f"{finding.name} {finding.ratio:.2f}"
        for finding in findings
        for name, bar in BARS.items()
        if finding.name.startswith(name) and finding.ratio < bar
    ]
    print(f"verdict: {'below their bars: ' + '; '.join(missed) if missed else 'all bars are met'}")
    return not missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--scale", choices=("base", "small"), default="base")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument(
        "--rounds", type=int, default=4, help="rounds of parallel decoding in `generate`; the paper has 24"
    )
    parser.add_argument("--synthesis", nargs="+", type=int, default=[8], help="rounds inside T2I2T")
    parser.add_argument(
        "--decode", nargs="+", type=float, default=[1.0, 0.25], help="shares of the dropped tokens that are predicted"
    )
    parser.add_argument(
        "--cycle-shares", nargs="*", type=float, default=[], help="shares of the rows that take part in full cycles"
    )
    parser.add_argument(
        "--visible", nargs="+", type=float, default=[1.0, 0.5], help="shares that captions are read from"
    )
    parser.add_argument("--data", nargs="*", default=[], help="sources of captioned images for `streams`")
    parser.add_argument("--git-pixels", type=int, default=224, help="side of GIT's images; 256 has as many positions")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options)
    machine = {
        "torch": torch.__version__,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
    }
    print(machine)
    findings: list[Finding] = []
    for name in options.only:
        for pair in PARTS[name](bench):
            finding = bench.measure(pair)
            findings.append(finding)
            memory = "" if finding.ours_mb is None else f"  {finding.ours_mb:,.0f} and {finding.peer_mb:,.0f} MB"
            spread = f"({finding.lowest:.2f} to {finding.highest:.2f})"
            times = f"{finding.ours_s:8.3f} s, peer {finding.peer_s:8.3f} s"
            work = f"{finding.ours_gflop:,.1f} and {finding.peer_gflop:,.1f} GFLOP"
            shares = f"{finding.ours_share:.0%} and {finding.peer_share:.0%} of the peak"
            print(f"{finding.name:<34} x{finding.ratio:.2f} {spread:<16} {times}  {work}, {shares}{memory}", flush=True)
            if options.json:
                asked = {name: str(value) for name, value in vars(options).items()}
                content = {"machine": machine, "options": asked, "findings": [asdict(each) for each in findings]}
                options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if options.scale != "base" or verdict(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
