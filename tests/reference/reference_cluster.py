"""Simulations that the cost model sums up: collectives message by message, rounds step by step.

A collective is simulated on a list of vectors, one per device, in steps. In a step every device may
send one message and receive one. The load of a step is the largest number of values that one link
carries in one direction. Every simulation returns what each device holds at the end, and the loads
of the steps.
"""

import numpy as np


def ring_all_reduce(vectors):
    """A reduce-scatter and then an all-gather; every device sends pieces to the next one."""
    n = len(vectors)
    held = [np.array_split(vector.astype(np.float64), n) for vector in vectors]
    loads = []
    for step in range(2 * (n - 1)):
        sent = [((i - step) % n, held[i][(i - step) % n].copy()) for i in range(n)]
        loads.append(max(len(piece) for _, piece in sent))
        for i, (number, piece) in enumerate(sent):
            receiver = held[(i + 1) % n]
            receiver[number] = receiver[number] + piece if step < n - 1 else piece
    return [np.concatenate(pieces) for pieces in held], loads


def halving_doubling_all_reduce(vectors):
    """Pairs of devices exchange halves of the remaining vector at halving distances, and then the
    sums in reverse order. Devices beyond the largest power of two send their vectors to one of the
    others before, and receive the sum after."""
    held = [vector.astype(np.float64) for vector in vectors]
    power = 1
    while 2 * power <= len(held):
        power *= 2
    size, loads = len(held[0]), []
    if power < len(held):
        loads.append(size)
        for extra in range(power, len(held)):
            held[extra - power] = held[extra - power] + held[extra]
    parts, distance, trail = [(0, size)] * power, power // 2, []
    while distance:
        before, parts_before = [x.copy() for x in held], list(parts)
        trail.append((distance, parts_before))
        for i in range(power):
            low, high = parts_before[i]
            middle = (low + high) // 2
            parts[i] = (low, middle) if i & distance == 0 else (middle, high)
            part = slice(*parts[i])
            held[i][part] = before[i][part] + before[i ^ distance][part]
        loads.append(max(high - low for low, high in parts))
        distance //= 2
    for distance, wider in reversed(trail):
        before, sent = [x.copy() for x in held], list(parts)
        for i in range(power):
            part = slice(*sent[i ^ distance])
            held[i][part] = before[i ^ distance][part]
        loads.append(max(high - low for low, high in sent))
        parts = list(wider)
    if power < len(held):
        loads.append(size)
        for extra in range(power, len(held)):
            held[extra] = held[extra - power]
    return held, loads


def server_all_reduce(vectors):
    """All devices send to a server, which sends the sum to all."""
    total, n = np.sum(vectors, axis=0, dtype=np.float64), len(vectors)
    return [total] * n, [n * len(total)] * 2


def ring_all_gather(pieces):
    """Every device sends to the next one the piece that it received last."""
    n = len(pieces)
    held = [{i: pieces[i]} for i in range(n)]
    loads = []
    for step in range(n - 1):
        loads.append(max(len(piece) for piece in pieces))
        for i in range(n):
            held[(i + 1) % n][(i - step) % n] = held[i][(i - step) % n]
    return _joined(held), loads


def doubling_all_gather(pieces):
    """Device i receives from device i + 1, i + 2, i + 4, … all pieces that it does not hold yet."""
    n, distance, loads = len(pieces), 1, []
    held = [{i: pieces[i]} for i in range(n)]
    while distance < n:
        before = [dict(pieces_held) for pieces_held in held]
        load = 0
        for i in range(n):
            sender = before[(i + distance) % n]
            missing = {j: piece for j, piece in sender.items() if j not in before[i]}
            load = max(load, sum(map(len, missing.values())))
            held[i].update(missing)
        loads.append(load)
        distance *= 2
    return _joined(held), loads


def server_all_gather(pieces):
    """All devices send to a server, which sends to each the pieces of the others."""
    whole, n = np.concatenate(pieces), len(pieces)
    missing = sum(len(whole) - len(piece) for piece in pieces)
    return [whole] * n, [len(whole), missing]


def _joined(held):
    return [np.concatenate([pieces[j] for j in range(len(held))]) for pieces in held]


def run_seconds(lengths, steps, inner, outer, group=1, inner_steps=1, overlap=0, at_end=True):
    """Simulate many runs at once; returns the seconds after which the last device ends, [runs].

    Args:
      lengths: H of every round.
      steps: `steps()` draws the seconds of one step of every device, [runs, devices].
      inner, outer: seconds of communication of an inner stage and of the end of a round.
      group: devices with successive numbers that wait for each other at the inner stages.
      inner_steps: the steps of one inner stage.
      overlap: the last steps of a round, during which the end of the round communicates.
      at_end: whether all devices wait for each other at the end of a round.
    """
    clock = np.zeros_like(steps())
    for length in lengths:
        for step in range(1, length - overlap + 1):
            clock = clock + steps()
            if step % inner_steps == 0 and group > 1:
                grouped = clock.reshape(len(clock), -1, group)
                clock = np.broadcast_to(grouped.max(2, keepdims=True), grouped.shape)
                clock = clock.reshape(len(clock), -1) + inner
        arrives = clock.max(1, keepdims=True) + outer
        for _ in range(overlap):
            clock = clock + steps()
        if at_end:
            clock = np.maximum(clock, arrives)
    return clock.max(1)
