"""Numbers as people read them: times, counts and sizes."""

GIB = 1 << 30


def clock(seconds: float) -> str:
    """`4:05`, `1:04:05` or `3d 01:04`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """`12 s`, `40 min`, `5.2 h` or `3.1 d`."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} d"


def count(value: float, digits: int = 4) -> str:
    """With a unit of thousands, to so many significant digits: `8.593B`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def size(size_bytes: float) -> str:
    """`2.36 GB` or `13.2 MB`, of 1000."""
    return f"{size_bytes / 1e9:,.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:,.1f} MB"


def rate(value: float) -> str:
    """A learning rate: `6.0e-4`."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"
