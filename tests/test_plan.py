import json
from dataclasses import replace

import pytest

from diptych.cli.training import plan as plan_command
from diptych.errors import UserError
from diptych.itit.generation import ImageGenerationConfig
from diptych.itit.model import MaskingConfig
from diptych.itit.objective import ItitObjectiveConfig
from diptych.plan import HARDWARE, count, plan
from diptych.registry import RECIPES

TOKENS, CODES, LENGTH, FEATURES, WORDS = 16, 256, 18, 128, 512  # of itit-tiny's tokenizer and text encoder
WIDTH, DEPTH, IMAGE_DEPTH, TEXT_DEPTH, RATIO, WINDOW = 128, 1, 2, 2, 2, 7


def tiny(**objective):
    recipe = RECIPES["itit-tiny"]()
    recipe.data.pairs = ""
    maskings = {"image_masking": MaskingConfig(low=0.5), "text_masking": MaskingConfig(low=0.0)}
    config = ItitObjectiveConfig(**maskings, **({"texts": "off", "images": "off"} | objective))
    return replace(recipe, objective=config, model=replace(recipe.model, whiten_text=False))


def block(positions, wanted=None, width=WIDTH):
    """Operations of a block's forward pass, of which ``wanted`` positions are computed."""
    wanted = positions if wanted is None else wanted
    linear = 2 * width * width * (2 * positions + wanted * (2 + 2 * RATIO))
    return linear + 2 * 2 * wanted * positions * width


def image_decoder(text, wanted=TOKENS):
    seen = TOKENS + text
    head = 2 * wanted * WIDTH * (WIDTH + CODES)
    return (IMAGE_DEPTH - 1) * block(seen) + block(seen, wanted) + head


def text_decoder(prefix):
    seen = prefix + LENGTH
    words = 2 * LENGTH * WIDTH * WORDS
    return 2 * prefix * WIDTH * WIDTH + (TEXT_DEPTH - 1) * block(seen) + block(seen, LENGTH) + words


PROJECTION = 2 * LENGTH * WINDOW * FEATURES * WIDTH


def test_operations_of_pairs_are_those_counted_by_hand():
    found = count(tiny(), text_features="cached")
    with_text = DEPTH * block(TOKENS // 2 + LENGTH) + image_decoder(LENGTH)
    without = DEPTH * block(TOKENS + 1) + image_decoder(1) + text_decoder(TOKENS)
    # A product's gradient takes two products of its size, and nobody asks for that of the features.
    assert found.operations == {"pairs": 3 * (with_text + without) + 2 * PROJECTION}
    assert found.rows_read == found.images == 2


def test_operations_of_generated_images_are_those_counted_by_hand():
    generation = ImageGenerationConfig(steps=3, guidance=1.0)
    found = count(tiny(texts="half", image_generation=generation), text_features="cached").operations["texts"]
    # In three rounds 0, 3 and 8 of 16 tokens are known, and only they enter the encoder; the others are predicted.
    generated = 3 * PROJECTION
    for known in (0, 3, 8):
        for text in (LENGTH, 1):
            generated += DEPTH * block(known + text) + image_decoder(text, TOKENS - known)
    trained = DEPTH * block(TOKENS + 1) + text_decoder(TOKENS)
    assert found == generated + 3 * trained


def test_rows_that_take_no_part_in_the_cycles_do_not_count():
    whole, half = (count(tiny(texts="half", images="half", cycle_share=share)) for share in (1.0, 0.5))
    for stream in ("texts", "images"):
        assert half.operations[stream] == whole.operations[stream] // 2
    assert half.operations["pairs"] == whole.operations["pairs"]
    assert count(tiny()).kept < half.kept < whole.kept


def test_operations_of_generated_texts_are_those_counted_by_hand():
    run = tiny(images="half")
    found = count(run, text_features="cached")
    t5 = run.text_encoder_stage.model
    inner = t5.width * t5.feed_forward
    text_encoder = t5.layers * 2 * LENGTH * (4 * t5.width**2 + 3 * inner + 2 * LENGTH * t5.width)
    generated = DEPTH * block(TOKENS + 1) + text_decoder(TOKENS)
    trained = DEPTH * block(TOKENS // 2 + LENGTH) + image_decoder(LENGTH)
    assert found.operations["images"] == generated + text_encoder + 3 * trained + 2 * PROJECTION
    assert found.frozen > 0
    assert count(tiny(), text_features="cached").frozen == 0


def test_recomputed_activations_take_operations_and_no_memory():
    run = tiny()
    kept, anew = count(run), count(replace(run, train=replace(run.train, checkpoint_activations=True)))
    assert anew.kept < 0.7 * kept.kept
    assert anew.operations["pairs"] > kept.operations["pairs"]


def test_memory_and_time_on_devices():
    run = tiny()
    run = replace(run, optim=replace(run.optim, name="adamw"), train=replace(run.train, batch_size=16, steps=10))
    one, two = (plan(run, recipe="itit-tiny", device="a100", devices=n, text_features="cached") for n in (1, 2))
    size = 4 * one.parameters
    assert one.memory.keys() == {"ddp"}
    of_one, of_two = one.memory["ddp"], two.memory["ddp"]
    assert (of_one["weights"], of_one["gradients"], of_one["moments"]) == (2 * size, size, 2 * size)  # with an average
    assert two.memory["fsdp"]["moments"] == size
    assert of_one["activations"] == 2 * of_two["activations"]
    assert one.seconds["compute"] == pytest.approx(sum(one.operations.values()) / (0.4 * HARDWARE["a100"].peak))
    assert one.seconds["compute"] == pytest.approx(2 * two.seconds["compute"])
    assert (one.seconds["all-reduce"], two.seconds["all-reduce"]) == (0, pytest.approx(size / HARDWARE["a100"].link))
    assert one.run_days == pytest.approx(one.step_seconds * 10 / 86400)
    assert one.bottleneck in one.seconds


def test_what_does_not_fit_is_told():
    run = tiny()
    large = replace(run, train=replace(run.train, batch_size=2**22))
    found = plan(large, recipe="itit-tiny", device="rtx4090", devices=2)
    assert found.bottleneck.startswith("memory (ddp does not fit")
    assert any("MORE than 24" in line for line in found.lines())


def test_what_cannot_be():
    with pytest.raises(UserError, match=r"16 rows cannot be shared by 3 devices"):
        plan(tiny(), recipe="itit-tiny", device="h100", devices=3)
    with pytest.raises(UserError, match="clip-tiny: a plan can be made for the recipes itit"):
        plan(RECIPES["clip-tiny"](), recipe="clip-tiny", device="h100", devices=1)
    with pytest.raises(UserError, match="its sizes are not known: give a folder of a T5"):
        count(replace(tiny(), text_encoder="somebody/bert"))


def test_the_command_prints_and_writes_it(tmp_path, capsys):
    file = tmp_path / "plan.json"
    plan_command(["itit-tiny", "--devices", "2", "--device", "a100", "--train.batch-size", "8", "--json", str(file)])
    told = capsys.readouterr().out
    assert told.startswith("itit-tiny: batch 8, 600 steps, on 2 a100\n")
    assert "bottleneck" in told
    assert [each["batch_size"] for each in json.loads(file.read_text())] == [8]
    with pytest.raises(UserError, match="no recipe 'itit-tinny'"):
        plan_command(["itit-tinny"])
