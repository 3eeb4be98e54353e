"""Which weights of a run are kept: those of the best validation accuracy."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from diptych.run_folder import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A validation after so many steps."""

    step: int
    accuracy: float
    loss: float

    def beats(self, other: "Score | None") -> bool:
        """By accuracy; the loss decides between equals, of which few validation images give many."""
        return other is None or (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


def select(scores: list[Score], *, patience: int) -> Score | None:
    """The best of ``scores``, which come in the order of their steps, before ``patience`` in a row were no better."""
    best, waited = None, 0
    for score in scores:
        if waited == patience:
            break
        best, waited = (score, 0) if score.beats(best) else (best, waited + 1)
    return best


def is_over(scores: list[Score], *, patience: int) -> bool:
    """Whether no further score can be selected."""
    best = select(scores, patience=patience)
    return best is not None and len(scores) - 1 - scores.index(best) >= patience


class Best:
    """Keeps the weights of the selected step in a folder. A resumed run goes on with what it finds there."""

    def __init__(self, folder: Path, *, patience: int) -> None:
        self.folder, self.patience = folder, patience
        found = folder / "scores.json"
        self.scores = [Score(**each) for each in json.loads(found.read_text())] if found.is_file() else []

    @property
    def score(self) -> Score | None:
        return select(self.scores, patience=self.patience)

    def is_over(self, step: int) -> bool:
        """Whether no step after ``step`` can be selected any more."""
        return is_over([each for each in self.scores if each.step <= step], patience=self.patience)

    def offer(self, score: Score, objective: nn.Module) -> None:
        """Called in the order of the steps; what is known of this step or later ones is from before a resume."""
        self.scores = [*(each for each in self.scores if each.step < score.step), score]
        if self.score == score:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / ".weights.safetensors"
            save_file({name: value.contiguous() for name, value in objective.state_dict().items()}, draft)
            draft.replace(self.folder / "weights.safetensors")
        write_json(self.folder / "scores.json", [_plain(each) for each in self.scores])

    def load_into(self, objective: nn.Module) -> None:
        objective.load_state_dict(load_file(self.folder / "weights.safetensors"))


def _plain(score: Score) -> dict[str, float]:
    return {"step": score.step, "accuracy": score.accuracy, "loss": score.loss}
