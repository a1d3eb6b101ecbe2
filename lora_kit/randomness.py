"""Random bits as a pure function of integers, such as (seed, purpose, step)."""

MASK64 = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """Hash non-negative integers to 64 pseudo-random bits, the same on every machine.

    Source: the output function of SplitMix64 (Steele, Lea and Flood 2014), applied after adding a multiple of each
    number.
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + (number & MASK64) * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state
