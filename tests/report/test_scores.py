import pytest

from diptych.report.scores import meaning_of


@pytest.mark.parametrize(
    ("name", "better", "value", "written"),
    [
        ("cider", "higher", 32.123, "32.12"),
        ("bleu_4", "higher", 0.0712, "7.1 %"),
        ("most_common_share", "lower", 1.0, "100.0 %"),
        ("frechet/random-conv-0", "lower", 528.08, "528.1"),
        ("caption_information_gain", "higher", 0.25, "0.25 nats"),
        ("caption_shape_1", "higher", 0.5, "50.0 %"),
        ("image_accuracy", "higher", 0.97, "97.0 %"),
        ("valid/cider", "higher", 3.0, "3"),
        ("retrieval/image_to_text/r10", "higher", 0.141, "14.1 %"),
        ("valid/mean_r1", "higher", 0.025, "2.5 %"),
        ("retrieval/text_to_image/median_rank", "lower", 12.0, "12"),
        ("modality/accuracy", "lower", 0.99, "99.0 %"),
        ("zero_shot_one_prompt/top5", "higher", 0.3, "30.0 %"),
        ("psnr", "higher", 20.7, "20.7 dB"),
        ("images", "", 1000, "1,000"),
        ("linear_probe/l2", "", 0.01, "0.01"),
    ],
)
def test_direction_and_unit(name, better, value, written):
    meaning = meaning_of(name)
    assert (meaning.better, meaning.written(value)) == (better, written)
