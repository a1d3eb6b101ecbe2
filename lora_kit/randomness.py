"""Random numbers as a pure function: integers that say what is drawn, mixed into 64 bits."""

MASK64 = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """Return 64 well-mixed bits of the given non-negative integers, the same on every machine.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), chained over the numbers.
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + (number & MASK64) * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state
