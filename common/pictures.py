"""Decoded pictures of one or several folders behind one index."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import numpy as np
import torch

from common.losses import UNLABELLED


class Pictures:
    """Rows of one or several `Decoded` folders, with labels.

    A picture's number here is the `index` of its views, so teachers and student must build it
    alike: the labelled training pictures, then the unlabelled ones.
    """

    def __init__(self, parts, part_of, row_of, labels):
        """parts: list of `Decoded`; part_of, row_of, labels: int64 arrays [N]."""
        self.parts, self.part_of, self.row_of = parts, part_of, row_of
        self.labels = torch.from_numpy(labels)

    @classmethod
    def of(cls, decoded, rows=None, labels=None):
        """Rows of one folder, by default all of them and without a label."""
        rows = np.arange(len(decoded.paths)) if rows is None else rows
        labels = np.full(len(rows), UNLABELLED) if labels is None else labels
        return cls([decoded], np.zeros(len(rows), np.int64), rows, labels)

    def __len__(self):
        return len(self.row_of)

    def __add__(self, other):
        """These pictures with the other ones behind them."""
        part_of = np.concatenate([self.part_of, other.part_of + len(self.parts)])
        row_of = np.concatenate([self.row_of, other.row_of])
        labels = torch.cat([self.labels, other.labels]).numpy()
        return Pictures([*self.parts, *other.parts], part_of, row_of, labels)

    def take(self, numbers):
        """The pictures with these numbers, in this order."""
        labels = self.labels.numpy()[numbers]
        return Pictures(self.parts, self.part_of[numbers], self.row_of[numbers], labels)

    @property
    def side(self):
        """Side of the decoded pictures in px."""
        return self.parts[0].images.shape[1]

    def batch(self, indices, device="cpu"):
        """uint8 [B, S, S, 3] on the device."""
        rows = [self.parts[self.part_of[i]].images[self.row_of[i]] for i in indices]
        batch = torch.from_numpy(np.stack(rows))
        if torch.device(device).type == "cuda":  # else the copy would wait for the GPU
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)

    def ahead(self, plan, device):
        """(indices, views, `batch` of the indices) of each step; the next one is read meanwhile.

        plan: iterable of (indices, views).
        """
        with ThreadPoolExecutor(1) as reader:
            steps = ((*step, reader.submit(self.batch, step[0], device)) for step in plan)
            for (indices, views, batch), _ in pairwise(chain(steps, [None])):
                yield indices, views, batch.result()

    def path(self, i):
        """Where picture i lies, from its folder's name on: train/good/17.jpg."""
        part = self.parts[self.part_of[i]]
        return f"{part.folder.name}/{part.paths[self.row_of[i]]}"

    def paths(self):
        """`path` of every picture."""
        return [self.path(i) for i in range(len(self))]

    def digests(self):
        """sha256 of each picture's file."""
        return [self.parts[p].digests[row] for p, row in zip(self.part_of, self.row_of)]

    def pixel_digests(self):
        """sha256 of each picture's decoded pixels: equal for the same pixels in another file."""
        images = (self.parts[p].images[row] for p, row in zip(self.part_of, self.row_of))
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]

    def facts(self):
        """(width, height, bytes) of each picture's file."""
        return [self.parts[p].facts[row] for p, row in zip(self.part_of, self.row_of)]

    def fingerprint(self):
        """A hash of what the pictures are, in which order, and of their labels."""
        read = [part.fingerprint for part in self.parts]
        rows = [self.part_of.tolist(), self.row_of.tolist(), self.labels.tolist()]
        return hashlib.sha256(json.dumps([read, rows]).encode()).hexdigest()
