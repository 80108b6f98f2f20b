"""Numbers as people read them."""


def human_bytes(count: float) -> str:
    """Decimal units, three digits: 999 B, 1.23 kB, 45.6 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def human_seconds(seconds: float) -> str:
    """Seconds below a minute, then minutes, hours and days."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds < 86400:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    return f"{int(seconds // 86400)} d {int(seconds % 86400 // 3600)} h"


def plural(count: int, thing: str) -> str:
    """1 unit, 2 units."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
