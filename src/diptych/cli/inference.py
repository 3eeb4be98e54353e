"""Commands on finished runs: generate images, embed, search, classify, export, and the page.

Imports are inside the functions, after all arguments have been looked at: --help and mistakes answer at once.
"""

import json as json_format  # commands have a parameter `json`
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from diptych.errors import UserError
from diptych.run_folder import check_finished, kind_of

if TYPE_CHECKING:
    from diptych.cli.images import ImageArguments
    from diptych.data.engine import Engine
    from diptych.itit.pipeline import Diptych
    from diptych.nn.inference import Prediction

Device = Literal["auto", "cpu", "cuda", "mps"]
"""As in nn/inference.py, which would import torch."""
Precision = Literal["auto", "fp32", "bf16", "int8"]
"""As InferencePrecision in nn/inference.py."""
EngineName = Literal["local", "ray"]
"""As in data/engine.py, which would import NumPy."""
RunArg = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
ImagesArg = Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE", help_behavior_hint="")]
SourceArg = Annotated[Positional[str], tyro.conf.arg(metavar="SRC")]


# Generate images: ITIT runs


def imagine(
    run: RunArg,
    texts: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT", help_behavior_hint="")],
    *,
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    temperature: float | None = None,
    precision: Precision = "auto",
    device: Device = "auto",
) -> None:
    """Generate an image for each text: PNG files and a contact sheet.

    Args:
        run: Run folder of an itit recipe.
        texts: Texts to generate images for.
        out: Folder for the images and the sheet.
        seed: Seed of the generated images; another seed gives other images.
        steps: Number of steps of parallel decoding. Default: the setting of the run.
        guidance: Strength of classifier-free guidance towards the text; 0 is none. Default: the setting of the run.
        temperature: Noise in the order in which tokens are chosen; 0 is none. Default: the setting of the run.
        precision: Precision of the ITIT network: auto is bf16 where the device multiplies it, else fp32; int8 is the
            fastest on a CPU and changes a few results.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    if not texts:
        raise UserError("no text given: diptych imagine RUN TEXT... --out DIR")
    check_finished(run, "itit")
    from diptych.cli.images import check_is_text

    for text in texts:
        check_is_text(text, instead="`diptych cycle --image FILE` starts from an image")
    at_least_one("--steps", steps)

    diptych = open_itit(run, device, precision)
    from diptych.report.sheet import contact_sheet, save_png

    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "temperature": temperature}
    config = replace(diptych.image_generation, **{name: value for name, value in given.items() if value is not None})
    images = list(diptych.imagine_pixels(texts, seed=seed, config=config))
    _make_room(out)
    for number, image in enumerate(images):
        save_png(out / f"{number:03d}.png", image)
    sheet = save_png(out / "sheet.png", contact_sheet(images, captions=list(texts)))
    print(f"written to {out}, all on {sheet}")


def cycle(
    run: RunArg,
    *,
    text: str | None = None,
    image: Path | None = None,
    rounds: int = 3,
    out: Path,
    seed: int = 0,
    precision: Precision = "auto",
    device: Device = "auto",
) -> None:
    """Go from text to image and back, or from image to text and back: PNG files and a strip of all steps.

    Args:
        run: Run folder of an itit recipe.
        text: Text to start from.
        image: Image file to start from instead.
        rounds: Number of rounds; each adds an image and a text.
        out: Folder for the images and the strip.
        seed: Seed of the generated images.
        precision: Precision of the ITIT network: auto is bf16 where the device multiplies it, else fp32; int8 is the
            fastest on a CPU and changes a few results.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    if (text is None) == (image is None):
        raise UserError("a cycle starts from a text or from an image: give one of them")
    check_finished(run, "itit")
    at_least_one("--rounds", rounds)
    if text is not None:
        from diptych.cli.images import check_is_text

        check_is_text(text, instead="give it as --image FILE")
    if image is not None:
        _check_is_there(image)

    diptych = open_itit(run, device, precision)
    from diptych.report.sheet import cycle_strip, save_png

    steps = [step.shown for step in diptych.cycle(text=text, image=image, rounds=rounds, seed=seed)]
    _make_room(out)
    for number, step in enumerate(steps):
        shown = step if isinstance(step, str) else save_png(out / f"{number:03d}.png", step)
        print(f"{number}: {shown}")
    print(f"all steps on {save_png(out / 'strip.png', cycle_strip(steps))}")


