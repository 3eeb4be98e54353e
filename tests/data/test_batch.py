import pytest
import torch

from diptych.data.batch import Batch, ImageTokenExamples, PairExamples, TextExamples
from diptych.rng import StepRNG


def test_examples_are_cut_and_moved_together():
    examples = PairExamples(
        tokens_BN=torch.arange(8).view(4, 2), ids_BL=torch.arange(4).view(4, 1), valid_BL=torch.ones(4, 1).bool()
    )
    assert len(examples) == 4
    assert examples[1::2].tokens_BN.tolist() == [[2, 3], [6, 7]]
    assert examples[1::2].ids_BL.tolist() == [[1], [3]]
    assert examples[1::2].features_BLF is None


def test_a_batch_holds_streams_of_any_name():
    images, audio = ImageTokenExamples(tokens_BN=torch.ones(2, 3).long()), TextExamples(**texts(2))
    batch = Batch(rng=StepRNG(0, 0), streams={"audio": audio, "images": images}).to("cpu")
    assert torch.equal(batch["audio"].ids_BL, audio.ids_BL)
    assert set(batch.streams) == {"audio", "images"}
    with pytest.raises(KeyError):
        batch["pairs"]


def test_a_stream_cannot_leave_a_field_out():
    with pytest.raises(TypeError, match="valid_BL"):
        TextExamples(ids_BL=torch.ones(2, 3).long())


def texts(rows: int) -> dict[str, torch.Tensor]:
    return {"ids_BL": torch.ones(rows, 2).long(), "valid_BL": torch.ones(rows, 2).bool()}
