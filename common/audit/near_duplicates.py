"""Finds pictures that are copies of one another: byte for byte, pixel for pixel, or nearly.

A near-duplicate was encoded again, resized, brightened, mirrored, turned by quarters or cropped a
little. Two parts of one kind in one pose look alike as well, but not in their grain, scratches and
dirt: so coarse descriptors name candidates, and the agreement of fine detail decides.

A pair (i, j): picture i repeats picture j < begin[i]. `begin`, int array [N], is where the set of i
begins, to look across sets that stand one behind another; np.arange(N) looks everywhere.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler
from tqdm import tqdm

VERSION = 1  # raise it when another pair may be found
BLOCK = 64  # pictures at a time: larger blocks leave the processor's cache and take longer
COARSE = 16  # size in px of the thumbnails that name candidates
FREQUENCIES = 8  # of their cosine transform, each way
CANDIDATES = 8  # pictures whose thumbnails are compared; detail is compared with the likest
WORTH = 0.7  # correlation, or likeness at the rough size, from which a finer look is worth while
ROUGH, FINE = 64, 128  # px at which detail is compared
CROPS = {ROUGH: [1 - k / 40 for k in range(5)], FINE: [1 - k / 80 for k in range(9)]}  # of the size
SHIFT = 0.1  # of the size, the largest between two copies
ENOUGH = 0.9  # share of FINE that a picture needs: the default view size rounds both sides
FLOOR = 0.3  # of the mean amplitude
# Of copies, at least (tests/benchmarks/near_duplicates.py): of pictures that show detail, and else
LIKENESS = {FINE: 0.60, ROUGH: 0.70}


def exact_copies(digests, begin):
    """Find pictures that have the digest of an earlier one: pairs (i, j), j the first such.

    digests: a hash per picture, of its file, or of its pixels to find them in other files too.
    """
    first = {}
    originals = [first.setdefault(digest, i) for i, digest in enumerate(digests)]
    return [(i, j) for i, j in enumerate(originals) if j < begin[i]]


def near_duplicates(pictures, begin, threshold=None, skip=()):
    """Find pictures that nearly repeat an earlier one: [(i, j, likeness)], j the likest.

    pictures: `Pictures`; threshold: of the likeness, instead of LIKENESS; skip: pictures i to leave
    out. Time: 130 operations per pair of pictures for the candidates (10 s for 50,000 against as
    many), 1 to 12 ms for each i that has one which looks alike. Memory: 1.3 kB per picture.
    """
    large = np.prod(pictures.view_size) ** 0.5 > ENOUGH * FINE
    sizes = [ROUGH, FINE] if large else [ROUGH]
    threshold = threshold or likeness_of_copies(pictures.view_size)
    everything = BatchSampler(range(len(pictures)), BLOCK, drop_last=False)
    thumbnails = torch.cat([grey(pictures, block, COARSE) for block in everything])
    thumbnails = F.layer_norm(thumbnails, (COARSE, COARSE)) / COARSE  # of mean 0 and length 1
    coarse = descriptors(thumbnails)

    pairs = []
    later = np.setdiff1d(np.flatnonzero(begin), list(skip))
    blocks = BatchSampler(later, BLOCK, drop_last=False)
    for block in tqdm(blocks, "near-duplicates", disable=None, leave=False):
        i = torch.tensor(block)
        j, symmetry, scores = likest(i, torch.from_numpy(begin[block]), thumbnails, coarse)
        for size in sizes:  # the agreement of their detail, ever finer
            kept = scores >= WORTH
            i, j, symmetry, scores = i[kept], j[kept], symmetry[kept], scores[kept]
            if len(i):
                turned = symmetries(grey(pictures, i, size))[symmetry, torch.arange(len(i))]
                scores = likeness(turned, grey(pictures, j, size), CROPS[size])
        matches = zip(i.tolist(), j.tolist(), scores.tolist())
        pairs += [match for match in matches if match[2] >= threshold]
    return pairs


def likest(i, limits, thumbnails, coarse):
    """Of each picture i[b] the likest one before limits[b], by thumbnails: (j, symmetry, score).

    All int64 [B], but scores are correlations, float [B]; symmetry is the number of that one of the
    `symmetries` of i which shows it. thumbnails: float [N, S, S], of mean 0 and length 1; coarse:
    their `descriptors`, by which CANDIDATES are named.
    """
    cosine = coarse[i] @ coarse[: limits.max()].T
    cosine[torch.arange(limits.max()) >= limits[:, None]] = -torch.inf
    candidates = cosine.topk(min(CANDIDATES, cosine.shape[1])).indices  # [B, C]

    turned = symmetries(thumbnails[i])[:, :, None]  # [8, B, 1, S, S]
    correlation = (turned * thumbnails[candidates]).flatten(3).sum(-1)  # [8, B, C]
    allowed = candidates < limits[:, None]  # of few pictures not all candidates are
    correlation, symmetry = correlation.where(allowed, -torch.inf).max(0)  # [B, C]
    scores, column = correlation.max(1)
    best = torch.arange(len(i)), column
    return candidates[best], symmetry[best], scores


def shows_detail(view_size):
    """Whether pictures of [H, W] px have about as many pixels as the fine size, either way."""
    return min(view_size) > ENOUGH * FINE


def likeness_of_copies(view_size):
    """From which likeness on pictures of [H, W] px are called copies."""
    return LIKENESS[FINE if shows_detail(view_size) else ROUGH]


def grey(pictures, indices, size):
    """Brightness, squeezed to a square: float32 [B, size, size], 0..255.

    At a third of the cost of three channels.
    """
    pixels = pictures.batch(np.asarray(indices)).float().mean(3)
    return F.interpolate(pixels[:, None], size=(size, size), mode="bilinear", antialias=True)[:, 0]


def symmetries(pictures):
    """The eight mirrorings and quarter turns of square pictures [P, S, S]: [8, P, S, S]."""
    quarters = [torch.rot90(pictures, k, (-2, -1)) for k in range(4)]
    return torch.stack(quarters + [turned.flip(-1) for turned in quarters])


def descriptors(thumbnails):
    """Unit vectors [N, 63] of thumbnails, equal for a picture and its `symmetries`.

    One product of matrices then finds candidates among all of these. Mirroring changes only signs
    in the cosine transform c, a quarter turn transposes it besides, so |c_ij| + |c_ji| and
    ||c_ij| - |c_ji|| stay. Without c_00 and of length 1, they leave out brightness and contrast.
    """
    k = np.arange(FREQUENCIES)[:, None]
    basis = np.cos(np.pi * k * (np.arange(COARSE) + 0.5) / COARSE) * np.where(k, 2**0.5, 1)
    basis = torch.from_numpy(basis / COARSE**0.5).float()  # first rows of the orthonormal DCT-II
    c = (basis @ thumbnails @ basis.T).abs()
    i, j = torch.triu_indices(FREQUENCIES, FREQUENCIES)[:, 1:]
    sums = c[:, i, j] + c[:, j, i]
    differences = (c[:, i, j] - c[:, j, i]).abs()[:, i != j]  # on the diagonal they are 0
    return F.normalize(torch.cat([sums, differences], 1))


def likeness(pictures, references, crops=(1.0,)):
    """Agreement in detail of pairs [P, S, S]: float [P], 1 for equal pictures.

    The highest correlation of their `detail` over small shifts, by the Fourier transform, and over
    crops of either picture, its middle enlarged. crops: shares of the size.
    """
    reach = max(1, round(SHIFT * pictures.shape[-1]))
    shifts = torch.arange(-reach, reach)
    both = torch.cat([pictures, references])[:, None]
    whole = torch.eye(2, 3).expand(len(both), 2, 3)
    whole_a, whole_b = spectrum(both[:, 0]).chunk(2)
    best = torch.zeros(len(pictures))
    for share in crops:
        grid = F.affine_grid(share * whole, both.shape, align_corners=False)
        middle = F.grid_sample(both, grid, padding_mode="border", align_corners=False)
        middle_a, middle_b = spectrum(middle[:, 0]).chunk(2)
        for a, b in ((middle_a, whole_b), (whole_a, middle_b)):
            correlation = torch.fft.ifft2(a * b.conj()).real[:, shifts][:, :, shifts]
            best = torch.maximum(best, correlation.amax((-2, -1)))
    return best


def spectrum(pictures):
    """Fourier transform of their `detail`, whitened halfway, of mean square 1: complex [P, S, S].

    A thread or a brushed face repeats itself: a few frequencies hold most of its energy, and those
    are the same for every part of a design. Phase correlation (Kuglin and Hines 1975) counts all
    frequencies alike, and then noise decides; the root of the amplitude lies between. FLOOR keeps
    those low that an enlarged picture does not have.
    """
    f = torch.fft.fft2(detail(pictures))
    amplitude = f.abs()
    f = f / (amplitude + FLOOR * amplitude.mean((-2, -1), keepdim=True) + 1e-6).sqrt()
    return f / f.abs().square().mean((-2, -1), keepdim=True).sqrt()


def detail(pictures):
    """What is finer than a few pixels in pictures [P, S, S], as strong everywhere.

    Outlines are the same for all parts of a kind, so grain and dirt should count as much.
    """
    size = pictures.shape[-1]
    narrow = blur_matrix(size, 2.0 if size <= ROUGH else 1.0)
    wide = blur_matrix(size, 4.0)
    fine = pictures - narrow @ (pictures @ narrow.T)
    even = fine / ((wide @ (fine.square() @ wide.T)).sqrt() + 1.0)
    centred = even - even.mean((-2, -1), keepdim=True)
    fade = torch.hann_window(size, periodic=False).sqrt()
    return centred * fade[:, None] * fade


@cache
def blur_matrix(n, sigma):
    """Gaussian blur of n mirrored pixels, float32 [n, n]: nine times as fast as a convolution."""
    reach = round(3 * sigma)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    lines = np.pad(np.eye(n), [(0, 0), (reach, reach)], mode="reflect")
    columns = [np.convolve(line, weights / weights.sum(), "valid") for line in lines]
    return torch.from_numpy(np.stack(columns, axis=1)).float()
