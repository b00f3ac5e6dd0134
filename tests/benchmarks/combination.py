"""How should teachers be combined, where validation tells and where it does not?

    python tests/benchmarks/combination.py --data DIR --weights DIR       # after curves.py: minutes

The teachers and development pictures of curves.py, and the default teachers of the embedded set on
another draw of it, of which one is much the weaker. Temperatures and weights are fitted on three
kinds of validation pictures: as they are; a fifth of them; and with half as many training pictures
among them, which the teachers know by heart. Compared are the prior's strengths in `fit_weights`,
equal weights, and a mean of probabilities whose weights come from expectation maximisation with one
imagined picture per teacher (Dempster, Laird and Rubin 1977).
"""

from pathlib import Path

import numpy as np
import torch
from bench import print_table, run_stages
from curves import SETS, TAUGHT, another_draw, development_folder, task_of, teacher

import train_teacher
from common import cli, models, splits
from common.losses import fit_temperature, fit_weights
from common.metrics import score
from common.pictures import DecodedCache

ROUNDS = 200  # of expectation maximisation
PRIORS = (0, 3, 10, 30, 100, 300, 1000)
WAYS = ("mean of probabilities", "equal weights", *(f"prior {prior}" for prior in PRIORS))
EMBEDDED = "embedded, another draw"
KINDS = ("as it is", "a fifth of it", "leaking")


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


def embedded_teachers(home, seed):
    """The embedded set's default teachers, trained on another draw of it."""
    data = another_draw(home / "data")
    steps, runs = train_teacher.EMBEDDED_STEPS, home / f"seed_{seed}"
    words = ["train_teacher.py", "--data-dir", data, "--model", *steps, "--seed", seed]
    words += ["--steps", *steps.values(), "--lr", train_teacher.EMBEDDED_LR, "--view-size"]
    run_stages([("teachers", [*words, train_teacher.EMBEDDED_SIZE, "--output", runs])], runs)
    return [runs / name / "model.pt" for name in steps]


def outputs(paths, device):
    """{"train", "val", "test": (logits of all teachers, float32 [teachers, N, K], labels [N])}."""
    cache, found = DecodedCache(cli.CACHE), {}
    for path in paths:
        model, state = models.load_model(path, device)
        train, val, dataset = splits.open_training(cache, state["dataset"])
        test = splits.open_tests(cache, [Path(dataset["dir"]) / "test"], dataset)["test"]
        for name, pictures in (("train", train), ("val", val), ("test", test)):
            logits, _ = found.setdefault(name, ([], pictures.labels))
            logits.append(models.predict(model, pictures, device))
    return {name: (torch.stack(logits), labels) for name, (logits, labels) in found.items()}


def validation_sets(found, seed):
    """{kind: (logits, labels)} to fit on."""
    (val, labels), (train, known) = found["val"], found["train"]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    few = order[: max(10, len(order) // 5)]
    leaked = torch.from_numpy(np.random.default_rng(seed).permutation(len(known)))
    leaked = leaked[: len(labels) // 2]
    both = torch.cat([val, train[:, leaked]], 1), torch.cat([labels, known[leaked]])
    return dict(zip(KINDS, [(val, labels), (val[:, few], labels[few]), both]))


def combined(way, logits, labels, test):
    """(weights, float [N, K] probabilities) of the test pictures. logits: to fit on."""
    temperatures = [fit_temperature(each, labels) for each in logits]
    scaled, test = (
        torch.stack([z / t for z, t in zip(each, temperatures)]) for each in (logits, test)
    )
    if way == WAYS[0]:
        weights = mean_weights(torch.softmax(scaled, 2), labels)
        return weights, sum(w * p for w, p in zip(weights, torch.softmax(test, 2)))
    weights = [1 / len(test)] * len(test)
    if way != WAYS[1]:
        weights = fit_weights(scaled, labels, prior=float(way.split()[1]))
    return weights, torch.softmax(sum(w * z for w, z in zip(weights, test)), 1)


def run(name, seed, args, device):
    """{(kind, way): (weights, balanced accuracy in %, NLL)} of one set and seed; prints them."""
    if name == EMBEDDED:
        teachers = embedded_teachers(Path(args.output) / "embedded", seed)
    else:
        task, home = task_of(name), Path(args.output) / name / f"seed_{seed}"
        pictures = development_folder(task, args, home, seed)
        teachers = [teacher(task, pictures, home, seed, args, *each) for each in TAUGHT]
    found = outputs(teachers, device)
    test, labels = found["test"]
    results, lines = {}, []
    for kind, (logits, known) in validation_sets(found, seed).items():
        for way in WAYS:
            weights, probabilities = combined(way, logits, known, test)
            s = score(probabilities, labels)
            results[kind, way] = 100 * s["balanced_accuracy"], s["nll"]
            used = ", ".join(f"{w:.2f}" for w in weights)
            cells = [f"{100 * s['balanced_accuracy']:.1f}", f"{s['nll']:.3f}"]
            lines.append([kind, way, used, *cells])
    print(f"\n{name}, seed {seed}: {len(labels)} development pictures\n")
    print_table(["validation", "", "weights", "balanced accuracy, %", "NLL"], lines)
    return results


def main():
    p = cli.parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="folder that holds the sets' folders")
    p.add_argument("--weights", type=Path, required=True, help="folder with the teachers' weights")
    sets = (*(name for name in SETS if name != "embedded"), EMBEDDED)
    p.add_argument("--sets", nargs="+", default=sets, choices=sets, metavar="NAME")
    p.add_argument("--seeds", type=cli.seed, nargs="+", default=[100, 101], metavar="N")
    p.add_argument("--output", default="runs/curves", help="folder of curves.py")
    p.add_argument("--device", default="auto")
    args = p.parse_args()
    device = cli.pick_device(args.device)
    runs = [run(name, seed, args, device) for seed in args.seeds for name in args.sets]
    lines = []
    for way in WAYS:
        cells = []
        for kind in KINDS:
            balanced, nll = np.mean([results[kind, way] for results in runs], axis=0)
            cells += [f"{balanced:.1f}", f"{nll:.3f}"]
        lines.append([way, *cells])
    head = [text for kind in KINDS for text in (f"{kind}: balanced, %", "NLL")]
    print(f"\nmean of {len(runs)} sets and seeds\n")
    print_table(["validation", *head], lines)


if __name__ == "__main__":
    cli.run(main)
