"""What a training step of each objective costs, as a ratio to CLIP's at the same batch: time and memory.

    python benchmarks/ito_cost.py [--sizes tiny small vit_s_16 vit_b_16] [--objectives clip ito-0 ito ...] [--json FILE]

Time: forward and backward in bf16, a step of each objective in turn; the median over rounds of the ratio to CLIP in the
same round. Each objective has a process of its own and has warmed up, as in training: objectives that share a process
fragment each other's heap, and the largest pays for it with page faults. On a CPU it is CPU time, which other programs
disturb less than the clock. A step includes making the views, but not decoding the images.

Memory: fp32 weights, gradients and two moments, and all that is saved for the backward pass, in bf16 and with each
storage counted once, for 256 rows: a line through two small batches. That is what is held when the backward pass
begins, not an allocator's peak.

Fails if ITO takes more than 2.0 times the time or 1.7 times the memory of CLIP with ViT-S/16 or ViT-B/16. The towers of
`tiny` are so shallow that one block of fusion weighs as much as half of them.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from diptych.data.augment import ViewConfig
from diptych.data.batch import Batch, CaptionedImageExamples
from diptych.dual.ito import ItoConfig
from diptych.dual.model import DualEncoder, DualEncoderConfig, train_clip_tokenizer
from diptych.dual.objective import ClipConfig, PairsConfig, SlipConfig
from diptych.rng import StepRNG

OBJECTIVES = ("clip", "clip-aug", "siglip", "slip", "ito-0", "ito", "ito, not lean")
SIZES = {
    "tiny": DualEncoderConfig.tiny,
    "small": DualEncoderConfig.small,
    "vit_s_16": DualEncoderConfig.vit_s_16,
    "vit_b_16": DualEncoderConfig.vit_b_16,
}
ROWS = {"tiny": 128, "small": 64, "vit_s_16": 32, "vit_b_16": 16}
JUDGED = ("vit_s_16", "vit_b_16")
TIME_BAR, MEMORY_BAR, MEMORY_ROWS = 2.0, 1.7, 256
WARM_UP = 4  # steps until a process has the memory that it needs


def objective_config(name: str, width: int) -> PairsConfig:
    """The settings of an objective on towers whose common space has this width."""
    configs: dict[str, PairsConfig] = {
        "clip": ClipConfig(),
        "clip-aug": ClipConfig(augment=ViewConfig()),
        "siglip": ClipConfig(loss="sigmoid"),
        "slip": SlipConfig(hidden=8 * width, projected=width // 2),
        "ito-0": ItoConfig(fusion_weight=0.0),
        "ito": ItoConfig(),
        "ito, not lean": ItoConfig(lean=False),
    }
    return configs[name]


def build(name: str, size: str, device: str) -> nn.Module:
    config = SIZES[size]()
    tokenizer = train_clip_tokenizer(["the same words again and again"] * 3, vocab_size=600, length=77)
    model = DualEncoder.from_config(config, tokenizer, seed=0)
    # The batch holds random ids; the table has the size of a real vocabulary.
    model.clip.text_model.embeddings.token_embedding = nn.Embedding(config.vocab_size, config.text_width)
    model.tune_for_training()
    return objective_config(name, model.width).build(model).to(device)


def batch_for(objective: nn.Module, *, rows: int, length: int, device: str) -> Batch:
    """Random images, and texts of which the longest has ``length`` tokens and the shortest half as many."""
    generator = torch.Generator().manual_seed(0)
    side, length = objective.model.image_size * 3 // 2, min(length, objective.model.max_text_len)
    lengths_B = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    lengths_B[0] = length
    pairs = CaptionedImageExamples(
        pixels_B3HW=torch.randint(256, (rows, 3, side, side), dtype=torch.uint8, generator=generator),
        ids_BL=torch.randint(500, (rows, length), generator=generator),
        valid_BL=torch.arange(length) < lengths_B[:, None],
    )
    return Batch(rng=StepRNG(0, 0), streams={"pairs": pairs}).to(device)


def loss_of(objective: nn.Module, batch: Batch, device: str) -> torch.Tensor:
    with torch.autocast(device, torch.bfloat16):
        return objective(batch, 0).total


def seconds(objective: nn.Module, batch: Batch, device: str) -> float:
    def clock() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    began = clock()
    loss_of(objective, batch, device).backward()
    took = clock() - began
    objective.zero_grad()
    return took


def saved_bytes(objective: nn.Module, batch: Batch, device: str) -> int:
    """Of all storages that the backward pass will read, except parameters."""
    seen: dict[int, torch.Tensor] = {}
    parameters = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # an output that held its own graph would never be freed
        seen[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(objective, batch, device)
    total = sum(t.untyped_storage().nbytes() for place, t in seen.items() if place not in parameters)
    del loss
    return total


def gigabytes(objective: nn.Module, *, length: int, device: str) -> float:
    few, more = (
        saved_bytes(objective, batch_for(objective, rows=r, length=length, device=device), device) for r in (2, 4)
    )
    slope = (more - few) / 2
    weights = sum(p.numel() for p in objective.parameters())
    return (few + slope * (MEMORY_ROWS - 2) + 16 * weights) / 2**30


def serve(parent: Connection, name: str, size: str, options: argparse.Namespace) -> None:
    """Sends its gigabytes once it is warm, and then the seconds of a step whenever it is asked."""
    objective = build(name, size, options.device)
    memory = gigabytes(objective, length=options.length, device=options.device)
    rows = options.rows or ROWS[size]
    batch = batch_for(objective, rows=rows, length=options.length, device=options.device)
    for _ in range(WARM_UP):
        seconds(objective, batch, options.device)
    parent.send(memory)
    while parent.recv() == "step":
        parent.send(seconds(objective, batch, options.device))


def measure(size: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    context, ends, memory = multiprocessing.get_context("spawn"), {}, {}
    for name in options.objectives:
        ends[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, name, size, options)).start()
        theirs.close()  # so that the end of a child that dies is noticed
        memory[name] = ends[name].recv()

    def step(name: str) -> float:
        ends[name].send("step")
        return ends[name].recv()

    rounds = [{name: step(name) for name in ends} for _ in range(options.rounds)]
    for end in ends.values():
        end.send("stop")
    return {
        name: {
            "time": statistics.median(each[name] / each["clip"] for each in rounds),
            "memory": memory[name] / memory["clip"],
            "seconds": statistics.median(each[name] for each in rounds),
            "gigabytes": memory[name],
        }
        for name in ends
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["clip", "ito-0", "ito"])
    parser.add_argument("--length", type=int, default=77, help="tokens of the longest text")
    parser.add_argument("--rows", type=int, help="for the time; default: 128, 64, 32 and 16 by size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not {"clip", "ito"} <= {*options.objectives}:
        parser.error("--objectives must name clip and ito")
    found = {}
    for size in options.sizes:
        found[size] = measure(size, options)
        print(size)
        for name, each in found[size].items():
            ratios = f"time x{each['time']:.2f} ({each['seconds']:.2f} s)  memory x{each['memory']:.2f}"
            print(f"  {name:14}{ratios} ({each['gigabytes']:.1f} GB)", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    over = [
        f"{size} {what} x{found[size]['ito'][what]:.2f}"
        for size in JUDGED
        if size in found
        for what, bar in (("time", TIME_BAR), ("memory", MEMORY_BAR))
        if found[size]["ito"][what] > bar
    ]
    print(f"verdict: ITO is {'over the bar: ' + ', '.join(over) if over else 'within 2.0x time and 1.7x memory'}")
    sys.exit(bool(over))


if __name__ == "__main__":
    main()
