"""Which documents share a sequence: best fit, longest first. Padding is the largest loss on real data (short texts)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from qlorajob.errors import Reason, StepError

FIELD = "training.packing"


def packing_refused(why: str = "packed rows would see each other in this model") -> StepError:
    """The error that says so to the user."""
    return StepError(Reason.UNSUPPORTED, f"{FIELD}: {why}; set {FIELD}: false", field=FIELD)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the documents in each sequence, none longer than `capacity`. The same input gives the same output.

    Each document goes where it leaves the least room. Free room is kept as a bit mask (bit n: some sequence has n
    tokens of room), so that finding the best fit is two operations on an integer, however many sequences there are.
    """
    sequences: list[list[int]] = []
    with_room: dict[int, deque[int]] = {}
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = with_room[room].popleft()
            if not with_room[room]:
                rooms &= ~(1 << room)
            sequences[sequence].append(index)
        else:
            room, sequence = capacity, len(sequences)
            sequences.append([index])
        left = room - length
        if left > 0:
            with_room.setdefault(left, deque()).append(sequence)
            rooms |= 1 << left
    return sequences
