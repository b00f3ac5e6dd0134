"""Views: augmentation as a pure function of (picture, index, view number, seed).

A stateful generator would give teacher and student different crops, and the soft target of one
crop would be taught with the pixels of another. Here each random parameter is a hash of
(seed, view, index, parameter number), so whoever asks for view 3 of picture 17 sees the same
pixels, in any order, batch or process, and nothing about crops is stored.

View 0 is the plain picture.
"""

from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from common.cli import UserError

VERSION = 1  # goes into every artefact; a change of the mathematics below must change it


@dataclass(frozen=True)
class ViewRecipe:
    """Ranges the parameters of a view are drawn from, uniformly.

    zoom_min, zoom_max: side of the cropped square over the picture's side (1 is the whole picture).
    shift: further offset of the crop's centre, as a share of half the side.
    rotate: largest angle in degrees to either side. flip: probability of each of the two mirrorings.
    brightness: largest change, as a share of the full range. contrast: largest relative change.
    tint: largest relative change of one colour channel's gain.
    """

    zoom_min: float = 0.85
    zoom_max: float = 1.05
    shift: float = 0.05
    rotate: float = 12.0
    flip: float = 0.5
    brightness: float = 0.12
    contrast: float = 0.25
    tint: float = 0.12

    def __post_init__(self):
        ok = (0 < self.zoom_min <= self.zoom_max and 0 <= self.flip <= 1 and 0 <= self.contrast < 1
              and 0 <= self.tint < 1 and self.shift >= 0 and self.rotate >= 0 and self.brightness >= 0)
        if not ok:
            raise UserError(f"--view-recipe: values out of range in {self}")

    def changed(self, settings):
        """With settings such as 'rotate=10'; what is not named stays. Raises UserError for other words."""
        known = {field.name for field in fields(self)}
        values = {}
        for word in settings:
            name, _, value = word.partition("=")
            try:
                values[name] = float(value)
            except ValueError:
                raise UserError(f"--view-recipe {word}: not NAME=NUMBER")
            if name not in known:
                raise UserError(f"--view-recipe {word}: no such name; there are {', '.join(sorted(known))}")
        return replace(self, **values)

    def record(self):
        """As plain data for artefacts."""
        return {"version": VERSION, **asdict(self)}


def recipe_from_record(record):
    """The recipe of an artefact. Raises UserError for one of another version of this file."""
    if record["version"] != VERSION:
        raise UserError(f"view recipe version differs (this code has {VERSION}, the artefact {record['version']}); "
                        "make the teachers and the ensemble again")
    return ViewRecipe(**{name: value for name, value in record.items() if name != "version"})


