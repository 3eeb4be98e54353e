"""`diptych plan`: what a recipe takes on given devices, on paper.

Networks and batches are made on torch's `meta` device, which has shapes and no numbers. Operations are those that torch
counts while the losses of the objective and their gradients are computed there: two for each multiplication and
addition in products of matrices and convolutions, and none for the rest. So nothing is read or downloaded, no device is
needed, and a step is counted as it is written. A time is operations divided by a share of a device's peak: an estimate,
as are the bytes that a link carries in a second.

Shapes: B rows, N image tokens, L text tokens, F width of the text features, V vocabulary, G width of image features,
T width of a teacher's features.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diptych.data.batch import ImageTokenExamples, PairExamples, TextExamples
from diptych.errors import UserError
from diptych.itit.generation import entering
from diptych.itit.model import ITIT, Masking
from diptych.itit.objective import AlignmentHead, ItitObjective
from diptych.itit.training import ItitRun
from diptych.nn.inference import multiplies_bf16
from diptych.rng import StepRNG
from diptych.run_folder import Run
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import FeatureKind, TextEncoder
from diptych.train.distributed import blocks, checkpoint_activations

if TYPE_CHECKING:
    import transformers

NODE = 8
"""Devices of a machine."""
_ROWS = 2
"""Rows of the batch that is counted; every row costs the same."""
_ROW_SECONDS = 2e-6
"""Processor time for one row of a stream from encoded data, by benchmarks/stream_scale.py."""
_DISK = 1e9
"""Bytes that a process reads in a second."""
_ENCODER_WIDTH = 1280
"""Width of the features of an image encoder or a teacher, which is not opened: that of EfficientNet-Lite0."""
_T5 = {  # v1.1: width, feed-forward, layers, heads
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A device as its maker describes it."""

    peak: float
    """Operations a second in bf16 with fp32 sums, without sparsity."""
    memory: float
    """Bytes."""
    link: float
    """Bytes a second that a device sends to those of its machine."""
    network: float
    """Bytes a second that a device sends to those of other machines."""


HARDWARE = {
    "h100": Hardware(peak=989e12, memory=80e9, link=450e9, network=50e9),
    "h200": Hardware(peak=989e12, memory=141e9, link=450e9, network=50e9),
    "a100": Hardware(peak=312e12, memory=80e9, link=300e9, network=25e9),
    "rtx4090": Hardware(peak=165e12, memory=24e9, link=32e9, network=3e9),
}
"""By data sheets: SXM boards with NVLink, and a network adapter of 400 (A100: 200) Gbit/s each; PCIe 4, 25 Gbit/s."""


