"""Which pictures validate: what is held out of train/, and whether a val/ of one's own tells.

Temperatures and the teachers' weights are fitted on validation pictures. Where these nearly repeat
training pictures, whoever remembers best is praised. So near-duplicates stay on one side.
"""

import re
from collections import Counter

import numpy as np

from common.audit import near_duplicates
from common.files import UserError

MOST = 100_000  # pictures that are compared with all others: from half a minute to half an hour
LARGE = 0.2  # share of a class from which on a cluster of near-duplicates is named
LEAST = 3  # pictures of it: two in a class of nine are no sign of anything


def hold_out(home, train, classes, share, group_regex=None):
    """The paths of the training pictures that validate.

    Pictures that `group_regex` names alike and near-duplicates stay on one side. home: folder of
    the decoded cache; train: labelled `Pictures`; share: of each class. Says in lines how far
    near-duplicates decide. Raises UserError where a class cannot be divided.
    """
    parts, labels = groups_of(below(train), group_regex), train.labels.numpy()
    pairs = compare(home, train, np.arange(len(train)))
    clusters = joined(parts, pairs)
    for line in cluster_lines(train.paths(), labels, clusters, parts, classes):
        print(line)

    val = draw(labels, clusters, share)
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
            "give a val/ folder"
        )
    return train.take(val).paths()


def compare(home, pictures, begin):
    """Near-duplicates [(i, j, likeness)]; none, and a line, where there are too many pictures."""
    if len(pictures) <= MOST:
        return near_duplicates.remembered(home, pictures, begin)
    print(
        f"warning: no search for near-duplicates among {len(pictures)} pictures, more than {MOST}; "
        "validate on pictures of other parts or days, in a val/ folder"
    )
    return []


def below(pictures):
    """Paths of `Pictures` without their set's own folder, as `group_regex` sees them."""
    return [path.split("/", 1)[1] for path in pictures.paths()]


def groups_of(paths, pattern):
    """A group name per path: the first match group of the pattern, or the path itself."""
    if pattern is None:
        return paths
    parts = [part_of(path, pattern) for path in paths]
    if set(parts) <= {None}:
        raise UserError(f"--group-regex {pattern!r} matches no path; one of them is {paths[0]!r}")
    return [part or path for part, path in zip(parts, paths)]


def parts_of(pictures, pattern):
    """What each picture shows, as `groups_of` names it, also where the pattern matches no path."""
    return [pattern and part_of(path, pattern) or path for path in below(pictures)]


def part_of(path, pattern):
    """The first match group of a pattern in a path, None where it does not match."""
    match = re.search(pattern, path)
    return match and (match.group(1) or "")


def joined(groups, pairs):
    """Group names in which the groups of each pair (i, j, ...) have become one: N names."""
    parent = {group: group for group in groups}

    def root(group):
        while parent[group] != group:
            parent[group] = group = parent[parent[group]]  # halves the way for the next one
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

    total = np.bincount(labels)
    target = np.maximum(1, np.round(share * total)).astype(int)
    class_of, missing, val = np.asarray(labels).tolist(), target.tolist(), []  # numpy is slow here
    names = sorted(rows_of)
    for position in np.random.default_rng([seed, 0]).permutation(len(names)).tolist():
        rows, counts = rows_of[names[position]], {}
        for row in rows:
            counts[class_of[row]] = counts.get(class_of[row], 0) + 1
        if sum([abs(missing[k] - n) - abs(missing[k]) for k, n in counts.items()]) < 0:
            for k, n in counts.items():
                missing[k] -= n
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
    pairs = repeats(home, pictures, val)
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


def repeats(home, pictures, val):
    """[(path of a picture, path of the validation picture that it nearly repeats)]."""
    both = val + pictures
    begin = np.repeat([0, len(val)], [len(val), len(pictures)])
    pairs = compare(home, both, begin)
    return [(both.path(i), both.path(j)) for i, j, _ in pairs]
