"""The best weights of a run, by a validation score, and when no better ones are to be expected."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.run_folder import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The result of a validation after so many steps; higher is better."""

    step: int
    value: float
    tie_break: float = 0.0
    """Decides between equal values, as few validation items give many."""

    def beats(self, other: "Score | None") -> bool:
        """Whether it is better than ``other``."""
        return other is None or (self.value, self.tie_break) > (other.value, other.tie_break)


def select_best(scores: list[Score], *, patience: int) -> Score | None:
    """The best of ``scores``, in the order of their steps, up to where ``patience`` in a row were no better."""
    best, waited = None, 0
    for score in scores:
        if waited == patience:
            break
        best, waited = (score, 0) if score.beats(best) else (best, waited + 1)
    return best


def patience_is_over(scores: list[Score], *, patience: int) -> bool:
    """Whether the last ``patience`` scores were no better, so that no further one can be selected."""
    best = select_best(scores, patience=patience)
    return best is not None and len(scores) - 1 - scores.index(best) >= patience


class BestWeights:
    """Keeps the weights of the selected step, and all scores, in a folder. A resumed run goes on with them."""

    def __init__(self, folder: Path, *, patience: int) -> None:
        self.folder, self.patience = folder, patience
        found = folder / "scores.json"
        self.scores = [Score(**each) for each in json.loads(found.read_text())] if found.is_file() else []

    @property
    def score(self) -> Score | None:
        """The selected score, None before the first."""
        return select_best(self.scores, patience=self.patience)

    def is_over(self, step: int) -> bool:
        """Whether no step after ``step`` can be selected any more."""
        return patience_is_over([each for each in self.scores if each.step <= step], patience=self.patience)

    def offer(self, score: Score, objective: nn.Module) -> None:
        """Record a score, and keep the weights if it is selected. Scores are offered in the order of their steps.

        Known scores of this step and of later ones are from before a resume, and are dropped.
        """
        self.scores = [*(each for each in self.scores if each.step < score.step), score]
        if self.score == score:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / ".weights.safetensors"
            save_file({name: value.contiguous() for name, value in _changing(objective).items()}, draft)
            draft.replace(self.folder / "weights.safetensors")
        write_json(self.folder / "scores.json", [asdict(each) for each in self.scores])

    def load_into(self, objective: nn.Module) -> None:
        """Give ``objective`` the selected weights."""
        kept = load_file(self.folder / "weights.safetensors")
        assert kept.keys() == _changing(objective).keys()
        objective.load_state_dict(kept, strict=False)


def _changing(objective: nn.Module) -> dict[str, Tensor]:
    """Trained weights and buffers, without the frozen weights of a pretrained part."""
    frozen = {name for name, weight in objective.named_parameters() if not weight.requires_grad}
    return {name: value for name, value in objective.state_dict().items() if name not in frozen}
