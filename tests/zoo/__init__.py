"""Small classifiers of every kind that a user may bring, with fixed weights and inputs."""

from __future__ import annotations

from zoo import attention, awkward, convolutional, layers, refused
from zoo.entry import DEVICE, Entry

ENTRIES: list[Entry] = [
    *layers.ENTRIES,
    *convolutional.ENTRIES,
    *attention.ENTRIES,
    *awkward.ENTRIES,
    *refused.ENTRIES,
]
BY_ID = {entry.id: entry for entry in ENTRIES}
assert len(BY_ID) == len(ENTRIES), "ids of the zoo must be unique"


def get(entry_id: str) -> Entry:
    return BY_ID[entry_id]


__all__ = ["BY_ID", "DEVICE", "ENTRIES", "Entry", "get"]
