"""The embedded set: labelled pictures of threaded fasteners, drawn where no data is given.

With it every script of this repository can be tried without a download. A picture is made as a
camera would make it; the class changes the part before light falls on it. Everything that is not
the defect (kind of fastener, finish, pose, lamps, background, dirt, camera) comes from a random
stream that never sees the class, so that no shortcut tells the classes apart.

    canvas.py                 sizes, conventions, and what all others draw with
    part.py                   a fastener and its pose
    defects.py                what each class changes about it
    shape.py, skin.py         height map and surface of the part, with its defect
    light.py, background.py   lamps and shading; what the part lies on
    camera.py                 from light to the bytes of a picture
    drawing.py                one picture, from all of these
    dataset.py                the set, drawn once
"""

from common.fasteners.dataset import make_dataset
from common.fasteners.defects import CLASSES

__all__ = ["CLASSES", "make_dataset"]
