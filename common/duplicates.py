"""Pictures that are copies of one another: byte for byte, pixel for pixel, or nearly.

A near copy was encoded again, resized, brightened, mirrored, turned by quarters or cropped a little. Two parts of one
kind in one pose look alike as well, but not in their grain, scratches and dirt. So the search has two stages: coarse
descriptors that neither mirroring nor turning changes name candidates, and the agreement of fine detail decides.

Pictures of several sets stand behind one index, the earlier set's first; `begin` [N] holds, for each picture, where its own
set begins. A pair (i, j) means: picture i repeats picture j of an earlier set, j < begin[i].
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

COARSE = 16  # side in px of the thumbnail the descriptors are made from
FREQUENCIES = 8  # of its cosine transform, each way
CANDIDATES = 8  # of the earlier sets whose thumbnails each picture is compared with; the likest is looked at in detail
ALIKE = 0.7  # correlation of thumbnails from which that is worth while
ROUGH, FINE = 64, 128  # sides in px at which candidates, and then the best of them, are compared
CROPS = {ROUGH: (1.0, 0.975, 0.95, 0.925, 0.9), FINE: tuple(1 - k / 80 for k in range(9))}  # shares of the side that a copy may show
SHIFT = 0.1  # of the side, the largest between two copies
WORTH = 0.7  # likeness at the rough side from which a pair is compared at the fine one
LIKENESS = {ROUGH: 0.85, FINE: 0.76}  # from which a pair counts as copies, by the side it could be compared at; measured by
# tests/benchmarks/near_duplicates.py: two screws of one kind in one pose reach 0.75
BLOCK = 128  # pictures at a time: larger ones leave the processor's cache, and take twice as long


def exact_copies(digests, begin):
    """Pairs (i, j) with equal digests, j the first such picture of an earlier set. digests: a hash per picture."""
    first, pairs = {}, []
    for i, digest in enumerate(digests):
        j = first.setdefault(digest, i)
        if j < begin[i]:
            pairs.append((i, j))
    return pairs


def near_copies(pictures, begin, threshold=None, known=()):
    """[(i, j, likeness)] of every picture that nearly repeats one of an earlier set; j is the likest.

    threshold: of the likeness, instead of LIKENESS; known: pictures i that are copies anyway, and are left out.
    Time: some 130 operations per pair of pictures for the candidates (10 s for 50,000 pictures against as many), 1 to 12 ms
    more for each picture that has one which looks alike. Memory: 1.3 kB per picture.
    """
    thumbnails = torch.cat([grey(pictures, block, COARSE) for block in blocks(np.arange(len(pictures)))])
    coarse = descriptors(thumbnails)
    side = FINE if pictures.packs[0].images.shape[1] >= FINE else ROUGH
    threshold = threshold or LIKENESS[side]
    later, found = np.array([i for i in np.flatnonzero(begin) if i not in known], int), []
    for start in sorted(set(begin[later])):  # one set after another
        for queries in tqdm(blocks(later[begin[later] == start]), "near copies", disable=None, leave=False):
            candidates = nearest(coarse[queries], coarse[:start]).numpy()
            i, j = np.repeat(queries, candidates.shape[1]), candidates.flatten()
            correlation, symmetry = best_symmetry(thumbnails[i], thumbnails[j])
            best = correlation.view(candidates.shape).argmax(1).numpy() + np.arange(len(queries)) * candidates.shape[1]
            best = best[correlation.numpy()[best] >= ALIKE]
            scores = compare(pictures, i[best], j[best], symmetry[best], ROUGH)
            if side == FINE:
                best = best[scores >= WORTH]
                scores = compare(pictures, i[best], j[best], symmetry[best], FINE)
            found += [(int(i[k]), int(j[k]), float(score)) for k, score in zip(best, scores) if score >= threshold]
    return found


def compare(pictures, i, j, symmetry, side):
    """`likeness` [P] of pictures i, after their symmetries, with pictures j, at side x side px."""
    found = [likeness(turn(grey(pictures, i[part], side), symmetry[part]), grey(pictures, j[part], side), CROPS[side]).numpy()
             for part in blocks(np.arange(len(i)))]
    return np.concatenate(found) if found else np.zeros(0)


def blocks(indices):
    return [indices[start:start + BLOCK] for start in range(0, len(indices), BLOCK)]


def grey(pictures, indices, side):
    """Brightness of pictures at side x side px: float32 [B, side, side], 0..255."""
    pixels = pictures.batch(indices).float().mean(3)
    return F.interpolate(pixels[:, None], size=(side, side), mode="bilinear", antialias=True)[:, 0]


def descriptors(thumbnails):
    """Unit vectors [N, 63], equal for a picture, its mirror images and its quarter turns, and for any brightness and contrast.

    Mirroring changes only signs in the cosine transform c, a quarter turn transposes it besides. So |c_ij| + |c_ji| and
    ||c_ij| - |c_ji|| stay; leaving c_00 out takes the brightness away, scaling to length 1 the contrast.
    """
    basis = cosine_basis(thumbnails.shape[-1])
    c = (basis @ thumbnails @ basis.T).abs()
    i, j = torch.triu_indices(FREQUENCIES, FREQUENCIES)[:, 1:]
    both = torch.cat([c[:, i, j] + c[:, j, i], (c[:, i, j] - c[:, j, i]).abs()[:, i != j]], 1)
    return F.normalize(both, dim=1)


def cosine_basis(n):
    """The first rows of the orthonormal cosine transform (DCT-II) of length n: float32 [FREQUENCIES, n]."""
    k, i = np.arange(FREQUENCIES)[:, None], np.arange(n)[None]
    basis = np.sqrt(2 / n) * np.cos(np.pi * k * (2 * i + 1) / (2 * n))
    basis[0] /= np.sqrt(2)
    return torch.from_numpy(basis).float()


def nearest(queries, references):
    """The most similar references of each query, as rows: int64 [Q, CANDIDATES] or fewer; unit vectors [., D]."""
    return (queries @ references.T).topk(min(CANDIDATES, len(references)), dim=1).indices


def symmetries(pictures):
    """The eight mirrorings and quarter turns of square pictures [P, S, S]: [8, P, S, S]."""
    quarters = [torch.rot90(pictures, k, (-2, -1)) for k in range(4)]
    return torch.stack([*quarters, *(turned.flip(-1) for turned in quarters)])


def best_symmetry(thumbnails, references):
    """(correlation, number 0..7) [P] of the symmetry that makes each thumbnail correlate best with its reference."""
    def unit(x):
        x = x.flatten(-2)
        return F.normalize(x - x.mean(-1, keepdim=True), dim=-1)

    return (unit(symmetries(thumbnails)) * unit(references)).sum(-1).max(0)


def turn(pictures, symmetry):
    """Each picture [P, S, S] after its symmetry [P]."""
    return symmetries(pictures)[symmetry, torch.arange(len(pictures))]


def likeness(pictures, references, crops=(1.0,)):
    """Agreement in detail of pairs [P, S, S], whatever the brightness, a small shift or a crop: float [P], 1 for equal pictures.

    The highest correlation of their `detail` over shifts, by the Fourier transform, and over crops of either picture.
    """
    best = torch.zeros(len(pictures))
    reach = max(1, round(SHIFT * pictures.shape[-1]))
    near = torch.cat([torch.arange(reach), torch.arange(-reach, 0)])
    plain, its_plain = (torch.fft.fft2(detail(each)) for each in (pictures, references))
    for share in crops:
        for a, b in ((torch.fft.fft2(detail(crop(pictures, share))), its_plain), (plain, torch.fft.fft2(detail(crop(references, share))))):
            correlation = torch.fft.ifft2(a * b.conj()).real
            best = torch.maximum(best, correlation[:, near][:, :, near].amax((-2, -1)))
    return best


def crop(pictures, share):
    """The middle of pictures [P, S, S], `share` of their side, enlarged to S."""
    theta = torch.tensor([[share, 0.0, 0.0], [0.0, share, 0.0]]).expand(len(pictures), 2, 3)
    grid = F.affine_grid(theta, [len(pictures), 1, *pictures.shape[1:]], align_corners=False)
    return F.grid_sample(pictures[:, None], grid, padding_mode="border", align_corners=False)[:, 0]


def detail(pictures):
    """What is finer than a few pixels in pictures [P, S, S], as strong everywhere, faded out to the edges, of length 1.

    Outlines are the same for all parts of a kind; dividing by the local strength lets grain and dirt count as much.
    """
    fine = pictures - blur(pictures, 2.0 if pictures.shape[-1] <= ROUGH else 1.0)
    even = fine / (blur(fine.square(), 4.0).sqrt() + 1.0)
    window = torch.hann_window(pictures.shape[-1], periodic=False).sqrt()
    return F.normalize(((even - even.mean((-2, -1), keepdim=True)) * window[:, None] * window).flatten(1), dim=1).view_as(pictures)


def blur(pictures, sigma):
    """Gaussian blur of [P, S, S]; sigma in px."""
    rows = blur_matrix(pictures.shape[-1], sigma)
    return rows @ (pictures @ rows.T)


@cache
def blur_matrix(n, sigma):
    """float32 [n, n]: what a Gaussian blur does to a line of n pixels, mirrored at its ends. Nine times as fast as a convolution."""
    reach = round(3 * sigma)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    source = np.pad(np.arange(n), reach, mode="reflect")
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n)[:, None], source[np.arange(n)[:, None] + offsets + reach]), weights / weights.sum())
    return torch.from_numpy(matrix).float()
