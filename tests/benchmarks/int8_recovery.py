"""What plain post-training quantisation loses, and what two cheap remedies give back.

    python tests/benchmarks/int8_recovery.py runs/student/best.pt [MORE ...]

Per student and set: accuracy of float32 and of int8; the share of decisions that differ; the mean KL divergence from the float32 student's
probabilities in nats. plain: as quantised; bias: with the corrected head that distill.py exports; head: the whole last layer
fitted again by ridge regression to the float32 logits of the calibration views.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from common import data, models  # noqa: E402
from common.export import correct_head, float_trunk, int8_trunk  # noqa: E402
from common.views import recipe_from_record, render  # noqa: E402

CPU = torch.device("cpu")
PENALTY = 0.1  # of the refitted head's change, of the features' mean variance


def refitted(head, features, quantised):
    """(weight [K, C], bias [K]): the head nearest to `head` that maps int8 features [N, C] to the logits of the float ones."""
    wanted = features @ head.weight.T + head.bias
    centred = quantised - quantised.mean(0)
    penalty = PENALTY * float(centred.square().sum() / centred.shape[1])
    missing = wanted - wanted.mean(0) - centred @ head.weight.T
    weight = head.weight + torch.linalg.solve(centred.T @ centred + penalty * torch.eye(centred.shape[1]), centred.T @ missing).T
    return weight, wanted.mean(0) - weight @ quantised.mean(0)


@torch.no_grad()
def measure(path, args):
    student, state = models.load_model(path, CPU)
    record, recipe = state["data"], recipe_from_record(state["view_recipe"])
    train, val, _ = data.open_training_data(record, args)
    sets = {"val": val, **data.open_test_sets(data.test_folders(record["dir"]), record["view_size"], record["classes"], args)}
    some = np.random.default_rng(0).permutation(len(train))[:args.calibration_pictures]
    views = [render(train.batch(part, CPU), part, np.full(len(part), view), 0, recipe)
             for view in range(1, 1 + -(-args.calibration_pictures // len(some))) for part in np.array_split(some, -(-len(some) // 32))]
    body, quantised = float_trunk(student), int8_trunk(student, views)

    def features(trunk, pixels):
        return trunk(student.normalise(pixels)).mean((2, 3))

    head = student.backbone.fc
    pairs = [torch.cat([features(trunk, pixels) for pixels in views]) for trunk in (body, quantised)]
    heads = {"plain": (head.weight, head.bias), "bias": (head.weight, correct_head(student, quantised, views).backbone.fc.bias),
             "head": refitted(head, *pairs)}
    for name, pictures in sets.items():
        seen, its_seen = (models.predict(lambda pixels: features(trunk, pixels), pictures, CPU) for trunk in (body, quantised))
        expected = head(seen)
        print(f"{path} on {name} ({len(pictures)}): float32 {(expected.argmax(1) == pictures.labels).float().mean():.4f}", end="")
        for kind, (weight, bias) in heads.items():
            found = its_seen @ weight.T + bias
            kl = (expected.softmax(1) * (expected.log_softmax(1) - found.log_softmax(1))).sum(1).mean()
            print(f"; {kind} {(found.argmax(1) == pictures.labels).float().mean():.4f}, {100 * (found.argmax(1) != expected.argmax(1)).float().mean():.2f} % differ, "
                  f"KL {kl:.5f}", end="")
        print(flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("students", nargs="+", help="best.pt files; run from where their data folder is found")
    p.add_argument("--calibration-pictures", type=int, default=512)
    p.add_argument("--cache-dir", default="runs/packs")
    p.set_defaults(workers=2, skip_bad=False)
    args = p.parse_args()
    for path in args.students:
        measure(path, args)


if __name__ == "__main__":
    main()