def open_itit(run: Path, device: Device, precision: Precision = "auto", visible: float | None = None) -> "Diptych":
    from diptych.itit.pipeline import Diptych

    return Diptych.from_pretrained(run, device=device, precision=precision, visible=visible)


def share_of_image(name: str, share: float | None) -> None:
    """Raises UserError for what is no share above 0 and at most 1."""
    if share is not None and not 0 < share <= 1:
        raise UserError(f"{name} {share:g}: give a share above 0 and at most 1")


def _check_is_there(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file}: {'is not a file' if file.exists() else 'does not exist'}")


def engine_of(name: EngineName, address: str | None, *, device: Device = "auto") -> "Engine":
    """Raises UserError where Ray is wanted and not installed, and for an address without it."""
    from diptych.data.engine import Engine

    engine = Engine(name=name, address=address, device=device)
    engine.check()
    return engine


def at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{name} {value}: must be 1 or more")


def _make_room(out: Path) -> None:
    """Makes the folder, and removes the numbered images of an earlier call, which would seem to be of this one."""
    out.mkdir(parents=True, exist_ok=True)
    earlier = [file for file in out.glob("*.png") if file.stem.isdigit() and len(file.stem) >= 3]
    for file in earlier:
        file.unlink()
    if earlier:
        print(f"{len(earlier)} images of an earlier call in {out} are replaced")


# Embed, search, classify, export: dual encoders, and the encoders and classifiers of UML


def embed(
    run: RunArg,
    source: SourceArg,
    *,
    out: Path,
    texts: bool = False,
    index: Literal["ivfpq"] | None = None,
    workers: int = 2,
    device: Device = "auto",
    engine: EngineName = "local",
    ray_address: str | None = None,
) -> None:
    """Embed all images of a source, for `diptych search`; a uml-ssl run embeds the features in a store.

    Args:
        run: Run folder of a dual encoder or of uml-ssl.
        source: Source of images or texts; for uml-ssl the folder of a store of features.
        out: Folder for the embeddings, which `diptych search` takes, or a .parquet file for a vector database. An
            earlier one is replaced.
        texts: Embed the texts of the source instead of its images.
        index: Also build an index for a fast search among millions of embeddings, in bounded memory: ivfpq of faiss
            (extra `ann`). `diptych search` uses it.
        workers: Number of threads that decode images.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
        engine: Where images are embedded: in this process, or by the workers of a Ray cluster (extra `ray`). The
            result is the same.
        ray_address: Address of the cluster. Default: that of RAY_ADDRESS, else one is started on this machine.
    """
    table = out.suffix.lower() == ".parquet"
    if table and index is not None:
        raise UserError(f"--index {index}: lies in a folder of embeddings: give --out a folder, not {out}")
    if check_finished(run, "dual", "feature encoder") == "feature encoder":
        if texts or table or index is not None or engine != "local":
            flags = "--texts, --index, --engine and .parquet files"
            raise UserError(f"{run}: {flags} are for dual encoders; a uml-ssl run embeds a store into a folder")
        from diptych.uml.self_supervised import embed_store

        print(f"{len(embed_store(run, Path(source), out=out, device=device)):,} embeddings in {out}")
        return
    working = engine_of(engine, ray_address, device=device)

    from diptych.data.sources import open_source

    open_source(source)  # what is wrong with it is told before the libraries are loaded
    from diptych.dual.search import build_ivfpq, embed_into_parquet, embed_run, import_faiss
    from diptych.report.terminal import ProgressLine

    side: Literal["images", "texts"] = "texts" if texts else "images"
    given: dict[str, Any] = {"side": side, "workers": workers, "device": device, "engine": working}
    if table:
        count, skipped = embed_into_parquet(out, run=run, spec=source, **given)
        listed = out.with_suffix(".skipped.jsonl")
    else:
        if index is not None:
            import_faiss()  # before the work, not after it
        store, skipped = embed_run(run, source, out=out, **given)
        count, listed = len(store), out / "skipped.jsonl"
    print(f"{count:,} {side} in {out}" + (f"; {skipped:,} skipped, see {listed}" if skipped else ""))
    if index is not None:
        print(f"index in {build_ivfpq(store, advance=ProgressLine('building the index'))}")


