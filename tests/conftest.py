"""The smallest complete Diptych: a tokenizer, a text encoder and a network, with random weights; and a dual encoder."""

import gc
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import shape_checker  # noqa: F401 - before diptych: it mends the hook that imports it
import torch

from diptych.data.batch import Batch, ImageTokenExamples, PairExamples, TextExamples
from diptych.data.scenes import ScenesSource
from diptych.dual.model import DualEncoder, DualEncoderConfig, train_clip_tokenizer
from diptych.dual.recipes import clip_tiny
from diptych.itit.generation import ImageGenerationConfig, TextGenerationConfig
from diptych.itit.model import ITIT, ItitConfig
from diptych.itit.pipeline import Diptych
from diptych.itit.recipes import itit_tiny
from diptych.report.figures import one_figure, points
from diptych.rng import StepRNG
from diptych.run_folder import write_config
from diptych.tokenizers.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from diptych.tokenizers.span_corruption import SpanCorruption, TextEncoderConfig
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.text_tokenizer import train_tokenizer

_LONGEST = (
    "train/test_distributed.py",
    "itit/test_training.py",
    "cli/test_captions.py",
    "dual/test_training.py",
    "uml/test_training.py",
    "dual/test_towers.py",
    "experiments/test_few_shot.py",
    "itit/test_demo.py",
    "itit/test_objective.py",
    "dual/test_objective.py",
)
"""The files of tests that take longest, from ten seconds, in that order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: one that began last would leave the other processes of `--dist loadfile` idle."""
    first = {file: place for place, file in enumerate(_LONGEST)}
    items.sort(key=lambda item: first.get("/".join(item.path.parts[-2:]), len(first)))


