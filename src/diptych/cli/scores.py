"""The command that scores a run of any kind."""

from pathlib import Path

from diptych.cli.arguments import Device, Run
from diptych.errors import UserError


def evaluate(
    run: Run,
    *,
    data: str,
    limit: int | None = None,
    beams: int | None = None,
    seed: int = 0,
    features: str | None = None,
    train: str | None = None,
    umap: bool = False,
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Score a run on data it has not seen: a table, metrics.json and a sheet.

    ITIT: captions and pictures, on captioned images. An image tokenizer: what it keeps of images. A classifier: its
    accuracy. A dual encoder: retrieval and modality gap on captioned images, zero-shot classes on labelled ones.

    Args:
        run: Run folder.
        data: Images that the run has not seen, with captions or labels: any source.
        limit: Score the first so many only. Scores of different subsets are not comparable.
        beams: ITIT: beams for the captions. Default: the run's own.
        seed: ITIT: of the drawn pictures.
        features: For the Frechet distance: folder or hub name of a vision model of transformers, or a TorchScript file
            (an Inception network gives FID). Default: a random network, which needs no download.
        train: Dual encoder: labelled images to fit a linear probe to.
        umap: Dual encoder: also draw a map of the embeddings, umap.png; needs the extra `umap`.
        out: Folder for metrics.json and pictures. Default: RUN/evaluation.
        device: Where to compute.
    """
    from diptych.recipes.folders import kind_of

    out, kind = out or run / "evaluation", kind_of(run)
    if kind == "dual":
        from diptych.recipes.dual_evaluation import evaluate_dual_run

        evaluate_dual_run(run, data, train=train, umap=umap, limit=limit, out=out, device=device)
        return
    from diptych.data.sources import open_source

    source = open_source(data)
    if kind == "classifier":
        from diptych.recipes.uml_runs import evaluate_classifier_run

        evaluate_classifier_run(run, source, out=out, device=device)
        return
    from diptych.eval.generation import EvaluateConfig
    from diptych.recipes.runs import evaluate_run, evaluate_tokenizer_run

    if kind == "tokenizer":
        evaluate_tokenizer_run(run, source, limit=limit, features=features, out=out, device=device)
        return
    if kind != "itit":
        raise UserError(f"{run}: a {kind} has no scores of its own: evaluate the run that uses it")
    config = EvaluateConfig(limit=limit, beams=beams, seed=seed)
    evaluate_run(run, source, config, features=features, out=out, device=device)
