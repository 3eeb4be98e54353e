"""Finished runs on the Hugging Face Hub: the model card, what is uploaded, and where a name of the hub is loaded from.

A repository of an ITIT run or of a classifier is a run folder without what only its training needs. That of a dual
encoder holds ``model/`` at its top, so that transformers loads it by the same name.

The addresses of private data stay at home: of a path only the last part is told, and numbers are counts.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diptych.errors import UserError, first_line
from diptych.report.figures import read_metrics
from diptych.report.terminal import HEADLINES, in_words, meaning_of
from diptych.run_folder import BASELINES, CLASS_BASELINES, PARTS, Kind, check_finished, read_config, write_json

CARD = "README.md"
_ABOUT: dict[Kind, tuple[str, str, str, str]] = {
    "itit": (
        "image-to-text",
        "captions images and generates images from texts, in one network (ITIT)",
        "Diptych",
        'model.caption("photo.jpg")\nmodel.imagine("a dog in the snow")[0].save("drawn.png")',
    ),
    "dual": (
        "zero-shot-image-classification",
        "embeds images and texts in one space, for search and zero-shot classification",
        "DualEncoder",
        'model.embed_images(["a.jpg", "b.jpg"]) @ model.embed_texts(["two dogs in the snow"]).T',
    ),
    "classifier": (
        "image-classification",
        "classifies images; it also learned from unpaired texts about the classes (UML)",
        "Classifier",
        'model.predictions("photo.jpg", top=3)',
    ),
}
"""Of each kind that can be uploaded: the hub's name of its task, what it does, its pipeline and how that is used."""
_MORE: dict[Kind, tuple[str, ...]] = {
    "itit": ("image_encoder", "near_captions", "confidence/confidence.json"),
    "classifier": ("classes.json", CLASS_BASELINES),
    "dual": (),
}
"""What is uploaded beside the parts of a run, where it is there."""
_SOURCES = ("pairs", "images", "texts", "valid")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SCHEMES = ("hub:", "package:", "scenes:")
_MODELS = (
    *("tokenizer", "text_encoder", "image_encoder", "teacher", "encoder", "image_tower", "text_tower"),
    *("start", "init", "baseline_encoder", "perceptual"),
)
"""Fields that hold the name of a model, which may be one of the hub."""


class OnHub:
    """What the pipelines of all learners have in common: they remember their run folder and put it on the hub."""

    run_folder: Path | None = None
    """The folder that the pipeline was loaded from; None for one that was put together in Python."""

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, license: str | None = None, token: str | None = None
    ) -> str:
        """Upload the run that this was loaded from, with a model card, in one commit; see :func:`push`.

        The files of the run folder are uploaded, not the weights in memory. Returns the address of the repository.
        Raises UserError as :func:`push`, and for a pipeline that was not loaded from a run folder.
        """
        if self.run_folder is None:
            raise UserError("only what was loaded from a run folder can be pushed: from_pretrained(RUN).push_to_hub()")
        return push(self.run_folder, repo_id, private=private, license=license, token=token)


def push(
    run: Path, repo_id: str, *, private: bool = False, license: str | None = None, token: str | None = None
) -> str:
    """Upload a finished run with its model card in one commit, and return the address of the repository.

    The repository is made if it is not there; ``private`` counts only then. ``token`` is that of `hf auth login`, if
    not given. Raises UserError for a run that cannot be uploaded, without a token, and where the hub refuses.
    """
    _uploadable(run)
    import huggingface_hub  # takes half a second, and mistakes are answered without it
    from huggingface_hub.errors import HFValidationError

    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id}: no name of a repository ({first_line(error)}): give USER/NAME") from error
    if token is None and huggingface_hub.get_token() is None:
        raise UserError("not logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token that may write")
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage(run, folder)
        (folder / CARD).write_text(card(run, repo_id=repo_id, license=license), encoding="utf-8")
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            recipe = read_config(run).get("recipe", "a run")
            api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=f"Upload {recipe} of Diptych")
        except Exception as error:  # of the hub's client and of the HTTP library below it
            raise UserError(f"{repo_id}: the hub did not take it ({first_line(error)})") from error
    return str(address)


def local_folder(name: str | Path) -> Path:
    """The run folder ``name``, or where the repository of that name is kept after its download.

    Raises UserError where there is no such folder and the hub has no such repository, or cannot be reached.
    """
    if Path(name).exists() or not _REPOSITORY.fullmatch(str(name)):
        return Path(name)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(name)))
    except Exception as error:
        raise UserError(f"{name}: no such folder, and not on the hub ({first_line(error)})") from error


