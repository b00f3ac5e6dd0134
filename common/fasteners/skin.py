"""The skin of a part: colour, gloss and fine relief of its metal, its defect, and harmless marks.

The marks lie on parts of every class, so that a spot alone does not make a defect.
"""

import math
from dataclasses import dataclass

import numpy as np

from common.fasteners.canvas import (
    fractal_noise,
    mix,
    sample_colour,
    smoothstep,
    stroke,
    value_noise,
)
from common.fasteners.defects import break_open, rust, scratch


@dataclass(frozen=True)
class Skin:
    """What light meets at the listed pixels of a part. Defects and marks are changes of it."""

    albedo: np.ndarray  # [N, 3]
    gloss: np.ndarray  # [N] 1 is clean metal, 0 is rust or dirt, purely diffuse
    relief: np.ndarray  # [N] added to the height

    def covered(self, colour, weight, dulled, relief=0.0):
        """The skin under a layer of some colour. Paint, dirt and rust are such layers.

        colour: [3] or [N, 3], or of a grey a number or [N, 1]; weight: [N], 0..1; dulled: [N] or a
        number, share of the gloss that is lost.
        """
        return Skin(
            albedo=mix(self.albedo, colour, weight[:, None]),
            gloss=self.gloss * (1.0 - dulled),
            relief=self.relief + relief,
        )


def sample_marks(part, x, y, pixels, rng):
    """Draw harmless marks: a list of (weight [N], colour [3] or grey, loss of gloss).

    Parts of every class have them, so that a spot alone does not make a defect.
    """

    def spot():
        along = rng.uniform(-part.shaft_length, part.head_height)
        across = rng.uniform(-1, 1) * part.shaft_radius
        return along, across

    marks = []
    if rng.uniform() < 0.15:  # a smudge of oil: dark, see-through, without an edge
        smudge = 0.4 * smoothstep(0.5, 2.0, fractal_noise(rng, 4).flat[pixels])
        marks.append((smudge, sample_colour(rng, 0.03, 0.15), 0.5))

    if rng.uniform() < 0.15:  # the faint rim of a dried drop of water
        centre_x, centre_y = spot()
        radius = rng.uniform(0.06, 0.2)
        distance = np.hypot(x - centre_x, y - centre_y)
        rim = np.exp(-np.square((distance - radius) / 0.02))
        marks.append((0.2 * rim, np.float32(0.6), 0.3))

    if rng.uniform() < 0.1:  # a dab of a paint marker: short, broad and coloured, unlike a scratch
        size = (rng.uniform(0.12, 0.3), rng.uniform(0.05, 0.09))
        centre = spot()
        dab = stroke(x, y, centre, rng.uniform(0, math.pi), size)
        marks.append((0.8 * smoothstep(0.3, 0.6, dab), sample_colour(rng, 0.1, 0.7), 0.7))

    if rng.uniform() < 0.25:  # specks of dirt
        specks = 0.7 * smoothstep(2.3, 2.8, value_noise(rng, 60).flat[pixels])
        marks.append((specks, sample_colour(rng, 0.03, 0.2), 0.8))
    return marks


def sample_skin(part, x, y, pixels, broken, defect, nuisance):
    """The skin of a part: metal that is a little uneven, its defect, and harmless marks upon both.

    x, y: [N]; broken: bool [N], where a break has laid the metal open.
    """
    fine = value_noise(nuisance, 96).flat[pixels]
    coarse = fractal_noise(nuisance, 5).flat[pixels]
    brightness = 1.0 + 0.05 * fine + 0.08 * coarse
    skin = Skin(
        albedo=part.albedo * brightness[:, None],
        gloss=1.0 - 0.15 * np.clip(coarse, 0, 2),
        relief=nuisance.uniform(0.0005, 0.0015) * fine,
    )
    if defect.class_name == "scratched":
        skin = scratch(part, x, y, skin, defect)
    elif defect.class_name == "rusted":
        skin = rust(pixels, skin, defect)
    elif defect.class_name == "head_chipped":
        skin = break_open(part, broken, fine, skin)
    for weight, colour, loss in sample_marks(part, x, y, pixels, nuisance):
        skin = skin.covered(colour, weight, loss * weight)
    return skin
