"""What the part lies on: a textured surface with scratches, stains and crumbs, and its shadow.

The same clutter lies beside parts of every class, so a network has to look at the part.
"""

import math

import numpy as np
from PIL import Image, ImageFilter

from common.fasteners.canvas import (
    SCENE_X,
    SCENE_Y,
    SIZE,
    fractal_noise,
    mix,
    rotate,
    sample_colour,
    smoothstep,
    stroke,
    value_noise,
)


def background_texture(rng, shifted):
    """Texture [S, S], about 0..1, of what the part lies on. The second line has other surfaces."""
    a, b = rotate(SCENE_X, SCENE_Y, rng.uniform(0, math.pi))  # along and across the texture
    frequency = rng.uniform(14, 40)

    # ingredients, drawn whether they are used or not
    cloud = 0.06 * fractal_noise(rng, 4, SIZE)
    grain = value_noise(rng, 80, SIZE)
    random_line = rng.standard_normal(400, dtype=np.float32)
    lines = random_line[((b + 2.0) * 100).astype(np.intp)]
    tile_a = a * frequency / 6 % 1 - 0.5
    tile_b = b * frequency / 6 % 1 - 0.5

    if shifted:
        ruled = np.minimum(np.abs(tile_a), np.abs(tile_b)) < 0.03
        holes = np.hypot(tile_a, tile_b) < 0.27
        ruled_mat = 0.4 + cloud + 0.5 * ruled
        perforated_sheet = 0.7 + cloud - 0.5 * holes
        concrete = 0.5 + 2 * cloud + 0.15 * fractal_noise(rng, 30, SIZE)
        textures = (ruled_mat, perforated_sheet, concrete)
    else:
        rings = np.sin(frequency * (b + cloud + 0.03 * np.sin(3 * a)))
        plain_mat = 0.5 + 2 * cloud
        brushed_metal = 0.5 + cloud + 0.1 * lines
        wood = 0.5 + 0.15 * rings + 0.06 * lines
        ribbed_belt = 0.5 + cloud + 0.18 * np.sin(frequency * a)
        weave = 0.5 + cloud + 0.2 * np.sin(2 * frequency * a) * np.sin(2 * frequency * b)
        speckle = 0.5 + cloud + 0.22 * grain
        textures = (plain_mat, brushed_metal, wood, ribbed_belt, weave, speckle)
    return np.clip(textures[rng.integers(len(textures))], 0.0, 1.2)


def draw_background(light, rng, shifted):
    """Colours [S, S, 3] of the surface below the part, with scratches, stains and crumbs.

    They lie beside parts of every class, so a network has to look at the part.
    """
    # two similar colours, in the pattern of a texture
    base = sample_colour(rng, 0.06, 0.55)
    third = sample_colour(rng, 0.06, 0.55)
    other = mix(base, third, rng.uniform(0.05, 0.25))
    image = mix(base, other, background_texture(rng, shifted)[..., None])

    # a scratch
    for _ in range(rng.integers(0, 2)):
        spot = rng.uniform(-1, 1, 2).tolist()
        angle = rng.uniform(0, math.pi)
        length = rng.uniform(0.3, 1.8)
        curve = rng.uniform(-0.3, 0.3)
        line = stroke(SCENE_X, SCENE_Y, spot, angle, (length, 0.018), curve)
        brightness = rng.uniform(0.0, 0.7)
        opacity = rng.uniform(0.1, 0.45)
        image = mix(image, brightness, opacity * line[..., None])

    # stains and crumbs
    if rng.uniform() < 0.5:
        stain = smoothstep(0.9, 1.5, fractal_noise(rng, 4, SIZE))
        colour = sample_colour(rng, 0.05, 0.3)
        opacity = rng.uniform(0.15, 0.5)
        image = mix(image, colour, opacity * stain[..., None])
    if rng.uniform() < 0.5:
        crumbs = smoothstep(2.2, 2.6, value_noise(rng, 60, SIZE))
        image = mix(image, sample_colour(rng, 0.03, 0.6), crumbs[..., None])

    # light, which falls off away from the first lamp
    towards = light.directions[0]
    falloff = 1.0 + rng.uniform(0.05, 0.25) * (SCENE_X * towards[0] + SCENE_Y * towards[1])
    on_flat = light.directions[:, 2] @ light.colours + light.ambient
    return image * falloff[..., None] * on_flat


def blur(image, sigma):
    """Gaussian blur of a map with values in 0..1; sigma in px. Shadows get their soft edges by it.

    It works in 8 bits inside.
    """
    picture = Image.fromarray((image * 255).astype(np.uint8))
    blurred = picture.filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(blurred, dtype=np.float32) / 255


def shadow(coverage, light, rng):
    """Share [S, S] of the light that reaches the background past the part.

    It makes the part lie on something. coverage: [S, S], share of each pixel that the part takes.
    """
    away = -light.directions[0, :2] / light.directions[0, 2] * rng.uniform(0.03, 0.08)
    dx, dy = (np.clip(away, -0.14, 0.14) * SIZE / 2).round().astype(int)
    cast = blur(np.roll(coverage, (dy, dx), (0, 1)), rng.uniform(1.5, 4.0))
    contact = blur(coverage, 1.2)
    return 1.0 - rng.uniform(0.3, 0.65) * np.maximum(cast, 0.8 * contact)
