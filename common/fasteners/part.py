"""The fastener itself: its proportions, finish and pose, drawn at random, and where it lies.

Nothing here sees the class, so that neither kind nor finish nor pose tells the classes apart.
"""

import math
from dataclasses import dataclass

import numpy as np

from common.fasteners.canvas import GRID_X, GRID_Y, rotate

KINDS = ("hex_bolt", "socket_cap", "pan_head")
# height of the head, in shaft radii
HEAD_HEIGHT = {"hex_bolt": (1.1, 1.6), "socket_cap": (1.5, 2.2), "pan_head": (0.9, 1.3)}
DRIVES = ("slot", "cross", "hex")
FINISHES = (  # albedo; shares of diffuse and of mirror-like reflection; roughness
    ((0.62, 0.63, 0.65), 0.30, 1.00, 0.20),  # bright steel
    ((0.44, 0.44, 0.45), 0.60, 0.55, 0.45),  # dull grey steel
    ((0.09, 0.09, 0.10), 0.80, 0.70, 0.33),  # black oxide
    ((0.62, 0.50, 0.20), 0.45, 0.85, 0.28),  # yellow zinc
    ((0.66, 0.46, 0.20), 0.35, 0.95, 0.23),  # brass
    ((0.46, 0.53, 0.61), 0.35, 0.95, 0.23),  # blue zinc
)


@dataclass(frozen=True)
class Part:
    """Shape, finish and pose of one fastener. The same part can be drawn with any defect."""

    kind: str
    head_radius: float
    head_height: float
    facet_angle: float  # how a hexagonal head is turned about the axis
    knurl: float  # depth of the knurling of a cylinder head, 0 for none
    drive: str  # what is cut into the top face: hex, slot, cross or none
    shaft_radius: float
    shaft_length: float
    shank: float  # length without thread below the head
    pitch: float
    thread_depth: float  # of the shaft radius
    phase: float  # where the helix starts, in turns
    albedo: np.ndarray  # [3]
    diffuse: float  # share of diffuse reflection
    specular: float  # share of mirror-like reflection
    roughness: float
    rotation: float  # in the picture plane
    tilt: float  # of the head towards the camera
    centre: tuple

    def head_profile(self):
        """Places t and the radii there, from below to the top. Turned, this outline is the head."""
        radius = self.head_radius
        height = self.head_height
        if self.kind == "hex_bolt":  # a cone cuts the corners of the hexagon
            t = [0.0, height - 0.12 * radius, height]
            outline = [radius, radius, 0.80 * radius]
        elif self.kind == "socket_cap":
            t = [0.0, 0.90 * height, height]
            outline = [radius, radius, 0.92 * radius]
        else:  # a pan head is round
            rise = np.linspace(0.0, 1.0, 9)
            t = height * rise
            outline = radius * (0.55 + 0.45 * np.sqrt(1.0 - rise**3))
        return t, outline


def longer_side(length, width, angle):
    """Longer side of the bounding box of a rotated rectangle. The frame has to hold the part."""
    cos = abs(math.cos(angle))
    sin = abs(math.sin(angle))
    return max(length * cos + width * sin, length * sin + width * cos)


def sample_part(rng):
    """Draw kind, proportions, finish and pose of a part that fills most of the frame.

    It never sees the class, so that none of these tells the classes apart.
    """
    kind = KINDS[rng.integers(len(KINDS))]

    # proportions in shaft radii; stocky parts, so that a turn of the thread is several pixels wide
    length = rng.uniform(4.5, 6.0)
    head = rng.uniform(1.7, 2.05)
    height = rng.uniform(*HEAD_HEIGHT[kind])
    rotation = rng.uniform(-0.2, 0.2) + math.pi * rng.integers(2)
    tilt = rng.uniform(0.2, 0.35)

    # scale: the share of the frame that the part takes
    fill = rng.uniform(0.88, 0.97)
    along = (length + height) * math.cos(tilt) + head * math.sin(tilt)
    unit = 2 * fill / longer_side(along, 1.5 * head, rotation)

    # finish
    albedo, diffuse, specular, roughness = FINISHES[rng.integers(len(FINISHES))]
    tint = np.asarray(albedo) * rng.uniform(0.85, 1.15) * rng.uniform(0.94, 1.06, 3)

    # details: drawn for every kind, kept for those that have them
    knurl = rng.uniform(0.03, 0.06) * (rng.uniform() < 0.6)
    if kind != "socket_cap":
        knurl = 0.0
    drive = DRIVES[rng.integers(3)]
    if kind == "hex_bolt":
        drive = "none"
    elif kind == "socket_cap":
        drive = "hex"

    return Part(  # the values are drawn in the order of these lines
        kind=kind,
        head_radius=head * unit,
        head_height=height * unit,
        facet_angle=rng.uniform(-math.pi / 6, math.pi / 6),
        knurl=knurl,
        drive=drive,
        shaft_radius=unit,
        shaft_length=length * unit,
        shank=unit * max(0.1, length * rng.uniform(-0.25, 0.25)),  # half of the parts have one
        pitch=unit * rng.uniform(0.36, 0.56),
        thread_depth=rng.uniform(0.13, 0.19),
        phase=rng.uniform(),
        albedo=tint.astype(np.float32),
        diffuse=diffuse,
        specular=specular,
        roughness=roughness * rng.uniform(0.75, 1.35),
        rotation=rotation,
        tilt=tilt,
        centre=tuple((rng.uniform(-1, 1, 2) * (1.02 - fill)).tolist()),
    )


def part_coordinates(part):
    """Coordinates x, y [R, R] of every pixel, along and across the part in the picture plane.

    In them a part looks the same whatever its pose.
    """
    x, y = rotate(GRID_X - part.centre[0], GRID_Y - part.centre[1], part.rotation)
    middle = (part.head_height - part.shaft_length) * math.cos(part.tilt) / 2
    return x + middle, y


def thread_form(turns):
    """Depth of the thread after so many turns: 0 on the crest, 1 at the root. Both are flat."""
    return np.clip(1.5 * np.abs(2.0 * (turns % 1.0) - 1.0) - 0.25, 0.0, 1.0)
