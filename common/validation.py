"""Which pictures validate: what is held out of train/, and whether a val/ of one's own tells.

Temperatures and the teachers' weights are fitted on validation pictures. Where these nearly repeat
training pictures, whoever remembers best is praised. So near-duplicates stay on one side.
"""

import re
from collections import Counter

import numpy as np

from common import files
from common.audit import near_duplicates
from common.files import UserError

MOST = 100_000  # pictures that are compared with all others: from half a minute to half an hour
ROUNDS = 10  # searches over both sides of a split, at most; on solar cells five were enough
LARGE = 0.2  # share of a class from which on a cluster of near-duplicates is named
LEAST = 3  # pictures of it: two in a class of nine are no sign of anything


def hold_out(home, train, classes, share, group_regex=None):
    """The paths of the training pictures that validate.

    Pictures that `group_regex` names alike and near-duplicates stay on one side. home: folder of
    the decoded cache; train: labelled `Pictures`; share: of each class. Says in lines how far
    near-duplicates decide. Raises UserError where a class cannot be divided.
    """
    require_match(below(train), group_regex)
    parts, labels = groups_of(train, group_regex), train.labels.numpy()
    pairs = compare(home, train, np.arange(len(train)))
    clusters = joined(parts, pairs)
    val = draw(labels, clusters, share)
    if pairs:
        clusters, val = draw_again(home, train, clusters, val, share)
    for line in cluster_lines(train.paths(), labels, clusters, parts, classes):
        print(line)

    undivided = classes_without(labels, val, classes)
    if pairs and undivided:
        print(
            f"warning: near-duplicates leave no honest split of {', '.join(undivided)}, so pictures"
            " are divided without regard to them and validation praises who remembers; give a val/"
        )
        val = draw(labels, parts, share)
        undivided = classes_without(labels, val, classes)
    if undivided:
        raise UserError(
            f"{', '.join(undivided)}: too few pictures or groups to be split into train and val; "
            "give a val/ folder, or another --val-fraction"
        )
    return train.take(val).paths()


def draw_again(home, train, clusters, val, share):
    """(clusters, val) as of `hold_out`, drawn until no near-duplicates are found on two sides."""
    for _ in range(ROUNDS):
        missed = across(home, train, val)
        if not missed:
            return clusters, val
        print(f"{len(missed)} near-duplicates on two sides, which are drawn again")
        clusters = joined(clusters, missed)
        val = draw(train.labels.numpy(), clusters, share)
    print(f"warning: near-duplicates may be on two sides still, after {ROUNDS} searches")
    return clusters, val


def across(home, train, val):
    """Near-duplicates [(i, j)] on two sides, which the search among all pictures may have missed.

    It names the likest picture alone. train: `Pictures`; val: the rows that validate.
    """
    rows = np.concatenate([val, np.setdiff1d(np.arange(len(train)), val)])
    begin = np.repeat([0, len(val)], [len(val), len(rows) - len(val)])
    return [(rows[i], rows[j]) for i, j, *_ in compare(home, train.take(rows), begin)]


def compare(home, pictures, begin):
    """Near-duplicates [(i, j, likeness)], as `near_duplicates.py` finds them.

    They are searched for once: a file in the folder `home` keeps them. Of too many pictures there
    are none, and a line says so.
    """
    if len(pictures) > MOST:
        print(
            f"warning: no search for near-duplicates among {len(pictures)} pictures, more than "
            f"{MOST}; validate on pictures of other parts or days, in a val/ folder"
        )
        return []
    identity = [near_duplicates.VERSION, pictures.fingerprint(), begin.tolist()]

    def search():
        return {"pairs": near_duplicates.near_duplicates(pictures, begin)}

    return files.remembered(home, "copies", identity, search)["pairs"]


def below(pictures):
    """Paths of `Pictures` without their set's own folder, as `group_regex` sees them."""
    return [path.split("/", 1)[1] for path in pictures.paths()]


def groups_of(pictures, pattern):
    """What each of the `Pictures` shows: its part by the pattern, if there is one, or its path."""
    return [pattern and part_of(path, pattern) or path for path in below(pictures)]


