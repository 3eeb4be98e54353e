import pytest

from diptych.errors import UserError
from diptych.train.config import MAY_CHANGE, OptimConfig, TrainConfig, check_same, describe


@pytest.mark.parametrize(
    "name", ["steps", "batch_size", "grad_accum_steps", "checkpoint_every", "log_every", "workers"]
)
def test_counts_below_their_least_are_refused(name):
    with pytest.raises(UserError, match=rf"train\.{name} is -1; it must be"):
        TrainConfig(**{name: -1}).check()


@pytest.mark.parametrize(
    "changes", [{"lr": 0.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}, {"max_grad_norm": 0.0}, {"final_lr": 2.0}]
)
def test_impossible_optimizers_are_refused(changes):
    with pytest.raises(UserError, match=rf"optim\.{next(iter(changes))} is"):
        OptimConfig(**changes).check()


def test_defaults_are_possible():
    TrainConfig().check()
    OptimConfig().check()


def test_fields_that_may_change_exist():
    assert MAY_CHANGE["train"] <= describe(TrainConfig(), OptimConfig(), {})["train"].keys()


def test_all_differences_are_named_and_unknown_fields_ignored():
    then = {"train": {"seed": 0, "gone": 1, "steps": 5}, "optim": {"lr": 0.1}, "identity": {"model.width": 8}}
    now = {"train": {"seed": 1, "new": 1, "steps": 9}, "optim": {"lr": 0.2}, "identity": {"model.width": 9}}
    with pytest.raises(UserError, match=r"RUN was .*train\.seed.*optim\.lr.*model\.width") as caught:
        check_same(now, then, where="RUN")
    assert "steps" not in str(caught.value)
    check_same(then, then, where="RUN")


def test_only_the_nested_fields_that_differ_are_named():
    then = {"identity": {"model": {"width": 8, "depth": 2, "text": {"heads": 1}}, "data": ["scenes", 9]}}
    now = {"identity": {"model": {"width": 8, "depth": 3, "text": {"heads": 2}, "dropout": 0.1}, "data": ["scenes", 9]}}
    with pytest.raises(UserError) as caught:
        check_same(now, then, where="RUN")
    changes = "model.depth (2 then, 3 now), model.dropout (None then, 0.1 now), model.text.heads (1 then, 2 now)"
    assert str(caught.value).startswith(f"RUN was trained with other settings: {changes}. ")


def test_of_a_list_only_what_differs_is_printed():
    made_by = {"source": "photos.tar", "tokenizers": "0123456789abcdef" * 9}
    then = {"identity": {"data": {"pairs": [600, made_by], "texts": [9, made_by]}}}
    now = {"identity": {"data": {"pairs": [600, made_by], "texts": [8, made_by | {"tokenizers": "x" * 100}]}}}
    with pytest.raises(UserError) as caught:
        check_same(now, then, where="RUN")
    assert "settings: data.texts[0] (9 then, 8 now), data.texts[1].tokenizers ('0123" in str(caught.value)
    assert "photos.tar" not in str(caught.value)
    assert len(str(caught.value)) < 360
