import torch

from diptych.eval.predictions import Prediction, top_predictions

PROBABILITIES = torch.tensor([[0.25, 0.5, 0.125, 0.125], [0.0, 0.0, 0.25, 0.75]])


def test_best_first():
    first, second = top_predictions(PROBABILITIES, "abcd", top=2)
    assert first == [Prediction(name="b", probability=0.5), Prediction(name="a", probability=0.25)]
    assert [guess.name for guess in second] == ["d", "c"]


def test_more_than_there_are():
    assert [len(predictions) for predictions in top_predictions(PROBABILITIES, "abcd", top=9)] == [4, 4]
