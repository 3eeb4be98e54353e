"""Does unpaired data help at all? The case that can be solved exactly: linear views of a shared cause, Gaussian noise.

    python benchmarks/uml_theory.py [--json FILE] [--repetitions 20000]

Fails when a Monte-Carlo variance of the maximum-likelihood estimate is more than 5 % off the Schur-complement formula,
when a theorem of the paper (as restated here) does not hold, or when an autoencoder that shares its trunk does not find
the shared directions better with related data than alone and than with unrelated data. One minute on one CPU core.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diptych.experiments.theory import (
    SubspaceTrial,
    View,
    block_information,
    estimate,
    run_trial,
    shared_information,
    variance_along,
)
from diptych.run_folder import write_json

Case = dict[str, tuple[list[View], np.ndarray]]
"""By name: the views there are, and the direction of theta_c that is asked for."""
WEAK = 0.1
"""How much an X shows of its weak coordinate; the others it shows in full."""
X_AXES, Y_AXES, SHARED, NUISANCE = 10, 10, 3, 2


def view(rng, count: int, axes: int, *, scale=(1.0,) * SHARED, nuisance: int = NUISANCE, noise: float = 1.0) -> View:
    """Samples whose designs are drawn once and then known."""
    shared = rng.standard_normal((count, axes, SHARED)) * np.array(scale)
    return View(shared_NMC=shared, nuisance_NMP=rng.standard_normal((count, axes, nuisance)), noise=noise)


def fixed(count: int, shared_MC: np.ndarray, nuisance_MP: np.ndarray) -> View:
    """Samples that all have the same design."""
    return View(shared_NMC=np.stack([shared_MC] * count), nuisance_NMP=np.stack([nuisance_MP] * count))


def cases(rng: np.random.Generator) -> Case:
    """T1 to T3, and the counter-example."""
    first, second, weak = np.eye(SHARED)
    x20, x40 = (view(rng, count, X_AXES, scale=(1.0, 1.0, WEAK)) for count in (20, 40))
    y20 = view(rng, 20, Y_AXES, noise=0.5)
    # One design for all samples: then nuisance does not average out, and the coordinates of theta_c hang together.
    x_same = fixed(20, rng.standard_normal((X_AXES, SHARED)), rng.standard_normal((X_AXES, 5)))
    one_direction = np.outer(rng.standard_normal(6), first)
    y_first = fixed(20, one_direction, rng.standard_normal((6, 2)))
    # As many nuisance parameters as values, the same in every sample: whatever theta_c does, theta_y can undo.
    y_nothing = fixed(20, 10 * rng.standard_normal((6, SHARED)), rng.standard_normal((6, 6)))
    return {
        "20 X, weak coordinate": ([x20], weak),
        "40 X, weak coordinate": ([x40], weak),
        "T1, T3: 20 X + 20 Y, weak coordinate": ([x20, y20], weak),
        "T1: 20 X, a strong coordinate": ([x20], first),
        "T1: 20 X + 20 Y, a strong coordinate": ([x20, y20], first),
        "20 X of one design, first axis": ([x_same], first),
        "20 X of one design, second axis": ([x_same], second),
        "T2: with 20 Y that show the first axis only, first axis": ([x_same, y_first], first),
        "T2: with 20 Y that show the first axis only, second axis": ([x_same, y_first], second),
        "counter-example: 20 X + 20 Y with an invertible nuisance design": ([x20, y_nothing], weak),
    }


@dataclass
class Checks:
    """What was asked, and which answers were no."""

    asked: int = 0
    failed: list[str] = field(default_factory=list)

    def __call__(self, holds: bool, what: str) -> None:
        self.asked += 1
        print(f"  {'yes' if holds else 'NO '}  {what}")
        if not holds:
            self.failed.append(what)


def measure(case: Case, *, repetitions: int, rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """Variances by formula and by experiment."""
    found = {}
    print(f"{'variance along the direction asked for':66} {'formula':>9} {'measured':>9} {'paper':>9}")
    for name, (views, v_C) in case.items():
        formula, paper = (variance_along(f(views), v_C) for f in (shared_information, block_information))
        predictions = estimate(views, np.arange(1.0, SHARED + 1), repetitions=repetitions, rng=rng) @ v_C
        found[name] = {"formula": formula, "measured": float(predictions.var()), "paper": paper}
        print(f"{name:66} {formula:9.4f} {found[name]['measured']:9.4f} {paper:9.4f}")
    return found


def check_theorems(check: Checks, case: Case) -> None:
    """The paper's theorems, for information and for variance."""
    x20, y20 = case["T1, T3: 20 X + 20 Y, weak coordinate"][0]
    x40 = case["40 X, weak coordinate"][0]
    x_same, y_first = case["T2: with 20 Y that show the first axis only, second axis"][0]
    y_nothing = case["counter-example: 20 X + 20 Y with an invertible nuisance design"][0][1]
    first, second, weak = np.eye(SHARED)
    x, y = shared_information([x20]), shared_information([y20])
    check(np.linalg.eigvalsh(y).min() > 0, "T1: Y of full column rank adds information in every direction")
    drops = [variance_along(x, v) - variance_along(x + y, v) for v in np.eye(SHARED)]
    check(min(drops) > 0, "T1: and lowers every variance")
    x1, y1 = shared_information([x_same]), shared_information([y_first])
    check(first @ y1 @ first > 0, "T2: Y that shows one axis adds information along it")
    check(abs(second @ y1 @ second) < 1e-9, "T2: and none across it")
    gain = 1 - variance_along(x1 + y1, second) / variance_along(x1, second)
    check(gain > 0, f"T2 is about information: the variance across falls all the same, by {gain:.1%}, through X")
    blind = _no_gain(x1, y1)
    same = np.isclose(variance_along(x1 + y1, blind), variance_along(x1, blind), rtol=1e-9)
    check(bool(same) and abs(first @ blind) > 0, "T2: and some v that Y does see keeps its variance")
    ratio = variance_along(shared_information(x40), weak) / variance_along(x + y, weak)
    check(ratio > 1, f"T3: where X is weak, 20 Y more leave 1/{ratio:.0f} of the variance that 20 X more leave")
    nothing = np.abs(shared_information([y_nothing])).max()
    trace = np.trace(block_information([y_nothing]))
    check(nothing < 1e-9 * trace, f"counter-example: Y adds nothing, though the trace of its block is {trace:,.0f}")


