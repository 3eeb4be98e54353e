"""Every objective, tiny and without dropout, and what training it takes; also run by torchrun:

every_objective.py OUT JSON [STEPS]: trains each one that JSON names, with the settings it gives, in OUT/NAME.
"""

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from toy_objective import config, optim

from diptych.data.batch import (
    Batch,
    ImageExamples,
    ImageTokenExamples,
    LabelledVectorExamples,
    PairExamples,
    SequenceExamples,
    TextExamples,
)
from diptych.itit.generation import ImageGenerationConfig
from diptych.itit.model import ITIT, ItitConfig
from diptych.itit.objective import ItitObjective, ItitObjectiveConfig
from diptych.rng import StepRNG, derive_seed
from diptych.tokenizers.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from diptych.tokenizers.span_corruption import SpanCorruption, TextEncoderConfig
from diptych.tokenizers.text_tokenizer import train_tokenizer
from diptych.tokenizers.vqgan import VQGAN, CodebookConfig, VQGANConfig
from diptych.train.loop import train
from diptych.train.objective import Objective
from diptych.uml.objective import SharedHead, SharedHeadConfig, UmlConfig, UmlObjective
from diptych.uml.self_supervised import SharedTransformer, SharedTransformerConfig, UmlSsl, UmlSslConfig

sys.path.append(str(Path(__file__).parents[1] / "dual"))
import dual_objectives

ROWS, STEPS = 8, 4
TEXTS = [
    f"a {c} {s} above a {d} star" for c in ("red", "green", "blue") for d in ("red", "blue") for s in ("cross", "ring")
]
SPANS = TextEncoderConfig(width=16, layers=2, decoder_layers=1, heads=2, feed_forward=16, sentinels=6)


def spans() -> SpanCorruption:
    return SpanCorruption(train_tokenizer(TEXTS, vocab_size=128, sentinels=6), config=SPANS)


def itit(**fields: Any) -> ItitObjective:
    encoder = spans().text_encoder()
    sizes = {"width": 16, "depth": 2, "heads": 2, "image_decoder_depth": 2, "text_decoder_width": 16}
    sizes |= {"text_decoder_depth": 2, "text_decoder_heads": 2, "text_features": encoder.width}
    torch.manual_seed(0)
    model = ITIT(
        ItitConfig(
            image_tokens=16, codebook_size=20, max_text_len=12, vocab_size=encoder.vocab_rows, dropout=0.0, **sizes
        )
    )
    fast = ImageGenerationConfig(steps=3, guidance=0.0, temperature=4.0)
    return ItitObjective(model, encoder, ItitObjectiveConfig(cycle_start_step=1, image_generation=fast, **fields))


def vqgan() -> VQGAN:
    sizes = ImageTokenizerConfig(
        image_size=16, codebook_size=32, code_dim=4, widths=(8, 16), blocks=1, groups=4, patch=2
    )
    seeded = CodebookConfig(start=0.25, reset_every=2)
    gan = VQGANConfig(
        adversarial_weight=0.5, adversarial_start=0, discriminator_width=8, discriminator_layers=1, codebook=seeded
    )
    return VQGAN(ImageTokenizer.from_config(sizes), gan, steps=STEPS)


def uml() -> UmlObjective:
    torch.manual_seed(0)
    head = SharedHead(SharedHeadConfig(widths={"image": 6, "text": 4}, classes=3, features="raw", projection="random"))
    return UmlObjective(head, UmlConfig(aux_weight=0.5), target="image")


def uml_ssl() -> UmlSsl:
    torch.manual_seed(0)
    model = SharedTransformer(
        SharedTransformerConfig(features={"image": 5, "text": 3}, width=16, depth=2, heads=2, dropout=0.0)
    )
    return UmlSsl(model, UmlSslConfig(aux_start_step=2), target="image")


MAKE: dict[str, Callable[[], Objective]] = {
    "itit": itit,
    "itit-averaged": partial(itit, cycle_network="ema", cycle_network_decay=0.5),
    "vqgan": vqgan,
    "text-encoder": spans,
    "uml": uml,
    "uml-ssl": uml_ssl,
}
MAKE |= {name: partial(dual_objectives.objective, name) for name in ("clip", "siglip", "slip", "ito")}
MAKE["clip-chunks"] = partial(dual_objectives.objective, "clip", chunk=3)


def rows_of(objective: Any, step: int) -> dict[str, Any]:
    """All rows of a step, by stream."""
    generator = torch.Generator().manual_seed(derive_seed("rows", step))
    number = partial(torch.randint, generator=generator)
    if "model" in vars(objective)["_modules"] and hasattr(objective.model, "tokenize"):
        return dual_objectives.batch(objective).streams
    if isinstance(objective, VQGAN):
        return {"images": ImageExamples(pixels_B3HW=number(256, (ROWS, 3, 16, 16)).to(torch.uint8))}
    if isinstance(objective, UmlObjective):
        return {
            name: LabelledVectorExamples(
                vectors_BD=torch.randn(ROWS, width, generator=generator), labels_B=number(3, (ROWS,))
            )
            for name, width in objective.head.config.widths.items()
        }
    if isinstance(objective, UmlSsl):
        return {
            name: SequenceExamples(
                features_BSF=torch.randn(ROWS, 5, width, generator=generator),
                valid_BS=torch.arange(5) < number(1, 6, (ROWS, 1)),
            )
            for name, width in objective.model.config.features.items()
        }
    tokenizer = objective.text_encoder if isinstance(objective, ItitObjective) else spans().text_encoder()

    def texts(rows: int) -> dict[str, torch.Tensor]:
        chosen = [TEXTS[i] for i in number(len(TEXTS), (rows,)).tolist()]
        ids, valid = tokenizer.tokenize(chosen, length=12)
        return {"ids_BL": ids, "valid_BL": valid}

    if isinstance(objective, SpanCorruption):
        return {"texts": TextExamples(**texts(ROWS))}
    return {
        "pairs": PairExamples(tokens_BN=number(20, (2 * ROWS, 16)), **texts(2 * ROWS)),
        "images": ImageTokenExamples(tokens_BN=number(20, (ROWS, 16))),
        "texts": TextExamples(**texts(ROWS)),
    }


def fit(name: str, out: Path, *, steps: int = STEPS, **changes: Any) -> Objective:
    """Train one of them in ``out``."""
    objective = MAKE[name]()

    def batches(step: int, rank: int, world: int) -> Batch:
        streams = {}
        for stream, rows in rows_of(made, step).items():
            share = len(rows) // world
            streams[stream] = rows[rank * share : (rank + 1) * share]
        return Batch(rng=StepRNG(0, step, rank, world), streams=streams)

    made = MAKE[name]()
    rule = changes.pop("optimizer", "adamw")
    settings = config(steps=steps, batch_size=ROWS, **changes)
    train(objective, batches, out=out, train=settings, optim=optim(name=rule, lr=1e-3))
    return objective


def main(out: Path, wanted: Mapping[str, dict[str, Any]], steps: int) -> None:
    for folder, settings in wanted.items():
        fit(folder.split("=")[0], out / folder, steps=steps, **settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else STEPS)
