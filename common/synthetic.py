"""Draws labelled pictures of threaded fasteners, the set that is used when no data is given.

With it every script of this repository can be tried without a download. A picture is made as a
camera would make it: height map of the part (a head and a threaded shaft), normals, lamps and an
environment reflected in the metal, background, shadow, lens and sensor. The class changes the
height map, the outline or the surface before light falls on it.

Everything that is not the defect (kind of fastener, finish, pose, lamps, background, dirt, camera)
comes from a random stream that never sees the class, so that no shortcut tells the classes apart.
The order in which a stream is drawn from decides the pictures; a change of it needs a new VERSION.

    python -m common.synthetic --root data/fasteners --contact-sheet sheet.png

Conventions: lengths are in half-frames (the frame spans [-1, 1]). `x` runs along the part in the
picture, `t` along its tilted axis: 0 where head and shaft meet, positive in the head. `y` runs
across, `u` from the axis towards the camera. Maps are [R, R] float32, R = RENDER; a finished
picture is [S, S], S = SIZE; flat arrays [N] hold one value per listed pixel, and `pixels` [N] are
the flat indices of these in a map. Colours are linear RGB, 0..1. Angles are in radians. `rng` is a
numpy Generator.
"""

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
VERSION = 2  # raise it with every change of the drawing; the constants below are compared anyway
SEED = 20261124

# Pictures per class: few labels and many unlabelled pictures, as a factory has them. The unlabelled
# pool has no class folders and holds the classes in equal shares.
PER_CLASS = {"train": 18, "val": 18, "test": 150, "test_shifted": 150, "unlabelled": 350}
SHIFTED_SHARE = {"test_shifted": 1.0, "unlabelled": 0.5}  # from the second line; others 0

# Difficulty. Each defect draws its strength uniformly from STRENGTH; strength 0 gives the first, 1
# the second number of its range below. A lower STRENGTH[0] makes a longer tail of faint defects.
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