def pytest_collection_finish() -> None:
    """Spare the garbage collector the 300,000 objects of the imported libraries at each of its rounds."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several test processes one thread: more would wait for one another. Files keep their order."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist would begin with the files of most tests
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_other_machine(monkeypatch) -> None:
    """A test that asks for another machine's address fails: it would wait for it, and depend on its answer."""
    addresses = socket.getaddrinfo

    def of_this_machine(host, *args, **kwargs):
        if host not in (None, "", "localhost") and not str(host)[0].isdigit():
            pytest.fail(f"the test asks for another machine, {host}")
        return addresses(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", of_this_machine)


_drawn: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def draw_each_panel_once(request, monkeypatch) -> None:
    """In each process, curves with the same panels are drawn for the first run that has them; later runs get these.

    To draw a dozen figures takes longer than the few steps that most tests train. Every panel of every kind of run is
    still drawn, and the tests of the report draw all of theirs.
    """
    if "report" in request.path.parts:
        return

    def once(runs, *, panels, over, smooth=0.0):
        lines = [[points(run, key, over)[0] for key in panel.keys] for panel in panels for run in runs.values()]
        marked = [[(len(x) > 0, len(x) < 25) for x in each] for each in lines]  # few points have markers
        asked = repr((panels, over, smooth, marked))
        if asked not in _drawn:
            _drawn[asked] = one_figure(runs, panels=panels, over=over, smooth=smooth)
        return _drawn[asked]

    monkeypatch.setattr("diptych.report.figures.one_figure", once)


@pytest.fixture(scope="session")
def ray_by_value() -> Iterator[Callable[[ModuleType], None]]:
    """A Ray cluster of two workers on this machine. A module of tests is handed to them by calling it with the module.

    The workers cannot import tests by their names.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}  # as the engine does
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield ray.cloudpickle.register_pickle_by_value
    ray.shutdown()


@pytest.fixture(scope="session")
def scene_texts() -> list[str]:
    source = ScenesSource(count=200)
    return [source.captions(item)[0] for item in range(200)]


@pytest.fixture(scope="session")
def text_encoder(scene_texts) -> TextEncoder:
    config = replace(TextEncoderConfig.tiny(), width=16, layers=1, heads=2, feed_forward=16)
    tokenizer = train_tokenizer(scene_texts, vocab_size=config.vocab_size, sentinels=config.sentinels)
    return SpanCorruption(tokenizer, config=config, seed=0).text_encoder()


@pytest.fixture(scope="session")
def tokenizer() -> ImageTokenizer:
    config = ImageTokenizerConfig(
        image_size=32, codebook_size=20, code_dim=4, widths=(8, 8), blocks=1, groups=4, patch=4
    )
    return ImageTokenizer.from_config(config, seed=0).eval()


@pytest.fixture
def model(text_encoder, tokenizer) -> ITIT:
    """Two blocks everywhere, width 16, without dropout."""
    torch.manual_seed(0)
    config = ItitConfig(
        image_tokens=tokenizer.tokens, codebook_size=tokenizer.codebook_size, max_text_len=24,
        text_features=text_encoder.width, vocab_size=text_encoder.vocab_rows,
        width=16, depth=2, heads=2, image_decoder_depth=2,
        text_decoder_width=16, text_decoder_depth=2, text_decoder_heads=2, dropout=0.0,
    )  # fmt: skip
    return ITIT(config)


@pytest.fixture
def diptych(tokenizer, text_encoder, model) -> Diptych:
    """They as a pipeline that draws in two steps and captions with two beams."""
    return Diptych(
        tokenizer,
        text_encoder,
        model,
        image_generation=ImageGenerationConfig(steps=2, guidance=0.0),
        text_generation=TextGenerationConfig(beams=2),
    )


@pytest.fixture
def save_itit_run(tokenizer, text_encoder, model) -> Callable[..., Path]:
    """Saves a finished ITIT run with random weights in a folder; an image takes so many ``steps``."""

    def save(folder: Path, *, steps: int) -> Path:
        for part, whole in (("tokenizer", tokenizer), ("text_encoder", text_encoder), ("model", model)):
            whole.save_pretrained(folder / part)
        recipe = itit_tiny()
        recipe.data.pairs = "scenes:?count=40"  # baselines read thousands of pairs where there are as many
        recipe.generation.image = ImageGenerationConfig(steps=steps, guidance=0.0)
        recipe.generation.text = TextGenerationConfig(beams=2)
        write_config(folder, recipe="itit-tiny", run=recipe)
        return folder

    return save


@pytest.fixture(scope="session")
def dual_encoder(scene_texts) -> DualEncoder:
    config = DualEncoderConfig(
        image_size=16, patch=8, image_width=32, image_depth=1, max_text_len=32, text_width=24, text_depth=1, width=20
    )
    return DualEncoder.from_config(config, train_clip_tokenizer(scene_texts, vocab_size=600, length=32), seed=0)


@pytest.fixture
def dual_run(dual_encoder, tmp_path) -> Path:
    dual_encoder.save_pretrained(tmp_path / "dual/model")
    write_config(tmp_path / "dual", recipe="clip-tiny", run=clip_tiny())
    return tmp_path / "dual"


@pytest.fixture
def batch(text_encoder, tokenizer, scene_texts) -> Batch:
    """Eight pairs, four unpaired images and four unpaired texts."""
    generator = torch.Generator().manual_seed(1)

    def texts(start: int, end: int) -> dict[str, torch.Tensor]:
        ids, valid = text_encoder.tokenize(scene_texts[start:end], length=20)
        return {"ids_BL": ids, "valid_BL": valid}

    def tokens(rows: int) -> torch.Tensor:
        return torch.randint(tokenizer.codebook_size, (rows, tokenizer.tokens), generator=generator)

    streams = {
        "pairs": PairExamples(tokens_BN=tokens(8), **texts(0, 8)),
        "images": ImageTokenExamples(tokens_BN=tokens(4)),
        "texts": TextExamples(**texts(8, 12)),
    }
    return Batch(rng=StepRNG(0, 0), streams=streams)
