"""One file of weights for several networks in OpenVINO's IR: what they have in common is kept, and read, once.

Layer 4.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from posecrafter_rt.spec import SHALLOW_STREAM, SHALLOW_UNET

# Networks whose weights are those of another, but for a few. All others have files of their own.
HOLDERS = {"controlnet_stream": "controlnet", "unet_stream": "unet", SHALLOW_UNET: "unet", SHALLOW_STREAM: "unet"}
KEY_BYTES = 64  # by which equal constants are looked for
_PLACE = re.compile(rb'\boffset="(\d+)" size="(\d+)"')  # of a constant in the file of weights


def weights_path(network: Path) -> Path:
    """Return the file of a network's weights. network: its .xml."""
    return network.with_name(f"{HOLDERS.get(network.stem, network.stem)}.bin")


class SharedWeights:
    """The constants in one file, which grows as networks are added; each is kept once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def add(self, network: Path) -> int:
        """Move the constants of an IR from the .bin beside it into the file; return their number of bytes.

        The first to be added is the network whose file it is.
        """
        own, content = network.with_suffix(".bin"), network.read_bytes()
        is_first = own == self.path
        assert is_first == (not self._places)
        found = {tuple(map(int, match.groups())) for match in _PLACE.finditer(content)}
        constants = np.memmap(own, np.uint8, "r").view(np.ndarray)
        places = {(offset, size): self._place(constants[offset : offset + size], offset if is_first else None)
                  for offset, size in sorted(found)}  # fmt: skip
        if not is_first:
            network.write_bytes(_PLACE.sub(lambda match: b'offset="%d" size="%s"' % (
                places[int(match[1]), int(match[2])], match[2]), content))  # fmt: skip
            own.unlink()
        return sum(size for _, size in found)

    def _place(self, constant: np.ndarray, offset: int | None) -> int:
        """Return where a constant lies in the file, at whose end it is written if it is new. offset: where, if known."""
        if not constant.size:
            return 0
        places = self._places[constant.size, constant[:KEY_BYTES].tobytes()]
        if offset is None:
            for place in places:
                held = np.memmap(self.path, np.uint8, "r", offset=place, shape=constant.shape)
                if np.array_equal(held, constant):
                    return place
            with self.path.open("ab") as file:
                offset = file.tell()
                file.write(constant.data)
        places.append(offset)
        return offset
