"""Output folders: whether one can be written, asked before the work that is to fill it."""

import os
from pathlib import Path


def check_output_folder(folder: str | Path) -> None:
    """Refuses a place where no file can be written later. Makes nothing.

    Raises:
        FileExistsError: the folder, or one above it, is a file (or a link to nothing).
        PermissionError: it may not be written in, or may not be made.

    >>> check_output_folder("runs/first")
    """
    folder = Path(folder)
    # The first that is there, from the folder itself upwards: the working directory or the root at the latest.
    found = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not found.is_dir():
        what = "which is" if found == folder else f"but {found} is"
        raise FileExistsError(
            f"output: got {folder}, {what} not a folder; wanted a folder that is there or can be made"
        )
    if not all(os.access(found, mode) for mode in (os.W_OK, os.X_OK)):
        raise PermissionError(f"output: got {folder}, but {found} may not be written in; wanted a folder that may")
