"""The format's own words: specifications, codecs, statistics, fidelity."""
