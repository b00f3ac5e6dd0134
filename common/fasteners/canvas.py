"""What every other file draws with: sizes, pixel coordinates, masks, noise, strokes and colours.

Conventions: lengths are in half-frames (the frame spans [-1, 1]). `x` runs along the part in the
picture, `t` along its tilted axis: 0 where head and shaft meet, positive in the head. `y` runs
across, `u` from the axis towards the camera. Maps are [R, R] float32, R = RENDER; a finished
picture is [S, S], S = SIZE; flat arrays [N] hold one value per listed pixel, and `pixels` [N] are
the flat indices of these in a map. Colours are linear RGB, 0..1. Angles are in radians. `rng` is a
numpy Generator.
"""

import math

import numpy as np
from PIL import Image

SIZE = 96  # side of a finished picture, px
RENDER = 2 * SIZE  # the part is drawn at twice the size and averaged down against jagged edges
PIXEL = 2.0 / RENDER


def pixel_grid(size):
    """Float32 maps of the pixel centres, right and down. What is drawn is a function of these."""
    line = ((np.arange(size) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    return np.meshgrid(line, line)


GRID_X, GRID_Y = pixel_grid(RENDER)  # for the part
SCENE_X, SCENE_Y = pixel_grid(SIZE)  # for background and camera, which need no fine edges


def mix(a, b, weight):
    """`a` where the weight is 0, `b` where it is 1. It blends colours, and sizes."""
    return a + (b - a) * weight


def smoothstep(low, high, x):
    """0 at `low`, 1 at `high` and beyond, a smooth S between. It makes soft masks out of noise."""
    x = np.clip((x - low) / (high - low), 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def rotate(x, y, angle):
    """Coordinates along and across a direction, so that what lies askew is drawn as if level."""
    cos = math.cos(angle)
    sin = math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def stroke(x, y, centre, angle, size, curve=0.0):
    """Weight 0..1 of a line with Gaussian cross-section and soft ends, at the points x, y.

    Scratches and dabs of paint are strokes. size: (length, width); curve: of a parabola.
    """
    length, width = size
    along, across = rotate(x - centre[0], y - centre[1], angle)
    across = across + curve * along**2
    ends = np.clip((length / 2 - np.abs(along)) / (0.15 * length), 0.0, 1.0)
    return np.exp(-np.square(across / width)) * ends


def enlarge(grid, size):
    """Interpolate a float32 map to [size, size]. It turns a few random values into smooth noise."""
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def value_noise(rng, cells, size=RENDER):
    """Smooth noise [size, size]: random values at cells x cells nodes, enlarged. It makes grain."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    return enlarge(grid, size)


def fractal_noise(rng, cells, size=RENDER):
    """Noise [size, size] of three octaves, the finer the weaker. It makes clouds and patches."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    for weight in (0.6, 0.36):  # summed while small: faster than enlarging each octave to the end
        cells *= 2
        octave = rng.standard_normal((cells, cells), dtype=np.float32)
        grid = enlarge(grid, cells) + weight * octave
    return enlarge(grid, size)


def sample_colour(rng, low, high):
    """Draw a colour [3] whose largest channel is `low` to `high`, for dirt and backgrounds.

    A third of the colours are brown, so that brown alone does not mean rust.
    """
    brown = rng.uniform((0.95, 0.45, 0.15), (1.0, 0.75, 0.5))
    other = 1.0 - rng.uniform(0.0, 0.6) * rng.uniform(0, 1, 3)
    colour = brown if rng.uniform() < 0.35 else other
    return (colour / colour.max() * rng.uniform(low, high)).astype(np.float32)