def stage(run: Path, folder: Path) -> None:
    """Lay out in ``folder`` what is uploaded of a finished run: links to weights, and settings without addresses."""
    kind = _uploadable(run)
    config = public(read_config(run))
    if kind == "dual":
        _link(run / "model", folder)
        write_json(folder / "diptych.json", config)
    else:
        for part in PARTS[kind]:
            _link(run / part, folder / part)
        write_json(folder / "config.json", config)
    for name in _MORE[kind]:
        if (run / name).exists():
            _link(run / name, folder / name)


def _uploadable(run: Path) -> Kind:
    return check_finished(run, "itit", "dual", "classifier")


def _link(source: Path, target: Path) -> None:
    """``source``, a file or a folder, as ``target``: links, but for JSON that tells what a model was loaded from."""
    if source.is_dir():
        for file in source.iterdir():
            if file.name != CARD and not file.name.startswith("."):  # there is one card for the whole
                _link(file, target / file.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name == "confidence.json":
        write_json(target, public(json.loads(source.read_text())))
        return
    if source.suffix == ".json" and "name_or_path" in (text := source.read_text()):
        write_json(target, _public_origin(json.loads(text)))
        return
    try:
        target.symlink_to(source.resolve())
    except OSError:  # a system without links
        shutil.copyfile(source, target)


# Names without addresses


def public(value: Any, *, name: str = "") -> Any:
    """The JSON values of a run's settings with :func:`public_name` for every text; ``name`` is that of the field."""
    if isinstance(value, Mapping):
        return {key: public(each, name=str(key)) for key, each in value.items()}
    if isinstance(value, list):
        return [public(each, name=name) for each in value]
    return public_name(value, model=name in _MODELS) if isinstance(value, str) else value


def public_name(text: str, *, model: bool = False) -> str:
    """A source, path or address without the folders before its last part.

    Names of the hub and of packages stay as they are: of a ``model`` also one without `hub:`, unless a file or folder
    here has that name.
    """
    head, mark, query = text.partition("?")
    kept = head.startswith(_SCHEMES) or (model and _REPOSITORY.fullmatch(head) and not Path(head).exists())
    if not kept:
        head = re.split(r"[/\\]", head.rstrip("/\\"))[-1]
    settings = [setting.partition("=") for setting in query.split("&")]
    return head + mark + "&".join(key + sign + re.split(r"[/\\]", value)[-1] for key, sign, value in settings)


def _public_origin(value: Any) -> Any:
    """JSON of transformers, whose texts may hold slashes (`</s>`): what a model was loaded from is the only address."""
    if isinstance(value, Mapping):
        return {
            key: public_name(each, model=True)
            if key.endswith("name_or_path") and isinstance(each, str)
            else _public_origin(each)
            for key, each in value.items()
        }
    return [_public_origin(each) for each in value] if isinstance(value, list) else value


def _public_sentence(text: str) -> str:
    """A sentence of a record, in which names of scores keep their slashes and all paths lose their folders."""

    def shortened(found: re.Match[str]) -> str:
        word = found[0].rstrip(":")
        return found[0] if meaning_of(word).better else public_name(word, model=True) + found[0][len(word) :]

    return re.sub(r"[^\s,;()'\"]*[/\\][^\s,;()'\"]*", shortened, text)


# The card


def card(run: Path, *, repo_id: str = "USER/NAME", license: str | None = None) -> str:
    """The model card of a finished run, from the records in its folder: Markdown under the hub's metadata in YAML.

    Raises UserError for a run that cannot be uploaded.
    """
    kind = _uploadable(run)
    config = read_config(run)
    recipe, (_, about, pipeline, use) = config.get("recipe", kind), _ABOUT[kind]
    scores = list(_scores(run))
    sections = [
        f"# {repo_id.rpartition('/')[2]}\n\nThis model {about}. It was trained with the recipe `{recipe}` of Diptych.",
        f'```python\nfrom diptych import {pipeline}\n\nmodel = {pipeline}.from_pretrained("{repo_id}")\n{use}\n```',
        f"## Data\n\n{_data(run, config)}",
        f"## Scores, baselines and controls\n\n{_scored(scores)}",
        f"## Training\n\n{_training(run, config)}",
    ]
    return f"---\n{_metadata(kind, config, scores, repo_id=repo_id, license=license)}\n---\n\n" + "\n\n".join(sections)


def _metadata(
    kind: Kind, config: Mapping[str, Any], scores: list["_Scores"], *, repo_id: str, license: str | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = _ABOUT[kind][0]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=_slug(each.source),
            dataset_name=each.source,
            metric_type=_slug(name),
            metric_name=name,
            metric_value=value,
        )
        for each in scores
        for name, value in each.rows["this run"].items()
    ]
    names = [name for name in map(_data_set, _sources(config).values()) if name is not None]
    return ModelCardData(
        license=license,
        library_name="transformers" if kind == "dual" else "diptych",
        pipeline_tag=task,
        tags=["diptych", str(config.get("recipe", kind))],
        datasets=list(dict.fromkeys(names)) or None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    ).to_yaml()


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "data"