def search(
    run: RunArg,
    text: Annotated[Positional[str | None], tyro.conf.arg(metavar="TEXT")] = None,
    *,
    index: Path,
    image: Path | None = None,
    top: int = 10,
    method: Literal["exact", "approximate"] | None = None,
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Search for what is nearest to a text or an image: a line for each hit, with its cosine similarity.

    Args:
        run: Run folder of the dual encoder that made the index.
        text: Text to search for.
        index: Folder that `diptych embed` wrote.
        image: Image file to search for instead.
        top: Number of hits.
        method: Method of search. exact compares with every embedding, about half a second a million. approximate is
            for more than that and needs the extra `ann`; without `diptych embed --index` it builds an index on first
            use. Default: approximate where `embed --index` built one, else exact.
        out: PNG file for a sheet of the images that were found. Default: none is written.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    query = text if image is None else image
    if query is None or (text is not None and image is not None):
        raise UserError('search for a text or for an image: diptych search RUN --index STORE "TEXT", or --image IMAGE')

    check_finished(run, "dual")
    if isinstance(query, str):
        if not query.strip():
            raise UserError("an empty text finds nothing: say what to look for")
        from diptych.cli.images import check_is_text

        check_is_text(query, instead="give an image as --image FILE")
    else:
        _check_is_there(query)
    if top < 1:
        raise UserError(f"the best {top}: ask for one hit at least")
    if not index.is_dir():
        raise UserError(f"{index}: no such folder; `diptych embed` makes it")

    from diptych.dual.search import Index
    from diptych.report.sheet import save_png

    found = Index(run, index, device=device)
    hits = found.search(query, top=top, method=method)
    if out is not None:
        save_png(out, found.sheet(hits, query=query))
    for hit in hits:
        print(f"{hit.score:.3f}  {hit.key}")


def classify(
    run: RunArg,
    images: ImagesArg,
    *,
    classes: Path | None = None,
    templates: Path | None = None,
    top: int = 3,
    json: bool = False,
    device: Device = "auto",
) -> None:
    """Classify images: the most probable classes of each. A dual encoder needs the names of the classes alone.

    Args:
        run: Run folder of a classifier or a dual encoder.
        images: Image files, and sources with all their images: a folder, a table, tars, scenes:.
        classes: Dual encoder: file with the name of a class a line.
        templates: Dual encoder: file with a template a line, such as `a photo of a {}.` Default: a dozen of them.
        top: Number of classes to print for each image.
        json: Print one JSON object a line, with file and guesses.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    if not images:
        raise UserError("no image given: diptych classify RUN IMAGE...")
    kind = check_finished(run, "classifier", "dual")
    if top < 1:
        raise UserError(f"the best {top} classes: ask for one at least")
    if kind == "classifier" and (classes or templates):
        raise UserError(f"{run}: a classifier has learnt its classes: leave --classes and --templates away")
    for file in (classes, templates):
        if file is not None:
            _check_is_there(file)
    from diptych.cli.images import ImageArguments

    given = ImageArguments(images)

    for names, found in _classified(run, given, classes=classes, templates=templates, top=top, device=device):
        for name, predictions in zip(names, found, strict=True):
            if json:
                record = {"file": name, "guesses": [asdict(guess) for guess in predictions]}
                print(json_format.dumps(record, ensure_ascii=False), flush=True)
            else:
                guesses = ", ".join(f"{guess.name} {guess.probability:.1%}" for guess in predictions)
                print(f"{name}: {guesses}", flush=True)
    given.exit_if_any_was_left_out()


def _classified(
    run: Path, given: "ImageArguments", *, classes: Path | None, templates: Path | None, top: int, device: Device
) -> Iterator[tuple[list[str], list[list["Prediction"]]]]:
    """Names and predictions of the images, a few at a time."""
    if kind_of(run) == "classifier":
        from diptych.uml.classifier import Classifier

        classifier: Any = Classifier.from_pretrained(run, device=device)
    elif classes is None:
        raise UserError(f"{run}: a dual encoder knows no classes of its own: give --classes NAMES.txt")
    else:
        from diptych.dual.search import ZeroShotClassifier

        classifier = ZeroShotClassifier.open(run, classes=classes, templates=templates, device=device)
    from diptych.data.pixels import channels_first

    for names, pixels in given.batches(classifier.image_size):
        yield names, classifier.predictions(channels_first(pixels), top=top)


def export(run: RunArg, *, out: Path, format: Literal["open_clip", "onnx"] = "open_clip") -> None:
    """Export a dual encoder for open_clip, or its towers as ONNX. (RUN/model is what transformers reads.)

    Args:
        run: Run folder of a dual encoder.
        out: Folder for the exported model. Files of the same names are replaced.
        format: `open_clip` writes a folder that open_clip reads; CLIP alone, without pretrained towers. `onnx` writes
            image_encoder.onnx and text_encoder.onnx for any number of rows and any length of texts, and compares them
            with torch where onnxruntime is installed; needs the extra `onnx`.
    """
    check_finished(run, "dual")

    from diptych.dual.export import IMAGE_TOWER, TEXT_TOWER, save_onnx, save_open_clip
    from diptych.dual.model import open_dual

    if format == "onnx":
        difference = save_onnx(open_dual(run, device="cpu"), out)
        print(f"{out / IMAGE_TOWER}: pixel_values -> image_embeds")
        print(f"{out / TEXT_TOWER}: input_ids, attention_mask -> text_embeds")
        comparison = "not compared with torch: pip install onnxruntime"
        print(comparison if difference is None else f"largest difference from torch, in onnxruntime: {difference:.1e}")
        return
    save_open_clip(open_dual(run, device="cpu"), out)
    print(f'open_clip.create_model_and_transforms("local-dir:{out}")')


def push(
    run: RunArg,
    repo: Annotated[Positional[str | None], tyro.conf.arg(metavar="USER/NAME")] = None,
    *,
    license: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> None:
    """Upload a finished run to the Hugging Face Hub with a model card, in one commit.

    The card holds the counts of the data, the settings, and the scores beside baselines and controls, as far as the run
    folder has them. No addresses of data are uploaded, and no checkpoints. `from_pretrained("USER/NAME")` of the
    pipelines loads what was uploaded.

    Args:
        run: Run folder of an itit, clip, siglip, slip, ito, uml-probe or uml-finetune recipe.
        repo: Repository, which is made if it is not there.
        license: License in the card, by its name on the hub, such as `apache-2.0`. Default: none is named.
        private: Make the repository private, if it is made now.
        dry_run: Print the card and upload nothing.
    """
    from diptych.hub import card
    from diptych.hub import push as push_run

    if dry_run:
        print(card(run, repo_id=repo or "USER/NAME", license=license))
        return
    if repo is None:
        raise UserError(f"no repository given: diptych push {run} USER/NAME, or --dry-run to see the card")
    print(push_run(run, repo, private=private, license=license))


# The page: runs of any kind


def app(
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN", help_behavior_hint="")],
    *,
    index: tuple[Path, ...] = (),
    data: str | None = None,
    out: Path | None = None,
    sidecars: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str | None = None,
    device: Device = "auto",
) -> None:
    """Serve a local page to caption, generate, search, classify and label images with runs. Needs the extra `app`.

    The page has the tabs for which it is given something: Caption, Imagine and Cycle for an ITIT run; Classify for
    a dual encoder or a classifier; Search for a dual encoder with --index; Label for an ITIT run with --data; Audit for
    an ITIT run or a dual encoder with --data; Train for every run that has logged something, also while it trains.

    Args:
        runs: Run folders.
        index: Folders that `diptych embed` wrote.
        data: Source of images to label, or whose captions are to be audited.
        out: Folder for what users decide about --data: labels.jsonl, a source of captions, and keep.jsonl, for ?keep=.
        sidecars: Also write accepted captions beside their images, where there are none.
        host: Address to listen on. All but loopback addresses need a token, which is made and printed if none is given.
        port: Port to listen on.
        token: Word that opens the page, of 8 characters or more.
        device: Device to compute on; auto takes CUDA, then MPS, then the CPU.
    """
    if not runs:
        raise UserError("no run given: diptych app RUN...; `diptych demo` trains runs to begin with")
    if (data is None) != (out is None):
        raise UserError("--data and --out go together: out is the folder for what is decided about the data")
    if sidecars and data is None:
        raise UserError("--sidecars: captions lie beside the images of --data: give it")
    for run in runs:
        kind_of(run)
    from diptych.app.serve import listening, private_cache, token_for

    token = token_for(host, token)
    listening(host, port).close()  # said before networks are loaded
    with private_cache():
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise UserError(f"diptych app needs gradio ({error}): pip install 'diptych[app]'") from error
        from diptych.app.answers import open_given
        from diptych.app.page import build
        from diptych.app.serve import serve

        given = open_given(runs, indexes=index, data=data, out=out, sidecars=sidecars, device=device)
        print(f"tabs: {', '.join(given.tabs)}", flush=True)
        serve(build(given), host=host, port=port, token=token, ready=lambda where: print(f"open {where}", flush=True))
