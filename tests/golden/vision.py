"""Images: Pillow's resizing."""

import json
import zlib

from PIL import Image

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resized_fixture(out_dir):
    """`images.json`: filter, width, height, and the CRC-32 of what Pillow makes of a picture of 7 x 5 pixels."""
    values = bytes((i * i * 37 + i * 11) % 256 for i in range(7 * 5 * 3))
    picture = Image.frombytes("RGB", (7, 5), values)
    sizes = [(4, 4), (7, 3), (2, 5), (16, 9), (1, 1), (224, 3)]
    rows = []
    for name, resample in FILTERS.items():
        for size in sizes:
            rows.append([name, *size, zlib.crc32(picture.resize(size, resample).tobytes())])
    (out_dir / "images.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(f"images.json: {len(rows)} pictures")


def fixture(out_dir):
    resized_fixture(out_dir)
