"""What views look like: one picture, plain and in views of it, on a sheet.

    python tests/benchmarks/views.py shaft.jpg --view-size 96x240 --output views.png
    python tests/benchmarks/views.py shaft.jpg --view-size 96x240 --view-recipe rotate=45 --grid 20

--grid draws squares of so many px of the view over the picture first: where a view sheared or
squeezed, they would be no squares.
"""

from pathlib import Path

import numpy as np
import torch
from bench import ROOT  # noqa: F401  (puts the repository on Python's path)
from PIL import Image

from common import cli
from common.views import ViewRecipe, render
from infer import decode, resize

COLUMNS, GAP = 3, 4


def main():
    p = cli.parser(__doc__)
    p.add_argument("picture", type=Path)
    p.add_argument("--view-size", type=cli.picture_size, default=[128, 128], metavar="HxW")
    p.add_argument("--view-recipe", nargs="+", default=[], metavar="NAME=NUMBER")
    p.add_argument("--views", type=cli.positive_int, default=8, help="beside the plain picture")
    p.add_argument("--grid", type=cli.positive_int, metavar="PX", help="draw squares over it")
    p.add_argument("--seed", type=cli.seed, default=0)
    p.add_argument("--output", type=Path, default=Path("views.png"), help="picture to write")
    args = p.parse_args()
    recipe = cli.recipe(ViewRecipe().changed, args.view_recipe, "--view-recipe")

    frame = np.array(resize(decode(Path(args.picture).read_bytes())[0], args.view_size))
    if args.grid:
        frame[::args.grid] = frame[:, ::args.grid] = 255
    count = 1 + args.views
    batch = torch.from_numpy(frame)[None].expand(count, -1, -1, -1)
    views = render(batch, [0] * count, range(count), args.seed, recipe)
    tiles = views.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    tiles = [np.pad(tile, [(0, GAP), (0, GAP), (0, 0)], constant_values=255) for tile in tiles]
    tiles += [np.full_like(tiles[0], 255)] * (-count % COLUMNS)
    rows = [np.hstack(tiles[k:k + COLUMNS]) for k in range(0, len(tiles), COLUMNS)]
    Image.fromarray(np.vstack(rows)).save(args.output)


if __name__ == "__main__":
    cli.run(main)
