"""Views: augmentation as a pure function of (picture, index, view number, seed). numpy and torch.

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

VERSION = 1  # goes into every artefact; a change of the mathematics below must change it
PARAMETERS = 11  # random numbers that a view takes
BATCH = -1  # the index of no picture: whose random numbers are those of a step's batch


@dataclass(frozen=True)
class ViewRecipe:
    """Ranges the parameters of a view are drawn from, uniformly. Raises ValueError for wrong ones.

    zoom_min, zoom_max: sides of the crop over those of the picture (1 is the whole picture).
    shift: further offset of the crop's centre, as a share of half the shorter side.
    rotate: largest angle in degrees to either side. flip: probability of each of two mirrorings.
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
        zoom = 0 < self.zoom_min <= self.zoom_max
        shares = 0 <= self.flip <= 1 and 0 <= self.contrast < 1 and 0 <= self.tint < 1
        sizes = self.shift >= 0 and self.rotate >= 0 and self.brightness >= 0
        finite = np.isfinite(list(asdict(self).values())).all()
        if not (zoom and shares and sizes and finite):
            raise ValueError(f"values out of range in {self}")

    def changed(self, settings):
        """The recipe with settings such as 'rotate=10'; what is not named stays.

        Raises ValueError for a word that is no NAME=NUMBER, a wrong name or number.
        """
        names = [field.name for field in fields(self)]
        values = {}
        for word in settings:
            name, _, value = word.partition("=")
            if name not in names:
                raise ValueError(f"{word}: no such name; there are {', '.join(names)}")
            try:
                values[name] = float(value)
            except ValueError:
                raise ValueError(f"{word}: not NAME=NUMBER") from None
        return replace(self, **values)

    def as_dict(self):
        """As plain data for artefacts."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, stored):
        """The recipe of an artefact. Raises ValueError for one of another version of this file."""
        if stored["version"] != VERSION:
            raise ValueError(
                f"view recipe version differs (this code has {VERSION}, the artefact "
                f"{stored['version']}); make the teachers and the ensemble again"
            )
        return cls(**{name: value for name, value in stored.items() if name != "version"})


def mix(h):
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014): uint64 -> uint64, wrapping."""
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
    view, index = np.asarray(views)[:, None], np.asarray(indices)[:, None]
    for counter in (view, index, np.arange(count)[None, :]):
        h = mix(h * golden + counter.astype(np.uint64) + golden)
    return (h >> np.uint64(11)) * 2.0**-53


def render(pictures, indices, views, seed, recipe):
    """Views of a batch of pictures.

    pictures: uint8 [B, H, W, 3], on the device to render on; indices, views: int sequences [B].
    Returns float32 [B, 3, H, W] in [0, 255], in channels_last layout. Equal for equal arguments
    per picture, whatever else is in the batch. Costs one bilinear lookup and one
    multiplication-addition per value.
    """
    plain = pictures.permute(0, 3, 1, 2).float()
    views = np.asarray(views)
    if not views.any():
        return plain
    device, (height, width) = pictures.device, pictures.shape[1:3]
    u = uniform(seed, views, indices, PARAMETERS)

    # Geometry. Written out, since the rounding of a matrix product may depend on the batch.
    m = on(device, torch.from_numpy(warp(u, recipe, height, width)))
    x = pixel_centres(width, device)[None, None, :]
    y = pixel_centres(height, device)[None, :, None]
    source_x = m[:, 0] * x + m[:, 1] * y + m[:, 2]
    source_y = m[:, 3] * x + m[:, 4] * y + m[:, 5]
    grid = torch.stack([source_x, source_y], dim=-1)
    warped = F.grid_sample(plain, grid, padding_mode="reflection", align_corners=False)

    # Colour. The mean is a sum of integers, exact in any order: float32 holds a row's, float64 the
    # picture's. It stays on the device, since looking at it would wait for a GPU.
    rows = plain.sum(dim=3)
    if device.type == "mps":  # has no float64
        rows = rows.cpu()
    mean = rows.sum(dim=(1, 2), dtype=torch.float64) / (3.0 * height * width)
    u = torch.from_numpy(u).to(mean.device, non_blocking=True)
    gain, offset = colour(u, mean, recipe)
    result = (warped * on(device, gain) + on(device, offset)).clamp_(0.0, 255.0)

    is_plain = torch.from_numpy(views == 0).to(device, non_blocking=True)
    result = torch.where(is_plain[:, None, None, None], plain, result)
    return result.contiguous(memory_format=torch.channels_last)


def shares(seed, step, count):
    """How much of itself each picture of a step's batch keeps in `mixup`: float32 [count].

    Uniform from 0 to 1, a pure function of its arguments.
    """
    return torch.from_numpy(uniform(seed, [step], [BATCH], count)[0]).float()


def mixup(rows, share):
    """Each row of a batch mixed with the one before it (Zhang et al. 2018).

    rows: float [B, ...], pixels as well as the probabilities that go with them; share: [B].
    """
    own = share.to(rows.device).view(-1, *[1] * (rows.dim() - 1))
    return torch.lerp(rows.roll(1, 0), rows, own)


def on(device, values):
    """float64 tensor [B, C] -> float32 [B, C, 1, 1] on the device."""
    return values.float().to(device, non_blocking=True)[:, :, None, None]


def pixel_centres(size, device):
    """Where the pixels of a side lie when its ends are -1 and 1: float32 [size]."""
    return (torch.arange(size, device=device, dtype=torch.float32) * 2 + 1) / size - 1


def warp(u, recipe, height, width):
    """Output coordinates in [-1, 1] -> input coordinates, by flip, rotation, zoom and shift.

    u: float64 [B, 11] in [0, 1); height, width: px, since a turn in pixels that does not shear is
    none in coordinates that run from -1 to 1 along either side. Returns the rows of a 2 x 3
    matrix: float64 [B, 6].
    """
    tall, wide = height / width, width / height
    sign = 2.0 * u - 1.0
    angle = np.radians(recipe.rotate) * sign[:, 0]
    zoom = recipe.zoom_min + (recipe.zoom_max - recipe.zoom_min) * u[:, 1]
    flip_x, flip_y = np.where(u[:, 2:4] < recipe.flip, -1.0, 1.0).T
    room = np.maximum(0.0, 1.0 - zoom)  # in which the crop stays inside the picture
    room_x, room_y = room + recipe.shift * min(1.0, tall), room + recipe.shift * min(1.0, wide)
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    row_x = [cos * flip_x, -sin * flip_y * tall, room_x * sign[:, 4]]
    row_y = [sin * flip_x * wide, cos * flip_y, room_y * sign[:, 5]]
    return np.stack(row_x + row_y, axis=1)


def colour(u, mean, recipe):
    """(gain, offset) float64 [B, 3]: a channel's value becomes gain * value + offset.

    u: float64 [B, 11] in [0, 1); mean: of each picture, float64 [B] in [0, 255], about which
    contrast turns. All are tensors.
    """
    sign = 2.0 * u - 1.0
    contrast = 1.0 + recipe.contrast * sign[:, 6]
    tint = 1.0 + recipe.tint * sign[:, 8:11]
    gain = contrast[:, None] * tint
    shift = (1.0 - contrast) * mean + 255.0 * recipe.brightness * sign[:, 7]
    return gain, shift[:, None] * tint

