import pytest
import torch

from diptych.data.batch import (
    Batch,
    ImageTokenExamples,
    LabelledVectorExamples,
    PairExamples,
    TextExamples,
    count_rows,
    split,
)
from diptych.errors import UserError
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


def test_micro_batches_keep_each_rows_content_and_draws():
    """Rows and random numbers of 2 ranks in 2 parts each, put together, are those of the whole."""
    tokens_BN = torch.arange(16).view(8, 2)

    def of(rank: int, world: int) -> Batch:
        images = ImageTokenExamples(tokens_BN=tokens_BN.chunk(world)[rank])
        return Batch(rng=StepRNG(7, 3, rank, world), streams={"images": images})

    parts = [part for rank in range(2) for part in split(of(rank, 2), 2)]
    assert torch.equal(torch.cat([part["images"].tokens_BN for part in parts]), tokens_BN)
    drawn = [part.rng.uniform("noise", len(part["images"]), 5) for part in parts]
    assert torch.equal(torch.cat(drawn), of(0, 1).rng.uniform("noise", 8, 5))


def test_streams_of_different_sizes_are_cut_alike():
    batch = Batch(
        rng=StepRNG(0, 0),
        streams={
            "pairs": ImageTokenExamples(tokens_BN=torch.ones(4, 2).long()),
            "texts": LabelledVectorExamples(vectors_BD=torch.ones(6, 2), labels_B=torch.arange(6)),
        },
    )
    assert count_rows(batch) == 10
    first, second = split(batch, 2)
    assert (len(first["pairs"]), len(second["texts"]), set(first.streams)) == (2, 3, {"pairs", "texts"})
    assert second["texts"].labels_B.tolist() == [3, 4, 5]
    with pytest.raises(UserError, match=r"train\.grad_accum_steps is 4, but a process gets 6 rows of texts"):
        split(batch, 4)


def texts(rows: int) -> dict[str, torch.Tensor]:
    return {"ids_BL": torch.ones(rows, 2).long(), "valid_BL": torch.ones(rows, 2).bool()}
