"""Several teachers as one: temperatures and weights from validation, and what these give there."""

import torch

from common.calibration import fit_temperature, fit_weights
from common.losses import product_of_experts
from common.metrics import score

KEPT = ("accuracy", "balanced_accuracy", "nll", "n")


def combine(val_logits, val_labels, teacher_weights, paths):
    """Fit temperatures and weights on validation, and print what they give.

    val_logits: float32 [teachers, N, classes]; val_labels: int64 [N]; teacher_weights: "fitted" or
    "equal"; paths: of the teachers. Returns plain data for ensemble.json.
    """
    temperatures = [fit_temperature(logits, val_labels) for logits in val_logits]
    scaled = torch.stack([z / t for z, t in zip(val_logits, temperatures)])
    weights = [1 / len(paths)] * len(paths)
    if teacher_weights == "fitted":
        weights = fit_weights(scaled, val_labels)

    rows = list(zip(map(str, paths), weights, temperatures, torch.softmax(scaled, dim=2)))
    together = product_of_experts(val_logits, temperatures, weights)
    rows.append(("the ensemble", sum(weights), 1.0, together))
    scored = [(*row, score(probabilities, val_labels)) for *row, probabilities in rows]
    print_table(scored, len(val_labels))
    return {
        "temperatures": temperatures,
        "weights": weights,
        "teacher_weights": teacher_weights,
        "validation": {name: {key: s[key] for key in KEPT} for name, _, _, s in scored},
    }


def print_table(scored, pictures):
    """Print a line for each (name, weight, temperature, metrics)."""
    head = f"on {pictures} validation pictures:"
    print(f"{head:43}weight  temperature  accuracy  balanced    NLL")
    for name, weight, temperature, s in scored:
        print(
            f"  {name:40} {weight:7.3f}  {temperature:11.2f}  {s['accuracy']:8.3f}  "
            f"{s['balanced_accuracy']:8.3f}  {s['nll']:5.3f}"
        )
