#!/usr/bin/env python3
"""Reads a run folder's event files with TensorBoard's own reader and prints what it finds as JSON.

    python read_events.py RUN

    {"scalars": {"train/loss": [[step, wall_time, value], ...], ...}, "texts": {"samples": [[step, "text"], ...]}}

A test compares this with what Firebox wrote to `metrics.jsonl`. An event file that TensorBoard cannot read, or a
folder without one, is an error.
"""

import json
import sys
from pathlib import Path

from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util


def read(run: Path) -> dict:
    if not any(run.rglob("*tfevents*")):
        raise SystemExit(f"error: no TensorBoard event file under {run}")
    # A size of 0 keeps every event; the default would sample them.
    keep_all = {event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}
    scalars: dict[str, list] = {}
    texts: dict[str, list] = {}
    for folder in sorted({path.parent for path in run.rglob("*tfevents*")}):
        events = event_accumulator.EventAccumulator(str(folder), size_guidance=keep_all)
        events.Reload()
        tags = events.Tags()
        for tag in tags[event_accumulator.SCALARS]:
            rows = scalars.setdefault(tag, [])
            rows.extend([event.step, event.wall_time, event.value] for event in events.Scalars(tag))
        for tag in tags[event_accumulator.TENSORS]:
            for event in events.Tensors(tag):
                array = tensor_util.make_ndarray(event.tensor_proto)
                if array.dtype == object:
                    text = b"\n".join(array.ravel().tolist()).decode("utf-8", errors="replace")
                    texts.setdefault(tag, []).append([event.step, text])
                else:
                    scalars.setdefault(tag, []).append([event.step, event.wall_time, float(array)])
    return {"scalars": scalars, "texts": texts}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: read_events.py RUN")
    json.dump(read(Path(sys.argv[1])), sys.stdout)
    print()
