"""A file that runs code when it is read carelessly."""

import os
from pathlib import Path


class Bomb:
    """Unpickled carelessly, this makes `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)
