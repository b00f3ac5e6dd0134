"""How should teachers be combined? Product of experts against a mean of probabilities.

    python tests/benchmarks/combination.py --data DIR --weights DIR       # 2 sets, 10 minutes each

The teachers of ablations.py, on its development pictures. Both ways have temperatures and weights
fitted on validation pictures: the product as build_ensemble.py does, the mean by expectation
maximisation with one imagined picture per teacher (Dempster, Laird and Rubin 1977).
"""

from pathlib import Path

import torch
from ablations import TASKS, development_folder
from accuracy import TEACHERS, teach
from bench import print_table, run_stages

from common import cli, models, splits
from common.losses import fit_temperature, fit_weights
from common.metrics import score
from common.pictures import DecodedCache

ROUNDS = 200  # of expectation maximisation


def mean_weights(probabilities, labels):
    """Weights of sum_t w_t p_t with the lowest NLL. probabilities: float [teachers, N, K]."""
    teachers, pictures = probabilities.shape[:2]
    index = labels[None, :, None].expand(teachers, -1, 1)
    likelihood = probabilities.double().gather(2, index)[..., 0].clamp(min=1e-12)
    w = torch.full((teachers, 1), 1 / teachers, dtype=torch.double)
    for _ in range(ROUNDS):
        share = w * likelihood / (w * likelihood).sum(0)
        w = (share.sum(1, keepdim=True) + 1) / (pictures + teachers)
    return w.flatten().tolist()


def calibrated_logits(homes, device):
    """(of val, val labels, of the development set, its labels); logits are [teachers, N, K]."""
    cache, of_val, of_test = DecodedCache(cli.CACHE), [], []
    for home in homes:
        model, state = models.load_model(home / "model.pt", device)
        _, val, dataset = splits.open_training(cache, state["dataset"])
        test = splits.open_tests(cache, [Path(dataset["dir"]) / "test"], dataset)["test"]
        logits = models.predict(model, val, device)
        temperature = fit_temperature(logits, val.labels)
        of_val.append(logits / temperature)
        of_test.append(models.predict(model, test, device) / temperature)
    return torch.stack(of_val), val.labels, torch.stack(of_test), test.labels


def run(name, seed, args, device):
    """Rows of the table for one set and seed."""
    task, home = TASKS[name], Path(args.output) / name / f"seed_{seed}_{TASKS[name].side}px"
    pictures = development_folder(task, args, home, seed)
    run_stages([teach(task, pictures, home, args.weights, seed)], home)
    val, val_labels, test, labels = calibrated_logits([home / name for name in TEACHERS], device)

    product = fit_weights(val, val_labels)
    mean = mean_weights(torch.softmax(val, 2), val_labels)
    answers = {
        **dict(zip(TEACHERS, torch.softmax(test, 2))),
        "mean of probabilities": sum(w * p for w, p in zip(mean, torch.softmax(test, 2))),
        "product of experts": torch.softmax(sum(w * z for w, z in zip(product, test)), 1),
    }
    weights = {"mean of probabilities": mean, "product of experts": product}
    for answer, probabilities in answers.items():
        s = score(probabilities, labels)
        used = ", ".join(f"{w:.2f}" for w in weights.get(answer, []))
        scores = [f"{100 * s['balanced_accuracy']:.1f}", f"{s['nll']:.3f}", f"{s['ece']:.3f}"]
        yield [name, answer, used, *scores]


def main():
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="folder that holds the sets' folders")
    p.add_argument("--weights", type=Path, required=True, help="folder with the teachers' weights")
    p.add_argument("--sets", nargs="+", default=["neu_cls_10", "elpv_100"], choices=list(TASKS),
                   metavar="NAME", help="sets of ablations.py")
    p.add_argument("--seed", type=cli.seed, default=100)
    p.add_argument("--output", default="runs/ablations", help="folder for the runs")
    p.add_argument("--device", default="auto")
    args = p.parse_args()
    device = cli.pick_device(args.device)
    rows = [row for name in args.sets for row in run(name, args.seed, args, device)]
    print_table(["set", "", "weights", "balanced accuracy, %", "NLL", "ECE"], rows)


if __name__ == "__main__":
    cli.run(main)