def _mix(h):
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014): uint64 -> uint64, wrapping arithmetic."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def uniform(seed, views, indices, count):
    """Counter-based random numbers.

    seed: int; views, indices: int arrays [B]. Returns float64 [B, count] in [0, 1), entry (b, j)
    depending on (seed, views[b], indices[b], j) alone.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    h = np.array([seed], np.uint64)
    for counter in (np.asarray(views)[:, None], np.asarray(indices)[:, None], np.arange(count)[None, :]):
        h = _mix(h * golden + counter.astype(np.uint64) + golden)
    return (h >> np.uint64(11)) * 2.0 ** -53


def render(pictures, indices, views, seed, recipe):
    """Views of a batch of pictures.

    pictures: uint8 [B, S, S, 3], on the device to render on; indices, views: int sequences [B].
    Returns float32 [B, 3, S, S] in [0, 255], in channels_last layout. Equal for equal arguments
    per picture, whatever else is in the batch. Costs one bilinear lookup and one
    multiplication-addition per value.
    """
    plain = pictures.permute(0, 3, 1, 2).float()
    views = np.asarray(views)
    if not views.any():
        return plain
    device, side = pictures.device, pictures.shape[1]
    u = uniform(seed, views, indices, 11)
    sign = 2.0 * u - 1.0

    # Geometry: output coordinates in [-1, 1] -> input coordinates, by flip, rotation, zoom and shift.
    angle = np.radians(recipe.rotate) * sign[:, 0]
    zoom = recipe.zoom_min + (recipe.zoom_max - recipe.zoom_min) * u[:, 1]
    room = np.maximum(0.0, 1.0 - zoom) + recipe.shift
    flip_x, flip_y = np.where(u[:, 2:4] < recipe.flip, -1.0, 1.0).T
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    matrix = np.stack([cos * flip_x, -sin * flip_y, room * sign[:, 4],
                       sin * flip_x, cos * flip_y, room * sign[:, 5]], axis=1)
    m = torch.from_numpy(matrix.astype(np.float32)).to(device)[:, :, None, None]
    axis = (torch.arange(side, device=device, dtype=torch.float32) * 2 + 1) / side - 1
    x, y = axis[None, None, :], axis[None, :, None]
    # Written out rather than as a matrix product, whose rounding may depend on the batch size.
    grid = torch.stack([m[:, 0] * x + m[:, 1] * y + m[:, 2], m[:, 3] * x + m[:, 4] * y + m[:, 5]], dim=-1)
    warped = F.grid_sample(plain, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    # Colour: gain * value + offset per channel; contrast turns about the picture's own mean.
    # The mean is a sum of integers, exact in any order of summation.
    mean = pictures.sum(dim=(1, 2, 3), dtype=torch.int64).cpu().numpy() / (3.0 * side * side)
    contrast = 1.0 + recipe.contrast * sign[:, 6]
    tint = 1.0 + recipe.tint * sign[:, 8:11]
    gain = contrast[:, None] * tint
    offset = ((1.0 - contrast) * mean + 255.0 * recipe.brightness * sign[:, 7])[:, None] * tint
    gain, offset = (torch.from_numpy(v.astype(np.float32)).to(device)[:, :, None, None] for v in (gain, offset))
    result = (warped * gain + offset).clamp_(0.0, 255.0)
    keep_plain = torch.from_numpy(views == 0).to(device)[:, None, None, None]
    return torch.where(keep_plain, plain, result).contiguous(memory_format=torch.channels_last)


def mixup_partners(count, indices, views, seed, mixup):
    """Which views are blended with another picture's, with whose, and how much (mixup, Zhang et al. 2018).

    count: pictures there are; indices, views: int sequences [B]; mixup: share of the views that are blended, view 0 never.
    Returns (partners int64 [B] in [0, count), own float32 [B]): the blend is own * view + (1 - own) * the partner's view of that
    number. own is uniform above a half, so that a picture stays the main part of its views, and 1 where nothing is blended.
    """
    u = uniform(seed, views, indices, 14)[:, 11:]  # the numbers before are the view's
    own = np.where((u[:, 0] < mixup) & (np.asarray(views) > 0), 1 - u[:, 2] / 2, 1.0)
    return (u[:, 1] * count).astype(np.int64), own.astype(np.float32)


def render_blended(pictures, indices, views, seed, recipe, mixup, device):
    """Views of some pictures of a `data.Pictures`, blended as `mixup_partners` says.

    Returns (pixels float32 [B, 3, S, S] as of `render`, which of them are blends: bool tensor [B] on the CPU).
    """
    views = np.asarray(views)
    pixels = render(pictures.batch(indices, device), indices, views, seed, recipe)
    partners, own = mixup_partners(len(pictures), indices, views, seed, mixup)
    blended = torch.from_numpy(own < 1)
    rows = np.flatnonzero(blended)
    if len(rows):
        theirs = render(pictures.batch(partners[rows], device), partners[rows], views[rows], seed, recipe)
        own = torch.from_numpy(own[rows]).to(device)[:, None, None, None]
        pixels[rows] = own * pixels[rows] + (1 - own) * theirs
    return pixels, blended


def batch_plan(count, batch_size, seed, first_step, steps):
    """Which pictures are trained on when, as a pure function of the step number.

    The training stream is an endless row of passes, each a fresh permutation of range(count); step
    s takes places s * batch_size and following, so batches are always full and a resumed run needs
    no stored state. Yields (indices, passes), two int64 arrays [batch_size] per step; a batch may
    straddle two passes.
    """
    permutations = {}
    for step in range(first_step, first_step + steps):
        passes, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
        for number in range(passes[0], passes[-1] + 1):
            if number not in permutations:
                permutations[number] = np.random.default_rng([seed, number]).permutation(count)
        permutations = {number: order for number, order in permutations.items() if number >= passes[0]}
        yield np.array([permutations[p][i] for p, i in zip(passes, places)]), passes

