"""Procedurally drawn, labelled pictures of threaded fasteners: the set used when no data is given.

A picture is made as a camera would make it: height map of the part (a head and a threaded shaft),
normals, lamps and an environment reflected in the metal, background, shadow, lens and sensor.  The
class changes the height map, the outline or the surface *before* light falls on it.

Everything that is not the defect (kind of fastener, finish, pose, lamps, background, dirt, camera)
comes from a random stream that never sees the class, so that no shortcut tells the classes apart.

    python -m common.synthetic --root data/fasteners --contact-sheet sheet.png

Conventions: lengths are in half-frames (the frame spans [-1, 1]).  ``x`` runs along the part in the
picture, ``t`` along its tilted axis: 0 where head and shaft meet, positive in the head.  ``y`` runs
across, ``u`` from the axis towards the camera.  Maps are [R, R] float32, R = RENDER; flat arrays [N]
hold one value per listed pixel.  Colours are linear RGB, 0..1.  Angles are in radians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

CLASSES = ("bent", "good", "head_chipped", "rusted", "scratched", "thread_damaged")
SIZE = 96  # side of a finished picture, px
VERSION = 2  # raise it with every change of the drawing; the constants below are compared by themselves
SEED = 20261124

# Pictures per class: few labels and many unlabelled pictures, as a factory has them.  The unlabelled
# pool has no class folders and holds the classes in equal shares.
PER_CLASS = {"train": 18, "val": 18, "test": 150, "test_shifted": 150, "unlabelled": 350}
SHIFTED_SHARE = {"test_shifted": 1.0, "unlabelled": 0.5}  # share from the second line; others 0

# Difficulty.  Each defect draws s uniformly from STRENGTH; s = 0 gives the first, s = 1 the second
# number of its range below.  A lower STRENGTH[0] makes a longer tail of faint defects.
STRENGTH = (0.25, 1.0)
BEND_ANGLE = (32.0, 65.0)  # degrees between the two ends of the shaft
CHIP_SIZE = (0.95, 1.15)  # reach of the break into the head, of the radius of the head
RUST_AREA = (0.2, 0.4)  # of the visible part
SCRATCH_WIDTH = (0.08, 0.125)  # half-frames; 0.021 is one finished pixel
THREAD_SHARE = (0.8, 1.0)  # length of the damaged stretch, of the threaded length

RENDER = 2 * SIZE  # the part is drawn at twice the size and averaged down against jagged edges
PIXEL = 2.0 / RENDER
JPEG_QUALITY = 92
MARKER = "synthetic.json"

KINDS = ("hex_bolt", "socket_cap", "pan_head")
FINISHES = (  # albedo; shares of diffuse and of mirror-like reflection; roughness
    ((0.62, 0.63, 0.65), 0.30, 1.00, 0.20),  # bright steel
    ((0.44, 0.44, 0.45), 0.60, 0.55, 0.45),  # dull grey steel
    ((0.09, 0.09, 0.10), 0.80, 0.70, 0.33),  # black oxide
    ((0.62, 0.50, 0.20), 0.45, 0.85, 0.28),  # yellow zinc
    ((0.66, 0.46, 0.20), 0.35, 0.95, 0.23),  # brass
    ((0.46, 0.53, 0.61), 0.35, 0.95, 0.23),  # blue zinc
)


def pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [size, size] of the pixel centres, right and down."""
    line = ((np.arange(size) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    return tuple(np.meshgrid(line, line))


GRID_X, GRID_Y = pixel_grid(RENDER)  # for the part
SCENE_X, SCENE_Y = pixel_grid(SIZE)  # for background and camera, which need no fine edges


# ------------------------------------------------------------------------------------ small helpers


def lerp(bounds: tuple[float, float], s: float) -> float:
    """The point at share ``s`` of the way between the two ``bounds``."""
    return bounds[0] + (bounds[1] - bounds[0]) * s


def mix(a, b, weight):
    """``a`` where ``weight`` is 0, ``b`` where it is 1."""
    return a + (b - a) * weight


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 at ``low`` and 1 at ``high`` (and beyond), a smooth S between them."""
    x = np.clip((x - low) / (high - low), 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def enlarge(grid: np.ndarray, size: int) -> np.ndarray:
    """A float32 map interpolated to [size, size]."""
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def value_noise(rng, cells: int, size: int = RENDER) -> np.ndarray:
    """Smooth noise [size, size] of unit variance at its nodes: a random grid, enlarged."""
    return enlarge(rng.standard_normal((cells, cells), dtype=np.float32), size)


def fractal_noise(rng, cells: int, size: int = RENDER) -> np.ndarray:
    """Cloudy noise [size, size]: three octaves, the finer the weaker."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    for weight in (0.6, 0.36):  # summed while small, which is faster than enlarging each to the end
        cells *= 2
        grid = enlarge(grid, cells) + weight * rng.standard_normal((cells, cells), dtype=np.float32)
    return enlarge(grid, size)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a map with values in 0..1 (8 bits inside)."""
    picture = Image.fromarray((image * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(picture, dtype=np.float32) / 255


def stroke(x, y, centre, angle: float, length: float, width: float, curve: float = 0.0) -> np.ndarray:
    """Weight 0..1 of a curved line with Gaussian cross-section and soft ends."""
    dx, dy = x - centre[0], y - centre[1]
    along = dx * math.cos(angle) + dy * math.sin(angle)
    across = dy * math.cos(angle) - dx * math.sin(angle) + curve * along**2
    ends = np.clip((length / 2 - np.abs(along)) / (0.15 * length), 0.0, 1.0)
    return np.exp(-np.square(across / width)) * ends


# ------------------------------------------------------------------------------ the part and its pose


@dataclass(frozen=True)
class Part:
    """Shape, finish and pose of one fastener."""

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
    finish: tuple
    rotation: float  # in the picture plane
    tilt: float  # of the head towards the camera
    centre: tuple[float, float]

    def head_profile(self) -> tuple[list[float], list[float]]:
        """Outline (t, radius) of the head as a surface of revolution, from below to the top face."""
        r, h = self.head_radius, self.head_height
        if self.kind == "hex_bolt":  # a cone cuts the corners of the hexagon
            return [0.0, h - 0.12 * r, h], [r, r, 0.80 * r]
        if self.kind == "socket_cap":
            return [0.0, 0.90 * h, h], [r, r, 0.92 * r]
        if self.kind == "countersunk":
            return [0.0, 0.85 * h, h], [self.shaft_radius, r, r]
        rise = np.linspace(0.0, 1.0, 9)  # pan head
        return list(h * rise), list(r * (0.55 + 0.45 * np.sqrt(1.0 - rise**3)))


def sample_part(rng) -> Part:
    """Draw kind, proportions, finish and pose; the part fills most of the frame."""
    kind = KINDS[rng.integers(len(KINDS))]
    # Proportions in shaft radii; stocky parts, so that a turn of the thread is several pixels wide.
    length, head = rng.uniform(4.5, 6.0), rng.uniform(1.7, 2.05)
    height = rng.uniform(*{"hex_bolt": (1.1, 1.6), "socket_cap": (1.5, 2.2)}.get(kind, (0.9, 1.3)))
    rotation, tilt = rng.uniform(-0.2, 0.2) + math.pi * rng.integers(2), rng.uniform(0.2, 0.35)
    # Scale so that the bounding box of the rotated part takes the wanted share of the frame.
    cos, sin = abs(math.cos(rotation)), abs(math.sin(rotation))
    along = (length + height) * math.cos(tilt) + head * math.sin(tilt)
    fill = rng.uniform(0.88, 0.97)
    unit = 2 * fill / max(along * cos + 1.5 * head * sin, along * sin + 1.5 * head * cos)
    albedo, diffuse, specular, roughness = FINISHES[rng.integers(len(FINISHES))]
    tint = np.asarray(albedo) * rng.uniform(0.85, 1.15) * rng.uniform(0.94, 1.06, 3)
    knurl = rng.uniform(0.03, 0.06) * (rng.uniform() < 0.6)
    drive = ("slot", "cross", "hex")[rng.integers(3)]
    return Part(
        kind=kind,
        head_radius=head * unit,
        head_height=height * unit,
        facet_angle=rng.uniform(-math.pi / 6, math.pi / 6),
        knurl=knurl if kind == "socket_cap" else 0.0,
        drive={"hex_bolt": "none", "socket_cap": "hex"}.get(kind, drive),
        shaft_radius=unit,
        shaft_length=length * unit,
        shank=unit * max(0.1, length * rng.uniform(-0.25, 0.25)),  # half of the parts have one
        pitch=unit * rng.uniform(0.36, 0.56),
        thread_depth=rng.uniform(0.13, 0.19),
        phase=rng.uniform(),
        finish=(tint.astype(np.float32), diffuse, specular, roughness * rng.uniform(0.75, 1.35)),
        rotation=rotation,
        tilt=tilt,
        centre=tuple((rng.uniform(-1, 1, 2) * (1.02 - fill)).tolist()),
    )


def part_coordinates(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x, y [R, R] of every pixel, along and across the part in the picture plane."""
    dx, dy = GRID_X - part.centre[0], GRID_Y - part.centre[1]
    cos, sin = math.cos(part.rotation), math.sin(part.rotation)
    middle = (part.head_height - part.shaft_length) * math.cos(part.tilt) / 2
    return dx * cos + dy * sin + middle, dy * cos - dx * sin


# ---------------------------------------------------------------------------------------- the defects
# Each takes a random stream of its own and a strength s in 0..1.


def bend(part: Part, x, y, rng, s: float) -> tuple[np.ndarray, np.ndarray]:
    """bent: ``x``, ``y`` [R, R] measured along a shaft that turns off through an arc of a circle."""
    angle = math.radians(lerp(BEND_ANGLE, s))
    side = (-1) ** rng.integers(2)
    start = rng.uniform(0.05, 0.4) * part.shaft_length  # of the arc, below the head
    run = rng.uniform(0.1, 1.0) * (part.shaft_length - start)  # its length: a kink or a long curve
    radius = run / angle
    # The camera centres what it sees: the head moves to one side as the tip moves to the other.
    rest = part.shaft_length - start - run
    at_tip = radius * (1 - math.cos(angle)) + rest * math.sin(angle)
    past, across = -x - start, side * y + 0.4 * at_tip - radius  # from the centre of the arc
    turned = np.arctan2(past, -across)
    on_arc = (past > 0) & (turned < angle)
    beyond = (past > 0) & (turned >= angle)
    arc_x, arc_y = radius * turned, radius - np.hypot(past, across)
    end_x = run + past * math.cos(angle) + across * math.sin(angle)
    end_y = radius + across * math.cos(angle) - past * math.sin(angle)
    past, across = np.where(on_arc, arc_x, past), np.where(on_arc, arc_y, across + radius)
    return -start - np.where(beyond, end_x, past), side * np.where(beyond, end_y, across)


def damage_thread(part: Part, root, t, phi, pixels, rng, s: float) -> np.ndarray:
    """thread_damaged: thread depth [N] (0 crest, 1 root) with a stretch flattened, crushed or cut."""
    threaded = part.shaft_length - part.shank
    length = lerp(THREAD_SHARE, s) * threaded
    centre = part.shank + rng.uniform(0.5 * length, threaded - 0.45 * length)
    noise = fractal_noise(rng, 16).flat[pixels]
    edge = np.abs(-t - centre) / (0.5 * length) + 0.15 * noise
    weight = 1.0 - smoothstep(0.8, 1.05, edge)
    if rng.uniform() < 0.3:  # struck from one side only
        weight = weight * smoothstep(0.1, 0.6, np.cos(phi - rng.uniform(-0.8, 0.8)))
    mode = rng.integers(3)
    if mode == 0:  # flattened: crests worn down, grooves filled
        damaged = 0.55 + 0.25 * noise
    elif mode == 1:  # crushed: crests folded over at random, and pressed in
        damaged = 0.85 + 0.5 * noise
    else:  # cross-threaded: a second helix cut steeply across the first
        lead = rng.uniform(0.8, 1.5) * (-1) ** rng.integers(2)
        turns = t / (part.pitch * rng.uniform(1.0, 1.5)) + phi * lead
        damaged = np.maximum(0.2 * root, 1.2 * thread_form(turns)) + 0.15 * noise
    return mix(root, damaged, weight)


def chip_head(part: Part, x, y, height, pixels, rng, s: float) -> tuple[np.ndarray, np.ndarray]:
    """head_chipped: height [N] cut by a bite or a straight break, and which pixels are still there."""
    radius, top = part.head_radius, part.head_height * math.cos(part.tilt)
    rim = radius * math.sin(part.tilt)
    size = lerp(CHIP_SIZE, s) * radius
    if rng.uniform() < 0.6:  # at a side
        centre = (rng.uniform(0.1 * top, top + 0.3 * rim), radius * (-1) ** rng.integers(2))
    else:  # at the far edge of the top face
        centre = (top + 0.8 * rim, rng.uniform(-0.75, 0.75) * radius)
    dx, dy = x - centre[0], y - centre[1]
    if rng.uniform() < 0.55:  # a bite
        distance = np.hypot(dx, dy) - size
    else:  # a straight break that faces the middle of the head
        angle = math.atan2(-centre[1], top / 2 - centre[0]) + rng.uniform(-0.5, 0.5)
        distance = dx * math.cos(angle) + dy * math.sin(angle) - 0.6 * size
    distance = distance + 0.07 * size * fractal_noise(rng, 20).flat[pixels]
    return np.minimum(height, distance * rng.uniform(1.2, 3.0)), distance > 0


def scratch(part: Part, x, y, rng, s: float) -> np.ndarray:
    """scratched: depth 0..1 [N] of one to three grooves, roughly side by side."""
    total = part.head_height + part.shaft_length
    angle = rng.uniform(-1.1, 1.1)  # to the axis: a groove along the thread would hide in it
    groove = np.zeros_like(x)
    for _ in range(rng.integers(1, 4)):
        along = rng.uniform(0.05, 0.95) * total - part.shaft_length
        reach = part.head_radius if along > 0 else part.shaft_radius
        line = stroke(
            x, y, (along, rng.uniform(-0.5, 0.5) * reach), angle + rng.normal(0, 0.25),
            rng.uniform(0.5, 0.95) * total, lerp(SCRATCH_WIDTH, s), rng.uniform(-0.25, 0.25),
        )  # fmt: skip
        groove = np.maximum(groove, line)
    return groove


def rust(pixels, rng, s: float) -> np.ndarray:
    """rusted: weight 0..1 [N] of ragged patches around one or two spots of the part."""
    x, y = GRID_X.flat[pixels], GRID_Y.flat[pixels]
    blotches = fractal_noise(rng, 9).flat[pixels]
    for spot in rng.integers(pixels.size, size=rng.integers(1, 3)):
        blotches = blotches + 5.0 * np.exp(-np.square(np.hypot(x - x[spot], y - y[spot]) / 0.3))
    limit = float(np.quantile(blotches, 1.0 - lerp(RUST_AREA, s)))
    return smoothstep(limit - 0.4, limit + 0.4, blotches)


# -------------------------------------------------------------------------------- height of the part


def thread_form(turns: np.ndarray) -> np.ndarray:
    """Depth of the thread after so many turns: 0 on the crest, 1 at the root, both flat."""
    return np.clip(1.5 * np.abs(2.0 * (turns % 1.0) - 1.0) - 0.25, 0.0, 1.0)


def shaft_surface(part: Part, x, y, damage):
    """Height, inside and cavity [N] of a cylinder with a helical thread, changed by ``damage``."""
    radius, sin, cos = part.shaft_radius, math.sin(part.tilt), math.cos(part.tilt)
    t = (x + np.sqrt(np.clip(radius**2 - y**2, 0, None)) * sin) / cos
    phi = np.arcsin(np.clip(y / radius, -1.0, 1.0))
    root = thread_form(t / part.pitch + phi / (2 * math.pi) + part.phase)
    root = damage(root * smoothstep(0.0, part.pitch, -part.shank - t), t, phi)
    tip = smoothstep(-part.shaft_length + 0.5 * radius, -part.shaft_length, t)
    r = radius * (1.0 - part.thread_depth * root - 0.22 * tip)
    u = np.sqrt(np.clip(r**2 - y**2, 0, None))
    return t * sin + u * cos, (np.abs(y) < r) & (t > -part.shaft_length), 0.75 * np.clip(root, 0, 1)


def head_gap(part: Part, t, y, u) -> np.ndarray:
    """How far points are inside the head (negative outside), from the nearest of its faces."""
    gap = np.interp(t, *part.head_profile()).astype(np.float32) - np.sqrt(y * y + u * u)
    if part.kind == "hex_bolt":
        for k in range(6):
            turn = part.facet_angle + k * math.pi / 3
            facet = part.head_radius * math.cos(math.pi / 6) - y * math.sin(turn) - u * math.cos(turn)
            gap = np.minimum(gap, facet)
    return np.minimum(gap, np.minimum(t, part.head_height - t))


def drive_recess(part: Part, u, y) -> np.ndarray:
    """Which points [N] of the top face are cut away for the driver."""
    size, turn = part.shaft_radius, 2 * math.pi * part.phase
    a, b = u * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - u * math.sin(turn)
    if part.drive == "hex":
        return np.maximum(np.abs(b), 0.5 * np.abs(b) + 0.866 * np.abs(a)) < 0.62 * size
    if part.drive == "slot":
        return np.abs(a) < 0.2 * size
    if part.drive == "cross":
        return (np.minimum(np.abs(a), np.abs(b)) < 0.2 * size) & (np.hypot(a, b) < 0.8 * size)
    return np.zeros(u.shape, dtype=bool)


def head_surface(part: Part, x, y):
    """Height, inside and cavity [N] of the head, found by marching along the lines of sight."""
    sin, cos = math.sin(part.tilt), math.cos(part.tilt)
    chord = np.sqrt(np.clip(part.head_radius**2 - y**2, 0, None))
    steps = np.linspace(0.999, -0.999, 13, dtype=np.float32)[:, None] * chord  # [13, N], near to far
    solid = head_gap(part, (x + steps * sin) / cos, y, steps) >= 0
    first, columns = solid.argmax(0), np.arange(x.size)
    far, near = steps[first, columns], steps[np.maximum(first - 1, 0), columns]
    for _ in range(5):  # bisect between the last step outside and the first one inside
        u = (near + far) / 2
        inside = head_gap(part, (x + u * sin) / cos, y, u) >= 0
        near, far = np.where(inside, near, u), np.where(inside, u, far)
    t = (x + u * sin) / cos
    on_face = t > part.head_height - 2 * PIXEL * sin
    recess = on_face & drive_recess(part, u, y)
    height = t * sin + u * cos - 0.05 * recess
    if part.knurl:
        side = (t > 0.15 * part.head_height) & (t < 0.85 * part.head_height)
        ribs = np.cos(26 * np.arctan2(y, u))
        height = height + part.knurl * part.head_radius * 0.5 * ribs * side
    return height, solid.any(0), 0.85 * recess


def build_surface(part: Part, class_name: str, x, y, rng, s: float):
    """Height, mask, cavity (0 open, 1 closed to the light) and broken metal [R, R] of the part.

    ``x``, ``y`` are `part_coordinates`; the defects of shape happen here (bent ones came before).
    """
    height, mask = np.zeros_like(x), np.zeros(x.shape, dtype=bool)
    cavity, broken = np.zeros_like(x), np.zeros(x.shape, dtype=bool)
    margin = 3 * PIXEL  # with a little of the surroundings the slopes at the outline come out right
    near = (np.abs(y) < part.shaft_radius + margin) & (x > -part.shaft_length - margin) & (x < 0)
    pixels = np.flatnonzero(near)

    def damage(root, t, phi):
        if class_name == "thread_damaged":
            return damage_thread(part, root, t, phi, pixels, rng, s)
        return root

    surface = shaft_surface(part, x.flat[pixels], y.flat[pixels], damage)
    height.flat[pixels], mask.flat[pixels], cavity.flat[pixels] = surface

    rim = part.head_radius * math.sin(part.tilt)
    pixels = np.flatnonzero((np.abs(y) < part.head_radius) & (x > -rim) & (x < part.head_height + rim))
    hx, hy = x.flat[pixels], y.flat[pixels]
    head, inside, recess = head_surface(part, hx, hy)
    if class_name == "head_chipped":
        whole = head
        head, kept = chip_head(part, hx, hy, whole, pixels, rng, s)
        broken.flat[pixels] = inside & kept & (head < whole)
        inside = inside & kept
    pixels = pixels[inside]
    height.flat[pixels], mask.flat[pixels], cavity.flat[pixels] = head[inside], True, recess[inside]
    return height, mask, cavity, broken


# --------------------------------------------------------------------------------- light and material


@dataclass(frozen=True)
class Lighting:
    """Lamps, and a surrounding room that the metal mirrors: dim, with soft boxes of light."""

    directions: np.ndarray  # [K, 3] unit vectors towards the lamps
    colours: np.ndarray  # [K, 3]
    ambient: np.ndarray  # [3]
    boxes: np.ndarray  # [3, B] position along room_axis (-1..1), width, brightness of the soft boxes
    room_axis: np.ndarray  # [3]


def sample_lighting(rng, shifted: bool) -> Lighting:
    """Two or three lamps; the second line has lower and colder ones."""
    count = rng.integers(2, 4)
    azimuth = rng.uniform(0, 2 * math.pi, count)
    elevation = rng.uniform(0.35, 0.8, count) if shifted else rng.uniform(0.5, 1.2, count)
    flat = np.cos(elevation)
    directions = np.stack([np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(elevation)], 1)
    warmth = rng.uniform(-0.2, 0.0) if shifted else rng.uniform(-0.1, 0.22)
    colour = np.array([1 + warmth, 1, 1 - warmth]) * rng.uniform(0.8, 1.2)
    power = np.array([1.0, *rng.uniform(0.25, 0.6, count - 1)])
    turn = rng.uniform(0, 2 * math.pi)
    return Lighting(
        directions=directions.astype(np.float32),
        colours=(power[:, None] * colour * rng.uniform(0.92, 1.08, (count, 3))).astype(np.float32),
        ambient=(colour * rng.uniform(0.2, 0.35)).astype(np.float32),
        boxes=rng.uniform([[-1], [0.06], [0.5]], [[1], [0.22], [2.0]], (3, 4)).astype(np.float32),
        room_axis=np.array([math.cos(turn), math.sin(turn), 0.0], dtype=np.float32),
    )


def normals_of(height: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Unit normals [N, 3] of a height map at the flat indices ``pixels``."""
    down, right = np.gradient(height, np.float32(PIXEL))
    normals = np.stack([-right.flat[pixels], -down.flat[pixels], np.ones(pixels.size, "f4")], 1)
    return normals / np.sqrt(np.square(normals).sum(1, keepdims=True))


def room_reflection(normals, roughness: float, light: Lighting) -> np.ndarray:
    """Brightness [N] of the room in the mirror direction; rough metal blurs the soft boxes."""
    mirrored = 2.0 * normals[:, 2] * (normals @ light.room_axis)  # of the line of sight (0, 0, 1)
    position, width, power = light.boxes[:, :, None]
    spread = np.hypot(width, np.float32(roughness))
    places = np.linspace(-1.0, 1.0, 256, dtype=np.float32)
    table = 0.15 + (power * width / spread * np.exp(-np.square((places - position) / spread))).sum(0)
    return table[np.clip((mirrored + 1.0) * 127.5, 0, 255).astype(np.intp)]


def shade(normals, albedo, gloss, finish, light: Lighting) -> np.ndarray:
    """Colours [N, 3] from Lambert, Blinn-Phong and the mirrored room.

    ``gloss`` [N] tells how much of the metal shows: 1 is clean, 0 is rust or dirt, purely diffuse.
    """
    _, diffuse, specular, roughness = finish
    roughness = float(roughness)
    lambert = np.clip(normals @ light.directions.T, 0, None)  # [N, K]
    halfway = light.directions + np.array([0, 0, 1], dtype=np.float32)
    halfway /= np.linalg.norm(halfway, axis=1, keepdims=True)
    highlight = np.exp((normals @ halfway.T - 1.0) * (2.0 / roughness**2))  # close to cos ** shininess
    body = (lambert @ light.colours + light.ambient) * mix(1.0, diffuse, gloss)[:, None]
    room = room_reflection(normals, roughness, light)[:, None] * light.ambient
    mirror = highlight @ light.colours + 3.0 * room
    metal_tint = np.sqrt(albedo)  # metals colour their reflections, less so than their body
    return albedo * body + metal_tint * mirror * (0.5 * specular * gloss)[:, None]


def draw_part(part: Part, light: Lighting, class_name: str, nuisance, rng):
    """Colours [R, R, 3] and mask [R, R] of the part; no other function asks for the class."""
    s = lerp(STRENGTH, rng.uniform())
    x, y = part_coordinates(part)
    if class_name == "bent":
        x, y = bend(part, x, y, rng, s)
    height, mask, cavity, broken = build_surface(part, class_name, x, y, rng, s)
    pixels = np.flatnonzero(mask)
    x, y, cavity, broken = (values.flat[pixels] for values in (x, y, cavity, broken))
    fine, coarse = value_noise(nuisance, 96).flat[pixels], fractal_noise(nuisance, 5).flat[pixels]

    albedo = part.finish[0] * (1.0 + 0.05 * fine + 0.08 * coarse)[:, None]
    gloss = 1.0 - 0.15 * np.clip(coarse, 0, 2)
    relief = nuisance.uniform(0.0005, 0.0015) * fine
    if class_name == "scratched":
        groove = scratch(part, x, y, rng, s)
        relief = relief - 0.7 * lerp(SCRATCH_WIDTH, s) * groove
        # Bare metal is bright on a dark finish; dirt has filled the groove in a bright one.
        albedo = mix(albedo, 0.9 if part.finish[0].max() < 0.3 else 0.03, 0.9 * groove[:, None])
        gloss = gloss * (1.0 - 0.85 * groove)
    elif class_name == "rusted":
        weight, grain = rust(pixels, rng, s), value_noise(rng, 72).flat[pixels]
        relief = relief + 0.012 * weight * (1.0 + grain)
        orange = np.array([0.50, 0.19, 0.05], "f4") * rng.uniform(0.75, 1.25)
        crust = mix(np.array([0.16, 0.07, 0.04], "f4"), orange, np.clip(0.5 + 0.35 * grain, 0, 1)[:, None])
        albedo = mix(albedo, crust, 0.93 * weight[:, None])
        gloss = gloss * (1.0 - 0.95 * weight)
    elif class_name == "head_chipped":  # the break shows grainy metal, paler than a dark finish, darker than a bright one
        grain = (0.75 if part.finish[0].max() < 0.5 else 0.16) * np.clip(1.0 + 0.4 * fine, 0.2, 1.3)
        albedo = mix(albedo, grain[:, None], 0.9 * broken[:, None])
        gloss = np.where(broken, 0.2, gloss).astype(np.float32)
        relief = relief + 0.004 * fine * broken
    for weight, colour, loss in sample_marks(part, x, y, pixels, nuisance):
        albedo = mix(albedo, colour, weight[:, None])
        gloss = gloss * (1.0 - loss * weight)

    height.flat[pixels] += relief
    colours = shade(normals_of(height, pixels), albedo, gloss, part.finish, light)
    image = np.zeros((RENDER * RENDER, 3), dtype=np.float32)
    image[pixels] = np.clip(colours, 0, None) * (1.0 - cavity)[:, None]
    return image.reshape(RENDER, RENDER, 3), mask


# ------------------------------------------------------------------ harmless marks, background, camera


def sample_colour(rng, low: float, high: float) -> np.ndarray:
    """A colour [3] whose largest channel is ``low`` to ``high``; a third are brown, so rust is not alone."""
    brown = rng.uniform((0.95, 0.45, 0.15), (1.0, 0.75, 0.5))
    other = 1.0 - rng.uniform(0.0, 0.6) * rng.uniform(0, 1, 3)
    colour = brown if rng.uniform() < 0.35 else other
    return (colour / colour.max() * rng.uniform(low, high)).astype(np.float32)


def sample_marks(part: Part, x, y, pixels, rng) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Harmless marks on parts of every class: (weight [N], colour [3], loss of gloss) each."""

    def spot():
        return rng.uniform(-part.shaft_length, part.head_height), rng.uniform(-1, 1) * part.shaft_radius

    marks = []
    if rng.uniform() < 0.15:  # a smudge of oil: dark, see-through, without an edge
        smudge = 0.4 * smoothstep(0.5, 2.0, fractal_noise(rng, 4).flat[pixels])
        marks.append((smudge, sample_colour(rng, 0.03, 0.15), 0.5))
    if rng.uniform() < 0.15:  # the faint rim of a dried drop of water
        centre, radius = spot(), rng.uniform(0.06, 0.2)
        rim = np.exp(-np.square((np.hypot(x - centre[0], y - centre[1]) - radius) / 0.02))
        marks.append((0.2 * rim, np.full(3, 0.6, "f4"), 0.3))
    if rng.uniform() < 0.1:  # a dab of a paint marker: short, broad and coloured, unlike a scratch
        length, width = rng.uniform(0.12, 0.3), rng.uniform(0.05, 0.09)
        dab = stroke(x, y, spot(), rng.uniform(0, math.pi), length, width)
        marks.append((0.8 * smoothstep(0.3, 0.6, dab), sample_colour(rng, 0.1, 0.7), 0.7))
    if rng.uniform() < 0.25:  # specks of dirt
        specks = 0.7 * smoothstep(2.3, 2.8, value_noise(rng, 60).flat[pixels])
        marks.append((specks, sample_colour(rng, 0.03, 0.2), 0.8))
    return marks


def background_texture(rng, shifted: bool) -> np.ndarray:
    """Texture [S, S], about 0..1, of what the part lies on; the second line has surfaces of its own."""
    angle, frequency = rng.uniform(0, math.pi), rng.uniform(14, 40)
    a = SCENE_X * math.cos(angle) + SCENE_Y * math.sin(angle)
    b = SCENE_Y * math.cos(angle) - SCENE_X * math.sin(angle)
    cloud, grain = 0.06 * fractal_noise(rng, 4, SIZE), value_noise(rng, 80, SIZE)
    lines = rng.standard_normal(400, dtype=np.float32)[((b + 2.0) * 100).astype(np.intp)]
    tile_a, tile_b = a * frequency / 6 % 1 - 0.5, b * frequency / 6 % 1 - 0.5
    if shifted:
        ruled_mat = 0.4 + cloud + 0.5 * (np.minimum(np.abs(tile_a), np.abs(tile_b)) < 0.03)
        perforated_sheet = 0.7 + cloud - 0.5 * (np.hypot(tile_a, tile_b) < 0.27)
        concrete = 0.5 + 2 * cloud + 0.15 * fractal_noise(rng, 30, SIZE)
        textures = (ruled_mat, perforated_sheet, concrete)
    else:
        plain_mat = 0.5 + 2 * cloud
        brushed_metal = 0.5 + cloud + 0.1 * lines
        wood = 0.5 + 0.15 * np.sin(frequency * (b + cloud + 0.03 * np.sin(3 * a))) + 0.06 * lines
        ribbed_belt = 0.5 + cloud + 0.18 * np.sin(frequency * a)
        weave = 0.5 + cloud + 0.2 * np.sin(2 * frequency * a) * np.sin(2 * frequency * b)
        speckle = 0.5 + cloud + 0.22 * grain
        textures = (plain_mat, brushed_metal, wood, ribbed_belt, weave, speckle)
    return np.clip(textures[rng.integers(len(textures))], 0.0, 1.2)


def draw_background(light: Lighting, rng, shifted: bool) -> np.ndarray:
    """Colours [S, S, 3] of the surface below the part, with scratches, stains and crumbs of its own."""
    base = sample_colour(rng, 0.06, 0.55)
    other = mix(base, sample_colour(rng, 0.06, 0.55), rng.uniform(0.05, 0.25))
    image = mix(base, other, background_texture(rng, shifted)[..., None])
    for _ in range(rng.integers(0, 2)):
        spot, angle = rng.uniform(-1, 1, 2).tolist(), rng.uniform(0, math.pi)
        length, curve = rng.uniform(0.3, 1.8), rng.uniform(-0.3, 0.3)
        line = stroke(SCENE_X, SCENE_Y, spot, angle, length, 0.018, curve)
        image = mix(image, rng.uniform(0.0, 0.7), rng.uniform(0.1, 0.45) * line[..., None])
    if rng.uniform() < 0.5:
        stain = smoothstep(0.9, 1.5, fractal_noise(rng, 4, SIZE))
        image = mix(image, sample_colour(rng, 0.05, 0.3), rng.uniform(0.15, 0.5) * stain[..., None])
    if rng.uniform() < 0.5:
        crumbs = smoothstep(2.2, 2.6, value_noise(rng, 60, SIZE))
        image = mix(image, sample_colour(rng, 0.03, 0.6), crumbs[..., None])
    towards = light.directions[0]
    falloff = 1.0 + rng.uniform(0.05, 0.25) * (SCENE_X * towards[0] + SCENE_Y * towards[1])
    return image * falloff[..., None] * (light.directions[:, 2] @ light.colours + light.ambient)


def shadow(coverage, light: Lighting, rng) -> np.ndarray:
    """Share [S, S] of the light that reaches the background past the part (``coverage`` [S, S])."""
    away = -light.directions[0, :2] / light.directions[0, 2] * rng.uniform(0.03, 0.08)
    dx, dy = (np.clip(away, -0.14, 0.14) * SIZE / 2).round().astype(int)
    cast = blur(np.roll(coverage, (dy, dx), (0, 1)), rng.uniform(1.5, 4.0))
    return 1.0 - rng.uniform(0.3, 0.65) * np.maximum(cast, 0.8 * blur(coverage, 1.2))


def photograph(image, rng, shifted: bool) -> np.ndarray:
    """White balance, exposure, vignetting, tone curve, lens and noise: linear [S, S, 3] to uint8."""
    balance = rng.uniform((0.87, 0.95, 0.98), (1.0, 1.07, 1.16)) if shifted else rng.uniform(0.92, 1.08, 3)
    vignette = rng.uniform(0.1, 0.25) if shifted else rng.uniform(0.0, 0.12)
    exposure = 1.6 * rng.uniform(0.75, 1.15) * (1.0 - vignette * (SCENE_X**2 + SCENE_Y**2))
    image = image * exposure[..., None] * balance.astype(np.float32)
    encoded = np.sqrt(1.0 - np.exp(-image))  # a soft shoulder instead of clipping, then gamma 2
    lens = ImageFilter.GaussianBlur(rng.uniform(0.4, 0.8) if shifted else rng.uniform(0.0, 0.55))
    picture = Image.fromarray((encoded * 255).astype(np.uint8)).filter(lens)
    sigma = rng.uniform(3, 6) if shifted else rng.uniform(0.7, 3.5)  # of 255, in each channel and in all
    noise = sigma * (rng.standard_normal((SIZE, SIZE, 3), "f4") + rng.standard_normal((SIZE, SIZE, 1), "f4"))
    return np.clip(np.asarray(picture) + noise + 0.5, 0, 255).astype(np.uint8)


def halve(image: np.ndarray) -> np.ndarray:
    """Mean of every 2 x 2 pixels, [R, R, ...] to [S, S, ...]."""
    rows = image[0::2] + image[1::2]
    return (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25)


def draw(class_name: str, key: tuple[int, ...], shifted: bool = False) -> np.ndarray:
    """One picture, uint8 [SIZE, SIZE, 3]; a pure function of its arguments.

    ``key`` seeds it: (SEED, number of the split, number of the picture).  ``shifted`` is the second
    production line.  The same key with another class shows the same part in the same scene, so
    every picture of a set needs a key of its own.
    """
    if class_name not in CLASSES:
        raise ValueError(f"class_name must be one of {', '.join(CLASSES)}; got {class_name!r}")
    nuisance, defect = (np.random.default_rng([*key, stream]) for stream in (0, 1))
    part, light = sample_part(nuisance), sample_lighting(nuisance, shifted)
    background = draw_background(light, nuisance, shifted)
    colours, mask = draw_part(part, light, class_name, nuisance, defect)
    coverage = halve(mask.astype(np.float32))
    background *= (shadow(coverage, light, nuisance) * (1.0 - coverage))[..., None]
    return photograph(background + halve(colours), nuisance, shifted)


# ----------------------------------------------------------------------------------------- the data set


def plan(split: str) -> list[tuple[str, str, tuple[int, ...], bool]]:
    """Jobs (file, class, key, shifted) of a split; file numbers tell nothing about class or line."""
    number = list(PER_CLASS).index(split)
    rng = np.random.default_rng([SEED, number])
    labels = rng.permutation(np.repeat(CLASSES, PER_CLASS[split])).tolist()
    shifted = rng.permutation(len(labels)) < round(SHIFTED_SHARE.get(split, 0.0) * len(labels))
    jobs = []
    for i, label in enumerate(labels):
        file = f"{split}/{i:05d}.jpg" if split == "unlabelled" else f"{split}/{label}/{i:04d}.jpg"
        jobs.append((file, label, (SEED, number, i), bool(shifted[i])))
    return jobs


def save_picture(folder: Path, job: tuple) -> None:
    """Draw one job of `plan` below ``folder``; runs in a worker process."""
    file, class_name, key, shifted = job
    Image.fromarray(draw(class_name, key, shifted)).save(folder / file, quality=JPEG_QUALITY)


def description() -> dict:
    """What the marker file says about a complete set."""
    return {
        "made_by": "common/synthetic.py",
        "version": VERSION,
        "seed": SEED,
        "size": SIZE,
        "per_class": PER_CLASS,
        "shifted_share": SHIFTED_SHARE,
        "ranges": [STRENGTH, BEND_ANGLE, CHIP_SIZE, RUST_AREA, SCRATCH_WIDTH, THREAD_SHARE],
    }


def is_complete(root: Path) -> bool:
    """Whether the marker in ``root`` is that of this very set."""
    try:
        return json.loads((root / MARKER).read_text(encoding="utf-8")) == json.loads(json.dumps(description()))
    except (OSError, ValueError):
        return False


def make_dataset(root: Path, progress: bool = True) -> Path:
    """Make the whole set as folder ``root``, unless it is there already; returns ``root``.

    The pictures are drawn in a sibling folder that is renamed at the end, so nothing half-made is
    ever seen under ``root``.  Raises ValueError if ``root`` holds something else.
    """
    root = Path(root)
    if root.exists():
        if is_complete(root):
            return root
        raise ValueError(
            f"{root} exists but is not the complete fastener set, version {VERSION}: "
            "remove it or name another folder"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        draft.chmod(0o755)  # mkdtemp makes it private
        jobs = [job for split in PER_CLASS for job in plan(split)]
        if progress:
            print(f"drawing {len(jobs)} pictures of fasteners into {root} (once)", flush=True)
        for folder in {(draft / job[0]).parent for job in jobs}:
            folder.mkdir(parents=True)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            done = pool.map(partial(save_picture, draft), jobs, chunksize=32)
            # disable=None: a bar on a terminal, silence in a log
            for _ in tqdm(done, "drawing pictures", len(jobs), disable=None if progress else True):
                pass
        (draft / MARKER).write_text(json.dumps(description(), indent=2) + "\n", encoding="utf-8")
        try:
            os.replace(draft, root)
        except OSError:  # another process may have put the same set there in the meantime
            if not is_complete(root):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def make_contact_sheet(root: Path, file: Path, columns: int = 12) -> None:
    """A row per class: random pictures of ``train`` on the left, of ``test_shifted`` on the right."""
    rng = np.random.default_rng(SEED)
    left, gap = 100, 10
    sheet = Image.new("RGB", (left + 2 * columns * SIZE + gap, len(CLASSES) * SIZE), "white")
    pen = ImageDraw.Draw(sheet)
    for row, class_name in enumerate(CLASSES):
        pen.text((4, row * SIZE + SIZE // 2 - 6), class_name, fill="black")
        for block, split in enumerate(("train", "test_shifted")):
            files = sorted((Path(root) / split / class_name).glob("*.jpg"))
            for column, pick in enumerate(rng.permutation(len(files))[:columns]):
                corner = (left + block * gap + (block * columns + column) * SIZE, row * SIZE)
                with Image.open(files[pick]) as picture:
                    sheet.paste(picture, corner)
    sheet.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the synthetic fastener set.")
    parser.add_argument("--root", type=Path, default=Path("data/fasteners"), help="folder of the set")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE", help="also save an overview picture")
    arguments = parser.parse_args()
    make_dataset(arguments.root)
    if arguments.contact_sheet:
        make_contact_sheet(arguments.root, arguments.contact_sheet)


if __name__ == "__main__":
    main()