def require_match(paths, pattern):
    """Raise a UserError for a --group-regex that matches none of the paths."""
    if pattern and all(part_of(path, pattern) is None for path in paths):
        raise UserError(f"--group-regex {pattern!r} matches no path; one of them is {paths[0]!r}")


def part_of(path, pattern):
    """The first match group of a pattern in a path, None where it does not match or is empty."""
    match = re.search(pattern, path)
    return match and match.group(1) or None


def joined(groups, pairs):
    """Group names in which the groups of each pair (i, j, ...) have become one: N names."""
    parent = {group: group for group in groups}

    def root(group):
        while parent[group] != group:
            group = parent[group]
        return group

    for i, j, *_ in pairs:
        parent[root(groups[i])] = root(groups[j])
    return [root(group) for group in groups]


def cluster_lines(paths, labels, clusters, parts, classes):
    """In words: how many clusters near-duplicates make, and those that hold much of a class."""
    members = {}
    for row, (cluster, part) in enumerate(zip(clusters, parts)):
        members.setdefault(cluster, {}).setdefault(part, []).append(row)
    grown = [sum(each.values(), []) for each in members.values() if len(each) > 1]
    if not grown:
        return
    yield (
        f"{sum(map(len, grown))} of {len(paths)} pictures of train hang together as near-duplicates"
        f", in {len(grown)} clusters of up to {max(map(len, grown))}: each stays on one side"
    )
    total = np.bincount(labels)
    for rows in grown:
        for k, count in Counter(labels[rows].tolist()).items():
            if count >= LEAST and count > LARGE * total[k]:
                yield (
                    f"warning: {count} of {total[k]} pictures of {classes[k]} are one cluster, "
                    f"{paths[rows[0]]} and {paths[rows[-1]]} among them; if these are different "
                    "parts, give a val/ folder"
                )


def draw(labels, groups, share, seed=0):
    """The rows to hold out, whole groups at a time, each class near its share: sorted int64 [n].

    labels: int [N]; groups: N names; share: of each class. Groups are visited in an order drawn
    from the seed, and held out when that brings the class counts nearer to their targets.
    """
    rows_of = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)

    target = np.maximum(1, np.round(share * np.bincount(labels)))
    missing = Counter(dict(enumerate(target.astype(int).tolist())))
    class_of = labels.tolist()  # numpy is slow at single rows
    val, names = [], sorted(rows_of)
    for position in np.random.default_rng([seed, 0]).permutation(len(names)).tolist():
        rows = rows_of[names[position]]
        counts = Counter(class_of[row] for row in rows)
        if sum(abs(missing[k] - n) - abs(missing[k]) for k, n in counts.items()) < 0:
            missing.subtract(counts)
            val += rows
    return np.sort(np.array(val, np.int64))


def classes_without(labels, val, classes):
    """The names of classes that have no picture on one of the sides."""
    total = np.bincount(labels, minlength=len(classes))
    held = np.bincount(labels[val], minlength=len(classes))
    return [name for name, n, of in zip(classes, held, total) if n in (0, of)]


def repeated(home, pictures, val, kind, drop):
    """Say how many pictures validation nearly repeats; returns the paths of those to drop.

    home: folder of the decoded cache; pictures, val: `Pictures`; kind: "training" or "unlabelled".
    """
    both = val + pictures
    begin = np.repeat([0, len(val)], [len(val), len(pictures)])
    pairs = [(both.path(i), both.path(j)) for i, j, _ in compare(home, both, begin)]
    if pairs:
        count, of = len(pairs), len({theirs for _, theirs in pairs})
        verb = "are" if near_duplicates.shows_detail(val.view_size) else "may be"
        remedy = "left out" if drop else f"--drop-leaks leaves these {kind} pictures out"
        print(
            f"{'' if drop else 'warning: '}{count} {kind} pictures {verb} near-duplicates of {of} "
            f"of {len(val)} validation pictures ({' = '.join(pairs[0])}), so validation praises "
            f"who remembers; {remedy}"
        )
    return [ours for ours, _ in pairs] if drop else []
