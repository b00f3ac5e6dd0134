"""The height map of a part: the shaft with its thread and the head, with any defect of their shape.

Light is computed from it, so thread, facets and breaks are shaded as on a real part.
"""

import math

import numpy as np

from common.fasteners.canvas import PIXEL, rotate, smoothstep
from common.fasteners.defects import chip_head, damage_thread
from common.fasteners.part import thread_form


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
    a, b = rotate(u, y, 2 * math.pi * part.phase)
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