def this_cpu() -> Hardware:
    """This machine: the best of ten products of matrices of 2,048 on the threads that torch uses, and its memory."""
    a, b = torch.randn(2, 2048, 2048).to(torch.bfloat16 if multiplies_bf16(torch.device("cpu")) else torch.float32)
    best = math.inf
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Hardware(peak=2 * 2048**3 / best, memory=memory, link=10e9, network=1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a row of the batch takes."""

    operations: dict[str, int]
    """By stream, for one row of the batch; those of `pairs` are for two pairs."""
    kept: int
    """Bytes that the forward pass keeps for the backward pass, for one row, all numbers in fp32."""
    parameters: int
    """Trained parameters."""
    in_no_block: int
    """Those of them that are in no block, so that fsdp gathers them for the whole step."""
    largest_block: int
    moments: int
    """Numbers that the optimizer keeps."""
    frozen: int
    """Parameters of the frozen text encoder, if it computes in the step."""
    encoding: int
    """Operations that turn one image into tokens."""
    bytes_read: int
    """Bytes of encoded data."""
    rows_read: int
    images: int
    """Images in a row of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run takes on devices of a kind."""

    recipe: str
    device: str
    devices: int
    batch_size: int
    steps: int
    utilization: float
    parameters: int
    frozen_parameters: int
    operations: dict[str, int]
    """Operations of a step, by stream."""
    memory: dict[str, dict[str, float]]
    """Bytes on each device, by `ddp` and `fsdp`, then by what they hold; `all` is their sum."""
    memory_of_device: float
    seconds: dict[str, float]
    """Of a step: `compute`, and what may go on beside it: `all-reduce`, `data reading`, `image encoding`."""
    step_seconds: float
    run_days: float
    bottleneck: str
    work: Work

    def lines(self) -> list[str]:
        """The plan for the terminal."""
        total = sum(self.operations.values())
        lines = [
            f"{self.recipe}: batch {self.batch_size:,}, {self.steps:,} steps, on {self.devices} {self.device}",
            f"parameters   {self.parameters / 1e6:,.1f}M trained, {self.frozen_parameters / 1e6:,.1f}M frozen",
            f"a step       {total / 1e12:,.3g} TFLOP: "
            + ", ".join(f"{name} {value / 1e12:,.3g}" for name, value in self.operations.items()),
        ]
        for parallel, parts in self.memory.items():
            held = ", ".join(f"{name} {value / 1e9:,.3g}" for name, value in parts.items() if name != "all")
            fits = "" if parts["all"] <= self.memory_of_device else f", MORE than {self.memory_of_device / 1e9:,.0f}"
            lines.append(f"memory {parallel:<5} {parts['all'] / 1e9:,.3g} GB a device{fits}: {held}")
        lines += [f"{name:<15}{_time(value)} a step" for name, value in self.seconds.items()]
        rate = 1 / self.step_seconds
        return [
            *lines,
            f"time           {_time(self.step_seconds)} a step, {rate:,.3g} steps a second, "
            f"{_time(86400 * self.run_days)} for all steps, at {self.utilization:.0%} of the peak",
            f"bottleneck     {self.bottleneck}",
        ]


def plan(
    run: Run,
    *,
    recipe: str,
    device: str,
    devices: int,
    utilization: float = 0.4,
    images: int = 10_000_000,
    text_features: Literal["computed", "cached"] = "computed",
    work: Work | None = None,
) -> Plan:
    """What ``run`` takes. ``images`` are those of the data, each of which is encoded once; ``text_features`` says
    whether the frozen text encoder computes in each step. ``work`` is that of an earlier plan of the same run.

    Raises UserError for a run that is not ITIT's, an unknown device or sizes, or rows that the devices cannot share.
    """
    if not isinstance(run, ItitRun):
        raise UserError(f"{recipe}: a plan can be made for the recipes itit-* only")
    if device != "cpu" and device not in HARDWARE:
        raise UserError(f"--device {device}: choose cpu, {', '.join(HARDWARE)}")
    if devices < 1 or not 0 < utilization <= 1:
        raise UserError("--devices must be at least 1, and --utilization above 0 and at most 1")
    train = run.train
    if train.batch_size % (devices * train.grad_accum_steps):
        raise UserError(
            f"a batch of {train.batch_size} rows cannot be shared by {devices} devices and {train.grad_accum_steps} "
            "micro-batches: change --train.batch-size"
        )
    hardware = this_cpu() if device == "cpu" else HARDWARE[device]
    work = work or count(run, text_features=text_features)
    operations = {name: value * train.batch_size for name, value in work.operations.items()}
    local = train.batch_size // devices
    rate, seen = utilization * hardware.peak * devices, train.steps * train.batch_size * work.images
    times = {
        "compute": sum(operations.values()) / rate,
        "all-reduce": _exchange_seconds(4 * work.parameters, devices, hardware, sharded=train.parallel == "fsdp"),
        "data reading": local * (work.rows_read * _ROW_SECONDS + work.bytes_read / _DISK),
        "image encoding": min(images, seen) * work.encoding / rate / train.steps,
    }
    memory = _memory(run, work, devices=devices, rows=local // train.grad_accum_steps, on_cpu=device == "cpu")
    # The exchange and the reading go on beside the computation; images are encoded before it.
    step = max(times["compute"], times["all-reduce"], times["data reading"])
    first = max(times, key=times.__getitem__)
    if memory[train.parallel]["all"] > hardware.memory:
        other = next((name for name, parts in memory.items() if parts["all"] <= hardware.memory), None)
        mend = f"--train.parallel {other}" if other else "--train.grad-accum-steps or --train.checkpoint-activations"
        first = f"memory ({train.parallel} does not fit: {mend})"
    return Plan(
        recipe=recipe,
        device=device,
        devices=devices,
        batch_size=train.batch_size,
        steps=train.steps,
        utilization=utilization,
        parameters=work.parameters,
        frozen_parameters=work.frozen,
        operations=operations,
        memory=memory,
        memory_of_device=hardware.memory,
        seconds=times,
        step_seconds=step,
        run_days=step * train.steps / 86400,
        bottleneck=first,
        work=work,
    )


def _exchange_seconds(size: int, devices: int, hardware: Hardware, *, sharded: bool) -> float:
    """Of ``size`` bytes of gradients around a ring; fsdp gathers the weights twice and sums the gradients once."""
    if devices == 1:
        return 0.0
    passes = 3 if sharded else 2
    return passes * (devices - 1) / devices * size / (hardware.link if devices <= NODE else hardware.network)


def _memory(run: ItitRun, work: Work, *, devices: int, rows: int, on_cpu: bool) -> dict[str, dict[str, float]]:
    """Bytes on each device; ``rows`` are those of a micro-batch."""
    config = run.train
    copies = 1 + (config.ema is not None) + (run.objective.cycle_network == "ema")
    whole = {
        "weights": 4.0 * copies * work.parameters,
        "text encoder": (4.0 if on_cpu else 2.0) * work.frozen,
        "gradients": 4.0 * work.parameters,
        "moments": 4.0 * work.moments,
    }
    # Mixed precision keeps most numbers in two bytes.
    kept = work.kept * rows * (1.0 if on_cpu else 0.5)
    found = {"ddp": whole | {"activations": kept}}
    if devices > 1:
        group = config.shard_group or devices
        gathered = 4.0 * (work.in_no_block + work.largest_block)
        parts = {name: value / group for name, value in whole.items()}
        found["fsdp"] = parts | {"gathered": gathered, "activations": kept}
    return {name: {"all": sum(parts.values())} | parts for name, parts in found.items()}


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{1e3 * seconds:,.3g} ms"


# Counting


class _TextEncoderOnPaper(TextEncoder):
    """A text encoder without numbers and without a tokenizer, which only computes features."""

    def __init__(self, t5: "transformers.T5EncoderModel", kind: FeatureKind) -> None:
        nn.Module.__init__(self)
        self.t5, self.feature_kind, self.network_width = t5.requires_grad_(False), kind, t5.config.d_model
        self.register_buffer("banned_V", torch.zeros(len(self.embedding.weight), dtype=torch.bool, device="meta"))

    def features_from_embeddings(
        self, embeds_BLE: Float[Tensor, "B L E"], valid_BL: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L F"]:
        found = self._hidden(embeds_BLE, valid_BL)  # the meta device has no autocast to switch off
        return torch.cat([found, embeds_BLE], -1) if self.feature_kind == "output_and_embeddings" else found


def _text_encoder(run: ItitRun) -> _TextEncoderOnPaper:
    """By the stage that trains it, a T5 v1.1 by its name, or a folder of a T5."""
    import transformers

    name = run.text_encoder
    if name is None:
        model = run.text_encoder_stage.model
        config = model.t5(vocab_real=model.vocab_size)
    elif found := re.search(r"t5-v1_1-(small|base|large|xl|xxl)$", name):
        width, inner, layers, heads = _T5[found[1]]
        config = transformers.T5Config(
            vocab_size=32128, d_model=width, d_kv=64, d_ff=inner, num_layers=layers, num_heads=heads,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
    elif (Path(name) / "config.json").is_file():
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type != "t5":
            raise UserError(f"--text-encoder {name}: a plan can be made with a T5 only, or without this option")
    else:
        raise UserError(f"--text-encoder {name}: its sizes are not known: give a folder of a T5, or google/t5-v1_1-xxl")
    with torch.device("meta"):
        t5 = transformers.T5EncoderModel(config).eval()
    t5.set_attn_implementation("sdpa")
    return _TextEncoderOnPaper(t5, run.model.text_input)


def objective_on_paper(run: ItitRun) -> tuple[ItitObjective, ImageTokenizer]:
    """The objective and the image tokenizer of ``run`` on the meta device.

    A tokenizer that is given by name is taken to have the sizes of the one that would be trained without it.
    """
    text_encoder = _text_encoder(run)
    with torch.device("meta"):
        tokenizer = ImageTokenizer.from_config(run.tokenizer_stage.model)
        config = replace(
            run.model,
            image_tokens=tokenizer.tokens,
            codebook_size=tokenizer.codebook_size,
            text_features=text_encoder.width,
            vocab_size=len(text_encoder.banned_V),
            image_features=0 if run.image_encoder is None else _ENCODER_WIDTH,
        )
        head = None
        if run.teacher is not None:
            head = AlignmentHead(torch.zeros(2, _ENCODER_WIDTH), width=config.width)
        objective = ItitObjective(ITIT(config), text_encoder, run.objective, teacher_head=head)
    objective.train()
    return objective, tokenizer


def count(run: ItitRun, *, text_features: Literal["computed", "cached"] = "computed") -> Work:
    """What a row of the batch of ``run`` takes, all of its texts at their largest length."""
    objective, tokenizer = objective_on_paper(run)
    if run.train.checkpoint_activations:
        checkpoint_activations(objective.model)
    config, text_encoder = objective.model.config, objective.text_encoder
    kept: dict[float, dict[int, torch.UntypedStorage]] = {1.0: {}, run.objective.cycle_share: {}}
    operations: dict[str, float] = {}
    for name, share, make in _losses(objective, encoder_counts=text_features == "computed"):
        with _counted(operations, name, share), _kept(kept[share], objective):
            loss = make()
        with _counted(operations, name, share):
            if loss is not None:
                loss.backward()
    encoding: dict[str, float] = {}
    with _counted(encoding, "image"), torch.no_grad():
        size = tokenizer.image_size
        tokenizer.latents(torch.zeros(_ROWS, 3, size, size, device="meta"))
        torch.zeros(_ROWS * tokenizer.tokens, tokenizer.codebook.shape[1], device="meta") @ tokenizer.codebook.T
    trained = [p for p in objective.parameters() if p.requires_grad]
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks(objective.model)]
    parameters = sum(p.numel() for p in trained)
    streams = objective.streams
    images = streams["pairs"] + streams.get("images", 0)
    texts = streams["pairs"] + streams.get("texts", 0)
    features = 2 * config.max_text_len * text_encoder.width if text_features == "cached" else 0
    further = 2 * _ENCODER_WIDTH * ((run.image_encoder is not None) + (run.teacher is not None))
    uses_encoder = text_features == "computed" or run.objective.images != "off"
    return Work(
        operations={name: round(value / _ROWS) for name, value in operations.items()},
        kept=round(sum(share * each.nbytes() for share, found in kept.items() for each in found.values()) / _ROWS),
        parameters=parameters,
        in_no_block=parameters - sum(inside),
        largest_block=max(inside),
        moments=sum(_moments(p, run.optim.name) for p in trained),
        frozen=sum(p.numel() for p in text_encoder.parameters()) if uses_encoder else 0,
        encoding=round(encoding["image"] / _ROWS),
        bytes_read=images * (4 * config.image_tokens + further) + texts * (4 * config.max_text_len + features),
        rows_read=sum(streams.values()),
        images=images,
    )


_Loss = Callable[[], Tensor | None]
"""Computes a loss; None: there is no gradient."""


def _losses(objective: ItitObjective, *, encoder_counts: bool) -> Iterator[tuple[str, float, _Loss]]:
    """The losses of a step with its cycles, each with the stream that it is counted for, and the share of its rows."""
    config, c = objective.config, objective.model.config
    rng, text_encoder = StepRNG(0, 0), objective.text_encoder

    def numbers(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device="meta")

    ids_BL, valid_BL = numbers(_ROWS, c.max_text_len), numbers(_ROWS, c.max_text_len, dtype=torch.bool)
    tokens_BN = numbers(_ROWS, c.image_tokens)
    features_BLF = numbers(_ROWS, c.max_text_len, text_encoder.width, dtype=torch.float32)
    further: dict[str, Any] = {}
    if c.image_features:
        further["image_features_BG"] = numbers(_ROWS, c.image_features, dtype=torch.float32)
    if objective.teacher_head is not None:
        further["teacher_features_BT"] = numbers(_ROWS, _ENCODER_WIDTH, dtype=torch.float32)
    images = ImageTokenExamples(tokens_BN=tokens_BN, **further)
    texts = TextExamples(ids_BL=ids_BL, valid_BL=valid_BL, features_BLF=features_BLF)
    pairs = PairExamples(tokens_BN=tokens_BN, ids_BL=ids_BL, valid_BL=valid_BL, features_BLF=features_BLF, **further)

    def encode_texts() -> None:
        text_encoder.features(ids_BL, valid_BL)

    weights, share = config.weights, config.cycle_share
    if weights.t2i:
        yield "pairs", 1.0, lambda: objective.t2i_loss(pairs, rng)
        if encoder_counts:
            yield "text encoder", 1.0, encode_texts
    yield "pairs", 1.0, lambda: torch.stack([*objective.i2t_and_i2i_losses(pairs, rng).values()]).sum()
    if objective.teacher_head is not None:
        yield "pairs", 1.0, lambda: objective.teacher_loss(pairs, rng, "pairs")
        if "images" in objective.streams:
            yield "images", 1.0, lambda: objective.teacher_loss(images, rng, "images")
    if config.texts != "off" and encoder_counts:
        yield "text encoder", share, encode_texts
    if weights.t2t:
        yield "texts", 1.0, lambda: objective.t2t_loss(texts)
    if config.texts != "off" and objective.model.image_features is not None:
        yield "texts", share, lambda: objective.t2i2t_loss(texts, rng)
    elif config.texts != "off":
        yield "texts", share, lambda: _generate_images(objective, texts)
        yield "texts", share, lambda: objective.t2i2t_loss_from_images(tokens_BN, texts, features_BLF, rng)
    if weights.unpaired_i2i:
        yield "images", 1.0, lambda: objective.unpaired_i2i_loss(images, rng)
    if config.images != "off":
        yield "images", share, lambda: _generate_texts(objective, images)
        yield "images", share, lambda: objective.i2t2i_loss_from_texts(ids_BL, images, rng)


@torch.no_grad()
def _generate_images(objective: ItitObjective, texts: TextExamples) -> None:
    """The passes of the parallel decoding inside T2I2T, which asks tensors for values and so cannot be run itself."""
    model, config = objective.model, objective.config.image_generation
    rows, positions = len(texts), model.config.image_tokens
    hidden_BN = torch.zeros(rows, positions, dtype=torch.bool, device="meta")
    tokens_BN = torch.zeros(rows, positions, dtype=torch.long, device="meta")
    for step in range(config.steps):
        known = positions - math.floor(positions * math.cos(math.pi / 2 * step / config.steps))
        keep_BK = tokens_BN[:, : entering(known, positions, config.drop)]
        for features in (texts.features_BLF, None) if config.guidance else (texts.features_BLF,):
            valid = None if features is None else texts.valid_BL
            encoded = model.encode(model.embed_image(tokens_BN), Masking(hidden_BN, keep_BK), features, valid)
            model.image_logits(encoded, hidden_BN, wanted_BM=tokens_BN[:, known:])


@torch.no_grad()
def _generate_texts(objective: ItitObjective, images: ImageTokenExamples) -> None:
    """The passes of the greedy decoding inside I2T2I: one over all positions, as each is computed once."""
    prefix = objective.model.caption_prefix(images.tokens_BN, images.image_features_BG)
    ids = torch.zeros(len(images), objective.model.config.max_text_len, dtype=torch.long, device="meta")
    objective.model.text_logits(prefix, ids)


@contextmanager
def _counted(found: dict[str, float], name: str, share: float = 1.0) -> Iterator[None]:
    with FlopCounterMode(display=False) as counter:
        yield
    found[name] = found.get(name, 0) + share * counter.get_total_flops()


@contextmanager
def _kept(found: dict[int, torch.UntypedStorage], objective: ItitObjective) -> Iterator[None]:
    """Add what is kept for the backward pass, by its place in memory; weights count elsewhere.

    The weights of the attention are left out: fused kernels do not keep them.
    """
    c = objective.model.config
    heads = {c.width // c.heads, c.text_decoder_width // c.text_decoder_heads}
    weights = {p.untyped_storage()._cdata for p in objective.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        is_attention = tensor.ndim == 4 and not heads & set(tensor.shape[-2:])
        if place not in weights and not is_attention:
            found[place] = tensor.untyped_storage()  # held, as a storage that is freed gives its place to another one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _moments(parameter: Tensor, optimizer: str) -> int:
    """Numbers that the optimizer keeps: two for each weight, or one and the sums of rows and columns."""
    if optimizer == "adamw" or parameter.ndim < 2:
        return 2 * parameter.numel()
    return parameter.numel() + len(parameter) + parameter[0].numel()