def pixel_grid(size):
    """Float32 maps of the pixel centres, right and down. What is drawn is a function of these."""
    line = ((np.arange(size) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    return np.meshgrid(line, line)


GRID_X, GRID_Y = pixel_grid(RENDER)  # for the part
SCENE_X, SCENE_Y = pixel_grid(SIZE)  # for background and camera, which need no fine edges


# ------------------------------------------------------------------------------- small helpers


def lerp(bounds, share):
    """The number at `share` (0..1) of the way between two bounds. It makes a size of a strength."""
    return bounds[0] + (bounds[1] - bounds[0]) * share


def mix(a, b, weight):
    """`a` where the weight is 0, `b` where it is 1. It lays one colour over another."""
    return a + (b - a) * weight


def smoothstep(low, high, x):
    """0 at `low`, 1 at `high` and beyond, a smooth S between. It makes soft masks out of noise."""
    x = np.clip((x - low) / (high - low), 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


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


def blur(image, sigma):
    """Gaussian blur of a map with values in 0..1; sigma in px. Shadows get their soft edges by it.

    It works in 8 bits inside.
    """
    picture = Image.fromarray((image * 255).astype(np.uint8))
    blurred = picture.filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(blurred, dtype=np.float32) / 255


def stroke(x, y, centre, angle, size, curve=0.0):
    """Weight 0..1 of a line with Gaussian cross-section and soft ends, at the points x, y.

    Scratches and dabs of paint are strokes. size: (length, width); curve: of a parabola.
    """
    length, width = size
    dx = x - centre[0]
    dy = y - centre[1]
    along = dx * math.cos(angle) + dy * math.sin(angle)
    across = dy * math.cos(angle) - dx * math.sin(angle) + curve * along**2
    ends = np.clip((length / 2 - np.abs(along)) / (0.15 * length), 0.0, 1.0)
    return np.exp(-np.square(across / width)) * ends


# ------------------------------------------------------------------------- the part and its pose


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

    # scale so that the bounding box of the rotated part takes the wanted share of the frame
    fill = rng.uniform(0.88, 0.97)
    cos = abs(math.cos(rotation))
    sin = abs(math.sin(rotation))
    along = (length + height) * math.cos(tilt) + head * math.sin(tilt)
    box_width = along * cos + 1.5 * head * sin
    box_height = along * sin + 1.5 * head * cos
    unit = 2 * fill / max(box_width, box_height)

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
    dx = GRID_X - part.centre[0]
    dy = GRID_Y - part.centre[1]
    cos = math.cos(part.rotation)
    sin = math.sin(part.rotation)
    middle = (part.head_height - part.shaft_length) * math.cos(part.tilt) / 2
    x = dx * cos + dy * sin + middle
    y = dy * cos - dx * sin
    return x, y


# ------------------------------------------------------------------------- the defects of shape


@dataclass(frozen=True)
class Defect:
    """What is wrong with a part. It has a random stream of its own, so it changes nothing else."""

    class_name: str
    rng: np.random.Generator
    strength: float  # 0 faint, 1 strong; see STRENGTH


def bend(part, x, y, defect):
    """bent: x, y [R, R] measured along a shaft that turns off through an arc of a circle.

    Whatever is drawn in the new coordinates is then bent, thread and light included.
    """
    rng = defect.rng
    angle = math.radians(lerp(BEND_ANGLE, defect.strength))
    side = (-1) ** rng.integers(2)
    start = rng.uniform(0.05, 0.4) * part.shaft_length  # of the arc, below the head
    run = rng.uniform(0.1, 1.0) * (part.shaft_length - start)  # its length: a kink or a long curve
    radius = run / angle

    # the camera centres what it sees: the head moves to one side as the tip moves to the other
    rest = part.shaft_length - start - run
    at_tip = radius * (1 - math.cos(angle)) + rest * math.sin(angle)

    # from the centre of the arc: pixels beside it, and beyond it, where the shaft is straight
    past = -x - start
    across = side * y + 0.4 * at_tip - radius
    turned = np.arctan2(past, -across)
    on_arc = (past > 0) & (turned < angle)
    beyond = (past > 0) & (turned >= angle)
    arc_x = radius * turned
    arc_y = radius - np.hypot(past, across)
    end_x = run + past * math.cos(angle) + across * math.sin(angle)
    end_y = radius + across * math.cos(angle) - past * math.sin(angle)

    past = np.where(on_arc, arc_x, past)
    past = np.where(beyond, end_x, past)
    across = np.where(on_arc, arc_y, across + radius)
    across = np.where(beyond, end_y, across)
    return -start - past, side * across


def damage_thread(part, root, t, phi, pixels, defect):
    """thread_damaged: depth of the thread [N] with a stretch flattened, crushed or cut.

    There the ridges of the shaft are no longer even. root, t, phi: [N], the sound depth (0 crest,
    1 root), the place along the axis and the angle about it.
    """
    rng = defect.rng

    # where: a stretch of the threaded length, with ragged ends
    threaded = part.shaft_length - part.shank
    length = lerp(THREAD_SHARE, defect.strength) * threaded
    centre = part.shank + rng.uniform(0.5 * length, threaded - 0.45 * length)
    noise = fractal_noise(rng, 16).flat[pixels]
    edge = np.abs(-t - centre) / (0.5 * length) + 0.15 * noise
    weight = 1.0 - smoothstep(0.8, 1.05, edge)
    if rng.uniform() < 0.3:  # struck from one side only
        struck = rng.uniform(-0.8, 0.8)
        weight = weight * smoothstep(0.1, 0.6, np.cos(phi - struck))

    # how
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


def chip_head(part, x, y, height, pixels, defect):
    """head_chipped: height [N] cut by a bite or a straight break, and which pixels are still there.

    The break changes the outline and the shading of the head.
    """
    rng = defect.rng
    radius = part.head_radius
    top = part.head_height * math.cos(part.tilt)
    rim = radius * math.sin(part.tilt)
    size = lerp(CHIP_SIZE, defect.strength) * radius

    # where the break starts: at a side, or at the far edge of the top face
    if rng.uniform() < 0.6:
        centre_x = rng.uniform(0.1 * top, top + 0.3 * rim)
        centre_y = radius * (-1) ** rng.integers(2)
    else:
        centre_x = top + 0.8 * rim
        centre_y = rng.uniform(-0.75, 0.75) * radius
    dx = x - centre_x
    dy = y - centre_y

    # how far each point is from the break; negative where metal is missing
    if rng.uniform() < 0.55:  # a bite
        distance = np.hypot(dx, dy) - size
    else:  # a straight break that faces the middle of the head
        angle = math.atan2(-centre_y, top / 2 - centre_x) + rng.uniform(-0.5, 0.5)
        distance = dx * math.cos(angle) + dy * math.sin(angle) - 0.6 * size
    distance = distance + 0.07 * size * fractal_noise(rng, 20).flat[pixels]
    slope = rng.uniform(1.2, 3.0)
    return np.minimum(height, distance * slope), distance > 0


# --------------------------------------------------------------------------- height of the part


def thread_form(turns):
    """Depth of the thread after so many turns: 0 on the crest, 1 at the root. Both are flat."""
    return np.clip(1.5 * np.abs(2.0 * (turns % 1.0) - 1.0) - 0.25, 0.0, 1.0)


def shaft_surface(part, x, y, pixels, defect):
    """Height, inside and cavity [N] of a cylinder with a helical thread.

    Damage of the thread happens here, because light has to fall on the damaged form.
    """
    radius = part.shaft_radius
    sin = math.sin(part.tilt)
    cos = math.cos(part.tilt)

    # the thread on a smooth cylinder
    t = (x + np.sqrt(np.clip(radius**2 - y**2, 0, None)) * sin) / cos
    phi = np.arcsin(np.clip(y / radius, -1.0, 1.0))
    turns = t / part.pitch + phi / (2 * math.pi) + part.phase
    root = thread_form(turns) * smoothstep(0.0, part.pitch, -part.shank - t)
    if defect.class_name == "thread_damaged":
        root = damage_thread(part, root, t, phi, pixels, defect)

    # the cylinder with that thread cut into it, pointed at its tip
    tip = smoothstep(-part.shaft_length + 0.5 * radius, -part.shaft_length, t)
    r = radius * (1.0 - part.thread_depth * root - 0.22 * tip)
    u = np.sqrt(np.clip(r**2 - y**2, 0, None))
    height = t * sin + u * cos
    inside = (np.abs(y) < r) & (t > -part.shaft_length)
    return height, inside, 0.75 * np.clip(root, 0, 1)


def head_gap(part, t, y, u):
    """How far points are inside the head. It is negative outside, so its sign finds the surface."""
    radius_here = np.interp(t, *part.head_profile()).astype(np.float32)
    gap = radius_here - np.sqrt(y * y + u * u)
    if part.kind == "hex_bolt":
        to_facet = part.head_radius * math.cos(math.pi / 6)
        for k in range(6):
            turn = part.facet_angle + k * math.pi / 3
            facet = to_facet - y * math.sin(turn) - u * math.cos(turn)
            gap = np.minimum(gap, facet)
    return np.minimum(gap, np.minimum(t, part.head_height - t))


def drive_recess(part, u, y):
    """Which points [N] of the top face are cut away for the driver. Less light gets in there."""
    size = part.shaft_radius
    turn = 2 * math.pi * part.phase
    a = u * math.cos(turn) + y * math.sin(turn)
    b = y * math.cos(turn) - u * math.sin(turn)
    if part.drive == "hex":
        return np.maximum(np.abs(b), 0.5 * np.abs(b) + 0.866 * np.abs(a)) < 0.62 * size
    if part.drive == "slot":
        return np.abs(a) < 0.2 * size
    if part.drive == "cross":
        return (np.minimum(np.abs(a), np.abs(b)) < 0.2 * size) & (np.hypot(a, b) < 0.8 * size)
    return np.zeros(u.shape, dtype=bool)


def head_surface(part, x, y):
    """Height, inside and cavity [N] of the head, found by marching along the lines of sight.

    The head has several faces, so no single formula gives the first point that a line meets.
    """
    sin = math.sin(part.tilt)
    cos = math.cos(part.tilt)

    # march from near to far: between which steps does the line of sight enter the head
    chord = np.sqrt(np.clip(part.head_radius**2 - y**2, 0, None))
    steps = np.linspace(0.999, -0.999, 13, dtype=np.float32)[:, None] * chord  # [13, N]
    solid = head_gap(part, (x + steps * sin) / cos, y, steps) >= 0
    first = solid.argmax(0)
    columns = np.arange(x.size)
    far = steps[first, columns]
    near = steps[np.maximum(first - 1, 0), columns]

    # bisect between the last step outside and the first one inside
    for _ in range(5):
        u = (near + far) / 2
        inside = head_gap(part, (x + u * sin) / cos, y, u) >= 0
        near = np.where(inside, near, u)
        far = np.where(inside, u, far)
    t = (x + u * sin) / cos

    # what is cut into the head
    on_face = t > part.head_height - 2 * PIXEL * sin
    recess = on_face & drive_recess(part, u, y)
    height = t * sin + u * cos - 0.05 * recess
    if part.knurl:
        side = (t > 0.15 * part.head_height) & (t < 0.85 * part.head_height)
        ribs = np.cos(26 * np.arctan2(y, u))
        height = height + part.knurl * part.head_radius * 0.5 * ribs * side
    return height, solid.any(0), 0.85 * recess


def build_surface(part, x, y, defect):
    """Height, mask, cavity (0 open, 1 closed to the light) and broken metal of the part: [R, R].

    Light is computed from them. x, y: `part_coordinates`, or those of `bend`; the other defects
    of shape happen here.
    """
    height = np.zeros_like(x)
    mask = np.zeros(x.shape, dtype=bool)
    cavity = np.zeros_like(x)
    broken = np.zeros(x.shape, dtype=bool)

    # the shaft, with a little of its surroundings: then the slopes at the outline come out right
    margin = 3 * PIXEL
    near = (np.abs(y) < part.shaft_radius + margin) & (x > -part.shaft_length - margin) & (x < 0)
    pixels = np.flatnonzero(near)
    shaft, inside, groove = shaft_surface(part, x.flat[pixels], y.flat[pixels], pixels, defect)
    height.flat[pixels] = shaft
    mask.flat[pixels] = inside
    cavity.flat[pixels] = groove

    # the head, which hides the shaft behind it
    rim = part.head_radius * math.sin(part.tilt)
    near = (np.abs(y) < part.head_radius) & (x > -rim) & (x < part.head_height + rim)
    pixels = np.flatnonzero(near)
    head_x = x.flat[pixels]
    head_y = y.flat[pixels]
    head, inside, recess = head_surface(part, head_x, head_y)
    if defect.class_name == "head_chipped":
        whole = head
        head, kept = chip_head(part, head_x, head_y, whole, pixels, defect)
        broken.flat[pixels] = inside & kept & (head < whole)
        inside = inside & kept
    pixels = pixels[inside]
    height.flat[pixels] = head[inside]
    mask.flat[pixels] = True
    cavity.flat[pixels] = recess[inside]
    return height, mask, cavity, broken


# ---------------------------------------------------------------- the skin, and its defects


@dataclass(frozen=True)
class Skin:
    """What light meets at the listed pixels of a part. Defects and marks are changes of it."""

    albedo: np.ndarray  # [N, 3]
    gloss: np.ndarray  # [N] 1 is clean metal, 0 is rust or dirt, purely diffuse
    relief: np.ndarray  # [N] added to the height

    def covered(self, colour, weight, dulled, relief=0.0):
        """The skin under a layer of some colour. Paint, dirt and rust are such layers.

        colour: [3] or [N, 3]; weight: [N], 0..1; dulled: [N], share of the gloss that is lost.
        """
        return Skin(
            albedo=mix(self.albedo, colour, weight[:, None]),
            gloss=self.gloss * (1.0 - dulled),
            relief=self.relief + relief,
        )


def grooves(part, x, y, defect):
    """Depth 0..1 [N] of one to three grooves, roughly side by side. Together they are a scratch."""
    rng = defect.rng
    total = part.head_height + part.shaft_length
    angle = rng.uniform(-1.1, 1.1)  # to the axis: a groove along the thread would hide in it
    depth = np.zeros_like(x)
    for _ in range(rng.integers(1, 4)):
        along = rng.uniform(0.05, 0.95) * total - part.shaft_length
        reach = part.head_radius if along > 0 else part.shaft_radius
        centre = (along, rng.uniform(-0.5, 0.5) * reach)
        its_angle = angle + rng.normal(0, 0.25)
        size = (rng.uniform(0.5, 0.95) * total, lerp(SCRATCH_WIDTH, defect.strength))
        curve = rng.uniform(-0.25, 0.25)
        depth = np.maximum(depth, stroke(x, y, centre, its_angle, size, curve))
    return depth


def scratch(part, x, y, skin, defect):
    """scratched: the skin with grooves in it. They have to contrast with the finish to be seen.

    Bare metal is bright on a dark finish; dirt has filled the groove in a bright one.
    """
    depth = grooves(part, x, y, defect)
    colour = 0.9 if part.albedo.max() < 0.3 else 0.03
    relief = -0.7 * lerp(SCRATCH_WIDTH, defect.strength) * depth
    return skin.covered(colour, 0.9 * depth, 0.85 * depth, relief)


def rust_patches(pixels, defect):
    """Weight 0..1 [N] of ragged patches around one or two spots of the part.

    Rust spreads from where it starts, so it lies together and not all over the part.
    """
    rng = defect.rng
    x = GRID_X.flat[pixels]
    y = GRID_Y.flat[pixels]
    blotches = fractal_noise(rng, 9).flat[pixels]
    spots = rng.integers(1, 3)
    for spot in rng.integers(pixels.size, size=spots):
        distance = np.hypot(x - x[spot], y - y[spot])
        blotches = blotches + 5.0 * np.exp(-np.square(distance / 0.3))
    limit = float(np.quantile(blotches, 1.0 - lerp(RUST_AREA, defect.strength)))
    return smoothstep(limit - 0.4, limit + 0.4, blotches)


def rust(pixels, skin, defect):
    """rusted: the skin with patches of a rough, brown crust. It has hardly any gloss."""
    weight = rust_patches(pixels, defect)
    grain = value_noise(defect.rng, 72).flat[pixels]
    dark = np.array([0.16, 0.07, 0.04], "f4")
    orange = np.array([0.50, 0.19, 0.05], "f4") * defect.rng.uniform(0.75, 1.25)
    crust = mix(dark, orange, np.clip(0.5 + 0.35 * grain, 0, 1)[:, None])
    relief = 0.012 * weight * (1.0 + grain)
    return skin.covered(crust, 0.93 * weight, 0.95 * weight, relief)


def break_open(part, broken, fine, skin):
    """head_chipped: the skin with grainy metal at the break. A fresh break has no finish.

    It is paler than a dark finish and darker than a bright one. broken: bool [N]; fine: noise [N].
    """
    brightness = 0.75 if part.albedo.max() < 0.5 else 0.16
    grain = brightness * np.clip(1.0 + 0.4 * fine, 0.2, 1.3)
    return Skin(
        albedo=mix(skin.albedo, grain[:, None], 0.9 * broken[:, None]),
        gloss=np.where(broken, 0.2, skin.gloss).astype(np.float32),
        relief=skin.relief + 0.004 * fine * broken,
    )


def sample_marks(part, x, y, pixels, rng):
    """Draw harmless marks: a list of (weight [N], colour [3], loss of gloss).

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
        marks.append((0.2 * rim, np.full(3, 0.6, "f4"), 0.3))

    if rng.uniform() < 0.1:  # a dab of a paint marker: short, broad and coloured, unlike a scratch
        size = (rng.uniform(0.12, 0.3), rng.uniform(0.05, 0.09))
        centre = spot()
        dab = stroke(x, y, centre, rng.uniform(0, math.pi), size)
        marks.append((0.8 * smoothstep(0.3, 0.6, dab), sample_colour(rng, 0.1, 0.7), 0.7))

    if rng.uniform() < 0.25:  # specks of dirt
        specks = 0.7 * smoothstep(2.3, 2.8, value_noise(rng, 60).flat[pixels])
        marks.append((specks, sample_colour(rng, 0.03, 0.2), 0.8))
    return marks


def sample_colour(rng, low, high):
    """Draw a colour [3] whose largest channel is `low` to `high`, for dirt and backgrounds.

    A third of the colours are brown, so that brown alone does not mean rust.
    """
    brown = rng.uniform((0.95, 0.45, 0.15), (1.0, 0.75, 0.5))
    other = 1.0 - rng.uniform(0.0, 0.6) * rng.uniform(0, 1, 3)
    colour = brown if rng.uniform() < 0.35 else other
    return (colour / colour.max() * rng.uniform(low, high)).astype(np.float32)


# -------------------------------------------------------------------------------------- light


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
    return normals / np.sqrt(np.square(normals).sum(1, keepdims=True))


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
    x = x.flat[pixels]
    y = y.flat[pixels]
    cavity = cavity.flat[pixels]
    broken = broken.flat[pixels]

    # surface: metal that is a little uneven, its defect, and harmless marks upon both
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

    # light
    height.flat[pixels] += skin.relief
    normals = normals_of(height, pixels)
    colours = np.clip(shade(normals, skin, part, light), 0, None)
    image = np.zeros((RENDER * RENDER, 3), dtype=np.float32)
    image[pixels] = colours * (1.0 - cavity)[:, None]
    return image.reshape(RENDER, RENDER, 3), mask


# ---------------------------------------------------------------------- background and camera


def background_texture(rng, shifted):
    """Texture [S, S], about 0..1, of what the part lies on. The second line has other surfaces."""
    # a, b: coordinates along and across the texture
    angle = rng.uniform(0, math.pi)
    frequency = rng.uniform(14, 40)
    a = SCENE_X * math.cos(angle) + SCENE_Y * math.sin(angle)
    b = SCENE_Y * math.cos(angle) - SCENE_X * math.sin(angle)

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


def shadow(coverage, light, rng):
    """Share [S, S] of the light that reaches the background past the part.

    It makes the part lie on something. coverage: [S, S], share of each pixel that the part takes.
    """
    away = -light.directions[0, :2] / light.directions[0, 2] * rng.uniform(0.03, 0.08)
    dx, dy = (np.clip(away, -0.14, 0.14) * SIZE / 2).round().astype(int)
    cast = blur(np.roll(coverage, (dy, dx), (0, 1)), rng.uniform(1.5, 4.0))
    contact = blur(coverage, 1.2)
    return 1.0 - rng.uniform(0.3, 0.65) * np.maximum(cast, 0.8 * contact)


def photograph(image, rng, shifted):
    """White balance, exposure, vignetting, tone curve, lens and noise: linear to uint8 [S, S, 3].

    The camera of the second line is bluer, darker at its corners, softer and noisier.
    """
    if shifted:
        balance_range = ((0.87, 0.95, 0.98), (1.0, 1.07, 1.16))
        vignette_range = (0.1, 0.25)
        lens_range = (0.4, 0.8)
        noise_range = (3.0, 6.0)
    else:
        balance_range = (0.92, 1.08)
        vignette_range = (0.0, 0.12)
        lens_range = (0.0, 0.55)
        noise_range = (0.7, 3.5)

    # light
    balance = rng.uniform(*balance_range, 3)
    vignette = rng.uniform(*vignette_range)
    exposure = 1.6 * rng.uniform(0.75, 1.15) * (1.0 - vignette * (SCENE_X**2 + SCENE_Y**2))
    image = image * exposure[..., None] * balance.astype(np.float32)
    encoded = np.sqrt(1.0 - np.exp(-image))  # a soft shoulder instead of clipping, then gamma 2

    # lens
    lens = ImageFilter.GaussianBlur(rng.uniform(*lens_range))
    picture = Image.fromarray((encoded * 255).astype(np.uint8)).filter(lens)

    # sensor: noise of each channel and noise of all channels alike; sigma of 255
    sigma = rng.uniform(*noise_range)
    own = rng.standard_normal((SIZE, SIZE, 3), "f4")
    shared = rng.standard_normal((SIZE, SIZE, 1), "f4")
    noise = sigma * (own + shared)
    return np.clip(np.asarray(picture) + noise + 0.5, 0, 255).astype(np.uint8)


def halve(image):
    """Mean of every 2 x 2 pixels, [R, R, ...] to [S, S, ...]. It makes the edges smooth."""
    rows = image[0::2] + image[1::2]
    return (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25)


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
    defect = Defect(class_name, own, strength=lerp(STRENGTH, own.uniform()))

    part = sample_part(nuisance)
    light = sample_lighting(nuisance, shifted)
    background = draw_background(light, nuisance, shifted)
    colours, mask = draw_part(part, light, defect, nuisance)

    coverage = halve(mask.astype(np.float32))
    lit = shadow(coverage, light, nuisance) * (1.0 - coverage)
    background *= lit[..., None]
    return photograph(background + halve(colours), nuisance, shifted)


# --------------------------------------------------------------------------------- the data set


def plan(split):
    """List the pictures of a split as jobs: (file, class, key, shifted).

    Classes and lines are shuffled, so that the number of a file tells neither.
    """
    number = list(PER_CLASS).index(split)
    rng = np.random.default_rng([SEED, number])
    labels = rng.permutation(np.repeat(CLASSES, PER_CLASS[split])).tolist()
    count_shifted = round(SHIFTED_SHARE.get(split, 0.0) * len(labels))
    shifted = rng.permutation(len(labels)) < count_shifted
    jobs = []
    for i, label in enumerate(labels):
        file = f"{split}/{label}/{i:04d}.jpg"
        if split == "unlabelled":
            file = f"{split}/{i:05d}.jpg"
        jobs.append((file, label, (SEED, number, i), bool(shifted[i])))
    return jobs


def save_picture(folder, job):
    """Draw one job of `plan` and save it below a folder. Worker processes run it."""
    file, class_name, key, shifted = job
    picture = Image.fromarray(draw(class_name, key, shifted))
    picture.save(folder / file, quality=JPEG_QUALITY)


def description():
    """What the marker file says about a complete set. A set with another marker is another set."""
    return {
        "made_by": "common/synthetic.py",
        "version": VERSION,
        "seed": SEED,
        "size": SIZE,
        "per_class": PER_CLASS,
        "shifted_share": SHIFTED_SHARE,
        "ranges": [STRENGTH, BEND_ANGLE, CHIP_SIZE, RUST_AREA, SCRATCH_WIDTH, THREAD_SHARE],
    }


def is_complete(root):
    """Whether the marker in a folder is that of this very set. Then nothing has to be drawn."""
    wanted = json.loads(json.dumps(description()))  # with lists for tuples, as in the file
    try:
        return json.loads((root / MARKER).read_text(encoding="utf-8")) == wanted
    except (OSError, ValueError):
        return False


def make_dataset(root, progress=True):
    """Make the whole set as folder `root`, unless it is there already; returns `root`.

    The pictures are drawn in a folder beside it that is renamed at the end, so that nothing
    half-made is ever seen under `root`. Raises ValueError if `root` holds something else.
    """
    root = Path(root)
    if root.exists():
        if is_complete(root):
            return root
        raise ValueError(
            f"{root} exists but is not the complete fastener set, version {VERSION}: "
            "remove it or name another folder"
        )
    jobs = []
    for split in PER_CLASS:
        jobs += plan(split)

    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        draft.chmod(0o755)  # mkdtemp makes it private
        if progress:
            print(f"drawing {len(jobs)} pictures of fasteners into {root} (once)", flush=True)
        draw_all(draft, jobs, progress)
        text = json.dumps(description(), indent=2) + "\n"
        (draft / MARKER).write_text(text, encoding="utf-8")
        try:
            os.replace(draft, root)
        except OSError:  # another process may have put the same set there in the meantime
            if not is_complete(root):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def draw_all(folder, jobs, progress):
    """Draw all jobs of `plan` below a folder. It takes all cores, as the pictures are independent.

    progress: whether to show a bar.
    """
    homes = {(folder / file).parent for file, *_ in jobs}
    for home in homes:
        home.mkdir(parents=True)
    disable = None if progress else True  # None: a bar on a terminal, silence in a log
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(partial(save_picture, folder), jobs, chunksize=32)
        for _ in tqdm(done, "drawing pictures", len(jobs), disable=disable):
            pass


def make_contact_sheet(root, file, columns=12):
    """Save an overview of a set: a row per class, random pictures of `train` and `test_shifted`.

    It shows at a glance what the classes look like on both lines, the first on the left.
    """
    rng = np.random.default_rng(SEED)
    left, gap = 100, 10  # px: room for the names of the classes; between the two lines
    width = left + 2 * columns * SIZE + gap
    sheet = Image.new("RGB", (width, len(CLASSES) * SIZE), "white")
    pen = ImageDraw.Draw(sheet)
    for row, class_name in enumerate(CLASSES):
        top = row * SIZE
        pen.text((4, top + SIZE // 2 - 6), class_name, fill="black")
        for block, split in enumerate(("train", "test_shifted")):
            files = sorted((Path(root) / split / class_name).glob("*.jpg"))
            start = left + block * (columns * SIZE + gap)
            for column, pick in enumerate(rng.permutation(len(files))[:columns]):
                with Image.open(files[pick]) as picture:
                    sheet.paste(picture, (start + column * SIZE, top))
    sheet.save(file)


def main():
    parser = argparse.ArgumentParser(description="Draw the synthetic fastener set.")
    parser.add_argument(
        "--root", type=Path, default=Path("data/fasteners"), help="folder of the set"
    )
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="FILE", help="also save an overview picture"
    )
    arguments = parser.parse_args()
    make_dataset(arguments.root)
    if arguments.contact_sheet:
        make_contact_sheet(arguments.root, arguments.contact_sheet)


if __name__ == "__main__":
    main()
