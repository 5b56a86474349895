"""What Pillow keeps for a whole process, and what threads that read pictures need otherwise."""

import threading
import warnings

from PIL import Image


class PillowUnlimited:
    """Pillow without its warnings and its own limit of pixels, as long as any thread is inside.

    Both hold for a whole process. The limit is ours to check, as soon as the size is known; the warnings are of damaged
    metadata, which we do without.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1
            if self._count == 1:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                self._warnings = warnings.catch_warnings()
                self._warnings.__enter__()
                warnings.simplefilter('ignore')

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                Image.MAX_IMAGE_PIXELS = self._limit
                self._warnings.__exit__(None, None, None)


PILLOW_UNLIMITED = PillowUnlimited()
"""The one for this process, as what it changes is."""
