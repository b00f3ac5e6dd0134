"""The camera: it turns the light of a scene into the bytes of a picture, with its own faults.

The second line has another camera, so a network meets pictures it was not trained on.
"""

import numpy as np
from PIL import Image, ImageFilter

from common.fasteners.canvas import SCENE_X, SCENE_Y, SIZE


def halve(image):
    """Mean of every 2 x 2 pixels, [R, R, ...] to [S, S, ...]. It makes the edges smooth."""
    rows = image[0::2] + image[1::2]
    return (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25)


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