def _sources(config: Mapping[str, Any]) -> dict[str, str]:
    """The sources of a run by what they are for, without their addresses."""
    data = config.get("run", {}).get("data", {})
    return {name: public_name(str(data[name])) for name in _SOURCES if data.get(name)}


def _data_set(source: str) -> str | None:
    """A source as the hub's metadata names it; None where it has no name that the hub takes."""
    name = source.removeprefix("hub:").partition("?")[0].rstrip(":")
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def _data(run: Path, config: Mapping[str, Any]) -> str:
    lines = [f"{config['data']}." if config.get("data") else "How many there were was not recorded."]
    if (run / "budget.json").is_file():
        budget = json.loads((run / "budget.json").read_text())
        decided = budget["decisions"]
        fitted = decided.get("encoding") or {"images": decided.get("images")}
        counts = ", ".join(f"{count:,} {name}" for name, count in fitted.items() if isinstance(count, int))
        lines.append(f"Trained under a budget of {budget['minutes']:g} minutes" + (f" on {counts}." if counts else "."))
    lines.append("")
    lines += _table(["for", "source"], [[name, f"`{source}`"] for name, source in _sources(config).items()])
    return "\n".join(lines)


class _Scores:
    """The scores of a run and of what it is compared with, on one source."""

    def __init__(self, source: str, title: str, rows: Mapping[str, Mapping[str, Any]], verdict: str) -> None:
        self.source, self.title, self.verdict = source, title, verdict
        ours = rows["this run"]
        names = [name for name, value in ours.items() if meaning_of(name).better and isinstance(value, int | float)]
        self.names = sorted(names, key=lambda name: name not in HEADLINES)
        self.rows = {
            _public_sentence(title): {
                name: scores[name] for name in self.names if isinstance(scores.get(name), int | float)
            }
            for title, scores in rows.items()
        }


def _scores(run: Path) -> Iterator[_Scores]:
    """What is recorded: the evaluations of the finished run, then the validation that chose its weights."""
    for file in sorted(run.glob("evaluation*/metrics.json")):
        found = json.loads(file.read_text())
        source = public_name(str(found.get("source", file.parent.name)))
        rows = {"this run": found, **found.get("baselines", {})}
        yield _Scores(source, f"On `{source}`, by `diptych evaluate`", rows, found.get("verdict", ""))
    if (run / BASELINES).is_file():
        found = json.loads((run / BASELINES).read_text())
        if found["scores"]:
            source = _sources(read_config(run)).get("valid") or public_name(found["source"])
            rows = {"this run": found["scores"]}
            for each in found["baselines"]:
                control = f"control, {each['kind']}: {each['name']}"
                rows[each["name"] if each["kind"] == "baseline" else control] = each["scores"]
            title = f"On `{source}`, by which the weights were chosen"
            yield _Scores(f"{source} (validation)", title, rows, found["verdict"])


def _scored(scores: list[_Scores]) -> str:
    if not scores:
        return "Nothing was scored: no validation data was given, and `diptych evaluate` was not run."
    blocks = []
    for each in scores:
        rows = []
        for name in each.names:
            values = (row.get(name) for row in each.rows.values())
            cells = ["" if value is None else meaning_of(name).written(value) for value in values]
            rows.append([name, meaning_of(name).better, *cells])
        blocks.append("\n".join([f"{each.title}:", "", *_table(["score", "better", *each.rows], rows)]))
        if each.verdict:
            blocks.append(_public_sentence(each.verdict))
    if not any(title.startswith("control") for each in scores for title in each.rows):
        blocks.append("No control without unpaired data was trained beside this run.")
    return "\n\n".join(blocks)


def _training(run: Path, config: Mapping[str, Any]) -> str:
    import yaml

    fields = public(config.get("run", {}))
    train, optim = fields.get("train", {}), fields.get("optim", {})
    seconds = [line["seconds"] for line in read_metrics(run / "metrics.jsonl") if line.get("seconds") is not None]
    facts = {
        "recipe": config.get("recipe"),
        "steps": train.get("steps"),
        "batch size": train.get("batch_size"),
        "learning rate": optim.get("lr"),
        "seed": train.get("seed"),
        "time": in_words(seconds[-1]) if seconds else None,
        "versions": ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items()),
        "commit": config.get("commit"),
    }
    rows = [[name, str(value)] for name, value in facts.items() if value not in (None, "")]
    listed = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip()
    settings = f"<details><summary>All settings</summary>\n\n```yaml\n{listed}\n```\n\n</details>"
    return "\n".join([*_table(["", ""], rows), "", settings])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, rows)]
