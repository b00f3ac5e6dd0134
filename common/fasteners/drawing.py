"""Draws one picture, as a camera would make it: here all other files of the drawing come together.

A picture goes from the height map of the part (a head and a threaded shaft) over its skin and
normals to lamps and a room reflected in the metal, background and shadow, lens and sensor. The
order in which a random stream is drawn from decides the pictures; a change of it needs a new
VERSION in dataset.py.
"""

import numpy as np

from common.fasteners.background import draw_background, shadow
from common.fasteners.camera import halve, photograph
from common.fasteners.canvas import RENDER
from common.fasteners.defects import CLASSES, STRENGTH, Defect, bend
from common.fasteners.light import normals_of, sample_lighting, shade
from common.fasteners.part import part_coordinates, sample_part
from common.fasteners.shape import build_surface
from common.fasteners.skin import sample_skin


def draw_part(part, light, defect, nuisance):
    """Colours [R, R, 3] and mask [R, R] of the part with its defect.

    The defect takes its random numbers from its own stream, all else from `nuisance`; so the same
    part can be drawn in every class.
    """
    # shape
    x, y = part_coordinates(part)
    if defect.class_name == "bent":
        x, y = bend(part, x, y, defect)
    height, mask, cavity, broken = build_surface(part, x, y, defect)

    # from here on for the pixels of the part only
    pixels = np.flatnonzero(mask)
    x, y, cavity, broken = (each.flat[pixels] for each in (x, y, cavity, broken))
    skin = sample_skin(part, x, y, pixels, broken, defect, nuisance)

    # light
    height.flat[pixels] += skin.relief
    normals = normals_of(height, pixels)
    colours = np.clip(shade(normals, skin, part, light), 0, None)
    image = np.zeros((RENDER * RENDER, 3), dtype=np.float32)
    image[pixels] = colours * (1.0 - cavity)[:, None]
    return image.reshape(RENDER, RENDER, 3), mask


def draw(class_name, key, shifted=False):
    """Draw one picture, uint8 [SIZE, SIZE, 3], a pure function of its arguments.

    So a set can be made again anywhere, byte for byte. key: ints that seed it: (SEED, number of
    the split, number of the picture); shifted: whether it is from the second production line. The
    same key with another class shows the same part in the same scene, so every picture of a set
    needs a key of its own. Raises ValueError for an unknown class.
    """
    if class_name not in CLASSES:
        raise ValueError(f"class_name must be one of {', '.join(CLASSES)}; got {class_name!r}")
    nuisance = np.random.default_rng([*key, 0])
    own = np.random.default_rng([*key, 1])
    defect = Defect(class_name, own, strength=own.uniform(*STRENGTH))

    part = sample_part(nuisance)
    light = sample_lighting(nuisance, shifted)
    background = draw_background(light, nuisance, shifted)
    colours, mask = draw_part(part, light, defect, nuisance)

    coverage = halve(mask.astype(np.float32))
    lit = shadow(coverage, light, nuisance) * (1.0 - coverage)
    background *= lit[..., None]
    return photograph(background + halve(colours), nuisance, shifted)
