"""What each class changes about a part, and how much: the outline, the height map or the skin.

All of it happens before light falls on the part, so a defect is lit and pictured like the rest.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from common.fasteners.canvas import (
    GRID_X,
    GRID_Y,
    fractal_noise,
    mix,
    rotate,
    smoothstep,
    stroke,
    value_noise,
)
from common.fasteners.part import thread_form

CLASSES = ("bent", "good", "head_chipped", "rusted", "scratched", "thread_damaged")

# Difficulty. Each defect draws its strength uniformly from STRENGTH; strength 0 gives the first, 1
# the second number of its range below. A lower STRENGTH[0] makes a longer tail of faint defects.
STRENGTH = (0.25, 1.0)
BEND_ANGLE = (32.0, 65.0)  # degrees between the two ends of the shaft
CHIP_SIZE = (0.95, 1.15)  # reach of the break into the head, of the radius of the head
RUST_AREA = (0.2, 0.4)  # of the visible part
SCRATCH_WIDTH = (0.08, 0.125)  # half-frames; 0.021 is one finished pixel
THREAD_SHARE = (0.8, 1.0)  # length of the damaged stretch, of the threaded length


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
    angle = math.radians(mix(*BEND_ANGLE, defect.strength))
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
    length = mix(*THREAD_SHARE, defect.strength) * threaded
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
    size = mix(*CHIP_SIZE, defect.strength) * radius

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
        distance = rotate(dx, dy, angle)[0] - 0.6 * size
    distance = distance + 0.07 * size * fractal_noise(rng, 20).flat[pixels]
    slope = rng.uniform(1.2, 3.0)
    return np.minimum(height, distance * slope), distance > 0


def break_open(part, broken, fine, skin):
    """head_chipped: the skin with grainy metal at the break. A fresh break has no finish.

    It is paler than a dark finish and darker than a bright one. broken: bool [N]; fine: noise [N].
    """
    brightness = 0.75 if part.albedo.max() < 0.5 else 0.16
    grain = brightness * np.clip(1.0 + 0.4 * fine, 0.2, 1.3)
    bare = skin.covered(grain[:, None], 0.9 * broken, 0.0, 0.004 * fine * broken)
    return replace(bare, gloss=np.where(broken, 0.2, skin.gloss).astype(np.float32))


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
        size = (rng.uniform(0.5, 0.95) * total, mix(*SCRATCH_WIDTH, defect.strength))
        curve = rng.uniform(-0.25, 0.25)
        depth = np.maximum(depth, stroke(x, y, centre, its_angle, size, curve))
    return depth


def scratch(part, x, y, skin, defect):
    """scratched: the skin with grooves in it. They have to contrast with the finish to be seen.

    Bare metal is bright on a dark finish; dirt has filled the groove in a bright one.
    """
    depth = grooves(part, x, y, defect)
    colour = 0.9 if part.albedo.max() < 0.3 else 0.03
    relief = -0.7 * mix(*SCRATCH_WIDTH, defect.strength) * depth
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
    limit = float(np.quantile(blotches, 1.0 - mix(*RUST_AREA, defect.strength)))
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
