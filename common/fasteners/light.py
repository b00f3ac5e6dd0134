"""Lamps, a room that the metal mirrors, and the shading of the part by them.

Light makes height and material visible; the second line has other lamps than the first.
"""

import math
from dataclasses import dataclass

import numpy as np

from common.fasteners.canvas import PIXEL, mix


@dataclass(frozen=True)
class Lighting:
    """Lamps, and a dim room with soft boxes of light. The metal mirrors the room."""

    directions: np.ndarray  # [K, 3] unit vectors towards the lamps
    colours: np.ndarray  # [K, 3]
    ambient: np.ndarray  # [3]
    boxes: np.ndarray  # [3, B] of each box: position along room_axis (-1..1), width, brightness
    room_axis: np.ndarray  # [3]


def sample_lighting(rng, shifted):
    """Draw two or three lamps and a room. The second line has lower and colder lamps."""
    if shifted:
        elevation_range = (0.35, 0.8)
        warmth_range = (-0.2, 0.0)
    else:
        elevation_range = (0.5, 1.2)
        warmth_range = (-0.1, 0.22)

    # lamps
    count = rng.integers(2, 4)
    azimuth = rng.uniform(0, 2 * math.pi, count)
    elevation = rng.uniform(*elevation_range, count)
    flat = np.cos(elevation)
    directions = np.stack([np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(elevation)], 1)
    warmth = rng.uniform(*warmth_range)
    colour = np.array([1 + warmth, 1, 1 - warmth]) * rng.uniform(0.8, 1.2)
    power = np.array([1.0, *rng.uniform(0.25, 0.6, count - 1)])

    # room, and the colours of its lamps
    turn = rng.uniform(0, 2 * math.pi)
    room_axis = np.array([math.cos(turn), math.sin(turn), 0.0], dtype=np.float32)
    colours = power[:, None] * colour * rng.uniform(0.92, 1.08, (count, 3))
    ambient = colour * rng.uniform(0.2, 0.35)
    boxes = rng.uniform([[-1], [0.06], [0.5]], [[1], [0.22], [2.0]], (3, 4))
    return Lighting(
        directions=directions.astype(np.float32),
        colours=colours.astype(np.float32),
        ambient=ambient.astype(np.float32),
        boxes=boxes.astype(np.float32),
        room_axis=room_axis,
    )


def normals_of(height, pixels):
    """Unit normals [N, 3] of a height map at the listed pixels. Light depends on them alone."""
    down, right = np.gradient(height, np.float32(PIXEL))
    ones = np.ones(pixels.size, "f4")
    normals = np.stack([-right.flat[pixels], -down.flat[pixels], ones], 1)
    return normals / np.linalg.norm(normals, axis=1, keepdims=True)


def room_reflection(normals, roughness, light):
    """Brightness [N] of the room in the mirror direction; rough metal blurs the soft boxes.

    Much of what one sees of polished metal is what it mirrors.
    """
    mirrored = 2.0 * normals[:, 2] * (normals @ light.room_axis)  # of the line of sight (0, 0, 1)
    position, width, power = light.boxes[:, :, None]
    spread = np.hypot(width, np.float32(roughness))
    places = np.linspace(-1.0, 1.0, 256, dtype=np.float32)
    boxes = power * width / spread * np.exp(-np.square((places - position) / spread))
    table = 0.15 + boxes.sum(0)
    return table[np.clip((mirrored + 1.0) * 127.5, 0, 255).astype(np.intp)]


def shade(normals, skin, part, light):
    """Colours [N, 3] that the camera sees of the skin: Lambert, Blinn-Phong and the mirrored room.

    Light makes height and material visible. normals: unit vectors [N, 3].
    """
    # diffuse
    lambert = np.clip(normals @ light.directions.T, 0, None)  # [N, K]
    diffuse = mix(1.0, part.diffuse, skin.gloss)
    body = (lambert @ light.colours + light.ambient) * diffuse[:, None]

    # mirror-like: highlights of the lamps, and the room
    halfway = light.directions + np.array([0, 0, 1], dtype=np.float32)
    halfway /= np.linalg.norm(halfway, axis=1, keepdims=True)
    sharpness = 2.0 / part.roughness**2
    highlight = np.exp((normals @ halfway.T - 1.0) * sharpness)  # close to cos ** shininess
    room = room_reflection(normals, part.roughness, light)[:, None] * light.ambient
    mirror = highlight @ light.colours + 3.0 * room

    metal_tint = np.sqrt(skin.albedo)  # metals colour their reflections, less so than their body
    specular = 0.5 * part.specular * skin.gloss
    return skin.albedo * body + metal_tint * mirror * specular[:, None]
