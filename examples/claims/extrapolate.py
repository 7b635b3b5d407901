"""What a training would reach in more steps, by its validation loss so far: `floor + gain * steps ** -exponent`.

python examples/claims/extrapolate.py --run dnd --steps 16000 60000

The learning rate must have been constant. The loss is predicted by all points, and by those of the second half of the
run; how far the two are apart says how much to believe.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import curve_fit
from transformers.hf_argparser import HfArg

from dnd_hf.command_line import run_script
from dnd_hf.figures import markdown_table
from dnd_hf.training.metrics import read_metrics


def predicted_losses(steps: ArrayLike, losses: ArrayLike, later: ArrayLike) -> NDArray[np.float64]:
    """The loss at `later` steps by the power law with a floor that fits best (least squares).

    Raises:
        ValueError: fewer than 4 points, which three numbers would always fit.
    """
    steps, losses, later = (np.asarray(values, np.float64) for values in (steps, losses, later))
    if len(steps) < 4:
        raise ValueError(f"at least 4 validations are needed, also in the second half of the run, got {len(steps)}.")

    def law(step: NDArray, floor: float, gain: float, exponent: float) -> NDArray:
        return floor + gain * (step / steps[0]) ** -exponent

    start = (losses[-1] / 2, losses[0] - losses[-1] / 2, 0.5)
    (floor, gain, exponent), _ = curve_fit(law, steps, losses, start, bounds=(0, np.inf))
    return law(later, floor, gain, exponent)


@dataclass
class ExtrapolationArguments:
    """Options of this script."""

    run: Path = HfArg(help="Output folder of train.py.")
    steps: list[int] = HfArg(help="Numbers of steps to predict for.")


def main(args: ExtrapolationArguments) -> None:
    lines = read_metrics(args.run / "metrics.jsonl")
    points = [(line["step"], line["validation/loss"]) for line in lines if "validation/loss" in line]
    if not points:
        raise ValueError(f"`run` must be a folder with validations in its metrics.jsonl, got {args.run}.")
    print(f"{len(points)} validations, the last after {points[-1][0]} steps: {points[-1][1]:.3f}")
    late = [point for point in points if 2 * point[0] >= points[-1][0]]
    fits = [predicted_losses(*zip(*part), args.steps) for part in (points, late)]
    rows = [
        {"steps": step, "loss by all points": float(all_), "by the second half": float(half)}
        for step, all_, half in zip(args.steps, *fits)
    ]
    print(markdown_table(rows, digits=4))


if __name__ == "__main__":
    run_script(main, ExtrapolationArguments)
