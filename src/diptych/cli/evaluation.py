"""Commands that score finished runs: on data they have not seen, and over a grid of settings of their generation.

Imports are inside the functions, after all arguments have been looked at: --help and mistakes answer at once.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from diptych.cli.inference import Device, Precision, RunArg, SourceArg, at_least_one, share_of_image
from diptych.errors import UserError
from diptych.run_folder import check_finished, kind_of


def evaluate(
    run: RunArg,
    *,
    data: str,
    protocol: Literal["coco-karpathy", "coco-fid30k"] | None = None,
    cycles: int | None = None,
    against: tuple[Path, ...] = (),
    limit: int | None = None,
    beams: int | None = None,
    visible: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    captions_only: bool = False,
    features: str | None = None,
    baseline_encoder: str | None = None,
    train: str | None = None,
    classes: Path | None = None,
    umap: bool = False,
    max_skipped_share: float = 0.01,
    out: Path | None = None,
    precision: Precision = "auto",
    device: Device = "auto",
) -> None:
    """Score a run on data it has not seen: a table, metrics.json and a sheet.

    An ITIT run is scored on captioned images by its captions and the images it generates, an image tokenizer by how
    well it reconstructs images, a classifier by its accuracy on labelled images. A dual encoder is scored by retrieval
    and modality gap on captioned images and by zero-shot classification on labelled ones. Baselines are scored beside
    the run; they learn in seconds from the data that the run has learned from.

    Args:
        run: Run folder of any recipe but text-encoder and uml-ssl.
        data: Source of images with captions or labels that the run has not seen.
        limit: Number of images to score, the first of the source. Scores of different subsets are not comparable.
            Default: all; of `scenes:` without a count, 1,000.
        protocol: ITIT: protocol of published numbers. coco-karpathy scores captions by 4 beams against all references;
            coco-fid30k scores 30,000 images generated from captions that --seed draws. The protocol is printed and
            written in full.
        cycles: ITIT: number of rounds of cycle generation to score instead, each against the start of its cycle.
        against: ITIT: further runs whose cycles are scored and drawn in the same figure, such as one on the pairs
            alone.
        beams: ITIT: number of beams of the search for captions; 1 is greedy. Default: the setting of the run.
        visible: ITIT: share of the image tokens that captions are read from. Default: the setting of the run.
        steps: ITIT: number of steps of parallel decoding of an image. Default: the setting of the run.
        guidance: ITIT: strength of guidance towards the text; 0 is none. Default: the setting of the run.
        temperature: ITIT: scale of the noise in the order in which tokens are chosen. Default: the setting of the run.
        seed: ITIT: seed of the generated images.
        captions_only: ITIT: generate and score no images, which takes half of the time or less.
        features: ITIT, image tokenizer: network that gives the features of the Frechet distance: a folder or hub name
            of a vision model of transformers, a TorchScript file, or a .pth file of pytorch-fid (extra `fid`). The
            distance is called FID only with the weights of FID's Inception. Default: a random network, which needs no
            download.
        baseline_encoder: ITIT, dual encoder: pretrained image encoder, by folder, hub name or package, whose features
            also find the nearest images for the baselines. Default: that of an ITIT run, none for a dual encoder.
        train: Dual encoder: source of labelled images to fit a linear probe to.
        classes: Dual encoder: file with the name of a class per line, for labels that are numbers (of the lines, from
            0) or codes (`n01440764 tench`, or the names in the order of the sorted codes).
        umap: Dual encoder: a map of the embeddings, umap.png, beside the scores; needs the extra `umap`.
        max_skipped_share: Largest share of unreadable images that is left out without stopping, 0 to 1.
        out: Folder for metrics.json and the sheet. It must not hold earlier ones. Default: RUN/evaluation, or the first
            of RUN/evaluation-2, RUN/evaluation-3 ... that is free.
        precision: ITIT: precision of the network: auto is bf16 where the device multiplies it, else fp32; int8 is the
            fastest on a CPU and changes a few results.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    kind = kind_of(run)
    if kind not in ("dual", "classifier", "tokenizer", "itit"):
        raise UserError(f"{run}: a {kind} has no scores of its own: evaluate the run that uses it")
    check_finished(run, kind)
    at_least_one("--limit", limit)
    at_least_one("--beams", beams)
    at_least_one("--steps", steps)
    at_least_one("--cycles", cycles)
    share_of_image("--visible", visible)
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "temperature": temperature}
    generation = {name: value for name, value in given.items() if value is not None}
    if kind != "itit" and (protocol or cycles or generation or captions_only or visible or precision != "auto"):
        flags = "--protocol, --cycles, --visible, --steps, --guidance, --temperature, --captions-only and --precision"
        raise UserError(f"{run}: {flags} are for runs of an itit recipe")
    if against and not cycles:
        raise UserError("--against: runs are compared by their cycles: give --cycles too")
    if cycles and (protocol or beams):
        raise UserError("--cycles scores the run's own captions: leave --protocol and --beams away")
    if captions_only and (protocol or cycles or generation or features):
        flags = "--protocol, --cycles, --steps, --guidance, --temperature and --features"
        raise UserError(f"--captions-only scores no images: leave {flags} away")
    for other in against:
        check_finished(other, "itit")
    out = _free_folder(run, out)
    from diptych.data.sources import open_source

    if classes is not None and kind != "dual":
        raise UserError(f"{run}: --classes names classes for a dual encoder, and this is a run of kind {kind!r}")
    source = open_source(data)
    if kind == "dual":
        from diptych.dual.evaluation import evaluate_dual_run

        evaluate_dual_run(
            run,
            data,
            train=train,
            classes=classes,
            umap=umap,
            limit=limit,
            max_skipped_share=max_skipped_share,
            baseline_encoder=baseline_encoder,
            out=out,
            device=device,
        )
    elif kind == "classifier":
        from diptych.uml.classifier import evaluate_classifier_run

        evaluate_classifier_run(run, source, max_skipped_share=max_skipped_share, out=out, device=device)
    elif kind == "tokenizer":
        from diptych.data.pixels import SkippedItems
        from diptych.tokenizers.evaluation import evaluate_tokenizer_run

        skipped = SkippedItems(max_skipped_share=max_skipped_share)
        evaluate_tokenizer_run(run, source, limit=limit, features=features, skipped=skipped, out=out, device=device)
    else:
        from diptych.itit.evaluation import EvaluateConfig, evaluate_run

        config = EvaluateConfig(
            limit=limit, beams=beams, seed=seed, images=not captions_only, max_skipped_share=max_skipped_share
        )
        opening: dict[str, Any] = {"device": device, "precision": precision, "visible": visible}
        if generation:
            from diptych.itit.pipeline import generation_of

            config.image_generation = replace(generation_of(run)[0], **generation)
        if protocol is not None:
            from diptych.itit.protocols import evaluate_protocol

            evaluate_protocol(run, data, source, config, protocol=protocol, features=features, out=out, **opening)
        elif cycles is not None:
            from diptych.itit.protocols import evaluate_cycles

            evaluate_cycles([run, *against], data, source, config, rounds=cycles, features=features, out=out, **opening)
        else:
            evaluate_run(run, source, config, features=features, encoder=baseline_encoder, out=out, **opening)


