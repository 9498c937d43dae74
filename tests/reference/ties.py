"""TIES-merging as section 3 and algorithm 1 of arXiv 2306.01708 state it, number by number."""


def merged(deltas, keep):
    """Merge task vectors, each a list of floats, of which the ``keep`` largest magnitudes are kept."""
    trimmed = []
    for delta in deltas:
        least = sorted((abs(value) for value in delta), reverse=True)[keep - 1]
        trimmed.append([value if abs(value) >= least else 0.0 for value in delta])
    result = []
    for values in zip(*trimmed, strict=True):
        total = sum(values)
        agree = [value for value in values if value * total > 0]
        result.append(sum(agree) / len(agree) if agree else 0.0)
    return result
