"""Collectives message by message, and rounds step by step: what the model of a cluster sums up.

A collective is played on a list of vectors, one a device, in steps. In a step every device may send
one message and receive one; its load is the most that one link carries one way, in values. All give
(what each device holds at the end, the loads of the steps).
"""

import numpy as np


def ring_all_reduce(vectors):
    """Reduce-scatter, then all-gather: piece by piece to the next device."""
    n = len(vectors)
    held = [np.array_split(vector.astype(np.float64), n) for vector in vectors]
    loads = []
    for step in range(2 * (n - 1)):
        sent = [((i - step) % n, held[i][(i - step) % n].copy()) for i in range(n)]
        loads.append(max(len(piece) for _, piece in sent))
        for i, (number, piece) in enumerate(sent):
            there = held[(i + 1) % n]
            there[number] = there[number] + piece if step < n - 1 else piece
    return [np.concatenate(pieces) for pieces in held], loads


def halving_doubling_all_reduce(vectors):
    """Halves of what is left are exchanged at growing distances, and back; devices beyond the power
    of two hand theirs to one of the others before, and are told the sum after."""
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
            mine = slice(*parts[i])
            held[i][mine] = before[i][mine] + before[i ^ distance][mine]
        loads.append(max(high - low for low, high in parts))
        distance //= 2
    for distance, wider in reversed(trail):
        before, sent = [x.copy() for x in held], list(parts)
        for i in range(power):
            theirs = slice(*sent[i ^ distance])
            held[i][theirs] = before[i ^ distance][theirs]
        loads.append(max(high - low for low, high in sent))
        parts = list(wider)
    if power < len(held):
        loads.append(size)
        for extra in range(power, len(held)):
            held[extra] = held[extra - power]
    return held, loads


def server_all_reduce(vectors):
    """All to one more device, which sends the sum to all."""
    total, n = np.sum(vectors, axis=0, dtype=np.float64), len(vectors)
    return [total] * n, [n * len(total)] * 2


def ring_all_gather(pieces):
    n = len(pieces)
    held = [{i: pieces[i]} for i in range(n)]
    loads = []
    for step in range(n - 1):
        loads.append(max(len(piece) for piece in pieces))
        for i in range(n):
            held[(i + 1) % n][(i - step) % n] = held[i][(i - step) % n]
    return [np.concatenate([mine[j] for j in range(n)]) for mine in held], loads


def doubling_all_gather(pieces):
    """Everyone tells who comes 1, 2, 4, … places before it what it knows and that one lacks."""
    n, distance, loads = len(pieces), 1, []
    held = [{i: pieces[i]} for i in range(n)]
    while distance < n:
        before = [dict(mine) for mine in held]
        load = 0
        for i in range(n):
            sender = before[(i + distance) % n]
            news = {j: piece for j, piece in sender.items() if j not in before[i]}
            load = max(load, sum(map(len, news.values())))
            held[i].update(news)
        loads.append(load)
        distance *= 2
    return [np.concatenate([mine[j] for j in range(n)]) for mine in held], loads


def server_all_gather(pieces):
    """All to one more device, which sends to each what it lacks."""
    whole, n = np.concatenate(pieces), len(pieces)
    told = sum(len(whole) - len(piece) for piece in pieces)
    return [whole] * n, [len(whole), told]


def run_seconds(lengths, steps, inner, outer, group=1, inner_steps=1, overlap=0, at_end=True):
    """The seconds at which the last device ends, of many runs at once.

    Args:
      steps: `steps()` → seconds of one step of every device, [runs, devices].
      inner, outer: seconds of what is said at an inner stage's and at a round's end.
      group: devices with successive numbers that wait for each other at the inner stages.
      overlap: the last steps of a round, which a round's end takes place beside.
      at_end: whether all wait for each other at a round's end.
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
