"""Random streams by name: a stream depends on what it is for, never on a worker's rank or order."""

import hashlib


def stream(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of `seed`, e.g. `stream(0, "image", 7, 123)`."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
