"""Which picture files lie below a folder: by their names, links followed, the same order always."""

import os
from functools import cache
from pathlib import Path

from common.errors import UserError

EXTENSIONS = set(".jpg .jpeg .png .bmp .tif .tiff .webp .gif .pgm .ppm".split())


def list_pictures(folder):
    """Relative paths of the pictures below a folder, class folder after class folder, sorted.

    Links to pictures and to folders are followed; a line says where some lead out of `folder`.
    Files and folders whose name begins with a dot are left out. Raises UserError where the folder
    is missing or holds no picture, and for a link to nothing or in a circle.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    links, found = [], []
    for entry in walk(folder, links):
        if Path(entry.name).suffix.lower() in EXTENSIONS and entry.is_file():
            found.append(Path(entry.path).relative_to(folder).parts)
    if not found:
        raise UserError(f"{folder}: holds no pictures ({', '.join(sorted(EXTENSIONS))})")
    inside = folder.resolve()
    outside = [link for link in links if not Path(link).resolve().is_relative_to(inside)]
    if outside:
        say_once(f"{folder}: follows {len(outside)} links that lead out of it, the first "
                 f"{outside[0]} -> {os.path.realpath(outside[0])}")
    return ["/".join(parts) for parts in sorted(found)]


def holds_pictures(folder):
    """Whether there is a picture anywhere below a folder, by its name."""
    return any(path.suffix.lower() in EXTENSIONS for path in Path(folder).rglob("*"))


def walk(folder, links, above=()):
    """Entries of the files below a folder, links followed and added to the list `links`.

    above: the folders on the way here, without links, which a link must not lead back to.
    """
    here = os.path.realpath(folder)
    if here in above:
        raise UserError(f"{folder}: a link to a folder that it lies in; remove it")
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            links.append(entry.path)
            if not os.path.exists(entry.path):
                raise UserError(f"{entry.path}: a link to nothing; mend or remove it")
        if entry.is_dir():
            yield from walk(entry.path, links, (*above, here))
        else:
            yield entry


@cache
def say_once(line):
    """Print a line, once in a process: a folder is listed several times."""
    print(line)