def sweep(
    run: RunArg,
    source: SourceArg,
    *,
    out: Path,
    guidance: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0),
    temperature: tuple[float, ...] = (1.0, 4.0, 16.0, 32.0),
    beams: tuple[int, ...] = (1, 4, 8),
    length_power: tuple[float, ...] = (0.0, 0.6, 1.0),
    steps: int | None = None,
    limit: int = 500,
    seed: int = 0,
    features: str | None = None,
    device: Device = "auto",
) -> None:
    """Score an ITIT run over a grid of settings: temperature and guidance of images, beams and length of captions.

    Images are scored by the Frechet distance, captions by CIDEr-D, in a table and a figure of each. Give validation
    data as the source. A stopped command resumes when it is repeated.

    Args:
        run: Run folder of an itit recipe.
        source: Source of captioned images that the run has not seen, and on which it is not to be scored later.
        out: Folder for the scores and figures.
        guidance: Strengths of guidance of images; with none given, images are left out.
        temperature: Temperatures of images: noise in the order in which tokens are chosen.
        beams: Numbers of beams of captions; with none given, captions are left out.
        length_power: Powers of the length penalty of captions: larger ones favour longer captions.
        steps: Number of steps of an image. Default: the setting of the run.
        limit: Number of images, the first of the source.
        seed: Seed of the generated images.
        features: Features of the Frechet distance, as for `diptych evaluate`.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    check_finished(run, "itit")
    at_least_one("--steps", steps)
    if limit < 2:
        raise UserError(f"--limit {limit}: must be 2 or more, as one image gives no score")
    for number in beams:
        at_least_one("--beams", number)
    if not (guidance and temperature) and not (beams and length_power):
        raise UserError("nothing to sweep: give --guidance and --temperature, or --beams and --length-power")
    from diptych.data.sources import open_source

    opened = open_source(source)
    from diptych.itit.sweep import SweepConfig, sweep_run

    config = SweepConfig(
        guidance=guidance,
        temperature=temperature,
        beams=beams,
        length_power=length_power,
        steps=steps,
        limit=limit,
        seed=seed,
    )
    sweep_run(run, source, opened, config, features=features, out=out, device=device)


def _free_folder(run: Path, out: Path | None) -> Path:
    """The folder for the scores: ``out``, else the first of RUN/evaluation, evaluation-2 ... that holds none.

    Raises UserError where ``out`` holds the scores of an earlier evaluation.
    """
    if out is not None:
        if (out / "metrics.json").exists():
            raise UserError(f"{out}: holds the scores of an earlier evaluation: give another --out, or remove it")
        return out
    number, folder = 1, run / "evaluation"
    while (folder / "metrics.json").exists():
        number += 1
        folder = run / f"evaluation-{number}"
    return folder