def _no_gain(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A v with B v != 0 whose variance Y leaves alone: v = S w with B w = 0, since the drop is governed by B S^-1 v."""
    return x @ np.linalg.eigh(y)[1][:, 0]


def subspaces(check: Checks, seeds: int) -> dict[str, dict[str, list[float]]]:
    """The autoencoder experiment: how much of the shared directions the trunk keeps."""
    found: dict[str, dict[str, list[float]]] = {}
    for interface in ("common", "own"):
        found[interface] = {}
        print(f"shared directions found by an autoencoder of X, {interface} input and output maps, {seeds} seeds")
        for other in ("none", "related", "unrelated"):
            trial = SubspaceTrial(interface=interface, other=other)
            scores = found[interface][other] = [run_trial(trial, seed=seed) for seed in range(seeds)]
            print(f"  Y {other:10} {np.mean(scores):.3f} +- {np.std(scores, ddof=1):.3f}")
    scores = {other: np.array(values) for other, values in found["common"].items()}
    for control in ("none", "unrelated"):
        lead = scores["related"] - scores[control]
        error = lead.std(ddof=1) / len(lead) ** 0.5
        check(bool(lead.mean() > 3 * error), f"related Y finds {lead.mean():.3f} +- {error:.3f} more than {control}")
    own = {other: np.array(values) for other, values in found["own"].items()}
    lead = own["related"] - own["none"]
    print(f"        with input and output maps of their own related Y gives {lead.mean():+.3f} (no check)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--repetitions", type=int, default=20_000, help="number of simulated estimates")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds of the autoencoder experiment")
    parser.add_argument("--seed", type=int, default=0, help="seed of designs and noise")
    options = parser.parse_args()
    check, case = Checks(), cases(np.random.default_rng(options.seed))
    variances = measure(case, repetitions=options.repetitions, rng=np.random.default_rng((options.seed, 1)))
    worst = max(abs(row["measured"] / row["formula"] - 1) for row in variances.values())
    check(worst < 0.05, f"the measured variances are within {worst:.1%} of the formula (bar: 5 %)")
    check_theorems(check, case)
    recovered = subspaces(check, options.seeds)
    if options.json:
        write_json(options.json, {"variances": variances, "subspaces": recovered, "failed": check.failed})
    print(f"verdict: {check.asked - len(check.failed)} of {check.asked} checks hold")
    sys.exit(bool(check.failed))


if __name__ == "__main__":
    main()
