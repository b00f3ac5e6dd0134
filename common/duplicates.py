"""Finds pictures that are copies of one another: byte for byte, pixel for pixel, or nearly.

A test picture that repeats a training picture praises a model for what it has seen. A near copy
was encoded again, resized, brightened, mirrored, turned by quarters or cropped a little. Two parts
of one kind in one pose look alike as well, but not in their grain, scratches and dirt. So the
search has two stages: coarse descriptors that neither mirroring nor turning changes name
candidates, and the agreement of fine detail decides.

Pictures of several sets stand behind one index, the earlier set's first; `begin` [N] holds, for
each picture, where its own set begins. A pair (i, j) means: picture i repeats picture j of an
earlier set, j < begin[i].
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

BLOCK = 128  # pictures at a time: larger blocks leave the processor's cache, and take twice as long

# Candidates
COARSE = 16  # side in px of the thumbnail that the descriptors are made from
FREQUENCIES = 8  # of its cosine transform, each way
CANDIDATES = 8  # earlier pictures whose thumbnails are compared; the likest is looked at in detail
ALIKE = 0.7  # correlation of thumbnails from which that is worth while

# Detail: all candidates are compared at the rough side, the best of them at the fine one
ROUGH, FINE = 64, 128  # px
CROPS = {  # shares of the side that a copy may show
    ROUGH: (1.0, 0.975, 0.95, 0.925, 0.9),
    FINE: tuple(1 - k / 80 for k in range(9)),
}
SHIFT = 0.1  # of the side, the largest between two copies
WORTH = 0.7  # likeness at the rough side from which a pair is compared at the fine one

# From which likeness a pair counts as copies, by the side it could be compared at. Measured by
# tests/benchmarks/near_duplicates.py: two screws of one kind in one pose reach 0.75.
LIKENESS = {ROUGH: 0.85, FINE: 0.76}


def exact_copies(digests, begin):
    """Find pictures whose digest equals that of an earlier set's: pairs (i, j), j the first such.

    Digests of files find equal files, digests of pixels the same picture in another file. digests:
    a hash per picture.
    """
    first = {}
    pairs = []
    for i, digest in enumerate(digests):
        j = first.setdefault(digest, i)
        if j < begin[i]:
            pairs.append((i, j))
    return pairs


def near_copies(pictures, begin, threshold=None, known=()):
    """Find pictures that nearly repeat one of an earlier set: [(i, j, likeness)], j the likest.

    Such copies have other bytes and other pixels, so no digest finds them. threshold: of the
    likeness, instead of LIKENESS; known: pictures i that are copies anyway, and are left out.

    Time: some 130 operations per pair of pictures for the candidates (10 s for 50,000 pictures
    against as many), 1 to 12 ms more for each picture that has one which looks alike. Memory:
    1.3 kB per picture.
    """
    side = FINE if pictures.side >= FINE else ROUGH
    threshold = threshold or LIKENESS[side]

    # a rough idea of every picture
    everything = blocks(np.arange(len(pictures)))
    thumbnails = torch.cat([grey(pictures, block, COARSE) for block in everything])
    coarse = descriptors(thumbnails)

    # pictures that have an earlier set, one set after another
    later = [i for i in np.flatnonzero(begin) if i not in known]
    later = np.array(later, int)
    found = []
    for start in sorted(set(begin[later])):
        of_set = blocks(later[begin[later] == start])
        for queries in tqdm(of_set, "near copies", disable=None, leave=False):
            i, j, symmetry = likest(queries, start, thumbnails, coarse)
            scores = compare(pictures, i, j, symmetry, ROUGH)
            if side == FINE:
                kept = np.flatnonzero(scores >= WORTH)
                i = i[kept]
                j = j[kept]
                symmetry = symmetry[kept]
                scores = compare(pictures, i, j, symmetry, FINE)
            for k in np.flatnonzero(scores >= threshold):
                found.append((int(i[k]), int(j[k]), float(scores[k])))
    return found


def likest(queries, start, thumbnails, coarse):
    """The earlier picture that looks most like each query: (i, j, symmetry), three arrays [P].

    Only these pairs are worth a comparison in detail; queries that look like no earlier picture
    are left out. queries: indices [Q]; start: where their set begins; coarse: the `descriptors` of
    all thumbnails. symmetry: see `best_symmetry`.
    """
    candidates = nearest(coarse[queries], coarse[:start]).numpy()  # [Q, C]
    count = candidates.shape[1]
    i = np.repeat(queries, count)
    j = candidates.flatten()
    correlation, symmetry = best_symmetry(thumbnails[i], thumbnails[j])

    column = correlation.view(candidates.shape).argmax(1).numpy()
    best = np.arange(len(queries)) * count + column  # a place in i, j for each query
    alike = best[correlation.numpy()[best] >= ALIKE]
    return i[alike], j[alike], symmetry[alike]


def compare(pictures, i, j, symmetry, side):
    """`likeness` [P] of pictures i, after their symmetries, with pictures j, at side x side px.

    It reads the pictures block after block, so that memory does not grow with the pairs.
    """
    found = [np.zeros(0, np.float32)]  # there may be no pairs at all
    for part in blocks(np.arange(len(i))):
        turned = turn(grey(pictures, i[part], side), symmetry[part])
        references = grey(pictures, j[part], side)
        found.append(likeness(turned, references, CROPS[side]).numpy())
    return np.concatenate(found)


def blocks(indices):
    """Cut an array of indices into blocks of BLOCK. The work on one of them stays in the cache."""
    return [indices[start : start + BLOCK] for start in range(0, len(indices), BLOCK)]


def grey(pictures, indices, side):
    """Brightness of pictures at side x side px: float32 [B, side, side], 0..255.

    One channel is compared at a third of the cost of three.
    """
    pixels = pictures.batch(indices).float().mean(3)
    return F.interpolate(pixels[:, None], size=(side, side), mode="bilinear", antialias=True)[:, 0]


# ---------------------------------------------------------------------------------- candidates


def descriptors(thumbnails):
    """Unit vectors [N, 63] of thumbnails [N, S, S], equal for a picture and its mirror images.

    They are equal for its quarter turns too, and for any brightness and contrast, so one product
    of matrices finds candidates among all of these. Mirroring changes only signs in the cosine
    transform c, a quarter turn transposes it besides. So |c_ij| + |c_ji| and ||c_ij| - |c_ji||
    stay; leaving c_00 out takes the brightness away, scaling to length 1 the contrast.
    """
    basis = cosine_basis(thumbnails.shape[-1])
    c = (basis @ thumbnails @ basis.T).abs()
    i, j = torch.triu_indices(FREQUENCIES, FREQUENCIES)[:, 1:]
    sums = c[:, i, j] + c[:, j, i]
    differences = (c[:, i, j] - c[:, j, i]).abs()
    off_diagonal = differences[:, i != j]  # on the diagonal they are 0
    return F.normalize(torch.cat([sums, off_diagonal], 1), dim=1)


def cosine_basis(n):
    """The first rows of the orthonormal cosine transform (DCT-II): float32 [FREQUENCIES, n].

    The low frequencies of a thumbnail survive a small crop or another encoding.
    """
    k = np.arange(FREQUENCIES)[:, None]
    i = np.arange(n)[None]
    basis = np.sqrt(2 / n) * np.cos(np.pi * k * (2 * i + 1) / (2 * n))
    basis[0] /= np.sqrt(2)
    return torch.from_numpy(basis).float()


def nearest(queries, references):
    """The most similar references of each query: int64 [Q, CANDIDATES], or fewer columns.

    The original of a copy is expected among them. queries, references: unit vectors [., D].
    """
    count = min(CANDIDATES, len(references))
    return (queries @ references.T).topk(count, dim=1).indices


def symmetries(pictures):
    """The eight mirrorings and quarter turns of square pictures [P, S, S]: [8, P, S, S].

    A copy may be any of them.
    """
    quarters = [torch.rot90(pictures, k, (-2, -1)) for k in range(4)]
    mirrored = [turned.flip(-1) for turned in quarters]
    return torch.stack(quarters + mirrored)


def best_symmetry(thumbnails, references):
    """The symmetry that makes each thumbnail most like its reference: (correlation, number 0..7).

    The comparison in detail then needs that symmetry alone. Both arguments: [P, S, S]; both
    results: [P].
    """

    def unit(x):
        x = x.flatten(-2)
        return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)

    correlation = (unit(symmetries(thumbnails)) * unit(references)).sum(-1)  # [8, P]
    return correlation.max(0)


def turn(pictures, symmetry):
    """Each picture [P, S, S] after its symmetry [P]. It undoes what was done to a copy."""
    return symmetries(pictures)[symmetry, torch.arange(len(pictures))]


# -------------------------------------------------------------------------------------- detail


def likeness(pictures, references, crops=(1.0,)):
    """Agreement in detail of pairs [P, S, S]: float [P], 1 for equal pictures.

    It tells copies from parts that merely look alike, whatever the brightness, a small shift or a
    crop. It is the highest correlation of their `detail` over shifts, by the Fourier transform,
    and over crops of either picture. crops: shares of the side.
    """
    side = pictures.shape[-1]
    reach = max(1, round(SHIFT * side))
    shifts = torch.cat([torch.arange(reach), torch.arange(-reach, 0)])
    whole_a = torch.fft.fft2(detail(pictures))
    whole_b = torch.fft.fft2(detail(references))
    best = torch.zeros(len(pictures))
    for share in crops:
        cropped_a = torch.fft.fft2(detail(crop(pictures, share)))
        cropped_b = torch.fft.fft2(detail(crop(references, share)))
        for a, b in ((cropped_a, whole_b), (whole_a, cropped_b)):
            correlation = torch.fft.ifft2(a * b.conj()).real
            near = correlation[:, shifts][:, :, shifts]
            best = torch.maximum(best, near.amax((-2, -1)))
    return best


def crop(pictures, share):
    """The middle of pictures [P, S, S], `share` of their side, enlarged to S. A copy may be one."""
    theta = torch.tensor([[share, 0.0, 0.0], [0.0, share, 0.0]]).expand(len(pictures), 2, 3)
    grid = F.affine_grid(theta, [len(pictures), 1, *pictures.shape[1:]], align_corners=False)
    enlarged = F.grid_sample(pictures[:, None], grid, padding_mode="border", align_corners=False)
    return enlarged[:, 0]


def detail(pictures):
    """What is finer than a few pixels in pictures [P, S, S], as strong everywhere, of length 1.

    Outlines are the same for all parts of a kind; dividing by the local strength lets grain and
    dirt count as much. It is faded out to the edges.
    """
    side = pictures.shape[-1]
    sigma = 2.0 if side <= ROUGH else 1.0
    fine = pictures - blur(pictures, sigma)
    strength = blur(fine.square(), 4.0).sqrt()
    even = fine / (strength + 1.0)
    centred = even - even.mean((-2, -1), keepdim=True)
    fade = torch.hann_window(side, periodic=False).sqrt()
    faded = centred * fade[:, None] * fade
    return F.normalize(faded.flatten(1), dim=1).view_as(pictures)


def blur(pictures, sigma):
    """Gaussian blur of [P, S, S]; sigma in px. `detail` is what it takes away."""
    rows = blur_matrix(pictures.shape[-1], sigma)
    return rows @ (pictures @ rows.T)


@cache
def blur_matrix(n, sigma):
    """What a Gaussian blur does to a line of n pixels, mirrored at its ends: float32 [n, n].

    Two products with it blur a picture nine times as fast as a convolution.
    """
    reach = round(3 * sigma)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights = weights / weights.sum()

    # which pixel each weight falls on; two may fall on one near the ends, so they are added up
    mirrored = np.pad(np.arange(n), reach, mode="reflect")
    rows = np.arange(n)[:, None]
    columns = mirrored[rows + offsets + reach]
    matrix = np.zeros((n, n))
    np.add.at(matrix, (rows, columns), weights)
    return torch.from_numpy(matrix).float()
